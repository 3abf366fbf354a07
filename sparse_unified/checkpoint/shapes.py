# SPDX-License-Identifier: Apache-2.0
"""What each layer of a checkpoint has of each component: from keys, recipe and llm_config.json.

The keys decide, and the two files have to agree with them. A wrong `top_k` passes every key check,
and a missing `transformed_gen` makes the official loader keep random weights in silence; so each
field that describes a sparse FFN is compared here. What no key tells is which of the dense model's
heads are left; that is what the recipe says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_unified._common import list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.modes import (
    MAX_LAYERS,
    AdaptConfig,
    MoEConfig,
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint.recipe import RECIPE, Recipe
from sparse_unified.checkpoint.safetensors_io import TensorSpec
from sparse_unified.experts import ExpertLayout

CONFIG = "llm_config.json"
_MAX_HEADS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer has left of one component. Heads have their numbers in the dense checkpoint.

    Attributes:
        ffn: neurons of a dense FFN, the layout of a sparse one, 0 where it is skipped.
        kv_heads: KV heads of the layer; () where the component skips the attention.
        query_groups: the KV head that each group of the component's query heads reads, ascending.
    """

    ffn: int | ExpertLayout
    kv_heads: tuple[int, ...]
    query_groups: tuple[int, ...]

    @property
    def width(self) -> int:
        """Neurons of the FFN, of all experts together where it is sparse."""
        return self.ffn if isinstance(self.ffn, int) else self.ffn.intermediate_size

    @property
    def has_attention(self) -> bool:
        """Whether the component's tokens run through the attention."""
        return bool(self.query_groups)

    @property
    def query_places(self) -> tuple[int, ...]:
        """The place among `kv_heads` of the KV head that each group of query heads reads."""
        return tuple(map(self.kv_heads.index, self.query_groups))


# Component -> layer -> its shape.
LayerShapes = Mapping[str, Mapping[int, LayerShape]]


def ffn_parts(ffn: int | ExpertLayout) -> dict[str, tuple[int, int]]:
    """Returns which neurons each part of an FFN holds, by the start of its keys, in order."""
    if isinstance(ffn, int):
        return {"": (0, ffn)}
    return {f"{name}.": neurons for name, neurons in ffn.ranges().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """One FFN of a file: its neurons, or the layout of a sparse one, its hidden size and dtype."""

    ffn: int | ExpertLayout
    hidden_size: int
    dtype: torch.dtype

    @property
    def layout(self) -> ExpertLayout | None:
        """Its experts; None where it is dense."""
        return self.ffn if isinstance(self.ffn, ExpertLayout) else None

    @property
    def intermediate_size(self) -> int:
        """Neurons, of all experts together where it is sparse."""
        return self.ffn if isinstance(self.ffn, int) else self.ffn.intermediate_size


FFNs = dict[str, dict[int, FFN]]


# The FFNs, by their keys


def scan_ffns(specs: Mapping[str, TensorSpec]) -> tuple[FFNs, list[str]]:
    """Finds every FFN of a file and checks its keys and shapes against each other.

    Returns:
        `{component: {layer: FFN}}` with ascending layers, holding the FFNs that are whole; and a
        sentence for each thing that is wrong.
    """
    parts: dict[tuple[str, int], dict[str, TensorSpec]] = {}
    for key, spec in specs.items():
        found = keys.find_ffn_key(key)
        if found is not None:
            component, layer, rest = found
            parts.setdefault((component, layer), {})[rest] = spec
    ffns: FFNs = {}
    problems: list[str] = []
    for component, layer in sorted(parts):
        where = keys.ffn_prefix(component, layer).removesuffix(".")
        errors = list(_check_names(where, component, parts[component, layer]))
        errors = errors or list(_check_shapes(where, parts[component, layer]))
        problems += errors
        if not errors:
            ffns.setdefault(component, {})[layer] = _describe(parts[component, layer])
    return ffns, problems


def _check_names(where: str, component: str, part: Mapping[str, TensorSpec]) -> Iterable[str]:
    dense = [rest for rest in part if keys.DENSE_KEY.fullmatch(rest)]
    patterns = (keys.EXPERT_KEY, keys.SHARED_KEY, keys.ROUTER_KEY)
    sparse = [rest for rest in part if any(pattern.fullmatch(rest) for pattern in patterns)]
    unknown = sorted(set(part) - set(dense) - set(sparse))
    if unknown:
        yield (
            f"{where}: keys must be {{gate,up,down}}_proj.weight of a dense FFN, or gate.weight, "
            "gate_shared.weight, experts.N.{gate,up,down}_proj.weight, "
            f"shared_expert.{{gate,up,down}}_proj.weight of a sparse one, got {list_some(unknown)}"
        )
        return
    if dense and sparse:
        yield (
            f"{where}: keys must be those of a dense or of a sparse FFN, "
            f"got both: {dense[0]} and {sparse[0]}"
        )
        return
    if dense:
        missing = [f"{name}.weight" for name in keys.PROJECTIONS if f"{name}.weight" not in part]
        if missing:
            yield (
                f"{where}: a dense FFN must hold gate_proj.weight, up_proj.weight and "
                f"down_proj.weight, got no {list_some(missing)}"
            )
        return
    yield from _check_sparse_names(where, component, part)


def _check_sparse_names(
    where: str, component: str, part: Mapping[str, TensorSpec]
) -> Iterable[str]:
    routers = {f"{name}.weight" for name in keys.router_names(component)}
    missing = sorted(routers - set(part))
    if missing:
        yield f"{where}: a sparse FFN must hold {', '.join(sorted(routers))}, got no " + list_some(
            missing
        )
    if component == "gen" and "gate_img.weight" in part:
        yield f"{where}: gate_img.weight must be in und blocks only, got it in a gen block"
    shared = [f"shared_expert.{name}.weight" for name in keys.PROJECTIONS]
    lost = [rest for rest in shared if rest not in part]
    if lost and len(lost) < len(shared):
        yield f"{where}: shared_expert must hold all three projections, got no {list_some(lost)}"

    # The router's rows count the experts; without a router, the highest expert does.
    present = {int(match[1]) for rest in part if (match := keys.EXPERT_KEY.fullmatch(rest))}
    gate = part.get("gate.weight")
    if gate is not None and len(gate.shape) == 2:
        count, source = max(gate.shape[0], 1), f"the {gate.shape[0]} rows of gate.weight say"
    else:
        count, source = max(present, default=0) + 1, "the highest expert says"
    extra = sorted(expert for expert in present if expert >= count)
    if extra:
        yield f"{where}: experts must be 0 to {count - 1} as {source}, got {list_some(extra)} too"
    # A count made up by a damaged router must not make a list of its length.
    absent = [
        expert for expert in range(min(count, max(present, default=0) + 7)) if expert not in present
    ]
    if absent:
        yield (
            f"{where}: experts must be 0 to {count - 1} as {source}, "
            f"got no expert {list_some(absent)}"
        )
    halves = [
        f"experts.{expert}.{name}.weight"
        for expert in sorted(present)
        for name in keys.PROJECTIONS
        if f"experts.{expert}.{name}.weight" not in part
    ]
    if halves:
        yield f"{where}: an expert must hold all three projections, got no {list_some(halves)}"


def _check_shapes(where: str, part: Mapping[str, TensorSpec]) -> Iterable[str]:
    flat = [f"{rest} {list(spec.shape)}" for rest, spec in part.items() if len(spec.shape) != 2]
    if flat:
        yield f"{where}: weights must have 2 dimensions, got {list_some(flat)}"
        return
    dtypes = {spec.dtype for spec in part.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield f"{where}: weights must share one floating dtype, got {list_some(found)}"

    # Hidden size D and one width for each of: the dense FFN, the shared expert, the experts.
    first = next(iter(part))
    axis = 0 if "down_proj" in first else 1
    hidden = part[first].shape[axis]
    if hidden < 1:
        shape = list(part[first].shape)
        yield f"{where}: hidden_size must be at least 1, got shape {shape} of {first}"
    widths: dict[str, dict[int, list[str]]] = {}
    for rest, spec in part.items():
        axis = 0 if "down_proj" in rest else 1
        if spec.shape[axis] != hidden:
            yield (
                f"{where}: {rest} must have {hidden} (hidden_size) as dimension {axis}, "
                f"got shape {list(spec.shape)}"
            )
        if (match := keys.ROUTER_KEY.fullmatch(rest)) is None:
            group = (
                "expert"
                if rest.startswith("experts.")
                else rest.rpartition("_proj")[0].rpartition(".")[0]
            )
            widths.setdefault(group, {}).setdefault(spec.shape[1 - axis], []).append(rest)
        elif (
            rows := 1 if match[1] == "gate_shared" else part["gate.weight"].shape[0]
        ) != spec.shape[0]:
            yield f"{where}: {rest} must have {rows} rows, got shape {list(spec.shape)}"
    for group, by_width in widths.items():
        if len(by_width) > 1:
            odd = [f"{width} in {list_some(names, 2)}" for width, names in sorted(by_width.items())]
            yield f"{where}: {group or 'dense'} widths must agree, got {list_some(odd)}"
        if min(by_width) < 1:
            yield f"{where}: {group or 'dense'} widths must be at least 1, got 0"


def _describe(part: Mapping[str, TensorSpec]) -> FFN:
    if "gate_proj.weight" in part:
        gate_proj = part["gate_proj.weight"]
        width, hidden = gate_proj.shape
        return FFN(ffn=width, hidden_size=hidden, dtype=gate_proj.dtype)
    gate = part["gate.weight"]
    num_experts, hidden = gate.shape
    shared = part.get("shared_expert.gate_proj.weight")
    shared_width = shared.shape[0] if shared is not None else 0
    expert_width = part["experts.0.gate_proj.weight"].shape[0]
    layout = ExpertLayout(
        intermediate_size=shared_width + num_experts * expert_width,
        num_experts=num_experts,
        shared_intermediate_size=shared_width,
    )
    return FFN(ffn=layout, hidden_size=hidden, dtype=gate.dtype)


# Keys and llm_config.json


def check_ffns(ffns: FFNs, config: Mapping[str, Any], left: LayerShapes | None = None) -> list[str]:
    """Compares the FFNs found in the keys with llm_config.json.

    Args:
        left: what pruning has left; None where nothing was pruned.

    Returns:
        a sentence for each disagreement.
    """
    problems = [*_check_layers(ffns, config, left), *_check_sizes(ffns, config, left)]
    layouts: list[ExpertLayout] = []
    for component, layers in ffns.items():
        sparse = {layer: ffn.layout for layer, ffn in layers.items() if ffn.layout is not None}
        problems += _check_transformed(component, set(sparse), set(layers), config)
        layouts += sparse.values()
    if not layouts:
        return problems
    kinds = sorted({(own.num_experts, own.expert_width, own.shared_width) for own in layouts})
    # Narrower FFNs have narrower experts, but as many of them.
    if len(kinds if left is None else {kind[0] for kind in kinds}) > 1:
        found = [f"{count} x {width} + {shared}" for count, width, shared in kinds]
        problems.append(
            "keys: sparse layers must agree on experts x width + shared width, "
            f"got {list_some(found)}"
        )
    for kind in kinds if left is not None else kinds[:1]:
        problems += _check_counts(*kind, config)
    return problems + find_top_k(kinds[0][0], config)[1]


def _check_layers(ffns: FFNs, config: Mapping[str, Any], left: LayerShapes | None) -> list[str]:
    problems = []
    wanted = config.get("num_hidden_layers")
    for component, layers in ffns.items():
        # Without the config, the highest layer counts them.
        count = wanted if isinstance(wanted, int) and wanted > 0 else max(layers) + 1
        skipped = {n for n, own in left[component].items() if not own.width} if left else set()
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


def _check_sizes(ffns: FFNs, config: Mapping[str, Any], left: LayerShapes | None) -> list[str]:
    problems = []
    for component, layers in ffns.items() if left is not None else ():
        for layer, ffn in layers.items():
            own = left[component].get(layer) if left is not None else None
            if own is not None and own.width and own.width != ffn.intermediate_size:
                problems.append(
                    f"{RECIPE}: {component} layer {layer} must have {ffn.intermediate_size} "
                    f"neurons as in the keys, got {own.width}"
                )
    for field in ("hidden_size", "intermediate_size") if left is None else ("hidden_size",):
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


def _check_counts(
    experts: int, expert_width: int, shared_width: int, config: Mapping[str, Any]
) -> list[str]:
    problems = []
    num_experts = config.get("num_experts")
    if type(num_experts) is not int or num_experts != experts:
        problems.append(
            f"{CONFIG}: num_experts must be {experts} as the keys say, "
            f"got {_got(config, 'num_experts')}"
        )
    width = shared_width + experts * expert_width
    legal = [
        count
        for count in range(width + 1 if shared_width else 1)
        if count * (width // (experts + count)) == shared_width
    ]
    shared = config.get("num_shared_experts")
    if type(shared) is not int or shared not in legal:
        problems.append(
            f"{CONFIG}: num_shared_experts must be {list_some(legal)} for the shared width "
            f"{shared_width} in the keys, got {_got(config, 'num_shared_experts')}"
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


# The recipe


def whole_layers(config: Mapping[str, Any]) -> dict[str, dict[int, LayerShape]]:
    """Returns what the layers of the dense checkpoint hold, from its config.

    Raises:
        ValueError: a size that pruning depends on is missing in llm_config.json.
    """
    sizes = [
        _count(name, config.get(name), limit)
        for name, limit in (("num_hidden_layers", MAX_LAYERS), ("intermediate_size", 1 << 31))
    ]
    heads = config.get("num_key_value_heads", config.get("num_attention_heads", 1))
    heads = _count("num_key_value_heads", heads, _MAX_HEADS)
    all_heads = tuple(range(heads))
    held = LayerShape(ffn=sizes[1], kv_heads=all_heads, query_groups=all_heads)
    return {component: dict.fromkeys(range(sizes[0]), held) for component in keys.FFN_NAMES}


def _count(name: str, value: object, limit: int) -> int:
    # A list of as many entries is made, so a count that no model has must not get that far.
    if type(value) is not int or value < 1:
        raise ValueError(f"{CONFIG}: {name} must be a positive integer, got {value!r:.120}")
    if value > limit:
        raise ValueError(f"{CONFIG}: {name} must be at most {limit}, got {value!r:.120}")
    return value


def follow_recipe(layers: dict[str, dict[int, LayerShape]], recipe: Recipe) -> list[str]:
    """Carries out the steps of a recipe on `layers`; returns a sentence for what cannot be."""
    problems = []
    for number, step in enumerate(recipe.steps):
        config, at = step.config, f"{RECIPE}: step {number} ({step.config.mode})"
        wrong = [n for n in config.layers if n not in layers["gen"]]
        if wrong:
            problems.append(f"{at}: layers must be 0 to {len(layers['gen']) - 1}, got {wrong[0]}")
            continue
        if isinstance(config, AdaptConfig):
            continue
        for layer in map(int, config.layers):
            if isinstance(config, (MoEConfig, PruneWidthConfig)):
                held = layers[config.component][layer]
                width = step.widths.get(layer, held.width)
                if not 1 <= width <= held.width:
                    problems.append(
                        f"{at}: width of layer {layer} must be 1 to the {held.width} neurons left, "
                        f"got {width}"
                    )
                layers[config.component][layer] = replace(held, ffn=width)
            elif isinstance(config, PruneHeadsConfig):
                for component in keys.FFN_NAMES:
                    held = layers[component][layer]
                    groups = step.heads[layer][component]
                    if (
                        not set(groups) <= set(held.query_groups)
                        or bool(groups) != held.has_attention
                    ):
                        problems.append(
                            f"{at}: {component} heads of layer {layer} must be some of "
                            f"{list(held.query_groups)}, got {list(groups)}"
                        )
                    kv_heads = step.heads[layer]["keys"] if groups else ()
                    layers[component][layer] = replace(held, kv_heads=kv_heads, query_groups=groups)
            else:
                layers[config.component][layer] = skip(layers[config.component][layer], config)
    return problems


def skip(held: LayerShape, config: SkipLayersConfig) -> LayerShape:
    """Returns what is left once the parts of a "depth" step are gone."""
    if Part.FFN in config.parts:
        held = replace(held, ffn=0)
    if Part.ATTENTION in config.parts:
        held = replace(held, kv_heads=(), query_groups=())
    return held


def absent_prefixes(layers: LayerShapes) -> tuple[str, ...]:
    """Returns the starts of all keys that a file must not have, because their part is skipped."""
    prefixes: list[str] = []
    for component, by_layer in layers.items():
        for layer, held in by_layer.items():
            if not held.width:
                prefixes += keys.module_prefixes(layer, keys.ffn_modules(component))
            if not held.has_attention:
                prefixes += keys.module_prefixes(layer, keys.attention_modules(component))
    return tuple(prefixes)
