"""Compare the speed of `bakeoff.models.encode` with `SentenceTransformer.encode` at its defaults.

Both embed the same real texts, docstrings of the standard library, with the same model. Each side
runs in a process of its own, so that neither warms up the other's memory, and they take turns, so
that a machine which slows down slows down both. The ratio is the median over the rounds.

    python benchmarks/encode.py                # 5,000 texts, 5 rounds: minutes
    python benchmarks/encode.py --texts 500 --rounds 1 --json
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bakeoff.models import encode, pull
from bakeoff.models.packaged import is_packaged


def standard_library_docstrings(limit: int) -> list[str]:
    """Return up to `limit` distinct docstrings, spread evenly over the standard library."""
    found = dict.fromkeys(_docstrings(Path(sysconfig.get_path("stdlib"))))
    texts = list(found)
    if len(texts) <= limit:
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]


def _docstrings(root: Path) -> Iterator[str]:
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def _ours(model: Any, texts: list[str]) -> np.ndarray:
    return encode(model, texts, on_truncated=lambda cut: None)


def _theirs(model: Any, texts: list[str]) -> np.ndarray:
    return model.encode(texts)


def _side(run: Callable[..., np.ndarray], folder: str, texts: list[str], pipe: Connection) -> None:
    """Serve one side: for every request, embed all texts and answer (seconds, vectors)."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    run(model, texts[::25])  # lazy imports and thread pools are not what is compared
    pipe.send("ready")
    while pipe.recv() == "go":
        start = time.perf_counter()
        vectors = run(model, texts)
        pipe.send((time.perf_counter() - start, vectors))


def _matmul_rate(width: int, inner: int, rows: int) -> float:
    """Return the float32 operations per second that torch's matrix multiply reaches here.

    The shapes are those of one encoder layer for a batch of `rows` tokens.
    """
    import torch

    def seconds(n_in: int, n_out: int) -> float:
        a, b = torch.randn(rows, n_in), torch.randn(n_in, n_out)
        torch.mm(a, b)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)  # what the machine can do, not what its other users leave

    shapes = [(width, width)] * 4 + [(width, inner), (inner, width)]
    total = sum(seconds(*shape) for shape in shapes)
    return sum(2 * rows * n_in * n_out for n_in, n_out in shapes) / total


def _work(folder: str, texts: list[str]) -> dict[str, Any]:
    """Count the tokens, and the operations that no implementation can leave out."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    config = model[0].auto_model.config
    encoded = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linear = 2 * (4 * width * width + 2 * width * inner)
    operations = layers * (linear * lengths.sum() + 4 * width * (lengths**2).sum())
    # What the peer pads to: batches of 32 in order of characters.
    order = np.argsort([-len(text) for text in texts])
    batches = [lengths[order[i : i + 32]] for i in range(0, len(texts), 32)]
    return {
        "tokens": int(lengths.sum()),
        "peer_padded_tokens": int(sum(batch.max() * len(batch) for batch in batches)),
        "operations": float(operations),
        "width": width,
        "inner": inner,
    }


def measure(model: str, n_texts: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    import torch

    folder = str(pull(model) if is_packaged(model) else Path(model))
    texts = standard_library_docstrings(n_texts)
    work = _work(folder, texts)
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    vectors: dict[str, np.ndarray] = {}
    rates = []
    pipes, processes = {}, []
    for name, run in (("ours", _ours), ("theirs", _theirs)):
        pipes[name], far = context.Pipe()
        process = context.Process(target=_side, args=(run, folder, texts, far), daemon=True)
        process.start()
        processes.append(process)
        pipes[name].recv()
    for _ in range(rounds):
        rates.append(_matmul_rate(work["width"], work["inner"], rows=1024))
        for name, pipe in pipes.items():
            pipe.send("go")
            taken, vectors[name] = pipe.recv()
            seconds[name].append(taken)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("stop")
        process.join()
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    ours, rate = statistics.median(seconds["ours"]), max(rates)
    return {
        "benchmark": "encode",
        "model": model,
        "texts": len(texts),
        "tokens": work["tokens"],
        "peer_padding": work["peer_padded_tokens"] / work["tokens"],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "tokens_per_second": work["tokens"] / ours,
        "peer_tokens_per_second": work["tokens"] / statistics.median(seconds["theirs"]),
        "max_difference": float(np.abs(vectors["ours"] - vectors["theirs"]).max()),
        "matmul_gflops": rate / 1e9,
        "share_of_matmul_rate": work["operations"] / ours / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-minilm-l6-v2", help="packaged name or folder")
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.texts, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    low, high = result["ratio_range"]
    print(
        f"encode: {result['ratio']:.2f} times as fast as SentenceTransformer.encode at its "
        f"defaults ({low:.2f} to {high:.2f} over {arguments.rounds} rounds, "
        f"{result['texts']} texts, {result['threads']} threads)\n"
        f"  tokens per second: {result['tokens_per_second']:.0f} against "
        f"{result['peer_tokens_per_second']:.0f}; the peer pads every 1 token to "
        f"{result['peer_padding']:.2f}\n"
        f"  largest difference between the vectors: {result['max_difference']:.1e}\n"
        f"  matrix-multiply rate: {result['share_of_matmul_rate']:.0%} of this machine's "
        f"{result['matmul_gflops']:.0f} GFLOP/s in float32 is reached"
    )


if __name__ == "__main__":
    main()
