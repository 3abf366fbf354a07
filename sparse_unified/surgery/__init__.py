# SPDX-License-Identifier: Apache-2.0
"""Sparse, narrower and skipped parts into a live model, in place, and out of it again.

Reading order: `exchange` (what a transform changed, and back), `ffn` (what a dense FFN is),
`decoder` (where modules are), `cuts` (what pruning takes away), `report` (and `restore_`),
`others` (decoders that are not BAGEL), `prune`, `moe` (sparse FFNs), `pretrained` (decoders of
transformers on disk), `quantize`, `lora`.
"""

from sparse_unified.checkpoint.modes import (
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.surgery.lora import add_lora_, load_lora_
from sparse_unified.surgery.moe import apply_moe_, load_moe_
from sparse_unified.surgery.pretrained import from_pretrained, save_pretrained
from sparse_unified.surgery.prune import changed, prune_heads_, prune_width_, skip_layers_
from sparse_unified.surgery.quantize import QuantizeConfig, quantize_weights_
from sparse_unified.surgery.report import count_parameters, restore_

__all__ = [
    "MoEConfig",
    "PruneHeadsConfig",
    "PruneWidthConfig",
    "QuantizeConfig",
    "SkipLayersConfig",
    "add_lora_",
    "apply_moe_",
    "changed",
    "count_parameters",
    "from_pretrained",
    "load_lora_",
    "load_moe_",
    "prune_heads_",
    "prune_width_",
    "quantize_weights_",
    "restore_",
    "save_pretrained",
    "skip_layers_",
]
