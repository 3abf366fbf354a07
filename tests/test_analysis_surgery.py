# SPDX-License-Identifier: Apache-2.0
"""FFNs and depth of models known by their adapter: exact inside, and exactly undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import analysis_models as models
import pytest
import torch
from torch import nn

from sparse_unified.analysis import find_adapter
from sparse_unified.analysis.surgery import as_module, narrowed, without_layers

IDS = torch.arange(3, 15)[None]


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (identity, values) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], values)


@pytest.mark.parametrize("make", [models.qwen, models.Bailing])
def test_narrowed_ffns_are_those_with_the_others_at_zero(make: Any) -> None:
    model, masked = make(), make()
    adapter, other = find_adapter(model), find_adapter(masked)
    before, dense = state(model), run(model)
    kept = {}
    for ffn, same in zip(adapter.ffns("text"), other.ffns("text"), strict=True):
        index = torch.arange(0, ffn.intermediate_size, 3)
        kept[ffn.key] = index
        gone = torch.ones(ffn.intermediate_size, dtype=torch.bool)
        gone[index] = False
        same.down_proj[:, gone] = 0
    with narrowed(adapter.ffns("text"), kept):
        parameters = sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(run(model), run(masked), rtol=0, atol=1e-6)
        assert all(ffn.intermediate_size in (8, 16) for ffn in adapter.ffns("text"))
        assert (run(model) - dense).abs().max() > 1e-4
    ffns = {id(weight) for ffn in adapter.ffns("text") for weight in ffn.module.parameters()}
    fewer = sum(values.numel() * 2 // 3 for i, values in before.values() if i in ffns)
    assert sum(v.numel() for _, v in before.values()) - parameters == fewer
    assert_unchanged(model, before)
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("make", [models.qwen, models.Bailing])
def test_left_out_layers_are_not_run_and_come_back(make: Any) -> None:
    model = make()
    adapter = find_adapter(model)
    before, dense = state(model), run(model)
    ran: list[int] = []
    blocks = [adapter.block(i, "text") for i in range(models.LAYERS)]
    for i, block in enumerate(blocks):
        block.layer_module.register_forward_hook(lambda *_, i=i: ran.append(i))
    with without_layers(model, adapter, "text", [1]):
        shorter = run(model)
    assert ran == [0, 2]
    assert_unchanged(model, before)
    assert torch.equal(run(model), dense)
    for zeroed in ("o_proj", "dense", "down_proj"):  # as a layer that adds nothing
        for name, part in blocks[1].layer_module.named_modules():
            if name.endswith(zeroed):
                nn.init.zeros_(part.weight)
    torch.testing.assert_close(run(model), shorter, rtol=0, atol=1e-6)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = models.qwen()
    adapter = find_adapter(model)
    before = state(model)
    for inside in (
        without_layers(model, adapter, "text", [1]),
        narrowed(adapter.ffns("text"), {0: torch.tensor([3])}),
    ):
        with pytest.raises(RuntimeError, match="stop"), inside:
            raise RuntimeError("stop")
        assert_unchanged(model, before)


def test_generation_with_a_cache_has_no_gap() -> None:
    model = models.qwen()
    adapter = find_adapter(model)
    with without_layers(model, adapter, "text", [0]):
        cached = model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=True)
        plain = model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    assert [adapter.block(i, "text").attention.layer_idx for i in range(3)] == [0, 1, 2]


def test_what_cannot_be_done_is_said() -> None:
    model = models.Bailing()
    adapter = find_adapter(model)
    with (
        pytest.raises(ValueError, match="a layer must be left, got 3 to leave out"),
        without_layers(model, adapter, "text", [0, 1, 2]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"must be in an nn\.ModuleList of the model, got none"),
        without_layers(nn.Linear(2, 2), adapter, "text", [0]),
    ):
        pass
    assert as_module(SimpleNamespace(model=model)) is model
    with pytest.raises(TypeError, match="must be a module or hold one as `model`, got int"):
        as_module(3)
