"""Compare a Branch-Attend-Mix mixture with Branch-Train-Mix and with the dense model it came from.

All are built on one decoder with random weights. They take turns at training steps (forward,
backward, AdamW) on the same tokens, and at generating 16 tokens after a prompt of 256, so that a
machine which slows down slows down all. Ratios are medians over the rounds. `transformers`' Mixtral
of the same shape stands beside Branch-Train-Mix, which it equals in what it computes; Branch-Train-
Mix with 6 experts, 3 per token, has as many parameters and operations as the mixture (Table 5 of
the paper). Experts run one after the other, here as elsewhere: what grows with their number is
measured with ten times the tokens, and with twice the experts.

    python benchmarks/bam.py                     # 5 rounds: about 3 minutes
    python benchmarks/bam.py --rounds 2 --tokens 128 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bakeoff.experts.bam import mixture_cost, upcycle

VOCABULARY, LENGTH, PROMPT, GENERATED = 1024, 128, 256, 16


def shape(width: int, layers: int) -> dict[str, Any]:
    """Return the settings of a decoder with the paper's proportions."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
    }


def arms(width: int, layers: int, device: str) -> dict[str, Any]:
    """Return all sides by name."""
    settings = shape(width, layers)
    torch.manual_seed(0)
    dense = [LlamaForCausalLM(LlamaConfig(**settings)) for _ in range(8)]
    mixtral = MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=1)
    made = {
        "dense": dense[0],
        "btx": upcycle(dense[:4], "btx"),
        "mixtral": MixtralForCausalLM(mixtral),
        "btx, 6 experts, top 3": upcycle(dense[:6], "btx", ffn_top_k=3),
        "bam": upcycle(dense[:4]),
        "bam, shared key and value": upcycle(dense[:4], share_kv=True),
        "bam, 8 experts": upcycle(dense),
    }
    return {name: model.to(device) for name, model in made.items()}


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(device: str, run: Callable[[], Any]) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def step_seconds(
    models: dict[str, Any], n_tokens: int, rounds: int, device: str
) -> dict[str, list[float]]:
    """Let the models take turns at whole training steps."""
    generator = torch.Generator().manual_seed(1)
    size = (max(1, n_tokens // LENGTH), min(LENGTH, n_tokens))
    tokens = torch.randint(VOCABULARY, size, generator=generator).to(device)
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()
    }

    def step(name: str) -> None:
        models[name].train()
        models[name](input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in models:
            taken = timed(device, lambda name=name: step(name))  # type: ignore[misc]
            if turn:  # the first warms up
                seconds[name].append(taken)
    return seconds


@torch.no_grad()
def generation_seconds(models: dict[str, Any], rounds: int, device: str) -> dict[str, list[float]]:
    """Let the models take turns at generating."""
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    prompt = prompt.to(device)
    options = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            model.eval()
            taken = timed(device, lambda model=model: model.generate(prompt, **options))  # type: ignore[misc]
            if turn:
                seconds[name].append(taken)
    return seconds


def activation_bytes(model: Any, n_tokens: int, device: str) -> int:
    """Return the size of what a forward pass keeps for the backward pass, weights aside."""
    size = (max(1, n_tokens // LENGTH), min(LENGTH, n_tokens))
    tokens = torch.zeros(size, dtype=torch.long, device=device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    del loss
    return sum(kept.values())


@torch.no_grad()
def cache_bytes(model: Any, device: str) -> int:
    """Return the size of the key-value cache after the prompt."""
    prompt = torch.zeros(1, PROMPT, dtype=torch.long, device=device)
    cache = model.eval()(prompt, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Return the median over rounds of one side's time over another's."""
    pairs = zip(seconds[name], seconds[reference], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def measure(width: int, layers: int, n_tokens: int, rounds: int, device: str) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    models = arms(width, layers, device)
    steps = step_seconds(models, n_tokens, rounds, device)
    more = {name: models[name] for name in ("dense", "btx", "bam")}
    longer = step_seconds(more, 10 * n_tokens, max(1, rounds // 2), device)
    generations = generation_seconds(models, rounds, device)
    result: dict[str, Any] = {
        "benchmark": "bam",
        "width": width,
        "layers": layers,
        "tokens": n_tokens,
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "arms": {},
        "growth_with_ten_times_the_tokens": {
            name: statistics.median(longer[name]) / statistics.median(steps[name]) for name in more
        },
        "bam_over_btx_with_ten_times_the_tokens": ratio(longer, "bam", "btx"),
    }
    for name, model in models.items():
        cost = None if name == "mixtral" else mixture_cost(model, (LENGTH + 1) / 2)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        result["arms"][name] = {
            "step_seconds": statistics.median(steps[name]),
            "step_over_btx": ratio(steps, name, "btx"),
            "step_over_dense": ratio(steps, name, "dense"),
            "generation_over_btx": ratio(generations, name, "btx"),
            "generation_seconds": statistics.median(generations[name]),
            "training_state_bytes": 4 * weights,  # weights, gradients, two moments
            "activation_bytes": activation_bytes(model, n_tokens, device),
            "cache_bytes": cache_bytes(model, device),
            "block_flops_per_token": None if cost is None else cost.block_flops,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="in a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    result = measure(
        arguments.width, arguments.layers, arguments.tokens, arguments.rounds, arguments.device
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    found = result["arms"]
    print(
        f"bam: a training step takes {found['bam']['step_over_btx']:.2f} times as long as "
        f"Branch-Train-Mix's, {found['bam']['step_over_dense']:.2f} times the dense model's "
        f"({result['tokens']} tokens, width {result['width']}, {result['layers']} layers, "
        f"{result['threads']} threads)\n"
        f"  with ten times the tokens {result['bam_over_btx_with_ten_times_the_tokens']:.2f} times "
        f"Branch-Train-Mix's; it grows "
        f"{result['growth_with_ten_times_the_tokens']['bam']:.1f}-fold (Branch-Train-Mix "
        f"{result['growth_with_ten_times_the_tokens']['btx']:.1f}-fold)"
    )
    mebibyte = 2**20
    print(f"  {'':26} step  generation  MFLOP/token,block  state MiB  activations  cache")
    for name, arm in found.items():
        flops = arm["block_flops_per_token"]
        print(
            f"  {name:26}{arm['step_over_btx']:5.2f}{arm['generation_over_btx']:12.2f}"
            f"{'-' if flops is None else f'{flops / 1e6:.2f}':>19}"
            f"{arm['training_state_bytes'] / mebibyte:11.1f}"
            f"{arm['activation_bytes'] / mebibyte:13.1f}{arm['cache_bytes'] / mebibyte:7.2f}"
        )


if __name__ == "__main__":
    main()
