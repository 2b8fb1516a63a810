"""A sentence-transformers model by name: its vectors, its fingerprint, and what cannot serve."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from tests.embedding.tiny_problem import sentences
from tests.models import tiny

from bakeoff.errors import ModelError
from bakeoff.models import TextEncoder, load_encoder

TEXTS = list(sentences(12, 4))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that takes the last token and scales to length 1: no plain mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    made = tmp_path_factory.mktemp("encoder")
    tiny.model().save_pretrained(made / "plain")
    tiny.tokenizer().save_pretrained(made / "plain")
    parts = [Transformer(str(made / "plain")), Pooling(32, "lasttoken"), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(made / "own"))
    return made


def test_vectors_are_those_of_sentence_transformers(folder):
    from sentence_transformers import SentenceTransformer

    encoder = TextEncoder(folder / "own")
    expected = SentenceTransformer(str(folder / "own"), device="cpu").encode(TEXTS)
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.is_sentence_transformer
    assert encoder.model is encoder.model


def test_a_plain_folder_gives_the_mean_over_tokens(folder):
    import torch

    encoder = TextEncoder(str(folder / "plain"))
    assert not encoder.is_sentence_transformer
    tokenizer, model = tiny.tokenizer(), tiny.model()
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(dim=0), atol=1e-5)


def test_modules_of_ours_load_and_no_code_of_a_folder_runs(folder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    from bakeoff.embedding.baselines import PositionWeightedMeanPooling

    parts = [Transformer(str(folder / "plain")), PositionWeightedMeanPooling(32)]
    made = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "find "})
    made.save(str(tmp_path / "ours"))
    encoder = TextEncoder(tmp_path / "ours")
    np.testing.assert_allclose(encoder.encode(TEXTS), made.encode(TEXTS), atol=1e-5)
    assert encoder.model.prompts["query"] == "find "
    assert not encoder.model.trust_remote_code
    assert load_encoder(tmp_path / "ours").encode(TEXTS).shape == (12, 32)

    listed = json.loads((tmp_path / "ours" / "modules.json").read_text())
    (tmp_path / "ours" / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    listed.append({"idx": 2, "name": "2", "path": "", "type": "evil.Module"})
    (tmp_path / "ours" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelError, match=r"evil\.Module, code of others, which is never run"):
        load_encoder(tmp_path / "ours")
    assert not (tmp_path / "run").exists()


def test_progress_and_cut_texts_are_told(folder):
    seen, cut = [], []
    TextEncoder(folder / "own").encode(
        [*TEXTS, "cat " * 300],
        progress=lambda *a: seen.append(a),
        on_truncated=cut.extend,
    )
    assert seen[-1] == (13, 13)
    assert cut == [12]


def test_a_pickled_encoder_carries_no_weights(folder):
    encoder = TextEncoder(folder / "own")
    expected, fingerprint = encoder.encode(TEXTS), encoder.fingerprint
    packed = pickle.dumps(encoder)
    assert len(packed) < 500
    copy = pickle.loads(packed)
    np.testing.assert_array_equal(copy.encode(TEXTS), expected)
    assert (copy.name, copy.fingerprint) == (encoder.name, fingerprint)


def test_nothing_is_loaded_before_it_is_asked_for():
    encoder = TextEncoder("./absent")
    assert encoder.name == "./absent"
    with pytest.raises(ModelError, match="there is no file or folder"):
        _ = encoder.fingerprint
    with pytest.raises(ModelError, match="unknown model 'all-minilm'; did you mean all-minilm-l6"):
        TextEncoder("all-minilm").encode(TEXTS)


def test_the_fingerprint_follows_what_vectors_depend_on(folder, tmp_path):
    def copied(name):
        return shutil.copytree(folder / "own", tmp_path / name)

    first = TextEncoder(folder / "own").fingerprint
    assert len(first) == 64
    assert TextEncoder(copied("same")).fingerprint == first
    # Papers, other formats of the weights and hidden files change no vector.
    other = copied("beside")
    (other / "README.md").write_text("more words")
    (other / "pytorch_model.bin").write_bytes(b"never read")
    for name in ("onnx/model.onnx", "openvino/model.xml", ".git/config"):
        (other / name).parent.mkdir()
        (other / name).write_text("x")
    assert TextEncoder(other).fingerprint == first
    prints = {first, TextEncoder(folder / "plain").fingerprint}
    pooled = copied("pooled")
    (settings,) = pooled.glob("*Pooling/config.json")
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "pooling_mode": "mean"}))
    prints.add(TextEncoder(pooled).fingerprint)
    shorter = copied("shorter")
    (shorter / "modules.json").write_text(
        json.dumps(json.loads((shorter / "modules.json").read_text())[:2])
    )
    prints.add(TextEncoder(shorter).fingerprint)
    weights = copied("weights")
    tiny.model(seed=1).save_pretrained(weights)
    prints.add(TextEncoder(weights).fingerprint)
    assert len(prints) == 5


def break_weights(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)


def break_configuration(folder):
    (folder / "config.json").write_text("{")


def break_modules(folder):
    (folder / "modules.json").write_text("{")


def pickle_weights(folder):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")


def name_a_module_that_is_not_there(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "nowhere.at.all.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        break_weights,
        break_configuration,
        break_modules,
        pickle_weights,
        name_a_module_that_is_not_there,
        empty,
    ],
)
def test_what_cannot_be_loaded_is_one_line(folder, tmp_path, damage):
    broken = shutil.copytree(folder / "own", tmp_path / "broken")
    damage(broken)
    with pytest.raises(ModelError, match="cannot be loaded by sentence-transformers: ") as caught:
        TextEncoder(broken).encode(TEXTS)
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)


@pytest.mark.model
def test_the_packaged_encoder_knows_what_is_alike(monkeypatch):
    monkeypatch.delenv("BAKEOFF_CACHE")
    encoder = TextEncoder("all-minilm-l6-v2")
    vectors = encoder.encode(["A cat sleeps.", "A kitten is napping.", "Stocks fell on Monday."])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
