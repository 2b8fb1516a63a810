"""Serving experts whose use is known ahead: batches, caches, prefetching, and what they are worth.

A model of `read_me` says which expert every token needs before it runs. Here is what that allows:
`ExpertBatcher` puts tokens of one expert together, `BeladyCache` keeps the experts that are needed
soonest, and layer l + 1's experts are read while layer l computes. `simulate_serving` replays
requests with measured costs; `ServingEngine` does the real thing, with experts on disk.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff._files import atomic_path, write_text
from bakeoff.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from bakeoff.experts.read_me import PackedExperts, ReadMeForCausalLM, RouterCache

Order = Literal["arrival", "prefill-first", "decode-first"]
ORDERS: tuple[Order, ...] = ("arrival", "prefill-first", "decode-first")


# Caches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheTrace:
    """What a cache did with a sequence of requests.

    Parameters
    ----------
    capacity
        Experts that it holds.
    hits
        For each request, whether the expert was there.
    evicted
        For each request, the expert that had to go, -1 for none.
    """

    capacity: int
    hits: NDArray[np.bool_]
    evicted: NDArray[np.int64]

    @property
    def n_hits(self) -> int:
        """Number of requests that found their expert."""
        return int(self.hits.sum())

    @property
    def n_misses(self) -> int:
        """Number of requests for which an expert had to be read."""
        return int(len(self.hits) - self.hits.sum())

    @property
    def hit_rate(self) -> float:
        """Share of hits; NaN for an empty trace."""
        return self.n_hits / len(self.hits) if len(self.hits) else float("nan")


class ExpertCache(ABC):
    """A cache of a few experts; subclasses say which one goes.

    Parameters
    ----------
    capacity
        Experts that it holds.

    Raises
    ------
    bakeoff.errors.DataError
        If `capacity` is below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise DataError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        # From the least to the most recently used.
        self._held: OrderedDict[int, None] = OrderedDict()

    @property
    def held(self) -> frozenset[int]:
        """The experts in the cache."""
        return frozenset(self._held)

    def reset(self) -> None:
        """Forget everything."""
        self._held.clear()

    def forget(self, expert: int) -> None:
        """Take an expert out, such as one that could not be read; one not there is no error."""
        self._held.pop(expert, None)

    def request(
        self, expert: int, future: Sequence[int] = (), pinned: Collection[int] = ()
    ) -> tuple[bool, int]:
        """Make room for an expert if it is not there.

        Parameters
        ----------
        expert
            Which one is needed.
        future
            Requests known to follow, soonest first; only `BeladyCache` looks.
        pinned
            Experts that must stay.

        Returns
        -------
        (bool, int)
            Whether it was there, and the expert that went (-1 for none).

        Raises
        ------
        bakeoff.errors.DataError
            If there is no room because all are pinned.
        """
        if expert in self._held:
            self._held.move_to_end(expert)
            return True, -1
        gone = -1
        if len(self._held) >= self.capacity:
            candidates = [held for held in self._held if held not in pinned]
            if not candidates:
                raise DataError(f"all {self.capacity} experts in the cache are pinned")
            gone = self._victim(candidates, future)
            del self._held[gone]
        self._held[expert] = None
        return False, gone

    def simulate(self, trace: ArrayLike) -> CacheTrace:
        """Start empty and serve a whole sequence of requests.

        Parameters
        ----------
        trace
            Expert ids, ``(n,)`` integers.

        Returns
        -------
        CacheTrace

        Raises
        ------
        bakeoff.errors.DataError
            If `trace` is not one-dimensional integers.
        """
        self.reset()
        results = [
            self.request(expert, future)
            for expert, future in self._with_future(_expert_ids(trace, "trace").tolist())
        ]
        return CacheTrace(
            self.capacity,
            np.array([hit for hit, _ in results], dtype=np.bool_),
            np.array([gone for _, gone in results], dtype=np.int64),
        )

    def _with_future(self, trace: list[int]) -> Iterable[tuple[int, Sequence[int]]]:
        return ((expert, ()) for expert in trace)

    @abstractmethod
    def _victim(self, candidates: list[int], future: Sequence[int]) -> int:
        """Choose among `candidates`, which come from the least recently used on."""


class LRUCache(ExpertCache):
    """Evict the expert that was used longest ago.

    Examples
    --------
    >>> LRUCache(2).simulate([0, 1, 2, 0, 1, 2]).n_hits
    0
    """

    def _victim(self, candidates: list[int], future: Sequence[int]) -> int:
        return candidates[0]


class RandomCache(ExpertCache):
    """Evict any expert.

    Parameters
    ----------
    capacity
        Experts that it holds.
    seed
        Of the choices; `reset` starts them anew.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity)
        self.seed = seed
        self._rng = np.random.default_rng(seed)

    def reset(self) -> None:
        """Forget everything, and start the choices anew."""
        super().reset()
        self._rng = np.random.default_rng(self.seed)

    def _victim(self, candidates: list[int], future: Sequence[int]) -> int:
        # Sorted, so that the choice does not depend on the order of use.
        ordered = sorted(candidates)
        return ordered[int(self._rng.integers(len(ordered)))]


class BeladyCache(ExpertCache):
    """Evict the expert whose next use is furthest away: no cache has fewer misses.

    It needs the future, which routing ahead of the model knows in part.

    Parameters
    ----------
    capacity
        Experts that it holds.
    horizon
        How many coming requests it knows in `simulate`; None for all. Of experts without a use
        within the horizon the least recently used goes, so that a horizon of 0 is `LRUCache`.

    Raises
    ------
    bakeoff.errors.DataError
        If `capacity` is below 1 or `horizon` below 0.

    References
    ----------
    L. A. Belady. "A study of replacement algorithms for a virtual-storage computer". IBM Systems
    Journal 5 (2), 1966. Read-ME (arXiv:2410.19123), section 5, for experts.

    Examples
    --------
    >>> BeladyCache(2).simulate([0, 1, 2, 0, 1, 2]).n_hits
    2
    """

    def __init__(self, capacity: int, horizon: int | None = None) -> None:
        super().__init__(capacity)
        if horizon is not None and horizon < 0:
            raise DataError(f"horizon must be at least 0, got {horizon}")
        self.horizon = horizon

    def _with_future(self, trace: list[int]) -> Iterable[tuple[int, Sequence[int]]]:
        # The order of next uses is all that matters: each expert's soonest, not the whole rest.
        places: dict[int, deque[int]] = {}
        for place, expert in enumerate(trace):
            places.setdefault(expert, deque()).append(place)
        for place, expert in enumerate(trace):
            places[expert].popleft()
            end = len(trace) if self.horizon is None else place + 1 + self.horizon
            known = [(uses[0], other) for other, uses in places.items() if uses and uses[0] < end]
            yield expert, [other for _, other in sorted(known)]

    def _victim(self, candidates: list[int], future: Sequence[int]) -> int:
        left: dict[int, None] = dict.fromkeys(candidates)
        for expert in future:
            if len(left) == 1:
                break
            left.pop(expert, None)
        return next(iter(left))


def _expert_ids(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(f"{name} must be (n,) integers, got {array.shape} {array.dtype}")
    if array.size and array.min() < 0:
        raise DataError(f"{name} must be expert ids of 0 and more, got {array.min()}")
    return array.astype(np.int64)


# Batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one request that go to one expert.

    Parameters
    ----------
    request
        The request's name.
    start, stop
        Positions in the request's text.
    expert
        Where they go.
    """

    request: Hashable
    start: int
    stop: int
    expert: int


@dataclass(frozen=True)
class Batch:
    """What runs together; a request's pieces are in order."""

    pieces: tuple[Piece, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that are needed, each once, in ascending order."""
        return tuple(sorted({piece.expert for piece in self.pieces}))


@dataclass
class _Waiting:
    """A request's tokens that are yet to run, as runs of one expert: [expert, number of tokens]."""

    runs: deque[list[int]] = field(default_factory=deque)
    position: int = 0
    prefill: bool = True
    served: int = 0  # the batch in which it last made progress, or arrived

    def copy(self) -> _Waiting:
        return _Waiting(
            deque([*run] for run in self.runs), self.position, self.prefill, self.served
        )


class Batcher(ABC):
    """Keep the tokens that wait and say which run next.

    Parameters
    ----------
    max_tokens
        Most tokens of a batch.

    Raises
    ------
    bakeoff.errors.DataError
        If `max_tokens` is below 1.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise DataError(f"max_tokens must be at least 1, got {max_tokens}")
        self.max_tokens = max_tokens
        self._waiting: dict[Hashable, _Waiting] = {}  # in order of arrival
        self._n_batches = 0

    @property
    def n_pending(self) -> int:
        """Tokens that wait."""
        return sum(run[1] for waiting in self._waiting.values() for run in waiting.runs)

    @property
    def is_empty(self) -> bool:
        """Whether no request is known."""
        return not self._waiting

    def add(self, request: Hashable, expert_ids: ArrayLike) -> None:
        """Queue tokens: a new request's prompt, or what a known request generated.

        Parameters
        ----------
        request
            Any name; new to the batcher, or one whose tokens are to follow those given before.
        expert_ids
            ``(n,)`` integers, n at least 1: the expert of each token, as `RoutePlan.of` gives them.

        Raises
        ------
        bakeoff.errors.DataError
            If `expert_ids` is empty or not integers of 0 and more.
        """
        ids = _expert_ids(expert_ids, "expert_ids").tolist()
        if not ids:
            raise DataError(f"expert_ids of request {request!r} are empty")
        waiting = self._waiting.get(request)
        if waiting is None:
            waiting = self._waiting[request] = _Waiting(served=self._n_batches)
        elif not waiting.runs:
            waiting.prefill = False
            waiting.served = self._n_batches
        for expert in ids:
            if waiting.runs and waiting.runs[-1][0] == expert:
                waiting.runs[-1][1] += 1
            else:
                waiting.runs.append([expert, 1])

    def finish(self, request: Hashable) -> None:
        """Forget a request; one that is not known is no error."""
        self._waiting.pop(request, None)

    def next_batch(self) -> Batch | None:
        """Take the next batch out of the queues; None if nothing waits."""
        if not any(waiting.runs for waiting in self._waiting.values()):
            return None
        pieces = self._choose()
        self._n_batches += 1
        for piece in pieces:
            self._waiting[piece.request].served = self._n_batches
        return Batch(tuple(pieces))

    def preview(self, n_batches: int) -> list[Batch]:
        """Return the batches that would come if nothing else were added; takes nothing out."""
        held, count = self._waiting, self._n_batches
        self._waiting = {request: waiting.copy() for request, waiting in held.items()}
        try:
            found: list[Batch] = []
            while len(found) < n_batches and (batch := self.next_batch()) is not None:
                found.append(batch)
            return found
        finally:
            self._waiting, self._n_batches = held, count

    def _take(self, request: Hashable, budget: int) -> Piece:
        """Take up to `budget` tokens of a request's first run."""
        waiting = self._waiting[request]
        run = waiting.runs[0]
        n = min(run[1], budget)
        piece = Piece(request, waiting.position, waiting.position + n, run[0])
        waiting.position += n
        run[1] -= n
        if run[1] == 0:
            waiting.runs.popleft()
        return piece

    @abstractmethod
    def _choose(self) -> list[Piece]:
        """Take a batch; at least one token waits."""


class ExpertBatcher(Batcher):
    """Batch tokens of few experts: whole queues, the longest first.

    Every request stands in the queue of the expert of its next token, with the run of tokens that
    go there. A batch takes the queue with the most tokens, and then what its requests bring to
    queues of experts that the batch has already; then the next longest queue; and so on until a
    queue does not fit, of which it takes what fits.

    Parameters
    ----------
    max_tokens
        Most tokens of a batch.
    max_wait
        A request that went without progress for so many batches goes first; None for never, as
        published, where a request for a rare expert may wait long while others keep coming.

    Raises
    ------
    bakeoff.errors.DataError
        If a number is below 1.

    References
    ----------
    Read-ME (arXiv:2410.19123), algorithm 1.

    Examples
    --------
    >>> batcher = ExpertBatcher(max_tokens=5)
    >>> for name, plan in {"a": [0, 0, 1], "b": [1, 1, 1], "c": [1, 0]}.items():
    ...     batcher.add(name, plan)
    >>> [(piece.request, piece.expert, piece.stop - piece.start)
    ...  for piece in batcher.next_batch().pieces]
    [('b', 1, 3), ('c', 1, 1), ('a', 0, 1)]
    """

    def __init__(self, max_tokens: int, *, max_wait: int | None = None) -> None:
        super().__init__(max_tokens)
        if max_wait is not None and max_wait < 1:
            raise DataError(f"max_wait must be at least 1, got {max_wait}")
        self.max_wait = max_wait

    def _choose(self) -> list[Piece]:
        budget = self.max_tokens
        pieces: list[Piece] = []
        # Queues by expert: request -> tokens of its first run, in order of arrival.
        queues: dict[int, dict[Hashable, int]] = {}
        for request, waiting in self._waiting.items():
            if waiting.runs:
                queues.setdefault(waiting.runs[0][0], {})[request] = waiting.runs[0][1]

        def take(expert: int, requests: Sequence[Hashable]) -> None:
            nonlocal budget
            for request in requests:
                if budget == 0:
                    return
                piece = self._take(request, budget)
                pieces.append(piece)
                budget -= piece.stop - piece.start
                del queues[expert][request]
                runs = self._waiting[request].runs
                if runs:
                    queues.setdefault(runs[0][0], {})[request] = runs[0][1]
            if not queues[expert]:
                del queues[expert]

        inside: dict[int, None] = {}
        for request in self._overdue():
            expert = self._waiting[request].runs[0][0]
            take(expert, [request])
            inside[expert] = None
        while budget and queues:
            # Experts in the batch cost nothing more: what has come to their queues goes along.
            again = next((expert for expert in inside if expert in queues), None)
            longest = max(queues, key=lambda e: (sum(queues[e].values()), -e))
            expert = longest if again is None else again
            take(expert, list(queues[expert]))
            inside[expert] = None
        return pieces

    def _overdue(self) -> list[Hashable]:
        if self.max_wait is None:
            return []
        late = [
            (waiting.served, request)
            for request, waiting in self._waiting.items()
            if waiting.runs and self._n_batches - waiting.served >= self.max_wait
        ]
        late.sort(key=lambda entry: entry[0])  # stable: of equals, the first to arrive
        chosen, budget = [], self.max_tokens
        for _, request in late:
            if budget <= 0:
                break
            chosen.append(request)
            budget -= self._waiting[request].runs[0][1]
        return chosen


class ArrivalBatcher(Batcher):
    """Batch tokens without looking at experts: what servers without routes do.

    Parameters
    ----------
    max_tokens
        Most tokens of a batch.
    order
        ``"arrival"``: the oldest request first. ``"prefill-first"``: prompts, alone, while there
        are any. ``"decode-first"``: every request that generates, then prompts in the room left.
        Prompts are cut where they do not fit.

    Raises
    ------
    bakeoff.errors.DataError
        If `max_tokens` is below 1 or `order` unknown.
    """

    def __init__(self, max_tokens: int, *, order: Order = "arrival") -> None:
        super().__init__(max_tokens)
        if order not in ORDERS:
            raise DataError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self.order = order

    def _choose(self) -> list[Piece]:
        ready = [request for request, waiting in self._waiting.items() if waiting.runs]
        prompts = [request for request in ready if self._waiting[request].prefill]
        if self.order == "prefill-first" and prompts:
            ready = prompts
        elif self.order == "decode-first":
            ready = [request for request in ready if not self._waiting[request].prefill] + prompts
        budget, pieces = self.max_tokens, []
        for request in ready:
            while budget and self._waiting[request].runs:
                pieces.append(self._take(request, budget))
                budget -= pieces[-1].stop - pieces[-1].start
        return pieces


# Simulation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServingRequest:
    """A request to replay.

    Parameters
    ----------
    arrival
        Seconds from the start.
    prompt
        ``(P,)`` integers, P at least 1: the expert of each token of the prompt.
    output
        ``(G,)`` integers, G at least 1: the expert of each generated token. Each is known once the
        token before has run; the last one never runs.
    """

    arrival: float
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]


@dataclass(frozen=True)
class ServingCosts:
    """What a batch costs, in seconds.

    A layer takes ``base + per_token * tokens + per_expert * experts``, and reading one expert of
    one layer takes ``load``.

    Parameters
    ----------
    n_layers
        Layers.
    base, per_token, per_expert
        Of one layer.
    load
        Of one expert of one layer.
    router_per_token
        Of routing a token.
    """

    n_layers: int
    base: float
    per_token: float
    per_expert: float
    load: float
    router_per_token: float = 0.0

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise DataError(f"n_layers must be at least 1, got {self.n_layers}")
        for name in ("base", "per_token", "per_expert", "load", "router_per_token"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise DataError(f"{name} must be a number of seconds of 0 or more, got {value}")

    def batch_seconds(self, n_tokens: int, n_experts: int, n_misses: int, prefetch: bool) -> float:
        """Return how long a batch takes whose every layer misses `n_misses` experts.

        With `prefetch`, a layer's experts are read while the layer before computes; the first
        layer's are waited for.
        """
        compute = self.base + self.per_token * n_tokens + self.per_expert * n_experts
        load = self.load * n_misses
        if not prefetch:
            return self.n_layers * (compute + load)
        # Reading layer l starts when layer l - 1 begins to compute and layer l - 1 has been read.
        return load + (self.n_layers - 1) * max(compute, load) + compute


@dataclass(frozen=True)
class ServingReport:
    """How requests fared.

    Parameters
    ----------
    latency
        ``(n,)`` seconds from arrival to the last token.
    first_token
        ``(n,)`` seconds from arrival to the first token.
    experts_per_batch
        ``(batches,)`` experts that each batch needed.
    tokens_per_batch
        ``(batches,)``.
    hits, misses
        Requests to the expert caches, of all layers.
    seconds
        From the start to the last token.
    trace
        The experts in the order in which a layer asked its cache for them.
    outputs
        Generated token ids of each request, from a real engine only.
    """

    latency: NDArray[np.float64]
    first_token: NDArray[np.float64]
    experts_per_batch: NDArray[np.int64]
    tokens_per_batch: NDArray[np.int64]
    hits: int
    misses: int
    seconds: float
    trace: NDArray[np.int64]
    outputs: tuple[tuple[int, ...], ...] = ()

    @property
    def hit_rate(self) -> float:
        """Share of hits; NaN if no cache was asked."""
        total = self.hits + self.misses
        return self.hits / total if total else float("nan")

    def summary(self) -> dict[str, float]:
        """Return mean and tail latency, throughput, experts per batch and hit rate."""
        p50, p95, p99 = np.percentile(self.latency, [50, 95, 99])
        return {
            "mean_latency": float(self.latency.mean()),
            "p50_latency": float(p50),
            "p95_latency": float(p95),
            "p99_latency": float(p99),
            "mean_first_token": float(self.first_token.mean()),
            "experts_per_batch": float(self.experts_per_batch.mean()),
            "tokens_per_batch": float(self.tokens_per_batch.mean()),
            "tokens_per_second": float(self.tokens_per_batch.sum() / self.seconds),
            "hit_rate": self.hit_rate,
            "seconds": self.seconds,
        }


def _in_cache_order(experts: Iterable[int], cache: ExpertCache) -> list[int]:
    """Return experts with those that are in the cache first, before others push them out."""
    held = cache.held
    return sorted(experts, key=lambda expert: (expert not in held, expert))


def _ask(
    cache: ExpertCache, experts: Sequence[int], future: Sequence[int], pin: bool
) -> tuple[int, list[tuple[int, int]]]:
    """Ask for a batch's experts; return the hits and (expert, evicted) of each miss.

    With `pin`, those asked for stay until the batch is done, as far as there is room.
    """
    hits, misses = 0, []
    for place, expert in enumerate(experts):
        pinned = experts[:place] if pin and place < cache.capacity else ()
        hit, gone = cache.request(expert, [*experts[place + 1 :], *future], pinned)
        hits += hit
        if not hit:
            misses.append((expert, gone))
    return hits, misses


def _future(batcher: Batcher, cache: ExpertCache, lookahead: int) -> list[int]:
    """Return the experts of the coming batches, if the cache can use them."""
    if not isinstance(cache, BeladyCache) or lookahead == 0:
        return []
    return [expert for batch in batcher.preview(lookahead) for expert in batch.experts]


def simulate_serving(
    requests: Sequence[ServingRequest],
    batcher: Batcher,
    cache: ExpertCache,
    costs: ServingCosts,
    *,
    prefetch: bool = True,
    lookahead: int = 8,
) -> ServingReport:
    """Replay requests on one machine, in simulated time.

    Parameters
    ----------
    requests
        What arrives when, with the experts of every token.
    batcher
        An empty batcher.
    cache
        Of one layer: layers have caches of their own that see the same requests. It is emptied.
    costs
        See `measure_costs`.
    prefetch
        Whether the next layer's experts are read while a layer computes, which needs routes that
        are known ahead.
    lookahead
        How many batches ahead a `BeladyCache` sees, made of what waits already.

    Returns
    -------
    ServingReport

    Raises
    ------
    bakeoff.errors.DataError
        If there is no request, one is empty or arrives at no finite time of 0 or more, or the
        batcher is not empty.

    Notes
    -----
    The time of attention over earlier tokens, which no policy here changes, is left out unless it
    is in `costs`.
    """
    if not requests:
        raise DataError("requests are empty")
    if not batcher.is_empty:
        raise DataError("batcher must be empty")
    if lookahead < 0:
        raise DataError(f"lookahead must be at least 0, got {lookahead}")
    prompts = [_expert_ids(request.prompt, "prompt") for request in requests]
    outputs = [_expert_ids(request.output, "output") for request in requests]
    for number, (request, prompt, output) in enumerate(
        zip(requests, prompts, outputs, strict=True)
    ):
        if not len(prompt) or not len(output):
            raise DataError(f"request {number} has an empty prompt or output")
        if not 0 <= request.arrival < float("inf"):
            raise DataError(f"request {number} arrives at {request.arrival}")
    cache.reset()
    arriving = deque(sorted(range(len(requests)), key=lambda i: requests[i].arrival))
    made = [0] * len(requests)
    first = np.zeros(len(requests))
    last = np.zeros(len(requests))
    n_experts, n_tokens, trace = [], [], []
    now, hits, misses, unrouted, left = 0.0, 0, 0, 0, len(requests)
    while left:
        while arriving and requests[arriving[0]].arrival <= now:
            number = arriving.popleft()
            batcher.add(number, prompts[number])
            unrouted += len(prompts[number])
        batch = batcher.next_batch()
        if batch is None:
            now = requests[arriving[0]].arrival
            continue
        order = _in_cache_order(batch.experts, cache)
        hit, missed = _ask(cache, order, _future(batcher, cache, lookahead), prefetch)
        now += costs.batch_seconds(batch.n_tokens, len(order), len(missed), prefetch)
        now += costs.router_per_token * unrouted
        unrouted = 0
        hits, misses = hits + hit, misses + len(missed)
        n_experts.append(len(order))
        n_tokens.append(batch.n_tokens)
        trace += order
        ends = {piece.request: piece.stop for piece in batch.pieces}
        for name, stop in ends.items():
            number = int(name)  # type: ignore[call-overload]
            if stop < len(prompts[number]) + made[number]:
                continue  # more of the prompt is to come
            if made[number] == 0:
                first[number] = now - requests[number].arrival
            made[number] += 1
            if made[number] == len(outputs[number]):
                last[number] = now - requests[number].arrival
                batcher.finish(number)
                left -= 1
            else:
                batcher.add(number, outputs[number][made[number] - 1 : made[number]])
                unrouted += 1
    return ServingReport(
        latency=last,
        first_token=first,
        experts_per_batch=np.array(n_experts, dtype=np.int64),
        tokens_per_batch=np.array(n_tokens, dtype=np.int64),
        hits=hits * costs.n_layers,
        misses=misses * costs.n_layers,
        seconds=now,
        trace=np.array(trace, dtype=np.int64),
    )


# Experts on disk ----------------------------------------------------------------------------------


class ExpertStore:
    """Experts as files: one memory-mapped safetensors file for each expert of each layer.

    Parameters
    ----------
    folder
        Written by `write`.
    cold
        Ask the operating system to forget a file before it is read, so that reading means the disk.
        Without effect where the system has no such call.

    Raises
    ------
    bakeoff.errors.ModelError
        If `folder` was not written by `write`.
    """

    def __init__(self, folder: str | Path, *, cold: bool = False) -> None:
        self.folder = Path(folder)
        self.cold = cold
        about = self.folder / "experts.json"
        if not about.is_file():
            raise ModelError(f"{folder} has no experts.json: it was not written by ExpertStore")
        settings = json.loads(about.read_text(encoding="utf-8"))
        self.n_layers, self.n_experts = int(settings["n_layers"]), int(settings["n_experts"])

    @classmethod
    def write(cls, model: ReadMeForCausalLM, folder: str | Path) -> ExpertStore:
        """Write a packed model's experts.

        Raises
        ------
        bakeoff.errors.ModelError
            If the model is not packed.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layers = packed_layers(model)
        for number, layer in enumerate(layers):
            if not len(layer.experts):
                raise ModelError("the model's experts are on disk already")
            for expert, module in enumerate(layer.experts):
                tensors = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
                with atomic_path(cls._path(folder, number, expert)) as temporary:
                    save_file(tensors, temporary)
                    # Pages that are still to be written could not be dropped by a cold read.
                    descriptor = os.open(temporary, os.O_RDWR)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
        settings = {"n_layers": len(layers), "n_experts": len(layers[0].experts)}
        write_text(folder / "experts.json", json.dumps(settings) + "\n")
        return cls(folder)

    @staticmethod
    def _path(folder: Path, layer: int, expert: int) -> Path:
        return folder / f"layer-{layer:03d}-expert-{expert:03d}.safetensors"

    def read(self, layer: int, expert: int, device: Any = "cpu") -> dict[str, Tensor]:
        """Return an expert's tensors, copied out of the mapped file."""
        from safetensors import safe_open

        path = self._path(self.folder, layer, expert)
        if self.cold and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key).clone().to(device) for key in file.keys()}  # noqa: SIM118


def packed_layers(model: ReadMeForCausalLM) -> list[PackedExperts]:
    """Return a packed model's expert layers, in order.

    Raises
    ------
    bakeoff.errors.ModelError
        If the model is not packed.
    """
    from bakeoff.experts.read_me import PackedExperts

    layers = [module for module in model.modules() if isinstance(module, PackedExperts)]
    if not layers:
        raise ModelError("the model's experts are not packed: call model.pack() first")
    return layers


class _Provider:
    """Runs one layer's experts from those that are in memory; a `PackedExperts` calls it."""

    def __init__(self, owner: OffloadedExperts, number: int, activation: Any) -> None:
        self.owner, self.number, self.activation = owner, number, activation

    def ordered(self, groups: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Start the next layer's reading and return this layer's groups in the order to run."""
        experts = [expert for expert, _ in groups if expert >= 0]
        order = {e: i for i, e in enumerate(self.owner._enter(self.number, experts))}
        return sorted(groups, key=lambda group: order[group[0]])

    def run(self, expert: int, states: Tensor) -> Tensor:
        from bakeoff.experts.read_me import Expert

        weights = self.owner._weights(self.number, expert)
        return Expert.apply_weights(
            states,
            weights["gate_up.weight"],
            weights.get("gate_up.bias"),
            weights["down.weight"],
            self.activation,
        )


class OffloadedExperts:
    """Keep a packed model's experts on disk and only a few per layer in memory.

    From here on the model, however it is called, reads an expert when it needs one. Layers read
    ahead: the plan is the same for all, so while one computes the next one's experts are read.

    Parameters
    ----------
    model
        A packed model. Its experts' weights are released.
    folder
        Where their files go. What lies there is overwritten.
    cache
        Makes a layer's cache, such as ``lambda: LRUCache(2)``.
    prefetch
        Whether a thread reads the next layer's experts while a layer computes.
    cold
        See `ExpertStore`.

    Raises
    ------
    bakeoff.errors.ModelError
        If the model is not packed or its experts are on disk already.

    Notes
    -----
    One forward pass at a time.
    """

    def __init__(
        self,
        model: ReadMeForCausalLM,
        folder: str | Path,
        cache: Callable[[], ExpertCache],
        *,
        prefetch: bool = True,
        cold: bool = False,
    ) -> None:
        from torch import nn

        self._layers = packed_layers(model)
        ExpertStore.write(model, folder)
        self.store = ExpertStore(folder, cold=cold)
        self.device = next(self._layers[0].experts.parameters()).device
        self.prefetch = prefetch
        self.future: Sequence[int] = ()
        self._shapes = [layer.experts for layer in self._layers]
        for number, layer in enumerate(self._layers):
            layer.experts = nn.ModuleList()
            layer.provider = _Provider(self, number, layer.activation)
        # The modules keep their form, on the meta device, for `restore`.
        for modules in self._shapes:
            modules.to("meta")
        self._reader = ThreadPoolExecutor(1, "experts") if prefetch else None
        # By layer: which experts are being read ahead.
        self._ahead: dict[int, tuple[frozenset[int], Future[None]]] = {}
        self.replace_cache(cache)

    def replace_cache(self, cache: Callable[[], ExpertCache]) -> None:
        """Start with empty caches, and counts of zero."""
        self._await()
        self.caches = [cache() for _ in self._layers]
        self._counts = [[0, 0] for _ in self._layers]
        self.read_seconds: list[float] = []
        self._held: list[dict[int, dict[str, Tensor]]] = [{} for _ in self._layers]
        self._ready: list[dict[int, None]] = [{} for _ in self._layers]
        self._order: list[list[int]] = [[] for _ in self._layers]

    @property
    def hits(self) -> int:
        """How often a layer found an expert in its cache."""
        return sum(hits for hits, _ in self._counts)

    @property
    def misses(self) -> int:
        """How often a layer's expert had to be read."""
        return sum(misses for _, misses in self._counts)

    def restore(self) -> None:
        """Put all experts back into the model; this object is of no use afterwards."""
        self._await()
        for number, (layer, modules) in enumerate(zip(self._layers, self._shapes, strict=True)):
            for expert, module in enumerate(modules):
                module.to_empty(device=self.device)
                module.load_state_dict(self.store.read(number, expert, self.device))
            layer.experts = modules
            layer.provider = None
        if self._reader is not None:
            self._reader.shutdown()

    def expect(self, experts: Sequence[int], future: Sequence[int] = ()) -> None:
        """Announce the next forward pass: start on its first layer, and say what comes after."""
        self._await()  # what an interrupted pass has left
        self.future = future
        self._read_ahead(0, experts)

    def _read_ahead(self, number: int, experts: Sequence[int]) -> None:
        if self._reader is not None and number < len(self._layers):
            reading = self._reader.submit(self._fetch, number, tuple(experts))
            self._ahead[number] = (frozenset(experts), reading)

    def _await(self) -> None:
        """Forget what was announced, once nothing is being read any more."""
        announced = [future for _, future in self._ahead.values()]
        self._ahead.clear()
        wait(announced)

    def _enter(self, number: int, experts: Sequence[int]) -> list[int]:
        announced = self._ahead.get(number)
        if announced is not None and announced[0] == set(experts):
            del self._ahead[number]
            announced[1].result()
        elif self._reader is not None:
            self._await()
            self._fetch(number, experts)
        self._read_ahead(number + 1, experts)
        ready = self._ready[number]
        held = self.caches[number].held
        order = sorted(experts, key=lambda e: (e not in ready, e not in held, e))
        self._order[number] = order
        return order

    def _fetch(self, number: int, experts: Sequence[int]) -> None:
        """Bring in as many of a batch's experts as there is room for."""
        cache = self.caches[number]
        self._ready[number] = {}
        order = _in_cache_order(experts, cache)
        for place, expert in enumerate(order[: cache.capacity]):
            self._request(number, expert, [*order[place + 1 :], *self.future], order[:place])
            self._ready[number][expert] = None

    def _request(
        self, number: int, expert: int, future: Sequence[int], pinned: Collection[int]
    ) -> None:
        hit, gone = self.caches[number].request(expert, future, pinned)
        if hit:
            self._counts[number][0] += 1
            return
        self._counts[number][1] += 1
        if gone >= 0:
            del self._held[number][gone]
        start = time.perf_counter()
        try:
            self._held[number][expert] = self.store.read(number, expert, self.device)
        except BaseException:
            self.caches[number].forget(expert)
            raise
        self.read_seconds.append(time.perf_counter() - start)

    def _weights(self, number: int, expert: int) -> dict[str, Tensor]:
        ready, order = self._ready[number], self._order[number]
        if expert in ready:
            del ready[expert]
        else:
            following = order[order.index(expert) + 1 :]
            self._request(number, expert, [*following, *self.future], tuple(ready))
        return self._held[number][expert]


# Engine -------------------------------------------------------------------------------------------


@dataclass
class _Live:
    """A request that is being served."""

    ids: list[int]
    n_new: int
    n_prompt: int
    router: RouterCache
    arrival: float
    first: float = 0.0
    n_run: int = 0


class ServingEngine:
    """Serve requests with continuous batching, tokens of all requests side by side.

    Parameters
    ----------
    model
        A packed model (or a masked one, without `experts`).
    batcher
        An empty batcher.
    experts
        The model's experts on disk; None if they are in memory.
    lookahead
        How many batches ahead a `BeladyCache` sees.
    eos_token_id
        Ends a text; None to generate all tokens asked for.

    Raises
    ------
    bakeoff.errors.DataError
        If the batcher is not empty.
    bakeoff.errors.ModelError
        If the model's attention takes no masks (only ``"sdpa"`` and ``"eager"`` do).

    Notes
    -----
    Greedy decoding. A batch is one sequence whose attention mask keeps requests apart, so that any
    batch gives every request what it would get alone, up to rounding. Keys and values of all live
    requests lie in one cache; attention is computed over all of it, which suits the few requests of
    a small machine, not a large server.
    """

    def __init__(
        self,
        model: ReadMeForCausalLM,
        batcher: Batcher,
        *,
        experts: OffloadedExperts | None = None,
        lookahead: int = 8,
        eos_token_id: int | None = None,
    ) -> None:
        self.model, self.batcher, self.experts = model, batcher, experts
        self.lookahead, self.eos_token_id = lookahead, eos_token_id
        self._text = model.config.text_config.get_text_config()
        self._attention = self._text._attn_implementation
        if self._attention not in ("sdpa", "eager"):
            raise ModelError(
                f"the engine needs attn_implementation 'sdpa' or 'eager', got {self._attention!r}"
            )
        self._device = model.router.head.weight.device
        self._live: dict[int, _Live] = {}
        self._start()

    def _start(self) -> None:
        """Begin with nothing, also after a run that was interrupted."""
        import torch
        from transformers import DynamicCache

        for number in self._live:
            self.batcher.finish(number)
        self._live.clear()
        if not self.batcher.is_empty:
            raise DataError("batcher must be empty")
        self._cache = DynamicCache()
        # Of each token in the cache: its request, and its place in that request's text.
        self._owner = torch.empty(0, dtype=torch.long, device=self._device)
        self._place = torch.empty(0, dtype=torch.long, device=self._device)
        self._dead: set[int] = set()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        arrivals: Sequence[float] | None = None,
    ) -> ServingReport:
        """Serve prompts, each from its arrival on, and return when all are done.

        Parameters
        ----------
        prompts
            Token ids of each.
        max_new_tokens
            For all, or one number for each.
        arrivals
            Seconds from now; None for all at once.

        Returns
        -------
        ServingReport
            With `outputs`.

        Raises
        ------
        bakeoff.errors.DataError
            If a prompt is empty, lengths disagree, numbers are out of range, or something else
            uses the batcher.
        """
        import torch

        new = (
            [max_new_tokens] * len(prompts)
            if isinstance(max_new_tokens, int)
            else list(max_new_tokens)
        )
        times = [0.0] * len(prompts) if arrivals is None else list(arrivals)
        if not prompts or len(new) != len(prompts) or len(times) != len(prompts):
            raise DataError(
                f"prompts, max_new_tokens and arrivals must be of one length above 0, got "
                f"{len(prompts)}, {len(new)} and {len(times)}"
            )
        for number, prompt in enumerate(prompts):
            if not len(prompt) or new[number] < 1 or not 0 <= times[number] < float("inf"):
                raise DataError(
                    f"request {number}: a prompt of at least 1 token, at least 1 new token and a "
                    f"finite arrival are needed, got {len(prompt)}, {new[number]} and "
                    f"{times[number]}"
                )
        self._start()
        arriving = deque(sorted(range(len(prompts)), key=lambda i: times[i]))
        first, last = np.zeros(len(prompts)), np.zeros(len(prompts))
        outputs: list[tuple[int, ...]] = [()] * len(prompts)
        n_experts: list[int] = []
        n_tokens: list[int] = []
        trace: list[int] = []
        before = (0, 0) if self.experts is None else (self.experts.hits, self.experts.misses)
        start = time.perf_counter()
        left = len(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                while left:
                    now = time.perf_counter() - start
                    while arriving and times[arriving[0]] <= now:
                        number = arriving.popleft()
                        self._admit(number, prompts[number], new[number], times[number])
                    batch = self.batcher.next_batch()
                    if batch is None:
                        time.sleep(max(0.0, times[arriving[0]] - now))
                        continue
                    n_experts.append(len(batch.experts))
                    n_tokens.append(batch.n_tokens)
                    trace += (
                        batch.experts
                        if self.experts is None
                        else _in_cache_order(batch.experts, self.experts.caches[0])
                    )
                    for number, live, done in self._step(batch):
                        now = time.perf_counter() - start
                        if len(live.ids) == live.n_prompt + 1:
                            first[number] = now - live.arrival
                        if done:
                            last[number] = now - live.arrival
                            outputs[number] = tuple(live.ids[live.n_prompt :])
                            left -= 1
        finally:
            self.model.train(was_training)
        after = (0, 0) if self.experts is None else (self.experts.hits, self.experts.misses)
        return ServingReport(
            latency=last,
            first_token=first,
            experts_per_batch=np.array(n_experts, dtype=np.int64),
            tokens_per_batch=np.array(n_tokens, dtype=np.int64),
            hits=after[0] - before[0],
            misses=after[1] - before[1],
            seconds=time.perf_counter() - start,
            trace=np.array(trace, dtype=np.int64),
            outputs=tuple(outputs),
        )

    def _admit(self, number: int, prompt: Sequence[int], n_new: int, arrival: float) -> None:
        import torch

        from bakeoff.experts.read_me import RouterCache

        cache = RouterCache()
        ids = [int(token) for token in prompt]
        plan = self.model.route(torch.tensor([ids], device=self._device), cache=cache)
        self._live[number] = _Live(ids, n_new, len(ids), cache, arrival)
        self.batcher.add(number, plan.of(0))

    def _step(self, batch: Batch) -> list[tuple[int, _Live, bool]]:
        """Run a batch; return the requests that got a token, and whether they are done."""
        import torch

        if self.experts is not None:
            future = _future(self.batcher, self.experts.caches[0], self.lookahead)
            self.experts.expect(batch.experts, future)
        tokens: list[int] = []
        owners: list[int] = []
        places: list[int] = []
        experts: list[int] = []
        ends: dict[int, int] = {}
        for piece in batch.pieces:
            number = int(piece.request)  # type: ignore[call-overload]
            live = self._live[number]
            tokens += live.ids[piece.start : piece.stop]
            n = piece.stop - piece.start
            owners += [number] * n
            places += range(piece.start, piece.stop)
            experts += [piece.expert] * n
            live.n_run = piece.stop
            ends[number] = len(tokens) - 1
        as_tensor = torch.tensor([tokens, owners, places, experts], device=self._device)
        ids, owner, place, expert = as_tensor
        self._owner = torch.cat([self._owner, owner])
        self._place = torch.cat([self._place, place])
        complete = {
            n: end for n, end in ends.items() if self._live[n].n_run == len(self._live[n].ids)
        }
        output = self.model(
            ids[None],
            attention_mask=self._masks(owner, place),
            position_ids=place[None],
            past_key_values=self._cache,
            use_cache=True,
            expert_ids=expert[None],
            logits_to_keep=torch.tensor(
                list(complete.values()), dtype=torch.long, device=self._device
            ),
        )
        if not complete:
            return []
        sampled = output.logits[0].argmax(-1).tolist()
        results = []
        for number, token in zip(complete, sampled, strict=True):
            live = self._live[number]
            live.ids.append(token)
            done = len(live.ids) - live.n_prompt == live.n_new or token == self.eos_token_id
            results.append((number, live, done))
            if done:
                self.batcher.finish(number)
                self._dead.add(number)
                del self._live[number]
            else:
                following = torch.tensor([[token]], device=self._device)
                plan = self.model.route(following, cache=live.router)
                self.batcher.add(number, plan.of(0))
        self._tidy()
        return results

    def _masks(self, owner: Tensor, place: Tensor) -> Any:
        """Return who sees whom: earlier tokens of the same request."""
        import torch

        distance = place[:, None] - self._place[None]
        full = (owner[:, None] == self._owner[None]) & (distance >= 0)
        window = getattr(self._text, "sliding_window", None)
        near = full if window is None else full & (distance < window)

        def shaped(visible: Tensor) -> Tensor:
            if self._attention == "sdpa":
                return visible[None, None]
            dtype = self.model.dtype
            hidden = torch.finfo(dtype).min
            return torch.where(visible, 0.0, hidden).to(dtype)[None, None]

        kinds = set(getattr(self._text, "layer_types", None) or ())
        if "sliding_attention" in kinds and kinds != {"sliding_attention"}:
            return {"full_attention": shaped(full), "sliding_attention": shaped(near)}
        if kinds and "sliding_attention" not in kinds:
            return shaped(full)
        return shaped(near)

    def _tidy(self) -> None:
        """Drop the keys and values of finished requests once they are half of all."""
        import torch

        if not self._dead:
            return
        dead = torch.tensor(sorted(self._dead), device=self._device)
        kept = ~torch.isin(self._owner, dead)
        if self._live and int(kept.sum()) * 2 > len(kept):
            return
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        self._owner, self._place = self._owner[kept], self._place[kept]
        self._dead.clear()


# Costs --------------------------------------------------------------------------------------------


def measure_costs(
    model: ReadMeForCausalLM,
    store: ExpertStore,
    *,
    n_tokens: Sequence[int] = (1, 16, 64, 256),
    repeats: int = 5,
) -> ServingCosts:
    """Time a packed model, its router and its store on this machine.

    Batches of several sizes and numbers of experts are timed, and the costs of `ServingCosts`
    fitted to them by non-negative least squares on relative errors.

    Parameters
    ----------
    model
        A packed model with its experts in memory.
    store
        The same experts on disk.
    n_tokens
        Sizes of batches, at least two.
    repeats
        How often each is timed; the fastest counts.

    Returns
    -------
    ServingCosts

    Raises
    ------
    bakeoff.errors.DataError
        If fewer than two sizes are given.
    bakeoff.errors.ModelError
        If the model is not packed or its experts are on disk.
    """
    import torch
    from scipy.optimize import nnls

    from bakeoff.experts.read_me import _evaluating

    layers = packed_layers(model)
    if not len(layers[0].experts):
        raise ModelError("measure_costs needs a model with its experts in memory")
    if len(set(n_tokens)) < 2:
        raise DataError(f"n_tokens must hold at least 2 sizes, got {list(n_tokens)}")
    device = model.router.head.weight.device
    n_experts = len(layers[0].experts)

    def fastest(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    rows, seconds, routing = [], [], []
    with torch.no_grad(), _evaluating(model):
        for size in sorted(set(n_tokens)):
            ids = (torch.arange(size, device=device) * 7 % model.router.vocab_size)[None]
            routing.append(fastest(lambda ids=ids: model.route(ids)) / size)  # type: ignore[misc]
            for used in sorted({1, (n_experts + 1) // 2, n_experts}):
                if used > size:
                    continue
                chosen = torch.arange(size, device=device)[None] % used
                rows.append([1.0, float(size), float(used)])
                seconds.append(
                    fastest(
                        lambda ids=ids, chosen=chosen: model(  # type: ignore[misc]
                            ids, expert_ids=chosen, use_cache=False, logits_to_keep=1
                        )
                    )
                    / len(layers)
                )
    weights = 1 / np.array(seconds)
    fitted, _ = nnls(np.array(rows) * weights[:, None], np.ones(len(seconds)))
    reads = []
    for layer in range(store.n_layers):
        for expert in range(store.n_experts):
            start = time.perf_counter()
            store.read(layer, expert, device)
            reads.append(time.perf_counter() - start)
    return ServingCosts(
        n_layers=len(layers),
        base=float(fitted[0]),
        per_token=float(fitted[1]),
        per_expert=float(fitted[2]),
        load=statistics.median(reads),
        router_per_token=min(routing),
    )


def requests_from_plans(
    plans: Sequence[ArrayLike], n_output: int, arrivals: Sequence[float]
) -> list[ServingRequest]:
    """Cut routed texts into prompts and outputs to replay.

    Parameters
    ----------
    plans
        Expert ids of each text, as `RoutePlan.of` gives them.
    n_output
        How many of each text's last tokens count as generated.
    arrivals
        Seconds, one for each.

    Returns
    -------
    list of ServingRequest

    Raises
    ------
    bakeoff.errors.DataError
        If a text is not longer than `n_output`, which is at least 1, or lengths disagree.
    """
    if len(plans) != len(arrivals):
        raise DataError(f"plans and arrivals differ in length: {len(plans)} and {len(arrivals)}")
    requests = []
    for number, (plan, arrival) in enumerate(zip(plans, arrivals, strict=True)):
        ids = _expert_ids(plan, f"plan {number}")
        if not 1 <= n_output < len(ids):
            raise DataError(
                f"n_output must be at least 1 and below the length of every plan, got {n_output} "
                f"and plan {number} of {len(ids)} tokens"
            )
        requests.append(ServingRequest(float(arrival), ids[:-n_output], ids[-n_output:]))
    return requests


def compare_caches(
    trace: ArrayLike, capacities: Sequence[int], *, seeds: int = 5
) -> Mapping[str, Mapping[int, float]]:
    """Return the hit rates of Belady's, LRU's and random eviction on one trace.

    Parameters
    ----------
    trace
        ``(n,)`` expert ids.
    capacities
        Cache sizes.
    seeds
        Over how many seeds the random cache's rate is averaged.

    Returns
    -------
    mapping
        ``{"belady" | "lru" | "random": {capacity: hit rate}}``.

    Raises
    ------
    bakeoff.errors.DataError
        For a bad trace or capacity.

    Examples
    --------
    >>> compare_caches([0, 1, 2, 0, 1, 2], [2])["belady"]
    {2: 0.3333333333333333}
    """
    if seeds < 1:
        raise DataError(f"seeds must be at least 1, got {seeds}")
    ids = _expert_ids(trace, "trace")
    several = range(seeds)
    return {
        "belady": {k: BeladyCache(k).simulate(ids).hit_rate for k in capacities},
        "lru": {k: LRUCache(k).simulate(ids).hit_rate for k in capacities},
        "random": {
            k: statistics.fmean(RandomCache(k, seed).simulate(ids).hit_rate for seed in several)
            for k in capacities
        },
    }


__all__ = [
    "ArrivalBatcher",
    "Batch",
    "Batcher",
    "BeladyCache",
    "CacheTrace",
    "ExpertBatcher",
    "ExpertCache",
    "ExpertStore",
    "LRUCache",
    "OffloadedExperts",
    "Piece",
    "RandomCache",
    "ServingCosts",
    "ServingEngine",
    "ServingReport",
    "ServingRequest",
    "compare_caches",
    "measure_costs",
    "packed_layers",
    "requests_from_plans",
    "simulate_serving",
]
