# SPDX-License-Identifier: Apache-2.0
"""quantize_weights_: FFN weights of a live model in 8 or 4 bits.

What is stored is torchao's; a dense projection computes with it as torchao does, a sparse
block unpacks its three weights for the call, one layer at a time, and computes as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sparse_unified._common import context, naming, optional
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.modes import BOTH, Layers, _Mode
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.decoder import find_decoder
from sparse_unified.surgery.ffn import projection_names, read_ffn
from sparse_unified.surgery.report import SurgeryReport, report, take_census

# Storage -> module and configuration of torchao that make it. Settings of the compiler, where it
# would change them, are the user's.
STORAGES: dict[str, tuple[str, str, dict[str, bool]]] = {
    "int8": ("quantization", "Int8WeightOnlyConfig", {"set_inductor_config": False}),
    "fp8": ("quantization", "Float8WeightOnlyConfig", {"set_inductor_config": False}),
    "nvfp4": ("prototype.mx_formats", "NVFP4WeightOnlyConfig", {}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig(_Mode):
    """Which FFN weights become smaller, and how they are stored.

    Args:
        storage: "int8" or "fp8" (e4m3), one scale per row; or "nvfp4" (e2m1), one scale (e4m3) per
            16 neighbours in a row, for fp32 and bf16 weights with sides that are multiples of 16.
        component: "gen", "und" or "both".
        layers: as in `MoEConfig`; "all" and "middle" pass over skipped FFNs.
    """

    mode: ClassVar[str] = "storage"
    _legal: ClassVar[tuple[str, ...]] = (*keys.FFN_NAMES, BOTH)

    storage: str = "int8"
    component: str = "gen"
    layers: Layers = "all"

    def _check(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {self.storage!r}")


@torch.no_grad()
def quantize_weights_(model: object, config: QuantizeConfig) -> SurgeryReport:
    """Stores FFN weights of a live model in 8 or 4 bits, in place, one FFN after the other.

    Dense and sparse FFNs are taken, in every model that `apply_moe_` takes; routers stay as they
    are. The modules stay the same objects, with weights that do not require gradients. There is no
    way back: `restore_` gives back what an earlier transform replaced, and what this one packed is
    gone. Swap and prune first, then quantise: FFNs that are packed already are refused elsewhere.

    Args:
        model: a module or pipeline.
        config: which FFNs, and how they are stored.

    Raises:
        ValueError: nothing matches, or a selected FFN is not one of plain weights in memory; the
            model is as before.
        ImportError: torchao is not installed.
    """
    with context("quantize_weights_"):
        decoder = find_decoder(model, config.component)
        ffns = [own for c in config.components for own in decoder.select_ffns(config.layers, c)]
        for slot, ffn in ffns:
            with naming(slot):
                weights, _ = read_ffn(ffn)
                kinds = (nn.Linear, SparseMoE)
                is_plain = all(isinstance(module, kinds) for module, _ in _weights(ffn))
                if not is_plain or weights.gate_proj.is_meta:
                    raise ValueError(
                        "projections must be an nn.Linear each, with plain tensors in memory, got "
                        f"{'meta tensors' if is_plain else type(ffn).__name__}"
                    )
                _check(ffn, config.storage)
    before = take_census(decoder)
    for _, ffn in ffns:
        quantize_ffn_(ffn, config.storage)
    return report("quantize_weights_", before, decoder)


@torch.no_grad()
def quantize_ffn_(ffn: nn.Module, storage: str) -> None:
    """Packs the weights of one checked FFN, see `quantize_weights_`."""
    _check(ffn, storage)
    quantize_ = optional("torchao.quantization", "quant").quantize_
    path, kind, options = STORAGES[storage]
    config = getattr(optional(f"torchao.{path}", "quant"), kind)(**options)
    for module, name in _weights(ffn):
        weight = getattr(module, name)
        # torchao packs the weights of linear layers, so each one takes a turn in one.
        shell = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        shell.weight = nn.Parameter(weight.detach(), requires_grad=False)
        quantize_(shell, config)
        setattr(module, name, nn.Parameter(shell.weight.detach(), requires_grad=False))


def _check(ffn: nn.Module, storage: str) -> None:
    for module, name in _weights(ffn) if storage == "nvfp4" else ():
        weight = getattr(module, name)
        if weight.dtype not in (torch.float32, torch.bfloat16) or any(n % 16 for n in weight.shape):
            raise ValueError(
                "weights must be of fp32 or bf16 and their sides multiples of 16 for "
                f"storage='nvfp4', got {list(weight.shape)} {weight.dtype}"
            )


def _weights(ffn: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns the modules that hold the weights of a FFN, with their attributes."""
    if isinstance(ffn, SparseMoE):
        return [(ffn, name) for name in keys.PROJECTIONS]
    return [(getattr(ffn, name), "weight") for name in projection_names(ffn)]
