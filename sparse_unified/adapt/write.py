# SPDX-License-Identifier: Apache-2.0
"""A trained model as a checkpoint directory: trained tensors anew, everything else copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_unified._common import Progress
from sparse_unified.adapt.masters import Masters
from sparse_unified.adapt.sharding import gather, num_processes, this_process
from sparse_unified.adapt.state import require_finite
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.atomic import atomic_directory
from sparse_unified.checkpoint.files import copy_files, list_files, require_room
from sparse_unified.checkpoint.modes import AdaptConfig
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, Step
from sparse_unified.checkpoint.safetensors_file import as_bytes
from sparse_unified.checkpoint.sidecar import tool_version
from sparse_unified.checkpoint.writer import ByteCounter, FileWriter, write_text
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS, expert_views

WHAT = "adapt"
# The weights of a sparse FFN that are held whole while its experts are written.
_HELD_WHOLE = 4


def write_adapted(
    source: Checkpoint,
    out: str | os.PathLike[str],
    model: nn.Module,
    masters: Masters,
    config: AdaptConfig,
    *,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint with the trained weights, their averages where such are kept.

    Tensors keep names, shapes, dtypes and files. The recipe gains a step. Every process takes part;
    the first one writes. The directory appears complete or not at all.

    Args:
        source: the checkpoint that the model was loaded from.
        out: the directory to make; it must not exist.
        model: the trained model, sharded or not. masters: of its trainer.
        config: what the recipe says.
        texts: further files, by name.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: the target exists. RuntimeError: writing failed, or a trained weight is not
            finite; nothing is left under `out`.
    """
    weights = masters.weights if masters.ema is None else masters.ema

    @lru_cache(maxsize=_HELD_WHOLE)
    def whole(name: str) -> Tensor:
        return gather(masters.parameters[name], weights[name]).detach().cpu()

    trained = _official_parts(model, masters.parameters)
    if this_process():
        for header in source.headers.values():
            for key in header.tensors:
                if key in trained:
                    whole(trained[key][0])
        dist.barrier()
        return
    recipe = (source.recipe or Recipe()).then(Step(config=config, scores=None, tool=tool_version()))
    others = list_files(source.directory, skip={*source.headers, RECIPE, *(texts or {})}, what=WHAT)
    total = sum(file.nbytes for file in others)
    for header in source.headers.values():
        total += 8 + len(header.text.encode()) + sum(s.nbytes for s in header.tensors.values())
    counter = ByteCounter(total, progress)
    with atomic_directory(out, what=WHAT) as partial:
        require_room(partial, total, what=WHAT)
        copy_files(others, partial, rename={}, advance=counter.advance)
        for name, header in source.headers.items():
            with FileWriter(partial / name, header.text, counter.advance) as writer:
                for key, spec in header.tensors.items():
                    if key not in trained:
                        writer.copy(spec)
                        continue
                    parameter, part = trained[key]
                    tensor = part(whole(parameter)).to(spec.dtype).contiguous()
                    require_finite(tensor, f"{WHAT}: {key}")
                    writer.write(as_bytes(tensor))
        write_text(partial / RECIPE, recipe.to_json())
        for name, text in (texts or {}).items():
            write_text(partial / name, text)
        Checkpoint(partial).moe  # noqa: B018  (a last look through the reader's eyes)
    if num_processes() > 1:
        dist.barrier()


Part = Callable[[Tensor], Tensor]


def _official_parts(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, Part]]:
    """Returns of every official key with trained weights the parameter, and its part of that."""
    parts: dict[str, tuple[str, Part]] = {}
    for name in names:
        path, _, projection = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, SparseMoE) and projection in PROJECTIONS:
            for key in _expert_keys(owner):
                if f".{projection}." in key:
                    parts[f"{path}.{key}"] = (name, _expert_part(owner, projection, key))
        else:
            parts[name] = (name, lambda weight: weight)
    return parts


def _expert_keys(block: SparseMoE) -> list[str]:
    shapes = (
        (block.intermediate_size, block.hidden_size),
        (block.intermediate_size, block.hidden_size),
        (block.hidden_size, block.intermediate_size),
    )
    return list(expert_views(block.layout, *(torch.empty(s, device="meta") for s in shapes)))


def _expert_part(block: SparseMoE, projection: str, key: str) -> Part:
    shared = key.startswith("shared_expert.")
    expert = 0 if shared else int(key.split(".")[1])
    start, stop = block.layout.shared_range() if shared else block.layout.expert_range(expert)
    if projection == "down_proj":
        return lambda weight: weight[:, start:stop]
    return lambda weight: weight[start:stop]
