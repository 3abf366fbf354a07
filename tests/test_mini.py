# SPDX-License-Identifier: Apache-2.0
"""The miniature: the models that the package holds, what they were trained on, and the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from miniature import scenes
from miniature.__main__ import main
from miniature.data import MiniDataset, latent_of, write_records
from miniature.evaluate import EvaluationConfig, evaluate
from miniature.report import (
    BEGIN,
    END,
    Verdict,
    bootstrap,
    comparisons,
    fill_page,
    gather,
    read_records,
    verdict,
)
from miniature.study import ACTIVE, GUIDED, SCHEDULES, SHOWN, StudyConfig, run_study
from miniature.vision import train_vision_
from sparse_unified.analysis import Task, read_samples
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.cli import main as command
from sparse_unified.mini import load_pipeline, write_model
from sparse_unified.mini.model import (
    TOKENIZER,
    WEIGHTS,
    encode,
    mini_autoencoder,
    new_model,
    trained_weights,
    vocabulary,
)

SEEDS = (0, 1, 2)
SMALL = StudyConfig(
    models=(0,),
    steps=(0, 2),
    batch_size=4,
    evaluation=EvaluationConfig(questions=8, velocities=32, pictures=1),
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Models


def test_the_autoencoder_gives_every_kind_of_cell_its_code(generator: torch.Generator) -> None:
    vae = mini_autoencoder()
    drawn = [prompt.draw(generator) for prompt in scenes.all_prompts()[::40]]
    pixels = torch.stack([scenes.render(objects) for objects in drawn])
    codes = torch.stack([latent_of(scenes.kinds_of(objects)) for objects in drawn])
    latents = vae.encode(pixels)
    assert (latents - codes).square().mean().sqrt() < 0.1
    assert codes.std() == pytest.approx(1, abs=0.2)
    for found in (vae.decode(latents), vae.decode(codes)):
        assert (found - pixels).square().mean().sqrt() < 0.05
        read = [set(scenes.read_scene(picture)) for picture in found]
        assert read == [set(objects) for objects in drawn]


def test_eyes_learn_to_tell_cells_and_nothing_else_changes() -> None:
    model, other = new_model(0), new_model(0)
    assert train_vision_(model, steps=150) > 0.9
    for name, tensor in other.state_dict().items():
        is_seeing = name.startswith(("vit_model.", "connector."))
        assert torch.equal(model.state_dict()[name], tensor) or is_seeing, name
        assert model.get_parameter(name).requires_grad != is_seeing or "pos_embed" in name, name


def test_the_tokenizer_gives_every_word_its_own_id(generator: torch.Generator) -> None:
    tokenizer = Tokenizer.from_directory(TOKENIZER)
    texts = [prompt.text for prompt in scenes.all_prompts()]
    texts += [scenes.draw_placed_prompt(generator).text for _ in range(20)]
    for kind in scenes.QUESTION_KINDS:
        texts += [q.text for q in scenes.draw_questions(kind, generator, held_out=True)]
    for text in texts:
        assert tokenizer.encode(text) == encode(text)
        assert tokenizer.decode(encode(text)) == text
        assert vocabulary()["<|endoftext|>"] not in encode(text)
    assert tokenizer.encode("An unknown word") == encode("An unknown word")


def test_a_written_model_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    model = new_model(0)
    pipeline = load_pipeline(write_model(tmp_path, model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], tensor), name
    assert pipeline.model.config == model.config
    side = model.config.vision.image_size
    result = pipeline.generate("a cross", seed=0, num_timesteps=3, progress=False)
    assert result.images[0].size == (side, side)
    assert pipeline.chat("how many ?", images=result.images, max_length=2).token_ids[0] == 1


def test_what_is_shipped_says_how_it_was_made_and_is_small() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS.glob("*.safetensors")) <= 8 * 2**20
    assert len({(WEIGHTS / f"ema-{seed}.safetensors").read_bytes() for seed in SEEDS}) == len(SEEDS)
    for seed in SEEDS:
        about = json.loads((WEIGHTS / f"training-{seed}.json").read_text())
        log = [json.loads(s) for s in (WEIGHTS / f"log-{seed}.jsonl").read_text().splitlines()]
        assert about["command"] == f"python examples/miniature train OUT --seed {seed}"
        assert log[-1]["step"] == about["training"]["steps"]
        assert log[-1]["image_loss"] < log[0]["image_loss"] / 4
        assert sum(w.numel() for w in trained_weights(seed).values()) == about["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_trained_models_read_and_draw(seed: int, tmp_path: Path) -> None:
    model = new_model(0)
    model.load_state_dict(trained_weights(seed))
    found = evaluate(model, EvaluationConfig(questions=120), GUIDED)
    assert found["understanding"] >= 0.9
    assert found["generation"] >= 0.75
    assert found["position"] >= 0.6


# Data and judges


def test_a_scene_is_read_back_and_scores_1(generator: torch.Generator) -> None:
    prompts = scenes.all_prompts()
    assert len({p.text for p in prompts}) == len(prompts) == 2052
    assert {p.text for p in scenes.split_prompts()[1]} >= set(SHOWN)
    prompts = prompts[::9]
    drawn = [prompt.draw(generator) for prompt in prompts]
    pictures = [scenes.render(objects) for objects in drawn]
    for objects, picture in zip(drawn, pictures, strict=True):
        assert set(scenes.read_scene(picture)) == set(objects)
    assert all(scenes.judge(prompts, pictures))
    noisy = pictures[-1] + 0.08 * torch.randn(pictures[-1].shape, generator=generator)
    assert scenes.judge(prompts[-1:], [noisy]) == [True]
    faint = (pictures[-1] + scenes.render([])) / 2
    assert None in scenes.read_scene(faint)
    assert not prompts[-1].holds(scenes.read_scene(faint))


def test_every_single_mistake_scores_0(generator: torch.Generator) -> None:
    placed = [scenes.draw_placed_prompt(generator) for _ in range(20)]
    for prompt in [*scenes.all_prompts()[::17], *placed]:
        objects = prompt.draw(generator)
        assert prompt.holds(objects)
        first, others = objects[0], objects[1:]
        wrong_shape = next(s for s in scenes.SHAPES if s not in {o.shape for o in objects})
        used = {(o.row, o.column) for o in objects}
        free = [(r, c) for r in range(3) for c in range(3) if (r, c) not in used]
        mistakes = [others, [first._replace(shape=wrong_shape), *others], [None, *objects]]
        mistakes += [[*objects, first._replace(row=r, column=c)] for r, c in free]
        part = prompt.parts[0]
        if part.colour:
            wrong = next(c for c in scenes.COLOURS if c != first.colour)
            mistakes.append([first._replace(colour=wrong), *others])
        if part.texture:
            wrong = next(t for t in scenes.TEXTURES if t != first.texture)
            mistakes.append([first._replace(texture=wrong), *others])
        if part.place:
            mistakes += [[first._replace(row=r, column=c), *others] for r, c in free]
        if prompt.relation:
            second = objects[1]
            swapped = first._replace(row=second.row, column=second.column)
            mistakes.append([swapped, second._replace(row=first.row, column=first.column)])
        for mistake in mistakes:
            assert not prompt.holds(mistake), prompt.text


def test_what_is_tested_is_not_trained_on(generator: torch.Generator) -> None:
    train, test = ({p.meaning for p in prompts} for prompts in scenes.split_prompts())
    assert not train & test
    texts = [{p.text for p in prompts} for prompts in scenes.split_prompts()]
    assert texts[0] | texts[1] == {p.text for p in scenes.all_prompts()}
    words = [{word for text in own for word in text.split()} for own in texts]
    assert words[1] <= words[0]
    for text, same in (
        ("a star above a circle", "a circle below a star"),
        ("a red star and a blue cross", "a blue cross and a red star"),
    ):
        assert {text, same} <= texts[1]
    for column in scenes.COLUMNS:
        assert sum(p.column == column for p in scenes.split_prompts()[1]) >= 30
    data = MiniDataset()
    assert not {data.scene(i, generator)[1] for i in range(400)} & texts[1]
    placed = [scenes.draw_placed_prompt(generator) for _ in range(400)]
    assert not {prompt.meaning for prompt in placed} & test
    asked = [q for i in range(100) for q in data.questions(i, generator)]
    assert not any(scenes.is_held_out(q.objects) for q in asked)
    tested = [scenes.draw_questions("position", generator, held_out=True)[0] for _ in range(20)]
    assert all(scenes.is_held_out(q.objects) for q in tested)


def test_sequences_are_functions_of_index_and_generator() -> None:
    data = MiniDataset()
    for index in (0, 1, 2, 3, 7, len(data) - 2, len(data) - 1):
        made = [data.sequence(index, torch.Generator().manual_seed(7)) for _ in range(2)]
        first, again = ([repr(segment) for segment in sequence] for sequence in made)
        assert first == again
        kinds = {type(segment).__name__ for segment in made[0]}
        assert kinds <= {"TextSegment", "VitSegment" if index % 4 == 3 else "LatentSegment"}


def test_its_data_are_records_that_commands_read(tmp_path: Path) -> None:
    path = write_records(tmp_path / "data", 2)
    drawn = read_samples(path)[0]
    asked = read_samples(path, task=Task.UNDERSTANDING)[0]
    assert drawn.image is not None
    assert asked.answer in vocabulary()
    assert asked.sources[0].name == "0-seen.png"
    model = write_model(tmp_path / "model")
    options = ["--steps", "1", "--batch-size", "2", "--quiet", "--data", str(path)]
    assert command(["adapt", str(model), str(tmp_path / "out"), *options, "--stage", "full"]) == 0


# The study


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    names = ("static-1-2", "sparse-16-8-0", "coactivation-24-8-8")
    run: list[str] = []

    def study(config: StudyConfig = SMALL) -> list[Path]:
        return run_study(
            tmp_path, config, names=names, progress=lambda part, *_: run.append(part.name)
        )

    files = study()
    assert run == list(names)
    kept = [json.loads(file.read_text()) for file in files]
    files[0].unlink()
    study()
    assert run[3:] == ["static-1-2"]
    assert json.loads(files[0].read_text())["results"] == kept[0]["results"]
    other = StudyConfig(models=(0,), steps=(0, 3))
    refused("config must be that of this study", study, other)

    static, snake, together = (record["results"] for record in kept)
    assert set(static) == {"0", "2", "guided"}
    active = {f"top_k {k}" for k in (*ACTIVE, *SCHEDULES)}
    assert set(snake) == {*static, "routing", *active}
    drawn = {key: snake[key]["items"]["pictures"] for key in active}
    assert len(set(drawn.values())) > 1
    assert snake["0"]["velocity"] != static["0"]["velocity"] != together["0"]["velocity"]
    assert set(snake["routing"]) == {"cell", "time", "column", "shape"}
    records = read_records(tmp_path)
    values = gather(records)
    found = {(c.row, c.metric): verdict(values, c) for c in comparisons() if c.column == "0 steps"}
    gain = found["16/8 beats static 1/2", "velocity"]
    expected = static["0"]["velocity"] - snake["0"]["velocity"]
    assert gain.differences == pytest.approx([expected], abs=1e-5)
    assert found["32/16 beats static 1/2", "velocity"].result == "not run"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    fill_page(page, records)
    assert "| static 1/4 | not run" in page.read_text()
    assert "| not run | not run |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    plot = tmp_path / "plot.svg"
    main(["report", str(tmp_path), "--json", str(tmp_path / "all.json"), "--plot", str(plot)])
    assert "</svg>" in plot.read_text()
    assert read_records(tmp_path / "all.json") == records


def test_an_interval_pairs_what_is_compared_and_knows_its_models() -> None:
    generator = np.random.default_rng(0)
    values: Any = {("a", "0"): {}, ("b", "0"): {}}
    for model in SEEDS:
        right = generator.random(400) < 0.5
        better = right.copy()
        better[:20] = True  # some of these were right before
        for part, items in (("a", right), ("b", better)):
            text = "".join(str(int(item)) for item in items)
            values[part, "0"][model] = {"items": {"pictures": text}}
    a, b = ("a", "0", "pictures"), ("b", "0", "pictures")
    low, high, gains = bootstrap(values, [b, a], lambda x, y: x - y)
    mean = sum(gains) / len(gains)
    assert 0 < low < mean < high < 0.05
    assert len(gains) == 3
    low, high, _ = bootstrap(values, [a], lambda x: x)
    assert 0.05 < high - low < 0.065  # unpaired: 4 standard errors of 1,200 draws are 0.058
    assert bootstrap(values, [a, ("c", "0", "pictures")], lambda x, y: x - y) == (0, 0, ())
    assert Verdict(low=low, high=high, differences=(0.5, 0.4, 0.6)).result == "holds"
    assert Verdict(low=low, high=high, differences=(1.2, 0.4, -0.1)).result == "undecided"
    assert Verdict(low=-high, high=-low, differences=(-0.5, -0.4)).result == "does not hold"


def test_words_outside_the_vocabulary_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_directory(TOKENIZER)
    tokenizer.encode("a red square")
    assert not caplog.text
    for _ in range(2):
        tokenizer.encode("a photo of a bench")
    assert caplog.text.count("outside the model's vocabulary") == 1
    assert "bench, photo" in caplog.text
