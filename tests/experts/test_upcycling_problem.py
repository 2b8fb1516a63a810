"""The upcycling problem on tiny decoders: shared phases, equal budgets, closed forms, a winner."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.selection.tiny_selection import save_language_model

from bakeoff._files import cache_directory
from bakeoff.data.domain_texts import DomainTexts, split_domains
from bakeoff.errors import BakeoffError, DataError, ModelError
from bakeoff.experts.bam import average_models, mixture_cost
from bakeoff.experts.causal_training import domain_batches, train_causal
from bakeoff.experts.problem import upcycling as module
from bakeoff.experts.problem.upcycling import (
    UPCYCLING_METRICS,
    Phases,
    UpcyclingProblem,
    upcycling_designs,
)
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Study, Work

SHAPE = SmallGPT(vocabulary=280, n_layers=2, width=32, n_heads=2, context=32)
WORDS = {
    "sums": ["one", "two", "three", "four", "five", "six", "plus", "minus", "equals"],
    "pets": ["cat", "dog", "bird", "fish", "sleeps", "eats", "runs", "sees", "likes"],
    "law": ["court", "judge", "party", "shall", "hereby", "clause", "article", "under", "said"],
}
BATCH = 4 * 32
# 10 steps of the seed, 3 specialists of 4, mixing of 6.
TINY = {
    "shape": SHAPE,
    "n_tokens": 28 * BATCH,
    "shares": (10, 12, 6),
    "batch_size": 4,
    "learning_rate": 3e-3,
}
BAM = Design("BAM", "bam")
BTX = Design("BTX", "btx")
DENSE = Design("dense", "dense-continued")
SEED = Design("seed", "seed")


def sentences(domain, n=60):
    rng = np.random.default_rng(len(domain))
    return [" ".join(rng.choice(WORDS[domain], 30)) + "." for _ in range(n)]


TEXTS = split_domains({domain: sentences(domain) for domain in WORDS}, name="tiny", max_held_out=5)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny decoder of the user's own, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("upcycling")
    save_language_model(made / "base", length=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def problem(texts=TEXTS, **changes):
    return UpcyclingProblem(texts, **{**TINY, **changes})


@pytest.fixture(scope="module")
def shared(folder):
    return problem()


def trial(one, design, folder, name="trial", seed=0):
    (folder / name).mkdir()
    return one.run(design, seed, Work(folder / name))


def work(folder, name="work"):
    (folder / name).mkdir(exist_ok=True)
    return Work(folder / name)


def forget():
    shutil.rmtree(cache_directory() / "upcycling", ignore_errors=True)


def weights(found):
    paths = sorted((found.artifact / "model").rglob("model.safetensors"))
    return {f"{p.parent.name}/{k}": v for p in paths for k, v in load_file(p).items()}


def same_weights(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def assert_same_scores(one, other):
    for metric, tasks in one.scores.items():
        for task, values in tasks.items():
            np.testing.assert_array_equal(other.scores[metric][task], values)


def assert_same_losses(one, other, **tolerance):
    for domain, values in one.scores["loss"].items():
        np.testing.assert_allclose(other.scores["loss"][domain], values, **tolerance)


# Trials -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", upcycling_designs(), ids=lambda design: design.name)
def test_every_design_is_scored_and_repeats(shared, design, tmp_path):
    seen = []
    (tmp_path / "trial").mkdir()
    found = shared.run(
        design, 1, Work(tmp_path / "trial", lambda fraction, message: seen.append(fraction))
    )
    assert list(found.scores) == list(UPCYCLING_METRICS) == list(shared.metrics)
    assert {d: v.shape for d, v in found.scores["loss"].items()} == dict.fromkeys(WORDS, (5,))
    balance = found.scores["balance"]["layers"]
    specialisation = found.scores["specialisation"]["layers"]
    assert balance.shape == specialisation.shape == (2,)
    if design.method in ("bam", "bam-shared-kv", "btx", "btx-larger"):
        n_experts = 6 if design.method == "btx-larger" else 4
        assert (balance >= 1).all()
        assert (balance <= n_experts).all()
        assert ((specialisation >= 0) & (specialisation <= 1)).all()
    else:
        assert balance.tolist() == [1, 1]
        assert specialisation.tolist() == [0, 0]
    assert all(np.isfinite(v).all() for tasks in found.scores.values() for v in tasks.values())
    assert found.cost["training_tokens"] <= shared.n_tokens
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 1
    again = trial(pickle.loads(pickle.dumps(shared)), design, tmp_path, "again", seed=1)
    assert_same_scores(found, again)
    assert same_weights(found, again)
    assert again.cost == found.cost


def test_the_phases_divide_the_budget_exactly():
    assert problem().phases == Phases(seed=10, specialist=4, mixing=6)
    assert problem(n_tokens=28 * BATCH - 1).phases == Phases(9, 3, 5)
    # A share of 0 is no phase; a small one is at least a step.
    assert problem(shares=(1, 0, 0)).phases == Phases(28, 0, 0)
    assert problem(shares=(0.98, 0.01, 0.01)).phases == Phases(27, 1, 1)
    assert problem(n_tokens=10 * BATCH, shares=(0.1, 0.3, 0.6)).phases == Phases(1, 1, 6)


def test_tokens_and_operations_are_those_of_the_closed_form(shared, tmp_path):
    models = shared._branched(0, work(tmp_path), (0, 1))
    dense = mixture_cost(models[0], 32)
    dense_flops = 2 * dense.block_flops + dense.head_flops
    weights_of = {
        "seed": ({}, 10, 0),
        "dense-continued": ({}, 28, 0),
        "average": ({}, 28, 0),
        "best-single": ({"mixing": 0.5}, 25, 0),
        "known-domain": ({}, 28, 0),
        "bam": ({}, 22, 6),
        "bam-shared-kv": ({"mixing": 0}, 22, 0),
        "btx": ({"mixing": 0.34}, 22, 2),
        "btx-larger": ({}, 22, 6),
    }
    for method, (params, dense_steps, mixing_steps) in weights_of.items():
        design = Design(method, method, params)
        found = trial(shared, design, tmp_path, method)
        assert found.cost["training_tokens"] == (dense_steps + mixing_steps) * BATCH, method
        flops = found.cost["forward_flops_per_token"]
        spent = 3 * BATCH * (dense_steps * dense_flops + mixing_steps * flops)
        assert found.cost["training_flops"] == pytest.approx(spent, rel=1e-9), method
        n_models = 3 if method == "known-domain" else 1
        kept = sum(value.numel() for value in weights(found).values())
        assert found.cost["total_parameters"] == kept, method
        assert found.cost["trained_parameters"] == kept, method
        mixture = _merged(shared, design, models)
        cost = mixture_cost(mixture, 32)
        assert found.cost["active_parameters"] == cost.active_parameters, method
        assert found.cost["total_parameters"] == n_models * cost.parameters, method
        assert flops == pytest.approx(2 * cost.block_flops + cost.head_flops, rel=1e-9), method


def _merged(one, design, models):
    if design.method in ("seed", "dense-continued", "known-domain"):
        return models[0]
    return one._merged(design, models, 0, [])


def test_equal_compute_gives_dearer_designs_fewer_tokens(shared, tmp_path):
    by_method = {}
    for design in (BAM, BTX, DENSE, Design("average", "average")):
        by_method[design.method] = trial(problem(match="flops"), design, tmp_path, design.name)
    dense = by_method["average"].cost["forward_flops_per_token"]
    for method, found in by_method.items():
        ratio = dense / found.cost["forward_flops_per_token"]
        steps = max(1, int(6 * ratio + 1e-9))
        assert found.cost["training_tokens"] == (22 + steps) * BATCH
        spent = steps * found.cost["forward_flops_per_token"]
        assert spent <= 6 * dense * (1 + 1e-9), method
    assert by_method["dense-continued"].cost["training_tokens"] == shared.n_tokens
    assert by_method["bam"].cost["training_tokens"] < by_method["average"].cost["training_tokens"]
    # A design may ask for it by itself, and is then the same.
    alone = trial(shared, Design("BAM", "bam", {"match": "flops"}), tmp_path, "alone")
    assert_same_scores(by_method["bam"], alone)
    back = Design("BAM", "bam", {"match": "tokens"})
    assert_same_scores(
        trial(problem(match="flops"), back, tmp_path, "back"),
        trial(shared, BAM, tmp_path, "plain"),
    )


# Merging models that are equal --------------------------------------------------------------------

EQUAL = {"shares": (22, 0, 6)}


def test_equal_copies_as_merged_are_the_seed(tmp_path):
    one = problem(**EQUAL)
    seed = trial(one, SEED, tmp_path, "seed")
    full = {"mixing": 0, "normalize_ffn": True}
    designs = [
        Design("average", "average", {"mixing": 0}),
        Design("best", "best-single", {"mixing": 0}),
        Design("known", "known-domain", {"mixing": 0}),
        Design("bam", "bam", full),
        Design("bam, top-3", "bam", {**full, "ffn_top_k": 3}),
        Design("bam, four weighed alike", "bam", {"mixing": 0, "ffn_top_k": 4}),
        Design("shared", "bam-shared-kv", full),
        Design("btx", "btx", full),
        Design("more", "btx-larger", full),
    ]
    for design in designs:
        found = trial(one, design, tmp_path, design.name)
        assert_same_losses(seed, found, rtol=2e-5)
        assert found.cost["training_tokens"] == 22 * BATCH
        equal = any("models are equal" in note for note in found.notes)
        assert equal == (design.method in module._UPCYCLED)


def test_one_of_four_equal_networks_speaks_at_a_quarter_of_its_size(tmp_path):
    one = problem(**EQUAL)
    design = Design("bam", "bam", {"mixing": 0, "router_init_std": 0.0})
    found = trial(one, design, tmp_path)
    seed = one._seed_model(0)
    with torch.no_grad():
        for layer in seed.model.layers:
            layer.mlp.down_proj.weight /= 4
    expected = one.losses(seed)
    for domain, values in expected.items():
        np.testing.assert_allclose(found.scores["loss"][domain], values, rtol=2e-5)


def test_one_attention_expert_of_four_speaks_at_a_quarter_of_its_size(tmp_path):
    one = problem(**EQUAL)
    params = {"mixing": 0, "router_init_std": 0.0, "normalize_ffn": True, "attn_routing": 1}
    found = trial(one, Design("bam", "bam", params), tmp_path)
    seed = one._seed_model(0)
    with torch.no_grad():
        for layer in seed.model.layers:
            layer.self_attn.o_proj.weight /= 4
    for domain, values in one.losses(seed).items():
        np.testing.assert_allclose(found.scores["loss"][domain], values, rtol=2e-5)


# The phases ---------------------------------------------------------------------------------------


def test_phases_are_those_written_out(shared, tmp_path):
    """Seed, specialists, average and mixing, trained here by hand with the paper's numbers."""
    rows = shared.rows()

    def train(model, shares, steps, rate, order):
        batches = domain_batches(rows, shares, batch_size=4, seed=order)
        train_causal(
            model, batches, steps=steps, peak_learning_rate=rate, warmup_steps=max(1, steps // 10)
        )
        return model

    seed = train(shared.start(3), None, 10, 3e-3, module._order(3, module._SEED))
    models = [seed]
    for number, domain in enumerate(WORDS):
        # 90 % of the domain and 10 % of all: 93.3 %, 3.3 %, 3.3 %.
        shares = {name: 28 if name == domain else 1 for name in WORDS}
        order = module._order(3, module._SPECIALIST, number)
        models.append(train(copy.deepcopy(seed), shares, 4, 1.5e-3, order))
    found = shared._branched(3, work(tmp_path), (0, 1))
    for mine, theirs in zip(models, found, strict=True):
        for expected, parameter in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-7)
    average = train(average_models(models), None, 6, 3e-3, module._order(3, module._MIX))
    expected = shared.losses(average)
    got = trial(shared, Design("average", "average"), tmp_path, seed=3).scores["loss"]
    for domain, values in expected.items():
        np.testing.assert_allclose(got[domain], values, rtol=1e-4)


def test_specialists_know_their_own_domain_best(tmp_path):
    one = problem(n_tokens=200 * BATCH, shares=(4, 5, 1))
    seed, *specialists = one._branched(0, work(tmp_path), (0, 1))
    before = {domain: values.mean() for domain, values in one.losses(seed).items()}
    for own, model in zip(WORDS, specialists, strict=True):
        after = {domain: values.mean() for domain, values in one.losses(model).items()}
        gained = {domain: before[domain] - after[domain] for domain in WORDS}
        assert gained[own] > 0
        assert max(gained, key=gained.get) == own
    # The oracle takes each document to its own.
    found = trial(one, Design("known", "known-domain", {"mixing": 0}), tmp_path)
    for own, model in zip(WORDS, specialists, strict=True):
        np.testing.assert_allclose(found.scores["loss"][own], one.losses_of(own, model), rtol=1e-6)


def test_the_best_specialist_is_the_one_that_reads_most_domains_well(shared, tmp_path, monkeypatch):
    models = shared._branched(0, work(tmp_path), (0, 1))
    monkeypatch.setattr(module, "_ROWS_TO_CHOOSE_BY", 10**6)
    every = [shared._training_loss(model, 0) for model in models]
    by_hand = [
        np.mean([float(m(input_ids=r, labels=r).loss.detach()) for r in shared.rows().values()])
        for m in models
    ]
    np.testing.assert_allclose(every, by_hand, rtol=1e-5)
    best = int(np.argmin(every[1:]))
    notes = []
    chosen = shared._merged(Design("best", "best-single"), models, 0, notes)
    assert chosen is models[1 + best]
    assert notes == [f"The best specialist is that of {list(WORDS)[best]}."]


def test_more_experts_are_copies_of_the_specialists_in_turn(shared, tmp_path):
    models = shared._branched(0, work(tmp_path), (0, 1))
    merged = shared._merged(Design("m", "btx-larger", {"n_experts": 8}), models, 0, [])
    layer = merged.decoder.model.layers[0].mlp
    assert layer.router.top_k == 3
    origins = [0, 1, 2, 3, 1, 2, 3, 1]
    for expert, origin in zip(layer.experts, origins, strict=True):
        expected = models[origin].model.layers[0].mlp.up_proj.weight
        assert torch.equal(expert.up_proj.weight, expected)


def test_a_rival_has_the_mixtures_size(shared, tmp_path):
    models = shared._branched(0, work(tmp_path), (0, 1))
    designs = {design.name: design for design in upcycling_designs()}
    larger = {
        name: mixture_cost(shared._merged(designs[name], models, 0, []), 32)
        for name in ("BAM", "BTX, 5 experts, top-2", "BTX, 6 experts, top-3")
    }
    ours, equal, papers = larger.values()
    # Attention of 4 d^2 weights and feed-forward layers of 12 d^2: routers alone differ.
    assert equal.parameters == pytest.approx(ours.parameters, rel=0.01)
    assert equal.active_parameters == pytest.approx(ours.active_parameters, rel=0.01)
    assert papers.parameters > 1.1 * ours.parameters


def test_seeds_and_specialists_are_trained_once_whoever_comes_first(shared, tmp_path, monkeypatch):
    designs = [BAM, BTX, DENSE, Design("known", "known-domain")]
    forget()
    first = [trial(shared, design, tmp_path, f"a {design.name}", 7) for design in designs]
    forget()
    # Another order, in another process's stead.
    other = pickle.loads(pickle.dumps(shared))
    second = [trial(other, design, tmp_path, f"b {design.name}", 7) for design in designs[::-1]]
    for one, two in zip(first, second[::-1], strict=True):
        assert_same_scores(one, two)
        assert same_weights(one, two)
    n_kept = len(list((cache_directory() / "upcycling").glob("*/model.safetensors")))
    assert n_kept == 4
    trained = []
    original = module.UpcyclingProblem._train

    def counted(self, model, shares, steps, *rest):
        trained.append(steps)
        return original(self, model, shares, steps, *rest)

    monkeypatch.setattr(module.UpcyclingProblem, "_train", counted)
    trial(shared, BAM, tmp_path, "third", 7)
    assert trained == [6]
    # Another mixing phase merges the same models; other specialists, another seed do not.
    trained.clear()
    changed = problem(n_tokens=30 * BATCH, shares=(10, 12, 8))
    trial(changed, BAM, tmp_path, "longer", 7)
    assert trained == [8]
    trained.clear()
    trial(problem(n_tokens=31 * BATCH, shares=(10, 15, 6)), BAM, tmp_path, "more", 7)
    assert trained == [5, 5, 5, 6]
    trained.clear()
    shared.prepare([BAM, BTX], [7, 8], work(tmp_path))
    assert trained == [10, 4, 4, 4]
    trained.clear()
    shared.prepare([DENSE], [9], work(tmp_path))
    assert trained == [10]


def test_an_interrupted_phase_leaves_nothing_behind(shared, tmp_path):
    def stop(fraction, message):
        if "specialist" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.prepare([BAM], [11], Work(work(tmp_path).directory, stop))
    home = cache_directory() / "upcycling"
    assert not list(home.glob(".*.part"))
    interrupted = trial(shared, BAM, tmp_path, "after", 11)
    forget()
    assert_same_scores(interrupted, trial(shared, BAM, tmp_path, "anew", 11))


def test_trials_leave_the_callers_randomness_alone(shared, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trial(shared, BAM, tmp_path, seed=13)
    assert torch.equal(torch.get_rng_state(), state)


# Domains, bases, studies --------------------------------------------------------------------------


def test_a_decoder_of_the_users_own_is_the_seed(folder, tmp_path):
    base = str(folder / "base")
    options = {"base": base, "context": 48, "batch_size": 2, "n_tokens": 18 * 96}
    one = problem(**options)
    assert one.phases == Phases(seed=0, specialist=4, mixing=6)
    seed = trial(one, SEED, tmp_path, "seed")
    assert seed.cost["training_tokens"] == 0
    given = load_file(folder / "base" / "model.safetensors")
    kept = {name.partition("/")[2]: value for name, value in weights(seed).items()}
    assert all(torch.equal(kept[name], value) for name, value in given.items())
    for design in (BAM, Design("shared", "bam-shared-kv"), BTX, DENSE):
        found = trial(one, design, tmp_path, design.name)
        assert found.cost["training_tokens"] == 18 * 96
        assert np.isfinite(found.scores["loss"]["law"]).all()
    shorter = problem(**options, n_layers=1)
    assert shorter.fingerprint() != one.fingerprint()
    found = trial(shorter, BAM, tmp_path, "shorter")
    assert found.scores["balance"]["layers"].shape == (1,)


def test_a_base_whose_blocks_cannot_be_experts_is_refused_beforehand(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    save_language_model(tmp_path / "base", length=512)
    config = MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4)
    (tmp_path / "mamba").mkdir()
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    for path in (tmp_path / "base").glob("tok*"):
        shutil.copy(path, tmp_path / "mamba")
    one = problem(base=str(tmp_path / "mamba"), context=48)
    with pytest.raises(ModelError, match=r"blocks, of which 0 have an attention"):
        one.prepare([BAM], [0], work(tmp_path))


def test_sequential_blocks_are_a_base_as_well(tmp_path):
    found = trial(problem(base="small-gpt"), BAM, tmp_path)
    assert json.loads((found.artifact / "model" / "config.json").read_text())["text_config"][
        "model_type"
    ] == ("llama")


def test_two_domains_make_three_experts(tmp_path):
    texts = split_domains({d: sentences(d) for d in ("sums", "law")}, max_held_out=4)
    one = problem(texts)
    found = trial(one, BAM, tmp_path)
    config = json.loads((found.artifact / "model" / "config.json").read_text())
    assert config["n_experts"] == 3
    assert one.phases.specialist == 6


def test_a_study_compares_them(shared, tmp_path):
    designs = [DENSE, BAM, BTX]
    results = Study(shared, designs, reference="dense", seeds=2, directory=tmp_path).run()
    assert not results.data["failures"]
    assert {d["name"] for d in results.data["designs"]} == {"dense", "BAM", "BTX"}
    said = results.data["problem"]["description"]
    of_phases = "3 specialists of 512, nine tenths of their own domain"
    assert of_phases in said["budget"]
    assert "a seed of 1,280" in said["budget"]


def test_what_changes_a_score_changes_the_fingerprint(shared):
    digests = {
        one.fingerprint()
        for one in (
            shared,
            problem(match="flops"),
            problem(shares=(10, 12, 7)),
            problem(n_tokens=99 * BATCH),
            problem(learning_rate=1e-3),
            problem(base="small-gpt"),
            problem(batch_size=3),
            problem(context=24),
        )
    }
    assert len(digests) == 8
    assert problem().fingerprint() == shared.fingerprint()
    assert len(pickle.dumps(shared)) < 100_000


def test_training_that_diverges_fails_by_name(shared, tmp_path, monkeypatch):
    original = module.UpcyclingProblem._train

    def diverge(self, model, *rest):
        original(self, model, *rest)
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(float("nan"))

    shared._branched(0, work(tmp_path), (0, 1))
    monkeypatch.setattr(module.UpcyclingProblem, "_train", diverge)
    with pytest.raises(BakeoffError, match=r"'average': loss is no number: training diverged"):
        trial(shared, Design("average", "average"), tmp_path)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "time"}, 'match must be "tokens" or "flops", got \'time\''),
        ({"shares": (1, 2)}, r"shares must be three numbers >= 0.*got \(1, 2\)"),
        ({"shares": (1, -1, 1)}, "shares must be three numbers"),
        ({"shares": (0, 0, 0)}, "at least one is positive; got"),
        ({"shares": (1, float("inf"), 1)}, "shares must be three numbers"),
        ({"base": "x", "shares": (1, 0, 0)}, "of the last two where a model is named"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"context": 33}, "context must be at most the shape's 32, got 33"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"n_layers": 1}, "n_layers goes with a model that is named"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        problem(**changes)


def test_one_domain_is_refused():
    texts = DomainTexts("one", {"a": ("x" * 300,)}, {"a": ("y" * 300, "z" * 300)})
    with pytest.raises(DataError, match=r"at least 2 domains.*got a"):
        problem(texts)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("nonsense", {}, "nonsense does not say how to merge specialists.*bam-shared-kv"),
        ("bam", {"top": 1}, "bam takes attn_routing, .*got top"),
        ("seed", {"mixing": 1}, "seed takes no parameters; got mixing"),
        ("average", {"match": "flops"}, "average takes mixing; got match"),
        ("btx", {"attn_routing": 1}, "got attn_routing"),
        ("bam", {"ffn_top_k": 5}, "ffn_top_k must be between 1 and the number of experts, 4"),
        ("bam", {"attn_routing": 9}, 'attn_routing must be "soft" or between 1 and'),
        ("bam", {"router_init_std": -1}, "router_init_std must be a number >= 0"),
        ("bam", {"router_init_std": "wide"}, "not supported between"),
        ("bam", {"mixing": 2}, "mixing must be a number from 0 to 1, got 2"),
        ("bam", {"mixing": True}, "mixing must be a number from 0 to 1, got True"),
        ("bam", {"match": "time"}, 'match must be "tokens" or "flops"'),
        ("btx-larger", {"n_experts": 3}, "n_experts must be an integer of at least 4.*got 3"),
        ("btx-larger", {"n_experts": 6.5}, "n_experts must be an integer"),
    ],
)
def test_designs_that_cannot_run_are_refused_by_name(shared, method, params, message, tmp_path):
    design = Design("odd one", method, params)
    with pytest.raises(DataError, match=rf"^design 'odd one': .*{message}"):
        shared.check(design)
    with pytest.raises(DataError, match=r"^design 'odd one'"):
        shared.prepare([design], [0], Work(tmp_path))


def test_known_designs_pass_and_have_distinct_names(shared):
    for design in upcycling_designs():
        shared.check(design)
    assert {design.method for design in upcycling_designs()} == set(module._PARAMETERS)


# The winner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "anywhere"),
    [(BAM, False), (Design("average", "average"), True), (Design("k", "known-domain"), True)],
)
def test_the_winner_is_used_as_its_readme_says(shared, design, anywhere, tmp_path):
    found = trial(shared, design, tmp_path)
    winner = tmp_path / "it's the winner"
    assert shared.export(design, found.artifact, winner, reason="It won.") is anywhere
    readme = (winner / "README.md").read_text()
    assert "It won." in readme
    lines = readme.split("```python\n")[1].split("\n```")[0]
    assert lines.splitlines() == shared.usage(winner)
    # A new process, which has to find the same losses.
    text = TEXTS.held_out["sums"][0]
    ids = shared.tokenizer(text).input_ids[:31]
    ask = (
        f"import torch\nids = torch.tensor([[0, *{ids}]])\n"
        "print('LOSS', float(model(ids, labels=ids).loss))"
    )
    assert shared.tokenizer.eos_token_id == 0
    said = subprocess.run(
        [sys.executable, "-c", f"{lines}\n{ask}"], capture_output=True, text=True, check=True
    ).stdout
    loss = float(said.rpartition("LOSS ")[2])
    assert loss == pytest.approx(found.scores["loss"]["sums"][0], rel=1e-4)


def test_the_claims_name_designs_that_are_run():
    from bakeoff.claims.bam import CLAIMS, DESIGNS

    known = {design.name for design in upcycling_designs()}
    assert set(DESIGNS) <= known
    for claim in CLAIMS:
        assert {claim.treatment, *claim.references} <= set(DESIGNS)
