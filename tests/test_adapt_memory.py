# SPDX-License-Identifier: Apache-2.0
"""The memory of a run, computed beforehand, beside the tensors that a run has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import CONFIG, GOLDEN, Mixed
from torch import Tensor

from sparse_unified._common import format_bytes
from sparse_unified.adapt import Trainer, TrainingConfig, freeze
from sparse_unified.adapt.freeze import freeze_component
from sparse_unified.adapt.memory import MemoryEstimate, estimate
from sparse_unified.bagel import Bagel, LatentSegment, TextSegment, pack_training, training_forward
from sparse_unified.bagel.config import (
    BagelConfig,
    LLMConfig,
    SpecialTokens,
    VisionConfig,
)
from sparse_unified.bagel.packing import TrainingBatch
from sparse_unified.cli import main
from sparse_unified.fixtures import write_checkpoint

DTYPES = [torch.float32, torch.bfloat16]
AUTOENCODER = 335_304_388  # bytes of the released ae.safetensors


def released() -> BagelConfig:
    """BAGEL-7B-MoT with 16 experts, 8 active, in the generation FFNs of its middle layers."""
    llm = LLMConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ).with_experts("gen", range(1, 27), num_experts=16, top_k=8)
    vision = VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        patch_size=14,
        image_size=980,
    )
    return BagelConfig(
        llm=llm,
        vision=vision,
        latent_channels=16,
        vae_downsample=8,
        latent_patch_size=2,
        max_latent_size=64,
        vit_max_num_patch_per_side=70,
    )


def scaled() -> BagelConfig:
    """The same at a sixteenth of its widths and 6 of its layers."""
    llm = LLMConfig(
        hidden_size=224,
        intermediate_size=1184,
        num_hidden_layers=6,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=500,
    ).with_experts("gen", range(1, 5), num_experts=16, top_k=8)
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=4,
        image_size=16,
    )
    return BagelConfig(
        llm=llm,
        vision=vision,
        latent_channels=4,
        vae_downsample=8,
        latent_patch_size=2,
        max_latent_size=32,
        vit_max_num_patch_per_side=4,
        special_tokens=SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4),
    )


def pictures(config: BagelConfig) -> TrainingBatch:
    """Returns two captions with 256 latent tokens each."""
    latent = torch.randn(4, 32, 32)
    sequence = [
        TextSegment(token_ids=list(range(10, 40))),
        LatentSegment(latent=latent, time=0.5, noise=torch.randn(4, 32, 32)),
    ]
    return pack_training(config, [sequence, sequence], device="cpu")


def saved_bytes(model: Bagel, batch: TrainingBatch, *, checkpointing: bool) -> int:
    """Returns the bytes of all storages that a forward pass keeps for backward."""
    seen: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = training_forward(model, batch, checkpointing=checkpointing)
    assert out.image_tokens == 512
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def of_batch(model: Bagel, batch: TrainingBatch, config: TrainingConfig) -> MemoryEstimate:
    return estimate(
        model,
        config,
        image_tokens=512,
        text_tokens=batch.num_tokens - 512,
        predicted_tokens=batch.text_tokens,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stage", "ema"), [("router", None), ("expert_frozen", 0.9)])
def test_state_takes_the_bytes_it_was_said_to(
    dtype: torch.dtype, stage: str, ema: float | None
) -> None:
    model = Bagel(scaled(), dtype=dtype)
    freeze(model, stage)
    config = TrainingConfig(**(CONFIG | {"ema_decay": ema}))
    found = estimate(model, config, image_tokens=1, text_tokens=1, predicted_tokens=0)
    optimizer = Trainer(model, Mixed(model), config).optimizer
    state = optimizer.state()
    shared = {p.data_ptr() for p in model.parameters()}

    def held(kind: str) -> int:
        return sum(
            tensor.nbytes
            for key, tensor in state.items()
            if key.startswith(f"{kind}.") and tensor.data_ptr() not in shared
        )

    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.masters == held("master")
    assert found.moments == held("exp_avg") + held("exp_avg_sq")
    assert found.average == held("ema")
    gradients = [weight.grad for weight in optimizer.weights.values()]
    assert found.gradients == sum(g.nbytes for g in gradients if g is not None)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_has_few_gradients_at_a_time(dtype: torch.dtype) -> None:
    model = Bagel(scaled(), dtype=dtype)
    freeze(model, "expert_frozen")
    config = TrainingConfig(**CONFIG)
    batch = pictures(model.config)
    optimizer = Trainer(model, Mixed(model), config).optimizer
    own = {
        weight.grad.data_ptr() for weight in optimizer.weights.values() if weight.grad is not None
    }
    peak = 0

    def count(_: Any) -> None:
        nonlocal peak
        held = [p.grad for p in model.parameters() if p.grad is not None]
        peak = max(peak, sum(g.nbytes for g in held if g.data_ptr() not in own))

    with optimizer.accumulating():
        handles = [
            parameter.register_post_accumulate_grad_hook(count)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        out = training_forward(model, batch)
        (out.image_loss_sum / 512).backward()
        for handle in handles:
            handle.remove()
    found = of_batch(model, batch, config)
    assert peak <= found.pass_gradients
    assert optimizer.gradient_norm() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["expert_frozen", "full", "router"])
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype, stage: str) -> None:
    model = Bagel(scaled(), dtype=dtype)
    freeze(model, stage)
    batch = pictures(model.config)
    kept = saved_bytes(model, batch, checkpointing=False)
    found = of_batch(model, batch, TrainingConfig(**CONFIG)).activations
    if stage == "router":
        # What lies before the first router keeps nothing, which the formula does not know.
        assert kept <= found <= 1.4 * kept
    else:
        assert found == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpointing_keeps_inputs_and_one_layer(dtype: torch.dtype) -> None:
    model = Bagel(scaled(), dtype=dtype)
    freeze(model, "expert_frozen")
    batch = pictures(model.config)
    outside = saved_bytes(model, batch, checkpointing=True)
    layer = saved_bytes(model, batch, checkpointing=False) / 6
    config = TrainingConfig(**(CONFIG | {"checkpointing": True}))
    found = of_batch(model, batch, config).activations
    # The sparse layers, which keep most, are a little above the mean.
    assert found == pytest.approx(outside + layer, rel=0.15)


CASES = {
    "router": ("router", "both", None, None, 1),
    "expert_frozen, gen": ("expert_frozen", "gen", None, None, 1),
    "expert_frozen, gen, average": ("expert_frozen", "gen", None, 0.999, 1),
    "expert_frozen, optimizer on the host": ("expert_frozen", "both", "cpu", None, 1),
    "expert_frozen": ("expert_frozen", "both", None, None, 1),
    "full, 8 processes": ("full", "both", None, None, 8),
}
FITS = {"expert_frozen": False}


def of_released(case: str) -> MemoryEstimate:
    stage, component, device, ema, processes = CASES[case]
    model = Bagel(released(), device="meta", dtype=torch.bfloat16)
    freeze(model, stage)
    freeze_component(model, component)
    config = TrainingConfig(
        steps=1,
        batch_size=8,
        micro_batch_size=1,
        checkpointing=True,
        ema_decay=ema,
        optimizer_device=device,
    )
    return estimate(
        model,
        config,
        image_tokens=4096,
        text_tokens=130,
        predicted_tokens=0,
        autoencoder=AUTOENCODER,
        processes=processes,
    )


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_the_documentation_is_what_is_computed(case: str) -> None:
    found = of_released(case)
    assert (found.device < 80e9) == FITS.get(case, True)
    optimizer = found.gradients + found.masters + found.moments + found.average
    cells = [
        case,
        f"{found.trained:,}",
        format_bytes(found.weights),
        format_bytes(optimizer),
        format_bytes(found.activations + found.pass_gradients + found.gathered),
        format_bytes(found.device),
        format_bytes(found.host),
    ]
    text = (Path(__file__).parent.parent / "docs" / "adaptation.md").read_text()
    assert f"| {' | '.join(cells)} |" in text


def test_command_estimates_from_headers_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(GOLDEN / "t2i_moe", tmp_path / "model")
    arguments = ["adapt", str(model), str(tmp_path / "out"), "--estimate-memory", "--dtype"]
    assert main([*arguments, "bfloat16", "--batch-size", "2", "--ema", "0.9"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"98,624 of 111,936 parameters trained, 1 process, a pass of", text)
    assert main([*arguments, "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["masters"], found["gradients"]) == (0, 4 * 98_624)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
