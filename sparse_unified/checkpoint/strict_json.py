# SPDX-License-Identifier: Apache-2.0
"""JSON from files that somebody else wrote: what has two readings, or none, is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def loads(text: str, *, finite: bool = False) -> Any:
    """Parses JSON text with distinct keys, moderate nesting, and strings that can be encoded.

    Args:
        finite: refuse NaN and infinities, which Python's json writes and no standard knows.

    Raises:
        ValueError: the text is something else; the message is the reason alone.
    """
    refuse = _refuse if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=refuse)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half of a surrogate pair, {error.object[error.start]!r:.120}"
            ) from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r:.80} twice")
            seen.add(key)
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"the number {constant}")
