# SPDX-License-Identifier: Apache-2.0
"""One storage layout, official names: which slice of the fused weights is which expert's tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.partition import ExpertLayout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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
    ranges = {f"experts.{e}": layout.expert_range(e) for e in range(layout.num_experts)}
    if layout.shared_width:
        ranges["shared_expert"] = layout.shared_range()
    views = {}
    for owner, (start, stop) in ranges.items():
        slices = (gate_proj[start:stop], up_proj[start:stop], down_proj[:, start:stop])
        for projection, view in zip(PROJECTIONS, slices, strict=True):
            views[f"{owner}.{projection}.weight"] = view
    return views


class OfficialState(nn.Module):
    """State dict of a block under the official per-expert keys, strict in both directions.

    Saved tensors are copies: savers refuse tensors that share storage or are strided.
    """

    layout: ExpertLayout
    gate_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        fused = (self.gate_proj, self.up_proj, self.down_proj)
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
        own = expert_views(self.layout, self.gate_proj, self.up_proj, self.down_proj)
        found = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
        missing_keys.extend(prefix + key for key in own if key not in found)
        if strict:
            children = tuple(f"{prefix}{name}." for name in self._modules if self._modules[name])
            unexpected_keys.extend(
                key
                for key in state_dict
                if key.startswith(prefix)
                and not key.startswith(children)
                and key[len(prefix) :] not in own
            )
        misshapen = {key for key, value in found.items() if value.shape != own[key].shape}
        error_msgs.extend(
            f"SparseMoE: {prefix}{key} must have shape {list(own[key].shape)}, got "
            f"{list(found[key].shape)}"
            for key in sorted(misshapen)
        )
        if misshapen:
            return
        if local_metadata.get("assign_to_params_buffers", False) and len(found) == len(own):
            like = next(iter(found.values()))
            for name in PROJECTIONS:
                old = getattr(self, name)
                fused = torch.empty_like(old, device=like.device, dtype=like.dtype)
                setattr(self, name, nn.Parameter(fused, requires_grad=old.requires_grad))
        with torch.no_grad():
            views = expert_views(self.layout, self.gate_proj, self.up_proj, self.down_proj)
            for key, value in found.items():
                views[key].copy_(value)
