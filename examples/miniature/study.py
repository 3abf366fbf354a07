# SPDX-License-Identifier: Apache-2.0
"""The paper's study in miniature: probing without training, sparse models and their tuning.

It has three dense models, trained from other seeds. For each of them there are parts, each one JSON
file, written when it is done; a study that was interrupted goes on with the parts that are missing.

    dense        the dense model, and after the same extra steps
    probe        und and gen, narrower and shallower, untrained, scored on either task
    static-1-2, static-1-4, static-1-8
                 controls: the best half, quarter and eighth of the gen neurons (criterion wanda),
                 the same for all tokens
    sparse-E-K-S gen FFNs of E experts, K of them and S shared ones active: half (16-8-0, 32-16-0,
                 24-8-8, 48-16-16), a quarter (28-4-4) and an eighth (30-2-2) of the neurons at a
                 time
    random-16-8-0, coactivation-24-8-8, time-16-8-0
                 a random partition, neurons together that fire together, and routers with a bias
                 for every time of denoising
    frozen-16-8-0, distilled-16-8-0
                 tuned with experts frozen, and pulled to the dense FFNs meanwhile

Sparse and static models are tuned by the same steps of full training with the same data, and
measured on the way. The tuned 16/8 is also measured with other numbers of active experts, and
draws with some that change on the way.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from miniature import scenes
from miniature.data import MiniDataset, write_picture
from miniature.evaluate import (
    SAMPLING,
    EvaluationConfig,
    answers,
    evaluate,
    evaluate_pictures,
    generate,
    routing_information,
)
from sparse_unified.adapt import Trainer, TrainingConfig, freeze, init_router_
from sparse_unified.analysis import (
    FfnStatistics,
    StatisticsConfig,
    collect,
    measure_similarity,
    score,
)
from sparse_unified.analysis.criteria import Similarity
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.sampler import SamplingConfig
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.experts.layout import Partition
from sparse_unified.mini.model import mini_config, trained_weights
from sparse_unified.nn import active_experts
from sparse_unified.surgery import (
    MoEConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.surgery.decoder import FfnKey

HALVES = ("sparse-16-8-0", "sparse-32-16-0", "sparse-24-8-8", "sparse-48-16-16")
STATIC = {"static-1-2": 0.5, "static-1-4": 0.25, "static-1-8": 0.125}
SHARED = {"sparse-24-8-8": 0.5, "sparse-28-4-4": 0.25, "sparse-30-2-2": 0.125}
FROZEN = ("frozen-16-8-0", "distilled-16-8-0")
VARIANTS = ("random-16-8-0", "coactivation-24-8-8", "time-16-8-0", *FROZEN)
ACTIVE = (4, 12, 16)  # experts of a token at run time, of a model tuned with 8
# ... and those that change after half of the steps; 8 on average.
SCHEDULES = {"4, then 12": ((1.0, 4), (0.7, 12)), "12, then 4": ((1.0, 12), (0.7, 4))}
TUNED = (*STATIC, *HALVES, *tuple(SHARED)[1:], *VARIANTS)
PARTS = ("dense", "probe", *TUNED)
TASKS = ("generation", "understanding")
WIDTHS = (0.75, 0.5, 0.25, 0.125)
DEPTHS = (1, 2, 3)
GUIDED = replace(SAMPLING, cfg_text_scale=3.0)
# Prompts of which pictures are kept; training has seen none of them.
SHOWN = (
    "a striped circle",
    "a plain circle and a dotted star",
    "five stars",
    "a yellow dotted heart",
    "a star above a circle",
    "a red star and a blue cross",
)
_CALIBRATION = 96  # pictures, and questions
_INPUTS = 512  # tokens that routers are fitted to

Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """How long the study is.

    Args:
        models: seeds that the dense models were trained with.
        steps: of full tuning after which sparse and static models are measured; 0 is untrained.
        batch_size: sequences of a step; learning_rate: at its start, falling as a cosine.
        evaluation: how much is evaluated; its seed is that of the model.
    """

    models: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, ...] = (0, 180, 600, 2000)
    batch_size: int = 16
    learning_rate: float = 3e-4
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPart:
    """One part of the study; it is one file."""

    model: int
    name: str

    @property
    def file_name(self) -> str:
        return f"{self.model}-{self.name}.json"


def run_study(
    out: str | os.PathLike[str],
    config: StudyConfig | None = None,
    *,
    names: tuple[str, ...] = PARTS,
    jobs: int = 1,
    weights: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    progress: Callable[[StudyPart, int, int], object] | None = None,
) -> list[Path]:
    """Runs the parts that are missing in `out`.

    Args:
        out: folder of the records; it may hold those of an earlier run with the same config.
        names: what to run of the study; all of it unless they are given.
        jobs: processes; each computes with one thread if there are several.
        weights: of the dense models by seed; None is what the package holds.
        progress: called with each part that was run, and how many of how many there are now.

    Returns:
        The files of all parts.

    Raises:
        ValueError: a record of `out` is of another configuration.
    """
    config = config or StudyConfig()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = [StudyPart(model=model, name=name) for model in config.models for name in names]
    missing = [part for part in wanted if not _is_done(out / part.file_name, config)]
    run = partial(_run_part, out=out, config=config, weights=weights)
    done = len(wanted) - len(missing)
    for part in _run_all(run, missing, jobs):
        done += 1
        if progress is not None:
            progress(part, done, len(wanted))
    return [out / part.file_name for part in wanted]


def _run_all(
    run: Callable[[StudyPart], StudyPart], missing: list[StudyPart], jobs: int
) -> Iterator[StudyPart]:
    if jobs == 1:
        yield from map(run, missing)
        return
    # Forked children would inherit locks of torch's threads.
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            for future in as_completed([pool.submit(run, part) for part in missing]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_done(path: Path, config: StudyConfig) -> bool:
    if not path.is_file():
        return False
    stated = json.loads(path.read_text(encoding="utf-8"))["config"]
    wanted = _stated(config)
    if stated != wanted:
        raise ValueError(f"{path}: config must be that of this study, {wanted}, got {stated}")
    return True


def _stated(config: StudyConfig) -> dict[str, Any]:
    """Returns the configuration as a record holds it, without the models."""
    named = asdict(config)
    del named["models"]
    return json.loads(json.dumps(named))


def _run_part(
    part: StudyPart,
    *,
    out: Path,
    config: StudyConfig,
    weights: Mapping[int, Mapping[str, torch.Tensor]] | None,
) -> StudyPart:
    start = time.perf_counter()
    model = Bagel(mini_config())
    model.load_state_dict(trained_weights(part.model) if weights is None else weights[part.model])
    study = _Study(part.model, model, config, out)
    results = study.probe() if part.name == "probe" else study.tuned(part.name)
    record = {
        "model": part.model,
        "part": part.name,
        "config": _stated(config),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {
            "sparse_unified": version("sparse_unified"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "results": results,
    }
    # Last and at once, so that a part that has a file is complete.
    replace_file(out / part.file_name, (json.dumps(record, indent=1) + "\n").encode())
    return part


class _Study:
    """One part: a dense model, and what is made of it."""

    def __init__(self, seed: int, model: Bagel, config: StudyConfig, out: Path) -> None:
        self.seed, self.config, self.out = seed, config, out
        self.model = model

    def probe(self) -> dict[str, Metrics]:
        """Keys: component, axis, what is left or gone, and the task that scored it."""
        results: dict[str, Metrics] = {}
        for task in TASKS:
            statistics, similarity = calibrate(self.model, task, self.seed)
            scores = score("wanda", self.model, statistics, tasks=[task])
            for component in ("und", "gen") if task == "generation" else ("und",):
                ranking = _by_layer(scores[component])
                for keep in WIDTHS:
                    cut = PruneWidthConfig(component=component, keep_ratio=keep)
                    prune_width_(self.model, cut, ranking)
                    results[f"{component}-width-{keep:g}-{task}"] = self._evaluate()
                    restore_(self.model)
                for count in DEPTHS:
                    layers = similarity.redundant(component, count)
                    skip_layers_(self.model, SkipLayersConfig(component=component, layers=layers))
                    results[f"{component}-depth-{count}-{task}"] = self._evaluate()
                    restore_(self.model)
        return results

    def tuned(self, name: str) -> dict[str, Metrics]:
        """Makes the gen FFNs static or sparse, or leaves them dense, and tunes."""
        if name == "dense":
            return self._tune(name)
        statistics, _ = calibrate(self.model, "generation", self.seed)
        if name in STATIC:
            make_static_(self.model, statistics, STATIC[name])
            return self._tune(name)
        kind, *numbers = name.split("-")
        experts, active, shared = map(int, numbers)
        config = MoEConfig(
            num_experts=experts,
            top_k=active,
            num_shared_experts=shared,
            layers="all",
            partition=Partition(kind) if kind in set(Partition) else Partition.SNAKE,
            time_router=kind == "time",
            seed=self.seed,
        )
        make_sparse_(self.model, statistics, config)
        results = self._tune(name)
        results["routing"] = routing_information(self.model, self._evaluation())
        if name == "sparse-16-8-0":
            for top_k in ACTIVE:
                with active_experts(self.model, top_k):
                    results[f"top_k {top_k}"] = self._evaluate()
            for words, schedule in SCHEDULES.items():
                sampling = replace(SAMPLING, top_k=schedule)
                found = evaluate_pictures(self.model, self._evaluation(), sampling)
                results[f"top_k {words}"] = found
        return results

    def _tune(self, name: str) -> dict[str, Metrics]:
        """Trains and evaluates after as many steps as stated, at the end with guidance.

        The last pictures of `SHOWN` are written beside the record.
        """
        config, results = self.config, {}

        def measure(step: int) -> None:
            if step in config.steps:
                results[str(step)] = self._evaluate()
                self.model.train()

        measure(0)
        freeze(self.model, "expert_frozen" if name in FROZEN else "full")
        self.model.train()
        training = TrainingConfig(
            steps=config.steps[-1],
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=min(20, config.steps[-1] - 1),
            distill_weight=float(name == "distilled-16-8-0"),
            seed=100 + self.seed,
        )
        Trainer(self.model, MiniDataset(), training).run(lambda record: measure(record.step))
        results["guided"] = self._evaluate(GUIDED)
        pictures = generate(self.model, SHOWN, range(len(SHOWN)))
        write_picture(self.out / f"{self.seed}-{name}.png", torch.cat(list(pictures), dim=-1))
        return results

    def _evaluation(self) -> EvaluationConfig:
        return replace(self.config.evaluation, seed=self.seed)

    def _evaluate(self, sampling: SamplingConfig = SAMPLING) -> Metrics:
        self.model.eval()
        return evaluate(self.model, self._evaluation(), sampling)


def calibrate(model: Bagel, task: str, seed: int = 0) -> tuple[FfnStatistics, Similarity]:
    """Lets the dense model do a task with training data, and watches."""
    data, generator = MiniDataset(), torch.Generator().manual_seed(seed)
    config = StatisticsConfig(num_inputs=_INPUTS)
    with (
        collect(model, task, config=config) as collector,
        measure_similarity(model) as measured,
    ):
        collector.begin(f"miniature-{seed}")
        if task == "generation":
            prompts = [data.scene(i, generator)[1] for i in range(_CALIBRATION)]
            generate(model, prompts, [10**5 * (seed + 1) + i for i in range(len(prompts))])
        else:
            asked = [data.questions(i, generator)[0] for i in range(_CALIBRATION)]
            answers(model, [scenes.render(q.objects) for q in asked], [q.text for q in asked])
    return collector.statistics(), measured.result()


def make_static_(model: Bagel, statistics: FfnStatistics, keep_ratio: float) -> None:
    """Keeps the best neurons of every gen FFN (criterion wanda), the same for all tokens."""
    ranking = _by_layer(score("wanda", model, statistics)["gen"])
    cut = PruneWidthConfig(component="gen", keep_ratio=keep_ratio)
    prune_width_(model, cut, ranking, keep_dense=False)


def make_sparse_(model: Bagel, statistics: FfnStatistics, config: MoEConfig) -> None:
    """Makes every gen FFN sparse, with routers fitted to the calibration data."""
    ranking = _by_layer(score("wanda", model, statistics)["gen"])
    inputs = _by_layer(statistics.inputs("gen", ["generation"]))
    clustered = config.partition is Partition.COACTIVATION
    apply_moe_(model, config, ranking, inputs=inputs if clustered else None, keep_dense=False)
    init_router_(model, "activation", statistics=statistics, tasks=["generation"])


def _by_layer(values: Mapping[FfnKey, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Returns what belongs to dense FFNs, whose keys are their layers."""
    return {layer: own for layer, own in values.items() if isinstance(layer, int)}
