"""How to sample texts of a grammar: how far each sampler is from the model's own proportions.

The target is ``Q = P(. | legal)``, the model's distribution of token sequences given that the text
is in the language and ends in time. A sampler is set up on one prompt, learns what it is told to
learn, and is then asked for ``n_samples`` texts. What counts is the distribution that each text was
drawn from, given all that the sampler had seen by then; its divergence from Q is averaged over the
texts. That is a property of one run: over many runs the errors of a sampler that learns partly
cancel, within one they do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import cache_directory, write_text
from bakeoff.data.prompts import Prompt, prompts_fingerprint
from bakeoff.decoding.alignment_trie import NEVER, AlignmentTrie, LogProbs, log_sum
from bakeoff.decoding.grammar import Grammar, GrammarConstraint, as_grammar
from bakeoff.decoding.grammar_aligned import (
    Attempt,
    TrieWalker,
    Warping,
    walker_for,
)
from bakeoff.decoding.language_tree import LanguageTree, TreeBounds, TreeWalker
from bakeoff.decoding.problem.common import check_prompts
from bakeoff.decoding.winner import Settings, load_settings, save_settings
from bakeoff.errors import DataError
from bakeoff.models.inference import evaluating
from bakeoff.models.shared import SharedModels
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.measure import warnings_noted

if TYPE_CHECKING:
    from bakeoff.models.loading import LanguageModel

CONSTRAINED_METRICS: dict[str, Metric] = {
    "kl": Metric("distance from the target (nats)", higher_is_better=False, margin=0.01),
    "first_kl": Metric(
        "distance of the first text from the target (nats)", higher_is_better=False, margin=0.01
    ),
    "total_variation": Metric(
        "total variation from the target", higher_is_better=False, margin=0.01
    ),
    "log_prob": Metric("log-probability under the model (nats)", margin=0.05),
    "legal": Metric("delivered, and of the language (share)", margin=0.01),
    "model_calls": Metric("model calls per text", higher_is_better=False, margin=1.0),
    "seconds": Metric("seconds to the first text", higher_is_better=False, margin=0.05),
    "tokens_per_second": Metric("tokens per second", margin=0.5),
}
_TIMINGS = ("seconds", "tokens_per_second")
_QUESTION = "how to sample texts of a grammar"

_LEARN = {"burn_in": 0, "calls": None, "max_failures": 200}
# What designs may say, and what is taken where they do not.
_PARAMETERS: dict[str, dict[str, int | None]] = {
    "asap": _LEARN,
    "gcd": {},
    "adaptive": _LEARN,
    "rejection": {"calls": None, "max_failures": 200},
    "importance": {"candidates": 100, "calls": None},
    "unconstrained": {},
}
_LEAST = {"burn_in": 0, "calls": 1, "max_failures": 1, "candidates": 1}
_LEARNING = ("asap", "adaptive")
_EXACT = ("rejection", "adaptive")
# Within a budget of calls: a language that is known whole costs no further call.
_MOST_ATTEMPTS = 500
# Failures of masking in a row, after which no text can be expected.
_HOPELESS = 2000
# What an illegal text counts, in nats, where the target gives it nothing.
_ILLEGAL = math.log(1e9)

_VERSION = 2
_TREE_VERSION = 1


def constrained_designs() -> Designs:
    """Return ASAp, cold and warm, masking, the exact samplers and resampling.

    Examples
    --------
    >>> [design.name for design in constrained_designs()][:4]
    ['masking', 'asap', 'asap after 1', 'asap after 10']
    """
    return Designs(
        [
            Design("masking", "gcd"),
            Design("asap", "asap"),
            *(Design(f"asap after {n}", "asap", {"burn_in": n}) for n in (1, 10, 100, 400)),
            Design("adaptive rejection", "adaptive"),
            Design("rejection", "rejection"),
            Design("resampling of 100", "importance", {"candidates": 100}),
            Design("unconstrained", "unconstrained"),
        ]
    )


class ConstrainedProblem:
    """How to sample texts of a grammar: distance of samplers from the model's own distribution.

    Designs take these parameters. ``asap``, ``adaptive``: `burn_in` texts are drawn first and
    dropped, or as many as `calls` model calls allow. ``importance``: `candidates` texts by masking,
    or as many as `calls` allow; then texts are drawn from them in proportion to P / proposal.
    ``rejection``: `calls` in all for all texts together. Where a method failed `max_failures` times
    in a row, or its calls are used up, the text is drawn by masking, and scored as such. ``gcd``
    (masking) and ``unconstrained`` take none.

    Parameters
    ----------
    prompts
        What is asked, as `Prompt` or text. Documents and passages are put before the text.
    grammar
        The language of the answers, in any form that `as_grammar` takes; or a list or tuple with
        one for each prompt; None, alone or in a list, for the prompt's own options.
    model
        The language model: packaged name, folder or hub id.
    n_samples
        Texts per prompt.
    max_new_tokens
        Most tokens of a text, its end included; texts that do not end by then are not in Q.
    temperature, top_k, top_p
        What defines P.
    chat
        Whether prompts are put into the model's chat template, where its tokenizer has one.
    max_prefixes
        A language with at most so many beginnings is enumerated.
    z_samples
        Masked texts from which Z is estimated where a language is not enumerated.
    timed_prompts
        So many of the prompts, the first ones, are also answered by the real model with a clock.

    Raises
    ------
    DataError
        If there is no prompt, a grammar is invalid or its language provably empty, a prompt has
        neither, or a number is out of range. `prepare` refuses languages without a text that ends
        in time.

    Notes
    -----
    *Enumerated* prompts: the probabilities of all texts, in all their spellings, are computed once
    and kept; samplers then run on these numbers, with the code and the draws that they would have
    on the model, and every score but the timings is computed from the sampler's exact distribution:
    ``kl`` is the mean over the texts of ``KL(q_t || Q)``, ``first_kl`` that of the first alone,
    ``log_prob`` the mean over texts of ``E[log P]`` under q_t, ``total_variation`` likewise.

    *Estimated* prompts, whose language is too large: ``kl`` is the mean over the texts of
    ``log q_t - log P`` plus ``log Z`` minus the log of the share of attempts that were accepted.
    Given Z it is unbiased; Z is the mean weight of `z_samples` masked attempts, the same for all
    designs, and may leave values below 0. ``total_variation`` is the mean of the positive part of
    ``1 - Q / q_t``. Accepted texts of ``rejection`` and ``adaptive`` are from Q by construction and
    score 0.

    ``importance`` is scored by the distribution of what it draws given its candidates, which misses
    whatever is not among them. ``unconstrained``: KL(P || Q) is infinite, since P writes illegal
    texts; these are scored as if Q gave them a billionth of the probability that P gives, so that
    ``kl`` is ``(1 - Z) log 1e9 + Z log Z``, which tells no more than Z. Its ``total_variation`` is
    1 - Z, and ``log_prob`` and ``legal`` are those of the texts it wrote, whatever they are.

    ``legal`` is the share of texts that the method delivered itself. ``model_calls`` are forward
    passes on prefixes not read before, learning included, over the texts. ``seconds`` is the time
    to the first text, ``tokens_per_second`` the tokens of all texts over all the time, learning
    included in both.

    Examples
    --------
    >>> from bakeoff.data.constrained_prompts import constrained_prompts
    >>> from bakeoff.study import Study
    >>> data = constrained_prompts("smoke")
    >>> problem = ConstrainedProblem(data.prompts, grammar=data.grammars)
    >>> Study(
    ...     problem, constrained_designs(), reference="masking", seeds=3, directory="runs/try"
    ... ).run()  # doctest: +SKIP
    """

    name = "decoding"

    def __init__(
        self,
        prompts: Sequence[Prompt | str],
        *,
        grammar: Any = None,
        model: str = "smollm2-135m",
        n_samples: int = 10,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        chat: bool = True,
        max_prefixes: int = 3000,
        z_samples: int = 64,
        timed_prompts: int = 2,
    ) -> None:
        check_prompts(prompts, 1, "samplers")
        self.prompts = tuple(
            prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts
        )
        numbers = {
            "n_samples": (n_samples, 1),
            "max_new_tokens": (max_new_tokens, 1),
            "max_prefixes": (max_prefixes, 1),
            "z_samples": (z_samples, 2),
            "timed_prompts": (timed_prompts, 0),
        }
        for name, (number, least) in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise DataError(f"{name} must be an integer of at least {least}, got {number!r}")
        self.grammars = _grammars(self.prompts, grammar)
        self.model = model
        self.n_samples, self.max_new_tokens = n_samples, max_new_tokens
        self.warp = Warping(temperature, top_k, top_p)
        self.chat = bool(chat)
        self.max_prefixes, self.z_samples = max_prefixes, z_samples
        self.timed_prompts = min(timed_prompts, len(self.prompts))
        self._loaded = _Loaded()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Distance first, then likelihood, delivery, calls and, if prompts are timed, timings."""
        return {
            name: metric
            for name, metric in CONSTRAINED_METRICS.items()
            if self.timed_prompts or name not in _TIMINGS
        }

    def fingerprint(self) -> str:
        """Return a digest of prompts, grammars, model and limits."""
        facts = [
            prompts_fingerprint(self.prompts),
            [grammar.definition for grammar in self.grammars],
            self._language_model().fingerprint,
            self.n_samples,
            self.max_new_tokens,
            repr(self.warp),
            self.chat,
            self.max_prefixes,
            self.z_samples,
            self.timed_prompts,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        return {
            "question": _QUESTION,
            "data": f"{len(self.prompts):,} prompts, "
            f"{len({g.definition for g in self.grammars}):,} different languages",
            "language model": self.model + (", chat template" if self.chat else ""),
            "texts per prompt": self.n_samples,
            "limit": f"{self.max_new_tokens} tokens",
            "distance": f"exact where a language has at most {self.max_prefixes:,} beginnings, "
            f"else estimated, Z from {self.z_samples} masked texts",
            "sampled from": f"the model at {self.warp!r}",
            "timed": f"{self.timed_prompts} prompts",
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSION)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here: unknown method or parameter."""
        check_method(design, _PARAMETERS, _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        for name, value in design.params.items():
            if value is None and name == "calls":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
                raise DataError(
                    f"design {design.name!r}: {name} must be an integer of at least "
                    f"{_LEAST[name]}, got {value!r}"
                )
        if design.params.get("calls") is not None:
            other = {"burn_in", "candidates"} & set(design.params)
            if other:
                raise DataError(
                    f"design {design.name!r}: give {other.pop()} or calls, not both: each says "
                    "when to stop learning"
                )

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs, and enumerate languages or estimate their probability, once."""
        for design in designs:
            self.check(design)
        n = len(self.prompts)
        for number in range(n):
            report = counting(work.progress, "reading languages", (number / n, (number + 1) / n))
            self._target(number, report)

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Let one design answer all prompts."""
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        units: dict[str, dict[str, list[float]]] = {name: {} for name in self.metrics}
        lines: list[str] = []
        estimates: list[float] = []
        n_calls = 0.0
        for number, prompt in enumerate(self.prompts):
            work.progress(number / len(self.prompts), f"prompt {number + 1}")
            target = self._target(number)
            task = "enumerated" if target.tree is not None else "estimated"
            if target.tree is None:
                estimates.append(target.z_error)
            answers = self._answers(design, number, seed, target)
            for name, value in answers.scores.items():
                if name not in _TIMINGS:
                    units[name].setdefault(task, []).append(value)
            n_calls += answers.n_calls
            timings = answers.scores
            if number < self.timed_prompts:
                if not set(_TIMINGS) <= set(timings):
                    timings = self._answers(design, number, seed, target, real=True).scores
                for name in _TIMINGS:
                    units[name].setdefault("timed", []).append(timings[name])
            constraint = self._constraint(number)
            texts = [constraint.text(tokens) for tokens in answers.texts]
            lines.append(json.dumps({"prompt": prompt.text, "texts": texts}, ensure_ascii=False))
            if answers.learnt is not None:
                (work.directory / "learnt").mkdir(exist_ok=True)
                answers.learnt.save(work.directory / "learnt" / f"{number:05d}.safetensors")
        write_text(work.directory / "texts.jsonl", "\n".join(lines) + "\n")
        notes = []
        if estimates:
            notes.append(
                f"The languages of {len(estimates)} of {len(self.prompts)} prompts were too large "
                "to be enumerated: their distances are estimates, with a standard error of log Z "
                f"of {np.median(estimates):.2g} nats (median)."
            )
        return Trial(
            scores={
                metric: {task: np.array(values) for task, values in tasks.items()}
                for metric, tasks in units.items()
            },
            cost={"model_calls": n_calls},
            artifact=work.directory,
            notes=tuple(notes),
        )

    def _answers(
        self, design: Design, number: int, seed: int, target: _Target, *, real: bool = False
    ) -> _Answers:
        random = np.random.default_rng([seed, number])
        if design.method == "unconstrained":
            return self._free(number, int(random.integers(2**62)), target)
        known = target.tree is not None and not real
        started = time.perf_counter()
        bounds = None
        if known:
            assert target.tree is not None
            trie = AlignmentTrie()
            trie.require(target.binding)
            walker: TrieWalker = TreeWalker(target.tree, trie, random)
            bounds = TreeBounds(target.tree)
        else:
            walker = self._walker(number, random)
        model = self._language_model().model
        with nullcontext() if known else evaluating(model):
            sampler = _Sampler(walker, design.method, _settings(design), bounds, started)
            sampler.learn()
            drawn = sampler.draw(self.n_samples)
        scores = _exact_scores(drawn) if known else _estimated_scores(sampler, drawn, target)
        scores["legal"] = float(np.mean([text.own for text in drawn]))
        scores["model_calls"] = walker.reader.n_calls / len(drawn)
        if not known:
            n_tokens = sum(len(text.tokens) for text in drawn)
            scores["seconds"] = drawn[0].seconds
            scores["tokens_per_second"] = n_tokens / drawn[-1].seconds
        learns = design.method in _LEARNING and (
            design.params.get("burn_in") or design.params.get("calls")
        )
        return _Answers(
            scores,
            [text.tokens[:-1] for text in drawn],
            walker.reader.n_calls,
            walker.trie if learns else None,
        )

    def _free(self, number: int, seed: int, target: _Target) -> _Answers:
        """Sample without a grammar, all texts of a prompt at once."""
        import torch
        from transformers import GenerationConfig

        model = self._language_model().model
        constraint = self._constraint(number)
        ends = constraint.eos_token_ids
        ids = torch.tensor([self._prompt_ids(number)], device=model.device)
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.warp.temperature,
            top_k=self.warp.top_k,
            top_p=self.warp.top_p,
            repetition_penalty=1.0,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=self.n_samples,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            return_dict_in_generate=True,
            output_scores=True,
        )
        started = time.perf_counter()
        with evaluating(model), torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        seconds = time.perf_counter() - started
        texts: list[list[int]] = []
        log_probs, legal = [], []
        n_read = 0
        for row, tokens in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
            n = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            ended = tokens[n - 1] in ends
            log_p = 0.0
            for step, token in enumerate(tokens[:n]):
                log_p += float(torch.log_softmax(output.scores[step][row].double(), -1)[token])
            n_read += n
            log_probs.append(log_p)
            texts.append(tokens[: n - ended])
            legal.append(ended and constraint.accepts(texts[-1]))
        z = math.exp(target.log_z)
        apart = (1 - z) * _ILLEGAL + z * target.log_z
        scores = {
            "kl": apart,
            "first_kl": apart,
            "total_variation": 1 - z,
            "log_prob": float(np.mean(log_probs)),
            "legal": float(np.mean(legal)),
            "model_calls": n_read / len(texts),
            "seconds": seconds,
            "tokens_per_second": n_read / seconds,
        }
        return _Answers(scores, texts, n_read, None)

    # What designs share

    def _target(self, number: int, progress: Callable[[int, int], None] | None = None) -> _Target:
        """Return what is known of a prompt's language: in memory, else from the cache, else new."""
        known = self._loaded.targets.get(number)
        if known is not None:
            return known
        try:
            walker = self._walker(number, np.random.default_rng([number, 104_729]))
            facts = [_TREE_VERSION, walker.trie.binding, self.max_prefixes, self.z_samples]
            key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
            folder = cache_directory() / "languages"
            target = _Target.load(folder, key)
            if target is None:
                target = self._new_target(walker, progress)
                target.save(folder, key)
        except DataError as error:
            raise DataError(f"prompt {number + 1} ({_short(self.prompts[number])}): {error}") from (
                error
            )
        self._loaded.targets[number] = target
        return target

    def _new_target(
        self, walker: TrieWalker, progress: Callable[[int, int], None] | None
    ) -> _Target:
        binding = walker.trie.binding
        tree = LanguageTree.of(
            walker.constraint,
            sorted(walker.ends),
            max_new_tokens=self.max_new_tokens,
            max_prefixes=self.max_prefixes,
        )
        reader = walker.reader
        with evaluating(reader.model):
            if tree is not None:
                tree.score(reader.model, reader.prompt_ids, self.warp, progress=progress)
                return _Target(tree, tree.log_z, 0.0, binding)
            logs = np.full(self.z_samples, NEVER)
            for place in range(self.z_samples):
                attempt = walker.attempt("gcd")
                if attempt.outcome == "accepted":
                    logs[place] = attempt.log_prob - attempt.log_proposal
                if progress is not None:
                    progress(place + 1, self.z_samples)
        if not (logs > NEVER).any():
            raise DataError(
                f"none of {self.z_samples} masked texts ended within max_new_tokens="
                f"{self.max_new_tokens}: give more tokens, or a language whose texts are shorter"
            )
        log_z = min(log_sum(logs) - math.log(self.z_samples), 0.0)
        weights = np.exp(logs - logs.max())
        error = float(weights.std(ddof=1) / math.sqrt(len(weights)) / weights.mean())
        return _Target(None, log_z, error, binding)

    def _language_model(self) -> LanguageModel:
        return self._loaded.language_model(self.model)

    def _walker(
        self, number: int, random: np.random.Generator, trie: AlignmentTrie | None = None
    ) -> TrieWalker:
        return walker_for(
            self._language_model(),
            None,
            self._prompt_ids(number),
            self.grammars[number],
            max_new_tokens=self.max_new_tokens,
            warp=self.warp,
            trie=trie,
            random=random,
        )

    def _constraint(self, number: int) -> GrammarConstraint:
        if number not in self._loaded.constraints:
            made = self._walker(number, np.random.default_rng(0)).constraint
            assert isinstance(made, GrammarConstraint)
            self._loaded.constraints[number] = made
        return self._loaded.constraints[number]

    def _prompt_ids(self, number: int) -> list[int]:
        prompt = self.prompts[number]
        text = "\n\n".join(filter(None, [prompt.document, *prompt.passages, prompt.text]))
        return _encoded(self._language_model().tokenizer, text, self.chat)

    # The winner

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a sampler with its grammars and what it learnt.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder.
        destination
            The folder to write: ``decoder.json``, ``README.md``, ``texts.jsonl`` (what the trial
            drew) and, for samplers that learn first, a trie per prompt in ``learnt``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            False: bakeoff is needed to sample so. True for ``unconstrained``, plain sampling.
        """
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy(artifact / "texts.jsonl", destination / "texts.jsonl")
        if (artifact / "learnt").is_dir():
            shutil.copytree(artifact / "learnt", destination / "learnt", dirs_exist_ok=True)
        rows = []
        for number, prompt in enumerate(self.prompts):
            learnt = f"learnt/{number:05d}.safetensors"
            text = "\n\n".join(filter(None, [prompt.document, *prompt.passages, prompt.text]))
            grammar = self.grammars[number]
            rows.append(
                {
                    "text": text,
                    "grammar": {
                        "kind": grammar.kind,
                        "source": grammar.source,
                        "definition": grammar.definition,
                    },
                    "learnt": learnt if (destination / learnt).is_file() else None,
                }
            )
        extra = {
            "question": _QUESTION,
            "max_new_tokens": self.max_new_tokens,
            "chat": self.chat and bool(self._language_model().tokenizer.chat_template),
            "temperature": self.warp.temperature,
            "top_k": self.warp.top_k,
            "top_p": self.warp.top_p,
            "prompts": rows,
        }
        settings = Settings(design.name, design.method, dict(design.params), self.model, extra)
        save_settings(destination, settings, usage=self.usage(destination), reason=reason)
        return design.method == "unconstrained"

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that sample as the winner does."""
        return [
            "from bakeoff.decoding.problem.constrained import sample_as",
            "",
            f"texts = sample_as({str(destination)!r}, {self.prompts[0].text!r}, n=5)",
            "# another prompt: sample_as(..., grammar=GRAMMAR), as `as_grammar` takes it",
        ]


def sample_as(
    folder: str | Path,
    prompt: str,
    n: int = 1,
    *,
    grammar: Any = None,
    random_state: int | np.random.Generator = 0,
) -> list[str]:
    """Sample texts as the winner of a study does, with what it learnt.

    Parameters
    ----------
    folder
        What `ConstrainedProblem.export` wrote.
    prompt
        One of the study's prompts, or another.
    n
        How many texts.
    grammar
        The language; by default that of the study's prompt, or of all its prompts if they have one.
    random_state
        A seed or a numpy generator.

    Returns
    -------
    list of str
        n texts. For ``unconstrained`` they may not be in the language.

    Raises
    ------
    DataError
        If the folder holds no such winner, or the language is not known.
    """
    folder = Path(folder)
    settings = load_settings(folder)
    extra = settings.extra
    if extra.get("question") != _QUESTION:
        raise DataError(f"{folder} holds no sampler of a grammar, but {settings.method!r}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise DataError(f"n must be an integer of at least 1, got {n!r}")
    rows = {row["text"]: row for row in extra["prompts"]}
    row = rows.get(prompt)
    if grammar is None:
        asked = [row] if row else list(rows.values())
        found = {each["grammar"]["definition"]: each["grammar"] for each in asked}
        if len(found) != 1:
            raise DataError(
                "grammar is needed: the prompt is none of the study's, and those have "
                f"{len(found)} different languages"
            )
        language = Grammar(**next(iter(found.values())))
    else:
        language = as_grammar(grammar)
    problem = ConstrainedProblem(
        [prompt],
        grammar=language,
        model=settings.model,
        n_samples=n,
        max_new_tokens=extra["max_new_tokens"],
        temperature=extra["temperature"],
        top_k=extra["top_k"],
        top_p=extra["top_p"],
        chat=extra["chat"],
    )
    design = Design(settings.name, settings.method, settings.params)
    random = np.random.default_rng(random_state)
    constraint = problem._constraint(0)
    if design.method == "unconstrained":
        target = _Target(None, 0.0, 0.0, {})
        texts = problem._free(0, int(random.integers(2**62)), target).texts
        return [constraint.text(text) for text in texts]
    same = row is not None and language.definition == row["grammar"]["definition"]
    learnt = row["learnt"] if same and row is not None else None
    trie = AlignmentTrie.load(folder / learnt) if learnt else None
    walker = problem._walker(0, random, trie)
    with evaluating(walker.reader.model):
        sampler = _Sampler(walker, design.method, _settings(design), None, time.perf_counter())
        if trie is None:
            sampler.learn()
        drawn = sampler.draw(n)
    return [constraint.text(text.tokens[:-1]) for text in drawn]


# Samplers -----------------------------------------------------------------------------------------


@dataclass
class _Text:
    """A text that was returned, and what is known of the distribution it was drawn from."""

    tokens: list[int]
    log_prob: float
    log_proposal: float
    drawn_by: str
    own: bool  # by the design's own method, not by masking because that failed
    seconds: float
    kl: float = math.nan
    total_variation: float = math.nan
    mean_log_prob: float = math.nan


@dataclass
class _Answers:
    scores: dict[str, float]
    texts: list[list[int]]
    n_calls: int
    learnt: AlignmentTrie | None


class _Sampler:
    """A design at work on one prompt, on the model or on the enumerated language."""

    def __init__(
        self,
        walker: TrieWalker,
        method: str,
        settings: Mapping[str, int | None],
        bounds: TreeBounds | None,
        started: float,
    ) -> None:
        self.walker, self.method, self.bounds = walker, method, bounds
        self.started = started
        self.calls = settings.get("calls")
        self.burn_in = settings.get("burn_in") or 0
        self.n_candidates = settings.get("candidates") or 0
        self.max_failures = settings.get("max_failures") or _HOPELESS
        self.pool: list[Attempt] = []
        self.pool_weights: NDArray[np.float64] = np.empty(0)
        # Attempts and successes while texts were drawn, by the method that was used.
        self.counts: dict[str, list[int]] = {}
        # Distances of what does not change from text to text.
        self._distances: dict[str, tuple[float, float, float]] = {}

    def learn(self) -> None:
        """Do what comes before the first text."""
        if self.method in _LEARNING:
            self._collect(self.method, self.burn_in)
        elif self.method == "importance":
            self.pool = self._collect("gcd", self.n_candidates)
            if not self.pool:
                raise self._hopeless()
            logs = np.array([each.log_prob - each.log_proposal for each in self.pool])
            self.pool_weights = np.exp(logs - log_sum(logs))

    def _collect(self, method: str, wanted: int) -> list[Attempt]:
        found: list[Attempt] = []
        failures = n_attempts = 0
        while failures < max(self.max_failures, 1):
            if self.calls is None and len(found) >= wanted:
                break
            spent = self.calls is not None and self.walker.reader.n_calls >= self.calls
            enough = self.calls is not None and n_attempts >= _MOST_ATTEMPTS
            if (spent or enough) and (found or self.method != "importance"):
                break
            attempt = self._attempt(method)
            n_attempts += 1
            failures = 0 if attempt.outcome == "accepted" else failures + 1
            if attempt.outcome == "accepted":
                found.append(attempt)
        return found

    def _attempt(self, method: Any) -> Attempt:
        attempt = self.walker.attempt(method)
        if self.bounds is not None:
            self.bounds.follow(self.walker.trie, attempt.tokens)
        return attempt

    def draw(self, n: int) -> list[_Text]:
        """Return n texts."""
        return [self._text() for _ in range(n)]

    def _text(self) -> _Text:
        if self.method == "importance":
            place = int(self.walker.random.choice(len(self.pool), p=self.pool_weights))
            return self._returned(self.pool[place], "importance", None)
        if self.method != "gcd":
            for _ in range(self.max_failures):
                budgeted = self.method == "rejection" and self.calls is not None
                if budgeted and self.walker.reader.n_calls >= (self.calls or 0):
                    break
                found = self._try(self.method)
                if found is not None:
                    return found
        for _ in range(_HOPELESS):
            found = self._try("gcd")
            if found is not None:
                return found
        raise self._hopeless()

    def _hopeless(self) -> DataError:
        return DataError(
            f"{_HOPELESS} masked texts in a row did not end within max_new_tokens="
            f"{self.walker.max_new_tokens}"
        )

    def _try(self, method: str) -> _Text | None:
        before = None
        if self.bounds is not None and method in _LEARNING:
            before = self.bounds.log_bounds.copy(), self.bounds.seen.copy()
        attempt = self._attempt(method)
        counts = self.counts.setdefault(method, [0, 0])
        counts[0] += 1
        if attempt.outcome != "accepted":
            return None
        counts[1] += 1
        return self._returned(attempt, method, before)

    def _returned(
        self,
        attempt: Attempt,
        drawn_by: str,
        before: tuple[LogProbs, NDArray[np.bool_]] | None,
    ) -> _Text:
        seconds = time.perf_counter() - self.started
        text = _Text(
            list(attempt.tokens),
            attempt.log_prob,
            attempt.log_proposal,
            drawn_by,
            drawn_by == self.method,
            seconds,
        )
        if self.bounds is None:
            return text
        tree = self.bounds.tree
        if before is not None:
            log_bounds, seen = before
            adaptive = drawn_by == "adaptive"
            log_q = tree.adaptive(log_bounds, seen) if adaptive else tree.aligned(log_bounds)
            found = _distances(tree, log_q)
        else:
            if drawn_by not in self._distances:
                self._distances[drawn_by] = _distances(tree, self._fixed(drawn_by))
            found = self._distances[drawn_by]
        text.kl, text.total_variation, text.mean_log_prob = found
        return text

    def _fixed(self, drawn_by: str) -> LogProbs:
        assert self.bounds is not None
        tree = self.bounds.tree
        if drawn_by == "gcd":
            return tree.masked()
        if drawn_by == "rejection":
            return tree.target()
        weights = np.zeros(len(tree.leaves))
        places = [tree.leaf(each.tokens) for each in self.pool]
        np.add.at(weights, places, self.pool_weights)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(weights), dtype=np.float64)


def _distances(tree: LanguageTree, log_q: LogProbs) -> tuple[float, float, float]:
    return tree.divergence(log_q), tree.total_variation(log_q), tree.mean_log_prob(log_q)


def _exact_scores(drawn: Sequence[_Text]) -> dict[str, float]:
    return {
        "kl": float(np.mean([text.kl for text in drawn])),
        "first_kl": drawn[0].kl,
        "total_variation": float(np.mean([text.total_variation for text in drawn])),
        "log_prob": float(np.mean([text.mean_log_prob for text in drawn])),
    }


def _estimated_scores(
    sampler: _Sampler, drawn: Sequence[_Text], target: _Target
) -> dict[str, float]:
    """Return unbiased estimates, given Z; see the notes of `ConstrainedProblem`."""
    if sampler.method == "importance":
        by_text: dict[tuple[int, ...], tuple[float, float]] = {}
        for attempt, weight in zip(sampler.pool, sampler.pool_weights, strict=True):
            key = tuple(attempt.tokens)
            by_text[key] = (by_text.get(key, (0.0, 0.0))[0] + weight, attempt.log_prob)
        masses = np.array([weight for weight, _ in by_text.values()])
        log_probs = np.array([log_p for _, log_p in by_text.values()])
        kept = masses > 0
        masses, log_probs = masses[kept], log_probs[kept]
        kl = float((masses * (np.log(masses) - log_probs + target.log_z)).sum())
        apart = np.maximum(masses - np.exp(log_probs - target.log_z), 0).sum()
        return {
            "kl": kl,
            "first_kl": kl,
            "total_variation": float(apart),
            "log_prob": float((masses * log_probs).sum()),
        }
    gaps = []
    for text in drawn:
        attempts, accepted = sampler.counts[text.drawn_by]
        gap = text.log_proposal - text.log_prob + target.log_z - math.log(accepted / attempts)
        gaps.append(0.0 if text.drawn_by in _EXACT else gap)
    return {
        "kl": float(np.mean(gaps)),
        "first_kl": gaps[0],
        "total_variation": float(np.mean([max(-math.expm1(-gap), 0.0) for gap in gaps])),
        "log_prob": float(np.mean([text.log_prob for text in drawn])),
    }


def _settings(design: Design) -> dict[str, int | None]:
    return {**_PARAMETERS[design.method], **design.params}


# Languages ----------------------------------------------------------------------------------------


@dataclass
class _Target:
    """What is known of one prompt's language: all of it, or how probable it is."""

    tree: LanguageTree | None
    log_z: float
    z_error: float
    binding: dict[str, str]

    def save(self, folder: Path, key: str) -> None:
        if self.tree is not None:
            self.tree.save(folder / f"{key}.safetensors")
        facts = asdict(replace(self, tree=None)) | {"tree": self.tree is not None}
        write_text(folder / f"{key}.json", json.dumps(facts))

    @classmethod
    def load(cls, folder: Path, key: str) -> _Target | None:
        """Return what `save` wrote, None if it is not there or not whole."""
        from safetensors import SafetensorError

        try:
            facts = json.loads((folder / f"{key}.json").read_text("utf-8"))
            tree = LanguageTree.load(folder / f"{key}.safetensors") if facts.pop("tree") else None
            return cls(tree=tree, **facts)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


class _Loaded(SharedModels):
    """The model and languages that trials share in one process; left behind when pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: dict[int, _Target] = {}
        self.constraints: dict[int, GrammarConstraint] = {}


def _grammars(prompts: Sequence[Prompt], grammar: Any) -> tuple[Grammar, ...]:
    given = list(grammar) if isinstance(grammar, list | tuple) else [grammar] * len(prompts)
    if len(given) != len(prompts):
        raise DataError(
            f"grammar must be one language, or one for each of {len(prompts)} prompts, got "
            f"{len(given)}"
        )
    found = []
    for number, (prompt, each) in enumerate(zip(prompts, given, strict=True)):
        place = f"prompt {number + 1} ({_short(prompt)})"
        if each is None and not prompt.options:
            raise DataError(f"{place}: give a grammar, or options to choose from")
        try:
            found.append(Grammar.choice(prompt.options) if each is None else as_grammar(each))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    return tuple(found)


def _short(prompt: Prompt) -> str:
    return repr(prompt.text if len(prompt.text) <= 40 else f"{prompt.text[:37]}...")


def _encoded(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat or not getattr(tokenizer, "chat_template", None):
        return [int(token) for token in tokenizer(text)["input_ids"]]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    # The template has the special tokens already.
    return [int(token) for token in tokenizer(whole, add_special_tokens=False)["input_ids"]]
