"""The winner leaves: picks as a folder with a Parquet file and a README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bakeoff._files import atomic_path, write_text


def save_picks(
    destination: Path,
    design: Mapping[str, Any],
    tables: Sequence[tuple[str, Sequence[tuple[int, str]]]],
    reason: str,
) -> None:
    """Write picks as a folder with ``picks.parquet`` and a README.

    Parameters
    ----------
    destination
        The folder; files of these names in it are replaced.
    design
        What picked: ``name``, ``method`` and ``params``.
    tables
        Per data set its name and, in pick order, row numbers and texts.
    reason
        Why this design.
    """
    import pyarrow
    import pyarrow.parquet

    destination.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {"task": [], "pick": [], "row": [], "text": []}
    for task, picks in tables:
        for place, (row, text) in enumerate(picks, start=1):
            for name, value in zip(columns, (task, place, row, text), strict=True):
                columns[name].append(value)
    with atomic_path(destination / "picks.parquet") as path:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    facts = json.dumps({"design": dict(design), "reason": reason}, indent=1)
    write_text(
        destination / "README.md",
        f"# Picks by {design['name']}\n\n`picks.parquet` has one row per pick, in pick order: data "
        "set, number of the pick, number of the row among those that could be picked, text. Pick "
        f"from other data the same way with `bakeoff select --method {design['method']}`.\n\n"
        f"```json\n{facts}\n```\n",
    )
