"""Lexical specialisation: a transformer's word vectors, trained on synonyms of many languages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from bakeoff.data.formats import count
from bakeoff.data.lexicon_sources import constraints_of_columns, hold_pairs, pairs_of_columns
from bakeoff.data.lexicons import Constraints, Lexicon, WordPairs, build_pairs
from bakeoff.embedding.bottleneck_adapters import AdapterTransformer, add_adapters
from bakeoff.embedding.pooling import mean_over_tokens, one_of, positive_int
from bakeoff.embedding.word_vectors import Layer, Vectors, WordEncoder, check_layer, padded
from bakeoff.errors import DataError

METHOD = {
    "slug": "lexical-specialization",
    "title": "Massively multilingual lexical specialisation of word vectors",
    "paper": 'Green et al., "Massively Multilingual Lexical Specialization of Multilingual '
    'Transformers", ACL 2023, arXiv 2208.01018',
    "designs": ["lexical-full", "lexical-adapter", "lexical-lora"],
    "names": ["LexicalSpecializer", "WordEncoder", "WordPooling", "nt_xent", "bli"],
}

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Peft = Literal["full", "adapter", "lora"]
Glosses = Literal["none", "separate", "multitask", "joint"]
Similarity = Literal["cosine", "csls"]

# Tokens of a batch that one forward pass reads on a CPU, so that activations stay in its cache.
_PASS_TOKENS = 2048


# The loss -----------------------------------------------------------------------------------------


def nt_xent(
    vectors: Tensor,
    labels: Tensor,
    temperature: float = 0.07,
    *,
    similarity: Similarity = "cosine",
) -> Tensor:
    """Return the contrastive loss of words against all words of other synsets.

    Every two words of one label are a positive pair: not only the two of one row, so that no word
    of the batch is taken for a negative of its own synonym. Of a pair (i, j) with similarity s::

        -log( exp(s_ij / t) / ( exp(s_ij / t) + sum over k of another label of exp(s_ik / t) ) )

    averaged over all ordered positive pairs. Other positives of i are not in the denominator.

    Parameters
    ----------
    vectors
        ``(n, d)``, floating point, of any length.
    labels
        ``(n,)`` integers, the synsets.
    temperature
        Its t.
    similarity
        ``"cosine"``, or ``"csls"``: twice the cosine less the mean cosine of each of the two to the
        other words of the batch, which takes away what makes a word similar to all.

    Returns
    -------
    Tensor
        A scalar, in float32 at least. 0 where the batch has no positive pair or no negative one.

    Raises
    ------
    DataError
        If shapes do not agree, or `temperature` is not above 0.

    Warns
    -----
    UserWarning
        If there is no positive pair: there is nothing to learn from such a batch.

    References
    ----------
    Tommaso Green, Simone Paolo Ponzetto and Goran Glavaš. "Massively Multilingual Lexical
    Specialization of Multilingual Transformers". ACL 2023. arXiv:2208.01018.

    Examples
    --------
    With all vectors equal, a word guesses among its synonym and two words of another synset:

    >>> same = torch.ones(4, 8)
    >>> torch.isclose(nt_xent(same, torch.tensor([0, 0, 1, 1])), torch.tensor(3.0).log())
    tensor(True)
    """
    logits, positive, negative = _prepared(vectors, labels, temperature, similarity)
    if not _has_pairs(positive, negative):
        return vectors.sum() * 0.0
    # log(1 + exp(a - s)) with a the log-sum over negatives is the loss above, without overflow.
    against = logits.masked_fill(~negative, float("-inf")).logsumexp(dim=1, keepdim=True)
    return nn.functional.softplus(against - logits)[positive].mean()


def supervised_contrastive(
    vectors: Tensor,
    labels: Tensor,
    temperature: float = 0.07,
    *,
    similarity: Similarity = "cosine",
) -> Tensor:
    """Return the supervised contrastive loss: the other positives are in the denominator too.

    The mean over a word's positives is taken first, then the mean over words that have any.

    Parameters
    ----------
    vectors, labels, temperature, similarity
        As for `nt_xent`.

    Returns
    -------
    Tensor
        A scalar, in float32 at least.

    Raises
    ------
    DataError
        As `nt_xent`.

    References
    ----------
    Prannay Khosla et al. "Supervised Contrastive Learning". NeurIPS 2020. arXiv:2004.11362.

    Examples
    --------
    >>> same = torch.ones(4, 8)
    >>> torch.isclose(supervised_contrastive(same, torch.tensor([0, 0, 0, 1])),
    ...               torch.tensor(3.0).log())
    tensor(True)
    """
    logits, positive, negative = _prepared(vectors, labels, temperature, similarity)
    if not _has_pairs(positive, negative):
        return vectors.sum() * 0.0
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    everything = logits.masked_fill(own, float("-inf")).logsumexp(dim=1, keepdim=True)
    sums = torch.where(positive, everything - logits, 0.0).sum(dim=1)
    n_positives = positive.sum(dim=1)
    return (sums / n_positives.clamp(min=1))[n_positives > 0].mean()


def _prepared(
    vectors: Tensor, labels: Tensor, temperature: float, similarity: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarities over the temperature, and the masks of positive and negative pairs."""
    if vectors.dim() != 2 or labels.shape != vectors.shape[:1]:
        raise DataError(
            f"vectors must be (n, d) and labels (n,), got {tuple(vectors.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not temperature > 0:
        raise DataError(f"temperature must be above 0, got {temperature!r}")
    one_of("similarity", similarity, ("cosine", "csls"))
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    unit = nn.functional.normalize(wide, dim=1)
    similarities = unit @ unit.T
    if similarity == "csls":
        n_others = max(1, len(unit) - 1)
        others = (similarities.sum(dim=1) - similarities.diagonal()) / n_others
        similarities = 2 * similarities - others[:, None] - others[None, :]
    same = labels[:, None] == labels[None, :]
    different = ~same
    return similarities / temperature, same.fill_diagonal_(False), different


def _has_pairs(positive: Tensor, negative: Tensor) -> bool:
    if not bool(positive.any()):
        warnings.warn(
            "no two words of the batch share a synset: the loss has no positive pair and is 0",
            stacklevel=3,
        )
        return False
    return bool(negative.any())


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LexicalHistory:
    """What a training run did.

    Parameters
    ----------
    losses
        At every step, before its update; NaN where a batch had no positive pair and was skipped.
    n_pairs, n_words
        Pairs to draw from, and distinct words in them.
    n_untokenisable
        Entries left out because the tokenizer makes no token of them.
    n_validation
        Pairs left out because a validation lexicon has one of the words.
    checks
        Per check: step, and the mean relative gain of MRR over the untrained model.
    best_step
        The step whose weights were kept, 0 for the untrained model's; None without validation.
    """

    losses: tuple[float, ...]
    n_pairs: int
    n_words: int
    n_untokenisable: int
    n_validation: int
    checks: tuple[tuple[int, float], ...]
    best_step: int | None


class LexicalSpecializer(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Turns a multilingual transformer into an encoder of words by a short contrastive run.

    Two words of one synset, of one language or two, are pulled together, against the words of all
    other synsets in the batch (`nt_xent`).

    Parameters
    ----------
    base_model
        As for `WordEncoder`; never changed.
    temperature
        Of the loss.
    alpha
        How pairs of languages are evened out, see `bakeoff.data.lexicons.WordPairs.weights`; None
        or -1 takes every pair once per epoch.
    peft
        ``"full"`` trains all weights (the paper's Babel-FT), ``"adapter"`` a bottleneck adapter per
        layer (Babel-Ad), ``"lora"`` LoRA on the projections, merged at the end.
    loss
        ``"nt-xent"`` or ``"supcon"``.
    similarity
        ``"cosine"`` or ``"csls"``.
    labels
        ``"synset"``, or ``"row"``: only the partner in the row is a positive, which makes false
        negatives of a synset's other words. The rival, not the method.
    layer
        Whose states are averaged, see `WordPooling`.
    glosses
        ``"none"``: words alone. ``"separate"``: each word before its gloss, the word's tokens
        pooled. ``"multitask"``: the same, and the loss of the glosses' means added.
        ``"joint"``: both words, then both glosses, in one pass. Needs constraints with glosses.
    batch_size
        Pairs per batch; the paper's is 256.
    epochs
        Passes; the paper has up to 2.
    steps
        Optimizer steps instead of epochs.
    learning_rate, weight_decay
        Of AdamW. The paper's constant 5e-6 is for a full fine-tuning on a million pairs; adapters
        and LoRA want about 1e-4.
    warmup_steps
        Linear warm-up to `learning_rate`; the paper has none.
    max_grad_norm
        Longer gradients are shortened to it; None, as in the paper, for none.
    adapter_reduction, lora_rank
        Sizes of what is trained.
    max_per_language_pair
        Cap of the pairs built of synsets; has no effect on pairs given.
    checks_per_epoch
        How often the model is judged on validation lexicons.
    csls_k
        Of that judging; None ranks by cosine, as the paper does.
    seed
        Determines everything, dropout included.
    device
        A torch device.

    Attributes
    ----------
    encoder_ : WordEncoder
        The trained model.
    history_ : LexicalHistory
        What happened.

    Notes
    -----
    A batch is read in passes of words of about one length, in place of one padded batch; only the
    loss sees all words at once, and the gradients are the same.

    References
    ----------
    Tommaso Green, Simone Paolo Ponzetto and Goran Glavaš. "Massively Multilingual Lexical
    Specialization of Multilingual Transformers". ACL 2023. arXiv:2208.01018.

    Examples
    --------
    >>> from bakeoff.data.lexicon_sources import cldr_names
    >>> specializer = LexicalSpecializer("all-minilm-l6-v2", steps=100)  # doctest: +SKIP
    >>> specializer.fit(cldr_names(["de", "en", "fr"]))  # doctest: +SKIP
    >>> specializer.encode_words(["Germany", "Allemagne"]).shape  # doctest: +SKIP
    (2, 384)
    """

    def __init__(
        self,
        base_model: Any = "all-minilm-l6-v2",
        *,
        temperature: float = 0.07,
        alpha: float | None = 0.5,
        peft: Peft = "full",
        loss: Literal["nt-xent", "supcon"] = "nt-xent",
        similarity: Similarity = "cosine",
        labels: Literal["synset", "row"] = "synset",
        layer: Layer = -1,
        glosses: Glosses = "none",
        batch_size: int = 256,
        epochs: int = 2,
        steps: int | None = None,
        learning_rate: float = 5e-6,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        max_grad_norm: float | None = None,
        adapter_reduction: int = 16,
        lora_rank: int = 8,
        max_per_language_pair: int | None = 1000,
        checks_per_epoch: int = 20,
        csls_k: int | None = None,
        seed: int = 10,
        device: str = "cpu",
    ) -> None:
        self.base_model = base_model
        self.temperature = temperature
        self.alpha = alpha
        self.peft = peft
        self.loss = loss
        self.similarity = similarity
        self.labels = labels
        self.layer = layer
        self.glosses = glosses
        self.batch_size = batch_size
        self.epochs = epochs
        self.steps = steps
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self.adapter_reduction = adapter_reduction
        self.lora_rank = lora_rank
        self.max_per_language_pair = max_per_language_pair
        self.checks_per_epoch = checks_per_epoch
        self.csls_k = csls_k
        self.seed = seed
        self.device = device

    def fit(
        self,
        constraints: Constraints | WordPairs | Sequence[Sequence[str]],
        y: object = None,
        *,
        validation: Sequence[Lexicon] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Train on synonyms.

        Parameters
        ----------
        constraints
            `Constraints`, rows ``(synset, word, language)`` or a DataFrame with these columns:
            pairs are then built, with `max_per_language_pair`. Or pairs, which are taken as they
            are: `WordPairs`, rows ``(synset, word1, language1, word2, language2[, gloss1,
            gloss2])`` or a DataFrame with these columns.
        y
            Not used; for scikit-learn.
        validation
            Lexicons to select the weights by: the mean over them of the gain of MRR, relative to
            the untrained model. Pairs with one of their words are left out of training.
        progress
            Called with (steps done, steps in total).

        Raises
        ------
        DataError
            If a setting is out of range, constraints have no pair or no gloss where glosses are
            asked for, or nothing is left after filtering.
        FloatingPointError
            If the loss is not finite; names the step.

        Warns
        -----
        UserWarning
            If words have no token (says how many and names three), or batches have no positive
            pair and are skipped.
        """
        self._check()
        encoder = WordEncoder(self.base_model, device=self.device)
        check_layer(self.layer, encoder.n_layers)
        pairs = self._pairs(constraints)
        n_given = len(pairs)
        banned = {word for lexicon in validation for word in lexicon.words()}
        if banned:
            pairs = pairs.without_words(banned)
        n_validation = n_given - len(pairs)
        pairs, n_bare = self._with_tokens(pairs, encoder)
        if not len(pairs):
            raise DataError(
                f"no pair is left to train on: {n_validation:,} have a validation word and "
                f"{n_bare:,} a word without tokens"
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            history = self._train(encoder, pairs, tuple(validation), n_bare, n_validation, progress)
        self.encoder_ = encoder
        self.history_ = history
        return self

    def encode_words(
        self,
        words: Sequence[str],
        layer: Layer | None = None,
        *,
        language: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Vectors:
        """Return one vector per word, ``(n, d)``; see `WordEncoder.encode`.

        Parameters
        ----------
        words
            The words.
        layer
            The layer trained if None.
        language
            Not used: one space for all languages.
        progress
            Called with (words done, words in total).
        """
        chosen = self.layer if layer is None else layer
        return self._fitted().encode(words, chosen, progress=progress)

    def transform(self, words: Sequence[str]) -> Vectors:
        """Return `encode_words`, for scikit-learn's pipelines."""
        return self.encode_words(words)

    def to_sentence_transformer(self, *, normalize: bool = False) -> SentenceTransformer:
        """Return the trained model as a SentenceTransformer that averages a word's own tokens."""
        return self._fitted().sentence_transformer(self.layer, normalize=normalize)

    def save(self, folder: str | Path, *, normalize: bool = False) -> Path:
        """Write the model as a sentence-transformers folder.

        It loads in a new process with ``SentenceTransformer(folder, trust_remote_code=True)`` where
        bakeoff is installed: the pooling is `WordPooling`.
        """
        from bakeoff.models.gguf import quiet_transformers

        model = self.to_sentence_transformer(normalize=normalize)
        with quiet_transformers():
            model.save_pretrained(str(folder), create_model_card=False)
        return Path(folder)

    def _fitted(self) -> WordEncoder:
        encoder: WordEncoder | None = getattr(self, "encoder_", None)
        if encoder is None:
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("this LexicalSpecializer is not trained yet: call fit")
        return encoder

    # Setting up -----------------------------------------------------------------------------------

    def _check(self) -> None:
        one_of("peft", self.peft, ("full", "adapter", "lora"))
        one_of("loss", self.loss, ("nt-xent", "supcon"))
        one_of("similarity", self.similarity, ("cosine", "csls"))
        one_of("labels", self.labels, ("synset", "row"))
        one_of("glosses", self.glosses, ("none", "separate", "multitask", "joint"))
        for name in ("batch_size", "epochs", "checks_per_epoch", "adapter_reduction", "lora_rank"):
            positive_int(name, getattr(self, name))
        if self.steps is not None:
            positive_int("steps", self.steps)
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise DataError("weight_decay and warmup_steps must be at least 0")

    def _pairs(self, given: Any) -> WordPairs:
        given = _as_words(given)
        pairs = (
            given
            if isinstance(given, WordPairs)
            else build_pairs(
                given, max_per_language_pair=self.max_per_language_pair, seed=self.seed
            )
        )
        if not len(pairs):
            raise DataError("constraints: there is no pair to train on")
        if self.glosses != "none":
            glosses = pairs.constraints.glosses
            if glosses is None:
                raise DataError(f"glosses={self.glosses!r} needs constraints with glosses")
            there = np.array([bool(gloss.strip()) for gloss in glosses])
            pairs = pairs.select(there[pairs.first] & there[pairs.second])
            if not len(pairs):
                raise DataError("no pair has glosses for both words")
        return pairs

    def _with_tokens(self, pairs: WordPairs, encoder: WordEncoder) -> tuple[WordPairs, int]:
        rows = np.union1d(pairs.first, pairs.second)
        words = [pairs.constraints.words[row] for row in rows.tolist()]
        fit = np.zeros(len(pairs.constraints), dtype=np.bool_)
        fit[rows] = encoder.has_tokens(words)
        bare = [word for word, row in zip(words, rows.tolist(), strict=True) if not fit[row]]
        if bare:
            warnings.warn(
                f"{count(len(bare), 'word')} without any token left out, the first {bare[:3]}",
                stacklevel=3,
            )
        return pairs.select(fit[pairs.first] & fit[pairs.second]), len(bare)

    def _prepare(self, encoder: WordEncoder) -> list[nn.Parameter]:
        """Put in what is trained and return its parameters."""
        backbone = encoder.backbone
        backbone.requires_grad_(True)
        if self.peft == "adapter":
            add_adapters(backbone, self.adapter_reduction)
            encoder.transformer.__class__ = AdapterTransformer
        elif self.peft == "lora":
            from bakeoff.embedding.two_stage import add_lora, lora_config

            config = lora_config(backbone)
            config.r, config.lora_alpha = self.lora_rank, 2 * self.lora_rank
            add_lora(backbone, config)
        return [weight for weight in backbone.parameters() if weight.requires_grad]

    # The loop -------------------------------------------------------------------------------------

    def _train(
        self,
        encoder: WordEncoder,
        pairs: WordPairs,
        validation: tuple[Lexicon, ...],
        n_bare: int,
        n_validation: int,
        progress: Callable[[int, int], None] | None,
    ) -> LexicalHistory:
        parameters = self._prepare(encoder)
        reader = _Reader(encoder, pairs, self.glosses, self.layer)
        labels = pairs.labels if self.labels == "synset" else None
        per_epoch = math.ceil(len(pairs) / self.batch_size)
        steps = self.steps or per_epoch * self.epochs
        interval = max(1, per_epoch // self.checks_per_epoch)
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        judge = _Judge(encoder, validation, self.layer, self.csls_k, parameters)
        judge.check(0)
        losses: list[float] = []
        batches = self._batches(pairs)
        for step in range(1, steps + 1):
            rows = next(batches)
            encoder.backbone.train()
            if self.warmup_steps:
                rate = self.learning_rate * min(1.0, step / self.warmup_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
            # The two words of a row stand side by side, as does their label twice.
            given = np.arange(len(rows)) if labels is None else labels[rows]
            batch_labels = torch.from_numpy(np.repeat(given, 2)).to(encoder.device)
            total = self._step_loss(reader.read(rows), batch_labels)
            if total is None:
                losses.append(math.nan)
            else:
                losses.append(float(total.detach()))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss at step {step} is {losses[-1]}")
                optimizer.zero_grad(set_to_none=True)
                total.backward()  # type: ignore[no-untyped-call]
                if self.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                optimizer.step()
            if step % interval == 0 or step == steps:
                judge.check(step)
            if progress is not None:
                progress(step, steps)
        best = judge.restore()
        if self.peft == "lora":
            from bakeoff.embedding.two_stage import merge_lora

            merge_lora(encoder.backbone)
        encoder.backbone.requires_grad_(True)
        encoder.backbone.eval()
        n_skipped = sum(map(math.isnan, losses))
        if n_skipped:
            warnings.warn(
                f"{count(n_skipped, 'batch', 'batches')} without a positive or a negative pair "
                "skipped",
                stacklevel=4,
            )
        return LexicalHistory(
            losses=tuple(losses),
            n_pairs=len(pairs),
            n_words=len(np.union1d(pairs.first, pairs.second)),
            n_untokenisable=n_bare,
            n_validation=n_validation,
            checks=tuple(judge.checks),
            best_step=best,
        )

    def _step_loss(self, views: list[Tensor], labels: Tensor) -> Tensor | None:
        same = labels[:, None] == labels[None, :]
        if int(same.sum()) == len(labels) or bool(same.all()):
            return None
        loss = nt_xent if self.loss == "nt-xent" else supervised_contrastive
        parts = [loss(view, labels, self.temperature, similarity=self.similarity) for view in views]
        return sum(parts[1:], start=parts[0])

    def _batches(self, pairs: WordPairs) -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng(self.seed)
        resampled = self.alpha is not None and self.alpha != -1
        weights = pairs.weights(self.alpha)
        cumulative = np.cumsum(weights)
        while True:
            if resampled:
                drawn = np.searchsorted(cumulative, rng.random(len(pairs)) * cumulative[-1])
                order = np.minimum(drawn, len(pairs) - 1)
            else:
                order = rng.permutation(len(pairs))
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]


_PAIR_COLUMNS = ("synset", "word1", "language1", "word2", "language2", "gloss1", "gloss2")


def _as_words(given: Any) -> Constraints | WordPairs:
    """Return what `LexicalSpecializer.fit` was given, rows and tables read."""
    if isinstance(given, Constraints | WordPairs):
        return given
    if hasattr(given, "columns") and hasattr(given, "to_dict"):
        cells = given.astype(object).where(given.notna(), None)
        columns = {str(one): list(cells[one]) for one in cells}
        read = pairs_of_columns if hold_pairs(list(columns)) else constraints_of_columns
        return read(columns)
    rows = [tuple(row) for row in given]
    widths = {len(row) for row in rows}
    if widths == {5} or widths == {7}:
        columns = dict(zip(_PAIR_COLUMNS, map(list, zip(*rows, strict=True)), strict=False))
        return pairs_of_columns(columns)
    return Constraints.of(rows)


class _Reader:
    """Runs the words of a batch through the model, with gradients."""

    def __init__(
        self, encoder: WordEncoder, pairs: WordPairs, glosses: Glosses, layer: Layer
    ) -> None:
        self.encoder, self.pairs, self.glosses, self.layer = encoder, pairs, glosses, layer
        rows = np.union1d(pairs.first, pairs.second).tolist()
        words = [pairs.constraints.words[row] for row in rows]
        ids = encoder.ids(words)
        self.word_ids = dict(zip(rows, ids, strict=True))
        self.gloss_ids: dict[int, list[int]] = {}
        self.separator: list[int] = []
        if glosses != "none":
            given = pairs.constraints.glosses or ()
            tokens = encoder.tokenizer(
                [given[row] for row in rows], add_special_tokens=False, truncation=True,
                max_length=encoder.window,
            )["input_ids"]  # fmt: skip
            self.gloss_ids = dict(zip(rows, tokens, strict=True))
            sample = encoder.ids(["a"])[0]
            self.separator = (
                sample[len(sample) - encoder.n_suffix :]
                or encoder.tokenizer(":", add_special_tokens=False)["input_ids"]
            )

    def read(self, rows: NDArray[np.int64]) -> list[Tensor]:
        """Return ``(2n, d)`` of the pairs' words in turn; and of their glosses for multitask."""
        turns = np.stack([self.pairs.first[rows], self.pairs.second[rows]], axis=1)
        if self.glosses == "joint":
            inputs = [self._joint(one, other) for one, other in turns.tolist()]
            return [self._run(inputs, n_spans=2)]
        inputs = [self._single(row) for row in turns.ravel().tolist()]
        if self.glosses == "multitask":
            both = self._run(inputs, n_spans=2).view(len(inputs), 2, -1)
            return [both[:, 0], both[:, 1]]
        return [self._run(inputs, n_spans=1)]

    def _word(self, row: int) -> tuple[list[int], list[int], list[int]]:
        ids = self.word_ids[row]
        end = len(ids) - self.encoder.n_suffix
        return ids[: self.encoder.n_prefix], ids[self.encoder.n_prefix : end], ids[end:]

    def _single(self, row: int) -> tuple[list[int], list[int]]:
        """Return ids, and the span that each belongs to: 1 the word, 2 its gloss, 0 none."""
        prefix, word, suffix = self._word(row)
        if self.glosses == "none":
            spans = [0] * len(prefix) + [1] * len(word) + [0] * len(suffix)
            return [*prefix, *word, *suffix], spans
        mark = self.separator
        room = self.encoder.window - len(prefix) - len(mark) - len(suffix)
        word = word[: room - 1]  # a token of the gloss has its place
        gloss = self.gloss_ids[row][: room - len(word)]
        spans = [0] * len(prefix) + [1] * len(word) + [0] * len(mark) + [2] * len(gloss)
        return [*prefix, *word, *mark, *gloss, *suffix], [*spans, *[0] * len(suffix)]

    def _joint(self, one: int, other: int) -> tuple[list[int], list[int]]:
        """Both words, then both glosses, as the authors' code orders them."""
        prefix, word, suffix = self._word(one)
        second = self._word(other)[1]
        mark = self.separator
        room = self.encoder.window - len(prefix) - 2 * len(mark) - len(suffix)
        if len(word) + len(second) > room:
            word, second = word[: room // 2], second[: room // 2]
        ids = [*prefix, *word, *mark, *second, *mark]
        spans = [0] * len(prefix) + [1] * len(word) + [0] * len(mark) + [2] * len(second)
        glosses = [*self.gloss_ids[one], *mark, *self.gloss_ids[other]]
        room = max(0, self.encoder.window - len(ids) - len(suffix))
        ids = [*ids, *glosses[:room], *suffix]
        return ids, [*spans, *[0] * (len(ids) - len(spans))]

    def _run(self, inputs: list[tuple[list[int], list[int]]], n_spans: int) -> Tensor:
        """Return the means over spans 1 to `n_spans` of each input, ``(n * n_spans, d)``."""
        from bakeoff.models.encoding import token_budget_batches

        encoder = self.encoder
        lengths = [len(ids) for ids, _ in inputs]
        parts: list[Tensor] = []
        order: list[int] = []
        budget = _PASS_TOKENS if encoder.device.type == "cpu" else 10**9
        for batch in token_budget_batches(lengths, budget):
            ids, mask = padded([inputs[i][0] for i in batch], encoder.tokenizer, encoder.device)
            width = ids.shape[1]
            spans = torch.tensor(
                [[*inputs[i][1], *[0] * (width - lengths[i])] for i in batch], device=ids.device
            )
            states = self._states(ids, mask)
            parts.append(
                torch.stack(
                    [mean_over_tokens(states, spans == span + 1) for span in range(n_spans)], dim=1
                )
            )
            order += batch
        back = torch.tensor(np.argsort(order), device=encoder.device)
        return torch.cat(parts)[back].flatten(0, 1)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        # No token types, as in the authors' code: a gloss is read as the word is.
        output = self.encoder.backbone(
            input_ids=ids, attention_mask=mask, output_hidden_states=self.layer != -1
        )
        if self.layer == -1:
            return cast("Tensor", output.last_hidden_state)
        if self.layer == "mean":
            return torch.stack(list(output.hidden_states)).mean(dim=0)
        return cast("Tensor", output.hidden_states[self.layer])


class _Judge:
    """Keeps the weights whose gain in MRR, relative to the untrained model, is the largest."""

    def __init__(
        self,
        encoder: WordEncoder,
        lexicons: tuple[Lexicon, ...],
        layer: Layer,
        csls_k: int | None,
        parameters: list[nn.Parameter],
    ) -> None:
        self.encoder, self.lexicons, self.layer, self.csls_k = encoder, lexicons, layer, csls_k
        self.parameters = parameters
        self.checks: list[tuple[int, float]] = []
        self._raw: list[float] = []
        self._best: tuple[float, int, list[Tensor]] | None = None

    def check(self, step: int) -> None:
        """Score the model as it is."""
        if not self.lexicons:
            return
        from bakeoff.embedding.lexicon_induction import bli_lexicon

        scores = [
            bli_lexicon(
                lambda words: self.encoder.encode(words, self.layer),
                one,
                csls_k=self.csls_k,
                has_tokens=self.encoder.has_tokens,
            ).mrr
            for one in self.lexicons
        ]
        self._raw = self._raw or scores
        gain = float(np.mean([(s - raw) / raw for s, raw in zip(scores, self._raw, strict=True)]))
        self.checks.append((step, gain))
        if self._best is None or gain > self._best[0]:
            weights = [weight.detach().clone() for weight in self.parameters]
            self._best = (gain, step, weights)

    def restore(self) -> int | None:
        """Put the best weights back and return their step."""
        if self._best is None:
            return None
        with torch.no_grad():
            for weight, best in zip(self.parameters, self._best[2], strict=True):
                weight.copy_(best)
        return self._best[1]
