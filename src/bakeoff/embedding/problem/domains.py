"""One encoder for several domains: which design trained on co-cited pairs finds partners best."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_folder, build_once, cache_directory, folder_name, write_text
from bakeoff.data.citations import LabelledPairs
from bakeoff.data.formats import count
from bakeoff.data.tasks import TextPairs
from bakeoff.embedding.problem.domain_pairs import (
    SIZES,
    DomainJudge,
    DomainPairs,
    Size,
    cosine_similarities,
    domain_pairs_default,
    word_similarities,
)
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models.gguf import quiet_transformers
from bakeoff.models.text_encoder import TextEncoder
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.measure import warnings_noted

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

Vectors = NDArray[np.float32]
Scores = dict[str, dict[str, NDArray[np.float64]]]
Progress = Callable[[float, str], None]

DOMAIN_ENCODER_METRICS: dict[str, Metric] = {
    "mrr": Metric("MRR of the partner", margin=0.01),
    "auc": Metric("ROC-AUC of pairs", margin=0.01),
    "f1": Metric("F1max of pairs", margin=0.01),
}
"""The reciprocal rank of a pair's partner first; then the two of the paper."""

_QUESTION = "how one encoder serves several domains"
_TRAINING = ("learning_rate", "loss", "normalize", "scale")
_JOINT = (*_TRAINING, "pooling", "batching", "tokens")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "domain-experts": (*_JOINT, "layers", "routing", "top_k", "judged_as"),
    "shared": (*_JOINT, "prompts"),
    "wider": _JOINT,
    "single-domain": (*_TRAINING, "pooling"),
    "lora-per-domain": (*_TRAINING, "rank"),
    "untrained": (),
    "tf-idf": (),
    "bm25": (),
}
_WORDS = ("tf-idf", "bm25")
_FROZEN = ("untrained", *_WORDS)
_SEPARATE = ("single-domain", "lora-per-domain")
_CHOICES: dict[str, tuple[object, ...]] = {
    "loss": ("mnr", "mnr+"),
    "normalize": (True, False),
    "pooling": ("base", "tanh"),
    "batching": ("mixed", "by-domain"),
    "tokens": (True, False),
    "prompts": (True, False),
    "judged_as": ("own", "wrong"),
}
# Learned routers are told the domain with this weight, as in the paper's first version.
_ROUTER_WEIGHT = 0.01
# LoRA learns at about ten times the rate of full fine-tuning.
_LORA_RATE = 10.0
_LORA_RANK = 8
_ALPHA_OF_RANK = 4
_SEARCH_SEED = 1_000_003
_FACTS_FILE = "domains.json"

# Raise when training or judging changes what a trial scores.
_VERSION = 1


def domain_encoder_designs(*, variants: bool = True) -> Designs:
    """Return experts by domain, their ablations, and the rivals a sceptic would choose.

    Parameters
    ----------
    variants
        Whether ablations and variants are among them, or one design per idea only.

    Examples
    --------
    >>> [design.name for design in domain_encoder_designs(variants=False)][:3]
    ['domain experts', 'domain experts, middle layer', 'shared']
    """
    by_domain = {"batching": "by-domain"}
    tokens = {"tokens": True}
    designs = [
        Design("domain experts", "domain-experts"),
        Design("domain experts, middle layer", "domain-experts", {"layers": "middle"}),
        Design("shared", "shared"),
        Design("shared, domain tokens", "shared", tokens),
        Design("shared, prompts", "shared", {"prompts": True}),
        Design("single-domain", "single-domain"),
        Design("LoRA per domain", "lora-per-domain"),
        Design("wider", "wider"),
        Design("untrained", "untrained"),
        Design("TF-IDF", "tf-idf"),
        Design("BM25", "bm25"),
    ]
    if variants:
        published = {"pooling": "tanh", "normalize": False}
        designs += [
            Design("domain experts, wrong domain", "domain-experts", {"judged_as": "wrong"}),
            Design("domain experts, batches by domain", "domain-experts", by_domain),
            Design("shared, batches by domain", "shared", {**tokens, **by_domain}),
            Design("domain experts, switch", "domain-experts", {"routing": "switch"}),
            Design("domain experts, top-2", "domain-experts", {"routing": "topk", "top_k": 2}),
            Design("domain experts, dot products", "domain-experts", {"normalize": False}),
            Design("domain experts, the paper's pooling", "domain-experts", published),
            Design("shared, the paper's pooling", "shared", {**tokens, **published}),
        ]
    return Designs(designs)


class DomainEncoderProblem:
    """Which encoder for several domains, at equal training: a study's side of the question.

    Every trained design begins with the same encoder and reads co-cited pairs in the same number
    of steps and batches of the same size (the last of a pass through the pairs is smaller); designs
    with a model for each domain share the steps out as the domains share the pairs. Domains are
    tasks.

    Scores are per pair. *MRR*: for each positive pair the reciprocal rank of the partner among all
    documents of the domain's test pairs, the mean of both directions; documents that also belong
    to the one asked about do not compete. *ROC-AUC*: for each positive pair the share of negative
    pairs that are less alike, whose mean is the area under the curve. *F1max*: the best F1 over
    thresholds, chosen on the test pairs as in the paper, spread over labelled pairs (see
    `f1_influences`); of balanced pairs it is at least 2/3.

    By default the loss is MNR+ over cosines at scale 20, which is symmetric MNR, with the encoder's
    own pooling: few steps do not train the paper's new pooling, which designs may ask for.

    Parameters
    ----------
    data
        Pairs by domain, see `DomainPairs`; or a size of the default ones: functions of the standard
        library that use functions (``"smoke"``, ``"demo"``, ``"full"``).
    base
        The encoder: packaged name, sentence-transformers or transformers folder, or hub id. One
        that sentence-transformers did not write gives the mean over tokens, a decoder too. Its own
        prompts are not used.
    n_layers
        Keep only its first layers.
    steps, batch_size
        Optimizer steps, and pairs in each.
    learning_rates
        Peak rates. Of several, each design takes the one with the highest MRR on validation pairs
        after `search_share` of the steps, once for all seeds (not counted in its cost). LoRA is
        trained at ten times the rate. A design may have a ``learning_rate`` of its own.
    search_share
        Share of the steps that each trial run of a rate takes.
    evaluate_every
        Steps between evaluations by F1max on validation pairs, the best of which is kept; None
        keeps the last weights.
    max_length
        Tokens kept of each text.
    device
        Where to train.
    keep_models
        Whether trials keep what they trained, for `export`; each is a whole model.

    Raises
    ------
    DataError
        If a number is out of range or the size is unknown.

    Examples
    --------
    >>> from bakeoff.data.citations import read_citations
    >>> from bakeoff.study import Study
    >>> graph = read_citations("papers.jsonl")  # doctest: +SKIP
    >>> problem = DomainEncoderProblem(DomainPairs.from_graph(graph))  # doctest: +SKIP
    >>> Study(problem, domain_encoder_designs(variants=False), reference="shared", seeds=3,
    ...       directory="domains").run().winner  # doctest: +SKIP
    'domain experts'
    """

    name = "embedding"

    def __init__(
        self,
        data: DomainPairs | Size = "demo",
        *,
        base: str | Path = "all-minilm-l6-v2",
        n_layers: int | None = None,
        steps: int = 300,
        batch_size: int = 16,
        learning_rates: Sequence[float] = (1e-4,),
        search_share: float = 0.5,
        evaluate_every: int | None = None,
        max_length: int = 64,
        device: str = "cpu",
        keep_models: bool = True,
    ) -> None:
        if isinstance(data, str) and data not in SIZES:
            raise DataError(f"data must be pairs or one of {', '.join(SIZES)}, got {data!r}")
        for name, value, least in (
            ("n_layers", n_layers, 1),
            ("steps", steps, 1),
            ("batch_size", batch_size, 2),
            ("evaluate_every", evaluate_every, 1),
            ("max_length", max_length, 4),
        ):
            if value is not None and (not _is_int(value) or value < least):
                raise DataError(f"{name} must be an integer of at least {least}, got {value!r}")
        rates = tuple(learning_rates)
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise DataError(f"learning_rates must be positive, at least one, got {list(rates)}")
        if not 0 < search_share <= 1:
            raise DataError(f"search_share must be above 0 and at most 1, got {search_share}")
        self._given = data
        self.base, self.n_layers = str(base), n_layers
        self.steps, self.batch_size = steps, batch_size
        self.learning_rates, self.search_share = rates, search_share
        self.evaluate_every, self.max_length = evaluate_every, max_length
        self.device, self.keep_models = device, keep_models
        self._encoder = TextEncoder(self.base)
        self._loaded = _Loaded()
        # Designs whose vectors under the wrong domain another design of the study will ask for.
        self._shared_with: frozenset[str] = frozenset()

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def data(self) -> DomainPairs:
        """The pairs; default ones are made when first asked for."""
        if not isinstance(self._given, str):
            return self._given
        if self._loaded.data is None:
            self._loaded.data = domain_pairs_default(self._given)
        return self._loaded.data

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The rank of the partner first."""
        return DOMAIN_ENCODER_METRICS

    def fingerprint(self) -> str:
        """Return a digest of pairs, base model and budget."""
        return _digest(self._facts())

    def _facts(self) -> dict[str, object]:
        return {
            "question": _QUESTION,
            "data": self.data.fingerprint(),
            "base": self._encoder.fingerprint,
            "n_layers": self.n_layers,
            "budget": [self.steps, self.batch_size, list(self.learning_rates), self.search_share],
            "evaluate_every": self.evaluate_every,
            "max_length": self.max_length,
        }

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        split = self.data.split
        layers = "" if self.n_layers is None else f", its first {count(self.n_layers, 'layer')}"
        rates = f"learning rate {self.learning_rates[0]:g}"
        if len(self.learning_rates) > 1:
            rates = (
                "learning rate of each design's own, of "
                f"{', '.join(f'{rate:g}' for rate in self.learning_rates)}, by MRR on validation "
                f"pairs after {self.search_share:.0%} of the steps"
            )
        last = self.evaluate_every is None
        kept = "the last" if last else "by F1max on validation pairs the best"
        return {
            "question": _QUESTION,
            "data": {
                pairs.group: f"{len(pairs):,} pairs to train on, "
                f"{len(split.test.of_domain(pairs.group)):,} to judge by, half of them positive"
                for pairs in split.train
            },
            "base model": f"{self.base}{layers}",
            "budget": f"{self.steps} steps of {self.batch_size} pairs, {rates} (ten times that for "
            f"LoRA), AdamW with linear decay; {kept} weights are kept",
            "tokens kept per text": self.max_length,
            "judged": "each positive pair by the rank of the partner among the documents of its "
            "domain and by the share of negative pairs less alike; a domain is a task",
            "notes": [
                "In mixed batches most negatives are of other domains and easy; models of a single "
                "domain have negatives of their own domain only.",
                "Pairs that share a document are not independent: intervals are a little short.",
                *split.notes,
            ],
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSION)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        check_method(design, tuple(_PARAMETERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        try:
            _check_values(design.params)
            self._check_domains(design)
            self._check_layers(design)
        except DataError as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def _check_domains(self, design: Design) -> None:
        several = design.method in ("domain-experts", "wider")
        n_domains = len(self.data.domains)
        if several and n_domains < 2:
            raise DataError(f"{design.method} needs at least 2 domains, there is 1")
        if design.params.get("top_k", 1) > n_domains:
            raise DataError(f"top_k must be at most {n_domains}, the number of domains")

    def _check_layers(self, design: Design) -> None:
        chosen = design.params.get("layers", "all")
        if isinstance(chosen, str):
            return
        n_layers = _n_layers(self._base)
        if not all(-n_layers <= layer < n_layers for layer in chosen):
            raise DataError(f"layers must be from {-n_layers} to {n_layers - 1}, got {chosen}")

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs, read the data, embed the texts once for all who do not train."""
        work.progress(0.0, "reading the pairs")
        for design in designs:
            self.check(design)
        asked = {self._trained_as(design) for design in designs if _is_wrong(design)}
        self._shared_with = frozenset(asked)
        if any(design.method == "untrained" for design in designs):
            work.progress(0.5, "embedding the texts")
            self._untrained()
        elif any(design.method not in _WORDS for design in designs):
            _ = self._base  # what is wrong with it is told before any trial

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Train and judge one design.

        Raises
        ------
        BakeoffError
            If training diverged.
        """
        self.check(design)
        with warnings_noted() as warned:
            try:
                trial = self._run(design, seed, work)
            except FloatingPointError as error:
                rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
                raise BakeoffError(
                    f"design {design.name!r}: {error}; try learning rates below {rates}"
                ) from error
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    # -- one trial -------------------------------------------------------------------------------

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        judges = self._judges("test")
        n_texts = sum(len(judge.documents) for judge in judges.values())
        cost = {"texts_embedded": float(n_texts), "training_pairs": 0.0, "trained_parameters": 0.0}
        if design.method in _WORDS:
            return Trial(self._judged_by_words(design), {**cost, "texts_embedded": 0.0})
        if design.method == "untrained":
            vectors, model = self._untrained(), self._base
            sizes = float(_n_parameters(model))
            cost |= {"total_parameters": sizes, "active_parameters": sizes}
            cost["forward_flops_per_text"] = self._flops(model, self.data.domains[0])
            if self.keep_models:
                self._save(model, work.directory / "model")
            artifact = work.directory if self.keep_models else None
            return Trial(self._judged(vectors), cost, artifact, self._notes(design))
        if _is_wrong(design) and (found := self._found_wrong(design, seed)):
            vectors, trained = found
            return Trial(self._judged(vectors), cost | trained, None, self._notes(design))
        rate = self._rate(design, work)
        notes = self._notes(design)
        if len(self.learning_rates) > 1 and "learning_rate" not in design.params:
            notes = (*notes, f"Learning rate {rate:g}, by MRR on validation pairs.")
        kept = work.directory if self.keep_models and not _is_wrong(design) else None
        documents = {domain: judge.documents for domain, judge in judges.items()}
        wanted = _is_wrong(design) or self._trained_as(design) in self._shared_with
        vectors, wrong, trained = self._trained(
            design, rate, self.steps, seed, documents, work.progress, kept=kept, wrong=wanted
        )
        if wrong:
            self._keep_wrong(design, seed, wrong, trained)
        if _is_wrong(design):
            vectors = wrong
        return Trial(self._judged(vectors), cost | trained, kept, notes)

    def _trained(
        self,
        design: Design,
        rate: float,
        steps: int,
        seed: int,
        documents: Mapping[str, Sequence[str]],
        progress: Progress,
        *,
        kept: Path | None = None,
        wrong: bool = False,
    ) -> tuple[dict[str, Vectors], dict[str, Vectors], dict[str, float]]:
        """Train, embed, and save if asked to: vectors by domain, those under the wrong one, cost.

        `wrong` says whether the latter are wanted.
        Models of single domains are gone again before the next one is trained.
        """
        vectors: dict[str, Vectors] = {}
        misled: dict[str, Vectors] = {}
        cost = dict.fromkeys(("trained_parameters", "training_pairs", "training_seconds"), 0.0)
        for fit in self._fits(design, rate, steps, seed, progress):
            for domain in fit.domains:
                vectors[domain] = self._embed(fit.model, design, documents[domain], domain)
                if wrong:
                    other = _other(domain, self.data.domains)
                    misled[domain] = self._embed(fit.model, design, documents[domain], other)
            cost["trained_parameters"] += fit.trained_parameters
            cost["training_pairs"] += fit.pairs
            cost["training_seconds"] += fit.seconds
            cost["active_parameters"] = float(fit.active_parameters)
            cost["total_parameters"] = cost.get("total_parameters", 0.0) + fit.own_parameters
            if design.method == "lora-per-domain" and len(vectors) == len(fit.domains):
                cost["total_parameters"] += fit.active_parameters - fit.own_parameters
            if "forward_flops_per_text" not in cost:
                cost["forward_flops_per_text"] = self._flops(fit.model, fit.domains[0])
            if kept is not None:
                self._keep(design, fit, kept)
        return vectors, misled, cost

    def _fits(
        self, design: Design, rate: float, steps: int, seed: int, progress: Progress
    ) -> Iterator[_Fit]:
        """Yield trained models with the domains that they serve."""
        split = self.data.split
        if design.method not in _SEPARATE:
            model = self._joint(design, seed)
            report = counting(progress, "training, steps", (0.0, 0.9))
            groups = self._prompted(design, split.train)
            judged = self._prompted_pairs(design, split.validation)
            n_pairs, seconds = self._train(model, design, groups, judged, rate, steps, seed, report)
            yield _Fit(
                split.domains,
                model,
                trained_parameters=_n_trained(model),
                own_parameters=_n_parameters(model),
                active_parameters=_n_active(model),
                pairs=n_pairs,
                seconds=seconds,
            )
            return
        shares = shared_out(steps, [len(pairs) for pairs in split.train])
        done = 0
        for pairs, own_steps in zip(split.train, shares, strict=True):
            part = (0.9 * done / sum(shares), 0.9 * (done + own_steps) / sum(shares))
            report = counting(progress, f"training for {pairs.group}, steps", part)
            model = self._prepared(design, seed)
            adapter = self._with_lora(model, design, seed) if _is_lora(design) else None
            as_given = adapter is None or "learning_rate" in design.params
            own_rate = rate if as_given else _LORA_RATE * rate
            judged = split.validation.of_domain(pairs.group)
            n_pairs, seconds = self._train(
                model, design, [pairs], judged, own_rate, own_steps, seed, report
            )
            trained = _n_trained(model)
            yield _Fit(
                (pairs.group,),
                model,
                trained_parameters=trained,
                own_parameters=trained if adapter is not None else _n_parameters(model),
                active_parameters=_n_parameters(model),
                pairs=n_pairs,
                seconds=seconds,
                adapter=adapter,
            )
            done += own_steps

    def _train(
        self,
        model: SentenceTransformer,
        design: Design,
        groups: Sequence[TextPairs],
        validation: LabelledPairs,
        rate: float,
        steps: int,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> tuple[int, float]:
        """Train a model in place; return how many pairs it read, and the seconds it took."""
        from bakeoff.embedding.cocitation_training import train_cocitation
        from bakeoff.embedding.domain_experts import routing_loss
        from bakeoff.embedding.ranking_losses import MNRLoss, MNRPlusLoss

        params = design.params
        normalize = bool(params.get("normalize", True))
        kind = MNRLoss if params.get("loss", "mnr+") == "mnr" else MNRPlusLoss
        loss = kind(scale=params.get("scale", 20.0 if normalize else 1.0), normalize=normalize)

        def of_routers(ids: Tensor) -> Tensor:
            return _ROUTER_WEIGHT * routing_loss(model[0].auto_model, ids)

        learned = params.get("routing", "enforced") != "enforced"
        model.to(self.device)
        began = time.perf_counter()
        history = train_cocitation(
            model,
            groups,
            None if self.evaluate_every is None else validation,
            loss=loss,
            steps=steps,
            batch_size=self.batch_size,
            batching=params.get("batching", "mixed"),
            learning_rate=rate,
            evaluate_every=self.evaluate_every,
            patience=steps + 1,  # equal steps for all: nobody stops early
            auxiliary=of_routers if learned else None,
            seed=seed,
            progress=progress,
        )
        return history.n_pairs, time.perf_counter() - began

    def _embed(
        self, model: SentenceTransformer, design: Design, texts: Sequence[str], domain: str
    ) -> Vectors:
        from bakeoff.embedding.domain_encoder import DomainTransformer
        from bakeoff.models.encoding import encode

        prompt = _prompt(domain) if design.params.get("prompts") else ""
        first = model[0]
        told = first.using(domain) if isinstance(first, DomainTransformer) else nullcontext()
        with told:  # texts that are cut are counted once, in the trial's notes
            vectors = encode(model, [prompt + text for text in texts], on_truncated=lambda _: None)
        if not np.isfinite(vectors).all():
            raise FloatingPointError("vectors are no numbers after training")
        return vectors

    def _prompted(self, design: Design, groups: Sequence[TextPairs]) -> list[TextPairs]:
        if not design.params.get("prompts"):
            return list(groups)
        return [
            TextPairs(
                tuple(_prompt(pairs.group) + text for text in pairs.queries),
                tuple(_prompt(pairs.group) + text for text in pairs.positives),
                group=pairs.group,
            )
            for pairs in groups
        ]

    def _prompted_pairs(self, design: Design, pairs: LabelledPairs) -> LabelledPairs:
        if not design.params.get("prompts"):
            return pairs
        first, second = (
            tuple(_prompt(domain) + text for domain, text in zip(pairs.domains, side, strict=True))
            for side in (pairs.texts_a, pairs.texts_b)
        )
        return LabelledPairs(first, second, pairs.labels, pairs.domains)

    # -- models ----------------------------------------------------------------------------------

    @property
    def _base(self) -> SentenceTransformer:
        """The base model, cut to its length and layers: to read, not to change."""
        if self._loaded.model is None:
            self._loaded.model = self._read_base()
        model: SentenceTransformer = self._loaded.model
        return model

    def _read_base(self) -> SentenceTransformer:
        if self._encoder.is_sentence_transformer:
            model = copy.deepcopy(self._encoder.model)
        else:
            from bakeoff.embedding.baselines import MeanPooling
            from bakeoff.embedding.winner import sentence_transformer
            from bakeoff.models import load

            base = load(self.base)
            attention = "causal" if base.is_decoder else "bidirectional"
            head = MeanPooling(base.hidden_size)
            model = sentence_transformer(
                base, head, attention=attention, max_length=base.max_length
            )
        longest = model.max_seq_length
        if longest is not None and self.max_length > longest:
            raise DataError(
                f"max_length must be at most {longest}, what {self.base} reads, got "
                f"{self.max_length}"
            )
        model.max_seq_length = self.max_length
        model.default_prompt_name = None
        if self.n_layers is not None:
            _keep_layers(model, self.n_layers)
        return model.to("cpu").float().eval()

    def _prepared(self, design: Design, seed: int) -> SentenceTransformer:
        """Return the model that a design begins with, before it knows domains."""
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize

        from bakeoff.embedding.domain_encoder import TanhPooling
        from bakeoff.embedding.pooling import PoolingModule

        model = copy.deepcopy(self._base)
        modules = list(model.children())
        if design.params.get("pooling", "base") == "tanh":
            width = int(model[0].auto_model.config.get_text_config().hidden_size)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                modules = [modules[0], TanhPooling(width)]
        elif not design.params.get("normalize", True):
            modules = [module for module in modules if not isinstance(module, Normalize)]
            for module in modules:
                if isinstance(module, PoolingModule):
                    module.normalize = False
        else:
            return model
        return SentenceTransformer(modules=modules, device="cpu").eval()

    def _joint(self, design: Design, seed: int) -> SentenceTransformer:
        from bakeoff.embedding.domain_encoder import DomainEncoder
        from bakeoff.embedding.domain_experts import widen_feed_forward

        params, domains = design.params, self.data.domains
        model = self._prepared(design, seed)
        experts = design.method == "domain-experts"
        tokens = bool(params.get("tokens", design.method != "shared"))
        if design.method == "wider":
            widen_feed_forward(model[0].auto_model, len(domains), seed=seed)
        if not experts and not tokens:
            return model
        layers = params.get("layers", "all")
        if layers == "middle":
            layers = [_n_layers(model) // 2]
        return DomainEncoder.from_model(
            model,
            domains,
            experts=experts,
            domain_tokens=tokens,
            layers=layers,
            routing=params.get("routing", "enforced"),
            top_k=min(params.get("top_k", 2), len(domains)),
            seed=seed,
        )

    def _with_lora(self, model: SentenceTransformer, design: Design, seed: int) -> Any:
        """Put an adapter into all linear layers, freeze the rest, and return PEFT's model."""
        import peft
        import torch

        from bakeoff.models.attention import transformer_layers

        backbone = model[0].auto_model
        layers = transformer_layers(backbone)
        inside = set(layers.modules()) if layers is not None else set(backbone.modules())
        targets = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, torch.nn.Linear) and module in inside
        ]
        model.requires_grad_(False)
        rank = int(design.params.get("rank", _LORA_RANK))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(
                backbone,
                peft.LoraConfig(
                    r=rank,
                    lora_alpha=_ALPHA_OF_RANK * rank,
                    target_modules=targets,
                    task_type="FEATURE_EXTRACTION",
                ),
            )

    def _flops(self, model: SentenceTransformer, domain: str) -> float:
        """Count what embedding a text of median length costs."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from bakeoff.embedding.domain_encoder import DomainText

        judges = self._judges("test").values()
        texts = sorted((text for judge in judges for text in judge.documents), key=len)
        text = DomainText(texts[len(texts) // 2], domain)
        features = {
            name: value.to(model.device) if hasattr(value, "to") else value
            for name, value in model.preprocess([text]).items()
        }
        counter = FlopCounterMode(display=False)
        # torch's counter does not know a CPU's attention kernel; it knows plain matrices.
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        model.eval()
        with torch.no_grad(), attention, counter:
            model(features)
        return float(counter.get_total_flops())

    # -- learning rates --------------------------------------------------------------------------

    def _rate(self, design: Design, work: Work) -> float:
        """Return a design's learning rate; look for it on validation pairs if there is a choice."""
        if "learning_rate" in design.params:
            return float(design.params["learning_rate"])
        if len(self.learning_rates) == 1:
            return self.learning_rates[0]
        steps = max(1, round(self.search_share * self.steps))
        documents = {
            domain: judge.documents for domain, judge in self._judges("validation").items()
        }

        def score(rate: float) -> float:
            work.progress(0.0, f"trying the learning rate {rate:g}")
            try:
                vectors, _, _ = self._trained(
                    design, rate, steps, _SEARCH_SEED, documents, lambda *_: None
                )
            except FloatingPointError:
                return -math.inf
            scores = self._judged(vectors, "validation")["mrr"]
            return float(np.mean([units.mean() for units in scores.values()]))

        def build(folder: Path) -> None:
            tried = [[rate, score(rate)] for rate in sorted(self.learning_rates)]
            best = max(tried, key=lambda pair: pair[1])  # of equal ones the lowest
            if math.isinf(best[1]):
                raise BakeoffError(f"design {design.name!r}: training diverged at every rate")
            write_text(folder / "rate.json", json.dumps(best[0]))

        key = _digest([self._facts(), _VERSION, self._trained_as(design)])[:20]
        folder = build_once(cache_directory() / "domains" / f"rate-{key}", build)
        return float(json.loads((folder / "rate.json").read_text("utf-8")))

    # -- judging ---------------------------------------------------------------------------------

    def _judges(self, part: Literal["validation", "test"]) -> dict[str, DomainJudge]:
        if part not in self._loaded.judges:
            pairs: LabelledPairs = getattr(self.data.split, part)
            self._loaded.judges[part] = {
                domain: DomainJudge(
                    pairs.of_domain(domain), self.data.related.get(domain, frozenset())
                )
                for domain in self.data.domains
            }
        return self._loaded.judges[part]

    def _judged(
        self, vectors: Mapping[str, Vectors], part: Literal["validation", "test"] = "test"
    ) -> Scores:
        return self._scores(lambda domain: cosine_similarities(vectors[domain]), part)

    def _judged_by_words(self, design: Design) -> Scores:
        kind: Any = design.method
        train = {pairs.group: pairs for pairs in self.data.split.train}
        judges = self._judges("test")

        def similarities(domain: str) -> Any:
            known = [*train[domain].queries, *train[domain].positives]
            return word_similarities(kind, judges[domain].documents, known)

        return self._scores(similarities, "test")

    def _scores(
        self, similarities: Callable[[str], Any], part: Literal["validation", "test"]
    ) -> Scores:
        scores: Scores = {name: {} for name in DOMAIN_ENCODER_METRICS}
        for domain, judge in self._judges(part).items():
            for name, units in judge.scores(similarities(domain)).items():
                scores[name][domain] = units
        return scores

    def _notes(self, design: Design) -> tuple[str, ...]:
        notes = [self._truncation()]
        if _is_wrong(design):
            domains = self.data.domains
            pairs = [f"{domain} as {_other(domain, domains)}" for domain in domains]
            notes.append(f"Every text was taken for one of another domain: {', '.join(pairs)}.")
        return tuple(note for note in notes if note)

    def _truncation(self) -> str:
        if self._loaded.n_cut is None:
            tokenizer = self._base.tokenizer
            judges = self._judges("test").values()
            texts = [text for judge in judges for text in judge.documents]
            lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
            self._loaded.n_cut = sum(length > self.max_length for length in lengths)
        if not self._loaded.n_cut:
            return ""
        total = sum(len(judge.documents) for judge in self._judges("test").values())
        return f"{self._loaded.n_cut:,} of {total:,} texts were cut at {self.max_length} tokens."

    # -- what is made once -----------------------------------------------------------------------

    def _untrained(self) -> dict[str, Vectors]:
        facts = [
            *(_VERSION, self.data.fingerprint(), self._encoder.fingerprint),
            *(self.n_layers, self.max_length),
        ]

        def build(folder: Path) -> None:
            design = Design("untrained", "untrained")
            vectors = {
                domain: self._embed(self._base, design, judge.documents, domain)
                for domain, judge in self._judges("test").items()
            }
            self._write_vectors(folder, vectors)

        folder = cache_directory() / "domains" / f"vectors-{_digest(facts)[:20]}"
        return self._read_vectors(build_once(folder, build))

    def _trained_as(self, design: Design) -> str:
        """Return what a design trains, which does not depend on how it is judged."""
        params = {name: value for name, value in design.params.items() if name != "judged_as"}
        return json.dumps([design.method, params], sort_keys=True)

    def _wrong_folder(self, design: Design, seed: int) -> Path:
        key = _digest([self._facts(), _VERSION, self._trained_as(design), seed])[:20]
        return cache_directory() / "domains" / f"wrong-{key}"

    def _found_wrong(
        self, design: Design, seed: int
    ) -> tuple[dict[str, Vectors], dict[str, float]] | None:
        folder = self._wrong_folder(design, seed)
        if not folder.is_dir():
            return None
        cost: dict[str, float] = json.loads((folder / "cost.json").read_text("utf-8"))
        return self._read_vectors(folder), cost

    def _keep_wrong(
        self, design: Design, seed: int, vectors: Mapping[str, Vectors], cost: Mapping[str, float]
    ) -> None:
        def build(folder: Path) -> None:
            self._write_vectors(folder, vectors)
            write_text(folder / "cost.json", json.dumps(dict(cost)))

        build_once(self._wrong_folder(design, seed), build)

    def _write_vectors(self, folder: Path, vectors: Mapping[str, Vectors]) -> None:
        for number, domain in enumerate(self.data.domains):
            np.save(folder / f"{number}.npy", vectors[domain], allow_pickle=False)

    def _read_vectors(self, folder: Path) -> dict[str, Vectors]:
        return {
            domain: np.load(folder / f"{number}.npy", allow_pickle=False)
            for number, domain in enumerate(self.data.domains)
        }

    # -- what leaves -----------------------------------------------------------------------------

    def _save(self, model: SentenceTransformer, folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(str(folder), create_model_card=False)

    def _keep(self, design: Design, fit: _Fit, folder: Path) -> None:
        if design.method not in _SEPARATE:
            if design.params.get("prompts"):
                fit.model.prompts = {domain: _prompt(domain) for domain in self.data.domains}
            self._save(fit.model, folder / "model")
            return
        own = folder / folder_name(fit.domains[0], self.data.domains)
        if fit.adapter is None:
            self._save(fit.model, own)
            return
        # Asked to decide for itself, PEFT looks the base model up on the hub.
        fit.adapter.save_pretrained(str(own), save_embedding_layers=False)
        (own / "README.md").unlink(missing_ok=True)  # an empty form

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save what a trial trained as sentence-transformers folders, with a README.

        One model for all domains is the folder itself. Models of single domains have a folder
        each; LoRA has the base model in ``base`` and an adapter for each domain beside it.

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
            Whether the folder loads without bakeoff.
        """
        domains = self.data.domains
        with atomic_folder(destination) as scratch:
            if design.method in _SEPARATE:
                folders = {domain: folder_name(domain, domains) for domain in domains}
                for folder in folders.values():
                    shutil.copytree(artifact / folder, scratch / folder)
                kind = "adapters" if _is_lora(design) else "models"
                if _is_lora(design):
                    self._save(self._base, scratch / "base")
                stock = all(_is_stock(path.parent) for path in scratch.glob("*/modules.json"))
            else:
                shutil.copytree(artifact / "model", scratch, dirs_exist_ok=True)
                folders, kind = {}, "model"
                stock = _is_stock(scratch)
            knows = design.method == "domain-experts" or bool(design.params.get("tokens"))
            knows = knows or (design.method == "wider" and design.params.get("tokens", True))
            facts = {
                "kind": kind,
                "domains": list(domains),
                "folders": folders,
                "stock": stock,
                "takes_domain": bool(knows),
                "prompts": bool(design.params.get("prompts")),
            }
            write_text(scratch / _FACTS_FILE, json.dumps(facts, indent=1) + "\n")
            lines = "\n".join(_usage(destination, facts))
            parts = [
                f"# {design.name}",
                f"Method: {design.method}. Trained on co-cited pairs of {self.data.split.name}: "
                f"{', '.join(domains)}. Base model: {self.base}.",
                reason,
                f"```python\n{lines}\n```",
                "" if stock else "Needs bakeoff beside sentence-transformers.",
            ]
            text = "\n\n".join(part for part in parts if part) + "\n"
            write_text(scratch / "README.md", text)
        return stock

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        return _usage(destination, json.loads((destination / _FACTS_FILE).read_text("utf-8")))


@dataclass(frozen=True)
class _Fit:
    """A trained model, the domains that it serves, and what it took.

    `own_parameters` are those that no other model of the design has.
    """

    domains: tuple[str, ...]
    model: SentenceTransformer
    trained_parameters: int
    own_parameters: int
    active_parameters: int
    pairs: int
    seconds: float
    adapter: Any = None


class _Loaded:
    """What trials share in one process; left behind when pickled."""

    def __init__(self) -> None:
        self.data: DomainPairs | None = None
        self.model: Any = None
        self.judges: dict[str, dict[str, DomainJudge]] = {}
        self.n_cut: int | None = None

    def __reduce__(self) -> tuple[type[_Loaded], tuple[()]]:
        return (type(self), ())


def shared_out(total: int, weights: Sequence[int]) -> list[int]:
    """Share a number out by weight, at least 1 each, by largest remainders.

    The sum is `total`, or the number of weights if that is larger.

    Examples
    --------
    >>> shared_out(10, [50, 30, 5]), shared_out(2, [9, 1, 1])
    ([6, 3, 1], [1, 1, 1])
    """
    n = len(weights)
    rest = max(0, total - n)
    exact = [max(0.0, total * weight / sum(weights) - 1) for weight in weights]
    scale = rest / sum(exact) if sum(exact) else 0.0
    shares = [scale * share for share in exact]
    whole = [math.floor(share) for share in shares]
    order = sorted(range(n), key=lambda row: (whole[row] - shares[row], row))
    for row in order[: rest - sum(whole)]:
        whole[row] += 1
    return [1 + share for share in whole]


def _usage(destination: Path, facts: Mapping[str, Any]) -> list[str]:
    trusting = "" if facts["stock"] else ", trust_remote_code=True"
    lines = ["from sentence_transformers import SentenceTransformer"]
    domain = facts["domains"][0]
    if facts["kind"] == "adapters":
        return [
            *lines,
            f"model = SentenceTransformer({str(destination / 'base')!r}{trusting})",
            f"model[0].auto_model.load_adapter("
            f"{str(destination / facts['folders'][domain])!r})  # of {domain}",
            "vectors = model.encode(['your text'])",
        ]
    if facts["kind"] == "models":
        folder = str(destination / facts["folders"][domain])
        return [
            *lines,
            f"model = SentenceTransformer({folder!r}{trusting})  # of {domain}",
            "vectors = model.encode(['your text'])",
        ]
    told = ""
    if facts["takes_domain"]:
        told = f", domain={domain!r}"
    elif facts["prompts"]:
        told = f", prompt_name={domain!r}"
    return [
        *lines,
        f"model = SentenceTransformer({str(destination)!r}{trusting})",
        f"vectors = model.encode(['your text']{told})",
    ]


def _is_stock(folder: Path) -> bool:
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    return all(module["type"].startswith("sentence_transformers.") for module in modules)


def _keep_layers(model: SentenceTransformer, n_layers: int) -> None:
    from bakeoff.models.attention import transformer_layers

    backbone = model[0].auto_model
    layers = transformer_layers(backbone)
    if layers is None or n_layers > len(layers):
        have = "layers of an unknown kind" if layers is None else count(len(layers), "layer")
        raise DataError(f"n_layers is {n_layers}, but the base model has {have}")
    del layers[n_layers:]
    config = backbone.config.get_text_config()
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]


def _n_layers(model: SentenceTransformer) -> int:
    return int(model[0].auto_model.config.get_text_config().num_hidden_layers)


def _n_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _n_trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _n_active(model: Any) -> int:
    """Return how many parameters one text meets; the whole table of tokens counts."""
    from bakeoff.embedding.domain_experts import DomainExperts

    idle = 0
    for module in model.modules():
        if isinstance(module, DomainExperts):
            used = module.top_k if module.routing in ("topk", "token_topk") else 1
            unused = len(module.experts) - used
            idle += unused * _n_parameters(module.experts[0])
    return _n_parameters(model) - idle


def _is_wrong(design: Design) -> bool:
    return bool(design.params.get("judged_as") == "wrong")


def _is_lora(design: Design) -> bool:
    return design.method == "lora-per-domain"


def _other(domain: str, domains: Sequence[str]) -> str:
    return domains[(list(domains).index(domain) + 1) % len(domains)]


def _prompt(domain: str) -> str:
    return f"{domain}: "


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_values(params: Mapping[str, Any]) -> None:
    from bakeoff.embedding.domain_experts import ROUTINGS

    for name, choices in {**_CHOICES, "routing": ROUTINGS}.items():
        if name in params and not any(params[name] is c or params[name] == c for c in choices):
            known = ", ".join(map(str, choices))
            raise DataError(f"{name} must be one of {known}, got {params[name]!r}")
    for name in ("top_k", "rank"):
        if name in params and (not _is_int(params[name]) or params[name] < 1):
            raise DataError(f"{name} must be an integer of at least 1, got {params[name]!r}")
    for name in ("learning_rate", "scale"):
        value = params.get(name, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise DataError(f"{name} must be above 0, got {value!r}")
    layers = params.get("layers", "all")
    listed_layers = isinstance(layers, list) and layers and all(map(_is_int, layers))
    if layers not in ("all", "middle") and not listed_layers:
        raise DataError(f"layers must be all, middle, or a list of numbers, got {layers!r}")
    knows = params.get("tokens", True) or params.get("routing", "enforced") == "enforced"
    if params.get("judged_as") == "wrong" and not knows:
        raise DataError("judged_as='wrong' makes no difference: nothing in it knows the domain")
    if params.get("tokens") and params.get("prompts"):
        raise DataError("give tokens or prompts, not both")
    if "top_k" in params and params.get("routing", "enforced") not in ("topk", "token_topk"):
        raise DataError("top_k is for routing='topk' and 'token_topk'")
