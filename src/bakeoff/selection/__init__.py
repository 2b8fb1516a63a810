"""Choosing data: what to label, what to train on."""

from importlib import import_module
from typing import Any

# Where each public name lives. Loaded on first use, so that importing this package costs nothing.
_HOMES = {
    "AnnotationProblem": "bakeoff.selection.problem",
    "BM25Selector": "bakeoff.selection.text_baselines",
    "BalancedRandomSelector": "bakeoff.selection.baselines",
    "DataSelector": "bakeoff.selection.protocol",
    "FacilityLocationSelector": "bakeoff.selection.baselines",
    "FarthestFirstSelector": "bakeoff.selection.baselines",
    "FineTuningBudget": "bakeoff.selection.fine_tuning",
    "GateauSelector": "bakeoff.selection.gateau",
    "GumbelTopK": "bakeoff.selection.mates",
    "IFDSelector": "bakeoff.selection.text_baselines",
    "ImportanceResampler": "bakeoff.selection.importance_resampling",
    "InContextClassifier": "bakeoff.selection.in_context",
    "InfluenceRegressor": "bakeoff.selection.influence_regressor",
    "InfluenceSelector": "bakeoff.selection.ideal",
    "KMeansSelector": "bakeoff.selection.baselines",
    "LeastConfidenceSelector": "bakeoff.selection.baselines",
    "LongestSelector": "bakeoff.selection.text_baselines",
    "MATESCallback": "bakeoff.selection.mates_callback",
    "MATESSelector": "bakeoff.selection.mates",
    "NearestToQueries": "bakeoff.selection.query_selection",
    "PerplexitySelector": "bakeoff.selection.text_baselines",
    "RandomSelector": "bakeoff.selection.baselines",
    "RepresentationSelector": "bakeoff.selection.rds_plus",
    "Selector": "bakeoff.selection.selector",
    "SimilarityPromptRetriever": "bakeoff.selection.prompt_retrieval",
    "TfidfSelector": "bakeoff.selection.text_baselines",
    "TrainingProblem": "bakeoff.selection.problem",
    "TransformerInfluenceModel": "bakeoff.selection.influence_regressor",
    "TypicalClusterSelector": "bakeoff.selection.baselines",
    "VoteK": "bakeoff.selection.vote_k",
    "annotation_designs": "bakeoff.selection.problem",
    "cam_scores": "bakeoff.selection.gateau",
    "diffusion_layers": "bakeoff.selection.ideal",
    "hmg_scores": "bakeoff.selection.gateau",
    "influence": "bakeoff.selection.ideal",
    "probe_influence": "bakeoff.selection.mates",
    "round_robin": "bakeoff.selection.query_selection",
    "similarity_graph": "bakeoff.selection.ideal",
    "training_designs": "bakeoff.selection.problem",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
