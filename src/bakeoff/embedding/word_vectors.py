"""Word vectors out of any encoder or decoder: the mean over a word's own tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor

from bakeoff.data.formats import count
from bakeoff.embedding.bottleneck_adapters import ADAPTER_FILE, AdapterTransformer
from bakeoff.embedding.pooling import PoolingModule, mean_over_tokens
from bakeoff.errors import DataError, ModelError
from bakeoff.models.loading import BaseModel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Layer = int | Literal["mean"]
Vectors = NDArray[np.float32]


class WordPooling(PoolingModule):
    """The mean over a word's own tokens, without those that the tokenizer puts around a text.

    Parameters
    ----------
    hidden_size
        Width d of the hidden states.
    n_prefix, n_suffix
        How many special tokens begin and end a text: 1 and 1 for BERT's ``[CLS] word [SEP]``, 0
        and 0 for most decoders. Real tokens are counted, so that padding may be on either side.
    layer
        Which hidden states: -1 for the last, i for ``hidden_states[i]`` (0 is the embedding
        output), ``"mean"`` for the mean of all, embedding output included.
    normalize
        Whether vectors are scaled to unit length.

    Notes
    -----
    A text without any token of its own gives the mean over its special tokens, so that one empty
    cell does not end an export of a million words; `WordEncoder.encode` refuses it.

    References
    ----------
    Green et al., as in `LexicalSpecializer`.

    Examples
    --------
    >>> states = torch.tensor([[[9.0], [1.0], [3.0], [9.0], [7.0]]])
    >>> WordPooling(1)(states, torch.tensor([[1, 1, 1, 1, 0]]))
    tensor([[2.]])
    """

    def __init__(
        self,
        hidden_size: int,
        n_prefix: int = 1,
        n_suffix: int = 1,
        layer: Layer = -1,
        normalize: bool = False,
    ) -> None:
        super().__init__(hidden_size, normalize=normalize)
        if min(n_prefix, n_suffix) < 0:
            raise DataError(
                f"n_prefix and n_suffix must be at least 0, got {n_prefix} and {n_suffix}"
            )
        if layer != "mean" and (isinstance(layer, bool) or not isinstance(layer, int)):
            raise DataError(f"layer must be a whole number or 'mean', got {layer!r}")
        self.n_prefix, self.n_suffix, self.layer = n_prefix, n_suffix, layer
        self.all_layers = layer != -1

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return mean_over_tokens(states, word_mask(mask, self.n_prefix, self.n_suffix))

    def _as_layers(self, states: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        layers = super()._as_layers(states)
        if self.layer == "mean":
            return [torch.stack(list(layers)).mean(dim=0)]
        if not -len(layers) <= self.layer < len(layers):
            raise DataError(f"layer={self.layer}, but there are {len(layers)} hidden states")
        return [layers[self.layer]]


def check_layer(layer: object, n_layers: int) -> None:
    """Raise `DataError` unless a model of so many layers has this one, or it is ``"mean"``."""
    whole = isinstance(layer, int) and not isinstance(layer, bool)
    if layer != "mean" and not (whole and -n_layers - 1 <= cast("int", layer) <= n_layers):
        raise DataError(
            f"layer must be 'mean' or a whole number from {-n_layers - 1} to {n_layers}, "
            f"got {layer!r}"
        )


def word_mask(mask: Tensor, n_prefix: int, n_suffix: int) -> Tensor:
    """Return where the word's own tokens are.

    Parameters
    ----------
    mask
        ``(B, T)``, non-zero at real tokens.
    n_prefix, n_suffix
        Special tokens at the beginning and at the end.

    Returns
    -------
    Tensor
        ``(B, T)`` bool; a row without a token of its own keeps all its real ones.

    Examples
    --------
    >>> word_mask(torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]), 1, 1).int()
    tensor([[0, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    mask = mask.bool()
    rank = mask.cumsum(dim=1)
    length = rank[:, -1:]
    own = mask & (rank > n_prefix) & (rank <= length - n_suffix)
    return torch.where(own.any(dim=1, keepdim=True), own, mask)


class WordEncoder:
    """Word vectors out of any encoder or decoder.

    Parameters
    ----------
    base_model
        A packaged model's name, a folder (of transformers, or of sentence-transformers, whose
        pooling is then not used), a hub id, a loaded `bakeoff.models.BaseModel` or a
        SentenceTransformer. The last two are copied.
    device
        A torch device.

    Raises
    ------
    ModelError
        If there is no such model.

    Examples
    --------
    >>> encoder = WordEncoder("all-minilm-l6-v2")  # doctest: +SKIP
    >>> encoder.encode(["word", "term"]).shape, encoder.n_layers  # doctest: +SKIP
    ((2, 384), 6)
    """

    def __init__(self, base_model: Any, *, device: str = "cpu") -> None:
        self.transformer = _transformer(base_model).to(device)
        self.tokenizer = self.transformer.tokenizer
        # Of other states under padding on the left: models with absolute positions.
        self.tokenizer.padding_side = "right"
        self.n_prefix, self.n_suffix = _special_tokens(self.tokenizer)

    @property
    def hidden_size(self) -> int:
        """Width d of a vector."""
        return int(self.backbone.config.get_text_config().hidden_size)

    @property
    def n_layers(self) -> int:
        """Number of transformer layers; there is one hidden state more."""
        return int(self.backbone.config.get_text_config().num_hidden_layers)

    @property
    def backbone(self) -> Any:
        """The transformers model."""
        return self.transformer.model

    def ids(self, words: Sequence[str]) -> list[list[int]]:
        """Return the token ids of words, special tokens included, cut at the model's window."""
        if isinstance(words, str):
            raise DataError("words must be a list of strings, got a single one")
        if not words:
            return []
        found = self.tokenizer(list(words), truncation=True, max_length=self.window)
        return cast("list[list[int]]", found["input_ids"])

    @property
    def window(self) -> int:
        """Most tokens of a word and its gloss: 512, or fewer where the model has less."""
        return int(min(self.transformer.max_seq_length or 512, 512))

    def has_tokens(self, words: Sequence[str]) -> NDArray[np.bool_]:
        """Return, per word, whether the tokenizer makes any token of it."""
        return np.array([self._has_own(ids) for ids in self.ids(words)], dtype=np.bool_)

    def encode(
        self,
        words: Sequence[str],
        layer: Layer = -1,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Vectors:
        """Return one vector per word.

        Parameters
        ----------
        words
            n words or short terms.
        layer
            See `WordPooling`.
        progress
            Called with (words done, words in total), of those that differ in their tokens.

        Returns
        -------
        float32 array
            ``(n, d)``. Words of the same tokens (``"Paris"`` and ``"paris"`` in an uncased model)
            have the very same vector.

        Raises
        ------
        DataError
            If words have no token (empty ones): says how many and names the first three.
        """
        from bakeoff.models.encoding import encode

        rows = [tuple(ids) for ids in self._checked_ids(words)]
        if not rows:
            return np.empty((0, self.hidden_size), dtype=np.float32)
        texts: dict[tuple[int, ...], str] = {}
        for ids, word in zip(rows, words, strict=True):
            texts.setdefault(ids, word)
        places = {ids: place for place, ids in enumerate(texts)}
        with self._keeping_states(layer != -1):
            model = self._model(layer, normalize=False)
            vectors = encode(model, list(texts.values()), progress=progress)
        return vectors[[places[ids] for ids in rows]]

    def encode_layers(self, words: Sequence[str], *, batch_size: int = 128) -> Vectors:
        """Return the words' vectors at every layer, ``(n, n_layers + 1, d)`` float32.

        Entry 0 of the second axis is the embedding output.
        """
        rows = self._checked_ids(words)
        vectors = np.empty((len(words), self.n_layers + 1, self.hidden_size), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        self.backbone.eval()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = padded([rows[row] for row in batch], self.tokenizer, self.device)
            with torch.inference_mode():
                states = self.backbone(
                    input_ids=ids, attention_mask=mask, output_hidden_states=True
                ).hidden_states
                own = word_mask(mask, self.n_prefix, self.n_suffix)
                pooled = torch.stack([mean_over_tokens(layer, own) for layer in states], dim=1)
            vectors[batch] = pooled.float().cpu().numpy()
        return vectors

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast("torch.device", next(self.backbone.parameters()).device)

    def sentence_transformer(
        self, layer: Layer = -1, *, normalize: bool = False
    ) -> SentenceTransformer:
        """Return a SentenceTransformer that gives the same vectors; its weights are these ones."""
        model = self._model(layer, normalize=normalize)
        self.backbone.config.output_hidden_states = layer != -1
        return model

    def _model(self, layer: Layer, *, normalize: bool) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        head = WordPooling(self.hidden_size, self.n_prefix, self.n_suffix, layer, normalize)
        return SentenceTransformer(modules=[self.transformer, head], device=str(self.device)).eval()

    @contextmanager
    def _keeping_states(self, keep: bool) -> Iterator[None]:
        config = self.backbone.config
        before = config.output_hidden_states
        config.output_hidden_states = keep
        try:
            yield
        finally:
            config.output_hidden_states = before

    def _has_own(self, ids: Sequence[int]) -> bool:
        return len(ids) > self.n_prefix + self.n_suffix

    def _checked_ids(self, words: Sequence[str]) -> list[list[int]]:
        rows = self.ids(words)
        bare = [word for word, ids in zip(words, rows, strict=True) if not self._has_own(ids)]
        if bare:
            raise DataError(
                f"words: {count(len(bare), 'word')} without any token, the first {bare[:3]}"
            )
        return rows


def _transformer(base_model: Any) -> Any:
    """Return a sentence-transformers Transformer of its own for `base_model`."""
    from sentence_transformers import SentenceTransformer

    from bakeoff.models.gguf import quiet_transformers
    from bakeoff.models.loading import load, model_folder

    if isinstance(base_model, SentenceTransformer):
        first = next(iter(base_model.children()))
        if not isinstance(first, Transformer):
            raise ModelError(
                f"base_model begins with {type(first).__name__}, not with a Transformer"
            )
        return copy.deepcopy(first)
    if not isinstance(base_model, BaseModel):
        folder = model_folder(str(base_model))
        if (folder / ADAPTER_FILE).is_file():
            with quiet_transformers():
                return AdapterTransformer.load(str(folder))
    base = base_model if isinstance(base_model, BaseModel) else load(base_model)
    with quiet_transformers():
        transformer = Transformer(
            str(base.path),
            max_seq_length=base.max_length,
            model_kwargs={"dtype": next(base.model.parameters()).dtype, "use_safetensors": True},
        )
    # What was loaded may have been changed since: it is what the user means.
    transformer.model = copy.deepcopy(base.model) if base is base_model else base.model
    tokenizer = copy.deepcopy(base.tokenizer)
    if tokenizer.chat_template is not None:  # a word is no conversation
        from sentence_transformers.base.modality import InputFormatter

        tokenizer.chat_template = None
        transformer.processor = tokenizer
        transformer.modality_config, transformer.module_output_name = transformer.infer_modalities(
            transformer.model, tokenizer
        )
        transformer.input_formatter = InputFormatter(
            model_type=transformer.config.model_type, message_format="auto", processor=tokenizer
        )
        transformer.input_formatter.supported_modalities = list(transformer.modality_config)
    transformer.processor = tokenizer
    transformer.max_seq_length = base.max_length
    return transformer


def _special_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens the tokenizer puts before and after a text, found by experiment."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return start, len(whole) - len(bare) - start
    raise ModelError("the tokenizer changes a text's own tokens when it adds special ones")


def padded(
    rows: Sequence[Sequence[int]], tokenizer: Any, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``(n, T)``, padded on the right."""
    width = max(map(len, rows))
    fill = tokenizer.pad_token_id or 0
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
