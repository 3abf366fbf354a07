# SPDX-License-Identifier: Apache-2.0
"""Scores of the neurons for the points of a sweep."""

from __future__ import annotations

from sparse_unified.analysis.adapter import Adapter
from sparse_unified.analysis.points import SweepConfig
from sparse_unified.analysis.sweep import Probe
from sparse_unified.analysis.transforms import NeuronScores
from sparse_unified.partition.scores import magnitude_scores, random_scores


class Ranking:
    """Ranks the neurons of all components by the criterion of a sweep."""

    def __init__(self, config: SweepConfig) -> None:
        self.config = config

    def __call__(self, probe: Probe, adapter: Adapter) -> NeuronScores:
        if self.config.criterion == "magnitude":
            return {
                component: {
                    ffn.key: magnitude_scores(ffn.gate_proj, ffn.up_proj, ffn.down_proj)
                    for ffn in adapter.ffns(component)
                }
                for component in self.config.components
            }
        return {
            component: {
                ffn.key: random_scores(ffn.intermediate_size, seed=self.config.seed, layer=i)
                for i, ffn in enumerate(adapter.ffns(component))
            }
            for component in self.config.components
        }
