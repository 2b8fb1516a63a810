"""Set-based prompting against its own definition by other means. About 25 seconds of CPU.

The oracles: numbers that the official functions gave; all k! orders; pieces run one at a time with
their caches joined; a mask from a triple loop; generation by whole passes without a cache.
"""

import itertools
import pickle

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny

from bakeoff.decoding.set_based_prompting import (
    OrderEnsembleModel,
    PlainOrderModel,
    SetPrompt,
    SetPromptingModel,
    encode_prompts,
    order_free,
)
from bakeoff.errors import DataError, ModelError


def full_tokenizer():
    """Return the tiny tokenizer with a word for every id, so that any answer can be read."""
    made = tiny.tokenizer()
    made.add_tokens([f"w{number}" for number in range(tiny.SHAPE["vocab_size"] - len(made))])
    return made


TOKENIZER = full_tokenizer()
PROMPT = SetPrompt("the cat saw", [["a red dog", "the mat", "under a tree and"]], "and the dog")
SPACED = SetPrompt("the cat saw ", [["a red dog ", "the mat ", "under a tree and "]], "and the dog")
NESTED = SetPrompt(
    "the",
    [
        ["cat", SetPrompt("a", [["dog", "red mat", "tree tree"]], ""), "saw the"],
        ["on the mat", "under"],
    ],
    "dog sat",
    ["and a"],
)
OTHERS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_positions": 128}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"alibi": False}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
}
ARCHITECTURES = [*tiny.ARCHITECTURES, *OTHERS]


def causal(name="llama", attention="sdpa", **changes):
    """Return a tiny random decoder with a head; weights are large so that order matters."""
    torch.manual_seed(0)
    large = {"initializer_range": 0.2, **changes}
    if name in OTHERS:
        configuration, architecture, differs = OTHERS[name]
        # Heads share keys in some of these and not in others: keep to plain attention.
        shape = {**tiny.SHAPE, "num_key_value_heads": 4, **differs, **large}
        if name.startswith("falcon"):
            del shape["head_dim"]
        config = getattr(transformers, configuration)(**shape)
    else:
        architecture = tiny.ARCHITECTURES[name][1].replace("TextModel", "Model")
        architecture = architecture.replace("Model", "ForCausalLM")
        config = tiny.config(name, **large)
    if name == "gemma2":  # transformers knows it with eager attention only
        attention = "eager"
    made = getattr(transformers, architecture)._from_config(config, attn_implementation=attention)
    return made.eval()


def last_logits(model, prompts, **arguments):
    batch = encode_prompts(prompts, TOKENIZER, **arguments)
    with torch.no_grad(), order_free(model, batch):
        return model(**batch).logits[:, -1]


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def n_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# Positions and mask -------------------------------------------------------------------------------


def words(*counts):
    return [" ".join(["cat"] * n) for n in counts]


# What get_position_ids_nopad_n_options, get_attention_mask_2d_n_options and their _recursive forms
# returned (github.com/reidmcy/set-based-prompting).
OFFICIAL = [
    (
        SetPrompt(*words(2), [words(3, 1)], *words(2)),
        [0, 1, 2, 3, 4, 2, 5, 6],
        "10000000 11000000 11100000 11110000 11111000 11000100 11111110 11111111",
    ),
    (
        SetPrompt(*words(1), [words(2, 4, 1)], *words(1)),
        [0, 1, 2, 1, 2, 3, 4, 1, 5],
        "100000000 110000000 111000000 100100000 100110000 100111000 100111100 100000010 111111111",
    ),
    (
        SetPrompt(*words(2), [words(1, 2), words(2, 1, 1)], *words(2), words(1)),
        [0, 1, 2, 2, 3, 4, 5, 6, 5, 5, 7, 8],
        "100000000000 110000000000 111000000000 110100000000 110110000000 111111000000 "
        "111111100000 111111110000 111111001000 111111000100 111111111110 111111111111",
    ),
]


@pytest.mark.parametrize(("prompt", "positions", "mask"), OFFICIAL)
def test_positions_and_mask_are_those_of_the_official_code(prompt, positions, mask):
    encoded = prompt.encode(TOKENIZER)
    assert encoded["position_ids"].tolist() == [positions]
    assert encoded["attention_mask_4d"].dtype == torch.bool
    rows = ["".join(str(int(x)) for x in row) for row in encoded["attention_mask_4d"][0, 0]]
    assert rows == mask.split()
    assert encoded["input_ids"].tolist() == [ids_of(" ".join(["cat"] * len(positions)))]


pieces = st.recursive(
    st.integers(1, 3).map(lambda n: " ".join(["dog"] * n)),
    lambda inner: st.builds(
        lambda prefix, group, suffix: SetPrompt(prefix, [group], suffix),
        st.sampled_from(["", "a"]),
        st.lists(inner, min_size=1, max_size=3),
        st.sampled_from(["", "mat mat"]),
    ),
    max_leaves=8,
)
some_prompts = st.builds(
    lambda prefix, groups: SetPrompt(prefix, groups, "the end"),
    st.sampled_from(["", "the", "the cat sat"]),
    st.lists(st.lists(pieces, min_size=1, max_size=4), max_size=3),
)


def flatten(prompt, start=0, path=()):
    """Return (position, path) of every token, by plain recursion over texts."""
    tokens = []

    def text(what, position):
        tokens.extend((position + i, path) for i in range(len(what.split())))
        return position + len(what.split())

    position = text(prompt.prefix, start)
    for number, group in enumerate(prompt.groups):
        ends = []
        for place, piece in enumerate(group):
            piece = SetPrompt(piece, [], "") if isinstance(piece, str) else piece
            inner, end = flatten(piece, position, (*path, (number, place)))
            tokens += inner
            ends.append(end)
        position = max(ends)
        if number < len(prompt.groups) - 1:
            position = text(prompt.between[number], position)
    return tokens, text(prompt.suffix, position) if prompt.suffix else position


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(some_prompts, min_size=1, max_size=3), window=st.sampled_from([None, 3]))
@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_is_that_of_a_triple_loop(prompts, window, side):
    batch = encode_prompts(prompts, TOKENIZER, canonical_order=False, padding_side=side)
    for row, prompt in enumerate(prompts):
        tokens, end = flatten(prompt)
        n, width = len(tokens), batch.n_columns
        offset = width - n if side == "left" else 0
        expected = torch.eye(width, dtype=torch.bool)
        for query, (at, own) in enumerate(tokens):
            for key, (position, other) in enumerate(tokens[: query + 1]):
                fork = next((a for a in zip(own, other, strict=False) if a[0] != a[1]), None)
                apart = fork is not None and fork[0][0] == fork[1][0]
                near = window is None or position > at - window
                expected[offset + query, offset + key] = near and not apart
        found = batch.allowed(0, width, window=window)[row]
        real = batch.attention_mask[row].bool()
        assert torch.equal(found[real], expected[real])
        assert found[~real].any(dim=1).all()  # an empty row would be a division by zero
        assert batch.position_ids[row, offset : offset + n].tolist() == [p for p, _ in tokens]
        assert batch.next_positions[row] == end
        assert batch.attention_mask[row].sum() == n
        # A generated token sees every token and itself.
        seen = batch.allowed(width + 1, width + 2)[row, 0]
        assert seen[:width].tolist() == batch.attention_mask[row].bool().tolist()
        assert seen[width:].all()


def test_additive_mask_is_zero_and_lowest():
    batch = encode_prompts([PROMPT], TOKENIZER)
    additive = batch.mask_4d(torch.float16)
    assert torch.equal(additive == 0, batch.mask_4d())
    assert additive.dtype == torch.float16
    assert additive.min() == torch.finfo(torch.float16).min


# One answer in any order --------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_orders_give_the_same_logits(name, attention):
    model = causal(name, attention)
    orders = PROMPT.orders()
    assert len(orders) == 6
    free = last_logits(model, orders, canonical_order=False)
    plain = last_logits(model, orders, canonical_order=False, edit_positions=False, edit_mask=False)
    spread = (free - free[0]).abs().max()
    assert spread < 1e-5 * max(1, free.abs().max())
    assert (plain - plain[0]).abs().max() > 1e-3  # what there was to lose
    sorted_ = last_logits(model, orders)
    for row, order in enumerate(orders):
        torch.testing.assert_close(sorted_[row], free[row], atol=1e-4, rtol=1e-5)
        alone = last_logits(model, [order])
        assert torch.equal(alone, last_logits(model, orders[:1]))  # bit by bit


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_sets_in_sets_may_be_permuted_too(name):
    model = causal(name)
    assert NESTED.n_orders == 3 * 2 * (3 * 2) * 2
    orders = NESTED.orders(40)
    free = last_logits(model, orders, canonical_order=False)
    assert (free - free[0]).abs().max() < 1e-5 * max(1, free.abs().max())
    swapped = SetPrompt(NESTED.prefix, NESTED.groups[::-1], NESTED.suffix, NESTED.between)
    assert (last_logits(model, [swapped]) - free[0]).abs().max() > 1e-3  # sets keep their order


@pytest.mark.parametrize("edits", [{"edit_mask": False}, {"edit_positions": False}])
def test_both_edits_are_needed(edits):
    model = causal()
    logits = last_logits(model, PROMPT.orders(), canonical_order=False, **edits)
    assert (logits - logits[0]).abs().max() > 1e-3


def test_answers_change_with_the_pieces():
    model = causal()
    other = SetPrompt(PROMPT.prefix, [[*PROMPT.groups[0][:2], "under the tree and"]], PROMPT.suffix)
    assert (last_logits(model, [PROMPT]) - last_logits(model, [other])).abs().max() > 1e-3


def joined_caches(model, prompt):
    """Run every piece alone behind the prefix, join what was cached, and run the suffix."""
    from transformers import DynamicCache

    ids = [ids_of(piece) for piece in prompt.groups[0]]
    a, longest = len(ids_of(prompt.prefix)), max(map(len, ids))

    def keys_of(cache):
        return [(layer.keys, layer.values) for layer in cache.layers]

    def filled(pairs):
        cache = DynamicCache()
        for number, (keys, values) in enumerate(pairs):
            cache.update(keys.clone(), values.clone(), number)
        return cache

    with torch.no_grad():
        prefix = DynamicCache()
        model(torch.tensor([ids_of(prompt.prefix)]), past_key_values=prefix)
        parts = []
        for piece in ids:
            cache = filled(keys_of(prefix))
            positions = torch.arange(a, a + len(piece))[None]
            model(torch.tensor([piece]), past_key_values=cache, position_ids=positions)
            parts.append([(k[:, :, a:], v[:, :, a:]) for k, v in keys_of(cache)])
        joined = [
            tuple(torch.cat([x, *(part[n][kind] for part in parts)], 2) for kind, x in enumerate(p))
            for n, p in enumerate(keys_of(prefix))
        ]
        suffix = ids_of(prompt.suffix)
        positions = torch.arange(a + longest, a + longest + len(suffix))[None]
        return model(
            torch.tensor([suffix]), past_key_values=filled(joined), position_ids=positions
        ).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "gpt-neox"])
def test_pieces_run_alone_and_joined_give_the_same(name):
    model = causal(name)
    expected = joined_caches(model, PROMPT)
    batch = encode_prompts([PROMPT], TOKENIZER, canonical_order=False)
    with torch.no_grad(), order_free(model, batch):
        found = model(**batch).logits[:, -expected.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_set_of_one_is_the_plain_prompt(name):
    model = causal(name)
    one = SetPrompt("the cat saw", [["a red dog and the mat"]], "and the dog")
    with torch.no_grad():
        ids = torch.tensor([ids_of("the cat saw a red dog and the mat and the dog")])
        expected = model(ids).logits
    batch = encode_prompts([one], TOKENIZER)
    assert torch.equal(batch.input_ids, ids)
    with torch.no_grad(), order_free(model, batch):
        found = model(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "opt"])
def test_batches_change_nothing(name, side):
    model = causal(name)
    prompts = [PROMPT, NESTED, SetPrompt("a", [["cat", "dog"]], "sat"), SetPrompt("the", [], "cat")]
    batch = encode_prompts(prompts, TOKENIZER, padding_side=side)
    with torch.no_grad(), order_free(model, batch):
        logits = model(**batch).logits
    for row, prompt in enumerate(prompts):
        alone = encode_prompts([prompt], TOKENIZER)
        with torch.no_grad(), order_free(model, alone):
            expected = model(**alone).logits[0]
        found = logits[row][batch.attention_mask[row].bool()]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_precision_is_that_of_the_model():
    model = causal().to(torch.bfloat16)
    orders = PROMPT.orders()
    exact = [last_logits(model, [order]) for order in orders]
    assert all(torch.equal(logits, exact[0]) for logits in exact)
    batch = encode_prompts([PROMPT], TOKENIZER)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), order_free(causal(), batch):
        assert causal()(**batch).logits.isfinite().all()


# Generation ---------------------------------------------------------------------------------------


def greedy(model, prompt, n):
    """Decode by whole passes without a cache: an answer is more suffix."""
    tokens = []
    for _ in range(n):
        suffix = " ".join([prompt.suffix, *TOKENIZER.convert_ids_to_tokens(tokens)])
        longer = SetPrompt(prompt.prefix, prompt.groups, suffix, prompt.between)
        tokens.append(int(last_logits(model, [longer])[0].argmax()))
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def answerer(model, kind=SetPromptingModel, **arguments):
    model.generation_config.eos_token_id = None  # random models end too soon to be tested
    return kind(model, TOKENIZER, **arguments)


@pytest.mark.parametrize(
    "name", ["llama", "mistral-window", "qwen2-window", "gemma3", "gpt2", "opt", "llama4"]
)
def test_generation_is_that_of_whole_passes(name):
    model = causal(name)
    prompts = [PROMPT, NESTED, SetPrompt("a", [["cat", "dog"]], "sat")]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert len(set(expected)) > 1
    for arguments in ({}, {"use_cache": False}):
        found = answerer(model).generate(prompts, max_new_tokens=12, **arguments)
        assert found == expected
    orders = PROMPT.orders()
    assert answerer(model).generate(orders, max_new_tokens=12) == expected[:1] * 6
    free = answerer(model, batch_size=4).generate(orders, max_new_tokens=12, canonical_order=False)
    assert free == expected[:1] * 6


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_other_ways_to_decode_do_not_see_the_order(arguments):
    model = causal("gemma3")
    texts = {
        tuple(answerer(model).generate([order], max_new_tokens=6, **arguments))
        for order in PROMPT.orders()
    }
    assert len(texts) == 1
    batch = [PROMPT, SetPrompt("a", [["cat", "dog"]], "sat")]
    found = answerer(model).generate(batch, max_new_tokens=6, **arguments)
    n = arguments.get("num_return_sequences", 1)
    assert len(found) == 2 * n
    if "do_sample" not in arguments:
        assert tuple(found[:n]) in texts
    else:
        again = answerer(model).generate(batch, max_new_tokens=6, random_state=1, **arguments)
        assert again != found


def test_sampling_leaves_the_global_state_alone():
    model = causal()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    answerer(model).generate([PROMPT], do_sample=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [SetPromptingModel, PlainOrderModel])
def test_without_sets_generation_is_transformers_own(name, kind):
    model = causal(name)
    prompts = [SetPrompt("the cat sat on ", [], "the mat"), SetPrompt("a dog", [], "")]
    found = answerer(model, kind).generate(prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([ids_of(f"{prompt.prefix} {prompt.suffix}")])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        assert text == TOKENIZER.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_model_is_as_before():
    model = causal("gemma3")
    ids = torch.tensor([ids_of(SPACED.text)])
    with torch.no_grad():
        before = model(ids).logits
    hooks = n_hooks(model)
    model.train()
    SetPromptingModel(model, TOKENIZER).score([PROMPT], ["cat"])
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    batch = encode_prompts([PROMPT], TOKENIZER)
    with order_free(model, batch):
        assert n_hooks(model) == hooks + 1
    with pytest.raises(DataError, match="of 1 prompts"), order_free(model, batch):
        model()
    assert n_hooks(model) == hooks
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
        # Outside the block a batch is the plain prompt.
        assert torch.equal(
            model(**encode_prompts([SPACED], TOKENIZER, canonical_order=False)).logits, before
        )


def test_a_training_step_sees_the_set():
    model = causal()
    losses, gradients = [], []
    for order in PROMPT.orders():
        batch = encode_prompts([order], TOKENIZER, canonical_order=False)
        # The next token behind each piece depends on the order; only the suffix is learnt.
        labels = batch.input_ids.clone()
        labels[:, :-2] = -100
        model.zero_grad()
        with order_free(model, batch):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-5, rtol=1e-4)


def test_adapters_do_not_hide_the_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(causal(), adapter)
    logits = last_logits(model, PROMPT.orders(), canonical_order=False)
    assert (logits - logits[0]).abs().max() < 1e-4
    found = SetPromptingModel(model, TOKENIZER).generate(PROMPT.orders(), max_new_tokens=5)
    assert len(set(found)) == 1
    assert found[0] == greedy(model, PROMPT, 5)


# Scoring ------------------------------------------------------------------------------------------

CHOICES = ["cat", "the red dog", "under a", "cat sat"]


def by_hand(model, prompt, choice):
    """Return log-probabilities of a choice's tokens, the choice being more suffix."""
    batch = encode_prompts(
        [SetPrompt(prompt.prefix, prompt.groups, f"{prompt.suffix} {choice}", prompt.between)],
        TOKENIZER,
    )
    ids = ids_of(choice)
    with torch.no_grad(), order_free(model, batch):
        logits = model(**batch).logits[0, -len(ids) - 1 : -1].double()
    return torch.log_softmax(logits, -1)[range(len(ids)), ids].numpy()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [SetPromptingModel, PlainOrderModel])
def test_one_pass_scores_choices_like_a_pass_each(name, kind):
    model = causal(name)
    prompts = [PROMPT, NESTED]
    plain = [SetPrompt(_spaced(p), [], "") for p in prompts]
    read = prompts if kind is SetPromptingModel else plain
    for normalize, reduce in (("mean", np.mean), ("sum", np.sum)):
        found = kind(model, TOKENIZER).score(read, CHOICES, normalize=normalize)
        for prompt, scores in zip(read, found, strict=True):
            expected = [reduce(by_hand(model, prompt, choice)) for choice in CHOICES]
            np.testing.assert_allclose(scores, expected, atol=1e-5)
    best = kind(model, TOKENIZER).predict(read, CHOICES, normalize="sum")
    assert best.tolist() == [int(np.argmax(scores)) for scores in found]


def _spaced(prompt):
    """Return the prompt as text, words apart as they are in separately tokenised texts."""
    return " ".join(
        TOKENIZER.convert_ids_to_tokens(
            encode_prompts([prompt], TOKENIZER, canonical_order=False).input_ids[0].tolist()
        )
    )


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_scores_depend_on_nothing_else(name):
    model = causal(name)
    prompts = [PROMPT, NESTED, SetPrompt("a", [["cat", "dog"]], "sat")]
    own = [CHOICES, CHOICES[:2], ["dog"]]
    together = SetPromptingModel(model, TOKENIZER, batch_size=3).score(prompts, own)
    assert [len(scores) for scores in together] == [4, 2, 1]
    for prompt, choices, scores in zip(prompts, own, together, strict=True):
        alone = SetPromptingModel(model, TOKENIZER).score([prompt], [choices])[0]
        np.testing.assert_allclose(scores, alone, atol=1e-5)
        backwards = SetPromptingModel(model, TOKENIZER).score([prompt], [choices[::-1]])[0]
        assert backwards[::-1].tolist() == alone.tolist()  # bit by bit
        for order in prompt.orders(5):
            again = SetPromptingModel(model, TOKENIZER).score([order], [choices])[0]
            assert again.tolist() == alone.tolist()
            again = SetPromptingModel(model, TOKENIZER).score(
                [order], [choices], canonical_order=False
            )[0]
            np.testing.assert_allclose(again, alone, atol=2e-5)


def test_rule_of_the_official_code():
    model = causal("gemma3")
    long = " ".join(["cat"] * 12)  # longer than the ten tokens that are generated
    choices = ["cat", "the red dog", long, "dog <unk> dog"]
    for ends in (None, 1):
        scores = []
        for choice in choices:
            made, logits = [], []
            for _ in range(10):
                suffix = " ".join([PROMPT.suffix, *TOKENIZER.convert_ids_to_tokens(made)])
                logits.append(last_logits(model, [SetPrompt("the cat saw", PROMPT.groups, suffix)]))
                made.append(int(logits[-1].argmax()))
                if ends is not None and len(made) == ends:
                    break
            values = [
                float(step[0, token])
                for step, token in zip(logits, ids_of(choice), strict=False)
                if token > 3
            ]
            scores.append(np.mean(values))
        model.generation_config.eos_token_id = None if ends is None else made[0]
        found = SetPromptingModel(model, TOKENIZER).score(
            [PROMPT, PROMPT], choices, rule="generated"
        )
        np.testing.assert_allclose(found[0], scores, atol=1e-4)
        np.testing.assert_allclose(found[1], found[0])


# Rivals -------------------------------------------------------------------------------------------


def test_plain_order_reads_the_text_as_it_stands():
    model = causal()
    for joint in (True, False):
        rival = PlainOrderModel(model, TOKENIZER, joint_tokens=joint)
        for order in SPACED.orders():
            plain = SetPrompt(order.text, [], "")
            np.testing.assert_allclose(
                rival.score([order], CHOICES)[0],
                [by_hand(model, plain, choice).mean() for choice in CHOICES],
                atol=1e-5,
            )
    # In alphabetical order, a rival that is independent of the listed order as well.
    sorted_ = [rival.score([o], CHOICES, canonical_order=True)[0].tolist() for o in SPACED.orders()]
    assert len(set(map(tuple, sorted_))) == 1


@pytest.mark.parametrize("n", [None, 4])
def test_ensembles_are_those_of_a_loop_over_orders(n):
    model = causal()
    prompts = [SPACED, SetPrompt("a ", [["cat ", "dog "]], "sat")]
    plain = PlainOrderModel(model, TOKENIZER)
    votes = OrderEnsembleModel(model, TOKENIZER, n_orders=n)
    means = OrderEnsembleModel(model, TOKENIZER, n_orders=n, aggregate="mean")
    orders = [prompt.orders(n) for prompt in prompts]
    for prompt, each in zip(prompts, orders, strict=True):
        scores = np.stack(plain.score(each, CHOICES))
        share = np.bincount(scores.argmax(1), minlength=4) / len(each)
        np.testing.assert_allclose(votes.score([prompt], CHOICES)[0], share)
        np.testing.assert_allclose(means.score([prompt], CHOICES)[0], scores.mean(0), atol=1e-5)
        ranked = max(range(4), key=lambda i: (share[i], scores.mean(0)[i]))
        assert votes.predict([prompt], CHOICES).tolist() == [ranked]
        texts = plain.generate(each, max_new_tokens=4)
        most = max(texts.count(text) for text in texts)
        voted = min(text for text in texts if texts.count(text) == most)
        assert votes.generate([prompt], max_new_tokens=4) == [voted]
    both = means.score(prompts, CHOICES)
    np.testing.assert_allclose(both[1], means.score(prompts[1:], CHOICES)[0], atol=1e-5)


def test_mean_decoding_takes_the_mean_at_every_step():
    model = causal()
    made = []
    for _ in range(5):
        rows = []
        for order in SPACED.orders():
            with torch.no_grad():
                logits = model(torch.tensor([ids_of(order.text) + made])).logits[0, -1]
            rows.append(torch.log_softmax(logits.double(), -1))
        made.append(int(torch.stack(rows).mean(0).argmax()))
    rival = answerer(model, OrderEnsembleModel, aggregate="mean")
    expected = [TOKENIZER.decode(made, skip_special_tokens=True)]
    for order in SPACED.orders():  # with all orders, the listed one is of no consequence
        assert rival.generate([order], max_new_tokens=5) == expected


def test_a_draw_of_orders_from_sorted_pieces_is_one_draw():
    model = causal()
    rival = OrderEnsembleModel(model, TOKENIZER, n_orders=2, random_state=3, aggregate="mean")
    scores = [rival.score([o], CHOICES, canonical_order=True)[0].tolist() for o in SPACED.orders()]
    assert len(set(map(tuple, scores))) == 1


# Prompts ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(prompt=some_prompts, n=st.integers(1, 30))
def test_orders_are_different_permutations(prompt, n):
    orders = prompt.orders(n, random_state=1)
    assert len(orders) == min(n, prompt.n_orders)
    assert {order.sorted() for order in orders} == {prompt.sorted()}
    assert prompt.orders(n, random_state=1) == orders
    assert SetPrompt.parse(prompt.marked).marked == prompt.marked
    assert SetPrompt.parse(prompt.marked).text == prompt.text


def test_orders_of_different_pieces_are_all_there():
    named = SetPrompt("", [list("abc"), [SetPrompt("", [["d", "e"]], ""), "f"]], "x", ["-"])
    expected = {
        f"{''.join(first)}-{''.join(second)}x"
        for first in itertools.permutations("abc")
        for inner in ("de", "ed")
        for second in itertools.permutations([inner, "f"])
    }
    orders = [order.text for order in named.orders()]
    assert named.n_orders == len(orders) == len(expected) == 24
    assert set(orders) == expected
    assert orders[0] == named.text == "abc-defx"
    few = SetPrompt("", [[str(i) for i in range(12)]], "x").orders(50)
    assert len({order.text for order in few}) == 50
    with pytest.raises(DataError, match="479001600 orders: give n"):
        SetPrompt("", [[str(i) for i in range(12)]], "x").orders()
    with pytest.raises(DataError, match="n must be at least 1"):
        named.orders(0)


def test_markers_are_read_and_removed():
    start, split, end = "<|start_2d|>", "<|split_2d|>", "<|end_2d|>"
    text = f"A{start}b{split}c{start}d{split}e{end}{end}F{start}g{split}h{end}I"
    prompt = SetPrompt.parse(text)
    inner = SetPrompt("c", [["d", "e"]], "")
    assert prompt == SetPrompt("A", [["b", inner], ["g", "h"]], "I", ["F"])
    assert prompt.marked == text
    assert prompt.text == "AbcdeFghI"
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    assert SetPrompt.parse("plain") == SetPrompt("plain", [], "")
    model = SetPromptingModel(causal(), TOKENIZER)
    marked = f"the {start}cat {split}dog {end}sat"
    assert model.generate([marked]) == model.generate([SetPrompt.parse(marked)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A<|start_2d|>b<|split_2d|>c", "without <|end_2d|>"),
        ("A<|start_2d|>b<|start_2d|>c<|end_2d|>d", "without <|end_2d|>"),
        ("Ab<|split_2d|>c<|end_2d|>d", "without <|start_2d|>"),
        ("A<|start_2d|>b<|end_2d|>c<|end_2d|>d", "without <|start_2d|>"),
        ("A<|start_2d|>b<|split_2d|><|end_2d|>d", "is empty"),
        ("A<|start_2d|><|end_2d|>d", "is empty"),
    ],
)
def test_wrong_markers_are_refused(text, message):
    import re

    with pytest.raises(DataError, match=re.escape(message)):
        SetPrompt.parse(text)


def test_ready_made_prompts():
    prompt = SetPrompt.from_options("Which?", ['a "b"', "c"])
    assert prompt.text == 'Which?\n"a \'b\'" "c" \nAnswer:'
    assert prompt.n_orders == 2
    retrieved = SetPrompt.from_passages("Who?", ["one {}", "two"], instruction="Read.\n")
    assert retrieved.text == "Read.\nPassage: one {}\nPassage: two\nQuestion: Who?\nAnswer:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", ["b", "c"], "d"), r"groups\[0\] must be a sequence of pieces"),
        (("a", [[]], "d"), r"groups\[0\] has no pieces"),
        (("a", [["b", ""]], "d"), r"groups\[0\]\[1\] is empty"),
        (("a", [["b", 3]], "d"), r"groups\[0\]\[1\] must be a text"),
        (("a", [["b", "c"]], None), "suffix must be a text"),
        (("a", [["b", "c"]], "d", ["e"]), "one text fewer than there are groups"),
        (("a", [["b"], ["c"]], "d", "e"), "one text fewer than there are groups"),
    ],
)
def test_wrong_prompts_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        SetPrompt(*arguments)


# Refusals -----------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_encoded_are_refused():
    with pytest.raises(DataError, match=r"prompts\[1\].groups\[0\] has a piece without"):
        encode_prompts([PROMPT, SetPrompt("a", [["cat", "  "]], "sat")], TOKENIZER)
    with pytest.raises(DataError, match=r"prompts\[0\].suffix has no tokens"):
        encode_prompts([SetPrompt("a", [["cat", "dog"]], "")], TOKENIZER)
    with pytest.raises(DataError, match=r"prompts\[0\] has no tokens"):
        encode_prompts([SetPrompt("", [], "")], TOKENIZER)
    with pytest.raises(DataError, match="at least one prompt"):
        encode_prompts([], TOKENIZER)
    with pytest.raises(DataError, match=r"give \[prompt\]"):
        encode_prompts(PROMPT, TOKENIZER)
    with pytest.raises(DataError, match="padding_side"):
        encode_prompts([PROMPT], TOKENIZER, padding_side="middle")
    appends = tiny.tokenizer(eos=True)
    with pytest.raises(DataError, match="appends special tokens"):
        encode_prompts([PROMPT], appends)
    assert encode_prompts([PROMPT], appends, add_special_tokens=False).n_columns == 15

    class Stubborn:
        pad_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, *ids_of(text)]}

        def convert_ids_to_tokens(self, ids):
            return TOKENIZER.convert_ids_to_tokens(ids)

    with pytest.raises(DataError, match=r"adds special tokens \(\['<s>'\]\) to every piece"):
        encode_prompts([PROMPT], Stubborn())


def test_beginning_of_sequence_stands_once():
    from tokenizers import processors

    begins = tiny.tokenizer()
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    ids = encode_prompts([PROMPT], begins).input_ids[0].tolist()
    assert ids[0] == 1
    assert ids.count(1) == 1
    without = encode_prompts([PROMPT], begins, add_special_tokens=False).input_ids[0].tolist()
    assert without == ids[1:]
    empty = encode_prompts([SetPrompt("", [["cat", "dog"]], "sat")], begins)
    assert empty.position_ids.tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention", "flash_attention_3"])
def test_other_backends_are_refused_by_name(backend):
    model = causal()
    model.config._attn_implementation_internal = backend
    batch = encode_prompts([PROMPT], TOKENIZER)
    with pytest.raises(ModelError, match=f"'{backend}'.*attn_implementation='sdpa'"):  # noqa: SIM117
        with order_free(model, batch):
            pass


def refused(model, message):
    hooks = n_hooks(model)
    batch = encode_prompts([PROMPT], TOKENIZER)
    with pytest.raises(ModelError, match=message), order_free(model, batch):
        pass
    assert n_hooks(model) == hooks


def test_models_that_count_in_their_own_way_are_refused():
    sizes = {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    refused(bloom, "takes no position_ids")
    OTHERS["falcon-alibi"] = ("FalconConfig", "FalconForCausalLM", {"alibi": True})
    try:
        refused(causal("falcon-alibi"), "cannot be run|order of pieces still shows")
    finally:
        del OTHERS["falcon-alibi"]
    mamba = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
    refused(transformers.MambaForCausalLM(mamba), "takes no position_ids")
    hybrid = causal()
    hybrid.config.layer_types = ["full_attention", "conv", "full_attention", "conv"]
    refused(hybrid, "layers of kind 'conv'")


@pytest.mark.parametrize(
    ("ignored", "message"),
    [("position_ids", "order of pieces still shows"), ("attention_mask", "ignores the attention")],
)
def test_models_that_ignore_an_edit_are_refused(ignored, message):
    model = causal()
    forward = model.model.forward

    def deaf(input_ids=None, attention_mask=None, position_ids=None, **rest):
        if ignored == "position_ids":
            position_ids = None
        else:
            attention_mask = torch.ones_like(input_ids)
        return forward(input_ids, attention_mask, position_ids, **rest)

    model.model.forward = deaf
    refused(model, message)


def test_models_that_do_not_look_at_pieces_are_refused():
    model = causal()
    forward = model.model.forward

    def blind(input_ids=None, attention_mask=None, position_ids=None, **rest):
        mask = attention_mask.clone()
        mask[:, :, -2:, 2:-2] = torch.finfo(mask.dtype).min
        return forward(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, **rest)

    model.model.forward = blind
    refused(model, "does not let the text behind a set see its pieces")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_too_many_positions_are_refused(name):
    model = causal(name, max_position_embeddings=20, n_positions=20)
    # Pieces share positions: 45 tokens fit, of which only the longest piece counts.
    wide = SetPrompt("the", [[*words(*[8] * 5)]], *words(4))
    found = answerer(model).generate([wide], max_new_tokens=7)
    assert len(found) == 1
    with pytest.raises(DataError, match="need 13 positions and the answer 8, the model has 20"):
        answerer(model).generate([wide], max_new_tokens=8)
    long = SetPrompt("the", [words(3, 16)], *words(4))
    with pytest.raises(DataError, match="need 22 positions, the model has 20"):
        SetPromptingModel(model, TOKENIZER).score([long], ["cat dog"])


def test_inside_the_block_only_the_batch_is_read():
    model = causal()
    batch = encode_prompts([PROMPT, NESTED], TOKENIZER)
    with torch.no_grad(), order_free(model, batch):
        with pytest.raises(DataError, match="other input_ids"):
            model(batch.input_ids.flip(1))
        with pytest.raises(DataError, match="of 2 prompts"):
            model(batch.input_ids[:1])
        with pytest.raises(DataError, match="and no cache"):
            model(batch.input_ids[:, :5])
        with pytest.raises(DataError, match="takes a cache that grows, got StaticCache"):
            model.generate(**batch, max_new_tokens=4, cache_implementation="static")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert len(batch) == 2
    with pytest.raises(KeyError):
        batch["position_ids"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.ones(1, 4)},
        {"assistant_model": object()},
        {"cache_implementation": "static"},
        {"guidance_scale": 2.0},
        {"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=3)},
        {"max_new_tokens": 0},
    ],
)
def test_arguments_that_would_escape_the_set_are_refused(arguments):
    with pytest.raises(DataError, match=next(iter(arguments)) + "|prompt_lookup_num_tokens"):
        SetPromptingModel(causal(), TOKENIZER).generate([PROMPT], **arguments)


def test_wrong_arguments_are_refused():
    model = causal()
    with pytest.raises(DataError, match="tokenizer must be given"):
        SetPromptingModel(model)
    with pytest.raises(DataError, match="batch_size"):
        SetPromptingModel(model, TOKENIZER, batch_size=0)
    ours = SetPromptingModel(model, TOKENIZER)
    with pytest.raises(DataError, match="rule"):
        ours.score([PROMPT], ["cat"], rule="logits")
    with pytest.raises(DataError, match="normalize"):
        ours.score([PROMPT], ["cat"], normalize="max")
    with pytest.raises(DataError, match="one list per prompt, got 1 for 2"):
        ours.score([PROMPT, PROMPT], [["cat"]])
    with pytest.raises(DataError, match=r"choices\[0\]\[1\] has no tokens"):
        ours.score([PROMPT], ["cat", " "])
    for empty in ("cat", [], [[]]):
        with pytest.raises(DataError, match="must be a list of texts"):
            ours.score([PROMPT], empty)
    with pytest.raises(DataError, match="aggregate"):
        OrderEnsembleModel(model, TOKENIZER, aggregate="median")
    with pytest.raises(DataError, match="n_orders"):
        OrderEnsembleModel(model, TOKENIZER, n_orders=0)
    with pytest.raises(DataError, match="num_return_sequences"):
        OrderEnsembleModel(model, TOKENIZER).generate([PROMPT], num_return_sequences=2)
    with pytest.raises(DataError, match="do_sample"):
        OrderEnsembleModel(model, TOKENIZER, aggregate="mean").generate([PROMPT], do_sample=True)


def test_progress_counts_prompts():
    model = causal()
    prompts = [SPACED] * 3
    for kind in (SetPromptingModel, OrderEnsembleModel):
        for run in (
            lambda m, f: m.score(prompts, ["cat"], progress=f),
            lambda m, f: m.generate(prompts, max_new_tokens=2, progress=f),
        ):
            seen = []
            run(kind(model, TOKENIZER, batch_size=2), lambda *count, to=seen: to.append(count))
            assert seen[-1] == (3, 3)
            assert seen == sorted(seen)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), size=st.integers(1, 4))
def test_batches_are_the_least_work(lengths, size):
    model = SetPromptingModel(torch.nn.Module(), TOKENIZER, batch_size=size)
    model.model.device = torch.device("cpu")
    batches = model._batches(lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size

    def work(parts):
        return sum(48 + len(part) * max(part) for part in parts)

    ordered = sorted(lengths)
    least = min(
        work([ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(ordered)))])
        for n in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), n)
        if all(b - a <= size for a, b in itertools.pairwise((0, *cuts, len(ordered))))
    )
    assert work([[lengths[number] for number in batch] for batch in batches]) == least


# A real model -------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_real_model_answers_alike_in_all_24_orders():
    from bakeoff.models import load_language_model

    language_model = load_language_model("smollm2-135m")
    prompt = SetPrompt.from_options(
        "Which of these is a kind of fruit?", ["hammer", "papaya", "violin", "harbour"]
    )
    choices = [" hammer", " papaya", " violin", " harbour"]
    orders = prompt.orders()
    free = np.stack(SetPromptingModel(language_model).score(orders, choices, canonical_order=False))
    assert np.abs(free - free[0]).max() < 1e-4
    plain = np.stack(PlainOrderModel(language_model).score(orders, choices))
    assert np.abs(plain - plain[0]).max() > 0.05
    once = SetPromptingModel(language_model).score([prompt], choices)[0]
    np.testing.assert_allclose(once, free[0], atol=1e-4)
    chat = language_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.marked}], tokenize=False, add_generation_prompt=True
    )
    answers = SetPromptingModel(language_model, add_special_tokens=False).generate(
        SetPrompt.parse(chat).orders(4), max_new_tokens=8, canonical_order=False
    )
    assert len(set(answers)) == 1
