# SPDX-License-Identifier: Apache-2.0
"""Nothing executes code from a file: no module of the package unpickles, evaluates or marshals."""

from __future__ import annotations

import ast
from pathlib import Path

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
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: {n}" for n in names if n.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called.endswith(".from_pretrained") and called != "BagelPipeline.from_pretrained":
                given.setdefault("trust_remote_code", "not given")
            found += [f"{node.lineno}: {called}"] * (called in CALLS)
            found += [
                f"{node.lineno}: {name}"
                for name in ("allow_pickle", "trust_remote_code")
                if given.get(name, "False") != "False"
            ]
    return found


def test_no_module_executes_what_a_file_holds() -> None:
    found = {str(path.relative_to(ROOT)): violations(path.read_text()) for path in SOURCES}
    assert len(found) > 50
    assert not any(found.values()), {path: own for path, own in found.items() if own}


def test_the_check_sees_what_it_looks_for() -> None:
    for source in (
        "from pickle import loads",
        "torch.load('x')",
        "np.load('x', allow_pickle=True)",
        "Auto.from_pretrained(name, local_files_only=True)",
    ):
        assert violations(source), source
