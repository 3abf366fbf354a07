# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: what a run writes instead of a checkpoint, and a checkpoint merged with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sparse_unified._common import Progress, StrPath, context
from sparse_unified.adapt.optimizer import Optimizer, gather, this_process, wait_for_all
from sparse_unified.checkpoint import AdaptConfig, Checkpoint, files
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.checkpoint.modes import RECIPE, Step, recipe_text
from sparse_unified.checkpoint.rewrite import Blocks, Edit, rewrite
from sparse_unified.checkpoint.safetensors_io import TensorSpec, as_bytes, read_tensor
from sparse_unified.surgery.lora import Factors, read_lora, write_lora


def write_adapters(
    out: StrPath, optimizer: Optimizer, config: Any, texts: Mapping[str, str], *, base_model: str
) -> None:
    """Writes the trained adapters, their averages where such are kept, in fp32, or nothing.

    Every process takes part; the first one writes.
    """
    weights = optimizer.weights if optimizer.ema is None else optimizer.ema
    whole = {
        name: gather(parameter, weights[name]).detach().cpu()
        for name, parameter in optimizer.parameters.items()
    }
    if this_process() == 0:
        with files.atomic_directory(out) as unfinished:
            write_lora(unfinished, config, whole, base_model=base_model)
            for name, text in texts.items():
                files.write_text(unfinished / name, text)
    wait_for_all()


@context("merge_lora")
def merge_lora(
    model: StrPath, lora: StrPath, out: StrPath, *, progress: Progress | None = None
) -> list[str]:
    """Writes a checkpoint with adapters merged into its weights.

    W + s B A is computed in fp32 and rounded to the dtype of W; all else is copied, and the recipe
    gains a step.

    Args:
        model: a model directory, dense, sparse or pruned, or a hub id.
        lora: what `adapt` with a LoRA rank wrote, or peft for the official code.
        out: the directory to make; it must not exist.
        progress: called with (bytes written, bytes in all).

    Returns:
        the official keys of the weights that were changed.

    Raises:
        ValueError: model or adapters are damaged or do not fit; nothing is written.
        RuntimeError: writing failed, or a merged weight is not finite; nothing is left under `out`.
    """
    source = Checkpoint(find_model(model))
    files.check_target(out, source.directory, lora)
    adapters = read_lora(lora, {key: spec.shape for key, spec in source.specs.items()})
    path = Path(lora) / "adaptation.json"
    config = files.read_json(path).get("config", {}) if path.exists() else {}

    def blocks(key: str, spec: TensorSpec, factors: Factors) -> Blocks:
        merged = factors.merged(read_tensor(spec))
        if not merged.isfinite().all():
            raise RuntimeError(f"{key} must be finite to be written, got NaN or infinity")
        yield as_bytes(merged)

    edits = {}
    for key, factors in adapters.items():
        spec = source.spec(key)
        entries = ((key, spec.dtype, spec.shape),)
        edits[key] = Edit(entries=entries, blocks=partial(blocks, key, spec, factors))
    step = AdaptConfig(
        stage="lora",
        component=config.get("component", "both"),
        steps=config.get("steps"),
        seed=config.get("seed", 0),
        layers=tuple(range(source.num_layers)),
    )
    rewrite(
        source,
        os.fspath(out),
        edits,
        {RECIPE: recipe_text((*source.recipe, Step(config=step, scores=None)))},
        headers=source.headers,
        finish=lambda unfinished: Checkpoint(unfinished).experts,  # through the reader's eyes
        progress=progress,
    )
    return list(adapters)
