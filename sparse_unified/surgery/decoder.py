# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps its decoder layers, and which of their modules belong to which component.

Structure decides, never the class: attribute names and tensors. `find_decoder` takes what the
transforms need, decoder layers with the FFNs `mlp` (und) and `mlp_moe_gen` (gen), or with `mlp`
alone: our model, the official ones, decoders of transformers and of serving engines, and pipelines
that hold one of them. `find_adapter` takes what an analysis needs, every module that a `Layout`
names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.cuts import select
from sparse_unified.surgery.exchange import Slot
from sparse_unified.surgery.ffn import (
    MERGED_PROJECTIONS,
    Skipped,
    describe_module,
    projection_names,
)

# Where decoder layers are looked for first; `find_decoder` then looks in every nn.ModuleList.
LAYER_PATHS = (
    "language_model.model.layers",
    "model.language_model.model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.layers",
    "model.model.layers",
    "layers",
)

# Of the scores and statistics of one FFN: its layer, or (layer, name) for one of several there.
FfnKey = int | tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """One SwiGLU FFN: that of a layer, or one expert inside its mixture.

    Attributes:
        component, layer: where it belongs.
        name: dotted path of the module, from the object the adapter was made for.
        module: what a forward hook observes; its first argument is x [..., D]. Of an expert of a
            `SparseMoE` that is the whole block, which gets more tokens than the expert.
        gate_proj, up_proj: [I, D], the live weights.
        down_proj: [D, I], the live weight.
        is_expert: one of several FFNs of its layer.
    """

    component: str
    layer: int
    name: str
    module: nn.Module
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    is_expert: bool = False

    @property
    def key(self) -> FfnKey:
        """Under which scores and statistics of this FFN are kept."""
        return (self.layer, self.name) if self.is_expert else self.layer

    @property
    def intermediate_size(self) -> int:
        """I, neurons."""
        return self.gate_proj.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The modules of one layer of one component between which the residual stream can be seen.

    x1 = x + attention(input_norm(x)), then y = x1 + ffn(post_attention_norm(x1)): the input of the
    first norm is x, that of the second x1, and y is x1 plus the output of `ffn`.

    Attributes:
        layer_module: the whole layer, of all components.
        attention: may be shared between components.
        ffn: dense, or a mixture of experts.
    """

    component: str
    layer: int
    layer_module: nn.Module
    input_norm: nn.Module
    attention: nn.Module
    post_attention_norm: nn.Module
    ffn: nn.Module


@runtime_checkable
class Adapter(Protocol):
    """What the analysis asks of a model."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that are probed one by one."""

    def num_layers(self) -> int:
        """Returns the number of decoder layers."""

    def holds(self, layer: int, component: str) -> bool:
        """Tells whether a layer has all of its modules; a part that was skipped is gone."""

    def ffns(self, component: str) -> list[Ffn]:
        """Returns the FFNs of a component, layer by layer; of a mixture every expert.

        Layers that skip theirs are left out.

        Raises:
            ValueError: the model lacks the component, or an FFN is not three plain weights.
        """

    def block(self, layer: int, component: str) -> Block:
        """Returns the modules of one layer.

        Raises:
            ValueError: the model lacks the layer, the component or one of the modules.
        """


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
    paths: tuple[str, ...] = LAYER_PATHS
    components: Mapping[str, BlockNames]
    experts: str = "experts"
    shared_experts: tuple[str, ...] = ("shared_experts", "shared_expert")

    def names(self) -> tuple[str, ...]:
        """Returns every name that a layer has to have."""
        listed = (name for names in self.components.values() for name in names.all())
        return tuple(dict.fromkeys(listed))


_BAGEL = Layout(
    name="BAGEL",
    components=MappingProxyType(
        {
            "und": BlockNames(),
            "gen": BlockNames(
                ffn=FFN_NAMES["gen"],
                input_norm="input_layernorm_moe_gen",
                post_attention_norm="post_attention_layernorm_moe_gen",
            ),
        }
    ),
)
LAYOUTS = (
    _BAGEL,
    # Qwen2.5-VL and the many decoders of the same build, dense or mixtures
    Layout(name="decoder", components=MappingProxyType({"text": BlockNames()})),
    # the language model of Ming-Omni
    Layout(
        name="Bailing", components=MappingProxyType({"text": BlockNames(attention="attention")})
    ),
)


class Decoder:
    """The decoder layers of a model, found under the attribute path `path`; an `Adapter`."""

    def __init__(self, path: str, layers: Sequence[nn.Module], layout: Layout) -> None:
        self.path, self.layers, self.layout = path, layers, layout

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.layout.components)

    def num_layers(self) -> int:
        return len(self.layers)

    def slot(self, layer: int, name: str) -> Slot | None:
        """Returns the slot of a module in a layer, `mlp` or `self_attn.q_proj`; None without."""
        holder, _, last = name.rpartition(".")
        module: object = self.layers[layer]
        if holder:
            module = getattr(module, holder, None)
        found = getattr(module, last, None)
        # A wrapper may show the attribute of the layer inside it; what counts is where it is.
        for owner in _modules(module):
            if last in owner._modules and owner._modules[last] is found:
                return Slot(owner, last, layer, f"{self.path}.{layer}.{name}")
        return None

    def has(self, layer: int, name: str) -> bool:
        """Tells whether a module of this name was not taken out of a layer by `skip_layers_`."""
        slot = self.slot(layer, name)
        if slot is None or slot.module is not None:
            return slot is None or not isinstance(slot.module, Skipped)
        return not takes_absent_parts(self.layers[layer])

    def ffn(self, layer: int, component: str) -> tuple[Slot, nn.Module]:
        """Returns the FFN of one layer and its slot.

        Raises:
            ValueError: the layer has none.
        """
        name = FFN_NAMES[component]
        slot = self.slot(layer, name)
        if slot is None or slot.module is None:
            module = self.layers[layer]
            raise ValueError(
                f"layer {layer} ({self.path}.{layer}.{name}): {name} must be a module of the "
                f"layer, got {type(getattr(module, name, None)).__name__} in a "
                f"{describe_module(module)}"
            )
        return slot, slot.module

    def select_ffns(
        self, layers: str | Sequence[int], component: str
    ) -> list[tuple[Slot, nn.Module]]:
        """Returns the FFNs of the selected layers; "all" and "middle" pass over skipped ones.

        Raises:
            ValueError: a layer that is named lacks it, or all do, or two layers share a module.
        """
        name = FFN_NAMES[component]
        selected = select(
            layers, len(self.layers), lambda layer: self.has(layer, name), f"{component} FFN"
        )
        found = [self.ffn(layer, component) for layer in selected]
        paths: dict[int, str] = {}
        for slot, module in found:
            first = paths.setdefault(id(module), slot.path)
            if first != slot.path:
                raise ValueError(f"{slot}: FFN must be its own module, got that of {first}")
        return found

    def holds(self, layer: int, component: str) -> bool:
        parts = [getattr(self.layers[layer], name, None) for name in self._names(component).all()]
        return all(isinstance(p, nn.Module) and not isinstance(p, Skipped) for p in parts)

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
            if module is None or isinstance(module, Skipped):
                continue
            path = f"{self.path}.{layer}.{names.ffn}"
            if isinstance(module, SparseMoE):
                listed += _read_sparse(component, layer, path, module)
                continue
            experts = self._experts(module, path)
            parts = experts or [(path, module)]
            listed += [
                _read_dense(component, layer, name, part, is_expert=bool(experts))
                for name, part in parts
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


def takes_absent_parts(layer: nn.Module) -> bool:
    """Tells whether a layer runs without the parts that are None, as ours does."""
    return any(getattr(type(module), "takes_absent_parts", False) for module in _modules(layer))


def _read_sparse(component: str, layer: int, path: str, block: SparseMoE) -> list[Ffn]:
    """Returns the experts of a block, the shared one first, as views of its fused weights."""
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
        for name, (start, stop) in block.layout.ranges().items()
    ]


def _read_dense(
    component: str, layer: int, name: str, module: nn.Module, *, is_expert: bool
) -> Ffn:
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
        component=component, layer=layer, name=name, module=module, is_expert=is_expert, **weights
    )


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
        found = []
        for path in layout.paths:
            layers = _layers_at(model, path)
            missing = [] if layers is None else _missing(layers, layout)
            if layers and not missing:
                return Decoder(path, layers, layout)
            if layers is not None:
                lacking = f" without {list_some(missing, 8)}" if missing else ""
                found.append(f"{path}: {len(layers)} layers{lacking}")
        problems.append(
            f"{layout.name}: model must have layers with {', '.join(layout.names())} under "
            f"{' or '.join(layout.paths)}, got a {type(model).__name__} with "
            + ("; ".join(found) or "none of these")
        )
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


def find_decoder(model: object, component: str | None = None) -> Decoder:
    """Returns the decoder layers of a model or pipeline, by their FFNs alone.

    Layers with a generation FFN go before layers with `mlp` alone, `LAYER_PATHS` before what else
    is a list of such layers.

    Args:
        component: whose FFN the layers must have; None takes either.

    Raises:
        ValueError: there are none, or several lists of them; the message says what was found.
    """
    stacks = dict(_stacks(model))
    kinds = {FFN_NAMES["gen"]: _has_gen_ffn} if component == "gen" else _HAS_FFN
    for has_ffn in kinds.values():
        found = {path: layers for path, layers in stacks.items() if any(map(has_ffn, layers))}
        for path in (*LAYER_PATHS, *(found if len(found) == 1 else ())):
            if path in found:
                return Decoder(path, found[path], _BAGEL)
        if found:
            raise ValueError(
                f"model must have one list of decoder layers, got {len(found)}: "
                f"{list_some(list(found))}; give the module that holds the one that is meant"
            )
    described = []
    for path in dict.fromkeys((*LAYER_PATHS, *stacks)):
        if path in stacks:
            names = list(dict.fromkeys(map(describe_module, stacks[path])))
            described.append(f"{path}: {len(stacks[path])} x {list_some(names, 2)}")
        elif (other := _at(model, path)) is not None:
            described.append(f"{path}: {describe_module(other)}")
    raise ValueError(
        f"model must have decoder layers with {' or '.join(kinds)}, made of "
        f"{', '.join(PROJECTIONS)} (or {' and '.join(MERGED_PROJECTIONS)}), under "
        f"{' or '.join(LAYER_PATHS)} or in another list of layers; got a {describe_module(model)}"
        + "".join(f"; {text}" for text in described)
    )


def _stacks(model: object) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yields what may be a list of decoder layers, with the attribute path that leads there."""
    seen: set[int] = set()
    for path in LAYER_PATHS:
        layers = _layers_at(model, path)
        if layers is not None:
            seen.add(id(_at(model, path)))
            yield path, layers
    # A pipeline is no module, but holds some as attributes.
    roots: Mapping[str, object] = {"": model}
    if not isinstance(model, nn.Module):
        roots = getattr(model, "__dict__", {})
    for root, module in roots.items():
        if not isinstance(module, nn.Module):
            continue
        for path, part in module.named_modules(prefix=root):
            if isinstance(part, nn.ModuleList) and id(part) not in seen:
                seen.add(id(part))
                yield path, list(part)


def _layers_at(model: object, path: str) -> list[nn.Module] | None:
    layers: Any = _at(model, path)
    if not (hasattr(layers, "__len__") and hasattr(layers, "__getitem__")):
        return None
    return [layers[i] for i in range(len(layers))]


def _at(model: object, path: str) -> object:
    return reduce(lambda at, name: getattr(at, name, None), path.split("."), model)


def _has_gen_ffn(layer: nn.Module) -> bool:
    """Tells whether a layer has a generation FFN, or had one before it was skipped."""
    name = FFN_NAMES["gen"]
    return hasattr(layer, name) and any(name in module._modules for module in _modules(layer))


def _has_und_ffn(layer: nn.Module) -> bool:
    """Tells whether a layer has a FFN that can be sparse, or is, or was skipped."""
    ffn = getattr(layer, FFN_NAMES["und"], None)
    return bool(projection_names(ffn)) or isinstance(ffn, SparseMoE | Skipped)


# Name of a FFN -> does a layer have it. One with both is a BAGEL's.
_HAS_FFN = {FFN_NAMES["gen"]: _has_gen_ffn, FFN_NAMES["und"]: _has_und_ffn}


def _modules(module: object) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []


class SparseBlock(NamedTuple):
    """A sparse FFN and where it stands."""

    component: str
    layer: int
    module: SparseMoE


def find_sparse_blocks(model: object, components: Sequence[str] | None = None) -> list[SparseBlock]:
    """Returns the sparse FFNs of a model or pipeline, component by component.

    Args:
        components: of which; None is all.

    Raises:
        ValueError: no decoder layers are found, a component is unknown, or none is sparse.
    """
    wanted = tuple(FFN_NAMES) if components is None else tuple(components)
    if not wanted or not set(wanted) <= set(FFN_NAMES):
        raise ValueError(f"components must be of {', '.join(FFN_NAMES)}, got {list_some(wanted)}")
    decoder = find_decoder(model)
    slots = [
        (component, layer, decoder.slot(layer, FFN_NAMES[component]))
        for component in wanted
        for layer in range(len(decoder.layers))
    ]
    blocks = [
        SparseBlock(component, layer, slot.module)
        for component, layer, slot in slots
        if slot is not None and isinstance(slot.module, SparseMoE)
    ]
    if not blocks:
        raise ValueError(
            f"model must have sparse FFNs of {' or '.join(wanted)}, got none among the "
            f"{len(decoder.layers)} layers under {decoder.path}; convert or apply_moe_ make them"
        )
    return blocks
