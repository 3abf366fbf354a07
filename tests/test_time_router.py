# SPDX-License-Identifier: Apache-2.0
"""Experts that are chosen by the time of denoising too: formula, model, training, file and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapt_models import CONFIG, Mixed
from bagel_models import EXPERTS, SPECIAL, draw
from checkpoint_files import edit_weights, snapshot
from moe_cases import GOLDEN, random_block
from refusals import refused
from surgery_models import TensorMLP, foreign_model
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_, load_moe_
from sparse_unified.adapt import Trainer, TrainingConfig, freeze
from sparse_unified.bagel import Bagel, Segment, pack_training
from sparse_unified.bagel.loading import load_bagel
from sparse_unified.bagel.packing import LatentSegment
from sparse_unified.cli import main
from sparse_unified.nn import SparseMoE
from sparse_unified.testing import build_model, read_case

KEY = "language_model.model.layers.1.mlp_moe_gen.gate_time.weight"


def sparse_model(**options: Any) -> Bagel:
    """A model with layer 1 of 3 sparse and a router there that decides, but not by time."""
    model = build_model(read_case(GOLDEN / "t2i_dense"))
    apply_moe_(model, MoEConfig(**EXPERTS, **options))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(block_of(model).gate.weight, 0, 0.2, generator=generator)
    return model


def block_of(model: Any) -> Any:
    return model.language_model.model.layers[1].mlp_moe_gen


def velocity(model: Bagel, time: float) -> Tensor:
    context = model.new_contexts(1)
    model.prefill_text(context, [[21, 30]])
    noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    return model.velocity([noise], [(2, 3)], torch.tensor([time]), [context])[0]


def test_logits_get_a_bias_that_is_interpolated_between_eight_times() -> None:
    block = random_block(gate_time=True)
    x, times = torch.randn(7, 24), torch.tensor([0, 0.1, 1 / 7, 0.5, 0.77, 6 / 7, 1])
    points = np.linspace(0, 1, 8)
    bias = [np.interp(times, points, own) for own in block.gate_time.weight.detach()]
    y, logits = block(x, times=times)
    torch.testing.assert_close(logits, x @ block.gate.weight.T + Tensor(np.array(bias)).T)
    assert torch.equal(block.route(x, times=times)[2].long(), logits.topk(2).indices)
    for i in range(len(x)):  # one time of all tokens
        one = block(x[i].expand(2, 3, -1), times=times[i : i + 1])[0]
        torch.testing.assert_close(one, y[i].expand(2, 3, -1))


@torch.no_grad()
def test_a_new_model_is_that_without_and_a_bias_counts_at_its_time_alone() -> None:
    plain, timed = sparse_model(), sparse_model(time_router=True)
    assert timed.state_dict().keys() - plain.state_dict().keys() == {KEY}
    for own, other in zip(draw(timed, [[21], [30]]), draw(plain, [[21], [30]]), strict=True):
        assert torch.equal(own, other)
    block_of(timed).gate_time.weight[3, 5] = 9.0  # expert 3, time 5 / 7
    for time in (0.0, 4 / 7, 6 / 7, 1.0):
        assert torch.equal(velocity(timed, time), velocity(plain, time))
    assert not torch.allclose(velocity(timed, 0.7), velocity(plain, 0.7))


def test_training_reaches_the_bias_of_the_times_it_sees() -> None:
    model = sparse_model(time_router=True)
    assert KEY in freeze(model, "router")
    weight, side = block_of(model).gate_time.weight, 2 * model.config.latent_patch_size
    latent = torch.randn(model.config.latent_channels, side, side)
    noised = [
        LatentSegment(latent=latent, time=time, noise=torch.randn(latent.shape))
        for time in (2 / 7, 0.95)  # between 6 / 7 and 1
    ]
    apart: list[list[Segment]] = [[own] for own in noised]
    together: list[list[Segment]] = [[LatentSegment(latent=latent), *noised]]
    for batch, columns in ((apart, [2, 6, 7]), (together, [0, 2, 6, 7])):
        weight.grad = None
        model(pack_training(model.config, batch)).image_loss_sum.backward()
        assert weight.grad.abs().sum(0).nonzero()[:, 0].tolist() == columns

    trainer = Trainer(model, Mixed(model), TrainingConfig(**CONFIG | {"balance_weight": 0.1}))
    losses = trainer.run()
    assert np.isfinite(losses).all()
    assert bool(weight.any(1).all())


# Files


@pytest.fixture(scope="module")
def pair(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense directory, and a sparse one that is routed by time."""
    dense, sparse = golden("t2i_dense"), tmp_path_factory.mktemp("time") / "sparse"
    counts = ["--num-experts", "4", "--top-k", "2"]
    assert main(["convert", str(dense), str(sparse), *counts, "--time-router", "--quiet"]) == 0
    edit_weights(sparse, lambda own: own[KEY].normal_())
    return dense, sparse


def told(capsys: pytest.CaptureFixture[str], *line: object, status: int = 0) -> Any:
    assert main([*map(str, line), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_commands_know_the_bias_and_invert_drops_it(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = pair
    about = told(capsys, "info", sparse)
    assert about["problems"] == []
    assert about["recipe"][0]["config"]["time_router"] is True
    assert about["sidecar"]["arguments"]["time_router"] is True
    (gen,) = [own for own in about["components"] if own["name"] == "gen"]
    assert gen["experts"] == ["4 x 24 by time"]
    (layer,) = told(capsys, "verify", sparse, "--against", dense)["layers"]
    assert (layer["ok"], layer["routers"]) == (True, "set")  # by gate_time alone
    told(capsys, "prune", sparse, tmp_path / "narrow", "--component", "gen", "--keep-ratio", "0.5")
    assert told(capsys, "verify", tmp_path / "narrow", "--against", sparse)["ok"]
    edit_weights(tmp_path / "narrow", lambda own: own[KEY].zero_())
    assert not told(capsys, "verify", tmp_path / "narrow", "--against", sparse, status=1)["ok"]
    edit_weights(tmp_path / "narrow", lambda own: own.pop(KEY))
    rule = (
        "keys: gate_time.weight of gen layer 1 must be there as sparse_unified.json says, got none"
    )
    assert rule in told(capsys, "info", tmp_path / "narrow", status=1)["problems"]
    told(capsys, "invert", sparse, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(dense)


def test_a_file_gives_its_bias_to_models_that_give_times_and_to_no_others(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, sparse = pair
    loaded = load_bagel(sparse, special_tokens=SPECIAL)[0]
    swapped = load_bagel(dense, special_tokens=SPECIAL)[0]
    load_moe_(swapped, sparse)
    weight = block_of(loaded).gate_time.weight
    assert bool(weight.any())
    assert torch.equal(weight, block_of(swapped).gate_time.weight)
    assert torch.equal(velocity(loaded, 0.3), velocity(swapped, 0.3))
    rule = "layer must give its FFN the times of tokens for time_router.* do, got a Layer"
    official = foreign_model(TensorMLP, 32, 96, layers=3)
    refused(rule, load_moe_, official, sparse)
    refused(rule, apply_moe_, official, MoEConfig(**EXPERTS, time_router=True))
    damaged = shutil.copytree(sparse, tmp_path / "damaged")
    edit_weights(damaged, lambda own: own.update({KEY: own[KEY][:, 1:].contiguous()}))
    refused(r"gate_time.weight \[4, 7\], not \[4, 8\]", load_moe_, swapped, damaged)


@pytest.mark.parametrize(
    ("times", "got"), [(None, "got None"), (torch.zeros(2), r"got shape \[2\]"), (0.5, "got 0.5")]
)
def test_a_block_without_the_times_of_its_tokens_says_who_gives_them(times: Any, got: str) -> None:
    block = random_block(gate_time=True)
    rule = r"times must be given .* layers of sparse_unified.bagel.Bagel do, \[5\] or \[1\]"
    refused(f"{rule}.*{got}", block, torch.zeros(5, 24), times=times)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MoEConfig(component="und", time_router=True), ValueError, "component must be gen"),
        (lambda: MoEConfig(time_router=1), TypeError, "time_router must be true or false, got 1"),
        (
            lambda: SparseMoE(24, 60, 5, 2, gate_img=True, gate_time=True),
            ValueError,
            "gate_time must be False with gate_img",
        ),
    ],
)
def test_tokens_without_a_time_get_no_bias(
    call: Callable[[], object], error: type, match: str
) -> None:
    refused(match, call, error=error)
