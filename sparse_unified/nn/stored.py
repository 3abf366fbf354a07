# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored in fewer bits than they compute in."""

from __future__ import annotations

from torch import Tensor


def is_packed(weight: Tensor) -> bool:
    """Tells whether a weight is a tensor subclass that stores less and unpacks itself."""
    return type(weight).dequantize is not Tensor.dequantize


def unpacked(weight: Tensor) -> Tensor:
    """Returns a weight as a plain tensor: itself, or what a packed one unpacks to for one call."""
    return weight.dequantize() if is_packed(weight) else weight
