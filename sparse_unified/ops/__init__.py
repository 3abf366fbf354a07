# SPDX-License-Identifier: Apache-2.0
"""The ops of the sparse FFN: one name in schema, kernel, binding, reference, test and benchmark."""

from sparse_unified import _library  # noqa: F401  (registers torch.ops.sparse_unified)
from sparse_unified.ops import choices  # noqa: F401  (tells the kernels what was found out)
from sparse_unified.ops.combine import combine
from sparse_unified.ops.ffn_importance import ffn_importance
from sparse_unified.ops.grouped_ffn import grouped_ffn
from sparse_unified.ops.grouped_ffn_combine import grouped_ffn_combine
from sparse_unified.ops.permute import permute
from sparse_unified.ops.pruned_ffn import pruned_ffn
from sparse_unified.ops.route_topk import route_topk
from sparse_unified.ops.sort_by_expert import sort_by_expert

__all__ = [
    "combine",
    "ffn_importance",
    "grouped_ffn",
    "grouped_ffn_combine",
    "permute",
    "pruned_ffn",
    "route_topk",
    "sort_by_expert",
]
