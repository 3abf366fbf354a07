# SPDX-License-Identifier: Apache-2.0
"""What a model directory holds, what disagrees in it, and how much memory it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

from sparse_unified._common import (
    Report,
    StrPath,
    check_int,
    context,
    format_bytes,
    format_layers,
    format_table,
    list_some,
)
from sparse_unified.bagel import AutoEncoder, Bagel
from sparse_unified.bagel.config import LLMConfig, SpecialTokens, read_config, vae_config
from sparse_unified.bagel.images import TILE
from sparse_unified.bagel.loading import Task, tensor_problems, unneeded
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import list_files
from sparse_unified.checkpoint.model_dir import (
    FFN,
    VAE_FILE,
    Checkpoint,
    LayerShape,
    find_top_k,
    scan_ffns,
)
from sparse_unified.checkpoint.modes import Step
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_header
from sparse_unified.convert.convert import SIDECAR, read_sidecar

# Group of keys outside the language model -> the component it counts to.
_GROUPS: Mapping[str, str] = {
    "vit_model": "vit",
    "connector": "vit",
    "vit_pos_embed": "vit",
    "time_embedder": "latent",
    "vae2llm": "latent",
    "llm2vae": "latent",
    "latent_pos_embed": "latent",
}
_T = TypeVar("_T")
_COMPONENTS = ("und", "gen", "embeddings", "vit", "latent", "vae", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentInfo:
    """One part of the model. Parameters are counted in numbers, widths in neurons.

    Attributes:
        active: parameters that one token of this component uses; None where top_k is unknown.
        layers: decoder layers; () outside the language model.
        sparse_layers: those of them with a sparse FFN.
        experts: "E x width + shared width" of each kind of sparse FFN found, with "by time" where
            its experts are chosen by that too.
        pruned: what the layers have lost, in words; empty where nothing was pruned.
    """

    name: str
    tensors: int
    parameters: int
    active: int | None
    layers: tuple[int, ...]
    sparse_layers: tuple[int, ...]
    experts: tuple[str, ...]
    pruned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Info(Report):
    """A model directory at a glance.

    Attributes:
        dtypes: `{dtype: parameters}` of the weight files.
        files: `{name: bytes}` of every file in the directory.
        sidecar: tool, component and arguments of the conversion; None without a sidecar.
        recipe, steps: the steps of `sparse_unified.json`, and a line for each.
        problems: what disagrees; empty when nothing does.
    """

    directory: str
    components: tuple[ComponentInfo, ...]
    parameters: int
    active: int | None
    num_experts: int | None
    top_k: int | None
    dtypes: dict[str, int]
    weight_files: tuple[str, ...]
    files: dict[str, int]
    sidecar: dict[str, Any] | None
    recipe: tuple[dict[str, Any], ...]
    steps: tuple[str, ...]
    problems: tuple[str, ...]

    def title(self) -> str:
        return f"{self.directory}\n"

    def headings(self) -> Sequence[str]:
        names = ("component", "tensors", "parameters", "active")
        return (*names, "layers", "sparse", "experts", "pruned")

    def table(self) -> Sequence[Sequence[object]]:
        rows = [
            (
                part.name,
                part.tensors,
                f"{part.parameters:,}",
                "?" if part.active is None else f"{part.active:,}",
                format_layers(part.layers) if part.layers else "",
                format_layers(part.sparse_layers) if part.layers else "",
                "; ".join(part.experts),
                "; ".join(part.pruned),
            )
            for part in self.components
        ]
        tensors = sum(part.tensors for part in self.components)
        active = "?" if self.active is None else f"{self.active:,}"
        top_k = "" if self.top_k is None else f"top_k {self.top_k}"
        return [*rows, ("all", tensors, f"{self.parameters:,}", active, "", "", top_k, "")]

    def notes(self) -> Sequence[str]:
        weights = [f"{name} ({format_bytes(self.files[name])})" for name in self.weight_files]
        others = [size for name, size in self.files.items() if name not in self.weight_files]
        facts = [
            ("weights", ", ".join(weights)),
            ("dtypes", ", ".join(f"{name} {count:,}" for name, count in self.dtypes.items())),
            ("other files", f"{len(others)} ({format_bytes(sum(others))})"),
        ]
        if self.sidecar is not None:
            arguments = ", ".join(f"{k} {v}" for k, v in self.sidecar["arguments"].items())
            facts.append(("converted by", f"{self.sidecar['tool']}: {arguments}"))
        facts += [(f"step {i}", step) for i, step in enumerate(self.steps)]
        problems = [f"disagrees: {problem}" for problem in self.problems] or ["nothing disagrees"]
        return [*format_table(facts).splitlines(), "", *problems]


def info(directory: StrPath) -> Info:
    """Describes a model directory, dense or sparse, without reading its weights.

    Raises:
        ValueError: there is no readable weight file. Whatever disagrees inside a readable one is
            listed in `problems` instead.

    Example:
        >>> print(info("BAGEL-MoE"))  # doctest: +SKIP
    """
    source = Checkpoint(directory)
    ffns, problems = scan_ffns(source.specs)
    problems = list(problems)

    def tried(read: Callable[[], _T], otherwise: _T) -> _T:
        """Reads one thing; what of the directory cannot be read is a problem."""
        try:
            return read()
        except ValueError as error:
            problems.append(str(error))
            return otherwise

    problems += tried(source.problems, [])
    problems += tried(lambda: _model_problems(source), [])
    recipe: tuple[Step, ...] = tried(lambda: source.recipe, ())
    left = tried(lambda: source.left, None) or {}
    path = source.directory / SIDECAR
    sidecar = tried(lambda: read_sidecar(path), None) if path.exists() else None
    counts = {ffn.layout.num_experts for own in ffns.values() for ffn in own.values() if ffn.layout}
    num_experts = counts.pop() if len(counts) == 1 else None
    top_k = None
    if num_experts is not None:
        top_k = tried(lambda: find_top_k(source.llm_config, num_experts), None)

    specs: dict[str, list[TensorSpec]] = {name: [] for name in _COMPONENTS}
    dtypes: dict[str, int] = {}
    for key, spec in source.specs.items():
        specs[_component_of(key)].append(spec)
        dtype = str(spec.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(spec.shape)
    if source.vae_file.exists():
        specs["vae"] = tried(lambda: [*read_header(source.vae_file).tensors.values()], [])
    components = tuple(
        _describe(name, own, ffns.get(name, {}), top_k, left.get(name, {}))
        for name, own in specs.items()
        if own
    )
    active = [part.active for part in components]
    facts = ("tool", "component", "arguments")
    return Info(
        directory=str(directory),
        components=components,
        parameters=sum(part.parameters for part in components),
        active=None if None in active else sum(count or 0 for count in active),
        num_experts=num_experts,
        top_k=top_k,
        dtypes=dtypes,
        weight_files=tuple(source.headers),
        files={name: status.st_size for name, status in list_files(source.directory).items()},
        sidecar={name: getattr(sidecar, name) for name in facts} if sidecar else None,
        recipe=tuple(step.to_dict() for step in recipe),
        steps=tuple(step.to_text() for step in recipe),
        problems=tuple(dict.fromkeys(problems)),
    )


def _model_problems(source: Checkpoint) -> list[str]:
    """Returns what the loader would refuse; the model on the meta device is the schema.

    A file that holds FFNs alone, or has no autoencoder beside it, is a part of a model.
    """
    if not source.vae_file.exists() or all(map(keys.find_ffn_key, source.specs)):
        return []
    specs = read_header(source.vae_file).tensors
    vae = vae_config(specs, where=VAE_FILE)
    problems = {VAE_FILE: tensor_problems(AutoEncoder(vae, device="meta"), specs)}
    if not source.problems():
        ids = SpecialTokens(bos=0, eos=0, start_of_image=0, end_of_image=0)
        model = Bagel(read_config(source, vae, special_tokens=ids), device="meta")
        problems["keys"] = tensor_problems(model, source.specs)
    return [
        f"{where}: tensors must be those of the model, got {list_some(found)}"
        for where, found in problems.items()
        if found
    ]


def _component_of(key: str) -> str:
    if not key.startswith("language_model."):
        return _GROUPS.get(key.partition(".")[0], "unknown")
    if "_moe_gen." in key:
        return "gen"
    return "und" if key.startswith("language_model.model.") and "embed" not in key else "embeddings"


def _describe(
    name: str,
    specs: Sequence[TensorSpec],
    ffns: Mapping[int, FFN],
    top_k: int | None,
    left: Mapping[int, LayerShape],
) -> ComponentInfo:
    parameters = sum(math.prod(spec.shape) for spec in specs)
    sparse = {layer: ffn.layout for layer, ffn in ffns.items() if ffn.layout is not None}
    idle = sum(
        3 * ffns[layer].hidden_size * layout.idle_neurons(top_k or 0)
        for layer, layout in sparse.items()
    )
    kinds = {
        (own.num_experts, own.expert_width, own.shared_width, own.time_router)
        for own in sparse.values()
    }
    return ComponentInfo(
        name=name,
        tensors=len(specs),
        parameters=parameters,
        active=parameters - idle if top_k is not None or not sparse else None,
        layers=tuple(ffns),
        sparse_layers=tuple(sparse),
        experts=tuple(
            f"{num_experts} x {width}"
            + (f" + {shared} shared" if shared else "")
            + (" by time" if by_time else "")
            for num_experts, width, shared, by_time in sorted(kinds)
        ),
        pruned=_describe_pruned(left),
    )


def _describe_pruned(shapes: Mapping[int, LayerShape]) -> tuple[str, ...]:
    """Returns what layers lack and how wide they are, each with its layers."""
    heads = max((len(own.kv_heads) for own in shapes.values()), default=0)
    widths = sorted({own.width for own in shapes.values() if own.width})
    layers_of = {
        "no FFN": [n for n, own in shapes.items() if not own.width],
        "no attention": [n for n, own in shapes.items() if not own.has_attention],
        "fewer heads": [n for n, own in shapes.items() if 0 < len(own.query_groups) < heads],
    }
    if len(widths) <= 3:
        for width in widths:
            layers_of[f"{width} neurons"] = [n for n, own in shapes.items() if own.width == width]
    texts = [f"{what} in {format_layers(layers)}" for what, layers in layers_of.items() if layers]
    many = [f"{widths[0]} to {widths[-1]} neurons"] if len(widths) > 3 else []
    return (*texts, *many)


# Memory: how much a model directory takes on a device, in each way of loading it, computed. Weights
# are those of the headers, byte for byte. What a step and the decoding of an image need besides is
# estimated from the shapes of their largest tensors; no part of the table was measured.


BUDGETS = (10, 12, 16, 24, 32, 48, 80)  # GB of 10^9 bytes, of cards one can buy
_PACKED_SCALE_BYTES = 5  # of a row stored as int8: a scale and a zero point
# Rows of the table: `task`, `offload` and `storage` of `from_pretrained`, and whether images are
# decoded in tiles. The last two are for cards of 12 and 10 GB.
_WAYS: tuple[tuple[str, str, dict[str, str], bool], ...] = (
    *product(("all", "image"), ("none", "und"), ({}, {"und": "int8", "gen": "int8"}), (False,)),
    ("image", "und", {"und": "int8", "gen": "nvfp4"}, False),
    ("image", "und", {"und": "int8", "gen": "nvfp4"}, True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One way to load a model, in bytes: of weights, beside them at the peak, and in host memory.

    Attributes:
        options: of `from_pretrained`; `tiled` is of `generate`.
        fits: budgets, in GB, that hold weights and working memory.
    """

    options: str
    weights: int
    working: int
    host: int
    fits: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport(Report):
    """What fits where, for images of one size."""

    directory: str
    size: tuple[int, int]
    images: int
    budgets: tuple[int, ...]
    rows: tuple[MemoryRow, ...]

    def title(self) -> str:
        what = f"{self.images} image{'s' * (self.images > 1)} of {self.size[0]} x {self.size[1]}"
        return f"memory for {what} with text guidance, computed, not measured"

    def headings(self) -> Sequence[str]:
        names = ("from_pretrained(...)", "weights", "working", "peak", "host")
        return (*names, *(f"{budget} GB" for budget in self.budgets))

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (
                row.options,
                *map(format_bytes, (row.weights, row.working, row.weights + row.working, row.host)),
                *("fits" if budget in row.fits else "-" for budget in self.budgets),
            )
            for row in self.rows
        ]


@context("memory")
def memory(
    directory: StrPath, *, size: tuple[int, int] = (1024, 1024), images: int = 1
) -> MemoryReport:
    """Computes what a model directory takes on a device in each way of loading it.

    Args:
        size: height and width of the images, in pixels.
        images: drawn together.

    Raises:
        ValueError: the directory is no readable model, or an argument is below 1.
    """
    check_int("size", min(size), 1)
    check_int("images", images, 1)
    source = Checkpoint(directory)
    vae = read_header(source.vae_file).tensors if source.vae_file.exists() else {}
    rows = []
    for task, offload, storage, tiled in _WAYS:
        weights, host = _weight_bytes(source, task, offload, storage)
        weights += sum(spec.nbytes for spec in vae.values())
        is_whole_ffn = bool(storage) or offload == "und"
        working = _working_bytes(source, vae, is_whole_ffn, size, images, tiled)
        stored = storage["und"] if len({*storage.values()}) == 1 else storage
        given: list[tuple[str, Any, Any]] = [
            ("task", task, "all"),
            ("offload", offload, "none"),
            ("storage", stored, {}),
            ("tiled", tiled, False),
        ]
        options = [f"{name}={value!r}" for name, value, default in given if value != default]
        fits = tuple(budget for budget in BUDGETS if weights + working <= budget * 10**9)
        text = ", ".join(options) or "as it is"
        row = MemoryRow(options=text, weights=weights, working=working, host=host, fits=fits)
        rows.append(row)
    return MemoryReport(
        directory=str(directory), size=size, images=images, budgets=BUDGETS, rows=tuple(rows)
    )


def _weight_bytes(
    source: Checkpoint, task: str, offload: str, storage: Mapping[str, str]
) -> tuple[int, int]:
    """Returns the bytes of the weights on the device and in host memory."""
    lacks = unneeded(LLMConfig.from_json(source.llm_config), Task(task))
    on_device = on_host = 0
    for key, spec in source.specs.items():
        ffn, nbytes = keys.find_ffn_key(key), spec.nbytes
        if key.startswith(lacks):
            continue
        if ffn is not None and ffn[0] in storage and not keys.ROUTER_KEY.fullmatch(ffn[2]):
            count = math.prod(spec.shape)
            is_int8 = storage[ffn[0]] == "int8"
            # nvfp4: half a byte, and a scale of a byte for 16 of them.
            nbytes = count + spec.shape[0] * _PACKED_SCALE_BYTES if is_int8 else count * 9 // 16
        if ffn is not None and ffn[0] == offload:
            on_host += nbytes
        else:
            on_device += nbytes
    return on_device, on_host


def _working_bytes(
    source: Checkpoint,
    vae: Mapping[str, TensorSpec],
    is_whole_ffn: bool,
    size: tuple[int, int],
    images: int,
    tiled: bool,
) -> int:
    """Estimates the bytes beside the weights, the larger of a denoising step and of decoding.

    With T tokens (two branches of all images), hidden D, FFN width I, top_k K of E experts and b
    bytes a number, a step holds 12 T D b for streams, norms and attention, and in an FFN the larger
    of 3 T I b (dense) and T K (D + I / E) b (sparse). An FFN that is unpacked or visits the device
    (`is_whole_ffn`) adds its 3 I D b. Decoding holds three maps of the widest layer at full
    resolution, in tiles those of one, and the image three times in fp32.
    """
    hidden = int(source.llm_config["hidden_size"])
    width = int(source.llm_config["intermediate_size"])
    number = source.spec("language_model.model.embed_tokens.weight").dtype.itemsize
    tokens = 2 * images * ((size[0] // 16) * (size[1] // 16) + 2)
    ffn = 3 * tokens * width
    for layout in (own for layers in source.experts.values() for own in layers.values()):
        rows = tokens * (source.top_k or 0)
        ffn = max(ffn, rows * hidden + rows * width // layout.num_experts)
    step = 12 * tokens * hidden + ffn + 3 * width * hidden * is_whole_ffn
    pixels = size[0] * size[1]
    at_once = min(size[0], TILE) * min(size[1], TILE) if tiled else pixels
    whole = 3 * 3 * 4 * pixels * tiled
    maps = [
        3 * max(spec.shape[:2]) * at_once * spec.dtype.itemsize + whole
        for key, spec in vae.items()
        if key.startswith("decoder.up.0.") and len(spec.shape) == 4
    ]
    return max(step * number, *maps, 0)
