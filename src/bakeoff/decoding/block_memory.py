"""InfLLM's memory: what a layer remembers, and where blocks are kept (device, RAM or disk)."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from bakeoff.errors import CacheError, DataError, StoreError

Offload = Literal["none", "cpu", "disk"]
OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "disk")

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_FIRST_CAPACITY = 256
_SLAB_BLOCKS = 32
_segment_numbers = itertools.count()


class Segment(Protocol):
    """A run of blocks that were stored in the same place; blocks in it are never changed."""

    number: int
    in_memory: bool

    def read(self, index: int) -> Tensor:
        """Return block `index`."""


@dataclass(frozen=True)
class MemorySettings:
    """The sizes of a context memory, under the names of `bakeoff.decoding.infllm.patch`."""

    n_init: int
    n_local: int
    block_size: int
    topk: int
    repr_topk: int
    exec_chunk: int
    exact_mask: bool

    def checked(self) -> MemorySettings:
        """Return the settings; raise DataError if one is out of range."""
        least = {"n_init": 0, "topk": 0}
        for name, value in asdict(self).items():
            if name == "exact_mask":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise DataError(f"{name} must be a whole number, got {value!r}")
            if value < least.get(name, 1):
                raise DataError(f"{name} must be {least.get(name, 1)} or more, got {value}")
        if self.exec_chunk > self.n_local:
            raise DataError(
                f"exec_chunk must not be larger than n_local ({self.n_local}): no token of a chunk "
                f"may be distant to another of the same chunk; got {self.exec_chunk}"
            )
        if self.repr_topk > self.block_size:
            raise DataError(
                f"repr_topk must not be larger than block_size ({self.block_size}), got "
                f"{self.repr_topk}"
            )
        return self


# Where blocks are kept ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockHandle:
    """One stored block; whoever holds it keeps the block, and those stored with it, alive.

    Parameters
    ----------
    segment
        Where it is stored.
    index
        Which block of that segment it is.
    """

    segment: Segment
    index: int

    @property
    def key(self) -> tuple[int, int]:
        """Name the block without holding on to it."""
        return self.segment.number, self.index


class BlockStore:
    """An append-only store of blocks with a cache of those used last.

    Blocks are never changed once stored, so that several readers share them at no cost: see `fork`.
    Memory and disk space are free again when the last handle that a store gave out is gone. Files
    have no name (they vanish with the process, even with a killed one).

    Parameters
    ----------
    offload
        Where blocks are kept: ``"none"``, on the device they come from; ``"cpu"``, in main memory;
        ``"disk"``, in a file.
    folder
        Where that file is; needed for ``"disk"`` only. It is created if need be.
    max_cached_blocks
        How many blocks, those used last, stay on the device that asked for them.

    Raises
    ------
    bakeoff.errors.DataError
        If `offload` is unknown or `max_cached_blocks` is negative.
    bakeoff.errors.CacheError
        If the folder cannot be written to.

    Examples
    --------
    >>> store = BlockStore("cpu", max_cached_blocks=1)
    >>> handles = [store.append(torch.full((2, 3), value)) for value in (1.0, 2.0)]
    >>> [store.get(handles[i], torch.device("cpu")).sum().item() for i in (0, 0, 1, 0)]
    [6.0, 6.0, 12.0, 6.0]
    >>> store.hits, store.misses
    (1, 3)
    """

    def __init__(
        self,
        offload: Offload = "cpu",
        folder: str | os.PathLike[str] | None = None,
        max_cached_blocks: int = 32,
    ) -> None:
        if offload not in OFFLOADS:
            raise DataError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
        if max_cached_blocks < 0:
            raise DataError(f"max_cached_blocks must be 0 or more, got {max_cached_blocks}")
        if offload == "disk":
            if folder is None:
                raise DataError("offload='disk' needs a folder to write to, got None")
            folder = Path(folder).expanduser()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise _not_written(folder, error) from error
        self.offload: Offload = offload
        self.folder = folder
        self._recent = _Recent(max_cached_blocks)
        self._own: _MemorySegment | _FileSegment | None = None

    @torch.inference_mode(False)
    def append(self, block: Tensor) -> BlockHandle:
        """Store a block and return its handle.

        Parameters
        ----------
        block
            Any shape and dtype. It is copied: the caller may change it afterwards.

        Raises
        ------
        bakeoff.errors.CacheError
            If the disk is full.
        """
        if self._own is None:
            if self.offload == "disk":
                assert self.folder is not None  # checked by the constructor
                self._own = _FileSegment(Path(self.folder))
            else:
                self._own = _MemorySegment()
        if isinstance(self._own, _FileSegment):
            return BlockHandle(self._own, self._own.append(block))
        home = torch.device("cpu") if self.offload == "cpu" else block.device
        return BlockHandle(self._own, self._own.append(block.detach(), home))

    @torch.inference_mode(False)
    def get(self, handle: BlockHandle, device: torch.device) -> Tensor:
        """Return a block on `device`.

        Copy it, or be done with it before the next call: it may be overwritten then.
        """
        return self._recent.get(handle, device)

    def touch(self, handle: BlockHandle) -> None:
        """Count a use of a block that the caller still holds."""
        self._recent.touch(handle)

    def fork(self) -> BlockStore:
        """Return a store that adds blocks elsewhere; the cache of recent blocks stays shared.

        Handles of either store can be read through the other.
        """
        twin = BlockStore.__new__(BlockStore)
        twin.offload, twin.folder, twin._recent, twin._own = (
            self.offload,
            self.folder,
            self._recent,
            None,
        )
        return twin

    def clear(self) -> None:
        """Forget the recent blocks and the place new blocks went to."""
        self._own = None
        self._recent.clear()

    @property
    def hits(self) -> int:
        """Uses of a block that was at hand."""
        return self._recent.hits

    @property
    def misses(self) -> int:
        """Uses of a block that had to be fetched from where it is kept."""
        return self._recent.misses

    @property
    def cached(self) -> int:
        """Number of recent blocks that are held now."""
        return len(self._recent.blocks)


class _Recent:
    """The blocks used last, up to `capacity` of them, on the device that asked for them.

    Copies lie in slabs that are used again and again: blocks that come and go one by one would
    leave holes in the heap too small for anything else, and it would grow with the text.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self.hits = self.misses = 0
        self._slabs = _Slabs(_SLAB_BLOCKS)
        self._copies: set[tuple[int, int]] = set()

    def get(self, handle: BlockHandle, device: torch.device) -> Tensor:
        block = self.blocks.get(handle.key)
        if block is not None and block.device == device:
            self.hits += 1
            self.blocks.move_to_end(handle.key)
            return block
        self.misses += 1
        block = handle.segment.read(handle.index)
        if self.capacity == 0:
            return block.to(device)
        if handle.key in self.blocks:  # for another device
            self._drop(handle.key)
        while len(self.blocks) >= self.capacity:
            self._drop(next(iter(self.blocks)))
        if not (handle.segment.in_memory and block.device == device):
            block = self._slabs.take(block, device).copy_(block)
            self._copies.add(handle.key)
        self.blocks[handle.key] = block
        return block

    def _drop(self, key: tuple[int, int]) -> None:
        block = self.blocks.pop(key)
        if key in self._copies:
            self._copies.remove(key)
            self._slabs.give_back(block)

    def touch(self, handle: BlockHandle) -> None:
        self.hits += 1
        if handle.key in self.blocks:
            self.blocks.move_to_end(handle.key)

    def clear(self) -> None:
        self.blocks.clear()
        self._copies.clear()
        self._slabs = _Slabs(_SLAB_BLOCKS)
        self.hits = self.misses = 0


class _Slabs:
    """Places for blocks, made many at a time."""

    def __init__(self, n_blocks: int) -> None:
        self._n_blocks = n_blocks
        self._free: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, like: Tensor, device: torch.device) -> Tensor:
        free = self._free.setdefault((like.shape, like.dtype, device), [])
        if not free:
            slab = torch.empty((self._n_blocks, *like.shape), dtype=like.dtype, device=device)
            free += reversed(slab.unbind())
        return free.pop()

    def give_back(self, place: Tensor) -> None:
        self._free[place.shape, place.dtype, place.device].append(place)


class _MemorySegment:
    """Blocks that are tensors, on the device they came from or in main memory."""

    in_memory = True

    def __init__(self) -> None:
        self.number = next(_segment_numbers)
        self._blocks: list[Tensor] = []
        self._slabs = _Slabs(_SLAB_BLOCKS)

    def append(self, block: Tensor, device: torch.device) -> int:
        self._blocks.append(self._slabs.take(block, device).copy_(block))
        return len(self._blocks) - 1

    def read(self, index: int) -> Tensor:
        return self._blocks[index]


class _FileSegment:
    """Blocks one after the other in a nameless file, which goes with this object."""

    in_memory = False

    def __init__(self, folder: Path) -> None:
        self.number = next(_segment_numbers)
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._blocks: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0
        self._lock = threading.Lock()

    def append(self, block: Tensor) -> int:
        data = _bytes_of(block)
        with self._lock:
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
                self._file.seek(self._end)
                _write_all(self._file, data)
            except OSError as error:
                raise _not_written(self._folder, error, self._end + len(data)) from error
            self._blocks.append((self._end, block.shape, block.dtype))
            self._end += len(data)
            return len(self._blocks) - 1

    def read(self, index: int) -> Tensor:
        start, shape, dtype = self._blocks[index]
        raw = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]
        with self._lock:
            assert self._file is not None  # something was appended
            self._file.seek(start)
            done = 0
            while done < len(view):
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise StoreError(f"a file in {self._folder} became shorter while it was in use")
                done += count
        return raw.view(dtype).view(shape)


class SavedSegment:
    """Blocks that are the rows of one tensor in a safetensors file, read when asked for.

    Parameters
    ----------
    opened
        The file, opened with ``safetensors.safe_open(..., framework="pt")``.
    name
        The tensor's name.
    """

    in_memory = False

    def __init__(self, opened: Any, name: str) -> None:
        self.number = next(_segment_numbers)
        self._rows = opened.get_slice(name)

    def read(self, index: int) -> Tensor:
        """Return row `index`, without its first axis."""
        row: Tensor = self._rows[index : index + 1]
        return row[0]


# Writing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written piece by piece.

    Parameters
    ----------
    name
        Its name in the file.
    dtype, shape
        Of the whole.
    pieces
        Tensors whose elements, one after the other, are the whole.
    """

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    pieces: Iterable[Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSource:
        """Return a source for a tensor that is at hand."""
        return cls(name, tensor.dtype, tuple(tensor.shape), (tensor,))


def write_safetensors(path: Path, sources: Sequence[TensorSource]) -> None:
    """Write a safetensors file of any size, holding one piece at a time in memory.

    Parameters
    ----------
    path
        The file; an existing one is replaced.
    sources
        What to write, in this order.

    Raises
    ------
    bakeoff.errors.CacheError
        If the disk is full or may not be written.
    bakeoff.errors.DataError
        If the pieces of a tensor do not add up to its shape.

    Examples
    --------
    >>> from safetensors.torch import load_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "two.safetensors"
    ...     rows = TensorSource("rows", torch.float32, (2, 3), (torch.ones(3) for _ in range(2)))
    ...     write_safetensors(path, [rows])
    ...     load_file(path)["rows"].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    header: dict[str, Any] = {}
    offset = 0
    for source in sources:
        size = torch.Size(source.shape).numel() * source.dtype.itemsize
        header[source.name] = {
            "dtype": _SAFETENSORS_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    try:
        with open(path, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            for source in sources:
                expected = header[source.name]["data_offsets"]
                left = expected[1] - expected[0]
                for data in _data(source):
                    left -= len(data)
                    stream.write(data)
                if left:
                    raise DataError(
                        f"the pieces of {source.name} do not fill its shape {tuple(source.shape)}: "
                        f"{left} bytes are missing"
                    )
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror or error}); it needs {offset:,} bytes"
        ) from error


def _data(source: TensorSource) -> Iterator[memoryview]:
    for piece in source.pieces:
        if piece.dtype != source.dtype:
            raise DataError(f"a piece of {source.name} is {piece.dtype}, not {source.dtype}")
        yield _bytes_of(piece)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(stream: IO[bytes], data: memoryview) -> None:
    """Write all of it: an unbuffered write to a disk that is nearly full may stop half-way."""
    while data:
        data = data[stream.write(data) :]


def _not_written(folder: Path, error: OSError, size: int | None = None) -> CacheError:
    reached = "" if size is None else f" when the memory's file had to grow to {size:,} bytes"
    return CacheError(
        f"the folder {folder} cannot be written ({error.strerror or error}){reached}: free some "
        "space, choose another disk with offload_folder=, or keep the blocks in main memory with "
        "offload='cpu'"
    )


# One layer's memory -------------------------------------------------------------------------------


class Rotary:
    """A model's own rotary embedding, applied at positions of our choice.

    Parameters
    ----------
    table
        Function of a number n and a tensor (for its dtype and device) that returns the cosines and
        sines of positions 0 to n - 1, each ``(1, n, d)``; None where a layer has no positions.
    apply
        The model's function of queries, keys, cosines and sines.
    longest
        Largest n to ask for, if a longer table would have other frequencies.
    """

    def __init__(
        self,
        table: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None,
        apply: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        longest: int | None = None,
    ) -> None:
        self._make = table
        self._apply = apply
        self.longest = longest
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def turn(self, queries: Tensor, keys: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Rotate both, ``(N, heads, n, D)``, to the positions from `first` on."""
        if self._make is None:
            return queries, keys
        last = first + queries.shape[2]
        cosines, sines = (part[:, first:last] for part in self._table(last, queries))
        return self._rotate(queries, keys, cosines, sines)

    def turn_far(self, queries: Tensor, position: int) -> Tensor:
        """Rotate all queries to one position, for keys that are taken to stand at position 0."""
        if self._make is None:
            return queries
        cosines, sines = self._table(position + 1, queries)
        turned, _ = self._rotate(
            queries, queries[:, :1], cosines[:, position : position + 1], sines[:, position:][:, :1]
        )
        # A scaled embedding (YaRN) scales keys at position 0 too; ours are kept without it.
        one = torch.ones_like(queries[:1, :1, :1])
        at_zero, _ = self._rotate(one, one, cosines[:, :1], sines[:, :1])
        return turned * at_zero

    def _rotate(
        self, queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor]:
        width = cosines.shape[-1]
        if width >= queries.shape[-1]:
            return self._apply(queries, keys, cosines, sines)
        turned = self._apply(queries[..., :width], keys[..., :width], cosines, sines)
        return (
            torch.cat((turned[0], queries[..., width:]), -1),
            torch.cat((turned[1], keys[..., width:]), -1),
        )

    def _table(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self._make is not None
        found = self._tables.get((like.dtype, like.device))
        if found is None or found[0].shape[1] < length:
            known = 0 if found is None else found[0].shape[1]
            wanted = max(length, 2 * known, _FIRST_CAPACITY)
            if self.longest is not None:
                wanted = max(length, min(wanted, self.longest))
            found = self._make(wanted, like)
            self._tables[like.dtype, like.device] = found
        return found


class LayerMemory(CacheLayerMixin):  # type: ignore[misc]
    """What one attention layer remembers of N sequences, and its attention over it.

    Keys are kept as they are before rotation. The newest tokens lie in buffers, in which a token's
    slot is its position: only differences of positions matter inside the window. What makes or
    changes buffers leaves torch's inference mode: they are written to outside of it later.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        settings: MemorySettings,
        rotary: Rotary,
        store: BlockStore,
        sliding_window: int | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.rotary = rotary
        self.store = store
        self.window = settings.n_local if sliding_window is None else sliding_window
        self.has_memory = sliding_window is None
        self.on_failure = on_failure
        self._forget()

    def _forget(self) -> None:
        self.length = 0
        self.is_initialized = False
        self._start = self._end = 0
        self._raw: Tensor | None = None  # (N, G, capacity, D), as are the next two
        self._turned: Tensor | None = None
        self._values: Tensor | None = None
        self._mass: Tensor | None = None  # (N, H, capacity)
        self._init: Tensor | None = None  # (2, N, G, up to n_init, D)
        self._representatives: Tensor | None = None  # (N, capacity, H, D)
        self.n_blocks = 0
        self.handles: list[list[BlockHandle]] = []
        self.chosen: list[list[int]] = []
        self._gathered: Tensor | None = None  # (N, 2, G, topk * block_size, D)
        self._slots: list[list[int]] = []

    # What transformers asks of a cache's layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffers are made by the first attention."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, marked with this memory for the attention to find."""
        # A fresh view: the mark must not outlive this call on a tensor that is used elsewhere.
        marked = key_states.view(key_states.shape)
        marked.infllm_memory = self  # type: ignore[attr-defined]
        return marked, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset that a mask would have."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: tokens that left the window are spread over blocks."""
        raise DataError(
            "an InfLLM memory cannot take tokens back, which assisted generation needs: generate "
            "without an assistant model"
        )

    def reset(self) -> None:
        """Forget everything."""
        self._forget()

    @torch.inference_mode(False)
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence ``beam_idx[i]`` remembers; blocks are shared."""
        if self._raw is None:
            return
        picks = beam_idx.tolist()
        for name in ("_raw", "_turned", "_values", "_mass", "_representatives", "_gathered"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, beam_idx.to(tensor.device)))
        if self._init is not None:
            self._init = self._init.index_select(1, beam_idx.to(self._init.device))
        self.handles = [list(self.handles[i]) for i in picks] if self.handles else []
        self.chosen = [list(self.chosen[i]) for i in picks] if self.chosen else []
        self._slots = [list(self._slots[i]) for i in picks] if self._slots else []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, next to each other."""
        if self._raw is not None:
            self.reorder_cache(torch.arange(self._raw.shape[0]).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before the first."""
        return -1 if self._raw is None else self._raw.shape[0]

    # Attention

    @torch.inference_mode(False)
    @torch.no_grad()
    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Read new tokens, in chunks, and return their attention.

        Parameters
        ----------
        queries
            ``(N, H, n, D)``, not rotated.
        keys, values
            ``(N, G, n, D)``, not rotated; H is a multiple of G.
        scaling
            Factor of the logits; ``D ** -0.5`` if None.
        softcap
            Bound on the logits, as in Gemma 2; None for none.

        Returns
        -------
        Tensor
            ``(N, H, n, D)``, in the dtype of `queries`.
        """
        if self._raw is not None and self._raw.shape[0] != queries.shape[0]:
            raise DataError(
                f"this memory holds {self._raw.shape[0]} sequences and was given {queries.shape[0]}"
            )
        scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
        step = self.settings.exec_chunk
        done = [
            self._chunk(
                queries[:, :, s : s + step],
                keys[:, :, s : s + step],
                values[:, :, s : s + step],
                scaling,
                softcap,
            )
            for s in range(0, queries.shape[2], step)
        ]
        return done[0] if len(done) == 1 else torch.cat(done, 2)

    def _chunk(
        self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        n_new = queries.shape[2]
        self._make_room(keys, values, queries.shape[1], n_new)
        assert self._raw is not None
        assert self._turned is not None
        assert self._values is not None
        assert self._mass is not None
        first, end = self._end, self._end + n_new
        turned_queries, turned_keys = self.rotary.turn(queries, keys, first)
        self._raw[:, :, first:end] = keys
        self._turned[:, :, first:end] = turned_keys
        self._values[:, :, first:end] = values
        self._mass[:, :, first:end] = 0

        near = max(self._start, first - self.window + 1)
        parts = [
            (turned_queries, self._turned[:, :, near:end], self._values[:, :, near:end]),
            *self._distant(queries, end),
        ]
        output, near_mass = _shared_softmax(
            parts, scaling, softcap, self._masks(near, end, n_new, len(parts)), self.has_memory
        )
        if near_mass is not None:
            self._mass[:, :, near:end] += near_mass
        self._end = end
        self.length += n_new
        self._move_out()
        return output

    def _masks(self, near: int, end: int, n_new: int, n_parts: int) -> list[Tensor | None]:
        """Return, for each part of the attention, which keys each query sees; None for all."""
        masks: list[Tensor | None] = [None] * n_parts
        if n_new == 1:
            return masks
        assert self._raw is not None
        asking = torch.arange(end - n_new, end, device=self._raw.device)[:, None]
        distance = asking - torch.arange(near, end, device=asking.device)
        masks[0] = (distance >= 0) & (distance < self.window)
        n_leaving = self._n_leaving(end)
        if self.has_memory and n_leaving and self.settings.exact_mask:
            leaving = torch.arange(self._start, self._start + n_leaving, device=asking.device)
            masks[-1] = asking - leaving >= self.window
        return masks

    def _n_leaving(self, end: int) -> int:
        """Return how many slots leave the window, still to be seen, if it ends at `end`."""
        return max(0, end - self.window - self._start)

    def _distant(self, queries: Tensor, end: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return queries, keys and values for what lies outside the window.

        The last part is those tokens of the buffer that leave the window in this chunk.
        """
        assert self._raw is not None
        assert self._values is not None
        n_leaving = self._n_leaving(end)
        if not self.has_memory or not (n_leaving or self._init is not None or self.n_blocks):
            return []
        far = self.rotary.turn_far(queries, self.window - 1)
        parts = []
        if self._init is not None:
            parts.append((far, self._init[0], self._init[1]))
        if self.n_blocks and self.settings.topk:
            parts.append((far, *self._retrieved(far)))
        if n_leaving:
            leaving = slice(self._start, self._start + n_leaving)
            parts.append((far, self._raw[:, :, leaving], self._values[:, :, leaving]))
        return parts

    def _retrieved(self, far: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(N, G, tokens, D)`` of the blocks most relevant to a chunk."""
        settings = self.settings
        n_units = far.shape[0]
        n_chosen = min(self.n_blocks, settings.topk)
        if self.n_blocks == n_chosen:
            self.chosen = [list(range(n_chosen)) for _ in range(n_units)]
        else:
            assert self._representatives is not None
            known = self._representatives[:, : self.n_blocks].flatten(2)
            asked = far.float().mean(2).to(known.dtype).flatten(1)
            scores = torch.matmul(known, asked[:, :, None])[:, :, 0]
            self.chosen = [sorted(ids) for ids in scores.topk(n_chosen).indices.tolist()]
        size = settings.block_size
        if self._gathered is None:
            shape = (n_units, 2, self._kv_heads, settings.topk * size, far.shape[-1])
            self._gathered = far.new_empty(shape)
            self._slots = [[-1] * settings.topk for _ in range(n_units)]
        # A block that stays chosen stays where it is; its place does not matter to attention.
        for unit, ids in enumerate(self.chosen):
            slots = self._slots[unit]
            held = {slots[place] for place in range(n_chosen)}
            wanted = set(ids)
            for block in held & wanted:
                self.store.touch(self.handles[unit][block])
            places = iter([place for place in range(n_chosen) if slots[place] not in wanted])
            for block in ids:
                if block in held:
                    continue
                place = next(places)
                self._gathered[unit, :, :, place * size : (place + 1) * size] = self.store.get(
                    self.handles[unit][block], far.device
                )
                slots[place] = block
        tokens = self._gathered[:, :, :, : n_chosen * size]
        return tokens[:, 0], tokens[:, 1]

    @property
    def _kv_heads(self) -> int:
        assert self._raw is not None
        return self._raw.shape[1]

    def _move_out(self) -> None:
        """Move what left the window to the initial tokens and to blocks."""
        if not self.has_memory:
            self._start = max(self._start, self._end - self.window)
            return
        self._fill_init()
        settings = self.settings
        while self._end - self._start - settings.block_size >= settings.n_local:
            self._make_block()

    def _fill_init(self) -> None:
        """Move what left the window to the initial tokens, while there is room for more."""
        moved = self._n_leaving_for_init(self._end)
        if moved > 0:
            assert self._raw is not None
            assert self._values is not None
            window = slice(self._start, self._start + moved)
            fresh = torch.stack((self._raw[:, :, window], self._values[:, :, window]))
            self._init = fresh if self._init is None else torch.cat((self._init, fresh), 3)
            self._start += moved

    def _n_leaving_for_init(self, end: int) -> int:
        """Return how many tokens leave the window to become initial ones, if it ends at `end`."""
        filled = 0 if self._init is None else self._init.shape[3]
        return max(0, min(self.settings.n_init - filled, end - self.window - self._start))

    def _make_block(self) -> None:
        settings = self.settings
        assert self._raw is not None
        assert self._values is not None
        assert self._mass is not None
        window = slice(self._start, self._start + settings.block_size)
        keys, values = self._raw[:, :, window], self._values[:, :, window]
        n_units, n_heads = self._mass.shape[:2]
        strongest = self._mass[:, :, window].topk(settings.repr_topk, -1).indices
        per_head = keys.repeat_interleave(n_heads // keys.shape[1], 1)
        index = strongest[..., None].expand(-1, -1, -1, keys.shape[-1])
        mean = per_head.gather(2, index).float().mean(2).to(keys.dtype)
        table = self._representatives
        if table is None or table.shape[1] == self.n_blocks:
            capacity = 16 if table is None else self.n_blocks + max(16, self.n_blocks // 2)
            grown = mean.new_empty((n_units, capacity, *mean.shape[1:]))
            if table is not None:
                grown[:, : self.n_blocks] = table
            self._representatives = table = grown
        table[:, self.n_blocks] = mean
        if not self.handles:
            self.handles = [[] for _ in range(n_units)]
        for unit in range(n_units):
            block = torch.stack((keys[unit], values[unit]))
            self.handles[unit].append(self.store.append(block))
        self.n_blocks += 1
        self._start += settings.block_size

    def capacity_limit(self) -> int:
        """Return how many slots the buffers have at most, in tokens."""
        settings = self.settings
        spare = max(self.window // 2, settings.exec_chunk)
        return self.window + settings.block_size + settings.exec_chunk + spare

    def _make_room(self, keys: Tensor, values: Tensor, n_heads: int, n_new: int) -> None:
        """Have `n_new` free slots behind the newest token, moving the buffers' content if need be.

        The slots start anew each time, so that positions stay small however long the text is.
        """
        live = self._end - self._start
        capacity = 0 if self._raw is None else self._raw.shape[2]
        if self._end + n_new <= capacity:
            return
        limit = self.capacity_limit()
        wanted = live + n_new
        if capacity < limit:
            capacity = min(limit, max(2 * capacity, 2 * wanted, _FIRST_CAPACITY))
            capacity = max(capacity, wanted)
        window = slice(self._start, self._end)
        n_units, n_groups, _, width = keys.shape

        def moved(old: Tensor | None, like: Tensor, heads: int, *shape: int) -> Tensor:
            if old is None:
                return like.new_empty((n_units, heads, capacity, *shape))
            if old.shape[2] == capacity:
                old[:, :, :live] = old[:, :, window].clone()
                return old
            new = old.new_empty((n_units, heads, capacity, *shape))
            new[:, :, :live] = old[:, :, window]
            return new

        first_time = self._raw is None
        self._raw = moved(self._raw, keys, n_groups, width)
        self._values = moved(self._values, values, n_groups, values.shape[-1])
        self._mass = moved(self._mass, keys.new_empty(0, dtype=torch.float32), n_heads)
        if self._turned is None or self._turned.shape[2] != capacity:
            self._turned = torch.empty_like(self._raw)
        if not first_time and live:
            kept = self._raw[:, :, :live]
            self._turned[:, :, :live] = self.rotary.turn(kept, kept[:, :1], 0)[0]
        self._start, self._end = 0, live
        self.is_initialized = True

    # Inspection, copying, saving

    def spans(self) -> list[list[tuple[int, int]]]:
        """Return, per sequence, the token spans of the blocks that the last chunk looked at."""
        n_init = 0 if self._init is None else self._init.shape[3]
        size = self.settings.block_size
        return [[(n_init + b * size, n_init + (b + 1) * size) for b in ids] for ids in self.chosen]

    def resident_bytes(self) -> int:
        """Return the size of all tensors that this layer holds, its stored blocks apart."""
        tensors = (
            self._raw,
            self._turned,
            self._values,
            self._mass,
            self._init,
            self._representatives,
            self._gathered,
        )
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def block_bytes(self) -> int:
        """Return the size of one stored block."""
        if self._raw is None:
            return 0
        _, groups, _, width = self._raw.shape
        return 2 * groups * self.settings.block_size * width * self._raw.element_size()

    def copied(self, store: BlockStore) -> LayerMemory:
        """Return an independent memory of the same text; stored blocks are shared."""
        twin = type(self)(
            self.settings,
            self.rotary,
            store,
            None if self.has_memory else self.window,
            self.on_failure,
        )
        if self._raw is not None:
            twin.restore(self.state(), self.handles)
        return twin

    def state(self) -> dict[str, Tensor]:
        """Return everything that is not in blocks, as tensors, N sequences first.

        ``recent`` is ``(N, 2, G, n, D)``, ``mass`` ``(N, H, n)``, ``init`` ``(N, 2, G, m, D)`` and
        ``representatives`` ``(N, blocks, H, D)``.
        """
        if self._raw is None or self._values is None or self._mass is None:
            raise DataError("nothing has been read yet")
        window = slice(self._start, self._end)
        raw, values = self._raw[:, :, window], self._values[:, :, window]
        n_units, n_groups, _, width = raw.shape
        n_heads = self._mass.shape[1]
        empty = raw.new_empty
        return {
            "recent": torch.stack((raw, values), 1),
            "mass": self._mass[:, :, window].clone(),
            "init": empty((n_units, 2, n_groups, 0, width))
            if self._init is None
            else self._init.transpose(0, 1).clone(),
            "representatives": empty((n_units, 0, n_heads, width))
            if self._representatives is None
            else self._representatives[:, : self.n_blocks].clone(),
        }

    @torch.inference_mode(False)
    def restore(
        self, state: dict[str, Tensor], handles: list[list[BlockHandle]], length: int | None = None
    ) -> None:
        """Take up what `state` returned, and the blocks that went with it."""
        self._forget()
        recent = state["recent"]
        n_init, n_blocks = state["init"].shape[3], state["representatives"].shape[1]
        self._make_room(recent[:, 0], recent[:, 1], state["mass"].shape[1], recent.shape[3])
        assert self._raw is not None
        assert self._turned is not None
        assert self._values is not None
        assert self._mass is not None
        live = recent.shape[3]
        self._raw[:, :, :live] = recent[:, 0]
        self._values[:, :, :live] = recent[:, 1]
        self._mass[:, :, :live] = state["mass"]
        self._turned[:, :, :live] = self.rotary.turn(recent[:, 0], recent[:, 0, :1], 0)[0]
        self._end = live
        if n_init:
            self._init = state["init"].transpose(0, 1).clone()
        if n_blocks:
            self._representatives = state["representatives"].clone()
        self.n_blocks = n_blocks
        self.handles = [list(ids) for ids in handles]
        self.length = n_init + n_blocks * self.settings.block_size + live
        if length is not None:  # a sliding layer has dropped tokens that it cannot count
            self.length = length


class WindowLayer(LayerMemory):
    """A layer that remembers its first tokens and a window, and forgets the rest for good.

    What attention sinks and a lambda-shaped mask come to (StreamingLLM, LM-Infinite): the first
    `n_init` tokens count as `n_local` - 1 tokens away once they have left the window, as in the
    latter. There are no blocks; `block_size`, `topk` and `repr_topk` mean nothing here.

    References
    ----------
    Guangxuan Xiao et al. "Efficient Streaming Language Models with Attention Sinks". ICLR 2024.
    arXiv:2309.17453. Chi Han et al. "LM-Infinite: Zero-Shot Extreme Length Generalization for Large
    Language Models". NAACL 2024. arXiv:2308.16137.
    """

    def _n_leaving(self, end: int) -> int:
        """Return how many of the first tokens leave the window; nobody sees the others again."""
        return self._n_leaving_for_init(end)

    def _move_out(self) -> None:
        if self.has_memory:
            self._fill_init()
        self._start = max(self._start, self._end - self.window)


def _shared_softmax(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    scaling: float,
    softcap: float | None,
    masks: Sequence[Tensor | None],
    with_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend to several sets of keys under one softmax.

    Each part is queries ``(N, H, n, D)`` with keys and values ``(N, G, m, D)``. Returns
    ``(N, H, n, D)`` and, of the first part, the probability each key got, summed over the queries:
    ``(N, H, m)``.
    """
    n_units, n_heads, n_new, _ = parts[0][0].shape
    n_groups = parts[0][1].shape[1]
    shape = (n_units, n_groups, n_heads // n_groups, n_new)
    ends = [0]
    for _, keys, _ in parts:
        ends.append(ends[-1] + keys.shape[2])
    logits = parts[0][0].new_empty((*shape, ends[-1]), dtype=torch.float32)
    for number, (queries, keys, _) in enumerate(parts):
        grouped = queries.reshape(n_units, n_groups, -1, queries.shape[-1])
        product = torch.matmul(grouped, keys.transpose(2, 3)).view(*shape, -1)
        logits[..., ends[number] : ends[number + 1]] = product
    logits *= scaling
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    for number, mask in enumerate(masks):
        if mask is not None:
            logits[..., ends[number] : ends[number + 1]].masked_fill_(~mask, -torch.inf)
    probabilities = torch.softmax(logits, -1)
    del logits
    output: Tensor | None = None
    for number, (_, _, values) in enumerate(parts):
        share = probabilities[..., ends[number] : ends[number + 1]].to(values.dtype)
        # Distant parts come after the window, so that the sum starts with what full attention has.
        product = torch.matmul(share.reshape(n_units, n_groups, -1, share.shape[-1]), values)
        output = product if output is None else output + product
    assert output is not None
    output = output.view(n_units, n_heads, n_new, -1)
    mass = probabilities[..., : ends[1]].sum(3).view(n_units, n_heads, -1) if with_mass else None
    return output, mass
