# SPDX-License-Identifier: Apache-2.0
"""Error of partitions and first routers, untuned: `python experiments/routing_choice.py`.

Prints the relative L2 error of a sparse FFN against the dense one it was cut from, 16 experts with
8 active, nothing tuned, on tokens that calibration has not seen: for random FFNs whose neurons come
in blocks, and for the FFNs of a small network trained on the images of `load_digits`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.keep import magnitude_scores
from sparse_unified.experts.layout import Partition, order_neurons
from sparse_unified.experts.router import RouterInit, fit_router, hidden_activations, random_router
from sparse_unified.nn import SparseMoE, SwiGLU

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 512, 16, 8
CALIBRATION_TOKENS = 512
LAYOUT = ExpertLayout(intermediate_size=WIDTH, num_experts=EXPERTS)

Errors = dict[tuple[Partition, RouterInit], float]


class FfnWeights(NamedTuple):
    """gate_proj and up_proj [I, D], down_proj [D, I]."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def ordered(self, index: Tensor) -> FfnWeights:
        """Returns the weights of neurons in another order, or of some of them."""
        return FfnWeights(self.gate_proj[index], self.up_proj[index], self.down_proj[:, index])


def block_ffn(
    *,
    hidden: int = HIDDEN,
    width: int = WIDTH,
    blocks: int = EXPERTS,
    spread: float = 0.3,
    seed: int = 0,
) -> tuple[FfnWeights, Tensor]:
    """Makes a FFN whose neurons come in blocks that fire together, in shuffled order.

    Args:
        spread: the gate rows of a block are a direction of its own, plus noise of this size; at
            infinity they are noise alone.

    Returns:
        the weights, and the block of each neuron, [I] int64.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    block = (torch.arange(width) % blocks)[torch.randperm(width, generator=generator)]
    directions, noise = random(blocks, hidden)[block], random(width, hidden)
    gate_proj = noise if spread == float("inf") else directions + spread * noise
    weights = FfnWeights(
        gate_proj=2 * hidden**-0.5 * gate_proj,
        up_proj=hidden**-0.5 * random(width, hidden),
        down_proj=width**-0.5 * random(hidden, width),
    )
    return weights, block


def unit_tokens(count: int, *, hidden: int = HIDDEN, seed: int = 1) -> Tensor:
    """Draws tokens [count, hidden] of unit mean square with a common mean, as behind a norm."""
    common = torch.randn(hidden, generator=torch.Generator().manual_seed(7))
    x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)) + 0.3 * common
    return x * x.square().mean(1, keepdim=True).rsqrt()


@torch.no_grad()
def sparse_error(
    ffn: FfnWeights, index: Tensor, router: Tensor, x: Tensor, *, top_k: int = TOP_K
) -> float:
    """Returns the relative L2 distance of a block to its dense FFN on tokens x [T, D].

    Args:
        index: [I], position in expert order -> neuron. router: [E, D].
    """
    block = SparseMoE(x.shape[1], len(index), len(router), top_k, return_router_logits=False)
    for name, weight in ffn.ordered(index)._asdict().items():
        getattr(block, name).copy_(weight)
    block.gate.weight.copy_(router)
    dense = F.linear(hidden_activations(x, ffn.gate_proj, ffn.up_proj), ffn.down_proj)
    return float((block(x) - dense).norm() / dense.norm())


def compare(ffn: FfnWeights, seen: Tensor, unseen: Tensor, *, seed: int = 0) -> Errors:
    """Returns the errors on `unseen` of every partition and first router, fitted to `seen`."""
    scores = magnitude_scores(*ffn)
    hidden = hidden_activations(seen, ffn.gate_proj, ffn.up_proj)
    found: Errors = {}
    for partition in Partition:
        index = order_neurons(partition, scores, LAYOUT, seed=seed, hidden=hidden)
        routers = {
            RouterInit.ZERO: torch.zeros(EXPERTS, HIDDEN),
            RouterInit.RANDOM: random_router(EXPERTS, HIDDEN, seed=seed),
            RouterInit.ACTIVATION: fit_router(seen, *ffn.ordered(index), LAYOUT, TOP_K).weight,
        }
        for method, router in routers.items():
            found[partition, method] = sparse_error(ffn, index, router, unseen)
    return found


class DigitsNet(nn.Module):
    """Reads a digit: pixels to 64 channels, residual SwiGLU layers behind norms, ten classes."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.pixels = nn.Linear(64, HIDDEN)
        self.ffns = nn.ModuleList(SwiGLU(HIDDEN, WIDTH) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(num_layers + 1))
        self.classes = nn.Linear(HIDDEN, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """pixels [N, 64] -> class logits [N, 10], and what each FFN was given, [N, D]."""
        x, given = self.pixels(pixels), []
        for norm, ffn in zip(self.norms, self.ffns, strict=False):
            given.append(norm(x))
            x = x + ffn(given[-1])
        return self.classes(self.norms[-1](x)), given


def trained_ffns(
    seed: int, *, steps: int = 800
) -> tuple[float, Iterator[tuple[FfnWeights, Tensor, Tensor]]]:
    """Trains on 1400 images of `load_digits`, tests on the other 397.

    Returns:
        the accuracy on the latter, and of each layer the weights, the inputs of 512 images it was
        trained on, and of all others.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels = torch.tensor(digits.data).float() / 16 - 0.3, torch.tensor(digits.target)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(seed)
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (128,))]
        noisy = pixels[batch] + 0.05 * torch.randn(len(batch), 64)
        loss = F.cross_entropy(net(noisy)[0], labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        seen = net(pixels[train[:CALIBRATION_TOKENS]])[1]
        logits, unseen = net(pixels[test])
    accuracy = float((logits.argmax(1) == labels[test]).float().mean())
    weights = [
        FfnWeights(*(ffn.get_parameter(f"{name}.weight").detach() for name in FfnWeights._fields))
        for ffn in net.ffns
    ]
    return accuracy, zip(weights, seen, unseen, strict=True)


def table(runs: Sequence[Errors]) -> str:
    """Writes mean and deviation over runs as rows of Markdown."""
    lines = ["| partition | zero | random | activation |", "|---|---|---|---|"]
    for partition in Partition:
        cells = []
        for method in RouterInit:
            values = [run[partition, method] for run in runs]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {partition.value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="routing_choice", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--blocks-only", action="store_true", help="leave out the trained network")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    seeds = range(options.seeds)
    for spread in (0.3, 1.0, float("inf")):
        runs = []
        for seed in seeds:
            ffn, _ = block_ffn(spread=spread, seed=seed)
            seen = unit_tokens(CALIBRATION_TOKENS, seed=10 + seed)
            runs.append(compare(ffn, seen, unit_tokens(1024, seed=20 + seed), seed=seed))
        sys.stdout.write(f"blocks of neurons, noise {spread}\n\n{table(runs)}\n\n")
    if options.blocks_only:
        return 0
    accuracies, by_layer = [], []
    for seed in seeds:
        accuracy, ffns = trained_ffns(seed)
        accuracies.append(accuracy)
        by_layer.append([compare(*parts, seed=seed) for parts in ffns])
    for layer, layer_runs in enumerate(zip(*by_layer, strict=True)):
        sys.stdout.write(f"trained on digits, layer {layer}\n\n{table(layer_runs)}\n\n")
    sys.stdout.write(f"accuracy on unseen digits: {mean(accuracies):.3f}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
