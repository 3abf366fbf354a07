# SPDX-License-Identifier: Apache-2.0
"""prune_width_, prune_heads_, skip_layers_: cuts (see `cuts`) carried out on a live model.

What a layer has is read first, then the cuts are planned, then all new modules are built, and only
then is one exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import context, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.counts import Counts
from sparse_unified.checkpoint.modes import PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig
from sparse_unified.checkpoint.shapes import LayerShape
from sparse_unified.experts import check_scores
from sparse_unified.nn import QueryProjection, SparseMoE, key_heads_read
from sparse_unified.surgery.cuts import (
    Cut,
    Cuts,
    head_magnitudes,
    neuron_magnitudes,
    plan,
    select,
    shapes_left,
    skipped_modules,
)
from sparse_unified.surgery.decoder import Decoder, find_decoder, takes_absent_parts
from sparse_unified.surgery.exchange import Change, exchanged
from sparse_unified.surgery.ffn import DTYPES, narrow_ffn, read_weights, skipped_ffn
from sparse_unified.surgery.report import PruneReport, count_component, part_entries
from sparse_unified.surgery.scores import Scores, of_component, scores_by_layer

Shapes = dict[str, dict[int, LayerShape]]
Tensors = Mapping[str, Tensor]


@torch.no_grad()
def prune_width_(
    model: object,
    config: PruneWidthConfig,
    scores: Scores | None = None,
    *,
    keep_dense: bool = True,
) -> PruneReport:
    """Leaves the neurons with the highest scores in the FFNs of one component, in place.

    The three weights of a FFN become shorter and keep the order of their neurons; what is pruned
    takes neither memory nor time. FFNs are found as in `apply_moe_` and keep the same things of
    their surroundings; `apply_moe_` takes the result. See `keep_units` for what a budget means.

    A sparse FFN is pruned inside: every routed expert keeps as many neurons, see `keep_in_experts`,
    and the routers stay as they are. Its scores are in expert order, the shared expert first.

    Args:
        model: a module or pipeline.
        config: how much of which FFNs stays.
        scores: importance of each neuron, float `{layer: [I]}`, a tensor [num_layers, I], or a
            mapping of components to either. Without scores, neurons are ranked by weight magnitude.
        keep_dense: keep the replaced modules for `restore_`, in memory where they are.

    Returns:
        what was changed, and what the component costs before and after.

    Raises:
        ValueError: nothing matches, a selected layer is neither a plain dense SwiGLU nor a
            SparseMoE, or layers, budget, block_size or scores do not fit; the message names the
            layer. The model is as before.
        TypeError: config is no PruneWidthConfig, or scores are no tensors.
    """
    with context("prune_width_"):
        _check_config(config, PruneWidthConfig)
        component = config.component
        decoder = find_decoder(model, component)
        ffns = decoder.select_ffns(config.layers, component)
        given = scores_by_layer(
            of_component(scores, component), [slot.layer for slot, _ in ffns], len(decoder.layers)
        )
        tensors: dict[str, Tensor] = {}
        shapes: Shapes = {component: {}}
        ranking: dict[tuple[str, int], Tensor] = {}
        for slot, ffn in ffns:
            layer = slot.layer
            with naming(slot):
                shape, own = _read_ffn(ffn, keys.ffn_prefix(component, layer))
                if given is None:
                    _require_data(own.values())
                    values = neuron_magnitudes(own.__getitem__, component, layer, shape.ffn)
                else:
                    values = given[layer]
                check_scores(values, shape.width)
            ranking[component, layer], shapes[component][layer] = values, shape
            tensors |= own
        cuts = plan(config, shapes, _sizes(tensors), lambda *at: ranking[at])
        changes = []
        for slot, ffn in ffns:
            with naming(slot):
                new = _narrow_ffn(ffn, keys.ffn_prefix(component, slot.layer), cuts)
            changes.append(Change(slot, ffn, new))
        return _exchange("prune_width_", decoder, [component], changes, keep_dense)


@torch.no_grad()
def prune_heads_(
    model: object,
    config: PruneHeadsConfig,
    scores: Scores | None = None,
    *,
    keep_dense: bool = True,
) -> PruneReport:
    """Leaves the groups of attention heads with the highest scores of one component, in place.

    A group is a KV head with the query heads that read it. The query rows of a group go, with their
    columns of the output projection: for the component's tokens this is the layer with those
    columns at zero. Und and gen tokens see each other through the same KV heads, so the keys and
    values of a group go, for both, once neither component has queries for it; until then they stay
    for the other. With `component="both"` the groups are the same and their keys and values go at
    once. What stays keeps its order.

    Args:
        model: a module or pipeline with an attention of `sparse_unified.bagel`.
        config: how much of which attentions stays.
        scores: importance of each group, float `{layer: [G]}`, a tensor [num_layers, G], or a
            mapping of components to either; G counts the groups that the component still has. For
            "both", the scores of each component are divided by their mean and added. Without
            scores, groups are ranked by the weights of values and output.
        keep_dense: keep the replaced modules for `restore_`, in memory where they are.

    Returns:
        what was changed, and what the components of the changed layers cost before and after.

    Raises:
        ValueError: nothing matches, a selected layer lacks the attention, weights are no plain
            ones, or scores do not fit; the message names the layer. The model is as before.
        TypeError: config is no PruneHeadsConfig, or scores are no tensors.
    """
    with context("prune_heads_"):
        _check_config(config, PruneHeadsConfig)
        decoder = find_decoder(model)
        names = [f"self_attn.q_proj{keys.SUFFIXES[component]}" for component in config.components]
        layers = select(
            config.layers,
            len(decoder.layers),
            lambda layer: all(decoder.has(layer, name) for name in names),
            f"{' and '.join(config.components)} attention",
        )
        tensors: dict[str, Tensor] = {}
        shapes: Shapes = {component: {} for component in keys.SUFFIXES}
        for layer in layers:
            with naming(f"layer {layer} ({decoder.path}.{layer}.self_attn)"):
                for component, (shape, own) in _read_attention(decoder, layer).items():
                    shapes[component][layer] = shape
                    tensors |= own
        ranking = {}
        for component in config.components:
            given = of_component(scores, component)
            given = scores_by_layer(given, layers, len(decoder.layers))
            for layer in layers:
                shape = shapes[component][layer]
                with naming(f"layer {layer} ({decoder.path}.{layer}.self_attn), {component}"):
                    if given is None:
                        _require_data(tensors.values())
                        values = head_magnitudes(tensors.__getitem__, component, layer, shape)
                    else:
                        values = given[layer]
                    check_scores(values, len(shape.query_groups))
                ranking[component, layer] = values
        cuts = plan(config, shapes, _sizes(tensors), lambda *at: ranking[at])
        left = shapes_left(shapes, _sizes(tensors), cuts)
        changes = _narrow_attentions(decoder, cuts, left)
        return _exchange("prune_heads_", decoder, list(keys.SUFFIXES), changes, keep_dense)


@torch.no_grad()
def skip_layers_(
    model: object, config: SkipLayersConfig, *, keep_dense: bool = True
) -> PruneReport:
    """Takes layers, or their attention or FFN, away from the tokens of one component, in place.

    The tokens pass by on the residual, and nothing of the part runs for them, its norm included;
    the other component's tokens run as before. Where an attention is skipped, the component's
    tokens do not ask and are not seen: they have no keys and values in that layer, so contexts
    hold fewer there, and with `gen` left alone its tokens see their own image and earlier ones.
    Positions do not change. Layers keep their numbers.

    A FFN can be skipped in every model that `apply_moe_` takes, an attention in ours.

    Args:
        model: a module or pipeline.
        config: which parts of which layers.
        keep_dense: keep the modules for `restore_`, in memory where they are.

    Returns:
        what was changed, and what the component costs before and after.

    Raises:
        ValueError: nothing matches, a layer does not exist, has nothing of this kind left, or
            cannot do without its attention. The model is as before.
        TypeError: config is no SkipLayersConfig.
    """
    with context("skip_layers_"):
        _check_config(config, SkipLayersConfig)
        component = config.component
        decoder = find_decoder(model, component)
        found: dict[int, list[Change]] = {}

        def has(layer: int) -> bool:
            found[layer] = _skip(decoder, layer, config)
            return bool(found[layer])

        layers = select(
            config.layers, len(decoder.layers), has, f"{component} {config.part.value} left"
        )
        changes = [change for layer in layers for change in found[layer]]
        return _exchange("skip_layers_", decoder, [component], changes, keep_dense)


def _check_config(config: object, kind: type) -> None:
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")


def _require_data(tensors: Iterable[Tensor]) -> None:
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("scores must be given for weights without data, got meta tensors")


def _sizes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _read_ffn(ffn: nn.Module, prefix: str) -> tuple[LayerShape, dict[str, Tensor]]:
    """Returns the shape of a FFN, attention left out, and its weights by official key."""
    if isinstance(ffn, SparseMoE):
        if ffn.gate_proj.is_meta and hasattr(ffn, "_hf_hook"):
            raise ValueError("weights must be in memory, got weights offloaded by accelerate")
        shape = LayerShape(ffn=ffn.layout, kv_heads=(), query_groups=())
        return shape, {prefix + key: view for key, view in ffn.official_views().items()}
    weights = read_weights(ffn)
    shape = LayerShape(ffn=weights.gate_proj.shape[0], kv_heads=(), query_groups=())
    return shape, {f"{prefix}{name}.weight": w for name, w in weights._asdict().items()}


def _narrow_ffn(ffn: nn.Module, prefix: str, cuts: Cuts) -> nn.Module:
    if not isinstance(ffn, SparseMoE):
        return narrow_ffn(ffn, read_weights(ffn), cuts[f"{prefix}gate_proj.weight"].keep)
    kept = {
        name: start + cuts[f"{prefix}{name}.gate_proj.weight"].keep
        for name, (start, _) in ffn.layout.ranges().items()
    }
    return _narrow_block(ffn, torch.cat([*kept.values()]), len(kept.get("shared_expert", ())))


def _narrow_block(block: SparseMoE, kept: Tensor, shared_width: int) -> SparseMoE:
    """Returns a sparse FFN of some of the neurons of another, with its routers, bit for bit.

    Args:
        kept: [kept] int64, ascending positions in expert order; the first are the shared expert's.
    """
    narrow = SparseMoE(
        block.hidden_size,
        len(kept),
        block.num_experts,
        block.top_k,
        block.num_shared_experts,
        shared_intermediate_size=shared_width,
        gate_img=block.gate_img is not None,
        return_router_logits=block.return_router_logits,
        strict=block.strict,
        device="meta",
        dtype=block.gate_proj.dtype,
    ).to_empty(device=block.gate_proj.device)
    kept = kept.to(block.gate_proj.device)
    old = dict(block.named_parameters())
    for name, weight in narrow.named_parameters():
        if name in keys.PROJECTIONS:
            dim = 1 if name == "down_proj" else 0
            torch.index_select(old[name].data, dim, kept, out=weight.data)
        else:
            weight.data.copy_(old[name].data)
        weight.requires_grad_(old[name].requires_grad)
    return narrow.train(block.training)


def _read_attention(
    decoder: Decoder, layer: int
) -> dict[str, tuple[LayerShape, dict[str, Tensor]]]:
    """Returns the shape of a layer, FFN left out, and its attention's weights, by component."""
    if not takes_absent_parts(decoder.layers[layer]):
        raise ValueError(
            "attention must be one whose weights tell its heads, as in sparse_unified.bagel, got "
            f"that of a {type(decoder.layers[layer]).__name__}, which packs the heads of both "
            "components into one tensor of fixed size"
        )
    read: dict[str, tuple[LayerShape, dict[str, Tensor]]] = {}
    for component, suffix in keys.SUFFIXES.items():
        tensors: dict[str, Tensor] = {}
        for name in keys.ATTENTION_PROJECTIONS:
            slot = decoder.slot(layer, f"self_attn.{name}{suffix}")
            if slot is not None and slot.module is not None:
                with naming(f"{name}{suffix}"):
                    linear = _plain_linear(slot.module)
                for kind, tensor in linear.named_parameters():
                    key = f"{keys.layer_prefix(layer)}self_attn.{name}{suffix}.{kind}"
                    tensors[key] = tensor.detach()
                if name == "q_proj":
                    query, owner = linear, slot.owner
                if name == "k_proj":
                    num_kv_heads = linear.out_features // int(owner.head_dim)  # type: ignore
        if tensors:
            shape = LayerShape(
                ffn=0,
                kv_heads=tuple(range(num_kv_heads)),
                query_groups=key_heads_read(query, num_kv_heads),
            )
            read[component] = shape, tensors
    if not read:
        raise ValueError("attention must have projections, got none")
    return read


def _plain_linear(module: nn.Module) -> nn.Linear:
    weight = getattr(module, "weight", None)
    got = type(module).__name__
    if isinstance(module, nn.Linear) and type(weight) in (nn.Parameter, Tensor):
        if module.weight.is_meta and hasattr(module, "_hf_hook"):
            raise ValueError("projection must be in memory, got weights offloaded by accelerate")
        others = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
        if module.weight.dtype in DTYPES and not others:
            return module
        got = f"{got} with {others[0]}" if others else str(module.weight.dtype)
    raise ValueError(
        "projection must be a linear layer of plain float32, bfloat16 or float16 weights and "
        f"nothing else, got {got}"
    )


def _narrow_attentions(decoder: Decoder, cuts: Cuts, left: Shapes) -> list[Change]:
    changes = []
    for component, shapes in left.items():
        for layer, shape in shapes.items():
            for name in keys.ATTENTION_PROJECTIONS:
                name = f"self_attn.{name}{keys.SUFFIXES[component]}"
                cut = cuts.get(f"{keys.layer_prefix(layer)}{name}.weight")
                slot = decoder.slot(layer, name)
                if cut is None or slot is None:
                    continue
                linear = slot.module
                assert isinstance(linear, nn.Linear)
                reads_some = len(shape.query_groups) < len(shape.kv_heads) and "q_proj" in name
                new = _narrow_linear(linear, cut, shape.query_places if reads_some else None)
                changes.append(Change(slot, linear, new))
    return changes


def _narrow_linear(linear: nn.Linear, cut: Cut, key_heads: tuple[int, ...] | None) -> nn.Linear:
    """Returns a linear layer of some of the outputs (dim 0) or inputs (dim 1), bit for bit."""
    weight, bias = linear.weight, linear.bias
    shape = list(weight.shape)
    shape[cut.dim] = len(cut.keep)
    factory: Any = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    if key_heads is None:
        narrow = nn.Linear(shape[1], shape[0], **factory)
    else:
        narrow = QueryProjection(shape[1], shape[0], key_heads=key_heads, **factory)
    narrow.to_empty(device=weight.device)
    narrow.weight.copy_(cut.of(weight))
    narrow.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        narrow.bias.copy_(cut.of(bias) if cut.dim == 0 else bias)
        narrow.bias.requires_grad_(bias.requires_grad)
    return narrow.train(linear.training)


def _skip(decoder: Decoder, layer: int, config: SkipLayersConfig) -> list[Change]:
    """Returns the exchanges that take parts out of a layer; none when they are gone already."""
    component = config.component
    absent_ok = takes_absent_parts(decoder.layers[layer])
    if "attention" in config.parts and not absent_ok:
        kind = type(decoder.layers[layer]).__name__
        raise ValueError(
            f"layer {layer} ({decoder.path}.{layer}): attention must be one that a component can "
            f"do without, as in sparse_unified.bagel, got a {kind}, which runs it for both "
            "components at once; part 'ffn' can be skipped in it"
        )
    if not absent_ok:
        if not decoder.has(layer, keys.FFN_NAMES[component]):
            return []
        slot, ffn = decoder.ffn(layer, component)
        with naming(slot):
            return [Change(slot, ffn, skipped_ffn(ffn))]
    changes = []
    for name in skipped_modules(config):
        place = decoder.slot(layer, name)
        if place is None:
            raise ValueError(f"layer {layer}: {name} must be a module of the layer, got none")
        if place.module is not None:
            changes.append(Change(place, place.module, None))
    return changes


def _exchange(
    action: str,
    decoder: Decoder,
    components: Sequence[str],
    changes: Sequence[Change],
    keep_dense: bool,
) -> PruneReport:
    def count() -> Counts:
        return sum((count_component(decoder, name) for name in components), Counts())

    before = count()
    with exchanged(decoder.layers, changes, keep=keep_dense):
        return PruneReport(action=action, parts=part_entries(changes), before=before, after=count())
