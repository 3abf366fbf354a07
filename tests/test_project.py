# SPDX-License-Identifier: Apache-2.0
"""Rules of the project that no single module can keep: imports, versions, files, links."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_unified

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparse_unified"

# Parts of the package from the kernels up. Each may import itself and what stands before it...
ORDER = (
    "_version",
    "_common",
    "_library",
    "experts",
    "ops",
    "nn",
    "checkpoint",
    "surgery",
    "bagel",
    "convert",
    "engines",
    "analysis",
    "adapt",
    "mini",
    "testing",
    "fixtures",
    "build",
    "bench",
    "cli",
)
# ... but ops, which kernels alone serve, no experts.
REFUSED = {"ops": {"experts"}}
# Names that a package passes on when they are first asked for.
PASSED_ON = {"sparse_unified": set(ORDER), "sparse_unified.checkpoint": {"convert"}}
# Modules that still import each other, if only for types or inside functions.
CYCLES: list[set[str]] = []
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


def module_of(path: Path) -> str:
    """Returns the name that a file of the package is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "sparse_unified" else ("sparse_unified", *parts))
    return name.removesuffix(".__init__")


def part_of(module: str) -> str:
    """Names the part of the package that a module belongs to; "" is the package itself."""
    return module.partition(".")[2].partition(".")[0]


def package_sources() -> list[Path]:
    return sources("sparse_unified", "bench")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


MODULES = {module_of(path): path for path in package_sources()}


@functools.cache
def imports(module: str) -> dict[str, int]:
    """Returns {module of the package: line} of all imports, wherever in the file they stand."""
    path = MODULES[module]
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else source for name in inner]
        found |= {name: node.lineno for name in names if name in MODULES}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    part = part_of(module)
    if part == "":
        return  # The package passes names on; what its import pulls in is tested below.
    assert part in ORDER, f"{module}: its place in ORDER must be decided"
    allowed = set(ORDER[: ORDER.index(part) + 1]) - REFUSED.get(part, set())
    allowed |= PASSED_ON.get(module, set())
    if part == "bench":
        allowed |= {""}  # as users import it
    for imported, line in imports(module).items():
        assert part_of(imported) in allowed, f"{module}:{line}: must not import {imported}"


def test_modules_do_not_import_each_other() -> None:
    reached: dict[str, set[str]] = {}
    for module in MODULES:
        reached[module], new = set(), [module]
        while new:
            own = {n for n in imports(new.pop()) if part_of(n) not in PASSED_ON.get(module, ())}
            new += own - reached[module]
            reached[module] |= own
    cycles = {
        frozenset(m for m in reached[module] if module in reached[m])
        for module in MODULES
        if module in reached[module]
    }
    assert [sorted(cycle) for cycle in cycles if not any(cycle <= known for known in CYCLES)] == []


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(module) for module in MODULES} - {""} <= set(ORDER)


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
        "import sys, torch; before = set(sys.modules); import sparse_unified.bagel; "
        f"print([n for n in {HEAVY} if n in set(sys.modules) - before])"
    )
    assert run_python(code) == "[]"


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(path: Path) -> set[str]:
    """Names the headings of a document as links do."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=label)
def test_documents_name_what_is_there(path: Path) -> None:
    text = path.read_text()
    bare = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", bare):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
    # `folder/name` in code style is a promise; names with capitals or <> stand for something.
    folders = r"csrc|sparse_unified|bench|tests|docs|examples|experiments|\.ci"
    for name in re.findall(rf"`((?:{folders})/[^`\s]*)`", text):
        assert re.search(r"[A-Z<>*{]", name) or (ROOT / name).exists(), name
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE)) <= targets


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
        if record["architecture"] == "sm_90a" and record["kernel"].startswith("persistent_gemm<")
    }
    assert len(gemms) >= 8
    for kernel, instructions in gemms.items():
        assert {"wgmma", "TMA load"} <= instructions.keys(), kernel
        shares_weights = kernel.endswith(", 2> >")
        assert ("of them multicast" in instructions) == shares_weights, kernel
    assert sum(kernel.endswith(", 2> >") for kernel in gemms) == 5


def test_makefile_takes_its_pins_from_one_line_of_pyproject() -> None:
    pins = re.findall(r"^requires = \[(.*)\]$", read("pyproject.toml"), re.MULTILINE)
    assert len(pins) == 1
    assert re.search(r'"torch==[0-9.]+"', pins[0])


def test_top_level_names_are_there_and_cheap() -> None:
    assert set(sparse_unified.__all__) <= set(dir(sparse_unified))
    for name in sparse_unified.__all__:
        assert getattr(sparse_unified, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparse_unified.nonsense
    script = (
        "import sys, time, torch\n"
        "start = time.process_time(); import sparse_unified\n"
        "print(time.process_time() - start)\n"
        "assert 'sparse_unified.surgery' not in sys.modules\n"
        "assert sparse_unified.MoEConfig().num_experts == 16\n"
    )
    seconds = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert float(seconds) < 0.3
