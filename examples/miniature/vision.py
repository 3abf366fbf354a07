# SPDX-License-Identifier: Apache-2.0
"""What the miniature sees: learned before the model is trained, as BAGEL had SigLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from miniature.autoencoder import draw_pictures
from miniature.scenes import CELLS, COLUMNS_OF_CELLS, GRID, ROWS, properties
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.vision import grid_positions, patchify

_BATCH = 32


def train_vision_(
    model: Bagel,
    steps: int = 1000,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """Trains ViT and connector to tell what is in each cell and where it is, and freezes them.

    The linear maps that name shape, colour, texture, row and column are thrown away; the features
    that they read stay. They read what the first layer of the language model does: the features
    with the embedding of the position, normalised. Features that drown the position teach no
    relations.

    Returns:
        the share of cells in new pictures of which everything is right.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.vision
    kinds = [kind if len(kind) == 3 else 3 * kind for kind in properties()]
    names = [sorted({kind[i] for kind in kinds}) for i in range(3)] + [ROWS, COLUMNS_OF_CELLS]
    labels = torch.tensor([[names[i].index(kind[i]) for i in range(3)] for kind in kinds])
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).repeat(_BATCH, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(model.config.llm.hidden_size, sum(map(len, names)))
    vit, connector = (model.get_submodule(name) for name in ("vit_model", "connector"))
    positions = grid_positions(GRID, GRID, GRID).repeat(_BATCH)

    def read() -> tuple[list[torch.Tensor], torch.Tensor]:
        pixels, drawn = draw_pictures(_BATCH, generator)
        patches = torch.cat([patchify(picture, config.patch_size) for picture in pixels])
        seen = connector(vit(patches, positions, [CELLS] * _BATCH)) + model.vit_pos_embed(positions)
        logits = head(F.rms_norm(seen, seen.shape[1:]))
        wanted = torch.cat([labels[drawn.flatten()], places], dim=1)
        return list(logits.split([len(own) for own in names], dim=1)), wanted

    seeing = [*vit.parameters(), *connector.parameters()]
    parameters = [*seeing, *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        logits, wanted = read()
        pairs = zip(logits, wanted.unbind(dim=1), strict=True)
        loss = torch.stack([F.cross_entropy(own, right) for own, right in pairs]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in seeing:
        parameter.requires_grad_(False)
    with torch.no_grad():
        logits, wanted = read()
    found = torch.stack([own.argmax(dim=1) for own in logits], dim=1)
    return float((found == wanted).all(dim=1).float().mean())
