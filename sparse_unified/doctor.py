# SPDX-License-Identifier: Apache-2.0
"""Which kernels are right on this device, and which are fastest: asked of child processes.

What is found out goes to the file of `sparse_unified.ops.choices`. A family that fails is left out
from then on: the next one runs in its place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparse_unified import checks
from sparse_unified._common import Progress, Report
from sparse_unified.bench import suites
from sparse_unified.bench.cases import CASES, Case
from sparse_unified.bench.measure import Roof, Run
from sparse_unified.bench.peers import PEERS, Ours, Peer
from sparse_unified.bench.target import find_target
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checks.problems import DTYPES
from sparse_unified.ops import backend, choices

TORCH = "torch"  # the family of composed torch ops
# Routing, experts and block forward and backward, compiled and captured, on small and awkward
# shapes and BAGEL's; of each dtype that a backend has, what it has of them.
VITAL = (
    "kernels.route_of_exact_logits[37-(256, 8)-{}-96]",
    "kernels.sort_is_the_stable_one[random-1000-(16, 8)]",
    "kernels.sort_is_the_stable_one[repeated-1000-(200, 3)]",
    "kernels.permute_and_combine[37-1000-{}-4]",
    "kernels.permute_and_combine[37-3584-{}-1]",
    "kernels.gradients_of_route_topk[{}-53]",
    "kernels.gradient_of_permute[{}-41]",
    "kernels.ffn_of_any_routing[60-(5, 2)-{}-gaps]",
    "kernels.ffn_of_any_routing[400-(5, 2)-{}-random]",
    "kernels.ffn_of_bagel[{}-(41, 64, 3, 1184, 2)]",
    "kernels.ffn_of_bagel[{}-(1000, 3584, 3, 1184, 2)]",
    "kernels.pruned_ffn_of_any_list[(9, 48)-300-{}]",
    "kernels.pruned_ffn_of_any_list[(9, 64)-37-{}-some]",
    "kernels.pruned_ffn_of_any_list[(9, 64)-300-{}-last]",
    "kernels.pruned_ffn_of_any_list[(5, 128)-300-{}-all]",
    "kernels.gradients_of_experts[90-False-{}-gaps]",
    "kernels.gradients_of_experts[400-False-{}-random-48]",
    "kernels.block_is_that_of_the_cpu[{}-1-True-61]",
    "kernels.block_is_that_of_the_cpu[{}-0-False-300]",
    "kernels.block_compiles_as_one_graph[{}-aot_eager]",
    "kernels.graph_replays_with_other_routing[{}-False]",
    "kernels.graph_replays_with_other_routing[{}-True]",
    "kernels.grouped_mm_is_as_exact_as_torch[(300, 136, 9, 80, 8)--gaps]",
    "kernels.grouped_mm_is_as_exact_as_torch[(1000, 3584, 3, 1184, 2)--gaps]",
    "kernels.ffn_of_bagel[{}-(4096, 3584, 16, 1184, 8)]",
)
# Of families that serve the block alone: composed ops, and grouped_mm, which takes bf16.
_OF_BLOCK = {
    TORCH: ("kernels.block_is_that_of_the_cpu",),
    choices.GROUPED_MM: (
        "kernels.grouped_mm_is",
        "kernels.block_is_that_of_the_cpu[bfloat16",
        "kernels.block_compiles_as_one_graph[bfloat16",
        "kernels.graph_replays_with_other_routing[bfloat16",
    ),
}
_TIMED = {"forward": "fwd", "forward and backward": "fwd_bwd"}
_TIMED_CASES = {"cpu": "quarter-16to8-T256", "cuda": "bagel-16to8-T4096"}
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Of a prompt, a small image and an image of 1024 x 1024.
TOKENS = (256, 1024, 4096)
# A variant must be so much faster than the kernels' own choice to be stored.
_LEAST_GAIN = 1.02
_CHILD = (sys.executable, "-c", "from sparse_unified import doctor; doctor.child()")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What was found out about one kernel family.

    Attributes:
        name: "sm90a", "sm80", "grouped_mm", "cpu" or "torch".
        num_passed: checks.
        largest_error: relative, of all that was compared.
        over_dense: direction -> time of torch's dense FFN over the sparse one's; empty without.
        failure: the first check that failed, and how; "" without one.
    """

    name: str
    num_passed: int
    largest_error: float
    over_dense: dict[str, float]
    failure: str

    @property
    def outcome(self) -> str:
        """The whole in words."""
        if self.failure:
            return f"fails {self.failure}"
        times = [f"{x:.2f}x torch's dense FFN {name}" for name, x in self.over_dense.items()]
        passed = f"passes {self.num_passed} checks"
        return ", ".join([passed, f"error at most {self.largest_error:.1e}", *times])


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(Report):
    """What `examine` found out.

    Attributes:
        device: its name.
        driver, library, torch: their versions.
        families: of kernels, the best first.
        runs: the family that runs from now on.
        reason: why the kernels of this build do not run on the device at all; "" otherwise.
        file: where refusals are kept.
    """

    device: str
    driver: str
    library: str
    torch: str
    families: tuple[Family, ...]
    runs: str
    reason: str
    file: str
    derived = ("sentence",)

    @property
    def ok(self) -> bool:
        """Whether no family failed."""
        return not any(family.failure for family in self.families)

    @property
    def sentence(self) -> str:
        """What to quote in an issue."""
        told = "; ".join(f"{family.name} {family.outcome}" for family in self.families)
        why = f", because {self.reason}" if self.reason else ""
        return (
            f"sparse_unified {self.library}, torch {self.torch}, on {self.device}, "
            f"driver {self.driver}: {told}; {self.runs} runs{why}"
        )

    def title(self) -> str:
        return f"{self.device}, driver {self.driver}, torch {self.torch}"

    def headings(self) -> Sequence[str]:
        return ("kernels", "passed", "largest error", *_TIMED, "")

    def table(self) -> list[tuple[object, ...]]:
        rows = []
        for f in self.families:
            times = {name: f"{ratio:.2f}x torch's dense" for name, ratio in f.over_dense.items()}
            shown = [times.get(name, "-") for name in _TIMED]
            outcome = "failed" if f.failure else "runs" if f.name == self.runs else "right"
            rows.append((f.name, f.num_passed, f"{f.largest_error:.1e}", *shown, outcome))
        return rows

    def notes(self) -> list[str]:
        failed = [f"{f.name} {f.outcome}" for f in self.families if f.failure]
        kept = [f"left out from now on, as {self.file} says; --reset forgets it"] if failed else []
        return [*failed, *kept, "", "to quote in an issue:", self.sentence]


def families_of(device: torch.device) -> tuple[str, ...]:
    """Kernel families that this library has for a device, the best first.

    torch's grouped_mm is first where the chooser takes it; second to ours elsewhere, for `tune`.
    """
    if device.type == "cpu":
        return (choices.CPU, TORCH)
    why = backend.device_refusal(device)
    if why is not None and choices.refusal(device) is None:
        return (TORCH,)
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    codes = backend.architectures()
    own = (*((choices.SM90A,) if is_hopper and "sm_90a" in codes else ()), choices.SM80)
    if not backend.has_grouped_mm(device):
        return (*own, TORCH)
    if backend.is_grouped_mm_first(device):
        return (choices.GROUPED_MM, *own, TORCH)
    return (*own, choices.GROUPED_MM, TORCH)


def vital_checks(device: torch.device) -> list[str]:
    """Names of the checks of a device."""
    known = checks.all_checks(checks.backend_of(device))
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    names = dict.fromkeys(name.format(dtype) for name in VITAL for dtype in dtypes)
    return [name for name in names if name in known]


def examine(
    device: str = "cpu",
    *,
    stall: float = 60.0,
    families: Sequence[str] | None = None,
    command: Sequence[str] = _CHILD,
    names: Sequence[str] | None = None,
    progress: Callable[..., object] = lambda *_: None,
) -> Diagnosis:
    """Runs the kernel families of a device against the references, each in a process of its own.

    A family that gives a wrong result, ends its process or does not come back is written to the
    file of `choices`; the next family runs from then on, in processes that start later.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        stall: seconds that a check may take.
        families: to look at; all of the device by default.
        command: of the child process, which gets device and names.
        names: of checks and times; `vital_checks` and the times beside dense by default.
        progress: called with the number of families done, that of all, and what came of the last.

    Raises:
        ValueError: the device is not there.
        RuntimeError: a child process does not begin.
    """
    target = find_target(device)
    own = families_of(target.device) if families is None else tuple(families)
    wanted = [*vital_checks(target.device), *_TIMED] if names is None else list(names)
    found = []
    for position, family in enumerate(own):
        asked = [name for name in wanted if name in _TIMED or _concerns(name, family)]
        is_torchs = family == choices.GROUPED_MM
        with _refusing(target.device, () if is_torchs else own[:position]) as environment:
            if is_torchs:  # wherever it stands
                environment[suites.VARIABLE] = f"family={family}"
            said = checks.results((*command, device), asked, stall=stall, environment=environment)
            found.append(_judge(family, said))
        progress(position + 1, len(own), f"{family}: {found[-1].outcome}")
    failed = {f.name: f"fail {f.failure}" for f in found if f.failure}
    sound = [f.name for f in found if not f.failure]
    last = choices.FAMILIES[target.device.type][-1]
    _change(target.device, refused={f: failed.get(f, "") for f in own if f != TORCH})
    return Diagnosis(
        device=choices.device_name(target.device),
        driver=choices.driver(),
        library=choices.library(),
        torch=torch.__version__,
        families=tuple(found),
        runs=TORCH if last in failed or not sound else sound[0],
        reason=(backend.device_refusal(target.device) or "") if own == (TORCH,) else "",
        file=str(choices.path()),
    )


def _concerns(name: str, family: str) -> bool:
    """Whether a check looks at what a family runs."""
    if family in _OF_BLOCK:
        return name.startswith(_OF_BLOCK[family])
    return not name.startswith("kernels.grouped_mm")


def _judge(family: str, results: Iterator[dict[str, Any]]) -> Family:
    errors, ratios, failure = list[float](), dict[str, float](), ""
    for said in results:
        if said["outcome"] == "failed":
            failure = f"{said['name']}: {said['text']}"
            break
        if "over_dense" in said:
            ratios[said["name"]] = said["over_dense"]
        elif said["outcome"] == "passed":
            errors.append(said["error"])
    return Family(
        name=family,
        num_passed=len(errors),
        largest_error=max(errors, default=0.0),
        over_dense=ratios,
        failure=failure,
    )


@contextmanager
def _refusing(device: torch.device, families: Sequence[str]) -> Iterator[dict[str, str]]:
    """Environment of a process that leaves some families out, as one does that reads the file."""
    with TemporaryDirectory() as folder:
        entry = {"refused": dict.fromkeys(families, "are not asked for"), "variants": {}}
        text = json.dumps({choices.key_of(device): entry})
        (Path(folder) / choices.path().name).write_text(text)
        environment = {**os.environ, choices.VARIABLE: folder}
        environment.pop(suites.VARIABLE, None)
        yield environment


def _change(device: torch.device, **found: Mapping[str, str]) -> None:
    """Writes what was found out, "refused" or "variants"; "" takes an entry back."""
    entries = choices.read()
    entry = entries.get(choices.key_of(device), {"refused": {}, "variants": {}})
    for name, new in found.items():
        entry[name] = {key: text for key, text in {**entry[name], **new}.items() if text}
    failed = [f"family={family}" for family in entry["refused"]]
    known = entry["variants"].items()
    kept = {sizes: text for sizes, text in known if not any(name in text for name in failed)}
    _write({**entries, choices.key_of(device): {**entry, "variants": kept}})


def _write(entries: Mapping[str, Any]) -> None:
    """Writes the entries that say something; without any there is no file."""
    file, told = choices.path(), {key: e for key, e in entries.items() if any(e.values())}
    if not told:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(told, indent=1) + "\n").encode())


def reset(device: str = "cpu") -> list[str]:
    """Forgets what was found out about a device with this driver and library; returns it."""
    entries = choices.read()
    entry = entries.pop(choices.key_of(find_target(device).device), None)
    _write(entries)
    return [f"{key}: {text}" for own in (entry or {}).values() for key, text in own.items()]


# Variants


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(Report):
    """What `tune` found out.

    Attributes:
        device: its name.
        winners: a dict for each size: case, direction, variant ("chosen" is the kernels' own
            choice), microseconds, speedup over the choice, or failure.
        file: where winners are kept.
    """

    device: str
    winners: tuple[dict[str, Any], ...]
    file: str

    @property
    def ok(self) -> bool:
        return not any("failure" in winner for winner in self.winners)

    def title(self) -> str:
        return self.device

    def headings(self) -> Sequence[str]:
        return ("experts, tokens", "direction", "fastest", "us", "over the choice")

    def table(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for w in self.winners:
            found = (
                ("failed: " + w["failure"], "-", "-")
                if "failure" in w
                else (w["variant"], f"{w['microseconds']:.0f}", f"{w['speedup']:.2f}x")
            )
            rows.append((w["case"], w["direction"], *found))
        return rows

    def notes(self) -> list[str]:
        return [f"kept in {self.file}, for processes that start from now on"]


def cases_of(model: str | os.PathLike[str], tokens: Sequence[int] = TOKENS) -> dict[str, Case]:
    """The sizes of the sparse FFNs of a model directory, each once, by name; ValueError without."""
    source = Checkpoint(model)
    hidden_size, found = source.llm_config["hidden_size"], {}
    listed = [ffn for layers in source.experts.values() for ffn in layers.values()]
    for ffn, count in product(listed, tokens):
        size = f"{hidden_size}x{ffn.expert_width}"
        name = f"{size}, {ffn.num_experts} to {source.top_k}, {count} tokens"
        found[name] = Case(
            name=name,
            tokens=count,
            hidden_size=hidden_size,
            intermediate_size=ffn.num_experts * ffn.expert_width,
            num_experts=ffn.num_experts,
            top_k=source.top_k or 1,
        )
    if not found:
        raise ValueError(f"tune: {source.directory} must hold sparse FFNs, got a dense model")
    return found


def tune(
    model: str | os.PathLike[str],
    device: str = "cuda",
    *,
    stall: float = 120.0,
    tokens: Sequence[int] = TOKENS,
    command: Sequence[str] = _CHILD,
    progress: Progress = lambda *_: None,
) -> Tuning:
    """Times the variants of the expert GEMMs for the sizes of a model, and keeps the winners.

    Each size and direction runs in a child process; a variant that computes something else is no
    winner. Without variants (on the CPU) the kernels' own choice is timed alone.

    Args:
        model: a model directory.
        device: "cpu", "cuda" or "cuda:N".
        stall: seconds that a size may take.
        tokens: numbers of tokens.
        command, progress: as of `examine`.

    Raises:
        ValueError: the device is not there, or the model has no sparse FFN.
    """
    target, cases = find_target(device), cases_of(model, tokens)
    jobs = {
        json.dumps([asdict(case), direction]): (case, direction)
        for case in cases.values()
        for direction in _TIMED.values()
    }
    winners: list[dict[str, Any]] = []
    kept: dict[str, str] = {}
    refused = tuple(choices.read().get(choices.key_of(target.device), {}).get("refused", ()))
    with _refusing(target.device, refused) as environment:
        child, names = (*command, device), list(jobs)
        for said in checks.results(child, names, stall=stall, environment=environment):
            case, direction = jobs[said["name"]]
            found = {"failure": said.get("text")}
            if said["outcome"] == "passed":
                found = {n: said[n] for n in ("variant", "microseconds", "speedup")}
                is_better = said["speedup"] >= _LEAST_GAIN
                kept[said["sizes"]] = said["variant"] if is_better else ""
            winners.append({"case": case.name, "direction": direction, **found})
            progress(len(winners), len(jobs))
    _change(target.device, variants=kept)
    return Tuning(
        device=choices.device_name(target.device),
        winners=tuple(winners),
        file=str(choices.path()),
    )


# In the child process


def child() -> None:
    """Runs the checks and timings that the last two arguments name: device, and JSON of a list."""
    device, names = sys.argv[-2], json.loads(sys.argv[-1])
    more: dict[str, Callable[[torch.device], dict[str, Any]]] = {}
    for name in names:
        if name in _TIMED:
            more[name] = partial(_beside_dense, _TIMED[name])
        elif name.startswith("["):
            more[name] = partial(_fastest, *json.loads(name))
    checks.work(device, names, more)


def _measured(suite: Any, device: torch.device, repeats: int) -> Run:
    target = find_target(str(device))
    roof = Roof(tflops=1.0, gbps=1.0)
    run = Run(device=target.device, timer=target.timer, roof=roof, repeats=repeats, seconds=20.0)
    run.measure(suite)
    return run


def _beside_dense(direction: str, device: torch.device) -> dict[str, Any]:
    case, dtype = CASES[_TIMED_CASES[device.type]], _DTYPES[device.type]
    both = {"dense": PEERS["dense"], suites.OURS: Peer(build=partial(Ours, strict=False))}
    suite = suites.block_suite(case, dtype, direction, device, peers=both)
    run = _measured(suite, device, repeats=9)
    if run.missing:
        raise RuntimeError("; ".join(f"{m['provider']}: {m['reason']}" for m in run.missing))
    return {"over_dense": run.records[-1]["speedup"]["dense"]}


def _fastest(case: Mapping[str, Any], direction: str, device: torch.device) -> dict[str, Any]:
    """The fastest legal variant, or the choice."""
    sizes = Case(**case)
    suite = suites.variant_suite(sizes, _DTYPES[device.type], direction, device)
    run = _measured(suite, device, repeats=15)
    suites.set_variant(suites.CHOSEN)
    best = min(run.records, key=lambda record: record["median_us"])
    place = (0, 0)
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        place = (10 * facts.major + facts.minor, facts.multi_processor_count)
    scope = [
        *place,
        *(sizes.hidden_size, sizes.num_experts, sizes.expert_width, 0, sizes.rows),
        2 if direction == "fwd_bwd" else 1,
    ]
    return {
        "variant": best["provider"],
        "microseconds": best["median_us"],
        "speedup": best["speedup"].get(suites.CHOSEN, 1.0),
        "sizes": " ".join(map(str, scope)),
    }
