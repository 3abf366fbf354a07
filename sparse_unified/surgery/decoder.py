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
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparse_unified._common import list_some, naming
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.cuts import select
from sparse_unified.surgery.exchange import Slot
from sparse_unified.surgery.ffn import (
    MERGED_PROJECTIONS,
    Skipped,
    describe_module,
    projection_names,
    read_weights,
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


class BlockNames(NamedTuple):
    """What a layer calls its modules."""

    ffn: str = "mlp"
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"


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
        return tuple(dict.fromkeys(name for names in self.components.values() for name in names))


_GEN = BlockNames(
    ffn=FFN_NAMES["gen"],
    input_norm="input_layernorm_moe_gen",
    post_attention_norm="post_attention_layernorm_moe_gen",
)
_BAGEL = Layout(name="BAGEL", components=MappingProxyType({"und": BlockNames(), "gen": _GEN}))
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
    """The decoder layers of a model, found under the attribute path `path`.

    To the analysis it is the adapter of a model: `components`, `num_layers`, `holds`, `ffns` and
    `block` are what it asks for.
    """

    def __init__(self, path: str, layers: Sequence[nn.Module], layout: Layout) -> None:
        self.path, self.layers, self.layout = path, layers, layout

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that are probed one by one."""
        return tuple(self.layout.components)

    def num_layers(self) -> int:
        """Returns the number of decoder layers."""
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
        found: dict[nn.Module, Slot] = {}
        for layer in selected:
            slot, owner = self.slot(layer, name), self.layers[layer]
            if slot is None or slot.module is None:
                raise ValueError(
                    f"layer {layer} ({self.path}.{layer}.{name}): {name} must be a module of the "
                    f"layer, got {type(getattr(owner, name, None)).__name__} in a "
                    f"{describe_module(owner)}"
                )
            if (first := found.setdefault(slot.module, slot)) is not slot:
                raise ValueError(f"{slot}: FFN must be its own module, got that of {first.path}")
        return [(slot, module) for module, slot in found.items()]

    def holds(self, layer: int, component: str) -> bool:
        """Tells whether a layer has all of its modules; a part that was skipped is gone."""
        parts = [getattr(self.layers[layer], name, None) for name in self._names(component)]
        return all(isinstance(p, nn.Module) and not isinstance(p, Skipped) for p in parts)

    def block(self, layer: int, component: str) -> Block:
        """Returns the modules of one layer.

        Raises:
            ValueError: the model lacks the layer, the component or one of the modules.
        """
        names = self._names(component)._asdict()
        if type(layer) is not int or not 0 <= layer < len(self.layers):
            raise ValueError(f"block: layer must lie in 0 to {len(self.layers) - 1}, got {layer!r}")
        module = self.layers[layer]
        parts: dict[str, Any] = {p: getattr(module, name, None) for p, name in names.items()}
        for part, found in parts.items():
            if not isinstance(found, nn.Module):
                raise ValueError(
                    f"block: layer {layer} ({self.path}.{layer}) must have a module {names[part]}, "
                    f"got a {type(module).__name__} without it"
                )
        return Block(component=component, layer=layer, layer_module=module, **parts)

    def ffns(self, component: str) -> list[Ffn]:
        """Returns the FFNs of a component, layer by layer; of a mixture every expert.

        Layers that skip theirs are left out.

        Raises:
            ValueError: the model lacks the component, or an FFN is not three plain weights.
        """
        name = self._names(component).ffn
        listed = []
        for layer, holder in enumerate(self.layers):
            module = getattr(holder, name)
            if module is None or isinstance(module, Skipped):
                continue
            path = f"{self.path}.{layer}.{name}"
            if isinstance(module, SparseMoE):
                gate_proj, up_proj, down_proj = (getattr(module, n).detach() for n in PROJECTIONS)
                parts: list[tuple[str, nn.Module, Sequence[Tensor]]] = [
                    (f"{path}.{expert}", module, (gate_proj[a:b], up_proj[a:b], down_proj[:, a:b]))
                    for expert, (a, b) in module.layout.ranges().items()
                ]
                is_mixture = True
            else:
                experts = self._experts(module, path)
                is_mixture, parts = bool(experts), []
                for at, part in experts or [(path, module)]:
                    with naming(at):
                        parts.append((at, part, [w.detach() for w in read_weights(part)]))
            for at, part, weights in parts:
                own: Any = dict(zip(PROJECTIONS, weights, strict=True))
                own |= {"component": component, "layer": layer, "name": at, "module": part}
                listed.append(Ffn(**own, is_expert=is_mixture))
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


Adapter = Decoder  # the analysis takes everything that has its methods


def takes_absent_parts(layer: nn.Module) -> bool:
    """Tells whether a layer runs without the parts that are None, as ours does."""
    return any(getattr(type(module), "takes_absent_parts", False) for module in _modules(layer))


def find_adapter(model: object, layouts: Sequence[Layout] = LAYOUTS) -> Adapter:
    """Returns the adapter of the first layout that a model or pipeline fits, judged by structure.

    Args:
        model: a module or what holds one; what has the methods of an adapter is returned as it is.
        layouts: tried in order.

    Raises:
        ValueError: none fits; the message says for each what was looked for and found.
    """
    if isinstance(model, Decoder) or (hasattr(model, "ffns") and hasattr(model, "block")):
        return model  # type: ignore[return-value]
    problems = []
    for layout in layouts:
        found = []
        for path in layout.paths:
            layers = _layers_at(model, path)
            if layers is None:
                continue
            missing = [
                name
                for name in layout.names()
                if not all(hasattr(layer, name) for layer in layers)
                or not any(isinstance(getattr(layer, name), nn.Module) for layer in layers)
            ]
            if layers and not missing:
                return Decoder(path, layers, layout)
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
    wanted = [FFN_NAMES["gen"], FFN_NAMES["und"]][: 1 if component == "gen" else 2]
    for name in wanted:
        found = {
            path: layers
            for path, layers in stacks.items()
            if any(_has_ffn(layer, name) for layer in layers)
        }
        for path in (*LAYER_PATHS, *(found if len(found) == 1 else ())):
            if path in found:
                return Decoder(path, found[path], _BAGEL)
        if found:
            raise ValueError(
                f"model must have one list of decoder layers, got {len(found)}: "
                f"{list_some(list(found))}; give the module that holds the one that is meant"
            )
    described = [
        f"{path}: {len(layers)} x {list_some(dict.fromkeys(map(describe_module, layers)), 2)}"
        for path, layers in stacks.items()
    ]
    raise ValueError(
        f"model must have decoder layers with {' or '.join(wanted)}, made of "
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
    roots = {"": model} if isinstance(model, nn.Module) else getattr(model, "__dict__", {})
    for root, module in roots.items():
        for path, part in module.named_modules(prefix=root) if _modules(module) else ():
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


def _has_ffn(layer: nn.Module, name: str) -> bool:
    """Tells whether a layer has a FFN of this name, sparse or dense, or had one before it went."""
    if name == FFN_NAMES["gen"]:
        return hasattr(layer, name) and any(name in module._modules for module in _modules(layer))
    ffn = getattr(layer, name, None)
    return bool(projection_names(ffn)) or isinstance(ffn, SparseMoE | Skipped)


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
    blocks = [
        SparseBlock(component, layer, slot.module)
        for component in wanted
        for layer in range(len(decoder.layers))
        if (slot := decoder.slot(layer, FFN_NAMES[component])) is not None
        and isinstance(slot.module, SparseMoE)
    ]
    if not blocks:
        raise ValueError(
            f"model must have sparse FFNs of {' or '.join(wanted)}, got none among the "
            f"{len(decoder.layers)} layers under {decoder.path}; convert or apply_moe_ make them"
        )
    return blocks
