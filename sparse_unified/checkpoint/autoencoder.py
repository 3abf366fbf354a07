# SPDX-License-Identifier: Apache-2.0
"""The tensors of ae.safetensors: how large the autoencoder is, and what must be there for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from sparse_unified._common import list_some

Shapes = Mapping[str, Sequence[int]]
_NORM_GROUPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderSizes:
    """The sizes of a FLUX autoencoder that its shapes show, in channels and blocks.

    Attributes:
        ch_mult: channels of each resolution in units of `ch`, the highest resolution first.
        num_res_blocks: residual blocks of each resolution in the encoder; the decoder has one more.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    in_channels: int
    out_ch: int


def read_sizes(shapes: Shapes, *, where: str) -> AutoencoderSizes:
    """Reads the sizes of the autoencoder off the shapes of its tensors.

    Args:
        shapes: shape of every tensor, by key.
        where: name of the file, for messages.

    Raises:
        ValueError: a tensor that decides is missing or has no such shape.
    """
    stem = require_shape(shapes, "encoder.conv_in.weight", 4, where)  # [ch, in, 3, 3]
    levels = _count(shapes, "encoder.down.{}.block.")
    outputs = [
        require_shape(shapes, f"encoder.down.{level}.block.0.conv2.weight", 4, where)[0]
        for level in range(max(levels, 1))
    ]
    for channels in outputs:
        if channels % stem[0]:
            raise ValueError(
                f"{where}: channels of every resolution must be multiples of {stem[0]}, "
                f"got {outputs}"
            )
    if any(channels % _NORM_GROUPS for channels in (stem[0], *outputs)):
        raise ValueError(
            f"{where}: channels of every resolution must be multiples of {_NORM_GROUPS}, the "
            f"groups of its norms, got {[stem[0], *outputs]}"
        )
    return AutoencoderSizes(
        ch=stem[0],
        ch_mult=tuple(channels // stem[0] for channels in outputs),
        num_res_blocks=_count(shapes, "encoder.down.0.block.{}."),
        z_channels=require_shape(shapes, "decoder.conv_in.weight", 4, where)[1],
        in_channels=stem[1],
        out_ch=require_shape(shapes, "decoder.conv_out.weight", 4, where)[0],
    )


def tensor_shapes(sizes: AutoencoderSizes) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of an autoencoder, by official key."""
    widths = [sizes.ch * multiple for multiple in sizes.ch_mult]
    found = {
        **_conv("encoder.conv_in", sizes.in_channels, sizes.ch, 3),
        **_ends("encoder", widths[-1], widths[-1], 2 * sizes.z_channels),
        **_conv("decoder.conv_in", sizes.z_channels, widths[-1], 3),
        **_ends("decoder", widths[-1], widths[0], sizes.out_ch),
    }
    for level, (inputs, outputs) in enumerate(pairwise([sizes.ch, *widths])):
        stem = f"encoder.down.{level}"
        found |= _blocks(stem, inputs, outputs, sizes.num_res_blocks)
        if level < len(widths) - 1:
            found |= _conv(f"{stem}.downsample.conv", outputs, outputs, 3)
    for level, outputs in enumerate(widths):
        stem = f"decoder.up.{level}"
        inputs = widths[min(level + 1, len(widths) - 1)]
        found |= _blocks(stem, inputs, outputs, sizes.num_res_blocks + 1)
        if level:
            found |= _conv(f"{stem}.upsample.conv", outputs, outputs, 3)
    return found


def check_autoencoder(shapes: Shapes, *, where: str) -> list[str]:
    """Returns a sentence for each way in which tensors are not those of one autoencoder."""
    try:
        wanted = tensor_shapes(read_sizes(shapes, where=where))
    except ValueError as error:
        return [str(error)]
    problems = []
    missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing:
        problems.append(f"{where}: tensors must be those of the model, got no {list_some(missing)}")
    if extra:
        problems.append(f"{where}: tensors must be those of the model, got {list_some(extra)} too")
    problems += [
        f"{where}: {key} must have shape {list(shape)}, got {list(shapes[key])}"
        for key, shape in wanted.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    return problems


def require_shape(shapes: Shapes, key: str, num_dims: int, where: str) -> Sequence[int]:
    """Returns the shape of a tensor; raises ValueError without `num_dims` dimensions above 0."""
    if key not in shapes:
        raise ValueError(f"{where}: {key} must be in the file, got {len(shapes)} other tensors")
    if len(shapes[key]) != num_dims or 0 in shapes[key]:
        raise ValueError(
            f"{where}: {key} must have {num_dims} dimensions above 0, got {list(shapes[key])}"
        )
    return shapes[key]


def _count(shapes: Shapes, start: str) -> int:
    """Returns the first number with which no key starts: a stray number makes no long list."""
    return next(
        number
        for number in count()
        if not any(key.startswith(start.format(number)) for key in shapes)
    )


def _conv(name: str, inputs: int, outputs: int, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _block(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    block = {
        **_norm(f"{name}.norm1", inputs),
        **_conv(f"{name}.conv1", inputs, outputs, 3),
        **_norm(f"{name}.norm2", outputs),
        **_conv(f"{name}.conv2", outputs, outputs, 3),
    }
    return block if inputs == outputs else block | _conv(f"{name}.nin_shortcut", inputs, outputs, 1)


def _blocks(name: str, inputs: int, outputs: int, num_blocks: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for block in range(num_blocks):
        found |= _block(f"{name}.block.{block}", outputs if block else inputs, outputs)
    return found


def _ends(half: str, inner: int, outer: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Returns the middle and the last layers of the encoder or the decoder."""
    middle = f"{half}.mid"
    found = _block(f"{middle}.block_1", inner, inner) | _block(f"{middle}.block_2", inner, inner)
    found |= _norm(f"{middle}.attn_1.norm", inner)
    for name in ("q", "k", "v", "proj_out"):
        found |= _conv(f"{middle}.attn_1.{name}", inner, inner, 1)
    return found | _norm(f"{half}.norm_out", outer) | _conv(f"{half}.conv_out", outer, outputs, 3)
