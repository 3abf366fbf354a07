# SPDX-License-Identifier: Apache-2.0
"""LoRA: gradients, files that peft and we read from each other, runs, merging, wrapped models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_models import CONFIG, Mixed, bagel, logged, losses, state_of, write_folder
from adapt_processes import run_both
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_unified import MoEConfig, apply_moe_, load_moe_, prune_heads_, restore_
from sparse_unified.adapt import RunConfig, Trainer, TrainingConfig, adapt, merge_lora
from sparse_unified.bagel import Bagel
from sparse_unified.bagel.model import router_losses
from sparse_unified.checkpoint import Checkpoint, PruneHeadsConfig, info, verify
from sparse_unified.cli import main
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS, expert_views
from sparse_unified.nn.sparse_moe import official_tensors
from sparse_unified.surgery import add_lora_, load_lora_
from sparse_unified.surgery.lora import TENSORS, read_lora, write_lora

peft = pytest.importorskip("peft")
TARGETS = ("attention", "experts", "ffns", "routers")
OPTIONS = ["--steps", "4", "--batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-2"]
LORA = ["--lora-rank", "2", "--lora-alpha", "4", "--lora-targets", "attention,experts,routers"]


def assert_equal_in_fp32(found: Tensor, expected: Tensor) -> None:
    """Sums of at most 96 terms in another order differ by a few roundings of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def sparse() -> Bagel:
    """A model with a shared expert and times in one component, and two routers in the other."""
    model = bagel("t2i_dense")
    apply_moe_(model, MoEConfig(num_experts=2, top_k=1, num_shared_experts=1, time_router=True))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="und"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".gate" in name and parameter.shape[0] <= 4:
            parameter.data.normal_(generator=generator)
    return model


def trainer(model: Bagel, **changes: Any) -> Trainer:
    return Trainer(model, Mixed(model), TrainingConfig(**(CONFIG | {"ema_decay": None} | changes)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of all weights by official key."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, block in model.named_modules():
        if isinstance(block, SparseMoE):
            views = expert_views(block.layout, *(getattr(block, p).grad for p in PROJECTIONS))
            found |= {f"{name}.{key}": view for key, view in views.items()}
    return found


def test_adapters_get_the_gradients_of_the_merged_weights(tmp_path: Path) -> None:
    model = sparse()
    plain = official_tensors(model)
    shapes = {key: tensor.shape for key, tensor in plain.items()}
    before = trainer(sparse()).step().loss
    config = add_lora_(model, rank=3, alpha=6, targets=TARGETS)
    tuned = trainer(model)
    assert tuned.step().loss == pytest.approx(before, rel=1e-6)  # B is zero
    losses(tuned)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    write_lora(tmp_path, config, adapters, base_model="x")
    factors = read_lora(tmp_path, shapes)

    merged = sparse()
    assert set(load_lora_(merged, tmp_path)) == factors.keys()
    left = plain.keys() - factors.keys()
    matrix = re.compile(r"language_model.*(_proj|_proj_moe_gen|gate\w*)\.weight")
    assert not any(matrix.search(key) for key in left)
    merged.requires_grad_(True)
    totals = []
    for own in (model, merged):
        batch = trainer(own)._batches()[0]
        own.zero_grad()
        *sums, routing = trainer(own)._pass(batch, batch.text_tokens, batch.image_tokens)
        loss = torch.stack([*sums, *router_losses(routing)]).sum()
        loss.backward()
        totals.append(loss.item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    wanted = gradients(merged)
    # Blocks without a shared expert have its router all the same.
    unused = {key for key in factors if key.endswith("mlp.gate_shared.weight")}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in adapters.items()}
    (tmp_path / "gradients").mkdir()
    write_lora(tmp_path / "gradients", config, grads, base_model="x")
    found = read_lora(tmp_path / "gradients", shapes)
    assert factors.keys() - wanted.keys() == unused
    for key in factors.keys() - unused:
        got, own, whole = found[key], factors[key], wanted[key]
        close = {"rtol": 1e-3, "atol": 1e-5 * float(whole.norm())}
        torch.testing.assert_close(got.down, own.scaling * own.up.T @ whole, **close)
        torch.testing.assert_close(got.up, own.scaling * whole @ own.down.T, **close)


class OfficialBlock(nn.Module):
    """The sparse FFN as the official code has it, an expert a module."""

    def __init__(self, block: SparseMoE) -> None:
        super().__init__()
        self.top_k = block.top_k
        for key, weight in block.official_views().items():
            *path, last, _ = key.split(".")
            owner: Any = self
            for name in path:
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner._modules[name]
            linear = nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight.data.copy_(weight)
            owner.add_module(last, linear)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        y = torch.zeros_like(x)
        for token, row in enumerate(x):
            for value, index in zip(*logits[token].topk(self.top_k), strict=True):
                own: Any = self.experts._modules[str(int(index))]
                out = own.down_proj(F.silu(own.gate_proj(row)) * own.up_proj(row))
                y[token] += (1 + value) * out
        return y


def official(model: Bagel) -> nn.Module:
    """Returns a model with the names of the official code."""
    for layer in model.language_model.model.layers:
        for name, child in layer.named_children():
            if isinstance(child, SparseMoE):
                setattr(layer, name, OfficialBlock(child))
    return model


@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_peft_reads_ours_for_the_official_modules_and_we_read_its(
    writer: str, tmp_path: Path
) -> None:
    layer = "language_model.model.layers.1"
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    ours = bagel("t2i_moe")
    if writer == "ours":
        config = add_lora_(ours, rank=2, alpha=8, targets=TARGETS)
        adapters = {n: torch.rand_like(p) for n, p in ours.named_parameters() if p.requires_grad}
        write_lora(tmp_path, config, adapters, base_model="x")
        theirs = peft.PeftModel.from_pretrained(official(bagel("t2i_moe")), tmp_path)
    else:
        names = ["q_proj_moe_gen", "experts.0.up_proj", "experts.3.down_proj", "gate"]
        config = peft.LoraConfig(
            r=2, use_rslora=True, alpha_pattern={"gate": 3}, target_modules=names
        )
        theirs = peft.get_peft_model(official(bagel("t2i_moe")), config)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data.uniform_()
        theirs.save_pretrained(tmp_path)
    fresh = bagel("t2i_moe")
    changed = load_lora_(fresh, tmp_path)
    assert len(changed) == len({n for n, _ in theirs.named_parameters() if "lora_A" in n})
    for path, given in (("self_attn.q_proj_moe_gen", x), ("mlp_moe_gen", x)):
        expected = theirs.base_model.model.get_submodule(f"{layer}.{path}")(given)
        out = fresh.get_submodule(f"{layer}.{path}")(given)
        out = out[0] if isinstance(out, tuple) else out
        assert_equal_in_fp32(out, expected)


@pytest.fixture(scope="module")
def root(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model, data, and adapters that a run with states made of them."""
    root = tmp_path_factory.mktemp("lora")
    shutil.copytree(golden("t2i_moe"), root / "model")
    write_folder(root / "data")
    assert main(command(root, root / "lora", "--checkpoint-every", "2")) == 0
    return root


def command(root: Path, out: Path, *more: str) -> list[str]:
    start = ["adapt", str(root / "model"), str(out), "--data", str(root / "data"), "--quiet"]
    return [*start, *OPTIONS, *LORA, *more]


def test_a_run_trains_adapters_alone_which_merge_and_generate(
    root: Path, tmp_path: Path, golden: Any
) -> None:
    tensors = load_file(root / "lora" / TENSORS)
    assert any(key.endswith("mlp_moe_gen.experts.3.up_proj.lora_B.weight") for key in tensors)
    assert all(bool(t.any()) for key, t in tensors.items() if "mlp_moe_gen.gate.lora_B" in key)
    state = state_of(root / "lora.training" / "step-4")
    assert all("lora_" in key for key in state)
    assert json.loads((root / "lora" / "adaptation.json").read_text())["losses"] == logged(
        root / "lora"
    )

    paths = [str(root / "model"), str(root / "lora"), str(tmp_path / "merged")]
    assert main(["merge", *paths]) == 0
    assert not info(tmp_path / "merged").problems
    assert not verify(tmp_path / "merged", golden("t2i_dense")).ok
    step = Checkpoint(tmp_path / "merged").recipe[-1].config
    assert (step.stage, step.steps, step.component) == ("lora", 4, "both")
    images = []
    for name, more in (("merged", []), ("live", ["--lora", str(root / "lora")])):
        model = tmp_path / "merged" if name == "merged" else root / "model"
        out = tmp_path / f"{name}.png"
        start = ["generate", str(model), "--prompt", "x", "--seed", "1", "--out", str(out)]
        assert main([*start, "--size", "32x32", "--steps", "3", "--quiet", *more]) == 0
        images.append(Image.open(out).tobytes())
    assert images[0] == images[1]


def test_a_resumed_run_trains_the_same_adapters(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "lora.training", tmp_path / "out.training")
    shutil.rmtree(tmp_path / "out.training" / "step-4")
    refused(
        "lora must be that of the run",
        adapt,
        root / "model",
        tmp_path / "out",
        root / "data",
        TrainingConfig(steps=4, batch_size=4, micro_batch_size=2, learning_rate=1e-2),
        RunConfig(resume=True, lora_rank=2),
    )
    assert main(command(root, tmp_path / "out", "--resume")) == 0
    assert logged(tmp_path / "out") == logged(root / "lora")
    first, second = (load_file(own / TENSORS) for own in (root / "lora", tmp_path / "out"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(root: Path, tmp_path: Path) -> None:
    found = run_both("command", *command(root, tmp_path / "two"))
    assert [status for status, _ in found] == [0, 0], found
    assert logged(tmp_path / "two") == pytest.approx(logged(root / "lora"), rel=2e-5)
    first, second = (load_file(own / TENSORS) for own in (root / "lora", tmp_path / "two"))
    assert first.keys() == second.keys()
    apart = torch.cat([(first[key] - second[key]).abs().flatten() for key in first])
    # Of a gradient that is nothing but rounding, each of 4 steps of 0.01 may go either way.
    assert apart.max() <= 2 * 4 * 0.01
    assert (apart > 1e-6).float().mean() < 1e-3


def test_memory_is_that_of_adapters(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(root, root / "none", "--estimate-memory", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = load_file(root / "lora" / TENSORS)
    assert found["trained"] == sum(t.numel() for t in tensors.values())
    assert 0 < found["activations"] < 100 * found["weights"]


@pytest.mark.parametrize("use", ["apply", "load"])
def test_ffns_and_attentions_that_peft_wrapped_are_taken(use: str, golden: Any) -> None:
    model = bagel("t2i_dense")
    names = ["gate_proj", "down_proj", "q_proj_moe_gen"]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    ffn = model.language_model.model.layers[1].mlp_moe_gen
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = ffn(x)
    if use == "apply":
        apply_moe_(wrapped, MoEConfig(num_experts=4, top_k=4))
        block: Any = model.language_model.model.layers[1].mlp_moe_gen
        assert_equal_in_fp32(block(x), expected)
    else:
        load_moe_(wrapped, golden("t2i_moe"))
        block = model.language_model.model.layers[1].mlp_moe_gen
        stored = Checkpoint(golden("t2i_moe"))
        key = "experts.2.down_proj.weight"
        prefix = "language_model.model.layers.1.mlp_moe_gen"
        assert torch.equal(block.official_views()[key], stored.read(f"{prefix}.{key}"))
    assert isinstance(block, SparseMoE)
    attention = model.language_model.model.layers[1].self_attn
    assert isinstance(attention.q_proj_moe_gen, peft.tuners.lora.Linear)
    restore_(wrapped)
    assert model.language_model.model.layers[1].mlp_moe_gen is ffn
    assert torch.equal(ffn(x), expected)
    with wrapped.disable_adapter():
        apply_moe_(wrapped, MoEConfig(num_experts=4, top_k=4))
        dense = bagel("t2i_dense").language_model.model.layers[1].mlp_moe_gen(x)
        block = model.language_model.model.layers[1].mlp_moe_gen
        assert_equal_in_fp32(block(x), dense)


def test_peft_s_own_adapters_of_routers_and_narrow_attentions_take_effect() -> None:
    model = bagel("t2i_moe")
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.5))
    expected = losses(trainer(model.requires_grad_(True), learning_rate=0.0), 1)
    names = ["gate", "q_proj_moe_gen"]
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names), model)
    assert losses(trainer(wrapped, learning_rate=0.0), 1) == expected
    losses(trainer(wrapped), 2)
    block: Any = wrapped.language_model.model.layers[1].mlp_moe_gen
    weight = block.gate.weight + block.gate.get_delta_weight("default")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert bool(block.gate.lora_B["default"].weight.any())
    torch.testing.assert_close(block(x)[1], x @ weight.T)
    block.gate.enable_adapters(False)
    torch.testing.assert_close(block(x)[1], x @ block.gate.weight.T)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors).replace("lora_A", "lora_B")]


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)][:, 1:].contiguous()


def rename(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace("layers.", "blocks.")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"use_dora": True}, "adapter_config.json: use_dora must be False, got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'"),
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            "lora_A and lora_B of linear layers and nothing else, got .*lm_head",
        ),
        (drop, "adapters must have two factors, got no .*lora_B"),
        (narrow, "adapters must be of weights of the model, got .* for .*, "),
        (rename, "which is not there"),
    ],
)
def test_other_adapters_are_refused_and_nothing_is_changed(
    change: Any, rule: str, root: Path, tmp_path: Path
) -> None:
    lora = Path(shutil.copytree(root / "lora", tmp_path / "lora"))
    if isinstance(change, dict):
        path = lora / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        tensors = load_file(lora / TENSORS)
        change(tensors)
        save_file(tensors, lora / TENSORS)
    model, before = bagel("t2i_moe"), official_tensors(bagel("t2i_moe"))
    refused(rule, load_lora_, model, lora)
    refused(rule, merge_lora, root / "model", lora, tmp_path / "out")
    assert all(torch.equal(own, before[key]) for key, own in official_tensors(model).items())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"rank": 0}, "add_lora_: rank must be an integer of at least 1, got 0"),
        ({"rank": 2, "targets": ("heads",)}, "targets must be one of attention, experts"),
        ({"rank": 2, "targets": ("experts",), "component": "und"}, "got no experts of und there"),
    ],
)
def test_bad_values_are_refused_before_anything_is_added(values: Any, rule: str) -> None:
    model = bagel("t2i_moe")
    names = [name for name, _ in model.named_parameters()]
    refused(rule, add_lora_, model, **values)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_run_with_adapters_has_no_stage() -> None:
    refused("stage must be left out with lora_rank", RunConfig, lora_rank=2, stage="full")
    refused("lora_alpha must come with lora_rank", RunConfig, lora_alpha=2.0)
