"""How experts' designs are tried out: the family's side of a study, one module per question."""

from importlib import import_module
from typing import Any

# Loaded on first use: each question brings its own heavy imports.
_HOMES = {
    "ADAPTER_METRICS": "adapters",
    "AdapterProblem": "adapters",
    "LAYER_METRICS": "layers",
    "LayerProblem": "layers",
    "REFACTORING_METRICS": "refactoring",
    "RefactoringProblem": "refactoring",
    "UPCYCLING_METRICS": "upcycling",
    "UpcyclingProblem": "upcycling",
    "adapter_designs": "adapters",
    "layer_designs": "layers",
    "refactoring_designs": "refactoring",
    "upcycling_designs": "upcycling",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
