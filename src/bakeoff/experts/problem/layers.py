"""Which mixture-of-experts layer: train a decoder with each, on the same texts, judge by its loss.

A design's method is the name of a router (`ROUTERS`, `PRESETS`, ``"recurrent"``), or ``"dense"``.
Active size is matched: an expert has the width of the dense layer divided by the number of experts
that a token meets, so that a mixture does the dense layer's work per token, plus its gate's.

Parameters of a design with a mixture:

``experts``
    Routed experts per layer, 8.
``granularity``
    The dense layer's width over an expert's. By default k + `shared`: active size is matched.
``shared``
    Experts that every token meets, 0. They count as part of the matched size.
``balance``
    A balance loss, by name or as a dict with ``name`` and settings; None for none. By default
    ``"switch-balance"``, and none where nothing is learned or the router balances itself.
``coefficient``, ``scope``
    Settings of `balance`: its weight, 0.01; and where ``"global-balance"`` counts: ``"global"``,
    ``"micro"``, ``"sequence"`` or ``"shuffle"``.
``z_loss``
    Coefficient of the z-loss, 0.001 where a gate is learned; 0 for none.
``capacity``, ``drop``
    As in `MoE`, in training and in judging alike; by default nothing is dropped.
``every``, ``dense_first``
    Which layers are mixtures, as in `to_moe`; all.
``start``
    ``"copy"``: experts are copies of the dense layer, cut by `granularity` (a named model's
    default). ``"random"``: each draws weights of its own (the default from random weights).
and those of the router itself: ``k`` and, by method, ``score``, ``renorm``, ``noise``,
``state_size`` and so on.

A dense design takes ``width``: its feed-forward layer is so many times as wide (1).

Both take ``batching`` and ``accumulation``, which stand for the problem's own in this design alone.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.domain_texts import DomainTexts, Size
from bakeoff.errors import DataError
from bakeoff.experts.problem.common import (
    LOSS,
    DomainProblem,
    Scores,
    forward_flops_per_token,
)
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting

if TYPE_CHECKING:
    from torch import Tensor

    from bakeoff.experts.feed_forward import FeedForwardExperts
    from bakeoff.experts.inspection import ExpertReport

Batching = Literal["mixed", "by-domain", "shuffled"]
Match = Literal["tokens", "flops"]

LAYER_METRICS: dict[str, Metric] = {
    "loss": LOSS,
    "balance": Metric("heaviest load over mean load", higher_is_better=False, margin=0.05),
    "specialisation": Metric("specialisation of experts in domains", margin=0.01),
    "entropy": Metric("entropy of routing (share of the largest)", margin=0.01),
    "layer_information": Metric("information between layers' choices", margin=0.01),
    "drops": Metric("dropped assignments", higher_is_better=False, margin=0.005),
}
"""Loss of held-out documents; and of each layer, or pair of layers, what its experts do."""

HELD_OUT = "held-out"
"""The one task of the metrics whose unit is a layer or a pair of neighbouring layers."""

BATCHINGS = ("mixed", "by-domain", "shuffled")
MATCHES = ("tokens", "flops")

_DENSE = "dense"
_RECURRENT = "recurrent"
_BATCH_PARAMETERS = ("batching", "accumulation")
_LAYER_PARAMETERS = (
    *("experts", "granularity", "shared", "balance", "coefficient", "scope", "z_loss"),
    *("capacity", "drop", "every", "dense_first", "start"),
)
# What a layer sets itself: the number of token ids.
_SET_HERE = ("vocabulary",)
# Without a learned gate there is nothing that a loss could move.
_FIXED = ("hash", "random")
_BALANCE_THEMSELVES = ("base", "sinkhorn", "loss-free")
# What configurations call the width of a feed-forward layer, and modules the matrix that leaves it.
_WIDTH_NAMES = ("intermediate_size", "n_inner", "ffn_dim")
_OUT_NAMES = ("down_proj", "w2", "wo", "c_proj", "fc2", "dense_4h_to_h", "fc_out")
# A backward pass costs about two forward passes.
_PASSES = 3
# What seeds are derived for.
_TRAINING, _EXPERTS, _ROUTERS, _ORDER, _DEALING, _FIRST_LAYER = range(6)
# Raise when training or judging changes what a trial scores, of all methods or of one.
_VERSION = 1
_VERSIONS = {_RECURRENT: 2}  # of equal logits, the lowest index wins


def layer_designs() -> Designs:
    """Return dense rivals, common routers, and what each part of the common recipe is worth.

    All but the wide one have the active size of the dense layer, and all mixtures but the one with
    a shared expert four times its weights in all, as the wide dense layer has.

    Examples
    --------
    >>> [design.name for design in layer_designs()][:4]
    ['dense', 'dense, as wide as all experts', 'top-1 (Switch)', 'top-2']
    """
    tight = {"capacity": 0.75}
    parts = {"balance": "global-balance", "accumulation": 4}
    return Designs(
        [
            Design("dense", _DENSE),
            Design("dense, as wide as all experts", _DENSE, {"width": 4}),
            Design("top-1 (Switch)", "switch", {"experts": 4}),
            Design("top-2", "top-k"),
            Design("top-2, no balance loss", "top-k", {"balance": None}),
            Design("top-2, global balance of 4 parts", "top-k", parts),
            Design("top-2, balanced by a bias", "loss-free"),
            Design("top-2, tight, by position", "top-k", {**tight, "drop": "position"}),
            Design("top-2, tight, by priority", "top-k", {**tight, "drop": "priority"}),
            Design("fine-grained, 4 of 16", "top-k", {"experts": 16, "k": 4}),
            Design("shared expert, 3 of 16", "top-k", {"experts": 16, "k": 3, "shared": 1}),
            Design("hash of the token", "hash", {"k": 2}),
            Design("random", "random", {"k": 2}),
            Design("recurrent router", _RECURRENT, {"state_size": 32}),
        ]
    )


@dataclass(frozen=True)
class _Layer:
    """A design's mixture layer, read and with all defaults in place."""

    router: dict[str, Any]
    k: int
    experts: int
    granularity: int
    shared: int
    losses: tuple[dict[str, Any], ...]
    capacity: float | tuple[float, float] | None
    drop: str
    every: int
    dense_first: int
    copies: bool

    @property
    def scale(self) -> float:
        """Factor on the routed sum with which experts of equal weight do the dense layer's work."""
        return self.granularity * self.k / (self.k + self.shared)


class LayerProblem(DomainProblem):
    """Which mixture-of-experts layer: train with each, judge on held-out documents.

    The seed draws first weights, the order of rows, and what routers draw; attention and
    embeddings start alike in all designs under one seed.

    Parameters
    ----------
    texts, base, n_layers, shape, n_tokens, context, batch_size, learning_rate, device
        As in `DomainProblem`. A named base is upcycled: its experts are copies of its layers.
    match
        ``"tokens"``: all designs read `n_tokens`. ``"flops"``: a design reads so many that the
        operations of its forward passes are those of the dense decoder reading `n_tokens`.
    batching
        What the sequences of a step are, and how they are dealt to its micro-batches. ``"mixed"``:
        each is of a random domain. ``"by-domain"``: all of a micro-batch are of one domain, and
        domains take turns in random order. ``"shuffled"``: the same sequences in each step as
        ``"by-domain"``, dealt out at random.
    accumulation
        Micro-batches of a step; divides `batch_size`, which stays the number of sequences in it.

    Raises
    ------
    DataError
        If a number is out of range or a word unknown.

    Notes
    -----
    Routers whose choice for a token depends on later ones (``"expert-choice"``, ``"soft"``,
    ``"merged"``) cannot be judged as language models and are refused; ``"domain"`` would have to be
    told each document's domain. With a capacity, a document's loss depends on those in its batch.
    Where the number of choices varies (``"threshold"``), size is matched for one expert per token:
    compare by operations. The router that ``ROUTERS`` calls ``"dense"`` is not on offer: the
    word stands for a decoder without a mixture.

    References
    ----------
    Weilin Cai, Juyong Jiang, Fan Wang, Jing Tang, Sunghun Kim and Jiayi Huang. "A Survey on
    Mixture of Experts in Large Language Models". TKDE 2025. arXiv:2407.06204.

    Examples
    --------
    >>> problem = LayerProblem("smoke", n_tokens=20_000)  # doctest: +SKIP
    >>> Study(problem, layer_designs(), reference="dense").run()  # doctest: +SKIP
    """

    question = "which mixture-of-experts layer"

    def __init__(
        self,
        texts: DomainTexts | Size | None = None,
        *,
        match: Match = "tokens",
        batching: Batching = "mixed",
        accumulation: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(texts, **options)
        if match not in MATCHES:
            raise DataError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")
        self.match, self.batching, self.accumulation = match, batching, accumulation
        _check_batches(batching, accumulation, self.batch_size)

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """`LAYER_METRICS`."""
        return LAYER_METRICS

    def _version(self) -> int:
        return _VERSION

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSIONS.get(method, self._version()))

    def _facts(self) -> dict[str, object]:
        return {
            **super()._facts(),
            "match": self.match,
            "batches": [self.batching, self.accumulation],
        }

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        matched = {
            "tokens": "every design reads the same tokens; by default an expert is as wide as the "
            "dense layer divided by the experts that a token meets, so that a token's cost is the "
            "dense decoder's and the gate's",
            "flops": "a design reads as many tokens as make the operations of its forward passes, "
            "counted as they run, those of the dense decoder",
        }
        batches = {
            "mixed": "sequences of random domains",
            "by-domain": "sequences of one domain in a micro-batch, domains in turn",
            "shuffled": "as many sequences of each domain as by domain, dealt out at random",
        }
        return {
            **super().describe(),
            "matched": matched[self.match],
            "batches": f"{batches[self.batching]}; {self.accumulation} micro-batches of "
            f"{self.batch_size // self.accumulation} sequences in a step",
            "experts' figures": "of each layer on the held-out documents (information: of each "
            "pair of neighbouring layers, normalised mutual information of first choices); a dense "
            "layer is one expert: balance 1, the others 0",
            "left out": "routers that look at later tokens (expert choice, soft, merged)",
        }

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        check_method(design, _methods(), self.question)
        check_parameters(design, _accepted(design.method))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _check_batches(*self._batches_of(design), self.batch_size)
                if design.method == _DENSE:
                    self._check_dense(design.params.get("width", 1))
                else:
                    self._check_layer(design)
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def _check_dense(self, width: Any) -> None:
        _at_least("width", width, 1)
        if width > 1 and not self.from_scratch:
            _width_name(self._base().model.config.get_text_config(), self._dense_width())

    def _check_layer(self, design: Design) -> None:
        from bakeoff.experts.conversion import layer_numbers

        layer = _read(design, copies=not self.from_scratch)
        numbers = layer_numbers(self._n_layers(), layer.every, layer.dense_first)
        width = self._dense_width()
        if layer.granularity > 1 and (width is None or width % layer.granularity):
            raise DataError(
                f"the dense layer's width of {width or 'unknown form'} cannot be divided by "
                f"granularity={layer.granularity} (by default k + shared): choose another"
            )
        if layer.experts % layer.granularity:
            raise DataError(
                f"granularity={layer.granularity} (by default k + shared) must divide experts="
                f"{layer.experts}"
            )
        if width is None and layer.shared:
            raise DataError("shared experts need a feed-forward layer of known form")
        _check_settings(layer, len(numbers))

    # -- training --------------------------------------------------------------------------------

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        import torch

        from bakeoff.experts.causal_training import train_causal
        from bakeoff.experts.conversion import save_moe
        from bakeoff.experts.mixture_of_experts import after_optimizer_step

        with torch.random.fork_rng(devices=[]):
            model = self._model(design, seed)
            steps = self.steps_of(model)
            # After all that is loaded and made: that may have drawn numbers or not.
            torch.manual_seed(_derived(seed, _TRAINING))
            _, accumulation = self._batches_of(design)
            train_causal(
                model,
                self.batches(design, seed),
                steps=steps,
                peak_learning_rate=self.learning_rate,
                warmup_steps=steps // 10,
                accumulation=accumulation,
                after_step=lambda: after_optimizer_step(model),
                progress=counting(work.progress, "training", (0.0, 0.8)),
            )
            scores = self._scores(model, work)
            read = steps * self.batch_size * self.context
            cost = self.cost(model, read)
        cost["training_flops"] = _PASSES * cost["forward_flops_per_token"] * read
        folder = work.directory / "model"
        if design.method == _DENSE:
            self.save_model(model, folder)
        else:
            save_moe(model, folder)
            self.tokenizer.save_pretrained(folder)
        notes = (f"Read {read:,} tokens.",) if self.match == "flops" else ()
        return Trial(scores=scores, cost=cost, artifact=work.directory, notes=notes)

    def steps_of(self, model: Any) -> int:
        """Return the number of steps that `match` allows a model."""
        if self.match == "tokens":
            return self.n_steps
        dense = forward_flops_per_token(self.start(0), self.rows())
        share = dense / forward_flops_per_token(model, self.rows())
        return max(1, int(self.n_tokens * share) // (self.batch_size * self.context))

    def batches(self, design: Design, seed: int) -> Iterator[Tensor]:
        """Yield the micro-batches that a design reads: ``(sequences, context)`` int64, no end.

        Each step's sequences are the same whatever the design's own `accumulation`.
        """
        batching, accumulation = self._batches_of(design)
        n_rows = self.batch_size // accumulation
        for step in _steps(self.rows(), batching, self.batch_size, self.accumulation, seed):
            yield from (step[first : first + n_rows] for first in range(0, len(step), n_rows))

    def _batches_of(self, design: Design) -> tuple[str, int]:
        return (
            design.params.get("batching", self.batching),
            design.params.get("accumulation", self.accumulation),
        )

    def _model(self, design: Design, seed: int) -> Any:
        """Return the decoder of a design before training."""
        model = self.start(seed)
        if design.method == _DENSE:
            times = int(design.params.get("width", 1))
            return _widened(model, times, _derived(seed, _EXPERTS), as_before=not self.from_scratch)
        layer = _read(design, copies=not self.from_scratch)
        return _mixture(model, layer, seed, from_scratch=self.from_scratch)

    def _scores(self, model: Any, work: Work) -> Scores:
        from bakeoff.experts.conversion import decoder_layers
        from bakeoff.experts.inspection import inspect_experts

        losses = self.losses(model, counting(work.progress, "losses", (0.8, 0.95)))
        n_layers = len(decoder_layers(model)[1])
        report, numbers = None, []
        if hasattr(model, "moe_layers_at"):
            _, numbers = model.moe_layers_at
            batches = [
                {name: values.to(self.device) for name, values in batch.items()}
                for batch in self.batches_to_inspect()
            ]
            report = inspect_experts(model, batches, self.texts.domains)
        figures = _figures(report, numbers, n_layers)
        return {"loss": losses, **{name: {HELD_OUT: values} for name, values in figures.items()}}

    def _n_layers(self) -> int:
        if self.from_scratch:
            return self.shape.n_layers
        if self.n_layers is not None:
            return self.n_layers
        return int(self._base().model.config.get_text_config().num_hidden_layers)

    def _dense_width(self) -> int | None:
        """Return the width of the base's feed-forward layers; None if their form is unknown."""
        if self.from_scratch:
            return 4 * self.shape.width
        return _feed_forward_width(self._base().model)

    # -- the winner ------------------------------------------------------------------------------

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a trained decoder with its tokenizer and how to use it.

        Returns
        -------
        bool
            Whether transformers loads the folder by itself: True for a dense design.
        """
        self.save_winner(
            design,
            artifact,
            destination,
            reason,
            "\n".join(["```python", *self.usage(destination, design.method == _DENSE), "```"]),
        )
        return design.method == _DENSE

    def usage(self, destination: Path, dense: bool | None = None) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        if dense is None:
            dense = not (destination / "moe.json").is_file()
        load = (
            ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
            if dense
            else ["from transformers import AutoTokenizer", "from bakeoff.experts import load_moe"]
        )
        made = "AutoModelForCausalLM.from_pretrained" if dense else "load_moe"
        return [
            *load,
            f"model = {made}({str(destination)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(destination)!r})",
            "ids = tokenizer('The ', return_tensors='pt').input_ids",
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))",
        ]


# -- reading a design ------------------------------------------------------------------------------


def _known_routers() -> dict[str, type[Any]]:
    """Return the class of every router that can stand in a decoder, by its name or preset's."""
    from bakeoff.experts import assignment_routers, fixed_routers, soft_routers  # noqa: F401
    from bakeoff.experts.routers import PRESETS, ROUTERS

    told = ("domain", _DENSE)  # nobody tells a decoder a document's domain
    usable = {n: r for n, r in ROUTERS.items() if r.is_causal and n not in told}
    return {**usable, **{name: ROUTERS[preset["name"]] for name, preset in PRESETS.items()}}


def _methods() -> tuple[str, ...]:
    return (_DENSE, *_known_routers(), _RECURRENT)


def _router_parameters(method: str) -> tuple[str, ...]:
    if method == _RECURRENT:
        from bakeoff.experts.recurrent_router import RecurrentRouter

        names = list(inspect.signature(RecurrentRouter).parameters)
        sizes = ("hidden_size", "num_experts", "num_layers", "top_k", "generator")
        return ("k", *(name for name in names if name not in sizes))
    kind = cast(Any, _known_routers()[method])
    return tuple(item.name for item in fields(kind) if item.name not in _SET_HERE)


def _accepted(method: str) -> tuple[str, ...]:
    if method == _DENSE:
        return ("width", *_BATCH_PARAMETERS)
    return (*_router_parameters(method), *_LAYER_PARAMETERS, *_BATCH_PARAMETERS)


def _read(design: Design, *, copies: bool) -> _Layer:
    """Return a design's layer; `copies` is the default start.

    Raises
    ------
    DataError
        If a number is out of range or a word unknown.
    """
    from bakeoff.experts.routers import PRESETS

    params, method = dict(design.params), design.method
    own = {name: params[name] for name in _router_parameters(method) if name in params}
    router = {"name": method, **own}
    if method == _RECURRENT:
        k = own.get("k", 2)
    else:
        settings = {**PRESETS.get(method, {}), **own}
        k = settings.get("k", getattr(_known_routers()[method], "k", 1))
    experts, shared = params.get("experts", 8), params.get("shared", 0)
    for name, value, least in (("experts", experts, 1), ("k", k, 1), ("shared", shared, 0)):
        _at_least(name, value, least)
    granularity = params.get("granularity", k + shared)
    _at_least("granularity", granularity, 1)
    start = params.get("start", "copy" if copies else "random")
    if start not in ("copy", "random"):
        raise DataError(f"start must be 'copy' or 'random', got {start!r}")
    capacity = params.get("capacity")
    if isinstance(capacity, list):
        if len(capacity) != 2:
            raise DataError(f"capacity must be a number or two, got {capacity}")
        capacity = (capacity[0], capacity[1])
    return _Layer(
        router=router,
        k=k,
        experts=experts,
        granularity=granularity,
        shared=shared,
        losses=_losses(params, method),
        capacity=capacity,
        drop=params.get("drop", "probs"),
        every=params.get("every", 1),
        dense_first=params.get("dense_first", 0),
        copies=start == "copy",
    )


def _losses(params: Mapping[str, Any], method: str) -> tuple[dict[str, Any], ...]:
    """Return the settings of a design's losses."""
    from bakeoff.experts.balance_losses import LOSSES

    default = None if method in (*_FIXED, *_BALANCE_THEMSELVES) else "switch-balance"
    balance = params.get("balance", default)
    z_loss = params.get("z_loss", 0.0 if method in _FIXED else 1e-3)
    if not isinstance(z_loss, int | float) or not 0 <= z_loss < math.inf:
        raise DataError(f"z_loss must be a number of at least 0, got {z_loss!r}")
    losses = []
    given = {name: params[name] for name in ("coefficient", "scope") if name in params}
    if balance is None:
        if given:
            raise DataError(f"{', '.join(given)} goes with a balance loss, there is none")
    else:
        loss = {"name": balance} if isinstance(balance, str) else dict(balance)
        if "coefficient" in given and loss.get("name") in LOSSES:
            names = inspect.signature(LOSSES[loss["name"]]).parameters
            loss["coef" if "coef" in names else "coefficient"] = given["coefficient"]
        if "scope" in given:
            loss["scope"] = given["scope"]
        losses.append(loss)
    if z_loss:
        losses.append({"name": "z-loss", "coefficient": float(z_loss)})
    return tuple(losses)


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _check_batches(batching: Any, accumulation: Any, batch_size: int) -> None:
    if batching not in BATCHINGS:
        raise DataError(f"batching must be one of {', '.join(BATCHINGS)}, got {batching!r}")
    _at_least("accumulation", accumulation, 1)
    if batch_size % accumulation:
        raise DataError(f"accumulation must divide batch_size={batch_size}, got {accumulation}")


def _derived(seed: int, purpose: int) -> int:
    """Return a seed for one purpose: the same one for two would draw the same numbers twice."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


# -- batches ---------------------------------------------------------------------------------------


def _steps(
    rows: Mapping[str, Tensor], batching: str, batch_size: int, accumulation: int, seed: int
) -> Iterator[Tensor]:
    """Yield the sequences of each step, ``(batch_size, context)``, in the order of its parts."""
    import torch

    from bakeoff.experts.causal_training import domain_batches

    if batching == "mixed":
        yield from domain_batches(rows, batch_size=batch_size, seed=seed)
        return
    generator = torch.Generator().manual_seed(_derived(seed, _ORDER))
    dealing = torch.Generator().manual_seed(_derived(seed, _DEALING))
    domains = list(rows.values())
    turns: list[int] = []
    queues: list[list[int]] = [[] for _ in domains]
    while True:
        parts = []
        for _ in range(accumulation):
            if not turns:
                turns = torch.randperm(len(domains), generator=generator).tolist()
            number = turns.pop()
            for _ in range(batch_size // accumulation):
                if not queues[number]:
                    order = torch.randperm(len(domains[number]), generator=generator)
                    queues[number] = order.tolist()
                parts.append(domains[number][queues[number].pop()])
        step = torch.stack(parts)
        if batching == "shuffled":
            step = step[torch.randperm(batch_size, generator=dealing)]
        yield step


# -- layers ----------------------------------------------------------------------------------------


def _routers(layer: _Layer, vocabulary: int, seed: int) -> Any:
    """Return what `to_moe` makes the layers' routers of."""
    from bakeoff.experts.routers import ROUTERS

    settings = dict(layer.router)
    name = settings["name"]
    if name == "hash":
        settings["vocabulary"] = vocabulary
    if name not in _FIXED or "seed" in settings:
        return settings
    # What is fixed differs from layer to layer: two that agree would be one, twice.
    del settings["name"]
    numbers = itertools.count()
    return lambda: ROUTERS[name](**settings, seed=_derived(seed, _FIRST_LAYER + next(numbers)))


def _check_settings(layer: _Layer, n_layers: int) -> None:
    """Make one layer of the design's settings, but of few weights.

    Raises
    ------
    DataError
        If a setting is unknown or impossible.
    """
    import torch

    from bakeoff.experts.mixture_of_experts import MoE
    from bakeoff.experts.recurrent_router import make_layer_routers

    hidden = 8
    options: dict[str, Any] = {"capacity": layer.capacity, "drop": layer.drop, "aux": layer.losses}
    with torch.random.fork_rng(devices=[]):
        router = _routers(layer, 1, 0)
        if layer.router["name"] == _RECURRENT:
            router = make_layer_routers(router, hidden, layer.experts, n_layers)[0]
        elif callable(router):
            router = router()
        MoE(hidden, layer.experts, router, width=1, causal=True, **options)


def _mixture(model: Any, layer: _Layer, seed: int, *, from_scratch: bool) -> Any:
    """Turn a dense decoder into a design's mixture, in place, and return it."""
    import torch

    from bakeoff.experts.conversion import to_moe
    from bakeoff.experts.feed_forward import FeedForwardExperts
    from bakeoff.experts.mixture_of_experts import moe_layers

    config = model.config.get_text_config()
    to_moe(
        model,
        layer.experts,
        _routers(layer, config.vocab_size, seed),
        granularity=layer.granularity,
        every=layer.every,
        dense_first=layer.dense_first,
        aux=layer.losses,
        seed=_derived(seed, _ROUTERS),
        shared=layer.shared,
        scale=layer.scale,
        capacity=layer.capacity,
        drop=layer.drop,
    )
    generator = torch.Generator().manual_seed(_derived(seed, _EXPERTS))
    deviation = float(getattr(config, "initializer_range", 0.02))
    for mixture in moe_layers(model).values():
        bank, shared = mixture.experts, mixture.shared
        if isinstance(shared, FeedForwardExperts) and isinstance(bank, FeedForwardExperts):
            _join(bank, shared, layer.shared)
        if layer.copies:
            continue
        if not isinstance(bank, FeedForwardExperts):
            raise DataError("start='random' needs feed-forward layers of known form")
        # Random weights are as good as others: one copy of the dense layer's may stay.
        _draw(bank, layer.granularity if from_scratch else 0, deviation, generator)
        if isinstance(shared, FeedForwardExperts):
            _draw(shared, 0, deviation, generator)
    return model


def _join(bank: FeedForwardExperts, shared: FeedForwardExperts, n_parts: int) -> None:
    """Make a shared expert of the first experts, which are parts of the dense layer."""
    import torch

    parts = [number % bank.n_experts for number in range(n_parts)]

    def joined(weights: Tensor) -> Tensor:
        # A gated layer's first matrix holds all gates, then all values.
        halves = [weights[part].chunk(2 if bank.gated else 1) for part in parts]
        return torch.cat([half for side in zip(*halves, strict=True) for half in side])

    with torch.no_grad():
        shared.w_in[0] = joined(bank.w_in)
        shared.w_out[0] = torch.cat([bank.w_out[part] for part in parts], dim=1)
        if bank.b_in is not None and shared.b_in is not None:
            shared.b_in[0] = joined(bank.b_in)
        if bank.b_out is not None and shared.b_out is not None:
            shared.b_out[0] = bank.b_out[parts].sum(dim=0)


def _draw(bank: FeedForwardExperts, first: int, deviation: float, generator: Any) -> None:
    """Draw the weights of the experts from number `first` on, as transformers draws a layer's."""
    import torch

    with torch.no_grad():
        for weights in (bank.w_in, bank.w_out):
            drawn = torch.randn(weights[first:].shape, generator=generator)
            weights[first:] = (deviation * drawn).to(weights)
        for bias in (bank.b_in, bank.b_out):
            if bias is not None:
                bias[first:] = 0


def _feed_forward_width(model: Any) -> int | None:
    """Return the width of a decoder's feed-forward layers; None if their form is unknown."""
    from bakeoff.experts.conversion import decoder_layers, read_feed_forward

    _, stack = decoder_layers(model)
    read = (read_feed_forward(child) for child in stack[0].children())
    return next((each.width for each in read if each is not None), None)


def _width_name(config: Any, width: int | None) -> str:
    """Return what a configuration calls the feed-forward layers' width.

    Raises
    ------
    DataError
        If it has no such number.
    """
    names = [name for name in _WIDTH_NAMES if hasattr(config, name)]
    if width is None or not names:
        raise DataError(f"the form of {config.model_type}'s feed-forward layers is unknown")
    return names[0]


def _widened(model: Any, times: int, seed: int, *, as_before: bool) -> Any:
    """Return a dense decoder with feed-forward layers so many times as wide.

    All that was there keeps its weights. With `as_before`, what leaves the new inner features
    starts at zero, so that the decoder computes what it did.
    """
    import torch

    if times == 1:
        return model
    width = _feed_forward_width(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    name = _width_name(text, width)
    setattr(text, name, times * cast(int, width))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = type(model)(config)
    given = model.state_dict()
    with torch.no_grad():
        for key, weights in wide.state_dict().items():
            old = given[key]
            if weights.shape == old.shape:
                weights.copy_(old)
                continue
            if as_before and key.split(".")[-2] in _OUT_NAMES:
                weights.zero_()
            # Gates and values may be stacked in one matrix: each half has a place of its own.
            halves = 2 if "gate_up" in key else 1
            for new, kept in zip(weights.chunk(halves), old.chunk(halves), strict=True):
                new[tuple(slice(size) for size in kept.shape)] = kept
    return wide.to(model.device, model.dtype).eval()


# -- figures ---------------------------------------------------------------------------------------


def _figures(
    report: ExpertReport | None, numbers: list[int], n_layers: int
) -> dict[str, NDArray[np.float64]]:
    """Return the figures of each layer, or pair of layers; a dense layer is one expert.

    Parameters
    ----------
    report
        Of the mixture layers; None if there is none.
    numbers
        Which layers they are.
    n_layers
        Of the decoder.
    """
    found = {name: np.zeros(n_layers) for name in LAYER_METRICS if name != "loss"}
    found["balance"][:] = 1.0
    found["layer_information"] = np.zeros(max(1, n_layers - 1))
    if report is None:
        return found
    for number, layer in zip(numbers, report.layers, strict=True):
        found["balance"][number] = layer.max_over_mean
        found["specialisation"][number] = np.nan_to_num(layer.specialisation)
        found["entropy"][number] = layer.entropy
        found["drops"][number] = layer.drop_rate
    for place, (first, second) in enumerate(itertools.pairwise(numbers)):
        if second == first + 1:
            found["layer_information"][first] = report.redundancy[place, place + 1]
    return found
