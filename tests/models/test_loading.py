from __future__ import annotations

import json
import math
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models import tiny

from bakeoff.errors import ModelError
from bakeoff.models import load


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request) -> None:
    if "model" not in request.keywords:  # those use the user's cache, where the models are
        monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))


def saved(folder: Path, name: str = "llama", **changes) -> Path:
    """Save a tiny random model and its tokenizer; return the folder."""
    tiny.model(name, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_folder_gives_its_backbone(tmp_path, name):
    base = load(saved(tmp_path / "m", name))
    assert (base.hidden_size, base.num_layers, base.max_length) == (32, 4, 128)
    assert base.is_decoder
    assert not base.model.training
    assert base.path == tmp_path / "m"
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        ours, theirs = base.model(ids), tiny.model(name)(ids)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)


def test_a_head_is_left_behind(tmp_path):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    whole = LlamaForCausalLM(tiny.config()).eval()
    whole.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = load(str(tmp_path))
    assert type(base.model).__name__ == "LlamaModel"
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(base.model(ids).last_hidden_state, expected)


def encoder(folder: Path, **changes) -> Path:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**{**tiny.SHAPE, **changes})).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_an_encoder_is_no_decoder(tmp_path):
    assert not load(encoder(tmp_path)).is_decoder


def test_a_sentence_transformers_folder_gives_its_transformer_and_window(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    words = Transformer(str(encoder(tmp_path / "bert")), max_seq_length=20)
    model = SentenceTransformer(modules=[words, Pooling(32)], device="cpu")
    model.save(str(tmp_path / "st"))
    base = load(tmp_path / "st")
    assert base.max_length == 20
    batch = base.tokenizer(["the cat sat", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = base.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = model.encode(["the cat sat", "a dog"])
    np.testing.assert_allclose((states * mask).sum(1) / mask.sum(1), expected, atol=1e-5)


def test_a_sentence_transformers_folder_without_transformer_is_refused(tmp_path):
    (tmp_path / "modules.json").write_text('[{"type": "x.StaticEmbedding", "path": ""}]')
    with pytest.raises(ModelError, match=r"begins with x\.StaticEmbedding"):
        load(tmp_path)


def test_dtype_and_device_are_respected_or_refused(tmp_path):
    folder = saved(tmp_path)
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, float16"):
        load(folder, dtype="int8")  # type: ignore[arg-type]
    for device in ("toaster", "cuda:99"):
        with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
            load(folder, device=device)


def test_the_window_is_the_least_limit_and_positions_may_start_late(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    shape = {**tiny.SHAPE, "max_position_embeddings": 66, "pad_token_id": 1}
    RobertaModel(RobertaConfig(**shape)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)  # says 128
    base = load(tmp_path)
    assert base.max_length == base.tokenizer.model_max_length == 64
    batch = base.tokenizer("the " * 200, truncation=True, return_tensors="pt")
    batch["input_ids"][:] = 5  # the padding id would take no position
    assert base.model(**batch).last_hidden_state.shape[1] == 64


def test_the_tokenizer_limit_counts_where_it_is_lower(tmp_path):
    edit(saved(tmp_path) / "tokenizer_config.json", model_max_length=50)
    assert load(tmp_path).max_length == 50


def test_a_missing_padding_token_is_filled_in(tmp_path):
    edit(saved(tmp_path) / "tokenizer_config.json", pad_token=None)
    assert load(tmp_path).tokenizer.pad_token == "</s>"


# End-of-text token --------------------------------------------------------------------------------


def test_eos_is_appended_also_after_truncation_and_once(tmp_path):
    folder = saved(tmp_path / "m")
    tokenizer = load(folder, append_eos=True).tokenizer
    assert load(folder).tokenizer("the cat")["input_ids"] == [4, 6]
    assert tokenizer("the cat")["input_ids"] == [4, 6, 2]
    assert tokenizer("")["input_ids"] == [2]
    assert tokenizer("the cat sat on", truncation=True, max_length=3)["input_ids"] == [4, 6, 2]
    long = tokenizer("the " * 500, truncation=True)["input_ids"]
    assert (len(long), long[-1]) == (128, 2)
    assert tokenizer("the", "cat")["input_ids"] == [4, 2, 6, 2]

    shutil.copytree(folder, tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "again")("the cat")["input_ids"] == [4, 6, 2]
    again = load(tmp_path / "again", append_eos=True).tokenizer
    assert again("the cat")["input_ids"] == [4, 6, 2]


def byte_level_tokenizer(**options):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: n + 2 for n, c in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return inner


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "flags"])
def test_eos_keeps_the_bos_and_survives_saving_in_every_tokenizer_class(tmp_path, kind):
    import transformers

    name = "PreTrainedTokenizerFast" if kind == "flags" else kind
    made = getattr(transformers, name)(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    saved(tmp_path / "m", vocab_size=300)
    made.save_pretrained(tmp_path / "m")
    if kind == "flags":  # such a class builds its post-processor from these whenever it is loaded
        edit(tmp_path / "m" / "tokenizer_config.json", add_bos_token=True, add_eos_token=False)
    plain = load(tmp_path / "m").tokenizer
    before = plain("a b")["input_ids"]
    tokenizer = load(tmp_path / "m", append_eos=True).tokenizer
    expected = [*before, tokenizer.eos_token_id]
    assert tokenizer("a b")["input_ids"] == expected
    assert tokenizer("a b", truncation=True, max_length=3)["input_ids"][-1] == expected[-1]
    if kind == "PreTrainedTokenizerFast":
        assert before[0] == tokenizer.bos_token_id
        offsets = [
            t("a b", return_offsets_mapping=True)["offset_mapping"] for t in (plain, tokenizer)
        ]
        assert offsets[1][: len(before)] == offsets[0]
    tokenizer.save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").tokenizer("a b")["input_ids"] == expected


def test_eos_changes_nothing_where_texts_are_already_closed(tmp_path):
    folder = saved(tmp_path)
    tiny.tokenizer(eos=True).save_pretrained(folder)
    assert load(folder, append_eos=True).tokenizer("the cat")["input_ids"] == [4, 6, 2]


def test_eos_needs_such_a_token(tmp_path):
    edit(saved(tmp_path) / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no end-of-text token"):
        load(tmp_path, append_eos=True)


# Identity -----------------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_decides_the_states_and_nothing_else(tmp_path):
    folder = saved(tmp_path / "a")
    first = load(folder).fingerprint
    assert len(first) == 64
    (folder / "README.md").write_text("words about it")
    assert load(folder).fingerprint == first
    shutil.copytree(folder, tmp_path / "b")
    assert load(tmp_path / "b").fingerprint == first
    others = [load(folder, append_eos=True).fingerprint, load(folder, dtype="float16").fingerprint]
    edit(folder / "tokenizer_config.json", model_max_length=50)
    others.append(load(folder).fingerprint)
    edit(folder / "config.json", rms_norm_eps=1e-3)
    others.append(load(folder).fingerprint)
    tiny.model(seed=1).save_pretrained(tmp_path / "b")
    others.append(load(tmp_path / "b").fingerprint)
    assert len({first, *others}) == 6


def test_large_files_are_hashed_again_only_when_they_change(tmp_path, monkeypatch):
    import sys

    module = sys.modules["bakeoff.models.loading"]
    weights = tmp_path / "large"
    weights.write_bytes(b"a" * 2**20)
    first = module._file_digest(weights)
    hashed = []
    plain = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path) or plain(path))
    assert module._file_digest(weights) == first
    assert hashed == []
    weights.write_bytes(b"b" * 2**20)
    os.utime(weights, ns=(1, 1))
    assert module._file_digest(weights) != first
    assert hashed == [weights]


# What cannot serve --------------------------------------------------------------------------------


def test_unknown_names_are_told_what_there_is():
    with pytest.raises(ModelError, match=r"did you mean smollm2-135m\?.*needs network"):
        load("smolm2-135m")
    with pytest.raises(ModelError, match="packaged models are all-minilm-l6-v2, smollm2-135m"):
        load("x")
    with pytest.raises(ModelError, match="there is no file or folder"):
        load("./absent/folder")
    with pytest.raises(ModelError, match="there is no file or folder"):
        load("absent.gguf")


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        load(tmp_path / "file.txt")
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match=r"modules\.json is not JSON"):
        load(tmp_path)


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"encoder-decoder \(t5\) and cannot serve"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path):
    folder = saved(tmp_path / "m")
    weights = load(folder).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no \.safetensors weights$"):
        load(folder)


def test_the_command_that_converts_pickles_works(tmp_path):
    from bakeoff.models.loading import _conversion_command

    folder = saved(tmp_path / "m")
    weights = tiny.model().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    code = _conversion_command(folder).removeprefix('python -c "').removesuffix('"')
    exec(code, {})
    base = load(f"{folder}-safetensors")
    torch.testing.assert_close(base.model.state_dict(), weights)


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved(tmp_path) / "model.safetensors")
    del weights["layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_damaged_files_are_one_line(tmp_path):
    folder = saved(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match=r"the model in .* cannot be loaded: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"the configuration in .* cannot be loaded: "):
        load(folder)


def test_no_tokenizer_is_named(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded: "):
        load(tmp_path)


def test_code_that_comes_with_a_model_is_never_executed(tmp_path):
    folder = saved(tmp_path / "m")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    edit(
        folder / "config.json",
        model_type="novel",
        auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    )
    with pytest.raises(ModelError, match="needs code of its own to load, which is never executed"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_a_model_of_images_is_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    ViTModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="ViTModel gives no hidden states for text alone"):
        load(tmp_path)


# The hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with one model, tiny/llama, in the hub's own protocol."""
    from huggingface_hub import constants

    folder = saved(tmp_path / "hub-model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    asked: list[str] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            file = folder / path.rsplit("/", 1)[-1]
            if path.startswith("/api/models/tiny/llama/tree"):
                listing = [
                    {"type": "file", "path": p.name, "oid": "0", "size": p.stat().st_size}
                    for p in folder.iterdir()
                ]
                self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
            elif path.startswith("/api/models/tiny/llama"):
                siblings = [{"rfilename": p.name} for p in folder.iterdir()]
                about = {"id": "tiny/llama", "sha": commit, "siblings": siblings}
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif path.startswith("/tiny/llama/resolve/") and file.is_file():
                asked.append(file.name)
                etag = f'"{file.name}"'
                self.answer(200, file.read_bytes(), ETag=etag, X_Repo_Commit=commit)
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_without_its_pickles(hub):
    base = load("tiny/llama")
    assert base.name == "tiny/llama"
    assert base.hidden_size == 32
    assert "model.safetensors" in hub
    assert "pytorch_model.bin" not in hub
    with pytest.raises(ModelError, match="no model 'tiny/absent' here or on the hub"):
        load("tiny/absent")


@pytest.mark.parametrize(
    ("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, "the hub was not reached")]
)
def test_an_unreachable_hub_is_one_quick_line(tmp_path, monkeypatch, offline, why):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=f"no folder 'some/model'.*{why}") as caught:
        load("some/model")
    assert "\n" not in str(caught.value)


# GGUF ---------------------------------------------------------------------------------------------


def write_gguf(path: Path, model, words: list[str]) -> None:
    """Write a Llama as llama.cpp's converter does, but unquantised."""
    from gguf import GGUFWriter

    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["t h", "th e"])
    for number, add in enumerate(
        (writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id)
    ):
        add(number)
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    outside = {"embed_tokens": "token_embd", "norm": "output_norm"}
    for key, tensor in model.state_dict().items():
        part = key.removesuffix(".weight")
        values = tensor.numpy()
        if part.startswith("layers."):
            _, layer, rest = part.split(".", 2)
            name = f"blk.{layer}.{names[rest]}"
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
            if (kind := rest.removeprefix("self_attn.")[0]) in heads and "self_attn" in rest:
                # llama.cpp rotates neighbouring numbers, transformers the halves of a head.
                halves = values.reshape(heads[kind], 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        else:
            name = outside[part]
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_model_it_was_made_of(tmp_path, capfd):
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters, "th", "the"]
    # transformers derives the head size from the width when it reads GGUF.
    original = tiny.model(vocab_size=len(words))
    write_gguf(tmp_path / "m.gguf", original, words)
    base = load(tmp_path / "m.gguf", append_eos=True)
    assert (base.hidden_size, base.num_layers, base.max_length) == (32, 4, 128)
    batch = base.tokenizer("the cat, 7 times", return_tensors="pt")
    tokens = base.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens == ["the", *"Ġcat,Ġ7Ġtimes", "</s>"]
    assert base.tokenizer.decode(batch["input_ids"][0, :-1]) == "the cat, 7 times"
    with torch.no_grad():
        states = base.model(**batch).last_hidden_state
        expected = original(**batch).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert capfd.readouterr().err == ""
    assert not any("gguf" in path.name for path in base.path.iterdir())
    converted = base.path.stat().st_mtime_ns
    (tmp_path / "m.gguf").rename(tmp_path / "renamed.gguf")
    assert load(tmp_path / "renamed.gguf").path.stat().st_mtime_ns == converted


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x00" * 50)
    with pytest.raises(ModelError, match=r"transformers cannot read .*m\.gguf: ") as caught:
        load(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "models").glob("gguf-*"))


# The embedded models ------------------------------------------------------------------------------

ENGLISH = (
    "The city of Paris is the capital of France. It lies on the river Seine, and more than two "
    "million people live there."
)


@pytest.mark.model
def test_the_packaged_decoder_knows_english():
    from transformers import AutoModelForCausalLM

    base = load("smollm2-135m", append_eos=True)
    assert (base.hidden_size, base.num_layers, base.max_length) == (576, 30, 8192)
    assert base.is_decoder
    ids = base.tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    assert ids[0, -1] == base.tokenizer.eos_token_id
    assert base.tokenizer.decode(ids[0, :-1]) == ENGLISH
    whole = AutoModelForCausalLM.from_pretrained(base.path)
    with torch.no_grad():
        loss = whole(ids[:, :-1], labels=ids[:, :-1]).loss
        shuffled = ids[:, torch.randperm(ids.shape[1] - 1, generator=torch.manual_seed(0))]
        nonsense = whole(shuffled, labels=shuffled).loss
    # Wrongly read weights (norms off by one, heads permuted) give perplexities of thousands.
    assert math.exp(loss) < 10
    assert math.exp(nonsense) > 100


@pytest.mark.model
def test_the_packaged_encoder_is_the_known_one():
    base = load("all-minilm-l6-v2", append_eos=True)
    assert (base.hidden_size, base.num_layers, base.max_length) == (384, 6, 256)
    assert not base.is_decoder
    assert base.tokenizer("hello world")["input_ids"] == [101, 7592, 2088, 102]
