# SPDX-License-Identifier: Apache-2.0
"""What a BAGEL is made of: validated, immutable descriptions of its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_unified.bagel.layer_config import ExpertConfig, PrunedLayer, require_counts
from sparse_unified.checkpoint.structure import VIT_CONFIG, check_vision_layers


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

    `sparse_gen` and `sparse_und` map the layers whose generation or understanding FFN is a sparse
    mixture of experts to its description; all other layers are dense. `pruned_gen` and
    `pruned_und` map the layers that lost something to what they still hold.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    sparse_gen: Mapping[int, ExpertConfig] = field(default_factory=dict)
    sparse_und: Mapping[int, ExpertConfig] = field(default_factory=dict)
    pruned_gen: Mapping[int, PrunedLayer] = field(default_factory=dict)
    pruned_und: Mapping[int, PrunedLayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies, so that the caller's later changes do not show; read-only views cannot be pickled.
        for name in ("sparse_gen", "sparse_und", "pruned_gen", "pruned_und"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        require_counts(self)
        _require_multiple(self, "hidden_size", "num_attention_heads")
        _require_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(
                "LLMConfig: hidden_size / num_attention_heads must be even, for rotary positions, "
                f"got {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def held(self, layer: int, *, gen: bool) -> PrunedLayer:
        """Returns what a layer holds for the generation or the understanding component."""
        whole = PrunedLayer(
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
        )
        return (self.pruned_gen if gen else self.pruned_und).get(layer, whole)

    @classmethod
    def from_json(
        cls,
        source: Mapping[str, Any],
        *,
        sparse_gen: Mapping[int, ExpertConfig] | None = None,
        sparse_und: Mapping[int, ExpertConfig] | None = None,
        pruned_gen: Mapping[int, PrunedLayer] | None = None,
        pruned_und: Mapping[int, PrunedLayer] | None = None,
    ) -> LLMConfig:
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
            sparse_gen=sparse_gen or {},
            sparse_und=sparse_und or {},
            pruned_gen=pruned_gen or {},
            pruned_und=pruned_und or {},
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
        require_counts(self)
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
        where = VIT_CONFIG
        if problems := check_vision_layers(source, range(num_hidden_layers)):
            raise ValueError(problems[0])
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
        require_counts(self)
        if not self.ch_mult:
            raise ValueError("VAEConfig: ch_mult must name at least one resolution, got ()")
        for multiple in self.ch_mult:
            if self.ch * multiple % 32:
                raise ValueError(
                    "VAEConfig: ch * ch_mult must be multiples of 32, the groups of its norms, "
                    f"got {self.ch} * {multiple}"
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
        require_counts(self)
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

    def token_grid(self, height: int, width: int, *, where: str) -> tuple[int, int]:
        """Returns the rows and columns of tokens of an image of `height` x `width` pixels.

        Raises:
            ValueError: a side is not a positive multiple of `latent_downsample`, or needs more than
                `max_latent_size` tokens.
        """
        step, limit = self.latent_downsample, self.max_latent_size
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % step:
                raise ValueError(
                    f"{where}: {name} must be a positive multiple of {step} pixels, "
                    f"got {side!r:.120}"
                )
            if side > step * limit:
                raise ValueError(
                    f"{where}: {name} must be at most {step * limit} pixels, got {side}"
                )
        return height // step, width // step
