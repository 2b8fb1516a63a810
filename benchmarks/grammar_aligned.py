"""Grammar-aligned sampling against the published scheme, and what exact samples cost.

Three measurements with one model, on this machine, in one run:

1. ASAp against the published implementation's scheme: every sample computed from the prompt on, one
   Python object per legal token. The rival gets the same masks and is driven along our own samples,
   so that both sides must assign the same proposal probability to every sample; they are compared.
2. The mask's time next to that of a plain decoding step.
3. Model calls per exact sample, adaptive against rejection, at acceptance rates 0.5, 0.1 and 0.01.

    python benchmarks/grammar_aligned.py               # 50 and 500 samples: half an hour
    python benchmarks/grammar_aligned.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import numpy as np

from bakeoff.decoding.grammar import Grammar, GrammarConstraint
from bakeoff.decoding.grammar_aligned import AlignedSamples, sample_aligned
from bakeoff.models import load_language_model

PROMPT = "A person as JSON, with first name, month of birth and age: "
RECORD = Grammar.regex(
    r'\{"name":"[A-Z][a-z]{2,8}","born":"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)",'
    r'"age":[1-9][0-9]?\}'
)
LIMIT = 40
LIST = "Some animals, one on each line:\ncat\nhorse\nelephant\nsparrow\nwhale\n"


class Node:
    """The published scheme's node: one object per legal token, its share of success, its parent."""

    __slots__ = ("children", "parent", "probability", "success")

    def __init__(self, parent: Node | None, probability: float) -> None:
        self.parent, self.probability = parent, probability
        self.children: dict[int, Node] = {}
        self.success = 1.0

    def expand(self, ids: list[int], probabilities: list[float]) -> None:
        """Add the legal tokens as children and pass their shares up to the root."""
        for token, probability in zip(ids, probabilities, strict=True):
            if token not in self.children:
                self.children[token] = Node(self, probability)
        node: Node | None = self
        while node is not None:  # once per step; the published code does it once per child
            node.success = sum(c.probability * c.success for c in node.children.values())
            node = node.parent


def published(
    model: Any, constraint: Any, prompt: list[int], samples: Any, root: Node
) -> list[float]:
    """Draw by the published scheme, given what is drawn; return the log-proposals."""
    import torch
    from transformers import DynamicCache

    ends = constraint.eos_token_ids
    found = []
    for sample in samples:
        cache, node, state, log_q = DynamicCache(), root, constraint.start(), 0.0
        given = prompt
        for place, token in enumerate(sample):
            with torch.inference_mode():
                output = model(
                    input_ids=torch.tensor([given]), past_key_values=cache, logits_to_keep=1
                )
            p = torch.softmax(output.logits[0, -1].double(), -1).numpy()
            legal = constraint.legal(state).copy()
            if place == LIMIT - 1:
                legal[:] = False
            legal[ends] = constraint.may_end(state)
            ids = np.flatnonzero(legal).tolist()
            node.expand(ids, p[ids].tolist())
            mass = np.array([node.children[i].probability * node.children[i].success for i in ids])
            # The draw, of which the outcome is replaced.
            np.random.default_rng(0).choice(len(ids), p=mass / mass.sum())
            chosen = node.children[token]
            log_q += math.log(chosen.probability * chosen.success / mass.sum())
            node = chosen
            if token not in ends:
                state = constraint.advance(state, token)
            given = [token]
        found.append(log_q)
    return found


def scheme(lm: Any, n: int) -> dict[str, Any]:
    """Time n samples of ours and of the published scheme."""
    constraint = GrammarConstraint(RECORD, lm.tokenizer, vocab_size=lm.model.config.vocab_size)
    begin = time.perf_counter()
    ours: AlignedSamples = sample_aligned(
        lm, None, PROMPT, constraint, n, max_new_tokens=LIMIT, random_state=0
    )
    seconds = time.perf_counter() - begin
    n_tokens = sum(map(len, ours.tokens))
    prompt = lm.tokenizer(PROMPT)["input_ids"]
    begin = time.perf_counter()
    theirs = published(lm.model, constraint, prompt, ours.tokens, Node(None, 1.0))
    rival = time.perf_counter() - begin
    # Where no attempt failed both saw the same history; failures are ours alone to account for.
    same = ours.n_attempts == n
    return {
        "samples": n,
        "attempts": ours.n_attempts,
        "tokens": n_tokens,
        "distinct": len(set(ours.tokens)),
        "seconds": seconds,
        "rival_seconds": rival,
        "ratio": rival / seconds,
        "model_calls": ours.n_model_calls,
        "rival_model_calls": n_tokens,
        "largest_difference_of_log_proposals": (
            float(np.abs(np.array(theirs) - ours.log_proposals).max()) if same else None
        ),
        "z_bounds": ours.z_bounds,
    }


def mask_overhead(lm: Any, n: int) -> dict[str, float]:
    """Time the mask at every step of some texts, and plain decoding steps of the same length."""
    import torch
    from transformers import DynamicCache

    constraint = GrammarConstraint(RECORD, lm.tokenizer, vocab_size=lm.model.config.vocab_size)
    text = '{"name":"Alexandra","born":"Oct","age":34}'
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    masks, steps = [], []
    for _ in range(n):
        cache, state = DynamicCache(), constraint.start()
        given = lm.tokenizer(PROMPT)["input_ids"]
        for token in ids:
            begin = time.perf_counter()
            with torch.inference_mode():
                output = lm.model(input_ids=torch.tensor([given]), past_key_values=cache)
                torch.multinomial(torch.softmax(output.logits[0, -1], -1), 1).item()
            middle = time.perf_counter()
            np.flatnonzero(constraint.legal(state))
            state = constraint.advance(state, token)
            end = time.perf_counter()
            if len(given) == 1:
                steps.append(middle - begin)
                masks.append(end - middle)
            given = [token]
    mask, step = statistics.median(masks), statistics.median(steps)
    return {"mask_seconds": mask, "step_seconds": step, "share": mask / step}


def exact_samples(lm: Any, n: int, n_plain: int) -> list[dict[str, Any]]:
    """Count model calls per exact sample for languages of chosen probability.

    The texts are lines of a list; a language is the lines of lower-case letters that begin with one
    of some letters, chosen so that the plain model's lines are in it as often as wanted.
    """
    newline = lm.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": newline}
    plain = sample_aligned(
        lm, None, LIST, Grammar.regex(r"[^\n]*"), n_plain, method="rejection", **settings
    )
    length = float(np.mean([len(sample) for sample in plain.tokens]))
    share: dict[str, float] = {}
    for text in plain.texts:
        if text.isascii() and text.isalpha() and text.islower():
            share[text[0]] = share.get(text[0], 0.0) + 1 / plain.n_attempts
    rows = []
    for rate in (0.5, 0.1, 0.01):
        letters, total = "", 0.0
        for letter in sorted(share, key=share.__getitem__, reverse=True):
            if total + share[letter] <= rate * 1.1:
                letters, total = letters + letter, total + share[letter]
        if not letters:
            letters = min(share, key=share.__getitem__)
        grammar = Grammar.regex(f"[{letters}][a-z]*")
        settings["max_failures"] = 100_000
        exact = sample_aligned(lm, None, LIST, grammar, n, method="adaptive", **settings)
        hand = sample_aligned(lm, None, LIST, grammar, n, method="rejection", **settings)
        accepted = n / hand.n_attempts
        rows.append(
            {
                "wanted_rate": rate,
                "acceptance_rate": accepted,
                "adaptive_acceptance_rate": n / exact.n_attempts,
                "adaptive_calls_per_sample": exact.n_model_calls / n,
                "rejection_on_our_trie_calls_per_sample": hand.n_model_calls / n,
                # Whole texts from the prompt on, as a loop over `generate` draws them.
                "rejection_calls_per_sample": length / accepted,
                "ratio": length / accepted / (exact.n_model_calls / n),
            }
        )
    return rows


def measure(model: str, n: int, *, quick: bool) -> dict[str, Any]:
    """Run all three and return their figures."""
    import torch

    lm = load_language_model(model)
    sizes = [n // 10, n] if n >= 10 else [n]
    return {
        "benchmark": "grammar_aligned",
        "model": model,
        "threads": torch.get_num_threads(),
        "scheme": [scheme(lm, size) for size in sizes],
        "mask": mask_overhead(lm, 1 if quick else 20),
        "exact": exact_samples(lm, 5 if quick else 200, 20 if quick else 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="packaged name or folder")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="10 samples: a minute")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    n = 10 if arguments.quick else arguments.samples
    result = measure(arguments.model, n, quick=arguments.quick)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for row in result["scheme"]:
        difference = row["largest_difference_of_log_proposals"]
        print(
            f"{row['samples']} ASAp samples, {row['tokens']} tokens: {row['ratio']:.1f} times as "
            f"fast as the published scheme ({row['seconds']:.1f} s against "
            f"{row['rival_seconds']:.1f} s; {row['model_calls']} model calls against "
            f"{row['rival_model_calls']}); proposals "
            + ("differ in history" if difference is None else f"agree to {difference:.0e}")
        )
    mask = result["mask"]
    print(
        f"mask: {mask['mask_seconds'] * 1e6:.0f} µs, {mask['share']:.1%} of a plain decoding step"
    )
    for row in result["exact"]:
        print(
            f"exact samples at acceptance rate {row['acceptance_rate']:.3f}: "
            f"{row['adaptive_calls_per_sample']:.1f} model calls each by adaptive, "
            f"{row['rejection_calls_per_sample']:.1f} by rejection ({row['ratio']:.1f} times)"
        )


if __name__ == "__main__":
    main()
