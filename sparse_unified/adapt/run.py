# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and data to a trained checkpoint, by way of states that a run resumes from.

While a run to `OUT` lasts, its log and its states lie in `OUT.training`: `log.jsonl`,
`tensorboard/`, and `step-N/` as `saving` writes them. `OUT` itself appears once, complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_unified._common import Progress
from sparse_unified.adapt.config import RunConfig, TrainingConfig
from sparse_unified.adapt.data import ImageDataset, open_records
from sparse_unified.adapt.freeze import freeze
from sparse_unified.adapt.memory import estimate
from sparse_unified.adapt.optimizer import num_processes, this_process, wait_for_all
from sparse_unified.adapt.report import LOG, AdaptReport, Plan, StepRecord, TrainingLog, read_lines
from sparse_unified.adapt.saving import FACTS, WHAT, read_facts, write_adapted
from sparse_unified.adapt.sequences import sequence_generator
from sparse_unified.adapt.trainer import Trainer
from sparse_unified.bagel.packing import pack_training
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.checkpoint import AdaptConfig, Checkpoint
from sparse_unified.checkpoint.files import refuse_foreign_partial, refuse_overlap
from sparse_unified.checkpoint.model_dir import find_model

# Of the weight files, this much in so many places tells one model from another.
_PLACES, _PLACE_BYTES = 64, 4096


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
    """Trains a checkpoint on images and texts, and writes the trained checkpoint.

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
        RuntimeError: a step is not finite, or writing failed; nothing is left under `out`.
        ImportError: the `bagel` extra is missing, or `train`, where the data or the log need it.
    """
    run = run or RunConfig()
    prepared = _prepare(model, out, data, config, run)
    source, running, trainer = prepared.source, prepared.running, prepared.trainer
    is_first = this_process() == 0
    with ExitStack() as stack:
        if is_first:
            stack.enter_context(_own_directory(running, resume=run.resume))
        wait_for_all()  # latents of others are written into the directory
        state = _latest_state(running) if run.resume else None
        if state is not None:
            trainer.load(state)
        resumed_from = trainer.steps_done
        log = None
        if is_first:
            log = TrainingLog(running, resumed_from, tensorboard=run.tensorboard)
            stack.callback(log.close)

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
        if log is not None:
            log.sync()
        write_adapted(
            source,
            out,
            trainer.model,
            trainer.optimizer,
            AdaptConfig(
                stage=run.stage.value,
                component=run.component,
                steps=config.steps,
                seed=config.seed,
                layers=tuple(range(source.num_layers)),
            ),
            texts={"adaptation.json": _facts(config, run, running)},
            progress=progress,
        )
    return AdaptReport(
        **{field.name: getattr(report, field.name) for field in dataclasses.fields(report)},
        out=os.fspath(out),
        log=str(running / LOG),
        stage=run.stage.value,
        component=run.component,
        resumed_from=resumed_from,
    )


def plan(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: TrainingConfig,
    run: RunConfig | None = None,
) -> Plan:
    """Reads and checks all that `adapt` is given, one pass of sequences included.

    Arguments and errors are those of `adapt`; nothing is written but latents, where they are kept.
    """
    run = run or RunConfig()
    prepared = _prepare(model, out, data, config, run)
    dataset, trainer = prepared.dataset, prepared.trainer
    sequences = [
        dataset.sequence(place % len(dataset), sequence_generator(config.seed, 0, place))
        for place in range(config.batch_size // config.passes)
    ]
    batch = pack_training(trainer.model.config, sequences, device=trainer.model.device)
    image_tokens = 0 if batch.latents is None else len(batch.latents)
    state = _latest_state(prepared.running) if run.resume else None
    return Plan(
        sequences=dict(Counter(task.value for _, task in dataset.samples)),
        steps=config.steps,
        epochs=config.steps * config.batch_size / len(dataset),
        passes=config.passes,
        resumes_from=0 if state is None else read_facts(state)["step"],
        memory=estimate(
            trainer.model,
            config,
            image_tokens=image_tokens,
            text_tokens=batch.num_tokens - image_tokens,
            predicted_tokens=batch.text_tokens,
            autoencoder=sum(p.nbytes for p in dataset.autoencoder.parameters()),
            processes=num_processes(),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """All that a run needs, read and checked; nothing is written yet."""

    source: Checkpoint
    running: Path
    dataset: ImageDataset
    trainer: Trainer


def _prepare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: TrainingConfig,
    run: RunConfig,
) -> _Prepared:
    source = Checkpoint(find_model(model, where=WHAT))
    running = _check_target(source, out, data, resume=run.resume)
    source.experts  # noqa: B018  (refuses whatever disagrees)
    records = open_records(data)
    pipeline = BagelPipeline.from_pretrained(source.directory, device=run.device, dtype=run.dtype)
    dataset = ImageDataset(
        records,
        pipeline.image_processor,
        pipeline.tokenizer,
        run.sequences,
        tasks=run.tasks,
        max_side=run.max_side,
        latent_cache=running / "latents" / str(this_process()) if run.cache_latents else None,
    )
    freeze(pipeline.model, run.stage, component=run.component)
    trainer = Trainer(pipeline.model, dataset, config, identity=_identity(source, run))
    return _Prepared(source=source, running=running, dataset=dataset, trainer=trainer)


def _check_target(
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
    running = target.with_name(f"{target.name}.training")
    refuse_overlap(target, source.directory, data, what=WHAT)
    refuse_overlap(running, source.directory, what=WHAT)
    refuse_foreign_partial(target, what=WHAT)
    if os.path.lexists(target):
        raise ValueError(f"{WHAT}: target must not exist, got {out}")
    if not target.parent.is_dir():
        raise ValueError(f"{WHAT}: parent of {out} must be a directory, got {target.parent}")
    if not resume and os.path.lexists(running) and this_process() == 0:
        raise _earlier_run(running)
    return running


def _earlier_run(running: Path) -> ValueError:
    return ValueError(
        f"{WHAT}: {running} must not exist, got an earlier run; --resume goes on with it"
    )


@contextmanager
def _own_directory(running: Path, *, resume: bool) -> Iterator[None]:
    """Makes the directory of a run, and keeps other runs out of it."""
    try:
        running.mkdir(exist_ok=resume)
    except FileExistsError:
        raise _earlier_run(running) from None
    lock = os.open(running, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{WHAT}: {running} must belong to one run, got one that has not ended"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(lock)


def _states(running: Path) -> list[Path]:
    """Returns the states of a run, oldest first."""
    found = {}
    for path in running.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _latest_state(running: Path) -> Path | None:
    states = _states(running)
    if not states:
        return None
    step = read_facts(states[-1])["step"]
    if states[-1].name != f"step-{step}":
        raise ValueError(f"{states[-1] / FACTS}: step must be that of its directory, got {step}")
    return states[-1]


def _drop_states(running: Path, keep: int) -> None:
    """Removes all but the latest states; each loses its name first, so that no half is left."""
    for path in _states(running)[:-keep]:
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _identity(source: Checkpoint, run: RunConfig) -> dict[str, Any]:
    """Returns what a state must have in common with a run that goes on, beside its config."""
    return {
        "model": _fingerprint(source),
        "stage": run.stage.value,
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
    facts = {
        "training": config.to_dict(),
        "stage": run.stage.value,
        "component": run.component,
        "processes": num_processes(),
        "sequences": dataclasses.asdict(run.sequences),
        "tasks": run.tasks,
        "max_side": run.max_side,
        "losses": [line["loss"] for line in read_lines(running / LOG)],
    }
    return json.dumps(facts, indent=2) + "\n"
