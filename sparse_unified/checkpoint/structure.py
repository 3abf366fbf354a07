# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors around the FFNs are all there, under their official names.

A file may hold a part of the model (FFNs alone, or no vision), so what is there decides what must
be there: groups are whole or absent, and every layer holds what one layer holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_unified._common import list_some
from sparse_unified.checkpoint import keys

VIT_CONFIG = "vit_config.json"
_VIT_LAYER = re.compile(rf"(vit_model\..*?\.layers)\.{keys.INDEX}\.(.+)")


def check_structure(found: Iterable[str], absent: tuple[str, ...] = ()) -> list[str]:
    """Returns a sentence for each unknown key and each gap among the keys outside the FFNs.

    Args:
        absent: starts of keys that pruning has taken away.
    """
    present = set(found)
    problems = []
    unknown = sorted(
        key
        for key in present
        if not keys.is_official(key)
        or (key.startswith(keys.VIT_PREFIX) and ".layers." in key and not _VIT_LAYER.fullmatch(key))
    )
    if unknown:
        problems.append(
            "keys: names must be official BAGEL names (language_model.*, vit_model.*, "
            f"{', '.join(f'{group}.*' for group in keys.OTHER_GROUPS)}), got {list_some(unknown)}"
        )
    missing = sorted(key for key in _expected(present) - present if not key.startswith(absent))
    if missing:
        problems.append(
            "keys: a group of tensors must be whole in every layer, "
            f"got no {list_some(missing)} beside the rest of it"
        )
    return problems


def vision_layers(found: Iterable[str]) -> list[int]:
    """Returns the ascending indices of the layers of the vision transformer among the keys."""
    matches = map(_VIT_LAYER.fullmatch, found)
    return sorted({int(match[2]) for match in matches if match is not None})


def check_vision_layers(config: Mapping[str, Any], layers: Sequence[int]) -> list[str]:
    """Returns a sentence if layers are missing among the keys, or vit_config.json counts others.

    Official configs count one layer more than the keys hold (BAGEL drops the last one), so both
    the number of layers and that number plus one are legal; so is none at all.

    Args:
        config: contents of vit_config.json.
        layers: ascending indices of the layers in the keys.
    """
    for index, layer in enumerate(layers):
        if layer != index:
            return [
                f"keys: layers of the vision transformer must be 0 to {layers[-1]} as the highest "
                f"says, got no {index}"
            ]
    stated = config.get("num_hidden_layers", len(layers))
    if stated in (len(layers), len(layers) + 1):
        return []
    return [
        f"{VIT_CONFIG}: num_hidden_layers must be {len(layers)} or {len(layers) + 1} for weights "
        f"of {len(layers)} layers, got {stated!r:.120}"
    ]


def _expected(present: set[str]) -> set[str]:
    expected: set[str] = set()
    for group, names in keys.OTHER_GROUPS.items():
        members = {f"{group}.{name}" for name in names}
        if members & present:
            expected |= members

    # Decoder layers: what any layer holds beside its FFNs, all hold; with it comes the trunk.
    layers = set()
    kinds = set()
    for key in present:
        match = keys.LAYER_KEY.fullmatch(key)
        if match is not None:
            layers.add(int(match[1]))
            if match[2] in keys.ATTENTION_KEYS or match[2] in keys.NORM_KEYS:
                kinds.add(match[2])
    expected |= {keys.layer_prefix(layer) + kind for layer in layers for kind in kinds}
    if kinds:
        expected |= set(keys.LANGUAGE_KEYS)

    # Layers of the vision transformer, by the same rule.
    vision: dict[str, tuple[set[str], set[str]]] = {}
    for key in present:
        match = _VIT_LAYER.fullmatch(key)
        if match is not None:
            indices, parts = vision.setdefault(match[1], (set(), set()))
            indices.add(match[2])
            parts.add(match[3])
    for stem, (indices, parts) in vision.items():
        expected |= {f"{stem}.{index}.{name}" for index in indices for name in parts}
    return expected
