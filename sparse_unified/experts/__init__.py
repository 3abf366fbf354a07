# SPDX-License-Identifier: Apache-2.0
"""Who goes where: which neuron of a dense FFN is whose, what stays, and which layers are split.

Reading order: `keep` (scores, layers, what stays), `layout` (who goes where), `router`.
"""

from sparse_unified.experts.layout import ExpertLayout, snake_partition

__all__ = ["ExpertLayout", "snake_partition"]
