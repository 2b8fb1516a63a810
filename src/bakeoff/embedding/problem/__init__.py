"""How embedding designs are tried out: the family's side of a study, one module per question."""

from importlib import import_module
from typing import Any

# Loaded on first use: each question brings its own heavy imports.
_HOMES = {
    "DOMAIN_ENCODER_METRICS": "domains",
    "DomainEncoderProblem": "domains",
    "DomainPairs": "domain_pairs",
    "EmbeddingProblem": "pooling",
    "UPGRADE_METRICS": "upgrades",
    "UpgradeProblem": "upgrades",
    "WORD_METRICS": "words",
    "WordProblem": "words",
    "compare_designs": "pooling",
    "default_designs": "pooling",
    "default_words": "words",
    "domain_encoder_designs": "domains",
    "domain_pairs_default": "domain_pairs",
    "upgrade_designs": "upgrades",
    "word_designs": "words",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
