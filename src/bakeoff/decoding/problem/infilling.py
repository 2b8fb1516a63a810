"""How to train a decoder that also fills in: one objective, one budget of tokens, held-out code.

A design trains a small decoder on the same texts with one objective. All read the same number of
tokens, sentinels and moved text counted. The decoder is then judged on functions that no training
text copies: by the loss of what belongs into a hole, by the loss of whole functions read from left
to right, and by what it writes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import cache_directory, write_text
from bakeoff.decoding.code_evaluation import (
    DOCTEST_PACKAGES,
    InfillProblem,
    Kind,
    SeveralHoles,
    compiles,
    evaluate_infilling,
    infill_problems,
    several_holes,
    standard_library_functions,
    training_texts,
    verified_problems,
)
from bakeoff.decoding.codegen2 import (
    DataMixture,
    FillInTheMiddle,
    InfillObjective,
    InfillTokens,
    PrefixLM,
    SpanCorruption,
    add_infill_tokens,
    pack,
    plain_ids,
    train_decoder,
)
from bakeoff.decoding.held_out_code import CodeSplit, draw_functions, split_code
from bakeoff.decoding.infilling import (
    infill_batch,
    infill_holes_losses,
    infill_losses,
)
from bakeoff.decoding.winner import Settings, load_settings, save_settings
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models.gguf import quiet_transformers
from bakeoff.models.likelihood import response_losses
from bakeoff.models.shared import SharedModels
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.measure import warnings_noted

if TYPE_CHECKING:
    from bakeoff.models import LanguageModel

Size = Literal["smoke", "demo", "full"]
Sources = Mapping[str, Sequence[str]]
Scores = dict[str, dict[str, NDArray[np.float64]]]

INFILLING_METRICS: dict[str, Metric] = {
    "infill_loss": Metric("loss of a hole (nats per token)", higher_is_better=False, margin=0.02),
    "several_loss": Metric(
        "loss of two holes at once (nats per token)", higher_is_better=False, margin=0.02
    ),
    "causal_loss": Metric(
        "loss from left to right (nats per token)", higher_is_better=False, margin=0.02
    ),
    "exact": Metric("hole filled exactly", margin=0.01),
    "compiles": Metric("filled function compiles", margin=0.01),
    "passes": Metric("filled function passes its doctest", margin=0.01),
}
SMALL_SHAPE = SmallGPT(vocabulary=2048, n_layers=4, width=128, n_heads=4, context=256)
"""Shape of the decoder that is trained by default: 1.3 million weights."""

_QUESTION = "how to train a decoder that also fills in"
_SHARED = ("p_causal", "loss", "char_cuts", "weights")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "causal": ("weights",),
    "span-corruption": (
        *_SHARED,
        *("level", "attention", "ratio", "span_len", "max_sentinels"),
    ),
    "fill-in-the-middle": (*_SHARED, "level", "spm_rate"),
    "prefix-lm": ("p_causal", "weights"),
}
_OBJECTIVES: dict[str, type[InfillObjective]] = {
    "causal": SpanCorruption,
    "span-corruption": SpanCorruption,
    "fill-in-the-middle": FillInTheMiddle,
    "prefix-lm": PrefixLM,
}
# Modules whose functions are enough to see that everything runs.
_SMOKE_PACKAGES = ("argparse", "ast", "configparser", "csv", "textwrap", "zipfile")
_MAX_TRAINING_CHARACTERS = 2000
_MAX_DOCTEST_CHARACTERS = 2000
_HOLES_AT_ONCE = 2
_LEAST_FUNCTIONS = 5
_STANDARD_LIBRARY = "standard library"
# Raise when training or judging changes what a trial scores.
_VERSION = 1


def infilling_designs() -> Designs:
    """Return CodeGen2's recipe, its variants, and the rivals a sceptic would choose.

    Examples
    --------
    >>> [design.name for design in infilling_designs()][:3]
    ['causal LM', 'span corruption', 'span corruption, sequence level']
    """
    spans, middle = "span-corruption", "fill-in-the-middle"
    return Designs(
        [
            Design("causal LM", "causal"),
            Design("span corruption", spans),
            Design("span corruption, sequence level", spans, {"level": "sequence"}),
            Design("span corruption, character cuts", spans, {"char_cuts": 0.5}),
            Design("span corruption, 3 in 4 causal", spans, {"p_causal": 0.75}),
            Design("span corruption, never causal", spans, {"p_causal": 0.0}),
            Design("span corruption, prefix attention", spans, {"attention": "prefix"}),
            Design("fill in the middle", middle),
            Design("fill in the middle, prefix first", middle, {"spm_rate": 0.0}),
            Design("fill in the middle, suffix first", middle, {"spm_rate": 1.0}),
            Design("prefix-LM", "prefix-lm"),
        ]
    )


def default_split(size: Size, *, n_functions: int, max_characters: int) -> CodeSplit:
    """Return functions of the running Python's standard library to train on and to judge by.

    The modules of `DOCTEST_PACKAGES` are held out, and so is every function that shares 24 words
    in a row with one of theirs.

    Parameters
    ----------
    size
        ``"smoke"``: functions of six modules; ``"demo"``: of all, up to 2,000 characters;
        ``"full"``: of all.
    n_functions, max_characters
        As for `split_code`.

    Raises
    ------
    DataError
        If `size` is unknown, or no function is that short.
    """
    if size not in ("smoke", "demo", "full"):
        raise DataError(f"size must be smoke, demo or full, got {size!r}")
    texts = training_texts(
        packages=_SMOKE_PACKAGES if size == "smoke" else None,
        max_characters=None if size == "full" else _MAX_TRAINING_CHARACTERS,
    )
    candidates = standard_library_functions(DOCTEST_PACKAGES)
    functions = draw_functions(candidates, n_functions, max_characters)
    if not functions:
        raise DataError(f"max_characters: no held-out function is as short as {max_characters}")
    return CodeSplit({_STANDARD_LIBRARY: texts}, {_STANDARD_LIBRARY: functions})


class InfillingProblem:
    """How to train a decoder that also fills in: train with each objective, judge on held-out code.

    The seed draws the first weights, the order of texts and rows, and what is moved or masked. It
    is the same for all designs: under one seed all start from the same weights.

    Parameters
    ----------
    texts
        What to train on: modules, functions or other texts; or several such by source, each of
        which is then a task of its own. By default functions of the standard library; or a size of
        them (``"smoke"``, ``"demo"``, ``"full"``).
    held_out
        Texts to judge on, by the same sources. By default a tenth of `texts`, chosen by content.
        Training texts that copy a function judged on are left out.
    base
        What is trained: ``"small-gpt"``, a small Llama with a vocabulary of its own; or a packaged
        name, folder or hub id, of which all weights are trained.
    from_scratch
        Whether training starts from random weights; of a model that is named, only its shape and
        tokenizer are then used. By default for ``"small-gpt"`` alone. ``"small-gpt"`` with False
        starts all designs from one causal model, trained on the texts beforehand.
    shape
        Of the small GPT.
    n_tokens
        Tokens that each design reads, sentinels and moved text counted; to within a batch.
    context
        Longest sequence in tokens; by default that of `shape`.
    batch_size
        Sequences per step.
    learning_rate
        Peak rate; by default 1e-3 from scratch and 5e-5 otherwise.
    hole
        What is taken out: ``"line"``, ``"lines"`` or ``"span"``; see `infill_problems`. Lines are
        taken with the line end before them instead of their own, so that holes begin and end
        between tokens; a span does not.
    n_functions
        Most held-out functions of each source, one hole in each.
    n_fills
        In so many of them the decoder writes the hole; 0 for none.
    n_doctests
        In so many functions of the standard library it writes a hole that the function's doctest
        sees, and the doctest is run in a sandbox. Only with the default texts.
    max_new_tokens
        Longest fill.
    max_characters
        Longest held-out function; by default twice `context`. Doctests: 2,000.
    device
        Where to train.

    Raises
    ------
    DataError
        If a number is out of range, or there is too little to train on or to judge by.
    """

    name = "decoding"

    def __init__(
        self,
        texts: Sequence[str] | Sources | Size | None = None,
        *,
        held_out: Sequence[str] | Sources | None = None,
        base: str = "small-gpt",
        from_scratch: bool | None = None,
        shape: SmallGPT = SMALL_SHAPE,
        n_tokens: int = 400_000,
        context: int | None = None,
        batch_size: int = 8,
        learning_rate: float | None = None,
        hole: Kind = "line",
        n_functions: int = 200,
        n_fills: int = 50,
        n_doctests: int | None = None,
        max_new_tokens: int = 32,
        max_characters: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.base, self.shape, self.device = base, shape, device
        self.from_scratch = base == "small-gpt" if from_scratch is None else from_scratch
        self.context = shape.context if context is None else context
        self.n_tokens, self.batch_size = n_tokens, batch_size
        if learning_rate is None:
            learning_rate = 1e-3 if self.from_scratch else 5e-5
        self.learning_rate = learning_rate
        self.hole, self.n_fills, self.max_new_tokens = hole, n_fills, max_new_tokens
        self.max_characters = 2 * self.context if max_characters is None else max_characters
        default = texts is None or isinstance(texts, str)
        self.n_doctests = (20 if default else 0) if n_doctests is None else n_doctests
        least = {"n_tokens": 1, "context": 16, "batch_size": 1, "max_new_tokens": 1}
        for name, bound in {**least, "n_fills": 0, "n_doctests": 0, "max_characters": 1}.items():
            if getattr(self, name) < bound:
                raise DataError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if n_functions < _LEAST_FUNCTIONS:
            raise DataError(f"n_functions must be at least {_LEAST_FUNCTIONS}, got {n_functions}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be positive, got {self.learning_rate}")
        if max_new_tokens >= self.context - 8:
            raise DataError(
                f"max_new_tokens must leave room for a prompt in the context of {self.context}, "
                f"got {max_new_tokens}"
            )
        if base == "small-gpt" and self.context > shape.context:
            raise DataError(f"context must be at most the shape's {shape.context}, got {context}")
        if default and held_out is not None:
            raise DataError("held_out goes with texts of your own")
        if self.n_doctests and not default:
            raise DataError("n_doctests goes with the default texts: code of others is never run")
        sizes = {"n_functions": n_functions, "max_characters": self.max_characters}
        if texts is None or isinstance(texts, str):
            self.split = default_split("demo" if texts is None else texts, **sizes)  # type: ignore[arg-type]
        else:
            aside = None if held_out is None else _by_source(held_out, "held_out")
            self.split = split_code(_by_source(texts, "texts"), aside, **sizes)
        self._make_holes()
        self._loaded = SharedModels()
        self._doctests: tuple[InfillProblem, ...] | None = None

    def _make_holes(self) -> None:
        self.holes: dict[str, tuple[InfillProblem, ...]] = {}
        several: dict[str, tuple[SeveralHoles, ...]] = {}
        for name, functions in self.split.held_out.items():
            made = infill_problems(functions, kind=self.hole)
            made = tuple(_at_line_ends(problem) for problem in made)
            if len(made) < _LEAST_FUNCTIONS:
                raise DataError(
                    f"{name}: {len(made)} held-out functions have a hole of kind {self.hole!r}, at "
                    f"least {_LEAST_FUNCTIONS} are needed: give more texts, or longer "
                    "max_characters"
                )
            self.holes[name] = made
            several[name] = several_holes(functions, n_holes=_HOLES_AT_ONCE)
        self.several = several if all(several.values()) else {}
        self._is_code = all(
            compiles(p.function.source) for some in self.holes.values() for p in some
        )

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Losses; what fills are worth, where some are written; doctests, where they are run."""
        names = ["infill_loss"] + ["several_loss"] * bool(self.several) + ["causal_loss"]
        if self.n_fills:
            names += ["exact"] + ["compiles"] * self._is_code
        if self.n_doctests:
            names.append("passes")
        return {name: INFILLING_METRICS[name] for name in names}

    def fingerprint(self) -> str:
        """Return a digest of texts, holes, base model and budget."""
        holes = [p.name for some in self.holes.values() for p in some]
        facts = {
            "question": "infilling",
            "split": self.split.fingerprint(),
            "holes": hashlib.sha256(json.dumps(holes).encode()).hexdigest(),
            "base": asdict(self.shape) if self.base == "small-gpt" else self._base().fingerprint,
            "from_scratch": self.from_scratch,
            "budget": [self.n_tokens, self.context, self.batch_size, self.learning_rate],
            "fills": [self.n_fills, self.n_doctests, self.max_new_tokens],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        start = "random weights" if self.from_scratch else "its weights"
        return {
            "question": _QUESTION,
            "data": {
                name: f"{len(texts):,} texts to train on, {len(self.split.held_out[name]):,} "
                f"held-out functions"
                for name, texts in self.split.training.items()
            },
            "trained": f"{self.base} from {start}, all weights, {self.n_tokens:,} tokens read, "
            f"sequences of {self.context}, batches of {self.batch_size}, learning rate "
            f"{self.learning_rate:g}",
            "judged": f"holes of kind {self.hole!r}; {self.n_fills:,} fills of each source and "
            f"{self.n_doctests:,} doctests, at most {self.max_new_tokens} tokens a fill",
            "notes": [
                *self.split.notes,
                "A decoder that has learned no end of a hole has its fill cut to the true number "
                "of lines, which helps it; all others end where they say so.",
            ],
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSION)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        check_method(design, tuple(_PARAMETERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        params = dict(design.params)
        weights = params.pop("weights", None)
        # Cutting between characters takes a tokenizer; the other checks do not.
        cuts = params.pop("char_cuts", 0.0)
        stand_in = InfillTokens(eot=0, separator=1, end_of_mask=2, masks=(3, 4), fim=(5, 6, 7))
        try:
            if not 0 <= cuts <= 1:
                raise DataError(f"char_cuts must be a probability from 0 to 1, got {cuts}")
            _objective(
                Design(design.name, design.method, params),
                stand_in,
                seed=0,
                max_length=self.context,
            )
            if weights is not None:
                rows = {name: [[0]] for name in self.split.training}
                DataMixture(rows, weights)
        except (DataError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs; make the small GPT's vocabulary; choose the doctests."""
        for design in designs:
            self.check(design)
        base = self._base(work.progress)
        if self.context > base.max_length:
            raise DataError(f"context must be at most {base.max_length}, got {self.context}")
        InfillTokens.of(base.tokenizer)
        for name in self.holes:
            single, several = self._fitting(name, base.tokenizer)
            if not single or (self.several and not several):
                raise DataError(
                    f"context: {self.context} tokens are too few for any hole of {name!r} and what "
                    "stands around it"
                )
        self._doctested(counting(work.progress, "running doctests"))

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Train one decoder and judge it.

        Raises
        ------
        BakeoffError
            If training diverged, so that a loss is no number.
        """
        self.check(design)
        with warnings_noted() as warned:
            trial = self._run(design, seed, work)
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        model, tokenizer = self._start(seed)
        objective = _objective(design, tokenizer, seed=seed, max_length=self.context)
        history = train_decoder(
            model,
            objective,
            self._rows(design, tokenizer, seed),
            n_tokens=self.n_tokens,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed,
            progress=counting(work.progress, "training, tokens", (0.0, 0.8)),
        )
        scores = self._scores(design, model.eval(), tokenizer, work)
        for metric, tasks in scores.items():
            if not all(np.isfinite(values).all() for values in tasks.values()):
                raise BakeoffError(
                    f"design {design.name!r}: {metric} is no number: training diverged; try a "
                    f"learning_rate below {self.learning_rate:g}"
                )
        folder = work.directory / "model"
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        read, causal = history.n_tokens[-1], history.n_causal_tokens[-1]
        return Trial(
            scores=scores,
            cost={
                "training_tokens": float(read),
                "causal_tokens": float(causal),
                "trained_parameters": float(
                    sum(p.numel() for p in model.parameters() if p.requires_grad)
                ),
            },
            artifact=work.directory,
            notes=(f"{causal / read:.0%} of the tokens were read as plain text.",),
        )

    def _start(self, seed: int) -> tuple[Any, Any]:
        """Return the decoder that training starts from, with all tokens of all layouts."""
        import torch
        from transformers import AutoModelForCausalLM

        base = self._base()
        tokenizer = copy.deepcopy(base.tokenizer)
        if self.from_scratch:
            add_infill_tokens(tokenizer)
            config = copy.deepcopy(base.model.config)
            text = config.get_text_config()
            text.vocab_size = max(text.vocab_size, len(tokenizer))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = copy.deepcopy(base.model)
            add_infill_tokens(tokenizer, model)
        return model.to(self.device), tokenizer

    def _rows(self, design: Design, tokenizer: Any, seed: int) -> list[list[int]]:
        """Return packed sequences of all sources, or of a mixture in given proportions."""
        rng = np.random.default_rng([seed, 3])
        packed: dict[str, list[list[int]]] = {}
        sources = self.split.training
        weights = design.params.get("weights")
        if weights is None:  # as if they were one
            sources = {"all": tuple(text for texts in sources.values() for text in texts)}
        for name, texts in sources.items():
            shuffled = [texts[row] for row in rng.permutation(len(texts)).tolist()]
            # The tokens that are read decide; what could never be read need not be tokenised.
            needed = _enough(shuffled, 8 * self.n_tokens)
            rows = pack(tokenizer, needed, self.context, on_sentinel="escape", keep_rest=True)
            packed[name] = rows
        if weights is None:
            return packed["all"]
        return list(DataMixture(packed, weights, seed=seed).take(2 * self.n_tokens).rows)

    def _scores(self, design: Design, model: Any, tokenizer: Any, work: Work) -> Scores:
        layout, attention = _reading(design)
        reading: dict[str, Any] = {"layout": layout, "attention": attention}
        scores: Scores = {name: {} for name in self.metrics}
        eot = InfillTokens.of(tokenizer).eot
        for name in self.holes:
            work.progress(0.8, f"losses, {name}")
            problems, several = self._fitting(name, tokenizer)
            triples = [(p.prefix, p.middle, p.suffix) for p in problems]
            found = infill_losses(model, tokenizer, triples, max_tokens=self.context, **reading)
            scores["infill_loss"][name] = found.means
            if self.several:
                texts = [(text.parts, text.middles) for text in several]
                found = infill_holes_losses(
                    model, tokenizer, texts, max_tokens=self.context, **reading
                )
                scores["several_loss"][name] = found.means
            whole = [
                plain_ids(tokenizer, function.source)[: self.context - 1]
                for function in self.split.held_out[name]
            ]
            # As in training, a text comes after the end of another.
            scores["causal_loss"][name] = response_losses(model, [[eot]] * len(whole), whole).means
        self._write(model, tokenizer, reading, scores, work)
        return scores

    def _fitting(
        self, name: str, tokenizer: Any
    ) -> tuple[tuple[InfillProblem, ...], tuple[SeveralHoles, ...]]:
        """Return the holes that the context holds: the same for all designs."""

        def n_tokens(texts: Sequence[str]) -> int:
            return sum(len(plain_ids(tokenizer, text)) for text in texts)

        marks = 3 * _HOLES_AT_ONCE + 2
        room = self.context - marks - 2  # something has to stand on both sides
        return (
            tuple(p for p in self.holes[name] if n_tokens([p.middle]) <= room),
            tuple(
                text
                for text in self.several.get(name, ())
                if n_tokens([*text.middles, *text.parts[1:-1]]) <= room
            ),
        )

    def _write(
        self, model: Any, tokenizer: Any, reading: dict[str, Any], scores: Scores, work: Work
    ) -> None:
        """Have holes filled; judge what was written."""

        def fill(pairs: Sequence[tuple[str, str]]) -> list[str]:
            fills = infill_batch(
                model,
                tokenizer,
                pairs,
                max_new_tokens=self.max_new_tokens,
                max_prompt_tokens=self.context - self.max_new_tokens,
                batch_size=16,
                **reading,
            )
            return [each.text for each in fills]

        cut = reading["layout"] == "left-to-right"
        for name in self.holes if self.n_fills else ():
            work.progress(0.9, f"filling, {name}")
            chosen = self._fitting(name, tokenizer)[0][: self.n_fills]
            report = evaluate_infilling(fill, chosen, run_doctests=False, cut_lines=cut)
            scores["exact"][name] = report.exact.astype(np.float64)
            if self._is_code:
                scores["compiles"][name] = report.compiled.astype(np.float64)
        if self.n_doctests:
            report = evaluate_infilling(
                fill,
                self._doctested(),
                cut_lines=cut,
                progress=counting(work.progress, "running doctests", (0.95, 1.0)),
            )
            # Whatever went wrong (an error, no end, memory) did not pass.
            scores["passes"][_STANDARD_LIBRARY] = report.passed

    def _base(self, progress: Callable[[float, str], None] | None = None) -> LanguageModel:
        name = self.base
        if name == "small-gpt":
            # From scratch, its shape and its vocabulary are wanted: one step of training will do.
            shape = replace(self.shape, steps=1) if self.from_scratch else self.shape
            texts = [text for some in self.split.training.values() for text in some]
            name = str(shape.pretrained(texts, progress=progress))
        return self._loaded.language_model(name)

    def _doctested(
        self, progress: Callable[[int, int], None] | None = None
    ) -> tuple[InfillProblem, ...]:
        """Return the holes whose doctest tells right from wrong; found once and kept on disk."""
        if self._doctests is not None or not self.n_doctests:
            return self._doctests or ()
        functions = standard_library_functions(
            DOCTEST_PACKAGES, with_examples=True, max_characters=_MAX_DOCTEST_CHARACTERS
        )
        drawn = draw_functions(functions, len(functions), _MAX_DOCTEST_CHARACTERS)
        drawn = tuple(sorted(drawn, key=lambda f: hashlib.sha256(f.source.encode()).digest()))
        problems = tuple(map(_at_line_ends, infill_problems(drawn, kind=self.hole)))
        said = [f"{p.name}\0{p.function.source}" for p in problems]
        key = hashlib.sha256(json.dumps([_VERSION, self.n_doctests, said]).encode()).hexdigest()
        note = cache_directory() / "doctests" / f"{key}.json"
        by_name = {problem.name: problem for problem in problems}
        if note.is_file():
            kept = [by_name[name] for name in json.loads(note.read_text("utf-8"))]
        else:
            kept = []
            for start in range(0, len(problems), self.n_doctests):
                kept += verified_problems(problems[start : start + self.n_doctests])
                if progress is not None:
                    progress(min(len(kept), self.n_doctests), self.n_doctests)
                if len(kept) >= self.n_doctests:
                    break
            kept = kept[: self.n_doctests]
            write_text(note, json.dumps([problem.name for problem in kept]))
        if not kept:
            raise DataError("no doctest here tells a right fill from a wrong one: n_doctests=0")
        self._doctests = tuple(kept)
        return self._doctests

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a trained decoder as a transformers folder, with how to fill holes with it.

        Parameters
        ----------
        design
            The design.
        artifact
            Its trial's folder, with the model.
        destination
            The folder to write: weights in safetensors, tokenizer, ``decoder.json``, ``README.md``.
        reason
            Why this design, for the README.

        Returns
        -------
        bool
            True: transformers loads the folder by itself.
        """
        shutil.copytree(artifact / "model", destination, dirs_exist_ok=True)
        layout, attention = _reading(design)
        settings = Settings(
            design.name,
            "infill",
            {"layout": layout, "attention": attention},
            "./",
            {"trained": design.to_json(), "tokens": self.n_tokens, "base": self.base},
        )
        save_settings(destination, settings, usage=_usage(destination, settings), reason=reason)
        return True

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        return _usage(destination, load_settings(destination))


def _usage(destination: Path, settings: Settings) -> list[str]:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from bakeoff.decoding import infill",
        f"model = AutoModelForCausalLM.from_pretrained({str(destination)!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(destination)!r})",
    ]
    options = ", ".join(f"{name}={value!r}" for name, value in settings.params.items())
    call = f"infill(model, tokenizer, 'def double(x):', '\\n    return y\\n', 32, {options})"
    return [*lines, f"print({call}.text)"]


def _by_source(texts: Sequence[str] | Sources, argument: str) -> dict[str, tuple[str, ...]]:
    if isinstance(texts, str):
        raise DataError(f"{argument} must be a list of texts, got one text")
    sources = texts if isinstance(texts, Mapping) else {"texts": texts}
    found = {name: tuple(some) for name, some in sources.items()}
    for name, some in found.items():
        for row, text in enumerate(some):
            if not isinstance(text, str):
                raise DataError(
                    f"{argument}: text {row} of {name!r} must be text, got {type(text).__name__}"
                )
    return {name: tuple(text for text in some if text.strip()) for name, some in found.items()}


def _at_line_ends(problem: InfillProblem) -> InfillProblem:
    """Let a hole of lines begin with the line end before it instead of ending with its own.

    Vocabularies join a line end with the indentation after it: a hole that begins after the line
    end begins inside a token.
    """
    source = problem.function.source
    if problem.kind == "span" or problem.start == 0 or source[problem.start - 1] != "\n":
        return problem
    ends = source[problem.stop - 1] == "\n"
    return replace(problem, start=problem.start - 1, stop=problem.stop - ends)


def _objective(design: Design, tokenizer: Any, *, seed: int, max_length: int) -> InfillObjective:
    options: dict[str, Any] = {k: v for k, v in design.params.items() if k != "weights"}
    if design.method == "causal":
        options["p_causal"] = 1.0
    for name in ("ratio", "span_len"):
        if options.get(name) is not None:
            low, high = options[name]
            options[name] = (low, high)
    made = _OBJECTIVES[design.method](tokenizer, seed=seed, max_length=max_length, **options)
    return made


def _reading(design: Design) -> tuple[str, str]:
    """Return the layout and the attention that a design's decoder was trained to be asked in."""
    params = design.params
    if design.method == "causal" or params.get("p_causal", 0.5) == 1:
        return "left-to-right", "causal"
    if design.method == "fill-in-the-middle":
        return ("spm" if params.get("spm_rate", 0.5) == 1 else "psm"), "causal"
    if design.method == "prefix-lm":
        return "left-to-right", "prefix"
    return "codegen2", str(params.get("attention", "causal"))


def _enough(texts: Sequence[str], characters: int) -> list[str]:
    """Return the first texts that together have so many characters, or all."""
    lengths = np.cumsum([len(text) for text in texts])
    return list(texts[: int(np.searchsorted(lengths, characters)) + 1])
