# SPDX-License-Identifier: Apache-2.0
"""What the images of a case are generated from: prompts, sizes, and the images before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_unified.bagel import Bagel, ContextImage
from sparse_unified.testing.cases import Case, is_pair


def read_prompts(case: Case, vocab_size: int) -> list[list[int]]:
    """Returns the token ids of each prompt; a flat list is one prompt."""

    def is_prompt(value: object) -> bool:
        return isinstance(value, list) and all(
            type(token) is int and 0 <= token < vocab_size for token in value
        )

    ids: list[Any] = case.field(
        "prompt_ids",
        f"be token ids below {vocab_size}, or a list of lists of them",
        lambda v: is_prompt(v) or (isinstance(v, list) and all(map(is_prompt, v))),
    )
    return list(ids) if ids and isinstance(ids[0], list) else [ids]


def read_sizes(case: Case, count: int) -> list[tuple[int, int]]:
    """Returns the height and width of each image; one pair is that of all."""
    value: list[Any] = case.field(
        "image_size",
        f"be a height and a width in pixels, or {count} pairs of them",
        lambda v: is_pair(v) or (isinstance(v, list) and len(v) == count and all(map(is_pair, v))),
    )
    listed = [value] * count if is_pair(value) else value
    return [(pair[0], pair[1]) for pair in listed]


def read_pictures(case: Case, key: str, channels: int) -> dict[int, Tensor]:
    """Returns context tensors by number, be they of one image, stacked, or numbered by name.

    Raises:
        ValueError: a tensor is not [channels, H, W] or a stack of such, or has no number.
    """
    prefix = f"{key}."
    named = {}
    for name in sorted(case.tensors):
        number = name.removeprefix(prefix)
        if name == key or not name.startswith(prefix):
            continue
        if not (number.isascii() and number.isdecimal()):
            raise ValueError(
                f"{case.tensor_file}: {key} must be followed by the number of an image, got {name}"
            )
        named[int(number)] = case.tensor(name)
    if not named and key in case.tensors:
        named = {0: case.tensor(key)}
    for tensor in named.values():
        if tensor.ndim < 3 or tensor.shape[-3] != channels or 0 in tensor.shape:
            raise ValueError(
                f"{case.tensor_file}: {key} must have shape [{channels}, H, W] or be a stack of "
                f"such, got {list(tensor.shape)}"
            )
    stacks = {i: named[i].reshape(-1, *named[i].shape[-3:]) for i in sorted(named)}
    if all(len(stack) == 1 for stack in stacks.values()):
        return {i: stack[0] for i, stack in stacks.items()}
    return dict(enumerate(image for stack in stacks.values() for image in stack))


def read_context_images(case: Case, model: Bagel, count: int) -> list[list[ContextImage]] | None:
    """Returns the images before each prompt.

    `context_image` is a (height, width) for all prompts, or for each a pair, a list of pairs or
    null; for one prompt it may also be the list of its pairs.
    """

    def is_slot(value: object) -> bool:
        return not value or is_pair(value)

    stated: Any = case.field(
        "context_image",
        "be null, a height and a width in pixels, or for each prompt null, a pair or a list of "
        "pairs",
        lambda v: (
            v is None
            or is_pair(v)
            or (
                isinstance(v, list)
                and all(is_slot(e) or (isinstance(e, list) and all(map(is_slot, e))) for e in v)
            )
        ),
    )
    if not stated:
        return None
    entries = [stated] * count if is_pair(stated) else list(stated)
    entries = [entries] if count == 1 and len(entries) > 1 else entries
    if len(entries) != count:
        raise ValueError(
            f"{case.json_file}: context_image must have one entry per prompt, {count}, got {stated}"
        )
    own = [[e] if not e or is_pair(e) else list(e) for e in entries]
    slots = [(prompt, size or None) for prompt, sizes in enumerate(own) for size in sizes]
    sizes = [size for _, size in slots]
    channels = model.config.latent_channels, model.config.vision.num_channels
    latents = _per_image(case, "context.latent", channels[0], sizes)
    pixels = _per_image(case, "context.vit_pixels", channels[1], sizes)
    step, patch = model.config.latent_downsample, model.config.latent_patch_size
    images: list[list[ContextImage]] = [[] for _ in range(count)]
    for (prompt, size), latent, seen in zip(slots, latents, pixels, strict=True):
        if size is None:
            continue
        if latent is None and seen is None:
            raise ValueError(
                f"{case.tensor_file}: tensors must hold each context image, got no {size}"
            )
        if latent is not None:
            # Latents of one stack are padded to the largest of them.
            latent = latent[:, : size[0] // step * patch, : size[1] // step * patch]
        images[prompt].append(ContextImage(latent=latent, vit_pixels=seen))
    return images


def _per_image(case: Case, key: str, channels: int, slots: Sequence[Any]) -> list[Tensor | None]:
    """Returns one tensor, or None, per slot; slots that are None hold no image."""
    places = [i for i, slot in enumerate(slots) if slot is not None]
    found = read_pictures(case, key, channels)
    if key in case.tensors and set(found) == {0}:
        return [found[0]] * len(slots)  # one for all
    # Prompts without an image may be counted or not.
    counted = set(found) != set(range(len(places)))
    own = {place: found.get(place if counted else i) for i, place in enumerate(places)}
    missing = key in case.tensors and any(tensor is None for tensor in own.values())
    if missing or not set(found) <= set(range(len(slots))):
        raise ValueError(
            f"{case.tensor_file}: {key} must hold {len(places)} images, got numbers {sorted(found)}"
        )
    return [own.get(i) for i in range(len(slots))]
