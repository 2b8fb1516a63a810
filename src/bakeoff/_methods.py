"""What methods there are, found without importing them.

A method declares itself with a literal in its own file::

    METHOD = {
        "slug": "nv-embed",
        "title": "Latent-attention pooling ...",
        "paper": "Lee et al., NV-Embed ..., ICLR 2025, arXiv 2405.17428",
        "designs": ["latent-attention"],
        "names": ["LatentAttentionPooling", ...],
    }

The files are parsed, not run, so that listing methods costs milliseconds and no torch.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """One published method as the shelf shows it."""

    slug: str
    title: str
    paper: str
    family: str
    designs: tuple[str, ...]
    names: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def find_methods(package: Path | None = None) -> list[Method]:
    """Return every method that declares itself in a family's folder, sorted by family and slug.

    Raises
    ------
    ValueError
        If two files declare one slug, or a declaration is not a literal with the five keys.
    """
    package = package or Path(__file__).parent
    found: dict[str, Method] = {}
    for path in sorted(package.glob("*/*.py")):
        declared = _declaration(path)
        if declared is None:
            continue
        try:
            method = Method(
                slug=declared["slug"],
                title=declared["title"],
                paper=declared["paper"],
                family=path.parent.name,
                designs=tuple(declared["designs"]),
                names=tuple(declared["names"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path.name}: METHOD must be a dict with slug, title, paper, designs, names "
                f"({type(error).__name__}: {error})"
            ) from error
        if method.slug in found:
            raise ValueError(f"{path.name}: the slug {method.slug!r} is declared twice")
        found[method.slug] = method
    return sorted(found.values(), key=lambda method: (method.family, method.slug))


def _declaration(path: Path) -> dict[str, Any] | None:
    text = path.read_text(encoding="utf-8")
    if "\nMETHOD = " not in text:
        return None
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "METHOD" for target in node.targets
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError as error:
                raise ValueError(f"{path.name}: METHOD must be a literal dict") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path.name}: METHOD must be a dict, got {type(value).__name__}")
            return value
    return None
