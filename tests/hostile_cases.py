# SPDX-License-Identifier: Apache-2.0
"""Damage done to files on purpose: bytes, JSON values and headers changed at random, from a seed.

The corpus in tests/corpus holds the cases that once went wrong and those that readers of such files
are known to get wrong; it is read on every run, before anything random.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"

# What a field is replaced with: wrong types, ends of ranges, names that leave the directory.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    1 << 31,
    (1 << 63) - 1,
    1 << 64,
    10**400,
    -0.0,
    0.5,
    2.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "-1",
    "9" * 5000,
    "١",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "\ud800",
    "\n\r\x1b[31m",
    "x" * 100_000,
    [],
    [None],
    [[]],
    [0, 0],
    [-1],
    [1 << 40, 0],
    [1 << 62, 1 << 62, 0],
    [0] * 70,
    {},
    {"": None},
    {"0": 0},
    {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
)
NAMES = (
    "",
    "0",
    "1",
    "-1",
    "9" * 5000,
    "99999999",
    "\ud800",
    "__metadata__",
    "__proto__",
    "gen.0",
    "gen.99999999",
    "scores",
    "num_experts",
    "language_model.model.layers.99999999999.mlp.gate_proj.weight",
    f"language_model.model.layers.{'9' * 5000}.mlp_moe_gen.gate_proj.weight",
    "language_model.model.layers.1.mlp_moe_gen.experts.99999999999.up_proj.weight",
    f"language_model.model.layers.1.mlp_moe_gen.experts.{'9' * 5000}.up_proj.weight",
    "vit_model.vision_model.encoder.layers.99999999999.mlp.fc1.weight",
    f"vit_model.vision_model.encoder.layers.{'9' * 5000}.mlp.fc1.weight",
)

# A message is one sentence with a rule and a value, and short enough to be read.
_MESSAGE = re.compile(r"must .+\bgot ", re.DOTALL)
_LONGEST = 2000


def refusal(call: Callable[[], object], where: str) -> str | None:
    """Returns the message of a refusal, None where `call` went through.

    Anything but a plain ValueError, TypeError or RuntimeError with a rule, a value and `where` in
    it is an error of the test.
    """
    raised: Exception | None = None
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        raised = error
    if raised is None:
        return None
    message = str(raised)
    assert type(raised) in (ValueError, TypeError, RuntimeError), repr(raised)[:_LONGEST]
    assert _MESSAGE.search(message), message[:_LONGEST]
    assert where in message, message[:_LONGEST]
    assert len(message) <= _LONGEST, message[:_LONGEST]
    message.encode()  # it must be fit to print
    return message


def change_bytes(data: bytes, source: random.Random) -> bytes:
    """Flips, overwrites, inserts, removes or doubles some bytes, or cuts the end off."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at = source.randrange(len(changed) + 1)
        length = min(source.choice((1, 1, 2, 8, 64)), len(changed) - at)
        kind = source.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            changed[at : at + length] = source.randbytes(length)
        elif kind == 2:
            changed[at:at] = source.choice((b"\0", b"\xff" * 8, b'"', b"{", b"[" * 9, b"9" * 30))
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        else:
            del changed[at:]
    return bytes(changed)


def change_json(value: Any, source: random.Random) -> Any:
    """Returns a JSON value in which a few nodes were replaced, removed, renamed or doubled."""
    root = [copy.deepcopy(value)]
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        holders: list[Any] = []
        stack: list[Any] = [root]
        while stack:
            node = stack.pop()
            if node:
                holders.append(node)
            stack += [v for v in (node.values() if isinstance(node, dict) else node) if _holds(v)]
        holder = source.choice(holders)
        at: Any = source.choice(list(holder)) if isinstance(holder, dict) else None
        if at is None:
            at = source.randrange(len(holder))
        kind = source.randrange(8) if holder is not root else 0
        if kind == 5:
            del holder[at]
        elif kind == 6 and isinstance(holder, dict):
            holder[source.choice(NAMES)] = holder.pop(at)
        elif kind == 7 and isinstance(holder, dict):
            holder[source.choice(NAMES)] = copy.deepcopy(holder[at])
        elif kind == 4 and isinstance(holder[at], int):
            holder[at] += source.choice((-1, 1, 4, 1 << 20))
        else:
            holder[at] = copy.deepcopy(source.choice(VALUES))
    return root[0]


def _holds(value: object) -> bool:
    return isinstance(value, (dict, list))


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header and the tensors of a whole safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header: Any, tensors: bytes) -> bytes:
    """Returns a safetensors file of a header, legal or not."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def change_file(data: bytes, source: random.Random) -> bytes:
    """Damages a safetensors file: its bytes, its header, or the JSON inside its metadata."""
    kind = source.randrange(4)
    if kind == 0:
        return change_bytes(data, source)
    header, tensors = split_file(data)
    fields = {}
    for name, text in header.get("__metadata__", {}).items():
        try:
            fields[name] = json.loads(text)
        except ValueError:
            continue
    if kind == 1 and fields:
        name = source.choice(sorted(fields))
        header["__metadata__"][name] = json.dumps(change_json(fields[name], source))
        return join_file(header, tensors)
    return join_file(change_json(header, source), tensors)
