# SPDX-License-Identifier: Apache-2.0
"""Bad arguments of the ops: one sentence each, `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import ffn_case, pruned_problem
from torch import Tensor

from sparse_unified import ops

INT = torch.int32
NAN = float("nan")
OPS = torch.ops.sparse_unified
Arguments = dict[str, Any]
Change = Callable[[Any], Any]


def legal(num_tokens: int = 6) -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """Calls that are answered, each argument by name."""
    torch.manual_seed(0)
    case = ffn_case(num_tokens, 8, 3, 4, 2)
    pruned = pruned_problem(num_tokens, 8, 6, 32, (4, 1))
    _, *kept_rows = pruned.train(*pruned.leaves)
    x, gate = torch.randn(6, 8), torch.randn(5, 8)
    rows = torch.randn(2 * num_tokens, 8)
    blocks = {"kept_blocks": torch.tensor([4, 1], dtype=INT)}
    maps = {"row_token": case.row_token, "token_rows": case.token_rows}
    combined = {"weights": case.weights, "token_rows": case.token_rows}
    experts = {
        "expert_offsets": case.expert_offsets,
        "gate_proj": case.gate_proj,
        "up_proj": case.up_proj,
        "down_proj": case.down_proj,
    }
    own = pruned.tensors
    listed = {"x": own["x"]} | blocks | {name: own[name] for name in list(own)[1:]}
    needs = {"needs_x": True, "needs_weights": True}
    return {
        "route_topk": (ops.route_topk, {"x": x, "gate": gate, "top_k": 2}),
        "sort_by_expert": (
            ops.sort_by_expert,
            {"topk_idx": torch.zeros(4, 2, dtype=INT), "num_experts": 3},
        ),
        "permute": (ops.permute, {"x": case.x} | maps),
        "combine": (ops.combine, {"y": rows} | combined),
        "grouped_ffn": (
            ops.grouped_ffn,
            {"x": case.x, "row_token": case.row_token} | experts | {"token_rows": case.token_rows},
        ),
        "grouped_ffn_combine": (
            ops.grouped_ffn_combine,
            {"x": case.x, "weights": case.weights} | maps | experts,
        ),
        "pruned_ffn": (ops.pruned_ffn, listed | {"block_size": 32}),
        "ffn_importance": (
            ops.ffn_importance,
            {"x": x, "gate_proj": gate, "up_proj": gate.clone(), "threshold": 0.0}
            | {"token_weights": torch.ones(6)},
        ),
        "route_topk_backward": (
            OPS.route_topk_backward,
            {"grad_logits": torch.randn(6, 5), "grad_topk_logits": torch.randn(6, 2)}
            | {"topk_idx": torch.zeros(6, 2, dtype=INT), "x": x, "gate": gate}
            | {"needs_x": True, "needs_gate": True},
        ),
        "combine_backward": (
            OPS.combine_backward,
            {"grad_out": case.x, "y": rows} | combined | {"needs_y": True, "needs_weights": True},
        ),
        "grouped_ffn_backward": (
            OPS.grouped_ffn_backward,
            {"grad_y": rows, "x": case.x, "row_token": case.row_token}
            | experts
            | {"gate_rows": rows[:, :4].clone(), "up_rows": rows[:, :4].clone()}
            | needs,
        ),
        "pruned_ffn_backward": (
            OPS.pruned_ffn_backward,
            {"grad_y": own["x"]}
            | listed
            | {"gate_rows": kept_rows[0], "up_rows": kept_rows[1], "block_size": 32}
            | needs,
        ),
    }


def at(index: int | tuple[int, int], value: int) -> Change:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def to(value: Any) -> Change:
    return lambda _: value


UNSUPPORTED = (torch.float64, torch.int32, torch.bool, torch.complex64)
FIRST = {"combine": "y", "sort_by_expert": "topk_idx"}
FORWARD = ("route_topk", "permute", "combine", "grouped_ffn", "pruned_ffn", "ffn_importance")
BLOCKS = r"be a multiple of 16 up to 128 that divides the width 192 .*, got "
# Op, argument, what is done to it, and the rule of the refusal.
REFUSED: list[tuple[str, str, Change, str]] = [
    *(
        (
            op,
            FIRST.get(op, "x"),
            lambda t, d=dtype: torch.ones_like(t).to(d),
            "be float32, bfloat16",
        )
        for op in FORWARD
        for dtype in UNSUPPORTED
    ),
    *((op, FIRST.get(op, "x"), lambda t: t[0], "have 2 dimensions, got shape") for op in FORWARD),
    ("route_topk", "gate", lambda t: t[0], "have 2 dimensions"),
    ("route_topk", "gate", lambda t: t.bfloat16(), "have dtype float32"),
    ("route_topk", "gate", lambda t: t[:, :7], "have the hidden size"),
    *(("route_topk", "top_k", to(bad), f"be from 1 to .*5, got {bad}") for bad in (0, -1, 6)),
    ("sort_by_expert", "topk_idx", lambda t: t.long(), "have dtype int32, got int64"),
    ("sort_by_expert", "topk_idx", lambda t: t[0], "have 2 dimensions"),
    ("sort_by_expert", "num_experts", to(0), "be at least 1, got 0"),
    *(
        ("sort_by_expert", "topk_idx", at((2, 1), bad), f".* 0 to 2, got {bad} at position 5")
        for bad in (-1, 3)
    ),
    ("permute", "row_token", lambda t: t.long(), "have dtype int32"),
    ("permute", "row_token", lambda t: t.clamp(min=1), ""),
    ("permute", "token_rows", lambda t: t[:2], ""),
    ("permute", "row_token|token_rows", lambda t: t[:5], ""),
    ("combine", "token_rows", at((2, 1), 12), ".* got 12"),
    ("combine", "token_rows", lambda t: t - 1, ".* got -1"),
    ("combine", "weights", lambda t: t.half(), "have dtype float32"),
    ("combine", "weights", lambda t: t[:, :1], "have the shape"),
    ("grouped_ffn", "row_token", lambda t: t.long(), "have dtype int32"),
    ("grouped_ffn", "row_token", lambda t: t + 6, "hold indices from 0 to 5"),
    ("grouped_ffn", "expert_offsets", at(-1, 11), "end at the number of rows"),
    ("grouped_ffn", "expert_offsets", lambda t: t[:1], "have at least 2 entries"),
    ("grouped_ffn", "expert_offsets", at(0, 1), "start at 0"),
    ("grouped_ffn", "expert_offsets", at(1, 13), "not decrease"),
    ("grouped_ffn", "gate_proj", lambda t: t.half(), "have dtype float32, got float16"),
    ("grouped_ffn", "gate_proj", lambda t: t[:, :7], "have the hidden size"),
    ("grouped_ffn", "gate_proj", lambda t: t[:11], "have rows in equal numbers for 3 experts"),
    ("grouped_ffn", "up_proj", lambda t: t[:9], "have the width of gate_proj"),
    ("grouped_ffn", "up_proj", lambda t: t.bfloat16(), "have dtype float32, got bfloat16"),
    ("grouped_ffn", "down_proj", lambda t: t[:, :9], "have the width of gate_proj"),
    ("grouped_ffn", "down_proj", lambda t: t[:7], "have the hidden size"),
    ("grouped_ffn", "down_proj", lambda t: t[0], "have 2 dimensions"),
    ("grouped_ffn_combine", "x", lambda t: t[0], ""),
    ("grouped_ffn_combine", "weights", lambda t: t.half(), ""),
    ("grouped_ffn_combine", "weights", lambda t: t[:, :1], ""),
    ("grouped_ffn_combine", "token_rows", lambda t: t.long(), ""),
    ("grouped_ffn_combine", "token_rows", lambda t: t[:-1], ""),
    ("grouped_ffn_combine", "token_rows", lambda t: t + 1, ""),
    ("pruned_ffn", "kept_blocks", lambda t: t.long(), "have dtype int32, got int64"),
    ("pruned_ffn", "kept_blocks", lambda t: t[None], "have 1 dimension"),
    ("pruned_ffn", "kept_blocks", lambda t: t + 2, "hold indices from 0 to 5, got 6"),
    ("pruned_ffn", "kept_blocks", lambda t: t - 2, "hold indices .*, got -1 at position 1"),
    ("pruned_ffn", "kept_blocks", at(1, 4), "name no block twice, got 4 again at position 1"),
    ("pruned_ffn", "gate_proj", lambda t: t[:, :7], "have the hidden size"),
    ("pruned_ffn", "gate_proj", lambda t: t[:190], "have a width that is a multiple of 16"),
    ("pruned_ffn", "up_proj", lambda t: t[:176], "have the width of gate_proj"),
    ("pruned_ffn", "down_proj", lambda t: t[:, :176], "have the width of gate_proj"),
    ("pruned_ffn", "down_proj", lambda t: t[:7], "have the hidden size"),
    *(
        ("pruned_ffn", "block_size", to(bad), f"{BLOCKS}{bad}")
        for bad in (0, -16, 8, 17, 80, 128, 192)
    ),
    ("ffn_importance", "gate_proj", lambda t: t[:, :7], "have the hidden size"),
    ("ffn_importance", "up_proj", lambda t: t[:4], "have the width of gate_proj"),
    *(
        ("ffn_importance", "threshold", to(bad), "be finite and at least 0")
        for bad in (-0.5, NAN, float("inf"))
    ),
    ("ffn_importance", "token_weights", lambda t: t[:5], "have the number of tokens"),
    ("ffn_importance", "token_weights", lambda t: t.bool(), "have dtype float32"),
    ("ffn_importance", "token_weights", lambda t: -t, "be finite .*, got -1 for token 0"),
    ("ffn_importance", "token_weights", lambda t: t * NAN, "be finite and at least 0, got nan"),
    ("route_topk_backward", "grad_logits", lambda t: t[:, :4], ""),
    ("combine_backward", "grad_out", lambda t: t[:5], ""),
    ("grouped_ffn_backward", "grad_y", lambda t: t[:5], "have the number of rows"),
    ("grouped_ffn_backward", "gate_rows", lambda t: t[:, :3], "have the width of the activations"),
    ("pruned_ffn_backward", "grad_y", lambda t: t[:5], "have the number of rows"),
    ("pruned_ffn_backward", "grad_y", lambda t: t.half(), "have dtype float32"),
    ("pruned_ffn_backward", "gate_rows", lambda t: t[:, 1:], "have the width of the activations"),
    ("pruned_ffn_backward", "up_rows", lambda t: t[:5], "have the number of rows"),
]


def fails(pattern: str, call: Callable[..., Any], arguments: Arguments) -> None:
    with pytest.raises(RuntimeError, match=pattern) as caught:
        call(*arguments.values())
    first_line = str(caught.value).splitlines()[0]
    assert re.search(r"^\w+: [\w ]+ must .+, got .+", first_line), first_line


@pytest.mark.parametrize("position", range(len(REFUSED)), ids=lambda i: "-".join(REFUSED[i][:2]))
def test_a_bad_argument_is_named_with_its_rule(position: int) -> None:
    op, argument, change, rule = REFUSED[position]
    call, arguments = legal()[op]
    name = argument.split("|")[0]
    named = f"^({op}|combine): ({argument}) must .*{rule}"
    fails(named, call, arguments | {name: change(arguments[name])})


def test_every_legal_call_is_answered() -> None:
    for call, arguments in legal().values():
        call(*arguments.values())


@pytest.mark.parametrize("op", ["route_topk", "grouped_ffn", "pruned_ffn", "ffn_importance"])
def test_arguments_on_two_devices_are_refused(op: str) -> None:
    call, arguments = legal()[op]
    changed = arguments | {"x": arguments["x"].to("meta")}
    fails(f"{op}: arguments must .*one device", call, changed)


@pytest.mark.parametrize("num_tokens", [5, 300])
@pytest.mark.parametrize("op", ["permute", "grouped_ffn", "grouped_ffn_combine"])
def test_row_maps_that_contradict_each_other_are_refused(op: str, num_tokens: int) -> None:
    call, arguments = legal(num_tokens)[op]
    wrong = arguments["token_rows"].flip(0).contiguous()  # every row once, but of other tokens
    fails(
        f"{op}: row_token must name the token whose rows token_rows lists",
        call,
        arguments | {"token_rows": wrong},
    )
