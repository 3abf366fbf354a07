# SPDX-License-Identifier: Apache-2.0
"""quantize_weights_: FFN weights of a live model stored in 8 bits.

What is stored is torchao's; a dense projection computes with it as torchao does, a sparse block
unpacks its three weights for the call, one layer at a time, and computes as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import Report, format_bytes, format_table, optional
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import BOTH
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.stored import is_packed
from sparse_unified.surgery.find import Target, find_host, select_held
from sparse_unified.surgery.weights import projection_names, read_weights

# Storage -> the configuration of torchao that makes it.
STORAGES = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
_FUSED = ("gate_proj", "up_proj", "down_proj")


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
        if self.storage not in STORAGES:
            raise ValueError(
                f"QuantizeConfig: storage must be one of {', '.join(STORAGES)}, "
                f"got {self.storage!r}"
            )
        if self.component not in (*FFN_NAMES, BOTH):
            raise ValueError(
                f"QuantizeConfig: component must be one of {', '.join((*FFN_NAMES, BOTH))}, "
                f"got {self.component!r}"
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

    def to_text(self) -> str:
        before = sum(entry.bytes_before for entry in self.layers)
        after = sum(entry.bytes_after for entry in self.layers)
        rows: list[Sequence[object]] = [("layer", "module", "before", "after")]
        for entry in self.layers:
            sizes = (format_bytes(entry.bytes_before), format_bytes(entry.bytes_after))
            rows.append((entry.layer, entry.path, *sizes))
        return (
            f"quantize_weights_: {len(self.layers)} FFNs stored as {self.storage}, "
            f"{format_bytes(before)} -> {format_bytes(after)}\n{format_table(rows, header=True)}"
        )

    def __str__(self) -> str:
        return self.to_text()


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
        TypeError: config is no QuantizeConfig.
        ImportError: torchao is not installed.
    """
    where = "quantize_weights_"
    if not isinstance(config, QuantizeConfig):
        raise TypeError(f"{where}: config must be a QuantizeConfig, got {type(config).__name__}")
    targets: list[Target] = []
    for component in config.components:
        host = find_host(model, where=where, component=component)
        for layer in select_held(host, config.layers, [FFN_NAMES[component]], where=where):
            targets.append(host.target(layer, component, where=where))
    for target in targets:
        _check(target.ffn, target.describe(where))
    torchao(where)
    entries = []
    for target in targets:
        before = ffn_bytes(target.ffn)
        quantize_ffn_(target.ffn, config.storage, where=where)
        entries.append(
            QuantizedLayer(
                layer=target.layer,
                component=target.component,
                path=target.path,
                bytes_before=before,
                bytes_after=ffn_bytes(target.ffn),
            )
        )
    return QuantizeReport(storage=config.storage, layers=tuple(entries))


def torchao(where: str) -> Any:
    """Imports torchao's quantization; ImportError says how to get it."""
    return optional("torchao.quantization", "quant", purpose=where)


@torch.no_grad()
def quantize_ffn_(ffn: nn.Module, storage: str, *, where: str) -> None:
    """Packs the weights of one checked FFN, see `quantize_weights_`."""
    if isinstance(ffn, SparseMoE):
        for name in _FUSED:
            setattr(ffn, name, _packed(getattr(ffn, name), storage, where))
        return
    for name in projection_names(ffn):
        part = getattr(ffn, name)
        part.weight = _packed(part.weight, storage, where)


def ffn_bytes(ffn: nn.Module) -> int:
    """Returns the bytes of the three weights of a FFN as they are stored."""
    if isinstance(ffn, SparseMoE):
        weights = [getattr(ffn, name) for name in _FUSED]
    else:
        weights = [getattr(ffn, name).weight for name in projection_names(ffn)]
    return sum(map(stored_bytes, weights))


def stored_bytes(weight: Tensor) -> int:
    """Returns the bytes that a plain or packed weight takes."""
    if not is_packed(weight):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(getattr(weight, name).nbytes for name in names)


def _packed(weight: Tensor, storage: str, where: str) -> nn.Parameter:
    library = torchao(where)
    # torchao packs the weights of linear layers, so each one takes a turn in one.
    shell = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    shell.weight = nn.Parameter(weight.detach(), requires_grad=False)
    # Settings of the compiler are the user's.
    library.quantize_(shell, getattr(library, STORAGES[storage])(set_inductor_config=False))
    return nn.Parameter(shell.weight.detach(), requires_grad=False)


def _check(ffn: nn.Module, at: str) -> None:
    if isinstance(ffn, SparseMoE):
        for name in _FUSED:
            weight = getattr(ffn, name)
            if is_packed(weight) or weight.is_meta:
                got = "a meta tensor" if weight.is_meta else type(weight).__name__
                raise ValueError(f"{at}: {name} must be a plain tensor in memory, got {got}")
        return
    read_weights(ffn, at)
    for name in projection_names(ffn):
        part = getattr(ffn, name)
        if not isinstance(part, nn.Linear):
            raise ValueError(f"{at}: {name} must be an nn.Linear, got a {type(part).__name__}")
        if part.weight.is_meta:
            raise ValueError(f"{at}: {name} must be a plain tensor in memory, got a meta tensor")
