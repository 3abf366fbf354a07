# SPDX-License-Identifier: Apache-2.0
"""The denoising step as one graph: compiled, recorded and replayed, without the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bagel_models import draw
from moe_cases import GOLDEN
from refusals import refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_unified import MoEConfig, apply_moe_
from sparse_unified.bagel import Bagel, BagelPipeline, Execution, StepCache
from sparse_unified.bagel.execution import ReplayedStep
from sparse_unified.bagel.model import Denoiser
from sparse_unified.nn import SparseMoE
from sparse_unified.testing import build_model, read_case

MODELS = ("t2i_dense", "t2i_moe")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Bagel:
    return build_model(read_case(GOLDEN / request.param))


def test_the_step_compiles_as_one_graph_whatever_the_length_of_the_prompt() -> None:
    model = one_layer("t2i_moe")  # which has dense FFNs too
    graphs: list[int] = []
    compiler = torch._dynamo.lookup_backend("aot_eager")

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return compiler(graph, inputs)

    compiled = Execution(compile=True, backend=counted)
    for prompt in ([21, 30], [33, 40, 41, 42], [50, 51, 52, 53, 54, 55, 56]):
        [own], [expected] = (draw(model, [prompt], run=run) for run in (compiled, None))
        assert torch.equal(own, expected)
    assert len(graphs) == 2  # with guidance and without


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: what is called, on which tensors, and where the results lie."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for own, other in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(other)
                else:
                    assert own == other, f"{function} asked the device for {own}"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """CUDA graphs, on the CPU. Like a capture, recording computes nothing that can be used."""
    counts: Counter[str] = Counter()

    def warm_up(step: Any) -> list[Tensor]:
        counts["warmed"] += 1
        return step._run()

    def record(step: Any) -> tuple[Callable[[], object], list[Tensor]]:
        with Recording() as recording:
            results = step._run()
        for result in results:
            result.fill_(torch.nan)

        def replay() -> None:
            counts["replays"] += 1
            recording.replay()

        return replay, results

    monkeypatch.setattr(ReplayedStep, "_warm_up", warm_up)
    monkeypatch.setattr(ReplayedStep, "_record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Execution, "check", lambda *_: None)
    return counts


@pytest.mark.parametrize("cache", [None, StepCache(interval=2, order=1, first=2)])
def test_images_of_replayed_steps_are_those_of_plain_ones(
    model: Bagel, emulated: Counter[str], cache: StepCache | None
) -> None:
    prompts = [[21, 30], [33]]
    replayed = draw(model, prompts, run=Execution(cuda_graphs=True), cache=cache)
    for own, expected in zip(replayed, draw(model, prompts, cache=cache), strict=True):
        assert torch.equal(own, expected)
    assert emulated["warmed"] == 2  # with guidance and without
    assert emulated["replays"] > 0


WAYS: dict[str, dict[str, Any]] = {
    "cuda_graphs": {"cuda_graphs": True},
    "compile": {"compile": True, "backend": "eager"},
    "plain": {},
}
by_way = pytest.mark.parametrize("way", WAYS)


def one_layer(case: str) -> Bagel:
    """The layer that is sparse in a sparse model alone: tracing takes its time by the layer."""
    torch.compiler.reset()
    model = build_model(read_case(GOLDEN / case))
    model.language_model.model.layers = model.language_model.model.layers[1:2]
    return model


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("cache", [None, StepCache(interval=3, order=1, first=1)])
@by_way
def test_experts_change_with_time_however_steps_are_run(cache: StepCache | None, way: str) -> None:
    model = one_layer("t2i_moe")
    [block] = [own for own in model.modules() if isinstance(own, SparseMoE)]
    own, seen = block.top_k, []
    options: dict[str, Any] = {"num_timesteps": 9, "timestep_shift": 1.0, "cache": cache}
    execution = Execution(**WAYS[way])

    # Times 1, 0.875, ... 0.125; from 0.75 on one expert, from 0.5 on all four.
    schedule = ((0.75, 1), (0.5, 4))
    [found] = draw(model, [[21, 30]], run=execution, top_k=schedule, **options)
    assert block.top_k == own
    block.register_forward_pre_hook(lambda module, _: seen.append(module.top_k))
    [expected] = draw(model, [[21, 30]], top_k=schedule, **options)
    assert torch.equal(found, expected)
    every = [own, own, 1, 1, 4, 4, 4, 4]
    assert seen == (every if cache is None else [every[step] for step in (0, 2, 3, 4, 6, 7)])


def test_experts_that_are_not_there_are_refused(model: Bagel) -> None:
    blocks = [own for own in model.modules() if isinstance(own, SparseMoE)]
    rule = "must be from 1 to the 4 routed experts, got 5" if blocks else "must be left out"
    refused(f"sample_latents: top_k {rule}", draw, model, [[21]], top_k=((1.0, 1), (0.1, 5)))
    refused("top_k must be an integer of at least 1, got 0", draw, model, [[21]], top_k=0)
    refused("top_k must be an integer", draw, model, [[21]], top_k=0.5, error=TypeError)
    refused("t of top_k must descend", draw, model, [[21]], top_k=((0.5, 1), (0.5, 2)))


class OnOneDevice(TorchDispatchMode):
    """Fails at anything that reads a value, or whose tensors are elsewhere."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == self.device, f"{function} used the {leaf.device}"
        self.calls += 1
        return result


def test_a_step_makes_nothing_on_the_host(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: whatever the host took part in would be on the CPU."""
    # There, as on a GPU, the ops of the library run: their fakes.
    monkeypatch.setattr(SparseMoE, "_choose", lambda own, weight, _: (weight.dtype, "cuda"))
    away = Bagel(model.config, device="meta")
    contexts = away.new_contexts(2)
    away.prefill_text(contexts[:1], [[21, 30]])
    denoiser = Denoiser(away, [(2, 3)], [contexts])
    x, time = torch.empty(6, 16, device="meta"), torch.empty(1, device="meta")
    with OnOneDevice("meta") as mode:
        denoiser([x], time)
    assert mode.calls > 100
    with pytest.raises(AssertionError, match="used the cpu"), OnOneDevice("meta"):
        denoiser([x], torch.empty(1))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "nvfp4"])
def test_packed_weights_compile_as_one_graph(golden: Any, storage: str) -> None:
    pytest.importorskip("torchao")
    torch.compiler.reset()
    model = BagelPipeline.from_pretrained(golden("t2i_moe"), storage=storage).model
    runs = (Execution(compile=True, backend="eager"), None)
    [own], [expected] = (draw(model, [[21, 30]], run=run, num_timesteps=2) for run in runs)
    torch.testing.assert_close(own, expected)


def test_a_pipeline_runs_as_it_is_told(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Execution] = []
    monkeypatch.setattr(Execution, "start", lambda self, step: started.append(self) or step)
    options: dict[str, Any] = {"seed": 1, "num_timesteps": 3, "size": (32, 48), "progress": False}
    pipeline = BagelPipeline.from_pretrained(golden("t2i_moe"), compile="default")
    pipeline.generate("a cup", **options)
    pipeline.execution = Execution()
    pipeline.generate("a cup", **options)
    assert [own.compile for own in started] == ["default", False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "fast"}, "Execution: compile must be True, False or one of default, "),
        ({"compile": "max-autotune", "cuda_graphs": True}, "False with compile='max-autotune'"),
        ({"cuda_graphs": True}, "cuda_graphs must be False for a model on cpu"),
        ({"compile": True, "offload": "und"}, "without device_map and offload, got device_map=N"),
        ({"compile": True, "device_map": "auto"}, "must come without device_map and offload"),
    ],
)
def test_what_cannot_be_run_so_is_refused_before_anything_is_read(
    options: dict[str, Any], message: str
) -> None:
    refused(message, BagelPipeline.from_pretrained, "/nowhere", **options)


def test_weights_elsewhere_are_refused(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.language_model.model.layers[0]
    monkeypatch.setattr(layer, "_hf_hook", object(), raising=False)
    rule = "got weights on places that accelerate manages"
    refused(rule, draw, model, [[21]], run=Execution(**WAYS["compile"]))


@pytest.mark.usefixtures("emulated")
@by_way
def test_a_recorded_step_chooses_experts_by_the_time_of_each_call(way: str) -> None:
    model = one_layer("t2i_dense")
    apply_moe_(model, MoEConfig(num_experts=4, top_k=1, layers="all", time_router=True))
    block: Any = model.language_model.model.layers[0].mlp_moe_gen
    block.gate_time.weight.data.copy_(torch.eye(8)[:4] + torch.eye(8)[4:])
    found = draw(model, [[21, 30], [33]], run=Execution(**WAYS[way]))
    seen: list[int] = []

    def note(module: Any, given: Any, named: Any) -> None:
        seen.append(int(module.route(*given, **named)[2][0]))

    block.register_forward_pre_hook(note, with_kwargs=True)
    expected = draw(model, [[21, 30], [33]])
    assert all(map(torch.equal, found, expected))
    assert len(set(seen)) == 4  # at some time or other
