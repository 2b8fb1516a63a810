"""The selectors by the names that designs and `bakeoff select` use, with what each reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from bakeoff.selection.selector import Selector

Reads = Literal["rows", "vectors", "states", "texts", "samples"]
"""What a selector's `fit` takes as the pool.

- ``"rows"``: anything that has a length; what is in it is not looked at;
- ``"vectors"``: embeddings by an encoder, ``(N, d)``;
- ``"states"``: vectors that RDS+ makes of a language model's hidden states, ``(N, d)``;
- ``"texts"``: the texts themselves;
- ``"samples"``: `bakeoff.data.samples.Sample` records with context, instruction and response.
"""
Needs = Literal["queries", "confidence", "groups"]


@dataclass(frozen=True)
class SelectorKind:
    """One method that designs can name.

    Parameters
    ----------
    version
        Raise it when results of old trials become wrong.
    home
        ``"module:class"`` in this package; imported when built.
    reads
        What `fit` takes as the pool.
    needs
        What `fit` must be given beside the pool.
    seeded
        Whether the constructor takes ``random_state``.
    uses_model
        Whether the constructor takes ``model``, a language model.
    nested
        Whether the first n picks are the picks for a budget of n, so that one run serves all.
    picks_first
        Whether `fit` takes a function as ``confidence=``, which it calls with a first batch of its
        own choice.
    fixed
        Constructor arguments that the name implies, unless told otherwise.
    """

    version: str
    home: str
    reads: Reads = "vectors"
    needs: tuple[Needs, ...] = ()
    seeded: bool = False
    uses_model: bool = False
    nested: bool = False
    picks_first: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Constructor arguments that a design may set."""
        given = {"self", "n_select", "random_state", *(("model",) if self.uses_model else ())}
        names = inspect.signature(self._class().__init__).parameters
        return tuple(name for name in names if name not in given)

    def _class(self) -> Any:
        module, name = self.home.split(":")
        return getattr(import_module(f"bakeoff.selection.{module}"), name)

    def build(
        self, *, n_select: int, seed: int | None = None, model: Any = None, **params: Any
    ) -> Selector:
        """Return an unfitted selector.

        Raises
        ------
        DataError
            If a parameter is unknown; lists those that are.
        """
        unknown = sorted(set(params) - set(self.parameters))
        if unknown:
            raise DataError(
                f"{self.home.split(':')[1]} takes {', '.join(self.parameters) or 'no parameters'}; "
                f"got {', '.join(unknown)}"
            )
        arguments = {**dict(self.fixed), **params}
        if self.seeded:
            arguments["random_state"] = seed
        if self.uses_model and model is not None:
            arguments["model"] = model
        selector: Selector = self._class()(n_select=n_select, **arguments)
        return selector


# The paper's 150 votes are a twentieth of its pools of 3,000; pools here are of any size.
_SHARE = (("k", 0.05),)
SELECTORS: dict[str, SelectorKind] = {
    # Published: which to label; then what a sceptic would pick.
    "vote-k": SelectorKind("1", "vote_k:VoteK", nested=True, fixed=_SHARE),
    "vote-k-confidence": SelectorKind(
        "1", "vote_k:VoteK", needs=("confidence",), seeded=True, picks_first=True, fixed=_SHARE
    ),
    "ideal": SelectorKind("1", "ideal:InfluenceSelector", seeded=True, nested=True),
    "random": SelectorKind("1", "baselines:RandomSelector", reads="rows", seeded=True, nested=True),
    "kmeans": SelectorKind("1", "baselines:KMeansSelector", seeded=True),
    "facility-location": SelectorKind("1", "baselines:FacilityLocationSelector", nested=True),
    "farthest-first": SelectorKind(
        "1", "baselines:FarthestFirstSelector", seeded=True, nested=True
    ),
    "typical-clusters": SelectorKind("1", "baselines:TypicalClusterSelector", seeded=True),
    "least-confidence": SelectorKind(
        "1", "baselines:LeastConfidenceSelector", reads="rows", needs=("confidence",), nested=True
    ),
    # Published: which to train on; then what a sceptic would pick.
    "rds-plus": SelectorKind(
        "1", "query_selection:NearestToQueries", reads="states", needs=("queries",), nested=True
    ),
    "mates": SelectorKind(
        "1",
        "mates:MATESSelector",
        reads="samples",
        needs=("queries",),
        seeded=True,
        uses_model=True,
    ),
    "gateau": SelectorKind("1", "gateau:GateauSelector", reads="samples", uses_model=True),
    "balanced-random": SelectorKind(
        "1",
        "baselines:BalancedRandomSelector",
        reads="rows",
        needs=("groups",),
        seeded=True,
        nested=True,
    ),
    "embedding-similarity": SelectorKind(
        "1", "query_selection:NearestToQueries", needs=("queries",), nested=True
    ),
    "tf-idf": SelectorKind(
        "1", "text_baselines:TfidfSelector", reads="texts", needs=("queries",), nested=True
    ),
    "bm25": SelectorKind(
        "1", "text_baselines:BM25Selector", reads="texts", needs=("queries",), nested=True
    ),
    "importance-resampling": SelectorKind(
        "1",
        "importance_resampling:ImportanceResampler",
        reads="texts",
        needs=("queries",),
        seeded=True,
    ),
    "longest": SelectorKind("1", "text_baselines:LongestSelector", reads="texts", nested=True),
    "perplexity": SelectorKind(
        "1", "text_baselines:PerplexitySelector", reads="texts", uses_model=True
    ),
    "ifd": SelectorKind(
        "1", "text_baselines:IFDSelector", reads="samples", uses_model=True, nested=True
    ),
}
"""Methods by the name that designs use."""


def selector_kind(method: str) -> SelectorKind:
    """Return what a method's name stands for; raise `DataError` if there is none."""
    if method not in SELECTORS:
        raise DataError(f"no selection method {method!r}; there are: {', '.join(SELECTORS)}")
    return SELECTORS[method]
