"""Turn feed-forward layers of a transformers decoder into mixtures; save and load the result."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bakeoff._files import atomic_path, write_text
from bakeoff.errors import DataError, ModelError
from bakeoff.experts.expert_bank import ExpertBank, ModuleExperts
from bakeoff.experts.feed_forward import FeedForwardExperts
from bakeoff.experts.lora_experts import LoRAExperts
from bakeoff.experts.mixture_of_experts import MoE, aux_loss, moe_layers
from bakeoff.experts.protocol import Router, RoutingLoss
from bakeoff.experts.recurrent_router import (
    LayerRouter,
    RecurrentRouter,
    is_recurrent,
    make_layer_routers,
    saved_layer_routers,
    thread_layers,
)

SETTINGS_FILE = "moe.json"
WEIGHTS_FILE = "model.safetensors"

STARTS = ("copy", "split", "random", "lora")
"""How `to_moe` can start the experts."""

# What decoder layers call their feed-forward module.
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "feedforward")
# (gate, value, out), (gate and value in one, out) and (in, out), as transformers' models name them.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_FUSED = (("gate_up_proj", "down_proj"),)
_PLAIN = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
    ("fc_in", "fc_out"),
)
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class DenseLayer:
    """The weights of a perceptron: ``w_in`` ``(rows, hidden)``, ``w_out`` ``(hidden, width)``."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str
    gated: bool

    @property
    def width(self) -> int:
        """Inner features."""
        return int(self.w_out.shape[1])


def _matrix(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as ``(n_out, n_in)``; GPT-2's layer stores the transpose."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def read_feed_forward(module: nn.Module) -> DenseLayer | None:
    """Return the weights of a model's feed-forward module, or None where its form is unknown.

    What was read is run beside the module on random states, so that a module which does anything
    more (a norm, a residual, a clamp) counts as unknown.
    """
    read = _read_by_names(module)
    if read is None:
        return None
    try:
        experts = _from_dense(read, 1, 1)
    except DataError:  # an activation without a name
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, read.w_in.shape[1], generator=generator).to(read.w_in)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            given = module(rows[None])[0].float()
            # Relative to the whole, because small weights make every single number small.
            distance = float((given - experts.one(0, rows).float()).norm())
            precision = 1e-4 if rows.dtype in (torch.float32, torch.float64) else 2e-2
            same = distance <= precision * float(given.norm())
    except Exception:  # its forward takes something else
        return None
    finally:
        module.train(was_training)
    return read if same else None


def _read_by_names(module: nn.Module) -> DenseLayer | None:
    children = dict(module.named_children())
    activation = next((_activation(module, n) for n in _ACTIVATION_NAMES if hasattr(module, n)), "")
    for names in (*_GATED, *_FUSED, *_PLAIN):
        if set(names) <= children.keys() and all(_is_linear(children[n]) for n in names):
            first = [children[name] for name in names[:-1]]
            last = children[names[-1]]
            bias = [layer.bias for layer in first]
            return DenseLayer(
                torch.cat([_matrix(layer) for layer in first]),
                _matrix(last),
                None if any(b is None for b in bias) else torch.cat(bias),  # type: ignore[arg-type]
                last.bias,  # type: ignore[arg-type]
                activation,
                names not in _PLAIN,
            )
    return None


def _activation(module: nn.Module, attribute: str) -> str:
    """Return the name of the activation `module` holds, or an empty string."""
    from transformers.activations import ACT2FN

    function = getattr(module, attribute)
    if isinstance(function, str):
        return function
    for name in ACT2FN:
        known = ACT2FN[name]
        if type(known) is type(function) or known is function:
            # One class can serve two functions, told apart by its settings.
            if getattr(known, "approximate", None) != getattr(function, "approximate", None):
                continue
            return str(name)
    same = {nn.functional.silu: "silu", nn.functional.relu: "relu", nn.functional.gelu: "gelu"}
    return same.get(function, "")


@torch.no_grad()
def _from_dense(
    dense: DenseLayer, n_experts: int, parts: int, shuffle: int | None = None
) -> FeedForwardExperts:
    """Return experts of which number i is part ``i % parts`` of the dense layer's inner neurons."""
    width = dense.width // parts
    bias = dense.b_in is not None or dense.b_out is not None
    experts = FeedForwardExperts(
        n_experts, dense.w_in.shape[1], width, dense.activation, dense.gated, bias
    ).to(dense.w_in)
    order = torch.arange(dense.width)
    if shuffle is not None:
        order = torch.randperm(dense.width, generator=torch.Generator().manual_seed(shuffle))
    order = order.to(dense.w_in.device)
    for expert in range(n_experts):
        part = order[(expert % parts) * width : (expert % parts + 1) * width]
        rows = torch.cat([part, part + dense.width]) if dense.gated else part
        experts.w_in[expert] = dense.w_in[rows]
        experts.w_out[expert] = dense.w_out[:, part]
        if experts.b_in is not None and dense.b_in is not None:
            experts.b_in[expert] = dense.b_in[rows]
        if experts.b_out is not None and dense.b_out is not None:
            # The parts together add the bias once.
            experts.b_out[expert] = dense.b_out / parts
    return experts


class _Batch:
    """What the layers need of the model's batch and do not get from their own caller."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.extra: dict[str, Tensor] = {}

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember token ids and padding; a forward hook of the model."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.extra = {} if ids is None else {"token_ids": ids}
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        usable = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
        self.mask = mask if usable else None

    def complete(
        self, leading: torch.Size, mask: Tensor | None, context: dict[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return mask and context, completed where shapes fit."""
        if mask is None and self.mask is not None and len(leading) == 2:
            # While generating, the mask covers the cached positions as well.
            recent = self.mask[:, -leading[1] :]
            mask = recent if recent.shape == leading else None
        fitting = {key: ids for key, ids in self.extra.items() if ids.shape == leading}
        return mask, {**fitting, **context}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Batch:
        memo[id(self)] = new = _Batch()
        return new


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the module list that holds a decoder's layers, and the list.

    Raises
    ------
    bakeoff.errors.ModelError
        If no list of layers with a feed-forward module is found.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and _mlp_name(module[0]):
            return name, module
    raise ModelError(
        f"{type(model).__name__} has no list of layers with a feed-forward module named "
        f"{', '.join(_MLP_NAMES)}"
    )


def _mlp_name(layer: nn.Module) -> str:
    return next((n for n in _MLP_NAMES if isinstance(getattr(layer, n, None), nn.Module)), "")


def layer_numbers(
    n_layers: int, every: int = 1, dense_first: int = 0, layers: Iterable[int] | None = None
) -> list[int]:
    """Return which layers become mixtures.

    With ``every=2`` these are layers 1, 3, 5 and so on, as in GShard; the first `dense_first`
    layers stay as they are. `layers` names them instead.

    Examples
    --------
    >>> layer_numbers(8, every=2), layer_numbers(8, every=4), layer_numbers(4, dense_first=1)
    ([1, 3, 5, 7], [3, 7], [1, 2, 3])
    """
    if layers is not None:
        layers = list(layers)
        chosen = sorted({layer % n_layers for layer in layers if -n_layers <= layer < n_layers})
        if len(chosen) != len(layers):
            raise DataError(f"layers must be distinct and below {n_layers}, got {layers}")
    else:
        if every < 1 or dense_first < 0:
            raise DataError(
                f"every must be at least 1 and dense_first at least 0, got {every}, {dense_first}"
            )
        chosen = [i for i in range(dense_first, n_layers) if (i + 1) % every == 0]
    if not chosen:
        raise DataError(f"no layer of {n_layers} is chosen: lower every or dense_first")
    return chosen


def to_moe(
    model: nn.Module,
    experts: int = 8,
    router: str | dict[str, Any] | RecurrentRouter | Callable[[], Router] = "top-k",
    *,
    start: str = "copy",
    granularity: int = 1,
    rank: int = 8,
    every: int = 1,
    dense_first: int = 0,
    layers: Iterable[int] | None = None,
    aux: Iterable[str | dict[str, Any] | RoutingLoss] = ("switch-balance", "z-loss"),
    add_aux_to_loss: bool = True,
    seed: int = 0,
    **settings: Any,
) -> nn.Module:
    """Replace feed-forward layers of a transformers decoder by mixtures, in place.

    Parameters
    ----------
    model
        A decoder, such as ``AutoModelForCausalLM`` gives.
    experts
        Experts per layer.
    router
        Name, dict, or a function that makes a router for each layer. ``"recurrent"``, a dict of
        that name, or a `RecurrentRouter`: one router that all layers share, see
        `make_layer_routers`.
    start
        ``"copy"``: each expert is the dense layer (sparse upcycling). ``"split"``: the experts are
        the parts of one dense layer; the output is multiplied by their number, so that equal
        weights on all experts give the dense layer's output. ``"random"``: fresh weights of the
        dense layer's shape. ``"lora"``: the dense layer stays, shared; experts are low-rank updates
        that start at zero.
    granularity
        With ``"copy"``: cut each copy into this many parts, each an expert (fine-grained
        upcycling). `experts` counts parts and is a multiple of it. The output is multiplied by the
        same number, for the same reason.
    rank
        Of ``"lora"``.
    every, dense_first, layers
        Which layers, see `layer_numbers`.
    aux
        Balance losses.
    add_aux_to_loss
        Add `aux_loss` to the loss that the model returns in training when it is given labels.
    seed
        For routers and random experts; and for shuffling neurons before a cut.
    **settings
        Further arguments of `MoE`: ``capacity``, ``drop``, ``dispatch``, ``shared``, ``scale``.
        ``shared`` is a number of experts here, which have random weights.

    Returns
    -------
    torch.nn.Module
        The same model. It generates as before; `save_moe` and `load_moe` keep it.

    Raises
    ------
    bakeoff.errors.DataError
        On impossible settings.
    bakeoff.errors.ModelError
        If no feed-forward layers are found, or they already are mixtures.

    Notes
    -----
    The layers are causal: routers that look ahead are refused. Padding (a two-dimensional
    ``attention_mask``) goes to no expert. A feed-forward module of unknown form is copied whole
    with ``"copy"`` and refused otherwise.

    With ``"copy"``, weights that sum to 1 and a granularity of 1, the model's output is the dense
    one's, whatever the router does.

    References
    ----------
    Aran Komatsuzaki et al. "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints".
    ICLR 2023. arXiv:2212.05055. Ethan He et al. "Upcycling Large Language Models into Mixture of
    Experts". 2024. arXiv:2410.07524. Tong Zhu et al. "LLaMA-MoE". EMNLP 2024. arXiv:2406.16554.
    """
    if start not in STARTS:
        raise DataError(f"unknown start {start!r}; there are: {', '.join(STARTS)}")
    if start != "copy" and granularity != 1:
        raise DataError(f"granularity is for start='copy', got start={start!r}")
    if granularity < 1 or experts % granularity:
        raise DataError(
            f"granularity must be at least 1 and divide experts={experts}, got {granularity}"
        )
    _check_shared(settings.get("shared", 0), start)
    path, stack = decoder_layers(model)
    chosen = layer_numbers(len(stack), every, dense_first, layers)
    aux = list(aux)
    parts = experts if start == "split" else granularity
    made: dict[int, MoE] = {}
    spanning: list[LayerRouter] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_recurrent(router):
            _check_one_device(stack, chosen)
            given: Any = router
            spanning = make_layer_routers(given, _hidden_size(model), experts, len(chosen))
        # All are made before any is put in place: an error leaves the model as it was.
        for index, number in enumerate(chosen):
            name = _mlp_name(stack[number])
            dense = getattr(stack[number], name)
            if isinstance(dense, MoE) or _looks_like_mixture(dense):
                raise ModelError(f"layer {number} of {type(model).__name__} already is a mixture")
            bank = _start(dense, experts, start, parts, rank, seed, _hidden_size(model))
            shared: Any = dense if start == "lora" else settings.get("shared", 0)
            layer = MoE(
                bank.hidden,
                bank,
                spanning[index] if spanning else _router(router),
                aux=aux,
                causal=True,
                shared=shared,
                scale=settings.get("scale", float(parts)),
                **{k: v for k, v in settings.items() if k not in ("shared", "scale")},
            )
            reference = next(dense.parameters())
            layer.experts.to(reference)
            if isinstance(layer.shared, FeedForwardExperts):
                layer.shared.to(reference)
            layer.to(reference.device)
            made[number] = layer.train(dense.training)
    for number, layer in made.items():
        setattr(stack[number], _mlp_name(stack[number]), layer)
    thread_layers([stack[number] for number in chosen])
    _connect(model, add_aux_to_loss)
    model.moe_layers_at = (path, chosen)  # type: ignore[assignment]
    return model


def _check_shared(shared: Any, start: str) -> None:
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        raise DataError(
            "shared must be how many experts every token passes, a whole number of at least 0, got "
            f"{shared!r}: of a module, load_moe would not know how to make it again"
        )
    if shared and start == "lora":
        raise DataError(
            f"start='lora' keeps the dense layer as what all tokens share: leave out "
            f"shared={shared}"
        )


def _router(router: Any) -> Any:
    """Return a router, or what makes one, of which no other layer has a part."""
    if callable(router) and not hasattr(router, "n_experts"):
        return router()
    return copy.deepcopy(router)


def _check_one_device(stack: nn.ModuleList, numbers: Sequence[int]) -> None:
    devices = {str(next(stack[number].parameters()).device) for number in numbers}
    if len(devices) > 1:
        raise ModelError(
            f"a recurrent router needs its layers on one device, they are on {sorted(devices)}"
        )


def _looks_like_mixture(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("experts", "router", "gate")) and not hasattr(
        module, "gate_proj"
    )


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "hidden_size"):
        raise ModelError(f"{type(model).__name__} has no config with a hidden_size")
    return int(text.hidden_size)


def _start(
    dense: nn.Module, experts: int, start: str, parts: int, rank: int, seed: int, hidden: int
) -> ExpertBank:
    if start == "lora":
        return LoRAExperts(experts, hidden, rank=rank)
    read = read_feed_forward(dense)
    if read is None:
        if start == "copy" and parts == 1:
            return ModuleExperts(dense, hidden, experts)
        raise ModelError(
            f"the form of {type(dense).__name__} is not known: only start='copy' with "
            "granularity=1 and start='lora' work"
        )
    if read.width % parts:
        raise DataError(f"{parts} parts do not divide the layer's width of {read.width}")
    bank = _from_dense(read, experts, parts, shuffle=seed if parts > 1 else None)
    if start == "random":
        bias = bank.b_in is not None
        return FeedForwardExperts(experts, hidden, read.width, read.activation, read.gated, bias)
    return bank


def _connect(model: nn.Module, add_aux_to_loss: bool) -> None:
    """Let the layers see the model's batch, and the model's loss the layers' losses."""
    batch = _Batch()
    for layer in moe_layers(model).values():
        layer._batch = batch
    model.register_forward_pre_hook(batch.read, with_kwargs=True)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if module.training and getattr(output, "loss", None) is not None:
            output.loss = output.loss + aux_loss(module).to(output.loss.device)
        return output

    model.moe_adds_aux = add_aux_to_loss  # type: ignore[assignment]
    if add_aux_to_loss:
        model.register_forward_hook(add)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model in all, and those that one token uses."""

    total: int
    active: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count parameters twice; works for `MoE` layers and for transformers' own mixtures."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        in_all, used = layer.parameter_counts()
        idle += in_all - used
    for module in model.modules():
        # transformers' banks hold stacked matrices and know how many a token uses.
        if isinstance(module, MoE | ExpertBank) or not hasattr(module, "experts"):
            continue
        bank: Any = module.experts
        n_experts = getattr(bank, "num_experts", None)
        k = _choices(module)
        if n_experts and k:
            size = sum(p.numel() for p in bank.parameters())
            idle += round(size * (1 - k / n_experts))
    return ParameterCounts(total, total - idle)


def _choices(module: nn.Module) -> int:
    owners: list[Any] = [module, getattr(module, "gate", None), getattr(module, "router", None)]
    return next((int(owner.top_k) for owner in owners if hasattr(owner, "top_k")), 0)


def save_moe(model: nn.Module, folder: str | Path) -> None:
    """Write a model that `to_moe` made: safetensors and JSON.

    Parameters
    ----------
    model
        The model.
    folder
        Gets ``config.json`` (of the dense model), ``moe.json``, ``model.safetensors`` and, if there
        is one, ``generation_config.json``. The tokenizer is the caller's to save.

    Raises
    ------
    bakeoff.errors.ModelError
        If the model was not made by `to_moe`.
    bakeoff.errors.DataError
        If a part cannot be described by settings, such as experts of unknown form.
    """
    from safetensors.torch import save_model

    if not hasattr(model, "moe_layers_at"):
        raise ModelError(f"{type(model).__name__} was not made by to_moe")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, numbers = model.moe_layers_at  # type: ignore[misc]
    stack = model.get_submodule(path)
    described = [
        {"layer": n, "settings": getattr(stack[n], _mlp_name(stack[n])).settings()}  # type: ignore[index]
        for n in numbers
    ]
    text = {
        "format": 1,
        "class": type(model).__name__,
        "layers_at": path,
        "add_aux_to_loss": bool(model.moe_adds_aux),
        "layers": described,
    }
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_model(model, str(temporary), metadata={"format": "pt"})
    write_text(folder / SETTINGS_FILE, json.dumps(text, indent=1) + "\n")


def load_moe(folder: str | Path) -> Any:
    """Return the model that `save_moe` wrote, in evaluation mode, on the CPU.

    Raises
    ------
    bakeoff.errors.ModelError
        If the folder was not written by `save_moe`, or its class does not exist in the installed
        transformers.
    """
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_model

    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise ModelError(f"{folder} has no {SETTINGS_FILE}: it was not written by save_moe")
    text = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if text.get("format") != 1:
        raise ModelError(f"{folder / SETTINGS_FILE} has format {text.get('format')}, known is 1")
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, str(text["class"]), None)
    if kind is None or not issubclass(kind, transformers.PreTrainedModel):
        raise ModelError(f"transformers has no model class {text['class']!r}")
    model = kind(config)
    stack: Any = model.get_submodule(text["layers_at"])
    settings = [dict(entry["settings"]) for entry in text["layers"]]
    if is_recurrent(settings[0]["router"]):
        spanning = saved_layer_routers([each["router"] for each in settings])
        for each, router in zip(settings, spanning, strict=True):
            each["router"] = router
    for entry, given in zip(text["layers"], settings, strict=True):
        layer = stack[entry["layer"]]
        name = _mlp_name(layer)
        setattr(layer, name, MoE.from_settings(given, dense=getattr(layer, name)))
    thread_layers([stack[entry["layer"]] for entry in text["layers"]])
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
        kept = set(stored.keys())
        for key, parameter in model.named_parameters(remove_duplicate=False):
            if key in kept:  # of tied weights, one name is
                parameter.data = parameter.data.to(stored.get_slice(key)[:0].dtype)
    load_model(model, str(folder / WEIGHTS_FILE))
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    _connect(model, text["add_aux_to_loss"])
    model.moe_layers_at = (text["layers_at"], [entry["layer"] for entry in text["layers"]])
    return model.eval()
