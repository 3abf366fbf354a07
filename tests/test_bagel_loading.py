# SPDX-License-Identifier: Apache-2.0
"""Loading: whole or in parts, in little memory, in several places; damage is reported whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bagel_models import SPECIAL
from moe_cases import GOLDEN
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_, restore_
from sparse_unified.bagel import Bagel, BagelPipeline, load_bagel, loading
from sparse_unified.bagel.attention import Packing
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.decoder import MAX_HOST_ROWS, run_ffn
from sparse_unified.bagel.loading import LAYERS, Offload, Placement, Task, local_reader, unneeded
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_tensor
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.nn.expert_state import is_packed
from sparse_unified.surgery import add_lora_
from sparse_unified.surgery.lora import LoraTarget
from sparse_unified.testing import read_case

CASES = ("t2i_dense", "t2i_moe", "edit")
by_case = pytest.mark.parametrize("case", CASES[:2])


@pytest.fixture(scope="module")
def models(golden: Any) -> dict[str, Path]:
    return {case: golden(case) for case in CASES}


@pytest.fixture
def sparse(models: dict[str, Path], tmp_path: Path) -> Path:
    """A directory to be damaged."""
    return Path(shutil.copytree(models["t2i_moe"], tmp_path / "sparse"))


def load(directory: Path, **options: Any) -> tuple[Bagel, torch.nn.Module]:
    return load_bagel(directory, special_tokens=SPECIAL, **options)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("block_bytes", [300, 2**26])
def test_loaded_weights_are_those_of_the_case(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    read: list[TensorSpec] = []

    def remember(spec: TensorSpec) -> torch.Tensor:
        read.append(spec)
        return read_tensor(spec)

    monkeypatch.setattr(loading, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(loading, "read_tensor", remember)
    for case in CASES if block_bytes > 300 else CASES[1:2]:
        for module, source in zip(load(models[case]), (case, "vae"), strict=True):
            weights, state = read_case(GOLDEN / source).weights, module.state_dict()
            assert set(state) == set(weights)
            assert all(torch.equal(state[key], weights[key]) for key in weights)
            assert not module.training
    # ... in blocks of rows.
    assert all(spec.nbytes <= block_bytes or spec.shape[0] == 1 for spec in read)


def test_tokenizer_gives_the_recorded_ids(models: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_directory(models["t2i_dense"])
    assert tokenizer.special_tokens == SPECIAL
    for name in ("t2i_dense", "edit"):
        fields = read_case(GOLDEN / name).fields
        assert [tokenizer.encode(text) for text in fields["prompts"]] == fields["prompt_ids"]
    fields = read_case(GOLDEN / "understand").fields
    assert tokenizer.decode(fields["prompt_ids"]) == fields["prompt"]
    assert tokenizer.encode("<|im_start|>a\n€") == [3, 21, 20, 9]
    foreign = SpecialTokens(bos=7, eos=4, start_of_image=5, end_of_image=6)
    model, vae = load_bagel(models["t2i_dense"], special_tokens=foreign)
    refused("must have the marker ids of the model", BagelPipeline, model, vae, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_dtype_is_as_asked_or_that_of_each_file(sparse: Path, dtype: torch.dtype | None) -> None:
    file = sparse / "ema.safetensors"
    save_file({key: t.bfloat16() for key, t in load_file(file).items()}, file)
    edit_json(sparse / "config.json", max_latent_size=8, vae_config={"scale_factor": 0.5})
    loaded = load(sparse, dtype=dtype)
    found = [{p.dtype for p in module.parameters()} for module in loaded]
    assert found == [{dtype or torch.bfloat16}, {dtype or torch.float32}]
    assert loaded[1].config.scale_factor == 0.5  # config.json gives what no shape shows


def test_one_error_lists_everything_that_is_wrong(sparse: Path) -> None:
    file = sparse / "ema.safetensors"
    tensors = load_file(file)
    del tensors["connector.fc1.bias"]
    tensors |= {
        "llm2vae.bias": torch.zeros(17),
        "visitor.weight": torch.zeros(2),
        "time_embedder.mlp.0.bias": torch.zeros(32, dtype=torch.int64),
        "latent_pos_embed.pos_embed": torch.zeros(60, 32),
    }
    save_file(tensors, file)
    for part in (
        "missing connector.fc1.bias [32]",
        "extra visitor.weight [2]",
        "misshapen llm2vae.bias [17], not [16]",
        "misshapen latent_pos_embed.pos_embed [60, 32], not [49, 32]",
        "time_embedder.mlp.0.bias of torch.int64, not floating point",
    ):
        refused(f"tensors must be those of the model, got .*{re.escape(part)}", load, sparse)


# ---- Placement


def image(pipeline: BagelPipeline, **options: Any) -> Tensor:
    options = {"seed": 1, "num_timesteps": 3, "size": (32, 32), "progress": False} | options
    return pipeline.generate("a red bench", **options).latents[0]


def test_a_model_without_what_images_never_read_draws_the_same(models: dict[str, Path]) -> None:
    whole = BagelPipeline.from_pretrained(models["t2i_moe"])
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    for task in ("image", "edit"):
        part = BagelPipeline.from_pretrained(models["t2i_moe"], task=task)
        gone = unneeded(whole.model.config.llm, Task(task))
        assert "language_model.model.layers.2.mlp." in gone
        names = [set(pipeline.model.state_dict()) for pipeline in (part, whole)]
        assert names[0] == {name for name in names[1] if not name.startswith(gone)}
        assert torch.equal(image(part), image(whole))
        if task == "edit":
            assert torch.equal(image(part, images=picture), image(whole, images=picture))
        else:
            refused("prefill_vit: vit_model must be loaded for this", image, part, images=picture)
        refused(r"lm_head must be loaded .* load it with task='all'", part.chat, "a")


def test_und_ffns_stay_in_host_memory() -> None:
    placement = Placement(device="cuda:1", offload=Offload.UND)
    at = "language_model.model.layers.3."
    for key in (f"{at}mlp.gate_proj.weight", f"{at}mlp.experts.0.up_proj.weight"):
        assert placement.of_tensor(key) == "cpu"
    vit = "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight"
    for key in (f"{at}mlp_moe_gen.gate_proj.weight", f"{at}self_attn.q_proj.weight", vit):
        assert placement.of_tensor(key) == "cuda:1"


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


@by_case
@pytest.mark.parametrize("storage", ["int8", {"gen": "fp8"}, {"gen": "nvfp4"}])
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
    limit = 0.1 if "nvfp4" not in str(storage) else 0.3  # 4 bits change the experts of some tokens
    assert 0 < float((image(pipeline) - plain).norm() / plain.norm()) < limit


@pytest.mark.usefixtures("torch_products")
@by_case
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
        ({"storage": "int4"}, "storage must be one of int8, fp8, fp8-compute, nvfp4, or map"),
        ({"storage": {"vit": "int8"}}, "storage must be .*, or map und or gen to one of them"),
        ({"storage": {"gen": "fp8-compute"}}, "fp8 here, .*fp8 products .*got device type 'cpu'"),
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


@pytest.mark.parametrize(
    ("case", "targets"), [(case, ()) for case in CASES[:2]] + [(CASES[1], [*LoraTarget][:2])]
)
def test_each_of_several_processes_reads_its_rows_and_no_others(
    case: str, targets: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, num_bytes = load(models[case])[0], 0

    def remember(spec: TensorSpec) -> torch.Tensor:
        nonlocal num_bytes
        num_bytes += spec.nbytes
        return read_tensor(spec)

    monkeypatch.setattr(loading, "read_tensor", remember)
    parts, sizes = [], []
    for rank in range(3):
        model = load(models[case], fill=False)[0]
        fill, starts = local_reader(model, Checkpoint(models[case]).specs), {}
        if targets:
            add_lora_(model, rank=2, targets=targets)
        parts.append({})
        for path, owner in model.named_modules():
            for name, weight in owner.named_parameters(recurse=False):
                if not weight.is_meta:
                    assert "lora_" in path + name
                    continue
                rows = torch.empty(weight.shape).chunk(3)  # as FSDP2 divides them
                own = torch.nn.Parameter(rows[rank] if rank < len(rows) else rows[0][:0])
                starts[own] = sum(map(len, rows[:rank]))
                owner._parameters[name] = own
                key = re.sub(r"base_layer\.|parametrizations\.|\.original", "", f"{path}.{name}")
                parts[-1][key] = own
        monkeypatch.setattr(loading, "local_rows", lambda own, at=starts: (own, at[own]))
        num_bytes = 0
        fill()
        sizes.append(num_bytes)
        assert num_bytes == sum(part.nbytes for part in parts[-1].values())
    for name, weight in whole.named_parameters():
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name
    assert max(sizes) < 0.4 * sum(sizes)
