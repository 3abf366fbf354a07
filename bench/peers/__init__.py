# SPDX-License-Identifier: Apache-2.0
"""Who computes the sparse FFN: ours, the dense FFN, and every implementation that can be had here.

A module a peer; each is a `Peer` (see `protocol`) that says whether it can be built here, and
builds itself from the same weights. No peer is a dependency; what is not installed is listed as
such.
"""

from __future__ import annotations

from . import (
    deepgemm,
    dense,
    expert_loop,
    grouped_mm,
    liger,
    ours,
    scattermoe,
    sonicmoe,
    transformers_experts,
    vllm_experts,
)
from .protocol import Peer, Provider, Setting
from .weights import Weights, draw_weights

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *dense.PEERS,
        expert_loop.PEER,
        grouped_mm.PEER,
        *transformers_experts.PEERS,
        liger.PEER,
        scattermoe.PEER,
        vllm_experts.PEER,
        deepgemm.PEER,
        sonicmoe.PEER,
        ours.PEER,
    )
}

__all__ = ["PEERS", "Peer", "Provider", "Setting", "Weights", "draw_weights"]
