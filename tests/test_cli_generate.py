# SPDX-License-Identifier: Apache-2.0
"""generate, chat and app: images and answers from the command line and on a page."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen.model import identity_autoencoder
from refusals import refused

from sparse_unified.bagel import BagelPipeline, StepCache
from sparse_unified.bagel.images import ImageProcessor
from sparse_unified.checkpoint import PruneWidthConfig, convert, prune
from sparse_unified.cli import app, main
from sparse_unified.mini import load_pipeline, write_model

image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def model(golden: Any) -> Path:
    return golden("t2i_moe")


def draw(model: Path, out: Path, *options: object) -> int:
    command = ["generate", str(model), "--prompt", "a red bench", "--size", "32x32", "--seed", "1"]
    command += ["--steps", "8", "--quiet", "--out", str(out)]
    return main([*command, *map(str, options)])


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plain") / "plain.png"
    assert draw(model, path) == 0
    return image.open(path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[BagelPipeline]:
    """What a command loaded."""
    seen: list[BagelPipeline] = []
    load = BagelPipeline.from_pretrained

    @functools.wraps(load)
    def recorded(name: str, **options: Any) -> BagelPipeline:
        seen.append(load(name, **options))
        return seen[-1]

    monkeypatch.setattr(BagelPipeline, "from_pretrained", recorded)
    return seen


def assert_same_picture(one: Path, other: Path) -> None:
    """Equal up to the rounding of a pixel: GEMMs of other sizes sum in another order."""
    pixels = (image.open(path).tobytes() for path in (one, other))
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1


def test_a_picture_for_each_prompt_whatever_the_batch(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\na cat\n  a dog \n\n")
    size = ["--size", "48x64", "--steps", "3", "--seed", "5"]
    think = ["--think", "--max-think-tokens", "3"]
    prompts = ["--prompts-file", tmp_path / "prompts.txt"]
    json_file = tmp_path / "r.json"
    assert draw(model, tmp_path / "x.png", *prompts, *size, *think, "--json", json_file) == 0
    report = json.loads(json_file.read_text())
    found = [(entry["prompt"], entry["seed"]) for entry in report["images"]]
    assert found == [("a red bench", 5), ("a cat", 6), ("a dog", 7)]
    assert all(isinstance(entry["thought"], str) for entry in report["images"])
    assert report["steps"] == len(report["step_seconds"]) == 2
    assert (report["backend"], report["image_tokens"]) == ("cpu", 3 * 3 * 4)
    assert "2 steps, 2 computed, " in capsys.readouterr().out
    assert draw(model, tmp_path / "y.png", *prompts, *size, *think, "--batch-size", 1) == 0
    for number in range(3):
        assert image.open(tmp_path / f"x-{number}.png").size == (64, 48)
        assert_same_picture(tmp_path / f"x-{number}.png", tmp_path / f"y-{number}.png")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--image text.png", 1, "must be a readable"),
        ("--image none.png", 1, "file must be readable"),
        ("--prompts-file none.txt", 1, "must be readable"),
        ("--device toaster", 1, "must be a device of this torch"),
        ("--device meta", 1, "must be a device that holds data, got 'meta'"),
        ("--out no/x.png", 1, "--out: directory must be there"),
        ("--image in.png --image in.png --prompt b --prompt c", 2, "for each of 3 prompts, got 2"),
        ("--task image --image in.png", 2, "--task must be edit or all with --image"),
        ("--cuda-graphs", 1, "cuda_graphs must be False for a model on cpu"),
        ("--top-k 4,x:8", 2, "--top-k: must be K, or K,T:K,..."),
        ("--top-k 4,0.5:8,0.6:2", 2, "--top-k: must be K, or K,T:K,..."),
        ("--top-k 0", 2, "--top-k: must be K, or K,T:K,..."),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_model_is_loaded(
    model: Path,
    picture: Path,
    loaded: list[BagelPipeline],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(picture.parent)
    Path("text.png").write_text("no picture")
    assert draw(model, Path("x.png"), *options.split()) == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not loaded


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--task edit --offload und", {"task": "edit", "offload": "und"}),
        ("--storage und=int8,gen=fp8", {"storage": {"und": "int8", "gen": "fp8"}}),
        (
            "--device-map a.1=disk,a.2=0 --offload-folder x",
            {"device_map": {"a.1": "disk", "a.2": 0}, "offload_folder": "x"},
        ),
        (
            "--device-map auto --max-memory 0=20GiB,cpu=1GiB",
            {"device_map": "auto", "max_memory": {0: "20GiB", "cpu": "1GiB"}},
        ),
        ("--compile max-autotune --cuda-graphs", {"compile": "max-autotune", "cuda_graphs": True}),
        ("--dtype bfloat16", {"dtype": torch.bfloat16, "device": torch.device("cpu")}),
    ],
)
def test_flags_reach_the_loader(monkeypatch: Any, options: str, expected: dict[str, Any]) -> None:
    given: dict[str, Any] = {}

    @functools.wraps(BagelPipeline.from_pretrained)
    def load(name: str, **options: Any) -> BagelPipeline:
        given.update(options, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr(BagelPipeline, "from_pretrained", load)
    assert draw(Path("m"), Path("x.png"), *options.split()) == 130
    assert given == given | expected | {"name": "m"}
    for name in ("task", "compile", "cuda_graphs"):  # chat has all others
        if f"--{name.replace('_', '-')}" in options:
            return
    assert main(["chat", "m", "--prompt", "what?", *options.split()]) == 130
    assert given == given | expected


def test_steps_are_extrapolated(
    model: Path,
    plain: Any,
    tmp_path: Path,
    loaded: list[BagelPipeline],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.png"
    assert draw(model, out, "--cache-interval", 3, "--cache-order", 1) == 0
    assert "7 steps, 5 computed, " in capsys.readouterr().out
    options = {"seed": 1, "num_timesteps": 8, "size": (32, 32), "progress": False}
    result = loaded[0].generate("a red bench", cache=StepCache(order=1), **options)
    assert image.open(out).tobytes() == result.images[0].tobytes()
    assert image.open(out).tobytes() != plain.tobytes()
    assert (result.report.steps, result.report.computed_steps) == (7, 5)
    assert draw(model, out, "--cache-interval", 1) == 0
    assert image.open(out).tobytes() == plain.tobytes()


# The page: what stands behind it, what the command refuses, and the page in a browser


PAGE: Any = {"num_timesteps": 50, "cfg_text_scale": 1.0, "timestep_shift": 2.0}
QUICK = {**PAGE, "num_timesteps": 8, "seed": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("app")
    dense = write_model(root / "dense")
    prune(dense, root / "pruned", [PruneWidthConfig(component="gen", keep_ratio=0.5)])
    convert(dense, root / "sparse", num_experts=16, top_k=8, layers="all")
    return {name: load_pipeline(root / name) for name in ("dense", "pruned", "sparse")}


def test_models_draw_from_the_same_noise_and_all_experts_are_the_dense_model(models: Any) -> None:
    some = {name: found for name, *found in app.draw(models, "a red star", **QUICK)}
    every_expert = QUICK | {"top_k": {"sparse": 16}}
    every = {name: found for name, *found in app.draw(models, "a red star", **every_expert)}
    dense, sparse = every["dense"][0].tobytes(), every["sparse"][0].tobytes()
    assert dense == some["dense"][0].tobytes() != some["sparse"][0].tobytes()
    assert max(abs(a - b) for a, b in zip(dense, sparse, strict=True)) <= 1
    assert "192,576 of 266,304 parameters of gen layers" in some["sparse"][1]
    refused("prompt must not be empty", list, app.draw(models, " ", **every_expert))
    assert {block.top_k for block in app.sparse_blocks(models["sparse"]).values()} == {8}


def test_one_checkpoint_draws_and_answers_with_as_many_experts_as_asked(
    models: Any, tmp_path: Path
) -> None:
    sparse, drawn = models["sparse"], []
    for given in ("8", "16", "4,0.5:16"):
        command = ["generate", str(sparse.directory), "--prompt", "a red square", "--seed", "3"]
        command += ["--steps", "8", "--cfg-text-scale", "1", "--timestep-shift", "2", "--quiet"]
        assert main([*command, "--top-k", given, "--out", str(tmp_path / "x.png")]) == 0
        drawn.append(image.open(tmp_path / "x.png").tobytes())
    own, dense = (
        models[name].generate("a red square", progress=False, **QUICK).images[0].tobytes()
        for name in ("sparse", "dense")
    )
    assert own == drawn[0] != drawn[2] != drawn[1]
    assert max(abs(a - b) for a, b in zip(dense, drawn[1], strict=True)) <= 1
    red = image.new("RGB", (16, 16), "red")
    command = ["chat", str(sparse.directory), "--prompt", "which colour ?", "--quiet"]
    red.save(tmp_path / "red.png")
    assert main([*command, "--image", str(tmp_path / "red.png"), "--top-k", "3"]) == 0
    refused("chat: top_k must be from 1 to the 16", sparse.chat, "which ?", images=red, top_k=17)
    refused("generate: top_k must be left out", models["dense"].generate, "a cross", top_k=4)
    assert {block.top_k for block in app.sparse_blocks(sparse).values()} == {8}


def test_images_are_edited_with_cached_steps_and_asked_about(models: Any) -> None:
    red = image.new("RGB", (16, 16), "red")
    edited = list(app.draw(models, "a red cross", images=red, interval=3, size=(32, 32), **QUICK))
    assert [name for name, *_ in edited] == [name for name in models for _ in range(8)]
    assert {drawn.size for _, drawn, _ in edited} == {(288, 288)}
    assert [text for *_, text in edited[:7]] == [f"step {n}" for n in range(1, 8)]
    assert "5 of 7 steps computed" in edited[7][2]


def test_previews_come_closer_and_the_last_one_is_the_image(models: Any) -> None:
    dense = {"dense": models["dense"]}
    options = QUICK | {"num_timesteps": 20}
    *steps, last, drawn = (found for _, found, _ in app.draw(dense, "a red star", **options))
    far = [
        sum(abs(a - b) for a, b in zip(step.tobytes(), drawn.tobytes(), strict=True))
        for step in steps
    ]
    assert far[0] > 4 * far[-1] > 0
    assert last.tobytes() == drawn.tobytes()


def test_large_images_are_previewed_small(models: Any) -> None:
    given = models["dense"].image_processor.config
    config = dataclasses.replace(given, latent_channels=3, vae_downsample=2, max_latent_size=72)
    processor = ImageProcessor(config, identity_autoencoder(1.0, 2))
    tokens = torch.randn(72 * 36, config.token_channels) / 8
    large, small = (processor.decode(tokens, (288, 144), small=own) for own in (False, True))
    assert (large.size, small.size) == ((144, 288), (72, 144))
    shrunk = (own.resize((36, 72), image.Resampling.BOX).tobytes() for own in (large, small))
    assert max(abs(a - b) for a, b in zip(*shrunk, strict=True)) <= 2


def test_questions_are_answered_by_each_model(models: Any) -> None:
    red = image.new("RGB", (16, 16), "red")
    assert [name for name, *_ in app.ask(models, "which colour ?", images=red)] == list(models)


@pytest.mark.parametrize("words", ["different ones", "num_timesteps", "same image size", "[app]"])
def test_what_cannot_be_shown_is_refused(
    words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    a, b = str(write_model(tmp_path / "mini")), str(model)
    wrong = {"different ones": [a, a], "num_timesteps": [a, "--steps", "1"], "[app]": [a]}
    monkeypatch.setitem(sys.modules, "gradio", None if words == "[app]" else pytest)  # not reached
    assert main(["app", *wrong.get(words, [a, b])]) == (2 if words == "different ones" else 1)
    assert words in capsys.readouterr().err


def test_the_page_draws_with_the_guidance_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    given: dict[str, Any] = {}

    def build(models: Any, **sampling: Any) -> None:
        given.update(sampling)
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "build_page", build)
    monkeypatch.setitem(sys.modules, "gradio", pytest)
    mini = str(write_model(tmp_path / "mini"))
    own = {"size": None, "num_timesteps": 50, "timestep_shift": 3.0, "cfg_text_scale": 4.0}
    assert main(["app", mini]) == 130
    assert given == own | {"cfg_renorm_min": 0.0}  # the rest is official, for drawing and editing
    options = "--cfg-interval 0,1 --cfg-img-scale 3 --cfg-renorm-type channel --cfg-renorm-min .5"
    assert main(["app", mini, *options.split()]) == 130
    more = {"cfg_interval": (0.0, 1.0), "cfg_img_scale": 3.0, "cfg_renorm_type": "channel"}
    assert given == own | more | {"cfg_renorm_min": 0.5}


@pytest.mark.slow
def test_a_browser_draws(models: Any) -> None:
    """SPARSE_UNIFIED_APP_PICTURE names a file that keeps what it shows."""
    pytest.importorskip("gradio")
    selenium = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver") or pytest.skip("Chromium's chromedriver is missing")
    options = selenium.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1060"):
        options.add_argument(f"--{flag}")
    page = app.build_page(models, **PAGE)
    watch = """window.seen = new Set(); new MutationObserver(() => document.querySelectorAll(
        ".column img").forEach(own => window.seen.add(own.src))).observe(
        document.body, {subtree: true, childList: true, attributes: true})"""
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    try:
        browser.get(url)
        browser.implicitly_wait(60)
        find = functools.partial(browser.find_element, "css selector")
        browser.execute_script(watch)
        find("textarea").send_keys("a red square\n")
        last = f"//div[{len(models)}][contains(@class, 'column')]"
        browser.find_element("xpath", f"{last}//p[contains(., 'seed 0')]")
        find(f"div:has(> .column:nth-child({len(models)}) img[src*='/file='])")
        assert browser.execute_script("return window.seen.size") > 2 * len(models)  # live
        if name := os.environ.get("SPARSE_UNIFIED_APP_PICTURE"):
            browser.save_screenshot(name)
    finally:
        browser.quit()
        page.close()
