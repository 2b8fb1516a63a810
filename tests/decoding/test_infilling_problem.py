"""The infilling problem on tiny decoders: equal budgets, equal starts, no leak, a winner."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.selection.tiny_selection import save_language_model

from bakeoff.data.splits import runs
from bakeoff.decoding.codegen2 import InfillTokens, plain_ids
from bakeoff.decoding.infilling import infill, infill_prompt
from bakeoff.decoding.problem import infilling as module
from bakeoff.decoding.problem.infilling import (
    INFILLING_METRICS,
    InfillingProblem,
    infilling_designs,
)
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Study, Work

SHAPE = SmallGPT(vocabulary=320, n_layers=1, width=32, n_heads=2, context=96)
CAUSAL = Design("causal LM", "causal")
SPANS = Design("span corruption", "span-corruption")
WORDS = ("alpha", "beta", "gamma", "delta", "zeta", "theta", "kappa", "sigma", "omega", "rho")


def function(number: int) -> str:
    """Return a function of about forty words that no other number gives."""
    rng = np.random.default_rng([number, 7])
    a, b, c, d = rng.choice(WORDS, 4, replace=False)
    n = rng.integers(100, 1000, 6)
    return (
        f"def {a}_{number}({b}, {c}):\n    {d} = {b} + {n[0]}\n    if {d} > {n[1]}:\n"
        f"        {c} = {c} - {n[2]} * {d}\n    for {a} in range({n[3]}):\n"
        f"        {d} += {c} * {a}\n    {b} = {d} % {n[4]}\n    return {b} + {c} + {n[5]}\n"
    )


TEXTS = tuple(function(number) for number in range(70))
TINY = {
    "shape": SHAPE,
    "n_tokens": 900,
    "batch_size": 4,
    "n_fills": 3,
    "max_new_tokens": 6,
    "max_characters": 400,
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny decoder of the user's own, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("infilling")
    save_language_model(made / "base", length=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def problem(texts=TEXTS, **changes):
    return InfillingProblem(texts, **{**TINY, **changes})


@pytest.fixture(scope="module")
def shared(folder):
    return problem()


def trial(one, design, folder, name="trial", seed=0):
    (folder / name).mkdir()
    return one.run(design, seed, Work(folder / name))


def weights(found):
    return load_file(found.artifact / "model" / "model.safetensors")


def same_weights(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def same_scores(one, other):
    for metric, tasks in one.scores.items():
        for task, values in tasks.items():
            np.testing.assert_allclose(other.scores[metric][task], values, rtol=1e-5, atol=1e-6)


# Trials -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", infilling_designs(), ids=lambda design: design.name)
def test_every_design_reads_the_same_budget_and_is_scored(shared, design, tmp_path):
    seen = []
    (tmp_path / "trial").mkdir()
    work = Work(tmp_path / "trial", lambda fraction, message: seen.append(fraction))
    found = shared.run(design, 1, work)
    n = len(shared.split.held_out["texts"])
    assert n >= 5
    assert {m: {t: v.shape for t, v in ts.items()} for m, ts in found.scores.items()} == {
        "infill_loss": {"texts": (n,)},
        "several_loss": {"texts": (n,)},
        "causal_loss": {"texts": (n,)},
        "exact": {"texts": (3,)},
        "compiles": {"texts": (3,)},
    }
    assert list(found.scores) == list(shared.metrics)
    for tasks in found.scores.values():
        assert all(np.isfinite(values).all() for values in tasks.values())
    # Sentinels and moved text counted: equal to within one batch of the longest sequences.
    assert 900 <= found.cost["training_tokens"] < 900 + 4 * 96
    assert 0 <= found.cost["causal_tokens"] <= found.cost["training_tokens"]
    assert found.cost["trained_parameters"] == sum(p.numel() for p in weights(found).values())
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 1
    again = trial(problem(), design, tmp_path, "again", seed=1)
    same_scores(found, again)


def test_span_corruption_that_is_always_causal_is_the_causal_decoder(shared, tmp_path):
    causal = trial(shared, CAUSAL, tmp_path, "causal")
    others = [
        Design("s", "span-corruption", {"p_causal": 1.0, "level": "sequence"}),
        Design("f", "fill-in-the-middle", {"p_causal": 1.0}),
    ]
    for number, design in enumerate(others):
        found = trial(shared, design, tmp_path, str(number))
        assert same_weights(causal, found)
        same_scores(causal, found)
    assert not same_weights(causal, trial(shared, SPANS, tmp_path, "spans"))


def test_designs_of_a_seed_start_alike_and_seeds_do_not(shared):
    def start(seed):
        model, tokenizer = shared._start(seed)
        assert len(InfillTokens.of(tokenizer).masks) == 64
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_depends_on_nothing_that_ran_before_or_beside_it(shared, tmp_path):
    for number, design in enumerate(infilling_designs()[:3]):
        trial(shared, design, tmp_path, f"before {number}", seed=5)
    mine = trial(shared, SPANS, tmp_path, "mine", seed=2)
    packed = pickle.dumps(shared)
    assert len(packed) < 200_000  # texts, no weights
    unpickled = pickle.loads(packed)
    assert unpickled.fingerprint() == shared.fingerprint()
    theirs = trial(unpickled, SPANS, tmp_path, "theirs", seed=2)
    assert same_weights(mine, theirs)
    same_scores(mine, theirs)


def loss_by_hand(model, prompt, middle):
    """Return nats per token of `middle` after `prompt`, without batches."""
    with torch.no_grad():
        table = model(torch.tensor([[*prompt, *middle]])).logits[0].double().log_softmax(-1)
    wanted = table[len(prompt) - 1 : -1].gather(1, torch.tensor(middle)[:, None])
    return -wanted.mean().item()


@pytest.mark.parametrize(
    ("design", "layout"),
    [
        (CAUSAL, "left-to-right"),
        (SPANS, "codegen2"),
        (Design("m", "fill-in-the-middle"), "psm"),
        (Design("s", "fill-in-the-middle", {"spm_rate": 1.0}), "spm"),
    ],
)
def test_losses_are_those_of_the_saved_decoder(folder, tmp_path, design, layout):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = problem(base=str(folder / "base"), context=512)
    found = trial(one, design, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(found.artifact / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(found.artifact / "model")
    tokens = InfillTokens.of(tokenizer)
    for row in range(3):
        hole = one.holes["texts"][row]
        assert hole.complete(hole.middle) == hole.function.source
        prompt = infill_prompt(tokenizer, hole.prefix, hole.suffix, layout=layout)
        expected = loss_by_hand(model, prompt, plain_ids(tokenizer, hole.middle))
        assert found.scores["infill_loss"]["texts"][row] == pytest.approx(expected, rel=1e-4)
        source = plain_ids(tokenizer, one.split.held_out["texts"][row].source)
        expected = loss_by_hand(model, [tokens.eot], source)
        assert found.scores["causal_loss"]["texts"][row] == pytest.approx(expected, rel=1e-4)
        text = one.several["texts"][row]
        parts, middles = text.parts, text.middles
        ids = [plain_ids(tokenizer, middle) for middle in middles]
        before = [parts[0], parts[0] + middles[0] + parts[1]]
        after = [parts[1] + parts[2], parts[2]]
        sums = 0.0
        for hole_number in range(2):
            if layout == "codegen2":
                a, b, c = (plain_ids(tokenizer, part) for part in parts)
                m, end = tokens.masks, tokens.end_of_mask
                prompt = [*a, m[0], *b, m[1], *c, tokens.eot, tokens.separator, m[0]]
                if hole_number:
                    prompt += [*ids[0], end, m[1]]
            else:
                prompt = infill_prompt(
                    tokenizer, before[hole_number], after[hole_number], layout=layout
                )
            sums += loss_by_hand(model, prompt, ids[hole_number]) * len(ids[hole_number])
        expected = sums / sum(map(len, ids))
        assert found.scores["several_loss"]["texts"][row] == pytest.approx(expected, rel=1e-4)


def test_a_decoder_of_the_users_own_is_trained_on_from_where_it_is(folder, tmp_path):
    base = str(folder / "base")
    one = problem(base=base, context=512, learning_rate=1e-12, n_tokens=1, batch_size=1)
    found = trial(one, SPANS, tmp_path)
    before = load_file(folder / "base" / "model.safetensors")
    after = weights(found)
    table = "model.embed_tokens.weight"
    assert after[table].shape[0] == before[table].shape[0] + 64 + 2 + 3
    for name, value in before.items():
        torch.testing.assert_close(after[name][: len(value)], value, atol=1e-6, rtol=1e-5)
    # From scratch, its weights do not matter and its shape does.
    save_language_model(tmp_path / "other", seed=9, length=512)
    scratch = [
        trial(problem(base=b, context=512, from_scratch=True), SPANS, tmp_path, str(number))
        for number, b in enumerate((base, str(tmp_path / "other")))
    ]
    assert same_weights(*scratch)
    assert weights(scratch[0])[table].shape == after[table].shape


def test_a_small_gpt_may_be_trained_beforehand(tmp_path):
    shape = replace(SHAPE, steps=3)
    one = problem(shape=shape, from_scratch=False, learning_rate=1e-12)
    start, _ = one._start(0)
    other, _ = one._start(1)
    assert all(
        torch.equal(a, b) for a, b in zip(start.parameters(), other.parameters(), strict=True)
    )
    assert one.fingerprint() != problem(shape=shape, learning_rate=1e-12).fingerprint()


def test_training_that_diverges_fails_by_name(shared, tmp_path, monkeypatch):
    def diverge(model, *rest, **more):
        history = original(model, *rest, **more)
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(float("nan"))
        return history

    original = module.train_decoder
    monkeypatch.setattr(module, "train_decoder", diverge)
    with pytest.raises(
        BakeoffError, match=r"'span corruption': infill_loss is no number: training"
    ):
        trial(shared, SPANS, tmp_path)


def test_a_study_compares_them(shared, tmp_path):
    study = Study(shared, [CAUSAL, SPANS], reference="causal LM", seeds=2, directory=tmp_path)
    results = study.run()
    assert not results.data["failures"]
    assert {d["name"] for d in results.data["designs"]} == {"causal LM", "span corruption"}


# Data ---------------------------------------------------------------------------------------------


def test_the_split_leaks_nothing(shared):
    held_out = shared.split.held_out["texts"]
    known = {run for one in held_out for run in runs(one.source, 24)}
    assert known
    assert not any(known & runs(text, 24) for text in shared.split.training["texts"])
    assert {one.source for one in held_out}.isdisjoint(shared.split.training["texts"])
    assert len(held_out) + len(shared.split.training["texts"]) == len(TEXTS)
    # A copy in other dress, inside a longer text, is left out of training and said.
    target = held_out[0].source
    disguised = "import os\n\n\n" + target.upper().replace("    ", "\t")
    given = problem([*TEXTS[:30], disguised], held_out=[target, *TEXTS[40:50]])
    assert disguised not in given.split.training["texts"]
    assert target not in given.split.training["texts"]
    assert any("copies of held-out functions" in note for note in given.split.notes)


def test_what_all_texts_begin_with_makes_no_copies():
    header = '"""' + " ".join(f"licence{word}" for word in WORDS * 3) + '"""\n\n\n'
    # Not Python, so that texts are judged on as wholes, header included.
    texts = [header + text.replace("def ", "sub ") for text in TEXTS]
    one = problem(texts, max_characters=2000)
    assert len(one.split.training["texts"]) == len(TEXTS) - len(one.split.held_out["texts"])
    assert "compiles" not in one.metrics


def test_what_is_held_out_and_where_holes_are_depends_on_content_alone():
    first, second = problem(), problem(TEXTS[::-1])
    assert {f.source for f in first.split.held_out["texts"]} == {
        f.source for f in second.split.held_out["texts"]
    }
    holes = [{(p.function.source, p.start) for p in one.holes["texts"]} for one in (first, second)]
    assert holes[0] == holes[1]


def test_holes_of_lines_begin_and_end_between_tokens(shared):
    for hole in shared.holes["texts"]:
        assert hole.middle.startswith("\n")
        assert not hole.middle.endswith("\n")
        assert hole.suffix.startswith("\n")
    for hole in problem(hole="lines").holes["texts"]:
        assert hole.middle.count("\n") >= 2


def test_modules_are_judged_by_their_functions():
    modules = ["\n\n".join(TEXTS[start : start + 2]) for start in range(0, 70, 2)]
    held_out = problem(modules).split.held_out["texts"]
    assert {one.source for one in held_out} <= set(TEXTS)


def test_sources_are_tasks_and_may_be_mixed(tmp_path):
    prose = [text.replace("def", "tell").replace("=", "is") for text in TEXTS[:35]]
    one = problem({"code": TEXTS[35:], "prose": prose}, n_functions=5, n_tokens=5000)
    assert list(one.holes) == ["code", "prose"]
    shares = {"code": 0.9, "prose": 0.1}
    mixed = Design("mixed", "causal", {"weights": shares})
    found = trial(one, mixed, tmp_path)
    assert set(found.scores["causal_loss"]) == {"code", "prose"}
    _, tokenizer = one._start(0)
    rows = one._rows(mixed, tokenizer, 0)
    prose_tokens = sum(len(row) for row in rows if "tell" in tokenizer.decode(row))
    assert prose_tokens / sum(map(len, rows)) == pytest.approx(0.1, abs=0.06)
    plain = one._rows(CAUSAL, tokenizer, 0)
    assert plain != rows
    # Without weights, all that is read once is read.
    text = tokenizer.decode([token for row in plain for token in row])
    assert all(t in text for texts in one.split.training.values() for t in texts)


@pytest.fixture(scope="module")
def library(folder):
    return InfillingProblem("smoke", **TINY, n_functions=6, n_doctests=2)


def test_the_standard_library_is_the_default_and_doctests_are_run(library, tmp_path, monkeypatch):
    found = trial(library, SPANS, tmp_path)
    assert list(found.scores) == list(INFILLING_METRICS)
    assert found.scores["passes"]["standard library"].shape == (2,)
    names = [one.name for one in library._doctested()]
    # Verified once for all processes.
    monkeypatch.setattr(module, "verified_problems", lambda *a: pytest.fail("verified again"))
    fresh = pickle.loads(pickle.dumps(library))
    fresh._doctests = None
    assert [one.name for one in fresh._doctested()] == names
    for hole in library._doctested():
        assert hole.function.has_examples
    known = {
        run for one in library.split.held_out["standard library"] for run in runs(one.source, 24)
    }
    training = library.split.training["standard library"]
    assert not any(known & runs(text, 24) for text in training)


def test_true_fills_pass_and_no_fill_does_not(library, tmp_path, monkeypatch):
    from bakeoff.decoding.infilling import Fill

    answers = {(p.prefix, p.suffix): p.middle for p in library._doctested()}
    answers |= {(p.prefix, p.suffix): p.middle for p in library.holes["standard library"]}
    for number, (say, expected) in enumerate(((answers.get, 1.0), (lambda pair: "", 0.0))):
        monkeypatch.setattr(
            module,
            "infill_batch",
            lambda model, tokenizer, pairs, say=say, **more: [
                Fill(say(pair), (), "end of mask") for pair in pairs
            ],
        )
        found = trial(library, SPANS, tmp_path, str(number))
        assert found.scores["exact"]["standard library"].tolist() == [expected] * 3
        assert found.scores["passes"]["standard library"].tolist() == [expected] * 2


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": []}, "texts must hold at least one text"),
        ({"texts": "huge"}, "size must be smoke, demo or full, got 'huge'"),
        ({"texts": {"a": TEXTS, "b": []}}, "at least one text of each source"),
        ({"texts": [*TEXTS, 3]}, "texts: text 70 of 'texts' must be text, got int"),
        ({"texts": TEXTS[:1]}, "at least two texts"),
        ({"texts": TEXTS[:8]}, "held-out functions have a hole of kind 'line', at least 5"),
        ({"texts": [f"x = {n}" for n in range(20)]}, "no held-out text has a function"),
        ({"held_out": {"b": TEXTS}}, r"held_out must have the sources \['texts'\], got \['b'\]"),
        ({"held_out": TEXTS}, "texts: no text is left to train on"),
        ({"texts": "smoke", "held_out": TEXTS}, "held_out goes with texts of your own"),
        ({"n_doctests": 3}, "n_doctests goes with the default texts"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"context": 8}, "context must be at least 16, got 8"),
        ({"context": 97}, "context must be at most the shape's 96, got 97"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"n_functions": 4}, "n_functions must be at least 5, got 4"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"max_new_tokens": 95}, "max_new_tokens must leave room for a prompt"),
        ({"max_characters": 0}, "max_characters must be at least 1, got 0"),
        ({"hole": "word"}, "kind must be"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    options = {"texts": TEXTS, **TINY, **changes}
    with pytest.raises(DataError, match=message):
        InfillingProblem(options.pop("texts"), **options)


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (
            Design("x", "masked"),
            "design 'x': masked does not say how to train .*; there are: causal",
        ),
        (
            Design("x", "causal", {"p_causal": 0.5}),
            "design 'x': causal takes weights; got p_causal",
        ),
        (Design("x", "span-corruption", {"p_causal": 2}), "design 'x': p_causal must be"),
        (Design("x", "span-corruption", {"p_causal": "half"}), "design 'x': "),
        (Design("x", "span-corruption", {"char_cuts": -1}), "design 'x': char_cuts must be"),
        (Design("x", "span-corruption", {"ratio": [0.5]}), "design 'x': "),
        (Design("x", "span-corruption", {"level": "line"}), "design 'x': level must be"),
        (Design("x", "fill-in-the-middle", {"spm_rate": 3}), "design 'x': spm_rate must be"),
        (Design("x", "prefix-lm", {"attention": "causal"}), "prefix-lm takes p_causal, weights"),
        (Design("x", "causal", {"weights": {"prose": 1}}), "design 'x': weights must name"),
    ],
)
def test_designs_that_cannot_run_are_refused(shared, tmp_path, design, message):
    for refused in (shared.check, lambda d: shared.prepare([SPANS, d], [0], Work(tmp_path))):
        with pytest.raises(DataError, match=message):
            refused(design)


def test_a_context_that_does_not_fit_is_refused_before_the_first_trial(folder, tmp_path):
    long = problem(base=str(folder / "base"), context=600)
    with pytest.raises(DataError, match="context must be at most 512, got 600"):
        long.prepare([SPANS], [0], Work(tmp_path))
    short = problem(base=str(folder / "base"), context=20, max_new_tokens=4)
    with pytest.raises(DataError, match="20 tokens are too few for any hole"):
        short.prepare([SPANS], [0], Work(tmp_path))


def test_the_fingerprint_follows_what_scores_depend_on(folder, tmp_path):
    save_language_model(tmp_path / "other", seed=1, length=512)
    base = {"base": str(folder / "base"), "context": 90}
    prints = [
        problem(**changes).fingerprint()
        for changes in (
            {},
            {"texts": TEXTS[:-1]},
            {"hole": "lines"},
            {"n_tokens": 901},
            {"context": 95},
            {"batch_size": 5},
            {"learning_rate": 2e-3},
            {"n_fills": 4},
            {"max_new_tokens": 7},
            {"shape": replace(SHAPE, width=36)},
            {"from_scratch": False},
            base,
            {**base, "base": str(tmp_path / "other")},
            {**base, "from_scratch": True},
        )
    ]
    assert len(set(prints)) == len(prints)
    assert problem().fingerprint() == prints[0]
    json.dumps(problem().describe())


# The winner ---------------------------------------------------------------------------------------


def test_the_winner_loads_with_transformers_alone(shared, tmp_path):
    found = trial(shared, SPANS, tmp_path)
    destination = tmp_path / "winner"
    assert shared.export(SPANS, found.artifact, destination, reason="It won.")
    program = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = "def f(x):<mask_1>\\n" + tokenizer.eos_token + "<sep><mask_1>"
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
out = model.generate(**ids, max_new_tokens=5, do_sample=False)
names = [m for m in sys.modules if m.startswith("bakeoff")]
print(json.dumps([ids["input_ids"][0].tolist(), out[0].tolist(), names]))
"""
    output = subprocess.run(
        [sys.executable, "-c", program, str(destination)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    prompt, written, loaded = json.loads(output.splitlines()[-1])
    assert loaded == []
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(destination)
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert prompt == infill_prompt(tokenizer, "def f(x):", "\n")
    fill = infill(model, tokenizer, "def f(x):", "\n", 5)
    assert written[len(prompt) :][: len(fill.ids)] == list(fill.ids)
    # The lines that use it, as in its README, run.
    lines = shared.usage(destination)
    assert all(line in (destination / "README.md").read_text() for line in lines)
    exec("\n".join(lines), {})
    settings = json.loads((destination / "decoder.json").read_text())
    assert settings["method"] == "infill"
    assert settings["params"] == {"layout": "codegen2", "attention": "causal"}
    assert settings["model"] == "./"
    assert settings["extra"]["trained"]["method"] == "span-corruption"


@pytest.mark.parametrize(
    ("design", "params"),
    [
        (CAUSAL, {"layout": "left-to-right", "attention": "causal"}),
        (
            Design("p", "span-corruption", {"attention": "prefix"}),
            {"layout": "codegen2", "attention": "prefix"},
        ),
        (Design("l", "prefix-lm"), {"layout": "left-to-right", "attention": "prefix"}),
    ],
)
def test_a_winner_says_how_it_wants_to_be_asked(shared, tmp_path, design, params):
    found = trial(shared, design, tmp_path)
    shared.export(design, found.artifact, tmp_path / "winner")
    settings = json.loads((tmp_path / "winner" / "decoder.json").read_text())
    assert settings["params"] == params
    exec("\n".join(shared.usage(tmp_path / "winner")), {})
