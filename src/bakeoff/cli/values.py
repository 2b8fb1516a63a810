"""Values as they are typed on a command line."""

from __future__ import annotations

import json
from typing import Any


def json_or_text(text: str) -> Any:
    """Return what a text means: a number, a truth value, a list ... in JSON's or Python's words.

    Examples
    --------
    >>> json_or_text("3"), json_or_text("False"), json_or_text("cpu")
    (3, False, 'cpu')
    """
    words = {"True": "true", "False": "false", "None": "null"}
    try:
        return json.loads(words.get(text, text))
    except ValueError:
        return text
