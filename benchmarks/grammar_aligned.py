"""Grammar-aligned sampling against the published scheme, and what exact samples cost.

Three measurements with one model, on this machine, in one run:

1. ASAp against the published implementation's scheme: every sample computed from the prompt on, one
   Python object per legal token. The rival gets the same masks and is driven along our own samples,
   so that both sides must assign the same proposal probability to every sample; they are compared.
   Two languages: records of names, of which hardly any two samples share much, and expressions over
   bit vectors after a prompt with examples, of the kind that the paper samples. The rival's time is
   that of the first samples (`--rival-samples`), scaled: its cost per sample does not fall. On a
   machine with other work, and one thread, go by the ratio of processor time.
2. The mask's time next to that of a plain decoding step.
3. Model calls per exact sample, adaptive against rejection, at acceptance rates 0.5, 0.1 and 0.01.

    python benchmarks/grammar_aligned.py               # 50 and 500 samples: 20 minutes
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

RECORD_PROMPT = "A person as JSON, with first name, month of birth and age: "
RECORD = Grammar.regex(
    r'\{"name":"[A-Z][a-z]{2,8}","born":"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)",'
    r'"age":[1-9][0-9]?\}'
)
# Expressions two levels deep, so that all end in time: 100,000 and more.
EXPRESSION = Grammar.lark(
    r"""
start: " " outer ")"
outer: atom | "(bvnot " inner ")" | "(bvneg " inner ")" | "(" binary " " inner " " inner ")"
inner: atom | "(bvnot " atom ")" | "(bvneg " atom ")" | "(" binary " " atom " " atom ")"
binary: "bvadd" | "bvsub" | "bvand" | "bvor" | "bvxor" | "bvlshr" | "bvshl"
atom: "s" | "t" | "#x0" | "#x1" | "#x7" | "#x8" | "#xf"
"""
)
EXPRESSION_PROMPT = """\
You are an expert in program synthesis. Write a function over bit vectors of width 4 that meets \
the constraint, as one expression in bvnot, bvneg, bvadd, bvsub, bvand, bvor, bvxor, \
bvlshr and bvshl over s, t and constants.

Constraint: (= (bvand s (f s t)) #x0)
(define-fun f ((s (BitVec 4)) (t (BitVec 4))) (BitVec 4) (bvnot s))

Constraint: (bvuge (f s t) t)
(define-fun f ((s (BitVec 4)) (t (BitVec 4))) (BitVec 4) (bvor s t))

Constraint: (= (bvadd (f s t) t) s)
(define-fun f ((s (BitVec 4)) (t (BitVec 4))) (BitVec 4) (bvsub s t))

Constraint: (= (bvxor (f s t) s) (bvshl t #x1))
(define-fun f ((s (BitVec 4)) (t (BitVec 4))) (BitVec 4) (bvxor s (bvshl t #x1)))

Constraint: (bvult (bvlshr s (f s t)) t)
(define-fun f ((s (BitVec 4)) (t (BitVec 4))) (BitVec 4)"""
# Prompt, grammar, what ends a text (None: the model's end of text), most tokens.
LANGUAGES = {
    "records": (RECORD_PROMPT, RECORD, None, 40),
    "expressions": (EXPRESSION_PROMPT, EXPRESSION, "\n", 60),
}
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
    model: Any, constraint: Any, prompt: list[int], samples: Any, root: Node, limit: int
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
            if place == limit - 1:
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


def scheme(lm: Any, language: str, n: int, n_rival: int) -> dict[str, Any]:
    """Time n samples of ours, and as many of the published scheme as told."""
    prompt, grammar, end, limit = LANGUAGES[language]
    constraint = GrammarConstraint(
        grammar,
        lm.tokenizer,
        vocab_size=lm.model.config.vocab_size,
        eos_token_id=lm.tokenizer(end)["input_ids"] if end else None,
    )
    prompt_ids = lm.tokenizer(prompt)["input_ids"]
    begin, cpu = time.perf_counter(), time.process_time()
    ours: AlignedSamples = sample_aligned(
        lm, None, prompt_ids, constraint, n, max_new_tokens=limit, random_state=0
    )
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    trie, n_tokens = ours.trie, sum(map(len, ours.tokens))
    # Where no attempt failed both saw the same history; failures are ours alone to account for.
    n_same = int(np.argmax(np.append(ours.accepted_attempts, -1) != np.arange(n + 1)))
    timed = ours.tokens[: min(n, n_rival)]
    begin, rival_cpu = time.perf_counter(), time.process_time()
    theirs = published(lm.model, constraint, prompt_ids, timed, Node(None, 1.0), limit)
    rival = (time.perf_counter() - begin) * n / len(timed)
    rival_cpu = (time.process_time() - rival_cpu) * n / len(timed)
    compared = slice(0, min(n_same, len(timed)))
    gaps = np.abs(np.array(theirs[compared]) - ours.log_proposals[compared])
    n_needed = sum(trie.is_expanded(i) and not trie.is_finished(i) for i in range(len(trie)))
    return {
        "language": language,
        "prompt_tokens": len(prompt_ids),
        "samples": n,
        "attempts": ours.n_attempts,
        "tokens": n_tokens,
        "distinct": len(set(ours.tokens)),
        "seconds": seconds,
        "samples_per_second": n / seconds,
        "rival_samples_timed": len(timed),
        "rival_seconds": rival,
        "rival_samples_per_second": n / rival,
        "ratio": rival / seconds,
        "processor_seconds": cpu,
        "rival_processor_seconds": rival_cpu,
        "processor_ratio": rival_cpu / cpu,
        "model_calls": ours.n_model_calls,
        "rival_model_calls": n_tokens,
        # Of what was read ahead, the share that an attempt came to need.
        "needed_share": n_needed / (ours.n_model_tokens - len(prompt_ids) + 1),
        "proposals_compared": len(gaps),
        "largest_difference_of_log_proposals": float(gaps.max()) if len(gaps) else None,
        "largest_difference_per_token": (
            float((gaps / [len(sample) for sample in timed[compared]]).max()) if len(gaps) else None
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
        given = lm.tokenizer(RECORD_PROMPT)["input_ids"]
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


def measure(model: str, n: int, n_rival: int, *, quick: bool, only: bool) -> dict[str, Any]:
    """Run all three, or the first only, and return their figures."""
    import torch

    lm = load_language_model(model)
    sizes = [n // 10, n] if n >= 10 else [n]
    result = {
        "benchmark": "grammar_aligned",
        "model": model,
        "threads": torch.get_num_threads(),
        "scheme": [scheme(lm, name, size, n_rival) for name in LANGUAGES for size in sizes],
    }
    if not only:
        result["mask"] = mask_overhead(lm, 1 if quick else 20)
        result["exact"] = exact_samples(lm, 5 if quick else 200, 20 if quick else 1000)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="packaged name or folder")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rival-samples", type=int, default=100, help="at most; scaled")
    parser.add_argument("--scheme-only", action="store_true", help="the first measurement only")
    parser.add_argument("--quick", action="store_true", help="10 samples: a minute")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    n = 10 if arguments.quick else arguments.samples
    result = measure(
        arguments.model,
        n,
        arguments.rival_samples,
        quick=arguments.quick,
        only=arguments.scheme_only,
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for row in result["scheme"]:
        difference = row["largest_difference_of_log_proposals"]
        print(
            f"{row['language']}, {row['samples']} ASAp samples, {row['tokens']} tokens after a "
            f"prompt of {row['prompt_tokens']}: {row['ratio']:.1f} times as fast as the published "
            f"scheme, {row['processor_ratio']:.1f} by processor time "
            f"({row['samples_per_second']:.2f} samples/s against "
            f"{row['rival_samples_per_second']:.2f}; {row['model_calls']} model calls against "
            f"{row['rival_model_calls']}; {row['needed_share']:.0%} of the tokens read were "
            f"needed); {row['proposals_compared']} proposals "
            + ("compared" if difference is None else f"agree to {difference:.0e}")
        )
    if arguments.scheme_only:
        return
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
