from __future__ import annotations

import copy

import pytest
import torch
from tests.models import tiny

from bakeoff.errors import ModelError
from bakeoff.models.attention import bidirectional, make_bidirectional, sees_ahead

# Gemma 2 caps attention logits, which torch's fused attention cannot do: transformers has no sdpa.
CASES = [
    (name, attention)
    for name in tiny.ARCHITECTURES
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2", "sdpa")
]
LENGTH = 9
each_case = pytest.mark.parametrize(("name", "attention"), CASES)


def draw_ids(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def states(model, ids, mask=None) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


def padded(ids: torch.Tensor, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = ids.shape[0]
    # Random ids under the padding: what stands there must not matter.
    full = torch.cat([draw_ids(rows, left, 7), ids, draw_ids(rows, right, 8)], 1)
    mask = torch.zeros_like(full)
    mask[:, left : left + ids.shape[1]] = 1
    return full, mask


def change_seen_by_earlier_tokens(model, mask: str) -> torch.Tensor:
    """How much each token's state moves when the last one is another: (LENGTH,)."""
    ids = draw_ids()
    other = ids.clone()
    other[0, -1] = 3 + (ids[0, -1] - 3 + 40) % 90
    results = []
    for sequence in (ids, other):
        if mask == "none":
            results.append(states(model, sequence)[0])
        elif mask == "ones":
            results.append(states(model, sequence, torch.ones_like(sequence))[0])
        else:
            results.append(states(model, *padded(sequence, 0, 3))[0, :LENGTH])
    return (results[0] - results[1]).abs().amax(-1)


@pytest.mark.parametrize("mask", ["none", "ones", "padded"])
@each_case
def test_a_later_token_changes_earlier_states_only_inside_the_block(name, attention, mask):
    model = tiny.model(name, attention)
    before = change_seen_by_earlier_tokens(model, mask)
    assert before[:-1].max() == 0
    assert before[-1] > 0.01
    with bidirectional(model):
        assert change_seen_by_earlier_tokens(model, mask).min() > 1e-3
    assert torch.equal(change_seen_by_earlier_tokens(model, mask), before)


def allowed(model, mask: torch.Tensor, *, window: bool) -> torch.Tensor:
    """Which query (row) may look at which key (column), from first principles: (B, 1, T, T)."""
    position = torch.arange(mask.shape[1])
    near = (position[:, None] - position[None, :]).abs() <= (model.config.sliding_window or 0)
    every = torch.ones_like(near)
    return (near if window else every)[None, None] & mask[:, None, None, :].bool()


def explicit_mask(model, mask: torch.Tensor):
    def one(window: bool) -> torch.Tensor:
        seen = allowed(model, mask, window=window)
        if model.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    if getattr(model.config, "layer_types", None):
        return {"full_attention": one(False), "sliding_attention": one(True)}
    return one(getattr(model.config, "sliding_window", None) is not None)


@each_case
def test_equals_the_causal_model_given_an_explicit_mask(name, attention):
    model = tiny.model(name, attention)
    if not hasattr(model.config, "sliding_window"):
        model.config.sliding_window = None
    ids, mask = padded(draw_ids(2), 0, 3)
    mask[1, 5:] = 0
    expected = states(model, ids, explicit_mask(model, mask))
    with bidirectional(model):
        found = states(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert (found[real] - states(model, ids, mask)[real]).abs().max() > 0.01


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 11), (1, 0), (11, 0), (4, 5)])
@each_case
def test_padding_changes_no_real_tokens_state(name, attention, left, right):
    model = tiny.model(name, attention)
    ids = draw_ids()
    with bidirectional(model):
        alone = states(model, ids)[0]
        found = states(model, *padded(ids, left, right))[0, left : left + LENGTH]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@each_case
def test_batch_mates_do_not_matter(name, attention):
    model = tiny.model(name, attention)
    short, long = draw_ids(1, 4, seed=1), draw_ids(1, 12, seed=2)
    first, mask = padded(short, 0, 8)
    ids, mask = torch.cat([first, long]), torch.cat([mask, torch.ones_like(long)])
    with bidirectional(model):
        together = states(model, ids, mask)
        torch.testing.assert_close(together[0, :4], states(model, short)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[1], states(model, long)[0], atol=1e-5, rtol=1e-5)


@each_case
def test_the_lasting_patch_survives_saving_and_loading(name, attention, tmp_path):
    from transformers import AutoModel

    model = tiny.model(name, attention)
    ids = draw_ids()
    with bidirectional(model):
        expected = states(model, ids)
    assert make_bidirectional(make_bidirectional(model)) is model
    torch.testing.assert_close(states(model, ids), expected)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    torch.testing.assert_close(states(again, ids), expected)
    torch.testing.assert_close(
        states(again, *padded(ids, 0, 2))[:, :LENGTH], expected, atol=1e-5, rtol=1e-5
    )
    assert sees_ahead(again)
    with bidirectional(again):  # a block inside a lasting patch changes nothing, before or after
        torch.testing.assert_close(states(again, ids), expected)
    torch.testing.assert_close(states(again, ids), expected)


def settings(model) -> list:
    config = {k: v for k, v in vars(model.config).items() if not k.startswith("_")}
    modules = [(n, m.is_causal) for n, m in model.named_modules() if hasattr(m, "is_causal")]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    return [config, modules, hooks, [m.training for m in model.modules()]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_everything_is_restored_after_nesting_and_errors(name, training):
    model = tiny.model(name, "eager").train(training)
    before = copy.deepcopy(settings(model))
    with bidirectional(model):
        with bidirectional(model):
            pass
        model.eval()
        assert change_seen_by_earlier_tokens(model, "none").min() > 1e-3
        model.train(training)
    assert settings(model) == before
    with pytest.raises(KeyboardInterrupt), bidirectional(model):
        raise KeyboardInterrupt
    assert settings(model) == before


def test_generation_works_afterwards_and_is_refused_inside():
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.config()).eval()
    ids = draw_ids()

    def generate():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )

    before = generate()
    with bidirectional(model), pytest.raises(ModelError, match="key-value cache"):
        generate()
    assert torch.equal(generate(), before)
    with bidirectional(model):  # and the head's model as a whole is patched, not only its backbone
        assert model(ids, use_cache=None).past_key_values is None
        with pytest.raises(ModelError, match="key-value cache"):
            model(ids, use_cache=True)


def test_peft_models_are_patched_inside():
    peft = pytest.importorskip("peft")
    model = tiny.model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with bidirectional(adapted):
        assert change_seen_by_earlier_tokens(adapted, "ones").min() > 1e-3
    assert change_seen_by_earlier_tokens(adapted, "ones")[:-1].max() == 0


def test_gradients_flow_from_early_states_to_late_tokens():
    model = tiny.model().train()
    embedded = model.get_input_embeddings()(draw_ids()).detach().requires_grad_()
    with bidirectional(model):
        model(inputs_embeds=embedded).last_hidden_state[0, 0].sum().backward()
    assert embedded.grad[0, -1].abs().max() > 0


def test_half_precision():
    model = tiny.model().to(torch.bfloat16)
    assert not sees_ahead(model)
    with bidirectional(model):
        assert sees_ahead(model)


def test_encoders_are_refused_because_they_see_ahead_already():
    from transformers import BertConfig, BertModel

    shape = {k: tiny.SHAPE[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
    model = BertModel(BertConfig(**shape, num_hidden_layers=2, num_attention_heads=4)).eval()
    assert sees_ahead(model)
    for patch in (make_bidirectional, lambda m: bidirectional(m).__enter__()):
        with pytest.raises(ModelError, match=r"BertModel.*'bert'.*bidirectional already"):
            patch(model)


def test_a_recurrent_model_is_refused():
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2)).eval()
    with pytest.raises(ModelError, match=r"'mamba'.*the whole model.*known to work: llama"):
        make_bidirectional(model)
    assert not hasattr(model.config, "is_causal")


def test_a_model_of_attention_and_convolutions_is_refused_by_layer():
    from transformers import Lfm2Config, Lfm2Model

    shape = {k: v for k, v in tiny.SHAPE.items() if k != "head_dim"}
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    model = Lfm2Model(Lfm2Config(**shape, layer_types=kinds)).eval()
    with pytest.raises(ModelError, match=r"layers 0 \(Lfm2DecoderLayer\), 2 \(Lfm2Decoder"):
        make_bidirectional(model)
    assert not sees_ahead(model)


def test_encoder_decoders_and_other_modules_are_refused():
    from transformers import T5Config, T5Model

    model = T5Model(
        T5Config(vocab_size=96, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    ).eval()
    with pytest.raises(ModelError, match="encoder-decoder"):
        make_bidirectional(model)
    with pytest.raises(ModelError, match="Linear holds no transformers model"):
        make_bidirectional(torch.nn.Linear(2, 2))


def test_a_half_patched_model_whose_mask_depends_on_padding_is_refused():
    # What hand-made patches do: without padding the mask is skipped and the module's own flag
    # rules, with padding a causal mask is built after all.
    model = tiny.model("llama", "sdpa")
    for layer in model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ModelError, match="depending on padding"):
        sees_ahead(model)
