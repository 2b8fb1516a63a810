"""Serve domain experts with and without looking ahead: batches, caches, latency.

SmolLM2, cut to its first layers, is refactored into four domain experts (Python code, prose, names
of characters, tables of aliases), its router trained for a few steps. Real texts that it has not
seen are then served twice with each policy: in simulated time, with costs measured here and experts
read from the disk itself, and by the real engine, policies taking turns.

- expert-aware batches against batches in order of arrival, and "decode first";
- Belady's cache against least recently used and random, on tokens of interleaved requests;
- what choosing a batch costs, and how that grows with ten times as many requests.

    python benchmarks/read_me.py                     # about 2 minutes on one core
    python benchmarks/read_me.py --layers 2 --router-steps 5 --requests 8 --rounds 1 --json
"""

from __future__ import annotations

import argparse
import inspect
import json
import locale
import statistics
import sys
import tempfile
import time
import unicodedata
from typing import Any

import numpy as np
import torch
from torch import nn

from bakeoff.experts.expert_serving import (
    ArrivalBatcher,
    Batcher,
    BeladyCache,
    ExpertBatcher,
    ExpertStore,
    LRUCache,
    OffloadedExperts,
    RandomCache,
    ServingEngine,
    compare_caches,
    measure_costs,
    requests_from_plans,
    simulate_serving,
)
from bakeoff.experts.read_me import (
    build_expert_masks,
    collect_channel_stats,
    moefy,
    pack_texts,
    tune_router,
)

BUDGET, PROMPT, OUTPUT, CAPACITY = 64, 96, 16, 2


def texts() -> dict[str, str]:
    """Return four kinds of text that every Python carries."""
    import argparse as _argparse
    import asyncio.base_events
    import tarfile
    from pydoc_data.topics import topics

    code = "\n".join(inspect.getsource(m) for m in (_argparse, tarfile, asyncio.base_events))
    prose = "\n\n".join(text for _, text in sorted(topics.items()))
    names = [unicodedata.name(chr(i), "") for i in range(0x1000, 0x3000)]
    aliases = [f"{key} = {value}" for key, value in locale.locale_alias.items()]
    rng = np.random.default_rng(0)
    return {
        "code": code,
        "prose": prose,
        "names": "\n".join(rng.permutation([name for name in names if name])),
        "aliases": "\n".join(rng.permutation(aliases)),
    }


def refactor(layers: int, router_steps: int, n_texts: int) -> tuple[Any, torch.Tensor, list[float]]:
    """Return a packed model, texts that it has not seen, and the router's losses."""
    from bakeoff.models import load_language_model

    loaded = load_language_model("smollm2-135m")
    model = loaded.model
    model.model.layers = nn.ModuleList(list(model.model.layers)[:layers])
    model.config.num_hidden_layers = layers
    length, per_domain = PROMPT + OUTPUT, -(-n_texts // 4)
    rows = {
        name: pack_texts(loaded.tokenizer, [text[:120_000]], length)
        for name, text in texts().items()
    }
    unseen = {name: part[-per_domain:] for name, part in rows.items()}
    seen = {name: part[: min(64, len(part) - per_domain)] for name, part in rows.items()}
    stats = collect_channel_stats(model, {k: v[:24] for k, v in seen.items()}, batch_size=8)
    made = moefy(model, build_expert_masks(stats))
    losses = tune_router(
        made, torch.cat(list(seen.values())), steps=router_steps, batch_size=8, learning_rate=1e-3
    )
    mixed = torch.stack(list(unseen.values()), dim=1).flatten(0, 1)[:n_texts]
    return made.pack().eval(), mixed, losses


def interleaved(plans: list[np.ndarray], group: int = 4) -> np.ndarray:
    """Return the experts of tokens when `group` requests at a time take turns."""
    parts = [np.stack(plans[i : i + group], 1).ravel() for i in range(0, len(plans), group)]
    return np.concatenate(parts)


def batchers() -> dict[str, Batcher]:
    return {
        "expert-aware": ExpertBatcher(BUDGET, max_wait=32),
        "arrival": ArrivalBatcher(BUDGET),
        "decode-first": ArrivalBatcher(BUDGET, order="decode-first"),
    }


def simulated(plans: list[np.ndarray], costs: Any, load: float, repeat: int) -> dict[str, Any]:
    """Replay `repeat` times as many requests, arriving at `load` times what "arrival" can do."""
    many = [plans[i % len(plans)] for i in range(len(plans) * repeat)]
    at_once = requests_from_plans(many, OUTPUT, [0.0] * len(many))
    full = simulate_serving(at_once, ArrivalBatcher(BUDGET), LRUCache(CAPACITY), costs).seconds
    gaps = np.random.default_rng(0).exponential(full / len(many) / load, len(many))
    requests = requests_from_plans(many, OUTPUT, np.cumsum(gaps).tolist())
    arms = {
        f"{name}, {cache.__name__}": (batcher, cache(CAPACITY))
        for name, batcher in batchers().items()
        for cache in (LRUCache, BeladyCache)
    }
    return {
        name: simulate_serving(requests, batcher, cache, costs).summary()
        | {"prefetch_saves": 1
           - simulate_serving(requests, batcher, cache, costs).latency.mean()
           / simulate_serving(requests, batcher, cache, costs, prefetch=False).latency.mean()}
        for name, (batcher, cache) in arms.items()
    }  # fmt: skip


def served(model: Any, rows: torch.Tensor, folder: str, rounds: int) -> dict[str, Any]:
    """Let policies take turns at serving the same prompts with experts on disk."""
    prompts = rows[:, :PROMPT].tolist()
    experts = OffloadedExperts(model, folder, lambda: LRUCache(CAPACITY), cold=True)
    arms = {
        "expert-aware, BeladyCache": (lambda: ExpertBatcher(BUDGET, max_wait=32), BeladyCache),
        "expert-aware, LRUCache": (lambda: ExpertBatcher(BUDGET, max_wait=32), LRUCache),
        "arrival, LRUCache": (lambda: ArrivalBatcher(BUDGET), LRUCache),
        "arrival, RandomCache": (lambda: ArrivalBatcher(BUDGET), RandomCache),
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    outputs = {}
    for _ in range(rounds):
        for name, (batcher, cache) in arms.items():
            experts.replace_cache(lambda cache=cache: cache(CAPACITY))
            report = ServingEngine(model, batcher(), experts=experts).run(prompts, OUTPUT)
            outputs[name] = report.outputs
            reads = {
                "reads": experts.misses,
                "read_ms": 1e3 * statistics.median(experts.read_seconds),
            }
            seen[name].append(report.summary() | reads)
    first = next(iter(outputs.values()))
    return {
        "same_outputs": all(other == first for other in outputs.values()),
        "arms": {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in seen.items()
        },
    }


def scheduling_seconds(plans: list[np.ndarray], n: int) -> float:
    """Return the seconds per token of putting n waiting requests into batches."""
    batcher = ExpertBatcher(BUDGET)
    for number in range(n):
        batcher.add(number, plans[number % len(plans)])
    total = batcher.n_pending
    start = time.perf_counter()
    while batcher.next_batch() is not None:
        pass
    return (time.perf_counter() - start) / total


def measure(layers: int, router_steps: int, n_requests: int, rounds: int) -> dict[str, Any]:
    """Run everything and return the figures."""
    model, rows, losses = refactor(layers, router_steps, n_requests)
    plan = model.route(rows)
    plans = [plan.of(i) for i in range(len(rows))]
    domain = np.arange(len(rows)) % 4
    agreement = np.mean([np.mean(ids == d) for ids, d in zip(plans, domain, strict=True)])
    trace = interleaved(plans)
    with tempfile.TemporaryDirectory() as folder:
        store = ExpertStore.write(model, folder)
        store.cold = True
        costs = measure_costs(model, store)
        real = served(model, rows[: min(len(rows), 12)], folder, rounds)
    per_token = {n: scheduling_seconds(plans, n) for n in (40, 400)}
    arms = real["arms"]
    return {
        "benchmark": "read_me",
        "layers": layers,
        "experts": len(model.domains),
        "requests": len(rows),
        "threads": torch.get_num_threads(),
        "router_loss": [losses[0], losses[-1]],
        "agreement_with_domain": float(agreement),
        "repeat_share": plan.repeat_share(),
        "tokens_per_expert": plan.counts().tolist(),
        "costs": vars(costs),
        "hit_rates": compare_caches(trace, [1, 2, 3]),
        "simulated": {str(load): simulated(plans, costs, load, 8) for load in (0.7, 1.0, 1.5)},
        "real": real,
        "ratio": arms["arrival, LRUCache"]["mean_latency"]
        / arms["expert-aware, BeladyCache"]["mean_latency"],
        "ratio_p95": arms["arrival, LRUCache"]["p95_latency"]
        / arms["expert-aware, BeladyCache"]["p95_latency"],
        "ratio_throughput": arms["arrival, LRUCache"]["tokens_per_second"]
        / arms["expert-aware, BeladyCache"]["tokens_per_second"],
        "scheduling_us_per_token": {str(n): 1e6 * s for n, s in per_token.items()},
        "scheduling_growth": per_token[400] / per_token[40],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="of SmolLM2's 30")
    parser.add_argument("--router-steps", type=int, default=60)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.layers, arguments.router_steps, arguments.requests, arguments.rounds)
    if arguments.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    print(
        f"read_me: batches by arrival with an LRU cache take {result['ratio']:.2f} times the mean "
        f"and {result['ratio_p95']:.2f} times the p95 latency of expert-aware batches with "
        f"Belady's cache, at {result['ratio_throughput']:.2f} times their throughput; "
        f"outputs {'equal' if result['real']['same_outputs'] else 'DIFFER'}\n"
        f"  router: {result['agreement_with_domain']:.0%} of tokens to their text's domain, "
        f"{result['repeat_share']:.0%} to the expert of the token before"
    )
    rates = result["hit_rates"]
    for capacity in rates["lru"]:
        cells = ", ".join(f"{name} {rate[capacity]:.1%}" for name, rate in rates.items())
        print(f"  hit rate, {capacity} of {result['experts']} experts: {cells}")
    arms = [("real", result["real"]["arms"])]
    arms += [(f"load {load}", found) for load, found in result["simulated"].items()]
    for title, found in arms:
        for name, figures in found.items():
            print(
                f"  {title:9} {name:26} mean {figures['mean_latency']:6.2f} s, "
                f"p95 {figures['p95_latency']:6.2f} s, {figures['tokens_per_second']:5.0f} "
                f"tokens/s, {figures['experts_per_batch']:.2f} experts per batch, hit rate "
                f"{figures['hit_rate']:.0%}"
            )
    small, large = result["scheduling_us_per_token"].values()
    print(
        f"  scheduling: {small:.1f} µs per token with 40 requests waiting, {large:.1f} with 400 "
        f"(x{result['scheduling_growth']:.1f})"
    )


if __name__ == "__main__":
    main()
