# SPDX-License-Identifier: Apache-2.0
"""Who computes the sparse FFN: ours, the dense FFN, and every implementation that can be had here.

Each is a `Peer` (see `base`) that says whether it can be built here, and builds itself from the
same weights.
"""

from __future__ import annotations

from . import packages, torch_only
from .base import Peer, Provider, Setting, Weights, draw_weights

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (*torch_only.PEERS, *packages.PEERS, torch_only.OURS)
}

__all__ = ["PEERS", "Peer", "Provider", "Setting", "Weights", "draw_weights"]
