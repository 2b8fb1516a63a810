"""Compare the speed of `MoE` with transformers' Mixtral block, forward and backward.

Both layers have the same weights, get the same tokens, and do the same arithmetic; they take
turns in one process. The peer is measured with its default implementation of the experts
("grouped_mm") and, with --eager, with its loop. The ratio is the median over the rounds, each side
in the same round. Gradients are set to None before each step, as optimizers do by default. On a
busy machine use one thread: threads that wait for each other measure the neighbours.

    python benchmarks/mixture_of_experts.py                       # 8 and 64 experts
    python benchmarks/mixture_of_experts.py --experts 8 --rounds 1 --tokens 512 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bakeoff.experts.mixture_of_experts import MoE
from bakeoff.experts.routers import TopK


def peer(hidden: int, width: int, experts: int, k: int, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def ours(block: Any, hidden: int, width: int, experts: int, k: int) -> MoE:
    moe = MoE(hidden, experts, TopK(k=k), width=width, aux=())
    # The same memory: a step of one side finds the other's gradients gone.
    moe.router.weight = block.gate.weight  # type: ignore[union-attr]
    moe.experts.w_in = block.experts.gate_up_proj
    moe.experts.w_out = block.experts.down_proj
    return moe


def step(layer: nn.Module, tokens: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Return the seconds of one forward and one backward pass."""
    for parameter in layer.parameters():
        parameter.grad = None
    tokens.grad = None
    start = time.perf_counter()
    out = layer(tokens)
    middle = time.perf_counter()
    out.backward(gradient)
    return middle - start, time.perf_counter() - middle


def best(run: Callable[[], Any], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def dense_rate(n_rows: int, hidden: int, width: int) -> float:
    """Return operations per second of the same products in a dense layer of the same work.

    Forward, gradient of the input and gradient of the weight, into memory that is there.
    """
    x, w, y = torch.randn(n_rows, hidden), torch.randn(width, hidden), torch.randn(n_rows, width)
    to_x, to_w = torch.empty_like(x), torch.empty_like(w)
    seconds = best(lambda: torch.mm(x, w.T, out=y))
    seconds += best(lambda: torch.mm(y, w, out=to_x))
    seconds += best(lambda: torch.mm(y.T, x, out=to_w))
    return 3 * 2 * n_rows * hidden * width / seconds


def measure(
    experts: int, tokens: int, hidden: int, width: int, k: int, rounds: int, implementation: str
) -> dict[str, Any]:
    """Run one comparison and return its figures."""
    torch.manual_seed(0)
    theirs = peer(hidden, width, experts, k, implementation)
    mine = ours(theirs, hidden, width, experts, k)
    states = torch.randn(1, tokens, hidden, requires_grad=True)
    gradient = torch.randn(1, tokens, hidden)
    difference = float((mine(states) - theirs(states)).detach().abs().max())
    sides = {"ours": mine, "theirs": theirs}
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    rates = []
    for layer in (mine, mine, theirs):
        step(layer, states, gradient)
    for _ in range(rounds):
        rates.append(dense_rate(tokens * k, hidden, width))
        for name, layer in sides.items():
            seconds[name].append(step(layer, states, gradient))
    totals = {name: [a + b for a, b in taken] for name, taken in seconds.items()}
    ratios = [b / a for a, b in zip(totals["ours"], totals["theirs"], strict=True)]
    operations = 3 * 3 * 2 * tokens * k * hidden * width
    shares = {
        name: statistics.median(
            operations / taken / rate for taken, rate in zip(all_taken, rates, strict=True)
        )
        for name, all_taken in totals.items()
    }
    return {
        "benchmark": "mixture_of_experts",
        "experts": experts,
        "tokens": tokens,
        "hidden": hidden,
        "width": width,
        "k": k,
        "peer": f"transformers Mixtral block, {implementation}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "dense_gflops": max(rates) / 1e9,
        "share_of_dense_rate": shares["ours"],
        "peer_share_of_dense_rate": shares["theirs"],
        "max_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="inner features of an expert")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="also the peer's loop over experts")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    results = []
    for experts in arguments.experts:
        for implementation in ["grouped_mm", *(["eager"] if arguments.eager else [])]:
            result = measure(
                experts,
                arguments.tokens,
                arguments.hidden,
                arguments.width,
                arguments.k,
                arguments.rounds,
                implementation,
            )
            results.append(result)
            if arguments.json:
                continue
            low, high = result["ratio_range"]
            mine = statistics.median(a + b for a, b in result["seconds"]["ours"])
            print(
                f"mixture_of_experts: {result['ratio']:.2f} times as fast as {result['peer']} at "
                f"{experts} experts ({low:.2f} to {high:.2f} over {arguments.rounds} rounds, "
                f"{result['threads']} threads)\n"
                f"  {mine:.2f} s forward and backward; {result['share_of_dense_rate']:.0%} of the "
                f"dense layer's matrix-multiply rate ({result['dense_gflops']:.0f} GFLOP/s) is "
                f"reached, {result['peer_share_of_dense_rate']:.0%} by the peer\n"
                f"  largest difference between the outputs: {result['max_difference']:.1e}",
                flush=True,
            )
    first, last = results[0], results[-1]
    if not arguments.json and last["experts"] > first["experts"]:
        totals = [statistics.median(a + b for a, b in r["seconds"]["ours"]) for r in (first, last)]
        print(
            f"growth: {last['experts'] / first['experts']:.0f} times the experts take "
            f"{totals[1] / totals[0]:.2f} times the time for the same arithmetic"
        )
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
