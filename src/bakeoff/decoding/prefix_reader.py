"""Next-token logits after one prompt and many continuations of it, none of them computed twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bakeoff.decoding.alignment_trie import ByteLRU

if TYPE_CHECKING:
    from torch import Tensor

Prefix = tuple[int, ...]


class PrefixReader:
    """Next-token logits after a prompt and any continuation, without computing a prefix twice.

    Key-value states live in three places: those of the prompt and of the continuation read last by
    itself in a cache as `generate` uses it, which is shortened to what the next continuation
    shares; those of the continuations read last side by side in `Rows`; and those of every token
    read before one by one in `cache`, from which the rest is put together.

    Parameters
    ----------
    model
        A transformers decoder in eval mode.
    prompt_ids
        The prompt, at least one token.
    cache
        Where states go, keyed by ``("states", continuation)``; may hold other things as well. What
        `read` works on takes as much memory again at most.
    max_new_tokens
        Length of the longest continuation to `read`.

    Attributes
    ----------
    n_calls, n_tokens
        Forward passes so far, and the tokens in them.
    """

    def __init__(
        self, model: Any, prompt_ids: Sequence[int], cache: ByteLRU, max_new_tokens: int = 256
    ) -> None:
        self.model, self.prompt_ids, self.cache = model, list(prompt_ids), cache
        self.max_new_tokens = max_new_tokens
        self.n_calls = self.n_tokens = 0
        self._live: list[int] = []
        self._states: Any = None
        self._first: Tensor | None = None  # what follows the prompt
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._reusable = states_can_be_cut(model)
        self._rows: Rows | None = None
        self._places: dict[Prefix, int] = {}  # the continuations read last, and their rows

    # One

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return logits ``(V,)`` of what follows the prompt and `tokens`."""
        import torch

        sequence = [*self.prompt_ids, *tokens]
        with torch.inference_mode():
            if not self._reusable:
                return self._forward([sequence], None)[0]
            if self._states is None:
                from transformers import DynamicCache

                self._states = DynamicCache()
            shared = 0
            # The last token is always read: it is its logits that are wanted.
            for mine, wanted in zip(self._live, sequence[:-1], strict=False):
                if mine != wanted:
                    break
                shared += 1
            n_prompt = len(self.prompt_ids)
            pieces: list[Tensor] = []
            if shared >= n_prompt:
                pieces = self._pieces(tuple(tokens[:-1]), shared - n_prompt)
            begin = shared + len(pieces)
            self._cut_and_join(shared, pieces)
            self._live = sequence[:begin]  # what is true if the next line is interrupted
            logits = self._forward([sequence[begin:]], self._states)[0]
            self._live = sequence
            if self.cache.max_bytes:
                first = max(begin, n_prompt)
                found = _flat(self._layers(), slice(0, 1), slice(first, len(sequence)))
                self._remember([tuple(tokens)], first - n_prompt, found)
        return logits

    def _forward(self, ids: list[list[int]], states: Any) -> Tensor:
        """Return the last position's logits ``(rows, V)``."""
        import torch

        extra: dict[str, Any] = {"use_cache": states is not None}
        if states is not None:
            extra["past_key_values"] = states
        if self._keeps_logits:
            extra["logits_to_keep"] = 1
        output = self.model(input_ids=torch.tensor(ids, device=self.model.device), **extra)
        self.n_calls += 1
        self.n_tokens += len(ids) * len(ids[0])
        logits: Tensor = output.logits[:, -1]
        return logits

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self._states.layers if layer.is_initialized]

    def _cut_and_join(self, n: int, pieces: list[Tensor]) -> None:
        """Keep the first n positions of the live states, and put remembered ones behind them."""
        import torch

        if len(self._live) == n and not pieces:
            return
        layers = [layer for layer in self._states.layers if layer.is_initialized]
        if not pieces:
            for layer in layers:
                layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]
            return
        added = _unflat(torch.stack(pieces)[None], self._layers())
        for layer, (keys, values) in zip(layers, added, strict=True):
            layer.keys = torch.cat([layer.keys[:, :, :n], keys.to(layer.keys.device)], dim=-2)
            layer.values = torch.cat([layer.values[:, :, :n], values.to(layer.values.device)], -2)

    # What is remembered

    def _pieces(self, prefix: Prefix, begin: int) -> list[Tensor]:
        """Return the remembered states of a continuation's tokens from the place `begin` on."""
        pieces: list[Tensor] = []
        for length in range(begin + 1, len(prefix) + 1):
            piece = self.cache.get(("states", prefix[:length]))
            if piece is None:
                break
            pieces.append(piece)
        return pieces

    def _remember(self, prefixes: Sequence[Prefix], begin: int, found: Tensor) -> None:
        """Keep states ``(rows, positions, values)`` of continuations from the place `begin` on."""
        for states, prefix in zip(found, prefixes, strict=True):
            for length, state in enumerate(states, begin + 1):
                # A copy, so that forgetting one frees its memory.
                self.cache.put(("states", prefix[:length]), state.clone(), state.nbytes)

    # Many

    def most_rows(self) -> int:
        """Return how many continuations can be read side by side; below 2 nothing is gained."""
        if not self._reusable or not self.cache.max_bytes:
            return 1
        self._after_prompt()
        size = sum(k[0, :, 0].nbytes + v[0, :, 0].nbytes for k, v in self._layers())
        return self.cache.max_bytes // (size * (len(self.prompt_ids) + self.max_new_tokens))

    def _after_prompt(self) -> Tensor:
        """Return the logits ``(V,)`` after the prompt, whose states are there then."""
        if self._first is None or len(self._live) < len(self.prompt_ids):
            self._first = self.logits(())
        return self._first

    def read(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return logits ``(n, V)`` of what follows n different continuations of one length.

        What was read last time and is continued by one token stays where it is. All rows are
        equally long, so that nothing is padded and any kind of attention will do.
        """
        import torch

        length, n_prompt = len(prefixes[0]), len(self.prompt_ids)
        after_prompt = self._after_prompt()
        if length == 0:
            return after_prompt[None]
        with torch.inference_mode():
            before, self._places = self._places, {}  # nothing is known if this is interrupted
            if self._rows is None:
                self._rows = Rows(self._states, n_prompt, n_prompt + self.max_new_tokens)
            rows = self._rows
            rows.make_room(len(prefixes))
            continuing = [prefix for prefix in prefixes if prefix[:-1] in before]
            joining = [prefix for prefix in prefixes if prefix[:-1] not in before]
            order = self._settle(continuing, before)
            sources = [before[prefix[:-1]] for prefix in order]
            end = n_prompt + length - 1
            rows.copy(sources, list(range(len(order))), slice(n_prompt, end))
            order += joining
            begin = self._join(joining, len(continuing), length) if joining else end
            if continuing and begin < end:
                some = slice(len(continuing), len(order))
                self._forward_rows(joining, some, begin, end)
                begin = end
            logits = self._forward_rows(order, slice(0, len(order)), begin, end + 1)
            self._places = {prefix: row for row, prefix in enumerate(order)}
            if order == list(prefixes):
                return logits
            return logits[[self._places[prefix] for prefix in prefixes]]

    def _settle(self, continuing: list[Prefix], before: dict[Prefix, int]) -> list[Prefix]:
        """Return who goes into the first rows, so that as few as possible have to move.

        The first continuation of a row inside stays there. Rows that are given to others are then
        nobody's source, and copying is safe in any order.
        """
        settled: dict[int, Prefix] = {}
        moving: list[Prefix] = []
        for prefix in continuing:
            row = before[prefix[:-1]]
            if row < len(continuing) and row not in settled:
                settled[row] = prefix
            else:
                moving.append(prefix)
        moving.reverse()
        return [settled[r] if r in settled else moving.pop() for r in range(len(continuing))]

    def _join(self, joining: list[Prefix], first: int, length: int) -> int:
        """Put remembered states into the rows from `first` on; return the position to read from."""
        import torch

        assert self._rows is not None
        n_prompt = len(self.prompt_ids)
        remembered = [self._pieces(prefix[:-1], 0) for prefix in joining]
        n = min(map(len, remembered))
        if n:
            states = torch.stack([torch.stack(pieces[:n]) for pieces in remembered])
            some = slice(first, first + len(joining))
            self._rows.put(states, some, slice(n_prompt, n_prompt + n))
        return n_prompt + n

    def _forward_rows(self, prefixes: list[Prefix], some: slice, begin: int, end: int) -> Tensor:
        """Read the tokens at positions from `begin` to `end` into some rows."""
        assert self._rows is not None
        n_prompt = len(self.prompt_ids)
        ids = [list(prefix[begin - n_prompt : end - n_prompt]) for prefix in prefixes]
        logits = self._forward(ids, self._rows.view(some, begin))
        found = _flat(self._rows.states, some, slice(begin, end))
        self._remember(prefixes, begin - n_prompt, found)
        return logits


class Rows:
    """Key-value states of several texts with the same beginning, in place.

    Parameters
    ----------
    states
        A cache of one text that begins with the prompt.
    n_prompt
        Length of the prompt, which all rows get.
    n_positions
        Length of the rows.
    """

    def __init__(self, states: Any, n_prompt: int, n_positions: int) -> None:
        self._one, self.n_prompt, self.n_positions = states, n_prompt, n_positions
        self.n_rows = 0
        self.states: list[tuple[Tensor, Tensor]] = []

    def make_room(self, n_rows: int) -> None:
        """Have so many rows; what is in them stays."""
        if n_rows <= self.n_rows:
            return
        layers = [layer for layer in self._one.layers if layer.is_initialized]
        olds = self.states or [(layer.keys[:0], layer.values[:0]) for layer in layers]
        self.states = [
            (self._grown(layer.keys, keys, n_rows), self._grown(layer.values, values, n_rows))
            for layer, (keys, values) in zip(layers, olds, strict=True)
        ]
        self.n_rows = n_rows

    def _grown(self, one: Tensor, old: Tensor, n_rows: int) -> Tensor:
        new = one.new_empty(n_rows, one.shape[1], self.n_positions, one.shape[3])
        new[: len(old), :, : old.shape[2]] = old
        new[len(old) :, :, : self.n_prompt] = one[:, :, : self.n_prompt]
        return new

    def copy(self, sources: list[int], targets: list[int], positions: slice) -> None:
        """Copy rows over others, none of which is a source."""
        pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s != t]
        if not pairs or positions.start == positions.stop:
            return
        old, new = [s for s, _ in pairs], [t for _, t in pairs]
        for keys, values in self.states:
            for tensor in (keys, values):
                within = tensor[:, :, positions]
                within[new] = within[old]

    def put(self, found: Tensor, some: slice, positions: slice) -> None:
        """Write states ``(rows, positions, values)``."""
        added = _unflat(found, self.states)
        for (keys, values), (new_keys, new_values) in zip(self.states, added, strict=True):
            keys[some, :, positions] = new_keys.to(keys.device)
            values[some, :, positions] = new_values.to(values.device)

    def view(self, some: slice, length: int) -> Any:
        """Return a cache of some rows' first positions; what it is given goes into the rows."""
        from transformers import DynamicCache

        cache = DynamicCache()
        layer_class, held = _layer_in_place(), iter(self.states)
        for layer in self._one.layers:
            if not layer.is_initialized:  # it uses another's states
                cache.layers.append(type(layer)())
                continue
            keys, values = next(held)
            cache.layers.append(layer_class(keys[some], values[some], length))
        return cache


def _flat(layers: list[tuple[Tensor, Tensor]], some: slice, positions: slice) -> Tensor:
    """Return the states of rows and positions as ``(rows, positions, values)``."""
    import torch

    device = layers[0][0].device
    parts = [
        tensor[some, :, positions].transpose(1, 2).flatten(2).to(device)
        for pair in layers
        for tensor in pair
    ]
    return torch.cat(parts, dim=-1)


def _unflat(found: Tensor, like: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return what `_flat` was given, as views ``(rows, heads, positions, width)`` by layer."""
    import torch

    sizes = [tensor.shape[1] * tensor.shape[3] for pair in like for tensor in pair]
    parts = iter(torch.split(found, sizes, dim=-1))

    def shaped(tensor: Tensor) -> Tensor:
        part = next(parts)
        return part.reshape(*part.shape[:-1], tensor.shape[1], tensor.shape[3]).transpose(1, 2)

    return [(shaped(keys), shaped(values)) for keys, values in like]


@lru_cache(maxsize=1)
def _layer_in_place() -> Callable[[Tensor, Tensor, int], Any]:
    """Return a cache layer that writes into tensors given to it instead of growing new ones."""
    from transformers.cache_utils import DynamicLayer

    class LayerInPlace(DynamicLayer):  # type: ignore[misc]
        """States in the first positions of two larger tensors."""

        def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._whole = keys, values
            self._show(length)

        def _show(self, length: int) -> None:
            keys, values = self._whole
            self.length, self.keys, self.values = length, keys[:, :, :length], values[:, :, :length]

        def get_seq_length(self) -> int:
            return self.length

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            begin, end = self.length, self.length + key_states.shape[-2]
            self._whole[0][:, :, begin:end] = key_states
            self._whole[1][:, :, begin:end] = value_states
            self._show(end)
            return self.keys, self.values

    return LayerInPlace


def states_can_be_cut(model: Any) -> bool:
    """Return whether a model's states can be shortened to an earlier token: not recurrent ones."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return not getattr(model, "_is_stateful", False) and all(
        str(kind).endswith("_attention") and "linear" not in str(kind) for kind in kinds
    )
