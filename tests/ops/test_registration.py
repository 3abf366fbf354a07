# SPDX-License-Identifier: Apache-2.0
"""Schemas are pinned: callers, saved graphs and other languages rely on them."""

from __future__ import annotations

import re
from pathlib import Path

import checks  # noqa: F401  (registers what no user runs)
import pytest
import torch

from sparse_unified.bench.gpu_check import SANITIZED
from sparse_unified.checks import CUDA, all_checks
from sparse_unified.checks.problems import ARGUMENTS, OPS, call, grouped_values, pruned_values

LIBRARY = Path(__file__).parent.parent.parent / "csrc" / "bindings" / "library.cpp"

# A new optional argument with a default
# goes to the end of a pinned schema; anything else needs a new op.
SCHEMAS = {
    "route_topk": "(Tensor x, Tensor gate, int top_k) -> (Tensor, Tensor, Tensor)",
    "route_topk_backward": "(Tensor grad_logits, Tensor grad_topk_logits, Tensor topk_idx, "
    "Tensor x, Tensor gate, bool needs_x, bool needs_gate) -> (Tensor, Tensor)",
    "sort_by_expert": "(Tensor topk_idx, int num_experts) -> (Tensor, Tensor, Tensor)",
    "permute": "(Tensor x, Tensor row_token, Tensor token_rows) -> Tensor",
    "combine": "(Tensor y, Tensor? weights, Tensor token_rows, float weight_offset=0.) -> Tensor",
    "grouped_ffn": "(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj, "
    "Tensor up_proj, Tensor down_proj) -> Tensor",
    "grouped_ffn_combine": "(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, "
    "Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj, "
    "float weight_offset=0.) -> Tensor",
    "grouped_ffn_combine_train": "(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, "
    "Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj, "
    "float weight_offset=0.) -> (Tensor, Tensor, Tensor)",
    "grouped_ffn_combine_backward": "(Tensor grad_y, Tensor x, Tensor weights, Tensor row_token, "
    "Tensor token_rows, Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, "
    "Tensor down_proj, Tensor gate_rows, Tensor up_rows, float weight_offset, bool needs_x, "
    "bool needs_weights, bool needs_experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "pruned_ffn": "(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, "
    "Tensor down_proj, int block_size) -> Tensor",
    "pruned_ffn_train": "(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, "
    "Tensor down_proj, int block_size) -> (Tensor, Tensor, Tensor)",
    "pruned_ffn_backward": "(Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, "
    "Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, int block_size, "
    "bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "ffn_importance": "(Tensor x, Tensor gate_proj, Tensor up_proj, float threshold=0., "
    "Tensor? token_weights=None) -> (Tensor, Tensor, Tensor)",
}


def test_every_registered_op_is_pinned_and_checked() -> None:
    registered = set(re.findall(r'm\.def\(\s*"(\w+)\(', LIBRARY.read_text()))
    assert registered == set(SCHEMAS) == set(OPS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_backward_compatible(name: str) -> None:
    pinned = torch._C.parse_schema(f"sparse_unified::{name}{SCHEMAS[name]}")
    own = getattr(torch.ops.sparse_unified, name).default._schema
    assert own.is_backward_compatible_with(pinned)


@pytest.mark.parametrize("op", OPS)
def test_fakes_refuse_sizes_and_dtypes_as_kernels_do(op: str) -> None:
    values = pruned_values() if "pruned" in op else grouped_values()
    own = {name: values[name] for name in ARGUMENTS[op]}
    tensors = {name for name, value in own.items() if isinstance(value, torch.Tensor)}
    wrong = [{name: own[name].double()} for name in tensors]
    wrong += [{name: own[name][None]} for name in tensors]
    wrong += [
        {name: own[name][..., :-1]}
        for name in tensors & {"gate", "gate_proj", "up_proj", "down_proj", "grad_y", "weights"}
    ]
    wrong += [{"top_k": k} for k in (0, 99) if "top_k" in own]
    for change in wrong:
        for device in ("cpu", "meta"):
            moved = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in (own | change).items()
            }
            with pytest.raises(RuntimeError, match=f"^{op}: "):
                call(op, moved)


def test_the_checks_that_run_under_compute_sanitizer_exist() -> None:
    found = all_checks(CUDA)
    assert [name for name in SANITIZED if name not in found] == []
    assert all(found[name].is_small for name in SANITIZED)
