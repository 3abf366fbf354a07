# SPDX-License-Identifier: Apache-2.0
"""adapt and merge: tuning of a model on images and texts, and of adapters to its weights."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from sparse_unified._common import Report
from sparse_unified.adapt import (
    RunConfig,
    SequenceConfig,
    TrainingConfig,
    adapt,
    estimate_memory,
    merge_lora,
)
from sparse_unified.adapt.optimizer import num_processes
from sparse_unified.adapt.run import plan
from sparse_unified.adapt.trainer import StepRecord
from sparse_unified.cli.console import Output, Usage, show_progress
from sparse_unified.cli.generate import check_device
from sparse_unified.cli.options import DTYPES, Flags, arguments, dtype_of, from_file

# A flag --no-NAME overrides a file that says yes.
_SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}


def add_adapt(flags: Flags) -> None:
    flags.table("""
        MODEL        a model directory or a hub id owner/name
        OUT          the directory to make; must not exist
        --data DATA  a folder, a file or a pattern: .parquet or .tar shards; or a .jsonl file with
                     image, text, question, answer, source; or pictures, each with a .txt file of
                     the same name
        --config FILE.yaml  flags as a YAML or JSON file, such as the adaptation.json of an earlier
                     run; flags override it
        """)
    flags.parser.expand = partial(from_file, flags.parser)
    flags.of(
        RunConfig,
        "stage component device dtype",
        stage="what is trained: the routers alone; all but the experts; all",
        component={"choices": ("both", "gen", "und")},
        device="cpu, cuda, cuda:1, ...",
        dtype={
            "choices": DTYPES[:2],
            "help": "of computation (default: as in the files); the optimizer works in float32",
        },
    )
    flags.of(TrainingConfig, "steps", unset=True)
    data = flags.group("data")
    data.of(SequenceConfig, "timestep_shift text_dropout vit_dropout vae_dropout")
    given = "tasks max_side cache_latents streaming max_damaged workers eval_data"
    data.of(RunConfig, given, cache_latents=_SWITCH, streaming=_SWITCH)
    data.of(TrainingConfig, "eval_every")
    text = "with --lora-rank, adapters alone are trained, and OUT holds them as peft writes them"
    flags.group("LoRA", text).of(RunConfig, "lora_rank lora_alpha lora_targets")
    flags.group("optimizer").of(
        TrainingConfig,
        "batch_size lr=learning_rate min_lr=min_learning_rate schedule warmup=warmup_steps betas "
        "eps weight_decay max_grad_norm ema=ema_decay ce_weight mse_weight balance_weight "
        "balance_rate z_weight distill_weight seed",
        max_grad_norm="norm that gradients are scaled down to; 0 does not",
    )
    flags.group("memory").of(
        TrainingConfig,
        "micro_batch_size checkpointing optimizer_device",
        micro_batch_size="sequences of a pass (default: a process's share of --batch-size)",
        checkpointing=_SWITCH,
    )
    run = flags.group("run", "log and states of a run lie in OUT.training")
    run.of(RunConfig, "checkpoint_every keep resume report_to")
    run.table("""
        --timeout SECONDS  under torchrun: how long a process waits for another one that does not
                           answer (default 600)
        --estimate-memory  print what the run would take, from the headers of MODEL alone, and stop
        --dry-run          read model and data, every image included, report, and stop before the
                           first step
        """)


def run_adapt(options: argparse.Namespace) -> Report | None:
    """Trains MODEL on images and texts and writes the trained model to OUT.

    OUT appears complete or not at all. While the run lasts, its log and its states lie in
    OUT.training; with --resume a run that was cut short goes on from its latest state, exactly as
    if it had not been. Under torchrun, weights and optimizer are sharded over the processes with
    FSDP2.
    """
    if options.estimate_memory:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return estimate_memory(options.model, *_configs(options), processes=processes)
    for name in ("data", "steps"):
        if getattr(options, name) is None:
            raise Usage(f"adapt: --{name} must be given, got none")
    with _processes(options) as first:
        for name in ("device", "optimizer_device"):
            if getattr(options, name) is not None:
                check_device(getattr(options, name), f"--{name.replace('_', '-')}")
        given = (options.model, options.out, options.data, *_configs(options))
        if options.dry_run:
            planned = plan(*given)
            return planned if first else None
        options.quiet = options.quiet or not first
        with (
            show_progress(options, "adapt", "step") as bar,
            show_progress(options, "writing") as progress,
        ):

            def on_step(record: StepRecord) -> None:
                """Shows a step in a bar on a terminal, as a line now and then elsewhere."""
                step, steps = record.step, options.steps
                bar(step, steps, _summary(record))
                is_due = step == steps or step % max(1, steps // 20) == 0
                if is_due and not options.quiet and not sys.stderr.isatty():
                    sys.stderr.write(f"step {step}/{steps}  {_summary(record)}\n")
                    sys.stderr.flush()

            report = adapt(*given, on_step=on_step, progress=progress)
        return report if first else None


def add_merge(flags: Flags) -> None:
    flags.table("""
        MODEL  a model directory or a hub id owner/name
        LORA   the directory of the adapters
        OUT    the directory to make; must not exist
        """)


def run_merge(options: argparse.Namespace) -> Report:
    """Writes MODEL to OUT with the adapters of LORA merged into its weights.

    LORA is what adapt --lora-rank wrote, or what peft wrote for the official code.
    """
    with show_progress(options, "writing") as progress:
        keys = merge_lora(options.model, options.lora, options.out, progress=progress)
    text = f"{len(keys)} weights of {options.model} merged with {options.lora} in {options.out}"
    return Output(text=text, document={"out": options.out, "weights": keys})


def _summary(record: StepRecord) -> str:
    losses = {"loss": record.loss, "text": record.text_loss, "image": record.image_loss}
    parts = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    if record.distill_loss is not None:
        parts.append(f"distill {record.distill_loss:.4f}")
    if record.held_out_loss is not None:
        parts.append(f"held-out {record.held_out_loss:.4f}")
    if record.load_imbalance is not None:
        parts.append(f"busiest expert {record.load_imbalance:.2f}x")
    return "  ".join([*parts, f"{record.tokens_per_second:,.0f} tokens/s"])


def _configs(options: argparse.Namespace) -> tuple[TrainingConfig, RunConfig]:
    share = max(1, options.batch_size // num_processes())
    training = arguments(
        TrainingConfig,
        options,
        steps=options.steps or 1,
        micro_batch_size=options.micro_batch_size or share,
        max_grad_norm=options.max_grad_norm or None,
    )
    sequences = SequenceConfig(**arguments(SequenceConfig, options))
    run = arguments(RunConfig, options, sequences=sequences, dtype=dtype_of(options.dtype))
    return TrainingConfig(**training), RunConfig(**run)


@contextmanager
def _processes(options: argparse.Namespace) -> Iterator[bool]:
    """Joins the processes of torchrun, if it started this one; yields whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(options.device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=options.timeout)
    )
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
