# SPDX-License-Identifier: Apache-2.0
"""What an analysis sees of a model: its FFNs, its blocks, and the adapter that finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

# Of the scores and statistics of one FFN: its layer, or (layer, name) for one of several there.
FfnKey = int | tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """One SwiGLU FFN: that of a layer, or one expert inside its mixture.

    Attributes:
        component, layer: where it belongs.
        name: dotted path of the module, from the object the adapter was made for.
        module: what a forward hook observes; its first argument is x [..., D]. Of an expert of a
            `SparseMoE` that is the whole block, which gets more tokens than the expert.
        gate_proj, up_proj: [I, D], the live weights.
        down_proj: [D, I], the live weight.
        is_expert: one of several FFNs of its layer.
    """

    component: str
    layer: int
    name: str
    module: nn.Module
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    is_expert: bool = False

    @property
    def key(self) -> FfnKey:
        """Under which scores and statistics of this FFN are kept."""
        return (self.layer, self.name) if self.is_expert else self.layer

    @property
    def intermediate_size(self) -> int:
        """I, neurons."""
        return self.gate_proj.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The modules of one layer of one component between which the residual stream can be seen.

    x1 = x + attention(input_norm(x)), then y = x1 + ffn(post_attention_norm(x1)): the input of the
    first norm is x, that of the second x1, and y is x1 plus the output of `ffn`.

    Attributes:
        layer_module: the whole layer, of all components.
        attention: may be shared between components.
        ffn: dense, or a mixture of experts.
    """

    component: str
    layer: int
    layer_module: nn.Module
    input_norm: nn.Module
    attention: nn.Module
    post_attention_norm: nn.Module
    ffn: nn.Module


@runtime_checkable
class Adapter(Protocol):
    """What the analysis asks of a model."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that are probed one by one."""

    def num_layers(self) -> int:
        """Returns the number of decoder layers."""

    def holds(self, layer: int, component: str) -> bool:
        """Tells whether a layer has all of its modules; a part that was skipped is gone."""

    def ffns(self, component: str) -> list[Ffn]:
        """Returns the FFNs of a component, layer by layer; of a mixture every expert.

        Layers that skip theirs are left out.

        Raises:
            ValueError: the model lacks the component, or an FFN is not three plain weights.
        """

    def block(self, layer: int, component: str) -> Block:
        """Returns the modules of one layer.

        Raises:
            ValueError: the model lacks the layer, the component or one of the modules.
        """
