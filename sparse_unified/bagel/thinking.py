# SPDX-License-Identifier: Apache-2.0
"""The words that switch thinking on.

They are those of BAGEL's inferencer, letter by letter, because the released checkpoints were
trained on them; the blank at the end of each first line belongs to them.
"""

from __future__ import annotations

THINK_BEFORE_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
THINK_BEFORE_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user "
    "with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
