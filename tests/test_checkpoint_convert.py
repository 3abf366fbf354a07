# SPDX-License-Identifier: Apache-2.0
"""Converting reorders neurons and nothing else; inverting gives every byte back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    LAYER,
    edit_weights,
    make_dense,
    run_python,
    snapshot,
)
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified.checkpoint import (
    Checkpoint,
    PruneWidthConfig,
    convert,
    invert,
    keys,
    prune,
    verify,
)
from sparse_unified.convert.convert import read_sidecar
from sparse_unified.experts import ExpertLayout, snake_partition
from sparse_unified.experts.keep import magnitude_scores, random_scores

NEURONS = torch.rand(96)
FORMATS = [(0, torch.float32), (0, torch.bfloat16), (3, torch.float16), (0, torch.float64)]
CASES: list[dict[str, Any]] = [
    {"num_experts": 4, "top_k": 2},
    {"num_experts": 16, "top_k": 8, "layers": "all"},
    {"num_experts": 4, "top_k": 1, "num_shared_experts": 2},
    {"num_experts": 7, "top_k": 7, "num_shared_experts": 1, "seed": 3},
    {"num_experts": 4, "top_k": 2, "component": "und", "layers": [0, 3]},
    {"num_experts": 4, "top_k": 2, "layers": "0,2-3"},
    {"num_experts": 1, "top_k": 1},
    {"num_experts": 96, "top_k": 3},
]


@pytest.mark.parametrize("case", range(8))
def test_convert_verify_invert_is_the_identity(case: int, tmp_path: Path) -> None:
    num_shards, dtype = FORMATS[case % 4]
    dense = make_dense(tmp_path / "dense", num_shards=num_shards, dtype=dtype)
    before = snapshot(dense)
    report = convert(dense, tmp_path / "sparse", **CASES[case])
    checked = verify(tmp_path / "sparse", dense)
    assert checked.ok, checked.to_text()
    assert [verdict.layer for verdict in checked.layers] == list(report.layers)
    invert(tmp_path / "sparse", tmp_path / "back")
    assert snapshot(tmp_path / "back") == before
    assert snapshot(dense) == before


@pytest.mark.parametrize("num_shards", [0, 3])
def test_an_index_is_kept_true_and_restored(num_shards: int, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", num_shards=num_shards)
    index = dense / "model.safetensors.index.json"
    if not num_shards:  # one that lies beside a single file
        weight_map = dict.fromkeys(load_file(dense / "ema.safetensors"), "ema.safetensors")
        index.write_text(json.dumps({"weight_map": weight_map}))
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    rewritten = json.loads((tmp_path / "sparse" / index.name).read_text())
    checkpoint = Checkpoint(tmp_path / "sparse")
    held = {key: spec.file.name for key, spec in checkpoint.specs.items()}
    assert rewritten["weight_map"] == held
    if num_shards:
        total = sum(spec.nbytes for spec in checkpoint.specs.values())
        assert rewritten["metadata"]["total_size"] == total
    invert(tmp_path / "sparse", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(dense)


def test_both_components_can_be_sparse_and_come_off_in_turn(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    convert(dense, tmp_path / "gen", num_experts=4, top_k=2)
    with pytest.raises(ValueError, match=r"must be \(4, 0, 2\) as in the component that is sparse"):
        convert(tmp_path / "gen", tmp_path / "x", num_experts=8, top_k=2, component="und")
    convert(tmp_path / "gen", tmp_path / "both", num_experts=4, top_k=2, component="und")
    assert set(Checkpoint(tmp_path / "both").experts) == {"gen", "und"}
    assert verify(tmp_path / "both", dense).ok
    invert(tmp_path / "both", tmp_path / "gen2")
    assert snapshot(tmp_path / "gen2") == snapshot(tmp_path / "gen")
    invert(tmp_path / "gen2", tmp_path / "dense2")
    assert snapshot(tmp_path / "dense2") == snapshot(dense)


def test_header_padding_and_order_of_the_dense_file_come_back(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    data = (dense / "ema.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    text = json.dumps(dict(sorted(entries.items(), reverse=True)), indent=1) + " " * 13
    (dense / "ema.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text.encode() + data[8 + length :]
    )
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    assert verify(tmp_path / "sparse", dense).ok
    invert(tmp_path / "sparse", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(dense)


def test_bits_that_are_no_numbers_survive(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")

    def edit(weights: dict[str, Tensor]) -> None:
        bits = weights[LAYER + "up_proj.weight"].view(torch.int32)
        bits[5, 3], bits[6, 2] = 0x7FC12345, -0x00345678  # NaNs with payloads

    edit_weights(dense, edit)
    with pytest.raises(
        ValueError, match="magnitude of its weights: scores must be finite, got nan"
    ):
        convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2, seed=0)
    report = verify(tmp_path / "sparse", dense)
    assert report.ok
    assert report.layers[0].max_error is None  # nothing to compute with NaN, the bytes tell
    invert(tmp_path / "sparse", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(dense)


def test_tuned_experts_give_the_tuned_dense_weights(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2, seed=5)

    def tune(weights: dict[str, Tensor]) -> None:
        weights[LAYER + "experts.2.down_proj.weight"][:, 7] += 1
        weights[LAYER + "gate.weight"] += 1

    edit_weights(tmp_path / "sparse", tune)
    invert(tmp_path / "sparse", tmp_path / "back")
    neuron = int(read_sidecar(tmp_path / "sparse" / "partition.safetensors").neuron_index[1][55])
    wanted = load_file(dense / "ema.safetensors")
    wanted[LAYER + "down_proj.weight"][:, neuron] += 1
    found = load_file(tmp_path / "back" / "ema.safetensors")
    assert all(torch.equal(found[key], weight) for key, weight in wanted.items())


@pytest.mark.parametrize(
    "form", ["tensor", "mapping", "file", "file by layer", "seed", "float32", "bfloat16"]
)
def test_scores_are_taken_in_every_form_and_are_magnitudes_without(
    form: str, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    dense = make_dense(tmp_path / "dense", dtype=dtype)
    scores = torch.rand(4, 96, generator=torch.Generator().manual_seed(1))
    save_file({"scores": scores}, tmp_path / "all.safetensors")
    save_file({"1": scores[1].clone(), "2": scores[2].clone()}, tmp_path / "some.safetensors")
    given: Any = {
        "tensor": (scores, "given"),
        "mapping": ({1: scores[1], 2: scores[2]}, "given"),
        "file": (tmp_path / "all.safetensors", "file all.safetensors"),
        "file by layer": (str(tmp_path / "some.safetensors"), "file some.safetensors"),
    }
    own, origin = given.get(form, (None, "weight magnitude"))
    seed, origin = (5, "random, seed 5") if form == "seed" else (None, origin)
    convert(dense, tmp_path / "out", num_experts=4, top_k=2, scores=own, seed=seed)
    weights = load_file(dense / "ema.safetensors")
    sidecar = read_sidecar(tmp_path / "out" / "partition.safetensors")
    assert (sidecar.arguments["scores"], sidecar.arguments["layers"]) == (origin, [1, 2])
    for layer, index in sidecar.neuron_index.items():
        wanted = scores[layer]
        if form == "seed":
            wanted = random_scores(96, seed=5, layer=layer)
        elif form not in given:
            names = [keys.ffn_key("gen", layer, name) for name in keys.PROJECTIONS]
            wanted = magnitude_scores(*(weights[name] for name in names))
        layout = ExpertLayout(intermediate_size=96, num_experts=4)
        assert torch.equal(torch.from_numpy(index), snake_partition(wanted, layout))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 5}, "these counts do: 2, 3, 4, 6, 8, 12, 16, 24, 32, 48"),
    ({"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
    ({"top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
    ({"num_shared_experts": -1}, "num_shared_experts must be an integer of at least 0, got -1"),
    ({"num_experts": 12, "num_shared_experts": 1}, "num_experts must divide the 96 neurons"),
    ({"layers": "1-9"}, "layers must lie in 0 to 3, got 4"),
    ({"layers": []}, "layers must name at least one of"),
    ({"component": "vit"}, "component must be one of und, gen, got 'vit'"),
    ({"scores": {1: torch.rand(96)}}, "scores must have layers 1, 2, got no 2"),
    ({"scores": {1: NEURONS, 2: torch.arange(96)}}, "layer 2: scores must be floating point"),
    ({"scores": torch.full((4, 96), torch.inf)}, "must be finite, got inf for neuron 0"),
    ({"scores": [NEURONS] * 4}, "convert: scores must be a tensor, got list"),
    ({"scores": {1: "high", 2: "low"}}, "convert: layer 1: scores must be a tensor, got str"),
    ({"scores": "other.safetensors"}, "got importance"),
    ({"scores": "pickle.safetensors"}, "header length"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_arguments_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_dense(tmp_path / "dense")
    save_file({"importance": NEURONS}, tmp_path / "other.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"PK\3\4 a pickle")
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        convert(dense, tmp_path / "out", **({"num_experts": 4, "top_k": 2} | options))
    assert set(tmp_path.iterdir()) == before


def test_what_is_not_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="must all be dense, got sparse layers 1-2; invert gives"):
        convert(tmp_path / "sparse", tmp_path / "out", num_experts=4, top_k=2)

    # What is split must be whole; all else is copied, see `info`.
    edit_weights(dense, lambda weights: weights.pop(LAYER + "up_proj.weight"))
    with pytest.raises(ValueError, match=r"those of a dense FFN, got no up_proj.weight"):
        convert(dense, tmp_path / "out", num_experts=4, top_k=2)


def test_a_checkpoint_of_ffns_alone_is_enough(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")

    def keep_gen_ffns(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if "mlp_moe_gen" not in key]:
            del weights[key]

    edit_weights(dense, keep_gen_ffns)
    with pytest.raises(ValueError, match="keys must hold und FFNs"):
        convert(dense, tmp_path / "out", num_experts=4, top_k=2, component="und")
    convert(dense, tmp_path / "out", num_experts=4, top_k=2)
    assert verify(tmp_path / "out", dense).ok


def test_invert_refuses_what_its_sidecar_does_not_describe(tmp_path: Path) -> None:
    dense, sparse = make_dense(tmp_path / "dense"), tmp_path / "sparse"
    refused(r"partition\.safetensors: file must be there", invert, dense, tmp_path / "out")
    convert(dense, sparse, num_experts=4, top_k=2)
    for weights, message in (
        ({"lora": torch.ones(2)}, r"lora must be nothing .* got torch\.float32"),
        ({"llm2vae.bias": torch.ones(2)}, r"llm2vae\.bias must be torch\.float32 .* got"),
    ):
        shutil.copytree(sparse, tmp_path / "other")
        edit_weights(tmp_path / "other", lambda own, weights=weights: own.update(weights))
        refused(message, invert, tmp_path / "other", tmp_path / "out")
        shutil.rmtree(tmp_path / "other")

    path = sparse / "partition.safetensors"
    whole = path.read_bytes()

    def replaced(*pairs: tuple[bytes, bytes]) -> bytes:
        data = whole
        for old, new in pairs:
            data = data.replace(old, new)
        length = int.from_bytes(data[:8], "little") + len(data) - len(whole)
        return length.to_bytes(8, "little") + data[8:]

    text = (b'\\"llm_config.json\\"', b'\\"tokenizer.jsonx\\"')
    for data, message in (
        (whole[:-4] + whole[-8:-4], "must be an int32 permutation of 0 to 95"),
        (
            replaced((b'\\"ema.safetensors\\"', b'\\"../escape.tensor\\"')),
            "weight_files must map plain file names",
        ),
        (
            replaced((b"sparse_unified.json", b"tokenizer_conf.json"), text),
            "texts must be of files that convert rewrites",
        ),
    ):
        path.write_bytes(data)
        refused(message, invert, sparse, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_ends_at_the_bytes_written(tmp_path: Path) -> None:
    dense, sparse = make_dense(tmp_path / "dense"), tmp_path / "sparse"
    for run in (
        lambda progress: convert(dense, sparse, num_experts=4, top_k=2, progress=progress),
        lambda progress: verify(sparse, dense, progress=progress),
        lambda progress: invert(sparse, tmp_path / "back", progress=progress),
    ):
        seen: list[tuple[int, int]] = []
        run(lambda *at, seen=seen: seen.append(at))
        assert seen[-1][0] == seen[-1][1]
        assert seen == sorted(seen)


# What macOS and Windows lack in modules `fcntl` and `resource` and in `os`.
_ELSEWHERE = """
import os, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in "preadv sendfile fchmod O_DIRECTORY O_NOFOLLOW O_NONBLOCK".split():
    delattr(os, name)
from sparse_unified import adapt, analysis, bagel, engines
from sparse_unified.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0, line
"""


def test_systems_with_less_than_linux_write_the_same_files(tmp_path: Path, golden: Any) -> None:
    shutil.copytree(golden("t2i_dense"), tmp_path / "dense")
    (tmp_path / "other").mkdir()
    lines = [
        "convert dense other/sparse --num-experts 4 --top-k 2",
        "verify other/sparse --against dense",
        "invert other/sparse other/dense",
        "prune dense other/pruned --component gen --keep-ratio 0.5",
        "info other/pruned",
        "card other/pruned",
    ]
    done = run_python("-c", _ELSEWHERE, *lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    convert(tmp_path / "dense", tmp_path / "sparse", num_experts=4, top_k=2)
    prune(tmp_path / "dense", tmp_path / "pruned", PruneWidthConfig(component="gen"))
    (tmp_path / "other" / "pruned" / "README.md").unlink()  # the card
    for name in ("sparse", "pruned", "dense"):
        assert snapshot(tmp_path / "other" / name) == snapshot(tmp_path / name), name
