# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with the tokenizer files of the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.optional import optional

_SPECIAL_TEXTS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


class Tokenizer:
    """A Qwen2 tokenizer and the ids of the four markers BAGEL uses.

    Args:
        backend: a tokenizer of transformers.

    Raises:
        ValueError: a marker is not in its vocabulary.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        vocabulary = backend.get_vocab()
        missing = [text for text in _SPECIAL_TEXTS.values() if text not in vocabulary]
        if missing:
            raise ValueError(
                f"tokenizer: vocabulary must hold {', '.join(_SPECIAL_TEXTS.values())}, "
                f"got no {', '.join(missing)}"
            )
        self.special_tokens = SpecialTokens(
            **{name: vocabulary[text] for name, text in _SPECIAL_TEXTS.items()}
        )

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer files of a model directory; nothing is downloaded.

        Raises:
            ValueError: there is no tokenizer in it, or a marker is not in its vocabulary.
        """
        auto = optional("transformers").AutoTokenizer
        try:
            backend = auto.from_pretrained(os.fspath(directory), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).partition("\n")[0]
            raise ValueError(
                f"{os.fspath(directory)}: directory must hold a tokenizer, got {first_line}"
            ) from error
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos and eos."""
        return list(self._backend.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without bos and eos."""
        return self._backend.decode(list(ids), skip_special_tokens=False)
