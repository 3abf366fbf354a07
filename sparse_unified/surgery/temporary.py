# SPDX-License-Identifier: Apache-2.0
"""Makes a live model smaller for as long as a block runs; afterwards it is as it was, bit for bit.

`changed` is the way in. Models with the two components of BAGEL go through the transforms of this
package; every other decoder through the functions below, which need an adapter alone: `narrowed`,
`without_layers`, `without_part`, `fewer_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import format_layers, list_some, naming
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import (
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.experts import (
    check_scores,
    head_magnitude_scores,
    keep_units,
    magnitude_scores,
    select_layers,
)
from sparse_unified.surgery.cuts import PruneConfig, spread
from sparse_unified.surgery.decoder import Adapter, Block, Ffn, FfnKey, find_adapter
from sparse_unified.surgery.ffn import Skipped, hidden_states
from sparse_unified.surgery.prune import prune_heads_, prune_width_, skip_layers_
from sparse_unified.surgery.restore import restore_

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = ("query_key_value", "dense")
# What attentions call their numbers of heads, and the cache they are given.
_QUERY_COUNTS = ("num_heads", "num_attention_heads")
_KEY_COUNTS = ("num_key_value_heads",)
_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache")


@contextmanager
def changed(
    model: object,
    config: PruneConfig,
    scores: Mapping[FfnKey, Tensor] | None = None,
    *,
    adapter: Adapter | None = None,
    component: str | None = None,
    forward: Callable[[], object] | None = None,
) -> Iterator[str]:
    """Inside, a model is pruned as a config says; yields what was done in words.

    Args:
        model: a module, or a pipeline that holds it as `model`.
        config: of models that are not BAGEL, the component "und" is their only one.
        scores: of neurons, `{key of the FFN: [I]}`, see `Ffn.key`; without, weight magnitude.
        adapter: of the model; None finds one.
        component: of the adapter, should it be called neither "und" nor "gen".
        forward: runs the model once; needed to skip a part of layers that are not BAGEL's.

    Raises:
        ValueError: the model cannot be changed so; the message says why.
    """
    adapter = find_adapter(model) if adapter is None else adapter
    if set(adapter.components) == set(FFN_NAMES):
        if isinstance(config, SkipLayersConfig):
            report = skip_layers_(model, config)
            text = _without(config, sorted({part.layer for part in report.parts}))
        elif isinstance(config, PruneWidthConfig):
            report = prune_width_(model, config, None if scores is None else join_experts(scores))
            text = _each((part.before, part.after) for part in report.parts)
        else:
            report = prune_heads_(model, config)
            text = _each((part.before, part.after) for part in report.parts)
        try:
            yield text
        finally:
            restore_(model, latest=True)
        return
    own = component or adapter.components[0]
    layers = select_layers(config.layers, adapter.num_layers())
    if isinstance(config, SkipLayersConfig):
        text = _without(config, layers)
        if config.part is Part.BLOCK:
            inside = without_layers(as_module(model), adapter, own, layers)
        else:
            if forward is None:
                raise ValueError("depth: forward must be given to skip a part, got None")
            inside = without_part(adapter, own, layers, config.part, forward)
    elif isinstance(config, PruneHeadsConfig):
        inside, text = _fewer_heads(adapter, own, layers, config)
    else:
        inside, text = _narrower(adapter, own, layers, config, scores)
    with inside:
        yield text


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


def _without(config: SkipLayersConfig, layers: Sequence[int]) -> str:
    part = "" if config.part is Part.BLOCK else f"{config.part.value} of "
    return f"{part}{format_layers(layers)} skipped"


def _each(changes: Iterable[tuple[str, str]]) -> str:
    texts = dict.fromkeys(f"{old} -> {new}" for old, new in changes if old != new)
    return list_some(texts, 2) if texts else "nothing"


_Inside = Any  # a context manager


def _narrower(
    adapter: Adapter,
    component: str,
    layers: Sequence[int],
    config: PruneWidthConfig,
    scores: Mapping[FfnKey, Tensor] | None,
) -> tuple[_Inside, str]:
    ffns = [ffn for ffn in adapter.ffns(component) if ffn.layer in layers]
    ranking = {
        i: magnitude_scores(ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        if scores is None
        else scores[ffn.key]
        for i, ffn in enumerate(ffns)
    }
    kept = keep_units(
        ranking,
        keep_ratio=config.keep_ratio,
        budget=config.budget,
        block_size=config.block_size,
    )
    by_key = {ffn.key: kept[i] for i, ffn in enumerate(ffns)}
    widths = [(f"{f.intermediate_size} neurons", f"{len(by_key[f.key])} neurons") for f in ffns]
    return narrowed(ffns, by_key), _each(widths)


def _fewer_heads(
    adapter: Adapter, component: str, layers: Sequence[int], config: PruneHeadsConfig
) -> tuple[_Inside, str]:
    attentions = [read_attention(adapter, component, layer) for layer in layers]
    groups = keep_units(
        {attention.layer: attention.scores() for attention in attentions},
        keep_ratio=config.keep_ratio,
        budget=config.budget,
    )
    texts = [(a.text(), a.text(len(groups[a.layer]))) for a in attentions]
    inside = fewer_heads(attentions, {n: index.tolist() for n, index in groups.items()})
    return inside, _each(texts)


@contextmanager
def _undone() -> Iterator[Callable[[dict[str, Any], str, object], None]]:
    """Yields a function that sets an entry of a dict; afterwards every entry is the old one."""
    log: list[tuple[dict[str, Any], str, object]] = []

    def put(holder: dict[str, Any], name: str, value: object) -> None:
        log.append((holder, name, holder[name]))
        holder[name] = value

    try:
        yield put
    finally:
        for holder, name, value in reversed(log):
            holder[name] = value


_Put = Callable[[dict[str, Any], str, object], None]


def _cut(put: _Put, linear: nn.Linear, dim: int, index: Tensor) -> None:
    """Leaves some of the outputs (dim 0) or inputs (dim 1) of a linear layer."""
    for name, old in list(linear._parameters.items()):
        if old is not None and (dim == 0 or name == "weight"):
            values = old.detach().index_select(dim, index.to(old.device))
            parameter = nn.Parameter(values, requires_grad=old.requires_grad)
            put(linear._parameters, name, parameter)
    for name, size in zip(("out_features", "in_features"), linear.weight.shape, strict=True):
        put(linear.__dict__, name, size)


@contextmanager
def narrowed(ffns: Sequence[Ffn], kept: Mapping[FfnKey, Tensor]) -> Iterator[None]:
    """Inside, FFNs hold only the neurons they are given: their weights are shorter tensors.

    Args:
        kept: [n] ascending neuron indices of some FFNs, by key; others stay as they are.

    Raises:
        ValueError: a projection of an FFN is no `nn.Linear` of its module.
    """
    cuts = [
        (_linear(ffn, name), dim, kept[ffn.key])
        for ffn in ffns
        if ffn.key in kept
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
    ]
    with _undone() as put:
        for linear, dim, index in cuts:
            _cut(put, linear, dim, index)
        yield


def _linear(ffn: Ffn, name: str) -> nn.Linear:
    weight: Tensor = getattr(ffn, name)
    for module in ffn.module.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() == weight.data_ptr():
            return module
    raise ValueError(f"{ffn.name}: {name} must be the weight of an nn.Linear, got none that is")


@contextmanager
def without_layers(
    model: nn.Module, adapter: Adapter, component: str, layers: Sequence[int]
) -> Iterator[None]:
    """Inside, the model has fewer layers, numbered anew, so that caches have no gaps.

    Args:
        layers: to leave out; all components lose them.

    Raises:
        ValueError: the layers are in no `nn.ModuleList` of the model, or none would be left.
    """
    blocks = [adapter.block(i, component) for i in range(adapter.num_layers())]
    modules = [block.layer_module for block in blocks]
    remaining = [module for i, module in enumerate(modules) if i not in set(layers)]
    if not remaining:
        raise ValueError(f"depth: a layer must be left, got {len(modules)} to leave out")
    _require_one_kind(blocks)
    for owner in model.modules():
        for name, child in owner._modules.items():
            if isinstance(child, nn.ModuleList) and list(child) == modules:
                with _undone() as put:
                    put(owner._modules, name, nn.ModuleList(remaining))
                    _number_anew(put, remaining)
                    yield
                return
    raise ValueError(
        f"depth: the {len(modules)} layers must be in an nn.ModuleList of the model, got none"
    )


@contextmanager
def without_part(
    adapter: Adapter,
    component: str,
    layers: Sequence[int],
    part: Part,
    forward: Callable[[], object],
) -> Iterator[None]:
    """Inside, layers add nothing where their attention or FFN was; it and its norm are not run.

    A skipped attention leaves no keys and values. Attentions that remain are numbered anew, so that
    caches have no gaps and the first of them counts the tokens.

    Args:
        layers: that lose the part. part: `Part.ATTENTION` or `Part.FFN`.
        forward: runs the whole model once, to see what the part returns.

    Raises:
        ValueError: no attention would be left, or the part is not one that adds a tensor like its
            hidden states.
    """
    blocks = [adapter.block(i, component) for i in layers]
    attention = part is Part.ATTENTION
    kept = [n for n in range(adapter.num_layers()) if n not in set(layers)] if attention else []
    if attention:
        if not kept:
            raise ValueError(f"depth: an attention must be left, got {len(blocks)} to leave out")
        _require_one_kind([adapter.block(i, component) for i in range(adapter.num_layers())])
    gone = [block.attention if attention else block.ffn for block in blocks]
    stand_ins = _stand_ins(gone, forward)
    with _undone() as put:
        for block, module in zip(blocks, gone, strict=True):
            norm = block.input_norm if attention else block.post_attention_norm
            put(*_place(block, module), stand_ins[module])
            put(*_place(block, norm), nn.Identity())
        _number_anew(put, [adapter.block(i, component).attention for i in kept])
        yield


def _number_anew(put: _Put, parts: Sequence[nn.Module]) -> None:
    """Lets what modules call their number in a cache count the given ones alone."""
    for number, part in enumerate(parts):
        for module in part.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                put(module.__dict__, "layer_idx", number)


def _require_one_kind(blocks: Sequence[Block]) -> None:
    """Raises ValueError where layers are told apart by their number, which would change."""
    kinds = {
        (
            getattr(block.attention, "layer_type", None),
            getattr(block.attention, "sliding_window", None),
        )
        for block in blocks
    }
    if len(kinds) > 1:
        listed = " and ".join(sorted(f"{kind} (window {window})" for kind, window in kinds))
        raise ValueError(
            "depth: layers must have attentions of one kind, because caches and masks are chosen "
            f"by the number of a layer, got {listed}; part='ffn' can be skipped"
        )


def _place(block: Block, module: nn.Module) -> tuple[dict[str, Any], str]:
    for owner in block.layer_module.modules():
        for name, child in owner._modules.items():
            if child is module:
                return owner._modules, name
    raise ValueError(
        f"depth: the {type(module).__name__} of layer {block.layer} must be a module of the layer, "
        "got one from elsewhere"
    )


def _stand_ins(
    modules: Sequence[nn.Module], forward: Callable[[], object]
) -> dict[nn.Module, Skipped]:
    """Runs a model once to see how modules are called, and returns what takes their places.

    Raises:
        ValueError: a module was not run, or returned something else than a tensor like its hidden
            states, alone or first in a tuple.
    """
    found: dict[nn.Module, Skipped] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        like = hidden_states(args, kwargs)
        first, *others = output if isinstance(output, tuple) and output else (output,)
        if not isinstance(first, Tensor) or first.shape != like.shape:
            got = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                f"depth: a part to be skipped must return a tensor {list(like.shape)} like its "
                f"hidden states, alone or first in a tuple, got {got} of a {type(module).__name__}"
            )
        given = {**dict(enumerate(args)), **kwargs}
        handed = tuple(_handed_through(i, other, given) for i, other in enumerate(others, 1))
        stand_in = Skipped(handed if isinstance(output, tuple) else None, first)
        found[module] = stand_in.train(module.training)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            handle = module.register_forward_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        forward()
    for module in modules:
        if module not in found:
            raise ValueError(
                f"depth: forward must run every part that is to be skipped, got none of a "
                f"{type(module).__name__}"
            )
    return found


def _handed_through(index: int, value: object, given: Mapping[int | str, Any]) -> int | str | None:
    """Returns the argument that the value at an index of a tuple is, None when it is none."""
    if value is not None:
        return next((key for key, argument in given.items() if argument is value), None)
    # Without a cache nothing tells which None is one; by custom it is the third value.
    return next((name for name in _CACHES if index == 2 and name in given), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The heads of one attention. A group is a KV head with the query heads that read it.

    It is read from its projections, which come in two ways:

        q_proj, k_proj, v_proj, o_proj      one linear layer each
        query_key_value, dense              rows of all query heads, then key, then value heads

    Attributes:
        module: the attention.
        inputs: of the query, key and value projection: the linear layer, and the first of its rows.
        output: the output projection.
        head_dim: channels of a head. num_groups: KV heads G. queries: query heads of each.
    """

    layer: int
    module: nn.Module
    inputs: tuple[tuple[nn.Linear, int], ...]
    output: nn.Linear
    head_dim: int
    num_groups: int
    queries: int

    def scores(self) -> Tensor:
        """Returns the importance [G] of the groups by weight magnitude, fp32."""
        values, start = self.inputs[2]
        rows = values.weight[start : start + self.num_groups * self.head_dim].detach()
        columns = self.output.weight.detach()
        found = head_magnitude_scores(
            rows.unflatten(0, (self.num_groups, -1)), columns.unflatten(1, (self.num_groups, -1))
        )
        with naming(f"heads: layer {self.layer}"):
            check_scores(found, self.num_groups)
        return found

    def text(self, groups: int | None = None) -> str:
        """Returns how many heads `groups` of the groups have, in words."""
        count = self.num_groups if groups is None else groups
        return f"{count * self.queries} query heads, {count} key heads"


def read_attention(adapter: Adapter, component: str, layer: int) -> Attention:
    """Finds out which heads the attention of a layer has.

    Raises:
        ValueError: its projections are not plain linear layers under known names, do not divide
            into heads of `head_dim`, or it has weights whose heads are unknown.
    """
    module = adapter.block(layer, component).attention
    at = f"heads: layer {layer}: attention"
    known = [
        names
        for names in (_SEPARATE, _FUSED)
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
    ]
    head_dim = getattr(module, "head_dim", None)
    if not known or type(head_dim) is not int or head_dim < 1:
        children = ", ".join(name for name, _ in module.named_children()) or "nothing"
        raise ValueError(
            f"{at} must have head_dim and the linear layers {', '.join(_SEPARATE)} or "
            f"{', '.join(_FUSED)}, got a {type(module).__name__} with {children}"
        )
    names = known[0]
    linears: list[nn.Linear] = [getattr(module, name) for name in names]
    output = linears[-1]
    num_queries = output.in_features // head_dim
    if names is _SEPARATE:
        num_groups = linears[1].out_features // head_dim
        inputs = tuple((linear, 0) for linear in linears[:3])
        rows = [linear.out_features for linear in linears[:3]]
    else:
        num_groups = getattr(module, "num_key_value_heads", 0)
        starts = (0, num_queries * head_dim, (num_queries + num_groups) * head_dim)
        inputs = tuple((linears[0], start) for start in starts)
        rows = [num_queries * head_dim, *[num_groups * head_dim] * 2]
        if linears[0].out_features != sum(rows):
            num_groups = 0
    fits = num_groups and num_queries % num_groups == 0
    if not fits or rows != [n * head_dim for n in (num_queries, num_groups, num_groups)]:
        raise ValueError(
            f"{at} must have whole groups of heads of {head_dim} channels, got "
            f"{', '.join(f'{name} {list(getattr(module, name).weight.shape)}' for name in names)}"
        )
    own = {id(p) for linear in linears for p in linear.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in own and list(parameter.shape) != [head_dim]:
            raise ValueError(
                f"{at} must have no weights beside its projections but norms [{head_dim}] of a "
                f"head, got {name} {list(parameter.shape)}"
            )
    counts = dict.fromkeys(_QUERY_COUNTS, num_queries) | dict.fromkeys(_KEY_COUNTS, num_groups)
    for name, value in counts.items():
        if getattr(module, name, value) != value:
            raise ValueError(
                f"{at}: {name} must be {value} as its weights say, got {getattr(module, name)}"
            )
    return Attention(
        layer=layer,
        module=module,
        inputs=inputs,
        output=output,
        head_dim=head_dim,
        num_groups=num_groups,
        queries=num_queries // num_groups,
    )


@contextmanager
def fewer_heads(
    attentions: Sequence[Attention], kept: Mapping[int, Sequence[int]]
) -> Iterator[None]:
    """Inside, attentions have only the groups they are given: their weights are shorter tensors.

    Args:
        kept: `{layer: ascending groups}`.
    """
    with _undone() as put:
        for attention in attentions:
            if attention.layer in kept:
                _drop_heads(put, attention, kept[attention.layer])
        yield


def _drop_heads(put: _Put, attention: Attention, groups: Sequence[int]) -> None:
    size, module = attention.head_dim, attention.module
    queries = spread(torch.tensor(groups), attention.queries * size)
    keys = spread(torch.tensor(groups), size)
    rows: dict[nn.Linear, list[Tensor]] = {}
    for (linear, start), index in zip(attention.inputs, (queries, keys, keys), strict=True):
        rows.setdefault(linear, []).append(start + index)
    for linear, parts in rows.items():
        _cut(put, linear, 0, torch.cat(parts))
    _cut(put, attention.output, 1, queries)
    counts = dict.fromkeys(_QUERY_COUNTS, len(groups) * attention.queries)
    for name, count in (counts | dict.fromkeys(_KEY_COUNTS, len(groups))).items():
        if name in module.__dict__:
            put(module.__dict__, name, count)


def as_module(model: Any) -> nn.Module:
    """Returns the module of a model or of a pipeline that holds it as `model`.

    Raises:
        TypeError: there is none.
    """
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"model: object must be a module or hold one as `model`, got {type(model).__name__}"
        )
    return found
