# SPDX-License-Identifier: Apache-2.0
"""The official code itself: its models, before and after the transforms, against recorded images.

Run with checkouts at hand:

    BAGEL_REPO=path/to/Bagel SPARSE_UNIFIED_MODEL_REPO=path/to/SparseUnifiedModel pytest ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_cases import GOLDEN, relative_error
from official_models import official_bagel, official_code, official_image
from surgery_models import assert_same, snapshot, tokens
from test_surgery_moe import FFNS, latent

from sparse_unified import (
    MoEConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    load_moe_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.testing import build_model, read_case

REPOS = ("BAGEL_REPO", "SPARSE_UNIFIED_MODEL_REPO")
DENSE = {"transformed_gen": False, "transformed_und": False}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=REPOS)
def code(request: Any) -> Iterator[SimpleNamespace]:
    repo = os.environ.get(request.param)
    if not repo:
        pytest.skip(f"{request.param} names no checkout of the official code")
    with official_code(Path(repo)) as modules:
        modules.is_tuple = request.param == REPOS[1]
        yield modules


def test_the_official_model_draws_the_recorded_image(code: SimpleNamespace) -> None:
    case = read_case(GOLDEN / "t2i_dense")
    image = official_image(code, official_bagel(code, case, **DENSE), case)
    assert relative_error(image, case.tensors["latent.0"]) < 1e-5


def test_all_experts_draw_the_dense_image_and_restore_the_very_model(code: SimpleNamespace) -> None:
    case = read_case(GOLDEN / "t2i_dense")
    model = official_bagel(code, case, **DENSE)
    dense, before = official_image(code, model, case), snapshot(model)
    for component in FFNS:
        apply_moe_(model, MoEConfig(num_experts=4, top_k=4, component=component, layers="all"))
    assert (
        isinstance(model.language_model.model.layers[1].mlp(tokens(3, 32)), tuple) == code.is_tuple
    )
    assert relative_error(official_image(code, model, case), dense) < 1e-5
    restore_(model)
    assert_same(before, snapshot(model) | {"random": before["random"]})  # the sampler draws some
    assert torch.equal(official_image(code, model, case), dense)


def test_a_sparse_checkpoint_in_a_dense_official_model_draws_the_sparse_image(
    code: SimpleNamespace, tmp_path: Path
) -> None:
    case = read_case(GOLDEN / "t2i_moe")
    model = official_bagel(code, case, **DENSE)
    assert relative_error(official_image(code, model, case), case.tensors["latent.0"]) > 1e-2
    load_moe_(model, write_checkpoint(GOLDEN / "t2i_moe", tmp_path / "sparse"))
    assert relative_error(official_image(code, model, case), case.tensors["latent.0"]) < 1e-5


def test_pruned_and_skipped_parts_give_what_our_model_gives(code: SimpleNamespace) -> None:
    case = read_case(GOLDEN / "t2i_dense")
    model, ours = official_bagel(code, case, **DENSE), build_model(case)
    prunings = (PruneWidthConfig(component="gen", keep_ratio=0.5, layers=[0, 1]),)
    prunings += (PruneWidthConfig(component="und", keep_ratio=0.25),)
    skipped = SkipLayersConfig(component="gen", layers=[2], part="ffn")
    for each in (model, ours):
        for pruning in prunings:
            prune_width_(each, pruning)
        skip_layers_(each, skipped)
    image = official_image(code, model, case)
    assert relative_error(image, case.tensors["latent.0"]) > 1e-2
    assert relative_error(latent(ours, case), image) < 1e-5


def test_the_official_sparse_block_and_ours_give_the_same(
    code: SimpleNamespace, tmp_path: Path
) -> None:
    """The loop over experts of SparseUnifiedModel, with trained routers, token by token."""
    if not code.is_tuple:
        pytest.skip("Bagel has no sparse block")
    case = read_case(GOLDEN / "t2i_moe")
    moe = case.fields["moe"]
    sparse = official_bagel(code, case, transformed_und=False, **_fields(moe))
    dense = official_bagel(code, case, **DENSE)
    load_moe_(dense, write_checkpoint(GOLDEN / "t2i_moe", tmp_path / "sparse"))
    x = tokens(9, 32)
    layers = [model.language_model.model.layers[1].mlp_moe_gen for model in (sparse, dense)]
    (theirs, their_logits), (ours, our_logits) = (layer(x) for layer in layers)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-5, atol=1e-6)
    image = official_image(code, sparse, case)
    assert relative_error(official_image(code, dense, case), image) < 1e-5
    keys = sparse.state_dict().keys()
    assert dense.state_dict().keys() == keys


def _fields(moe: dict[str, Any]) -> dict[str, Any]:
    names = ("num_experts", "num_shared_experts", "top_k", "transformed_gen")
    return {name: moe[name] for name in names if name in moe}
