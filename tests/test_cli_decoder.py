# SPDX-License-Identifier: Apache-2.0
"""decoder: from a directory of a transformers model to the tables of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest

from sparse_unified.cli import main
from sparse_unified.mini.model import TOKENIZER


def test_a_text_encoder_is_swept(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    """The text encoder of Qwen-Image is a Qwen2.5-VL, with its tokenizer in another folder."""
    models.qwen().save_pretrained(tmp_path / "encoder")
    (tmp_path / "texts.txt").write_text("a red square left of a cross\ntwo blue crosses\n")
    arguments = [
        *("decoder", str(tmp_path / "encoder"), "--tokenizer", str(TOKENIZER)),
        *("--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out")),
        *("--axis", "depth,width,heads", "--ratios", ".5", "--repeats", "1", "--quiet"),
    ]
    assert main([*arguments, "--json"]) == 0
    task = json.loads(capsys.readouterr().out)["tasks"]["text"]
    assert task["dense"]["hidden_distance"] == 0
    assert [row["axis"] for row in task["points"]] == ["depth", "width", "heads"]
    for row in task["points"]:
        assert row["metrics"]["hidden_distance"] > 0
        assert row["after"]["flops"] < row["before"]["flops"]
    assert (tmp_path / "out" / "plots" / "sensitivity-text.png").exists()
    # A model of another make comes from a function.
    (tmp_path / "mine.py").write_text(
        "def load(path):\n"
        "    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration as Model\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(TOKENIZER)!r})\n"
        "    return Model.from_pretrained(path), tokenizer\n"
    )
    loaded = [*arguments, "--out", str(tmp_path / "again"), "--no-plots", "--json"]
    loaded += ["--loader", f"{tmp_path}/mine.py:load"]
    assert main(loaded) == 0
    again = json.loads(capsys.readouterr().out)["tasks"]["text"]
    assert [row["metrics"] for row in again["points"]] == [r["metrics"] for r in task["points"]]
    assert main(["decoder", str(tmp_path), *arguments[2:]]) == 1
    assert "must be a model of transformers" in capsys.readouterr().err


def test_a_mixture_that_a_function_loads_is_swept_along_every_axis(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    """The language model of Ming-Omni: routed and shared experts, heads in one projection."""
    (tmp_path / "texts.txt").write_text("a red square left of a cross\ntwo blue crosses\n")
    (tmp_path / "ming.py").write_text(
        "from types import SimpleNamespace\n"
        "from analysis_models import Bailing\n"
        "from transformers import AutoTokenizer\n"
        "class Ming(Bailing):\n"
        "    def forward(self, input_ids, output_hidden_states):\n"
        "        logits = super().forward(input_ids)\n"
        "        return SimpleNamespace(logits=logits, hidden_states=(logits,))\n"
        "def load(path):\n"
        f"    return Ming(), AutoTokenizer.from_pretrained({str(TOKENIZER)!r})\n"
    )
    arguments = [
        *("decoder", "Ming", "--loader", f"{tmp_path}/ming.py:load", "--no-plots", "--json"),
        *("--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out")),
        *("--axis", "depth,width,heads", "--criterion", "wanda", "--ratios", ".5"),
    ]
    assert main([*arguments, "--repeats", "1", "--quiet"]) == 0
    points = json.loads(capsys.readouterr().out)["tasks"]["text"]["points"]
    assert [row["axis"] for row in points] == ["depth", "width", "heads"]
    for row in points:
        assert row["metrics"]["hidden_distance"] > 0
        assert row["after"]["parameters"] < row["before"]["parameters"]
