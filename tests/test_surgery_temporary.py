# SPDX-License-Identifier: Apache-2.0
"""FFNs and depth of models known by their adapter: exact inside, and exactly undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import analysis_models as models
import pytest
import torch
from torch import nn

from sparse_unified.surgery import (
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    changed,
)
from sparse_unified.surgery.decoder import find_adapter
from sparse_unified.surgery.temporary import (
    as_module,
    fewer_heads,
    narrowed,
    read_attention,
    without_layers,
    without_part,
)

IDS = torch.arange(3, 15)[None]


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def size(before: dict[str, Any]) -> int:
    return sum(values.numel() for _, values in before.values())


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (identity, values) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], values)


@pytest.mark.parametrize(
    ("make", "config", "text"),
    [
        (models.qwen, PruneWidthConfig(component="und"), "24 neurons -> 12 neurons"),
        (
            models.Bailing,
            PruneWidthConfig(component="und"),
            "24 neurons -> 12 neurons, 48 neurons -> 24 neurons",
        ),
        (
            models.qwen,
            PruneHeadsConfig(component="und"),
            "4 query heads, 2 key heads -> 2 query heads, 1 key heads",
        ),
        (models.qwen, SkipLayersConfig(layers=[0, 1]), "0-1 skipped"),
        (models.Bailing, SkipLayersConfig(layers=[1], part="ffn"), "ffn of 1 skipped"),
        (models.bagel, PruneWidthConfig(component="gen"), "96 neurons -> 48 neurons"),
        (models.bagel, SkipLayersConfig(layers=[1], part="attention"), "attention of 1 skipped"),
        (models.bagel, PruneWidthConfig(component="gen", keep_ratio=1), "nothing"),
    ],
)
def test_a_model_is_changed_for_as_long_as_the_block_runs(
    make: Any, config: Any, text: str
) -> None:
    model = make()
    before, modules = state(model), dict(model.named_modules())
    scores = None
    if config.mode == "width":
        ffns = find_adapter(model).ffns("gen" if make is models.bagel else "text")
        scores = {ffn.key: torch.rand(ffn.intermediate_size) for ffn in ffns}
    for given in (scores, None):
        with changed(model, config, given, forward=lambda: run(model)) as said:
            assert said == text
            assert (text == "nothing") == (
                sum(p.numel() for p in model.parameters()) == size(before)
            )
        assert_unchanged(model, before)
        assert dict(model.named_modules()) == modules
    with (
        pytest.raises(RuntimeError, match="stop"),
        changed(model, config, forward=lambda: run(model)),
    ):
        raise RuntimeError("stop")
    assert_unchanged(model, before)


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


def next_tokens(model: Any, *, cached: bool) -> list[int]:
    """The likeliest continuation, with a cache token by token, or without one."""
    from transformers import DynamicCache

    ids, cache = IDS, DynamicCache() if cached else None
    given = ids
    for _ in range(5):
        with torch.no_grad():
            if isinstance(model, models.Bailing):
                logits = model(given, cache)
            else:
                logits = model(given, past_key_values=cache, use_cache=cached).logits
        token = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        given = token if cached else ids
    return ids[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("make", [models.qwen, models.Bailing])
@pytest.mark.parametrize("part", [Part.ATTENTION, Part.FFN])
@pytest.mark.parametrize("gone", [[0], [1], [0, 2]])
def test_skipped_parts_are_not_run_and_come_back(make: Any, part: Part, gone: list[int]) -> None:
    model = make()
    adapter = find_adapter(model)
    before, dense = state(model), run(model)
    blocks = [adapter.block(i, "text") for i in range(models.LAYERS)]
    ran: list[tuple[str, int]] = []
    counts = [0] * models.LAYERS
    for i, block in enumerate(blocks):
        for name, module in (
            ("attention", block.attention),
            ("ffn", block.ffn),
            ("attention", block.input_norm),
            ("ffn", block.post_attention_norm),
        ):
            module.register_forward_hook(lambda *_, at=(name, i): ran.append(at))
        counts[i] = sum(
            p.numel()
            for p in (block.attention if part is Part.ATTENTION else block.ffn).parameters()
        )
    whole = sum(p.numel() for p in model.parameters())
    with without_part(adapter, "text", gone, part, lambda: run(model)):
        ran.clear()
        without = run(model)
        assert {i for name, i in ran if name == part.value} == set(range(models.LAYERS)) - set(gone)
        assert len(ran) == 4 * models.LAYERS - 2 * len(gone)
        assert next_tokens(model, cached=True) == next_tokens(model, cached=False)
        assert [adapter.holds(i, "text") for i in range(3)] == [i not in gone for i in range(3)]
        norms = models.HIDDEN * len(gone)
        left = whole - norms - sum(counts[i] for i in gone)
        assert sum(p.numel() for p in model.parameters()) == left
        if part is Part.FFN:
            assert {ffn.layer for ffn in adapter.ffns("text")} == set(range(3)) - set(gone)
    assert_unchanged(model, before)
    assert torch.equal(run(model), dense)
    for i in gone:  # as a part that adds nothing
        module = blocks[i].attention if part is Part.ATTENTION else blocks[i].ffn
        for name, inner in module.named_modules():
            if name.endswith(("o_proj", "dense", "down_proj")):
                nn.init.zeros_(inner.weight)
    torch.testing.assert_close(run(model), without, rtol=0, atol=1e-6)
    assert next_tokens(model, cached=True) == next_tokens(model, cached=False)


@pytest.mark.parametrize("make", [models.qwen, models.Bailing])
@pytest.mark.parametrize("groups", [[0], [1]])
def test_dropped_heads_are_those_with_their_output_at_zero(make: Any, groups: list[int]) -> None:
    model, masked = make(), make()
    adapter, other = find_adapter(model), find_adapter(masked)
    before, dense = state(model), run(model)
    attentions = [read_attention(adapter, "text", layer) for layer in (0, 2)]
    counts = [(a.num_groups, a.queries, a.head_dim) for a in attentions]
    assert counts == [(2, 2, models.HIDDEN // 4)] * 2
    for layer in (0, 2):
        output = read_attention(other, "text", layer).output
        output.weight.data.unflatten(1, (2, -1))[:, 1 - groups[0]] = 0
    with fewer_heads(attentions, {0: groups, 2: groups}):
        torch.testing.assert_close(run(model), run(masked), rtol=0, atol=1e-6)
        assert (run(model) - dense).abs().max() > 1e-4
        assert next_tokens(model, cached=True) == next_tokens(model, cached=False)
        parameters = sum(p.numel() for p in model.parameters())
        smaller = read_attention(adapter, "text", 0)
        assert (smaller.num_groups, smaller.queries) == (1, 2)
    half = sum(
        values.numel() // 2
        for name, (_, values) in before.items()
        if any(f"layers.{i}.{a}." in name for i in (0, 2) for a in ("self_attn", "attention"))
    )
    assert sum(v.numel() for _, v in before.values()) - parameters == half
    assert_unchanged(model, before)
    assert torch.equal(run(model), dense)


def test_groups_that_matter_score_higher() -> None:
    for model in (models.qwen(), models.Bailing()):
        attention = read_attention(find_adapter(model), "text", 1)
        linear, start = attention.inputs[2]
        linear.weight.data[start + attention.head_dim : start + 2 * attention.head_dim] *= 3
        first, second = attention.scores().tolist()
        assert second > 2 * first


def test_attentions_that_cannot_be_read_are_refused() -> None:
    model = models.qwen()
    adapter = find_adapter(model)
    attention = adapter.block(1, "text").attention
    attention.gates = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"layer 1: attention must have no weights beside .* gates"
    ):
        read_attention(adapter, "text", 1)
    del attention.gates
    attention.num_heads = 3
    with pytest.raises(ValueError, match="num_heads must be 4 as its weights say, got 3"):
        read_attention(adapter, "text", 1)
    attention.num_heads, attention.head_dim = 4, 3
    with pytest.raises(ValueError, match="must have whole groups of heads of 3 channels, got q_p"):
        read_attention(adapter, "text", 1)
    attention.head_dim = 4
    attention.q_proj = None
    with pytest.raises(ValueError, match="must have head_dim and the linear layers q_proj, k_proj"):
        read_attention(adapter, "text", 1)


def test_layers_of_several_kinds_are_not_numbered_anew() -> None:
    model = models.qwen()
    adapter = find_adapter(model)
    adapter.block(2, "text").attention.sliding_window = 8
    for inside in (
        without_layers(model, adapter, "text", [1]),
        without_part(adapter, "text", [1], Part.ATTENTION, lambda: run(model)),
    ):
        with pytest.raises(ValueError, match="attentions of one kind, because"), inside:
            pass
    with without_part(adapter, "text", [1], Part.FFN, lambda: run(model)):
        pass


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = models.qwen()
    adapter = find_adapter(model)
    before = state(model)
    for inside in (
        without_layers(model, adapter, "text", [1]),
        narrowed(adapter.ffns("text"), {0: torch.tensor([3])}),
        without_part(adapter, "text", [0], Part.ATTENTION, lambda: run(model)),
        fewer_heads([read_attention(adapter, "text", 1)], {1: [0]}),
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
        pytest.raises(ValueError, match="an attention must be left, got 3 to leave out"),
        without_part(adapter, "text", [0, 1, 2], Part.ATTENTION, lambda: run(model)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="must run every part that is to be skipped, got none of a"),
        without_part(adapter, "text", [1], Part.FFN, lambda: None),
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
