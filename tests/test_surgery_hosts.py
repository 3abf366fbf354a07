# SPDX-License-Identifier: Apache-2.0
"""Models of other makes: merged projections, engines' linears, transformers, accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    ffn,
    foreign_model,
    snapshot,
    tokens,
)
from test_surgery_moe import GATE, official_model, sparse_dir  # noqa: F401
from torch import Tensor, nn

from sparse_unified import (
    MoEConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    count_parameters,
    load_moe_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.ffn import read_weights

HALF = MoEConfig(num_experts=4, top_k=2)
ALL = MoEConfig(num_experts=4, top_k=4, layers="all")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FOREIGN = pytest.mark.parametrize("mlp", [MergedMLP, EngineMLP, SplitEngineMLP, MergedTupleMLP])


@FOREIGN
@pytest.mark.parametrize("component", ["gen", "und"])
def test_merged_and_engine_layers_become_sparse_and_come_back(mlp: Any, component: str) -> None:
    model = foreign_model(mlp)
    dense, before = model(tokens(5), tokens(7)), snapshot(model)
    config = MoEConfig(num_experts=4, top_k=4, component=component, layers="all")
    report = apply_moe_(model, config)
    block = ffn(model, 1, component)
    assert report.layers[1].before == mlp.__name__
    assert isinstance(block, SparseMoE)
    assert block.gate_proj.requires_grad == (mlp in (MergedMLP, MergedTupleMLP))
    assert type(block.gate_proj) is nn.Parameter
    for sparse, expected in zip(model(tokens(5), tokens(7)), dense, strict=True):
        torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-6)
    restore_(model)
    assert_same(before, snapshot(model))


@FOREIGN
def test_merged_and_engine_layers_get_narrower(mlp: Any) -> None:
    model = foreign_model(mlp)
    scores = torch.rand(LAYERS, WIDTH)
    before, counts, dense = snapshot(model), count_parameters(model)["gen"], ffn(model, 1)
    gate, up, down = read_weights(dense)
    report = prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=0.5), scores)
    kept = scores[1].topk(WIDTH // 2).indices.sort().values
    assert ffn(model, 1) is dense
    for narrow, whole in zip(
        read_weights(dense), (gate[kept], up[kept], down[:, kept]), strict=True
    ):
        assert torch.equal(narrow, whole)
    assert {(part.before, part.after) for part in report.parts} == {("24 neurons", "12 neurons")}
    assert report.before == counts
    assert counts.parameters == LAYERS * 3 * HIDDEN * WIDTH
    assert report.after.parameters == counts.parameters // 2
    model(tokens(5), tokens(7))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[0], part="ffn"))
    model(tokens(5), tokens(7))
    restore_(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("mlp", [MergedMLP, EngineMLP, SplitEngineMLP])
def test_checkpoints_load_into_merged_and_engine_layers(mlp: Any, sparse_dir: Path) -> None:  # noqa: F811
    model = foreign_model(mlp, 32, 96, layers=3)
    official = official_model()
    load_moe_(official, sparse_dir)
    load_moe_(model, sparse_dir)
    x = tokens(6, 32)
    assert torch.equal(model.layers[1].mlp_moe_gen(x), official.layers[1].mlp_moe_gen(x))
    key = "experts.2.down_proj.weight"
    stored = Checkpoint(sparse_dir).read(f"{GATE}.{key}")
    assert torch.equal(model.layers[1].mlp_moe_gen.state_dict()[key], stored)


def test_a_merged_projection_that_is_none_is_refused() -> None:
    model = foreign_model(MergedMLP)
    model.layers[1].mlp_moe_gen.gate_up_proj = nn.Linear(HIDDEN, 2 * WIDTH + 1, bias=False)
    with pytest.raises(ValueError, match=r"weights must have shapes \[I, D\]"):
        apply_moe_(model, HALF)
    swapped = foreign_model(MergedMLP)

    def up_first(x: Tensor) -> Tensor:
        up, gate = dense.gate_up_proj(x).chunk(2, dim=-1)
        return dense.down_proj(F.silu(gate) * up)

    dense = ffn(swapped, 1)
    dense.forward = up_first
    with pytest.raises(ValueError, match="FFN must compute down_proj"):
        apply_moe_(swapped, HALF)


# Decoders of transformers: `mlp` alone, which is the und component.


def qwen2(**sizes: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def test_a_transformers_decoder_computes_the_same_with_all_experts() -> None:
    model = qwen2()
    ids = torch.randint(64, (2, 7))
    with torch.no_grad():
        dense = model(ids).logits
        before = snapshot(model)
        report = apply_moe_(model, MoEConfig(num_experts=4, top_k=4, component="und", layers="all"))
        assert [entry.path for entry in report.layers] == [
            f"model.layers.{i}.mlp" for i in range(4)
        ]
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)
        restore_(model)
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="und"))
        assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (
            2,
            10,
        )
        restore_(model)
        assert_same(before, snapshot(model))
        assert torch.equal(model(ids).logits, dense)
        prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5))
        assert not torch.allclose(model(ids).logits, dense)
        restore_(model)


# The name that the tokens go by.


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
def test_a_replaced_ffn_takes_its_tokens_by_the_name_of_the_one_before(mlp: Any) -> None:
    model = Model(mlp)
    before = {id(m): dict(m._forward_pre_hooks) for m in model.modules()}
    x = tokens(5)

    def by_name(**more: Any) -> Any:
        out = ffn(model, 1)(hidden_state=x, **more)
        return out[0] if isinstance(out, tuple) else out

    dense = by_name()
    narrow = PruneWidthConfig(component="gen", keep_ratio=1.0, layers="all")
    skip = SkipLayersConfig(component="gen", layers=[1], part="ffn")
    for steps in ([lambda: apply_moe_(model, ALL)], [lambda: prune_width_(model, narrow)]):
        for step in (*steps, lambda: apply_moe_(model, ALL)):
            if not isinstance(ffn(model, 1), SparseMoE):
                step()
            torch.testing.assert_close(by_name(), dense, rtol=1e-4, atol=1e-5)
        assert len(ffn(model, 1)._forward_pre_hooks) == 1
        if mlp is TupleMLP:
            text = torch.arange(5)
            torch.testing.assert_close(
                by_name(packed_text_indexes=text), dense, rtol=1e-4, atol=1e-5
            )
        with pytest.raises(TypeError):
            ffn(model, 1)(tokens=x)
        restore_(model)
    if mlp is TupleMLP:
        skip_layers_(model, skip)
        assert not by_name().any()
        restore_(model)
    assert torch.equal(by_name(), dense)
    assert {id(m): dict(m._forward_pre_hooks) for m in model.modules()} == before


def test_hooks_of_users_see_the_name_that_the_caller_gave() -> None:
    model, seen = Model(), []
    handle = ffn(model, 1).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    apply_moe_(model, ALL)
    ffn(model, 1)(hidden_state=tokens(5))
    handle.remove()
    ffn(model, 1)(hidden_state=tokens(5))
    assert seen == [["hidden_state"]]


# Weights that are parts of others.


class RowParallel(nn.Linear):
    """A linear layer as under tensor parallelism: its result is summed over processes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2  # what the other of two processes would add


def test_tensor_parallel_ffns_are_refused() -> None:
    model = Model()
    part = ffn(model, 1)
    parallel = RowParallel(WIDTH, HIDDEN, bias=False)
    parallel.weight = part.down_proj.weight
    part.down_proj = parallel
    with pytest.raises(ValueError, match=r"layer 1 .* must .*down_proj"):
        apply_moe_(model, HALF)
    assert ffn(model, 1) is part


def test_weights_sharded_as_dtensors_are_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        mesh = DeviceMesh("cpu", [0])
        part = ffn(model, 1)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(part, name)
            linear.weight = nn.Parameter(
                distribute_tensor(linear.weight.detach(), mesh, [Shard(dim)])
            )
        with pytest.raises(ValueError, match=r"layer 1 .*gate_proj.weight must be .*DTensor"):
            apply_moe_(model, HALF)
        assert ffn(model, 1) is part
    finally:
        dist.destroy_process_group()


# Real hooks of accelerate.


def hooks(module: nn.Module) -> list[str]:
    return [repr(getattr(part, "_hf_hook", None)) for part in module.modules()]


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP, MergedMLP])
@pytest.mark.parametrize("how", ["device_map", "cpu", "disk", "mixed"])
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


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
@pytest.mark.parametrize("how", ["cpu", "disk", "mixed"])
def test_accelerate_can_offload_a_sparse_model(mlp: Any, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Model(mlp).eval().requires_grad_(False)
    for config in (HALF, MoEConfig(num_experts=4, top_k=2, component="und")):
        apply_moe_(model, config)
    with torch.no_grad():
        sparse = model(tokens(5), tokens(7))
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: part.detach() for name, part in parts.items()}
    whole: dict[str, Any] = {"state_dict": state, "preload_module_classes": ["SparseMoE"]}
    if how == "cpu":
        accelerate.cpu_offload(model, "cpu", **whole)
    elif how == "disk":
        accelerate.utils.offload_state_dict(str(tmp_path), state)
        accelerate.disk_offload(
            model, str(tmp_path), "cpu", preload_module_classes=whole["preload_module_classes"]
        )
    else:
        places = {f"language_model.model.layers.{i}": ("disk", "cpu")[i % 2] for i in range(LAYERS)}
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path), **whole
        )
    block = ffn(model, 2)
    assert block.gate_proj.is_meta
    assert block.gate.weight.is_meta
    with torch.no_grad():
        for out, expected in zip(model(tokens(5), tokens(7)), sparse, strict=True):
            assert torch.equal(out, expected)
    assert block.gate_proj.is_meta


def test_a_sparse_block_without_its_router_says_so() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Model().eval().requires_grad_(False)
    apply_moe_(model, HALF)
    # Each module alone, and the block calls no router.
    accelerate.cpu_offload(model, "cpu", state_dict=dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="must be on one device, got cpu and meta"):
        ffn(model, 1)(tokens(5))


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what running the model changes: call counters, parameters brought in and out."""
    values = {n: v for n, v in state["values"].items() if not n.endswith("act_cnt")}
    return state | {"values": values, "parameters": sorted(state["parameters"])}


def test_checkpoints_load_into_offloaded_models(sparse_dir: Path) -> None:  # noqa: F811
    accelerate = pytest.importorskip("accelerate")
    model, plain = official_model(), official_model()
    accelerate.cpu_offload(model, "cpu")
    for each in (model, plain):
        load_moe_(each, sparse_dir)
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
