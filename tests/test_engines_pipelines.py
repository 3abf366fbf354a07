# SPDX-License-Identifier: Apache-2.0
"""The pipeline of diffusers, and tasks of lmms-eval by its own registry, give what ours gives."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from test_engines_vllm_omni import Registry, declared

from sparse_unified.bagel import BagelPipeline, StepCache
from sparse_unified.checkpoint import PruneWidthConfig, prune
from sparse_unified.engines.diffusers import BagelDiffusionPipeline, BagelModel

# diffusers

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipeline(golden: Any) -> BagelDiffusionPipeline:
    made = BagelDiffusionPipeline.from_pretrained(golden("t2i_moe"), torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_a_pipeline_of_diffusers(pipeline: BagelDiffusionPipeline) -> None:
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"model", "vae", "tokenizer"}
    assert pipeline.device == torch.device("cpu")
    assert pipeline.dtype == torch.float32
    again = BagelDiffusionPipeline(**pipeline.components)
    assert again.model is pipeline.model
    assert pipeline.to("cpu") is pipeline


def test_images_are_those_of_our_pipeline(pipeline: BagelDiffusionPipeline) -> None:
    output = pipeline("a cup", guidance_scale=3.0, generator=generator(), **SIZE)
    assert isinstance(output, ImagePipelineOutput)
    [image] = output.images
    assert image.size == (48, 32)
    seed = int(torch.randint(2**62, (1,), generator=generator()))
    ours = pipeline.bagel.generate(
        "a cup", seed=seed, size=(32, 48), num_timesteps=4, cfg_text_scale=3.0, progress=False
    )
    assert image.tobytes() == ours.images[0].tobytes()
    [latent] = pipeline(
        "a cup", guidance_scale=3.0, generator=generator(), output_type="latent", **SIZE
    ).images
    assert torch.equal(latent, ours.latents[0])


def test_a_generator_gives_the_same_images_again_and_others_when_it_goes_on(
    pipeline: BagelDiffusionPipeline,
) -> None:
    own = generator()
    options: dict[str, Any] = {"output_type": "np", **SIZE}
    first, second = (pipeline("a cup", generator=own, **options).images for _ in range(2))
    again = pipeline("a cup", generator=generator(), **options).images
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    pair = pipeline(["a cup", "a cup"], generator=[generator(), generator()], **options).images
    assert np.abs(pair[0] - pair[1]).max() < 2 / 255


def test_output_types(pipeline: BagelDiffusionPipeline) -> None:
    options: dict[str, Any] = {"generator": generator(), "num_images_per_prompt": 2, **SIZE}
    as_numbers = pipeline("a cup", output_type="np", **options).images
    assert as_numbers.shape == (2, 32, 48, 3)
    assert 0 <= as_numbers.min() <= as_numbers.max() <= 1
    options["generator"] = generator()
    (as_tensor,) = pipeline("a cup", output_type="pt", return_dict=False, **options)
    assert torch.equal(as_tensor, torch.from_numpy(as_numbers).permute(0, 3, 1, 2))


def test_pictures_are_edited_and_steps_extrapolated(pipeline: BagelDiffusionPipeline) -> None:
    picture = Image.new("RGB", (48, 32), (200, 30, 30))
    options: dict[str, Any] = {"generator": generator(), "output_type": "latent"}
    [edited] = pipeline("blue", picture, num_inference_steps=5, **options).images
    options["generator"] = generator()
    cache = StepCache(interval=3, order=1, first=1, last=0)
    [cached] = pipeline("blue", picture, num_inference_steps=5, cache=cache, **options).images
    assert edited.shape == cached.shape
    assert not torch.equal(edited, cached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent, got 'jpg'"),
        ({"height": 32}, "height and width must be given together, got 32 and None"),
        ({"num_images_per_prompt": 0}, "at least one prompt"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one torch.Generator or 1"),
    ],
)
def test_bad_arguments_are_refused(
    pipeline: BagelDiffusionPipeline, options: dict[str, Any], message: str
) -> None:
    refused(message, pipeline, "a cup", **options)


def test_what_is_saved_draws_the_same_images_loaded_by_us_and_by_diffusers(
    pipeline: BagelDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    saved, copy = tmp_path / "saved", tmp_path / "copy"
    pipeline.save_pretrained(saved)
    by_diffusers: dict[str, Any] = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(saved, dtype=torch.float32, **by_diffusers)
    assert type(loaded) is BagelDiffusionPipeline
    loaded.save_pretrained(copy)
    refused(
        "quantization_config must be left out",
        BagelModel.from_pretrained,
        quantization_config=1,
        folder=saved,
    )
    half = DiffusionPipeline.from_pretrained(copy, dtype=torch.bfloat16, **by_diffusers)
    assert half.vae.dtype == half.model.dtype == torch.bfloat16
    assert json.loads((copy / "model_index.json").read_text())["_class_name"] in Registry().models
    images = []
    for own in (pipeline, BagelDiffusionPipeline.from_pretrained(saved), loaded):
        own.set_progress_bar_config(disable=True)
        images.append(own("a cup", generator=generator(), output_type="np", **SIZE).images)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_the_autoencoder_of_diffusers_takes_our_file_and_does_what_ours_does(golden: Any) -> None:
    file = golden("t2i_moe") / "ae.safetensors"
    ours = BagelPipeline.from_pretrained(golden("t2i_moe")).vae
    config, levels = ours.config, len(ours.config.ch_mult)
    theirs = AutoencoderKL(
        latent_channels=config.z_channels,
        block_out_channels=[config.ch * multiple for multiple in config.ch_mult],
        layers_per_block=config.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    theirs.load_state_dict(convert_ldm_vae_checkpoint(load_file(file), theirs.config))
    pixels = 2 * torch.rand(1, 3, 64, 96, generator=generator()) - 1
    latent = ours.encode(pixels)
    with torch.no_grad():
        mean = theirs.encode(pixels).latent_dist.mean
        image = theirs.decode(latent / config.scale_factor + config.shift_factor).sample
    found = config.scale_factor * (mean - config.shift_factor)
    # Rounding is 4e-7 of latents up to 1 and 5e-6 of pixels up to 3.4; one norm with another eps
    # (1e-5) is 2e-5 of pixels.
    torch.testing.assert_close(found, latent, rtol=0, atol=2e-6)
    torch.testing.assert_close(image, ours.decode(latent), rtol=0, atol=1e-5)


# lmms-eval

GROUP = "lmms_eval.models"
_COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
"""
_FUNCTIONS = """
from PIL import Image

def visuals(doc):
    return [Image.open(path) for path in doc["images"]]

def score(doc, results):
    return {"own": [doc["question"], *results]}

def gather(found, args=None):
    return len(found)
"""
QUESTIONS = ["what is this?", "<image> a red bench", "three cups"]


@pytest.fixture(scope="module", params=["t2i_dense", "t2i_moe", "pruned"])
def model(
    request: pytest.FixtureRequest, golden: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param != "pruned":
        return golden(request.param)
    pruned = tmp_path_factory.mktemp("lmms") / "pruned"
    halves = [PruneWidthConfig(component=name, keep_ratio=0.5) for name in ("und", "gen")]
    prune(golden("t2i_dense"), pruned, halves)
    return pruned


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with the task `bench`: three questions, two of them with an image."""
    Image.new("RGB", (48, 32), (200, 30, 30)).save(tmp_path / "red.png")
    pictures = [[str(tmp_path / "red.png")]] * 2 + [[]]
    rows = zip(QUESTIONS, pictures, strict=True)
    (tmp_path / "data.json").write_text(
        "\n".join(json.dumps({"question": q, "images": p, "answer": ""}) for q, p in rows)
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(_FUNCTIONS)
    (folder / "bench.yaml").write_text(
        _COMMON.format(data=tmp_path / "data.json")
        + """task: bench
doc_to_visual: !function utils.visuals
process_results: !function utils.score
metric_list: [{metric: own, aggregation: !function utils.gather, higher_is_better: true}]
"""
    )
    return folder


def evaluate(task: Path, monkeypatch: pytest.MonkeyPatch, **model_args: Any) -> list[str]:
    """Answers to the questions, by way of the entry point, the registry and the evaluator."""
    pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2, registry_v2
    from lmms_eval.tasks import TaskManager

    point = EntryPoint(name="sparse_unified", value=declared(GROUP)["sparse_unified"], group=GROUP)
    own = type("Points", (), {"select": lambda self, group: [point] * (group == GROUP)})
    monkeypatch.setattr(registry_v2, "entry_points", own)
    MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    found = simple_evaluate(
        model="sparse_unified_bagel",
        model_args=arguments,
        tasks=["bench"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        log_samples=True,
    )
    return [sample["filtered_resps"][0] for sample in found["samples"]["bench"]]


def test_questions_are_answered_in_text(model: Path, task: Path, monkeypatch: Any) -> None:
    answers = evaluate(task, monkeypatch, pretrained=model)
    pipeline = BagelPipeline.from_pretrained(model)
    red = Image.open(task.parent / "red.png")
    images = [red, red, None]
    texts = [question.removeprefix("<image> ") for question in QUESTIONS]
    assert answers == [
        str(pipeline.chat(text, images=image, max_length=6)).partition("\n\n")[0]
        for text, image in zip(texts, images, strict=True)
    ]


def test_images_are_drawn_and_edited(
    model: Path, task: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"mode": "generation", "size": 32, "num_timesteps": 3, "cfg_text_scale": 2.0}
    answers = evaluate(
        task, monkeypatch, pretrained=model, output_dir=tmp_path / "out", seed=7, **options
    )
    [first, *_, last] = [json.loads(answer)["images"] for answer in answers]
    pipeline = BagelPipeline.from_pretrained(model)
    shared: dict[str, Any] = {"size": (32, 32), "num_timesteps": 3, "cfg_text_scale": 2.0}
    red = Image.open(task.parent / "red.png")
    for paths, text, image, seed in ((first, QUESTIONS[0], red, 7), (last, QUESTIONS[2], None, 9)):
        [drawn] = pipeline.generate(text, images=image, seed=seed, progress=False, **shared).images
        own = torch.frombuffer(bytearray(Image.open(paths[0]).tobytes()), dtype=torch.uint8)
        other = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
        assert int((own.int() - other.int()).abs().max()) <= 1  # a batch rounds differently


def test_modes_are_checked(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mode must be one of understanding, generation"):
        evaluate(task, monkeypatch, pretrained="anywhere", mode="drawing")


def test_tasks_that_do_not_generate_are_refused() -> None:
    pytest.importorskip("lmms_eval.api.model")
    from sparse_unified.engines.lmms_eval import SparseUnifiedBagel as Model

    for method in (Model.loglikelihood, Model.generate_until_multi_round):
        refused("must ask for generate_until", method, None, [], error=NotImplementedError)
