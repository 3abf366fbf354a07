# SPDX-License-Identifier: Apache-2.0
"""How important the neurons of a FFN are, by weights and by what they did on a task, and layers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import Report, StrPath, check_int, list_some, naming
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.checkpoint.files import NUMBER, has_form, read_json
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.safetensors_io import save_tensors
from sparse_unified.checkpoint.scores import ORIGIN, read_origin
from sparse_unified.experts.keep import check_scores, column_norms, magnitude_scores, random_scores
from sparse_unified.surgery.decoder import Block, Ffn, FfnKey, find_adapter, hash_ffns
from sparse_unified.surgery.prune import join_experts

NeuronScores = dict[str, dict[FfnKey, Tensor]]
Criterion = Callable[[Ffn, Callable[[], Tensor], int], Tensor]


def _random(ffn: Ffn, mean_abs: Callable[[], Tensor], seed: int) -> Tensor:
    if ffn.is_expert:  # several in a layer, each with its own draw
        seed += int.from_bytes(hashlib.sha256(ffn.name.encode()).digest()[:6], "little")
    return random_scores(ffn.intermediate_size, seed=seed, layer=ffn.layer)


def _column_norms(down_proj: Tensor) -> Tensor:
    return column_norms(down_proj, torch.float64).cpu()


# A criterion maps (FFN, function that returns the mean of |h| [I] fp64, seed) to scores [I]; the
# larger, the more important. One that never asks for the mean needs no statistics.
CRITERIA: Mapping[str, Criterion] = {
    "activation": lambda ffn, mean_abs, seed: mean_abs(),
    "wanda": lambda ffn, mean_abs, seed: mean_abs() * _column_norms(ffn.down_proj),
    "magnitude": lambda ffn, mean_abs, seed: magnitude_scores(
        ffn.gate_proj, ffn.up_proj, ffn.down_proj
    ),
    "random": _random,
    # NOTE: the fault of the official code, kept for comparison: on packed 2-D input its mean runs
    # over neurons too, so every neuron gets the same number, and the column norm alone ranks.
    "reference": lambda ffn, mean_abs, seed: mean_abs().mean() * _column_norms(ffn.down_proj),
}


def score(
    criterion: str | Criterion,
    model: object,
    statistics: FfnStatistics | None = None,
    *,
    tasks: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    seed: int = 0,
) -> NeuronScores:
    """Scores every neuron; the larger, the more important.

        scores = score("wanda", model, statistics)
        prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=0.5), scores["gen"])

    Args:
        criterion: a name of `CRITERIA`, or a function such as those there.
        model: a model, pipeline or adapter.
        statistics: of this very model; for criteria that need none, None.
        tasks: their means are averaged, with equal weights; None is all that the statistics hold.
        components: None is all of the statistics, or of the model without any.
        seed: of the criterion `random`.

    Returns:
        component -> key of the FFN (its layer; (layer, path) for experts) -> scores [I] fp32 on the
        CPU, as `apply_moe_`, `prune_width_` and, through `save_scores`, `convert` take them.

    Raises:
        ValueError: statistics are missing or of another model, or a FFN has seen no token.
    """
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "score")
    chosen = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    if chosen is None:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {name!r}")
    adapter = find_adapter(model)
    used: Sequence[str] = ()
    if statistics is not None:
        statistics.check(adapter)
        used = statistics.tasks if tasks is None else tasks
        if not used or not set(used) <= set(statistics.tasks):
            legal = ", ".join(statistics.tasks)
            raise ValueError(f"{name}: tasks must be of {legal}, got {list_some(used)}")
        if components is None:
            first, *others = map(statistics.components, used)
            components = [c for c in first if all(c in held for held in others)]

    def mean_abs(ffn: Ffn) -> Tensor:
        ffns = statistics.ffns if statistics is not None else {}
        sums = [ffns.get((task, ffn.component, ffn.key)) for task in used]
        if not sums or None in sums:
            raise ValueError("statistics must be given of it, got none")
        return torch.stack([own.mean_abs() for own in sums if own]).mean(0)

    scores: NeuronScores = {}
    for component in adapter.components if components is None else components:
        scores[component] = {}
        for ffn in adapter.ffns(component):
            with naming(f"{name}: {ffn.name}"):
                own = chosen(ffn, partial(mean_abs, ffn), seed).to("cpu", torch.float32)
                check_scores(own, ffn.intermediate_size)
            scores[component][ffn.key] = own
    return scores


def save_scores(
    path: StrPath,
    scores: Mapping[str, Mapping[FfnKey, Tensor]],
    *,
    criterion: str = "given",
    statistics: FfnStatistics | None = None,
    model: object = None,
    similarity: Similarity | None = None,
) -> None:
    """Writes scores as a file that `convert` and `prune` take with `--scores`.

    Of a sparse layer, the scores of its experts are joined in expert order, the shared one first.
    The file says where they come from; `convert` and `prune` refuse those of another model.

    Args:
        path: of the file; one that is there is replaced.
        scores: of `score`.
        criterion: what they are.
        statistics: they are computed from.
        model: they are of; None takes the hashes of the statistics.
        similarity: of the layers, by which `prune --axis depth --keep-ratio` chooses.

    Raises:
        ValueError: there are none, or a component is not one of a checkpoint.
    """
    if not set(scores) <= set(FFN_NAMES):
        raise ValueError(
            f"{path}: component must be one of {', '.join(FFN_NAMES)}, got {', '.join(scores)}"
        )
    joined = {component: join_experts(keyed) for component, keyed in scores.items()}
    tensors = {f"{c}.{layer}": own for c, layers in joined.items() for layer, own in layers.items()}
    if not tensors:
        raise ValueError(f"{path}: scores must be given for at least one layer, got none")
    origin = {
        "criterion": criterion,
        "samples": {t: len(own) for t, own in statistics.samples.items()} if statistics else {},
        "model_hashes": dict(statistics.model_hashes) if statistics else {},
        "similarity": list(similarity.layers) if similarity else [],
    }
    if model is not None:
        origin["model_hashes"] = {component: hash_ffns(model, component) for component in scores}
    save_tensors(Path(path), tensors, {ORIGIN: json.dumps(origin)})


# Layers, of which those go first that change the least of what passes through them. With
# x1 = x + attention(norm(x)) and y = x1 + ffn(norm(x1)), for every token,
#
#     attention = cos(x, x1)      ffn = cos(x1, y)      block = cos(x, y)
#
# averaged over the tokens of a component: after the residual add, so that 1 is a part that changes
# no direction.


PARTS = ("block", "attention", "ffn")
_ENTRY = {"component": (str,), "layer": (int,), "tokens": (int,), **dict.fromkeys(PARTS, NUMBER)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity(Report):
    """What `measure_similarity` has seen.

    Attributes:
        layers: component by component, each layer that has seen tokens: `component`, `layer`,
            number of `tokens`, and the mean cosines `block`, `attention` and `ffn`.
    """

    layers: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, path: Path) -> Similarity:
        """Reads a file that holds `to_json`; ValueError if it is missing or damaged."""
        found = read_json(path)
        if not has_form(found, {"layers": [_ENTRY]}):
            raise ValueError(f"{path}: layers must be cosines of each layer, got {found!r:.240}")
        return cls(layers=tuple(found["layers"]))

    @classmethod
    def of_scores(cls, path: StrPath) -> Similarity:
        """Returns what `calibrate --scores` has measured; ValueError if the file has none."""
        layers = (read_origin(path) or {"similarity": []})["similarity"]
        if not layers or not has_form(layers, [_ENTRY]):
            raise ValueError(
                f"{path}: scores must hold the similarity of layers, as calibrate writes it, "
                "got none"
            )
        return cls(layers=tuple(layers))

    def left_out(
        self, component: str, keep_ratio: float, part: str, layers: Sequence[int] | None
    ) -> tuple[int, ...]:
        """Returns the `redundant` layers where max(1, round(keep_ratio * N)) of N stay."""
        count = len(self.cosines(component, part, layers))
        if not count:
            raise ValueError(f"similarity: layers of {component} must have seen tokens, got none")
        return self.redundant(component, count - max(1, round(keep_ratio * count)), part, layers)

    def cosines(
        self, component: str, part: str = "block", layers: Sequence[int] | None = None
    ) -> dict[int, float]:
        """Returns the cosine of a part in each layer that has seen tokens; `layers` None is all."""
        return {
            own["layer"]: float(own[part])
            for own in self.layers
            if own["component"] == component and (layers is None or own["layer"] in layers)
        }

    def redundant(
        self,
        component: str,
        count: int,
        part: str = "block",
        layers: Sequence[int] | None = None,
    ) -> tuple[int, ...]:
        """Returns the `count` layers whose part of `PARTS` changes the least, ascending.

        ValueError if not so many of the layers have seen tokens, or a cosine is not a number.
        """
        values = self.cosines(component, part, layers)
        check_int(f"similarity: count of layers of {component}", count, 0, len(values))
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"similarity: {part} of {component} must be finite, got {values}")
        ranked = sorted(values, key=lambda layer: (-values[layer], layer))
        return tuple(sorted(ranked[:count]))

    def headings(self) -> Sequence[str]:
        return ("component", "layer", *PARTS, "tokens")

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (e["component"], e["layer"], *(f"{e[part]:.4f}" for part in PARTS), e["tokens"])
            for e in self.layers
        ]


class Measurement:
    """What `measure_similarity` yields; `result()` is read after the runs."""

    def __init__(self) -> None:
        # Of each component and layer, tokens and sums [3] fp64, on the device of the model.
        self.found: dict[tuple[str, int], tuple[int, Any]] = {}

    def result(self) -> Similarity:
        """Returns the similarities of all layers that have seen tokens; ValueError if none has."""
        layers = []
        for (component, layer), (tokens, sums) in self.found.items():
            if tokens:
                means = dict(zip(PARTS, (sums / tokens).tolist(), strict=True))
                layers.append({"component": component, "layer": layer, "tokens": tokens, **means})
        if not layers:
            raise ValueError("measure_similarity: model must run on tokens meanwhile, got none")
        return Similarity(layers=tuple(layers))

    def watch(self, key: tuple[str, int], block: Block) -> Iterator[Any]:
        """Hooks the block of a component and layer; yields the handles."""
        stream: dict[str, Tensor] = {}
        self.found[key] = (0, 0.0)

        def leave(module: object, args: tuple[Any, ...], output: Any) -> None:
            branch = output[0] if isinstance(output, tuple) else output
            x, x1 = (stream.pop(name).detach().flatten(0, -2) for name in ("x", "x1"))
            y = x1 + branch.detach().reshape(x1.shape)
            cosines = [  # in the order of PARTS
                F.cosine_similarity(a.float(), b.float(), dim=-1).sum(dtype=torch.float64)
                for a, b in ((x, y), (x, x1), (x1, y))
            ]
            tokens, sums = self.found[key]
            self.found[key] = (tokens + len(x1), sums + torch.stack(cosines))

        for name, norm in (("x", block.input_norm), ("x1", block.post_attention_norm)):
            keep = partial(lambda name, _, given: stream.update({name: given[0]}), name)
            yield norm.register_forward_pre_hook(keep)
        yield block.ffn.register_forward_hook(leave)


@contextmanager
def measure_similarity(
    model: object, components: Sequence[str] | None = None
) -> Iterator[Measurement]:
    """Inside, every forward of the model adds to the similarities of its blocks; it is unchanged.

        with measure_similarity(model) as measured:
            model(**batch)
        print(measured.result().to_text())

    Layers that skip a part are left out. Costs a few reads of the residual stream; sums stay on the
    device until `result()`.

    Args:
        model: a model, a pipeline, or an adapter.
        components: to measure; None is all.
    """
    adapter, measurement = find_adapter(model), Measurement()
    with ExitStack() as hooks:
        for component in adapter.components if components is None else components:
            for layer in range(adapter.num_layers()):
                if adapter.holds(layer, component):
                    block = adapter.block(layer, component)
                    for handle in measurement.watch((component, layer), block):
                        hooks.enter_context(handle)
        yield measurement
