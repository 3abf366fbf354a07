# SPDX-License-Identifier: Apache-2.0
"""Half of a FFN: pruned_ffn on kept blocks of a dense FFN, that FFN, and one of half its width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.nn import SwiGLU

from .block import Measured, Missing, Progress
from .cases import PrunedCase, pruned_work
from .harness import NUM_INPUTS, Roof, inputs, measure_group
from .peers.protocol import first_line
from .target import Target
from .timing import Call, capture

OP = "pruned_ffn"


class PrunedFfn(nn.Module):
    """pruned_ffn on the weights of `dense`; half of its blocks are kept, drawn at random."""

    def __init__(self, dense: SwiGLU, case: PrunedCase, seed: int = 0) -> None:
        super().__init__()
        self.dense = dense
        self.block_size = case.block_size
        num_blocks = case.intermediate_size // case.block_size
        drawn = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        kept = drawn[: case.num_kept].sort().values.int()
        self.kept_blocks = kept.to(dense.gate_proj.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return ops.pruned_ffn(
            x,
            self.kept_blocks,
            self.dense.gate_proj.weight,
            self.dense.up_proj.weight,
            self.dense.down_proj.weight,
            self.block_size,
        )


def pruned_providers(
    case: PrunedCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """Every provider, x [T, D] -> y [T, D]; `dense` is the whole FFN."""
    torch.manual_seed(0)
    half = int(case.intermediate_size * case.kept_share)
    dense, dense_half = (
        SwiGLU(case.hidden_size, width, dtype=dtype, device=device)
        for width in (case.intermediate_size, half)
    )
    return {"dense": dense, "dense_half": dense_half, "sparse_unified": PrunedFfn(dense, case)}


def _forward(module: nn.Module, xs: Sequence[Tensor], turn: int) -> None:
    with torch.inference_mode():
        module(xs[turn % len(xs)])


def _forward_backward(
    module: nn.Module, xs: Sequence[Tensor], grads: Sequence[Tensor], turn: int
) -> None:
    x = xs[turn % len(xs)].detach().requires_grad_()
    module(x).backward(grads[turn % len(grads)])
    module.zero_grad(set_to_none=True)


def measure_pruned(
    case: PrunedCase,
    dtype: torch.dtype,
    direction: str,
    target: Target,
    roof: Roof,
    *,
    repeats: int,
    graph: bool = False,
    progress: Progress | None = None,
    build: Callable[..., dict[str, nn.Module]] = pruned_providers,
) -> Measured:
    """Measures half of a FFN in one direction.

    Args:
        case, dtype, direction: what; a direction of `DIRECTIONS`, frozen weights in the last.
        target, roof: where, and what it reaches at most.
        repeats: rounds that count.
        graph: replay CUDA graphs.

    Returns:
        A record of each provider that runs there, and the others with a reason.
    """
    shape = (case.tokens, case.hidden_size)
    xs, grads = (inputs(shape, dtype, device=target.device) for _ in range(2))
    measured = Measured()
    calls: dict[str, Call] = {}
    graphs: set[str] = set()
    for name, module in build(case, dtype, target.device).items():
        module.requires_grad_(direction == "fwd_bwd")
        call: Call = (
            partial(_forward, module, xs)
            if direction == "fwd"
            else partial(_forward_backward, module, xs, grads)
        )
        try:
            call(0)
            if graph and target.is_cuda:
                call = capture(call, NUM_INPUTS)
                graphs.add(name)
        except Exception as error:  # the others are measured
            measured.missing.append(
                Missing(
                    op=OP,
                    case=case.name,
                    direction=direction,
                    dtype=str(dtype).removeprefix("torch."),
                    provider=name,
                    reason=first_line(error),
                )
            )
        else:
            calls[name] = call
    measured.records += measure_group(
        calls,
        {
            name: pruned_work(
                case, dtype, direction, share=1 if name == "dense" else case.kept_share
            )
            for name in calls
        },
        op=OP,
        case=case.name,
        direction=direction,
        dtype=dtype,
        roof=roof,
        repeats=repeats,
        timer=target.timer,
        graphs=frozenset(graphs),
        on_round=progress,
    )
    return measured
