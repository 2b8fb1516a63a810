"""Designs: named, hashable descriptions of what is compared, and grids of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Design:
    """One contender: a method and its parameters, under a name that reports use.

    Parameters
    ----------
    name
        Short and unique in a study, e.g. ``"mean + bidirectional"``.
    method
        The method's slug in its family, e.g. ``"latent-attention"``.
    params
        JSON-able keyword arguments. Given as a mapping; kept as canonical JSON so that two designs
        that say the same compare equal and hash alike.

    Examples
    --------
    >>> Design("mean", "mean-pooling", {"attention": "causal"}).params["attention"]
    'causal'
    """

    name: str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        if not self.method or not isinstance(self.method, str):
            raise ValueError(f"method must be a non-empty string, got {self.method!r}")
        try:
            canonical = json.dumps(dict(self.params), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"params of design {self.name!r} must be JSON-able: {error}"
            ) from error
        object.__setattr__(self, "params", _FrozenParams(canonical))

    def to_json(self) -> dict[str, Any]:
        """Return ``{"name", "method", "params"}``, ready for `json.dumps`."""
        return {"name": self.name, "method": self.method, "params": dict(self.params)}


class _FrozenParams(Mapping[str, Any]):
    """A read-only mapping that hashes and compares by its canonical JSON."""

    __slots__ = ("_canonical", "_values")

    def __init__(self, canonical: str) -> None:
        self._canonical = canonical
        self._values: dict[str, Any] = json.loads(canonical)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _FrozenParams):
            return self._canonical == other._canonical
        return isinstance(other, Mapping) and self._values == dict(other)

    def __reduce__(self) -> tuple[type[_FrozenParams], tuple[str]]:
        return (_FrozenParams, (self._canonical,))

    def __repr__(self) -> str:
        return self._canonical


class Designs(Sequence[Design]):
    """A sequence of designs that adds (both) and multiplies (every combination).

    Examples
    --------
    >>> pooling = Designs([Design("mean", "mean-pooling"), Design("last", "last-token")])
    >>> attention = Designs.axis("attention", ["causal", "bidirectional"])
    >>> [design.name for design in pooling * attention]
    ['mean, causal', 'mean, bidirectional', 'last, causal', 'last, bidirectional']
    """

    AXIS = "*"

    def __init__(self, designs: Sequence[Design]) -> None:
        self._designs = tuple(designs)
        names = [design.name for design in self._designs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"designs must have distinct names, got twice: {twice}")

    @classmethod
    def axis(cls, parameter: str, values: Sequence[Any]) -> Designs:
        """Return one parameter's values as a factor for a grid; it has no method of its own."""
        return cls([Design(str(value), cls.AXIS, {parameter: value}) for value in values])

    def __add__(self, other: Designs) -> Designs:
        return Designs([*self, *other])

    def __mul__(self, other: Designs) -> Designs:
        return Designs([_combine(left, right) for left in self for right in other])

    def __getitem__(self, index: Any) -> Any:
        chosen = self._designs[index]
        return Designs(chosen) if isinstance(index, slice) else chosen

    def __len__(self) -> int:
        return len(self._designs)

    def __repr__(self) -> str:
        return f"Designs({list(self._designs)!r})"


def _combine(left: Design, right: Design) -> Design:
    methods = {left.method, right.method} - {Designs.AXIS}
    if len(methods) > 1:
        raise ValueError(
            f"only one factor of a product may name a method, got {left.method!r} and "
            f"{right.method!r}: make the other one with Designs.axis(...)"
        )
    shared = sorted(set(left.params) & set(right.params))
    if shared:
        raise ValueError(f"both factors of a product set {shared}")
    return Design(
        f"{left.name}, {right.name}",
        methods.pop() if methods else Designs.AXIS,
        {**left.params, **right.params},
    )
