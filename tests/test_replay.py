# SPDX-License-Identifier: Apache-2.0
"""Recorded cases are reproduced, whatever of their format is used."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import GOLDEN, relative_error
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from sparse_unified.bagel import SamplingConfig
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.pipeline import generate_tokens
from sparse_unified.bagel.sampler import build_guidance, sample_latents, see_images
from sparse_unified.testing import build_model, read_case, replay

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
OUTPUTS = ("output", "router_logits", "latent.", "token_ids", "moe.", "decoded")
TOLERANCE = 1e-5


def write_case(
    directory: Path, source: str, fields: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Writes a case that differs from a golden one in some fields and tensors."""
    case = read_case(GOLDEN / source)
    weights = {key: t for key, t in case.tensors.items() if key.startswith("model.")}
    (directory / "case.json").write_text(json.dumps({**case.fields, **fields}))
    save_file({**weights, **tensors}, directory / "case.safetensors")
    return directory / "case"


@pytest.mark.parametrize("case", CASES)
def test_golden_case_is_reproduced_from_its_inputs_alone(case: str, tmp_path: Path) -> None:
    assert set(CASES) >= {"moe_block", "partition", "t2i_dense", "t2i_moe", "edit", "vae"}
    recorded = load_file(GOLDEN / f"{case}.safetensors")
    outputs = (*OUTPUTS, "latent") if case == "vae" else OUTPUTS
    wanted = {key: tensor for key, tensor in recorded.items() if key.startswith(outputs)}
    shutil.copy(GOLDEN / f"{case}.json", tmp_path)
    inputs = {key: t for key, t in recorded.items() if key not in wanted}
    save_file(inputs, tmp_path / f"{case}.safetensors")
    found = replay(tmp_path / case)
    assert found.keys() == wanted.keys()
    for key, out in found.items():
        assert out.shape == wanted[key].shape
        error = (out.double() - wanted[key].double()).norm()
        assert error <= TOLERANCE * wanted[key].double().norm(), key


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_case_may_be_named_by_either_file(suffix: str) -> None:
    assert set(replay(str(GOLDEN / f"moe_block{suffix}"))) == {"output", "router_logits"}


def test_several_prompts_of_several_sizes_equal_single_ones(tmp_path: Path) -> None:
    prompts = [[21, 42, 38], [33, 30, 31, 25, 42, 29, 40]]
    sizes = [[64, 48], [32, 96]]
    noise = torch.randn(24, 16)

    def of(prompts: Any, sizes: Any, noise: Tensor) -> Any:
        fields = {"prompt_ids": prompts, "image_size": sizes}
        return replay(write_case(tmp_path, "t2i_dense", fields, {"init_noise": noise.clone()}))

    together = of(prompts, sizes, noise)
    assert list(together) == ["latent.0", "latent.1"]
    for i, found in enumerate(together.values()):
        # A flat list of ids is one prompt.
        alone = of(prompts[i], sizes[i], noise[12 * i : 12 * i + 12])
        assert relative_error(found, alone["latent.0"]) < TOLERANCE


PICTURES = [torch.randn(4, 4, n, generator=torch.Generator().manual_seed(n)) for n in (6, 4)]
SIZES = [[32, 48], [32, 32]]
SEEN = list(torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(3)))
FORMS = {
    "numbered": {f"context.latent.{i}": latent for i, latent in enumerate(PICTURES)}
    | {f"context.vit_pixels.{i}": seen for i, seen in enumerate(SEEN)},
    # Latents of one stack are padded to the largest of them.
    "stacked": {
        "context.latent": torch.stack([pad(x, (0, 6 - x.shape[-1])) for x in PICTURES]),
        "context.vit_pixels": torch.stack(SEEN),
    },
}


EDIT = functools.cache(lambda: build_model(read_case(GOLDEN / "edit")))


def edit_by_hand(images: list[ContextImage], noise: Tensor) -> Tensor:
    """Edits through the public API, for comparison."""
    case, model = read_case(GOLDEN / "edit"), EDIT()
    names = SamplingConfig.__slots__
    config = SamplingConfig(**{name: case.fields[name] for name in names if name in case.fields})
    guidance = build_guidance(model, case.fields["prompt_ids"], images=[images])
    return sample_latents(model, guidance, [noise], [(4, 4)], config)[0]


@pytest.mark.parametrize(("form", "nested"), [("numbered", True), ("stacked", False)])
def test_one_prompt_may_have_several_context_images(
    form: str, nested: bool, tmp_path: Path
) -> None:
    noise = torch.randn(16, 16)
    fields = {"context_image": [SIZES] if nested else SIZES}
    path = write_case(tmp_path, "edit", fields, {"init_noise": noise, **FORMS[form]})
    pairs = zip(PICTURES, SEEN, strict=True)
    images = [ContextImage(latent=latent, vit_pixels=seen) for latent, seen in pairs]
    expected = edit_by_hand(images, noise)
    assert relative_error(replay(path)["latent.0"], expected) < TOLERANCE
    assert relative_error(edit_by_hand(images[::-1], noise), expected) > 1e-3


@pytest.mark.parametrize("numbers", [(0, 1), (1, 3), None, "gaps"])
def test_prompts_without_a_context_image_are_null(numbers: Any, tmp_path: Path) -> None:
    ids = read_case(GOLDEN / "edit").fields["prompt_ids"][0]
    latents, noise = torch.randn(2, 4, 4, 6), torch.randn(64, 16)
    tensors = {"init_noise": noise, "context.latent": latents}
    if numbers == "gaps":
        tensors["context.latent"] = torch.zeros(4, 4, 4, 6)
        tensors["context.latent"][1::2] = latents
    elif numbers is not None:
        del tensors["context.latent"]
        tensors |= {f"context.latent.{n}": latents[i].clone() for i, n in enumerate(numbers)}
    fields = {"prompt_ids": [ids] * 4, "context_image": [None, [32, 48], None, [32, 48]]}
    outputs = replay(write_case(tmp_path, "edit", fields, tensors))
    for i in range(4):
        images = [ContextImage(latent=latents[i // 2])] if i % 2 else []
        expected = edit_by_hand(images, noise[16 * i : 16 * i + 16])
        assert relative_error(outputs[f"latent.{i}"], expected) < TOLERANCE


def test_an_answer_may_follow_several_images(tmp_path: Path) -> None:
    fields = read_case(GOLDEN / "understand").fields
    model = build_model(read_case(GOLDEN / "understand"))
    contexts = model.new_contexts(1)
    see_images(model, contexts, [[ContextImage(vit_pixels=seen) for seen in SEEN]])
    model.prefill_text(contexts, [fields["prompt_ids"]])
    expected = generate_tokens(model, contexts, max_length=fields["length"])[0]
    for form in FORMS.values():
        tensors = {key: tensor for key, tensor in form.items() if "vit" in key}
        path = write_case(tmp_path, "understand", {}, tensors)
        assert replay(path)["token_ids"].tolist() == expected


NOISE = {"init_noise": torch.zeros(16, 16)}
MORE = {"init_noise": torch.zeros(32, 16)}
LATENT, TWO, THREE = torch.zeros(4, 4, 6), torch.zeros(2, 4, 4, 6), torch.zeros(3, 4, 4, 6)
PAIR = {"prompt_ids": [[21], [22]], "context_image": [[32, 48]] * 2}


@pytest.mark.parametrize(
    ("source", "fields", "tensors", "rule"),
    [
        ("edit", {"context_image": [[32, 48]] * 3}, {"context.latent": TWO}, "must hold"),
        ("edit", {"context_image": [[32, 48]] * 2}, {"context.latent.0": LATENT}, "must hold"),
        ("edit", {"context_image": [[32, 48]]}, {"context.latent.3": LATENT}, "must hold"),
        ("edit", {"context_image": [[32, 48]]}, {}, "must hold"),
        ("edit", PAIR, {"context.latent": THREE, **MORE}, "must hold 2 images, got 3"),
        ("edit", PAIR | {"context_image": [[32, 48]] * 3}, MORE, "one entry per prompt, 2"),
        ("t2i_dense", {}, {"init_noise": None}, "case must hold 'init_noise'"),
        ("moe_block", {"num_experts": 7}, {}, "tensors must be those of the model"),
        ("moe_block", {"top_k": 99}, {}, "top_k must"),
        ("partition", {"num_experts": 7}, {}, "num_experts must divide"),
    ],
)
def test_a_case_that_does_not_fit_is_named(
    source: str, fields: dict[str, Any], tensors: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    given = {key: tensor for key, tensor in {**NOISE, **tensors}.items() if tensor is not None}
    refused(f"^case.*: .*{rule}", replay, write_case(tmp_path, source, fields, given))


def test_unknown_kinds_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"surprise": 1}')
    refused(r"odd\.safetensors", replay, tmp_path / "odd")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    refused("surprise", replay, tmp_path / "odd")
    (tmp_path / "odd.json").write_text("{")
    refused(r"odd\.json: file must", replay, tmp_path / "odd")
    (tmp_path / "odd.safetensors").write_bytes(b"\xff" * 64)
    refused(r"odd\.safetensors: .* must", replay, tmp_path / "odd")
