# SPDX-License-Identifier: Apache-2.0
"""Plants mistakes one at a time and asks whether the tests that should notice do.

    python experiments/mutations.py [--only TEXT] [--kind python|cpu|emulated] [--json FILE]

Works in a copy of the tree under build/mutations, with its own builds of the library (CPU) and of
the ops over emulated CUDA kernels, which are made once and then compiled piece by piece. Each
mutation names the tests that must fail; one that they let pass is a hole. The exit status is 1 when
a mutation was missed, does not apply any more, or does not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutations"  # and of each kind, where one is chosen
EMULATED = "SPARSE_UNIFIED_TEST_EMULATED"
LIBRARY = "sparse_unified/_C.abi3.so"

CHECKS, ATTACK = "tests/ops/test_checks.py", "tests/ops/test_attack.py"
MOE = "tests/test_nn_sparse_moe.py"
BACKEND = "tests/ops/test_backend.py"
DOCTOR = "tests/test_doctor.py"
LORA = "tests/test_adapt_lora.py"


@dataclass(frozen=True, slots=True)
class Mutation:
    """A mistake: `old`, which stands once in `file`, becomes `new`; `tests` must fail.

    Args:
        tests: arguments of pytest; patterns of files are expanded.
        kind: what is to be built before: nothing ("python"), the library ("cpu"), or the ops over
            emulated kernels ("emulated").
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    kind: str = "python"


def cpu(file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(f"csrc/{file}", old, new, tests or (CHECKS,), "cpu")


def emulated(file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(f"csrc/{file}", old, new, tests or (CHECKS,), "emulated")


def python(file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(f"sparse_unified/{file}", old, new, tests)


def k(word: str) -> tuple[str, str, str]:
    """The checks of the ops whose names hold a word."""
    return (CHECKS, "-k", word)


def attack(word: str) -> tuple[str, str, str]:
    """The attacks on the ops whose names hold a word."""
    return (ATTACK, "-k", word)


CPU_KERNELS = (
    cpu("cpu/combine.cpp", "acc += token.weight(k) * load(", "acc -= token.weight(k) * load("),
    cpu("cpu/combine.cpp", "weight_offset + weights[k] : 1.0f", "weights[k] : 1.0f", *k("combine")),
    cpu(
        "cpu/combine.cpp",
        "scale(grad_out, params.weights[row]",
        "scale(grad_out, 1.0f",
        *k("gradients_of_experts"),
    ),
    cpu("cpu/permute.cpp", "params.x.columns % kLineBytes == 0 &&", "true &&", *k("caches")),
    cpu("cpu/permute.cpp", "y + rows[k] * row_bytes", "y + rows[0] * row_bytes", *k("permute")),
    cpu(
        "cpu/route_topk.cpp",
        "return !std::isnan(b) && a >= b",
        "return !std::isnan(b) && a > b",
        *k("route"),
    ),
    cpu(
        "cpu/route_topk.cpp", "index > e ? own - 1 : own", "index > e ? own : own - 1", *k("route")
    ),
    cpu(
        "cpu/route_topk.cpp",
        "logits == 0.0f ? Int{} : bits",
        "bits - bits == Int{} ? bits : bits",
        *k("route_of_extreme"),
    ),
    cpu("cpu/route_topk.cpp", "sums[e] += acc[e];", "sums[e] = acc[e];", *k("gradients_of_route")),
    cpu(
        "cpu/route_topk.cpp",
        "acc += grad[e] * (n == kLanes",
        "acc += grad[0] * (n == kLanes",
        *k("gradients_of_route"),
    ),
    cpu(
        "cpu/sort_by_expert.cpp",
        "next[params.topk_idx[i]]++",
        "next[params.topk_idx[i]]",
        *k("sort"),
    ),
    cpu(
        "cpu/sort_by_expert.cpp",
        "params.topk_idx[i] >= params.num_experts",
        "false",
        *attack("bad_argument"),
    ),
    cpu(
        "cpu/swiglu.cpp",
        "(1.0f + gate * (1.0f - s))",
        "(1.0f + gate * s)",
        *k("gradients_of_experts"),
    ),
    cpu(
        "cpu/swiglu.cpp",
        "grad * silu, silu * up}",
        "grad * s, silu * up}",
        *k("gradients_of_experts"),
    ),
    cpu(
        "cpu/ffn_importance.cpp",
        "size > params.threshold",
        "size >= params.threshold",
        *k("importance"),
    ),
    cpu("cpu/ffn_importance.cpp", "if (weight == 0) continue;", "", *k("importance")),
    cpu(
        "cpu/ffn_importance.cpp",
        "sums.squares += weight * hidden * hidden",
        "sums.squares += weight * hidden * size",
        *k("importance"),
    ),
    cpu("cpu/ffn_tiles.h", "return r % 2 == 0 ?", "return r % 2 != 0 ?", *k("ffn")),
    cpu(
        "cpu/ffn_panels.h",
        "std::min(v * kLanes + lane, count - 1)",
        "v * kLanes + lane",
        *k("ffn"),
    ),
    cpu(
        "cpu/ffn_tiles.h", "block == 0 ? acc[r][v] : sums[r][v] + acc[r][v]", "acc[r][v]", *k("ffn")
    ),
    cpu(
        "cpu/ffn_panels.h",
        "__builtin_shuffle(low01, low23, kOdd)",
        "__builtin_shuffle(low01, low23, kEven)",
        *k("ffn"),
    ),
    cpu(
        "cpu/grouped_ffn_tiles.h",
        "adds ? weights + v * kLanes",
        "adds ? weights",
        *k("any_routing"),
    ),
    cpu("cpu/ffn_panels.h", "num_rows > 3 * kHalfLanes", "num_rows > 4 * kHalfLanes", *k("ffn")),
    cpu("cpu/grouped_ffn_tiles.h", "(1u << num_columns) - 1", "(1u << num_columns) - 2", *k("ffn")),
    cpu(
        "cpu/ffn_panels.h",
        "panel + 2 * stride + lane, c",
        "panel + 2 * stride + lane, d",
        *k("ffn"),
    ),
    cpu(
        "cpu/ffn_panels.h", "_mm_set1_ps(weights[row + i])", "_mm_set1_ps(weights[row])", *k("ffn")
    ),
    # Of bf16 alone, on processors that multiply it.
    cpu("cpu/ffn_tiles.h", "load(lane)) | bits << 16", "load(lane)) | bits", *k("ffn")),
    cpu("cpu/ffn_tiles.h", "multiply_tiles<1, 5, 6>()", "multiply_tiles<1, 4, 6>()", *k("ffn")),
    cpu("cpu/ffn_tiles.h", "(uint64_t{1} << n) - 1", "(uint64_t{2} << n) - 1", *k("ffn")),
    cpu(
        "cpu/vector.h",
        "+ ((bits >> 16) & 1u)) >> 16",
        ") >> 16",
        *k("combine"),
    ),
    cpu(
        "cpu/vector.h",
        "bit_cast<Float>(magnitude) * 0x1p112f",
        "bit_cast<Float>(magnitude) * 0x1p111f",
    ),
)

BINDINGS = (
    cpu("bindings/common.cpp", "check(has_memory(tensor),", "check(true,", *attack("bad_argument")),
    cpu(
        "bindings/context.cpp",
        "runs_on_cuda(indices) ? as_contiguous(indices) : contiguous_copy(indices)",
        "as_contiguous(indices)",
        *attack("another_thread"),
    ),
    cpu(
        "bindings/library.cpp",
        'fail(kName.chars, "arguments", "leave enough memory", "no room for ", error.what());',
        "throw std::runtime_error(error.what());",
        *attack("out_of_memory"),
    ),
    cpu(
        "bindings/arguments.cpp",
        'check_size(op, "gate", gate, 1, x.size(1), "the hidden size of x");',
        "",
        *attack("bad_argument"),
    ),
    cpu(
        "bindings/arguments.cpp",
        'check_dtype(op, "row_token", row_token, ScalarType::Int);\n  sizes.num_rows',
        "sizes.num_rows",
        *attack("bad_argument"),
    ),
    cpu(
        "bindings/arguments.cpp", "sizes.width % block_size == 0,", "true,", *attack("bad_argument")
    ),
    cpu(
        "bindings/pruned_ffn_arguments.cpp",
        "if (seen[data[i]]) {",
        "if (false) {",
        *attack("bad_argument"),
    ),
    cpu(
        "bindings/pruned_ffn_arguments.cpp",
        "slab->runs.back().count += block_size;",
        "",
        *k("pruned"),
    ),
    cpu("bindings/pruned_ffn_arguments.cpp", "slab->width += block_size;", "", *k("pruned")),
    cpu(
        "bindings/combine.cpp",
        'if (!context.is_cuda()) check_indices(kOp, "token_rows", token_rows, y.size(0));',
        "",
        *attack("bad_argument"),
    ),
    cpu(
        "bindings/grouped_ffn_combine.cpp",
        "row_weights[rows[slot]] = weight_offset + values[slot];",
        "row_weights[rows[slot]] = weight_offset + values[begin * top_k];",
        *k("any_routing"),
    ),
    cpu(
        "bindings/grouped_ffn_combine_backward.cpp",
        "(part.begin - rows.begin) * h",
        "0 * h",
        *k("gradients_of_experts"),
    ),
)

CUDA_KERNELS = (
    emulated("cuda/combine.cu", "if (k + 4 <= p.top_k) {", "if (k + 4 < p.top_k) {", *k("combine")),
    emulated(
        "cuda/combine.cu",
        "fmaf(weight, values[c], sums[c])",
        "fmaf(weight, values[c], 0.0f)",
        *k("combine"),
    ),
    emulated(
        "cuda/combine.cu", "sync_threads();\n\n  const TokenRows", "const TokenRows", *k("combine")
    ),
    emulated("cuda/grouped_ffn_row_weights.cu", "part < p.num_parts", "part < 1", *k("gradients")),
    emulated(
        "cuda/grouped_ffn_grad_hidden_sm80.cu", "sum = warp_sum<4>(sum);", "", *k("gradients")
    ),
    emulated(
        "cuda/grouped_ffn_grad_hidden_sm90a.cu",
        "hidden[i] = weight * gradient.hidden;",
        "hidden[i] = gradient.hidden;",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/grouped_ffn_grad_hidden_sm90a.cu",
        "boxes.is_narrow ? &params.narrow_down_proj : &params.down_proj",
        "&params.down_proj",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/persistent_gemm_sm90a.h",
        "operand_descriptor(shared, Major::kMN, kBoxBytes / 2, kNarrowRowBytes)",
        "operand_descriptor(shared, Major::kMN, kBoxBytes)",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/persistent_gemm_sm90a.h",
        "ceil_div(width, kNarrowElements) * kNarrowElements",
        "width / kNarrowElements * kNarrowElements",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "device/mainloop_sm90a.h",
        "? kDescriptorStepNarrow",
        "? kDescriptorStepMN",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/permute.cu", "unit + kStep - kWarpSize < num_units", "unit < num_units", *k("permute")
    ),
    emulated("cuda/permute.cu", "if (row >= p.num_rows) return;", "", *k("permute")),
    emulated(
        "cuda/sort_by_expert.cu",
        "before += b < block_idx ? count : 0;",
        "before += b <= block_idx ? count : 0;",
        "tests/ops",
        "-k",
        "sort",
    ),
    emulated(
        "cuda/sort_by_expert.cu", "((1u << lane_idx()) - 1)", "((2u << lane_idx()) - 1)", *k("sort")
    ),
    emulated(
        "cuda/sort_by_expert.cu",
        "row.peers &= is_set ? set : ~set;",
        "row.peers &= set;",
        *k("sort"),
    ),
    emulated(
        "cuda/route_topk.cu",
        "other < expert ? !(value < logit) : !(value <= logit)",
        "!(value <= logit)",
        *k("route"),
    ),
    emulated(
        "cuda/route_topk.cu",
        "rank += is_nan ? is_before_nan : is_before;",
        "rank += is_before;",
        *k("route_of_extreme"),
    ),
    emulated(
        "cuda/route_topk.cu",
        "sums[i / 4 / kTiles][i / 4 % kTiles][i % 4]",
        "sums[i / 4 / kTiles][i / 4 % kTiles][i % 4 ^ 1]",
        *k("route"),
    ),
    emulated(
        "cuda/grouped_ffn_up_sm80.cu",
        "row % 16 < 8 ? gate_proj",
        "row % 16 >= 8 ? gate_proj",
        *k("ffn"),
    ),
    emulated(
        "cuda/grouped_ffn_up_sm80.cu",
        "row < at.end_row && neuron < width",
        "row <= at.end_row && neuron < width",
        CHECKS,
    ),
    emulated(
        "cuda/grouped_ffn_down_sm80.cu",
        "min(first_column + row, hidden_size - 1)",
        "first_column + row",
        CHECKS,
    ),
    emulated(
        "cuda/grouped_ffn_down_sm80.cu",
        "neuron_columns(ffn).of(at.group), width",
        "neuron_columns(ffn).of(0), width",
        *k("ffn"),
    ),
    emulated(
        "cuda/rows_gemm_sm90a.h",
        "tile.group * params.group_rows + tile.n * kColumns",
        "tile.n * kColumns",
        "tests/ops/test_emulated.py",
        "-k",
        "anywhere",
    ),
    emulated(
        "cuda/grouped_ffn_grad_hidden_sm80.cu",
        "store_vector(grad_row + width, narrow<T>(up))",
        "store_vector(grad_row + width, narrow<T>(gate))",
        *k("gradients"),
    ),
    emulated(
        "cuda/grouped_ffn_up_sm90a.cu",
        "is_valid[i] = row_idx < tile.end_row;",
        "is_valid[i] = row_idx <= tile.end_row;",
        CHECKS,
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/grouped_ffn_grad_hidden_sm90a.cu",
        "kBlocks == 1 ? 0 : cluster_rank() * part_boxes",
        "0",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/persistent_gemm_sm90a.h",
        "if constexpr (Gemm::kFindsAhead) tile = next;",
        "",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/persistent_gemm_sm90a.h",
        "done = tile;",
        "done = next;",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/grouped_ffn_grad_weights_sm90a.cu",
        "kIsDown ? boxes.is_narrow : box",
        "kIsDown ? 0 : box",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/rows_gemm_sm90a.h",
        "return num_neurons <= kNarrowElements;",
        "return num_neurons <= 2 * kNarrowElements;",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/rows_gemm_sm90a.h",
        "halves ? kNarrowRowBytes : kSwizzleRowBytes",
        "kSwizzleRowBytes",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/rows_gemm_sm90a.h",
        "k < params.num_k ? k : k - params.num_k",
        "k",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/grouped_ffn_config.cpp",
        "gemm.num_k >= kMinK && ",
        "",
        "tests/ops/test_emulated.py",
    ),
    emulated(
        "cuda/grouped_ffn_up_sm90a.cu",
        "neuron < params.expert_width ? neurons(neuron)",
        "neuron <= params.expert_width ? neurons(neuron)",
        CHECKS,
    ),
)

PACKAGE = (
    python(
        "ops/grouped_ffn_combine.py",
        "(5, 6, 7)",
        "(5, 7, 6)",
        *k("each_argument"),
    ),
    python(
        "ops/grouped_ffn.py",
        "lambda a: a.x.new_empty((a.row_token.shape[0], a.x.shape[1]))",
        "lambda a: a.x.new_empty((a.x.shape[0], a.x.shape[1]))",
        *k("opcheck"),
    ),
    python("ops/registration.py", 'refuse_gradient(f"{op}_backward")', "", *k("second")),
    python("nn/sparse_moe.py", "*maps, *experts, weight_offset)", "*maps, *experts)", MOE),
    python("nn/sparse_moe.py", "weight = weight + router.get_delta_weight(adapter)", "pass", LORA),
    python("surgery/lora.py", "(self.scaling * up) @ down", "up @ down", LORA),
    python("surgery/lora.py", "delta.transpose(0, 1).flatten(1)", "delta.flatten(0, 1).T", LORA),
    python("surgery/ffn.py", "        layer.merge()\n", "", LORA),
    python("cli/options.py", "[*flags, *given]", "[*given, *flags]", "tests/test_adapt_run.py"),
    python(
        "nn/sparse_moe.py",
        "return y + y * weight.to(y.dtype)",
        "return y * weight.to(y.dtype)",
        MOE,
    ),
    python(
        "nn/sparse_moe.py",
        "vit = route(tokens[vit_indexes], gate_img",
        "vit = route(tokens[vit_indexes], gate",
        MOE,
    ),
    python(
        "nn/sparse_moe.py",
        "if least < 0 or most >= num_tokens:",
        "if least < 0:",
        MOE,
    ),
    python(
        "nn/sparse_moe.py",
        "active not in KERNELS and _is_autocast",
        "_is_autocast",
        MOE,
        "tests/ops/test_backend.py",
    ),
    python("ops/choices.py", "if key.endswith(own):", "if key:", DOCTOR),
    python("doctor.py", "() if is_torchs else own[:position]", "()", DOCTOR),
    python("doctor.py", 'environment[suites.VARIABLE] = f"family={family}"', "pass", DOCTOR),
    python("ops/backend.py", "and num_rows < 2 * rows", "", BACKEND),
    python("ops/backend.py", "trains == torch.is_grad_enabled() and ", "", BACKEND),
    python("ops/backend.py", "choices.GROUPED_MM in choices.refused(device)", "False", BACKEND),
    python("checks/__init__.py", "json.loads(line), stall", "json.loads(line), 1e9", DOCTOR),
    python(
        "ops/backend.py",
        "@torch.compiler.assume_constant_result  # the compiler could not trace it",
        "",
        BACKEND,
    ),
    python("ops/backend.py", "4 if newest == 12 else 0", "0", BACKEND),
    python("ops/backend.py", "own[0] == capability[0]", "True", BACKEND),
    python("ops/backend.py", "dtype == torch.bfloat16 and prefers", "prefers", BACKEND),
    python("nn/sparse_moe.py", " and tokens.shape[0] > 0", "", BACKEND),
    python(
        "ops/backend.py", "_FP8_CAPABILITIES = (9, 10)", "_FP8_CAPABILITIES = (8, 9, 10)", BACKEND
    ),
    python("ops/composed.py", ".clamp(min=1e-12)", "", BACKEND),
    python("ops/composed.py", "scales[row_token]", "scales[row_token.sort().values]", BACKEND),
    python("ops/composed.py", "expert_offsets[1:]", "expert_offsets[:-1]", *k("grouped_mm")),
    python("experts/layout.py", "rows[1::2] = rows[1::2].flip(1)", "", "tests/test_experts.py"),
    python(
        "experts/layout.py",
        "start = self.shared_width + expert * self.expert_width",
        "start = expert * self.expert_width",
        "tests/test_experts.py",
    ),
    python(
        "experts/layout.py",
        "loss[asking].sort(descending=True, stable=True)",
        "loss[asking].sort(descending=False, stable=True)",
        "tests/test_experts.py",
    ),
    python(
        "experts/keep.py",
        "relative[relative.argmax()] = torch.inf",
        "pass",
        "tests/test_surgery_*.py",
    ),
    python(
        "experts/keep.py",
        "return list(range(1, num_layers - 1))",
        "return list(range(num_layers))",
        "tests/test_checkpoint_convert.py",
        "tests/test_surgery_*.py",
        "tests/test_experts.py",
    ),
    python(
        "experts/keep.py",
        "values * torch.linalg.vector_norm(o_proj",
        "torch.linalg.vector_norm(o_proj",
        "tests/test_surgery_*.py",
    ),
    python(
        "experts/router.py",
        "residual = (goal - vectors",
        "residual = (goal + vectors",
        "tests/test_experts.py",
    ),
    python(
        "experts/router.py",
        "1 - chosen * (1 + logits)",
        "1 - chosen",
        "tests/test_experts.py",
    ),
    python(
        "surgery/cuts.py",
        'Cut(1 if name == "down_proj" else 0',
        'Cut(1 if name == "up_proj" else 0',
        "tests/test_prune_*.py",
    ),
    python("surgery/cuts.py", "first.keep[cut.keep]", "cut.keep", "tests/test_prune_*.py"),
    python(
        "surgery/cuts.py",
        "if component not in kept and len(kv_places) == len(shape.kv_heads):",
        "if component not in kept:",
        "tests/test_surgery_*.py",
    ),
    python(
        "bagel/sampler.py",
        "differences[-1] - older) / (time - then)",
        "differences[-1] - older) / (then - time)",
        "tests/test_bagel_sampler.py",
    ),
    python(
        "bagel/sampler.py",
        "(times > low) & (times <= high)",
        "(times >= low) & (times <= high)",
        "tests/test_bagel_sampler.py",
    ),
    python(
        "bagel/sampler.py",
        "return shift * times / (1 + (shift - 1) * times)",
        "return shift * times / (1 + shift * times)",
        "tests/test_bagel_sampler.py",
        "tests/test_replay.py",
    ),
    python(
        "bagel/sampler.py",
        "clamp(min=config.cfg_renorm_min, max=1.0)",
        "clamp(min=config.cfg_renorm_min)",
        "tests/test_bagel_sampler.py",
        "tests/test_replay.py",
    ),
    python(
        "bagel/attention.py",
        "torch.cat([-angles, angles], dim=-1)",
        "torch.cat([angles, angles], dim=-1)",
        "tests/test_replay.py",
    ),
    python(
        "bagel/packing.py",
        "_NOISED: 0}.get(kind, 1)",
        "_NOISED: 1}.get(kind, 1)",
        "tests/test_training_forward.py",
    ),
    python(
        "bagel/packing.py",
        "segment[:, None]) & ~is_noised[:, None]",
        "segment[:, None])",
        "tests/test_training_forward.py",
    ),
    python(
        "checkpoint/safetensors_io.py",
        "if start + begin != position:",
        "if start + begin < position:",
        "tests/test_checkpoint_reader.py",
        "tests/test_hostile_files.py",
    ),
    python(
        "checkpoint/files.py",
        "yield handle\n        os.fsync(handle)",
        "yield handle",
        "tests/test_checkpoint_atomic.py",
    ),
    python(
        "checkpoint/files.py",
        "if stamp != stamp_of(status):",
        "if False:",
        "tests/test_checkpoint_atomic.py",
    ),
    python(
        "checkpoint/rewrite.py",
        "        source.refuse_change()\n",
        "",
        "tests/test_checkpoint_atomic.py",
    ),
    python(
        "checkpoint/safetensors_io.py",
        '" " * (-len(text.encode()) % 8)',
        '""',
        "tests/test_checkpoint_reader.py",
        "tests/test_checkpoint_convert.py",
        "tests/test_frozen.py",
    ),
    python("adapt/optimizer.py", "limit / norm)", "norm / limit)", "tests/test_adapt_trainer.py"),
    python(
        "adapt/optimizer.py",
        "1 - self._config.ema_decay",
        "self._config.ema_decay",
        "tests/test_adapt_trainer.py",
    ),
    python(
        "adapt/optimizer.py",
        "total.add_(_local",
        "total.copy_(_local",
        "tests/test_adapt_trainer.py",
    ),
    python(
        "adapt/trainer.py",
        "ahead = batches[1:] if is_judged else []",
        "ahead = batches[:0]",
        "tests/test_adapt_trainer.py",
    ),
    python(
        "bagel/model.py",
        "own.error / whole[key] for",
        "own.error for",
        "tests/test_adapt_trainer.py",
    ),
    python(
        "bagel/sampler.py",
        "np.float32(t) >= np",
        "np.float32(t) > np",
        "tests/test_bagel_execution.py",
    ),
    python(
        "bagel/sampler.py",
        "or top_k != steps[-1].top_k",
        "",
        "tests/test_bagel_execution.py",
    ),
    python(
        "bagel/sampler.py",
        "if (on, top_k) not in run:",
        "if not run:",
        "tests/test_bagel_execution.py",
    ),
    python(
        "bagel/model.py",
        "times = times.index_select(0, batch.time_rows)",
        "times = times[:1]",
        "tests/test_time_router.py",
        "tests/test_training_forward.py",
    ),
    python(
        "bagel/model.py",
        "torch.cat(gen), self.packing, time)",
        "torch.cat(gen), self.packing, 0 * time)",
        "tests/test_time_router.py",
    ),
    python("nn/sparse_moe.py", "nearness.clamp(min=0)", "nearness", "tests/test_time_router.py"),
    python(
        "checkpoint/scores.py",
        "(own := own_hash()) != known",
        "not (own := own_hash())",
        "tests/test_prune_checkpoint.py",
    ),
    python(
        "analysis/evaluate.py", "[shard[0] :: shard[1]]", "[:]", "tests/test_analysis_evaluate.py"
    ),
    python("analysis/sweep.py", "[shard[0] :: shard[1]]", "[:]", "tests/test_analysis_sweep.py"),
    python(
        "analysis/sweep.py",
        '*again["seconds_range"]',
        '*before["seconds_range"]',
        "tests/test_analysis_sweep.py",
    ),
)

MUTATIONS = (*CPU_KERNELS, *BINDINGS, *CUDA_KERNELS, *PACKAGE)


def run(command: Sequence[str], log: Path, **environment: str) -> int:
    with log.open("w") as stream:
        return subprocess.run(
            command,
            cwd=COPY,
            env=os.environ | {"SPARSE_UNIFIED_CUDA": "off"} | environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def refresh() -> None:
    """Brings the copy up to date, so that what has not changed is not compiled again."""
    COPY.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        source, target = ROOT / name, COPY / name
        if source.is_file() and (not target.exists() or target.read_bytes() != source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    bench = COPY / "sparse_unified" / "bench"  # where an installed package has it
    if not bench.exists():
        bench.symlink_to(COPY / "bench")


def build(kind: str, log: Path) -> int:
    """Compiles what a kind of mutation changes."""
    if kind == "cpu":
        return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], log)
    if kind == "emulated":
        tree = ["-S", ".", "-B", "build/cmake", "-G", "Ninja", "--log-level=WARNING"]
        tree += ["-DSPARSE_UNIFIED_SANITIZE=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
        target = ["--target", "sparse_unified_emulated_ops"]
        return run(["cmake", *tree], log) or run(["cmake", "--build", "build/cmake", *target], log)
    return 0


def expanded(tests: Sequence[str]) -> list[str]:
    """Returns arguments of pytest with patterns replaced by the files that match, if any do."""
    found = []
    for test in tests:
        paths = sorted(COPY.glob(test)) if "*" in test else []
        found += [str(path.relative_to(COPY)) for path in paths] or [test]
    return found


def try_mutation(mutation: Mutation, log: Path) -> str:
    """Returns "caught", "missed", or why there is no answer."""
    path = COPY / mutation.file
    text = path.read_text() if path.exists() else ""
    if text.count(mutation.old) != 1:
        return f"stale: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        if build(mutation.kind, log) != 0:
            return "does not compile"
        environment = {EMULATED: "1"} if mutation.kind == "emulated" else {}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", *expanded(mutation.tests)]
        status = run(command, log, **environment)
    finally:
        path.write_text(text)
    if status in (4, 5):
        return "no tests"  # pytest found no file, or nothing in it
    return "missed" if status == 0 else "caught"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="of the files that hold this text")
    parser.add_argument("--kind", choices=("python", "cpu", "emulated"))
    parser.add_argument("--json", type=Path, help="where the outcomes are kept up to date")
    options = parser.parse_args()
    global COPY
    COPY = COPY / (options.kind or "all")
    refresh()
    chosen = [m for m in MUTATIONS if options.only in m.file and options.kind in (None, m.kind)]
    logs = COPY / "build" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    kinds = {m.kind for m in chosen}
    if "cpu" not in kinds:  # what is built is what the other kinds need
        shutil.copyfile(ROOT / LIBRARY, COPY / LIBRARY)
    for kind in sorted(kinds):
        if build(kind, logs / f"{kind}.log") != 0:
            print(f"the tree itself does not build: {logs / kind}.log")
            return 1
    outcomes = []
    last = ""
    for number, mutation in enumerate(sorted(chosen, key=lambda m: m.kind)):
        if last not in ("", "python") and mutation.kind != last:
            build(last, logs / "restore.log")  # the last mistake of a kind is compiled out
        last = mutation.kind
        began = time.monotonic()
        outcome = try_mutation(mutation, logs / f"{number}.log")
        seconds = round(time.monotonic() - began, 1)
        outcomes.append(asdict(mutation) | {"outcome": outcome, "seconds": seconds})
        print(f"{outcome:<8} {seconds:>6} s  {mutation.file}: {mutation.new[:60]!r}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(outcomes, indent=1) + "\n")
    if last not in ("", "python"):
        build(last, logs / "restore.log")
    caught = sum(o["outcome"] == "caught" for o in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    return int(caught < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
