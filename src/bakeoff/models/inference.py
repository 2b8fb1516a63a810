"""Running a model without training it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off for a while, and leave every module in the mode it was in.

    Parameters
    ----------
    model
        A `torch.nn.Module`.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     print([module.training for module in model])
    [False, False]
    >>> [module.training for module in model]
    [True, False]
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not `train()`, which would reach modules that somebody froze in eval mode.
        for module in training:
            module.training = True
