"""Language-model cascades: a small model answers, and a large one is asked where it is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.base import clone

from bakeoff.decoding.deferral_curves import (
    DeferralCurve,
    Estimate,
    FloatArray,
    OperatingPoint,
    checked_qualities,
    choose_threshold,
    deferral_auc,
    deferral_curve,
)
from bakeoff.decoding.deferral_rules import (
    ChowAverage,
    ChowSum,
    DeferralRule,
    LengthScore,
    PostHocDeferral,
    QuantileScore,
    RandomDeferral,
    load_rule,
    read_arrays,
    rule_of,
    write_arrays,
)
from bakeoff.decoding.token_records import TextGenerator, TokenRecord, from_generate
from bakeoff.errors import DataError

METHOD = {
    "slug": "cascades",
    "title": "Deferral by token-level uncertainty",
    "paper": "Gupta et al., Language Model Cascades: Token-level uncertainty and beyond, "
    "ICLR 2024, arXiv 2404.10136",
    "designs": ["chow-quantile", "post-hoc-quantile", "post-hoc-embed"],
    "names": [
        "Cascade",
        "PostHocDeferral",
        "QuantileScore",
        "ChowSum",
        "ChowAverage",
        "LengthScore",
        "TextGenerator",
        "TokenRecord",
        "deferral_auc",
        "cost_saved",
        "choose_threshold",
    ],
}

__all__ = [
    "Cascade",
    "CascadeAnswers",
    "CascadeEvaluation",
    "CascadeExamples",
    "ChowAverage",
    "ChowSum",
    "DeferralRule",
    "LengthScore",
    "PostHocDeferral",
    "QuantileScore",
    "RandomDeferral",
    "TextGenerator",
    "TokenRecord",
    "exact_match",
    "from_generate",
    "load_rule",
]

Progress = Callable[[int, int], None]
Quality = Callable[[str, Any], float]

# A rate this unlikely under the calibrated one is not chance.
_DRIFT = 1e-3
_LEAST_FOR_DRIFT = 50


def exact_match(text: str, reference: str | Sequence[str]) -> float:
    """Return 1 if the text is the reference, or one of several, white space around it aside.

    Examples
    --------
    >>> exact_match(" Paris ", ["Paris", "paris"]), exact_match("Lyon", "Paris")
    (1.0, 0.0)
    """
    accepted = [reference] if isinstance(reference, str) else reference
    return float(text.strip() in {str(one).strip() for one in accepted})


@dataclass(frozen=True, eq=False)
class CascadeExamples:
    """Queries that both models have answered, with the quality of the answers.

    Parameters
    ----------
    prompts
        n texts.
    small, large
        n records each.
    q_small, q_large
        Qualities ``(n,)``, higher is better.

    Raises
    ------
    DataError
        If lengths differ or a quality is not finite.
    """

    prompts: tuple[str, ...]
    small: tuple[TokenRecord, ...]
    large: tuple[TokenRecord, ...]
    q_small: FloatArray
    q_large: FloatArray

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if n == 0 or len(self.small) != n or len(self.large) != n:
            raise DataError(
                "prompts, small and large must be as many and not empty, got "
                f"{n}, {len(self.small)} and {len(self.large)}"
            )
        for name in ("q_small", "q_large"):
            object.__setattr__(self, name, checked_qualities(name, getattr(self, name), n))

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: ArrayLike) -> CascadeExamples:
        """Return the examples at `rows`, integers or a mask."""
        found = np.arange(len(self))[np.asarray(rows)]
        return CascadeExamples(
            tuple(self.prompts[row] for row in found),
            tuple(self.small[row] for row in found),
            tuple(self.large[row] for row in found),
            self.q_small[found],
            self.q_large[found],
        )


@dataclass(frozen=True)
class CascadeAnswer:
    """One answer of a cascade.

    Parameters
    ----------
    text
        The answer.
    answered_by
        Which model gave it.
    score
        The rule's score of the small model's answer.
    cost
        What both models together cost; NaN if unknown.
    """

    text: str
    answered_by: Literal["small", "large"]
    score: float
    cost: float


@dataclass(frozen=True, eq=False)
class CascadeAnswers(Sequence[CascadeAnswer]):
    """What `Cascade.generate` returns: a sequence of answers in the order of the prompts.

    Parameters
    ----------
    answers
        One for each prompt.
    """

    answers: tuple[CascadeAnswer, ...]

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: Any) -> Any:
        return self.answers[index]

    def __iter__(self) -> Iterator[CascadeAnswer]:
        return iter(self.answers)

    @property
    def texts(self) -> list[str]:
        """The answers' texts."""
        return [answer.text for answer in self.answers]

    @property
    def scores(self) -> FloatArray:
        """Scores ``(n,)``."""
        return np.array([answer.score for answer in self.answers])

    @property
    def costs(self) -> FloatArray:
        """Costs ``(n,)``."""
        return np.array([answer.cost for answer in self.answers])

    @property
    def deferred(self) -> NDArray[np.bool_]:
        """Whether the large model answered, ``(n,)``."""
        return np.array([answer.answered_by == "large" for answer in self.answers])

    @property
    def rate(self) -> float:
        """The realised share of deferred queries."""
        return float(self.deferred.mean())


@dataclass(frozen=True)
class CascadeEvaluation:
    """How a fitted cascade does on examples that it was not fitted to.

    Parameters
    ----------
    curve
        The rule's deferral curve.
    auc
        The area under it, with an interval.
    versus_random
        The area's lead over deferral at random, paired, with an interval.
    point
        What the chosen threshold comes to here: rate, mean quality and mean cost.
    """

    curve: DeferralCurve
    auc: Estimate
    versus_random: Estimate
    point: OperatingPoint


class Cascade:
    """A small model that answers, and a large one that is asked where a rule says so.

    Parameters
    ----------
    small, large
        Each one of: a `bakeoff.models.LanguageModel`; a pair (transformers model, tokenizer); a
        `TextGenerator`; any function from a list of prompts to as many answers. Answers of the
        large model are texts or `TokenRecord` objects; those of the small one must be records, with
        text and log-probabilities. The large model gets the prompts as text, so that tokenizers
        may differ.
    rule
        A deferral rule; `fit` works on a clone. By default the least certain token decides.
    quality
        ``quality(text, reference)``, higher is better.
    target_rate, target_cost, target_quality
        What the threshold aims at; at most one. A largest share of queries to defer; a largest
        mean cost per query; a least mean quality, a number or ``"large"``, the large model's own.
        None of them: ``target_quality="large"``, at the smallest rate.
    confidence
        With a number as `target_quality`: how sure to be of it; see `choose_threshold`.
    small_cost, large_cost
        Cost of an answer, in one unit of your choice. By default what the records say: transformers
        models count floating-point operations.
    chunk_size
        Prompts that are handed to a model at once.

    Attributes
    ----------
    rule_ : DeferralRule
        The fitted rule.
    threshold_ : float
        Queries whose score is above it are deferred.
    point_ : OperatingPoint
        What the calibration data say about the threshold.

    Raises
    ------
    DataError
        If a model is none of these, or more than one target is given.

    References
    ----------
    Neha Gupta, Harikrishna Narasimhan, Wittawat Jitkrittum, Ankit Singh Rawat, Aditya Krishna
    Menon and Sanjiv Kumar. "Language model cascades: token-level uncertainty and beyond".
    ICLR 2024. arXiv:2404.10136.

    Examples
    --------
    >>> def small(prompts):  # knows sums of small numbers, and knows that it knows
    ...     sure = [len(prompt) < 4 for prompt in prompts]
    ...     return [
    ...         TokenRecord(np.log([0.9 if s else 0.4]), text=str(eval(p)) if s else "9")
    ...         for s, p in zip(sure, prompts)
    ...     ]
    >>> def large(prompts):
    ...     return [str(eval(prompt)) for prompt in prompts]
    >>> calibration = [("1+1", "2"), ("2+5", "7"), ("11+12", "23"), ("40+2", "42")]
    >>> cascade = Cascade(small, large, QuantileScore(0.0), small_cost=1, large_cost=10)
    >>> cascade.fit(calibration).point_.cost
    6.0
    >>> [(a.text, a.answered_by) for a in cascade.generate(["3+4", "20+30"])]
    [('7', 'small'), ('50', 'large')]
    """

    def __init__(
        self,
        small: Any,
        large: Any,
        rule: DeferralRule | None = None,
        *,
        quality: Quality = exact_match,
        target_rate: float | None = None,
        target_cost: float | None = None,
        target_quality: float | Literal["large"] | None = None,
        confidence: float | None = None,
        small_cost: float | None = None,
        large_cost: float | None = None,
        chunk_size: int = 64,
    ) -> None:
        self.rule = QuantileScore(0.0) if rule is None else rule
        if not isinstance(self.rule, DeferralRule):
            raise DataError(f"rule must be a DeferralRule, got {type(rule).__name__}")
        if chunk_size < 1:
            raise DataError(f"chunk_size must be at least 1, got {chunk_size!r}")
        self.small = _as_generator("small", small, embeddings=self.rule.needs_embeddings)
        self.large = _as_generator("large", large, embeddings=False)
        self.quality = quality
        self.small_cost = _checked_cost("small_cost", small_cost)
        self.large_cost = _checked_cost("large_cost", large_cost)
        self.chunk_size = chunk_size
        self.targets: dict[str, Any] = _targets(
            target_rate, target_cost, target_quality, confidence
        )

    # Fitting --------------------------------------------------------------------------------------

    def collect(
        self,
        pairs: Sequence[tuple[str, Any]],
        *,
        progress: Progress | None = None,
        **generation: Any,
    ) -> CascadeExamples:
        """Let both models answer labelled queries.

        Parameters
        ----------
        pairs
            (prompt, reference) each; `quality` knows what a reference is.
        progress
            Called with (answers, answers in total), two per query.
        **generation
            Passed on to both models.

        Returns
        -------
        CascadeExamples
            For `fit` or `evaluate`, of this cascade or of one with another rule. Split it for both.
        """
        rows = list(pairs)
        if not rows or any(isinstance(row, str) or len(row) != 2 for row in rows):
            raise DataError("pairs must be a non-empty sequence of (prompt, reference)")
        prompts = [row[0] for row in rows]
        done = 0
        answers: dict[str, list[TokenRecord]] = {"small": [], "large": []}
        for start in range(0, len(prompts), self.chunk_size):
            chunk = prompts[start : start + self.chunk_size]
            for name, found in answers.items():
                found += self._ask(name, chunk, generation)
                done += len(chunk)
                if progress is not None:
                    progress(done, 2 * len(prompts))
        qualities = {
            name: np.array(
                [
                    float(self.quality(answer.text or "", reference))
                    for answer, (_, reference) in zip(found, rows, strict=True)
                ]
            )
            for name, found in answers.items()
        }
        return CascadeExamples(
            tuple(prompts),
            tuple(answers["small"]),
            tuple(answers["large"]),
            qualities["small"],
            qualities["large"],
        )

    def fit(
        self,
        calibration: CascadeExamples | Sequence[tuple[str, Any]],
        *,
        progress: Progress | None = None,
        **generation: Any,
    ) -> Self:
        """Fit the rule and choose the threshold.

        Parameters
        ----------
        calibration
            (prompt, reference) pairs, which both models then answer, or what `collect` made of
            them. Neither model should have been trained on them.
        progress, **generation
            As for `collect`.

        Raises
        ------
        DataError
            If the rule cannot be fitted or the target not be reached; says what can.
        """
        examples = (
            calibration
            if isinstance(calibration, CascadeExamples)
            else self.collect(calibration, progress=progress, **generation)
        )
        self.rule_ = clone(self.rule).fit(examples.small, examples.q_small, examples.q_large)
        self.costs_ = self._costs(examples)
        self.choose_threshold(**self.targets)
        return self

    def choose_threshold(
        self,
        *,
        target_rate: float | None = None,
        target_cost: float | None = None,
        target_quality: float | Literal["large"] | None = None,
        confidence: float | None = None,
    ) -> OperatingPoint:
        """Aim at another target with the calibration data of `fit`; returns the new `point_`.

        Parameters
        ----------
        target_rate, target_cost, target_quality, confidence
            As in the constructor.
        """
        if not hasattr(self, "rule_"):
            raise DataError("this Cascade is not fitted: call fit first")
        targets = _targets(target_rate, target_cost, target_quality, confidence)
        known = not np.isnan(self.costs_).any()
        if targets["target_cost"] is not None and not known:
            raise DataError(
                "target_cost needs costs: give small_cost and large_cost, or records with a cost"
            )
        self.point_ = choose_threshold(
            self.rule_.calibration_scores_,
            self.rule_.q_small_,
            self.rule_.q_large_,
            small_costs=self.costs_[0] if known else None,
            large_costs=self.costs_[1] if known else None,
            budget=targets["target_rate"],
            max_cost=targets["target_cost"],
            min_quality=targets["target_quality"],
            confidence=targets["confidence"],
        )
        self.threshold_ = self.point_.threshold
        self.targets = targets
        return self.point_

    def evaluate(
        self,
        examples: CascadeExamples | Sequence[tuple[str, Any]],
        *,
        confidence: float = 0.95,
        progress: Progress | None = None,
        **generation: Any,
    ) -> CascadeEvaluation:
        """Return the deferral curve and what the threshold comes to, on examples kept aside.

        Parameters
        ----------
        examples
            As for `fit`, but others.
        confidence
            Of the intervals of the areas.
        progress, **generation
            As for `collect`.
        """
        self._check_fitted()
        if not isinstance(examples, CascadeExamples):
            examples = self.collect(examples, progress=progress, **generation)
        scores = self.rule_.score(examples.small)
        sides = (scores, examples.q_small, examples.q_large)
        deferred = scores > self.threshold_
        cheap, dear = self._costs(examples)
        return CascadeEvaluation(
            curve=deferral_curve(*sides),
            auc=deferral_auc(*sides, confidence=confidence),
            versus_random=deferral_auc(*sides, versus="random", confidence=confidence),
            point=OperatingPoint(
                self.threshold_,
                float(deferred.mean()),
                float(np.where(deferred, examples.q_large, examples.q_small).mean()),
                float((cheap + np.where(deferred, dear, 0.0)).mean()),
            ),
        )

    # Answering ------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[str], *, progress: Progress | None = None, **generation: Any
    ) -> CascadeAnswers:
        """Answer prompts; the large model sees only those that the rule defers.

        Parameters
        ----------
        prompts
            Texts.
        progress
            Called with (prompts answered, prompts in total).
        **generation
            Passed on to both models, say ``max_new_tokens=50``.

        Returns
        -------
        CascadeAnswers
            Texts, who answered, scores, costs and the realised rate.

        Warns
        -----
        UserWarning
            If, over 50 prompts or more, the rate differs from the calibrated one by more than
            chance: the queries are of another kind.

        Raises
        ------
        DataError
            If `fit` has not been called, or a model's answers are not acceptable.
        """
        self._check_fitted()
        if isinstance(prompts, str):
            raise DataError("prompts must be a sequence of texts, got one text")
        prompts = list(prompts)
        answers: list[CascadeAnswer] = []
        for start in range(0, len(prompts), self.chunk_size):
            chunk = prompts[start : start + self.chunk_size]
            answers += self._answer(chunk, generation)
            if progress is not None:
                progress(len(answers), len(prompts))
        found = CascadeAnswers(tuple(answers))
        self._check_rate(found)
        return found

    def _answer(self, prompts: list[str], generation: dict[str, Any]) -> list[CascadeAnswer]:
        small = self._ask("small", prompts, generation)
        scores = self.rule_.score(small)
        deferred = np.flatnonzero(scores > self.threshold_)
        large: dict[int, TokenRecord] = {}
        if deferred.size:
            asked = self._ask("large", [prompts[row] for row in deferred], generation)
            large = dict(zip(deferred.tolist(), asked, strict=True))
        answers = []
        for row, record in enumerate(small):
            chosen = large.get(row, record)
            cost = _cost_of(record, self.small_cost)
            if row in large:
                cost += _cost_of(chosen, self.large_cost)
            who: Literal["small", "large"] = "large" if row in large else "small"
            answers.append(CascadeAnswer(chosen.text or "", who, float(scores[row]), cost))
        return answers

    def _ask(self, name: str, prompts: list[str], generation: dict[str, Any]) -> list[TokenRecord]:
        answers = list(getattr(self, name)(prompts, **generation))
        if len(answers) != len(prompts):
            raise DataError(
                f"the {name} model gave {len(answers)} answers to {len(prompts)} prompts"
            )
        records = []
        for answer in answers:
            if isinstance(answer, str) and name == "large":
                answer = TokenRecord(np.empty(0), text=answer)
            if not isinstance(answer, TokenRecord):
                raise DataError(
                    f"the {name} model must return "
                    + ("texts or " if name == "large" else "")
                    + f"TokenRecord objects, got {type(answer).__name__}"
                )
            if answer.text is None:
                raise DataError(f"the {name} model gave a record without text")
            records.append(answer)
        return records

    def _costs(self, examples: CascadeExamples) -> FloatArray:
        """Return costs ``(2, n)`` of both models' answers."""
        return np.array(
            [
                [_cost_of(record, self.small_cost) for record in examples.small],
                [_cost_of(record, self.large_cost) for record in examples.large],
            ]
        )

    def _check_fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise DataError("this Cascade is not fitted: call fit first")

    def _check_rate(self, answers: CascadeAnswers) -> None:
        if len(answers) < _LEAST_FOR_DRIFT or math.isinf(self.threshold_):
            return
        n_before = self.costs_.shape[1]
        before, now = round(self.point_.rate * n_before), int(answers.deferred.sum())
        table = np.array([[now, len(answers) - now], [before, n_before - before]])
        if stats.fisher_exact(table).pvalue < _DRIFT:
            warnings.warn(
                f"{answers.rate:.1%} of the queries were deferred, where the calibration data had "
                f"{self.point_.rate:.1%}: these queries are of another kind, so that the target "
                "may be missed; calibrate anew on queries like these",
                stacklevel=3,
            )

    # Files ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write rule, threshold and calibration figures to one safetensors file, not the models.

        Raises
        ------
        DataError
            If `fit` has not been called, or the rule cannot be saved.
        """
        self._check_fitted()
        state = {
            "kind": "cascade",
            "rule": self.rule_.state(),
            "targets": self.targets,
            "small_cost": self.small_cost,
            "large_cost": self.large_cost,
        }
        # JSON has no infinity, and a threshold must come back to the last bit.
        arrays = {"cascade.costs": self.costs_, "cascade.point": np.array(self.point_)}
        write_arrays(Path(path), state, {**self.rule_.arrays(), **arrays})

    @classmethod
    def load(
        cls,
        path: str | Path,
        small: Any,
        large: Any,
        *,
        quality: Quality = exact_match,
        chunk_size: int = 64,
    ) -> Cascade:
        """Return the fitted cascade that `save` wrote, around models that you give.

        Parameters
        ----------
        path
            The file.
        small, large
            The models, as in the constructor; the same as before, or thresholds mean nothing.
        quality, chunk_size
            As in the constructor.

        Raises
        ------
        DataError
            If the file is another kind of file.
        """
        state, arrays = read_arrays(Path(path))
        if state.get("kind") != "cascade":
            raise DataError(f"{path} holds no cascade; load_rule reads rules")
        rule = rule_of(state["rule"], arrays, path)
        costs = {name: state[name] for name in ("small_cost", "large_cost")}
        options = {**costs, **state["targets"], "quality": quality, "chunk_size": chunk_size}
        cascade = cls(small, large, rule, **options)
        cascade.rule_ = rule
        cascade.costs_ = arrays["cascade.costs"]
        cascade.point_ = OperatingPoint(*(float(value) for value in arrays["cascade.point"]))
        cascade.threshold_ = cascade.point_.threshold
        return cascade


def _as_generator(name: str, model: Any, *, embeddings: bool) -> Callable[..., Any]:
    if isinstance(model, TextGenerator):
        if embeddings and not model.embeddings:
            raise DataError(
                f"the rule reads embeddings: make {name} with TextGenerator(..., embeddings=True)"
            )
        return model
    if isinstance(model, tuple) and len(model) == 2:
        return TextGenerator(*model, embeddings=embeddings)
    if hasattr(model, "generate") or hasattr(getattr(model, "model", None), "generate"):
        return TextGenerator(model, embeddings=embeddings)
    if callable(model):
        return model  # type: ignore[no-any-return]
    raise DataError(
        f"{name} must be a LanguageModel, a pair (model, tokenizer), a TextGenerator or a function "
        f"from prompts to answers, got {type(model).__name__}"
    )


def _targets(
    rate: float | None,
    cost: float | None,
    quality: float | Literal["large"] | None,
    confidence: float | None,
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "target_rate": rate,
        "target_cost": cost,
        "target_quality": quality,
    }
    if sum(value is not None for value in given.values()) > 1:
        raise DataError(f"give at most one of {', '.join(given)}")
    if all(value is None for value in given.values()):
        given["target_quality"] = "large"
    numbers = {
        name: value if value is None or value == "large" else float(value)
        for name, value in {**given, "confidence": confidence}.items()
    }
    return numbers


def _checked_cost(name: str, cost: float | None) -> float | None:
    if cost is not None and not (math.isfinite(cost) and cost >= 0):
        raise DataError(f"{name} must be a number that is not negative, got {cost!r}")
    return None if cost is None else float(cost)


def _cost_of(record: TokenRecord, fixed: float | None) -> float:
    return record.cost if fixed is None else fixed
