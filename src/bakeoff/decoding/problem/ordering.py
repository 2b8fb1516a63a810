"""How designs that read unordered pieces are tried out: the same pieces in several orders.

Every prompt has a set: the options of a question, or the passages that a retriever found. Each is
presented in several orders, the same for all designs, and a design answers every presentation.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import write_text
from bakeoff.data.prompts import Prompt, prompts_fingerprint
from bakeoff.data.splits import normalise
from bakeoff.decoding.baselines import ORDER_PARAMETERS, order_parts
from bakeoff.decoding.problem.common import check_prompts
from bakeoff.decoding.set_based_prompting import (
    Normalize,
    OrderEnsembleModel,
    PlainOrderModel,
    SetBatch,
    SetPrompt,
    SetPromptingModel,
    _PromptModel,
    _Sequence,
)
from bakeoff.decoding.winner import Settings, load_settings, save_settings
from bakeoff.errors import DataError
from bakeoff.models.shared import SharedModels
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.measure import warnings_noted

if TYPE_CHECKING:
    from bakeoff.models import LanguageModel

Result = TypeVar("Result")

ORDER_METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy (mean over orders)", margin=0.01),
    "every_order": Metric("right in every order (share)", margin=0.01),
    "consistency": Metric("same answer in every order (share)", margin=0.01),
    "log_probability": Metric("log-probability of the answer (nats per token)", margin=0.01),
    "spread": Metric(
        "largest difference between orders (nats per token)", higher_is_better=False, margin=0.001
    ),
    "seconds": Metric("seconds per answer", higher_is_better=False),
}
QUESTION = "how to read pieces that have no order"

# `SetPrompt.orders` lists no more than these.
_MOST_ORDERS = 40_320
# What a log-probability counts as that is lower, or no number: scores stay finite.
_LOWEST = -100.0
# Raise when presentations, formats or scores change.
_VERSION = "1"


def order_designs() -> Designs:
    """Return set-based prompting, its two halves, and what is done about order without it.

    Examples
    --------
    >>> [design.name for design in order_designs()][:3]
    ['plain-order', 'sorted-order', 'set-based']
    """
    return Designs(
        [
            Design("plain-order", "plain-order"),
            Design("sorted-order", "sorted-order"),
            Design("set-based", "set-based"),
            Design("set-based, mask only", "set-based", {"edit_positions": False}),
            Design("set-based, positions only", "set-based", {"edit_mask": False}),
            Design("permute-and-vote, 4 orders", "permute-and-vote", {"n_orders": 4}),
            Design("permute-and-vote, 24 orders", "permute-and-vote", {"n_orders": 24}),
            Design("average-over-orders, 24 orders", "average-over-orders", {"n_orders": 24}),
        ]
    )


# Passes that are noted ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """What the model said to one input, and how long that took."""

    result: Any
    seconds: float


class _Loaded(SharedModels):
    """Models and passes that trials share in one process; left behind when pickled.

    A pass is known by everything that the model is given: token ids, positions and mask. Passes are
    run one prompt at a time, so that none depends on what else was asked: two presentations with
    one input (sorted pieces, two votes that drew the same order) are one computation, and nothing
    is taken for equal that the model did not get as equal input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes: dict[bytes, _Pass] = {}
        self.fits = False


class _Noted(_PromptModel):
    """Notes every pass of a model that is given one prompt at a time."""

    def __init__(self, *args: Any, passes: dict[bytes, _Pass], **options: Any) -> None:
        super().__init__(*args, batch_size=1, **options)
        self._known = passes
        self.noted: list[_Pass] = []

    def noting(self, call: Callable[[], Result]) -> tuple[Result, list[_Pass]]:
        """Return what a call returns and the passes that it needed."""
        self.noted = []
        result = call()
        return result, self.noted

    def _once(self, key: bytes, run: Callable[[], Any]) -> Any:
        if key not in self._known:
            began = time.perf_counter()
            result = run()
            self._known[key] = _Pass(result, time.perf_counter() - began)
        self.noted.append(self._known[key])
        return self._known[key].result

    def _likelihoods(
        self,
        rows: Sequence[_Sequence],
        choices: Sequence[Sequence[tuple[int, ...]]],
        normalize: Normalize,
    ) -> list[NDArray[np.float64]]:
        run = super()._likelihoods
        key = _digest(self._stack(rows), ("score", list(map(list, choices)), normalize))
        found: list[NDArray[np.float64]] = self._once(key, lambda: run(rows, choices, normalize))
        return found

    def _continue(self, batch: SetBatch, max_new_tokens: int, arguments: dict[str, Any]) -> Any:
        run = super()._continue
        # The only argument here is the processor that takes the mean over the rows.
        key = _digest(batch, ("generate", max_new_tokens, sorted(arguments)))
        return self._once(key, lambda: run(batch, max_new_tokens, arguments))


class _NotedPlain(_Noted, PlainOrderModel):
    pass


class _NotedEnsemble(_Noted, OrderEnsembleModel):
    pass


class _NotedSet(_Noted, SetPromptingModel):
    pass


_NOTED: dict[Any, Any] = {
    PlainOrderModel: _NotedPlain,
    OrderEnsembleModel: _NotedEnsemble,
    SetPromptingModel: _NotedSet,
}


def _digest(batch: SetBatch, facts: Any) -> bytes:
    digest = hashlib.blake2b(repr(facts).encode())
    for name in SetBatch.__dataclass_fields__:
        values = getattr(batch, name).cpu().numpy()
        digest.update(repr(values.shape).encode() + values.tobytes())
    return digest.digest()


# What is asked ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """A prompt as a set, what may be answered, and which of that is right."""

    task: str
    prompt: SetPrompt
    # The options, or the accepted answers where there are none, and as scored behind the prompt.
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    right: tuple[bool, ...]
    generated: bool

    @classmethod
    def of(cls, prompt: Prompt, where: str) -> _Item:
        """Return a prompt's set, or raise `DataError` if there is none or no answer."""
        if not prompt.answers:
            raise DataError(f"{where} has no answers: nobody could tell which reading is right")
        name = "passages" if prompt.passages else "options"
        pieces = prompt.passages or prompt.options
        if len(pieces) < 2:
            found = f"{len(pieces)} {name}" if pieces else "neither options nor passages"
            raise DataError(f"{where} has {found}: a set needs at least 2 pieces")
        before = f"{prompt.document}\n\n" if prompt.document else ""
        if prompt.passages:
            laid = SetPrompt.from_passages(prompt.text, prompt.passages)
        else:
            laid = SetPrompt.from_options(prompt.text, prompt.options)
        laid = replace(laid, prefix=before + laid.prefix)
        answers = prompt.options or prompt.answers
        if prompt.passages:
            candidates = tuple(f" {answer}" for answer in answers)
        else:
            # As they are listed: what a model that takes up the list goes on with.
            candidates = tuple(" " + piece.strip() for piece in map(str, laid.groups[0]))
        right = tuple(answer in prompt.answers for answer in answers)
        return cls(name, laid, answers, candidates, right, not prompt.options)

    def presentations(self, n_orders: int, seed: int) -> list[SetPrompt]:
        """Return the prompt in some orders, which depend on its text and the seed only."""
        listed = self.prompt.sorted()
        message = f"{seed}\0{listed.marked}".encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big")
        return listed.orders(n_orders, random_state=drawn)


@dataclass(frozen=True)
class _Reading:
    """One answer: what it was, whether it is right, and the candidates' log-probabilities."""

    answer: str
    right: bool
    log_probabilities: NDArray[np.float64]
    seconds: float
    n_passes: int


class OrderProblem:
    """How to read pieces that have no order: every prompt in several orders, by each design.

    The set is a prompt's passages, or its options if it has none. Options are answered by the one
    whose tokens, in the quotes of its listing, have the highest mean log-probability behind the
    prompt. With passages, the options are scored without quotes and are not listed; without
    options the answer is generated, up to the end of its first line, and right if it contains an
    accepted one. Prompts with passages and prompts without are two tasks.

    Each seed draws the orders in which prompts are presented, the same for all designs.

    Parameters
    ----------
    prompts
        With answers, and with options or passages.
    model
        A causal language model: packaged name, folder or hub id.
    n_orders
        Orders that each prompt is presented in, at least 2; all, if it has no more.
    max_new_tokens
        Most tokens of an answer that is generated.

    Raises
    ------
    DataError
        If there are fewer than two prompts, one has no answers or fewer than two pieces, or a
        number is too small; in `prepare` and `run`, if a prompt does not fit the model's positions.

    Notes
    -----
    A prompt is presented in its pieces' orders as text: numbers or letters in front of options
    belong to the text, so leave them out.

    The log-probability of an answer is that of the best accepted one; of several passes, their
    mean. One below -100, or that is no number (a model that overflows), counts as -100, and an
    answer chosen when no number was to be had as wrong.

    The prompts are run one at a time, and the seconds of an answer are those of all its passes, one
    after the other. Equal inputs (the same order once more) are run once and charged each time. No
    design is taken to be free of the order: only what the model is given decides what is equal, and
    set-based prompting is run on the listed order unless a design sets ``canonical_order``.

    Examples
    --------
    >>> from bakeoff.data.choices import choice_prompts
    >>> from bakeoff.study import Study
    >>> problem = OrderProblem(choice_prompts("smoke"))
    >>> Study(
    ...     problem, order_designs(), reference="plain-order", seeds=3, directory="runs/order"
    ... ).run()  # doctest: +SKIP
    """

    name = "decoding"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        model: str = "smollm2-135m",
        n_orders: int = 4,
        max_new_tokens: int = 16,
    ) -> None:
        check_prompts(prompts, 2, "orders")
        for name, number, least in (
            ("n_orders", n_orders, 2),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if not _is_number(number) or number < least:
                raise DataError(f"{name} must be a whole number of at least {least}, got {number}")
        self.prompts = tuple(prompts)
        self.model = model
        self.n_orders = n_orders
        self.max_new_tokens = max_new_tokens
        self._items = [
            _Item.of(prompt, f"prompts[{number}] ({_short(prompt.text)})")
            for number, prompt in enumerate(self.prompts)
        ]
        self._loaded = _Loaded()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """How often the answer is right and the same in all orders, how sure, and how long."""
        return ORDER_METRICS

    def fingerprint(self) -> str:
        """Return a digest of prompts, model and settings."""
        facts = {
            "prompts": prompts_fingerprint(self.prompts),
            "model": self._loaded.language_model(self.model).fingerprint,
            "n_orders": self.n_orders,
            "max_new_tokens": self.max_new_tokens if self._generates else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def _generates(self) -> bool:
        return any(item.generated for item in self._items)

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        tasks = [item.task for item in self._items]
        facts: dict[str, object] = {
            "question": QUESTION,
            "data": {
                task: f"{tasks.count(task):,} prompts, {_pieces(self._items, task)}"
                for task in dict.fromkeys(tasks)
            },
            "orders per prompt": self.n_orders,
            "language model": self.model,
        }
        if self._generates:
            facts["generated answers"] = f"at most {self.max_new_tokens} tokens, one line"
        return facts

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        _check_design(Design(method, method))
        return _VERSION

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here: unknown method or parameter."""
        _check_design(design)
        several = design.method in ("permute-and-vote", "average-over-orders")
        if several and design.params.get("n_orders") is None:
            most = max(item.prompt.n_orders for item in self._items)
            if most > _MOST_ORDERS:
                raise DataError(
                    f"design {design.name!r}: a prompt's pieces have {most:,} orders; set "
                    f"n_orders, at most {_MOST_ORDERS:,} are run"
                )

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs, and that every prompt fits the model."""
        for design in designs:
            self.check(design)
        work.progress(0.0, "loading the model")
        self._ready()
        work.progress(1.0, "loading the model")

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Answer every prompt in every presented order with one design."""
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        language_model = self._ready()
        kind, own, arguments = order_parts(design.method, design.params, seed)
        if kind is SetPromptingModel:
            # Sorted pieces would be equal input: that the order makes no difference is to be seen.
            arguments = {"canonical_order": False, **arguments}
        reader = _NOTED[kind](language_model, passes=self._loaded.passes, **own)
        report = counting(work.progress, "answering")
        readings = []
        for number, item in enumerate(self._items):
            readings.append(
                [
                    self._read(reader, arguments, item, order)
                    for order in item.presentations(self.n_orders, seed)
                ]
            )
            report(number + 1, len(self._items))
        scores: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in ORDER_METRICS}
        per_prompt = [_scores(item, each) for item, each in zip(self._items, readings, strict=True)]
        for task in dict.fromkeys(item.task for item in self._items):
            rows = [n for n, item in enumerate(self._items) if item.task == task]
            for name in ORDER_METRICS:
                scores[name][task] = np.array([per_prompt[row][name] for row in rows])
        answers = [
            {"prompt": prompt.text, "answers": [reading.answer for reading in each]}
            for prompt, each in zip(self.prompts, readings, strict=True)
        ]
        write_text(work.directory / "answers.json", json.dumps(answers, indent=1))
        passes = [reading.n_passes for each in readings for reading in each]
        differences = [scored["spread"] for scored in per_prompt]
        return Trial(
            scores=scores,
            cost={"passes_per_answer": float(np.mean(passes))},
            artifact=work.directory,
            notes=(
                "Between the orders of a prompt, log-probabilities per token differ by "
                f"{np.median(differences):.1e} nats (median) and at most {max(differences):.1e}.",
            ),
        )

    def _read(self, reader: Any, arguments: Any, item: _Item, order: SetPrompt) -> _Reading:
        """Answer one presentation."""
        if item.generated:
            (text,), passes = reader.noting(
                lambda: reader.generate(
                    [order], max_new_tokens=self.max_new_tokens, random_state=0, **arguments
                )
            )
            answer = _first_line(text)
            right = any(_contains(answer, reference) for reference in item.answers)
            _, scored = reader.noting(lambda: reader.score([order], [item.candidates], **arguments))
        else:
            best, passes = reader.noting(
                lambda: reader.predict([order], [item.candidates], **arguments)
            )
            answer, right = item.answers[best[0]], item.right[best[0]]
            scored = passes
        every = np.stack([each.result[0] for each in scored])
        if not item.generated and not np.isfinite(every).any():
            right = False
        means = np.nan_to_num(every, nan=_LOWEST, neginf=_LOWEST).clip(min=_LOWEST).mean(axis=0)
        return _Reading(answer, right, means, sum(each.seconds for each in passes), len(passes))

    def _ready(self) -> LanguageModel:
        """Load the model once per process, check that all prompts fit, and warm up."""
        language_model = self._loaded.language_model(self.model)
        if not self._loaded.fits:
            self._check_lengths(language_model)
            # The first passes of a process allocate memory and probe the model; nobody's answer.
            first = self._items[0]
            for kind in (PlainOrderModel, SetPromptingModel):
                kind(language_model, batch_size=1).score([first.prompt], [first.candidates])
            self._loaded.fits = True
        return language_model

    def _check_lengths(self, language_model: LanguageModel) -> None:
        def count(text: str) -> int:
            return len(language_model.tokenizer(text, add_special_tokens=False)["input_ids"])

        limit = language_model.max_length
        special = len(language_model.tokenizer("")["input_ids"])
        for number, item in enumerate(self._items):
            laid = item.prompt
            # The whole and its parts have other tokens; designs read either.
            apart = sum(map(count, (laid.prefix, *map(str, laid.groups[0]), laid.suffix)))
            answer = max(map(count, item.candidates))
            if item.generated:
                answer = max(answer, self.max_new_tokens)
            needed = special + max(apart, count(laid.text)) + answer
            if needed > limit:
                raise DataError(
                    f"prompts[{number}] ({_short(self.prompts[number].text)}) needs {needed:,} "
                    f"positions with its answer, {self.model} has {limit:,}: shorten it or leave "
                    "it out"
                )

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a design's settings, and its answers of the trial.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder, with ``answers.json``.
        destination
            The folder to write: ``decoder.json``, ``README.md`` and ``answers.json``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            False: the settings need bakeoff.
        """
        settings = Settings(design.name, design.method, dict(design.params), self.model)
        save_settings(destination, settings, usage=_usage(settings), reason=reason)
        shutil.copyfile(artifact / "answers.json", destination / "answers.json")
        return False

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that answer with the settings of a folder that `export` wrote."""
        return _usage(load_settings(destination))


def _scores(item: _Item, readings: Sequence[_Reading]) -> dict[str, float]:
    """Return one prompt's scores from its readings in several orders."""
    right = [reading.right for reading in readings]
    every = np.stack([reading.log_probabilities for reading in readings])
    return {
        "accuracy": float(np.mean(right)),
        "every_order": float(all(right)),
        "consistency": float(len({reading.answer for reading in readings}) == 1),
        "log_probability": float(every[:, np.array(item.right)].max(axis=1).mean()),
        "spread": float(np.ptp(every, axis=0).max()),
        "seconds": float(np.mean([reading.seconds for reading in readings])),
    }


def _usage(settings: Settings) -> list[str]:
    kind, own, arguments = order_parts(settings.method, settings.params, 0)
    options = "".join(f", {name}={value!r}" for name, value in own.items())
    passed = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return [
        f"from bakeoff.decoding import {kind.__name__}, SetPrompt",
        "from bakeoff.models import load_language_model",
        "",
        f"reader = {kind.__name__}(load_language_model({settings.model!r}){options})",
        'choice = SetPrompt.from_options("Which of these is a fruit?", ["oak", "fig"])',
        f"best = reader.predict([choice], [' \"oak\"', ' \"fig\"']{passed})",
        'found = SetPrompt.from_passages("Who wrote it?", ["Ann wrote it.", "It is blue."])',
        f"answers = reader.generate([found], max_new_tokens=20{passed})",
    ]


def _check_design(design: Design) -> None:
    check_method(design, ORDER_PARAMETERS, QUESTION)
    accepted = ORDER_PARAMETERS[design.method]
    check_parameters(design, accepted)
    for name, value in design.params.items():
        if accepted[name] == "a boolean":
            fits = isinstance(value, bool)
        else:
            fits = value is None or (_is_number(value) and value >= 1)
        if not fits:
            raise DataError(
                f"design {design.name!r}: {name} must be {accepted[name]}, got {value!r}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _pieces(items: Sequence[_Item], task: str) -> str:
    counts = sorted({len(item.prompt.groups[0]) for item in items if item.task == task})
    some = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{some} {task} each"


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return normalise(lines[0]) if lines else ""


def _contains(answer: str, reference: str) -> bool:
    """Say whether an answer has the reference's words in a row, whatever the case and marks."""
    sought = re.findall(r"\w+", normalise(reference))
    if not sought:  # nothing but marks
        return normalise(reference) in normalise(answer)
    words = re.findall(r"\w+", normalise(answer))
    starts = range(len(words) - len(sought) + 1)
    return any(words[start : start + len(sought)] == sought for start in starts)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
