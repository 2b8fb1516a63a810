"""How tokens come out: constrained without distortion, order-free, cascaded.

The methods here are tested components; they join the shelf (`bakeoff methods`) when their claims
are recorded and a study can compare them.
"""

from importlib import import_module
from typing import Any

# Where each public name lives. Loaded on first use, so that importing this package costs nothing.
_HOMES = {
    "AlignedSamples": "bakeoff.decoding.grammar_aligned",
    "AlignmentTrie": "bakeoff.decoding.alignment_trie",
    "Cascade": "bakeoff.decoding.cascades",
    "CascadeExamples": "bakeoff.decoding.cascades",
    "ChowAverage": "bakeoff.decoding.deferral_rules",
    "ChowSum": "bakeoff.decoding.deferral_rules",
    "Grammar": "bakeoff.decoding.grammar",
    "GrammarAlignedLogitsProcessor": "bakeoff.decoding.grammar_aligned",
    "GrammarConstraint": "bakeoff.decoding.grammar",
    "OrderEnsembleModel": "bakeoff.decoding.set_based_prompting",
    "PlainOrderModel": "bakeoff.decoding.set_based_prompting",
    "PostHocDeferral": "bakeoff.decoding.deferral_rules",
    "QuantileScore": "bakeoff.decoding.deferral_rules",
    "SetBatch": "bakeoff.decoding.set_based_prompting",
    "SetPrompt": "bakeoff.decoding.set_based_prompting",
    "SetPromptingModel": "bakeoff.decoding.set_based_prompting",
    "cost_saved": "bakeoff.decoding.deferral_curve",
    "deferral_auc": "bakeoff.decoding.deferral_curve",
    "deferral_curve": "bakeoff.decoding.deferral_curve",
    "encode_prompts": "bakeoff.decoding.set_based_prompting",
    "order_free": "bakeoff.decoding.set_based_prompting",
    "sample_aligned": "bakeoff.decoding.grammar_aligned",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
