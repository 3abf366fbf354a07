# SPDX-License-Identifier: Apache-2.0
"""The pipeline: prompts and pictures in, pictures and text out; bad requests are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparse_unified.bagel import (
    BagelPipeline,
    ContextImage,
    SamplingConfig,
    build_guidance,
    sample_latents,
)
from sparse_unified.bagel.pipeline import (
    THINK_BEFORE_ANSWER,
    THINK_BEFORE_IMAGE,
    ImageRequest,
    check_seeds,
    image_batches,
)
from sparse_unified.bagel.sampler import Renorm, initial_noise
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.testing import read_case, replay

GOLDEN = Path(__file__).parent / "golden"
QUICK: dict[str, Any] = {"num_timesteps": 4, "size": (32, 48), "progress": False}


@pytest.fixture(scope="module", params=["t2i_dense", "t2i_moe"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(GOLDEN / request.param, directory)
    yield BagelPipeline.from_pretrained(directory)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(values)


def relative_error(out: Tensor, gold: Tensor) -> float:
    return float((out - gold).norm() / gold.norm())


def test_generation_equals_the_steps_by_hand(pipeline: BagelPipeline) -> None:
    result = pipeline.generate("a red bench", seed=5, **QUICK)
    guidance = build_guidance(pipeline.model, [pipeline.tokenizer.encode("a red bench")])
    config = SamplingConfig(num_timesteps=4)
    noise = [initial_noise(6, 16, 5)]
    latents = sample_latents(pipeline.model, guidance, noise, [(2, 3)], config)
    assert torch.equal(result.latents[0], latents[0])
    assert result.images[0].size == (48, 32)
    assert (result.seeds, result.sizes, result.thoughts) == ([5], [(32, 48)], None)


def test_text_to_image_equals_the_recording_up_to_its_noise(
    pipeline: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t2i_moe" if pipeline.model.config.llm.sparse_layers("gen") else "t2i_dense"
    case = read_case(GOLDEN / name)
    monkeypatch.setattr(
        "sparse_unified.bagel.pipeline.initial_noise", lambda *_: case.tensors["init_noise"]
    )
    result = pipeline.generate(
        case.fields["prompts"],
        size=tuple(case.fields["image_size"]),
        num_timesteps=case.fields["num_timesteps"],
        progress=False,
    )
    assert relative_error(result.latents[0], case.tensors["latent.0"]) < 1e-5


def test_same_prompt_and_seed_give_the_same_image_alone_and_in_a_batch(
    pipeline: BagelPipeline,
) -> None:
    prompts = ["a red bench", "two dogs in the snow", "a cup"]
    together = pipeline.generate(prompts, seed=[7, 8, 9], **QUICK)
    for i, prompt in enumerate(prompts):
        alone = pipeline.generate(prompt, seed=7 + i, **QUICK)
        assert relative_error(together.latents[i], alone.latents[0]) < 1e-5


def test_batch_size_changes_memory_and_not_images(pipeline: BagelPipeline) -> None:
    prompts = ["a red bench", "two dogs in the snow", "a cup"]
    options = {**QUICK, "seed": 7, "think": True, "max_think_length": 4}
    together = pipeline.generate(prompts, **options)
    apart = pipeline.generate(prompts, batch_size=2, **options)
    for one, other in zip(together.latents, apart.latents, strict=True):
        assert relative_error(other, one) < 1e-5
    assert apart.thoughts == together.thoughts
    assert apart.report.context_tokens == together.report.context_tokens
    assert (together.report.steps, apart.report.steps) == (3, 6)


def test_one_seed_counts_up(pipeline: BagelPipeline) -> None:
    result = pipeline.generate(["a cup", "a cup"], seed=3, **QUICK)
    assert result.seeds == [3, 4]
    assert not torch.equal(result.latents[0], result.latents[1])


def test_seed_drawn_at_random_can_be_used_again(pipeline: BagelPipeline) -> None:
    first = pipeline.generate("a cup", **QUICK)
    second = pipeline.generate("a cup", seed=first.seeds, **QUICK)
    assert torch.equal(first.latents[0], second.latents[0])


def test_sizes_may_differ_in_a_batch(pipeline: BagelPipeline) -> None:
    options = {**QUICK, "size": [(32, 64), (48, 16)]}
    result = pipeline.generate(["a", "b"], seed=0, **options)
    assert [image.size for image in result.images] == [(64, 32), (16, 48)]


def test_size_is_by_default_the_largest_up_to_1024(pipeline: BagelPipeline) -> None:
    result = pipeline.generate("a", num_timesteps=2, progress=False)
    assert result.sizes == [(128, 128)]


def test_editing_takes_size_and_content_of_the_picture(
    pipeline: BagelPipeline, photo: Image.Image
) -> None:
    options = {**QUICK, "size": None, "seed": 1}
    edited = pipeline.generate("make it blue", images=photo, **options)
    assert edited.sizes == [(80, 128)]  # 40 x 60 scaled until the long side is the limit
    other = pipeline.generate("make it blue", images=photo.rotate(180), **options)
    assert relative_error(edited.latents[0], other.latents[0]) > 1e-3
    two = pipeline.generate("make it blue", images=[photo, photo.rotate(180)], **options)
    assert two.report.context_tokens > edited.report.context_tokens


def test_editing_is_the_same_alone_and_in_a_batch(
    pipeline: BagelPipeline, photo: Image.Image
) -> None:
    images = [photo, [photo, photo.rotate(180)], photo.resize((30, 60))]
    prompts = ["make it blue", "join them", "bigger"]
    options = {**QUICK, "size": None}
    together = pipeline.generate(prompts, images=images, seed=4, **options)
    for i in range(3):
        alone = pipeline.generate(prompts[i], images=images[i], seed=4 + i, **options)
        assert relative_error(together.latents[i], alone.latents[0]) < 1e-5


def test_company_of_edits_does_not_change_text_to_image(
    pipeline: BagelPipeline, photo: Image.Image
) -> None:
    prompts, images = ["a cup", "make it blue", "a dog", "turn it"], [None, photo, [], [photo]]
    options = {**QUICK, "num_timesteps": 6, "think": True, "max_think_length": 4}
    together = pipeline.generate(prompts, images=images, seed=4, **options)
    assert together.thoughts is not None
    assert together.report.steps == 2 * 5  # one batch of each kind
    for i in range(4):
        alone = pipeline.generate(prompts[i], images=images[i], seed=4 + i, **options)
        assert relative_error(together.latents[i], alone.latents[0]) < 1e-5
        assert alone.thoughts == [together.thoughts[i]]
        assert np.abs(np.asarray(together.images[i], int) - np.asarray(alone.images[0])).max() <= 1


def test_explicit_settings_keep_edits_and_text_to_image_in_one_batch(
    pipeline: BagelPipeline, photo: Image.Image
) -> None:
    settings = {"cfg_img_scale": 1.5, "cfg_interval": [0, 1], "cfg_renorm_type": "channel"}
    images, options = [None, photo, None], {**settings, **QUICK, "seed": 0}
    assert pipeline.generate(["a", "b", "c"], images=images, **options).report.steps == 3
    parts = pipeline.generate(["a", "b", "c"], images=images, batch_size=2, **options)
    assert parts.report.steps == 6


def test_thinking_reads_the_plan_before_it_draws(pipeline: BagelPipeline) -> None:
    options = {**QUICK, "seed": 2}
    result = pipeline.generate(["a cup", "a dog"], think=True, max_think_length=6, **options)
    assert result.thoughts is not None
    assert len(result.thoughts) == 2
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
        return answer.token_ids

    assert ask() == ask(seed=9)
    assert ask(temperature=5.0, seed=1) == ask(temperature=5.0, seed=1)
    assert ask(temperature=5.0, seed=1) != ask(temperature=5.0, seed=2)
    assert ask(temperature=1e-4, seed=1) == ask()
    assert len(ask(think=True)) <= 16


def test_chat_without_pictures_is_text_to_text(pipeline: BagelPipeline) -> None:
    answer = pipeline.chat("hello", max_length=4)
    assert answer.report.context_tokens == len("hello") + 2
    assert answer.report.text_tokens == len(answer.token_ids) - 1


def test_chat_sees_through_the_vit_alone(pipeline: BagelPipeline, photo: Image.Image) -> None:
    answer = pipeline.chat("hello", images=photo, max_length=2)
    rows, columns = (side // 14 for side in pipeline.image_processor.for_vit.size(128, 80)[::-1])
    assert answer.report.context_tokens == rows * columns + 2 + len("hello") + 2


def test_report_counts_and_times(pipeline: BagelPipeline) -> None:
    report = pipeline.generate(["a cup", "a dog"], seed=0, **QUICK).report
    facts = report.to_dict()
    assert (facts["steps"], facts["image_tokens"]) == (3, 12)
    assert facts["context_tokens"] == 2 * (len("a cup") + 2)
    assert facts["seconds_per_step"] > 0
    assert facts["total_seconds"] >= sum(facts["step_seconds"])
    assert facts["peak_memory_bytes"] > 2**20
    sparse = bool(pipeline.model.config.llm.sparse_layers("gen"))
    assert facts["backend"] == ("cpu" if sparse else "dense")
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")


def test_progress_bar_counts_steps(
    pipeline: BagelPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.generate("a", **{**QUICK, "progress": True})
    assert "3/3" in capsys.readouterr().err
    pipeline.generate("a", **QUICK)
    assert capsys.readouterr().err == ""


def test_bf16_pipeline_stays_near_fp32(pipeline: BagelPipeline, tmp_path: Path) -> None:
    name = "t2i_moe" if pipeline.model.config.llm.sparse_layers("gen") else "t2i_dense"
    directory = write_checkpoint(GOLDEN / name, tmp_path)
    low = BagelPipeline.from_pretrained(directory, dtype=torch.bfloat16)
    latents = [p.generate("a red bench", seed=1, **QUICK).latents[0] for p in (pipeline, low)]
    assert latents[1].dtype == torch.float32
    # Routing may flip near a tie, so the sparse model may differ by more than rounding.
    limit = 0.2 if pipeline.model.config.llm.sparse_layers("gen") else 0.05
    assert relative_error(latents[1], latents[0]) < limit


def test_official_settings_by_task() -> None:
    def request(images: list[Any]) -> ImageRequest:
        return ImageRequest(text="a", images=images, seed=0, size=(32, 32))

    settings = {"cfg_img_scale": None, "cfg_interval": None, "cfg_renorm_type": None}
    wanted = [request([]), request([object()]), request([])]
    (alone, plain), (after, editing) = image_batches(wanted, None, settings)
    assert (alone, after) == ([0, 2], [1])
    assert plain == SamplingConfig()
    assert (editing.cfg_img_scale, editing.cfg_interval) == (2.0, (0.0, 1.0))
    assert editing.cfg_renorm_type is Renorm.TEXT_CHANNEL


def test_replay_and_pipeline_agree_on_context_images(pipeline: BagelPipeline) -> None:
    # The same code path serves recorded cases: an edit through ContextImage equals the replay.
    case = read_case(GOLDEN / "edit")
    assert relative_error(replay(GOLDEN / "edit")["latent.0"], case.tensors["latent.0"]) < 1e-5
    image = ContextImage(latent=case.tensors["context.latent"][0])
    guidance = build_guidance(pipeline.model, case.fields["prompt_ids"], images=[[image]])
    assert guidance[0].full.length == 6 + len(case.fields["prompt_ids"][0]) + 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "generate: prompt must not be empty, got ''"),
        (["a", " \n"], {}, "prompt must not be empty"),
        ([], {}, "prompts must hold at least one prompt"),
        ("a", {"size": (40, 64)}, "height must be a positive multiple of 16 pixels, got 40"),
        ("a", {"size": (64, 1024)}, "width must be at most 128 pixels, got 1024"),
        ("a", {"size": (64,)}, "size must be"),
        (["a", "b"], {"size": [(32, 32)] * 3}, "size must be one .* or 2, got 3"),
        ("a", {"seed": -1}, "seed must be an integer from 0 .* got -1"),
        ("a", {"seed": [1, 2]}, "seed must be one integer or 1, got 2"),
        ("a", {"seed": 2.5}, "seed"),
        ("a", {"cfg_renorm_type": "batch"}, "cfg_renorm_type must be one of"),
        ("a", {"cfg_text_scale": float("nan")}, "cfg_text_scale must be finite, got nan"),
        ("a", {"num_timesteps": 1}, "num_timesteps must be at least 2"),
        ("a", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("a", {"size": 64}, "size must be a pair"),
        ("a", {"think": True, "max_think_length": 0}, "max_length must be at least 1"),
    ],
)
def test_bad_requests_are_refused(
    pipeline: BagelPipeline, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pipeline.generate(prompts, **{**QUICK, **options})
    assert "\n" not in str(error.value)


def test_images_must_match_the_prompts(pipeline: BagelPipeline, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="one entry for each of 2 prompts, got 1"):
        pipeline.generate(["a", "b"], images=photo, **QUICK)
    with pytest.raises(ValueError, match="one entry for each of 2 prompts, got 3"):
        pipeline.generate(["a", "b"], images=[photo] * 3, **QUICK)


@pytest.mark.parametrize(
    ("prompts", "images"), [(5, None), ([5], None), ("a", ["picture.png"]), ("a", 3)]
)
def test_other_types_are_refused(pipeline: BagelPipeline, prompts: Any, images: Any) -> None:
    with pytest.raises(TypeError):
        pipeline.generate(prompts, images=images, **QUICK)


def test_chat_refuses_empty_prompts_and_bad_temperatures(pipeline: BagelPipeline) -> None:
    with pytest.raises(ValueError, match="chat: prompt must not be empty"):
        pipeline.chat("  ")
    with pytest.raises(TypeError, match="chat: prompt must be a string, got list"):
        pipeline.chat(["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got -1"):
        pipeline.chat("a", temperature=-1.0)


def test_seeds_are_fresh_when_none_is_given() -> None:
    assert check_seeds(None, 1) != check_seeds(None, 1)
