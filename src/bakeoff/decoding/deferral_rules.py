"""Rules that say, from a small model's answer, how much a large model is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.model_selection import KFold, StratifiedKFold

from bakeoff._files import atomic_path
from bakeoff.decoding.deferral_curves import (
    FloatArray,
    checked_qualities,
    checked_share,
    choose_threshold,
)
from bakeoff.decoding.deferral_mlp import DeferralMLP
from bakeoff.decoding.token_records import RaggedTokens, TokenRecord, as_records
from bakeoff.errors import DataError

Records = Sequence[TokenRecord | ArrayLike]
Arrays = dict[str, NDArray[Any]]

_FORMAT = 1
_TARGETS = ("gap", "win", "small_error")
_TOKEN_FEATURES = ("quantiles", "sum", "mean", "length")
_LEAST_LABELLED = 50
# From here on the perceptron of the paper has enough to learn from.
_ENOUGH_FOR_MLP = 5000
_PENALTIES = np.logspace(-2, 5, 15)


class DeferralRule(BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """What all rules have in common; subclasses say how to score.

    Attributes
    ----------
    calibration_scores_ : ndarray of shape (n,)
        Scores of the records seen in `fit`, each by a rule that did not learn from that record.
    """

    #: Whether `score` reads embeddings.
    needs_embeddings = False

    def fit(
        self, records: Records, q_small: ArrayLike | None = None, q_large: ArrayLike | None = None
    ) -> Self:
        """Remember calibration data for `choose_threshold`; nothing is learnt.

        Parameters
        ----------
        records
            n answers of the small model: `TokenRecord`, or vectors of token log-probabilities.
        q_small, q_large
            Qualities ``(n,)`` of both models' answers; only needed to aim at a quality.
        """
        found = as_records(records)
        self._remember(self.score(found), q_small, q_large)
        return self

    def score(self, records: Records) -> FloatArray:
        """Return ``(n,)`` deferral scores, higher = defer; inf where an answer is empty."""
        found = as_records(records)
        tokens = RaggedTokens(found)
        scores = self._score(found, tokens)
        return np.where(tokens.lengths > 0, scores, np.inf)

    def score_samples(self, records: Records) -> FloatArray:
        """Return `score`, by the name under which a scikit-learn `Pipeline` asks for it."""
        return self.score(records)

    def choose_threshold(
        self,
        *,
        budget: float | None = None,
        min_quality: float | Literal["large"] | None = None,
        confidence: float | None = None,
    ) -> float:
        """Return the score above which to defer, from the data seen in `fit`.

        Parameters
        ----------
        budget, min_quality, confidence
            As for `bakeoff.decoding.deferral_curves.choose_threshold`.

        Raises
        ------
        DataError
            If `fit` has not been called, or the target cannot be reached.
        """
        if not hasattr(self, "calibration_scores_"):
            raise DataError(f"this {type(self).__name__} has no threshold yet: call fit first")
        return choose_threshold(
            self.calibration_scores_,
            self.q_small_,
            self.q_large_,
            budget=budget,
            min_quality=min_quality,
            confidence=confidence,
        ).threshold

    def save(self, path: str | Path) -> None:
        """Write the rule to one safetensors file, whose header says in JSON what it is.

        Raises
        ------
        DataError
            If the rule holds what only pickle could write: an estimator of yours.
        """
        write_arrays(Path(path), self.state(), self.arrays())

    def state(self) -> dict[str, Any]:
        """Return all but the arrays, as JSON values."""
        parameters = self.get_params(deep=False)
        for name, value in parameters.items():
            if isinstance(value, np.ndarray | tuple):
                parameters[name] = np.asarray(value).tolist()
            elif isinstance(value, np.generic):
                parameters[name] = value.item()
        return {"rule": type(self).__name__, "parameters": parameters}

    def arrays(self) -> Arrays:
        """Return what was learnt or remembered."""
        names = ("calibration_scores_", "q_small_", "q_large_")
        found = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _restore(self, state: dict[str, Any], arrays: Arrays) -> None:
        if "calibration_scores_" in arrays:
            self.calibration_scores_ = arrays["calibration_scores_"]
            self.q_small_ = arrays.get("q_small_")
            self.q_large_ = arrays.get("q_large_")

    def _remember(
        self, scores: FloatArray, q_small: ArrayLike | None, q_large: ArrayLike | None
    ) -> None:
        n = len(scores)
        self.q_small_ = None if q_small is None else checked_qualities("q_small", q_small, n)
        self.q_large_ = None if q_large is None else checked_qualities("q_large", q_large, n)
        self.calibration_scores_ = scores

    def _score(self, records: list[TokenRecord], tokens: RaggedTokens) -> FloatArray:
        raise NotImplementedError


class ChowSum(DeferralRule):
    """Minus the log-probability of the whole answer; long answers are deferred first.

    Examples
    --------
    >>> ChowSum().score([np.log([0.5, 0.5]), np.log([0.25])]).round(3).tolist()
    [1.386, 1.386]
    """

    def _score(self, records: list[TokenRecord], tokens: RaggedTokens) -> FloatArray:
        return -tokens.sums()


class ChowAverage(DeferralRule):
    """Minus the mean log-probability per token, the logarithm of the answer's perplexity.

    Examples
    --------
    >>> ChowAverage().score([np.log([0.5, 0.5]), np.log([0.25])]).round(3).tolist()
    [0.693, 1.386]
    """

    def _score(self, records: list[TokenRecord], tokens: RaggedTokens) -> FloatArray:
        return -tokens.means()


class QuantileScore(DeferralRule):
    """Minus a quantile of the answer's token log-probabilities (Chow-Quantile).

    Parameters
    ----------
    alpha
        In [0, 1]: 0 looks at the least certain token, 1 at the most certain. No value is best
        everywhere: choose it on validation data.

    Examples
    --------
    >>> QuantileScore(0.0).score([np.log([0.9, 0.1, 0.8])]).round(3).tolist()
    [2.303]
    """

    def __init__(self, alpha: float = 0.0) -> None:
        self.alpha = alpha

    def _score(self, records: list[TokenRecord], tokens: RaggedTokens) -> FloatArray:
        return -tokens.quantiles([checked_share("alpha", self.alpha)])[:, 0]


class LengthScore(DeferralRule):
    """The number of tokens: the baseline that every other rule has to beat."""

    def _score(self, records: list[TokenRecord], tokens: RaggedTokens) -> FloatArray:
        return tokens.lengths.astype(np.float64)


class RandomDeferral(DeferralRule):
    """A uniform number in [0, 1) per answer, the same whenever that answer comes.

    Parameters
    ----------
    random_state
        Seed.
    """

    def __init__(self, random_state: int = 0) -> None:
        self.random_state = random_state

    def score(self, records: Records) -> FloatArray:
        """Return ``(n,)`` scores; they depend on the answers alone, not on order or batch."""
        found = as_records(records)
        key = str(self.random_state).encode()
        digests = [
            hashlib.blake2b(
                record.log_probs.tobytes() + (record.text or "").encode(), digest_size=8, key=key
            ).digest()
            for record in found
        ]
        return np.array([int.from_bytes(digest) / 2**64 for digest in digests])


class PostHocDeferral(DeferralRule):
    """A rule learnt from labelled answers of both models (Post-Hoc-Quantile, Post-Hoc-Embed-1).

    Parameters
    ----------
    features
        Some of ``"quantiles"``, ``"sum"``, ``"mean"`` and ``"length"`` of the token
        log-probabilities, and ``"embedding"``, the small model's.
    target
        What is predicted. ``"gap"``: how much better the large model's answer is, by squared loss.
        ``"win"``: whether it is better, by logistic loss. ``"small_error"``: minus the small
        model's quality, which is less noisy where the large model is nearly always right.
    estimator
        ``"linear"``: ridge or logistic regression, with the penalty chosen by cross-validation.
        ``"mlp"``: the paper's perceptron, `DeferralMLP`. ``"auto"``: linear below 5,000 labelled
        answers, else the perceptron. Or any scikit-learn regressor (a classifier for ``"win"``),
        of which a clone is fitted; such a rule cannot be saved.
    grid
        Levels of the quantiles; 0, 0.01, ..., 1 if None.
    n_components
        Principal components that an embedding is reduced to; None for none.
    folds
        Parts of the data in which `fit` finds scores for `choose_threshold`: each part is scored by
        a rule fitted to the others, since scores of the data that a rule has learnt look better
        than they are.
    random_state
        Seed of the folds, and of the perceptron.

    Attributes
    ----------
    n_labelled_ : int
        Answers that were learnt from; empty ones are left out, and always deferred.

    Notes
    -----
    Not offered is Post-Hoc-Embed-1+2, which reads token features of the large model: it has to run
    on every query, and to read the small model's tokens.

    Take labelled data that neither model was trained on.

    References
    ----------
    Neha Gupta, Harikrishna Narasimhan, Wittawat Jitkrittum, Ankit Singh Rawat, Aditya Krishna
    Menon and Sanjiv Kumar. "Language model cascades: token-level uncertainty and beyond".
    ICLR 2024. arXiv:2404.10136.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> answers = [-rng.exponential(0.5, rng.integers(2, 20)) for _ in range(400)]
    >>> worst = np.array([answer.min() for answer in answers])
    >>> q_small = (worst > np.median(worst)).astype(float)  # one bad token spoils an answer
    >>> rule = PostHocDeferral().fit(answers[:300], q_small[:300], np.ones(300))
    >>> scores = rule.score(answers[300:])
    >>> bool(scores[q_small[300:] == 0].mean() > scores[q_small[300:] == 1].mean())
    True
    """

    def __init__(
        self,
        features: Sequence[str] = _TOKEN_FEATURES,
        target: Literal["gap", "win", "small_error"] = "gap",
        estimator: Any = "auto",
        *,
        grid: ArrayLike | None = None,
        n_components: int | None = 32,
        folds: int = 5,
        random_state: int = 0,
    ) -> None:
        self.features = features
        self.target = target
        self.estimator = estimator
        self.grid = grid
        self.n_components = n_components
        self.folds = folds
        self.random_state = random_state

    @property
    def needs_embeddings(self) -> bool:  # type: ignore[override]  # fixed for other rules
        """Whether ``"embedding"`` is among the features."""
        return "embedding" in self.features

    def fit(
        self, records: Records, q_small: ArrayLike | None = None, q_large: ArrayLike | None = None
    ) -> Self:
        """Learn to rank answers by how much the large model would improve them.

        Parameters
        ----------
        records
            n answers of the small model.
        q_small, q_large
            Qualities ``(n,)``; `q_large` is not needed for the target ``"small_error"``.

        Raises
        ------
        DataError
            If there are fewer than 50 labelled answers, the target is the same for all, an
            embedding is missing, or a parameter is not accepted.
        """
        self._check_parameters()
        found = as_records(records)
        n = len(found)
        targets = self._targets(n, q_small, q_large)
        tokens = RaggedTokens(found)
        filled = np.flatnonzero(tokens.lengths)
        if len(filled) < _LEAST_LABELLED:
            raise DataError(
                f"a learned rule needs at least {_LEAST_LABELLED} labelled answers that are not "
                f"empty, got {len(filled)}; the other rules need none"
            )
        targets = targets[filled]
        if np.ptp(targets) == 0:
            raise DataError(
                f"the target {self.target!r} is {targets[0]:g} for all answers: there is nothing "
                "to learn"
            )
        parts = self._parts(found, tokens, filled)
        scores = np.full(n, np.inf)
        kind = self.estimator
        if isinstance(kind, str) and kind == "auto":
            # Decided by all the data, so that the folds have the same.
            kind = "mlp" if len(filled) >= _ENOUGH_FOR_MLP else "linear"
        for learn, rest in self._splits(targets):
            fitted = self._fitted(_take(parts, learn), targets[learn], kind)
            scores[filled[rest]] = self._predicted(fitted, _take(parts, rest))
        self.model_ = self._fitted(parts, targets, kind)
        self.n_labelled_ = len(filled)
        self._remember(scores, q_small, q_large)
        return self

    def _score(self, records: list[TokenRecord], tokens: RaggedTokens) -> FloatArray:
        if not hasattr(self, "model_"):
            raise DataError("this PostHocDeferral is not fitted: call fit first")
        filled = np.flatnonzero(tokens.lengths)
        scores = np.full(len(records), np.inf)
        if filled.size:
            scores[filled] = self._predicted(self.model_, self._parts(records, tokens, filled))
        return scores

    # Features -------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        known = (*_TOKEN_FEATURES, "embedding")
        if isinstance(self.features, str) or not len(self.features):
            raise DataError(f"features must be a sequence of names, got {self.features!r}")
        for name in self.features:
            if name in ("large_embedding", "embedding_large", "large_tokens"):
                raise DataError(
                    f"features has {name!r}: token features of the large model are not offered; "
                    "it would have to run on every query and to share the small one's tokenizer"
                )
            if name not in known:
                raise DataError(f"features must be among {', '.join(known)}, got {name!r}")
        if self.target not in _TARGETS:
            raise DataError(f"target must be one of {', '.join(_TARGETS)}, got {self.target!r}")
        if isinstance(self.estimator, str) and self.estimator not in ("auto", "linear", "mlp"):
            raise DataError(
                "estimator must be 'auto', 'linear', 'mlp' or a scikit-learn estimator, got "
                f"{self.estimator!r}"
            )
        if self.folds < 2:
            raise DataError(f"folds must be at least 2, got {self.folds!r}")
        if self.n_components is not None and self.n_components < 1:
            raise DataError(f"n_components must be at least 1 or None, got {self.n_components!r}")
        self._levels()

    def _levels(self) -> FloatArray:
        if self.grid is None:
            return np.linspace(0.0, 1.0, 101)
        levels = np.asarray(self.grid, dtype=np.float64)
        if levels.ndim != 1 or not levels.size or not ((levels >= 0) & (levels <= 1)).all():
            raise DataError("grid must be a vector of levels in [0, 1]")
        return levels

    def _parts(
        self, records: list[TokenRecord], tokens: RaggedTokens, rows: NDArray[np.intp]
    ) -> dict[str, FloatArray]:
        """Return token features and embeddings of the records at `rows`, which are not empty."""
        made = {
            "quantiles": lambda: tokens.quantiles(self._levels()),
            "sum": lambda: tokens.sums()[:, None],
            "mean": lambda: tokens.means()[:, None],
            "length": lambda: tokens.lengths[:, None].astype(np.float64),
        }
        parts: dict[str, FloatArray] = {}
        plain = [made[name]()[rows] for name in self.features if name in made]
        if plain:
            parts["tokens"] = np.hstack(plain)
        if self.needs_embeddings:
            parts["embedding"] = _embeddings(records, rows)
        return parts

    def _targets(self, n: int, q_small: ArrayLike | None, q_large: ArrayLike | None) -> FloatArray:
        if q_small is None:
            raise DataError("q_small is missing: a learned rule needs qualities")
        small = checked_qualities("q_small", q_small, n)
        if self.target == "small_error":
            return -small
        if q_large is None:
            raise DataError(f"q_large is missing: the target {self.target!r} needs it")
        gap = checked_qualities("q_large", q_large, n) - small
        return (gap > 0).astype(np.float64) if self.target == "win" else gap

    def _splits(self, targets: FloatArray) -> Any:
        # Rare outcomes are spread evenly, so that no part lacks them.
        values, counts = np.unique(targets, return_counts=True)
        few = len(values) <= 3 and counts.min() >= self.folds
        kind = StratifiedKFold if few else KFold
        splitter = kind(self.folds, shuffle=True, random_state=self.random_state)
        labels = np.searchsorted(values, targets)
        return splitter.split(np.zeros(len(targets)), labels if few else None)

    # Model ----------------------------------------------------------------------------------------

    def _fitted(
        self, parts: dict[str, FloatArray], targets: FloatArray, kind: Any
    ) -> dict[str, Any]:
        arrays: Arrays = {}
        if "tokens" in parts:
            arrays["tokens_mean"] = parts["tokens"].mean(axis=0)
            scale = parts["tokens"].std(axis=0)
            arrays["tokens_scale"] = np.where(scale > 1e-12, scale, 1.0)
        if "embedding" in parts:
            arrays |= _principal_components(
                parts["embedding"], self.n_components, self.random_state
            )
        inputs = _inputs(arrays, parts)
        logistic = self.target == "win"
        if logistic and np.ptp(targets) == 0:
            raise DataError("the target 'win' is the same for all answers outside one fold")
        estimator: Any = None
        if isinstance(kind, str) and kind == "linear":
            arrays |= _linear(inputs, targets, logistic, self.random_state)
        elif isinstance(kind, str):
            estimator = self._mlp().fit(inputs, targets)
        else:
            if logistic and not hasattr(kind, "predict_proba"):
                raise DataError("the target 'win' needs an estimator with predict_proba")
            estimator = clone(kind).fit(inputs, targets.astype(int) if logistic else targets)
        return {
            "arrays": arrays,
            "kind": kind if isinstance(kind, str) else "other",
            "estimator": estimator,
        }

    def _mlp(self) -> DeferralMLP:
        loss: Literal["logistic", "squared"] = "logistic" if self.target == "win" else "squared"
        return DeferralMLP(loss, random_state=self.random_state)

    def _predicted(self, fitted: dict[str, Any], parts: dict[str, FloatArray]) -> FloatArray:
        arrays = fitted["arrays"]
        inputs = _inputs(arrays, parts)
        if fitted["kind"] == "linear":
            linear = inputs @ arrays["coef"] + arrays["intercept"][0]
            return np.asarray(expit(linear) if self.target == "win" else linear, dtype=np.float64)
        if fitted["kind"] == "other" and self.target == "win":
            return np.asarray(fitted["estimator"].predict_proba(inputs)[:, 1], dtype=np.float64)
        return np.asarray(fitted["estimator"].predict(inputs), dtype=np.float64)

    # Files ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all but the arrays, as JSON values; refuses an estimator of yours."""
        if not isinstance(self.estimator, str):
            raise DataError(
                f"a rule with estimator={type(self.estimator).__name__} cannot be saved, since "
                "only pickle could; 'linear' and 'mlp' can"
            )
        fitted = getattr(self, "model_", None)
        learnt = None if fitted is None else {"kind": fitted["kind"], "n": self.n_labelled_}
        return {**super().state(), "learnt": learnt}

    def arrays(self) -> Arrays:
        """Return what was learnt and remembered."""
        found = super().arrays()
        fitted = getattr(self, "model_", None)
        if fitted is not None:
            found |= {f"model.{name}": value for name, value in fitted["arrays"].items()}
            if fitted["kind"] == "mlp":
                mlp = fitted["estimator"].arrays()
                found |= {f"mlp.{name}": value for name, value in mlp.items()}
        return found

    def _restore(self, state: dict[str, Any], arrays: Arrays) -> None:
        super()._restore(state, arrays)
        self.features = tuple(self.features)
        learnt = state.get("learnt")
        if learnt is None:
            return
        estimator = None
        if learnt["kind"] == "mlp":
            estimator = self._mlp().from_arrays(_below("mlp.", arrays))
        self.model_ = {
            "arrays": _below("model.", arrays),
            "kind": learnt["kind"],
            "estimator": estimator,
        }
        self.n_labelled_ = learnt["n"]


def _embeddings(records: list[TokenRecord], rows: NDArray[np.intp]) -> FloatArray:
    found = [records[row].embedding for row in rows]
    for row, embedding in zip(rows, found, strict=True):
        if embedding is None:
            raise DataError(
                f"record {int(row)} has no embedding, which the features ask for; "
                "TextGenerator(..., embeddings=True) gives them"
            )
    widths = sorted({len(embedding) for embedding in found if embedding is not None})
    if len(widths) > 1:
        raise DataError(f"embeddings must be of one width, got {widths}")
    return np.array(found, dtype=np.float64)


def _principal_components(
    embeddings: FloatArray, n_components: int | None, random_state: int
) -> Arrays:
    """Return mean, directions and scale; directions leave distances alone if there is no limit."""
    mean = embeddings.mean(axis=0)
    centered = embeddings - mean
    if n_components is None:
        directions = np.eye(embeddings.shape[1])
    else:
        keep = min(n_components, len(embeddings) - 1, embeddings.shape[1])
        components = PCA(keep, random_state=random_state).fit(embeddings).components_
        directions = np.asarray(components, dtype=np.float64).T
    # One scale for all: whitening would raise the components that are noise.
    rms = float(np.sqrt(((centered @ directions) ** 2).mean()))
    return {
        "embedding_mean": mean,
        "embedding_directions": np.ascontiguousarray(directions),
        "embedding_scale": np.array([rms if rms > 1e-12 else 1.0]),
    }


def _inputs(arrays: Arrays, parts: dict[str, FloatArray]) -> FloatArray:
    columns = []
    if "tokens" in parts:
        columns.append((parts["tokens"] - arrays["tokens_mean"]) / arrays["tokens_scale"])
    if "embedding" in parts:
        embedding = parts["embedding"]
        if embedding.shape[1] != len(arrays["embedding_mean"]):
            raise DataError(
                f"embeddings must have width {len(arrays['embedding_mean'])}, as in fit, got "
                f"{embedding.shape[1]}"
            )
        centered = embedding - arrays["embedding_mean"]
        columns.append(centered @ arrays["embedding_directions"] / arrays["embedding_scale"])
    return np.hstack(columns)


def _linear(inputs: FloatArray, targets: FloatArray, logistic: bool, random_state: int) -> Arrays:
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GridSearchCV

    if not logistic:
        ridge = RidgeCV(alphas=_PENALTIES).fit(inputs, targets)
        return {"coef": ridge.coef_, "intercept": np.array([ridge.intercept_])}
    rare = int(min(targets.sum(), (1 - targets).sum()))
    # Newton's method is by far the fastest while its matrix of second derivatives is small.
    solver = "newton-cholesky" if inputs.shape[1] <= 500 else "lbfgs"
    model = LogisticRegression(solver=solver, max_iter=2000)
    if rare >= 3:
        folds = StratifiedKFold(3, shuffle=True, random_state=random_state)
        penalties = {"C": 1 / _PENALTIES[::2]}
        model = GridSearchCV(model, penalties, scoring="neg_log_loss", cv=folds)
        model = model.fit(inputs, targets).best_estimator_
    else:
        model = model.set_params(C=1 / _PENALTIES[-1]).fit(inputs, targets)
    return {"coef": model.coef_[0], "intercept": np.asarray(model.intercept_)}


def _take(parts: dict[str, FloatArray], rows: NDArray[np.intp]) -> dict[str, FloatArray]:
    return {name: values[rows] for name, values in parts.items()}


def _below(prefix: str, arrays: Arrays) -> Arrays:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


# Files --------------------------------------------------------------------------------------------

_RULES: dict[str, type[DeferralRule]] = {
    rule.__name__: rule
    for rule in (ChowSum, ChowAverage, QuantileScore, LengthScore, RandomDeferral, PostHocDeferral)
}


def load_rule(path: str | Path) -> DeferralRule:
    """Return the rule that `DeferralRule.save` wrote. Nothing is unpickled.

    Raises
    ------
    DataError
        If the file holds no rule, or one of a later version.
    """
    state, arrays = read_arrays(Path(path))
    return rule_of(state, arrays, path)


def rule_of(state: dict[str, Any], arrays: Arrays, path: str | Path) -> DeferralRule:
    """Return the rule that a state and arrays describe; `path` is for error messages."""
    kind = _RULES.get(str(state.get("rule")))
    if kind is None:
        raise DataError(f"{path} has no rule of these: {', '.join(_RULES)}")
    try:
        rule = kind(**state["parameters"])
        rule._restore(state, arrays)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return rule


def write_arrays(path: Path, state: dict[str, Any], arrays: Arrays) -> None:
    """Write arrays as safetensors, with a state in JSON in the header."""
    from safetensors.numpy import save_file

    header = {"bakeoff": json.dumps({"format": _FORMAT, **state})}
    with atomic_path(path) as temporary:
        # A rule that was not fitted has no arrays, but a file needs one.
        contents = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        save_file(contents or {"empty": np.zeros(0)}, temporary, metadata=header)


def read_arrays(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return what `write_arrays` wrote.

    Raises
    ------
    DataError
        If there is no such file, or it is another kind of file, or of a later version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            state = json.loads((file.metadata() or {})["bakeoff"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} was not written by save: {error}") from error
    if state.get("format") != _FORMAT:
        raise DataError(
            f"{path} has format {state.get('format')}, and this version of bakeoff reads {_FORMAT}"
        )
    return state, arrays
