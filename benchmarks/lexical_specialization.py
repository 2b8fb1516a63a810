"""Compare lexicon induction and lexical training with what people use otherwise.

*Ranking*: ranks under CSLS, by blocks, against the textbook lines of NumPy that hold the whole
matrix of similarities, and against faiss (nearest neighbours of both sides, then a search for 100
candidates, which knows no rank behind them). Same vectors, same answers, each in a process of its
own for its memory. The growth is ours for ten times the words on both sides.

*Training step*: `LexicalSpecializer`'s step against sentence-transformers' multiple-negatives loss
in a bare loop with the same model, optimizer, batch and words, in turns.

    python benchmarks/lexical_specialization.py
    python benchmarks/lexical_specialization.py --words 100000 --growth 0 --rivals none
    python benchmarks/lexical_specialization.py --words 2000 --growth 2 --steps 2 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

K = 10


def planted(n: int, dim: int, questions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return source and target vectors, row i of one a noisy copy of row i of the other."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal((n, dim), dtype=np.float32)
    noise = np.float32(dim**0.5 / 4)  # so that a third of the words are found at once, or so
    target = source + noise * rng.standard_normal((n, dim), dtype=np.float32)
    return source, target, np.arange(min(n, questions))


def ours(source: np.ndarray, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from bakeoff.embedding.lexicon_induction import ranks_of_gold

    gold = [[int(row)] for row in asked]
    return ranks_of_gold(source[asked], target, gold, csls_k=K, background=source)[0]


def plain_numpy(source: np.ndarray, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    source = source / np.linalg.norm(source, axis=1, keepdims=True)
    target = target / np.linalg.norm(target, axis=1, keepdims=True)
    cosine = source @ target.T
    nearest = np.partition(cosine, -K, axis=0)[-K:].mean(axis=0)
    scores = 2 * cosine[asked] - nearest
    order = np.argsort(-scores, axis=1)
    return np.argwhere(order == asked[:, None])[:, 1] + 1


def with_faiss(source: np.ndarray, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    import faiss

    source, target = source.copy(), target.copy()
    faiss.normalize_L2(source)
    faiss.normalize_L2(target)
    near, _ = faiss.knn(target, source, K, metric=faiss.METRIC_INNER_PRODUCT)
    # CSLS as an inner product: one more column holds what is subtracted.
    wide = np.hstack([target, near.mean(axis=1, keepdims=True)])
    questions = np.hstack([2 * source[asked], -np.ones((len(asked), 1), dtype=np.float32)])
    _, found = faiss.knn(questions, wide, min(100, len(wide)), metric=faiss.METRIC_INNER_PRODUCT)
    hits = found == asked[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)  # 0: unknown


def _side(
    run: Callable[..., np.ndarray], n: int, dim: int, questions: int, pipe: Connection
) -> None:
    source, target, asked = planted(n, dim, questions)
    run(source[:100], target[:100], np.arange(50))  # lazy imports are not what is compared
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    ranks = run(source, target, asked)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((seconds, before / 1024, after / 1024, ranks))


def measured(
    run: Callable[..., np.ndarray], n: int, dim: int, questions: int
) -> tuple[dict[str, float], np.ndarray]:
    """Return seconds and memory of one run in a new process, and the ranks."""
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=_side, args=(run, n, dim, questions, far))
    process.start()
    far.close()
    try:
        seconds, before, after, ranks = pipe.recv()
    except EOFError:  # killed for memory
        process.join()
        return {"seconds": float("nan")}, np.empty(0)
    process.join()
    figures = {"seconds": seconds, "inputs_mib": before, "peak_mib": after}
    return figures, ranks


def ranking(n: int, dim: int, questions: int, growth: int, rivals: bool) -> dict[str, Any]:
    sides = {"ours": ours} | ({"numpy": plain_numpy, "faiss": with_faiss} if rivals else {})
    figures: dict[str, Any] = {"words": n, "dim": dim, "questions": min(n, questions)}
    ranks = {}
    for name, run in sides.items():
        figures[name], ranks[name] = measured(run, n, dim, questions)
    for name in ranks.keys() - {"ours"}:
        known = ranks[name] > 0
        figures[name]["same_ranks"] = float((ranks[name] == ranks["ours"])[known].mean())
        figures[name]["known_ranks"] = float(known.mean())
        figures[name]["ratio"] = figures[name]["seconds"] / figures["ours"]["seconds"]
    if growth > 1:
        more, _ = measured(ours, n * growth, dim, questions)
        figures["grown"] = {**more, "words": n * growth}
        figures["growth_of_seconds"] = more["seconds"] / figures["ours"]["seconds"]
    return figures


def training(model_name: str, batch_size: int, steps: int, peft: str) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    from bakeoff.data.lexicon_sources import cldr_names
    from bakeoff.data.lexicons import build_pairs
    from bakeoff.embedding.lexical import LexicalSpecializer, _Reader
    from bakeoff.embedding.word_vectors import WordEncoder

    names = cldr_names(["cs", "de", "en", "es", "fi", "fr", "it", "nl", "pl", "sv"])
    pairs = build_pairs(names, max_per_language_pair=200)
    trained = LexicalSpecializer(model_name, peft=peft, batch_size=batch_size)
    sides: dict[str, Callable[[np.ndarray], None]] = {}

    encoder = WordEncoder(model_name)
    weights = trained._prepare(encoder)
    reader = _Reader(encoder, pairs, "none", -1)
    optimizer = torch.optim.AdamW(weights, lr=5e-6, weight_decay=0.0, fused=True)
    encoder.backbone.train()

    def step(rows: np.ndarray) -> None:
        labels = torch.from_numpy(np.repeat(pairs.labels[rows], 2))
        loss = trained._step_loss(reader.read(rows), labels)
        assert loss is not None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    sides["ours"] = step
    model: SentenceTransformer = WordEncoder(model_name).sentence_transformer()
    model.train()
    objective = losses.MultipleNegativesRankingLoss(model, scale=1 / 0.07)
    own = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0, fused=True)

    def their_step(rows: np.ndarray) -> None:
        columns = [
            [names.words[row] for row in side[rows].tolist()]
            for side in (pairs.first, pairs.second)
        ]
        features = [model.preprocess(texts) for texts in columns]
        loss = objective(features, None)
        own.zero_grad(set_to_none=True)
        loss.backward()
        own.step()

    sides["sentence-transformers"] = their_step
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rng = np.random.default_rng(0)
    for number in range(steps + 1):
        rows = rng.integers(0, len(pairs), batch_size)
        for name, run in sides.items():
            start = time.perf_counter()
            run(rows)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "model": model_name,
        "batch_size": batch_size,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=10_000, help="words of each language")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--growth", type=int, default=10, help="0: no larger run")
    parser.add_argument("--rivals", choices=("all", "none"), default="all")
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="0: no training")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    given = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "lexical_specialization"}
    result["ranking"] = ranking(
        given.words, given.dim, given.questions, given.growth, given.rivals == "all"
    )
    if given.steps:
        result["training"] = training(given.model, given.batch_size, given.steps, "full")
    if given.json:
        print(json.dumps(result, indent=1))
        return
    figures = result["ranking"]
    mine = figures["ours"]
    print(
        f"CSLS ranks of {figures['questions']:,} questions among {figures['words']:,} words "
        f"(background {figures['words']:,}, d = {figures['dim']}): {mine['seconds']:.1f} s, "
        f"peak {mine['peak_mib']:.0f} MiB (before: {mine['inputs_mib']:.0f} MiB)"
    )
    for name in ("numpy", "faiss"):
        if name in figures:
            other = figures[name]
            if "peak_mib" not in other:
                print(f"  {name}: ran out of memory")
                continue
            print(
                f"  {other['ratio']:.2f} times as fast as {name} ({other['seconds']:.1f} s, peak "
                f"{other['peak_mib']:.0f} MiB; it knows {other['known_ranks']:.0%} of the ranks, "
                f"{other['same_ranks']:.2%} of them as ours)"
            )
    if "grown" in figures:
        more = figures["grown"]
        print(
            f"  {more['words']:,} words: {more['seconds']:.1f} s ("
            f"{figures['growth_of_seconds']:.1f} times), peak {more['peak_mib']:.0f} MiB"
        )
    if "training" in result:
        trained = result["training"]
        low, high = trained["ratio_range"]
        print(
            f"training step ({trained['model']}, {trained['batch_size']} pairs): "
            f"{trained['ratio']:.2f} times as fast as sentence-transformers ({low:.2f} to "
            f"{high:.2f}); {trained['seconds']['ours']:.2f} s against "
            f"{trained['seconds']['sentence-transformers']:.2f} s"
        )


if __name__ == "__main__":
    main()
