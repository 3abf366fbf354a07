# SPDX-License-Identifier: Apache-2.0
"""A model of lmms-eval: its tasks on dense, pruned and sparse BAGEL, in text and in images."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.model import lmms
from tqdm import tqdm

from sparse_unified._common import optional
from sparse_unified.bagel import BagelPipeline, SamplingConfig

MODES = ("understanding", "generation")
_TAG = re.compile(r"<image(?: \d+)?>")


class SparseUnifiedBagel(lmms):
    """`lmms_eval --model sparse_unified_bagel --model_args pretrained=DIR,...`.

    Args:
        pretrained: a model directory or hub id.
        mode: "understanding" answers in text; "generation" draws an image, or edits those of the
            request, and answers with the JSON {"text", "images"} that lmms-eval's tasks read.
        think: let the model plan or reason first.
        device: where the model goes; with several processes, each has a GPU of its own.
        dtype: of the weights, "bfloat16"; None is that of the files.
        batch_size: images drawn together. max_batch_size: not looked at.
        output_dir: where images are written.
        seed: of an image the sum of this and its number in the task.
        size: side of an image in pixels; None is the official choice.
        options: fields of `SamplingConfig` and arguments of `BagelPipeline.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: str,
        mode: str = "understanding",
        think: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        output_dir: str = "sparse_unified_images",
        seed: int = 0,
        size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(
                f"sparse_unified_bagel: mode must be one of {', '.join(MODES)}, got {mode!r}"
            )
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self._world_size > 1 and torch.device(chosen).type == "cuda":
            chosen = f"cuda:{state.local_process_index}"
        self.device = torch.device(chosen)
        self.mode, self.think, self.seed = mode, think, seed
        self.size = None if size is None else (size, size)
        self.batch_size, self.output_dir = int(batch_size), Path(output_dir)
        of_sampling = {field.name for field in dataclasses.fields(SamplingConfig)}
        self.sampling = {name: value for name, value in options.items() if name in of_sampling}
        placing = {name: value for name, value in options.items() if name not in of_sampling}
        self.pipeline = BagelPipeline.from_pretrained(
            pretrained,
            device=self.device,
            dtype=None if dtype is None else getattr(torch, dtype),
            **placing,
        )

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Returns the answer to each request, in order."""
        step = self.batch_size if self.mode == "generation" else 1
        run = self._draw if self.mode == "generation" else self._answer
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self._rank != 0, desc=self.mode) as bar:
            for first in range(0, len(requests), step):
                answers += run(requests[first : first + step])
                bar.update(len(answers) - bar.n)
        return answers

    def _answer(self, requests: list[Any]) -> list[str]:
        [request] = requests
        text, images = self._read(request)
        wanted = request.args[1]
        temperature = wanted.get("temperature") or 0
        answer = self.pipeline.chat(
            text,
            images=images,
            max_length=1 + int(wanted.get("max_new_tokens", 1000)),
            temperature=temperature if wanted.get("do_sample", temperature > 0) else None,
            seed=self.seed,
            think=self.think,
        ).text
        until = wanted.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answer = answer.partition(stop)[0] if stop else answer
        return [answer]

    def _draw(self, requests: list[Any]) -> list[str]:
        read = [self._read(request) for request in requests]
        numbers = [request.args[3] for request in requests]
        result = self.pipeline.generate(
            [text for text, _ in read],
            images=[images or None for _, images in read],
            seed=[self.seed + (n if type(n) is int else i) for i, n in enumerate(numbers)],
            size=self.size,
            think=self.think,
            progress=False,
            **self.sampling,
        )
        thoughts = result.thoughts or [""] * len(read)
        answers = []
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for request, image, thought in zip(requests, result.images, thoughts, strict=True):
            _, _, _, number, task, _ = request.args
            path = self.output_dir / f"{re.sub(r'[^-.A-Za-z0-9]', '_', f'{task}_{number}')}.png"
            image.save(path)
            answers.append(json.dumps({"text": thought, "images": [str(path)]}, ensure_ascii=False))
        return answers

    def _read(self, request: Any) -> tuple[str, list[Any]]:
        """Returns text and images of a request; images come first, as BAGEL was trained."""
        text, _, to_visual, number, task, split = request.args
        found = to_visual(self.task_dict[task][split][number]) or []
        open_image = optional("PIL.Image").open
        images = [open_image(own) if isinstance(own, str) else own for own in found]
        return _TAG.sub("", text).strip(), images

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: tasks of BAGEL's evaluation generate."""
        raise NotImplementedError("sparse_unified_bagel: a task must ask for generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raises NotImplementedError, likewise."""
        raise NotImplementedError("sparse_unified_bagel: a task must ask for generate_until")
