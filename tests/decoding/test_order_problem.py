"""Readings in several orders against brute force: every order as text, one candidate at a time."""

from __future__ import annotations

import itertools
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.selection.tiny_selection import save_language_model

from bakeoff.data.prompts import Prompt
from bakeoff.decoding.baselines import order_model
from bakeoff.decoding.problem import ordering
from bakeoff.decoding.problem.ordering import (
    ORDER_METRICS,
    OrderProblem,
    order_designs,
)
from bakeoff.decoding.set_based_prompting import OrderEnsembleModel, SetPrompt, SetPromptingModel
from bakeoff.decoding.winner import load_settings
from bakeoff.errors import DataError
from bakeoff.models import load_language_model
from bakeoff.study import Design, Study, Work

PLAIN = Design("plain-order", "plain-order")
SET = Design("set-based", "set-based")
CHOICES = (
    Prompt("Which one barks?", answers=("a dog",), options=("cat", "a dog", "trees")),
    Prompt('Which has "leaves"?', answers=("oak", "fig"), options=("oak", 'the "x"', "fig")),
    Prompt("Two?", answers=("2",), options=("2", "three"), document="Numbers."),
)
FOUND = (
    Prompt(
        "Who wrote?",
        answers=("Ann",),
        options=("Ann", "Bob"),
        passages=("Ann wrote.", "It is a blue one.", "Bob read."),
    ),
    Prompt("What?", answers=("red",), options=("red", "blue"), passages=("x red", "y blue")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("order")
    save_language_model(made / "model")
    return made


@pytest.fixture(scope="module")
def language_model(folder):
    return load_language_model(str(folder / "model"))


def problem_of(folder, prompts=CHOICES, **options):
    return OrderProblem(prompts, **{"model": str(folder / "model"), "n_orders": 6, **options})


def trial(problem, design, tmp_path, seed=0, name="trial"):
    place = tmp_path / name
    place.mkdir(exist_ok=True)
    return problem.run(design, seed, Work(place))


def answers_of(found):
    return [each["answers"] for each in json.loads((found.artifact / "answers.json").read_text())]


def arrays(found, *, without=("seconds",)):
    return {
        (metric, task): values
        for metric, tasks in found.scores.items()
        for task, values in tasks.items()
        if metric not in without
    }


# Brute force --------------------------------------------------------------------------------------


def quoted(option):
    return '"' + option.replace('"', "'") + '"'


def laid_out(prompt):
    """Return (text before, pieces, text behind, candidates) as the page says they look."""
    document = f"{prompt.document}\n\n" if prompt.document else ""
    if prompt.passages:
        before = "Answer the question with the help of the passages.\n"
        pieces = [f"Passage: {passage}\n" for passage in prompt.passages]
        behind = f"Question: {prompt.text}\nAnswer:"
        return document + before, pieces, behind, [f" {option}" for option in prompt.options]
    pieces = [f"{quoted(option)} " for option in prompt.options]
    behind = [f" {quoted(option)}" for option in prompt.options]
    return f"{document}{prompt.text}\n", pieces, "\nAnswer:", behind


def mean_log_probability(language_model, ids, n_prompt, positions=None, mask=None):
    arguments = {} if positions is None else {"position_ids": positions, "attention_mask": mask}
    with torch.no_grad():
        logits = language_model.model(torch.tensor([ids]), **arguments).logits[0].double()
    steps = torch.log_softmax(logits, -1)[n_prompt - 1 : -1]
    return float(steps[torch.arange(len(steps)), torch.tensor(ids[n_prompt:])].mean())


def bytes_of(language_model, text):
    return language_model.tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_scores(language_model, before, pieces, behind, candidates):
    head = bytes_of(language_model, before + "".join(pieces) + behind)
    return [
        mean_log_probability(language_model, head + bytes_of(language_model, text), len(head))
        for text in candidates
    ]


def set_scores(language_model, before, pieces, behind, candidates):
    """Positions and mask by the definition, one candidate at a time."""
    scores = []
    for candidate in candidates:
        start = bytes_of(language_model, before)
        ids, positions, owner = list(start), list(range(len(start))), [-1] * len(start)
        parts = [bytes_of(language_model, piece) for piece in pieces]
        for number, part in enumerate(parts):
            ids += part
            positions += range(len(start), len(start) + len(part))
            owner += [number] * len(part)
        follows = len(start) + max(map(len, parts))
        behind_ids = bytes_of(language_model, behind)
        n_prompt = len(ids) + len(behind_ids)
        tail = behind_ids + bytes_of(language_model, candidate)
        ids += tail
        positions += range(follows, follows + len(tail))
        owner += [-1] * len(tail)
        n = len(ids)
        sees = [
            [k <= q and not (owner[q] != owner[k] and min(owner[q], owner[k]) >= 0)
             for k in range(n)]
            for q in range(n)
        ]  # fmt: skip
        mask = torch.zeros(1, 1, n, n).masked_fill(~torch.tensor(sees), torch.finfo().min)
        scores.append(
            mean_log_probability(language_model, ids, n_prompt, torch.tensor([positions]), mask)
        )
    return scores


def expected(prompt, scored, picks):
    """Return the metrics from scores (orders, candidates) and the picked candidates."""
    scored = np.array(scored)
    accepted = [option in prompt.answers for option in prompt.options]
    right = [accepted[pick] for pick in picks]
    return {
        "accuracy": np.mean(right),
        "every_order": float(all(right)),
        "consistency": float(len(set(picks)) == 1),
        "log_probability": scored[:, accepted].max(axis=1).mean(),
        "spread": (scored.max(axis=0) - scored.min(axis=0)).max(),
    }


@pytest.mark.parametrize("prompts", [CHOICES, FOUND], ids=["options", "passages"])
@pytest.mark.parametrize(
    "design",
    [
        PLAIN,
        SET,
        Design("sorted", "sorted-order"),
        Design("vote", "permute-and-vote"),
        Design("mean", "average-over-orders", {"n_orders": None}),
    ],
    ids=lambda design: design.name,
)
def test_metrics_are_those_of_brute_force_over_all_orders(
    folder, language_model, tmp_path, prompts, design
):
    found = trial(problem_of(folder, prompts), design, tmp_path)
    task = "passages" if prompts is FOUND else "options"
    assert set(arrays(found)) == {(name, task) for name in ORDER_METRICS if name != "seconds"}
    method = set_scores if design is SET else plain_scores
    for number, prompt in enumerate(prompts):
        before, pieces, behind, candidates = laid_out(prompt)
        every = np.array(
            [
                method(language_model, before, order, behind, candidates)
                for order in itertools.permutations(sorted(pieces))
            ]
        )
        if design.name in ("plain-order", "set-based"):
            scored, picks = every, every.argmax(axis=1).tolist()
        elif design.name == "sorted":
            scored, picks = every[:1], [int(every[0].argmax())]
        else:
            scored = every.mean(axis=0, keepdims=True)
            votes = np.bincount(every.argmax(axis=1), minlength=len(candidates))
            key = votes if design.name == "vote" else np.zeros(len(candidates))
            picks = [max(range(len(candidates)), key=lambda i: (key[i], scored[0][i]))]
        for name, value in expected(prompt, scored, picks).items():
            got = found.scores[name][task][number]
            assert got == pytest.approx(value, abs=2e-5), (prompt.text, name)


def test_the_tiny_model_depends_on_the_order_and_only_both_edits_hide_it(folder, tmp_path):
    problem = problem_of(folder)
    spread = {
        design.name: trial(problem, design, tmp_path).scores["spread"]["options"]
        for design in order_designs()
        if design.method in ("plain-order", "set-based")
    }
    assert spread["set-based"].max() < 2e-5
    for name in ("plain-order", "set-based, mask only", "set-based, positions only"):
        assert spread[name].min() > 1e-3, name


def test_an_answer_that_changes_with_the_order_is_seen(folder, tmp_path, monkeypatch):
    """Scores that only the place of a piece decides: first in the list is best."""

    def first_listed(self, rows, choices, normalize):
        (row,), (options,) = rows, choices
        text = bytes(self.tokenizer.decode(row[0].ids), "utf-8").decode()
        places = [text.index(self.tokenizer.decode(ids).strip()) for ids in options]
        return [-np.array(places, dtype=float)]

    prompts = [Prompt("?", answers=("ab",), options=("ab", "cd", "ef"))] * 2
    problem = problem_of(folder, prompts)
    problem.prepare([PLAIN], [0], Work(tmp_path))
    monkeypatch.setattr(ordering._PromptModel, "_likelihoods", first_listed)
    found = trial(problem, PLAIN, tmp_path)
    got = {name: values["options"][0] for name, values in found.scores.items()}
    # Pieces such as '"ab" ' are 5 letters long, and "?\n" stands before.
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert (got["every_order"], got["consistency"], got["spread"]) == (0, 0, 10)
    assert got["log_probability"] == pytest.approx(-7)
    assert sorted(answers_of(found)[0]) == ["ab", "ab", "cd", "cd", "ef", "ef"]


def test_a_vote_of_few_orders_is_the_components_vote(folder, language_model, tmp_path):
    problem = problem_of(folder, n_orders=4)
    for aggregate, method in (("vote", "permute-and-vote"), ("mean", "average-over-orders")):
        found = trial(problem, Design("x", method, {"n_orders": 2}), tmp_path, seed=5)
        rival = OrderEnsembleModel(language_model, n_orders=2, aggregate=aggregate, random_state=5)
        for number, item in enumerate(problem._items):
            orders = item.presentations(4, 5)
            best = rival.predict(orders, [item.candidates] * len(orders))
            assert answers_of(found)[number] == [item.answers[i] for i in best]
        assert found.cost["passes_per_answer"] == 2


# Generated answers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(folder):
    """A model that says nothing but letters: all other tokens' logits are 0."""
    made = load_language_model(str(folder / "model"))
    others = [n for n in range(259) if not made.tokenizer.decode([n]).isalpha()]
    with torch.no_grad():
        made.model.get_output_embeddings().weight[others] = 0
    made.model.save_pretrained(folder / "letters")
    made.tokenizer.save_pretrained(folder / "letters")
    return folder / "letters"


def test_free_answers_are_generated_and_searched(folder, letters, tmp_path):
    language_model = load_language_model(str(letters))
    passages = ("Ann wrote.", "It is blue.", "Bob read.")
    asked = [Prompt("Who?", answers=("nobody",), passages=passages)] * 2
    before, pieces, behind, _ = laid_out(asked[0])
    made = {}
    for order in itertools.permutations(pieces):
        ids = torch.tensor([bytes_of(language_model, before + "".join(order) + behind)])
        output = language_model.model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        text = language_model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        made[order] = ordering._first_line(text)
    accepted = min(made.values())
    assert len(set(made.values())) > 1
    prompts = [replace(asked[0], answers=("not this", accepted)), asked[1]]
    problem = problem_of(folder, prompts, max_new_tokens=6, model=str(letters))
    found = trial(problem, PLAIN, tmp_path)
    assert sorted(answers_of(found)[0]) == sorted(made.values())
    share = np.mean([ordering._contains(text, accepted) for text in made.values()])
    assert found.scores["accuracy"]["passages"].tolist() == [share, 0]
    consistent = float(len(set(made.values())) == 1)
    assert found.scores["consistency"]["passages"].tolist() == [consistent] * 2
    # The reference's likelihood is that of scoring it, whatever was generated.
    every = np.array(
        [
            plain_scores(language_model, before, order, behind, [" not this", f" {accepted}"])
            for order in itertools.permutations(pieces)
        ]
    )
    assert found.scores["log_probability"]["passages"][0] == pytest.approx(
        every.max(axis=1).mean(), abs=2e-5
    )
    for design in order_designs():
        got = trial(problem, design, tmp_path, name=design.name)
        assert all(np.isfinite(values).all() for values in arrays(got, without=()).values())
    orders = [replace_order(problem._items[0].prompt, order) for order in made]
    free = SetPromptingModel(language_model).generate(orders, max_new_tokens=6)
    got = trial(problem, SET, tmp_path)
    assert set(answers_of(got)[0]) == {ordering._first_line(free[0])}
    assert got.scores["consistency"]["passages"].tolist() == [1, 1]


def replace_order(prompt, pieces):
    return SetPrompt(prompt.prefix, [list(pieces)], prompt.suffix)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is PARIS, of course.", "Paris", True),
        ("Comparison", "paris", False),
        ("New  York", "new york", True),
        ("new town of york", "New York", False),
        ("a + b", "+", True),
        ("a - b", "+", False),
        ("", "Paris", False),
        ("Ünï", "ünï", True),
    ],
)
def test_an_answer_contains_the_reference_as_whole_words(answer, reference, right):
    assert ordering._contains(answer, reference) is right


def test_only_the_first_line_of_an_answer_counts():
    assert ordering._first_line(" \n One  Two\nThree") == "one two"
    assert ordering._first_line(" \n ") == ""


# What is shared, and what not ---------------------------------------------------------------------


def test_equal_input_is_run_once_and_charged_each_time(folder, tmp_path, monkeypatch):
    run = []
    original = ordering._PromptModel._likelihoods
    monkeypatch.setattr(
        ordering._PromptModel,
        "_likelihoods",
        lambda self, *rest: run.append(type(self).__name__) or original(self, *rest),
    )
    problem = problem_of(folder, CHOICES[:2])

    def n_run(design, seed=0):
        before = len(run)
        return trial(problem, design, tmp_path, seed), len(run) - before

    problem.prepare([PLAIN], [0], Work(tmp_path))
    found, n = n_run(Design("sorted", "sorted-order"))
    assert n == 2  # one per prompt, for all presentations
    assert found.scores["spread"]["options"].tolist() == [0, 0]
    found, n = n_run(Design("vote", "permute-and-vote"))
    assert n == 2 * 5  # of 6 orders the sorted one is known
    assert found.cost["passes_per_answer"] == 6
    known = list(problem._loaded.passes.values())
    total = sum(each.seconds for each in known)
    assert found.scores["seconds"]["options"].sum() == pytest.approx(total)
    assert n_run(PLAIN, seed=3)[1] == 0
    # The order of pieces is other input to set-based prompting: nothing is taken for granted.
    assert n_run(SET)[1] == 2 * 6
    assert n_run(SET, seed=9)[1] == 0
    sorts = Design("set, sorted", "set-based", {"canonical_order": True})
    found, n = n_run(sorts)
    assert n == 0
    assert found.scores["spread"]["options"].tolist() == [0, 0]


@pytest.fixture(scope="module")
def busy(folder, tmp_path_factory):
    """A problem on which every design has run."""
    problem = problem_of(folder, (*CHOICES, *FOUND), n_orders=3)
    for design in order_designs():
        trial(problem, design, tmp_path_factory.mktemp("busy"))
    return problem


@pytest.mark.parametrize("design", order_designs(), ids=lambda design: design.name)
def test_a_trial_does_not_depend_on_what_ran_before_nor_on_the_process(busy, tmp_path, design):
    packed = pickle.dumps(busy)
    assert len(packed) < 10_000
    one = trial(busy, design, tmp_path, seed=1, name="one")
    two = trial(pickle.loads(packed), design, tmp_path, seed=1, name="two")
    for key, values in arrays(one).items():
        np.testing.assert_allclose(values, arrays(two)[key], atol=2e-5, err_msg=str(key))
    assert answers_of(one) == answers_of(two)
    assert set(one.scores["accuracy"]) == {"options", "passages"}


def test_presentations_follow_the_seed_and_not_the_listing(folder):
    items = problem_of(folder)._items
    for item in items[:2]:
        drawn = [item.presentations(3, seed) for seed in range(20)]
        assert item.presentations(3, 4) == drawn[4]
        assert all(len({order.text for order in each}) == 3 for each in drawn)
        assert len({order.text for each in drawn for order in each}) == 6
        listed = replace(item, prompt=item.prompt.orders()[3])
        assert listed.presentations(3, 4) == drawn[4]
    assert len(items[2].presentations(6, 0)) == 2  # two pieces have no more orders


def test_the_fingerprint_follows_what_scores_depend_on(folder, tmp_path):
    save_language_model(tmp_path / "other", seed=1)
    free = replace(FOUND[0], options=())
    prints = {
        problem_of(folder).fingerprint(),
        problem_of(folder, CHOICES[::-1]).fingerprint(),
        problem_of(folder, n_orders=5).fingerprint(),
        problem_of(folder, model=str(tmp_path / "other")).fingerprint(),
        problem_of(folder, [free, free]).fingerprint(),
        problem_of(folder, [free, free], max_new_tokens=3).fingerprint(),
    }
    assert len(prints) == 6
    assert problem_of(folder, max_new_tokens=3).fingerprint() == problem_of(folder).fingerprint()
    problem = problem_of(folder)
    trial(problem, PLAIN, tmp_path)
    assert pickle.loads(pickle.dumps(problem)).fingerprint() == problem_of(folder).fingerprint()


def test_numbers_that_overflow_count_as_a_floor_and_wrong(folder, tmp_path, monkeypatch):
    def broken(self, rows, choices, normalize):
        return [np.array([np.nan, -np.inf, -np.inf][: len(choices[0])])]

    monkeypatch.setattr(ordering._PromptModel, "_likelihoods", broken)
    found = trial(problem_of(folder, CHOICES[:2]), PLAIN, tmp_path)
    assert found.scores["log_probability"]["options"].tolist() == [-100, -100]
    assert found.scores["accuracy"]["options"].tolist() == [0, 0]
    assert found.scores["spread"]["options"].tolist() == [0, 0]


# A study ------------------------------------------------------------------------------------------


def test_a_whole_study_runs_and_describes_itself(folder, tmp_path):
    problem = problem_of(folder, (*CHOICES, *FOUND), n_orders=2)
    results = Study(
        problem, order_designs(), reference="plain-order", seeds=2, directory=tmp_path
    ).run()
    assert not results["failures"]
    assert results["study"]["trials"]["finished"] == 16
    assert next(iter(results["metrics"])) == "accuracy"
    facts = problem.describe()
    assert facts["question"] == "how to read pieces that have no order"
    assert facts["data"] == {
        "options": "3 prompts, 2 to 3 options each",
        "passages": "2 prompts, 2 to 3 passages each",
    }


def test_a_trial_says_how_far_orders_differ_and_reports_progress(folder, tmp_path):
    seen = []
    found = problem_of(folder).run(SET, 0, Work(tmp_path, lambda *said: seen.append(said)))
    assert seen == [(n / 3, "answering") for n in (1, 2, 3)]
    largest = re.search(r"at most (\S+)\.$", found.notes[0])[1]
    assert float(largest) == pytest.approx(found.scores["spread"]["options"].max(), rel=0.06)


@pytest.mark.parametrize(
    "design",
    [*order_designs(), Design("canonical", "set-based", {"canonical_order": True})],
    ids=lambda design: design.name,
)
def test_a_winner_leaves_with_lines_that_run(folder, tmp_path, design):
    problem = problem_of(folder)
    found = trial(problem, design, tmp_path)
    winner = tmp_path / "winner"
    assert problem.export(design, found.artifact, winner, reason="it won") is False
    settings = load_settings(winner)
    assert (settings.method, settings.params) == (design.method, dict(design.params))
    assert (winner / "answers.json").read_text() == (found.artifact / "answers.json").read_text()
    lines = problem.usage(winner)
    readme = (winner / "README.md").read_text()
    assert "it won" in readme
    assert "\n".join(lines) in readme
    names = {}
    exec("\n".join(lines), names)
    assert names["best"].shape == (1,)
    assert len(names["answers"]) == 1
    reader, arguments = order_model(
        settings.method, settings.params, load_language_model(settings.model)
    )
    assert type(reader) is type(names["reader"])
    assert vars(reader).keys() == vars(names["reader"]).keys()
    again = reader.predict([names["choice"]], [' "oak"', ' "fig"'], **arguments)
    assert again.tolist() == names["best"].tolist()


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (CHOICES[:1], "prompts must hold at least 2 to compare orders, got 1"),
        ((CHOICES[0], Prompt("free?", answers=("x",))), r"prompts\[1\] \('free\?'\) has neither"),
        (
            (Prompt("one?", answers=("x",), options=("x",)), CHOICES[0]),
            r"prompts\[0\] \('one\?'\) has 1 options: a set needs at least 2 pieces",
        ),
        (
            (Prompt("one?", answers=("x",), options=("x", "y"), passages=("p",)), CHOICES[0]),
            r"has 1 passages: a set needs at least 2",
        ),
        ((replace(CHOICES[0], answers=()), CHOICES[1]), r"prompts\[0\] .* has no answers"),
    ],
)
def test_prompts_without_a_set_or_an_answer_are_refused(folder, prompts, message):
    with pytest.raises(DataError, match=message):
        problem_of(folder, prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_orders": 1}, "n_orders must be a whole number of at least 2, got 1"),
        ({"n_orders": 2.5}, "n_orders must be a whole number of at least 2, got 2.5"),
        ({"n_orders": True}, "n_orders must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(folder, options, message):
    with pytest.raises(DataError, match=message):
        problem_of(folder, **options)


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("x", "setbased"), "design 'x': setbased does not say how to read pieces"),
        (Design("x", "plain-order", {"n_orders": 2}), "design 'x': plain-order takes joint_tokens"),
        (Design("x", "set-based", {"edit_mask": 1}), "design 'x': edit_mask must be a boolean"),
        (Design("x", "permute-and-vote", {"n_orders": 0}), "design 'x': n_orders must be a pos"),
        (Design("x", "permute-and-vote", {"n_orders": True}), "design 'x': n_orders must be"),
    ],
)
def test_designs_that_cannot_run_are_refused(folder, tmp_path, design, message):
    problem = problem_of(folder)
    for refused in (
        problem.check,
        lambda d: problem.prepare([PLAIN, d], [0], Work(tmp_path)),
        lambda d: trial(problem, d, tmp_path),
    ):
        with pytest.raises(DataError, match=message):
            refused(design)
    with pytest.raises(DataError, match="does not say"):
        problem.method_version("nothing")


def test_a_vote_over_too_many_orders_is_refused_before_it_begins(folder):
    many = Prompt("?", answers=("0",), options=tuple(map(str, range(9))))
    problem = problem_of(folder, [many, many])
    problem.check(Design("x", "permute-and-vote", {"n_orders": 24}))
    problem.check(PLAIN)
    with pytest.raises(DataError, match="design 'x': a prompt's pieces have 362,880 orders"):
        problem.check(Design("x", "average-over-orders"))


def test_a_prompt_that_does_not_fit_the_model_is_named(folder, tmp_path):
    text = "x" * 987
    fits = Prompt(text, answers=("ab",), options=("ab", "cd"))
    # 987 letters, a line break, two pieces of 5, "\nAnswer:" and the 5 of ' "ab"' make 1,011.
    trial(problem_of(folder, [fits] * 2), SET, tmp_path)
    trial(problem_of(folder, [replace(fits, text=text + "x" * 13)] * 2), SET, tmp_path)
    longer = problem_of(folder, [fits, replace(fits, text=text + "x" * 14)])
    for refused in (
        lambda: longer.prepare([PLAIN], [0], Work(tmp_path)),
        lambda: trial(longer, PLAIN, tmp_path),
    ):
        with pytest.raises(DataError, match=r"prompts\[1\] .* needs 1,025 positions .* has 1,024"):
            refused()
    free = Prompt("?", answers=("a",), passages=("p" * 300, "q" * 300))
    with pytest.raises(DataError, match="positions with its answer"):
        problem_of(folder, [free] * 2, max_new_tokens=800).prepare([], [0], Work(tmp_path))
