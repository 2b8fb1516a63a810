"""In-context classification: a frozen language model answers with labelled examples in its prompt.

The learner that selective annotation was made for (vote-k, IDEAL): what is picked decides which
examples there are to retrieve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError
from bakeoff.selection.prompt_retrieval import SimilarityPromptRetriever

if TYPE_CHECKING:
    from bakeoff.models import LanguageModel

_MOST_TEXT_TOKENS = 250
# Kept free of the window: the option, and what a cut text may grow by when it is tokenized again.
_SPARE = 32


class InContextClassifier:
    """Classify by the loss of each label after a prompt of retrieved examples.

    Parameters
    ----------
    language_model
        The frozen model.
    options
        The labels that an answer may be.
    n_shots
        Examples in a prompt.
    max_tokens
        Most tokens of a prompt, its examples and the input counted; never more than the model's
        window leaves. A text keeps at most its first 250 tokens, fewer where the window is small.
    choose
        ``"similarity"``: the most similar examples, the most similar last. ``"random"``: the
        control.
    random_state
        Seed of ``choose="random"``.

    Raises
    ------
    DataError
        If there is no option, or the model's window has no room for an input.

    Examples
    --------
    >>> learner = InContextClassifier(load_language_model("smollm2-135m"), ["sport", "weather"])
    ... # doctest: +SKIP
    >>> learner.fit(vectors, texts, labels).predict(new_vectors, new_texts)  # doctest: +SKIP
    """

    def __init__(
        self,
        language_model: LanguageModel,
        options: Sequence[str],
        *,
        n_shots: int = 5,
        max_tokens: int = 1000,
        choose: Literal["similarity", "random"] = "similarity",
        random_state: int | None = None,
    ) -> None:
        if not options:
            raise DataError("options must hold at least one label")
        self.language_model = language_model
        self.options = tuple(options)
        self.n_shots = n_shots
        self.choose = choose
        self.random_state = random_state
        encode = language_model.tokenizer
        self._option_ids = [
            encode(f" {option}", add_special_tokens=False).input_ids for option in self.options
        ]
        special = len(encode("").input_ids)  # at the beginning, where the tokenizer has one
        spare = max(_SPARE, *map(len, self._option_ids)) + special
        self.max_tokens = min(max_tokens, language_model.max_length - spare)
        frame = len(encode("\nLabel:", add_special_tokens=False).input_ids)
        self._most_text = min(_MOST_TEXT_TOKENS, self.max_tokens - frame)
        if self._most_text < 1:
            raise DataError(
                f"max_tokens of {max_tokens}, in a window of {language_model.max_length}, is too "
                f"short: the label takes {spare + frame} tokens, and an input at least 1"
            )

    def fit(
        self,
        vectors: NDArray[np.float32],
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        center: NDArray[np.float32] | bool = False,
    ) -> InContextClassifier:
        """Take the labelled examples.

        Parameters
        ----------
        vectors
            Their vectors ``(M, d)``, for retrieval.
        texts, labels
            M strings each.
        center
            What is subtracted before cosines, e.g. the pool's mean.
        """
        self._shots = [
            f"{self._cut(text)}\nLabel: {label}\n\n"
            for text, label in zip(texts, labels, strict=True)
        ]
        self._retriever = SimilarityPromptRetriever(
            vectors,
            self._shots,
            self.language_model.tokenizer,
            self.max_tokens,
            n_shots=self.n_shots,
            max_example_tokens=None,
            center=center,
            choose=self.choose,
            random_state=self.random_state,
        )
        return self

    def losses(
        self,
        vectors: NDArray[np.float32],
        texts: Sequence[str],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Return the mean loss per token of every option for every input, ``(n, n_options)``."""
        from bakeoff.models import option_losses

        asked = [f"{self._cut(text)}\nLabel:" for text in texts]
        with warnings.catch_warnings():
            # An input longer than the budget is asked about without examples.
            warnings.filterwarnings("ignore", message=r".* inputs get no example")
            found = self._retriever.retrieve(vectors, asked)
        encode = self.language_model.tokenizer
        prompts = [
            encode("".join([*(self._shots[row] for row in rows), question])).input_ids
            for rows, question in zip(found, asked, strict=True)
        ]
        return option_losses(
            self.language_model.model, prompts, self._option_ids, progress=progress
        )

    def predict(self, vectors: NDArray[np.float32], texts: Sequence[str]) -> list[str]:
        """Return the option with the least loss for every input; the first of equal ones."""
        return [self.options[best] for best in self.losses(vectors, texts).argmin(axis=1)]

    def confidence(
        self,
        vectors: NDArray[np.float32],
        texts: Sequence[str],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Return minus the loss of the best option for every input, ``(n,)``: larger is surer."""
        best: NDArray[np.float64] = self.losses(vectors, texts, progress=progress).min(axis=1)
        return -best

    def _cut(self, text: str) -> str:
        encode = self.language_model.tokenizer
        ids = encode(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) <= self._most_text:
            return text
        cut: str = encode.decode(ids[: self._most_text])
        return cut
