# SPDX-License-Identifier: Apache-2.0
"""The memory of a run, computed beforehand, beside the tensors that a run has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import CONFIG, Mixed
from checkpoint_files import bagel_config
from torch import Tensor

from sparse_unified._common import format_bytes
from sparse_unified.adapt import Trainer, TrainingConfig, freeze
from sparse_unified.adapt.memory import MemoryEstimate, estimate, largest_batch
from sparse_unified.bagel import Bagel, training_forward
from sparse_unified.bagel.config import LLMConfig, VisionConfig
from sparse_unified.cli import main

AUTOENCODER = 335_304_388  # bytes of the released ae.safetensors
IMAGE = 128  # pixels a side of the images of a pass of the scaled model
DTYPES = [torch.float32, torch.bfloat16]


def config_of(llm: tuple[int, ...], vision: tuple[int, ...], latents: tuple[int, int]) -> Any:
    """Returns a BAGEL with 16 experts, 8 active, in the generation FFNs of its middle layers."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    of_llm: Any = zip((*names, "num_key_value_heads", "vocab_size"), llm, strict=True)
    whole = LLMConfig(**dict(of_llm))
    middle = range(1, whole.num_hidden_layers - 1)
    of_vision: Any = zip((*names, "patch_size", "image_size"), vision, strict=True)
    sizes = {"vae_downsample": 8, "vit_max_num_patch_per_side": vision[-1] // vision[-2]}
    return bagel_config(
        whole.with_experts("gen", middle, num_experts=16, top_k=8),
        VisionConfig(**dict(of_vision)),
        latent_channels=latents[0],
        max_latent_size=latents[1],
        **sizes,
    )


RELEASED = config_of((3584, 18944, 28, 28, 4, 152064), (1152, 4304, 26, 16, 14, 980), (16, 64))
# The same at a sixteenth of its widths.
SCALED = config_of((224, 1184, 6, 14, 2, 500), (32, 64, 1, 2, 4, 16), (4, 32))


def model_of(stage: str, dtype: torch.dtype) -> Bagel:
    model = Bagel(SCALED, dtype=dtype)
    freeze(model, stage)
    return model


def of_pass(model: Bagel, **changes: Any) -> MemoryEstimate:
    config = TrainingConfig(**(CONFIG | changes))
    return estimate(model, config, largest_batch(model, IMAGE, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_takes_the_bytes_it_was_said_to_and_gradients_come_few_at_a_time(
    dtype: torch.dtype,
) -> None:
    model = model_of("expert_frozen", dtype)
    found = of_pass(model)
    optimizer = Trainer(model, Mixed(model), TrainingConfig(**CONFIG)).optimizer
    shared = {p.data_ptr() for p in model.parameters()}

    def held(kind: str) -> int:
        tensors = (t for key, t in optimizer.state.items() if key.startswith(f"{kind}."))
        return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in shared)

    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.masters == held("master")
    assert found.moments == held("exp_avg") + held("exp_avg_sq")
    assert found.average == held("ema")
    assert found.gradients == sum(gradient.nbytes for gradient in optimizer.gradients.values())

    own = {gradient.data_ptr() for gradient in optimizer.gradients.values()}
    peak = 0

    def count(_: Any) -> None:
        nonlocal peak
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        peak = max(peak, sum(g.nbytes for g in gradients if g.data_ptr() not in own))

    with optimizer.accumulating():
        for parameter in optimizer.parameters.values():
            parameter.register_post_accumulate_grad_hook(count)
        training_forward(model, largest_batch(model, IMAGE, 2)).image_loss_sum.backward()
    assert peak <= found.pass_gradients
    assert optimizer.gradient_norm() > 0


def saved_bytes(model: Bagel, *, checkpointing: bool) -> list[int]:
    """Returns the bytes of all storages that a forward pass keeps for backward.

    Those of each layer, of the first with what comes before it, and what comes behind the last.
    """
    seen: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    counts = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor  # held, so no address comes twice
            counts[-1] += storage.nbytes()
        return tensor

    layers = model.language_model.model.layers
    hooks = [layer.register_forward_hook(lambda *_: counts.append(0)) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_forward(model, largest_batch(model, IMAGE, 2), checkpointing=checkpointing)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(
    ("dtype", "stage"), [(DTYPES[0], "full"), (DTYPES[1], "expert_frozen"), (DTYPES[1], "router")]
)
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype, stage: str) -> None:
    model = model_of(stage, dtype)
    *layers, behind = saved_bytes(model, checkpointing=False)
    assert of_pass(model).activations == sum(layers) + behind
    inputs = sum(saved_bytes(model, checkpointing=True))
    assert of_pass(model, checkpointing=True).activations == inputs + max(layers)


FAST, HOST = "expert_frozen, gen", {"optimizer_device": "cpu"}
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "router": ("router", "both", {}, 1),
    "expert_frozen, gen": ("expert_frozen", "gen", {}, 1),
    "expert_frozen, gen, average": ("expert_frozen", "gen", {"ema_decay": 0.999}, 1),
    "expert_frozen, optimizer on the host": ("expert_frozen", "both", HOST, 1),
    "expert_frozen": ("expert_frozen", "both", {}, 1),
    "full, 8 processes": ("full", "both", {}, 8),
}
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != FAST]


@pytest.mark.parametrize("case", [FAST, *SLOW])
def test_the_table_of_the_documentation_is_what_is_computed(case: str) -> None:
    stage, component, changes, processes = CASES[case]
    model = Bagel(RELEASED, device="meta", dtype=torch.bfloat16)
    freeze(model, stage, component=component)
    found = estimate(
        model,
        TrainingConfig(steps=1, batch_size=8, micro_batch_size=1, checkpointing=True, **changes),
        largest_batch(model, 1024, 1),
        autoencoder=AUTOENCODER,
        processes=processes,
    )
    assert (found.device < 80e9) == (case != "expert_frozen")
    sizes = (
        found.weights,
        found.gradients + found.masters + found.moments + found.average,
        found.activations + found.pass_gradients + found.gathered,
        found.device,
        found.host,
    )
    cells = [case, f"{found.trained:,}", *map(format_bytes, sizes)]
    text = (Path(__file__).parent.parent / "docs" / "adaptation.md").read_text()
    assert f"| {' | '.join(cells)} |" in text


def test_command_estimates_from_headers_alone(golden: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = ["adapt", str(golden("t2i_moe")), str(tmp_path / "out"), "--estimate-memory"]
    arguments += ["--dtype"]
    assert main([*arguments, "bfloat16", "--batch-size", "2", "--ema", "0.9"]) == 0
    assert "98,624 of 111,936 parameters trained, 1 process, a pass of" in capsys.readouterr().out
    assert main([*arguments, "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["masters"], found["gradients"]) == (0, 4 * 98_624)
    assert list(tmp_path.iterdir()) == []
