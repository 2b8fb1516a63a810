"""The heads as saved sentence-transformers modules; lazy names; export. About 20 seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.embedding.small_models import TEXTS, backbone_folder, embedder, llama, tokenizer

import bakeoff.embedding
from bakeoff.embedding import (
    ConcatLinearPooling,
    LastLayerPooling,
    LastTokenPooling,
    LatentAttentionPooling,
    MeanPooling,
    MultiLayerPooling,
    PositionWeightedMeanPooling,
    ResidualMLPPooling,
    ScalarMixPooling,
    SingleLayerMeanPooling,
)

WIDTH, LAYERS = 16, 3
HEADS = {
    "last token": lambda: LastTokenPooling(WIDTH),
    "mean": lambda: MeanPooling(WIDTH, normalize=False),
    "weighted mean": lambda: PositionWeightedMeanPooling(WIDTH, include_prompt=False),
    "single layer": lambda: SingleLayerMeanPooling(WIDTH, 1),
    "scalar mix": lambda: ScalarMixPooling(WIDTH, LAYERS, layer_norm=False),
    "concat": lambda: ConcatLinearPooling(WIDTH, LAYERS, output_size=5, token_reduce="last"),
    "mlp": lambda: ResidualMLPPooling(WIDTH, 4, 2, 6),
    "multi mean": lambda: MultiLayerPooling(WIDTH, LAYERS, 4, 2),
    "multi last": lambda: MultiLayerPooling(WIDTH, LAYERS, 4, 2, 5, token_reduce="last"),
    "last layer, last": lambda: LastLayerPooling(WIDTH, 4, 2),
    "last layer, all": lambda: LastLayerPooling(WIDTH, 4, 2, token_reduce="none"),
    "latent attention": lambda: LatentAttentionPooling(WIDTH, 4, 2),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@every_head
def test_saved_head_loads_the_same(make, tmp_path):
    head = make()
    head.save(str(tmp_path))
    loaded = type(head).load(str(tmp_path))
    assert loaded.get_config_dict() == head.get_config_dict()
    assert json.loads((tmp_path / "config.json").read_text()) == head.get_config_dict()
    assert {p.name for p in tmp_path.iterdir()} <= {"config.json", "model.safetensors"}
    states = [torch.randn(2, 5, WIDTH) for _ in range(LAYERS + 1)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(loaded(states, mask), head(states, mask))
    assert head(states, mask).shape == (2, head.get_embedding_dimension())
    assert repr(loaded) == repr(head)


def test_missing_weights_are_an_error(tmp_path):
    head = LatentAttentionPooling(WIDTH, 4, 2)
    head.save(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(head.state_dict(), tmp_path / "pytorch_model.bin")  # pickles are not read
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        LatentAttentionPooling.load(str(tmp_path))


@every_head
def test_pipeline_equals_calling_backbone_and_head(make, tmp_path):
    head = make()
    model = embedder(tmp_path, head)
    encoded = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = llama(LAYERS)(**encoded, output_hidden_states=True).hidden_states
        expected = head(states, encoded["attention_mask"])
    assert np.abs(model.encode(TEXTS) - expected.numpy()).max() < 1e-5
    assert model.get_embedding_dimension() == expected.shape[1]


@every_head
def test_batch_size_batch_mates_and_padding_side_do_not_matter(make, tmp_path):
    head = make()
    model = embedder(tmp_path / "right", head)
    together = model.encode(TEXTS)
    alone = np.stack([model.encode(text) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    left = embedder(tmp_path / "left", head, padding_side="left")
    assert left.tokenizer.padding_side == "left"
    assert np.abs(left.encode(TEXTS) - together).max() < 1e-5


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_prompt_is_seen_but_not_pooled(tmp_path, padding_side):
    head = LatentAttentionPooling(WIDTH, 4, 2, include_prompt=False)
    model = embedder(tmp_path, head, padding_side=padding_side)
    vectors = model.encode(TEXTS, prompt="find : ")
    for text, vector in zip(TEXTS, vectors, strict=True):
        encoded = tokenizer()(["find : " + text], return_tensors="pt")
        with torch.inference_mode():
            hidden = llama(LAYERS)(**encoded).last_hidden_state
            expected = head(hidden[:, 3:])[0]  # after <s> find :
        assert np.abs(vector - expected.numpy()).max() < 1e-5
    assert np.abs(model.encode(TEXTS) - vectors).max() > 1e-2
    head.include_prompt = True
    assert np.abs(model.encode(TEXTS, prompt="find : ") - vectors).max() > 1e-2


def test_explicit_pool_mask_in_the_features():
    tokens, pool = torch.randn(1, 4, WIDTH), torch.tensor([[0, 1, 1, 0]])
    head = MeanPooling(WIDTH)
    features = {"token_embeddings": tokens, "attention_mask": torch.ones(1, 4), "pool_mask": pool}
    assert torch.equal(head(features)["sentence_embedding"], head(tokens, pool))


def test_flattened_batches_are_refused():
    features = {"token_embeddings": torch.zeros(1, 9, WIDTH), "cu_seq_lens_q": torch.tensor([0, 9])}
    with pytest.raises(ValueError, match="instead of flash attention"):
        MeanPooling(WIDTH)(features)


FRESH = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
for folder, texts, expected in json.load(sys.stdin):
    try:
        SentenceTransformer(folder, device="cpu")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without trust_remote_code")
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
    assert type(model[1]).__module__.startswith("bakeoff.embedding."), type(model[1])
    assert np.abs(model.encode(texts) - np.array(expected)).max() < 1e-6
print("loaded")
"""


def test_saved_folders_load_in_a_fresh_process(tmp_path):
    cases = []
    for name in ("multi mean", "latent attention", "concat"):
        model = embedder(tmp_path / "base", HEADS[name]())
        folder = tmp_path / name.replace(" ", "-")
        model.save_pretrained(str(folder), create_model_card=False)
        kinds = [entry["type"] for entry in json.loads((folder / "modules.json").read_text())]
        assert kinds[1].startswith("bakeoff.embedding.")
        cases.append((str(folder), TEXTS, model.encode(TEXTS).tolist()))
    finished = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.stdout.strip().endswith("loaded"), finished.stderr[-2000:]


@every_head
def test_heads_can_be_exported_as_graphs(make):
    head = make().eval()
    states = torch.randn(2, LAYERS + 1, 5, WIDTH)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    program = torch.export.export(
        head, (states, mask), dynamic_shapes=({0: batch, 2: length}, {0: batch, 1: length})
    )
    other = torch.randn(3, LAYERS + 1, 7, WIDTH)
    ones = torch.ones(3, 7, dtype=torch.int64)
    assert torch.allclose(program.module()(other, ones), head(other, ones), atol=1e-6)


def test_package_imports_nothing_heavy_and_knows_its_names():
    code = (
        "import sys, bakeoff.embedding as e\n"
        "assert not {'torch', 'sentence_transformers', 'transformers'} & set(sys.modules)\n"
        "assert 'MultiLayerPooling' in dir(e)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    own = [n for n, home in bakeoff.embedding._HOMES.items() if not home.endswith("problem")]
    for name in own:
        if bakeoff.embedding._HOMES[name] != "bakeoff.models":
            assert getattr(bakeoff.embedding, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'NoSuchPooling'"):
        bakeoff.embedding.NoSuchPooling  # noqa: B018


@pytest.mark.parametrize("page", ["pooling-and-attention", "nv-embed"])
def test_code_on_the_method_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / f"docs/methods/{page}.md").read_text(encoding="utf-8")
    base = backbone_folder(tmp_path / "base")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block.replace("PATH_OR_HUB_ID", base), names)
    if page == "pooling-and-attention":  # bidirectional attention is saved with the folder
        loaded = type(names["model"])("my-model", trust_remote_code=True, device="cpu")
        again = loaded.encode(["a text", "another one"])
        assert np.abs(again - names["vectors"]).max() < 1e-6
