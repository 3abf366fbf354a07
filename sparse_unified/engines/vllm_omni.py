# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's BAGEL with sparse generation FFNs; imported by vLLM-Omni.

Both of its models, the pipeline that draws and the language model that reads in a two-stage
deployment, are built with dense FFNs, as llm_config.json is read there. Those that are sparse in
the file are replaced before any weight is read, and their experts are taken out of the stream of
weights. Over a tensor-parallel group whole experts are divided.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.engines.expert_share import ExpertShare
from sparse_unified.nn import SparseMoE

_WHERE = "sparse_unified"
_built_in = importlib.import_module("vllm_omni.diffusion.models.bagel.pipeline_bagel")

# vLLM-Omni looks for these in the module of the pipeline.
get_bagel_post_process_func = _built_in.get_bagel_post_process_func
get_bagel_pre_process_func = _built_in.get_bagel_pre_process_func

_KEY = re.compile(r"language_model\.model\.layers\.(\d+)\.mlp_moe_gen\.(.+)")


class WithExperts:
    """What a model of vLLM-Omni gets: blocks in place of FFNs, and their weights."""

    language_model: Any
    device: torch.device
    _sparse: dict[int, SparseMoE | ExpertShare]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads weights as the built-in model does, those of sparse FFNs into their blocks.

        Returns:
            the names of all parameters that were loaded.

        Raises:
            ValueError: weights of a sparse FFN are missing, unknown or misshapen.
        """
        views: dict[int, dict[str, Tensor | None]] = {
            layer: dict(block.official_views()) for layer, block in self._sparse.items()
        }

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                match = _KEY.fullmatch(name)
                if match is None or int(match[1]) not in views:
                    yield name, tensor
                    continue
                layer, inner = int(match[1]), match[2]
                if inner not in views[layer]:
                    rule = "must be a tensor of a sparse block, given once"
                    raise ValueError(f"{_WHERE}: {name} {rule}, got another or a second one")
                view = views[layer].pop(inner)
                if view is None:  # of an expert that another process has
                    continue
                if view.shape != tensor.shape:
                    raise ValueError(
                        f"{_WHERE}: {name} must be {list(view.shape)}, got {list(tensor.shape)}"
                    )
                view.copy_(tensor)

        with torch.no_grad():
            loaded: set[str] = super().load_weights(others())  # type: ignore[misc]
        if missing := [f"layers.{n}.{inner}" for n, left in views.items() for inner in left]:
            raise ValueError(f"{_WHERE}: weights must hold {list_some(missing)}, got none")
        blocks = set(self._sparse.values())
        loaded |= {
            f"{path}.{name}"
            for path, module in self.named_modules()  # type: ignore[attr-defined]
            if module in blocks
            for name, _ in module.named_parameters()
        }
        return loaded

    def put_in_blocks(self, checkpoint: Checkpoint) -> None:
        """Replaces the dense generation FFNs that are sparse in a checkpoint."""
        self._sparse = {}
        experts, top_k = checkpoint.experts, checkpoint.top_k
        if top_k is None:
            return
        what = "sparse und FFNs" if set(experts) != {"gen"} else ""
        what = what if checkpoint.left is None else "pruned"
        if any(layout.time_router for layout in experts.get("gen", {}).values()):
            what = "gate_time"
        if what:
            rule = "must have sparse gen FFNs without gate_time and be dense otherwise"
            raise ValueError(f"{_WHERE}: {checkpoint.directory} {rule}, got {what}")
        layers = self.language_model.model.layers
        for layer, layout in experts["gen"].items():
            at = f"{_WHERE}: layer {layer}"
            owner = layers[layer]
            down = getattr(owner.mlp_moe_gen.down_proj, "weight", None)
            hidden = checkpoint.ffns["gen"][layer].hidden_size
            rank, count = 0, 1
            if down is not None and down.dim() == 2 and down.shape[1] != layout.intermediate_size:
                group = importlib.import_module("vllm.distributed")
                rank = group.get_tensor_model_parallel_rank()
                count = group.get_tensor_model_parallel_world_size()
            wanted = [hidden, layout.intermediate_size // count]
            if down is None or list(down.shape) != wanted or not down.is_floating_point():
                found = "no weight" if down is None else f"{list(down.shape)} {down.dtype}"
                raise ValueError(
                    f"{at}: down_proj.weight must be {wanted} of floating point, not quantised, "
                    f"got {found}"
                )
            if layout.num_experts % count or (count > 1 and layout.shared_width):
                raise ValueError(
                    f"{at}: tensor_parallel_size must divide {layout.num_experts} experts, none of "
                    f"them shared, got {count}"
                )
            # Given up first, so that no layer is in memory twice.
            device = down.device if down.device.type != "meta" else self.device
            dtype, num_experts = down.dtype, layout.num_experts // count
            del down
            owner.mlp_moe_gen = nn.Identity()
            block: Any = SparseMoE(
                hidden,
                layout.intermediate_size // count,
                num_experts,
                min(top_k, num_experts),
                layout.num_shared_experts,
                shared_intermediate_size=layout.shared_width,
                return_router_logits=False,
                device=device,
                dtype=dtype,
            )
            if count > 1:
                if block.active_backend.startswith("torch"):
                    raise ValueError(
                        f"{at}: experts divided over processes must run on our kernels, got "
                        f"{block.active_backend}"
                    )
                reduce, first = group.tensor_model_parallel_all_reduce, rank * num_experts
                block = ExpertShare(block, layout.num_experts, first, top_k, reduce)
            self._sparse[layer] = owner.mlp_moe_gen = block.requires_grad_(False)


class BagelPipeline(WithExperts, _built_in.BagelPipeline):  # type: ignore[name-defined]
    """The pipeline of vLLM-Omni, for dense and for sparse checkpoints.

    It has the name of the built-in one, by which vLLM-Omni finds step caches and other settings.

    Args:
        od_config, prefix: as of the pipeline it derives from.

    Raises:
        ValueError: the sparse checkpoint is damaged, pruned, or has sparse und FFNs; experts are
            not divided evenly over the processes; or FFNs are quantised by vLLM-Omni.
    """

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        directory = od_config.model
        if not Path(directory).exists():  # as the built-in pipeline finds it
            download = _built_in.download_weights_from_hf_specific
            directory = download(directory, od_config.revision, ["*"])
        self.put_in_blocks(Checkpoint(directory))
