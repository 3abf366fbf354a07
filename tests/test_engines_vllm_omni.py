# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's BAGEL takes sparse checkpoints, through its own registry of models.

A stand-in with vLLM-Omni's names and signatures takes its place, for tests of seconds. Where the
released wheels lie in build/vllm_omni (make build/vllm_omni), the stand-in and the tables of names
are compared with their source, and our blocks run inside their BAGEL decoder, in one process and in
two. VLLM_OMNI_REPO names a checkout to compare with instead.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from surgery_models import Bare, EngineMLP
from torch import Tensor, nn

from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import convert
from sparse_unified.nn import SparseMoE

ROOT = Path(__file__).parent.parent
GROUP = "vllm_omni.general_plugins"
SPARSE_LAYER = 1


class BuiltIn(nn.Module):
    """As vLLM-Omni's BagelPipeline, of whose weights those of the FFNs are enough here."""

    rank, split = 0, 1  # of the group over which FFNs are split

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = json.loads((Path(od_config.model) / "llm_config.json").read_text())
        hidden, width = config["hidden_size"], config["intermediate_size"] // self.split
        self.device = torch.device("cpu")
        layers = nn.ModuleList(
            Bare(mlp=EngineMLP(hidden, width), mlp_moe_gen=EngineMLP(hidden, width))
            for _ in range(config["num_hidden_layers"])
        )
        self.language_model = Bare(model=Bare(layers=layers))
        self.transformer = self.language_model.model

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            merged = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
            if merged not in own:
                continue
            tensor = tensor.chunk(self.split, dim=int("down_proj" in name))[self.rank]
            half = {".gate_proj.": slice(len(tensor)), ".up_proj.": slice(len(tensor), None)}
            rows = [part for text, part in half.items() if text in name] or [slice(None)]
            own[merged].data[rows[0]] = tensor
            loaded.add(merged)
        return loaded


class Reader(BuiltIn):
    """As OmniBagelForConditionalGeneration, the language model of the two-stage deployment."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(od_config=vllm_config.model_config, prefix=prefix)


class Registry:
    """As vllm_omni.diffusion.registry: names of models, imported when they are wanted."""

    def __init__(self) -> None:
        self.models = {"BagelPipeline": (BUILT_IN, "BagelPipeline")}

    def register_diffusion_model(
        self,
        model_arch: str,
        module_name: str,
        class_name: str,
        pre_process_func_name: str | None = None,
        post_process_func_name: str | None = None,
    ) -> None:
        self.models[model_arch] = (module_name, class_name)

    def register_model(self, model_arch: str, model_cls: str) -> None:
        """As vLLM's registry of language models."""
        self.models[model_arch] = tuple(model_cls.split(":"))  # type: ignore[assignment]

    def module(self, name: str = "BagelPipeline") -> ModuleType:
        return importlib.import_module(self.models[name][0])

    def load(self, name: str = "BagelPipeline") -> Any:
        return getattr(self.module(name), self.models[name][1])


BUILT_IN = "vllm_omni.diffusion.models.bagel.pipeline_bagel"
READER, READS = "OmniBagelForConditionalGeneration", "vllm_omni.model_executor.models.bagel.bagel"
PROCESS_FUNCTIONS = ("get_bagel_post_process_func", "get_bagel_pre_process_func")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    made = Registry()
    built_in = ModuleType(BUILT_IN)
    built_in.BagelPipeline = BuiltIn  # type: ignore[attr-defined]
    for name in PROCESS_FUNCTIONS:
        setattr(built_in, name, lambda od_config, name=name: name)
    contents: dict[str, dict[str, Any]] = {
        "vllm_omni.diffusion.registry": {"register_diffusion_model": made.register_diffusion_model},
        "vllm_omni.model_executor.models.registry": {"OmniModelRegistry": made},
        READS: {READER: Reader},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: BuiltIn.rank,
            "get_tensor_model_parallel_world_size": lambda: BuiltIn.split,
            "tensor_model_parallel_all_reduce": lambda x: x,  # the test adds up
        },
    }
    for name in (*contents, BUILT_IN):
        for count in range(name.count("."), 0, -1):
            parent = name.rsplit(".", count)[0]
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, BUILT_IN, built_in)
    yield made
    for name in ("vllm_omni", "vllm_omni_reader"):
        sys.modules.pop(f"sparse_unified.engines.{name}", None)


def declared(group: str) -> dict[str, str]:
    """The entry points of a group that pyproject.toml declares, name to value."""
    text = (ROOT / "pyproject.toml").read_text()
    pattern = rf'^\[project\.entry-points\."{re.escape(group)}"\]\n(\w+) = "(.+)"$'
    return dict(re.findall(pattern, text, re.MULTILINE))


def plugin() -> EntryPoint:
    [(name, value)] = declared(GROUP).items()
    return EntryPoint(name=name, value=value, group=GROUP)


def config_of(directory: Path) -> Any:
    return SimpleNamespace(model=str(directory), revision=None)


def read(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "ema.safetensors")


@pytest.fixture(scope="module", params=["t2i_dense", "t2i_moe"])
def checkpoint(request: pytest.FixtureRequest, golden: Any) -> Path:
    return golden(request.param)


@pytest.fixture(scope="module")
def sparse(golden: Any) -> Path:
    return golden("t2i_moe")


def test_the_plugin_puts_its_pipeline_in_the_place_of_the_built_in_one(registry: Registry) -> None:
    register = plugin().load()
    register()
    register()  # every process loads plugins, some more than once
    assert issubclass(registry.load(), BuiltIn)
    assert issubclass(registry.load(READER), Reader)
    # By their names vLLM-Omni finds settings, such as those of TeaCache.
    assert [registry.load(own).__name__ for own in registry.models] == list(registry.models)
    for name in PROCESS_FUNCTIONS:
        assert getattr(registry.module(), name)(None) == name


@pytest.mark.parametrize("stage", ["BagelPipeline", READER])
def test_ffns_compute_what_ours_do(registry: Registry, checkpoint: Path, stage: str) -> None:
    plugin().load()()
    config = config_of(checkpoint)
    options = {"od_config": config}
    if stage == READER:
        options = {"vllm_config": SimpleNamespace(model_config=config)}
    pipeline = registry.load(stage)(**options)
    loaded = pipeline.load_weights(read(checkpoint).items())
    assert loaded == {name for name, _ in pipeline.named_parameters()}
    ours = BagelPipeline.from_pretrained(checkpoint).model.language_model.model.layers
    x = torch.randn(7, ours[0].mlp.gate_proj.weight.shape[1])
    for layer, own in zip(pipeline.transformer.layers, ours, strict=True):
        sparse = isinstance(own.mlp_moe_gen, SparseMoE)
        assert isinstance(layer.mlp_moe_gen, SparseMoE) == sparse
        with torch.no_grad():
            out, expected = layer.mlp_moe_gen(x), own.mlp_moe_gen(x)
            torch.testing.assert_close(layer.mlp(x), own.mlp(x))
        assert isinstance(out, Tensor)
        torch.testing.assert_close(out, expected[0] if sparse else expected)


def test_weights_that_do_not_fit_are_refused(registry: Registry, sparse: Path) -> None:
    plugin().load()()
    weights = read(sparse)
    key = f"language_model.model.layers.{SPARSE_LAYER}.mlp_moe_gen.experts.0.up_proj.weight"

    def load(changed: dict[str, Tensor]) -> None:
        registry.load()(od_config=config_of(sparse)).load_weights(changed.items())

    with pytest.raises(ValueError, match=rf"must hold layers\.{SPARSE_LAYER}\.experts\.0\.up_proj"):
        load({name: tensor for name, tensor in weights.items() if name != key})
    with pytest.raises(ValueError, match=r"up_proj\.weight must be \[\d+, \d+\], got \[1, \d+\]"):
        load(weights | {key: weights[key][:1]})
    with pytest.raises(
        ValueError, match=r"experts\.99\.up_proj\.weight must be a tensor of a sparse block"
    ):
        load(weights | {key.replace("experts.0", "experts.99"): weights[key]})


@pytest.mark.parametrize("processes", [2, 4])
def test_a_group_of_processes_divides_whole_experts(
    registry: Registry, sparse: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    plugin().load()()
    whole = BagelPipeline.from_pretrained(sparse).model.language_model.model.layers[SPARSE_LAYER]
    x = torch.randn(2, 9, whole.mlp.gate_proj.weight.shape[1])
    monkeypatch.setattr(BuiltIn, "split", processes)
    outputs, sizes = [], set()
    for rank in range(processes):
        monkeypatch.setattr(BuiltIn, "rank", rank)
        pipeline = registry.load()(od_config=config_of(sparse))
        loaded = pipeline.load_weights(read(sparse).items())
        assert loaded == {name for name, _ in pipeline.named_parameters()}
        share = pipeline.transformer.layers[SPARSE_LAYER].mlp_moe_gen
        sizes.add(tuple(share.block.gate_proj.shape))
        with torch.no_grad():
            outputs.append(share(x))
    neurons, hidden = whole.mlp_moe_gen.gate_proj.shape
    assert sizes == {(neurons // processes, hidden)}
    with torch.no_grad():
        torch.testing.assert_close(sum(outputs), whole.mlp_moe_gen(x)[0])


def test_a_group_that_cannot_divide_the_experts_is_refused(
    registry: Registry, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin().load()()
    experts = BagelPipeline.from_pretrained(sparse).model.language_model.model.layers[SPARSE_LAYER]
    monkeypatch.setattr(BuiltIn, "split", 2 * experts.mlp_moe_gen.num_experts)
    with pytest.raises(ValueError, match=rf"layer {SPARSE_LAYER}: tensor_parallel_size must"):
        registry.load()(od_config=config_of(sparse))
    monkeypatch.setattr(BuiltIn, "split", 2)
    monkeypatch.setattr(SparseMoE, "active_backend", "torch: no kernel")
    with pytest.raises(ValueError, match=r"run on our kernels, got torch: no kernel"):
        registry.load()(od_config=config_of(sparse))


def test_experts_by_time_are_refused(registry: Registry, golden: Any, tmp_path: Path) -> None:
    plugin().load()()
    out = tmp_path / "timed"
    convert(golden("t2i_dense"), out, num_experts=4, top_k=2, time_router=True)
    rule = "must have sparse gen FFNs without gate_time and be dense otherwise, got gate_time"
    with pytest.raises(ValueError, match=rule):
        registry.load()(od_config=config_of(out))


def test_without_vllm_omni_the_plugin_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    refused("register_diffusion_model must be there", lambda: plugin().load()(), error=ImportError)


@pytest.fixture(scope="module")
def source() -> Path:
    """The source of vLLM-Omni: a checkout, or the wheels."""
    return Path(os.environ["VLLM_OMNI_REPO"]) if "VLLM_OMNI_REPO" in os.environ else find_wheels()


def find_wheels() -> Path:
    wheels = ROOT / "build" / "vllm_omni"
    if not wheels.exists():
        pytest.skip("the wheels of vLLM and vLLM-Omni are not there: make build/vllm_omni")
    return wheels


def test_no_more_is_keyed_by_the_name_of_the_pipeline_than_is_known(source: Path) -> None:
    """Tables of vLLM-Omni that hold BAGEL's pipeline by its name, which ours has too."""
    tables = {
        ast.unparse(target)
        for path in (source / "vllm_omni").rglob("*.py")
        if "BagelPipeline" in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and isinstance(node.value, (ast.Dict, ast.Set, ast.List, ast.Tuple))
        for key in getattr(node.value, "keys", getattr(node.value, "elts", ()))
        if isinstance(key, ast.Constant) and key.value == "BagelPipeline"
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    assert tables == {
        "CUSTOM_TEACACHE_ENABLERS",
        "_DIFFUSION_MODELS",
        "_DIFFUSION_POST_PROCESS_FUNCS",
        "_DIFFUSION_PRE_PROCESS_FUNCS",
        "_EXTRA_SPECS",  # arguments of requests
    }


def parse(repository: Path, name: str) -> ast.Module:
    return ast.parse((repository / f"{name.replace('.', '/')}.py").read_text())


def defined(tree: ast.AST, name: str) -> Any:
    kinds = (ast.ClassDef, ast.FunctionDef)
    [found] = [n for n in ast.iter_child_nodes(tree) if isinstance(n, kinds) and n.name == name]
    return found


def arguments(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]


def test_the_stand_in_is_like_the_source(source: Path) -> None:
    def mine(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    registry = parse(source, "vllm_omni.diffusion.registry")
    ours = mine(Registry.register_diffusion_model)[1:]
    assert arguments(defined(registry, "register_diffusion_model"))[: len(ours)] == ours
    pipeline, layers = parse(source, BUILT_IN), "vllm_omni.diffusion.models.bagel.bagel_transformer"
    for name in PROCESS_FUNCTIONS:
        assert arguments(defined(pipeline, name)) == ["od_config"]
    bagel, reader = defined(pipeline, "BagelPipeline"), defined(parse(source, READS), READER)
    for name in ("__init__", "load_weights"):
        assert arguments(defined(bagel, name)) == mine(getattr(BuiltIn, name))
    assert arguments(defined(reader, "__init__")) == mine(Reader.__init__)
    assert arguments(defined(reader, "load_weights")) == ["self", "weights"]
    download = "download_weights_from_hf_specific(model, od_config.revision, ['*'])"
    for tree, texts in (
        (bagel, ("self.language_model = ", "self.device = ", download)),
        (reader, ("self.device = ", "layer.mlp_moe_gen = Qwen2MLP(")),
        (parse(source, "vllm_omni.model_executor.models.registry"), (f"'{READER}': (",)),
        (defined(parse(source, layers), "BagelMLP"), ("self.gate_up_proj = ", "self.down_proj = ")),
        (parse(source, "vllm_omni.plugins.__init__"), (f"OMNI_DEFAULT_PLUGINS_GROUP = '{GROUP}'",)),
    ):
        assert [text for text in texts if text not in ast.unparse(tree)] == []


# Rounded to bf16 in every layer, and summed in another order by two processes.
TOLERANCE = 0.01


@pytest.mark.slow
def test_blocks_run_in_the_decoder_of_the_wheel(sparse: Path, tmp_path: Path) -> None:
    outputs, held = {}, {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        words = [ROOT / "tests" / "vllm_omni_decoder.py", find_wheels(), sparse, out]
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, words), str(rank), str(processes)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        errors = [process.communicate(timeout=500)[1] for process in started]
        assert [process.returncode for process in started] == [0] * processes, errors
        made = json.loads(out.read_text())
        assert made["missing"] == []
        outputs[processes], held[processes] = torch.tensor(made["out"]), made["held"]
        if processes == 1:
            outputs[0] = torch.tensor(made["oracle"])
            by_name = made
    neurons, hidden = held[1][str(SPARSE_LAYER)]
    assert held[2] == {str(SPARSE_LAYER): [neurons // 2, hidden]}
    for processes in (1, 2):
        error = (outputs[processes] - outputs[0]).norm() / outputs[0].norm()
        assert error < TOLERANCE, processes
    # What the engine finds by the name of the pipeline, and by what its classes declare.
    engine = "sparse_unified.engines"
    assert by_name["registered"] == [
        f"{engine}.vllm_omni.BagelPipeline",
        f"{engine}.vllm_omni_reader.{READER}",
    ]
    layers = [f"layers.{layer}" for layer in range(3)]
    assert by_name["offloaded"] == by_name["sharded"] == layers
    assert by_name["hooked"]  # by TeaCache
    cached = torch.tensor(by_name["cached"])  # by cache-dit, after four steps
    assert by_name["ran"][:4] == [1, 2, 3, 4]
    assert by_name["ran"][-1] < len(cached)
    assert torch.equal(cached[3], outputs[1])
    assert (cached[-1] - outputs[1]).norm() / outputs[1].norm() < TOLERANCE
