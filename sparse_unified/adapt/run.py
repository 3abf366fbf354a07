# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and data to a trained checkpoint, by way of states that a run resumes from.

While a run to `OUT` lasts, its log and its states lie in `OUT.training`: `log.jsonl`,
what trackers write, and `step-N/` as `saving` writes them. `OUT` itself appears once, complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from sparse_unified._common import Progress, Report, StrPath, context, optional
from sparse_unified.adapt.collapse import judge_routers
from sparse_unified.adapt.config import RunConfig, TrainingConfig
from sparse_unified.adapt.data import ImageDataset, ImageStream, sequence_generator
from sparse_unified.adapt.lora import write_adapters
from sparse_unified.adapt.memory import MemoryEstimate, estimate
from sparse_unified.adapt.optimizer import num_processes, this_process, wait_for_all
from sparse_unified.adapt.records import open_records, open_stream
from sparse_unified.adapt.saving import WHAT, list_states, write_adapted
from sparse_unified.adapt.trainer import StepRecord, Trainer
from sparse_unified.bagel.loading import load_bagel, local_reader
from sparse_unified.bagel.packing import pack_training
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.checkpoint import AdaptConfig, Checkpoint, files
from sparse_unified.checkpoint.model_dir import find_model

LOG, ADAPTATION = "log.jsonl", "adaptation.json"
PROJECT = "sparse_unified"  # of trackers that have projects
# Of a run, not of the machine or the moment.
_RUN_OPTIONS = (
    *("stage", "component", "lora_rank", "lora_alpha", "lora_targets", "tasks", "max_side"),
    *("checkpoint_every", "keep", "report_to", "cache_latents", "max_damaged"),
    *("streaming", "workers"),
)
# Of the weight files, this much in so many places tells one model from another.
_PLACES, _PLACE_BYTES = 64, 4096
# What gloo and NCCL say when another process has ended, or does not answer in time.
_OTHER_PROCESS = re.compile(r"gloo|nccl|peer|timeout|timed out", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptReport(Report):
    """What `adapt` did."""

    steps: int  # taken in all, those before a resume included
    trained_parameters: int  # number of trained values of the model
    parameters: int  # number of all of them
    tokens: int  # of the steps of this run, those before a resume excluded
    seconds: float  # that these steps took
    first_loss: float | None  # mean of the first tenth of these steps
    last_loss: float | None  # mean of the last tenth
    out: str  # the directory it wrote
    log: str  # the log of the run
    stage: str  # what was trained
    component: str  # of which component
    resumed_from: int  # the step it went on from, 0 from scratch
    told: tuple[str, ...] = ()  # lines on the use of experts; their loads are in the log

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in Report.to_dict(self).items() if name != "told"}

    def table(self) -> Sequence[Sequence[object]]:
        return Report.table(self)[:-1]

    def notes(self) -> Sequence[str]:
        return self.told


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Report):
    """What a run would do."""

    sequences: dict[str, int]  # of each use in the data
    steps: int  # of the run
    epochs: float  # how often each sequence is seen
    passes: int  # forward and backward passes of a step, over all processes
    resumes_from: int  # step of the state that it would go on from
    memory: MemoryEstimate  # for a pass of the size of the first sequences

    def table(self) -> Sequence[Sequence[object]]:
        return Report.table(self)[:-1]

    def notes(self) -> Sequence[str]:
        return [self.memory.to_text()]


@context(WHAT)
def adapt(
    model: StrPath,
    out: StrPath,
    data: StrPath,
    config: TrainingConfig,
    run: RunConfig | None = None,
    *,
    on_step: Callable[[StepRecord], object] | None = None,
    progress: Progress | None = None,
) -> AdaptReport:
    """Trains a checkpoint on images and texts, and writes the trained checkpoint.

    Under torchrun, with torch.distributed initialised, all processes call this alike.

    Example:
        >>> config = TrainingConfig(steps=1000, batch_size=8, learning_rate=1e-4)
        >>> adapt("BAGEL-16to8", "tuned", "pictures", config, RunConfig(stage="expert_frozen"))

    Args:
        model: a model directory, dense, sparse or pruned, or a hub id.
        out: the directory to make; neither it nor, without `resume`, `OUT.training` may exist.
        data: a folder, a file or a pattern; see docs/adaptation.md.
        config: how to train.
        run: what, and what to keep.
        on_step: called after every step.
        progress: called with (bytes written, bytes in all) when `out` is written.

    Raises:
        ValueError: an argument, the checkpoint or the data are not as described; nothing is
            written.
        RuntimeError: a step is not finite, writing failed, or another process ended or did not
            answer in time; nothing is left under `out`.
        ImportError: the `bagel` extra is missing, or `train`, where the data or the log need it.
    """
    run = run or RunConfig()
    with ExitStack() as stack:
        stack.enter_context(_in_words())
        source, running, dataset, trainer, lora = _prepare(model, out, data, config, run)
        if is_first := this_process() == 0:
            running.mkdir(exist_ok=run.resume)
            refusal = ValueError(f"{running} must belong to one run, got one that goes on")
            stack.enter_context(files.locked(running, refusal))
        wait_for_all()  # latents of others are written into the directory
        if run.resume and (states := list_states(running)):
            trainer.load(states[-1])
        resumed_from = trainer.steps_done
        log, trackers = None, []
        if is_first:
            log = stack.enter_context(_open_log(running / LOG, resumed_from))
            trackers = _trackers(run.report_to, running, out, resumed_from)
            for tracker in trackers:
                tracker.start()
                stack.callback(tracker.finish)
                tracker.store_init_configuration(_logged(config, run))
        losses, tokens, seconds = [], 0, 0.0
        while trainer.steps_done < config.steps:
            record = trainer.step()
            losses.append(record.loss)
            tokens += record.tokens
            seconds += record.seconds
            if log is not None:
                values = record.to_dict()
                log.write(json.dumps(values) + "\n")
                step, _ = values.pop("step"), values.pop("expert_load", None)
                for tracker in trackers:
                    tracker.log(values, step=step)
            every, is_last = run.checkpoint_every, record.step == config.steps
            if every is not None and (record.step % every == 0 or is_last):
                if log is not None:
                    os.fsync(log.fileno())
                trainer.save(running / f"step-{record.step}")
                if is_first:
                    _drop_states(running, run.keep)
            if on_step is not None:
                on_step(record)
        if log is not None:
            os.fsync(log.fileno())
        facts = {
            "config": options_of(config, run),
            "processes": num_processes(),
            "damaged": sorted(dataset.damaged.values()),
            "losses": [line["loss"] for line in read_log(running / LOG)],
        }
        texts = {ADAPTATION: json.dumps(facts, indent=2) + "\n"}
        if lora is not None:
            write_adapters(out, trainer.optimizer, lora, texts, base_model=os.fspath(model))
        else:
            write_adapted(
                source,
                out,
                trainer.model,
                trainer.optimizer,
                AdaptConfig(
                    stage=run.trained,
                    component=run.component,
                    steps=config.steps,
                    seed=config.seed,
                    layers=tuple(range(source.num_layers)),
                ),
                texts=texts,
                progress=progress,
            )
    tenth = max(1, len(losses) // 10)
    return AdaptReport(
        steps=trainer.steps_done,
        trained_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        tokens=tokens,
        seconds=seconds,
        first_loss=sum(losses[:tenth]) / tenth if losses else None,
        last_loss=sum(losses[-tenth:]) / tenth if losses else None,
        out=os.fspath(out),
        log=str(running / LOG),
        stage=run.trained,
        component=run.component,
        resumed_from=resumed_from,
        told=judge_routers(read_log(running / LOG), source.top_k) if is_first else (),
    )


@context(WHAT)
def plan(
    model: StrPath, out: StrPath, data: StrPath, config: TrainingConfig, run: RunConfig
) -> Plan:
    """Reads and checks all that `adapt` is given, every record included.

    Arguments and errors are those of `adapt`; nothing is written but latents, where they are kept.
    """
    _, running, dataset, trainer, _ = _prepare(model, out, data, config, run)
    dataset.check()
    sequences = [
        dataset.sequence(place % len(dataset.samples), sequence_generator(config.seed, 0, place))
        for place in range(config.batch_size // config.passes)
    ]
    states = list_states(running) if run.resume else []
    return Plan(
        sequences=dict(Counter(task.value for _, task in dataset.samples)),
        steps=config.steps,
        epochs=config.steps * config.batch_size / len(dataset.samples),
        passes=config.passes,
        resumes_from=int(states[-1].name.removeprefix("step-")) if states else 0,
        memory=estimate(
            trainer.model,
            config,
            pack_training(trainer.model.config, sequences),
            run,
            autoencoder=sum(p.nbytes for p in dataset.vae.parameters()),
            processes=num_processes(),
        ),
    )


def _prepare(
    model: StrPath, out: StrPath, data: StrPath, config: TrainingConfig, run: RunConfig
) -> tuple[Checkpoint, Path, ImageDataset, Trainer, Any]:
    """Reads and checks all that a run needs, adapters last; nothing is written yet."""
    source = Checkpoint(find_model(model))
    target = files.check_target(out, source.directory, data)
    running = target.with_name(f"{target.name}.training")
    if not run.resume and os.path.lexists(running) and this_process() == 0:
        raise ValueError(f"{running} must not exist, got an earlier run; --resume goes on with it")
    source.experts  # noqa: B018  (refuses whatever disagrees)
    _tracker_kinds(run.report_to)
    config = replace(config, seed=stage_seed(config.seed, source))

    records: Any = open_stream(data) if run.streaming else open_records(data)
    tokenizer = Tokenizer.from_directory(source.directory)
    built, vae = load_bagel(
        source.directory,
        device=run.device,
        dtype=run.dtype,
        special_tokens=tokenizer.special_tokens,
        fill=False,  # each process reads its part, see Trainer
    )
    fill = local_reader(built, source.specs)
    pipeline = BagelPipeline(built, vae, tokenizer)
    latents = running / "latents" / str(this_process()) if run.cache_latents else None
    kind = ImageStream if run.streaming else ImageDataset
    dataset = kind(records, pipeline, run, latents)
    lora = run.prepare_(pipeline.model, config.seed)
    identity = {
        "model": _fingerprint(source),
        "stage": run.trained,
        "component": run.component,
        "dtype": str(run.dtype),
        "data": {
            "tasks": None if run.tasks is None else sorted(run.tasks),
            "max_side": run.max_side,
            "streaming": run.streaming,
            **asdict(run.sequences),
        },
        "records": records.fingerprint,
    }
    if lora is not None:
        identity["lora"] = [lora.r, lora.lora_alpha, lora.target_modules]
    held_out = None
    if run.eval_data is not None:
        held_out = ImageDataset(open_records(run.eval_data), pipeline, run, None)
    trainer = Trainer(
        pipeline.model,
        dataset,
        config,
        identity=identity,
        held_out=held_out,
        device=run.device,
        fill=fill,
    )
    return source, running, dataset, trainer, lora


def stage_seed(seed: int, source: Checkpoint) -> int:
    """Returns the seed of a run on a model: another one after each stage that the model has had,
    so that stages with one `--seed` do not see the same texts in the same order."""
    stages = sum(isinstance(step.config, AdaptConfig) for step in source.recipe)
    return (seed + 1_000_003 * stages) % 2**63


@contextmanager
def _in_words() -> Iterator[None]:
    """Says what a full disk, and another process that ended or stands still, mean for a run."""
    try:
        yield
    except OSError as error:
        name = error.filename or "log"
        raise RuntimeError(f"{name} must be writable, got {error.strerror or error}") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            # Where it ends while it is waited for, only the cause says by which signal.
            reason = str(error.__cause__ or "").strip() or str(error).strip()
            raise RuntimeError(
                "loader workers (--workers) must run on, got one that has ended: "
                f"{reason:.200}; go on from the last state (--resume)"
            ) from error
        is_other = isinstance(error, dist.DistError) or _OTHER_PROCESS.search(str(error))
        if num_processes() == 1 or not is_other or getattr(error, "named", False):
            raise
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"all {num_processes()} processes must run on and answer within --timeout, got one "
            f"that has ended or stands still: {reason:.200}; go on from the last state (--resume)"
        ) from error


def _tracker_kinds(names: Sequence[str]) -> dict[str, Any]:
    """Returns the classes of accelerate's trackers; ImportError names a package that is missing."""
    if not names:
        return {}
    library = optional("accelerate.tracking", "train", purpose="report_to")
    known = library.LOGGER_TYPE_TO_CLASS
    for name in names:
        if name not in known:
            raise ValueError(f"report_to must be of {', '.join(known)}, got {name!r:.80}")
        # Those of accelerate have the names of their packages.
        if known[name].__module__ == library.__name__ and not find_spec(name):
            raise ImportError(f"{WHAT}: report_to must name what is installed, got {name}")
    return {name: known[name] for name in names}


def _trackers(names: Sequence[str], running: Path, out: StrPath, done: int) -> list[Any]:
    """Returns accelerate's trackers; those that write files do it in the directory of the run."""
    kinds = _tracker_kinds(names)
    given: dict[str, dict[str, Any]] = {}
    if kinds:
        optional("accelerate", "train").PartialState()  # which trackers ask whether they may write
        given = {
            "tensorboard": {"purge_step": done + 1},
            "wandb": {"name": Path(out).name, "dir": str(running)},
        }
    trackers = []
    for name, kind in kinds.items():
        has_files = kind.requires_logging_directory
        where: dict[str, Any] = {"logging_dir": str(running)} if has_files else {}
        run_name = name if has_files else os.environ.get("WANDB_PROJECT", PROJECT)
        trackers.append(kind(run_name, **where, **given.get(name, {})))
    return trackers


def options_of(config: TrainingConfig, run: RunConfig) -> dict[str, Any]:
    """Returns the flags of `adapt`, by parameter, that give the same configurations again."""
    own = {name: getattr(run, name) for name in _RUN_OPTIONS}
    own["dtype"] = None if run.dtype is None else str(run.dtype).removeprefix("torch.")
    values = asdict(config) | asdict(run.sequences) | own
    values["max_grad_norm"] = config.max_grad_norm or 0  # which None cannot say in a flag
    values["micro_batch_size"] = config.batch_size // config.passes
    if run.lora_rank is not None:
        del values["stage"]
    plain = json.dumps({name: value for name, value in values.items() if value is not None})
    return dict(json.loads(plain))


def _logged(config: TrainingConfig, run: RunConfig) -> dict[str, Any]:
    """Returns the configurations as trackers take them."""
    values = options_of(config, run).items()
    return {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in values}


def _drop_states(running: Path, keep: int) -> None:
    """Removes all but the latest states; each loses its name first, so that no half is left."""
    for path in list_states(running)[:-keep]:
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


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


def _open_log(path: Path, steps: int) -> TextIO:
    """Opens a log to go on with; what a killed run logged after the steps that are done goes."""
    kept = [line for line in read_log(path) if line["step"] <= steps]
    if [line["step"] for line in kept] != list(range(1, steps + 1)):
        raise ValueError(
            f"{path}: log must hold the steps 1 to {steps} of the state, got {len(kept)}"
        )
    files.replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return path.open("a", encoding="utf-8", buffering=1)  # line by line


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the steps of a log, up to the first line that a kill cut short."""
    found: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            values = files.loads_strict(line)
            is_step = (type(values["step"]), type(values["loss"])) == (int, float)
        except (ValueError, TypeError, LookupError):
            is_step = False
        if not is_step:
            break
        found.append(values)
    return found
