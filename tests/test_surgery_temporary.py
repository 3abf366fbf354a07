# SPDX-License-Identifier: Apache-2.0
"""`changed` makes any decoder smaller for a while: exact inside, and exactly undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import analysis_models as models
import pytest
import torch
from torch import nn

from sparse_unified.surgery import PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig, changed
from sparse_unified.surgery.decoder import find_adapter
from sparse_unified.surgery.prune import as_module, read_attention

IDS = torch.arange(3, 15)[None]
DECODERS = pytest.mark.parametrize("make", [models.qwen, models.Bailing])
HEADS = PruneHeadsConfig(component="und")
OUTPUTS = ("o_proj", "dense", "down_proj")  # what attentions and FFNs end in


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


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


def state(model: nn.Module) -> dict[str, Any]:
    """Parameters with their identities, modules, and what attentions call their numbers."""
    numbers = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int
    }
    parameters = {name: (id(p), p.tolist()) for name, p in model.named_parameters()}
    return {"modules": dict(model.named_modules()), "numbers": numbers, "parameters": parameters}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def zero(module: nn.Module) -> None:
    """Makes an attention, a FFN or a layer one that adds nothing."""
    for name, part in module.named_modules():
        if name.endswith(OUTPUTS):
            nn.init.zeros_(part.weight)


@pytest.mark.parametrize(
    ("make", "config", "text"),
    [
        (models.qwen, PruneWidthConfig(component="und"), "24 neurons -> 12 neurons"),
        (
            models.Bailing,
            PruneWidthConfig(component="und"),
            "24 neurons -> 12 neurons, 48 neurons -> 24 neurons",
        ),
        (models.qwen, HEADS, "4 query heads, 2 key heads -> 2 query heads, 1 key heads"),
        (models.qwen, SkipLayersConfig(layers=[0, 1]), "0-1 skipped"),
        (models.Bailing, SkipLayersConfig(layers=[1], part="ffn"), "ffn of 1 skipped"),
        (models.Bailing, SkipLayersConfig(layers=[1], part="attention"), "attention of 1 skipped"),
        (models.bagel, PruneWidthConfig(component="gen"), "96 neurons -> 48 neurons"),
        (
            models.bagel,
            PruneHeadsConfig(component="both"),
            "4 query heads, 2 key heads -> 2 query heads, 1 key heads",
        ),
        (models.bagel, SkipLayersConfig(layers=[1], part="attention"), "attention of 1 skipped"),
        (models.bagel, PruneWidthConfig(component="gen", keep_ratio=1), "nothing"),
    ],
)
def test_a_model_is_changed_for_as_long_as_the_block_runs(
    make: Any, config: Any, text: str
) -> None:
    model = make()
    before, whole = state(model), count(model)
    scores = None
    if config.mode == "width":
        ffns = find_adapter(model).ffns("gen" if make is models.bagel else "text")
        scores = {ffn.key: torch.rand(ffn.intermediate_size) for ffn in ffns}
    for given in (scores, None):
        with changed(model, config, given, forward=lambda: run(model)) as said:
            assert said == text
            assert (text == "nothing") == (count(model) == whole)
        assert state(model) == before
    with (
        pytest.raises(RuntimeError, match="stop"),
        changed(model, config, forward=lambda: run(model)),
    ):
        raise RuntimeError("stop")
    assert state(model) == before


@DECODERS
def test_narrower_ffns_are_those_with_the_other_neurons_at_zero(make: Any) -> None:
    model, masked = make(), make()
    ffns = find_adapter(model).ffns("text")
    scores = {ffn.key: torch.zeros(ffn.intermediate_size) for ffn in ffns}
    for ffn, same in zip(ffns, find_adapter(masked).ffns("text"), strict=True):
        scores[ffn.key][::3] = 1
        same.down_proj[:, scores[ffn.key] == 0] = 0
    dense, whole = run(model), count(model)
    of_ffns = sum(3 * ffn.intermediate_size * models.HIDDEN for ffn in ffns)
    with changed(model, PruneWidthConfig(component="und", keep_ratio=1 / 3), scores):
        torch.testing.assert_close(run(model), run(masked), rtol=0, atol=1e-6)
        assert (run(model) - dense).abs().max() > 1e-4
        assert count(model) == whole - of_ffns * 2 // 3
    assert torch.equal(run(model), dense)


@DECODERS
@pytest.mark.parametrize("part", ["block", "attention", "ffn"])
@pytest.mark.parametrize("gone", [[0], [1], [0, 2]])
def test_skipped_parts_are_not_run_and_add_nothing(make: Any, part: str, gone: list[int]) -> None:
    model = make()
    adapter = find_adapter(model)
    blocks = [adapter.block(i, "text") for i in range(models.LAYERS)]
    dense, ran = run(model), []
    for i, block in enumerate(blocks):
        modules = {
            "block": [block.layer_module],
            "attention": [block.attention, block.input_norm],
            "ffn": [block.ffn, block.post_attention_norm],
        }
        for module in modules[part]:
            module.register_forward_hook(lambda *_, i=i: ran.append(i))
    with changed(model, SkipLayersConfig(layers=gone, part=part), forward=lambda: run(model)):
        ran.clear()
        without = run(model)
        assert set(ran) == set(range(models.LAYERS)) - set(gone)
        assert next_tokens(model, cached=True) == next_tokens(model, cached=False)
        if part != "block":
            assert [adapter.holds(i, "text") for i in range(3)] == [i not in gone for i in range(3)]
        if part == "ffn":
            assert {ffn.layer for ffn in adapter.ffns("text")} == set(range(3)) - set(gone)
    assert torch.equal(run(model), dense)
    for i in gone:
        zero(getattr(blocks[i], {"block": "layer_module"}.get(part, part)))
    torch.testing.assert_close(run(model), without, rtol=0, atol=1e-6)


@DECODERS
@pytest.mark.parametrize("kept", [0, 1])
def test_dropped_heads_are_those_with_their_output_at_zero(make: Any, kept: int) -> None:
    model, masked = make(), make()
    for each in (model, masked):
        for layer in (0, 2):  # the group that matters: values count
            attention = read_attention(find_adapter(each), "text", layer)
            assert (attention.groups, attention.queries) == (2, 2)
            linear, start = attention.inputs[2]
            rows = slice(start + kept * attention.size, start + (kept + 1) * attention.size)
            linear.weight.data[rows] *= 5
            if each is masked:
                attention.output.weight.data.unflatten(1, (2, -1))[:, 1 - kept] = 0
    dense, whole = run(model), count(model)
    with changed(model, PruneHeadsConfig(component="und", layers=[0, 2])):
        torch.testing.assert_close(run(model), run(masked), rtol=0, atol=1e-6)
        assert (run(model) - dense).abs().max() > 1e-4
        assert next_tokens(model, cached=True) == next_tokens(model, cached=False)
        smaller = read_attention(find_adapter(model), "text", 0)
        assert (smaller.groups, smaller.queries) == (1, 2)
        assert count(model) < whole
    assert torch.equal(run(model), dense)


def _several_kinds(attention: Any) -> None:
    attention.sliding_window = 8


@pytest.mark.parametrize(
    ("change", "config", "match"),
    [
        (None, SkipLayersConfig(layers="all"), "a layer must be left .* got 3 to leave out"),
        (None, SkipLayersConfig(layers="all", part="attention"), "an attention must be left"),
        (_several_kinds, SkipLayersConfig(layers=[1]), "attentions of one kind, because"),
        (_several_kinds, SkipLayersConfig(layers=[1], part="attention"), "attentions of one kind"),
        (lambda a: setattr(a, "gates", nn.Linear(4, 4)), HEADS, "layer 2: .* gates"),
        (
            lambda a: setattr(a, "head_dim", 3),
            HEADS,
            "whole groups of heads .*head_dim 3",
        ),
        (lambda a: setattr(a, "q_proj", None), HEADS, r"must have .* in q_proj, k_proj"),
    ],
)
def test_what_cannot_be_done_is_refused(change: Any, config: Any, match: str) -> None:
    model = models.qwen()
    if change is not None:
        change(find_adapter(model).block(2, "text").attention)
    before = state(model)
    with pytest.raises(ValueError, match=match), changed(model, config, forward=lambda: run(model)):
        pass
    assert state(model) == before


def test_parts_that_are_not_run_are_refused() -> None:
    model, config = models.qwen(), SkipLayersConfig(layers=[1], part="ffn")
    for forward, match in ((None, "forward must be given"), (lambda: None, "must run every part")):
        with pytest.raises(ValueError, match=match), changed(model, config, forward=forward):
            pass
    assert as_module(SimpleNamespace(model=model)) is model
    with pytest.raises(TypeError, match="must be a module or hold one as `model`, got int"):
        as_module(3)
