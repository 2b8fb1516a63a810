"""What the global balance loss costs: its share of a training step, and against transformers' own.

A small Mixtral trains on random tokens. The loss alone, value and gradient from the router logits
of all layers, is timed beside the whole step, in turns; the rival is transformers'
`load_balancing_loss_func` on the same logits. The exchange of counts is timed between two
processes on this machine. Growth: the loss again on ten times the tokens.

    python benchmarks/global_balance.py                 # about two minutes
    python benchmarks/global_balance.py --rounds 3 --tokens 512 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LAYERS, TOP_K = 4, 2


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _exchange(rank: int, path: str, experts: int, pipe: Connection) -> None:
    """Time how much longer a loss takes when two processes share counts."""
    import torch
    import torch.distributed as dist

    from bakeoff.experts.global_balance import LoadBalancingLoss

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    logits = [torch.randn(16, experts) for _ in range(LAYERS)]
    medians = []
    for scope in ("global", "micro"):
        loss = LoadBalancingLoss(experts, TOP_K, scope=scope)
        times = []
        for _ in range(60):
            loss.reset()
            dist.barrier()
            times.append(_seconds(lambda: loss(logits), 1))  # noqa: B023
        medians.append(statistics.median(times[10:]))
    pipe.send(medians[0] - medians[1])
    dist.destroy_process_group()


def exchange_seconds(experts: int) -> float:
    """Return the seconds of one exchange of all layers' counts between two processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        near, far = context.Pipe()
        arguments = [(r, f"{folder}/meet", experts, far) for r in range(2)]
        running = [context.Process(target=_exchange, args=each, daemon=True) for each in arguments]
        for process in running:
            process.start()
        found = [near.recv() for _ in running] if near.poll(90) else []
        for process in running:
            process.join(10)
    if not found:
        raise RuntimeError("the two processes did not answer within 90 seconds")
    return max(found)


def measure(tokens: int, hidden: int, experts: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from bakeoff.experts.global_balance import LoadBalancingLoss

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
    )
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(4096, (max(1, tokens // 256), min(tokens, 256)))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def given(n: int) -> list[torch.Tensor]:
        return [torch.randn(n, experts, requires_grad=True) for _ in range(LAYERS)]

    loss = LoadBalancingLoss(experts, TOP_K)

    def ours(logits: list[torch.Tensor]) -> None:
        loss.reset()
        torch.autograd.grad(loss(logits), logits)

    def theirs(logits: list[torch.Tensor]) -> None:
        torch.autograd.grad(load_balancing_loss_func(tuple(logits), experts, TOP_K), logits)

    few, many = given(ids.numel()), given(10 * ids.numel())
    step()
    times: dict[str, list[float]] = {"step": [], "ours": [], "theirs": [], "ours_times_10": []}
    for run in (ours, theirs):
        run(few)
    for _ in range(rounds):
        times["ours"].append(_seconds(lambda: ours(few), 10))
        times["theirs"].append(_seconds(lambda: theirs(few), 10))
        times["ours_times_10"].append(_seconds(lambda: ours(many), 2))
        times["step"].append(_seconds(step, 1))
    median = {name: statistics.median(values) for name, values in times.items()}
    exchange = exchange_seconds(experts)
    return {
        "benchmark": "global_balance",
        "tokens": ids.numel(),
        "hidden": hidden,
        "experts": experts,
        "layers": LAYERS,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seconds": median,
        "exchange_seconds": exchange,
        "share_of_step": median["ours"] / median["step"],
        "share_of_step_with_exchange": (median["ours"] + exchange) / median["step"],
        "ratio": statistics.median(
            b / a for a, b in zip(times["ours"], times["theirs"], strict=True)
        ),
        "growth_tokens_times_10": median["ours_times_10"] / median["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.tokens, arguments.hidden, arguments.experts, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"global_balance: {result['share_of_step']:.2%} of a training step, "
        f"{result['share_of_step_with_exchange']:.2%} with the exchange of counts between two "
        f"processes ({1e3 * result['exchange_seconds']:.2f} ms)\n"
        f"  {result['ratio']:.2f} times as fast as transformers' load_balancing_loss_func on the "
        f"same logits, value and gradient\n"
        f"  ten times the tokens take {result['growth_tokens_times_10']:.1f} times as long\n"
        f"  ({result['tokens']} tokens, {result['experts']} experts, {result['layers']} layers, "
        f"hidden {result['hidden']}, {result['threads']} threads; step "
        f"{result['seconds']['step']:.2f} s)"
    )


if __name__ == "__main__":
    main()
