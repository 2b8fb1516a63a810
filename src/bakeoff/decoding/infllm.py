"""InfLLM: read far beyond the training window with a memory of key-value blocks, no training."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bakeoff._files import cache_directory
from bakeoff.decoding.block_memory import (
    BlockHandle,
    BlockStore,
    LayerMemory,
    MemorySettings,
    Offload,
    Rotary,
    SavedSegment,
    TensorSource,
    write_safetensors,
)
from bakeoff.errors import CacheError, DataError, ModelError, StoreError
from bakeoff.models.attention import backbone

if TYPE_CHECKING:
    from bakeoff.models import LanguageModel

METHOD = {
    "slug": "infllm",
    "title": "Training-free context memory of key-value blocks",
    "paper": "Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs with an "
    "Efficient Context Memory, NeurIPS 2024, arXiv 2402.04617",
    "designs": ["infllm"],
    "names": ["InfLLM", "InfLLMCache"],
}

ATTENTION = "bakeoff_infllm"
FORMAT = 1
_PROBE_LENGTH = 12
# Rotary embeddings whose frequencies depend on how long the input is.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_PATCHED: weakref.WeakKeyDictionary[nn.Module, InfLLM] = weakref.WeakKeyDictionary()


# The cache ----------------------------------------------------------------------------------------


class InfLLMCache(Cache):  # type: ignore[misc]
    """A context memory that takes the place of transformers' key-value cache.

    Made by `InfLLM.new_cache`, `InfLLM.read` and `InfLLM.load`, or by ``generate`` itself. Give it
    as ``past_key_values``. Several sequences may share it if they are equally long.

    Examples
    --------
    >>> cache = patched.read(document_ids)  # doctest: +SKIP
    >>> cache.stats()["blocks"], cache.retrieved_blocks(layer=3)  # doctest: +SKIP
    """

    def __init__(self, patched: InfLLM, settings: MemorySettings | None = None) -> None:
        self.patched = patched
        self.store = BlockStore(patched.offload, patched.offload_folder, patched.cache_capacity)
        super().__init__(
            layers=[
                patched.layer_class(
                    patched.settings if settings is None else settings,
                    rotary,
                    self.store,
                    window,
                    patched.unpatch,
                )
                for rotary, window in zip(patched.rotaries, patched.windows, strict=True)
            ]
        )
        self._ids: Tensor | None = None  # (N, room for more)
        self._ids_known = True
        self._n_noted = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> InfLLMCache:
        return self.copy()

    @property
    def n_tokens(self) -> int:
        """Number of tokens read so far."""
        return int(self.layers[0].length)

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before anything was read."""
        return int(self.layers[0].batch_size)

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens read so far, ``(N, n_tokens)`` int64 on the CPU; None if embeddings were."""
        if not self._ids_known:
            return None
        if self._ids is None:
            return torch.empty((max(1, self.batch_size), 0), dtype=torch.int64)
        return self._ids[:, : self._n_noted].clone()

    @torch.inference_mode(False)
    def noted(self, input_ids: Tensor | None) -> None:
        """Remember which tokens were read."""
        before, self._n_noted = self._n_noted, self.n_tokens
        if input_ids is None or not self._ids_known:
            self._ids, self._ids_known = None, False
            return
        if self._ids is None or self._ids.shape[1] < self._n_noted:
            # In a buffer that doubles: small tensors that stay would leave holes in the heap.
            room = max(1024, 2 * self._n_noted)
            grown = torch.empty((input_ids.shape[0], room), dtype=torch.int64)
            if self._ids is not None:
                grown[:, :before] = self._ids[:, :before]
            self._ids = grown
        self._ids[:, before : self._n_noted] = input_ids.detach().cpu()

    def reset(self) -> None:
        """Forget everything and free the memory and the disk space."""
        super().reset()
        self.store.clear()
        self._ids, self._ids_known = None, True
        self._n_noted = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of beam search; stored blocks are shared between beams."""
        super().reorder_cache(beam_idx)
        self._reorder_ids(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, next to each other."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        super().batch_select_indices(indices)
        self._reorder_ids(indices)

    @torch.inference_mode(False)
    def _reorder_ids(self, indices: Tensor) -> None:
        if self._ids is not None:
            self._ids = self._ids[indices.to("cpu")]

    @torch.inference_mode(False)
    def copy(self) -> InfLLMCache:
        """Return an independent cache of the same text, to ask it something and throw it away.

        Stored blocks are shared, the window is copied.
        """
        twin: InfLLMCache = InfLLMCache.__new__(InfLLMCache)
        twin.patched = self.patched
        twin.store = self.store.fork()
        Cache.__init__(twin, layers=[layer.copied(twin.store) for layer in self.layers])
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            theirs.length = mine.length
        twin._ids = None if self._ids is None else self._ids.clone()
        twin._ids_known, twin._n_noted = self._ids_known, self._n_noted
        return twin

    def stats(self) -> dict[str, int]:
        """Say how much is kept, and where.

        Returns
        -------
        dict
            ``tokens`` read; ``blocks`` stored in all layers and sequences; ``hits`` and ``misses``
            of the cache of recent blocks, and ``cached`` blocks in it; ``resident_bytes``, all
            that is held on the device; ``offloaded_bytes``, the blocks in main memory or on disk.
        """
        blocks = [sum(map(len, layer.handles)) for layer in self.layers]
        stored = sum(n * layer.block_bytes() for n, layer in zip(blocks, self.layers, strict=True))
        resident = sum(layer.resident_bytes() for layer in self.layers)
        device = self.patched.backbone.device
        if self.patched.offload == "none":
            resident, stored = resident + stored, 0
        elif self.patched.offload == "disk" or device.type != "cpu":
            resident += self.store.cached * max(layer.block_bytes() for layer in self.layers)
        return {
            "tokens": self.n_tokens,
            "blocks": sum(blocks),
            "hits": self.store.hits,
            "misses": self.store.misses,
            "cached": self.store.cached,
            "resident_bytes": resident,
            "offloaded_bytes": stored,
        }

    def retrieved_blocks(self, layer: int, sequence: int = 0) -> list[tuple[int, int]]:
        """Return which tokens the last chunk, or the last generated token, looked up in a layer.

        Returns
        -------
        list of (start, end)
            Half-open spans of token numbers, in order; empty if nothing was.

        Raises
        ------
        bakeoff.errors.DataError
            If there is no such layer or sequence.
        """
        if not -len(self.layers) <= layer < len(self.layers):
            raise DataError(f"layer must be below {len(self.layers)}, got {layer}")
        spans: list[list[tuple[int, int]]] = self.layers[layer].spans()
        if spans and not -len(spans) <= sequence < len(spans):
            raise DataError(f"sequence must be below {len(spans)}, got {sequence}")
        return spans[sequence] if spans else []

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a document that was read to a folder, for `InfLLM.load`.

        ``memory.safetensors`` holds all keys and values, ``memory.json`` the settings and the
        model's fingerprint. Blocks are written one at a time, so that main memory is no limit.

        Parameters
        ----------
        folder
            A folder that does not exist yet, or is empty. It appears when it is complete.

        Raises
        ------
        bakeoff.errors.DataError
            If nothing was read, there is more than one sequence, or the folder is in use.
        bakeoff.errors.CacheError
            If the disk is full or may not be written.
        """
        self.check_whole()
        if self.n_tokens == 0 or self.batch_size != 1:
            raise DataError(
                "save needs a cache that has read one sequence, got "
                + (f"{self.batch_size} sequences" if self.n_tokens else "an empty one")
            )
        folder = Path(folder).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} exists already: give a new folder, or remove it first")
        ids = self.token_ids
        sources = [] if ids is None else [TensorSource.of("token_ids", ids)]
        for number, layer in enumerate(self.layers):
            name = f"layers.{number}"
            sources += [
                TensorSource.of(f"{name}.{key}", tensor) for key, tensor in layer.state().items()
            ]
            if layer.n_blocks:
                recent = layer.state()["recent"]
                _, _, n_groups, _, width = recent.shape
                shape = (layer.n_blocks, 2, n_groups, layer.settings.block_size, width)
                sources.append(
                    TensorSource(f"{name}.blocks", recent.dtype, shape, _blocks_of(layer))
                )
        about = {
            "format": FORMAT,
            "method": "infllm",
            "fingerprint": self.patched.fingerprint(),
            "model_type": self.patched.backbone.config.model_type,
            "settings": asdict(self.layers[0].settings),
            "n_tokens": self.n_tokens,
            "n_layers": len(self.layers),
        }
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
            ) as scratch:
                inner = Path(scratch) / folder.name
                inner.mkdir()
                write_safetensors(inner / "memory.safetensors", sources)
                text = json.dumps(about, indent=1) + "\n"
                (inner / "memory.json").write_text(text, encoding="utf-8")
                os.replace(inner, folder)
        except CacheError:
            raise
        except OSError as error:
            raise CacheError(f"{folder} cannot be written ({error.strerror or error})") from error
        return folder

    def check_whole(self) -> None:
        """Raise if a forward pass was interrupted half-way, so that layers disagree.

        Raises
        ------
        bakeoff.errors.DataError
            If they do.
        """
        lengths = {layer.length for layer in self.layers} | {self._n_noted}
        if len(lengths) > 1:
            raise DataError(
                "this cache was left in the middle of a forward pass (its layers have read "
                f"{min(lengths)} to {max(lengths)} tokens): call reset(), or read the text again"
            )


def _blocks_of(layer: LayerMemory) -> Iterator[Tensor]:
    for handle in layer.handles[0]:
        yield handle.segment.read(handle.index)


# Patching -----------------------------------------------------------------------------------------


class InfLLM:
    """A model whose attention has a context memory; made by `patch`, undone by `unpatch`.

    Also a context manager, which takes the memory out again when the block ends.

    Attributes
    ----------
    model
        The patched model: its ``generate`` and its forward pass use the memory.
    settings
        The sizes that are in force.
    """

    def __init__(
        self,
        model: Any,
        settings: MemorySettings,
        offload: Offload,
        offload_folder: Path | None,
        max_cached_blocks: int,
        prefill_chunk: int,
    ) -> None:
        self.model = model
        self.settings = settings
        self.offload: Offload = offload
        self.offload_folder = offload_folder
        self.prefill_chunk = prefill_chunk
        self.backbone: Any = backbone(model)
        self.windows = _sliding_windows(self.backbone)
        self.rotaries = _rotaries(self.backbone)
        n_memories = sum(window is None for window in self.windows)
        self.cache_capacity = max_cached_blocks * n_memories
        # What its caches are made of; the rivals in document_baselines have another kind.
        self.layer_class: type[LayerMemory] = LayerMemory
        self._fingerprint: str | None = None
        self._hooks: list[Any] = []
        self._attention_before: str | None = None
        self._pass: tuple[InfLLMCache, Tensor | None, bool] | None = None

    def __enter__(self) -> InfLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    @property
    def is_active(self) -> bool:
        """Whether the model is patched now."""
        return _PATCHED.get(self.backbone) is self

    def unpatch(self) -> None:
        """Restore the model; nothing happens if that was done already."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.is_active:
            del _PATCHED[self.backbone]
            self.backbone.set_attn_implementation(self._attention_before)

    def _install(self) -> None:
        _register_attention()
        self._attention_before = self.backbone.config._attn_implementation
        self.backbone.set_attn_implementation(ATTENTION)
        _PATCHED[self.backbone] = self
        rotary = self.backbone.rotary_emb
        self._hooks = [
            rotary.register_forward_pre_hook(_at_position_zero, with_kwargs=True),
            rotary.register_forward_hook(_no_rotation),
            self.backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            self.backbone.register_forward_hook(self._after_backbone),
        ]
        head = _first_transformers_model(self.model)
        if head is not self.backbone:
            self._hooks.append(head.register_forward_pre_hook(self._before_head, with_kwargs=True))

    # Reading and asking

    def new_cache(self) -> InfLLMCache:
        """Return an empty memory."""
        return InfLLMCache(self)

    def read(
        self,
        input_ids: Tensor | Sequence[int],
        cache: InfLLMCache | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> InfLLMCache:
        """Read a text into a memory, piece by piece, without computing any logits.

        Parameters
        ----------
        input_ids
            Token ids, ``(N, n)`` or ``(n,)``. N texts must be equally long.
        cache
            The memory to add to; a new one if None.
        progress
            Called after every piece with the number of tokens read and their total.

        Returns
        -------
        InfLLMCache
            The memory, `cache` itself if one was given.

        Raises
        ------
        bakeoff.errors.DataError
            If there are no tokens, or the model is not patched any more.
        bakeoff.errors.CacheError
            If the disk is full; the model is then restored.
        """
        self._check_active()
        ids = _as_ids(input_ids, self.backbone.device)
        cache = self.new_cache() if cache is None else cache
        with torch.no_grad():
            for start in range(0, ids.shape[1], self.prefill_chunk):
                piece = ids[:, start : start + self.prefill_chunk]
                self.backbone(input_ids=piece, past_key_values=cache, use_cache=True)
                if progress is not None:
                    progress(start + piece.shape[1], ids.shape[1])
        return cache

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        document: InfLLMCache | None = None,
        **arguments: Any,
    ) -> Any:
        """Continue a text, or ask a question about a document that was read before.

        Parameters
        ----------
        input_ids
            Token ids of what comes after the document, ``(N, n)`` or ``(n,)``.
        document
            What was read before. It stays as it is, so that it can be asked again.
        **arguments
            As for the model's ``generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``, ...

        Returns
        -------
        Tensor
            The new tokens alone, ``(N, up to max_new_tokens)`` int64; with
            ``return_dict_in_generate=True``, whatever the model returns.

        Raises
        ------
        bakeoff.errors.DataError
            If the model is not patched any more, or the document was read as embeddings.
        bakeoff.errors.CacheError
            If the disk is full; the model is then restored.
        """
        self._check_active()
        ids = _as_ids(input_ids, self.backbone.device)
        cache = self.new_cache() if document is None else document.copy()
        if cache.n_tokens:
            before = cache.token_ids
            if before is None:
                raise DataError("the document was read as embeddings: its tokens are not known")
            if before.shape[0] != ids.shape[0]:
                if before.shape[0] != 1:
                    raise DataError(
                        f"{before.shape[0]} documents cannot go with {ids.shape[0]} questions"
                    )
                before = before.expand(ids.shape[0], -1)
            ids = torch.cat((before.to(ids.device), ids), 1)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **arguments
        )
        return output[:, ids.shape[1] :] if isinstance(output, Tensor) else output

    def load(self, folder: str | os.PathLike[str]) -> InfLLMCache:
        """Open a document that `InfLLMCache.save` wrote.

        With ``offload="disk"`` the blocks stay in that folder and are read from there when they
        are needed; otherwise they are read now.

        Raises
        ------
        bakeoff.errors.StoreError
            If there is no document, or it is damaged or of another version.
        bakeoff.errors.DataError
            If another model read it, or with sizes other than those of this patch.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(folder).expanduser()
        about = _read_about(folder)
        if about["fingerprint"] != self.fingerprint():
            raise DataError(
                f"{folder} was read by another model ({about.get('model_type', 'unknown')}, "
                f"fingerprint {str(about['fingerprint'])[:12]}; this one is "
                f"{self.backbone.config.model_type}, {self.fingerprint()[:12]}): its keys and "
                "values mean nothing here. Read the text again"
            )
        mine = asdict(self.settings)
        needed = ("n_init", "n_local", "block_size", "repr_topk")
        other = [name for name in needed if about["settings"].get(name) != mine[name]]
        if other:
            wanted = ", ".join(f"{name}={about['settings'].get(name)}" for name in other)
            raise DataError(f"{folder} was read with other sizes: patch the model with {wanted}")
        cache = self.new_cache()
        device = self.backbone.device
        try:
            opened: Any = safe_open(folder / "memory.safetensors", framework="pt")
            names = set(opened.keys())
            for number, layer in enumerate(cache.layers):
                name = f"layers.{number}"
                keys = ("recent", "mass", "init", "representatives")
                state = {key: opened.get_tensor(f"{name}.{key}").to(device) for key in keys}
                n_blocks = state["representatives"].shape[1]
                handles: list[BlockHandle] = []
                if n_blocks:
                    saved = SavedSegment(opened, f"{name}.blocks")
                    handles = [BlockHandle(saved, index) for index in range(n_blocks)]
                    if self.offload != "disk":
                        handles = [
                            cache.store.append(saved.read(h.index).to(device)) for h in handles
                        ]
                layer.restore(state, [handles], about["n_tokens"])
            cache._ids_known = "token_ids" in names
            cache._ids = opened.get_tensor("token_ids") if cache._ids_known else None
            cache._n_noted = about["n_tokens"]
        except (OSError, SafetensorError, KeyError, RuntimeError, IndexError) as error:
            raise StoreError(f"{folder} is damaged: {error}") from error
        return cache

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change with the model's weights or configuration.

        Computed once, from all weights; what a saved document is bound to.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            config = self.backbone.config.to_dict()
            for name in ("_name_or_path", "transformers_version", "architectures", "use_cache"):
                config.pop(name, None)
            config = {k: v for k, v in config.items() if not k.startswith("_")}
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for name, weight in self.backbone.named_parameters():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                flat = weight.detach().to("cpu").contiguous().reshape(-1)
                digest.update(memoryview(flat.view(torch.uint8).numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _check_active(self) -> None:
        if not self.is_active:
            raise DataError("the model is not patched any more: call patch(model) again")

    # Hooks

    def _before_head(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Read all but the last token first, where only the last token's logits are wanted."""
        kwargs = _by_name(module, args, kwargs)
        ids = kwargs.get("input_ids")
        keep = kwargs.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep != 1 or ids is None or ids.shape[1] < 2:
            return None
        if kwargs.get("inputs_embeds") is not None or not self._wants_cache(kwargs):
            return None
        _refuse(kwargs, self.backbone.config)
        cache = self._cache_for(kwargs.get("past_key_values"), ids.shape[0])
        self.read(ids[:, :-1], cache)
        kwargs["past_key_values"] = cache
        kwargs["input_ids"] = ids[:, -1:]
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., -1:]
        return (), kwargs

    def _before_backbone(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module.config._attn_implementation != ATTENTION:
            raise ModelError(
                "the attention implementation was set to "
                f"{module.config._attn_implementation!r} while the model was patched; unpatch first"
            )
        if module.training:
            raise ModelError("InfLLM does not train: call model.eval() first")
        kwargs = _by_name(module, args, kwargs)
        _refuse(kwargs, module.config)
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given: Any = ids if embeddings is None else embeddings
        if given is None:
            raise DataError("input_ids or inputs_embeds must be given")
        cache = self._cache_for(kwargs.get("past_key_values"), given.shape[0])
        cache.check_whole()
        kwargs["past_key_values"] = cache
        self._pass = (cache, ids if embeddings is None else None, self._wants_cache(kwargs))
        return (), kwargs

    def _after_backbone(self, module: Any, args: Any, output: Any) -> Any:
        assert self._pass is not None  # set by the hook that ran before the pass
        cache, ids, wanted = self._pass
        self._pass = None
        cache.noted(ids)
        if not wanted and hasattr(output, "past_key_values"):
            output.past_key_values = None
        return output

    def _wants_cache(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        return bool(getattr(self.backbone.config, "use_cache", True) if wanted is None else wanted)

    def _cache_for(self, given: Any, batch: int) -> InfLLMCache:
        if isinstance(given, InfLLMCache):
            if given.patched is not self:
                raise DataError(
                    "this cache belongs to another patch of a model: make one with new_cache(), or "
                    "save it and load it here"
                )
            if given.batch_size == 1 and batch > 1:
                given.batch_repeat_interleave(batch)  # one document, several continuations
            return given
        if given is not None and given.get_seq_length() > 0:
            raise DataError(
                f"past_key_values is a {type(given).__name__} that was filled before the model was "
                "patched: give an InfLLMCache, or none"
            )
        # generate() makes an empty cache of the usual kind; the one returned here replaces it.
        if type(given).__name__ not in ("NoneType", "DynamicCache"):
            raise DataError(
                f"past_key_values must be an InfLLMCache or None, got a {type(given).__name__}: "
                "leave cache_implementation at its default"
            )
        return self.new_cache()


def patch(
    model: nn.Module | LanguageModel,
    *,
    n_init: int = 128,
    n_local: int | None = None,
    block_size: int = 128,
    topk: int = 16,
    repr_topk: int = 4,
    exec_chunk: int | None = None,
    offload: Offload = "cpu",
    offload_folder: str | os.PathLike[str] | None = None,
    max_cached_blocks: int = 32,
    prefill_chunk: int | None = None,
    exact_mask: bool = True,
) -> InfLLM:
    """Give a decoder a memory of everything it has read; no weight is trained.

    A token attends to the `n_init` first tokens, to the `n_local` newest ones, and to the `topk`
    blocks of `block_size` tokens in between that are most relevant to it. All tokens outside the
    window count as `n_local` - 1 tokens away, so that no position is met that training did not
    cover. Afterwards ``model.generate`` and the model's forward pass take inputs of any length.

    Parameters
    ----------
    model
        A `bakeoff.models.LanguageModel` or a transformers decoder with rotary positions (Llama,
        Mistral, Qwen2, Qwen3, Gemma, SmolLM3, Phi-3, OLMo, ...), in eval mode. Every architecture
        is probed: where the patched model does not give what the model itself gives on a short
        text, it is refused. Layers with a sliding window of their own keep it and get no memory.
    n_init
        How many of the first tokens are always attended to.
    n_local
        How many of the newest tokens are, at their true distance. The default is 4096, or half of
        the longest input the model was trained for if that is less. A text no longer than this is
        read exactly as by the model itself.
    block_size
        Tokens per block.
    topk
        How many blocks are looked up for each chunk.
    repr_topk
        How many keys of a block stand for it, per head: those that got the most attention from the
        tokens after them while they were in the window.
    exec_chunk
        How many new tokens share one look-up while a text is read (at most `n_local`); 512 by
        default. Generated tokens look up one by one.
    offload
        Where blocks are kept: ``"cpu"``, in main memory; ``"disk"``, in a nameless file;
        ``"none"``, on the model's device.
    offload_folder
        Where that file is; a folder in bakeoff's cache if None.
    max_cached_blocks
        How many blocks per layer, those used last, stay on the model's device besides those in use.
        Changes speed only.
    prefill_chunk
        How many tokens pass through the model at once while a text is read, a multiple of
        `exec_chunk`; about 4096 by default. Changes memory and speed only.
    exact_mask
        False reproduces the authors' code, in which the first tokens of a chunk see some tokens
        twice, once as near and once as distant.

    Returns
    -------
    InfLLM
        A context manager that restores the model; or call `unpatch`.

    Warns
    -----
    UserWarning
        If a token would attend to more tokens than the model was trained for.

    Raises
    ------
    bakeoff.errors.ModelError
        If the model has no rotary positions, does not let its attention be replaced, trains, or
        has a sliding window in every layer.
    bakeoff.errors.DataError
        If the model is patched already or a size is out of range.
    bakeoff.errors.CacheError
        If `offload_folder` cannot be written to.

    Notes
    -----
    Prompts must be equally long: padding is refused. Where ``generate`` or
    ``logits_to_keep=1`` asks for the last token's logits alone, all tokens before it are read
    first, in pieces, and the last one looks up blocks for itself, as in the authors' code.

    Representative keys stay on the device: ``H / (2 * G * block_size)`` of the size of all keys and
    values, for H query heads and G key-value heads; 1.2 % for SmolLM2.

    References
    ----------
    Chaojun Xiao, Pengle Zhang, Xu Han, Guangxuan Xiao, Yankai Lin, Zhengyan Zhang, Zhiyuan Liu and
    Maosong Sun. "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient
    Context Memory". NeurIPS 2024. arXiv:2402.04617.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, max_position_embeddings=64,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> document = torch.randint(3, 50, (1, 1000))
    >>> with patch(model, n_init=4, n_local=32, block_size=8, topk=3, exec_chunk=16) as infllm:
    ...     memory = infllm.read(document)
    ...     answer = infllm.generate([5, 6, 7], document=memory, max_new_tokens=4, do_sample=False)
    >>> memory.n_tokens, answer.shape, memory.stats()["blocks"]
    (1000, torch.Size([1, 4]), 240)
    """
    plain = _plain_model(model)
    inner: Any = backbone(plain)
    if inner in _PATCHED:
        raise DataError("model is patched already: unpatch(model) first")
    if plain.training:
        raise ModelError("model is in training mode, which InfLLM does not support: model.eval()")
    config = inner.config
    trained = getattr(config, "max_position_embeddings", None)
    if n_local is None:
        n_local = 4096 if trained is None else max(1, min(4096, trained // 2))
    if exec_chunk is None:
        exec_chunk = min(512, n_local)
    settings = MemorySettings(
        n_init, n_local, block_size, topk, repr_topk, exec_chunk, exact_mask
    ).checked()
    if prefill_chunk is None:
        prefill_chunk = exec_chunk * max(1, 4096 // exec_chunk)
    if prefill_chunk < 1 or prefill_chunk % exec_chunk:
        raise DataError(
            f"prefill_chunk must be a multiple of exec_chunk ({exec_chunk}), so that it changes no "
            f"result; got {prefill_chunk}"
        )
    folder = None
    if offload == "disk":
        folder = cache_directory() / "infllm" if offload_folder is None else Path(offload_folder)
    BlockStore(offload, folder, max_cached_blocks)  # refuses bad arguments and folders now
    _refuse_model(inner)
    patched = InfLLM(plain, settings, offload, folder, max_cached_blocks, prefill_chunk)
    _refuse_changing_frequencies(patched)
    budget = n_init + n_local + topk * block_size
    if trained is not None and budget > trained:
        warnings.warn(
            f"a token attends to up to n_init + n_local + topk * block_size = {budget} tokens; "
            f"this model was trained on inputs of {trained}",
            stacklevel=2,
        )
    expected = _probe(inner)
    patched._install()
    try:
        _check_probe(patched, expected)
    except BaseException:
        patched.unpatch()
        raise
    return patched


def unpatch(model: nn.Module | LanguageModel) -> None:
    """Restore a model that `patch` changed.

    Parameters
    ----------
    model
        What was given to `patch`.

    Raises
    ------
    bakeoff.errors.DataError
        If it is not patched.
    """
    patched = _PATCHED.get(backbone(_plain_model(model)))
    if patched is None:
        raise DataError("model is not patched")
    patched.unpatch()


# What the patch is made of ------------------------------------------------------------------------


class _WithoutGradient(torch.autograd.Function):
    """Pass a result on; refuse to differentiate it, rather than give a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ModelError("InfLLM's attention has no gradient: unpatch the model to train it")


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as InfLLM does; called by the model in place of its own attention."""
    memory: LayerMemory | None = getattr(key, "infllm_memory", None)
    if memory is None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} does not hand its keys from the cache to the attention as "
            "they are, or adds attention sinks of its own: InfLLM does not support it"
        )
    try:
        output = memory.attend(query, key, value, scaling, softcap)
    except CacheError:
        if memory.on_failure is not None:
            memory.on_failure()
        raise
    output = output.transpose(1, 2).contiguous()
    if torch.is_grad_enabled() and query.requires_grad:
        output = _WithoutGradient.apply(query, output)  # type: ignore[no-untyped-call]
    return output, None


def _at_position_zero(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep the true positions from embeddings whose frequencies depend on the largest one."""
    kwargs = _by_name(module, args, kwargs)
    kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
    return (), kwargs


def _no_rotation(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Let the model compute keys and queries that are not rotated."""
    cosines, sines = output
    return torch.ones_like(cosines), torch.zeros_like(sines)


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _refuse(kwargs: dict[str, Any], config: Any) -> None:
    """Raise for arguments of a forward pass that the memory cannot honour."""
    wanted = kwargs.get("output_attentions")
    if getattr(config, "output_attentions", False) if wanted is None else wanted:
        raise DataError(
            "output_attentions is not available: a token attends to other tokens in each layer. "
            "InfLLMCache.retrieved_blocks says which blocks were looked up"
        )
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise DataError(
            "attention_mask must be 2-dimensional and all ones, or left out: InfLLM decides itself "
            "what is attended to"
        )
    if not bool(mask.all()):
        raise DataError(
            "attention_mask has zeros: InfLLM takes no padding. Give one prompt at a time, or "
            "prompts that are equally long (generate() also masks a padding token inside a prompt: "
            "give it attention_mask=torch.ones_like(input_ids))"
        )


def _plain_model(model: Any) -> Any:
    from bakeoff.models import LanguageModel

    if isinstance(model, LanguageModel):
        return model.model
    if not isinstance(model, nn.Module):
        raise DataError(
            f"model must be a transformers model or a LanguageModel, got {type(model).__name__}"
        )
    return model


def _first_transformers_model(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _refuse_model(inner: Any) -> None:
    """Raise for a backbone that cannot be patched, saying why and what can."""
    name = f"model: {type(inner).__name__} (architecture {inner.config.model_type!r})"
    if getattr(inner, "rotary_emb", None) is None:
        raise ModelError(
            f"{name} has no rotary positions. InfLLM moves distant tokens to one distance, which "
            "learnt absolute positions and attention biases do not allow: choose a model such as "
            "Llama, Mistral, Qwen2, Qwen3, Gemma or SmolLM"
        )
    if not inner._can_set_attn_implementation():
        raise ModelError(
            f"{name} does not take its attention from transformers' AttentionInterface, so that it "
            "cannot be replaced. Choose an architecture that does (Llama, Mistral, Qwen2, Qwen3, "
            "Gemma, SmolLM), loaded with attn_implementation='sdpa' or 'eager'"
        )
    module = sys.modules[type(inner).__module__]
    if not callable(getattr(module, "apply_rotary_pos_emb", None)):
        raise ModelError(f"{name} applies its rotary positions in a way that is not known here")


def _sliding_windows(inner: Any) -> list[int | None]:
    """Return each layer's own sliding window, None for layers that see everything."""
    config = inner.config
    n_layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * n_layers
    kinds = list(kinds)[:n_layers]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(
            f"model: {config.model_type} has layers of kind {', '.join(unknown)}, whose attention "
            "InfLLM cannot replace"
        )
    if "full_attention" not in kinds:
        raise ModelError(
            f"model: every layer of this {config.model_type} sees only the last {window} tokens, "
            "so that none could use a memory. Switch that off where the model was trained on "
            "inputs longer than that: set model.config.sliding_window = None (for Qwen2, load it "
            "with use_sliding_window=False)"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rotaries(inner: Any) -> list[Rotary]:
    """Return each layer's rotary embedding; layers of one kind share it."""
    rotary = inner.rotary_emb
    apply = sys.modules[type(inner).__module__].apply_rotary_pos_emb
    config = inner.config
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = list(config.layer_types) if by_kind else [None] * config.num_hidden_layers
    # Some architectures leave positions out of every few layers.
    turned = getattr(config, "no_rope_layers", None) or [True] * config.num_hidden_layers
    made: dict[tuple[str | None, bool], Rotary] = {}
    for kind, has_positions in zip(kinds, turned, strict=False):
        if (kind, bool(has_positions)) in made:
            continue

        def table(length: int, like: Tensor, kind: str | None = kind) -> tuple[Tensor, Tensor]:
            positions = torch.arange(length, device=like.device)[None]
            named = {} if kind is None else {"layer_type": kind}
            # forward() itself, because calling the module would come back to our hooks.
            with torch.no_grad():
                cosines, sines = rotary.forward(like[:, 0], position_ids=positions, **named)
            return cosines, sines

        made[kind, bool(has_positions)] = Rotary(
            table if has_positions else None, apply, _longest_unchanged(config, kind)
        )
    return [made[kind, bool(t)] for kind, t in zip(kinds, turned, strict=False)]


def _longest_unchanged(config: Any, kind: str | None) -> int | None:
    """Return how long an input may be before rotary frequencies change; None if they never do."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if kind is not None and "rope_type" not in parameters:
        parameters = parameters.get(kind) or {}
    if parameters.get("rope_type") not in _LENGTH_DEPENDENT:
        return None
    original = parameters.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)


def _refuse_changing_frequencies(patched: InfLLM) -> None:
    for rotary, layer in zip(patched.rotaries, patched.new_cache().layers, strict=True):
        longest, needed = rotary.longest, layer.capacity_limit()
        if longest is not None and needed > longest:
            fitting = max(1, 2 * (longest - needed + patched.settings.n_local * 3 // 2) // 3)
            raise DataError(
                f"this model's rotary frequencies change for inputs of more than {longest} tokens, "
                f"and the window needs {needed} positions: choose n_local up to about {fitting}"
            )


def _probe(inner: Any, cache: InfLLMCache | None = None) -> Tensor:
    embeddings = inner.get_input_embeddings()
    ids = torch.arange(_PROBE_LENGTH, device=embeddings.weight.device) + 3
    ids = (ids % embeddings.num_embeddings)[None]
    with torch.no_grad():
        output = inner(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    states: Tensor = output.last_hidden_state
    return states


def _check_probe(patched: InfLLM, expected: Tensor) -> None:
    """Raise unless a short text is read as before, in several chunks."""
    settings = replace(patched.settings, n_local=_PROBE_LENGTH, exec_chunk=5)
    found = _probe(patched.backbone, InfLLMCache(patched, settings))
    difference = (found.float() - expected.float()).abs().mean() / expected.float().abs().mean()
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    if not float(difference) < tolerance:
        config = patched.backbone.config
        raise ModelError(
            f"model: {type(patched.backbone).__name__} (architecture {config.model_type!r}) reads "
            f"even a short text differently with InfLLM (its states change by {difference:.1%}), "
            "so it does more with its positions or its attention than is known here"
        )


def _as_ids(input_ids: Tensor | Sequence[int], device: torch.device) -> Tensor:
    ids = torch.as_tensor(input_ids).to(device)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise DataError(
            "input_ids must be token ids of shape (N, n) or (n,), at least one, got shape "
            f"{tuple(ids.shape)} and dtype {ids.dtype}"
        )
    return ids.long()


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "memory.json"
    if not path.is_file():
        raise StoreError(f"{folder} holds no document that InfLLM has read: no memory.json there")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["method"] != "infllm":
            raise KeyError("method")
        version, _ = about["format"], about["fingerprint"]
        int(about["n_tokens"]), dict(about["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error!r}") from error
    if version != FORMAT:
        raise StoreError(f"{folder} has format {version}; this version of bakeoff reads {FORMAT}")
    found: dict[str, Any] = about
    return found
