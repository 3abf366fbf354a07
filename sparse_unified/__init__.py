# SPDX-License-Identifier: Apache-2.0
"""Sparse mixture-of-experts FFNs for unified multimodal models.

Data flows one way: checkpoint files -> partition -> nn modules -> ops -> C++ kernels.
"""

from sparse_unified import _library  # noqa: F401  (registers torch.ops.sparse_unified)

__version__ = "0.1.0"
