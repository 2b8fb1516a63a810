"""How tokens come out: constrained, order-free, cascaded, remembering, infilling."""

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
    "CascadeProblem": "bakeoff.decoding.problem.cascading",
    "ChowAverage": "bakeoff.decoding.deferral_rules",
    "ChowSum": "bakeoff.decoding.deferral_rules",
    "ConstrainedProblem": "bakeoff.decoding.problem.constrained",
    "DataMixture": "bakeoff.decoding.codegen2",
    "DeferralMLP": "bakeoff.decoding.deferral_mlp",
    "DeferralRule": "bakeoff.decoding.deferral_rules",
    "Fill": "bakeoff.decoding.infilling",
    "FillInTheMiddle": "bakeoff.decoding.codegen2",
    "Grammar": "bakeoff.decoding.grammar",
    "GrammarAlignedLogitsProcessor": "bakeoff.decoding.grammar_aligned",
    "GrammarConstraint": "bakeoff.decoding.grammar",
    "InfLLM": "bakeoff.decoding.infllm",
    "InfLLMCache": "bakeoff.decoding.infllm",
    "InfillProblem": "bakeoff.decoding.code_evaluation",
    "InfillReport": "bakeoff.decoding.code_evaluation",
    "InfillTokens": "bakeoff.decoding.codegen2",
    "InfillingProblem": "bakeoff.decoding.problem.infilling",
    "LengthScore": "bakeoff.decoding.deferral_rules",
    "MemoryProblem": "bakeoff.decoding.problem.memory",
    "OrderEnsembleModel": "bakeoff.decoding.set_based_prompting",
    "OrderProblem": "bakeoff.decoding.problem.ordering",
    "PlainOrderModel": "bakeoff.decoding.set_based_prompting",
    "PostHocDeferral": "bakeoff.decoding.deferral_rules",
    "PrefixLM": "bakeoff.decoding.codegen2",
    "QuantileScore": "bakeoff.decoding.deferral_rules",
    "RandomDeferral": "bakeoff.decoding.deferral_rules",
    "Sandbox": "bakeoff.decoding.code_evaluation",
    "SetBatch": "bakeoff.decoding.set_based_prompting",
    "SetPrompt": "bakeoff.decoding.set_based_prompting",
    "SetPromptingModel": "bakeoff.decoding.set_based_prompting",
    "SeveralHoles": "bakeoff.decoding.code_evaluation",
    "SpanCorruption": "bakeoff.decoding.codegen2",
    "TextGenerator": "bakeoff.decoding.token_records",
    "TokenRecord": "bakeoff.decoding.token_records",
    "add_infill_tokens": "bakeoff.decoding.codegen2",
    "cascade_designs": "bakeoff.decoding.problem.cascading",
    "choose_threshold": "bakeoff.decoding.deferral_curves",
    "constrained_designs": "bakeoff.decoding.problem.constrained",
    "corrupt_spans": "bakeoff.decoding.codegen2",
    "cost_saved": "bakeoff.decoding.deferral_curves",
    "default_cascade_problem": "bakeoff.decoding.problem.cascading",
    "deferral_auc": "bakeoff.decoding.deferral_curves",
    "deferral_curve": "bakeoff.decoding.deferral_curves",
    "document_reader": "bakeoff.decoding.document_baselines",
    "encode_prompts": "bakeoff.decoding.set_based_prompting",
    "evaluate_infilling": "bakeoff.decoding.code_evaluation",
    "exact_match": "bakeoff.decoding.cascades",
    "format_infill": "bakeoff.decoding.infilling",
    "from_generate": "bakeoff.decoding.token_records",
    "infill": "bakeoff.decoding.infilling",
    "infill_batch": "bakeoff.decoding.infilling",
    "infill_holes": "bakeoff.decoding.infilling",
    "infill_holes_losses": "bakeoff.decoding.infilling",
    "infill_losses": "bakeoff.decoding.infilling",
    "infill_problems": "bakeoff.decoding.code_evaluation",
    "infilling_designs": "bakeoff.decoding.problem.infilling",
    "load_reader": "bakeoff.decoding.document_baselines",
    "load_rule": "bakeoff.decoding.deferral_rules",
    "memory_designs": "bakeoff.decoding.problem.memory",
    "order_designs": "bakeoff.decoding.problem.ordering",
    "order_free": "bakeoff.decoding.set_based_prompting",
    "order_model": "bakeoff.decoding.baselines",
    "pack": "bakeoff.decoding.codegen2",
    "prefix_lm": "bakeoff.decoding.codegen2",
    "psm": "bakeoff.decoding.codegen2",
    "python_functions": "bakeoff.decoding.code_evaluation",
    "sample_aligned": "bakeoff.decoding.grammar_aligned",
    "several_holes": "bakeoff.decoding.code_evaluation",
    "spm": "bakeoff.decoding.codegen2",
    "standard_library_functions": "bakeoff.decoding.code_evaluation",
    "train_decoder": "bakeoff.decoding.codegen2",
    "training_texts": "bakeoff.decoding.code_evaluation",
    "uncorrupt": "bakeoff.decoding.codegen2",
    "verified_problems": "bakeoff.decoding.code_evaluation",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
