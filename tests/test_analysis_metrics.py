# SPDX-License-Identifier: Apache-2.0
"""The built-in evaluators measure what they say; a dense model is at no distance from itself."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import analysis_models as models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from refusals import refused

from sparse_unified.analysis import Sample, Settings, evaluator
from sparse_unified.analysis.bagel_task import (
    DenseDistance,
    GenEval,
    GenEvalImages,
    TextAgreement,
    VelocityError,
    guidance_of,
    question_context,
    read_metadata,
)
from sparse_unified.analysis.evaluators import load_evaluator, measure
from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.sampler import initial_noise
from sparse_unified.bagel.vision import patchify

SETTINGS = Settings(size=(32, 48), num_timesteps=3, max_length=6, batch_size=2)


@pytest.fixture(scope="module")
def pipeline(golden: Any) -> Any:
    return BagelPipeline.from_pretrained(golden("t2i_dense"))


def test_velocity_error_is_the_flow_matching_loss(pipeline: Any, tmp_path: Path) -> None:
    paths = models.pictures(tmp_path, 2)
    samples = [Sample(prompt="a bench", image=p, seed=i) for i, p in enumerate(paths)]
    metric = VelocityError(samples, Settings(times=(0.25, 0.8)))
    losses = []
    for sample in samples:
        assert sample.image is not None
        pixels = pipeline.image_processor.for_vae(Image.open(sample.image))
        x0 = patchify(pipeline.vae.encode(pixels[None])[0], 2)
        noise = initial_noise(*x0.shape, sample.seed)
        context = guidance_of(pipeline, sample).full
        side = pixels.shape[1] // 16
        for t in (0.25, 0.8):
            x = (1 - t) * x0 + t * noise
            v = pipeline.model.velocity([x], [(side, side)], torch.tensor([t]), [[context]])[0][0]
            losses.append(F.mse_loss(v, noise - x0).item())
    value = measure(metric, pipeline, where="test")["velocity_error"]
    assert value == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert metric(pipeline)["velocity_error"] == value  # repeats bit for bit


def test_distance_from_the_dense_model_is_that_of_latents_and_pixels(pipeline: Any) -> None:
    metric = DenseDistance([Sample(prompt="a bench", seed=3)], SETTINGS)
    metric.prepare(pipeline)
    assert metric(pipeline) == {"latent_distance": 0.0, "image_distance": 0.0}
    (x0, pixels0), *_ = metric.dense
    with torch.no_grad():
        pipeline.model.llm2vae.bias.add_(0.5)
        found = metric(pipeline)
        x = pipeline.generate(
            "a bench", seed=3, size=SETTINGS.size, num_timesteps=3, progress=False
        )
        pipeline.model.llm2vae.bias.sub_(0.5)
    assert found["latent_distance"] == pytest.approx(float((x.latents[0] - x0).norm() / x0.norm()))
    assert found["latent_distance"] > 0
    pixels = torch.from_numpy(np.array(x.images[0])).float() / 255
    assert found["image_distance"] == pytest.approx(float((pixels - pixels0).pow(2).mean().sqrt()))


@torch.no_grad()
def test_texts_are_compared_with_the_dense_answers_and_the_references(
    pipeline: Any, tmp_path: Path
) -> None:
    sources = tuple(models.pictures(tmp_path, 1))
    samples = [Sample(prompt="what is it?", sources=sources)]
    samples += [Sample(prompt=f"question {i}") for i in range(5)]
    metric, answered = TextAgreement(samples, SETTINGS), Sample(prompt="what?", answer="a bench")
    reference = TextAgreement([answered], SETTINGS)
    for own in (metric, reference):
        own.prepare(pipeline)
        assert own(pipeline)["text_agreement"] == 1
    special = pipeline.model.config.special_tokens
    ids = [special.bos, *pipeline.tokenizer.encode("a bench"), special.eos]
    context, loss = question_context(pipeline, answered), 0.0
    for token, following in pairwise(ids):  # one by one, as generation does
        logits = pipeline.model.next_logits([context], [token])[0]
        loss += float(F.cross_entropy(logits, torch.tensor(following)))
    expected = math.exp(loss / (len(ids) - 1))
    assert reference(pipeline)["perplexity"] == pytest.approx(expected, rel=1e-5)
    weight = pipeline.model.language_model.model.layers[1].mlp.down_proj.weight
    kept = weight.clone()
    weight.mul_(30)
    disturbed = metric(pipeline)
    weight.copy_(kept)
    assert disturbed["text_agreement"] < 1


METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"},
]


def read_as_the_scorer_does(folder: Path) -> dict[str, list[str]]:
    """Walks the folders by the rules of the official `evaluate_images.py`."""
    found = {}
    for sub in (sub for sub in folder.iterdir() if sub.is_dir() and sub.name.isdigit()):
        metadata = json.loads((sub / "metadata.jsonl").read_text())
        found[metadata["prompt"]] = sorted(p.name for p in (sub / "samples").iterdir())
    return found


@pytest.mark.usefixtures("torch_products")
def test_geneval_folders_are_those_the_scorer_reads(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, METADATA)) + "\n\n")
    assert read_metadata(file) == METADATA

    @evaluator(score="higher")
    def scorer(folder: Path) -> dict[str, float]:
        return {"score": float(len(read_as_the_scorer_does(folder)))}

    given: dict[str, Any] = {"metadata": METADATA, "num_images": 2, "seed": 4}
    metric = GenEvalImages(GenEval(**given, scorer=scorer), tmp_path, SETTINGS)
    metric.begin("gen-width-0.5")
    assert measure(metric, pipeline, where="t") == {"score": 2.0}
    out = tmp_path / "gen-width-0.5"
    names = ["00000.png", "00001.png"]
    assert read_as_the_scorer_does(out) == {"a bench": names, "two cups": names}
    expected = pipeline.generate(["two cups"] * 2, seed=[6, 7], **SETTINGS.sampling()).images
    for name, image in zip(names, expected, strict=True):
        assert Image.open(out / "00001" / "samples" / name).tobytes() == image.tobytes()
    # What an interrupted run has completed is kept.
    kept = (out / "00000" / "samples" / "00000.png").stat().st_mtime_ns
    (out / "00001" / "metadata.jsonl").unlink()
    GenEval(**given).write(pipeline, out, SETTINGS)
    assert (out / "00000" / "samples" / "00000.png").stat().st_mtime_ns == kept
    assert (out / "00001" / "metadata.jsonl").exists()
    plain = GenEvalImages(GenEval(**given), tmp_path, SETTINGS)
    plain.begin("gen-width-0.5")
    assert measure(plain, pipeline, where="t") == {}


def test_what_an_evaluator_declares_and_returns_is_checked() -> None:
    for wrong in ({}, {"a": "up"}):
        with pytest.raises(ValueError, match="evaluator must be callable and declare its metrics"):
            evaluator(**wrong)(lambda model: {})
    for result in ({"a": float("nan")}, {"a": float("inf")}, {"a": "high"}, {"b": 1.0}, 3.0):
        with pytest.raises(ValueError, match=r"x: (metric a|evaluator) must"):
            measure(evaluator(a="lower")(lambda model, own=result: own), None, where="x")


def test_evaluators_are_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def good(model):\n    return {'a': 1}\ngood.better = {'a': 'lower'}\n"
        "def bare(model):\n    return {}\n"
    )
    loaded = load_evaluator(f"{tmp_path}/mine.py:good")
    assert measure(loaded, None, where="x") == {"a": 1.0}
    monkeypatch.syspath_prepend(tmp_path)
    assert load_evaluator("mine:good").better == {"a": "lower"}
    for name, message in (
        ("mine", "name must be module:function"),
        ("no_such_module:f", "module no_such_module must be importable"),
        ("mine:bare", "mine:bare: evaluator must be callable"),
        (f"{tmp_path}/none.py:f", "none.py must be importable"),
    ):
        refused(message, load_evaluator, name)


def test_guidance_is_that_of_the_settings_or_the_official_one() -> None:
    assert "cfg_text_scale" not in Settings().sampling()
    own = Settings(
        num_timesteps=30, cfg_text_scale=1.0, cfg_interval=(0.0, 1.0), timestep_shift=2.0
    )
    given = {"cfg_text_scale": 1.0, "cfg_interval": (0.0, 1.0), "timestep_shift": 2.0}
    assert own.sampling().items() >= {**given, "num_timesteps": 30}.items()
    assert own.stated().items() >= given.items()
    refused("timestep_shift must be above 0", Settings, timestep_shift=-1.0)
