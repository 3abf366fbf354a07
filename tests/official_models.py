# SPDX-License-Identifier: Apache-2.0
"""The official code on the CPU: a checkout is imported, with stand-ins for what a CPU lacks.

Replaced are flash-attn (by torch's attention), the casts to bfloat16 (by float32), and names that
newer transformers no longer has. Nothing of the checkout is changed or kept.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.testing import Case

PACKAGES = ("modeling", "data", "flash_attn")


class _Float32Torch:
    """torch, but for a bfloat16 that is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    **_: Any,
) -> Tensor:
    """flash_attn_varlen_func: q [T, H, d], k and v [S, G, d]; the last query sees the last key."""
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        cols = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        own_q, own_k, own_v = (t.transpose(0, 1)[None] for t in (q[rows], k[cols], v[cols]))
        num_q, num_k = own_q.shape[2], own_k.shape[2]
        # Without a mask torch takes its fastest way, as flash-attn would.
        mask = torch.ones(num_q, num_k, dtype=torch.bool).tril(num_k - num_q) if causal else None
        out = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(contents)
    return module


def _default_rope(config: Any, device: Any = None, **_: Any) -> tuple[Tensor, float]:
    width = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    return 1.0 / (config.rope_theta**exponents), 1.0


@contextmanager
def official_code(repo: Path) -> Iterator[SimpleNamespace]:
    """Inside, the checkout's modules are importable; yields `bagel`, `navit` and `siglip`."""
    from transformers import modeling_rope_utils, utils

    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_official(name)}
    rope = modeling_rope_utils.ROPE_INIT_FUNCTIONS
    stand_ins: list[tuple[Any, str, Any]] = [
        (modeling_rope_utils, "rope_config_validation", lambda config: None),
        (utils, "is_flash_attn_greater_or_equal_2_10", lambda: False),
        *(
            (utils, name, lambda *_, **__: lambda f: f)
            for name in (
                "add_start_docstrings",
                "add_start_docstrings_to_model_forward",
                "replace_return_docstrings",
            )
        ),
    ]
    added = [(owner, name) for owner, name, _ in stand_ins if not hasattr(owner, name)]
    for owner, name, value in stand_ins:
        if (owner, name) in added:
            setattr(owner, name, value)
    has_rope = "default" in rope
    rope.setdefault("default", _default_rope)
    # The autoencoder of the checkout, which the tests do without, wants einops.
    absent = {
        "transformers.modeling_attn_mask_utils": {"_prepare_4d_attention_mask": None},
        "einops": {"rearrange": None},
    }
    absent = {n: c for n, c in absent.items() if importlib.util.find_spec(n) is None}
    sys.modules.update({name: _module(name, **contents) for name, contents in absent.items()})
    sys.modules["flash_attn"] = _module("flash_attn", flash_attn_varlen_func=varlen_attention)
    sys.path.insert(0, str(repo))
    try:
        navit = importlib.import_module("modeling.bagel.qwen2_navit")
        navit.torch = _Float32Torch()  # type: ignore[attr-defined]
        # transformers 5 gives model outputs a field that the subclass here does not know.
        navit.BaseNavitOutputWithPast = SimpleNamespace  # type: ignore[attr-defined]
        yield SimpleNamespace(
            bagel=importlib.import_module("modeling.bagel.bagel"),
            navit=navit,
            siglip=importlib.import_module("modeling.bagel.siglip_navit"),
        )
    finally:
        sys.path.remove(str(repo))
        for name in [name for name in sys.modules if _is_official(name)]:
            del sys.modules[name]
        sys.modules.update(saved)
        for owner, name in added:
            delattr(owner, name)
        if not has_rope:
            del rope["default"]
        for name in absent:
            del sys.modules[name]


def _is_official(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def official_bagel(code: SimpleNamespace, case: Case, **llm_fields: Any) -> Any:
    """Returns the official model of a case, in eval mode, with the weights of the case.

    Args:
        llm_fields: further fields of llm_config.json.
    """
    fields = case.fields
    llm = code.navit.Qwen2Config(
        **fields["llm_config"],
        layer_module="Qwen2MoTDecoderLayer",
        qk_norm=True,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    for name, value in llm_fields.items():
        setattr(llm, name, value)
    vit = code.siglip.SiglipVisionConfig(**fields["vit_config"], rope=False)
    config = code.bagel.BagelConfig(
        visual_gen=True,
        visual_und=True,
        vae_config=SimpleNamespace(**fields["vae_config"]),
        latent_patch_size=fields["latent_patch_size"],
        max_latent_size=fields["max_latent_size"],
        vit_max_num_patch_per_side=fields["vit_max_num_patch_per_side"],
        connector_act="gelu_pytorch_tanh",
        timestep_shift=fields["timestep_shift"],
    )
    config.llm_config, config.vit_config = llm, vit
    language_model = code.navit.Qwen2ForCausalLM(llm)
    vit_model = code.siglip.SiglipVisionModel(vit)
    model = code.bagel.Bagel(language_model, vit_model, config)
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
    own = model.state_dict()
    fitting = {key: tensor for key, tensor in case.weights.items() if key in own}
    model.load_state_dict(fitting, strict=False)
    sparse = {key for key in case.weights if ".experts." in key or ".gate" in key}
    assert case.weights.keys() - fitting.keys() <= sparse
    return model.eval()


@torch.no_grad()
def official_image(code: SimpleNamespace, model: Any, case: Case) -> Tensor:
    """Returns the latent that the official sampler makes of the prompt and noise of a case."""
    fields = case.fields
    tokenizer = SimpleNamespace(encode=lambda prompt: prompt)
    ids, markers = fields["prompt_ids"], fields["new_token_ids"]
    size = [tuple(fields["image_size"])]

    def cache() -> Any:
        return code.navit.NaiveCache(fields["llm_config"]["num_hidden_layers"])

    prompt, lens, rope = model.prepare_prompts([0], [0], ids, tokenizer, markers)
    context = model.forward_cache_update_text(cache(), **prompt)
    inputs = model.prepare_vae_latent(lens, rope, size, markers)
    inputs["packed_init_noises"] = case.tensors["init_noise"].clone()
    without = model.prepare_vae_latent_cfg([0], [0], size)
    options = {
        name: fields[name]
        for name in (
            "num_timesteps", "timestep_shift", "cfg_renorm_min", "cfg_renorm_type",
            "cfg_interval", "cfg_text_scale", "cfg_img_scale",
        )
    }  # fmt: skip
    options |= {
        "cfg_text_past_key_values": cache(),
        "cfg_text_packed_position_ids": without["cfg_packed_position_ids"],
        "cfg_text_packed_query_indexes": without["cfg_packed_query_indexes"],
        "cfg_text_key_values_lens": without["cfg_key_values_lens"],
        "cfg_text_packed_key_value_indexes": without["cfg_packed_key_value_indexes"],
    }
    known = inspect.signature(model.generate_image).parameters
    given = {name: value for name, value in (inputs | options).items() if name in known}
    latent: Tensor = model.generate_image(past_key_values=context, **given)[0]
    return latent
