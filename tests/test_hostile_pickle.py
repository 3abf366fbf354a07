# SPDX-License-Identifier: Apache-2.0
"""Nothing executes code from a file: no module of the package unpickles, evaluates or marshals."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "sparse_unified").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "np.load",
    "numpy.load",
    "yaml.load",
}


def violations(source: str) -> list[str]:
    """Names every import and call in Python source that could run code out of a data file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            found += [f"line {node.lineno}: {a.name}" for a in node.names if a.name in MODULES]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                found.append(f"line {node.lineno}: {called}()")
            given = {keyword.arg for keyword in node.keywords}
            ours = called == "BagelPipeline.from_pretrained"
            if (
                called.endswith(".from_pretrained")
                and not ours
                and "trust_remote_code" not in given
            ):
                found.append(f"line {node.lineno}: {called}() without trust_remote_code")
            for keyword in node.keywords:
                risky = keyword.arg in ("allow_pickle", "trust_remote_code")
                if risky and ast.unparse(keyword.value) != "False":
                    found.append(f"line {node.lineno}: {keyword.arg}")
        found += [f"line {node.lineno}: {n}" for n in names if n.split(".")[0] in MODULES]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_executes_what_a_file_holds(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "eval(text)",
        "Auto.from_pretrained(name, trust_remote_code=True)",
        "Auto.from_pretrained(name, local_files_only=True)",
    ],
)
def test_the_check_sees_what_it_looks_for(source: str) -> None:
    assert violations(source)
