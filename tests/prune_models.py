# SPDX-License-Identifier: Apache-2.0
"""A small BAGEL with several key heads, and a run through all that it can do, for pruning tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import write_weights
from moe_cases import GOLDEN
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_unified.bagel import Bagel, load_bagel
from sparse_unified.bagel.attention import KVCache
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.sampler import build_guidance
from sparse_unified.checkpoint.modes import PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig
from sparse_unified.fixtures import write_tokenizer
from sparse_unified.surgery import prune_heads_, prune_width_, skip_layers_
from sparse_unified.testing import build_model, read_case

SPECIAL = SpecialTokens(bos=3, eos=4, start_of_image=5, end_of_image=6)
SUFFIX = {"und": "", "gen": "_moe_gen"}
LAYERS, HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 4, 64, 96, 8, 4, 8
SIZES: dict[str, Any] = {
    **{"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS},
}


def small_bagel(seed: int = 0, **factory: Any) -> Bagel:
    """Returns a random model of 4 layers, 8 query and 4 key heads, 96 neurons."""
    config = build_model(read_case(GOLDEN / "understand")).config
    model = Bagel(replace(config, llm=replace(config.llm, **SIZES)), **factory)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            is_norm = parameter.ndim == 1 and parameter.mean() == 1
            parameter.copy_(noise * scale + (1 if is_norm else 0))
    return model


def write_model(directory: Path, model: Bagel | None = None, num_shards: int = 0) -> Path:
    """Writes the model as a directory in the official format."""
    model = model if model is not None else small_bagel()
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    write_weights(directory, weights, num_shards)
    save_file(read_case(GOLDEN / "vae").weights, directory / "ae.safetensors")
    fields = read_case(GOLDEN / "understand").fields
    llm = json.dumps(fields["llm_config"] | SIZES, indent="\t")
    (directory / "llm_config.json").write_text(llm)
    (directory / "vit_config.json").write_text(json.dumps(fields["vit_config"]))
    write_tokenizer(directory)
    return directory


def load(directory: Path) -> Bagel:
    return load_bagel(directory, special_tokens=SPECIAL)[0]


Mode = PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig


def apply_live(model: Bagel, modes: Sequence[Mode], scores: Any = None) -> None:
    for mode in modes:
        if isinstance(mode, PruneWidthConfig):
            prune_width_(model, mode, scores)
        elif isinstance(mode, PruneHeadsConfig):
            prune_heads_(model, mode, scores)
        else:
            skip_layers_(model, mode)


WIDTHS = [
    PruneWidthConfig(component="und", keep_ratio=0.5, block_size=16, budget="global"),
    PruneWidthConfig(component="gen", layers=[1, 2], keep_ratio=2 / 3, block_size=16),
]
FEWER_HEADS = [
    PruneHeadsConfig(component="und", keep_ratio=0.5),
    PruneHeadsConfig(component="gen", keep_ratio=0.5, layers="0-2"),
]
DEPTH = [
    SkipLayersConfig(component="und", layers=[1, 3]),
    SkipLayersConfig(component="gen", layers=[3]),
    SkipLayersConfig(component="gen", layers=[0], part="attention"),
    SkipLayersConfig(component="gen", layers=[2], part="ffn"),
]


def layer_of(model: Bagel, layer: int) -> Any:
    return model.language_model.model.layers[layer]


def contexts(model: Bagel) -> list[KVCache]:
    """Returns the contexts of two prompts, one behind an image seen through VAE and ViT."""
    generator = torch.Generator().manual_seed(1)
    image = ContextImage(
        latent=torch.randn(4, 4, 4, generator=generator),
        vit_pixels=torch.randn(3, 28, 42, generator=generator),
    )
    guidance = build_guidance(model, [[21, 42, 38], [33]], images=[[image], []])
    return [context for own in guidance for context in (own.full, own.without_text)]


def outputs(model: Bagel) -> list[Tensor]:
    """Reads two prompts, answers them, and predicts velocities of two images in their contexts."""
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(n, 16, generator=generator) for n in (6, 4)]
    made = contexts(model)
    branches = [made[:2], made[2:]]
    velocities = model.velocity(images, [(2, 3), (2, 2)], torch.tensor([0.7]), branches)
    logits = []
    answers = [context.fork() for context in made]
    for token in (3, 40, 41):
        logits.append(model.next_logits(answers, [token] * len(answers)))
    return [*velocities, *logits]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def differs(a: list[Tensor], b: list[Tensor]) -> bool:
    return any(not torch.allclose(x, y, atol=1e-3) for x, y in zip(a, b, strict=True))


@contextmanager
def calls_counted(model: Bagel) -> Iterator[Counter[str]]:
    """Counts the calls of every module of the decoder layers, by `layer.path`."""
    counts: Counter[str] = Counter()
    handles = []
    for name, module in model.language_model.model.layers.named_modules():

        def count(_: nn.Module, __: Any, name: str = name) -> None:
            counts[name] += 1

        handles.append(module.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
