# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and data to a trained checkpoint, by way of states that a run resumes from.

While a run to `OUT` lasts, its log and its states lie in `OUT.training`: `log.jsonl`,
`tensorboard/`, and `step-N/` as `state` writes them. `OUT` itself appears once, complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_unified._common import Progress, format_table
from sparse_unified.adapt.config import TrainingConfig
from sparse_unified.adapt.freeze import freeze
from sparse_unified.adapt.log import LOG, TrainingLog, read_lines
from sparse_unified.adapt.pictures import PictureDataset
from sparse_unified.adapt.records import open_records
from sparse_unified.adapt.reports import StepRecord, TrainingReport
from sparse_unified.adapt.select import freeze_component
from sparse_unified.adapt.sequences import SequenceConfig
from sparse_unified.adapt.sharding import num_processes, this_process
from sparse_unified.adapt.trainer import Trainer
from sparse_unified.adapt.write import WHAT, write_adapted
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.checkpoint import AdaptConfig, Checkpoint
from sparse_unified.checkpoint.atomic import refuse_foreign_partial, refuse_overlap
from sparse_unified.checkpoint.hub import find_model
from sparse_unified.checkpoint.modes import BOTH
from sparse_unified.checkpoint.surroundings import require_surroundings

# Of the weight files, this much in so many places tells one model from another.
_PLACES, _PLACE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What is trained on what, and what is kept while it lasts.

    Args:
        stage: "router", "expert_frozen" or "full", see `freeze`.
        component: "gen" or "und" trains the weights of one component alone.
        sequences: how times, noise and dropout are drawn.
        tasks: which uses of the records are trained; None is all, see `PictureDataset`.
        max_side: longest side of a picture in pixels; None is what the model takes.
        device, dtype: of the model; dtype None is that of the files.
        checkpoint_every: steps between states, a last one after the last step; None saves none.
        keep: how many states are kept.
        resume: go on from the latest state, if there is one.
        tensorboard: write event files too.
        cache_latents: encode every picture once and keep its latent beside the states.

    Raises:
        ValueError: a count is below 1.
    """

    stage: str = "expert_frozen"
    component: str = BOTH
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    tasks: tuple[str, ...] | None = None
    max_side: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: bool = False
    tensorboard: bool = False
    cache_latents: bool = False

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"RunConfig: {name} must be an integer of at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptReport(TrainingReport):
    """What `adapt` did.

    Attributes:
        out: the directory it wrote; log: the log of the run.
        stage, component: what was trained. resumed_from: the step it went on from, 0 from scratch.
    """

    out: str
    log: str
    stage: str
    component: str
    resumed_from: int

    def to_text(self) -> str:
        rows = [("written", self.out), ("log", self.log), ("stage", self.stage)]
        if self.resumed_from:
            rows.append(("resumed from", f"step {self.resumed_from}"))
        return f"{format_table(rows)}\n{TrainingReport.to_text(self)}"


def adapt(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: TrainingConfig,
    run: RunConfig | None = None,
    *,
    on_step: Callable[[StepRecord], object] | None = None,
    progress: Progress | None = None,
) -> AdaptReport:
    """Trains a checkpoint on pictures and texts, and writes the trained checkpoint.

    Under torchrun, with torch.distributed initialised, all processes call this alike.

    Args:
        model: a model directory, dense, sparse or pruned, or a hub id.
        out: the directory to make; neither it nor, without `resume`, `OUT.training` may exist.
        data: see `open_records`.
        config: how to train. run: what, and what to keep.
        on_step: called after every step.
        progress: called with (bytes written, bytes in all) when `out` is written.

    Raises:
        ValueError: an argument, the checkpoint or the data are not as described; nothing is
            written.
        RuntimeError: the loss is not finite, or writing failed; nothing is left under `out`.
        ImportError: the `bagel` extra is missing, or `train`, where the data or the log need it.
    """
    run = run or RunConfig()
    prepared = prepare(model, out, data, config, run)
    source, running, trainer = prepared.source, prepared.running, prepared.trainer
    state = latest_state(running) if run.resume else None
    if state is not None:
        trainer.load(state)
    resumed_from = trainer.steps_done
    with ExitStack() as stack:
        log = None
        if this_process() == 0:
            running.mkdir(exist_ok=True)
            log = stack.enter_context(
                TrainingLog(running, trainer.steps_done, tensorboard=run.tensorboard)
            )

        def after_step(record: StepRecord) -> None:
            if log is not None:
                log.write(record)
            every = run.checkpoint_every
            if every is not None and (record.step % every == 0 or record.step == config.steps):
                if log is not None:
                    log.sync()
                trainer.save(running / f"step-{record.step}")
                if log is not None:
                    _drop_states(running, run.keep)
            if on_step is not None:
                on_step(record)

        report = trainer.run(after_step)
    final = AdaptReport(
        **{f.name: getattr(report, f.name) for f in dataclasses.fields(report)},
        out=os.fspath(out),
        log=str(running / LOG),
        stage=run.stage,
        component=run.component,
        resumed_from=resumed_from,
    )
    write_adapted(
        source,
        out,
        trainer.model,
        trainer.masters,
        AdaptConfig(
            stage=run.stage,
            component=run.component,
            steps=config.steps,
            seed=config.seed,
            layers=tuple(range(source.num_layers)),
        ),
        texts={"adaptation.json": _facts(config, run, running)} if log is not None else None,
        progress=progress,
    )
    return final


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a run needs, read and checked; nothing is written yet."""

    source: Checkpoint
    running: Path
    dataset: PictureDataset
    trainer: Trainer


def prepare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: TrainingConfig,
    run: RunConfig,
) -> Prepared:
    """Reads and checks what `adapt` is given; raises as it does."""
    source = Checkpoint(find_model(model, where="adapt"))
    running = check_target(source, out, data, resume=run.resume)
    require_surroundings(source)
    source.moe  # noqa: B018  (refuses whatever disagrees)
    records = open_records(data)
    pipeline = BagelPipeline.from_pretrained(source.directory, device=run.device, dtype=run.dtype)
    dataset = PictureDataset(
        records,
        pipeline.image_processor,
        pipeline.tokenizer,
        run.sequences,
        tasks=run.tasks,
        max_side=run.max_side,
        latent_cache=running / "latents" / str(this_process()) if run.cache_latents else None,
    )
    freeze(pipeline.model, run.stage)
    freeze_component(pipeline.model, run.component)
    trainer = Trainer(pipeline.model, dataset, config, identity=_identity(source, run))
    return Prepared(source=source, running=running, dataset=dataset, trainer=trainer)


def check_target(
    source: Checkpoint,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    resume: bool,
) -> Path:
    """Returns the directory of the run to `out`.

    Raises:
        ValueError: `out` exists or has no parent, lies inside the model, the model or the data lie
            where it is written, or its run exists and is not to be resumed.
    """
    target = Path(os.path.abspath(out))  # noqa: PTH100  (resolve() would follow the last link)
    refuse_overlap(target, source.directory, data, what=WHAT)
    refuse_foreign_partial(target, what=WHAT)
    if os.path.lexists(target):
        raise ValueError(f"{WHAT}: target must not exist, got {out}")
    if not target.parent.is_dir():
        raise ValueError(f"{WHAT}: parent of {out} must be a directory, got {target.parent}")
    running = target.with_name(f"{target.name}.training")
    if not resume and os.path.lexists(running) and this_process() == 0:
        raise ValueError(
            f"{WHAT}: {running} must not exist, got an earlier run; --resume goes on with it"
        )
    return running


def latest_state(running: Path) -> Path | None:
    """Returns the state of the latest step in the directory of a run."""
    states = _states(running)
    return states[-1] if states else None


def _states(running: Path) -> list[Path]:
    found = {}
    for path in running.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _drop_states(running: Path, keep: int) -> None:
    """Removes all but the latest states; each loses its name first, so that no half is left."""
    for path in _states(running)[:-keep]:
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _identity(source: Checkpoint, run: RunConfig) -> dict[str, Any]:
    return {
        "model": _fingerprint(source),
        "stage": run.stage,
        "component": run.component,
        "dtype": str(run.dtype),
        "data": {
            "tasks": None if run.tasks is None else sorted(run.tasks),
            "max_side": run.max_side,
            **dataclasses.asdict(run.sequences),
        },
    }


def _fingerprint(source: Checkpoint) -> str:
    """Returns a hash of the headers of the weight files, and of bytes all over them."""
    digest = hashlib.sha256()
    for name, header in source.headers.items():
        digest.update(name.encode() + header.text.encode())
        path = source.directory / name
        size = path.stat().st_size
        with path.open("rb") as stream:
            for place in range(_PLACES):
                stream.seek(size * place // _PLACES)
                digest.update(stream.read(_PLACE_BYTES))
    return digest.hexdigest()[:16]


def _facts(config: TrainingConfig, run: RunConfig, running: Path) -> str:
    """Returns what the trained directory says about its training, with the loss of every step."""
    lines = read_lines(running / LOG)
    facts = {
        "training": config.to_dict(),
        "stage": run.stage,
        "component": run.component,
        "processes": num_processes(),
        "sequences": dataclasses.asdict(run.sequences),
        "tasks": run.tasks,
        "max_side": run.max_side,
        "losses": [line["loss"] for line in lines],
    }
    return json.dumps(facts, indent=2) + "\n"
