# SPDX-License-Identifier: Apache-2.0
"""What cannot be swapped is refused by name, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swap_models import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Bare,
    Model,
    TensorMLP,
    assert_same,
    attach_like_accelerate,
    snapshot,
)
from torch import nn

from sparse_unified import MoEConfig, apply_moe_, restore_
from sparse_unified.surgery import exchange, moe, restore

HALF = MoEConfig(num_experts=4, top_k=2)
AT = r"apply_moe_: layer 2 \(language_model\.model\.layers\.2\.mlp_moe_gen\): "


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def refuse(
    model: Any, match: str, config: Any = HALF, scores: Any = None, error: type = ValueError
) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        apply_moe_(model, config, scores)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        ({"num_experts": 4.0}, "num_experts must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_k": 17}, "top_k must be at most num_experts = 16, got 17"),
        ({"num_shared_experts": -1}, "num_shared_experts must be an integer of at least 0"),
        ({"component": "vit"}, "component must be one of und, gen, got 'vit'"),
        ({"layers": "first"}, "layers must be 'middle'"),
        ({"layers": "3-1"}, "layers must ascend"),
        ({"layers": []}, "layers must name at least one"),
        ({"layers": [-1]}, "layers must lie in"),
        ({"layers": ["1"]}, "layers must be integers"),
    ],
)
def test_config_is_checked_when_it_is_made(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MoEConfig(**fields)


def test_config_takes_layers_as_text_or_sequence_only() -> None:
    with pytest.raises(TypeError, match="layers must be a string or a sequence"):
        MoEConfig(layers=3)  # type: ignore[arg-type]
    assert hash(MoEConfig(layers=[1, 2])) == hash(MoEConfig(layers=(1, 2)))


def test_config_of_another_type() -> None:
    refuse(Model(), "config must be a MoEConfig, got dict", {"num_experts": 4}, error=TypeError)


def test_nothing_matched_says_what_was_looked_for_and_found() -> None:
    with pytest.raises(ValueError, match="model must have decoder layers") as caught:
        apply_moe_(Bare(encoder=nn.Linear(2, 2)), HALF)
    assert "under language_model.model.layers or model.language_model.model.layers" in str(
        caught.value
    )
    assert "got a Bare (encoder)" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (nn.ModuleList([Bare(mlp=TensorMLP())] * 2), r"; layers: 2 x Bare \(mlp\)"),
        (nn.ModuleList(), "; layers: 0 x none"),
        (nn.Linear(2, 2), r"; layers: Linear \(none\)"),
    ],
)
def test_layers_without_a_generation_ffn_are_described(layers: nn.Module, found: str) -> None:
    refuse(Bare(layers=layers), found)


def test_several_lists_of_layers_are_not_guessed_at() -> None:
    stack = nn.ModuleList(Bare(mlp=TensorMLP()) for _ in range(3))
    other = nn.ModuleList(Bare(mlp=TensorMLP()) for _ in range(3))
    refuse(
        Bare(encoder=Bare(blocks=stack), decoder=Bare(blocks=other)),
        r"one list of decoder layers, got 2: encoder\.blocks, decoder\.blocks; give the module",
        MoEConfig(num_experts=4, top_k=2, component="und"),
    )


def test_restore_without_a_swap() -> None:
    with pytest.raises(ValueError, match="restore_: model must have FFNs replaced by apply_moe_"):
        restore_(Model())
    with pytest.raises(ValueError, match="restore_: model must have decoder layers"):
        restore_(nn.Linear(2, 2))


@pytest.mark.parametrize("layers", [[0, 4], "2-9"])
def test_layers_the_model_lacks(layers: Any) -> None:
    refuse(Model(), "layers must lie in 0 to 3", MoEConfig(num_experts=4, top_k=2, layers=layers))


def test_middle_of_two_layers_is_empty() -> None:
    refuse(Model(num_layers=2), "layers must name at least one of 2 layers")


def test_indivisible_width_lists_the_counts_that_do_and_the_layer() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen = TensorMLP(HIDDEN, 22)
    refuse(model, AT + r"ExpertLayout: num_experts must divide the 22 .* counts do: 2, 11, 22")


def test_sparse_layers_are_not_swapped_again() -> None:
    model = Model()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[2]))
    refuse(model, AT + "FFN must be dense, got a SparseMoE, sparse already")
    model.layers[2].mlp_moe_gen = Bare(gate=nn.Linear(2, 2), experts=nn.ModuleList())
    refuse(model, AT + "FFN must be dense, got a Bare, sparse already")


def test_a_layer_without_its_ffn() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen = None
    refuse(model, AT + r"mlp_moe_gen must be a module of the layer, got NoneType in a Layer \(mlp")


def test_an_ffn_of_another_kind() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen = Bare(fc1=nn.Linear(2, 2), fc2=nn.Linear(2, 2))
    refuse(model, AT + r"FFN must have gate_proj, up_proj, .* got a Bare \(fc1, fc2\)")


def test_a_projection_without_a_weight() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.up_proj = nn.Identity()
    refuse(model, AT + "up_proj must have a weight, got a Identity")


def test_a_bias() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.down_proj = nn.Linear(WIDTH, HIDDEN, bias=True)
    refuse(model, AT + "down_proj must have no bias, got Linear with one")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_quantised_and_double_weights(dtype: torch.dtype) -> None:
    model = Model()
    weight = torch.zeros(WIDTH, HIDDEN).to(dtype)
    model.layers[2].mlp_moe_gen.gate_proj.weight = nn.Parameter(weight, requires_grad=False)
    refuse(model, AT + f"gate_proj.weight must be float32, bfloat16 or float16.*got {dtype}")


def test_weights_of_a_tensor_subclass() -> None:
    class Packed(torch.Tensor):
        pass

    model = Model()
    packed = torch.zeros(WIDTH, HIDDEN).as_subclass(Packed)
    model.layers[2].mlp_moe_gen.gate_proj.weight = nn.Parameter(packed)
    refuse(model, AT + "gate_proj.weight must be a plain tensor, got Packed")


def test_an_adapter_on_a_projection() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.up_proj.lora_A = nn.Linear(HIDDEN, 2, bias=False)
    refuse(model, AT + r"FFN must have no parameters but its 3 weights, got up_proj\.lora_A")


def test_shapes_that_do_not_fit() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.down_proj = nn.Linear(WIDTH + 1, HIDDEN, bias=False)
    refuse(model, AT + r"weights must have shapes .* got \[24, 8\], \[24, 8\], \[8, 25\]")


def test_weights_of_two_dtypes() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.up_proj.bfloat16()
    refuse(model, AT + r"weights must share one dtype, got torch\.bfloat16, torch\.float32")


def test_weights_on_two_devices() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.up_proj.to("meta")
    refuse(model, AT + "weights must share one device, got cpu, meta")


def test_meta_weights_without_scores() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.to("meta")
    refuse(model, AT + "scores must be given for weights without data, got meta tensors")


def test_offloaded_weights() -> None:
    model = Model()
    attach_like_accelerate(model.layers[2].mlp_moe_gen.to("meta").gate_proj)
    scores = torch.rand(LAYERS, WIDTH)
    refuse(model, AT + "weights must be in memory, got weights offloaded", scores=scores)


def test_one_ffn_in_two_layers() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen = model.layers[1].mlp_moe_gen
    refuse(model, AT + r"FFN must be its own module, got that of .*layers\.1\.mlp_moe_gen")


def test_weights_that_are_not_finite() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[2].mlp_moe_gen.up_proj.weight[3, 1] = float("inf")
    refuse(model, AT + "magnitude of its weights: scores must be finite, got inf for neuron 3")


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Tanh()])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_other_than_silu(act: nn.Module, scale: float, dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.layers[2].mlp_moe_gen.act_fn = act
    refuse(model, AT + r"FFN must compute down_proj\(silu\(gate_proj\(x\)\) \* up_proj\(x\)\)")


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda x: (x, x, x), r"must return y \[1, 8\] or \(y, router_logits\), got tuple"),
        (lambda x: {"y": x}, "got dict"),
        (lambda x: x[:, :3], r"got \[1, 3\]"),
        (lambda x, y: x, r"forward must run on one token \[1, 8\], got TypeError"),
    ],
)
def test_a_forward_with_another_convention(forward: Any, match: str) -> None:
    model = Model()
    model.layers[2].mlp_moe_gen.forward = forward
    refuse(model, AT + ".*" + match)


def _bad_scores() -> list[tuple[Any, str]]:
    nan = torch.rand(LAYERS, WIDTH)
    nan[2, 5] = float("nan")
    return [
        (torch.rand(WIDTH), r"scores must have shape \[4 layers, intermediate_size\], got \[24\]"),
        (torch.rand(2, WIDTH), r"scores must have shape \[4 layers"),
        (torch.rand(LAYERS, 23), r"layer 1 .*scores must have shape \[24\], got \[23\]"),
        (nan, AT + "scores must be finite, got nan for neuron 5"),
        (-torch.log(torch.zeros(LAYERS, WIDTH)), "layer 1 .*scores must be finite, got inf"),
        (torch.ones(LAYERS, WIDTH, dtype=torch.int64), "scores must be floating point"),
        ({1: nan[1]}, "scores must be given for the selected layers, 1, 2, got none for 2"),
        ({1: nan[1], 2: nan[1], 3: nan[1]}, "selected layers, 1, 2, got some for 3"),
        ({"1": nan[1]}, "got none for 1, 2 and some for 1"),
        ({1: nan[1], 2: nan[1][None]}, AT + r"scores must have shape \[24\], got \[1, 24\]"),
    ]


@pytest.mark.parametrize(("scores", "match"), _bad_scores())
def test_scores_that_do_not_fit(scores: Any, match: str) -> None:
    refuse(Model(), match, scores=scores)


def test_an_error_while_blocks_are_built_leaves_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, permuted_block = [], moe._permuted_block

    def fail_second(*args: Any) -> Any:
        if built:
            raise MemoryError("no more")
        built.append(permuted_block(*args))
        return built[0]

    monkeypatch.setattr(moe, "_permuted_block", fail_second)
    refuse(Model(), "no more", error=MemoryError)


@pytest.mark.parametrize("attribute", ["describe_swap", "exchange._move_hooks"])
def test_an_interrupted_exchange_leaves_the_model_alone(
    attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = [exchange] if "." in attribute else [moe, restore]
    name = attribute.rpartition(".")[2]
    function, calls = getattr(inside[0], name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(function(*args, **kwargs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    model = Model()
    hook = attach_like_accelerate(model.layers[1].mlp_moe_gen)
    model.layers[1].mlp_moe_gen.register_forward_hook(lambda *args: None)
    with monkeypatch.context() as patch:
        for module in inside:
            patch.setattr(module, name, interrupted)
        refuse(model, "^$", error=KeyboardInterrupt)
    apply_moe_(model, HALF)
    model.layers[2].mlp_moe_gen.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    calls.clear()
    with monkeypatch.context() as patch:
        for module in inside:
            patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            restore_(model)
    assert_same(before, snapshot(model))
    hook.calls.clear()
    model(torch.randn(3, HIDDEN), torch.randn(3, HIDDEN))
    assert hook.calls == ["pre SparseMoE", "post SparseMoE"]
    restore_(model)
    hook.calls.clear()
    model(torch.randn(3, HIDDEN), torch.randn(3, HIDDEN))
    assert hook.calls == ["pre TensorMLP", "post TensorMLP"]


@pytest.mark.parametrize("scores", [object(), {1: "high", 2: "low"}])
def test_scores_that_are_no_tensors(scores: Any) -> None:
    refuse(Model(), "scores must be a tensor, got", scores=scores, error=TypeError)


def test_kept_meta_weights_are_not_put_back_under_real_ones() -> None:
    with torch.device("meta"):
        model = Model()
    apply_moe_(model, HALF, torch.rand(LAYERS, WIDTH))
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"layer 1 .*kept weights must hold data, got meta"):
        restore_(model)
