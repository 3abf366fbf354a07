# SPDX-License-Identifier: Apache-2.0
"""Back to the model before: `restore_` undoes transforms, `changed` makes one for a while.

Models with the two components of BAGEL go through the transforms of this package. Of every other
decoder `changed` shortens weights and leaves modules out where they are, so that its adapter is all
that has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_unified._common import context, format_layers, list_some, naming
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import (
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.experts import keep_units, magnitude_scores, select_layers
from sparse_unified.experts.scores import check_scores, head_magnitude_scores
from sparse_unified.surgery.cuts import Cut, PruneConfig, spread
from sparse_unified.surgery.decoder import Adapter, Block, FfnKey, find_adapter, find_decoder
from sparse_unified.surgery.exchange import unchanged, undo
from sparse_unified.surgery.ffn import Skipped, cut_ffn, cut_linear, hidden_states
from sparse_unified.surgery.prune import prune_heads_, prune_width_, skip_layers_
from sparse_unified.surgery.report import SwapReport, pruned, swaps, take_census

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = ("query_key_value", "dense")
# What attentions call their numbers of heads, and the cache they are given.
_QUERY_COUNTS = ("num_heads", "num_attention_heads")
_KEY_COUNTS = ("num_key_value_heads",)
_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache")


@torch.no_grad()
def restore_(model: object, *, latest: bool = False) -> SwapReport:
    """Puts back everything that swaps and prunings of a live model replaced or took out.

    The modules are the very same objects, their weights bit for bit those of the moment they were
    replaced, whatever the blocks have learned since. Hooks go back, those added since included. If
    the model has changed mode, device or dtype in the meantime, they follow.

    Args:
        model: a module or pipeline.
        latest: undo the last transform alone, and leave those before it.

    Raises:
        ValueError: nothing of the model was replaced.
        RuntimeError: something was replaced with keep_dense=False, or kept on the meta device
            while the model got its weights; the model is as before.
    """
    with context("restore_"):
        decoder = find_decoder(model)
        before = take_census(decoder)
        undo(decoder.layers, latest=latest)
    after = take_census(decoder)
    return SwapReport(action="restore_", layers=swaps(before, after), parts=pruned(before, after))


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
    if set(adapter.components) == set(FFN_NAMES):
        with unchanged(as_module(model).modules()):
            yield _prune(model, config, None if scores is None else join_experts(scores))
        return
    own = component or adapter.components[0]
    layers = select_layers(config.layers, adapter.num_layers())
    with unchanged(as_module(model).modules()):
        if isinstance(config, SkipLayersConfig):
            if config.part is Part.BLOCK:
                _leave_out(as_module(model), adapter, own, layers)
            else:
                _skip_part(adapter, own, layers, config.part, forward)
            text = _skipped_text(config, layers)
        elif isinstance(config, PruneHeadsConfig):
            text = _drop_heads(adapter, own, layers, config)
        else:
            text = _narrow(adapter, own, layers, config, scores)
        yield text


def _prune(model: object, config: PruneConfig, scores: Mapping[int, Tensor] | None) -> str:
    if isinstance(config, SkipLayersConfig):
        parts = skip_layers_(model, config).parts
        return _skipped_text(config, sorted({part.layer for part in parts}))
    if isinstance(config, PruneWidthConfig):
        parts = prune_width_(model, config, scores).parts
    else:
        parts = prune_heads_(model, config).parts
    return _each((part.before, part.after) for part in parts)


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


def _each(changes: Iterable[tuple[str, str]]) -> str:
    texts = dict.fromkeys(f"{old} -> {new}" for old, new in changes if old != new)
    return list_some(texts, 2) if texts else "nothing"


# Other decoders


def _narrow(
    adapter: Adapter,
    component: str,
    layers: Sequence[int],
    config: PruneWidthConfig,
    scores: Mapping[FfnKey, Tensor] | None,
) -> str:
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
    for i, ffn in enumerate(ffns):
        cut_ffn(ffn.module, kept[i])
    return _each(
        (f"{ffn.intermediate_size} neurons", f"{len(kept[i])} neurons")
        for i, ffn in enumerate(ffns)
    )


def _leave_out(model: nn.Module, adapter: Adapter, component: str, layers: Sequence[int]) -> None:
    """Leaves layers out of all components and numbers the others anew: caches have no gaps."""
    blocks = [adapter.block(i, component) for i in range(adapter.num_layers())]
    modules = [block.layer_module for block in blocks]
    remaining = [module for i, module in enumerate(modules) if i not in set(layers)]
    if not remaining:
        raise ValueError(f"depth: a layer must be left, got {len(modules)} to leave out")
    for owner in model.modules():
        for name, child in owner._modules.items():
            if isinstance(child, nn.ModuleList) and list(child) == modules:
                setattr(owner, name, nn.ModuleList(remaining))
                _number_anew(blocks, remaining)
                return
    raise ValueError(
        f"depth: the {len(modules)} layers must be in an nn.ModuleList of the model, got none"
    )


def _skip_part(
    adapter: Adapter,
    component: str,
    layers: Sequence[int],
    part: Part,
    forward: Callable[[], object] | None,
) -> None:
    """Lets layers add nothing where their attention or FFN was; it and its norm are not run.

    A skipped attention leaves no keys and values. Attentions that remain are numbered anew, so that
    caches have no gaps and the first of them counts the tokens.
    """
    if forward is None:
        raise ValueError("depth: forward must be given to skip a part, got None")
    blocks = [adapter.block(i, component) for i in range(adapter.num_layers())]
    names = (
        ("attention", "input_norm") if part is Part.ATTENTION else ("ffn", "post_attention_norm")
    )
    remaining = [block.attention for block in blocks if block.layer not in set(layers)]
    if part is Part.ATTENTION and not remaining:
        raise ValueError(f"depth: an attention must be left, got {len(blocks)} to leave out")
    gone = [tuple(getattr(blocks[i], name) for name in names) for i in layers]
    stand_ins = _stand_ins([module for module, _ in gone], forward)
    for i, (module, norm) in zip(layers, gone, strict=True):
        _replace(blocks[i], module, stand_ins[module])
        _replace(blocks[i], norm, nn.Identity())
    if part is Part.ATTENTION:
        _number_anew(blocks, remaining)


def _number_anew(blocks: Sequence[Block], parts: Sequence[nn.Module]) -> None:
    """Lets what modules call their number in a cache count the given ones alone."""
    kinds = {
        tuple(getattr(block.attention, name, None) for name in ("layer_type", "sliding_window"))
        for block in blocks
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


def _replace(block: Block, module: nn.Module, new: nn.Module) -> None:
    for owner in block.layer_module.modules():
        for name, child in owner._modules.items():
            if child is module:
                setattr(owner, name, new)
                return
    raise ValueError(
        f"depth: the {type(module).__name__} of layer {block.layer} must be a module of the layer, "
        "got one from elsewhere"
    )


def _stand_ins(
    modules: Sequence[nn.Module], forward: Callable[[], object]
) -> dict[nn.Module, Skipped]:
    """Runs a model once to see what modules return, and returns what takes their places.

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
            hooks.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        forward()
    if missing := [type(module).__name__ for module in modules if module not in found]:
        raise ValueError(
            "depth: forward must run every part that is to be skipped, got none of a "
            f"{list_some(missing)}"
        )
    return found


def _handed_through(index: int, value: object, given: Mapping[int | str, Any]) -> int | str | None:
    """Returns the argument that the value at an index of a tuple is, None when it is none."""
    if value is not None:
        return next((key for key, argument in given.items() if argument is value), None)
    # Without a cache nothing tells which None is one; by custom it is the third value.
    return next((name for name in _CACHES if index == 2 and name in given), None)


class Attention(NamedTuple):
    """The heads of one attention. A group is a KV head with the query heads that read it.

    It is read from its projections, which come in two ways:

        q_proj, k_proj, v_proj, o_proj      one linear layer each
        query_key_value, dense              rows of all query heads, then key, then value heads

    Attributes:
        module: the attention.
        inputs: of the query, key and value projection: the linear layer, and the first of its rows.
        output: the output projection.
        head_dim: channels of a head.
        num_groups: KV heads G.
        queries: query heads of each.
    """

    module: nn.Module
    inputs: tuple[tuple[nn.Linear, int], ...]
    output: nn.Linear
    head_dim: int
    num_groups: int
    queries: int

    def scores(self) -> Tensor:
        """Returns the importance [G] of the groups by weight magnitude, fp32."""
        values, start = self.inputs[2]
        rows = values.weight.detach()[start : start + self.num_groups * self.head_dim]
        split = (self.num_groups, -1)
        return head_magnitude_scores(
            rows.unflatten(0, split), self.output.weight.detach().unflatten(1, split)
        )

    def text(self, groups: int) -> str:
        """Returns how many heads `groups` of the groups have, in words."""
        return f"{groups * self.queries} query heads, {groups} key heads"


def read_attention(adapter: Adapter, component: str, layer: int) -> Attention:
    """Finds out which heads the attention of a layer has.

    Raises:
        ValueError: its projections are not plain linear layers under known names, do not divide
            into heads of `head_dim`, or it has weights whose heads are unknown.
    """
    module = adapter.block(layer, component).attention
    with naming(f"heads: layer {layer}: attention"):
        for names in (_SEPARATE, _FUSED):
            linears = [getattr(module, name, None) for name in names]
            if all(isinstance(linear, nn.Linear) for linear in linears):
                return _read_heads(module, names, linears)
        raise ValueError(
            f"must have the linear layers {', '.join(_SEPARATE)} or {', '.join(_FUSED)}, "
            f"got a {type(module).__name__}"
        )


def _read_heads(module: nn.Module, names: Sequence[str], linears: Sequence[Any]) -> Attention:
    head_dim, output = getattr(module, "head_dim", None), linears[-1]
    if type(head_dim) is not int or head_dim < 1:
        raise ValueError(f"must have head_dim, got a {type(module).__name__} without it")
    queries = output.in_features // head_dim
    if names is _SEPARATE:
        groups = linears[1].out_features // head_dim
        inputs = tuple((linear, 0) for linear in linears[:3])
        rows = [linear.out_features for linear in linears[:3]]
        fits = rows == [n * head_dim for n in (queries, groups, groups)]
    else:
        groups = getattr(module, "num_key_value_heads", 0)
        starts = (0, queries * head_dim, (queries + groups) * head_dim)
        inputs = tuple((linears[0], start) for start in starts)
        fits = linears[0].out_features == (queries + 2 * groups) * head_dim
    if not fits or not groups or queries % groups:
        shapes = [f"{n} {list(p.weight.shape)}" for n, p in zip(names, linears, strict=True)]
        raise ValueError(
            f"must have whole groups of heads of {head_dim} channels, got {', '.join(shapes)}"
        )
    own = {id(p) for linear in linears for p in linear.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in own and list(parameter.shape) != [head_dim]:
            raise ValueError(
                f"must have no weights beside its projections but norms [{head_dim}] of a head, "
                f"got {name} {list(parameter.shape)}"
            )
    for name, count in _head_counts(queries, groups).items():
        if getattr(module, name, count) != count:
            raise ValueError(
                f"{name} must be {count} as its weights say, got {getattr(module, name)}"
            )
    return Attention(module, inputs, output, head_dim, groups, queries // groups)


def _head_counts(queries: int, groups: int) -> dict[str, int]:
    return dict.fromkeys(_QUERY_COUNTS, queries) | dict.fromkeys(_KEY_COUNTS, groups)


def _drop_heads(
    adapter: Adapter, component: str, layers: Sequence[int], config: PruneHeadsConfig
) -> str:
    attentions = {layer: read_attention(adapter, component, layer) for layer in layers}
    ranking = {layer: attention.scores() for layer, attention in attentions.items()}
    for layer, values in ranking.items():
        with naming(f"heads: layer {layer}"):
            check_scores(values, attentions[layer].num_groups)
    kept = keep_units(ranking, keep_ratio=config.keep_ratio, budget=config.budget)
    for layer, attention in attentions.items():
        size, module, groups = attention.head_dim, attention.module, kept[layer]
        queries, keys = spread(groups, attention.queries * size), spread(groups, size)
        rows: dict[nn.Linear, list[Tensor]] = {}
        for (linear, start), index in zip(attention.inputs, (queries, keys, keys), strict=True):
            rows.setdefault(linear, []).append(start + index)
        for linear, indices in rows.items():
            cut_linear(linear, Cut(0, torch.cat(indices)))
        cut_linear(attention.output, Cut(1, queries))
        for name, count in _head_counts(len(groups) * attention.queries, len(groups)).items():
            if name in module.__dict__:
                setattr(module, name, count)
    return _each((a.text(a.num_groups), a.text(len(kept[n]))) for n, a in attentions.items())


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
