"""Compare co-citation training and encoding by domain with sentence-transformers on the same work.

Texts are docstrings of the standard library. Rivals at equal settings: a loop over
``MultipleNegativesRankingLoss``, and ``SentenceTransformer.encode``; both with the dense model. All
sides run in one process, in turns; ratios are medians over the rounds.

    python benchmarks/cocitation_experts.py                 # minutes
    python benchmarks/cocitation_experts.py --texts 100 --steps 3 --rounds 1 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from bakeoff.data.embedded import standard_library_pairs
from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.cocitation_training import train_cocitation
from bakeoff.embedding.domain_encoder import DomainEncoder, encode_domains
from bakeoff.embedding.ranking_losses import MNRLoss
from bakeoff.embedding.training import homogeneous_batches
from bakeoff.models import pull


def peer_step(
    model: SentenceTransformer, loss: Any, optimizer: torch.optim.Optimizer, batch: Any
) -> None:
    """Take one training step as sentence-transformers' trainer does, without its logging."""
    features = [model.preprocess(column) for column in batch]
    value = loss(features, None)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(n_texts: int, steps: int, batch_size: int, rounds: int, domains: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    folder = str(pull("all-minilm-l6-v2"))

    def fresh() -> SentenceTransformer:
        model = SentenceTransformer(folder, device="cpu")
        model.max_seq_length = 128
        return model

    names = [f"domain {number}" for number in range(domains)]
    docstrings = list(dict.fromkeys(pair.docstring for pair in standard_library_pairs()))
    docstrings = docstrings[: len(docstrings) // (2 * domains) * 2 * domains]
    train = [
        TextPairs(
            tuple(docstrings[2 * number :: 2 * domains]),
            tuple(docstrings[2 * number + 1 :: 2 * domains]),
            group=name,
        )
        for number, name in enumerate(names)
    ]
    dense, peer = fresh(), fresh()
    mixed = DomainEncoder.from_model(fresh(), names)
    loss = MultipleNegativesRankingLoss(peer)
    queries = [text for group in train for text in group.queries]
    positives = [text for group in train for text in group.positives]
    together = [TextPairs(tuple(queries), tuple(positives))]
    # The batches that train_cocitation draws.
    batches = [
        ([queries[index] for index in rows], [positives[index] for index in rows])
        for rows in islice(homogeneous_batches(together, batch_size, seed=0), steps)
    ]

    def ours(model: SentenceTransformer) -> Callable[[], object]:
        return lambda: train_cocitation(
            model,
            train,
            loss=MNRLoss(scale=20.0, normalize=True),
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-5,
        )

    def theirs() -> None:
        peer.train()
        optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)  # as ours: its own
        for batch in batches:
            peer_step(peer, loss, optimizer, batch)

    texts = docstrings[: 10 * n_texts]
    own = [names[index % domains] for index in range(len(texts))]
    sides: dict[str, Callable[[], object]] = {
        "train, sentence-transformers": theirs,
        "train, dense": ours(dense),
        f"train, {domains} experts": ours(mixed),
        "encode, sentence-transformers": lambda: peer.encode(texts[:n_texts]),
        f"encode, {domains} experts, DomainEncoder.encode": lambda: mixed.encode(
            texts[:n_texts], domain=own[:n_texts]
        ),
        f"encode, {domains} experts, encode_domains": lambda: encode_domains(
            mixed, texts[:n_texts], own[:n_texts]
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():  # lazy imports and memory pools are not what is compared
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(seconds(run))
    large = seconds(lambda: encode_domains(mixed, texts, own))

    def ratio(name: str, rival: str) -> float:
        return statistics.median(b / a for a, b in zip(taken[name], taken[rival], strict=True))

    rival_train, rival_encode = "train, sentence-transformers", "encode, sentence-transformers"
    return {
        "benchmark": "cocitation_experts",
        "domains": domains,
        "batch_size": batch_size,
        "steps": steps,
        "texts": min(n_texts, len(texts)),
        "threads": torch.get_num_threads(),
        "seconds": taken,
        "times as fast as": {
            f"{name} against {rival}": ratio(name, rival)
            for rival in (rival_train, "train, dense", rival_encode)
            for name in sides
            if name != rival and name.split(",")[0] == rival.split(",")[0] and name != rival_train
        },
        "parameters": {
            "dense": sum(parameter.numel() for parameter in dense.parameters()),
            "experts": sum(parameter.numel() for parameter in mixed.parameters()),
        },
        "growth": large / taken[f"encode, {domains} experts, encode_domains"][-1],
        "growth_of_texts": len(texts) / n_texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--domains", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(
        arguments.texts,
        arguments.steps,
        arguments.batch_size,
        arguments.rounds,
        arguments.domains,
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for pair, ratio in result["times as fast as"].items():
        print(f"{ratio:.2f} times as fast: {pair}")
    print(
        f"encode_domains on {result['growth_of_texts']:.0f} times the texts: "
        f"{result['growth']:.1f} times the time\n"
        f"parameters: {result['parameters']['dense']:,} dense, "
        f"{result['parameters']['experts']:,} with experts"
    )


if __name__ == "__main__":
    main()
