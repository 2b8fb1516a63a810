"""Round-robin selection from a vector store against the bare blocked matrix product.

Both read the same store of random unit vectors in the same blocks, in the same process, in turns;
the product keeps nothing, so it is the floor for any exact method. A peer,
`sentence_transformers.util.semantic_search`, finds the lists that round robin needs (it has no
round robin) with the whole pool in memory. Peak memory is that of fresh processes.

    python benchmarks/rds_plus.py --rows 1000000 --queries 500 --select 10000 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bakeoff.data.vector_store import VectorStore
from bakeoff.selection.query_selection import select_by_queries

# What `select_by_queries` chooses for 500 queries; the bare product gets the same.
BLOCK_ROWS = 4096


def make_store(path: Path, rows: int, width: int) -> VectorStore:
    """Write a pool of random unit vectors; shard after shard, it is never in memory."""

    def embed(texts: list[str]) -> np.ndarray:
        rng = np.random.default_rng(int(texts[0]))
        vectors = rng.standard_normal((len(texts), width), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return VectorStore.build(
        path, lambda: map(str, range(rows)), embed, fingerprint={"rows": rows, "width": width}
    )


def make_queries(n: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(2**40).standard_normal((n, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bare_product(store: VectorStore, queries: np.ndarray) -> None:
    """Multiply queries by every block, and nothing else."""
    import torch

    left, out = torch.from_numpy(queries), torch.empty(0)
    for _, block in store.blocks(BLOCK_ROWS):
        if out.shape != (len(queries), len(block)):
            out = torch.empty((len(queries), len(block)))
        torch.mm(left, torch.from_numpy(block).T, out=out)


def semantic_search(store: VectorStore, queries: np.ndarray, n: int) -> None:
    """Find each query's 4 n / Q nearest rows with sentence-transformers."""
    import torch
    from sentence_transformers.util import semantic_search

    pool = torch.from_numpy(np.asarray(store))
    semantic_search(torch.from_numpy(queries), pool, top_k=max(32, 4 * n // len(queries)))


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def _alone(kind: str, path: Path, n_queries: int, n: int, pipe: Any) -> None:
    """Run one side once in a fresh process; report its seconds and how much memory it added."""
    warnings.simplefilter("ignore")
    store = VectorStore.open(path)
    queries = make_queries(n_queries, store.dimension)
    import sentence_transformers.util  # noqa: F401
    import torch

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: select_by_queries(store, queries, n),
        "bare": lambda: bare_product(store, queries),
        "peer": lambda: semantic_search(store, queries, n),
    }
    taken = seconds(runs[kind])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((taken, (after - before) / 1024))


def alone(kind: str, path: Path, n_queries: int, n: int) -> tuple[float, float]:
    """Return seconds and MiB added."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_alone, args=(kind, path, n_queries, n, there))
    process.start()
    result: tuple[float, float] = here.recv()
    process.join()
    return result


def measure(rows: int, width: int, n_queries: int, n: int, rounds: int) -> dict[str, Any]:
    """Run the comparison at `rows` and at a tenth of it, and return its figures."""
    import torch

    warnings.simplefilter("ignore")
    queries = make_queries(n_queries, width)
    result: dict[str, Any] = {
        "benchmark": "rds_plus",
        "width": width,
        "queries": n_queries,
        "selected": n,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "sizes": {},
    }
    for size in (rows // 10, rows):
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(Path(folder), size, width)
            bare_product(store, queries)  # and the files are in the page cache
            ours, bare = [], []
            for _ in range(rounds):
                bare.append(seconds(bare_product, store, queries))
                ours.append(seconds(select_by_queries, store, queries, n))
            ratios = [a / b for a, b in zip(ours, bare, strict=True)]
            peer_seconds, peer_memory = alone("peer", Path(folder), n_queries, n)
            result["sizes"][size] = {
                "seconds": statistics.median(ours),
                "bare_seconds": statistics.median(bare),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "gflops": 2e-9 * size * width * n_queries / statistics.median(bare),
                "memory_mib": alone("ours", Path(folder), n_queries, n)[1],
                "bare_memory_mib": alone("bare", Path(folder), n_queries, n)[1],
                "pool_mib": size * width * 4 / 2**20,
                "peer_seconds": peer_seconds,
                "peer_memory_mib": peer_memory,
            }
    small, large = result["sizes"].values()
    result["ratio"] = large["ratio"]
    result["growth_of_time"] = large["seconds"] / small["seconds"]
    result["growth_of_memory"] = large["memory_mib"] / small["memory_mib"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--select", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(
        arguments.rows, arguments.width, arguments.queries, arguments.select, arguments.rounds
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for size, figures in result["sizes"].items():
        low, high = figures["ratio_range"]
        print(
            f"{size} rows x {result['width']}, {result['queries']} queries, "
            f"{result['selected']} selected: {figures['seconds']:.2f} s, {figures['ratio']:.2f} "
            f"times the bare product ({low:.2f} to {high:.2f} over {arguments.rounds} rounds, "
            f"{figures['gflops']:.0f} GFLOP/s)\n"
            f"  memory added: {figures['memory_mib']:.0f} MiB (bare product "
            f"{figures['bare_memory_mib']:.0f}, the pool itself {figures['pool_mib']:.0f})\n"
            f"  semantic_search, lists only: {figures['peer_seconds']:.2f} s, "
            f"{figures['peer_memory_mib']:.0f} MiB"
        )
    print(
        f"ten times the rows: {result['growth_of_time']:.1f} times the time, "
        f"{result['growth_of_memory']:.2f} times the memory"
    )


if __name__ == "__main__":
    main()
