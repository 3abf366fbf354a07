# SPDX-License-Identifier: Apache-2.0
"""Which layers of a checkpoint are sparse. The keys decide, llm_config.json has to agree.

A wrong `top_k` passes every key check, and a missing `transformed_gen` makes the official loader
keep random weights in silence; so each field that describes a sparse FFN is compared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_unified._common import list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.ffn import FFNs, SparseLayer
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.experts import ExpertLayout

if TYPE_CHECKING:
    from sparse_unified.checkpoint.held import Layers

CONFIG = "llm_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayout:
    """The sparse FFNs of a checkpoint, as its keys give them and its config confirms.

    Attributes:
        num_experts: E, the same in every sparse layer.
        top_k: experts a token uses, 1 to E. From the config: no key tells it.
        num_shared_experts: S, how many expert widths the shared expert is made of; 0 without one.
        layers: `{component: {layer: (num_experts, expert_width, shared_width)}}`, ascending;
            components without a sparse layer are absent.
    """

    num_experts: int
    top_k: int
    num_shared_experts: int
    layers: Mapping[str, Mapping[int, SparseLayer]]

    def expert_layout(self, component: str, layer: int) -> ExpertLayout:
        """Returns the neuron ranges of one sparse FFN."""
        sizes = self.layers[component][layer]
        return ExpertLayout(
            intermediate_size=sizes.shared_width + sizes.num_experts * sizes.expert_width,
            num_experts=sizes.num_experts,
            num_shared_experts=self.num_shared_experts,
            shared_intermediate_size=sizes.shared_width,
        )


def check_layout(
    ffns: FFNs, config: Mapping[str, Any], held: Layers | None = None
) -> tuple[MoELayout | None, list[str]]:
    """Compares the FFNs found in the keys with llm_config.json.

    Args:
        held: what pruning has left; None where nothing was pruned.

    Returns:
        the sparse layout, None when no FFN is sparse or the config leaves it open; and a sentence
        for each disagreement.
    """
    problems = [*_check_layers(ffns, config, held), *_check_sizes(ffns, config, held)]
    sparse = {
        component: {layer: ffn.sparse for layer, ffn in layers.items() if ffn.sparse is not None}
        for component, layers in ffns.items()
    }
    sparse = {component: layers for component, layers in sparse.items() if layers}
    for component in keys.FFN_NAMES:
        if component in ffns:
            problems += _check_transformed(
                component, set(sparse.get(component, {})), set(ffns[component]), config
            )
    if not sparse:
        return None, problems

    kinds = {sizes for layers in sparse.values() for sizes in layers.values()}
    # Narrower FFNs have narrower experts, but as many of them.
    alike = kinds if held is None else {sizes.num_experts for sizes in kinds}
    if len(alike) > 1:
        found = [f"{s.num_experts} x {s.expert_width} + {s.shared_width}" for s in sorted(kinds)]
        problems.append(
            "keys: sparse layers must agree on experts x width + shared width, "
            f"got {list_some(found)}"
        )
    for sizes in sorted(kinds) if held is not None else [min(kinds)]:
        problems += _check_counts(sizes, config)
    sizes = min(kinds)
    top_k, wrong = find_top_k(sizes.num_experts, config)
    problems += wrong
    if problems or top_k is None:
        return None, problems
    return MoELayout(
        num_experts=sizes.num_experts,
        top_k=top_k,
        num_shared_experts=int(config["num_shared_experts"]),
        layers=sparse,
    ), problems


def _check_layers(ffns: FFNs, config: Mapping[str, Any], held: Layers | None) -> list[str]:
    problems = []
    wanted = config.get("num_hidden_layers")
    for component, layers in ffns.items():
        # Without the config, the highest layer counts them.
        count = wanted if isinstance(wanted, int) and wanted > 0 else max(layers) + 1
        skipped = {n for n, left in held[component].items() if not left.width} if held else set()
        absent = [
            layer
            for layer in range(min(count, max(layers) + 7))
            if layer not in layers and layer not in skipped
        ]
        extra = [layer for layer in layers if layer >= count]
        name = f"keys: {component} layers ({keys.FFN_NAMES[component]})"
        if absent:
            problems.append(
                f"{name} must be 0 to {count - 1}, got no whole layer {list_some(absent)}"
            )
        if extra:
            problems.append(
                f"{name} must be 0 to {count - 1} as num_hidden_layers of {CONFIG} says, "
                f"got {list_some(extra)} too"
            )
        left_over = [layer for layer in layers if layer in skipped]
        if left_over:
            problems.append(
                f"{name} {list_some(left_over)} must not be there, as {RECIPE} says they are "
                "skipped, got their keys"
            )
    return problems


def _check_sizes(ffns: FFNs, config: Mapping[str, Any], held: Layers | None) -> list[str]:
    problems = []
    if held is not None:
        for component, layers in ffns.items():
            for layer, ffn in layers.items():
                left = held[component].get(layer)
                if left is not None and left.width and left.width != ffn.intermediate_size:
                    problems.append(
                        f"{RECIPE}: {component} layer {layer} must have {ffn.intermediate_size} "
                        f"neurons as in the keys, got {left.width}"
                    )
    for field in ("hidden_size", "intermediate_size") if held is None else ("hidden_size",):
        found: dict[int, list[str]] = {}
        for component, layers in ffns.items():
            for layer, ffn in layers.items():
                found.setdefault(getattr(ffn, field), []).append(f"{component} layer {layer}")
        wanted = config.get(field)
        if wanted is None and len(found) < 2:
            continue
        if len(found) > 1 or (found and (type(wanted) is not int or wanted not in found)):
            keys_say = [f"{size} in {list_some(names, 2)}" for size, names in sorted(found.items())]
            problems.append(
                f"{CONFIG}: {field} must be what every FFN in the keys has, {list_some(keys_say)}, "
                f"got {wanted!r:.120}"
            )
    return problems


def _check_transformed(
    component: str, sparse: set[int], layers: set[int], config: Mapping[str, Any]
) -> list[str]:
    field = keys.TRANSFORMED[component]
    value = config.get(field, False)
    if isinstance(value, bool):
        claimed = layers if value else set()
    elif isinstance(value, list) and all(type(layer) is int for layer in value):
        claimed = set(value)
    else:
        return [
            f"{CONFIG}: {field} must be true, false or a list of layer indices, got {value!r:.120}"
        ]
    if claimed == sparse:
        return []
    legal = sorted(sparse) if sparse else "false or absent"
    got = value if field in config else "nothing"
    return [f"{CONFIG}: {field} must be {legal}, the layers that are sparse in the keys, got {got}"]


def _check_counts(sizes: SparseLayer, config: Mapping[str, Any]) -> list[str]:
    problems = []
    num_experts = config.get("num_experts")
    if type(num_experts) is not int or num_experts != sizes.num_experts:
        problems.append(
            f"{CONFIG}: num_experts must be {sizes.num_experts} as the keys say, "
            f"got {_got(config, 'num_experts')}"
        )
    width = sizes.shared_width + sizes.num_experts * sizes.expert_width
    legal = [
        count
        for count in range(width + 1 if sizes.shared_width else 1)
        if count * (width // (sizes.num_experts + count)) == sizes.shared_width
    ]
    shared = config.get("num_shared_experts")
    if type(shared) is not int or shared not in legal:
        problems.append(
            f"{CONFIG}: num_shared_experts must be {list_some(legal)} for the shared width "
            f"{sizes.shared_width} in the keys, got {_got(config, 'num_shared_experts')}"
        )
    return problems


def find_top_k(num_experts: int, config: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    """Returns top_k as the config gives it, None when it is not legal, and what is wrong."""
    found = {name: config[name] for name in ("top_k", "num_experts_per_tok") if name in config}
    rule = f"must be 1 to {num_experts}, the number of experts in the keys"
    if not found:
        return None, [f"{CONFIG}: top_k {rule}, got neither top_k nor num_experts_per_tok"]
    if len(set(map(repr, found.values()))) > 1:
        return None, [
            f"{CONFIG}: top_k must equal num_experts_per_tok, both 1 to {num_experts}, "
            f"got {found['top_k']!r:.120} and {found['num_experts_per_tok']!r:.120}"
        ]
    name, value = next(iter(found.items()))
    if type(value) is not int or not 1 <= value <= num_experts:
        return None, [f"{CONFIG}: {name} {rule}, got {value!r:.120}"]
    return value, []


def _got(config: Mapping[str, Any], field: str) -> str:
    return f"{config[field]!r:.120}" if field in config else "nothing"
