# SPDX-License-Identifier: Apache-2.0
"""Batches that another process prepares: the same ones, its errors, and its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from sparse_unified.adapt import Trainer, TrainingConfig, ahead
from sparse_unified.adapt.ahead import can_help, prepared_ahead
from sparse_unified.bagel import Segment
from tests.adapt_models import CONFIG, Mixed, bagel


@pytest.fixture(autouse=True)
def _an_idle_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not can_help():
        pytest.skip("needs two cores, and a system that forks")
    yield
    torch.set_num_threads(threads)


def losses(*, in_advance: bool, first: int = 0) -> list[float]:
    model = bagel()
    own = Trainer(model, Mixed(model), TrainingConfig(**CONFIG), ahead=in_advance)
    for _ in range(first):
        own.step()
    found: list[float] = []
    own.run(lambda record: found.append(record.loss))
    return found


def test_a_run_is_the_same_bit_for_bit() -> None:
    alone = losses(in_advance=False)
    assert len(alone) > 2
    assert losses(in_advance=True) == alone
    assert losses(in_advance=True, first=2) == alone[2:]
    assert not multiprocessing.active_children()


def tensors(step: int) -> list[Tensor]:
    return [
        torch.arange(step + 5)[::2],
        torch.tensor(step % 2 == 0),
        torch.empty(0, 3),
        torch.full((3, 40), step / 3, dtype=torch.float64).T,
    ]


@pytest.mark.parametrize("shared", [1 << 20, 1000, 1])
def test_tensors_arrive_as_they_were_wherever_they_fit(
    monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    monkeypatch.setattr(ahead, "_SHARED_BYTES", shared)
    with prepared_ahead(tensors, 3, 12) as receive:
        for step in range(3, 12):
            for found, wanted in zip(receive(), tensors(step), strict=True):
                assert found.dtype == wanted.dtype
                assert torch.equal(found, wanted)


class Broken(Mixed):
    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        raise ValueError(f"Broken: record {index} must be readable, got rubbish")


def test_an_error_of_the_data_is_raised_as_it_is() -> None:
    model = bagel()
    own = Trainer(model, Broken(model), TrainingConfig(**CONFIG), ahead=True)
    with pytest.raises(ValueError, match=r"record \d must be readable, got rubbish"):
        own.run()
    assert not multiprocessing.active_children()


def test_what_was_prepared_before_an_error_arrives() -> None:
    def prepare(step: int) -> Tensor:
        if step == 6:
            raise ValueError("step 6 must be there, got none")
        return torch.tensor(step)

    with prepared_ahead(prepare, 0, 9) as receive:
        assert [int(receive()) for _ in range(6)] == [*range(6)]
        with pytest.raises(ValueError, match="step 6 must be there"):
            receive()


def test_the_end_of_the_other_process_is_an_error() -> None:
    def prepare(step: int) -> Tensor:
        if step == ahead._STEPS_AT_ONCE:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(step)

    with prepared_ahead(prepare, 0, 9) as receive:
        assert [int(receive()) for _ in range(ahead._STEPS_AT_ONCE)] == [0, 1, 2, 3]
        with pytest.raises(RuntimeError, match="must live until the last step, got its end"):
            receive()
