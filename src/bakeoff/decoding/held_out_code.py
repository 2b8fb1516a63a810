"""Which functions are held out, and that no copy of them is trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bakeoff.data.formats import count
from bakeoff.data.splits import hold_out, normalise, runs, sample
from bakeoff.decoding.code_evaluation import PythonFunction, python_functions
from bakeoff.errors import DataError

COPIED_WORDS = 24
"""A run of so many words that a training text shares with a held-out function makes it a copy."""

# Held out even where it is more than the fraction, as long as it is no more than half.
_LEAST_TEXTS = 10
# A run that so many training texts share is a licence or the like.
_BOILERPLATE_TEXTS, _BOILERPLATE_SHARE = 3, 0.05


@dataclass(frozen=True)
class CodeSplit:
    """Texts to train on and functions to judge by.

    Parameters
    ----------
    training
        Texts by source.
    held_out
        Functions by source; of a text that is not Python, the text as a whole.
    notes
        Sentences about what was left out.
    """

    training: Mapping[str, tuple[str, ...]]
    held_out: Mapping[str, tuple[PythonFunction, ...]]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return the SHA-256 of all texts and their order, as hexadecimal digits."""
        digest = hashlib.sha256()
        for name in self.training:
            held_out = [f"{f.source}\0{f.body}" for f in self.held_out[name]]
            for part in (name, "\1", *self.training[name], "\2", *held_out, "\3"):
                digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()


def split_code(
    texts: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]] | None = None,
    *,
    n_functions: int,
    max_characters: int,
    fraction: float = 0.1,
    seed: int = 0,
) -> CodeSplit:
    """Hold functions out by their content, and leave copies of them out of training.

    Of the texts a part is held out; `n_functions` of the functions in it, drawn by their content,
    are kept. A training text that shares `COPIED_WORDS` words in a row with one of them is left
    out, unless those words stand in a twentieth of all training texts, as a licence does. Functions
    with fewer words are not kept: nobody could say what a copy of them is.

    Parameters
    ----------
    texts
        Texts by source: modules, functions, or any other text.
    held_out
        Texts to hold out, by the same sources; None to split `texts`.
    n_functions
        Most functions of a source.
    max_characters
        Longest function.
    fraction
        Part of the texts that is held out where `held_out` is None; of few texts ten, or half.
    seed
        Of the split and of the draw.

    Returns
    -------
    CodeSplit

    Raises
    ------
    DataError
        If a source is empty, `held_out` has other sources, or nothing is left on one side.
    """
    if not texts or not all(len(some) for some in texts.values()):
        raise DataError("texts must hold at least one text of each source")
    if held_out is not None and set(held_out) != set(texts):
        raise DataError(f"held_out must have the sources {sorted(texts)}, got {sorted(held_out)}")
    training: dict[str, list[str]] = {}
    functions: dict[str, tuple[PythonFunction, ...]] = {}
    for name, some in texts.items():
        given = None if held_out is None else held_out[name]
        aside, training[name] = _aside(some, given, fraction, seed)
        functions[name] = choose_functions(aside, n_functions, max_characters, seed)
        if not functions[name]:
            raise DataError(
                f"{name}: no held-out text has a function of at least {COPIED_WORDS} words and at "
                f"most {max_characters} characters"
            )
    kept, n_copies = _without_copies(training, functions)
    notes = []
    if n_copies:
        notes.append(f"{count(n_copies, 'training text')} left out: copies of held-out functions.")
    for name, left in kept.items():
        if not left:
            raise DataError(f"{name}: no text is left to train on")
    return CodeSplit(kept, functions, tuple(notes))


def _aside(
    texts: Sequence[str], held_out: Sequence[str] | None, fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    if held_out is not None:
        return list(held_out), list(texts)
    if len(texts) < 2:
        raise DataError("texts must hold at least two texts, one of them to hold out")
    fraction = max(fraction, min(0.5, _LEAST_TEXTS / len(texts)))
    chosen = hold_out([(text,) for text in texts], fraction=fraction, seed=seed)
    pairs = list(zip(texts, chosen.tolist(), strict=True))
    return [text for text, aside in pairs if aside], [text for text, aside in pairs if not aside]


def choose_functions(
    texts: Iterable[str], n_functions: int, max_characters: int, seed: int = 0
) -> tuple[PythonFunction, ...]:
    """Return functions of texts, drawn by their content; a text that has none, as a whole."""
    found: dict[str, PythonFunction] = {}
    for text in texts:
        # Named by content, so that holes do not depend on the order of texts.
        module = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        # Its first line stays, so that there is something to go on from.
        whole = PythonFunction("", module, "", text, text.find("\n") + 1, 0, None)
        for function in python_functions(text, module=module) or (whole,):
            found.setdefault(normalise(function.source), function)
    return draw_functions(found.values(), n_functions, max_characters, seed)


def draw_functions(
    functions: Iterable[PythonFunction], n_functions: int, max_characters: int, seed: int = 0
) -> tuple[PythonFunction, ...]:
    """Return at most so many of the functions that are neither too long nor too short."""
    fit = (
        function
        for function in functions
        if len(function.source) <= max_characters and runs(function.source, COPIED_WORDS)
    )
    return tuple(sample(fit, n_functions, seed, key=lambda function: function.source))


def _without_copies(
    training: Mapping[str, Sequence[str]], functions: Mapping[str, Sequence[PythonFunction]]
) -> tuple[dict[str, tuple[str, ...]], int]:
    known = {
        run
        for some in functions.values()
        for function in some
        for run in runs(function.source, COPIED_WORDS)
    }
    shared = {
        name: [known & runs(text, COPIED_WORDS) for text in texts]
        for name, texts in training.items()
    }
    seen = Counter(run for many in shared.values() for some in many for run in some)
    n_texts = sum(map(len, training.values()))
    usual = max(_BOILERPLATE_TEXTS, _BOILERPLATE_SHARE * n_texts)
    kept = {}
    for name, texts in training.items():
        kept[name] = tuple(
            text
            for text, some in zip(texts, shared[name], strict=True)
            if not any(seen[run] <= usual for run in some)
        )
    return kept, n_texts - sum(map(len, kept.values()))
