# SPDX-License-Identifier: Apache-2.0
"""The sparse FFN as stateless layers, which the `kernels` package puts into models of others.

A layer has no constructor and no state: its `forward` runs on the module that it is put into, which
holds, with D hidden channels and E experts of h neurons,

    gate         nn.Linear, weight [E, D], no bias: the router
    gate_proj    [E * h, D], up_proj [E * h, D], down_proj [D, E * h]: parameters, expert by expert
    top_k        int, experts that a token uses

as `sparse_unified.nn.SparseMoE` without a shared expert does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified._common import StrPath
from sparse_unified._version import __version__
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.nn.sparse_moe import run_experts

BACKENDS = ("cpu", "cuda")
_MODULE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Stateless layers of sparse_unified, which must be installed."""

from sparse_unified.engines import kernels as layers

__all__ = ["layers"]
'''


class SparseFFNWithLogits(nn.Module):
    """For modules that return y and the router logits."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> y [..., D], logits [T, E] fp32."""
        tokens, router = x.reshape(-1, x.shape[-1]), self.gate.weight
        logits, topk_logits, topk_idx = ops.route_topk(tokens, router, self.top_k)
        experts = (self.gate_proj, self.up_proj, self.down_proj)
        y = run_experts(tokens, topk_logits, topk_idx, len(router), *experts, 1.0)
        return y.view(x.shape), logits


class SparseFFN(nn.Module):
    """For modules that return y alone."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., D]."""
        return SparseFFNWithLogits.forward(self, x)[0]


def write_kernel_repository(directory: StrPath) -> Path:
    """Writes a kernel repository for `kernels.LocalLayerRepository`, or to be uploaded.

    It has one variant a backend, each of which imports the installed package.

    Args:
        directory: made if it is not there; files of an earlier call are replaced.

    Returns:
        The folder of variants, which is what `LocalLayerRepository` takes.
    """
    build = Path(directory) / "build"
    for backend in BACKENDS:
        variant = build / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"_sparse_unified_{backend}_{__version__.replace('.', '_')}",
            "name": "sparse-unified",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        replace_file(variant / "metadata.json", json.dumps(metadata, indent=2).encode() + b"\n")
        replace_file(variant / "__init__.py", _MODULE.encode())
    return build
