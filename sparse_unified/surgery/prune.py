# SPDX-License-Identifier: Apache-2.0
"""prune_width_, prune_heads_, skip_layers_: cuts (see `cuts`) carried out on a live model.

What a layer has is read first, then what stays is planned, and only then is anything changed.
`changed` takes every decoder, for as long as a block runs: those with the two components of BAGEL
go through the transforms, of others FFNs are shortened and modules left out where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import context, format_layers, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import LayerShape
from sparse_unified.checkpoint.modes import (
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint.scores import Scores, head_magnitudes, rank
from sparse_unified.experts.keep import magnitude_scores, select_layers
from sparse_unified.nn import SparseMoE, key_heads_read
from sparse_unified.surgery import others
from sparse_unified.surgery.cuts import PruneConfig, keep_neurons, plan, skipped_modules
from sparse_unified.surgery.decoder import (
    Decoder,
    FfnKey,
    find_adapter,
    find_decoder,
    hash_ffns,
    takes_absent_parts,
)
from sparse_unified.surgery.exchange import Slot, put_all, unchanged
from sparse_unified.surgery.ffn import (
    DenseWeights,
    Skipped,
    cut_ffn,
    cut_linear,
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
            of components to either, or a scores file, of this model as it is if `calibrate`
            wrote it. None ranks neurons by weight magnitude.
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
            width: Any = len(weights[slot.layer].gate_proj)
            width = ffn.layout if isinstance(ffn, SparseMoE) else width
            shapes[slot.layer] = LayerShape(ffn=width, kv_heads=(), query_groups=())
        of_layer, _ = rank(
            scores,
            component,
            {layer: shape.width for layer, shape in shapes.items()},
            len(decoder.layers),
            lambda layer: magnitude_scores(*weights[layer]),
            partial(hash_ffns, decoder, component),
        )
        kept = keep_neurons(config, shapes, {layer: of_layer(layer) for layer in shapes})

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
        model: a module or pipeline with an attention of `sparse_unified.bagel`, or a decoder of one
            component, "und", with the attentions that `changed` takes.
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
        if single := _single(model, config):
            if scores is not None:
                raise ValueError(
                    "scores must be None for a decoder of one component, whose groups are ranked "
                    f"by weight magnitude, got {type(scores).__name__}"
                )
            drop = partial(others.drop_heads, single, single.components[0], config)
            return transform("prune_heads_", single, drop, keep=keep_dense)
        decoder = find_decoder(model)
        names = [f"self_attn.q_proj{keys.SUFFIXES[component]}" for component in config.components]
        layers = select_layers(
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
                    shape = read_heads(decoder, layer, component, tensors, modules)
                    if shape is not None:
                        shapes[component][layer] = shape
        ranking = {}
        for component in config.components:
            own = shapes[component]
            ranking[component], _ = rank(
                scores,
                component,
                {layer: len(own[layer].query_groups) for layer in layers},
                len(decoder.layers),
                lambda n, c=component, own=own: head_magnitudes(  # type: ignore[misc]
                    tensors.__getitem__, c, n, own[n]
                ),
                partial(hash_ffns, decoder, component),
            )
        sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        cuts, left = plan(config, shapes, sizes, lambda name, layer: ranking[name](layer))

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


def read_heads(
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
    model: object,
    config: SkipLayersConfig,
    *,
    keep_dense: bool = True,
    forward: Callable[[], object] | None = None,
) -> SurgeryReport:
    """Takes layers, or their attention or FFN, away from the tokens of one component, in place.

    The tokens pass by on the residual, and nothing of the part runs for them, its norm included;
    the other component's tokens run as before. Where an attention is skipped, the component's
    tokens do not ask and are not seen: they have no keys and values in that layer, so contexts
    hold fewer there, and with `gen` left alone its tokens see their own image and earlier ones.
    Positions do not change. Layers keep their numbers, of which caches of other models leave those
    without an attention out. A FFN can be skipped in every model that `apply_moe_` takes, an
    attention in ours and in decoders of one component.

    Args:
        model: a module or pipeline.
        config: which parts of which layers.
        keep_dense: keep the modules for `restore_`, in memory where they are.
        forward: runs the model once; needed to skip attentions that are not ours, since it shows
            what they return.

    Raises:
        ValueError: a selected layer has nothing of this kind left, or cannot do without its
            attention. The model is as before.
    """
    with context("skip_layers_"):
        component = config.component
        if "attention" in config.parts and (single := _single(model, config)):
            layers = select_layers(config.layers, single.num_layers())

            def skip_parts() -> None:
                for part in config.parts:
                    others.skip_part(single, single.components[0], layers, Part(part), forward)

            return transform("skip_layers_", single, skip_parts, keep=keep_dense)
        decoder = find_decoder(model, component)
        found: dict[int, list[tuple[Slot, nn.Module | None]]] = {}

        def has(layer: int) -> bool:
            found[layer] = _skip(decoder, layer, config)
            return bool(found[layer])

        layers = select_layers(
            config.layers, len(decoder.layers), has, f"{component} {config.part.value} left"
        )

        changes = [change for layer in layers for change in found[layer]]
        return transform("skip_layers_", decoder, partial(put_all, changes), keep=keep_dense)


def _single(model: object, config: PruneHeadsConfig | SkipLayersConfig) -> Decoder | None:
    """Returns the layers of a decoder with one component that is not ours; None of others."""
    try:
        adapter = find_adapter(model)
    except ValueError:
        return None
    if len(adapter.components) > 1 or takes_absent_parts(adapter.layers[0]):
        return None
    if config.component != "und":
        raise ValueError(
            f"component must be 'und' for a decoder of one component, got {config.component!r}"
        )
    return adapter


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
            yield others.narrow(adapter, own, layers, config, scores)
        elif isinstance(config, PruneHeadsConfig):
            yield others.drop_heads(adapter, own, config)
        else:
            skip = others.leave_out if config.part is Part.BLOCK else others.skip_part
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
    return others.in_words([(part.before, part.after) for part in parts])


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


def count_groups(adapter: Decoder, component: str, layer: int) -> int:
    """Counts the groups of query heads that a component has in a layer."""
    if set(adapter.components) != set(keys.FFN_NAMES):
        return others.read_attention(adapter, component, layer).groups
    shape = read_heads(adapter, layer, component, {}, {})
    return 0 if shape is None else len(shape.query_groups)
