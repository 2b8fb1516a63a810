"""Set-based prompting against permute-and-vote with 24 orders, on the same multiple-choice prompts.

Both score the same four options after the same prompts (which module of the standard library does
this line describe?) with the same model and batch size, in one process and in turns; the rival
reads every prompt in all its 24 orders. Twice: many prompts at once, and one prompt at a time,
where the rival's 24 orders share a batch and the method has only one row. Growth is the time for
ten times the prompts.

    python benchmarks/set_based_prompting.py                # smollm2-135m, 40 prompts: minutes
    python benchmarks/set_based_prompting.py --quick --json   # a small random model: seconds
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

from bakeoff.decoding.set_based_prompting import (
    OrderEnsembleModel,
    PlainOrderModel,
    SetPrompt,
    SetPromptingModel,
)
from bakeoff.models import load_language_model


def described_modules() -> list[tuple[str, str]]:
    """Return (module, first line of its docstring) for the standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.glob("*.py")):
        if path.stem.startswith("_") or path.stem not in sys.stdlib_module_names:
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            found.append((path.stem, text.splitlines()[0]))
    return found


def make_prompts(n: int) -> tuple[list[SetPrompt], list[list[str]]]:
    """Return n prompts with four options each, and the options as answers."""
    modules = described_modules()
    rng = np.random.default_rng(0)
    prompts, choices = [], []
    for number in range(n):
        _, line = modules[number % len(modules)]
        others = rng.choice(len(modules), 4, replace=False)
        options = [modules[other][0] for other in others]
        question = f"Which module of Python's standard library is described as: {line}"
        prompts.append(SetPrompt.from_options(question, options))
        choices.append([f" {option}" for option in options])
    return prompts, choices


def small_random_model() -> Any:
    """Return a random Llama behind the packaged model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_language_model("smollm2-135m").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def measure(
    model: Any, tokenizer: Any, *, n_prompts: int, rounds: int, batch_size: int
) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    import torch

    ours = SetPromptingModel(model, tokenizer, batch_size=batch_size)
    rival = OrderEnsembleModel(model, tokenizer, batch_size=batch_size)
    plain = PlainOrderModel(model, tokenizer, batch_size=batch_size)
    prompts, choices = make_prompts(n_prompts)

    processor: list[float] = []

    def seconds(sides: list[tuple[Any, list[SetPrompt], list[list[str]]]]) -> float:
        start, used = time.perf_counter(), time.process_time()
        for side, some, their in sides:
            side.score(some, their)
        processor.append(time.process_time() - used)
        return time.perf_counter() - start

    def one_by_one(side: Any) -> list[tuple[Any, list[SetPrompt], list[list[str]]]]:
        return [(side, [p], [c]) for p, c in zip(prompts[:3], choices[:3], strict=True)]

    seconds([(ours, prompts[:2], choices[:2])])  # the probe of the model, lazy imports
    times: dict[str, list[float]] = {name: [] for name in ("ours", "rival", "plain")}
    single: dict[str, list[float]] = {"ours": [], "rival": []}
    processor_ratios = []
    for _ in range(rounds):
        times["ours"].append(seconds([(ours, prompts, choices)]))
        times["rival"].append(seconds([(rival, prompts, choices)]))
        processor_ratios.append(processor[-1] / processor[-2])
        times["plain"].append(seconds([(plain, prompts, choices)]))
        single["ours"].append(seconds(one_by_one(ours)))
        single["rival"].append(seconds(one_by_one(rival)))
    many, theirs = make_prompts(10 * n_prompts)
    ten = seconds([(ours, many, theirs)]) / statistics.median(times["ours"])

    orders = prompts[0].orders()
    spread = {}
    for name, side in (("ours", ours), ("plain", plain)):
        scores = np.stack(side.score(orders, [choices[0]] * 24, canonical_order=False))
        spread[name] = float(np.abs(scores - scores[0]).max())
    ratios = [b / a for a, b in zip(times["ours"], times["rival"], strict=True)]
    singles = [b / a for a, b in zip(single["ours"], single["rival"], strict=True)]
    overhead = [a / b for a, b in zip(times["ours"], times["plain"], strict=True)]
    return {
        "benchmark": "set_based_prompting",
        "prompts": n_prompts,
        "orders": 24,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "seconds": times,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_of_processor_time": statistics.median(processor_ratios),
        "ratio_one_prompt_at_a_time": statistics.median(singles),
        "times_a_plain_prompt": statistics.median(overhead),
        "growth_with_10_times_the_prompts": ten,
        "largest_difference_between_orders": spread,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="packaged name or folder")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a small random model, 8 prompts")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        model, tokenizer = small_random_model()
        name, n_prompts, rounds = "random Llama", 8, 1
    else:
        loaded = load_language_model(arguments.model)
        model, tokenizer = loaded.model, loaded.tokenizer
        name, n_prompts, rounds = arguments.model, arguments.prompts, arguments.rounds
    result = measure(
        model,
        tokenizer,
        n_prompts=n_prompts,
        rounds=rounds,
        batch_size=arguments.batch_size,
    )
    result = {"model": name, **result}
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    low, high = result["ratio_range"]
    spread = result["largest_difference_between_orders"]
    print(
        f"set_based_prompting: {result['ratio']:.1f} times as fast as permute-and-vote with 24 "
        f"orders ({low:.1f} to {high:.1f} over {rounds} rounds, {n_prompts} prompts, {name}), "
        f"{result['ratio_of_processor_time']:.1f} times by processor time\n"
        f"  one prompt at a time: {result['ratio_one_prompt_at_a_time']:.1f} times\n"
        f"  {result['times_a_plain_prompt']:.2f} times as long as the plain prompt in one order\n"
        f"  ten times the prompts: {result['growth_with_10_times_the_prompts']:.1f} times as long\n"
        f"  largest difference of a score between orders: {spread['ours']:.1e}, plain prompt "
        f"{spread['plain']:.1e}"
    )


if __name__ == "__main__":
    main()
