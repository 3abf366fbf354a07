# SPDX-License-Identifier: Apache-2.0
"""quantize_weights_: FFN weights of a live model stored in 8 bits.

What is stored is torchao's; a dense projection computes with it as torchao does, a sparse block
unpacks its three weights for the call, one layer at a time, and computes as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparse_unified._common import Report, context, format_bytes, naming, optional
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.checkpoint.modes import BOTH
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.decoder import find_decoder
from sparse_unified.surgery.ffn import projection_names, read_weights
from sparse_unified.surgery.report import stored_bytes

# Storage -> the configuration of torchao that makes it.
STORAGES = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Which FFN weights become smaller, and how they are stored.

    Args:
        storage: "int8", one scale per row, or "fp8" (e4m3), one scale per row.
        component: "gen", "und" or "both".
        layers: as in `MoEConfig`; "all" and "middle" pass over skipped FFNs.
    """

    storage: str = "int8"
    component: str = "gen"
    layers: str | Sequence[int] = "all"

    def __post_init__(self) -> None:
        for name, legal in (("storage", [*STORAGES]), ("component", [*FFN_NAMES, BOTH])):
            value = getattr(self, name)
            if value not in legal:
                raise ValueError(
                    f"QuantizeConfig: {name} must be one of {', '.join(legal)}, got {value!r}"
                )

    @property
    def components(self) -> tuple[str, ...]:
        """The components named by `component`."""
        return tuple(FFN_NAMES) if self.component == BOTH else (self.component,)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayer:
    """One FFN whose weights are stored in fewer bits; bytes are those of its three weights."""

    layer: int
    component: str
    path: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport(Report):
    """What `quantize_weights_` changed; `str()` gives a table."""

    storage: str
    layers: tuple[QuantizedLayer, ...]

    def title(self) -> str:
        before, after = (
            format_bytes(sum(getattr(entry, name) for entry in self.layers))
            for name in ("bytes_before", "bytes_after")
        )
        count = len(self.layers)
        return f"quantize_weights_: {count} FFNs stored as {self.storage}, {before} -> {after}"

    def headings(self) -> Sequence[str]:
        return "layer", "module", "before", "after"

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (e.layer, e.path, format_bytes(e.bytes_before), format_bytes(e.bytes_after))
            for e in self.layers
        ]


@torch.no_grad()
def quantize_weights_(model: object, config: QuantizeConfig) -> QuantizeReport:
    """Stores FFN weights of a live model in 8 bits, in place, one FFN after the other.

    Dense and sparse FFNs are taken, in every model that `apply_moe_` takes; routers stay as they
    are. The modules stay the same objects, with weights that do not require gradients. There is no
    way back: `restore_` gives back what an earlier transform replaced, and what this one packed is
    gone. Swap and prune first, then quantise: FFNs that are packed already are refused elsewhere.

    Args:
        model: a module or pipeline.
        config: which FFNs, and how they are stored.

    Returns:
        what was changed, one entry per FFN.

    Raises:
        ValueError: nothing matches, or a selected FFN is not one of plain weights in memory; the
            model is as before.
        ImportError: torchao is not installed.
    """
    with context("quantize_weights_"):
        ffns = [
            (component, slot, ffn)
            for component in config.components
            for slot, ffn in find_decoder(model, component).select_ffns(config.layers, component)
        ]
        for _, slot, ffn in ffns:
            with naming(slot):
                _check(ffn)
    entries = []
    for component, slot, ffn in ffns:
        before = ffn_bytes(ffn)
        quantize_ffn_(ffn, config.storage)
        entries.append(
            QuantizedLayer(
                layer=slot.layer,
                component=component,
                path=slot.path,
                bytes_before=before,
                bytes_after=ffn_bytes(ffn),
            )
        )
    return QuantizeReport(storage=config.storage, layers=tuple(entries))


@torch.no_grad()
def quantize_ffn_(ffn: nn.Module, storage: str) -> None:
    """Packs the weights of one checked FFN, see `quantize_weights_`.

    Raises:
        ImportError: torchao is not installed.
    """
    library = optional("torchao.quantization", "quant")
    for module, name in _weights(ffn):
        weight = getattr(module, name)
        # torchao packs the weights of linear layers, so each one takes a turn in one.
        shell = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        shell.weight = nn.Parameter(weight.detach(), requires_grad=False)
        # Settings of the compiler are the user's.
        library.quantize_(shell, getattr(library, STORAGES[storage])(set_inductor_config=False))
        setattr(module, name, nn.Parameter(shell.weight.detach(), requires_grad=False))


def ffn_bytes(ffn: nn.Module) -> int:
    """Returns the bytes of the three weights of a FFN as they are stored."""
    return sum(stored_bytes(getattr(module, name)) for module, name in _weights(ffn))


def _weights(ffn: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns the modules that hold the weights of a FFN, with their attributes."""
    if isinstance(ffn, SparseMoE):
        return [(ffn, name) for name in PROJECTIONS]
    return [(getattr(ffn, name), "weight") for name in projection_names(ffn)]


def _check(ffn: nn.Module) -> None:
    if isinstance(ffn, SparseMoE):
        ffn.official_views()  # refuses what is packed already
        is_linear, weight = True, ffn.gate_proj.detach()
    else:
        weight = read_weights(ffn).gate_proj
        is_linear = all(isinstance(module, nn.Linear) for module, _ in _weights(ffn))
    if not is_linear or weight.is_meta:
        raise ValueError(
            "projections must be an nn.Linear each, with plain tensors in memory, got "
            f"{'meta tensors' if is_linear else type(ffn).__name__}"
        )
