# SPDX-License-Identifier: Apache-2.0
"""examples/automodel.py with the released NeMo AutoModel, on the CPU at tiny sizes.

`python tests/test_automodel.py DIRECTORY` is one of the two processes that train together.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
finetune = pytest.importorskip(
    "nemo_automodel.recipes.multimodal.finetune",
    reason="needs nemo-automodel, einops, torchdata and flashoptim",
    exc_type=ImportError,
)
import automodel  # noqa: E402
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer, CheckpointingConfig  # noqa: E402
from nemo_automodel.components.config.loader import ConfigNode  # noqa: E402
from nemo_automodel.components.models.bagel import modeling_qwen2_packed  # noqa: E402
from nemo_automodel.components.models.bagel.configuration import BagelConfig  # noqa: E402
from nemo_automodel.components.models.bagel.model import BagelForUnifiedMultimodal  # noqa: E402
from nemo_automodel.recipes._dist_utils import create_distributed_setup_from_config  # noqa: E402

from sparse_unified.bagel.model import Routing, expert_load, router_losses  # noqa: E402
from sparse_unified.surgery.decoder import find_sparse_blocks  # noqa: E402

# It asks for an attention kernel that only GPUs have.
modeling_qwen2_packed.sdpa_kernel = lambda **_: nullcontext()
VAE = {"z_channels": 4, "downsample": 8}
SPARSE = {"num_experts": 4, "top_k": 2, "layers": "all", "balance_weight": 0.5}
LLM = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "layer_module": "Qwen2MoTDecoderLayer",
    "qk_norm": True,
    "pad_token_id": 0,
}


def tiny() -> Any:
    """Returns AutoModel's BAGEL without a ViT, with random weights."""
    config = BagelConfig(
        text_config=dict(LLM), vae_config=VAE, visual_und=False, visual_gen=True, stage=2,
        max_latent_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BagelForUnifiedMultimodal(config)
    model.initialize_weights()
    return model.train()


def batch() -> dict[str, Any]:
    """Returns four tokens of text and the four of an image."""
    torch.manual_seed(1)
    return {
        "sequence_length": 8,
        "sample_lens": [8],
        "packed_text_ids": torch.tensor([1, 5, 6, 2]),
        "packed_text_indexes": torch.arange(4),
        "packed_position_ids": torch.tensor([0, 1, 2, 3, 4, 4, 4, 4]),
        "nested_attention_masks": [torch.zeros(8, 8)],
        "padded_latent": torch.randn(1, 4, 4, 4),
        "patchified_vae_latent_shapes": [(2, 2)],
        "packed_latent_position_ids": torch.tensor([0, 1, 8, 9]),
        "packed_vae_token_indexes": torch.arange(4, 8),
        "packed_timesteps": torch.randn(4),
        "mse_loss_indexes": torch.arange(4, 8),
        "ce_loss_indexes": torch.tensor([0, 1, 2]),
        "packed_label_ids": torch.tensor([5, 6, 2]),
    }


def losses(model: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch())
    return out["ce"].mean() + out["mse"].mean()


def draw_routers(model: Any) -> list[Any]:
    blocks = [found.module for found in find_sparse_blocks(model)]
    for seed, block in enumerate(blocks):
        generator = torch.Generator().manual_seed(seed)
        block.gate.weight.data.normal_(generator=generator)
    return blocks


def test_all_experts_compute_the_dense_model_and_the_balance_loss_is_trained() -> None:
    expected = losses(tiny())
    whole = automodel.make_sparse_(tiny(), **SPARSE | {"top_k": 4})
    assert losses(whole).item() == pytest.approx(expected.item(), rel=2**-8)  # bf16

    attached = automodel.make_sparse_(tiny(), **SPARSE)
    draw_routers(attached)
    losses(attached).backward()
    plain = automodel.make_sparse_(tiny(), **SPARSE | {"balance_weight": 0.0})
    routed = []
    for block in draw_routers(plain):
        block._forward_hooks.clear()
        block.register_forward_hook(lambda _, __, out: routed.append(out[1]) or out[0])
    loss = losses(plain)
    none = torch.zeros(())
    routing = {
        ("gen", layer): Routing(expert_load(own, 2), own.softmax(-1).sum(0), none, none, len(own))
        for layer, own in enumerate(routed)
    }
    balance, _ = router_losses(routing)
    without = torch.autograd.grad(loss, list(find_gates(plain)), retain_graph=True)
    (loss + 0.5 * balance).backward()
    for own, other, alone in zip(find_gates(attached), find_gates(plain), without, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-7)
        assert (own.grad - alone).norm() > 0.1 * alone.norm()


def find_gates(model: Any) -> Any:
    return (found.module.gate.weight for found in find_sparse_blocks(model))


def recipe(directory: Path, world_size: int) -> Any:
    """Returns the recipe at the point where `setup` has built the model."""
    config = {
        "model": {"stage": 2},
        "sparse": dict(SPARSE),
        "step_scheduler": {"global_batch_size": 2 * world_size, "local_batch_size": 1},
        "distributed": {"strategy": "fsdp2"},
    }
    made = automodel.SparseRecipe(ConfigNode(config))
    made.dist_env = SimpleNamespace(
        world_size=world_size, rank=dist.get_rank(), device=torch.device("cpu"), is_main=True
    )
    (
        made.distributed_setup, made.mesh_context, made.distributed_config, made.device_mesh,
        made.moe_mesh, made.pp_enabled, made.pipeline_config, made.moe_parallel_config,
        made.activation_checkpointing,
    ) = made._distributed_setup_attributes(
        create_distributed_setup_from_config(made.cfg, world_size=world_size)
    )  # fmt: skip
    made.vae_params, made.vae_model, made.stage = SimpleNamespace(**VAE), None, 2
    made.model = made._build_hf_backbone_bagel_model(artifact_path=str(directory), stage=2)
    made.model.train()
    trained = [p for p in made.model.parameters() if p.requires_grad]
    made.optimizer = [torch.optim.AdamW(trained, lr=1e-2)]
    made.step_scheduler = SimpleNamespace(step=0, epoch=0, is_remote_logging_step=False)
    made.ema, made._use_lr_warmup, made.warmup_steps = None, False, 0
    return made


def train(directory: Path) -> None:
    """Takes steps in this process and another one, saves, loads, and writes what it saw."""
    dist.init_process_group("gloo")
    made = recipe(directory, dist.get_world_size())
    own = SimpleNamespace(to_dict=batch, cuda=lambda _: own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [made._run_train_optim_step([own, own], 1.0).metrics["loss"] for _ in range(4)]
    config = CheckpointingConfig(
        enabled=True, checkpoint_dir=str(directory / "out"), model_save_format="safetensors",
        model_cache_dir=str(directory), model_repo_id=str(directory), save_consolidated=True,
        is_peft=False,
    )  # fmt: skip
    checkpointer = Checkpointer(
        config=config, dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0, moe_mesh=None
    )
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    checkpointer.save_model(made.model, str(directory / "out"))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    checkpointer.load_model(made.model, str(directory / "out" / "model"))
    after = made.model.state_dict()
    same = all(torch.equal(local(before[key]), local(after[key])) for key in before)
    sharded = sum(hasattr(p, "to_local") for p in made.model.parameters())
    if dist.get_rank() == 0:
        facts = {"losses": found, "same": same, "sharded": sharded}
        (directory / "facts.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_two_processes_train_and_their_checkpoint_has_the_official_names(tmp_path: Path) -> None:
    model = tiny()
    tensors = {key.removeprefix("model."): own for key, own in model.state_dict().items()}
    save_file({key: own.contiguous() for key, own in tensors.items()}, tmp_path / "ema.safetensors")
    model.config.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    assert [run.wait(300) for run in runs] == [0, 0]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["losses"][-1] < facts["losses"][0]
    assert facts["same"]
    assert facts["sharded"] > 50
    (path,) = (tmp_path / "out" / "model" / "consolidated").glob("*.safetensors")
    written = load_file(path)
    block = find_sparse_blocks(automodel.make_sparse_(tiny(), **SPARSE))[1].module
    prefix = "language_model.model.layers.1.mlp_moe_gen."
    views = {prefix + key: view.shape for key, view in block.official_views().items()}
    assert {k: t.shape for k, t in written.items() if k.startswith(prefix)} == views


if __name__ == "__main__":
    train(Path(sys.argv[1]))
