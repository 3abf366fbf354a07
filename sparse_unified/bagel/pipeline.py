# SPDX-License-Identifier: Apache-2.0
"""Prompts and images in, images or text out."""

from __future__ import annotations

import secrets
import sys
import tempfile
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Union

import torch
from torch import Tensor

from sparse_unified._common import (
    Progress,
    Report,
    StrPath,
    check_int,
    check_number,
    context,
    optional,
    progress_bar,
    require,
)
from sparse_unified.bagel import sampler
from sparse_unified.bagel.attention import KVCache
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.execution import Execution
from sparse_unified.bagel.hub import push_to_hub, save_model
from sparse_unified.bagel.images import ImageProcessor, to_rgb
from sparse_unified.bagel.loading import Device, Offload, Placement, Task, load_bagel
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.sampler import SamplingConfig, denoising_steps
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.checkpoint.model_dir import Checkpoint, find_model
from sparse_unified.nn import SparseMoE, active_experts

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
if TYPE_CHECKING:
    from PIL.Image import Image

Images = Union["Image", Sequence["Image"], None]
Size = tuple[int, int]

# The words that switch thinking on, those of BAGEL's inferencer letter by letter, because the
# released checkpoints were trained on them; the blank at the end of each first line is theirs.
THINK_BEFORE_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
THINK_BEFORE_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user "
    "with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
# The official settings where editing differs from text to image, whose are the defaults.
_EDITING: dict[str, Any] = {
    "cfg_img_scale": 2.0,
    "cfg_interval": (0.0, 1.0),
    "cfg_renorm_type": sampler.Renorm.TEXT_CHANNEL,
}


@dataclass(slots=True, kw_only=True)
class Timing(Report):
    """Seconds, tokens and memory of one call."""

    derived: ClassVar[tuple[str, ...]] = ("seconds_per_step",)

    device: str
    dtype: str
    backend: str  # what runs the sparse FFNs; "dense" without one
    context_tokens: int = 0  # read before the output, over all contexts
    image_tokens: int = 0  # latent tokens generated
    text_tokens: int = 0  # generated
    steps: int = 0  # of denoising, of all batches
    computed_steps: int = 0  # in which the model ran; a step cache extrapolates the others
    step_seconds: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    text_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0
    # On a GPU the most allocated during the call, on the CPU the most the process ever had.
    peak_memory_bytes: int = 0

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of a denoising step; 0 without steps."""
        return median(self.step_seconds) if self.step_seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """Generated images, one per prompt."""

    images: list[Image]
    latents: list[Tensor]  # tokens [N, p * p * C] fp32 of each, before decoding, on the CPU
    thoughts: list[str] | None  # the text each was planned with; None without thinking
    seeds: list[int]
    sizes: list[Size]  # height and width, in pixels
    report: Timing  # what it took


@dataclass(frozen=True, slots=True, kw_only=True)
class TextResult:
    """Generated text, its token ids (bos first, without eos), and what it took."""

    text: str
    token_ids: list[int]
    report: Timing

    def __str__(self) -> str:
        return self.text


# ---- What a user asks for, checked before anything is computed


def check_prompts(prompts: Any) -> list[str]:
    """Returns one prompt or several as a list, each a string that is not blank."""
    listed = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    require(listed, "prompts must hold at least one prompt", "none")
    for prompt in listed:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
        require(prompt.strip(), "prompt must not be empty", repr(prompt))
    return listed


def _per_prompt(name: str, value: Any, count: int, *, is_one: bool) -> list[Any]:
    """Returns a value, or a list of values, as a list with one entry per prompt."""
    if is_one:
        return [value] * count
    found = len(value) if isinstance(value, (list, tuple)) else f"{value!r:.120}"
    require(found == count, f"{name} must be one or a list of {count}", found)
    return list(value)


def check_images(images: Any, prompts: str | Sequence[str]) -> list[list[Image]]:
    """Returns the images before each prompt, in RGB.

    One prompt as a string takes an image or a list of them; a list of prompts takes a list of the
    same length, each entry an image, a list of images, or None.
    """
    if isinstance(prompts, str):
        images, prompts = [images], [prompts]
    listed: list[list[Image]] = []
    for entry in _per_prompt("images", images, len(prompts), is_one=images is None):
        own = [] if entry is None else entry if isinstance(entry, (list, tuple)) else [entry]
        for image in own:
            if not isinstance(image, optional("PIL.Image").Image):
                raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
        listed.append([to_rgb(image) for image in own])
    return listed


def check_seeds(seed: int | Sequence[int] | None, num_images: int) -> list[int]:
    """Returns one seed per image: as given, counted up from one number, or drawn at random."""
    first = secrets.randbits(32) if seed is None else seed
    is_one = not isinstance(first, (list, tuple))
    seeds = _per_prompt("seed", first, num_images, is_one=is_one)
    for value in seeds:
        check_int("seed", value, 0, 2**63 - 1)
    return [(value + i) % 2**63 for i, value in enumerate(seeds)] if is_one else seeds


def choose_sizes(
    size: Size | Sequence[Size] | None, edited: Sequence[Size | None], config: BagelConfig
) -> list[Size]:
    """Returns the height and width of each image: `size`, one for all or one per prompt; where it
    is None, that of the last image before the prompt (`edited`), or 1024 x 1024, or less if the
    model takes less."""
    if size is None:
        side = min(1024 // config.latent_downsample, config.max_latent_size)
        side *= config.latent_downsample
        return [own or (side, side) for own in edited]
    is_one = not (isinstance(size, Sequence) and all(isinstance(own, Sequence) for own in size))
    sizes = _per_prompt("size", size, len(edited), is_one=is_one)
    for pair in sizes:
        is_pair = isinstance(pair, Sequence) and len(pair) == 2
        require(is_pair, "size must be a pair (height, width)", f"{pair!r:.120}")
        config.token_grid(*pair)
    return [(height, width) for height, width in sizes]


def sampling_batches(
    edits: Sequence[bool], batch_size: int | None, settings: Mapping[str, Any]
) -> list[tuple[list[int], SamplingConfig]]:
    """Groups images, which edit others or not, into batches of one way to sample: the positions of
    those of each batch, and how to sample them. Fields of `settings` that are None take the
    official value of each request, which makes it the same in any company."""
    if batch_size is not None:
        check_int("batch_size", batch_size, 1)
    step = batch_size or len(edits)
    given = {name: value for name, value in settings.items() if value is not None}
    groups: dict[SamplingConfig, list[int]] = {}
    for index, is_edit in enumerate(edits):
        config = SamplingConfig(**((_EDITING if is_edit else {}) | given))
        groups.setdefault(config, []).append(index)
    return [
        (indices[start : start + step], config)
        for config, indices in groups.items()
        for start in range(0, len(indices), step)
    ]


# ---- Text, token by token


@context("generate_tokens")
def generate_tokens(
    model: Bagel,
    contexts: Sequence[KVCache],
    *,
    max_length: int,
    temperature: float | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each context with a text, several sequences at once.

    Args:
        contexts: KV caches of what the sequences have seen; they are only read.
        max_length: most tokens of a sequence, the leading bos included.
        temperature: None takes the likeliest token; otherwise tokens are drawn from
            softmax(logits / temperature); 1e-6 to 1e6.
        seeds: one per sequence, for drawing; a sequence gets the same text alone or in a batch.

    Returns:
        Token ids of each sequence, from bos up to but without eos.
    """
    check_int("max_length", max_length, 1)
    if temperature is not None:
        check_number("temperature", temperature, 1e-6, 1e6)
    if temperature is not None and (seeds is None or len(seeds) != len(contexts)):
        raise ValueError(f"seeds must be {len(contexts)} integers when sampling, got {seeds}")
    special = model.config.special_tokens
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(contexts)]
    pasts = [past.fork() for past in contexts]
    texts = [[special.bos] for _ in pasts]
    active = list(range(len(pasts)))
    for _ in range(max_length - 1):
        logits = model.next_logits([pasts[i] for i in active], [texts[i][-1] for i in active])
        if temperature is None:
            chosen = logits.argmax(dim=-1).tolist()
        else:
            # Drawn on the CPU, so that a seed means the same on every device.
            rows = zip(torch.softmax(logits / temperature, dim=-1).cpu(), active, strict=True)
            chosen = [torch.multinomial(row, 1, generator=generators[i]) for row, i in rows]
        for i, token in zip(active, chosen, strict=True):
            texts[i].append(int(token))
        active = [i for i in active if texts[i][-1] != special.eos]
        if not active:
            break
    return [text[:-1] if text[-1] == special.eos else text for text in texts]


class BagelPipeline:
    """A model, its autoencoder and its tokenizer.

    Example:
        >>> pipeline = BagelPipeline.from_pretrained("BAGEL-MoE", device="cuda")
        >>> pipeline.generate("a red bench", seed=1).images[0].save("bench.png")
        >>> print(pipeline.chat("What is in the image?", images=Image.open("bench.png")))

    Args:
        model: dense or sparse.
        vae: its autoencoder.
        tokenizer: its tokenizer, with the marker ids of `model.config`.
        execution: how the model is run in each step; may be set later. None is op by op.
    """

    def __init__(
        self,
        model: Bagel,
        vae: AutoEncoder,
        tokenizer: Tokenizer,
        *,
        execution: Execution | None = None,
    ) -> None:
        markers, found = model.config.special_tokens, tokenizer.special_tokens
        rule = f"BagelPipeline: tokenizer must have the marker ids of the model, {markers}"
        require(found == markers, rule, found)
        self.execution = execution or Execution()
        self.execution.check(model.device, model)
        self.model = model
        self.vae = vae
        self.tokenizer = tokenizer
        self.directory: Path | None = None  # that the model came from
        self.image_processor = ImageProcessor(model.config, vae)

    @classmethod
    @context("from_pretrained")
    def from_pretrained(
        cls,
        name: StrPath,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: StrPath | None = None,
        local_files_only: bool = False,
        task: Task | str = Task.ALL,
        offload: Offload | str = Offload.NONE,
        storage: str | Mapping[str, str] | None = None,
        device_map: str | Mapping[str, Device] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: StrPath | None = None,
        compile: bool | str = False,
        cuda_graphs: bool = False,
    ) -> BagelPipeline:
        """Loads a dense, sparse or pruned checkpoint; host memory holds it and 64 MiB more.

        Args:
            name: a model directory, or a hub id such as "ByteDance-Seed/BAGEL-7B-MoT".
            device: where the weights go.
            dtype: what they become; None keeps what each file holds.
            revision: of a hub id: a branch, tag or commit; None is the newest.
            token, cache_dir, local_files_only: of a hub id, as `huggingface_hub` takes them.
            task: "image" leaves out what images from texts never read: the head, the ViT, and the
                last layer's und FFN; "edit" leaves out the head and that FFN; "all", nothing.
                Images are the same bit for bit.
            offload: "und" keeps the und FFNs in host memory. Prompts bring them to the device one
                after the other; the two markers of an image, two rows a step, visit them instead.
            storage: "int8", "fp8", "fp8-compute" or "nvfp4" (4 bits) for all FFNs, or a mapping of
                "und" and "gen" to one each, see `QuantizeConfig`: their weights are quantized one
                by one as they are loaded. Needs the `quant` extra.
            device_map: "auto", or module path -> device, "cpu" or "disk": where decoder layers go,
                by accelerate (the `offload` extra); all else is on `device`.
            max_memory: with "auto", bytes by device, as accelerate takes them.
            offload_folder: where weights on "disk" are written.
            compile: how the steps of denoising are run, see `Execution`.
            cuda_graphs: likewise.

        Raises:
            ValueError: there is no such model, its files are damaged or disagree, or the arguments
                do not go together. ImportError: an extra is not installed.
        """
        execution = Execution(compile=compile, cuda_graphs=cuda_graphs)
        placement = Placement(
            device=device,
            task=task,
            offload=offload,
            storage=storage,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
        execution.check(torch.device(device))
        is_whole = device_map is None and placement.offload is Offload.NONE
        rule = "compile and cuda_graphs must come without device_map and offload"
        found = f"device_map={device_map!r}, offload={Offload(offload).value!r}"
        require(is_whole or execution.is_plain, rule, found)
        directory = find_model(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        tokenizer = Tokenizer.from_directory(directory)
        special = tokenizer.special_tokens
        model, vae = load_bagel(directory, dtype=dtype, special_tokens=special, placement=placement)
        pipeline = cls(model, vae, tokenizer, execution=execution)
        pipeline.directory = directory
        return pipeline

    @context("save_pretrained")
    def save_pretrained(self, save_directory: StrPath, **card: Any) -> None:
        """Writes the model as it is now, with the other files of the directory it came from.

        Args:
            save_directory: to make; it must not exist.
            card: of README.md, which is written anew: `base_model` and `license`.

        Raises:
            ValueError: the model came from no directory, or its structure is not that of the files.
        """
        if self.directory is None:
            raise ValueError("pipeline must come from from_pretrained, got one made of its parts")
        save_model(self.model, Checkpoint(self.directory), save_directory, **card)

    @context("push_to_hub")
    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes, and returns its address.

        Args:
            repo_id: "owner/name"; made if it is not there.
            options: of `sparse_unified.bagel.push_to_hub`, such as `private` and `base_model`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(f"{folder}/model")
            return push_to_hub(f"{folder}/model", repo_id, **options)

    @context("generate")
    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images: Images | Sequence[Images] = None,
        seed: int | Sequence[int] | None = None,
        size: Size | Sequence[Size] | None = None,
        think: bool = False,
        max_think_length: int = 1000,
        think_temperature: float | None = None,
        batch_size: int | None = None,
        tiled: bool = False,
        progress: bool | Progress = True,
        preview: Callable[[int, Image], None] | None = None,
        **sampling: Any,
    ) -> GenerationResult:
        """Generates one image per prompt, many of them together.

        Args:
            prompts: one text or several. Markers in a text, such as <|im_end|>, become the markers'
                ids, as in the official code, and its length is not limited: a service should look
                at both first.
            images: to edit: for one text an image or a list; for several texts a list of such, or
                None, one for each.
            seed: one per image; a single number is counted up from image to image; None is random.
                The same prompt and seed give the same image alone or among others.
            size: (height, width) in pixels, multiples of 16; one for all or one per prompt. None is
                that of the last image, or 1024 x 1024.
            think: let the model plan in text first.
            max_think_length: most tokens of the plan.
            think_temperature: draw the plan at this temperature; without it, the likeliest tokens.
            batch_size: most images of one setting computed together, which bounds memory (default
                all)
            tiled: decode images in tiles of 576 x 576 pixels, in less memory than at once; pixels
                differ a little. Done anyway, with a warning in the log, where
                decoding at once runs out of memory.
            progress: show a bar, or a function that is called with steps done and in all.
            preview: called after each step with the number of each prompt and its image as it is
                expected from there, with sides of up to 256 pixels; not in the seconds of a step.
            sampling: fields of `SamplingConfig`. None, and what is not given, takes the official
                setting of each prompt: for text alone the default; for a prompt with images
                cfg_img_scale 2, cfg_interval (0, 1) and cfg_renorm_type "text_channel".
        """
        texts, before = check_prompts(prompts), check_images(images, prompts)
        resized = self.image_processor.for_vae.size
        edited = [resized(*own[-1].size)[::-1] if own else None for own in before]
        seeds = check_seeds(seed, len(texts))
        sizes = choose_sizes(size, edited, self.model.config)
        batches = sampling_batches([bool(own) for own in before], batch_size, sampling)
        first = batches[0][1]
        num_steps = sum(config.num_timesteps - 1 for _, config in batches)
        report, model, encode = self._timing(), self.model, self.tokenizer.encode
        see, decode = self.image_processor.encode, self.image_processor.decode
        drawn: list[Any] = [None] * len(texts)
        latents, thoughts = list(drawn), list(drawn)
        with (
            self._clock(report, "total_seconds"),
            nullcontext(progress)
            if callable(progress)
            else progress_bar("denoising", "step", show=progress) as bar,
            active_experts(model, first.top_k_at(1.0))  # which read and plan
            if first.top_k is not None
            else nullcontext(),
        ):

            def on_step(_: int, seconds: float) -> None:
                report.step_seconds.append(seconds)
                bar(len(report.step_seconds), num_steps)

            for batch, config in batches:

                def on_latents(expected: list[Tensor], batch: list[int] = batch) -> None:
                    for i, x in zip(batch, expected, strict=True):
                        preview(i, decode(x, sizes[i], small=True))  # type: ignore[misc]

                with self._clock(report, "prefill_seconds"):
                    guidance = sampler.build_guidance(
                        model,
                        [encode(texts[i]) for i in batch],
                        images=[[see(image, vae=True) for image in before[i]] for i in batch],
                        system_ids=encode(THINK_BEFORE_IMAGE) if think else None,
                    )
                report.context_tokens += sum(g.full.length for g in guidance)
                if think:  # the full contexts read the plan; unconditional ones never see it
                    full = [g.full for g in guidance]
                    written = self._write(
                        full,
                        report,
                        max_length=max_think_length,
                        temperature=think_temperature,
                        seeds=[seeds[i] for i in batch],
                    )
                    with self._clock(report, "text_seconds"):
                        model.prefill_text(full, [encode(plan) for plan, _ in written])
                    for i, (plan, _) in zip(batch, written, strict=True):
                        thoughts[i] = plan
                grids = [model.config.token_grid(*sizes[i]) for i in batch]
                noise = [
                    sampler.initial_noise(rows * columns, model.config.token_channels, seeds[i])
                    for (rows, columns), i in zip(grids, batch, strict=True)
                ]
                tokens = sampler.sample_latents(
                    model,
                    guidance,
                    noise,
                    grids,
                    config,
                    execution=self.execution,
                    on_step=on_step,
                    on_latents=None if preview is None else on_latents,
                )
                report.computed_steps += sum(step.computed for step in denoising_steps(config))
                report.image_tokens += sum(len(x) for x in tokens)
                with self._clock(report, "decode_seconds"):
                    for i, x in zip(batch, tokens, strict=True):
                        drawn[i], latents[i] = decode(x, sizes[i], tiled=tiled), x.cpu()
            report.steps = len(report.step_seconds)
        return GenerationResult(
            images=drawn,
            latents=latents,
            thoughts=thoughts if think else None,
            seeds=seeds,
            sizes=sizes,
            report=report,
        )

    @context("chat")
    @torch.no_grad()
    def chat(
        self,
        prompt: str,
        *,
        images: Images = None,
        max_length: int = 500,
        temperature: float | None = None,
        seed: int | None = None,
        think: bool = False,
        top_k: int | None = None,
    ) -> TextResult:
        """Answers a text, with or without images before it, in text.

        Args:
            prompt: the text, as for `generate`.
            images: an image or a list of them.
            max_length: most tokens of the answer, its start marker included.
            temperature: draw tokens at this temperature; without it, the likeliest.
            seed: of the drawing (default random)
            think: let the model reason first; its reasoning is part of the answer.
            top_k: routed experts of a token in sparse FFNs (default: those of the model)
        """
        check_prompts([prompt])
        own, seeds = check_images(images, prompt)[0], check_seeds(seed, 1)
        report = self._timing()
        with active_experts(self.model, top_k), self._clock(report, "total_seconds"):
            contexts = self.model.new_contexts(1)
            with self._clock(report, "prefill_seconds"):
                if think:
                    self.model.prefill_text(contexts, [self.tokenizer.encode(THINK_BEFORE_ANSWER)])
                seen = [self.image_processor.encode(image, vae=False) for image in own]
                sampler.see_images(self.model, contexts, [seen])
                self.model.prefill_text(contexts, [self.tokenizer.encode(prompt)])
            report.context_tokens = contexts[0].length
            options = {"max_length": max_length, "temperature": temperature, "seeds": seeds}
            [(text, ids)] = self._write(contexts, report, **options)
        return TextResult(text=text, token_ids=ids, report=report)

    def _write(
        self, contexts: Sequence[KVCache], report: Timing, **options: Any
    ) -> list[tuple[str, list[int]]]:
        """Continues contexts with texts; returns them without markers, and their ids from bos."""
        with self._clock(report, "text_seconds"):
            many = generate_tokens(self.model, contexts, **options)
        report.text_tokens += sum(len(ids) - 1 for ids in many)
        return [(self.tokenizer.decode(ids[1:]), ids) for ids in many]

    def _timing(self) -> Timing:
        """Starts counting; on a GPU the peak is that of this call."""
        model = self.model
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        backends = {m.active_backend for m in model.modules() if isinstance(m, SparseMoE)}
        return Timing(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            backend=", ".join(sorted(backends)) or "dense",
        )

    @contextmanager
    def _clock(self, report: Timing, name: str) -> Iterator[None]:
        """Adds the seconds inside to a field of the report, and brings its peak of memory on."""
        start, device = clock.perf_counter(), self.model.device
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            report.peak_memory_bytes = torch.cuda.max_memory_allocated(device)
        elif resource is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            report.peak_memory_bytes = peak * (1 if sys.platform == "darwin" else 1024)
        setattr(report, name, getattr(report, name) + clock.perf_counter() - start)
