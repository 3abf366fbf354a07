# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps its decoder layers, and which of their modules belong to which component.

Structure decides, never the class: attribute names and tensors. `find_decoder` takes what the
transforms need, decoder layers with the FFNs `mlp` (und) and `mlp_moe_gen` (gen), or with `mlp`
alone: our model, the official ones, decoders of transformers and of serving engines, and pipelines
that hold one of them. `find_adapter` takes what an analysis needs, every module that a `Layout`
names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparse_unified._common import list_some, naming
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.checkpoint.scores import hash_weights, spaced
from sparse_unified.experts.keep import select_layers
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.exchange import Slot
from sparse_unified.surgery.ffn import (
    MERGED_PROJECTIONS,
    DenseWeights,
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

    The weights are the live ones. `module` is what a forward hook observes: its first argument is
    x [..., D]. Of an expert of a `SparseMoE` that is the whole block, which gets more tokens.
    """

    component: str
    layer: int
    name: str  # dotted path of the module, from the object the adapter was made for
    module: nn.Module
    gate_proj: Tensor  # [I, D]
    up_proj: Tensor  # [I, D]
    down_proj: Tensor  # [D, I]
    is_expert: bool = False  # one of several FFNs of its layer

    @property
    def key(self) -> FfnKey:
        """Under which scores and statistics of this FFN are kept."""
        return (self.layer, self.name) if self.is_expert else self.layer

    @property
    def intermediate_size(self) -> int:
        return self.gate_proj.shape[0]


class Block(NamedTuple):
    """The modules of one layer of one component between which the residual stream can be seen.

    x1 = x + attention(input_norm(x)), then y = x1 + ffn(post_attention_norm(x1)); `ffn` may be a
    mixture. `layer_module` is the whole layer, of all components, which may share the attention.
    """

    ffn: nn.Module
    attention: nn.Module
    input_norm: nn.Module
    post_attention_norm: nn.Module
    layer_module: nn.Module


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


_GEN = BlockNames(
    ffn=FFN_NAMES["gen"],
    input_norm="input_layernorm_moe_gen",
    post_attention_norm="post_attention_layernorm_moe_gen",
)
LAYOUTS = (
    Layout(name="BAGEL", components={"und": BlockNames(), "gen": _GEN}),
    # Qwen2.5-VL and the many decoders of the same build, dense or mixtures
    Layout(name="decoder", components={"und": BlockNames()}),
    # the language model of Ming-Omni
    Layout(name="Bailing", components={"und": BlockNames(attention="attention")}),
)


class Decoder:
    """The decoder layers of a model, found under the attribute path `path`; its adapter."""

    def __init__(self, path: str, stack: Any, layout: Layout) -> None:
        self.path, self.stack, self.layout = path, stack, layout
        self.layers: list[nn.Module] = [stack[i] for i in range(len(stack))]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.layout.components)

    def num_layers(self) -> int:
        return len(self.layers)

    def slot(self, layer: int, name: str) -> Slot | None:
        """Returns the slot of a module in a layer, `mlp` or `self_attn.q_proj`; None without."""
        holder, _, last = name.rpartition(".")
        module = _at(self.layers[layer], holder)
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
        """Returns the FFNs of the selected layers; "all" and "middle" pass over skipped ones."""
        name = FFN_NAMES[component]
        selected = select_layers(
            layers, len(self.layers), lambda layer: self.has(layer, name), f"{component} FFN"
        )
        found: dict[nn.Module, Slot] = {}
        for layer in selected:
            slot = self.slot(layer, name)
            if slot is None or slot.module is None:
                raise ValueError(
                    f"layer {layer} ({self.path}.{layer}): {name} must be a module of the layer, "
                    f"got a {describe_module(self.layers[layer])}"
                )
            if (first := found.setdefault(slot.module, slot)) is not slot:
                raise ValueError(f"{slot}: FFN must be its own module, got that of {first.path}")
        return [(slot, module) for module, slot in found.items()]

    def holds(self, layer: int, component: str) -> bool:
        """Tells whether a layer has all of its modules; a part that was skipped is gone."""
        parts = [getattr(self.layers[layer], name, None) for name in self.names(component)]
        return all(isinstance(p, nn.Module) and not isinstance(p, Skipped) for p in parts)

    def block(self, layer: int, component: str) -> Block:
        """Returns the modules of one layer; ValueError where the model lacks one of them."""
        names, module = self.names(component), self.layers[layer]
        parts: dict[str, Any] = {p: getattr(module, n, None) for p, n in names._asdict().items()}
        if not all(isinstance(found, nn.Module) for found in parts.values()):
            raise ValueError(
                f"layer {layer} ({self.path}.{layer}): layer must have the modules "
                f"{', '.join(names)}, got a {describe_module(module)}"
            )
        return Block(**parts, layer_module=module)

    def ffns(self, component: str) -> list[Ffn]:
        """Returns the FFNs of a component but for skipped ones; of a mixture every expert.

        Raises:
            ValueError: the model lacks the component, or an FFN is not three plain weights.
        """
        name, mixture = self.names(component).ffn, self.layout
        listed = []
        for layer, holder in enumerate(self.layers):
            module = getattr(holder, name)
            if module is None or isinstance(module, Skipped):
                continue
            path = f"{self.path}.{layer}.{name}"
            place: dict[str, Any] = {"component": component, "layer": layer}
            if isinstance(module, SparseMoE):
                place |= {"module": module, "is_expert": True}
                gate_proj, up_proj, down_proj = (getattr(module, n).detach() for n in PROJECTIONS)
                for expert, (a, b) in module.layout.ranges().items():
                    own = DenseWeights(gate_proj[a:b], up_proj[a:b], down_proj[:, a:b])
                    listed.append(Ffn(name=f"{path}.{expert}", **place, **own._asdict()))
                continue
            experts, owners = getattr(module, mixture.experts, None), {"": module}
            if experts is not None:
                if not isinstance(experts, nn.ModuleList | Sequence) or not len(experts):
                    raise ValueError(
                        f"{path}: {mixture.experts} must be a list of modules, "
                        f"got a {type(experts).__name__}"
                    )
                owners = {f".{mixture.experts}.{i}": own for i, own in enumerate(experts)}
                owners |= {f".{n}": getattr(module, n, None) for n in mixture.shared_experts}
            for end, owner in owners.items():
                if owner is None:
                    continue
                with naming(path + end):
                    own = DenseWeights(*(weight.detach() for weight in read_weights(owner)))
                place |= {"module": owner, "is_expert": experts is not None}
                listed.append(Ffn(name=path + end, **place, **own._asdict()))
        return listed

    def names(self, component: str) -> BlockNames:
        """Returns what a layer calls the modules of a component; ValueError without it."""
        names = self.layout.components.get(component)
        if names is None:
            raise ValueError(
                f"{self.layout.name} model: component must be one of "
                f"{', '.join(self.components)}, got {component!r}"
            )
        return names


def as_module(model: Any) -> nn.Module:
    """Returns the module of a model or of a pipeline that holds it as `model`; else TypeError."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"model: object must be a module or hold one as `model`, got {type(model).__name__}"
        )
    return found


def takes_absent_parts(layer: nn.Module) -> bool:
    """Tells whether a layer runs without the parts that are None, as ours does."""
    return any(getattr(type(module), "takes_absent_parts", False) for module in _modules(layer))


def gives_times(layer: nn.Module) -> bool:
    """Tells whether a layer gives its FFNs the times of denoising, as ours does."""
    return any(getattr(type(module), "gives_times", False) for module in _modules(layer))


def find_adapter(model: object, layouts: Sequence[Layout] = LAYOUTS) -> Decoder:
    """Returns the decoder layers of a model or pipeline by the first layout that they fit.

    Those that were found already are returned as they are.

    Raises:
        ValueError: none fits; the message says what was looked for and found.
    """
    if isinstance(model, Decoder):
        return model
    kinds: list[_Kind] = []
    for layout in layouts:
        names = tuple(dict.fromkeys(name for own in layout.components.values() for name in own))

        def fits(layers: Sequence[nn.Module], names: Sequence[str] = names) -> bool:
            return all(
                all(hasattr(layer, name) for layer in layers)
                and any(isinstance(getattr(layer, name), nn.Module) for layer in layers)
                for name in names
            )

        kinds.append((f"{', '.join(names)} ({layout.name})", layout, fits))
    return _find(model, kinds)


def find_decoder(model: object, component: str | None = None) -> Decoder:
    """Returns the decoder layers of a model or pipeline, by their FFNs alone.

    Layers with a generation FFN go before layers with `mlp` alone, `LAYER_PATHS` before what else
    is a list of such layers. The layers must have the FFN of `component`; None takes either.

    Raises:
        ValueError: there are none, or several lists of them; the message says what was found.
    """
    made_of = f"made of {', '.join(PROJECTIONS)} (or {' and '.join(MERGED_PROJECTIONS)})"

    def has(name: str, layers: Sequence[nn.Module]) -> bool:
        return any(_has_ffn(layer, name) for layer in layers)

    names = (FFN_NAMES["gen"],) if component == "gen" else (FFN_NAMES["gen"], FFN_NAMES["und"])
    return _find(model, [(f"{name} {made_of}", LAYOUTS[0], partial(has, name)) for name in names])


# What layers must have, in words, the layout that they are of then, and whether they do.
_Kind = tuple[str, Layout, Callable[[Sequence[nn.Module]], bool]]


def _find(model: object, kinds: Sequence[_Kind]) -> Decoder:
    paths = list(dict.fromkeys(path for _, layout, _ in kinds for path in layout.paths))
    stacks = dict(_stacks(model, paths))
    for _, layout, fits in kinds:
        found = [path for path, stack in stacks.items() if len(stack) and fits(stack)]
        for path in (*layout.paths, *(found if len(found) == 1 else ())):
            if path in found:
                return Decoder(path, stacks[path], layout)
        if found:
            raise ValueError(
                f"model must have one list of decoder layers, got {len(found)}: "
                f"{list_some(found)}; give the module that holds the one that is meant"
            )
    described = [
        f"; {path}: {len(stack)} x {list_some(dict.fromkeys(map(describe_module, stack)), 2)}"
        for path, stack in stacks.items()
    ]
    raise ValueError(
        f"model must have decoder layers with {' or '.join(wanted for wanted, _, _ in kinds)} "
        f"under {' or '.join(paths)} or in another list of layers, "
        f"got a {describe_module(model)}{''.join(described)}"
    )


def _stacks(model: object, paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields what may be a list of decoder layers, with the attribute path that leads there."""
    seen: set[int] = set()
    for path in paths:
        stack = _at(model, path)
        if hasattr(stack, "__len__") and hasattr(stack, "__getitem__"):
            seen.add(id(stack))
            yield path, stack
    # A pipeline is no module, but holds some as attributes.
    roots = {"": model} if isinstance(model, nn.Module) else getattr(model, "__dict__", {})
    for root, module in roots.items():
        for path, part in module.named_modules(prefix=root) if _modules(module) else ():
            if isinstance(part, nn.ModuleList) and id(part) not in seen:
                seen.add(id(part))
                yield path, part


def _at(model: object, path: str) -> Any:
    names = path.split(".") if path else []
    return reduce(lambda at, name: getattr(at, name, None), names, model)


def _has_ffn(layer: nn.Module, name: str) -> bool:
    """Tells whether a layer has a FFN of this name, sparse or dense, or had one before it went."""
    if name == FFN_NAMES["gen"]:
        return hasattr(layer, name) and any(name in module._modules for module in _modules(layer))
    ffn = getattr(layer, name, None)
    return bool(projection_names(ffn)) or isinstance(ffn, SparseMoE | Skipped)


def _modules(module: object) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []


def hash_ffns(model: object, component: str) -> str:
    """Returns a hash of the FFN weights of one component, 16 hex digits.

    Of every weight it takes the shape and evenly spaced values, rounded to bf16, so that a model
    has one hash in a file, live, and whether it was loaded in fp32 or bf16; it reads little, and
    two models that differ in a few values alone may have the same.
    """
    adapter = find_adapter(model)
    within = f".{adapter.names(component).ffn}."
    return hash_weights(
        (
            (ffn.layer, ffn.name.rpartition(within)[2]) if ffn.is_expert else ffn.layer,
            [spaced(weight) for weight in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)],
        )
        for ffn in adapter.ffns(component)
    )


class SparseBlock(NamedTuple):
    """A sparse FFN and where it stands."""

    component: str
    layer: int
    module: SparseMoE


def find_sparse_blocks(model: object, components: Sequence[str] | None = None) -> list[SparseBlock]:
    """Returns the sparse FFNs of a model or pipeline, component by component; None is all.

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
