# SPDX-License-Identifier: Apache-2.0
"""Runs every command on small models and records what it writes: the behaviour that stays.

    python tests/frozen/record.py OUT.json      # in any version of the package

Files are recorded as SHA-256 where only integer arithmetic, copies and rankings make them, numbers
of JSON reports as they are, and results of floating point chains (latents, losses, trained
weights) as a few numbers, since other processors round differently; `bits` holds their SHA-256,
which two versions on one machine must share.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified.cli import main

# What differs from run to run or from place to place.
VOLATILE = ("seconds", "time", "peak", "version", "commit", "device", "date", "free", "elapsed")
WIDTHS = {"gen": 256, "und": 256}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def files(directory: Path) -> dict[str, str]:
    """Returns the hash of every file below a directory."""
    return {
        str(path.relative_to(directory)): digest(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def summary(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Returns mean, root mean square and first value of about a dozen tensors."""
    names = sorted(name for name, t in tensors.items() if t.numel())
    return {
        name: [
            round(float(value), 9)
            for value in (t.double().mean(), t.double().square().mean().sqrt(), t.reshape(-1)[0])
        ]
        for name in names[:: -(-len(names) // 12)]
        for t in (tensors[name],)
    }


def signature() -> str:
    """Names what decides how floating point chains round."""
    cpu = re.findall(r"(?:cpu family|model name)\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return " ".join([torch.__version__, torch.backends.cpu.get_cpu_capability(), *cpu[:2]])


def bits(tensors: dict[str, Tensor]) -> str:
    """Returns the hash of all tensors, names and dtypes included."""
    text = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        text.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        text.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return text.hexdigest()[:16]


def stable(value: Any, root: str) -> Any:
    """Drops what a report says of times, versions and places."""
    if isinstance(value, dict):
        return {
            key: stable(item, root)
            for key, item in value.items()
            if not any(word in key for word in VOLATILE)
        }
    if isinstance(value, list):
        return [stable(item, root) for item in value]
    return value.replace(root, "ROOT") if isinstance(value, str) else value


class Recorder:
    """Runs commands in a folder and keeps what they wrote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: dict[str, Any] = {
            "signature": signature(),
            "files": {},
            "reports": {},
            "numbers": {},
            "bits": {},
        }

    def run(self, name: str, words: str, report: bool = True) -> None:
        """Runs one command, in which @x is a file of the folder; its report is kept."""
        path = self.root / f"{name}.report.json"
        arguments = [str(self.root / w[1:]) if w[0] == "@" else w for w in shlex.split(words)]
        arguments += ["--json", str(path), "--quiet"] if report else []
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = main(arguments)
        assert code in (0, None), f"{words} ended with {code}: {errors.getvalue()}"
        if report:
            self.found["reports"][name] = stable(json.loads(path.read_text()), str(self.root))

    def keep_files(self, name: str) -> None:
        # Coactivation clusters floating point statistics.
        kind = "bits" if name.startswith("coactivation") else "files"
        self.found[kind][name] = files(self.root / name)

    def keep_numbers(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.found["numbers"][name] = summary(tensors)
        self.found["bits"][name] = bits(tensors)


def scores(path: Path) -> None:
    """Writes importance of neurons and of groups of heads for both components."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for component, width in WIDTHS.items():
        for layer in range(6):
            tensors[f"{component}.{layer}"] = torch.rand(width, generator=generator)
            tensors[f"{component}.{layer}.heads"] = torch.rand(2, generator=generator)
    save_file(tensors, path)


def reduce(source: Path, out: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Copies a model directory with other weights; several files get an index."""
    out.mkdir()
    for path in source.iterdir():
        if path.name != "ema.safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    tensors = edit(load_file(source / "ema.safetensors"))
    if isinstance(tensors, dict):
        save_file(tensors, out / "ema.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number, shard in enumerate(tensors, 1):
        name = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file(shard, out / name)
        index |= dict.fromkeys(sorted(shard), name)
    total = sum(t.nbytes for shard in tensors for t in shard.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (out / "model.safetensors.index.json").write_text(text)


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[part::3]} for part in range(3)]


EXPERTS, GIVEN = "--num-experts 16 --top-k 8", "--scores @scores.safetensors"
CONVERSIONS = {
    "sparse": f"@dense {EXPERTS}",
    "shared": f"@dense --num-experts 7 --top-k 3 --num-shared-experts 1 {GIVEN}",
    "und": f"@dense {EXPERTS} --component und --layers all --seed 3",
    "random": f"@dense {EXPERTS} --partition random --router-init random "
    "--partition-seed 5 --layers 1,3-4",
    "coactivation": f"@dense {EXPERTS} --partition coactivation --stats @stats.safetensors",
    "sparse_bf16": "@bf16 --num-experts 32 --top-k 16",
    "sparse_sharded": f"@sharded {EXPERTS} {GIVEN}",
    "sparse_ffns": f"@ffns {EXPERTS}",
}
PRUNINGS = {
    "width": "@dense --component und,gen --keep-ratio 0.5",
    "width_global": f"@dense --component gen --keep-ratio 0.5 --budget global "
    f"--block-size 16 {GIVEN}",
    "width_bf16": "@bf16 --component und --keep-ratio 0.25 --layers middle --criterion random "
    "--seed 2",
    "width_sharded": "@sharded --component gen --keep-ratio 0.75",
    "heads": f"@dense --component und,gen --axis heads --keep-ratio 0.5 {GIVEN}",
    "heads_gen": "@dense --component gen --axis heads --keep-ratio 0.5",
    "depth": "@dense --component gen --axis depth --skip-layers 1,3-4",
    "depth_ffn": "@dense --component und,gen --axis depth --skip-layers 2 --skip-part ffn",
    "all": "@dense --component und,gen --axis depth,width,heads --keep-ratio 0.5 --skip-layers 4",
    "inside": "@sparse --component gen --keep-ratio 0.5",
    "inside_shared": "@shared --component gen --keep-ratio 0.5",
}


def directories(recorder: Recorder) -> None:
    """Converts, prunes, inverts, verifies and describes a dozen kinds of model directories."""
    root, run, keep = recorder.root, recorder.run, recorder.keep_files
    dense = root / "dense"
    run("write", "mini write scenes @dense")
    reduce(dense, root / "bf16", lambda t: {k: v.bfloat16() for k, v in t.items()})
    reduce(dense, root / "sharded", shards)
    reduce(dense, root / "ffns", lambda t: {k: v for k, v in t.items() if ".mlp_moe_gen." in k})
    for name in ("ae.safetensors", "tokenizer.json", "tokenizer_config.json", "vit_config.json"):
        (root / "ffns" / name).unlink()
    scores(root / "scores.safetensors")
    run(
        "calibrate",
        "calibrate @dense --task generation --samples 2 --out @stats.safetensors --steps 3 "
        "--size 16x16 --inputs 64 --scores @wanda.safetensors",
    )
    for name in ("stats.safetensors", "wanda.safetensors"):
        recorder.keep_numbers(name, load_file(root / name))
    for name, words in CONVERSIONS.items():
        source, _, options = words.partition(" ")
        run(name, f"convert {source} @{name} {options}")
        keep(name)
        run(f"{name}.verify", f"verify @{name} --against {source}")
        run(f"{name}.inverted", f"invert @{name} @{name}.inverted")
        keep(f"{name}.inverted")
    run(
        "activation",
        "convert @dense @activation --num-experts 16 --top-k 8 --router-init activation "
        "--stats @stats.safetensors",
    )
    recorder.keep_numbers("activation", load_file(root / "activation" / "ema.safetensors"))
    for name, words in PRUNINGS.items():
        source, _, options = words.partition(" ")
        run(name, f"prune {source} @{name} {options}")
        keep(name)
        run(f"{name}.verify", f"verify @{name} --against {source}")
        run(f"{name}.info", f"info @{name}")
    run("pruned_sparse", "convert @width @pruned_sparse --num-experts 8 --top-k 4")
    keep("pruned_sparse")
    run("pruned_sparse.inverted", "invert @pruned_sparse @pruned_sparse.inverted")
    keep("pruned_sparse.inverted")
    for name in ("dense", "sparse", "shared", "und", "sparse_sharded", "sparse_ffns"):
        run(f"{name}.info", f"info @{name}")
    run("sparse.memory", "info @sparse --memory")


def runs(recorder: Recorder) -> None:
    """Draws, answers, sweeps and trains."""
    root = recorder.root
    from sparse_unified.bagel import BagelPipeline, StepCache

    cached = StepCache(interval=2, order=1, first=2)
    for name in ("dense", "sparse", "shared", "all", "inside"):
        pipeline = BagelPipeline.from_pretrained(root / name)
        for label, cache in (("", None), (".cached", cached)):
            result = pipeline.generate(
                "a red square",
                size=(16, 16),
                seed=11,
                num_timesteps=7,
                cache=cache,
                progress=False,
            )
            latents = {str(i): latent for i, latent in enumerate(result.latents)}
            recorder.keep_numbers(f"{name}.latents{label}", latents)
    recorder.run(
        "generate",
        "generate @sparse --prompt 'a green cross' --size 16x16 --steps 5 --seed 3 "
        "--out @drawn.png",
    )
    recorder.run("chat", "chat @sparse --prompt 'what is it' --image @drawn.png --max-tokens 8")
    sampled = "--task generation --samples 2 --steps 3 --size 16x16"
    recorder.run("usage", f"expert-usage @activation {sampled}")
    recorder.run(
        "analyze",
        f"analyze @dense {sampled} --component und,gen --axis depth,width,heads --ratios .5 "
        "--repeats 1 --no-plots --out @sweep",
    )

    data = root / "data"
    data.mkdir()
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(["a red square", "a blue circle"][number % 2])
    train = "--data @data --batch-size 2 --seed 5 --lr 1e-3 --ema 0.9"
    recorder.run("adapt", f"adapt @sparse @tuned {train} --steps 6 --stage full")
    recorder.keep_numbers("tuned", load_file(root / "tuned" / "ema.safetensors"))
    router = "--steps 3 --stage router --component gen"
    recorder.run("adapt_router", f"adapt @sparse @routed {train} {router}")
    recorder.keep_numbers("routed", load_file(root / "routed" / "ema.safetensors"))


def record() -> dict[str, Any]:
    """Returns all that is recorded."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder).resolve())
        here = Path.cwd()
        os.chdir(folder)
        try:
            directories(recorder)
            runs(recorder)
        finally:
            os.chdir(here)
    return recorder.found


if __name__ == "__main__":
    # A line for each thing that was recorded, so that a change of one shows as one.
    parts = []
    for kind, found in record().items():
        lines = (
            [f'"{name}": {json.dumps(found[name])}' for name in sorted(found)]
            if isinstance(found, dict)
            else []
        )
        value = "{\n" + ",\n".join(lines) + "\n}" if lines else json.dumps(found)
        parts.append(f'"{kind}": {value}')
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(parts) + "\n}\n")
