# SPDX-License-Identifier: Apache-2.0
"""`partition.safetensors`: which dense neuron each row of a sparse FFN was, and how to go back.

Tensors: `language_model.model.layers.N.mlp_moe_gen.neuron_index` (or `mlp` for und), int32 [I];
entry i is the dense neuron at position i of the expert order (shared first). Metadata: `format`,
`format_version`, `tool`, `component`, `arguments` (JSON), `weight_files` (JSON, file name -> header
text of the dense file) and `texts` (JSON, file name -> dense text of each JSON file rewritten).
The weight files with their order, names and padding follow from these, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_unified._common import context
from sparse_unified._version import __version__
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import is_plain_name, loads_strict
from sparse_unified.checkpoint.model_dir import INDEX_SUFFIX
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.checkpoint.safetensors_io import (
    Header,
    load_tensors,
    parse_header,
    read_tensor,
    save_tensors,
)
from sparse_unified.checkpoint.shapes import CONFIG

SIDECAR = "partition.safetensors"
# The sidecar of an earlier conversion, of the other component, that the new one lies on top of.
EARLIER_SIDECAR = "partition.earlier.safetensors"
FORMAT = "sparse_unified.partition"
FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """The contents of one `partition.safetensors`.

    Attributes:
        component: "gen" or "und".
        neuron_index: `{layer: [I] int64}`.
        arguments: how `convert` was called, without paths.
        headers: `{dense file name: its header}`.
        texts: `{file name: text before conversion}`.
        tool: name and version of what wrote it.
    """

    component: str
    neuron_index: Mapping[int, np.ndarray]
    arguments: Mapping[str, Any]
    headers: Mapping[str, Header]
    texts: Mapping[str, str]
    tool: str


def tool_version() -> str:
    """Returns name and version of this package."""
    return f"sparse_unified {__version__}"


def index_key(component: str, layer: int) -> str:
    """Returns the name of one neuron_index tensor."""
    return keys.ffn_prefix(component, layer) + "neuron_index"


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Writes and syncs a sidecar file."""
    texts = {name: header.text for name, header in sidecar.headers.items()}
    save_tensors(
        path,
        {
            index_key(sidecar.component, layer): torch.from_numpy(index).int()
            for layer, index in sidecar.neuron_index.items()
        },
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool": sidecar.tool,
            "component": sidecar.component,
            "arguments": json.dumps(sidecar.arguments),
            "weight_files": json.dumps(texts, ensure_ascii=False),
            "texts": json.dumps(sidecar.texts, ensure_ascii=False),
        },
    )


def read_sidecar(path: Path) -> Sidecar:
    """Reads and checks a sidecar file."""
    if not path.exists():
        raise ValueError(f"{path}: file must be there, as convert writes it, got nothing")
    header = load_tensors(path, kind=FORMAT, version=FORMAT_VERSION)
    with context(path):
        component = header.metadata.get("component", "")
        if component not in keys.FFN_NAMES:
            raise ValueError(f"component must be gen or und, got {component!r:.80}")
        indices: dict[int, np.ndarray] = {}
        for key, spec in header.tensors.items():
            found = keys.find_ffn_key(key)
            if found is None or (found[0], found[2]) != (component, "neuron_index"):
                raise ValueError(f"key must be as {index_key(component, 0)}, got {key!r:.120}")
            index = read_tensor(spec).flatten()
            in_order = torch.arange(index.numel(), dtype=torch.int32)
            if index.dtype != torch.int32 or not torch.equal(index.sort().values, in_order):
                raise ValueError(
                    f"{key} must be an int32 permutation of 0 to {index.numel() - 1}, "
                    "got something else"
                )
            indices[found[1]] = index.long().numpy()
        maps: dict[str, dict[str, Any]] = {}
        for field in ("arguments", "weight_files", "texts"):
            text = header.metadata.get(field, "")
            with suppress(ValueError):
                maps[field] = loads_strict(text)
            if not isinstance(maps.get(field), dict):
                raise ValueError(f"{field} must hold a JSON object, got {text!r:.80}")
        for field in ("weight_files", "texts"):
            for name, text in maps[field].items():
                if not is_plain_name(name) or not isinstance(text, str):
                    raise ValueError(f"{field} must map plain file names to text, got {name!r:.80}")
        for name in maps["texts"]:  # whatever else is in OUT is copied
            if name not in (CONFIG, RECIPE) and not name.endswith(INDEX_SUFFIX):
                raise ValueError(f"texts must be of files that convert rewrites, got {name!r:.80}")
    return Sidecar(
        component=component,
        neuron_index=dict(sorted(indices.items())),
        arguments=maps["arguments"],
        headers={
            name: parse_header(path.with_name(f"{path.name}[{name}]"), text)
            for name, text in maps["weight_files"].items()
        },
        texts=maps["texts"],
        tool=header.metadata.get("tool", "unknown"),
    )
