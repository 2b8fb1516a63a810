"""An embedding problem that fits in seconds: a tiny random decoder on disk, words as texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.models import tiny

from bakeoff.data.tasks import (
    ClassificationTask,
    ClusteringTask,
    EmbeddingData,
    RetrievalTask,
    SimilarityTask,
    TextPairs,
)
from bakeoff.embedding.problem import EmbeddingProblem
from bakeoff.models import FeatureCache


def save_base(folder: Path) -> Path:
    """Write a tiny Llama and its tokenizer as a transformers folder."""
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM(tiny.config("llama", initializer_range=0.2))
    whole.model.load_state_dict(tiny.model("llama").state_dict())
    whole.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def sentences(n: int, seed: int, least: int = 3) -> tuple[str, ...]:
    """Return n distinct sentences of 3 to 9 known words."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found[" ".join(rng.choice(tiny.WORDS, rng.integers(least, 10)))] = None
    return tuple(found)


def data(seed: int = 0) -> EmbeddingData:
    """Return pairs whose positive is the query with its words reversed, and four tasks."""
    texts = sentences(160, seed)
    reverse = [" ".join(reversed(text.split())) for text in texts]
    labels = tuple("cat" if "cat" in text.split() else "none" for text in texts)
    return EmbeddingData(
        "words",
        train=(TextPairs(texts[:60], tuple(reverse[:60]), group="reversed"),),
        tasks=(
            RetrievalTask("find reversed", texts[60:90], tuple(reverse[60:90]), np.arange(30)),
            SimilarityTask(
                "overlap",
                texts[90:110],
                texts[110:130],
                np.array(
                    [
                        float(len(set(a.split()) & set(b.split())))
                        for a, b in zip(texts[90:110], texts[110:130], strict=True)
                    ]
                ),
            ),
            ClusteringTask("by cat", texts[100:140], labels[100:140]),
            ClassificationTask(
                "has cat", texts[60:110], labels[60:110], texts[110:160], labels[110:160]
            ),
        ),
    )


def problem(folder: Path, **changes: Any) -> EmbeddingProblem:
    """Return a problem on the tiny base, saved under `folder`, with a cache of its own."""
    base = folder / "base"
    if not base.exists():
        save_base(base)
    settings: dict[str, Any] = {"steps": 3, "batch_size": 8, "max_length": 12, **changes}
    cache = FeatureCache(folder / "cache")
    return EmbeddingProblem(settings.pop("data", data()), str(base), cache=cache, **settings)
