"""Grammar-aligned decoding: samples distributed as the model is, given that they are legal."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.decoding.alignment_trie import (
    NEVER,
    AlignmentTrie,
    ByteLRU,
    Ids,
    LogProbs,
    log_sum,
)
from bakeoff.decoding.grammar import (
    GrammarConstraint,
    TokenConstraint,
    as_grammar,
    constraint_for,
)
from bakeoff.decoding.prefix_reader import PrefixReader
from bakeoff.decoding.prefix_reader import states_can_be_cut as states_can_be_cut
from bakeoff.errors import DataError
from bakeoff.models.inference import evaluating
from bakeoff.models.loading import LanguageModel

if TYPE_CHECKING:
    from torch import Tensor

METHOD = {
    "slug": "grammar-aligned-decoding",
    "title": "Grammar-aligned sampling (ASAp)",
    "paper": "Park et al., Grammar-Aligned Decoding, NeurIPS 2024, arXiv 2405.21047",
    "designs": ["asap"],
    "names": [
        "sample_aligned",
        "AlignedSamples",
        "AlignmentTrie",
        "Grammar",
        "GrammarConstraint",
        "GrammarAlignedLogitsProcessor",
    ],
}

AlignedMethod = Literal["asap", "gcd", "rejection", "adaptive"]
_METHODS = ("asap", "gcd", "rejection", "adaptive")
_Outcome = Literal["accepted", "illegal", "truncated", "dead end"]
_TRIES = 16  # draws from a node before its bounds are summed up instead


# Results ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AlignedSamples:
    """What `sample_aligned` returns: n samples, and what every attempt at one told about Z.

    Probabilities are natural logarithms in float64. An attempt is one walk from the prompt, whether
    it ended in a legal text or not.

    Parameters
    ----------
    method
        What they were drawn with.
    tokens
        n tuples of token ids, the end-of-text token included.
    texts
        n texts, without it.
    log_probs
        ``(n,)``: log P of the tokens under the model, as it is warped, without any grammar.
    log_proposals
        ``(n,)``: log-probability with which the sampler, at that time, proposed these tokens.
    attempt_log_weights
        ``(a,)``: log P - log proposal of every attempt, minus infinity of those that failed. Its
        exponential is, at every attempt, an unbiased estimate of Z.
    attempt_log_z_upper, attempt_log_z_lower
        ``(a,)``: bounds on log Z after every attempt. One never rises, the other never falls.
    accepted_attempts
        int64 ``(n,)``: the attempt that each sample came from.
    n_illegal, n_truncated, n_dead_ends
        Attempts that left the language; that did not end within the limit on tokens; that reached
        a prefix from which no token leads on.
    n_model_calls, n_model_tokens
        Forward passes, and the tokens in them: the prompt's, and all that were read ahead, also in
        vain. A pass over several texts side by side counts once.
    trie
        The trie as it is now; give it to the next call with the same model, prompt and grammar.
    """

    method: AlignedMethod
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log_probs: NDArray[np.float64]
    log_proposals: NDArray[np.float64]
    attempt_log_weights: NDArray[np.float64]
    attempt_log_z_upper: NDArray[np.float64]
    attempt_log_z_lower: NDArray[np.float64]
    accepted_attempts: NDArray[np.int64]
    n_illegal: int
    n_truncated: int
    n_dead_ends: int
    n_model_calls: int
    n_model_tokens: int
    trie: AlignmentTrie

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_attempts(self) -> int:
        """Number of attempts, burn-in included."""
        return len(self.attempt_log_weights)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weights ``(n,)``, summing to 1, under which the samples stand for Q.

        Under ``asap`` and ``gcd`` these are importance weights P / proposal. The samples of
        ``rejection`` and ``adaptive`` are from Q as they are, and weigh the same.
        """
        if self.method in ("rejection", "adaptive"):
            return np.full(len(self), 1 / len(self))
        logs = self.log_probs - self.log_proposals
        weights = np.exp(logs - logs.max())
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    @property
    def effective_sample_size(self) -> float:
        """How many draws from Q the weighted samples are worth, from 1 to n."""
        return float(1 / np.square(self.weights).sum())

    @property
    def z_estimate(self) -> float:
        """Mean of the attempts' weights: the probability that the model's text is legal."""
        return float(np.exp(log_sum(self.attempt_log_weights)) / self.n_attempts)

    @property
    def z_bounds(self) -> tuple[float, float]:
        """What Z certainly lies between, by now."""
        return (
            float(np.exp(self.attempt_log_z_lower[-1])),
            float(np.exp(self.attempt_log_z_upper[-1])),
        )


# Sampling -----------------------------------------------------------------------------------------


def sample_aligned(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    grammar: Any,
    n: int,
    *,
    method: AlignedMethod = "asap",
    burn_in: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    trie: AlignmentTrie | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    max_failures: int = 2000,
    cache_bytes: int = 2**29,
    lookahead: int = 32,
    random_state: int | np.random.Generator = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AlignedSamples:
    """Draw legal texts in the proportions in which the model would write them.

    The target is ``Q(w) = P(w) / Z`` on the token sequences w that end within `max_new_tokens` and
    whose text is in the language; ``Z`` is the probability of all of these. Masking illegal tokens
    step by step, as everybody does, samples something else: prefixes whose continuations are mostly
    illegal come out too often. ``asap`` and ``adaptive`` learn from every attempt how much of each
    prefix's probability stays legal.

    Parameters
    ----------
    model
        A transformers decoder, or a `bakeoff.models.LanguageModel`; run in eval mode and left in
        its own.
    tokenizer
        Its fast tokenizer; may be None for a LanguageModel.
    prompt
        A text, encoded as the tokenizer does by default, or token ids.
    grammar
        As for `bakeoff.decoding.grammar.as_grammar`, or a ready `TokenConstraint`.
    n
        Samples to return.
    method
        ``asap``, the paper's: every attempt is legal, and the distribution tends to Q over the
        samples of one trie; early samples can be further from Q than ``gcd``'s. ``adaptive``: every
        sample is exactly from Q; prefixes seen before are drawn from in proportion to ``P C``,
        unseen ones without a mask, and attempts that turn illegal are thrown away. ``rejection``:
        exactly from Q by throwing away, with nothing learnt. ``gcd``: plain masking.
    burn_in
        Samples to draw first and drop.
    max_new_tokens
        Most tokens after the prompt, the end-of-text token included. Attempts that do not end
        within are failures, never samples.
    temperature, top_k, top_p
        What defines P, applied in this order before any mask, as `generate` does.
    trie
        One from an earlier call with the same model, prompt, grammar, limit and warping; it is
        extended in place. A new one if None.
    eos_token_id
        What ends a text; by default what ``model.generation_config`` says, else the tokenizer.
    max_failures
        Failed attempts in a row after which to give up.
    cache_bytes
        Memory for key-value states and for next-token distributions of wide nodes. What was used
        least recently is dropped and computed again when needed; results do not depend on it. The
        rows that are read side by side take as much again at most.
    lookahead
        Most attempts to read ahead for, side by side, which is much faster than one by one. Fewer
        are read where the learnt changes much between attempts, memory is short or samples are few;
        with 1 nothing is read ahead. Models with recurrent layers are read one by one. The samples
        are the same, but for the rounding of logits, which depends on how many rows a pass has.
    random_state
        A seed or a numpy generator, of which every attempt takes one number.
    progress
        Called with (samples drawn, samples in total), burn-in included.

    Returns
    -------
    AlignedSamples
        Samples, their probabilities, and bounds on and estimates of Z.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If the grammar is invalid or its language empty, no text of it ends within
        `max_new_tokens`, `max_failures` attempts failed in a row, the trie belongs to something
        else, or an argument is out of range.

    Notes
    -----
    Several token sequences can spell one text; Q is a distribution of token sequences, as P is.
    An attempt is a function of the trie and of random numbers of its own, so that what it will read
    can be foreseen with the trie as it is before earlier attempts have been made. The attempts
    themselves are made one after the other, and each uses what all earlier ones learnt; where
    that changes its way, what it needs is read then.

    Under ``adaptive`` an attempt succeeds with probability Z over the bound on Z at that time, and
    given success is a draw from Q whatever was learnt before. An interrupted call leaves a trie
    that is valid and can be given to the next.

    References
    ----------
    Kanghee Park, Jiayu Wang, Taylor Berg-Kirkpatrick, Nadia Polikarpova and Loris D'Antoni.
    "Grammar-Aligned Decoding". NeurIPS 2024. arXiv:2405.21047. The exact scheme is adaptive
    rejection sampling on its trie.

    Examples
    --------
    >>> found = sample_aligned(  # doctest: +SKIP
    ...     model, tokenizer, "A date: ", Grammar.regex("[0-9]{4}-[0-9]{2}-[0-9]{2}"), n=100,
    ... )
    >>> found.texts[0], found.z_bounds  # doctest: +SKIP
    """
    _in_range("n", n, 1)
    _in_range("burn_in", burn_in, 0)
    _in_range("max_failures", max_failures, 1)
    _in_range("lookahead", lookahead, 1)
    if method not in _METHODS:
        raise DataError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    walker = walker_for(
        model,
        tokenizer,
        prompt,
        grammar,
        max_new_tokens=max_new_tokens,
        warp=Warping(temperature, top_k, top_p),
        trie=trie,
        eos_token_id=eos_token_id,
        cache_bytes=cache_bytes,
        lookahead=lookahead,
        random=np.random.default_rng(random_state),
    )
    trie, constraint = walker.trie, walker.constraint
    if isinstance(model, LanguageModel):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    tokens: list[tuple[int, ...]] = []
    log_probs, log_proposals, accepted, log_weights = [], [], [], []
    upper: list[float] = []
    lower: list[float] = []
    counts: dict[_Outcome, int] = {"accepted": 0, "illegal": 0, "truncated": 0, "dead end": 0}
    failures = 0
    with evaluating(model):
        while counts["accepted"] < burn_in + n:
            if trie.log_z_upper == NEVER:
                raise DataError(
                    f"no text of the grammar ends within max_new_tokens={max_new_tokens} with a "
                    "probability above 0: all its beginnings were tried"
                )
            # How many attempts will still be made, going by those so far.
            rate = (len(upper) + 1) / (counts["accepted"] + 1)
            ahead = math.ceil((burn_in + n - counts["accepted"]) * rate)
            attempt = walker.attempt(method, ahead=ahead)
            counts[attempt.outcome] += 1
            upper.append(trie.log_z_upper)
            lower.append(trie.log_found)
            if attempt.outcome != "accepted":
                log_weights.append(NEVER)
                failures += 1
                if failures >= max_failures:
                    raise DataError(_hopeless(method, counts, failures, max_new_tokens, trie))
                continue
            failures = 0
            log_weights.append(attempt.log_prob - attempt.log_proposal)
            if counts["accepted"] > burn_in:
                tokens.append(tuple(attempt.tokens))
                log_probs.append(attempt.log_prob)
                log_proposals.append(attempt.log_proposal)
                accepted.append(len(upper) - 1)
            if progress is not None:
                progress(counts["accepted"], burn_in + n)
    return AlignedSamples(
        method=method,
        tokens=tuple(tokens),
        texts=tuple(_text(constraint, tokenizer, sample[:-1]) for sample in tokens),
        log_probs=np.array(log_probs),
        log_proposals=np.array(log_proposals),
        attempt_log_weights=np.array(log_weights),
        attempt_log_z_upper=np.array(upper),
        attempt_log_z_lower=np.array(lower),
        accepted_attempts=np.array(accepted, dtype=np.int64),
        n_illegal=counts["illegal"],
        n_truncated=counts["truncated"],
        n_dead_ends=counts["dead end"],
        n_model_calls=walker.reader.n_calls,
        n_model_tokens=walker.reader.n_tokens,
        trie=trie,
    )


def walker_for(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    grammar: Any,
    *,
    max_new_tokens: int,
    warp: Warping,
    trie: AlignmentTrie | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    cache_bytes: int = 2**29,
    lookahead: int = 1,
    random: np.random.Generator,
) -> TrieWalker:
    """Return what draws attempts one by one; arguments are those of `sample_aligned`.

    For reading ahead `TrieWalker.attempt` must be told how many attempts will follow.

    Raises
    ------
    bakeoff.errors.DataError
        As `sample_aligned`.
    """
    identity = None
    if isinstance(model, LanguageModel):
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        identity, model = model.fingerprint, model.model
    if tokenizer is None:
        raise DataError("tokenizer may be None only with a LanguageModel, which has its own")
    if model.get_output_embeddings() is None:
        raise DataError(f"model must have a language-model head, got {type(model).__name__}")
    _in_range("max_new_tokens", max_new_tokens, 1)
    _in_range("cache_bytes", cache_bytes, 0)
    prompt_ids = _prompt_ids(tokenizer, prompt)
    _fit_positions(model, len(prompt_ids), max_new_tokens)
    ends = _end_tokens(model, tokenizer, eos_token_id)
    width = int(model.config.get_text_config().vocab_size)
    constraint = constraint_for(grammar, tokenizer, width, ends)
    if isinstance(constraint, GrammarConstraint):
        if constraint.min_tokens > max_new_tokens:
            raise DataError(
                f"no text of the grammar ends within max_new_tokens={max_new_tokens}: the shortest "
                f"has at least {constraint.grammar.min_bytes} bytes, which takes at least "
                f"{constraint.min_tokens} tokens with the end of text"
            )
        ends = constraint.eos_token_ids
    binding = trie_binding(
        identity or model_fingerprint(model), prompt_ids, constraint, warp, max_new_tokens, ends
    )
    trie = AlignmentTrie() if trie is None else trie
    trie.require(binding)
    return TrieWalker(
        constraint=constraint,
        trie=trie,
        reader=PrefixReader(model, prompt_ids, ByteLRU(cache_bytes), max_new_tokens),
        warp=warp,
        ends=frozenset(ends),
        max_new_tokens=max_new_tokens,
        random=random,
        lookahead=lookahead,
    )


def _text(constraint: TokenConstraint, tokenizer: Any, tokens: Sequence[int]) -> str:
    if isinstance(constraint, GrammarConstraint):
        return constraint.text(tokens)
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _hopeless(
    method: str,
    counts: dict[_Outcome, int],
    failures: int,
    max_new_tokens: int,
    trie: AlignmentTrie,
) -> str:
    advice = "a larger max_new_tokens" if counts["truncated"] > counts["illegal"] else ""
    if not advice and method in ("rejection", "adaptive"):
        advice = "method='asap', of which every attempt is legal"
    return (
        f"{failures} attempts in a row gave no sample: so far {counts['illegal']} became illegal, "
        f"{counts['truncated']} did not end within max_new_tokens={max_new_tokens} and "
        f"{counts['dead end']} reached a dead end; legal texts have at most a probability of "
        f"{math.exp(trie.log_z_upper):.3g}. Try {advice or 'a larger max_failures'}"
    )


@dataclass
class Attempt:
    """One walk: how it ended, its tokens, and log-probabilities under the model and the walker."""

    outcome: _Outcome
    tokens: list[int]
    log_prob: float
    log_proposal: float


class TrieWalker:
    """Walks from the root of the trie to an end, extending it on the way; see `walker_for`.

    Attributes
    ----------
    n_foreseen, n_right
        Attempts that something was read ahead for, and how many of these then needed nothing else.
    """

    def __init__(
        self,
        *,
        constraint: TokenConstraint,
        trie: AlignmentTrie,
        reader: PrefixReader,
        warp: Warping,
        ends: frozenset[int],
        max_new_tokens: int,
        random: np.random.Generator,
        lookahead: int = 1,
    ) -> None:
        self.constraint, self.trie, self.reader = constraint, trie, reader
        self.warp, self.ends, self.max_new_tokens = warp, ends, max_new_tokens
        self.random, self.lookahead = random, lookahead
        self.n_foreseen = self.n_right = 0
        self._n_attempts = 0
        self._numbers: dict[int, _Numbers] = {}  # of attempts that were foreseen, by their keys
        self._awaited: list[int] = []  # attempts that were read for last time
        self._rows = lookahead

    def attempt(self, method: AlignedMethod, *, ahead: int = 1) -> Attempt:
        """Draw one text; the bounds along its path are brought up to date at its end.

        The paper's code updates them at every step on the way down. The draws are the same: they
        depend on the bounds below the current node only, and these change at the end alone.

        Parameters
        ----------
        method
            As for `sample_aligned`.
        ahead
            How many attempts will be made, this one included.
        """
        trie = self.trie
        key = _key(self.random)
        foreseen = key in self._numbers
        numbers = self._numbers.pop(key) if foreseen else _Numbers(key)
        walk = _Walk(self._n_attempts, numbers)
        self._n_attempts += 1
        nodes: list[int] = [0]
        tokens = walk.tokens
        log_prob = log_proposal = 0.0
        while True:
            node = nodes[-1]
            walk.node, walk.fresh = node, walk.fresh or not trie.is_expanded(node)
            what = self._known(walk)
            if what is None and ahead > 1 and self.lookahead > 1:
                what = self._read_ahead(walk, method, ahead)
            if what is None:
                ids, log_p, log_cut = self.look(self._state(walk), tokens, nodes)
                what = Following.of(ids, log_p, log_cut)
                self._hold(tokens, what)
            trie.expand(node, what.ids, what.log_p, log_cut=what.log_cut)
            log_total = self._log_total(walk, what, method)
            outcome, token = self._draw(walk, what, method)
            if outcome != "accepted":
                break
            child = trie.add_child(node, token, what.ids, what.log_p)
            step, bound = trie.edge(child)
            log_prob += step
            log_proposal += step - log_total + (bound if method in ("asap", "adaptive") else 0.0)
            tokens.append(token)
            if token in self.ends:
                trie.finish(child)
                break
            nodes.append(child)
        trie.update(nodes)
        self.n_right += walk.number in self._awaited[1:]  # the first of them was no guess
        return Attempt(outcome, tokens, log_prob, log_proposal)

    # Drawing

    def _draw(self, walk: _Walk, what: Following, method: AlignedMethod) -> tuple[_Outcome, int]:
        """Draw what follows; -1 if it is no token.

        A token is drawn from the model's probabilities, which never change, and accepted with the
        probability that is its bound; else again. So a change of the bounds changes the outcome
        only as often as it must, and what was foreseen with older bounds nearly always happens.
        After some tries in vain the products of both are summed up and drawn from.
        """
        numbers = walk.numbers.at(len(walk.tokens))
        nothing: _Outcome = "truncated" if what.log_cut > NEVER else "dead end"
        if method in ("asap", "adaptive") and not (method == "adaptive" and walk.fresh):
            if not len(what.ids):
                return nothing, -1
            if walk.node is None:  # the bounds of what nobody has seen are 1
                return "accepted", what.token(numbers[1])
            for number, threshold in zip(numbers[1:-2:2], numbers[2:-2:2], strict=True):
                token = what.token(number)
                child = self.trie.child(walk.node, token)
                if child is None or math.log1p(-threshold) <= self.trie.edge(child)[1]:
                    return "accepted", token
            token = self._draw_from_sums(walk.node, what, numbers[-2], numbers[-1])
            return (nothing, -1) if token < 0 else ("accepted", token)
        legal, cut = math.exp(what.log_legal), math.exp(what.log_cut)
        if method == "gcd":
            if what.log_legal == what.log_cut == NEVER:
                return nothing, -1
            is_legal = numbers[0] < _share(what.log_legal, what.log_cut)
            return ("accepted", what.token(numbers[1])) if is_legal else ("truncated", -1)
        # What is neither legal nor late is illegal, and together they are 1.
        place = numbers[0] * max(1.0, legal + cut)
        if place < legal:
            return "accepted", what.token(numbers[1])
        return ("truncated", -1) if place < legal + cut else ("illegal", -1)

    def _draw_from_sums(self, node: int, what: Following, first: float, second: float) -> int:
        """Draw a token in proportion to its probability times its bound; -1 if all is closed."""
        children, log_p, log_c = self.trie.children(node)
        logs = np.append(log_p + log_c, self.trie.log_rest(node))
        if logs.max() == NEVER:
            return -1
        place = _place(np.cumsum(np.exp(logs - logs.max())), first)
        if place < len(children):
            return self.trie.token(int(children[place]))
        free = np.flatnonzero(self.trie.undrawn(node, what.ids))
        rest = what.log_p[free]
        return int(what.ids[free[_place(np.cumsum(np.exp(rest - rest.max())), second)]])

    def _log_total(self, walk: _Walk, what: Following, method: AlignedMethod) -> float:
        """Return the log of the mass that is drawn from."""
        if method == "rejection" or (method == "adaptive" and walk.fresh):
            return 0.0
        if method == "gcd":
            return float(np.logaddexp(what.log_legal, what.log_cut))
        assert walk.node is not None
        _, log_p, log_c = self.trie.children(walk.node)
        return float(np.logaddexp(self.trie.log_rest(walk.node), log_sum(log_p + log_c)))

    # Knowing

    def _known(self, walk: _Walk) -> Following | None:
        """Return what follows, if that is remembered."""
        if walk.node is not None and self.trie.is_expanded(walk.node):
            kept = self.trie.kept(walk.node)
            if kept is not None:
                return Following.of(*kept, self.trie.log_cut(walk.node))
        found: Following | None = self.reader.cache.get(("next", tuple(walk.tokens)))
        return found

    def _hold(self, tokens: Sequence[int], what: Following) -> None:
        """Keep a distribution for a while; the trie keeps the small ones of what was visited."""
        self.reader.cache.put(("next", tuple(tokens)), what, what.n_bytes)

    def _state(self, walk: _Walk) -> Any:
        """Return the parser's state, advanced only when it is needed."""
        if walk.state is None:
            walk.state = self.constraint.start()
        for token in walk.tokens[walk.n_advanced :]:
            walk.state = self.constraint.advance(walk.state, token)
        walk.n_advanced = len(walk.tokens)
        return walk.state

    def look(self, state: Any, tokens: list[int], nodes: list[int]) -> tuple[Ids, LogProbs, float]:
        """Return the legal tokens after a prefix, their log-probabilities and what is cut off.

        `nodes` are the trie's, from the root to the prefix.
        """
        return self._legal(state, self.reader.logits(tokens), len(tokens))

    def _legal(self, state: Any, logits: Tensor, n_tokens: int) -> tuple[Ids, LogProbs, float]:
        log_probs = self.warp.log_probs(logits)
        last = n_tokens == self.max_new_tokens - 1
        ids, log_cut = legal_ids(self.constraint, state, log_probs, self.ends, last=last)
        return ids, log_probs[ids], log_cut

    # Reading ahead

    def _read_ahead(self, walk: _Walk, method: AlignedMethod, ahead: int) -> Following | None:
        """Read what this attempt and the next will need, if the trie stays as it is.

        The trie is looked at and not touched. Attempts advance side by side, one pass of the model
        for all that are equally far. Returns what follows the place where the attempt is, or None
        if nothing was read.
        """
        here = tuple(walk.tokens)
        n_rows = self._pace(walk.number)
        if n_rows > 1:
            n_rows = min(n_rows, ahead, self.reader.most_rows())
        self._awaited = [walk.number]
        if n_rows < 2:
            return None
        waiting: dict[int, dict[tuple[int, ...], list[_Walk]]] = {}
        _wait(waiting, walk.copy())
        # Attempts that end where everything is known take no row.
        random, before, self._numbers = copy.deepcopy(self.random), self._numbers, {}
        for number in range(walk.number + 1, walk.number + min(ahead, 8 * n_rows)):
            key = _key(random)
            self._numbers[key] = before.get(key) or _Numbers(key)
            later = _Walk(number, self._numbers[key])
            if self._foresee(later, method):
                self._awaited.append(number)
                _wait(waiting, later)
                if len(self._awaited) == n_rows:
                    break
        self.n_foreseen += len(self._awaited) - 1
        found: Following | None = None
        while waiting:
            depth = min(waiting)
            groups = waiting.pop(depth)
            for (prefix, walks), logits in zip(
                groups.items(), self.reader.read(list(groups)), strict=True
            ):
                state = self._state(walks[0])
                what = Following.of(*self._legal(state, logits, depth))
                self._hold(prefix, what)
                found = what if prefix == here else found
                for each in walks:
                    each.state, each.n_advanced = state, depth
                    if self._step(each, what, method) and self._foresee(each, method):
                        _wait(waiting, each)
        return found

    def _pace(self, number: int) -> int:
        """Return how many attempts to read for: about twice as many as there was a use for."""
        used = sum(awaited < number for awaited in self._awaited)
        if used == len(self._awaited):
            self._rows *= 2
        else:
            self._rows = max(1, 2 * used)
        self._rows = min(self._rows, self.lookahead)
        return self._rows

    def _foresee(self, walk: _Walk, method: AlignedMethod) -> bool:
        """Walk on through what is known; return whether something must be read then."""
        while (what := self._known(walk)) is not None:
            if not self._step(walk, what, method):
                return False
        return True

    def _step(self, walk: _Walk, what: Following, method: AlignedMethod) -> bool:
        """Take one step without leaving a trace; return whether the walk goes on."""
        walk.fresh = walk.fresh or walk.node is None or not self.trie.is_expanded(walk.node)
        outcome, token = self._draw(walk, what, method)
        if outcome != "accepted" or token in self.ends:
            return False
        walk.tokens.append(token)
        walk.node = None if walk.node is None else self.trie.child(walk.node, token)
        return True


@dataclass
class _Walk:
    """How far an attempt has come, or is foreseen to come."""

    number: int
    numbers: _Numbers
    tokens: list[int] = field(default_factory=list)
    node: int | None = 0  # None where the trie has not been yet
    fresh: bool = False  # beyond what earlier attempts saw
    state: Any = None  # the parser's, after the first n_advanced tokens
    n_advanced: int = 0

    def copy(self) -> _Walk:
        return replace(self, tokens=list(self.tokens))


def _wait(waiting: dict[int, dict[tuple[int, ...], list[_Walk]]], walk: _Walk) -> None:
    groups = waiting.setdefault(len(walk.tokens), {})
    groups.setdefault(tuple(walk.tokens), []).append(walk)


def _key(random: np.random.Generator) -> int:
    """Return what an attempt's random numbers follow from: one draw for each attempt."""
    return int(random.integers(2**63))


class _Numbers:
    """An attempt's random numbers: the same at a place, whatever happened before it."""

    def __init__(self, key: int) -> None:
        self._random = np.random.default_rng(key)
        self._rows: list[list[float]] = []

    def at(self, n_tokens: int) -> list[float]:
        """Return one number for legal or not, pairs for tokens, and two for what is left."""
        while len(self._rows) <= n_tokens:
            self._rows.append(self._random.random(2 * _TRIES + 3).tolist())
        return self._rows[n_tokens]


@dataclass(frozen=True)
class Following:
    """What may follow a prefix, ready to draw from.

    Parameters
    ----------
    ids, log_p, log_cut
        As `AlignmentTrie.expand` takes them.
    cumulative
        float64 ``(k,)``: sums of the probabilities up to each token, over that of the likeliest.
    log_legal
        Log-mass of all of `ids`.
    """

    ids: Ids
    log_p: LogProbs
    log_cut: float
    cumulative: LogProbs
    log_legal: float

    @classmethod
    def of(cls, ids: Ids, log_p: LogProbs, log_cut: float) -> Following:
        """Sum up."""
        if not len(ids):
            return cls(ids, log_p, log_cut, log_p, NEVER)
        highest = float(log_p.max())
        cumulative = np.cumsum(np.exp(log_p - highest))
        return cls(ids, log_p, log_cut, cumulative, highest + math.log(cumulative[-1]))

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        return self.ids.nbytes + self.log_p.nbytes + self.cumulative.nbytes

    def token(self, number: float) -> int:
        """Return the token at a number from 0 to 1."""
        return int(self.ids[_place(self.cumulative, number)])


def _place(cumulative: LogProbs, number: float) -> int:
    """Return which of some masses, given by their sums, a number from 0 to 1 falls into."""
    place = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    return min(place, len(cumulative) - 1)


def _share(log_one: float, log_other: float) -> float:
    """Return the share of one mass in the sum of two, not both nothing."""
    highest = max(log_one, log_other)
    one, other = math.exp(log_one - highest), math.exp(log_other - highest)
    return one / (one + other)


def legal_ids(
    constraint: TokenConstraint,
    state: Any,
    log_probs: LogProbs,
    ends: frozenset[int],
    *,
    last: bool,
) -> tuple[Ids, float]:
    """Return the tokens that may come next, ascending, and the log-mass of those too late.

    Parameters
    ----------
    constraint, state
        The language and how far the text has come in it.
    log_probs
        float64 ``(vocab_size,)``; tokens of probability zero are left out.
    ends
        End-of-text tokens.
    last
        Whether this is the last token that the limit allows, so that only an end of text counts.
    """
    mask = np.array(constraint.legal(state), dtype=np.bool_)
    if mask.shape != log_probs.shape:
        raise DataError(
            f"the grammar's mask has shape {mask.shape}, but the model gives {log_probs.shape} "
            "logits"
        )
    end_ids = np.array(sorted(ends), dtype=np.int64)
    mask[end_ids] = False
    mask &= log_probs > NEVER
    log_cut = NEVER
    if last:
        log_cut = log_sum(log_probs[mask])
        mask[:] = False
    if constraint.may_end(state):
        mask[end_ids] = log_probs[end_ids] > NEVER
    return np.flatnonzero(mask), log_cut


# The model ----------------------------------------------------------------------------------------


class Warping:
    """Temperature, top-k and top-p, which define the distribution that is sampled from.

    Parameters
    ----------
    temperature
        Above 0.
    top_k
        How many of the likeliest tokens to keep; 0 for all.
    top_p
        Least probability that the kept tokens must have together; 1 for all tokens.

    Raises
    ------
    DataError
        If one is out of range.
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise DataError(
                f"temperature must be above 0, got {temperature}: the likeliest text alone is no "
                "distribution to align"
            )
        _in_range("top_k", top_k, 0)
        if not 0 < top_p <= 1:
            raise DataError(f"top_p must be above 0 and at most 1, got {top_p}")
        self.temperature, self.top_k, self.top_p = float(temperature), int(top_k), float(top_p)

    def __repr__(self) -> str:
        return f"temperature={self.temperature!r}, top_k={self.top_k}, top_p={self.top_p!r}"

    def log_probs(self, logits: Tensor) -> LogProbs:
        """Return float64 ``(V,)`` natural log-probabilities of logits ``(V,)``."""
        import torch
        from transformers import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        scores = logits[None].float()
        unused: Any = None  # the tokens so far, which these warpers do not look at
        if self.temperature != 1:
            scores = TemperatureLogitsWarper(self.temperature)(unused, scores)
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(unused, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(unused, scores)
        return np.asarray(torch.log_softmax(scores[0].double(), dim=-1).cpu().numpy())


def model_fingerprint(model: Any) -> str:
    """Return 64 hexadecimal digits that change with a model's configuration and weights.

    Of each tensor the shape, the dtype and 64 evenly spread values are read, not all of it, so that
    large models take milliseconds.
    """
    import torch

    digest = hashlib.sha256(type(model).__name__.encode())
    settings = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        settings.pop(volatile, None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), 64).round().long()
        sample = flat[places.to(flat.device)].float().cpu() if flat.numel() else flat.float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def trie_binding(
    model: str,
    prompt_ids: Sequence[int],
    constraint: TokenConstraint,
    warp: Warping,
    max_new_tokens: int | None,
    ends: Iterable[int],
) -> dict[str, str]:
    """Return what a trie's bounds are valid for, as `AlignmentTrie.require` takes it."""
    prompt = hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()
    return {
        "model": model,
        "prompt": prompt,
        "grammar": constraint.fingerprint,
        "warping (temperature, top_k, top_p)": repr(warp),
        "max_new_tokens": str(max_new_tokens),
        "eos_token_id": str(sorted(ends)),
    }


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
        why = "its text is empty and the tokenizer puts nothing before it"
    else:
        ids = [int(token) for token in prompt]
        why = "it has no token ids"
    if not ids:
        raise DataError(f"prompt must have at least one token, but {why}: give [bos_token_id]")
    return ids


def _fit_positions(model: Any, n_prompt: int, max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and n_prompt + max_new_tokens > limit:
        raise DataError(
            f"the prompt's {n_prompt} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"model's {limit} positions"
        )


def _end_tokens(model: Any, tokenizer: Any, given: int | Iterable[int] | None) -> list[int]:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    if given is None:
        raise DataError("eos_token_id is needed: neither model nor tokenizer says what ends a text")
    ids = [given] if isinstance(given, int) else [int(token) for token in given]
    width = int(model.config.get_text_config().vocab_size)
    if not ids or not all(0 <= token < width for token in ids):
        raise DataError(f"eos_token_id must be tokens below {width}, got {ids}")
    return sorted(set(ids))


def _in_range(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be an integer of at least {least}, got {value!r}")


# For `generate` -----------------------------------------------------------------------------------


class GrammarAlignedLogitsProcessor:
    """ASAp inside ``generate``: pass it in ``logits_processor=[...]`` and call again and again.

    Every call of ``generate`` with the same prompt extends the trie. Call it with
    ``do_sample=True, top_k=0, top_p=1.0, temperature=1.0``: ``generate`` would warp what comes out
    of this processor, which is neither P nor Q. `sample_aligned` is faster, since it does not
    compute anything twice, and tells probabilities and bounds.

    Parameters
    ----------
    constraint
        A `TokenConstraint`, such as `GrammarConstraint`; its ``vocab_size`` is the width of the
        logits.
    trie
        One from earlier, or None for a new one. Never shared unless given.
    align
        Whether to use the bounds; False is plain masking (grammar-constrained decoding).
    max_new_tokens
        What ``generate`` is given, if it is; texts that would be cut off then count as illegal.
    eos_token_id
        What ends a text; that of a `GrammarConstraint` by default.
    temperature, top_k, top_p
        What defines P, before the mask.
    model
        The model, if the trie shall be bound to it.

    Raises
    ------
    DataError
        If an argument is out of range; when called, if the rows of a batch have different prompts,
        the prompt differs from that of earlier calls, or the vocabulary does not fit.

    Notes
    -----
    Rows of one batch (``num_return_sequences``) share the trie and are updated step by step; all
    rows must have the same prompt, without padding. Where nothing legal is left in a row its end of
    text is forced: check with `GrammarConstraint.accepts`.

    Examples
    --------
    >>> processor = GrammarAlignedLogitsProcessor(constraint)  # doctest: +SKIP
    >>> model.generate(  # doctest: +SKIP
    ...     **tokenizer("A date: ", return_tensors="pt"), logits_processor=[processor],
    ...     do_sample=True, top_k=0, max_new_tokens=20,
    ... )
    """

    def __init__(
        self,
        constraint: Any,
        trie: AlignmentTrie | None = None,
        *,
        align: bool = True,
        max_new_tokens: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        model: Any = None,
    ) -> None:
        if not isinstance(constraint, TokenConstraint):
            as_grammar(constraint)  # says what is wrong with it, if it is no grammar either
            raise DataError(
                "constraint must be tied to a tokenizer: GrammarConstraint(grammar, tokenizer)"
            )
        if max_new_tokens is not None:
            _in_range("max_new_tokens", max_new_tokens, 1)
        given = getattr(constraint, "eos_token_ids", None) if eos_token_id is None else eos_token_id
        if given is None:
            raise DataError("eos_token_id is needed: the constraint does not name any")
        self.constraint = constraint
        self.trie = AlignmentTrie() if trie is None else trie
        self.align, self.max_new_tokens = align, max_new_tokens
        self.ends = frozenset([given] if isinstance(given, int) else [int(e) for e in given])
        self.warp = Warping(temperature, top_k, top_p)
        self._model = "unknown" if model is None else model_fingerprint(model)
        self._prompt: list[int] | None = None
        self._rows: list[_Row] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)``: log P + log C of legal tokens, minus infinity elsewhere."""
        import torch

        sequences = input_ids.tolist()
        if self._prompt is None:
            self._bind(sequences)
        prompt = self._prompt or []
        if any(sequence[: len(prompt)] != prompt for sequence in sequences):
            raise DataError(
                "the prompt must be the same in all rows and all calls: a trie serves one prompt; "
                "make a new processor for another"
            )
        if len(sequences[0]) == len(prompt):
            self._rows = [_Row(self.constraint.start()) for _ in sequences]
        if len(self._rows) != len(sequences):
            raise DataError(
                f"the batch went from {len(self._rows)} to {len(sequences)} rows within one text: "
                "beam search cannot be aligned"
            )
        out = torch.full_like(scores, NEVER)
        for number, (row, sequence) in enumerate(zip(self._rows, sequences, strict=True)):
            new = sequence[len(prompt) :]
            if new and not row.over:
                self._advance(row, new)
            if row.over:
                out[number] = scores[number]  # `generate` overwrites what follows an end of text
                continue
            ids, values = self._values(row, scores[number], len(new))
            if len(ids) == 0 or values.max() == NEVER:
                out[number, sorted(self.ends)] = 0.0
                row.over = True
                continue
            out[number, torch.from_numpy(ids).to(out.device)] = torch.from_numpy(values).to(out)
        return out

    def _bind(self, sequences: list[list[int]]) -> None:
        binding = trie_binding(
            self._model,
            sequences[0],
            self.constraint,
            self.warp,
            self.max_new_tokens,
            self.ends,
        )
        self.trie.require(binding)
        self._prompt = sequences[0]

    def _advance(self, row: _Row, new: list[int]) -> None:
        """Follow the token that `generate` drew."""
        token = new[-1]
        if len(new) != row.n_tokens + 1:
            raise DataError("calls must follow each other token by token: use a new processor")
        row.n_tokens += 1
        known = row.ids is not None and row.log_p is not None and token in row.ids
        if token in self.ends or not known:
            row.over = True
        if not known:
            return
        assert row.ids is not None
        assert row.log_p is not None
        child = self.trie.add_child(row.nodes[-1], token, row.ids, row.log_p)
        if token in self.ends:
            self.trie.finish(child)
            return
        row.nodes.append(child)
        row.state = self.constraint.advance(row.state, token)

    def _values(self, row: _Row, scores: Tensor, n_tokens: int) -> tuple[Ids, LogProbs]:
        log_probs = self.warp.log_probs(scores)
        last = self.max_new_tokens is not None and n_tokens == self.max_new_tokens - 1
        last = last and self.align  # plain masking does not look ahead
        ids, log_cut = legal_ids(self.constraint, row.state, log_probs, self.ends, last=last)
        node = row.nodes[-1]
        row.ids, row.log_p = ids, log_probs[ids]
        values = log_probs[ids]
        self.trie.expand(node, ids, values, log_cut=log_cut)
        self.trie.update(row.nodes)
        if self.align:
            children, _, log_c = self.trie.children(node)
            drawn = [self.trie.token(int(child)) for child in children]
            values = values.copy()
            values[np.searchsorted(ids, drawn)] += log_c
        return ids, values


@dataclass
class _Row:
    """How far one row of a batch has come."""

    state: Any
    nodes: list[int]
    ids: Ids | None
    log_p: LogProbs | None
    n_tokens: int
    over: bool

    def __init__(self, state: Any) -> None:
        self.state, self.nodes = state, [0]
        self.ids = self.log_p = None
        self.n_tokens, self.over = 0, False
