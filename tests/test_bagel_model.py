# SPDX-License-Identifier: Apache-2.0
"""The model: packing sequences together changes nothing, streams and dtypes behave."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from bagel_models import EXPERTS, draw, random_model
from moe_cases import GOLDEN, relative_error
from refusals import refused
from torch import Tensor

from sparse_unified.bagel import Bagel
from sparse_unified.bagel.attention import KVCache, RMSNorm
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.model import sincos_table
from sparse_unified.bagel.pipeline import generate_tokens
from sparse_unified.bagel.vision import patchify, unpatchify
from sparse_unified.testing import build_model, read_case


@pytest.fixture(scope="module")
def model() -> Bagel:
    return build_model(read_case(GOLDEN / "understand"))


def test_sincos_table_is_the_one_in_the_checkpoint(model: Bagel) -> None:
    table = sincos_table(8, 32)
    torch.testing.assert_close(table, model.latent_pos_embed.pos_embed.data)


def test_patches_go_back_to_the_image() -> None:
    image = torch.randn(3, 28, 42)
    patches = patchify(image, 14)
    assert torch.equal(patches[4].view(14, 14, 3), image[:, 14:28, 14:28].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 2, 3, 14), image)


def test_norm_of_low_precision_is_taken_in_full() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # the sum of squares overflows fp16
    norm = RMSNorm(64, 1e-6, dtype=torch.float16)
    assert torch.allclose(norm(x).float(), torch.ones(64), atol=1e-3)


def test_contexts_read_together_or_in_pieces_are_those_read_alone(model: Bagel) -> None:
    """In double precision: what differs is the order of sums, which depends on the processor."""
    exact, special = copy.deepcopy(model).double(), model.config.special_tokens
    texts = [[21, 42, 38], [33], [40, 41, 42, 43, 44]]
    images = [torch.randn(3, 28, 14), torch.randn(3, 14, 56), torch.randn(3, 42, 42)]
    latents = [torch.randn(4, 2, 4), torch.randn(4, 4, 4), torch.randn(4, 6, 2)]

    def read(own: slice, *, in_pieces: bool = False) -> list[KVCache]:
        contexts = exact.new_contexts(len(texts[own]))
        exact.prefill_latents(contexts, latents[own])
        exact.prefill_vit(contexts, images[own])
        for token in (special.bos, *texts[own][0], special.eos) if in_pieces else ():
            exact.next_logits(contexts, [token])
        if not in_pieces:
            exact.prefill_text(contexts, texts[own])
        return contexts

    for i, mine in enumerate(read(slice(None))):
        for in_pieces in (False, True):
            [other] = read(slice(i, i + 1), in_pieces=in_pieces)
            assert (mine.length, mine.position) == (other.length, other.position)
            for pair in zip(mine.keys + mine.values, other.keys + other.values, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_an_image_takes_one_position_and_forks_share_the_past(model: Bagel) -> None:
    (context,) = model.new_contexts(1)
    model.prefill_vit([context], [torch.randn(3, 28, 42)])
    assert (context.length, context.position) == (8, 1)
    fork = context.fork()
    assert fork.same_past(context)
    model.prefill_text([fork], [[21, 42]])
    assert not fork.same_past(context)
    assert (fork.length, fork.position) == (12, 5)
    assert (context.length, context.position) == (8, 1)


def test_vit_tokens_of_sparse_und_layers_use_their_own_router(model: Bagel) -> None:
    llm = model.config.llm.with_experts("und", [1], **EXPERTS)
    sparse = random_model(replace(model.config, llm=llm))
    image = torch.randn(3, 28, 28)

    def keys(read: Any, what: Any) -> Tensor:
        (context,) = sparse.new_contexts(1)
        read([context], [what])
        key = context.keys[2]
        assert key is not None
        return key

    before, text = keys(sparse.prefill_vit, image), keys(sparse.prefill_text, [21, 42])
    router = sparse.language_model.model.layers[1].mlp.gate_img
    with torch.no_grad():
        router.weight.copy_(-router.weight)
    after = keys(sparse.prefill_vit, image)
    markers = [0, -1]
    assert relative_error(after[:, markers], before[:, markers]) < 1e-5
    assert relative_error(after[:, 1:-1], before[:, 1:-1]) > 1e-2
    with torch.no_grad():
        router.weight.fill_(float("nan"))
    assert torch.equal(keys(sparse.prefill_text, [21, 42]), text)


def test_generated_text_is_the_same_alone_and_in_a_batch(model: Bagel) -> None:
    contexts = model.new_contexts(3)
    model.prefill_text(contexts, [[21], [42, 38], [33, 30, 31]])
    for temperature in (None, 0.7):
        together = generate_tokens(
            model, contexts, max_length=10, temperature=temperature, seeds=[1, 2, 3]
        )
        for i in range(3):
            alone = generate_tokens(
                model, contexts[i : i + 1], max_length=10, temperature=temperature, seeds=[i + 1]
            )
            assert alone == together[i : i + 1]


def test_text_stops_before_eos(model: Bagel) -> None:
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.language_model.lm_head.weight.zero_()  # every token ties, token 0 wins
    special = replace(silent.config.special_tokens, eos=0)
    silent.config = replace(silent.config, special_tokens=special)
    assert generate_tokens(silent, silent.new_contexts(1), max_length=5) == [[special.bos]]


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        (Bagel.prefill_text, [-1], "prefill_text: token_ids must be from 0 to 95, got -1"),
        (Bagel.prefill_vit, torch.zeros(3, 14, 126), "at most 112, got 14 x 126"),
        (Bagel.prefill_vit, torch.zeros(3, 28, 30), "multiples of 14, got 28 x 30"),
        (Bagel.prefill_latents, torch.zeros(4, 18, 2), "at most 16, got 18 x 2"),
        (generate_tokens, {"max_length": 0}, "max_length must be an integer of at least 1"),
        (generate_tokens, {"temperature": 1e-320}, "temperature must be a finite number from"),
        (generate_tokens, {"temperature": 1.0}, "seeds must be 1 integers when sampling"),
    ],
)
def test_bad_arguments_are_refused(model: Bagel, call: Any, argument: Any, message: str) -> None:
    given: Any = [[argument]]
    options: Any = {}
    if isinstance(argument, dict):
        given, options = [], {"max_length": 4, **argument}
    refused(message, call, model, model.new_contexts(1), *given, **options)


def test_every_tensor_is_on_the_device_of_the_model(model: Bagel) -> None:
    # The meta device refuses to mix with the CPU just as a GPU does.
    away = Bagel(model.config, device="meta")
    image = ContextImage(
        latent=torch.empty(4, 4, 4, device="meta"), vit_pixels=torch.empty(3, 28, 28)
    )
    options: Any = {"images": [[image], []], "cfg_img_scale": 2.0, "num_timesteps": 3}
    latents = draw(away, [[21, 42], [33]], **options)
    assert [tokens.device.type for tokens in latents] == ["meta", "meta"]
    context = away.new_contexts(1)
    assert away.next_logits(context, [3]).shape == (1, 96)
