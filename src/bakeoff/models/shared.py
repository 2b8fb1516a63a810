"""Language models that trials of one process share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bakeoff.models.loading import LanguageModel


class SharedModels:
    """Language models by name, loaded when first asked for; left behind when pickled.

    A study's problem keeps one: it travels to worker processes without weights, and each process
    loads a model once for all its trials.

    Examples
    --------
    >>> import pickle
    >>> models = pickle.loads(pickle.dumps(SharedModels()))
    >>> models.language_model("smollm2-135m").max_length  # doctest: +SKIP
    8192
    """

    def __init__(self) -> None:
        self._language_models: dict[str, LanguageModel] = {}

    def __reduce__(self) -> tuple[type[SharedModels], tuple[()]]:
        return (type(self), ())

    def language_model(self, name: str) -> LanguageModel:
        """Return the model of that packaged name, folder or hub id."""
        if name not in self._language_models:
            from bakeoff.models.loading import load_language_model

            self._language_models[name] = load_language_model(name)
        return self._language_models[name]
