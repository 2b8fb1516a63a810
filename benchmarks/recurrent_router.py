"""What the recurrent router adds, per token, to plain linear routers.

All layers' routers, forward and backward, on random hidden states: recurrent against linear in
turns, and against the whole training step of a small Mixtral that has one or the other. That
tokens go in parallel shows in the time per token, which falls or stays as their number grows; the
alternative to compare with is the same work token by token.

    python benchmarks/recurrent_router.py               # about two minutes
    python benchmarks/recurrent_router.py --rounds 3 --tokens 512 --json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

LAYERS, TOP_K = 4, 2


def _seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def measure(tokens: int, hidden: int, experts: int, state: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from bakeoff.experts.recurrent_router import RecurrentRouter, convert_router

    torch.manual_seed(0)
    routers = {
        "recurrent": RecurrentRouter(hidden, experts, TOP_K, LAYERS, state_size=state),
        "linear": RecurrentRouter(hidden, experts, TOP_K, LAYERS, state_size=0),
    }

    def run(name: str, layers: list[torch.Tensor]) -> None:
        carried, total = None, torch.zeros(())
        for i, x in enumerate(layers):
            logits, carried = routers[name](x, carried, i)
            total = total + logits.square().mean()
        total.backward()

    def given(n: int) -> list[torch.Tensor]:
        return [torch.randn(n, hidden, requires_grad=True) for _ in range(LAYERS)]

    few, many = given(tokens), given(10 * tokens)
    some = [[x[j : j + 1].detach() for x in few] for j in range(64)]

    def one_by_one() -> None:
        for each in some:
            run("recurrent", each)

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
    models = {"linear": MixtralForCausalLM(config).train()}
    # Both begin with random routers, so that experts get like loads.
    models["recurrent"] = convert_router(copy.deepcopy(models["linear"]), state_size=state)
    ids = torch.randint(4096, (max(1, tokens // 256), min(tokens, 256)))
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}

    def step(name: str) -> None:
        models[name](ids, labels=ids).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    for name in routers:
        run(name, few)
        step(name)
    times: dict[str, list[float]] = {
        key: [] for key in ("recurrent", "linear", "times_10", "one_by_one")
    }
    steps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name in routers:
            times[name].append(_seconds(lambda: run(name, few), 3))  # noqa: B023
            steps[name].append(_seconds(lambda: step(name)))  # noqa: B023
        times["times_10"].append(_seconds(lambda: run("recurrent", many)))
        times["one_by_one"].append(_seconds(one_by_one))
    median = {name: statistics.median(values) for name, values in times.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    added = median["recurrent"] - median["linear"]
    return {
        "benchmark": "recurrent_router",
        "tokens": tokens,
        "hidden": hidden,
        "experts": experts,
        "state_size": state,
        "layers": LAYERS,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seconds": median,
        "step_seconds": {name: statistics.median(values) for name, values in steps.items()},
        "added_microseconds_per_token_and_layer": 1e6 * added / tokens / LAYERS,
        "ratio": median["linear"] / median["recurrent"],
        "added_share_of_step": added / statistics.median(steps["linear"]),
        "added_parameters": sizes["recurrent"] / sizes["linear"] - 1,
        "growth_tokens_times_10": median["times_10"] / median["recurrent"],
        "parallel_over_one_by_one": (median["one_by_one"] / 64) / (median["recurrent"] / tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--state", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    given = parser.parse_args()
    result = measure(given.tokens, given.hidden, given.experts, given.state, given.rounds)
    if given.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"recurrent_router: {result['added_microseconds_per_token_and_layer']:.2f} microseconds "
        f"per token and layer more than a linear router, forward and backward "
        f"({result['ratio']:.2f} times its speed)\n"
        f"  that is {result['added_share_of_step']:.1%} of the training step; parameters "
        f"{result['added_parameters']:+.2%}\n"
        f"  ten times the tokens take {result['growth_tokens_times_10']:.1f} times as long; "
        f"{result['parallel_over_one_by_one']:.0f} times as fast as token by token\n"
        f"  ({result['tokens']} tokens, hidden {result['hidden']}, {result['experts']} experts, "
        f"state {result['state_size']}, {result['layers']} layers, {result['threads']} threads)"
    )


if __name__ == "__main__":
    main()
