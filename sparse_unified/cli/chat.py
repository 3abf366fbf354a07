# SPDX-License-Identifier: Apache-2.0
"""chat: text from a prompt, and from images and a prompt."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sparse_unified.cli import values
from sparse_unified.cli.console import add_common, check_output, write_result
from sparse_unified.cli.models import add_model, load_pipeline, open_images
from sparse_unified.cli.placement import add_placement


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    chat = commands.add_parser(
        "chat",
        help="answer a prompt, with or without pictures, in text",
        description="Prints the answer to a prompt; pictures come before it.",
    )
    add_model(chat)
    chat.add_argument("--prompt", type=values.prompt, required=True, help="the question")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture (repeatable)"
    )
    chat.add_argument(
        "--max-tokens",
        type=values.positive,
        default=500,
        help="most tokens of the answer (default 500)",
    )
    chat.add_argument(
        "--temperature",
        type=float,
        help="draw tokens at this temperature; without it, the likeliest",
    )
    chat.add_argument("--seed", type=values.seed, help="of the drawing (default random)")
    chat.add_argument("--think", action="store_true", help="let the model reason first")
    add_placement(chat, tasks=False)
    add_common(chat)
    chat.set_defaults(run=_run_chat)


def _run_chat(options: argparse.Namespace) -> int:
    check_output(options.json, "--json")
    images = open_images(options.image)
    pipeline = load_pipeline(options)
    result = pipeline.chat(
        options.prompt,
        images=images or None,
        max_length=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        think=options.think,
    )
    document = {
        "model": options.model,
        "prompt": options.prompt,
        "text": result.text,
        "token_ids": result.token_ids,
        **result.report.as_dict(),
    }
    write_result(options.json, result.text, json.dumps(document, indent=2, ensure_ascii=False))
    return 0
