"""Caches against brute force, batches against Algorithm 1 by hand, the engine against `generate`.

About a minute.
"""

import itertools
import os
from collections import Counter, OrderedDict
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from bakeoff.errors import DataError, ModelError
from bakeoff.experts.expert_serving import (
    ORDERS,
    ArrivalBatcher,
    Batch,
    BeladyCache,
    ExpertBatcher,
    ExpertStore,
    LRUCache,
    OffloadedExperts,
    Piece,
    RandomCache,
    ServingCosts,
    ServingEngine,
    ServingRequest,
    _ask,
    compare_caches,
    measure_costs,
    packed_layers,
    requests_from_plans,
    simulate_serving,
)
from bakeoff.experts.read_me import build_expert_masks, collect_channel_stats, moefy

TRACES = st.lists(st.integers(0, 4), max_size=40)
CAPACITIES = st.integers(1, 5)

# Caches -------------------------------------------------------------------------------------------


def fewest_misses(trace, capacity):
    """Try every eviction."""

    @lru_cache(None)
    def from_here(place, held):
        if place == len(trace):
            return 0
        expert = trace[place]
        if expert in held:
            return from_here(place + 1, held)
        if len(held) < capacity:
            return 1 + from_here(place + 1, held | {expert})
        return 1 + min(from_here(place + 1, held - {gone} | {expert}) for gone in held)

    return from_here(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(trace=st.lists(st.integers(0, 4), max_size=14), capacity=st.integers(1, 4))
def test_belady_misses_least(trace, capacity):
    assert BeladyCache(capacity).simulate(trace).n_misses == fewest_misses(tuple(trace), capacity)


@settings(max_examples=100, deadline=None)
@given(trace=TRACES, capacity=CAPACITIES)
def test_lru_against_an_ordered_dict_and_the_standard_library(trace, capacity):
    held, hits, evicted = OrderedDict(), [], []
    for expert in trace:
        hits.append(expert in held)
        held.pop(expert, None)
        evicted.append(held.popitem(last=False)[0] if len(held) == capacity else -1)
        held[expert] = None
    result = LRUCache(capacity).simulate(trace)
    assert result.hits.tolist() == hits
    assert result.evicted.tolist() == evicted

    @lru_cache(capacity)
    def read(expert):
        return expert

    for expert in trace:
        read(expert)
    assert result.n_hits == read.cache_info().hits
    assert result.n_misses == read.cache_info().misses


@settings(max_examples=100, deadline=None)
@given(trace=TRACES, capacity=CAPACITIES, horizon=st.integers(0, 8), seed=st.integers(0, 9))
def test_caches_in_relation(trace, capacity, horizon, seed):
    best = BeladyCache(capacity).simulate(trace)
    caches = {
        "lru": LRUCache(capacity),
        "random": RandomCache(capacity, seed),
        "short": BeladyCache(capacity, horizon=horizon),
        "long": BeladyCache(capacity, horizon=len(trace)),
    }
    for name, cache in caches.items():
        result = cache.simulate(trace)
        assert result.n_misses >= best.n_misses
        assert result.n_hits + result.n_misses == len(trace)
        assert len(cache.held) == min(capacity, len(set(trace)))
        again = cache.simulate(trace)  # starts anew
        assert (again.hits == result.hits).all(), name
        if capacity >= len(set(trace)):
            assert result.n_misses == len(set(trace))
            assert (result.evicted == -1).all()
    blind = BeladyCache(capacity, horizon=0).simulate(trace)
    assert (blind.evicted == caches["lru"].simulate(trace).evicted).all()
    far = caches["long"].simulate(trace)
    assert (far.evicted == best.evicted).all()


@settings(max_examples=50, deadline=None)
@given(trace=TRACES, capacity=CAPACITIES)
def test_belady_one_request_at_a_time(trace, capacity):
    cache = BeladyCache(capacity)
    hits = [cache.request(expert, trace[place + 1 :])[0] for place, expert in enumerate(trace)]
    assert hits == BeladyCache(capacity).simulate(trace).hits.tolist()


def test_random_evictions_are_uniform():
    gone = Counter(
        RandomCache(4, seed).simulate([0, 1, 2, 3, 4]).evicted[-1] for seed in range(800)
    )
    assert set(gone) == {0, 1, 2, 3}
    assert all(140 < count < 260 for count in gone.values())


def test_pinned_experts_stay():
    for cache in (LRUCache(2), RandomCache(2), BeladyCache(2)):
        cache.request(0)
        cache.request(1)
        assert cache.request(2, pinned=(0,)) == (False, 1)
        with pytest.raises(DataError, match="are pinned"):
            cache.request(3, pinned=(0, 2))
        assert cache.held == {0, 2}


def test_compared_caches():
    trace = np.random.default_rng(0).integers(0, 6, 500)
    rates = compare_caches(trace, [2, 4], seeds=2)
    assert rates["lru"][2] == LRUCache(2).simulate(trace).hit_rate
    assert rates["belady"][2] > rates["lru"][2]
    assert rates["belady"][4] > rates["belady"][2]
    assert rates["random"][2] == pytest.approx(1 / 3, abs=0.05)  # no cache can tell on such a trace
    assert np.isnan(LRUCache(1).simulate([]).hit_rate)


# Batches ------------------------------------------------------------------------------------------

PLANS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=8)


def drained(batcher):
    batches = []
    while (batch := batcher.next_batch()) is not None:
        batches.append(batch)
    return batches


@settings(max_examples=150, deadline=None)
@given(
    plans=PLANS,
    max_tokens=st.integers(1, 20),
    kind=st.sampled_from(["expert", "expert with max_wait", *ORDERS]),
)
def test_every_token_runs_once_in_order_within_the_budget(plans, max_tokens, kind):
    if kind in ORDERS:
        batcher = ArrivalBatcher(max_tokens, order=kind)
    else:
        batcher = ExpertBatcher(max_tokens, max_wait=2 if "wait" in kind else None)
    for number, plan in enumerate(plans):
        batcher.add(number, plan)
    assert batcher.n_pending == sum(map(len, plans))
    expected = batcher.preview(3)
    batches = drained(batcher)
    assert batches[:3] == expected[: len(batches)]
    assert batcher.n_pending == 0
    ran = [[] for _ in plans]
    for batch in batches:
        assert 1 <= batch.n_tokens <= max_tokens
        assert set(batch.experts) == {piece.expert for piece in batch.pieces}
        for piece in batch.pieces:
            assert piece.start == len(ran[piece.request])
            ran[piece.request] += [piece.expert] * (piece.stop - piece.start)
    assert ran == plans
    # No batch ends early while something waits.
    assert all(batch.n_tokens == max_tokens for batch in batches[:-1])


@settings(max_examples=150, deadline=None)
@given(heads=st.lists(st.integers(0, 4), min_size=1, max_size=30), max_tokens=st.integers(1, 12))
def test_algorithm_1_on_tokens_that_generate(heads, max_tokens):
    """One token per request, as when all generate: the published algorithm as it stands."""
    queues = {}
    for request, expert in enumerate(heads):
        queues.setdefault(expert, []).append(request)
    expected = []
    while any(queues.values()):
        batch, room = [], max_tokens
        while room and any(queues.values()):
            longest = max(queues, key=lambda e: (len(queues[e]), -e))
            taken, queues[longest] = queues[longest][:room], queues[longest][room:]
            batch += taken
            room -= len(taken)
        expected.append(sorted(batch))
    batcher = ExpertBatcher(max_tokens)
    for request, expert in enumerate(heads):
        batcher.add(request, [expert])
    got = [sorted(piece.request for piece in batch.pieces) for batch in drained(batcher)]
    assert got == expected


def test_runs_that_follow_go_along_with_experts_that_are_there():
    batcher = ExpertBatcher(10)
    batcher.add("a", [0, 0, 0, 1, 0])
    batcher.add("b", [1, 1, 0, 2, 2])
    batch = batcher.next_batch()
    # 0 is the longest queue; then 1 takes a's and b's runs; both bring more for 0; then 2.
    assert [(p.request, p.start, p.stop, p.expert) for p in batch.pieces] == [
        ("a", 0, 3, 0), ("b", 0, 2, 1), ("a", 3, 4, 1), ("b", 2, 3, 0), ("a", 4, 5, 0),
        ("b", 3, 5, 2),
    ]  # fmt: skip
    assert batch.n_tokens == 10


def test_orders_of_arrival():
    def filled(order):
        batcher = ArrivalBatcher(4, order=order)
        batcher.add("old", [0, 1])
        assert batcher.next_batch().n_tokens == 2
        batcher.add("new", [2, 2, 2, 3, 3])
        batcher.add("old", [1])  # generated
        return [[p.request for p in b.pieces] for b in drained(batcher)]

    assert filled("arrival") == [["old", "new"], ["new"]]
    assert filled("decode-first") == [["old", "new"], ["new"]]
    assert filled("prefill-first") == [["new", "new"], ["new"], ["old"]]


def test_nobody_waits_longer_than_max_wait():
    waits = {}
    for max_wait in (None, 3):
        batcher = ExpertBatcher(4, max_wait=max_wait)
        batcher.add("rare", [1])
        for step in range(20):
            for number in range(4):
                batcher.add((step, number), [0])
            if "rare" in {piece.request for piece in batcher.next_batch().pieces}:
                waits[max_wait] = step
                break
    assert waits == {3: 3}  # without the limit it never ran


def test_finished_requests_are_forgotten():
    batcher = ExpertBatcher(4)
    batcher.add("a", [0] * 6)
    batcher.next_batch()
    batcher.finish("a")
    batcher.finish("never seen")
    assert batcher.next_batch() is None
    batcher.add("a", [1])
    assert batcher.next_batch() == Batch((Piece("a", 0, 1, 1),))


# Simulation ---------------------------------------------------------------------------------------

COSTS = ServingCosts(n_layers=4, base=1.0, per_token=0.1, per_expert=0.5, load=2.0)


def brute_force_pipeline(costs, n_tokens, n_experts, n_misses):
    """Let a reader and a processor take turns, layer by layer."""
    compute = costs.base + costs.per_token * n_tokens + costs.per_expert * n_experts
    read = started = done = 0.0
    for _ in range(costs.n_layers):
        read = max(read, started) + costs.load * n_misses  # one layer ahead, not more
        started = max(done, read)
        done = started + compute
    return done


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 5), st.floats(0, 10))
def test_prefetching_against_an_event_by_event_account(n_tokens, n_experts, n_misses, load):
    costs = ServingCosts(n_layers=5, base=1.0, per_token=0.1, per_expert=0.5, load=load)
    got = costs.batch_seconds(n_tokens, n_experts, n_misses, prefetch=True)
    assert got == pytest.approx(brute_force_pipeline(costs, n_tokens, n_experts, n_misses))
    without = costs.batch_seconds(n_tokens, n_experts, n_misses, prefetch=False)
    compute = 1.0 + 0.1 * n_tokens + 0.5 * n_experts
    assert without == pytest.approx(5 * (compute + load * n_misses))
    assert got <= without + 1e-9


def test_one_request_by_hand():
    request = ServingRequest(3.0, np.array([0, 0, 1]), np.array([1, 2, 0]))
    report = simulate_serving([request], ExpertBatcher(8), LRUCache(2), COSTS, prefetch=False)
    # The prompt: 3 tokens, experts 0 and 1, both read. Then 1 (there), then 2 (read); 0 never runs.
    prompt = 4 * (1 + 0.3 + 1.0 + 4.0)
    second, third = 4 * (1 + 0.1 + 0.5), 4 * (1 + 0.1 + 0.5 + 2.0)
    assert report.first_token.tolist() == pytest.approx([prompt])
    assert report.latency.tolist() == pytest.approx([prompt + second + third])
    assert report.seconds == pytest.approx(3.0 + prompt + second + third)
    assert (report.hits, report.misses) == (4, 12)
    assert report.trace.tolist() == [0, 1, 1, 2]
    assert report.experts_per_batch.tolist() == [2, 1, 1]
    assert report.summary()["tokens_per_batch"] == pytest.approx(5 / 3)


def stream(n=30, length=20, n_experts=5, seed=0, gap=2.0):
    """Texts whose experts come in stretches."""
    rng = np.random.default_rng(seed)
    plans = [
        np.repeat(rng.integers(0, n_experts, length), rng.integers(1, 6, length)) for _ in range(n)
    ]
    return requests_from_plans(plans, 6, np.cumsum(rng.exponential(gap, n)).tolist())


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("batcher", [ExpertBatcher(32), ExpertBatcher(32, max_wait=4),
                                     ArrivalBatcher(32), ArrivalBatcher(32, order="decode-first"),
                                     ArrivalBatcher(32, order="prefill-first")])  # fmt: skip
def test_all_requests_are_served_and_accounts_add_up(batcher, prefetch):
    requests = stream()
    for cache in (LRUCache(2), RandomCache(2), BeladyCache(2)):
        report = simulate_serving(requests, batcher, cache, COSTS, prefetch=prefetch)
        assert report.tokens_per_batch.sum() == sum(
            len(r.prompt) + len(r.output) - 1 for r in requests
        )
        assert (report.latency >= report.first_token).all()
        assert (report.first_token > 0).all()
        assert len(report.trace) == report.experts_per_batch.sum()
        assert report.hits + report.misses == 4 * len(report.trace)
        ends = [r.arrival + taken for r, taken in zip(requests, report.latency, strict=True)]
        assert report.seconds == pytest.approx(max(ends))
        again = simulate_serving(requests, batcher, cache, COSTS, prefetch=prefetch)
        assert again.latency.tolist() == report.latency.tolist()
        if not prefetch:  # nothing is pinned, so that the trace alone tells the hits
            if isinstance(cache, LRUCache | RandomCache):
                assert report.misses == 4 * cache.simulate(report.trace).n_misses
            else:
                assert report.misses >= 4 * cache.simulate(report.trace).n_misses


def test_what_it_is_for():
    """Under load: fewer experts and reads for the same tokens, done sooner."""
    requests = stream(60, gap=20.0)
    naive = simulate_serving(requests, ArrivalBatcher(48), LRUCache(2), COSTS)
    aware = simulate_serving(requests, ExpertBatcher(48), LRUCache(2), COSTS)
    ahead = simulate_serving(requests, ExpertBatcher(48), BeladyCache(2), COSTS)
    assert aware.experts_per_batch.mean() < 0.6 * naive.experts_per_batch.mean()
    assert ahead.misses < aware.misses < 0.7 * naive.misses
    assert ahead.seconds < aware.seconds < 0.9 * naive.seconds
    assert np.percentile(aware.latency, 95) < 0.9 * np.percentile(naive.latency, 95)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=10), capacity=CAPACITIES)
def test_a_batch_that_fits_is_all_there_when_it_is_computed(batches, capacity):
    for cache in (LRUCache(capacity), RandomCache(capacity), BeladyCache(capacity)):
        for number, experts in enumerate(batches):
            future = list(itertools.chain(*batches[number + 1 :]))
            order = sorted(experts, key=lambda e, held=cache.held: (e not in held, e))
            held_before = cache.held
            hits, misses = _ask(cache, order, future, pin=True)
            assert hits == len(experts & held_before)
            assert hits + len(misses) == len(experts)
            if len(experts) <= capacity:
                assert experts <= cache.held


# The real thing -----------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, mlp_bias=True, attn_implementation="eager"),
    "mistral": MistralConfig(sliding_window=4, **SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma3": Gemma3TextConfig(sliding_window=4, layer_types=LAYER_TYPES, **SHAPE),
}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 8], [9, 4, 4, 6, 2, 30, 31, 32], [40, 41, 42, 43]]
NEW = [8, 12, 3, 9]


def packed(kind="llama", n_experts=4):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4) if parameter.ndim > 1 else parameter.normal_()
    data = {name: torch.randint(0, 50, (2, 30)) for name in "abcdefg"[:n_experts]}
    return moefy(model, build_expert_masks(collect_channel_stats(model, data))).pack().eval()


def alone(model):
    """What each request gets by itself, from transformers' own loop."""
    outputs = []
    for prompt, n_new in zip(PROMPTS, NEW, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new,
                              do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        outputs.append(tuple(made[0, len(prompt) :].tolist()))
    return tuple(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_batching_never_changes_outputs(kind):
    model = packed(kind)
    expected = alone(model)
    assert len(set(itertools.chain(*expected))) > 2
    for batcher in (
        ExpertBatcher(5),
        ExpertBatcher(64, max_wait=1),
        ExpertBatcher(1),
        ArrivalBatcher(7),
        ArrivalBatcher(64, order="prefill-first"),
        ArrivalBatcher(3, order="decode-first"),
    ):
        report = ServingEngine(model, batcher).run(PROMPTS, NEW)
        assert report.outputs == expected
        assert report.tokens_per_batch.sum() == sum(map(len, PROMPTS)) + sum(NEW) - len(NEW)


@pytest.mark.parametrize("kind", ["llama", "llama with biases", "gemma3"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_experts_from_disk_never_change_outputs(tmp_path, kind, prefetch):
    model = packed(kind)
    expected = alone(model)
    stored = sum(p.numel() for p in model.parameters())
    experts = OffloadedExperts(model, tmp_path, lambda: LRUCache(1), prefetch=prefetch)
    assert sum(p.numel() for p in model.parameters()) < stored
    assert alone(model) == expected  # transformers' own loop reads them too
    for cache in (lambda: LRUCache(2), lambda: RandomCache(1), lambda: BeladyCache(2)):
        experts.replace_cache(cache)
        for batcher in (ExpertBatcher(6), ArrivalBatcher(6)):
            report = ServingEngine(model, batcher, experts=experts).run(PROMPTS, NEW)
            assert report.outputs == expected
            assert report.hits + report.misses == 3 * report.experts_per_batch.sum()
        assert len(experts.read_seconds) == experts.misses
        assert all(len(held) <= experts.caches[0].capacity for held in experts._held)
    experts.restore()
    assert sum(p.numel() for p in model.parameters()) == stored
    assert alone(model) == expected


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("at", range(1, 12, 2))
def test_a_read_that_failed_leaves_nothing_wrong_behind(tmp_path, monkeypatch, prefetch, at):
    model = packed()
    expected = alone(model)
    experts = OffloadedExperts(model, tmp_path, lambda: LRUCache(2), prefetch=prefetch)
    engine = ServingEngine(model, ExpertBatcher(6), experts=experts)
    read, count = experts.store.read, itertools.count()

    def fails_once(*args):
        if next(count) == at:
            raise OSError("the disk is away")
        return read(*args)

    monkeypatch.setattr(experts.store, "read", fails_once)
    with pytest.raises(OSError, match="the disk is away"):
        engine.run(PROMPTS, NEW)
    assert alone(model) == expected
    assert engine.run(PROMPTS, NEW).outputs == expected
    for held, cache in zip(experts._held, experts.caches, strict=True):
        assert held.keys() == cache.held


@pytest.mark.parametrize("announced", [(0, 1), (2, 3), (1,), ()])
def test_announcing_other_experts_than_are_run_costs_reads_only(tmp_path, announced):
    model = packed()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = [model(ids, expert_ids=expert).logits for expert in range(4)]
        experts = OffloadedExperts(model, tmp_path, lambda: LRUCache(2))
        for expert in range(4):
            experts.expect(announced)
            got = model(ids, expert_ids=expert).logits
            torch.testing.assert_close(got, expected[expert], rtol=0, atol=0)


def test_a_model_without_its_experts_is_not_saved(tmp_path):
    model = packed()
    counted = model.count_parameters()
    experts = OffloadedExperts(model, tmp_path / "experts", lambda: LRUCache(1))
    for refused in (lambda: model.save_pretrained(tmp_path / "model"), model.count_parameters):
        with pytest.raises(ModelError, match=r"experts are on disk .*restore\(\)"):
            refused()
    assert not (tmp_path / "model").exists()
    experts.restore()
    assert model.count_parameters() == counted
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert alone(again) == alone(model)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("cache", [LRUCache, BeladyCache])
@pytest.mark.parametrize("batcher", [ExpertBatcher, ArrivalBatcher])
def test_the_simulation_counts_what_the_engine_does(tmp_path, prefetch, cache, batcher):
    model = packed()
    experts = OffloadedExperts(model, tmp_path, lambda: cache(2), prefetch=prefetch)
    real = ServingEngine(model, batcher(6), experts=experts).run(PROMPTS, NEW)
    requests = []
    for prompt, output in zip(PROMPTS, real.outputs, strict=True):
        plan = model.route(torch.tensor([[*prompt, *output]])).of(0)
        requests.append(ServingRequest(0.0, plan[: len(prompt)], plan[len(prompt) :]))
    costs = ServingCosts(3, 1, 1, 1, 1)
    simulated = simulate_serving(requests, batcher(6), cache(2), costs, prefetch=prefetch)
    assert real.tokens_per_batch.tolist() == simulated.tokens_per_batch.tolist()
    assert real.experts_per_batch.tolist() == simulated.experts_per_batch.tolist()
    assert (real.hits, real.misses) == (simulated.hits, simulated.misses)
    assert len(real.trace) == len(simulated.trace)


def test_a_cache_for_all_experts_reads_each_once(tmp_path):
    model = packed()
    experts = OffloadedExperts(model, tmp_path, lambda: LRUCache(4))
    report = ServingEngine(model, ExpertBatcher(8), experts=experts).run(PROMPTS, NEW)
    assert report.misses == 3 * len(set(report.trace.tolist()))


def test_arrivals_end_tokens_and_a_masked_model(tmp_path):
    model = packed()
    expected = alone(model)
    end = expected[0][2]
    report = ServingEngine(model, ArrivalBatcher(16), eos_token_id=end).run(
        PROMPTS, NEW, arrivals=[0.15, 0.0, 0.05, 0.1]
    )
    cut = tuple(o[: o.index(end) + 1] if end in o else o for o in expected)
    assert report.outputs == cut
    assert report.seconds >= 0.15
    assert (report.first_token > 0).all()
    assert (report.latency >= report.first_token).all()


def test_the_engine_can_be_used_again_and_drops_what_is_finished():
    model = packed()
    engine = ServingEngine(model, ExpertBatcher(16))
    first = engine.run(PROMPTS, NEW)
    assert len(engine._owner) == 0
    assert engine._cache.get_seq_length() == 0
    assert engine.run(PROMPTS[::-1], NEW[::-1]).outputs == first.outputs[::-1]


@pytest.mark.parametrize("at", [1, 4, 9])
def test_the_engine_can_be_used_after_an_interruption(monkeypatch, at):
    model = packed()
    expected = alone(model)
    engine = ServingEngine(model, ArrivalBatcher(6))
    step, count = engine._step, itertools.count(1)

    def interrupted(batch):
        found = step(batch)
        if next(count) == at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(engine, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run(PROMPTS, NEW)
    assert engine.run(PROMPTS, NEW).outputs == expected
    busy = ExpertBatcher(4)
    busy.add("mine", [0])
    with pytest.raises(DataError, match="batcher must be empty"):
        ServingEngine(model, busy)


@pytest.mark.parametrize("cold", [False, True])
def test_files_hold_the_experts(tmp_path, cold):
    model = packed()
    ExpertStore.write(model, tmp_path)
    store = ExpertStore(tmp_path, cold=cold)
    assert (store.n_layers, store.n_experts) == (3, 4)
    for number, layer in enumerate(packed_layers(model)):
        for expert, module in enumerate(layer.experts):
            read = store.read(number, expert)
            assert read.keys() == module.state_dict().keys()
            assert all(torch.equal(read[k], v) for k, v in module.state_dict().items())
    files = sorted(os.listdir(tmp_path))
    assert len(files) == 13
    assert all(name.endswith((".safetensors", ".json")) for name in files)


def test_measured_costs_say_what_the_model_takes(tmp_path):
    model = packed()
    store = ExpertStore.write(model, tmp_path)
    costs = measure_costs(model, store, n_tokens=(4, 64, 512), repeats=3)
    assert costs.n_layers == 3
    assert costs.load > 0
    assert costs.router_per_token > 0
    assert costs.base + costs.per_token + costs.per_expert > 0
    large, small = (costs.batch_seconds(n, 4, 0, True) for n in (512, 4))
    assert large >= small > 0


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [LRUCache, RandomCache, BeladyCache])
def test_bad_caches(cache):
    with pytest.raises(DataError, match="capacity must be at least 1, got 0"):
        cache(0)
    for trace in ([[1, 2]], [0.5], [-1]):
        with pytest.raises(DataError, match="trace must be"):
            cache(1).simulate(trace)
    with pytest.raises(DataError, match="horizon must be at least 0"):
        BeladyCache(1, horizon=-1)


def test_bad_batchers():
    for make in (ExpertBatcher, ArrivalBatcher):
        with pytest.raises(DataError, match="max_tokens must be at least 1"):
            make(0)
        with pytest.raises(DataError, match="are empty"):
            make(1).add("a", [])
        with pytest.raises(DataError, match="expert ids of 0 and more"):
            make(1).add("a", [-1])
        assert make(1).next_batch() is None
    with pytest.raises(DataError, match="max_wait must be"):
        ExpertBatcher(1, max_wait=0)
    with pytest.raises(DataError, match="order must be one of"):
        ArrivalBatcher(1, order="random")


def test_bad_simulations():
    good = ServingRequest(0.0, np.array([0]), np.array([0]))
    busy = ExpertBatcher(1)
    busy.add("a", [0])
    for requests, batcher, message in [
        ([], ExpertBatcher(1), "requests are empty"),
        ([good], busy, "batcher must be empty"),
        ([ServingRequest(0.0, np.array([], int), np.array([0]))], ExpertBatcher(1), "empty prompt"),
        ([ServingRequest(float("nan"), *[np.array([0])] * 2)], ExpertBatcher(1), "arrives at nan"),
    ]:
        with pytest.raises(DataError, match=message):
            simulate_serving(requests, batcher, LRUCache(1), COSTS)
    with pytest.raises(DataError, match="lookahead"):
        simulate_serving([good], ExpertBatcher(1), LRUCache(1), COSTS, lookahead=-1)
    with pytest.raises(DataError, match="load must be"):
        ServingCosts(1, 0, 0, 0, -1.0)
    with pytest.raises(DataError, match="n_layers"):
        ServingCosts(0, 0, 0, 0, 0)
    with pytest.raises(DataError, match="differ in length"):
        requests_from_plans([[0, 1]], 1, [])
    with pytest.raises(DataError, match="below the length"):
        requests_from_plans([[0, 1]], 2, [0.0])


def test_bad_engines(tmp_path):
    model = packed()
    engine = ServingEngine(model, ExpertBatcher(4))
    for prompts, new, arrivals in [
        ([], 1, None), ([[]], 1, None), ([[1]], 0, None), ([[1]], [1, 2], None), ([[1]], 1, [-1.0]),
    ]:  # fmt: skip
        with pytest.raises(DataError):
            engine.run(prompts, new, arrivals)
    with pytest.raises(DataError, match=r"must be in \[0, 50\)"):
        engine.run([[77]], 1)
    with pytest.raises(ModelError, match=r"no experts\.json"):
        ExpertStore(tmp_path)
    OffloadedExperts(model, tmp_path, lambda: LRUCache(1))
    with pytest.raises(ModelError, match="on disk already"):
        ExpertStore.write(model, tmp_path)
    with pytest.raises(ModelError, match="experts in memory"):
        measure_costs(model, ExpertStore(tmp_path))
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    data = {name: torch.randint(0, 50, (2, 30)) for name in "ab"}
    masked = moefy(dense, build_expert_masks(collect_channel_stats(dense, data)))
    with pytest.raises(ModelError, match="not packed"):
        ExpertStore.write(masked, tmp_path)
    outputs = ServingEngine(masked, ExpertBatcher(4)).run([[1, 2, 3]], 2).outputs
    assert ServingEngine(masked.pack(), ExpertBatcher(4)).run([[1, 2, 3]], 2).outputs == outputs
