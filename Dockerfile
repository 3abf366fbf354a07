# SPDX-License-Identifier: Apache-2.0
# sparse_unified with its CUDA kernels in NVIDIA's PyTorch container; docs/quickstart.md.
#
#     docker build -t sparse_unified .
#     docker run --rm --gpus all sparse_unified doctor
#
# The container brings torch (26.05: 2.12, CUDA 13.2), nvcc and a constraint file that keeps them.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}

# "8.0 9.0a" compiles for A100 and H100 alone, in a third of the time; empty is all, and PTX.
ARG TORCH_CUDA_ARCH_LIST=""
ARG EXTRAS=bagel,offload,quant
WORKDIR /opt/sparse_unified
COPY . .
# hadolint ignore=DL3013
RUN SPARSE_UNIFIED_CUDA=on TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
    pip install --no-cache-dir --no-build-isolation ".[${EXTRAS}]"

WORKDIR /workspace
ENTRYPOINT ["sparse-unified"]
CMD ["info"]
