"""How the layers of a model share pools of shards: who belongs together, and who gets which.

The planning half of `bakeoff.experts.mixture_of_shards`: looks at a model, changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from bakeoff.experts.mixture_of_shards import MoSConfig

CONTAINER = "shard_pools"  # where tuner and layers keep the pools; also the prefix that PEFT knows
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ShardLayout:
    """How the layers of one kind share their pools.

    Parameters
    ----------
    kind
        Short name, such as ``"q_proj"``; unique within the adapter.
    modules
        Dotted names of the L layers of this kind, in the model's order.
    in_features, out_features
        Their inputs and outputs.
    r
        Working rank.
    private_rank, shards_per_vector
        As in `MoSConfig`.
    n_public
        Shards of each pool that every block may use.
    n_own
        Shards of each pool that one block has to itself.
    trained_scaling
        As in `MoSConfig`.
    """

    kind: str
    modules: tuple[str, ...]
    in_features: int
    out_features: int
    r: int
    private_rank: int
    shards_per_vector: int
    n_public: int
    n_own: int
    trained_scaling: bool

    @property
    def pattern(self) -> str:
        """The modules' common name, with ``*`` for every number."""
        return ".".join(_pattern(self.modules[0]))

    @property
    def n_shards(self) -> int:
        """Rows of either pool."""
        return self.n_public + len(self.modules) * self.n_own

    @property
    def n_parameters(self) -> int:
        """Trained parameters of this kind."""
        sizes = (self.in_features + self.out_features) // self.shards_per_vector
        scales = len(self.modules) * (self.r + self.out_features) if self.trained_scaling else 0
        return self.n_shards * sizes + scales


def shard_layouts(model: nn.Module, config: MoSConfig) -> list[ShardLayout]:
    """Return, without building it, how an adapter would be laid out over a model.

    Parameters
    ----------
    model
        The base model; it may lie on the meta device.
    config
        The settings.

    Returns
    -------
    list of ShardLayout
        One for each kind of layer, in the model's order.

    Warns
    -----
    UserWarning
        If a kind has a single layer, so that its pool is shared with nobody.

    Raises
    ------
    bakeoff.errors.DataError
        (a ValueError) If a target is not a linear layer, is quantised, has its weight tied to
        another module, or already carries an adapter of another method; if layers of one kind
        differ in shape; if their sizes are not divisible by `shards_per_vector`; if there are not
        enough public shards for `r`.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     llama_2_7b = LlamaForCausalLM(LlamaConfig())
    >>> from bakeoff.experts.mixture_of_shards import MoSConfig
    >>> sum(layout.n_parameters for layout in shard_layouts(llama_2_7b, MoSConfig()))
    4997120
    """
    found = _targets(model, config)
    layouts = [_layout(kind, modules, config) for kind, modules in _by_kind(found).items()]
    lonely = [layout.kind for layout in layouts if len(layout.modules) == 1]
    if lonely and config.selection != "rotation" and config.private_rank != config.equivalent_rank:
        warnings.warn(
            f"only one layer each of the kinds {', '.join(lonely)}: there is nobody to share with, "
            "and the adapter is a LoRA whose vectors are cut up and shuffled",
            stacklevel=2,
        )
    return layouts


def count_trained_parameters(model: nn.Module, config: MoSConfig) -> int:
    """Return the number of parameters that an adapter would train, without building it.

    For a budget of ``equivalent_rank``, that is ``e * L * (n_in + n_out)`` summed over the kinds of
    layers, whatever the other settings (but see ``trained_scaling``).

    Parameters
    ----------
    model
        The base model; it may lie on the meta device.
    config
        The settings.

    Raises
    ------
    bakeoff.errors.DataError
        As `shard_layouts`.
    """
    return sum(layout.n_parameters for layout in shard_layouts(model, config))


def draw_shards(config: MoSConfig, layout: ShardLayout) -> tuple[Tensor, Tensor]:
    """Draw which shards make up the matrices of every layer of one kind.

    Parameters
    ----------
    config
        The settings.
    layout
        The kind.

    Returns
    -------
    index_A, index_B : Tensor
        ``(L, r * l)`` int64: row k names the shards of layer k, l for each of its r vectors. The
        private vectors come last.
    """
    rows_a, rows_b = [], []
    generators = [
        seeded_generator(config.seed, layout.pattern, side) for side in ("index_A", "index_B")
    ]
    n_drawn = (layout.r - layout.private_rank) * layout.shards_per_vector
    for block in range(len(layout.modules)):
        own = torch.arange(layout.n_own) + layout.n_public + block * layout.n_own
        if config.selection == "rotation":
            rotated = _rotated(layout.r - layout.private_rank, layout.shards_per_vector)
            private = own[layout.r - layout.private_rank :]
            rows_a.append(torch.cat([own[rotated], private]))
            rows_b.append(rows_a[-1])
            continue
        shuffled = [torch.randperm(layout.n_public, generator=each) for each in generators]
        first = shuffled[0] if config.selection == "subset" else torch.arange(layout.n_public)
        second = shuffled[1] if config.pair_dissociation else first
        rows_a.append(torch.cat([first[:n_drawn], own]))
        rows_b.append(torch.cat([second[:n_drawn], own]))
    return torch.stack(rows_a), torch.stack(rows_b)


def seeded_generator(seed: int, *parts: str) -> torch.Generator:
    """Return a CPU generator that depends on the seed and on what it is for, and nothing else."""
    digest = hashlib.sha256("/".join([str(seed), *parts]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _rotated(rank: int, parts: int) -> Tensor:
    """Return ``(rank * parts,)``: row j, copy i is short vector ``(j - i * stride) mod rank``."""
    stride = max(rank // parts, 1)
    row, copy_ = torch.arange(rank).unsqueeze(1), torch.arange(parts)
    return ((row - copy_ * stride) % max(rank, 1)).flatten()


def layer_features(layer: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def _targets(model: nn.Module, config: MoSConfig) -> dict[str, nn.Module]:
    """Return the base layers to adapt by dotted name, all of them fit for it."""
    config = tuners_utils._maybe_include_all_linear_layers(copy.deepcopy(config), model)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(outer) for outer in adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted.append(name + ".")
        if not tuners_utils.check_target_module_exists(config, name):
            continue
        if isinstance(module, BaseTunerLayer) and hasattr(module, CONTAINER):
            module = module.get_base_layer()  # a further adapter beside those it has
        elif isinstance(module, BaseTunerLayer):
            raise DataError(
                f"{name} already carries a {type(module).__module__.split('.')[-2]} adapter: merge "
                "or unload it first, or leave the module out of target_modules"
            )
        _check_layer(name, module)
        others = [each for each in owners[id(module.weight)] if not each.startswith(name + ".")]
        if others:
            raise DataError(
                f"the weight of {name} is tied: it is also {', '.join(others)}. An adapter on one "
                "of them cannot be merged; untie them, or exclude the module"
            )
        found[name] = module
    return found


def _check_layer(name: str, layer: nn.Module) -> None:
    what = f"target {name} ({type(layer).__name__})"
    weight = getattr(layer, "weight", None)
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    if plain and isinstance(weight, Tensor) and weight.dtype in _FLOATING:
        if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
            raise DataError(
                f"{what} is inside torch's MultiheadAttention, which reads its weight and would "
                "pass an adapter by: exclude it"
            )
        if isinstance(layer, nn.Linear | Conv1D):
            return
        raise DataError(
            f"{what} is not a linear layer: mixture of shards adapts torch.nn.Linear and "
            "transformers' Conv1D"
        )
    held = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    raise DataError(
        f"{what} is quantised or has no plain weight ({held}): mixture of shards adapts weights of "
        f"{', '.join(str(each).removeprefix('torch.') for each in _FLOATING)}. Load the model "
        "unquantised, or exclude the module"
    )


def _pattern(name: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def _by_kind(layers: Mapping[str, nn.Module]) -> dict[str, list[tuple[str, nn.Module]]]:
    """Group layers whose dotted names differ in numbers only, under the shortest distinct names."""
    patterns: dict[tuple[str, ...], list[tuple[str, nn.Module]]] = {}
    for name, layer in layers.items():
        patterns.setdefault(_pattern(name), []).append((name, layer))
    short, taken = {}, nn.ModuleDict()
    for pattern, members in patterns.items():
        length = next(
            n
            for n in range(1, len(pattern) + 1)
            if n == len(pattern) or sum(other[-n:] == pattern[-n:] for other in patterns) == 1
        )
        kind = "-".join(pattern[-length:])
        # A ModuleDict refuses names that it has an attribute of, such as "keys" and "values".
        short[f"{kind}_" if hasattr(taken, kind) else kind] = members
    return short


def _layout(kind: str, members: list[tuple[str, nn.Module]], config: MoSConfig) -> ShardLayout:
    name, first = members[0]
    shape = layer_features(first)
    for other_name, other in members[1:]:
        if layer_features(other) != shape:
            raise DataError(
                f"layers of one kind share a pool and need one shape, but {name} maps "
                f"{shape[0]} to {shape[1]} and {other_name} maps {layer_features(other)[0]} to "
                f"{layer_features(other)[1]}: exclude one of them"
            )
    parts, private, blocks = config.shards_per_vector, config.private_rank, len(members)
    for side, size in zip(("in_features", "out_features"), shape, strict=True):
        if size % parts:
            raise DataError(
                f"shards_per_vector={parts} does not divide {side}={size} of {name}: use a common "
                f"divisor of {shape[0]} and {shape[1]}, or exclude the module"
            )
    r, n_public, n_own = _ranks(kind, blocks, config)
    return ShardLayout(
        kind=kind,
        modules=tuple(each for each, _ in members),
        in_features=shape[0],
        out_features=shape[1],
        r=r,
        private_rank=private,
        shards_per_vector=parts,
        n_public=n_public,
        n_own=n_own,
        trained_scaling=config.trained_scaling,
    )


def _ranks(kind: str, blocks: int, config: MoSConfig) -> tuple[int, int, int]:
    """Return the working rank, the shards of the public pool, and those of one block alone."""
    parts, private = config.shards_per_vector, config.private_rank
    copies = {"subset": blocks, "all": blocks, "rotation": parts}[config.selection]
    if config.equivalent_rank is None:
        assert config.r is not None  # the configuration has checked it
        largest = config.r
    else:
        largest = (config.equivalent_rank - private) * copies + private
    r = largest if config.r is None else config.r
    if config.selection == "subset":
        if r > largest:
            raise DataError(
                f"not enough public shards for the layers {kind}: r={r} takes {r - private} public "
                f"vectors, but (equivalent_rank - private_rank) * {blocks} layers = "
                f"{largest - private}. Lower r to at most {largest}, lower private_rank, or "
                "exclude these layers"
            )
    elif r != largest:
        raise DataError(
            f"selection={config.selection!r} uses the whole pool: for the layers {kind}, "
            f"equivalent_rank={config.equivalent_rank} means r={largest}, got r={r}. Set r=None or "
            "equivalent_rank=None to derive one from the other"
        )
    if config.selection == "rotation":
        return r, 0, r - private + private * parts
    return r, (largest - private) * parts, private * parts
