# SPDX-License-Identifier: Apache-2.0
"""Pictures show the numbers of the sweep, and can be read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_unified.analysis import plots
from sparse_unified.analysis.sweep import SweepResult

COST = {"parameters": 10, "weight_bytes": 40, "flops": 20, "peak_bytes": 50}
COST |= {"seconds": 0.1, "seconds_range": (0.1, 0.1)}
RATIOS = (0.75, 0.5, 0.25)


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with pytest.importorskip("matplotlib").rc_context(plots.STYLE):
        yield


def task(components: tuple[str, ...] = ("und", "gen")) -> dict[str, Any]:
    return {
        "better": {"loss": "lower", "score": "higher"},
        "dense": {"loss": 1.0, "score": 1.0},
        "cost": COST,
        "idle": [],
        "similarity": [
            {
                **{"component": component, "layer": i, "tokens": 1},
                **{"block": 0.9 - i / 10, "attention": 0.8, "ffn": 0.7},
            }
            for component in components
            for i in range(4)
        ],
        "activation": [],
        "points": [
            {
                **{"component": component, "axis": axis, "keep_ratio": ratio, "change": ""},
                **{"metrics": {"loss": 2 - ratio, "score": ratio}, "before": COST, "after": COST},
            }
            for component in components
            for axis in ("depth", "width")
            for ratio in RATIOS
        ],
    }


def activation_map(component: str, num_ranges: int) -> dict[str, Any]:
    return {
        "component": component,
        "layers": [0, 1, 2, 3],
        "ranges": [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(num_ranges)],
        "firing": (torch.rand(4, num_ranges) / 2).tolist(),
        "overlap": torch.rand(4).tolist(),
        "steps": torch.rand(4).tolist() if num_ranges > 1 else [None] * 4,
        "chance": 0.15,
        "never_by_time": torch.rand(4, num_ranges).tolist(),
        "always_by_time": torch.rand(4, num_ranges).tolist(),
        "never_at_any_time": (torch.rand(4) / 2).tolist(),
        "always_at_all_times": (torch.rand(4) / 2).tolist(),
    }


def test_every_picture_is_written_and_not_empty(tmp_path: Path) -> None:
    maps = [activation_map("und", 1), activation_map("gen", 10)]
    result = SweepResult(run={}, tasks={"generation": task() | {"activation": maps}})
    written = plots.write_plots(result, tmp_path / "plots")
    kinds = ("similarity", "sensitivity", "activation", "overlap", "never-always")
    assert [path.name for path in written] == [f"{kind}-generation.png" for kind in kinds]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 5


def lines(panel: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in panel.get_lines()
    }


def test_curves_are_the_points_and_end_at_the_dense_model() -> None:
    figure = plots.sensitivity("generation", task())
    panels = np.array(figure.axes).reshape(2, 2)
    assert [panel.get_title(loc="left") for panel in panels[0]] == ["depth", "width"]
    assert panels[0][0].get_ylabel() == "loss\n(lower is better)"
    assert panels[1][0].get_ylabel() == "score\n(higher is better)"
    for row, values in zip(panels, ((1.75, 1.5, 1.25, 1.0), (0.25, 0.5, 0.75, 1.0)), strict=True):
        for panel in row:
            for component in ("und", "gen"):
                ratios = (0.25, 0.5, 0.75, 1.0)
                assert lines(panel)[component] == list(zip(ratios, values, strict=True))
            assert {y for _, y in lines(panel)["dense"]} == {1.0}
        assert row[0].get_ylim() == row[1].get_ylim()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib must be installed .*\[plot\]"):
        plots.write_plots(SweepResult(run={}, tasks={}), tmp_path)


def test_overlap_says_where_there_is_nothing_to_compare() -> None:
    figure = plots.overlap("generation", [activation_map("und", 1), activation_map("gen", 3)])
    samples, steps = figure.axes
    assert set(lines(samples)) == {"und", "gen", "chance"}
    assert set(lines(steps)) == {"gen", "chance"}
    _, steps = plots.overlap("generation", [activation_map("und", 1)]).axes
    assert "nothing to compare" in steps.texts[0].get_text()


def test_never_and_always_active_neurons_of_each_layer_stand_beside_their_times() -> None:
    maps = [activation_map("und", 1), activation_map("gen", 10)]
    figure = plots.never_always("generation", maps)
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
    for name in ("never_at_any_time", "always_at_all_times"):
        panel = panels[name.replace("_", " ")]
        drawn = {own["component"]: list(zip(own[name], range(4), strict=True)) for own in maps}
        assert lines(panel) == drawn
        assert panel.get_ylim() == (-0.5, 3.5)  # layer beside layer of the heat maps
