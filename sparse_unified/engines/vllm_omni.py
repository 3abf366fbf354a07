# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's BAGEL pipeline with sparse generation FFNs; imported by vLLM-Omni.

The pipeline is built with dense FFNs, as llm_config.json is read there. Those that are sparse in
the file are replaced before any weight is read, and their experts are taken out of the stream of
weights.
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
from sparse_unified.nn import SparseMoE

_WHERE = "SparseBagelPipeline"
_built_in = importlib.import_module("vllm_omni.diffusion.models.bagel.pipeline_bagel")

# vLLM-Omni looks for these in the module of the pipeline.
get_bagel_post_process_func = _built_in.get_bagel_post_process_func
get_bagel_pre_process_func = _built_in.get_bagel_pre_process_func

_KEY = re.compile(r"language_model\.model\.layers\.(\d+)\.mlp_moe_gen\.(.+)")


class SparseBagelPipeline(_built_in.BagelPipeline):  # type: ignore[name-defined]
    """The pipeline of vLLM-Omni, for dense and for sparse checkpoints.

    Args:
        od_config, prefix: as of the pipeline it derives from.

    Raises:
        ValueError: the sparse checkpoint is damaged, pruned, or has sparse und FFNs; or FFNs are
            split over devices or quantised by vLLM-Omni.
    """

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self._sparse = self._put_in_blocks(Checkpoint(_directory(od_config)))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads weights as the built-in pipeline does, those of sparse FFNs into their blocks.

        Returns:
            the names of all parameters that were loaded.

        Raises:
            ValueError: weights of a sparse FFN are missing, unknown or misshapen.
        """
        views = {layer: block.official_views() for layer, block in self._sparse.items()}
        taken: set[tuple[int, str]] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                match = _KEY.fullmatch(name)
                if match is None or int(match[1]) not in views:
                    yield name, tensor
                    continue
                layer, inner = int(match[1]), match[2]
                view = views[layer].get(inner)
                if view is None or view.shape != tensor.shape:
                    wanted = "no such tensor" if view is None else str(list(view.shape))
                    raise ValueError(f"{_WHERE}: {name} must be {wanted}, got {list(tensor.shape)}")
                view.copy_(tensor)
                taken.add((layer, inner))

        with torch.no_grad():
            loaded: set[str] = super().load_weights(others())
        missing = [
            f"layers.{layer}.{inner}"
            for layer, of_layer in views.items()
            for inner in of_layer
            if (layer, inner) not in taken
        ]
        if missing:
            raise ValueError(f"{_WHERE}: weights must hold {list_some(missing)}, got none")
        blocks = set(self._sparse.values())
        loaded |= {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if module in blocks
            for name, _ in module.named_parameters()
        }
        return loaded

    def _put_in_blocks(self, checkpoint: Checkpoint) -> dict[int, SparseMoE]:
        """Replaces dense generation FFNs; returns the sparse ones by layer."""
        experts, top_k = checkpoint.experts, checkpoint.top_k
        if top_k is None:
            return {}
        if set(experts) != {"gen"} or checkpoint.left is not None:
            what = "pruned" if checkpoint.left is not None else "sparse und FFNs"
            raise ValueError(
                f"{_WHERE}: {checkpoint.directory} must have sparse gen FFNs and be dense "
                f"otherwise, got {what}"
            )
        blocks = {}
        for layer, layout in experts["gen"].items():
            at = f"{_WHERE}: layer {layer}"
            owner = self.language_model.model.layers[layer]
            down = getattr(owner.mlp_moe_gen.down_proj, "weight", None)
            hidden = checkpoint.ffns["gen"][layer].hidden_size
            wanted = [hidden, layout.intermediate_size]
            if down is None or list(down.shape) != wanted or not down.is_floating_point():
                found = "no weight" if down is None else f"{list(down.shape)} {down.dtype}"
                raise ValueError(
                    f"{at}: down_proj.weight must be {wanted} of floating point, neither split "
                    f"over devices nor quantised, got {found}"
                )
            # Given up first, so that no layer is in memory twice.
            device, dtype = down.device, down.dtype
            del down
            owner.mlp_moe_gen = nn.Identity()
            block = SparseMoE(
                hidden,
                layout.intermediate_size,
                layout.num_experts,
                top_k,
                layout.num_shared_experts,
                shared_intermediate_size=layout.shared_width,
                return_router_logits=False,
                device=device if device.type != "meta" else self.device,
                dtype=dtype,
            )
            owner.mlp_moe_gen = block.requires_grad_(False)
            blocks[layer] = block
        return blocks


def _directory(od_config: Any) -> str:
    """Returns where the model of a configuration lies, as the built-in pipeline finds it."""
    if Path(od_config.model).exists():
        return str(od_config.model)
    found: str = _built_in.download_weights_from_hf_specific(
        od_config.model, od_config.revision, ["*"]
    )
    return found
