# SPDX-License-Identifier: Apache-2.0
"""Adapters to what others serve models with; docs/engines.md.

`vllm_omni` registers with vLLM-Omni, `diffusers_pipeline` is a pipeline of diffusers, `layers` and
`kernels_hub` are stateless layers for kernels. Each module imports its engine, or leaves it alone
until it is used; none is imported from here.
"""
