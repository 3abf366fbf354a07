# SPDX-License-Identifier: Apache-2.0
"""Several model directories side by side: the same prompts, the same noise, one table.

A sample of a model is a record in the folder of the run, so that a run goes on where it stopped and
processes share the samples out. What distances and agreement are taken from, the images and answers
of the reference, is computed first.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparse_unified._common import Report, StrPath, context, format_table, optional
from sparse_unified.analysis.bagel_task import (
    DenseDistance,
    GenEval,
    Settings,
    TextAgreement,
    VelocityError,
    answer,
    compare_text,
    distances,
    finished,
    generate_samples,
    perplexity,
    pixels_of,
    settings_in_words,
)
from sparse_unified.analysis.evaluators import Evaluator, directions, measure
from sparse_unified.analysis.samples import Sample, Task
from sparse_unified.analysis.store import Shard, Store, open_store
from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.images import open_image
from sparse_unified.bagel.sampler import timestep_grid
from sparse_unified.checkpoint import Checkpoint, files
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor, save_tensors
from sparse_unified.checkpoint.scores import hash_checkpoint
from sparse_unified.convert.info import info
from sparse_unified.nn import active_experts

_BETTER = {
    **DenseDistance.better,
    **VelocityError.better,
    **TextAgreement.better,
    "answers": "higher",
}
_DRAWN = (Task.GENERATION.value, Task.EDITING.value)
_Unit = tuple[str, str, int]  # a sample of a model: name of the record, task, index
_SHOWN, _SIDE = 8, 160  # images of a collage, and pixels of the side of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Report):
    """Models side by side.

    Attributes:
        run: what was asked for.
        better: metric -> "lower" or "higher".
        models: a row per model, the reference first: its `name`, `path`, `kind` (dense, pruned,
            sparse, tuned), `parameters` and `active` ones of a token, `metrics` (name -> `mean`,
            its `standard_error` over samples and their number `n`), and `seconds` (task ->
            `median`, `least` and `most` of a sample).
        left: samples that no process has computed yet; files are written when there are none.
    """

    run: Mapping[str, Any]
    better: Mapping[str, str]
    models: tuple[dict[str, Any], ...]
    left: int

    def headings(self) -> Sequence[str]:
        times = [f"s/{task}" for task in self.models[0]["seconds"]]
        return ["model", "kind", "parameters", "active", *self._names(), *times]

    def table(self) -> Sequence[Sequence[object]]:
        rows = []
        for own in self.models:
            active = "?" if own["active"] is None else f"{own['active']:,}"
            metrics = [_cell(own["metrics"].get(name)) for name in self._names()]
            times = own["seconds"].values()
            seconds = ["{median:.3g} [{least:.3g}, {most:.3g}]".format(**s) for s in times]
            sizes = (f"{own['parameters']:,}", active)
            rows.append([own["name"], own["kind"], *sizes, *metrics, *seconds])
        return rows

    def _names(self) -> list[str]:
        return [name for name in self.better if any(name in own["metrics"] for own in self.models)]

    def notes(self) -> Sequence[str]:
        left = f"not finished: {self.left} samples are left to this or other processes"
        return [
            *(f"{name}: {self.better[name]} is better" for name in self._names()),
            "± is the standard error over the samples, n their number; seconds are the median "
            "[least, most] of a sample, of one model after the other",
            *([left] if self.left else []),
        ]

    def to_markdown(self) -> str:
        run, table = self.run, format_table([self.headings(), *self.table()], header=True)
        notes = "\n".join(f"- {note}" for note in self.notes())
        where = f"dtype {run['dtype']}, on {run['device']}."
        settings = f"Settings: {settings_in_words(run['settings'])}; {where}"
        return f"# Evaluation\n\n```\n{table}\n```\n\n{notes}\n\n{settings}\n"


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.2g}"
    return f"{found['mean']:.4g}{error} (n {found['n']})"


@context("evaluate")
def evaluate(
    directories: Sequence[StrPath],
    out: StrPath,
    samples: Mapping[str, Sequence[Sample]],
    *,
    reference: StrPath | None = None,
    settings: Settings | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    geneval: GenEval | None = None,
    shard: Shard = (0, 1),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> Evaluation:
    """Runs every model on the same samples with the same noise, and compares them.

    Example:
        >>> samples = {"generation": read_samples("prompts.jsonl")}  # doctest: +SKIP
        >>> print(evaluate(["tuned"], "out", samples, reference="dense"))  # doctest: +SKIP

    Args:
        directories: model directories or hub ids, of different names.
        out: folder of the run; a run of the same goes on.
        samples: of each task, see `read_samples`.
        reference: the model that distances and agreement are taken from; None leaves them out. It
            is measured too.
        settings: size, timesteps, guidance and `top_k` of all that is sampled, `top_k` of sparse
            models alone; what is no image uses the experts of time 1.
        evaluators: more metrics by name, each a function from the pipeline to numbers.
        geneval: GenEval images, and what scores them.
        shard: (i, n) computes every n-th sample from the i-th on. Processes share `out`, or their
            folders in it are copied together; whichever finds all samples there writes the results.
        device: of the models, which are loaded one after the other.
        dtype: of the models; None is that of the files.
        progress: called with records done, records of this process in all, and what is next.

    Returns:
        what is finished so far, of all shards.

    Raises:
        ValueError: an argument is not as described, `out` is of another run, or an evaluator
            returns something else than finite numbers. What is finished is kept.
    """
    settings = settings or Settings()
    listed = [*([reference] if reference is not None else []), *directories]
    paths = {Path(name).name: find_model(name) for name in dict.fromkeys(listed)}
    if len(paths) < len(set(listed)) or not paths:
        raise ValueError(f"directories must be one or more of different names, got {list(listed)}")
    if not samples and geneval is None:
        raise ValueError("samples must be given for a task, or geneval, got neither")
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard must be i of n with 0 <= i < n, got {number} of {count}")
    sources = {name: Checkpoint(path) for name, path in paths.items()}
    if settings.top_k is not None and not any(source.experts for source in sources.values()):
        raise ValueError(f"top_k must come with a sparse model, got {listed}")
    run: dict[str, Any] = {
        "models": {name: hash_checkpoint(source) for name, source in sources.items()},
        "reference": None if reference is None else next(iter(paths)),
        "settings": settings.stated(),
        "samples": {task: [s.fingerprint() for s in own] for task, own in samples.items()},
        "evaluators": {n: directions(f, where=n) for n, f in (evaluators or {}).items()},
        "geneval": geneval and geneval.stated(),
        "device": torch.device(device).type,
        "dtype": "of the files" if dtype is None else str(dtype).removeprefix("torch."),
    }
    run = json.loads(json.dumps(run))
    with open_store(out, run, shard) as store:
        work = _Work(store, paths, samples, settings, geneval, evaluators or {}, run["reference"])
        work.run(shard, device, dtype, progress)
        store.read()
        units = [unit for model in paths for unit in work.units(model)]
        left = sum(name not in store.records for name, _, _ in units) or work.score()
        rows = [_row(name, source, store, samples, settings) for name, source in sources.items()]
        better = _BETTER | work.better()
        result = Evaluation(run=run, better=better, models=tuple(rows), left=left)
        if not left:
            store.finish(result.to_json(), result.to_markdown())
            write_collage(store.folder, list(paths), samples)
            _write_answers(store, list(paths), samples)
    return result


@dataclass(slots=True)
class _Work:
    """What a process computes of each model."""

    store: Store
    models: Mapping[str, Path]
    samples: Mapping[str, Sequence[Sample]]
    settings: Settings
    geneval: GenEval | None
    evaluators: Mapping[str, Evaluator]
    reference: str | None

    def units(self, model: str) -> list[_Unit]:
        counts = {task: len(own) for task, own in self.samples.items()}
        counts |= {"geneval": len(self.geneval.metadata)} if self.geneval else {}
        counts |= {"evaluators": 1} if self.evaluators else {}
        return [
            (f"{model}/{task}/{index:05}", task, index)
            for task, count in counts.items()
            for index in range(count)
        ]

    def run(
        self,
        shard: Shard,
        device: str,
        dtype: torch.dtype | None,
        progress: Callable[[int, int, str], object] | None,
    ) -> None:
        own = {model: self.units(model)[shard[0] :: shard[1]] for model in self.models}
        total, done, show = sum(map(len, own.values())), 0, progress or (lambda *_: None)
        for model, units in own.items():
            todo = [unit for unit in units if unit[0] not in self.store.records]
            done += len(units) - len(todo)
            pipeline: Any = None  # loaded when the first sample needs it
            settings = self.settings
            if not Checkpoint(self.models[model]).experts:
                settings = replace(settings, top_k=None)  # which a dense model has no use for
            while todo:
                pipeline = pipeline or BagelPipeline.from_pretrained(
                    self.models[model], device=device, dtype=dtype
                )
                task = todo[0][1]
                size = self.settings.batch_size if task in _DRAWN else 1
                batch = [unit for unit in todo[:size] if unit[1] == task]
                show(done, total, f"{model}: {task}")
                with active_experts(pipeline.model, settings.config().top_k_at(1.0)):
                    if task in _DRAWN:
                        self._draw(pipeline, settings, model, batch)
                    elif task in self.samples:
                        self._answer(pipeline, model, batch[0])
                    else:
                        self._measure(pipeline, settings, model, batch[0])
                done, todo = done + len(batch), todo[len(batch) :]
        show(total, total, "done")

    def _measure(self, pipeline: Any, settings: Settings, model: str, unit: _Unit) -> None:
        """Draws a prompt of GenEval, or runs the evaluators."""
        start, found = time.perf_counter(), dict[str, float]()
        if self.geneval is not None and unit[1] == "geneval":
            folder = self.store.folder / "geneval" / model
            self.geneval.write(pipeline, folder, settings, [unit[2]])
            seconds = (time.perf_counter() - start) / self.geneval.num_images
        else:
            for name, function in self.evaluators.items():
                found |= measure(function, pipeline, where=f"{model}: {name}")
            seconds = time.perf_counter() - start
        self._append(model, unit, found, seconds)

    def _draw(self, pipeline: Any, settings: Settings, model: str, batch: list[_Unit]) -> None:
        """Draws samples of one task, and compares them with those of the reference."""
        task, start = batch[0][1], time.perf_counter()
        samples = [self.samples[task][index] for _, _, index in batch]
        result = generate_samples(pipeline, settings, *samples)
        seconds = (time.perf_counter() - start) / len(batch)
        drawn = zip(batch, samples, result.images, result.latents, strict=True)
        for unit, sample, image, latent in drawn:
            path = image_path(self.store.folder, model, task, unit[2])
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            save_tensors(path.with_suffix(".safetensors"), {"latent": latent.contiguous()})
            apart: dict[str, float] = {}
            if self.reference is not None:
                dense = image_path(self.store.folder, self.reference, task, unit[2])
                header = read_header(dense.with_suffix(".safetensors"))
                pixels = pixels_of(open_image(dense, where=str(dense)))
                reference = (read_tensor(header.tensors["latent"]), pixels)
                apart |= distances((latent, pixels_of(image)), reference)
            if sample.image is not None:
                apart |= VelocityError([sample], settings)(pipeline)
            self._append(model, unit, apart, seconds)

    def _answer(self, pipeline: Any, model: str, unit: _Unit) -> None:
        sample, start = self.samples[unit[1]][unit[2]], time.perf_counter()
        own = answer(pipeline, self.settings, sample)
        seconds, ids = time.perf_counter() - start, finished(pipeline, self.settings, own.token_ids)
        sums: dict[str, Any] = {}
        if self.reference is not None:
            dense = ids
            if model != self.reference:
                dense = self.store.records[f"{self.reference}/{unit[1]}/{unit[2]:05}"]["ids"]
            agreed, tokens, loss, length = compare_text(pipeline, sample, dense)
            sums = {"text_agreement": [agreed, tokens], "perplexity": [loss, length]}
        elif sample.answer is not None:
            sums = {"perplexity": [*compare_text(pipeline, sample, ids)[2:]]}
        if sample.answer is not None:
            sums["answers"] = int(_plain(own.text) == _plain(sample.answer))
        self._append(model, unit, sums, seconds, own.text, ids)

    def _append(
        self,
        model: str,
        unit: _Unit,
        metrics: Mapping[str, Any],
        seconds: float,
        answer: str | None = None,
        ids: Sequence[int] = (),
    ) -> None:
        """Adds a record; a metric is a value, or a sum with what it is divided by."""
        sums = {name: own if isinstance(own, list) else [own, 1] for name, own in metrics.items()}
        record = {"model": model, "sums": sums, "answer": answer, "ids": list(ids)}
        of = dict(zip(("name", "task", "index"), unit, strict=True))
        self.store.append({**of, **record, "seconds": seconds})

    def score(self) -> int:
        """Scores the GenEval images of every model, once; returns how many are left to others."""
        if self.geneval is None or (scorer := self.geneval.scorer) is None:
            return 0
        missing = [m for m in self.models if f"{m}/score" not in self.store.records]
        folder = self.store.folder / "geneval"
        with suppress(BlockingIOError), files.locked(folder, BlockingIOError()):
            self.store.read()
            for model in [m for m in missing if f"{m}/score" not in self.store.records]:
                found = measure(scorer, folder / model, where=f"{model}: scorer")
                known = {"metrics": found, "better": self.geneval.better()}
                self.store.append({"name": f"{model}/score", **known})
            return 0
        return len(missing)

    def better(self) -> dict[str, str]:
        own = [directions(f, where="evaluator") for f in self.evaluators.values()]
        own += [self.geneval.better()] if self.geneval else []
        return {metric: way for found in own for metric, way in found.items()}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def image_path(folder: Path, model: str, task: str, index: int) -> Path:
    """Returns where the image of a sample is, beside its latent."""
    return folder / "images" / model / task / f"{index:05}.png"


def _row(
    name: str,
    source: Checkpoint,
    store: Store,
    samples: Mapping[str, Sequence[Sample]],
    settings: Settings,
) -> dict[str, Any]:
    """Returns what is known of a model so far."""
    facts = info(source.directory)
    own = [r for r in store.records.values() if r.get("model") == name]
    sums: dict[str, list[tuple[float, float]]] = {}
    for record in own:
        for metric, (value, weight) in record["sums"].items():
            sums.setdefault(metric, []).append((value, weight))
    metrics = {metric: _mean(metric, pairs) for metric, pairs in sums.items()}
    scored = store.records.get(f"{name}/score", {"metrics": {}})["metrics"]
    counted = len([r for r in own if r["task"] == "geneval"])
    metrics |= {m: {"mean": v, "standard_error": None, "n": counted} for m, v in scored.items()}
    seconds = {}
    for task in [*samples, "geneval"]:
        if times := [record["seconds"] for record in own if record["task"] == task]:
            median = statistics.median(times)
            seconds[task] = {"median": median, "least": min(times), "most": max(times)}
    return {
        "name": name,
        "path": str(source.directory),
        "kind": _kind(source),
        "parameters": facts.parameters,
        "active": _active(source, facts.active, settings),
        "metrics": metrics,
        "seconds": seconds,
    }


def _active(source: Checkpoint, stated: int | None, settings: Settings) -> int | None:
    """Returns the active parameters of a token, mean over the steps of an image."""
    if stated is None or source.top_k is None or settings.top_k is None:
        return stated
    config = settings.config()
    times = timestep_grid(config.num_timesteps, config.timestep_shift)[:-1].tolist()
    steps = [config.top_k_at(time) or source.top_k for time in times]
    ffns = [ffn for layers in source.ffns.values() for ffn in layers.values()]
    expert = sum(3 * f.hidden_size * f.layout.expert_width for f in ffns if f.layout is not None)
    return round(stated + (statistics.fmean(steps) - source.top_k) * expert)


def _mean(metric: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Returns sum over weight of all samples, with its standard error over them."""
    total, weight, n = (sum(column) for column in zip(*((v, w, 1) for v, w in pairs), strict=True))
    mean = total / weight
    # Of a ratio of sums; each sample counts as much as its weight says.
    spread = math.sqrt(sum((v - mean * w) ** 2 for v, w in pairs) * n / max(1, n - 1)) / weight
    if metric == "perplexity":
        mean = perplexity(total, weight)
        spread *= mean
    return {"mean": mean, "standard_error": spread if n > 1 else None, "n": n}


def _kind(source: Checkpoint) -> str:
    modes = {step.config.mode for step in source.recipe}
    words = {
        "pruned": bool(modes & {"width", "heads", "depth"}),
        "sparse": bool(source.experts),
        "tuned": "adapt" in modes,
    }
    return " ".join(word for word, holds in words.items() if holds) or "dense"


def write_collage(
    folder: Path, models: Sequence[str], samples: Mapping[str, Sequence[Sample]]
) -> None:
    """Draws the first images of each task, a row per model, into `collage-TASK.png`."""
    draw, image = optional("PIL.ImageDraw"), optional("PIL.Image")
    font = optional("PIL.ImageFont").load_default(12)
    for task in [task for task in samples if task in _DRAWN]:
        shown = samples[task][:_SHOWN]
        left, top, gap = 150, 40, 4
        width, height = left + len(shown) * (_SIDE + gap), top + len(models) * (_SIDE + gap)
        sheet = image.new("RGB", (width, height), "white")
        pen = draw.Draw(sheet)
        for column, sample in enumerate(shown):
            lines = textwrap.wrap(sample.prompt, 24)[:2]
            pen.text((left + column * (_SIDE + gap), 4), "\n".join(lines), "black", font)
        for row, model in enumerate(models):
            at = top + row * (_SIDE + gap)
            pen.text((4, at + _SIDE // 2), model[:22], "black", font)
            for column in range(len(shown)):
                picture = open_image(image_path(folder, model, task, column), where="collage")
                kind = image.NEAREST if max(picture.size) < _SIDE else image.LANCZOS
                shrunk = optional("PIL.ImageOps").contain(picture, (_SIDE, _SIDE), kind)
                sheet.paste(shrunk, (left + column * (_SIDE + gap), at))
        sheet.save(folder / f"collage-{task}.png")


def _write_answers(
    store: Store, models: Sequence[str], samples: Mapping[str, Sequence[Sample]]
) -> None:
    """Writes questions with the answers of all models into `answers.jsonl`."""
    lines = []
    for index, sample in enumerate(samples.get(Task.UNDERSTANDING.value, ())):
        names = {model: f"{model}/{Task.UNDERSTANDING.value}/{index:05}" for model in models}
        answers = {model: store.records[name]["answer"] for model, name in names.items()}
        line = {"question": sample.prompt, "expected": sample.answer, "answers": answers}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if lines:
        files.replace_file(store.folder / "answers.jsonl", "".join(lines).encode())
