"""`bakeoff generate`: answer prompts with a decoding method, and say what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bakeoff._files import write_text
from bakeoff.cli.values import json_or_text
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bakeoff.data.prompts import Prompt
    from bakeoff.decoding.decoders import Answer, Generation, Resources
    from bakeoff.decoding.grammar import Grammar
    from bakeoff.models import LanguageModel

DEFAULT_MODEL = "smollm2-135m"


def generate(
    *,
    method: str | None,
    model: str | None,
    prompts: Sequence[str],
    prompts_file: Sequence[Path],
    columns: Mapping[str, str],
    document: Path | None,
    options: Sequence[str],
    passages: Sequence[str],
    grammar: str | None,
    trie: Path | None,
    large: str | None,
    settings: Path | None,
    params: Mapping[str, str],
    how: Mapping[str, Any],
    out: Path | None,
    as_json: bool,
) -> None:
    """Answer prompts, print or write the answers; see the command's help."""
    from rich.console import Console

    from bakeoff.decoding.decoders import Generation, Resources, check, decoder_kind
    from bakeoff.decoding.decoders import generate as answer_all
    from bakeoff.experts.loading import load_mixture

    console = Console(stderr=True)
    values: dict[str, Any] = {name: json_or_text(text) for name, text in params.items()}
    given_how = {name: value for name, value in how.items() if value is not None}
    winner = _Winner() if settings is None else _from_winner(settings)
    if None not in (method, winner.method) and method != winner.method:
        raise DataError(
            f"--method is {method}, but {settings} holds {winner.method}: leave one out"
        )
    method = method or winner.method or "greedy"
    model = model or winner.model or DEFAULT_MODEL
    large = large or winner.large
    values = {**winner.params, **values}
    given_how = {**winner.how, **given_how}
    decoder_kind(method)  # refuses an unknown name at once
    asked = _prompts(prompts, prompts_file, columns, document, options, passages, console)
    generation = Generation(**given_how)
    read = winner.grammar if grammar is None else read_grammar(grammar)
    resources = {"grammar": read, "trie": trie, "large": large, "rule": winner.rule}
    given = [name for name, value in resources.items() if value is not None]
    check(method, asked, generation, given=given, params=values)
    console.print(f"loading {model}", style="dim", highlight=False)
    loaded = load_mixture(model)
    found = Resources(
        grammar=read,
        trie=_trie(trie),
        large=None if large is None else load_mixture(large),
        rule=winner.rule,
    )
    answers = _answered(answer_all, method, loaded, asked, generation, found, values, console)
    if trie is not None and found.trie is not None:
        found.trie.save(trie)
    _show(asked, answers, method, out, as_json)
    _say_cost(answers, console)


def _answered(
    answer_all: Any,
    method: str,
    model: LanguageModel,
    asked: Sequence[Prompt],
    how: Generation,
    resources: Resources,
    params: Mapping[str, Any],
    console: Console,
) -> list[list[Answer]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=len(asked) < 2) as bar:
        task = bar.add_task("answering", total=len(asked))
        answers: list[list[Answer]] = answer_all(
            method,
            model,
            asked,
            how,
            resources=resources,
            params=params,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return answers


def read_grammar(text: str) -> Grammar:
    """Return the grammar that an option names: a file, or one written out.

    Parameters
    ----------
    text
        A file: JSON schema (``.json``), Lark (``.lark``), GBNF (``.gbnf``), or a regular expression
        (``.regex``). Or ``regex:...``, ``choice:yes|no``, or a JSON schema.

    Raises
    ------
    DataError
        If it is none of these.
    """
    from bakeoff.decoding.grammar import Grammar

    kind, separator, rest = text.partition(":")
    if separator and kind == "regex":
        return Grammar.regex(rest)
    if separator and kind == "choice":
        return Grammar.choice(rest.split("|"))
    if text.lstrip().startswith("{"):
        return Grammar.json_schema(text)
    path = Path(text).expanduser()
    readers: dict[str, Callable[[str], Grammar]] = {
        ".json": Grammar.json_schema,
        ".lark": Grammar.lark,
        ".gbnf": Grammar.gbnf,
        ".regex": lambda content: Grammar.regex(content.rstrip("\r\n")),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(
            f"--grammar {text!r} must be a file ({', '.join(readers)}), regex:PATTERN, "
            "choice:ONE|OTHER, or a JSON schema"
            + ("" if reader is None else "; there is no such file")
        )
    try:
        return reader(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--grammar {path} cannot be read: {error}") from error


def _prompts(
    texts: Sequence[str],
    files: Sequence[Path],
    columns: Mapping[str, str],
    document: Path | None,
    options: Sequence[str],
    passages: Sequence[str],
    console: Console,
) -> list[Prompt]:
    from bakeoff.data.prompts import Prompt, read_prompts

    if bool(texts) == bool(files):
        raise DataError("give --prompt TEXT or --prompts FILE, one of the two")
    if files:
        if options or passages or document:
            raise DataError("--option, --passage and --document go with --prompt, not --prompts")
        found, notes = read_prompts(files, columns=columns)
        for note in notes:
            console.print(f"  {note}", style="dim", highlight=False)
        return list(found)
    content = ""
    if document is not None:
        try:
            content = document.expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--document {document} cannot be read: {error}") from error
    return [
        Prompt(text, options=tuple(options), passages=tuple(passages), document=content)
        for text in texts
    ]


def _trie(path: Path | None) -> Any:
    if path is None:
        return None
    from bakeoff.decoding.alignment_trie import AlignmentTrie

    return AlignmentTrie.load(path) if path.exists() else AlignmentTrie()


@dataclass(frozen=True)
class _Winner:
    """What a winner's folder settles."""

    method: str | None = None
    model: str | None = None
    large: str | None = None
    rule: Path | None = None
    grammar: Grammar | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)


def _from_winner(folder: Path) -> _Winner:
    from bakeoff.decoding.decoders import DECODERS
    from bakeoff.decoding.winner import load_settings

    found = load_settings(folder)

    def resolved(name: Any) -> str | None:
        # A model that was trained in the study lies in the winner's folder.
        return str(folder / name) if isinstance(name, str) and name.startswith("./") else name

    how = {
        name: found.extra[name]
        for name in ("max_new_tokens", "chat", "temperature", "top_k", "top_p")
        if name in found.extra
    }
    model = resolved(found.model)
    if "cascade" in found.extra:
        rule = folder / str(found.extra["cascade"])
        large = resolved(found.extra.get("large"))
        return _Winner("cascade", model, large, rule, how=how)
    alone = {"small-only": "greedy", "large-only": "greedy", "unconstrained": "sample"}
    method = alone.get(found.method, found.method)
    if method not in DECODERS:
        raise DataError(
            f"{folder} holds {found.method}, which bakeoff generate does not run; README.md there "
            "says how to use it"
        )
    grammar = _common_grammar(found.extra) if "grammar" in DECODERS[method].needs else None
    return _Winner(method, model, grammar=grammar, params=found.params, how=how)


def _common_grammar(extra: Mapping[str, Any]) -> Grammar | None:
    """Return the grammar of all prompts of the study, if it was one."""
    from bakeoff.decoding.grammar import Grammar

    grammars = [row["grammar"] for row in extra.get("prompts", ())]
    if not grammars or any(grammar != grammars[0] for grammar in grammars):
        return None
    return Grammar(**grammars[0])


def _show(
    asked: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
    method: str,
    out: Path | None,
    as_json: bool,
) -> None:
    records = [
        {"prompt": prompt.text, "method": method, **asdict(answer)}
        for prompt, found in zip(asked, answers, strict=True)
        for answer in found
    ]
    if out is not None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "".join(lines))
    if as_json:
        typer.echo(json.dumps(records, indent=1, ensure_ascii=False))
    elif out is None:
        for record in records:
            typer.echo(record["text"])
    else:
        typer.echo(f"{len(records):,} answers in {out}")


def _say_cost(answers: Sequence[Sequence[Answer]], console: Console) -> None:
    """Print one line: how many, how fast, how likely."""
    every = [answer for found in answers for answer in found]
    seconds = sum(answer.seconds for answer in every)
    tokens = sum(answer.n_tokens or 0 for answer in every)
    parts = [f"{len(every):,} {'answer' if len(every) == 1 else 'answers'} in {seconds:.2f} s"]
    if tokens:
        parts.append(f"{tokens:,} tokens")
    first = [a.seconds_to_first_token for a in every if a.seconds_to_first_token is not None]
    if first:
        parts.append(f"{1000 * sum(first) / len(first):.0f} ms to the first token")
    known = [answer.log_prob for answer in every if answer.log_prob is not None]
    if known:
        parts.append(f"log-probability {sum(known) / len(known):.2f} nats")
    console.print("; ".join(parts), style="dim", highlight=False)
