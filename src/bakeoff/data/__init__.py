"""Data sets: the user's files and real ones that packages carry."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bakeoff.data.embedded import embedded_default
    from bakeoff.data.files import embedding_data
    from bakeoff.data.formats import Table, read_table
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

_MODULE_OF = {
    "ClassificationTask": "tasks",
    "ClusteringTask": "tasks",
    "EmbeddingData": "tasks",
    "RetrievalTask": "tasks",
    "SimilarityTask": "tasks",
    "Table": "formats",
    "Task": "tasks",
    "TextPairs": "tasks",
    "embedded_default": "embedded",
    "embedding_data": "files",
    "read_table": "formats",
    "task_texts": "tasks",
}

__all__ = [
    "ClassificationTask",
    "ClusteringTask",
    "EmbeddingData",
    "RetrievalTask",
    "SimilarityTask",
    "Table",
    "Task",
    "TextPairs",
    "embedded_default",
    "embedding_data",
    "read_table",
    "task_texts",
]


def __getattr__(name: str) -> object:
    # Imported on first use, so that `import bakeoff.data` costs nothing.
    if name in _MODULE_OF:
        return getattr(import_module(f"bakeoff.data.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
