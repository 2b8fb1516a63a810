"""Prompts to be answered, with what may come with them: what decoding is tried out on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from bakeoff.data.formats import PathLike, Table, count, listed, read_table
from bakeoff.data.splits import position
from bakeoff.errors import DataError

ROLES = ("prompt", "answers", "options", "passages", "document")
"""What a column may be to a prompt."""

# By role, what columns are usually called; the first that is there is taken.
_USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "instruction", "input", "text"),
    "answers": ("answers", "answer", "response", "output", "completion", "target", "reference"),
    "options": ("options", "choices"),
    "passages": ("passages", "contexts", "evidence"),
    "document": ("document", "context", "article"),
}
_LISTS = ("answers", "options", "passages")


@dataclass(frozen=True)
class Prompt:
    """One thing to answer.

    Parameters
    ----------
    text
        What is asked.
    answers
        Accepted answers, any of which is right; empty where nobody knows.
    options
        What to choose from, if it is a choice; in no particular order.
    passages
        Texts to answer with the help of, in the order in which they came.
    document
        A long text that is read first.

    Raises
    ------
    DataError
        If `text` is blank, a list holds a blank, or no option is an accepted answer.

    Examples
    --------
    >>> Prompt("Capital of France?", answers=("Paris",), options=("Lyon", "Paris")).answers
    ('Paris',)
    """

    text: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    document: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise DataError("prompt must not be blank")
        for role in _LISTS:
            object.__setattr__(self, role, tuple(getattr(self, role)))
            if not all(value.strip() for value in getattr(self, role)):
                raise DataError(f"{role} must not hold a blank text")
        if self.options and self.answers and not set(self.options) & set(self.answers):
            raise DataError(
                f"no accepted answer ({listed(self.answers)}) is among the options "
                f"({listed(self.options)})"
            )
        if len(set(self.options)) < len(self.options):
            raise DataError(f"options must differ, got {listed(self.options)}")


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 of prompts and their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for prompt in prompts:
        line = json.dumps(astuple(prompt), ensure_ascii=False) + "\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_prompts(
    paths: Sequence[PathLike],
    *,
    columns: Mapping[str, str] | None = None,
    max_prompts: int | None = None,
    seed: int = 0,
) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Read prompts from files.

    Parameters
    ----------
    paths
        Files of the formats that `bakeoff.data.formats.read_table` reads. A cell of answers,
        options or passages is a list; in CSV and TSV a JSON array, or one text.
    columns
        Column name by role (see `ROLES`), for names that are not guessed.
    max_prompts
        At most so many, drawn by their content.
    seed
        Of that draw.

    Returns
    -------
    prompts : tuple of Prompt
    notes : tuple of str
        Sentences about what was left out.

    Raises
    ------
    DataError
        If a file cannot be read, no column is the prompt, a cell is not what its role wants, or
        nothing is left; names the file, the row and the columns.
    """
    if not paths:
        raise DataError("give at least one file of prompts")
    if max_prompts is not None and max_prompts < 1:
        raise DataError(f"max_prompts must be at least 1, got {max_prompts}")
    unknown = sorted(set(columns or {}) - set(ROLES))
    if unknown:
        raise DataError(f"columns: there is no role {unknown[0]!r}; there are: {', '.join(ROLES)}")
    notes: list[str] = []
    found: dict[Prompt, None] = {}
    for path in map(Path, paths):
        table = read_table(path)
        roles = _roles(table, columns or {}, path)
        blank = twice = 0
        for row, place in enumerate(table.places):
            cells = {role: table.columns[name][row] for role, name in roles.items()}
            if not isinstance(cells["prompt"], str) or not cells["prompt"].strip():
                blank += 1
                continue
            prompt = _prompt(cells, f"{path}, {place}")
            twice += prompt in found
            found[prompt] = None
        for number, what in ((blank, "without a prompt"), (twice, "seen before")):
            if number:
                notes.append(f"{path.name}: {count(number, 'row')} left out: {what}.")
    prompts = tuple(found)
    if not prompts:
        raise DataError(f"{listed(map(str, paths))}: no row has a prompt")
    if max_prompts is not None and len(prompts) > max_prompts:
        drawn = set(sorted(prompts, key=lambda p: position(repr(astuple(p)), seed))[:max_prompts])
        notes.append(f"{max_prompts:,} of {len(prompts):,} prompts drawn by their content.")
        prompts = tuple(prompt for prompt in prompts if prompt in drawn)
    return prompts, tuple(notes)


def _roles(table: Table, given: Mapping[str, str], path: Path) -> dict[str, str]:
    for role, name in given.items():
        if name not in table.columns:
            raise DataError(
                f"{role}: there is no column {name!r} in {path}; there are: {listed(table.columns)}"
            )
    plain = {name.casefold(): name for name in reversed(list(table.columns))}
    roles = dict(given)
    for role in ROLES:
        taken = set(roles.values())
        usual = [plain[name] for name in _USUAL_NAMES[role] if name in plain]
        guess = next((name for name in usual if name not in taken), None)
        if guess is not None:
            roles.setdefault(role, guess)
    if "prompt" not in roles:
        raise DataError(
            f"{path}: no column has a usual name for a prompt; name one (--column prompt=NAME). "
            f"There are: {listed(table.columns)}"
        )
    return roles


def _prompt(cells: Mapping[str, object], place: str) -> Prompt:
    values: dict[str, tuple[str, ...]] = {
        role: _texts(cells.get(role), role, place) for role in _LISTS
    }
    document = cells.get("document")
    if document is not None and not isinstance(document, str):
        raise DataError(f"{place}: document must be text, got {type(document).__name__}")
    try:
        return Prompt(str(cells["prompt"]), document=document or "", **values)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _texts(cell: object, role: str, place: str) -> tuple[str, ...]:
    """Return the texts of a cell: a list, a JSON array in a text, or one text."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:  # a text that happens to begin with a bracket
            cell = [cell]
    if cell is None or cell == "":
        return ()
    many = list(cell) if isinstance(cell, Iterable) and not isinstance(cell, str | dict) else [cell]
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in many]
    if not all(isinstance(v, str) or number for v, number in zip(many, numbers, strict=True)):
        raise DataError(f"{place}: {role} must be a text or a list of texts, got {cell!r}")
    return tuple(str(value) for value in many)
