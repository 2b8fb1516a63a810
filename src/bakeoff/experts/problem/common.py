"""What the problems of this family share: domains, a base model, a budget of tokens, and losses."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import build_once, cache_directory, write_text
from bakeoff.data.domain_texts import DomainTexts, Size, default_domains
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models.gguf import quiet_transformers
from bakeoff.models.likelihood import response_losses
from bakeoff.models.shared import SharedModels
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Metric, Trial, Work
from bakeoff.study.measure import warnings_noted

if TYPE_CHECKING:
    from torch import Tensor

    from bakeoff.models import LanguageModel

Scores = dict[str, dict[str, NDArray[np.float64]]]

LOSS = Metric("loss (nats per token)", higher_is_better=False, margin=0.01)
"""The headline: of each held-out document, the logarithm of its perplexity."""

SMALL_SHAPE = SmallGPT(vocabulary=2048, n_layers=4, width=128, n_heads=4, context=128)
"""Shape of the decoder that is trained by default: 1.3 million weights."""

SCRATCH_RATE = 3e-3
"""Peak learning rate of the small decoder; with short batches it learns most from few tokens."""

SMALL_BASES = {"small-gpt": "sequential", "small-parallel": "parallel"}
"""Decoders that begin with random weights, and how their blocks are built."""

_LEAST_DOCUMENTS = 2
_INSPECTED_AT_ONCE = 16


class DomainProblem(ABC):
    """Train on texts of several domains, judge by the loss of held-out documents: the base class.

    A subclass names its question, its metrics and its designs, and says in `_run` what a design
    does. All randomness comes from the seed, which is the same for all designs.

    Parameters
    ----------
    texts
        Domains; or a size of the default ones (``"smoke"``, ``"demo"``, ``"full"``).
    base
        What is trained or changed: ``"small-gpt"`` or ``"small-parallel"``, a small decoder with
        random weights and a vocabulary of its own; or a packaged name, folder or hub id.
    n_layers
        Keep only the first layers of a model that is named.
    shape
        Of the small decoder.
    n_tokens
        Tokens that each design may read in training; to within a batch.
    context
        Length of sequences and longest document in tokens; by default that of `shape`, or 256.
    batch_size
        Sequences per step.
    learning_rate
        Peak rate; by default 3e-3 from random weights and 1e-4 otherwise.
    device
        Where to train.

    Raises
    ------
    DataError
        If a number is out of range, a domain has too few documents, or there is no such base.
    """

    name = "experts"
    question = ""

    def __init__(
        self,
        texts: DomainTexts | Size | None = None,
        *,
        base: str = "small-gpt",
        n_layers: int | None = None,
        shape: SmallGPT = SMALL_SHAPE,
        n_tokens: int = 300_000,
        context: int | None = None,
        batch_size: int = 4,
        learning_rate: float | None = None,
        device: str = "cpu",
    ) -> None:
        if texts is None or isinstance(texts, str):
            texts = default_domains("demo" if texts is None else texts)
        self.texts, self.base, self.shape, self.device = texts, base, shape, device
        self.n_layers = n_layers
        self.from_scratch = base in SMALL_BASES
        default_context = shape.context if self.from_scratch else 256
        self.context = default_context if context is None else context
        self.n_tokens, self.batch_size = n_tokens, batch_size
        if learning_rate is None:
            learning_rate = SCRATCH_RATE if self.from_scratch else 1e-4
        self.learning_rate = float(learning_rate)
        for name, least in {"n_tokens": 1, "context": 8, "batch_size": 1, "n_layers": 1}.items():
            if name != "n_layers" or n_layers is not None:
                setattr(self, name, _whole_number(name, getattr(self, name), least))
        if n_layers is not None and self.from_scratch:
            raise DataError(f"n_layers goes with a model that is named, not with base={base!r}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.from_scratch and self.context > shape.context:
            raise DataError(f"context must be at most the shape's {shape.context}, got {context}")
        for domain, documents in texts.held_out.items():
            if len(documents) < _LEAST_DOCUMENTS:
                raise DataError(
                    f"domain {domain!r} has {len(documents)} held-out documents, at least "
                    f"{_LEAST_DOCUMENTS} are needed: give more texts"
                )
        self._loaded = _Loaded()

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The loss of held-out documents first."""
        return {"loss": LOSS}

    @abstractmethod
    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""

    @abstractmethod
    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        """Do what one design does, and judge it."""

    @abstractmethod
    def _version(self) -> int:
        """Return a number that is raised when a trial's scores change."""

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(self._version())

    def fingerprint(self) -> str:
        """Return a digest of texts, base model and budget."""
        text = json.dumps(self._facts(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _facts(self) -> dict[str, object]:
        """Return all that scores depend on besides design and seed; a subclass adds its own."""
        scratch = [self.base, asdict(self.shape)]
        return {
            "question": self.question,
            "texts": self.texts.fingerprint(),
            "base": scratch if self.from_scratch else self._base().fingerprint,
            "n_layers": self.n_layers,
            "budget": [self.n_tokens, self.context, self.batch_size, self.learning_rate],
        }

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        start = "random weights" if self.from_scratch else "its weights"
        layers = "" if self.n_layers is None else f", its first {self.n_layers} layers"
        return {
            "question": self.question,
            "data": {
                domain: f"{len(texts):,} texts to train on "
                f"({sum(map(len, texts)) / 1e6:.1f} million characters), "
                f"{len(self.texts.held_out[domain]):,} held-out documents"
                for domain, texts in self.texts.training.items()
            },
            "base": f"{self.base}{layers}, from {start}",
            "budget": f"{self.n_tokens:,} tokens read, sequences of {self.context}, batches of "
            f"{self.batch_size}, learning rate {self.learning_rate:g}",
            "judged": f"by the loss of each held-out document, its first {self.context} tokens: "
            "the logarithm of its perplexity; a domain is a task",
            "notes": list(self.texts.notes),
        }

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; make the small decoder's vocabulary; cut the texts into rows."""
        for design in designs:
            self.check(design)
        work.progress(0.0, "reading the texts")
        longest = self._base().max_length
        if self.context > longest:
            raise DataError(f"context must be at most {longest}, got {self.context}")
        self.rows()

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Do what one design does, and judge it.

        Raises
        ------
        BakeoffError
            If training diverged, so that a loss is no number.
        """
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        for metric, tasks in trial.scores.items():
            if not all(np.isfinite(values).all() for values in tasks.values()):
                raise BakeoffError(
                    f"design {design.name!r}: {metric} is no number: training diverged; try a "
                    f"learning_rate below {self.learning_rate:g}"
                )
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    # -- what a design needs ---------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base model."""
        return self._base().tokenizer

    @property
    def end_id(self) -> int:
        """Id of the token that stands between texts."""
        return _end_id(self.tokenizer)

    @property
    def n_steps(self) -> int:
        """Steps of `batch_size` sequences that the budget of tokens allows."""
        return max(1, self.n_tokens // (self.batch_size * self.context))

    def start(self, seed: int) -> Any:
        """Return the dense decoder that designs begin with, a copy of the caller's own.

        From random weights, each seed draws other ones; a model that is named is the same for all.
        """
        if self.from_scratch:
            block: Any = SMALL_BASES[self.base]
            return self.shape.untrained(self.tokenizer, seed=seed, block=block).to(self.device)
        model = copy.deepcopy(self._base().model)
        if self.n_layers is not None:
            keep_layers(model, self.n_layers)
        return model.to(self.device)

    def rows(self) -> dict[str, Tensor]:
        """Return the training texts of each domain as rows of token ids ``(n, context)`` int64.

        Texts follow each other with an end token between them, so that nothing is padding; what
        does not fill a last row is left out.
        """
        if self._loaded.rows is None:
            self._loaded.rows = {
                domain: _packed(self.tokenizer, texts, self.context, domain)
                for domain, texts in self.texts.training.items()
            }
        return self._loaded.rows

    def documents(self) -> dict[str, list[list[int]]]:
        """Return the held-out documents of each domain as token ids, cut to fit the context."""
        if self._loaded.documents is None:
            self._loaded.documents = {
                domain: [ids[: self.context - 1] for ids in _token_ids(self.tokenizer, documents)]
                for domain, documents in self.texts.held_out.items()
            }
        return self._loaded.documents

    def losses(
        self, model: Any, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Return the loss of each held-out document by domain, in nats per token.

        As in training, a document comes after the end of another.
        """
        found: dict[str, NDArray[np.float64]] = {}
        total = sum(map(len, self.documents().values()))
        done = 0
        for domain, documents in self.documents().items():
            found[domain] = self.losses_of(domain, model)
            done += len(documents)
            if progress is not None:
                progress(done, total)
        return found

    def losses_of(self, domain: str, model: Any) -> NDArray[np.float64]:
        """Return the loss of each of one domain's held-out documents, in nats per token."""
        documents = self.documents()[domain]
        return response_losses(model, [[self.end_id]] * len(documents), documents).means

    def batches_to_inspect(self) -> list[dict[str, Tensor]]:
        """Return the held-out documents as batches for `inspect_experts`, padded on the right."""
        from bakeoff.experts.inspection import padded_batch

        batches = []
        for number, documents in enumerate(self.documents().values()):
            for start in range(0, len(documents), _INSPECTED_AT_ONCE):
                some = documents[start : start + _INSPECTED_AT_ONCE]
                batches.append(padded_batch([(number, ids) for ids in some], self.end_id))
        return batches

    def cost(
        self, model: Any, training_tokens: int, *, active: int | None = None
    ) -> dict[str, float]:
        """Return parameters and operations of a trained model, for a trial's cost.

        Parameters
        ----------
        model
            As it was trained.
        training_tokens
            How many tokens it read.
        active
            Parameters that one token meets, where `parameter_counts` does not know.
        """
        from bakeoff.experts.conversion import parameter_counts

        counts = parameter_counts(model)
        flops = forward_flops_per_token(model, self.rows())
        return {
            "total_parameters": float(counts.total),
            "active_parameters": float(counts.active if active is None else active),
            "trained_parameters": float(
                sum(p.numel() for p in model.parameters() if p.requires_grad)
            ),
            "training_tokens": float(training_tokens),
            "forward_flops_per_token": flops,
        }

    def save_winner(
        self, design: Design, artifact: Path, destination: Path, reason: str, text: str
    ) -> None:
        """Copy a trial's ``model`` folder; write its README: why, on what data, how to use it."""
        import shutil

        shutil.copytree(artifact / "model", destination, dirs_exist_ok=True)
        lines = [f"# {design.name}", "", f"Method: {design.method}.", ""]
        lines += [reason, ""] if reason else []
        lines += [f"Trained on {self.texts.name}: {', '.join(self.texts.domains)}.", "", text, ""]
        write_text(destination / "README.md", "\n".join(lines))

    def save_model(self, model: Any, folder: Path) -> None:
        """Save a transformers model with its tokenizer."""
        with quiet_transformers():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _base(self) -> LanguageModel:
        if not self.from_scratch:
            return self._loaded.models.language_model(self.base)
        texts = [text for some in self.texts.training.values() for text in some]
        # Of the small decoder only the vocabulary is wanted; the model beside it is a stand-in.
        key = json.dumps([1, asdict(self.shape), self.texts.fingerprint()])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]

        def build(folder: Path) -> None:
            tokenizer = self.shape.tokenizer(texts)
            with quiet_transformers():
                self.shape.untrained(tokenizer).save_pretrained(folder)
                tokenizer.save_pretrained(folder)

        folder = build_once(cache_directory() / "models" / f"vocabulary-{digest}", build)
        return self._loaded.models.language_model(str(folder))


class _Loaded:
    """What trials share in one process; left behind when pickled."""

    def __init__(self) -> None:
        self.models = SharedModels()
        self.rows: dict[str, Tensor] | None = None
        self.documents: dict[str, list[list[int]]] | None = None

    def __reduce__(self) -> tuple[type[_Loaded], tuple[()]]:
        return (type(self), ())


def keep_layers(model: Any, n_layers: int) -> None:
    """Remove all but the first layers of a decoder, in place.

    Raises
    ------
    DataError
        If it has fewer.
    """
    from bakeoff.experts.conversion import decoder_layers

    _, stack = decoder_layers(model)
    if n_layers > len(stack):
        raise DataError(f"n_layers must be at most {len(stack)}, got {n_layers}")
    del stack[n_layers:]
    config = model.config.get_text_config()
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]


def forward_flops_per_token(model: Any, rows: Mapping[str, Tensor]) -> float:
    """Return the floating-point operations of a forward pass per token, counted on real rows.

    A multiply-add is two operations; only matrix products and attention are counted, as they run.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bakeoff.models.inference import evaluating

    batch = torch.stack([some[0] for some in rows.values()])
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    # The attention kernel of a CPU is unknown to torch's counter; that of plain matrices is not.
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with evaluating(model), torch.no_grad(), attention, counter:
        model(input_ids=batch.to(device), use_cache=False)
    return counter.get_total_flops() / batch.numel()


def _whole_number(name: str, value: Any, least: int) -> int:
    """Return a whole number of any type as Python's own."""
    try:
        number = operator.index(value)
    except TypeError:
        raise DataError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise DataError(f"{name} must be at least {least}, got {number}")
    return number


def _end_id(tokenizer: Any) -> int:
    end = tokenizer.eos_token_id
    return int(end if end is not None else tokenizer.pad_token_id)


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return [[int(token) for token in ids] for ids in found]


def _packed(tokenizer: Any, texts: Sequence[str], context: int, domain: str) -> Tensor:
    import torch

    end = _end_id(tokenizer)
    ids = [token for text in _token_ids(tokenizer, texts) for token in (end, *text)]
    n_rows = len(ids) // context
    if n_rows == 0:
        raise DataError(
            f"domain {domain!r} holds {len(ids)} tokens to train on, less than one sequence of "
            f"{context}: give more texts, or a shorter context"
        )
    return torch.tensor(ids[: n_rows * context]).view(n_rows, context)
