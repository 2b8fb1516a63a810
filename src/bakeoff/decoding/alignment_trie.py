"""The trie behind grammar-aligned decoding: how much of each prefix's probability stays legal."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_path
from bakeoff.errors import DataError

Ids = NDArray[np.int64]
LogProbs = NDArray[np.float64]

NEVER = -np.inf
_UNEXPANDED, _EXPANDED, _FINISHED = 0, 1, 2
_FORMAT = "bakeoff-alignment-trie-1"
# Nodes with no more legal tokens than this keep them for good, and never need the model again.
_SMALL = 256


class ByteLRU:
    """A mapping that forgets what was used least recently once its values exceed a size in bytes.

    Parameters
    ----------
    max_bytes
        Most bytes in all; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Any) -> Any:
        """Return the value, which is now the one used last, or None."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Any, n_bytes: int) -> None:
        """Keep a value of the given size, at the cost of older ones."""
        if key in self._values:
            self.used -= self._values.pop(key)[1]
        self._values[key] = value, n_bytes
        self.used += n_bytes
        while self.used > self.max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self.used -= freed


class AlignmentTrie:
    r"""Upper bounds on the expected future grammaticality of all prefixes met so far.

    For a prefix u, ``c(u)`` is the probability that the finished text is legal given that it begins
    with u. The trie holds ``C(u) >= c(u)``: 1 for live prefixes that were not looked at, 1 for
    finished legal texts, and ``sum of P(v | u) C(u v)`` over legal tokens v elsewhere. Bounds only
    ever fall. At the root it bounds the probability ``Z`` of the whole language.

    Parameters
    ----------
    binding
        What the numbers are valid for, as short texts under short names (model, prompt, grammar,
        ...). Whoever uses the trie compares it; see `require`.

    Attributes
    ----------
    log_found
        Natural logarithm of the probability of all distinct finished texts so far: a lower bound
        on ``Z``.

    Notes
    -----
    A node costs about 150 bytes plus, where at most 256 tokens are legal, 16 bytes for each.
    Legal tokens that were never drawn share one number, their mass, which is summed anew and not
    subtracted from whenever one of them is drawn, so that tiny bounds stay accurate. Everything is
    in float64 logarithms.

    References
    ----------
    Kanghee Park, Jiayu Wang, Taylor Berg-Kirkpatrick, Nadia Polikarpova and Loris D'Antoni.
    "Grammar-Aligned Decoding". NeurIPS 2024. arXiv:2405.21047.

    Examples
    --------
    >>> trie = AlignmentTrie()
    >>> trie.expand(0, np.array([5, 7]), np.log([0.5, 0.25]))  # the rest, 0.25, is illegal
    >>> trie.update([0])
    >>> round(float(np.exp(trie.log_bound([]))), 6)
    0.75
    >>> child = trie.add_child(0, 5, np.array([5, 7]), np.log([0.5, 0.25]))
    >>> trie.expand(child, np.array([], dtype=np.int64), np.array([]))  # a dead end
    >>> trie.update([0, child])
    >>> round(float(np.exp(trie.log_z_upper)), 6)
    0.25
    """

    def __init__(self, binding: Mapping[str, str] | None = None) -> None:
        self.binding: dict[str, str] = dict(binding or {})
        self.log_found = NEVER
        self._parent = [-1]
        self._token = [-1]
        self._log_p = [0.0]  # of the token, given the parent
        self._log_c = [0.0]
        self._log_rest = [NEVER]  # of the legal tokens that are no children yet
        self._log_cut = [NEVER]  # of the legal tokens that the limit on tokens forbids
        self._status = [_UNEXPANDED]
        self._children: list[list[int]] = [[]]
        self._index: dict[tuple[int, int], int] = {}
        self._kept: dict[int, tuple[Ids, LogProbs]] = {}

    # Reading

    def __len__(self) -> int:
        return len(self._parent)

    def __repr__(self) -> str:
        return f"AlignmentTrie({len(self)} nodes, log Z <= {self.log_z_upper:.4g})"

    @property
    def log_z_upper(self) -> float:
        """Natural logarithm of the upper bound on the language's probability."""
        return self._log_c[0]

    def log_bound(self, tokens: Sequence[int]) -> float:
        """Return log C of a prefix; 0 where nothing is known, also of illegal ones never met."""
        node = 0
        for token in tokens:
            if self._status[node] == _FINISHED:
                return NEVER  # nothing follows an end of text
            child = self._index.get((node, int(token)))
            if child is None:
                if node in self._kept and int(token) not in self._kept[node][0]:
                    return NEVER
                return 0.0
            node = child
        return self._log_c[node]

    def child(self, node: int, token: int) -> int | None:
        """Return the node of `token` below `node`, if that was ever drawn."""
        return self._index.get((node, token))

    def children(self, node: int) -> tuple[Ids, LogProbs, LogProbs]:
        """Return the drawn tokens' nodes, their log-probabilities and their log-bounds."""
        nodes = self._children[node]
        return (
            np.array(nodes, dtype=np.int64),
            np.array([self._log_p[n] for n in nodes], dtype=np.float64),
            np.array([self._log_c[n] for n in nodes], dtype=np.float64),
        )

    def token(self, node: int) -> int:
        """Return the token that leads to a node."""
        return self._token[node]

    def edge(self, node: int) -> tuple[float, float]:
        """Return the log-probability of a node's token given its prefix, and the node's log C."""
        return self._log_p[node], self._log_c[node]

    def log_rest(self, node: int) -> float:
        """Return the log-mass of a node's legal tokens that were never drawn."""
        return self._log_rest[node]

    def log_cut(self, node: int) -> float:
        """Return the log-mass of a node's legal tokens that the limit on tokens forbids."""
        return self._log_cut[node]

    def is_expanded(self, node: int) -> bool:
        """Return whether the distribution after this prefix is known."""
        return self._status[node] != _UNEXPANDED

    def is_finished(self, node: int) -> bool:
        """Return whether the node is the end of a legal text."""
        return self._status[node] == _FINISHED

    def kept(self, node: int) -> tuple[Ids, LogProbs] | None:
        """Return a small node's legal tokens and their log-probabilities."""
        return self._kept.get(node)

    # Growing

    def expand(self, node: int, ids: Ids, log_probs: LogProbs, *, log_cut: float = NEVER) -> None:
        """Tell what may follow a prefix.

        Parameters
        ----------
        node
            The prefix; nothing happens if this is known already.
        ids
            int64 ``(k,)``, ascending: legal tokens, ends of text included, within the limit.
        log_probs
            float64 ``(k,)``: their natural log-probabilities under the model, before any mask.
        log_cut
            The log-mass of tokens that are legal but too late.
        """
        if self._status[node] != _UNEXPANDED:
            return
        if len(ids) <= _SMALL:
            self._kept[node] = ids, log_probs
        self._log_cut[node] = log_cut
        self._log_rest[node] = log_sum(log_probs)
        self._status[node] = _EXPANDED  # last, so that an interruption leaves true bounds

    def add_child(self, node: int, token: int, ids: Ids, log_probs: LogProbs) -> int:
        """Return the node of a legal token; `ids` and `log_probs` are as `expand` got them."""
        token = int(token)
        known = self._index.get((node, token))
        if known is not None:
            return known
        log_p = float(log_probs[int(np.searchsorted(ids, token))])
        child = len(self._parent)
        columns: list[tuple[list[Any], Any]] = [
            (self._token, token),
            (self._log_p, log_p),
            (self._log_c, 0.0),
            (self._log_rest, NEVER),
            (self._log_cut, NEVER),
            (self._status, _UNEXPANDED),
            (self._children, []),
            (self._parent, node),  # last: the node exists from here on
        ]
        for column, value in columns:
            del column[child:]  # what an interruption may have left there
            column.append(value)
        self._children[node].append(child)
        self._index[node, token] = child
        self._log_rest[node] = log_sum(log_probs[self.undrawn(node, ids)])
        return child

    def undrawn(self, node: int, ids: Ids) -> NDArray[np.bool_]:
        """Return bool ``(k,)``: which of a node's legal tokens have no node yet."""
        free = np.ones(len(ids), dtype=np.bool_)
        drawn = [self._token[child] for child in self._children[node]]
        free[np.searchsorted(ids, drawn)] = False
        return free

    def finish(self, node: int) -> None:
        """Mark a node as the end of a legal text."""
        if self._status[node] == _FINISHED:
            return
        self._status[node] = _FINISHED
        log_p, above = 0.0, node
        while above > 0:
            log_p += self._log_p[above]
            above = self._parent[above]
        self.log_found = float(np.logaddexp(self.log_found, log_p))

    def update(self, path: Sequence[int]) -> None:
        """Recompute the bounds of a path's nodes, given from the root downwards."""
        for node in reversed(path):
            if self._status[node] == _EXPANDED:
                _, log_p, log_c = self.children(node)
                bound = float(np.logaddexp(self._log_rest[node], log_sum(log_p + log_c)))
                # In exact arithmetic bounds never rise; in floating point they are kept from it.
                self._log_c[node] = min(self._log_c[node], bound)

    # Files

    def require(self, binding: Mapping[str, str]) -> None:
        """Bind an empty trie, or check that it is bound to the same.

        Raises
        ------
        DataError
            If it is bound to something else; names what differs.
        """
        if not self.binding and len(self) == 1 and self._status[0] == _UNEXPANDED:
            self.binding = dict(binding)
        wrong = [
            name
            for name in sorted({*binding, *self.binding})
            if binding.get(name) != self.binding.get(name)
        ]
        if wrong:
            raise DataError(
                f"trie belongs to another {', another '.join(wrong)}: its bounds are wrong here; "
                "begin with a new trie"
            )

    def save(self, path: str | Path) -> None:
        """Write the trie to a safetensors file.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        from safetensors.numpy import save_file

        n = len(self)  # an interruption may have made some columns longer
        sizes = np.array([len(self._kept.get(node, ((),))[0]) for node in range(n)])
        held = [self._kept[node] for node in sorted(self._kept)]
        arrays: dict[str, NDArray[Any]] = {
            "parent": np.array(self._parent, dtype=np.int64),
            "token": np.array(self._token[:n], dtype=np.int64),
            "log_p": np.array(self._log_p[:n]),
            "log_c": np.array(self._log_c[:n]),
            "log_rest": np.array(self._log_rest[:n]),
            "log_cut": np.array(self._log_cut[:n]),
            "status": np.array(self._status[:n], dtype=np.uint8),
            "n_legal": np.where([node in self._kept for node in range(n)], sizes, -1),
            "legal": np.concatenate([np.empty(0, dtype=np.int64), *(ids for ids, _ in held)]),
            "legal_log_p": np.concatenate([np.empty(0), *(values for _, values in held)]),
            "log_found": np.array([self.log_found]),
        }
        with atomic_path(Path(path)) as temporary:
            save_file(
                arrays,
                temporary,
                metadata={"format": _FORMAT, "binding": json.dumps(self.binding)},
            )

    @classmethod
    def load(cls, path: str | Path) -> AlignmentTrie:
        """Read a trie that `save` wrote.

        Raises
        ------
        DataError
            If the file is not such a trie, or is damaged.
        OSError
            If it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as stream:
                metadata = stream.metadata() or {}
                arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DataError(f"{path} is no safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise DataError(
                f"{path} is no alignment trie of this version: its format is "
                f"{metadata.get('format')!r}, not {_FORMAT!r}"
            )
        trie = cls()
        try:
            trie._fill(arrays, json.loads(metadata["binding"]))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error
        return trie

    def _fill(self, arrays: Mapping[str, NDArray[Any]], binding: dict[str, str]) -> None:
        self.binding = binding
        self.log_found = float(arrays["log_found"][0])
        self._parent = arrays["parent"].tolist()
        n = len(self._parent)
        self._token = arrays["token"].tolist()
        self._log_p = arrays["log_p"].tolist()
        self._log_c = arrays["log_c"].tolist()
        self._log_rest = arrays["log_rest"].tolist()
        self._log_cut = arrays["log_cut"].tolist()
        self._status = arrays["status"].tolist()
        n_legal = arrays["n_legal"]
        columns = (self._token, self._log_p, self._log_c, self._log_rest, self._log_cut)
        if n == 0 or any(len(c) != n for c in (*columns, self._status, n_legal)):
            raise ValueError("columns of unequal length")
        self._children = [[] for _ in range(n)]
        self._index = {}
        for node in range(1, n):
            parent = self._parent[node]
            if not 0 <= parent < node:
                raise ValueError(f"node {node} lies below node {parent}")
            self._children[parent].append(node)
            self._index[parent, self._token[node]] = node
        ends = np.cumsum(np.maximum(n_legal, 0))
        if ends[-1] != len(arrays["legal"]) or ends[-1] != len(arrays["legal_log_p"]):
            raise ValueError("legal tokens are missing")
        self._kept = {
            node: (
                arrays["legal"][ends[node] - n_legal[node] : ends[node]],
                arrays["legal_log_p"][ends[node] - n_legal[node] : ends[node]],
            )
            for node in np.flatnonzero(n_legal >= 0).tolist()
        }


def log_sum(values: LogProbs) -> float:
    """Return the logarithm of the sum of exponentials; minus infinity of nothing."""
    if len(values) == 0:
        return NEVER
    highest = float(values.max())
    if highest == NEVER:
        return NEVER
    return highest + float(np.log(np.exp(values - highest).sum()))
