# SPDX-License-Identifier: Apache-2.0
"""Replays recorded cases through the public API, so that anyone can compare it with a recording.

A case is `NAME.json` (configuration) and `NAME.safetensors` (weights under `model.*`, inputs, and
perhaps the recorded outputs, which are not looked at).
"""

from sparse_unified.testing.cases import Case, read_case
from sparse_unified.testing.models import build_model, build_vae
from sparse_unified.testing.runs import replay

__all__ = ["Case", "build_model", "build_vae", "read_case", "replay"]
