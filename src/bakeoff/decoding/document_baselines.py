"""Ways to read a document and answer a question about it, behind one interface.

`FullReader` reads all of it with the model as it is. With a budget of tokens that the model may
attend to: `WindowReader` reads all and forgets what left a window, `CuttingReader` leaves out the
middle or the beginning, `RetrievingReader` takes the passages that are most like the question, and
`MemoryReader` is InfLLM.
"""

from __future__ import annotations

import copy
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.decoding.token_clock import TokenClock
from bakeoff.errors import DataError
from bakeoff.models.chat import chat_frame

if TYPE_CHECKING:
    from torch import Tensor

    from bakeoff.decoding.infllm import InfLLM
    from bakeoff.models import LanguageModel, TextEncoder

IntArray = NDArray[np.int64]
Progress = Callable[[int, int], None]

_BETWEEN = "\n\n"
_PIECE = 4096
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*")


# What was read ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentAnswer:
    """What was written about a document.

    Parameters
    ----------
    text
        The answer.
    n_tokens
        Tokens written, the end of text included.
    seconds_to_first_token
        From when reading began (tokenizing and choosing what to read included) to the first logits.
    seconds
        From the last token of the question, when all before it was read, to the end.
    memory_bytes
        Size of all tensors that the cache holds afterwards, in main memory and on the device.
    """

    text: str
    n_tokens: int
    seconds_to_first_token: float
    seconds: float
    memory_bytes: int


class ReadDocument:
    """A document and a question that a reader has read, ready for answers; made by readers.

    Attributes
    ----------
    n_document, n_kept : int
        Tokens of the document, and how many of them were read.
    seconds : float
        What reading took.
    end_log_probability : float or None
        Mean log-probability, in nats per token, of the document's last tokens given what the reader
        keeps of those before; None if it was not asked for.
    """

    def __init__(
        self,
        reader: DocumentReader,
        ids: Tensor,
        cache: Any,
        *,
        n_document: int,
        n_kept: int,
        seconds: float,
        end_log_probability: float | None = None,
    ) -> None:
        self._reader = reader
        self._ids = ids  # all of the prompt
        self._cache = cache  # has read all but the last token
        self.n_document = n_document
        self.n_kept = n_kept
        self.seconds = seconds
        self.end_log_probability = end_log_probability

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that were read: the chat template's, the document's, the question's."""
        found: list[int] = self._ids.tolist()
        return found

    def generate(self, max_new_tokens: int | None = None, **arguments: Any) -> DocumentAnswer:
        """Answer; may be called again, from the same state.

        Parameters
        ----------
        max_new_tokens
            Most tokens of the answer; the reader's own number if None.
        **arguments
            Further arguments of transformers' ``generate``; greedy without any.

        Returns
        -------
        DocumentAnswer
            The text and what it took.
        """
        import torch
        from transformers import LogitsProcessorList

        reader = self._reader
        reader.check_open()
        model, tokenizer = reader.model.model, reader.model.tokenizer
        settings = copy.deepcopy(model.generation_config)
        if not arguments.get("do_sample", False):  # a chat model's own sampling is no concern
            settings.do_sample, settings.num_beams = False, 1
            settings.temperature = settings.top_p = settings.top_k = None
        settings.pad_token_id = tokenizer.pad_token_id
        settings.max_length = None
        settings.max_new_tokens = max_new_tokens or reader.max_new_tokens
        ids = self._ids[None].to(model.device)
        cache = copy.deepcopy(self._cache)
        began = time.perf_counter()
        clock = TokenClock(began - self.seconds)
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                generation_config=settings,
                logits_processor=LogitsProcessorList([clock]),
                **arguments,
            )
        seconds = time.perf_counter() - began
        new = output[0, ids.shape[1] :]
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        first = clock.seconds_to_first_token
        return DocumentAnswer(text, len(new), first, seconds, cache_bytes(cache))

    def log_probability(self, answer: str) -> float:
        """Return the mean log-probability of an answer's tokens, in nats per token.

        Tokens are fed as they would be generated: each of them may look something up in a memory.

        Raises
        ------
        DataError
            If the answer has no tokens.
        """
        import torch

        reader = self._reader
        reader.check_open()
        tokenizer = reader.model.tokenizer
        # After "Answer:" a space begins the word; after a template's header nothing does.
        text = answer if reader.uses_chat else f" {answer}"
        wanted = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not len(wanted):
            raise DataError(f"answer has no tokens: {answer!r}")
        fed = torch.cat((self._ids[-1:], wanted[:-1]))
        cache = copy.deepcopy(self._cache)
        step = 1 if reader.looks_up_by_token else len(fed)
        logits = torch.cat(
            [reader.logits(fed[i : i + step], cache) for i in range(0, len(fed), step)]
        )
        return _mean_log_probability(logits, wanted)


def _mean_log_probability(logits: Tensor, wanted: Tensor) -> float:
    import torch

    log_probs = torch.log_softmax(logits.float(), -1)
    found = log_probs.gather(1, wanted.to(log_probs.device)[:, None])
    return float(found.double().mean())


def cache_bytes(cache: Any) -> int:
    """Return the size of all tensors that a key-value cache holds in memory, in bytes.

    Of an `InfLLMCache`, blocks on disk do not count, blocks in main memory do.

    Examples
    --------
    >>> import torch
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    >>> cache_bytes(cache)
    640
    """
    if hasattr(cache, "stats"):
        stats = cache.stats()
        on_disk = cache.patched.offload == "disk"
        return int(stats["resident_bytes"] + (0 if on_disk else stats["offloaded_bytes"]))
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return int(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


# Readers ------------------------------------------------------------------------------------------


class _Document:
    """A document's text and tokens, with the place of each token in the text."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        self.text = text
        self.ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        offsets = encoded.get("offset_mapping")
        self.starts = None if offsets is None else np.array([s for s, _ in offsets], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, end: int) -> str:
        """Return the text of tokens `start` to `end` - 1."""
        assert self.starts is not None
        stop = int(self.starts[end]) if end < len(self) else len(self.text)
        return self.text[int(self.starts[start]) : stop]

    def passages(self, limit: int) -> list[tuple[int, int]]:
        """Return half-open token spans that tile the document: paragraphs, long ones cut."""
        assert self.starts is not None
        cuts = [match.end() for match in _PARAGRAPH.finditer(self.text)]
        spans = []
        for start, end in self._between(cuts, 0, len(self)):
            if end - start <= limit:
                spans.append((start, end))
                continue
            first = int(self.starts[start])
            inside = [first + match.end() for match in _SENTENCE.finditer(self.slice(start, end))]
            spans += _packed(self._between(inside, start, end), limit)
        return spans

    def _between(self, cuts: Sequence[int], start: int, end: int) -> list[tuple[int, int]]:
        """Return the spans between characters `cuts`, of tokens `start` to `end` - 1."""
        assert self.starts is not None
        places = [start, *np.searchsorted(self.starts, np.asarray(cuts, dtype=np.int64)), end]
        inside = sorted({min(max(int(place), start), end) for place in places})
        return list(pairwise(inside))


def _packed(spans: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Join neighbouring spans up to a length; cut those that are longer."""
    packed: list[tuple[int, int]] = []
    for start, end in spans:
        if packed and end - packed[-1][0] <= limit:
            packed[-1] = (packed[-1][0], end)
            continue
        cuts = [*range(start, end, limit), end]
        packed += pairwise(cuts)
    return packed


class DocumentReader(ABC):
    """Reads a document and a question with a language model; a context manager.

    Parameters
    ----------
    model
        From `bakeoff.models.load_language_model`.
    max_new_tokens
        How much room to leave for an answer.
    chat
        Whether document and question are a user's message in the tokenizer's chat template. None:
        if it has one. Without, the question is followed by ``Answer:``.

    Examples
    --------
    >>> from bakeoff.models import load_language_model
    >>> model = load_language_model("smollm2-135m")  # doctest: +SKIP
    >>> with CuttingReader(model, budget=512) as reader:  # doctest: +SKIP
    ...     print(reader.read(text, "Who wrote it?").generate().text)
    """

    looks_up_by_token = False
    """Whether the next token depends on whether the ones before came one by one or together."""

    def __init__(
        self, model: LanguageModel, *, max_new_tokens: int = 64, chat: bool | None = None
    ) -> None:
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model = model
        self.max_new_tokens = max_new_tokens
        has_template = bool(model.tokenizer.chat_template)
        if chat and not has_template:
            raise DataError(f"chat: the tokenizer of {model.name} has no chat template")
        self.uses_chat = has_template if chat is None else chat

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def check_open(self) -> None:
        """Raise `DataError` if the reader has to be used in a ``with`` block and is not."""
        return

    def read(
        self,
        document: str,
        question: str,
        *,
        n_scored: int = 0,
        progress: Progress | None = None,
    ) -> ReadDocument:
        """Read a document, then a question about it.

        Parameters
        ----------
        document, question
            Texts.
        n_scored
            Also tell how well the last `n_scored` tokens of the document (at most half of it) are
            predicted from what the reader keeps of those before them, the first of them excepted.
            Readers that leave something out make a choice of its own for that, which is not timed.
        progress
            Called with tokens read and their total.

        Returns
        -------
        ReadDocument
            Ready for answers.

        Raises
        ------
        DataError
            If the document has no tokens, or the question and the answer leave no room for any.
        """
        import torch

        self.check_open()
        began = time.perf_counter()
        before, text, after = self._parts(document, question)
        n_scored = min(n_scored, len(text) // 2)
        room = self._room(len(before) + len(after) + self.max_new_tokens)
        kept = self.choose(text, question, room)
        inside = torch.from_numpy(text.ids[kept])
        end_log_probability = None
        cache = self.new_cache()
        whole = torch.cat((before, inside, after))
        # Who reads all to the end predicts the end in passing.
        in_passing = n_scored > 1 and len(kept) == len(text)
        n_done = 0
        if in_passing:
            n_done = len(before) + len(text)
            self._feed(whole[: n_done - n_scored], cache, progress, len(whole))
            end = whole[n_done - n_scored : n_done]
            end_log_probability = _mean_log_probability(self.logits(end, cache)[:-1], end[1:])
        self._feed(whole[n_done:-1], cache, progress, len(whole), n_done)
        seconds = time.perf_counter() - began
        if n_scored > 1 and not in_passing:
            end_log_probability = self._end_log_probability(before, text, n_scored)
        return ReadDocument(
            self,
            whole,
            cache,
            n_document=len(text),
            n_kept=len(kept),
            seconds=seconds,
            end_log_probability=end_log_probability,
        )

    def n_tokens(self, document: str, question: str) -> int:
        """Return the length of a whole prompt, with the room for an answer, in tokens."""
        before, text, after = self._parts(document, question)
        return len(before) + len(text) + len(after) + self.max_new_tokens

    @abstractmethod
    def choose(self, document: _Document, question: str, room: int | None) -> IntArray:
        """Return which tokens of the document to read, ascending, at most `room` of them."""

    def choose_before(self, document: _Document, end: int, room: int | None) -> IntArray:
        """Return which of the first `end` tokens to read, to predict those that follow."""
        return _latest(end, room)

    def new_cache(self) -> Any:
        """Return an empty key-value cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.model.config)

    def logits(self, ids: Tensor, cache: Any) -> Tensor:
        """Feed tokens ``(n,)`` to the model and return its logits ``(n, vocabulary)``."""
        import torch

        model = self.model.model
        with torch.no_grad():
            output = model(
                input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True
            )
        found: Tensor = output.logits[0]
        return found

    @property
    def _piece(self) -> int:
        return _PIECE

    def _room(self, n_taken: int) -> int | None:
        """Return how many of a document's tokens fit; None if there is no limit."""
        return None

    def _parts(self, document: str, question: str) -> tuple[Tensor, _Document, Tensor]:
        """Return the tokens before the document, the document, and the tokens after it.

        Each part is tokenized alone, so that every reader reads the same tokens.
        """
        import torch

        tokenizer = self.model.tokenizer
        text = _Document(document, tokenizer)
        if not len(text):
            raise DataError("document has no tokens")
        if self.uses_chat:
            head, tail = chat_frame(tokenizer, self.model.name)
            before = list(tokenizer(head, add_special_tokens=False)["input_ids"])
        else:
            before, tail = _special_tokens_before(tokenizer), "\nAnswer:"
        after = tokenizer(_BETWEEN + question + tail, add_special_tokens=False)["input_ids"]
        return torch.tensor(before, dtype=torch.int64), text, torch.tensor(after)

    def _feed(
        self,
        ids: Tensor,
        cache: Any,
        progress: Progress | None = None,
        total: int = 0,
        done: int = 0,
    ) -> None:
        """Read tokens without computing logits, in pieces."""
        import torch

        from bakeoff.models.attention import backbone

        inner = backbone(self.model.model)
        with torch.no_grad():
            for start in range(0, len(ids), self._piece):
                piece = ids[start : start + self._piece]
                inner(
                    input_ids=piece[None].to(self.model.model.device),
                    past_key_values=cache,
                    use_cache=True,
                )
                done += len(piece)
                if progress is not None:
                    progress(done, total)

    def _end_log_probability(self, before: Tensor, text: _Document, n_scored: int) -> float:
        import torch

        first = len(text) - n_scored
        kept = self.choose_before(text, first, self._room(len(before) + n_scored))
        cache = self.new_cache()
        self._feed(torch.cat((before, torch.from_numpy(text.ids[kept]))), cache)
        end = torch.from_numpy(text.ids[first:])
        return _mean_log_probability(self.logits(end, cache)[:-1], end[1:])


def _special_tokens_before(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for n in range(len(whole) - len(plain) + 1):
        if whole[n : n + len(plain)] == plain:
            return whole[:n]
    return []


def _latest(end: int, room: int | None) -> IntArray:
    return np.arange(0 if room is None else max(0, end - room), end)


class FullReader(DocumentReader):
    """Reads all of the document with the model as it is: plain attention, all keys and values kept.

    Raises
    ------
    DataError
        On reading more than the model was trained for.
    """

    def choose(self, document: _Document, question: str, room: int | None) -> IntArray:
        """Return all tokens."""
        if room is not None and len(document) > room:
            raise DataError(
                f"document has {len(document):,} tokens; with the question and the answer {room:,} "
                f"fit into the {self.model.max_length:,} that {self.model.name} was trained for"
            )
        return np.arange(len(document))

    def _room(self, n_taken: int) -> int | None:
        return self.model.max_length - n_taken


class _BudgetReader(DocumentReader):
    """Reads at most so many tokens, question and answer included."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        budget: int,
        max_new_tokens: int = 64,
        chat: bool | None = None,
    ) -> None:
        super().__init__(model, max_new_tokens=max_new_tokens, chat=chat)
        if not 1 <= budget <= model.max_length:
            raise DataError(
                f"budget must be between 1 and {model.max_length}, the longest input of "
                f"{model.name}, got {budget}"
            )
        self.budget = budget

    def _room(self, n_taken: int) -> int | None:
        if n_taken >= self.budget:
            raise DataError(
                f"budget must be larger than {n_taken}, the tokens of question, template and "
                f"answer, so that there is room for some of the document; got {self.budget}"
            )
        return self.budget - n_taken


class CuttingReader(_BudgetReader):
    """Leaves out what does not fit: the middle of the document, or its beginning.

    Parameters
    ----------
    keep
        ``"both ends"``: half of the room for the beginning, half for the end, as LongBench does.
        ``"end"``: the end.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        budget: int,
        keep: Literal["both ends", "end"] = "both ends",
        max_new_tokens: int = 64,
        chat: bool | None = None,
    ) -> None:
        super().__init__(model, budget=budget, max_new_tokens=max_new_tokens, chat=chat)
        if keep not in ("both ends", "end"):
            raise DataError(f"keep must be 'both ends' or 'end', got {keep!r}")
        self.keep = keep

    def choose(self, document: _Document, question: str, room: int | None) -> IntArray:
        """Return the first and last tokens, or the last."""
        return self.choose_before(document, len(document), room)

    def choose_before(self, document: _Document, end: int, room: int | None) -> IntArray:
        """Return the first and last of the first `end` tokens, or the last of them."""
        assert room is not None
        if self.keep == "end" or room >= end:
            return _latest(end, room)
        head = room // 2
        return np.concatenate((np.arange(head), np.arange(end - (room - head), end)))


class RetrievingReader(_BudgetReader):
    """Reads the passages that are most like the question, in their order in the document.

    Passages are paragraphs; longer ones are cut, at the ends of sentences where possible. The most
    similar come first, as long as there is room; what does not fit is passed over.

    To predict what follows a text, half of the room is for the newest tokens, the other half for
    the passages most like those.

    Parameters
    ----------
    by
        ``"words"``: TF-IDF over the document's passages, with cosines. ``"meaning"``: vectors.
    encoder
        Turns texts into vectors, for ``"meaning"``.
    passage_tokens
        Longest passage.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        budget: int,
        by: Literal["words", "meaning"] = "words",
        encoder: TextEncoder | None = None,
        passage_tokens: int = 100,
        max_new_tokens: int = 64,
        chat: bool | None = None,
    ) -> None:
        super().__init__(model, budget=budget, max_new_tokens=max_new_tokens, chat=chat)
        if by not in ("words", "meaning"):
            raise DataError(f"by must be 'words' or 'meaning', got {by!r}")
        if by == "meaning" and encoder is None:
            raise DataError(
                "by='meaning' needs an encoder, such as TextEncoder('all-minilm-l6-v2')"
            )
        if passage_tokens < 1:
            raise DataError(f"passage_tokens must be at least 1, got {passage_tokens}")
        if not model.tokenizer.is_fast:
            raise DataError(
                f"the tokenizer of {model.name} does not tell where its tokens stand in a text, "
                "which retrieval needs: use its fast version"
            )
        self.by = by
        self.encoder = encoder
        self.passage_tokens = passage_tokens

    def choose(self, document: _Document, question: str, room: int | None) -> IntArray:
        """Return the tokens of the passages most like the question."""
        assert room is not None
        return self._chosen(document, len(document), question, room)

    def choose_before(self, document: _Document, end: int, room: int | None) -> IntArray:
        """Return the newest tokens, and those of the passages most like them."""
        assert room is not None
        if room >= end:
            return np.arange(end)
        recent = max(1, room // 2)
        first = end - recent
        found = self._chosen(document, first, document.slice(first, end), room - recent)
        return np.concatenate((found, np.arange(first, end)))

    def _chosen(self, document: _Document, end: int, query: str, room: int) -> IntArray:
        if room >= end:
            return np.arange(end)
        limit = min(self.passage_tokens, max(1, room))
        spans = [(s, min(e, end)) for s, e in document.passages(limit) if s < end]
        scores = self._similarity(query, [document.slice(*span) for span in spans])
        kept: list[tuple[int, int]] = []
        for row in np.argsort(-scores, kind="stable"):
            start, stop = spans[row]
            if stop - start <= room:
                kept.append((start, stop))
                room -= stop - start
        return np.concatenate([np.arange(0), *(np.arange(*span) for span in sorted(kept))])

    def _similarity(self, query: str, passages: list[str]) -> NDArray[np.float64]:
        if self.by == "meaning":
            assert self.encoder is not None
            vectors = self.encoder.encode([query, *passages], on_truncated=lambda rows: None)
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            of_passages: NDArray[np.float64] = (vectors[1:] @ vectors[0]).astype(np.float64)
            return of_passages
        if not any(passage.strip() for passage in passages):  # no words to count
            return np.zeros(len(passages))
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
        products = vectorizer.fit_transform(passages) @ vectorizer.transform([query]).T
        found: NDArray[np.float64] = np.asarray(products.toarray()[:, 0], dtype=np.float64)
        return found


class _PatchingReader(DocumentReader):
    """Reads all of the document with another attention, while its ``with`` block lasts."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_new_tokens: int = 64,
        chat: bool | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__(model, max_new_tokens=max_new_tokens, chat=chat)
        self.sizes = sizes
        self._patched: InfLLM | None = None

    def __enter__(self) -> DocumentReader:
        from bakeoff.decoding.infllm import patch

        self._patched = patch(self.model, **self.sizes)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._patched is not None:
            self._patched.unpatch()
            self._patched = None

    def check_open(self) -> None:
        """Raise `DataError` outside of the ``with`` block."""
        self._open()

    def _open(self) -> InfLLM:
        if self._patched is None or not self._patched.is_active:
            raise DataError(
                f"{type(self).__name__} changes the model's attention: use it in a with block"
            )
        return self._patched

    def choose(self, document: _Document, question: str, room: int | None) -> IntArray:
        """Return all tokens."""
        return np.arange(len(document))

    def new_cache(self) -> Any:
        """Return an empty memory."""
        return self._open().new_cache()

    @property
    def _piece(self) -> int:
        return self._open().prefill_chunk


class WindowReader(_PatchingReader):
    """Reads all, attends to the first tokens and to a window (StreamingLLM, LM-Infinite).

    The first tokens count as the window's length away once they are outside of it, as in
    LM-Infinite. Everything else that leaves the window is forgotten.

    Parameters
    ----------
    budget
        Tokens of both together.
    n_init
        The first tokens.
    exec_chunk
        Tokens that pass through an attention layer at once; changes no result.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        budget: int,
        n_init: int = 4,
        exec_chunk: int = 64,
        max_new_tokens: int = 64,
        chat: bool | None = None,
    ) -> None:
        if not 0 <= n_init < budget:
            raise DataError(f"n_init must be between 0 and budget - 1 ({budget - 1}), got {n_init}")
        window = budget - n_init
        super().__init__(
            model,
            max_new_tokens=max_new_tokens,
            chat=chat,
            n_init=n_init,
            n_local=window,
            exec_chunk=min(exec_chunk, window),
            # There are no blocks.
            block_size=1,
            topk=0,
            repr_topk=1,
        )

    def __enter__(self) -> DocumentReader:
        from bakeoff.decoding.block_memory import WindowLayer

        super().__enter__()
        self._open().layer_class = WindowLayer
        return self


class MemoryReader(_PatchingReader):
    """Reads all, with InfLLM's memory of blocks.

    Parameters
    ----------
    model, max_new_tokens, chat
        As for every reader.
    **sizes
        Of `bakeoff.decoding.infllm.patch`: ``n_init``, ``n_local``, ``block_size``, ``topk``, ...
    """

    looks_up_by_token = True


READERS: Mapping[str, tuple[type[DocumentReader], Mapping[str, Any]]] = {
    "full-attention": (FullReader, {}),
    "streaming": (WindowReader, {}),
    "truncate-middle": (CuttingReader, {"keep": "both ends"}),
    "keep-end": (CuttingReader, {"keep": "end"}),
    "retrieve": (RetrievingReader, {}),
    "infllm": (MemoryReader, {}),
}
"""Readers by the slug that designs have, with what the slug says of their arguments."""


def document_reader(method: str, model: LanguageModel, **arguments: Any) -> DocumentReader:
    """Return a reader by the slug that designs have.

    Parameters
    ----------
    method
        One of `READERS`.
    model
        From `bakeoff.models.load_language_model`.
    **arguments
        Of the reader. ``encoder`` may be the name of a sentence-transformers model.

    Raises
    ------
    DataError
        If there is no such reader, or an argument is out of range.
    """
    if method not in READERS:
        raise DataError(f"there is no reader {method!r}; there are: {', '.join(READERS)}")
    kind, fixed = READERS[method]
    if isinstance(arguments.get("encoder"), str):
        from bakeoff.models import TextEncoder

        arguments["encoder"] = TextEncoder(arguments["encoder"])
    return kind(model, **{**fixed, **arguments})


def load_reader(folder: str | Path) -> DocumentReader:
    """Return the reader that a study exported.

    Parameters
    ----------
    folder
        With the ``decoder.json`` that `bakeoff.decoding.winner.save_settings` wrote.

    Raises
    ------
    DataError
        If the folder holds no settings, or those of a method that reads no documents.
    """
    from bakeoff.decoding.winner import load_settings
    from bakeoff.models import load_language_model

    settings = load_settings(Path(folder))
    if settings.method not in READERS:
        raise DataError(
            f"{folder} holds {settings.method}, which reads no documents; those that do: "
            f"{', '.join(READERS)}"
        )
    return document_reader(
        settings.method,
        load_language_model(settings.model),
        **settings.params,
        **settings.extra,
    )
