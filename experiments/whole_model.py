# SPDX-License-Identifier: Apache-2.0
"""The whole model with random weights, dense and sparse: seconds a step and peak memory.

BAGEL-7B-MoT, and the same with 26 generation FFNs of 16 experts with 8 active, draw one image of
1024 x 1024 pixels in 50 timesteps with text guidance: op by op, as CUDA graphs, compiled, and both;
the two models take turns. Peaks are put beside what `sparse-unified info --memory` computes.

    python experiments/whole_model.py [--device cuda] [--json FILE]

On a GPU of 80 GB; with --device cpu both models are small, and no graphs are recorded. The true
size on the CPU of a machine with 24 GB, op by op:

    python experiments/whole_model.py --device cpu --storage int8 [--layers 28] [--json FILE]

draws and packs one FFN after the other, draws 256 x 256 pixels in a few steps, then makes the
generation FFNs sparse, of the same weights, and does it again; the autoencoder decodes in tiles.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from full_scale import bagel_shapes, peak_bytes
from torch import Tensor, nn

from sparse_unified.bagel import (
    AutoEncoder,
    Bagel,
    BagelConfig,
    Execution,
    LLMConfig,
    SamplingConfig,
    StepCache,
    VAEConfig,
    VisionConfig,
)
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.loading import Task, leave_out, unneeded
from sparse_unified.bagel.sampler import (
    build_guidance,
    denoising_steps,
    initial_noise,
    sample_latents,
)
from sparse_unified.bench.report import origin
from sparse_unified.bench.target import processor_name
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.checkpoint.safetensors_io import build_header
from sparse_unified.convert.info import memory
from sparse_unified.nn.sparse_moe import official_tensors
from sparse_unified.surgery.quantize import STORAGES, quantize_ffn_

CEILING = 1.56  # of dense over sparse at 1024 x 1024, from the share of the generation FFNs
_EXPERTS, _TOP_K = 16, 8
_PROMPT_TOKENS = 100
_DENSE, _SPARSE = "dense", "sparse"
_WEIGHTS_FIT = "task='image'"
# Of the true size on the CPU: 256 x 256 pixels, decoded in tiles of 128.
_HOST_GRID, _HOST_TIMESTEPS, _HOST_TILE = (16, 16), 4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the steps.

    Args:
        name: of it. compile, cuda_graphs: of `Execution`. cache: of `SamplingConfig`.
    """

    name: str
    compile: bool = False
    cuda_graphs: bool = False
    cache: StepCache | None = None


WAYS = (
    Way(name="eager"),
    Way(name="graphs", cuda_graphs=True),
    Way(name="eager, step cache", cache=StepCache()),
    Way(name="compiled", compile=True),
    Way(name="compiled, graphs", compile=True, cuda_graphs=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is drawn by what.

    Args:
        config: of the dense model. vae: of its autoencoder. grid: tokens of an image.
        num_timesteps: of the sampler. backend: of torch.compile.
    """

    config: BagelConfig
    vae: VAEConfig
    grid: tuple[int, int]
    num_timesteps: int
    backend: str

    def sparse(self) -> BagelConfig:
        """Returns the description with all but the first and last generation FFN sparse."""
        llm = self.config.llm
        layers = range(1, llm.num_hidden_layers - 1)
        sparse = llm.with_experts("gen", layers, num_experts=_EXPERTS, top_k=_TOP_K)
        return replace(self.config, llm=sparse)


def full() -> Setup:
    """BAGEL-7B-MoT and 1024 x 1024 pixels."""
    return Setup(
        config=bagel_shapes(28),
        vae=VAEConfig(),
        grid=(64, 64),
        num_timesteps=50,
        backend="inductor",
    )


def small() -> Setup:
    """The same in little."""
    return Setup(
        config=BagelConfig(
            llm=LLMConfig(
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=128,
            ),
            vision=VisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                patch_size=14,
                image_size=56,
            ),
            latent_channels=4,
            vae_downsample=8,
            latent_patch_size=2,
            max_latent_size=4,
            vit_max_num_patch_per_side=4,
            special_tokens=SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4),
        ),
        vae=VAEConfig(ch=32, z_channels=4),
        grid=(4, 4),
        num_timesteps=9,
        backend="eager",
    )


@torch.no_grad()
def fill_randomly(module: nn.Module, device: torch.device) -> None:
    """Gives memory to what is on the meta device below a module and draws it, so that values keep
    their size."""
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is None or not weight.is_meta:
                continue
            own = torch.empty_like(weight, device=device)
            if weight.ndim == 1:
                own.fill_(1.0)
            else:
                own.normal_(std=math.prod(weight.shape[1:]) ** -0.5)
            owner._parameters[name] = nn.Parameter(own, requires_grad=weight.requires_grad)


def random_model(config: BagelConfig, device: torch.device) -> Bagel:
    """Returns a model in bf16 of what images from texts need."""
    model = Bagel(config, device="meta", dtype=torch.bfloat16)
    leave_out(model, unneeded(config.llm, Task.IMAGE))
    fill_randomly(model, device)
    return model


def predicted_bytes(config: BagelConfig, vae: VAEConfig, grid: tuple[int, int]) -> dict[str, int]:
    """Returns what `info --memory` says of weights and working memory, for files without data."""
    whole = Bagel(config, device="meta", dtype=torch.bfloat16)
    decoder = AutoEncoder(vae, device="meta", dtype=torch.float32)
    llm = asdict(config.llm)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*sizes, "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta")
    content = {name: llm[name] for name in names}
    if layers := sorted(config.llm.sparse_layers("gen")):
        content |= {"num_experts": _EXPERTS, "top_k": _TOP_K, "num_shared_experts": 0}
        content |= {"transformed_gen": layers}
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors in (
            ("ema.safetensors", official_tensors(whole)),
            ("ae.safetensors", decoder.state_dict()),
        ):
            _write_holes(Path(folder) / name, tensors)
        (Path(folder) / "llm_config.json").write_text(json.dumps(content))
        side = config.latent_downsample
        rows = memory(folder, size=(grid[0] * side, grid[1] * side)).rows
    [row] = [row for row in rows if row.options == _WEIGHTS_FIT]
    return {"weights": row.weights, "working": row.working}


def _write_holes(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file that has every tensor in its header and takes no room on the disk."""
    header = build_header([(k, t.dtype, tuple(t.shape)) for k, t in tensors.items()]).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + sum(t.nbytes for t in tensors.values()))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def draw(model: Bagel, setup: Setup, way: Way, execution: Execution) -> dict[str, Any]:
    """Denoises one image; returns seconds by kind of step, and the peak of memory."""
    config = SamplingConfig(num_timesteps=setup.num_timesteps, cache=way.cache)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        10, model.config.llm.vocab_size, (_PROMPT_TOKENS,), generator=generator
    ).tolist()
    rows, columns = setup.grid
    noise = initial_noise(rows * columns, model.config.token_channels, 0)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds: list[float] = []
    [tokens] = sample_latents(
        model,
        build_guidance(model, [ids]),
        [noise],
        [setup.grid],
        config,
        execution=execution,
        on_step=lambda _, took: seconds.append(took),
    )
    steps = denoising_steps(config)
    record: dict[str, Any] = {"way": way.name, "all_seconds": sum(seconds), "image": tokens.cpu()}
    total = 0.0
    for kind, wanted in (("guided", True), ("plain", False)):
        own = [
            took
            for took, step in zip(seconds, steps, strict=True)
            if step.guided is wanted and step.computed
        ]
        # The first two load, compile and record.
        record[f"{kind}_step_seconds"] = median(own[2:] or own) if own else None
        total += len(own) * (record[f"{kind}_step_seconds"] or 0.0)
    record["steps"], record["computed_steps"] = len(seconds), sum(own.computed for own in steps)
    record["seconds_per_image"] = total
    record["seconds_per_step"] = total / len(seconds)
    record["peak_bytes"] = (
        torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    )
    return record


def decode(vae: AutoEncoder, setup: Setup, device: torch.device, tile: int = 0) -> dict[str, Any]:
    """Turns a latent into pixels; returns the seconds and the peak of memory."""
    patch = setup.config.latent_patch_size
    rows, columns = (patch * side for side in setup.grid)
    latent = torch.randn(1, setup.vae.z_channels, rows, columns, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with torch.no_grad():
        vae.decode(latent, tile=tile)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def ratios(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns dense over sparse in seconds an image, for each way that both were measured in."""
    seconds = {(r["model"], r["way"]): r["seconds_per_image"] for r in records}
    return {
        way: seconds[_DENSE, way] / seconds[_SPARSE, way]
        for model, way in seconds
        if model == _DENSE and (_SPARSE, way) in seconds
    }


def measure(device: torch.device, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures the ways in turn; `save` is given what was found so far after each.

    Raises:
        RuntimeError: an image is not finite.
    """
    is_small = device.type == "cpu"
    setup = small() if is_small else full()
    configs = {_DENSE: setup.config, _SPARSE: setup.sparse()}
    models: dict[str, Bagel] = {}
    weights: dict[str, int] = {}
    before = _allocated(device)
    vae = AutoEncoder(setup.vae, device="meta", dtype=torch.float32).eval()
    fill_randomly(vae, device)
    vae_bytes = _allocated(device) - before
    for name, config in configs.items():
        before = _allocated(device)
        models[name] = random_model(config, device)
        weights[name] = _allocated(device) - before
    records: list[dict[str, Any]] = []
    images: dict[str, Tensor] = {}
    content: dict[str, Any] = {
        "ceiling": CEILING,
        "grid": list(setup.grid),
        "num_timesteps": setup.num_timesteps,
        "records": records,
        "memory": {},
    }
    for way in WAYS:
        if is_small and way.cuda_graphs:
            continue
        for name, model in models.items():
            execution = Execution(
                compile=way.compile, cuda_graphs=way.cuda_graphs, backend=setup.backend
            )
            record = {"model": name} | draw(model, setup, way, execution)
            image = record.pop("image")
            if not image.isfinite().all():
                raise RuntimeError(f"whole_model: the image of {name}, {way.name} must be finite")
            first = images.setdefault(name, image)
            record["relative_to_eager"] = float((image - first).norm() / first.norm())
            if record["peak_bytes"] is not None:
                record["peak_bytes"] -= sum(n for other, n in weights.items() if other != name)
            records.append(record)
            content["ratios"] = ratios(records)
            save(content)
            del execution
            gc.collect()
    content["decode"] = decoded = decode(vae, setup, device)
    for name, config in configs.items():
        predicted = predicted_bytes(config, setup.vae, setup.grid)
        found: dict[str, Any] = {"predicted": predicted}
        if not is_small:
            others = sum(n for other, n in weights.items() if other != name)
            eager = [r["peak_bytes"] for r in records if r["model"] == name and r["way"] == "eager"]
            found |= {
                "weights": weights[name] + vae_bytes,
                "peak_step": max(eager, default=None),
                "peak_decode": decoded["peak_bytes"] - others,
            }
            peak = max([*eager, found["peak_decode"]])
            found["peak_over_predicted"] = peak / (predicted["weights"] + predicted["working"])
        content["memory"][name] = found
    save(content)
    return content


def packed_model(config: BagelConfig, storage: str) -> Bagel:
    """Returns `random_model` on the CPU with packed FFNs, of which never more than one is whole."""
    model = Bagel(config, device="meta", dtype=torch.bfloat16)
    leave_out(model, unneeded(config.llm, Task.IMAGE))
    for layer in model.language_model.model.layers:
        for name in FFN_NAMES.values():
            if (ffn := getattr(layer, name)) is not None:
                fill_randomly(ffn, torch.device("cpu"))
                quantize_ffn_(ffn.requires_grad_(False), storage)
    fill_randomly(model, torch.device("cpu"))
    return model


def make_sparse_(model: Bagel, config: BagelConfig) -> None:
    """Lets the generation FFNs of a dense model be the experts of a sparse one's, in place."""
    sparse = Bagel(config, device="meta", dtype=model.dtype)
    blocks: Any = sparse.language_model.model.layers
    for index in config.llm.sparse_layers("gen"):
        layer: Any = model.language_model.model.layers[index]
        block: Any = blocks[index].mlp_moe_gen
        dense = layer.mlp_moe_gen
        for name in PROJECTIONS:
            setattr(block, name, getattr(dense, name).weight)
        fill_randomly(block, torch.device("cpu"))
        layer.mlp_moe_gen = block


def measure_on_host(
    storage: str, num_layers: int, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measures both models of the true size on the CPU, one after the other, in packed weights."""
    start = time.perf_counter()
    setup = replace(
        full(),
        config=bagel_shapes(num_layers),
        grid=_HOST_GRID,
        num_timesteps=_HOST_TIMESTEPS,
    )
    vae = AutoEncoder(setup.vae, device="meta", dtype=torch.float32).eval()
    fill_randomly(vae, torch.device("cpu"))
    model = packed_model(setup.config, storage)
    content: dict[str, Any] = {
        **origin(processor_name()),
        "storage": storage,
        "num_layers": num_layers,
        "grid": list(setup.grid),
        "making_seconds": time.perf_counter() - start,
        "making_peak_bytes": peak_bytes(),
        "records": [],
    }
    for name in (_DENSE, _SPARSE):
        if name == _SPARSE:
            make_sparse_(model, setup.sparse())
        reset_peak()
        record = {"model": name} | draw(model, setup, WAYS[0], Execution())
        if not record.pop("image").isfinite().all():
            raise RuntimeError(f"whole_model: the image of {name} must be finite")
        record["peak_bytes"] = peak_bytes()
        content["records"].append(record)
        content["ratios"] = ratios(content["records"])
        save(content)
    reset_peak()
    content["decode"] = decode(vae, setup, torch.device("cpu"), _HOST_TILE)
    content["decode"]["peak_bytes"] = peak_bytes()
    save(content)
    return content


def reset_peak() -> None:
    """Lets `peak_bytes` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and prints the ratios."""
    parser = argparse.ArgumentParser(prog="whole_model", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--storage", choices=STORAGES, help="of all FFNs, at true size on the CPU")
    parser.add_argument("--layers", type=int, default=28, help="with --storage: decoder layers")
    parser.add_argument("--json", type=Path, help="kept up to date while it measures")
    options = parser.parse_args(argv)
    if options.storage and options.device != "cpu":
        parser.error("--storage must come with --device cpu")

    def save(content: dict[str, Any]) -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(content, indent=1) + "\n")

    if options.storage:
        content = measure_on_host(options.storage, options.layers, save)
        for record in content["records"]:
            print(
                f"{record['model']}: {record['seconds_per_step']:.1f} s a step, "
                f"{record['peak_bytes'] / 1e9:.1f} GB at most"
            )
        return 0
    content = measure(torch.device(options.device), save)
    for way, ratio in content["ratios"].items():
        print(f"dense / sparse, {way}: {ratio:.2f}x (ceiling {content['ceiling']}x)")
    for name, found in content["memory"].items():
        if "peak_over_predicted" in found:
            print(f"{name}: peak {found['peak_over_predicted']:.2f} of the predicted")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
