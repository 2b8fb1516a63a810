"""Speed of the stationary-representation parts against what one would use instead.

Four ratios, each on the same work in the same run, rounds taken in turns:

- *classifier*: logits and gradient of the fixed simplex classifier against ``torch`` multiplying
  with the stored matrix of the same class vectors (what the authors' code does);
- *step*: one training step of a text encoder with `CompatibleEncoderLoss` against the same step
  with sentence-transformers' ``MSELoss``, the library's own loss for fitting stored vectors;
- *training*: an epoch of `fit_stationary_encoder` against an epoch of the latter;
- *matrix*: identification and retrieval scores per query against scikit-learn
  (``average_precision_score`` query by query on the same similarities).

    python benchmarks/stationary_representations.py            # about a minute
    python benchmarks/stationary_representations.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from bakeoff.embedding.compatibility import compatibility_matrix
from bakeoff.embedding.stationary import SimplexClassifier, simplex
from bakeoff.embedding.stationary_text import (
    CompatibleEncoderLoss,
    fit_stationary_encoder,
    stationary_encoder,
)

Run = Callable[[], Any]


def in_turns(ours: Run, theirs: Run, rounds: int) -> tuple[float, float, float]:
    """Return median seconds of both, and the median of theirs / ours over the rounds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    ours(), theirs()  # lazy imports and memory pools are not what is compared
    for _ in range(rounds):
        for run, kept in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return (*(statistics.median(part) for part in seconds), statistics.median(ratios))


def classifier(slots: int, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    features = torch.randn(batch, slots - 1, requires_grad=True)
    targets = torch.randint(slots, (batch,))
    fast, weight = SimplexClassifier(slots), simplex(slots)

    def step(logits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits(features), targets)
        (gradient,) = torch.autograd.grad(loss, features)
        return gradient

    product = lambda z: torch.nn.functional.linear(z, weight)  # noqa: E731
    difference = float((step(fast) - step(product)).abs().max())
    ours, theirs, ratio = in_turns(lambda: step(fast), lambda: step(product), rounds)
    return {
        "slots": slots,
        "seconds": ours,
        "peer_seconds": theirs,
        "ratio": ratio,
        "stored_megabytes_saved": weight.numel() * 4 / 1e6,
        "max_gradient_difference": difference,
    }


def training_step(slots: int, batch: int, rounds: int) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MSELoss

    from bakeoff.data.embedded import standard_library_pairs
    from bakeoff.models import pull

    pairs = standard_library_pairs()[:: max(1, len(standard_library_pairs()) // batch)][:batch]
    encoder = SentenceTransformer(str(pull("all-minilm-l6-v2")), device="cpu")
    model = stationary_encoder(encoder, slots).train()
    texts, labels = [pair.docstring for pair in pairs], [pair.package for pair in pairs]
    stored = np.random.default_rng(0).standard_normal((len(texts), slots - 1)).astype(np.float32)
    ours = CompatibleEncoderLoss(model, labels, stored)
    theirs = MSELoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    rows, targets = torch.arange(len(texts)), torch.from_numpy(stored)

    def step(loss: torch.nn.Module, labels: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss([model.preprocess(texts)], labels).backward()
        optimizer.step()

    seconds, peer, ratio = in_turns(lambda: step(ours, rows), lambda: step(theirs, targets), rounds)
    return {
        "batch": len(texts),
        "slots": slots,
        "seconds": seconds,
        "peer_seconds": peer,
        "ratio": ratio,
    }


def training(slots: int, batch: int, rounds: int) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MSELoss

    from bakeoff.data.embedded import standard_library_pairs
    from bakeoff.models import pull

    pairs = standard_library_pairs()[:: len(standard_library_pairs()) // (4 * batch)][: 4 * batch]
    texts, labels = [pair.docstring for pair in pairs], [pair.package for pair in pairs]
    stored = np.random.default_rng(0).standard_normal((len(texts), slots - 1)).astype(np.float32)
    targets = torch.from_numpy(stored)

    def fresh() -> SentenceTransformer:
        encoder = SentenceTransformer(str(pull("all-minilm-l6-v2")), device="cpu")
        return stationary_encoder(encoder, slots)

    mine, peer = fresh(), fresh().train()
    loss = MSELoss(peer)

    def ours() -> None:
        fit_stationary_encoder(mine, texts, labels, old=stored, epochs=1, batch_size=batch)

    def theirs() -> None:
        optimizer = torch.optim.AdamW(peer.parameters(), lr=2e-5)
        for rows in torch.randperm(len(texts)).split(batch):
            features = peer.preprocess([texts[row] for row in rows.tolist()])
            optimizer.zero_grad(set_to_none=True)
            loss([features], targets[rows]).backward()
            optimizer.step()

    seconds, peer_seconds, ratio = in_turns(ours, theirs, rounds)
    return {
        "texts": len(texts),
        "batch": batch,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "ratio": ratio,
    }


def matrix(n_gallery: int, n_queries: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    n_classes = 50
    centres = rng.standard_normal((n_classes, 64))
    labels = rng.integers(0, n_classes, n_queries + n_gallery)
    labels[-n_classes:] = np.arange(n_classes)
    rows = (centres[labels] + 2 * rng.standard_normal((len(labels), 64))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries, gallery = rows[:n_queries], rows[n_queries:]
    query_labels, gallery_labels = labels[:n_queries], labels[n_queries:]

    def ours() -> np.ndarray:
        found = compatibility_matrix([(queries, gallery)], None, None, query_labels, gallery_labels)
        return found.per_query["map"][0, 0]

    def theirs() -> np.ndarray:
        similarity = queries @ gallery.T
        return np.array(
            [
                average_precision_score(gallery_labels == label, row)
                for label, row in zip(query_labels, similarity, strict=True)
            ]
        )

    difference = float(np.abs(ours() - theirs()).max())
    seconds, peer, ratio = in_turns(ours, theirs, rounds)
    return {
        "queries": n_queries,
        "gallery": n_gallery,
        "seconds": seconds,
        "peer_seconds": peer,
        "ratio": ratio,
        "max_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--text-batch", type=int, default=32)
    parser.add_argument("--gallery", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = {
        "benchmark": "stationary-representations",
        "threads": torch.get_num_threads(),
        "classifier": [
            classifier(slots, arguments.batch, arguments.rounds)
            for slots in (arguments.slots, 10 * arguments.slots)
        ],
        "step": training_step(arguments.slots, arguments.text_batch, arguments.rounds),
        "training": training(arguments.slots, arguments.text_batch, arguments.rounds),
        "matrix": [
            matrix(size, arguments.queries, arguments.rounds)
            for size in (arguments.gallery, 10 * arguments.gallery)
        ],
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    small, large = result["classifier"]
    print(
        f"classifier: {small['ratio']:.1f} times as fast as the product with the stored matrix at "
        f"{small['slots']:,} slots, {large['ratio']:.1f} times at {large['slots']:,}; ten times "
        f"the slots take {large['seconds'] / small['seconds']:.1f} times as long, the matrix "
        f"{large['peer_seconds'] / small['peer_seconds']:.1f} times"
    )
    epoch = result["training"]
    print(
        f"training: {epoch['ratio']:.2f} times as fast as an epoch with MSELoss "
        f"({epoch['seconds']:.1f} s against {epoch['peer_seconds']:.1f} s, {epoch['texts']} texts)"
    )
    step = result["step"]
    print(
        f"step: {step['ratio']:.2f} times as fast as the same step with sentence-transformers' "
        f"MSELoss ({step['seconds'] * 1e3:.0f} ms against {step['peer_seconds'] * 1e3:.0f} ms, "
        f"{step['batch']} texts)"
    )
    small, large = result["matrix"]
    print(
        f"matrix: {small['ratio']:.1f} times as fast as scikit-learn's average precision at "
        f"{small['gallery']:,} gallery items, {large['ratio']:.1f} times at {large['gallery']:,}; "
        f"ten times the gallery takes {large['seconds'] / small['seconds']:.1f} times as long"
    )


if __name__ == "__main__":
    main()
