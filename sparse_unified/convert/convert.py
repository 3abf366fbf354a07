# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint -> sparse checkpoint, neurons permuted into experts, and back, bit for bit.

Each projection of a sparse layer is read, permuted and written as the official per-expert tensors
in its place; routers come before them. `invert` takes the weights from the experts, so that tuned
experts give the tuned dense FFN, and the rest from `partition.safetensors`, which says which dense
neuron each row of a sparse FFN was. It holds

    tensors   `language_model.model.layers.N.mlp_moe_gen.neuron_index` (or `mlp` for und), int32
              [I]; entry i is the dense neuron at position i of the expert order (shared first)
    metadata  `format`, `format_version`, `tool`, `component`, `arguments` (JSON), `weight_files`
              (JSON, file name -> header text of the dense file) and `texts` (JSON, file name ->
              dense text of each JSON file rewritten)

The dense weight files with their order, names and padding follow from these, byte for byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import Progress, Report, StrPath, context, format_layers, naming
from sparse_unified.bagel.hub import CARD, write_card
from sparse_unified.checkpoint import files, keys, safetensors_io
from sparse_unified.checkpoint.model_dir import (
    CONFIG,
    INDEX_SUFFIX,
    Checkpoint,
    ffn_parts,
    ffn_shapes,
)
from sparse_unified.checkpoint.modes import RECIPE, TOOL, AdaptConfig, MoEConfig, Step, recipe_text
from sparse_unified.checkpoint.rewrite import Blocks, Edit, gather, index_texts, rewrite
from sparse_unified.checkpoint.safetensors_io import Header
from sparse_unified.checkpoint.scores import Inputs, Scores, rank_file, resolve_inputs
from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.keep import select_layers
from sparse_unified.experts.layout import Partition, order_neurons
from sparse_unified.experts.router import RouterInit, fit_router, hidden_activations, random_router

SIDECAR = "partition.safetensors"
# The sidecar of an earlier conversion, of the other component, that the new one lies on top of.
EARLIER_SIDECAR = "partition.earlier.safetensors"
FORMAT = "sparse_unified.partition"
FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """The contents of one `partition.safetensors`, as `convert` writes it."""

    component: str
    neuron_index: Mapping[int, np.ndarray]  # layer -> [I] int64
    arguments: Mapping[str, Any]  # how `convert` was called, without paths
    headers: Mapping[str, Header]  # of the dense files, by name
    texts: Mapping[str, str]  # file name -> text before conversion
    tool: str


def index_key(component: str, layer: int) -> str:
    """Returns the name of one neuron_index tensor."""
    return keys.ffn_prefix(component, layer) + "neuron_index"


def read_sidecar(path: Path) -> Sidecar:
    """Reads and checks a sidecar file."""
    if not path.exists():
        raise ValueError(f"{path}: file must be there, as convert writes it, got nothing")
    header = safetensors_io.load_tensors(path, kind=FORMAT, version=FORMAT_VERSION)
    with context(path):
        component = header.metadata.get("component", "")
        if component not in keys.FFN_NAMES:
            raise ValueError(f"component must be gen or und, got {component!r:.80}")
        indices: dict[int, np.ndarray] = {}
        for key, spec in header.tensors.items():
            found = keys.find_ffn_key(key)
            if found is None or (found[0], found[2]) != (component, "neuron_index"):
                raise ValueError(f"key must be as {index_key(component, 0)}, got {key!r:.120}")
            index = safetensors_io.read_tensor(spec).flatten()
            in_order = torch.arange(index.numel(), dtype=torch.int32)
            if index.dtype != torch.int32 or not torch.equal(index.sort().values, in_order):
                raise ValueError(
                    f"{key} must be an int32 permutation of 0 to {index.numel() - 1}, "
                    "got something else"
                )
            indices[found[1]] = index.long().numpy()
        maps = {
            field: files.read_object(header.metadata.get(field, ""), field)
            for field in ("arguments", "weight_files", "texts")
        }
        for field in ("weight_files", "texts"):
            for name, text in maps[field].items():
                if not files.is_plain_name(name) or not isinstance(text, str):
                    raise ValueError(f"{field} must map plain file names to text, got {name!r:.80}")
        for name in maps["texts"]:  # whatever else is in OUT is copied
            if name not in (CONFIG, RECIPE, CARD) and not name.endswith(INDEX_SUFFIX):
                raise ValueError(f"texts must be of files that convert rewrites, got {name!r:.80}")
    return Sidecar(
        component=component,
        neuron_index=dict(sorted(indices.items())),
        arguments=maps["arguments"],
        headers={
            name: safetensors_io.parse_header(path.with_name(f"{path.name}[{name}]"), text)
            for name, text in maps["weight_files"].items()
        },
        texts=maps["texts"],
        tool=header.metadata.get("tool", "unknown"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport(Report):
    """What a conversion wrote. Widths are in neurons, those of the widest layer.

    Attributes:
        expert_widths: of each layer; they differ where FFNs were pruned to different widths.
    """

    out: str
    component: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    num_shared_experts: int
    expert_width: int
    shared_width: int
    expert_widths: tuple[int, ...]
    scores: str
    partition: str
    router_init: str
    bytes_written: int
    seconds: float


@context("convert")
def convert(
    dense: StrPath,
    out: StrPath,
    *,
    num_experts: int,
    top_k: int,
    num_shared_experts: int = 0,
    layers: str | Sequence[int] = "middle",
    component: str = "gen",
    scores: Scores | None = None,
    seed: int | None = None,
    partition: Partition | str = Partition.SNAKE,
    router_init: RouterInit | str = RouterInit.ZERO,
    time_router: bool = False,
    partition_seed: int = 0,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Writes a sparse version of a dense checkpoint directory.

    Each dense neuron goes to exactly one expert, dtypes stay, every other file is copied, and
    `partition.safetensors` keeps what `invert` needs. The directory appears complete or not at
    all.

    Args:
        dense: the dense model directory. One whose other component is already sparse is taken
            too, with the same num_experts, top_k and num_shared_experts.
        out: the directory to make; it must not exist.
        num_experts: E, routed experts of a layer; it must divide what the shared expert leaves.
        top_k: experts a token uses, 1 to E.
        num_shared_experts: S; the shared expert takes S * (I // (E + S)) neurons.
        layers: "middle", "all", "a-b", comma-separated parts of these, or indices.
        component: "gen" or "und".
        scores: importance of each neuron, `{layer: [I]}`, a tensor [num_layers, I], or a
            safetensors file with one tensor `scores` [num_layers, I] or tensors named by layer.
            Without scores and seed, neurons are ranked by weight magnitude.
        seed: rank neurons at random instead.
        partition, router_init, time_router: as in `MoEConfig`.
        partition_seed: of what these two draw.
        inputs: what the FFNs were given on calibration tokens, `{layer: [N, D]}` of the component
            or `{component: {layer: [N, D]}}`, N >= 8, any float dtype; must be given exactly
            where the partition is "coactivation" or the routers start at "activation".
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: an argument or the checkpoint is not as described; nothing is written.
        RuntimeError: reading or writing failed; nothing is left under `out`.

    Example:
        >>> convert("BAGEL-7B-MoT", "BAGEL-16to8", num_experts=16, top_k=8)  # doctest: +SKIP
    """
    start = time.perf_counter()
    source = Checkpoint(dense)
    files.check_target(out, source.directory, scores)
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        component=component,
        layers=layers,
        partition=partition,  # type: ignore[arg-type]
        router_init=router_init,  # type: ignore[arg-type]
        time_router=time_router,
        seed=partition_seed,
    )
    layouts = _plan_layouts(source, config)
    config = replace(config, layers=tuple(layouts))
    sizes = {layer: source.ffns[component][layer].hidden_size for layer in layouts}
    given = resolve_inputs(inputs, config, sizes)
    scores_of, origin = rank_file(source, component, tuple(layouts), scores=scores, seed=seed)

    @cache
    def order(layer: int) -> np.ndarray:
        """Returns neuron_index [I] int64, position in expert order -> dense neuron."""
        hidden = None
        if config.partition is Partition.COACTIVATION:
            hidden = hidden_activations(given[layer], *_projections(source, config, layer)[:2])
        how, values, layout = config.partition, scores_of(layer), layouts[layer]
        with naming(f"{component} layer {layer}"):
            index = order_neurons(how, values, layout, seed=config.seed, layer=layer, hidden=hidden)
        return index.numpy()

    edits: dict[str, Edit] = {}
    for layer, layout in layouts.items():
        edits |= _split(source, config, layer, layout, order, given.get(layer))
    counts = {"num_experts": num_experts, "num_shared_experts": num_shared_experts, "top_k": top_k}
    fields = {"num_experts_per_tok": top_k, keys.TRANSFORMED[component]: list(layouts)}
    recipe = (*source.recipe, Step(config=config, scores=origin))
    texts = {CONFIG: files.json_text(source.llm_config | counts | fields)}
    texts |= index_texts(source, edits) | {RECIPE: recipe_text(recipe)}
    facts: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": top_k,
        "num_shared_experts": num_shared_experts,
        "layers": list(layouts),
        "component": component,
        "scores": origin,
        "partition": config.partition.value,
        "router_init": config.router_init.value,
    }

    def finish(written: Path) -> None:
        old = [name for name in (*texts, CARD) if (source.directory / name).exists()]
        maps = {
            "weight_files": {name: header.text for name, header in source.headers.items()},
            "texts": {name: files.read_text(source.directory / name) for name in old},
        }
        arguments = facts | {"partition_seed": config.seed}
        arguments |= {"time_router": True} if time_router else {}
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "tool": TOOL}
        metadata |= {"component": component, "arguments": json.dumps(arguments)}
        metadata |= {name: json.dumps(own, ensure_ascii=False) for name, own in maps.items()}
        indices = {index_key(component, n): torch.from_numpy(order(n)).int() for n in layouts}
        safetensors_io.save_tensors(written / SIDECAR, indices, metadata)
        # The result must read well before it gets its name.
        if component not in Checkpoint(written).experts:
            raise RuntimeError(f"{written} must read as sparse, got a dense checkpoint")
        if (written / CARD).exists():  # of the source
            write_card(written, name=Path(out).name, source_name=source.directory.name)

    rename = {SIDECAR: EARLIER_SIDECAR}
    nbytes = rewrite(source, out, edits, texts, rename=rename, finish=finish, progress=progress)
    return ConvertReport(
        out=str(out),
        **facts | {"layers": tuple(layouts)},
        expert_width=max(layout.expert_width for layout in layouts.values()),
        shared_width=max(layout.shared_width for layout in layouts.values()),
        expert_widths=tuple(layout.expert_width for layout in layouts.values()),
        bytes_written=nbytes,
        seconds=time.perf_counter() - start,
    )


def _plan_layouts(source: Checkpoint, config: MoEConfig) -> dict[int, ExpertLayout]:
    """Returns the neuron ranges of each layer that is to be split, ascending."""
    component, ffns = config.component, source.ffns.get(config.component, {})
    experts = source.experts  # refuses whatever disagrees
    if not ffns:
        raise ValueError(
            f"{source.directory}: keys must hold {component} FFNs "
            f"({keys.ffn_key(component, 0, 'gate_proj')} and so on), got none"
        )
    if component in experts:
        raise ValueError(
            f"{source.directory}: {component} FFNs must all be dense, got sparse layers "
            f"{format_layers(list(experts[component]))}; invert gives the dense files back"
        )
    layouts = {}
    for layer in select_layers(
        config.layers, source.num_layers, ffns.__contains__, f"{component} FFN"
    ):
        with naming(f"{component} layer {layer}"):
            layouts[layer] = ExpertLayout(
                intermediate_size=ffns[layer].width,
                num_experts=config.num_experts,
                num_shared_experts=config.num_shared_experts,
                time_router=config.time_router,
            )
    # The config has one set of counts for both components.
    wanted = (config.num_experts, config.num_shared_experts, config.top_k)
    for other in (layout for layers in experts.values() for layout in layers.values()):
        found = (other.num_experts, other.num_shared_experts, source.top_k)
        if found != wanted:
            raise ValueError(
                f"num_experts, num_shared_experts and top_k must be {found} as in the component "
                f"that is sparse already, got {wanted}"
            )
    return layouts


def _split(
    source: Checkpoint,
    config: MoEConfig,
    layer: int,
    layout: ExpertLayout,
    order: Callable[[int], np.ndarray],
    inputs: Tensor | None,
) -> dict[str, Edit]:
    """Returns what takes the place of the three projections of one dense FFN."""
    component = config.component
    ffn, prefix = source.ffns[component][layer], keys.ffn_prefix(component, layer)
    shapes = ffn_shapes(layout, ffn.hidden_size, component)

    def routers() -> Iterator[np.ndarray]:
        weight = torch.zeros(layout.num_experts, ffn.hidden_size)
        if config.router_init is RouterInit.RANDOM:
            weight = random_router(*weight.shape, seed=config.seed, layer=layer)
        elif inputs is not None and config.router_init is RouterInit.ACTIVATION:
            index = torch.from_numpy(order(layer))
            gate_proj, up_proj, down_proj = _projections(source, config, layer)
            weights = gate_proj[index], up_proj[index], down_proj[:, index]
            with naming(f"{component} layer {layer}"):
                weight = fit_router(inputs, *weights, layout, config.top_k).weight
        weight = weight.to(ffn.dtype).contiguous()
        for name in keys.router_names(component, layout.time_router):
            # Those of the shared expert and of time are zero; those of und blocks start the same.
            is_zero = name in ("gate_shared", "gate_time")
            own = weight.new_zeros(shapes[f"{name}.weight"]) if is_zero else weight
            yield safetensors_io.as_bytes(own)

    def blocks(name: str) -> Blocks:
        if name == "gate_proj":
            yield from routers()
        parts = [order(layer)[start:stop] for start, stop in ffn_parts(layout).values()]
        yield from gather([source.spec(f"{prefix}{name}.weight")], int(name == "down_proj"), parts)

    edits = {}
    for name in keys.PROJECTIONS:
        entries = tuple(
            (prefix + rest, ffn.dtype, shape)
            for rest, shape in shapes.items()
            if rest.endswith(f"{name}.weight")
            or (name == "gate_proj" and keys.ROUTER_KEY.fullmatch(rest))
        )
        edits[f"{prefix}{name}.weight"] = Edit(entries=entries, blocks=partial(blocks, name))
    return edits


def _projections(source: Checkpoint, config: MoEConfig, layer: int) -> list[Tensor]:
    return [source.read(keys.ffn_key(config.component, layer, name)) for name in keys.PROJECTIONS]


# Back to the dense checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class InvertReport(Report):
    """What an inversion wrote."""

    out: str
    component: str
    layers: tuple[int, ...]
    converted_by: str
    bytes_written: int
    seconds: float


@context("invert")
def invert(sparse: StrPath, out: StrPath, *, progress: Progress | None = None) -> InvertReport:
    """Writes the dense directory that `convert` made `sparse` from.

    Files come back bit for bit where their tensors were not trained since; routers are dropped.
    A checkpoint converted twice (gen, then und) goes back one conversion at a time.

    Args:
        out: the directory to make; it must not exist.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: the sidecar is missing, or tensors do not fit what it describes; nothing is
            written.
        RuntimeError: reading or writing failed; nothing is left under `out`.
    """
    start = time.perf_counter()
    source = Checkpoint(sparse)
    files.check_target(out, source.directory)
    sidecar = read_sidecar(source.directory / SIDECAR)
    # Training leaves the experts where they are.
    changes = [step.config for step in source.recipe if not isinstance(step.config, AdaptConfig)]
    last = changes[-1] if changes else None
    is_ours = isinstance(last, MoEConfig) and last.component == sidecar.component
    if last is not None and not is_ours:
        raise ValueError(
            f"{source.directory}: last step in {RECIPE} must be the conversion to experts of "
            f"{sidecar.component}, which {SIDECAR} undoes, got a {last.mode} step of "
            f"{last.component}: what was pruned is gone"
        )
    component = sidecar.component
    edits: dict[str, Edit] = {}
    experts = source.experts.get(component, {})
    widths = {layer: layout.intermediate_size for layer, layout in experts.items()}
    if widths != {layer: len(index) for layer, index in sidecar.neuron_index.items()}:
        raise ValueError(
            f"{source.directory}: sparse {component} layers must be "
            f"{format_layers(tuple(sidecar.neuron_index))} as {SIDECAR} says, and as wide, got "
            f"{format_layers(tuple(experts))}"
        )
    for layer, index in sidecar.neuron_index.items():
        ffn, prefix = source.ffns[component][layer], keys.ffn_prefix(component, layer)
        position = np.empty_like(index)
        position[index] = np.arange(len(index))  # dense neuron -> place in expert order
        for rest, shape in ffn_shapes(len(index), ffn.hidden_size, component).items():
            parts = [source.spec(f"{prefix}{part}{rest}") for part in ffn_parts(ffn.ffn)]
            dim = int(rest.startswith("down_proj"))
            edits[prefix + rest] = Edit(
                entries=((prefix + rest, ffn.dtype, shape),),
                blocks=partial(gather, parts, dim, [position]),
            )
    # The dense tensors must be those that follow from the sparse file.
    split = tuple(keys.ffn_prefix(component, layer) for layer in experts)
    found = {
        key: (s.dtype, s.shape) for key, s in source.specs.items() if not key.startswith(split)
    }
    found |= {key: edit.entries[0][1:] for key, edit in edits.items()}
    tensors = [item for header in sidecar.headers.values() for item in header.tensors.items()]
    wanted = {key: (spec.dtype, spec.shape) for key, spec in tensors}
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            got, rule = (
                f"{own[key][0]} {list(own[key][1])}" if key in own else "nothing"
                for own in (found, wanted)
            )
            raise ValueError(
                f"{source.directory}: {key} must be {rule} as {SIDECAR} says, got {got}"
            )
    bytes_written = rewrite(
        source,
        out,
        edits,
        sidecar.texts,
        headers=sidecar.headers,
        rename={EARLIER_SIDECAR: SIDECAR},
        skip=(RECIPE, SIDECAR),
        progress=progress,
    )
    return InvertReport(
        out=str(out),
        component=component,
        layers=tuple(sidecar.neuron_index),
        converted_by=sidecar.tool,
        bytes_written=bytes_written,
        seconds=time.perf_counter() - start,
    )
