# SPDX-License-Identifier: Apache-2.0
"""The pipeline of diffusers: what diffusers promises of one, and the images of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from refusals import refused

from sparse_unified.bagel import StepCache
from sparse_unified.engines.diffusers import BagelDiffusionPipeline

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipeline(golden: Any) -> BagelDiffusionPipeline:
    made = BagelDiffusionPipeline.from_pretrained(golden("t2i_moe"), torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_a_pipeline_of_diffusers(pipeline: BagelDiffusionPipeline) -> None:
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"model", "vae", "tokenizer"}
    assert pipeline.device == torch.device("cpu")
    assert pipeline.dtype == torch.float32
    again = BagelDiffusionPipeline(**pipeline.components)
    assert again.model is pipeline.model
    assert pipeline.to("cpu") is pipeline


def test_images_are_those_of_our_pipeline(pipeline: BagelDiffusionPipeline) -> None:
    output = pipeline("a cup", guidance_scale=3.0, generator=generator(), **SIZE)
    assert isinstance(output, ImagePipelineOutput)
    [image] = output.images
    assert image.size == (48, 32)
    seed = int(torch.randint(2**62, (1,), generator=generator()))
    ours = pipeline.bagel.generate(
        "a cup", seed=seed, size=(32, 48), num_timesteps=4, cfg_text_scale=3.0, progress=False
    )
    assert image.tobytes() == ours.images[0].tobytes()
    [latent] = pipeline(
        "a cup", guidance_scale=3.0, generator=generator(), output_type="latent", **SIZE
    ).images
    assert torch.equal(latent, ours.latents[0])


def test_a_generator_gives_the_same_images_again_and_others_when_it_goes_on(
    pipeline: BagelDiffusionPipeline,
) -> None:
    own = generator()
    options: dict[str, Any] = {"output_type": "np", **SIZE}
    first, second = (pipeline("a cup", generator=own, **options).images for _ in range(2))
    again = pipeline("a cup", generator=generator(), **options).images
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    pair = pipeline(["a cup", "a cup"], generator=[generator(), generator()], **options).images
    assert np.abs(pair[0] - pair[1]).max() < 2 / 255


def test_output_types(pipeline: BagelDiffusionPipeline) -> None:
    options: dict[str, Any] = {"generator": generator(), "num_images_per_prompt": 2, **SIZE}
    as_numbers = pipeline("a cup", output_type="np", **options).images
    assert as_numbers.shape == (2, 32, 48, 3)
    assert 0 <= as_numbers.min() <= as_numbers.max() <= 1
    options["generator"] = generator()
    (as_tensor,) = pipeline("a cup", output_type="pt", return_dict=False, **options)
    assert torch.equal(as_tensor, torch.from_numpy(as_numbers).permute(0, 3, 1, 2))


def test_pictures_are_edited_and_steps_extrapolated(pipeline: BagelDiffusionPipeline) -> None:
    picture = Image.new("RGB", (48, 32), (200, 30, 30))
    options: dict[str, Any] = {"generator": generator(), "output_type": "latent"}
    [edited] = pipeline("blue", picture, num_inference_steps=5, **options).images
    options["generator"] = generator()
    cache = StepCache(interval=3, order=1, first=1, last=0)
    [cached] = pipeline("blue", picture, num_inference_steps=5, cache=cache, **options).images
    assert edited.shape == cached.shape
    assert not torch.equal(edited, cached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent, got 'jpg'"),
        ({"height": 32}, "height and width must be given together, got 32 and None"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one torch.Generator or 1"),
    ],
)
def test_bad_arguments_are_refused(
    pipeline: BagelDiffusionPipeline, options: dict[str, Any], message: str
) -> None:
    refused(message, pipeline, "a cup", **options)


def test_what_is_saved_draws_the_same_images(
    pipeline: BagelDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    again = BagelDiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"output_type": "np", **SIZE}
    images = [p("a cup", generator=generator(), **options).images for p in (pipeline, again)]
    assert np.array_equal(*images)
