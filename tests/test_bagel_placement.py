# SPDX-License-Identifier: Apache-2.0
"""Models loaded in parts, in several places and in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_, restore_
from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.attention import Packing
from sparse_unified.bagel.decoder import MAX_HOST_ROWS, run_ffn
from sparse_unified.bagel.loading import LAYERS, Offload, Placement, Task, unneeded
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.nn.expert_state import is_packed

GOLDEN = Path(__file__).parent / "golden"
CASES = pytest.mark.parametrize("case", ["t2i_dense", "t2i_moe"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {case: write_checkpoint(GOLDEN / case, folder / case) for case in CASES.args[1]}


def image(pipeline: BagelPipeline, **options: Any) -> Tensor:
    options = {"seed": 1, "num_timesteps": 3, "size": (32, 32), "progress": False} | options
    return pipeline.generate("a red bench", **options).latents[0]


def names(pipeline: BagelPipeline) -> set[str]:
    return set(pipeline.model.state_dict())


@CASES
def test_a_model_without_what_images_never_read_draws_the_same(
    case: str, models: dict[str, Path]
) -> None:
    whole = BagelPipeline.from_pretrained(models[case])
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    for task in ("image", "edit"):
        part = BagelPipeline.from_pretrained(models[case], task=task)
        gone = unneeded(whole.model.config.llm, Task(task))
        assert "language_model.model.layers.2.mlp." in gone
        assert names(part) == {n for n in names(whole) if not n.startswith(gone)}
        assert torch.equal(image(part), image(whole))
        if task == "edit":
            assert torch.equal(image(part, images=picture), image(whole, images=picture))
        else:
            with pytest.raises(ValueError, match="prefill_vit: vit_model must be loaded for this"):
                image(part, images=picture)
        with pytest.raises(ValueError, match=r"lm_head must be loaded .* load it with task='all'"):
            part.chat("a")
        with pytest.raises(ValueError, match="lm_head must be loaded"):
            image(part, think=True)


def test_und_ffns_stay_in_host_memory() -> None:
    placement = Placement(device="cuda:1", offload=Offload.UND)
    at = "language_model.model.layers.3."
    assert placement.of_tensor(f"{at}mlp.gate_proj.weight") == "cpu"
    assert placement.of_tensor(f"{at}mlp.experts.0.up_proj.weight") == "cpu"
    assert placement.of_tensor(f"{at}mlp_moe_gen.gate_proj.weight") == "cuda:1"
    assert placement.of_tensor(f"{at}self_attn.q_proj.weight") == "cuda:1"
    assert placement.of_tensor("vit_model.vision_model.encoder.layers.0.mlp.fc1.weight") == "cuda:1"


@pytest.mark.parametrize("rows", [2, MAX_HOST_ROWS, MAX_HOST_ROWS + 1])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_ffns_in_host_memory_compute_the_same(kind: str, rows: int) -> None:
    torch.manual_seed(0)
    sparse = SparseMoE(16, 48, 4, 2, gate_img=True)
    torch.nn.init.normal_(sparse.gate_img.weight)
    ffn = sparse if kind == "sparse" else SwiGLU(16, 48)
    none = (torch.empty(0, 1, 8), torch.empty(0, 1, 8))
    packing = Packing(groups=[], und_angles=none, vit_rows=torch.arange(rows))
    x = torch.randn(rows, 16)
    with torch.no_grad():
        expected = run_ffn(ffn, x, packing)
        assert torch.equal(run_ffn(ffn, x, packing, on_host=True), expected)
        # The meta device stands for a GPU: weights come to many rows, few rows go to the weights.
        y = run_ffn(SwiGLU(16, 48), torch.empty(MAX_HOST_ROWS + 1, 16, device="meta"), on_host=True)
        assert y.is_meta
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            run_ffn(SwiGLU(16, 48), torch.empty(2, 16, device="meta"), on_host=True)


def test_offload_and_swaps_go_together(models: dict[str, Path]) -> None:
    pipeline = BagelPipeline.from_pretrained(models["t2i_dense"], offload="und", task="image")
    dense = image(pipeline)
    assert torch.equal(dense, image(BagelPipeline.from_pretrained(models["t2i_dense"])))
    apply_moe_(pipeline, MoEConfig(num_experts=4, top_k=2, component="und", layers=[0, 1]))
    assert not torch.equal(image(pipeline), dense)
    restore_(pipeline)
    assert torch.equal(image(pipeline), dense)


@CASES
@pytest.mark.parametrize("storage", ["int8", {"und": "int8", "gen": "fp8"}, {"gen": "int8"}])
def test_ffns_are_packed_as_they_are_loaded(
    case: str, storage: Any, models: dict[str, Path]
) -> None:
    pytest.importorskip("torchao")
    pipeline = BagelPipeline.from_pretrained(models[case], storage=storage)
    wanted = {"und", "gen"} if storage == "int8" else set(storage)
    for layer in pipeline.model.language_model.model.layers:
        for component, ffn in (("und", layer.mlp), ("gen", layer.mlp_moe_gen)):
            weight = ffn.gate_proj if isinstance(ffn, SparseMoE) else ffn.gate_proj.weight
            assert is_packed(weight) == (component in wanted)
    plain = image(BagelPipeline.from_pretrained(models[case]))
    assert 0 < float((image(pipeline) - plain).norm() / plain.norm()) < 0.1


@CASES
def test_accelerate_places_layers(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain = image(BagelPipeline.from_pretrained(models[case]))
    places: list[Any] = ["auto", {"": "cpu"}, {f"{LAYERS}.1": "disk"}, {LAYERS: "disk"}]
    for number, device_map in enumerate(places):
        pipeline = BagelPipeline.from_pretrained(
            models[case], device_map=device_map, offload_folder=tmp_path / f"{case}{number}"
        )
        layer = pipeline.model.language_model.model.layers[1]
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        assert all(p.is_meta == on_disk for p in layer.parameters())
        assert pipeline.model.device.type == "cpu"
        assert torch.equal(image(pipeline), plain)
        assert all(p.is_meta == on_disk for p in layer.parameters())
    apply_moe_(pipeline, MoEConfig(num_experts=4, top_k=4, component="und"))
    assert float((image(pipeline) - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "video"}, "task must be one of all, edit, image, got 'video'"),
        ({"offload": "gen"}, "offload must be one of none, und, got 'gen'"),
        ({"storage": "int4"}, "storage must be one of int8, fp8, or map und or gen"),
        ({"storage": {"vit": "int8"}}, "storage must be one of int8, fp8, or map und or gen"),
        ({"device_map": "auto", "offload": "und"}, "device_map must come without offload"),
        ({"device_map": "balanced"}, "device_map must be 'auto' or a mapping"),
        ({"device_map": {"layers.0": "cpu"}}, "device_map must name modules, got 'layers.0'"),
        ({"device_map": {"llm2vae": "cuda"}}, "all else is on cpu, got 'llm2vae' on 'cuda'"),
        ({"device_map": {f"{LAYERS}.0": "disk"}}, "offload_folder must be given"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    options: Any, match: str, models: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=f"from_pretrained: .*{match}"):
        BagelPipeline.from_pretrained(models["t2i_dense"], **options)
