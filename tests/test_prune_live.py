# SPDX-License-Identifier: Apache-2.0
"""Pruned widths, heads and skipped layers of a live model: what runs, what is computed, undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prune_models import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
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
from swap_models import Model, TensorMLP, TupleMLP, assert_same, ffn, snapshot, tokens
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
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.partition import Budget, keep_units, magnitude_scores

COMPONENTS = pytest.mark.parametrize("component", ["gen", "und"])
SUFFIX = {"und": "", "gen": "_moe_gen"}
PER_GROUP = HEADS // KEY_HEADS * HEAD_DIM


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def projections(module: Any) -> list[Tensor]:
    return [getattr(module, name).weight for name in ("gate_proj", "up_proj", "down_proj")]


# Width


@COMPONENTS
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_pruned_neurons_are_as_if_their_output_were_zero(component: str, block_size: int) -> None:
    model = small_bagel()
    scores = torch.rand(LAYERS, WIDTH)
    config = PruneWidthConfig(component=component, keep_ratio=0.6, block_size=block_size)
    zeroed = copy.deepcopy(model)
    kept = keep_units(
        dict(enumerate(scores)), keep_ratio=0.6, budget=Budget.UNIFORM, block_size=block_size
    )
    for i in range(LAYERS):
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[kept[i]] = False
        with torch.no_grad():
            getattr(layer_of(zeroed, i), f"mlp{SUFFIX[component]}").down_proj.weight[:, gone] = 0
    prune_width_(model, config, {component: scores})
    assert_close(outputs(model), outputs(zeroed))


def test_weights_are_physically_shorter_and_keep_their_order_bit_for_bit() -> None:
    model = small_bagel()
    dense = projections(layer_of(model, 1).mlp_moe_gen)
    order = magnitude_scores(*dense).argsort(descending=True)[:48].sort().values
    prune_width_(model, PruneWidthConfig(layers=[1]))
    gate_proj, up_proj, down_proj = projections(layer_of(model, 1).mlp_moe_gen)
    assert torch.equal(gate_proj, dense[0][order])
    assert torch.equal(up_proj, dense[1][order])
    assert torch.equal(down_proj, dense[2][:, order])
    assert down_proj.is_contiguous()
    assert layer_of(model, 0).mlp_moe_gen.gate_proj.weight.shape == (WIDTH, HIDDEN)


@pytest.mark.parametrize(
    ("ratio", "block_size", "kept"),
    [(1.0, 1, 96), (0.5, 1, 48), (0.001, 1, 1), (0.001, 16, 16), (0.6, 32, 64), (0.75, 48, 96)],
)
def test_kept_widths_are_rounded_to_blocks(ratio: float, block_size: int, kept: int) -> None:
    model = small_bagel()
    prune_width_(model, PruneWidthConfig(keep_ratio=ratio, block_size=block_size))
    widths = {len(projections(layer_of(model, i).mlp_moe_gen)[0]) for i in range(LAYERS)}
    assert widths == {kept}


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


def test_no_layer_is_emptied_by_a_global_budget() -> None:
    scores = {0: torch.rand(32), 1: torch.full((32,), -5.0)}
    kept = keep_units(scores, keep_ratio=0.01, budget=Budget.GLOBAL)
    assert [len(index) for index in kept.values()] == [1, 1]


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
@COMPONENTS
def test_models_of_another_make_keep_their_return_convention(mlp: Any, component: str) -> None:
    model = Model(mlp)
    before = model(tokens(), tokens())
    prune_width_(model, PruneWidthConfig(component=component, keep_ratio=0.5))
    after = model(tokens(), tokens())
    changed = component == "gen"
    assert torch.equal(before[not changed], after[not changed])
    assert not torch.allclose(before[changed], after[changed])
    assert isinstance(ffn(model, 0, component)(tokens()), tuple) == (mlp is TupleMLP)


def test_dtype_mode_and_requires_grad_are_kept() -> None:
    model = small_bagel(dtype=torch.bfloat16)
    layer_of(model, 1).mlp_moe_gen.up_proj.requires_grad_(False)
    prune_width_(model, PruneWidthConfig(layers=[1]))
    narrow = layer_of(model, 1).mlp_moe_gen
    assert type(narrow) is SwiGLU
    assert not narrow.training
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in projections(narrow)] == [True, False, True]


# Depth


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
    gen = model._embed(image, (2, len(image) // 2), torch.tensor([0.7]))
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
    with pytest.raises(ValueError, match=r"prune_heads_: layer 0 .*must be a module of the layer"):
        prune_heads_(model, PruneHeadsConfig())
    assert_same(before, snapshot(model))


# Heads


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
    ("und", "gen"), [(UND, None), (None, GEN), (UND, GEN)], ids=["und", "gen", "both"]
)
def test_pruned_heads_are_as_if_their_output_were_zero(und: Any, gen: Any) -> None:
    model, zeroed = small_bagel(), small_bagel()
    for component, kept in (("und", und), ("gen", gen)):
        if kept is not None:
            zero_heads(zeroed, component, kept)
            config = PruneHeadsConfig(component=component, keep_ratio=0.5)
            prune_heads_(model, config, {component: scores_for(kept)})
    assert differs(outputs(model), outputs(small_bagel()))
    assert_close(outputs(model), outputs(zeroed))
    for i in range(LAYERS):
        attention = layer_of(model, i).self_attn
        seen = set(und[i] if und else range(KEY_HEADS)) | set(gen[i] if gen else range(KEY_HEADS))
        for suffix, kept in (("", und), ("_moe_gen", gen)):
            groups = KEY_HEADS if kept is None else len(kept[i])
            assert getattr(attention, f"q_proj{suffix}").out_features == groups * PER_GROUP
            assert getattr(attention, f"o_proj{suffix}").in_features == groups * PER_GROUP
            assert getattr(attention, f"k_proj{suffix}").out_features == len(seen) * HEAD_DIM
            assert getattr(attention, f"v_proj{suffix}").out_features == len(seen) * HEAD_DIM


def test_heads_that_nobody_reads_leave_the_cache() -> None:
    model = small_bagel()
    report = prune_heads_(model, PruneHeadsConfig(component="both", keep_ratio=0.5))
    keys = [key for context in contexts(model) for key in context.keys if key is not None]
    assert {key.shape[0] for key in keys} == {KEY_HEADS // 2}
    assert report.after.kv_bytes_per_token * 2 == report.before.kv_bytes_per_token
    assert report.after.flops_per_pair * 2 == report.before.flops_per_pair


def test_both_components_lose_the_same_heads() -> None:
    model, zeroed = small_bagel(), small_bagel()
    for component in ("und", "gen"):
        zero_heads(zeroed, component, UND)
    scores = {"und": scores_for(UND), "gen": scores_for(UND)}
    prune_heads_(model, PruneHeadsConfig(component="both", keep_ratio=0.5), scores)
    assert_close(outputs(model), outputs(zeroed))


def test_heads_are_pruned_again_of_what_is_left() -> None:
    model, zeroed = small_bagel(), small_bagel()
    zero_heads(zeroed, "und", {0: [2]})
    zero_heads(zeroed, "gen", {0: [1]})
    for component, first, second in (
        ("und", [0, 0, 1, 1], [1, 0]),
        ("gen", [0, 1, 1, 0], [1, 0]),
    ):
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


# Together, and back


def everything(model: Bagel) -> None:
    prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5, block_size=16))
    prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=2 / 3, block_size=16))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="gen"))
    prune_heads_(model, PruneHeadsConfig(component="und", keep_ratio=0.5))
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.75))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2], part="ffn"))
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1, 3]))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[3]))


def test_width_then_experts_then_heads_then_depth_compose_and_are_undone_exactly() -> None:
    model = small_bagel()
    layer_of(model, 1).mlp.train()
    before, dense = snapshot(model), outputs(model)
    everything(model)
    assert isinstance(layer_of(model, 1).mlp_moe_gen, SparseMoE)
    assert layer_of(model, 1).mlp_moe_gen.layout.expert_width == 16
    pruned = outputs(model)
    assert all(torch.isfinite(x).all() for x in pruned)
    report = restore_(model)
    assert_same(before, snapshot(model))
    assert_equal(dense, outputs(model))
    assert [entry.layer for entry in report.layers] == [1, 2]
    assert len(report.parts) > 20
    assert "restore_: 2 FFNs changed" in report.to_text()
    assert "restore_: " + str(len(report.parts)) in report.to_text()
    with pytest.raises(ValueError, match="or parts pruned, got none among the 4 layers"):
        restore_(model)


def test_only_the_latest_transform_is_undone_when_asked() -> None:
    model = small_bagel()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2))
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.5))
    before, wanted = snapshot(model), outputs(model)
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[1]))
    prune_width_(model, PruneWidthConfig(component="und"))
    assert {part.part for part in restore_(model, latest=True).parts} == {"ffn"}
    restore_(model, latest=True)
    assert_same(before, snapshot(model))
    assert_equal(wanted, outputs(model))
    assert not restore_(model, latest=True).layers
    assert isinstance(layer_of(model, 1).mlp_moe_gen, SparseMoE)
    assert len(restore_(model, latest=True).layers) == 2


def test_a_copy_of_a_pruned_model_is_restored_on_its_own() -> None:
    model = small_bagel()
    dense = outputs(model)
    everything(model)
    twin = copy.deepcopy(model)
    restore_(twin)
    assert_equal(dense, outputs(twin))
    assert layer_of(model, 1).self_attn.q_proj is None
    restore_(model)
    assert_equal(dense, outputs(model))


def test_what_was_taken_out_follows_dtype_and_mode_of_the_model() -> None:
    model = small_bagel()
    layer_of(model, 1).input_layernorm.double()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    restore_(model)
    assert layer_of(model, 1).input_layernorm.weight.dtype == torch.float64
    prune_width_(model, PruneWidthConfig(component="und"))
    model.bfloat16()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    model.train()
    restore_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert "absent" not in " ".join(name for name, _ in model.named_buffers())


def test_the_state_dict_of_a_skipped_layer_has_no_keys_of_it() -> None:
    model = small_bagel()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    left = [key for key in model.state_dict() if "language_model.model.layers.1." in key]
    assert left
    assert all("_moe_gen" in key for key in left)


def test_without_kept_modules_there_is_no_way_back() -> None:
    model = small_bagel()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]), keep_dense=False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"restore_: layer 1 .*must have been kept"):
        restore_(model)
    assert_same(before, snapshot(model))


def test_hooks_of_what_is_skipped_come_back() -> None:
    model = small_bagel()
    fired: list[int] = []
    layer_of(model, 1).mlp.register_forward_hook(lambda *_: fired.append(1))
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    outputs(model)
    assert not fired
    restore_(model)
    outputs(model)
    assert fired


@pytest.mark.parametrize("name", ["count_component", "put_in"])
def test_an_interrupted_pruning_leaves_the_model_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_unified.swap import depth, heads, width

    model = small_bagel()
    before, wanted = snapshot(model), outputs(model)
    for module, run in (
        (width, lambda: prune_width_(model, PruneWidthConfig())),
        (depth, lambda: skip_layers_(model, SkipLayersConfig(layers=[1]))),
        (heads, lambda: prune_heads_(model, PruneHeadsConfig(component="both"))),
    ):
        function, calls = getattr(module, name), []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)  # noqa: B023
            if len(calls) == (3 if module is heads and name == "count_component" else 2):  # noqa: B023
                raise KeyboardInterrupt
            return function(*args, **kwargs)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run()
        assert_same(before, snapshot(model))
        assert_equal(wanted, outputs(model))


# Numbers


def test_reports_count_what_is_there() -> None:
    model = small_bagel()
    whole = count_parameters(model)
    decoder = model.language_model.model.layers
    assert sum(c.parameters for c in whole.values()) == sum(p.numel() for p in decoder.parameters())
    assert whole["gen"].bytes == 4 * whole["gen"].parameters
    matrices = sum(
        p.numel() for n, p in decoder.named_parameters() if "moe_gen" in n and p.ndim > 1
    )
    assert whole["gen"].flops_per_token == 2 * matrices
    assert whole["gen"].flops_per_pair == LAYERS * 4 * HEADS * HEAD_DIM
    assert whole["und"].kv_bytes_per_token == LAYERS * 2 * KEY_HEADS * HEAD_DIM * 4

    report = prune_width_(model, PruneWidthConfig(component="gen", layers=[1, 2]))
    assert report.before == whole["gen"]
    assert report.after == count_parameters(model)["gen"]
    lost = 2 * 3 * HIDDEN * WIDTH // 2
    assert report.before.parameters - report.after.parameters == lost
    assert report.before.flops_per_token - report.after.flops_per_token == 2 * lost
    part = report.parts[0]
    assert (part.before, part.after) == ("96 neurons", "48 neurons")
    assert (part.layer, part.component, part.part) == (1, "gen", "ffn")
    text = str(report)
    assert text.startswith("prune_width_: 2 parts changed (gen ffn 1-2)")
    assert "FLOPs per token" in text
    assert report.to_dict()["after"]["parameters"] == report.after.parameters

    report = skip_layers_(model, SkipLayersConfig(component="und", layers="all"))
    assert report.after.parameters == report.after.bytes == report.after.flops_per_token == 0
    assert {part.after for part in report.parts} == {"skipped"}
    assert len(report.parts) == 2 * LAYERS


def test_idle_experts_cost_no_arithmetic() -> None:
    model = small_bagel()
    dense = count_parameters(model)["gen"]
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="all"))
    sparse = count_parameters(model)["gen"]
    routers = LAYERS * HIDDEN * 5
    assert sparse.parameters == dense.parameters + routers
    idle = LAYERS * 3 * HIDDEN * WIDTH // 2
    assert sparse.flops_per_token == dense.flops_per_token - 2 * idle + 2 * routers


# Bad input


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (PruneWidthConfig, {"keep_ratio": 0}, "keep_ratio must be above 0 and at most 1, got 0"),
        (PruneWidthConfig, {"keep_ratio": 1.01}, "keep_ratio must be above 0 and at most 1"),
        (PruneWidthConfig, {"keep_ratio": float("nan")}, "keep_ratio must be .* got nan"),
        (PruneWidthConfig, {"keep_ratio": True}, "keep_ratio must be .* got True"),
        (PruneWidthConfig, {"keep_ratio": "half"}, "keep_ratio must be .* got 'half'"),
        (PruneWidthConfig, {"component": "vit"}, "component must be one of und, gen, got 'vit'"),
        (PruneWidthConfig, {"component": "both"}, "component must be one of und, gen, got 'both'"),
        (PruneWidthConfig, {"block_size": 8}, "block_size must be 1 or 16 to 128, got 8"),
        (PruneWidthConfig, {"block_size": 129}, "block_size must be 1 or 16 to 128, got 129"),
        (PruneWidthConfig, {"block_size": 16.0}, "block_size must be 1 or 16 to 128"),
        (PruneWidthConfig, {"budget": "all"}, "budget must be one of 'uniform', 'global', got"),
        (PruneWidthConfig, {"layers": "3-1"}, "layers must ascend"),
        (PruneHeadsConfig, {"keep_ratio": -0.5}, "keep_ratio must be above 0"),
        (PruneHeadsConfig, {"component": "all"}, "component must be one of und, gen, both"),
        (SkipLayersConfig, {"layers": []}, "layers must name at least one"),
        (SkipLayersConfig, {"layers": [1], "part": "mlp"}, "part must be one of 'block', 'att"),
        (SkipLayersConfig, {"layers": [1], "component": "both"}, "component must be one of und"),
    ],
)
def test_configs_are_checked_when_they_are_made(kind: Any, fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{match}|{match}"):
        kind(**fields)


def some(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def _nan(*shape: int) -> Tensor:
    scores = some(*shape)
    scores[-1, 1] = float("nan")
    return scores


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m: prune_width_(m, PruneWidthConfig(layers=[0, 4])), "layers must lie in 0 to 3"),
        (lambda m: prune_heads_(m, PruneHeadsConfig(layers="2-9")), "layers must lie in 0 to 3"),
        (lambda m: skip_layers_(m, SkipLayersConfig(layers="9")), "layers must lie in 0 to 3"),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), some(LAYERS, 95)),
            r"prune_width_: layer 0 .*scores must have shape \[96\], got \[95\]",
        ),
        (lambda m: prune_width_(m, PruneWidthConfig(), _nan(LAYERS, WIDTH)), "layer 3 .*finite"),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), {"und": some(LAYERS, WIDTH)}),
            "prune_width_: scores must hold component gen, got und",
        ),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), {"gen": {0: some(WIDTH)}}),
            "scores must be given for the selected layers, 0, 1, 2, 3, got none for 1, 2, 3",
        ),
        (
            lambda m: prune_width_(m, PruneWidthConfig(block_size=36)),
            "layer 0 .*block_size must divide the 96 neurons, got 36",
        ),
        (
            lambda m: prune_heads_(m, PruneHeadsConfig(), some(LAYERS, 5)),
            r"prune_heads_: layer 0 .*scores must have shape \[4\], got \[5\]",
        ),
        (lambda m: prune_heads_(m, PruneHeadsConfig(), _nan(LAYERS, 4)), "layer 3 .*finite"),
    ],
)
def test_bad_input_leaves_the_model_alone(run: Any, match: str) -> None:
    model = small_bagel()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        run(model)
    assert_same(before, snapshot(model))


def test_configs_of_another_type_are_refused() -> None:
    for run in (prune_width_, prune_heads_, skip_layers_):
        with pytest.raises(TypeError, match=f"{run.__name__}: config must be a"):
            run(small_bagel(), MoEConfig())


def test_orders_that_make_no_sense_are_refused_by_name() -> None:
    model = small_bagel()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[1]))
    with pytest.raises(ValueError, match=r"layer 1 .*FFN must be dense, got a SparseMoE"):
        prune_width_(model, PruneWidthConfig(layers=[1]))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))
    with pytest.raises(ValueError, match=r"layer 2 .*mlp_moe_gen.* must be a module of the layer"):
        prune_width_(model, PruneWidthConfig(layers=[2]))
    with pytest.raises(ValueError, match=r"apply_moe_: layer 2 .*must be a module of the layer"):
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[2]))
    with pytest.raises(ValueError, match=r"layer 2 .*gen block must not be skipped already"):
        skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))
    with pytest.raises(ValueError, match=r"layer 2 .*q_proj_moe_gen must be a module"):
        prune_heads_(model, PruneHeadsConfig(component="gen", layers=[2]))
    with pytest.raises(ValueError, match="q_proj_moe_gen must be a module"):
        prune_heads_(model, PruneHeadsConfig(component="both", layers=[2]))
    assert len(prune_heads_(model, PruneHeadsConfig(component="both")).parts) == 2 * 3
    with pytest.raises(ValueError, match="layers must have a gen block left, got '2', which"):
        skip_layers_(model, SkipLayersConfig(component="gen", layers="2"))
