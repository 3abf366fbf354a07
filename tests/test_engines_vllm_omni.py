# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's BAGEL takes sparse checkpoints, through its own registry of models.

vLLM-Omni needs vLLM and a GPU, so a stand-in with the same names and signatures takes its place.
With the environment variable VLLM_OMNI_REPO, which names a checkout or an unpacked wheel, the
stand-in is compared with the source.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_unified.bagel import BagelPipeline
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.nn import SparseMoE

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
GROUP = "vllm_omni.general_plugins"
SPARSE_LAYER = 1


class Linear(nn.Module):
    """As vLLM's linear layers: returns the output and a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((outputs, inputs), torch.nan))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


class BagelMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)[0]


class Part(nn.Module):
    """A module with the children it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class BuiltIn(nn.Module):
    """As vLLM-Omni's BagelPipeline, of whose weights those of the FFNs are enough here."""

    split = 1  # devices over which FFNs are split

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = json.loads((Path(od_config.model) / "llm_config.json").read_text())
        hidden, width = config["hidden_size"], config["intermediate_size"] // self.split
        self.device = torch.device("cpu")
        layers = nn.ModuleList(
            Part(mlp=BagelMLP(hidden, width), mlp_moe_gen=BagelMLP(hidden, width))
            for _ in range(config["num_hidden_layers"])
        )
        self.language_model = Part(model=Part(layers=layers))
        self.transformer = self.language_model.model

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            merged = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
            if merged not in own:
                continue
            half = {".gate_proj.": slice(len(tensor)), ".up_proj.": slice(len(tensor), None)}
            rows = [part for text, part in half.items() if text in name] or [slice(None)]
            own[merged].data[rows[0]] = tensor
            loaded.add(merged)
        return loaded


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

    def module(self) -> ModuleType:
        return importlib.import_module(self.models["BagelPipeline"][0])

    def load(self) -> Any:
        return getattr(self.module(), self.models["BagelPipeline"][1])


BUILT_IN = "vllm_omni.diffusion.models.bagel.pipeline_bagel"
PROCESS_FUNCTIONS = ("get_bagel_post_process_func", "get_bagel_pre_process_func")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    made = Registry()
    built_in = ModuleType(BUILT_IN)
    built_in.BagelPipeline = BuiltIn  # type: ignore[attr-defined]
    for name in PROCESS_FUNCTIONS:
        setattr(built_in, name, lambda od_config, name=name: name)
    names = [BUILT_IN.rsplit(".", count)[0] for count in range(4, 0, -1)]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("vllm_omni.diffusion.registry")
    module.register_diffusion_model = made.register_diffusion_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, BUILT_IN, built_in)
    yield made
    sys.modules.pop("sparse_unified.engines.vllm_omni", None)


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
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(GOLDEN / request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(GOLDEN / "t2i_moe", tmp_path_factory.mktemp("sparse"))


def test_the_plugin_puts_its_pipeline_in_the_place_of_the_built_in_one(registry: Registry) -> None:
    register = plugin().load()
    register()
    register()  # every process loads plugins, some more than once
    assert issubclass(registry.load(), BuiltIn)
    for name in PROCESS_FUNCTIONS:
        assert getattr(registry.module(), name)(None) == name


def test_ffns_compute_what_ours_do(registry: Registry, checkpoint: Path) -> None:
    plugin().load()()
    pipeline = registry.load()(od_config=config_of(checkpoint))
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
    with pytest.raises(ValueError, match=r"experts\.99\.up_proj\.weight must be no such tensor"):
        load(weights | {key.replace("experts.0", "experts.99"): weights[key]})


def test_ffns_split_over_devices_are_refused(
    registry: Registry, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin().load()()
    monkeypatch.setattr(BuiltIn, "split", 2)
    with pytest.raises(ValueError, match=rf"layer {SPARSE_LAYER}: down_proj.* split over devices"):
        registry.load()(od_config=config_of(sparse))


def test_without_vllm_omni_the_plugin_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    with pytest.raises(ImportError, match="register_diffusion_model must be there"):
        plugin().load()()


def parse(repository: Path, name: str) -> ast.Module:
    return ast.parse((repository / f"{name.replace('.', '/')}.py").read_text())


def defined(tree: ast.AST, name: str) -> Any:
    kinds = (ast.ClassDef, ast.FunctionDef)
    [found] = [n for n in ast.iter_child_nodes(tree) if isinstance(n, kinds) and n.name == name]
    return found


def arguments(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]


def test_the_stand_in_is_like_the_source() -> None:
    if "VLLM_OMNI_REPO" not in os.environ:
        pytest.skip("VLLM_OMNI_REPO names no checkout")
    repository = Path(os.environ["VLLM_OMNI_REPO"])
    registry = parse(repository, "vllm_omni.diffusion.registry")
    theirs = arguments(defined(registry, "register_diffusion_model"))
    ours = list(inspect.signature(Registry.register_diffusion_model).parameters)[1:]
    assert theirs[: len(ours)] == ours
    pipeline = parse(repository, BUILT_IN)
    for name in PROCESS_FUNCTIONS:
        assert arguments(defined(pipeline, name)) == ["od_config"]
    bagel = defined(pipeline, "BagelPipeline")
    for name in ("__init__", "load_weights"):
        mine = list(inspect.signature(getattr(BuiltIn, name)).parameters)
        assert arguments(defined(bagel, name)) == mine
    source = ast.unparse(bagel)
    assert "self.language_model = " in source
    assert "self.device = " in source
    assert "download_weights_from_hf_specific(model, od_config.revision, ['*'])" in source
    layer = ast.unparse(
        defined(parse(repository, "vllm_omni.diffusion.models.bagel.bagel_transformer"), "BagelMLP")
    )
    assert "self.gate_up_proj = " in layer
    assert "self.down_proj = " in layer
    assert (
        f'OMNI_DEFAULT_PLUGINS_GROUP = "{GROUP}"'
        in (repository / "vllm_omni" / "plugins" / "__init__.py").read_text()
    )
