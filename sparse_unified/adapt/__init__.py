# SPDX-License-Identifier: Apache-2.0
"""Adaptation: tuning of a converted or pruned model, from frozen experts to all of its weights."""

from sparse_unified.adapt.router_init import RouterReport, StartedRouter, init_router_

__all__ = ["RouterReport", "StartedRouter", "init_router_"]
