# SPDX-License-Identifier: Apache-2.0
"""Cuts of decoders that are not BAGEL, of which a `Layout` is all that is known, in place.

Callers undo them: `changed` at the end of its block, `transform` by its log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_unified._common import list_some, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.modes import Part, PruneHeadsConfig, PruneWidthConfig
from sparse_unified.experts.keep import (
    check_scores,
    head_magnitude_scores,
    keep_units,
    magnitude_scores,
    select_layers,
)
from sparse_unified.surgery.cuts import Cut, spread
from sparse_unified.surgery.decoder import Decoder, FfnKey
from sparse_unified.surgery.ffn import Skipped, cut_ffn, cut_linear, hidden_states


def in_words(changes: Sequence[tuple[str, ...]]) -> str:
    texts = dict.fromkeys(f"{old} -> {new}" for old, new in changes if old != new)
    return list_some(texts, 2) if texts else "nothing"


def narrow(
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
    changes = []
    for i, ffn in enumerate(ffns):
        changes.append((f"{ffn.intermediate_size} neurons", f"{len(kept[i])} neurons"))
        cut_ffn(ffn.module, kept[i])
    return in_words(changes)


class Attention(NamedTuple):
    """The heads of one attention. A group is a KV head with the query heads that read it."""

    module: nn.Module
    inputs: tuple[tuple[nn.Linear, int], ...]  # of queries, keys and values, with the first row
    output: nn.Linear
    size: int  # channels of a head
    groups: int
    queries: int  # of a group


def head_counts(queries: int, groups: int) -> dict[str, int]:
    """Returns what attentions call their numbers of heads."""
    counts = {"num_heads": queries, "num_attention_heads": queries}
    return counts | {"num_key_value_heads": groups}


def tell_counts(module: nn.Module, queries: int, groups: int) -> None:
    """Lets an attention say how many heads it has now."""
    for name, count in head_counts(queries, groups).items():
        if name in vars(module):
            setattr(module, name, count)


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
        if all(getattr(module, name, n) == n for name, n in head_counts(queries, groups).items()):
            return Attention(module, tuple(inputs), output, size, groups, queries // groups)
    shapes = [f"{n} {list(p.shape)}" for n, p in module.named_parameters() if n.endswith("weight")]
    raise ValueError(
        f"heads: layer {layer}: attention must have whole groups of heads of head_dim channels in "
        f"{', '.join(keys.ATTENTION_PROJECTIONS)} or query_key_value, dense, and no other weights "
        f"but norms of a head, got a {type(module).__name__} of head_dim {size} with "
        f"{list_some(others + shapes)}"
    )


def drop_heads(adapter: Decoder, component: str, config: PruneHeadsConfig) -> str:
    at = adapter.names(component).attention
    layers = select_layers(
        config.layers,
        adapter.num_layers(),
        lambda layer: adapter.has(layer, at),
        f"{component} attention",
    )
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
        tell_counts(own.module, len(groups) * own.queries, len(groups))
        sizes = [(n * own.queries, n) for n in (own.groups, len(groups))]
        changes.append(tuple(f"{q} query heads, {k} key heads" for q, k in sizes))
    return in_words(changes)


def leave_out(adapter: Decoder, component: str, layers: Sequence[int], *_: object) -> None:
    """Leaves layers out of all components and numbers the others anew: caches have no gaps."""
    remaining = [layer for i, layer in enumerate(adapter.layers) if i not in layers]
    if not remaining or not isinstance(adapter.stack, nn.ModuleList):
        raise ValueError(
            f"depth: a layer must be left in the nn.ModuleList {adapter.path}, got "
            f"{len(layers)} to leave out of a {type(adapter.stack).__name__}"
        )
    adapter.stack._modules.clear()
    adapter.stack.extend(remaining)
    number_anew(adapter, component, remaining)


def skip_part(
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
        number_anew(adapter, component, remaining)
    for layer in layers:
        for at, new in ((name, stand_ins[modules[layer]]), (norm, nn.Identity())):
            slot = adapter.slot(layer, at)
            if slot is None:
                raise ValueError(f"depth: layer {layer} must hold its {at}, got one from elsewhere")
            setattr(slot.owner, slot.name, new)


def number_anew(adapter: Decoder, component: str, parts: Sequence[nn.Module]) -> None:
    """Lets what modules call their number in a cache count the given ones alone."""
    attentions = [getattr(layer, adapter.names(component).attention) for layer in adapter.layers]
    kinds = {
        tuple(getattr(attention, n, None) for n in ("layer_type", "sliding_window"))
        for attention in attentions
        if not isinstance(attention, Skipped)
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
        is_tuple = isinstance(output, tuple) and 1 <= len(output) <= 3
        first = output[0] if is_tuple else output
        if not isinstance(first, Tensor) or first.shape != shape:
            raise ValueError(
                f"depth: a part to be skipped must return a tensor {list(shape)} like its hidden "
                f"states, alone or first of up to three values, got a {type(output).__name__} of "
                f"a {type(module).__name__}"
            )
        found[module] = Skipped(len(output) if is_tuple else 0, first).train(module.training)

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
