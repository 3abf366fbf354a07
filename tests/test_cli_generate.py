# SPDX-License-Identifier: Apache-2.0
"""generate and chat: loading for small GPUs and caching of steps, from the command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as image

from sparse_unified.bagel import BagelPipeline, Execution, StepCache
from sparse_unified.cli import main
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.nn.expert_state import is_packed

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(GOLDEN / "t2i_moe", tmp_path_factory.mktemp("model"))


def draw(model: Path, out: Path, *options: str) -> int:
    command = ["generate", str(model), "--prompt", "a red bench", "--size", "32x32", "--seed", "1"]
    return main([*command, "--steps", "8", "--quiet", "--out", str(out), *options])


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plain") / "plain.png"
    assert draw(model, path) == 0
    return image.open(path)


class Loaded:
    """What a command loaded, and what it asked it for."""

    def __init__(self) -> None:
        self.pipelines: list[BagelPipeline] = []
        self.arguments: list[dict[str, Any]] = []


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    seen = Loaded()
    load = BagelPipeline.from_pretrained

    @functools.wraps(load)
    def recorded(name: str, **options: Any) -> BagelPipeline:
        seen.arguments.append(options)
        seen.pipelines.append(load(name, **options))
        return seen.pipelines[-1]

    monkeypatch.setattr(BagelPipeline, "from_pretrained", recorded)
    return seen


@pytest.mark.parametrize("options", [["--task", "image"], ["--offload", "und"]])
def test_a_model_without_what_images_never_read_draws_the_same_picture(
    model: Path, plain: Any, tmp_path: Path, loaded: Loaded, options: list[str]
) -> None:
    assert draw(model, tmp_path / "x.png", *options) == 0
    assert image.open(tmp_path / "x.png").tobytes() == plain.tobytes()
    [pipeline] = loaded.pipelines
    last = pipeline.model.language_model.model.layers[-1]
    assert (last.mlp is None) == ("image" in options)
    assert (pipeline.model.vit_model is None) == ("image" in options)
    assert loaded.arguments[0][options[0].strip("-")] == options[1]


def test_a_picture_is_edited_without_what_that_never_reads(
    model: Path, tmp_path: Path, loaded: Loaded
) -> None:
    picture = tmp_path / "in.png"
    image.new("RGB", (32, 32), (200, 30, 30)).save(picture)
    for name, options in (("all", []), ("edit", ["--task", "edit"])):
        out = tmp_path / f"{name}.png"
        assert draw(model, out, "--image", str(picture), *options) == 0
    assert image.open(tmp_path / "edit.png").tobytes() == image.open(out).tobytes()
    assert loaded.pipelines[1].model.language_model.lm_head is None
    assert loaded.pipelines[1].model.vit_model is not None
    assert image.open(tmp_path / "all.png").tobytes() == image.open(out).tobytes()


@pytest.mark.parametrize("component", ["und", "gen"])
def test_weights_are_stored_in_8_bits(
    model: Path, tmp_path: Path, loaded: Loaded, component: str
) -> None:
    pytest.importorskip("torchao")
    assert draw(model, tmp_path / "x.png", "--storage", f"{component}=int8") == 0
    layer = loaded.pipelines[0].model.language_model.model.layers[1]
    sparse, dense = layer.mlp_moe_gen.gate_proj, layer.mlp.gate_proj.weight
    assert is_packed(sparse) == (component == "gen")
    assert is_packed(dense) == (component == "und")


def test_a_device_map_reaches_the_model(
    model: Path, plain: Any, tmp_path: Path, loaded: Loaded
) -> None:
    pytest.importorskip("accelerate")
    mapped = "--device-map=language_model.model.layers.1=disk,language_model.model.layers.2=cpu"
    folder = ["--offload-folder", str(tmp_path / "weights")]
    assert draw(model, tmp_path / "x.png", mapped, *folder) == 0
    assert image.open(tmp_path / "x.png").tobytes() == plain.tobytes()
    assert list((tmp_path / "weights").iterdir())
    assert draw(model, tmp_path / "y.png", "--device-map", "auto", "--max-memory", "cpu=1GiB") == 0
    assert loaded.arguments[1]["max_memory"] == {"cpu": "1GiB"}


def test_chat_is_loaded_the_same_ways(
    model: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chat", str(model), "--prompt", "what?", "--max-tokens", "3", "--quiet"]
    assert main(command) == 0
    answer = capsys.readouterr().out
    assert main([*command, "--offload", "und"]) == 0
    assert capsys.readouterr().out == answer
    assert [options["offload"] for options in loaded.arguments] == ["none", "und"]


def test_steps_are_extrapolated(
    model: Path,
    plain: Any,
    tmp_path: Path,
    loaded: Loaded,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.png"
    assert draw(model, out, "--cache-interval", "3", "--cache-order", "1") == 0
    assert "7 steps, 5 computed, in " in capsys.readouterr().out
    options = {"seed": 1, "num_timesteps": 8, "size": (32, 32), "progress": False}
    result = loaded.pipelines[0].generate("a red bench", cache=StepCache(order=1), **options)
    assert image.open(out).tobytes() == result.images[0].tobytes()
    assert image.open(out).tobytes() != plain.tobytes()
    assert (result.report.steps, result.report.computed_steps) == (7, 5)
    assert draw(model, out, "--cache-interval", "1", "--json", str(tmp_path / "r.json")) == 0
    assert image.open(out).tobytes() == plain.tobytes()
    assert json.loads((tmp_path / "r.json").read_text())["computed_steps"] == 7


@pytest.mark.parametrize(
    ("options", "compiled"),
    [(["--compile"], True), (["--compile", "max-autotune"], "max-autotune")],
)
def test_steps_are_compiled(
    model: Path,
    tmp_path: Path,
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    compiled: bool | str,
) -> None:
    started: list[Execution] = []
    monkeypatch.setattr(Execution, "start", lambda self, step: started.append(self) or step)
    assert draw(model, tmp_path / "x.png", *options) == 0
    assert {own.compile for own in started} == {compiled}
    assert loaded.arguments[0]["compile"] == compiled


def test_graphs_without_a_gpu_are_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert draw(tmp_path / "model", tmp_path / "x.png", "--cuda-graphs") == 1
    assert "cuda_graphs must be False for a model on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-interval", "0"], "--cache-interval: must be a positive integer, got '0'"),
        (["--cache-order", "4"], "--cache-order: invalid choice: 4"),
        (["--storage", "int4"], "--storage: must be int8, fp8, or und= and gen="),
        (["--storage", "und=int8,und=fp8"], "--storage: must be int8, fp8 or und=KIND,gen=KIND"),
        (["--storage", "vit=int8"], "--storage: must be int8, fp8, or und= and gen="),
        (["--device-map", "cpu"], "--device-map: must be auto or MODULE=DEVICE,..., each once"),
        (["--max-memory", "cpu=1GiB"], "--max-memory must come with --device-map, got none"),
        (["--offload-folder", "x"], "--offload-folder must come with --device-map, got none"),
        (
            ["--device-map", "auto", "--offload", "und"],
            "--device-map must come without --offload, got both",
        ),
        (
            ["--device-map", "auto", "--storage", "int8"],
            "--device-map must come without --storage, got both",
        ),
        (["--task", "image", "--think"], "--task must be all with --think, got image"),
        (["--compile", "fast"], "--compile: invalid choice: 'fast'"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_the_model_is_loaded(
    model: Path,
    tmp_path: Path,
    loaded: Loaded,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert draw(model, tmp_path / "x.png", *options) == 2
    assert message in capsys.readouterr().err
    assert not loaded.pipelines


def test_a_task_without_pictures_refuses_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "in.png"
    image.new("RGB", (32, 32)).save(picture)
    assert draw(model, tmp_path / "x.png", "--task", "image", "--image", str(picture)) == 2
    assert "--task must be edit or all with --image, got image" in capsys.readouterr().err
