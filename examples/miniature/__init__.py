# SPDX-License-Identifier: Apache-2.0
"""What the miniature (`sparse_unified.mini`) was trained on, and the paper's study on it.

scenes, data           pictures to draw, questions to answer, an exact judge; training sequences
autoencoder, vision    what is trained before a model: latents, and eyes
train                  the dense training, from nothing
evaluate               what a model can do
study, report          pruning and sparse experts, with tuning; tables, plots, what holds
"""
