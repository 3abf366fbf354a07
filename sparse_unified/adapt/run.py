# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and data to a trained checkpoint, by way of states that a run resumes from.

While a run to `OUT` lasts, its log and its states lie in `OUT.training`: `log.jsonl`,
what trackers write, and `step-N/` as `saving` writes them. `OUT` itself appears once, complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from sparse_unified._common import Progress, Report, StrPath, context, optional
from sparse_unified.adapt.config import RunConfig, TrainingConfig
from sparse_unified.adapt.data import ImageDataset, ImageStream, sequence_generator
from sparse_unified.adapt.memory import MemoryEstimate, estimate
from sparse_unified.adapt.optimizer import num_processes, this_process, wait_for_all
from sparse_unified.adapt.records import open_records, open_stream
from sparse_unified.adapt.saving import ADAPTATION, WHAT, list_states, write_adapted
from sparse_unified.adapt.trainer import StepRecord, Trainer
from sparse_unified.analysis.expert_usage import ExpertUsage, layer_usage
from sparse_unified.bagel.loading import load_bagel, local_reader
from sparse_unified.bagel.packing import pack_training
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.checkpoint import AdaptConfig, Checkpoint, files
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.surgery.lora import write_lora

LOG = "log.jsonl"
# Options of the machine or the moment, not of a run.
_PASSING = {"device", "dtype", "resume", "eval_data", "sequences"}
# Of the weight files, this much in so many places tells one model from another.
_PLACES, _PLACE_BYTES = 64, 4096
# Of the tokens of the last tenth of the steps: an expert with less is used by none, and one with
# more than all but this by all.
_UNUSED = 0.01
# What gloo and NCCL say when another process has ended, or does not answer in time.
_OTHER_PROCESS = re.compile(r"gloo|nccl|peer|timeout|timed out", re.IGNORECASE)
_log = logging.getLogger(__name__)


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
            stated = options_of(config, run).items()
            plain = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in stated}
            for name, kind in _tracker_kinds(run.report_to).items():
                trackers.append(_tracker(name, kind, running, out, resumed_from))
                stack.callback(trackers[-1].finish)
                trackers[-1].store_init_configuration(plain)
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
                for path in list_states(running)[: -run.keep] if is_first else ():
                    # It loses its name first, so that no half of a state is left.
                    doomed = path.with_name(f".{path.name}.removed")
                    shutil.rmtree(doomed, ignore_errors=True)
                    path.rename(doomed)
                    shutil.rmtree(doomed)
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
        optimizer = trainer.optimizer
        if lora is None:
            write_adapted(
                source,
                out,
                trainer.model,
                optimizer,
                texts=texts,
                progress=progress,
                stage=run.trained,
                component=run.component,
                steps=config.steps,
                seed=config.seed,
            )
        else:
            adapters = {name: optimizer.whole(name) for name in optimizer.parameters}
            if is_first:
                with files.atomic_directory(out) as unfinished:
                    write_lora(unfinished, lora, adapters, base_model=os.fspath(model))
                    files.write_text(unfinished / ADAPTATION, texts[ADAPTATION])
            wait_for_all()
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
    # Another seed after each stage that the model has had, so that stages with one --seed do not
    # see the same texts in the same order.
    stages = sum(isinstance(step.config, AdaptConfig) for step in source.recipe)
    config = replace(config, seed=(config.seed + 1_000_003 * stages) % 2**63)

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
            # Where torch's handler of signals saw it end, only the cause says by which one.
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


def _tracker(name: str, kind: Any, running: Path, out: StrPath, done: int) -> Any:
    """Starts a tracker of accelerate; one that writes files does it in the directory of the run."""
    optional("accelerate", "train").PartialState()  # which trackers ask whether they may write
    has_files = kind.requires_logging_directory
    given: dict[str, Any] = {"logging_dir": str(running)} if has_files else {}
    if name == "tensorboard":
        given["purge_step"] = done + 1
    elif name == "wandb":
        given |= {"name": Path(out).name, "dir": str(running)}
    project = os.environ.get("WANDB_PROJECT", "sparse_unified")
    tracker = kind(name if has_files else project, **given)
    tracker.start()
    return tracker


def options_of(config: TrainingConfig, run: RunConfig) -> dict[str, Any]:
    """Returns the flags of `adapt`, by parameter, that give the same configurations again."""
    own = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in _PASSING}
    own["dtype"] = None if run.dtype is None else str(run.dtype).removeprefix("torch.")
    values = asdict(config) | asdict(run.sequences) | own
    values["max_grad_norm"] = config.max_grad_norm or 0  # which None cannot say in a flag
    values["micro_batch_size"] = config.batch_size // config.passes
    if run.lora_rank is not None:
        del values["stage"]
    plain = json.dumps({name: value for name, value in values.items() if value is not None})
    return dict(json.loads(plain))


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


def judge_routers(steps: Sequence[Mapping[str, Any]], top_k: int | None) -> tuple[str, ...]:
    """Returns what to tell of the use of experts; warns, with a table, where routers collapsed.

    Args:
        steps: of a log, with the `expert_load` of each.
        top_k: experts per token; None of a dense model, of which nothing is told.
    """
    loads = [step["expert_load"] for step in steps if "expert_load" in step]
    loads = loads[-max(1, len(steps) // 10) :]
    if top_k is None or not loads:
        return ()
    rows, fallen = [], []
    for name in loads[-1]:
        component, layer = name.split(".")
        load = torch.tensor([own[name] for own in loads]).sum(0)
        if not load.any():
            continue
        row = layer_usage(component, int(layer), top_k, torch.stack([load, load * 0]))
        rows.append(row)
        none = sum(share < _UNUSED for share in row["share"])
        full = sum(share > 1 - _UNUSED for share in row["share"])
        if (count := row["num_experts"]) > top_k and (none or full):
            fallen.append(f"  {name}: {none} of {count} experts used by no token, {full} by all")
    if not rows:
        return ()
    entropies = [row["entropy"] for row in rows]
    told = (
        f"experts: entropy of the load {sum(entropies) / len(rows):.3f} (least "
        f"{min(entropies):.3f}, even is 1)"
    )
    if not fallen:
        return (told,)
    _log.warning(
        "routers have collapsed in %d of %d blocks: experts are used by no token or by all of "
        "them, which is a static choice; start from fitted routers (--router-init activation), or "
        "balance more (--balance-rate 0.01, or a larger --balance-weight)",
        *(len(fallen), len(rows)),
    )
    usage = ExpertUsage(task="training", samples=len(loads), ranges=("all",), layers=tuple(rows))
    return (told, "collapsed routers:", *fallen, "", *usage.to_text().splitlines()[2:])  # no title
