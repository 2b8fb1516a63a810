"""A finite language of tokens, whole: what every sampler does on it, computed instead of drawn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_path
from bakeoff.decoding.alignment_trie import NEVER, AlignmentTrie, ByteLRU, Ids, LogProbs, log_sum
from bakeoff.decoding.grammar import TokenConstraint
from bakeoff.decoding.grammar_aligned import TrieWalker, Warping, states_can_be_cut
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.int64]

# Values of the widest logits held at once: 128 MiB of float32.
_LOGITS = 2**25
_MOST_ROWS = 32


class LanguageTree:
    """Every legal beginning of a finite language, with the model's probabilities.

    Nodes stand in order of their depth, a node's children side by side and ascending by token; 0 is
    the empty text. A leaf is a legal text, that is, an end of text after a legal prefix. Made by
    `of`, which finds the nodes, and `score`, which asks the model.

    Parameters
    ----------
    parent, token
        int64 ``(N,)``; -1 at the root.
    is_text
        bool ``(N,)``: whether the node is the end of a legal text.
    max_new_tokens
        Most tokens of a text, its end included. Prefixes that do not end by then are in the tree.
    log_p
        float64 ``(N,)``: log-probability of a node's token given its prefix.
    log_cut
        float64 ``(N,)``: log-mass of what the limit on tokens forbids after a node.

    Notes
    -----
    A tree is also a `bakeoff.decoding.grammar.TokenConstraint` as far as `TreeWalker` needs one:
    its states are nodes.
    """

    def __init__(
        self,
        parent: Ints,
        token: Ints,
        is_text: NDArray[np.bool_],
        max_new_tokens: int,
        log_p: LogProbs | None = None,
        log_cut: LogProbs | None = None,
    ) -> None:
        n = len(parent)
        self.parent, self.token, self.is_text = parent, token, is_text
        self.max_new_tokens = max_new_tokens
        self.log_p = np.full(n, np.nan) if log_p is None else log_p
        self.log_cut = np.full(n, NEVER) if log_cut is None else log_cut
        self.n_children = np.bincount(parent[1:], minlength=n)
        self.first_child = 1 + np.cumsum(self.n_children) - self.n_children
        self.leaves = np.flatnonzero(is_text)
        depth = np.zeros(n, dtype=np.int64)
        levels = [np.array([0], dtype=np.int64)]
        while True:
            below = _children_of(levels[-1], self.first_child, self.n_children)
            if not len(below):
                break
            depth[below] = len(levels)
            levels.append(below)
        self.depth, self._levels = depth, levels
        self._parents = np.flatnonzero(self.n_children)
        # Legal continuations that come too late, by node; needed until `score` was called.
        self._late: dict[int, Ints] = {}

    def __len__(self) -> int:
        return len(self.parent)

    # Making

    @classmethod
    def of(
        cls,
        constraint: TokenConstraint,
        ends: Sequence[int],
        *,
        max_new_tokens: int,
        max_prefixes: int,
    ) -> LanguageTree | None:
        """Find all legal beginnings, without the model.

        Parameters
        ----------
        constraint
            The language.
        ends
            End-of-text tokens.
        max_new_tokens
            Most tokens, the end of text included.
        max_prefixes
            Give up beyond so many prefixes after which the model would have to be read.

        Returns
        -------
        LanguageTree or None
            None if there are more prefixes.

        Raises
        ------
        DataError
            If no text ends within the limit.
        """
        end_ids = np.array(sorted(ends), dtype=np.int64)
        parent, token, is_text = [-1], [-1], [False]
        late: dict[int, Ints] = {}
        level: list[tuple[int, Any]] = [(0, constraint.start())]
        n_prefixes = 0
        for depth in range(max_new_tokens):
            below: list[tuple[int, Any]] = []
            for node, state in level:
                n_prefixes += 1
                mask = np.array(constraint.legal(state), dtype=np.bool_)
                mask[end_ids] = False
                following = np.flatnonzero(mask)
                if depth == max_new_tokens - 1:
                    late[node] = following
                    following = following[:0]
                if n_prefixes + len(below) + len(following) > max_prefixes:
                    return None
                closing = end_ids if constraint.may_end(state) else end_ids[:0]
                for each in np.sort(np.concatenate([following, closing])).tolist():
                    is_end = each in ends
                    if not is_end:
                        below.append((len(parent), constraint.advance(state, each)))
                    parent.append(node)
                    token.append(each)
                    is_text.append(is_end)
            level = below
        if not any(is_text):
            raise DataError(
                f"no text of the grammar ends within max_new_tokens={max_new_tokens}: all its "
                f"{n_prefixes} beginnings were tried"
            )
        tree = cls(np.array(parent), np.array(token), np.array(is_text), max_new_tokens)
        tree._late = late
        return tree

    def score(
        self,
        model: Any,
        prompt_ids: Sequence[int],
        warp: Warping,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Ask a model, in eval mode, for the probabilities after every prefix.

        Raises
        ------
        DataError
            If no text has a probability above 0.
        """
        import torch

        read = np.zeros(len(self), dtype=np.bool_)
        inner = np.flatnonzero(~self.is_text)
        done = 0
        # Prefixes that no other prefix goes on from: reading them reads all of them.
        above = np.zeros(len(self), dtype=np.bool_)
        above[self.parent[inner[1:]]] = True
        ends = [int(node) for node in inner if not above[node]]
        with torch.inference_mode():
            for nodes, logits in self._read(model, list(prompt_ids), ends):
                for node, values in zip(nodes, logits, strict=True):
                    if not read[node]:
                        read[node] = True
                        self._take(node, warp.log_probs(values))
                        done += 1
                if progress is not None:
                    progress(done, len(inner))
        self._late = {}
        if self.log_z == NEVER:
            raise DataError("no text of the grammar has a probability above 0 under the model")

    def _read(
        self, model: Any, prompt_ids: list[int], ends: list[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the prefixes on the way to each of `ends`, with the logits after them.

        The prompt is read once, where states can be cut; tokens that pad stand to the right, where
        nothing that counts can see them.
        """
        import torch
        from transformers import DynamicCache

        cached = states_can_be_cut(model)
        states = DynamicCache() if cached else None
        extra: dict[str, Any] = {"past_key_values": states} if cached else {}
        whole = torch.tensor([prompt_ids], device=model.device)
        first = model(input_ids=whole, use_cache=cached, **extra).logits[0, -1:]
        yield [0], first
        paths = sorted((self.path(node) for node in ends if node), key=len)
        n_before = 0 if cached else len(prompt_ids)
        while paths:
            # From the longest down, so that the first batch is the one that needs most memory.
            width = len(paths[-1]) - 1
            n_rows = _LOGITS // ((n_before + width) * first.shape[-1])
            n_rows = max(1, min(_MOST_ROWS, n_rows, len(paths)))
            rows, paths = paths[-n_rows:], paths[:-n_rows]
            given = torch.zeros(n_rows, n_before + width, dtype=torch.long, device=model.device)
            given[:, :n_before] = whole[:, :n_before]
            for number, path in enumerate(rows):
                tokens = torch.from_numpy(self.token[path[1:]]).to(given.device)
                given[number, n_before : n_before + len(tokens)] = tokens
            if cached:
                repeated = copy.deepcopy(states)
                assert repeated is not None
                repeated.batch_repeat_interleave(n_rows)
                extra = {"past_key_values": repeated}
            logits = model(input_ids=given, use_cache=cached, **extra).logits[:, n_before:]
            for number, path in enumerate(rows):
                yield path[1:], logits[number, : len(path) - 1]

    def _take(self, node: int, log_probs: LogProbs) -> None:
        children = self.children(node)
        self.log_p[children] = log_probs[self.token[children]]
        if node in self._late:
            self.log_cut[node] = log_sum(log_probs[self._late[node]])

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to a node."""
        found = [node]
        while found[-1]:
            found.append(int(self.parent[found[-1]]))
        return found[::-1]

    def children(self, node: int) -> slice:
        """Return where a node's children stand."""
        first = int(self.first_child[node])
        return slice(first, first + int(self.n_children[node]))

    def child(self, node: int, token: int) -> int:
        """Return the node of a legal token below a node."""
        within = self.children(node)
        place = within.start + int(np.searchsorted(self.token[within], token))
        if place >= within.stop or int(self.token[place]) != token:
            raise DataError(f"token {token} is not legal here")
        return int(place)

    # Standing in for a grammar

    def start(self) -> int:
        """Return the root."""
        return 0

    def advance(self, state: int, token: int) -> int:
        """Return the node after a legal token."""
        return self.child(state, token)

    # Distributions over the legal texts, as float64 ``(n_leaves,)`` logarithms

    @property
    def log_probs(self) -> LogProbs:
        """Log P of every legal text."""
        nothing = np.zeros(len(self))
        return self._products(self.log_p, nothing)[self.leaves]

    @property
    def log_z(self) -> float:
        """Log of the probability that the model's text is legal."""
        return log_sum(self.log_probs)

    def target(self) -> LogProbs:
        """Return log Q: the model's distribution, given that the text is legal."""
        return self._given_legal(self.log_p, np.zeros(len(self)))

    def masked(self) -> LogProbs:
        """Return what masking illegal tokens step by step samples, of what it finishes in time."""
        legal = np.logaddexp(self._sums(self.log_p), self.log_cut)
        return self._given_legal(self.log_p, legal)

    def aligned(self, log_bounds: LogProbs) -> LogProbs:
        """Return what ASAp's next text is drawn from.

        Parameters
        ----------
        log_bounds
            float64 ``(N,)``: log C of every node, 0 where nothing is known.
        """
        edges = self.log_p + log_bounds
        return self._given_legal(edges, self._sums(edges))

    def adaptive(self, log_bounds: LogProbs, seen: NDArray[np.bool_]) -> LogProbs:
        """Return what an accepted text of adaptive rejection is drawn from: Q, if all is right.

        Parameters
        ----------
        log_bounds
            As for `aligned`.
        seen
            bool ``(N,)``: prefixes that were looked at before.
        """
        edges = self.log_p + log_bounds
        return self._given_legal(edges, np.where(seen, self._sums(edges), 0.0))

    def divergence(self, log_q: LogProbs) -> float:
        """Return the Kullback-Leibler divergence of a distribution from the target, in nats."""
        there = log_q > NEVER
        gaps = log_q[there] - self.target()[there]
        return max(float((np.exp(log_q[there]) * gaps).sum()), 0.0)  # rounding can fall below 0

    def total_variation(self, log_q: LogProbs) -> float:
        """Return half the sum of absolute differences from the target."""
        return float(0.5 * np.abs(np.exp(log_q) - np.exp(self.target())).sum())

    def mean_log_prob(self, log_q: LogProbs) -> float:
        """Return the mean of log P under a distribution."""
        there = log_q > NEVER
        return float((np.exp(log_q[there]) * self.log_probs[there]).sum())

    def leaf(self, tokens: Sequence[int]) -> int:
        """Return the place, among the leaves, of a legal text with its end."""
        node = 0
        for token in tokens:
            node = self.child(node, token)
        return int(np.searchsorted(self.leaves, node))

    def _given_legal(self, edges: LogProbs, denominators: LogProbs) -> LogProbs:
        logs = self._products(edges, denominators)[self.leaves]
        return np.asarray(logs - log_sum(logs), dtype=np.float64)

    def _products(self, edges: LogProbs, denominators: LogProbs) -> LogProbs:
        """Return the sum of edge - denominator along the path to every node."""
        logs = np.zeros(len(self))
        for level in self._levels[1:]:
            above = self.parent[level]
            below = denominators[above]
            step = np.where(below > NEVER, edges[level] - np.where(below > NEVER, below, 0), NEVER)
            logs[level] = logs[above] + step
        return logs

    def _sums(self, edges: LogProbs) -> LogProbs:
        """Return the log-sum of the children's values, minus infinity of none."""
        starts = self.first_child[self._parents] - 1
        highest = np.maximum.reduceat(edges[1:], starts)
        highest = np.where(highest > NEVER, highest, 0.0)
        shifted = np.exp(edges[1:] - np.repeat(highest, self.n_children[self._parents]))
        sums = np.full(len(self), NEVER)
        with np.errstate(divide="ignore"):
            sums[self._parents] = highest + np.log(np.add.reduceat(shifted, starts))
        return sums

    # Files

    def save(self, path: Path) -> None:
        """Write a scored tree to a safetensors file, atomically."""
        from safetensors.numpy import save_file

        arrays: dict[str, NDArray[Any]] = {
            "parent": self.parent,
            "token": self.token,
            "is_text": self.is_text.astype(np.uint8),
            "max_new_tokens": np.array([self.max_new_tokens]),
            "log_p": self.log_p,
            "log_cut": self.log_cut,
        }
        with atomic_path(path) as temporary:
            save_file(arrays, temporary)

    @classmethod
    def load(cls, path: Path) -> LanguageTree:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        arrays = load_file(path)
        return cls(
            arrays["parent"],
            arrays["token"],
            arrays["is_text"].astype(np.bool_),
            int(arrays["max_new_tokens"][0]),
            arrays["log_p"],
            arrays["log_cut"],
        )


class TreeBounds:
    """What a trie has learnt, by the nodes of the whole tree.

    Attributes
    ----------
    log_bounds
        float64 ``(N,)``: log C, 0 where nothing is known.
    seen
        bool ``(N,)``: prefixes after which the model was read.
    """

    def __init__(self, tree: LanguageTree) -> None:
        self.tree = tree
        self.log_bounds = np.zeros(len(tree))
        self.seen = np.zeros(len(tree), dtype=np.bool_)

    def follow(self, trie: AlignmentTrie, tokens: Sequence[int]) -> None:
        """Take over what changed along the path of an attempt."""
        in_trie: int | None = 0
        node = 0
        for token in [*tokens, -1]:
            assert in_trie is not None
            self.log_bounds[node] = trie.edge(in_trie)[1]
            self.seen[node] = trie.is_expanded(in_trie) and not trie.is_finished(in_trie)
            if token < 0:
                return
            in_trie, node = trie.child(in_trie, token), self.tree.child(node, token)


class _NoModel:
    """Counts what would have been read."""

    def __init__(self) -> None:
        self.n_calls = self.n_tokens = 0
        self.cache = ByteLRU(2**26)


class TreeWalker(TrieWalker):
    """Draws attempts as `TrieWalker` does, with a scored tree in the place of grammar and model.

    ``reader.n_calls`` counts the calls that the model would have had.
    """

    def __init__(self, tree: LanguageTree, trie: AlignmentTrie, random: np.random.Generator):
        stand_in: Any = tree
        nobody: Any = _NoModel()
        super().__init__(
            constraint=stand_in,
            trie=trie,
            reader=nobody,
            warp=Warping(),
            ends=frozenset(tree.token[tree.leaves].tolist()),
            max_new_tokens=tree.max_new_tokens,
            random=random,
        )
        self._tree = tree

    def look(self, state: Any, tokens: list[int], nodes: list[int]) -> tuple[Ids, LogProbs, float]:
        """Return the legal tokens after a prefix, their log-probabilities and what is cut off."""
        self.reader.n_calls += 1
        within = self._tree.children(int(state))
        ids, log_p = self._tree.token[within], self._tree.log_p[within]
        possible = log_p > NEVER
        return ids[possible], log_p[possible], float(self._tree.log_cut[state])


def _children_of(nodes: Ints, first_child: Ints, n_children: Ints) -> Ints:
    parts = [np.arange(first_child[n], first_child[n] + n_children[n]) for n in nodes]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
