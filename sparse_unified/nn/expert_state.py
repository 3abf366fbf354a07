# SPDX-License-Identifier: Apache-2.0
"""One storage layout, official names: which slice of the fused weights is which expert's tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.experts import ExpertLayout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def is_packed(weight: Tensor) -> bool:
    """Tells whether a weight is a tensor subclass that stores less and unpacks itself."""
    return type(weight).dequantize is not Tensor.dequantize


def unpacked(weight: Tensor) -> Tensor:
    """Returns a weight as a plain tensor: itself, or what a packed one unpacks to for one call."""
    return weight.dequantize() if is_packed(weight) else weight


def expert_views(
    layout: ExpertLayout, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
) -> dict[str, Tensor]:
    """Names every expert's slice of the fused weights as the official checkpoints do.

    Args:
        layout: neuron ranges.
        gate_proj, up_proj: [I, D]; down_proj: [D, I]; neurons in expert order.

    Returns:
        `experts.<e>.<projection>.weight` and, with a shared expert,
        `shared_expert.<projection>.weight` -> view of the storage.
    """
    views = {}
    # The official code has the shared expert behind the others.
    for owner, (start, stop) in sorted(layout.ranges().items(), key=lambda own: own[1] == 0):
        slices = (gate_proj[start:stop], up_proj[start:stop], down_proj[:, start:stop])
        for projection, view in zip(PROJECTIONS, slices, strict=True):
            views[f"{owner}.{projection}.weight"] = view
    return views


class OfficialState(nn.Module):
    """State dict of a block under the official per-expert keys, strict in both directions.

    Saved tensors are copies: savers refuse tensors that share storage or are strided. Weights that
    are stored in fewer bits save what they unpack to, and cannot be loaded into.
    """

    layout: ExpertLayout
    gate_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def plain_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns gate_proj, up_proj [I, D] and down_proj [D, I], unpacked if they are packed."""
        return unpacked(self.gate_proj), unpacked(self.up_proj), unpacked(self.down_proj)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        fused = self.plain_weights()
        if not keep_vars:
            fused = tuple(weight.detach() for weight in fused)  # type: ignore[assignment]
        for key, view in expert_views(self.layout, *fused).items():
            destination[prefix + key] = (
                view if keep_vars else view.clone(memory_format=torch.contiguous_format)
            )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # nn.Module's own loading knows one tensor per parameter; what else it does is done here.
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        if is_packed(self.gate_proj):
            error_msgs.append(
                f"SparseMoE: {prefix}gate_proj must be a plain tensor to load into, got "
                f"{type(self.gate_proj).__name__}"
            )
            return
        own = expert_views(self.layout, self.gate_proj, self.up_proj, self.down_proj)
        found = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
        missing = [prefix + key for key in own if key not in found]
        missing_keys.extend(missing)
        if strict:
            children = tuple(f"{prefix}{name}." for name in self._modules if self._modules[name])
            unexpected_keys.extend(
                key
                for key in state_dict
                if key.startswith(prefix)
                and not key.startswith(children)
                and key[len(prefix) :] not in own
            )
        wrong = [
            f"SparseMoE: {prefix}{key} must {problem}"
            for key in sorted(found)
            if (problem := _problem(found[key], own[key]))
        ]
        error_msgs.extend(wrong)
        if wrong or not found:
            return
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers", False):
                self._reallocate([*found.values()], keep=bool(missing))
            elif self.gate_proj.is_meta and not all(value.is_meta for value in found.values()):
                warnings.warn(
                    f"for {prefix}{next(iter(found))} and {len(found) - 1} more: copying from a "
                    "non-meta parameter in the checkpoint to a meta parameter in the current "
                    "model, which is a no-op. (Did you mean to pass `assign=True`?)",
                    stacklevel=2,
                )
            views = expert_views(self.layout, self.gate_proj, self.up_proj, self.down_proj)
            error_msgs.extend(
                f"SparseMoE: {prefix}{key} must hold data, got a meta tensor"
                for key, value in found.items()
                if value.is_meta and not views[key].is_meta
            )
            for key, value in found.items():
                if not value.is_meta:
                    views[key].copy_(value)

    def _reallocate(self, values: list[Tensor], *, keep: bool) -> None:
        """Gives the weights the device and dtype of `values`, and their old values if `keep`."""
        like = next((value for value in values if not value.is_meta), values[0])
        if keep and like.is_meta and not self.gate_proj.is_meta:
            return  # what is kept holds data, so its storage has to
        for name in PROJECTIONS:
            old = getattr(self, name)
            fused = torch.empty_like(old, device=like.device, dtype=like.dtype)
            if keep and old.is_meta:
                fused.zero_()
            elif keep:
                fused.copy_(old)
            setattr(self, name, nn.Parameter(fused, requires_grad=old.requires_grad))


def _problem(value: object, own: Tensor) -> str | None:
    """Says what a value of a state dict must be to load into `own`, None when it is."""
    if not isinstance(value, Tensor):
        return f"be a tensor, got {type(value).__name__}"
    if value.shape != own.shape:
        return f"have shape {list(own.shape)}, got {list(value.shape)}"
    return None
