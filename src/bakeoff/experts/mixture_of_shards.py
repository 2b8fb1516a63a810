"""Mixture of shards (MoS): low-rank adapters of all layers cut from one trained pool of shards.

A PEFT tuner. Importing this module makes `MoSConfig` known to `peft`: `get_peft_model`,
`PeftModel.from_pretrained`, merging and switching of adapters work as with `LoraConfig`.
"""

from __future__ import annotations

import enum
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from bakeoff._files import atomic_path, write_text
from bakeoff.errors import DataError
from bakeoff.experts.shard_layout import (
    CONTAINER,
    ShardLayout,
    draw_shards,
    layer_features,
    seeded_generator,
    shard_layouts,
)

METHOD = {
    "slug": "mixture-of-shards",
    "title": "Low-rank adapters of all layers cut from one trained pool of shards",
    "paper": (
        'Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of '
        'Shards", ICLR 2025, arXiv 2410.00938'
    ),
    "designs": ["mos", "pure-sharing", "tied-lora", "prolora"],
    "names": [
        "MoSConfig",
        "pure_sharing",
        "tied_lora",
        "prolora",
        "shard_layouts",
        "count_trained_parameters",
    ],
}

if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(
        "mixture of shards needs peft >= 0.21: earlier versions save and load no methods but their "
        "own"
    )

Selection = Literal["subset", "all", "rotation"]
_SELECTIONS = ("subset", "all", "rotation")


class _PeftType(str, enum.Enum):  # noqa: UP042  PEFT's own PeftType is a (str, Enum) too
    """What `PeftType` would hold if PEFT allowed methods from outside to add themselves."""

    MIXTURE_OF_SHARDS = "MIXTURE_OF_SHARDS"


@dataclass
class MoSConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """Settings of a mixture-of-shards adapter.

    For each kind of linear layer (query, key, ..., down projection), with ``n_in`` inputs and
    ``n_out`` outputs, present in L blocks, two pools are trained and shared by all blocks:
    ``pool_A`` of shape ``(S, n_in / l)`` and ``pool_B`` of shape ``(S, n_out / l)`` with
    ``S = e * L * l`` shards. Every block joins shards from them, ``l`` to a vector, into its own
    ``A`` of shape ``(r, n_in)`` and ``B`` of shape ``(n_out, r)``. Which ones is drawn once, never
    learned, and independent of the input: the update ``(lora_alpha / r) * B @ A`` is that of a LoRA
    of rank r, at the trained parameters of a LoRA of rank e.

    Parameters
    ----------
    r
        Working rank: rows of every block's A. None for the largest that the pool allows.
    equivalent_rank
        The budget e: as many trained parameters as a LoRA of this rank. None (not with
        ``selection="subset"``) to derive it from `r`.
    private_rank
        How much of `equivalent_rank` belongs to one block alone (shard privatisation; 0 is off).
    shards_per_vector
        The number l of shards that make a vector (vector sharding; 1 is off). Must divide the
        inputs and outputs of every target.
    lora_alpha
        Scale: the update is multiplied by ``lora_alpha / r``.
    lora_dropout
        Dropout probability of the adapter's input during training.
    target_modules
        Names, a regular expression, or ``"all-linear"``: every linear layer but the output head.
    seed
        Of the drawing of shards and of the initial values. The same seed gives the same adapter on
        every device; targeting further kinds of layers does not change the others.
    selection
        ``"subset"``: a block draws its public shards at random without replacement (subset
        selection). ``"all"``: every block uses the whole public pool, so that
        ``r = (e - private_rank) * L + private_rank``. ``"rotation"``: nothing is shared between
        blocks; within a block, l copies of the same short vectors are joined, each rotated further
        along the rank (PRoLoRA), so that ``r = (e - private_rank) * l + private_rank``.
    pair_dissociation
        Whether B's shards are drawn independently of A's. False uses A's indices for both. Without
        effect for ``selection="rotation"``.
    trained_scaling
        Whether every block also trains a scale per rank and one per output (Tied-LoRA). They add
        ``L * (r + n_out)`` parameters per kind.
    exclude_modules
        Names, or a regular expression, of modules that must not be targets.
    layers_to_transform, layers_pattern
        Indices of the blocks to adapt, and the name of their list, as in `LoraConfig`.
    modules_to_save
        Further modules to train whole and to save, as in `LoraConfig`.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If a number is out of its range, or the ranks contradict each other. What
        depends on the model (number of blocks, divisibility, tied or quantised layers) is checked
        when the adapter is built.

    Notes
    -----
    The paper's variants, by what to change: subset selection alone is ``private_rank=0,
    shards_per_vector=1, pair_dissociation=False``; sharing without any differentiation is
    `pure_sharing`. With ``r == equivalent_rank == private_rank`` the adapter is a LoRA.

    Pools of layers of different kinds are separate. Two modules are of the same kind if their
    dotted names differ in numbers only.

    References
    ----------
    Sheng Wang, Liheng Chen, Pengan Chen, Jingwei Dong, Boyang Xue, Jiyue Jiang, Lingpeng Kong and
    Chuan Wu. "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards".
    ICLR 2025. arXiv:2410.00938.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...                     num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)
    >>> model = get_peft_model(LlamaForCausalLM(shape), MoSConfig(r=8, equivalent_rank=2))
    >>> model.get_nb_trainable_parameters()[0]  # a LoRA of rank 2 has as many
    8192
    """

    r: int | None = field(default=8, metadata={"help": "Working rank"})
    equivalent_rank: int | None = field(
        default=2, metadata={"help": "Budget: the rank of a LoRA with as many parameters"}
    )
    private_rank: int = field(default=1, metadata={"help": "Rank that a block has to itself"})
    shards_per_vector: int = field(default=4, metadata={"help": "Shards that make a vector"})
    lora_alpha: float = field(default=16, metadata={"help": "Scale; divided by r"})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout of the adapter's input"})
    target_modules: list[str] | set[str] | str | None = field(
        default="all-linear", metadata={"help": "Names or regular expression, or 'all-linear'"}
    )
    seed: int = field(default=0, metadata={"help": "Seed of indices and initial values"})
    selection: Selection = field(
        default="subset", metadata={"help": "'subset', 'all' or 'rotation'"}
    )
    pair_dissociation: bool = field(
        default=True, metadata={"help": "Draw B's shards independently of A's"}
    )
    trained_scaling: bool = field(
        default=False, metadata={"help": "Train scales per rank and per output"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules that must not be targets"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train whole"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PeftType.MIXTURE_OF_SHARDS
        if self.target_modules is None:
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        """Refuse what no model could make right."""
        smallest = {"r": 1, "equivalent_rank": 1, "private_rank": 0, "shards_per_vector": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is None and name in ("r", "equivalent_rank"):
                continue
            if not _is_int(value) or value < least:
                raise DataError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not _is_int(self.seed) or self.seed < 0:
            raise DataError(f"seed must be a non-negative integer, got {self.seed!r}")
        if self.selection not in _SELECTIONS:
            raise DataError(
                f"selection must be one of {', '.join(_SELECTIONS)}, got {self.selection!r}"
            )
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise DataError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if not isinstance(self.lora_alpha, int | float) or not 0 < self.lora_alpha < math.inf:
            raise DataError(f"lora_alpha must be a positive number, got {self.lora_alpha!r}")
        for name in ("pair_dissociation", "trained_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise DataError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise DataError("layers_pattern says where layers_to_transform applies: give both")
        self._check_ranks()

    def _check_ranks(self) -> None:
        r, equivalent, private = self.r, self.equivalent_rank, self.private_rank
        if equivalent is None and (r is None or self.selection == "subset"):
            raise DataError(
                "equivalent_rank=None is derived from r, which needs selection='all' or 'rotation' "
                f"and an r; got selection={self.selection!r}, r={r!r}"
            )
        if equivalent is not None and private > equivalent:
            raise DataError(
                f"private_rank={private} is more than the whole budget, "
                f"equivalent_rank={equivalent}: it must lie between 0 and {equivalent}"
            )
        if r is None:
            return
        if equivalent is not None and r < equivalent:
            raise DataError(
                f"r={r} is less than equivalent_rank={equivalent}: the pools would hold shards "
                "that no block can use. Raise r, or lower equivalent_rank"
            )
        if private > r:
            raise DataError(f"private_rank={private} is more than r={r}")
        if equivalent == private and r > private:
            raise DataError(
                f"private_rank={private} leaves no public shards (equivalent_rank={equivalent}), "
                f"but r={r} asks for {r - private} public vectors: use r={private}, which is LoRA, "
                "or a smaller private_rank"
            )


def pure_sharing(equivalent_rank: int = 2, **settings: Any) -> MoSConfig:
    """Return the settings of one LoRA shared by all blocks, with no differentiation at all.

    The rank is ``equivalent_rank`` times the number of blocks, so that the trained parameters are
    those of a LoRA of `equivalent_rank` in every block.

    Parameters
    ----------
    equivalent_rank
        The budget.
    **settings
        Further arguments of `MoSConfig`.

    Examples
    --------
    >>> pure_sharing(equivalent_rank=1).selection
    'all'
    """
    fixed: dict[str, Any] = {
        "r": None,
        "private_rank": 0,
        "shards_per_vector": 1,
        "selection": "all",
        "pair_dissociation": False,
    }
    return MoSConfig(equivalent_rank=equivalent_rank, **(fixed | settings))


def tied_lora(r: int = 8, **settings: Any) -> MoSConfig:
    """Return the settings of Tied-LoRA: one shared pair, scaled per block by trained vectors.

    Parameters
    ----------
    r
        Rank of the pair that all blocks share.
    **settings
        Further arguments of `MoSConfig`.

    Notes
    -----
    The update is ``(lora_alpha / r) * diag(v) @ B @ diag(u) @ A`` with A and B shared and u, v of
    the block's own. All four are trained. B starts at zero, u and v at one, so that training starts
    at the base model. The pair is tied per kind of layer; the paper ties query, key and value as
    one layer of three times the width.

    References
    ----------
    Adithya Renduchintala, Tugrul Konuk and Oleksii Kuchaiev. "Tied-LoRA: Enhancing parameter
    efficiency of LoRA with weight tying". NAACL 2024. arXiv:2311.09578.

    Examples
    --------
    >>> tied_lora(r=16).trained_scaling
    True
    """
    return pure_sharing(
        **({"equivalent_rank": None, "r": r, "trained_scaling": True} | settings),
    )


def prolora(
    equivalent_rank: int = 2, unshared_rank: int = 1, chunks: int = 4, **settings: Any
) -> MoSConfig:
    """Return the settings of PRoLoRA: short vectors, repeated and rotated within a block.

    Parameters
    ----------
    equivalent_rank
        The budget.
    unshared_rank
        Rank that is not shared between chunks.
    chunks
        How many rotated copies make a vector (the sharing rate of both matrices).
    **settings
        Further arguments of `MoSConfig`.

    Notes
    -----
    The working rank is ``(equivalent_rank - unshared_rank) * chunks + unshared_rank``. Copy i is
    rotated by ``i * max(shared rank // chunks, 1)`` along the rank, in A and in B.

    References
    ----------
    Sheng Wang, Boyang Xue, Jiacheng Ye, Jiyue Jiang, Liheng Chen, Lingpeng Kong and Chuan Wu.
    "PRoLoRA: Partial Rotation Empowers More Parameter-Efficient LoRA". ACL 2024. arXiv:2402.16902.

    Examples
    --------
    >>> prolora(equivalent_rank=2, unshared_rank=0).shards_per_vector
    4
    """
    fixed: dict[str, Any] = {"r": None, "selection": "rotation"}
    return MoSConfig(
        equivalent_rank=equivalent_rank,
        private_rank=unshared_rank,
        shards_per_vector=chunks,
        **(fixed | settings),
    )


class ShardPool(nn.Module):
    """The two pools of one kind of layer, and the table that says who uses which shards.

    Parameters
    ----------
    config
        The settings.
    layout
        The kind.

    Attributes
    ----------
    pool_A : Parameter
        ``(S, n_in / l)``, drawn from U(-1/sqrt(n_in), 1/sqrt(n_in)).
    pool_B : Parameter
        ``(S, n_out / l)``, zero at first.
    index_A, index_B : Tensor
        ``(L, r * l)`` int32 buffers: see `draw_shards`.
    """

    index_A: Tensor
    index_B: Tensor

    def __init__(self, config: MoSConfig, layout: ShardLayout) -> None:
        super().__init__()
        self.r = layout.r
        parts = layout.shards_per_vector
        # The bound follows the whole vector: with the length of a shard, A would start sqrt(l)
        # times too large.
        bound = 1 / math.sqrt(layout.in_features)
        values = torch.empty(layout.n_shards, layout.in_features // parts)
        values.uniform_(
            -bound, bound, generator=seeded_generator(config.seed, layout.pattern, "pool_A")
        )
        self.pool_A = nn.Parameter(values)
        self.pool_B = nn.Parameter(torch.zeros(layout.n_shards, layout.out_features // parts))
        index_a, index_b = draw_shards(config, layout)
        self.register_buffer("index_A", index_a.to(torch.int32))
        self.register_buffer("index_B", index_b.to(torch.int32))
        self.scale_rank: nn.Parameter | None = None
        self.scale_out: nn.Parameter | None = None
        if layout.trained_scaling:
            blocks = len(layout.modules)
            self.scale_rank = nn.Parameter(torch.ones(blocks, layout.r))
            self.scale_out = nn.Parameter(torch.ones(blocks, layout.out_features))

    def matrices(self, block: int) -> tuple[Tensor, Tensor]:
        """Return A ``(r, n_in)`` and B ``(n_out, r)`` of one layer; gradients flow to the pools."""
        lora_a = functional.embedding(self.index_A[block], self.pool_A).view(self.r, -1)
        lora_b = functional.embedding(self.index_B[block], self.pool_B).view(self.r, -1).t()
        if self.scale_rank is not None and self.scale_out is not None:
            lora_a = lora_a * self.scale_rank[block].unsqueeze(-1)
            lora_b = lora_b * self.scale_out[block].unsqueeze(-1)
        return lora_a, lora_b


class MoSLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A linear layer with mixture-of-shards adapters. Built by `peft.get_peft_model`.

    Parameters
    ----------
    base_layer
        The frozen layer: `torch.nn.Linear` or `transformers.pytorch_utils.Conv1D`.
    adapter_name
        Name of the first adapter.
    """

    adapter_layer_names = (CONTAINER,)
    other_param_names = ("mos_block", "mos_dropout", "r", "scaling")
    shard_pools: Any  # ModuleDict, adapter name -> ShardPool
    # What the untyped BaseTunerLayer brings.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], Any]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = layer_features(base_layer)
        # The pools belong to the tuner. Were they registered here too, a state dict would repeat
        # them for every layer.
        object.__setattr__(self, CONTAINER, nn.ModuleDict())
        self.mos_block: dict[str, int] = {}
        self.mos_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self._weight_before_merge: Tensor | None = None
        self.train(base_layer.training)

    def update_layer(
        self, adapter_name: str, pool: ShardPool, block: int, config: MoSConfig
    ) -> None:
        """Add an adapter that reads row `block` of `pool`."""
        self.shard_pools[adapter_name] = pool
        self.mos_block[adapter_name] = block
        self.r[adapter_name] = pool.r
        self.scaling[adapter_name] = config.lora_alpha / pool.r
        self.mos_dropout[adapter_name] = nn.Dropout(config.lora_dropout).train(self.training)

    def lora_matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the A ``(r, n_in)`` and the B ``(n_out, r)`` that this layer uses."""
        pool = self.shard_pools[adapter_name]
        lora_a, lora_b = pool.matrices(self.mos_block[adapter_name])
        device = self.get_base_layer().weight.device
        return lora_a.to(device), lora_b.to(device)  # blocks may be spread over several devices

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the update, shaped like the base weight, in float32 or wider."""
        lora_a, lora_b = self.lora_matrices(adapter_name)
        dtype = torch.promote_types(lora_a.dtype, torch.float32)
        delta = lora_b.to(dtype) @ lora_a.to(dtype) * self.scaling[adapter_name]
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of `adapter_names` (the active ones by default) to the base weight.

        The sum is made in float32 or wider and rounded once. The weight as it was is kept until
        `unmerge`, which restores it bit for bit.

        Parameters
        ----------
        safe_merge
            Whether to refuse updates that are not finite.
        adapter_names
            Which adapters.

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If `safe_merge` found an update that is not finite.
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.shard_pools
        ]
        if not names:
            return
        weight = self.get_base_layer().weight
        total = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            total = total + self.get_delta_weight(name).to(total.dtype)
            if safe_merge and not torch.isfinite(total).all():
                raise DataError(f"adapter {name!r} is broken: merging it gives values not finite")
        if self._weight_before_merge is None:
            self._weight_before_merge = weight.data
        weight.data = total.to(weight.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit as it was before the first merge."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._weight_before_merge.to(weight.device, weight.dtype)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the updates of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.shard_pools:
                continue
            lora_a, lora_b = self.lora_matrices(name)
            inner = self.mos_dropout[name](self._cast_input_dtype(x, lora_a.dtype))
            update = functional.linear(functional.linear(inner, lora_a), lora_b)
            result = result + update * self.scaling[name]
        return result.to(dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The pool follows its first block; `lora_matrices` bridges the way to the others.
        if adapter_name in self.shard_pools and self.mos_block[adapter_name] == 0:
            self.shard_pools[adapter_name].to(device or self.get_base_layer().weight.device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that `get_delta_weight` is the whole of the update."""
        return True

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


class MoSModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """The tuner behind `peft.get_peft_model(model, MoSConfig(...))`; not built by hand.

    Its own methods (`to_lora`) are reached through the `PeftModel`.
    """

    uses_shared_state = True
    prefix = CONTAINER
    tuner_layer_cls = MoSLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as PEFT declares it
    shard_pools: Any  # ModuleDict, adapter name -> ModuleDict, kind -> ShardPool
    active_adapters: list[str]
    peft_config: dict[str, MoSConfig]

    def _pre_injection_hook(self, model: nn.Module, config: MoSConfig, adapter_name: str) -> None:
        self.shard_pools = nn.ModuleDict()
        self._places: dict[str, dict[str, tuple[str, int]]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Build the pools of an adapter, then let PEFT put the layers in place."""
        config = self.peft_config[adapter_name]
        layouts = shard_layouts(model, config)
        trained = [(pool, pool.requires_grad) for pool in self.shard_pools.parameters()]
        pools = {layout.kind: ShardPool(config, layout) for layout in layouts}
        self.shard_pools[adapter_name] = nn.ModuleDict(pools)
        self._places[adapter_name] = {
            name: (layout.kind, block)
            for layout in layouts
            for block, name in enumerate(layout.modules)
        }
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            del self.shard_pools[adapter_name]
            raise
        finally:
            del self._places[adapter_name]
        for parameter, requires_grad in trained:  # another adapter's state is none of our business
            parameter.requires_grad_(requires_grad)

    def _create_and_replace(
        self,
        config: MoSConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        kind, block = self._places[adapter_name][current_key]
        pool = self.shard_pools[adapter_name][kind]
        layer = target if isinstance(target, MoSLinear) else MoSLinear(target, adapter_name)
        if block == 0:
            weight = layer.get_base_layer().weight
            # With low_cpu_mem_usage the pool has no values yet; it is moved once they are loaded.
            pool.to(None if pool.pool_A.is_meta else weight.device, weight.dtype)
            pool.requires_grad_(adapter_name in self.active_adapters)
        layer.update_layer(adapter_name, pool, block, config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            for pool in self.shard_pools[adapter_name].values():
                if pool.pool_A.dtype in (torch.float16, torch.bfloat16):
                    pool.float()

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop the argument, and every row would go through the active adapters.
        if kwargs.get("adapter_names") is not None:
            raise DataError(
                "adapter_names: adapters of a mixture of shards cannot be mixed in one batch; "
                "call set_adapter, or export them with to_lora, as LoRAs can"
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its pools."""
        super().delete_adapter(adapter_name)
        del self.shard_pools[adapter_name]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, container, tail = key.partition(f"{CONTAINER}.{adapter_name}.")
        if container and head in ("", "base_model."):
            return f"{head}{CONTAINER}.{tail}"
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoSConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        _check_saved(model, adapter_name, remapped)
        return remapped

    @torch.no_grad()
    def to_lora(
        self, save_directory: str | Path | None = None, adapter_name: str | None = None
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Write an adapter out as a plain LoRA of rank r, which anything that reads LoRA loads.

        Parameters
        ----------
        save_directory
            Folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to; made if
            need be. None writes nothing.
        adapter_name
            Which adapter; the active one by default.

        Returns
        -------
        config : peft.LoraConfig
            The settings of that LoRA.
        tensors : dict
            Its weights on the CPU, under the names that PEFT saves them under.

        Raises
        ------
        bakeoff.errors.DataError
            (a ValueError) If there is no such adapter, or several are active and none is named.

        Notes
        -----
        Sharing is lost: the file holds r, not `equivalent_rank`, vectors per layer.
        """
        name = self._adapter_to_export(adapter_name)
        config: MoSConfig = self.peft_config[name]
        layers = {
            key: module
            for key, module in self.model.named_modules()
            if isinstance(module, MoSLinear) and name in module.shard_pools
        }
        tensors: dict[str, Tensor] = {}
        for key, layer in layers.items():
            lora_a, lora_b = layer.lora_matrices(name)
            tensors[f"base_model.model.{key}.lora_A.weight"] = lora_a.cpu().contiguous()
            tensors[f"base_model.model.{key}.lora_B.weight"] = lora_b.cpu().contiguous()
        for key, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                saved = module.adapter_state_dict(name, module.state_dict())
                tensors |= {
                    f"base_model.model.{key}.{part}": value.detach().cpu().contiguous()
                    for part, value in saved.items()
                }
        ranks = {key: layer.r[name] for key, layer in layers.items()}
        r = max(ranks.values())
        lora = LoraConfig(
            r=r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=sorted(layers),
            rank_pattern={key: rank for key, rank in ranks.items() if rank != r},
            fan_in_fan_out=any(isinstance(each.base_layer, Conv1D) for each in layers.values()),
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path
            or getattr(self.model, "name_or_path", None)
            or None,
            revision=config.revision,
            inference_mode=True,
        )
        if save_directory is not None:
            _save_lora(Path(save_directory), lora, tensors)
        return lora, tensors

    def _adapter_to_export(self, adapter_name: str | None) -> str:
        names = self.active_adapters if adapter_name is None else [adapter_name]
        if len(names) != 1:
            raise DataError(f"adapter_name must name one of the active adapters, {names}")
        if names[0] not in self.peft_config:
            raise DataError(
                f"adapter_name={names[0]!r} is not an adapter of this model, which has "
                f"{', '.join(self.peft_config)}"
            )
        return names[0]


def _save_lora(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True))


def _check_saved(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a file that lacks a pool or names shards that no pool has."""
    tuner: Any = getattr(model, "base_model", model)
    for kind, pool in tuner.shard_pools[adapter_name].items():
        prefix = next(
            (key.removesuffix("pool_A") for key in state_dict if key.endswith(f".{kind}.pool_A")),
            None,
        )
        expected = dict(pool.named_parameters()) | dict(pool.named_buffers())
        for name, tensor in expected.items():
            saved = None if prefix is None else state_dict.get(prefix + name)
            if saved is None:
                raise DataError(f"the saved adapter has no {name} for the layers {kind}")
            if saved.shape != tensor.shape:
                raise DataError(
                    f"the saved {name} of the layers {kind} has shape {tuple(saved.shape)}, this "
                    f"model and configuration need {tuple(tensor.shape)}"
                )
            if not name.startswith("index"):
                continue
            if saved.is_floating_point() or saved.min() < 0 or saved.max() >= len(pool.pool_A):
                raise DataError(
                    f"the saved {name} of the layers {kind} is damaged: entries must be integers "
                    f"from 0 to {len(pool.pool_A) - 1}"
                )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


PEFT_TYPE_TO_PREFIX_MAPPING[_PeftType.MIXTURE_OF_SHARDS] = CONTAINER
PEFT_TYPE_TO_CONFIG_MAPPING[_PeftType.MIXTURE_OF_SHARDS] = MoSConfig
PEFT_TYPE_TO_TUNER_MAPPING[_PeftType.MIXTURE_OF_SHARDS] = MoSModel
