# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint -> sparse checkpoint: neurons are permuted into experts, bit for bit.

Each projection of a sparse layer is read, permuted and written as the official per-expert tensors
in its place; routers come before them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import Progress, Report, context, format_bytes, format_layers, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import read_text, refuse_overlap
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, Step
from sparse_unified.checkpoint.rewrite import Blocks, Edit, gather, index_texts, rewrite
from sparse_unified.checkpoint.safetensors_io import as_bytes
from sparse_unified.checkpoint.scores import Inputs, Scores, resolve_inputs
from sparse_unified.checkpoint.shapes import CONFIG, ffn_parts, ffn_shapes
from sparse_unified.checkpoint.sidecar import (
    EARLIER_SIDECAR,
    SIDECAR,
    Sidecar,
    tool_version,
    write_sidecar,
)
from sparse_unified.convert.ranking import ranking
from sparse_unified.experts import ExpertLayout, fit_router, random_router
from sparse_unified.experts.layout import Partition, order_neurons
from sparse_unified.experts.router import RouterInit, hidden_activations
from sparse_unified.surgery.cuts import select


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

    def table(self) -> Sequence[Sequence[object]]:
        least, most = min(self.expert_widths), max(self.expert_widths)
        width = f"{most}" if least == most else f"{least} to {most}"
        return [
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


@context("convert")
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

    Example:
        >>> convert("BAGEL-7B-MoT", "BAGEL-16to8", num_experts=16, top_k=8)  # doctest: +SKIP
    """
    start = time.perf_counter()
    source = Checkpoint(dense)
    refuse_overlap(out, source.directory, scores)
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        component=component,
        layers=layers,
        partition=partition,  # type: ignore[arg-type]
        router_init=router_init,  # type: ignore[arg-type]
        seed=partition_seed,
    )
    layouts = _plan_layouts(source, config)
    config = replace(config, layers=tuple(layouts))
    sizes = {layer: source.ffns[component][layer].hidden_size for layer in layouts}
    given = resolve_inputs(inputs, config, sizes)
    scores_of, origin = ranking(source, component, tuple(layouts), scores=scores, seed=seed)

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

    def finish(written: Path) -> None:
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
        old = [name for name in texts if name != RECIPE or source.recipe is not None]
        sidecar = Sidecar(
            component=component,
            neuron_index={layer: order(layer) for layer in layouts},
            arguments=arguments,
            headers=source.headers,
            texts={name: read_text(source.directory / name) for name in old},
            tool=tool_version(),
        )
        write_sidecar(written / SIDECAR, sidecar)
        # The result must read well before it gets its name.
        if component not in Checkpoint(written).experts:
            raise RuntimeError(f"{written} must read as sparse, got a dense checkpoint")

    rename = {SIDECAR: EARLIER_SIDECAR}
    nbytes = rewrite(source, out, edits, texts, rename=rename, finish=finish, progress=progress)
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
            f"({keys.dense_key(component, 0, 'gate_proj')} and so on), got none"
        )
    if component in experts:
        raise ValueError(
            f"{source.directory}: {component} FFNs must all be dense, got sparse layers "
            f"{format_layers(list(experts[component]))}; invert gives the dense files back"
        )
    layouts = {}
    for layer in select(config.layers, source.num_layers, ffns.__contains__, f"{component} FFN"):
        with naming(f"{component} layer {layer}"):
            layouts[layer] = ExpertLayout(
                intermediate_size=ffns[layer].intermediate_size,
                num_experts=config.num_experts,
                num_shared_experts=config.num_shared_experts,
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
        for name in keys.router_names(component):
            # That of the shared expert is zero; those of und blocks start the same.
            yield as_bytes(torch.zeros_like(weight[:1]) if name == "gate_shared" else weight)

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
    return [source.read(keys.dense_key(config.component, layer, name)) for name in keys.PROJECTIONS]
