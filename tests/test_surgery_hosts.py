# SPDX-License-Identifier: Apache-2.0
"""Models of other makes, of transformers and engines; accelerate's hooks, torchao's weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from surgery_models import (
    HIDDEN,
    LAYERS,
    WIDTH,
    EngineMLP,
    MergedMLP,
    MergedTupleMLP,
    Model,
    SplitEngineMLP,
    TensorMLP,
    TupleMLP,
    assert_same,
    drop_counts,
    ffn,
    foreign_model,
    snapshot,
    tokens,
)
from test_surgery_moe import GATE, official_model
from torch import Tensor, nn

from sparse_unified import (
    MoEConfig,
    PruneWidthConfig,
    QuantizeConfig,
    SkipLayersConfig,
    apply_moe_,
    count_parameters,
    load_moe_,
    prune_width_,
    quantize_weights_,
    restore_,
    skip_layers_,
)
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.nn import SparseMoE, SwiGLU, expert_state
from sparse_unified.nn.expert_state import is_packed, unpack
from sparse_unified.surgery.ffn import read_weights
from sparse_unified.surgery.quantize import quantize_ffn_

HALF = MoEConfig(num_experts=4, top_k=2)
ALL = MoEConfig(num_experts=4, top_k=4, layers="all")


@pytest.mark.parametrize("mlp", [MergedMLP, EngineMLP, SplitEngineMLP, MergedTupleMLP])
def test_merged_and_engine_layers_change_and_come_back(mlp: Any) -> None:
    model, scores = foreign_model(mlp), torch.rand(LAYERS, WIDTH)
    dense, before = model(tokens(5), tokens(7)), snapshot(model)
    for component in ("gen", "und"):
        apply_moe_(model, MoEConfig(num_experts=4, top_k=4, component=component, layers="all"))
    block = ffn(model, 1)
    assert isinstance(block, SparseMoE)
    assert block.gate_proj.requires_grad == (mlp in (MergedMLP, MergedTupleMLP))
    assert type(block.gate_proj) is nn.Parameter
    for sparse, expected in zip(model(tokens(5), tokens(7)), dense, strict=True):
        torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-6)
    restore_(model)
    assert_same(before, snapshot(model))

    module = ffn(model, 1)
    gate, up, down = read_weights(module)
    report = prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=0.5), scores)
    kept = scores[1].topk(WIDTH // 2).indices.sort().values
    assert ffn(model, 1) is module
    for narrow, whole in zip(
        read_weights(module), (gate[kept], up[kept], down[:, kept]), strict=True
    ):
        assert torch.equal(narrow, whole)
    assert {(part.before, part.after) for part in report.parts} == {("24 neurons", "12 neurons")}
    assert report.after["gen"].parameters == LAYERS * 3 * HIDDEN * WIDTH // 2
    ran = ffn(model, 0).down_proj.register_forward_hook(lambda *_: pytest.fail("it ran"))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[0], part="ffn"))
    expected = tokens(7)
    for i in range(1, LAYERS):
        out = ffn(model, i)(expected)
        expected = expected + (out[0] if isinstance(out, tuple) else out)
    assert torch.equal(model(tokens(5), tokens(7))[1], expected)
    restore_(model)
    ran.remove()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("mlp", [MergedMLP, SplitEngineMLP])
def test_checkpoints_load_into_merged_and_engine_layers(mlp: Any, golden: Any) -> None:
    sparse_dir, model = golden("t2i_moe"), foreign_model(mlp, 32, 96, layers=3)
    official = official_model()
    load_moe_(official, sparse_dir)
    load_moe_(model, sparse_dir)
    x = tokens(6, 32)
    assert torch.equal(model.layers[1].mlp_moe_gen(x), official.layers[1].mlp_moe_gen(x))
    key = "experts.2.down_proj.weight"
    stored = Checkpoint(sparse_dir).read(f"{GATE}.{key}")
    assert torch.equal(model.layers[1].mlp_moe_gen.state_dict()[key], stored)


def test_a_merged_projection_that_is_none_is_refused() -> None:
    model, dense = foreign_model(MergedMLP), MergedMLP()
    model.layers[1].mlp_moe_gen = dense

    def up_first(x: Tensor) -> Tensor:
        up, gate = dense.gate_up_proj(x).chunk(2, dim=-1)
        return dense.down_proj(F.silu(gate) * up)

    dense.forward = up_first  # type: ignore[method-assign]
    refused("FFN must compute down_proj", apply_moe_, model, HALF)
    dense.gate_up_proj = nn.Linear(HIDDEN, 2 * WIDTH + 1, bias=False)
    refused(r"weights must have shapes \[I, D\]", apply_moe_, model, HALF)


def test_a_transformers_decoder_computes_the_same_with_all_experts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(vocab_size=64, **sizes, **heads)
    model, ids = transformers.Qwen2ForCausalLM(config).eval(), torch.randint(64, (2, 7))
    with torch.no_grad():
        dense, before = model(ids).logits, snapshot(model)
        report = apply_moe_(model, MoEConfig(num_experts=4, top_k=4, component="und", layers="all"))
        assert [part.path for part in report.parts] == [f"model.layers.{i}.mlp" for i in range(4)]
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)
        restore_(model)
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="und"))
        longer = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert longer.shape == (2, 10)
        restore_(model)
        assert_same(before, snapshot(model))
        assert torch.equal(model(ids).logits, dense)


# Real hooks of accelerate.


def hooks(module: nn.Module) -> list[str]:
    return [repr(getattr(part, "_hf_hook", None)) for part in module.modules()]


@pytest.mark.parametrize(
    ("mlp", "how"),
    [
        (TensorMLP, "device_map"),
        (TupleMLP, "cpu"),
        (MergedMLP, "cpu"),
        (TensorMLP, "disk"),
        (TupleMLP, "mixed"),
        (MergedMLP, "mixed"),
    ],
)
def test_models_that_accelerate_placed_stay_placed(mlp: Any, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = foreign_model(mlp) if mlp is MergedMLP else Model(mlp)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        dense = model(tokens(5), tokens(7))
    prefix = "language_model.model.layers."
    if how == "device_map":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "cpu":
        accelerate.cpu_offload(model, "cpu", offload_buffers=False)
    elif how == "disk":
        accelerate.disk_offload(model, str(tmp_path), "cpu")
    else:
        places = {f"{prefix}{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    was_meta = [p.is_meta for p in ffn(model, 1).parameters()]
    assert any(was_meta) == (how != "device_map")
    state, hooked = snapshot(model), hooks(model)

    for config in (ALL, MoEConfig(num_experts=4, top_k=4, component="und")):
        apply_moe_(model, config)
    block = ffn(model, 1)
    assert all(p.is_meta == any(was_meta) for p in block.parameters())
    trained = {name for name, p in block.named_parameters() if p.requires_grad}
    assert trained == {"gate.weight", "gate_shared.weight"}
    with torch.no_grad():
        for _ in range(2):
            for sparse, expected in zip(model(tokens(5), tokens(7)), dense, strict=True):
                torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-6)
    assert all(p.is_meta == any(was_meta) for p in block.parameters())

    restore_(model)
    assert hooks(model) == hooked
    assert_same(comparable(state), comparable(snapshot(model)))
    prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=0.5, layers="all"))
    skip_layers_(model, SkipLayersConfig(component="und", layers=[0, 1], part="ffn"))
    with torch.no_grad():
        model(tokens(5), tokens(7))
    restore_(model)
    assert hooks(model) == hooked
    with torch.no_grad():
        for again, expected in zip(model(tokens(5), tokens(7)), dense, strict=True):
            assert torch.equal(again, expected)


@pytest.mark.parametrize(("mlp", "how"), [(TensorMLP, "cpu"), (TupleMLP, "disk")])
def test_accelerate_can_offload_a_sparse_model(mlp: Any, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Model(mlp).eval().requires_grad_(False)
    for config in (HALF, MoEConfig(num_experts=4, top_k=2, component="und")):
        apply_moe_(model, config)
    with torch.no_grad():
        sparse = model(tokens(5), tokens(7))
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: part.detach() for name, part in parts.items()}
    whole = {"preload_module_classes": ["SparseMoE"]}
    if how == "cpu":
        accelerate.cpu_offload(model, "cpu", state_dict=state, **whole)
    else:
        accelerate.utils.offload_state_dict(str(tmp_path), state)
        accelerate.disk_offload(model, str(tmp_path), "cpu", **whole)
    block = ffn(model, 2)
    assert block.gate_proj.is_meta
    assert block.gate.weight.is_meta
    with torch.no_grad():
        for out, expected in zip(model(tokens(5), tokens(7)), sparse, strict=True):
            assert torch.equal(out, expected)
    assert block.gate_proj.is_meta


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what running the model changes: call counters, parameters brought in and out."""
    return drop_counts(state) | {"parameters": sorted(state["parameters"])}


def test_checkpoints_load_into_offloaded_models(golden: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = official_model(), official_model()
    accelerate.cpu_offload(model, "cpu")
    for each in (model, plain):
        load_moe_(each, golden("t2i_moe"))
    x = tokens(6, 32)
    assert torch.equal(model.layers[1].mlp_moe_gen(x), plain.layers[1].mlp_moe_gen(x))
    assert all(p.is_meta for p in model.layers[1].mlp_moe_gen.parameters())


def test_accelerate_can_take_its_hooks_off_a_sparse_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Model().eval().requires_grad_(False)
    accelerate.cpu_offload(model, "cpu")
    apply_moe_(model, HALF)
    with torch.no_grad():
        hooked = model(tokens(5), tokens(7))
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        plain = model(tokens(5), tokens(7))
    assert not any(p.is_meta for p in model.parameters())
    for a, b in zip(hooked, plain, strict=True):
        assert torch.equal(a, b)


# Weights in 8 or 4 bits: nearly the same in half the bytes or less

# Half a step of 127 over the largest of a row, relative to the rms: about 1 % a matrix; fp8 has 3
# bits behind the leading one, so up to 1/16 and about 2.6 % a matrix; nvfp4 has one, so up to 1/4
# and 9.5 %; three matrices each.
ERROR = {"int8": 0.03, "fp8": 0.09, "nvfp4": 0.2}
SIZES = (64, 192)


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao")


def model_of(mlp: Any = TensorMLP, dtype: torch.dtype = torch.bfloat16) -> Model:
    return foreign_model(mlp, *SIZES).to(dtype).eval().requires_grad_(False)


def output(module: Any, x: Tensor) -> Tensor:
    out = module(x)
    return (out[0] if isinstance(out, tuple) else out).float()


def error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("storage", "mlp", "dtype", "least"),
    [
        ("int8", TensorMLP, torch.float32, 0.3),
        ("fp8", TupleMLP, torch.bfloat16, 0.6),
        ("int8", MergedMLP, torch.bfloat16, 0.6),
        ("nvfp4", TensorMLP, torch.bfloat16, 0.4),
    ],
)
@pytest.mark.usefixtures("torchao")
def test_dense_ffns_compute_nearly_the_same(
    storage: str, mlp: Any, dtype: torch.dtype, least: float
) -> None:
    model = model_of(mlp, dtype)
    x = tokens(5, 64).to(dtype)
    expected, module = output(ffn(model, 1), x), ffn(model, 1)
    report = quantize_weights_(model, QuantizeConfig(storage=storage))
    assert ffn(model, 1) is module
    assert [entry.layer for entry in report.parts] == [0, 1, 2, 3]
    assert report.parts[1].after.startswith("192 neurons, ")
    assert report.after["gen"].bytes < least * report.before["gen"].bytes
    assert report.after["gen"].parameters == report.before["gen"].parameters
    assert 1e-4 < error(output(module, x), expected) < ERROR[storage]
    assert not is_packed(ffn(model, 1, "und").down_proj.weight)


@pytest.mark.parametrize(("storage", "shared"), [("fp8", 0), ("int8", 2), ("nvfp4", 0)])
@pytest.mark.usefixtures("torchao")
def test_sparse_ffns_route_the_same_and_compute_nearly_the_same(storage: str, shared: int) -> None:
    model = model_of()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, num_shared_experts=shared))
    block = ffn(model, 1)
    block.gate_proj[7] = 0  # a scale of zero would make NaN of it
    nn.init.normal_(block.gate.weight, std=0.05)
    block.return_router_logits = True
    x = tokens(9, 64).bfloat16()
    expected, logits = block(x)
    report = quantize_weights_(model, QuantizeConfig(storage=storage, layers="middle"))
    assert [entry.layer for entry in report.parts] == [1, 2]
    assert ffn(model, 1) is block
    assert torch.equal(block(x)[1], logits)
    assert 1e-4 < error(block(x)[0].float(), expected.float()) < ERROR[storage]
    plain = SparseMoE(64, 192, 4, 2, shared, dtype=torch.bfloat16).requires_grad_(False)
    plain.load_state_dict(block.state_dict())
    assert block.active_backend == plain.active_backend
    for weight in (block.gate_proj, block.down_proj):
        assert torch.equal(unpack(weight), weight.dequantize())
    with torch.no_grad():  # the same kernels on the unpacked weights
        assert torch.equal(block(x)[0], plain(x)[0])
        assert torch.equal(copy.deepcopy(block)(x)[0], plain(x)[0])


@pytest.mark.usefixtures("torchao")
def test_int8_unpacks_by_blocks_of_rows_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_state, "_IN_CACHE", 150)
    block = SparseMoE(24, 40, 4, 2, dtype=torch.float16).requires_grad_(False)
    quantize_ffn_(block, "int8")
    weight: Any = block.down_proj
    assert torch.equal(unpack(weight), weight.dequantize())
    weight.zero_point += 3  # what others may have stored
    assert torch.equal(unpack(weight), weight.dequantize())
    weight.zero_point = None
    assert torch.equal(unpack(weight), weight.qdata.half() * weight.scale.half())


@pytest.mark.parametrize("num_tokens", [1, 32, 33])
@pytest.mark.usefixtures("torchao")
def test_few_tokens_read_int8_weights_where_they_lie(num_tokens: int) -> None:
    module = SwiGLU(64, 192, dtype=torch.bfloat16).requires_grad_(False)
    quantize_ffn_(module, "int8")
    x = tokens(num_tokens, 64).bfloat16()
    plain = SwiGLU(64, 192, dtype=torch.bfloat16).requires_grad_(False)
    plain.load_state_dict({key: unpack(value) for key, value in module.state_dict().items()})
    in_place = torch._weight_int8pack_mm
    with mock.patch.object(torch, "_weight_int8pack_mm", side_effect=in_place) as calls:
        assert error(module(x).float(), plain(x).float()) < 1e-2
        assert module(x[None]).shape == (1, num_tokens, 64)
    assert calls.call_count == (6 if num_tokens <= 32 else 0)
    for other in (x[0], x[:0], x.T.contiguous().T):
        assert error(module(other).float(), plain(other).float()) < 1e-2 or not other.numel()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for ffn_of, leaf in zip((module, plain), inputs, strict=True):
        ffn_of(leaf).float().square().sum().backward()
    ours, expected = (leaf.grad.float() for leaf in inputs if leaf.grad is not None)
    assert error(ours, expected) < 3e-2
    seen: list[Tensor] = []
    module.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert error(module(x).float(), plain(x).float()) < 1e-2
    assert seen[0].shape == (num_tokens, 192)


@pytest.mark.usefixtures("torchao")
def test_what_was_replaced_before_comes_back_whole() -> None:
    model = model_of()
    before = snapshot(model)
    prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="all"))
    report = quantize_weights_(model, QuantizeConfig(component="both"))
    assert str(report).startswith("quantize_weights_: 8 parts changed (und ffn 0-3; gen ffn 0-3)")
    assert report.after == count_parameters(model)
    restore_(model)
    assert_same(before, snapshot(model))


@pytest.mark.usefixtures("torchao")
def test_packed_weights_go_into_no_other_transform_and_take_no_state() -> None:
    model = model_of()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[1]))
    state = ffn(model, 1).state_dict()
    quantize_weights_(model, QuantizeConfig())
    with pytest.raises(ValueError, match=r"layer 2 .*gate_proj.weight must be a plain tensor"):
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[2]))
    for layers in ([1], [2]):
        with pytest.raises(ValueError, match=r"must be .*plain tensor.*Int8Tensor"):
            quantize_weights_(model, QuantizeConfig(layers=layers))
    with pytest.raises(RuntimeError, match=r"gate_proj must be a plain tensor to load into"):
        ffn(model, 1).load_state_dict(state)
    refused("plain tensors to be viewed", ffn(model, 1).official_views)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda layer: setattr(layer, "mlp_moe_gen", EngineMLP(*SIZES)), "must be an nn.Linear"),
        (lambda layer: layer.mlp_moe_gen.to("meta"), "plain tensors in memory, got meta tensors"),
        (lambda layer: layer.mlp_moe_gen.half(), "of fp32 or bf16 and their sides multiples of 16"),
    ],
)
@pytest.mark.usefixtures("torchao")
def test_what_cannot_be_packed_is_refused_before_anything_is(change: Any, match: str) -> None:
    model = model_of()
    change(model.layers[2])
    before = snapshot(model)
    refused(match, quantize_weights_, model, QuantizeConfig(storage="nvfp4"))
    compute = QuantizeConfig(storage="fp8-compute", layers=[0])
    refused("layer 0 .*got 'fp8-compute': fp8 .*type 'cpu'", quantize_weights_, model, compute)
    assert_same(before, snapshot(model))
    known = "int8, fp8, fp8-compute, nvfp4"
    refused(f"storage must be one of {known}, got 'int4'", QuantizeConfig, storage="int4")
    refused("component must be one of und, gen, both, got 'vit'", QuantizeConfig, component="vit")
