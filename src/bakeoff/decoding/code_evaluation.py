"""Evaluate infilling on Python functions: exact match, does it compile, does it pass its doctest.

The functions are those of the running Python's standard library. They are read, never imported;
what a model wrote runs in a process of its own alone, with limits: see `Sandbox`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.embedded import standard_library_pairs
from bakeoff.data.splits import normalise, runs
from bakeoff.errors import DataError

Status = Literal["passed", "failed", "error", "timeout", "memory", "forbidden", "crashed"]
Kind = Literal["line", "lines", "span"]
Progress = Callable[[int, int], None]

DOCTEST_PACKAGES = ("_pydecimal", "collections", "difflib", "fractions", "heapq", "statistics")
"""Modules of the standard library whose functions ship doctests that say whether they work."""

_RUNNER = Path(__file__).with_name("_sandboxed.py")
_REPORT_BYTES = 64 * 1024
# A run of this many words shared with a held-out function is a copy, not an idiom.
_COPIED_WORDS = 24


# The sandbox --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SandboxResult:
    """What came of running some code.

    Parameters
    ----------
    status
        ``"passed"``; ``"failed"``, an example gave another result; ``"error"``, the code does not
        compile or raises, or exits; ``"timeout"``; ``"memory"``; ``"forbidden"``, it tried to
        write outside its folder, reach the network or start a process; ``"crashed"``.
    detail
        The first failure.
    seconds
        Wall time, the start of the process included.
    n_examples
        Doctest examples that were run.
    protections
        What was in force; none where the process did not live to tell.
    """

    status: Status
    detail: str = ""
    seconds: float = 0.0
    n_examples: int = 0
    protections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sandbox:
    r"""Runs untrusted Python in a process of its own, in an empty folder, with limits.

    Everywhere: a clock; an audit hook that refuses writing outside the folder, sockets, other
    processes and native libraries; an empty environment, the standard library alone. On POSIX:
    limits on memory, processor time and file size. On Linux, where the kernel lets an ordinary
    process have them: no network and no other processes in sight, and everything but the folder
    unwritable. The folder is deleted afterwards.

    Parameters
    ----------
    timeout
        Seconds of processor time, so that a busy machine does not change who passes.
    patience
        Wall time is bounded by so many times `timeout`, for code that sleeps, and where there is
        no limit on processor time (Windows).
    memory_mb
        Most address space, in MiB; macOS does not enforce it.
    file_mb
        Largest file, in MiB.
    isolate
        Whether to use the Linux kernel's namespaces and Landlock where they are to be had.

    Notes
    -----
    This is made for what language models write: endless loops, too much memory, a stray file. It
    reads files freely, and is no defence against somebody who means harm: run that in a virtual
    machine.

    Examples
    --------
    >>> Sandbox().run("def double(x):\n    return 2 * x", examples=">>> double(4)\n8").status
    'passed'
    >>> Sandbox(timeout=1).run("while True: pass").status
    'timeout'
    """

    timeout: float = 5.0
    patience: float = 6.0
    memory_mb: int = 512
    file_mb: int = 1
    isolate: bool = True

    def __post_init__(self) -> None:
        for name in ("timeout", "patience", "memory_mb", "file_mb"):
            if getattr(self, name) <= 0:
                raise DataError(f"{name} must be above 0, got {getattr(self, name)}")

    def run(
        self,
        source: str,
        *,
        examples: str | None = None,
        module: str = "candidate",
        path: Sequence[str] | None = None,
    ) -> SandboxResult:
        """Run a module, then the doctest examples in a text, with the module's names.

        Parameters
        ----------
        source
            The module's source.
        examples
            A docstring with examples; None to run the module alone.
        module
            The name it takes, so that it can stand in for one of the library.
        path
            Where its submodules lie, if it is a package.

        Returns
        -------
        SandboxResult
        """
        token = secrets.token_hex(16)
        limit = self.timeout * self.patience
        request = {
            "source": source,
            "examples": examples,
            "module": module,
            "package": path is not None,
            "path": list(path or ()),
            "memory_bytes": self.memory_mb * 2**20,
            "file_bytes": self.file_mb * 2**20,
            "cpu_seconds": math.ceil(self.timeout),
            "isolate": self.isolate,
            "token": token,
        }
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as report,
        ):
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_RUNNER)],
                stdin=subprocess.PIPE,
                stdout=report,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )
            timed_out = False
            try:
                process.communicate(json.dumps(request).encode(), timeout=limit)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                if process.poll() is None:
                    _kill(process)
            seconds = time.perf_counter() - start
            report.seek(0)
            answer = _answer(report.read(_REPORT_BYTES), token)
        if timed_out:
            return SandboxResult("timeout", f"more than {limit} s of wall time", seconds)
        if answer is None:
            code = process.returncode
            # Code that ignores the signal for too much processor time is killed a second later.
            late = code == -getattr(signal, "SIGKILL", 0) and seconds > math.ceil(self.timeout)
            if late or code == -getattr(signal, "SIGXCPU", 0):
                detail = f"more than {math.ceil(self.timeout)} s of processor time"
                return SandboxResult("timeout", detail, seconds)
            return SandboxResult("crashed", f"exit code {code}", seconds)
        return SandboxResult(
            answer["status"],
            answer["detail"],
            seconds,
            int(answer["n_examples"]),
            tuple(answer["protections"]),
        )


def _environment(folder: str) -> dict[str, str]:
    kept = {"SYSTEMROOT": os.environ["SYSTEMROOT"]} if "SYSTEMROOT" in os.environ else {}
    fixed = {"HOME": folder, "TMPDIR": folder, "TEMP": folder, "TMP": folder}
    return {**kept, **fixed, "LC_ALL": "C.UTF-8", "PATH": "", "TZ": "UTC"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _answer(report: bytes, token: str) -> dict[str, Any] | None:
    """Return the report if it is one: code that ends the process early leaves none."""
    try:
        answer = json.loads(report)
    except ValueError:
        return None
    if not isinstance(answer, dict) or answer.get("token") != token:
        return None
    return answer


def compiles(source: str) -> bool:
    r"""Tell whether Python would compile a function, which may be indented as in its class.

    Nothing is run.

    Examples
    --------
    >>> compiles("    def f(self):\n        return 1"), compiles("def f(:")
    (True, False)
    """
    if source[:1] in (" ", "\t"):
        source = f"class _:\n{source}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<candidate>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


# Functions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PythonFunction:
    """A function or method of the standard library, as it is written there.

    Parameters
    ----------
    package
        Top-level package or module.
    module
        Path of its file in the library, with slashes.
    name
        Qualified name, e.g. ``"Fraction.limit_denominator"``.
    source
        Its lines, decorators and indentation included, with the last line's end.
    body
        Character in `source` where its first statement's line begins; the docstring lies before.
    start
        Character in the file where `source` begins.
    docstring
        The docstring, or None.
    """

    package: str
    module: str
    name: str
    source: str
    body: int
    start: int
    docstring: str | None

    @property
    def has_examples(self) -> bool:
        """Whether its docstring holds doctest examples."""
        return self.docstring is not None and ">>>" in self.docstring


def standard_library_functions(
    packages: Iterable[str] | None = None,
    *,
    with_examples: bool = False,
    max_characters: int | None = None,
) -> tuple[PythonFunction, ...]:
    """Return functions of the running Python's standard library, in fixed order.

    Kept are functions at the top of a module and methods of its classes whose body is on lines of
    its own and compiles by itself; of equal sources only the first.

    Parameters
    ----------
    packages
        Top-level packages and modules; None for all those of `standard_library_pairs`.
    with_examples
        Whether to keep only functions with doctest examples.
    max_characters
        Longest source.

    Raises
    ------
    DataError
        If the library has no source here, or a package is none of its own.
    """
    wanted = {p.package for p in standard_library_pairs()} if packages is None else set(packages)
    found: dict[str, PythonFunction] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for package in sorted(wanted):
        folder = root / package
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{package}.py"]
        if package not in sys.stdlib_module_names or not all(path.is_file() for path in files):
            raise DataError(f"packages: {package!r} is no Python package of the standard library")
        for path in files:
            if {"test", "tests", "idle_test"} & set(path.relative_to(root).parts):
                continue
            module = path.relative_to(root).as_posix()
            for function in _functions(_source(module), package, module):
                if with_examples and not function.has_examples:
                    continue
                if max_characters is not None and len(function.source) > max_characters:
                    continue
                if compiles(function.source):
                    found.setdefault(normalise(function.source), function)
    return tuple(found.values())


def python_functions(text: str, *, module: str = "") -> tuple[PythonFunction, ...]:
    r"""Return the functions in a text, in order; none if the text is not Python.

    Parameters
    ----------
    text
        A module, or a function, which may be indented as in its class.
    module
        A name for it.

    Examples
    --------
    >>> [f.name for f in python_functions("class A:\n    def f(self):\n        return 1\n")]
    ['A.f']
    """
    if text[:1] in (" ", "\t"):
        text = f"class _:\n{text}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tuple(_functions(text, "", module))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    return tuple(function for function in found if compiles(function.source))


@lru_cache(maxsize=64)
def _source(module: str) -> str:
    with tokenize.open(Path(sysconfig.get_path("stdlib")) / module) as stream:
        return stream.read()


def _functions(source: str, package: str, module: str) -> Iterator[PythonFunction]:
    lines = source.split("\n")  # as the parser counts: a form feed ends no line
    starts = np.cumsum([0] + [len(line) + 1 for line in lines]).tolist()

    def inside(nodes: Iterable[ast.stmt], path: str) -> Iterator[PythonFunction]:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                yield from inside(node.body, f"{path}{node.name}.")
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node, clean=False)
            statements = node.body[1:] if docstring is not None else node.body
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if not statements:
                continue
            # The line where the body begins; a decorated function begins with its decorators.
            opening = statements[0]
            decorators = getattr(opening, "decorator_list", [])
            before = min([opening.lineno, *(d.lineno for d in decorators)]) - 1
            if lines[before][: opening.col_offset].strip():
                continue  # on the line of the signature or of the docstring
            if docstring is not None:
                before = node.body[0].end_lineno or before
            # Comments between the docstring and the first statement belong to the body.
            start, stop = starts[first - 1], starts[node.end_lineno or first]
            body = starts[before] - start
            text = source[start:stop]
            yield PythonFunction(
                package,
                module,
                path + node.name,
                text if text.endswith("\n") else text + "\n",
                body,
                start,
                docstring,
            )

    yield from inside(ast.parse(source).body, "")


def training_texts(
    held_out: Iterable[str] = DOCTEST_PACKAGES,
    *,
    packages: Iterable[str] | None = None,
    max_characters: int | None = None,
) -> tuple[str, ...]:
    """Return the sources of all functions outside the packages held out, copies left out.

    A function is a copy if it shares 24 words in a row with one that is held out.

    Parameters
    ----------
    held_out
        Packages whose functions serve in the evaluation.
    packages
        Where to take functions from; None for all the others.
    max_characters
        Longest source.
    """
    held_out = set(held_out)
    kept_back = standard_library_functions(held_out)
    known = {run for function in kept_back for run in runs(function.source, _COPIED_WORDS)}
    if packages is None:
        packages = {pair.package for pair in standard_library_pairs()}
    others = set(packages) - held_out
    return tuple(
        function.source
        for function in standard_library_functions(others, max_characters=max_characters)
        if known.isdisjoint(runs(function.source, _COPIED_WORDS))
    )


# Problems -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfillProblem:
    """A function with a hole.

    Parameters
    ----------
    function
        The function.
    start, stop
        The hole, in characters of the function's source.
    kind
        How the hole was chosen.
    """

    function: PythonFunction
    start: int
    stop: int
    kind: Kind

    @property
    def name(self) -> str:
        """Module, function and place of the hole."""
        return f"{self.function.module}:{self.function.name}[{self.start}:{self.stop}]"

    @property
    def prefix(self) -> str:
        """The function's source before the hole."""
        return self.function.source[: self.start]

    @property
    def middle(self) -> str:
        """What belongs into the hole."""
        return self.function.source[self.start : self.stop]

    @property
    def suffix(self) -> str:
        """The function's source after the hole."""
        return self.function.source[self.stop :]

    def complete(self, fill: str) -> str:
        """Return the function with `fill` in the hole."""
        return f"{self.prefix}{fill}{self.suffix}"

    def run(self, fill: str, sandbox: Sandbox) -> SandboxResult:
        """Run the function's doctest with `fill` in the hole, in place in its module."""
        function = self.function
        if not function.has_examples:
            raise DataError(f"{self.name} has no doctest examples")
        whole = _source(function.module)
        after = whole[function.start + len(function.source) :]
        parts = function.module.removesuffix(".py").split("/")
        package = parts[-1] == "__init__"
        folder = Path(sysconfig.get_path("stdlib"), *parts[:-1])
        return sandbox.run(
            f"{whole[: function.start]}{self.complete(fill)}{after}",
            examples=function.docstring,
            module=".".join(parts[:-1] if package else parts),
            path=[str(folder)] if package else None,
        )


def infill_problems(
    functions: Sequence[PythonFunction],
    *,
    kind: Kind = "line",
    per_function: int = 1,
    seed: int = 0,
) -> tuple[InfillProblem, ...]:
    """Make holes in the bodies of functions, the docstring left whole.

    Parameters
    ----------
    functions
        The functions.
    kind
        ``"line"``: one line of code, indentation and line end included. ``"lines"``: from one such
        line to another, two at least. ``"span"``: between two random characters.
    per_function
        Most holes of each function; they differ.
    seed
        Of the choice, which depends on the function alone, not on the others.

    Returns
    -------
    tuple of InfillProblem
        Functions too short for a hole of this kind have none.

    Examples
    --------
    >>> functions = standard_library_functions(["heapq"])
    >>> problem = infill_problems(functions, seed=1)[0]
    >>> problem.complete(problem.middle) == problem.function.source
    True
    """
    if kind not in ("line", "lines", "span"):
        raise DataError(f"kind must be 'line', 'lines' or 'span', got {kind!r}")
    if per_function < 1:
        raise DataError(f"per_function must be at least 1, got {per_function}")
    problems: list[InfillProblem] = []
    for function in functions:
        identity = f"{function.module}:{function.name}".encode()
        rng = np.random.default_rng([seed, *identity])
        holes = _holes(function, kind, rng, per_function)
        problems += [InfillProblem(function, start, stop, kind) for start, stop in holes]
    return tuple(problems)


def _holes(
    function: PythonFunction, kind: Kind, rng: np.random.Generator, wanted: int
) -> list[tuple[int, int]]:
    lines = _code_lines(function)
    if kind == "line":
        candidates = lines
    elif kind == "lines":
        candidates = [(a, b) for i, (a, _) in enumerate(lines) for _, b in lines[i + 1 :]]
        # A hole is not the whole body: something is left to go by.
        candidates = [hole for hole in candidates if hole != (lines[0][0], lines[-1][1])]
    else:
        first, last = function.body, len(function.source)
        cuts = np.sort(rng.integers(first, last + 1, size=(wanted, 2)), axis=1).tolist()
        return sorted({(a, b) for a, b in cuts if function.source[a:b].strip()})
    chosen = rng.permutation(len(candidates))[:wanted]
    return sorted(candidates[number] for number in chosen.tolist())


def _code_lines(function: PythonFunction) -> list[tuple[int, int]]:
    """Return where the lines of a body stand that are neither blank nor comments."""
    lines: list[tuple[int, int]] = []
    start = function.body
    for line in function.source[function.body :].split("\n"):
        stop = start + len(line) + 1
        if line.strip() and not line.lstrip().startswith("#"):
            lines.append((start, min(stop, len(function.source))))
        start = stop
    return lines


@dataclass(frozen=True)
class SeveralHoles:
    """A function with several holes at once.

    Parameters
    ----------
    function
        The function.
    spans
        (start, stop) of each hole in characters of its source, from left to right; between two
        holes something is left.
    """

    function: PythonFunction
    spans: tuple[tuple[int, int], ...]

    @property
    def middles(self) -> tuple[str, ...]:
        """What belongs into the holes."""
        return tuple(self.function.source[start:stop] for start, stop in self.spans)

    @property
    def parts(self) -> tuple[str, ...]:
        """The text around the holes, one part more than there are holes."""
        starts = [0, *(stop for _, stop in self.spans)]
        stops = [*(start for start, _ in self.spans), len(self.function.source)]
        return tuple(self.function.source[a:b] for a, b in zip(starts, stops, strict=True))


def several_holes(
    functions: Sequence[PythonFunction], *, n_holes: int = 2, seed: int = 0
) -> tuple[SeveralHoles, ...]:
    """Make several holes of one line each in the bodies of functions.

    A hole is a line with the line end *before* it. A line is left between two holes.

    Parameters
    ----------
    functions
        The functions.
    n_holes
        Holes of each.
    seed
        Of the choice, which depends on the function alone, not on the others.

    Returns
    -------
    tuple of SeveralHoles
        Functions with too few lines have none.

    Examples
    --------
    >>> text = several_holes(standard_library_functions(["heapq"]), n_holes=3)[0]
    >>> len(text.middles), len(text.parts)
    (3, 4)
    """
    if n_holes < 1:
        raise DataError(f"n_holes must be at least 1, got {n_holes}")
    found: list[SeveralHoles] = []
    for function in functions:
        lines = [(a, b) for a, b in _code_lines(function) if a > 0]
        # Choosing k of n - k + 1 and spreading them leaves one between neighbours.
        free = len(lines) - n_holes + 1
        if free < n_holes:
            continue
        rng = np.random.default_rng([seed, *f"{function.module}:{function.name}".encode()])
        chosen = np.sort(rng.choice(free, n_holes, replace=False)) + np.arange(n_holes)
        source = function.source
        spans = (lines[number] for number in chosen.tolist())
        found.append(
            SeveralHoles(
                function,
                tuple((a - 1, b - 1 if source[b - 1] == "\n" else b) for a, b in spans),
            )
        )
    return tuple(found)


def verified_problems(
    problems: Sequence[InfillProblem],
    *,
    sandbox: Sandbox | None = None,
    n_jobs: int = 1,
    progress: Progress | None = None,
) -> tuple[InfillProblem, ...]:
    """Keep the problems whose doctest tells a right fill from a wrong one.

    It has to pass with the true middle, and to fail with ``pass`` in its place and with a
    ``raise``.

    Parameters
    ----------
    problems
        Problems; those without doctest are left out.
    sandbox
        Where they run; ``Sandbox()`` if None.
    n_jobs
        Processes at once.
    progress
        Called with (problems done, problems in total).
    """
    runner = sandbox or Sandbox()
    with_examples = [problem for problem in problems if problem.function.has_examples]

    def tells(problem: InfillProblem) -> bool:
        indentation = problem.middle[: len(problem.middle) - len(problem.middle.lstrip())]
        wrong = [f"{indentation}{text}\n" for text in ("pass", "raise NotImplementedError")]
        return problem.run(problem.middle, runner).status == "passed" and not any(
            problem.run(fill, runner).status == "passed" for fill in wrong
        )

    kept = _in_order(tells, with_examples, n_jobs, progress)
    return tuple(p for p, keep in zip(with_examples, kept, strict=True) if keep)


def _in_order(
    function: Callable[[Any], Any], items: Sequence[Any], n_jobs: int, progress: Progress | None
) -> list[Any]:
    """Apply a function that waits for a process, `n_jobs` at once; results in order."""
    if n_jobs < 1:
        raise DataError(f"n_jobs must be at least 1, got {n_jobs}")
    results: list[Any] = []
    with ThreadPoolExecutor(n_jobs) as pool:
        for result in pool.map(function, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    return results


# The evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InfillReport:
    """How good fills are.

    Parameters
    ----------
    problems, fills
        The problems and what was written, after cutting.
    exact
        bool ``(n,)``: equal to the true middle, white space at its end aside.
    compiled
        bool ``(n,)``: whether Python compiles the completed function.
    statuses
        Outcome of the doctest; None where there is none or it was not run.
    cut
        Whether fills were cut to the true number of lines.
    """

    problems: tuple[InfillProblem, ...]
    fills: tuple[str, ...]
    exact: NDArray[np.bool_]
    compiled: NDArray[np.bool_]
    statuses: tuple[Status | None, ...]
    cut: bool = field(default=False)

    @property
    def exact_match(self) -> float:
        """Share of exact fills."""
        return float(self.exact.mean())

    @property
    def compile_rate(self) -> float:
        """Share of completed functions that compile."""
        return float(self.compiled.mean())

    @property
    def passed(self) -> NDArray[np.float64]:
        """float64 ``(n,)``: 1 if the doctest passed, 0 if not, NaN where it was not run."""
        return np.array([np.nan if s is None else float(s == "passed") for s in self.statuses])

    @property
    def pass_rate(self) -> float:
        """Share of doctests that passed among those that were run; NaN if none was."""
        ran = self.passed[~np.isnan(self.passed)]
        return float(ran.mean()) if len(ran) else float("nan")

    def summary(self) -> dict[str, float | int | bool]:
        """Return the figures, ready for JSON."""
        return {
            "n": len(self.problems),
            "exact_match": self.exact_match,
            "compile_rate": self.compile_rate,
            "n_run": int((~np.isnan(self.passed)).sum()),
            "pass_rate": self.pass_rate,
            "cut": self.cut,
        }


def evaluate_infilling(
    fill: Callable[[Sequence[tuple[str, str]]], Sequence[str]],
    problems: Sequence[InfillProblem],
    *,
    sandbox: Sandbox | None = None,
    run_doctests: bool = True,
    cut_lines: bool = False,
    n_jobs: int = 1,
    progress: Progress | None = None,
) -> InfillReport:
    """Have holes filled, and judge the fills.

    Parameters
    ----------
    fill
        Function from (prefix, suffix) pairs to texts, e.g. ``lambda pairs: [f.text for f in
        infill_batch(model, tokenizer, pairs)]``.
    problems
        The problems; see `verified_problems` for which a doctest is worth running.
    sandbox
        Where doctests run; ``Sandbox()`` if None.
    run_doctests
        Whether to run what the model wrote at all.
    cut_lines
        Whether a fill is cut to as many lines as the true middle has. A model that does not know
        where to stop, such as a plain left-to-right one, gains much by it: compare like with like.
    n_jobs
        Processes at once.
    progress
        Called with (doctests done, doctests in total).

    Returns
    -------
    InfillReport

    Raises
    ------
    DataError
        If there is no problem, or `fill` returns another number of texts.

    Examples
    --------
    >>> problems = infill_problems(standard_library_functions(["heapq"]))
    >>> report = evaluate_infilling(lambda pairs: [""] * len(pairs), problems, run_doctests=False)
    >>> report.exact_match
    0.0
    """
    if not problems:
        raise DataError("problems must hold at least one problem")
    fills = [str(text) for text in fill([(p.prefix, p.suffix) for p in problems])]
    if len(fills) != len(problems):
        raise DataError(f"fill returned {len(fills)} texts for {len(problems)} problems")
    if cut_lines:
        fills = [_cut(text, p.middle) for text, p in zip(fills, problems, strict=True)]
    pairs = list(zip(problems, fills, strict=True))
    compiled = [compiles(problem.complete(text)) for problem, text in pairs]
    runner = sandbox or Sandbox()
    statuses: list[Status | None] = [None] * len(pairs)
    rows = [
        row
        for row, (problem, _) in enumerate(pairs)
        if run_doctests and problem.function.has_examples
    ]

    def judge(row: int) -> Status:
        problem, text = pairs[row]
        return problem.run(text, runner).status if compiled[row] else "error"

    for row, status in zip(rows, _in_order(judge, rows, n_jobs, progress), strict=True):
        statuses[row] = status
    return InfillReport(
        problems=tuple(problems),
        fills=tuple(fills),
        exact=np.array([text.rstrip() == problem.middle.rstrip() for problem, text in pairs]),
        compiled=np.array(compiled),
        statuses=tuple(statuses),
        cut=cut_lines,
    )


def _cut(text: str, middle: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[: max(1, len(middle.splitlines()))])
