"""Compare reading a response's attention row-wise with ``output_attentions=True``.

Both give the same vector: the mean attention of a response's tokens to every token before them,
over heads and layers, which `cam_scores` needs of every sample. transformers' way builds every
layer's square matrix; ours computes the response's rows over cached keys. Each measurement runs in
a process of its own, on a small Llama with random weights, at a context and at one ten times as
long.

    python benchmarks/gateau.py                # contexts of 400 and 4,000 tokens: a minute
    python benchmarks/gateau.py --context 100 --rounds 1 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

LAYERS, HEADS, WIDTH = 4, 4, 256


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=2**17,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def _rows(model: Any, prefix: list[int], response: list[int]) -> np.ndarray:
    from bakeoff.selection.response_attention import response_attention

    return response_attention(model, prefix, response)


def _matrices(model: Any, prefix: list[int], response: list[int]) -> np.ndarray:
    import torch

    model.set_attn_implementation("eager")
    ids = torch.tensor([prefix + response])
    with torch.inference_mode():
        # The backbone alone, as on our side: logits are not what is compared.
        attentions = model.base_model(ids, output_attentions=True, use_cache=False).attentions
    rows = [layer[0, :, len(prefix) :].mean(dim=(0, 1)) for layer in attentions]
    return torch.stack(rows).mean(dim=0).double().numpy()


def _peak() -> float:
    """Return the largest memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _side(ours: bool, n_context: int, n_response: int, rounds: int, pipe: Connection) -> None:
    run = _rows if ours else _matrices
    model = _model()
    ids = np.random.default_rng(0).integers(3, 1000, n_context + n_response).tolist()
    prefix, response = ids[:n_context], ids[n_context:]
    run(model, prefix[:32], response[:4])  # lazy imports are not what is compared
    before = _peak()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        attention = run(model, prefix, response)
        seconds.append(time.perf_counter() - start)
    pipe.send((statistics.median(seconds), _peak() - before, attention))


def _measured(ours: bool, n_context: int, n_response: int, rounds: int) -> Any:
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    arguments = (ours, n_context, n_response, rounds, far)
    process = context.Process(target=_side, args=arguments, daemon=True)
    process.start()
    found = near.recv()
    process.join()
    return found


def measure(n_context: int, n_response: int, rounds: int) -> dict[str, Any]:
    """Run the comparison and return its figures."""
    result: dict[str, Any] = {
        "benchmark": "gateau",
        "contexts": [n_context, 10 * n_context],
        "response": n_response,
        "shape": {"layers": LAYERS, "heads": HEADS, "width": WIDTH},
        "cores": os.cpu_count(),
        "seconds": {"ours": [], "theirs": []},
        "bytes": {"ours": [], "theirs": []},
        "max_difference": 0.0,
    }
    for length in result["contexts"]:
        vectors = []
        for name in ("ours", "theirs"):
            seconds, size, vector = _measured(name == "ours", length, n_response, rounds)
            result["seconds"][name].append(seconds)
            result["bytes"][name].append(size)
            vectors.append(vector)
        difference = float(np.abs(vectors[0] - vectors[1]).max())
        result["max_difference"] = max(result["max_difference"], difference)
    for what in ("seconds", "bytes"):
        ours, theirs = result[what]["ours"], result[what]["theirs"]
        result[f"{what}_ratio"] = [b / max(a, 1e-9) for a, b in zip(ours, theirs, strict=True)]
        result[f"{what}_growth"] = {
            name: values[1] / max(values[0], 1e-9) for name, values in result[what].items()
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=400, help="tokens; also ten times as many")
    parser.add_argument("--response", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.context, arguments.response, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    short, long = result["contexts"]
    print(
        f"gateau: at {long} context tokens {result['seconds_ratio'][1]:.1f} times as fast as "
        f"output_attentions=True, with 1/{result['bytes_ratio'][1]:.0f} of the extra memory\n"
        f"  seconds: {result['seconds']['ours'][1]:.3f} against "
        f"{result['seconds']['theirs'][1]:.3f}; extra memory: "
        f"{result['bytes']['ours'][1] / 1e6:.0f} MB against "
        f"{result['bytes']['theirs'][1] / 1e6:.0f} MB\n"
        f"  from {short} to {long} tokens: time times {result['seconds_growth']['ours']:.1f} "
        f"against {result['seconds_growth']['theirs']:.1f}\n"
        f"  largest difference between the vectors: {result['max_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
