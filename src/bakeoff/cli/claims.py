"""`bakeoff claim` and `bakeoff claims`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from bakeoff.claims.claim import (
    Size,
    claim_slugs,
    load_claims,
    recorded_results,
    run_claim,
    save_result,
)
from bakeoff.claims.ledger import ledger_rows

EXIT_CODE = {"holds": 0, "fails": 5, "undecided": 6}


def claim(
    slug: str, *, size: Size, out: Path | None, workers: int, record: bool, as_json: bool
) -> None:
    """Run one slug's claims, print verdicts, leave with the central verdict's exit code."""
    from bakeoff.study.terminal import LiveProgress

    load_claims(slug)
    directory = out or Path("bakeoff-runs") / f"claim-{slug}-{size}"
    with LiveProgress() as progress:
        result = run_claim(slug, size, directory=directory, workers=workers, progress=progress)
    if record:
        save_result(result)
    if as_json:
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        for item in result["claims"]:
            typer.echo(f"\n{item['verdict'].upper()}: {item['statement']}\n  ({item['source']})")
            for row in item["evidence"]:
                low, high = row["interval"]
                typer.echo(
                    f"  {item['treatment']} against {row['reference']} on {row['metric']}: "
                    f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}], "
                    f"p {row['p_holm']:.2g}: {row['verdict']}"
                )
        typer.echo(f"\nreport: {directory / 'report.html'}")
    raise typer.Exit(EXIT_CODE[result["verdict"]])


def claims(*, as_json: bool) -> None:
    """List claims with recorded verdicts; claims without a recorded result are shown as such."""
    rows = ledger_rows(recorded_results())
    known = {(row["method"], row["claim"]) for row in rows}
    for slug in claim_slugs():
        for item in load_claims(slug)[0]:
            if (slug, item.statement) not in known:
                rows.append(
                    {
                        "method": slug,
                        "claim": item.statement,
                        "verdict": "not recorded",
                        "effect": "",
                        "size": "",
                        "seeds": "",
                        "date": "",
                    }
                )
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row['method']}: {row['verdict'].upper()}\n  {row['claim']}")
        if row["effect"]:
            typer.echo(f"  {row['effect']}  ({row['size']}, {row['seeds']} seeds, {row['date']})")
