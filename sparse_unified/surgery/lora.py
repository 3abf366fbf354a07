# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank adapters of a live model, W + s B A, to train; files of them, and their merging.

Linear layers get peft's own. The experts of a `SparseMoE` are ranges of three weights, so theirs
are slices of batched factors, and the block computes with W + s B A, made once a pass. On disk all
are what peft writes and reads for the modules of the official code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_unified._common import (
    StrPath,
    check_int,
    check_number,
    choice,
    context,
    list_some,
    optional,
)
from sparse_unified.checkpoint import files, safetensors_io
from sparse_unified.checkpoint.keys import FFN_NAMES, SUFFIXES
from sparse_unified.checkpoint.modes import BOTH
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS, is_packed
from sparse_unified.nn.sparse_moe import official_tensors
from sparse_unified.surgery.decoder import as_module, find_decoder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's, of every key
# Under what it is known in the model, the factor of one weight of all experts.
_BATCHED = re.compile(r"(.+)\.parametrizations\.(\w+)\.0\.lora_(shared_)?([AB])")
# Others change the weights below the adapters, which the file does not say.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


class LoraTarget(str, Enum):
    """Which weights of the decoder layers get adapters."""

    ATTENTION = "attention"  # the four projections
    EXPERTS = "experts"  # of sparse FFNs, the shared one included
    FFNS = "ffns"  # the three projections of dense ones
    ROUTERS = "routers"  # of sparse FFNs


_PARTS = rf"({'|'.join(PROJECTIONS)})"
# Of one component, whose suffix and FFN are filled in.
_NAMES = {
    LoraTarget.ATTENTION: r"self_attn\.[qkvo]_proj{suffix}",
    LoraTarget.EXPERTS: r"{ffn}\.(experts\.\d+|shared_expert)\." + _PARTS,
    LoraTarget.FFNS: r"{ffn}\." + _PARTS,
    LoraTarget.ROUTERS: r"{ffn}\.(gate|gate_img|gate_shared|gate_time)",
}


def target_modules(path: str, targets: Sequence[LoraTarget], component: str) -> dict[str, str]:
    """Returns what the official code calls the target modules, a regular expression of each."""
    own = [(SUFFIXES[c], FFN_NAMES[c]) for c in FFN_NAMES if component in (c, BOTH)]
    found = {}
    for target in targets:
        names = "|".join(_NAMES[target].format(suffix=suffix, ffn=ffn) for suffix, ffn in own)
        found[target.value] = rf"{re.escape(path)}\.\d+\.({names})"
    return found


@context("add_lora_")
def add_lora_(
    model: object,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[LoraTarget | str] = (LoraTarget.ATTENTION,),
    component: str = BOTH,
    seed: int = 0,
) -> Any:
    """Adds adapters to a live model, in place, and freezes all else.

    W becomes W + (alpha / rank) B A with A [rank, in] random and B [out, rank] zero, of each target
    weight [out, in] and of each expert; outputs stay the same at first.

    Args:
        model: a module with decoder layers as `apply_moe_` takes, or a pipeline of one; of weights
            on the meta device the adapters are made on the CPU.
        rank: of the adapters.
        alpha: their weight is alpha / rank (None: 1).
        targets: which weights get adapters, `LoraTarget` each.
        component: "gen", "und" or "both": whose weights.
        seed: of what A is drawn from.

    Returns:
        the configuration, a `peft.LoraConfig`; its `target_modules` are in the official code's
        names.

    Raises:
        ValueError: a value is out of range, or the model has no weights of a target; it is as
            before.
        ImportError: peft is not installed.

    Example:
        >>> add_lora_(model, rank=16, targets=("attention", "experts"))  # doctest: +SKIP
    """
    check_int("rank", rank, 1)
    alpha = rank if alpha is None else alpha
    check_number("alpha", alpha, 1e-30)
    if component not in (*FFN_NAMES, BOTH):
        raise ValueError(f"component must be gen, und or both, got {component!r}")
    named = target_modules(
        find_decoder(model).path, [choice("targets", LoraTarget, t) for t in targets], component
    )
    module = as_module(model)
    parts = dict(module.named_modules())
    blocks = {
        f"{name}.experts.0.gate_proj": name for name in parts if _is_plain(parts, name, SparseMoE)
    }
    linears = [name for name in parts if _is_plain(parts, name, nn.Linear)]
    for target, pattern in named.items():
        if not any(re.fullmatch(pattern, name) for name in (*linears, *blocks)):
            raise ValueError(f"targets must be in the model, got no {target} of {component} there")
    pattern = "|".join(named.values())
    peft = optional("peft", "train", purpose="LoRA")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if any(re.fullmatch(pattern, name) for name in linears):
            peft.inject_adapter_in_model(config, module)
            _give_values(module, peft.tuners.lora.LoraLayer)
        for official, name in blocks.items():
            if re.fullmatch(pattern, official):
                block = parts[name]
                for projection in PROJECTIONS:
                    adapters = ExpertLora(block, projection, rank, alpha / rank)
                    # Unchecked, as the sum cannot be taken of a weight that is on the meta device.
                    parametrize.register_parametrization(block, projection, adapters, unsafe=True)
    return config


def _give_values(module: nn.Module, kind: Any) -> None:
    """Puts peft's adapters of weights on the meta device, which they follow, on the CPU."""
    for layer in module.modules():
        if isinstance(layer, kind) and layer.lora_A["default"].weight.is_meta:
            for factor in (layer.lora_A, layer.lora_B):
                factor.to_empty(device="cpu")
            layer.reset_lora_parameters("default", True)


def _is_plain(parts: Mapping[str, nn.Module], name: str, kind: type[nn.Module]) -> bool:
    return isinstance(parts[name], kind) and not parametrize.is_parametrized(parts[name])


class ExpertLora(nn.Module):
    """The adapters of one weight of a `SparseMoE`, a parametrization of it.

    Factors A [E, r, in] and B [E, out, r] of the routed experts, and of a shared one where E is 1.
    """

    def __init__(self, block: Any, projection: str, rank: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.dim = int(projection == "down_proj")  # of the weight, along which experts lie
        layout, weight = block.layout, getattr(block, projection)
        place = "cpu" if weight.is_meta else weight.device
        experts = ("", layout.num_experts, layout.expert_width)
        for group, count, width in (("shared_", 1, layout.shared_width), experts):
            if width:
                shape = (block.hidden_size, width) if self.dim else (width, block.hidden_size)
                down = torch.empty(count, rank, shape[1])
                for own in down:
                    nn.init.kaiming_uniform_(own, a=5**0.5)  # as in peft
                for name, factor in (("A", down), ("B", torch.zeros(count, shape[0], rank))):
                    factor = nn.Parameter(factor.to(place, weight.dtype))
                    self.register_parameter(f"lora_{group}{name}", factor)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns W + s B A, of the shape of W: [I, D], or [D, I] of down_proj."""
        deltas = []
        own = self._parameters
        for group in ("shared_", ""):
            down, up = own.get(f"lora_{group}A"), own.get(f"lora_{group}B")
            if down is not None and up is not None:
                delta = (self.scaling * up) @ down  # [E, out, in]
                deltas.append(delta.transpose(0, 1).flatten(1) if self.dim else delta.flatten(0, 1))
        return weight + (deltas[0] if len(deltas) == 1 else torch.cat(deltas, self.dim))


def file_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields what a file holds of an adapter's parameter: of experts, a tensor each."""
    match = _BATCHED.fullmatch(name)
    if match is None:
        yield _PREFIX + name.replace(".default.", "."), tensor
        return
    block, projection, shared, factor = match.groups()
    for expert, own in enumerate(tensor):
        owner = "shared_expert" if shared else f"experts.{expert}"
        yield f"{_PREFIX}{block}.{owner}.{projection}.lora_{factor}.weight", own.contiguous()


def write_lora(
    directory: StrPath, config: Any, adapters: Mapping[str, Tensor], *, base_model: str
) -> None:
    """Writes adapters into a directory as peft does; RuntimeError if one is not finite.

    Args:
        directory: that is there.
        config: of `add_lora_`.
        adapters: the trained parameters, by their names in the model.
        base_model: a directory or hub id, for `base_model_name_or_path`.
    """
    tensors = dict(own for name in adapters for own in file_tensors(name, adapters[name]))
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RuntimeError(f"{key} must be finite to be written, got NaN or infinity")
    shown = config.to_dict() | {"base_model_name_or_path": base_model, "inference_mode": True}
    shown |= {"task_type": None}
    path = Path(directory)
    files.write_text(path / CONFIG, json.dumps(shown, indent=2, sort_keys=True) + "\n")
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    safetensors_io.save_tensors(path / TENSORS, whole)


class Factors(NamedTuple):
    """An adapter of a linear layer: W + scaling * up @ down."""

    down: Tensor  # A [r, in]
    up: Tensor  # B [out, r]
    scaling: float

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the sum for a weight [out, in], in its dtype, computed in fp32."""
        device = weight.device
        delta = self.up.to(device).float() @ self.down.to(device).float()
        return torch.add(weight.float(), delta, alpha=self.scaling).to(weight.dtype)


def read_lora(directory: StrPath, shapes: Mapping[str, Sequence[int]]) -> dict[str, Factors]:
    """Returns the adapters of a directory of `adapt` or peft by the official key of their weight.

    `shapes` are those of the weights there are, by key.

    Raises:
        ValueError: a file is missing or damaged, holds anything but plain LoRA, or weights that are
            not there.
    """
    where = Path(directory) / CONFIG
    config = files.read_json(where)
    rules = (
        ("peft_type", ("LORA",)),
        ("use_dora", (False, None)),
        ("bias", ("none", None)),
        ("init_lora_weights", (*_INITS, None)),
    )
    for name, legal in rules:
        if config.get(name) not in legal:
            listed = " or ".join(map(str, legal[:1]))
            raise ValueError(f"{where}: {name} must be {listed}, got {config.get(name)!r:.80}")
    patterns = config.get("alpha_pattern") or {}
    path = Path(directory) / TENSORS
    specs = safetensors_io.read_header(path).tensors
    found = {}
    for key in [key for key in specs if key.endswith(".lora_A.weight")]:
        other = key.replace(".lora_A.", ".lora_B.")
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        if other not in specs:
            raise ValueError(f"{path}: adapters must have two factors, got no {other}")
        down, up = (safetensors_io.read_tensor(specs.pop(name)) for name in (key, other))
        matching = (p for p in patterns if re.fullmatch(rf"(.*\.)?({p})", module))
        alpha: Any = patterns.get(next(matching, None), config.get("lora_alpha"))
        check_number(f"{where}: lora_alpha", alpha)
        rank = down.shape[0]
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        weight = f"{module}.weight"
        wanted = list(shapes.get(weight, ()))
        if [up.shape[0], down.shape[-1]] != wanted or up.shape[1:] != (rank,):
            raise ValueError(
                f"{path}: adapters must be of weights of the model, got {list(up.shape)} and "
                f"{list(down.shape)} for {weight}, {wanted or 'which is not there'}"
            )
        found[weight] = Factors(down, up, scaling)
    if specs or not found:
        raise ValueError(
            f"{path}: file must hold lora_A and lora_B of linear layers and nothing else, got "
            f"{list_some(specs)}"
        )
    return found


@torch.no_grad()
def load_lora_(model: object, directory: StrPath) -> list[str]:
    """Merges adapters into the weights of a live model, in place; there is no way back.

    Args:
        model: a module with the official code's names, ours or the official one, dense or sparse,
            or a pipeline of one; weights are plain and in memory.
        directory: what `adapt` with a LoRA rank wrote, or peft for the official code.

    Returns:
        the official keys of the weights that were changed.

    Raises:
        ValueError: a file is missing or damaged, is no plain LoRA, or not of this model; which is
            as before.

    Example:
        >>> load_lora_(pipeline, "tuned-lora")  # doctest: +SKIP
    """
    with context("load_lora_"):
        weights = official_tensors(as_module(model))
        adapters = read_lora(directory, {key: weight.shape for key, weight in weights.items()})
        for key in adapters:
            if weights[key].is_meta or is_packed(weights[key]):
                got = "meta" if weights[key].is_meta else type(weights[key]).__name__
                rule = "be a plain tensor in memory (`sparse-unified merge` works on files)"
                raise ValueError(f"{key} must {rule}, got {got}")
        for key, factors in adapters.items():
            weights[key].copy_(factors.merged(weights[key]))
        return list(adapters)
