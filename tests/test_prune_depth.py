# SPDX-License-Identifier: Apache-2.0
"""Skipped layers of a live model: what does not run, and who sees whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prune_models import (
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    SUFFIX,
    assert_close,
    calls_counted,
    contexts,
    layer_of,
    outputs,
    small_bagel,
)
from swap_models import Model, TensorMLP, TupleMLP, assert_same, ffn, snapshot, tokens
from torch import Tensor

from sparse_unified import (
    PruneHeadsConfig,
    SkipLayersConfig,
    prune_heads_,
    restore_,
    skip_layers_,
)
from sparse_unified.bagel import Bagel
from sparse_unified.bagel.vision import grid_positions

COMPONENTS = pytest.mark.parametrize("component", ["gen", "und"])


@COMPONENTS
@pytest.mark.parametrize("part", ["block", "attention", "ffn"])
def test_what_is_skipped_does_not_run_and_the_rest_does(component: str, part: str) -> None:
    model = small_bagel()
    with calls_counted(model) as whole:
        outputs(model)
    skip_layers_(model, SkipLayersConfig(component=component, layers=[1], part=part))
    with calls_counted(model) as left:
        outputs(model)
    suffix = SUFFIX[component]
    attention = {f"self_attn.{n}_proj{suffix}" for n in "qkvo"} | {
        f"self_attn.{n}_norm{suffix}" for n in "qk"
    }
    attention.add(f"input_layernorm{suffix}")
    of_ffn = {f"post_attention_layernorm{suffix}", f"mlp{suffix}"}
    of_ffn |= {f"mlp{suffix}.{name}_proj" for name in ("gate", "up", "down")}
    gone = {"block": attention | of_ffn, "attention": attention, "ffn": of_ffn}[part]
    gone = {f"1.{name}" for name in gone}
    assert gone <= set(whole)
    assert set(whole) - set(left) == gone
    assert all(left[name] == count for name, count in whole.items() if name not in gone)


@COMPONENTS
def test_a_skipped_ffn_is_one_whose_output_is_zero(component: str) -> None:
    model, zeroed = small_bagel(), small_bagel()
    skip_layers_(model, SkipLayersConfig(component=component, layers="1-2", part="ffn"))
    for i in (1, 2):
        torch.nn.init.zeros_(
            getattr(layer_of(zeroed, i), f"mlp{SUFFIX[component]}").down_proj.weight
        )
    assert_close(outputs(model), outputs(zeroed))


def written_out(model: Bagel, texts: list[int], image: Tensor, skipped: dict[str, set[int]]) -> Any:
    """Computes text, then an image, layer by layer with plain matrices and without a cache.

    Returns the logits of the text and the velocity of the image. `skipped` has the layers whose
    attention each component skips.
    """
    llm, decoder = model.config.llm, model.language_model.model
    special = model.config.special_tokens
    ids = torch.tensor([special.bos, *texts, special.eos])
    marks = torch.tensor([special.start_of_image, special.end_of_image])
    num_text = len(ids)
    und = decoder.embed_tokens(torch.cat([ids, marks]))
    places = grid_positions(2, len(image) // 2, model.config.max_latent_size)
    gen = model.embed_latent(image, places, torch.tensor([0.7]))
    positions = torch.tensor([*range(num_text), *[num_text] * (2 + len(image))])
    num_und = len(und)
    length = num_und + len(image)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen[:num_text] = False
    seen[:num_text, :num_text] = torch.ones(num_text, num_text).tril().bool()
    frequency = llm.rope_theta ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = positions[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]

    def turned(x: Tensor) -> Tensor:
        half = HEAD_DIM // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def norm(weight: Tensor, x: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + llm.rms_norm_eps)

    for i, layer in enumerate(decoder.layers):
        rows = {"und": slice(0, num_und), "gen": slice(num_und, length)}
        q, k, v = (torch.zeros(length, heads, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        asks = torch.zeros(length, dtype=torch.bool)
        for component, x in (("und", und), ("gen", gen)):
            if i in skipped.get(component, ()):
                continue
            suffix, own, at = SUFFIX[component], rows[component], layer.self_attn
            x = norm(getattr(layer, f"input_layernorm{suffix}").weight, x)
            for name, target in (("q", q), ("k", k), ("v", v)):
                linear = getattr(at, f"{name}_proj{suffix}")
                out = F.linear(x, linear.weight, linear.bias).unflatten(-1, (-1, HEAD_DIM))
                if name != "v":
                    out = norm(getattr(at, f"{name}_norm{suffix}").weight, out)
                target[own] = out
            asks[own] = True
        k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (turned(k), v))
        scores = torch.einsum("lhd,shd->hls", turned(q), k) / HEAD_DIM**0.5
        scores = scores.masked_fill(~(seen & asks), float("-inf"))
        mixed = torch.einsum("hls,shd->lhd", scores.softmax(-1), v).flatten(1)
        new = []
        for component, x in (("und", und), ("gen", gen)):
            suffix = SUFFIX[component]
            if i not in skipped.get(component, ()):
                x = x + getattr(layer.self_attn, f"o_proj{suffix}")(mixed[rows[component]])
            hidden = norm(getattr(layer, f"post_attention_layernorm{suffix}").weight, x)
            new.append(x + getattr(layer, f"mlp{suffix}")(hidden))
        und, gen = new
    logits = model.language_model.lm_head(norm(decoder.norm.weight, und[:num_text]))
    return logits, model.llm2vae(norm(decoder.norm_moe_gen.weight, gen))


@pytest.mark.parametrize(
    "skipped",
    [{}, {"und": {1}}, {"gen": {0, 3}}, {"und": {1, 2}, "gen": {2}}, {"und": {0, 1, 2, 3}}],
)
@torch.no_grad()
def test_tokens_that_skip_an_attention_neither_ask_nor_are_seen(
    skipped: dict[str, set[int]],
) -> None:
    model = small_bagel()
    image = torch.randn(6, 16)
    expected_logits, expected = written_out(model, [21, 42, 38], image, skipped)
    for component, layers in skipped.items():
        config = SkipLayersConfig(component=component, layers=sorted(layers), part="attention")
        skip_layers_(model, config)
    context = model.new_contexts(1)
    special = model.config.special_tokens
    for i, token in enumerate((special.bos, 21, 42, 38, special.eos)):
        logits = model.next_logits(context, [token])
        torch.testing.assert_close(logits[0], expected_logits[i], rtol=1e-4, atol=1e-4)
    velocity = model.velocity([image], [(2, 3)], torch.tensor([0.7]), [context])[0][0]
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)


def test_contexts_hold_the_keys_of_tokens_that_are_seen_and_positions_stay() -> None:
    model = small_bagel()
    whole = contexts(model)
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2], part="attention"))
    made = contexts(model)
    for old, new in zip(whole, made, strict=True):
        assert (old.length, old.position) == (new.length, new.position)
    first, second = made[0], made[2]
    lengths = [0 if key is None else key.shape[1] for key in first.keys]
    # 4 latent tokens and 2 markers, 6 patches and 2 markers, 3 ids with bos and eos.
    assert first.length == 6 + 8 + 5
    assert lengths == [19, 4, 15, 19]
    assert second.keys[1] is None
    assert second.keys[2] is not None
    assert second.keys[2].shape[1] == 3


def test_packed_contexts_equal_contexts_alone_when_layers_are_skipped() -> None:
    model = small_bagel()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1, 2]))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[3]))
    packed = model.new_contexts(2)
    model.prefill_text(packed, [[21, 42, 38], [33]])
    images = [torch.randn(6, 16), torch.randn(4, 16)]
    time = torch.tensor([0.3])
    together = model.velocity(images, [(2, 3), (2, 2)], time, [packed[:1], packed[1:]])
    for i, ids in enumerate(([21, 42, 38], [33])):
        single = model.new_contexts(1)
        model.prefill_text(single, [ids])
        grid = [[(2, 3)], [(2, 2)]][i]
        alone = model.velocity(images[i : i + 1], grid, time, [single])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
def test_ffns_of_models_of_another_make_are_skipped(mlp: Any) -> None:
    model = Model(mlp)
    before = snapshot(model)
    und, gen = model(tokens(), tokens())
    counted = []
    for i in (1, 2):
        ffn(model, i).register_forward_pre_hook(lambda *_: counted.append(1))
        ffn(model, i).gate_proj.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[1, 2], part="ffn"))
    skipped_und, skipped_gen = model(tokens(), tokens())
    assert torch.equal(und, skipped_und)
    expected = tokens()
    for i in (0, 3):
        out = ffn(model, i)(expected)
        expected = expected + (out[0] if isinstance(out, tuple) else out)
    assert torch.equal(skipped_gen, expected)
    assert not torch.equal(skipped_gen, gen)
    restore_(model)
    assert before["modules"] == dict(model.named_modules(remove_duplicate=False))


def test_attention_of_models_of_another_make_is_refused() -> None:
    model = Model()
    before = snapshot(model)
    for part in ("attention", "block"):
        with pytest.raises(ValueError, match=r"skip_layers_: layer 1 .*attention must be one that"):
            skip_layers_(model, SkipLayersConfig(layers=[1], part=part))
    with pytest.raises(ValueError, match=r"prune_heads_: layer 0 .*weights tell its heads, as in"):
        prune_heads_(model, PruneHeadsConfig())
    assert_same(before, snapshot(model))
