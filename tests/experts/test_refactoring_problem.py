"""The refactoring problem on tiny decoders: what each design cuts, reads, scores and leaves."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.selection.tiny_selection import save_language_model
from transformers import AutoModelForCausalLM

from bakeoff.data.domain_texts import DomainTexts
from bakeoff.errors import DataError, ModelError
from bakeoff.experts.causal_training import domain_batches
from bakeoff.experts.loading import load_experts
from bakeoff.experts.problem.refactoring import (
    REFACTORING_METRICS,
    RefactoringProblem,
    refactoring_designs,
)
from bakeoff.experts.read_me import (
    ChannelStats,
    ExpertMasks,
    build_expert_masks,
    moefy,
    tune,
    tune_experts,
)
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Study, Work

SHAPE = SmallGPT(vocabulary=300, n_layers=2, width=32, n_heads=2, context=32)
DOMAINS = ("letters", "numbers", "marks")
TINY = {
    "shape": SHAPE,
    "batch_size": 4,
    "n_tokens": 10 * 4 * 32,
    "teacher_tokens": 40 * 4 * 32,
    "calibration_tokens": 10**6,
    "learning_rate": 1e-3,
}
TEACHER = Design("teacher", "dense-teacher")
OURS = Design("Read-ME", "read-me", {"rounds": 2})
KNOWN = Design("domain known", "read-me", {"routing": "domain", "expert_share": 0.0})
POOLED = Design("pooled", "pooled-mask", {"rounds": 1})
RANDOM = Design("random", "random-masks", {"rounds": 1})
NARROW = Design("narrow", "dense-narrow")
WORDS = {
    "letters": ("alpha", "beta", "gamma", "delta", "zeta", "theta", "kappa", "sigma"),
    "numbers": ("17", "230", "9", "4411", "58", "6", "72", "3005"),
    "marks": ("<-", "=>", "()", "[];", "&&", "||", "!=", "**"),
}


def texts(domains=DOMAINS, n_documents=5):
    def some(domain, number):
        rng = np.random.default_rng([DOMAINS.index(domain), number])
        return " ".join(rng.choice(WORDS[domain], int(rng.integers(6, 12))))

    training = {d: tuple(some(d, i) for i in range(60)) for d in domains}
    held_out = {d: tuple(some(d, 1000 + i) for i in range(n_documents)) for d in domains}
    return DomainTexts("tiny", training, held_out)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny decoder of the user's own, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("refactoring")
    save_language_model(made / "base", length=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def problem(given=None, **changes):
    return RefactoringProblem(texts() if given is None else given, **{**TINY, **changes})


@pytest.fixture(scope="module")
def shared(folder):
    return problem()


def trial(one, design, folder, name="trial", seed=0):
    (folder / name).mkdir()
    return one.run(design, seed, Work(folder / name))


def weights(found):
    return load_file(found.artifact / "model" / "model.safetensors")


def same_scores(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for metric, tasks in one.scores.items():
        for task, values in tasks.items():
            np.testing.assert_allclose(other.scores[metric][task], values, **tolerance)


def losses(found):
    return np.concatenate(list(found.scores["loss"].values()))


def loss_by_hand(one, model, document, **given):
    """Return nats per token of a document after the end of another, one at a time."""
    end = one.tokenizer.eos_token_id
    ids = torch.tensor([[end, *document]])
    with torch.no_grad():
        table = model(ids, use_cache=False, **given).logits[0, :-1].double().log_softmax(-1)
    return -table.gather(1, ids[0, 1:, None]).mean().item()


def documents(one):
    end = one.context - 1
    return {
        domain: [one.tokenizer(t, add_special_tokens=False).input_ids[:end] for t in some]
        for domain, some in one.texts.held_out.items()
    }


def means_by_hand(one):
    """Return each domain's mean size of every channel of every layer, ``{domain: [(D,), ...]}``."""
    model, found = one.start(0), {}
    for domain, rows in one.rows().items():
        seen = [[] for _ in model.model.layers]
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0].detach().abs().flatten(0, 1))
            )
            for layer, kept in zip(model.model.layers, seen, strict=True)
        ]
        with torch.no_grad():
            model(rows)
        for hook in hooks:
            hook.remove()
        found[domain] = [torch.cat(parts).double().mean(0) for parts in seen]
    return found


def masked(model, means, keep=0.5):
    """Return a dense copy of which all but the channels of largest mean are zero in effect."""
    cut = copy.deepcopy(model)
    for layer, mean in zip(cut.model.layers, means, strict=True):
        off = mean.argsort()[: len(mean) - round(keep * len(mean))]
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, off] = 0
    return cut


# What is cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["small-gpt", "small-parallel"])
def test_with_all_channels_and_no_training_it_is_the_dense_decoder(tmp_path, base):
    one = problem(keep=1.0, base=base)
    expected = trial(one, TEACHER, tmp_path, "teacher")
    untrained = {"router_share": 0.0, "expert_share": 0.0}
    designs = [
        Design("routed", "read-me", untrained),
        Design("known", "read-me", {"routing": "domain", "expert_share": 0.0}),
        Design("random", "random-masks", untrained),
        Design("pooled", "pooled-mask", {"expert_share": 0.0}),
    ]
    for design in designs:
        found = trial(one, design, tmp_path, design.name)
        np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-5)
    half = trial(problem(base=base), designs[3], tmp_path, "half")
    assert np.abs(losses(half) - losses(expected)).max() > 1e-4


def test_a_known_domain_is_that_domains_masked_decoder_alone(shared, tmp_path):
    found = trial(shared, KNOWN, tmp_path)
    means, dense = means_by_hand(shared), shared.start(0)
    for domain, some in documents(shared).items():
        alone = masked(dense, means[domain])
        expected = [loss_by_hand(shared, alone, document) for document in some]
        np.testing.assert_allclose(found.scores["loss"][domain], expected, rtol=1e-4)


def test_a_pooled_mask_has_the_channels_of_largest_mean_over_domains(shared, tmp_path):
    design = Design("pooled", "pooled-mask", {"expert_share": 0.0})
    found = trial(shared, design, tmp_path)
    by_domain = means_by_hand(shared).values()
    means = [sum(layers) / len(DOMAINS) for layers in zip(*by_domain, strict=True)]
    cut = masked(shared.start(0), means)
    for domain, some in documents(shared).items():
        expected = [loss_by_hand(shared, cut, document) for document in some]
        np.testing.assert_allclose(found.scores["loss"][domain], expected, rtol=1e-4)


def test_random_masks_share_what_chance_makes_them_share(shared, tmp_path):
    wide = ChannelStats(DOMAINS, (torch.rand(3, 4096),) * 2, (9, 9, 9))
    for keep in (0.25, 0.5):
        overlap = build_expert_masks(wide, keep, rule="random", seed=3).overlap()
        others = overlap[~np.eye(3, dtype=bool)]
        # Hypergeometric: of n drawn from D, n are the other's; two layers are averaged.
        n = keep * 4096
        deviation = math.sqrt(keep * (1 - keep) * (4096 - n) / (n * 4095) / 2)
        assert np.abs(others - keep).max() < 4 * deviation
    notes = []
    for seed in (0, 1):
        design = Design("r", "random-masks", {"routing": "domain", "expert_share": 0.0})
        found = trial(shared, design, tmp_path, f"r{seed}", seed=seed)
        notes.append(losses(found))
        share = int(re.search(r"share (\d+)%", found.notes[0]).group(1))
        assert 40 < share < 60
    assert not np.allclose(*notes)
    known = [trial(shared, KNOWN, tmp_path, f"k{seed}", seed=seed) for seed in (0, 1)]
    same_scores(*known)  # the domains' own channels are no matter of chance


# How it is tuned ----------------------------------------------------------------------------------


@pytest.mark.parametrize("design", refactoring_designs(), ids=lambda design: design.name)
def test_every_design_reads_at_most_the_budget_and_is_scored(shared, design, tmp_path, monkeypatch):
    steps = []
    original = torch.optim.AdamW.step

    def step(optimizer, *rest, **more):
        steps.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        return original(optimizer, *rest, **more)

    shared.prepare([design], [1], Work(tmp_path))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    seen = []
    (tmp_path / "trial").mkdir()
    work = Work(tmp_path / "trial", lambda fraction, message: seen.append(fraction))
    found = shared.run(design, 1, work)
    batch = 4 * 32
    assert found.cost["training_tokens"] == len(steps) * batch
    routers = steps.count(min(steps)) if found.cost["router_tokens"] else 0
    if len(set(steps)) == 2:
        assert found.cost["router_tokens"] == routers * batch
    limit = 10 * batch + (40 * batch if design.method == "dense-narrow" else 0)
    expected = {
        "dense teacher": 0,
        "Read-ME, domain known": 0.8 * limit,
        "Read-ME, router alone tuned": 0.2 * limit,
    }
    untuned = 0 if "not tuned" in design.name else limit
    assert found.cost["training_tokens"] == expected.get(design.name, untuned)
    assert list(found.scores) == list(REFACTORING_METRICS)
    for tasks in found.scores.values():
        assert {domain: v.shape for domain, v in tasks.items()} == dict.fromkeys(DOMAINS, (5,))
        assert all(np.isfinite(values).all() for values in tasks.values())
    assert (found.cost["training_flops"] > 0) == (len(steps) > 0)
    assert (found.cost["trained_parameters"] > 0) == (len(steps) > 0)
    assert found.cost["active_parameters"] <= found.cost["total_parameters"]
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 1


def test_it_is_tuned_as_published(shared, tmp_path):
    found = trial(shared, OURS, tmp_path, seed=4)
    masks = build_expert_masks(shared.channel_stats(), 0.5)
    model = moefy(shared.start(0), masks, seed=4)
    history = tune(
        model,
        (batch for batch in domain_batches(shared.rows(), batch_size=4, seed=4)),
        rounds=2,
        router_steps=1,
        expert_steps=4,
        router_rate=1e-2,
        expert_rate=1e-3,
    )
    assert [len(r.router_losses) + len(r.expert_losses) for r in history] == [5, 5]
    expected = model.pack().state_dict()
    for name, value in weights(found).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def hand_tuned(one, model, experts, n_steps, rate, seed):
    """Tune with AdamW and a cosine; `experts` gives the expert ids of a batch's rows."""
    model.train()
    inner = model.language_model if hasattr(model, "language_model") else model
    parameters = list(inner.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    for step, batch in enumerate(
        islice(domain_batches(one.rows(), batch_size=4, seed=seed), n_steps)
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / n_steps)) / 2
        optimizer.zero_grad()
        model(batch, labels=batch, **experts(batch)).loss.backward()
        optimizer.step()
    return model.eval()


def test_with_the_domain_known_each_text_trains_its_own_expert(shared, tmp_path):
    params = {"routing": "domain", "expert_share": 1.0, "rounds": 1}
    found = trial(shared, Design("known", "read-me", params), tmp_path, seed=2)
    whose = {
        tuple(row.tolist()): number
        for number, rows in enumerate(shared.rows().values())
        for row in rows
    }

    def experts(batch):
        numbers = torch.tensor([whose[tuple(row.tolist())] for row in batch])
        return {"expert_ids": numbers[:, None].expand_as(batch)}

    model = moefy(shared.start(0), build_expert_masks(shared.channel_stats(), 0.5), seed=2)
    hand_tuned(shared, model, experts, 10, 1e-3, seed=2)
    for number, (domain, some) in enumerate(documents(shared).items()):
        expected = [loss_by_hand(shared, model, text, expert_ids=number) for text in some]
        np.testing.assert_allclose(found.scores["loss"][domain], expected, rtol=1e-4)


def test_a_cut_decoder_is_tuned_as_a_masked_one_of_one_expert(shared, tmp_path):
    found = trial(shared, POOLED, tmp_path, seed=2)
    masks = build_expert_masks(shared.channel_stats(), 0.5, rule="pooled")
    model = moefy(shared.start(0), masks, seed=2)
    batches = domain_batches(shared.rows(), batch_size=4, seed=2)
    tune_experts(model, batches, steps=10, learning_rate=1e-3)
    for number, (domain, some) in enumerate(documents(shared).items()):
        expected = [loss_by_hand(shared, model, text, expert_ids=number) for text in some]
        np.testing.assert_allclose(found.scores["loss"][domain], expected, rtol=1e-4)


def test_the_rate_falls_from_round_to_round(shared, tmp_path, monkeypatch):
    rates = []
    original = torch.optim.AdamW.__init__

    def made(optimizer, groups, lr, **more):
        rates.append(lr)
        original(optimizer, groups, lr=lr, **more)

    shared.prepare([OURS], [0], Work(tmp_path))
    monkeypatch.setattr(torch.optim.AdamW, "__init__", made)
    trial(shared, OURS, tmp_path)
    assert rates == pytest.approx([1e-2, 1e-3, 8e-3, 8e-4])
    # The paper's rates by default, and their ratio to the rate of a decoder's own training.
    assert RefactoringProblem(texts(), base="x").learning_rate == 5e-5
    assert problem(learning_rate=None).learning_rate == pytest.approx(3e-3 / 6)


# How it is judged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [True, False])
def test_where_tokens_go_is_counted_by_document(shared, tmp_path, attention):
    design = Design("ours", "read-me", {"attention": attention, "rounds": 1})
    found = trial(shared, design, tmp_path)
    model, _ = load_experts(found.artifact / "model")
    assert (len(list(model.router.blocks[0].children())) > 3) == attention
    end = shared.tokenizer.eos_token_id
    choices, ever = [], []
    for number, (domain, some) in enumerate(documents(shared).items()):
        for row, document in enumerate(some):
            experts = model.route(torch.tensor([[end, *document]])).expert_ids[0].tolist()
            stays = [a == b for a, b in zip(experts[1:], experts[:-1], strict=True)]
            assert found.scores["locality"][domain][row] == pytest.approx(np.mean(stays))
            own = [expert == number for expert in experts[1:]]
            assert found.scores["agreement"][domain][row] == pytest.approx(np.mean(own))
            expected = loss_by_hand(shared, model, document)
            assert found.scores["loss"][domain][row] == pytest.approx(expected, rel=1e-4)
            choices += experts[1:]
            # A token alone decides where it goes only without attention.
            ever += zip(document, experts[1:], strict=True)
    said = re.findall(r"(\w+) (\d+)%", found.notes[-1])
    shares = np.bincount(choices, minlength=3) / len(choices)
    assert [name for name, _ in said] == list(DOMAINS)
    assert [int(share) for _, share in said] == [round(100 * share) for share in shares]
    if not attention:
        assert len(set(ever)) == len({token for token, _ in ever})


def test_designs_without_a_router_are_one_expert(shared, tmp_path):
    for design in (TEACHER, POOLED, KNOWN, NARROW):
        found = trial(shared, design, tmp_path, design.name)
        for metric in ("locality", "agreement"):
            assert all((values == 1).all() for values in found.scores[metric].values())
    about = shared.describe()["routing"]
    assert "by definition" in about
    assert "by chance 1 in 3" in about


# What it costs ------------------------------------------------------------------------------------


def test_all_but_the_teacher_use_as_many_channels_per_token(shared, tmp_path):
    found = {d.name: trial(shared, d, tmp_path, d.name) for d in (TEACHER, KNOWN, POOLED, NARROW)}
    cost = {name: one.cost for name, one in found.items()}
    hidden, wide = SHAPE.width, 4 * SHAPE.width
    removed = SHAPE.n_layers * 3 * hidden * wide // 2
    for name in ("domain known", "pooled", "narrow"):
        assert cost[name]["active_parameters"] == cost["teacher"]["total_parameters"] - removed
        saved = cost["teacher"]["forward_flops_per_token"] - cost[name]["forward_flops_per_token"]
        assert saved == 2 * removed
    assert cost["teacher"]["feed_forward_bytes"] == 4 * 2 * removed
    assert cost["pooled"]["feed_forward_bytes"] == 4 * removed
    # Domain experts are stored with what they share once.
    masks = build_expert_masks(shared.channel_stats(), 0.5)
    kept = [int(layer.all(0).sum() + (layer & ~layer.all(0)).sum()) for layer in masks.layers]
    assert cost["domain known"]["feed_forward_bytes"] == 4 * 3 * hidden * sum(kept)
    more = cost["domain known"]["feed_forward_bytes"] - cost["pooled"]["feed_forward_bytes"]
    grown = cost["domain known"]["total_parameters"] - cost["pooled"]["total_parameters"]
    assert more == 4 * grown > 0
    assert cost["narrow"]["training_tokens"] == 50 * 4 * 32
    tokens = cost["pooled"]["training_tokens"]
    each = 3 * cost["pooled"]["forward_flops_per_token"]
    assert cost["pooled"]["training_flops"] == tokens * each


def test_a_routed_design_carries_its_router_on_top(shared, tmp_path):
    ours = trial(shared, OURS, tmp_path, "ours").cost
    known = trial(shared, KNOWN, tmp_path, "known").cost
    router = sum(p.numel() for p in moefy(
        shared.start(0), build_expert_masks(shared.channel_stats(), 0.5)
    ).router.parameters())  # fmt: skip
    assert ours["active_parameters"] - known["active_parameters"] == router
    assert ours["total_parameters"] - known["total_parameters"] == router
    assert ours["forward_flops_per_token"] > known["forward_flops_per_token"]
    inside = sum(p.numel() for p in shared.start(0).parameters())
    assert ours["trained_parameters"] == inside + router


# What it depends on -------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [OURS, RANDOM, POOLED, NARROW], ids=lambda d: d.name)
def test_a_trial_depends_on_nothing_that_ran_before_or_beside_it(
    shared, design, tmp_path, monkeypatch
):
    for number, other in enumerate((KNOWN, TEACHER)):
        trial(shared, other, tmp_path, f"before {number}", seed=5)
    state = torch.get_rng_state()
    mine = trial(shared, design, tmp_path, "mine", seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    packed = pickle.dumps(shared)
    assert len(packed) < 100_000  # texts, no weights
    unpickled = pickle.loads(packed)
    assert unpickled.fingerprint() == shared.fingerprint()
    same_scores(mine, trial(unpickled, design, tmp_path, "theirs", seed=2))
    # Nothing prepared and nothing cached: the decoder and the statistics are made again.
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "empty"))
    again = trial(problem(), design, tmp_path, "again", seed=2)
    same_scores(mine, again)
    first, second = weights(mine), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not np.array_equal(losses(mine), losses(trial(shared, design, tmp_path, "o", seed=3)))


def test_the_fingerprint_changes_with_what_scores_depend_on(folder, shared):
    base = str(folder / "base")
    seen = {shared.fingerprint(), problem().fingerprint()}
    assert len(seen) == 1
    for changes in (
        {"keep": 0.25},
        {"n_tokens": 100_000},
        {"teacher_tokens": 9_000},
        {"calibration_tokens": 500},
        {"learning_rate": 1e-4},
        {"batch_size": 2},
        {"base": "small-parallel"},
        {"base": base},
        {"given": texts(n_documents=4)},
    ):
        seen.add(problem(**changes).fingerprint())
    assert len(seen) == 10
    named = {problem(base=base, teacher_tokens=n).fingerprint() for n in (5, 6)}
    assert len(named) == 1


def test_a_decoder_of_the_users_own_is_refactored(folder, tmp_path):
    base = str(folder / "base")
    before = load_file(folder / "base" / "model.safetensors")
    one = problem(base=base, context=48)
    one.prepare([TEACHER, OURS, POOLED], [0], Work(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    teacher = trial(one, TEACHER, tmp_path, "teacher")
    for domain, some in documents(one).items():
        expected = [loss_by_hand(one, model, document) for document in some]
        np.testing.assert_allclose(teacher.scores["loss"][domain], expected, rtol=1e-4)
    ours = trial(one, OURS, tmp_path, "ours")
    assert ours.cost["training_tokens"] == (10 * 4 * 32 // (4 * 48)) * 4 * 48
    assert (losses(ours) != losses(teacher)).all()
    after = load_file(folder / "base" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    trial(one, POOLED, tmp_path, "pooled")
    with pytest.raises(DataError, match=r"'narrow': dense-narrow .* got base='.*base'"):
        one.check(NARROW)
    assert "trained on" not in one.describe()["base"]


def test_a_decoder_that_cannot_be_refactored_is_refused_beforehand(tmp_path):
    from tests.selection.tiny_selection import byte_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 259}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer(length=64).save_pretrained(tmp_path / "gpt2")
    one = problem(base=str(tmp_path / "gpt2"), context=32)
    with pytest.raises(ModelError, match="no gated feed-forward module"):
        one.prepare([OURS], [0], Work(tmp_path))


def test_a_study_compares_them(shared, tmp_path):
    designs = [POOLED, OURS, KNOWN, NARROW, TEACHER]
    study = Study(shared, designs, reference="pooled", seeds=2, directory=tmp_path)
    results = study.run()
    assert not results.data["failures"]
    assert len(results.data["designs"]) == 5


# What leaves --------------------------------------------------------------------------------------


def test_winners_work_in_a_new_process_as_their_readmes_say(shared, tmp_path):
    codes = []
    for design in (OURS, KNOWN, POOLED, NARROW, TEACHER):
        found = trial(shared, design, tmp_path, design.name)
        winner = tmp_path / f"winner, {design.name}"
        routed = design.method == "read-me"
        assert shared.export(design, found.artifact, winner, reason="It was best.") is not routed
        readme = (winner / "README.md").read_text("utf-8")
        codes.append(re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1))
        assert codes[-1].splitlines() == shared.usage(winner)
        assert "It was best." in readme
        about = json.loads((winner / "design.json").read_text("utf-8"))
        assert about["design"] == design.to_json()
        if routed:
            model, tokenizer = load_experts(winner)
            assert "letters, numbers, marks" in readme
            assert model.domains == DOMAINS
        else:
            model = AutoModelForCausalLM.from_pretrained(winner).eval()
            tokenizer = shared.tokenizer
        for number, (domain, some) in enumerate(shared.texts.held_out.items()):
            given = {"expert_ids": number} if design is KNOWN else {}
            for row, text in enumerate(some):
                ids = tokenizer(text, add_special_tokens=False).input_ids[:31]
                expected = found.scores["loss"][domain][row]
                by_hand = loss_by_hand(shared, model, ids, **given)
                assert by_hand == pytest.approx(expected, rel=1e-4)
    # Those that transformers loads by itself first, so that nothing of ours is imported for them.
    script = "\n".join(
        [*codes[2:], "import sys", "assert 'bakeoff' not in sys.modules", *codes[:2]]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=115
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("def double") == 5
    assert done.stdout.count("tensor([[") == 1


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 0}, r"keep must be in \(0, 1\], got 0"),
        ({"n_layers": 2}, "n_layers must be left out, got 2: what is refactored is a trained"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5"),
        ({"teacher_tokens": 0}, "teacher_tokens must be at least 1, got 0"),
        ({"calibration_tokens": 0}, "calibration_tokens must be at least 1, got 0"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0"),
        ({"given": texts(DOMAINS[:1])}, "at least 2 domains, got letters"),
        ({"given": texts(n_documents=1)}, "1 held-out documents, at least 2"),
    ],
)
def test_bad_settings_are_refused(changes, said):
    with pytest.raises(DataError, match=said):
        problem(**changes)


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        ("moe", {}, "moe does not say how to make a dense decoder cheaper"),
        ("read-me", {"keep": 0.5}, "read-me takes routing, attention.*; got keep"),
        ("read-me", {"routing": "token"}, "routing must be router or domain, got 'token'"),
        ("read-me", {"routing": "domain", "attention": False}, "attention is of the router"),
        ("read-me", {"routing": "domain", "router_share": 0.1}, "router_share is of the router"),
        ("read-me", {"attention": "no"}, "attention must be true or false, got 'no'"),
        ("read-me", {"objective": "kl"}, "objective must be one of code, paper, got 'kl'"),
        ("read-me", {"rounds": 0}, "rounds must be at least 1, got 0"),
        ("read-me", {"rounds": 1.5}, "rounds must be at least 1, got 1.5"),
        ("read-me", {"router_share": -0.1}, "router_share must be a share .*, got -0.1"),
        ("read-me", {"expert_share": "all"}, "expert_share must be a share .*, got 'all'"),
        ("read-me", {"router_share": 0.5}, "at most 1 together, got 0.5 and 0.8"),
        ("pooled-mask", {"router_share": 0.5}, "pooled-mask takes rounds, expert_share; got"),
        ("dense-teacher", {"rounds": 2}, "dense-teacher takes no parameters; got rounds"),
    ],
)
def test_bad_designs_are_refused_by_name(shared, method, params, said, tmp_path):
    design = Design("odd", method, params)
    with pytest.raises(DataError, match=rf"^design 'odd': .*{said}"):
        shared.check(design)
    with pytest.raises(DataError, match=r"^design 'odd': "):
        shared.prepare([design], [0], Work(tmp_path))


def test_a_router_with_nothing_to_learn_is_refused():
    with pytest.raises(DataError, match="with keep=1 all experts are alike"):
        problem(keep=1.0).check(OURS)


def test_training_that_diverges_says_so(tmp_path):
    with pytest.raises(DataError, match="lower learning_rate"):
        trial(problem(learning_rate=1e30), POOLED, tmp_path)


def test_masks_of_one_design_are_those_of_the_card(shared):
    masks = build_expert_masks(shared.channel_stats(), 0.5)
    assert isinstance(masks, ExpertMasks)
    means = means_by_hand(shared)
    for number, domain in enumerate(DOMAINS):
        for layer, mean in enumerate(means[domain]):
            chosen = set(mean.argsort(descending=True)[: len(mean) // 2].tolist())
            assert chosen == set(masks.layers[layer][number].nonzero().flatten().tolist())
