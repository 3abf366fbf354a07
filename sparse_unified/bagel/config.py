# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL is made of: immutable descriptions, and how they are read off a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

from sparse_unified._common import context, list_some
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


def _field(source: Mapping[str, Any], name: str) -> Any:
    if source.get(name) is None:
        raise ValueError(f"{name} must be given, got keys {list_some(sorted(source))}")
    return source[name]


def _number(source: Mapping[str, Any], name: str) -> float:
    value = _field(source, name)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r:.120}")
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
    @context("llm_config.json")
    def from_json(cls, source: Mapping[str, Any]) -> LLMConfig:
        """Reads the contents of llm_config.json.

        Raises:
            ValueError: a size is missing or illegal, or an option this model lacks is switched on.
        """
        if source.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {source['hidden_act']!r:.120}")
        if source.get("rope_scaling"):
            raise ValueError(f"rope_scaling must be absent, got {source['rope_scaling']!r:.120}")
        if source.get("use_sliding_window"):
            raise ValueError("use_sliding_window must be false, got true")
        # Newer transformers write rope_theta inside rope_parameters.
        rope = source.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {rope!r:.120}")
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        heads = ("num_attention_heads", "num_key_value_heads")
        return cls(
            **{name: _field(source, name) for name in (*sizes, *heads)},
            rms_norm_eps=_number(source, "rms_norm_eps"),
            rope_theta=_number({**rope, **source}, "rope_theta"),
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
    @context("vit_config.json")
    def from_json(cls, source: Mapping[str, Any], *, num_hidden_layers: int) -> VisionConfig:
        """Reads the contents of vit_config.json for a file that holds `num_hidden_layers` layers.

        Official files name one layer more than they hold (BAGEL drops the last one), so both the
        number of layers held and that number plus one are accepted.
        """
        stated = source.get("num_hidden_layers", num_hidden_layers)
        if stated not in (num_hidden_layers, num_hidden_layers + 1):
            raise ValueError(
                f"num_hidden_layers must be {num_hidden_layers} or {num_hidden_layers + 1} for "
                f"weights of {num_hidden_layers} layers, got {stated!r:.120}"
            )
        activation = source.get("hidden_act", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_act must be 'gelu_pytorch_tanh', got {activation!r:.120}")
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
        return cls(
            **{name: _field(source, name) for name in (*sizes, "patch_size", "image_size")},
            num_hidden_layers=num_hidden_layers,
            num_channels=source.get("num_channels", 3),
            layer_norm_eps=_number({"layer_norm_eps": 1e-6, **source}, "layer_norm_eps"),
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


# ---- Descriptions read off the names and shapes of tensors. The JSON files of a checkpoint can be
# wrong without any key being missing, so shapes decide, and a JSON field that contradicts them is
# an error. Whether the tensors are those of the model, the model says, see `loading.check_tensors`.

Shapes = Mapping[str, Sequence[int]]
_VIT_LAYER = re.compile(r"vit_model\..*?\.layers\.(\d{1,6})\..+")


def vae_config(shapes: Shapes, *, where: str = "ae.safetensors", **factors: float) -> VAEConfig:
    """Returns the description of the autoencoder with these tensors.

    Args:
        shapes: shape of every tensor, by key.
        where: name of the file, for messages.
        factors: `scale_factor` and `shift_factor`, which no shape shows.

    Raises:
        ValueError: a tensor that decides is missing or has no such shape.
    """
    with context(where):
        ch, in_channels, *_ = _shape(shapes, "encoder.conv_in.weight", 4)
        levels = max(_first_absent(shapes, "encoder.down.{}.block."), 1)
        keys = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
        outputs = [_shape(shapes, key, 4)[0] for key in keys]
        if any(channels % ch for channels in outputs):
            raise ValueError(
                f"channels of every resolution must be multiples of {ch}, got {outputs}"
            )
        return VAEConfig(
            ch=ch,
            ch_mult=tuple(channels // ch for channels in outputs),
            num_res_blocks=_first_absent(shapes, "encoder.down.0.block.{}."),
            z_channels=_shape(shapes, "decoder.conv_in.weight", 4)[1],
            in_channels=in_channels,
            out_ch=_shape(shapes, "decoder.conv_out.weight", 4)[0],
            **factors,
        )


def bagel_config(
    shapes: Shapes,
    llm: Mapping[str, Any],
    vit: Mapping[str, Any],
    *,
    layers: LayerShapes,
    top_k: int | None = None,
    latent_channels: int,
    vae_downsample: int,
    special_tokens: SpecialTokens,
    stated: Mapping[str, Any] | None = None,
    where: str = "ema.safetensors",
) -> BagelConfig:
    """Returns the description of the model with these tensors.

    Args:
        shapes: shape of every tensor of the model, by official key.
        llm: contents of llm_config.json.
        vit: contents of vit_config.json.
        layers: what the layers hold.
        top_k: active experts of the sparse FFNs.
        latent_channels: what the autoencoder says.
        vae_downsample: what the autoencoder says.
        stated: contents of config.json, checked against the shapes where it repeats them.
        where: name of the weight file, for messages.

    Raises:
        ValueError: a tensor that decides is missing, or a JSON field contradicts the shapes.
    """
    stated = stated or {}
    with context(where):
        whole = LLMConfig.from_json(llm)
        cut = {
            component: {n: own for n, own in shapes.items() if own != whole.layer(n, component)}
            for component, shapes in layers.items()
        }
        token_channels = _shape(shapes, "vae2llm.weight", 2)[1]
        patch = math.isqrt(token_channels // latent_channels)
        if patch * patch * latent_channels != token_channels:
            raise ValueError(
                f"vae2llm.weight must have p * p * {latent_channels} columns for latents of "
                f"{latent_channels} channels, got {token_channels}"
            )
        vision = VisionConfig.from_json(vit, num_hidden_layers=_count_vision_layers(shapes))
        config = BagelConfig(
            llm=replace(whole, layers=cut, top_k=top_k),
            vision=vision,
            latent_channels=latent_channels,
            vae_downsample=vae_downsample,
            latent_patch_size=patch,
            max_latent_size=_side(shapes, "latent_pos_embed.pos_embed"),
            vit_max_num_patch_per_side=_side(shapes, "vit_pos_embed.pos_embed"),
            special_tokens=special_tokens,
        )
        for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"):
            found, value = getattr(config, name), stated.get(name)
            if value is not None and value != found:
                raise ValueError(
                    f"config.json: {name} must be {found} as the tensors say, got {value!r:.120}"
                )
        if stated.get("interpolate_pos"):
            raise ValueError("config.json: interpolate_pos must be false, got true")
    return config


def _count_vision_layers(shapes: Shapes) -> int:
    layers = {int(match[1]) for match in map(_VIT_LAYER.fullmatch, shapes) if match}
    if missing := set(range(max(layers, default=-1) + 1)) - layers:
        raise ValueError(
            f"layers of the vision transformer must be 0 to {max(layers)} as the highest says, "
            f"got no {min(missing)}"
        )
    return len(layers)


def _shape(shapes: Shapes, key: str, num_dims: int) -> Sequence[int]:
    """Returns the shape of a tensor that must have `num_dims` dimensions above 0."""
    if key not in shapes:
        raise ValueError(f"{key} must be in the file, got {len(shapes)} other tensors")
    if len(shapes[key]) != num_dims or 0 in shapes[key]:
        raise ValueError(f"{key} must have {num_dims} dimensions above 0, got {list(shapes[key])}")
    return shapes[key]


def _side(shapes: Shapes, key: str) -> int:
    """Returns the side of the square grid that a table of positions has rows for."""
    rows = _shape(shapes, key, 2)[0]
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"{key} must have a square number of rows, got {rows}")
    return side


def _first_absent(shapes: Shapes, start: str) -> int:
    """Returns the first number with which no key starts: a stray number makes no long list."""
    return next(
        number
        for number in count()
        if not any(key.startswith(start.format(number)) for key in shapes)
    )
