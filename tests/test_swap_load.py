# SPDX-License-Identifier: Apache-2.0
"""Sparse checkpoints go into dense live models: ours, and ones with the official structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from swap_models import Bare, Model, TensorMLP, TupleMLP, assert_same, snapshot, tokens
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_, load_moe_, restore_
from sparse_unified.bagel import (
    Bagel,
    BagelPipeline,
    SamplingConfig,
    build_guidance,
    sample_latents,
)
from sparse_unified.checkpoint import Checkpoint, convert
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.testing import Case, build_model, read_case

GOLDEN = Path(__file__).parent / "golden"
FFNS = {"gen": "mlp_moe_gen", "und": "mlp"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def sparse_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden sparse model (layer 1 of 3: 4 experts, 2 active) as a model directory."""
    return write_checkpoint(GOLDEN / "t2i_moe", tmp_path_factory.mktemp("sparse"))


def official_model(mlp: type[TensorMLP] = TensorMLP, layers: int = 3) -> Model:
    """The official structure at the sizes of the golden model."""
    model = Model(mlp, layers)
    for layer in model.layers:
        layer.mlp, layer.mlp_moe_gen = mlp(32, 96), mlp(32, 96)
    return model


def dense_bagel(case: Case) -> Bagel:
    """Our model with the weights of a sparse case, and noise in a dense FFN for the sparse one."""
    fields = {name: value for name, value in case.fields.items() if name != "moe"}
    tensors = {k: t for k, t in case.tensors.items() if "layers.1.mlp_moe_gen." not in k}
    for name, shape in (("gate_proj", (96, 32)), ("up_proj", (96, 32)), ("down_proj", (32, 96))):
        key = f"model.language_model.model.layers.1.mlp_moe_gen.{name}.weight"
        tensors[key] = torch.randn(shape) / 6
    return build_model(Case(name=case.name, fields=fields, tensors=tensors))


def latent(model: Bagel, case: Case) -> Tensor:
    fields = case.fields
    names = [name for name in SamplingConfig.__slots__ if name in fields]
    config = SamplingConfig(**{name: fields[name] for name in names})
    guidance = build_guidance(model, fields["prompt_ids"])
    return sample_latents(model, guidance, [case.tensor("init_noise")], [(4, 4)], config)[0]


def relative_error(out: Tensor, gold: Tensor) -> float:
    return float((out - gold).norm() / gold.norm())


def test_golden_sparse_weights_in_our_dense_model_give_the_golden_image(sparse_dir: Path) -> None:
    case = read_case(GOLDEN / "t2i_moe")
    model = dense_bagel(case)
    dense = latent(model, case)
    before = snapshot(model)
    report = load_moe_(model, sparse_dir)
    assert [(e.layer, e.component, e.before) for e in report.layers] == [(1, "gen", "SwiGLU")]
    assert relative_error(latent(model, case), case.tensor("latent.0")) < 1e-5
    assert model.state_dict().keys() == case.weights.keys()
    restore_(model)
    assert_same(before, snapshot(model))
    assert torch.equal(latent(model, case), dense)


def test_our_dense_model_with_all_experts_active_draws_the_dense_image() -> None:
    case = read_case(GOLDEN / "t2i_dense")
    model = build_model(case)
    for component in FFNS:
        config = MoEConfig(num_experts=4, top_k=4, component=component, layers="all")
        apply_moe_(model, config)
    assert sum(isinstance(m, SparseMoE) for m in model.modules()) == 6
    assert relative_error(latent(model, case), case.tensor("latent.0")) < 1e-5
    restore_(model)
    assert relative_error(latent(model, case), case.tensor("latent.0")) < 1e-5


def test_a_pipeline_is_taken_as_it_is(tmp_path: Path) -> None:
    pipeline = BagelPipeline.from_pretrained(
        write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "dense")
    )
    options: Any = {"seed": 1, "num_timesteps": 3, "size": (32, 32), "progress": False}
    dense = pipeline.generate("a", **options).latents[0]
    report = apply_moe_(pipeline, MoEConfig(num_experts=4, top_k=2))
    assert report.layers[0].path == "model.language_model.model.layers.1.mlp_moe_gen"
    result = pipeline.generate("a", **options)
    assert result.report.backend == "cpu"
    assert not torch.equal(result.latents[0], dense)
    restore_(pipeline)
    assert torch.equal(pipeline.generate("a", **options).latents[0], dense)


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
@pytest.mark.parametrize("given", ["path", "text", "checkpoint"])
def test_official_models_compute_what_the_file_says(
    mlp: type[TensorMLP], given: str, sparse_dir: Path
) -> None:
    model = official_model(mlp)
    model.layers[1].mlp_moe_gen.eval()
    model.layers[1].mlp_moe_gen.down_proj.requires_grad_(False)
    source: Any = {"path": sparse_dir, "text": str(sparse_dir), "checkpoint": None}[given]
    load_moe_(model, source or Checkpoint(sparse_dir))

    prefix = "language_model.model.layers.1.mlp_moe_gen."
    recorded = {
        key.removeprefix(prefix): tensor
        for key, tensor in load_file(sparse_dir / "ema.safetensors").items()
        if key.startswith(prefix)
    }
    block = model.layers[1].mlp_moe_gen
    state = block.state_dict()
    assert state.keys() == recorded.keys()
    assert all(torch.equal(state[key], recorded[key]) for key in recorded)
    assert (block.num_experts, block.top_k, block.training) == (4, 2, False)
    assert [n for n, p in block.named_parameters() if not p.requires_grad] == ["down_proj"]

    reference = SparseMoE(32, 96, 4, 2)
    reference.load_state_dict(recorded)
    x = tokens(6, 32)
    out = block(x)
    assert isinstance(out, tuple) == (mlp is TupleMLP)
    assert torch.equal(out[0] if isinstance(out, tuple) else out, reference(x)[0])
    model(x, x)


def test_weights_become_the_dtype_of_the_model(sparse_dir: Path) -> None:
    model = official_model().bfloat16()
    load_moe_(model, sparse_dir)
    block = model.layers[1].mlp_moe_gen
    key = "experts.2.down_proj.weight"
    stored = Checkpoint(sparse_dir).read(f"language_model.model.layers.1.mlp_moe_gen.{key}")
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert torch.equal(block.state_dict()[key], stored.bfloat16())


@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_loading_a_conversion_equals_applying_it(tmp_path: Path, num_shared_experts: int) -> None:
    source = write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "dense")
    scores = torch.rand(3, 96)
    counts: Any = {"num_experts": 4, "top_k": 2, "num_shared_experts": num_shared_experts}
    out: Path = source
    for component in FFNS:
        previous, out = out, tmp_path / component
        convert(previous, out, **counts, component=component, layers="1-2", scores=scores)

    case = read_case(GOLDEN / "t2i_dense")
    applied, loaded = build_model(case), build_model(case)
    for component in FFNS:
        apply_moe_(applied, MoEConfig(**counts, component=component, layers="1-2"), scores)
    report = load_moe_(loaded, out)
    assert sorted((e.component, e.layer) for e in report.layers) == [
        ("gen", 1), ("gen", 2), ("und", 1), ("und", 2)
    ]  # fmt: skip
    mine, theirs = applied.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    restore_(loaded)
    assert all(isinstance(layer.mlp, SwiGLU) for layer in loaded.language_model.model.layers)


def refuse(model: Any, source: Any, match: str, error: type = ValueError) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load_moe_(model, source)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "dense")
    refuse(official_model(), source, "checkpoint must be sparse, got a dense one")


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    refuse(official_model(), tmp_path / "no", "checkpoint must be a directory, got nothing there")


def test_another_number_of_layers_is_refused(sparse_dir: Path) -> None:
    refuse(official_model(layers=4), sparse_dir, "model must have 3 layers as .*, got 4 under")


def test_other_sizes_are_refused_by_layer(sparse_dir: Path) -> None:
    model = official_model()
    model.layers[1].mlp_moe_gen = TensorMLP(32, 48)
    refuse(
        model,
        sparse_dir,
        r"sparse FFNs must be those of the model, got layer 1 \(language_model\.model\.layers\.1"
        r"\.mlp_moe_gen\) \[I, D\] = \[96, 32\] in the file, \[48, 32\] in the model",
    )


def test_a_model_without_matching_layers_is_refused(sparse_dir: Path) -> None:
    refuse(Bare(), sparse_dir, "load_moe_: model must have decoder layers with mlp_moe_gen")


def test_sparse_and_meta_layers_are_refused(sparse_dir: Path) -> None:
    model = official_model()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2))
    refuse(model, sparse_dir, "load_moe_: layer 1 .*FFN must be dense, got a SparseMoE")
    restore_(model)
    model.layers[1].mlp_moe_gen.to("meta")
    refuse(model, sparse_dir, "load_moe_: layer 1 .*weights must be in memory, got meta")


def rewrite(source: Path, out: Path, change: Any) -> Path:
    """Copies a model directory with other tensors or another config."""
    out.mkdir()
    config = json.loads((source / "llm_config.json").read_text())
    tensors = load_file(source / "ema.safetensors")
    change(tensors, config)
    (out / "llm_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "ema.safetensors")
    return out


LAYER = "language_model.model.layers.1.mlp_moe_gen"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, c: t.pop(f"{LAYER}.experts.3.up_proj.weight"), "experts.3.up_proj.weight"),
        (lambda t, c: t.pop(f"{LAYER}.gate_shared.weight"), "gate_shared.weight"),
        (lambda t, c: t.update({f"{LAYER}.bias": torch.ones(1)}), "bias"),
        (lambda t, c: t.update({f"{LAYER}.gate.weight": torch.ones(5, 32)}), "5 rows"),
        (lambda t, c: c.update(top_k=5), "top_k must equal num_experts_per_tok, both 1 to 4"),
        (lambda t, c: c.update(transformed_gen=[2]), r"transformed_gen must be \[1\]"),
    ],
)
def test_files_that_disagree_with_themselves_are_refused(
    change: Any, match: str, sparse_dir: Path, tmp_path: Path
) -> None:
    refuse(official_model(), rewrite(sparse_dir, tmp_path / "bad", change), match)


def test_keys_that_differ_from_the_block_are_listed_together(
    sparse_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(sparse_dir)
    assert checkpoint.moe is not None  # judged before the tensors change under it
    specs = checkpoint.specs
    del specs[f"{LAYER}.experts.0.gate_proj.weight"]
    specs[f"{LAYER}.gate.bias"] = specs[f"{LAYER}.gate.weight"]
    specs[f"{LAYER}.gate.weight"] = specs[f"{LAYER}.gate_shared.weight"]
    monkeypatch.setattr(Checkpoint, "specs", specs)
    refuse(
        official_model(),
        checkpoint,
        r"got missing \S+experts\.0\.gate_proj\.weight \[24, 32\], extra \S+gate\.bias \[4, 32\], "
        r"misshapen \S+gate\.weight \[1, 32\], not \[4, 32\]",
    )


def test_a_file_cut_short_while_it_is_read_leaves_the_model_alone(
    sparse_dir: Path, tmp_path: Path
) -> None:
    source = rewrite(sparse_dir, tmp_path / "cut", lambda tensors, config: None)
    checkpoint = Checkpoint(source)
    with (source / "ema.safetensors").open("r+b") as stream:
        stream.truncate(min(spec.start for spec in checkpoint.specs.values()) + 100)
    refuse(official_model(), checkpoint, "file must not change while it is read", RuntimeError)


@pytest.mark.parametrize("keep_dense", [True, False])
def test_dense_weights_are_kept_on_request(keep_dense: bool, sparse_dir: Path) -> None:
    model = official_model()
    dense = model.layers[1].mlp_moe_gen
    load_moe_(model, sparse_dir, keep_dense=keep_dense)
    if keep_dense:
        restore_(model)
        assert model.layers[1].mlp_moe_gen is dense
    else:
        with pytest.raises(RuntimeError, match="dense FFN must have been kept"):
            restore_(model)
