# SPDX-License-Identifier: Apache-2.0
"""What the model loader would refuse outside the FFNs, found without building a model.

A file may hold a part of a model, so what is there decides what is checked: keys must be whole
groups under official names, llm_config.json must give the heads and the vocabulary that the tensors
have, vit_config.json their layers, and ae.safetensors must hold exactly an autoencoder.
"""

from __future__ import annotations

from sparse_unified._common import list_some
from sparse_unified.checkpoint.attention import check_attention
from sparse_unified.checkpoint.autoencoder import check_autoencoder
from sparse_unified.checkpoint.model_dir import VAE_FILE, Checkpoint
from sparse_unified.checkpoint.safetensors_io import read_header
from sparse_unified.checkpoint.shapes import CONFIG, absent_prefixes
from sparse_unified.checkpoint.structure import (
    check_structure,
    check_vision_layers,
    vision_layers,
)

_EMBEDDINGS = "language_model.model.embed_tokens.weight"


def check_surroundings(source: Checkpoint) -> list[str]:
    """Returns a sentence for each disagreement around the FFNs, unreadable files among them."""
    problems: list[str] = []
    for check in _CHECKS:
        try:
            problems += check(source)
        except ValueError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def require_surroundings(source: Checkpoint) -> None:
    """Raises ValueError with the first disagreement around the FFNs, if there is one."""
    for check in _CHECKS:
        if problems := check(source):
            raise ValueError(f"{source.directory}: {problems[0]}")


def _check_keys(source: Checkpoint) -> list[str]:
    return check_structure(source.keys(), absent_prefixes(source.left or {}))


def _check_heads(source: Checkpoint) -> list[str]:
    # Of a pruned model, `check_recipe` compares the heads with those that the recipe leaves.
    return [] if source.left else check_attention(None, source.specs, source.llm_config)


def _check_vocabulary(source: Checkpoint) -> list[str]:
    if _EMBEDDINGS not in source.specs:
        return []
    rows, stated = source.spec(_EMBEDDINGS).shape[:1], source.llm_config.get("vocab_size")
    if stated in (None, *rows):
        return []
    return [
        f"{CONFIG}: vocab_size must be {list_some(rows)} as the tensors say, got {stated!r:.120}"
    ]


def _check_vision(source: Checkpoint) -> list[str]:
    layers = vision_layers(source.keys())
    return check_vision_layers(source.vit_config, layers) if layers else []


def _check_autoencoder(source: Checkpoint) -> list[str]:
    if not source.vae_file.exists():
        return []
    specs = read_header(source.vae_file).tensors
    return check_autoencoder({key: spec.shape for key, spec in specs.items()}, where=VAE_FILE)


_CHECKS = (_check_keys, _check_heads, _check_vocabulary, _check_vision, _check_autoencoder)
