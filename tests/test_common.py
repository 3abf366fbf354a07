# SPDX-License-Identifier: Apache-2.0
"""What all parts share: imports of extras, names in front of errors, progress bars, reports."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass

import pytest

from sparse_unified._common import Report, context, list_some, progress_bar


def test_lists_are_cut_short() -> None:
    assert list_some(range(3)) == "0, 1, 2"
    assert list_some("abcd", 2) == "a, b and 2 more"
    assert list_some([]) == "none"


class Special(ValueError):
    pass


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, Special])
def test_context_names_an_error_once_and_keeps_its_kind(kind: type[Exception]) -> None:
    cause = KeyError("x")
    for text in ("n must be 1, got 2", "file: n must be 1, got 2"):
        error = kind(text)
        with pytest.raises(kind) as caught, context("outer"), context("file"):
            raise error from cause
        assert caught.value is error
        assert str(error) == "file: n must be 1, got 2"
        assert error.__cause__ is cause


def test_context_names_errors_that_write_their_own_text_and_leaves_others_alone() -> None:
    with pytest.raises(ValueError, match=r"^file: 'utf-8' codec") as caught, context("file"):
        b"\xff".decode()
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)
    with pytest.raises(KeyError, match=r"^'x'$"), context("file"):
        raise KeyError("x")


def test_a_progress_bar_counts_and_takes_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("work", "step") as advance:
        advance(1, 2)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    with progress_bar("work", "step", show=True) as advance:
        advance(1, 2)
        advance(2, 2, "loss 3")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "work: 100%" in shown
    assert "2/2" in shown
    assert "loss 3" in shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner(Report):
    size: int
    derived = ("double",)
    double = property(lambda self: 2 * self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(Report):
    out: str
    inner: Inner

    def title(self) -> str:
        return f"wrote {self.out}"

    def headings(self) -> list[str]:
        return ["what", "n"]

    def table(self) -> list[tuple[object, ...]]:
        return [("size", self.inner.size)]

    def notes(self) -> list[str]:
        return ["done"]


def test_a_report_gives_dict_json_and_text() -> None:
    report = Outer(out="x", inner=Inner(size=12))
    assert report.to_dict() == {"out": "x", "inner": {"size": 12, "double": 24}}
    assert json.loads(report.to_json()) == report.to_dict()
    assert str(report) == "wrote x\nwhat  n\n----  --\nsize  12\n\ndone"
    assert report.inner.to_text() == "size  12"
