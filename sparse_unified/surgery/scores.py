# SPDX-License-Identifier: Apache-2.0
"""Scores as users give them to a transform, brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_unified._common import list_some
from sparse_unified.experts import as_scores

LayerScores = Mapping[int, Tensor] | Tensor
Scores = Mapping[str, LayerScores] | LayerScores


def of_component(scores: Scores | None, component: str) -> LayerScores | None:
    """Returns the scores of one component, which may be given alone or beside those of others.

    Raises:
        ValueError: there are scores by component, but none for this one.
    """
    by_name: Mapping[Any, Any] = scores if isinstance(scores, Mapping) else {}
    if not any(isinstance(key, str) and not key.isdigit() for key in by_name):
        return scores  # type: ignore[return-value]
    if component not in by_name:
        raise ValueError(f"scores must hold component {component}, got {list_some(by_name)}")
    found: LayerScores = by_name[component]
    return found


def scores_by_layer(
    scores: LayerScores | None, selected: Sequence[int], num_layers: int, *, exact: bool = False
) -> Mapping[int, Tensor] | None:
    """Returns scores by layer, at least those of every selected one; None when there are none.

    Args:
        exact: scores given by layer must be those of the selected layers, not of more.

    Raises:
        ValueError: a layer is missing, extra, or lacking in the model. TypeError: no tensors.
    """
    if scores is None:
        return None
    if not isinstance(scores, Mapping):
        stacked = as_scores(scores)
        if stacked.ndim != 2 or stacked.shape[0] != num_layers:
            raise ValueError(
                f"scores must have shape [{num_layers} layers, intermediate_size], "
                f"got {list(stacked.shape)}"
            )
        return dict(enumerate(stacked))
    legal = selected if exact else range(num_layers)
    missing = [layer for layer in selected if layer not in scores]
    extra = [layer for layer in scores if layer not in legal]
    if missing or extra:
        got = [f"none for {list_some(missing)}"] * bool(missing)
        got += [f"some for {list_some(extra)}"] * bool(extra)
        raise ValueError(
            f"scores must be given for the selected layers, {list_some(selected)}, "
            f"got {' and '.join(got)}"
        )
    return {layer: as_scores(value) for layer, value in scores.items()}
