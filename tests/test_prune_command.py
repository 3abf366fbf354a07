# SPDX-License-Identifier: Apache-2.0
"""The prune command: what it takes, and wrong usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import snapshot
from prune_models import (
    write_model,
)

from sparse_unified import (
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint import prune
from sparse_unified.cli import main


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


HALF = ["--component", "gen", "--keep-ratio", "0.5"]


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--quiet"])


def test_the_command_prunes_verifies_and_shows(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--component", "und,gen", "--axis", "depth,width,heads", "--keep-ratio", ".5"]
    options += ["--skip-layers", "1", "--skip-part", "ffn", "--block-size", "16"]
    for command, text in (
        (("prune", dense, out, *options, "--budget", "global", "--layers", "all"), "FLOPs per"),
        (("verify", out, "--against", dense), "is a part of"),
        (("info", out), "no FFN in 1"),
    ):
        assert run(*command) == 0
        assert text in capsys.readouterr().out
    modes = [
        *(SkipLayersConfig(component=c, layers=[1], part="ffn") for c in ("und", "gen")),
        *(PruneWidthConfig(component=c, block_size=16, budget="global") for c in ("und", "gen")),
        PruneHeadsConfig(component="both", budget="global"),
    ]
    prune(dense, tmp_path / "called", modes)
    assert snapshot(out) == snapshot(tmp_path / "called")


def test_the_command_ranks_at_random_from_a_seed(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*HALF, "--criterion", "random"]
    assert run("prune", dense, tmp_path / "a", *options, "--seed", 3) == 0
    prune(dense, tmp_path / "b", PruneWidthConfig(), seed=3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert run("prune", dense, tmp_path / "c", *options, "--json") == 0
    assert '"random, seed 0"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--component", "gen,gen"], "--component: must be different ones of und, gen"),
        (["--component", "gen"], "--keep-ratio must be given with --axis width"),
        (["--component", "gen", "--axis", "height"], "--axis: must be different ones of depth"),
        (["--component", "gen", "--keep-ratio", "0"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--keep-ratio", "nan"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--axis", "depth"], "--skip-layers must be given with --axis"),
        ([*HALF, "--skip-layers", "1"], "--skip-layers must be given with an --axis that it"),
        ([*HALF, "--seed", "1"], "--seed must be given with --criterion random"),
        ([*HALF, "--scores", "x", "--criterion", "random"], "not allowed with argument"),
    ],
)
def test_wrong_usage_of_the_command(
    options: list[str], message: str, dense: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run("prune", dense, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
