"""Word vectors in many languages: which finds translations best, of words and languages unseen."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff._files import atomic_folder, build_once, cache_directory, write_text
from bakeoff.data.formats import count, listed
from bakeoff.data.lexicon_sources import Kind, cldr_names
from bakeoff.data.lexicons import (
    Cell,
    Constraints,
    ConstraintSplit,
    Lexicon,
    WordPairs,
    build_pairs,
    split_constraints,
)
from bakeoff.data.splits import position
from bakeoff.errors import BakeoffError, DataError
from bakeoff.models.gguf import quiet_transformers
from bakeoff.models.text_encoder import TextEncoder
from bakeoff.study import Design, Designs, Metric, Trial, Work
from bakeoff.study.checks import check_method, check_parameters, counting
from bakeoff.study.measure import warnings_noted
from bakeoff.study.rate_search import search_rate

if TYPE_CHECKING:
    from bakeoff.embedding.lexical import LexicalSpecializer
    from bakeoff.embedding.lexicon_induction import LexiconScores
    from bakeoff.embedding.word_vectors import Layer, WordEncoder

Size = Literal["smoke", "demo", "full"]
Scores = dict[str, dict[str, NDArray[np.float64]]]
Progress = Callable[[float, str], None]
EncodeIn = Callable[[Sequence[str], str], Any]
"""Words and their language to vectors ``(n, d)``, an array or a sparse matrix."""

WORD_METRICS: dict[str, Metric] = {
    "mrr": Metric("MRR of the translation", combines=("mrr_unseen", "mrr_seen"), margin=0.01),
    "mrr_unseen": Metric("MRR, languages unseen in training", margin=0.01),
    "mrr_seen": Metric("MRR, languages seen in training", margin=0.01),
    "low_overlap": Metric("MRR where letters do not help", margin=0.01),
    "precision": Metric("P@1 with CSLS", margin=0.01),
}
"""The mean over the tasks first, then its two parts, the hard questions, and CSLS."""

_TASKS: dict[Cell, str] = {
    "synsets": "new synsets",
    "languages": "new languages",
    "both": "new synsets and languages",
}
_METRIC_OF_CELL: dict[Cell, str] = {
    "synsets": "mrr_seen",
    "languages": "mrr_unseen",
    "both": "mrr_unseen",
}

_QUESTION = "which word vectors to use in many languages"
_TRAINING = ("learning_rate", "temperature", "alpha", "loss", "similarity", "layer")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "lexical-full": _TRAINING,
    "lexical-adapter": (*_TRAINING, "reduction"),
    "lexical-lora": (*_TRAINING, "rank"),
    "row-contrastive": _TRAINING,
    "raw": ("layer",),
    "all-but-the-top": ("layer", "n_components"),
    "procrustes": ("layer",),
    "character-ngrams": ("shortest", "longest"),
}
_PEFT: dict[str, Any] = {
    "lexical-full": "full",
    "lexical-adapter": "adapter",
    "lexical-lora": "lora",
    "row-contrastive": "full",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ("nt-xent", "supcon"),
    "similarity": ("cosine", "csls"),
}
_INTEGERS = {"reduction": 1, "rank": 1, "n_components": 0, "shortest": 1, "longest": 1}
_CLASSES = {
    "all-but-the-top": "AllButTheTopWords",
    "procrustes": "ProcrustesWords",
    "character-ngrams": "CharacterNgramVectors",
}

# Adapters and LoRA learn at about ten times the rate of full fine-tuning.
_SMALL_PART_RATE = 10.0
# How a learning rate is looked for.
_FACTOR = 3.0
_SEARCH_SEED = 1_000_003
_N_VALIDATION_LANGUAGES = 4
_VALIDATION_SHARE = 0.15
# The paper's cap on pairs of two languages, and the usual neighbourhood of CSLS.
_MOST_PAIRS = 1000
_CSLS_NEIGHBOURS = 10
_LEAST_PAIRS = 10
# Translations at most half alike, letter by letter, to anything that training or the question show.
_LOW_OVERLAP = 0.5
_FACTS_FILE = "words.json"
_CONSTRAINTS_FILE = "constraints.jsonl"

# Raise when training or judging changes what a trial scores.
_VERSION = 2


@dataclass(frozen=True)
class WordSize:
    """One size of the default data: languages, kinds of names, and how many things have them."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    kinds: tuple[Kind, ...]
    max_synsets: int


_NAMES: tuple[Kind, ...] = ("territories", "languages", "scripts", "currencies", "months", "days")

WORD_SIZES: dict[str, WordSize] = {
    "smoke": WordSize(("en", "de", "es"), ("nl",), ("territories", "months"), 60),
    # Of the languages held out three have a close relative among those seen, in the same script;
    # Swahili has none.
    "demo": WordSize(
        ("en", "de", "es", "fr", "pl", "ru", "fi", "tr"),
        ("nl", "pt", "uk", "sw"),
        _NAMES,
        400,
    ),
    "full": WordSize(
        (
            *("en", "de", "es", "fr", "it", "ro", "sv", "pl", "sk", "hr", "ru", "bg", "el", "lv"),
            *("fi", "hu", "tr", "az", "id", "vi", "ar", "fa", "hi", "ja"),
        ),
        ("nl", "pt", "da", "cs", "uk", "lt", "et", "uz", "ms", "sw", "eu", "mr"),
        _NAMES,
        10_000,
    ),
}
"""Sizes of the default data: names from the Unicode locale data, English among them."""


def default_words(size: Size = "demo") -> tuple[Constraints, tuple[str, ...]]:
    """Return names of countries, languages, scripts, currencies, months and days by language.

    They come from the Unicode locale data in the package `babel`.

    Parameters
    ----------
    size
        See `WORD_SIZES`. Of the things that have a name in English, those that come first by a
        hash of their code.

    Returns
    -------
    words : Constraints
        The names; a synset is a kind and a code.
    held_out_languages : tuple of str
        Languages to hold out.

    Raises
    ------
    DataError
        If there is no such size.

    Examples
    --------
    >>> words, held_out = default_words("smoke")
    >>> words.all_languages, words.n_synsets, held_out
    (('de', 'en', 'es', 'nl'), 60, ('nl',))
    """
    if size not in WORD_SIZES:
        raise DataError(f"size must be one of {', '.join(WORD_SIZES)}, got {size!r}")
    chosen = WORD_SIZES[size]
    names = cldr_names([*chosen.seen, *chosen.unseen], chosen.kinds)
    english = {
        synset
        for synset, language in zip(names.synsets, names.languages, strict=True)
        if language == "en"
    }
    ordered = sorted(english, key=lambda synset: (position(synset, 0), synset))
    kept = set(ordered[: chosen.max_synsets])
    return names.select(np.array([synset in kept for synset in names.synsets])), chosen.unseen


def word_designs(*, variants: bool = True) -> Designs:
    """Return lexical specialisation, its variants, and the rivals a sceptic would choose.

    Parameters
    ----------
    variants
        Whether other losses and layers are among them, or one design per idea only.

    Examples
    --------
    >>> [design.name for design in word_designs(variants=False)][:3]
    ['specialised, full', 'specialised, adapter', 'specialised, LoRA']
    """
    designs = [
        Design("specialised, full", "lexical-full"),
        Design("specialised, adapter", "lexical-adapter"),
        Design("specialised, LoRA", "lexical-lora"),
        Design("row-only InfoNCE", "row-contrastive"),
        Design("raw", "raw"),
        Design("all-but-the-top", "all-but-the-top"),
        Design("Procrustes", "procrustes"),
        Design("character n-grams", "character-ngrams"),
    ]
    if variants:
        designs += [
            Design("specialised, SupCon", "lexical-full", {"loss": "supcon"}),
            Design("specialised, CSLS", "lexical-full", {"similarity": "csls"}),
            Design("specialised, mean of layers", "lexical-full", {"layer": "mean"}),
            Design("raw, mean of layers", "raw", {"layer": "mean"}),
            Design(
                "all-but-the-top, mean of layers",
                "all-but-the-top",
                {"layer": "mean"},
            ),
        ]
    return Designs(designs)


class WordProblem:
    """Which word vectors find translations, at equal pairs read: a study's side of the question.

    Synsets and languages are held out, which makes three tasks: new synsets in languages that
    training saw, synsets that training saw in new languages, and both new. A question is a word of
    the pivot language whose translation into another language is looked for among all of that
    language's words, or the other way round; it scores one over the rank of the best placed right
    answer by cosine. A model reads letters, not languages: what training has of a synset by the
    same letters, question and answer, is not asked of a new language (`ConstraintSplit.lexicon`).
    *Low overlap* takes the questions whose answer is at most half alike, letter by letter, to the
    question and to every word of the synset that training has. *P@1* ranks by CSLS with 10
    neighbours. With one language, questions ask for synonyms.

    Trained designs read the same number of pairs in the same number of steps, at a constant rate
    as in the paper; the frozen ones have the same words to learn from.

    The learning rate is each trained design's own. Beginning with `learning_rate` (adapters and
    LoRA with ten times that), it is multiplied or divided by 3 for as long as that raises the MRR
    on a part of the training synsets that nothing is trained on, in seen languages, in runs of
    `search_share` of the steps with a seed of their own. That is done once for all seeds, kept in
    the cache, and reported as ``search_pairs``. Held-out words take no part in it.

    Parameters
    ----------
    data
        Words with synset and language; or a size of the default ones, see `default_words`.
    base
        Encoder or decoder: packaged name, folder or hub id. The default was trained on English
        texts: with another language's words it begins with little more than letters.
    held_out_languages
        Languages that training does not see, none of them the pivot. By default those that belong
        to the size; of the user's data every fifth language, at least one of three, by a hash.
    pivot
        The language from and into which is translated; by default the one with the most words
        among those not held out, English in the default data.
    fraction
        Part of the synsets to hold out.
    steps, batch_size
        Optimizer steps, and pairs in each.
    learning_rate
        Where the search begins, for full training.
    search_share
        Share of the steps that each run of the search takes; 0 for no search.
    search_reach
        Most steps of the search in one direction.
    max_questions
        For each task, pair of languages and direction; drawn by a hash of the word.
    device
        Where to train and embed.
    keep_models
        Whether trials keep what they made, for `export`; trained ones keep a whole model.

    Raises
    ------
    DataError
        If a number is out of range, a language does not occur, or too little is left to train on
        or to ask.

    Examples
    --------
    >>> from bakeoff.data.lexicon_sources import read_constraints
    >>> from bakeoff.study import Study
    >>> problem = WordProblem(read_constraints("terms.tsv"))  # doctest: +SKIP
    >>> Study(problem, word_designs(variants=False), reference="raw", seeds=3,
    ...       directory="words").run().winner  # doctest: +SKIP
    'character n-grams'
    """

    name = "embedding"

    def __init__(
        self,
        data: Constraints | Size = "demo",
        *,
        base: str | Path = "all-minilm-l6-v2",
        held_out_languages: Collection[str] | None = None,
        pivot: str | None = None,
        fraction: float = 0.3,
        steps: int = 100,
        batch_size: int = 32,
        learning_rate: float = 5e-5,
        search_share: float = 0.5,
        search_reach: int = 2,
        max_questions: int = 1000,
        device: str = "cpu",
        keep_models: bool = True,
    ) -> None:
        if isinstance(data, str):
            if data not in WORD_SIZES:
                raise DataError(
                    f"data must be constraints or one of {', '.join(WORD_SIZES)}, got {data!r}"
                )
        elif not isinstance(data, Constraints):
            raise DataError(f"data must be constraints, got {type(data).__name__}")
        for name, value, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 2),
            ("search_reach", search_reach, 1),
            ("max_questions", max_questions, 1),
        ):
            if not _is_int(value) or value < least:
                raise DataError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 < fraction < 1:
            raise DataError(f"fraction must be above 0 and below 1, got {fraction}")
        if not 0 <= search_share <= 1:
            raise DataError(f"search_share must be from 0 to 1, got {search_share}")
        if not 0 < learning_rate < math.inf:
            raise DataError(f"learning_rate must be positive, got {learning_rate}")
        if isinstance(held_out_languages, str):
            raise DataError(
                f"held_out_languages must be several names, got the text {held_out_languages!r}"
            )
        self._given = data
        self.base = str(base)
        self._held_out = None if held_out_languages is None else tuple(sorted(held_out_languages))
        self._pivot = "en" if pivot is None and isinstance(data, str) else pivot
        self.fraction, self.steps, self.batch_size = fraction, steps, batch_size
        self.learning_rate, self.search_share = learning_rate, search_share
        self.search_reach, self.max_questions = search_reach, max_questions
        self.device, self.keep_models = device, keep_models
        self._encoder = TextEncoder(self.base)
        self._loaded = _Loaded()

    # -- what a study asks -----------------------------------------------------------------------

    @property
    def setting(self) -> WordSetting:
        """What is trained on and asked; made when first asked for."""
        if self._loaded.setting is None:
            self._loaded.setting = self._set()
        return self._loaded.setting

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The mean over the tasks that there are first."""
        tasks = self.setting.tasks
        present = {_METRIC_OF_CELL[cell] for cell in tasks}
        parts = tuple(name for name in WORD_METRICS["mrr"].combines if name in present)
        found = {name: WORD_METRICS[name] for name in parts}
        if len(parts) > 1:
            found = {"mrr": WORD_METRICS["mrr"], **found}
        if any(_low(lexicon).any() for lexicons in tasks.values() for lexicon in lexicons):
            found["low_overlap"] = WORD_METRICS["low_overlap"]
        return found | {"precision": WORD_METRICS["precision"]}

    def fingerprint(self) -> str:
        """Return a digest of words, base model and budget."""
        return _digest(self._facts())

    def _facts(self) -> dict[str, object]:
        setting = self.setting
        return {
            "question": _QUESTION,
            "data": setting.words.fingerprint(),
            "languages": [setting.pivot, list(setting.held_out_languages)],
            "fraction": self.fraction,
            "max_questions": self.max_questions,
            "base": self._encoder.fingerprint,
            "budget": [self.steps, self.batch_size, self.learning_rate],
            "search": [self.search_share, self.search_reach],
        }

    def describe(self) -> Mapping[str, object]:
        """Return the facts that the report shows."""
        setting = self.setting
        seen = setting.train.all_languages
        asked = {
            _TASKS[cell]: f"{sum(map(len, lexicons)):,} questions, "
            f"{sum(int(_low(lexicon).sum()) for lexicon in lexicons):,} of them with an answer "
            f"unlike in letters, from or into {', '.join(sorted(_others(lexicons, setting.pivot)))}"
            for cell, lexicons in setting.tasks.items()
        }
        searched = (
            f"learning rate: each design's own, looked for from {self.learning_rate:g} (ten times "
            f"that for adapters and LoRA) in steps of {_FACTOR:g} on "
            f"{count(setting.n_validation_synsets, 'training synset')} set aside, in runs of "
            f"{self.search_share:.0%} of the steps"
            if self.search_share
            else f"learning rate {self.learning_rate:g}, ten times that for adapters and LoRA"
        )
        notes = [
            "A synset asks in every language: questions are not independent, and intervals are a "
            "little short.",
            *setting.notes,
        ]
        if self.base == "all-minilm-l6-v2":
            notes.insert(0, "The base model was trained on English texts and ignores case.")
        return {
            "question": _QUESTION,
            "data": f"{setting.words.name}: {len(setting.words):,} words of "
            f"{setting.words.n_synsets:,} synsets in "
            f"{count(len(setting.words.all_languages), 'language')}",
            "trained on": f"{len(setting.train):,} words of {setting.train.n_synsets:,} synsets in "
            f"{', '.join(seen)}: {len(setting.pairs):,} pairs to draw from",
            "languages held out": ", ".join(setting.held_out_languages) or "none",
            "tasks": asked,
            "base model": self.base,
            "budget": f"{self.steps} steps of {self.batch_size} pairs for every trained design, "
            f"AdamW at a constant rate; {searched}",
            "judged": "by one over the rank of the translation among all words of its language, by "
            f"cosine; P@1 by CSLS with {_CSLS_NEIGHBOURS} neighbours; a question of a new language "
            "is not asked if training has the same letters for its word and an answer",
            "notes": notes,
        }

    def method_version(self, method: str) -> str:
        """Return the version of a method's implementation."""
        return str(_VERSION)

    def check(self, design: Design) -> None:
        """Raise `DataError` if a design cannot run here."""
        from bakeoff.embedding.word_vectors import check_layer

        check_method(design, tuple(_PARAMETERS), _QUESTION)
        check_parameters(design, _PARAMETERS[design.method])
        try:
            _check_values(design.params)
            check_layer(_layer(design), self._words().n_layers)
            if design.method == "procrustes" and self.setting.n_pivot_pairs < _LEAST_PAIRS:
                raise DataError(
                    f"procrustes needs {_LEAST_PAIRS} training pairs of {self.setting.pivot!r} and "
                    f"another language, there are {self.setting.n_pivot_pairs}"
                )
        except DataError as error:
            raise DataError(f"design {design.name!r}: {error}") from error

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        """Check the designs, choose the questions, embed the words once for all frozen designs."""
        work.progress(0.0, "choosing words and questions")
        for design in designs:
            self.check(design)
        frozen = [design for design in designs if design.method not in _PEFT]
        layers = {_layer(d) for d in frozen if d.method != "character-ngrams"}
        for number, layer in enumerate(sorted(layers, key=str)):
            part = (number / len(layers), (number + 1) / len(layers))
            self._raw(layer, counting(work.progress, "embedding the words", part))

    # -- words and questions ---------------------------------------------------------------------

    def _words(self) -> WordEncoder:
        """Return the base model, which nothing trains."""
        if self._loaded.encoder is None:
            from bakeoff.embedding.word_vectors import WordEncoder

            self._loaded.encoder = WordEncoder(self.base, device=self.device)
        return self._loaded.encoder

    def _set(self) -> WordSetting:
        given, held_out = self._given, self._held_out
        if isinstance(given, str):
            given, own = default_words(given)
            held_out = own if held_out is None else held_out
        distinct = list(dict.fromkeys(given.words))
        fit = dict(zip(distinct, self._words().has_tokens(distinct).tolist(), strict=True))
        bare = [word for word in distinct if not fit[word]]
        if bare:
            given = given.select(
                np.array([fit[word] for word in given.words]),
                f"{count(len(bare), 'word')} without any token left out.",
            )
        pivot, held_out = _languages(given, self._pivot, held_out)
        setting = _setting(given, pivot, held_out, self.fraction, self.max_questions)
        return replace(setting, notes=(*setting.notes, *self._unknown(setting)))

    def _unknown(self, setting: WordSetting) -> tuple[str, ...]:
        """Say how many words the tokenizer has nothing but its token for the unknown for."""
        encoder = self._words()
        unknown = encoder.tokenizer.unk_token_id
        if unknown is None:
            return ()
        words = list(dict.fromkeys(setting.words.words))
        n_bare = 0
        for ids in encoder.ids(words):
            own = ids[encoder.n_prefix : len(ids) - encoder.n_suffix]
            n_bare += set(own) == {unknown}
        if not n_bare:
            return ()
        return (f"For {n_bare:,} of {len(words):,} words the base model has unknown tokens only.",)

    # -- one trial -------------------------------------------------------------------------------

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        """Make one design's word vectors and ask all questions.

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
                raise BakeoffError(
                    f"design {design.name!r}: training diverged ({error}); try a lower "
                    "learning_rate"
                ) from error
        return replace(trial, notes=(*trial.notes, *dict.fromkeys(warned)))

    def _run(self, design: Design, seed: int, work: Work) -> Trial:
        tasks = self.setting.tasks
        n_words = len({word for some in tasks.values() for one in some for word in _all(one)})
        cost = dict.fromkeys(
            ("trained_parameters", "active_parameters", "training_pairs", "search_pairs"), 0.0
        )
        cost |= {"training_seconds": 0.0, "texts_embedded": float(n_words)}
        if design.method not in _PEFT:
            work.progress(0.5, "embedding and ranking words")
            model = self._frozen(design)
            scores = self._scores(lambda words, spoken: model.encode_words(words, language=spoken))
            if design.method != "character-ngrams":
                cost["active_parameters"] = float(_n_parameters(self._words().backbone))
            artifact = work.directory if self.keep_models else None
            if artifact is not None:
                self._keep_frozen(design, artifact)
            return Trial(scores, cost, artifact)
        rates = self._rates(design, work)
        rate = max(rates, key=lambda each: rates[each])
        report = counting(work.progress, "training, steps", (0.0, 0.8))
        began = time.perf_counter()
        specializer = self._fit(design, rate, self.steps, seed, report)
        cost["training_seconds"] = time.perf_counter() - began
        cost["training_pairs"] = float(self.steps * self.batch_size)
        cost["trained_parameters"] = float(n_trained_parameters(specializer))
        cost["active_parameters"] = float(_n_parameters(specializer.encoder_.backbone))
        notes: tuple[str, ...] = ()
        if self._searches(design):
            cost["search_pairs"] = float(len(rates) * self._search_steps() * self.batch_size)
            notes = (f"Learning rate {rate:.3g}, the best of {len(rates)} by MRR.",)
        lexicons = [lexicon for some in tasks.values() for lexicon in some]
        report = counting(work.progress, "embedding words", (0.8, 1.0))
        table = self._table(specializer, lexicons, report)
        scores = self._scores(lambda words, _: table.encode(words))
        if self.keep_models:
            with quiet_transformers():
                specializer.save(work.directory / "model")
        return Trial(scores, cost, work.directory if self.keep_models else None, notes)

    def _frozen(self, design: Design) -> Any:
        """Return a design that nothing trains, with what it learned from the training words."""
        from bakeoff.embedding import lexical_baselines as rivals

        params = dict(design.params)
        if design.method == "character-ngrams":
            return rivals.CharacterNgramVectors(**params).fit(self.setting.train)
        known = self._raw(_layer(design))
        model: Any
        if design.method == "raw":
            model = rivals.RawWordVectors(known, **params)
        elif design.method == "all-but-the-top":
            model = rivals.AllButTheTopWords(known, **params)
        else:
            model = rivals.ProcrustesWords(known, pivot=self.setting.pivot, **params)
        return model.fit(self.setting.train)

    def _raw(self, layer: Layer, progress: Callable[[int, int], None] | None = None) -> _WordTable:
        """Return the base model's vectors of all words, from the cache if they are there."""
        if layer not in self._loaded.raw:
            words = list(dict.fromkeys(self.setting.words.words))
            facts = [2, self._encoder.fingerprint, layer, words]

            def build(folder: Path) -> None:
                vectors = self._words().encode(words, layer, progress=progress)
                np.save(folder / "vectors.npy", vectors, allow_pickle=False)

            folder = build_once(cache_directory() / "words" / f"raw-{_digest(facts)[:20]}", build)
            vectors = np.load(folder / "vectors.npy", allow_pickle=False)
            self._loaded.raw[layer] = _WordTable(words, vectors)
        return self._loaded.raw[layer]

    def _fit(
        self,
        design: Design,
        rate: float,
        steps: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> LexicalSpecializer:
        from bakeoff.embedding.lexical import LexicalSpecializer

        params = dict(design.params)
        params.pop("learning_rate", None)
        for ours, theirs in (("reduction", "adapter_reduction"), ("rank", "lora_rank")):
            if ours in params:
                params[theirs] = params.pop(ours)
        specializer = LexicalSpecializer(
            self.base,
            peft=_PEFT[design.method],
            labels="row" if design.method == "row-contrastive" else "synset",
            learning_rate=rate,
            steps=steps,
            batch_size=self.batch_size,
            seed=seed,
            device=self.device,
            **params,
        )
        return specializer.fit(self.setting.pairs, progress=progress)

    def _table(
        self,
        specializer: LexicalSpecializer,
        lexicons: Sequence[Lexicon],
        progress: Callable[[int, int], None] | None = None,
    ) -> _WordTable:
        """Embed each word that is asked for once: these vectors do not depend on the language."""
        words = list(dict.fromkeys(word for lexicon in lexicons for word in _all(lexicon)))
        vectors = specializer.encode_words(words, progress=progress)
        if not np.isfinite(vectors).all():
            raise FloatingPointError("vectors are no numbers after the last step")
        return _WordTable(words, vectors)

    # -- learning rates --------------------------------------------------------------------------

    def _searches(self, design: Design) -> bool:
        return self.search_share > 0 and "learning_rate" not in design.params

    def _search_steps(self) -> int:
        return max(1, round(self.search_share * self.steps))

    def _rates(self, design: Design, work: Work) -> dict[float, float]:
        """Return the learning rates that were tried, and the MRR on the synsets set aside."""
        if "learning_rate" in design.params:
            return {float(design.params["learning_rate"]): 0.0}
        small = _PEFT[design.method] != "full"
        start = self.learning_rate * (_SMALL_PART_RATE if small else 1.0)
        if not self._searches(design):
            return {start: 0.0}
        lexicons = self.setting.validation

        def loss_at(rate: float) -> float:
            work.progress(0.0, f"trying the learning rate {rate:.3g}")
            try:
                specializer = self._fit(design, rate, self._search_steps(), _SEARCH_SEED)
                table = self._table(specializer, lexicons)
            except FloatingPointError:
                return math.inf
            return -float(
                np.mean([_ranked(lambda w, _: table.encode(w), one).mrr for one in lexicons])
            )

        def build(folder: Path) -> None:
            tried = search_rate(loss_at, start, factor=_FACTOR, reach=self.search_reach)
            kept = [[rate, -loss] for rate, loss in tried.items() if math.isfinite(loss)]
            if not kept:
                raise FloatingPointError(
                    f"at every learning rate from {min(tried):.2g} to {max(tried):.2g}"
                )
            write_text(folder / "rates.json", json.dumps(kept))

        key = _digest([self._facts(), _VERSION, design.method, dict(design.params)])[:20]
        folder = build_once(cache_directory() / "words" / f"rates-{key}", build)
        return dict(json.loads((folder / "rates.json").read_text("utf-8")))

    # -- judging ---------------------------------------------------------------------------------

    def _scores(self, encode: EncodeIn) -> Scores:
        """Ask all questions; a unit is a question, in the order of the setting."""
        metrics = self.metrics
        scores: Scores = {name: {} for name in metrics if not metrics[name].combines}
        known = _Spoken(encode, self.setting)
        for cell, lexicons in self.setting.tasks.items():
            ranked = [_ranked(known.encode, lexicon) for lexicon in lexicons]
            reciprocal = np.concatenate([one.reciprocal_ranks for one in ranked])
            low = np.concatenate([_low(lexicon) for lexicon in lexicons])
            scores[_METRIC_OF_CELL[cell]][_TASKS[cell]] = reciprocal
            if low.any():
                scores["low_overlap"][_TASKS[cell]] = reciprocal[low]
            scores["precision"][_TASKS[cell]] = np.concatenate(
                [
                    _ranked(known.encode, lexicon, csls_k=_CSLS_NEIGHBOURS).per_query("p@1")
                    for lexicon in lexicons
                ]
            )
        return scores

    # -- what leaves -----------------------------------------------------------------------------

    def _keep_frozen(self, design: Design, folder: Path) -> None:
        """Keep what makes a frozen design again: the model, or the words that it learns from."""
        if design.method == "raw":
            with quiet_transformers():
                model = self._words().sentence_transformer(_layer(design))
                model.save_pretrained(str(folder / "model"), create_model_card=False)
            return
        train = self.setting.train
        rows = [
            json.dumps({"synset": synset, "word": word, "language": language}, ensure_ascii=False)
            for synset, word, language in zip(
                train.synsets, train.words, train.languages, strict=True
            )
        ]
        write_text(folder / _CONSTRAINTS_FILE, "\n".join(rows) + "\n")

    def export(
        self, design: Design, artifact: Path, destination: Path, *, reason: str = ""
    ) -> bool:
        """Save a trial's winner, with a README.

        A trained or a raw model is a sentence-transformers folder. What is no model of its own
        (all-but-the-top, Procrustes, character n-grams) is the file of words that it is made from
        in seconds, and the lines that do it.

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
            False: what averages a word's own tokens is bakeoff's.
        """
        with atomic_folder(destination) as scratch:
            if (artifact / "model").is_dir():
                shutil.copytree(artifact / "model", scratch, dirs_exist_ok=True)
            else:
                shutil.copy2(artifact / _CONSTRAINTS_FILE, scratch / _CONSTRAINTS_FILE)
            facts = {
                "method": design.method,
                "arguments": self._arguments(design),
                "language": self.setting.pivot,
            }
            write_text(scratch / _FACTS_FILE, json.dumps(facts, indent=1) + "\n")
            lines = "\n".join(_usage(destination, facts))
            setting = self.setting
            parts = [
                f"# {design.name}",
                f"Method: {design.method}. Made from {len(setting.train):,} words of "
                f"{setting.words.name} in {', '.join(setting.train.all_languages)}. "
                f"Base model: {self.base}.",
                reason,
                f"```python\n{lines}\n```",
                "Needs bakeoff.",
            ]
            write_text(scratch / "README.md", "\n\n".join(part for part in parts if part) + "\n")
        return False

    def _arguments(self, design: Design) -> dict[str, Any]:
        if design.method not in _CLASSES:
            return {}
        given: dict[str, Any] = {}
        if design.method != "character-ngrams":
            given["base_model"] = self.base
        if design.method == "procrustes":
            given["pivot"] = self.setting.pivot
        return given | dict(design.params)

    def usage(self, destination: Path) -> list[str]:
        """Return lines of Python that use the winner in `destination`."""
        return _usage(destination, json.loads((destination / _FACTS_FILE).read_text("utf-8")))


@dataclass(frozen=True, eq=False)
class WordSetting:
    """What is trained on and what is asked.

    Parameters
    ----------
    words
        All of them.
    train
        Words that designs learn from.
    pairs
        Pairs of them.
    tasks
        Questions by cell, one lexicon for each pair of languages and direction.
    validation
        Questions that learning rates are chosen by; nobody learns from their synsets.
    pivot, held_out_languages
        See `WordProblem`.
    n_validation_synsets, n_pivot_pairs
        Synsets set aside, and the most pairs that the pivot has with one language.
    notes
        What was left out.
    """

    words: Constraints
    train: Constraints
    pairs: WordPairs
    tasks: Mapping[Cell, tuple[Lexicon, ...]]
    validation: tuple[Lexicon, ...]
    pivot: str
    held_out_languages: tuple[str, ...]
    n_validation_synsets: int
    n_pivot_pairs: int
    notes: tuple[str, ...] = ()


class _WordTable:
    """Vectors of known words, in place of the model that made them."""

    def __init__(self, words: Sequence[str], vectors: Any) -> None:
        self._places = {word: place for place, word in enumerate(words)}
        self._vectors = vectors

    def encode(self, words: Sequence[str], layer: object = -1) -> Any:
        """Return the words' vectors ``(n, d)``."""
        return self._vectors[[self._places[word] for word in words]]

    def has_tokens(self, words: Sequence[str]) -> NDArray[np.bool_]:
        """Say of each word that it has tokens: others are not here."""
        return np.array([word in self._places for word in words], dtype=np.bool_)


class _Spoken:
    """Embeds each language's words once, for all questions from and into it."""

    def __init__(self, encode: EncodeIn, setting: WordSetting) -> None:
        self._encode = encode
        self._words: dict[str, dict[str, None]] = defaultdict(dict)
        for lexicons in setting.tasks.values():
            for one in lexicons:
                self._words[one.source_language].update(dict.fromkeys(one.source_vocabulary))
                self._words[one.target_language].update(dict.fromkeys(one.target_vocabulary))
        self._tables: dict[str, _WordTable] = {}

    def encode(self, words: Sequence[str], language: str) -> Any:
        """Return vectors of words of a language."""
        if language not in self._tables:
            known = list(self._words[language])
            vectors = self._encode(known, language)
            self._tables[language] = _WordTable(
                known, vectors.tocsr() if hasattr(vectors, "tocsr") else vectors
            )
        return self._tables[language].encode(words)


class _Loaded:
    """What trials share in one process; left behind when pickled."""

    def __init__(self) -> None:
        self.setting: WordSetting | None = None
        self.encoder: WordEncoder | None = None
        self.raw: dict[Layer, _WordTable] = {}

    def __reduce__(self) -> tuple[type[_Loaded], tuple[()]]:
        return (type(self), ())


def n_trained_parameters(specializer: LexicalSpecializer) -> int:
    """Return how many parameters a fitted specialiser has trained.

    Adapters are still in the model; LoRA was merged, and is counted by what it was put on.
    """
    from torch import nn

    from bakeoff.embedding.bottleneck_adapters import BottleneckAdapter
    from bakeoff.embedding.two_stage import lora_config

    backbone = specializer.encoder_.backbone
    if specializer.peft == "full":
        return _n_parameters(backbone)
    if specializer.peft == "adapter":
        adapters = [one for one in backbone.modules() if isinstance(one, BottleneckAdapter)]
        return sum(map(_n_parameters, adapters))
    targets = set(lora_config(backbone).target_modules or ())
    return specializer.lora_rank * sum(
        module.in_features + module.out_features
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    )


# -- what is asked ---------------------------------------------------------------------------------


def _languages(
    words: Constraints, pivot: str | None, held_out: Collection[str] | None
) -> tuple[str, tuple[str, ...]]:
    """Return the pivot and the languages to hold out, which are others."""
    known = words.all_languages
    for name, given in (("pivot", [pivot] if pivot else []), ("held_out_languages", held_out)):
        if unknown := [language for language in given or () if language not in known]:
            raise DataError(
                f"{name} names {unknown[0]!r}, which has no words; there are: {listed(known)}"
            )
    if pivot is not None and pivot in (held_out or ()):
        raise DataError(f"pivot {pivot!r} must not be among held_out_languages")
    sizes = Counter(words.languages)
    if pivot is None:
        seen = [language for language in known if language not in (held_out or ())]
        if not seen:
            raise DataError("held_out_languages leaves no language to train on")
        pivot = min(seen, key=lambda language: (-sizes[language], language))
    if held_out is None:
        others = sorted(set(known) - {pivot}, key=lambda one: (position(one, 0), one))
        n_held = max(1, round(len(known) / 5)) if len(known) > 2 else 0
        held_out = others[:n_held]
    return pivot, tuple(sorted(held_out))


def _setting(
    words: Constraints,
    pivot: str,
    held_out: tuple[str, ...],
    fraction: float,
    max_questions: int,
) -> WordSetting:
    split = split_constraints(words, held_out_languages=held_out, fraction=fraction)
    inner = split_constraints(split.train, fraction=_VALIDATION_SHARE, seed=1)
    seen = [language for language in split.seen_languages if language != pivot]
    if pivot not in split.seen_languages:
        raise DataError(f"the pivot {pivot!r} has no words to train on")
    partners: dict[Cell, Sequence[str]] = {
        "synsets": seen or [pivot],
        "languages": held_out,
        "both": held_out,
    }
    tasks: dict[Cell, tuple[Lexicon, ...]] = {}
    # The synsets set aside are no training synsets, whatever the cell.
    tested = replace(split, train=inner.train)
    for cell, others in partners.items():
        lexicons = _questions(tested, cell, pivot, others, max_questions)
        if lexicons:
            tasks[cell] = lexicons
    every = max(1, len(seen) // _N_VALIDATION_LANGUAGES)
    chosen = seen[::every][:_N_VALIDATION_LANGUAGES] or [pivot]
    validation = _questions(inner, "synsets", pivot, chosen, max_questions)
    if not tasks or not validation:
        missing = "no held-out synset" if not tasks else "no synset set aside for learning rates"
        raise DataError(
            f"{words.name}: {missing} has two words to ask for one another, in {pivot!r} and "
            f"another language or as synonyms; the file has {count(len(words), 'word')} of "
            f"{count(words.n_synsets, 'synset')} in {listed(words.all_languages)}: give more "
            "words or languages (in Python, another pivot or fraction)"
        )
    pairs = build_pairs(inner.train, max_per_language_pair=_MOST_PAIRS)
    with_pivot = Counter(
        kind for kind in pairs.language_pairs() if pivot in kind and kind[0] != kind[1]
    )
    return WordSetting(
        words=words,
        train=inner.train,
        pairs=pairs,
        tasks=tasks,
        validation=validation,
        pivot=pivot,
        held_out_languages=held_out,
        n_validation_synsets=len(inner.held_out_synsets),
        n_pivot_pairs=max(with_pivot.values(), default=0),
        notes=tuple(dict.fromkeys((*words.notes, *split.notes))),
    )


def _questions(
    split: ConstraintSplit, cell: Cell, pivot: str, others: Sequence[str], most: int
) -> tuple[Lexicon, ...]:
    """Return questions from and into the pivot; where two languages leave none, none."""
    found = []
    for other in others:
        for source, target in dict.fromkeys([(pivot, other), (other, pivot)]):
            try:
                lexicon = split.lexicon(cell, source, target)
            except DataError:
                continue
            if len(lexicon) > most:
                asked = lexicon.source_words
                order = sorted((position(word, 0), row) for row, word in enumerate(asked))
                lexicon = lexicon.select(sorted(row for _, row in order[:most]))
            found.append(lexicon)
    return tuple(found)


def _ranked(encode: EncodeIn, lexicon: Lexicon, csls_k: int | None = None) -> LexiconScores:
    from bakeoff.embedding.lexicon_induction import bli_lexicon

    return bli_lexicon(
        lambda words: encode(words, lexicon.source_language),
        lexicon,
        csls_k=csls_k,
        encode_target=lambda words: encode(words, lexicon.target_language),
    )


def _all(lexicon: Lexicon) -> tuple[str, ...]:
    return (*lexicon.source_vocabulary, *lexicon.target_vocabulary)


def _low(lexicon: Lexicon) -> NDArray[np.bool_]:
    return np.array(lexicon.overlaps or (), dtype=np.float64) <= _LOW_OVERLAP


def _others(lexicons: Sequence[Lexicon], pivot: str) -> set[str]:
    found = {name for one in lexicons for name in (one.source_language, one.target_language)}
    return found - {pivot} or {pivot}


def _usage(destination: Path, facts: Mapping[str, Any]) -> list[str]:
    name = _CLASSES.get(facts["method"])
    if name is None:
        return [
            "from sentence_transformers import SentenceTransformer",
            f"model = SentenceTransformer({str(destination)!r}, trust_remote_code=True)",
            "vectors = model.encode(['your word'])",
        ]
    arguments = ", ".join(f"{key}={value!r}" for key, value in facts["arguments"].items())
    return [
        "from bakeoff.data.lexicon_sources import read_constraints",
        f"from bakeoff.embedding.lexical_baselines import {name}",
        f"words = read_constraints({str(destination / _CONSTRAINTS_FILE)!r})",
        f"model = {name}({arguments}).fit(words)",
        f"vectors = model.encode_words(['your word'], language={facts['language']!r})",
    ]


def _layer(design: Design) -> Layer:
    layer: Layer = design.params.get("layer", -1)
    return layer


def _n_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_values(params: Mapping[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if name in params and params[name] not in choices:
            raise DataError(f"{name} must be one of {', '.join(choices)}, got {params[name]!r}")
    for name, least in _INTEGERS.items():
        value = params.get(name, least)
        if not _is_int(value) or value < least:
            raise DataError(f"{name} must be an integer of at least {least}, got {value!r}")
    if params.get("shortest", 2) > params.get("longest", 4):
        raise DataError("shortest must be at most longest")
    for name in ("learning_rate", "temperature"):
        value = params.get(name, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise DataError(f"{name} must be above 0, got {value!r}")
    alpha = params.get("alpha")
    if alpha is not None and alpha != -1:
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not 0 <= alpha < math.inf:
            raise DataError(f"alpha must be at least 0, or None for no resampling, got {alpha!r}")
