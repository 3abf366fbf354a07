# SPDX-License-Identifier: Apache-2.0
"""A BAGEL in miniature: small enough to train on a CPU, on real images and on drawn scenes."""
