# SPDX-License-Identifier: Apache-2.0
"""The layers of `engines.layers` in the layout of a kernel repository.

What is written is a folder `build` with one variant a backend, which imports the installed package:
the library of this package fits every torch from its stated minimum on, so that nothing in it
depends on the variant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from sparse_unified._version import __version__
from sparse_unified.checkpoint.files import replace_file

NAME = "sparse-unified"
BACKENDS = ("cpu", "cuda")

_MODULE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Stateless layers of sparse_unified, which must be installed."""

from sparse_unified.engines import layers

__all__ = ["layers"]
'''


def write_kernel_repository(directory: str | os.PathLike[str]) -> Path:
    """Writes a kernel repository for `kernels.LocalLayerRepository`, or to be uploaded.

    Args:
        directory: made if it is not there; files of an earlier call are replaced.

    Returns:
        The folder of variants, which is what `LocalLayerRepository` takes.
    """
    build = Path(directory) / "build"
    for backend in BACKENDS:
        variant = build / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"_sparse_unified_{backend}_{__version__.replace('.', '_')}",
            "name": NAME,
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        replace_file(variant / "metadata.json", json.dumps(metadata, indent=2).encode() + b"\n")
        replace_file(variant / "__init__.py", _MODULE.encode())
    return build
