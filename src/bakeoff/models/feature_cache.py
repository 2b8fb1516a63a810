"""Hidden states of a frozen model, computed once and kept on disk.

Designs that share a base model and its attention read the same states, so k designs cost little
more than one. What is stored is what `hidden_states` keeps of a text, addressed by content: the
model's fingerprint and number format, the attention, and the token ids themselves. Whatever changes
the ids (the tokenizer, an appended end-of-text token, truncation) therefore changes the address.

Texts are stored in shards: safetensors files that appear whole or not at all, are never modified,
and are memory-mapped for reading. Shards of one model and attention share a folder.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bakeoff._files import atomic_path, cache_directory
from bakeoff.errors import CacheError
from bakeoff.models.states import (
    Attention,
    HiddenBatch,
    TokenizedText,
    run_tokenized,
    tokenize,
)

if TYPE_CHECKING:
    from bakeoff.models.loading import BaseModel

Kind = Literal["layer_means", "layer_lasts"]

FORMAT_VERSION = 1
_SHARD_TEXTS = 256
_SHARD_BYTES = 128 * 2**20
_ABANDONED_SECONDS = 24 * 3600


class Features:
    """Hidden states of a list of texts, read from the cache as they are asked for.

    Made by `FeatureCache.features`. Text i here is text i of the list given there; equal texts
    share storage. Picklable: a copy in another process maps the files again.

    Attributes
    ----------
    n_tokens
        int64 array (N,): tokens kept of each text (those of a prefix do not count).
    truncated
        How many texts were longer than `max_length` and were cut.
    num_layers, hidden_size
        Of the model. There are ``num_layers + 1`` states: the embedding output comes first.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shard_of: NDArray[np.int64],
        row_of: NDArray[np.int64],
        n_tokens: NDArray[np.int64],
        *,
        truncated: int,
        num_layers: int,
        hidden_size: int,
        opened: Mapping[Path, _Shard] | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.n_tokens = n_tokens
        self.truncated = truncated
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self._shard_of = shard_of
        self._row_of = row_of
        # Held open, so a shard that another process evicts stays readable (POSIX).
        self._opened = dict(opened or {})

    def __len__(self) -> int:
        return len(self.n_tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def layer_means(self, indices: ArrayLike, layers: Sequence[int] | None = None) -> torch.Tensor:
        """Return every state's mean over tokens.

        Parameters
        ----------
        indices
            Positions of B texts; negative ones count from the end.
        layers
            Which S states, all by default; negative ones count from the end.

        Returns
        -------
        torch.Tensor
            float32 (B, S, hidden_size), the caller's own copy.

        Raises
        ------
        IndexError
            If an index or layer is out of range.
        CacheError
            In another process: if a shard was evicted in the meantime.
        """
        return self._gather("layer_means", indices, layers)

    def layer_lasts(self, indices: ArrayLike, layers: Sequence[int] | None = None) -> torch.Tensor:
        """Return every state at the last token. Parameters, result and errors as `layer_means`."""
        return self._gather("layer_lasts", indices, layers)

    def tokens(self, indices: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last layer's states at all tokens, padded on the right with zeros.

        Parameters
        ----------
        indices
            Positions of B texts; negative ones count from the end.

        Returns
        -------
        tokens : torch.Tensor
            float32 (B, T, hidden_size), T being the longest of these texts.
        mask : torch.Tensor
            int64 (B, T): 1 at tokens, 0 at padding.
        """
        positions = self._positions(indices)
        lengths = torch.from_numpy(self.n_tokens[positions])
        width = int(lengths.max()) if len(lengths) else 0
        padded = torch.zeros(len(positions), width, self.hidden_size)
        for target, position in zip(padded, positions, strict=True):
            shard, row = self._locate(position)
            start, stop = shard.offsets[row], shard.offsets[row + 1]
            target[: stop - start].copy_(shard.arrays["tokens"][start:stop])
        return padded, (torch.arange(width) < lengths[:, None]).long()

    def load(self, kind: Kind, layers: Sequence[int] | None = None) -> torch.Tensor:
        """Return one kind of states of all texts, converted to float32 once.

        Parameters
        ----------
        kind
            ``"layer_means"`` or ``"layer_lasts"``.
        layers
            Which S states, all by default.

        Returns
        -------
        torch.Tensor
            float32 (N, S, hidden_size) in memory: N * S * hidden_size * 4 bytes.
        """
        if kind not in ("layer_means", "layer_lasts"):
            raise ValueError(f"kind must be 'layer_means' or 'layer_lasts', got {kind!r}")
        return self._gather(kind, np.arange(len(self)), layers)

    def _gather(self, kind: str, indices: ArrayLike, layers: Sequence[int] | None) -> torch.Tensor:
        positions = self._positions(indices)
        states = None if layers is None else self._states(layers)
        n_states = self.num_layers + 1 if states is None else len(states)
        out = torch.empty(len(positions), n_states, self.hidden_size)
        # Row by row: a row is tens of kilobytes, and copy_ widens to float32 on the way, which is
        # three times as fast as indexing per shard (that copies twice).
        for target, position in zip(out, positions, strict=True):
            shard, row = self._locate(position)
            source = shard.arrays[kind][row]
            target.copy_(source if states is None else source[states])
        return out

    def _positions(self, indices: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise IndexError(
                "indices must be one-dimensional integers, "
                f"got {given.dtype} of shape {given.shape}"
            )
        return _wrapped("indices", given.astype(np.int64), len(self))

    def _states(self, layers: Sequence[int]) -> torch.Tensor:
        wanted = np.asarray(layers, np.int64).reshape(-1)
        return torch.from_numpy(_wrapped("layers", wanted, self.num_layers + 1))

    def _locate(self, position: int) -> tuple[_Shard, int]:
        path = self.paths[self._shard_of[position]]
        if path not in self._opened:
            shard = _Shard.open(path)
            if shard is None:
                raise CacheError(
                    f"the feature cache no longer holds {path} (it reached its size limit in "
                    "another process); compute the features again, or raise max_bytes"
                )
            self._opened[path] = shard
        return self._opened[path], int(self._row_of[position])


class FeatureCache:
    """A folder of hidden states that are computed when they are first asked for.

    Safe under several processes at once: files appear whole under names of their own; at worst a
    text is computed twice. A damaged file is noticed by its checksum and computed again.

    Parameters
    ----------
    directory
        Where the shards are; by default ``features`` in the folder that `$BAKEOFF_CACHE` names,
        or else in the user's cache folder. Created if absent.
    max_bytes
        Size of the folder above which the shards that were used least recently are deleted. What
        the running call and the `Features` still alive in this process need is never deleted, so
        one call that needs more than the limit gets it.

    Raises
    ------
    CacheError
        If the folder cannot be created or written to.
    ValueError
        If `max_bytes` is negative.

    Examples
    --------
    >>> from bakeoff.models import load
    >>> base = load("smollm2-135m")  # doctest: +SKIP
    >>> cache = FeatureCache()  # doctest: +SKIP
    >>> features = cache.features(base, ["A cat.", "Two dogs."])  # doctest: +SKIP
    >>> features.layer_means([1, 0], layers=[10]).shape  # doctest: +SKIP
    torch.Size([2, 1, 576])
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, max_bytes: int = 20 * 2**30
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.directory = cache_directory() / "features" if directory is None else Path(directory)
        self.max_bytes = max_bytes
        self._known: dict[Path, _Shard] = {}
        self._live: WeakSet[Features] = WeakSet()
        try:
            with atomic_path(self.directory / "README.txt") as temporary:
                temporary.write_text(
                    "Hidden states of language models, kept by bakeoff. Safe to delete.\n"
                )
        except OSError as error:
            raise self._unwritable(error) from error

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path, int]]:
        return FeatureCache, (self.directory, self.max_bytes)

    def features(
        self,
        base: BaseModel,
        texts: Sequence[str],
        *,
        attention: Attention = "causal",
        max_length: int | None = None,
        prefixes: str | Sequence[str] | None = None,
        batch_tokens: int = 4096,
        progress: Callable[[float, str], None] | None = None,
    ) -> Features:
        """Return the hidden states of texts, running the model only for those not in the cache.

        Every shard is on disk as soon as it is full, so a pass that is killed is taken up where it
        was. The result is the same whether a text was cached or not: values go through the stored
        number format (float16, or float32 for a text with values beyond float16) in either case.

        Parameters
        ----------
        base, texts, attention, max_length, prefixes, batch_tokens
            As for `bakeoff.models.states.hidden_states`.
        progress
            Called with the fraction done of what has to be computed, and a short message.

        Returns
        -------
        Features
            One entry per text, in order.

        Raises
        ------
        CacheError
            If a shard cannot be written.
        ModelError, DataError, ValueError
            As for `hidden_states`.
        """
        if attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention must be 'causal' or 'bidirectional', got {attention!r}")
        tokenized = tokenize(base, texts, max_length=max_length, prefixes=prefixes)
        keys = _keys(base, attention, tokenized)
        folder = self.directory / f"{base.fingerprint[:16]}-{attention}-v{FORMAT_VERSION}"
        found = self._find(folder, set(keys))
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}
        missing = sorted(first.values())
        if missing:
            writer = _Writer(self, folder, found)
            batches = run_tokenized(
                base,
                [tokenized[i] for i in missing],
                attention=attention,
                batch_tokens=batch_tokens,
            )
            total = sum(len(tokenized[i].ids) for i in missing)
            n_texts = n_tokens = 0
            for batch in batches:
                places = [missing[i] for i in batch.indices]
                writer.add([keys[i] for i in places], batch)
                n_texts += len(places)
                n_tokens += sum(len(tokenized[i].ids) for i in places)
                if progress is not None:
                    progress(n_tokens / total, f"{n_texts:,} of {len(missing):,} texts read")
            writer.finish()
        return self._handle(base, tokenized, keys, found)

    def _handle(
        self,
        base: BaseModel,
        tokenized: Sequence[TokenizedText],
        keys: Sequence[bytes],
        found: Mapping[bytes, tuple[Path, int]],
    ) -> Features:
        places = [found[key] for key in keys]
        paths = sorted({path for path, _ in places})
        number = {path: i for i, path in enumerate(paths)}
        features = Features(
            paths,
            np.array([number[path] for path, _ in places], np.int64),
            np.array([row for _, row in places], np.int64),
            np.array([len(text.ids) - text.n_prefix for text in tokenized], np.int64),
            truncated=sum(text.truncated for text in tokenized),
            num_layers=base.num_layers,
            hidden_size=base.hidden_size,
            opened={path: self._known[path] for path in paths},
        )
        self._live.add(features)
        for path in paths:
            with suppress(OSError):
                os.utime(path)  # marks it as used, for the eviction of what was not
        return features

    def _find(self, folder: Path, wanted: set[bytes]) -> dict[bytes, tuple[Path, int]]:
        """Return where wanted texts are stored, looking only into sound shards."""
        self._scan(folder)
        while True:
            rows: dict[bytes, tuple[Path, int]] = {}
            for path, shard in self._known.items():
                rows.update((key, (path, row)) for key, row in shard.rows.items())
            found = {key: rows[key] for key in wanted if key in rows}
            damaged = [p for p in {p for p, _ in found.values()} if not self._known[p].is_sound()]
            if not damaged:
                return found
            for path in damaged:
                del self._known[path]
                self._discard(path)

    def _scan(self, folder: Path) -> None:
        """Bring the known shards of a folder in line with what other processes did there."""
        present = set(folder.glob("*.safetensors"))
        for path in [p for p in self._known if p.parent == folder and p not in present]:
            del self._known[path]
        for path in sorted(present - self._known.keys()):
            shard = _Shard.open(path)
            if shard is not None:
                self._known[path] = shard
            elif path.exists():  # else another process has just evicted it
                self._discard(path)

    def _discard(self, path: Path) -> None:
        warnings.warn(f"{path} is damaged; its texts are computed again", stacklevel=4)
        with suppress(OSError):
            path.unlink()

    def _store(self, folder: Path, arrays: dict[str, torch.Tensor]) -> Path:
        path = folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            _Shard.write(path, arrays)
        except OSError as error:
            raise self._unwritable(error) from error
        shard = _Shard.open(path)
        if shard is None:
            raise CacheError(
                f"the feature cache {self.directory} lost {path.name} as it was written"
            )
        self._known[path] = shard
        return path

    def _evict(self, needed: set[Path]) -> None:
        """Delete the least recently used shards until the folder is within its limit."""
        needed = needed.union(*(features.paths for features in self._live))
        shards: list[tuple[int, int, Path]] = []
        for path in self.directory.glob("*/*"):
            with suppress(OSError):  # another process may delete it at any moment
                state = path.stat()
                if path.suffix == ".safetensors":
                    shards.append((state.st_mtime_ns, state.st_size, path))
                elif path.suffix == ".part" and state.st_mtime < time.time() - _ABANDONED_SECONDS:
                    path.unlink()  # left by a process that was killed while writing
        excess = sum(size for _, size, _ in shards) - self.max_bytes
        for _, size, path in sorted(shards):
            if excess <= 0:
                break
            if path not in needed:
                with suppress(PermissionError):  # Windows: mapped by another process
                    path.unlink(missing_ok=True)
                    self._known.pop(path, None)  # while mapped, its space would not be freed
                    excess -= size

    def _unwritable(self, error: OSError) -> CacheError:
        return CacheError(
            f"the feature cache {self.directory} cannot be written ({error.strerror or error}); "
            "free some space, or set BAKEOFF_CACHE to a folder that can"
        )


@dataclass(frozen=True)
class _Shard:
    """One file: rows of several texts, memory-mapped."""

    arrays: Mapping[str, torch.Tensor]
    rows: Mapping[bytes, int]
    offsets: list[int]
    checksum: str
    _checked: list[bool] = field(default_factory=list)

    @staticmethod
    def write(path: Path, arrays: dict[str, torch.Tensor]) -> None:
        """Write a shard atomically; any failure is an OSError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        metadata = {"crc32": _checksum(arrays)}
        try:
            with atomic_path(path) as temporary:
                save_file(arrays, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    @staticmethod
    def open(path: Path) -> _Shard | None:
        """Map a shard; None if it is not there, cut short, or not a shard."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {})["crc32"]
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            keys = arrays["keys"].numpy()
            return _Shard(
                arrays,
                {key.tobytes(): row for row, key in enumerate(keys)},
                arrays["offsets"].tolist(),
                checksum,
            )
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def is_sound(self) -> bool:
        """Compare the content with its checksum, once."""
        if not self._checked:
            self._checked.append(_checksum(self.arrays) == self.checksum)
        return self._checked[0]


class _Writer:
    """Collects texts into shards; a text's number format depends on that text alone."""

    def __init__(
        self, cache: FeatureCache, folder: Path, found: dict[bytes, tuple[Path, int]]
    ) -> None:
        self.cache = cache
        self.folder = folder
        self.found = found
        self.pending: dict[torch.dtype, list[tuple[bytes, dict[str, torch.Tensor]]]] = {
            torch.float16: [],
            torch.float32: [],
        }

    def add(self, keys: Sequence[bytes], batch: HiddenBatch) -> None:
        for row, key in enumerate(keys):
            exact = {
                "layer_means": batch.layer_means[row],
                "layer_lasts": batch.layer_lasts[row],
                "tokens": batch.tokens[batch.offsets[row] : batch.offsets[row + 1]],
            }
            halves = {name: value.half() for name, value in exact.items()}
            fits = all(bool(value.isfinite().all()) for value in halves.values())
            dtype = torch.float16 if fits else torch.float32
            self.pending[dtype].append((key, halves if fits else exact))
            self._flush_if_full(dtype)

    def finish(self) -> None:
        for dtype in self.pending:
            self._flush(dtype)

    def _flush_if_full(self, dtype: torch.dtype) -> None:
        pending = self.pending[dtype]
        n_bytes = sum(value.nbytes for _, texts in pending for value in texts.values())
        if len(pending) >= _SHARD_TEXTS or n_bytes >= _SHARD_BYTES:
            self._flush(dtype)

    def _flush(self, dtype: torch.dtype) -> None:
        pending, self.pending[dtype] = self.pending[dtype], []
        if not pending:
            return
        lengths = [len(values["tokens"]) for _, values in pending]
        arrays = {
            "keys": torch.frombuffer(bytearray(b"".join(k for k, _ in pending)), dtype=torch.uint8),
            "offsets": torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64),
            "layer_means": torch.stack([values["layer_means"] for _, values in pending]),
            "layer_lasts": torch.stack([values["layer_lasts"] for _, values in pending]),
            "tokens": torch.cat([values["tokens"] for _, values in pending]),
        }
        arrays["keys"] = arrays["keys"].view(len(pending), -1)
        path = self.cache._store(self.folder, arrays)
        self.found.update((key, (path, row)) for row, (key, _) in enumerate(pending))
        self.cache._evict({path for path, _ in self.found.values()})


def _keys(base: BaseModel, attention: str, texts: Iterable[TokenizedText]) -> list[bytes]:
    """Return each text's address: 32 bytes that stand for all that its states depend on."""
    dtype = next(base.model.parameters()).dtype
    common = hashlib.sha256(f"{FORMAT_VERSION}|{base.fingerprint}|{attention}|{dtype}".encode())
    keys = []
    for text in texts:
        digest = common.copy()
        digest.update(np.array([text.n_prefix, *text.ids], "<i4").tobytes())
        keys.append(digest.digest())
    return keys


def _checksum(arrays: Mapping[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(arrays):
        array = arrays[name]
        value = zlib.crc32(f"{name} {array.dtype} {tuple(array.shape)}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _wrapped(name: str, positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Turn positions that count from the end into ones that count from the start."""
    outside = positions[(positions < -size) | (positions >= size)]
    if len(outside):
        raise IndexError(f"{name}: {outside[0]} is out of range for {size}")
    return np.where(positions < 0, positions + size, positions)
