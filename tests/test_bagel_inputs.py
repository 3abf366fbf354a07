# SPDX-License-Identifier: Apache-2.0
"""Images, transformed as by the official code, and tokenizers, of which no code is run."""

from __future__ import annotations

import builtins
import io
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from moe_cases import GOLDEN
from PIL import Image
from refusals import refused

from sparse_unified.bagel import AutoEncoder, VAEConfig
from sparse_unified.bagel.images import ImageTransform, open_image, to_image, to_rgb, transforms
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.fixtures import write_tokenizer
from sparse_unified.testing import build_model, build_vae, read_case

VAE = ImageTransform(max_side=1024, min_side=512, stride=16)
VIT = ImageTransform(max_side=980, min_side=224, stride=14)


def test_sizes_follow_the_official_rule() -> None:
    # Worked out by hand; 3000 * 0.245 = 735 is 52.5 strides of 14, and halves go to even.
    for size, vae, vit in (
        ((1024, 1024), (1024, 1024), (980, 980)),
        ((100, 100), (512, 512), (224, 224)),
        ((640, 480), (688, 512), (644, 476)),
        ((4000, 3000), (1024, 768), (980, 728)),
        ((3000, 1000), (1024, 336), (980, 322)),
        ((1000, 10), (1024, 16), (980, 14)),
    ):
        assert (VAE.size(*size), VIT.size(*size)) == (vae, vit)
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 6000, size=(500, 2)).tolist():
        for transform in (VAE, VIT):
            sides = transform.size(width, height)
            assert max(sides) <= transform.max_side
            assert all(side > 0 and side % transform.stride == 0 for side in sides)
    config = build_model(read_case(GOLDEN / "edit")).config  # of less than the usual sides
    vae, vit = transforms(config)
    assert vae.size(5000, 3000) == (128, 128 * 3 // 5 // 16 * 16 + 16)
    assert vit.size(5000, 5000) == (112, 112)


def test_pixels_lie_between_minus_one_and_one_and_go_back() -> None:
    image = Image.new("RGB", (32, 32), (255, 0, 51))
    pixels = ImageTransform(max_side=32, min_side=32, stride=16)(image)
    assert pixels.shape == (3, 32, 32)
    torch.testing.assert_close(pixels[:, 5, 7], torch.tensor([1.0, -1.0, -0.6]))
    values = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8)
    inside = (values.permute(2, 0, 1).double() + 0.5) / 255 * 2 - 1  # the step of a value
    assert np.array_equal(np.array(to_image(inside)), values.numpy())
    assert np.array(to_image(torch.full((3, 1, 1), 9.0))).max() == 255


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    rgb = to_rgb(image)
    assert [rgb.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_images_of_phones_are_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    upright = open_image(tmp_path / "phone.png", where="x")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 255)
    assert 0x0112 not in upright.getexif()


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path: Path) -> None:
    values = np.arange(4096).reshape(64, 64) * 16
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png", where="x")
    for again in (image, image.convert("I")):
        assert np.array_equal(np.array(to_rgb(again))[..., 0], np.round(values / 257))
    with pytest.raises(ValueError, match="must hold pixels of 8 or 16 bits a channel, got mode F"):
        to_rgb(Image.new("F", (2, 2)))


GREY = io.BytesIO()
Image.new("L", (11, 10)).save(GREY, "PNG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n", "format"),
        (GREY.getvalue()[:20], "format"),
        (GREY.getvalue(), "11 x 10 pixels, more than"),
    ],
)
def test_files_that_are_no_image_are_refused(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("no program may be run for an image")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr("sparse_unified.bagel.images._MOST_PIXELS", 100)
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x: an image must be a readable image.*{reason}"):
        open_image(io.BytesIO(content), where="x")
    refused(rf"x: .*photo.png must be a readable image.*{reason}", open_image, path, where="x")


def test_neither_missing_files_nor_pipes_are_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("photo", "readable, got No such"), ("pipe", "a regular file, got p")):
        path, rule = tmp_path / f"{name}.png", rf"x: .*{name}.png: file must be {reason}"
        refused(rule, open_image, path, where="x")


def test_autoencoder_shapes_go_round() -> None:
    growing = AutoEncoder(VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=3))
    assert "decoder.up.0.block.0.nin_shortcut.weight" in growing.state_dict()
    for vae, step in ((build_vae(read_case(GOLDEN / "vae")), 8), (growing, 4)):
        assert vae.config.downsample == step
        latent = vae.encode(torch.rand(2, 3, 3 * step, 5 * step) * 2 - 1)
        assert latent.shape == (2, vae.config.z_channels, 3, 5)
        assert vae.decode(latent).shape == (2, 3, 3 * step, 5 * step)
        with pytest.raises(ValueError, match=r"pixels must have shape \[B, 3, H, W\].*got"):
            vae.encode(torch.zeros(1, 3, 8, 3 * step // 2))
        refused(r"latent must have shape", vae.decode, torch.zeros(1, 7, 8, 8))


# Tokenizers

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


def write_qwen2(directory: Path, transformers: Any, *, files: str) -> None:
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
    transformers = pytest.importorskip("transformers")
    write_qwen2(tmp_path, transformers, files=files)
    change(tmp_path / "config.json", {"model_type": "bagel"})
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in (*TEXTS, "that  is\n\na  thé <|vision_start|>  12"):
        ids = tokenizer.encode(text)
        assert ids == auto.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == auto.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.special_tokens.bos == auto.convert_tokens_to_ids("<|im_start|>")


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    for name, content, message in (
        ("tokenizer_config.json", "[]", "must be a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "tokenizer_class must be one of"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 1}}', "a readable tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "model": 3}', "must hold a readable tokenizer"),
        ("tokenizer.json", "{", "must hold a readable tokenizer"),
    ):
        write_tokenizer(tmp_path)
        (tmp_path / name).write_text(content)
        refused(message, Tokenizer.from_directory, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused("must hold a tokenizer, got neither", Tokenizer.from_directory, tmp_path)


def test_a_vocabulary_without_markers_is_refused() -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "<|im_start|>": 1, "<|im_end|>": 2}

    refused(r"got no <\|vision_start\|>, <\|vision_end\|>", Tokenizer, Plain())
