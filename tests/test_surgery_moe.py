# SPDX-License-Identifier: Apache-2.0
"""Sparse FFNs go into a live model, from its own weights or from a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_cases import GOLDEN, relative_error
from refusals import refused
from safetensors.torch import load_file
from surgery_models import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Bare,
    Layer,
    Model,
    TensorMLP,
    TupleMLP,
    assert_same,
    ffn,
    foreign_model,
    snapshot,
    tokens,
)
from torch import Tensor, nn

from sparse_unified import MoEConfig, apply_moe_, count_parameters, load_moe_, restore_
from sparse_unified.bagel import Bagel, SamplingConfig
from sparse_unified.bagel.sampler import build_guidance, sample_latents
from sparse_unified.checkpoint import Checkpoint, convert
from sparse_unified.experts import ExpertLayout, snake_partition
from sparse_unified.experts.keep import magnitude_scores
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.testing import Case, build_model, read_case

FFNS = {"gen": "mlp_moe_gen", "und": "mlp"}
GATE = "language_model.model.layers.1.mlp_moe_gen"
HALF = MoEConfig(num_experts=4, top_k=2)


# From the weights of the model


@pytest.mark.parametrize(
    ("mlp", "component", "shared", "partition"),
    [
        (TensorMLP, "gen", 0, "snake"),
        (TensorMLP, "und", 2, "random"),
        (TupleMLP, "gen", 2, "coactivation"),
        (TupleMLP, "und", 0, "snake"),
    ],
)
def test_all_experts_with_zero_router_equal_dense(
    mlp: type[TensorMLP], component: str, shared: int, partition: str
) -> None:
    model = Model(mlp)
    dense = model(tokens(5), tokens(7))
    counts: Any = {"num_experts": 4, "top_k": 4, "num_shared_experts": shared}
    config = MoEConfig(**counts, component=component, layers="all", partition=partition)
    inputs = {layer: torch.randn(40, HIDDEN) for layer in range(LAYERS)}
    apply_moe_(model, config, inputs=inputs if partition == "coactivation" else None)
    for sparse, expected in zip(model(tokens(5), tokens(7)), dense, strict=True):
        torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-6)
    for i in range(LAYERS):
        block = ffn(model, i, component)
        assert type(block) is SparseMoE
        assert (block.gate_img is not None) == (component == "und")
        out = block(tokens())
        assert isinstance(out, tuple) == (mlp is TupleMLP)


@pytest.mark.parametrize("form", ["magnitude", "tensor", "dict", "numpy"])
def test_weights_are_permuted_bit_for_bit_by_score(form: str) -> None:
    model = Model()
    weights = [getattr(ffn(model, 2), n).weight for n in ("gate_proj", "up_proj", "down_proj")]
    given = torch.rand(LAYERS, WIDTH)
    given[0] = float("nan")  # of a layer that stays dense
    scores: Any = {
        "magnitude": None,
        "tensor": given,
        "dict": {1: given[1], 2: given[2]},
        "numpy": given.double().numpy(),
    }[form]
    ranking = magnitude_scores(*weights) if scores is None else given[2]
    order = snake_partition(ranking, ExpertLayout(intermediate_size=WIDTH, num_experts=4))
    apply_moe_(model, HALF, scores)
    block = ffn(model, 2)
    assert torch.equal(block.gate_proj, weights[0][order])
    assert torch.equal(block.up_proj, weights[1][order])
    assert torch.equal(block.down_proj, weights[2][:, order])
    assert not block.gate.weight.any()
    assert not block.gate_shared.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_mode_and_requires_grad_are_kept(dtype: torch.dtype) -> None:
    model = Model(TupleMLP).to(dtype)
    dense = ffn(model, 1).eval()
    dense.up_proj.requires_grad_(False)
    ffn(model, 2).requires_grad_(False)
    apply_moe_(model, HALF)
    block = ffn(model, 1)
    assert {p.dtype for p in block.parameters()} == {dtype}
    assert not block.training
    assert not block.gate.training
    assert ffn(model, 2).training
    assert {name for name, p in block.named_parameters() if not p.requires_grad} == {"up_proj"}
    trained = {n for n, p in ffn(model, 2).named_parameters() if p.requires_grad}
    assert trained == {"gate.weight", "gate_shared.weight"}  # routers start to learn
    assert dense.act_cnt == 0  # the run that shows what it returns leaves no trace


def test_meta_weights_are_swapped_when_scores_are_given() -> None:
    with torch.device("meta"):
        model = Model(TupleMLP)
    report = apply_moe_(model, HALF, torch.rand(LAYERS, WIDTH))
    assert ffn(model, 1).gate_proj.is_meta
    assert ffn(model, 1).return_router_logits
    assert ffn(model, 1).active_backend in report.parts[0].after


class Wrapper(nn.Module):
    """Shows the attributes of the layer inside it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.wrapped = layer

    def __getattr__(self, name: str) -> Any:
        return self._modules[name] if name == "wrapped" else getattr(self.wrapped, name)


@pytest.mark.parametrize(
    ("lead", "path"),
    [
        # no module, but holds one, as pipelines do
        (lambda m: SimpleNamespace(model=m), "model.language_model.model.layers"),
        (lambda m: m.language_model, "model.layers"),
        (lambda m: m.language_model.model, "layers"),
        (lambda m: SimpleNamespace(layers=list(m.layers)), "layers"),
        (lambda m: Bare(layers=nn.ModuleList(map(Wrapper, m.layers))), "layers"),
        (
            lambda m: SimpleNamespace(transformer=Bare(blocks=m.layers), vae=nn.Linear(2, 2)),
            "transformer.blocks",
        ),
    ],
)
def test_layers_are_found_from_every_object_that_leads_to_them(lead: Any, path: str) -> None:
    model = Model()
    host = lead(model)
    report = apply_moe_(host, HALF)
    assert [entry.path for entry in report.parts] == [f"{path}.{i}.mlp_moe_gen" for i in (1, 2)]
    is_sparse = [isinstance(ffn(model, i), SparseMoE) for i in range(LAYERS)]
    assert is_sparse == [False, True, True, False]
    assert len(restore_(host).parts) == 2
    assert not any(isinstance(ffn(model, i), SparseMoE) for i in range(LAYERS))


def test_report_says_what_changed() -> None:
    model = Model()
    report = apply_moe_(model, MoEConfig(num_experts=4, top_k=2, num_shared_experts=2))
    entry = report.parts[0]
    assert [e.layer for e in report.parts] == [1, 2]
    assert entry.path == GATE
    assert entry.before == "24 neurons"
    assert entry.after == "2 of 4 experts of 4 neurons and 8 shared, cpu"
    assert entry.counts_before.parameters == 3 * HIDDEN * WIDTH
    assert entry.counts_after.parameters == sum(p.numel() for p in ffn(model, 1).parameters())
    used = entry.counts_after.parameters - 2 * 3 * HIDDEN * 4  # idle experts cost no arithmetic
    assert entry.counts_after.flops_per_token == 2 * used
    assert count_parameters(model) == report.after
    read = json.loads(report.to_json())
    assert (read["action"], read["parts"][1]["layer"]) == ("apply_moe_", 2)
    assert str(report).startswith("apply_moe_: 2 parts changed (gen ffn 1-2)")
    back = restore_(model)
    assert (back.parts[0].before, back.parts[0].after) == (entry.after, entry.before)
    assert (back.before, back.after) == (report.after, report.before)


# From a checkpoint


@pytest.fixture(scope="module")
def sparse_dir(golden: Any) -> Path:
    """Layer 1 of 3 has 4 experts, 2 of them active."""
    return golden("t2i_moe")


def official_model(mlp: type[TensorMLP] = TensorMLP, layers: int = 3) -> Model:
    """The official structure at the sizes of the golden model."""
    return foreign_model(mlp, 32, 96, layers=layers)


def dense_bagel(case: Case) -> Bagel:
    """Our model with the weights of a sparse case, and noise in a dense FFN for the sparse one."""
    fields = {name: value for name, value in case.fields.items() if name != "moe"}
    tensors = {k: t for k, t in case.tensors.items() if "layers.1.mlp_moe_gen." not in k}
    for name, shape in (("gate_proj", (96, 32)), ("up_proj", (96, 32)), ("down_proj", (32, 96))):
        tensors[f"model.{GATE}.{name}.weight"] = torch.randn(shape) / 6
    return build_model(Case(name=case.name, fields=fields, tensors=tensors))


def latent(model: Bagel, case: Case) -> Tensor:
    fields = case.fields
    names = [name for name in SamplingConfig.__slots__ if name in fields]
    config = SamplingConfig(**{name: fields[name] for name in names})
    guidance = build_guidance(model, fields["prompt_ids"])
    return sample_latents(model, guidance, [case.tensors["init_noise"]], [(4, 4)], config)[0]


def test_golden_sparse_weights_in_our_dense_model_give_the_golden_image(sparse_dir: Path) -> None:
    case = read_case(GOLDEN / "t2i_moe")
    model = dense_bagel(case)
    dense, before = latent(model, case), snapshot(model)
    report = load_moe_(model, sparse_dir)
    assert [(e.layer, e.component) for e in report.parts] == [(1, "gen")]
    assert relative_error(latent(model, case), case.tensors["latent.0"]) < 1e-5
    assert model.state_dict().keys() == case.weights.keys()
    restore_(model)
    assert_same(before, snapshot(model))
    assert torch.equal(latent(model, case), dense)


@pytest.mark.parametrize(
    ("mlp", "dtype", "given"),
    [
        (TensorMLP, torch.float32, Path),
        (TupleMLP, torch.bfloat16, str),
        (TupleMLP, torch.float32, Checkpoint),
    ],
)
def test_official_models_hold_what_the_file_says(
    mlp: type[TensorMLP], dtype: torch.dtype, given: Any, sparse_dir: Path
) -> None:
    model = official_model(mlp).to(dtype)
    model.layers[1].mlp_moe_gen.eval()
    model.layers[1].mlp_moe_gen.down_proj.requires_grad_(False)
    load_moe_(model, given(sparse_dir))
    recorded = {
        key.removeprefix(f"{GATE}."): tensor.to(dtype)
        for key, tensor in load_file(sparse_dir / "ema.safetensors").items()
        if key.startswith(GATE)
    }
    block = model.layers[1].mlp_moe_gen
    state = block.state_dict()
    assert state.keys() == recorded.keys()
    assert all(torch.equal(state[key], recorded[key]) for key in recorded)
    assert (block.num_experts, block.top_k, block.training) == (4, 2, False)
    assert [n for n, p in block.named_parameters() if not p.requires_grad] == ["down_proj"]
    assert block.return_router_logits == (mlp is TupleMLP)


@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_loading_a_conversion_equals_applying_it(
    golden: Any, tmp_path: Path, num_shared_experts: int
) -> None:
    source = golden("t2i_dense")
    scores = torch.rand(3, 96)
    counts: Any = {"num_experts": 4, "top_k": 2, "num_shared_experts": num_shared_experts}
    case = read_case(GOLDEN / "t2i_dense")
    applied, loaded = build_model(case), build_model(case)
    for component in FFNS:
        out = tmp_path / component
        convert(source, out, **counts, component=component, layers="1-2", scores=scores)
        apply_moe_(applied, MoEConfig(**counts, component=component, layers="1-2"), scores)
        source = out
    report = load_moe_(loaded, source)
    found = sorted((entry.component, entry.layer) for entry in report.parts)
    assert found == [("gen", 1), ("gen", 2), ("und", 1), ("und", 2)]
    mine, theirs = applied.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    restore_(loaded)
    assert all(isinstance(layer.mlp, SwiGLU) for layer in loaded.language_model.model.layers)


# What is refused when loading


def refuse(model: Any, source: Any, match: str, error: type = ValueError) -> None:
    before = snapshot(model)
    refused(match, load_moe_, model, source, error=error)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda m: m.layers.append(Layer(TensorMLP)),
            "model must have 3 layers as .*, got 4 under",
        ),
        (
            lambda m: setattr(m.layers[1], "mlp_moe_gen", TensorMLP(32, 48)),
            r"layer 1 .*must be those .* \[I, D\] = \[96, 32\] in the file, \[48, 32\] in",
        ),
        (lambda m: apply_moe_(m, HALF), "load_moe_: layer 1 .*FFN must be dense, .* a SparseMoE"),
        (lambda m: m.layers[1].mlp_moe_gen.to("meta"), "layer 1 .*weights must be in memory, got"),
    ],
)
def test_models_that_do_not_fit_the_file_are_refused(
    change: Any, match: str, sparse_dir: Path
) -> None:
    model = official_model()
    change(model)
    refuse(model, sparse_dir, match)


def test_what_is_no_sparse_checkpoint_is_refused(golden: Any) -> None:
    refuse(official_model(), golden("t2i_dense"), "checkpoint must be sparse, got a dense one")


def test_a_file_cut_short_while_it_is_read_leaves_the_model_alone(
    sparse_dir: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(sparse_dir, tmp_path / "cut")
    checkpoint = Checkpoint(source)
    with (source / "ema.safetensors").open("r+b") as stream:
        stream.truncate(min(spec.start for spec in checkpoint.specs.values()) + 100)
    refuse(official_model(), checkpoint, "file must not change while it is read", RuntimeError)
