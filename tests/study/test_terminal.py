"""The verdict table and live progress in the terminal (about 1 s)."""

from __future__ import annotations

import io
from typing import Any

import example_results as examples
import pytest
from rich.console import Console

from bakeoff.study.events import (
    SharedWork,
    StudyFinished,
    StudyStarted,
    TrialFailed,
    TrialFinished,
    TrialProgress,
    TrialStarted,
)
from bakeoff.study.terminal import LiveProgress, _StudyState, _visible, terminal_table
from bakeoff.study.wording import answer


def printed(results: dict[str, Any], width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width).print(terminal_table(results))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_numbers_are_whole_and_lines_fit(width: int) -> None:
    results = examples.partial()
    text = printed(results, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for design in results["designs"][:-1]:
        record = design["metrics"]["mean_score"]["overall"]
        line = next(line for line in lines if f"{record['mean']:.3f}" in line.split())
        assert design["name"].split(",")[0].split(" ")[0] in line
        if design["name"] != results["reference"]:
            assert f"{record['difference']:+.3f}".replace("-", "−") in line
            low, high = record["interval"]
            assert f"{low:+.3f} to {high:+.3f}".replace("-", "−") in line
            assert record["verdict"] in line


def test_wider_consoles_get_more_columns() -> None:
    heads = [printed(examples.example(), width).splitlines()[0] for width in (80, 120, 200)]
    assert "p (Holm)" not in heads[0]
    assert "p (Holm)" in heads[1]
    assert "time" in heads[1]
    assert "FLOPs per text" in heads[2]


def test_the_answer_stands_under_the_table() -> None:
    text = " ".join(printed(examples.undecided(), 100).split())
    assert text.endswith(answer(examples.undecided()).replace("`", ""))


def test_consoles_without_unicode_get_plain_signs() -> None:
    results = examples.example()
    text = printed(results, 120, encoding="ascii")
    assert "- worse" in text
    assert "-0.207" in text
    assert "+ better" in text


@pytest.mark.parametrize(
    "make", [examples.with_nulls, examples.one_design, examples.nothing_finished]
)
def test_gaps_are_shown_as_gaps(make: Any) -> None:
    text = printed(make(), 120)
    assert "nan" not in text
    assert "None" not in text


def test_names_cannot_drive_the_terminal() -> None:
    results = examples.example(["mean", "\x1b[31mred [bold]x\x07"], [0.0, 0.05])
    text = printed(results, 120)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x" in text


def started(n_designs: int = 2, **changes: Any) -> StudyStarted:
    facts = {
        "name": "demo",
        "designs": tuple(f"design {i}" for i in range(n_designs)),
        "seeds": (0, 1),
        "planned": 2 * n_designs,
        "reused": 0,
        "workers": 1,
        "headline": "accuracy",
        "higher_is_better": True,
    }
    return StudyStarted(**(facts | changes))


def test_a_log_gets_few_plain_lines() -> None:
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, width=60)) as progress:
        progress(started())
        for percent in range(101):
            progress(SharedWork(percent / 100, "hidden states"))
        for design in ("design 0", "design 1"):
            for seed in (0, 1):
                progress(TrialStarted(design, seed))
                for percent in range(100):
                    progress(TrialProgress(design, seed, percent / 100, "training"))
                if (design, seed) == ("design 1", 0):
                    progress(TrialFailed(design, seed, "ValueError: [bold] is \x1b no markup"))
                else:
                    progress(TrialFinished(design, seed, 0.5 + 0.25 * seed, 2.0 + seed, False))
        progress(StudyFinished(3, 1, False, 75.0))
    assert stream.getvalue().splitlines() == [
        "demo: 2 designs x 2 seeds, 4 trials to run",
        *(f"shared work: {percent} % hidden states" for percent in (0, 20, 40, 60, 80, 100)),
        "design 0: accuracy 0.6250, 2.5 s per trial (2 of 4 trials done)",
        "failed: design 1, seed 0: ValueError: [bold] is � no markup",
        "design 1: accuracy 0.7500, 3.0 s per trial (4 of 4 trials done)",
        "finished: 3 of 4 trials, 1 failed in 1 min 15 s",
    ]


def test_a_resumed_and_interrupted_study_says_so() -> None:
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, width=60)) as progress:
        progress(started(reused=1, workers=2))
        progress(TrialFinished("design 0", 0, 0.5, 2.0, True))
        progress(StudyFinished(1, 0, True, 0.5))
    assert stream.getvalue().splitlines() == [
        "demo: 2 designs x 2 seeds, 3 trials to run, 2 at a time, 1 already done",
        "interrupted: 1 of 4 trials in 500 ms; the same command continues",
    ]


def test_time_left_counts_what_each_design_takes() -> None:
    state = _StudyState(started(3, seeds=(0, 1, 2), planned=9, workers=2))
    assert state.seconds_left() is None
    state.add(TrialFinished("design 0", 0, 0.5, 10.0, False))
    state.add(TrialFinished("design 1", 0, 0.5, 30.0, True))
    state.add(TrialStarted("design 1", 1))
    state.add(TrialProgress("design 1", 1, 0.5, "training"))
    state.add(TrialFailed("design 0", 2, "boom"))
    # design 0: one trial of 10 s; design 1: one and a half of 30 s; design 2: three of 20 s (mean)
    assert state.seconds_left() == pytest.approx((10 + 45 + 60) / 2)


def test_the_live_table_shows_every_design_and_leaves_one_line() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=90, height=30, force_terminal=True)
    with LiveProgress(console) as progress:
        progress(started())
        progress(SharedWork(0.5, "hidden states"))
        assert "shared work: hidden states" in rendered(progress)
        progress(SharedWork(1.0, "hidden states"))
        progress(TrialFinished("design 0", 0, 0.5, 60.0, False))
        progress(TrialStarted("design 1", 0))
        progress(TrialProgress("design 1", 0, 0.5, "step 20"))
        lines = rendered(progress).splitlines()
        assert lines[0].split() == ["design", "trials", "accuracy", "each", "now"]
        assert lines[1].split() == ["design", "0", "1/2", "0.5000", "1", "min", "00", "s"]
        assert lines[2].split()[:3] == ["design", "1", "0/2"]
        assert lines[2].rstrip().endswith("seed 0: 50 % step 20")
        assert "1/4 trials" in lines[-1]
        assert "about 2 min 30 s left" in lines[-1]
        progress(StudyFinished(4, 0, False, 12.0))
    assert stream.getvalue().rstrip().endswith("finished: 4 of 4 trials in 12 s")
    assert stream.getvalue().endswith("\n")
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back


def rendered(progress: LiveProgress) -> str:
    stream = io.StringIO()
    Console(file=stream, width=90, height=30).print(progress._table())
    return stream.getvalue()


def test_an_error_in_the_study_gives_the_terminal_back() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=90, height=30, force_terminal=True)

    def interrupted() -> None:
        with LiveProgress(console) as progress:
            progress(started())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in stream.getvalue()


def test_more_designs_than_lines_shows_running_and_best() -> None:
    state = _StudyState(started(40))
    for i in range(20):
        state.add(TrialFinished(f"design {i}", 0, float(i), 1.0, False))
    state.add(TrialStarted("design 30", 0))
    shown = _visible(state, 5)
    assert shown == ["design 17", "design 18", "design 19", "design 30"]
    assert _visible(state, 40) == list(state.designs)


def test_events_before_the_start_are_refused() -> None:
    with pytest.raises(RuntimeError, match="StudyStarted"):
        LiveProgress(Console(file=io.StringIO()))(TrialStarted("a", 0))
