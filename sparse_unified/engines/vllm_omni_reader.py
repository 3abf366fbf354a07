# SPDX-License-Identifier: Apache-2.0
"""The model that reads texts and images in vLLM-Omni's two-stage deployment of BAGEL."""

from __future__ import annotations

import importlib
from typing import Any

from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.engines.vllm_omni import WithExperts

_built_in = importlib.import_module("vllm_omni.model_executor.models.bagel.bagel")


class OmniBagelForConditionalGeneration(
    WithExperts,
    _built_in.OmniBagelForConditionalGeneration,  # type: ignore[name-defined]
):
    """That of vLLM-Omni, with sparse generation FFNs, which see latents of images to edit."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config
        directory = find_model(config.model, revision=config.revision, where="sparse_unified")
        self.put_in_blocks(Checkpoint(directory))
