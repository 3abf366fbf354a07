# SPDX-License-Identifier: Apache-2.0
"""BAGEL as a pipeline of diffusers: its arguments, its outputs, its `to` and its progress bar.

Needs the `engines` extra, and is not imported by anything else here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import StrPath, optional
from sparse_unified.bagel import AutoEncoder, Bagel, BagelPipeline, StepCache, load_bagel
from sparse_unified.bagel.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

_utils = optional("diffusers.pipelines.pipeline_utils", extra="engines")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ModelMixin = _utils.ModelMixin  # diffusers loads what is derived from a class of this name here


class BagelModel(ModelMixin):  # type: ignore[misc, valid-type]
    """How model_index.json names the model; diffusers calls `from_pretrained` of each part."""

    @staticmethod
    def from_pretrained(folder: str, torch_dtype: torch.dtype | None = None, **given: Any) -> Bagel:
        if given.get("quantization_config") is not None:
            rule = "be left out (storage= of BagelDiffusionPipeline quantizes)"
            raise ValueError(f"BagelModel: quantization_config must {rule}, got one")
        return _load(folder, torch_dtype)[0]


class BagelAutoEncoder(ModelMixin):  # type: ignore[misc, valid-type]
    """The autoencoder, as `BagelModel`."""

    @staticmethod
    def from_pretrained(
        folder: str, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> AutoEncoder:
        return _load(folder, torch_dtype, fill=False)[1]


class BagelTokenizer(ModelMixin):  # type: ignore[misc, valid-type]
    """The tokenizer, as `BagelModel`."""

    @staticmethod
    def from_pretrained(folder: str, **_: Any) -> Tokenizer:
        return Tokenizer.from_directory(folder)


def _load(folder: str, dtype: torch.dtype | None, **options: Any) -> tuple[Bagel, AutoEncoder]:
    tokens = Tokenizer.from_directory(folder).special_tokens
    return load_bagel(folder, dtype=dtype, special_tokens=tokens, **options)


class BagelDiffusionPipeline(_utils.DiffusionPipeline):  # type: ignore[name-defined]
    """Text to image and editing, dense, sparse or pruned; parts as of `BagelPipeline`."""

    def __init__(self, model: Bagel, vae: AutoEncoder, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.register_modules(model=model, vae=vae, tokenizer=tokenizer)
        self.bagel = BagelPipeline(model, vae, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: StrPath,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> BagelDiffusionPipeline:
        """As `BagelPipeline.from_pretrained`; `dtype` is called `torch_dtype` in diffusers, too."""
        loaded = BagelPipeline.from_pretrained(name, dtype=dtype or torch_dtype, **options)
        pipeline = cls(loaded.model, loaded.vae, loaded.tokenizer)
        pipeline.bagel = loaded
        return pipeline

    def save_pretrained(self, save_directory: StrPath, **card: Any) -> None:
        """Writes BAGEL's own layout and model_index.json, as `BagelPipeline.save_pretrained`."""
        self._placed().save_pretrained(save_directory, **card)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads it, as `BagelPipeline.push_to_hub`."""
        return self._placed().push_to_hub(repo_id, **options)

    def _placed(self) -> BagelPipeline:
        if self.bagel.directory is None and self.name_or_path:  # by DiffusionPipeline
            self.bagel.directory = Path(self.name_or_path)
        return self.bagel

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float = 4.0,
        image_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cache: StepCache | None = None,
        **options: Any,
    ) -> Any:
        """Draws one or more images for each prompt.

        Args:
            prompt: one text or several.
            image: pictures to edit, as `images` of `BagelPipeline.generate`.
            height, width: in pixels, multiples of 16; both or neither.
            num_inference_steps: steps of denoising. BAGEL counts the points of its time grid,
                one more: 49 steps are its 50 timesteps.
            guidance_scale: `cfg_text_scale`. image_guidance_scale: `cfg_img_scale`.
            num_images_per_prompt: images of a prompt come one after the other.
            generator: draws the seed of every image, or one generator for each; None is random.
                As ever with BAGEL, a seed is noise drawn on the CPU, whatever the device.
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W] in [0, 1]), or
                "latent" (a list of latent tokens [N, p * p * C] fp32).
            return_dict: an ImagePipelineOutput, else a tuple.
            cache, options: further arguments of `BagelPipeline.generate`.

        Raises:
            ValueError, TypeError: an argument is out of range.
        """
        where = "BagelDiffusionPipeline"
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"{where}: output_type must be one of {', '.join(OUTPUT_TYPES)}, "
                f"got {output_type!r}"
            )
        if (height is None) != (width is None):
            raise ValueError(
                f"{where}: height and width must be given together, got {height} and {width}"
            )
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = [image] if isinstance(prompt, str) and image is not None else image
        count = num_images_per_prompt
        result = self.bagel.generate(
            [text for text in texts for _ in range(count)],
            images=None if images is None else [own for own in images for _ in range(count)],
            seed=_seeds(generator, len(texts) * count, where=where),
            size=None if height is None or width is None else (height, width),
            num_timesteps=num_inference_steps + 1,
            cfg_text_scale=guidance_scale,
            cfg_img_scale=image_guidance_scale,
            cache=cache,
            progress=not getattr(self, "_progress_bar_config", {}).get("disable", False),
            **options,
        )
        drawn = result.latents if output_type == "latent" else _as_type(result.images, output_type)
        return _utils.ImagePipelineOutput(images=drawn) if return_dict else (drawn,)


def _seeds(generator: Any, count: int, *, where: str) -> list[int] | None:
    """Returns a seed for each image, drawn on the device of the generator."""
    if generator is None:
        return None
    listed = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
    if len(listed) != count or not all(isinstance(own, torch.Generator) for own in listed):
        raise ValueError(
            f"{where}: generator must be one torch.Generator or {count}, got {len(listed)}"
        )
    return [
        int(torch.randint(2**62, (1,), generator=own, device=own.device).item()) for own in listed
    ]


def _as_type(images: list[Image], output_type: str) -> list[Image] | np.ndarray | Tensor:
    if output_type == "pil":
        return images
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(
            "BagelDiffusionPipeline: images must have one size for output_type="
            f"{output_type!r}, got {sorted(sizes)}"
        )
    stacked = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    return stacked if output_type == "np" else torch.from_numpy(stacked).permute(0, 3, 1, 2)
