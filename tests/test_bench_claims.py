# SPDX-License-Identifier: Apache-2.0
"""Claims about a GPU are read off the numbers they are about, or not measured."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_unified.bench.claims import CASE_16, GPU_CLAIMS, H200, PORTABLE


def record(op: str, **fields: Any) -> dict[str, Any]:
    return {
        "op": op,
        "case": CASE_16,
        "direction": "fwd",
        "dtype": "bfloat16",
        "provider": "sparse_unified",
        "median_us": 10.0,
        "gbps": 3600.0,
        "speedup": {},
    } | fields


def rows(*records: dict[str, Any], kernels: Any = (), file: str = H200) -> str:
    roof = {"tflops": 800.0, "gbps": 4000.0, "gemms": {"up": 750.0, "down": 700.0}}
    content = {"records": records, "roof": roof, "kernels": kernels}
    return "\n".join(claim.row({file: content}) for claim in GPU_CLAIMS)


def test_nothing_is_claimed_without_a_file() -> None:
    lines = [claim.row({}) for claim in GPU_CLAIMS]
    assert len(lines) == 11
    assert all(line.endswith("| not measured | |") for line in lines)


@pytest.mark.parametrize(("value", "held"), [(1.9, "1.90x, held"), (1.85, "1.85x, NOT HELD")])
def test_ratio_over_dense(value: float, held: str) -> None:
    found = rows(record("sparse_ffn", speedup={"dense": value}))
    assert f"16/8: at least 1.90x the dense FFN | {held} |" in found
    assert found.count("not measured") == 10


def test_replays_and_other_providers_are_no_proof() -> None:
    graph = record("sparse_ffn", speedup={"dense": 3.0}, graph=True)
    peer = record("sparse_ffn", speedup={"dense": 3.0}, provider="liger")
    assert rows(graph, peer).count("not measured") == 11


def test_routing_and_sorting_are_added_up() -> None:
    assert rows(record("route_topk")).count("not measured") == 11
    found = rows(record("route_topk", median_us=13.0), record("sort_by_expert", median_us=6.5))
    assert "at most 20 us | 19.5 us, held |" in found
    found = rows(record("route_topk", median_us=13.0), record("sort_by_expert", median_us=8.0))
    assert "21.0 us, NOT HELD" in found


def test_combine_is_compared_with_a_copy() -> None:
    assert "copy bandwidth | 90%, held |" in rows(record("combine"))


def test_products_are_compared_with_those_of_the_dense_ffn() -> None:
    kernels = [
        {"case": CASE_16, "phase": "up", "tflops": 712.5},
        {"case": CASE_16, "phase": None, "tflops": None},
        {"case": CASE_16, "phase": "down", "tflops": 630.0},
    ]
    found = rows(kernels=kernels)
    assert (
        "up-projection: at least 92 % of the rate of cuBLAS on the dense one | 95%, held" in found
    )
    assert "90%, NOT HELD" in found


def test_portable_kernels_have_a_file_of_their_own() -> None:
    found = rows(record("sparse_ffn", speedup={"dense": 1.3}), file=PORTABLE)
    assert "portable kernels: at least 1.2x the dense FFN | 1.30x, held |" in found
    assert found.count("not measured") == 10
