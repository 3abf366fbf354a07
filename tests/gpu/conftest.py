# SPDX-License-Identifier: Apache-2.0
"""Checks of a GPU are collected where one is; a deep run tries them on the CPU too."""

from __future__ import annotations

import torch
from tiers import IS_DEEP

collect_ignore = [] if torch.cuda.is_available() or IS_DEEP else ["test_gpu.py"]
