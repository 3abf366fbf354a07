# SPDX-License-Identifier: Apache-2.0
"""Verification finds every planted difference and names where it is."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import LAYER, edit_config, edit_weights, make_dense
from refusals import refused
from torch import Tensor

from sparse_unified.checkpoint import convert, info, verify

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    dense = make_dense(root / "dense")
    convert(dense, root / "sparse", num_experts=4, top_k=2, num_shared_experts=2)
    return dense, root / "sparse"


@pytest.fixture
def sparse(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "sparse"))


def flip(name: str, row: int, column: int) -> Callable[[Weights], None]:
    """Flips the lowest bit of one element."""

    def edit(weights: Weights) -> None:
        weights[LAYER + name].view(torch.int32)[row, column] ^= 1

    return edit


def swap(first: str, second: str) -> Callable[[Weights], None]:
    def edit(weights: Weights) -> None:
        a, b = weights[LAYER + first].clone(), weights[LAYER + second].clone()
        weights[LAYER + first], weights[LAYER + second] = b, a

    return edit


def repeat_neuron(weights: Weights) -> None:
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        first, second = (weights[f"{LAYER}experts.{e}.{name}.weight"] for e in (1, 2))
        second.select(dim, 3).copy_(first.select(dim, 0))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip("experts.3.gate_proj.weight", 5, 0), "got 1 others: experts.3.neuron 5"),
        (flip("experts.0.up_proj.weight", 15, 15), "got 1 others: experts.0.neuron 15"),
        (flip("experts.1.down_proj.weight", 9, 2), "got 1 others: experts.1.neuron 2"),
        (flip("shared_expert.down_proj.weight", 0, 31), "others: shared_expert.neuron 31"),
        (
            swap("experts.1.up_proj.weight", "experts.2.up_proj.weight"),
            r"experts.1.neuron 0, .* and 29 more",
        ),
        (repeat_neuron, "of its own, got 1 others: experts.2.neuron 3"),
        (lambda w: w[LAYER + "gate.weight"].fill_(torch.nan), "routers must be finite, got NaN"),
    ],
)
def test_a_damaged_expert_is_named(
    edit: Callable[[Weights], None], message: str, pair: tuple[Path, Path], sparse: Path
) -> None:
    edit_weights(sparse, edit)
    report = verify(sparse, pair[0])
    assert not report.ok
    assert [(verdict.layer, verdict.ok) for verdict in report.layers] == [(1, False), (2, True)]
    assert not report.problems
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(report.layers[0].problems))
    assert "gen layer 1, " + report.layers[0].problems[0] in report.to_text()
    json.loads(report.to_json())


def weights(edit: Callable[[Weights], object]) -> Callable[[Path], object]:
    return lambda directory: edit_weights(directory, edit)


def flip_last(name: str) -> Callable[[Path], object]:
    """Flips the lowest bit of the last byte of a file."""

    def edit(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[-1] ^= 1
        (directory / name).write_bytes(bytes(data))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            weights(lambda w: w["llm2vae.bias"].view(torch.int32).bitwise_xor_(1)),
            "llm2vae.bias: must be equal, got another value at element 0",
        ),
        (weights(lambda w: w.pop("llm2vae.bias")), r"must be torch.float32 .* got nothing"),
        (weights(lambda w: w.update({"lora": torch.ones(2)})), "got lora too"),
        (
            weights(lambda w: w.update({"llm2vae.bias": torch.ones(3)})),
            r"llm2vae.bias: must be torch.float32 \[16\], got torch.float32 \[3\]",
        ),
        (
            weights(lambda w: w.update({"llm2vae.bias": w["llm2vae.bias"].double()})),
            r"llm2vae.bias: must be torch.float32 .* got torch.float64",
        ),
        (lambda d: edit_config(d, rms_norm_eps=1e-5), "rms_norm_eps must be 1e-06, got 1e-05"),
        (lambda d: (d / "config.json").write_text("{ }"), r"config.json: must be torch.uint8 \[2"),
        (flip_last("ae.safetensors"), r"ae.safetensors: must be equal, got .* at element"),
        (flip_last("tokenizer.json"), r"tokenizer.json: must be equal, got .* at element 1"),
        (lambda d: (d / "config.json").unlink(), r"config.json: file must be there .* got nothing"),
        (lambda d: (d / "vocab.json").write_text("{}"), r"vocab.json: file must be absent .* got"),
    ],
)
def test_any_other_tensor_file_or_field_that_differs_is_named(
    edit: Callable[[Path], object],
    message: str,
    pair: tuple[Path, Path],
    sparse: Path,
    tmp_path: Path,
) -> None:
    dense = Path(shutil.copytree(pair[0], tmp_path / "dense"))
    for directory, name in itertools.product((dense, sparse), ("tokenizer.json", "config.json")):
        (directory / name).write_text("{}")
    assert verify(sparse, dense).ok
    edit(sparse)
    report = verify(sparse, dense)
    assert not report.ok
    assert all(verdict.ok for verdict in report.layers)
    (problem,) = report.problems
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problem)


def test_the_sidecar_is_not_consulted(pair: tuple[Path, Path], sparse: Path) -> None:
    (sparse / "partition.safetensors").write_bytes(b"anything")
    assert verify(sparse, pair[0]).ok


def test_trained_routers_are_reported_and_do_not_count(
    pair: tuple[Path, Path], sparse: Path
) -> None:
    edit_weights(sparse, lambda weights: weights[LAYER + "gate.weight"].fill_(1))
    report = verify(sparse, pair[0])
    assert report.ok
    assert [verdict.routers for verdict in report.layers] == ["set", "zero"]


def test_there_must_be_something_to_compare(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    refused(r"must have sparse layers .* got a dense checkpoint", verify, dense, dense)
    refused(r"must have sparse layers .* got none that are dense", verify, sparse, sparse)


def test_a_wrong_computation_is_seen(pair: tuple[Path, Path], monkeypatch: Any) -> None:
    from sparse_unified.nn import SparseMoE

    right = SparseMoE.forward
    monkeypatch.setattr(SparseMoE, "forward", lambda self, x: right(self, x) * 1.001)
    report = verify(pair[1], pair[0])
    assert not report.ok
    assert all(
        "output with all experts active must be within" in v.problems[0] for v in report.layers
    )
    assert all(verdict.bijection for verdict in report.layers)


def test_info_never_raises_on_a_disagreement(sparse: Path) -> None:
    edit_config(sparse, top_k=3, transformed_gen=[1])
    edit_weights(sparse, lambda weights: weights.pop(LAYER + "experts.1.up_proj.weight"))
    (sparse / "ae.safetensors").write_bytes(b"cut")
    (sparse / "partition.safetensors").write_bytes(b"cut")
    text = info(sparse).to_text()
    for name in ("top_k", "transformed_gen", "experts.1.up_proj", "ae.saf", "partition"):
        assert re.search(f"disagrees: .*{name}", text), name
    (sparse / "llm_config.json").unlink()
    assert any("llm_config.json" in problem for problem in info(sparse).problems)
