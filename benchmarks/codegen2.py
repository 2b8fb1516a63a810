"""Time span corruption and infilling, and train the recipe's arms on equal tokens.

Speed: rows per second of `SpanCorruption` against the same corruption by T5's own recipe (a random
noise mask of transformers' kind, turned into spans one row at a time in numpy), with rows ten times
as long; and fills per second of `infill_batch` against a loop of `infill`.

Quality, with --train: small decoders on the standard library's functions, one per arm (plain causal
language modelling, the 0.5 mixture of CodeGen2, fill-in-the-middle, prefix-LM), the same number of
tokens read; then the causal loss on functions of held-out modules, the loss of a held-out middle,
exact match, share that compiles, and share that passes its doctest, in the sandbox.

    python benchmarks/codegen2.py --quick --json
    python benchmarks/codegen2.py --train               # minutes per arm on two cores
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bakeoff.decoding.code_evaluation import (
    DOCTEST_PACKAGES,
    Sandbox,
    evaluate_infilling,
    infill_problems,
    standard_library_functions,
    training_texts,
    verified_problems,
)
from bakeoff.decoding.codegen2 import (
    FillInTheMiddle,
    InfillObjective,
    InfillTokens,
    PrefixLM,
    SpanCorruption,
    add_infill_tokens,
    pack,
    train_decoder,
)
from bakeoff.decoding.infilling import infill, infill_batch, infill_losses
from bakeoff.models.likelihood import response_losses
from bakeoff.models.small_gpt import SmallGPT

TOKENS = InfillTokens(eot=0, separator=1, end_of_mask=2, masks=tuple(range(10, 74)))


def t5_style(ids: list[int], rng: np.random.Generator) -> list[int]:
    """Corrupt one row as T5's preprocessing does: random segment lengths, vectorised."""
    n = len(ids)
    n_noise = min(max(round(n * rng.uniform(0.05, 0.95)), 1), n - 1)
    n_spans = min(max(round(n_noise / (n / 8)), 1), 64, n_noise, n - n_noise)

    def lengths(total: int) -> np.ndarray:
        starts = np.zeros(total, dtype=np.int64)
        starts[: n_spans - 1] = 1
        rng.shuffle(starts[: total - 1])
        segment = np.concatenate([[0], np.cumsum(starts[:-1])])
        return np.bincount(segment, minlength=n_spans)

    noise, kept = lengths(n_noise), lengths(n - n_noise)
    borders = np.cumsum(np.stack([kept, noise], axis=1).reshape(-1)).tolist()
    context: list[int] = []
    targets: list[int] = []
    position = 0
    for number in range(n_spans):
        start, stop = borders[2 * number], borders[2 * number + 1]
        context += [*ids[position:start], TOKENS.masks[number]]
        targets += [TOKENS.masks[number], *ids[start:stop], 2]
        position = stop
    return [*context, *ids[position:], 0, 1, *targets]


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Return the median time of `run`."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def corruption_speed(n_rows: int, length: int, rounds: int) -> dict[str, float]:
    """Time both ways to corrupt, on rows of `length` and of ten times as much."""
    found: dict[str, float] = {}
    for scale in (1, 10):
        rng = np.random.default_rng(0)
        rows = rng.integers(100, 4000, (n_rows, length * scale)).tolist()
        objective = SpanCorruption(TOKENS, p_causal=0.0)
        ours = seconds(lambda rows=rows, o=objective: [o.apply(row) for row in rows], rounds)
        theirs = seconds(lambda rows=rows, g=rng: [t5_style(row, g) for row in rows], rounds)
        found |= {f"seconds_x{scale}": ours, f"rival_seconds_x{scale}": theirs}
    found["ratio"] = found["rival_seconds_x1"] / found["seconds_x1"]
    found["growth_x10"] = found["seconds_x10"] / found["seconds_x1"]
    return found


def base_model(texts: list[str], size: str) -> tuple[Any, Any]:
    """Return a fresh decoder of a small GPT's shape, and a tokenizer trained on the texts."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = {"quick": (2, 64, 2, 256), "laptop": (6, 192, 6, 512)}[size]
    layers, width, heads, context = shape
    gpt = SmallGPT(steps=1, vocabulary=4096, n_layers=1, width=32, n_heads=1, context=context)
    tokenizer = AutoTokenizer.from_pretrained(gpt.pretrained(texts))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    add_infill_tokens(tokenizer, model)
    return model.eval(), tokenizer


def some_texts() -> list[str]:
    """Return enough code for a tokenizer."""
    return [function.source for function in standard_library_functions(["ast", "argparse"])]


def fill_speed(n_fills: int, rounds: int, texts: list[str]) -> dict[str, float]:
    """Time batches of fills against one after the other, and ten times as many."""
    model, tokenizer = base_model(texts, "quick")
    problems = infill_problems(standard_library_functions(["heapq", "fractions"]))
    pairs = [(p.prefix, p.suffix) for p in problems][:n_fills]
    options: dict[str, Any] = {"max_new_tokens": 32, "layout": "codegen2"}

    def batched(times: int) -> list[Any]:
        return infill_batch(model, tokenizer, pairs * times, batch_size=16, **options)

    one_by_one = [infill(model, tokenizer, *pair, **options) for pair in pairs]
    same = sum(a.ids == b.ids for a, b in zip(one_by_one, batched(1), strict=True))
    ours = seconds(lambda: batched(1), rounds)
    return {
        "seconds_x1": ours,
        "rival_seconds_x1": seconds(
            lambda: [infill(model, tokenizer, *pair, **options) for pair in pairs], rounds
        ),
        "growth_x10": seconds(lambda: batched(10), 1) / ours,
        "same_fills": same / len(pairs),
    }


ARMS: dict[str, Callable[..., InfillObjective]] = {
    "causal": partial(SpanCorruption, p_causal=1.0),
    "codegen2": SpanCorruption,
    "codegen2, character cuts": partial(SpanCorruption, char_cuts=0.5),
    "codegen2, sequence level": partial(SpanCorruption, level="sequence"),
    "fill in the middle": FillInTheMiddle,
    "prefix-LM spans": partial(SpanCorruption, attention="prefix"),
    "prefix-LM": PrefixLM,
}


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train every arm on the same number of tokens; evaluate on held-out modules."""
    quick = arguments.quick
    texts = list(training_texts(max_characters=4000))
    rng = np.random.default_rng(0)
    texts = [texts[i] for i in rng.permutation(len(texts)).tolist()]
    size, length = ("quick", 128) if quick else ("laptop", 384)
    held_out = standard_library_functions(DOCTEST_PACKAGES, max_characters=1200)
    with_examples = [function for function in held_out if function.has_examples]
    limit = arguments.problems or (6 if quick else 200)
    problems = infill_problems([f for f in held_out if not f.has_examples])[:limit]
    doctested = verified_problems(infill_problems(with_examples)[:limit], n_jobs=2)
    results: dict[str, Any] = {}
    for name in arguments.arms or ARMS:
        model, tokenizer = base_model(texts, size)
        rows = pack(tokenizer, texts[:300] if quick else texts, length, on_sentinel="escape")
        objective = ARMS[name](tokenizer, max_length=length, seed=0)
        start = time.perf_counter()
        history = train_decoder(
            model,
            objective,
            rows,
            n_tokens=arguments.tokens or (20_000 if quick else 6_000_000),
            batch_size=16,
            learning_rate=1e-3,
        )
        took = time.perf_counter() - start
        layout = {"fill in the middle": "psm"}.get(name, "codegen2")
        if name in ("causal", "prefix-LM"):
            layout = "left-to-right"
        held_out_rows = pack(tokenizer, [f.source for f in held_out], length, on_sentinel="escape")
        causal = response_losses(
            model, [row[:1] for row in held_out_rows], [r[1:] for r in held_out_rows]
        )
        attention = "prefix" if name == "prefix-LM spans" else "causal"
        triples = [(p.prefix, p.middle, p.suffix) for p in (*problems, *doctested)]
        middles = infill_losses(model, tokenizer, triples, layout=layout, attention=attention)

        fill_options = {"layout": layout, "attention": attention, "max_new_tokens": 48}

        def fill(
            pairs: Any, m: Any = model, t: Any = tokenizer, options: Any = fill_options
        ) -> list[str]:
            return [f.text for f in infill_batch(m, t, pairs, **options)]

        # A model that cannot stop is helped by cutting: said beside the figure.
        report = evaluate_infilling(
            fill,
            [*problems, *doctested],
            sandbox=Sandbox(),
            cut_lines=layout == "left-to-right",
            n_jobs=2,
        )
        results[name] = {
            "layout": layout,
            "training_seconds": took,
            "tokens": history.n_tokens[-1],
            "causal_tokens": history.n_causal_tokens[-1],
            "held_out_causal_loss": float(causal.sums.sum() / causal.n_tokens.sum()),
            "held_out_middle_loss": float(middles.sums.sum() / middles.n_tokens.sum()),
            **report.summary(),
        }
        if not arguments.json:
            print(name, json.dumps(results[name]))
    return {"arms": results, "verified": len(doctested), "n_texts": len(texts)}


def sandbox_speed(rounds: int) -> dict[str, float]:
    """Time one sandboxed doctest against a bare Python process that runs the same."""
    import subprocess
    import sys

    source = "def double(x):\n    return 2 * x\n"
    with tempfile.TemporaryDirectory() as folder:
        program = f"import doctest\n{source}assert double(4) == 8"
        bare = [sys.executable, "-I", "-S", "-c", program]
        rival = seconds(lambda: subprocess.run(bare, cwd=folder, check=True), rounds)
    ours = seconds(lambda: Sandbox().run(source, examples=">>> double(4)\n8"), rounds)
    return {"seconds": ours, "bare_process_seconds": rival, "ratio": rival / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds")
    parser.add_argument("--train", action="store_true", help="train and compare the arms as well")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="all by default")
    parser.add_argument("--tokens", type=int, help="tokens that each arm reads")
    parser.add_argument("--problems", type=int, help="held-out holes, with and without doctest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    quick = arguments.quick
    result: dict[str, Any] = {
        "benchmark": "codegen2",
        "corruption": corruption_speed(50 if quick else 500, 256, arguments.rounds),
        "sandbox": sandbox_speed(arguments.rounds),
        "fills": fill_speed(4 if quick else 32, 1 if quick else arguments.rounds, some_texts()),
    }
    if arguments.train:
        result |= train(arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    corruption, fills, sandbox = result["corruption"], result["fills"], result["sandbox"]
    print(
        f"codegen2: {corruption['ratio']:.2f} times as fast as T5's recipe for corrupting rows; "
        f"{corruption['growth_x10']:.1f} times as long for rows 10 times as long\n"
        f"  fills in batches: {fills['rival_seconds_x1'] / fills['seconds_x1']:.2f} times as fast "
        f"as one by one, {fills['same_fills']:.0%} of them the same; "
        f"{fills['growth_x10']:.1f} times as long for 10 times as many\n"
        f"  sandbox: {sandbox['seconds'] * 1000:.0f} ms a doctest, a bare process "
        f"{sandbox['bare_process_seconds'] * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()
