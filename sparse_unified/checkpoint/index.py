# SPDX-License-Identifier: Apache-2.0
"""Keeping `*.safetensors.index.json` files true when tensors get other names."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sparse_unified.checkpoint.reader import INDEX_SUFFIX, Checkpoint, parse_json, read_text


def rewrite_indices(
    source: Checkpoint, renamed: Mapping[str, list[str]], added_bytes: int
) -> dict[str, tuple[str, str]]:
    """Returns `{file name: (old text, new text)}` of every index that speaks of renamed tensors.

    Besides the index that names the shards this can be one that lies next to a single weight file.

    Args:
        source: the checkpoint whose directory is looked through.
        renamed: key -> the keys that take its place, none when it is left out.
        added_bytes: how much larger all tensors are together afterwards.
    """
    texts: dict[str, tuple[str, str]] = {}
    for path in sorted(source.directory.iterdir()):
        if not path.name.endswith(INDEX_SUFFIX):
            continue
        text = read_text(path)
        index = parse_json(path, text)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            continue
        affected = {
            key
            for key, name in weight_map.items()
            if name in source.headers and renamed.get(key, [key]) != [key]
        }
        speaks_of_them = any(key in renamed for key in weight_map)
        if not affected and not (added_bytes and speaks_of_them):
            continue
        index["weight_map"] = {
            new: name
            for key, name in weight_map.items()
            for new in (renamed[key] if key in affected else [key])
        }
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and type(metadata.get("total_size")) is int:
            metadata["total_size"] += added_bytes
        texts[path.name] = (text, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    return texts
