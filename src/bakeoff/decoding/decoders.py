"""Answer prompts with any method of this family, by name: what `bakeoff generate` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff.data.prompts import Prompt
from bakeoff.decoding.set_based_prompting import END, SPLIT, START
from bakeoff.decoding.token_clock import TokenClock
from bakeoff.errors import DataError
from bakeoff.models.chat import chat_frame

if TYPE_CHECKING:
    from bakeoff.decoding.alignment_trie import AlignmentTrie
    from bakeoff.models import LanguageModel

HOLE = "<fill>"
"""Stands in a prompt where `infill` is to write."""


@dataclass(frozen=True)
class Generation:
    """How to write, whatever the method.

    Parameters
    ----------
    max_new_tokens
        Most tokens of an answer.
    n_samples
        Answers per prompt; more than one only where a method draws.
    temperature, top_k, top_p
        Of what is drawn.
    chat
        Whether a prompt is a user's message in the tokenizer's chat template.
    seed
        Of all that is drawn.
    """

    max_new_tokens: int = 64
    n_samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n_samples"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise DataError(
                f"temperature must be above 0, got {self.temperature}; the method greedy takes the "
                "likeliest token"
            )


@dataclass(frozen=True)
class Answer:
    """What a method wrote.

    Parameters
    ----------
    text
        The text.
    log_prob
        Natural logarithm of its tokens' probability under the model; None where a method does not
        follow the model alone.
    n_tokens
        Tokens written, the end of text included; None where none was written.
    seconds
        Wall time of this answer, or of its share in a batch.
    seconds_to_first_token
        From the start to the first logits; None where nothing is written token by token.
    facts
        What else the method says, JSON-able.
    """

    text: str
    log_prob: float | None
    n_tokens: int | None
    seconds: float
    seconds_to_first_token: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What some methods need beside a model.

    Parameters
    ----------
    grammar
        Anything that `bakeoff.decoding.grammar.as_grammar` takes.
    trie
        What earlier samples of the same prompt and grammar taught; extended in place.
    large
        The model that a cascade defers to.
    rule
        The file that `Cascade.save` wrote.
    """

    grammar: Any = None
    trie: AlignmentTrie | None = None
    large: LanguageModel | None = None
    rule: Path | None = None


@dataclass(frozen=True)
class _Call:
    model: LanguageModel
    prompts: Sequence[Prompt]
    how: Generation
    resources: Resources
    params: Mapping[str, Any]
    method: str


@dataclass(frozen=True)
class DecoderKind:
    """One method, as it can be called by name.

    Parameters
    ----------
    does
        In a few words.
    needs
        Fields of `Resources` without which it cannot run; ``set`` and ``hole`` for what a prompt
        must have.
    takes
        Fields of `Resources` that it can do without.
    reads
        Fields of `Prompt` it makes use of besides the text; others are refused.
    draws
        Whether it samples, so that several answers to one prompt differ.
    parameters
        Names of what can be set.
    """

    does: str
    run: Callable[[_Call], Iterator[list[Answer]]]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    draws: bool = False
    parameters: tuple[str, ...] = ()


def decoder_kind(method: str) -> DecoderKind:
    """Return what is known of a method.

    Raises
    ------
    DataError
        If there is none of that name; lists those that there are.

    Examples
    --------
    >>> decoder_kind("asap").needs
    ('grammar',)
    """
    if method not in DECODERS:
        shown = "; ".join(f"{name} ({kind.does})" for name, kind in DECODERS.items())
        raise DataError(f"there is no decoding method {method!r}; there are: {shown}")
    return DECODERS[method]


def generate(
    method: str,
    model: LanguageModel,
    prompts: Sequence[Prompt],
    how: Generation | None = None,
    *,
    resources: Resources | None = None,
    params: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Answer]]:
    """Answer prompts with a method of this family.

    Parameters
    ----------
    method
        One of `DECODERS`.
    model
        From `bakeoff.models.load_language_model`.
    prompts
        What to answer.
    how
        Lengths, sampling and seed.
    resources
        A grammar, a second model, where the method needs it.
    params
        The method's own settings.
    progress
        Called with (prompts done, prompts in total).

    Returns
    -------
    list of list of Answer
        ``how.n_samples`` answers per prompt.

    Raises
    ------
    DataError
        If there is no such method, it needs something that is missing, a prompt has a part that it
        would not read, or a parameter is unknown.

    Examples
    --------
    >>> from bakeoff.models import load_language_model
    >>> generate(  # doctest: +SKIP
    ...     "greedy", load_language_model("smollm2-135m"), [Prompt("The capital of France is")]
    ... )[0][0].text
    """
    how, resources, params = how or Generation(), resources or Resources(), dict(params or {})
    given = [name for name in _WHAT if getattr(resources, name) is not None]
    check(method, prompts, how, given=given, params=params)
    kind = decoder_kind(method)
    answers: list[list[Answer]] = []
    for found in kind.run(_Call(model, prompts, how, resources, params, method)):
        answers.append(found)
        if progress is not None:
            progress(len(answers), len(prompts))
    return answers


def check(
    method: str,
    prompts: Sequence[Prompt],
    how: Generation,
    *,
    given: Collection[str],
    params: Collection[str] = (),
) -> None:
    """Raise what `generate` would raise for bad arguments, before any model is loaded.

    Parameters
    ----------
    method, prompts, how
        As for `generate`.
    given
        Names of the fields of `Resources` that will be there.
    params
        Names of the method's own settings.
    """
    kind = decoder_kind(method)
    if not prompts:
        raise DataError("prompts must hold at least one prompt")
    unknown = sorted(set(params) - set(kind.parameters))
    if unknown:
        raise DataError(
            f"{method} takes {', '.join(kind.parameters) or 'no parameters'}; got "
            f"{', '.join(unknown)}"
        )
    if how.n_samples > 1 and not kind.draws:
        raise DataError(
            f"{method} gives the same answer every time: n_samples must be 1, got {how.n_samples}"
        )
    for name in _WHAT:
        if name in kind.needs and name not in given:
            raise DataError(f"{method} needs {_WHAT[name]}")
        if name in given and name not in (*kind.needs, *kind.takes):
            raise DataError(f"{method} makes no use of {_WHAT[name]}")
    if "trie" in given and len(prompts) > 1:
        raise DataError(f"a trie belongs to one prompt, got {len(prompts)} prompts")
    for number, prompt in enumerate(prompts):
        _check_parts(method, kind, prompt, number)


_WHAT = {
    "grammar": "a grammar",
    "trie": "a trie",
    "large": "a large model",
    "rule": "a fitted cascade, as `bakeoff run decoding` or Cascade.save leaves it",
}


def _check_parts(method: str, kind: DecoderKind, prompt: Prompt, number: int) -> None:
    given = [part for part in ("options", "passages", "document") if getattr(prompt, part)]
    unread = [part for part in given if part not in kind.reads]
    if unread:
        readers = [name for name, other in DECODERS.items() if unread[0] in other.reads]
        raise DataError(
            f"prompt {number} has {unread[0]}, which {method} does not read; "
            f"{', '.join(readers)} do"
        )
    if "set" in kind.needs and not given and START not in prompt.text:
        raise DataError(
            f"prompt {number}: {method} needs options, passages, or a set that is marked: "
            f"{START}first{SPLIT}second{END}"
        )
    if "hole" in kind.needs and HOLE not in prompt.text:
        raise DataError(f"prompt {number}: {method} needs {HOLE} where it is to write")


# Prompts as texts ---------------------------------------------------------------------------------


def _frame(call: _Call) -> tuple[str, str]:
    """Return what goes before and after a prompt: the chat template's parts, or nothing."""
    return chat_frame(call.model.tokenizer, call.model.name) if call.how.chat else ("", "")


def _ids(call: _Call, text: str) -> list[int]:
    # A template has its special tokens already.
    ids = call.model.tokenizer(text, add_special_tokens=not call.how.chat)["input_ids"]
    return [int(token) for token in ids]


def _whole(prompt: Prompt) -> str:
    return f"{prompt.document}\n\n{prompt.text}" if prompt.document else prompt.text


# Methods ------------------------------------------------------------------------------------------


def _plain(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.token_records import TextGenerator

    options: dict[str, Any] = {"max_new_tokens": call.how.max_new_tokens, "chat": call.how.chat}
    _frame(call)  # refuses chat without a template
    if call.method == "sample":
        how = call.how
        options |= {"do_sample": True, "temperature": how.temperature}
        options |= {"top_k": how.top_k, "top_p": how.top_p}
    for number, prompt in enumerate(call.prompts):
        answers = []
        for sample in range(call.how.n_samples):
            # Far apart, so that the draws of neighbouring prompts do not meet.
            seed = call.how.seed + 1_000_003 * number + sample
            write = TextGenerator(call.model, random_state=seed, **options)
            clock = TokenClock()
            record = write([_whole(prompt)], logits_processor=[clock])[0]
            answers.append(
                Answer(
                    record.text or "",
                    float(record.log_probs.sum()),
                    len(record.log_probs),
                    time.perf_counter() - clock.started,
                    clock.seconds_to_first_token,
                )
            )
        yield answers


def _constrained(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.grammar_aligned import sample_aligned

    before, after = _frame(call)
    how = call.how
    for number, prompt in enumerate(call.prompts):
        started = time.perf_counter()
        found = sample_aligned(
            call.model,
            None,
            _ids(call, before + _whole(prompt) + after),
            call.resources.grammar,
            how.n_samples,
            method=call.method,  # type: ignore[arg-type]
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            trie=call.resources.trie,
            random_state=how.seed + number,
            **call.params,
        )
        seconds = (time.perf_counter() - started) / how.n_samples
        low, high = found.z_bounds
        facts = {
            "legal_probability": {"estimate": found.z_estimate, "bounds": [low, high]},
            "attempts": found.n_attempts,
            "model_calls": found.n_model_calls,
        }
        yield [
            Answer(text, float(log_prob), len(tokens), seconds, None, {**facts, "weight": weight})
            for text, log_prob, tokens, weight in zip(
                found.texts, found.log_probs, found.tokens, found.weights.tolist(), strict=True
            )
        ]


def _ordered(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.baselines import order_model
    from bakeoff.decoding.set_based_prompting import SetPrompt

    before, after = _frame(call)
    reader, arguments = order_model(
        call.method,
        call.params,
        call.model,
        add_special_tokens=not call.how.chat,
        random_state=call.how.seed,
    )
    for prompt in call.prompts:
        if prompt.options and prompt.passages:
            raise DataError("a prompt has options or passages as its set, not both")
        if prompt.options:
            asked = SetPrompt.from_options(prompt.text, prompt.options)
        elif prompt.passages:
            asked = SetPrompt.from_passages(prompt.text, prompt.passages)
        else:
            asked = SetPrompt.parse(prompt.text)
        asked = SetPrompt(before + asked.prefix, asked.groups, asked.suffix + after, asked.between)
        started = time.perf_counter()
        if prompt.options:
            # In quotes, as they are listed. After a template's header nothing comes before them.
            lead = "" if call.how.chat else " "
            choices = [f'{lead}"{option}"' for option in prompt.options]
            scores = reader.score([asked], [choices], **arguments)[0]
            seconds = time.perf_counter() - started
            best = prompt.options[int(scores.argmax())]
            by_option = dict(zip(prompt.options, scores.tolist(), strict=True))
            yield [Answer(best, None, None, seconds, None, {"scores": by_option})]
            continue
        clock = TokenClock(started)
        text = reader.generate(
            [asked],
            max_new_tokens=call.how.max_new_tokens,
            logits_processor=[clock],
            **arguments,
        )[0]
        seconds = time.perf_counter() - started
        yield [Answer(text, None, clock.n_steps, seconds, clock.seconds_to_first_token)]


def _reading(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.document_baselines import document_reader

    _frame(call)  # refuses chat without a template
    how, params = call.how, dict(call.params)
    if "budget" in DECODERS[call.method].parameters:
        params.setdefault("budget", call.model.max_length)
    reader = document_reader(
        call.method, call.model, max_new_tokens=how.max_new_tokens, chat=how.chat, **params
    )
    with reader:
        for prompt in call.prompts:
            if not prompt.document:
                raise DataError(f"{call.method} needs a document; the question is {prompt.text!r}")
            read = reader.read(prompt.document, prompt.text)
            answer = read.generate()
            facts = {
                "document_tokens": read.n_document,
                "tokens_read": read.n_kept,
                "memory_bytes": answer.memory_bytes,
            }
            seconds = read.seconds + answer.seconds
            first = answer.seconds_to_first_token
            yield [Answer(answer.text, None, answer.n_tokens, seconds, first, facts)]


def _remembering(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.infllm import patch

    before, after = _frame(call)
    tokenizer = call.model.tokenizer
    ends = call.model.model.generation_config.eos_token_id
    with patch(call.model, **call.params) as patched:
        read = ""
        memory: Any = None
        for prompt in call.prompts:
            clock = TokenClock()
            document = before + prompt.document
            # As the readers of documents ask, so that a study's winner is asked as it was there.
            question = prompt.text + (after if call.how.chat else "\nAnswer:")
            if prompt.document and (memory is None or document != read):
                # One document asked many times is read once.
                memory, read = patched.read(_ids(call, document)), document
            if prompt.document:
                encoded = tokenizer("\n\n" + question, add_special_tokens=False)["input_ids"]
            else:
                memory, encoded = None, _ids(call, before + prompt.text + after)
            new = patched.generate(
                list(encoded),
                memory,
                max_new_tokens=call.how.max_new_tokens,
                do_sample=False,
                logits_processor=[clock],
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
            text = str(tokenizer.decode(new[0], skip_special_tokens=True))
            facts = {} if memory is None else {"memory": memory.stats()}
            seconds = time.perf_counter() - clock.started
            yield [Answer(text, None, len(new[0]), seconds, clock.seconds_to_first_token, facts)]


def _cascaded(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.cascades import Cascade
    from bakeoff.decoding.token_records import TextGenerator

    options: dict[str, Any] = {"chat": call.how.chat, "max_new_tokens": call.how.max_new_tokens}
    rule: Any = call.resources.rule
    cascade = Cascade.load(
        rule,
        TextGenerator(call.model, embeddings=True, **options),
        TextGenerator(call.resources.large, **options),
    )
    for prompt in call.prompts:
        started = time.perf_counter()
        answer = cascade.generate([prompt.text]).answers[0]
        facts = {"answered_by": answer.answered_by, "score": answer.score, "flops": answer.cost}
        yield [Answer(answer.text, None, None, time.perf_counter() - started, None, facts)]


def _filling(call: _Call) -> Iterator[list[Answer]]:
    from bakeoff.decoding.infilling import infill, infill_holes

    options: dict[str, Any] = {"max_new_tokens": call.how.max_new_tokens, **call.params}
    for prompt in call.prompts:
        parts = prompt.text.split(HOLE)
        started = time.perf_counter()
        if len(parts) == 2:
            fills = [infill(call.model, None, parts[0], parts[1], **options)]
        else:
            fills = infill_holes(call.model, None, parts, **options)
        seconds = time.perf_counter() - started
        pieces = [*(fill.text for fill in fills), ""]
        whole = "".join(part + fill for part, fill in zip(parts, pieces, strict=True))
        facts = {"fills": [fill.text for fill in fills], "stopped": [f.stopped for f in fills]}
        n_tokens = sum(len(fill.ids) for fill in fills)
        yield [Answer(whole, None, n_tokens, seconds, None, facts)]


_SET = ("options", "passages")
_ALIGNED = ("burn_in", "max_failures", "cache_bytes")

DECODERS: dict[str, DecoderKind] = {
    "greedy": DecoderKind("the likeliest token each time", _plain, reads=("document",)),
    "sample": DecoderKind("drawn from the model", _plain, reads=("document",), draws=True),
    **{
        name: DecoderKind(
            does, _constrained, ("grammar",), ("trie",), ("document",), True, _ALIGNED
        )
        for name, does in {
            "gcd": "in a grammar, by masking",
            "asap": "in a grammar, in the model's proportions after some samples",
            "adaptive": "in a grammar, exactly in the model's proportions, learning from failures",
            "rejection": "in a grammar, exactly, by throwing away",
        }.items()
    },
    "plain-order": DecoderKind("pieces in the listed order", _ordered, ("set",), reads=_SET),
    "sorted-order": DecoderKind("pieces in alphabetical order", _ordered, ("set",), reads=_SET),
    "set-based": DecoderKind(
        "the same answer in any order, in one pass",
        _ordered,
        ("set",),
        reads=_SET,
        parameters=("edit_mask", "edit_positions"),
    ),
    "permute-and-vote": DecoderKind(
        "plain prompts in several orders, put to the vote",
        _ordered,
        ("set",),
        reads=_SET,
        parameters=("n_orders",),
    ),
    "average-over-orders": DecoderKind(
        "plain prompts in several orders, averaged",
        _ordered,
        ("set",),
        reads=_SET,
        parameters=("n_orders",),
    ),
    "infllm": DecoderKind(
        "a memory of blocks, for documents beyond the window",
        _remembering,
        reads=("document",),
        parameters=(
            *("n_init", "n_local", "block_size", "topk", "repr_topk", "exec_chunk"),
            *("offload", "offload_folder", "max_cached_blocks", "prefill_chunk", "exact_mask"),
        ),
    ),
    "full-attention": DecoderKind("a document, all of it", _reading, reads=("document",)),
    "streaming": DecoderKind(
        "a document's first tokens and a window that slides over it",
        _reading,
        reads=("document",),
        parameters=("budget", "n_init", "exec_chunk"),
    ),
    "truncate-middle": DecoderKind(
        "a document's beginning and end", _reading, reads=("document",), parameters=("budget",)
    ),
    "keep-end": DecoderKind(
        "a document's end", _reading, reads=("document",), parameters=("budget",)
    ),
    "retrieve": DecoderKind(
        "a document's passages most like the question",
        _reading,
        reads=("document",),
        parameters=("budget", "by", "encoder", "passage_tokens"),
    ),
    "cascade": DecoderKind(
        "a small model answers, a large one where a rule says so", _cascaded, ("large", "rule")
    ),
    "infill": DecoderKind(
        f"writes where {HOLE} stands, with a model trained for it",
        _filling,
        ("hole",),
        parameters=("layout", "attention", "heal"),
    ),
}
"""Every method, by the name that designs have."""
