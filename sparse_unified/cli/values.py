# SPDX-License-Identifier: Apache-2.0
"""Types of command line values: each turns text into a value or says what it must be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MULTIPLE = 16
# No more digits than a seed has; int() of thousands of them is an error of its own.
_NUMBER = re.compile(r"[0-9]{1,19}")


def prompt(text: str) -> str:
    """A prompt that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"prompt must not be empty, got {text!r}")
    return text


def side(text: str) -> int:
    """A side of an image: a positive multiple of 16 pixels."""
    if not _NUMBER.fullmatch(text) or int(text) < _MULTIPLE or int(text) % _MULTIPLE:
        raise argparse.ArgumentTypeError(
            f"must be a positive multiple of {_MULTIPLE} pixels, got {text!r}"
        )
    return int(text)


def size(text: str) -> tuple[int, int]:
    """`HxW` -> (height, width)."""
    match = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 1024x768, got {text!r}")
    return side(match[1]), side(match[2])


def positive(text: str) -> int:
    """A positive integer."""
    if not _NUMBER.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A seed: an integer from 0 to 2^63 - 1."""
    if not _NUMBER.fullmatch(text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {2**63 - 1}, got {text!r}")
    return int(text)


def ratio(text: str) -> float:
    """A share: above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def names(*legal: str) -> Callable[[str], tuple[str, ...]]:
    """Returns the type of a comma-separated list of different names, each of them legal."""

    def parse(text: str) -> tuple[str, ...]:
        listed = tuple(part.strip() for part in text.split(","))
        if len(set(listed)) < len(listed) or not set(listed) <= set(legal):
            raise argparse.ArgumentTypeError(
                f"must be different ones of {', '.join(legal)}, comma-separated, got {text!r}"
            )
        return listed

    return parse


def interval(text: str) -> tuple[float, float]:
    """`LO,HI` -> two floats."""
    parts = text.split(",")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers LO,HI, got {text!r}") from None
    if not low <= high:
        raise argparse.ArgumentTypeError(f"must be LO,HI with LO at most HI, got {text!r}")
    return low, high


def image_path(text: str) -> Path:
    """A path whose ending names an image format that can be written."""
    path = Path(text)
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(IMAGE_FORMATS)}, got {text!r}")
    return path


def listed(text: str) -> tuple[str, ...]:
    """Comma-separated names, each once."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found) or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(
            f"must be names with commas between, each once, got {text!r}"
        )
    return found


def ratios(text: str) -> tuple[float, ...]:
    """Comma-separated shares above 0 and at most 1, each once."""
    return tuple(ratio(part) for part in listed(text))


def _pairs(text: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value or key in found:
            raise argparse.ArgumentTypeError(f"must be {form}, each once, got {text!r}")
        found[key] = value
    return found


def storage(text: str) -> str | dict[str, str]:
    """`KIND`, or `und=KIND,gen=KIND` -> {component: kind}; KIND is int8 or fp8."""
    kinds = {"int8", "fp8"}
    if text in kinds:
        return text
    found = _pairs(text, "int8, fp8 or und=KIND,gen=KIND") if "=" in text else {}
    if not found or not set(found) <= {"und", "gen"} or not set(found.values()) <= kinds:
        raise argparse.ArgumentTypeError(
            f"must be int8, fp8, or und= and gen= with one of them, got {text!r}"
        )
    return found


def device_map(text: str) -> str | dict[str, str | int]:
    """`auto`, or `MODULE=DEVICE,...` -> {module path: device}, numbers as integers."""
    if text == "auto":
        return text
    found = _pairs(text, "auto or MODULE=DEVICE,...")
    return {key: int(value) if _NUMBER.fullmatch(value) else value for key, value in found.items()}


def max_memory(text: str) -> dict[str | int, str]:
    """`DEVICE=SIZE,...` -> {device: size}, numbers as integers."""
    found = _pairs(text, "DEVICE=SIZE,...")
    return {int(key) if _NUMBER.fullmatch(key) else key: value for key, value in found.items()}
