# SPDX-License-Identifier: Apache-2.0
"""Image folders as the official GenEval scorer reads them.

    NNNNN/metadata.jsonl      one object: tag, include, perhaps exclude, prompt
    NNNNN/samples/NNNNN.png   images of that prompt, counted from 00000

NNNNN counts the lines of the metadata file. The scorer is `evaluation/evaluate_images.py` of
djghosh13/geneval (it skips folders whose name is no number, and images that are not `\\d+.png`).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_unified.analysis.bagel_task import Settings
from sparse_unified.analysis.evaluators import directions
from sparse_unified.analysis.samples import read_lines, read_object
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint.files import replace_file


def read_metadata(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a GenEval metadata file, such as its `prompts/evaluation_metadata.jsonl`."""
    entries = []
    for where, line in read_lines(path, "--geneval"):
        entry = read_object(line, where)
        for name, kind in (("prompt", str), ("tag", str), ("include", list)):
            if not isinstance(entry.get(name), kind) or not entry[name]:
                raise ValueError(f"{where}: {name} must be given, got {entry.get(name)!r:.120}")
        entries.append(entry)
    if not entries:
        raise ValueError(f"--geneval: {path} must hold at least one prompt, got none")
    return entries


def write_geneval(
    pipeline: BagelPipeline,
    metadata: list[dict[str, Any]],
    out: str | os.PathLike[str],
    *,
    num_images: int = 4,
    seed: int = 0,
    settings: Settings | None = None,
) -> Path:
    """Generates the images of every prompt into the folders that the official scorer reads.

    Image i of a prompt has the seed `seed` + i, so that models are compared at equal noise. Prompts
    that an interrupted run has completed are kept. Returns `out`.

    Args:
        pipeline: the model.
        metadata: of `read_metadata`.
        out: the folder of the folders; made if it is not there.
        num_images: per prompt.
        seed: of the first image of each prompt.
        settings: size and steps.
    """
    sampling = (settings or Settings()).sampling()
    out = Path(out)
    for index, entry in enumerate(metadata):
        samples, described = out / f"{index:05}" / "samples", out / f"{index:05}" / "metadata.jsonl"
        files = [samples / f"{i:05}.png" for i in range(num_images)]
        text = json.dumps(entry).encode()
        is_same = described.is_file() and described.read_bytes() == text
        if is_same and all(file.is_file() for file in files):
            continue
        samples.mkdir(parents=True, exist_ok=True)
        described.unlink(missing_ok=True)
        seeds = [(seed + i) % 2**63 for i in range(num_images)]
        images = pipeline.generate([entry["prompt"]] * num_images, seed=seeds, **sampling).images
        for file, image in zip(files, images, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            replace_file(file, buffer.getvalue())
        replace_file(described, text)  # last, so that a folder with its metadata is complete
    return out


class GenEvalImages:
    """An evaluator that writes the images of every point of a sweep, and may score them.

    Args:
        metadata: of `read_metadata`.
        out: holds one folder per point.
        scorer: a function from such a folder to numbers by name, with `better` as an evaluator has
            it; None only writes the images, for the official scorer to be run on them.
        options: more of `write_geneval`.
    """

    def __init__(
        self,
        metadata: list[dict[str, Any]],
        out: str | os.PathLike[str],
        scorer: Callable[[Path], Mapping[str, float]] | None = None,
        **options: Any,
    ) -> None:
        self.metadata, self.scorer, self.options = metadata, scorer, options
        self.out = self.folder = Path(out)
        self.better = {"geneval_images": "higher"}
        if scorer is not None:
            self.better = directions(scorer, where="GenEvalImages: scorer")

    def begin(self, point: str) -> None:
        """Names the folder of the images that follow."""
        self.folder = self.out / point

    def __call__(self, pipeline: BagelPipeline) -> Mapping[str, float]:
        write_geneval(pipeline, self.metadata, self.folder, **self.options)
        if self.scorer is not None:
            return self.scorer(self.folder)
        return {"geneval_images": len(list(self.folder.glob("*/samples/*.png")))}
