# SPDX-License-Identifier: Apache-2.0
"""What a pipeline hands back: pictures or text, and what it took."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_unified.bagel.model import Bagel
from sparse_unified.nn import SparseMoE

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(slots=True, kw_only=True)
class Report:
    """Seconds, tokens and memory of one call.

    Attributes:
        context_tokens: tokens read before the output, over all contexts.
        image_tokens: latent tokens generated.
        text_tokens: text tokens generated.
        steps: denoising steps, of all batches; step_seconds: of each of them.
        computed_steps: those in which the model ran; a step cache extrapolates the others.
        prefill_seconds, text_seconds, decode_seconds: reading the context, writing text, and
            turning latents into pixels.
        total_seconds: of the whole call.
        backend: what runs the sparse FFNs; "dense" without one.
        peak_memory_bytes: on a GPU the most allocated during the call, on the CPU the most
            resident memory the process ever had.
    """

    device: str
    dtype: str
    backend: str
    context_tokens: int = 0
    image_tokens: int = 0
    text_tokens: int = 0
    steps: int = 0
    computed_steps: int = 0
    step_seconds: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    text_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of a denoising step; 0 without steps."""
        return median(self.step_seconds) if self.step_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {**asdict(self), "seconds_per_step": self.seconds_per_step}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """Generated images.

    Attributes:
        images: pictures, one per prompt.
        latents: latent tokens [N, p * p * C] fp32 of each, before decoding, on the CPU.
        thoughts: the text each was planned with; None without thinking.
        seeds: the seed of each.
        sizes: height and width of each, in pixels.
        report: what it took.
    """

    images: list[Image]
    latents: list[Tensor]
    thoughts: list[str] | None
    seeds: list[int]
    sizes: list[tuple[int, int]]
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResult:
    """Generated text, its token ids (bos first, without eos), and what it took."""

    text: str
    token_ids: list[int]
    report: Report

    def __str__(self) -> str:
        return self.text


def backend_of(model: nn.Module) -> str:
    """Returns what runs the sparse FFNs of a model; "dense" without one."""
    backends = {m.active_backend for m in model.modules() if isinstance(m, SparseMoE)}
    return ", ".join(sorted(backends)) or "dense"


def start_report(model: Bagel) -> Report:
    """Starts counting; on a GPU the peak is that of this call."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    return Report(
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        backend=backend_of(model),
    )


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes, see `Report`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
