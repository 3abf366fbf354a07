# SPDX-License-Identifier: Apache-2.0
"""BAGEL, dense and sparse: text to image, editing, image and text to text, and training.

Reading order: `config`, `attention`, `decoder`, `vision`, `vae`, `model`, `execution`, `sampler`,
`loading`, `pipeline`; for training `packing`, then `training_forward` in `model`.
"""

from sparse_unified.bagel.config import BagelConfig, LLMConfig, VAEConfig, VisionConfig
from sparse_unified.bagel.execution import Execution
from sparse_unified.bagel.hub import model_card, push_to_hub, write_card
from sparse_unified.bagel.loading import load_bagel
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import Segment, TrainingBatch, pack_training
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.bagel.sampler import Guidance, SamplingConfig, StepCache
from sparse_unified.bagel.vae import AutoEncoder

__all__ = [
    "AutoEncoder",
    "Bagel",
    "BagelConfig",
    "BagelPipeline",
    "Execution",
    "Guidance",
    "LLMConfig",
    "SamplingConfig",
    "Segment",
    "StepCache",
    "TrainingBatch",
    "VAEConfig",
    "VisionConfig",
    "load_bagel",
    "model_card",
    "pack_training",
    "push_to_hub",
    "training_forward",
    "write_card",
]
