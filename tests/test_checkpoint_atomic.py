# SPDX-License-Identifier: Apache-2.0
"""A target is absent or complete, whatever interrupts the run that writes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import make_dense, snapshot
from refusals import refused
from safetensors.torch import save_file

from sparse_unified.checkpoint import (
    Checkpoint,
    PruneWidthConfig,
    convert,
    files,
    invert,
    prune,
    verify,
)
from sparse_unified.checkpoint.files import MARKER, atomic_directory, partial_path


def sparsify(dense: Path, out: Path) -> None:
    convert(dense, out, num_experts=4, top_k=2)


def test_weights_are_on_the_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, synced, sync = make_dense(tmp_path / "dense"), set(), os.fsync

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)  # which a rename keeps
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    sparsify(dense, tmp_path / "out")
    written = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
    assert written
    assert {path.stat().st_ino for path in written} <= synced


def test_what_a_killed_run_left_is_removed_with_a_message(tmp_path: Path, caplog: Any) -> None:
    dense = make_dense(tmp_path / "dense")
    partial = partial_path(tmp_path / "out")
    content = partial / "out"
    (content / "sub").mkdir(parents=True)
    (partial / MARKER).touch()
    (content / "sub" / "x").write_text("left")
    (content / "ema.safetensors").write_text("left")
    (content / "link").symlink_to(dense)
    sparsify(dense, tmp_path / "out")
    assert f"removing what an interrupted run left in {partial}" in caplog.text
    assert not partial.exists()
    assert not (tmp_path / "out" / "link").exists()
    assert not list((tmp_path / "out").rglob(MARKER))
    assert (dense / "ema.safetensors").exists()


@pytest.mark.parametrize("marked", [False, True], ids=["foreign", "marked"])
@pytest.mark.parametrize("place", ["itself", "below", "linked", "link", "scores"])
def test_inputs_where_the_target_is_written_are_refused_and_stay(
    place: str, marked: bool, tmp_path: Path
) -> None:
    source = make_dense(tmp_path / "dense")
    partial, out = partial_path(tmp_path / "out"), tmp_path / "out"
    scores = None
    if place == "itself":
        source = source.rename(partial)
    elif place in ("below", "linked"):
        partial.mkdir()
        source = source.rename(partial / "out")
        if place == "linked":
            (tmp_path / "name").symlink_to(source)
            source = tmp_path / "name"
    elif place == "link":
        partial.symlink_to(source)
    else:
        (partial / "out").mkdir(parents=True)
        scores = partial / "out" / "scores.safetensors"
        save_file({"scores": torch.rand(4, 96)}, scores)
    if marked:
        (partial / MARKER).touch()
    before = snapshot(tmp_path)
    refused(r"\.out\.partial", convert, source, out, num_experts=4, top_k=2, scores=scores)
    refused(r"\.out\.partial", prune, source, out, PruneWidthConfig(), scores=scores)
    if place != "scores":
        refused(r"\.out\.partial", invert, source, out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("left", ["directory", "file", "marked and more"])
def test_what_no_run_of_ours_left_is_not_removed(left: str, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    partial = partial_path(tmp_path / "out")
    if left == "file":
        partial.write_text("mine")
    else:
        partial.mkdir()
        (partial / "mine").write_text("mine")
        if left != "directory":
            (partial / MARKER).touch()
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"partial must be absent or left by an interrupted run"):
        sparsify(dense, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_two_runs_do_not_write_one_target(tmp_path: Path) -> None:
    dense, match = make_dense(tmp_path / "dense"), "must be written by one run at a time"
    with atomic_directory(tmp_path / "out"):
        refused(match, sparsify, dense, tmp_path / "out", error=RuntimeError)


def test_an_existing_target_is_refused_and_left_alone(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    sparsify(dense, tmp_path / "sparse")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    for name in ("empty", "broken", "sparse", "dense"):
        for run in (
            lambda out: sparsify(dense, out),
            lambda out: invert(tmp_path / "sparse", out),
            lambda out: prune(dense, out, PruneWidthConfig()),
        ):
            refused("target must", run, tmp_path / name)
    assert snapshot(tmp_path) == before


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="target must not exist"),
        atomic_directory(tmp_path / "out"),
    ):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_another_run_has_just_made_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lock = tmp_path / "out", files._lock

    def lock_late(*how: Any) -> None:
        out.mkdir()
        lock(*how)

    monkeypatch.setattr(files, "_lock", lock_late)
    with pytest.raises(ValueError, match="must not exist"), atomic_directory(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_without_a_parent_or_inside_the_source_is_refused(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    refused(r"parent of .* must be a directory", sparsify, dense, tmp_path / "a" / "b")
    refused("target must lie outside", sparsify, dense, dense / "sparse")
    refused("target must lie outside", prune, dense, dense / "out", PruneWidthConfig())


def test_a_disk_known_to_be_full_is_refused_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    dense = make_dense(tmp_path / "dense")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match=r"must have .* bytes free, got 1,000"):
        sparsify(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_links_of_a_hub_cache_are_followed(tmp_path: Path, caplog: Any) -> None:
    real = make_dense(tmp_path / "blobs")
    linked = tmp_path / "snapshots" / "1"
    for name in snapshot(real):
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        (linked / name).symlink_to(real / name)
    sparsify(linked, tmp_path / "a")
    assert not caplog.records
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))
    invert(tmp_path / "a", tmp_path / "b")
    assert snapshot(tmp_path / "b") == snapshot(real)


def test_links_out_of_a_directory_are_told_and_those_to_directories_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = make_dense(tmp_path / "dense")
    (tmp_path / "key").write_text("KEY")
    (dense / "notes").symlink_to(tmp_path / "key")
    sparsify(dense, tmp_path / "a")
    assert "links lead out of the directory: notes -> /" in caplog.text
    for name, target, match in (
        ("inside", dense / "tokenizer", "inside must be .* got a link to a directory"),
        ("gone", tmp_path / "nowhere", "gone must be readable"),
        ("pipe", None, "pipe must be a file or a directory"),
    ):
        if target is None:
            os.mkfifo(dense / name)
        else:
            (dense / name).symlink_to(target)
        refused(match, sparsify, dense, tmp_path / "b")
        (dense / name).unlink()


def test_what_is_private_stays_private(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    for path, mode in ((dense, 0o500), (dense / "ae.safetensors", 0o400)):
        path.chmod(mode)
    (dense / "llm_config.json").chmod(0o640)
    (dense / "ema.safetensors").chmod(0o604)
    sparsify(dense, tmp_path / "out")
    found = {
        path.name: path.stat().st_mode & 0o777
        for path in (tmp_path / "out", *(tmp_path / "out").iterdir())
    }
    assert found["out"] == 0o700
    assert found["ae.safetensors"] == 0o600
    assert found["llm_config.json"] == 0o640
    assert found["ema.safetensors"] == 0o604


@pytest.mark.parametrize("path", [b"x", 3, None, "a\0b"])
def test_what_is_no_path_is_refused_in_words(path: Any, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    for run in (lambda: Checkpoint(path), lambda: sparsify(dense, path)):
        refused(r"must .*got", run, error=(TypeError, ValueError))


def replace_by_rename(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


CHANGES: dict[str, Callable[[Path, bytes], object]] = {
    "replaced": replace_by_rename,
    "rewritten": lambda path, data: path.write_bytes(data),
    "cut short": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "removed": lambda path, data: path.unlink(),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    dense = make_dense(root / "dense", num_shards=2)
    sparsify(dense, root / "sparse")
    return {"dense": dense, "sparse": root / "sparse"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "llm_config.json"])
@pytest.mark.parametrize(
    ("operation", "moment"),
    [
        *(("convert", moment) for moment in (0.05, 0.5, 0.95)),
        *((operation, 0.5) for operation in ("prune", "invert", "verify", "against")),
    ],
)
def test_a_source_that_changes_while_it_is_read_is_refused(
    operation: str, name: str, moment: float, change: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    dense = Path(shutil.copytree(sources["dense"], tmp_path / "dense"))
    sparse = Path(shutil.copytree(sources["sparse"], tmp_path / "sparse"))
    path = (sparse if operation in ("invert", "verify") else dense) / name
    done = []

    def progress(read: int, total: int) -> None:
        if read >= moment * total and not done:
            done.append(path.stat())
            data = path.read_bytes()
            CHANGES[change](path, data[:-1] + bytes([data[-1] ^ 1]))

    out, how = tmp_path / "out", {"progress": progress}
    run: dict[str, Callable[[], object]] = {
        "convert": lambda: convert(dense, out, num_experts=4, top_k=2, **how),
        "prune": lambda: prune(dense, out, PruneWidthConfig(), **how),
        "invert": lambda: invert(sparse, out, **how),
        "verify": lambda: verify(sparse, dense, **how),
        "against": lambda: verify(sparse, dense, **how),
    }
    refused(rf"{name}.* must .*got", run[operation], error=(ValueError, RuntimeError))
    assert done
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "sparse"}
