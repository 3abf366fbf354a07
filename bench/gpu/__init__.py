# SPDX-License-Identifier: Apache-2.0
"""The parts of `bench/gpu_check.py`, which runs each in a process of its own.

A part is a function of a `Job`: it fills `job.content`, saves it as it goes, and returns whether
all is well.
"""
