# SPDX-License-Identifier: Apache-2.0
"""The page: what stands behind it, what the command refuses, and the page in a browser."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from sparse_unified.checkpoint import PruneWidthConfig, convert, prune
from sparse_unified.cli import main
from sparse_unified.cli.app import ask, build_page, draw, sparse_blocks
from sparse_unified.mini import MiniTask, load_pipeline, write_model

image = pytest.importorskip("PIL.Image")
PAGE: Any = {"num_timesteps": 50, "cfg_text_scale": 1.0, "timestep_shift": 2.0}
QUICK = {**PAGE, "num_timesteps": 8, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("app")
    dense = write_model(MiniTask.SCENES, root / "dense")
    prune(dense, root / "pruned", [PruneWidthConfig(component="gen", keep_ratio=0.5)])
    convert(dense, root / "sparse", num_experts=16, top_k=8, layers="all")
    return {name: load_pipeline(root / name) for name in ("dense", "pruned", "sparse")}


def test_models_draw_from_the_same_noise_and_all_experts_are_the_dense_model(models: Any) -> None:
    some = {name: found for name, *found in draw(models, "a red square", **QUICK)}
    every_expert = QUICK | {"top_k": {"sparse": 16}}
    every = {name: found for name, *found in draw(models, "a red square", **every_expert)}
    dense, sparse = every["dense"][0].tobytes(), every["sparse"][0].tobytes()
    assert dense == some["dense"][0].tobytes() != some["sparse"][0].tobytes()
    assert max(abs(a - b) for a, b in zip(dense, sparse, strict=True)) <= 1
    assert "229,504 of 376,960 parameters" in some["sparse"][1]  # as `info` says
    refused("prompt must not be empty", list, draw(models, " ", **every_expert))
    assert {block.top_k for block in sparse_blocks(models["sparse"]).values()} == {8}


def test_images_are_edited_with_cached_steps_and_asked_about(models: Any) -> None:
    red, steps = image.new("RGB", (16, 16), "red"), []
    options = QUICK | {"progress": lambda *step: steps.append(step)}
    edited = list(draw(models, "a red cross", images=red, interval=3, size=(32, 32), **options))
    assert [(name, drawn.size) for name, drawn, _ in edited] == [(n, (256, 256)) for n in models]
    assert "5 of 7 steps computed" in edited[0][2]
    assert steps == [(n, 7) for n in range(1, 8)] * len(models)
    assert [name for name, *_ in ask(models, "which colour ?", images=red)] == list(models)


@pytest.mark.parametrize("words", ["different ones", "num_timesteps", "same image size", "[app]"])
def test_what_cannot_be_shown_is_refused(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    a, b = (str(write_model(task, tmp_path / task.value)) for task in MiniTask)
    wrong = {"different ones": [a, a], "num_timesteps": [a, "--steps", "1"], "[app]": [a]}
    monkeypatch.setitem(sys.modules, "gradio", None if words == "[app]" else pytest)  # not reached
    assert main(["app", *wrong.get(words, [a, b])]) == (2 if words == "different ones" else 1)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_draws(models: Any) -> None:
    """SPARSE_UNIFIED_APP_PICTURE names a file that keeps what it shows."""
    pytest.importorskip("gradio")
    selenium = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver") or pytest.skip("Chromium's chromedriver is missing")
    options = selenium.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1060"):
        options.add_argument(f"--{flag}")
    page = build_page(models, **PAGE)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    try:
        browser.get(url)
        browser.implicitly_wait(60)
        find = functools.partial(browser.find_element, "css selector")
        find("textarea").send_keys("a red square\n")
        find(f"div:has(> .column:nth-child({len(models)}) img[src*='/file='])")
        if name := os.environ.get("SPARSE_UNIFIED_APP_PICTURE"):
            browser.save_screenshot(name)
    finally:
        browser.quit()
        page.close()
