# SPDX-License-Identifier: Apache-2.0
"""The miniature: the models that the package holds, what they were trained on, and the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused

from miniature import digits, scenes
from miniature.__main__ import main
from miniature.data import training_data, write_records
from miniature.evaluate import EvaluationConfig, evaluate
from miniature.report import BEGIN, END, Verdict, fill_page, read_records, verdicts
from miniature.study import StudyConfig, run_study
from sparse_unified.analysis import Task, read_samples
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.cli import main as command
from sparse_unified.mini import MiniTask, load_pipeline, write_model
from sparse_unified.mini.autoencoder import identity_autoencoder
from sparse_unified.mini.model import (
    TOKENIZER,
    WEIGHTS,
    encode,
    new_model,
    trained_weights,
    vocabulary,
)

SMALL = StudyConfig(seeds=(0,), steps=2, batch_size=16, questions=6, velocities=6, pictures=1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Models


@pytest.mark.parametrize("downsample", [1, 2])
def test_the_autoencoder_is_the_identity(downsample: int, generator: torch.Generator) -> None:
    vae = identity_autoencoder(1.5, downsample)
    blocks = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    pixels = blocks.repeat_interleave(downsample, 2).repeat_interleave(downsample, 3)
    latent = vae.encode(pixels)
    torch.testing.assert_close(latent, 1.5 * blocks, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latent), pixels, rtol=4e-4, atol=1e-5)
    for tile in (3, 5, 7):  # tiles cover all of it, and blend
        assert vae.decode(latent, tile=tile).isfinite().all()
        torch.testing.assert_close(vae.decode(latent, tile=tile), pixels, rtol=4e-4, atol=1e-5)


def test_the_tokenizer_gives_every_word_its_own_id() -> None:
    tokenizer = Tokenizer.from_directory(TOKENIZER)
    texts = [prompt.text for prompt in scenes.all_prompts()]
    texts += [digits.prompt_of(n) for n in range(10)] + [digits.QUESTION]
    for text in texts:
        assert tokenizer.encode(text) == encode(text)
        assert tokenizer.decode(encode(text)) == text
    assert tokenizer.encode("An unknown word") == encode("An unknown word")


@pytest.mark.parametrize("task", MiniTask)
def test_a_written_model_is_a_checkpoint_like_any_other(task: MiniTask, tmp_path: Path) -> None:
    model = new_model(task, 0)
    pipeline = load_pipeline(write_model(task, tmp_path, model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], tensor), name
    assert pipeline.model.config == model.config
    side = model.config.vision.image_size
    result = pipeline.generate("a cross", seed=0, num_timesteps=3, progress=False)
    assert result.images[0].size == (side, side)
    assert pipeline.chat("which digit ?", images=result.images, max_length=2).token_ids[0] == 1


@pytest.mark.parametrize("task", MiniTask)
def test_what_is_shipped_says_how_it_was_made_and_is_small(task: MiniTask) -> None:
    folder = WEIGHTS / task.value
    assert (folder / "ema.safetensors").stat().st_size <= 4 * 2**20
    about = json.loads((folder / "training.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert about["command"] == f"python examples/miniature train {task.value} OUT"
    assert log[-1]["step"] == about["training"]["steps"]
    assert log[-1]["loss"] < log[0]["loss"] / 4
    assert sum(w.numel() for w in trained_weights(task).values()) == about["parameters"]


@pytest.mark.parametrize(
    ("task", "questions", "pictures", "velocity", "least"),
    [
        (MiniTask.DIGITS, 100, 3, 0.31, {"understanding": 0.93}),
        (MiniTask.SCENES, 90, 4, 0.16, {"question_colour": 0.85, "question_count": 0.75}),
    ],
)
@pytest.mark.slow
def test_trained_models_read_and_draw(
    task: MiniTask, questions: int, pictures: int, velocity: float, least: Any, tmp_path: Path
) -> None:
    config = EvaluationConfig(questions=questions, pictures=pictures)
    found = evaluate(load_pipeline(write_model(task, tmp_path / "model")).model, task, config)
    assert found["velocity"] <= velocity
    least = least | {"generation": 0.5}
    assert all(found[name] >= value for name, value in least.items()), found


# Data and judges


def test_a_scene_is_read_back_and_scores_1(generator: torch.Generator) -> None:
    prompts = scenes.all_prompts()
    assert len({p.text for p in prompts}) == len(prompts) == 87
    drawn = [prompt.draw(generator) for prompt in prompts]
    pictures = [scenes.render(objects) for objects in drawn]
    for objects, picture in zip(drawn, pictures, strict=True):
        assert set(scenes.read_scene(picture)) == set(objects)
    assert scenes.score(prompts, pictures) == dict.fromkeys((*scenes.COLUMNS, "overall"), 1.0)
    noisy = pictures[-1] + 0.1 * torch.randn(pictures[-1].shape, generator=generator)
    assert scenes.score(prompts[-1:], [noisy])["attribute"] == 1
    faint = scenes.render([scenes.Object(shape="square", colour="red", row=0, column=0)]) / 2
    assert scenes.read_scene(faint) == [None]
    assert not prompts[0].holds(scenes.read_scene(faint))
    refused("one for each of 1 prompts, got 0", scenes.score, prompts[:1], [])


def test_every_single_mistake_scores_0(generator: torch.Generator) -> None:
    for prompt in scenes.all_prompts()[::2]:
        objects = prompt.draw(generator)
        first, others = objects[0], objects[1:]
        wrong_shape = next(s for s in scenes.SHAPES if s not in {o.shape for o in objects})
        used = {(o.row, o.column) for o in objects}
        free = [(r, c) for r in range(2) for c in range(2) if (r, c) not in used]
        mistakes = [others, [first._replace(shape=wrong_shape), *others]]
        mistakes += [[*objects, first._replace(row=r, column=c)] for r, c in free]
        if prompt.parts[0].colour:
            wrong = next(c for c in scenes.COLOURS if c != first.colour)
            mistakes.append([first._replace(colour=wrong), *others])
        if prompt.relation:
            second = objects[1]
            swapped = first._replace(row=second.row, column=second.column)
            mistakes.append([swapped, second._replace(row=first.row, column=first.column)])
        for mistake in mistakes:
            assert scenes.score([prompt], [scenes.render(mistake)])["overall"] == 0, prompt.text


def test_what_is_tested_is_not_trained_on() -> None:
    train, test = ({p.text for p in prompts} for prompts in scenes.split_prompts())
    assert train & test == {"a square", "a triangle", "a cross"}
    assert train | test == {p.text for p in scenes.all_prompts()}
    assert {p.column for p in scenes.split_prompts()[1]} == set(scenes.COLUMNS)
    assert not {p.text for p in scenes.placed_prompts()} & (train | test)


@pytest.mark.slow
def test_the_judge_of_digits_knows_held_out_digits() -> None:
    pixels, numbers = digits.load()
    train, test = digits.split()
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))
    found = digits.score(numbers[test].tolist(), pixels[test])
    assert found["overall"] >= 0.98
    assert found["frechet"] < digits.score(numbers[test].tolist(), -pixels[test])["frechet"] / 10


@pytest.mark.parametrize(
    "task", [MiniTask.SCENES, pytest.param(MiniTask.DIGITS, marks=pytest.mark.slow)]
)
def test_sequences_are_functions_of_index_and_generator(task: MiniTask) -> None:
    data = training_data(task)
    for index in (0, 1, 2, 3, len(data) - 2, len(data) - 1):
        made = [data.sequence(index, torch.Generator().manual_seed(7)) for _ in range(2)]
        first, again = ([repr(segment) for segment in sequence] for sequence in made)
        assert first == again
        kinds = {type(segment).__name__ for segment in made[0]}
        assert kinds == {"TextSegment", "VitSegment" if index % 2 else "LatentSegment"}


# The study


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    names = ("dense", "sparse-16-8", "coactivation-16-8")
    run: list[str] = []

    def study(config: StudyConfig = SMALL) -> list[Path]:
        how: Any = {"tasks": (MiniTask.DIGITS,), "names": names}
        return run_study(tmp_path, config, **how, progress=lambda part, *_: run.append(part.name))

    files = study()
    assert run == list(names)
    kept = [file.read_bytes() for file in files]
    files[0].unlink()
    study()
    assert run[3:] == ["dense"]
    assert [file.read_bytes() for file in files] == kept
    refused("config must be that of this study", study, StudyConfig(seeds=(0,), steps=3))

    snake, together = (json.loads(file.read_text())["results"] for file in files[1:])
    assert set(snake) == {"zero", "untrained", "router", "expert_frozen", "full"}
    records = read_records(tmp_path)
    assert {v.result for v in verdicts(records) if v.task == "scenes"} == {"not run"}
    compared = [v for v in verdicts(records) if v.task == "digits" and "coactivation" in v.text]
    for verdict, stage in zip(compared, ("untrained", "full"), strict=True):
        gain = snake[stage]["velocity"] - together[stage]["velocity"]
        assert gain != 0
        assert verdict.differences == (gain,)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    fill_page(page, records)
    assert "control: static half, untrained | 0 | not run" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    main(["report", str(tmp_path), "--json", str(tmp_path / "all.json")])
    assert read_records(tmp_path / "all.json") == records


def test_a_verdict_needs_every_seed() -> None:
    def result(*differences: float) -> str:
        return Verdict(task="digits", text="", differences=differences).result

    assert result(0.1, 0.2) == "holds"
    assert result(0.1, -0.2) == "undecided"
    assert result(-0.1, 0.0) == "does not hold"
    assert result() == "not run"


def test_its_data_are_records_that_commands_read(tmp_path: Path) -> None:
    path = write_records(MiniTask.SCENES, tmp_path / "data", 2)
    drawn = read_samples(path)[0]
    asked = read_samples(path, task=Task.UNDERSTANDING)[0]
    assert drawn.image is not None
    assert asked.answer in vocabulary()
    assert asked.sources[0].name == "0-seen.png"
    model = write_model(MiniTask.SCENES, tmp_path / "model")
    options = ["--steps", "1", "--batch-size", "2", "--quiet", "--data", str(path)]
    assert command(["adapt", str(model), str(tmp_path / "out"), *options, "--stage", "full"]) == 0


def test_words_outside_the_vocabulary_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_directory(TOKENIZER)
    tokenizer.encode("a red square")
    assert not caplog.text
    for _ in range(2):
        tokenizer.encode("a photo of a bench")
    assert caplog.text.count("outside the model's vocabulary") == 1
    assert "bench, photo" in caplog.text
