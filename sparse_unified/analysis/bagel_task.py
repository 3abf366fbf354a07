# SPDX-License-Identifier: Apache-2.0
"""The three tasks of a BAGEL pipeline: how they run, what they are measured by, and GenEval."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import Progress, StrPath, check_int, choice, context
from sparse_unified.analysis.evaluators import Evaluator, Probe, directions
from sparse_unified.analysis.samples import Sample, Task, read_lines
from sparse_unified.bagel import BagelPipeline, Guidance, SamplingConfig
from sparse_unified.bagel.attention import KVCache
from sparse_unified.bagel.images import open_image
from sparse_unified.bagel.pipeline import TextResult, choose_sizes
from sparse_unified.bagel.sampler import Renorm, build_guidance, initial_noise, see_images
from sparse_unified.bagel.vision import patchify
from sparse_unified.checkpoint.files import read_object, replace_file
from sparse_unified.nn import active_experts

_MAX_LOSS = 700.0  # exp of more is no double
# Fields of `Settings` that are arguments of `generate`; those of guidance are official where None.
GUIDANCE = (
    *("timestep_shift", "cfg_text_scale", "cfg_img_scale"),
    *("cfg_interval", "cfg_renorm_min", "cfg_renorm_type"),
)
_OPTIONAL = (*GUIDANCE, "top_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much the built-in evaluators compute.

    The last seven are fields of `SamplingConfig`; None is the official value for text to image or
    for editing.

    Args:
        size: height and width of generated images in pixels; None is what `generate` takes.
        num_timesteps: points of the time grid of whole generations.
        times: at which the velocity is measured on held-out pairs, 1 being noise.
        max_length: most tokens of an answer, its start marker included.
        batch_size: most images computed together.
        timestep_shift: above 1 has more noise for longer (default: the official value)
        cfg_text_scale: of classifier-free guidance: weight of the prompt; 1 is none (default: the
            official value)
        cfg_img_scale: weight of the image (default: the official value)
        cfg_interval: times at which guidance is on (default: the official value)
        cfg_renorm_min: least factor of the renormalisation (default: the official value)
        cfg_renorm_type: what guidance is renormalised over (default: the official value)
        top_k: routed experts of a token; None is those of the model.
    """

    size: tuple[int, int] | None = None
    num_timesteps: int = 25
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    max_length: int = 64
    batch_size: int = 4
    timestep_shift: float | None = None
    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_min: float | None = None
    cfg_renorm_type: Renorm | None = None
    top_k: int | tuple[tuple[float, int], ...] | None = None

    def __post_init__(self) -> None:
        with context("Settings"):
            check_int("max_length", self.max_length, 2)
            check_int("batch_size", self.batch_size, 1)
            if not self.times or not all(0 < time <= 1 for time in self.times):
                raise ValueError(f"times must be above 0 and at most 1, got {self.times}")
            self.config()

    def config(self) -> SamplingConfig:
        """Returns how images are sampled from texts."""
        return SamplingConfig(num_timesteps=self.num_timesteps, **self.guidance())

    def guidance(self) -> dict[str, Any]:
        """Returns the fields of sampling that are not the official ones."""
        return {n: value for n in _OPTIONAL if (value := getattr(self, n)) is not None}

    def sampling(self) -> dict[str, Any]:
        """Returns the arguments of `generate`."""
        own = {"size": self.size, "num_timesteps": self.num_timesteps}
        return {**own, **self.guidance(), "batch_size": self.batch_size, "progress": False}

    def stated(self) -> dict[str, Any]:
        """Returns plain values, those of guidance only where they are not the official ones."""
        return {k: v for k, v in asdict(self).items() if k not in _OPTIONAL} | self.guidance()


def settings_in_words(stated: Mapping[str, Any]) -> str:
    """Returns what `Settings.stated` gave, and whether guidance and shift are the official ones."""
    words = ", ".join(f"{name} {value}" for name, value in stated.items())
    return words if stated.keys() & set(GUIDANCE) else f"{words}, official guidance and shift"


# Running


def run_task(
    model: Any,
    task: str,
    samples: Sequence[Any],
    begin: Callable[[str], object] | None = None,
    run: Callable[[Any], object] | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> None:
    """Runs a model on samples, one after the other; arguments as in `calibrate`.

    `begin` is called before each sample with its fingerprint, or its number if it has none.
    """
    if not samples:
        raise ValueError("samples must be at least one, got none")
    settings = settings or Settings()
    if run is None:
        if not isinstance(model, BagelPipeline):
            kind = type(model).__name__
            raise ValueError(f"model must be a BagelPipeline, or come with run, got a {kind} alone")
        is_text = choice("task", Task, task) is Task.UNDERSTANDING
        run = partial(answer if is_text else generate_samples, model, settings)
    show = progress or (lambda *_: None)
    for index, sample in enumerate(samples):
        show(index, len(samples))
        if begin is not None:
            begin(sample.fingerprint() if isinstance(sample, Sample) else str(index))
        run(sample)
    show(len(samples), len(samples))


def answer(pipeline: BagelPipeline, settings: Settings, sample: Sample) -> TextResult:
    """Gives the likeliest answer to a question."""
    images = _open_all(sample)
    return pipeline.chat(sample.prompt, images=images, max_length=settings.max_length)


def generate_samples(pipeline: BagelPipeline, settings: Settings, *samples: Sample) -> Any:
    """Generates or edits an image for each sample, all in one call."""
    return pipeline.generate(
        [sample.prompt for sample in samples],
        images=[_open_all(sample) for sample in samples],
        seed=[sample.seed for sample in samples],
        **settings.sampling(),
    )


def _open_all(sample: Sample) -> list[Any]:
    return [open_image(path, where="samples") for path in sample.sources]


def guidance_of(pipeline: BagelPipeline, sample: Sample) -> Guidance:
    """Prefills the contexts that an image is generated from."""
    looks = [pipeline.image_processor.encode(image, vae=True) for image in _open_all(sample)]
    ids = pipeline.tokenizer.encode(sample.prompt)
    return build_guidance(pipeline.model, [ids], images=[looks])[0]


def question_context(pipeline: BagelPipeline, sample: Sample, looks: Any = None) -> KVCache:
    """Prefills the context that a text is to follow; `looks` are its images, if prepared."""
    if looks is None:
        looks = [pipeline.image_processor.encode(image, vae=False) for image in _open_all(sample)]
    contexts = pipeline.model.new_contexts(1)
    see_images(pipeline.model, contexts, [looks])
    pipeline.model.prefill_text(contexts, [pipeline.tokenizer.encode(sample.prompt)])
    return contexts[0]


# Measuring


@dataclass(slots=True)
class VelocityError:
    """Mean squared error of the predicted velocity on held-out pairs of text and image.

    With x0 the latent of the image and e the noise of the seed of the sample, the model sees
    (1 - t) x0 + t e and should answer e - x0; without guidance, averaged over times t, tokens and
    samples.
    """

    better: ClassVar[Mapping[str, str]] = {"velocity_error": "lower"}
    samples: Sequence[Sample]
    settings: Settings

    @torch.no_grad()
    def __call__(self, pipeline: BagelPipeline) -> dict[str, float]:
        patch, errors = pipeline.model.config.latent_patch_size, []
        sampling = self.settings.config()
        for sample in self.samples:
            assert sample.image is not None
            image = open_image(sample.image, where="samples")
            latent = pipeline.vae.encode(pipeline.image_processor.for_vae(image)[None])[0]
            grid = (latent.shape[1] // patch, latent.shape[2] // patch)
            clean = patchify(latent, patch).float().cpu()
            noise = initial_noise(clean.shape[0], clean.shape[1], sample.seed)
            context = guidance_of(pipeline, sample).full
            for time in self.settings.times:
                noisy = (1 - time) * clean + time * noise
                at = torch.tensor([time])
                with active_experts(pipeline.model, sampling.top_k_at(time)):
                    predicted = pipeline.model.velocity([noisy], [grid], at, [[context]])[0][0]
                errors.append(F.mse_loss(predicted.cpu(), noise - clean).item())
        return {"velocity_error": sum(errors) / len(errors)}


@dataclass(slots=True)
class DenseDistance:
    """Distance of whole generations from those of the dense model at the same seeds.

    `latent_distance` is |x - x_dense| / |x_dense| of the latent tokens, `image_distance` the root
    mean square difference of the pixels, of which 1 is the whole range; means over the samples.
    """

    better: ClassVar[Mapping[str, str]] = {"latent_distance": "lower", "image_distance": "lower"}
    samples: Sequence[Sample]
    settings: Settings
    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # latents and pixels

    def prepare(self, pipeline: BagelPipeline) -> None:
        self.dense = self._latents_and_pixels(pipeline)

    def __call__(self, pipeline: BagelPipeline) -> dict[str, float]:
        found = zip(self._latents_and_pixels(pipeline), self.dense, strict=True)
        each = [distances(own, dense) for own, dense in found]
        return {name: sum(own[name] for own in each) / len(each) for name in self.better}

    def _latents_and_pixels(self, pipeline: BagelPipeline) -> list[tuple[Tensor, Tensor]]:
        result = generate_samples(pipeline, self.settings, *self.samples)
        return list(zip(result.latents, map(pixels_of, result.images), strict=True))


def pixels_of(image: Any) -> Tensor:
    """Returns an image as [height, width, 3] fp32 in 0 to 1."""
    return torch.from_numpy(np.array(image)).float() / 255


def distances(found: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Returns how far latent and pixels of one image are from those of the dense model."""
    (x, pixels), (x0, pixels0) = found, dense
    latent = float((x - x0).norm() / x0.norm())
    image = float((pixels - pixels0).square().mean().sqrt())
    return {"latent_distance": latent, "image_distance": image}


@dataclass(slots=True)
class TextAgreement:
    """Agreement of the model with the answers of the dense one.

    `text_agreement` is the share of the tokens of the dense model's greedy answers, its end marker
    included, that are the model's first choice after the same beginning. `perplexity` is exp of the
    mean negative log likelihood (or of 700, if that is less) of the reference answers, which are
    the dense model's own where a sample has none.
    """

    better: ClassVar[Mapping[str, str]] = {"text_agreement": "higher", "perplexity": "lower"}
    samples: Sequence[Sample]
    settings: Settings
    answers: list[list[int]] = field(default_factory=list)

    def prepare(self, pipeline: BagelPipeline) -> None:
        answers = (answer(pipeline, self.settings, sample) for sample in self.samples)
        self.answers = [finished(pipeline, self.settings, own.token_ids) for own in answers]

    def __call__(self, pipeline: BagelPipeline) -> dict[str, float]:
        pairs = zip(self.samples, self.answers, strict=True)
        sums = [compare_text(pipeline, sample, answer) for sample, answer in pairs]
        agreed, tokens, loss, reference_tokens = map(sum, zip(*sums, strict=True))
        return {"text_agreement": agreed / tokens, "perplexity": perplexity(loss, reference_tokens)}


def finished(pipeline: BagelPipeline, settings: Settings, ids: list[int]) -> list[int]:
    """Returns the tokens of an answer with its end marker, unless it was cut off."""
    return ids + [pipeline.model.config.special_tokens.eos] * (len(ids) < settings.max_length)


def compare_text(
    pipeline: BagelPipeline, sample: Sample, answer: Sequence[int]
) -> tuple[int, int, float, int]:
    """Returns how many of the tokens of an answer are the model's first choice, of how many; and
    the negative log likelihood of the reference answer, or else of this one, and its tokens."""
    special = pipeline.model.config.special_tokens
    context = question_context(pipeline, sample)
    logits, wanted = _teacher_forced(pipeline, context, answer)
    agreed, tokens = int((logits.argmax(-1) == wanted).sum()), len(wanted)
    if sample.answer is not None:
        ids = [special.bos, *pipeline.tokenizer.encode(sample.answer), special.eos]
        logits, wanted = _teacher_forced(pipeline, context, ids)
    return agreed, tokens, F.cross_entropy(logits, wanted, reduction="sum").item(), len(wanted)


def perplexity(loss: float, tokens: float) -> float:
    """Returns exp of the mean negative log likelihood, or of 700, if that is less."""
    return math.exp(min(loss / tokens, _MAX_LOSS))


def _teacher_forced(
    pipeline: BagelPipeline, context: KVCache, ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns the logits [L - 1, vocab_size] of all tokens but the first, and these tokens."""
    logits = pipeline.model.text_logits([context.fork()], [ids[:-1]])[0]
    return logits, torch.tensor(ids[1:], device=logits.device)


# A task to sweep


def bagel_probe(
    pipeline: BagelPipeline,
    task: Task,
    samples: Sequence[Sample],
    settings: Settings | None = None,
    *,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> Probe:
    """Returns the probe of one task.

    Generation and editing are measured by the distance of whole generations to those of the dense
    model, and where every sample has its held-out image by the velocity error too; understanding
    by the agreement of text. The forward whose cost is measured is one velocity, without guidance,
    at the size of the first sample; of understanding, the reading of the first question with its
    images.

    Args:
        pipeline: the model.
        task: which of the three.
        samples: what it is run on.
        settings: size, steps, length of answers.
        evaluators: more of them, by name.
    """
    settings = settings or Settings()
    measures: dict[str, Evaluator]
    if task is Task.UNDERSTANDING:
        measures = {"text": TextAgreement(samples, settings)}
    else:
        measures = {"distance": DenseDistance(samples, settings)}
        if all(sample.image is not None for sample in samples):
            measures["velocity"] = VelocityError(samples, settings)

    def workload() -> Callable[[], object]:
        model, sample, images = pipeline.model, samples[0], _open_all(samples[0])
        if task is Task.UNDERSTANDING:
            looks = [pipeline.image_processor.encode(image, vae=False) for image in images]
            return lambda: question_context(pipeline, sample, looks)
        edited = pipeline.image_processor.for_vae.size(*images[-1].size)[::-1] if images else None
        (size,) = choose_sizes(settings.size, [edited], model.config)
        grid = model.config.token_grid(*size)
        noise = initial_noise(grid[0] * grid[1], model.config.token_channels, sample.seed)
        context = guidance_of(pipeline, sample).full
        return lambda: model.velocity([noise], [grid], torch.tensor([0.5]), [[context]])

    return Probe(
        task=task.value,
        evaluators={**measures, **(evaluators or {})},
        run=lambda begin: run_task(pipeline, task.value, samples, begin, settings=settings),
        workload=workload,
        description={
            "samples": [sample.fingerprint() for sample in samples],
            "settings": settings.stated(),
        },
    )


# GenEval: folders of images as the official scorer reads them, `evaluation/evaluate_images.py` of
# djghosh13/geneval (it skips folders whose name is no number, and images that are not `\d+.png`).
#
#   NNNNN/metadata.jsonl      one object: tag, include, perhaps exclude, prompt; NNNNN is its line
#   NNNNN/samples/NNNNN.png   images of that prompt, counted from 00000


def read_metadata(path: StrPath) -> list[dict[str, Any]]:
    """Reads a GenEval metadata file, such as its `prompts/evaluation_metadata.jsonl`."""
    entries = []
    for where, line in read_lines(path, "--geneval"):
        entry = read_object(line, where)
        for name, kind in (("prompt", str), ("tag", str), ("include", list)):
            if not isinstance(entry.get(name), kind) or not entry[name]:
                raise ValueError(f"{where}: {name} must be given, got {entry.get(name)!r:.120}")
        entries.append(entry)
    if not entries:
        raise ValueError(f"--geneval: {path} must hold at least one prompt, got none")
    return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class GenEval:
    """Images of GenEval for the official scorer, and perhaps another one.

    The noise of an image is that of its prompt and number and of no other image, so that models are
    compared at equal noise: image i of prompt p has the seed `seed` + p * `num_images` + i.

    Args:
        metadata: of `read_metadata`.
        num_images: per prompt.
        seed: of the first image.
        scorer: a function from a folder of `write` to numbers by name, with `better` as an
            evaluator has it; None writes the images alone.
    """

    metadata: list[dict[str, Any]]
    num_images: int = 4
    seed: int = 0
    scorer: Callable[[Path], Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        self.better()

    def better(self) -> dict[str, str]:
        """Returns the metrics of the scorer; how many images there are is no quality of a model."""
        return {} if self.scorer is None else directions(self.scorer, where="scorer")

    def stated(self) -> list[Any]:
        """Returns plain values that runs that draw the same images have in common."""
        text = json.dumps(self.metadata, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return [digest, self.num_images, self.seed]

    def write(
        self,
        pipeline: BagelPipeline,
        out: Path,
        settings: Settings,
        prompts: Sequence[int] | None = None,
    ) -> None:
        """Generates the images of prompts, by their numbers, or of all, into folders of `out`.

        Prompts that an interrupted run has completed are kept.
        """
        for index in range(len(self.metadata)) if prompts is None else prompts:
            folder, entry = out / f"{index:05}", self.metadata[index]
            files = [folder / "samples" / f"{i:05}.png" for i in range(self.num_images)]
            described, text = folder / "metadata.jsonl", json.dumps(entry).encode()
            is_same = described.is_file() and described.read_bytes() == text
            if is_same and all(file.is_file() for file in files):
                continue
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            described.unlink(missing_ok=True)
            first = self.seed + index * self.num_images
            seeds = [(first + i) % 2**63 for i in range(self.num_images)]
            drawn = [entry["prompt"]] * self.num_images
            images = pipeline.generate(drawn, seed=seeds, **settings.sampling()).images
            for file, image in zip(files, images, strict=True):
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                replace_file(file, buffer.getvalue())
            replace_file(described, text)  # last, so that a folder with its metadata is complete


class GenEvalImages:
    """An evaluator that writes the images of every point of a sweep into a folder each of `out`."""

    def __init__(self, geneval: GenEval, out: Path, settings: Settings) -> None:
        self.geneval, self.out, self.settings = geneval, out, settings
        self.folder, self.better = out, geneval.better()

    def begin(self, point: str) -> None:
        self.folder = self.out / point

    def __call__(self, pipeline: BagelPipeline) -> Mapping[str, float]:
        self.geneval.write(pipeline, self.folder, self.settings)
        return {} if self.geneval.scorer is None else self.geneval.scorer(self.folder)
