# SPDX-License-Identifier: Apache-2.0
"""Adapters to other projects; a page of docs/ each.

`vllm_omni` is a pipeline of vLLM-Omni, `diffusers` one of diffusers, `kernels` layers for the
package of that name, `transformers` experts of its models, `lmms_eval` a model for its tasks.
Each imports its engine, or needs it when it is used; none is imported here.
"""

from __future__ import annotations

import importlib
from typing import Any


def register_vllm_omni() -> None:
    """Puts our pipeline in the place of vLLM-Omni's BAGEL; calling it again changes nothing.

    vLLM-Omni calls this in every process: it is an entry point of `vllm_omni.general_plugins`.

    Raises:
        ImportError: vLLM-Omni is not installed, or too old to take pipelines from outside.
    """
    name = "vllm_omni.diffusion.registry"
    try:
        register = importlib.import_module(name).register_diffusion_model
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"sparse_unified.engines: {name}.register_diffusion_model must be there "
            f"(vLLM-Omni 0.30 has it), got {error}"
        ) from error
    # The functions before and after the pipeline keep their names, which the module exports.
    register("BagelPipeline", "sparse_unified.engines.vllm_omni", "BagelPipeline")
    reader = "OmniBagelForConditionalGeneration"
    models = importlib.import_module("vllm_omni.model_executor.models.registry").OmniModelRegistry
    models.register_model(reader, f"sparse_unified.engines.vllm_omni_reader:{reader}")


def lmms_eval_model() -> Any:
    """Names our model to lmms-eval: an entry point of `lmms_eval.models`."""
    manifest = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest
    name = "sparse_unified_bagel"
    return manifest(name, simple_class_path="sparse_unified.engines.lmms_eval.SparseUnifiedBagel")
