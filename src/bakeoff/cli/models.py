"""`bakeoff pull` and `bakeoff export`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def pull(names: list[str], *, as_json: bool) -> None:
    """Fetch the named models; without names, list what can be fetched."""
    from bakeoff.models import available
    from bakeoff.models import pull as fetch

    for name in names:
        path = fetch(name, progress=lambda message: typer.echo(message, err=True))
        if not as_json:
            typer.echo(f"{name}: {path}")
    if as_json or not names:
        chosen = [model for model in available() if not names or model.name in names]
        if as_json:
            typer.echo(json.dumps([model.to_json() for model in chosen], indent=1))
            return
        for model in chosen:
            state = str(model.path) if model.present else model.command
            typer.echo(f"{model.name:<18} {model.size:>8}  {model.licence:<12} {state}")


def export(winner: Path, *, out: Path | None, as_json: bool) -> None:
    """Export a winner folder to another format."""
    from bakeoff.embedding.winner import export_onnx

    destination = out or winner.parent / f"{winner.name}-onnx"
    difference = export_onnx(winner, destination)
    if as_json:
        typer.echo(json.dumps({"path": str(destination), "max_difference": difference}))
        return
    typer.echo(f"{destination} (largest difference to the winner's vectors {difference:.1e})")
