# SPDX-License-Identifier: Apache-2.0
"""Recorded cases are reproduced, whatever of their format is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified.bagel import SamplingConfig
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.pipeline import generate_tokens
from sparse_unified.bagel.sampler import build_guidance, sample_latents, see_images
from sparse_unified.testing import build_model, read_case, replay

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
OUTPUTS = ("output", "router_logits", "latent.", "token_ids", "moe.", "decoded")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(out: Tensor, gold: Tensor) -> float:
    return float((out.double() - gold.double()).norm() / gold.double().norm().clamp(min=1e-30))


def is_output(case: str, key: str) -> bool:
    return key.startswith(OUTPUTS) or (case == "vae" and key == "latent")


def write_case(
    directory: Path, source: str, fields: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Writes a case that differs from a golden one in some fields and tensors."""
    case = read_case(GOLDEN / source)
    weights = {key: t for key, t in case.tensors.items() if key.startswith("model.")}
    (directory / "case.json").write_text(json.dumps({**case.fields, **fields}))
    save_file({**weights, **tensors}, directory / "case.safetensors")
    return directory / "case"


def test_there_are_cases_of_every_kind() -> None:
    assert set(CASES) >= {"moe_block", "partition", "t2i_dense", "t2i_moe", "edit", "vae"}


@pytest.mark.parametrize("case", CASES)
def test_golden_case_is_reproduced_from_its_inputs_alone(case: str, tmp_path: Path) -> None:
    recorded = load_file(GOLDEN / f"{case}.safetensors")
    wanted = {key: tensor for key, tensor in recorded.items() if is_output(case, key)}
    shutil.copy(GOLDEN / f"{case}.json", tmp_path)
    inputs = {key: t for key, t in recorded.items() if key not in wanted}
    save_file(inputs, tmp_path / f"{case}.safetensors")
    outputs = replay(tmp_path / case)
    assert outputs.keys() == wanted.keys()
    for key, out in outputs.items():
        assert out.shape == wanted[key].shape
        assert relative_error(out, wanted[key]) < TOLERANCE, key


@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_case_may_be_named_by_either_file(suffix: str) -> None:
    assert set(replay(str(GOLDEN / f"moe_block{suffix}"))) == {"output", "router_logits"}


def latents(directory: Path, source: str, fields: dict[str, Any], **tensors: Tensor) -> Any:
    """Returns the images of a case that differs from a golden one; `__` is a dot of a name."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    outputs = replay(write_case(directory, source, fields, named))
    return [outputs[f"latent.{i}"] for i in range(len(outputs))]


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_several_prompts_of_several_sizes_equal_single_ones(renorm: str, tmp_path: Path) -> None:
    prompts = [[21, 42, 38], [33, 30, 31, 25, 42, 29, 40]]
    sizes = [[64, 48], [32, 96]]
    noise = torch.randn(24, 16)
    shared = {"cfg_renorm_type": renorm, "cfg_renorm_min": 0.1}

    def of(prompts: Any, sizes: Any, noise: Tensor) -> Any:
        fields = shared | {"prompt_ids": prompts, "image_size": sizes}
        return latents(tmp_path, "t2i_dense", fields, init_noise=noise.clone())

    together = of(prompts, sizes, noise)
    assert len(together) == 2
    for i, found in enumerate(together):
        (alone,) = of(prompts[i : i + 1], sizes[i], noise[12 * i : 12 * i + 12])
        assert relative_error(found, alone) < TOLERANCE


def test_each_prompt_may_have_its_own_context_image(tmp_path: Path) -> None:
    prompts = [[33, 21], [31, 25, 42]]
    images, pixels = torch.randn(2, 4, 4, 6), torch.randn(2, 3, 28, 42)
    noise = torch.randn(32, 16)

    def of(prompts: Any, size: Any, rows: slice, images: Tensor, pixels: Tensor) -> Any:
        fields = {"prompt_ids": prompts, "context_image": size}
        seen = {"context__latent": images.clone(), "context__vit_pixels": pixels.clone()}
        return latents(tmp_path, "edit", fields, init_noise=noise[rows].clone(), **seen)

    together = of(prompts, [32, 48], slice(None), images, pixels)
    for i, found in enumerate(together):
        rows = slice(16 * i, 16 * i + 16)
        (alone,) = of([prompts[i]], [[32, 48]], rows, images[i : i + 1], pixels[i])
        assert relative_error(found, alone) < TOLERANCE


def test_padded_context_latents_are_cropped_to_their_image(tmp_path: Path) -> None:
    tensors = read_case(GOLDEN / "edit").tensors
    (found,) = latents(
        tmp_path,
        "edit",
        {},
        init_noise=tensors["init_noise"],
        context__latent=torch.nn.functional.pad(tensors["context.latent"], (0, 4, 0, 2)),
        context__vit_pixels=tensors["context.vit_pixels"],
    )
    assert relative_error(found, tensors["latent.0"]) < TOLERANCE


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PICTURES = [(fixed(4, 4, 6, seed=1), [32, 48]), (fixed(4, 4, 4, seed=2), [32, 32])]
SEEN = [fixed(3, 28, 42, seed=3), fixed(3, 28, 42, seed=4)]


def edit_by_hand(images: list[ContextImage], noise: Tensor) -> Tensor:
    """Edits through the public API, for comparison."""
    case = read_case(GOLDEN / "edit")
    model = build_model(case)
    names = SamplingConfig.__slots__
    config = SamplingConfig(**{name: case.fields[name] for name in names if name in case.fields})
    guidance = build_guidance(model, case.fields["prompt_ids"], images=[images])
    return sample_latents(model, guidance, [noise], [(4, 4)], config)[0]


def context_tensors(form: str) -> dict[str, Tensor]:
    latents = [latent for latent, _ in PICTURES]
    if form == "numbered":
        tensors = {f"context.latent.{i}": latent for i, latent in enumerate(latents)}
        return tensors | {f"context.vit_pixels.{i}": seen for i, seen in enumerate(SEEN)}
    padded = [torch.nn.functional.pad(x, (0, 6 - x.shape[-1])) for x in latents]
    return {"context.latent": torch.stack(padded), "context.vit_pixels": torch.stack(SEEN)}


@pytest.mark.parametrize("form", ["numbered", "stacked"])
@pytest.mark.parametrize("nested", [False, True])
def test_one_prompt_may_have_several_context_images(
    form: str, nested: bool, tmp_path: Path
) -> None:
    noise, sizes = torch.randn(16, 16), [size for _, size in PICTURES]
    tensors = {"init_noise": noise, **context_tensors(form)}
    path = write_case(tmp_path, "edit", {"context_image": [sizes] if nested else sizes}, tensors)
    images = [
        ContextImage(latent=latent, vit_pixels=seen)
        for (latent, _), seen in zip(PICTURES, SEEN, strict=True)
    ]
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


@pytest.mark.parametrize(
    ("sizes", "tensors"),
    [
        ([[32, 48]] * 3, {"context.latent": torch.zeros(2, 4, 4, 6)}),
        ([[32, 48]] * 2, {"context.latent.0": torch.zeros(4, 4, 6)}),
        ([[32, 48]], {"context.latent.3": torch.zeros(4, 4, 6)}),
        ([[32, 48]], {}),
    ],
)
def test_context_images_and_tensors_must_match(
    sizes: Any, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = {"init_noise": torch.zeros(16, 16), **tensors}
    with pytest.raises(ValueError, match=r"case: .* must hold"):
        replay(write_case(tmp_path, "edit", {"context_image": sizes}, tensors))


def test_context_images_must_match_the_prompts(tmp_path: Path) -> None:
    fields = {"prompt_ids": [[21], [22]], "context_image": [[32, 48]] * 3}
    with pytest.raises(ValueError, match="context_image must have one entry per prompt, 2"):
        replay(write_case(tmp_path, "edit", fields, {"init_noise": torch.zeros(32, 16)}))


def test_flat_prompt_ids_are_one_prompt(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "t2i_dense")
    fields = {"prompt_ids": case.fields["prompt_ids"][0]}
    path = write_case(tmp_path, "t2i_dense", fields, {"init_noise": case.tensors["init_noise"]})
    assert relative_error(replay(path)["latent.0"], case.tensors["latent.0"]) < TOLERANCE


def test_an_answer_may_follow_several_images(tmp_path: Path) -> None:
    fields = read_case(GOLDEN / "understand").fields
    model = build_model(read_case(GOLDEN / "understand"))
    contexts = model.new_contexts(1)
    see_images(model, contexts, [[ContextImage(vit_pixels=seen) for seen in SEEN]])
    model.prefill_text(contexts, [fields["prompt_ids"]])
    expected = generate_tokens(model, contexts, max_length=fields["length"])[0]
    for tensors in (
        {"context.vit_pixels": torch.stack(SEEN)},
        {f"context.vit_pixels.{i}": seen for i, seen in enumerate(SEEN)},
    ):
        path = write_case(tmp_path, "understand", {}, tensors)
        assert replay(path)["token_ids"].tolist() == expected


def test_zero_router_with_all_experts_equals_the_dense_model(tmp_path: Path) -> None:
    dense = read_case(GOLDEN / "t2i_dense")
    tensors = dict(dense.tensors)
    moe = {"num_experts": 4, "num_shared_experts": 0, "top_k": 4, "transformed_gen": [0, 2]}
    for layer in moe["transformed_gen"]:  # type: ignore[union-attr]
        prefix = f"model.language_model.model.layers.{layer}.mlp_moe_gen."
        parts = {n: tensors.pop(f"{prefix}{n}.weight") for n in ("gate_proj", "up_proj")}
        down = tensors.pop(f"{prefix}down_proj.weight")
        for expert in range(4):
            rows = slice(24 * expert, 24 * expert + 24)
            for name, weight in parts.items():
                tensors[f"{prefix}experts.{expert}.{name}.weight"] = weight[rows].clone()
            tensors[f"{prefix}experts.{expert}.down_proj.weight"] = down[:, rows].clone()
        tensors[f"{prefix}gate.weight"] = torch.zeros(4, 32)
        tensors[f"{prefix}gate_shared.weight"] = torch.zeros(1, 32)
    (tmp_path / "moe.json").write_text(json.dumps({**dense.fields, "moe": moe}))
    save_file(tensors, tmp_path / "moe.safetensors")
    latent = replay(tmp_path / "moe")["latent.0"]
    assert relative_error(latent, dense.tensors["latent.0"]) < TOLERANCE


def test_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(ValueError, match=r"half\.safetensors"):
        replay(tmp_path / "half")


@pytest.mark.parametrize(
    ("source", "fields", "rule"),
    [
        ("t2i_dense", {}, "case must hold 'init_noise'"),
        ("moe_block", {"num_experts": 7}, "tensors must be those of the model"),
        ("moe_block", {"top_k": 99}, "top_k must"),
        ("partition", {"num_experts": 7}, "num_experts must divide"),
    ],
)
def test_a_case_that_does_not_fit_is_named(
    source: str, fields: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^case.*: .*{rule}"):
        replay(write_case(tmp_path, source, fields, {}))


def test_unknown_kinds_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"surprise": 1}')
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="surprise"):
        replay(tmp_path / "odd")
    (tmp_path / "odd.json").write_text("{")
    with pytest.raises(ValueError, match=r"odd\.json: file must"):
        replay(tmp_path / "odd")
    (tmp_path / "odd.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"odd\.safetensors: .* must"):
        replay(tmp_path / "odd")
