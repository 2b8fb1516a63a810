"""The program that runs untrusted Python and reports on it; `Sandbox` starts it as a process.

It is started by its path with ``-I -S -B``, so it can import the standard library alone. What
protects the machine, from the inside out: an audit hook refuses files outside the folder, sockets,
processes and native libraries; limits bound memory, processor time and file sizes; and on Linux,
where the kernel lets it, Landlock makes everything outside the folder unwritable and namespaces of
its own leave no network to reach and no process to signal.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

DETAIL = 2000  # characters of an error that are reported

_NEW_USER, _NEW_NET, _NEW_PID, _NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
# Landlock's rights that change a file system, by the version of its interface that has them.
_WRITE_RIGHTS = {
    1: (1 << 1) | sum(1 << bit for bit in range(4, 13)),
    2: 1 << 13,
    3: 1 << 14,
}
_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}

_REFUSED_EVENTS = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.kill",
    "os.startfile",
    "pty.",
    "resource.",
    "signal.pthread_kill",
    "winreg.",
    "_winapi.",
)
# Events whose first argument is a path, and those of them that end with directory descriptors.
_PATH_EVENTS = frozenset({"os.chflags", "os.removexattr", "os.setxattr", "os.truncate"})
_RELATIVE_EVENTS = {
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 1,
    "os.utime": 1,
}
_TWO_PATHS = frozenset({"os.link", "os.rename", "os.symlink"})


class Forbidden(PermissionError):
    """Untrusted code tried what it may not."""


def guard(folder: str) -> list[str]:
    """Install the audit hook, which cannot be removed; return the list it notes refusals in."""
    refused: list[str] = []
    # Bound here: the code that runs later may change modules, not this function's variables.
    realpath, separator, fspath = os.path.realpath, os.sep, os.fspath
    root = realpath(folder)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    null = os.devnull

    def inside(path: Any) -> bool:
        text = fspath(path)
        text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        found = realpath(text)
        return found == null or found.startswith(root + separator)

    def refuse(what: str) -> None:
        if len(refused) < 20:
            refused.append(what[:200])
        raise Forbidden(f"not allowed in the sandbox: {what}")

    def check_paths(event: str, arguments: tuple[Any, ...]) -> None:
        for path in arguments[: 2 if event in _TWO_PATHS else 1]:
            # A descriptor was checked when it was opened.
            if not isinstance(path, int) and not inside(path):
                refuse(f"{event}({path!r})")
        n_descriptors = _RELATIVE_EVENTS.get(event, 0)
        if n_descriptors and any(number != -1 for number in arguments[-n_descriptors:]):
            refuse(f"{event} relative to a descriptor")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & writing and not isinstance(path, int)
            # The folder itself is opened so for a file without a name.
            if writes and not inside(path) and realpath(path) != root:
                refuse(f"open({path!r}) for writing")
        elif event in _PATH_EVENTS or event in _RELATIVE_EVENTS:
            check_paths(event, arguments)
        elif event == "sqlite3.connect":
            if arguments[0] != ":memory:":
                refuse(event)
        elif event.startswith(_REFUSED_EVENTS):
            refuse(event)

    sys.addaudithook(hook)
    return refused


def limit(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> bool:
    """Bound what the process can use; return whether this system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    for name, value in (
        ("RLIMIT_CPU", cpu_seconds),
        ("RLIMIT_FSIZE", file_bytes),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_AS", memory_bytes),
    ):
        # macOS knows RLIMIT_AS and refuses to set it.
        with contextlib.suppress(ValueError, OSError, AttributeError):
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # Past the lower bound of processor time a signal says why; past the upper, the kernel
            # kills without asking.
            upper = bound + 1 if name == "RLIMIT_CPU" else bound
            if hard != resource.RLIM_INFINITY:
                upper = min(upper, hard)
            resource.setrlimit(kind, (bound, upper))
    return True


def separate(libc: Any) -> list[str]:
    """Leave the machine's network, processes and message queues; return what was left."""
    if libc is None:
        return []
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_IPC) == 0:
        # Only a child is in the new process namespace. It is the first there: when it ends, the
        # kernel ends whatever it has started.
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                with contextlib.suppress(OSError):
                    signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
                os.kill(os.getpid(), os.WTERMSIG(status))
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        return ["network namespace", "process namespace"]
    if libc.unshare(_NEW_USER | _NEW_NET) == 0:
        return ["network namespace"]
    return []


def read_only(libc: Any, folder: str) -> list[str]:
    """Make everything but the folder unwritable by Landlock; return whether it was possible."""
    if libc is None:
        return []
    import ctypes

    syscall = libc.syscall
    syscall.restype = ctypes.c_long
    version = syscall(_LANDLOCK["create"], None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return []
    rights = sum(bits for since, bits in _WRITE_RIGHTS.items() if since <= version)
    handled = ctypes.c_uint64(rights)
    rules = syscall(
        _LANDLOCK["create"], ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint(0)
    )
    if rules < 0:
        return []
    for path in (folder, os.devnull):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        # A file takes the rights of files alone: to write and, where it is known, to truncate.
        allowed = rights if os.path.isdir(path) else rights & ((1 << 1) | (1 << 14))
        beneath = allowed.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        done = syscall(_LANDLOCK["add"], rules, 1, beneath, ctypes.c_uint(0))
        os.close(descriptor)
        if done < 0:
            os.close(rules)
            return []
    libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = syscall(_LANDLOCK["restrict"], rules, ctypes.c_uint(0))
    os.close(rules)
    return ["read-only files"] if done == 0 else []


def drop_capabilities(libc: Any) -> None:
    """Give up what the user namespace granted, so that nothing can be mounted or remapped."""
    if libc is None:
        return
    libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)
    libc.capset(header, bytes(24))


class Examples(doctest.DocTestRunner):
    """Run doctest examples silently; remember the first failure, and whether memory ran out."""

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self.first = ""
        self.out_of_memory = False

    def report_failure(self, out: Any, test: Any, example: Any, got: str) -> None:
        """Note an example with another output."""
        self.first = self.first or f"{example.source.strip()}: expected {example.want!r}: {got!r}"

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        """Note an example with an exception."""
        self.out_of_memory = self.out_of_memory or exc_info[0] is MemoryError
        self.first = self.first or (
            f"{example.source.strip()}: {exc_info[0].__name__}: {exc_info[1]}"
        )


def execute(request: dict[str, Any], refused: list[str]) -> dict[str, Any]:
    """Run the module, then its examples; return status, detail and number of examples."""
    name: str = request["module"]
    module = types.ModuleType(name)
    package = bool(request["package"])
    module.__package__ = name if package else name.rpartition(".")[0]
    module.__file__ = f"{name}.py"
    if package:
        module.__path__ = request["path"]
    n_examples = 0
    answer: dict[str, Any]
    try:
        code = compile(request["source"], "<candidate>", "exec", dont_inherit=True)
        if module.__package__ and not package:
            __import__(module.__package__)
        sys.modules[name] = module
        exec(code, module.__dict__)
        answer = {"status": "passed", "detail": ""}
        if request["examples"] is not None:
            test = doctest.DocTestParser().get_doctest(
                request["examples"], module.__dict__, name, "<examples>", 0
            )
            runner = Examples()
            outcome = runner.run(test, out=lambda text: None, clear_globs=False)
            n_examples = outcome.attempted
            if outcome.failed:
                status = "memory" if runner.out_of_memory else "failed"
                answer = {"status": status, "detail": runner.first}
    except MemoryError:
        answer = {"status": "memory", "detail": "MemoryError"}
    except BaseException as error:
        # Exits and interrupts included: the code may not end the report.
        answer = {"status": "error", "detail": f"{type(error).__name__}: {error}"}
    if refused:
        answer = {"status": "forbidden", "detail": "; ".join(refused)}
    answer["detail"] = str(answer["detail"])[:DETAIL]
    return {**answer, "n_examples": n_examples}


def main() -> None:
    """Read a request from standard input, run it, write the report to standard output."""
    request = json.loads(sys.stdin.buffer.read())
    token = request.pop("token")
    # Whatever the code prints is lost: only the report goes out, through its own descriptor.
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    folder = os.getcwd()
    libc = None
    if sys.platform == "linux":
        import ctypes

        # A system library of another kind has no such calls: then the other layers remain.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None, use_errno=True)
            libc.unshare, libc.prctl, libc.capset, libc.syscall  # noqa: B018
    protections = ["audit hook"]
    if request["isolate"]:
        protections += separate(libc)
        protections += read_only(libc, folder)
        drop_capabilities(libc)
    if limit(request["memory_bytes"], request["cpu_seconds"], request["file_bytes"]):
        protections.append("limits")
    write: Callable[[int, bytes], int] = os.write
    dumps, leave = json.dumps, os._exit
    refused = guard(folder)
    answer = execute(request, refused)
    write(report, dumps({**answer, "token": token, "protections": protections}).encode())
    leave(0)  # without exit handlers and threads that the code may have left behind


if __name__ == "__main__":
    main()
