# SPDX-License-Identifier: Apache-2.0
"""One attack on everything that reads a file: damage from a seed, and what may come of it.

A damaged file is read right or refused in one sentence, nothing else changes, nothing is left. The
corpus in tests/corpus holds cases that once went wrong and those that readers of such files are
known to get wrong; it is read on every run, before anything random.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import snapshot
from safetensors import deserialize

from sparse_unified.checkpoint.safetensors_io import as_bytes, read_header, read_tensor

CORPUS = Path(__file__).parent / "corpus"

# What a field is replaced with: wrong types, ends of ranges, names that leave the directory.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, (1 << 63) - 1, 1 << 64, 10**400),
    *(-0.0, 0.5, 2.0, 1e308, float("nan"), float("inf"), "", "0", "-1", "9" * 5000, "١", ".."),
    *("../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a\0b", "\ud800", "\n\r\x1b[31m"),
    *("x" * 100_000, "F64", "BF16", "BOOL", "F8_E4M3"),
    *([], [None], [[]], [0, 0], [-1], [1 << 40, 0], [1 << 62, 1 << 62, 0], [0] * 70),
    *({}, {"": None}, {"0": 0}, {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}),
    {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]},
)
NAMES = (
    *("", "0", "1", "-1", "9" * 5000, "99999999", "\ud800", "__metadata__", "__proto__"),
    *("gen.0", "gen.99999999", "scores", "num_experts", "auto_map", "tokenizer_class"),
    "language_model.model.layers.99999999999.mlp.gate_proj.weight",
    f"language_model.model.layers.{'9' * 5000}.mlp_moe_gen.gate_proj.weight",
    "language_model.model.layers.1.mlp_moe_gen.experts.99999999999.up_proj.weight",
    f"language_model.model.layers.1.mlp_moe_gen.experts.{'9' * 5000}.up_proj.weight",
    "vit_model.vision_model.encoder.layers.99999999999.mlp.fc1.weight",
)
# What a file is replaced with by the first seeds.
LINKS = ("loop", "gone", "device", "pipe", "folder")

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


def read_all(path: Path) -> None:
    """Reads a safetensors file, which must give what the official library gives."""
    header = read_header(path)
    official = dict(deserialize(path.read_bytes()))
    assert set(official) == set(header.tensors)
    for key, spec in header.tensors.items():
        tensor = read_tensor(spec)
        assert list(tensor.shape) == list(official[key]["shape"])
        assert np.array_equal(as_bytes(tensor), np.frombuffer(official[key]["data"], np.uint8))


def attack(
    name: str,
    path: Path,
    read: Callable[[Path], object],
    count: int,
    *,
    links: bool = False,
    tell: bool = False,
) -> int:
    """Damages a file `count` times, and returns how often it was refused.

    Args:
        name: with the number of a case, its seed.
        path: the file, alone in its directory with what belongs to it.
        read: reads it; must raise where it is wrong, and where it does not mean what it says.
        count: of cases; with `links` the first are links to nowhere, to a device, a pipe and so on.
        tell: print the number of each case first, for the parent of a process that may end.
    """
    data, root = path.read_bytes(), path.parent.parent
    others = snapshot(root)
    refused = 0
    for seed in range(0 if links else len(LINKS), count):
        if tell:
            sys.stdout.write(f"{name} {seed}\n")
            sys.stdout.flush()
        damage(path, data, random.Random(f"{name} {seed}"), seed)
        written = path.read_bytes() if seed >= len(LINKS) else None
        try:
            refused += refusal(lambda: read(path), "") is not None
            assert list(root.iterdir()) == [path.parent], "something was left"
            assert written is None or path.read_bytes() == written, "the file was changed"
        except BaseException as error:
            text = f"{name} {seed}: {type(error).__name__}: {error}"
            raise AssertionError(text[:3000]) from error
    path.unlink()
    path.write_bytes(data)
    assert snapshot(root) == others
    return refused


def damage(path: Path, data: bytes, source: random.Random, seed: int) -> None:
    """Replaces a file with a damaged copy of it; the first seeds make links to odd places."""
    path.unlink()
    if seed < len(LINKS):
        pipe = path.with_name("pipe")
        targets = {"loop": path, "device": Path("/dev/zero"), "pipe": pipe, "folder": path.parent}
        if LINKS[seed] == "pipe":
            os.mkfifo(pipe)
        path.symlink_to(targets.get(LINKS[seed], path.with_name("gone")))
        return
    path.with_name("pipe").unlink(missing_ok=True)
    if path.suffix == ".safetensors":
        path.write_bytes(change_file(data, source))
    elif path.suffix not in (".json", ".jsonl") or source.randrange(4) == 0:
        path.write_bytes(change_bytes(data, source))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change_json(json.loads(data), source)))
    else:
        lines = data.decode().splitlines()
        at = source.randrange(len(lines))
        lines[at] = json.dumps(change_json(json.loads(lines[at]), source))
        path.write_text("\n".join(lines) + "\n")


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
    """Returns a JSON value in which a few nodes were replaced, swapped, removed or renamed."""
    root = [copy.deepcopy(value)]
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        holders: list[Any] = []
        stack: list[Any] = [root]
        while stack:
            node = stack.pop()
            if node:
                holders.append(node)
            inner = node.values() if isinstance(node, dict) else node
            stack += [v for v in inner if isinstance(v, (dict, list))]
        holder = source.choice(holders)
        at: Any = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = source.randrange(9) if holder is not root else 0
        if kind == 5:
            del holder[at]
        elif kind in (6, 7) and isinstance(holder, dict):
            holder[source.choice(NAMES)] = (
                holder.pop(at) if kind == 6 else copy.deepcopy(holder[at])
            )
        elif kind == 8:
            other = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[at], holder[other] = holder[other], holder[at]
        elif kind == 4 and isinstance(holder[at], int):
            holder[at] += source.choice((-1, 1, 4, 1 << 20))
        else:
            holder[at] = copy.deepcopy(source.choice(VALUES))
    return root[0]


def change_file(data: bytes, source: random.Random) -> bytes:
    """Damages a safetensors file: its bytes, its header, or the JSON inside its metadata."""
    kind = source.randrange(4)
    if kind == 0:
        return change_bytes(data, source)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    fields = {}
    for name, text in header.get("__metadata__", {}).items():
        try:
            fields[name] = json.loads(text)
        except ValueError:
            continue
    if kind == 1 and fields:
        name = source.choice(sorted(fields))
        header["__metadata__"][name] = json.dumps(change_json(fields[name], source))
    else:
        header = change_json(header, source)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[end:]
