# SPDX-License-Identifier: Apache-2.0
"""The modules of recorded cases, with their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_unified.bagel import AutoEncoder, Bagel, SpecialTokens, VAEConfig
from sparse_unified.bagel.config import bagel_config, vae_config
from sparse_unified.bagel.loading import check_tensors, official_tensors
from sparse_unified.testing.cases import Case


def build_model(case: Case) -> Bagel:
    """Returns the model of an image or answer case, with its weights.

    Raises:
        ValueError: a field or tensor is missing, or fields and tensors disagree.
    """
    moe: Any = case.field("moe", "be an object or null", lambda v: isinstance(v, dict | None)) or {}
    markers = {
        name: case.integer(f"new_token_ids.{field}", least=0)
        for name, field in (
            ("bos", "bos_token_id"),
            ("eos", "eos_token_id"),
            ("start_of_image", "start_of_image"),
            ("end_of_image", "end_of_image"),
        )
    }
    config = bagel_config(
        {key: tuple(tensor.shape) for key, tensor in case.weights.items()},
        case.mapping("llm_config"),
        case.mapping("vit_config"),
        latent_channels=case.integer("vae_config.z_channels", least=1),
        vae_downsample=case.integer("vae_config.downsample", least=1),
        special_tokens=SpecialTokens(**markers),
        top_k=moe.get("top_k"),
        num_shared_experts=moe.get("num_shared_experts") or 0,
        stated=case.fields,
        where=case.tensor_file,
    )
    model = Bagel(config, device="meta")
    load_weights_(model, case)
    return model


def build_vae(case: Case) -> AutoEncoder:
    """Returns the autoencoder of a VAE case, with its weights.

    Raises:
        ValueError: a tensor is missing, or fields and tensors disagree.
    """
    factors = {
        name: case.number(name) for name in ("scale_factor", "shift_factor") if name in case.fields
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in case.weights.items()}
    config = vae_config(shapes, where=case.tensor_file, **factors)
    for name in VAEConfig.__slots__:
        found = getattr(config, name)
        wanted = list(found) if name == "ch_mult" else found
        if case.fields.get(name, wanted) != wanted:
            raise ValueError(
                f"{case.json_file}: {name} must be {wanted} as the tensors say, "
                f"got {case.fields[name]!r}"
            )
    vae = AutoEncoder(config, device="meta").eval()
    load_weights_(vae, case)
    return vae


def load_weights_(module: nn.Module, case: Case) -> None:
    """Gives a module on the meta device memory, and the weights of a case.

    Raises:
        ValueError: the case does not hold exactly the tensors of the module.
    """
    check_tensors(official_tensors(module), case.weights, where=case.tensor_file)
    module.to_empty(device="cpu")
    module.load_state_dict(case.weights)
