# SPDX-License-Identifier: Apache-2.0
"""What a user asks for, brought into one shape and checked before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union, cast

from sparse_unified._common import optional
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.sampler import Renorm, SamplingConfig
from sparse_unified.bagel.step_cache import StepCache

if TYPE_CHECKING:
    from PIL.Image import Image

Images = Union["Image", Sequence["Image"], None]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One image to generate: the text, the pictures before it, the seed, and the size in pixels."""

    text: str
    pictures: list[Image]
    seed: int
    size: Size


def check_prompts(prompts: str | Sequence[str], *, where: str) -> list[str]:
    """Returns the prompts as a list.

    Raises:
        TypeError: one is not a string. ValueError: there is none, or one is blank.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise ValueError(f"{where}: prompts must hold at least one prompt, got none")
    for prompt in listed:
        if not isinstance(prompt, str):
            raise TypeError(f"{where}: prompt must be a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{where}: prompt must not be empty, got {prompt!r}")
    return listed


def check_images(
    images: Images | Sequence[Images], prompts: str | Sequence[str], *, where: str
) -> list[list[Image]]:
    """Returns the images before each prompt.

    One prompt as a string takes a picture or a list of them; a list of prompts takes a list of
    the same length, each entry a picture, a list of pictures, or None.

    Raises:
        TypeError: something is not a PIL image. ValueError: there is not one entry per prompt.
    """
    count = 1 if isinstance(prompts, str) else len(prompts)
    if images is None:
        return [[] for _ in range(count)]
    image_class = optional("PIL.Image").Image
    entries: list[Any] = [images]
    if not isinstance(prompts, str):
        entries = [images] if isinstance(images, image_class) else list(cast("Sequence", images))
        if isinstance(images, image_class) or len(entries) != count:
            raise ValueError(
                f"{where}: images must be a list with one entry for each of {count} prompts, "
                f"got {len(entries)}"
            )
    listed = []
    for entry in entries:
        own = [] if entry is None else [entry] if isinstance(entry, image_class) else list(entry)
        for image in own:
            if not isinstance(image, image_class):
                raise TypeError(f"{where}: image must be a PIL image, got {type(image).__name__}")
            if 0 in image.size:
                raise ValueError(f"{where}: image must hold pixels, got size {image.size}")
        listed.append(own)
    return listed


def check_seeds(seed: int | Sequence[int] | None, count: int, *, where: str) -> list[int]:
    """Returns one seed per image: as given, counted up from one number, or drawn at random.

    Raises:
        ValueError: a seed is not an integer from 0 to 2^63 - 1, or there is not one per image.
    """
    if seed is None:
        seed = secrets.randbits(32)
    counted = not isinstance(seed, Sequence)
    seeds: list[Any] = [seed] if counted else list(cast("Sequence[int]", seed))
    if not counted and len(seeds) != count:
        raise ValueError(f"{where}: seed must be one integer or {count}, got {len(seeds)}")
    for value in seeds:
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(
                f"{where}: seed must be an integer from 0 to {2**63 - 1}, got {value!r}"
            )
    return [(seeds[0] + i) % 2**63 for i in range(count)] if counted else seeds


def choose_sizes(
    size: Size | Sequence[Size] | None,
    image_sizes: Sequence[Size | None],
    config: BagelConfig,
    *,
    where: str,
) -> list[Size]:
    """Returns the height and width of each image to generate.

    Args:
        size: one (height, width) for all, one per prompt, or None.
        image_sizes: size of the last image before each prompt, which None then takes; prompts
            without one get 1024 x 1024, or less if the model takes less.

    Raises:
        ValueError: a side is not a multiple of the token size or too long, or the number of sizes
            is wrong.
    """
    count, step = len(image_sizes), config.latent_downsample
    side = min(1024 // step, config.max_latent_size) * step
    if size is None:
        return [own or (side, side) for own in image_sizes]
    if not isinstance(size, Sequence) or not size:
        raise ValueError(f"{where}: size must be a pair (height, width), got {size!r}")
    listed: list[Any] = list(size)
    sizes = [listed] * count if all(isinstance(value, int) for value in listed) else listed
    if len(sizes) != count:
        raise ValueError(f"{where}: size must be one (height, width) or {count}, got {len(sizes)}")
    chosen = []
    for pair in sizes:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{where}: size must be a pair (height, width), got {pair!r}")
        config.token_grid(pair[0], pair[1], where=where)
        chosen.append((pair[0], pair[1]))
    return chosen


def image_requests(
    prompts: str | Sequence[str],
    images: Images | Sequence[Images],
    seed: int | Sequence[int] | None,
    size: Size | Sequence[Size] | None,
    *,
    config: BagelConfig,
    resized: Callable[[int, int], tuple[int, int]],
    where: str,
) -> list[ImageRequest]:
    """Checks what `generate` is asked for and returns it image by image.

    Args:
        resized: width and height a picture is resized to, which an edited one then has.
    """
    texts = check_prompts(prompts, where=where)
    pictures = check_images(images, prompts, where=where)
    seeds = check_seeds(seed, len(texts), where=where)
    edited = [resized(*own[-1].size)[::-1] if own else None for own in pictures]
    sizes = choose_sizes(size, edited, config, where=where)
    return [
        ImageRequest(text=text, pictures=own, seed=number, size=pair)
        for text, own, number, pair in zip(texts, pictures, seeds, sizes, strict=True)
    ]


def sampling_config(
    editing: bool,
    *,
    num_timesteps: int,
    timestep_shift: float,
    cfg_text_scale: float,
    cfg_img_scale: float | None,
    cfg_interval: tuple[float, float] | None,
    cfg_renorm_type: Renorm | str | None,
    cfg_renorm_min: float,
    cache: StepCache | None = None,
) -> SamplingConfig:
    """Fills what is None with the official settings for editing or for text to image."""
    if cfg_img_scale is None:
        cfg_img_scale = 2.0 if editing else 1.0
    if cfg_interval is None:
        cfg_interval = (0.0, 1.0) if editing else (0.4, 1.0)
    if cfg_renorm_type is None:
        cfg_renorm_type = Renorm.TEXT_CHANNEL if editing else Renorm.GLOBAL
    return SamplingConfig(
        num_timesteps=num_timesteps,
        timestep_shift=timestep_shift,
        cfg_text_scale=cfg_text_scale,
        cfg_img_scale=cfg_img_scale,
        cfg_interval=cfg_interval,
        cfg_renorm_type=cfg_renorm_type,  # type: ignore[arg-type]
        cfg_renorm_min=cfg_renorm_min,
        cache=cache,
    )


def image_batches(
    requests: Sequence[ImageRequest], batch_size: int | None, *, where: str, **settings: Any
) -> list[tuple[list[int], SamplingConfig]]:
    """Groups requests into batches of one way to sample.

    What an image is sampled with depends on its own request alone, so that company does not change
    it.

    Args:
        batch_size: most requests in a batch; None is any number.
        settings: of `sampling_config`.

    Returns:
        The positions of the requests of each batch, in order, and how to sample them.

    Raises:
        ValueError: `batch_size` is below 1, or a setting is out of range.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{where}: batch_size must be at least 1, got {batch_size}")
    groups: dict[SamplingConfig, list[int]] = {}
    for index, request in enumerate(requests):
        config = sampling_config(bool(request.pictures), **settings)
        groups.setdefault(config, []).append(index)
    return [
        (indices[start : start + step], config)
        for config, indices in groups.items()
        for step in [batch_size or len(indices)]
        for start in range(0, len(indices), step)
    ]
