# SPDX-License-Identifier: Apache-2.0
"""Adaptation: tuning of a converted or pruned model, from frozen experts to all of its weights."""
