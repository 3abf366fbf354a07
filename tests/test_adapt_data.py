# SPDX-License-Identifier: Apache-2.0
"""Records from folders and shards, and the training sequences made of them."""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import picture, records, write_folder, write_parquet
from refusals import refused
from torch import Tensor

from sparse_unified.adapt import RunConfig, SequenceConfig
from sparse_unified.adapt import records as adapt_records
from sparse_unified.adapt.data import ImageDataset, ImageStream, generation_sequence
from sparse_unified.adapt.records import open_records, open_stream
from sparse_unified.analysis.samples import Task
from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.packing import LatentSegment, TextSegment, VitSegment

GENERATION, EDITING, UNDERSTANDING = Task.GENERATION, Task.EDITING, Task.UNDERSTANDING
TASKS = [(GENERATION,), (GENERATION, UNDERSTANDING)] * 2 + [(EDITING,), (GENERATION, UNDERSTANDING)]


@pytest.fixture(scope="module")
def pipeline(golden: Any) -> BagelPipeline:
    return BagelPipeline.from_pretrained(golden("t2i_moe"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dataset_of(
    pipeline: BagelPipeline, data: Path, cache: Path | None = None, **options: Any
) -> ImageDataset:
    return ImageDataset(open_records(data), pipeline, RunConfig(**options), cache)


SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def write_tar(folder: Path, *, sources: bool = False) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number, record in enumerate(records()):
            texts = {k: record.get(k) for k in ("text", "question", "answer")}
            add(archive, f"{number:03}.png", record["image"])
            add(archive, f"{number:03}.json", json.dumps(texts).encode())
            if sources:
                add(archive, f"{number:03}.source.png", picture(10 + number))
    return folder


@pytest.mark.parametrize("write", [write_folder, write_parquet])
def test_folder_and_parquet_hold_the_same_records(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = open_records(write(tmp_path / "data"))
    assert found.tasks == TASKS
    record = found.read(5)
    assert record.pop("image").size == (40, 32)
    assert record == {"text": "picture 5", "question": "which number?", "answer": "5"}
    assert found.read(4)["source"].tobytes() == found.read(0)["image"].tobytes()


def test_tar_shards_are_read_by_their_pattern(tmp_path: Path) -> None:
    write_tar(tmp_path / "data")
    found = open_records(f"{tmp_path}/data/*.tar")
    # A kind of file that only some records have is none to the library, so here is no source.
    assert found.tasks[:4] == TASKS[:4]
    assert found.read(1)["answer"] == "1"
    assert found.read(1)["image"].size == (40, 32)
    edits = open_records(write_tar(tmp_path / "edits", sources=True))
    assert edits.tasks[1] == (EDITING, UNDERSTANDING)
    assert edits.read(1)["source"].tobytes() != edits.read(1)["image"].tobytes()


def listed(line: str) -> dict[str, bytes]:
    """Files of a list with this second line."""
    lines = '{"image": "0.png", "text": "fine"}\n' + line
    return {"0.png": picture(0), "d.jsonl": lines.encode()}


def shard(kind: str) -> dict[str, bytes]:
    """Files of a shard whose second member is damaged."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        add(archive, "0.txt", b"a text")
        add(archive, f"0.{kind}", b"[" * 100_000)
    return {"0.tar": stream.getvalue()}


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ({}, "--data: .* must hold .parquet or .tar shards"),
        ({"x.png": picture(0)}, "--data: .* must hold .parquet or .tar shards"),
        ({"x.parquet": b"none"}, "--data: .*x.parquet .* must be readable parquet shards"),
        ({"x.tar": b"none"}, "--data: .*x.tar .* must be readable webdataset shards"),
        *((shard(kind), r"--data: .*0.tar .* must|record") for kind in ("pth", "npy", "json")),
        *((shard(kind), r"--data: .*0.tar .* must|record") for kind in ("mp4", "png")),
        ({"a.jsonl": b"", "b.jsonl": b""}, "must hold one .jsonl file, got 2"),
        ({"x.txt": b"\xff", "x.png": picture(0)}, "x.txt: file must be UTF-8"),
        ({"x.txt": b"a caption", "x.png": b"none"}, "x.png: .* must be a readable image"),
        (listed("[1]"), "d.jsonl: line 2 must be a JSON object"),
        (listed('{"image": "none.png", "text": "x"}'), "line 2: image must be a file, got .*none"),
        (listed('{"image": "0.png"}'), "line 2: record must have text, or question and answer"),
        (listed('{"text": "x"}'), "line 2: record must have an image"),
        (listed('{"image": "0.png", "text": 3}'), "line 2: text must be a text, got 3"),
        (listed('{"image": "0.png", "text": " "}'), "line 2: text must be a text, got ' '"),
    ],
)
def test_data_that_is_none_is_refused(files: dict[str, bytes], rule: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    data = tmp_path if files else tmp_path / "nothing"
    refused(rule, lambda: open_records(data).read(0))


@pytest.mark.parametrize("image", [7, [1, 2], {"bytes": None, "path": "{png}"}, "{png}"])
def test_images_of_shards_are_bytes_and_no_paths(image: Any, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "0.png").write_bytes(picture(0))
    image = json.loads(json.dumps(image).replace("{png}", str(tmp_path / "0.png")))
    rows = datasets.Dataset.from_dict({"image": [image], "text": ["x"]})
    rows.to_parquet(tmp_path / "0.parquet")
    refused(r"record 0: image must be held as its bytes, got", open_records(tmp_path).read, 0)


def test_damaged_records_are_skipped_up_to_a_limit(
    pipeline: BagelPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_folder(tmp_path / "data")
    for number in (1, 2):
        (data / f"{number}-image.png").write_bytes(b"damaged")
    dataset = dataset_of(pipeline, data, max_damaged=2)

    def drawn(index: int) -> list[Any]:
        sequence = dataset.sequence(index, torch.Generator().manual_seed(0))
        return [part.token_ids for part in sequence if isinstance(part, TextSegment)]

    # Samples 1 and 2 are of record 1, sample 3 of record 2; the next one that can be read is 4.
    assert drawn(1) == drawn(2) == drawn(3) == drawn(4) != drawn(0)
    assert sorted(dataset.damaged) == [1, 2]
    assert len(caplog.records) == 2
    refused(r"1-image.png.*; 2 of 6 are damaged", dataset.check)
    few = dataset_of(pipeline, data, max_damaged=1)
    refused(r"2-image.png.* 1 such records are skipped", few.sequence, 1, torch.Generator())


def test_sequences_hold_what_the_pipeline_would_show(
    pipeline: BagelPipeline, tmp_path: Path
) -> None:
    never = SequenceConfig(text_dropout=0, vit_dropout=0, vae_dropout=0)
    dataset = dataset_of(pipeline, write_folder(tmp_path / "data"), sequences=never)
    assert [task for _, task in dataset.samples] == [task for tasks in TASKS for task in tasks]
    draws = torch.Generator().manual_seed(0)
    number = [task for _, task in dataset.samples].index(EDITING)
    generation, answer, edit = (list[Any](dataset.sequence(n, draws)) for n in (0, 2, number))
    special = pipeline.tokenizer.special_tokens
    read = open_records(tmp_path / "data").read

    text, noised = generation
    ids = pipeline.tokenizer.encode("picture 0")
    assert list(text.token_ids) == [special.bos, *ids, special.eos]
    assert not text.predict
    seen = pipeline.image_processor.encode(read(0)["image"], vae=True)
    torch.testing.assert_close(noised.latent, seen.latent)
    assert 0 < noised.time < 1
    assert noised.noise.shape == noised.latent.shape

    assert [type(part) for part in answer] == [VitSegment, TextSegment, TextSegment]
    assert [part.predict for part in answer[1:]] == [False, True]
    look = pipeline.image_processor.encode(read(1)["image"], vae=False)
    torch.testing.assert_close(answer[0].pixels, look.vit_pixels)

    assert [type(part) for part in edit] == [LatentSegment, VitSegment, TextSegment, LatentSegment]
    assert edit[0].time is None


def test_latents_are_encoded_once_where_they_are_kept(
    pipeline: BagelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folder(tmp_path / "data")

    def latent(**options: Any) -> Tensor:
        dataset = dataset_of(pipeline, data, **options)
        last: Any = dataset.sequence(0, torch.Generator().manual_seed(0))[-1]
        return last.latent  # type: ignore[no-any-return]

    plain = latent()
    small = latent(tasks=[GENERATION], max_side=2 * pipeline.model.config.latent_downsample)
    assert max(small.shape[1:]) == 2 * pipeline.model.config.latent_patch_size
    assert torch.equal(latent(cache=tmp_path / "latents"), plain)
    monkeypatch.setattr(pipeline.vae, "encode", None)
    assert torch.equal(latent(cache=tmp_path / "latents"), plain)


def test_a_choice_that_leaves_nothing_is_refused(pipeline: BagelPipeline, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "0.txt").write_text("x")
    refused("--max-side: side must be at least", dataset_of, pipeline, tmp_path, max_side=1)
    with pytest.raises(ValueError, match="a record must be of use for editing, got none of 1"):
        dataset_of(pipeline, tmp_path, tasks=[EDITING])


def test_conditions_are_left_out_as_often_as_asked_and_change_no_other_draw() -> None:
    source = ContextImage(latent=torch.zeros(1, 2, 2), vit_pixels=torch.zeros(3, 2, 2))

    def drawn(draws: torch.Generator, **dropout: float) -> Any:
        config = SequenceConfig(**dropout)
        image = torch.zeros(1, 2, 2)
        return generation_sequence(SPECIAL, [7], image, draws, config, sources=[source])

    draws = torch.Generator().manual_seed(0)
    counts = {TextSegment: 0, VitSegment: 0, LatentSegment: 0}
    for _ in range(2000):
        for part in drawn(draws, text_dropout=0.25, vit_dropout=0.5, vae_dropout=0.75)[:-1]:
            counts[type(part)] += 1
    # Four standard deviations of a share of 2000 draws are at most 0.045.
    shares = [counts[kind] / 2000 for kind in (TextSegment, VitSegment, LatentSegment)]
    assert shares == pytest.approx([0.75, 0.5, 0.25], abs=0.045)

    always, never = (torch.Generator().manual_seed(5) for _ in range(2))
    first, second = drawn(always, text_dropout=0)[-1], drawn(never, text_dropout=1)[-1]
    assert first.time == second.time
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(always.get_state(), never.get_state())


def test_times_are_sigmoids_of_normal_numbers_shifted() -> None:
    def times(shift: float) -> Tensor:
        draws, config = torch.Generator().manual_seed(0), SequenceConfig(timestep_shift=shift)
        images: list[Any] = [
            generation_sequence(SPECIAL, [7], torch.zeros(1, 2, 2), draws, config)[-1]
            for _ in range(4000)
        ]
        return torch.tensor([image.time for image in images], dtype=torch.float64)

    plain = times(1.0)
    normal = torch.special.logit(plain)
    assert normal.mean().abs() < 4 / 4000**0.5
    assert (normal.std() - 1).abs() < 0.05
    torch.testing.assert_close(times(3.0), 3 * plain / (1 + 2 * plain))


def streamed(
    pipeline: BagelPipeline, data: Path, workers: int, step: int = 0, **options: Any
) -> tuple[ImageStream, Iterator[Any]]:
    run = RunConfig(streaming=True, workers=workers, **options)
    stream = ImageStream(open_stream(data), pipeline, run)
    return stream, stream.in_order(3, 4, range(4), step)


def texts(sequence: Any) -> list[Any]:
    return [part.token_ids for part in sequence if isinstance(part, TextSegment)]


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_a_stream_goes_on_where_it_was_left_and_every_epoch_holds_all_records(
    write: Callable[[Path], Path],
    pipeline: BagelPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapt_records, "_BLOCK", 4)
    data = write(tmp_path / "data")
    never = SequenceConfig(text_dropout=0)
    stream, order = streamed(pipeline, data, 2, sequences=never)
    found, kept = [], []
    for step in range(9):
        kept.append(json.loads(json.dumps(stream.place(4 * step))))
        found += [texts(sequence) for sequence in islice(order, 4)]
    whole = dataset_of(pipeline, data, sequences=never)
    wanted = [texts(whole.sequence(n, torch.Generator())) for n in range(len(whole))]
    epochs = [found[start : start + 9] for start in range(0, 36, 9)]
    for epoch in epochs:
        assert sorted(map(str, epoch)) == sorted(map(str, wanted))
    assert epochs[0] != epochs[1] != epochs[2]

    # It goes on from any of its places, which are plain values, and reads nothing before it.
    assert kept[0] is None
    assert len({str(place) for place in kept}) > 4
    for step, place in enumerate(kept[:7]):
        again, rest = streamed(pipeline, data, step % 2, step, sequences=never)
        again.go_on(place)
        assert [texts(sequence) for sequence in islice(rest, 8)] == found[4 * step :][:8]
    # So does every other process for its own places.
    part, _ = streamed(pipeline, data, 0, sequences=never)
    own = part.in_order(3, 4, [1, 2], 0)
    assert [texts(sequence) for sequence in islice(own, 4)] == [found[n] for n in (1, 2, 5, 6)]


def test_damaged_records_of_a_stream_are_skipped_up_to_a_limit(
    pipeline: BagelPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    images: list[Any] = [picture(number) for number in range(6)]
    images[1], words = b"damaged", [f"picture {number}" for number in range(6)]
    words[3] = " "
    rows = datasets.Dataset.from_dict({"image": images, "text": words})
    rows.to_parquet(tmp_path / "0.parquet")
    never = SequenceConfig(text_dropout=0)
    stream, order = streamed(pipeline, tmp_path, 2, sequences=never, max_damaged=2)
    found = [str(texts(sequence)) for sequence in islice(order, 5)]
    assert len(set(found)) == 4  # the first record stands for the one that cannot be read
    assert sorted(stream.damaged) == [1, 3]
    assert len(caplog.records) == 2
    refused("record 1: data: an image must be a readable .*; 2 of 6 are damaged", stream.check)
    _, order = streamed(pipeline, tmp_path, 2, max_damaged=1)
    refused("record .: .*; 1 such records are skipped", lambda: list(islice(order, 5)))

    _, none = streamed(pipeline, tmp_path, 0, tasks=[EDITING])
    refused("a record must be of use for editing, got none of 6", next, none)
    (tmp_path / "1.parquet").write_bytes(b"none")
    _, broken = streamed(pipeline, tmp_path, 0)
    refused("0.parquet and 1 more must be readable parquet shards", lambda: list(islice(broken, 9)))
    refused("must hold .parquet or .tar shards to be streamed", open_stream, tmp_path / "no")


def test_workers_decode_the_next_images_while_a_step_runs(
    pipeline: BagelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, in_step, decoded = (multiprocessing.get_context("fork").Event() for _ in range(3))
    original = adapt_records.open_image

    def open_late(*given: Any, **options: Any) -> Any:
        """The first image is there at once; the others wait until the step runs."""
        if opened.is_set():
            assert in_step.wait(60)
            decoded.set()
        opened.set()
        return original(*given, **options)

    monkeypatch.setattr(adapt_records, "open_image", open_late)
    dataset = dataset_of(pipeline, write_folder(tmp_path / "data"), workers=1)
    order = dataset.in_order(3, 1, [0], 0)
    next(order)
    # Here the step runs, in this process.
    assert not decoded.is_set()
    in_step.set()
    assert decoded.wait(60)
