# SPDX-License-Identifier: Apache-2.0
"""BAGEL, dense and sparse: text to image, editing, image and text to text.

Reading order: `config`, `model`, `attention`, `decoder`, `vision`, `vae`, `conditioning`,
`denoiser`, `execution`, `step_cache`, `sampler`, `text`, `loading`, `pipeline`; for training
`segments`, `joint_attention`, `training`.
"""

from sparse_unified.bagel.conditioning import ContextImage, Guidance, build_guidance
from sparse_unified.bagel.config import (
    BagelConfig,
    LLMConfig,
    SpecialTokens,
    VAEConfig,
    VisionConfig,
)
from sparse_unified.bagel.execution import Execution
from sparse_unified.bagel.layer_config import ExpertConfig, PrunedLayer
from sparse_unified.bagel.loading import load_bagel, load_vae
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.packing import pack_training
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.bagel.results import GenerationResult, Report, TextResult
from sparse_unified.bagel.sampler import Renorm, SamplingConfig, sample_latents
from sparse_unified.bagel.segments import (
    LatentSegment,
    Segment,
    TextSegment,
    TrainingBatch,
    VitSegment,
)
from sparse_unified.bagel.step_cache import StepCache
from sparse_unified.bagel.text import generate_tokens
from sparse_unified.bagel.training import TrainingOutput, training_forward
from sparse_unified.bagel.vae import AutoEncoder

__all__ = [
    "AutoEncoder",
    "Bagel",
    "BagelConfig",
    "BagelPipeline",
    "ContextImage",
    "Execution",
    "ExpertConfig",
    "GenerationResult",
    "Guidance",
    "LLMConfig",
    "LatentSegment",
    "PrunedLayer",
    "Renorm",
    "Report",
    "SamplingConfig",
    "Segment",
    "SpecialTokens",
    "StepCache",
    "TextResult",
    "TextSegment",
    "TrainingBatch",
    "TrainingOutput",
    "VAEConfig",
    "VisionConfig",
    "VitSegment",
    "build_guidance",
    "generate_tokens",
    "load_bagel",
    "load_vae",
    "pack_training",
    "sample_latents",
    "training_forward",
]
