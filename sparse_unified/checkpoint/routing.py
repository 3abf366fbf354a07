# SPDX-License-Identifier: Apache-2.0
"""What a conversion computes, layer by layer: the order of the neurons, and the first routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import list_some, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.experts import (
    ExpertLayout,
    Partition,
    RouterInit,
    check_inputs,
    fit_router,
    hidden_activations,
    order_neurons,
    random_router,
)

LayerInputs = Mapping[int, Tensor]
Inputs = Mapping[str, LayerInputs] | LayerInputs


def resolve_inputs(
    inputs: Inputs | None, config: MoEConfig, sizes: Mapping[int, int], *, what: str
) -> LayerInputs:
    """Returns the calibration inputs of each layer, checked; {} where none are needed.

    Args:
        inputs: `{layer: [N, D]}`, or `{component: {layer: [N, D]}}`.
        config: what is done with them; they must be given exactly where it needs them.
        sizes: layer -> hidden size D, of the layers that must be there.
        what: start of messages.

    Raises:
        ValueError: they are missing, not needed, lack the component or a layer, or do not fit.
        TypeError: they are no tensors by layer.
    """
    asked = [] if config.partition is not Partition.COACTIVATION else ["partition 'coactivation'"]
    if config.router_init is RouterInit.ACTIVATION:
        asked.append("router_init 'activation'")
    if inputs is None and asked:
        raise ValueError(
            f"{what}: inputs must be given for {' and '.join(asked)}, got none; statistics that "
            "calibrate gathers with --inputs hold them"
        )
    if inputs is None:
        return {}
    if not asked:
        raise ValueError(
            f"{what}: inputs must come with partition 'coactivation' or router_init 'activation', "
            f"got {config.partition.value!r:.120} and {config.router_init.value!r:.120}"
        )
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{what}: inputs must map layers to tensors, got {type(inputs).__name__}")
    own: Mapping[object, object] = inputs  # type: ignore[assignment]
    if any(name in own for name in keys.FFN_NAMES):
        by_layer = own.get(config.component)
        if not isinstance(by_layer, Mapping):
            raise ValueError(
                f"{what}: inputs must hold {config.component}, got {list_some(sorted(own))}"  # type: ignore[type-var]
            )
        own = by_layer
    found = {}
    for layer, hidden_size in sizes.items():
        value = own.get(layer)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{what}: inputs must hold a tensor for layers {list_some(sizes)}, "
                f"got {type(value).__name__} for layer {layer}"
            )
        with naming(f"{what}: layer {layer}"):
            check_inputs(value, hidden_size)
        found[layer] = value
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Orders the neurons of dense layers and makes their routers; each layer once, when asked for.

    Attributes:
        layouts: layer -> neuron ranges.
        scores_of: layer -> scores [I].
        inputs: layer -> calibration inputs [N, D]; {} where the config needs none.
        what: start of messages.
    """

    source: Checkpoint
    config: MoEConfig
    layouts: Mapping[int, ExpertLayout]
    scores_of: Callable[[int], Tensor]
    inputs: LayerInputs
    what: str
    _indices: dict[int, np.ndarray] = field(default_factory=dict)

    def index_of(self, layer: int) -> np.ndarray:
        """Returns neuron_index [I] int64, position in expert order -> dense neuron."""
        if layer not in self._indices:
            hidden = None
            if self.config.partition is Partition.COACTIVATION:
                gate_proj, up_proj = (self._read(layer, name) for name in keys.PROJECTIONS[:2])
                hidden = hidden_activations(self.inputs[layer], gate_proj, up_proj)
            try:
                index = order_neurons(
                    self.config.partition,
                    self.scores_of(layer),
                    self.layouts[layer],
                    seed=self.config.seed,
                    layer=layer,
                    hidden=hidden,
                )
            except ValueError as error:
                at = f"{self.what}: {self.config.component} layer {layer}"
                raise ValueError(f"{at}: {error}") from error
            self._indices[layer] = index.numpy()
        return self._indices[layer]

    def routers_of(self, layer: int) -> dict[str, Tensor]:
        """Returns the weights of each router by name, in the dtype of the layer.

        Both routers of und blocks start the same; the shared expert's is zero.
        """
        component, config = self.config.component, self.config
        ffn = self.source.ffns[component][layer]
        shapes = {
            name: (1 if name == "gate_shared" else config.num_experts, ffn.hidden_size)
            for name in keys.router_names(component)
        }
        zeros = {name: torch.zeros(shape, dtype=ffn.dtype) for name, shape in shapes.items()}
        if config.router_init is RouterInit.ZERO:
            return zeros
        if config.router_init is RouterInit.RANDOM:
            weight = random_router(
                config.num_experts, ffn.hidden_size, seed=config.seed, layer=layer
            )
        else:
            index = torch.from_numpy(self.index_of(layer))
            gate_proj, up_proj, down_proj = (self._read(layer, name) for name in keys.PROJECTIONS)
            weight = fit_router(
                self.inputs[layer],
                gate_proj[index],
                up_proj[index],
                down_proj[:, index],
                self.layouts[layer],
                config.top_k,
            ).weight
        return {
            name: zero if name == "gate_shared" else weight.to(ffn.dtype)
            for name, zero in zeros.items()
        }

    def _read(self, layer: int, name: str) -> Tensor:
        return self.source.read(keys.dense_key(self.config.component, layer, name))
