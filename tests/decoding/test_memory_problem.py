"""How documents are read, as a study: designs at one budget, paired scores, refusals, a winner."""

from __future__ import annotations

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
import torch
from tests.models import tiny
from tests.selection.tiny_selection import byte_tokenizer, save_encoder, save_language_model

from bakeoff.data.long_documents import LongDocuments
from bakeoff.data.prompts import Prompt
from bakeoff.decoding.document_baselines import FullReader
from bakeoff.decoding.problem.memory import (
    MEMORY_METRICS,
    MemoryProblem,
    contains,
    memory_designs,
)
from bakeoff.decoding.winner import load_settings
from bakeoff.errors import DataError
from bakeoff.models import load_language_model
from bakeoff.study import Design, Study, Work

FULL = Design("full-attention", "full-attention")
TIMES = ("seconds_to_first_token", "tokens_per_second")
STABLE = tuple(name for name in MEMORY_METRICS if name not in TIMES)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Tiny models, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("memory")
    save_language_model(made / "base", length=2048)
    save_encoder(made / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def prompts(n=3, length=400):
    """Questions about documents of `length` bytes and a little more."""
    found = []
    for number in range(n):
        lines = [f"Line {i} of text {number} tells of a cat." for i in range(length // 35)]
        lines.insert(number, f"The key of text {number} is {4711 + number}.")
        found.append(
            Prompt(
                f"Which key has text {number}?", (str(4711 + number),), document="\n\n".join(lines)
            )
        )
    return found


def problem(folder, given=None, **changes):
    options = {
        "model": str(folder / "base"),
        "embedder": str(folder / "encoder"),
        "n_init": 8,
        "n_local": 96,
        "block_size": 16,
        "topk": 3,
        "exec_chunk": 32,
        "max_new_tokens": 5,
        "n_scored": 12,
        **changes,
    }
    return MemoryProblem(prompts() if given is None else given, **options)


def trial(given, design, tmp_path, seed=0, name="trial"):
    directory = tmp_path / name
    directory.mkdir()
    return given.run(design, seed, Work(directory))


def of(found, metrics=STABLE):
    return np.array([[v for units in found.scores[m].values() for v in units] for m in metrics])


# Every design -------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", memory_designs(), ids=lambda design: design.name)
def test_every_design_reads_and_is_scored(design, folder, tmp_path):
    made = problem(folder)
    made.check(design)
    seen = []
    work = Work(tmp_path, lambda fraction, message: seen.append(fraction))
    found = made.run(design, 0, work)
    assert list(found.scores) == list(MEMORY_METRICS) == list(made.metrics)
    for units in found.scores.values():
        assert units["prompts"].shape == (3,)
        assert np.isfinite(units["prompts"]).all()
    assert set(found.scores["quality"]["prompts"]) <= {0.0, 1.0}
    assert (found.scores["log_probability"]["prompts"] < 0).all()
    for metric in ("text_loss", "memory_bytes", *TIMES):
        assert (found.scores[metric]["prompts"] > 0).all()
    assert seen == sorted(seen)
    assert 0 < min(seen) < max(seen) <= 1
    answers = json.loads((found.artifact / "answers.json").read_text())["prompts"]
    assert [row["accepted"] for row in answers] == [["4711"], ["4712"], ["4713"]]
    reads_all = design.method in ("full-attention", "streaming", "infllm")
    for row in answers:
        assert (row["tokens_read"] == row["document_tokens"]) == reads_all
    # Anew, beside other designs, in another process: the same but for times.
    fresh = pickle.loads(pickle.dumps(made))
    fresh.prepare([FULL, design], [0], Work(tmp_path))
    np.testing.assert_allclose(of(trial(fresh, design, tmp_path)), of(found), rtol=1e-5)


def test_names_and_reference_of_the_designs():
    names = [design.name for design in memory_designs()]
    assert len(set(names)) == len(names)
    assert {"full-attention", "streaming", "keep-end", "retrieve", "infllm"} <= set(names)
    assert "full-attention" not in [d.name for d in memory_designs(full_attention=False)]


def test_within_the_window_infllm_is_full_attention(folder, tmp_path):
    made = problem(folder, n_local=700)
    expected = of(trial(made, FULL, tmp_path), STABLE[:3])
    for number, design in enumerate(memory_designs()):
        if design.method in ("infllm", "streaming", "retrieve", "truncate-middle", "keep-end"):
            found = of(trial(made, design, tmp_path, name=str(number)), STABLE[:3])
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=design.name)


def test_scores_are_those_of_the_model_itself(folder, tmp_path):
    given = prompts()
    # What the model says right after the prompt is an accepted answer for the last prompt.
    model = load_language_model(folder / "base")
    asked = f"{given[2].document}\n\n{given[2].text}\nAnswer:"
    ids = model.tokenizer(asked, return_tensors="pt")["input_ids"]
    said = model.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    text = model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    given[2] = Prompt(given[2].text, (text, "4713"), document=given[2].document)
    made = problem(folder, given)
    found = trial(made, FULL, tmp_path)
    assert found.scores["quality"]["prompts"][2] == 1.0
    assert found.scores["quality"]["prompts"][:2].tolist() == [0.0, 0.0]
    read = FullReader(model).read(given[2].document, given[2].text)
    best = max(read.log_probability(answer) for answer in given[2].answers)
    assert found.scores["log_probability"]["prompts"][2] == pytest.approx(best, abs=1e-5)


def test_answers_count_as_whole_words_whatever_the_case():
    assert contains("It is  New\nYork, I think", "new york")
    assert contains("(4711)", "4711")
    assert not contains("14711", "4711")
    assert not contains("", "4711")
    assert contains("a+b? yes", "a+b?")


# Seeds --------------------------------------------------------------------------------------------


def test_a_seed_draws_other_documents_for_the_same_questions(folder, tmp_path):
    documents = LongDocuments((150,), (0.2, 0.8), n_numbers=2)
    made = problem(folder, documents)
    design = Design("keep-end", "keep-end")
    first = trial(made, design, tmp_path, 0, "0")
    other = trial(made, design, tmp_path, 1, "1")
    assert {task: v.shape for task, v in first.scores["quality"].items()} == {
        "pass keys": (2,),
        "numbers": (2,),
    }
    assert not np.array_equal(of(first), of(other))
    asked = [
        [row["question"] for rows in json.loads(text).values() for row in rows]
        for text in ((tmp_path / str(s) / "answers.json").read_text() for s in (0, 1))
    ]
    assert asked[0] == asked[1]
    assert "language reference" in made.describe()["data"]


def test_prompts_of_ones_own_are_the_same_for_every_seed(folder, tmp_path):
    made = problem(folder)
    design = Design("keep-end", "keep-end")
    one, two = (of(trial(made, design, tmp_path, seed, str(seed))) for seed in (0, 1))
    np.testing.assert_allclose(one, two, rtol=1e-6)


# Budgets, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("x", "vote-k"), "design 'x': vote-k does not say how to read documents"),
        (
            Design("x", "keep-end", {"topk": 2}),
            "'x': keep-end takes no parameters; got topk",
        ),
        (Design("x", "infllm", {"n_local": 97}), r"design 'x': n_init .* at most 152, .* got 153"),
        (Design("x", "infllm", {"repr_topk": 17}), "design 'x': repr_topk must not be larger"),
        (Design("x", "infllm", {"offload": "tape"}), "design 'x': offload must be one of"),
        (Design("x", "streaming", {"n_init": 152}), "design 'x': n_init must be between 0 and"),
        (Design("x", "retrieve", {"by": "luck"}), "design 'x': by must be 'words' or 'meaning'"),
    ],
)
def test_designs_that_cannot_run_are_refused(folder, design, message):
    with pytest.raises(DataError, match=message):
        problem(folder).check(design)


def test_a_design_may_divide_the_budget_otherwise(folder, tmp_path):
    made = problem(folder)
    other = Design("longer window", "infllm", {"n_local": 128, "topk": 1})
    made.check(other)
    found = trial(made, other, tmp_path)
    assert np.isfinite(of(found)).all()


def test_full_attention_is_refused_where_it_does_not_fit(folder):
    made = problem(folder, prompts(length=2300))
    with pytest.raises(DataError, match=r"design 'full-attention': the longest prompt has 2,\d+"):
        made.check(FULL)
    for design in memory_designs(full_attention=False):
        made.check(design)


def test_a_budget_beyond_what_the_model_was_trained_for_is_refused(folder):
    made = problem(folder, n_local=2048)
    with pytest.raises(DataError, match=r"design 'infllm': the budget of 2104 .* exceed the 2048"):
        made.check(Design("infllm", "infllm"))


def test_a_model_with_sliding_windows_is_refused_with_what_to_do(folder):
    from transformers import MistralForCausalLM

    path = folder / "sliding"
    with torch.random.fork_rng():
        config = tiny.config("mistral-window", vocab_size=259, max_position_embeddings=2048)
        MistralForCausalLM(config).save_pretrained(path)
    byte_tokenizer(length=2048).save_pretrained(path)
    made = problem(folder, model=str(path))
    for method in ("infllm", "streaming"):
        with pytest.raises(DataError, match=rf"design '{method}': .*Switch that off"):
            made.check(Design(method, method))
    made.check(Design("keep-end", "keep-end"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (prompts(1), "prompts must hold at least 2"),
        ([*prompts(2), Prompt("Who?", ("me",))], "prompt 2 has no document"),
        ([*prompts(2), Prompt("Who?", document="I.")], "prompt 2 has no answers.*'Who\\?'"),
    ],
)
def test_prompts_need_documents_and_answers(folder, given, message):
    with pytest.raises(DataError, match=message):
        problem(folder, given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_local": 0}, "n_local must be 1 or more"),
        ({"exec_chunk": 97}, "exec_chunk must not be larger than n_local"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"n_scored": 1}, "n_scored must be 0, or at least 2 .*, got 1"),
        ({"n_scored": -5}, "n_scored must be 0, or at least 2 .*, got -5"),
    ],
)
def test_sizes_out_of_range_are_refused(folder, changes, message):
    with pytest.raises(DataError, match=message):
        problem(folder, **changes)


def test_a_document_without_an_end_is_said_to_be_too_short(folder, tmp_path):
    given = [*prompts(2), Prompt("Who?", ("me",), document="I.")]
    with pytest.raises(DataError, match="a document of 2 tokens has no end to predict"):
        trial(problem(folder, given), Design("keep-end", "keep-end"), tmp_path)
    unscored = problem(folder, given, n_scored=0)
    assert "text_loss" not in unscored.metrics
    found = trial(unscored, Design("keep-end", "keep-end"), tmp_path, name="unscored")
    assert "text_loss" not in found.scores


def test_a_trial_that_fails_leaves_the_model_as_it_was(folder, tmp_path):
    made = problem(folder, [*prompts(2), Prompt("Who?", ("me",), document="I.")])
    with pytest.raises(DataError):
        trial(made, Design("infllm", "infllm"), tmp_path)
    whole = problem(folder)
    whole._models = made._models  # the same loaded model
    found = trial(whole, FULL, tmp_path, name="after")
    np.testing.assert_allclose(of(found), of(trial(problem(folder), FULL, tmp_path, name="new")))


# Fingerprint, pickling, study, winner -------------------------------------------------------------


def test_the_fingerprint_follows_everything_that_scores_depend_on(folder):
    save_language_model(folder / "other", seed=1, length=2048)
    same = problem(folder).fingerprint()
    assert problem(folder).fingerprint() == same
    changes = [
        {"given": prompts(2)},
        {"given": LongDocuments((150,), (0.2,), n_numbers=2)},
        {"model": str(folder / "other")},
        {"n_local": 97},
        {"repr_topk": 3},
        {"max_new_tokens": 6},
        {"n_scored": 13},
        {"chat": False},
    ]
    found = [problem(folder, **change).fingerprint() for change in changes]
    assert len({same, *found}) == len(changes) + 1


def test_models_stay_behind_when_pickled(folder):
    made = problem(folder)
    made.check(FULL)
    assert len(pickle.dumps(made)) < 10_000
    assert pickle.loads(pickle.dumps(made)).fingerprint() == made.fingerprint()
    assert json.dumps(made.describe())


def test_a_study_compares_them_and_the_winner_reads_on(folder, tmp_path):
    made = problem(folder)
    designs = [d for d in memory_designs() if d.name in ("streaming", "infllm")]
    study = Study(made, designs, reference="streaming", seeds=2, directory=tmp_path / "study")
    results = study.run()
    assert not results.data["failures"]
    for design in designs:
        found = trial(made, design, tmp_path, name=design.name)
        destination = tmp_path / f"{design.name} won"
        assert made.export(design, found.artifact, destination, reason="It won.") is False
        settings = load_settings(destination)
        assert (settings.method, settings.model) == (design.method, str(folder / "base"))
        assert "It won." in (destination / "README.md").read_text()
        code = "\n".join(made.usage(destination)).replace("document.txt", str(tmp_path / "d.txt"))
        (tmp_path / "d.txt").write_text(prompts()[1].document)
        question = prompts()[1].text
        code = code.replace("What does it say about ...?", question)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "usage", "exec"), {})
        answers = json.loads((destination / "answers.json").read_text())["prompts"]
        assert printed.getvalue().rstrip("\n") == answers[1]["answer"]


def test_full_attention_needs_no_bakeoff(folder, tmp_path):
    made = problem(folder)
    found = trial(made, FULL, tmp_path)
    assert made.export(FULL, found.artifact, tmp_path / "won") is True
