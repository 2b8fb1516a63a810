"""What the problems of this family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bakeoff.decoding.token_clock import TokenClock
from bakeoff.errors import DataError

__all__ = ["TokenClock", "check_prompts"]


def check_prompts(prompts: Sequence[Any], least: int, question: str) -> None:
    """Raise `DataError` if there are fewer prompts than a comparison needs."""
    if len(prompts) < least:
        raise DataError(
            f"prompts must hold at least {least} to compare {question}, got {len(prompts)}"
        )
