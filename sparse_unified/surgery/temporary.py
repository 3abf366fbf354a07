# SPDX-License-Identifier: Apache-2.0
"""`with changed(model, config):`, a model that is smaller for as long as a block runs.

Models with the two components of BAGEL go through the transforms of `prune`; of every other decoder
FFNs are shortened and modules left out where they are, so that its `Layout` is all that has to be
known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import format_layers
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.modes import (
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.experts.keep import select_layers
from sparse_unified.surgery.cuts import PruneConfig
from sparse_unified.surgery.decoder import Decoder, FfnKey, find_adapter
from sparse_unified.surgery.exchange import unchanged
from sparse_unified.surgery.others import (
    drop_heads,
    in_words,
    leave_out,
    narrow,
    read_attention,
    skip_part,
)
from sparse_unified.surgery.prune import prune_heads_, prune_width_, read_heads, skip_layers_


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
            yield narrow(adapter, own, layers, config, scores)
        elif isinstance(config, PruneHeadsConfig):
            yield drop_heads(adapter, own, config)
        else:
            skip = leave_out if config.part is Part.BLOCK else skip_part
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
    return in_words([(part.before, part.after) for part in parts])


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
        return read_attention(adapter, component, layer).groups
    shape = read_heads(adapter, layer, component, {}, {})
    return 0 if shape is None else len(shape.query_groups)


def as_module(model: Any) -> nn.Module:
    """Returns the module of a model or of a pipeline that holds it as `model`; else TypeError."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"model: object must be a module or hold one as `model`, got {type(model).__name__}"
        )
    return found
