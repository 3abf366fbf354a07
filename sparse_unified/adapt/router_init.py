# SPDX-License-Identifier: Apache-2.0
"""First routers of sparse blocks in a live model, before anything is tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_unified._common import Report, check_int, choice, context, list_some, naming
from sparse_unified.analysis import FfnStatistics
from sparse_unified.experts.router import RouterInit, check_inputs
from sparse_unified.surgery.decoder import find_sparse_blocks
from sparse_unified.surgery.moe import first_router, set_routers_

Inputs = Mapping[str, Mapping[int, Tensor]]


_ERRORS = ("error_zero", "error", "logit_rms")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport(Report):
    """What `init_router_` did.

    Attributes:
        method: how.
        layers: of each block `component`, `layer` and, where a router was fitted, `error_zero`,
            `error` and `logit_rms` of `experts.router.fit_router`; None elsewhere.
    """

    method: str
    layers: tuple[dict[str, Any], ...]

    def headings(self) -> Sequence[str]:
        return [name.replace("_", " ") for name in self.layers[0]]

    def table(self) -> Sequence[Sequence[object]]:
        return [
            ["-" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in own.values()]
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
    calibration tokens, see `experts.router.fit_router`. The routers of und blocks for
    text and for ViT tokens start the same; `gate_shared` and `gate_time` become zero.

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
    inputs: Inputs = {}
    if isinstance(statistics, FfnStatistics):
        inputs = {
            component: statistics.inputs(component, tasks)  # type: ignore[misc]
            for component in {component for component, _, _ in blocks}
        }
    elif statistics is not None:
        inputs = statistics
    started, weights = [], []
    for component, layer, block in blocks:
        with naming(f"{component} layer {layer}"):
            own = inputs.get(component, {})
            x = own.get(layer)
            if chosen is RouterInit.ACTIVATION:
                if x is None:
                    raise ValueError(
                        f"statistics must hold inputs of it, got some of {component} layers "
                        f"{list_some(own)}"
                    )
                check_inputs(x, block.hidden_size)
            if block.gate.weight.is_meta:
                raise ValueError("weights must be in memory, got meta")
            weight, fit = first_router(block, chosen, layer=layer, seed=seed, inputs=x)
            if fit is not None and not math.isfinite(fit.logit_rms):
                raise ValueError("experts must give finite values, got NaN or infinity")
        weights.append(weight)
        errors = {name: getattr(fit, name, None) for name in _ERRORS}
        started.append({"component": component, "layer": layer, **errors})
    for (_, _, block), weight in zip(blocks, weights, strict=True):
        set_routers_(block, weight)
    return RouterReport(method=chosen.value, layers=tuple(started))
