# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL is made of: immutable descriptions, and how they are read off a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.shapes import LayerShape, LayerShapes
from sparse_unified.experts import ExpertLayout

_NORM_GROUPS = 32  # of the autoencoder
# More than any model has, few enough for products of three to be counted in 64 bits.
_MOST = 1 << 20


def _require_counts(config: Any) -> None:
    """Raises ValueError unless every field typed int is from 1 to 2^20."""
    for known in fields(config):
        value = getattr(config, known.name)
        if known.type != "int" or (type(value) is int and 1 <= value <= _MOST):
            continue
        limit = f"at most {_MOST}" if type(value) is int and value > _MOST else "at least 1"
        raise ValueError(
            f"{type(config).__name__}: {known.name} must be an integer of {limit}, "
            f"got {value!r:.120}"
        )


def _require_multiple(config: object, name: str, divisor: str) -> None:
    value, step = getattr(config, name), getattr(config, divisor)
    if value % step:
        raise ValueError(
            f"{type(config).__name__}: {name} must be a multiple of {divisor} = {step}, got {value}"
        )


def _field(source: Mapping[str, Any], name: str, where: str) -> Any:
    if source.get(name) is None:
        raise ValueError(f"{where}: {name} must be given, got keys {sorted(source)}")
    return source[name]


def _number(source: Mapping[str, Any], name: str, where: str) -> float:
    value = _field(source, name, where)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be a finite number, got {value!r:.120}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """The mixture of transformers: a Qwen2 decoder with a second set of weights for generation.

    Args:
        layers: component -> layer -> what it holds; layers that are not named hold a dense FFN of
            `intermediate_size` neurons and all heads.
        top_k: active experts of a token in sparse layers; None without any.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    layers: LayerShapes = field(default_factory=dict)
    top_k: int | None = None

    def __post_init__(self) -> None:
        _require_counts(self)
        _require_multiple(self, "hidden_size", "num_attention_heads")
        _require_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(
                "LLMConfig: hidden_size / num_attention_heads must be even, for rotary positions, "
                f"got {self.head_dim}"
            )
        # Copies, so that the caller's later changes do not show; read-only views cannot be pickled.
        layers = {component: dict(own) for component, own in self.layers.items() if own}
        object.__setattr__(self, "layers", layers)
        for component, own in layers.items():
            for layer, shape in own.items():
                self._check_layer(f"layer {layer} of {component}", shape)

    def _check_layer(self, name: str, shape: LayerShape) -> None:
        heads, groups = shape.kv_heads, shape.query_groups
        if not 0 <= shape.width <= _MOST:
            raise ValueError(f"LLMConfig: width of {name} must be 0 to {_MOST}, got {shape.width}")
        if not set(groups) <= set(heads) <= set(range(self.num_key_value_heads)):
            raise ValueError(
                f"LLMConfig: KV heads of {name} must be below {self.num_key_value_heads}, and its "
                f"query_groups among them, got {heads} and {groups}"
            )
        if isinstance(shape.ffn, ExpertLayout):
            most = shape.ffn.num_experts
            if type(self.top_k) is not int or not 1 <= self.top_k <= most:
                raise ValueError(
                    f"LLMConfig: top_k must be from 1 to the {most} experts of {name}, "
                    f"got {self.top_k!r:.120}"
                )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def layer(self, index: int, component: str) -> LayerShape:
        """Returns what a layer holds of a component."""
        all_heads = tuple(range(self.num_key_value_heads))
        whole = LayerShape(ffn=self.intermediate_size, kv_heads=all_heads, query_groups=all_heads)
        return self.layers.get(component, {}).get(index, whole)

    def sparse_layers(self, component: str) -> dict[int, ExpertLayout]:
        """Returns the sparse FFNs of a component, by layer."""
        shapes = self.layers.get(component, {}).items()
        return {n: shape.ffn for n, shape in shapes if isinstance(shape.ffn, ExpertLayout)}

    def with_experts(
        self, component: str, layers: Iterable[int], *, num_experts: int, top_k: int
    ) -> LLMConfig:
        """Returns the same model with some FFNs of a component divided into experts."""
        own = dict(self.layers.get(component, {}))
        for n in layers:
            shape = self.layer(n, component)
            ffn = ExpertLayout(intermediate_size=shape.width, num_experts=num_experts)
            own[n] = replace(shape, ffn=ffn)
        return replace(self, layers={**self.layers, component: own}, top_k=top_k)

    @classmethod
    def from_json(cls, source: Mapping[str, Any]) -> LLMConfig:
        """Reads the contents of llm_config.json.

        Raises:
            ValueError: a size is missing or illegal, or an option this model lacks is switched on.
        """
        where = "llm_config.json"
        if source.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{where}: hidden_act must be 'silu', got {source['hidden_act']!r:.120}"
            )
        if source.get("rope_scaling"):
            raise ValueError(
                f"{where}: rope_scaling must be absent, got {source['rope_scaling']!r:.120}"
            )
        if source.get("use_sliding_window"):
            raise ValueError(f"{where}: use_sliding_window must be false, got true")
        # Newer transformers write rope_theta inside rope_parameters.
        rope = source.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{where}: rope_parameters must be an object, got {rope!r:.120}")
        return cls(
            hidden_size=_field(source, "hidden_size", where),
            intermediate_size=_field(source, "intermediate_size", where),
            num_hidden_layers=_field(source, "num_hidden_layers", where),
            num_attention_heads=_field(source, "num_attention_heads", where),
            num_key_value_heads=_field(source, "num_key_value_heads", where),
            vocab_size=_field(source, "vocab_size", where),
            rms_norm_eps=_number(source, "rms_norm_eps", where),
            rope_theta=_number({**rope, **source}, "rope_theta", where),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The SigLIP image encoder, with one learned embedding per position of a square grid."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_counts(self)
        _require_multiple(self, "hidden_size", "num_attention_heads")

    @property
    def num_patches_per_side(self) -> int:
        """Side of the grid of learned position embeddings."""
        return self.image_size // self.patch_size

    @classmethod
    def from_json(cls, source: Mapping[str, Any], *, num_hidden_layers: int) -> VisionConfig:
        """Reads the contents of vit_config.json for a file that holds `num_hidden_layers` layers.

        Official files name one layer more than they hold (BAGEL drops the last one), so both the
        number of layers held and that number plus one are accepted.
        """
        where = "vit_config.json"
        stated = source.get("num_hidden_layers", num_hidden_layers)
        if stated not in (num_hidden_layers, num_hidden_layers + 1):
            raise ValueError(
                f"{where}: num_hidden_layers must be {num_hidden_layers} or "
                f"{num_hidden_layers + 1} for weights of {num_hidden_layers} layers, "
                f"got {stated!r:.120}"
            )
        activation = source.get("hidden_act", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise ValueError(
                f"{where}: hidden_act must be 'gelu_pytorch_tanh', got {activation!r:.120}"
            )
        return cls(
            hidden_size=_field(source, "hidden_size", where),
            intermediate_size=_field(source, "intermediate_size", where),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=_field(source, "num_attention_heads", where),
            patch_size=_field(source, "patch_size", where),
            image_size=_field(source, "image_size", where),
            num_channels=source.get("num_channels", 3),
            layer_norm_eps=_number({"layer_norm_eps": 1e-6, **source}, "layer_norm_eps", where),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """The FLUX autoencoder; `ch_mult` gives the channels of each resolution in units of `ch`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        _require_counts(self)
        if not self.ch_mult:
            raise ValueError("VAEConfig: ch_mult must name at least one resolution, got ()")
        for multiple in self.ch_mult:
            if self.ch * multiple % _NORM_GROUPS:
                raise ValueError(
                    f"VAEConfig: ch * ch_mult must be multiples of {_NORM_GROUPS}, the groups of "
                    f"its norms, got {self.ch} * {multiple}"
                )

    @property
    def downsample(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of the four marker tokens; the defaults are those of the released checkpoints."""

    bos: int = 151644
    eos: int = 151645
    start_of_image: int = 151652
    end_of_image: int = 151653


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelConfig:
    """The whole model but for its autoencoder, of which it keeps the two numbers it depends on.

    Args:
        latent_channels: channels of the VAE latent.
        vae_downsample: pixels per latent pixel, along one side.
        latent_patch_size: latent pixels per token, along one side.
        max_latent_size: tokens along the longest side of a generated image.
        vit_max_num_patch_per_side: patches along the longest side of an image that is seen.
    """

    llm: LLMConfig
    vision: VisionConfig
    latent_channels: int
    vae_downsample: int
    latent_patch_size: int
    max_latent_size: int
    vit_max_num_patch_per_side: int
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)

    def __post_init__(self) -> None:
        _require_counts(self)
        for name in SpecialTokens.__slots__:
            token = getattr(self.special_tokens, name)
            if not 0 <= token < self.llm.vocab_size:
                raise ValueError(
                    f"BagelConfig: special_tokens.{name} must be an id below vocab_size = "
                    f"{self.llm.vocab_size}, got {token}"
                )

    @property
    def latent_downsample(self) -> int:
        """Pixels per token of a generated image, along one side."""
        return self.vae_downsample * self.latent_patch_size

    @property
    def token_channels(self) -> int:
        """Numbers in one token of a generated image: p * p * C."""
        return self.latent_patch_size**2 * self.latent_channels

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens of an image of `height` x `width` pixels.

        Raises:
            ValueError: a side is not a positive multiple of `latent_downsample`, or needs more than
                `max_latent_size` tokens.
        """
        step, limit = self.latent_downsample, self.max_latent_size
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % step:
                raise ValueError(
                    f"{name} must be a positive multiple of {step} pixels, got {side!r:.120}"
                )
            if side > step * limit:
                raise ValueError(f"{name} must be at most {step * limit} pixels, got {side}")
        return height // step, width // step


# ---- Descriptions read off the names and shapes of tensors.
#
# The JSON files of a checkpoint can be wrong without any key being missing, so shapes decide
# wherever they can, and a JSON field that contradicts them is an error.

Shapes = Mapping[str, Sequence[int]]
_LAYER = re.compile(r"language_model\.model\.layers\.(\d{1,6})\.(.+)")
_VIT_LAYER = re.compile(r"vit_model\..*?\.layers\.(\d{1,6})\..+")
_QUERY_NORM = re.compile(r"self_attn\.q_norm(_moe_gen)?\.weight")


def vae_config(shapes: Shapes, *, where: str = "ae.safetensors", **factors: float) -> VAEConfig:
    """Returns the description of the autoencoder with these tensors.

    Args:
        shapes: shape of every tensor, by key.
        where: name of the file, for messages.
        factors: `scale_factor` and `shift_factor`, which no shape shows.

    Raises:
        ValueError: a tensor that decides is missing or has no such shape.
    """
    stem = _shape(shapes, "encoder.conv_in.weight", 4, where)  # [ch, in, 3, 3]
    levels = _first_absent(shapes, "encoder.down.{}.block.")
    outputs = [
        _shape(shapes, f"encoder.down.{level}.block.0.conv2.weight", 4, where)[0]
        for level in range(max(levels, 1))
    ]
    if any(channels % stem[0] for channels in outputs):
        raise ValueError(
            f"{where}: channels of every resolution must be multiples of {stem[0]}, got {outputs}"
        )
    if any(channels % _NORM_GROUPS for channels in (stem[0], *outputs)):
        raise ValueError(
            f"{where}: channels of every resolution must be multiples of {_NORM_GROUPS}, the "
            f"groups of its norms, got {[stem[0], *outputs]}"
        )
    return VAEConfig(
        ch=stem[0],
        ch_mult=tuple(channels // stem[0] for channels in outputs),
        num_res_blocks=_first_absent(shapes, "encoder.down.0.block.{}."),
        z_channels=_shape(shapes, "decoder.conv_in.weight", 4, where)[1],
        in_channels=stem[1],
        out_ch=_shape(shapes, "decoder.conv_out.weight", 4, where)[0],
        **factors,
    )


def bagel_config(
    shapes: Shapes,
    llm: Mapping[str, Any],
    vit: Mapping[str, Any],
    *,
    latent_channels: int,
    vae_downsample: int,
    special_tokens: SpecialTokens,
    top_k: int | None = None,
    num_shared_experts: int = 0,
    pruned: LayerShapes | None = None,
    stated: Mapping[str, Any] | None = None,
    where: str = "ema.safetensors",
) -> BagelConfig:
    """Returns the description of the model with these tensors.

    Args:
        shapes: shape of every tensor of the model, by official key.
        llm: contents of llm_config.json.
        vit: contents of vit_config.json.
        latent_channels: what the autoencoder says.
        vae_downsample: what the autoencoder says.
        top_k: active experts of the sparse FFNs, which no key tells.
        num_shared_experts: how many expert widths the shared expert is made of.
        pruned: what pruning has left of each layer of a component; None where it took nothing.
        stated: contents of config.json, checked against the shapes where it repeats them.
        where: name of the weight file, for messages.

    Raises:
        ValueError: a tensor that decides is missing, or a JSON field contradicts the shapes.
    """
    layers = _layers(shapes)
    whole = LLMConfig.from_json(llm)
    found = {
        component: _layer_shapes(
            whole, layers, component, (pruned or {}).get(component, {}), num_shared_experts, where
        )
        for component in FFN_NAMES
    }
    sparse = [
        (shape.ffn.num_experts, layer)
        for own in found.values()
        for layer, shape in own.items()
        if isinstance(shape.ffn, ExpertLayout)
    ]
    if sparse and top_k is None:
        raise ValueError(
            f"{where}: top_k must be given for the {sparse[0][0]} experts of layer {sparse[0][1]}, "
            "got none"
        )
    config = replace(whole, layers=found, top_k=top_k if sparse else None)
    embeddings = _shape(shapes, "language_model.model.embed_tokens.weight", 2, where)
    _agree("llm_config.json", "vocab_size", config.vocab_size, embeddings[0])
    _agree("llm_config.json", "hidden_size", config.hidden_size, embeddings[1])
    if pruned is None:
        num_layers = max(layers, default=-1) + 1
        _agree("llm_config.json", "num_hidden_layers", config.num_hidden_layers, num_layers)
    norms = [own[name] for own in layers.values() for name in own if _QUERY_NORM.fullmatch(name)]
    if not norms and pruned is None:
        norms = [_shape(shapes, "language_model.model.layers.0.self_attn.q_norm.weight", 1, where)]
    for norm in norms[:1]:
        _agree("llm_config.json", "hidden_size / num_attention_heads", config.head_dim, *norm)

    token_channels = _shape(shapes, "vae2llm.weight", 2, where)[1]
    patch = math.isqrt(token_channels // latent_channels)
    if patch * patch * latent_channels != token_channels:
        raise ValueError(
            f"{where}: vae2llm.weight must have p * p * {latent_channels} columns for latents of "
            f"{latent_channels} channels, got {token_channels}"
        )
    result = BagelConfig(
        llm=config,
        vision=VisionConfig.from_json(vit, num_hidden_layers=_count_vision_layers(shapes, where)),
        latent_channels=latent_channels,
        vae_downsample=vae_downsample,
        latent_patch_size=patch,
        max_latent_size=_side(shapes, "latent_pos_embed.pos_embed", where),
        vit_max_num_patch_per_side=_side(shapes, "vit_pos_embed.pos_embed", where),
        special_tokens=special_tokens,
    )
    for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"):
        _agree("config.json", name, (stated or {}).get(name), getattr(result, name))
    if (stated or {}).get("interpolate_pos"):
        raise ValueError("config.json: interpolate_pos must be false, got true")
    return result


def _layers(shapes: Shapes) -> dict[int, dict[str, Sequence[int]]]:
    """Returns the tensors of each decoder layer, by the rest of their keys."""
    found: dict[int, dict[str, Sequence[int]]] = {}
    for key, shape in shapes.items():
        if match := _LAYER.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = shape
    return found


def _layer_shapes(
    whole: LLMConfig,
    layers: Mapping[int, Shapes],
    component: str,
    pruned: Mapping[int, LayerShape],
    num_shared_experts: int,
    where: str,
) -> dict[int, LayerShape]:
    """Returns the layers of a component that are not as in the dense model."""
    ffn = FFN_NAMES[component]
    expert = re.compile(rf"{ffn}\.experts\.(\d{{1,6}})\.")
    found: dict[int, LayerShape] = {}
    for layer in sorted(layers.keys() | pruned.keys()):
        own, shape = layers.get(layer, {}), whole.layer(layer, component)
        if (left := pruned.get(layer)) is not None:
            shape = left
        num_experts = max((int(m[1]) + 1 for m in map(expert.match, own) if m), default=0)
        if num_experts:
            name = f"{ffn}.shared_expert.gate_proj.weight"
            shared = _shape(own, name, 2, where)[0] if name in own else 0
            width = _shape(own, f"{ffn}.experts.0.gate_proj.weight", 2, where)[0]
            experts = ExpertLayout(
                intermediate_size=shared + num_experts * width,
                num_experts=num_experts,
                num_shared_experts=num_shared_experts,
                shared_intermediate_size=shared,
            )
            shape = replace(shape, ffn=experts)
        if shape != whole.layer(layer, component):
            found[layer] = shape
    return found


def _count_vision_layers(shapes: Shapes, where: str) -> int:
    layers = {int(match[1]) for match in map(_VIT_LAYER.fullmatch, shapes) if match}
    if missing := set(range(max(layers, default=-1) + 1)) - layers:
        raise ValueError(
            f"{where}: layers of the vision transformer must be 0 to {max(layers)} as the highest "
            f"says, got no {min(missing)}"
        )
    return len(layers)


def _shape(shapes: Shapes, key: str, num_dims: int, where: str) -> Sequence[int]:
    """Returns the shape of a tensor that must have `num_dims` dimensions above 0."""
    if key not in shapes:
        raise ValueError(f"{where}: {key} must be in the file, got {len(shapes)} other tensors")
    if len(shapes[key]) != num_dims or 0 in shapes[key]:
        raise ValueError(
            f"{where}: {key} must have {num_dims} dimensions above 0, got {list(shapes[key])}"
        )
    return shapes[key]


def _side(shapes: Shapes, key: str, where: str) -> int:
    """Returns the side of the square grid that a table of positions has rows for."""
    rows = _shape(shapes, key, 2, where)[0]
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"{where}: {key} must have a square number of rows, got {rows}")
    return side


def _first_absent(shapes: Shapes, start: str) -> int:
    """Returns the first number with which no key starts: a stray number makes no long list."""
    return next(
        number
        for number in count()
        if not any(key.startswith(start.format(number)) for key in shapes)
    )


def _agree(where: str, name: str, stated: Any, found: Any) -> None:
    if stated is not None and stated != found:
        raise ValueError(f"{where}: {name} must be {found} as the tensors say, got {stated}")
