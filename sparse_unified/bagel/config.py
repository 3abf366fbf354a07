# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL is made of: immutable descriptions, and how they are read off a checkpoint."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sparse_unified._common import context, list_some, naming, require
from sparse_unified.checkpoint.model_dir import LayerShape, LayerShapes
from sparse_unified.experts import ExpertLayout

_NORM_GROUPS = 32  # of the autoencoder
# More than any model has, few enough for products of three to be counted in 64 bits.
_MOST = 1 << 20


def _check_sizes(config: Any, **multiples: str) -> None:
    """Raises ValueError unless every field typed int is from 1 to 2^20, every float finite, and
    every field of `multiples` a multiple of the one it names."""
    for known in fields(config):
        name, value, rule, holds = known.name, getattr(config, known.name), "", True
        if known.type == "int":
            rule = f"an integer from 1 to {_MOST}"
            holds = type(value) is int and 1 <= value <= _MOST
        if known.type == "float":
            rule, holds = "a finite number", type(value) in (int, float) and math.isfinite(value)
        require(holds, f"{name} must be {rule}", f"{value!r:.120}")
    for name, divisor in multiples.items():
        value, step = getattr(config, name), getattr(config, divisor)
        require(value % step == 0, f"{name} must be a multiple of {divisor} = {step}", value)


def _given(source: Mapping[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        given = source.get(name) is not None
        require(given, f"{name} must be given", f"keys {list_some(sorted(source))}")
    return {name: source[name] for name in names}


def _agree(source: Mapping[str, Any], expected: Mapping[str, Any], why: str = "") -> None:
    """Raises ValueError if a field is stated and not what is expected; empty is None."""
    for name, value in expected.items():
        found = source.get(name)
        is_expected = found is None or (found or None) == (value or None)
        require(is_expected, f"{name} must be {value!r}{why}", f"{found!r:.120}")


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
        rule = "hidden_size / num_attention_heads must be even, for rotary positions"
        require(self.head_dim % 2 == 0, rule, self.head_dim)
        # Copies, so that the caller's later changes do not show; read-only views cannot be pickled.
        layers = {component: dict(own) for component, own in self.layers.items() if own}
        object.__setattr__(self, "layers", layers)
        held = ((f"layer {n} of {c}", own) for c in layers for n, own in layers[c].items())
        for name, shape in held:
            heads, groups, count = shape.kv_heads, shape.query_groups, self.num_key_value_heads
            width = shape.width
            require(0 <= width <= _MOST, f"width of {name} must be 0 to {_MOST}", width)
            rule = f"KV heads of {name} must be below {count}, and its query_groups among them"
            inside = set(groups) <= set(heads) <= set(range(count))
            require(inside, rule, f"{heads} and {groups}")
            if isinstance(shape.ffn, ExpertLayout):
                rule = f"top_k must be from 1 to the {shape.ffn.num_experts} experts of {name}"
                is_legal = type(self.top_k) is int and 1 <= self.top_k <= shape.ffn.num_experts
                require(is_legal, rule, f"{self.top_k!r:.120}")

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
        _agree(source, {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False})
        # Newer transformers write rope_theta inside rope_parameters.
        rope = source.get("rope_parameters") or {}
        is_object = isinstance(rope, Mapping)
        require(is_object, "rope_parameters must be an object", f"{rope!r:.120}")
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
        stated = source.get("num_hidden_layers", held)
        rule = f"num_hidden_layers must be {held} or {held + 1} for weights of {held} layers"
        require(stated in (held, held + 1), rule, f"{stated!r:.120}")
        _agree(source, {"hidden_act": "gelu_pytorch_tanh"})
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
        fit = self.ch_mult and not any(self.ch * factor % _NORM_GROUPS for factor in self.ch_mult)
        rule = f"multiples of {_NORM_GROUPS}, the groups of its norms, for at least one resolution"
        require(fit, f"ch * ch_mult must be {rule}", f"{self.ch} * {self.ch_mult}")

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
            rule = f"special_tokens.{name} must be an id below vocab_size = {most}"
            require(0 <= token < most, rule, token)

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
            fits = type(side) is int and 1 <= side <= most and side % step == 0
            rule = f"{name} must be a positive multiple of {step} pixels up to {most}"
            require(fits, rule, f"{side!r:.120}")
        return height // step, width // step


# ---- Descriptions read off the names and shapes of tensors. The JSON files of a checkpoint can be
# wrong without any key being missing, so shapes decide, and a JSON field that contradicts them is
# an error. Whether all tensors are those of a model so described (gaps between layers, a table that
# is no square), the model says, see `loading.check_tensors`.

Specs = Mapping[str, Any]


def vae_config(specs: Specs, *, where: str = "ae.safetensors", **factors: float) -> VAEConfig:
    """Returns the description of the autoencoder of these tensors, or what has their shapes, by
    key; `factors` are those that no shape shows: scale_factor and shift_factor."""
    with context(where):
        ch, in_channels, *_ = _shape(specs, "encoder.conv_in.weight", 4)
        levels = max(_count(specs, r"encoder\.down\.(\d{1,6})\.block\."), 1)
        keys = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
        outputs = [_shape(specs, key, 4)[0] for key in keys]
        fit = not any(channels % ch for channels in outputs)
        require(fit, f"channels of resolutions must be multiples of {ch}", outputs)
        return VAEConfig(
            ch=ch,
            ch_mult=tuple(channels // ch for channels in outputs),
            num_res_blocks=_count(specs, r"encoder\.down\.0\.block\.(\d{1,6})\."),
            z_channels=_shape(specs, "decoder.conv_in.weight", 4)[1],
            in_channels=in_channels,
            out_ch=_shape(specs, "decoder.conv_out.weight", 4)[0],
            **factors,
        )


def read_config(
    checkpoint: Any,
    vae: VAEConfig,
    *,
    stated: Mapping[str, Any] | None = None,
    special_tokens: SpecialTokens | None = None,
) -> BagelConfig:
    """Returns the description of the model of a `Checkpoint`, from headers and JSON files alone;
    `stated`, its config.json, must agree with the shapes where it repeats them."""
    specs = checkpoint.specs
    with context(os.fspath(checkpoint.directory)):
        whole = LLMConfig.from_json(checkpoint.llm_config)
        cut = {
            component: {n: own for n, own in layers.items() if own != whole.layer(n, component)}
            for component, layers in checkpoint.shapes.items()
        }
        count = _count(specs, r"vit_model\..*?\.layers\.(\d{1,6})\.")
        area = _shape(specs, "vae2llm.weight", 2)[1] // vae.z_channels
        positions, seen = (
            _shape(specs, f"{table}.pos_embed", 2)[0]
            for table in ("latent_pos_embed", "vit_pos_embed")
        )
        sides = {
            "latent_patch_size": math.isqrt(area),
            "max_latent_size": math.isqrt(positions),
            "vit_max_num_patch_per_side": math.isqrt(seen),
        }
        config = BagelConfig(
            llm=replace(whole, layers=cut, top_k=checkpoint.top_k),
            vision=VisionConfig.from_json(checkpoint.vit_config, num_hidden_layers=count),
            latent_channels=vae.z_channels,
            vae_downsample=vae.downsample,
            special_tokens=special_tokens or SpecialTokens(),
            **sides,
        )
        with naming("config.json"):
            _agree(stated or {}, {**sides, "interpolate_pos": False}, " as the tensors say")
    return config


def _shape(specs: Specs, key: str, num_dims: int) -> Sequence[int]:
    """Returns the shape of a tensor that must have `num_dims` dimensions above 0."""
    require(key in specs, f"{key} must be in the file", f"{len(specs)} other tensors")
    found = list(specs[key].shape)
    fits = len(found) == num_dims and 0 not in found
    require(fits, f"{key} must have {num_dims} dimensions above 0", found)
    return found


def _count(specs: Specs, pattern: str) -> int:
    """Returns how many numbers keys have in the place of the group."""
    return len({match[1] for match in map(re.compile(pattern).match, specs) if match})
