# SPDX-License-Identifier: Apache-2.0
"""Loading: official directories, dense and sparse, in little memory; damage is reported whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_unified._common import optional
from sparse_unified.bagel import BagelPipeline, SpecialTokens, load_bagel, loading
from sparse_unified.bagel.loading import official_tensors
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.checkpoint import TensorSpec
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.checkpoint.safetensors_io import read_tensor
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.testing import read_case

GOLDEN = Path(__file__).parent / "golden"
SPECIAL = SpecialTokens(bos=3, eos=4, start_of_image=5, end_of_image=6)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "dense")


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    return write_checkpoint(GOLDEN / "t2i_moe", tmp_path / "sparse")


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("case", ["t2i_dense", "t2i_moe", "edit"])
def test_loaded_weights_are_those_of_the_case(case: str, tmp_path: Path) -> None:
    directory = write_checkpoint(GOLDEN / case, tmp_path)
    model, vae = load_bagel(directory, special_tokens=SPECIAL)
    for module, source in ((model, case), (vae, "vae")):
        weights = read_case(GOLDEN / source).weights
        state = module.state_dict()
        assert set(state) == set(weights)
        assert all(torch.equal(state[key], weights[key]) for key in weights)
        assert not module.training


def test_official_conventions_are_written(sparse: Path) -> None:
    vit = json.loads((sparse / "vit_config.json").read_text())
    llm = json.loads((sparse / "llm_config.json").read_text())
    assert vit["num_hidden_layers"] == 3  # one more than the file holds
    assert (llm["top_k"], llm["num_experts_per_tok"], llm["transformed_gen"]) == (2, 2, [1])


def test_tokenizer_gives_the_recorded_ids(dense: Path) -> None:
    tokenizer = Tokenizer.from_directory(dense)
    assert tokenizer.special_tokens == SPECIAL
    for name, prompt_field in (("t2i_dense", "prompts"), ("edit", "prompts")):
        fields = read_case(GOLDEN / name).fields
        assert [tokenizer.encode(text) for text in fields[prompt_field]] == fields["prompt_ids"]
    fields = read_case(GOLDEN / "understand").fields
    assert tokenizer.encode(fields["prompt"]) == fields["prompt_ids"]
    assert tokenizer.decode(fields["prompt_ids"]) == fields["prompt"]
    assert tokenizer.encode("<|im_start|>a\n€") == [3, 21, 20, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_as_asked(sparse: Path, dtype: torch.dtype) -> None:
    model, vae = load_bagel(sparse, dtype=dtype, special_tokens=SPECIAL)
    found = {p.dtype for module in (model, vae) for p in module.parameters()}
    assert found == {dtype}


def test_each_file_keeps_its_dtype_unless_asked(dense: Path) -> None:
    file = dense / "ema.safetensors"
    save_file({key: t.bfloat16() for key, t in load_file(file).items()}, file)
    model, vae = load_bagel(dense, special_tokens=SPECIAL)
    assert (model.dtype, next(vae.parameters()).dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("block_bytes", [1, 300, 1000])
def test_tensors_are_read_in_blocks_of_rows(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    read: list[TensorSpec] = []

    def remember(spec: TensorSpec, *, what: str) -> torch.Tensor:
        read.append(spec)
        return read_tensor(spec, what=what)

    monkeypatch.setattr(loading, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(loading, "read_tensor", remember)
    model, _ = load_bagel(sparse, special_tokens=SPECIAL)
    weights = read_case(GOLDEN / "t2i_moe").weights
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(spec.nbytes <= block_bytes or spec.shape[0] == 1 for spec in read)


def test_official_tensors_are_views_that_load_the_model(sparse: Path) -> None:
    model, _ = load_bagel(sparse, special_tokens=SPECIAL)
    targets = official_tensors(model)
    assert set(targets) == set(model.state_dict())
    key = "language_model.model.layers.1.mlp_moe_gen.experts.2.down_proj.weight"
    with torch.no_grad():
        targets[key].fill_(7)
    assert torch.equal(model.state_dict()[key], torch.full((32, 24), 7.0))


def test_shards_load_like_one_file(dense: Path, tmp_path: Path) -> None:
    tensors = load_file(dense / "ema.safetensors")
    keys = sorted(tensors)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, own in shards.items():
        save_file({key: tensors[key] for key in own}, dense / name)
    index = {"weight_map": {key: name for name, own in shards.items() for key in own}}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    (dense / "ema.safetensors").unlink()
    model, _ = load_bagel(dense, special_tokens=SPECIAL)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


def test_one_error_lists_everything_that_is_wrong(dense: Path) -> None:
    file = dense / "ema.safetensors"
    tensors = load_file(file)
    tensors["llm2vae.bias"] = torch.zeros(17)
    tensors["visitor.weight"] = torch.zeros(2)
    del tensors["connector.fc1.bias"]
    tensors["time_embedder.mlp.0.bias"] = torch.zeros(32, dtype=torch.int64)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="tensors must be those of the model") as error:
        load_bagel(dense, special_tokens=SPECIAL)
    for part in (
        "missing connector.fc1.bias [32]",
        "extra visitor.weight [2]",
        "misshapen llm2vae.bias [17], not [16]",
        "time_embedder.mlp.0.bias of torch.int64, not floating point",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k"),
        ({"top_k": 3}, "num_experts_per_tok"),
        ({"transformed_gen": [0, 1]}, r"transformed_gen must be \[1\]"),
        ({"transformed_gen": False}, r"transformed_gen must be \[1\]"),
        ({"num_experts": 8}, "num_experts must be 4"),
        ({"hidden_size": 48}, "hidden_size"),
    ],
)
def test_config_that_contradicts_the_keys_is_refused(
    sparse: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(sparse / "llm_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_bagel(sparse, special_tokens=SPECIAL)


def test_optional_config_is_checked_and_gives_the_factors(dense: Path) -> None:
    (dense / "config.json").write_text(
        json.dumps({"max_latent_size": 8, "vae_config": {"scale_factor": 0.5}})
    )
    assert load_bagel(dense, special_tokens=SPECIAL)[1].config.scale_factor == 0.5
    edit_json(dense / "config.json", max_latent_size=32)
    with pytest.raises(ValueError, match="max_latent_size must be 8 as the tensors say, got 32"):
        load_bagel(dense, special_tokens=SPECIAL)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_truncated_files_are_refused(dense: Path, name: str) -> None:
    content = (dense / name).read_bytes()
    (dense / name).write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{name}.*truncated"):
        load_bagel(dense, special_tokens=SPECIAL)


@pytest.mark.parametrize(
    "name", ["ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"]
)
def test_missing_files_are_named(dense: Path, name: str) -> None:
    (dense / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_bagel(dense, special_tokens=SPECIAL)


def test_missing_tokenizer_is_reported(dense: Path) -> None:
    for file in dense.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="directory must hold a tokenizer") as error:
        BagelPipeline.from_pretrained(dense)
    assert "\n" not in str(error.value)


def test_pipeline_refuses_a_foreign_tokenizer(dense: Path) -> None:
    foreign = SpecialTokens(bos=7, eos=4, start_of_image=5, end_of_image=6)
    model, vae = load_bagel(dense, special_tokens=foreign)
    with pytest.raises(ValueError, match="must have the marker ids of the model"):
        BagelPipeline(model, vae, Tokenizer.from_directory(dense))


@pytest.mark.parametrize("name", ["", "nowhere", "/nowhere/at/all", "../a/b", "a/"])
def test_what_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    if name == "":
        name = __file__
    with pytest.raises(ValueError, match="must be a directory or a hub id"):
        find_model(name)


def test_hub_id_is_downloaded(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(dense)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert BagelPipeline.from_pretrained("owner/name").model.config.max_latent_size == 8
    assert asked == ["owner/name"]


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **_: Any) -> str:
        raise OSError("no network\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"can be downloaded, got 'owner/name': no network$"):
        find_model("owner/name")


def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"no_such_package must be installed .*\[bagel\]"):
        optional("no_such_package.part")


def test_importing_the_package_leaves_heavy_ones_alone() -> None:
    heavy = "transformers", "PIL", "huggingface_hub", "tokenizers"
    code = "import sys, sparse_unified.bagel, sparse_unified.testing, sparse_unified.fixtures"
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_cases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "vae")
    (tmp_path / "other.json").write_text(json.dumps({**case.fields, "z_channels": 8}))
    save_file(case.tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="vae_case must have z_channels = 4, got 8"):
        write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "out", tmp_path / "other")


MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sparse_unified.bagel import SpecialTokens, load_bagel, loading

loading._BLOCK_BYTES = int(sys.argv[3])
special = SpecialTokens(bos=3, eos=4, start_of_image=5, end_of_image=6)
kept = [load_bagel(sys.argv[1], special_tokens=special)]  # what is loaded once stays loaded

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
kept.append(load_bagel(sys.argv[2], special_tokens=special))
print(json.dumps({"peak": status("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_holds_the_weights_and_one_block_more(dense: Path, tmp_path: Path) -> None:
    # As in the released models, the embeddings are far larger than all other tensors.
    from dataclasses import replace

    from sparse_unified.bagel import Bagel

    small, _ = load_bagel(dense, special_tokens=SPECIAL)
    llm = replace(
        small.config.llm,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        vocab_size=32768,
    ).with_experts("gen", [1], num_experts=16, top_k=8)
    big = Bagel(replace(small.config, llm=llm))
    directory = write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "big")
    state = big.state_dict()
    save_file(state, directory / "ema.safetensors")
    edit_json(
        directory / "llm_config.json",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        vocab_size=32768,
        num_experts=16,
        num_shared_experts=0,
        top_k=8,
        num_experts_per_tok=8,
        transformed_gen=[1],
        transformed_und=False,
    )
    weights = sum(t.nbytes for t in state.values())
    largest = max(t.nbytes for t in state.values())
    block, slack = 4 * 2**20, 8 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(dense), str(directory), str(block)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peak = json.loads(run.stdout)["peak"]
    # Read whole, the second embedding alone would go beyond the limit: memory that is not yet
    # filled is not resident, so only tensors as large as all that follow them can tell.
    assert 3 * largest > weights + block + slack
    assert 0.9 * weights < peak < weights + block + slack
