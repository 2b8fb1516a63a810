"""The objective against its inverse, brute force, transformers' loss and masks by perturbation."""

import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.decoding.codegen2 import (
    DataMixture,
    FillInTheMiddle,
    InfillTokens,
    PrefixLM,
    SpanCorruption,
    add_infill_tokens,
    collate,
    corrupt_spans,
    pack,
    plain_ids,
    prefix_lm_mask,
    psm,
    sample_spans,
    spm,
    train_decoder,
    uncorrupt,
)
from bakeoff.errors import DataError

EOT = 2
TOKENS = InfillTokens(
    eot=EOT, separator=60, end_of_mask=61, masks=tuple(range(64, 96)), fim=(50, 51, 52)
)


def decoder(kind="llama", attention="sdpa", **changes):
    import transformers

    torch.manual_seed(3)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    configuration = tiny.config(kind, **{"initializer_range": 0.2, **changes})
    configuration._attn_implementation = attention
    return getattr(transformers, architecture)(configuration).eval()


def byte_tokenizer(texts=("def f(x):\n    return x + 1  # ümlaut\n",)):
    from bakeoff.models.small_gpt import _byte_pair_tokenizer

    return _byte_pair_tokenizer(list(texts) * 20, 320, 128)


documents = st.lists(
    st.lists(st.integers(3, 49), min_size=0, max_size=40), min_size=1, max_size=4
).filter(lambda pieces: any(pieces))


def packed(pieces, ended):
    ids = [token for piece in pieces for token in [*piece, EOT]]
    return ids if ended or len(ids) == 1 else ids[:-1]


# Spans --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 60),
    low=st.floats(0.01, 1.0),
    high=st.floats(0.01, 1.0),
    span_len=st.none() | st.tuples(st.integers(1, 5), st.integers(5, 20)),
    max_spans=st.integers(1, 10),
    seed=st.integers(0, 10**6),
)
def test_spans_mask_as_many_tokens_as_the_share_says(n, low, high, span_len, max_spans, seed):
    ratio = (min(low, high), max(low, high))
    options = {"ratio": ratio, "span_len": span_len, "max_spans": max_spans}
    spans = sample_spans(n, np.random.default_rng(seed), **options)
    expected = max(1, round(np.random.default_rng(seed).uniform(*ratio) * n))
    assert sum(stop - start for start, stop in spans) == min(n, expected)
    assert 1 <= len(spans) <= max_spans
    assert spans[0][0] >= 0
    assert spans[-1][1] <= n
    # A kept token between neighbours, or it would not be clear where one span ends.
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))


def test_every_placement_is_equally_likely():
    # 9 tokens, 4 masked in two spans of 2: all placements by brute force.
    possible = {((a, a + 2), (b, b + 2)) for a in range(8) for b in range(a + 3, 8)}
    rng = np.random.default_rng(0)
    draws = 6000
    found = Counter(
        tuple(sample_spans(9, rng, ratio=(4 / 9, 4 / 9), span_len=(2, 2))) for _ in range(draws)
    )
    assert set(found) == possible
    expected = draws / len(possible)
    chi_square = sum((count - expected) ** 2 / expected for count in found.values())
    assert chi_square < 40  # 14 degrees of freedom: p < 0.001 above 36


def test_share_and_length_are_uniform():
    rng = np.random.default_rng(0)
    many = [sample_spans(2000, rng, span_len=(10, 30), max_spans=10**6) for _ in range(300)]
    shares = np.array([sum(b - a for a, b in spans) / 2000 for spans in many])
    # A mean of 300 uniform draws: 4.5 standard errors.
    assert shares.mean() == pytest.approx(0.5, abs=4.5 * 0.9 / math.sqrt(12 * 300))
    assert shares.min() < 0.08
    assert shares.max() > 0.92
    few = [spans for spans in many if 0.3 < sum(b - a for a, b in spans) / 2000 < 0.6]
    lengths = np.array([b - a for spans in few for a, b in spans])
    assert abs(lengths.mean() - 20) < 0.5
    assert set(range(10, 31)) <= set(lengths.tolist())


# The objective ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    pieces=documents,
    ended=st.booleans(),
    level=st.sampled_from(["file", "sequence"]),
    seed=st.integers(0, 10**6),
)
def test_tokens_in_are_tokens_out(pieces, ended, level, seed):
    ids = packed(pieces, ended)
    objective = SpanCorruption(TOKENS, p_causal=0.0, level=level, seed=seed)
    example = objective.apply(ids)
    assert uncorrupt(example.input_ids, TOKENS, level=level) == ids
    assert example.labels == example.input_ids  # the loss is on every token
    assert example.segments == [0] * len(example.input_ids)
    if level == "file" and any(len(piece) >= 4 for piece in pieces):
        assert 60 in example.input_ids
        # No span crosses a document: between a sentinel of the target and its end no EOT.
        inside = False
        for token in example.input_ids:
            inside = (inside or token == 60) and token != EOT
            assert not (token == 61 and not inside)


@settings(max_examples=100, deadline=None)
@given(pieces=documents, seed=st.integers(0, 10**6), room=st.integers(2, 90))
def test_a_limit_cuts_documents_and_never_spans(pieces, seed, room):
    ids = packed(pieces, True)
    for objective in (
        SpanCorruption(TOKENS, p_causal=0.0, max_length=room, seed=seed),
        FillInTheMiddle(TOKENS, p_causal=0.0, max_length=room, seed=seed),
        PrefixLM(TOKENS, p_causal=0.0, max_length=room, seed=seed),
    ):
        written = objective.apply(ids).input_ids
        assert 1 <= len(written) <= room
        if isinstance(objective, SpanCorruption):
            restored = uncorrupt(written, TOKENS)
            # Each document of the result begins the one that it was made of.
            parts = [list(g) for k, g in itertools.groupby(restored, lambda t: t == EOT) if not k]
            sources = [piece for piece in pieces if piece]
            assert all(s[: len(p)] == p for s, p in zip(sources, parts, strict=False))
        if isinstance(objective, FillInTheMiddle):
            assert written.count(52) == written.count(61)


def test_the_layout_is_that_of_the_published_prompts():
    tokenizer = byte_tokenizer()
    tokens = add_infill_tokens(tokenizer, max_sentinels=2)
    prefix, middle, suffix = (plain_ids(tokenizer, text) for text in ("def f(", "x", "):"))
    ids = [*prefix, *middle, *suffix]
    written = corrupt_spans(ids, [(len(prefix), len(prefix) + len(middle))], tokens)
    text = tokenizer.decode(written, clean_up_tokenization_spaces=False)
    assert text == "def f(<mask_1>):<|end|><sep><mask_1>x<eom>"
    assert len(written) == len(ids) + 3 + 2
    start, stop = len(prefix), len(prefix) + len(middle)
    for layout, expected in (
        (psm, "<fim_prefix>def f(<fim_suffix>):<fim_middle>x<eom>"),
        (spm, "<fim_prefix><fim_suffix>):<fim_middle>def f(x<eom>"),
    ):
        found = tokenizer.decode(layout(ids, (start, stop), tokens))
        assert found == expected


def test_each_objective_keeps_the_multiset_of_tokens():
    ids = list(range(3, 45))
    for seed in range(20):
        for suffix_first in (0.0, 1.0):
            example = FillInTheMiddle(TOKENS, p_causal=0, spm_rate=suffix_first, seed=seed).apply(
                ids
            )
            assert sorted(set(example.input_ids) - TOKENS.control) == ids
            assert len(example.input_ids) == len(ids) + 4
            first = [50, 51] if suffix_first else [50]
            assert example.input_ids[: len(first)] == first


def test_zero_corruption_is_transformers_causal_loss():
    model = decoder()
    rows = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    batch = SpanCorruption(TOKENS, p_causal=1.0)(rows.tolist())
    assert torch.equal(batch["input_ids"], rows)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(model(rows, labels=rows).loss.item())
        # Also on a prefix objective's causal half, whose mask has four dimensions.
        prefix = PrefixLM(TOKENS, p_causal=1.0)(rows.tolist())
        assert prefix["attention_mask"].shape == (3, 1, 20, 20)
        assert model(**prefix).loss.item() == pytest.approx(
            model(rows, labels=rows).loss.item(), rel=1e-5
        )


def test_the_loss_is_the_sum_over_the_corrupted_sequence():
    model = decoder()
    objective = SpanCorruption(TOKENS, p_causal=0.0, seed=4)
    rng = np.random.default_rng(0)
    examples = [objective.apply(rng.integers(3, 50, n).tolist()) for n in (30, 12)]
    batch = collate(examples, pad_id=0)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
            for place, token in enumerate(example.input_ids[1:]):
                total -= logits[place, token].item()
                count += 1
        assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)


def test_where_the_loss_is():
    ids = list(range(3, 20))
    everything = SpanCorruption(TOKENS, p_causal=0, seed=3).apply(ids)
    at = everything.input_ids.index(60) + 1
    no_sentinels = SpanCorruption(TOKENS, p_causal=0, loss="no-sentinels", seed=3).apply(ids)
    expected = [
        -100 if place < at and token in TOKENS.control else token
        for place, token in enumerate(everything.input_ids)
    ]
    assert no_sentinels.labels == expected
    assert -100 in expected
    targets = SpanCorruption(TOKENS, p_causal=0, loss="targets", seed=3).apply(ids)
    assert targets.labels == [-100] * at + everything.input_ids[at:]
    causal = SpanCorruption(TOKENS, p_causal=1, loss="targets").apply(ids)
    assert causal.labels == ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_prefix_mask_by_perturbation(kind, attention):
    model = decoder(kind, attention)
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[0, 1, 1, 1, 0, 0, 2, 2, 0, 0, 0, 0]])
    mask = prefix_lm_mask(segments, torch.tensor([[1] * 11 + [0]]))
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits[0]
        for changed in range(12):
            other = ids.clone()
            other[0, changed] = 95
            after = model(other, attention_mask=mask).logits[0]
            moved = ((after - before).abs().amax(-1) > 1e-5).tolist()
            for place in range(12):
                same = segments[0, place] == segments[0, changed] > 0
                # Through layers a causal token's state carries what came before it.
                sees = (place >= changed or bool(same)) and (changed != 11 or place == 11)
                if place == 11 and changed != 11:
                    continue  # padding sees what it likes
                assert moved[place] == sees, (changed, place)


def test_prefix_batches_have_no_loss_in_the_prefix_and_a_causal_target():
    model = decoder()
    objective = SpanCorruption(TOKENS, p_causal=0, attention="prefix", seed=1)
    ids = [*range(3, 20), EOT, *range(20, 33)]
    example = objective.apply(ids)
    plain = SpanCorruption(TOKENS, p_causal=0, seed=1).apply(ids)
    assert example.input_ids == plain.input_ids
    for place, segment in enumerate(example.segments):
        assert (example.labels[place] == -100) == (segment > 0)
    assert set(example.segments) == {0, 1, 2}
    separators = [place for place, token in enumerate(example.input_ids) if token == 60]
    assert [example.segments[place] for place in separators] == [1, 2]
    # Rows of a batch do not depend on each other's length.
    with torch.no_grad():
        alone = collate([example], pad_id=0, prefix=True)
        together = collate([example, objective.apply(ids * 2)], pad_id=0, prefix=True)
        n = len(example.input_ids)
        first = model(alone["input_ids"], attention_mask=alone["attention_mask"]).logits[0]
        second = model(together["input_ids"], attention_mask=together["attention_mask"]).logits
        assert torch.isfinite(second).all()
        torch.testing.assert_close(second[0, :n], first, rtol=1e-4, atol=1e-4)


def test_the_share_of_causal_sequences_by_counting():
    rows = [list(range(3, 23))] * 4000
    objective = SpanCorruption(TOKENS, p_causal=0.3, seed=5)
    causal = sum(objective.apply(row).causal for row in rows)
    assert abs(causal / 4000 - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 4000)
    fim = FillInTheMiddle(TOKENS, p_causal=0.0, spm_rate=0.25, seed=5)
    suffix_first = sum(fim.apply(row).input_ids[:2] == [50, 51] for row in rows)
    # An empty prefix makes the prefix-first layout look the same: 1 + 20 in 21 * 21 pairs of cuts.
    empty = 1 - (20 / 21) ** 2
    expected = 0.25 + 0.75 * empty
    assert abs(suffix_first / 4000 - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("make", [SpanCorruption, FillInTheMiddle])
def test_cuts_between_characters_keep_the_text(make):
    text = "def f(x):\n    return x + 1  # ümlaut\n"
    tokenizer = byte_tokenizer()
    tokens = add_infill_tokens(tokenizer)
    ids = plain_ids(tokenizer, text)
    inside = 0
    for seed in range(40):
        example = make(tokenizer, p_causal=0.0, char_cuts=1.0, seed=seed).apply(ids)
        if make is SpanCorruption:
            restored = uncorrupt(example.input_ids, tokens)
            assert tokenizer.decode(restored) == text
            inside += restored != ids
        else:
            assert len([t for t in example.input_ids if t in tokens.control]) == 4
            before, after, middle = tokens.fim
            written = example.input_ids
            if written[1] == after:  # suffix, then prefix and middle in one piece
                at = written.index(middle)
                restored = [*written[at + 1 : -1], *written[2:at]]
            else:
                a, b = written.index(after), written.index(middle)
                restored = [*written[1:a], *written[b + 1 : -1], *written[a + 1 : b]]
            assert written[0] == before
            assert tokenizer.decode(restored) == text
            inside += len(example.input_ids) != len(ids) + 4
    assert inside > 10  # some cuts fall inside a token


def test_the_same_seed_gives_the_same_and_another_does_not():
    rows = [list(range(3, 40))] * 20

    def drawn(seed):
        objective = SpanCorruption(TOKENS, seed=seed)
        return [objective.apply(row).input_ids for row in rows]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    objective = SpanCorruption(TOKENS, seed=1)
    assert [pickle.loads(pickle.dumps(objective)).apply(rows[0]).input_ids] == drawn(1)[:1]


def test_as_a_collator_of_a_loader_with_workers():
    from torch.utils.data import DataLoader

    rows = [{"input_ids": list(range(3, 40))}] * 8
    objective = SpanCorruption(TOKENS, p_causal=0.0, pad_to_multiple_of=16, seed=1)

    def epochs(seed):
        torch.manual_seed(seed)
        loader = DataLoader(rows, batch_size=4, collate_fn=objective, num_workers=2)
        return [[batch["input_ids"].tolist() for batch in loader] for _ in range(2)]

    first = epochs(0)
    assert first == epochs(0)
    assert first[0] != first[1]  # another epoch masks other spans
    assert first[0][0] != first[0][1]  # and so does another worker
    assert all(len(batch[0]) % 16 == 0 for epoch in first for batch in epoch)


def test_bad_sequences_are_refused():
    with pytest.raises(DataError, match="sentinel 60 already"):
        SpanCorruption(TOKENS).apply([3, 60, 4])
    with pytest.raises(DataError, match="at least one token"):
        SpanCorruption(TOKENS).apply([])
    with pytest.raises(DataError, match="more than max_length=20"):
        SpanCorruption(TOKENS, p_causal=0, max_length=20, overflow="error").apply([5] * 20)
    with pytest.raises(DataError, match="lacks <sep>"):
        SpanCorruption(InfillTokens(eot=0))
    with pytest.raises(DataError, match="lacks <fim_prefix>"):
        FillInTheMiddle(InfillTokens(eot=0))
    for bad in ({"p_causal": 2}, {"level": "x"}, {"ratio": (0, 1)}, {"span_len": (3, 2)}):
        with pytest.raises(DataError, match=next(iter(bad))):
            SpanCorruption(TOKENS, **bad)
    with pytest.raises(DataError, match="char_cuts needs the tokenizer"):
        SpanCorruption(TOKENS, char_cuts=0.5)
    for spans in ([], [(2, 2)], [(0, 2), (2, 3)], [(3, 4), (0, 1)], [(3, 9)]):
        with pytest.raises(DataError, match="span"):
            corrupt_spans([1, 2, 3, 4, 5], spans, TOKENS)
    with pytest.raises(DataError, match="33 spans, but the tokenizer has 32"):
        corrupt_spans([1] * 99, [(2 * i, 2 * i + 1) for i in range(33)], TOKENS)


@pytest.mark.parametrize(
    "broken",
    [
        [5, 64, 6],  # a sentinel without spans
        [5, 64, EOT, 60, 64, 7],  # without its end
        [5, 64, 65, EOT, 60, 65, 7, 61, 64, 8, 61],  # in the wrong order
        [5, 65, EOT, 60, 65, 7, 61],  # does not start with 1
        [5, 61],
    ],
)
def test_broken_layouts_are_refused(broken):
    with pytest.raises(DataError):
        uncorrupt(broken, TOKENS)


# The vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_and_old_ones_stay(tied):
    tokenizer = byte_tokenizer()
    old = len(tokenizer)
    model = decoder(vocab_size=old, tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    tokens = add_infill_tokens(tokenizer, model, max_sentinels=3)
    after = model.get_input_embeddings().weight.detach()
    assert after.shape[0] == len(tokenizer) == old + 3 + 2 + 3 == model.config.vocab_size
    torch.testing.assert_close(after[:old], before)
    torch.testing.assert_close(after[old:], before.mean(0).expand(8, -1))
    output = model.get_output_embeddings().weight.detach()
    torch.testing.assert_close(output[old:], output[:old].mean(0).expand(8, -1))
    assert len(set(tokens.masks) | tokens.control) == 8
    with torch.no_grad():
        after[tokens.masks[0]] = 7.0
    assert add_infill_tokens(tokenizer, model, max_sentinels=3) == tokens  # nothing is reset
    assert (model.get_input_embeddings().weight[tokens.masks[0]] == 7).all()
    with pytest.raises(DataError, match="max_sentinels"):
        add_infill_tokens(tokenizer, max_sentinels=0)


def test_a_padded_vocabulary_does_not_shrink():
    tokenizer = byte_tokenizer()
    model = decoder(vocab_size=len(tokenizer) + 100)
    add_infill_tokens(tokenizer, model, max_sentinels=3)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 100 - 8


def test_a_model_grows_for_tokens_that_its_tokenizer_has_already():
    tokenizer = byte_tokenizer()
    old = len(tokenizer)
    model = decoder(vocab_size=old)
    before = model.get_input_embeddings().weight.detach().clone()
    tokens = add_infill_tokens(tokenizer, max_sentinels=3)  # the tokenizer alone
    assert add_infill_tokens(tokenizer, model, max_sentinels=3) == tokens
    after = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(after[:old], before)
    torch.testing.assert_close(after[old:], before.mean(0).expand(8, -1))


def test_added_tokens_that_are_text_are_text():
    """Code models have runs of spaces as added tokens: no sentinels, and no reason to refuse."""
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])
    add_infill_tokens(tokenizer)
    text = "def f(x):\n    return x\n"
    [row] = pack(tokenizer, [text], 99, keep_rest=True)
    assert tokenizer.convert_tokens_to_ids("    ") in row
    assert tokenizer.decode(row[:-1], clean_up_tokenization_spaces=False) == text
    with pytest.raises(DataError, match="spells out the special token '<eom>'"):
        pack(tokenizer, ["a<eom>"], 99)


def test_a_batch_without_any_loss_changes_nothing_but_by_decay():
    """The mean over no token would be NaN, and so would be the decoder."""
    model = decoder()
    before = [p.detach().clone() for p in model.parameters()]
    objective = SpanCorruption(TOKENS, p_causal=0, loss="targets")
    history = train_decoder(model, objective, [[EOT, EOT]] * 4, steps=2, weight_decay=0.0)
    assert history.losses == [0.0, 0.0]
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_packing():
    tokenizer = byte_tokenizer()
    add_infill_tokens(tokenizer)
    texts = ["def f(x):", "return x", "x + 1"]
    rows = pack(tokenizer, texts, 5, keep_rest=True)
    assert all(len(row) == 5 for row in rows[:-1])
    assert tokenizer.decode([token for row in rows for token in row]) == "<|end|>".join(texts) + (
        "<|end|>"
    )
    assert len(pack(tokenizer, texts, 5)) == len(rows) - (len(rows[-1]) < 5)
    for spelled in ("a <sep> b", "x<|end|>"):
        with pytest.raises(DataError, match="text 1 spells out"):
            pack(tokenizer, ["fine", spelled], 5)
        ids = pack(tokenizer, [spelled], 50, on_sentinel="escape", keep_rest=True)[0]
        assert ids[:-1] == plain_ids(tokenizer, spelled)
        assert not set(ids[:-1]) & {*InfillTokens.of(tokenizer).control, tokenizer.eos_token_id}
        assert tokenizer.decode(ids[:-1]) == spelled


# Data and training --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=4),
    unit=st.sampled_from(["rows", "tokens"]),
    seed=st.integers(0, 100),
)
def test_mixture_proportions_by_counting(weights, unit, seed):
    rng = np.random.default_rng(seed)
    sources = {
        f"s{i}": [[i] * int(n) for n in rng.integers(1, 9, 5 + 3 * i)] for i in range(len(weights))
    }
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    mixture = DataMixture(sources, named, unit=unit, seed=seed)
    taken = mixture.take(300)
    # By counting the rows themselves, at every stretch from the start.
    counted = dict.fromkeys(sources, 0)
    for row, source in zip(taken.rows, taken.sources, strict=True):
        assert row in sources[source]
        counted[source] += 1 if unit == "rows" else len(row)
        total = sum(counted.values())
        for name, weight in named.items():
            share = weight / sum(weights)
            assert abs(counted[name] - share * total) <= (len(weights) if unit == "rows" else 24)
    assert counted == taken.counted
    assert sum(taken.shares.values()) == pytest.approx(1)
    # Every row of a source comes once before any comes again.
    for name, rows in sources.items():
        drawn = [id(r) for r, s in zip(taken.rows, taken.sources, strict=True) if s == name]
        first_pass = drawn[: len(rows)]
        assert len(set(first_pass)) == len(first_pass)
        assert taken.epochs[name] == len(drawn) / len(rows)
    again = mixture.take(100)
    assert taken.rows[: len(again.rows)] == again.rows


def test_bad_mixtures_are_refused():
    with pytest.raises(DataError, match="more than 2 times"):
        DataMixture({"a": [[1]], "b": [[2]] * 99}, max_epochs=2).take(20)
    with pytest.raises(DataError, match="weights must name"):
        DataMixture({"a": [[1]]}, {"b": 1})
    with pytest.raises(DataError, match="no rows"):
        DataMixture({"a": []})
    with pytest.raises(DataError, match="all be 0"):
        DataMixture({"a": [[1]]}, {"a": 0})
    only = DataMixture({"a": [[1]], "b": []}, {"a": 1, "b": 0}).take(3)
    assert only.counted == {"a": 3, "b": 0}


def test_training_counts_tokens_and_repeats_itself():
    rows = [[*range(3, 20), EOT, *range(20, 28)]] * 10
    histories, weights = [], []
    for _ in range(2):
        model = decoder()
        objective = SpanCorruption(TOKENS, seed=1)
        histories.append(train_decoder(model, objective, rows, steps=4, batch_size=3, seed=1))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert not model.training
    assert torch.equal(*weights)
    history = histories[0]
    again = SpanCorruption(TOKENS, seed=1)
    lengths = np.array([[len(again.apply(rows[0]).input_ids) for _ in range(3)] for _ in range(4)])
    assert history.n_tokens == lengths.sum(1).cumsum().tolist()
    assert history.n_causal_tokens[-1] == int((lengths == 26).sum()) * 26
    calls = []
    budget = train_decoder(
        decoder(),
        again,
        rows,
        n_tokens=300,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert budget.n_tokens[-1] >= 300 > budget.n_tokens[-2] if len(budget.n_tokens) > 1 else True
    assert calls[-1] == (300, 300)
    for bad in ({}, {"steps": 1, "n_tokens": 1}, {"steps": 0}):
        with pytest.raises(DataError):
            train_decoder(decoder(), again, rows, **bad)
    prefix = train_decoder(decoder(), PrefixLM(TOKENS), rows, steps=2)
    assert np.isfinite(prefix.losses).all()
