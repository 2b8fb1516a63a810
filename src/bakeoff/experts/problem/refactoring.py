"""How to make a dense decoder cheaper by domain experts: refactored, cut, or made narrow at once.

Every design but the ceiling uses the same number of feed-forward channels per token. They are cut
from a trained decoder, by domain, for all domains together or at random, and then tuned on the same
texts in the same order; or a decoder of that width is trained from random weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import build_once, cache_directory, write_text
from bakeoff.data.domain_texts import DomainTexts, Size
from bakeoff.errors import DataError
from bakeoff.experts.problem.common import (
    LOSS,
    SCRATCH_RATE,
    SMALL_BASES,
    SMALL_SHAPE,
    DomainProblem,
    Scores,
    forward_flops_per_token,
)
from bakeoff.models.gguf import quiet_transformers
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting

if TYPE_CHECKING:
    from torch import Tensor

    from bakeoff.experts.read_me import ChannelStats
    from bakeoff.models import LanguageModel

Progress = Callable[[int, int], None]

REFACTORING_METRICS: dict[str, Metric] = {
    "loss": LOSS,
    "locality": Metric("tokens routed as the token before", margin=0.01),
    "agreement": Metric("tokens routed to their document's domain", margin=0.01),
}

_QUESTION = "how to make a dense decoder cheaper by domain experts"
_ROUTED = ("routing", "attention", "objective", "rounds", "router_share", "expert_share")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "read-me": _ROUTED,
    "random-masks": _ROUTED,
    "pooled-mask": ("rounds", "expert_share"),
    "dense-narrow": (),
    "dense-teacher": (),
}
# The paper spends 100 steps of 64 sequences on the router for 200 of 128 on the experts.
_ROUTER_SHARE = 0.2
_ROUNDS = 8
_DECAY = 0.8
# The paper's rates: experts at a sixth of the peak of Llama 2's training, the router at ten times
# as much.
_TEACHER_RATE = SCRATCH_RATE
_SCRATCH_RATE = _TEACHER_RATE / 6
_NAMED_RATE = 5e-5
_ROUTER_RATES = 10.0
_TEACHER_SEED = 0
# Raise when training or judging changes what a trial scores.
_VERSION = 1


def refactoring_designs() -> Designs:
    """Return Read-ME, its variants, and the rivals a sceptic would choose.

    Examples
    --------
    >>> [design.name for design in refactoring_designs()][:3]
    ['dense teacher', 'narrow dense, from scratch', 'Read-ME']
    """
    ours, random, pooled = "read-me", "random-masks", "pooled-mask"
    known = {"routing": "domain"}
    untuned = {"expert_share": 0.0}
    return Designs(
        [
            Design("dense teacher", "dense-teacher"),
            Design("narrow dense, from scratch", "dense-narrow"),
            Design("Read-ME", ours),
            Design("Read-ME, domain known", ours, known),
            Design("Read-ME, domain known, not tuned", ours, {**known, **untuned}),
            Design("Read-ME, router alone tuned", ours, untuned),
            Design("Read-ME, token-only router", ours, {"attention": False}),
            Design("Read-ME, paper's routing loss", ours, {"objective": "paper"}),
            Design("Read-ME, one round", ours, {"rounds": 1}),
            Design("Read-ME, half on the router", ours, {"router_share": 0.5, "expert_share": 0.5}),
            Design("random masks", random),
            Design("random masks, domain known, not tuned", random, {**known, **untuned}),
            Design("pooled mask", pooled),
            Design("pooled mask, one round", pooled, {"rounds": 1}),
            Design("pooled mask, not tuned", pooled, untuned),
        ]
    )


class RefactoringProblem(DomainProblem):
    """How to make a dense decoder cheaper: cut it into domain experts, cut it once, or start anew.

    Designs begin with one trained decoder. The seed draws the router's first weights, random masks,
    the weights of a decoder trained anew, and the order of texts, which is the same for all
    designs.

    Parameters
    ----------
    texts
        Domains, at least two; or a size of the default ones.
    base
        The dense decoder: a packaged name, folder or hub id; or ``"small-gpt"`` or
        ``"small-parallel"``, a small one that is trained on the texts beforehand, once for all
        seeds and designs.
    n_layers
        Refused: the first layers of a trained decoder are no trained decoder.
    shape
        Of the small decoder.
    keep
        Share of each layer's feed-forward channels that a token uses, in (0, 1].
    n_tokens
        Tokens that a design may read in tuning, to within a batch. Router and experts share them.
    teacher_tokens
        Tokens that the small decoder has read beforehand.
    calibration_tokens
        Tokens of each domain by which channels are chosen; the paper's 16 sequences of 4,096.
    context
        Length of sequences and longest document in tokens.
    batch_size
        Sequences per step.
    learning_rate
        Of the experts' tuning in the first round: by default the paper's 5e-5, for the small
        decoder a sixth of the rate of its own training. The router has ten times as much.
    device
        Where to train.

    Raises
    ------
    DataError
        If a number is out of range, there is only one domain, or one has too few documents.
    """

    question = _QUESTION

    def __init__(
        self,
        texts: DomainTexts | Size | None = None,
        *,
        base: str = "small-gpt",
        n_layers: int | None = None,
        shape: SmallGPT = SMALL_SHAPE,
        keep: float = 0.5,
        n_tokens: int = 300_000,
        teacher_tokens: int = 1_000_000,
        calibration_tokens: int = 16 * 4096,
        context: int | None = None,
        batch_size: int = 4,
        learning_rate: float | None = None,
        device: str = "cpu",
    ) -> None:
        if n_layers is not None:
            raise DataError(
                f"n_layers must be left out, got {n_layers}: what is refactored is a trained "
                "decoder, and the first layers of one are none"
            )
        if learning_rate is None:
            learning_rate = _SCRATCH_RATE if base in SMALL_BASES else _NAMED_RATE
        super().__init__(
            texts,
            base=base,
            shape=shape,
            n_tokens=n_tokens,
            context=context,
            batch_size=batch_size,
            learning_rate=learning_rate,
            device=device,
        )
        if not 0 < keep <= 1:
            raise DataError(f"keep must be in (0, 1], got {keep}")
        for name, number in {
            "teacher_tokens": teacher_tokens,
            "calibration_tokens": calibration_tokens,
        }.items():
            if number < 1:
                raise DataError(f"{name} must be at least 1, got {number}")
        if len(self.texts.domains) < 2:
            raise DataError(
                f"texts must have at least 2 domains, got {', '.join(self.texts.domains)}: there "
                "is an expert for each"
            )
        self.keep, self.teacher_tokens = keep, teacher_tokens
        self.calibration_tokens = calibration_tokens

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The loss of held-out documents, and where the router sends their tokens."""
        return REFACTORING_METRICS

    def _version(self) -> int:
        return _VERSION

    def _facts(self) -> dict[str, object]:
        return {
            **super()._facts(),
            "keep": self.keep,
            "teacher_tokens": self.teacher_tokens if self.from_scratch else None,
            "calibration_tokens": self.calibration_tokens,
        }

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        teacher = self.base
        if self.from_scratch:
            teacher += (
                f", trained on {self.teacher_tokens:,} tokens of the domains in equal shares, once "
                f"for all seeds and designs, learning rate {_TEACHER_RATE:g}"
            )
        narrow = "A narrow decoder from scratch reads what teacher and tuning read together."
        return {
            **super().describe(),
            "base": teacher,
            "budget": f"{self.keep:g} of the feed-forward channels per token; {self.n_tokens:,} "
            f"tokens read in tuning, sequences of {self.context}, batches of {self.batch_size}, "
            f"learning rate {self.learning_rate:.2g} for the experts and "
            f"{_ROUTER_RATES * self.learning_rate:.2g} for the router in the first round, "
            f"{_DECAY:g} times as much in each round that follows",
            "match": "tokens read in tuning, and feed-forward channels per token. Channels are "
            f"chosen by up to {self.calibration_tokens:,} tokens of each domain, which are not "
            "counted. Routed designs carry their router on top: see the costs",
            "routing": "locality: the share of a document's tokens that go to the expert of the "
            "token before; agreement: the share that go to the expert of the document's domain "
            f"(by chance 1 in {len(self.texts.domains)}). A design without routing is one expert, "
            "and one that is told the domain goes by it: both are 1 there by definition, so that "
            "only designs with a router can be compared by them",
            "notes": [*self.texts.notes, *([narrow] if self.from_scratch else [])],
        }

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        check_method(design, tuple(_PARAMETERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        if design.method == "dense-narrow" and not self.from_scratch:
            raise DataError(
                f"design {design.name!r}: dense-narrow is trained from random weights on what its "
                f"rivals' decoder was trained on, which is known for base="
                f"{' or '.join(SMALL_BASES)} only, got base={self.base!r}"
            )
        if design.method in ("dense-narrow", "dense-teacher"):
            return
        try:
            settings = _Settings.of(design)
        except (DataError, TypeError) as error:
            raise DataError(f"design {design.name!r}: {error}") from error
        if settings.router_share and self.keep == 1:
            raise DataError(
                f"design {design.name!r}: with keep=1 all experts are alike, so that there is "
                "nothing to teach a router: give router_share=0"
            )

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; train the small decoder; see which channels the domains use."""
        super().prepare(designs, seeds, work)
        self._teacher(counting(work.progress, "training the dense decoder, steps", (0.0, 0.8)))
        self.channel_stats(counting(work.progress, "which channels domains use", (0.8, 1.0)))

    # -- what designs share ----------------------------------------------------------------------

    def start(self, seed: int) -> Any:
        """Return the trained dense decoder, a copy of the caller's own; the same for all seeds."""
        return copy.deepcopy(self._teacher().model).to(self.device)

    def channel_stats(self, progress: Progress | None = None) -> ChannelStats:
        """Return how strongly each domain uses each channel of the dense decoder; kept on disk."""
        from bakeoff.experts.read_me import ChannelStats, collect_channel_stats

        given = [_VERSION, self._teacher().fingerprint, self.texts.fingerprint()]
        folder = self._cached(
            "channels",
            [*given, self.context, self.calibration_tokens],
            lambda folder: collect_channel_stats(
                self.start(0),
                self._calibration(),
                batch_size=self.batch_size,
                max_tokens=self.calibration_tokens,
                progress=progress,
            ).save(folder / "channels.safetensors"),
        )
        return ChannelStats.load(folder / "channels.safetensors")

    def _calibration(self) -> dict[str, Tensor]:
        """Return rows of each domain in an order drawn once."""
        import torch

        generator = torch.Generator().manual_seed(_TEACHER_SEED)
        return {
            domain: rows[torch.randperm(len(rows), generator=generator)]
            for domain, rows in self.rows().items()
        }

    def _teacher(self, progress: Progress | None = None) -> LanguageModel:
        """Return the dense decoder; a small one is trained when first asked for."""
        if not self.from_scratch:
            return self._base()

        def build(folder: Path) -> None:
            model = super(RefactoringProblem, self).start(_TEACHER_SEED)
            self._train(model, self.teacher_tokens, _TEACHER_SEED, progress)
            self.save_model(model, folder)

        given = [self.base, asdict(self.shape), self.texts.fingerprint(), self.teacher_tokens]
        sizes = [self.context, self.batch_size, _TEACHER_RATE, self.device]
        folder = self._cached("dense-decoder", [_VERSION, *given, *sizes], build)
        return self._loaded.models.language_model(str(folder))

    def _cached(self, kind: str, key: list[object], build: Callable[[Path], None]) -> Path:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return build_once(cache_directory() / "models" / f"{kind}-{digest}", build)

    def _train(self, model: Any, n_tokens: int, seed: int, progress: Progress | None) -> int:
        """Train a decoder from random weights on equal shares; return how many tokens it read."""
        from bakeoff.experts.causal_training import domain_batches, train_causal

        steps = max(1, n_tokens // (self.batch_size * self.context))
        train_causal(
            model,
            domain_batches(self.rows(), batch_size=self.batch_size, seed=seed),
            steps=steps,
            peak_learning_rate=_TEACHER_RATE,
            warmup_steps=steps // 10,
            progress=progress,
        )
        return steps * self.batch_size * self.context

    # -- designs ---------------------------------------------------------------------------------

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        import torch

        makers: dict[str, Callable[[Design, int, Progress], _Made]] = {
            "read-me": self._routed,
            "random-masks": self._routed,
            "pooled-mask": self._pooled,
            "dense-narrow": self._narrow,
            "dense-teacher": self._unchanged,
        }
        with torch.random.fork_rng():  # of dropout, where the decoder has some
            torch.manual_seed(seed)
            report = counting(work.progress, "training, steps", (0.0, 0.8))
            made = makers[design.method](design, seed, report)
        scores, notes = self._scores(made, counting(work.progress, "judging", (0.8, 1.0)))
        self.save_model(made.model, work.directory / "model")
        return Trial(scores, self._costs(made), work.directory, (*made.notes, *notes))

    def _routed(self, design: Design, seed: int, progress: Progress) -> _Made:
        """Cut experts out, put a router before them, tune both in turn, and pack them."""
        from bakeoff.experts.read_me import build_expert_masks, moefy

        settings = _Settings.of(design)
        dense = self.start(seed)
        dense_flops = forward_flops_per_token(dense, self.rows())
        masks = build_expert_masks(
            self.channel_stats(),
            self.keep,
            rule="random" if design.method == "random-masks" else "domain",
            seed=seed,
        )
        model = moefy(dense, masks, router_attention=settings.attention, seed=seed)
        reading = _Reading(self, seed)
        known = (lambda: reading.experts(self.context)) if settings.routing == "domain" else None
        read = self._tune(model, reading, settings, known, progress)
        # As it runs: under masks, all channels are computed.
        routing_flops = 0.0 if known else forward_flops_per_token(model, self.rows()) - dense_flops
        flops = read.router * (dense_flops + 3 * routing_flops)
        flops += read.experts * (3 * dense_flops + routing_flops)
        tuned = model.language_model.parameters() if read.experts else ()
        trained = sum(p.numel() for p in tuned)
        if read.router:
            trained += sum(p.numel() for p in model.router.parameters())
        share = masks.overlap()[~np.eye(masks.n_experts, dtype=bool)].mean()
        note = f"Two experts share {share:.0%} of their channels, on average."
        with quiet_transformers():
            model.pack().eval()
        return _Made(model, settings.routing, read, trained, flops, (note,))

    def _pooled(self, design: Design, seed: int, progress: Progress) -> _Made:
        """Cut the decoder down to the channels that all domains together use most, and tune it."""
        import torch

        from bakeoff.experts.channel_pruning import prune_channels
        from bakeoff.experts.read_me import ExpertMasks, build_expert_masks, moefy

        settings = _Settings.of(design)
        model = self.start(seed)
        pooled = build_expert_masks(self.channel_stats(), self.keep, rule="pooled")
        prune_channels(model, [layer[0] for layer in pooled.layers])
        flops = forward_flops_per_token(model, self.rows())
        read, trained = _Read(), 0
        if settings.expert_share:
            # Tuned by the same code as experts, of which there is one: all masks let all through.
            through = tuple(torch.ones_like(m[:, : int(m[0].sum())]) for m in pooled.layers)
            wrapped = moefy(model, ExpertMasks(pooled.domains, through), seed=seed)
            read = self._tune(wrapped, _Reading(self, seed), settings, lambda: 0, progress)
            trained = sum(p.numel() for p in model.parameters())
        return _Made(model.eval(), "none", read, trained, 3 * flops * read.experts)

    def _narrow(self, design: Design, seed: int, progress: Progress) -> _Made:
        """Train a decoder with as few channels from random weights, on all that others saw."""
        import torch
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self._teacher().model.config)
        config.intermediate_size = max(1, round(self.keep * config.intermediate_size))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(self.device)
        n_read = self._train(model, self.teacher_tokens + self.n_tokens, seed, progress)
        flops = 3 * n_read * forward_flops_per_token(model, self.rows())
        trained = sum(p.numel() for p in model.parameters())
        return _Made(model, "none", _Read(experts=n_read), trained, flops)

    def _unchanged(self, design: Design, seed: int, progress: Progress) -> _Made:
        return _Made(self.start(seed), "none", _Read(), 0, 0.0)

    def _tune(
        self,
        model: Any,
        reading: _Reading,
        settings: _Settings,
        known: Callable[[], Any] | None,
        progress: Progress,
    ) -> _Read:
        """Tune router and experts in turn on one stream of batches; return what each has read."""
        from bakeoff.experts.read_me import tune_experts, tune_router

        n_router, n_experts = settings.steps(self.n_steps)
        total, done = n_router + n_experts, 0
        parts = (_portions(n_router, settings.rounds), _portions(n_experts, settings.rounds))
        for number, (for_router, for_experts) in enumerate(zip(*parts, strict=True)):
            rate = self.learning_rate * _DECAY**number
            if for_router:
                tune_router(
                    model,
                    reading,
                    steps=for_router,
                    learning_rate=_ROUTER_RATES * rate,
                    objective=settings.objective,
                    progress=_later(progress, done, total),
                )
            done += for_router
            if for_experts:
                with _sent_to(model, known):
                    tune_experts(
                        model,
                        reading,
                        steps=for_experts,
                        learning_rate=rate,
                        progress=_later(progress, done, total),
                    )
            done += for_experts
        tokens = self.batch_size * self.context
        assert reading.n_tokens == total * tokens
        return _Read(n_router * tokens, n_experts * tokens)

    # -- judging ---------------------------------------------------------------------------------

    def _scores(self, made: _Made, progress: Progress) -> tuple[Scores, tuple[str, ...]]:
        scores: Scores = {name: {} for name in self.metrics}
        counts = np.zeros(len(self.texts.domains), dtype=np.int64)
        for number, (domain, documents) in enumerate(self.documents().items()):
            known = (lambda number=number: number) if made.routing == "domain" else None
            with _sent_to(made.model, known):
                scores["loss"][domain] = self.losses_of(domain, made.model)
            scores["locality"][domain] = np.ones(len(documents))
            scores["agreement"][domain] = np.ones(len(documents))
            if made.routing == "router":
                for row, experts in enumerate(self._plans(made.model, documents)):
                    # The first is the end of the document before, which every text comes after.
                    scores["locality"][domain][row] = np.mean(experts[1:] == experts[:-1])
                    scores["agreement"][domain][row] = np.mean(experts[1:] == number)
                    counts += np.bincount(experts[1:], minlength=len(counts))
            progress(number + 1, len(counts))
        if not counts.any():
            return scores, ()
        shares = zip(self.texts.domains, counts / counts.sum(), strict=True)
        said = ", ".join(f"{domain} {share:.0%}" for domain, share in shares)
        return scores, (f"Experts get of the held-out tokens: {said}.",)

    def _plans(self, model: Any, documents: Sequence[list[int]]) -> Iterator[NDArray[np.int64]]:
        """Yield the experts of each document's tokens, and of the end token before it."""
        import torch

        end = self.end_id
        for start in range(0, len(documents), 16):
            some = [[end, *document] for document in documents[start : start + 16]]
            ids = torch.full((len(some), max(map(len, some))), end)
            mask = torch.zeros_like(ids)
            for row, document in enumerate(some):
                ids[row, : len(document)] = torch.tensor(document)
                mask[row, : len(document)] = 1
            plan = model.route(ids.to(self.device), mask.to(self.device))
            yield from (plan.of(row) for row in range(len(some)))

    def _costs(self, made: _Made) -> dict[str, float]:
        import torch

        model = made.model
        total = active = sum(p.numel() for p in model.parameters())
        known = None
        if made.routing != "none":
            counted = model.count_parameters()
            total, active = counted.shared, counted.active
            if made.routing == "domain":  # then there is no need of a router
                router = sum(p.numel() for p in model.router.parameters())
                total, active = total - router, active - router
                # Operations are counted on one row of each domain.
                domains = torch.arange(len(self.texts.domains), device=self.device)
                known = domains[:, None].expand(-1, self.context)
        with _sent_to(model, None if known is None else lambda: known):
            flops = forward_flops_per_token(model, self.rows())
        return {
            "total_parameters": float(total),
            "active_parameters": float(active),
            "trained_parameters": float(made.trained),
            "feed_forward_bytes": float(_feed_forward_bytes(model)),
            "training_tokens": float(made.read.router + made.read.experts),
            "router_tokens": float(made.read.router),
            "training_flops": made.training_flops,
            "forward_flops_per_token": flops,
        }

    # -- the winner ------------------------------------------------------------------------------

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a refactored, cut or newly trained decoder as a folder.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder, with the model.
        destination
            The folder to write: weights in safetensors, tokenizer, ``design.json``, ``README.md``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            Whether transformers loads the folder by itself: all but domain experts.
        """
        routed = design.method in ("read-me", "random-masks")
        told = routed and _Settings.of(design).routing == "domain"
        lines = _usage(destination, self.texts.domains[0] if told else None, routed=routed)
        text = "\n".join(["```python", *lines, "```"])
        if routed:
            text += "\n\nExperts, in this order: " + ", ".join(self.texts.domains) + "."
        if told:
            text += (
                "\n\nIt was judged with the domain of every text known; its router has learned "
                "nothing. Say the expert in each call."
            )
        self.save_winner(design, artifact, destination, reason, text)
        about = {"design": design.to_json(), "domains": self.texts.domains, "told": told}
        write_text(destination / "design.json", json.dumps(about, indent=1, ensure_ascii=False))
        return not routed

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        about = json.loads((destination / "design.json").read_text("utf-8"))
        routed = about["design"]["method"] in ("read-me", "random-masks")
        return _usage(destination, about["domains"][0] if about["told"] else None, routed=routed)


def _usage(destination: Path, domain: str | None, *, routed: bool) -> list[str]:
    expert = "" if domain is None else f", expert_ids=model.domains.index({domain!r})"
    if routed:
        lines = [
            "from bakeoff.experts.loading import load_experts",
            f"model, tokenizer = load_experts({str(destination)!r})",
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({str(destination)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(destination)!r})",
        ]
    lines.append("inputs = tokenizer('def double(x):', return_tensors='pt')")
    if routed and domain is None:
        lines.append("print(model.route(inputs.input_ids).expert_ids)  # known before it runs")
    return [
        *lines,
        f"output = model.generate(**inputs, max_new_tokens=20{expert})",
        "print(tokenizer.decode(output[0]))",
    ]


@dataclass(frozen=True)
class _Read:
    """Tokens that router and experts were trained on."""

    router: int = 0
    experts: int = 0


@dataclass(frozen=True)
class _Made:
    """What a design made: the model as it leaves, and what it took."""

    model: Any
    routing: str
    read: _Read
    trained: int
    training_flops: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Settings:
    """How a design routes and spends its tokens."""

    routing: str
    attention: bool
    objective: Any
    rounds: int
    router_share: float
    expert_share: float

    @classmethod
    def of(cls, design: Design) -> _Settings:
        """Return a design's settings, defaults filled in; raise `DataError` for impossible ones."""
        from bakeoff.experts.read_me import OBJECTIVES

        params = dict(design.params)
        routing = "none" if design.method == "pooled-mask" else params.get("routing", "router")
        if design.method != "pooled-mask" and routing not in ("router", "domain"):
            raise DataError(f"routing must be router or domain, got {routing!r}")
        if routing == "domain":
            for name in ("attention", "objective", "router_share"):
                if name in params:
                    raise DataError(f"{name} is of the router, which routing='domain' does without")
        settings = cls(
            routing,
            params.get("attention", True),
            params.get("objective", "code"),
            params.get("rounds", _ROUNDS),
            params.get("router_share", _ROUTER_SHARE if routing == "router" else 0.0),
            # Experts have learned from as many tokens whether or not their router learned too.
            params.get("expert_share", 1.0 if routing == "none" else 1 - _ROUTER_SHARE),
        )
        if not isinstance(settings.attention, bool):
            raise DataError(f"attention must be true or false, got {settings.attention!r}")
        if settings.objective not in OBJECTIVES:
            raise DataError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {settings.objective!r}"
            )
        if not isinstance(settings.rounds, int) or settings.rounds < 1:
            raise DataError(f"rounds must be at least 1, got {settings.rounds!r}")
        for name in ("router_share", "expert_share"):
            share = getattr(settings, name)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise DataError(f"{name} must be a share of the tokens from 0 to 1, got {share!r}")
        if settings.router_share + settings.expert_share > 1 + 1e-9:
            raise DataError(
                f"router_share and expert_share must be at most 1 together, got "
                f"{settings.router_share} and {settings.expert_share}"
            )
        return settings

    def steps(self, n_steps: int) -> tuple[int, int]:
        """Return the steps of the router and of the experts, of `n_steps` in all."""
        router = max(round(self.router_share * n_steps), int(self.router_share > 0))
        return router, min(round(self.expert_share * n_steps), n_steps - router)


class _Reading:
    """One trial's stream of batches: goes on where it was left; knows the domains of the latest."""

    def __init__(self, problem: RefactoringProblem, seed: int) -> None:
        import torch

        from bakeoff.experts.causal_training import domain_batches

        # The domain's number travels in front of each row.
        rows = {
            domain: torch.cat([torch.full_like(some[:, :1], number), some], dim=1)
            for number, (domain, some) in enumerate(problem.rows().items())
        }
        self._batches = domain_batches(rows, batch_size=problem.batch_size, seed=seed)
        self._device = problem.device
        self._domains: Tensor | None = None
        self.n_tokens = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self._domains = batch[:, 0]
            self.n_tokens += batch[:, 1:].numel()
            yield batch[:, 1:]

    def experts(self, length: int) -> Tensor:
        """Return ``(B, length)`` int64: the domain of each of the latest batch's tokens."""
        assert self._domains is not None
        return self._domains[:, None].expand(-1, length).to(self._device)


@contextmanager
def _sent_to(model: Any, known: Callable[[], Any] | None) -> Iterator[None]:
    """Have the model called with expert ids that are known, instead of its router's; None: not."""
    if known is None:
        yield
        return

    def told(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return args, {**given, "expert_ids": known()}

    handle = model.register_forward_pre_hook(told, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _portions(steps: int, rounds: int) -> list[int]:
    """Divide steps among rounds, to within one."""
    ends = [steps * number // rounds for number in range(rounds + 1)]
    return [end - start for start, end in pairwise(ends)]


def _later(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, _: progress(done + step, total)


def _feed_forward_bytes(model: Any) -> int:
    """Return the bytes of all feed-forward weights as stored, those that experts share once."""
    from bakeoff.experts.read_me import PackedExperts, _feed_forwards

    modules: list[Any] = [part for part in model.modules() if isinstance(part, PackedExperts)]
    if not modules:
        modules = [part.module for part in _feed_forwards(model)]
    return sum(p.numel() * p.element_size() for part in modules for p in part.parameters())
