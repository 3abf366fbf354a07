# SPDX-License-Identifier: Apache-2.0
"""Installs the wheel of a folder into fresh environments and uses it; make wheel-test.

    python tests/wheel_smoke.py dist                            # the interpreter that runs this
    python tests/wheel_smoke.py dist --python python3.10 --torch torch==2.13.0
    python tests/wheel_smoke.py dist --sdist                    # the wheel of the unpacked sdist

Each interpreter gets a virtual environment outside the tree. Without --torch it borrows torch and
all else from the interpreter that runs this, which must be of the same version and have the
packages of the extra `bagel`; with it pip installs them. --sdist unpacks the source archive and
builds a wheel of it without a network, in a namespace of its own where that is allowed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

USE = """
import json, sys
import torch
import sparse_unified
from sparse_unified import ops
from sparse_unified.build import build_info
from sparse_unified.ops import reference

assert sparse_unified.__file__.startswith(sys.prefix), sparse_unified.__file__
torch.manual_seed(0)
x = torch.randn(37, 40, requires_grad=True)
gate, up = torch.randn(5, 40), torch.randn(5 * 16, 40)
down = torch.randn(40, 5 * 16)
logits, topk_logits, topk_idx = ops.route_topk(x, gate, 2)
offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, 5)
out = ops.grouped_ffn_combine(x, topk_logits, row_token, token_rows, offsets, up, up, down, 1.0)
expected, _ = reference.sparse_ffn(x, gate, 2, up, up, down)
assert torch.allclose(out, expected, rtol=1e-4, atol=1e-2)
grad, = torch.autograd.grad(out.square().sum(), x)
wanted, = torch.autograd.grad(expected.square().sum(), x)
assert torch.allclose(grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
compiled = torch.compile(lambda x: ops.route_topk(x, gate, 2)[0], backend="eager", fullgraph=True)
assert torch.equal(compiled(x), logits)
print(json.dumps(build_info().to_dict()))
"""
COMMANDS = (
    "--version",
    "info",
    "mini write scenes dense",
    "info dense",
    "convert dense sparse --num-experts 4 --top-k 2",
    "verify sparse --against dense",
    "invert sparse back",
)


def run(*command: object, where: Path, **environment: str) -> str:
    """Runs a command away from the tree and returns what it prints; its errors are ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CPATH"))}
    words, variables = [str(word) for word in command], {**kept, **environment}
    done = subprocess.run(words, cwd=where, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def find_one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"wheel_smoke: {folder} must hold one {pattern}, got {len(found)}")
    return found[0].resolve()


def build_from_sdist(folder: Path, scratch: Path) -> Path:
    """Unpacks the source archive and returns the CPU wheel built of it, without a network."""
    archive = find_one(folder, "*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    tree = scratch / archive.name.removesuffix(".tar.gz")
    cut_off = ["unshare", "--map-root-user", "--net"]  # where a user may do that
    if not shutil.which("unshare") or subprocess.run([*cut_off, "true"], check=False).returncode:
        cut_off = []
    pip = [*cut_off, sys.executable, "-m", "pip", "--no-input", "wheel", "-q", "--no-deps"]
    options = ["--no-build-isolation", "-w", scratch / "built", tree]
    run(*pip, *options, where=scratch, PIP_NO_INDEX="1", SPARSE_UNIFIED_CUDA="off")
    print(f"built of {archive.name} without {'a network' if cut_off else 'an index'}")
    return find_one(scratch / "built", "*.whl")


def smoke(wheel: Path, interpreter: str, torch_spec: str | None, scratch: Path) -> None:
    """Installs a wheel into a new environment of an interpreter and uses it."""
    home = scratch / f"env-{Path(interpreter).name}"
    run(interpreter, "-m", "venv", "--clear", home, where=scratch)
    python = home / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    if torch_spec is None:
        # A path in a .pth file: what lies there is found, its own .pth files are not read.
        where_to = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run(python, "-c", where_to, where=scratch).strip())
        (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
        run(*pip, "--no-index", "--no-deps", wheel, where=scratch)
    else:
        run(*pip, torch_spec, where=scratch)
        run(*pip, f"{wheel}[bagel]", where=scratch)
    told = json.loads(run(python, "-c", USE, where=scratch))
    work = scratch / f"work-{Path(interpreter).name}"
    work.mkdir()
    for command in COMMANDS:
        run(home / "bin" / "sparse-unified", *command.split(), where=work)
    dense, back = (
        {p.name: p.read_bytes() for p in (work / n).iterdir()} for n in ("dense", "back")
    )
    if dense != back:
        raise SystemExit("wheel_smoke: invert must give the dense files back, got others")
    versions = f"Python {told['python']}, torch {told['torch']}, commit {told['commit']}"
    print(f"{wheel.name}: used on {versions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="where wheel and source archive lie")
    parser.add_argument("--python", action="append", help="an interpreter (repeatable)")
    parser.add_argument("--torch", help="what pip is given; without it torch is borrowed")
    parser.add_argument("--sdist", action="store_true", help="use the wheel of the source archive")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        build = build_from_sdist if options.sdist else lambda folder, _: find_one(folder, "*.whl")
        wheel = build(options.folder, scratch)
        for interpreter in options.python or [sys.executable]:
            smoke(wheel, interpreter, options.torch, scratch)


if __name__ == "__main__":
    main()
