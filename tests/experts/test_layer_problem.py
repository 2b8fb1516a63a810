"""Which mixture layer: sizes match, one expert is the dense layer, batches are what they say."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from tests.selection.tiny_selection import save_language_model

from bakeoff.data.domain_texts import split_domains
from bakeoff.errors import BakeoffError, DataError
from bakeoff.experts import load_moe, moe_layers
from bakeoff.experts.inspection import inspect_experts
from bakeoff.experts.problem.common import forward_flops_per_token
from bakeoff.experts.problem.layers import LAYER_METRICS, LayerProblem, layer_designs
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Study, Work

HIDDEN, LAYERS, CONTEXT = 16, 2, 24
SHAPE = SmallGPT(vocabulary=300, n_layers=LAYERS, width=HIDDEN, n_heads=2, context=CONTEXT)
WORDS = {"a": "one two three four", "b": "the cat sat on a mat", "c": "x = y + z ( w )"}
DENSE = Design("dense", "dense")
TOP_2 = Design("top-2", "top-k")
# A gated layer's weights: gate and value in, one matrix out.
DENSE_LAYER = 3 * HIDDEN * 4 * HIDDEN
FIGURES = tuple(name for name in LAYER_METRICS if name != "loss")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny decoder of the user's own, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("layers")
    save_language_model(made / "base", length=64, intermediate_size=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def texts(domains=("a", "b", "c"), held_out=None, backwards=False):
    def said(name, i):
        return " ".join(
            f"{word}{(i + 1) * (place + 3) % 89}"
            for place, word in enumerate(WORDS[name].split() * 6)
        )

    split = split_domains({name: [said(name, i) for i in range(16)] for name in domains}, share=0.3)
    if not backwards:
        return split
    turned = {name: documents[::-1] for name, documents in split.held_out.items()}
    return replace(split, held_out=turned)


def problem(given=None, **options):
    return LayerProblem(
        given or texts(), **{"shape": SHAPE, "n_tokens": 900, "batch_size": 4, **options}
    )


@pytest.fixture(scope="module")
def shared():
    return problem()


def trial(one, design, tmp_path, seed=0):
    place = tmp_path / f"{design.name}-{seed}-{len(list(tmp_path.iterdir()))}"
    place.mkdir(parents=True)
    return one.run(design, seed, Work(place))


def test_all_designs_of_the_list_can_run_and_are_described(shared, tmp_path):
    designs = layer_designs()
    shared.prepare(designs, [0], Work(tmp_path))
    assert designs[0].method == "dense"
    text = json.dumps(shared.describe())
    assert "which mixture-of-experts layer" in text
    assert "logarithm of its perplexity" in text
    assert next(iter(shared.metrics)) == "loss"


@pytest.mark.parametrize("design", layer_designs(), ids=lambda design: design.name)
def test_every_design_trains_and_its_figures_are_of_layers(shared, tmp_path, design):
    found = trial(shared, design, tmp_path)
    documents = {name: len(some) for name, some in shared.texts.held_out.items()}
    assert {name: len(values) for name, values in found.scores["loss"].items()} == documents
    for name in FIGURES:
        (values,) = found.scores[name].values()
        assert len(values) == (LAYERS - 1 if name == "layer_information" else LAYERS)
    figures = {name: found.scores[name]["held-out"] for name in FIGURES}
    if design.method == "dense":
        assert figures["balance"].tolist() == [1.0, 1.0]
        for name in ("specialisation", "entropy", "layer_information", "drops"):
            assert not figures[name].any()
    else:
        assert (figures["balance"] >= 1).all()
        for name in ("specialisation", "entropy", "layer_information", "drops"):
            assert (figures[name] >= -1e-9).all()
            assert (figures[name] <= 1 + 1e-9).all()
    assert bool(figures["drops"].any()) == ("tight" in design.name)
    read = found.cost["training_tokens"]
    assert read == 9 * 4 * CONTEXT  # 900 tokens hold nine steps
    assert found.cost["training_flops"] == 3 * read * found.cost["forward_flops_per_token"]


# Of experts, gate and dense layer together, by hand.
@pytest.mark.parametrize(
    ("params", "active", "total"),
    [
        ({}, 1, 8 / 2),
        ({"k": 1, "experts": 4}, 1, 4),
        ({"k": 4, "experts": 16}, 1, 4),
        ({"k": 3, "experts": 16, "shared": 1}, 1, 17 / 4),
        ({"k": 1, "experts": 8, "shared": 1}, 1, 9 / 2),
        ({"k": 2, "granularity": 1}, 2, 8),
    ],
)
def test_active_and_total_weights_are_those_of_the_closed_form(shared, params, active, total):
    design = Design("one", "top-k", params)
    shared.check(design)
    made = shared._model(design, 0)
    dense = shared.start(0)
    gate = params.get("experts", 8) * HIDDEN
    rest = sum(p.numel() for p in dense.parameters()) - LAYERS * DENSE_LAYER
    cost = shared.cost(made, 1)
    assert cost["active_parameters"] == rest + LAYERS * (active * DENSE_LAYER + gate)
    assert cost["total_parameters"] == rest + LAYERS * (total * DENSE_LAYER + gate)
    # A multiply-add is two operations; attention and embeddings are the dense decoder's.
    more = LAYERS * 2 * ((active - 1) * DENSE_LAYER + gate)
    flops = forward_flops_per_token(dense, shared.rows())
    assert cost["forward_flops_per_token"] == pytest.approx(flops + more)


def test_the_wide_rival_has_as_many_weights_as_all_experts(shared):
    wide = shared._model(Design("wide", "dense", {"width": 4}), 0)
    dense, mixture = shared.start(0), shared._model(TOP_2, 0)
    gates = LAYERS * 8 * HIDDEN
    n_wide, n_dense, n_mixture = (
        sum(p.numel() for p in model.parameters()) for model in (wide, dense, mixture)
    )
    assert n_wide == n_mixture - gates == n_dense + 3 * LAYERS * DENSE_LAYER
    # All that the two have in common starts alike.
    for name, weights in dense.state_dict().items():
        other = wide.state_dict()[name]
        corner = tuple(slice(size) for size in weights.shape)
        assert torch.equal(other[corner], weights)
    added = wide.model.layers[0].mlp.down_proj.weight[:, 4 * HIDDEN :].detach()
    assert float(added.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.filterwarnings("ignore:drop=")
def test_designs_start_with_the_same_attention_and_embeddings(shared):
    dense = shared.start(3).state_dict()
    for design in layer_designs():
        made = shared._model(design, 3).state_dict()
        common = [name for name in dense if ".mlp." not in name]
        assert len(common) > 8
        for name in common:
            assert torch.equal(made[name], dense[name]), (design.name, name)


def test_random_experts_are_drawn_as_the_dense_layer_is_and_differ(shared):
    layers = list(
        moe_layers(shared._model(Design("s", "top-k", {"shared": 1, "k": 1}), 0)).values()
    )
    banks = [layer.experts for layer in layers]
    for bank, always in zip(banks, [layer.shared for layer in layers], strict=True):
        for weights in (bank.w_in, bank.w_out, always.w_in, always.w_out):
            flat = weights.detach().flatten(1)
            assert float(flat.std()) == pytest.approx(0.02, rel=0.1)
            assert (
                float(flat.corrcoef().fill_diagonal_(0).abs().max() if len(flat) > 1 else 0) < 0.2
            )
    first, second = (bank.w_out.detach().flatten() for bank in banks)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1
    gates = [layer.router.weight.detach().flatten() for layer in layers]
    embeddings = shared.start(0).get_input_embeddings().weight.detach().flatten()[: len(gates[0])]
    for gate in gates:
        both = torch.corrcoef(torch.stack([gate, embeddings]))
        assert abs(float(both[0, 1])) < 0.4


def test_a_mixture_of_one_expert_is_the_dense_decoder(shared, tmp_path):
    alone = Design(
        "one expert",
        "top-k",
        {"experts": 1, "k": 1, "renorm": True, "balance": None, "z_loss": 0},
    )
    dense, one = (trial(shared, design, tmp_path) for design in (DENSE, alone))
    before = shared.losses(shared.start(0))
    for name, losses in dense.scores["loss"].items():
        np.testing.assert_allclose(one.scores["loss"][name], losses, atol=1e-5)
        assert np.abs(before[name] - losses).min() > 1e-3  # training did something
    assert one.scores["balance"]["held-out"].tolist() == [1.0, 1.0]


def test_a_trial_depends_on_design_and_seed_alone(shared, tmp_path):
    for design in (TOP_2, Design("random", "random", {"k": 2}), Design("noisy", "noisy-top-k")):
        first = trial(shared, design, tmp_path, seed=5)
        torch.manual_seed(99)
        torch.rand(7)
        state = torch.get_rng_state()
        again = trial(problem(), design, tmp_path, seed=5)
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are drawn
        other = trial(shared, design, tmp_path, seed=6)
        for metric, tasks in first.scores.items():
            for task, values in tasks.items():
                np.testing.assert_array_equal(again.scores[metric][task], values)
        assert not np.array_equal(other.scores["loss"]["a"], first.scores["loss"]["a"])


def test_the_order_of_held_out_documents_changes_nothing(shared, tmp_path):
    turned = problem(texts(backwards=True))
    found, other = trial(shared, TOP_2, tmp_path), trial(turned, TOP_2, tmp_path)
    for name, losses in found.scores["loss"].items():
        np.testing.assert_allclose(other.scores["loss"][name][::-1], losses, atol=1e-5)
    for name in FIGURES:
        np.testing.assert_allclose(
            other.scores[name]["held-out"], found.scores[name]["held-out"], atol=1e-6
        )
    assert turned.fingerprint() != shared.fingerprint()  # units are in another order


def test_figures_are_those_of_the_inspection(shared, tmp_path):
    design = Design("some layers", "top-k", {"dense_first": 1})
    found = trial(shared, design, tmp_path)
    model = load_moe(found.artifact / "model")
    (layer,) = inspect_experts(model, shared.batches_to_inspect(), shared.texts.domains).layers
    assert found.scores["balance"]["held-out"].tolist() == [1.0, layer.max_over_mean]
    assert found.scores["specialisation"]["held-out"].tolist() == [0.0, layer.specialisation]
    assert found.scores["entropy"]["held-out"].tolist() == [0.0, layer.entropy]
    assert found.scores["layer_information"]["held-out"].tolist() == [0.0]


def test_information_is_between_neighbours(tmp_path):
    deep = problem(shape=replace(SHAPE, n_layers=4))
    design = Design("one router for all", "hash", {"k": 1, "seed": 0})
    found = trial(deep, design, tmp_path)
    np.testing.assert_allclose(found.scores["layer_information"]["held-out"], [1, 1, 1])
    other = trial(deep, Design("a table per layer", "hash", {"k": 1}), tmp_path)
    assert (other.scores["layer_information"]["held-out"] < 0.9).all()
    every = trial(deep, Design("every other", "hash", {"k": 1, "seed": 0, "every": 2}), tmp_path)
    assert not every.scores["layer_information"]["held-out"].any()


def test_one_domain_has_no_specialisation(tmp_path):
    found = trial(problem(texts(("a",))), TOP_2, tmp_path)
    assert not found.scores["specialisation"]["held-out"].any()


# -- batches ---------------------------------------------------------------------------------------


def domains_of(one, batch):
    rows = one.rows()
    return [
        next(name for name, some in rows.items() if bool((some == row).all(dim=1).any()))
        for row in batch
    ]


def test_by_domain_batches_hold_one_domain_each_and_take_turns(tmp_path):
    one = problem(batching="by-domain", accumulation=2)
    micro = list(islice(one.batches(TOP_2, 0), 12))
    assert {tuple(batch.shape) for batch in micro} == {(2, CONTEXT)}
    found = [set(domains_of(one, batch)) for batch in micro]
    assert all(len(domains) == 1 for domains in found)
    for start in range(0, 12, 3):  # three domains: each once before any comes again
        assert set.union(*found[start : start + 3]) == {"a", "b", "c"}


def test_shuffled_steps_hold_the_same_sequences(tmp_path):
    one = problem(batching="by-domain", accumulation=2)
    control = Design("shuffled", "top-k", {"batching": "shuffled"})
    whole = Design("whole", "top-k", {"accumulation": 1})
    small = Design("small", "top-k", {"accumulation": 4})
    steps = {
        design.name: torch.stack(list(islice(one.batches(design, 0), 10 * n)))
        for design, n in ((TOP_2, 2), (control, 2), (whole, 1), (small, 4))
    }
    assert steps["whole"].shape == (10, 4, CONTEXT)
    assert steps["small"].shape == (40, 1, CONTEXT)
    for name in ("whole", "small"):
        assert torch.equal(steps[name].view(10, 4, -1), steps["top-2"].view(10, 4, -1))

    def in_order(batches):
        return [sorted(map(tuple, step.tolist())) for step in batches.reshape(10, 4, CONTEXT)]

    assert in_order(steps["shuffled"]) == in_order(steps["top-2"])
    assert not torch.equal(steps["shuffled"], steps["top-2"])
    mixed = sum(len(set(domains_of(one, batch))) > 1 for batch in steps["shuffled"])
    assert mixed >= 5


@pytest.mark.parametrize("batching", ["mixed", "by-domain", "shuffled"])
def test_every_sequence_comes_once_before_any_comes_twice(batching):
    one = problem(batching=batching, accumulation=2)
    counts = {name: torch.zeros(len(rows)) for name, rows in one.rows().items()}
    for number, batch in enumerate(islice(one.batches(DENSE, 1), 300), start=1):
        for name, row in zip(domains_of(one, batch), batch, strict=True):
            same = (one.rows()[name] == row).all(dim=1)
            assert int(same.sum()) == 1
            counts[name] += same
        if number % 2 == 0:  # a step is complete
            assert all(float(each.max() - each.min()) <= 1 for each in counts.values())
    assert all(float(each.min()) >= 1 for each in counts.values())


def test_micro_batches_of_a_step_train_as_the_whole_does(shared, tmp_path):
    """A dense decoder's gradient does not see how a step is cut."""
    parts = Design("parts", "dense", {"accumulation": 4})
    whole, cut = trial(shared, DENSE, tmp_path), trial(shared, parts, tmp_path)
    for name, losses in whole.scores["loss"].items():
        np.testing.assert_allclose(cut.scores["loss"][name], losses, atol=1e-4)


def test_global_balance_over_parts_of_a_step_differs_from_balance_in_each(tmp_path):
    one = problem(batching="by-domain", accumulation=4, n_tokens=2000)
    options = {"balance": "global-balance", "coefficient": 5.0}
    found = {
        scope: trial(one, Design(scope, "top-k", {**options, "scope": scope}), tmp_path)
        for scope in ("global", "micro")
    }
    switch = trial(one, Design("switch", "top-k", {"coefficient": 5.0}), tmp_path)
    losses = {name: each.scores["loss"]["a"] for name, each in found.items()}
    assert np.abs(losses["global"] - losses["micro"]).max() > 1e-5
    # In one process and one micro-batch, it is the usual loss.
    np.testing.assert_allclose(losses["micro"], switch.scores["loss"]["a"], atol=1e-5)


def test_a_bias_moves_after_every_step(shared, tmp_path):
    found = trial(shared, Design("free", "loss-free", {"bias_rate": 0.5}), tmp_path)
    for layer in moe_layers(load_moe(found.artifact / "model")).values():
        bias = layer.router.bias
        assert torch.equal(bias, (bias / 0.5).round() * 0.5)
        assert float(bias.abs().max()) >= 0.5


# -- compute ---------------------------------------------------------------------------------------


def test_equal_operations_buy_fewer_tokens_for_the_wide(tmp_path):
    one = problem(match="flops", n_tokens=5000)
    wide = Design("wide", "dense", {"width": 4})
    found = {design.name: trial(one, design, tmp_path) for design in (DENSE, wide, TOP_2)}
    flops = {name: each.cost["forward_flops_per_token"] for name, each in found.items()}
    step = 4 * CONTEXT
    for name, each in found.items():
        allowed = 5000 * flops["dense"] / flops[name]
        assert each.cost["training_tokens"] == allowed // step * step
        assert each.notes == (f"Read {int(each.cost['training_tokens']):,} tokens.",)
    assert flops["wide"] - flops["dense"] == pytest.approx(3 * LAYERS * 2 * DENSE_LAYER)
    spent = [each.cost["training_flops"] for each in found.values()]
    assert max(spent) <= 3 * 5000 * flops["dense"]
    assert min(spent) > 0.9 * max(spent)
    assert one.fingerprint() != problem(n_tokens=5000).fingerprint()


# -- a named base ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(folder):
    return problem(base=str(folder / "base"), context=32, learning_rate=1e-3)


@pytest.mark.filterwarnings("ignore:renorm=True with k=1")
@pytest.mark.parametrize(
    ("params", "same"),
    [
        ({"granularity": 1}, True),  # whatever is chosen, it is the dense layer
        ({"experts": 2}, True),  # two halves, both chosen
        ({"experts": 1, "k": 1, "shared": 1, "renorm": True, "granularity": 1}, False),
        ({"granularity": 1, "start": "random"}, False),
    ],
)
def test_a_named_decoder_is_upcycled(named, params, same):
    if params.get("experts") == 2:
        # Equal weights on both halves: what the router says must not matter.
        params = {**params, "temperature": 1e6}
    design = Design("upcycled", "top-k", params)
    named.check(design)
    before, after = named.losses(named.start(0)), named.losses(named._model(design, 0))
    difference = max(np.abs(before[name] - after[name]).max() for name in before)
    assert (difference < 1e-4) == same


@pytest.mark.filterwarnings("ignore:renorm=True with k=1")
def test_a_shared_part_completes_the_dense_layer(named):
    """One of two halves is always on, the other is the only choice."""
    design = Design("shared", "top-k", {"experts": 2, "k": 1, "shared": 1, "renorm": True})
    named.check(design)
    model = named._model(design, 0)
    for layer in moe_layers(model).values():
        # The router is told to choose the half that is not shared.
        layer.router.score = "sigmoid"
        layer.router.bias_rate = 1e-9
        layer.router.bias = torch.tensor([0.0, 100.0])
        assert layer.scale == 1.0
    before, after = named.losses(named.start(0)), named.losses(model)
    for name, losses in before.items():
        np.testing.assert_allclose(after[name], losses, atol=1e-4)


def test_a_wide_dense_decoder_begins_where_the_named_one_is(named, tmp_path):
    wide = Design("wide", "dense", {"width": 3})
    named.check(wide)
    before, after = named.losses(named.start(0)), named.losses(named._model(wide, 0))
    for name, losses in before.items():
        np.testing.assert_allclose(after[name], losses, atol=1e-5)
    found = trial(named, wide, tmp_path)
    assert found.cost["total_parameters"] > trial(named, DENSE, tmp_path).cost["total_parameters"]


def test_a_mixture_of_a_named_decoder_trains(named, tmp_path):
    found = trial(named, TOP_2, tmp_path)
    assert all(np.isfinite(values).all() for values in found.scores["loss"].values())


def test_parallel_blocks_can_be_mixtures_too(tmp_path):
    one = problem(base="small-parallel")
    for design in (TOP_2, Design("wide", "dense", {"width": 2})):
        assert trial(one, design, tmp_path).cost["total_parameters"] > 0


# -- the winner ------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [DENSE, TOP_2], ids=lambda design: design.name)
def test_the_winner_is_what_was_judged_and_its_readme_runs(shared, tmp_path, design):
    found = trial(shared, design, tmp_path)
    target = tmp_path / "winner"
    alone = shared.export(design, found.artifact, target, reason="It was best.")
    assert alone == (design.method == "dense")
    text = (target / "README.md").read_text("utf-8")
    assert "It was best." in text
    assert design.name in text
    if alone:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(target)
    else:
        model = load_moe(target)
    for name, losses in shared.losses(model).items():
        np.testing.assert_allclose(losses, found.scores["loss"][name], atol=1e-5)
    lines = shared.usage(target)
    assert all(line in text for line in lines)
    assert ("load_moe" in "\n".join(lines)) != alone
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("The ")


# -- in a study, and wrong input -------------------------------------------------------------------


def test_a_study_runs_on_it_in_other_processes(tmp_path):
    one = problem()
    one.prepare([DENSE], [0], Work(tmp_path))
    assert len(pickle.dumps(one)) < 100_000
    assert pickle.loads(pickle.dumps(one)).fingerprint() == one.fingerprint()
    results = Study(
        one, [DENSE, TOP_2], reference="dense", seeds=2, directory=tmp_path / "study", workers=2
    ).run()
    assert not results.data["failures"]
    here = trial(one, TOP_2, tmp_path, seed=results.data["study"]["seeds"][0])
    mean = np.mean([values.mean() for values in here.scores["loss"].values()])
    by_seed = results.unit_scores["loss"]["top-2"]
    first = np.mean([np.asarray(by_seed[task])[0].mean() for task in by_seed])
    assert first == pytest.approx(mean, abs=1e-9)


def test_fingerprints_differ_where_scores_may(shared):
    others = [
        problem(match="flops"),
        problem(batching="by-domain"),
        problem(accumulation=2),
        problem(n_tokens=901),
        problem(texts(("a", "b"))),
    ]
    prints = {one.fingerprint() for one in (shared, *others)}
    assert len(prints) == 1 + len(others)
    assert problem().fingerprint() == shared.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "time"}, "match must be one of tokens, flops, got 'time'"),
        ({"batching": "sorted"}, "batching must be one of mixed, by-domain, shuffled"),
        ({"accumulation": 3}, "accumulation must divide batch_size=4, got 3"),
        ({"accumulation": 0}, "accumulation must be a whole number of at least 1, got 0"),
        ({"n_tokens": 0}, "n_tokens must be at least 1"),
    ],
)
def test_impossible_problems_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        problem(**options)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("expert-choice", {}, "expert-choice does not say which mixture-of-experts layer; there"),
        ("soft", {}, "soft does not say"),
        ("domain", {}, "domain does not say"),
        ("dense", {"k": 2}, "dense takes width, batching, accumulation; got k"),
        ("dense", {"width": 0}, "width must be a whole number of at least 1, got 0"),
        ("top-k", {"kk": 2}, "top-k takes k, score.*; got kk"),
        ("top-k", {"k": 9, "granularity": 1}, "k is 9, but there are only 8 experts"),
        ("top-k", {"k": 3}, "width of 64 cannot be divided by granularity=3"),
        ("top-k", {"k": 4, "experts": 6}, "granularity=4 .by default k . shared. must divide"),
        ("top-k", {"k": "2"}, "k must be a whole number of at least 1, got '2'"),
        ("top-k", {"experts": 0}, "experts must be a whole number of at least 1"),
        ("top-k", {"shared": -1}, "shared must be a whole number of at least 0, got -1"),
        ("top-k", {"score": "cubic"}, "score must be"),
        ("top-k", {"balance": "even"}, "unknown loss 'even'"),
        ("top-k", {"balance": None, "coefficient": 0.1}, "coefficient goes with a balance loss"),
        ("top-k", {"scope": "global"}, "loss 'switch-balance' got settings"),
        ("top-k", {"balance": "global-balance", "scope": "all"}, "unknown scope 'all'"),
        ("top-k", {"z_loss": -1}, "z_loss must be a number of at least 0, got -1"),
        ("top-k", {"capacity": 0}, "capacity must be above 0, got 0"),
        ("top-k", {"capacity": [1, 2, 3]}, "capacity must be a number or two"),
        ("top-k", {"drop": "some"}, "unknown drop policy 'some'"),
        ("top-k", {"every": 5}, "no layer of 2 is chosen"),
        ("top-k", {"start": "cold"}, "start must be 'copy' or 'random', got 'cold'"),
        ("top-k", {"batching": "sorted"}, "batching must be one of"),
        ("top-k", {"accumulation": 3}, "accumulation must divide batch_size=4, got 3"),
        ("recurrent", {"cell": "gpu"}, "unknown cell 'gpu'"),
        ("hash", {"k": 0}, "k must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_designs_are_refused(shared, method, params, message):
    with pytest.raises(DataError, match=f"^design 'odd': .*{message}"):
        shared.check(Design("odd", method, params))


def test_every_router_on_offer_passes_its_own_check(shared):
    with pytest.raises(DataError) as caught:
        shared.check(Design("odd", "nothing"))
    methods = str(caught.value).split("there are: ")[1].split(", ")
    assert {"dense", "top-k", "switch", "loss-free", "hash", "random", "recurrent"} <= set(methods)
    assert not {"expert-choice", "soft", "merged", "domain"} & set(methods)
    for method in methods:
        shared.check(Design(method, method))


def test_training_that_diverges_says_so(tmp_path):
    with pytest.raises(BakeoffError, match=r"training diverged|not all finite"):
        trial(problem(learning_rate=1e30, n_tokens=4000), TOP_2, tmp_path)
