# SPDX-License-Identifier: Apache-2.0
"""Small models with the structure of the official ones and of engines, for tests of surgery."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

HIDDEN, WIDTH, LAYERS = 8, 24, 4


class TensorMLP(nn.Module):
    """A FFN as in BAGEL: returns a tensor."""

    def __init__(self, hidden: int = HIDDEN, width: int = WIDTH, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn: Any = nn.SiLU()

    def forward(self, hidden_state: Tensor) -> Any:
        gate = self.act_fn(self.gate_proj(hidden_state))
        return self.down_proj(gate * self.up_proj(hidden_state))


class TupleMLP(TensorMLP):
    """A FFN as in SparseUnifiedModel: takes token indices, returns a tuple, may count calls."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("act_cnt", torch.tensor(0))

    def forward(
        self,
        hidden_state: Tensor,
        packed_text_indexes: Tensor | None = None,
        packed_vit_token_indexes: Tensor | None = None,
    ) -> Any:
        self.act_cnt += 1
        return super().forward(hidden_state), None


class MarkedParameter(nn.Parameter):
    """A weight as serving engines mark it: a subclass of Parameter with a loader."""

    weight_loader: Any = None


class EngineLinear(nn.Module):
    """A linear layer as in vLLM: returns (y, bias to be added later)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = MarkedParameter(torch.randn(outputs, inputs) / 4, requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class MergedMLP(nn.Module):
    """gate_proj and up_proj in one nn.Linear."""

    linear: Any = functools.partial(nn.Linear, bias=False)

    def __init__(self, hidden: int = HIDDEN, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_up_proj = self.linear(hidden, 2 * width)
        self.down_proj = self.linear(width, hidden)

    def forward(self, x: Tensor) -> Any:
        gate, up = alone(self.gate_up_proj(x)).chunk(2, dim=-1)
        return alone(self.down_proj(F.silu(gate) * up))


def alone(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class EngineMLP(MergedMLP):
    """Merged, of an engine's linears."""

    linear = EngineLinear


class SplitEngineMLP(nn.Module):
    """Three projections of an engine's linears, as in vLLM-Omni's BAGEL."""

    def __init__(self, hidden: int = HIDDEN, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_proj = EngineLinear(hidden, width)
        self.up_proj = EngineLinear(hidden, width)
        self.down_proj = EngineLinear(width, hidden)

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(F.silu(self.gate_proj(x)[0]) * self.up_proj(x)[0])[0]


class MergedTupleMLP(MergedMLP):
    def forward(self, x: Tensor, packed_text_indexes: Any = None, **_: Any) -> Any:
        return super().forward(x), None


class Layer(nn.Module):
    def __init__(self, mlp: type[TensorMLP]) -> None:
        super().__init__()
        self.mlp = mlp()
        self.mlp_moe_gen = mlp()

    def forward(self, und: Tensor, gen: Tensor) -> tuple[Tensor, Tensor]:
        return und + self.mlp(und), gen + self.mlp_moe_gen(gen)


class TupleLayer(Layer):
    def forward(self, und: Tensor, gen: Tensor) -> tuple[Tensor, Tensor]:
        text = torch.arange(0, len(und), 2)
        und_mixed, _ = self.mlp(
            und, packed_text_indexes=text, packed_vit_token_indexes=torch.arange(1, len(und), 2)
        )
        gen_mixed, _ = self.mlp_moe_gen(gen)
        return und + und_mixed, gen + gen_mixed


class Bare(nn.Module):
    """A module with the children it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Model(nn.Module):
    """`language_model.model.layers`, as in the official code."""

    def __init__(self, mlp: type[TensorMLP] = TensorMLP, num_layers: int = LAYERS) -> None:
        super().__init__()
        layer = TupleLayer if mlp is TupleMLP else Layer
        layers = nn.ModuleList(layer(mlp) for _ in range(num_layers))
        self.language_model = Bare(model=Bare(layers=layers))

    @property
    def layers(self) -> Any:
        return self.language_model.model.layers

    def forward(self, und: Tensor, gen: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            und, gen = layer(und, gen)
        return und, gen


def foreign_model(mlp: Any, *sizes: int, layers: int = LAYERS) -> Model:
    """Returns a model with FFNs of another make; those that return tuples have layers to match."""
    is_tuple = mlp in (TupleMLP, MergedTupleMLP)
    model = Model(TupleMLP if is_tuple else TensorMLP, layers)
    for layer in model.layers:
        layer.mlp, layer.mlp_moe_gen = mlp(*sizes), mlp(*sizes)
    return model


def ffn(model: Model, layer: int, component: str = "gen") -> Any:
    return getattr(model.layers[layer], "mlp_moe_gen" if component == "gen" else "mlp")


def tokens(count: int = 5, hidden: int = HIDDEN, seed: int = 1) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a swap might touch: modules, parameters, values, modes, hooks, attributes."""
    return {
        "modules": dict(model.named_modules(remove_duplicate=False)),
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "attributes": {
            n: {k: dict(v) if isinstance(v, OrderedDict) else v for k, v in vars(m).items()}
            for n, m in model.named_modules()
        },
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"].keys() == after["modules"].keys()
    assert all(after["modules"][n] is m for n, m in before["modules"].items())
    assert before["parameters"] == after["parameters"]
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert value.dtype == after["values"][name].dtype
        assert value.is_meta or torch.equal(value, after["values"][name]), name
    for name, attributes in before["attributes"].items():
        assert attributes.keys() == after["attributes"][name].keys(), name
        for key in ("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            assert attributes[key] == after["attributes"][name][key], (name, key)
    assert torch.equal(before["random"], after["random"])


def drop_counts(state: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the call counters, which the forward passes of a test itself move."""
    values = {n: v for n, v in state["values"].items() if not n.endswith("act_cnt")}
    return state | {"values": values}


class RecordingHook(ModelHook):
    """Notes the calls of the module it is put on."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(f"pre {type(module).__name__}")
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls.append(f"post {type(module).__name__}")
        return output


def attach_hook(module: Any) -> RecordingHook:
    add_hook_to_module(module, RecordingHook())
    return module._hf_hook
