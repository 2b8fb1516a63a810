"""Mixture of experts: layers, routers, balance, upcycling, adapters from shared shards.

The methods here are tested components; they join the shelf (`bakeoff methods`) when their claims
are recorded and a study can compare them.
"""

from importlib import import_module
from typing import Any

# Where each public name lives. Loaded on first use, so that importing this package costs nothing.
_HOMES = {
    "AdaptiveCoefficient": "bakeoff.experts.balance_losses",
    "AttentionTopK": "bakeoff.experts.routers",
    "BalanceSyncError": "bakeoff.experts.global_balance",
    "BalancedAssignment": "bakeoff.experts.assignment_routers",
    "CosineTopK": "bakeoff.experts.routers",
    "DISPATCHERS": "bakeoff.experts.dispatch",
    "DSelectK": "bakeoff.experts.routers",
    "Dense": "bakeoff.experts.soft_routers",
    "DeviceBalance": "bakeoff.experts.balance_losses",
    "DiverseGate": "bakeoff.experts.balance_losses",
    "DomainRouter": "bakeoff.experts.fixed_routers",
    "ExpertBank": "bakeoff.experts.expert_bank",
    "ExpertChoice": "bakeoff.experts.assignment_routers",
    "ExpertReport": "bakeoff.experts.inspection",
    "FeedForwardExperts": "bakeoff.experts.feed_forward",
    "GShardTop2": "bakeoff.experts.routers",
    "HashRouter": "bakeoff.experts.fixed_routers",
    "Importance": "bakeoff.experts.balance_losses",
    "LOSSES": "bakeoff.experts.balance_losses",
    "LayerReport": "bakeoff.experts.inspection",
    "LoRAExperts": "bakeoff.experts.lora_experts",
    "Load": "bakeoff.experts.balance_losses",
    "LoadBalancingLoss": "bakeoff.experts.global_balance",
    "MergedExperts": "bakeoff.experts.soft_routers",
    "MixtureCost": "bakeoff.experts.bam",
    "MixtureOfAttentionHeads": "bakeoff.experts.attention_experts",
    "MoE": "bakeoff.experts.mixture_of_experts",
    "MoSConfig": "bakeoff.experts.mixture_of_shards",
    "MoSLinear": "bakeoff.experts.mixture_of_shards",
    "MoSModel": "bakeoff.experts.mixture_of_shards",
    "ModuleExperts": "bakeoff.experts.expert_bank",
    "MutualInformation": "bakeoff.experts.balance_losses",
    "NullExperts": "bakeoff.experts.routers",
    "PRESETS": "bakeoff.experts.routers",
    "ParameterCounts": "bakeoff.experts.conversion",
    "ROUTERS": "bakeoff.experts.routers",
    "RandomRouter": "bakeoff.experts.fixed_routers",
    "RecurrentRouter": "bakeoff.experts.recurrent_router",
    "Router": "bakeoff.experts.protocol",
    "RouterModule": "bakeoff.experts.routers",
    "Routing": "bakeoff.experts.protocol",
    "RoutingLoss": "bakeoff.experts.protocol",
    "RoutingStats": "bakeoff.experts.mixture_of_experts",
    "SelectorEntropy": "bakeoff.experts.balance_losses",
    "ShardLayout": "bakeoff.experts.shard_layout",
    "ShardPool": "bakeoff.experts.mixture_of_shards",
    "Sinkhorn": "bakeoff.experts.assignment_routers",
    "SoftMoE": "bakeoff.experts.soft_routers",
    "SwitchBalance": "bakeoff.experts.balance_losses",
    "Threshold": "bakeoff.experts.routers",
    "TopK": "bakeoff.experts.routers",
    "UpcycledConfig": "bakeoff.experts.upcycled_model",
    "UpcycledForCausalLM": "bakeoff.experts.upcycled_model",
    "ZLoss": "bakeoff.experts.balance_losses",
    "after_optimizer_step": "bakeoff.experts.mixture_of_experts",
    "aux_loss": "bakeoff.experts.mixture_of_experts",
    "average_models": "bakeoff.experts.bam",
    "convert_router": "bakeoff.experts.recurrent_router",
    "count_trained_parameters": "bakeoff.experts.shard_layout",
    "domain_batches": "bakeoff.experts.bam",
    "expert_capacity": "bakeoff.experts.capacity",
    "expert_similarity": "bakeoff.experts.inspection",
    "grouped_feed_forward": "bakeoff.experts.grouped",
    "grouped_linear": "bakeoff.experts.grouped",
    "inspect_experts": "bakeoff.experts.inspection",
    "layer_numbers": "bakeoff.experts.conversion",
    "load_moe": "bakeoff.experts.conversion",
    "load_recurrent": "bakeoff.experts.recurrent_router",
    "make_loss": "bakeoff.experts.balance_losses",
    "make_router": "bakeoff.experts.routers",
    "mixture_cost": "bakeoff.experts.bam",
    "moe_layers": "bakeoff.experts.mixture_of_experts",
    "parameter_counts": "bakeoff.experts.conversion",
    "prolora": "bakeoff.experts.mixture_of_shards",
    "pure_sharing": "bakeoff.experts.mixture_of_shards",
    "routing_mutual_information": "bakeoff.experts.recurrent_router",
    "routing_stats": "bakeoff.experts.mixture_of_experts",
    "save_moe": "bakeoff.experts.conversion",
    "seats": "bakeoff.experts.capacity",
    "shard_layouts": "bakeoff.experts.shard_layout",
    "tied_lora": "bakeoff.experts.mixture_of_shards",
    "to_moe": "bakeoff.experts.conversion",
    "train_causal": "bakeoff.experts.bam",
    "upcycle": "bakeoff.experts.bam",
    "within_capacity": "bakeoff.experts.capacity",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
