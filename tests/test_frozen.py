# SPDX-License-Identifier: Apache-2.0
"""What every command writes is what it was: files, reports, latents and trained weights."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

FROZEN = Path(__file__).parent / "frozen"


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"frozen_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    module, model = (load(FROZEN / name) for name in ("record.py", "model.py"))
    with pytest.MonkeyPatch.context() as patch:
        # The package held another miniature then.
        patch.setattr("sparse_unified.cli.checkpoint.write_model", model.write_dense)
        # Recorded when torch's products ran the dense FFNs; the kernel rounds otherwise.
        patch.setattr("sparse_unified.nn.dense._KERNEL_TOKENS", math.inf)
        made = json.loads(json.dumps(module.record()))
    # A budget and two ways to load came later, each at its end of the list.
    memory = made["reports"]["sparse.memory"]
    assert memory["budgets"].pop(0) == 10
    memory["rows"] = [row | {"fits": row["fits"][1:]} for row in memory["rows"][:8]]
    return made


@pytest.mark.parametrize("downsample", [1, 2])
def test_an_autoencoder_of_the_identity_decodes_in_tiles(downsample: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vae = load(FROZEN / "model.py").identity_autoencoder(1.5, downsample)
    blocks = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    pixels = blocks.repeat_interleave(downsample, 2).repeat_interleave(downsample, 3)
    latent = vae.encode(pixels)
    torch.testing.assert_close(latent, 1.5 * blocks, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latent), pixels, rtol=4e-4, atol=1e-5)
    for tile in (3, 5, 7):  # tiles cover all of it, and blend
        assert vae.decode(latent, tile=tile).isfinite().all()
        torch.testing.assert_close(vae.decode(latent, tile=tile), pixels, rtol=4e-4, atol=1e-5)


@pytest.fixture(scope="module")
def frozen() -> dict[str, Any]:
    return json.loads((FROZEN / "behaviour.json").read_text())


def differences(old: Any, new: Any, at: str = "", rounding: float = 1e-3) -> list[str]:
    """Lists where two JSON values differ; floats may differ by rounding.

    `rounding` is how far apart, relatively, errors of rounding may be, and what is allowed of them.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{at}/{key}: only on one side" for key in sorted(old.keys() ^ new.keys())]
        return found + [
            d for k in old.keys() & new for d in differences(old[k], new[k], f"{at}/{k}", rounding)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            d
            for i, (o, n) in enumerate(zip(old, new, strict=True))
            for d in differences(o, n, f"{at}/{i}", rounding)
        ]
    if isinstance(old, float) and isinstance(new, (int, float)):
        rel = rounding if at.endswith(("/max_error", "/tolerance")) else 1e-3
        return [] if new == pytest.approx(old, rel=rel, abs=1e-5) else [f"{at}: {old} -> {new}"]
    return [] if old == new else [f"{at}: {old!r:.80} -> {new!r:.80}"]


@pytest.mark.parametrize("kind", ["files", "reports", "numbers"])
def test_commands_write_what_they_wrote(kind: str, recorded: dict, frozen: dict) -> None:
    # The largest of many rounding errors moves by some percent with the order of the sums.
    is_same = frozen["signature"] == recorded["signature"]
    rounding = 1e-3 if is_same else 0.25
    assert differences(frozen[kind], recorded[kind], rounding=rounding) == []


def test_on_one_machine_bits_stay(recorded: dict, frozen: dict) -> None:
    if frozen["signature"] != recorded["signature"]:
        pytest.skip(f"recorded on {frozen['signature']}: other processors round differently")
    assert differences(frozen["bits"], recorded["bits"]) == []
