# SPDX-License-Identifier: Apache-2.0
"""A model directory, read lazily: headers and JSON when it is opened, tensors when asked for.

What each layer has of each component is told by the keys, and the recipe and llm_config.json have
to agree with them. A wrong `top_k` passes every key check, and a missing `transformed_gen` makes
the official loader keep random weights in silence; so each field that describes a sparse FFN is
compared here. What no key tells is which of the dense model's heads are left; that is what the
recipe says. A model is named by its directory, or by its id on the hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import StrPath, list_some, naming, optional
from sparse_unified.checkpoint import files, keys
from sparse_unified.checkpoint.modes import (
    MAX_LAYERS,
    RECIPE,
    AdaptConfig,
    MoEConfig,
    Part,
    PruneHeadsConfig,
    SkipLayersConfig,
    Step,
    parse_recipe,
)
from sparse_unified.checkpoint.safetensors_io import Header, TensorSpec, read_header, read_tensor
from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.layout import TIME_POINTS

CONFIG = "llm_config.json"
# Lists of as many entries are made, so counts that no model has must not get that far.
_LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "intermediate_size": 1 << 31,
    "num_key_value_heads": 1 << 16,
}


class _Neurons:
    """Neurons of a dense FFN, the layout of a sparse one, 0 where it is skipped."""

    __slots__ = ()
    ffn: int | ExpertLayout

    @property
    def layout(self) -> ExpertLayout | None:
        """The experts; None where it is dense."""
        return self.ffn if isinstance(self.ffn, ExpertLayout) else None

    @property
    def width(self) -> int:
        """Neurons of the FFN, of all experts together where it is sparse."""
        return self.ffn if isinstance(self.ffn, int) else self.ffn.intermediate_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape(_Neurons):
    """What one layer has left of one component. Heads have their numbers in the dense checkpoint.

    Attributes:
        ffn: neurons of a dense FFN, the layout of a sparse one, 0 where it is skipped.
        kv_heads: KV heads of the layer; () where the component skips the attention.
        query_groups: the KV head that each group of the component's query heads reads, ascending.
    """

    ffn: int | ExpertLayout
    kv_heads: tuple[int, ...]
    query_groups: tuple[int, ...]

    @property
    def has_attention(self) -> bool:
        """Whether the component's tokens run through the attention."""
        return bool(self.query_groups)

    @property
    def query_places(self) -> tuple[int, ...]:
        """The place among `kv_heads` of the KV head that each group of query heads reads."""
        return tuple(map(self.kv_heads.index, self.query_groups))


# Component -> layer -> its shape.
LayerShapes = Mapping[str, Mapping[int, LayerShape]]


def ffn_parts(ffn: int | ExpertLayout) -> dict[str, tuple[int, int]]:
    """Returns which neurons each part of an FFN holds, by the start of its keys, in order."""
    if isinstance(ffn, int):
        return {"": (0, ffn)}
    return {f"{name}.": neurons for name, neurons in ffn.ranges().items()}


def ffn_shapes(
    ffn: int | ExpertLayout, hidden_size: int, component: str
) -> dict[str, tuple[int, int]]:
    """Returns the shape of every tensor of an FFN, by the end of its key; routers come first."""
    shapes = {}
    if isinstance(ffn, ExpertLayout):
        for name in keys.router_names(component, ffn.time_router):
            rows = 1 if name == "gate_shared" else ffn.num_experts
            columns = TIME_POINTS if name == "gate_time" else hidden_size
            shapes[f"{name}.weight"] = (rows, columns)
    for name in keys.PROJECTIONS:
        for part, (start, stop) in ffn_parts(ffn).items():
            shape = (stop - start, hidden_size)
            shapes[f"{part}{name}.weight"] = shape[::-1] if name == "down_proj" else shape
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN(_Neurons):
    """One FFN of a file."""

    ffn: int | ExpertLayout
    hidden_size: int
    dtype: torch.dtype


FFNs = dict[str, dict[int, FFN]]


# The FFNs, by their keys


def scan_ffns(specs: Mapping[str, TensorSpec | Tensor]) -> tuple[FFNs, list[str]]:
    """Finds every FFN of a file and checks its keys and shapes against each other.

    Returns the FFNs that are whole, layers ascending, and a sentence for each one that is not.
    """
    parts: dict[tuple[str, int], dict[str, TensorSpec | Tensor]] = {}
    for key, spec in specs.items():
        found = keys.find_ffn_key(key)
        if found is not None:
            component, layer, rest = found
            parts.setdefault((component, layer), {})[rest] = spec
    ffns: FFNs = {}
    problems: list[str] = []
    for component, layer in sorted(parts):
        try:
            with naming(keys.ffn_prefix(component, layer).removesuffix(".")):
                own = _read_ffn(component, parts[component, layer])
        except ValueError as error:
            problems.append(str(error))
        else:
            ffns.setdefault(component, {})[layer] = own
    return ffns, problems


def _read_ffn(component: str, part: Mapping[str, TensorSpec | Tensor]) -> FFN:
    """Describes an FFN by the tensors that tell its sizes; all others must follow from them."""
    experts = {match[1] for rest in part if (match := keys.EXPERT_KEY.fullmatch(rest))}
    ffn: int | ExpertLayout
    if experts or "gate.weight" in part:
        num_experts, _ = _matrix(part, "gate.weight")
        if num_experts != len(experts):
            raise ValueError(
                f"gate.weight must have a row for each of the {len(experts)} experts in the keys, "
                f"got {num_experts}"
            )
        width, hidden_size = _matrix(part, "experts.0.gate_proj.weight")
        shared = "shared_expert.gate_proj.weight"
        shared_width = _matrix(part, shared)[0] if shared in part else 0
        ffn = ExpertLayout(
            intermediate_size=shared_width + num_experts * width,
            num_experts=num_experts,
            shared_intermediate_size=shared_width,
            time_router="gate_time.weight" in part,
        )
    else:
        ffn, hidden_size = _matrix(part, "gate_proj.weight")
    wanted = ffn_shapes(ffn, hidden_size, component)
    wrong = [f"no {rest}" for rest in wanted if rest not in part]
    wrong += [f"{rest} too" for rest in part if rest not in wanted]
    wrong += [
        f"{rest} {list(part[rest].shape)}, not {list(shape)}"
        for rest, shape in wanted.items()
        if rest in part and tuple(part[rest].shape) != shape
    ]
    if wrong:
        what = "a dense FFN" if isinstance(ffn, int) else f"{ffn.num_experts} experts"
        raise ValueError(f"tensors must be those of {what}, got {list_some(wrong)}")
    dtypes = {spec.dtype for spec in part.values()}
    dtype = dtypes.pop()
    if dtypes or not dtype.is_floating_point:
        raise ValueError(
            f"weights must share one floating dtype, got {list_some({dtype, *dtypes})}"
        )
    return FFN(ffn=ffn, hidden_size=hidden_size, dtype=dtype)


def _matrix(part: Mapping[str, TensorSpec | Tensor], name: str) -> tuple[int, int]:
    shape = tuple(part[name].shape) if name in part else None
    if shape is None or len(shape) != 2 or 0 in shape:
        got = "nothing" if shape is None else f"shape {list(shape)}"
        raise ValueError(f"{name} must be a matrix with rows and columns, got {got}")
    return shape


# Keys and llm_config.json


def _check_sparse(
    component: str, layers: Mapping[int, FFN], config: Mapping[str, Any]
) -> list[str]:
    """Compares the sparse FFNs of a component with the fields that describe them."""
    layouts = {n: ffn.layout for n, ffn in layers.items() if ffn.layout is not None}
    problems = []

    def demand(agrees: bool, field: str, rule: str) -> None:
        if not agrees:
            got = f"{config[field]!r:.120}" if field in config else "nothing"
            problems.append(f"{CONFIG}: {field} must {rule} in the keys, got {got}")

    field = keys.TRANSFORMED[component]
    claimed = config.get(field, False)
    if isinstance(claimed, bool):
        claimed = list(layers) if claimed else []
    is_list = isinstance(claimed, list) and all(type(layer) is int for layer in claimed)
    rule = f"be {sorted(layouts) or 'false or absent'}, the layers that are sparse"
    demand(is_list and set(claimed) == set(layouts), field, rule)
    for layout in layouts.values():
        num_experts, width = layout.num_experts, layout.shared_width
        count: Any = config.get("num_experts")
        demand(type(count) is int and count == num_experts, "num_experts", f"be {num_experts} as")
        given: Any = config.get("num_shared_experts")
        demand(
            type(given) is int
            and given >= 0
            and bool(given) == bool(width)
            and given * (layout.intermediate_size // (num_experts + given)) == width,
            "num_shared_experts",
            f"give the {width} shared neurons",
        )
        try:
            find_top_k(config, num_experts)
        except ValueError as error:
            problems.append(str(error))
    return problems


def find_top_k(config: Mapping[str, Any], num_experts: int) -> int:
    """Returns top_k as llm_config.json gives it under one or both of its names."""
    given = [config[name] for name in ("top_k", "num_experts_per_tok") if name in config]
    top_k = given[0] if given and type(given[0]) is int else 0
    if not 1 <= top_k <= num_experts or given[1:] not in ([], [top_k]):
        raise ValueError(
            f"{CONFIG}: top_k must be 1 to {num_experts}, the number of experts in the keys, and "
            f"num_experts_per_tok the same, got {list_some(given)}"
        )
    return top_k


INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_FILES = ("ema.safetensors", "model.safetensors")
VAE_FILE = "ae.safetensors"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


class Checkpoint:
    """The files of one model: dense or sparse, in one weight file or in shards.

    Weights are taken from `ema.safetensors`, else `model.safetensors`, else from the shards that
    the one `*.safetensors.index.json` names. Opening reads headers only and keeps no file open.

    Attributes:
        directory: as a Path.
        headers: `{weight file name: header}`, in the order the files were found.
        specs: `{official key: dtype, shape and place of the tensor}`, in the order they are stored.

    Raises:
        ValueError: there is no such directory or weight file, or a file breaks its format.
    """

    def __init__(self, directory: StrPath) -> None:
        self.directory = files.to_path(directory, "checkpoint")
        if not self.directory.is_dir():
            state = "a file" if self.directory.exists() else "nothing there"
            raise ValueError(f"{self.directory}: checkpoint must be a directory, got {state}")
        try:
            self._stamps = {
                path: files.stamp_of(path.stat())
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
                files.refuse_change(path, stamp, path.stat())
            except OSError as error:
                raise RuntimeError(
                    f"{path}: file must not change while it is read, got {error.strerror}"
                ) from error

    @cached_property
    def llm_config(self) -> dict[str, Any]:
        """`llm_config.json`, as it stands."""
        return files.read_json(self.directory / CONFIG)

    @cached_property
    def vit_config(self) -> dict[str, Any]:
        """`vit_config.json`, as it stands."""
        return files.read_json(self.directory / "vit_config.json")

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
        ffns, config = self._scanned[0], self.llm_config
        problems: list[str] = []
        source = f"num_hidden_layers and intermediate_size of {CONFIG}"
        for component, layers in ffns.items():
            own = {layer: shape.width for layer, shape in self._wanted[component].items()}
            found = {layer: ffn.width for layer, ffn in layers.items()}
            wrong = [
                f"{found.get(layer, 0)} neurons in layer {layer}, not {own.get(layer, 0)}"
                for layer in sorted(own.keys() | found.keys())
                if own.get(layer, 0) != found.get(layer, 0)
            ]
            if wrong:
                problems.append(
                    f"keys: {component} FFNs ({keys.FFN_NAMES[component]}) must be those of "
                    f"{RECIPE if self.left else source}, got {list_some(wrong)}"
                )
            problems += _check_sparse(component, layers, config)
        sizes = {ffn.hidden_size for layers in ffns.values() for ffn in layers.values()}
        hidden_size = config.get("hidden_size", min(sizes, default=None))
        if any(type(hidden_size) is not int or size != hidden_size for size in sizes):
            problems.append(
                f"{CONFIG}: hidden_size must be what every FFN in the keys has, "
                f"{list_some(sorted(sizes))}, got {hidden_size!r:.120}"
            )
        for step in self.recipe:
            if isinstance(step.config, MoEConfig):
                component, wanted = step.config.component, step.config.time_router
                rule, got = ("be there", "none") if wanted else ("not be there", "one")
                for layer, ffn in ffns.get(component, {}).items():
                    if getattr(ffn.ffn, "time_router", wanted) != wanted:
                        key = f"gate_time.weight of {component} layer {layer}"
                        problems.append(f"keys: {key} must {rule} as {RECIPE} says, got {got}")
        return [*self._scanned[1], *dict.fromkeys(problems)]

    @cached_property
    def shapes(self) -> dict[str, dict[int, LayerShape]]:
        """What each layer has of each component, as the keys give it, pruned or not.

        Checked against llm_config.json and the recipe.
        """
        self._refuse(self.problems())
        shared: Any = self.llm_config.get("num_shared_experts")
        shapes: dict[str, dict[int, LayerShape]] = {}
        for component, layers in self._wanted.items():
            shapes[component] = {}
            for layer, shape in layers.items():
                found = self.ffns.get(component, {}).get(layer)
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
                if shape.layout is not None:
                    found.setdefault(component, {})[layer] = shape.layout
        return found

    @property
    def top_k(self) -> int | None:
        """Experts a token uses, as llm_config.json says; None of a dense model."""
        layouts = [layout for layers in self.experts.values() for layout in layers.values()]
        return find_top_k(self.llm_config, layouts[0].num_experts) if layouts else None

    @cached_property
    def recipe(self) -> tuple[Step, ...]:
        """What was done to the model, step by step: `sparse_unified.json`; () without it."""
        path = self.directory / RECIPE
        return parse_recipe(path, files.read_json(path)) if path.exists() else ()

    @cached_property
    def _wanted(self) -> dict[str, dict[int, LayerShape]]:
        """What the layers must hold, with the neurons of sparse FFNs together: those of the dense
        model, after the steps of the recipe."""
        with naming(self.directory):
            config, sizes = self.llm_config, []
            stated = {"num_key_value_heads": config.get("num_attention_heads", 1), **config}
            for name, limit in _LIMITS.items():
                if type(value := stated.get(name)) is not int or not 1 <= value <= limit:
                    raise ValueError(
                        f"{CONFIG}: {name} must be a positive integer of at most {limit}, "
                        f"got {value!r:.120}"
                    )
                sizes.append(value)
            all_heads = tuple(range(sizes[2]))
            whole = LayerShape(ffn=sizes[1], kv_heads=all_heads, query_groups=all_heads)
            layers = {name: dict.fromkeys(range(sizes[0]), whole) for name in keys.FFN_NAMES}
            for number, step in enumerate(self.recipe):
                with naming(f"{RECIPE}: step {number} ({step.config.mode})"):
                    _follow(layers, step)
        return layers

    @property
    def left(self) -> dict[str, dict[int, LayerShape]] | None:
        """What pruning has left, with the neurons of sparse FFNs together; None without pruning."""
        keeps_all = (MoEConfig, AdaptConfig)
        is_whole = all(isinstance(step.config, keeps_all) for step in self.recipe)
        return None if is_whole else self._wanted

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            more = f" (and {len(problems) - 1} more disagreements)" if problems[1:] else ""
            raise ValueError(f"{self.directory}: {problems[0]}{more}")


def _follow(layers: dict[str, dict[int, LayerShape]], step: Step) -> None:
    """Carries out one step of a recipe."""
    config = step.config
    if isinstance(config, AdaptConfig):
        return
    for layer in map(int, config.layers):
        if layer not in layers["gen"]:
            raise ValueError(f"layers must be 0 to {len(layers['gen']) - 1}, got {layer}")
        if isinstance(config, PruneHeadsConfig):
            for component in keys.FFN_NAMES:
                held, groups = layers[component][layer], step.heads[layer][component]
                if not set(groups) <= set(held.query_groups) or bool(groups) != held.has_attention:
                    raise ValueError(
                        f"{component} heads of layer {layer} must be some of "
                        f"{list(held.query_groups)}, got {list(groups)}"
                    )
                kv_heads = step.heads[layer]["keys"] if groups else ()
                layers[component][layer] = replace(held, kv_heads=kv_heads, query_groups=groups)
            continue
        held = layers[config.component][layer]
        if isinstance(config, SkipLayersConfig):
            if Part.FFN in config.parts:
                held = replace(held, ffn=0)
            if Part.ATTENTION in config.parts:
                held = replace(held, kv_heads=(), query_groups=())
        else:
            width = step.widths.get(layer, held.width)
            if not 1 <= width <= held.width:
                raise ValueError(
                    f"width of layer {layer} must be 1 to the {held.width} neurons left, "
                    f"got {width}"
                )
            held = replace(held, ffn=width)
        layers[config.component][layer] = held


def _read_shards(index_file: Path) -> dict[str, Header]:
    weight_map = files.read_json(index_file).get("weight_map")
    with naming(index_file):
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"weight_map must map keys to files, got {weight_map!r:.80}")
        for key, name in weight_map.items():
            if not files.is_plain_name(name):
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
    name: StrPath, *, revision: str | None = None, where: str = "from_pretrained", **options: Any
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


def is_hub_id(name: StrPath) -> bool:
    """Tells whether a name is written as an id of the hub is, and can be no path: neither a file
    of that name exists, nor a directory of the owner's name, in which it would be mistyped."""
    parts = os.fspath(name).split("/")
    written = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
    return isinstance(name, str) and written and not Path(parts[0]).exists()
