"""What the feature cache costs when it is filled, and what reading from it costs.

    python benchmarks/feature_cache.py
    python benchmarks/feature_cache.py --base all-minilm-l6-v2 --texts 1000 --json

Each line is one ratio, both sides measured in this run:

* filling: a pass that fills an empty cache, against the bare forward passes over the same batches.
  Median over pairs, with the range: passes take seconds, and on a busy machine single ones differ
  by half. Which side goes first alternates. Processor time is given beside wall time. The probes
  that a model goes through once per process are timed apart, as "first call";
* reading: stored bytes per second of all texts' states read warm (and widened to float32), against
  numpy's copy of as many bytes;
* gathering: a random batch of texts from the cache, against the same from a tensor in memory.

The last two are the best of 30 repetitions, taken in turns.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bakeoff.models import load
from bakeoff.models.feature_cache import FeatureCache
from bakeoff.models.states import tokenize


def docstrings(wanted: int) -> list[str]:
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    found[text] = None
        if len(found) >= wanted:
            break
    return list(found)[:wanted]


def seconds(*timed: Callable[[], object], repeats: int) -> list[float]:
    """Return the best time of each callable; they take turns."""
    best = [float("inf")] * len(timed)
    for _ in range(repeats):
        for i, function in enumerate(timed):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def paired_ratios(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> dict[str, list[float]]:
    """Time both in alternating order; return wall seconds of each and the ratios of every pair."""
    found: dict[str, list[float]] = {"ours": [], "theirs": [], "wall": [], "processor": []}
    for number in range(repeats):
        times = {}
        for function in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            wall, processor = time.perf_counter(), time.process_time()
            function()
            times[function] = (time.perf_counter() - wall, time.process_time() - processor)
        found["ours"].append(times[ours][0])
        found["theirs"].append(times[theirs][0])
        found["wall"].append(times[ours][0] / times[theirs][0])
        found["processor"].append(times[ours][1] / times[theirs][1])
    return found


def bare_forward(base, texts: list[str], max_length: int, batch_tokens: int) -> Callable[[], None]:
    ids = sorted((t.ids for t in tokenize(base, texts, max_length=max_length)), key=len)[::-1]
    batches = []
    while ids:
        n_rows = max(1, batch_tokens // len(ids[0]))
        rows, ids = ids[:n_rows], ids[n_rows:]
        input_ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask[i, : len(row)] = 1
        batches.append({"input_ids": input_ids, "attention_mask": mask})

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            base.model(**batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--base", default="smollm2-135m", help="what bakeoff.models.loading accepts"
    )
    parser.add_argument("--texts", type=int, default=64, help="standard-library docstrings")
    parser.add_argument("--max-length", type=int, default=128, help="in tokens")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=6, help="pairs of passes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    base = load(options.base)
    base.model.config.use_cache = False
    texts = docstrings(options.texts)
    attention = "causal" if base.is_decoder else "bidirectional"
    limits = {"max_length": options.max_length, "batch_tokens": options.batch_tokens}

    def fill() -> None:
        with tempfile.TemporaryDirectory() as empty:
            FeatureCache(empty).features(base, texts, attention=attention, **limits)

    forward = bare_forward(base, texts, **limits)
    with tempfile.TemporaryDirectory() as empty:
        start = time.perf_counter()
        FeatureCache(empty).features(base, texts[:1], attention=attention, **limits)
        first_call = time.perf_counter() - start
    pairs = paired_ratios(fill, forward, options.repeats)

    with tempfile.TemporaryDirectory() as directory:
        cache = FeatureCache(directory)
        features = cache.features(base, texts, attention=attention, **limits)
        again = lambda: cache.features(base, texts, attention=attention, **limits)  # noqa: E731
        (warm,) = seconds(again, repeats=5)
        in_memory = features.load("layer_means")
        stored = np.empty(in_memory.numel(), np.float16)
        target = np.zeros_like(stored)
        batch = np.random.default_rng(0).integers(0, len(texts), 64)
        read, copy, gather, index = seconds(
            lambda: features.load("layer_means"),
            lambda: np.copyto(target, stored),
            lambda: features.layer_means(batch),
            lambda: in_memory[torch.from_numpy(batch)],
            repeats=30,
        )

    result = {
        "base": options.base,
        "texts": len(texts),
        "tokens": int(features.n_tokens.sum()),
        "pairs": options.repeats,
        "first_call_seconds": first_call,
        "cold_seconds": float(np.median(pairs["ours"])),
        "bare_forward_seconds": float(np.median(pairs["theirs"])),
        "cold_over_bare": float(np.median(pairs["wall"])),
        "cold_over_bare_range": [min(pairs["wall"]), max(pairs["wall"])],
        "cold_over_bare_processor": float(np.median(pairs["processor"])),
        "warm_call_seconds": warm,
        "warm_read_gigabytes_per_second": stored.nbytes / read / 1e9,
        "copy_gigabytes_per_second": stored.nbytes / copy / 1e9,
        "read_over_copy": copy / read,
        "gather_64_milliseconds": gather * 1e3,
        "index_64_milliseconds": index * 1e3,
        "gather_over_index": gather / index,
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    low, high = result["cold_over_bare_range"]
    print(
        f"filling   {result['cold_over_bare']:.2f} x the bare forward passes "
        f"(median of {options.repeats} pairs, {low:.2f} to {high:.2f}; processor time "
        f"{result['cold_over_bare_processor']:.2f}; {result['cold_seconds']:.1f} s for "
        f"{result['tokens']} tokens; first call {first_call:.1f} s; again, warm: {warm:.3f} s)"
    )
    print(
        f"reading   {result['read_over_copy']:.2f} x numpy's copy rate "
        f"({result['warm_read_gigabytes_per_second']:.1f} against "
        f"{result['copy_gigabytes_per_second']:.1f} GB/s of stored bytes)"
    )
    print(
        f"gathering {result['gather_over_index']:.2f} x indexing a tensor in memory "
        f"({result['gather_64_milliseconds']:.2f} ms against "
        f"{result['index_64_milliseconds']:.2f} ms for 64 texts)"
    )


if __name__ == "__main__":
    main()
