"""The winner leaves: a decoding method's settings as a folder that `bakeoff generate` takes up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bakeoff._files import write_text
from bakeoff.errors import DataError

SETTINGS = "decoder.json"
"""Name of the file that says which method it is."""


@dataclass(frozen=True)
class Settings:
    """A decoding method, ready to use.

    Parameters
    ----------
    name, method, params
        Of the design.
    model
        The language model: packaged name, folder or hub id; a path relative to the folder if it
        begins with ``./``.
    extra
        What else the method needs, JSON-able: a grammar, a second model, file names.
    """

    name: str
    method: str
    params: Mapping[str, Any]
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)


def save_settings(
    destination: Path, settings: Settings, *, usage: Sequence[str], reason: str = ""
) -> None:
    """Write ``decoder.json`` and a README with lines that use it.

    Parameters
    ----------
    destination
        The folder; files of these names in it are replaced.
    settings
        The method.
    usage
        Lines of Python.
    reason
        Why this design won.
    """
    destination.mkdir(parents=True, exist_ok=True)
    facts = json.dumps({"format": 1, **asdict(settings)}, indent=1, ensure_ascii=False)
    write_text(destination / SETTINGS, facts + "\n")
    code = "\n".join(usage)
    write_text(
        destination / "README.md",
        f"# {settings.name}\n\n{reason}\n\n```python\n{code}\n```\n\n"
        f"`{SETTINGS}` holds the settings: `bakeoff generate --from FOLDER` uses them.\n",
    )


def load_settings(folder: Path) -> Settings:
    """Read what `save_settings` wrote.

    Raises
    ------
    DataError
        If the folder has no such file, or it is not of this format.
    """
    path = Path(folder) / SETTINGS
    try:
        facts = json.loads(path.read_text("utf-8"))
        if facts.pop("format") != 1:
            raise DataError(f"{path} was written by a newer version of bakeoff")
        return Settings(**facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} holds no decoding settings: {error}") from error
