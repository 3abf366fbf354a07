# SPDX-License-Identifier: Apache-2.0
"""A model directory, read lazily: headers and JSON when it is opened, tensors when asked for.

A model is named by its directory, or by its id on the hub.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_unified._common import naming, optional
from sparse_unified.checkpoint.files import (
    is_plain_name,
    read_json,
    refuse_change,
    stamp_of,
    to_path,
)
from sparse_unified.checkpoint.modes import AdaptConfig, MoEConfig
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, parse_recipe
from sparse_unified.checkpoint.safetensors_io import Header, TensorSpec, read_header, read_tensor
from sparse_unified.checkpoint.shapes import (
    CONFIG,
    FFNs,
    LayerShape,
    check_ffns,
    find_top_k,
    scan_ffns,
    wanted_layers,
)
from sparse_unified.experts import ExpertLayout

INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_FILES = ("ema.safetensors", "model.safetensors")
VAE_FILE = "ae.safetensors"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


class Checkpoint:
    """The files of one model: dense or sparse, in one weight file or in shards.

    Weights are taken from `ema.safetensors`, else `model.safetensors`, else from the shards that
    the one `*.safetensors.index.json` names. Opening reads headers only and keeps no file open.

    Args:
        directory: the model directory.

    Attributes:
        directory: the same, as a Path.
        headers: `{weight file name: header}`, in the order the files were found.
        specs: `{official key: dtype, shape and place of the tensor}`, in the order they are stored.

    Raises:
        ValueError: there is no such directory or weight file, or a file breaks its format.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = to_path(directory, "checkpoint")
        if not self.directory.is_dir():
            state = "a file" if self.directory.exists() else "nothing there"
            raise ValueError(f"{self.directory}: checkpoint must be a directory, got {state}")
        try:
            self._stamps = {
                path: stamp_of(path.stat())
                for path in self.directory.iterdir()
                if path.suffix in (".json", ".safetensors") and path.exists()
            }
        except OSError as error:
            raise ValueError(
                f"{self.directory}: checkpoint must be readable, got {error.strerror}"
            ) from error
        single = [name for name in SINGLE_FILES if self.directory / name in self._stamps]
        indices = sorted(path for path in self._stamps if path.name.endswith(INDEX_SUFFIX))
        if single:
            self.headers = {single[0]: read_header(self.directory / single[0])}
        elif len(indices) == 1:
            self.headers = _read_shards(indices[0])
        else:
            names = ", ".join(path.name for path in indices) or "none of them"
            raise ValueError(
                f"{self.directory}: directory must hold {' or '.join(SINGLE_FILES)} or one "
                f"*{INDEX_SUFFIX}, got {names}"
            )
        self.specs = {key: spec for h in self.headers.values() for key, spec in h.tensors.items()}

    def spec(self, key: str) -> TensorSpec:
        """Returns dtype, shape and place of one tensor, without reading it."""
        if key not in self.specs:
            raise ValueError(f"{self.directory}: key must be one of specs, got {key!r:.120}")
        return self.specs[key]

    def read(self, key: str) -> Tensor:
        """Reads one tensor to the CPU, into memory of its own, and nothing else."""
        return read_tensor(self.spec(key))

    def refuse_change(self) -> None:
        """Raises RuntimeError when weights or JSON files are no longer those that were opened."""
        for path, stamp in self._stamps.items():
            try:
                refuse_change(path, stamp, path.stat())
            except OSError as error:
                raise RuntimeError(
                    f"{path}: file must not change while it is read, got {error.strerror}"
                ) from error

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

    @cached_property
    def _scanned(self) -> tuple[FFNs, list[str]]:
        return scan_ffns(self.specs)

    @property
    def ffns(self) -> FFNs:
        """`{component: {layer: FFN}}` as the keys say."""
        ffns, problems = self._scanned
        self._refuse(problems)
        return ffns

    @property
    def num_layers(self) -> int:
        """Decoder layers, those of which pruning has left nothing included."""
        return len(self._wanted["gen"])

    def problems(self) -> list[str]:
        """Returns a sentence for each disagreement of the FFNs, llm_config.json and the recipe."""
        ffns, problems = self._scanned
        is_pruned = self.left is not None
        return [*problems, *check_ffns(ffns, self.llm_config, self._wanted, pruned=is_pruned)]

    @cached_property
    def shapes(self) -> dict[str, dict[int, LayerShape]]:
        """What each layer has of each component, as the keys give it, pruned or not.

        Checked against llm_config.json and the recipe.
        """
        self._refuse(self.problems())
        ffns: FFNs = self.ffns
        shared: Any = self.llm_config.get("num_shared_experts")
        shapes: dict[str, dict[int, LayerShape]] = {}
        for component, layers in self._wanted.items():
            shapes[component] = {}
            for layer, shape in layers.items():
                found = ffns.get(component, {}).get(layer)
                ffn: Any = 0 if found is None else found.ffn
                if isinstance(ffn, ExpertLayout):
                    ffn = replace(ffn, num_shared_experts=shared)
                shapes[component][layer] = replace(shape, ffn=ffn)
        return shapes

    @property
    def experts(self) -> dict[str, dict[int, ExpertLayout]]:
        """The sparse FFNs, `{component: {layer: layout}}`, of components that have some."""
        found: dict[str, dict[int, ExpertLayout]] = {}
        for component, layers in self.shapes.items():
            for layer, shape in layers.items():
                if isinstance(shape.ffn, ExpertLayout):
                    found.setdefault(component, {})[layer] = shape.ffn
        return found

    @property
    def top_k(self) -> int | None:
        """Experts a token uses, as llm_config.json says; None of a dense model."""
        layouts = [layout for layers in self.experts.values() for layout in layers.values()]
        return find_top_k(self.llm_config, layouts[0].num_experts) if layouts else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """What was done to the model, `sparse_unified.json`; None without it."""
        path = self.directory / RECIPE
        return parse_recipe(path, read_json(path)) if path.exists() else None

    @cached_property
    def _wanted(self) -> dict[str, dict[int, LayerShape]]:
        """What the layers must hold, with the neurons of sparse FFNs together."""
        with naming(self.directory):
            return wanted_layers(self.llm_config, self.recipe)

    @property
    def left(self) -> dict[str, dict[int, LayerShape]] | None:
        """What pruning has left, with the neurons of sparse FFNs together; None without pruning."""
        keeps_all = (MoEConfig, AdaptConfig)
        steps = self.recipe.steps if self.recipe is not None else ()
        return None if all(isinstance(s.config, keeps_all) for s in steps) else self._wanted

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            more = f" (and {len(problems) - 1} more disagreements)" if problems[1:] else ""
            raise ValueError(f"{self.directory}: {problems[0]}{more}")


def _read_shards(index_file: Path) -> dict[str, Header]:
    weight_map = read_json(index_file).get("weight_map")
    with naming(index_file):
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"weight_map must map keys to files, got {weight_map!r:.80}")
        for key, name in weight_map.items():
            if not is_plain_name(name):
                raise ValueError(
                    f"file of {key!r:.120} must be a plain name in the same directory, "
                    f"got {name!r:.80}"
                )
        names = dict.fromkeys(name for name in weight_map.values() if name != VAE_FILE)
        headers = {name: read_header(index_file.parent / name) for name in names}
        held = {(key, name) for name, header in headers.items() for key in header.tensors}
        claimed = {(key, name) for key, name in weight_map.items() if name in headers}
        for key, name in sorted(held ^ claimed)[:1]:
            state = "in" if (key, name) in held else "not in"
            raise ValueError(
                f"weight_map must name the file of each tensor, got {key!r:.120} {state} {name}"
            )
    return headers


def find_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    where: str = "from_pretrained",
    **options: Any,
) -> Path:
    """Returns the directory of a model, given as such or as a hub id, which is downloaded.

    Args:
        name: a directory, or an id such as "LLM-Drop/BAGEL-MoE-7B-GEN-16to8". What is already in
            the hub's cache is not downloaded again.
        revision: of an id: a branch, tag or commit; None is the newest.
        where: the start of messages.
        options: of `huggingface_hub.snapshot_download`: token, cache_dir, local_files_only.

    Raises:
        ValueError: `name` is neither a directory nor the id of a model that can be had.
        ImportError: it is an id, and huggingface_hub is not installed.
    """
    path = Path(name)
    if path.is_dir():
        return path
    text = os.fspath(name)
    if not is_hub_id(name):
        raise ValueError(
            f"{where}: model must be a directory or a hub id 'owner/name', got {text!r}, "
            "which is neither"
        )
    hub = optional("huggingface_hub", purpose=f"the download of {text!r}")
    try:
        options |= {"revision": revision, "allow_patterns": list(HUB_FILES)}
        return Path(hub.snapshot_download(text, **options))
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where}: model must be a directory or a hub id that can be downloaded, "
            f"got {text!r}: {first_line}"
        ) from error


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Tells whether a name is written as an id of the hub is, and can be no path: neither a file
    of that name exists, nor a directory of the owner's name, in which it would be mistyped."""
    parts = os.fspath(name).split("/")
    written = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
    return isinstance(name, str) and written and not Path(parts[0]).exists()
