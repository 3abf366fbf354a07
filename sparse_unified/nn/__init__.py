# SPDX-License-Identifier: Apache-2.0
"""Modules: the dense SwiGLU FFN and the sparse block that replaces it."""

from sparse_unified.nn.query_projection import QueryProjection, key_heads_read
from sparse_unified.nn.sparse_moe import SparseMoE
from sparse_unified.nn.swiglu import SwiGLU

__all__ = ["QueryProjection", "SparseMoE", "SwiGLU", "key_heads_read"]
