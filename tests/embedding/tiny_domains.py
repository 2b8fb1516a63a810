"""A citation graph of two domains and an encoder of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.embedding.small_models import WORDS, backbone_folder, tokenizer

from bakeoff.data.citations import CitationGraph
from bakeoff.embedding.problem.domain_pairs import DomainPairs
from bakeoff.embedding.problem.domains import DomainEncoderProblem

DOMAINS = ("cats", "dogs")


def graph(n: int = 60, seed: int = 0) -> CitationGraph:
    """Return documents of random words; survey i cites four of one domain."""
    rng = np.random.default_rng(seed)
    texts: dict[str, str] = {}
    while len(texts) < 2 * n:
        text = " ".join(rng.choice(WORDS, rng.integers(3, 8)))
        if text not in texts.values():
            texts[f"{DOMAINS[len(texts) // n]}{len(texts)}"] = text
    ids = list(texts)
    references = {
        f"survey {start} {step}": [ids[start + (step * k) % n] for k in range(4)]
        for start in (0, n)
        for step in (1, 5, 7, 11)
    }
    for start in (0, n):
        for first in range(0, n, 6):
            references[f"block {start} {first}"] = ids[start + first : start + first + 6]
    domains = {key: key.rstrip("0123456789") for key in ids}
    return CitationGraph("tiny", references, texts, domains)


def write_graph(path: Path) -> Path:
    """Write the graph as a file that a user could have."""
    made = graph()
    rows = [
        {"id": key, "text": text, "references": [], "domain": made.domains[key]}
        for key, text in made.texts.items()
    ]
    rows += [
        {"id": key, "text": "", "references": list(cited)} for key, cited in made.references.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(**options: Any) -> DomainPairs:
    """Return the graph's pairs."""
    return DomainPairs.from_graph(graph(), **{"test": 0.4, "validation": 0.2, **options})


def save_encoder(folder: Path) -> Path:
    """Write a random BERT with mean pooling and unit vectors, as sentence-transformers does."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {
        "vocab_size": len(WORDS) + 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        # At this width dropout leaves nothing to learn from.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    parts = folder / "parts"
    BertModel(BertConfig(**shape)).save_pretrained(parts)
    tokenizer().save_pretrained(parts)
    modules = [Transformer(str(parts)), Pooling(16, "mean"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save_pretrained(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def save_decoder(folder: Path) -> str:
    """Write a random decoder as transformers does."""
    return backbone_folder(folder)


def problem(base: Path | str, **changes: Any) -> DomainEncoderProblem:
    """Return a problem of seconds."""
    settings: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "max_length": 12,
        "learning_rates": (1e-2,),
        **changes,
    }
    data = settings.pop("data", None)
    return DomainEncoderProblem(pairs() if data is None else data, base=base, **settings)
