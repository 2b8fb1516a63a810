"""Winners leave: loaded in a new process by other tools, they give the same vectors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.embedding.tiny_problem import problem, save_base, sentences

from bakeoff.embedding.problem import default_designs
from bakeoff.embedding.winner import export_onnx
from bakeoff.errors import ModelError
from bakeoff.study import Work

DESIGNS = {design.name: design for design in default_designs(num_latents=2, num_heads=4)}
STOCK = (
    "last token, causal",
    "mean, bidirectional",
    "weighted mean, causal",
    "mean, centred",
    "best layer",
    "best layer, centred",
)
OURS = (
    "multi-layer pooling, bidirectional",
    "last-layer pooling, causal",
    "latent attention, bidirectional",
    "all layers + linear",
    "scalar mix of layers",
    "residual MLP + mean, causal",
)
LOAD = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, trust = sys.argv[1], sys.argv[2] == "trust"
model = SentenceTransformer(folder, trust_remote_code=trust)
print(json.dumps({
    "vectors": model.encode(json.loads(sys.stdin.read())).tolist(),
    "bakeoff": any(name.split(".")[0] == "bakeoff" for name in sys.modules),
}))
"""


def in_new_process(folder: Path, texts, trust: bool):
    """Encode with plain sentence-transformers in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), "trust" if trust else "no"],
        input=json.dumps(list(texts)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    answer = json.loads(finished.stdout.splitlines()[-1])
    return np.array(answer["vectors"]), answer["bakeoff"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return problem(tmp_path_factory.mktemp("winner"))


def trained(made, name, folder):
    """Run one trial and export it; return texts, their vectors by role, and if it is stock."""
    artifact = folder / "artifact"
    artifact.mkdir()
    texts = sentences(160, 0)[60:]
    kept = {}
    original = type(made)._score

    def keep(self, embed, seed, work):
        kept.update({role: embed(texts, role) for role in ("text", "query", "document")})
        return original(self, embed, seed, work)

    type(made)._score = keep
    try:
        made.run(DESIGNS[name], 0, Work(artifact))
    finally:
        type(made)._score = original
    stock = made.export(DESIGNS[name], artifact, folder / "winner", reason="a test")
    return texts, kept, stock


@pytest.mark.parametrize("name", STOCK + OURS)
def test_exported_vectors_are_those_that_were_scored(made, name, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts, scored, stock = trained(made, name, tmp_path)
    assert stock == (name in STOCK)
    model = SentenceTransformer(str(tmp_path / "winner"), trust_remote_code=not stock)
    # Cached states are float16: a relative error of one in two thousand.
    np.testing.assert_allclose(model.encode(list(texts)), scored["text"], atol=4e-3)
    np.testing.assert_allclose(model.encode_query(list(texts)), scored["query"], atol=4e-3)
    np.testing.assert_allclose(model.encode_document(list(texts)), scored["document"], atol=4e-3)
    # One text a time, other batch-mates: the same vectors.
    alone = model.encode([texts[3]])
    np.testing.assert_allclose(alone[0], model.encode(list(texts))[3], atol=1e-5)


@pytest.mark.parametrize("name", ["best layer, centred", "latent attention, bidirectional"])
def test_a_new_process_loads_the_folder(made, name, tmp_path):
    texts, scored, stock = trained(made, name, tmp_path)
    vectors, knows_bakeoff = in_new_process(tmp_path / "winner", texts, trust=not stock)
    np.testing.assert_allclose(vectors, scored["text"], atol=4e-3)
    assert knows_bakeoff != stock
    readme = (tmp_path / "winner" / "README.md").read_text()
    assert ("trust_remote_code=True" in readme) != stock
    assert "a test" in readme


def test_a_folder_with_our_head_asks_for_trust(made, tmp_path):
    from sentence_transformers import SentenceTransformer

    trained(made, "latent attention, causal", tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "winner"))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_trained_base_leaves_with_its_head(tmp_path, train):
    from sentence_transformers import SentenceTransformer

    made = problem(tmp_path, train=train, steps=4, base_learning_rate=1e-2)
    texts, scored, _ = trained(made, "multi-layer pooling, bidirectional", tmp_path)
    model = SentenceTransformer(str(tmp_path / "winner"), trust_remote_code=True)
    np.testing.assert_allclose(model.encode(list(texts)), scored["text"], atol=1e-4)
    frozen = problem(tmp_path, train=train, steps=4, base_learning_rate=1e-12)
    (tmp_path / "frozen").mkdir()
    _, unmoved, _ = trained(frozen, "multi-layer pooling, bidirectional", tmp_path / "frozen")
    assert (
        np.abs(scored["text"] - unmoved["text"]).max() > 1e-3
    )  # the base did learn, and that was saved


def test_saving_again_replaces_the_folder(made, tmp_path):
    trained(made, "mean, causal", tmp_path)
    (tmp_path / "winner" / "rubbish").write_text("old")
    design = DESIGNS["mean, causal"]
    made.export(design, tmp_path / "artifact", tmp_path / "winner")
    assert not (tmp_path / "winner" / "rubbish").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "winner"]


@pytest.mark.parametrize("name", ["latent attention, bidirectional", "best layer, centred"])
def test_onnx_gives_the_same_vectors_without_torch(made, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    import tokenizers
    from sentence_transformers import SentenceTransformer

    trained(made, name, tmp_path)
    difference = export_onnx(tmp_path / "winner", tmp_path / "onnx")
    assert difference < 1e-5
    facts = json.loads((tmp_path / "onnx" / "bakeoff.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
    tokenizer.enable_truncation(facts["max_length"])
    tokenizer.enable_padding(pad_id=facts["pad_token_id"], pad_token=facts["pad_token"])
    texts = ["the cat sat on the mat and the dog ran under the red tree", "dog", "a red mat"]
    encoded = tokenizer.encode_batch(texts)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (vectors,) = session.run(
        None,
        {
            "input_ids": np.array([item.ids for item in encoded]),
            "attention_mask": np.array([item.attention_mask for item in encoded]),
        },
    )
    model = SentenceTransformer(str(tmp_path / "winner"), trust_remote_code=True)
    np.testing.assert_allclose(vectors, model.encode(texts), atol=1e-5)


def test_export_refuses_what_is_no_winner(tmp_path):
    with pytest.raises(ModelError, match=r"no modules\.json"):
        export_onnx(tmp_path, tmp_path / "onnx")
    (tmp_path / "modules.json").write_text('[{"type": "evil.Module", "path": ""}]')
    with pytest.raises(ModelError, match=r"other packages, which is not run: \['evil.Module'\]"):
        export_onnx(tmp_path, tmp_path / "onnx")


def test_mteb_runs_the_winner(made, tmp_path):
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    trained(made, "latent attention, bidirectional", tmp_path)
    model = SentenceTransformer(str(tmp_path / "winner"), trust_remote_code=True)
    texts = sentences(40, 7)
    columns = {"sentence1": texts[:20], "sentence2": texts[20:], "score": np.linspace(0, 5, 20)}

    class LocalSimilarity(AbsTaskSTS):
        metadata = TaskMetadata(
            name="LocalSimilarity",
            description="Random sentences with random scores.",
            dataset={"path": "local/none", "revision": "1"},
            type="STS",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )
        min_score, max_score = 0, 5

        def load_data(self, **kwargs):
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    found = mteb.evaluate(model, LocalSimilarity(), cache=None)
    score = found.task_results[0].scores["test"][0]["cosine_spearman"]
    from scipy.stats import spearmanr

    left, right = model.encode(list(texts[:20])), model.encode(list(texts[20:]))
    expected = spearmanr((left * right).sum(axis=1), columns["score"]).statistic
    assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("train", ["head", "lora"])
def test_a_chat_template_of_the_base_is_not_put_around_texts(tmp_path, train):
    """A frozen base and one that hardly moves must score alike, and so must the saved winner."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    save_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = (
        "the cat saw a dog {% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    frozen = problem(tmp_path)
    (tmp_path / "frozen").mkdir()
    _, expected, _ = trained(frozen, "mean, causal", tmp_path / "frozen")
    made = problem(tmp_path, train=train, steps=1, base_learning_rate=1e-12)
    texts, scored, _ = trained(made, "mean, causal", tmp_path)
    np.testing.assert_allclose(scored["text"], expected["text"], atol=4e-3)
    model = SentenceTransformer(str(tmp_path / "winner"))
    np.testing.assert_allclose(model.encode(list(texts)), expected["text"], atol=4e-3)


@pytest.mark.model
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_embedded_base_gives_the_vectors_that_were_scored(tmp_path, attention):
    from sentence_transformers import SentenceTransformer

    from bakeoff.data.tasks import EmbeddingData, SimilarityTask
    from bakeoff.embedding import EmbeddingProblem
    from bakeoff.models import FeatureCache
    from bakeoff.study import Design

    texts = ("Return the number of lines.", "A flood hit the town.", "open a file", "x = 1", "cat")
    task = SimilarityTask("pairs", texts, texts[1:] + texts[:1], np.arange(5.0))
    made = EmbeddingProblem(
        EmbeddingData("five", (), (task,)), max_length=16, cache=FeatureCache(tmp_path / "cache")
    )
    design = Design("mean", "mean", {"attention": attention})
    (tmp_path / "trial").mkdir()
    made.run(design, 0, Work(tmp_path / "trial"))
    cached = made._cached(attention)
    states = cached.features.layer_means(cached.positions(texts))[:, -1].numpy()
    expected = states / np.linalg.norm(states, axis=1, keepdims=True)
    made.export(design, tmp_path / "trial", tmp_path / "winner")
    vectors = SentenceTransformer(str(tmp_path / "winner")).encode(list(texts))
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
