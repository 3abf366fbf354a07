# SPDX-License-Identifier: Apache-2.0
"""app: a page in the browser on which models draw, edit and answer beside each other."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from sparse_unified._common import optional
from sparse_unified.bagel import BagelPipeline, SamplingConfig, StepCache
from sparse_unified.checkpoint import keys
from sparse_unified.cli.console import Usage
from sparse_unified.cli.generate import add_guidance, add_model, add_placement, load_pipeline
from sparse_unified.cli.options import Flags, arguments
from sparse_unified.nn import SparseMoE, active_experts
from sparse_unified.surgery import count_parameters

if TYPE_CHECKING:
    from PIL.Image import Image

Models = Mapping[str, BagelPipeline]  # by name


def sparse_blocks(pipeline: BagelPipeline) -> dict[str, SparseMoE]:
    return {n: block for n, block in pipeline.model.named_modules() if isinstance(block, SparseMoE)}


def active_parameters(pipeline: BagelPipeline) -> tuple[int, int]:
    """Counts the weights that a token of an image runs through, and all of that component."""
    total = count_parameters(pipeline)["gen"].parameters
    blocks = sparse_blocks(pipeline).items()
    idle = (b.idle_parameters for name, b in blocks if keys.component_of(f"{name}.") == "gen")
    return total - sum(idle), total


def live(name: str, generate: Callable[..., Any]) -> Generator[tuple[str, Image, str], None, Any]:
    """Yields the preview of each step while `generate` runs in a thread, and returns its result."""
    told: SimpleQueue[Image | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(generate, preview=lambda _, image: told.put(image))
        result.add_done_callback(lambda _: told.put(None))
        for step, image in enumerate(iter(told.get, None), 1):
            yield name, enlarge(image), f"step {step}"
    return result.result()


def draw(
    models: Models,
    prompt: str,
    *,
    images: Image | None = None,
    seed: int | None = None,
    top_k: Mapping[str, int] | None = None,
    interval: int = 1,
    **options: Any,
) -> Iterator[tuple[str, Image, str]]:
    """Draws a prompt, or edits an image, with one model after the other, from the same noise.

    Args:
        seed: of the noise; None is random. interval: of the step cache; 1 computes all steps.
        top_k: active experts by name of the model; others keep theirs.
        options: of `BagelPipeline.generate`.

    Yields: name of the model, its image as expected after each step and which step it is, then
        its image and what it took.
    """
    seed = secrets.randbits(32) if seed is None else seed
    options["cache"] = StepCache(interval=interval) if interval > 1 else None
    if images is not None:
        options.pop("size", None)  # an edited image keeps its own
    for name, pipeline in models.items():
        with active_experts(pipeline.model, (top_k or {}).get(name)):
            active, total = active_parameters(pipeline)
            generate = partial(
                pipeline.generate, prompt, images=images, seed=seed, progress=False, **options
            )
            result = yield from live(name, generate)
        took = result.report
        text = (
            f"{took.total_seconds:.2f} s, {1000 * took.seconds_per_step:.1f} ms a step, "
            f"{took.computed_steps} of {took.steps} steps computed\n\n"
            f"{active:,} of {total:,} parameters of gen layers active\n\nseed {seed}"
        )
        yield name, enlarge(result.images[0]), text


def ask(
    models: Models, question: str, *, top_k: Mapping[str, int] | None = None, **options: Any
) -> Iterator[tuple[str, str, str]]:
    """Yields for each model its name, its answer, and what that took; `options` are of `chat`."""
    for name, pipeline in models.items():
        result = pipeline.chat(question, top_k=(top_k or {}).get(name), **options)
        took = result.report
        yield name, result.text, f"{took.total_seconds:.2f} s, {took.text_tokens} tokens"


def enlarge(image: Image) -> Image:
    """Shows the pixels of images with sides below 256."""
    factor = -(-256 // min(image.size))
    return image if factor == 1 else image.resize([factor * side for side in image.size], 0)


def build_page(models: Models, **sampling: Any) -> Any:
    """Returns gradio's `Blocks`; `sampling` is what `draw` is given and the page begins with."""
    gr = optional("gradio", "app", purpose="the page")
    sparse = {name: blocks for name in models if (blocks := sparse_blocks(models[name]))}
    picture = partial(gr.Image, format="png", height=260, buttons=["download", "fullscreen"])
    steps, scale = sampling["num_timesteps"], sampling["cfg_text_scale"]

    def run(tab: str, text: str, image: Any, *given: Any) -> Any:
        if not (text or "").strip() or (tab == "Edit" and image is None):
            raise gr.Error("Write a text first." if image or tab != "Edit" else "Choose an image.")
        seed, steps, scale, interval, *experts = given
        options: dict[str, Any] = {"top_k": dict(zip(sparse, map(int, experts), strict=True))}
        if tab != "Ask":
            options |= {**sampling, "num_timesteps": int(steps), "cfg_text_scale": scale}
            options |= {"seed": None if seed is None else int(seed), "interval": int(interval)}
        call: Any = ask if tab == "Ask" else draw
        shown: list[Any] = [None] * (2 * len(models))
        places = {name: 2 * i for i, name in enumerate(models)}
        for name, *found in call(models, text, images=image, **options):
            shown[places[name] : places[name] + 2] = found
            yield list(shown)

    with gr.Blocks(title="sparse_unified", analytics_enabled=False) as page:
        with gr.Row():
            settings = [
                gr.Number(0, label="Seed", precision=0, minimum=0),
                gr.Slider(2, max(100, steps), steps, step=1, label="Timesteps"),
                gr.Slider(1, max(10, scale), scale, step=0.1, label="Guidance"),
                gr.Slider(1, 10, 1, step=1, label="Step cache interval"),
            ]
            for name, blocks in sparse.items():
                most = max(block.num_experts for block in blocks.values())
                top_k = max(block.top_k for block in blocks.values())
                label = f"Active experts of {name}"
                settings.append(gr.Slider(1, most, top_k, step=1, label=label))
        for tab, label in {"Draw": "Prompt", "Edit": "What to change", "Ask": "Question"}.items():
            with gr.Tab(tab):
                text = gr.Textbox(label=label)
                image = gr.State() if tab == "Draw" else picture(type="pil", label="Image")
                button = gr.Button(tab, variant="primary")
                outputs: list[Any] = []
                with gr.Row():
                    for name in models:
                        with gr.Column(min_width=200):
                            one = gr.Textbox if tab == "Ask" else picture
                            outputs += [one(label=name, interactive=False), gr.Markdown()]
                call = (partial(run, tab), [text, image, *settings], outputs)
                # It changes the models for as long as it runs, so calls wait for each other.
                named = {"concurrency_id": "models", "api_name": tab.lower()}
                gr.on([text.submit, button.click], *call, **named)
    return page


def add_app(flags: Flags) -> None:
    add_model(flags, "MODEL...")
    flags.table("""
        --host HOST  address to serve on (default 127.0.0.1: this machine alone)
        --port PORT  to serve on (default 7860)
        --open       open the page in a browser
        --size HxW   height and width of drawn images, multiples of 16
        """)
    flags.of(SamplingConfig, "steps=num_timesteps timestep_shift cfg_text_scale cfg_renorm_min")
    add_guidance(flags)
    add_placement(flags, tasks=False)


def run_app(options: argparse.Namespace) -> None:
    """Serves a page on which models draw, edit and answer beside each other, until interrupted."""
    given: list[str] = options.model
    if len(set(given)) < len(given):
        raise Usage(f"app: MODEL must be different ones, got {' '.join(given)}")
    optional("gradio", "app", purpose="the page")
    sampling = {k: v for k, v in arguments(SamplingConfig, options).items() if v is not None}
    SamplingConfig(**sampling)
    short = {Path(path).name: path for path in given}
    paths = short if len(short) == len(given) else {path: path for path in given}
    own = {name: argparse.Namespace(**vars(options) | {"model": paths[name]}) for name in paths}
    models = {name: load_pipeline(its) for name, its in own.items()}
    configs = [pipeline.model.config for pipeline in models.values()]
    if len({(c.token_channels, c.latent_downsample, c.max_latent_size) for c in configs}) > 1:
        raise ValueError(f"app: MODEL must be of the same image size, got {' '.join(given)}")
    page = build_page(models, size=options.size, **sampling)
    address = {"server_name": options.host, "server_port": options.port}
    try:
        page.launch(**address, inbrowser=options.open, quiet=options.quiet, show_error=True)
    except OSError as error:
        raise ValueError(f"app: --port must be free, got {options.port}") from error
