"""The ledger: every recorded claim in one table, generated from the result files only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def ledger_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row of text per claim: method, claim, verdict, effect, size, date."""
    rows = []
    for result in results:
        for claim in result["claims"]:
            rows.append(
                {
                    "method": result["slug"],
                    "claim": claim["statement"],
                    "verdict": claim["verdict"],
                    "effect": "; ".join(_effect(item) for item in claim["evidence"]),
                    "size": result["size"],
                    "seeds": str(len(result["seeds"])),
                    "date": result["date"],
                }
            )
    return rows


def ledger_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the ledger as a Markdown table."""
    lines = [
        "| Method | Claim | Verdict here | Measured: difference [95 % interval] | Size |",
        "|---|---|---|---|---|",
    ]
    for row in ledger_rows(results):
        size = f"{row['size']}, {row['seeds']} seeds, {row['date']}"
        cells = [f"`{row['method']}`", row["claim"], f"**{row['verdict']}**", row["effect"], size]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _effect(item: Mapping[str, Any]) -> str:
    low, high = item["interval"]
    return (
        f"{item['metric']} against {item['reference']}: "
        f"{item['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    )
