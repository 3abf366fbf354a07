# SPDX-License-Identifier: Apache-2.0
"""What is counted of a FFN, and of which model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unified.surgery.decoder import find_adapter

_SAMPLED = 256  # values of each weight that its hash looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsConfig:
    """What is counted.

    Args:
        threshold: a neuron fires on a token when |h| is above.
        active_fraction: the active set of a sample is this share of the neurons, those of the
            largest mean |h|.
        num_time_ranges: R, into how many ranges the times of denoising are cut.
        num_inputs: of how many tokens of a task, drawn at random, the input of each FFN is kept.

    Raises:
        ValueError: a value is out of range.
    """

    threshold: float = 0.1
    active_fraction: float = 0.25
    num_time_ranges: int = 4
    num_inputs: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.threshold) and 0 <= self.threshold < math.inf):
            raise ValueError(
                f"calibrate: threshold must be finite and at least 0, got {self.threshold!r}"
            )
        if not (_is_number(self.active_fraction) and 0 < self.active_fraction < 1):
            raise ValueError(
                "calibrate: active_fraction must be above 0 and below 1, "
                f"got {self.active_fraction!r}"
            )
        if type(self.num_time_ranges) is not int or self.num_time_ranges < 1:
            raise ValueError(
                "calibrate: num_time_ranges must be an integer of at least 1, "
                f"got {self.num_time_ranges!r}"
            )
        if type(self.num_inputs) is not int or self.num_inputs < 0:
            raise ValueError(
                f"calibrate: num_inputs must be an integer of at least 0, got {self.num_inputs!r}"
            )

    @property
    def num_ranges(self) -> int:
        """R + 1, the range without a time among them."""
        return self.num_time_ranges + 1

    def range_of(self, time: float | None) -> int:
        """Returns the range of a time from 0 to 1, or of tokens without one."""
        return 0 if not time else min(math.ceil(time * self.num_time_ranges), self.num_time_ranges)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSums:
    """Sums of one FFN of I neurons on one task, over R + 1 ranges and S samples.

    Attributes:
        tokens: [R + 1] int64.
        sum_abs, sum_squares, num_fired: [R + 1, I] fp64, of |h|, of h^2, of the tokens that fire.
        sample_tokens: [S, R + 1] int64.
        active: [S, R + 1, ceil(I / 8)] uint8, the active set of each sample, a bit per neuron.
        inputs: [n, D] bf16, what the FFN was given on the n tokens that are kept.
        input_draws: [n] int64, ascending: what those were drawn by, the lowest of all tokens.
    """

    tokens: Tensor
    sum_abs: Tensor
    sum_squares: Tensor
    num_fired: Tensor
    sample_tokens: Tensor
    active: Tensor
    inputs: Tensor
    input_draws: Tensor

    @property
    def intermediate_size(self) -> int:
        return self.sum_abs.shape[1]


TENSORS: Mapping[str, torch.dtype] = {
    "tokens": torch.int64,
    "sum_abs": torch.float64,
    "sum_squares": torch.float64,
    "num_fired": torch.float64,
    "sample_tokens": torch.int64,
    "active": torch.uint8,
    "inputs": torch.bfloat16,
    "input_draws": torch.int64,
}
# Of files that keep no inputs, as those of earlier versions, these are not there.
INPUT_TENSORS = ("inputs", "input_draws")


def hash_ffns(model: object, component: str) -> str:
    """Returns a hash of the FFN weights of one component, 16 hex digits.

    Of every weight it takes the shape and evenly spaced values, rounded to bf16, so that a model
    has one hash whether it was loaded in fp32 or bf16; it reads little, and two models that differ
    in a few values alone may have the same.

    Args:
        model: a model, pipeline or adapter.
    """
    return hash_samples(
        (ffn.key, [_sample(weight) for weight in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)])
        for ffn in find_adapter(model).ffns(component)
    )


def hash_samples(ffns: Iterable[tuple[object, Sequence[tuple[list[int], Tensor]]]]) -> str:
    """Returns what `hash_ffns` does, of (key, (shape, sampled values) of each weight)."""
    digest = hashlib.sha256()
    for key, weights in ffns:
        digest.update(f"{key!r}".encode())
        for shape, values in weights:
            digest.update(f" {shape}".encode())
            rounded = values.bfloat16().cpu().view(torch.int16)
            digest.update(rounded.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def sample_step(count: int) -> int:
    """Returns how far apart the values lie that a hash looks at, of a weight of `count`."""
    return max(1, count // _SAMPLED)


def _sample(weight: Tensor) -> tuple[list[int], Tensor]:
    flat = weight.reshape(-1)
    return list(weight.shape), flat[:: sample_step(flat.numel())]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
