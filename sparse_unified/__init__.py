# SPDX-License-Identifier: Apache-2.0
"""Sparse mixture-of-experts FFNs for unified multimodal models.

Data flows one way: checkpoint files -> experts -> nn modules -> ops -> C++ kernels. Importing the
package registers the ops; everything else is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_unified import ops  # registers torch.ops.sparse_unified with fakes and autograd
from sparse_unified._version import __version__

if TYPE_CHECKING:
    from sparse_unified import analysis, bagel, checkpoint, experts, nn, surgery, testing
    from sparse_unified.surgery import (
        MoEConfig,
        PruneHeadsConfig,
        PruneWidthConfig,
        QuantizeConfig,
        SkipLayersConfig,
        apply_moe_,
        count_parameters,
        load_moe_,
        prune_heads_,
        prune_width_,
        quantize_weights_,
        restore_,
        skip_layers_,
    )

__all__ = [
    "MoEConfig",
    "PruneHeadsConfig",
    "PruneWidthConfig",
    "QuantizeConfig",
    "SkipLayersConfig",
    "__version__",
    "analysis",
    "apply_moe_",
    "bagel",
    "checkpoint",
    "count_parameters",
    "experts",
    "load_moe_",
    "nn",
    "ops",
    "prune_heads_",
    "prune_width_",
    "quantize_weights_",
    "restore_",
    "skip_layers_",
    "surgery",
    "testing",
]

_MODULES = ("analysis", "bagel", "checkpoint", "experts", "nn", "surgery", "testing")
# What the transforms return, for annotations.
_REPORTS = ("ChangedPart", "SurgeryReport")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _REPORTS:
        return getattr(importlib.import_module(f"{__name__}.surgery.report"), name)
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.surgery"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
