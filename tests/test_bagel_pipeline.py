# SPDX-License-Identifier: Apache-2.0
"""The pipeline: prompts and images in, images and text out; bad requests are refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from bagel_models import draw
from moe_cases import relative_error
from PIL import Image
from refusals import refused

from sparse_unified.bagel import BagelPipeline, SamplingConfig
from sparse_unified.bagel.pipeline import (
    THINK_BEFORE_ANSWER,
    THINK_BEFORE_IMAGE,
    check_seeds,
    sampling_batches,
)
from sparse_unified.bagel.sampler import Renorm, build_guidance, initial_noise, sample_latents

QUICK: dict[str, Any] = {"num_timesteps": 4, "size": (32, 48), "progress": False}
PROMPTS = ["a cup", "make it blue", "a dog", "join them"]


@pytest.fixture(scope="module", params=["t2i_dense", "t2i_moe"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(case: str, golden: Any) -> BagelPipeline:
    return BagelPipeline.from_pretrained(golden(case))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_generation_equals_the_steps_by_hand(pipeline: BagelPipeline) -> None:
    result = pipeline.generate("a red bench", seed=5, **QUICK)
    ids = pipeline.tokenizer.encode("a red bench")
    latents = draw(pipeline.model, [ids], noise=[initial_noise(6, 16, 5)], num_timesteps=4)
    assert torch.equal(result.latents[0], latents[0])
    assert result.images[0].size == (48, 32)
    assert (result.seeds, result.sizes, result.thoughts) == ([5], [(32, 48)], None)


@pytest.mark.parametrize("size", [None, (32, 48)])
def test_an_image_is_the_same_alone_and_beside_others(
    pipeline: BagelPipeline, photo: Image.Image, size: tuple[int, int] | None
) -> None:
    images = [None, photo, [], [photo.resize((30, 60)), photo]]
    options = {**QUICK, "size": size, "think": True, "max_think_length": 4}
    together = pipeline.generate(PROMPTS, images=images, seed=[4, 5, 6, 7], **options)
    apart = pipeline.generate(PROMPTS, images=images, seed=4, batch_size=1, **options)
    assert together.seeds == apart.seeds  # one seed counts up
    assert together.thoughts is not None
    assert (together.report.steps, apart.report.steps) == (2 * 3, 4 * 3)  # a batch of each kind
    assert apart.report.context_tokens == together.report.context_tokens
    assert apart.thoughts == together.thoughts
    for i in range(4):
        alone = pipeline.generate(PROMPTS[i], images=images[i], seed=4 + i, **options)
        assert alone.thoughts == [together.thoughts[i]]
        for other in (together, apart):
            assert relative_error(other.latents[i], alone.latents[0]) < 1e-5
            drawn = np.asarray(other.images[i], int) - np.asarray(alone.images[0])
            assert np.abs(drawn).max() <= 1


def test_official_settings_by_task() -> None:
    settings = {"cfg_img_scale": None, "cfg_interval": None}
    (alone, plain), (after, editing) = sampling_batches([False, True, False], None, settings)
    assert (alone, after) == ([0, 2], [1])
    assert plain == SamplingConfig()
    assert (editing.cfg_img_scale, editing.cfg_interval) == (2.0, (0.0, 1.0))
    assert editing.cfg_renorm_type is Renorm.TEXT_CHANNEL
    given = {"cfg_img_scale": 1.5, "cfg_interval": [0, 1], "cfg_renorm_type": "channel"}
    batches = sampling_batches([False, True, False], 2, given)
    assert [indices for indices, _ in batches] == [[0, 1], [2]]


def test_seeds_and_sizes(pipeline: BagelPipeline, photo: Image.Image) -> None:
    assert check_seeds(None, 1) != check_seeds(None, 1)
    result = pipeline.generate(["a cup", "a cup"], **QUICK)
    assert result.seeds[1] == result.seeds[0] + 1
    assert not torch.equal(result.latents[0], result.latents[1])
    again = pipeline.generate(["a cup", "a cup"], seed=result.seeds, **QUICK)
    assert torch.equal(result.latents[0], again.latents[0])

    given = pipeline.generate(["a", "b"], **{**QUICK, "size": [(32, 64), (48, 16)]})
    assert [image.size for image in given.images] == [(64, 32), (16, 48)]
    default = {"num_timesteps": 2, "progress": False}
    assert pipeline.generate("a", **default).sizes == [(128, 128)]  # up to 1024
    # 40 x 60 scaled until the long side is the limit.
    assert pipeline.generate("a", images=photo, **default).sizes == [(80, 128)]


def test_images_are_decoded_in_tiles_on_request_and_where_memory_is_short(
    pipeline: BagelPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparse_unified.bagel.images.TILE", 32)
    whole, tiled = (pipeline.generate("a", seed=1, tiled=t, **QUICK) for t in (False, True))
    assert torch.equal(whole.latents[0], tiled.latents[0])
    difference = np.asarray(whole.images[0], float) - np.asarray(tiled.images[0])
    assert 0 < np.abs(difference).mean() < 40  # weights are random, and tiles of 4 latent pixels
    decode = pipeline.vae.decode

    def short(latent: torch.Tensor, *, tile: int = 0) -> torch.Tensor:
        if not tile:
            raise torch.OutOfMemoryError("CUDA out of memory. And more")
        return decode(latent, tile=tile)

    monkeypatch.setattr(pipeline.vae, "decode", short)
    again = pipeline.generate("a", seed=1, **QUICK)
    assert again.images[0].tobytes() == tiled.images[0].tobytes()
    assert "image of 32 x 48 is decoded in tiles: CUDA out of memory" in caplog.text


def test_thinking_reads_the_plan_before_it_draws(pipeline: BagelPipeline) -> None:
    options = {**QUICK, "seed": 2, "think": True, "max_think_length": 6}
    result = pipeline.generate(["a cup", "a dog"], **options)
    assert result.thoughts is not None
    encode, model = pipeline.tokenizer.encode, pipeline.model
    guidance = build_guidance(model, [encode("a cup")], system_ids=encode(THINK_BEFORE_IMAGE))
    model.prefill_text([guidance[0].full], [encode(result.thoughts[0])])
    config = SamplingConfig(num_timesteps=4)
    latents = sample_latents(model, guidance, [initial_noise(6, 16, 2)], [(2, 3)], config)
    assert relative_error(result.latents[0], latents[0]) < 1e-5
    assert result.report.text_tokens > 0


def test_system_texts_end_their_first_line_in_a_blank() -> None:
    # The checkpoints were trained on these very words.
    for text in (THINK_BEFORE_IMAGE, THINK_BEFORE_ANSWER):
        first, second = text.split("\n")
        assert first.endswith(". ")
        assert second.startswith("The ")
        assert "<think> </think> tags, i.e. <think> " in second


def test_greedy_answers_repeat_and_drawn_ones_follow_the_seed(
    pipeline: BagelPipeline, photo: Image.Image
) -> None:
    def ask(**options: Any) -> list[int]:
        answer = pipeline.chat("what is this?", images=photo, max_length=16, **options)
        assert str(answer) == answer.text
        assert answer.token_ids[0] == pipeline.model.config.special_tokens.bos
        assert answer.report.text_tokens == len(answer.token_ids) - 1 <= 15
        return answer.token_ids

    assert ask() == ask(seed=9)
    assert ask(temperature=5.0, seed=1) == ask(temperature=5.0, seed=1)
    assert ask(temperature=5.0, seed=1) != ask(temperature=5.0, seed=2)
    assert ask(temperature=1e-4, seed=1) == ask()
    ask(think=True)


def test_reports_count_and_time(
    case: str, pipeline: BagelPipeline, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = pipeline.generate(["a cup", "a dog"], seed=0, **QUICK).report.to_dict()
    assert capsys.readouterr().err == ""
    assert (facts["steps"], facts["image_tokens"]) == (3, 12)
    assert facts["context_tokens"] == 2 * (len("a cup") + 2)
    assert facts["seconds_per_step"] > 0
    assert facts["total_seconds"] >= sum(facts["step_seconds"])
    assert facts["peak_memory_bytes"] > 2**20
    assert facts["backend"] == ("cpu" if "moe" in case else "dense")
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    pipeline.generate("a", **{**QUICK, "progress": True})
    assert "3/3" in capsys.readouterr().err
    # Chat sees images through the ViT alone.
    text, seen = (pipeline.chat("hello", images=i, max_length=2) for i in (None, photo))
    rows, columns = (side // 14 for side in pipeline.image_processor.for_vit.size(128, 80)[::-1])
    assert text.report.context_tokens == len("hello") + 2
    assert seen.report.context_tokens == rows * columns + 2 + len("hello") + 2


def test_bf16_pipeline_stays_near_fp32(case: str, pipeline: BagelPipeline, golden: Any) -> None:
    low = BagelPipeline.from_pretrained(golden(case), dtype=torch.bfloat16)
    latents = [p.generate("a red bench", seed=1, **QUICK).latents[0] for p in (pipeline, low)]
    assert latents[1].dtype == torch.float32
    # Routing may flip near a tie, so the sparse model may differ by more than rounding.
    assert relative_error(latents[1], latents[0]) < (0.2 if "moe" in case else 0.05)


IMAGE = Image.new("RGB", (4, 4))
FILE = io.BytesIO()
Image.effect_noise((64, 64), 50).save(FILE, "PNG")
# Only opened: its pixels are read when they are needed.
DAMAGED = Image.open(io.BytesIO(FILE.getvalue()[:999]))
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "generate: prompt must not be empty"),
    ([], {}, "prompts must hold at least one"),
    ([5], {}, "prompt must be a string, got int"),
    (5, {}, "prompt must be a string, got int"),
    ("a", {"images": 3}, "image must be a PIL image, got int"),
    ("a", {"size": (40, 64)}, "height must be a positive multiple of 16"),
    ("a", {"size": (64, 1024)}, "width must be .* up to 128"),
    ("a", {"size": 64}, "size must be a pair"),
    (["a", "b"], {"size": [(32, 32)] * 3}, "size must be one or a list of 2, got 3"),
    ("a", {"seed": -1}, "seed must be an integer from 0"),
    ("a", {"seed": [1, 2]}, "seed must be one or a list of 1, got 2"),
    ("a", {"speed": 2}, "speed"),
    ("a", {"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ("a", {"think": True, "max_think_length": 0}, "max_length must be an integer of at least 1"),
    (["a", "b"], {"images": [IMAGE] * 3}, "images must be one or a list of 2, got 3"),
    ("a", {"images": Image.new("RGB", (0, 4))}, "image must hold pixels"),
    (["a", "b"], {"images": [None, [IMAGE, DAMAGED]]}, "image must be readable"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), REFUSED)
def test_bad_requests_are_refused(
    pipeline: BagelPipeline, prompts: Any, options: dict[str, Any], message: str
) -> None:
    kinds = (ValueError, TypeError)
    refused(message, pipeline.generate, prompts, error=kinds, **QUICK | options)
    if isinstance(prompts, str) and set(options) <= {"images", "seed"}:
        refused(message.replace("generate", "chat"), pipeline.chat, prompts, error=kinds, **options)


def test_chat_takes_one_prompt_and_a_temperature(pipeline: BagelPipeline) -> None:
    refused("chat: prompt must be a string, got list", pipeline.chat, ["a"], error=TypeError)
    refused("temperature must be a finite number from 1e-06", pipeline.chat, "a", temperature=-1.0)
