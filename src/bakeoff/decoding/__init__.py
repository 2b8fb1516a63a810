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
    "CascadeAnswers": "bakeoff.decoding.cascades",
    "CascadeEvaluation": "bakeoff.decoding.cascades",
    "CascadeExamples": "bakeoff.decoding.cascades",
    "ChowAverage": "bakeoff.decoding.deferral_rules",
    "ChowSum": "bakeoff.decoding.deferral_rules",
    "DeferralMLP": "bakeoff.decoding.deferral_mlp",
    "DeferralRule": "bakeoff.decoding.deferral_rules",
    "Grammar": "bakeoff.decoding.grammar",
    "GrammarAlignedLogitsProcessor": "bakeoff.decoding.grammar_aligned",
    "GrammarConstraint": "bakeoff.decoding.grammar",
    "LengthScore": "bakeoff.decoding.deferral_rules",
    "OrderEnsembleModel": "bakeoff.decoding.set_based_prompting",
    "PlainOrderModel": "bakeoff.decoding.set_based_prompting",
    "PostHocDeferral": "bakeoff.decoding.deferral_rules",
    "QuantileScore": "bakeoff.decoding.deferral_rules",
    "RandomDeferral": "bakeoff.decoding.deferral_rules",
    "SetBatch": "bakeoff.decoding.set_based_prompting",
    "SetPrompt": "bakeoff.decoding.set_based_prompting",
    "SetPromptingModel": "bakeoff.decoding.set_based_prompting",
    "TextGenerator": "bakeoff.decoding.token_records",
    "TokenRecord": "bakeoff.decoding.token_records",
    "choose_threshold": "bakeoff.decoding.deferral_curve",
    "cost_saved": "bakeoff.decoding.deferral_curve",
    "deferral_auc": "bakeoff.decoding.deferral_curve",
    "deferral_curve": "bakeoff.decoding.deferral_curve",
    "encode_prompts": "bakeoff.decoding.set_based_prompting",
    "exact_match": "bakeoff.decoding.cascades",
    "from_generate": "bakeoff.decoding.token_records",
    "load_rule": "bakeoff.decoding.deferral_rules",
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
