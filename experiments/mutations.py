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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutations"  # and of each kind, where one is chosen
EMULATED = "SPARSE_UNIFIED_TEST_EMULATED"
LIBRARY = "sparse_unified/_C.abi3.so"

CHECKS, ATTACK = "tests/ops/test_checks.py", "tests/ops/test_attack.py"


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
    kind: str


def planted(
    kind: str, folder: str, mistakes: Mapping[str, Sequence[tuple[str, ...]]]
) -> tuple[Mutation, ...]:
    """Makes mutations of `{file: [(old, new, test, ...), ...]}`.

    A test is a file, as in "test_experts" or "ops/test_backend"; "attack WORD", the attacks on ops
    whose names hold a word; "FOLDER -k WORD"; or a word, the checks of the ops whose names hold it.
    Without one, all checks are meant.
    """

    def arguments(test: str) -> tuple[str, ...]:
        if test.partition("/")[2].startswith("test_") or test.startswith("test_"):
            return (f"tests/{test}.py",)
        if " -k " in test:
            return tuple(test.split())
        is_attack = test.startswith("attack ")
        return (ATTACK if is_attack else CHECKS, "-k", test.removeprefix("attack "))

    return tuple(
        Mutation(folder + file, old, new, sum(map(arguments, tests), ()) or (CHECKS,), kind)
        for file, own in mistakes.items()
        for old, new, *tests in own
    )


CPU_KERNELS = planted(
    "cpu",
    "csrc/",
    {
        "cpu/combine.cpp": [
            ("acc += token.weight(k) * load(", "acc -= token.weight(k) * load("),
            ("weight_offset + weights[k] : 1.0f", "weights[k] : 1.0f", "combine"),
            ("scale(grad_out, params.weights[row]", "scale(grad_out, 1.0f", "gradients_of_experts"),
        ],
        "cpu/permute.cpp": [
            ("params.x.columns % kLineBytes == 0 &&", "true &&", "caches"),
            ("y + rows[k] * row_bytes", "y + rows[0] * row_bytes", "permute"),
        ],
        "cpu/route_topk.cpp": [
            ("return !std::isnan(b) && a >= b", "return !std::isnan(b) && a > b", "route"),
            ("index > e ? own - 1 : own", "index > e ? own : own - 1", "route"),
            (
                "logits == 0.0f ? Int{} : bits",
                "bits - bits == Int{} ? bits : bits",
                "route_of_extreme",
            ),
            ("sums[e] += acc[e];", "sums[e] = acc[e];", "gradients_of_route"),
            (
                "acc += grad[e] * (n == kLanes",
                "acc += grad[0] * (n == kLanes",
                "gradients_of_route",
            ),
        ],
        "cpu/sort_by_expert.cpp": [
            ("next[params.topk_idx[i]]++", "next[params.topk_idx[i]]", "sort"),
            ("params.topk_idx[i] >= params.num_experts", "false", "attack bad_argument"),
        ],
        "cpu/swiglu.cpp": [
            ("(1.0f + gate * (1.0f - s))", "(1.0f + gate * s)", "gradients_of_experts"),
            ("grad * silu, silu * up}", "grad * s, silu * up}", "gradients_of_experts"),
        ],
        "cpu/ffn_importance.cpp": [
            ("size > params.threshold", "size >= params.threshold", "importance"),
            ("if (weight == 0) continue;", "", "importance"),
            (
                "sums.squares += weight * hidden * hidden",
                "sums.squares += weight * hidden * size",
                "importance",
            ),
        ],
        "cpu/ffn_tiles.h": [
            ("return r % 2 == 0 ?", "return r % 2 != 0 ?", "ffn"),
            ("block == 0 ? acc[r][v] : sums[r][v] + acc[r][v]", "acc[r][v]", "ffn"),
            # Of bf16 alone, on processors that multiply it.
            ("load(lane)) | bits << 16", "load(lane)) | bits", "ffn"),
            ("multiply_tiles<1, 5, 6>()", "multiply_tiles<1, 4, 6>()", "ffn"),
            ("(uint64_t{1} << n) - 1", "(uint64_t{2} << n) - 1", "ffn"),
        ],
        "cpu/ffn_panels.h": [
            ("std::min(v * kLanes + lane, count - 1)", "v * kLanes + lane", "ffn"),
            (
                "__builtin_shuffle(low01, low23, kOdd)",
                "__builtin_shuffle(low01, low23, kEven)",
                "ffn",
            ),
            ("num_rows > 3 * kHalfLanes", "num_rows > 4 * kHalfLanes", "ffn"),
            ("panel + 2 * stride + lane, c", "panel + 2 * stride + lane, d", "ffn"),
            ("_mm_set1_ps(weights[row + i])", "_mm_set1_ps(weights[row])", "ffn"),
        ],
        "cpu/grouped_ffn_tiles.h": [
            ("adds ? weights + v * kLanes", "adds ? weights", "any_routing"),
            ("(1u << num_columns) - 1", "(1u << num_columns) - 2", "ffn"),
        ],
        "cpu/vector.h": [
            ("+ ((bits >> 16) & 1u)) >> 16", ") >> 16", "combine"),
            ("bit_cast<Float>(magnitude) * 0x1p112f", "bit_cast<Float>(magnitude) * 0x1p111f"),
        ],
    },
)

BINDINGS = planted(
    "cpu",
    "csrc/",
    {
        "bindings/common.cpp": [
            ("check(has_memory(tensor),", "check(true,", "attack bad_argument"),
        ],
        "bindings/context.cpp": [
            (
                "runs_on_cuda(indices) ? as_contiguous(indices) : contiguous_copy(indices)",
                "as_contiguous(indices)",
                "attack another_thread",
            ),
        ],
        "bindings/library.cpp": [
            (
                'fail(kName.chars, "arguments", "leave enough memory", "no room for ", '
                "error.what());",
                "throw std::runtime_error(error.what());",
                "attack out_of_memory",
            ),
        ],
        "bindings/arguments.cpp": [
            (
                'check_size(op, "gate", gate, 1, x.size(1), "the hidden size of x");',
                "",
                "attack bad_argument",
            ),
            (
                'check_dtype(op, "row_token", row_token, ScalarType::Int);\n  sizes.num_rows',
                "sizes.num_rows",
                "attack bad_argument",
            ),
            ("sizes.width % block_size == 0,", "true,", "attack bad_argument"),
        ],
        "bindings/pruned_ffn_arguments.cpp": [
            ("if (seen[data[i]]) {", "if (false) {", "attack bad_argument"),
            ("slab->runs.back().count += block_size;", "", "pruned"),
            ("slab->width += block_size;", "", "pruned"),
        ],
        "bindings/combine.cpp": [
            (
                'if (!context.is_cuda()) check_indices(kOp, "token_rows", token_rows, y.size(0));',
                "",
                "attack bad_argument",
            ),
        ],
        "bindings/grouped_ffn_combine.cpp": [
            (
                "row_weights[rows[slot]] = weight_offset + values[slot];",
                "row_weights[rows[slot]] = weight_offset + values[begin * top_k];",
                "any_routing",
            ),
        ],
        "bindings/grouped_ffn_combine_backward.cpp": [
            ("(part.begin - rows.begin) * h", "0 * h", "gradients_of_experts"),
        ],
    },
)

CUDA_KERNELS = planted(
    "emulated",
    "csrc/",
    {
        "cuda/combine.cu": [
            ("if (k + 4 <= p.top_k) {", "if (k + 4 < p.top_k) {", "combine"),
            ("fmaf(weight, values[c], sums[c])", "fmaf(weight, values[c], 0.0f)", "combine"),
            ("sync_threads();\n\n  const TokenRows", "const TokenRows", "combine"),
        ],
        "cuda/grouped_ffn_row_weights.cu": [
            ("part < p.num_parts", "part < 1", "gradients"),
        ],
        "cuda/grouped_ffn_grad_hidden_sm80.cu": [
            ("sum = warp_sum<4>(sum);", "", "gradients"),
            (
                "store_vector(grad_row + width, narrow<T>(up))",
                "store_vector(grad_row + width, narrow<T>(gate))",
                "gradients",
            ),
        ],
        "cuda/grouped_ffn_grad_hidden_sm90a.cu": [
            (
                "hidden[i] = weight * gradient.hidden;",
                "hidden[i] = gradient.hidden;",
                "ops/test_emulated",
            ),
            (
                "boxes.is_narrow ? &params.narrow_down_proj : &params.down_proj",
                "&params.down_proj",
                "ops/test_emulated",
            ),
            ("kBlocks == 1 ? 0 : cluster_rank() * part_boxes", "0", "ops/test_emulated"),
        ],
        "cuda/persistent_gemm_sm90a.h": [
            (
                "operand_descriptor(shared, Major::kMN, kBoxBytes / 2, kNarrowRowBytes)",
                "operand_descriptor(shared, Major::kMN, kBoxBytes)",
                "ops/test_emulated",
            ),
            (
                "ceil_div(width, kNarrowElements) * kNarrowElements",
                "width / kNarrowElements * kNarrowElements",
                "ops/test_emulated",
            ),
            ("if constexpr (Gemm::kFindsAhead) tile = next;", "", "ops/test_emulated"),
            ("done = tile;", "done = next;", "ops/test_emulated"),
        ],
        "device/mainloop_sm90a.h": [
            ("? kDescriptorStepNarrow", "? kDescriptorStepMN", "ops/test_emulated"),
        ],
        "cuda/permute.cu": [
            ("unit + kStep - kWarpSize < num_units", "unit < num_units", "permute"),
            ("if (row >= p.num_rows) return;", "", "permute"),
        ],
        "cuda/sort_by_expert.cu": [
            (
                "before += b < block_idx ? count : 0;",
                "before += b <= block_idx ? count : 0;",
                "tests/ops -k sort",
            ),
            ("((1u << lane_idx()) - 1)", "((2u << lane_idx()) - 1)", "sort"),
            ("row.peers &= is_set ? set : ~set;", "row.peers &= set;", "sort"),
        ],
        "cuda/route_topk.cu": [
            ("other < expert ? !(value < logit) : !(value <= logit)", "!(value <= logit)", "route"),
            (
                "rank += is_nan ? is_before_nan : is_before;",
                "rank += is_before;",
                "route_of_extreme",
            ),
            (
                "sums[i / 4 / kTiles][i / 4 % kTiles][i % 4]",
                "sums[i / 4 / kTiles][i / 4 % kTiles][i % 4 ^ 1]",
                "route",
            ),
        ],
        "cuda/grouped_ffn_up_sm80.cu": [
            ("row % 16 < 8 ? gate_proj", "row % 16 >= 8 ? gate_proj", "ffn"),
            ("row < at.end_row && neuron < width", "row <= at.end_row && neuron < width"),
        ],
        "cuda/grouped_ffn_down_sm80.cu": [
            ("min(first_column + row, hidden_size - 1)", "first_column + row"),
            ("neuron_columns(ffn).of(at.group), width", "neuron_columns(ffn).of(0), width", "ffn"),
        ],
        "cuda/rows_gemm_sm90a.h": [
            (
                "tile.group * params.group_rows + tile.n * kColumns",
                "tile.n * kColumns",
                "tests/ops/test_emulated.py -k anywhere",
            ),
            (
                "return num_neurons <= kNarrowElements;",
                "return num_neurons <= 2 * kNarrowElements;",
                "ops/test_emulated",
            ),
            (
                "halves ? kNarrowRowBytes : kSwizzleRowBytes",
                "kSwizzleRowBytes",
                "ops/test_emulated",
            ),
            ("k < params.num_k ? k : k - params.num_k", "k", "ops/test_emulated"),
        ],
        "cuda/grouped_ffn_up_sm90a.cu": [
            (
                "is_valid[i] = row_idx < tile.end_row;",
                "is_valid[i] = row_idx <= tile.end_row;",
                "ops/test_checks",
                "ops/test_emulated",
            ),
            (
                "neuron < params.expert_width ? neurons(neuron)",
                "neuron <= params.expert_width ? neurons(neuron)",
            ),
        ],
        "cuda/grouped_ffn_grad_weights_sm90a.cu": [
            ("kIsDown ? boxes.is_narrow : box", "kIsDown ? 0 : box", "ops/test_emulated"),
        ],
        "cuda/grouped_ffn_config.cpp": [
            ("gemm.num_k >= kMinK && ", "", "ops/test_emulated"),
        ],
    },
)

PACKAGE = planted(
    "python",
    "sparse_unified/",
    {
        "ops/grouped_ffn_combine.py": [
            ("(5, 6, 7)", "(5, 7, 6)", "each_argument"),
        ],
        "ops/grouped_ffn.py": [
            (
                "lambda a: a.x.new_empty((a.row_token.shape[0], a.x.shape[1]))",
                "lambda a: a.x.new_empty((a.x.shape[0], a.x.shape[1]))",
                "opcheck",
            ),
        ],
        "ops/registration.py": [
            ('refuse_gradient(f"{op}_backward")', "", "second"),
        ],
        "nn/sparse_moe.py": [
            ("*maps, *experts, weight_offset)", "*maps, *experts)", "test_nn_sparse_moe"),
            ("weight = weight + router.get_delta_weight(adapter)", "pass", "test_adapt_lora"),
            (
                "return y + y * weight.to(y.dtype)",
                "return y * weight.to(y.dtype)",
                "test_nn_sparse_moe",
            ),
            (
                "vit = route(tokens[vit_indexes], gate_img",
                "vit = route(tokens[vit_indexes], gate",
                "test_nn_sparse_moe",
            ),
            ("if least < 0 or most >= num_tokens:", "if least < 0:", "test_nn_sparse_moe"),
            (
                "active not in KERNELS and _is_autocast",
                "_is_autocast",
                "test_nn_sparse_moe",
                "ops/test_backend",
            ),
            (" and tokens.shape[0] > 0", "", "ops/test_backend"),
            ("nearness.clamp(min=0)", "nearness", "test_time_router"),
        ],
        "surgery/lora.py": [
            ("(self.scaling * up) @ down", "up @ down", "test_adapt_lora"),
            ("delta.transpose(0, 1).flatten(1)", "delta.flatten(0, 1).T", "test_adapt_lora"),
        ],
        "surgery/ffn.py": [
            ("        layer.merge()\n", "", "test_adapt_lora"),
        ],
        "cli/options.py": [
            ("[*flags, *given]", "[*given, *flags]", "test_adapt_run"),
        ],
        "ops/choices.py": [
            ("if key.endswith(own):", "if key:", "test_doctor"),
        ],
        "doctor.py": [
            ("() if is_torchs else own[:position]", "()", "test_doctor"),
            ('environment[suites.VARIABLE] = f"family={family}"', "pass", "test_doctor"),
        ],
        "ops/backend.py": [
            ("and num_rows < 2 * rows", "", "ops/test_backend"),
            ("trains == torch.is_grad_enabled() and ", "", "ops/test_backend"),
            ("choices.GROUPED_MM in choices.refused(device)", "False", "ops/test_backend"),
            (
                "@torch.compiler.assume_constant_result  # the compiler could not trace it",
                "",
                "ops/test_backend",
            ),
            ("4 if newest == 12 else 0", "0", "ops/test_backend"),
            ("own[0] == capability[0]", "True", "ops/test_backend"),
            ("dtype == torch.bfloat16 and prefers", "prefers", "ops/test_backend"),
            ("_FP8_CAPABILITIES = (9, 10)", "_FP8_CAPABILITIES = (8, 9, 10)", "ops/test_backend"),
        ],
        "checks/__init__.py": [
            ("json.loads(line), stall", "json.loads(line), 1e9", "test_doctor"),
        ],
        "ops/composed.py": [
            (".clamp(min=1e-12)", "", "ops/test_backend"),
            ("scales[row_token]", "scales[row_token.sort().values]", "ops/test_backend"),
            ("expert_offsets[1:]", "expert_offsets[:-1]", "grouped_mm"),
        ],
        "experts/layout.py": [
            ("rows[1::2] = rows[1::2].flip(1)", "", "test_experts"),
            (
                "start = self.shared_width + expert * self.expert_width",
                "start = expert * self.expert_width",
                "test_experts",
            ),
            (
                "loss[asking].sort(descending=True, stable=True)",
                "loss[asking].sort(descending=False, stable=True)",
                "test_experts",
            ),
        ],
        "experts/keep.py": [
            ("relative[relative.argmax()] = torch.inf", "pass", "test_surgery_*"),
            (
                "return list(range(1, num_layers - 1))",
                "return list(range(num_layers))",
                "test_checkpoint_convert",
                "test_surgery_*",
                "test_experts",
            ),
            (
                "values * torch.linalg.vector_norm(o_proj",
                "torch.linalg.vector_norm(o_proj",
                "test_surgery_*",
            ),
        ],
        "experts/router.py": [
            ("residual = (goal - vectors", "residual = (goal + vectors", "test_experts"),
            ("1 - chosen * (1 + logits)", "1 - chosen", "test_experts"),
        ],
        "surgery/cuts.py": [
            (
                'Cut(1 if name == "down_proj" else 0',
                'Cut(1 if name == "up_proj" else 0',
                "test_prune_*",
            ),
            ("first.keep[cut.keep]", "cut.keep", "test_prune_*"),
            (
                "if component not in kept and len(kv_places) == len(shape.kv_heads):",
                "if component not in kept:",
                "test_surgery_*",
            ),
        ],
        "bagel/sampler.py": [
            (
                "differences[-1] - older) / (time - then)",
                "differences[-1] - older) / (then - time)",
                "test_bagel_sampler",
            ),
            (
                "(times > low) & (times <= high)",
                "(times >= low) & (times <= high)",
                "test_bagel_sampler",
            ),
            (
                "return shift * times / (1 + (shift - 1) * times)",
                "return shift * times / (1 + shift * times)",
                "test_bagel_sampler",
                "test_replay",
            ),
            (
                "clamp(min=config.cfg_renorm_min, max=1.0)",
                "clamp(min=config.cfg_renorm_min)",
                "test_bagel_sampler",
                "test_replay",
            ),
            ("np.float32(t) >= np", "np.float32(t) > np", "test_bagel_execution"),
            ("or top_k != steps[-1].top_k", "", "test_bagel_execution"),
            ("if (on, top_k) not in run:", "if not run:", "test_bagel_execution"),
        ],
        "bagel/attention.py": [
            (
                "torch.cat([-angles, angles], dim=-1)",
                "torch.cat([angles, angles], dim=-1)",
                "test_replay",
            ),
        ],
        "bagel/packing.py": [
            ("_NOISED: 0}.get(kind, 1)", "_NOISED: 1}.get(kind, 1)", "test_training_forward"),
            (
                "segment[:, None]) & ~is_noised[:, None]",
                "segment[:, None])",
                "test_training_forward",
            ),
        ],
        "checkpoint/safetensors_io.py": [
            (
                "if start + begin != position:",
                "if start + begin < position:",
                "test_checkpoint_reader",
                "test_hostile_files",
            ),
            (
                '" " * (-len(text.encode()) % 8)',
                '""',
                "test_checkpoint_reader",
                "test_checkpoint_convert",
                "test_frozen",
            ),
        ],
        "checkpoint/files.py": [
            ("yield handle\n        os.fsync(handle)", "yield handle", "test_checkpoint_atomic"),
            ("if stamp != stamp_of(status):", "if False:", "test_checkpoint_atomic"),
        ],
        "checkpoint/rewrite.py": [
            ("        source.refuse_change()\n", "", "test_checkpoint_atomic"),
        ],
        "adapt/optimizer.py": [
            ("limit / norm)", "norm / limit)", "test_adapt_trainer"),
            ("1 - self._config.ema_decay", "self._config.ema_decay", "test_adapt_trainer"),
            ("total.add_(_local", "total.copy_(_local", "test_adapt_trainer"),
        ],
        "adapt/trainer.py": [
            (
                "ahead = batches[1:] if is_judged else []",
                "ahead = batches[:0]",
                "test_adapt_trainer",
            ),
        ],
        "bagel/model.py": [
            ("own.error / whole[key] for", "own.error for", "test_adapt_trainer"),
            (
                "times = times.index_select(0, batch.time_rows)",
                "times = times[:1]",
                "test_time_router",
                "test_training_forward",
            ),
            (
                "torch.cat(gen), self.packing, time)",
                "torch.cat(gen), self.packing, 0 * time)",
                "test_time_router",
            ),
        ],
        "checkpoint/scores.py": [
            ("(own := own_hash()) != known", "not (own := own_hash())", "test_prune_checkpoint"),
        ],
        "analysis/evaluate.py": [
            ("[shard[0] :: shard[1]]", "[:]", "test_analysis_evaluate"),
        ],
        "analysis/sweep.py": [
            ("[shard[0] :: shard[1]]", "[:]", "test_analysis_sweep"),
            ('*again["seconds_range"]', '*before["seconds_range"]', "test_analysis_sweep"),
        ],
    },
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
