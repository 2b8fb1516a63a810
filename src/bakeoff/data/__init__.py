"""Data sets: the user's files and real ones that packages carry."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bakeoff.data.embedded import embedded_default
    from bakeoff.data.embedded_pools import labelled_default, training_pools_default
    from bakeoff.data.files import embedding_data
    from bakeoff.data.formats import Table, read_table
    from bakeoff.data.neighbours import nearest_neighbours, unit_rows
    from bakeoff.data.samples import Sample, TrainingPool
    from bakeoff.data.tasks import (
        ClassificationTask,
        ClusteringTask,
        EmbeddingData,
        RetrievalTask,
        SimilarityTask,
        Task,
        TextPairs,
        task_texts,
    )
    from bakeoff.data.vector_store import VectorStore

_MODULE_OF = {
    "ClassificationTask": "tasks",
    "ClusteringTask": "tasks",
    "EmbeddingData": "tasks",
    "RetrievalTask": "tasks",
    "Sample": "samples",
    "SimilarityTask": "tasks",
    "Table": "formats",
    "Task": "tasks",
    "TextPairs": "tasks",
    "TrainingPool": "samples",
    "VectorStore": "vector_store",
    "embedded_default": "embedded",
    "embedding_data": "files",
    "labelled_default": "embedded_pools",
    "nearest_neighbours": "neighbours",
    "read_table": "formats",
    "task_texts": "tasks",
    "training_pools_default": "embedded_pools",
    "unit_rows": "neighbours",
}

__all__ = [
    "ClassificationTask",
    "ClusteringTask",
    "EmbeddingData",
    "RetrievalTask",
    "Sample",
    "SimilarityTask",
    "Table",
    "Task",
    "TextPairs",
    "TrainingPool",
    "VectorStore",
    "embedded_default",
    "embedding_data",
    "labelled_default",
    "nearest_neighbours",
    "read_table",
    "task_texts",
    "training_pools_default",
    "unit_rows",
]


def __getattr__(name: str) -> object:
    # Imported on first use, so that `import bakeoff.data` costs nothing.
    if name in _MODULE_OF:
        return getattr(import_module(f"bakeoff.data.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
