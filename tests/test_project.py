# SPDX-License-Identifier: Apache-2.0
"""Rules of the project that no single module can keep: imports, versions, files, links."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_unified
from sparse_unified.cli import build_parser

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparse_unified"

# Parts of the package from the kernels up. Each may import itself and what stands before it...
ORDER = (
    "_library",
    "errors",
    "experts",
    "ops",
    "nn",
    "checkpoint",
    "build",
    "surgery",
    "bagel",
    "engines",
    "analysis",
    "adapt",
    "mini",
    "testing",
    "fixtures",
    "bench",
    "cli",
)
# ... but these no more than this.
NARROWER = {
    "experts": {"errors"},
    "ops": {"_library", "errors"},
    "nn": {"_library", "errors", "ops", "experts"},
    "checkpoint": {"errors", "experts", "nn"},
}
MAY_PRINT = {"bench", "cli"}
HEAVY = (
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "PIL",
    "tqdm",
    "matplotlib",
    "datasets",
    "tensorboard",
    "sklearn",
    "accelerate",
    "torchao",
    "diffusers",
    "kernels",
    "vllm_omni",
)


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Lists the files of the tree that carry code."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    )


def part_of(path: Path) -> str:
    """Names the part of the package that a file belongs to; "" is the package itself."""
    if path.is_relative_to(ROOT / "bench"):
        return "bench"
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def package_sources() -> list[Path]:
    return sources("sparse_unified", "bench")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, part) for every import of the package, wherever in the file it stands."""
    package = list(path.relative_to(ROOT).parent.parts)
    if part_of(path) == "bench":
        package = ["sparse_unified", *package]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from sparse_unified import ops` names the part after the module.
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "sparse_unified":
                part = rest.partition(".")[0]
                yield node.lineno, part if part in ORDER else ""


@pytest.mark.parametrize("path", package_sources(), ids=label)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "":
        return  # The package re-exports lazily; what its import pulls in is tested below.
    assert part in ORDER, f"{label(path)}: its place in ORDER must be decided"
    allowed = NARROWER.get(part, set(ORDER[: ORDER.index(part)])) | {part}
    if part in ("build", "cli", "bench", "testing", "fixtures", "engines"):
        allowed |= {""}  # for __version__
    for line, imported in imported_parts(path):
        assert imported in allowed or (part in ("ops", "checkpoint") and imported == ""), (
            f"{label(path)}:{line}: {part} must not import {imported or 'sparse_unified'}"
        )


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(path) for path in package_sources()} - {""} <= set(ORDER)


@pytest.mark.parametrize("path", package_sources(), ids=label)
def test_only_commands_print(path: Path) -> None:
    if part_of(path) in MAY_PRINT:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert not printing, f"{label(path)}: print must be left to commands, got lines {printing}"


def test_every_source_names_its_licence() -> None:
    files = sources("sparse_unified", "bench", "tests", "examples", "docs")
    files += sources("csrc", "tests", suffixes=(".h", ".cpp", ".cu", ".cuh"))
    files += [ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile", "pyproject.toml")]
    files += [*(ROOT / ".ci").iterdir(), ROOT / ".clang-format"]
    bare = [
        label(path)
        for path in files
        if not any(
            re.fullmatch(r"(//|#) SPDX-License-Identifier: Apache-2\.0", line)
            for line in path.read_text().splitlines()[:2]
        )
    ]
    assert bare == []


def test_every_kernel_and_binding_is_in_the_list_of_sources() -> None:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    found = [
        str(path.relative_to(ROOT / "csrc"))
        for folder in ("csrc/cpu", "csrc/cuda", "csrc/bindings")
        for path in sources(folder, suffixes=(".cpp", ".cu"))
    ]
    assert sorted(listed) == sorted(found)
    assert len(set(listed)) == len(listed)


def test_kernels_never_include_torch() -> None:
    kernels = sources("csrc/cpu", "csrc/include", suffixes=(".h", ".cpp"))
    found = [
        label(path)
        for path in kernels
        if re.search(r"#include\s*[<\"](torch|ATen|c10|Python)", path.read_text())
    ]
    assert found == []


def test_every_package_is_installed() -> None:
    listed = re.search(r"^packages = \[(.*?)^\]", read("pyproject.toml"), re.DOTALL | re.MULTILINE)
    assert listed is not None
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in sources("sparse_unified")
        if path.name == "__init__.py"
    }
    found |= {
        ".".join(("sparse_unified", *path.parent.relative_to(ROOT).parts))
        for path in sources("bench")
        if path.name == "__init__.py"
    }
    assert set(re.findall(r'"(.+?)"', listed[1])) == found


def test_version_is_the_same_everywhere() -> None:
    stated = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    newest = re.search(r"^## ([0-9.]+)", read("CHANGELOG.md"), re.MULTILINE)
    assert stated is not None
    assert newest is not None
    assert sparse_unified.__version__ == stated[1] == newest[1]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_importing_the_package_leaves_the_extras_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_unified; "
        f"print([n for n in {HEAVY} if n in set(sys.modules) - before])"
    )
    assert run_python(code) == "[]"


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=label)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), f"{label(path)}: link must lead somewhere, got {link}"
        if anchor:
            assert anchor in anchors(file), f"{label(path)}: anchor must exist, got {link}"


def anchors(path: Path) -> set[str]:
    """Names the headings of a document as links do."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=label)
def test_documents_name_files_that_exist(path: Path) -> None:
    # `folder/name` in code style is a promise; names with capitals or <> stand for something.
    folders = r"csrc|sparse_unified|bench|tests|docs|examples|\.ci"
    named = re.findall(rf"`((?:{folders})/[^`\s]*)`", path.read_text())
    concrete = [name for name in named if not re.search(r"[A-Z<>*{]", name)]
    assert [name for name in concrete if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", documents(), ids=label)
def test_commands_in_documents_are_targets_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    used = set(re.findall(r"`make ([a-z]+)", path.read_text()))
    used |= set(re.findall(r"^make ([a-z]+)", path.read_text(), re.MULTILINE))
    assert used <= targets


def fenced(path: Path, language: str) -> list[str]:
    """Returns the code blocks of a document in one language, "" for those without one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


@pytest.mark.parametrize("path", documents(), ids=label)
def test_commands_in_documents_are_understood(path: Path) -> None:
    parser = build_parser()
    for line in "\n".join(fenced(path, "")).splitlines():
        if line.startswith("sparse-unified ") and "[" not in line and "|" not in line:
            assert "run" in parser.parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("path", documents(), ids=label)
def test_python_in_documents_uses_names_that_exist(path: Path) -> None:
    for text in fenced(path, "python"):
        tree = ast.parse(text)
        imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names: dict[str, object] = {}
        exec(compile(ast.Module(imports, []), str(path), "exec"), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = names.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), ast.unparse(node)


def test_generated_documents_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    sys.modules["render"] = render
    spec.loader.exec_module(render)
    results = render.read_results()
    assert read("docs/performance.md") == render.performance(results), "run make docs"
    assert read("README.md") == render.readme(read("README.md"), results), "run make docs"
    pages = read("docs/checkpoints.md")
    assert pages == render.checkpoints(pages), "run make docs"


def test_kernels_do_not_spill_and_hopper_s_use_its_instructions() -> None:
    records = json.loads((ROOT / "docs" / "resources.json").read_text())["records"]
    assert not [record["kernel"] for record in records if record["spilled_bytes"]]
    gemms = {
        record["kernel"]: record["instructions"]
        for record in records
        if record["architecture"] == "sm_90a"
        and re.match(r"grouped_ffn|up_sm90a::|rows_gemm_sm90a::", record["kernel"])
    }
    assert len(gemms) >= 8
    for kernel, instructions in gemms.items():
        assert {"wgmma", "TMA load"} <= instructions.keys(), kernel
        shares_weights = kernel.endswith(", 2>")
        assert ("of them multicast" in instructions) == shares_weights, kernel
    assert sum(kernel.endswith(", 2>") for kernel in gemms) == 3


def test_makefile_takes_its_pins_from_one_line_of_pyproject() -> None:
    pins = re.findall(r"^requires = \[(.*)\]$", read("pyproject.toml"), re.MULTILINE)
    assert len(pins) == 1
    assert re.search(r'"torch==[0-9.]+"', pins[0])
