"""How to merge specialists into a mixture: one seed, the same specialists, one budget of tokens.

Three phases, as in Branch-Attend-Mix. A seed reads texts of all domains. A copy of it per domain is
trained on: nine tenths of the domain, a tenth of all. A design then merges seed and specialists,
and the result reads equal shares of the domains. Under one seed of randomness all designs merge the
same models; these are kept on disk, so that k designs cost little more than one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import build_once, cache_directory, write_text
from bakeoff.data.domain_texts import DomainTexts, Size
from bakeoff.errors import DataError
from bakeoff.experts.problem.common import (
    LOSS,
    SMALL_SHAPE,
    DomainProblem,
    Scores,
    forward_flops_per_token,
)
from bakeoff.models.inference import evaluating
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting

if TYPE_CHECKING:
    from bakeoff.experts.bam import MixtureCost

Match = Literal["tokens", "flops"]

UPCYCLING_METRICS: dict[str, Metric] = {
    "loss": LOSS,
    "balance": Metric("heaviest feed-forward load over mean", higher_is_better=False, margin=0.05),
    "specialisation": Metric("feed-forward specialisation (0 to 1)", margin=0.02),
}
"""Loss of held-out documents; per layer, the load of the experts and how domains differ in it."""

_QUESTION = "how to merge specialists into a mixture"
_ROUTING = ("normalize_ffn", "load_balance_coefficient", "router_z_coefficient", "router_init_std")
_MIXING = ("ffn_top_k", *_ROUTING, "mixing", "match")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "bam": ("attn_routing", *_MIXING),
    "bam-shared-kv": ("attn_routing", *_MIXING),
    "btx": _MIXING,
    "btx-larger": ("n_experts", *_MIXING),
    "average": ("mixing",),
    "best-single": ("mixing",),
    "known-domain": ("mixing",),
    "dense-continued": (),
    "seed": (),
}
# What `upcycle` is told by the method itself; the rest is the design's to say.
_UPCYCLED: dict[str, dict[str, Any]] = {
    "bam": {},
    "bam-shared-kv": {"share_kv": True},
    "btx": {"method": "btx"},
    "btx-larger": {"method": "btx", "ffn_top_k": 3},
}
_NO_SPECIALISTS = ("dense-continued", "seed")
_MORE_EXPERTS = 6
_OWN_SHARE = 0.9
_SPECIALIST_RATE = 0.5
_WARM_UP = 0.1
# Rows of each domain on which the best specialist is chosen.
_ROWS_TO_CHOOSE_BY = 8
# Batches of each domain's held-out documents that say what the experts do.
_BATCHES_TO_INSPECT = 2
_DOMAINS_FILE = "domains.json"
_MIXTURE_TYPE = "bakeoff-upcycled"
# Numbers that keep the random orders of the phases apart.
_SEED, _SPECIALIST, _MIX, _CONTINUED, _CHOICE = range(5)
# Raise when training or judging changes what a trial scores.
_VERSION = 1
# Raise when what is kept on disk of the first two phases changes.
_PHASES_VERSION = 1


def upcycling_designs() -> Designs:
    """Return the ways of merging, their variants, and the rivals a sceptic would choose.

    Examples
    --------
    >>> [design.name for design in upcycling_designs()][:3]
    ['dense, trained on', 'BAM', 'BAM, shared keys and values']
    """
    return Designs(
        [
            Design("dense, trained on", "dense-continued"),
            Design("BAM", "bam"),
            Design("BAM, shared keys and values", "bam-shared-kv"),
            Design("BAM, top-1 attention", "bam", {"attn_routing": 1}),
            Design("BAM, top-2 attention", "bam", {"attn_routing": 2}),
            Design("BAM, normalised top-2", "bam", {"ffn_top_k": 2, "normalize_ffn": True}),
            Design("BAM, equal compute", "bam", {"match": "flops"}),
            Design("BAM, before mixing", "bam", {"mixing": 0}),
            Design("BTX", "btx"),
            Design("BTX, normalised top-2", "btx", {"ffn_top_k": 2, "normalize_ffn": True}),
            Design("BTX, 6 experts, top-3", "btx-larger"),
            # With feed-forward layers three times as large as attention (the paper's are half
            # that), this one has BAM's weights, in all and active.
            Design("BTX, 5 experts, top-2", "btx-larger", {"n_experts": 5, "ffn_top_k": 2}),
            Design("BTX, before mixing", "btx", {"mixing": 0}),
            Design("average", "average"),
            Design("average, before mixing", "average", {"mixing": 0}),
            Design("best specialist", "best-single"),
            Design("known domain", "known-domain"),
            Design("known domain, before mixing", "known-domain", {"mixing": 0}),
            Design("seed", "seed"),
        ]
    )


@dataclass(frozen=True)
class Phases:
    """Steps of each phase, of `batch_size` sequences.

    Parameters
    ----------
    seed
        Of the model that specialists start from; 0 where it is given.
    specialist
        Of each specialist.
    mixing
        Of what is merged.
    """

    seed: int
    specialist: int
    mixing: int


class UpcyclingProblem(DomainProblem):
    """How to merge specialists into a mixture: same seed, same specialists, same tokens.

    A trial's number draws the first weights, the routers' and the order of texts. It is the same
    for all designs: under one number all merge the same models and go on with the same batches.

    Methods and their parameters:

    ``"bam"``, ``"bam-shared-kv"``, ``"btx"``, ``"btx-larger"``
        `bakeoff.experts.bam.upcycle`, whose arguments they take (`ffn_top_k`, `normalize_ffn`,
        `attn_routing` and the rest); the seed is an expert. The last has `n_experts`, 6 unless
        given: those beyond seed and specialists are further copies of the specialists in turn, so
        that they cost no tokens.
    ``"average"``
        The mean of the weights of seed and specialists.
    ``"dense-continued"``
        The seed, trained on with the tokens of all specialists and of mixing, in one go.
    ``"best-single"``
        The specialist whose loss on training rows of all domains is least, trained on.
    ``"known-domain"``
        A document is read by its own domain's specialist; each has gone on with its part of the
        mixing tokens, of which nine tenths and more are of its domain. No merger: what routing
        could gain if it were certain.
    ``"seed"``
        As it is after the first phase.

    Most take `mixing`, from 0 (judged as merged) to 1: how much of the mixing phase's tokens they
    read; mixtures also `match`, in place of the problem's.

    Parameters
    ----------
    texts
        At least two domains; or a size of the default ones (``"smoke"``, ``"demo"``, ``"full"``).
    base
        ``"small-parallel"``, a small decoder with random weights whose blocks are parallel as in
        the paper, or ``"small-gpt"``, whose are not; or a packaged name, folder or hub id, which is
        then itself the seed: there is no first phase.
    n_layers
        Keep only the first layers of a model that is named.
    shape
        Of the small decoder.
    n_tokens
        Tokens of all three phases and all specialists together.
    shares
        How they are divided among seed, specialists and mixing, in any unit; of a model that is
        named, the first is left out. The paper's small models had 4 : 3 : 1.
    match
        ``"tokens"``: all designs read the same number in the mixing phase. ``"flops"``: a design
        whose forward pass costs more operations than the dense model's reads fewer in proportion.
    context, batch_size, device
        As of every such problem.
    learning_rate
        Peak rate of the seed and of mixing; specialists have half of it.

    Raises
    ------
    DataError
        If a number is out of range, there are fewer than two domains, a domain has too few
        documents, or there is no such base.
    """

    question = _QUESTION

    def __init__(
        self,
        texts: DomainTexts | Size | None = None,
        *,
        base: str = "small-parallel",
        n_layers: int | None = None,
        shape: SmallGPT = SMALL_SHAPE,
        n_tokens: int = 430_000,
        shares: tuple[float, float, float] = (0.35, 0.42, 0.23),
        match: Match = "tokens",
        context: int | None = None,
        batch_size: int = 4,
        learning_rate: float | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(
            texts,
            base=base,
            n_layers=n_layers,
            shape=shape,
            n_tokens=n_tokens,
            context=context,
            batch_size=batch_size,
            learning_rate=learning_rate,
            device=device,
        )
        if len(self.texts.domains) < 2:
            raise DataError(
                f"there must be at least 2 domains, each with a specialist of its own; got "
                f"{', '.join(self.texts.domains)}"
            )
        _check_match(match)
        self.match = match
        self.shares = _checked_shares(shares, self.from_scratch)

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The loss of held-out documents; balance and specialisation of feed-forward experts."""
        return UPCYCLING_METRICS

    @property
    def phases(self) -> Phases:
        """Steps of each phase: as many as its part of the tokens holds, at least one if it has any.

        ``seed + n_domains * specialist + mixing`` steps are the whole budget.
        """
        parts = list(self.shares)
        if not self.from_scratch:
            parts[0] = 0.0
        tokens = [self.n_tokens * part / sum(parts) for part in parts]
        tokens[1] /= len(self.texts.domains)
        of_batch = self.batch_size * self.context
        # A share like 0.1 of a million is 100,000, whatever floating point makes of it.
        steps = [max(1, int(some + 1e-6) // of_batch) if some else 0 for some in tokens]
        return Phases(*steps)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        from bakeoff.experts.upcycled_model import UpcycledConfig

        check_method(design, tuple(_PARAMETERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        try:
            _mixing(design)
            _check_match(design.params.get("match", self.match))
            if design.method in _UPCYCLED:
                n_experts = self._n_experts(design)
                UpcycledConfig(n_experts=n_experts, **_settings(design))
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        phases, n_domains = self.phases, len(self.texts.domains)
        of_batch = self.batch_size * self.context
        seed = (
            f"a seed of {phases.seed * of_batch:,} on all domains"
            if self.from_scratch
            else "the seed is given"
        )
        matched = {
            "tokens": "every design reads as many tokens in the mixing phase",
            "flops": "a design reads fewer tokens in the mixing phase in proportion to its "
            "operations per token, counted over a forward pass",
        }
        return {
            **super().describe(),
            "budget": f"{self.n_tokens:,} tokens: {seed}; {n_domains} specialists of "
            f"{phases.specialist * of_batch:,}, nine tenths of their own domain and a tenth of "
            f"all; mixing of {phases.mixing * of_batch:,} in equal shares. Sequences of "
            f"{self.context}, batches of {self.batch_size}, learning rate {self.learning_rate:g}, "
            f"specialists {_SPECIALIST_RATE * self.learning_rate:g}",
            "matched": f"{matched[self.match]}; the dense model trained on reads those of all "
            "phases",
            "layers": "balance and specialisation are of feed-forward experts, a layer is a unit; "
            "seen on the first held-out documents of each domain; a dense model has 1 and 0",
        }

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check designs and base; train the seeds and specialists that the designs share.

        These are kept in the cache. A model of P parameters takes 4 P bytes for the seed and for
        each specialist.
        """
        from bakeoff.experts.upcycled_model import check_convertible

        super().prepare(designs, seeds, work)
        if any(design.method in _UPCYCLED for design in designs):
            check_convertible(self.start(0))
        specialists = any(design.method not in _NO_SPECIALISTS for design in designs)
        for number, seed in enumerate(seeds):
            part = (number / len(seeds), (number + 1) / len(seeds))
            if specialists:
                self._branched(seed, work, part)
            else:
                self._seed_model(seed, counting(work.progress, "training the seed", part))

    def _version(self) -> int:
        return _VERSION

    def _facts(self) -> dict[str, object]:
        return {**super()._facts(), "shares": list(self.shares), "match": self.match}

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        if design.method == "known-domain":
            return self._known_domain(design, seed, work)
        of_batch = self.batch_size * self.context
        phases, n_domains = self.phases, len(self.texts.domains)
        notes: list[str] = []
        if design.method in _NO_SPECIALISTS:
            report = counting(work.progress, "training the seed", (0.0, 0.5))
            model = self._seed_model(seed, report)
            steps_before, order = phases.seed, _order(seed, _CONTINUED)
            steps = n_domains * phases.specialist + phases.mixing
            steps *= design.method == "dense-continued"
            dense_flops = flops = forward_flops_per_token(model, self.rows())
        else:
            models = self._branched(seed, work, (0.0, 0.5))
            steps_before, order = phases.seed + n_domains * phases.specialist, _order(seed, _MIX)
            dense_flops = forward_flops_per_token(models[0], self.rows())
            model = self._merged(design, models, seed, notes)
            flops = forward_flops_per_token(model, self.rows())
            steps = self._mixing_steps(design, dense_flops / flops)
        report = counting(work.progress, "training what was merged", (0.5, 0.9))
        self._train(model, None, steps, self.learning_rate, order, report)
        scores = self._scores(model, work)
        self.save_model(model, work.directory / "model")
        tokens = (steps_before + steps) * of_batch
        cost = self.cost(model, tokens, active=self._active(model))
        # Forward and backward pass together take three times the operations of the forward pass.
        spent = 3 * of_batch * (steps_before * dense_flops + steps * flops)
        cost["training_flops"] = float(spent)
        return Trial(scores, cost, work.directory, tuple(notes))

    # -- the phases ------------------------------------------------------------------------------

    def _seed_model(self, seed: int, progress: Callable[[int, int], None] | None = None) -> Any:
        """Return the model that specialists start from."""
        model = self.start(seed)
        steps = self.phases.seed
        order = _order(seed, _SEED)

        def train() -> None:
            self._train(model, None, steps, self.learning_rate, order, progress)

        self._kept(model, {"phase": "seed", "seed": seed}, steps, train)
        return model

    def _branched(self, seed: int, work: Work, part: tuple[float, float]) -> list[Any]:
        """Return the seed model and a specialist of each domain, on disk afterwards."""
        first, last = part
        edges = np.linspace(first, last, len(self.texts.domains) + 2).tolist()
        report = counting(work.progress, "training the seed", (edges[0], edges[1]))
        models = [self._seed_model(seed, report)]
        for number, domain in enumerate(self.texts.domains):
            report = counting(
                work.progress,
                f"training a specialist, {domain}",
                (edges[number + 1], edges[number + 2]),
            )
            models.append(self._specialist(models[0], domain, number, seed, report))
        return models

    def _specialist(
        self,
        start: Any,
        domain: str,
        number: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        model = copy.deepcopy(start)
        steps, rate = self.phases.specialist, _SPECIALIST_RATE * self.learning_rate
        order = _order(seed, _SPECIALIST, number)

        def train() -> None:
            self._train(model, self._own_shares(domain), steps, rate, order, progress)

        what = {"phase": "specialist", "seed": seed, "domain": domain}
        self._kept(model, what, steps, train)
        return model

    def _own_shares(self, domain: str) -> dict[str, float]:
        """Return what a specialist reads: its domain, and a little of all, that one included."""
        domains = self.texts.domains
        general = (1 - _OWN_SHARE) / len(domains)
        return {name: general + _OWN_SHARE * (name == domain) for name in domains}

    def _train(
        self,
        model: Any,
        shares: Mapping[str, float] | None,
        steps: int,
        learning_rate: float,
        order: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Train on the domains in given shares, equal ones if None; nothing happens in 0 steps."""
        import torch

        from bakeoff.experts.causal_training import domain_batches, train_causal

        if not steps:
            return
        batches = domain_batches(self.rows(), shares, batch_size=self.batch_size, seed=order)
        with torch.random.fork_rng(devices=[] if self.device == "cpu" else None):
            torch.manual_seed(order)  # dropout, where a model has it
            train_causal(
                model,
                batches,
                steps=steps,
                peak_learning_rate=learning_rate,
                warmup_steps=max(1, round(_WARM_UP * steps)),
                progress=progress,
            )

    def _kept(
        self, model: Any, what: Mapping[str, object], steps: int, train: Callable[[], None]
    ) -> None:
        """Give a model the weights that training leaves it with: trained once, kept on disk."""
        from safetensors.torch import load_model, save_model

        if not steps:
            return
        facts = self._facts()
        known = {
            **{name: facts[name] for name in ("texts", "base", "n_layers")},
            "training": [self.context, self.batch_size, self.learning_rate, self.device],
            # Only the phases up to this one: other mixing phases share it.
            "steps": [self.phases.seed, steps],
            "version": _PHASES_VERSION,
            **what,
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]

        def build(folder: Path) -> None:
            train()
            save_model(model, str(folder / "model.safetensors"))

        folder = build_once(cache_directory() / "upcycling" / digest, build)
        # Read back even by the one that wrote it, so that who comes first makes no difference.
        load_model(model, folder / "model.safetensors", device=str(model.device))
        model.eval()

    # -- merging ---------------------------------------------------------------------------------

    def _merged(self, design: Design, models: list[Any], seed: int, notes: list[str]) -> Any:
        from bakeoff.experts.bam import average_models, upcycle

        if design.method == "average":
            return average_models(models)
        if design.method == "best-single":
            losses = [self._training_loss(model, seed) for model in models[1:]]
            best = int(np.argmin(losses))
            notes.append(f"The best specialist is that of {self.texts.domains[best]}.")
            return models[1 + best]
        given = list(models)
        while len(given) < self._n_experts(design):
            given.append(models[1 + (len(given) - len(models)) % (len(models) - 1)])
        return upcycle(given, seed=seed, **_settings(design))

    def _n_experts(self, design: Design) -> int:
        n_models = 1 + len(self.texts.domains)
        if design.method != "btx-larger":
            return n_models
        n_experts = design.params.get("n_experts", _MORE_EXPERTS)
        if isinstance(n_experts, bool) or not isinstance(n_experts, int) or n_experts < n_models:
            raise DataError(
                f"n_experts must be an integer of at least {n_models}, the seed and a specialist "
                f"of each domain, got {n_experts!r}"
            )
        return n_experts

    def _training_loss(self, model: Any, seed: int) -> float:
        """Return the mean loss over domains on a few rows that were trained on."""
        import torch

        generator = torch.Generator().manual_seed(_order(seed, _CHOICE))
        losses = []
        with evaluating(model), torch.no_grad():
            for rows in self.rows().values():
                drawn = torch.randperm(len(rows), generator=generator)[:_ROWS_TO_CHOOSE_BY]
                batch = rows[drawn].to(model.device)
                losses.append(float(model(input_ids=batch, labels=batch, use_cache=False).loss))
        return sum(losses) / len(losses)

    def _mixing_steps(self, design: Design, dense_over_own: float) -> int:
        """Return how many steps of the mixing phase a design has."""
        share = _mixing(design)
        if design.params.get("match", self.match) == "flops":
            share *= min(1.0, dense_over_own)
        steps = int(self.phases.mixing * share + 1e-9)
        return max(1, steps) if share and self.phases.mixing else 0

    def _known_domain(self, design: Design, seed: int, work: Work) -> Trial:
        """Train each specialist on by itself; judge it on its own domain alone."""
        phases, domains = self.phases, self.texts.domains
        models = self._branched(seed, work, (0.0, 0.5))
        flops = forward_flops_per_token(models[0], self.rows())
        steps = int(phases.mixing * _mixing(design) + 1e-9) // len(domains)
        losses: dict[str, NDArray[np.float64]] = {}
        edges = np.linspace(0.5, 1.0, len(domains) + 1).tolist()
        folders: dict[str, str] = {}
        for number, (domain, model) in enumerate(zip(domains, models[1:], strict=True)):
            report = counting(
                work.progress, f"training on, {domain}", (edges[number], edges[number + 1])
            )
            order = _order(seed, _MIX, number + 1)
            rate = self.learning_rate
            self._train(model, self._own_shares(domain), steps, rate, order, report)
            work.progress(edges[number + 1], f"judging, {domain}")
            losses[domain] = self.losses_of(domain, model)
            folders[domain] = f"specialist-{number}"
            self.save_model(model, work.directory / "model" / folders[domain])
        names = json.dumps(folders, ensure_ascii=False, indent=1)
        write_text(work.directory / "model" / _DOMAINS_FILE, names + "\n")
        n_steps = phases.seed + len(domains) * (phases.specialist + steps)
        tokens = n_steps * self.batch_size * self.context
        cost = self.cost(models[1], tokens)
        for name in ("total_parameters", "trained_parameters"):
            cost[name] *= len(domains)
        cost["training_flops"] = 3 * tokens * flops
        return Trial({"loss": losses, **_dense_layers(models[1])}, cost, work.directory)

    # -- judging ---------------------------------------------------------------------------------

    def _scores(self, model: Any, work: Work) -> Scores:
        report = counting(work.progress, "judging", (0.9, 1.0))
        losses = self.losses(model, report)
        return {"loss": losses, **self._layers(model)}

    def _layers(self, model: Any) -> Scores:
        """Return balance and specialisation of the feed-forward experts of each layer."""
        from bakeoff.experts.inspection import inspect_experts
        from bakeoff.experts.upcycled_model import FEED_FORWARD_NAMES, UpcycledForCausalLM

        if not isinstance(model, UpcycledForCausalLM):
            return _dense_layers(model)
        inspected: Counter[int] = Counter()
        batches = []
        for batch in self.batches_to_inspect():
            domain = int(batch["domains"][0])
            inspected[domain] += 1
            if inspected[domain] <= _BATCHES_TO_INSPECT:
                batches.append({name: part.to(model.device) for name, part in batch.items()})
        found = inspect_experts(model, batches, self.texts.domains)
        # The other routers are those of attention, where every expert counts.
        layers = [
            layer for layer in found.layers if layer.name.split(".")[-2] in FEED_FORWARD_NAMES
        ]
        return {
            "balance": {"layers": np.array([layer.max_over_mean for layer in layers])},
            "specialisation": {"layers": np.array([layer.specialisation for layer in layers])},
        }

    def _active(self, model: Any) -> int | None:
        from bakeoff.experts.bam import mixture_cost
        from bakeoff.experts.upcycled_model import UpcycledForCausalLM

        if not isinstance(model, UpcycledForCausalLM):
            return None
        counted: MixtureCost = mixture_cost(model, self.context)
        return counted.active_parameters

    # -- what a winner becomes -------------------------------------------------------------------

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a trained model as a transformers folder.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder, with the model.
        destination
            The folder to write: weights in safetensors, tokenizer, ``README.md``. Specialists whose
            domain is known are a folder each; ``domains.json`` says which is whose.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            Whether transformers loads it by itself: not a mixture.
        """
        lines = "\n".join(_usage(artifact / "model", destination))
        text = f"Use it:\n\n```python\n{lines}\n```"
        self.save_winner(design, artifact, destination, reason, text)
        return design.method not in _UPCYCLED

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        return _usage(destination, destination)


def _usage(made: Path, destination: Path) -> list[str]:
    """Return lines that load `destination`, a copy of the model folder `made`."""
    load = "AutoModelForCausalLM.from_pretrained"
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    where = repr(str(destination))
    if (made / _DOMAINS_FILE).is_file():
        folders = json.loads((made / _DOMAINS_FILE).read_text(encoding="utf-8"))
        lines = [
            *imports,
            f"folders = {folders!r}",
            f"folder = {where} + '/' + folders[{next(iter(folders))!r}]",
            f"model = {load}(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    elif json.loads((made / "config.json").read_text("utf-8"))["model_type"] == _MIXTURE_TYPE:
        lines = [
            "from bakeoff.experts.loading import load_experts",
            f"model, tokenizer = load_experts({where})",
        ]
    else:
        lines = [
            *imports,
            f"model = {load}({where})",
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
        ]
    return [
        *lines,
        "inputs = tokenizer('The', return_tensors='pt').input_ids",
        "print(tokenizer.decode(model.generate(inputs, max_new_tokens=20, do_sample=False)[0]))",
    ]


def _settings(design: Design) -> dict[str, Any]:
    """Return the arguments of `upcycle` that a design sets, its method's first."""
    own = {
        name: value
        for name, value in design.params.items()
        if name not in ("mixing", "match", "n_experts")
    }
    return {**_UPCYCLED[design.method], **own}


def _mixing(design: Design) -> float:
    """Return how much of the mixing phase a design takes part in."""
    share = design.params.get("mixing", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise DataError(f"mixing must be a number from 0 to 1, got {share!r}")
    return float(share)


def _check_match(match: object) -> None:
    if match not in ("tokens", "flops"):
        raise DataError(f'match must be "tokens" or "flops", got {match!r}')


def _checked_shares(shares: Sequence[float], from_scratch: bool) -> tuple[float, float, float]:
    given = tuple(shares)
    right = len(given) == 3 and all(0 <= share < math.inf for share in given)
    if not right or not sum(given if from_scratch else given[1:]) > 0:
        needed = "" if from_scratch else ", of the last two where a model is named"
        raise DataError(
            "shares must be three numbers >= 0, of seed, specialists and mixing, of which at least "
            f"one is positive{needed}; got {shares!r}"
        )
    return given[0], given[1], given[2]


def _order(seed: int, phase: int, number: int = 0) -> int:
    """Return the seed of one phase's order, unlike those of all others."""
    return int(np.random.SeedSequence([seed, phase, number]).generate_state(1)[0])


def _dense_layers(model: Any) -> Scores:
    """Return the scores of layers that are each one expert."""
    n_layers = model.config.get_text_config().num_hidden_layers
    return {
        "balance": {"layers": np.ones(n_layers)},
        "specialisation": {"layers": np.zeros(n_layers)},
    }
