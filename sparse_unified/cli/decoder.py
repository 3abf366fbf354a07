# SPDX-License-Identifier: Apache-2.0
"""decoder: sweeps of decoders of transformers, such as parts of Qwen-Image and Ming-Omni."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified import analysis
from sparse_unified._common import Report, optional
from sparse_unified.analysis.bagel_task import perplexity
from sparse_unified.analysis.evaluators import load_function
from sparse_unified.analysis.plots import write_plots
from sparse_unified.analysis.samples import Sample, read_lines
from sparse_unified.analysis.statistics import hash_model
from sparse_unified.cli.analysis import add_shard, add_swept, shard_of
from sparse_unified.cli.console import show_progress
from sparse_unified.cli.generate import add_model, check_device
from sparse_unified.cli.options import Flags, arguments, dtype_of


def add_decoder(flags: Flags) -> None:
    add_model(flags, lora=False)
    flags.table("""
        --out DIR!           folder of the results
        --texts FILE!        texts the model reads, one a line
        --samples N          the first N texts
        --max-tokens N       most tokens of a text (default 256)
        --tokenizer DIR      where the tokenizer is (default: with the model)
        --loader MODULE:FUNCTION  a function from MODEL to (model, tokenizer), for models that
                                  transformers has no class for; a file may be named instead
        --no-plots           draw no plots
        """)
    add_swept(flags.group("what is swept"))
    flags.of(analysis.SweepConfig, "seed repeats", seed="of random choices")
    add_shard(flags)


def run_decoder(options: argparse.Namespace) -> Report:
    """Makes a decoder of transformers smaller in memory, point by point, and measures each point.

    MODEL is a directory or hub id of a language model, dense or a mixture, such as the text encoder
    of Qwen-Image or the language model of Ming-Omni. It is pruned along its axes at every ratio
    that is kept, and measured by perplexity of the texts and by the distance of the last hidden
    states from the dense ones. OUT is as of analyze.
    """
    check_device(options.device, "--device")
    model, tokenizer = _load(options)
    lines = [line for _, line in read_lines(options.texts, "--texts")][: options.samples]
    texts = {}  # by the name of a sample
    for number, line in enumerate(lines):
        ids = tokenizer.encode(line)[: options.max_tokens]
        if len(ids) > 1:
            name = Sample(prompt=line, seed=number).fingerprint()
            texts[name] = torch.tensor([ids], device=options.device)
    if not texts:
        raise ValueError(f"--texts: {options.texts} must hold a text of two tokens, got none")

    @torch.no_grad()
    def read(ids: Tensor) -> Any:
        return model(input_ids=ids, output_hidden_states=True)

    def run(begin: Any) -> None:
        for name, ids in texts.items():
            begin(name)
            read(ids)

    probe = analysis.Probe(
        task="text",
        evaluators={"text": _Text(list(texts.values()), read)},
        run=run,
        workload=lambda: lambda: read(next(iter(texts.values()))),
        description={"samples": list(texts)},
    )
    counted = analysis.StatisticsConfig()
    config = analysis.SweepConfig(
        **arguments(analysis.SweepConfig, options, components=("und",), statistics=counted)
    )
    with show_progress(options, "decoder", "point") as progress:
        result = analysis.run_sweep(
            model,
            [probe],
            config,
            options.out,
            description={"model": hash_model(model), "device": options.device},
            shard=shard_of(options),
            progress=progress,
        )
    if not options.no_plots:
        write_plots(result, Path(options.out) / "plots")
    return result


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Returns model and tokenizer; code that comes with a model is never run."""
    if options.loader is not None:
        loader = load_function(options.loader, "--loader")
        if not callable(loader):
            raise ValueError(f"--loader: {options.loader} must be a function, got {loader!r:.120}")
        model, tokenizer = loader(options.model)
        return model.to(options.device).eval(), tokenizer
    transformers = optional("transformers", "bagel", purpose="decoder")
    try:
        config = transformers.AutoConfig.from_pretrained(options.model, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            raise ValueError(f"architectures {config.architectures}")
        model = kind.from_pretrained(
            options.model, dtype=dtype_of(options.dtype), trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            options.tokenizer or options.model, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{options.model}: must be a model of transformers (or give --loader), got {first}"
        ) from error
    return model.to(options.device).eval(), tokenizer


class _Text:
    """Perplexity of texts, and relative distance of the last hidden states from the dense ones."""

    def __init__(self, texts: list[Tensor], read: Any) -> None:
        self.texts, self.read = texts, read
        self.better = {"perplexity": "lower", "hidden_distance": "lower"}
        self.dense: list[Tensor] = []

    def prepare(self, model: object) -> None:
        """Keeps the hidden states of the dense model."""
        self.dense = [self.read(ids).hidden_states[-1].float().cpu() for ids in self.texts]

    def __call__(self, model: object) -> dict[str, float]:
        loss, tokens, apart = 0.0, 0, 0.0
        for ids, dense in zip(self.texts, self.dense, strict=True):
            out = self.read(ids)
            logits = out.logits[0, :-1].float()
            loss += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
            hidden = out.hidden_states[-1].float().cpu()
            apart += float((hidden - dense).norm() / dense.norm())
        return {
            "perplexity": perplexity(loss, tokens),
            "hidden_distance": apart / len(self.texts),
        }
