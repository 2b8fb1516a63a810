"""The schema of ``results.json``: what a study found, as typed records.

The report, the terminal table and ``docs/results.schema.json`` are all made from these classes, so
the file, its documentation and its readers cannot drift apart. NaN and infinity are never written:
a number that could not be computed is ``null``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from bakeoff.errors import StoreError

SCHEMA_VERSION = 1
N_QUANTILES = 21

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    # A misspelt field is a bug of the writer: better refused here than silently not shown.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Trials(_Record):
    """How many trials (a design under a seed) the study has."""

    planned: Count
    """Designs times seeds."""
    finished: Count
    """Trials whose scores are in the study."""
    failed: Count
    """Trials that raised an error."""
    reused: Count
    """Finished trials that an earlier run had already stored."""


class StudyFacts(_Record):
    """The run itself."""

    name: str
    """The study's name."""
    started: str
    """When it began, ISO 8601."""
    finished: str | None
    """When it ended, ISO 8601; null while it runs or after an interruption."""
    complete: bool
    """Whether every planned trial finished or failed."""
    seeds: list[int]
    """The seeds that every design was run with."""
    alpha: Annotated[float, Field(gt=0, lt=1)]
    """Significance level; intervals cover 1 - alpha."""
    trials: Trials
    wall_seconds: float | None
    """Seconds from start to end."""
    workers: Annotated[int, Field(ge=1)]
    """Trials that ran at the same time."""


class ProblemFacts(_Record):
    """What the designs were compared on."""

    name: str
    """The family, e.g. ``embedding``."""
    fingerprint: str
    """Digest of everything besides design and seed that determines the scores."""
    description: dict[str, JsonValue]
    """Free facts for the reader: data, sizes, base model, budget. If it has a key ``usage``, its
    value (a string or a list of strings) is the code that loads the winner."""


class MetricFacts(_Record):
    """One thing that was measured."""

    label: str
    """Its name for readers, e.g. ``MRR@10``."""
    higher_is_better: bool
    """Direction."""
    combines: list[str]
    """Other metrics over whose tasks this one averages; empty for a measured metric."""
    margin: float | None
    """Smallest difference of practical consequence, if one was stated."""
    tasks: list[str]
    """The tasks that this metric covers."""


class Comparison(_Record):
    """One design against the reference, on one task or over all tasks of a metric.

    All differences are design minus reference, in the metric's own direction: where lower is
    better, an improvement is negative. ``better`` always means an improvement.
    """

    mean: float | None
    """The design's mean score."""
    difference: float | None
    """Mean difference to the reference."""
    interval: Annotated[list[float | None], Field(min_length=2, max_length=2)] | None
    """Low and high end of the confidence interval of the difference."""
    p_value: Fraction | None
    """Of the paired test of no difference."""
    p_holm: Fraction | None
    """The same after Holm's correction for the number of designs."""
    effect_size: float | None
    """Standardised paired difference."""
    verdict: Verdict | None
    """What may be concluded; null for the reference itself."""
    n_units: Count | None
    """Paired units (queries, examples, sentence pairs)."""
    n_seeds: Count | None
    """Seeds that both designs finished."""
    n_tasks: Count | None
    """Tasks that were averaged over."""
    wins: Count | None
    """Units on which the design improved on the reference (averaged over seeds)."""
    ties: Count | None
    """Units on which the two were equal."""
    losses: Count | None
    """Units on which the design did worse."""
    difference_quantiles: (
        Annotated[list[float | None], Field(min_length=N_QUANTILES, max_length=N_QUANTILES)] | None
    )
    """The 0 %, 5 %, ..., 100 % quantiles of the units' differences."""
    needed_units: Count | None
    """Number of units that would decide an undecided comparison with a power of 0.8."""
    needed_seeds: Count | None
    """Number of seeds that would do the same."""


class MetricResult(_Record):
    """A design's comparisons under one metric."""

    overall: Comparison
    """Over all tasks."""
    tasks: dict[str, Comparison]
    """Task by task."""


class CostRange(_Record):
    """A cost over the seeds of one design."""

    mean: float | None
    min: float | None
    max: float | None


class DesignResult(_Record):
    """One contender."""

    name: str
    """Unique in the study."""
    method: str
    """The method's slug in its family."""
    params: dict[str, JsonValue]
    """The method's parameters."""
    method_version: str
    """Version of the method's implementation."""
    artifact: str | None
    """Folder with what was fitted under the first seed, relative to the study's folder."""
    metrics: dict[str, MetricResult]
    """By metric name; a design none of whose trials finished has none."""
    cost: dict[str, CostRange]
    """Named costs; time in seconds, memory in bytes."""
    notes: list[str]
    """Remarks of the design's trials."""


class Ranks(_Record):
    """Average ranks of the designs under one metric, for the critical-difference diagram."""

    average_ranks: dict[str, float]
    """1 is best."""
    critical_difference: float | None
    """Nemenyi's critical difference of two average ranks: the diagram's ruler."""
    cliques: list[list[str]]
    """Groups of designs that the test cannot tell apart."""
    n_blocks: Count
    """Blocks (tasks or units) on which the designs were ranked."""
    test: str
    """How designs were told apart, and what a block is."""


class SharedCost(_Record):
    """Work that was done once for all designs."""

    wall_seconds: float | None
    peak_memory_bytes: float | None


class Failure(_Record):
    """A trial that raised an error."""

    design: str
    seed: int
    error: str
    """One line."""
    traceback: str


class Winner(_Record):
    """The design to use.

    Among the designs whose headline verdict is ``better``, the one with the best mean; the
    reference if there is none.
    """

    design: str | None
    seed: int | None
    """The first seed: picking the best one on test scores would flatter it."""
    artifact: str | None
    """Folder with the fitted winner, relative to the study's folder."""
    reason: str
    """One sentence."""


class Environment(_Record):
    """What the study ran on."""

    bakeoff: str
    python: str
    platform: str
    processor: str | None
    cores: int | None
    memory_bytes: float | None
    packages: dict[str, str]
    """Versions by package name."""


class Results(_Record):
    """Everything a study found (``results.json``)."""

    schema_version: Literal[1]
    study: StudyFacts
    problem: ProblemFacts
    metrics: Annotated[dict[str, MetricFacts], Field(min_length=1)]
    """By name, in order; the first is the headline, which ranks the designs."""
    reference: str
    """Name of the design that all others are compared with."""
    designs: list[DesignResult]
    """Best headline mean first."""
    ranks: dict[str, Ranks]
    """By metric name."""
    shared_cost: SharedCost
    failures: list[Failure]
    winner: Winner
    notes: list[str]
    environment: Environment
    command: str
    """The command that repeats the study."""

    @property
    def headline(self) -> str:
        """Name of the metric that ranks the designs."""
        return next(iter(self.metrics))

    def design(self, name: str) -> DesignResult | None:
        """Return the design of that name, or None."""
        return next((design for design in self.designs if design.name == name), None)

    def overall(self, design: str, metric: str) -> Comparison | None:
        """Return a design's comparison over all tasks of a metric, or None if it has none."""
        found = self.design(design)
        result = found.metrics.get(metric) if found else None
        return result.overall if result else None


def parse_results(results: Mapping[str, Any]) -> Results:
    """Check the content of a ``results.json`` and return it as typed records.

    Parameters
    ----------
    results
        The decoded JSON object.

    Raises
    ------
    StoreError
        If it was written under another schema version or a field is missing or wrong; names the
        field.
    """
    if not isinstance(results, Mapping):
        raise StoreError(f"results must be a JSON object, got {type(results).__name__}")
    version = results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"results have schema_version {version!r}; this version of bakeoff reads "
            f"{SCHEMA_VERSION}: run the study again or use the bakeoff that wrote them"
        )
    try:
        return Results.model_validate(results)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise StoreError(f"results: {where}: {first['msg']}{more}") from error


def read_results(path: str | Path) -> Results:
    """Read and check a ``results.json``.

    Raises
    ------
    StoreError
        If there is no such file, it is not JSON, or it does not follow the schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as results: {error}") from error
    return parse_results(content)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of ``results.json``."""
    schema = Results.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
