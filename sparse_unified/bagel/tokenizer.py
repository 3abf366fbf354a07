# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with the tokenizer files of the checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_unified._common import optional
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
    """A Qwen2 tokenizer and the ids of the four markers BAGEL uses.

    Args:
        backend: a tokenizer of transformers.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        ids = {name: backend.get_vocab().get(text) for name, text in SPECIAL_TEXTS.items()}
        if missing := [text for name, text in SPECIAL_TEXTS.items() if ids[name] is None]:
            raise ValueError(
                f"tokenizer: vocabulary must hold {', '.join(SPECIAL_TEXTS.values())}, "
                f"got no {', '.join(missing)}"
            )
        self.special_tokens = SpecialTokens(**ids)
        # What stands for every word outside the vocabulary, should bytes not spell it; and those
        # words that were told.
        self._unknown, self._told = getattr(backend, "unk_token_id", None), set[str]()

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer files of a model directory.

        Only the classes in `_CLASSES` are made. Code that the directory names (`auto_map`) is
        never looked for, so nothing is executed, asked on stdin or downloaded.

        Raises:
            ValueError: there is no tokenizer in it, it is damaged or of another class, or a marker
                is not in its vocabulary.
        """
        path = Path(directory)
        fast = (path / "tokenizer.json").is_file()
        if not fast and not all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
            raise ValueError(
                f"{path}: directory must hold a tokenizer, got neither tokenizer.json nor "
                "vocab.json and merges.txt"
            )
        settings = path / "tokenizer_config.json"
        name = read_json(settings).get("tokenizer_class") if settings.exists() else None
        if name is None:
            name = "PreTrainedTokenizerFast" if fast else "Qwen2Tokenizer"
        if not isinstance(name, str) or name not in _CLASSES:
            raise ValueError(
                f"{settings}: tokenizer_class must be one of {', '.join(_CLASSES)}, "
                f"got {name!r:.120}"
            )
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
        ids = list(self._backend.encode(text, add_special_tokens=False))
        if self._unknown in ids:
            encode = self._backend.encode
            words = [
                w for w in text.split() if self._unknown in encode(w, add_special_tokens=False)
            ]
            if new := sorted(set(words) - self._told):
                self._told.update(new)
                logger.warning(
                    "words outside the model's vocabulary, all of them the same to it: %s (of %r)",
                    *(", ".join(new), text),
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without bos and eos."""
        return self._backend.decode(list(ids), skip_special_tokens=False)
