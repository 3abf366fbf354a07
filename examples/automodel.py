# SPDX-License-Identifier: Apache-2.0
"""NeMo AutoModel's recipe for BAGEL with sparse FFNs and their balance loss: docs/automodel.md.

    torchrun --nproc-per-node 8 examples/automodel.py --config sft.yaml

The YAML is that of AutoModel's BAGEL recipe, with `model.init_mode: hf_backbones` and a section
`sparse`: the options of `MoEConfig`, or `checkpoint`, a sparse directory; and `balance_weight`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nemo_automodel._transformers.infrastructure import (
    apply_model_infrastructure,
    instantiate_infrastructure,
)
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.components.models.bagel.configuration import resolve_bagel_backend
from nemo_automodel.components.models.bagel.model import BagelForUnifiedMultimodal
from nemo_automodel.components.models.bagel.state_dict_adapter import BagelStateDictAdapter
from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler
from nemo_automodel.recipes.multimodal.finetune import FinetuneRecipeForMultimodal
from torch import Tensor, nn

from sparse_unified import MoEConfig, apply_moe_, load_moe_
from sparse_unified.bagel.model import balance_loss
from sparse_unified.experts import ExpertLayout
from sparse_unified.nn.expert_state import PROJECTIONS, expert_views
from sparse_unified.surgery.decoder import find_sparse_blocks


def make_sparse_(
    model: nn.Module,
    *,
    checkpoint: str | None = None,
    balance_weight: float = 0.01,
    passes: int = 1,
    **config: Any,
) -> nn.Module:
    """Swaps the FFNs of AutoModel's BAGEL and attaches their balance loss, before it is sharded.

    Args:
        model: with dense weights in memory.
        checkpoint: a sparse directory to take the FFNs from; without it, the model's own are split.
        balance_weight: of the load-balance loss, averaged over blocks and passes.
        passes: forward and backward passes of a step of each process.
        config: of `MoEConfig`.
    """
    if checkpoint is None:
        apply_moe_(model, MoEConfig(**config), keep_dense=False)
    else:
        load_moe_(model, checkpoint, keep_dense=False)
    blocks = [found.module for found in find_sparse_blocks(model)]
    weight = balance_weight / (len(blocks) * passes)

    def attach(block: Any, _: Any, out: tuple[Tensor, Tensor]) -> Tensor:
        y, logits = out
        if block.training and y.requires_grad and len(logits):
            y = MoEAuxLossAutoScaler.apply(y, weight * balance_loss(logits, block.top_k))
        return y

    for block in blocks:
        block.return_router_logits = True
        block.register_forward_hook(attach)
        # Sharded states go by the names of parameters; the adapter gives files the official ones.
        own: Any = block
        own._save_to_state_dict = partial(nn.Module._save_to_state_dict, block)
        own._load_from_state_dict = partial(nn.Module._load_from_state_dict, block)
    names = {module: name for name, module in model.named_modules()}
    layouts = {names[block]: block.layout for block in blocks}
    model.state_dict_adapter = SparseAdapter(layouts)
    return model


class SparseAdapter(BagelStateDictAdapter):
    """Between AutoModel's names and those of sparse checkpoints: the experts of a block, split."""

    def __init__(self, layouts: dict[str, ExpertLayout]) -> None:
        super().__init__(stage="stage2")
        self.layouts = layouts

    def to_hf(self, state_dict: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """Returns a tensor per expert."""
        state = dict(state_dict)
        for name, layout in self.layouts.items():
            fused = [state.pop(f"{name}.{part}") for part in PROJECTIONS]
            views = expert_views(layout, *fused)
            state |= {f"{name}.{key}": view.contiguous() for key, view in views.items()}
        return dict(super().to_hf(state, **options))

    def from_hf(self, hf_state_dict: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Returns the fused weights of each block, and all else under AutoModel's names."""
        state = {self._hf_to_nemo_key(key): value for key, value in hf_state_dict.items()}
        for name, layout in self.layouts.items():
            for part in PROJECTIONS:
                keys = [f"{name}.{owner}.{part}.weight" for owner in layout.ranges()]
                parts = [state.pop(key) for key in keys]
                state[f"{name}.{part}"] = torch.cat(parts, dim=int(part == "down_proj"))
        return state


class SparseRecipe(FinetuneRecipeForMultimodal):
    """AutoModel's recipe, with another model."""

    def _build_hf_backbone_bagel_model(
        self, *, artifact_path: str, stage: int, **_: Any
    ) -> nn.Module:
        steps = self.cfg.step_scheduler
        world = self.dist_env.world_size
        model = BagelForUnifiedMultimodal.from_pretrained(
            artifact_path,
            stage=stage,
            vae_config={
                name: int(getattr(self.vae_params, name)) for name in ("z_channels", "downsample")
            },
            backend=resolve_bagel_backend(self.cfg.get("model.backend", None)),
        )
        passes = steps.global_batch_size // (steps.local_batch_size * world)
        make_sparse_(model, passes=passes, **self.cfg.sparse.to_dict())
        wrapper, _, parallelize, _ = instantiate_infrastructure(
            distributed_config=self.distributed_config,
            activation_checkpointing=self.activation_checkpointing,
            device=self.dist_env.device,
            mesh=self.mesh_context,
        )
        frozen = self.cfg.get("freeze_config", None)
        return apply_model_infrastructure(
            model=model,
            pretrained_model_name_or_path="",
            mesh=self.mesh_context,
            parallelize_fn=parallelize,
            model_wrapper=wrapper,
            is_meta_device=False,
            device=self.dist_env.device,
            load_base_model=False,
            freeze_config=None if frozen is None else frozen.to_dict(),
        )


if __name__ == "__main__":
    recipe = SparseRecipe(parse_args_and_load_config())
    recipe.setup()
    recipe.run_train_validation_loop()
