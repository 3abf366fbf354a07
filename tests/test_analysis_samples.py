# SPDX-License-Identifier: Apache-2.0
"""Samples are read from plain and JSON files, and what is wrong with them is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
from PIL import Image
from refusals import refused

from sparse_unified.analysis import Sample, Task, built_in_samples, read_samples


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.mark.parametrize("task", list(Task))
def test_pictures_belong_to_the_lines_in_order(task: Task, tmp_path: Path) -> None:
    pictures = models.pictures(tmp_path / "images", 2)
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    prompts = write(tmp_path / "prompts.txt", "a bench", "", "  a boat ")
    samples = read_samples(prompts, tmp_path / "images", task, seed=7)
    assert [s.prompt for s in samples] == ["a bench", "a boat"]
    assert [s.seed for s in samples] == [7, 8]
    for sample, picture in zip(samples, pictures, strict=True):
        if task is Task.GENERATION:
            assert (sample.image, sample.sources) == (picture, ())
        else:
            assert (sample.image, sample.sources) == (None, (picture,))


def test_json_lines_name_every_role(tmp_path: Path) -> None:
    a, b = models.pictures(tmp_path, 2)
    line = {"prompt": "make it red", "source": ["0.png"], "image": "1.png", "answer": "done"}
    prompts = write(tmp_path / "p.jsonl", line, {"prompt": "x", "source": "1.png"})
    first, second = read_samples(prompts, None, Task.EDITING)
    assert (first.sources, first.image, first.answer) == ((a,), b, "done")
    assert (second.sources, second.image) == ((b,), None)
    assert len(read_samples(prompts, None, Task.EDITING, count=1)) == 1


def test_a_fingerprint_depends_on_everything_a_sample_is(tmp_path: Path) -> None:
    (picture,) = models.pictures(tmp_path, 1)
    sample = Sample(prompt="x", image=picture)
    changes = [{"prompt": "y"}, {"answer": "z"}, {"sources": (picture,)}, {"seed": 1}]
    found = [replace(sample, **change).fingerprint() for change in ({}, {}, *changes)]
    models.pictures(tmp_path, 1, size=(32, 32))
    found.append(sample.fingerprint())
    assert len(set(found)) == len(found) - 1


def test_built_in_samples_serve_every_task(tmp_path: Path) -> None:
    samples = built_in_samples(Task.GENERATION, 2, seed=5)
    assert [s.seed for s in samples] == [5, 6]
    assert len(built_in_samples(Task.UNDERSTANDING)) == 8
    assert len(built_in_samples(Task.EDITING, folder=tmp_path)) == 8
    for folder, message in ((None, "folder must be given"), (tmp_path / "no", "must be a folder")):
        refused(message, built_in_samples, Task.EDITING, folder=folder)
    for task in Task:
        with pytest.raises(ValueError, match="must hold --samples = 99 prompts, got 8"):
            built_in_samples(task, 99, folder=tmp_path)


def test_drawn_pictures_show_their_shapes_and_are_always_the_same(tmp_path: Path) -> None:
    samples = built_in_samples(Task.EDITING, folder=tmp_path)
    known = ["103708d34ddce9fc", "5c969819b0313b42"]
    assert [s.fingerprint() for s in samples[:2]] == known
    assert len({s.fingerprint() for s in samples}) == 8
    ball = Image.open(samples[0].sources[0]).convert("RGB")
    assert (ball.size, ball.getpixel((128, 128))) == ((256, 256), (210, 30, 30))


def test_damaged_lines_missing_files_and_wrong_counts_are_refused(tmp_path: Path) -> None:
    for line, word in (
        ("3", "line 1"),
        ({}, "prompt"),
        ({"prompt": "x", "answer": ""}, "answer"),
        ({"prompt": "x", "source": [3]}, "source"),
        ({"prompt": "x", "image": "none.png"}, r"none\.png"),
    ):
        refused(word, read_samples, write(tmp_path / "p.jsonl", line), None, Task.GENERATION)
    prompts, empty = write(tmp_path / "p.txt", "a", "b"), write(tmp_path / "empty.txt", "")
    models.pictures(tmp_path / "one", 1)
    for path, images, task, count in (
        (tmp_path / "none.txt", None, Task.GENERATION, None),
        (prompts, tmp_path / "none", Task.GENERATION, None),
        (prompts, tmp_path / "one", Task.GENERATION, None),
        (empty, None, Task.GENERATION, None),
        (prompts, None, Task.GENERATION, 3),
        (prompts, None, Task.EDITING, None),
    ):
        refused(r"--(prompts|images): .* must", read_samples, path, images, task, count)


def test_records_of_training_are_samples(tmp_path: Path) -> None:
    models.pictures(tmp_path, 1)
    picture = next(tmp_path.glob("*.png"))
    record = {"image": picture.name, "text": "a bench", "question": "what", "answer": "bench"}
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (drawn,) = read_samples(file)
    assert (drawn.prompt, drawn.image, drawn.sources) == ("a bench", picture, ())
    (asked,) = read_samples(file, task=Task.UNDERSTANDING)
    assert (asked.prompt, asked.answer) == ("what", "bench")
    assert (asked.image, asked.sources) == (None, (picture,))
