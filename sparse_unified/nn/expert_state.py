# SPDX-License-Identifier: Apache-2.0
"""One storage layout, official names: which slice of the fused weights is which expert's tensor."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_unified.experts import ExpertLayout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SCALES_OF_4_BITS = "is_swizzled_scales"  # what torchao's nvfp4 alone has
_SCALE_ROWS = 128  # in a block of scales of nvfp4
_UNPACKED = 2**22  # numbers at a time
_IN_CACHE = 2**18  # numbers of int8 at a time, on the CPU


def is_packed(weight: Tensor) -> bool:
    """Tells whether a weight is a tensor subclass that stores less and unpacks itself."""
    return type(weight).dequantize is not Tensor.dequantize


def is_int8(weight: Tensor) -> bool:
    """Tells whether a weight is stored by torchao as int8 with one scale a row."""
    shape, packed = weight.shape, cast(Any, weight)
    return (
        type(weight).__name__ == "Int8Tensor"
        and (packed.qdata.shape, packed.scale.shape) == (shape, (shape[0], 1))
        and packed.act_pre_scale is None
        and packed.act_quant_kwargs is None
    )


def unpack(weight: Tensor) -> Tensor:
    """Returns what a packed weight stands for.

    torchao unpacks int8 in passes over the whole weight, and 4 bits through 15 times the bytes of
    the result; here both go by blocks of rows, to the same bits.
    """
    is_narrow, packed = is_int8(weight), cast(Any, weight)
    if not (is_narrow or hasattr(weight, SCALES_OF_4_BITS)):
        return weight.dequantize()
    numbers = _IN_CACHE if is_narrow and weight.device.type == "cpu" else _UNPACKED
    together = 1 if is_narrow else _SCALE_ROWS
    step = max(numbers // weight.shape[1] // together, 1) * together
    with torch.inference_mode(False):  # there, what was made elsewhere has no slices
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for n in range(0, len(weight), step):
            rows = slice(n, n + step)
            if is_narrow:
                steps = packed.qdata[rows].float()
                if packed.zero_point is not None:
                    steps -= packed.zero_point[rows]
                torch.mul(steps, packed.scale[rows], out=whole[rows])
            else:
                whole[rows] = weight[rows].dequantize()
    return whole


def expert_views(
    layout: ExpertLayout, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
) -> dict[str, Tensor]:
    """Names every expert's slice of the fused weights as the official checkpoints do.

    gate_proj and up_proj [I, D], down_proj [D, I], of neurons in expert order, become views of them
    under `experts.<e>.<projection>.weight` and, with one, `shared_expert.<projection>.weight`.
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
    are stored in fewer bits save what they unpack to, and cannot be loaded into. What else hangs on
    the block, buffers, parameters or extra state, is saved and loaded as torch does it.
    """

    layout: ExpertLayout
    gate_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def plain_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns gate_proj, up_proj [I, D] and down_proj [D, I], unpacked if they are packed."""
        weights = self.gate_proj, self.up_proj, self.down_proj
        if type(weights[0]).dequantize is Tensor.dequantize:
            return weights
        return unpack(weights[0]), unpack(weights[1]), unpack(weights[2])

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._holds_weights():
            return
        for key, view in expert_views(self.layout, *self.plain_weights()).items():
            destination[prefix + key] = (
                view if keep_vars else view.detach().clone(memory_format=torch.contiguous_format)
            )
        for name in PROJECTIONS:
            del destination[prefix + name]

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        # Hooks run before keys are looked up, those of users first: they see official keys.
        handle = self.register_load_state_dict_pre_hook(_join)
        try:
            super()._load_from_state_dict(*args, **named)
        finally:
            handle.remove()

    def _holds_weights(self) -> bool:
        """Tells whether the weights are parameters of the block.

        Under weight_norm, torch.nn.utils.prune or a parametrization they are computed from others:
        such a block is saved and loaded under the names that torch gives those.
        """
        return all(self._parameters.get(name) is not None for name in PROJECTIONS)


@torch.no_grad()
def _join(block: OfficialState, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
    """Puts the fused weights into a state dict in place of those of the experts.

    Where that cannot be, the block's own weights are put there, which changes nothing.
    """
    if not block._holds_weights():
        return
    _, strict, missing_keys, unexpected_keys, error_msgs = given
    own = [getattr(block, name) for name in PROJECTIONS]
    for name, weight in zip(PROJECTIONS, own, strict=True):
        if prefix + name in state_dict and strict:
            unexpected_keys.append(prefix + name)
        state_dict[prefix + name] = weight
    if is_packed(block.gate_proj):
        kind = type(block.gate_proj).__name__
        error_msgs.append(
            f"SparseMoE: {prefix}gate_proj must be a plain tensor to load into, got {kind}"
        )
        return
    views = expert_views(block.layout, *own)
    found = {key: state_dict.pop(prefix + key) for key in views if prefix + key in state_dict}
    missing_keys += [prefix + key for key in views if key not in found]
    wrong = []
    for key, value in sorted(found.items()):
        shape, at = views[key].shape, f"SparseMoE: {prefix}{key} must"
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            wrong.append(f"{at} have shape {list(shape)}, got {got}")
        elif value.is_meta and not views[key].is_meta:
            wrong.append(f"{at} hold data, got a meta tensor")
    error_msgs += wrong
    if wrong or not found:
        return
    like = min(found.values(), key=lambda value: value.is_meta)
    joined = [torch.empty_like(w, device=like.device, dtype=like.dtype) for w in own]
    if len(found) < len(views):
        for old, new in zip(own, joined, strict=True):
            new.zero_() if old.is_meta else new.copy_(old)
    for key, view in expert_views(block.layout, *joined).items():
        if key in found:
            view.copy_(found[key])
    state_dict.update({prefix + name: w for name, w in zip(PROJECTIONS, joined, strict=True)})
