"""Small models that predict, from a text, what training on it would do to the reference loss."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from bakeoff.errors import DataError

_HEADS = ("ridge", "mlp")
# Penalties tried for features of about unit variance: from none to next to constant predictions.
_ALPHAS = np.logspace(-1, 6, 15)
_LEAST_FOR_VALIDATION = 30
_SENTENCE_TRANSFORMERS = {"all-MiniLM-L6-v2": "all-minilm-l6-v2"}


class InfluenceRegressor(BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """Predicts scores of texts from their embeddings: a frozen encoder and a small head.

    Parameters
    ----------
    encoder
        What makes vectors of texts: the name of a packaged model (``"all-minilm-l6-v2"``) or a
        folder that ``SentenceTransformer`` loads, a ``SentenceTransformer``, or any function or
        module from a list of texts to an array ``(n, d)``. Not used where vectors are given.
    head
        ``"ridge"``: ridge regression whose penalty minimises the leave-one-out error.
        ``"mlp"``: one hidden layer, stopped early on a tenth of the data.
    alpha
        Penalty of the head on inputs of unit mean square. None: chosen for ridge, 1e-3 for the MLP.
    hidden_size
        Width of the MLP's hidden layer.
    random_state
        Seed of the MLP; ridge needs none.

    Attributes
    ----------
    target_mean_, target_scale_ : float
        Mean and standard deviation of the scores seen in `fit`.

    Notes
    -----
    MATES fine-tunes a BERT on tens of thousands of probes; that is `TransformerInfluenceModel`.
    With the hundreds that fit a small budget, a linear head on frozen embeddings is the stable
    choice.

    Examples
    --------
    >>> vectors = np.random.default_rng(0).standard_normal((60, 3))
    >>> model = InfluenceRegressor().fit(vectors[:40], vectors[:40] @ [1.0, -2.0, 0.5])
    >>> bool(model.score(vectors[40:], vectors[40:] @ [1.0, -2.0, 0.5]) > 0.99)
    True
    """

    def __init__(
        self,
        encoder: Any = "all-minilm-l6-v2",
        head: str = "ridge",
        *,
        alpha: float | None = None,
        hidden_size: int = 128,
        random_state: int | None = 0,
    ) -> None:
        self.encoder = encoder
        self.head = head
        self.alpha = alpha
        self.hidden_size = hidden_size
        self.random_state = random_state

    def fit(self, X: Sequence[str] | ArrayLike, y: ArrayLike) -> Self:
        """Learn the scores `y` (shape ``(n,)``) of texts or of vectors ``(n, d)``.

        Raises
        ------
        DataError
            If lengths differ, there are fewer than three rows, a value is not finite, or an
            argument of the constructor is not accepted.
        """
        if self.head not in _HEADS:
            raise DataError(f"head must be one of {', '.join(_HEADS)}, got {self.head!r}")
        features = self.encode(X)
        targets = checked_targets(y, len(features))
        self.target_mean_, self.target_scale_ = _moments(targets)
        self._center = features.mean(axis=0)
        rms = float(np.sqrt(((features - self._center) ** 2).mean()))
        self._scale = rms if rms > 0 else 1.0
        inputs = (features - self._center) / self._scale
        standardised = (targets - self.target_mean_) / self.target_scale_
        self.model_ = self._new_head(len(inputs)).fit(inputs, standardised)
        self.n_features_in_ = features.shape[1]
        return self

    def predict(self, X: Sequence[str] | ArrayLike) -> NDArray[np.float64]:
        """Return the predicted scores ``(n,)``, float64, in the units of `fit`."""
        if not hasattr(self, "model_"):
            raise DataError("this InfluenceRegressor is not fitted: call fit first")
        features = self.encode(X)
        if features.shape[1] != self.n_features_in_:
            raise DataError(
                f"X must have {self.n_features_in_} columns, as in fit, got {features.shape[1]}"
            )
        standardised = self.model_.predict((features - self._center) / self._scale)
        return np.asarray(standardised * self.target_scale_ + self.target_mean_, dtype=np.float64)

    def score(self, X: Sequence[str] | ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of predictions and `y`; NaN where either is flat."""
        return spearman(self.predict(X), np.asarray(y, dtype=np.float64))

    def encode(self, X: Sequence[str] | ArrayLike) -> NDArray[np.float64]:
        """Return the head's inputs ``(n, d)``: the embeddings of texts, or the vectors given."""
        if not is_texts(X):
            vectors = np.asarray(X, dtype=np.float64)
            if vectors.ndim != 2 or 0 in vectors.shape:
                raise DataError(
                    f"X must be texts or an array (rows, columns), got shape {vectors.shape}"
                )
        else:
            texts = [str(text) for text in X]  # type: ignore[union-attr]
            made = self._encoder()(texts)
            if isinstance(made, Tensor):
                made = made.detach().cpu().numpy()
            vectors = np.asarray(made, dtype=np.float64)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise DataError(
                    f"encoder must return an array ({len(texts)}, d) for {len(texts)} texts, got "
                    f"shape {vectors.shape}"
                )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise DataError(f"X has NaN or inf in row {int(bad[0])} ({bad.size} such rows)")
        return vectors

    def inference_flops(self, texts: Sequence[str]) -> float:
        """Return 2 x parameters x tokens of embedding `texts`; NaN if the encoder is a function."""
        model: Any = self._loaded()
        tokenizer = getattr(model, "tokenizer", None)
        if not isinstance(model, nn.Module) or tokenizer is None:
            return math.nan
        limit = getattr(model, "max_seq_length", None) or math.inf
        tokens = sum(min(len(i), limit) for i in tokenizer(list(texts), verbose=False)["input_ids"])
        return 2.0 * sum(p.numel() for p in model.parameters()) * tokens

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_encoder_loaded", None)  # loads again from its name
        return state

    def _loaded(self) -> Any:
        if not isinstance(self.encoder, str | Path):
            return self.encoder
        name, model = getattr(self, "_encoder_loaded", (None, None))
        if name != self.encoder:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(_folder(self.encoder))
            self._encoder_loaded = (self.encoder, model)
        return model

    def _encoder(self) -> Callable[[list[str]], Any]:
        model = self._loaded()
        if hasattr(model, "encode") and isinstance(model, nn.Module):
            from bakeoff.models.encoding import encode

            return lambda texts: encode(model, texts, on_truncated=lambda cut: None)
        if isinstance(model, nn.Module):

            def run(texts: list[str]) -> Any:
                with torch.no_grad():
                    return model(texts)

            return run
        if callable(model):
            return model  # type: ignore[no-any-return]
        raise DataError(
            "encoder must be a name, a folder, a SentenceTransformer or a function from texts to "
            f"vectors, got {type(model).__name__}"
        )

    def _new_head(self, n: int) -> Any:
        if self.head == "ridge":
            from sklearn.linear_model import Ridge, RidgeCV

            return RidgeCV(_ALPHAS) if self.alpha is None else Ridge(self.alpha)
        from sklearn.neural_network import MLPRegressor

        return MLPRegressor(
            hidden_layer_sizes=(self.hidden_size,),
            alpha=1e-3 if self.alpha is None else self.alpha,
            learning_rate_init=3e-3,
            early_stopping=n >= _LEAST_FOR_VALIDATION,
            n_iter_no_change=30,
            max_iter=1000,
            random_state=self.random_state,
        )


class SplitTextRegressor(nn.Module):
    """An encoder with a short window reads a long text in pieces; one number comes out.

    The token ids of a text are cut into pieces of `piece_length`, each piece is encoded by itself
    (positions begin at 0 again), and the last hidden states of all its unmasked tokens are
    averaged. Then come dropout and a linear layer. A piece that is padding alone is not computed.

    Parameters
    ----------
    encoder
        A transformers encoder, e.g. ``BertModel``.
    piece_length
        Tokens of a piece.
    dropout
        Between the mean and the linear layer.

    References
    ----------
    Zichun Yu, Spandan Das and Chenyan Xiong. "MATES: Model-aware data selection for efficient
    pretraining with data influence models". NeurIPS 2024. arXiv:2406.06046.
    """

    def __init__(self, encoder: nn.Module, *, piece_length: int = 512, dropout: float = 0.1):
        super().__init__()
        self.encoder = encoder
        self.piece_length = piece_length
        self.dropout = nn.Dropout(dropout)
        config: Any = encoder.config
        self.classifier = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the predictions ``(B,)`` for ids and mask of shape ``(B, T)``.

        T need not be a multiple of the piece length. A row without any token gets the bias.
        """
        rows, length = input_ids.shape
        missing = -length % self.piece_length
        ids = nn.functional.pad(input_ids, (0, missing)).reshape(-1, self.piece_length)
        mask = nn.functional.pad(attention_mask, (0, missing)).reshape(-1, self.piece_length)
        # Attention over a piece with no unmasked token is not defined: NaN in some kernels.
        used = mask.any(dim=1)
        totals = torch.zeros(
            rows, self.classifier.in_features, device=ids.device, dtype=self.classifier.weight.dtype
        )
        if bool(used.any()):
            ids, mask = ids[used], mask[used]
            width = int(mask.ne(0).any(dim=0).nonzero().max()) + 1  # columns of padding alone
            ids, mask = ids[:, :width], mask[:, :width]
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            sums = (states * mask[..., None].to(states.dtype)).sum(dim=1)
            pieces_per_row = (length + missing) // self.piece_length
            owner = torch.arange(rows, device=ids.device).repeat_interleave(pieces_per_row)[used]
            totals = totals.index_add(0, owner, sums.to(totals.dtype))
        counts = attention_mask.sum(dim=1).clamp(min=1)
        return self.classifier(self.dropout(totals / counts[:, None])).squeeze(-1)  # type: ignore[no-any-return]


class TransformerInfluenceModel(BaseEstimator):  # type: ignore[misc]
    """Fine-tunes an encoder to predict scores of texts, as MATES does.

    Mean squared error on standardised scores, AdamW with a linear decay; the weights with the best
    Spearman correlation on a validation split are kept.

    Parameters
    ----------
    encoder
        Name of a packaged encoder, folder or Hub id for ``AutoModel.from_pretrained``, or the
        module itself (a copy of it is trained). The paper uses ``"bert-base-uncased"``.
    tokenizer
        Its tokenizer; loaded with the encoder where that is a name.
    max_length, piece_length
        Tokens of a text that are read, and tokens read at a time.
    epochs, batch_size, learning_rate, weight_decay, dropout
        The paper's by default (its batches are eight times larger).
    validation_fraction
        Share of the texts that choose the checkpoint and are not trained on.
    evaluate_every
        Optimizer steps between validations; the last step is always validated.
    warm_start
        Whether a second `fit` continues from the weights of the first.
    random_state
        Seed of split, order, dropout and the new layer. Torch's global generator is left as it was.
    device
        Where to compute.

    Attributes
    ----------
    module_ : SplitTextRegressor
        In eval mode.
    validation_spearman_ : float
        Of the checkpoint kept; optimistic, since it was chosen by it.

    References
    ----------
    Zichun Yu, Spandan Das and Chenyan Xiong. "MATES: Model-aware data selection for efficient
    pretraining with data influence models". NeurIPS 2024. arXiv:2406.06046.
    """

    def __init__(
        self,
        encoder: Any = "all-minilm-l6-v2",
        tokenizer: Any = None,
        *,
        max_length: int = 1024,
        piece_length: int = 512,
        epochs: int = 5,
        batch_size: int = 32,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        dropout: float = 0.1,
        validation_fraction: float = 0.1,
        evaluate_every: int = 20,
        warm_start: bool = False,
        random_state: int = 0,
        device: str = "cpu",
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.piece_length = piece_length
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.validation_fraction = validation_fraction
        self.evaluate_every = evaluate_every
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device

    def fit(self, X: Sequence[str], y: ArrayLike) -> Self:
        """Fine-tune on texts and their scores ``(n,)``.

        Raises
        ------
        DataError
            If lengths differ, there are too few texts for the split, or a score is not finite.
        """
        if not is_texts(X):
            raise DataError("X must be texts: this model reads them itself")
        targets = checked_targets(y, len(X))
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation_fraction must be between 0 and 1, got {self.validation_fraction}"
            )
        order = np.random.default_rng(self.random_state).permutation(len(X))
        n_validation = max(2, round(self.validation_fraction * len(X)))
        if len(X) - n_validation < 2:
            raise DataError(f"X must have more texts for a validation split, got {len(X)}")
        held_out, kept = order[:n_validation], order[n_validation:]
        self.target_mean_, self.target_scale_ = _moments(targets[kept])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            if not (self.warm_start and hasattr(self, "module_")):
                self._build()
            tokens = self._tokenized(X)
            self._train(tokens, targets, kept, held_out)
        return self

    def predict(self, X: Sequence[str]) -> NDArray[np.float64]:
        """Return the predicted scores ``(n,)``, float64, in the units of `fit`."""
        if not hasattr(self, "module_"):
            raise DataError("this TransformerInfluenceModel is not fitted: call fit first")
        if not is_texts(X):
            raise DataError("X must be texts: this model reads them itself")
        tokens = self._tokenized(X)
        return self._predicted(tokens) * self.target_scale_ + self.target_mean_

    def score(self, X: Sequence[str], y: ArrayLike) -> float:
        """Return Spearman's rank correlation of predictions and `y`; NaN where either is flat."""
        return spearman(self.predict(X), np.asarray(y, dtype=np.float64))

    def inference_flops(self, texts: Sequence[str]) -> float:
        """Return 2 x parameters x tokens of scoring `texts`."""
        if not hasattr(self, "module_"):
            return math.nan
        tokens = sum(len(ids) for ids in self._tokenized(texts))
        return 2.0 * sum(p.numel() for p in self.module_.parameters()) * tokens

    def _build(self) -> None:
        encoder, tokenizer = self.encoder, self.tokenizer
        if isinstance(encoder, str | Path):
            from transformers import AutoModel, AutoTokenizer

            folder = _folder(encoder)
            encoder = AutoModel.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder) if tokenizer is None else tokenizer
        elif isinstance(encoder, nn.Module):
            encoder = copy.deepcopy(encoder)
        else:
            raise DataError(f"encoder must be a name or a module, got {type(encoder).__name__}")
        if tokenizer is None:
            raise DataError("tokenizer must be given where encoder is a module")
        window = getattr(encoder.config, "max_position_embeddings", self.piece_length)
        if self.piece_length > window:
            raise DataError(
                f"piece_length must be at most {window}, the encoder's window, "
                f"got {self.piece_length}"
            )
        self.tokenizer_ = tokenizer
        self.module_ = SplitTextRegressor(
            encoder.float(), piece_length=self.piece_length, dropout=self.dropout
        ).to(self.device)

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer_(
            [str(text) for text in texts], truncation=True, max_length=self.max_length
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _batch(self, tokens: list[list[int]], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        width = max(1, *(len(tokens[row]) for row in rows))
        ids = torch.full((len(rows), width), self.tokenizer_.pad_token_id or 0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(tokens[row])] = torch.tensor(tokens[row], dtype=torch.long)
            mask[place, : len(tokens[row])] = 1
        return ids.to(self.device), mask.to(self.device)

    def _predicted(self, tokens: list[list[int]]) -> NDArray[np.float64]:
        self.module_.eval()
        predictions = np.empty(len(tokens))
        by_length = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
        with torch.no_grad():
            for start in range(0, len(tokens), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                predictions[rows] = self.module_(*self._batch(tokens, rows)).double().cpu().numpy()
        return predictions

    def _train(
        self,
        tokens: list[list[int]],
        targets: NDArray[np.float64],
        kept: NDArray[np.int64],
        held_out: NDArray[np.int64],
    ) -> None:
        standardised = torch.tensor(
            (targets - self.target_mean_) / self.target_scale_,
            dtype=torch.float32,
            device=self.device,
        )
        optimizer = torch.optim.AdamW(
            self.module_.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        total = self.epochs * math.ceil(len(kept) / self.batch_size)
        best, best_weights = -math.inf, None
        held_out_tokens = [tokens[row] for row in held_out.tolist()]
        for step, rows in enumerate(self._training_batches(kept), start=1):
            self.module_.train()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - (step - 1) / total)
            loss = nn.functional.mse_loss(
                self.module_(*self._batch(tokens, rows)), standardised[rows]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.module_.parameters(), 1.0)
            optimizer.step()
            if step % self.evaluate_every == 0 or step == total:
                found = spearman(self._predicted(held_out_tokens), targets[held_out])
                found = -1.0 if math.isnan(found) else found
                if found > best:
                    best = found
                    best_weights = copy.deepcopy(self.module_.state_dict())
        if best_weights is not None:
            self.module_.load_state_dict(best_weights)
        self.module_.eval()
        self.validation_spearman_ = best

    def _training_batches(self, rows: NDArray[np.int64]) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.random_state, 1])
        for _ in range(self.epochs):
            order = rng.permutation(rows).tolist()
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the rank correlation; NaN for fewer than two values or where all are equal."""
    if len(a) != len(b):
        raise DataError(f"y must have {len(a)} entries, one per row of X, got {len(b)}")
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(spearmanr(a, b).statistic)


def is_texts(X: Any) -> bool:
    """Tell texts from vectors by the first entry.

    Raises
    ------
    DataError
        If `X` is a single string or empty.
    """
    if isinstance(X, str | bytes):
        raise DataError("X must be a list of texts, got a single one")
    if len(X) == 0:
        raise DataError("X must have at least one row, got none")
    return isinstance(X[0], str)


def checked_targets(y: ArrayLike, n: int) -> NDArray[np.float64]:
    """Return scores as float64 ``(n,)``.

    Raises
    ------
    DataError
        If there are not `n`, fewer than three, or one is NaN or infinite.
    """
    targets = np.asarray(y, dtype=np.float64)
    if targets.shape != (n,):
        raise DataError(f"y must have shape ({n},), one score per row of X, got {targets.shape}")
    if n < 3:
        raise DataError(f"y must have at least 3 scores to learn from, got {n}")
    bad = np.flatnonzero(~np.isfinite(targets))
    if bad.size:
        raise DataError(f"y has NaN or inf in row {int(bad[0])} ({bad.size} such rows)")
    return targets


def _moments(targets: NDArray[np.float64]) -> tuple[float, float]:
    scale = float(targets.std())
    if scale == 0:
        warnings.warn("all scores are equal: there is nothing to learn", stacklevel=3)
        scale = 1.0
    return float(targets.mean()), scale


def _folder(name: str | Path) -> str:
    """Return where the encoder lies: packaged models are fetched, anything else is passed on."""
    from bakeoff.models.packaged import is_packaged, pull

    known = _SENTENCE_TRANSFORMERS.get(str(name).removeprefix("sentence-transformers/"), str(name))
    return str(pull(known)) if is_packaged(known) else str(name)
