"""How to read documents longer than the window: readers compared at one budget of tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import write_text
from bakeoff.data.long_documents import LongDocuments
from bakeoff.data.prompts import Prompt, prompts_fingerprint
from bakeoff.decoding.document_baselines import (
    READERS,
    DocumentReader,
    FullReader,
    ReadDocument,
    document_reader,
)
from bakeoff.decoding.problem.common import check_prompts
from bakeoff.decoding.winner import Settings, save_settings
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models import LanguageModel, TextEncoder
from bakeoff.models.shared import SharedModels
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters
from bakeoff.study.measure import warnings_noted

MEMORY_METRICS: dict[str, Metric] = {
    "quality": Metric("answer found (share)", margin=0.02),
    "log_probability": Metric("log-probability of the answer (nats per token)", margin=0.05),
    "text_loss": Metric(
        "loss at the document's end (nats per token)", higher_is_better=False, margin=0.01
    ),
    "seconds_to_first_token": Metric("seconds to the first token", higher_is_better=False),
    "tokens_per_second": Metric("tokens per second, once read"),
    "memory_bytes": Metric("keys and values in memory (bytes)", higher_is_better=False),
}

_QUESTION = "how to read documents longer than the window"
# Sizes of the memory that a design may choose within the budget.
_SIZES = ("n_init", "n_local", "block_size", "topk", "repr_topk", "exec_chunk")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "full-attention": (),
    "streaming": ("n_init",),
    "truncate-middle": (),
    "keep-end": (),
    "retrieve": ("by", "passage_tokens"),
    "infllm": (*_SIZES, "offload", "max_cached_blocks", "exact_mask"),
}
_ALL_KEYS = "all"
# Raise when readers, prompts or scores change.
_VERSION = 1


@dataclass(frozen=True)
class _Sizes:
    n_init: int
    n_local: int
    block_size: int
    topk: int
    repr_topk: int
    exec_chunk: int

    @property
    def budget(self) -> int:
        return self.n_init + self.n_local + self.block_size * self.topk


def memory_designs(*, full_attention: bool = True) -> Designs:
    """Return InfLLM, variants of it, and what a sceptic would do instead.

    Parameters
    ----------
    full_attention
        Whether plain attention over the whole document is among them; it is refused where a
        document is longer than what the model was trained for.

    Examples
    --------
    >>> [design.name for design in memory_designs()][:4]
    ['full-attention', 'streaming', 'truncate-middle', 'keep-end']
    """
    names = ["full-attention"] * full_attention + ["streaming", "truncate-middle", "keep-end"]
    return Designs(
        [
            *(Design(name, name) for name in names),
            Design("retrieve", "retrieve", {"by": "words"}),
            Design("retrieve, by meaning", "retrieve", {"by": "meaning"}),
            Design("infllm", "infllm"),
            Design("infllm, block means", "infllm", {"repr_topk": _ALL_KEYS}),
            Design("infllm, one representative", "infllm", {"repr_topk": 1}),
            Design("infllm, blocks on disk", "infllm", {"offload": "disk"}),
            Design("infllm, authors' mask", "infllm", {"exact_mask": False}),
        ]
    )


class MemoryProblem:
    """How to read documents longer than the window, at an equal budget of tokens.

    Every design answers the same questions about the same documents with the same model, greedily,
    and may attend to at most ``n_init + n_local + block_size * topk`` tokens at a time, the
    question and the answer included; plain attention over everything is the exception and is
    named as such.

    Scores are per prompt. *Quality* is 1 if an accepted answer occurs in what was written, as whole
    words, whatever the case, else 0. The *log-probability of the answer* is that of the accepted
    answer that is likeliest, per token, right after the prompt. The *loss at the document's end* is
    the mean over the document's last tokens, given what a reader keeps of those before: what
    reading costs in plain text. *Memory* is the size of all tensors that the cache holds, in main
    memory and on the device; blocks on disk do not count.

    Documents that are drawn (`LongDocuments`) are drawn by the seed; prompts of your own are the
    same for every seed, so that seeds beyond the first repeat the measurement of times alone.

    Parameters
    ----------
    prompts
        Prompts with a document and accepted answers, at least two; or `LongDocuments`.
    model
        Packaged name, folder or hub id of a causal language model.
    n_init, n_local, block_size, topk, repr_topk, exec_chunk
        Of InfLLM (see `bakeoff.decoding.infllm.patch`), and by their sum the budget of all others.
    max_new_tokens
        Longest answer.
    n_scored
        Tokens at a document's end whose loss is measured, at most half of the document; 0 for none.
    chat
        Whether the prompt is a user's message in the tokenizer's chat template; None: if there is
        one.
    embedder
        A sentence-transformers model, for retrieval by meaning.

    Raises
    ------
    DataError
        If there are fewer than two prompts, one lacks its document or answers, or a size is out of
        range.

    Examples
    --------
    >>> from bakeoff.data.long_documents import long_documents_default
    >>> MemoryProblem(long_documents_default("smoke"), n_local=128).budget
    416
    """

    name = "decoding"

    def __init__(
        self,
        prompts: Sequence[Prompt] | LongDocuments,
        *,
        model: str = "smollm2-135m",
        n_init: int = 32,
        n_local: int = 256,
        block_size: int = 32,
        topk: int = 8,
        repr_topk: int = 4,
        exec_chunk: int = 64,
        max_new_tokens: int = 24,
        n_scored: int = 64,
        chat: bool | None = None,
        embedder: str = "all-minilm-l6-v2",
    ) -> None:
        self.prompts = prompts if isinstance(prompts, LongDocuments) else tuple(prompts)
        self.sizes = _checked(_Sizes(n_init, n_local, block_size, topk, repr_topk, exec_chunk))
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if n_scored < 0 or n_scored == 1:
            raise DataError(
                f"n_scored must be 0, or at least 2 (the first token has no loss), got {n_scored}"
            )
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.n_scored = n_scored
        self.chat = chat
        self.embedder = embedder
        self._encoder = TextEncoder(embedder)
        self._models = SharedModels()
        if isinstance(self.prompts, tuple):
            check_prompts(self.prompts, 2, _QUESTION)
            for number, prompt in enumerate(self.prompts):
                for part in ("document", "answers"):
                    if not getattr(prompt, part):
                        raise DataError(
                            f"prompt {number} has no {part}: {_QUESTION} needs a document, a "
                            f"question and accepted answers; the question is {prompt.text!r}"
                        )

    @property
    def budget(self) -> int:
        """How many tokens a design may attend to at a time."""
        return self.sizes.budget

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Answers found first; the loss on text only if it is measured."""
        return {
            name: metric
            for name, metric in MEMORY_METRICS.items()
            if self.n_scored or name != "text_loss"
        }

    def fingerprint(self) -> str:
        """Return a digest of prompts, model, sizes and embedder."""
        drawn = isinstance(self.prompts, LongDocuments)
        facts = {
            "prompts": self.prompts.fingerprint()
            if isinstance(self.prompts, LongDocuments)
            else prompts_fingerprint(self.prompts),
            "drawn": drawn,
            "model": self._language_model().fingerprint,
            "sizes": asdict(self.sizes),
            "max_new_tokens": self.max_new_tokens,
            "n_scored": self.n_scored,
            "chat": self.chat,
            "embedder": self._encoder.fingerprint,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        if isinstance(self.prompts, LongDocuments):
            data = self.prompts.describe()
        else:
            lengths = [len(prompt.document) for prompt in self.prompts]
            data = (
                f"{len(self.prompts):,} questions about documents of {min(lengths):,} to "
                f"{max(lengths):,} characters; every seed reads the same"
            )
        sizes = self.sizes
        return {
            "question": _QUESTION,
            "data": data,
            "model": self.model,
            "tokens attended to": f"{self.budget:,}: {sizes.n_init} first, {sizes.n_local} newest, "
            f"{sizes.topk} blocks of {sizes.block_size} in between; the same number for every "
            "design but full attention",
            "answers": f"greedy, at most {self.max_new_tokens} tokens; right if an accepted answer "
            "occurs in them as whole words",
            "designs that need vectors use": self.embedder,
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSION)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here.

        Unknown methods and parameters, sizes beyond the budget, a budget beyond what the model was
        trained for, documents that plain attention cannot hold, and models whose attention cannot
        be replaced.
        """
        check_method(design, tuple(READERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        model = self._language_model()
        try:
            if self.budget > model.max_length:
                raise DataError(
                    f"the budget of {self.budget} tokens (n_init + n_local + block_size * topk) "
                    f"must not exceed the {model.max_length} that {model.name} was trained for"
                )
            with warnings_noted(), self._reader(design) as reader:
                if isinstance(reader, FullReader):
                    _check_lengths(reader, self._tasks(0))
        except BakeoffError as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; have the models in the cache."""
        for number, design in enumerate(designs):
            work.progress(number / len(designs), f"checking {design.name}")
            self.check(design)

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Read every document, answer every question, and score both."""
        check_method(design, tuple(READERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        tasks = self._tasks(seed)
        n_prompts = sum(map(len, tasks.values()))
        scores: dict[str, dict[str, NDArray[np.float64]]] = {}
        written: dict[str, list[dict[str, object]]] = {}
        n_document = n_kept = n_done = 0
        with self._reader(design) as reader:
            for task, prompts in tasks.items():
                rows: list[dict[str, float]] = []
                for prompt in prompts:

                    def progress(done: int, total: int, n_before: int = n_done) -> None:
                        fraction = (n_before + 0.9 * done / total) / n_prompts
                        work.progress(fraction, f"prompt {n_before + 1} of {n_prompts}")

                    read = reader.read(
                        prompt.document, prompt.text, n_scored=self.n_scored, progress=progress
                    )
                    row, answer = self._scores(read, prompt)
                    rows.append(row)
                    written.setdefault(task, []).append(
                        {
                            "question": prompt.text,
                            "accepted": list(prompt.answers),
                            "answer": answer,
                            "document_tokens": read.n_document,
                            "tokens_read": read.n_kept,
                        }
                    )
                    n_document += read.n_document
                    n_kept += read.n_kept
                    n_done += 1
                for metric in self.metrics:
                    units = np.array([row[metric] for row in rows])
                    scores.setdefault(metric, {})[task] = units
        write_text(work.directory / "answers.json", json.dumps(written, ensure_ascii=False))
        notes = [
            f"{n_kept / n_prompts:,.0f} of {n_document / n_prompts:,.0f} tokens of a document are "
            "read, on average."
        ]
        return Trial(
            scores=scores,
            cost={"document_tokens_read": float(n_kept)},
            artifact=work.directory,
            notes=tuple(notes),
        )

    def _scores(self, read: ReadDocument, prompt: Prompt) -> tuple[dict[str, float], str]:
        """Return one number per metric, and what was written."""
        answer = read.generate(self.max_new_tokens)
        row = {
            "quality": float(any(contains(answer.text, accepted) for accepted in prompt.answers)),
            "log_probability": max(map(read.log_probability, prompt.answers)),
            "seconds_to_first_token": answer.seconds_to_first_token,
            "tokens_per_second": answer.n_tokens / max(answer.seconds, 1e-9),
            "memory_bytes": float(answer.memory_bytes),
        }
        if self.n_scored:
            if read.end_log_probability is None:
                raise DataError(
                    f"a document of {read.n_document} tokens has no end to predict: give at least "
                    f"4 tokens, or n_scored=0; the question is {prompt.text!r}"
                )
            row["text_loss"] = -read.end_log_probability
        return row, answer.text

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a design's settings and what it answered.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder.
        destination
            The folder to write: ``decoder.json``, ``README.md`` and ``answers.json``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            Whether no bakeoff is needed to use it: only where the model is read with as it is.
        """
        # Settled here: whoever takes the winner up should not have to know the rule.
        has_template = bool(self._language_model().tokenizer.chat_template)
        extra: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "chat": has_template if self.chat is None else self.chat,
        }
        settings = Settings(design.name, design.method, self._arguments(design), self.model, extra)
        save_settings(destination, settings, usage=self.usage(destination), reason=reason)
        answers = artifact / "answers.json"
        if answers.is_file():
            write_text(destination / "answers.json", answers.read_text("utf-8"))
        return design.method == "full-attention"

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use what `export` saved."""
        return [
            "from pathlib import Path",
            "",
            "from bakeoff.decoding.document_baselines import load_reader",
            "",
            f"with load_reader({str(destination)!r}) as reader:",
            '    document = Path("document.txt").read_text(encoding="utf-8")',
            '    read = reader.read(document, "What does it say about ...?")',
            "    print(read.generate().text)",
        ]

    def _tasks(self, seed: int) -> dict[str, tuple[Prompt, ...]]:
        if isinstance(self.prompts, LongDocuments):
            return self.prompts.draw(seed)
        return {"prompts": self.prompts}

    def _language_model(self) -> LanguageModel:
        return self._models.language_model(self.model)

    def _reader(self, design: Design) -> DocumentReader:
        arguments = self._arguments(design)
        if "encoder" in arguments:
            arguments["encoder"] = self._encoder
        return document_reader(
            design.method,
            self._language_model(),
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
            **arguments,
        )

    def _arguments(self, design: Design) -> dict[str, Any]:
        """Return what makes a design's reader, besides the model; JSON-able."""
        given = dict(design.params)
        if design.method == "full-attention":
            return {}
        if design.method != "infllm":
            own: dict[str, Any] = {"budget": self.budget}
            if design.method == "streaming":
                own |= {"n_init": self.sizes.n_init, "exec_chunk": self.sizes.exec_chunk}
            if given.get("by") == "meaning":
                own["encoder"] = self.embedder
            return own | given
        chosen: dict[str, Any] = asdict(self.sizes)
        chosen |= {name: given[name] for name in _SIZES if name in given}
        if chosen["repr_topk"] == _ALL_KEYS:
            chosen["repr_topk"] = chosen["block_size"]
        sizes = _checked(_Sizes(**chosen))
        if sizes.budget > self.budget:
            raise DataError(
                f"n_init + n_local + block_size * topk must be at most {self.budget}, the budget "
                f"of all designs, got {sizes.budget}"
            )
        return {**given, **chosen}


def contains(text: str, answer: str) -> bool:
    """Say whether an answer occurs in a text as whole words, whatever the case and the spacing.

    Examples
    --------
    >>> contains("The pass key is 12345.", "12345"), contains("It is 123456.", "12345")
    (True, False)
    """
    plain_text, plain_answer = (" ".join(each.casefold().split()) for each in (text, answer))
    return re.search(rf"(?<!\w){re.escape(plain_answer)}(?!\w)", plain_text) is not None


def _checked(sizes: _Sizes) -> _Sizes:
    from bakeoff.decoding.block_memory import MemorySettings

    MemorySettings(**asdict(sizes), exact_mask=True).checked()
    return sizes


def _check_lengths(reader: FullReader, tasks: Mapping[str, Sequence[Prompt]]) -> None:
    longest = max(
        reader.n_tokens(prompt.document, prompt.text)
        for prompts in tasks.values()
        for prompt in prompts
    )
    if longest > reader.model.max_length:
        raise DataError(
            f"the longest prompt has {longest:,} tokens with the answer, and {reader.model.name} "
            f"was trained for {reader.model.max_length:,}: leave full attention out, or give "
            "shorter documents"
        )
