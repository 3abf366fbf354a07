# SPDX-License-Identifier: Apache-2.0
"""What a model directory holds, and what disagrees in it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_unified._common import Report, format_bytes, format_layers, format_table
from sparse_unified.checkpoint.files import list_files
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.recipe import Recipe
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_header
from sparse_unified.checkpoint.shapes import (
    FFN,
    FFNs,
    LayerShape,
    LayerShapes,
    check_ffns,
    find_top_k,
    scan_ffns,
)
from sparse_unified.checkpoint.sidecar import SIDECAR, read_sidecar
from sparse_unified.convert.schema import check_model

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
_COMPONENTS = ("und", "gen", "embeddings", "vit", "latent", "vae", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentInfo:
    """One part of the model. Parameters are counted in numbers, widths in neurons.

    Attributes:
        active: parameters that one token of this component uses; None where top_k is unknown.
        layers: decoder layers; () outside the language model.
        sparse_layers: those of them with a sparse FFN.
        experts: "E x width + shared width" of each kind of sparse FFN found.
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
        files: `{name: bytes}` of every file in the directory.
        dtypes: `{dtype: parameters}` of the weight files.
        sidecar: tool, component and arguments of the conversion; None without a sidecar.
        recipe: the steps of `sparse_unified.json`, in order; empty without it.
        steps: the same, a line each.
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

    def to_text(self) -> str:
        rows: list[tuple[object, ...]] = [
            (
                "component",
                "tensors",
                "parameters",
                "active",
                "layers",
                "sparse",
                "experts",
                "pruned",
            )
        ]
        for part in self.components:
            rows.append(
                (
                    part.name,
                    part.tensors,
                    f"{part.parameters:,}",
                    _count(part.active),
                    format_layers(part.layers) if part.layers else "",
                    format_layers(part.sparse_layers) if part.layers else "",
                    "; ".join(part.experts),
                    "; ".join(part.pruned),
                )
            )
        rows.append(
            (
                "all",
                sum(part.tensors for part in self.components),
                f"{self.parameters:,}",
                _count(self.active),
                "",
                "",
                f"top_k {self.top_k}" if self.top_k is not None else "",
                "",
            )
        )
        others = {name: size for name, size in self.files.items() if name not in self.weight_files}
        facts = [
            (
                "weights",
                ", ".join(f"{n} ({format_bytes(self.files[n])})" for n in self.weight_files),
            ),
            ("dtypes", ", ".join(f"{name} {count:,}" for name, count in self.dtypes.items())),
            ("other files", f"{len(others)} ({format_bytes(sum(others.values()))})"),
        ]
        if self.sidecar is not None:
            arguments = ", ".join(f"{k} {v}" for k, v in self.sidecar["arguments"].items())
            facts.append(("converted by", f"{self.sidecar['tool']}: {arguments}"))
        facts += [(f"step {i}", step) for i, step in enumerate(self.steps)]
        lines = [self.directory, "", format_table(rows, header=True), "", format_table(facts), ""]
        lines += [f"disagrees: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "nothing disagrees"])


def info(directory: str | os.PathLike[str]) -> Info:
    """Describes a model directory, dense or sparse, without reading its weights.

    Raises:
        ValueError: there is no readable weight file. Whatever disagrees inside a readable one is
            listed in `problems` instead.
    """
    source = Checkpoint(directory)
    ffns, problems = scan_ffns(source.specs)
    config: dict[str, Any] = {}
    recipe: Recipe | None = None
    left: LayerShapes | None = None
    try:
        config = source.llm_config
        recipe = source.recipe
        left = source.left
        problems += check_ffns(ffns, config, left)
        problems += source.check_recipe() if not problems else []
    except ValueError as error:
        problems.append(str(error))
    problems = list(dict.fromkeys(check_model(source) + problems))

    layouts = [ffn.layout for layers in ffns.values() for ffn in layers.values()]
    counts = {layout.num_experts for layout in layouts if layout is not None}
    num_experts = counts.pop() if len(counts) == 1 else None
    top_k = find_top_k(num_experts, config)[0] if num_experts is not None else None

    parts: dict[str, dict[str, TensorSpec]] = {name: {} for name in _COMPONENTS}
    for key, spec in source.specs.items():
        parts[_component_of(key)][key] = spec
    parts["vae"] = _vae_specs(source)
    components = tuple(
        _describe(name, specs, ffns.get(name, {}), top_k, (left or {}).get(name))
        for name, specs in parts.items()
        if specs
    )
    dtypes: dict[str, int] = {}
    for spec in source.specs.values():
        name = str(spec.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + math.prod(spec.shape)
    active = [part.active for part in components]
    return Info(
        directory=str(directory),
        components=components,
        parameters=sum(part.parameters for part in components),
        active=None if None in active else sum(count or 0 for count in active),
        num_experts=num_experts,
        top_k=top_k,
        dtypes=dtypes,
        weight_files=tuple(source.headers),
        files={n: s.st_size for n, s in list_files(source.directory, what="info").items()},
        sidecar=_describe_sidecar(source, ffns, left or {}, problems),
        recipe=tuple(step.to_dict() for step in recipe.steps) if recipe is not None else (),
        steps=tuple(step.to_text() for step in recipe.steps) if recipe is not None else (),
        problems=tuple(problems),
    )


def _component_of(key: str) -> str:
    if not key.startswith("language_model."):
        return _GROUPS.get(key.partition(".")[0], "unknown")
    if "_moe_gen." in key:
        return "gen"
    return "und" if key.startswith("language_model.model.") and "embed" not in key else "embeddings"


def _vae_specs(source: Checkpoint) -> dict[str, TensorSpec]:
    try:
        return read_header(source.vae_file).tensors if source.vae_file.exists() else {}
    except ValueError:
        return {}  # `check_surroundings` tells why


def _describe(
    name: str,
    specs: Mapping[str, TensorSpec],
    ffns: Mapping[int, FFN],
    top_k: int | None,
    left: Mapping[int, LayerShape] | None,
) -> ComponentInfo:
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    sparse = {layer: ffn.layout for layer, ffn in ffns.items() if ffn.layout is not None}
    idle = 0
    for layer, layout in sparse.items():
        unused = layout.num_experts - (top_k or 0)
        idle += 3 * ffns[layer].hidden_size * layout.expert_width * unused
    kinds = {(own.num_experts, own.expert_width, own.shared_width) for own in sparse.values()}
    return ComponentInfo(
        name=name,
        tensors=len(specs),
        parameters=parameters,
        active=parameters - idle if top_k is not None or not sparse else None,
        layers=tuple(ffns),
        sparse_layers=tuple(sparse),
        experts=tuple(
            f"{num_experts} x {width}" + (f" + {shared} shared" if shared else "")
            for num_experts, width, shared in sorted(kinds)
        ),
        pruned=_describe_pruned(left or {}),
    )


def _describe_pruned(shapes: Mapping[int, LayerShape]) -> tuple[str, ...]:
    if not shapes:
        return ()
    heads = max(len(own.kv_heads) for own in shapes.values())
    lost = {
        "no FFN": [n for n, own in shapes.items() if not own.width],
        "no attention": [n for n, own in shapes.items() if not own.has_attention],
        "fewer heads": [n for n, own in shapes.items() if 0 < len(own.query_groups) < heads],
    }
    texts = [f"{what} in {format_layers(layers)}" for what, layers in lost.items() if layers]
    widths: dict[int, list[int]] = {}
    for layer, own in shapes.items():
        if own.width:
            widths.setdefault(own.width, []).append(layer)
    spread = sorted(widths)
    if len(spread) > 3:
        texts.append(f"{spread[0]} to {spread[-1]} neurons")
    else:
        texts += [f"{width} neurons in {format_layers(widths[width])}" for width in spread]
    return tuple(texts)


def _describe_sidecar(
    source: Checkpoint, ffns: FFNs, left: LayerShapes, problems: list[str]
) -> dict[str, Any] | None:
    path = source.directory / SIDECAR
    if not path.exists():
        return None
    try:
        sidecar = read_sidecar(path)
    except ValueError as error:
        problems.append(str(error))
        return None
    found = ffns.get(sidecar.component, {})
    narrowed = source.recipe.narrowed_experts(sidecar.component) if source.recipe else set()
    for layer, index in sidecar.neuron_index.items():
        ffn = found.get(layer)
        if layer in narrowed or (left and not left[sidecar.component][layer].width):
            continue  # narrower or skipped since
        if ffn is None or ffn.layout is None or ffn.intermediate_size != len(index):
            problems.append(
                f"{SIDECAR}: {sidecar.component} layer {layer} must be sparse with {len(index)} "
                "neurons in the keys, got something else"
            )
    return {
        "tool": sidecar.tool,
        "component": sidecar.component,
        "arguments": dict(sidecar.arguments),
    }


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
