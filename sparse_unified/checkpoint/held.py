# SPDX-License-Identifier: Apache-2.0
"""What each layer still holds of each component after the steps of a recipe.

The keys of a file decide, and the recipe has to agree with them; what no key tells, as `top_k` of
experts, is which of the dense model's heads are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.layout import CONFIG
from sparse_unified.checkpoint.modes import (
    MAX_LAYERS,
    AdaptConfig,
    MoEConfig,
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint.recipe import RECIPE, Recipe

_MAX_HEADS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a layer holds of one component. Heads have their numbers in the dense checkpoint.

    Attributes:
        width: neurons of the FFN, of all experts together where it is sparse; 0 where skipped.
        keys: key heads of the layer; () where the component skips the attention.
        reads: those that the component's query heads read.
    """

    width: int
    keys: tuple[int, ...]
    reads: tuple[int, ...]

    @property
    def has_attention(self) -> bool:
        """Whether the component's tokens run through the attention."""
        return bool(self.reads)


Layers = dict[str, dict[int, Held]]


def whole_layers(config: Mapping[str, Any]) -> Layers:
    """Returns what the layers of the dense checkpoint hold, from its config.

    Raises:
        ValueError: a size that pruning depends on is missing in llm_config.json.
    """
    sizes = [
        _count(name, config.get(name), limit)
        for name, limit in (("num_hidden_layers", MAX_LAYERS), ("intermediate_size", 1 << 31))
    ]
    heads = config.get("num_key_value_heads", config.get("num_attention_heads", 1))
    heads = _count("num_key_value_heads", heads, _MAX_HEADS)
    all_heads = tuple(range(heads))
    held = Held(width=sizes[1], keys=all_heads, reads=all_heads)
    return {component: dict.fromkeys(range(sizes[0]), held) for component in keys.FFN_NAMES}


def _count(name: str, value: object, limit: int) -> int:
    # A list of as many entries is made, so a count that no model has must not get that far.
    if type(value) is not int or value < 1:
        raise ValueError(f"{CONFIG}: {name} must be a positive integer, got {value!r:.120}")
    if value > limit:
        raise ValueError(f"{CONFIG}: {name} must be at most {limit}, got {value!r:.120}")
    return value


def follow_recipe(layers: Layers, recipe: Recipe) -> list[str]:
    """Carries out the steps of a recipe on `layers`; returns a sentence for what cannot be."""
    problems = []
    for number, step in enumerate(recipe.steps):
        config, at = step.config, f"{RECIPE}: step {number} ({step.config.mode})"
        wrong = [n for n in config.layers if n not in layers["gen"]]
        if wrong:
            problems.append(f"{at}: layers must be 0 to {len(layers['gen']) - 1}, got {wrong[0]}")
            continue
        if isinstance(config, AdaptConfig):
            continue
        for layer in map(int, config.layers):
            if isinstance(config, (MoEConfig, PruneWidthConfig)):
                held = layers[config.component][layer]
                width = step.widths.get(layer, held.width)
                if not 1 <= width <= held.width:
                    problems.append(
                        f"{at}: width of layer {layer} must be 1 to the {held.width} neurons left, "
                        f"got {width}"
                    )
                layers[config.component][layer] = replace(held, width=width)
            elif isinstance(config, PruneHeadsConfig):
                for component in keys.FFN_NAMES:
                    held = layers[component][layer]
                    now = step.heads[layer]
                    reads = now.reads[component]
                    if not set(reads) <= set(held.reads) or bool(reads) != held.has_attention:
                        problems.append(
                            f"{at}: {component} heads of layer {layer} must be some of "
                            f"{list(held.reads)}, got {list(reads)}"
                        )
                    layers[component][layer] = replace(
                        held, keys=now.keys if reads else (), reads=reads
                    )
            else:
                layers[config.component][layer] = skip(layers[config.component][layer], config)
    return problems


def skip(held: Held, config: SkipLayersConfig) -> Held:
    """Returns what is left once the parts of a "depth" step are gone."""
    if Part.FFN in config.parts:
        held = replace(held, width=0)
    if Part.ATTENTION in config.parts:
        held = replace(held, keys=(), reads=())
    return held


def kept_channels(
    old: Held, new: Held, name: str, shape: Sequence[int]
) -> tuple[int, np.ndarray] | bool:
    """Says which channels of an attention projection stay.

    Args:
        old, new: what the layer held before, and what it holds after.
        name: of the projection, as in `q_proj`. shape: of its weight or bias before.

    Returns:
        (dimension, kept indices), or True when all stay.
    """
    dim = 1 if name == "o_proj" else 0
    held, wanted = (old.reads, new.reads) if name in ("q_proj", "o_proj") else (old.keys, new.keys)
    if held == wanted:
        return True
    width = shape[dim] // len(held)
    places = np.array([held.index(head) for head in wanted])
    return dim, (places[:, None] * width + np.arange(width)).reshape(-1)


def absent_prefixes(layers: Layers) -> tuple[str, ...]:
    """Returns the starts of all keys that a file must not have, because their part is skipped."""
    prefixes: list[str] = []
    for component, by_layer in layers.items():
        for layer, held in by_layer.items():
            if not held.width:
                prefixes += keys.module_prefixes(layer, keys.ffn_modules(component))
            if not held.has_attention:
                prefixes += keys.module_prefixes(layer, keys.attention_modules(component))
    return tuple(prefixes)
