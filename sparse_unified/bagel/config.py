# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL is made of: immutable descriptions, and how they are read off a checkpoint."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sparse_unified._common import context, list_some
from sparse_unified.checkpoint.model_dir import LayerShape, LayerShapes
from sparse_unified.experts import ExpertLayout

_NORM_GROUPS = 32  # of the autoencoder
# More than any model has, few enough for products of three to be counted in 64 bits.
_MOST = 1 << 20


def _check_sizes(config: Any, **multiples: str) -> None:
    """Raises ValueError unless every field typed int is from 1 to 2^20, every float finite, and
    every field of `multiples` a multiple of the one it names."""
    for known in fields(config):
        name, value, rule = known.name, getattr(config, known.name), ""
        if known.type == "int" and not (type(value) is int and 1 <= value <= _MOST):
            rule = f"an integer from 1 to {_MOST}"
        if known.type == "float" and not (type(value) in (int, float) and math.isfinite(value)):
            rule = "a finite number"
        if rule:
            raise ValueError(f"{name} must be {rule}, got {value!r:.120}")
    for name, divisor in multiples.items():
        value, step = getattr(config, name), getattr(config, divisor)
        if value % step:
            raise ValueError(f"{name} must be a multiple of {divisor} = {step}, got {value}")


def _given(source: Mapping[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        if source.get(name) is None:
            raise ValueError(f"{name} must be given, got keys {list_some(sorted(source))}")
    return {name: source[name] for name in names}


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

    @context("LLMConfig")
    def __post_init__(self) -> None:
        _check_sizes(
            self, hidden_size="num_attention_heads", num_attention_heads="num_key_value_heads"
        )
        if self.head_dim % 2:
            rule = "hidden_size / num_attention_heads must be even, for rotary positions"
            raise ValueError(f"{rule}, got {self.head_dim}")
        # Copies, so that the caller's later changes do not show; read-only views cannot be pickled.
        layers = {component: dict(own) for component, own in self.layers.items() if own}
        object.__setattr__(self, "layers", layers)
        held = [(f"layer {n} of {c}", own) for c in layers for n, own in layers[c].items()]
        for name, shape in held:
            heads, groups, ffn = shape.kv_heads, shape.query_groups, shape.ffn
            if not 0 <= shape.width <= _MOST:
                raise ValueError(f"width of {name} must be 0 to {_MOST}, got {shape.width}")
            if not set(groups) <= set(heads) <= set(range(self.num_key_value_heads)):
                raise ValueError(
                    f"KV heads of {name} must be below {self.num_key_value_heads}, and its "
                    f"query_groups among them, got {heads} and {groups}"
                )
            most = ffn.num_experts if isinstance(ffn, ExpertLayout) else 0
            if most and not (type(self.top_k) is int and 1 <= self.top_k <= most):
                raise ValueError(
                    f"top_k must be from 1 to the {most} experts of {name}, got {self.top_k!r:.120}"
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
        """Reads the contents of llm_config.json."""
        expected = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False}
        for name, value in expected.items():
            if (source.get(name, value) or None) != (value or None):
                raise ValueError(f"{name} must be {value!r}, got {source[name]!r:.120}")
        # Newer transformers write rope_theta inside rope_parameters.
        rope = source.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {rope!r:.120}")
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        heads = ("num_attention_heads", "num_key_value_heads")
        return cls(**_given({**rope, **source}, *sizes, *heads, "rms_norm_eps", "rope_theta"))


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

    @context("VisionConfig")
    def __post_init__(self) -> None:
        _check_sizes(self, hidden_size="num_attention_heads")

    @classmethod
    @context("vit_config.json")
    def from_json(cls, source: Mapping[str, Any], *, num_hidden_layers: int) -> VisionConfig:
        """Reads the contents of vit_config.json for a file that holds `num_hidden_layers` layers.

        Official files name one layer more than they hold (BAGEL drops the last one), so both the
        number of layers held and that number plus one are accepted.
        """
        held = num_hidden_layers
        if (stated := source.get("num_hidden_layers", held)) not in (held, held + 1):
            rule = f"{held} or {held + 1} for weights of {held} layers"
            raise ValueError(f"num_hidden_layers must be {rule}, got {stated!r:.120}")
        activation = source.get("hidden_act", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_act must be 'gelu_pytorch_tanh', got {activation!r:.120}")
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
        return cls(
            **_given(source, *sizes, "patch_size", "image_size"),
            num_hidden_layers=num_hidden_layers,
            num_channels=source.get("num_channels", 3),
            layer_norm_eps=source.get("layer_norm_eps", 1e-6),
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

    @context("VAEConfig")
    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        _check_sizes(self)
        if not self.ch_mult or any(self.ch * multiple % _NORM_GROUPS for multiple in self.ch_mult):
            raise ValueError(
                f"ch * ch_mult must be multiples of {_NORM_GROUPS}, the groups of its norms, "
                f"for at least one resolution, got {self.ch} * {self.ch_mult}"
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

    @context("BagelConfig")
    def __post_init__(self) -> None:
        _check_sizes(self)
        for name in SpecialTokens.__slots__:
            token, most = getattr(self.special_tokens, name), self.llm.vocab_size
            if not 0 <= token < most:
                rule = f"an id below vocab_size = {most}"
                raise ValueError(f"special_tokens.{name} must be {rule}, got {token}")

    @property
    def latent_downsample(self) -> int:
        """Pixels per token of a generated image, along one side."""
        return self.vae_downsample * self.latent_patch_size

    @property
    def token_channels(self) -> int:
        """Numbers in one token of a generated image: p * p * C."""
        return self.latent_patch_size**2 * self.latent_channels

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens of an image of `height` x `width` pixels."""
        step, most = self.latent_downsample, self.latent_downsample * self.max_latent_size
        for name, side in (("height", height), ("width", width)):
            if type(side) is not int or not 1 <= side <= most or side % step:
                raise ValueError(
                    f"{name} must be a positive multiple of {step} pixels up to {most}, "
                    f"got {side!r:.120}"
                )
        return height // step, width // step


# ---- Descriptions read off the names and shapes of tensors. The JSON files of a checkpoint can be
# wrong without any key being missing, so shapes decide, and a JSON field that contradicts them is
# an error. Whether all tensors are those of a model so described (gaps between layers, a table that
# is no square), the model says, see `loading.check_tensors`.

Shapes = Mapping[str, Sequence[int]]


def vae_config(shapes: Shapes, *, where: str = "ae.safetensors", **factors: float) -> VAEConfig:
    """Returns the description of the autoencoder with these tensors.

    Args:
        shapes: shape of every tensor, by key.
        where: name of the file, for messages.
        factors: `scale_factor` and `shift_factor`, which no shape shows.
    """
    with context(where):
        ch, in_channels, *_ = _shape(shapes, "encoder.conv_in.weight", 4)
        levels = max(_count(shapes, r"encoder\.down\.(\d{1,6})\.block\."), 1)
        keys = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
        outputs = [_shape(shapes, key, 4)[0] for key in keys]
        if any(channels % ch for channels in outputs):
            raise ValueError(f"channels of resolutions must be multiples of {ch}, got {outputs}")
        return VAEConfig(
            ch=ch,
            ch_mult=tuple(channels // ch for channels in outputs),
            num_res_blocks=_count(shapes, r"encoder\.down\.0\.block\.(\d{1,6})\."),
            z_channels=_shape(shapes, "decoder.conv_in.weight", 4)[1],
            in_channels=in_channels,
            out_ch=_shape(shapes, "decoder.conv_out.weight", 4)[0],
            **factors,
        )


def read_config(
    checkpoint: Any,
    vae: VAEConfig,
    *,
    stated: Mapping[str, Any] | None = None,
    special_tokens: SpecialTokens | None = None,
) -> BagelConfig:
    """Returns the description of the model of a checkpoint, from headers and JSON files alone.

    Args:
        checkpoint: a `Checkpoint`.
        vae: its autoencoder.
        stated: config.json, checked against the shapes where it repeats them.
        special_tokens: ids of the markers; None takes those of the released checkpoints.
    """
    shapes = {key: spec.shape for key, spec in checkpoint.specs.items()}
    with context(os.fspath(checkpoint.directory)):
        whole = LLMConfig.from_json(checkpoint.llm_config)
        cut = {
            component: {n: own for n, own in layers.items() if own != whole.layer(n, component)}
            for component, layers in checkpoint.shapes.items()
        }
        num_vision_layers = _count(shapes, r"vit_model\..*?\.layers\.(\d{1,6})\.")
        patch_area = _shape(shapes, "vae2llm.weight", 2)[1] // vae.z_channels
        sides = {
            "latent_patch_size": math.isqrt(patch_area),
            "max_latent_size": math.isqrt(_shape(shapes, "latent_pos_embed.pos_embed", 2)[0]),
            "vit_max_num_patch_per_side": math.isqrt(
                _shape(shapes, "vit_pos_embed.pos_embed", 2)[0]
            ),
        }
        config = BagelConfig(
            llm=replace(whole, layers=cut, top_k=checkpoint.top_k),
            vision=VisionConfig.from_json(
                checkpoint.vit_config, num_hidden_layers=num_vision_layers
            ),
            latent_channels=vae.z_channels,
            vae_downsample=vae.downsample,
            special_tokens=special_tokens or SpecialTokens(),
            **sides,
        )
        for name, found in {**sides, "interpolate_pos": False}.items():
            value = (stated or {}).get(name)
            if value is not None and value != found:
                raise ValueError(
                    f"config.json: {name} must be {found} as the tensors say, got {value!r:.120}"
                )
    return config


def _shape(shapes: Shapes, key: str, num_dims: int) -> Sequence[int]:
    """Returns the shape of a tensor that must have `num_dims` dimensions above 0."""
    if key not in shapes:
        raise ValueError(f"{key} must be in the file, got {len(shapes)} other tensors")
    if len(shapes[key]) != num_dims or 0 in shapes[key]:
        raise ValueError(f"{key} must have {num_dims} dimensions above 0, got {list(shapes[key])}")
    return shapes[key]


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns how many numbers keys have in the place of the group."""
    return len({match[1] for match in map(re.compile(pattern).match, shapes) if match})
