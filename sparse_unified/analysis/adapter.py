# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps its decoder layers, and which of their modules belong to which component.

An analysis needs no more than that to observe a model: the modules it hooks and the weights it
ranks. `DecoderAdapter` reads it from names, so that an adapter is a few lines of data; the shipped
ones are `LAYOUTS`. Any object with the methods of `Adapter` will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType

from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.analysis.parts import Adapter, Block, Ffn, FfnKey
from sparse_unified.analysis.stand_in import StandIn
from sparse_unified.checkpoint.keys import PROJECTIONS
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.skipped import SkippedFFN

__all__ = [
    "LAYOUTS",
    "Adapter",
    "Block",
    "BlockNames",
    "DecoderAdapter",
    "Ffn",
    "FfnKey",
    "Layout",
    "find_adapter",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames:
    """What a layer calls its modules."""

    ffn: str = "mlp"
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"

    def all(self) -> tuple[str, ...]:
        """Returns the four names."""
        return self.ffn, self.attention, self.input_norm, self.post_attention_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A family of models, described by names.

    Attributes:
        name: of the family, for messages.
        paths: where the list of decoder layers may be, from the model or from what holds it.
        components: component -> what a layer calls its modules.
        experts, shared_experts: what a mixture calls its experts, should an FFN be one.
    """

    name: str
    paths: tuple[str, ...]
    components: Mapping[str, BlockNames]
    experts: str = "experts"
    shared_experts: tuple[str, ...] = ("shared_experts", "shared_expert")

    def names(self) -> tuple[str, ...]:
        """Returns every name that a layer has to have."""
        listed = (name for names in self.components.values() for name in names.all())
        return tuple(dict.fromkeys(listed))


_PATHS = (
    "language_model.model.layers",
    "model.language_model.model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.layers",
    "model.model.layers",
    "layers",
)

LAYOUTS = (
    Layout(
        name="BAGEL",
        paths=_PATHS,
        components=MappingProxyType(
            {
                "und": BlockNames(),
                "gen": BlockNames(
                    ffn="mlp_moe_gen",
                    input_norm="input_layernorm_moe_gen",
                    post_attention_norm="post_attention_layernorm_moe_gen",
                ),
            }
        ),
    ),
    Layout(  # Qwen2.5-VL and the many decoders of the same build, dense or mixtures
        name="decoder",
        paths=_PATHS,
        components=MappingProxyType({"text": BlockNames()}),
    ),
    Layout(  # the language model of Ming-Omni
        name="Bailing",
        paths=_PATHS,
        components=MappingProxyType({"text": BlockNames(attention="attention")}),
    ),
)


class DecoderAdapter:
    """An adapter for a model whose layers are in one list and call their modules by fixed names.

    Args:
        model: a module, or an object that holds one, such as a pipeline.
        layout: how it is laid out.

    Raises:
        ValueError: no path of the layout leads to layers that have all modules of all components;
            the message names what each path led to.
    """

    def __init__(self, model: object, layout: Layout) -> None:
        found = []
        for path in layout.paths:
            layers = reduce(lambda at, name: getattr(at, name, None), path.split("."), model)
            if not (hasattr(layers, "__len__") and hasattr(layers, "__getitem__")):
                continue
            modules = [layers[i] for i in range(len(layers))]
            missing = _missing(modules, layout)
            if modules and not missing:
                self.layout, self.path, self.layers = layout, path, modules
                return
            lacking = f" without {list_some(missing, 8)}" if missing else ""
            found.append(f"{path}: {len(modules)} layers{lacking}")
        raise ValueError(
            f"{layout.name}: model must have layers with {', '.join(layout.names())} under "
            f"{' or '.join(layout.paths)}, got a {type(model).__name__} with "
            + ("; ".join(found) or "none of these")
        )

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.layout.components)

    def num_layers(self) -> int:
        return len(self.layers)

    def holds(self, layer: int, component: str) -> bool:
        module = self.layers[layer]
        names = self._names(component).all()
        parts = [getattr(module, name, None) for name in names]
        return all(isinstance(p, nn.Module) and not isinstance(p, StandIn) for p in parts)

    def block(self, layer: int, component: str) -> Block:
        names = self._names(component)
        if type(layer) is not int or not 0 <= layer < len(self.layers):
            raise ValueError(f"block: layer must lie in 0 to {len(self.layers) - 1}, got {layer!r}")
        module = self.layers[layer]

        def part(name: str) -> nn.Module:
            found = getattr(module, name, None)
            if not isinstance(found, nn.Module):
                raise ValueError(
                    f"block: layer {layer} ({self.path}.{layer}) must have a module {name}, "
                    f"got a {type(module).__name__} without it"
                )
            return found

        return Block(
            component=component,
            layer=layer,
            layer_module=module,
            input_norm=part(names.input_norm),
            attention=part(names.attention),
            post_attention_norm=part(names.post_attention_norm),
            ffn=part(names.ffn),
        )

    def ffns(self, component: str) -> list[Ffn]:
        names = self._names(component)
        listed = []
        for layer, holder in enumerate(self.layers):
            module = getattr(holder, names.ffn)
            if module is None or isinstance(module, SkippedFFN | StandIn):
                continue
            path = f"{self.path}.{layer}.{names.ffn}"
            if isinstance(module, SparseMoE):
                listed += _read_sparse(component, layer, path, module)
                continue
            experts = self._experts(module, path)
            parts = experts or [(path, module)]
            listed += [
                _read(component, layer, name, part, is_expert=bool(experts)) for name, part in parts
            ]
        return listed

    def _names(self, component: str) -> BlockNames:
        names = self.layout.components.get(component)
        if names is None:
            raise ValueError(
                f"{self.layout.name} model: component must be one of "
                f"{', '.join(self.components)}, got {component!r}"
            )
        return names

    def _experts(self, ffn: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
        """Returns the experts of a mixture with their paths, routed before shared; [] if dense."""
        experts = getattr(ffn, self.layout.experts, None)
        if experts is None:
            return []
        if not isinstance(experts, nn.ModuleList | Sequence) or not len(experts):
            raise ValueError(
                f"{path}: {self.layout.experts} must be a list of modules, "
                f"got a {type(experts).__name__}"
            )
        found = [(f"{path}.{self.layout.experts}.{i}", part) for i, part in enumerate(experts)]
        for name in self.layout.shared_experts:
            shared = getattr(ffn, name, None)
            if isinstance(shared, nn.Module):
                found.append((f"{path}.{name}", shared))
        return found


def find_adapter(model: object, layouts: Sequence[Layout] = LAYOUTS) -> Adapter:
    """Returns the adapter of the first layout that a model or pipeline fits, judged by structure.

    Args:
        model: a module or what holds one; an `Adapter` is returned as it is.
        layouts: tried in order.

    Raises:
        ValueError: none fits; the message says for each what was looked for and found.
    """
    if isinstance(model, Adapter):
        return model
    problems = []
    for layout in layouts:
        try:
            return DecoderAdapter(model, layout)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(
        f"find_adapter: model must fit one of {', '.join(layout.name for layout in layouts)}, got: "
        + "; ".join(problems)
    )


def _missing(layers: Sequence[object], layout: Layout) -> list[str]:
    """Names the modules that no layer has, or for which some layer has not even a place."""
    return [
        name
        for name in layout.names()
        if not all(hasattr(layer, name) for layer in layers)
        or not any(isinstance(getattr(layer, name), nn.Module) for layer in layers)
    ]


def _read_sparse(component: str, layer: int, path: str, block: SparseMoE) -> list[Ffn]:
    """Returns the experts of a block, the shared one first, as views of its fused weights."""
    layout = block.layout
    ranges = {f"experts.{e}": layout.expert_range(e) for e in range(layout.num_experts)}
    if layout.shared_width:
        ranges = {"shared_expert": layout.shared_range()} | ranges
    return [
        Ffn(
            component=component,
            layer=layer,
            name=f"{path}.{name}",
            module=block,
            gate_proj=block.gate_proj.detach()[start:stop],
            up_proj=block.up_proj.detach()[start:stop],
            down_proj=block.down_proj.detach()[:, start:stop],
            is_expert=True,
        )
        for name, (start, stop) in ranges.items()
    ]


def _read(component: str, layer: int, name: str, module: nn.Module, *, is_expert: bool) -> Ffn:
    weights: dict[str, Tensor] = {}
    for projection in PROJECTIONS:
        part = getattr(module, projection, None)
        weight = getattr(part, "weight", None) if isinstance(part, nn.Module) else None
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"{name}: FFN must be dense with weights {', '.join(PROJECTIONS)}, "
                f"got a {type(module).__name__}"
            )
        if getattr(part, "bias", None) is not None:
            raise ValueError(f"{name}: {projection} must have no bias, got one")
        weights[projection] = weight.detach()
    shapes = [list(weight.shape) for weight in weights.values()]
    if not shapes[0] == shapes[1] == shapes[2][::-1]:
        raise ValueError(
            f"{name}: weights must have shapes [I, D], [I, D] and [D, I], "
            f"got {', '.join(map(str, shapes))}"
        )
    return Ffn(
        component=component,
        layer=layer,
        name=name,
        module=module,
        is_expert=is_expert,
        **weights,
    )
