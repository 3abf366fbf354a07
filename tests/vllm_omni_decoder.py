# SPDX-License-Identifier: Apache-2.0
"""Runs our blocks inside vLLM-Omni's own BAGEL decoder on the CPU; test_engines_vllm_omni.py.

    python tests/vllm_omni_decoder.py SITE CHECKPOINT OUT RANK PROCESSES

The decoder, its linear layers, attention, weight loaders and groups of processes are those of the
released wheels in SITE. Not imported are `NOT_RUN`, which only GPUs and servers use, and what the
`__init__` of the packages `BARE` imports beside the modules that are wanted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_unified.ops import reference

NOT_RUN = (
    "vllm._aiter_ops",  # kernels of ROCm
    "vllm.distributed.kv_transfer",
    "vllm.distributed.kv_transfer.kv_connector",
    "vllm.distributed.kv_transfer.kv_connector.utils",
    "vllm.model_executor.model_loader.reload",
    "vllm.v1.structured_output",
    "vllm_omni.diffusion.model_loader.diffusers_loader",  # which imports every model
)
BARE = (
    "vllm.model_executor.model_loader",
    "vllm_omni",
    "vllm_omni.diffusion",
    "vllm_omni.diffusion.attention",
    "vllm_omni.diffusion.cache",
    "vllm_omni.diffusion.distributed",
    "vllm_omni.model_executor",
    "vllm_omni.model_executor.layers",
)


class NotRun(ModuleType):
    """A module of whose names all are False, called or not."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return NotRun(name)

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **options: Any) -> bool:
        return False


class Oracle(nn.Module):
    """A sparse FFN in plain torch, of the tensors that a checkpoint has for it."""

    def __init__(self, weights: dict[str, Tensor], top_k: int) -> None:
        super().__init__()
        gate = weights["gate.weight"].float()
        parts = [
            [weights[f"experts.{e}.{name}.weight"].float() for e in range(len(gate))]
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        experts = torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2], dim=1)
        self.compute = lambda x: reference.sparse_ffn(x, gate, top_k, *experts)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.float()).to(x.dtype)


def prepare(site: Path) -> None:
    """Makes the modules of both packages importable without a GPU."""
    sys.path.insert(0, str(site))
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    importlib.import_module("vllm")
    for name in BARE:
        module = ModuleType(name)
        module.__path__ = [str(site / name.replace(".", "/"))]
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    sys.modules |= {name: NotRun(name) for name in NOT_RUN}
    # vLLM-Omni knows no CPU: attention by torch, as it is with CUDA.
    platform = importlib.import_module("vllm_omni.platforms").current_omni_platform
    sdpa = importlib.import_module("vllm_omni.diffusion.attention.backends.sdpa")
    platform.get_diffusion_attn_backend_cls = lambda **_: f"{sdpa.__name__}.SDPABackend"
    sdpa.SDPAImpl.forward = sdpa.SDPAImpl.forward_cuda


def by_name(stage: Any, step: Any) -> dict[str, Any]:
    """Returns what vLLM-Omni finds by the name of the pipeline and by what its classes declare."""
    of = "vllm_omni.diffusion"
    diffusion = importlib.import_module(f"{of}.registry")
    readers = importlib.import_module("vllm_omni.model_executor.models.registry").OmniModelRegistry
    importlib.import_module("sparse_unified.engines").register_vllm_omni()
    registries = {
        "BagelPipeline": diffusion.DiffusionModelRegistry,
        "OmniBagelForConditionalGeneration": readers,
    }
    classes = [own._try_load_model_cls(name) for name, own in registries.items()]

    modules = importlib.import_module(f"{of}.offloader.module_collector").ModuleDiscovery
    blocks = importlib.import_module(f"{of}.offloader.block_discovery").get_blocks_from_dit
    [decoder] = modules.discover(stage).dits
    offloaded = [name for name, own in decoder.named_modules() if own in blocks(decoder)[1]]
    sharded = [
        name
        for name, own in decoder.named_modules()
        if any(condition(name, own) for condition in decoder._hsdp_shard_conditions)
    ]

    settings = importlib.import_module(f"{of}.data").DiffusionCacheConfig()
    cache = importlib.import_module(f"{of}.cache.cachedit.backend").CacheDiTBackend(settings)
    ran: list[int] = []
    counter = next(iter(stage._sparse.values())).register_forward_hook(lambda *_: ran.append(1))
    cache.enable(stage)
    cache.refresh(stage, 10)
    steps = [(step(), len(ran)) for _ in range(10)]
    cache.disable(stage)
    counter.remove()
    stage.bagel = nn.Identity()  # of the whole pipeline, which TeaCache hooks
    importlib.import_module(f"{of}.cache.teacache.backend").TeaCacheBackend(settings).enable(stage)
    return {
        "registered": [f"{own.__module__}.{own.__name__}" for own in classes],
        "offloaded": offloaded,
        "sharded": sharded,
        "cached": [out for out, _ in steps],
        "ran": [count for _, count in steps],
        "hooked": hasattr(stage.bagel, "_hook_registry"),
    }


def run(checkpoint: Path, rank: int, processes: int, meet: Path) -> dict[str, Any]:
    """Returns what a denoising step of the decoder gives, and what the process held for it.

    One process alone computes the step by the oracle of the ops, too.
    """
    config = importlib.import_module("vllm.config")
    groups = importlib.import_module("vllm_omni.diffusion.distributed.parallel_state")
    decoder = importlib.import_module("vllm_omni.diffusion.models.bagel.bagel_transformer")
    ours = importlib.import_module("sparse_unified.engines.vllm_omni")
    method = f"file://{meet}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=processes)
    groups.init_distributed_environment(processes, rank, method, rank, "gloo")
    groups.initialize_model_parallel(tensor_parallel_size=processes, backend="gloo")
    decoder.BaseNavitOutputWithPast = SimpleNamespace  # made for transformers before 5.15
    torch.set_default_dtype(torch.bfloat16)
    settings = SimpleNamespace(  # a whole VllmConfig starts an engine
        compilation_config=config.CompilationConfig(custom_ops=["none"]),  # those are for GPUs
        kernel_config=SimpleNamespace(linear_backend="auto"),
    )
    with config.set_current_vllm_config(settings):
        llm = decoder.Qwen2MoTConfig.from_json_file(str(checkpoint / "llm_config.json"))
        llm.qk_norm, llm.tie_word_embeddings = True, False
        llm.layer_module = "Qwen2MoTDecoderLayer"

        class Built(ours._built_in.BagelPipeline):
            """The part of the pipeline that reads the weights of its language model."""

            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.device = torch.device("cpu")
                self.language_model = decoder.Qwen2MoTForCausalLM(llm)

            def load_weights(self, weights: Any) -> set[str]:
                prefix = "language_model."
                own = ((n.removeprefix(prefix), w) for n, w in weights if n.startswith(prefix))
                return {prefix + name for name in self.language_model.load_weights(own)}

        stage: Any = type("BagelPipeline", (ours.WithExperts, Built), {})()
        opened = ours.Checkpoint(checkpoint)
        stage.put_in_blocks(opened)
        weights = load_file(checkpoint / "ema.safetensors")
        loaded = stage.load_weights(weights.items())
        missing = {name for name, _ in stage.named_parameters()} - loaded
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2 + 24, llm.hidden_size, generator=generator)
        inputs: dict[str, Any] = {
            "packed_query_sequence": x.bfloat16(),
            "query_lens": torch.tensor([len(x)]),
            "packed_query_position_ids": torch.zeros(len(x), dtype=torch.long),
            "past_key_values": decoder.NaiveCache(llm.num_hidden_layers),
            "update_past_key_values": False,
            "is_causal": False,
            "mode": "gen",
            "packed_text_indexes": torch.tensor([0, len(x) - 1]),
            "packed_vae_token_indexes": torch.arange(1, len(x) - 1),
        }

        @torch.inference_mode()
        def step() -> list[Any]:
            out: Tensor = stage.language_model(**inputs).packed_query_sequence
            return out.float().tolist()

        held = {
            layer: list(getattr(block, "block", block).gate_proj.shape)
            for layer, block in stage._sparse.items()
        }
        found = {"out": step(), "missing": sorted(missing), "held": held}
        if processes == 1:
            found |= by_name(stage, step)
        for layer in stage._sparse if processes == 1 else ():
            prefix = f"language_model.model.layers.{layer}.mlp_moe_gen."
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            stage.language_model.model.layers[layer].mlp_moe_gen = Oracle(own, opened.top_k)
        return found | {"oracle": step()}


if __name__ == "__main__":
    site, checkpoint, out = (Path(word).resolve() for word in sys.argv[1:4])
    rank, processes = map(int, sys.argv[4:])
    prepare(site)
    made = run(checkpoint, rank, processes, out.parent / f"meet{processes}")
    if rank == 0:
        out.write_text(json.dumps(made))
