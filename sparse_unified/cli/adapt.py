# SPDX-License-Identifier: Apache-2.0
"""adapt: tuning of a model on pictures and texts."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparse_unified._common import progress_bar
from sparse_unified.cli import values
from sparse_unified.cli.console import Usage, add_common, check_output, show_progress, write_result
from sparse_unified.cli.models import check_device

if TYPE_CHECKING:
    from sparse_unified.adapt import RunConfig, StepRecord, TrainingConfig

_DESCRIPTION = """\
Trains MODEL on pictures and texts and writes the trained model to OUT, which appears complete or
not at all. While the run lasts, its log and its states lie in OUT.training; with --resume a run
that was cut short goes on from its latest state, exactly as if it had not been.
Under torchrun, weights and optimizer are sharded over the processes with FSDP2."""

_STAGES = ("router", "expert_frozen", "full")
_TASKS = ("generation", "understanding", "editing")


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("adapt", help="tune a model", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a model directory or a hub id owner/name")
    parser.add_argument("out", metavar="OUT", help="the directory to make; must not exist")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="a folder, a file or a pattern: .parquet or .tar shards; or a .jsonl file with image, "
        "text, question, answer, source; or pictures, each with a .txt file of the same name",
    )
    parser.add_argument(
        "--stage",
        default="expert_frozen",
        choices=_STAGES,
        help="what is trained: the routers alone; all but the experts (default); all",
    )
    parser.add_argument(
        "--component",
        default="both",
        choices=("both", "gen", "und"),
        help="train the weights of one component alone (default both)",
    )
    parser.add_argument("--steps", type=values.positive, help="optimizer steps")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of computation (default: as in the files); the optimizer works in float32",
    )
    _add_data(parser.add_argument_group("data"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_memory(parser.add_argument_group("memory"))
    _add_run(parser.add_argument_group("run"))
    add_common(parser)
    parser.set_defaults(run=_run_adapt)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--tasks",
        type=values.names(*_TASKS),
        help="which uses of the records are trained (default all that they allow)",
    )
    group.add_argument(
        "--max-side", type=values.positive, metavar="PIXELS", help="longest side of pictures"
    )
    group.add_argument(
        "--timestep-shift",
        type=float,
        default=1.0,
        metavar="S",
        help="above 1 trains more near the noise (default 1)",
    )
    for name, default, what in (
        ("text", 0.1, "text before a picture"),
        ("vit", 0.3, "ViT view of a picture to edit"),
        ("vae", 0.3, "VAE view of a picture to edit"),
    ):
        group.add_argument(
            f"--{name}-dropout",
            type=float,
            default=default,
            metavar="P",
            help=f"how often the {what} is left out (default {default})",
        )
    group.add_argument(
        "--cache-latents",
        action="store_true",
        help="encode every picture once and keep its latent in OUT.training",
    )


def _add_optimizer(group: Any) -> None:
    group.add_argument(
        "--batch-size",
        type=values.positive,
        default=8,
        metavar="N",
        help="sequences of a step, over all processes (default 8)",
    )
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate (default 1e-4)")
    group.add_argument(
        "--min-lr", type=float, default=0.0, help="where the cosine ends (default 0)"
    )
    group.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    group.add_argument(
        "--warmup", type=int, default=0, metavar="STEPS", help="of linear warm-up (default 0)"
    )
    group.add_argument(
        "--betas", type=values.interval, default=(0.9, 0.95), help="default 0.9,0.95"
    )
    group.add_argument("--eps", type=float, default=1e-8, help="of AdamW (default 1e-8)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="default 0")
    group.add_argument(
        "--max-grad-norm", type=float, default=1.0, help="of clipping; 0 is none (default 1)"
    )
    group.add_argument(
        "--ema", type=float, metavar="DECAY", help="write averages of the weights (default: not)"
    )
    for option, default, what in (
        ("ce", 1.0, "cross-entropy of text"),
        ("mse", 1.0, "flow-matching error"),
        ("balance", 0.01, "load-balance loss"),
        ("z", 0.0, "router z-loss"),
    ):
        group.add_argument(
            f"--{option}-weight",
            type=float,
            default=default,
            metavar="W",
            help=f"of the {what} (default {default:g})",
        )
    group.add_argument(
        "--seed", type=values.seed, default=0, help="of data order and draws (default 0)"
    )


def _add_memory(group: Any) -> None:
    group.add_argument(
        "--micro-batch-size",
        type=values.positive,
        metavar="N",
        help="sequences of one pass, a divisor of --batch-size (default: a process's share)",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep no activations of layers; compute them again for backward",
    )
    group.add_argument(
        "--optimizer-device",
        metavar="DEVICE",
        help="cpu keeps gradients, float32 weights and moments on the host (default: with the "
        "model)",
    )
    group.add_argument(
        "--estimate-memory",
        action="store_true",
        help="print what the run would take, from the headers of MODEL alone, and stop",
    )


def _add_run(group: Any) -> None:
    group.add_argument(
        "--checkpoint-every", type=values.positive, metavar="STEPS", help="save states to resume"
    )
    group.add_argument(
        "--keep", type=values.positive, default=2, metavar="N", help="states kept (default 2)"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on from the latest state, if there is one"
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="write event files to OUT.training/tensorboard"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="read model and data, check everything, report, and stop before the first step",
    )


def _run_adapt(options: argparse.Namespace) -> int:
    check_output(options.json, "--json")
    if options.estimate_memory:
        return _run_estimate(options)
    for name in ("data", "steps"):
        if getattr(options, name) is None:
            raise Usage(f"adapt: --{name} must be given, got none")
    with _processes(options) as first:
        from sparse_unified.adapt import adapt, plan

        for name in ("device", "optimizer_device"):
            if getattr(options, name) is not None:
                check_device(getattr(options, name), f"--{name.replace('_', '-')}")
        training, run = _configs(options)
        if options.dry_run:
            planned = plan(options.model, options.out, options.data, training, run)
            if first:
                write_result(options.json, planned.to_text(), planned.to_json())
            return 0
        quiet = options.quiet or not first
        with (
            _steps_bar(options.steps, quiet=quiet) as on_step,
            show_progress("writing", "B", quiet=quiet) as progress,
        ):
            report = adapt(
                options.model,
                options.out,
                options.data,
                training,
                run,
                on_step=on_step,
                progress=progress,
            )
        if first:
            write_result(options.json, report.to_text(), report.to_json())
    return 0


def _run_estimate(options: argparse.Namespace) -> int:
    from sparse_unified.adapt import estimate_memory

    training, run = _configs(options)
    estimate = estimate_memory(
        options.model, training, run, processes=int(os.environ.get("WORLD_SIZE", "1"))
    )
    write_result(options.json, estimate.to_text(), estimate.to_json())
    return 0


def _configs(options: argparse.Namespace) -> tuple[TrainingConfig, RunConfig]:
    import torch

    from sparse_unified.adapt import RunConfig, SequenceConfig, TrainingConfig
    from sparse_unified.adapt.sharding import num_processes

    share = max(1, options.batch_size // num_processes())
    training = TrainingConfig(
        steps=options.steps or 1,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size or share,
        learning_rate=options.lr,
        min_learning_rate=options.min_lr,
        schedule=options.schedule,
        warmup_steps=options.warmup,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm or None,
        ema_decay=options.ema,
        ce_weight=options.ce_weight,
        mse_weight=options.mse_weight,
        balance_weight=options.balance_weight,
        z_weight=options.z_weight,
        seed=options.seed,
        checkpointing=options.checkpointing,
        optimizer_device=options.optimizer_device,
    )
    run = RunConfig(
        stage=options.stage,
        component=options.component,
        sequences=SequenceConfig(
            timestep_shift=options.timestep_shift,
            text_dropout=options.text_dropout,
            vit_dropout=options.vit_dropout,
            vae_dropout=options.vae_dropout,
        ),
        tasks=options.tasks,
        max_side=options.max_side,
        device=options.device,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        resume=options.resume,
        tensorboard=options.tensorboard,
        cache_latents=options.cache_latents,
    )
    return training, run


@contextmanager
def _processes(options: argparse.Namespace) -> Iterator[bool]:
    """Joins the processes of torchrun, if it started this one; yields whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    import torch
    import torch.distributed as dist

    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(options.device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


@contextmanager
def _steps_bar(steps: int, *, quiet: bool) -> Iterator[Callable[[StepRecord], object] | None]:
    """Yields what shows a step on stderr: in a bar on a terminal, as a line now and then elsewhere.

    Loss, load of the busiest expert over the mean, and tokens per second.
    """
    if quiet:
        yield None
        return
    if importlib.util.find_spec("tqdm") is None or not sys.stderr.isatty():
        every = max(1, steps // 20)

        def line(record: StepRecord) -> None:
            if record.step % every == 0 or record.step == steps:
                sys.stderr.write(f"step {record.step}/{steps}  {_summary(record)}\n")
                sys.stderr.flush()

        yield line
        return
    with progress_bar("adapt", "step", show=True) as bar:
        yield lambda record: bar(record.step, steps, _summary(record))


def _summary(record: StepRecord) -> str:
    parts = [f"loss {record.loss:.4f}"]
    parts += [
        f"{name} {value:.4f}"
        for name, value in (("text", record.text_loss), ("image", record.image_loss))
        if value is not None
    ]
    if record.load_imbalance is not None:
        parts.append(f"busiest expert {record.load_imbalance:.2f}x")
    return "  ".join([*parts, f"{record.tokens_per_second:,.0f} tokens/s"])
