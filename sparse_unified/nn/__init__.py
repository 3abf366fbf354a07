# SPDX-License-Identifier: Apache-2.0
"""Modules: the dense SwiGLU FFN and the sparse block that replaces it."""

from sparse_unified.nn.dense import QueryProjection, SwiGLU, key_heads_read
from sparse_unified.nn.sparse_moe import SparseMoE, active_experts

__all__ = ["QueryProjection", "SparseMoE", "SwiGLU", "active_experts", "key_heads_read"]
