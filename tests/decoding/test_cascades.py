"""The cascade: reduces to either model, keeps its targets, is the same after saving."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit
from tests.models import tiny

from bakeoff.decoding.cascades import (
    Cascade,
    CascadeExamples,
    ChowAverage,
    ChowSum,
    LengthScore,
    PostHocDeferral,
    QuantileScore,
    RandomDeferral,
    TextGenerator,
    TokenRecord,
    exact_match,
    load_rule,
)
from bakeoff.decoding.deferral_curves import deferral_auc, deferral_curve
from bakeoff.errors import DataError
from bakeoff.models.loading import LanguageModel


class World:
    """Questions are numbers; a small model knows some answers and half knows that it does."""

    def __init__(self, slope=3.0):
        self.slope = slope
        self.asked_large = []

    def small(self, prompts, **options):
        records = []
        for prompt in prompts:
            rng = np.random.default_rng(int(prompt))
            log_probs = -rng.exponential(0.5, rng.integers(2, 25))
            right = rng.random() < expit(self.slope * (log_probs.min() + 1.8))
            cost = float(len(log_probs))
            records.append(TokenRecord(log_probs, None, prompt if right else "no idea", cost))
        return records

    def large(self, prompts, **options):
        self.asked_large += prompts
        return [
            TokenRecord(np.empty(0), text=prompt if int(prompt) % 10 else "?", cost=100.0)
            for prompt in prompts
        ]


def pairs(start, n):
    return [(str(number), str(number)) for number in range(start, start + n)]


def prompts_of(rows):
    return [prompt for prompt, _ in rows]


# Reductions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "who"), [(0.0, "small"), (1.0, "large")])
def test_at_either_end_it_is_one_of_the_models(rate, who):
    world = World()
    cascade = Cascade(world.small, world.large, target_rate=rate).fit(pairs(0, 50))
    world.asked_large.clear()
    prompts = prompts_of(pairs(100, 70))
    answers = cascade.generate(prompts)
    assert answers.texts == [record.text for record in getattr(world, who)(prompts)]
    assert {answer.answered_by for answer in answers} == {who}
    assert answers.rate == rate
    assert cascade.threshold_ == (math.inf if rate == 0 else -math.inf)
    if rate == 0:
        assert world.asked_large == []


def llama(seed, **changes):
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(tiny.config("llama", initializer_range=0.3, **changes))
    model.generation_config.eos_token_id = [2, 30]
    return model.eval()


def other_tokenizer():
    """Another vocabulary than tiny's: one token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz "
    inner = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "</s>": 1, "<unk>": 2} | {x: 3 + i for i, x in enumerate(letters)},
            unk_token="<unk>",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


TEXTS = [
    f"the {a} {verb} {where} the {b}"
    for a in ("cat", "dog", "tree")
    for b in ("mat", "dog")
    for verb, where in (("sat", "on"), ("ran", "under"))
]


def plain(model, tokenizer, prompt, **options):
    batch = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pad_token_id=0,
        do_sample=False,
        **options,
    )
    return tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("wrap", ["pair", "language model", "generator"])
def test_transformers_models_with_different_tokenizers(tmp_path, wrap):
    """The large model gets the prompt as text; each answer is that of plain generate."""
    small, large = llama(0), llama(1, vocab_size=30, eos_token_id=1)
    sides = [(small, tiny.tokenizer()), (large, other_tokenizer())]
    if wrap == "language model":
        given = [LanguageModel("tiny", m, t, tmp_path, "0" * 64, 128) for m, t in sides]
    elif wrap == "generator":
        given = [TextGenerator(m, t, batch_size=3) for m, t in sides]
    else:
        given = sides
    cascade = Cascade(*given, ChowAverage(), target_rate=0.5, chunk_size=5)
    cascade.fit([(text, "x") for text in TEXTS], max_new_tokens=8)
    answers = cascade.generate(TEXTS, max_new_tokens=8)
    assert answers.deferred.sum() == 6
    for text, answer in zip(TEXTS, answers, strict=True):
        model, tokenizer = sides[answer.answered_by == "large"]
        assert answer.text == plain(model, tokenizer, text, max_new_tokens=8)
    # Operations of both models are counted: 2 x parameters x tokens.
    n_small = sum(p.numel() for p in small.parameters())
    n_large = sum(p.numel() for p in large.parameters())
    least = 2 * n_small * 7 + np.where(answers.deferred, 2 * n_large * 24, 0)
    most = 2 * n_small * 15 + np.where(answers.deferred, 2 * n_large * 35, 0)
    assert ((least <= answers.costs) & (answers.costs <= most)).all()


def test_embeddings_of_the_small_model_reach_the_rule():
    small, large = llama(0), llama(1)
    rule = PostHocDeferral(("embedding",), "gap", "linear", n_components=4)
    cascade = Cascade(
        (small, tiny.tokenizer()),
        (large, tiny.tokenizer()),
        rule,
        target_rate=0.4,
        quality=lambda text, reference: len(set(text.split())),
    )
    rows = [
        (f"{text} and {more}", "") for text in TEXTS for more in ("saw", "a", "red", "on", "the")
    ]
    cascade.fit(rows, max_new_tokens=4)
    examples = cascade.collect(rows[:10], max_new_tokens=4)
    assert examples.small[0].embedding.shape == (32,)
    assert examples.large[0].embedding is None
    answers = cascade.generate(prompts_of(rows), max_new_tokens=4)
    np.testing.assert_allclose(
        answers.scores[:10], cascade.rule_.score(examples.small), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(DataError, match=r"the rule reads embeddings: make small with"):
        Cascade(TextGenerator(small, tiny.tokenizer()), print, rule)


# Targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [QuantileScore(0.0), ChowSum(), PostHocDeferral(("quantiles", "sum", "length"))]
)
def test_targets_are_met_on_calibration_and_nearly_on_new_queries(rule):
    world = World()
    cascade = Cascade(world.small, world.large, rule, target_rate=0.3).fit(pairs(1000, 600))
    assert cascade.point_.rate == pytest.approx(0.3, abs=1 / 600)
    fresh = cascade.collect(pairs(10_000, 3000))
    assert cascade.evaluate(fresh).point.rate == pytest.approx(0.3, abs=0.08)

    point = cascade.choose_threshold(target_cost=40.0)
    assert point.cost <= 40.0 < point.cost + 100 / 600 + 1e-9
    assert cascade.evaluate(fresh).point.cost == pytest.approx(40.0, rel=0.15)

    point = cascade.choose_threshold(target_quality=0.8)
    assert point.quality >= 0.8 - 1e-12
    assert cascade.evaluate(fresh).point.quality == pytest.approx(0.8, abs=0.05)

    sure = cascade.choose_threshold(target_quality=0.8, confidence=0.95)
    assert sure.rate > point.rate
    assert cascade.evaluate(fresh).point.quality > 0.79


def test_without_a_target_it_is_as_good_as_the_large_model_at_the_least_rate():
    world = World()
    cascade = Cascade(world.small, world.large).fit(pairs(1000, 500))
    examples = cascade.collect(pairs(1000, 500))
    assert cascade.point_.quality >= examples.q_large.mean() - 1e-12
    scores = QuantileScore(0.0).score(examples.small)
    curve = deferral_curve(scores, examples.q_small, examples.q_large)
    assert cascade.point_.rate == pytest.approx(curve.rates[curve.quality >= 0.9][0], abs=0.01)
    assert cascade.point_.rate < 0.9


def test_answers_scores_and_costs_belong_together():
    world = World()
    cascade = Cascade(world.small, world.large, target_rate=0.4, chunk_size=7).fit(pairs(0, 100))
    prompts = prompts_of(pairs(500, 45))
    world.asked_large.clear()
    told = []
    answers = cascade.generate(prompts, progress=lambda *state: told.append(state))
    assert told[-1] == (45, 45)
    assert len(told) == 7
    records = world.small(prompts)
    np.testing.assert_array_equal(answers.scores, QuantileScore(0.0).score(records))
    np.testing.assert_array_equal(answers.deferred, answers.scores > cascade.threshold_)
    assert world.asked_large == [p for p, d in zip(prompts, answers.deferred, strict=True) if d]
    expected = [r.cost + 100 * d for r, d in zip(records, answers.deferred, strict=True)]
    np.testing.assert_array_equal(answers.costs, expected)
    whole = Cascade(world.small, world.large, target_rate=0.4).fit(pairs(0, 100))
    assert whole.generate(prompts).texts == answers.texts
    assert answers[0].text == answers.texts[0]
    assert cascade.generate([]).texts == []


def test_fixed_costs_stand_in_for_those_of_records():
    world = World()
    cascade = Cascade(world.small, world.large, target_cost=4.0, small_cost=1, large_cost=10)
    cascade.fit(pairs(0, 100))
    assert cascade.point_.rate == pytest.approx(0.3)
    answers = cascade.generate(prompts_of(pairs(0, 100)))
    np.testing.assert_array_equal(answers.costs, np.where(answers.deferred, 11.0, 1.0))


def test_evaluation_is_the_curve_with_its_intervals():
    world = World()
    rule = PostHocDeferral(estimator="linear")
    cascade = Cascade(world.small, world.large, rule, target_rate=0.3).fit(pairs(1000, 400))
    fresh = cascade.collect(pairs(5000, 400))
    found = cascade.evaluate(fresh)
    scores = cascade.rule_.score(fresh.small)
    assert found.auc == deferral_auc(scores, fresh.q_small, fresh.q_large)
    assert found.versus_random.low > 0
    deferred = scores > cascade.threshold_
    assert found.point.quality == np.where(deferred, fresh.q_large, fresh.q_small).mean()
    assert cascade.evaluate(pairs(5000, 400)).auc == found.auc
    # The baselines lose against the rule that knows the world's.
    for rival in (LengthScore(), RandomDeferral(0)):
        other = rival.score(fresh.small)
        assert deferral_auc(scores, fresh.q_small, fresh.q_large, versus=other).low > 0


def test_examples_are_collected_once_and_serve_several_rules():
    world = World()
    told = []
    cascade = Cascade(world.small, world.large, chunk_size=30)
    examples = cascade.collect(pairs(0, 70), progress=lambda *state: told.append(state))
    assert told[-1] == (140, 140)
    half = examples.take(np.arange(70) % 2 == 0)
    assert half.prompts == examples.prompts[::2]
    np.testing.assert_array_equal(half.q_small, examples.q_small[::2])
    world.asked_large.clear()
    one = Cascade(world.small, world.large, ChowSum(), target_rate=0.5).fit(half)
    assert world.asked_large == []
    two = Cascade(world.small, world.large, ChowSum(), target_rate=0.5).fit(pairs(0, 70)[::2])
    assert one.point_ == two.point_


def test_the_rule_given_stays_as_it_was():
    world, rule = World(), ChowSum()
    cascade = Cascade(world.small, world.large, rule).fit(pairs(0, 60))
    assert not hasattr(rule, "calibration_scores_")
    assert hasattr(cascade.rule_, "calibration_scores_")


def test_queries_of_another_kind_are_noticed():
    world = World()
    cascade = Cascade(world.small, world.large, LengthScore(), target_rate=0.3).fit(pairs(0, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cascade.generate(prompts_of(pairs(900, 100)))
    longer = [
        p
        for p, r in zip(
            prompts_of(pairs(0, 400)), world.small(prompts_of(pairs(0, 400))), strict=True
        )
        if len(r.log_probs) > 15
    ]
    with pytest.warns(UserWarning, match="of the queries were deferred, where the calibration"):
        cascade.generate(longer[:80])


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (QuantileScore(0.1), {"target_rate": 0.3}),
        (PostHocDeferral(estimator="linear"), {"target_quality": 0.8, "confidence": 0.9}),
        (ChowSum(), {"target_rate": np.float64(1.0), "small_cost": 1, "large_cost": 7}),
        (RandomDeferral(5), {"target_cost": 50}),
    ],
)
def test_a_saved_cascade_is_the_same_cascade(tmp_path, rule, options):
    world = World()
    cascade = Cascade(world.small, world.large, rule, **options).fit(pairs(0, 200))
    cascade.save(tmp_path / "cascade.safetensors")
    other = Cascade.load(tmp_path / "cascade.safetensors", world.small, world.large)
    prompts = prompts_of(pairs(1000, 40))
    assert other.generate(prompts).answers == cascade.generate(prompts).answers
    assert other.point_ == cascade.point_
    assert other.targets == cascade.targets
    assert other.choose_threshold(target_rate=0.2) == cascade.choose_threshold(target_rate=0.2)
    assert (
        other.choose_threshold(target_cost=60) == cascade.choose_threshold(target_cost=60)
        if ("small_cost" not in options)
        else True
    )


def test_rules_and_cascades_are_told_apart(tmp_path):
    world = World()
    cascade = Cascade(world.small, world.large).fit(pairs(0, 50))
    cascade.save(tmp_path / "cascade")
    cascade.rule_.save(tmp_path / "rule")
    with pytest.raises(DataError, match="holds no cascade"):
        Cascade.load(tmp_path / "rule", world.small, world.large)
    with pytest.raises(DataError, match="has no rule"):
        load_rule(tmp_path / "cascade")


# Refusals -----------------------------------------------------------------------------------------


def texts(prompts):
    return list(prompts)


WORLD = World()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cascade("gpt", texts), "small must be a LanguageModel.*got str"),
        (lambda: Cascade(texts, texts, max), "rule must be a DeferralRule"),
        (lambda: Cascade(texts, texts, chunk_size=0), "chunk_size must be"),
        (lambda: Cascade(texts, texts, small_cost=-1), "small_cost must be a number"),
        (lambda: Cascade(texts, texts, target_rate=1, target_cost=1), "at most one of"),
        (lambda: Cascade(texts, texts).fit([("1", "1")]), "small model must return TokenRecord"),
        (lambda: Cascade(texts, texts).fit([]), "pairs must be a non-empty"),
        (lambda: Cascade(texts, texts).fit(["ab"]), "pairs must be a non-empty"),
        (lambda: Cascade(texts, texts).generate(["1"]), "not fitted: call fit first"),
        (lambda: Cascade(texts, texts).choose_threshold(), "not fitted: call fit first"),
        (lambda: Cascade(texts, texts).save("x"), "not fitted: call fit first"),
        (
            lambda: Cascade(WORLD.small, lambda p: p[1:]).fit(pairs(0, 9)),
            "the large model gave 8 answers to 9 prompts",
        ),
        (
            lambda: Cascade(WORLD.small, lambda p: [1] * len(p)).fit(pairs(0, 9)),
            "large model must return texts or TokenRecord objects, got int",
        ),
        (
            lambda: Cascade(lambda p: [TokenRecord(np.zeros(1))] * len(p), texts).fit(pairs(0, 9)),
            "small model gave a record without text",
        ),
        (
            lambda: Cascade(WORLD.small, texts, target_cost=3).fit(pairs(0, 9)),
            "target_cost needs costs",
        ),
        (
            lambda: Cascade(WORLD.small, WORLD.large).fit(pairs(0, 9)).generate("12"),
            "prompts must be a sequence of texts",
        ),
        (
            lambda: Cascade(WORLD.small, WORLD.large, target_quality=1.5).fit(pairs(0, 9)),
            "min_quality=1.5 is not reached",
        ),
        (
            lambda: Cascade(WORLD.small, WORLD.large, PostHocDeferral()).fit(pairs(0, 9)),
            "at least 50 labelled answers",
        ),
        (
            lambda: CascadeExamples(("a",), (), (), np.zeros(1), np.zeros(1)),
            "must be as many and not empty, got 1, 0 and 0",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_exact_match_takes_several_references():
    assert exact_match("a b\n", "a b") == 1.0
    assert exact_match("a", ["b", "a"]) == 1.0
    assert exact_match("ab", "a") == 0.0
