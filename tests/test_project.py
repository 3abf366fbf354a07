# SPDX-License-Identifier: Apache-2.0
"""Rules of the project that no single module can keep: imports, versions, files, links."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hops import paths, sizes
from mutations import MUTATIONS, Mutation

import sparse_unified

ROOT = Path(__file__).parent.parent

# Parts of the package from the kernels up. Each may import itself and what stands before it...
ORDER = (
    *("_version", "_common", "_library", "experts", "ops", "nn", "checkpoint", "surgery", "bagel"),
    *("convert", "engines", "analysis", "adapt", "mini", "testing", "fixtures", "build", "checks"),
    *("bench", "doctor", "cli"),
)
# ... but ops, which kernels alone serve, no experts.
REFUSED = {"ops": {"experts"}}
# Names that a package passes on when they are first asked for; and the doctor, which the script of
# the GPU check runs; nothing imports that.
PASSED_ON = {
    "sparse_unified": set(ORDER),
    "sparse_unified.checkpoint": {"convert"},
    "sparse_unified.bench.gpu_check": {"doctor"},
}
HEAVY = (
    *("transformers", "tokenizers", "huggingface_hub", "PIL", "tqdm", "matplotlib", "datasets"),
    *(
        "tensorboard",
        "sklearn",
        "accelerate",
        "torchao",
        "diffusers",
        "kernels",
        "vllm_omni",
        "gradio",
        "peft",
        "yaml",
    ),
)
# Files and functions of the main paths, at most; `python tests/hops.py --list` shows them.
CEILINGS = {
    "conversion": (11, 145),
    "sparse load": (22, 167),
    "calibration": (21, 183),
    "prune with scores": (11, 159),
    "denoising step": (11, 30),
}


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


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(name: str) -> str:
    return (ROOT / name).read_text()


def listed(pattern: str, name: str) -> str:
    """What the group of a pattern matches in a file."""
    match = re.search(pattern, read(name), re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[1]


def run_python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    env = os.environ | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


# Imports

MODULES = {module_of(path): path for path in sources("sparse_unified", "bench")}


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


def test_imports_point_one_way() -> None:
    wrong = []
    for module in MODULES:
        part = part_of(module)
        if part == "":
            continue  # The package passes names on; what its import pulls in is tested below.
        assert part in ORDER, f"{module}: its place in ORDER must be decided"
        allowed = set(ORDER[: ORDER.index(part) + 1]) - REFUSED.get(part, set())
        allowed |= PASSED_ON.get(module, set())
        allowed |= {""} if part == "bench" else set()  # as users import it
        found = imports(module).items()
        wrong += [
            f"{module}:{line}: {name}" for name, line in found if part_of(name) not in allowed
        ]
    assert wrong == []


# Of an extra under another name; what comes with one, or is built here; what pages tell to install.
INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
COME_ALONG = {"tokenizers": "transformers"}
OF_OTHERS = {"vllm", "vllm_omni", "lmms_eval", "nemo_automodel", "modeling"}


def test_what_is_imported_is_in_the_extra_that_is_named_for_it() -> None:
    text = listed(r"^\[project.optional-dependencies\]$(.*?)^all = ", "pyproject.toml")
    lists = re.findall(r"^(\w+) = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    extras = {name: set(re.findall(r'"([\w-]+)', items)) for name, items in lists}
    core = {"torch", "numpy", "safetensors", "setuptools"}
    anything = set().union(core, *extras.values())
    folders = ("sparse_unified", "bench", "docs", "examples", "experiments", "tests")
    files = sources("docs", "examples", "experiments", "tests")
    own = {name for path in files for name in (path.stem, path.parent.name)}
    known = {*sys.stdlib_module_names, *OF_OTHERS, *own, "sparse_unified"}

    def is_there(module: str, where: set[str]) -> bool:
        name = module.partition(".")[0]
        name = INSTALLED_AS.get(name, COME_ALONG.get(name, name))
        return name in known or name in where

    missing = []
    for path in sources(*folders):
        for node in ast.walk(ast.parse(path.read_text())):
            modules, where = [], anything
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            elif (
                isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
            ):
                called = ast.unparse(node.func)
                if called in ("optional", "pytest.importorskip"):
                    modules = [node.args[0].value]
                if called == "optional":
                    named = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "extra")]
                    where = extras[ast.literal_eval(named[0]) if named else "bagel"]
            missing += [f"{label(path)}: {m}" for m in modules if not is_there(m, where)]
    assert missing == []


def test_modules_do_not_import_each_other() -> None:
    """If only for types, or inside functions."""
    reached: dict[str, set[str]] = {}
    for module in MODULES:
        reached[module], new = set(), [module]
        while new:
            own = {n for n in imports(new.pop()) if part_of(n) not in PASSED_ON.get(module, ())}
            new += own - reached[module]
            reached[module] |= own
    assert [module for module in MODULES if module in reached[module]] == []


def test_top_level_names_are_there_and_cheap_and_extras_are_left_alone() -> None:
    assert set(sparse_unified.__all__) <= set(dir(sparse_unified))
    for name in sparse_unified.__all__:
        assert getattr(sparse_unified, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparse_unified.nonsense
    seconds = run_python(
        "import sys, time, torch\n"
        "start = time.process_time(); import sparse_unified\n"
        "print(time.process_time() - start)\n"
        "assert 'sparse_unified.surgery' not in sys.modules\n"
        "before = set(sys.modules); from sparse_unified.cli import build_parser\n"
        "build_parser().format_help(); new = set(sys.modules) - before\n"
        f"slow = {(*HEAVY, 'torch', 'numpy', 'safetensors')}\n"
        "found = [n for n in new if n.partition('.')[0] in slow or\n"
        "    n.startswith('sparse_unified.') and '.cli' not in n and '._' not in n]\n"
        "assert not found, found\n"
        "assert sparse_unified.MoEConfig().num_experts == 16\n"
        "before = set(sys.modules); import sparse_unified.bagel\n"
        f"found = [n for n in {HEAVY} if n in set(sys.modules) - before]; assert not found, found\n"
    )
    assert float(seconds) < 0.3


def test_main_paths_pass_through_few_files_and_functions(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = {name: sizes(calls) for name, calls in paths(tmp_path).items()}
    longer = {
        name: (size, CEILINGS[name])
        for name, size in found.items()
        if size[0] > CEILINGS[name][0] or size[1] > CEILINGS[name][1]
    }
    assert longer == {}, "python tests/hops.py --list shows the functions"


# Files


def test_every_source_names_its_licence() -> None:
    files = sources("sparse_unified", "bench", "tests", "examples", "docs")
    files += sources("csrc", "tests", suffixes=(".h", ".cpp", ".cu", ".cuh"))
    files += [ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile", "pyproject.toml")]
    files += [*(ROOT / ".ci").iterdir(), ROOT / ".clang-format"]
    licence = re.compile(r"(.*\n)?(//|#) SPDX-License-Identifier: Apache-2\.0\n")
    assert [label(path) for path in files if not licence.match(path.read_text())] == []


UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
LOADERS = ("torch.load", "torch.jit.load", "torch.package.PackageImporter", "np.load", "numpy.load")
EXECUTING = {"eval", "exec", "compile", *LOADERS}


def unsafe(source: str) -> list[str]:
    """Names every import and call in Python source that could run code out of a data file."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called.endswith(".from_pretrained") and called != "BagelPipeline.from_pretrained":
                given.setdefault("trust_remote_code", "not given")
            flags = ("allow_pickle", "trust_remote_code")
            found += [flag for flag in flags if given.get(flag, "False") != "False"]
            found += {called} & EXECUTING
    return found


def test_no_module_executes_what_a_file_holds() -> None:
    found = {name: unsafe(path.read_text()) for name, path in MODULES.items()}
    assert {name: calls for name, calls in found.items() if calls} == {}
    for text in (
        "from pickle import loads",
        "torch.load(x)",
        "f(allow_pickle=True)",
        "Auto.from_pretrained(x)",
    ):
        assert unsafe(text), text


def test_every_kernel_and_binding_is_listed_and_kernels_never_include_torch() -> None:
    lines = read("csrc/sources.txt").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    found = sources("csrc/cpu", "csrc/cuda", "csrc/bindings", suffixes=(".cpp", ".cu"))
    assert sorted(names) == sorted(str(path.relative_to(ROOT / "csrc")) for path in found)
    torch = re.compile(r"#include\s*[<\"](torch|ATen|c10|Python)")
    kernels = sources("csrc/cpu", "csrc/include", suffixes=(".h", ".cpp"))
    assert [label(path) for path in kernels if torch.search(path.read_text())] == []


def test_every_package_is_installed_and_versions_and_pins_agree() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    found = listed(r"^packages = \[(.*?)^\]", "pyproject.toml")
    assert set(re.findall(r'"(.+?)"', found)) == packages
    stated = listed(r'^version = "(.+?)"$', "pyproject.toml")
    assert sparse_unified.__version__ == stated == listed(r"^## ([0-9.]+)", "CHANGELOG.md")
    assert read("pyproject.toml").count("\nrequires = [") == 1  # which the Makefile reads
    assert re.search(r'"torch==[0-9.]+"', listed(r"^requires = \[(.*?)\]$", "pyproject.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}-{m.new[:30]!r}")
def test_a_mutation_applies_and_names_its_tests(mutation: Mutation) -> None:
    assert read(mutation.file).count(mutation.old) == 1
    assert mutation.old != mutation.new
    files = [test for test in mutation.tests if test.startswith("tests")]
    assert files
    assert all(list(ROOT.glob(file)) for file in files)


# Documents


def anchors(path: Path) -> set[str]:
    """Names the headings of a document as links do."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=label)
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


INTEGRATIONS = [
    "app",
    "vllm-omni",
    "diffusers",
    "transformers",
    "hf-kernels",
    "hub",
    "lmms-eval",
    "automodel",
]


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_an_integration_is_a_short_page_that_begins_with_the_command(name: str) -> None:
    page = read(f"docs/{name}.md")
    assert re.match(r"# .+\n\n```", page)
    assert page.count("\n") <= 60
    assert len(re.findall(rf"^\| .+\(docs/{name}\.md\) \|$", read("README.md"), re.MULTILINE)) == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("sparse_unified/engines/*.py")), ids=label)
def test_an_adapter_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 200


def load_script(name: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_documents_are_up_to_date() -> None:
    render = load_script("render")
    results = render.read_results()
    assert read("docs/performance.md") == render.performance(results), "run make docs"
    assert read("README.md") == render.readme(read("README.md"), results), "run make docs"
    pages = read("docs/checkpoints.md")
    assert pages == render.checkpoints(pages), "run make docs"


def test_the_api_reference_is_deterministic_and_names_no_address() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import api; " + (
        "sys.stdout.write(api.reference())"
    )
    first = run_python(code, PYTHONHASHSEED="1")
    assert first == load_script("api").reference()  # hashes are seeded otherwise here
    assert " at 0x" not in first
    for name in ("route_topk", "SparseMoE", "convert", "apply_moe_", "BagelPipeline", "calibrate"):
        assert f"\n### {name}\n" in first


def test_kernels_do_not_spill_and_hopper_s_use_its_instructions() -> None:
    records = json.loads(read("docs/resources.json"))["records"]
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
    assert sum(kernel.endswith(", 2> >") for kernel in gemms) == 7
