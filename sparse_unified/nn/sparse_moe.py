# SPDX-License-Identifier: Apache-2.0
"""The sparse FFN block of the released checkpoints, on one storage layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.layout import TIME_POINTS
from sparse_unified.nn.expert_state import OfficialState, expert_views, is_packed
from sparse_unified.ops import backend, choices, composed

logger = logging.getLogger(__name__)

KERNELS = (backend.CPU, backend.CUDA, backend.GROUPED_MM, backend.SCALED_MM)


class SparseMoE(OfficialState):
    """Mixture of SwiGLU experts cut from one dense FFN.

    With logits = x @ gate.T (no bias, no softmax) and the K largest of them per token,

        y[t] = sum_k (1 + topk_logits[t, k]) * expert[topk_idx[t, k]](x[t])
             + (1 + x[t] @ gate_shared.T) * shared_expert(x[t])     if there is a shared expert.

    With `gate_time` [E, 8], column r of which is a bias at time r / 7 of denoising, the logits are
    x @ gate.T + phi(time[t]) @ gate_time.T, where phi [8] interpolates linearly between the two
    nearest columns.

    The weights of all experts are three tensors in expert order (shared expert first): `gate_proj`
    and `up_proj` [I, D], `down_proj` [D, I]. The state dict speaks the official per-expert keys in
    both directions; its tensors are copies.

    Args:
        hidden_size: D.
        intermediate_size: I, width of all experts together, in neurons.
        num_experts: E, routed experts.
        top_k: K, experts per token, from 1 to E.
        num_shared_experts: S; the shared expert is S * (I // (E + S)) neurons wide.
        shared_intermediate_size: width of the shared expert where a file gives it directly.
        gate_img: add the second router that *und* blocks use for ViT tokens.
        gate_shared: have a router of the shared expert even without one, as official files do.
        gate_time: choose experts by the time of denoising too, which `forward` is then to be given.
        return_router_logits: return (y, router_logits), the official convention, or y alone.
        strict: raise where no kernel takes device, dtype or sizes, instead of composing torch ops.

    Raises:
        ValueError: a size is out of range, or E does not divide what the shared expert leaves.

    Source: `Qwen2MoeSparseMoeBlock` of the official SparseUnifiedModel code.

    Example:
        >>> block = SparseMoE(896, 4736, num_experts=16, top_k=8)  # doctest: +SKIP
        >>> y, router_logits = block(torch.randn(1024, 896))  # doctest: +SKIP
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        num_shared_experts: int = 0,
        *,
        shared_intermediate_size: int | None = None,
        gate_img: bool = False,
        gate_shared: bool = True,
        gate_time: bool = False,
        return_router_logits: bool = True,
        strict: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = ExpertLayout(
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            num_shared_experts=num_shared_experts,
            shared_intermediate_size=shared_intermediate_size,
            time_router=gate_time,
        )
        if type(hidden_size) is not int or hidden_size < 1:
            raise ValueError(
                f"SparseMoE: hidden_size must be an integer of at least 1, got {hidden_size!r}"
            )
        if type(top_k) is not int or not 1 <= top_k <= num_experts:
            raise ValueError(
                f"SparseMoE: top_k must be an integer from 1 to num_experts = {num_experts}, "
                f"got {top_k!r}"
            )
        if gate_img and gate_time:
            raise ValueError(
                "SparseMoE: gate_time must be False with gate_img, whose tokens have no time, "
                "got True"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.top_k = top_k
        self.return_router_logits = return_router_logits
        self.strict = strict

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        linear: dict[str, Any] = factory | {"bias": False}
        has_shared = gate_shared or num_shared_experts
        self.gate = nn.Linear(hidden_size, num_experts, **linear)
        self.gate_shared = nn.Linear(hidden_size, 1, **linear) if has_shared else None
        self.gate_img = nn.Linear(hidden_size, num_experts, **linear) if gate_img else None
        self.gate_time = nn.Linear(TIME_POINTS, num_experts, **linear) if gate_time else None
        self.gate_proj = nn.Parameter(torch.empty(intermediate_size, hidden_size, **factory))
        self.up_proj = nn.Parameter(torch.empty(intermediate_size, hidden_size, **factory))
        self.down_proj = nn.Parameter(torch.empty(hidden_size, intermediate_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Routers to zero, so that every selected expert weighs 1; experts uniform by fan-in."""
        for router in (self.gate, self.gate_shared, self.gate_img, self.gate_time):
            if router is not None:
                nn.init.zeros_(router.weight)
        for weight, fan_in in (
            (self.gate_proj, self.hidden_size),
            (self.up_proj, self.hidden_size),
            (self.down_proj, self.intermediate_size),
        ):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)

    @property
    def idle_parameters(self) -> int:
        """Counts the weights of the experts that a token does not use."""
        return 3 * self.hidden_size * self.layout.idle_neurons(self.top_k)

    @property
    def active_backend(self) -> str:
        """What runs this block.

        "cpu" or "cuda" (our kernels), "cuda, grouped_mm" (torch's products between ours),
        "cuda, scaled_grouped_mm" (those in fp8), or "torch: <why>" (torch ops). Asked under
        autocast, what runs it there. "cuda: without sm90a: <why>" where `doctor` found one of the
        kernel families wrong. Where `tune` found another one faster for some numbers of tokens,
        that one runs those.
        """
        active = self._choose(self.gate_proj)[1]
        note = choices.note(self.gate_proj.device) if active in KERNELS else ""
        return f"{active}: {note}" if note else active

    def _choose(self, weight: Tensor, num_rows: int | None = None) -> tuple[torch.dtype, str]:
        """Dtype of the experts, of which `weight` is one, and what runs them on R rows.

        Under autocast its dtype, where no kernel takes fp32 weights.
        """
        dtype, device = weight.dtype, weight.device
        sizes: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "widths": (self.layout.expert_width, self.layout.shared_width),
            "num_experts": self.num_experts,
            "num_rows": num_rows,
            # torchao's mark of a weight that is multiplied as it is stored
            "fp8": getattr(weight, "act_quant_kwargs", None) is not None,
        }
        active = backend.choose(device, dtype=dtype, **sizes)
        if dtype == torch.float32 and active not in KERNELS and _is_autocast(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            active = backend.choose(device, dtype=dtype, **sizes)
        return dtype, active

    def forward(
        self,
        x: Tensor,
        packed_text_indexes: Tensor | None = None,
        packed_vit_token_indexes: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Runs the block.

        Args:
            x: tokens [..., D], dtype and device of the weights. Under autocast any dtype; fp32
                weights that no kernel takes are then cast for the call. Routers may have a dtype
                of their own.
            packed_text_indexes: flat indices of text tokens, [n] int64 or int32; *und* blocks
                only, others ignore both.
            packed_vit_token_indexes: flat indices of ViT tokens, [n] int64 or int32; *und* blocks
                route these by `gate_img`. With ViT indices alone, all tokens are ViT tokens.
            times: of denoising, from 0 (a finished image) to 1 (noise), fp32 [T], or [1] of all
                tokens; blocks with `gate_time` only, others ignore it.

        Returns:
            y [..., D] and router_logits [T, E] fp32 (T tokens in all), or y alone when
            `return_router_logits` is False.

        Raises:
            ValueError: x does not end in D; indices are not [n] or, on the CPU, name no token;
                times are not given to a block with `gate_time`.
            TypeError: indices are not int64 or int32: a mask, say.
            RuntimeError: dtype or device of x differ from the weights'; `strict` and no kernel.
        """
        weights = self.gate_proj, self.up_proj, self.down_proj  # read once: they may be computed
        tokens, dtype, active, chosen = self._route(
            x, packed_text_indexes, packed_vit_token_indexes, times, weights[0]
        )
        logits, topk_logits, topk_idx = chosen
        is_plain = type(weights[0]).dequantize is Tensor.dequantize
        experts = gate_proj, up_proj, down_proj = (
            weights if is_plain or active == backend.SCALED_MM else self.plain_weights()
        )
        if dtype != gate_proj.dtype:
            tokens, gate_proj = tokens.to(dtype), gate_proj.to(dtype)
            up_proj, down_proj = up_proj.to(dtype), down_proj.to(dtype)
            experts = gate_proj, up_proj, down_proj
        shared = self.layout.shared_width
        if shared:
            experts = gate_proj[shared:], up_proj[shared:], down_proj[:, shared:]
        y = run_experts(tokens, topk_logits, topk_idx, self.num_experts, *experts, 1.0, active)
        if shared:
            own = (gate_proj[:shared], up_proj[:shared], down_proj[:, :shared])
            y = y + self._shared_expert(tokens, *own)
        y = y if x.dim() == 2 else y.view(x.shape)
        return (y, logits) if self.return_router_logits else y

    def route(
        self,
        x: Tensor,
        packed_text_indexes: Tensor | None = None,
        packed_vit_token_indexes: Tensor | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what `forward` chooses for the same arguments, and raises the same.

        Returns:
            logits [T, E] fp32, topk_logits [T, K] fp32, topk_idx [T, K] int32.
        """
        indexes = packed_text_indexes, packed_vit_token_indexes
        return self._route(x, *indexes, times, self.gate_proj)[-1]

    @torch.no_grad()
    def dense(self, x: Tensor) -> Tensor:
        """Returns what the dense FFN gives that the experts are cut from: all of them at weight 1.

        x [..., D] -> [..., D], both of the dtype of the weights; without a graph.
        """
        return _swiglu(x, *self.plain_weights())

    def _route(
        self,
        x: Tensor,
        text_indexes: Tensor | None,
        vit_indexes: Tensor | None,
        times: Tensor | None,
        weight: Tensor,
    ) -> tuple[Tensor, torch.dtype, str, tuple[Tensor, Tensor, Tensor]]:
        """Returns tokens [T, D], dtype of the experts, what runs them, and what `route` does."""
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.hidden_size,):
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"SparseMoE: x must be a tensor that ends in hidden_size = {self.hidden_size}, "
                f"got {got}"
            )
        tokens = x if x.dim() == 2 else x.reshape(-1, self.hidden_size)
        if tokens.dtype != weight.dtype and _is_autocast(tokens.device.type):
            tokens = tokens.to(weight.dtype)  # which routes
        dtype, active = self._choose(weight, tokens.shape[0] * self.top_k)
        route = ops.route_topk
        if active not in KERNELS:
            if self.strict:
                raise RuntimeError(f"SparseMoE: strict must be met by a kernel, got {active}")
            _warn_once(active)
            route = composed.route_topk
        given, gate = tokens, self.gate.weight
        if type(self.gate) is not nn.Linear:
            gate = _adapted(self.gate)
        gate_img = None if self.gate_img is None else _adapted(self.gate_img)
        if gate.dtype != tokens.dtype:  # fp32 routers of bf16 experts
            wide = torch.promote_types(gate.dtype, tokens.dtype)
            tokens, gate = tokens.to(wide), gate.to(wide)
            gate_img = None if gate_img is None else gate_img.to(wide)
        if self.layout.time_router:
            tokens, gate = self._with_times(tokens, gate, times)
        if gate_img is not None:
            text_indexes = _checked("packed_text_indexes", text_indexes, len(tokens))
            vit_indexes = _checked("packed_vit_token_indexes", vit_indexes, len(tokens))
        if gate_img is None or vit_indexes is None:
            return given, dtype, active, route(tokens, gate, self.top_k)
        if text_indexes is None:
            return given, dtype, active, route(tokens, gate_img, self.top_k)
        # A token in neither list has logits of zero: the tie goes to the first K experts.
        text = route(tokens[text_indexes], gate, self.top_k)
        vit = route(tokens[vit_indexes], gate_img, self.top_k)
        tie = torch.arange(self.top_k, dtype=text[2].dtype, device=tokens.device)
        bases = (
            text[0].new_zeros(tokens.shape[0], self.num_experts),
            text[1].new_zeros(tokens.shape[0], self.top_k),
            tie.repeat(tokens.shape[0], 1),
        )
        logits, topk_logits, topk_idx = (
            base.index_copy(0, text_indexes, of_text).index_copy(0, vit_indexes, of_vit)
            for base, of_text, of_vit in zip(bases, text, vit, strict=True)
        )
        return given, dtype, active, (logits, topk_logits, topk_idx)

    def _with_times(
        self, tokens: Tensor, gate: Tensor, times: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns [x, phi(times)] [T, D + 8] and [gate, gate_time] [E, D + 8]: one product."""
        count = len(tokens)
        if not isinstance(times, Tensor) or times.dim() != 1 or len(times) not in (1, count):
            got = f"shape {list(times.shape)}" if isinstance(times, Tensor) else repr(times)
            raise ValueError(
                "SparseMoE: times must be given to a block with gate_time, as the layers of "
                f"sparse_unified.bagel.Bagel do, [{count}] or [1] of all tokens, got {got}"
            )
        points = torch.arange(TIME_POINTS, device=times.device)
        nearness = 1 - (times.float()[:, None] * (TIME_POINTS - 1) - points).abs()
        phi = nearness.clamp(min=0).to(tokens.dtype).expand(count, -1)
        bias = _adapted(self.gate_time).to(gate.dtype)
        return torch.cat([tokens, phi], dim=1), torch.cat([gate, bias], dim=1)

    def _shared_expert(
        self, tokens: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
    ) -> Tensor:
        y = _swiglu(tokens, gate_proj, up_proj, down_proj)
        gate: Any = self.gate_shared
        weight = gate(tokens.to(gate.weight.dtype))
        return y + y * weight.to(y.dtype)

    def official_views(self) -> dict[str, Tensor]:
        """Names every tensor of the official layout -> view of the storage, routers included.

        Copying into the views loads the block.

        Raises:
            ValueError: the weights are stored in fewer bits, which has no views.
        """
        if is_packed(self.gate_proj):
            raise ValueError(
                "SparseMoE: weights must be plain tensors to be viewed, got "
                f"{type(self.gate_proj).__name__}"
            )
        weights = (self.gate_proj.data, self.up_proj.data, self.down_proj.data)
        views = expert_views(self.layout, *weights)
        for name in ("gate", "gate_shared", "gate_img", "gate_time"):
            if (router := getattr(self, name)) is not None:
                views[f"{name}.weight"] = router.weight.data
        return views

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, "
            f"num_shared_experts={self.num_shared_experts}, "
            f"expert_width={self.layout.expert_width}, backend={self.active_backend!r}"
        )


def _swiglu(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate_proj)) * F.linear(x, up_proj), down_proj)


def blocks_for(model: nn.Module, top_k: int) -> list[SparseMoE]:
    """Returns the sparse blocks of a model; ValueError unless all can use `top_k` experts."""
    blocks = [module for module in model.modules() if isinstance(module, SparseMoE)]
    if not blocks:
        raise ValueError(f"top_k must be left out for a model without experts, got {top_k!r}")
    most = min(block.num_experts for block in blocks)
    if type(top_k) is not int or not 1 <= top_k <= most:
        raise ValueError(f"top_k must be from 1 to the {most} routed experts, got {top_k!r:.120}")
    return blocks


@contextmanager
def active_experts(model: nn.Module, top_k: int | None) -> Iterator[None]:
    """Inside, every sparse block of a model uses `top_k` experts; afterwards those of before.

    y keeps its formula: each chosen expert weighs 1 + its logit, and nothing is divided by their
    number, so fewer experts give a smaller sum. A shared expert always runs, beside them.

    Args:
        model: with `SparseMoE` blocks anywhere.
        top_k: routed experts of a token, from 1 to their number; None changes nothing.

    Raises:
        ValueError: the model has no sparse blocks, or not so many experts.
    """
    if top_k is None:
        yield
        return
    before = [(block, block.top_k) for block in blocks_for(model, top_k)]
    try:
        for block, _ in before:
            block.top_k = top_k
        yield
    finally:
        for block, own in before:
            block.top_k = own


def official_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Returns every parameter under its official key; of a sparse FFN a view for each expert."""
    if isinstance(module, SparseMoE) and not is_packed(module.gate_proj):
        return {prefix + key: view for key, view in module.official_views().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters(recurse=False):
        found[prefix + name] = tensor
    for name, child in module.named_children():
        found |= official_tensors(child, f"{prefix}{name}.")
    return found


def _adapted(router: Any) -> Tensor:
    """Returns the weight of a router, with what the adapters of peft add to it."""
    weight: Tensor = router.weight
    if "base_layer" in router._modules and not (router.disable_adapters or router.merged):
        for adapter in router.active_adapters:
            if adapter in router.lora_A:
                weight = weight + router.get_delta_weight(adapter)
    return weight


def _checked(name: str, indexes: Tensor | None, num_tokens: int) -> Tensor | None:
    """Returns indices [n] as int64; an error says what else they are."""
    if indexes is None:
        return None
    if not isinstance(indexes, Tensor) or indexes.dtype not in (torch.int64, torch.int32):
        got = indexes.dtype if isinstance(indexes, Tensor) else type(indexes).__name__
        raise TypeError(f"SparseMoE: {name} must be an int64 or int32 tensor, got {got}")
    if indexes.ndim != 1:
        raise ValueError(f"SparseMoE: {name} must have shape [n], got {list(indexes.shape)}")
    # Values are read where that waits for nothing: not while compiling, not from fake tensors.
    readable = not torch.compiler.is_compiling() and type(indexes) is Tensor
    if readable and indexes.is_cpu and indexes.numel():
        least, most = (int(bound) for bound in indexes.aminmax())
        if least < 0 or most >= num_tokens:
            raise ValueError(
                f"SparseMoE: {name} must be from 0 to {num_tokens - 1}, got "
                f"{least if least < 0 else most}"
            )
    return indexes.long()


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


_warned: set[str] = set()


def _warn_once(active: str) -> None:
    if active not in _warned and not torch.compiler.is_compiling():
        _warned.add(active)
        logger.warning("SparseMoE runs composed torch ops (%s)", active)


def run_experts(
    tokens: Tensor,
    weights: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weight_offset: float = 0,
    active: str = "",
) -> Tensor:
    """Returns sum_k (weight_offset + weights[t, k]) * expert[topk_idx[t, k]](tokens[t]), [T, D].

    Args:
        tokens: [T, D]. weights: [T, K] fp32. topk_idx: [T, K] int32.
        gate_proj, up_proj, down_proj: as of `ops.grouped_ffn`.
        weight_offset: added to each weight; 1 where weights are router logits.
        active: what `backend.choose` named for these tensors; asked by default.
    """
    active = active or backend.choose(
        tokens.device,
        dtype=tokens.dtype,
        hidden_size=tokens.shape[1],
        widths=(gate_proj.shape[:-1].numel() // num_experts,),
        num_experts=num_experts,
        num_rows=topk_idx.shape[0] * topk_idx.shape[1],
    )
    experts = (gate_proj, up_proj, down_proj)
    if active not in KERNELS:
        return composed.expert_ffn(tokens, weights, topk_idx, num_experts, *experts, weight_offset)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
    if active == backend.SCALED_MM and tokens.shape[0] == 0:
        return torch.zeros_like(tokens)
    if active in (backend.GROUPED_MM, backend.SCALED_MM) and tokens.shape[0] > 0:
        rows = (
            composed.grouped_ffn(tokens, row_token, expert_offsets, *experts, token_rows)
            if active == backend.GROUPED_MM
            else composed.scaled_grouped_ffn(tokens, row_token, expert_offsets, *experts)
        )
        combine = composed.combine if torch.is_grad_enabled() else ops.combine
        return combine(rows, weights, token_rows, weight_offset)
    maps = (row_token, token_rows, expert_offsets)
    return ops.grouped_ffn_combine(tokens, weights, *maps, *experts, weight_offset)
