# SPDX-License-Identifier: Apache-2.0
"""Models go to disk and to the hub and come back; the hub is a server on the loopback."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from refusals import refused

from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import Checkpoint, PruneWidthConfig, convert, invert, prune
from sparse_unified.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sparse(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(golden("t2i_moe"), tmp_path_factory.mktemp("hub") / "sparse"))
    (directory / "README.md").write_text("# the card of another model\n")
    return directory


class Hub(BaseHTTPRequestHandler):
    """One repository, as files in memory, behind what the client asks of the hub."""

    files: dict[str, bytes]
    asked: list[tuple[str, str, str | None]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(("POST", self.path, self.headers.get("Authorization")))
        url = f"http://{self.headers['Host']}/owner/name"
        content: dict[str, Any] = {"url": url, "name": "owner/name"}
        if "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            content = {"files": modes}
        if "/commit/" in self.path:
            lines = map(json.loads, body.splitlines())
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.files[value["path"]] = base64.b64decode(value["content"])
            content = {"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/commit/{COMMIT}"}
        self.answer(content)

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if "/resolve/" in self.path:
            data = self.files[self.path.rpartition("/")[2]]
            extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(data).hexdigest()}"'}
            return self.answer(data, extra)
        files = [
            {"path": name, "rfilename": name, "type": "file", "size": len(data), "oid": "0"}
            for name, data in self.files.items()
        ]
        whole = {"id": "owner/name", "sha": COMMIT, "siblings": files}
        return self.answer(files if "/tree/" in self.path else whole)

    do_HEAD = do_GET

    def answer(self, content: Any, extra: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    own = type("OwnHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
        monkeypatch.setattr(huggingface_hub.constants, name, address, raising=False)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield own
    server.shutdown()


def latents(pipeline: BagelPipeline) -> torch.Tensor:
    options: dict[str, Any] = {"num_timesteps": 3, "progress": False}
    return pipeline.generate("a cup", seed=1, size=(32, 32), **options).latents[0]


def test_a_model_is_pushed_with_its_own_card_and_loaded_again(
    hub: type[Hub], sparse: Path, tmp_path: Path
) -> None:
    pipeline = BagelPipeline.from_pretrained(sparse)
    with torch.no_grad():
        pipeline.model.language_model.model.norm.weight.mul_(1.5)
    assert pipeline.push_to_hub("owner/name", token="hf_secret", base_model="a/b", license="mit")
    # The library also asks, at times, which programs drive it, and needs no token for that.
    asked = [each for each in hub.asked if each[1] != "/api/agent-harnesses"]
    assert not [each for each in asked if each[2] != "Bearer hf_secret"]
    card = hub.files["README.md"].decode()
    assert card.startswith("---\n")
    for text in ("base_model: a/b", "license: mit", "library_name: sparse", "experts (gen)"):
        assert text in card
    assert "another model" not in card

    options: dict[str, Any] = {"cache_dir": tmp_path, "revision": COMMIT}
    again = BagelPipeline.from_pretrained("owner/name", token="hf_other", **options)
    assert hub.asked[-1][2] == "Bearer hf_other"
    assert torch.equal(latents(again), latents(pipeline))
    count = len(hub.asked)
    BagelPipeline.from_pretrained("owner/name", local_files_only=True, **options)
    assert len(hub.asked) == count
    with pytest.raises(ValueError, match="owner/other"):
        BagelPipeline.from_pretrained("owner/other", local_files_only=True, **options)


def test_what_is_made_of_a_model_gets_a_card_of_its_own(golden: Any, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(golden("t2i_dense"), tmp_path / "dense"))
    convert(dense, tmp_path / "bare", num_experts=4, top_k=2)
    assert not (tmp_path / "bare" / "README.md").exists()
    (dense / "README.md").write_text("# the card of another model\n")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    prune(tmp_path / "sparse", tmp_path / "pruned", [PruneWidthConfig(component="und")])
    for name, source, words in (
        ("sparse", "dense", "| experts (gen) | 4 of"),
        ("pruned", "sparse", "2. width: component und"),
    ):
        text = (tmp_path / name / "README.md").read_text()
        assert f"# {name}\n" in text
        assert f"made from {source}, for" in text
        assert words in text
        assert "another model" not in text
    invert(tmp_path / "sparse", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "# the card of another model\n"


def test_what_is_saved_is_the_model_as_it_is(sparse: Path, tmp_path: Path) -> None:
    pipeline = BagelPipeline.from_pretrained(sparse, dtype=torch.bfloat16, task="image")
    pipeline.save_pretrained(tmp_path / "saved", license="apache-2.0")
    saved, source = Checkpoint(tmp_path / "saved"), Checkpoint(sparse)
    assert list(saved.specs) == list(source.specs)
    assert saved.recipe == source.recipe
    for key in saved.specs:
        own, other = saved.read(key), source.read(key)
        left_out = own.dtype != torch.bfloat16  # what text to image never reads
        assert torch.equal(own, other if left_out else other.bfloat16()), key
    assert torch.equal(latents(BagelPipeline.from_pretrained(saved.directory)), latents(pipeline))
    assert "license: apache-2.0" in (saved.directory / "README.md").read_text()


def test_another_structure_is_refused(sparse: Path, tmp_path: Path) -> None:
    pipeline = BagelPipeline.from_pretrained(sparse)
    made = BagelPipeline(pipeline.model, pipeline.vae, pipeline.tokenizer)
    refused("pipeline must come from from_pretrained", made.save_pretrained, tmp_path / "out")
    pipeline.model.language_model.model.norm = torch.nn.LayerNorm(3)
    refused(r"tensors of .* got others: .*norm\.weight", pipeline.save_pretrained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_write_a_card_and_upload(hub: type[Hub], sparse: Path, capsys: Any) -> None:
    assert main(["push", str(sparse), "owner/name", "--private", "--base-model", "a/b"]) == 0
    assert "base_model: a/b" in hub.files["README.md"].decode()
    assert hub.files["llm_config.json"] == (sparse / "llm_config.json").read_bytes()
    assert "another model" in (sparse / "README.md").read_text()
    assert main(["card", str(sparse), "--name", "owner/tiny", "--license", "mit"]) == 0
    text = (sparse / "README.md").read_text()
    assert 'from_pretrained("owner/tiny"' in text
    assert "README.md" in capsys.readouterr().out
