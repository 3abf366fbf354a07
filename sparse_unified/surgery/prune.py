# SPDX-License-Identifier: Apache-2.0
"""prune_width_, prune_heads_, skip_layers_: cuts (see `cuts`) carried out on a live model.

What a layer has is read first, then what stays is planned, and only then is anything changed.
`changed` does it for as long as a block runs. Models with the two components of BAGEL go through
the transforms; of every other decoder it shortens FFNs and leaves modules out where they are, so
that its `Layout` is all that has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_unified._common import context, format_layers, list_some, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.modes import (
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint.scores import Scores
from sparse_unified.checkpoint.shapes import LayerShape
from sparse_unified.experts import keep_units, magnitude_scores, select_layers
from sparse_unified.experts.scores import check_scores, head_magnitude_scores
from sparse_unified.nn import SparseMoE, key_heads_read
from sparse_unified.surgery.cuts import (
    Cut,
    PruneConfig,
    head_magnitudes,
    keep_neurons,
    plan,
    rank,
    select,
    skipped_modules,
    spread,
)
from sparse_unified.surgery.decoder import (
    Decoder,
    FfnKey,
    find_adapter,
    find_decoder,
    takes_absent_parts,
)
from sparse_unified.surgery.exchange import Slot, unchanged
from sparse_unified.surgery.ffn import (
    DenseWeights,
    Skipped,
    cut_ffn,
    cut_linear,
    hidden_states,
    plain_weight,
    read_ffn,
)
from sparse_unified.surgery.report import SurgeryReport, transform


@torch.no_grad()
def prune_width_(
    model: object,
    config: PruneWidthConfig,
    scores: Scores | None = None,
    *,
    keep_dense: bool = True,
) -> SurgeryReport:
    """Leaves the neurons with the highest scores in the FFNs of one component, in place.

    The three weights of a FFN become shorter and keep the order of their neurons. The modules stay
    the same objects. FFNs are found as in `apply_moe_`, which takes the result; see `keep_units`
    for what a budget means. Of a sparse FFN every routed expert keeps as many neurons, see
    `keep_in_experts`; its scores are in expert order, the shared expert first.

    Args:
        model: a module or pipeline.
        config: how much of which FFNs stays.
        scores: importance of each neuron, float `{layer: [I]}`, a tensor [num_layers, I], a mapping
            of components to either, or a scores file. None ranks neurons by weight magnitude.
        keep_dense: keep the whole weights for `restore_`, in memory where they are.

    Raises:
        ValueError: a selected layer has no plain FFN, or an argument does not fit; the message
            names the layer. The model is as before.
        TypeError: scores are no tensors.

    Example:
        >>> prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5))  # doctest: +SKIP
    """
    with context("prune_width_"):
        component = config.component
        decoder = find_decoder(model, component)
        ffns = decoder.select_ffns(config.layers, component)
        weights: dict[int, DenseWeights] = {}
        shapes = {}
        for slot, ffn in ffns:
            with naming(slot):
                weights[slot.layer], _ = read_ffn(ffn)
            dense_width = weights[slot.layer].gate_proj.shape[0]
            width: Any = ffn.layout if isinstance(ffn, SparseMoE) else dense_width
            shapes[slot.layer] = LayerShape(ffn=width, kv_heads=(), query_groups=())
        widths = {layer: shape.width for layer, shape in shapes.items()}
        count = len(decoder.layers)
        ranking = rank(scores, component, widths, count, lambda n: magnitude_scores(*weights[n]))
        kept = keep_neurons(config, shapes, ranking)

        def cut() -> None:
            for slot, ffn in ffns:
                cut_ffn(ffn, kept[slot.layer])

        return transform("prune_width_", decoder, cut, keep=keep_dense)


@torch.no_grad()
def prune_heads_(
    model: object,
    config: PruneHeadsConfig,
    scores: Scores | None = None,
    *,
    keep_dense: bool = True,
) -> SurgeryReport:
    """Leaves the groups of attention heads with the highest scores of one component, in place.

    A group is a KV head with the query heads that read it. Its query rows go, with their columns of
    the output projection: for the component's tokens this is the layer with those columns at zero.
    Und and gen tokens see each other through the same KV heads, so keys and values of a group go,
    for both, once neither component has queries for it; with `component="both"` at once.

    Args:
        model: a module or pipeline with an attention of `sparse_unified.bagel`.
        config: how much of which attentions stays.
        scores: importance of each group, float `{layer: [G]}`, a tensor [num_layers, G], or a
            mapping of components to either; G counts the groups that the component still has. For
            "both", the scores of each component are divided by their mean and added. None ranks
            groups by the weights of values and output.
        keep_dense: keep the whole weights for `restore_`, in memory where they are.

    Raises:
        ValueError: a selected layer lacks a plain attention, or an argument does not fit; the
            message names the layer. The model is as before.
        TypeError: scores are no tensors.
    """
    with context("prune_heads_"):
        decoder = find_decoder(model)
        names = [f"self_attn.q_proj{keys.SUFFIXES[component]}" for component in config.components]
        layers = select(
            config.layers,
            len(decoder.layers),
            lambda layer: all(decoder.has(layer, name) for name in names),
            f"{' and '.join(config.components)} attention",
        )
        tensors: dict[str, Tensor] = {}
        modules: dict[str, Any] = {}
        shapes: dict[str, dict[int, LayerShape]] = {component: {} for component in keys.SUFFIXES}
        for layer in layers:
            with naming(f"layer {layer} ({decoder.path}.{layer}.self_attn)"):
                for component in keys.SUFFIXES:
                    shape = _read_attention(decoder, layer, component, tensors, modules)
                    if shape is not None:
                        shapes[component][layer] = shape
        ranking = {}
        for component in config.components:
            own_shapes = shapes[component]
            ranking[component] = rank(
                scores,
                component,
                {layer: len(own_shapes[layer].query_groups) for layer in layers},
                len(decoder.layers),
                lambda n: head_magnitudes(tensors.__getitem__, component, n, own_shapes[n]),  # noqa: B023
            )
        sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        cuts, left = plan(config, shapes, sizes, lambda *at: ranking[at[0]][at[1]])

        def cut_heads() -> None:
            for key, cut in cuts.items():
                if key.endswith(".weight"):
                    cut_linear(modules[key.removesuffix(".weight")], cut)
            for component, own in left.items():
                for layer, shape in own.items():
                    if len(shape.query_groups) < len(shape.kv_heads):
                        key = f"{keys.layer_prefix(layer)}self_attn.q_proj"
                        modules[key + keys.SUFFIXES[component]].key_heads = shape.query_places

        return transform("prune_heads_", decoder, cut_heads, keep=keep_dense)


def _read_attention(
    decoder: Decoder,
    layer: int,
    component: str,
    tensors: dict[str, Tensor],
    modules: dict[str, Any],
) -> LayerShape | None:
    """Adds weights and projections of an attention to dicts; returns its shape, FFN left out."""
    if not takes_absent_parts(decoder.layers[layer]):
        raise ValueError(
            "attention must be one whose weights tell its heads, as in sparse_unified.bagel, got "
            f"that of a {type(decoder.layers[layer]).__name__}"
        )
    own: dict[str, Any] = {}
    for name in keys.ATTENTION_PROJECTIONS:
        slot = decoder.slot(layer, at := f"self_attn.{name}{keys.SUFFIXES[component]}")
        if slot is None or slot.module is None:
            return None
        key = keys.layer_prefix(layer) + at
        own[name] = modules[key] = slot.module
        head_dim: Any = slot.owner.head_dim
        tensors[f"{key}.weight"] = plain_weight(slot.module, name)
        if isinstance(slot.module.bias, Tensor):
            tensors[f"{key}.bias"] = slot.module.bias
    count = own["k_proj"].out_features // int(head_dim)
    reads = key_heads_read(own["q_proj"], count)
    return LayerShape(ffn=0, kv_heads=tuple(range(count)), query_groups=reads)


@torch.no_grad()
def skip_layers_(
    model: object, config: SkipLayersConfig, *, keep_dense: bool = True
) -> SurgeryReport:
    """Takes layers, or their attention or FFN, away from the tokens of one component, in place.

    The tokens pass by on the residual, and nothing of the part runs for them, its norm included;
    the other component's tokens run as before. Where an attention is skipped, the component's
    tokens do not ask and are not seen: they have no keys and values in that layer, so contexts
    hold fewer there, and with `gen` left alone its tokens see their own image and earlier ones.
    Positions do not change. Layers keep their numbers. A FFN can be skipped in every model that
    `apply_moe_` takes, an attention in ours.

    Args:
        model: a module or pipeline.
        config: which parts of which layers.
        keep_dense: keep the modules for `restore_`, in memory where they are.

    Raises:
        ValueError: a selected layer has nothing of this kind left, or cannot do without its
            attention. The model is as before.
    """
    with context("skip_layers_"):
        component = config.component
        decoder = find_decoder(model, component)
        found: dict[int, list[tuple[Slot, nn.Module | None]]] = {}

        def has(layer: int) -> bool:
            found[layer] = _skip(decoder, layer, config)
            return bool(found[layer])

        layers = select(
            config.layers, len(decoder.layers), has, f"{component} {config.part.value} left"
        )

        def skip() -> None:
            for layer in layers:
                for slot, new in found[layer]:
                    slot.put(new)

        return transform("skip_layers_", decoder, skip, keep=keep_dense)


def _skip(
    decoder: Decoder, layer: int, config: SkipLayersConfig
) -> list[tuple[Slot, nn.Module | None]]:
    """Returns what takes the places of the parts of a layer; none when they are gone already."""
    if takes_absent_parts(decoder.layers[layer]):
        slots = [decoder.slot(layer, name) for name in skipped_modules(config)]
        return [(slot, None) for slot in slots if slot is not None and slot.module is not None]
    if "attention" in config.parts:
        raise ValueError(
            f"layer {layer} ({decoder.path}.{layer}): attention must be one that a component can "
            "do without, as in sparse_unified.bagel, got that of a "
            f"{type(decoder.layers[layer]).__name__}; part 'ffn' can be skipped in it"
        )
    if not decoder.has(layer, keys.FFN_NAMES[config.component]):
        return []
    ((slot, ffn),) = decoder.select_ffns([layer], config.component)
    with naming(slot):
        weights, is_tuple = read_ffn(ffn)
        return [(slot, Skipped(2 if is_tuple else 0, weights.gate_proj).train(ffn.training))]


# For a while


@contextmanager
def changed(
    model: object,
    config: PruneConfig,
    scores: Mapping[FfnKey, Tensor] | None = None,
    *,
    adapter: Decoder | None = None,
    component: str | None = None,
    forward: Callable[[], object] | None = None,
) -> Iterator[str]:
    """Inside, a model is pruned as a config says; afterwards it is as it was, bit for bit.

    Args:
        model: a module, or a pipeline that holds it as `model`.
        config: of models that are not BAGEL, the component "und" is their only one.
        scores: of neurons, `{key of the FFN: [I]}`, see `Ffn.key`; without, weight magnitude.
        adapter: of the model; None finds one.
        component: of the adapter, should it be called neither "und" nor "gen".
        forward: runs the model once; needed to skip a part of layers that are not BAGEL's.

    Yields:
        what was done, in words.

    Raises:
        ValueError: the model cannot be changed so; the message says why.

    Example:
        with changed(model, SkipLayersConfig(component="und", layers=[3, 4])):
            answer = pipeline.understand(image, question)
    """
    adapter = find_adapter(model) if adapter is None else adapter
    parts = [part for layer in adapter.layers for part in layer.modules()]
    parts += [adapter.stack] if isinstance(adapter.stack, nn.Module) else []
    with unchanged(parts):
        if set(adapter.components) == set(keys.FFN_NAMES):
            yield _prune(model, config, None if scores is None else join_experts(scores))
            return
        own = component or adapter.components[0]
        layers = select_layers(config.layers, adapter.num_layers())
        if isinstance(config, PruneWidthConfig):
            yield _narrow(adapter, own, layers, config, scores)
        elif isinstance(config, PruneHeadsConfig):
            yield _drop_heads(adapter, own, layers, config)
        else:
            skip = _leave_out if config.part is Part.BLOCK else _skip_part
            skip(adapter, own, layers, config.part, forward)
            yield _skipped_text(config, layers)


def _prune(model: object, config: PruneConfig, scores: Mapping[int, Tensor] | None) -> str:
    if isinstance(config, SkipLayersConfig):
        parts = skip_layers_(model, config).parts
        return _skipped_text(config, sorted({part.layer for part in parts}))
    if isinstance(config, PruneWidthConfig):
        parts = prune_width_(model, config, scores).parts
    else:
        parts = prune_heads_(model, config).parts
    return _each([(part.before, part.after) for part in parts])


def join_experts(scores: Mapping[FfnKey, Tensor]) -> dict[int, Tensor]:
    """Returns scores by layer, [I]: of experts in expert order, the shared one first."""
    parts: dict[int, list[tuple[bool, Tensor]]] = {}
    for key, own in scores.items():
        layer, name = (key, "") if isinstance(key, int) else key
        parts.setdefault(layer, []).append((name.rpartition(".")[2].isdigit(), own))
    return {
        layer: torch.cat([own for _, own in sorted(found, key=lambda part: part[0])])
        for layer, found in parts.items()
    }


def _skipped_text(config: SkipLayersConfig, layers: Sequence[int]) -> str:
    part = "" if config.part is Part.BLOCK else f"{config.part.value} of "
    return f"{part}{format_layers(layers)} skipped"


def _each(changes: Sequence[tuple[str, ...]]) -> str:
    texts = dict.fromkeys(f"{old} -> {new}" for old, new in changes if old != new)
    return list_some(texts, 2) if texts else "nothing"


# Other decoders


def _narrow(
    adapter: Decoder,
    component: str,
    layers: Sequence[int],
    config: PruneWidthConfig,
    scores: Mapping[FfnKey, Tensor] | None,
) -> str:
    ffns = [ffn for ffn in adapter.ffns(component) if ffn.layer in layers]
    ranking = {}
    for i, ffn in enumerate(ffns):
        weights = (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        ranking[i] = magnitude_scores(*weights) if scores is None else scores[ffn.key]
    ratio, size = config.keep_ratio, config.block_size
    kept = keep_units(ranking, keep_ratio=ratio, budget=config.budget, block_size=size)
    for i, ffn in enumerate(ffns):
        cut_ffn(ffn.module, kept[i])
    sizes = [(ffn.intermediate_size, len(kept[i])) for i, ffn in enumerate(ffns)]
    return _each([(f"{old} neurons", f"{new} neurons") for old, new in sizes])


class Attention(NamedTuple):
    """The heads of one attention. A group is a KV head with the query heads that read it."""

    module: nn.Module
    inputs: tuple[tuple[nn.Linear, int], ...]  # of queries, keys and values, with the first row
    output: nn.Linear
    size: int  # channels of a head
    groups: int
    queries: int  # of a group

    def counts(self, groups: int) -> dict[str, int]:
        """Returns what attentions call their numbers of heads, for `groups` of them."""
        queries = groups * self.queries
        counts = {"num_heads": queries, "num_attention_heads": queries}
        return counts | {"num_key_value_heads": groups}


def read_attention(adapter: Decoder, component: str, layer: int) -> Attention:
    """Finds out which heads the attention of a layer has, from its projections:

    q_proj, k_proj, v_proj, o_proj      one linear layer each
    query_key_value, dense              rows of all query heads, then key, then value heads
    """
    module = adapter.block(layer, component).attention
    size = getattr(module, "head_dim", 0)
    others: list[str] = []
    for names in (keys.ATTENTION_PROJECTIONS, ("query_key_value", "dense")):
        linears: list[Any] = [getattr(module, name, None) for name in names]
        if not all(isinstance(linear, nn.Linear) for linear in linears) or not size:
            continue
        output, queries = linears[-1], linears[-1].in_features // size
        if len(linears) == 2:
            groups = getattr(module, "num_key_value_heads", 0)
            inputs = [(linears[0], n * size) for n in (0, queries, queries + groups)]
            fits = linears[0].out_features == (queries + 2 * groups) * size
        else:
            groups = linears[1].out_features // size
            inputs = [(linear, 0) for linear in linears[:3]]
            rows = [linear.out_features for linear in linears[:3]]
            fits = rows == [n * size for n in (queries, groups, groups)]
        own = {id(p) for linear in linears for p in linear.parameters(recurse=False)}
        others = [
            name
            for name, p in module.named_parameters()
            if id(p) not in own and list(p.shape) != [size]
        ]
        if not fits or not groups or queries % groups or others:
            break
        found = Attention(module, tuple(inputs), output, size, groups, queries // groups)
        if all(getattr(module, name, n) == n for name, n in found.counts(groups).items()):
            return found
    shapes = [f"{n} {list(p.shape)}" for n, p in module.named_parameters() if n.endswith("weight")]
    raise ValueError(
        f"heads: layer {layer}: attention must have whole groups of heads of head_dim channels in "
        f"{', '.join(keys.ATTENTION_PROJECTIONS)} or query_key_value, dense, and no other weights "
        f"but norms of a head, got a {type(module).__name__} of head_dim {size} with "
        f"{list_some(others + shapes)}"
    )


def _drop_heads(
    adapter: Decoder, component: str, layers: Sequence[int], config: PruneHeadsConfig
) -> str:
    attentions = {layer: read_attention(adapter, component, layer) for layer in layers}
    ranking = {}
    for layer, own in attentions.items():
        values, start = own.inputs[2]
        rows = values.weight.detach()[start : start + own.groups * own.size]
        output = own.output.weight.detach().unflatten(1, (own.groups, -1))
        ranking[layer] = head_magnitude_scores(rows.unflatten(0, (own.groups, -1)), output)
        with naming(f"heads: layer {layer}"):
            check_scores(ranking[layer], own.groups)
    kept = keep_units(ranking, keep_ratio=config.keep_ratio, budget=config.budget)
    changes = []
    for layer, own in attentions.items():
        groups = kept[layer]
        queries, heads = spread(groups, own.queries * own.size), spread(groups, own.size)
        rows_of: dict[nn.Linear, list[Tensor]] = {}
        for (linear, start), index in zip(own.inputs, (queries, heads, heads), strict=True):
            rows_of.setdefault(linear, []).append(start + index)
        for linear, indices in rows_of.items():
            cut_linear(linear, Cut(0, torch.cat(indices)))
        cut_linear(own.output, Cut(1, queries))
        for name, count in own.counts(len(groups)).items():
            if name in vars(own.module):
                setattr(own.module, name, count)
        sizes = [(n * own.queries, n) for n in (own.groups, len(groups))]
        changes.append(tuple(f"{q} query heads, {k} key heads" for q, k in sizes))
    return _each(changes)


def _leave_out(adapter: Decoder, component: str, layers: Sequence[int], *_: object) -> None:
    """Leaves layers out of all components and numbers the others anew: caches have no gaps."""
    remaining = [layer for i, layer in enumerate(adapter.layers) if i not in layers]
    if not remaining or not isinstance(adapter.stack, nn.ModuleList):
        raise ValueError(
            f"depth: a layer must be left in the nn.ModuleList {adapter.path}, got "
            f"{len(layers)} to leave out of a {type(adapter.stack).__name__}"
        )
    adapter.stack._modules.clear()
    adapter.stack.extend(remaining)
    _number_anew(adapter, component, remaining)


def _skip_part(
    adapter: Decoder,
    component: str,
    layers: Sequence[int],
    part: Part,
    forward: Callable[[], object] | None,
) -> None:
    """Lets layers add nothing where their attention or FFN was; it and its norm are not run."""
    if forward is None:
        raise ValueError("depth: forward must be given to skip a part, got None")
    names = adapter.names(component)
    name, norm = names.attention, names.input_norm
    if part is Part.FFN:
        name, norm = names.ffn, names.post_attention_norm
    modules = [getattr(layer, name) for layer in adapter.layers]
    stand_ins = _stand_ins([modules[layer] for layer in layers], forward)
    if part is Part.ATTENTION:
        remaining = [module for i, module in enumerate(modules) if i not in layers]
        if not remaining:
            raise ValueError(f"depth: an attention must be left, got {len(layers)} to leave out")
        _number_anew(adapter, component, remaining)
    for layer in layers:
        for at, new in ((name, stand_ins[modules[layer]]), (norm, nn.Identity())):
            slot = adapter.slot(layer, at)
            if slot is None:
                raise ValueError(f"depth: layer {layer} must hold its {at}, got one from elsewhere")
            setattr(slot.owner, slot.name, new)


def _number_anew(adapter: Decoder, component: str, parts: Sequence[nn.Module]) -> None:
    """Lets what modules call their number in a cache count the given ones alone."""
    name = adapter.names(component).attention
    kinds = {
        tuple(getattr(getattr(layer, name), n, None) for n in ("layer_type", "sliding_window"))
        for layer in adapter.layers
    }
    if len(kinds) > 1:
        listed = " and ".join(sorted(f"{kind} (window {window})" for kind, window in kinds))
        raise ValueError(
            "depth: layers must have attentions of one kind, because caches and masks are chosen "
            f"by the number of a layer, got {listed}; part='ffn' can be skipped"
        )
    for number, part in enumerate(parts):
        for module in part.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = number  # type: ignore[assignment]


def _stand_ins(
    modules: Sequence[nn.Module], forward: Callable[[], object]
) -> dict[nn.Module, Skipped]:
    """Runs a model once to see what modules return, and returns what takes their places."""
    found: dict[nn.Module, Skipped] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        shape = hidden_states(args, kwargs).shape
        values = output if isinstance(output, tuple) and 1 <= len(output) <= 3 else (output,)
        if not isinstance(values[0], Tensor) or values[0].shape != shape:
            raise ValueError(
                f"depth: a part to be skipped must return a tensor {list(shape)} like its hidden "
                f"states, alone or first of up to three values, got a {type(output).__name__} of "
                f"a {type(module).__name__}"
            )
        count = len(values) if isinstance(output, tuple) else 0
        found[module] = Skipped(count, values[0]).train(module.training)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        forward()
    if missing := [type(module).__name__ for module in modules if module not in found]:
        raise ValueError(
            "depth: forward must run every part that is to be skipped, got none of a "
            f"{list_some(missing)}"
        )
    return found


def as_module(model: Any) -> nn.Module:
    """Returns the module of a model or of a pipeline that holds it as `model`; else TypeError."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"model: object must be a module or hold one as `model`, got {type(model).__name__}"
        )
    return found
