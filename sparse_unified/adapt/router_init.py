# SPDX-License-Identifier: Apache-2.0
"""First routers of sparse blocks in a live model, before anything is tuned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from sparse_unified._common import Report, check_int, choice, context, list_some, naming
from sparse_unified.analysis import FfnStatistics
from sparse_unified.experts.router import RouterInit, check_inputs
from sparse_unified.surgery.decoder import find_sparse_blocks
from sparse_unified.surgery.moe import first_router, set_routers_

Inputs = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRouter:
    """The router of one block.

    Attributes:
        error_zero: relative L2 distance of the sparse output to the one with all experts, with a
            router of zeros, over every fifth calibration token; None unless fitted.
        error: the same with a router fitted to the other tokens.
        logit_rms: root mean square of the logits on the calibration tokens; None unless fitted.
    """

    component: str
    layer: int
    error_zero: float | None
    error: float | None
    logit_rms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport(Report):
    """What `init_router_` did, block by block."""

    method: str
    layers: tuple[StartedRouter, ...]

    def headings(self) -> Sequence[str]:
        return [field.name.replace("_", " ") for field in fields(StartedRouter)]

    def table(self) -> Sequence[Sequence[object]]:
        return [
            ["-" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in astuple(own)]
            for own in self.layers
        ]


@context("init_router_")
def init_router_(
    model: object,
    method: RouterInit | str,
    *,
    statistics: FfnStatistics | Inputs | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    components: Sequence[str] | None = None,
) -> RouterReport:
    """Sets the routers of all sparse blocks of a live model, in place.

    "zero" is how conversion leaves them: a tie, which the first top_k experts win on every token.
    "random" draws small weights. "activation" fits each router to how much its experts give on
    calibration tokens, see `sparse_unified.experts.fit_router`. The routers of und blocks for
    text and for ViT tokens start the same; that of a shared expert becomes zero.

    Args:
        model: a module or pipeline with `SparseMoE` blocks, whatever their partition.
        method: "zero", "random" or "activation".
        statistics: of "activation" alone: those of the dense model with `num_inputs` above 0, or
            `{component: {layer: x [N, D]}}`, N >= 8. Neurons are no longer where they were, so
            that it is only checked that components, layers and hidden size fit.
        tasks: whose inputs are taken from the statistics; None is all.
        seed: of "random".
        components: whose blocks; None is all.

    Returns:
        one entry per block.

    Raises:
        ValueError: there are no sparse blocks, the method is none of these, or statistics are
            missing, not needed, keep no inputs or do not fit. The model is as before.
    """
    chosen = choice("method", RouterInit, method)
    check_int("seed", seed, 0)
    if (chosen is RouterInit.ACTIVATION) != (statistics is not None):
        got = "none" if statistics is None else f"{type(statistics).__name__} with {chosen.value!r}"
        raise ValueError(
            f"statistics must be given with method 'activation', and with no other, got {got}"
        )
    blocks = find_sparse_blocks(model, components)
    inputs = _inputs(statistics, {component for component, _, _ in blocks}, tasks)
    started, weights = [], []
    for component, layer, block in blocks:
        with naming(f"{component} layer {layer}"):
            x = inputs.get(component, {}).get(layer)
            if chosen is RouterInit.ACTIVATION:
                if x is None:
                    raise ValueError(
                        f"statistics must hold inputs of it, got some of {component} layers "
                        f"{list_some(inputs.get(component, {}))}"
                    )
                check_inputs(x, block.hidden_size)
            if block.gate.weight.is_meta:
                raise ValueError("weights must be in memory, got meta")
            weight, fit = first_router(block, chosen, layer=layer, seed=seed, inputs=x)
            if fit is not None and not math.isfinite(fit.logit_rms):
                raise ValueError("experts must give finite values, got NaN or infinity")
        weights.append(weight)
        found = {name: getattr(fit, name, None) for name in ("error_zero", "error", "logit_rms")}
        started.append(StartedRouter(component=component, layer=layer, **found))
    with torch.no_grad():
        for (_, _, block), weight in zip(blocks, weights, strict=True):
            set_routers_(block, weight)
    return RouterReport(method=chosen.value, layers=tuple(started))


def _inputs(
    statistics: FfnStatistics | Inputs | None,
    components: Iterable[str],
    tasks: Sequence[str] | None,
) -> Inputs:
    if not isinstance(statistics, FfnStatistics):
        return statistics or {}
    kept = {component: statistics.inputs(component, tasks) for component in components}
    return {
        component: {layer: x for layer, x in own.items() if isinstance(layer, int)}
        for component, own in kept.items()
    }
