# SPDX-License-Identifier: Apache-2.0
"""Narrower FFNs, fewer heads and skipped layers of a live model: what stays, what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prune_models import (
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    LAYERS,
    SUFFIX,
    WIDTH,
    assert_close,
    assert_equal,
    calls_counted,
    contexts,
    differs,
    layer_of,
    outputs,
    small_bagel,
)
from torch import Tensor

from sparse_unified import (
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    count_parameters,
    prune_heads_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.bagel import Bagel
from sparse_unified.bagel.vision import grid_positions
from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.keep import Budget, keep_units
from sparse_unified.experts.layout import keep_in_experts
from sparse_unified.nn import SparseMoE

COMPONENTS = pytest.mark.parametrize("component", ["gen", "und"])


# Width


def ffn_of(model: Bagel, layer: int, component: str) -> Any:
    return getattr(layer_of(model, layer), f"mlp{SUFFIX[component]}")


def projections(module: Any) -> list[Tensor]:
    parts = [getattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")]
    return parts if isinstance(module, SparseMoE) else [part.weight for part in parts]


def test_a_global_budget_goes_where_the_scores_are() -> None:
    scores = torch.rand(LAYERS, WIDTH) * torch.tensor([1.0, 100.0, 1.0, 1.0])[:, None]
    scores[2, 1:] = 0  # one neuron does everything in layer 2
    model = small_bagel()
    config = PruneWidthConfig(keep_ratio=0.5, budget="global")
    prune_width_(model, config, scores)
    widths = [len(projections(layer_of(model, i).mlp_moe_gen)[0]) for i in range(LAYERS)]
    assert sum(widths) == LAYERS * WIDTH // 2
    assert widths[2] == 1
    # The scale of a layer's scores is not its importance.
    assert max(widths[0], widths[1], widths[3]) - min(widths[0], widths[1], widths[3]) < 30
    # No layer is emptied, however alike its neurons are.
    uneven = {0: torch.tensor([9.0, 8, 1, 1]), 1: torch.ones(4)}
    kept = keep_units(uneven, keep_ratio=0.25, budget=Budget.GLOBAL, block_size=1)
    assert {layer: own.tolist() for layer, own in kept.items()} == {0: [0], 1: [0]}


def test_dtype_mode_and_requires_grad_are_kept() -> None:
    model = small_bagel(dtype=torch.bfloat16)
    layer_of(model, 1).mlp_moe_gen.up_proj.requires_grad_(False)
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="und", layers=[1]))
    block: Any = layer_of(model, 1).mlp
    block.up_proj.requires_grad_(False)
    block.strict = True
    routers = {n: p.clone() for n, p in block.named_parameters() if ".weight" in n}
    for component in ("gen", "und"):
        prune_width_(model, PruneWidthConfig(component=component, layers=[1]))
    narrow = layer_of(model, 1).mlp_moe_gen
    for module in (narrow, block):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in projections(narrow)] == [True, False, True]
    assert (block.strict, block.top_k, block.return_router_logits) == (True, 2, False)
    assert (block.gate_proj.requires_grad, block.up_proj.requires_grad) == (True, False)
    assert all(torch.equal(block.get_parameter(name), w) for name, w in routers.items())


# Width inside experts


def routed_model(experts: int = 4, shared: int = 0, component: str = "gen") -> Any:
    """A model with sparse middle layers whose routers decide."""
    model = small_bagel()
    how = MoEConfig(num_experts=experts, top_k=2, num_shared_experts=shared, component=component)
    apply_moe_(model, how)
    generator = torch.Generator().manual_seed(0)
    for i in (1, 2):
        block = ffn_of(model, i, component)
        for router in (block.gate, block.gate_shared, block.gate_img):
            if router is not None:
                router.weight.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize(
    ("component", "block_size", "experts", "shared"),
    [("gen", 1, 0, 0), ("und", 16, 0, 0), ("gen", 1, 4, 0), ("und", 1, 3, 1), ("gen", 1, 4, 2)],
)
def test_pruned_neurons_are_as_if_their_output_were_zero(
    component: str, block_size: int, experts: int, shared: int
) -> None:
    model = routed_model(experts, shared, component) if experts else small_bagel()
    zeroed, scores, before = (
        copy.deepcopy(model),
        torch.rand(LAYERS, WIDTH),
        count_parameters(model),
    )
    layers, kept = range(1, 3) if experts else range(LAYERS), {}
    rows = keep_units(
        dict(enumerate(scores)), keep_ratio=0.5, budget=Budget.UNIFORM, block_size=block_size
    )
    for i in layers:
        ffn, gone = ffn_of(zeroed, i, component), torch.ones(WIDTH, dtype=torch.bool)
        kept[i] = keep_in_experts(scores[i], ffn.layout, keep_ratio=0.5) if experts else rows[i]
        gone[kept[i]] = False
        (ffn.down_proj if experts else ffn.down_proj.weight).data[:, gone] = 0
    config = PruneWidthConfig(
        component=component, block_size=block_size, layers="middle" if experts else "all"
    )
    report = prune_width_(model, config, {component: scores})
    assert_close(outputs(model), outputs(zeroed))
    assert (report.before, report.after) == (before, count_parameters(model))
    assert report.after[component].flops_per_token < before[component].flops_per_token
    for i in layers:
        whole, left = (projections(ffn_of(own, i, component)) for own in (zeroed, model))
        for old, new, dim in zip(whole, left, (0, 0, 1), strict=True):
            assert torch.equal(new, old.index_select(dim, kept[i]))
    if experts:
        layout = ffn_of(model, 1, component).layout
        assert layout.expert_width == WIDTH // (experts + shared) // 2
        assert layout.shared_width == shared * layout.expert_width
    restore_(model)
    assert_equal(outputs(model), outputs(small_bagel()))


@pytest.mark.parametrize(
    ("ratio", "block_size", "width"),
    [(1.0, 1, 24), (0.5, 1, 12), (0.001, 1, 1), (0.3, 8, 8), (0.7, 8, 16)],
)
def test_every_expert_keeps_as_many_of_its_best(ratio: float, block_size: int, width: int) -> None:
    layout = ExpertLayout(intermediate_size=96, num_experts=4)
    scores = torch.rand(96)
    kept = keep_in_experts(scores, layout, keep_ratio=ratio, block_size=block_size)
    assert len(kept) == 4 * width
    assert torch.equal(kept, kept.sort().values)
    for e in range(4):
        start, stop = layout.expert_range(e)
        own = kept[(kept >= start) & (kept < stop)] - start
        blocks = scores[start:stop].view(-1, block_size).sum(1)
        best = blocks.argsort(descending=True)[: width // block_size].sort().values
        assert torch.equal(own.view(-1, block_size)[:, 0] // block_size, best)


def test_a_shared_expert_keeps_a_width_that_its_count_tells() -> None:
    for width, experts, shared in ((96, 3, 1), (96, 4, 2), (101, 3, 4), (100, 4, 2), (74, 2, 5)):
        layout = ExpertLayout(
            intermediate_size=width, num_experts=experts, num_shared_experts=shared
        )
        for ratio in (0.1, 0.5, 0.9, 0.97, 1.0):
            kept = keep_in_experts(torch.rand(width), layout, keep_ratio=ratio)
            by_count = ExpertLayout(
                intermediate_size=len(kept), num_experts=experts, num_shared_experts=shared
            )
            assert by_count.shared_width == (kept < layout.shared_width).sum()
    odd = ExpertLayout(
        intermediate_size=50, num_experts=4, num_shared_experts=1, shared_intermediate_size=30
    )
    kept = keep_in_experts(torch.rand(50), odd, keep_ratio=0.6)
    assert ((kept < 30).sum(), len(kept)) == (18, 18 + 4 * 3)


# Heads


PER_GROUP = HEADS // KEY_HEADS * HEAD_DIM


def zero_heads(model: Bagel, component: str, kept: dict[int, list[int]]) -> None:
    """Zeroes the output columns of all groups but the kept ones."""
    for i, groups in kept.items():
        weight = getattr(layer_of(model, i).self_attn, f"o_proj{SUFFIX[component]}").weight
        with torch.no_grad():
            for group in set(range(KEY_HEADS)) - set(groups):
                weight[:, group * PER_GROUP : (group + 1) * PER_GROUP] = 0


def scores_for(kept: dict[int, list[int]]) -> dict[int, Tensor]:
    """Scores that keep exactly these groups."""
    return {
        i: torch.tensor([float(group in groups) for group in range(KEY_HEADS)])
        for i, groups in kept.items()
    }


UND = {0: [0, 2], 1: [2, 3], 2: [0, 1], 3: [1, 3]}
GEN = {0: [0, 2], 1: [0, 1], 2: [1, 3], 3: [0, 1]}


@pytest.mark.parametrize(
    ("und", "gen", "steps"),
    [(UND, None, ["und"]), (None, GEN, ["gen"]), (UND, GEN, ["und", "gen"]), (UND, UND, ["both"])],
)
def test_pruned_heads_are_as_if_their_output_were_zero(und: Any, gen: Any, steps: Any) -> None:
    model, zeroed = small_bagel(), small_bagel()
    kept = {name: own for name, own in (("und", und), ("gen", gen)) if own is not None}
    for component, own in kept.items():
        zero_heads(zeroed, component, own)
    for component in steps:
        config = PruneHeadsConfig(component=component, keep_ratio=0.5)
        report = prune_heads_(model, config, {name: scores_for(own) for name, own in kept.items()})
    assert differs(outputs(model), outputs(small_bagel()))
    assert_close(outputs(model), outputs(zeroed))
    for i in range(LAYERS):
        attention = layer_of(model, i).self_attn
        seen = set(und[i] if und else range(KEY_HEADS)) | set(gen[i] if gen else range(KEY_HEADS))
        for component, suffix in SUFFIX.items():
            groups = len(kept[component][i]) if component in kept else KEY_HEADS
            assert getattr(attention, f"q_proj{suffix}").out_features == groups * PER_GROUP
            assert getattr(attention, f"o_proj{suffix}").in_features == groups * PER_GROUP
            assert getattr(attention, f"k_proj{suffix}").out_features == len(seen) * HEAD_DIM
            assert getattr(attention, f"v_proj{suffix}").out_features == len(seen) * HEAD_DIM
    if steps == ["both"]:  # heads that nothing reads leave the cache
        keys = [key for context in contexts(model) for key in context.keys if key is not None]
        assert {key.shape[0] for key in keys} == {KEY_HEADS // 2}
        before, after = report.before["und"], report.after["und"]
        assert after.kv_bytes_per_token * 2 == before.kv_bytes_per_token
        assert after.flops_per_pair * 2 == before.flops_per_pair


def test_heads_are_pruned_again_of_what_is_left() -> None:
    model, zeroed = small_bagel(), small_bagel()
    zero_heads(zeroed, "und", {0: [2]})
    zero_heads(zeroed, "gen", {0: [1]})
    for component, first, second in (("und", [0, 0, 1, 1], [1, 0]), ("gen", [0, 1, 1, 0], [1, 0])):
        config = PruneHeadsConfig(component=component, layers=[0], keep_ratio=0.5)
        for values in (first, second):
            prune_heads_(model, config, {0: torch.tensor(values, dtype=torch.float32)})
    assert layer_of(model, 0).self_attn.k_proj.out_features == 2 * HEAD_DIM
    assert_close(outputs(model), outputs(zeroed))


def test_heads_of_one_component_in_a_layer_that_the_other_skips() -> None:
    model, zeroed = small_bagel(), small_bagel()
    skip = SkipLayersConfig(component="und", layers=[1], part="attention")
    skip_layers_(model, skip)
    skip_layers_(zeroed, skip)
    zero_heads(zeroed, "gen", {1: [1, 3]})
    config = PruneHeadsConfig(component="gen", layers=[1], keep_ratio=0.5)
    prune_heads_(model, config, scores_for({1: [1, 3]}))
    assert layer_of(model, 1).self_attn.k_proj_moe_gen.out_features == 2 * HEAD_DIM
    assert_close(outputs(model), outputs(zeroed))


def test_heads_are_ranked_by_the_weights_of_values_and_output() -> None:
    model, zeroed = small_bagel(), small_bagel()
    with torch.no_grad():
        for each in (model, zeroed):
            for i in range(LAYERS):
                attention = layer_of(each, i).self_attn
                attention.v_proj_moe_gen.weight[2 * HEAD_DIM : 3 * HEAD_DIM] *= 9
                attention.o_proj_moe_gen.weight[:, :PER_GROUP] *= 9
                attention.k_proj_moe_gen.weight[HEAD_DIM : 2 * HEAD_DIM] *= 99
    zero_heads(zeroed, "gen", {i: [0, 2] for i in range(LAYERS)})
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.5))
    assert_close(outputs(model), outputs(zeroed))


# Depth


@pytest.mark.parametrize(
    ("component", "part"), [("und", "block"), ("gen", "attention"), ("gen", "ffn")]
)
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
    "skipped", [{}, {"gen": {0, 3}}, {"und": {1, 2}, "gen": {2}}, {"und": {0, 1, 2, 3}}]
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
