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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_unified._version import __version__
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import is_plain_name, loads_strict
from sparse_unified.checkpoint.safetensors_io import (
    Header,
    load_tensors,
    parse_header,
    read_tensor,
    save_tensors,
)

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
        weight_files: `{dense file name: header text}`.
        texts: `{file name: text before conversion}`.
        tool: name and version of what wrote it.
    """

    component: str
    neuron_index: Mapping[int, np.ndarray]
    arguments: Mapping[str, Any]
    weight_files: Mapping[str, str]
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
            "arguments": json.dumps(dict(sidecar.arguments)),
            "weight_files": json.dumps(dict(sidecar.weight_files), ensure_ascii=False),
            "texts": json.dumps(dict(sidecar.texts), ensure_ascii=False),
        },
    )


def read_sidecar(path: Path) -> Sidecar:
    """Reads and checks a sidecar file.

    Raises:
        ValueError: it is missing, not a sidecar, of a later format, or holds no permutation.
    """
    if not path.exists():
        raise ValueError(
            f"{path}: file must be there, as convert writes it, to give the dense neuron order; "
            "got nothing"
        )
    header = load_tensors(path, kind=FORMAT, version=FORMAT_VERSION)
    metadata = header.metadata
    component = metadata.get("component", "")
    if component not in keys.FFN_NAMES:
        raise ValueError(f"{path}: component must be gen or und, got {component!r:.80}")
    return Sidecar(
        component=component,
        neuron_index=_read_indices(path, header, component),
        arguments=_read_map(path, metadata, "arguments"),
        weight_files=_read_files(path, metadata, "weight_files"),
        texts=_read_files(path, metadata, "texts"),
        tool=metadata.get("tool", "unknown"),
    )


def parse_dense_headers(path: Path, sidecar: Sidecar) -> dict[str, Header]:
    """Returns the checked headers of the dense weight files that a sidecar of `path` describes."""
    return {
        name: parse_header(path.with_name(f"{path.name}[{name}]"), text)
        for name, text in sidecar.weight_files.items()
    }


def _read_indices(path: Path, header: Header, component: str) -> dict[int, np.ndarray]:
    indices: dict[int, np.ndarray] = {}
    for key, spec in header.tensors.items():
        found = keys.find_ffn_key(key)
        if found is None or (found[0], found[2]) != (component, "neuron_index"):
            raise ValueError(
                f"{path}: key must be {index_key(component, 0)} or alike, got {key!r:.120}"
            )
        index = read_tensor(spec, what=str(path))
        if index.dtype != torch.int32 or not torch.equal(
            index.flatten().sort().values, torch.arange(index.numel(), dtype=torch.int32)
        ):
            raise ValueError(
                f"{path}: {key} must be an int32 permutation of 0 to {index.numel() - 1}, "
                "got something else"
            )
        indices[found[1]] = index.flatten().long().numpy()
    return dict(sorted(indices.items()))


def _read_map(path: Path, metadata: Mapping[str, str], field: str) -> dict[str, Any]:
    try:
        value = loads_strict(metadata.get(field, ""))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: {field} must hold a JSON object, got {metadata.get(field)!r:.80}"
        )
    return value


def _read_files(path: Path, metadata: Mapping[str, str], field: str) -> dict[str, str]:
    value = _read_map(path, metadata, field)
    for name, text in value.items():
        if not is_plain_name(name) or not isinstance(text, str):
            raise ValueError(f"{path}: {field} must map plain file names to text, got {name!r:.80}")
    return value
