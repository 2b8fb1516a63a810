"""The sandbox against what it has to stop; problems against the parser and the doctests."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bakeoff.data.splits import runs
from bakeoff.decoding import code_evaluation
from bakeoff.decoding.code_evaluation import (
    DOCTEST_PACKAGES,
    InfillProblem,
    PythonFunction,
    Sandbox,
    compiles,
    evaluate_infilling,
    infill_problems,
    python_functions,
    several_holes,
    standard_library_functions,
    training_texts,
    verified_problems,
)
from bakeoff.errors import DataError

posix = pytest.mark.skipif(sys.platform == "win32", reason="limits are those of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


# The sandbox --------------------------------------------------------------------------------------


def test_a_process_that_behaves():
    result = Sandbox().run("def double(x):\n    return 2 * x", examples=">>> double(4)\n8")
    assert (result.status, result.n_examples) == ("passed", 1)
    assert "audit hook" in result.protections
    wrong = Sandbox().run("def double(x):\n    return x", examples=">>> double(4)\n8")
    assert wrong.status == "failed"
    assert "double(4): expected '8\\n': '4\\n'" in wrong.detail


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("def f(:", "error", "SyntaxError"),
        ("1 / 0", "error", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "error", "SystemExit"),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        ("import os; os._exit(0)", "crashed", "exit code 0"),
        ("def f(n): return f(n + 1)\nf(0)", "error", "RecursionError"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "forbidden", "os.kill"),
        ('print(\'{"status": "passed"}\'); import os; os._exit(0)', "crashed", ""),
        ("import bakeoff", "error", "ModuleNotFoundError"),  # the standard library alone
    ],
)
def test_code_that_ends_badly(source, status, detail):
    result = Sandbox().run(source)
    assert result.status == status, result
    assert detail in result.detail


def test_an_endless_loop_is_killed():
    sandbox = Sandbox(timeout=1, patience=60)
    endless = sandbox.run("while True: pass")
    assert endless.status == "timeout"
    assert "processor time" in endless.detail or sys.platform == "win32"
    deaf = "import signal\nfor s in (15, 2, 24): signal.signal(s, signal.SIG_IGN)\nwhile 1: pass"
    assert sandbox.run(deaf).status == "timeout"
    # Sleeping takes no processor time: the wall clock ends it.
    sleeping = "import time\ntry:\n    time.sleep(99)\nfinally:\n    time.sleep(99)"
    slept = Sandbox(timeout=1, patience=2).run(sleeping)
    assert (slept.status, slept.detail) == ("timeout", "more than 2 s of wall time")
    assert slept.seconds >= 2


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not bound address space")
def test_a_memory_hog_is_stopped():
    assert Sandbox(memory_mb=200).run("x = [0] * 10**8").status == "memory"
    slowly = "x = []\nwhile True:\n    x.append(bytearray(10**6))"
    assert Sandbox(memory_mb=200).run(slowly).status == "memory"
    example = Sandbox(memory_mb=200).run("def f(): return [0] * 10**8", examples=">>> f()\n1")
    assert example.status == "memory"
    assert Sandbox(memory_mb=1000).run("x = [0] * 10**7").status == "passed"


@pytest.mark.parametrize(
    "attempt",
    [
        "open({outside!r}, 'w')",
        "open({outside!r}, 'a')",
        "import os; os.open({outside!r}, os.O_RDWR | os.O_CREAT)",
        "from pathlib import Path; Path({outside!r}).write_text('x')",
        "open('../escaped', 'w')",
        "import os; os.symlink({folder!r}, 'link'); open('link/escaped', 'w')",
        "import os; os.remove({victim!r})",
        "import os; os.rename({victim!r}, 'mine')",
        "import os; os.chmod({victim!r}, 0)",
        "import os; os.truncate({victim!r}, 0)",
        "import os; os.mkdir({outside!r})",
        "import os; os.remove('victim', dir_fd=os.open({folder!r}, 0))",
        "import shutil; shutil.rmtree({folder!r})",
        "import sqlite3; sqlite3.connect({outside!r})",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL(None)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
@pytest.mark.parametrize("hides", [False, True])
@posix
def test_what_is_forbidden_leaves_no_trace(tmp_path, attempt, hides):
    victim = tmp_path / "victim"
    victim.write_text("here")
    source = attempt.format(
        outside=str(tmp_path / "outside"), folder=str(tmp_path), victim=str(victim)
    )
    if hides:  # catching the refusal does not undo it
        body = "".join(f"    {part.strip()}\n" for part in source.split(";"))
        source = f"try:\n{body}except BaseException: pass"
    result = Sandbox().run(source)
    assert result.status == "forbidden", result
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "here"


def test_its_own_folder_is_writable_and_deleted():
    source = (
        "import os, tempfile\n"
        "open('a', 'w').write('x'); os.mkdir('d'); os.rename('a', 'd/b'); os.remove('d/b')\n"
        "with tempfile.NamedTemporaryFile() as file: file.write(b'x')\n"
        "open('left', 'w').write('x')\n"
        "raise ValueError(os.getcwd())"
    )
    result = Sandbox().run(source)
    assert result.status == "error"
    folder = Path(result.detail.removeprefix("ValueError: "))
    assert folder.is_absolute()
    assert not folder.exists()


@posix
def test_files_are_bounded():
    source = "with open('big', 'wb') as file:\n    for _ in range(99): file.write(bytes(10**5))"
    assert "File too large" in Sandbox(file_mb=1).run(source).detail
    assert Sandbox(file_mb=20).run(source).status == "passed"


def test_nothing_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    source = "import os\nassert 'A_SECRET' not in os.environ\nassert os.listdir() == []"
    assert Sandbox().run(source).status == "passed"


@linux
def test_the_kernel_stops_what_gets_past_the_hook(tmp_path):
    """Run the kernel's layers alone: files, network and processes, without audit hook."""
    program = """
import ctypes, json, os, runpy, socket, sys
layers = runpy.run_path(sys.argv[1], run_name="layers")
libc = ctypes.CDLL(None, use_errno=True)
active = layers["separate"](libc) + layers["read_only"](libc, os.getcwd())
layers["drop_capabilities"](libc)
found = {"active": active, "interfaces": [name for _, name in socket.if_nameindex()]}
for name, path in (("outside", sys.argv[2]), ("inside", "file")):
    try:
        open(path, "w").close()
        found[name] = "written"
    except OSError as error:
        found[name] = type(error).__name__
found["first process"] = os.getpid() == 1
try:
    os.kill(int(sys.argv[3]), 0)
    found["sees us"] = True
except OSError:
    found["sees us"] = False
found["unshare"] = libc.unshare(0x00020000)  # a mount namespace would need a capability
print(json.dumps(found))
"""
    import os

    runner = str(Path(code_evaluation.__file__).with_name("_sandboxed.py"))
    (tmp_path / "own").mkdir()
    output = subprocess.run(
        [sys.executable, "-c", program, runner, str(tmp_path / "evil"), str(os.getpid())],
        cwd=tmp_path / "own",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(output)
    assert found["inside"] == "written"
    if "read-only files" in found["active"]:
        assert found["outside"] == "PermissionError"
        assert not (tmp_path / "evil").exists()
    if "network namespace" in found["active"]:
        assert found["interfaces"] == ["lo"]
    if "process namespace" in found["active"]:
        assert found["first process"]
        assert not found["sees us"]
        assert found["unshare"] == -1
    if not found["active"]:
        pytest.skip("this kernel lends an ordinary process none of its layers")


def test_without_the_kernels_layers_the_hook_remains(tmp_path):
    result = Sandbox(isolate=False).run(f"open({str(tmp_path / 'x')!r}, 'w')")
    assert result.status == "forbidden"
    assert not {"read-only files", "network namespace"} & set(result.protections)


def test_bad_limits_are_refused():
    for name in ("timeout", "patience", "memory_mb", "file_mb"):
        with pytest.raises(DataError, match=name):
            Sandbox(**{name: 0})


# Functions and problems ---------------------------------------------------------------------------


def test_functions_are_those_that_the_parser_finds():
    functions = standard_library_functions(["heapq", "statistics"])
    names = {(f.module, f.name) for f in functions}
    assert {("heapq.py", "merge"), ("statistics.py", "NormalDist.overlap")} <= names
    for function in functions:
        assert compiles(function.source)
        source = code_evaluation._source(function.module)
        assert source[function.start :].startswith(function.source.rstrip("\n"))
        text = function.source
        if text.startswith(" "):
            text = f"class _:\n{text}"
        node = ast.parse(text).body[0]
        node = node.body[0] if isinstance(node, ast.ClassDef) else node
        assert node.name == function.name.split(".")[-1]
        assert ast.get_docstring(node, clean=False) == function.docstring
        # The body is what follows the docstring: with a pass in its place it still compiles.
        indentation = " " * node.body[0].col_offset
        assert compiles(f"{function.source[: function.body]}{indentation}pass\n")
        if function.docstring is not None:
            assert function.docstring not in function.source[function.body :]
    with pytest.raises(DataError, match="'numpy' is no Python package"):
        standard_library_functions(["numpy"])
    with_examples = standard_library_functions(["heapq"], with_examples=True)
    assert {f.name for f in with_examples} >= {"merge"}
    assert all(">>>" in f.docstring for f in with_examples)
    assert all(
        len(f.source) <= 300 for f in standard_library_functions(["heapq"], max_characters=300)
    )


def written(source, body_at):
    return PythonFunction("p", "p.py", "f", source, source.index(body_at), 0, None)


def test_signatures_and_decorators_are_never_in_the_hole():
    source = (
        "@decorated(\n    1)\ndef f(\n    a,\n    b=2,\n) -> int:\n"
        "    # note\n    x = 1\n\n    return x\n"
        "def g(): return 1\n"
        "class C:\n    def h(self):\n        '''Doc.'''\n        # why\n        @cache\n"
        "        def inner():\n            return 1\n        return inner\n"
    )
    found = {f.name: f for f in code_evaluation._functions(source, "p", "p.py")}
    assert list(found) == ["f", "C.h"]
    assert found["f"].source[found["f"].body :] == "    x = 1\n\n    return x\n"
    assert found["C.h"].source[found["C.h"].body :].startswith("        # why\n        @cache\n")


@pytest.mark.parametrize("kind", ["line", "lines", "span"])
def test_holes(kind):
    functions = standard_library_functions(["heapq", "fractions"])
    problems = infill_problems(functions, kind=kind, per_function=3, seed=2)
    assert len(problems) > len(functions)
    assert len({problem.name for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.complete(problem.middle) == problem.function.source
        assert problem.start >= problem.function.body
        assert problem.middle.strip()
        if kind == "line":
            assert problem.middle.count("\n") == 1
            assert problem.middle.endswith("\n")
            assert problem.prefix.endswith("\n")
            assert not problem.middle.lstrip().startswith("#")
        if kind == "lines":
            assert problem.middle.count("\n") >= 2
            assert problem.middle != problem.function.source[problem.function.body :]
    # The choice depends on the function, not on its neighbours.
    alone = infill_problems(functions[4:5], kind=kind, per_function=3, seed=2)
    assert set(alone) <= set(problems)
    assert problems == infill_problems(functions, kind=kind, per_function=3, seed=2)
    assert problems != infill_problems(functions, kind=kind, per_function=3, seed=3)
    with pytest.raises(DataError, match="kind"):
        infill_problems(functions, kind="word")


def test_training_texts_hold_no_copy_of_what_is_held_out():
    copied = standard_library_functions(["heapq"])[0]
    texts = training_texts()
    assert len(texts) > 5000
    held_out = standard_library_functions(DOCTEST_PACKAGES)
    shared = {run for function in held_out for run in runs(function.source, 24)}
    assert not any(shared & runs(text, 24) for text in texts[::50])
    assert copied.source not in texts
    assert copied.source in training_texts(["statistics"])


def test_several_holes_have_a_line_between_them():
    functions = standard_library_functions(["heapq", "fractions"])
    made = several_holes(functions, n_holes=3, seed=1)
    assert 10 < len(made) < len(functions)
    for text in made:
        assert len(text.middles) == 3
        source = text.function.source
        mended = "".join(a + b for a, b in zip(text.parts, [*text.middles, ""], strict=True))
        assert mended == source
        for middle, part in zip(text.middles, text.parts[1:-1], strict=False):
            assert middle.startswith("\n")
            assert middle.strip()
            assert not middle.lstrip().startswith("#")
            assert part.strip()
        assert text.spans[0][0] >= text.function.body - 1
    alone = several_holes(functions[4:5], n_holes=3, seed=1)
    assert set(alone) <= set(made)
    assert made != several_holes(functions, n_holes=3, seed=2)
    with pytest.raises(DataError, match="n_holes must be at least 1"):
        several_holes(functions, n_holes=0)


def test_every_choice_of_lines_apart_is_made():
    source = "def f():\n" + "".join(f"    x{n} = {n}\n" for n in range(5))
    function = written(source, "    x0")
    seen = {
        tuple(int(middle.split()[-1]) for middle in several_holes([function], seed=seed)[0].middles)
        for seed in range(60)
    }
    assert seen == {(a, b) for a in range(5) for b in range(a + 2, 5)}


def test_functions_of_any_text():
    module = (
        "import os\n\n\ndef f(x):\n    return x\n\n\nclass A:\n    def g(self):\n        pass\n"
    )
    assert [f.name for f in python_functions(module)] == ["f", "A.g"]
    [method] = python_functions("    def g(self):\n        return 1\n", module="m")
    assert (method.source, method.module) == ("    def g(self):\n        return 1\n", "m")
    for text in ("It was a dark night.\n", "x = 1\n", "\0", "(" * 10_000, ""):
        assert python_functions(text) == ()


# The evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doctested():
    functions = {
        function.name: function
        for function in standard_library_functions(DOCTEST_PACKAGES, with_examples=True)
    }
    chosen = [
        "median_low",
        "merge",
        "Counter.most_common",
        "Context.is_signed",
        "get_close_matches",
    ]
    return [functions[name] for name in chosen]


def test_true_middles_pass_in_their_modules(doctested):
    problems = infill_problems(doctested, seed=1)
    report = evaluate_infilling(lambda pairs: [p.middle for p in problems], problems, n_jobs=2)
    assert report.exact_match == report.compile_rate == report.pass_rate == 1
    assert report.summary()["n_run"] == 5


def test_wrong_fills_fail(doctested):
    function = doctested[0]
    start = function.source.index("        return data[n // 2]")
    line = function.source[start:]
    problem = InfillProblem(function, start, start + line.index("\n") + 1, "line")

    def judged(fill):
        report = evaluate_infilling(lambda pairs: [fill], [problem], sandbox=Sandbox(timeout=2))
        return bool(report.exact[0]), bool(report.compiled[0]), report.statuses[0]

    assert judged(problem.middle) == (True, True, "passed")
    assert judged(problem.middle.rstrip("\n") + "  \n") == (True, True, "passed")
    # Another way to say the same, and ways to be wrong.
    assert judged("        return data[int(n / 2)]\n") == (False, True, "passed")
    assert judged("        return data[0]\n") == (False, True, "failed")
    assert judged("        return data[n // 2\n") == (False, False, "error")
    assert judged("        while True: pass\n") == (False, True, "timeout")
    assert judged("        open('/tmp/stray', 'w')\n") == (False, True, "forbidden")
    assert judged("") == (False, False, "error")


def test_verification_leaves_out_what_a_doctest_does_not_see(doctested):
    function = doctested[0]
    # The examples never reach the error for empty data.
    start = function.source.index("        raise StatisticsError")
    unseen = InfillProblem(function, start, function.source.index("\n", start) + 1, "line")
    at = function.source.index("    n = len(data)")
    seen = InfillProblem(function, at, function.source.index("\n", at) + 1, "line")
    no_examples = InfillProblem(written("def f():\n    return 1\n", "    r"), 9, 22, "line")
    calls = []
    kept = verified_problems(
        [unseen, seen, no_examples], n_jobs=2, progress=lambda *done: calls.append(done)
    )
    assert kept == (seen,)
    assert calls == [(1, 2), (2, 2)]


def test_figures_are_shares():
    functions = standard_library_functions(["heapq"])[:4]
    problems = infill_problems(functions)
    fills = [problems[0].middle, "        )(\n", problems[2].middle + "extra(\n", "    pass\n"]
    report = evaluate_infilling(lambda pairs: fills, problems, run_doctests=False)
    assert report.exact.tolist() == [True, False, False, False]
    assert report.exact_match == 0.25
    assert report.compile_rate == np.mean(
        [compiles(p.complete(f)) for p, f in zip(problems, fills, strict=True)]
    )
    assert np.isnan(report.pass_rate)
    cut = evaluate_infilling(lambda pairs: fills, problems, run_doctests=False, cut_lines=True)
    assert cut.exact.tolist() == [True, False, True, False]
    assert cut.fills[2] == problems[2].middle
    seen = []
    evaluate_infilling(lambda pairs: seen.extend(pairs) or fills, problems, run_doctests=False)
    assert seen == [(p.prefix, p.suffix) for p in problems]
    with pytest.raises(DataError, match="3 texts for 4 problems"):
        evaluate_infilling(lambda pairs: fills[:3], problems)
    with pytest.raises(DataError, match="at least one"):
        evaluate_infilling(lambda pairs: [], [])


def test_compiles_never_runs_and_never_crashes():
    assert compiles("def f():\n    raise SystemExit\n")
    assert compiles("    async def f(self):\n        await x\n")
    for bad in ("def f():\nreturn 1", "    def f(self):\n  return 1", "x = '\0'", "(" * 10**5):
        assert not compiles(bad)
