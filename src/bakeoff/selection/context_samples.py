"""Samples with a long context: as text, as tokens that fit a window, and as scored before."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bakeoff.errors import DataError, ModelError

# What stands before context, instruction and response. The space that ends a marker belongs to the
# text behind it, so that words are cut into tokens as they are in running text.
MARKERS = ("### Input: ", "\n\n ### Instruction: ", "\n\n ### Response: ")
_NAMED = 5


def sample_id(sample: Any) -> str:
    """Return 16 hexadecimal digits that name a sample by its content.

    Examples
    --------
    >>> sample_id({"context": "c", "response": "r"}) == sample_id(
    ...     {"context": "c", "instruction": "", "response": "r"})
    True
    """
    return _text_of(sample, 0).id


# Samples as text and as tokens --------------------------------------------------------------------


@dataclass(frozen=True)
class SampleText:
    """A sample's three texts."""

    context: str
    instruction: str
    response: str

    @property
    def id(self) -> str:
        """16 hexadecimal digits that name the sample by its content."""
        content = json.dumps([self.context, self.instruction, self.response])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def sample_texts(samples: Iterable[Any]) -> list[SampleText]:
    """Return the samples' texts.

    Raises
    ------
    DataError
        If there is none, or one lacks its context or response.
    """
    if isinstance(samples, str | Mapping):
        raise DataError("samples must be a sequence of records, got a single one")
    texts = [_text_of(sample, row) for row, sample in enumerate(samples)]
    if not texts:
        raise DataError("samples must hold at least one sample, got none")
    for name in ("context", "response"):
        empty = [row for row, text in enumerate(texts) if not getattr(text, name).strip()]
        if empty:
            raise DataError(
                f"every sample needs a {name}; it is empty in {named_rows(empty)}. This method "
                "scores responses to instructions about a long context"
            )
    return texts


def _text_of(sample: Any, row: int) -> SampleText:
    if isinstance(sample, SampleText):
        return sample
    values = {}
    for name in ("context", "instruction", "response"):
        mapped = isinstance(sample, Mapping)
        value = sample.get(name) if mapped else getattr(sample, name, None)
        if value is None and name == "instruction":
            value = ""
        if not isinstance(value, str):
            raise DataError(
                f"sample {row} must have a text {name!r}, got "
                f"{'nothing' if value is None else type(value).__name__}"
            )
        values[name] = value
    return SampleText(**values)


@dataclass(frozen=True)
class SampleTokens:
    """A sample's token ids, part by part: parts are joined as ids, so that their ends are exact."""

    id: str
    bos: tuple[int, ...]
    opening: tuple[int, ...]  # the marker before the context
    context: tuple[int, ...]
    instruction: tuple[int, ...]  # with its marker
    closing: tuple[int, ...]  # the marker before the response
    response: tuple[int, ...]

    @property
    def tail(self) -> tuple[int, ...]:
        """What stands between context and response."""
        return self.instruction + self.closing

    @property
    def n_fixed(self) -> int:
        """How many tokens are not the context's."""
        return len(self.bos) + len(self.opening) + len(self.tail) + len(self.response)

    @property
    def n_tokens(self) -> int:
        """How many tokens there are in all."""
        return self.n_fixed + len(self.context)

    def capped(self, most: int) -> SampleTokens:
        """Return the sample with its instruction and response cut to `most` tokens each."""
        return replace(self, instruction=self.instruction[:most], response=self.response[:most])

    def head(self, window: int, shown: int | None = None) -> tuple[int, ...]:
        """Return the context with its marker, cut on the left to what fits; at most all of it."""
        head = self.opening + (self.context if shown is None else self.context[-shown:])
        room = window - len(self.bos) - len(self.tail) - len(self.response)
        return head[max(len(head) - room, 0) :] if room > 0 else ()

    def prefix(self, window: int, shown: int | None = None) -> tuple[int, ...]:
        """Return what stands before the response, cut on the left to what fits beside it."""
        room = window - len(self.bos) - len(self.response)
        return self.bos + (self.head(window, shown) + self.tail)[-room:]


def tokenized(texts: Sequence[SampleText], scorer: Scorer) -> list[SampleTokens]:
    """Return the samples' tokens; each part is tokenised by itself."""
    opening, asking, closing = (marker.rstrip(" ") for marker in MARKERS)
    spaces = [marker[len(marker.rstrip(" ")) :] for marker in MARKERS]
    ids = scorer.ids
    bos, opening_ids, closing_ids = scorer.bos(), ids(opening), ids(closing)
    parts = []
    for text in texts:
        asked = ids(asking + spaces[1] + text.instruction) if text.instruction else ()
        context = ids(spaces[0] + text.context)
        response = ids(spaces[2] + text.response)
        parts.append(SampleTokens(text.id, bos, opening_ids, context, asked, closing_ids, response))
    return parts


def require_room(parts: Sequence[SampleTokens], window: int, *, for_context: bool = False) -> None:
    """Refuse samples whose response leaves no room, or with `for_context` none for the context."""
    if for_context:
        what, full = "instruction and response", [part.n_fixed >= window for part in parts]
    else:
        what, full = "response", [len(part.bos) + len(part.response) >= window for part in parts]
    rows = [row for row, no_room in enumerate(full) if no_room]
    if rows:
        raise DataError(f"the {what} fill the window of max_length={window} in {named_rows(rows)}")


def warn_about_length(parts: Sequence[SampleTokens], window: int) -> None:
    """Warn, in the name of the caller's caller, if texts have to be cut to fit."""
    long = sum(part.n_tokens > window for part in parts)
    if long:
        warnings.warn(
            f"{long} of {len(parts)} samples are longer than max_length={window} tokens and lose "
            "the beginning of their context",
            stacklevel=3,
        )


# Models -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scorer:
    """A causal language model with its tokenizer."""

    model: Any
    tokenizer: Any
    fingerprint: str | None
    max_length: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Scorer:
        """Return what `load_language_model` gave, or a transformers model, with its tokenizer.

        Raises
        ------
        DataError
            If it is neither, or there is no tokenizer.
        """
        own = getattr(model, "tokenizer", None)
        used = tokenizer if tokenizer is not None else own
        if used is None:
            raise DataError(
                "tokenizer must be given with a transformers model; only what "
                "load_language_model returns brings its own"
            )
        inner = model if own is None else model.model
        if not hasattr(inner, "config") or not callable(inner):
            raise DataError(
                "model must be a transformers causal language model or what load_language_model "
                f"returns, got {type(model).__name__}"
            )
        limit = getattr(model, "max_length", None) if own is not None else None
        if limit is None:
            limit = getattr(inner.config, "max_position_embeddings", None)
        if limit is None:
            limit = used.model_max_length
        return cls(inner, used, getattr(model, "fingerprint", None), int(limit))

    def ids(self, text: str) -> tuple[int, ...]:
        """Return a text's token ids, none added."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def bos(self) -> tuple[int, ...]:
        """Return the token that the tokenizer puts before a text, if it does."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        given = self.tokenizer("a", verbose=False)["input_ids"]
        return (int(first),) if first is not None and given and given[0] == first else ()

    @cached_property
    def name(self) -> str:
        """Return what tells this model's scores from those of others, for the file of scores."""
        return self.fingerprint or _weights_digest(self.model)


def require_one_tokenizer(short: Scorer, long: Scorer) -> None:
    """Refuse models whose tokens mean different things: their perplexities do not compare."""
    if short.model is long.model:
        return
    if short.tokenizer is not long.tokenizer and (
        short.tokenizer.get_vocab() != long.tokenizer.get_vocab()
    ):
        raise ModelError(
            "the short and the long model have different tokenizers, so their perplexities do not "
            "compare: take models of one family"
        )


def require_known_tokens(parts: Sequence[SampleTokens], *scorers: Scorer) -> None:
    """Refuse a tokenizer whose tokens a model does not have."""
    highest = max(max(part.prefix(part.n_tokens) + part.response) for part in parts)
    for scorer in scorers:
        known = scorer.model.get_input_embeddings().num_embeddings
        if highest >= known:
            raise ModelError(
                f"the tokenizer gives token {highest} and {type(scorer.model).__name__} knows "
                f"{known} tokens: they do not belong together"
            )


def _weights_digest(model: Any) -> str:
    """Return the SHA-256 of a model's configuration and weights."""
    import torch

    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


# What was scored before ---------------------------------------------------------------------------


class ScoresFile:
    """What was scored before, one JSON object per line; a line that a kill cut short is ignored."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._known: dict[str, dict[str, Any]] = {}
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                self._known[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    def key(self, scorer: Scorer, *what: Any) -> str:
        """Return the name of one computation: the model and all that goes into it."""
        # Without a file nothing outlives the model, and its weights need not be read.
        model = id(scorer.model) if self.path is None else scorer.name
        return hashlib.sha256(repr((model, *what)).encode()).hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what a computation gave, or None if it was not made."""
        return self._known.get(key)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep records, which have a ``"key"``; each is one line of the file."""
        self._known.update((record["key"], record) for record in records)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            size = stream.seek(0, 2)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":  # the last line was cut short
                    stream.write(b"\n")
            for record in records:
                stream.write(json.dumps(record).encode() + b"\n")


def named_rows(rows: Sequence[int]) -> str:
    """Return "sample 3" or "samples 3, 5 and 12 more" for messages."""
    named = ", ".join(map(str, rows[:_NAMED]))
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{'sample' if len(rows) == 1 else 'samples'} {named}{more}"
