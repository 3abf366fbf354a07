# SPDX-License-Identifier: Apache-2.0
"""Models for others: a directory from a live model, its card, and the hub."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_unified._common import (
    StrPath,
    format_bytes,
    format_layers,
    list_some,
    optional,
    require,
)
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.checkpoint.rewrite import Blocks, Edit, index_texts, rewrite
from sparse_unified.checkpoint.safetensors_io import as_bytes
from sparse_unified.nn.sparse_moe import official_tensors

if TYPE_CHECKING:
    from sparse_unified.bagel.model import Bagel

CARD = "README.md"
_CARD = """---
library_name: sparse_unified
pipeline_tag: any-to-any
{facts}tags: [{tags}]
---

# {title}

A BAGEL model{origin}, for `sparse_unified`.

```python
from sparse_unified.bagel import BagelPipeline

pipeline = BagelPipeline.from_pretrained("{name}", device="cuda")
pipeline.generate("a red bench in the rain", seed=0).images[0].save("bench.png")
```

## What was done

{made}

## What it holds

| | |
|---|---|
{numbers}

Quality was not measured by the program that wrote this card.
"""
# For DiffusionPipeline.from_pretrained(custom_pipeline="pipeline", trust_remote_code=True); the
# name of the class is the one that vLLM-Omni looks for here.
_DIFFUSERS = "sparse_unified.engines.diffusers"
_PARTS = {"model": "BagelModel", "vae": "BagelAutoEncoder", "tokenizer": "BagelTokenizer"}
_INDEX = {"_class_name": "BagelPipeline", **{p: [_DIFFUSERS, name] for p, name in _PARTS.items()}}
_FOR_DIFFUSERS = {
    "model_index.json": json.dumps(_INDEX, indent=2) + "\n",
    "pipeline.py": f"from {_DIFFUSERS} import BagelDiffusionPipeline as BagelDiffusionPipeline\n",
}


def save_model(model: Bagel, source: Checkpoint, out: StrPath, **card: Any) -> None:
    """Writes the weights of a live model beside the other files of the directory it came from.

    Weights keep the dtype they have in the model; parts that a task left out come from the source.
    The directory appears complete or not at all, with a card of its own. ValueError: tensors are
    not those of the source, are quantized, or not in memory.
    """
    live = official_tensors(model)
    wrong = [
        key
        for key, tensor in live.items()
        if key not in source.specs
        or tuple(tensor.shape) != source.spec(key).shape
        or tensor.is_meta
        or type(tensor.data) is not Tensor
    ]
    found = f"others: {list_some(wrong)}; convert and prune write models of another structure"
    rule = f"model must hold plain tensors of {source.directory}'s names and shapes"
    require(not wrong, rule, found)

    def blocks(tensor: Tensor) -> Blocks:
        yield as_bytes(tensor.detach().cpu().contiguous())

    edits = {
        key: Edit(entries=((key, live[key].dtype, spec.shape),), blocks=partial(blocks, live[key]))
        for key, spec in source.specs.items()
        if key in live
    }
    texts = index_texts(source, edits)
    rewrite(source, out, edits, {**texts, **_FOR_DIFFUSERS, CARD: model_card(source, **card)})


def model_card(
    source: Checkpoint,
    *,
    name: str = "owner/name",
    base_model: str | None = None,
    license: str | None = None,
    source_name: str | None = None,
) -> str:
    """Returns the text of a card: what the model is, how it was made, what it holds.

    Args:
        source: the model directory; its own README.md is not read.
        name: the id it will have on the hub.
        base_model: id of the model it was made from.
        license: as the hub writes it, "apache-2.0"; that of the model it was made from.
        source_name: of the directory it was made from, where the id is not known.
    """
    made_from = base_model or source_name
    known = {"license": license, "base_model": base_model}
    steps, specs = source.recipe, source.specs.values()
    numbers = {
        "parameters": f"{sum(math.prod(spec.shape) for spec in specs):,}",
        "weights": format_bytes(sum(spec.nbytes for spec in specs)),
        "dtypes": ", ".join(sorted({str(s.dtype).removeprefix("torch.") for s in specs})),
        "decoder layers": source.num_layers,
    }
    for component, layers in source.experts.items():
        layout = next(iter(layers.values()))
        numbers[f"experts ({component})"] = (
            f"{layout.num_experts} of {layout.expert_width} neurons, {source.top_k} a token, "
            f"in layers {format_layers(sorted(layers))}"
        )
    made = [f"{number}. {step.to_text()} ({step.tool})" for number, step in enumerate(steps, 1)]
    modes = dict.fromkeys(step.config.mode for step in steps)
    return _CARD.format(
        facts="".join(f"{what}: {value}\n" for what, value in known.items() if value),
        tags=", ".join(["bagel", "text-to-image", *modes]),
        title=name.rpartition("/")[2],
        origin=f" made from {made_from}" if made_from else "",
        name=name,
        made="\n".join(made or ["Nothing: the weights are in BAGEL's own layout."]),
        numbers="\n".join(f"| {what} | {value} |" for what, value in numbers.items()),
    )


def write_card(directory: StrPath, **card: Any) -> Path:
    """Writes README.md of a model directory, in place of what is there; options: `model_card`."""
    path = Path(directory) / CARD
    replace_file(path, model_card(Checkpoint(directory), **card).encode())
    return path


def push_to_hub(
    directory: StrPath,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model of sparse_unified",
    **card: Any,
) -> str:
    """Uploads a model directory with a card of its own; a README.md in it stays behind.

    Args:
        directory: of a model.
        repo_id: "owner/name"; made if it is not there.
        private, token, revision, commit_message: as of `huggingface_hub`.
        card: options of `model_card`.

    Returns:
        The address of the model.
    """
    text = model_card(Checkpoint(directory), **{"name": repo_id, **card})
    api = optional("huggingface_hub", purpose=f"the upload to {repo_id!r}").HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    options = {"repo_id": repo_id, "revision": revision, "commit_message": commit_message}
    api.upload_folder(folder_path=directory, ignore_patterns=[CARD], **options)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo=CARD, **options)
    return str(url)
