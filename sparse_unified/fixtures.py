# SPDX-License-Identifier: Apache-2.0
"""Writes a recorded case as a model directory in the official format, for demos and tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sparse_unified._common import StrPath, optional
from sparse_unified.mini.model import write_files
from sparse_unified.testing import read_case

_SPECIAL_IDS = {
    "<|im_start|>": 3,
    "<|im_end|>": 4,
    "<|vision_start|>": 5,
    "<|vision_end|>": 6,
    "<|endoftext|>": 9,
}
_FIRST_ID, _NUM_IDS = 10, 86
# ASCII has more printable characters than there are ids, so some share one: letters, digits and the
# blank are what such an id is decoded to. Other characters up to code point 255 are read as the one
# of the same id, all beyond as <|endoftext|>.
_PRINTABLE = sorted(map(chr, range(32, 127)), key=lambda c: not (c.isalnum() or c == " "))


def write_checkpoint(case_path: StrPath, directory: StrPath) -> Path:
    """Writes the model of an image or answer case, with the autoencoder of `vae` beside it, with
    the file names, keys and conventions of the official one, and a tokenizer of characters."""
    case, vae = read_case(case_path), read_case(Path(case_path).parent / "vae")
    llm = {"model_type": "qwen2", "qk_norm": True, "tie_word_embeddings": False}
    llm |= case.fields["llm_config"]
    if moe := case.fields.get("moe"):
        llm |= {**moe, "num_experts_per_tok": moe["top_k"]}
    write_files(directory, case.weights, vae.weights, llm, case.fields["vit_config"])
    write_tokenizer(directory)
    return Path(directory)


def write_tokenizer(directory: StrPath) -> None:
    """Writes a tokenizer that gives a character the id 10 + code point mod 86."""
    tokenizers = optional("tokenizers")
    normalizers = tokenizers.normalizers
    same: dict[int, str] = {}
    for char in _PRINTABLE:
        same.setdefault(ord(char) % _NUM_IDS, char)
    ids = {char: _FIRST_ID + remainder for remainder, char in same.items()}
    others = [chr(code) for code in range(256) if chr(code) not in ids]
    unknown = "<|endoftext|>"
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab=ids | _SPECIAL_IDS, unk_token=unknown)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(char, same[ord(char) % _NUM_IDS]) for char in others]
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated"
    )
    backend.decoder = tokenizers.decoders.Fuse()
    fast: Any = optional("transformers").PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token=unknown,
        additional_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(os.fspath(directory))
