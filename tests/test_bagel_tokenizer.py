# SPDX-License-Identifier: Apache-2.0
"""A tokenizer is read as data: no code of its directory runs, and damage is one clear error."""

from __future__ import annotations

import builtins
import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
from refusals import refused

from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.fixtures import write_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["a photo of a cat", "<|im_start|>über\n€", ""]
BOTH = {"AutoTokenizer": ["evil.Tok", "evil.Tok"], "AutoConfig": "evil.Config"}
EVIL = {"model_type": "evil", "auto_map": BOTH, "tokenizer_class": "EvilTok"}
CODE = """
from pathlib import Path
Path(__file__).with_name("RAN").touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Tok(PreTrainedTokenizerFast): pass
class Config(PretrainedConfig): model_type = "evil"
"""


def change(path: Path, fields: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))


@pytest.mark.parametrize(
    ("own", "config", "readable"),
    [
        ({"auto_map": BOTH, "trust_remote_code": True}, EVIL, True),
        ({"tokenizer_class": "EvilTok", "auto_map": BOTH}, EVIL, False),
        ({"tokenizer_class": "EvilTok", "auto_map": {"AutoTokenizer": ["a/b--e.T"]}}, {}, False),
    ],
)
def test_code_of_a_directory_is_not_run(
    own: Any, config: Any, readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("neither stdin nor the network may be used")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_tokenizer(tmp_path)
    expected = [Tokenizer.from_directory(tmp_path).encode(text) for text in TEXTS]
    (tmp_path / "evil.py").write_text(CODE)
    change(tmp_path / "tokenizer_config.json", own)
    change(tmp_path / "config.json", config)
    if readable:
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert [tokenizer.encode(text) for text in TEXTS] == expected
    else:
        refused(r"tokenizer_class must be one of .* 'EvilTok'", Tokenizer.from_directory, tmp_path)
    assert not (tmp_path / "RAN").exists()


def write_qwen2(directory: Path, *, files: str) -> None:
    """Writes files as the released models have them, with a vocabulary of bytes and two merges."""
    markers = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    # The character that a byte has in the vocabulary of a byte-level BPE.
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = (chr(256 + i) for i in range(256 - len(plain)))
    letters = sorted([*map(chr, plain), *shifted])
    tokens = [*letters, "Ġa", "th", "<|endoftext|>"]
    fast = transformers.Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[("Ġ", "a"), ("t", "h")]
    )
    fast.add_special_tokens({"additional_special_tokens": markers})
    fast.save_pretrained(directory)
    if files == "vocab.json":
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_text(json.dumps(fast._vocab))
        (directory / "merges.txt").write_text("#version: 0.2\nĠ a\nt h\n")
        added = fast.get_added_vocab().items()
        special = {str(i): {"content": token, "special": True} for token, i in added}
        change(directory / "tokenizer_config.json", {"added_tokens_decoder": special})


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_released_files_are_read_as_transformers_reads_them(tmp_path: Path, files: str) -> None:
    write_qwen2(tmp_path, files=files)
    change(tmp_path / "config.json", {"model_type": "bagel"})
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in (*TEXTS, "that  is\n\na  thé <|vision_start|>  12"):
        ids = tokenizer.encode(text)
        assert ids == auto.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == auto.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.special_tokens.bos == auto.convert_tokens_to_ids("<|im_start|>")


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    refused("must hold a readable tokenizer", Tokenizer.from_directory, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused("must hold a tokenizer, got neither", Tokenizer.from_directory, tmp_path)


def test_a_vocabulary_without_markers_is_refused() -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "<|im_start|>": 1, "<|im_end|>": 2}

    refused(r"got no <\|vision_start\|>, <\|vision_end\|>", Tokenizer, Plain())
