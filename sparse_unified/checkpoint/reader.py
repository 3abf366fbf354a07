# SPDX-License-Identifier: Apache-2.0
"""A model directory, read lazily: headers and JSON when it is opened, tensors when asked for."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_unified.checkpoint import strict_json
from sparse_unified.checkpoint.attention import check_attention
from sparse_unified.checkpoint.ffn import FFNs, scan_ffns
from sparse_unified.checkpoint.held import Layers, follow_recipe, whole_layers
from sparse_unified.checkpoint.layout import CONFIG, MoELayout, check_layout
from sparse_unified.checkpoint.modes import AdaptConfig, MoEConfig
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, parse_recipe
from sparse_unified.checkpoint.safetensors_file import (
    Header,
    TensorSpec,
    read_header,
    read_tensor,
    require_regular,
)

INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_FILES = ("ema.safetensors", "model.safetensors")
VAE_FILE = "ae.safetensors"
_LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name is a little longer


class Checkpoint:
    """The files of one model: dense or sparse, in one weight file or in shards.

    Weights are taken from `ema.safetensors`, else `model.safetensors`, else from the shards that
    the one `*.safetensors.index.json` names. Opening reads headers only and keeps no file open.

    Args:
        directory: the model directory.

    Attributes:
        directory: the same, as a Path.
        headers: `{weight file name: header}`, in the order the files were found.
        index_file: the index that names the shards; None for a single weight file.

    Raises:
        ValueError: there is no such directory or weight file, or a file breaks its format.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            state = "a file" if self.directory.exists() else "nothing there"
            raise ValueError(f"{self.directory}: checkpoint must be a directory, got {state}")
        self.index_file: Path | None = None
        self.headers: dict[str, Header] = {}
        try:
            single = [name for name in SINGLE_FILES if (self.directory / name).exists()]
            if not single:
                self.index_file = _find_index(self.directory)
        except OSError as error:
            raise ValueError(
                f"{self.directory}: checkpoint must be readable, got {error.strerror}"
            ) from error
        if self.index_file is not None:
            self.headers = _read_shards(self.index_file)
        else:
            self.headers[single[0]] = read_header(self.directory / single[0])
        self._specs = {key: spec for h in self.headers.values() for key, spec in h.tensors.items()}

    def keys(self) -> list[str]:
        """Returns the official names of all tensors, in the order they are stored."""
        return list(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Returns dtype, shape and place of one tensor, without reading it."""
        if key not in self._specs:
            raise ValueError(f"{self.directory}: key must be one of keys(), got {key!r:.120}")
        return self._specs[key]

    def read(self, key: str) -> Tensor:
        """Reads one tensor to the CPU, into memory of its own, and nothing else."""
        return read_tensor(self.spec(key), what=f"{self.directory}: {key}")

    @cached_property
    def llm_config(self) -> dict[str, Any]:
        """`llm_config.json`, as it stands."""
        return read_json(self.directory / CONFIG)

    @cached_property
    def vit_config(self) -> dict[str, Any]:
        """`vit_config.json`, as it stands."""
        return read_json(self.directory / "vit_config.json")

    @property
    def vae_file(self) -> Path:
        """The file of the autoencoder, which is separate from the weights of the model."""
        return self.directory / VAE_FILE

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All specs by key, in the order the tensors are stored."""
        return dict(self._specs)

    @cached_property
    def ffns(self) -> FFNs:
        """`{component: {layer: FFN}}` as the keys say.

        Raises:
            ValueError: a key is missing, extra or renamed, or shapes disagree.
        """
        ffns, problems = scan_ffns(self._specs)
        self._refuse(problems)
        return ffns

    @property
    def num_layers(self) -> int:
        """Decoder layers, those of which pruning has left nothing included."""
        if self.held is not None:
            return len(self.held["gen"])
        return max((max(layers) + 1 for layers in self.ffns.values()), default=0)

    @cached_property
    def moe(self) -> MoELayout | None:
        """The sparse FFNs as the keys give them, checked against the config; None when dense.

        Raises:
            ValueError: keys disagree among themselves or with llm_config.json; the message names
                what was found and what would be legal.
        """
        moe, problems = check_layout(self.ffns, self.llm_config, self.held)
        self._refuse(problems + self.check_recipe())
        return moe

    @cached_property
    def recipe(self) -> Recipe | None:
        """What was done to the model, `sparse_unified.json`; None without it.

        Raises:
            ValueError: the file is no recipe.
        """
        path = self.directory / RECIPE
        return parse_recipe(path, read_json(path)) if path.exists() else None

    @cached_property
    def held(self) -> Layers | None:
        """What each layer holds of each component after pruning; None where nothing was pruned.

        Raises:
            ValueError: the recipe cannot have been carried out on the dense model of the config.
        """
        keeps_all = (MoEConfig, AdaptConfig)
        if self.recipe is None or all(isinstance(s.config, keeps_all) for s in self.recipe.steps):
            return None
        layers = whole_layers(self.llm_config)
        self._refuse(follow_recipe(layers, self.recipe))
        return layers

    def check_recipe(self) -> list[str]:
        """Returns a sentence for each thing in the keys that the recipe does not account for."""
        problems = []
        if self.held is not None:
            problems += check_attention(self.held, self._specs, self.llm_config)
        for step in self.recipe.steps if self.recipe is not None else ():
            config = step.config
            if not isinstance(config, MoEConfig):
                continue
            for layer in map(int, config.layers):
                ffn = self.ffns.get(config.component, {}).get(layer)
                if ffn is None or (
                    ffn.sparse is not None and ffn.sparse.num_experts == config.num_experts
                ):
                    continue
                found = "a dense FFN" if ffn.sparse is None else str(ffn.sparse.num_experts)
                problems.append(
                    f"{RECIPE}: {config.component} layer {layer} must have {config.num_experts} "
                    f"experts in the keys, got {found}"
                )
        return problems

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            more = f" (and {len(problems) - 1} more disagreements)" if problems[1:] else ""
            raise ValueError(f"{self.directory}: {problems[0]}{more}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; raises ValueError when it is none."""
    return parse_json(path, read_text(path))


def read_text(path: Path) -> str:
    """Reads a UTF-8 file without touching its line ends; raises ValueError when it is none."""
    try:
        require_regular(path)
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: file must be readable, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: file must be UTF-8, got {error.reason}") from error


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError with the path when it is none."""
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: file must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: file must hold a JSON object, got {type(value).__name__}")
    return value


def is_plain_name(name: object) -> bool:
    """Tells whether `name` is a file name that stays in its directory."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
        and len(name.encode()) <= _LONGEST_NAME
    )


def _find_index(directory: Path) -> Path:
    found = sorted(path for path in directory.iterdir() if path.name.endswith(INDEX_SUFFIX))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none of them"
        raise ValueError(
            f"{directory}: directory must hold {' or '.join(SINGLE_FILES)} or one *{INDEX_SUFFIX}, "
            f"got {names}"
        )
    return found[0]


def _read_shards(index_file: Path) -> dict[str, Header]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file}: weight_map must map keys to files, got {weight_map!r:.80}")
    for key, name in weight_map.items():
        if not is_plain_name(name):
            raise ValueError(
                f"{index_file}: file of {key!r:.120} must be a plain name in the same directory, "
                f"got {name!r:.80}"
            )
    names = dict.fromkeys(name for name in weight_map.values() if name != VAE_FILE)
    headers = {name: read_header(index_file.parent / name) for name in names}
    for name, header in headers.items():
        stray = [key for key in header.tensors if weight_map.get(key) != name]
        if stray:
            raise ValueError(
                f"{index_file}: {stray[0]!r:.120} must be mapped to {name}, which holds it, "
                f"got {weight_map.get(stray[0])!r:.120}"
            )
    for key, name in weight_map.items():
        if name in headers and key not in headers[name].tensors:
            raise ValueError(f"{index_file}: {name} must hold {key!r:.120}, got a file without it")
    return headers
