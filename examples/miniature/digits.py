# SPDX-License-Identifier: Apache-2.0
"""The 1797 handwritten digits of scikit-learn: real images of 8 x 8 pixels.

Source: `sklearn.datasets.load_digits`, the test part of the UCI data set "Optical Recognition of
Handwritten Digits" (E. Alpaydin, C. Kaynak).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import optional

SIZE = 8
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "which digit ?"
_HELD_OUT = 6  # every sixth image is never trained on


def prompt_of(digit: int) -> str:
    """Returns what a digit is asked for by."""
    return f"the digit {NAMES[digit]}"


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor]:
    """Returns the pixels [1797, 3, 8, 8] fp32 in [-1, 1], all channels alike, and digits [1797]."""
    data = optional("sklearn.datasets", extra="mini").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def split() -> tuple[Tensor, Tensor]:
    """Returns the indices of the images to train on, [1497], and of those to test on, [300]."""
    index = torch.arange(len(load()[1]))
    return index[index % _HELD_OUT > 0], index[index % _HELD_OUT == 0]


@lru_cache(maxsize=1)
def _judge() -> Any:
    """Returns a support vector classifier that has seen the training images."""
    pixels, digits = load()
    train = split()[0]
    classifier = optional("sklearn.svm", extra="mini").SVC(gamma=0.02, C=10.0)
    return classifier.fit(pixels[train, 0].flatten(1).numpy(), digits[train].numpy())


def recognise(pictures: Tensor) -> Tensor:
    """Tells which digits pictures [N, 3, 8, 8] in [-1, 1] show, by a classifier: [N] int64."""
    grey = pictures.float().clamp(-1, 1).mean(dim=1).flatten(1)
    return torch.from_numpy(_judge().predict(grey.numpy()))


def frechet_distance(pictures: Tensor) -> float:
    """Returns the Frechet distance of pictures [N, 3, 8, 8] from the training images.

    Both sets are taken as normal distributions over their 64 grey values in [-1, 1]:
    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)). It depends on N; compare equal N only.
    """
    pixels, _ = load()
    real = pixels[split()[0], 0].flatten(1).double()
    made = pictures.double().clamp(-1, 1).mean(dim=1).flatten(1)
    covariances = real.T.cov(), made.T.cov()
    # tr((S S')^(1/2)): the square roots of the eigenvalues of S^(1/2) S' S^(1/2).
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((real.mean(0) - made.mean(0)).square().sum() + traces - 2 * cross)


def score(asked: Sequence[int], pictures: Tensor) -> dict[str, float]:
    """Scores pictures [N, 3, 8, 8]: the share that shows the digit asked for, and `frechet`.

    Raises:
        ValueError: there is not one picture for each digit asked for.
    """
    if len(asked) != len(pictures) or not len(asked):
        raise ValueError(
            f"score: pictures must be one for each of {len(asked)} digits, got {len(pictures)}"
        )
    right = recognise(pictures) == torch.tensor(list(asked))
    return {"overall": float(right.double().mean()), "frechet": frechet_distance(pictures)}
