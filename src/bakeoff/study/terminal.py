"""A study in the terminal: the verdict table, and live progress while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bakeoff.study.events import (
    Event,
    SharedWork,
    StudyFinished,
    StudyStarted,
    TrialFailed,
    TrialFinished,
    TrialProgress,
    TrialStarted,
)
from bakeoff.study.schema import Comparison, DesignResult, Results, parse_results
from bakeoff.study.wording import (
    MISSING,
    VERDICTS,
    answer_parts,
    confidence,
    cost_names,
    cost_wording,
    decimals,
    duration,
    inside_sentence,
    number,
    probability,
    signed,
    span,
)

STYLES = {"better": "green", "worse": "red", "equivalent": "blue", "undecided": "dim"}
SHORTEST_NAME = 24
LONGEST_NAME = 44
ESSENTIAL = 70
GAP = 2
# What consoles that know no Unicode show instead.
PLAIN = str.maketrans(
    {"−": "-", "–": "-", "·": "|", "…": "~", "≈": "=", "▲": "+", "▼": "-", "◆": "*", "’": "'"}
)


def terminal_table(results: Mapping[str, Any]) -> RenderableType:
    """Return the verdict table, with the study's answer under it, for `rich` to print.

    It takes as many columns as the console is wide; numbers are never wrapped or cut.

    Parameters
    ----------
    results
        The content of a ``results.json``.

    Raises
    ------
    StoreError
        If `results` do not follow the schema.
    """
    return _VerdictTable(parse_results(results))


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: list[Text]
    # Columns of high importance are kept when the console is narrow.
    importance: int
    is_number: bool = True

    @property
    def width(self) -> int:
        return max([len(self.heading), *(cell.cell_len for cell in self.cells)])


class _VerdictTable:
    """Chooses its columns when it is printed, because only then the width is known."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [_safe(design.name) for design in self._results.designs]
        longest = max((cell_len(name) for name in names), default=0)
        columns = _fitting(_columns(self._results), options.max_width, longest)
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("design", overflow="fold")
        for column in columns:
            table.add_column(
                column.heading,
                justify="right" if column.is_number else "left",
                no_wrap=True,
                min_width=column.width,
            )
        for i, design in enumerate(self._results.designs):
            name = Text(names[i], style="bold" if design.name == self._winner else "")
            row = [name, *(column.cells[i] for column in columns)]
            table.add_row(*(_plain(cell, options) for cell in row))
        yield table
        yield Text()
        yield _plain(self._answer(), options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(60, options.max_width), options.max_width)

    @property
    def _winner(self) -> str | None:
        return self._results.winner.design

    def _answer(self) -> Text:
        text = Text()
        for part, is_name in answer_parts(self._results):
            text.append(_safe(part), style="bold" if is_name else "")
        return text


def _safe(text: str) -> str:
    """Return `text` without control characters, which could drive the reader's terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _plain(text: Text, options: ConsoleOptions) -> Text:
    if not options.ascii_only:
        return text
    plain = text.plain.translate(PLAIN).encode("ascii", "replace").decode()
    return Text(plain, style=text.style)


def _columns(results: Results) -> list[_Column]:
    """Return all columns beside the names, in the order in which they are shown."""
    compared = [results.overall(design.name, results.headline) for design in results.designs]
    places = decimals(comparison for comparison in compared if comparison)
    # A reference has no difference to itself.
    rivals = [
        None if design.name == results.reference else comparison
        for design, comparison in zip(results.designs, compared, strict=True)
    ]

    def texts(show: Any, comparisons: list[Comparison | None]) -> list[Text]:
        return [Text(MISSING if c is None else show(c)) for c in comparisons]

    columns = [
        _Column("verdict", [_verdict(d, results) for d in results.designs], 100, is_number=False),
        _Column("mean", texts(lambda c: number(c.mean, places), compared), 90),
        _Column("difference", texts(lambda c: signed(c.difference, places), rivals), 80),
        _Column(f"{confidence(results)} interval", texts(lambda c: span(c, places), rivals), 70),
        _Column("p (Holm)", texts(lambda c: probability(c.p_holm), rivals), 60),
        _Column("effect", texts(lambda c: signed(c.effect_size, 2), rivals), 40),
    ]
    for i, cost in enumerate(cost_names(results)):
        wording = cost_wording(cost)
        cells = [Text(_cost(design, cost)) for design in results.designs]
        columns.append(
            _Column(_safe(inside_sentence(wording.label)), cells, 50 if i == 0 else 30 - i)
        )
    return columns


def _verdict(design: DesignResult, results: Results) -> Text:
    comparison = results.overall(design.name, results.headline)
    if design.name == results.reference:
        return Text("◆ reference", style="dim")
    if comparison is None:
        return Text("  no result", style="dim")
    if comparison.verdict is None:
        return Text("  not compared", style="dim")
    symbol = VERDICTS[comparison.verdict].symbol
    return Text(f"{symbol} {comparison.verdict}", style=STYLES[comparison.verdict])


def _cost(design: DesignResult, cost: str) -> str:
    found = design.cost.get(cost)
    return MISSING if found is None or found.mean is None else cost_wording(cost).show(found.mean)


def _fitting(columns: list[_Column], width: int, longest_name: int) -> list[_Column]:
    """Return the most important columns that leave room for names."""
    room = width
    kept = []
    for column in sorted(columns, key=lambda column: -column.importance):
        room -= column.width + GAP
        # Names may be folded for the sake of a verdict, but not for one more cost.
        name = min(longest_name, SHORTEST_NAME if column.importance >= ESSENTIAL else LONGEST_NAME)
        if room < name:
            break
        kept.append(column)
    return [column for column in columns if column in kept]


@dataclass
class _DesignState:
    scores: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    running: dict[int, tuple[float, str]] = field(default_factory=dict)

    @property
    def n_done(self) -> int:
        return len(self.scores) + len(self.failed)

    @property
    def mean(self) -> float | None:
        return sum(self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def seconds_each(self) -> float | None:
        return sum(self.seconds.values()) / len(self.seconds) if self.seconds else None


class _StudyState:
    """What the events have said so far."""

    def __init__(self, started: StudyStarted) -> None:
        self.started = started
        self.designs = {name: _DesignState() for name in started.designs}
        self.shared: SharedWork | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, SharedWork):
            self.shared = event
            return
        if isinstance(event, StudyStarted | StudyFinished):
            return
        state = self.designs.setdefault(event.design, _DesignState())
        if isinstance(event, TrialStarted):
            state.running[event.seed] = (0.0, "")
        elif isinstance(event, TrialProgress):
            state.running[event.seed] = (event.fraction, event.message)
        else:
            state.running.pop(event.seed, None)
            state.failed.discard(event.seed)
            if isinstance(event, TrialFinished):
                state.scores[event.seed] = event.score
                state.seconds[event.seed] = event.seconds
            else:
                state.failed.add(event.seed)

    @property
    def n_done(self) -> int:
        return sum(state.n_done for state in self.designs.values())

    def seconds_left(self) -> float | None:
        """Return the time left, from how long trials took; None before any has finished."""
        every = [s for state in self.designs.values() for s in state.seconds.values()]
        if not every:
            return None
        total = 0.0
        for state in self.designs.values():
            expected = state.seconds_each
            if expected is None:
                expected = sum(every) / len(every)
            open_trials = len(self.started.seeds) - state.n_done
            under_way = sum(fraction for fraction, _ in state.running.values())
            total += expected * max(0.0, open_trials - under_way)
        return total / self.started.workers


class LiveProgress:
    """Shows a running study: a live table in a terminal, a few plain lines anywhere else.

    Parameters
    ----------
    console
        Where to show it; standard output by default.

    Examples
    --------
    >>> from bakeoff.study.events import StudyStarted, TrialFinished, StudyFinished
    >>> with LiveProgress() as progress:
    ...     progress(StudyStarted("demo", ("mean",), (0,), 1, 0, 1, "accuracy", True))
    ...     progress(TrialFinished("mean", 0, 0.75, 1.5, False))
    ...     progress(StudyFinished(1, 0, False, 1.6))
    demo: 1 design x 1 seed, 1 trial to run
    mean: accuracy 0.7500, 1.5 s per trial (1 of 1 trials done)
    finished: 1 of 1 trial in 1.6 s
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._lock = threading.RLock()  # the table is drawn from another thread
        self._state: _StudyState | None = None
        self._live: Live | None = None
        self._began = 0.0

    def __enter__(self) -> LiveProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        """Take an event of the study engine."""
        with self._lock:
            if isinstance(event, StudyStarted):
                self._state = _StudyState(event)
                self._began = time.monotonic()
            if self._state is None:
                raise RuntimeError(f"the first event must be StudyStarted, got {event!r}")
            previous = self._state.shared
            self._state.add(event)
        # Outside the lock: stopping waits for the drawing thread, which needs the lock.
        if self._console.is_terminal:
            self._show(event)
        for line in self._lines(event, previous):
            self._console.print(Text(_for(self._console, line)), soft_wrap=True)

    def _show(self, event: Event) -> None:
        if isinstance(event, StudyStarted):
            self._stop()
            self._live = Live(
                get_renderable=self._table,
                console=self._console,
                refresh_per_second=6,
                transient=True,
            )
            self._live.start()
        elif isinstance(event, StudyFinished):
            self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _lines(self, event: Event, previous: SharedWork | None) -> Iterator[str]:
        """Yield what is worth a line that stays; without a live table also what is under way."""
        assert self._state is not None
        started = self._state.started
        if isinstance(event, StudyFinished):
            yield _closing(event, started)
        elif isinstance(event, TrialFailed):
            yield f"failed: {_safe(event.design)}, seed {event.seed}: {_safe(event.error)}"
        if self._console.is_terminal:
            return
        if isinstance(event, StudyStarted):
            yield _opening(event)
        elif isinstance(event, SharedWork):
            # Shared work reports often, and may take minutes; a log wants a line every fifth.
            if previous is None or int(5 * event.fraction) > int(5 * previous.fraction):
                yield f"shared work: {100 * event.fraction:.0f} % {_safe(event.message)}".rstrip()
        elif isinstance(event, TrialFinished | TrialFailed):
            state = self._state.designs[event.design]
            reused = isinstance(event, TrialFinished) and event.reused
            if state.n_done == len(started.seeds) and not reused:
                yield self._design_line(event.design, state)

    def _design_line(self, name: str, state: _DesignState) -> str:
        assert self._state is not None
        started = self._state.started
        done = f"({self._state.n_done} of {started.planned} trials done)"
        if state.mean is None:
            return f"{_safe(name)}: no trial finished {done}"
        score = f"{_safe(started.headline)} {number(state.mean, 4)}"
        return f"{_safe(name)}: {score}, {duration(state.seconds_each or 0.0)} per trial {done}"

    def _table(self) -> RenderableType:
        with self._lock:
            assert self._state is not None
            return Group(self._design_table(self._state), Text(), self._total(self._state))

    def _design_table(self, state: _StudyState) -> RenderableType:
        started = state.started
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("design", overflow="ellipsis", no_wrap=True)
        table.add_column("trials", justify="right", no_wrap=True)
        table.add_column(_safe(started.headline), justify="right", no_wrap=True)
        table.add_column("each", justify="right", no_wrap=True)
        table.add_column("now", overflow="ellipsis", no_wrap=True, style="dim")
        shown = _visible(state, max(3, self._console.height - 6))
        for name in shown:
            design = state.designs[name]
            failed = f" ({len(design.failed)} failed)" if design.failed else ""
            each = design.seconds_each
            table.add_row(
                Text(_for(self._console, _safe(name))),
                f"{len(design.scores)}/{len(started.seeds)}{failed}",
                "" if design.mean is None else _for(self._console, number(design.mean, 4)),
                "" if each is None else duration(each),
                Text(_for(self._console, _now(design))),
            )
        hidden = len(state.designs) - len(shown)
        return Group(table, Text(f"and {hidden} more", style="dim")) if hidden else table

    def _total(self, state: _StudyState) -> RenderableType:
        planned = max(1, state.started.planned)
        shared = state.shared
        if (
            shared is not None
            and shared.fraction < 1
            and not any(design.running for design in state.designs.values())
        ):
            label = f"shared work: {_safe(shared.message)}"
            return self._bar(shared.fraction, 1.0, label)
        under_way = sum(f for d in state.designs.values() for f, _ in d.running.values())
        left = state.seconds_left()
        elapsed = duration(max(1.0, time.monotonic() - self._began))
        remaining = f", about {duration(max(1.0, left))} left" if left else ""
        label = f"{state.n_done}/{state.started.planned} trials, {elapsed}{remaining}"
        return self._bar(state.n_done + under_way, planned, label)

    def _bar(self, done: float, total: float, label: str) -> RenderableType:
        line = Table.grid(padding=(0, GAP))
        line.add_row(
            ProgressBar(total=total, completed=min(done, total), width=30),
            Text(_for(self._console, label), overflow="ellipsis", no_wrap=True),
        )
        return Padding(line, 0)


def _for(console: Console, text: str) -> str:
    if not console.options.ascii_only:
        return text
    return text.translate(PLAIN).encode("ascii", "replace").decode()


def _now(design: _DesignState) -> str:
    return "; ".join(
        f"seed {seed}: {100 * fraction:.0f} % {_safe(message)}".rstrip()
        for seed, (fraction, message) in design.running.items()
    )


def _visible(state: _StudyState, room: int) -> list[str]:
    """Return the designs to show, in study order: running ones first, then the best so far."""
    if len(state.designs) <= room:
        return list(state.designs)
    sign = -1.0 if state.started.higher_is_better else 1.0

    def interest(name: str) -> tuple[bool, float]:
        design = state.designs[name]
        return not design.running, float("inf") if design.mean is None else sign * design.mean

    chosen = set(sorted(state.designs, key=interest)[: room - 1])
    return [name for name in state.designs if name in chosen]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _opening(event: StudyStarted) -> str:
    to_run = _count(event.planned - event.reused, "trial") + " to run"
    reused = f", {event.reused:,} already done" if event.reused else ""
    workers = f", {event.workers} at a time" if event.workers > 1 else ""
    grid = f"{_count(len(event.designs), 'design')} x {_count(len(event.seeds), 'seed')}"
    return f"{_safe(event.name)}: {grid}, {to_run}{workers}{reused}"


def _closing(event: StudyFinished, started: StudyStarted) -> str:
    state = "interrupted" if event.interrupted else "finished"
    failed = f", {event.failed:,} failed" if event.failed else ""
    again = "; the same command continues" if event.interrupted else ""
    trials = _count(started.planned, "trial")
    return f"{state}: {event.finished:,} of {trials}{failed} in {duration(event.seconds)}{again}"
