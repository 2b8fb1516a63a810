"""Training samples, and a pool of them with a target: what training-data selection works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError


@dataclass(frozen=True)
class Sample:
    r"""One thing to train on: a response, and what precedes it, if anything.

    Parameters
    ----------
    response
        The text whose tokens are learnt. A plain document is a response to nothing.
    instruction
        What was asked.
    context
        What the instruction is about, e.g. a long document.
    source
        Where it comes from; balanced sampling and reports use it.

    Examples
    --------
    >>> Sample("Paris.", instruction="Capital of France?").text
    'Capital of France?\n\nParis.'
    """

    response: str
    instruction: str = ""
    context: str = ""
    source: str = ""

    @property
    def prefix(self) -> str:
        """Context and instruction, each followed by a blank line; empty for a plain document."""
        return "".join(f"{part}\n\n" for part in (self.context, self.instruction) if part)

    @property
    def text(self) -> str:
        """All of it: context, instruction and response, with blank lines between."""
        return self.prefix + self.response


@dataclass(frozen=True, eq=False)
class TrainingPool:
    """A pool to select from, texts that look like the target, and a held-out target.

    Parameters
    ----------
    name
        For reports.
    samples
        The pool.
    queries
        What selectors may see of the target.
    test
        What only scores see of it; no text is also in the pool or the queries.
    relevant
        Boolean array ``(len(samples),)``: which samples are known to be of the target's kind; None
        where nobody knows.
    notes
        Sentences about how the data was made or read, for the report.

    Raises
    ------
    DataError
        If the pool, the queries or the test part is empty, a test text occurs elsewhere, or the
        marks do not fit.
    """

    name: str
    samples: tuple[Sample, ...]
    queries: tuple[Sample, ...]
    test: tuple[Sample, ...]
    relevant: NDArray[np.bool_] | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for part in ("samples", "queries", "test"):
            object.__setattr__(self, part, tuple(getattr(self, part)))
            if not getattr(self, part):
                raise DataError(f"training pool {self.name!r}: {part} must not be empty")
        seen = {sample.text for sample in (*self.samples, *self.queries)}
        shared = [row for row, sample in enumerate(self.test) if sample.text in seen]
        if shared:
            raise DataError(
                f"training pool {self.name!r}: {len(shared)} test texts are also in the pool or "
                f"the queries (first: test row {shared[0]}); a held-out target must be new"
            )
        if self.relevant is not None:
            marks = np.asarray(self.relevant)
            if marks.dtype != bool or marks.shape != (len(self.samples),):
                raise DataError(
                    f"training pool {self.name!r}: relevant must be {len(self.samples)} booleans, "
                    f"got dtype {marks.dtype} and shape {marks.shape}"
                )
            object.__setattr__(self, "relevant", marks)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all texts and marks, as hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.samples, self.queries, self.test):
            digest.update(f"{len(part)}\n".encode())
            for sample in part:
                line = json.dumps(astuple(sample), ensure_ascii=False)
                digest.update(line.encode("utf-8", "surrogatepass"))
        if self.relevant is not None:
            digest.update(self.relevant.tobytes())
        return digest.hexdigest()


def as_samples(texts: Sequence[str | Sample], *, source: str = "") -> tuple[Sample, ...]:
    """Return samples as they are and texts as plain documents.

    Raises
    ------
    DataError
        If `texts` is one string, or holds something else.

    Examples
    --------
    >>> as_samples(["a text"])[0].response
    'a text'
    """
    if isinstance(texts, str):
        raise DataError("texts must be a sequence of texts or samples, got one string")
    for row, text in enumerate(texts):
        if not isinstance(text, str | Sample):
            raise DataError(f"texts[{row}] must be a text or a Sample, got {type(text).__name__}")
    return tuple(t if isinstance(t, Sample) else Sample(t, source=source) for t in texts)


def tokenize_sample(
    sample: Sample, tokenizer: Any, max_length: int, *, end: bool = True
) -> tuple[list[int], list[int]]:
    """Return the token ids of a sample's prefix and of its response, at most `max_length` in all.

    Both are tokenized by themselves, so that the boundary is exact. A response that is too long is
    cut at its end; what room it leaves takes the end of the prefix, which is cut at its beginning.

    Parameters
    ----------
    sample
        The sample.
    tokenizer
        A transformers tokenizer; its special tokens are not added, but for `end`.
    max_length
        Most tokens, at least 1.
    end
        Whether the end-of-text token, where the tokenizer has one, follows the response.

    Returns
    -------
    tuple of two lists of int
        The prefix, empty for a plain document, and the response, never empty.

    Raises
    ------
    DataError
        If the response has no tokens or `max_length` is less than 1.
    """
    if max_length < 1:
        raise DataError(f"max_length must be at least 1, got {max_length}")
    response = tokenizer(sample.response, add_special_tokens=False, verbose=False).input_ids
    if not response:
        raise DataError(f"a sample's response has no tokens: {sample.response!r}")
    if end and tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    response = response[:max_length]
    room = max_length - len(response)
    prefix: list[int] = []
    if sample.prefix and room:
        prefix = tokenizer(sample.prefix, add_special_tokens=False, verbose=False).input_ids[-room:]
    return list(prefix), list(response)
