"""Base models: load, hidden states, feature cache, fast encoding."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bakeoff.models.bidirectional import bidirectional, make_bidirectional
    from bakeoff.models.encode import encode
    from bakeoff.models.feature_cache import FeatureCache, Features
    from bakeoff.models.gguf import quiet_transformers
    from bakeoff.models.hidden_states import hidden_states
    from bakeoff.models.load import BaseModel, load
    from bakeoff.models.packaged import ModelInfo, available, pull

__all__ = [
    "BaseModel",
    "FeatureCache",
    "Features",
    "ModelInfo",
    "available",
    "bidirectional",
    "encode",
    "hidden_states",
    "load",
    "make_bidirectional",
    "pull",
    "quiet_transformers",
]

# Imported when first asked for, so that `bakeoff --help` does not wait for torch.
_HOME = {
    "BaseModel": "load",
    "FeatureCache": "feature_cache",
    "Features": "feature_cache",
    "ModelInfo": "packaged",
    "available": "packaged",
    "bidirectional": "bidirectional",
    "encode": "encode",
    "hidden_states": "hidden_states",
    "load": "load",
    "make_bidirectional": "bidirectional",
    "pull": "packaged",
    "quiet_transformers": "gguf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps `bakeoff.models.load` the function although a file of that name holds it.

    Importing a submodule binds it in its package under its own name, which would hide the function
    from everyone who asks later.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
