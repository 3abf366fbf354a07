# SPDX-License-Identifier: Apache-2.0
"""The trainer in memory: what a step computes, what it trains, and that runs repeat and resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import CONFIG, FRESH, Mixed, bagel, losses, trainer
from refusals import refused
from torch import nn

from sparse_unified.adapt import RunConfig, SequenceConfig, Trainer, TrainingConfig, freeze
from sparse_unified.adapt.data import data_index, sequence_generator
from sparse_unified.adapt.run import judge_routers
from sparse_unified.adapt.trainer import StepRecord
from sparse_unified.bagel import Segment, pack_training, training_forward
from sparse_unified.bagel.model import distillation_loss, router_losses
from sparse_unified.bagel.packing import TextSegment
from sparse_unified.nn import SparseMoE, SwiGLU

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (TrainingConfig, "steps", 0),
        (TrainingConfig, "batch_size", 2.0),
        (TrainingConfig, "micro_batch_size", 3),
        (TrainingConfig, "learning_rate", -1.0),
        (TrainingConfig, "betas", (0.9, 1.0)),
        (TrainingConfig, "schedule", "linear"),
        (TrainingConfig, "ema_decay", 1.5),
        (TrainingConfig, "seed", 2**63),
        (SequenceConfig, "text_dropout", 1.5),
        (SequenceConfig, "timestep_shift", 0),
        (RunConfig, "keep", 0),
        (RunConfig, "stage", "experts"),
        (RunConfig, "tasks", ["drawing"]),
    ],
)
def test_configs_refuse_what_is_out_of_range(kind: Any, name: str, value: Any) -> None:
    given = CONFIG if kind is TrainingConfig else {}
    with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: {name} must .*, got"):
        kind(**(given | {name: value}))


def test_learning_rate_rises_linearly_and_falls_by_a_cosine() -> None:
    config = TrainingConfig(
        steps=12, batch_size=1, learning_rate=1.0, min_learning_rate=0.2, warmup_steps=2
    )
    rates = [config.learning_rate_at(step) for step in range(13)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.6)
    assert rates[12] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    constant = TrainingConfig(steps=12, batch_size=1, schedule="constant")  # type: ignore[arg-type]
    assert {constant.learning_rate_at(step) for step in range(12)} == {1e-4}


def test_order_is_another_permutation_every_epoch() -> None:
    epochs = [[data_index(7, 3, 7 * epoch + place) for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_step_is_clipped_adamw_on_losses_over_all_tokens() -> None:
    own = trainer(micro_batch_size=4, max_grad_norm=0.5, warmup_steps=0, z_weight=0.1)
    config = own.config
    record = own.step()

    model = bagel()
    freeze(model, "expert_frozen")
    data = Mixed(model)
    sequences = [
        data.sequence(data_index(5, config.seed, place), sequence_generator(config.seed, 0, place))
        for place in range(4)
    ]
    batch = pack_training(model.config, sequences, device="cpu")
    out = training_forward(model, batch)
    loss = out.text_loss_sum / batch.text_tokens + out.image_loss_sum / batch.image_tokens
    balance, z_loss = router_losses(out.routing)
    loss = loss + config.balance_weight * balance + 0.1 * z_loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps).step()

    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for (name, parameter), expected in zip(
        own.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("size", [1, 2])
def test_passes_of_a_freshly_converted_model_are_one_step(size: int) -> None:
    found = []
    for each in (4, size):
        own = trainer(is_fresh=True, micro_batch_size=each, **FRESH)
        records = [own.step() for _ in range(8)]
        losses = ((r.loss, r.balance_loss, r.distill_loss) for r in records)
        found.append([value for own in losses for value in own])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-2] > 1.001


class Still(Mixed):
    """The same two pictures with the same noise in every step."""

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        return super().sequence(2 * (index % 2), torch.Generator().manual_seed(index % 2))


def test_distillation_pulls_sparse_ffns_to_the_dense_one_and_leaves_it_as_it_is() -> None:
    def error(weight: float) -> float:
        """Returns the relative error after 20 steps of the routers."""
        model = bagel()
        # As blocks are that a model in memory was converted to: they return y alone.
        model.language_model.model.layers[1].mlp_moe_gen.return_router_logits = False
        freeze(model, "router")
        options: dict[str, Any] = {**CONFIG, "steps": 20, "balance_weight": 0.0}
        own = Trainer(model, Still(model), TrainingConfig(**options, distill_weight=weight))
        block = model.language_model.model.layers[1].mlp_moe_gen
        dense = [weight.clone() for weight in block.plain_weights()]
        records = [own.step() for _ in range(20)]
        assert all(map(torch.equal, dense, block.plain_weights()))
        first = records[0]
        distilled = weight * (first.distill_loss or 0)
        assert first.loss == pytest.approx((first.image_loss or 0) + distilled)
        return sum(record.distill_loss or 0 for record in records[-5:]) / 5

    assert error(3.0) < 0.5 * error(1e-6)
    assert trainer().step().distill_loss is None


def test_distillation_is_its_formula_pulls_blocks_alone_and_takes_checkpointing() -> None:
    model = bagel()
    data = Mixed(model)
    batch = pack_training(model.config, [data.sequence(n, torch.Generator()) for n in range(4)])
    blocks = [own for own in model.modules() if isinstance(own, SparseMoE)]
    errors: list[torch.Tensor] = []

    def compare(block: SparseMoE, x: Any, out: Any) -> None:
        dense = SwiGLU(block.hidden_size, block.intermediate_size)
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.data = getattr(block, name).data
        target = dense(x[0].detach())
        errors.append(((out[0] - target).square().sum() / target.square().sum()).detach())

    handles = [block.register_forward_hook(compare) for block in blocks]
    plain = distillation_loss(training_forward(model, batch, distill=True).routing)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(plain.detach(), torch.stack(errors).mean())
    out = training_forward(model, batch, distill=True, checkpointing=True)
    named = [own for own in model.named_parameters() if own[1].requires_grad]
    names, weights = zip(*named, strict=True)
    found = [
        torch.autograd.grad(loss, weights, allow_unused=True)
        for loss in (plain, distillation_loss(out.routing))
    ]
    # The block alone is pulled, not what gives its inputs.
    pulled = {n for n, own in zip(names, found[0], strict=True) if own is not None and own.any()}
    assert all(".mlp" in name for name in pulled)
    assert any(name.endswith("gate.weight") for name in pulled)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("case", "message"),
    [("t2i_moe", "got trained gate_proj"), ("t2i_dense", "got a model without any")],
)
def test_distillation_needs_a_target_that_stays(case: str, message: str) -> None:
    model = bagel(case)
    freeze(model, "full")
    config = TrainingConfig(**CONFIG, distill_weight=1.0)
    rule = "distill_weight must come with sparse FFNs and frozen experts, whose sum is the target"
    refused(f"{rule}, {message}", Trainer, model, Mixed(model), config)


def test_balance_without_a_loss_evens_the_load_out() -> None:
    def busiest(**options: Any) -> float:
        """Returns the load of the busiest expert over the mean, late in a run."""
        own = trainer(steps=30, is_fresh=True, learning_rate=1e-6, balance_weight=0.0, **options)
        loads = [own.step().expert_load[("gen", 1)] for _ in range(30)]
        total = torch.tensor(loads[15:]).sum(0)
        return float(total.max() / total.double().mean())

    assert busiest() > 1.9  # nearly all tokens take the same half
    assert busiest(balance_rate=0.01) < 1.2


def test_collapsed_routers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    even, fallen = {"gen.1": [5, 5, 5, 5]}, {"gen.1": [10, 10, 0, 0]}
    (line,) = judge_routers([{"expert_load": even}] * 20, 2)
    assert "entropy of the load 1.000" in line
    assert not caplog.text
    # Only the last tenth counts.
    told = judge_routers([{"expert_load": even}] * 18 + [{"expert_load": fallen}] * 2, 2)
    assert "gen.1: 2 of 4 experts used by no token, 2 by all" in "\n".join(told)
    assert "collapsed in 1 of 1 blocks" in caplog.text
    assert judge_routers([{"expert_load": fallen}], None) == ()


def test_held_out_loss_is_that_of_the_model_alone() -> None:
    own = trainer(steps=2, eval_every=1, learning_rate=1e-2)
    own._held_out = Mixed(own.model)  # type: ignore[assignment]
    before = own.held_out_loss()
    assert own.held_out_loss() == before
    whole = trainer(micro_batch_size=4)
    whole._held_out = Mixed(whole.model)  # type: ignore[assignment]
    assert whole.held_out_loss() == pytest.approx(before, rel=1e-5)
    records = [own.step(), own.step()]
    assert all(r.held_out_loss not in (None, before) for r in records)
    assert records[1].held_out_loss == own.held_out_loss()
    assert "held_out_loss" not in whole.step().to_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_passes_of_a_step_add_up(dtype: torch.dtype, tolerance: float) -> None:
    whole = trainer(micro_batch_size=4, dtype=dtype)
    divided = trainer(micro_batch_size=1, dtype=dtype)
    first, second = whole.step(), divided.step()
    assert first.loss == pytest.approx(second.loss, rel=tolerance / 10)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=tolerance)
    assert first.tokens == second.tokens
    assert first.expert_load == second.expert_load


def test_bf16_weights_are_rounded_masters_that_keep_small_steps() -> None:
    own = trainer(dtype=torch.bfloat16, learning_rate=1e-6, weight_decay=0.0, schedule="constant")
    name = "llm2vae.weight"
    before = own.optimizer.weights[name].clone()
    losses(own, 4)
    master, weight = own.optimizer.weights[name], own.model.get_parameter(name)
    assert master.dtype == torch.float32
    assert torch.equal(weight, master.bfloat16())
    # Each step is far below the rounding of bf16; their sum is not lost.
    assert (master - before).abs().max() > 2.5e-6
    assert all(p.grad is None for p in own.model.parameters())


def test_average_follows_the_weights() -> None:
    own = trainer(dtype=torch.bfloat16)
    name = "llm2vae.weight"
    expected = own.optimizer.weights[name].clone()
    for _ in range(3):
        own.step()
        expected = 0.9 * expected + 0.1 * own.optimizer.weights[name]
    assert own.optimizer.ema is not None
    torch.testing.assert_close(own.optimizer.ema[name], expected)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    dtype: torch.dtype, steps: int, tmp_path: Path
) -> None:
    whole, half = trainer(dtype=dtype), trainer(dtype=dtype)
    expected = losses(whole)
    assert losses(half, steps) == expected[:steps]
    half.save(tmp_path / "state")
    resumed = trainer(dtype=dtype, checkpointing=True)
    resumed.load(tmp_path / "state")
    assert resumed.steps_done == steps
    assert losses(resumed) == expected[steps:]
    for key, value in whole.optimizer.state.items():
        assert torch.equal(value, resumed.optimizer.state[key]), key


def test_a_state_goes_on_with_other_step_sizes_and_with_no_other_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = trainer()
    own.save(tmp_path / "state")
    rule = r"weight_decay must be that of the run .* 0.2, got 0.1"
    refused(rule, trainer(weight_decay=0.2).load, tmp_path / "state")
    rule = r"tensors must be the state of the \d+ trained"
    refused(rule, trainer("full").load, tmp_path / "state")
    refused(r"target must not exist", own.save, tmp_path / "state")
    smaller = trainer(learning_rate=1e-4, max_grad_norm=0.1)
    smaller.load(tmp_path / "state")
    assert "learning_rate is now 0.0001, was 0.01" in caplog.text
    assert smaller.step().learning_rate == 5e-5


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step(
    what: str, tmp_path: Path
) -> None:
    own, other = trainer(max_grad_norm=None), trainer(max_grad_norm=None)
    expected = losses(other, 2)
    name, parameter = next(iter(own.optimizer.parameters.items()))
    losses(own, 1)
    if what == "loss":
        hook = own.model.llm2vae.register_forward_hook(lambda *args: args[2] * float("inf"))
    else:
        hook = parameter.register_hook(lambda grad: grad * float("inf"))
    refused(f"{what} must stay finite, got (inf|nan) at step 2", own.step, error=RuntimeError)
    hook.remove()
    assert losses(own, 1) == expected[1:]  # model and state were as before
    own.optimizer.weights[name][0] = float("nan")
    refused(rf"master.{name} must be finite", own.save, tmp_path / "poisoned", error=RuntimeError)
    assert list(tmp_path.iterdir()) == []


def test_trainer_refuses_nothing_to_train() -> None:
    model, config = bagel().requires_grad_(False), TrainingConfig(**CONFIG)
    refused("model must have parameters with requires_grad", Trainer, model, Mixed(model), config)
    refused("dataset must hold a sequence, got none", Trainer, model, [], config)
    model.language_model.model.norm.double().requires_grad_()
    rule = "norm.weight must be float32, .*, got torch.float64"
    refused(rule, Trainer, model, Mixed(model), config)


def test_loss_falls_and_experts_are_counted() -> None:
    seen: list[StepRecord] = []
    found = trainer(steps=12, learning_rate=5e-3).run(seen.append)
    assert found == [record.loss for record in seen]
    assert found[-1] < 0.7 * found[0]
    load = seen[0].expert_load[("gen", 1)]
    assert sum(load) > 0
    assert seen[0].load_imbalance == pytest.approx(max(load) * len(load) / sum(load))


class Words:
    """Text alone: no generation FFN runs."""

    def __len__(self) -> int:
        return 4

    def sequence(self, index: int, generator: torch.Generator) -> list[Segment]:
        return [TextSegment(token_ids=(3, 10 + index, 12, 4), predict=True)]


def test_a_pass_in_which_nothing_that_trains_takes_part_changes_nothing() -> None:
    model = bagel()
    trained = freeze(model, "router")
    before = {name: model.get_parameter(name).detach().clone() for name in trained}
    record = Trainer(model, Words(), TrainingConfig(steps=1, batch_size=4)).step()
    assert (record.text_loss or 0) > 0
    assert record.grad_norm == 0
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight)


# What a stage trains


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp_moe_gen = SparseMoE(16, 64, 4, 2, 1, shared_intermediate_size=16)
        self.mlp = SwiGLU(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_moe_gen(self.norm(x))[0] + self.mlp(x)


ROUTERS = {"mlp_moe_gen.gate.weight", "mlp_moe_gen.gate_shared.weight"}
EXPERTS = {f"mlp_moe_gen.{part}_proj" for part in ("gate", "up", "down")}


@pytest.fixture
def block() -> Block:
    block = Block()
    with torch.no_grad():
        block.mlp_moe_gen.gate.weight.normal_()
    return block


def test_stages_train_exactly_what_they_name(block: Block) -> None:
    names = {name for name, _ in block.named_parameters()}
    for stage, wanted in (("router", ROUTERS), ("expert_frozen", names - EXPERTS), ("full", names)):
        assert set(freeze(block, stage)) == wanted
        assert {n for n, p in block.named_parameters() if p.requires_grad} == wanted
        block.zero_grad()
        block(torch.randn(9, 16)).square().sum().backward()
        assert {n for n, p in block.named_parameters() if p.grad is not None} == wanted


def test_a_component_is_trained_alone_and_what_leaves_nothing_is_refused(block: Block) -> None:
    gen = {name for name, _ in block.named_parameters() if name.startswith("mlp_moe_gen")}
    assert set(freeze(block, "full", component="gen")) == gen
    for model, stage, component, rule in (
        (block, "router", "und", "component must have weights .* none in und"),
        (block, "router", "vit", "component must be gen, und or both, got 'vit'"),
        (block, "experts", "both", "stage must be one of router, expert_frozen"),
        (SwiGLU(8, 16), "expert_frozen", "both", "stage must be full for a model without"),
    ):
        refused(f"freeze: {rule}", freeze, model, stage, component=component)
    assert {name for name, p in block.named_parameters() if p.requires_grad} == gen
    assert len(freeze(SwiGLU(8, 16), "full")) == 3
