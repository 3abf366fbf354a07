# SPDX-License-Identifier: Apache-2.0
"""The plugin of vLLM-Omni: its BAGEL pipeline takes sparse checkpoints.

vLLM-Omni calls `register` in every process, because this package is an entry point of its group
`vllm_omni.general_plugins`. It puts `engines.vllm_omni_pipeline.SparseBagelPipeline` in the place
of the pipeline of that architecture; dense checkpoints load and run as before.
"""

from __future__ import annotations

import importlib

ARCHITECTURE = "BagelPipeline"
MODULE = "sparse_unified.engines.vllm_omni_pipeline"
CLASS = "SparseBagelPipeline"


def register() -> None:
    """Registers the pipeline; calling it again changes nothing.

    Raises:
        ImportError: vLLM-Omni is not installed, or too old to take pipelines from outside.
    """
    name = "vllm_omni.diffusion.registry"
    try:
        registry = importlib.import_module(name)
        register_diffusion_model = registry.register_diffusion_model
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"sparse_unified.engines: {name}.register_diffusion_model must be there "
            f"(vLLM-Omni 0.30 has it), got {error}"
        ) from error
    # The functions before and after it keep their names, which the module exports.
    register_diffusion_model(ARCHITECTURE, MODULE, CLASS)
