# SPDX-License-Identifier: Apache-2.0
"""The prune command: what it takes, and wrong usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import snapshot
from prune_models import (
    apply_live,
    assert_equal,
    load,
    outputs,
    small_bagel,
    write_model,
)

from sparse_unified import (
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    prune_width_,
)
from sparse_unified.analysis import save_scores, score
from sparse_unified.checkpoint import prune
from sparse_unified.cli import main


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--quiet"])


def test_the_command_prunes_verifies_and_shows(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--component", "und,gen", "--axis", "depth,width,heads", "--keep-ratio", ".5"]
    options += ["--skip-layers", "1", "--skip-part", "ffn", "--block-size", "16"]
    assert run("prune", dense, out, *options, "--budget", "global", "--layers", "all") == 0
    text = capsys.readouterr().out
    assert "depth: component und, layers 1, part ffn" in text
    assert "FLOPs per token" in text
    assert run("verify", out, "--against", dense) == 0
    assert "is a part of" in capsys.readouterr().out
    assert run("info", out) == 0
    assert "no FFN in 1" in capsys.readouterr().out
    modes = [
        *(SkipLayersConfig(component=c, layers=[1], part="ffn") for c in ("und", "gen")),
        *(PruneWidthConfig(component=c, block_size=16, budget="global") for c in ("und", "gen")),
        PruneHeadsConfig(component="both", budget="global"),
    ]
    live = small_bagel()
    apply_live(live, modes)
    assert_equal(outputs(live), outputs(load(out)))


def test_the_command_ranks_at_random_from_a_seed(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--component", "gen", "--keep-ratio", "0.5", "--criterion", "random"]
    assert run("prune", dense, tmp_path / "a", *options, "--seed", 3) == 0
    prune(dense, tmp_path / "b", PruneWidthConfig(), seed=3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert run("prune", dense, tmp_path / "c", *options, "--json") == 0
    assert '"random, seed 0"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--component", "vit"], "--component: must be different ones of und, gen"),
        (["--component", "gen,gen"], "--component: must be different ones of und, gen"),
        (["--component", "gen"], "--keep-ratio must be given with --axis width"),
        (["--component", "gen", "--axis", "height"], "--axis: must be different ones of depth"),
        (["--component", "gen", "--keep-ratio", "0"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--keep-ratio", "1.5"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--keep-ratio", "nan"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--axis", "depth"], "--skip-layers must be given with --axis"),
        (
            ["--component", "gen", "--keep-ratio", "1", "--skip-layers", "1"],
            "--skip-layers must be given with an --axis that it belongs to",
        ),
        (
            ["--component", "gen", "--keep-ratio", "1", "--seed", "1"],
            "--seed must be given with --criterion random",
        ),
        (
            ["--component", "gen", "--keep-ratio", "1", "--scores", "x", "--criterion", "random"],
            "not allowed with argument",
        ),
    ],
)
def test_wrong_usage_of_the_command(
    options: list[str], message: str, dense: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run("prune", dense, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_of_a_criterion_prune_the_file_as_they_prune_the_model(
    dense: Path, tmp_path: Path
) -> None:
    live = small_bagel()
    scores = score("random", live, seed=5)
    save_scores(tmp_path / "scores.safetensors", scores)
    options = ["--component", "und,gen", "--keep-ratio", "0.5"]
    how = ["--scores", tmp_path / "scores.safetensors"]
    assert run("prune", dense, tmp_path / "out", *options, *how) == 0
    for component in ("und", "gen"):
        prune_width_(live, PruneWidthConfig(component=component), scores)
    assert_equal(outputs(live), outputs(load(tmp_path / "out")))
