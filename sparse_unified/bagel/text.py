# SPDX-License-Identifier: Apache-2.0
"""Text, token by token: greedy or sampled, several sequences at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.model import Bagel


def generate_tokens(
    model: Bagel,
    contexts: Sequence[Context],
    *,
    max_length: int,
    temperature: float | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each context with a text.

    Args:
        contexts: what the sequences have seen; they are only read.
        max_length: most tokens of a sequence, the leading bos included.
        temperature: None takes the likeliest token; otherwise tokens are drawn from
            softmax(logits / temperature).
        seeds: one per sequence, for drawing; a sequence gets the same text alone or in a batch.

    Returns:
        Token ids of each sequence, from bos up to but without eos.

    Raises:
        ValueError: max_length or temperature is out of range, or seeds are missing.
    """
    if max_length < 1:
        raise ValueError(f"generate_tokens: max_length must be at least 1, got {max_length}")
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"generate_tokens: temperature must be finite and above 0, got {temperature}"
        )
    if temperature is not None and (seeds is None or len(seeds) != len(contexts)):
        raise ValueError(
            f"generate_tokens: seeds must be {len(contexts)} integers when sampling, got {seeds}"
        )
    special = model.config.special_tokens
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(contexts)]
    pasts = [context.fork() for context in contexts]
    texts = [[special.bos] for _ in pasts]
    active = list(range(len(pasts)))
    for _ in range(max_length - 1):
        logits = model.next_logits([pasts[i] for i in active], [texts[i][-1] for i in active])
        chosen = _choose(logits, temperature, [generators[i] for i in active])
        for i, token in zip(active, chosen, strict=True):
            if token != special.eos:
                texts[i].append(token)
        active = [i for i, token in zip(active, chosen, strict=True) if token != special.eos]
        if not active:
            break
    return texts


def _choose(
    logits: Tensor, temperature: float | None, generators: Sequence[torch.Generator]
) -> list[int]:
    if temperature is None:
        return logits.argmax(dim=-1).tolist()
    # Drawn on the CPU, so that a seed means the same on every device.
    probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]
