"""Which adapter: one decoder, one domain that is new to it, one number of trained parameters.

Designs are adapters that train as many parameters as LoRA of one rank has, or fewer; only what says
``over_budget`` may have more, to show how much there would be to gain. Each domain is adapted to by
itself, with an adapter of its own. Designs read the same tokens in the same order, and each gets
the learning rate that suits it, found in one way for all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_folder, build_once, cache_directory, folder_name, write_text
from bakeoff.data.domain_texts import DomainTexts, Size
from bakeoff.errors import BakeoffError, DataError
from bakeoff.experts.problem.common import (
    LOSS,
    SMALL_BASES,
    DomainProblem,
    keep_layers,
)
from bakeoff.models.likelihood import response_losses
from bakeoff.models.packaged import is_packaged
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.rate_search import search_rate

if TYPE_CHECKING:
    from torch import Tensor

    from bakeoff.experts.mixture_of_shards import MoSConfig

Progress = Callable[[int, int], None]

ADAPTER_METRICS: dict[str, Metric] = {
    "loss": LOSS,
    "forgetting": Metric(
        "loss gained on other domains (nats per token)", higher_is_better=False, margin=0.01
    ),
}
"""The loss of the new domain's documents, and what the others lost by it."""

ADAPTER_SHAPE = SmallGPT(vocabulary=512, n_layers=8, width=64, n_heads=4, context=128)
"""Shape of the decoder that is trained beforehand by default: 0.6 million weights.

Deep and narrow, for what layers share is the question. Few tokens, most of them letters: a token
that was never read beforehand has a vector that no adapter of linear layers can mend.
"""

_QUESTION = "which adapter to train"
_COMMON = ("learning_rate", "over_budget")
_LOW_RANK = (*_COMMON, "alpha", "dropout")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": _COMMON,
    "lora": (*_LOW_RANK, "rank", "times"),
    "rslora": (*_LOW_RANK, "rank", "times"),
    "dora": (*_LOW_RANK, "rank"),
    "vera": (*_COMMON, "dropout", "rank"),
    "pure-sharing": (*_LOW_RANK, "times"),
    "tied-lora": (*_LOW_RANK, "rank"),
    "prolora": (*_LOW_RANK, "times", "unshared_rank", "chunks"),
    "mos": (
        *(*_LOW_RANK, "times", "r", "private_rank", "shards_per_vector", "pair_dissociation"),
        "selection",
    ),
}
_SHARDED = ("pure-sharing", "tied-lora", "prolora", "mos")
_INTEGERS = {
    **dict.fromkeys(("rank", "times", "r", "shards_per_vector", "chunks"), 1),
    **dict.fromkeys(("private_rank", "unshared_rank"), 0),
}
# The paper's runs use 16 throughout. Without dropout: nothing here is read twice by default.
_ALPHA = 16
_WORKING_RANK = 4

# How the small decoder is trained beforehand.
_BASE_BATCH = 8
_BASE_LEARNING_RATE = 5e-3
_BASE_VERSION = 1

# How a learning rate is looked for: on rows of the training texts that nothing trains on.
_FACTOR = 3.0
_REACH = 4
_FARTHEST = _FACTOR ** (_REACH - 0.5)
_VALIDATION_SHARE = 0.1
_VALIDATION_ROWS = 64
_SEARCH_SEED = 1_000_003

# Raise when training or judging changes what a trial scores.
_VERSION = 1


def adapter_designs() -> Designs:
    """Return mixture of shards, its ablations, and the rivals a sceptic would choose.

    Examples
    --------
    >>> [design.name for design in adapter_designs()][:3]
    ['not adapted', 'LoRA', 'rsLoRA']
    """
    over = {"over_budget": True}
    alone = {"private_rank": 0, "shards_per_vector": 1, "pair_dissociation": False}
    return Designs(
        [
            Design("not adapted", "none"),
            Design("LoRA", "lora"),
            Design("rsLoRA", "rslora"),
            Design("DoRA", "dora"),
            Design("VeRA", "vera"),
            Design("pure sharing", "pure-sharing"),
            Design("Tied-LoRA", "tied-lora"),
            Design("PRoLoRA", "prolora"),
            Design("MoS", "mos"),
            Design("MoS without privatisation", "mos", {"private_rank": 0}),
            Design("MoS without dissociation", "mos", {"pair_dissociation": False}),
            Design("MoS without sharding", "mos", {"shards_per_vector": 1}),
            Design("MoS without subset selection", "mos", {"selection": "all"}),
            Design("subset selection alone", "mos", alone),
            Design("LoRA, 4 times the rank", "lora", {"times": 4, **over}),
            Design("LoRA, 8 times the rank", "lora", {"times": 8, **over}),
            Design("full fine-tuning", "full", over),
        ]
    )


class AdapterProblem(DomainProblem):
    """Which adapter: train each on a new domain within one budget of parameters, compare losses.

    For each target domain, an adapter on all linear layers but the output head is trained on its
    texts and judged on its held-out documents; the target is a task. A small decoder is made for
    each target, trained beforehand on the other domains and a little on the target, so that it
    knows its letters. A model that is named is taken as it is.

    The learning rate is each design's own, for each target. Beginning with `learning_rate`, it is
    multiplied or divided by 3 for as long as that lowers the loss of a tenth of the training texts
    that nothing is trained on, in runs of their own that read `search_share` of `n_tokens` and have
    a seed of their own. That is done once for all seeds, kept in the cache, and reported as
    ``search_tokens``. Held-out documents take no part in it.

    Parameters
    ----------
    texts
        Domains; or a size of the default ones (``"smoke"``, ``"demo"``, ``"full"``).
    base
        What is adapted: ``"small-gpt"`` or ``"small-parallel"``, a small decoder trained
        beforehand; or a packaged name, folder or hub id.
    n_layers
        Keep only the first layers of a model that is named.
    shape
        Of the small decoder.
    rank
        The budget: as many trained parameters as LoRA of this rank has.
    targets
        Domains to adapt to, one at a time; by default each. What is forgotten is measured on the
        documents of all domains but the target.
    n_tokens
        Tokens that each adapter reads, to within a batch.
    base_tokens
        Tokens that the small decoder reads beforehand.
    known_share
        How much of them is of the target domain, from 0 to below 1.
    search_share
        Share of `n_tokens` that each run of the search for a learning rate reads; 0 for no search:
        then `learning_rate` is every design's.
    context, device
        As in `DomainProblem`; the context of the small decoder is 128 tokens.
    batch_size
        Sequences per step; by default 2 for a small decoder and 8 otherwise.
    learning_rate
        Where the search begins; by default 1e-2 for a small decoder and 3e-4 otherwise.

    Raises
    ------
    DataError
        If a number is out of range, a domain has too few texts or is unknown, or a small decoder
        would have no other domain to learn beforehand.

    Examples
    --------
    >>> from bakeoff.data.domain_texts import read_domains, split_domains
    >>> from bakeoff.study import Study
    >>> texts, _ = read_domains(["code=src", "manual=docs"])  # doctest: +SKIP
    >>> problem = AdapterProblem(split_domains(texts), base="smollm2-135m")  # doctest: +SKIP
    >>> Study(problem, adapter_designs()[:9], reference="LoRA", seeds=3,
    ...       directory="adapters").run().winner  # doctest: +SKIP
    'MoS'
    """

    name = "adapters"
    question = "which adapter, at equal trained parameters"

    def __init__(
        self,
        texts: DomainTexts | Size | None = None,
        *,
        base: str = "small-gpt",
        n_layers: int | None = None,
        shape: SmallGPT = ADAPTER_SHAPE,
        rank: int = 2,
        targets: Sequence[str] | None = None,
        n_tokens: int = 30_000,
        base_tokens: int = 400_000,
        known_share: float = 0.05,
        search_share: float = 0.5,
        context: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        device: str = "cpu",
    ) -> None:
        if batch_size is None:
            batch_size = 2 if base in SMALL_BASES else 8
        if learning_rate is None:
            learning_rate = 1e-2 if base in SMALL_BASES else 3e-4
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
        domains = self.texts.domains
        if targets is not None and (isinstance(targets, str) or not targets):
            raise DataError(f"targets must be names of domains, got {targets!r}")
        self.targets = domains if targets is None else tuple(dict.fromkeys(targets))
        if unknown := [name for name in self.targets if name not in domains]:
            raise DataError(f"targets names {unknown[0]!r}; there are: {', '.join(domains)}")
        for name, value in {"rank": rank, "base_tokens": base_tokens}.items():
            if not _is_int(value) or value < 1:
                raise DataError(f"{name} must be an integer of at least 1, got {value!r}")
        if not 0 <= known_share < 1:
            raise DataError(f"known_share must be from 0 to below 1, got {known_share}")
        if not 0 <= search_share <= 1:
            raise DataError(f"search_share must be from 0 to 1, got {search_share}")
        if self.from_scratch and len(domains) < 2:
            raise DataError(
                f"base={base!r} is trained beforehand on other domains than the one it is adapted "
                "to: give at least 2 domains, or name a model"
            )
        self.rank, self.base_tokens = rank, base_tokens
        self.known_share, self.search_share = known_share, search_share
        self._made = _Made()

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The loss; and where there are other domains, what is forgotten of them."""
        names = ["loss"] + ["forgetting"] * (len(self.texts.domains) > 1)
        return {name: ADAPTER_METRICS[name] for name in names}

    @property
    def budget(self) -> int:
        """Parameters that an adapter may train: those of LoRA of `rank`."""
        return self.rank * sum(n_in + n_out for n_in, n_out in self._sizes())

    def _version(self) -> int:
        return _VERSION

    def _facts(self) -> dict[str, object]:
        beforehand = [self.base_tokens, self.known_share, _BASE_VERSION]
        return super()._facts() | {
            "targets": list(self.targets),
            "rank": self.rank,
            "beforehand": beforehand if self.from_scratch else None,
            "search": self.search_share,
        }

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        layers = "" if self.n_layers is None else f", its first {self.n_layers} layers"
        base = f"{self.base}{layers}, with its own weights"
        if self.from_scratch:
            base = (
                f"{self.base}: for each target another one, trained beforehand on "
                f"{self.base_tokens:,} tokens, {self.known_share:.0%} of them of the target"
            )
        searched = (
            f"learning rate: each design's own, looked for from {self.learning_rate:g} in steps of "
            f"{_FACTOR:g} on training texts set aside, in runs of {self.search_share:.0%} of the "
            "tokens; the same for all seeds"
            if self.search_share
            else f"learning rate {self.learning_rate:g}"
        )
        notes = [
            f"An adapter may train {self.budget:,} parameters, as LoRA of rank {self.rank} on all "
            f"{len(self._sizes())} linear layers does. Designs that are over the budget say so.",
            "Compute is matched by tokens: all designs read the same ones in the same order.",
            *self.texts.notes,
        ]
        return {
            **super().describe(),
            "base": base,
            "adapted to": f"{', '.join(self.targets)}: one adapter each",
            "budget": f"{self.budget:,} trained parameters and {self.n_tokens:,} tokens read for "
            f"each adapter, sequences of {self.context}, batches of {self.batch_size}; {searched}",
            "notes": notes,
        }

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here or is over the budget without saying so."""
        check_method(design, tuple(_PARAMETERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        try:
            _check_values(design.params)
            trained = self.trained_parameters(design)
        except DataError as error:
            raise DataError(f"design {design.name!r}: {error}") from error
        if trained > self.budget and not design.params.get("over_budget", False):
            raise DataError(
                f"design {design.name!r}: trains {trained:,} parameters, more than the budget of "
                f"{self.budget:,} (LoRA of rank {self.rank}); give it less, or let it say "
                "over_budget=True"
            )

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs, cut the texts into rows, train the small decoders beforehand."""
        super().prepare(designs, seeds, work)
        for number, domain in enumerate(self.targets):
            self._parts(domain)
            part = (number / len(self.targets), (number + 1) / len(self.targets))
            if self.from_scratch:
                message = f"training a decoder that does not know {domain}"
                self._pretrained(domain, counting(work.progress, message, part))

    # -- how many parameters ---------------------------------------------------------------------

    def trained_parameters(self, design: Design) -> int:
        """Return how many parameters a design trains, without building it.

        Raises
        ------
        DataError
            If it cannot be built on this model.
        """
        sizes, method = self._sizes(), design.method
        if method == "none":
            return 0
        if method == "full":
            return sum(parameter.numel() for parameter in self._skeleton().parameters())
        if method in _SHARDED:
            from bakeoff.experts.shard_layout import count_trained_parameters

            config: MoSConfig = self.config(design)
            return count_trained_parameters(self._skeleton(), config)
        rank = self._rank_of(design)
        if method == "vera":
            return sum(n_out + rank for _, n_out in sizes)
        magnitudes = sum(n_out for _, n_out in sizes) if method == "dora" else 0
        return rank * sum(n_in + n_out for n_in, n_out in sizes) + magnitudes

    def config(self, design: Design, seed: int = 0) -> Any:
        """Return PEFT's configuration of a design: what `peft.get_peft_model` takes.

        Parameters
        ----------
        design
            Of a method that adapts: neither ``"none"`` nor ``"full"``.
        seed
            Of what a configuration draws.
        """
        from peft import LoraConfig, VeraConfig

        params, method = design.params, design.method
        shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        dropout = params.get("dropout", 0.0)
        if method == "vera":
            return VeraConfig(
                r=self._rank_of(design),
                vera_dropout=dropout,
                projection_prng_key=seed,
                fan_in_fan_out=self._transposed(),
                **shared,
            )
        shared |= {"lora_alpha": params.get("alpha", _ALPHA), "lora_dropout": dropout}
        if method in _SHARDED:
            return self._sharded_config(design, shared | {"seed": seed})
        return LoraConfig(
            r=self._rank_of(design),
            use_rslora=method == "rslora",
            use_dora=method == "dora",
            fan_in_fan_out=self._transposed(),
            **shared,
        )

    def _sharded_config(self, design: Design, shared: dict[str, Any]) -> Any:
        from bakeoff.experts.mixture_of_shards import MoSConfig, prolora, pure_sharing, tied_lora

        params = dict(design.params)
        equivalent = params.get("times", 1) * self.rank
        if design.method == "pure-sharing":
            return pure_sharing(equivalent_rank=equivalent, **shared)
        if design.method == "tied-lora":
            return tied_lora(r=self._rank_of(design), **shared)
        half = equivalent // 2
        if design.method == "prolora":
            unshared, chunks = params.get("unshared_rank", half), params.get("chunks", 4)
            return prolora(equivalent, unshared_rank=unshared, chunks=chunks, **shared)
        private = params.get("private_rank", half)
        names = ("shards_per_vector", "pair_dissociation", "selection")
        chosen = {name: params[name] for name in names if name in params}
        r = params.get("r")
        if r is None and chosen.get("selection", "subset") == "subset":
            # As many vectors as the public pool has, where the model is not deep enough for more.
            most = (equivalent - private) * self._n_blocks() + private
            r = min(_WORKING_RANK * equivalent, most)
        return MoSConfig(r=r, equivalent_rank=equivalent, private_rank=private, **chosen, **shared)

    def _rank_of(self, design: Design) -> int:
        """Return the rank that is asked for, or the largest within the budget."""
        given = design.params.get("rank")
        if given is not None:
            return int(given)
        sizes, method = self._sizes(), design.method
        if method in ("lora", "rslora"):
            return int(design.params.get("times", 1)) * self.rank
        outputs = sum(n_out for _, n_out in sizes)
        if method == "dora":
            per_rank = sum(n_in + n_out for n_in, n_out in sizes)
        elif method == "vera":
            per_rank = len(sizes)
        else:  # tied: one pair for each kind of layer, and a scale for each rank of every layer
            kinds = [(len(m.modules), m.in_features, m.out_features) for m in self._layouts()]
            per_rank = sum(n_in + n_out + blocks for blocks, n_in, n_out in kinds)
        rank = (self.budget - outputs) // per_rank
        if rank < 1:
            raise DataError(
                f"{method} of rank 1 trains {outputs + per_rank:,} parameters, more than the "
                f"budget of {self.budget:,}: raise the problem's rank"
            )
        return rank

    def _skeleton(self) -> Any:
        """Return the model without weights: its shape is all that counting needs."""
        if self._made.skeleton is None:
            import torch
            from transformers import AutoModelForCausalLM

            config = copy.deepcopy(self._base().model.config)
            with torch.device("meta"):
                self._made.skeleton = AutoModelForCausalLM.from_config(config)
            if self.n_layers is not None:
                keep_layers(self._made.skeleton, self.n_layers)
        return self._made.skeleton

    def _sizes(self) -> list[tuple[int, int]]:
        """Return inputs and outputs of every linear layer but the output head."""
        if self._made.sizes is None:
            from torch import nn
            from transformers.pytorch_utils import Conv1D

            from bakeoff.experts.shard_layout import layer_features

            model = self._skeleton()
            head = model.get_output_embeddings()
            layers = [
                layer
                for layer in model.modules()
                if isinstance(layer, nn.Linear | Conv1D) and layer is not head
            ]
            if not layers:
                raise DataError(f"base {self.base!r} has no linear layer to adapt")
            self._made.sizes = [layer_features(layer) for layer in layers]
        return self._made.sizes

    def _transposed(self) -> bool:
        """Return whether the layers keep their weights as GPT-2 does, inputs first."""
        from transformers.pytorch_utils import Conv1D

        return any(isinstance(layer, Conv1D) for layer in self._skeleton().modules())

    def _layouts(self) -> Any:
        from bakeoff.experts.mixture_of_shards import MoSConfig
        from bakeoff.experts.shard_layout import shard_layouts

        plain = MoSConfig(r=1, equivalent_rank=1, private_rank=1, shards_per_vector=1)
        return shard_layouts(self._skeleton(), plain)

    def _n_blocks(self) -> int:
        return min(len(layout.modules) for layout in self._layouts())

    # -- what is adapted -------------------------------------------------------------------------

    def _parts(self, domain: str) -> tuple[Tensor, Tensor]:
        """Return a domain's rows to train on, and those that a learning rate is chosen by."""
        rows = self.rows()[domain]
        n_aside = min(_VALIDATION_ROWS, max(1, int(_VALIDATION_SHARE * len(rows))))
        if len(rows) < 2:
            raise DataError(
                f"domain {domain!r} holds one sequence of {self.context} tokens to train on, at "
                "least 2 are needed: give more texts, or a shorter context"
            )
        return rows[:-n_aside], rows[-n_aside:]

    def _pretrained(self, domain: str, progress: Progress | None = None) -> Path:
        """Return the folder of the small decoder that is to be adapted to a domain."""
        others = [name for name in self.texts.domains if name != domain]
        shares = {name: (1 - self.known_share) / len(others) for name in others}
        shares[domain] = self.known_share
        facts = [
            *(_BASE_VERSION, self.base, asdict(self.shape), self.texts.fingerprint(), domain),
            *(self.base_tokens, self.known_share, self.context),
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

        def build(folder: Path) -> None:
            from bakeoff.experts.causal_training import domain_batches, train_causal

            rows = {name: self._parts(name)[0] for name in shares}
            steps = max(1, self.base_tokens // (_BASE_BATCH * self.context))
            model = self.start(0)  # the same random weights for every target
            train_causal(
                model,
                domain_batches(rows, shares, batch_size=_BASE_BATCH),
                steps=steps,
                peak_learning_rate=_BASE_LEARNING_RATE,
                warmup_steps=steps // 10,
                progress=progress,
            )
            self.save_model(model.to("cpu"), folder)

        return build_once(cache_directory() / "models" / f"adapter-base-{digest}", build)

    def _dense(self, domain: str) -> Any:
        """Return the model that is adapted to a domain, a copy of the caller's own."""
        if not self.from_scratch:
            return self.start(0)
        loaded = self._loaded.models.language_model(str(self._pretrained(domain)))
        return copy.deepcopy(loaded.model).to(self.device)

    def _losses_before(self, domain: str) -> dict[str, NDArray[np.float64]]:
        """Return the documents' losses before anything is adapted, by domain."""
        key = domain if self.from_scratch else ""
        if key not in self._made.losses:
            self._made.losses[key] = self.losses(self._dense(domain))
        return self._made.losses[key]

    # -- one trial -------------------------------------------------------------------------------

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        scores: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in self.metrics}
        cost = dict.fromkeys(("trained_parameters", "adapter_bytes", "training_tokens"), 0.0)
        cost |= dict.fromkeys(("search_tokens", "seconds_per_step"), 0.0)
        notes: list[str] = []
        for number, domain in enumerate(self.targets):
            first, share = number / len(self.targets), 1 / len(self.targets)
            before = self._losses_before(domain)
            after = before
            if design.method != "none":
                rates = self._rates(design, domain, work.progress, first)
                rate = min(rates, key=lambda each: rates[each])
                model = self._adapted(design, domain, seed)
                report = counting(
                    work.progress,
                    f"adapting to {domain}, steps",
                    (first + share / 2, first + share),
                )
                began = time.perf_counter()
                self._train(model, domain, rate, self.n_steps, seed, report)
                cost["seconds_per_step"] += (time.perf_counter() - began) / self.n_steps * share
                after = self.losses(_inner(model))
                folder = work.directory / folder_name(domain, self.targets)
                cost["adapter_bytes"] += self._save(design, model, folder) * share
                cost["trained_parameters"] = float(_n_trained(model))
                cost["training_tokens"] += self.n_steps * self.batch_size * self.context
                if self._searches(design):
                    cost["search_tokens"] += len(rates) * self._search_tokens()
                    tried = f", the best of {len(rates)}"
                    if not self.learning_rate / _FARTHEST < rate < self.learning_rate * _FARTHEST:
                        tried += " and the last that was to be tried: others may be better still"
                    notes.append(f"Learning rate for {domain}: {rate:.3g}{tried}.")
            scores["loss"][domain] = after[domain]
            if "forgetting" in scores:
                others = [name for name in self.texts.domains if name != domain]
                gained = [after[name] - before[name] for name in others]
                scores["forgetting"][domain] = np.concatenate(gained)
        artifact = None if design.method == "none" else work.directory
        return Trial(scores=scores, cost=cost, artifact=artifact, notes=tuple(notes))

    def _adapted(self, design: Design, domain: str, seed: int) -> Any:
        import torch
        from peft import get_peft_model

        model = self._dense(domain)
        if design.method == "full":
            return model.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, self.config(design, seed))

    def _train(
        self,
        model: Any,
        domain: str,
        rate: float,
        steps: int,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        import torch

        from bakeoff.experts.causal_training import domain_batches, train_causal

        rows = {domain: self._parts(domain)[0]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            train_causal(
                model,
                domain_batches(rows, batch_size=self.batch_size, seed=seed),
                steps=steps,
                peak_learning_rate=rate,
                warmup_steps=steps // 10,
                weight_decay=0.0,
                progress=progress,
            )

    def _searches(self, design: Design) -> bool:
        return self.search_share > 0 and "learning_rate" not in design.params

    def _search_steps(self) -> int:
        return max(1, round(self.search_share * self.n_steps))

    def _search_tokens(self) -> int:
        return self._search_steps() * self.batch_size * self.context

    def _rates(
        self,
        design: Design,
        domain: str,
        progress: Callable[[float, str], None],
        fraction: float,
    ) -> dict[float, float]:
        """Return the learning rates that were tried, and the loss on the rows set aside."""
        if not self._searches(design):
            return {float(design.params.get("learning_rate", self.learning_rate)): 0.0}
        facts = {
            **self._facts(),
            "version": _VERSION,
            "method": design.method,
            "params": {k: v for k, v in design.params.items() if k != "over_budget"},
            "domain": domain,
        }
        text = json.dumps(facts, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:20]

        def loss_at(rate: float) -> float:
            progress(fraction, f"{domain}: trying the learning rate {rate:.3g}")
            model = self._adapted(design, domain, _SEARCH_SEED)
            self._train(model, domain, rate, self._search_steps(), _SEARCH_SEED)
            aside = self._parts(domain)[1].tolist()
            losses = response_losses(_inner(model), [[]] * len(aside), aside)
            mean = float(losses.means.mean())
            return mean if math.isfinite(mean) else math.inf

        def build(folder: Path) -> None:
            tried = search_rate(loss_at, self.learning_rate, factor=_FACTOR, reach=_REACH)
            if all(math.isinf(loss) for loss in tried.values()):
                raise BakeoffError(
                    f"design {design.name!r}: training diverged at every learning rate from "
                    f"{min(tried):.2g} to {max(tried):.2g}; give a lower learning_rate"
                )
            kept = [[rate, loss if math.isfinite(loss) else None] for rate, loss in tried.items()]
            write_text(folder / "rates.json", json.dumps(kept))

        found = build_once(cache_directory() / "adapters" / f"rates-{digest}", build)
        kept = json.loads((found / "rates.json").read_text("utf-8"))
        return {rate: math.inf if loss is None else loss for rate, loss in kept}

    # -- what leaves -----------------------------------------------------------------------------

    def _save(self, design: Design, model: Any, folder: Path) -> int:
        """Save what was trained; return the bytes of the weights that one has to keep."""
        if design.method == "full":
            self.save_model(model, folder)
            return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        native = folder / "shards" if design.method in _SHARDED else folder
        # Asked to decide for itself, PEFT looks the base model up on the hub.
        model.save_pretrained(native, save_embedding_layers=False)
        (native / "README.md").unlink(missing_ok=True)  # an empty form
        if native is not folder:
            model.to_lora(folder)
        return (native / "adapter_model.safetensors").stat().st_size

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a trial's adapters, each in the folder of its domain, with a README.

        What is made of shards is saved twice: as a plain LoRA that PEFT loads by itself, and in
        ``shards`` as the pools, which are smaller and need bakeoff. A small decoder that was
        trained beforehand, or the first layers of a larger one, are saved beside.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder.
        destination
            The folder to write; replaced if it exists.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            True: PEFT, or after full fine-tuning transformers, loads it by itself.
        """
        with atomic_folder(destination) as scratch:
            for domain in self.targets:
                name = folder_name(domain, self.targets)
                shutil.copytree(artifact / name, scratch / name)
                if design.method == "full":
                    continue
                base = self._exported_base(domain, scratch, destination)
                for path in (scratch / name).rglob("adapter_config.json"):
                    settings = json.loads(path.read_text("utf-8"))
                    settings["base_model_name_or_path"] = base
                    write_text(path, json.dumps(settings, indent=2, sort_keys=True))
            write_text(scratch / "README.md", self._read_me(design, scratch, destination, reason))
        return True

    def _exported_base(self, domain: str, scratch: Path, destination: Path) -> str:
        """Return where the base model of an exported adapter will be, saving it if it is nowhere.

        Files are written to `scratch`, which will become `destination`.
        """
        if self.from_scratch:
            inside = Path(folder_name(domain, self.targets)) / "base"
            shutil.copytree(self._pretrained(domain), scratch / inside)
            return str(destination / inside)
        if self.n_layers is not None:
            if not (scratch / "base").is_dir():
                self.save_model(self.start(0).to("cpu"), scratch / "base")
            return str(destination / "base")
        named_by_files = is_packaged(self.base) or Path(self.base).exists()
        return str(self._base().path) if named_by_files else self.base

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`; they need no bakeoff."""
        return self._usage(destination, destination)

    def _usage(self, destination: Path, files: Path) -> list[str]:
        """Return the lines for `destination`, whose files are in `files` as yet."""
        name = folder_name(self.targets[0], self.targets)
        folder = destination / name
        settings = files / name / "adapter_config.json"
        adapted = settings.is_file()
        base = str(folder)
        if adapted:
            base = json.loads(settings.read_text("utf-8"))["base_model_name_or_path"]
        lines = [
            *["from peft import PeftModel"] * adapted,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({base!r})",
            f"model = AutoModelForCausalLM.from_pretrained({base!r})",
        ]
        if adapted:
            lines.append(f"model = PeftModel.from_pretrained(model, {str(folder)!r})")
        return [
            *lines,
            "tokens = tokenizer('The', return_tensors='pt', add_special_tokens=False).input_ids",
            "written = model.generate(input_ids=tokens, max_new_tokens=20)",
            "print(tokenizer.decode(written[0]))",
        ]

    def _read_me(self, design: Design, scratch: Path, destination: Path, reason: str) -> str:
        folders = [f"`{folder_name(name, self.targets)}/` ({name})" for name in self.targets]
        trained = self.trained_parameters(design)
        what = "model" if design.method == "full" else "adapter"
        parts = [
            f"# {design.name}",
            f"Method: {design.method}. Trained parameters of each {what}: {trained:,}; the budget "
            f"was {self.budget:,}, as LoRA of rank {self.rank} has.",
            reason,
            f"One {what} for each domain, trained on {self.texts.name}: {', '.join(folders)}.",
            "```python\n" + "\n".join(self._usage(destination, scratch)) + "\n```",
        ]
        if design.method in _SHARDED:
            name = folder_name(self.targets[0], self.targets)
            large, small = (
                (scratch / path / "adapter_model.safetensors").stat().st_size
                for path in (Path(name), Path(name) / "shards")
            )
            pools = [
                "from bakeoff.experts import MoSConfig  # importing it makes the format known",
                f"model = PeftModel.from_pretrained(model, {str(destination / name / 'shards')!r})",
            ]
            parts += [
                f"The adapter above is a plain LoRA, {large:,} bytes, that PEFT loads by itself. "
                f"`shards/` beside it holds the same adapter as pools of shards, {small:,} bytes. "
                "PEFT knows that format once bakeoff's module is imported; without it, it stops "
                "with `KeyError: 'MIXTURE_OF_SHARDS'`. In place of the line with `PeftModel` "
                "above:",
                "```python\n" + "\n".join(pools) + "\n```",
            ]
        return "\n\n".join(part for part in parts if part) + "\n"


class _Made:
    """What a process works out once; left behind when pickled."""

    def __init__(self) -> None:
        self.skeleton: Any = None
        self.sizes: list[tuple[int, int]] | None = None
        self.losses: dict[str, dict[str, NDArray[np.float64]]] = {}

    def __reduce__(self) -> tuple[type[_Made], tuple[()]]:
        return (type(self), ())


def _check_values(params: Mapping[str, Any]) -> None:
    """Refuse what the methods' own checks would not, or not by this name."""
    for name, least in _INTEGERS.items():
        value = params.get(name, least)
        if not _is_int(value) or value < least:
            raise DataError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(params.get("over_budget", False), bool):
        raise DataError(f"over_budget must be True or False, got {params['over_budget']!r}")
    for name, needs in (
        ("learning_rate", "positive"),
        ("alpha", "positive"),
        ("dropout", "at least 0 and below 1"),
    ):
        value = params.get(name, 0.5)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise DataError(f"{name} must be a number, {needs}, got {value!r}")
        if not (0 <= value < 1 if name == "dropout" else 0 < value < math.inf):
            raise DataError(f"{name} must be {needs}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _inner(model: Any) -> Any:
    """Return the transformers model inside PEFT's: its forward shows what it accepts."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _n_trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
