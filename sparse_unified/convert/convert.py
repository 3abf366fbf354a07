# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint -> sparse checkpoint: neurons are permuted into experts, bit for bit.

Each projection of a sparse layer is read, permuted and written as the official per-expert tensors
in its place; routers come before them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import (
    Progress,
    Report,
    context,
    format_bytes,
    format_layers,
    format_table,
    list_some,
    naming,
)
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import read_text, refuse_overlap
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, Step
from sparse_unified.checkpoint.rewrite import Blocks, Edit, gather, index_texts, rewrite
from sparse_unified.checkpoint.safetensors_io import as_bytes
from sparse_unified.checkpoint.scores import Inputs, Scores, resolve_inputs
from sparse_unified.checkpoint.shapes import CONFIG, ffn_parts
from sparse_unified.checkpoint.sidecar import (
    EARLIER_SIDECAR,
    SIDECAR,
    Sidecar,
    tool_version,
    write_sidecar,
)
from sparse_unified.convert.ranking import ranking
from sparse_unified.convert.schema import require_model
from sparse_unified.experts import (
    ExpertLayout,
    Partition,
    RouterInit,
    fit_router,
    hidden_activations,
    order_neurons,
    random_router,
    select_layers,
)

WHAT = "convert"


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

    def to_text(self) -> str:
        least, most = min(self.expert_widths), max(self.expert_widths)
        width = f"{most}" if least == most else f"{least} to {most}"
        rows = [
            ("written", self.out),
            ("component", self.component),
            ("sparse layers", format_layers(self.layers)),
            ("experts", f"{self.num_experts}, {self.top_k} active, {width} neurons each"),
            ("shared expert", f"{self.shared_width} neurons" if self.shared_width else "none"),
            ("neurons ranked by", self.scores),
            ("partition", self.partition),
            ("routers start at", self.router_init),
            ("size", format_bytes(self.bytes_written)),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return format_table(rows)


@context(WHAT)
def convert(
    dense: str | os.PathLike[str],
    out: str | os.PathLike[str],
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
        partition, router_init: as in `MoEConfig`.
        partition_seed: of what these two draw.
        inputs: what the FFNs were given on calibration tokens, `{layer: [N, D]}` of the component
            or `{component: {layer: [N, D]}}`, N >= 8, any float dtype; must be given exactly
            where the partition is "coactivation" or the routers start at "activation".
        progress: called with (bytes written, bytes in all).

    Returns:
        a report of what was written.

    Raises:
        ValueError: an argument or the checkpoint is not as described; nothing is written.
        RuntimeError: reading or writing failed; nothing is left under `out`.
    """
    start = time.perf_counter()
    source = Checkpoint(dense)
    refuse_overlap(out, source.directory, scores, what=WHAT)
    layouts = _plan_layouts(source, num_experts, top_k, num_shared_experts, layers, component)
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        component=component,
        layers=tuple(layouts),
        partition=partition,  # type: ignore[arg-type]
        router_init=router_init,  # type: ignore[arg-type]
        seed=partition_seed,
    )
    sizes = {layer: source.ffns[component][layer].hidden_size for layer in layouts}
    given = resolve_inputs(inputs, config, sizes)
    scores_of, origin = ranking(source, component, tuple(layouts), scores=scores, seed=seed)

    @cache
    def index_of(layer: int) -> np.ndarray:
        return _neuron_index(
            source, config, layer, layouts[layer], scores_of(layer), given.get(layer)
        )

    edits: dict[str, Edit] = {}
    for layer, layout in layouts.items():
        edits |= _split(source, config, layer, layout, index_of, given.get(layer))
    fields = {
        "num_experts": num_experts,
        "num_shared_experts": num_shared_experts,
        "top_k": top_k,
        "num_experts_per_tok": top_k,
        keys.TRANSFORMED[component]: list(layouts),
    }
    step = Step(config=config, scores=origin, tool=tool_version())
    new_config = json.dumps(source.llm_config | fields, indent=2, ensure_ascii=False) + "\n"
    texts = {CONFIG: new_config} | index_texts(source, edits)
    texts[RECIPE] = (source.recipe or Recipe()).then(step).to_json()
    arguments = {
        "num_experts": num_experts,
        "top_k": top_k,
        "num_shared_experts": num_shared_experts,
        "layers": list(layouts),
        "component": component,
        "scores": origin,
        "partition": config.partition.value,
        "router_init": config.router_init.value,
        "partition_seed": config.seed,
    }

    def finish(partial: Path) -> None:
        sidecar = Sidecar(
            component=component,
            neuron_index={layer: index_of(layer) for layer in layouts},
            arguments=arguments,
            weight_files={name: header.text for name, header in source.headers.items()},
            texts={
                name: read_text(source.directory / name)
                for name in texts
                if name != RECIPE or source.recipe is not None
            },
            tool=tool_version(),
        )
        write_sidecar(partial / SIDECAR, sidecar)
        # A last look through the reader's eyes, before the directory gets its name.
        if component not in Checkpoint(partial).experts:
            raise RuntimeError(f"{partial} must read as sparse, got a dense checkpoint")

    bytes_written = rewrite(
        source,
        out,
        edits,
        texts,
        what=WHAT,
        rename={SIDECAR: EARLIER_SIDECAR},
        finish=finish,
        progress=progress,
    )
    return ConvertReport(
        out=str(out),
        component=component,
        layers=tuple(layouts),
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        expert_width=max(layout.expert_width for layout in layouts.values()),
        shared_width=max(layout.shared_width for layout in layouts.values()),
        expert_widths=tuple(layout.expert_width for layout in layouts.values()),
        scores=origin,
        partition=config.partition.value,
        router_init=config.router_init.value,
        bytes_written=bytes_written,
        seconds=time.perf_counter() - start,
    )


def _plan_layouts(
    source: Checkpoint,
    num_experts: int,
    top_k: int,
    num_shared_experts: int,
    layers: str | Sequence[int],
    component: str,
) -> dict[int, ExpertLayout]:
    """Returns the neuron ranges of each layer that is to be split, ascending."""
    if component not in keys.FFN_NAMES:
        raise ValueError(f"component must be gen or und, got {component!r:.120}")
    require_model(source)
    ffns = source.ffns.get(component, {})
    if not ffns:
        raise ValueError(
            f"{source.directory}: keys must hold {component} FFNs "
            f"({keys.dense_key(component, 0, 'gate_proj')} and so on), got none"
        )
    experts = source.experts
    if component in experts:
        raise ValueError(
            f"{source.directory}: {component} FFNs must all be dense, got sparse layers "
            f"{format_layers(list(experts[component]))}; invert gives the dense files back"
        )
    selected = select_layers(layers, source.num_layers)
    if layers in ("all", "middle"):
        selected = tuple(layer for layer in selected if layer in ffns) or selected
    skipped = [layer for layer in selected if layer not in ffns]
    if skipped:
        raise ValueError(
            f"layers must have a {component} FFN, got {list_some(skipped)}, which skip it"
        )
    layouts = {}
    for layer in selected:
        try:
            layouts[layer] = ExpertLayout(
                intermediate_size=ffns[layer].intermediate_size,
                num_experts=num_experts,
                num_shared_experts=num_shared_experts,
            )
        except ValueError as error:
            at = f"{component} layer {layer}: " if source.left is not None else ""
            raise ValueError(f"{at}{error}") from error
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be 1 to num_experts = {num_experts}, got {top_k!r:.120}")
    # The config has one set of counts for both components.
    wanted = (num_experts, num_shared_experts, top_k)
    for other in (layout for layers in experts.values() for layout in layers.values()):
        found = (other.num_experts, other.num_shared_experts, source.top_k)
        if found != wanted:
            raise ValueError(
                f"num_experts, num_shared_experts and top_k must be {found[0]}, "
                f"{found[1]} and {found[2]} as in the component that is sparse already, "
                f"got {num_experts}, {num_shared_experts} and {top_k}"
            )
    return layouts


def _split(
    source: Checkpoint,
    config: MoEConfig,
    layer: int,
    layout: ExpertLayout,
    index_of: Callable[[int], np.ndarray],
    inputs: Tensor | None,
) -> dict[str, Edit]:
    """Returns what takes the place of the three projections of one dense FFN."""
    component = config.component
    prefix, parts = keys.ffn_prefix(component, layer), ffn_parts(layout)
    routers = {
        keys.router_key(component, layer, name): 1 if name == "gate_shared" else layout.num_experts
        for name in keys.router_names(component)
    }
    edits = {}
    for name in keys.PROJECTIONS:
        spec = source.spec(keys.dense_key(component, layer, name))
        dim = 1 if name == "down_proj" else 0
        entries = []
        for part, (start, stop) in parts.items():
            shape = (spec.shape[0], stop - start) if dim else (stop - start, spec.shape[1])
            entries.append((f"{prefix}{part}{name}.weight", spec.dtype, shape))
        if name == "gate_proj":
            hidden = spec.shape[1]
            entries = [
                *((key, spec.dtype, (rows, hidden)) for key, rows in routers.items()),
                *entries,
            ]

        def blocks(name: str = name, dim: int = dim) -> Blocks:
            index = index_of(layer)
            if name == "gate_proj":
                for router in _routers(source, config, layer, layout, index, inputs):
                    yield as_bytes(router.contiguous())
            spec = source.spec(keys.dense_key(component, layer, name))
            yield from gather([spec], dim, [index[a:b] for a, b in parts.values()])

        edits[keys.dense_key(component, layer, name)] = Edit(entries=tuple(entries), blocks=blocks)
    return edits


def _neuron_index(
    source: Checkpoint,
    config: MoEConfig,
    layer: int,
    layout: ExpertLayout,
    scores: Tensor,
    inputs: Tensor | None,
) -> np.ndarray:
    """Returns neuron_index [I] int64, position in expert order -> dense neuron."""
    hidden = None
    if config.partition is Partition.COACTIVATION and inputs is not None:
        gate_proj, up_proj = (
            _read(source, config.component, layer, name) for name in keys.PROJECTIONS[:2]
        )
        hidden = hidden_activations(inputs, gate_proj, up_proj)
    with naming(f"{config.component} layer {layer}"):
        index = order_neurons(
            config.partition, scores, layout, seed=config.seed, layer=layer, hidden=hidden
        )
    return index.numpy()


def _routers(
    source: Checkpoint,
    config: MoEConfig,
    layer: int,
    layout: ExpertLayout,
    index: np.ndarray,
    inputs: Tensor | None,
) -> list[Tensor]:
    """Returns the weights of each router in the order of `keys.router_names`.

    Both routers of und blocks start the same; the shared expert's is zero.
    """
    ffn = source.ffns[config.component][layer]
    weight = torch.zeros(config.num_experts, ffn.hidden_size)
    if config.router_init is RouterInit.RANDOM:
        weight = random_router(config.num_experts, ffn.hidden_size, seed=config.seed, layer=layer)
    elif config.router_init is RouterInit.ACTIVATION and inputs is not None:
        gate_proj, up_proj, down_proj = (
            _read(source, config.component, layer, name) for name in keys.PROJECTIONS
        )
        order = torch.from_numpy(index)
        with naming(f"{config.component} layer {layer}"):
            weight = fit_router(
                inputs,
                gate_proj[order],
                up_proj[order],
                down_proj[:, order],
                layout,
                config.top_k,
            ).weight
    return [
        torch.zeros(1, ffn.hidden_size, dtype=ffn.dtype)
        if name == "gate_shared"
        else weight.to(ffn.dtype)
        for name in keys.router_names(config.component)
    ]


def _read(source: Checkpoint, component: str, layer: int, name: str) -> Tensor:
    return source.read(keys.dense_key(component, layer, name))
