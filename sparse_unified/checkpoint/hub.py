# SPDX-License-Identifier: Apache-2.0
"""A model by the name people call it: a directory, or an id on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_unified._common import optional

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def find_model(name: str | os.PathLike[str], *, where: str = "from_pretrained") -> Path:
    """Returns the directory of a model, given as such or as a hub id, which is downloaded.

    Args:
        name: a directory, or an id such as "LLM-Drop/BAGEL-MoE-7B-GEN-16to8". What is already in
            the hub's cache is not downloaded again.
        where: the start of messages.

    Raises:
        ValueError: `name` is neither a directory nor the id of a model that can be had.
        ImportError: it is an id, and huggingface_hub is not installed.
    """
    path = Path(name)
    if path.is_dir():
        return path
    text = os.fspath(name)
    if not is_hub_id(name):
        raise ValueError(
            f"{where}: model must be a directory or a hub id 'owner/name', got {text!r}, "
            "which is neither"
        )
    hub = optional("huggingface_hub", purpose=f"the download of {text!r}")
    try:
        return Path(hub.snapshot_download(text, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where}: model must be a directory or a hub id that can be downloaded, "
            f"got {text!r}: {first_line}"
        ) from error


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Tells whether a name is written as an id of the hub is, and no file of that name exists."""
    parts = os.fspath(name).split("/")
    written = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
    return isinstance(name, str) and written and not Path(name).exists()
