"""Time, memory and pass-key retrieval of InfLLM on long texts, against full attention.

Three questions, each answered in fresh processes that take turns:

cost       How do time and heap memory of reading n tokens grow with n? InfLLM keeps its blocks on
           disk; the rival is the same model with full attention (scaled_dot_product_attention and
           transformers' DynamicCache), reading the same text in pieces of the same size, up to
           --full-limit tokens. The model is SmolLM2 cut down to --layers layers: cost is per layer,
           and 131,072 tokens through all 30 take an hour on two cores.
decoding   How long does one more token take after n tokens?
pass key   Is a number that was hidden in a long text found, at every depth? With all layers of
           SmolLM2, the plain window (no look-up: what StreamingLLM keeps) and, where the text is
           short enough for it, the unpatched model as rivals.

    python benchmarks/infllm.py            # about an hour on two cores
    python benchmarks/infllm.py --quick    # minutes, and small numbers
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bakeoff.decoding.infllm import patch
from bakeoff.models import load_language_model

MODEL = "smollm2-135m"
WINDOW = {"n_init": 64, "n_local": 1024, "block_size": 64, "topk": 16, "exec_chunk": 256}
QUICK_WINDOW = {"n_init": 16, "n_local": 256, "block_size": 32, "topk": 8, "exec_chunk": 64}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
QUESTION = "What is the pass key? The pass key is"


def _heap() -> int:
    """Return the bytes of anonymous memory in use: what files are mapped does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads RssAnon from /proc/self/status, which is not there")


@contextmanager
def _peak() -> Iterator[dict[str, int]]:
    """Watch the heap; afterwards, ``peak`` is what it grew by at most."""
    found, stop, before = {"peak": 0}, threading.Event(), _heap()

    def watch() -> None:
        while not stop.wait(0.02):
            found["peak"] = max(found["peak"], _heap() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found["peak"] = max(found["peak"], _heap() - before)


def _text_ids(tokenizer: Any, n_tokens: int) -> list[int]:
    """Return tokens of the standard library's sources."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8", errors="replace")).input_ids
        if len(ids) >= n_tokens:
            break
    return (ids * (1 + n_tokens // len(ids)))[:n_tokens]


def _cost(side: str, n_tokens: int, layers: int, window: dict[str, int], decode: int) -> dict:
    """Read a text and generate `decode` tokens, in this process."""
    import torch

    language_model = load_language_model(MODEL)
    model = language_model.model
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    ids = torch.tensor([_text_ids(language_model.tokenizer, n_tokens)])
    piece = window["exec_chunk"] * 4
    result: dict[str, Any] = {"side": side, "tokens": n_tokens}

    def continued(cache: Any) -> float:
        times, token = [], ids[:, -1:]
        for _ in range(decode):
            start = time.perf_counter()
            output = model(token, past_key_values=cache, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1)[:, None]
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with torch.no_grad():
        model.model(ids[:, :64], use_cache=False)  # thread pools and lazy imports
        if side == "infllm":
            with (
                tempfile.TemporaryDirectory() as folder,
                patch(
                    model, **window, offload="disk", offload_folder=folder, prefill_chunk=piece
                ) as patched,
            ):
                with _peak() as memory:
                    start = time.perf_counter()
                    cache = patched.read(ids)
                    result["seconds"] = time.perf_counter() - start
                    result["seconds_per_new_token"] = continued(cache)
                stats = cache.stats()
            result |= {
                "offloaded_bytes": stats["offloaded_bytes"],
                "resident_bytes": stats["resident_bytes"],
                "hit_rate": stats["hits"] / max(1, stats["hits"] + stats["misses"]),
            }
        else:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
            with _peak() as memory:
                start = time.perf_counter()
                for part in ids.split(piece, 1):
                    model.model(input_ids=part, past_key_values=cache, use_cache=True)
                result["seconds"] = time.perf_counter() - start
                result["seconds_per_new_token"] = continued(cache)
    result["peak_heap_bytes"] = memory["peak"]
    return result


def _passkeys(
    n_tokens: int, depths: Sequence[float], n_keys: int, window: dict[str, int]
) -> list[dict]:
    """Hide numbers in a text of `n_tokens` and ask for them, with each way of reading."""
    import torch

    language_model = load_language_model(MODEL)
    model, tokenizer = language_model.model, language_model.tokenizer

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    filler, question = encode(FILLER), encode(QUESTION)
    options = {"max_new_tokens": 6, "do_sample": False}
    rows = []
    for depth in depths:
        for number in range(n_keys):
            key = str(random.Random(f"{n_tokens} {depth} {number}").randint(10_000, 99_999))
            needle = encode(f"The pass key is {key}. Remember it. {key} is the pass key. ")
            total = max(1, (n_tokens - len(needle)) // len(filler))
            before = round(depth * total)
            ids = torch.tensor([filler * before + needle + filler * (total - before) + question])
            answers = {}
            # The window without look-up is as long as window and look-up together.
            wide = window["n_local"] + window["topk"] * window["block_size"]
            for name, sizes in (
                ("infllm", window),
                ("window", {**window, "topk": 0, "n_local": wide}),
            ):
                with patch(model, **sizes) as patched:
                    answers[name] = patched.generate(ids, **options)[0]
            if ids.shape[1] + 6 <= language_model.max_length:
                mask = torch.ones_like(ids)
                generated = model.generate(ids, attention_mask=mask, **options)
                answers["full attention"] = generated[0, ids.shape[1] :]
            found = {name: key in tokenizer.decode(answer) for name, answer in answers.items()}
            rows.append({"tokens": ids.shape[1], "depth": depth, "found": found})
    return rows


def _growth(points: Sequence[tuple[float, float]]) -> float:
    """Return the factor for ten times as many tokens: least squares on a log-log scale."""
    if len(points) < 2:
        return math.nan
    slope, _ = statistics.linear_regression(
        [math.log(x) for x, _ in points], [math.log(max(y, 1e-9)) for _, y in points]
    )
    return 10**slope


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures."""
    import torch

    window = QUICK_WINDOW if arguments.quick else WINDOW
    context = multiprocessing.get_context("spawn")
    rows: list[dict] = []
    for n_tokens in arguments.tokens:
        for side in ("infllm", "full"):
            if side == "full" and n_tokens > arguments.full_limit:
                continue
            with context.Pool(1) as pool:  # a process each: nobody inherits another one's heap
                job = (side, n_tokens, arguments.layers, window, arguments.decode)
                rows.append(pool.apply(_cost, job))
    passkeys = []
    for n_tokens in arguments.passkey_tokens:
        with context.Pool(1) as pool:
            job = (n_tokens, arguments.depths, arguments.keys, window)
            passkeys += pool.apply(_passkeys, job)
    ours = {row["tokens"]: row for row in rows if row["side"] == "infllm"}
    full = {row["tokens"]: row for row in rows if row["side"] == "full"}
    both = sorted(ours.keys() & full.keys())
    largest = both[-1] if both else None
    # Memory grows until the window is full, whatever the method; look at what comes after.
    beyond = [n for n in ours if n >= 2 * (window["n_local"] + window["exec_chunk"])]
    return {
        "benchmark": "infllm",
        "model": MODEL,
        "layers": arguments.layers,
        "window": window,
        "threads": torch.get_num_threads(),
        "cost": rows,
        "passkeys": passkeys,
        "compared_at": largest,
        "speed_ratio": largest and full[largest]["seconds"] / ours[largest]["seconds"],
        "decoding_ratio": largest
        and full[largest]["seconds_per_new_token"] / ours[largest]["seconds_per_new_token"],
        "memory_ratio": largest
        and full[largest]["peak_heap_bytes"] / ours[largest]["peak_heap_bytes"],
        "growth": {
            "infllm seconds": _growth([(n, ours[n]["seconds"]) for n in beyond]),
            "infllm heap": _growth([(n, ours[n]["peak_heap_bytes"]) for n in beyond]),
            "infllm seconds per new token": _growth(
                [(n, ours[n]["seconds_per_new_token"]) for n in beyond]
            ),
            "full seconds": _growth([(n, full[n]["seconds"]) for n in both]),
            "full heap": _growth([(n, full[n]["peak_heap_bytes"]) for n in both]),
        },
    }


def _report(result: dict[str, Any]) -> None:
    print(
        f"SmolLM2-135M cut down to {result['layers']} layers, {result['threads']} threads, window "
        f"{result['window']}"
    )
    print("   tokens  side     seconds  tokens/s  ms/new token  peak heap MB  on disk MB")
    for row in result["cost"]:
        print(
            f"  {row['tokens']:7,}  {row['side']:7}  {row['seconds']:7.1f}  "
            f"{row['tokens'] / row['seconds']:8.0f}  {1e3 * row['seconds_per_new_token']:12.1f}  "
            f"{row['peak_heap_bytes'] / 1e6:12.0f}  {row.get('offloaded_bytes', 0) / 1e6:10.0f}"
        )
    if result["compared_at"]:
        print(
            f"at {result['compared_at']:,} tokens, against full attention: reading "
            f"{result['speed_ratio']:.2f} times as fast, a new token "
            f"{result['decoding_ratio']:.2f} times, {result['memory_ratio']:.2f} times less heap"
        )
    print("ten times as many tokens take, times as much:")
    for name, factor in result["growth"].items():
        print(f"  {name:30} {factor:6.2f}")
    cells: dict[tuple[int, float], list[dict]] = {}
    for row in result["passkeys"]:
        cells.setdefault((row["tokens"] // 100 * 100, row["depth"]), []).append(row["found"])
    if cells:
        print("pass key found, all 30 layers (tokens, depth: share by way of reading)")
    for (n_tokens, depth), found in sorted(cells.items()):
        names = found[0]
        shares = (f"{name} {sum(f[name] for f in found)}/{len(found)}" for name in names)
        print(f"  {n_tokens:7,}  {depth:.0%}: {', '.join(shares)}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; other options prevail")
    parser.add_argument("--tokens", type=_numbers, help="lengths to read, comma-separated")
    parser.add_argument("--full-limit", type=int, help="longest text for full attention")
    parser.add_argument("--layers", type=int, help="layers of the model in the cost part")
    parser.add_argument("--decode", type=int, help="new tokens that are timed")
    parser.add_argument("--passkey-tokens", type=_numbers, help="lengths of the pass-key texts")
    parser.add_argument("--keys", type=int, help="pass keys per length and depth")
    parser.add_argument("--depths", type=lambda t: [float(x) for x in t.split(",")])
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    usual: dict[str, Any] = {
        "tokens": [4096, 16_384, 65_536, 131_072],
        "full_limit": 16_384,
        "layers": 6,
        "decode": 32,
        "passkey_tokens": [4096, 16_384],
        "keys": 1,
        "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
    }
    quick = {
        "tokens": [1024, 4096],
        "full_limit": 4096,
        "layers": 2,
        "decode": 8,
        "passkey_tokens": [1024],
        "depths": [0.25, 0.75],
    }
    for name, value in {**usual, **(quick if arguments.quick else {})}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        _report(result)


if __name__ == "__main__":
    main()
