# SPDX-License-Identifier: Apache-2.0
"""Loads the C++ library, which registers `torch.ops.sparse_unified`."""

from __future__ import annotations

import importlib

import torch  # first, since our library links against torch's

try:
    module = importlib.import_module("sparse_unified._C")
except ImportError as error:
    raise ImportError(
        "sparse_unified: the C++ library must be built for this interpreter and torch "
        f"{torch.__version__} (pip install --no-build-isolation . in the source tree), got: {error}"
    ) from error
