"""When to ask the larger model: how rules of a cascade are tried out.

Both models answer every prompt once; the answers are kept, and each design is a rule that says from
the small model's answer whether the large one is asked. Rules are cross-fitted: a seed deals the
prompts into parts, and each part is ranked by a rule that was fitted to the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bakeoff._files import build_once, cache_directory
from bakeoff.data.prompts import Prompt, prompts_fingerprint
from bakeoff.data.spellings import Size, spelling_prompts, spelling_texts
from bakeoff.decoding.cascades import Cascade, CascadeExamples, exact_match
from bakeoff.decoding.deferral_curves import choose_threshold, deferral_curve
from bakeoff.decoding.deferral_rules import (
    ChowAverage,
    ChowSum,
    DeferralRule,
    LengthScore,
    PostHocDeferral,
    QuantileScore,
    RandomDeferral,
    read_arrays,
    write_arrays,
)
from bakeoff.decoding.problem.common import check_prompts
from bakeoff.decoding.token_records import TextGenerator, TokenRecord
from bakeoff.decoding.winner import Settings, load_settings, save_settings
from bakeoff.errors import DataError
from bakeoff.models import small_gpt
from bakeoff.models.shared import SharedModels
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.measure import warnings_noted

FloatArray = NDArray[np.float64]
Which = Literal["small", "large"]
QualityName = Literal["exact-match", "edit-similarity", "contains"]

CASCADE_METRICS: dict[str, Metric] = {
    "area": Metric("area under the deferral curve", margin=0.005),
    "quality": Metric("quality at the target rate", margin=0.01),
    "cost": Metric(
        "cost at the target rate (large model alone = 1)", higher_is_better=False, margin=0.01
    ),
}

QUESTION = "when to ask the larger model"
CASCADE_FILE = "cascade.safetensors"
"""The fitted rule and its threshold, in the folder of a trial and of a winner."""

# Levels among which `alpha="chosen"` chooses on the calibration data.
ALPHAS = tuple(float(level) for level in np.linspace(0.0, 1.0, 21).round(2))

_LEARNED = {
    "post-hoc-quantile": ("quantiles", "sum", "mean", "length"),
    "post-hoc-embed": ("quantiles", "sum", "mean", "length", "embedding"),
}
_ALONE: dict[str, Which] = {"small-only": "small", "large-only": "large"}
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "random": (),
    "small-only": (),
    "large-only": (),
    "length": (),
    "chow-sum": (),
    "chow-average": (),
    "chow-quantile": ("alpha",),
    "post-hoc-quantile": ("features", "target", "estimator", "folds"),
    "post-hoc-embed": ("features", "target", "estimator", "folds", "n_components"),
    "oracle": (),
}
_LEAST_TO_LEARN = 50
# Raise when a trial's scores change, or what is kept of an answer.
_VERSION = 1
_ANSWERS_VERSION = 1
# Prompts that are answered, and kept, at once: what an interruption can lose.
_CHUNK = 256


def cascade_designs() -> Designs:
    """Return the published rules of deferral, their variants, and the sceptic's.

    Examples
    --------
    >>> [design.name for design in cascade_designs()][:5]
    ['random', 'small-only', 'large-only', 'length', 'chow-sum']
    """
    names = "random small-only large-only length chow-sum chow-average"
    return Designs(
        [
            *(Design(name, name) for name in names.split()),
            Design("chow-quantile 0", "chow-quantile", {"alpha": 0.0}),
            Design("chow-quantile 0.1", "chow-quantile", {"alpha": 0.1}),
            Design("chow-quantile 0.5", "chow-quantile", {"alpha": 0.5}),
            Design("chow-quantile, chosen", "chow-quantile", {"alpha": "chosen"}),
            Design("post-hoc-quantile", "post-hoc-quantile"),
            Design("post-hoc-quantile, error", "post-hoc-quantile", {"target": "small_error"}),
            Design("post-hoc-embed", "post-hoc-embed"),
            Design("post-hoc-embed, error", "post-hoc-embed", {"target": "small_error"}),
        ]
    )


def default_cascade_problem(size: Size = "demo", **options: Any) -> CascadeProblem:
    """Return a problem that any machine can have: two decoders trained to read things aloud.

    Parameters
    ----------
    size
        Of `bakeoff.data.spellings`: ``"smoke"`` (seconds), ``"demo"`` (training takes some six
        minutes on one core, once) or ``"full"``.
    **options
        Of `CascadeProblem`, other than prompts and models.

    Returns
    -------
    CascadeProblem
        Quality is ``"edit-similarity"`` unless said otherwise.

    Examples
    --------
    >>> problem = default_cascade_problem("smoke", folds=4)
    >>> problem.describe()["data"]
    '240 prompts with accepted answers'
    """
    small, large = DECODERS[size]
    settings: dict[str, Any] = {"quality": "edit-similarity", "max_new_tokens": 24}
    return CascadeProblem(
        spelling_prompts(size),
        small=small,
        large=large,
        training_texts=spelling_texts(size),
        **{**settings, "batch_size": 64, **options},
    )


def _decoder(n_layers: int, width: int, steps: int, learning_rate: float) -> SmallGPT:
    # Rows hold some four texts, so that few digits of others stand before a prompt.
    return SmallGPT(
        vocabulary=512,
        n_layers=n_layers,
        width=width,
        n_heads=4,
        context=64,
        steps=steps,
        batch_size=8,
        learning_rate=learning_rate,
    )


# The same texts and steps for both; the wider the model, the lower the rate.
DECODERS: dict[Size, tuple[SmallGPT, SmallGPT]] = {
    "smoke": (_decoder(1, 64, 100, 1e-3), _decoder(3, 96, 100, 1e-3)),
    "demo": (_decoder(2, 80, 1_800, 1e-3), _decoder(3, 208, 1_800, 5e-4)),
    "full": (_decoder(2, 80, 9_000, 1e-3), _decoder(3, 208, 9_000, 5e-4)),
}
"""The smaller and the larger decoder of `default_cascade_problem`."""


# Units --------------------------------------------------------------------------------------------


def area_units(scores: ArrayLike, q_small: ArrayLike, q_large: ArrayLike) -> FloatArray:
    """Return what each prompt brings to the area under the deferral curve.

    Parameters
    ----------
    scores, q_small, q_large
        As for `bakeoff.decoding.deferral_curves`, ``(n,)`` each.

    Returns
    -------
    numpy.ndarray
        float64 ``(n,)`` with the area as its mean.

    Notes
    -----
    A prompt that begins to be deferred at rate ``r`` is answered by the small model below it and by
    the large one above: ``r * q_small + (1 - r) * q_large``, ``r`` being the share of prompts ahead
    of it, equal scores and its own counted half. The mean of that is the area. But a prompt moves
    the area a second time, since its rank pushes others down the queue: by the gaps of the prompts
    ahead of it, minus their average. That has mean 0 and is added, so that the spread of the units
    says how much the area would vary with other prompts; without it intervals of a difference
    between two rules would be wrong.

    Examples
    --------
    >>> float(area_units([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1], [1, 1, 1, 1]).mean())
    0.875
    """
    s = np.asarray(scores, dtype=np.float64)
    small = np.asarray(q_small, dtype=np.float64)
    large = np.asarray(q_large, dtype=np.float64)
    rate = (stats.rankdata(-s) - 0.5) / len(s)
    gap = large - small
    _, group = np.unique(-s, return_inverse=True)
    sums = np.bincount(group, weights=gap)
    ahead = (np.cumsum(sums) - 0.5 * sums)[group] / len(s)
    units: FloatArray = rate * small + (1 - rate) * large + ahead - ahead.mean()
    return units


def deferred_shares(scores: ArrayLike, rate: float) -> FloatArray:
    """Return how likely each prompt is to be deferred when the share `rate` is.

    Parameters
    ----------
    scores
        ``(n,)``: the higher, the sooner.
    rate
        In [0, 1].

    Returns
    -------
    numpy.ndarray
        float64 ``(n,)`` in [0, 1], with mean `rate`: 0 or 1, but for prompts whose score is that of
        the last one deferred; they share what is left.

    Examples
    --------
    >>> deferred_shares([3.0, 2.0, 2.0, 1.0], 0.5).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    s = np.asarray(scores, dtype=np.float64)
    _, group, sizes = np.unique(-s, return_inverse=True, return_counts=True)
    before = (np.cumsum(sizes) - sizes)[group]
    shares: FloatArray = np.clip((rate * len(s) - before) / sizes[group], 0.0, 1.0)
    return shares


def edit_similarity(text: str, accepted: Sequence[str]) -> float:
    """Return 1 minus the edit distance in words per word of the longer text, for the best answer.

    Examples
    --------
    >>> edit_similarity("twenty past four", ["twenty past five"])
    0.6666666666666667
    """
    return max(_similarity(text.split(), answer.split()) for answer in accepted)


def _similarity(one: list[str], other: list[str]) -> float:
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, against in enumerate(other, 1):
            changed = diagonal + (word != against)
            diagonal = row[j]
            row[j] = min(changed, row[j] + 1, row[j - 1] + 1)
    return 1.0 - row[-1] / longest


def contains_answer(text: str, accepted: Sequence[str]) -> float:
    """Return 1 if an accepted answer occurs in the text as whole words, case and signs aside.

    Examples
    --------
    >>> [contains_answer(text, ["paris"]) for text in ("It is Paris, of course.", "Parisian")]
    [1.0, 0.0]
    """
    said = f" {_words(text)} "
    # An answer of signs alone has no words: then it counts as it is.
    return float(
        any(
            f" {_words(answer)} " in said if _words(answer) else answer.strip() in text
            for answer in accepted
        )
    )


def _words(text: str) -> str:
    kept = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    return " ".join(kept.split())


QUALITIES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact-match": exact_match,
    "edit-similarity": edit_similarity,
    "contains": contains_answer,
}
"""How an answer is judged against the accepted ones, from 0 to 1."""


@dataclass(frozen=True, eq=False)
class _Answered:
    """A model's answers to all prompts, their qualities, and the seconds that they took."""

    records: tuple[TokenRecord, ...]
    qualities: FloatArray
    costs: FloatArray
    seconds: float


class _Loaded(SharedModels):
    """Models and answers that trials share in one process; left behind when pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: dict[Which, _Answered] = {}


# The problem --------------------------------------------------------------------------------------


class CascadeProblem:
    """When to ask the larger model: rules of deferral on answers that both models have given.

    Both models answer all prompts once, greedily; the answers, with the log-probability of every
    token, are kept in the cache, by model and prompts. Each seed deals the prompts into `folds`
    parts. A rule is fitted to the others and ranks the prompts of a part, so that every prompt is
    judged by a rule that has not seen it, and the same prompts are scored whatever the design and
    the seed. Areas and rates are those within the parts.

    Parameters
    ----------
    prompts
        Prompts with accepted answers. A document or passages are put before the prompt, options
        behind it.
    small, large
        The two models: packaged name, folder or hub id of a decoder; or a
        `bakeoff.models.small_gpt.SmallGPT`, which is trained on `training_texts`, once. Their
        tokenizers may differ.
    training_texts
        For models that are to be trained: a prompt and its answer each. None of `prompts` should be
        among them.
    quality
        ``"exact-match"``; ``"edit-similarity"``, in words; or ``"contains"``, for models that
        answer in sentences. In all of them the best of the accepted answers counts.
    folds
        Parts of the prompts.
    n_calibration
        Prompts that a rule is fitted to; all outside the part if None.
    target_rate
        Share of prompts to defer, for the metrics "quality" and "cost" and for the winner.
    small_cost, large_cost
        Cost of one answer, in one unit of your choice; by default floating-point operations, 2 x
        parameters x tokens of prompt and answer.
    max_new_tokens
        Longest answer.
    chat
        Whether prompts are user messages of the models' chat templates.
    batch_size
        Prompts per batch; no result depends on it.

    Raises
    ------
    DataError
        If a prompt has no answer, there are too few, or a number or a name is not accepted.

    References
    ----------
    Neha Gupta, Harikrishna Narasimhan, Wittawat Jitkrittum, Ankit Singh Rawat, Aditya Krishna
    Menon and Sanjiv Kumar. "Language model cascades: token-level uncertainty and beyond".
    ICLR 2024. arXiv:2404.10136.
    """

    name = "decoding"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        small: str | SmallGPT,
        large: str | SmallGPT,
        training_texts: Sequence[str] = (),
        quality: QualityName = "exact-match",
        folds: int = 5,
        n_calibration: int | None = None,
        target_rate: float = 0.3,
        small_cost: float | None = None,
        large_cost: float | None = None,
        max_new_tokens: int = 32,
        chat: bool = False,
        batch_size: int = 16,
    ) -> None:
        check_prompts(prompts, 10, QUESTION)
        for row, prompt in enumerate(prompts):
            if not prompt.answers:
                raise DataError(
                    f"prompts must have accepted answers, to tell how good the models' are; prompt "
                    f"{row} has none: {prompt.text[:60]!r}"
                )
        if quality not in QUALITIES:
            raise DataError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
        if not 2 <= folds <= len(prompts) // 2:
            raise DataError(
                f"folds must be from 2 to {len(prompts) // 2}, half the prompts, got {folds!r}"
            )
        most = len(prompts) - math.ceil(len(prompts) / folds)
        if n_calibration is not None and not 1 <= n_calibration <= most:
            raise DataError(
                f"n_calibration must be from 1 to {most}, the prompts outside a part, got "
                f"{n_calibration!r}"
            )
        if not 0 < target_rate < 1:
            raise DataError(f"target_rate must be between 0 and 1, got {target_rate!r}")
        for what, cost in (("small_cost", small_cost), ("large_cost", large_cost)):
            if cost is not None and not (math.isfinite(cost) and cost > 0):
                raise DataError(f"{what} must be a positive number, got {cost!r}")
        if (small_cost is None) != (large_cost is None):
            raise DataError("give small_cost and large_cost, in one unit, or neither")
        for what, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if number < 1:
                raise DataError(f"{what} must be at least 1, got {number!r}")
        self.models: dict[Which, str | SmallGPT] = {"small": small, "large": large}
        to_train = any(isinstance(model, SmallGPT) for model in self.models.values())
        if to_train and not training_texts:
            raise DataError("training_texts must hold what a SmallGPT is to be trained on")
        if training_texts and not to_train:
            raise DataError("training_texts is for models that are to be trained: give a SmallGPT")
        if small == large:
            raise DataError(f"small and large must be two models, got {small!r} twice")
        self.prompts = tuple(prompts)
        self.training_texts = tuple(training_texts)
        self.quality = quality
        self.folds = int(folds)
        self.n_calibration = n_calibration
        self.target_rate = float(target_rate)
        self.small_cost = small_cost
        self.large_cost = large_cost
        self.max_new_tokens = int(max_new_tokens)
        self.chat = bool(chat)
        self.batch_size = int(batch_size)
        digest = hashlib.sha256()
        for text in self.training_texts:
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        self._texts_digest = digest.hexdigest()
        self._n_texts = len(self.training_texts)
        self._folders: dict[Which, str] = {}
        self._identities: dict[Which, str] = {}
        self._loaded = _Loaded()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what models were trained on behind once they are."""
        state = dict(self.__dict__)
        if set(self._folders) == set(self.models):
            state["training_texts"] = ()
        return state

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The area under the deferral curve; quality and cost at the target rate."""
        rate = f"{self.target_rate:.0%} deferred"
        return {
            "area": CASCADE_METRICS["area"],
            "quality": replace(CASCADE_METRICS["quality"], label=f"{self.quality}, {rate}"),
            "cost": replace(CASCADE_METRICS["cost"], label=f"cost, {rate} (large model alone = 1)"),
        }

    def fingerprint(self) -> str:
        """Return a digest of prompts, models, quality and protocol."""
        facts = {
            "prompts": prompts_fingerprint(self.prompts),
            "models": [self._model_facts("small"), self._model_facts("large")],
            "quality": self.quality,
            "folds": self.folds,
            "n_calibration": self.n_calibration,
            "target_rate": self.target_rate,
            "costs": [self.small_cost, self.large_cost],
            "max_new_tokens": self.max_new_tokens,
            "chat": self.chat,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _model_facts(self, which: Which) -> object:
        model = self.models[which]
        if isinstance(model, SmallGPT):
            # How it is made, so that nothing has to be trained to know what a study is about.
            return [small_gpt._VERSION, asdict(model), self._texts_digest]
        return self._identity(which)

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        n = len(self.prompts)
        fitted = self.n_calibration or n - math.ceil(n / self.folds)
        facts: dict[str, object] = {
            "question": QUESTION,
            "data": f"{n:,} prompts with accepted answers",
            "small model": self._wording("small"),
            "large model": self._wording("large"),
            "quality": self.quality,
            "answers": f"greedy, at most {self.max_new_tokens} tokens"
            + (", chat templates" if self.chat else ""),
            "protocol": f"{self.folds} parts per seed; each is ranked by a rule fitted to "
            f"{fitted:,} of the other prompts",
            "target rate": f"{self.target_rate:.0%}",
            "costs": "floating-point operations: 2 x parameters x tokens"
            if self.small_cost is None
            else f"{self.small_cost:g} and {self.large_cost:g} per answer",
        }
        return facts

    def _wording(self, which: Which) -> str:
        model = self.models[which]
        if isinstance(model, str):
            return model
        return (
            f"trained on {self._n_texts:,} texts, {model.n_layers} layers of "
            f"{model.width}, at most {model.steps:,} steps of {model.batch_size} x "
            f"{model.context} tokens"
        )

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        check_method(Design(method, method), _PARAMETERS, QUESTION)
        return f"1.{_VERSION}"

    # Designs --------------------------------------------------------------------------------------

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here: unknown method, parameter or value."""
        check_method(design, _PARAMETERS, QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        try:
            rule = self._rule(design, 0)
            if isinstance(rule, PostHocDeferral):
                rule._check_parameters()
                if not isinstance(rule.estimator, str):
                    raise DataError(
                        f"estimator must be 'auto', 'linear' or 'mlp', got {rule.estimator!r}"
                    )
        except (DataError, TypeError) as error:  # a parameter can be any JSON value
            raise DataError(f"design {design.name!r}: {error}") from None
        n = len(self.prompts)
        available = self.n_calibration or n - math.ceil(n / self.folds)
        if design.method in _LEARNED and available < _LEAST_TO_LEARN:
            raise DataError(
                f"design {design.name!r}: a learned rule needs at least {_LEAST_TO_LEARN} prompts "
                f"to learn from, and gets {available} (of {n} prompts, in {self.folds} parts)"
            )

    def _rule(self, design: Design, seed: int, examples: CascadeExamples | None = None) -> Any:
        """Return a design's rule, not fitted; None if there is none to fit.

        With examples, ``alpha="chosen"`` is chosen on them.
        """
        params = dict(design.params)
        if design.method == "chow-quantile":
            alpha = params.get("alpha", 0.0)
            if alpha == "chosen":
                alpha = 0.0 if examples is None else _best_alpha(examples)
            elif isinstance(alpha, bool | str) or not 0 <= alpha <= 1:
                raise DataError(f"alpha must be in [0, 1] or 'chosen', got {alpha!r}")
            return QuantileScore(float(alpha))
        if design.method in _LEARNED:
            features = params.pop("features", _LEARNED[design.method])
            return PostHocDeferral(
                features if isinstance(features, str) else tuple(features),
                random_state=seed,
                **params,
            )
        plain: dict[str, DeferralRule] = {
            "random": RandomDeferral(seed),
            "length": LengthScore(),
            "chow-sum": ChowSum(),
            "chow-average": ChowAverage(),
        }
        return plain.get(design.method)

    # Answers --------------------------------------------------------------------------------------

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; train what is to be trained; let both models answer every prompt."""
        for design in designs:
            self.check(design)
        # Roughly by what they take.
        to_train = [isinstance(self.models[which], SmallGPT) for which in ("small", "large")]
        ends = (0.0, 0.15, 0.6, 0.75, 1.0) if any(to_train) else (0.0, 0.0, 0.0, 0.35, 1.0)

        def within(first: float, last: float) -> Callable[[float, str], None]:
            return lambda done, message: work.progress(first + (last - first) * done, message)

        self._folder("small", within(*ends[0:2]))
        self._folder("large", within(*ends[1:3]))
        self._answered("small", within(*ends[2:4]))
        self._answered("large", within(*ends[3:5]))

    def _folder(self, which: Which, progress: Callable[[float, str], None] | None = None) -> str:
        """Return the name that a model is loaded by, trained if it has to be."""
        if which not in self._folders:
            model = self.models[which]
            if isinstance(model, SmallGPT):
                model = str(model.pretrained(self.training_texts, progress=progress))
            self._folders[which] = model
        return self._folders[which]

    def _identity(self, which: Which) -> str:
        # Remembered, so that worker processes need not load a model to find its answers.
        if which not in self._identities:
            model = self._loaded.language_model(self._folder(which))
            self._identities[which] = model.fingerprint
        return self._identities[which]

    def _answered(
        self, which: Which, progress: Callable[[float, str], None] | None = None
    ) -> _Answered:
        if which in self._loaded.answered:
            return self._loaded.answered[which]
        texts = [_asked(prompt) for prompt in self.prompts]
        report = counting(progress or (lambda done, message: None), f"the {which} model answers")
        records: list[TokenRecord] = []
        seconds = 0.0
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]

            def within(done: int, total: int, start: int = start) -> None:
                report(start + done, len(texts))

            found, took = self._chunk(which, chunk, start, within)
            records += found
            seconds += took
        report(len(texts), len(texts))
        fixed = self.small_cost if which == "small" else self.large_cost
        judge = QUALITIES[self.quality]
        answered = _Answered(
            tuple(records),
            np.array(
                [
                    judge(record.text or "", prompt.answers)
                    for record, prompt in zip(records, self.prompts, strict=True)
                ]
            ),
            np.array([record.cost if fixed is None else fixed for record in records]),
            seconds,
        )
        self._loaded.answered[which] = answered
        return answered

    def _chunk(
        self, which: Which, texts: list[str], start: int, progress: Callable[[int, int], None]
    ) -> tuple[list[TokenRecord], float]:
        """Return answers to some prompts, and the seconds that they took, from the cache if there.

        What was just made is read from there, too: the same numbers, whoever made them.
        """
        facts = [
            _ANSWERS_VERSION,
            self._identity(which),
            which == "small",  # whose answers have embeddings
            self.max_new_tokens,
            self.chat,
            texts,
        ]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        folder = build_once(
            cache_directory() / "answers" / key,
            lambda made: self._write_answers(which, texts, start, progress, made),
        )
        state, arrays = read_arrays(folder / "answers.safetensors")
        ends = np.cumsum(arrays["lengths"])
        parts = np.split(arrays["log_probs"], ends[:-1])
        embeddings = arrays.get("embeddings")
        records = [
            TokenRecord(
                parts[row],
                None if embeddings is None else embeddings[row],
                text,
                float(arrays["costs"][row]),
            )
            for row, text in enumerate(state["texts"])
        ]
        return records, float(arrays["seconds"][0])

    def _write_answers(
        self,
        which: Which,
        texts: list[str],
        start: int,
        progress: Callable[[int, int], None],
        folder: Path,
    ) -> None:
        model = self._loaded.language_model(self._folder(which))
        write = TextGenerator(
            model,
            embeddings=which == "small",
            chat=self.chat,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        for row, text in enumerate(texts):
            length = len(write._prompt_ids(text, start + row))
            if length + self.max_new_tokens > model.max_length:
                raise DataError(
                    f"prompt {start + row} has {length:,} tokens for the {which} model, "
                    f"{model.name}, which reads at most {model.max_length:,} with the answer's "
                    f"{self.max_new_tokens}"
                )
        began = time.perf_counter()
        records = write(texts, progress=progress)
        arrays: dict[str, NDArray[Any]] = {
            "seconds": np.array([time.perf_counter() - began]),
            "log_probs": np.concatenate([record.log_probs for record in records]),
            "lengths": np.array([len(record.log_probs) for record in records]),
            "costs": np.array([record.cost for record in records]),
        }
        if which == "small":
            arrays["embeddings"] = np.array(
                [record.embedding for record in records], dtype=np.float32
            )
        state = {"kind": "answers", "texts": [record.text for record in records]}
        write_arrays(folder / "answers.safetensors", state, arrays)

    def examples(self) -> CascadeExamples:
        """Return the prompts with both models' answers and their qualities, for a `Cascade`.

        The models answer what they have not answered before.
        """
        small, large = self._answered("small"), self._answered("large")
        return CascadeExamples(
            tuple(_asked(prompt) for prompt in self.prompts),
            small.records,
            large.records,
            small.qualities,
            large.qualities,
        )

    # Trials ---------------------------------------------------------------------------------------

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Rank every prompt by a rule that has not seen it; fit the rule to all for the winner."""
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=tuple(dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        work.progress(0.0, "reading answers")
        examples = self.examples()
        small, large = self._answered("small"), self._answered("large")
        n = len(examples)
        units = {metric: np.empty(n) for metric in self.metrics}
        parts = self._parts(seed)
        deferred: list[NDArray[np.bool_]] = []
        for number, part in enumerate(parts):
            work.progress(number / (len(parts) + 1), "fitting")
            area, shares, above = self._ranked(design, seed, number, part, examples)
            units["area"][part] = area
            units["quality"][part] = (1 - shares) * small.qualities[part] + (
                shares * large.qualities[part]
            )
            cheap = 0.0 if design.method == "large-only" else small.costs[part]
            units["cost"][part] = (cheap + shares * large.costs[part]) / large.costs.mean()
            if above is not None:
                deferred.append(above)
        work.progress(len(parts) / (len(parts) + 1), "fitting to all prompts")
        cost = {"seconds_per_prompt": self._seconds(design)}
        if deferred:
            # What a threshold comes to that defers the target rate of the calibration data.
            cost["deferred_share"] = float(np.concatenate(deferred).mean())
        if design.method in _LEARNED or design.params.get("alpha") == "chosen":
            cost["labels_used"] = float(self.n_calibration or n - math.ceil(n / self.folds))
        self._save_cascade(design, seed, examples, work.directory)
        scores = {metric: {"prompts": values} for metric, values in units.items()}
        return Trial(scores=scores, cost=cost, artifact=work.directory)

    def _parts(self, seed: int) -> list[NDArray[np.int64]]:
        order = np.random.default_rng([seed, 17]).permutation(len(self.prompts))
        return [np.sort(part).astype(np.int64) for part in np.array_split(order, self.folds)]

    def _ranked(
        self,
        design: Design,
        seed: int,
        number: int,
        part: NDArray[np.int64],
        examples: CascadeExamples,
    ) -> tuple[FloatArray, FloatArray, NDArray[np.bool_] | None]:
        """Return area units and shares deferred at the target rate, and who is above a threshold.

        The threshold is that of the calibration data; None where there is no such thing.
        """
        tested = examples.take(part)
        n = len(part)
        if design.method in _ALONE:
            is_large = _ALONE[design.method] == "large"
            quality = tested.q_large if is_large else tested.q_small
            return quality, np.full(n, float(is_large)), None
        if design.method in ("random", "oracle"):
            # At random means on average over all orders: no prompt ahead of another.
            gap = tested.q_large - tested.q_small
            scores = gap if design.method == "oracle" else np.zeros(n)
            above = None
        else:
            rest = np.setdiff1d(np.arange(len(examples)), part)
            if self.n_calibration is not None:
                rng = np.random.default_rng([seed, 19, number])
                rest = np.sort(rng.choice(rest, self.n_calibration, replace=False))
            learnt = examples.take(rest)
            rule = self._rule(design, seed, learnt)
            rule.fit(learnt.small, learnt.q_small, learnt.q_large)
            scores = rule.score(tested.small)
            point = choose_threshold(rule.calibration_scores_, budget=self.target_rate)
            above = scores > point.threshold
        return (
            area_units(scores, tested.q_small, tested.q_large),
            deferred_shares(scores, self.target_rate),
            above,
        )

    def _seconds(self, design: Design) -> float:
        """Return the measured seconds per prompt at the target rate."""
        small, large = self._answered("small"), self._answered("large")
        n = len(self.prompts)
        if design.method in _ALONE:
            return (small if _ALONE[design.method] == "small" else large).seconds / n
        return (small.seconds + self.target_rate * large.seconds) / n

    def _save_cascade(
        self, design: Design, seed: int, examples: CascadeExamples, folder: Path
    ) -> None:
        rule = self._rule(design, seed, examples)
        if rule is None:
            return
        cascade = Cascade(
            _nobody,
            _nobody,
            rule,
            target_rate=self.target_rate,
            small_cost=self.small_cost,
            large_cost=self.large_cost,
        )
        cascade.fit(examples).save(folder / CASCADE_FILE)

    # The winner -----------------------------------------------------------------------------------

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a rule with its threshold, fitted to all prompts, and say how to use it.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder.
        destination
            The folder to write: ``decoder.json``, ``README.md``, ``cascade.safetensors`` unless one
            model answers alone, and the models that were trained here.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            False: a rule is used through `bakeoff.decoding.Cascade`.

        Raises
        ------
        DataError
            If the design is the oracle, which reads the accepted answers.
        """
        if design.method == "oracle":
            raise DataError(
                f"design {design.name!r}: the oracle reads the accepted answers; it shows what is "
                "possible, and cannot be used"
            )
        destination.mkdir(parents=True, exist_ok=True)
        alone = _ALONE.get(design.method)
        used: tuple[Which, ...] = ("small", "large") if alone is None else (alone,)
        names = {which: self._exported(which, destination) for which in used}
        extra: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "chat": self.chat}
        if alone is None:
            shutil.copy2(artifact / CASCADE_FILE, destination / CASCADE_FILE)
            extra |= {"large": names["large"], "cascade": CASCADE_FILE}
        settings = Settings(design.name, design.method, dict(design.params), names[used[0]], extra)
        save_settings(destination, settings, usage=_usage(settings, destination), reason=reason)
        return False

    def _exported(self, which: Which, destination: Path) -> str:
        """Return the name that a winner loads a model by; copies one that was trained here."""
        folder = self._folder(which)
        if isinstance(self.models[which], str):
            return folder
        shutil.copytree(folder, destination / which, dirs_exist_ok=True)
        return f"./{which}"

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in a folder that `export` wrote."""
        return _usage(load_settings(destination), destination)


def _usage(settings: Settings, destination: Path) -> list[str]:
    options = f"max_new_tokens={settings.extra['max_new_tokens']}"
    if settings.extra["chat"]:
        options += ", chat=True"

    def loaded(name: str) -> str:
        found = str(destination / name[2:]) if name.startswith("./") else name
        return f"load_language_model({found!r})"

    lines = ["from bakeoff.models import load_language_model"]
    if "cascade" not in settings.extra:
        return [
            "from bakeoff.decoding import TextGenerator",
            *lines,
            "",
            f"model = TextGenerator({loaded(settings.model)}, {options})",
            "answers = model(prompts)",
            "print([answer.text for answer in answers])",
        ]
    return [
        "from bakeoff.decoding import Cascade, TextGenerator",
        *lines,
        "",
        f"small = TextGenerator({loaded(settings.model)}, embeddings=True, {options})",
        f"large = TextGenerator({loaded(settings.extra['large'])}, {options})",
        f"path = {str(destination / settings.extra['cascade'])!r}",
        "answers = Cascade.load(path, small, large).generate(prompts)",
        "print(answers.texts, answers.rate)",
    ]


def _nobody(prompts: Sequence[str], **generation: Any) -> list[TokenRecord]:
    """Stand in for a model where all answers are there already."""
    raise AssertionError("a cascade that is fitted to answers asks nobody")


def _asked(prompt: Prompt) -> str:
    """Return the text that models read."""
    before = [prompt.document, *prompt.passages]
    behind = [f"- {option}" for option in prompt.options]
    text = "\n".join([prompt.text, *behind])
    return "\n\n".join([*(part for part in before if part.strip()), text])


def _best_alpha(examples: CascadeExamples) -> float:
    """Return the level whose quantile has the largest area, the lowest of equals."""
    areas = [
        deferral_curve(
            QuantileScore(alpha).score(examples.small), examples.q_small, examples.q_large
        ).auc
        for alpha in ALPHAS
    ]
    return ALPHAS[int(np.argmax(areas))]
