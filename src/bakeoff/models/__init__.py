"""Base models: load, hidden states, feature cache, fast encoding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bakeoff.models.attention import bidirectional, make_bidirectional
    from bakeoff.models.encoding import embed_batch, encode
    from bakeoff.models.feature_cache import FeatureCache, Features
    from bakeoff.models.gguf import quiet_transformers
    from bakeoff.models.likelihood import Losses, option_losses, response_losses
    from bakeoff.models.loading import BaseModel, LanguageModel, load, load_language_model
    from bakeoff.models.packaged import ModelInfo, available, pull
    from bakeoff.models.states import hidden_states
    from bakeoff.models.text_encoder import TextEncoder, load_encoder

__all__ = [
    "BaseModel",
    "FeatureCache",
    "Features",
    "LanguageModel",
    "Losses",
    "ModelInfo",
    "TextEncoder",
    "available",
    "bidirectional",
    "embed_batch",
    "encode",
    "hidden_states",
    "load",
    "load_encoder",
    "load_language_model",
    "make_bidirectional",
    "option_losses",
    "pull",
    "quiet_transformers",
    "response_losses",
]

# Imported when first asked for, so that `bakeoff --help` does not wait for torch.
_HOME = {
    "BaseModel": "loading",
    "FeatureCache": "feature_cache",
    "Features": "feature_cache",
    "LanguageModel": "loading",
    "Losses": "likelihood",
    "ModelInfo": "packaged",
    "TextEncoder": "text_encoder",
    "available": "packaged",
    "bidirectional": "attention",
    "embed_batch": "encoding",
    "encode": "encoding",
    "hidden_states": "states",
    "load": "loading",
    "load_encoder": "text_encoder",
    "load_language_model": "loading",
    "make_bidirectional": "attention",
    "option_losses": "likelihood",
    "pull": "packaged",
    "quiet_transformers": "gguf",
    "response_losses": "likelihood",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
