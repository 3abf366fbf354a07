# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with the tokenizer files of the checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparse_unified._common import StrPath, optional, require
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.checkpoint.files import read_json

logger = logging.getLogger(__name__)

# The fields of `SpecialTokens`, and the texts that stand for them.
SPECIAL_TEXTS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
# What tokenizer_config.json may name, and the class of transformers that reads it.
_CLASSES = {
    "Qwen2Tokenizer": "Qwen2TokenizerFast",
    "Qwen2TokenizerFast": "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",  # its name since transformers 5
}


class Tokenizer:
    """A Qwen2 tokenizer of transformers and the ids of the four markers BAGEL uses."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        known, markers = backend.get_vocab(), SPECIAL_TEXTS.values()
        missing = [text for text in markers if text not in known]
        rule = f"tokenizer: vocabulary must hold {', '.join(markers)}"
        require(not missing, rule, f"no {', '.join(missing)}")
        self.special_tokens = SpecialTokens(**{n: known[text] for n, text in SPECIAL_TEXTS.items()})
        # What stands for every word outside the vocabulary, should bytes not spell it; and those
        # words that were told.
        self._unknown, self._told = getattr(backend, "unk_token_id", None), set[str]()

    @classmethod
    def from_directory(cls, directory: StrPath) -> Tokenizer:
        """Reads the tokenizer files of a model directory.

        Only the classes in `_CLASSES` are made. Code that the directory names (`auto_map`) is
        never looked for, so nothing is executed, asked on stdin or downloaded. ValueError: there is
        none, it is damaged or of another class, or a marker is not in its vocabulary.
        """
        path = Path(directory)
        fast = (path / "tokenizer.json").is_file()
        is_there = fast or all((path / name).is_file() for name in ("vocab.json", "merges.txt"))
        found = "neither tokenizer.json nor vocab.json and merges.txt"
        require(is_there, f"{path}: directory must hold a tokenizer", found)
        settings = path / "tokenizer_config.json"
        name = read_json(settings).get("tokenizer_class") if settings.exists() else None
        if name is None:
            name = "PreTrainedTokenizerFast" if fast else "Qwen2Tokenizer"
        rule = f"{settings}: tokenizer_class must be one of {', '.join(_CLASSES)}"
        require(isinstance(name, str) and name in _CLASSES, rule, f"{name!r:.120}")
        kind = getattr(optional("transformers"), _CLASSES[name])
        try:
            backend = kind.from_pretrained(
                os.fspath(path), local_files_only=True, trust_remote_code=False
            )
            backend.encode("a")  # some settings are looked at only now
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises plain Exception, and its panics none
            first_line = str(error).partition("\n")[0]
            raise ValueError(
                f"{path}: directory must hold a readable tokenizer, got {first_line:.200}"
            ) from error
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos and eos; logs words outside the vocabulary."""
        encode = partial(self._backend.encode, add_special_tokens=False)
        ids = list(encode(text))
        if self._unknown in ids:
            words = {word for word in text.split() if self._unknown in encode(word)}
            if new := sorted(words - self._told):
                self._told.update(new)
                logger.warning(
                    "words outside the model's vocabulary, all of them the same to it: %s (of %r)",
                    ", ".join(new),
                    text,
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without bos and eos."""
        return self._backend.decode(list(ids), skip_special_tokens=False)
