"""Compare the speed of `ImportanceResampler` with the released package, `data-selection`.

Both read the same JSON lines, count the same hashed unigrams and bigrams of pool and target, and
compute every pool text's log importance weight, in one process. The texts are pieces of 128 words
of the standard library's source, the length that the paper uses. The sides take turns; CPU seconds
are compared, and the ratio is the median over the rounds. Without the package (pip install
data-selection) only our own rate and growth are printed.

    python benchmarks/importance_resampling.py          # 2,000 and 20,000 pieces: a minute
    python benchmarks/importance_resampling.py --json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sysconfig
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bakeoff.selection.importance_resampling import ImportanceResampler

WORDS_PER_PIECE = 128
TARGET_PIECES = 50


def pieces() -> Iterator[str]:
    """Yield pieces of the standard library's source, of its modules in turn."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            words = path.read_text(encoding="utf-8").split()
        except UnicodeDecodeError:
            continue
        for start in range(0, len(words) - WORDS_PER_PIECE + 1, WORDS_PER_PIECE):
            yield " ".join(words[start : start + WORDS_PER_PIECE])


class JsonLines:
    """The texts of a file, read anew each time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def ours(pool: Path, target: Path) -> np.ndarray:
    resampler = ImportanceResampler(1, random_state=0)
    return resampler.fit(JsonLines(pool), queries=JsonLines(target)).log_weights_


def theirs(pool: Path, target: Path) -> np.ndarray:
    from data_selection.hashed_ngram_dsir import HashedNgramDSIR

    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stderr(io.StringIO()):
        rival = HashedNgramDSIR([str(pool)], [str(target)], cache, num_proc=1)
        rival.fit_importance_estimator("all")
        rival.compute_importance_weights()
        return np.load(Path(cache) / "log_importance_weights" / "0.npy")


def timed(side: Any, pool: Path, target: Path) -> tuple[float, np.ndarray]:
    start = time.process_time()
    weights = side(pool, target)
    return time.process_time() - start, weights


def measure(n: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    texts = list(islice(pieces(), 10 * n + TARGET_PIECES))
    if len(texts) < 10 * n + TARGET_PIECES:
        raise SystemExit(f"the standard library has only {len(texts)} pieces: give a smaller --n")
    try:
        import data_selection.hashed_ngram_dsir  # noqa: F401

        rival = True
    except ImportError:
        rival = False
    result: dict[str, Any] = {"benchmark": "importance_resampling", "pieces": n}
    with tempfile.TemporaryDirectory() as folder:
        # Every tenth piece, so that both sizes are of one kind.
        target = write(Path(folder) / "target.jsonl", texts[:TARGET_PIECES])
        small = write(Path(folder) / "small.jsonl", texts[TARGET_PIECES::10])
        large = write(Path(folder) / "large.jsonl", texts[TARGET_PIECES:])
        timed(ours, target, target)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_large": []}
        for _ in range(rounds):
            taken, weights = timed(ours, small, target)
            seconds["ours"].append(taken)
            if rival:
                taken, expected = timed(theirs, small, target)
                seconds["theirs"].append(taken)
                result["max_difference"] = float(np.abs(weights - expected).max())
            seconds["ours_large"].append(timed(ours, large, target)[0])
        tracemalloc.start()
        ours(large, target)
        result["peak_megabytes_large"] = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    median = statistics.median(seconds["ours"])
    result |= {
        "seconds": seconds,
        "texts_per_second": n / median,
        "growth": statistics.median(seconds["ours_large"]) / median,
    }
    if rival:
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        result |= {
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="pieces; growth is measured at 10 n")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.n, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    if "ratio" in result:
        low, high = result["ratio_range"]
        print(
            f"importance resampling: {result['ratio']:.1f} times as fast as data-selection "
            f"({low:.1f} to {high:.1f} over {arguments.rounds} rounds, {arguments.n} pieces of "
            f"{WORDS_PER_PIECE} words)\n"
            f"  largest difference between the log weights: {result['max_difference']:.1e}"
        )
    else:
        print("importance resampling: data-selection is not installed, nothing to compare with")
    print(
        f"  {result['texts_per_second']:.0f} pieces a CPU second; ten times as many take "
        f"{result['growth']:.1f} times as long, at a peak of "
        f"{result['peak_megabytes_large']:.0f} MB"
    )


if __name__ == "__main__":
    main()
