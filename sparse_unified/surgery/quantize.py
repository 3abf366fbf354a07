# SPDX-License-Identifier: Apache-2.0
"""quantize_weights_: FFN weights of a live model in 8 or 4 bits.

What is stored is torchao's; a dense projection computes with it as torchao does (int8 on the CPU,
for up to 32 tokens in bf16, without unpacking it), a sparse block unpacks its three weights for the
call, one layer at a time, and computes as before. Those of "fp8-compute" it multiplies in fp8.
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
from sparse_unified.ops import backend, composed
from sparse_unified.surgery.decoder import find_decoder
from sparse_unified.surgery.ffn import projection_names, read_ffn
from sparse_unified.surgery.report import SurgeryReport, report, take_census

STORAGES = ("int8", "fp8", "fp8-compute", "nvfp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig(_Mode):
    """Which FFN weights become smaller, and how they are stored.

    Args:
        storage: "int8" or "fp8" (e4m3), one scale per row; "fp8-compute", which multiplies in fp8
            too, with one scale per token: bf16 on a GPU of compute capability 9.x or 10.x; or
            "nvfp4" (e2m1), one scale (e4m3) per 16 neighbours in a row, for fp32 and bf16 weights
            with sides that are multiples of 16.
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
        ValueError: nothing matches, a selected FFN is not one of plain weights in memory, or cannot
            be multiplied in fp8 where it is; the model is as before.
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
                check_storage(ffn, config.storage)
    before = take_census(decoder)
    for _, ffn in ffns:
        quantize_ffn_(ffn, config.storage)
    return report("quantize_weights_", before, decoder)


def check_storage(ffn: nn.Module, storage: str) -> None:
    """Raises a ValueError that says why a FFN cannot be stored, or compute as it would be."""
    for module, name in _weights(ffn) if storage == "nvfp4" else ():
        weight = getattr(module, name)
        if weight.dtype not in (torch.float32, torch.bfloat16) or any(n % 16 for n in weight.shape):
            raise ValueError(
                "weights must be of fp32 or bf16 and their sides multiples of 16 for "
                f"storage='nvfp4', got {list(weight.shape)} {weight.dtype}"
            )
    if storage != "fp8-compute":
        return
    gate_proj, _, down_proj = (getattr(module, name) for module, name in _weights(ffn))
    width, hidden_size = gate_proj.shape
    widths: tuple[int, ...] = (width,)
    num_experts = 1
    if isinstance(ffn, SparseMoE):
        widths, num_experts = (ffn.layout.expert_width, ffn.layout.shared_width), ffn.num_experts
    active = backend.choose(
        down_proj.device,
        dtype=down_proj.dtype,
        hidden_size=hidden_size,
        widths=widths,
        num_experts=num_experts,
        fp8=True,
    )
    if active != backend.SCALED_MM:
        raise ValueError(f"storage must be int8, nvfp4 or fp8 here, got {storage!r}: {active[7:]}")


@torch.no_grad()
def quantize_ffn_(ffn: nn.Module, storage: str) -> None:
    """Packs the plain weights of one FFN, see `quantize_weights_`."""
    check_storage(ffn, storage)
    library = optional("torchao.quantization", "quant")
    for module, name in _weights(ffn):
        weight = getattr(module, name).detach()
        if storage in ("int8", "nvfp4"):
            # torchao packs the weights of linear layers, so each one takes a turn in one.
            shell = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            shell.weight = nn.Parameter(weight, requires_grad=False)
            if storage == "int8":  # settings of the compiler are the user's
                config = library.Int8WeightOnlyConfig(set_inductor_config=False)
            else:
                config = optional("torchao.prototype.mx_formats", "quant").NVFP4WeightOnlyConfig()
            library.quantize_(shell, config)
            packed = shell.weight.detach()
        else:
            # Scales are ours: those of torchao make NaN of a row of zeros.
            values, scales = composed.to_fp8(weight)
            workflows = optional("torchao.quantization.quantize_.workflows", "quant")
            per_row = workflows.QuantizeTensorToFloat8Kwargs(hp_value_lb=1e-12)
            packed = library.Float8Tensor(
                values,
                scales.unsqueeze(1),
                block_size=[1, weight.shape[1]],
                mm_config=library.Float8MMConfig(),  # sums in fp32
                act_quant_kwargs=per_row if storage == "fp8-compute" else None,
                dtype=weight.dtype,
            )
        setattr(module, name, nn.Parameter(packed, requires_grad=False))


def _weights(ffn: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns the modules that hold the weights of a FFN, with their attributes."""
    if isinstance(ffn, SparseMoE):
        return [(ffn, name) for name in keys.PROJECTIONS]
    return [(getattr(ffn, name), "weight") for name in projection_names(ffn)]
