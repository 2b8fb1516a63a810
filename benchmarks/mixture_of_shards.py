"""Compare mixture-of-shards adapters with PEFT's LoRA of the same working rank.

Both adapt the same decoder, shaped like SmolLM2-135M with random weights and a small vocabulary,
and take turns at training steps on the same tokens, so that a machine which slows down slows down
both. The ratio is the median over the rounds. Depth is what could make sharing expensive, since the
gradient of a pool, which grows with the number of blocks, is added up once per block: the same is
measured with a tenth of the blocks.

    python benchmarks/mixture_of_shards.py                # 30 blocks, 9 rounds: about 2 minutes
    python benchmarks/mixture_of_shards.py --blocks 10 --rounds 3 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bakeoff.experts.mixture_of_shards import MoSConfig

RANK, BUDGET, VOCABULARY = 8, 2, 1024


def decoder(blocks: int) -> LlamaForCausalLM:
    """Return a decoder shaped like SmolLM2-135M (but for depth and vocabulary)."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(shape)


def adapters(blocks: int) -> dict[str, PeftModel]:
    """Return both sides: MoS, and a LoRA of the same working rank."""
    rank = min(RANK, blocks + 1)  # what a budget of two with one private rank allows
    mos = MoSConfig(r=rank, equivalent_rank=BUDGET)
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    return {
        "mos": get_peft_model(decoder(blocks), mos),
        "lora": get_peft_model(decoder(blocks), lora),
    }


def step_seconds(models: dict[str, PeftModel], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Let the models take turns at whole training steps: forward, backward, AdamW."""
    batch = torch.arange(tokens).view(1, -1) * 7 % VOCABULARY
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn:  # the first step allocates
                seconds[name].append(time.perf_counter() - start)
    return seconds


def added_seconds(blocks: int, tokens: int, rounds: int) -> float:
    """Return the time that MoS adds to a LoRA step; differences of pairs, then the median."""
    seconds = step_seconds(adapters(blocks), tokens, rounds)
    return statistics.median(a - b for a, b in zip(seconds["mos"], seconds["lora"], strict=True))


def footprint(model: PeftModel) -> dict[str, int]:
    """Count trained parameters, the bytes that training them takes, and the saved file's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {
        "trained": sum(p.numel() for p in trained),
        "training_bytes": sum(4 * p.numel() * p.element_size() for p in trained),  # AdamW
        "file_bytes": saved,
    }


def merge_seconds(model: PeftModel) -> float:
    start = time.perf_counter()
    model.merge_and_unload()
    return time.perf_counter() - start


def measure(blocks: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    warnings.simplefilter("ignore", FutureWarning)
    models = adapters(blocks)
    sizes = {name: footprint(model) for name, model in models.items()}
    seconds = step_seconds(models, tokens, rounds)
    ratios = [a / b for a, b in zip(seconds["mos"], seconds["lora"], strict=True)]
    merging = {name: merge_seconds(model) for name, model in models.items()}
    added = statistics.median(a - b for a, b in zip(seconds["mos"], seconds["lora"], strict=True))
    shallow = max(blocks // 10, 1)
    return {
        "benchmark": "mixture_of_shards",
        "blocks": blocks,
        "tokens": tokens,
        "rank": RANK,
        "budget": BUDGET,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "sizes": sizes,
        "parameter_ratio": sizes["lora"]["trained"] / sizes["mos"]["trained"],
        "file_ratio": sizes["lora"]["file_bytes"] / sizes["mos"]["file_bytes"],
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "added_seconds": added,
        "shallow_blocks": shallow,
        "shallow_added_seconds": added_seconds(shallow, tokens, rounds),
        "merge_seconds": merging,
        "merge_ratio": merging["mos"] / merging["lora"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128, help="per training step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.blocks, arguments.tokens, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    low, high = result["ratio_range"]
    ours, theirs = result["sizes"]["mos"], result["sizes"]["lora"]
    print(
        f"mixture of shards, against PEFT's LoRA of the same working rank {RANK} "
        f"({result['blocks']} blocks, {result['threads']} threads):\n"
        f"  trained parameters: {ours['trained']:,} against {theirs['trained']:,}, "
        f"{result['parameter_ratio']:.1f} times fewer\n"
        f"  weights, gradients and AdamW's state: {ours['training_bytes'] / 2**20:.1f} MiB against "
        f"{theirs['training_bytes'] / 2**20:.1f} MiB (and, until its backward pass is done, a step "
        f"holds {theirs['training_bytes'] / 2**22:.1f} MiB of matrices cut from the pools)\n"
        f"  saved file: {ours['file_bytes'] / 2**20:.2f} MiB against "
        f"{theirs['file_bytes'] / 2**20:.2f} MiB, {result['file_ratio']:.1f} times smaller\n"
        f"  training step of {result['tokens']} tokens: {result['ratio']:.2f} times LoRA's time "
        f"({low:.2f} to {high:.2f} over {arguments.rounds} rounds)\n"
        f"  time added to LoRA's step: {1e3 * result['shallow_added_seconds']:.0f} ms with "
        f"{result['shallow_blocks']} blocks, {1e3 * result['added_seconds']:.0f} ms with "
        f"{result['blocks']}\n"
        f"  merging: {result['merge_seconds']['mos']:.2f} s, "
        f"{result['merge_ratio']:.2f} times LoRA's time"
    )


if __name__ == "__main__":
    main()
