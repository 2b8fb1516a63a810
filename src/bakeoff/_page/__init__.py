"""What the pages that bakeoff writes have in common: the style sheet, and how templates are read.

Beneath the rooms that write pages; knows nothing of studies or models.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any


def style() -> str:
    """Return the style sheet: light and dark, wide and narrow, screen and paper."""
    return resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def environment(read: Callable[[str], str]) -> Any:
    """Return a jinja2 environment that escapes everything and refuses undefined names.

    Parameters
    ----------
    read
        Returns the text of a template by its name.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def printable(page: str) -> str:
    """Return a page that can be written in UTF-8.

    Names and texts come from users' files: half of a surrogate pair must not stop the page.

    Examples
    --------
    >>> printable("a" + chr(0xD800))
    'a?'
    """
    return page.encode("utf-8", "replace").decode("utf-8")
