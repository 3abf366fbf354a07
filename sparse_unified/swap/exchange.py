# SPDX-License-Identifier: Apache-2.0
"""One module for another in a live model, and what is remembered to undo it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_unified.nn import SparseMoE
from sparse_unified.swap.find import Target
from sparse_unified.swap.hooks import move_hooks

# NOTE: kept in the instance dict, inside a dataclass, so that the dense FFN is no submodule: it has
# no part in state dicts, optimisers, `.to()` or `.train()`, but in deepcopy and pickle.
_STATE = "_replaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """What a block stands for: the dense FFN itself, or None where it was not kept."""

    type_name: str
    dense: nn.Module | None


def replaced_by(module: nn.Module) -> Replaced | None:
    """Returns what `module` has replaced, None when it was not swapped in."""
    state = module.__dict__.get(_STATE)
    return state if isinstance(state, Replaced) else None


def dense_weight(dense: nn.Module) -> Tensor:
    """Returns one weight of a dense FFN, which tells where and what all three are."""
    weight = dense.get_submodule("gate_proj").weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def all_or_nothing(pairs: Sequence[tuple[Target, nn.Module]]) -> Iterator[None]:
    """Inside, the FFN of each target is replaced by the module beside it.

    Whatever is raised there, an interrupt included, leaves every FFN in its place with its hooks.
    """
    # NOTE: attributes are moved between modules, never changed: the hook dicts go as objects.
    modules = [module for target, new in pairs for module in (target.ffn, new)]
    saved = [(module, dict(module.__dict__)) for module in modules]
    try:
        yield
    except BaseException:
        for module, attributes in saved:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for target, _ in pairs:
            setattr(target.owner, target.name, target.ffn)
        raise


def put_in(target: Target, block: SparseMoE, *, keep_dense: bool) -> None:
    """Replaces a dense FFN by a block, which takes over its hooks."""
    dense = target.ffn
    block.__dict__[_STATE] = Replaced(
        type_name=type(dense).__name__, dense=dense if keep_dense else None
    )
    setattr(target.owner, target.name, block)
    move_hooks(dense, block)


def follow(dense: nn.Module, block: SparseMoE) -> None:
    """Moves a kept FFN to the device, dtype and mode that its block has come to have."""
    kept, now = dense_weight(dense), block.gate_proj
    if (kept.device, kept.dtype) != (now.device, now.dtype):
        dense.to(device=now.device, dtype=now.dtype)
    if dense.training != block.training:
        dense.train(block.training)


def put_back(target: Target, dense: nn.Module) -> None:
    """Replaces a block by the dense FFN it stands for, which takes its hooks back."""
    setattr(target.owner, target.name, dense)
    move_hooks(target.ffn, dense)
