# SPDX-License-Identifier: Apache-2.0
"""The paper's study in miniature: probing without training, sparse models and their tuning.

For each task and seed there are parts, each one JSON file, written when it is done; a study that
was interrupted goes on with the parts that are missing. The dense model is the same for all seeds;
a seed stands for calibration samples, random partitions, tuning data and the noise and scenes of
the evaluation.

    dense          the dense model, and the same after as many extra steps as the sparse ones get
    probe          und and gen, narrower and shallower, untrained
    sparse-E-K     gen FFNs of E experts, K active: untrained, then tuned stage after stage
    random-16-8, coactivation-16-8
                   the same with a random partition, and with neurons together that fire together
    static         control: the better half of the gen neurons, the same for all tokens, and the
                   same number of steps; experts are frozen in its first two stages
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from miniature.data import training_data
from miniature.evaluate import EvaluationConfig, answers, evaluate, generate
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
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.experts.layout import Partition
from sparse_unified.mini.model import MiniTask, mini_config, trained_weights
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

SPARSE = ((16, 8), (32, 16))
PARTS = (
    "dense",
    "probe",
    *(f"sparse-{e}-{k}" for e, k in SPARSE),
    "random-16-8",
    "coactivation-16-8",
    "static",
)
STAGES = ("router", "expert_frozen", "full")
WIDTHS = {"und": (0.5, 0.25, 0.1), "gen": (0.75, 0.5, 0.25, 0.1)}
DEPTHS = (1, 2, 3)
_CALIBRATION = 32  # pictures, and questions
_INPUTS = 512  # tokens that routers are fitted to

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """How long the study is.

    Args:
        seeds: of the repetitions.
        steps: of each stage of tuning, three in all; batch_size: sequences of a step.
        router_learning_rate, learning_rate: of the first and of the other stages.
        questions, velocities, pictures: see `EvaluationConfig`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 60
    batch_size: int = 32
    router_learning_rate: float = 3e-3
    learning_rate: float = 5e-4
    questions: int = 150
    velocities: int = 300
    pictures: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the study; it is one file."""

    task: MiniTask
    seed: int
    name: str

    @property
    def file_name(self) -> str:
        return f"{self.task.value}-{self.seed}-{self.name}.json"


def run_study(
    out: str | os.PathLike[str],
    config: StudyConfig | None = None,
    *,
    tasks: tuple[MiniTask, ...] = tuple(MiniTask),
    names: tuple[str, ...] = PARTS,
    jobs: int = 1,
    weights: Mapping[MiniTask, Mapping[str, torch.Tensor]] | None = None,
    progress: Callable[[Part, int, int], object] | None = None,
) -> list[Path]:
    """Runs the parts that are missing in `out`.

    Args:
        out: folder of the records; it may hold those of an earlier run with the same config.
        tasks, names: what to run of the study; all of it unless they are given.
        jobs: processes; each computes with one thread if there are several.
        weights: of the dense models; None is what the package holds.
        progress: called with each part that was run, and how many of how many there are now.

    Returns:
        The files of all parts.

    Raises:
        ValueError: a record of `out` is of another configuration.
    """
    config = config or StudyConfig()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        Part(task=task, seed=seed, name=name)
        for seed in config.seeds
        for name in names
        for task in tasks
    ]
    missing = [part for part in wanted if not _is_done(out / part.file_name, config)]
    run = partial(_run_part, out=out, config=config, weights=weights)
    done = len(wanted) - len(missing)
    for part in _run_all(run, missing, jobs):
        done += 1
        if progress is not None:
            progress(part, done, len(wanted))
    return [out / part.file_name for part in wanted]


def _run_all(run: Callable[[Part], Part], missing: list[Part], jobs: int) -> Iterator[Part]:
    if jobs == 1:
        yield from map(run, missing)
        return
    # Forked children would inherit locks of torch's threads.
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for future in as_completed([pool.submit(run, part) for part in missing]):
            yield future.result()


def _is_done(path: Path, config: StudyConfig) -> bool:
    if not path.is_file():
        return False
    stated = json.loads(path.read_text(encoding="utf-8"))["config"]
    wanted = _without_seeds(config)
    if stated != wanted:
        raise ValueError(f"{path}: config must be that of this study, {wanted}, got {stated}")
    return True


def _without_seeds(config: StudyConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "seeds"}


def _run_part(
    part: Part,
    *,
    out: Path,
    config: StudyConfig,
    weights: Mapping[MiniTask, Mapping[str, torch.Tensor]] | None,
) -> Part:
    model = Bagel(mini_config(part.task))
    model.load_state_dict(trained_weights(part.task) if weights is None else weights[part.task])
    study = _Study(part, model, config)
    if part.name == "dense":
        results = study.dense()
    elif part.name == "probe":
        results = study.probe()
    elif part.name == "static":
        results = study.static()
    else:
        kind, experts, active = part.name.split("-")
        partition = Partition.SNAKE if kind == "sparse" else Partition(kind)
        results = study.sparse(int(experts), int(active), partition)
    record = {
        "task": part.task.value,
        "seed": part.seed,
        "part": part.name,
        "config": _without_seeds(config),
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
    """One part: the dense model of a task, and what is made of it."""

    def __init__(self, part: Part, model: Bagel, config: StudyConfig) -> None:
        self.task, self.seed, self.config = part.task, part.seed, config
        self.model = model
        self.data = training_data(self.task)

    def dense(self) -> dict[str, Metrics]:
        results = {"dense": self._evaluate()}
        for number in range(len(STAGES)):
            freeze(self.model, "full")
            self._tune(number, self.config.learning_rate)
        return results | {"extra": self._evaluate()}

    def probe(self) -> dict[str, Metrics]:
        """Keys: component, axis, what is left or gone, and the task that scored it."""
        found = {task: self._calibrate(task) for task in ("generation", "understanding")}
        results: dict[str, Metrics] = {}
        for task, (statistics, similarity) in found.items():
            own = ("und", "gen") if task == "generation" else ("und",)
            scores = score("activation", self.model, statistics, tasks=[task])
            for component in own:
                ranking = _by_layer(scores[component])
                for keep in WIDTHS[component]:
                    prune_width_(
                        self.model,
                        PruneWidthConfig(component=component, keep_ratio=keep),
                        ranking,
                    )
                    results[f"{component}-width-{keep:g}-{task}"] = self._evaluate()
                    restore_(self.model)
                for count in DEPTHS:
                    layers = similarity.redundant(component, count)
                    skip_layers_(self.model, SkipLayersConfig(component=component, layers=layers))
                    results[f"{component}-depth-{count}-{task}"] = self._evaluate()
                    restore_(self.model)
        return results

    def sparse(self, experts: int, active: int, partition: Partition) -> dict[str, Metrics]:
        statistics, _ = self._calibrate("generation")
        scores = score("activation", self.model, statistics, tasks=["generation"])
        apply_moe_(
            self.model,
            MoEConfig(
                num_experts=experts,
                top_k=active,
                component="gen",
                layers="all",
                partition=partition,
                seed=self.seed,
            ),
            _by_layer(scores["gen"]),
            inputs=(
                _by_layer(statistics.inputs("gen", ["generation"]))
                if partition is Partition.COACTIVATION
                else None
            ),
            keep_dense=False,
        )
        results = {"zero": self._evaluate()}
        init_router_(self.model, "activation", statistics=statistics, tasks=["generation"])
        results["untrained"] = self._evaluate()
        for number, stage in enumerate(STAGES):
            freeze(self.model, stage)
            rate = self.config.router_learning_rate if stage == "router" else None
            self._tune(number, rate or self.config.learning_rate)
            results[stage] = self._evaluate()
        return results

    def static(self) -> dict[str, Metrics]:
        statistics, _ = self._calibrate("generation")
        scores = score("activation", self.model, statistics, tasks=["generation"])
        prune_width_(
            self.model,
            PruneWidthConfig(component="gen", keep_ratio=0.5),
            _by_layer(scores["gen"]),
            keep_dense=False,
        )
        results = {"untrained": self._evaluate()}
        for number, stage in enumerate(STAGES):
            freeze(self.model, "full")
            if stage != "full":
                for layer in self.model.language_model.model.layers:
                    layer.mlp_moe_gen.requires_grad_(False)
            self._tune(number, self.config.learning_rate)
            results[stage] = self._evaluate()
        return results

    def _evaluate(self) -> Metrics:
        self.model.eval()
        config = EvaluationConfig(
            questions=self.config.questions,
            velocities=self.config.velocities,
            pictures=self.config.pictures,
            seed=self.seed,
        )
        found = evaluate(self.model, self.task, config)
        return {name: round(value, 6) for name, value in found.items()}

    def _tune(self, stage: int, learning_rate: float) -> None:
        config = self.config
        self.model.train()
        Trainer(
            self.model,
            self.data,
            TrainingConfig(
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=learning_rate,
                warmup_steps=min(10, config.steps - 1),
                seed=1 + len(STAGES) * self.seed + stage,
            ),
        ).run()

    def _calibrate(self, task: str) -> tuple[FfnStatistics, Similarity]:
        """Lets the dense model do a task with training data, and watches."""
        generator = torch.Generator().manual_seed(self.seed)
        indices = torch.randint(len(self.data) // 2, (_CALIBRATION,), generator=generator).tolist()
        model = deepcopy(self.model)
        config = StatisticsConfig(num_inputs=_INPUTS)
        with (
            collect(model, task, config=config) as collector,
            measure_similarity(model) as measured,
        ):
            collector.begin(f"{self.task.value}-{self.seed}")
            if task == "generation":
                prompts = [self.data.picture(i, generator)[1] for i in indices]
                seeds = [10**5 * (self.seed + 1) + i for i in range(len(prompts))]
                generate(model, self.task, prompts, seeds)
            else:
                asked = [self.data.questions(i, generator) for i in indices]
                answers(model, [pixels for pixels, _ in asked], [own[0][0] for _, own in asked])
        return collector.statistics(), measured.result()


def _by_layer(values: Mapping[FfnKey, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Returns what belongs to dense FFNs, whose keys are their layers."""
    return {layer: own for layer, own in values.items() if isinstance(layer, int)}
