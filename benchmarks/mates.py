"""Speed of MATES probes against a deep copy of model and optimizer for every probe.

Run: python benchmarks/mates.py [--layers 6] [--hidden 256] [--probes 20] [--rounds 5] [--json]

Both sides probe the same sequences of a random Llama from the same AdamW state and must find the
same changes of the reference loss. Timings alternate; the ratio is the median over rounds. Then
the number of probes is multiplied by ten. Two more figures: the share of a probe that putting the
state back takes, and the gain where only the last layer is trained, so that the layers below read
the references once.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from bakeoff.selection.mates import Snapshot, probe_influence


def _problem(layers: int, hidden: int, length: int, n: int, n_reference: int) -> tuple[Any, ...]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    drawn = torch.randint(0, 4096, (n + n_reference, length))
    probes = [{"input_ids": row[None]} for row in drawn[:n]]
    reference = [{"input_ids": rows} for rows in drawn[n:].split(8)]
    return model, probes, reference


def _with_moments(model: Any, parameters: Any, batches: list[Any]) -> Any:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for batch in batches[:3]:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        model.zero_grad()
    return optimizer


def _naive(model: Any, optimizer: Any, probes: list[Any], reference: list[Any]) -> np.ndarray:
    def loss(model: Any) -> float:
        with torch.no_grad():
            return statistics.fmean(
                model(**batch, labels=batch["input_ids"]).loss.item() for batch in reference
            )

    before = loss(model)
    found = []
    for batch in probes:
        other, stepper = copy.deepcopy((model, optimizer))
        other(**batch, labels=batch["input_ids"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        stepper.step()
        found.append(loss(other) - before)
    return np.array(found)


def _seconds(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(
    layers: int, hidden: int, length: int, n: int, n_reference: int, rounds: int
) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    model, many, reference = _problem(layers, hidden, length, 10 * n, n_reference)
    probes = many[:n]
    optimizer = _with_moments(model, model.parameters(), many)
    sides = {
        "ours": lambda: probe_influence(model, optimizer, probes, reference),
        "naive": lambda: _naive(model, optimizer, probes, reference),
    }
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for _ in range(rounds):
        for name, run in sides.items():
            taken, found[name] = _seconds(run)
            seconds[name].append(taken)
    difference = float(np.abs(found["ours"] - found["naive"]).max())
    if difference > 1e-5:
        raise AssertionError(f"the two sides differ by {difference}")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["naive"], strict=True)]
    ours = statistics.median(seconds["ours"])
    ten_times, _ = _seconds(lambda: probe_influence(model, optimizer, many, reference))
    snapshot = Snapshot(model, optimizer)
    restoring = statistics.median(_seconds(snapshot.restore)[0] for _ in range(20))
    last = _with_moments(model, model.model.layers[-1].parameters(), many)
    reused, a = _seconds(lambda: probe_influence(model, last, probes, reference))
    whole, b = _seconds(lambda: probe_influence(model, last, probes, reference, reuse_frozen=False))
    if a.tolist() != b.tolist():
        raise AssertionError("reusing frozen layers changed the result")
    return {
        "benchmark": "mates",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_probe": length,
        "reference_tokens": n_reference * length,
        "probes": n,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "probes_per_second": n / ours,
        "naive_probes_per_second": n / statistics.median(seconds["naive"]),
        "largest_difference": difference,
        "typical_change": float(np.abs(found["ours"]).mean()),
        "growth_for_ten_times_the_probes": ten_times / ours,
        "share_of_putting_back": restoring / (ours / n),
        "last_layer_only_ratio": whole / reused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=48, help="tokens of a probe")
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--reference", type=int, default=8, help="reference sequences")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(
        arguments.layers,
        arguments.hidden,
        arguments.length,
        arguments.probes,
        arguments.reference,
        arguments.rounds,
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    low, high = result["ratio_range"]
    print(
        f"probe_influence: {result['ratio']:.2f} times as fast as a deep copy per probe "
        f"({low:.2f} to {high:.2f} over {arguments.rounds} rounds, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads)\n"
        f"  probes per second: {result['probes_per_second']:.2f} against "
        f"{result['naive_probes_per_second']:.2f}\n"
        f"  largest difference {result['largest_difference']:.1e} of changes of "
        f"{result['typical_change']:.1e}\n"
        f"  ten times the probes take {result['growth_for_ten_times_the_probes']:.1f} times "
        "as long\n"
        f"  putting weights and moments back: {result['share_of_putting_back']:.0%} of a probe\n"
        f"  training the last layer only, frozen layers read the references once: "
        f"{result['last_layer_only_ratio']:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
