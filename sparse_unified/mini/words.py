# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the miniature, and its tokenizer: one id per word."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any

from sparse_unified._common import optional
from sparse_unified.mini import digits, scenes

UNKNOWN = "<|endoftext|>"
# The fields of `SpecialTokens`, and the texts that the tokenizer of BAGEL has for them.
MARKERS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


def vocabulary() -> dict[str, int]:
    """Returns the id of every word and marker, from 0; a word outside becomes `UNKNOWN`."""
    words = [
        *("?", "a", "and", "colour", "digit", "from", "how", "is", "many", "seen", "the", "what"),
        *("where", "which"),
        *(word for relation in scenes.RELATIONS for word in relation.split()),
        *digits.NAMES,
        *scenes.NUMBERS.values(),
        *scenes.COLOURS,
        *scenes.SHAPES,
        *scenes.PLURALS.values(),
    ]
    return {word: i for i, word in enumerate(dict.fromkeys((UNKNOWN, *MARKERS.values(), *words)))}


def encode(text: str) -> list[int]:
    """Returns the ids of a text, without bos and eos, as the tokenizer does."""
    return list(_encoded(text))


@lru_cache(maxsize=4096)
def _encoded(text: str) -> tuple[int, ...]:
    ids = _ids()
    return tuple(ids.get(word, ids[UNKNOWN]) for word in text.lower().split())


@cache
def _ids() -> dict[str, int]:
    return vocabulary()


def write_tokenizer(directory: str | os.PathLike[str]) -> None:
    """Writes the tokenizer files of a model directory; words are separated by blanks."""
    tokenizers = optional("tokenizers")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab=vocabulary(), unk_token=UNKNOWN)
    )
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast: Any = optional("transformers").PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        bos_token=None,
        eos_token=MARKERS["eos"],
        pad_token=UNKNOWN,
        additional_special_tokens=[text for name, text in MARKERS.items() if name != "eos"],
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(os.fspath(directory))
