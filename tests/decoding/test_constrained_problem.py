"""Samplers' scores against brute force, estimates against exact values, and what is refused."""

import itertools
import json
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from tests.decoding.test_grammar import letter_tokenizer
from tests.decoding.test_grammar_aligned import LIMIT, PATTERN, PROMPT, Exact, tiny_model

from bakeoff.data.prompts import Prompt
from bakeoff.decoding.alignment_trie import AlignmentTrie
from bakeoff.decoding.grammar import Grammar, GrammarConstraint
from bakeoff.decoding.grammar_aligned import sample_aligned
from bakeoff.decoding.problem.constrained import (
    CONSTRAINED_METRICS,
    ConstrainedProblem,
    constrained_designs,
    sample_as,
)
from bakeoff.decoding.winner import load_settings
from bakeoff.errors import DataError
from bakeoff.study import Design, Study, Work

TEXT = "<s>bca"  # the tokens of PROMPT
MASKING = Design("masking", "gcd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("constrained")
    tiny_model().save_pretrained(made / "model")
    letter_tokenizer().save_pretrained(made / "model")
    assert letter_tokenizer()(TEXT)["input_ids"] == PROMPT
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def exact():
    return Exact(tiny_model())


def problem_of(folder, prompts=(TEXT, "<s>a"), **changes):
    options = {
        "grammar": Grammar.regex(PATTERN),
        "model": str(folder / "model"),
        "n_samples": 6,
        "max_new_tokens": LIMIT,
        "timed_prompts": 1,
        **changes,
    }
    return ConstrainedProblem(prompts, **options)


def trial(problem, design, directory, name="trial", seed=0):
    (directory / name).mkdir()
    return problem.run(design, seed, Work(directory / name))


def score(found, metric, task="enumerated", prompt=0):
    return float(found.scores[metric][task][prompt])


def kl(log_q_of, exact):
    return sum(q * math.log(q / exact.q[text]) for text, q in log_q_of.items() if q > 0)


def untimed(found):
    return {
        (metric, task): values.tolist()
        for metric, tasks in found.scores.items()
        for task, values in tasks.items()
        if task != "timed"
    }


# Scores -------------------------------------------------------------------------------------------


def test_masking_is_scored_by_brute_force(folder, exact, tmp_path):
    found = trial(problem_of(folder), MASKING, tmp_path)
    masked = exact.masked()
    assert score(found, "kl") == pytest.approx(kl(masked, exact), rel=1e-3)
    assert score(found, "first_kl") == pytest.approx(score(found, "kl"), rel=1e-12)
    assert score(found, "total_variation") == pytest.approx(exact.distance(masked), rel=1e-3)
    mean = sum(q * exact.log_p[text] for text, q in masked.items())
    assert score(found, "log_prob") == pytest.approx(mean, rel=1e-4)
    assert score(found, "legal") == 1
    assert {m: v["enumerated"].shape for m, v in found.scores.items() if "enumerated" in v} == {
        m: (2,) for m in CONSTRAINED_METRICS if m not in ("seconds", "tokens_per_second")
    }


@pytest.mark.parametrize("burn_in", [0, 1, 7, 200])
def test_asap_is_scored_by_what_its_trie_gives(folder, exact, tmp_path, burn_in):
    """The real sampler, replayed text by text with the same seed; Q and bounds by brute force."""
    n = 4
    problem = problem_of(folder, n_samples=n)
    design = Design("a", "asap", {"burn_in": burn_in})
    found = trial(problem, design, tmp_path, seed=3)
    model, tokenizer, rng = tiny_model(), letter_tokenizer(), np.random.default_rng([3, 0])
    trie = AlignmentTrie()
    settings = {"grammar": Grammar.regex(PATTERN), "max_new_tokens": LIMIT}
    expected = []
    for number in range(burn_in + n):
        if number >= burn_in:
            expected.append(kl(exact.aligned(trie), exact))
        sample_aligned(model, tokenizer, PROMPT, n=1, trie=trie, random_state=rng, **settings)
    assert score(found, "first_kl") == pytest.approx(expected[0], rel=1e-3, abs=1e-6)
    assert score(found, "kl") == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-6)


def test_asap_gets_there_and_masking_does_not(folder, tmp_path):
    problem = problem_of(folder)
    found = {
        n: trial(problem, Design(f"{n}", "asap", {"burn_in": n}), tmp_path, f"{n}")
        for n in (0, 1, 2000)
    }
    masked = score(trial(problem, MASKING, tmp_path), "kl")
    assert score(found[0], "first_kl") == pytest.approx(masked, abs=1e-9)
    assert score(found[2000], "kl") < 5e-3 < masked
    assert score(found[2000], "total_variation") < 0.05
    assert score(found[2000], "model_calls") > score(found[0], "model_calls")


def test_resampling_is_scored_by_the_weights_of_its_candidates(folder, exact, tmp_path):
    design = Design("r", "importance", {"candidates": 9})
    found = trial(problem_of(folder), design, tmp_path, seed=5)
    drawn = sample_aligned(
        tiny_model(),
        letter_tokenizer(),
        PROMPT,
        Grammar.regex(PATTERN),
        9,
        method="gcd",
        max_new_tokens=LIMIT,
        lookahead=1,
        random_state=np.random.default_rng([5, 0]),
    )
    weighted = {}
    for tokens, weight in zip(drawn.tokens, drawn.weights, strict=True):
        weighted[tokens] = weighted.get(tokens, 0.0) + weight
    assert score(found, "kl") == pytest.approx(kl(weighted, exact), rel=1e-3)
    distance = 0.5 * sum(abs(weighted.get(text, 0) - q) for text, q in exact.q.items())
    assert score(found, "total_variation") == pytest.approx(distance, rel=1e-3)
    assert score(found, "model_calls") == pytest.approx(drawn.n_model_calls / 6)
    many = Design("r", "importance", {"candidates": 3000})
    assert score(trial(problem_of(folder), many, tmp_path, "many"), "kl") < 0.05


@pytest.mark.parametrize("method", ["rejection", "adaptive"])
def test_exact_samplers_score_zero_where_they_deliver_and_as_masking_where_not(
    folder, exact, tmp_path, method
):
    patient = Design("p", method, {"max_failures": 5000})
    found = trial(problem_of(folder), patient, tmp_path)
    assert score(found, "kl") == pytest.approx(0, abs=1e-9)
    assert score(found, "legal") == 1
    expected = sum(q * exact.log_p[text] for text, q in exact.q.items())
    assert score(found, "log_prob") == pytest.approx(expected, rel=1e-4)
    hasty = Design("h", method, {"max_failures": 1})
    found = trial(problem_of(folder, n_samples=40), hasty, tmp_path, "hasty")
    delivered = score(found, "legal")
    assert delivered < 1
    masked = kl(exact.masked(), exact)
    assert score(found, "kl") == pytest.approx((1 - delivered) * masked, rel=1e-3)


def test_a_budget_of_calls_ends_learning(folder, tmp_path):
    problem = problem_of(folder, n_samples=1)
    for method in ("asap", "adaptive", "importance", "rejection"):
        calls = [
            trial(problem, Design("c", method, {"calls": n}), tmp_path, f"{method} {n}")
            for n in (3, 6)
        ]
        spent = [score(found, "model_calls") for found in calls]
        # A text that is begun is ended; learning is followed by one text.
        # Rejection learns nothing first: it can find its text before the budget is spent.
        assert (1 if method == "rejection" else 3) <= spent[0] <= 3 + 2 * LIMIT, method
        assert spent[0] <= spent[1] <= 6 + 2 * LIMIT, method
    endless = trial(problem, Design("c", "asap", {"calls": 10_000}), tmp_path)
    assert score(endless, "kl") < 0.05


def test_plain_sampling_is_legal_as_often_as_it_should_be(folder, exact, tmp_path):
    problem = problem_of(folder, n_samples=3000)
    found = trial(problem, Design("u", "unconstrained"), tmp_path)
    # Sum over legal and illegal texts of P log(P / Q), the latter with Q = 1e-9 P.
    legal = sum(exact.z * q * math.log(exact.z) for q in exact.q.values())
    assert score(found, "kl") == pytest.approx(legal + (1 - exact.z) * math.log(1e9), rel=1e-4)
    assert score(found, "total_variation") == pytest.approx(1 - exact.z, rel=1e-4)
    error = math.sqrt(exact.z * (1 - exact.z) / 3000)
    assert abs(score(found, "legal") - exact.z) < 4 * error
    assert score(found, "log_prob") < 0
    assert 1 <= score(found, "model_calls") <= LIMIT
    texts = json.loads((found.artifact / "texts.jsonl").read_text().splitlines()[0])["texts"]
    matching = np.mean([bool(re.fullmatch(PATTERN, text)) for text in texts])
    assert matching >= score(found, "legal")  # some match and were cut off


# Languages that are not enumerated ----------------------------------------------------------------


@pytest.fixture(scope="module")
def large(folder):
    """The same languages, which are too large by decree, with a good estimate of Z."""
    return problem_of(
        folder, [TEXT], max_prefixes=2, z_samples=3000, n_samples=1500, timed_prompts=0
    )


def test_estimates_are_near_what_they_estimate(folder, large, exact, tmp_path):
    enumerated = problem_of(folder, [TEXT], n_samples=1500)
    designs = [
        MASKING,
        Design("asap", "asap", {"burn_in": 30}),
        Design("impatient", "rejection", {"max_failures": 2}),
        Design("resampling", "importance", {"candidates": 40}),
    ]
    for design in designs:
        guess = trial(large, design, tmp_path, f"{design.name} guess")
        truth = trial(enumerated, design, tmp_path, f"{design.name} truth")
        assert "standard error of log Z" in guess.notes[0]
        for metric in ("kl", "total_variation", "log_prob", "legal"):
            close = pytest.approx(score(truth, metric), abs=0.12)
            assert score(guess, metric, "estimated") == close, (design.name, metric)
    masked = exact.masked()
    assert score(trial(large, MASKING, tmp_path), "kl", "estimated") == pytest.approx(
        kl(masked, exact), abs=0.1
    )


def test_exact_samplers_and_plain_sampling_need_no_estimate_but_that_of_z(large, exact, tmp_path):
    found = trial(large, Design("a", "adaptive", {"max_failures": 5000}), tmp_path)
    assert score(found, "kl", "estimated") == 0
    found = trial(large, Design("u", "unconstrained"), tmp_path, "u")
    assert score(found, "total_variation", "estimated") == pytest.approx(1 - exact.z, abs=0.01)


def test_cut_texts_are_accounted_for(folder, tmp_path):
    """Masking here is often cut off: its distribution is that of the texts it finishes."""
    options = {"grammar": Grammar.regex("[abc]{2,}"), "max_new_tokens": 4, "n_samples": 2000}
    truth = trial(problem_of(folder, [TEXT], **options), MASKING, tmp_path, "truth")
    large = problem_of(folder, [TEXT], max_prefixes=2, z_samples=3000, **options)
    guess = trial(large, MASKING, tmp_path, "guess")
    assert score(guess, "kl", "estimated") == pytest.approx(score(truth, "kl"), abs=0.1)


# Being a problem ----------------------------------------------------------------------------------


@pytest.mark.parametrize("design", constrained_designs(), ids=lambda design: design.name)
def test_every_design_runs_is_finite_and_repeats(folder, tmp_path, design):
    prompts = [TEXT, Prompt("a", options=("b0", "c", "ab"))]
    problem = problem_of(folder, prompts, grammar=[Grammar.regex(PATTERN), None])
    found, again = (trial(problem, design, tmp_path, name) for name in ("one", "two"))
    assert untimed(found) == untimed(again)
    assert set(found.scores) == set(problem.metrics)
    values = [v for tasks in found.scores.values() for v in tasks.values()]
    assert np.isfinite(np.concatenate(values)).all()
    for metric in ("seconds", "tokens_per_second"):
        assert found.scores[metric]["timed"].shape == (1,)
        assert (found.scores[metric]["timed"] > 0).all()
    lines = [json.loads(line) for line in (found.artifact / "texts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [TEXT, "a"]
    if design.method != "unconstrained":
        assert set(lines[1]["texts"]) <= {"b0", "c", "ab"}
        assert all(re.fullmatch(PATTERN, text) for text in lines[0]["texts"])


def test_the_clocked_run_draws_the_same_texts(folder, tmp_path, monkeypatch):
    """Timings are those of the run that is scored, though that one did without the model."""
    problem = problem_of(folder)
    seen = []
    original = ConstrainedProblem._answers

    def spy(self, *args, **more):
        seen.append(original(self, *args, **more))
        return seen[-1]

    monkeypatch.setattr(ConstrainedProblem, "_answers", spy)
    trial(problem, Design("a", "asap", {"burn_in": 20}), tmp_path)
    assert len(seen) == 3
    assert seen[0].texts == seen[1].texts
    assert seen[0].n_calls == seen[1].n_calls
    assert seen[0].texts != seen[2].texts


def test_a_pickled_problem_carries_no_model_and_gives_the_same_trial(folder, tmp_path):
    problem = problem_of(folder)
    design = Design("a", "asap", {"burn_in": 5})
    problem.prepare([design], [0], Work(tmp_path))
    mine = trial(problem, design, tmp_path, "mine")
    packed = pickle.dumps(problem)
    assert len(packed) < 10_000
    other = pickle.loads(packed)
    assert other.fingerprint() == problem.fingerprint()
    assert untimed(trial(other, design, tmp_path, "theirs")) == untimed(mine)


def test_a_new_process_gives_the_same_trial(folder, tmp_path):
    problem = problem_of(folder)
    design = Design("a", "asap", {"burn_in": 5})
    mine = trial(problem, design, tmp_path, "mine", seed=2)
    (tmp_path / "problem").write_bytes(pickle.dumps((problem, design)))
    code = (
        "import json, pickle, sys, pathlib\n"
        "from bakeoff.study import Work\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "problem, design = pickle.loads((here / 'problem').read_bytes())\n"
        "(here / 'theirs').mkdir()\n"
        "found = problem.run(design, 2, Work(here / 'theirs'))\n"
        "print(problem.fingerprint())\n"
        "print(json.dumps([[m, t, v.tolist()] for m, ts in found.scores.items()\n"
        "                  for t, v in ts.items() if t != 'timed']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    fingerprint, scores = done.stdout.splitlines()
    assert fingerprint == problem.fingerprint()
    assert {(m, t): values for m, t, values in json.loads(scores)} == untimed(mine)
    texts = [(tmp_path / who / "texts.jsonl").read_text() for who in ("mine", "theirs")]
    assert texts[0] == texts[1]


def test_languages_are_read_once_and_again_where_the_file_is_damaged(folder, tmp_path, monkeypatch):
    from bakeoff.decoding.language_tree import LanguageTree

    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))
    scored = []
    original = LanguageTree.score
    monkeypatch.setattr(
        LanguageTree,
        "score",
        lambda self, *args, **more: scored.append(1) or original(self, *args, **more),
    )
    messages = []
    problem_of(folder).prepare([MASKING], [0], Work(tmp_path, lambda *a: messages.append(a)))
    assert len(scored) == 2
    assert messages[-1] == (1.0, "reading languages")
    first = trial(problem_of(folder), MASKING, tmp_path, "first")
    assert len(scored) == 2
    for path in (tmp_path / "cache" / "languages").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    again = trial(problem_of(folder), MASKING, tmp_path, "again")
    assert len(scored) == 4
    assert untimed(first) == untimed(again)


def test_the_fingerprint_follows_what_scores_depend_on(folder, tmp_path):
    tiny_model(1).save_pretrained(tmp_path / "other")
    letter_tokenizer().save_pretrained(tmp_path / "other")
    changes = [
        {},
        {"prompts": [TEXT]},
        {"grammar": Grammar.regex("a|b")},
        {"grammar": [Grammar.regex(PATTERN), Grammar.regex("a")]},
        {"model": str(tmp_path / "other")},
        {"n_samples": 7},
        {"max_new_tokens": 4},
        {"temperature": 2.0},
        {"top_k": 5},
        {"chat": False},
        {"max_prefixes": 10},
        {"z_samples": 10},
        {"timed_prompts": 2},
    ]
    assert len({problem_of(folder, **change).fingerprint() for change in changes}) == len(changes)
    same = problem_of(folder, grammar=[re.compile(PATTERN)] * 2)
    assert same.fingerprint() == problem_of(folder).fingerprint()
    assert "seconds" not in problem_of(folder, timed_prompts=0).metrics


def test_temperature_changes_the_target(folder, tmp_path):
    warm = Exact(tiny_model(), temperature=1.7)
    found = trial(problem_of(folder, temperature=1.7), MASKING, tmp_path)
    assert score(found, "kl") == pytest.approx(kl(warm.masked(), warm), rel=1e-3)


def test_prompts_are_put_into_the_chat_template(folder, tmp_path):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}cc"
    tiny_model().save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    options = {"model": str(tmp_path / "chat")}
    assert problem_of(folder, [TEXT], **options)._prompt_ids(0) == [1, *PROMPT, 7, 7]
    assert problem_of(folder, [TEXT], **options, chat=False)._prompt_ids(0) == PROMPT
    prompt = Prompt("a", document="b", passages=("c",))
    text = letter_tokenizer()("b\n\nc\n\na")["input_ids"]
    assert problem_of(folder, [prompt])._prompt_ids(0) == text


def test_a_study_compares_all_of_it(folder, tmp_path):
    prompts = ["".join(each) for each in itertools.product("abc", repeat=2)]
    problem = problem_of(folder, prompts, timed_prompts=0)
    designs = constrained_designs()
    study = Study(problem, designs, reference="masking", seeds=2, directory=tmp_path / "study")
    results = study.run()
    assert not results.data["failures"]
    assert results.data["problem"]["description"]["question"].startswith("how to sample texts")
    found = {d["name"]: d["metrics"]["kl"]["overall"]["mean"] for d in results.data["designs"]}
    assert found["asap after 400"] < 0.05 < found["masking"] < found["unconstrained"]


# The winner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", constrained_designs(), ids=lambda design: design.name)
def test_winners_sample_from_their_folder(folder, tmp_path, design):
    problem = problem_of(folder)
    found = trial(problem, design, tmp_path)
    alone = problem.export(design, found.artifact, tmp_path / "winner", reason="it won")
    assert alone == (design.method == "unconstrained")
    settings = load_settings(tmp_path / "winner")
    assert (settings.method, settings.model) == (design.method, str(folder / "model"))
    assert "it won" in (tmp_path / "winner" / "README.md").read_text()
    scope = {}
    exec("\n".join(problem.usage(tmp_path / "winner")), scope)
    assert len(scope["texts"]) == 5
    if design.method != "unconstrained":
        assert all(re.fullmatch(PATTERN, text) for text in scope["texts"])
    other = sample_as(tmp_path / "winner", "<s>cc", 3, grammar=re.compile("0|1"))
    assert len(other) == 3
    assert len(sample_as(tmp_path / "winner", "<s>cc", 2)) == 2  # all prompts have one language
    with pytest.raises(DataError, match="n must be an integer of at least 1"):
        sample_as(tmp_path / "winner", TEXT, 0)


def test_a_winner_goes_on_from_what_it_learnt(folder, exact, tmp_path):
    design = Design("a", "asap", {"burn_in": 300})
    problem = problem_of(folder)
    found = trial(problem, design, tmp_path)
    problem.export(design, found.artifact, tmp_path / "winner")
    trie = AlignmentTrie.load(tmp_path / "winner" / "learnt" / "00000.safetensors")
    assert kl(exact.aligned(trie), exact) < 0.05
    # The trie is bound to the model, so that it is taken up without a word.
    more = sample_aligned(
        problem._language_model(),
        None,
        PROMPT,
        Grammar.regex(PATTERN),
        5,
        max_new_tokens=LIMIT,
        trie=trie,
        random_state=7,
    )
    assert list(more.texts) == sample_as(tmp_path / "winner", TEXT, 5, random_state=7)


def test_a_winner_needs_a_grammar_where_there_are_several(folder, tmp_path):
    problem = problem_of(folder, grammar=[Grammar.regex("a"), Grammar.regex("b")])
    found = trial(problem, MASKING, tmp_path)
    problem.export(MASKING, found.artifact, tmp_path / "winner")
    assert sample_as(tmp_path / "winner", "<s>a") == ["b"]
    with pytest.raises(DataError, match="none of the study's, and those have 2 different"):
        sample_as(tmp_path / "winner", "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "decoder.json").write_text(
        json.dumps({"format": 1, "name": "x", "method": "x", "params": {}, "model": "m"})
    )
    with pytest.raises(DataError, match="holds no sampler of a grammar, but 'x'"):
        sample_as(tmp_path / "other", "c")


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must hold at least 1"),
        ({"grammar": None}, r"prompt 1 \('<s>bca'\): give a grammar, or options"),
        ({"grammar": [Grammar.regex("a")]}, "one for each of 2 prompts, got 1"),
        ({"grammar": 3}, "prompt 1 .*: grammar must be a Grammar"),
        ({"grammar": 'start: "(" start ")"'}, "prompt 1 .*: the grammar describes no text at all"),
        ({"grammar": [re.compile("a"), {"type": "no"}]}, "prompt 2 .*: invalid JSON schema"),
        ({"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ({"n_samples": True}, "n_samples must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ({"z_samples": 1}, "z_samples must be an integer of at least 2"),
        ({"timed_prompts": -1}, "timed_prompts must be an integer of at least 0"),
        ({"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_bad_arguments_are_named(folder, changes, message):
    with pytest.raises(DataError, match=message):
        problem_of(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Proved by its shortest text, by trying all beginnings, and by none of many.
        ({"grammar": {"const": 111111111111}}, r"prompt 1 .* max_new_tokens=5: .* 12 bytes"),
        ({"grammar": re.compile("[01]{5}")}, "prompt 1 .*: no text .* all its 31 beginnings"),
        (
            {"grammar": re.compile("[01]{5}"), "max_prefixes": 3},
            "prompt 1 .*: none of 64 masked texts ended within max_new_tokens=5",
        ),
        # Characters that no token has.
        ({"grammar": re.compile("z")}, "prompt 1 .*no text"),
        ({"max_new_tokens": 1000}, "prompt 1 .*exceed the model's 128 positions"),
    ],
)
def test_languages_without_a_text_in_time_are_refused_before_any_trial(
    folder, tmp_path, changes, message
):
    problem = problem_of(folder, **changes)
    with pytest.raises(DataError, match=message):
        problem.prepare([MASKING], [0], Work(tmp_path))


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("x", "gad"), "design 'x': gad does not say how to sample .* asap, gcd"),
        (Design("x", "asap", {"burnin": 3}), "design 'x': asap takes burn_in, .* got burnin"),
        (Design("x", "gcd", {"burn_in": 3}), "design 'x': gcd takes no parameters"),
        (Design("x", "asap", {"burn_in": -1}), "design 'x': burn_in must be .* at least 0, got -1"),
        (Design("x", "asap", {"burn_in": 1.5}), "design 'x': burn_in must be an integer"),
        (Design("x", "importance", {"candidates": 0}), "candidates must be .* at least 1"),
        (Design("x", "asap", {"burn_in": 3, "calls": 4}), "give burn_in or calls, not both"),
        (Design("x", "rejection", {"max_failures": 0}), "max_failures must be .* at least 1"),
    ],
)
def test_designs_that_cannot_run_are_refused(folder, tmp_path, design, message):
    problem = problem_of(folder)
    for refused in (
        problem.check,
        lambda d: problem.prepare([d], [0], Work(tmp_path)),
        lambda d: problem.run(d, 0, Work(tmp_path)),
    ):
        with pytest.raises(DataError, match=message):
            refused(design)


def test_constraints_read_texts_as_they_were_written(folder):
    made = problem_of(folder)._constraint(0)
    assert isinstance(made, GrammarConstraint)
    assert made.text([6, 8, 8]) == "ab00"


@pytest.mark.model
@pytest.mark.parametrize("size", ["smoke", "laptop", "full"])
def test_the_claim_is_tried_on_the_papers_skewed_language(size, tmp_path):
    from bakeoff.claims.claim import load_claims

    claims, build = load_claims("grammar-aligned-decoding")
    study = build(size, tmp_path, 1)
    assert any("00000|1[01]{4}" in grammar.source for grammar in study.problem.grammars)
    # The central claim compares late ASAp with masking; early ASAp has a claim of its own.
    late = next(design for design in study.designs if design.name == claims[0].treatment)
    assert late.params["burn_in"] == 400
    assert "asap after 1" in {c.treatment for c in claims if c.expected == "not better"}
