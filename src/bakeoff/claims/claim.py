"""What a claim is, how it is judged, and where its result is kept.

A claim file is ``claims/<slug with underscores>.py`` and defines

- ``CLAIMS``: a tuple of `Claim`; the first is the paper's central one;
- ``study(size, directory, workers)``: a `bakeoff.study.Study` ready to run.

It imports nothing heavy at module level, so that listing claims is instant.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bakeoff._files import write_text
from bakeoff.errors import BakeoffError

if TYPE_CHECKING:
    from bakeoff.study import Study

Size = Literal["smoke", "laptop", "full"]
Verdict = Literal["holds", "fails", "undecided"]
SIZES: tuple[Size, ...] = ("smoke", "laptop", "full")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, as a comparison that can be run.

    Parameters
    ----------
    name
        Unique within its file, e.g. ``"central"``.
    statement
        What the paper says, in one sentence of our own.
    source
        Where: paper, table or section.
    figure
        The paper's own number, or None where it could not be checked.
    treatment
        Name of the design that the claim is about.
    references
        Names of the designs that it is claimed to beat (all of them).
    metrics
        Metrics on which; all of them.
    expected
        ``"better"``: the treatment beats every reference. ``"not better"``: it beats none.
    """

    name: str
    statement: str
    source: str
    figure: str | None
    treatment: str
    references: tuple[str, ...]
    metrics: tuple[str, ...]
    expected: Literal["better", "not better"] = "better"


@dataclass(frozen=True)
class Evidence:
    """One treatment-reference comparison on one metric."""

    reference: str
    metric: str
    difference: float
    interval: tuple[float, float]
    p_holm: float
    verdict: str


def judge(claim: Claim, evidence: list[Evidence]) -> Verdict:
    """Return the verdict of a claim from its comparisons.

    A claim of superiority *holds* if every comparison is better, *fails* if any is worse or
    equivalent (practically the same), and is otherwise *undecided*. A claim of no superiority
    *holds* if every comparison is worse or equivalent, *fails* if any is better, else *undecided*.

    Examples
    --------
    >>> claim = Claim("c", "s", "p", None, "new", ("old",), ("score",))
    >>> judge(claim, [Evidence("old", "score", 0.1, (0.05, 0.15), 0.001, "better")])
    'holds'
    """
    verdicts = {item.verdict for item in evidence}
    refuting = {"worse", "equivalent"} if claim.expected == "better" else {"better"}
    supporting = {"better"} if claim.expected == "better" else {"worse", "equivalent"}
    if verdicts & refuting:
        return "fails"
    return "holds" if verdicts and verdicts <= supporting else "undecided"


def claim_slugs() -> list[str]:
    """Return the slugs of all methods that carry claims, sorted."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(
        path.stem.replace("_", "-") for path in files if "\nCLAIMS = " in path.read_text("utf-8")
    )


def load_claims(slug: str) -> tuple[tuple[Claim, ...], Callable[..., Study]]:
    """Return a slug's claims and the function that builds their study.

    Raises
    ------
    BakeoffError
        If no such claim exists; lists those that do.
    """
    if slug not in claim_slugs():
        raise BakeoffError(f"no claim named {slug!r}; there are: {', '.join(claim_slugs())}")
    module = importlib.import_module(f"bakeoff.claims.{slug.replace('-', '_')}")
    return module.CLAIMS, module.study


def run_claim(
    slug: str,
    size: Size = "laptop",
    *,
    directory: Path,
    workers: int = 1,
    progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Run a slug's study and judge its claims.

    Parameters
    ----------
    slug
        A method's slug.
    size
        ``"smoke"`` (seconds), ``"laptop"`` (minutes on 2 cores) or ``"full"``.
    directory
        Where the study keeps its trials; a second run resumes there.
    workers
        Processes that run trials.
    progress
        Called with the study's events.

    Returns
    -------
    dict
        JSON-able: slug, size, verdict (of the first claim), one entry per claim with its
        evidence, seeds, environment, date and the study's facts.
    """
    if size not in SIZES:
        raise BakeoffError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    claims, build = load_claims(slug)
    study = build(size, directory, workers)
    results = study.run(progress)
    judged = []
    for claim in claims:
        evidence = _evidence(claim, results.unit_scores, study.problem.metrics, study.alpha)
        judged.append(
            {
                **asdict(claim),
                "verdict": judge(claim, evidence),
                "evidence": [asdict(item) for item in evidence],
            }
        )
    data = results.data
    return {
        "schema_version": 1,
        "slug": slug,
        "size": size,
        "verdict": judged[0]["verdict"],
        "claims": judged,
        "date": datetime.now(UTC).date().isoformat(),
        "seeds": data["study"]["seeds"],
        "wall_seconds": data["study"]["wall_seconds"],
        "problem": data["problem"]["description"],
        "means": {
            design["name"]: {
                metric: values["overall"]["mean"] for metric, values in design["metrics"].items()
            }
            for design in data["designs"]
        },
        "failures": [
            {key: failure[key] for key in ("design", "seed", "error")}
            for failure in data["failures"]
        ],
        "environment": data["environment"],
        "command": f"bakeoff claim {slug} --size {size}",
    }


def _evidence(
    claim: Claim, scores: Mapping[str, Any], metrics: Mapping[str, Any], alpha: float
) -> list[Evidence]:
    from bakeoff.study import compare

    found: list[Evidence] = []
    known = scores[claim.metrics[0]] if claim.metrics else {}
    if not {claim.treatment, *claim.references} <= set(known):
        return found  # a design that cannot run at this size: nothing measured, nothing decided
    for metric in claim.metrics:
        for reference in claim.references:
            # One comparison per pair, each at its own level: a conjunction needs no correction.
            pair = {name: scores[metric][name] for name in (reference, claim.treatment)}
            record = compare(
                pair,
                reference,
                margin=metrics[metric].margin,
                alpha=alpha,
                higher_is_better=metrics[metric].higher_is_better,
            )[claim.treatment].overall
            found.append(
                Evidence(
                    reference,
                    metric,
                    record.difference,
                    record.interval,
                    record.p_holm,
                    record.verdict,
                )
            )
    return found


def save_result(result: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write a result as ``<slug>.json`` (``<slug>.full.json`` for the full size), atomically."""
    suffix = "" if result["size"] == "laptop" else f".{result['size']}"
    path = directory / f"{result['slug']}{suffix}.json"
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def recorded_results(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """Return all recorded results, sorted by slug."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(directory.glob("*.json"))]
