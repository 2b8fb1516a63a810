"""Vectors of texts on disk: built shard by shard, resumable, memory-mapped, fingerprinted.

A vector store keeps one float32 vector per text of a pool that may be larger than memory. Row i
belongs to text i; the texts themselves stay where they are. How to use it::

    fingerprint = {"model": base.fingerprint, "pooling": "mean", "layer": -1, "max_length": 512}

    def read() -> Iterator[str]:  # called anew by each build; lines are read one by one
        with open("pool.txt", encoding="utf-8") as file:
            yield from map(str.strip, file)

    store = VectorStore.build("pool-vectors", read, embed, fingerprint=fingerprint)
    len(store), store.dimension, store.digest
    for start, block in store.blocks(4096): ...  # float32 (b, d), read-only
    store.take([7, 3])                           # float32 (2, d)

    store = VectorStore.open("pool-vectors", fingerprint=fingerprint)  # later, elsewhere

`build` is the one call for all cases: it starts, resumes or just returns a store. Where shards are
finished it reads their texts again and compares their SHA-256, which is cheap, and does not embed
them; so calling it with a finished store checks that the store still belongs to the texts. It
refuses (`DataError`) other texts and another fingerprint, naming the entry that differs. Only one
process builds a store at a time (`StoreError` for the second, or ``wait=True``).

On disk, a folder of ``shard-00000.npy``, ... (plain NumPy files) and ``manifest.json``: the
fingerprint, and for each shard its rows and the SHA-256 of its texts and of its vectors. Shards and
manifest are written whole or not at all, so that a killed build loses at most one shard's work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bakeoff._files import atomic_path, write_text
from bakeoff.errors import DataError, StoreError

_FORMAT = 1
_MANIFEST = "manifest.json"
_LOCK = ".lock"
# Shards mapped at once. Each costs a file descriptor, of which a process has about a thousand.
_MAPPED = 8


class VectorStore:
    """float32 vectors on disk, one per text; made by `VectorStore.build` or `VectorStore.open`.

    ``len(store)`` is the number of rows N and ``np.asarray(store)`` all of them in memory.

    Attributes
    ----------
    path : Path
        The folder.
    dimension : int
        Width d of a vector.
    fingerprint : dict
        What the vectors depend on, as given to `build`.
    digest : str
        64 hexadecimal digits that change with the fingerprint, a text, a vector or their order.

    Examples
    --------
    >>> import tempfile
    >>> def embed(texts):
    ...     return np.array([[len(text), text.count("a")] for text in texts], dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = VectorStore.build(folder, ["a", "bc", "aaa"], embed, fingerprint={"v": 1})
    ...     len(store), store.dimension, store.take([2]).tolist()
    (3, 2, [[3.0, 3.0]])
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.dimension = int(manifest["dimension"])
        self.fingerprint: dict[str, Any] = dict(manifest["fingerprint"])
        self.digest = str(manifest["digest"])
        self._shards: list[dict[str, Any]] = list(manifest["shards"])
        self._ends = np.cumsum([shard["rows"] for shard in self._shards])
        self._mapped: OrderedDict[int, NDArray[np.float32]] = OrderedDict()

    @classmethod
    def build(
        cls,
        path: str | Path,
        texts: Callable[[], Iterable[str]] | Sequence[str],
        embed: Callable[[list[str]], NDArray[np.float32]],
        *,
        fingerprint: Mapping[str, object],
        rows_per_shard: int = 8192,
        progress: Callable[[int, int], None] | None = None,
        wait: bool = False,
    ) -> Self:
        """Embed texts into the folder `path`, or go on where an earlier call was stopped.

        Parameters
        ----------
        path
            The folder; made if it is not there.
        texts
            The pool: a sequence, or a function that returns a fresh iterator over it.
        embed
            Turns at most `rows_per_shard` texts into vectors ``(n, d)``. It should give the same
            vectors for the same texts, or a resumed build has another digest.
        fingerprint
            All that the vectors depend on beside the texts (model, layer, pooling, template, ...),
            in values that JSON knows.
        rows_per_shard
            Texts embedded between two writes, and held in memory together. A build that is resumed
            keeps the number that it began with.
        progress
            Called with (rows done, rows in total); the total is 0 where `texts` is a function.
        wait
            Whether to wait for another process that is building here, and then take its result,
            rather than raise.

        Returns
        -------
        VectorStore
            The finished store.

        Raises
        ------
        DataError
            If the folder was built from other texts or with another fingerprint (says which entry
            differs); there are no texts or one is no string; `embed` returns vectors of another
            shape, or not finite (names the row).
        StoreError
            If another process is building here (without `wait`), or the manifest cannot be read.

        Warns
        -----
        UserWarning
            If a shard is damaged; it is embedded again.
        """
        from filelock import FileLock, Timeout

        if rows_per_shard < 1:
            raise DataError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        if isinstance(texts, str):
            raise DataError("texts must be a sequence of strings or a function, got one string")
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; a vector store is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # The system drops the lock with the process that holds it, even a killed one.
            with FileLock(folder / _LOCK, timeout=-1 if wait else 0):
                manifest = _build(folder, texts, embed, fingerprint, rows_per_shard, progress)
        except Timeout as error:
            raise StoreError(f"another process is building the vector store {folder}") from error
        return cls(folder, manifest)

    @classmethod
    def open(
        cls,
        path: str | Path,
        fingerprint: Mapping[str, object] | None = None,
        *,
        verify: bool = False,
    ) -> Self:
        """Open a finished store.

        Parameters
        ----------
        path
            The folder.
        fingerprint
            What the store must have been built with; by default anything.
        verify
            Whether to read all vectors and compare their SHA-256. Otherwise only the sizes of the
            files are compared.

        Raises
        ------
        DataError
            If there is no store, or its fingerprint is another one; says which entry differs.
        StoreError
            If its build was not finished, or a shard is missing or damaged.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        if manifest is None:
            raise DataError(f"{folder} is no vector store: it has no {_MANIFEST}")
        if fingerprint is not None:
            _check_fingerprint(folder, manifest["fingerprint"], _as_json(fingerprint))
        if not manifest["complete"]:
            rows = sum(shard["rows"] for shard in manifest["shards"])
            raise StoreError(
                f"the vector store {folder} is not finished ({rows} rows are): build it again with "
                "the same texts, and it goes on from there"
            )
        for shard in manifest["shards"]:
            problem = _damage(folder, shard, manifest["dimension"], content=verify)
            if problem:
                raise StoreError(
                    f"the vector store {folder} is damaged: {problem}; build it again with the "
                    "same texts, which embeds this shard anew"
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"VectorStore({str(self.path)!r}, rows={len(self)}, dimension={self.dimension})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}

    def blocks(self, rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield all vectors in order, `rows` at a time (the last block may be shorter).

        Yields
        ------
        start : int
            The block's first row.
        block : float32 array of shape (b, d)
            Not to be written to; where a block lies within one shard, it is a view of the file.
        """
        if rows < 1:
            raise DataError(f"rows must be at least 1, got {rows}")
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            parts = []
            begin = start
            while begin < stop:
                shard = int(np.searchsorted(self._ends, begin, side="right"))
                offset = int(self._ends[shard]) - self._shards[shard]["rows"]
                end = min(stop, int(self._ends[shard]))
                parts.append(self._vectors(shard)[begin - offset : end - offset])
                begin = end
            yield start, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, indices: ArrayLike) -> NDArray[np.float32]:
        """Return the vectors of some rows, in the order asked for.

        Parameters
        ----------
        indices
            Row numbers from 0 to N - 1, repeated or in any order.

        Returns
        -------
        float32 array of shape (len(indices), d)
            A copy.

        Raises
        ------
        DataError
            If an index is no integer or out of range.
        """
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise DataError(
                f"indices must be a list of row numbers, got dtype {wanted.dtype} and shape "
                f"{wanted.shape}"
            )
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise DataError(f"indices must be from 0 to {len(self) - 1}, got {int(outside[0])}")
        taken = np.empty((len(wanted), self.dimension), dtype=np.float32)
        if not len(wanted):
            return taken
        shard_of_each = np.searchsorted(self._ends, wanted, side="right")
        order = np.argsort(shard_of_each, kind="stable")
        shards, first = np.unique(shard_of_each[order], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(order, first[1:]), strict=True):
            offset = int(self._ends[shard]) - self._shards[shard]["rows"]
            taken[places] = self._vectors(shard)[wanted[places].astype(np.int64) - offset]
        return taken

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a vector store becomes an array only by copying it into memory")
        whole = np.empty((len(self), self.dimension), dtype=np.float32)
        for start, block in self.blocks(8192):
            whole[start : start + len(block)] = block
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _vectors(self, shard: int) -> NDArray[np.float32]:
        vectors = self._mapped.pop(shard, None)
        if vectors is None:
            vectors = _mapped(self.path / self._shards[shard]["file"])
            expected = (self._shards[shard]["rows"], self.dimension)
            if vectors.shape != expected or vectors.dtype != np.float32:
                raise StoreError(
                    f"the vector store {self.path} is damaged: {self._shards[shard]['file']} "
                    f"holds {vectors.dtype} {vectors.shape}, not float32 {expected}"
                )
        self._mapped[shard] = vectors
        if len(self._mapped) > _MAPPED:
            self._mapped.popitem(last=False)
        return vectors


# Building -----------------------------------------------------------------------------------------


def _build(
    folder: Path,
    texts: Callable[[], Iterable[str]] | Sequence[str],
    embed: Callable[[list[str]], NDArray[np.float32]],
    fingerprint: Mapping[str, object],
    rows_per_shard: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Fill the folder and return its manifest. The caller holds the lock."""
    known = _as_json(fingerprint)
    manifest = _read_manifest(folder)
    if manifest is None:
        _refuse_strangers(folder)
    if manifest is None or not manifest["shards"]:  # nothing is lost by starting anew
        manifest = {
            "format": _FORMAT,
            "fingerprint": known,
            "rows_per_shard": rows_per_shard,
            "dimension": None,
            "complete": False,
            "digest": None,
            "shards": [],
        }
        _write_manifest(folder, manifest)
    _check_fingerprint(folder, manifest["fingerprint"], known)
    for abandoned in folder.glob(".*.part"):  # what a killed build was writing
        abandoned.unlink(missing_ok=True)

    total = 0 if callable(texts) else len(texts)
    source = iter(texts() if callable(texts) else texts)
    finished: list[dict[str, Any]] = manifest["shards"]
    done = 0
    for number in itertools.count():
        chunk = list(itertools.islice(source, manifest["rows_per_shard"]))
        if not chunk:
            break
        digest = _digest_of_texts(chunk, done)
        if number < len(finished):
            shard = finished[number]
            if shard["rows"] != len(chunk) or shard["texts_sha256"] != digest:
                raise _other_texts(folder, f"rows {done} to {done + shard['rows'] - 1} differ")
            problem = _damage(folder, shard, manifest["dimension"], content=True)
            if problem:
                warnings.warn(
                    f"the vector store {folder} is damaged: {problem}; this shard is embedded "
                    "again",
                    stacklevel=3,
                )
                finished[number] = _new_shard(folder, number, chunk, digest, embed, manifest, done)
                _write_manifest(folder, manifest)
        elif manifest["complete"]:
            raise _other_texts(folder, f"it was finished with {done} rows, and there are more")
        else:
            finished.append(_new_shard(folder, number, chunk, digest, embed, manifest, done))
            _write_manifest(folder, manifest)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    if done == 0:
        raise DataError("texts must have at least one entry, got none")
    rows = sum(shard["rows"] for shard in finished)
    if done < rows:
        raise _other_texts(folder, f"it has {rows} rows already, and there are only {done}")
    complete = {**manifest, "complete": True, "digest": _digest(manifest)}
    if complete != manifest:
        _write_manifest(folder, complete)
    return complete


def _new_shard(
    folder: Path,
    number: int,
    texts: list[str],
    texts_digest: str,
    embed: Callable[[list[str]], NDArray[np.float32]],
    manifest: dict[str, Any],
    start: int,
) -> dict[str, Any]:
    vectors = np.asarray(embed(texts))
    if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.shape[1] == 0:
        raise DataError(
            f"embed must return vectors ({len(texts)}, d) for {len(texts)} texts, got shape "
            f"{vectors.shape}"
        )
    if vectors.dtype.kind not in "fiu":
        raise DataError(f"embed must return numbers, got dtype {vectors.dtype}")
    if manifest["dimension"] is None:
        manifest["dimension"] = int(vectors.shape[1])
    elif vectors.shape[1] != manifest["dimension"]:
        raise DataError(
            f"embed must return vectors of width {manifest['dimension']} as for the first rows, "
            f"got {vectors.shape[1]} from row {start} on"
        )
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is named below
        vectors = np.ascontiguousarray(vectors, dtype="<f4")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        text = texts[int(bad[0])]
        raise DataError(
            f"embed returned NaN or inf for row {start + int(bad[0])}, the text "
            f"{text[:60]!r}{'...' if len(text) > 60 else ''}"
        )
    name = f"shard-{number:05d}.npy"
    with atomic_path(folder / name) as temporary, temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {
        "file": name,
        "rows": len(texts),
        "bytes": size,
        "texts_sha256": texts_digest,
        "vectors_sha256": _digest_of_vectors(vectors),
    }


def _refuse_strangers(folder: Path) -> None:
    """Raise if a folder without a manifest holds files of someone else's."""
    strangers = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if strangers:
        raise DataError(
            f"{folder} is no vector store and not empty (it has {strangers[0]}): give another path"
        )


def _other_texts(folder: Path, what: str) -> DataError:
    return DataError(
        f"the vector store {folder} was built from other texts: {what}. Give the same texts, or "
        "another path"
    )


# The manifest and its digests ---------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise StoreError(
            f"{path} is not of format {_FORMAT}, the one that this version of bakeoff reads"
        )
    absent = {"fingerprint", "rows_per_shard", "dimension", "complete", "digest", "shards"}
    absent -= manifest.keys()
    if absent:
        raise StoreError(f"{path} lacks {min(absent)!r}")
    return manifest


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _as_json(fingerprint: Mapping[str, object]) -> dict[str, Any]:
    try:
        known = json.loads(json.dumps(dict(fingerprint), sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(f"fingerprint must hold values that JSON knows: {error}") from error
    assert isinstance(known, dict)
    return known


def _check_fingerprint(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    differing = [
        f"{key} is {_shown(stored, key)} there and {_shown(given, key)} here"
        for key in sorted(stored.keys() | given.keys())
        if key not in stored or key not in given or stored[key] != given[key]
    ]
    if differing:
        raise DataError(
            f"the vector store {folder} was built otherwise: {'; '.join(differing)}. Vectors of "
            "the two cannot be compared"
        )


def _shown(entries: dict[str, Any], key: str) -> str:
    if key not in entries:
        return "absent"
    text = repr(entries[key])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damage(folder: Path, shard: Mapping[str, Any], dimension: int, *, content: bool) -> str | None:
    """Return what is wrong with a finished shard's file, or None."""
    path = folder / shard["file"]
    if not path.is_file():
        return f"{shard['file']} is missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"{shard['file']} has {size} bytes, not {shard['bytes']}"
    if content:
        try:
            vectors = _mapped(path)
        except StoreError as error:
            return str(error)
        if vectors.shape != (shard["rows"], dimension) or vectors.dtype != np.float32:
            return f"{shard['file']} holds {vectors.dtype} {vectors.shape}"
        if _digest_of_vectors(vectors) != shard["vectors_sha256"]:
            return f"the SHA-256 of {shard['file']} is not the recorded one"
    return None


def _mapped(path: Path) -> NDArray[np.float32]:
    try:
        # A plain array over the map: slices of numpy.memmap cost more than those of an array.
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path.name} cannot be read: {error}") from error


def _digest_of_texts(texts: Sequence[str], start: int) -> str:
    digest = hashlib.sha256()
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts[{start + place}] must be a string, got {type(text).__name__}")
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))  # so that borders between texts count
        digest.update(data)
    return digest.hexdigest()


def _digest_of_vectors(vectors: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors, dtype="<f4").data).hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    content = [
        manifest["format"],
        manifest["fingerprint"],
        manifest["dimension"],
        [[shard["texts_sha256"], shard["vectors_sha256"]] for shard in manifest["shards"]],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
