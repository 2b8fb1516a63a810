"""Patched models against the unpatched ones, a brute force inside the model, and each other."""

import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.decoding.test_block_memory import brute_force, files_no_larger_than, rotary
from tests.models import tiny

from bakeoff.decoding.block_memory import BlockStore, LayerMemory, MemorySettings
from bakeoff.decoding.infllm import InfLLMCache, patch, unpatch
from bakeoff.errors import CacheError, DataError, ModelError, StoreError

SMALL = {"n_init": 3, "n_local": 20, "block_size": 6, "topk": 2, "repr_topk": 2, "exec_chunk": 8}
# name -> (architecture, what differs from the tiny shape)
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "layer_types": tiny.ALTERNATING}),
    "gemma3": ("Gemma3", {"sliding_window": 6, "layer_types": tiny.ALTERNATING}),
    "smollm3": ("SmolLM3", {}),  # layers without positions
    "phi3": ("Phi3", {}),
    "phi": ("Phi", {}),  # only half of each head is rotated
    "glm": ("Glm", {}),  # interleaved, and only half
    "cohere": ("Cohere", {}),  # interleaved
    "olmo2": ("Olmo2", {}),
}


def decoder(name="llama", **changes):
    import transformers

    family, differs = ARCHITECTURES[name]
    configuration = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(
        **{**tiny.SHAPE, "initializer_range": 0.2, **differs, **changes}
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def text(n, seed=1, batch=1):
    return torch.tensor(np.random.RandomState(seed).randint(3, 96, (batch, n)))


def logits(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


def greedy(model, ids, n=8, **arguments):
    settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


# What it computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_window_that_holds_everything_changes_nothing(name):
    model, ids = decoder(name), text(70)
    expected, continued = logits(model, ids), greedy(model, ids)
    with patch(model, **{**SMALL, "n_local": 100, "exec_chunk": 9}):
        found = logits(model, ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        step, cache = [], None
        for part in ids.split([40, 1, 1, 28], 1):
            with torch.no_grad():
                output = model(part, past_key_values=cache)
            cache = output.past_key_values
            step.append(output.logits)
        torch.testing.assert_close(torch.cat(step, 1), expected, atol=1e-4, rtol=0)
        assert torch.equal(greedy(model, ids), continued)
    assert torch.equal(logits(model, ids), expected)


def brute_attention(sizes, calls):
    """Return an attention function: what the model rotated is rotated back, then brute force."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert query.shape[2] == key.shape[2]
        width = query.shape[-1]
        angles = np.arange(query.shape[2])[:, None] * 1e4 ** (-np.arange(width // 2) * 2 / width)

        def turned_back(x):
            x = x[0].double().numpy()
            z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * np.exp(-1j * angles)
            return np.concatenate((z.real, z.imag), -1)

        output, _, _ = brute_force(
            turned_back(query),
            turned_back(key),
            value[0].double().numpy(),
            calls,
            sizes,
            scaling=scaling,
            softcap=kwargs.get("softcap"),
        )
        return torch.tensor(output).to(query)[None].transpose(1, 2), None

    return attention


@pytest.fixture
def brute():
    from transformers import AttentionInterface

    def answer(model, ids, calls, **sizes):
        attention = brute_attention(MemorySettings(**sizes, exact_mask=True), calls)
        AttentionInterface.register("brute_infllm", attention)
        before = model.config._attn_implementation
        model.set_attn_implementation("brute_infllm")
        found = logits(model, ids, use_cache=False)
        model.set_attn_implementation(before)
        return found

    yield answer
    AttentionInterface._global_mapping.pop("brute_infllm", None)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_brute_force_inside_the_model(name, brute):
    model, ids = decoder(name).double(), text(90)
    expected = brute(model, ids, [90], **SMALL)
    assert (expected - logits(model, ids)).abs().max() > 0.1  # the window does matter
    with patch(model, **SMALL):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)


def test_generated_tokens_are_those_of_brute_force(brute):
    model, ids = decoder().double(), text(61)
    with patch(model, **SMALL):
        found = greedy(model, ids, 12)
    # All but the last prompt token in chunks of 8, then one by one.
    scores = brute(model, found, [60] + [1] * 13, **SMALL)[0, 60:-1]
    scores[:, 2] = -torch.inf  # the end of the text was not allowed
    expected = scores.argmax(-1)
    assert expected.tolist() == found[0, 61:].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi", "llama-yarn"])
def test_with_all_blocks_looked_up_the_chunk_does_not_matter(name):
    model, ids = decoder(name), text(150)
    found = []
    for chunk, block, parts in ((20, 6, [150]), (1, 6, [150]), (7, 5, [70, 1, 79])):
        sizes = {**SMALL, "topk": 100, "exec_chunk": chunk, "block_size": block}
        with pytest.warns(UserWarning, match="attends to up to"):
            patched = patch(model, **sizes)
        with patched:
            cache = patched.new_cache()
            found.append(
                torch.cat([logits(model, p, past_key_values=cache) for p in ids.split(parts, 1)], 1)
            )
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-4, rtol=0)


def test_the_piece_read_at_once_changes_nothing():
    model, ids = decoder(), text(200)
    found = []
    for piece in (8, 40, 800):
        with patch(model, **SMALL, prefill_chunk=piece) as patched:
            calls = []
            cache = patched.read(ids, progress=lambda done, total, calls=calls: calls.append(done))
            found.append(logits(model, ids[:, :5], past_key_values=cache))
        assert calls == [*range(piece, 200, piece), 200]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("capacity", [0, 1, 32])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_where_blocks_are_kept_changes_nothing(offload, capacity, tmp_path):
    model, ids = decoder(), text(300)
    with patch(model, **SMALL):
        expected = logits(model, ids), greedy(model, ids)
    where = {"offload": offload, "max_cached_blocks": capacity, "offload_folder": tmp_path}
    with patch(model, **SMALL, **where):
        assert torch.equal(logits(model, ids), expected[0])
        assert torch.equal(greedy(model, ids), expected[1])
    assert list(tmp_path.iterdir()) == []


def test_a_batch_reads_each_text_as_alone():
    model, ids = decoder(), text(100, batch=3)
    with patch(model, **SMALL):
        together, continued = logits(model, ids), greedy(model, ids)
        for row in range(3):
            alone = logits(model, ids[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)
            assert torch.equal(continued[row], greedy(model, ids[row : row + 1])[0])


def test_beams_are_those_of_an_unlimited_window():
    model, ids = decoder(), text(40)
    expected = greedy(model, ids, 10, num_beams=3, num_return_sequences=3)
    with patch(model, **{**SMALL, "n_local": 100}):
        assert torch.equal(greedy(model, ids, 10, num_beams=3, num_return_sequences=3), expected)


def test_beams_do_not_disturb_each_other():
    """A single beam of width one is greedy search; the first step of three beams contains it."""
    model, ids = decoder(), text(80)
    with patch(model, **SMALL):
        output = greedy(
            model,
            ids,
            12,
            num_beams=3,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
            cache, total, token = None, 0.0, None
            with torch.no_grad():
                done = model(sequence[None, :79])
                cache = done.past_key_values
                for position in range(79, len(sequence) - 1):
                    done = model(sequence[None, position : position + 1], past_key_values=cache)
                    token = sequence[position + 1]
                    total += done.logits[0, -1].log_softmax(-1)[token].item()
            # transformers divides by the length of what was generated
            assert total / 12 == pytest.approx(score.item(), abs=1e-4)


def test_without_cache_generation_reads_everything_again_each_time():
    model, ids = decoder(), text(60)
    with patch(model, **SMALL) as patched:
        with torch.no_grad():
            output = model(ids, use_cache=False)
        assert output.past_key_values is None
        again = greedy(model, ids, 3, use_cache=False)
        expected = logits(model, again[:, :-1])[0, 59:].argmax(-1)
        assert again[0, 60:].tolist() == expected.tolist()
        assert patched.is_active


def test_tensors_made_in_inference_mode_can_be_used_outside_of_it(tmp_path):
    model, ids = decoder(), text(120)
    with patch(model, **SMALL) as patched:
        expected = logits(model, ids)
        with torch.inference_mode():
            first = patched.read(ids[:, :64])
            second = first.copy()
            third = patched.load(first.save(tmp_path / "document"))
        for cache in (first, second, third):
            found = model(ids[:, 64:], past_key_values=cache).logits
            torch.testing.assert_close(found, expected[:, 64:], atol=1e-5, rtol=0)


def test_half_precision():
    model, ids = decoder(), text(120)
    sizes = {**SMALL, "topk": 17}  # all blocks: rounding must not turn a choice
    with patch(model, **sizes):
        expected = logits(model, ids)
    with patch(model.to(torch.bfloat16), **sizes):
        found = logits(model, ids).float()
    agreement = torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean()
    assert agreement > 0.98


def test_a_language_model_and_a_bare_backbone_can_be_patched():
    from bakeoff.models import LanguageModel

    model, ids = decoder(), text(90)
    wrapped = LanguageModel("tiny", model, tiny.tokenizer(), Path("tiny"), "0" * 64, 128)
    with patch(wrapped, **SMALL):
        expected = logits(model, ids)
    with torch.no_grad(), patch(model.model, **SMALL):
        states = model.model(ids).last_hidden_state
        torch.testing.assert_close(model.lm_head(states), expected, atol=1e-5, rtol=0)


# Patching and restoring ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_as_before(attention):
    model, ids = decoder(), text(60)
    model.set_attn_implementation(attention)
    state, expected = dict(vars(model.config)), logits(model, ids)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    patched = patch(model, **SMALL)
    assert patched.is_active
    assert not torch.equal(logits(model, ids), expected)
    unpatch(model)
    assert not patched.is_active
    assert torch.equal(logits(model, ids), expected)
    assert vars(model.config) == state
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    patched.unpatch()  # once more is no error
    with pytest.raises(DataError, match="not patched"):
        unpatch(model)
    with pytest.raises(DataError, match="not patched any more"):
        patched.read(ids)
    with pytest.raises(DataError, match="not patched any more"):
        patched.generate(ids)


def test_the_model_is_restored_after_an_error():
    model, ids = decoder(), text(60)
    expected = logits(model, ids)
    with pytest.raises(ZeroDivisionError), patch(model, **SMALL):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model, ids), expected)


def test_a_second_patch_is_refused():
    model = decoder()
    with patch(model, **SMALL) as first:
        for again in (model, model.model):
            with pytest.raises(DataError, match="patched already"):
                patch(again, **SMALL)
        assert first.is_active
    with patch(model, **SMALL):
        pass


def test_another_attention_chosen_meanwhile_is_noticed():
    model = decoder()
    with patch(model, **SMALL):
        model.set_attn_implementation("eager")
        with pytest.raises(ModelError, match="'eager' while the model was patched"):
            logits(model, text(10))


def test_training_is_refused():
    model = decoder()
    with pytest.raises(ModelError, match="eval"):
        patch(model.train(), **SMALL)
    with patch(model.eval(), **SMALL):
        loss = model(text(30)).logits.sum()
        with pytest.raises(ModelError, match="no gradient"):
            loss.backward()
        model.train()
        with pytest.raises(ModelError, match="does not train"):
            model(text(30))
        model.eval()


@pytest.mark.parametrize("family", ["GPT2", "Bloom", "OPT"])
def test_models_without_rotary_positions_are_refused(family):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=96, hidden_size=32, num_attention_heads=4, num_hidden_layers=2
    )
    names = [f"{family}LMHeadModel", f"{family}ForCausalLM"]
    made = next(getattr(transformers, n) for n in names if hasattr(transformers, n))(config).eval()
    expected = logits(made, text(10))
    with pytest.raises(ModelError, match=rf"{family}Model.*no rotary positions.*choose.*Llama"):
        patch(made, **SMALL)
    assert torch.equal(logits(made, text(10)), expected)


def test_a_model_whose_attention_cannot_be_replaced_says_what_to_choose():
    from transformers import FalconConfig, FalconForCausalLM

    made = FalconForCausalLM(
        FalconConfig(vocab_size=96, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    ).eval()
    with pytest.raises(ModelError, match=r"AttentionInterface.*attn_implementation='sdpa'"):
        patch(made, **SMALL)


def test_attention_sinks_of_the_model_are_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {k: v for k, v in tiny.SHAPE.items() if not k.endswith("token_id")}
    made = GptOssForCausalLM(
        GptOssConfig(**{**shape, "num_local_experts": 2, "num_experts_per_tok": 1})
    ).eval()
    before = made.config._attn_implementation
    with pytest.raises(ModelError, match="sinks"):
        patch(made, **SMALL)
    assert made.config._attn_implementation == before


def test_a_model_that_does_more_with_its_keys_is_found_out(monkeypatch):
    """The probe: an architecture whose rotation is not what it seems is refused, and restored."""
    from transformers.models.llama import modeling_llama

    model, ids = decoder(), text(30)
    expected = logits(model, ids)
    real = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: real(q, k, cos, -sin)
    )
    # Rotating the other way round changes nothing: only differences of positions are seen.
    with patch(model, **SMALL):
        pass
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: real(q, k, cos, sin + 0.3)
    )
    with pytest.raises(ModelError, match="reads even a short text differently"):
        patch(model, **SMALL)
    monkeypatch.undo()
    assert torch.equal(logits(model, ids), expected)
    with patch(model, **SMALL):
        pass


def test_a_window_in_every_layer_is_refused_with_the_way_out():
    model = decoder("mistral", sliding_window=8)
    with pytest.raises(ModelError, match=r"last 8 tokens.*config\.sliding_window = None"):
        patch(model, **SMALL)
    model.config.sliding_window = None
    with patch(model, **SMALL):
        logits(model, text(60))


def test_frequencies_that_depend_on_the_length():
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = decoder("llama", rope_parameters=scaled, max_position_embeddings=128)
    ids = text(300)
    with pytest.raises(DataError, match=r"more than 128 tokens.*choose n_local up to about (\d+)"):
        patch(model, **{**SMALL, "n_local": 100})
    with patch(model, **{**SMALL, "n_local": 75}):  # what that message says
        pass
    # Within the window's length the frequencies are the plain ones, however long the text is.
    plain = decoder("llama", max_position_embeddings=128)
    with patch(model, **SMALL), patch(plain, **SMALL):
        torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids[:, :100]), logits(plain, ids[:, :100]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exec_chunk": 21}, "exec_chunk"),
        ({"repr_topk": 7}, "repr_topk"),
        ({"prefill_chunk": 12}, r"multiple of exec_chunk \(8\)"),
        ({"offload": "tape"}, "offload must be one of"),
        ({"max_cached_blocks": -1}, "max_cached_blocks"),
    ],
)
def test_bad_arguments_leave_the_model_alone(changes, message):
    model = decoder()
    with pytest.raises(DataError, match=message):
        patch(model, **{**SMALL, **changes})
    with patch(model, **SMALL):
        pass


def test_a_thing_that_is_no_model_is_refused():
    with pytest.raises(DataError, match=r"model must be a transformers model.*str"):
        patch("smollm2-135m")
    with pytest.raises(ModelError, match="no transformers model"):
        patch(torch.nn.Linear(2, 2))


def test_defaults_fit_the_model_or_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch(decoder(max_position_embeddings=8192)) as patched:
            found = patched.settings
        assert (found.n_init, found.n_local, found.block_size, found.topk) == (128, 4096, 128, 16)
        assert (found.repr_topk, found.exec_chunk, found.exact_mask) == (4, 512, True)
        assert patched.prefill_chunk == 4096
    with pytest.warns(UserWarning, match=r"= 2240 tokens; this model was trained on inputs of 128"):
        patched = patch(decoder())
    assert (patched.settings.n_local, patched.settings.exec_chunk) == (64, 64)


# What a forward pass may not be given -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[0] + [1] * 9])}, "no padding"),
        ({"attention_mask": torch.ones(1, 1, 10, 10)}, "2-dimensional"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
@pytest.mark.parametrize("keep", [0, 1])
def test_what_cannot_be_honoured_is_refused(arguments, message, keep):
    with patch(decoder(), **SMALL) as patched, pytest.raises(DataError, match=message):
        patched.model(text(10), logits_to_keep=keep, **arguments)


def test_foreign_caches_are_refused():
    from transformers import DynamicCache, StaticCache

    model, ids = decoder(), text(10)
    filled = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=filled)
    with patch(model, **SMALL) as patched:
        mine = patched.read(ids)
        with pytest.raises(DataError, match="filled before"):
            logits(model, ids, past_key_values=filled)
        static = StaticCache(config=model.config, max_cache_len=50)
        with pytest.raises(DataError, match="StaticCache"):
            logits(model, ids, past_key_values=static)
    with patch(model, **SMALL), pytest.raises(DataError, match="another patch"):
        logits(model, ids, past_key_values=mine)


def test_assisted_generation_is_refused():
    model = decoder()
    with patch(model, **SMALL), pytest.raises((DataError, ValueError), match=r"assist|crop"):
        greedy(model, text(40), assistant_model=decoder())


@pytest.mark.parametrize("ids", [[], [[]], torch.ones(1, 3), [[[1]]]])
def test_things_that_are_no_token_ids_are_refused(ids):
    with patch(decoder(), **SMALL) as patched, pytest.raises(DataError, match="input_ids"):
        patched.read(ids)


def test_an_interrupted_pass_is_noticed():
    model, ids = decoder(), text(60)
    with patch(model, **SMALL) as patched:
        cache = patched.read(ids)
        hook = model.model.layers[2].register_forward_pre_hook(
            lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            patched.read(ids, cache)
        hook.remove()
        with pytest.raises(DataError, match=r"middle of a forward pass.*60 to 120 tokens"):
            patched.read(ids, cache)
        with pytest.raises(DataError, match="middle"):
            cache.save("nowhere")
        cache.reset()
        found = logits(model, ids[:, :9], past_key_values=patched.read(ids, cache))
        expected = logits(model, ids[:, :9], past_key_values=patched.read(ids))
        assert torch.equal(found, expected)


def test_a_full_disk_is_named_and_the_model_restored(tmp_path):
    pytest.importorskip("resource")
    model, ids = decoder(), text(400)
    expected = logits(model, ids)
    patched = patch(model, **SMALL, offload="disk", offload_folder=tmp_path)
    with (
        files_no_larger_than(20_000),
        pytest.raises(CacheError, match=r"free some space.*offload='cpu'") as caught,
    ):
        greedy(model, ids)
    assert str(tmp_path) in str(caught.value)
    assert not patched.is_active
    assert torch.equal(logits(model, ids), expected)
    del caught
    assert list(tmp_path.iterdir()) == []
    with patch(model, **SMALL, offload="disk", offload_folder=tmp_path):
        greedy(model, ids)


def test_a_folder_that_cannot_be_written_is_refused_before_patching(tmp_path):
    (tmp_path / "file").write_text("")
    model = decoder()
    with pytest.raises(CacheError, match="file"):
        patch(model, **SMALL, offload="disk", offload_folder=tmp_path / "file")
    with patch(model, **SMALL):
        pass


# Documents that are read once ---------------------------------------------------------------------


def test_a_document_can_be_asked_many_times():
    model, document = decoder(), text(150)
    questions = [text(n, seed) for n, seed in ((9, 2), (1, 3), (30, 4))]
    with patch(model, **SMALL) as patched:
        memory = patched.read(document)
        blocks = memory.stats()["blocks"]
        for question in [*questions, *questions]:
            again = patched.read(document)
            if question.shape[1] > 1:
                again = patched.read(question[:, :-1], again)
            expected, last = [], question[:, -1:]
            for _ in range(8):
                last = logits(model, last, past_key_values=again)[:, -1].argmax(-1)[:, None]
                expected.append(last.item())
            options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            found = patched.generate(question, memory, **options)
            assert found.tolist() == [expected]
        assert (memory.n_tokens, memory.stats()["blocks"]) == (150, blocks)
        # several questions of one length at once
        pair = torch.cat((questions[0], text(9, 8)))
        found = patched.generate(pair, memory, **options)
        for row in range(2):
            alone = patched.generate(pair[row], memory, **options)
            assert torch.equal(found[row], alone[0])


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_saved_document_gives_the_same_logits(name, offload, tmp_path):
    model, document, question = decoder(name), text(200), text(20, 2)
    with patch(model, **SMALL) as patched:
        memory = patched.read(document)
        copied = logits(model, question, past_key_values=memory.copy())
        memory.save(tmp_path / "document")
        expected = logits(model, question, past_key_values=memory)
        torch.testing.assert_close(copied, expected, atol=1e-5, rtol=0)
    assert {p.name for p in (tmp_path / "document").iterdir()} == {
        "memory.json",
        "memory.safetensors",
    }
    fresh = decoder(name)
    where = {"offload": offload, "offload_folder": tmp_path / "blocks"}
    with patch(fresh, **{**SMALL, **where}) as patched:
        for _ in range(2):
            loaded = patched.load(tmp_path / "document")
            assert loaded.n_tokens == 200
            assert torch.equal(loaded.token_ids, document)
            found = logits(fresh, question, past_key_values=loaded)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        # A document that was loaded, read on and saved again
        loaded.save(tmp_path / "longer")
        longer = patched.load(tmp_path / "longer")
        assert longer.n_tokens == 220
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        found = patched.generate([5, 6], longer, **options)
        again = patched.generate([5, 6], loaded, **options)
        assert torch.equal(found, again)


def test_documents_of_other_models_or_sizes_are_refused(tmp_path):
    model = decoder()
    with patch(model, **SMALL) as patched:
        patched.read(text(100)).save(tmp_path / "document")
    with patch(decoder("qwen2"), **SMALL) as other, pytest.raises(DataError, match="another model"):
        other.load(tmp_path / "document")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    with patch(model, **SMALL) as patched, pytest.raises(DataError, match="Read the text again"):
        patched.load(tmp_path / "document")
    with (
        patch(decoder(), **{**SMALL, "block_size": 5, "n_local": 21}) as patched,
        pytest.raises(DataError, match="patch the model with n_local=20, block_size=6"),
    ):
        patched.load(tmp_path / "document")
    with patch(decoder(), **{**SMALL, "topk": 1, "exec_chunk": 4}) as patched:
        patched.load(tmp_path / "document")  # these two only matter while reading


def test_saving_refuses_what_it_cannot_keep(tmp_path):
    with patch(decoder(), **SMALL) as patched:
        with pytest.raises(DataError, match="an empty one"):
            patched.new_cache().save(tmp_path / "x")
        with pytest.raises(DataError, match="2 sequences"):
            patched.read(text(50, batch=2)).save(tmp_path / "x")
        memory = patched.read(text(50))
        memory.save(tmp_path / "x")
        with pytest.raises(DataError, match="exists already"):
            memory.save(tmp_path / "x")


def test_a_full_disk_leaves_no_half_document(tmp_path):
    pytest.importorskip("resource")
    with patch(decoder(), **SMALL) as patched:
        memory = patched.read(text(200))
        with files_no_larger_than(5000), pytest.raises(CacheError, match="cannot be written"):
            memory.save(tmp_path / "document")
        assert list(tmp_path.iterdir()) == []
        memory.save(tmp_path / "document")


@pytest.mark.parametrize("damage", ["cut", "garbage", "json", "format", "gone", "header"])
def test_damaged_documents_are_named(damage, tmp_path):
    folder = tmp_path / "document"
    with patch(decoder(), **SMALL) as patched:
        patched.read(text(100)).save(folder)
        tensors, about = folder / "memory.safetensors", folder / "memory.json"
        if damage == "cut":
            tensors.write_bytes(tensors.read_bytes()[:-100])
        elif damage == "garbage":
            tensors.write_bytes(b"no safetensors")
        elif damage == "header":
            tensors.unlink()
        elif damage == "json":
            about.write_text("{")
        elif damage == "gone":
            about.unlink()
        else:
            about.write_text(json.dumps({**json.loads(about.read_text()), "format": 99}))
        with pytest.raises(StoreError, match=r"damaged|format 99|no document"):
            patched.load(folder)


# Inspection ---------------------------------------------------------------------------------------


def test_stats_and_retrieved_blocks():
    model = decoder()
    with patch(model, **SMALL) as patched:
        memory = patched.read(text(200))
        found = memory.stats()
        n_blocks = (200 - 3 - 20) // 6
        assert found["tokens"] == 200
        assert found["blocks"] == 4 * n_blocks
        assert found["offloaded_bytes"] == 4 * n_blocks * 2 * 2 * 6 * 8 * 4
        assert found["misses"] > 0
        spans = memory.retrieved_blocks(1)
        assert len(spans) == 2
        assert all(end - start == 6 and (start - 3) % 6 == 0 and end <= 180 for start, end in spans)
        assert memory.retrieved_blocks(-1, 0)
        with pytest.raises(DataError, match="layer must be below 4, got 4"):
            memory.retrieved_blocks(4)
        with pytest.raises(DataError, match="sequence must be below 1"):
            memory.retrieved_blocks(0, 1)
        assert patched.new_cache().retrieved_blocks(0) == []
        memory.reset()
        assert memory.stats()["blocks"] == memory.n_tokens == 0


def test_the_block_that_holds_the_answer_is_looked_up():
    """A key that only one distant block holds is found by a query that asks for it."""
    rng = np.random.RandomState(0)
    n, needle = 400, 157
    q, k, v = (torch.tensor(rng.standard_normal((1, 2, n, 16))).float() * 0.3 for _ in range(3))
    wanted = torch.zeros(16)
    wanted[-1] = 12.0  # the slowest frequency hardly turns
    k[:, :, needle] = wanted
    q[:, :, needle : needle + 30] += wanted / 12  # it is noticed while it is in the window
    q[:, :, -1] = wanted
    sizes = MemorySettings(4, 32, 8, 1, 1, 16, True)
    memory = LayerMemory(sizes, rotary(), BlockStore("cpu"))
    memory.attend(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
    output = memory.attend(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])
    (start, end) = memory.spans()[0][0]
    assert start <= needle < end
    torch.testing.assert_close(output[0, :, 0], v[0, :, needle], atol=1e-3, rtol=0)


def test_copies_are_independent():
    model = decoder()
    with patch(model, **SMALL) as patched:
        memory = patched.read(text(100))
        twin = copy.deepcopy(memory)
        patched.read(text(50, 3), twin)
        assert (memory.n_tokens, twin.n_tokens) == (100, 150)
        assert isinstance(twin, InfLLMCache)
        assert torch.equal(twin.token_ids[:, :100], memory.token_ids)


def test_embeddings_instead_of_tokens():
    model, ids = decoder(), text(100)
    with patch(model, **SMALL) as patched, torch.no_grad():
        expected = logits(model, ids)
        output = model(inputs_embeds=model.get_input_embeddings()(ids))
        torch.testing.assert_close(output.logits, expected)
        assert output.past_key_values.token_ids is None
        with pytest.raises(DataError, match="read as embeddings"):
            patched.generate([5], output.past_key_values)
        with pytest.raises(DataError, match="input_ids or inputs_embeds"):
            model()


def test_the_code_on_the_method_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))
    page = Path(__file__).parents[2] / "docs/methods/infllm.md"
    block, study = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["answer"].shape == (1, 8)
    assert names["memory"].n_tokens == 5000
    assert not names["patched"].is_active
    exec(study, names)
    assert "infllm" in [design.name for design in names["study"].designs]


# A real model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    from bakeoff.models import load_language_model

    return load_language_model("smollm2-135m")


def passkey_prompt(tokenizer, n_tokens, depth, key=48213):
    line = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    line_ids, needle_ids = (
        tokenizer(x, add_special_tokens=False).input_ids for x in (line, needle)
    )
    total = max(1, (n_tokens - len(needle_ids)) // len(line_ids))
    before = round(depth * total)
    ids = line_ids * before + needle_ids + line_ids * (total - before)
    question = tokenizer("What is the pass key? The pass key is", add_special_tokens=False)
    return ids, question.input_ids


@pytest.mark.model
def test_smollm_reads_as_before_inside_the_window(smollm):
    ids = torch.tensor([passkey_prompt(smollm.tokenizer, 600, 0.5)[0]])
    expected = logits(smollm.model, ids)
    with patch(smollm, n_local=1024):
        torch.testing.assert_close(logits(smollm.model, ids), expected, atol=1e-3, rtol=0)


@pytest.mark.model
def test_smollm_finds_a_pass_key_far_outside_its_window(smollm):
    """1,200 tokens with a window of 256 and 256 more looked up; without look-up it is lost."""
    document, question = passkey_prompt(smollm.tokenizer, 1200, 0.4)
    sizes = {"n_init": 16, "n_local": 256, "block_size": 32, "exec_chunk": 64}
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = []
    for topk in (8, 0):
        with patch(smollm, **sizes, topk=topk) as patched:
            found = patched.generate(question, patched.read(document), **options)
        answers.append(smollm.tokenizer.decode(found[0]))
    assert "48213" in answers[0]
    assert "48213" not in answers[1]
