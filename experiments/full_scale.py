# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of convert, verify, invert and prune on BAGEL-7B-MoT's true shapes.

    python experiments/full_scale.py DIR [--layers 28] [--json FILE.json]

Writes a model of random weights into DIR, under BAGEL's keys and shapes in bf16, with as many
decoder layers as the disk takes (28 are 28.7 GB, and twice that is needed), and runs the
operations on it, each in a process of its own whose peak of resident memory the kernel tells:

    convert   dense -> sparse, 16 experts, 8 active
    verify    sparse against dense
    invert    sparse -> dense, once the dense one was removed; its bytes must be those it had
    prune     dense -> half of the und neurons, half of the gen heads, one layer skipped
    verify    pruned against dense

Everything written is removed at the end, also after an error. The exit status is 1 when an
operation failed or took more than 1.5 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sparse_unified.bagel import AutoEncoder, Bagel, BagelConfig, LLMConfig, VAEConfig, VisionConfig
from sparse_unified.bench.report import origin
from sparse_unified.bench.target import find_target
from sparse_unified.checkpoint import (
    Checkpoint,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    convert,
    invert,
    prune,
    verify,
)
from sparse_unified.checkpoint.files import create_file, write_all
from sparse_unified.checkpoint.safetensors_io import build_header, encode_header

LIMIT_BYTES = 1_500_000_000
NUM_LAYERS = 28
WHAT = "full_scale"

_PIECE = 1 << 24
# A bf16 number with these bits left free is +-2^-7 to +-2^-3: the size of trained weights.
_FREE, _FIXED = np.uint16(0x81FF), np.uint16(0x3C00)
_STEPS = (
    ("convert", "dense", "sparse"),
    ("verify", "sparse", "dense"),
    ("invert", "sparse", "dense"),
    ("prune", "dense", "pruned"),
    ("verify_pruned", "pruned", "dense"),
)


def bagel_shapes(num_layers: int) -> BagelConfig:
    """Returns the sizes of BAGEL-7B-MoT, with another number of decoder layers."""
    return BagelConfig(
        llm=LLMConfig(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=num_layers,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
        vision=VisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            patch_size=14,
            image_size=980,
        ),
        latent_channels=16,
        vae_downsample=8,
        latent_patch_size=2,
        max_latent_size=64,
        vit_max_num_patch_per_side=70,
    )


def write_dense(directory: Path, num_layers: int) -> None:
    """Writes a dense model directory of random bf16 weights; without a tokenizer."""
    config = bagel_shapes(num_layers)
    tensors = Bagel(config, device="meta", dtype=torch.bfloat16).state_dict()
    directory.mkdir()
    header = build_header([(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()])
    generator = np.random.default_rng(0)
    with create_file(directory / "ema.safetensors") as target:
        write_all(target, encode_header(header))
        for tensor in tensors.values():
            for start in range(0, tensor.numel(), _PIECE):
                count = min(_PIECE, tensor.numel() - start)
                bits = np.frombuffer(generator.bytes(2 * count), dtype=np.uint16)
                write_all(target, bits & _FREE | _FIXED)
    vae = AutoEncoder(VAEConfig(), device="meta", dtype=torch.float32).state_dict()
    save_file({key: torch.ones(t.shape) for key, t in vae.items()}, directory / "ae.safetensors")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llm, vision = asdict(config.llm), asdict(config.vision)
    names = (*sizes, "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta")
    (directory / "llm_config.json").write_text(json.dumps({name: llm[name] for name in names}))
    # The official file counts the last layer of SigLIP, which BAGEL leaves out.
    vision["num_hidden_layers"] += 1
    (directory / "vit_config.json").write_text(json.dumps(vision))


def weight_bytes(num_layers: int) -> int:
    """Bytes of the weights of a model of this many layers."""
    model = Bagel(bagel_shapes(num_layers), device="meta", dtype=torch.bfloat16)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    value = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            value.update(piece)
    return value.hexdigest()


def operate(operation: str, first: str, second: str) -> dict[str, float]:
    """Runs one operation in this process and returns its seconds and the peak of its memory."""
    start = time.perf_counter()
    if operation == "convert":
        convert(first, second, num_experts=16, top_k=8)
    elif operation == "invert":
        invert(first, second)
    elif operation == "prune":
        layers = Checkpoint(first).num_layers
        narrow = PruneWidthConfig(component="und", block_size=16)
        heads = PruneHeadsConfig(component="gen")
        prune(first, second, [narrow, heads, SkipLayersConfig(layers=[layers // 2])])
    elif not (report := verify(first, second)).ok:
        raise RuntimeError(f"{WHAT}: {second} must verify, got {report.to_text()}")
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Returns the most memory this process has had resident, torch and Python included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{WHAT}: /proc/self/status must have VmHWM, got none")


def measure(root: Path, num_layers: int) -> dict[str, Any]:
    """Runs all operations below `root` and returns the content of the result file."""
    start = time.perf_counter()
    write_dense(root / "dense", num_layers)
    generated = time.perf_counter() - start
    before = digest(root / "dense" / "ema.safetensors")
    nbytes = (root / "dense" / "ema.safetensors").stat().st_size
    command = [sys.executable, __file__, str(root), "--operation"]
    records = []
    for operation, first, second in _STEPS:
        if operation == "invert":
            shutil.rmtree(root / "dense")
        if operation == "prune":
            shutil.rmtree(root / "sparse")
        child = subprocess.run(
            [*command, operation, str(root / first), str(root / second)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"{WHAT}: {operation} must end well, got {child.returncode}")
        records.append({"operation": operation, **json.loads(child.stdout)})
        sys.stderr.write(f"{operation}: {child.stdout}")
        if operation == "invert" and digest(root / "dense" / "ema.safetensors") != before:
            raise RuntimeError(f"{WHAT}: invert must give the bytes of the dense weights back")
    whole = weight_bytes(NUM_LAYERS)
    for record in records:
        # Every operation passes over all bytes once or twice, so time goes with bytes.
        record["seconds_at_28_layers"] = record["seconds"] * whole / nbytes
    return {
        **origin(find_target("cpu").name),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "num_layers": num_layers,
        "bytes": nbytes,
        "bytes_at_28_layers": whole,
        "seconds_generating": generated,
        "limit_bytes": LIMIT_BYTES,
        "operations": records,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog=WHAT, description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where there is room; must exist")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, help="decoder layers, 3 to 28")
    parser.add_argument("--json", type=Path, help="where the result is written")
    parser.add_argument("--operation", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.operation:
        print(json.dumps(operate(*options.operation)))
        return 0
    if not 3 <= options.layers <= NUM_LAYERS:
        raise ValueError(f"{WHAT}: --layers must be 3 to {NUM_LAYERS}, got {options.layers}")
    needed = math.ceil(2.05 * weight_bytes(options.layers))
    free = shutil.disk_usage(options.directory).free
    if free < needed:
        raise ValueError(
            f"{WHAT}: {options.directory} must have {needed:,} bytes free for "
            f"{options.layers} layers, got {free:,}"
        )
    root = options.directory / "full_scale"
    root.mkdir()
    try:
        content = measure(root, options.layers)
    finally:
        shutil.rmtree(root)
    text = json.dumps(content, indent=2) + "\n"
    if options.json is not None:
        options.json.write_text(text)
    print(text, end="")
    return int(any(record["peak_bytes"] > LIMIT_BYTES for record in content["operations"]))


if __name__ == "__main__":
    sys.exit(main())
