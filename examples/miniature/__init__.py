# SPDX-License-Identifier: Apache-2.0
"""What the miniature (`sparse_unified.mini`) was trained on, and the paper's study on it.

data, digits, scenes   images to generate, questions to answer, and exact judges
train                  the dense training, from nothing
evaluate               what a model can do
study, report          pruning and sparse experts, with tuning; tables, plots, what holds
"""
