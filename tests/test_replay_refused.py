# SPDX-License-Identifier: Apache-2.0
"""A case that is incomplete or malformed is refused with the file, the rule and the value."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_unified.testing import Case, read_case, replay

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
REFUSED = re.compile(r"case\.(json|safetensors): .* must .*, got .*")
WRONG: list[Any] = [None, "x", -1, 0, 1.5, True, float("nan"), [], {}, [None], [[]], ["x"], [1, 2]]
OUTPUTS = ("output", "router_logits", "latent.", "token_ids", "moe.", "decoded")


def write(directory: Path, case: Case) -> Path:
    (directory / "case.json").write_text(json.dumps(case.fields))
    save_file(case.tensors, directory / "case.safetensors")
    return directory / "case"


def small(name: str) -> Case:
    """Returns a golden case that takes as few steps as there can be."""
    case = read_case(GOLDEN / name)
    short = {"num_timesteps": 2, "length": 1}
    fields = case.fields | {key: n for key, n in short.items() if key in case.fields}
    return Case(name="case", fields=fields, tensors=case.tensors)


def places(fields: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the path of every field, those inside others included."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def replaced(fields: dict[str, Any], path: tuple[str, ...], *value: Any) -> dict[str, Any]:
    """Returns the fields with another value at a place, or without it."""
    changed = copy.deepcopy(fields)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    if value:
        inner[path[-1]] = value[0]
    return changed


def assert_replayed_or_refused(path: Path, what: object) -> bool:
    """Tells whether the case was refused; anything but a ValueError of the right form fails."""
    message = ""
    try:
        replay(path)
    except ValueError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert message == "" or REFUSED.fullmatch(message), (what, message)
    return message != ""


@pytest.mark.parametrize("name", CASES)
def test_any_missing_or_malformed_field_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case = small(name)
    path = write(tmp_path, case)
    refused = 0
    for place in places(case.fields):
        for value in [(), *((value,) for value in WRONG)]:
            fields = replaced(case.fields, place, *value)
            (tmp_path / "case.json").write_text(json.dumps(fields))
            refused += assert_replayed_or_refused(path, (place, value))
    assert refused > len(case.fields)


def reshaped(tensor: Tensor) -> Iterator[Tensor]:
    """Yields tensors of other shapes and types."""
    yield tensor.flatten()
    yield tensor[None].clone()
    yield tensor[:0].clone()
    yield torch.cat([tensor, tensor])
    yield torch.zeros(())
    yield tensor.to(torch.int64)
    yield tensor.to(torch.float64)
    yield tensor.to(torch.bool)


@pytest.mark.parametrize("name", CASES)
def test_any_missing_or_malformed_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case = small(name)
    inputs = [key for key in case.tensors if not key.startswith(("model.", *OUTPUTS))]
    weights = [key for key in case.tensors if key.startswith("model.")]
    for key in [*inputs, *weights[:: max(1, len(weights) // 8)]]:
        others = {name: tensor for name, tensor in case.tensors.items() if name != key}
        path = write(tmp_path, Case(name="case", fields=case.fields, tensors=others))
        refused = assert_replayed_or_refused(path, key)
        assert refused or key.startswith(("context.", "latent")), key
        for tensor in reshaped(case.tensors[key]):
            path = write(
                tmp_path, Case(name="case", fields=case.fields, tensors=others | {key: tensor})
            )
            assert_replayed_or_refused(path, (key, tensor.dtype, tensor.shape))


def without(*path: str) -> Callable[[Case], None]:
    def edit(case: Case) -> None:
        changed = replaced(case.fields, path)
        case.fields.clear()
        case.fields.update(changed)

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "t2i_dense",
            without("new_token_ids"),
            r"case.json: new_token_ids.bos_token_id must be an integer of at least 0, got nothing",
        ),
        (
            "t2i_dense",
            without("vae_config", "z_channels"),
            r"case.json: vae_config.z_channels must be an integer of at least 1, got nothing",
        ),
        (
            "t2i_dense",
            without("llm_config"),
            r"case.json: llm_config must be an object, got nothing",
        ),
        (
            "t2i_dense",
            lambda case: case.fields.update(prompt_ids=[[21, 96]]),
            r"case.json: prompt_ids must be token ids below 96, .* got \[\[21, 96\]\]",
        ),
        (
            "t2i_dense",
            lambda case: case.fields.update(image_size=[64]),
            r"case.json: image_size must be a height and a width in pixels, .* got \[64\]",
        ),
        (
            "t2i_dense",
            lambda case: case.tensors.update(init_noise=torch.zeros(3, 16)),
            r"case.safetensors: init_noise must have shape \[16, 16\], got \[3, 16\]",
        ),
        (
            "t2i_moe",
            lambda case: case.tensors.pop("model.llm2vae.bias"),
            r"case.safetensors: tensors must be those of the model, got missing llm2vae.bias",
        ),
        (
            "vae",
            lambda case: case.fields.update(ch=64),
            r"case.json: ch must be 32 as the tensors say, got 64",
        ),
        (
            "moe_block",
            without("num_experts"),
            r"case.json: num_experts must be an integer of at least 1, got nothing",
        ),
        (
            "moe_block",
            lambda case: case.fields.update(num_experts=10**9),
            r"case.safetensors: model.gate.weight must have shape \[1000000000, 48\], got \[8",
        ),
        (
            "edit",
            lambda case: case.tensors.update({"context.latent.x": torch.zeros(4, 4, 4)}),
            r"case.safetensors: context.latent must be followed by the number of an image, got con",
        ),
        (
            "partition",
            lambda case: case.fields.update(num_experts=7),
            r"case.json: ExpertLayout: num_experts must divide the .* got 7",
        ),
    ],
)
def test_the_message_names_file_rule_and_value(
    name: str, edit: Callable[[Case], object], message: str, tmp_path: Path
) -> None:
    case = small(name)
    edit(case)
    with pytest.raises(ValueError, match=f"^{message}"):
        replay(write(tmp_path, case))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_a_file_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, small("moe_block"))
    (tmp_path / "case.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"case\.json: file must .*, got"):
        replay(path)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, small("moe_block"))
    data = (tmp_path / "case.safetensors").read_bytes()
    for damaged in (b"", data[:5], data[:-7], data + b"x", b"\xff" * 64):
        (tmp_path / "case.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"case\.safetensors: .* must .*, got"):
            replay(path)
