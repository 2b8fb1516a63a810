"""Answers with the log-probability of every token, and transformers models that give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float64]
Progress = Callable[[int, int], None]

# Log-probabilities of half-precision models can exceed 0 by rounding.
_ROUNDING = 1e-3
_UNSUPPORTED = (
    "assistant_model",
    "constraints",
    "negative_prompt_ids",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "stop_strings",
    "stopping_criteria",
    "streamer",
)
_ONE = ("num_beams", "num_return_sequences")


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """One answer and how sure the model was of every token of it.

    Parameters
    ----------
    log_probs
        Float vector ``(n,)`` in nats: raw log-probability of each emitted token, the end token
        included, the prompt and padding not. Empty if nothing was said.
    embedding
        Float vector ``(d,)``, usually the mean over tokens of the state that predicted each; or
        None.
    text
        The answer; None if there is no need for it.
    cost
        What the answer cost, in any unit; NaN if unknown.

    Raises
    ------
    DataError
        If log-probabilities are positive (probabilities given by mistake), NaN or -inf, or a shape
        is not as said.

    Examples
    --------
    >>> record = TokenRecord(np.log([0.9, 0.5, 0.99]), text="yes, it is")
    >>> round(float(record.log_probs.min()), 3)
    -0.693
    """

    log_probs: FloatArray
    embedding: FloatArray | None = None
    text: str | None = None
    cost: float = field(default=float("nan"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_probs", _checked_log_probs(self.log_probs))
        if self.embedding is not None:
            embedding = np.asarray(self.embedding, dtype=np.float64)
            if embedding.ndim != 1 or not np.isfinite(embedding).all():
                raise DataError(
                    f"embedding must be a finite vector, got shape {embedding.shape}"
                    + ("" if np.isfinite(embedding).all() else " with NaN or inf")
                )
            object.__setattr__(self, "embedding", embedding)


def _checked_log_probs(values: ArrayLike) -> FloatArray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise DataError(f"log_probs must be a vector, got shape {found.shape}")
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise DataError(
            f"log_probs has {found[bad[0]]} at token {int(bad[0])}: take raw log-probabilities, "
            "before top-k, top-p or forbidden tokens"
        )
    bad = np.flatnonzero(found > _ROUNDING)
    if bad.size:
        raise DataError(
            f"log_probs has {found[bad[0]]:g} at token {int(bad[0])}, and a log-probability is "
            "never positive; are these probabilities, or losses?"
        )
    return np.minimum(found, 0.0)


def as_records(records: Sequence[TokenRecord | ArrayLike]) -> list[TokenRecord]:
    """Return records of what may be plain vectors of log-probabilities.

    Raises
    ------
    DataError
        If there is none, or one is not acceptable; names it.
    """
    if isinstance(records, TokenRecord | str) or len(records) == 0:
        raise DataError("records must be a non-empty sequence of TokenRecord or of float vectors")
    found = []
    for row, record in enumerate(records):
        if isinstance(record, TokenRecord):
            found.append(record)
            continue
        try:
            found.append(TokenRecord(np.asarray(record, dtype=np.float64)))
        except (DataError, ValueError, TypeError) as error:
            raise DataError(f"record {row}: {error}") from error
    return found


class RaggedTokens:
    """The log-probabilities of n records behind one another, for computing with all at once.

    Parameters
    ----------
    records
        What `as_records` returns.
    """

    def __init__(self, records: Sequence[TokenRecord]) -> None:
        self.lengths = np.array([len(record.log_probs) for record in records], dtype=np.int64)
        self.values = np.concatenate([record.log_probs for record in records])
        self.rows = np.repeat(np.arange(len(records)), self.lengths)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def sums(self) -> FloatArray:
        """Return the sum of each record's log-probabilities ``(n,)``."""
        sums = np.bincount(self.rows, weights=self.values, minlength=len(self.lengths))
        return sums.astype(np.float64)

    def means(self) -> FloatArray:
        """Return the mean per record ``(n,)``; NaN where a record is empty."""
        means = np.full(len(self.lengths), np.nan)
        np.divide(self.sums(), self.lengths, out=means, where=self.lengths > 0)
        return means

    def quantiles(self, levels: ArrayLike) -> FloatArray:
        """Return ``(n, len(levels))`` quantiles, linear between order statistics as in numpy.

        Empty records give NaN.
        """
        at = np.asarray(levels, dtype=np.float64)
        found = np.full((len(self.lengths), len(at)), np.nan)
        filled = np.flatnonzero(self.lengths)
        if not filled.size:
            return found
        # By record, and within each upwards.
        ordered = self.values[np.lexsort((self.values, self.rows))]
        last = (self.lengths[filled] - 1)[:, None]
        place = at[None, :] * last
        low = np.floor(place).astype(np.int64)
        start = self.starts[filled][:, None]
        below = ordered[start + low]
        above = ordered[start + np.minimum(low + 1, last)]
        found[filled] = below + (above - below) * (place - low)
        return found


# From transformers --------------------------------------------------------------------------------


def from_generate(
    output: Any, tokenizer: Any, *, eos_token_id: int | Sequence[int] | None = None
) -> list[TokenRecord]:
    """Return records of what ``model.generate`` gave.

    Parameters
    ----------
    output
        Result of ``generate(..., return_dict_in_generate=True, output_logits=True)`` of a decoder
        or an encoder-decoder, beam search included. With ``output_hidden_states=True`` the records
        have embeddings: the mean over tokens of the last layer's state that predicted each (not
        with beams, whose states are in another order).
    tokenizer
        To decode the texts, special tokens skipped.
    eos_token_id
        Where answers end, one or several ids; the tokenizer's by default. Give the generation
        configuration's where it names more.

    Returns
    -------
    list of TokenRecord
        One for each row of ``output.sequences``.

    Raises
    ------
    DataError
        If the output has no raw logits. ``scores`` would not do: temperature, top-p and penalties
        have changed them.

    Examples
    --------
    >>> output = model.generate(
    ...     **inputs, return_dict_in_generate=True, output_logits=True
    ... )  # doctest: +SKIP
    >>> records = from_generate(output, tokenizer)  # doctest: +SKIP
    """
    import torch

    logits = getattr(output, "logits", None)
    if not logits:
        raise DataError(
            "output has no raw logits: call generate with return_dict_in_generate=True and "
            "output_logits=True"
        )
    beams = getattr(output, "beam_indices", None)
    n_steps = len(logits)
    if beams is not None:
        n_steps = int((beams >= 0).sum(dim=1).max())
    sequences = output.sequences
    tokens = sequences[:, sequences.shape[1] - n_steps :]
    ends = _eos_ids(eos_token_id if eos_token_id is not None else tokenizer.eos_token_id)
    lengths = [_length(row, ends) for row in tokens.tolist()]
    found = torch.zeros(tokens.shape, dtype=torch.float64)
    for step in range(n_steps):
        rows = slice(None) if beams is None else beams[:, step].clamp(min=0).to(logits[step].device)
        found[:, step] = _chosen(logits[step][rows], tokens[:, step]).cpu()
    if beams is not None:
        written = (beams >= 0).sum(dim=1).tolist()
        lengths = [min(pair) for pair in zip(lengths, written, strict=True)]
    states = getattr(output, "decoder_hidden_states", None) or getattr(
        output, "hidden_states", None
    )
    embeddings: list[FloatArray | None] = [None] * len(lengths)
    if states and beams is None:
        last = torch.stack([step[-1][:, -1].double().cpu() for step in states[:n_steps]], dim=1)
        embeddings = [last[row, :n].mean(dim=0).numpy() for row, n in enumerate(lengths)]
    texts = tokenizer.batch_decode(
        [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)],
        skip_special_tokens=True,
    )
    return [
        TokenRecord(found[row, :n].numpy(), embeddings[row], texts[row])
        for row, n in enumerate(lengths)
    ]


class TextGenerator:
    """A transformers model as a function from prompts to records.

    Log-probabilities are gathered while the model writes, from its raw logits and in float32, so
    that no step's logits are kept: memory is that of plain ``generate``.

    Parameters
    ----------
    model
        A transformers model with ``generate`` (decoder or encoder-decoder), or a
        `bakeoff.models.LanguageModel`, which brings its tokenizer.
    tokenizer
        The model's tokenizer.
    embeddings
        Whether records have embeddings: the mean over the answer's tokens of what entered the
        output layer when each was predicted.
    chat
        Whether prompts are user messages of the tokenizer's chat template.
    batch_size
        Prompts per batch. Prompts of like length share one.
    random_state
        Seed, needed if ``do_sample=True``.
    **generation
        Arguments of every ``generate``, such as ``max_new_tokens``. Without ``do_sample``, decoding
        is greedy whatever the model's own configuration says.

    Raises
    ------
    DataError
        If there is no tokenizer, or an argument is not offered: beams, several answers per prompt,
        assisted decoding and stop strings.

    Examples
    --------
    >>> from bakeoff.models import load_language_model  # doctest: +SKIP
    >>> write = TextGenerator(load_language_model("smollm2-135m"), max_new_tokens=20)
    ... # doctest: +SKIP
    >>> write(["The capital of France is"])[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        embeddings: bool = False,
        chat: bool = False,
        batch_size: int = 8,
        random_state: int | None = None,
        **generation: Any,
    ) -> None:
        bundled = getattr(model, "tokenizer", None)
        if bundled is not None and hasattr(model, "model"):
            model, tokenizer = model.model, tokenizer if tokenizer is not None else bundled
        if not hasattr(model, "generate"):
            raise DataError(f"model must have generate, got {type(model).__name__}")
        if tokenizer is None:
            raise DataError("tokenizer is missing: give TextGenerator(model, tokenizer)")
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.embeddings = embeddings
        self.chat = chat
        self.batch_size = batch_size
        self.random_state = random_state
        self.generation = generation
        self._check(generation)

    def __call__(
        self, prompts: Sequence[str], *, progress: Progress | None = None, **generation: Any
    ) -> list[TokenRecord]:
        """Return the answers in the order of the prompts.

        Parameters
        ----------
        prompts
            Texts, none of them empty.
        progress
            Called with (prompts done, prompts in total).
        **generation
            Overrides those of the constructor.

        Returns
        -------
        list of TokenRecord
            With text and cost: 2 x parameters x tokens of prompt and answer, in floating-point
            operations.
        """
        options = {**self.generation, **generation}
        self._check(options)
        ids = [self._prompt_ids(prompt, row) for row, prompt in enumerate(prompts)]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        records: list[TokenRecord | None] = [None] * len(ids)
        per_token = 2.0 * float(self.model.num_parameters())
        with self._seeded(options):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                for row, record in zip(
                    rows, self._batch([ids[r] for r in rows], options), strict=True
                ):
                    log_probs, embedding, text = record
                    cost = per_token * (len(ids[row]) + len(log_probs))
                    records[row] = TokenRecord(log_probs, embedding, text, cost)
                if progress is not None:
                    progress(start + len(rows), len(order))
        return [record for record in records if record is not None]

    def _batch(
        self, prompts: list[list[int]], options: dict[str, Any]
    ) -> list[tuple[FloatArray, FloatArray | None, str]]:
        import torch
        from transformers import StoppingCriteriaList

        device = self.model.device
        # Which token fills up matters to nobody: it is masked, and cut off behind the end.
        pad = max(0, *_eos_ids(self.tokenizer.eos_token_id)[:1])
        pad = pad if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        encoder_decoder = bool(self.model.config.is_encoder_decoder)
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            # A decoder goes on from the right end; an encoder reads from the left.
            place = slice(0, len(prompt)) if encoder_decoder else slice(longest - len(prompt), None)
            ids[row, place] = torch.tensor(prompt)
            mask[row, place] = 1
        settings = {"do_sample": False, "pad_token_id": pad, **options}
        if not settings["do_sample"]:
            # What the model's own configuration says on sampling would only cause warnings.
            settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
        ends = _eos_ids(settings.get("eos_token_id", self.model.generation_config.eos_token_id))
        was_training = bool(self.model.training)
        self.model.eval()
        try:
            with torch.inference_mode(), _Listener(self.model, ends, self.embeddings) as listener:
                sequences = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    stopping_criteria=StoppingCriteriaList([listener.step]),
                    **settings,
                )
        finally:
            self.model.train(was_training)
        log_probs = torch.stack(listener.log_probs, dim=1).double().cpu().numpy()
        n_steps = log_probs.shape[1]
        tokens = sequences[:, sequences.shape[1] - n_steps :].tolist()
        lengths = [_length(row, ends) for row in tokens]
        texts = self.tokenizer.batch_decode(
            [row[:n] for row, n in zip(tokens, lengths, strict=True)], skip_special_tokens=True
        )
        states = None
        if listener.state_sum is not None:
            counts = torch.tensor(lengths, device=listener.state_sum.device)[:, None]
            states = (listener.state_sum / counts).double().cpu().numpy()
        return [
            (log_probs[row, :n], None if states is None else states[row], texts[row])
            for row, n in enumerate(lengths)
        ]

    def _prompt_ids(self, prompt: str, row: int) -> list[int]:
        if not isinstance(prompt, str):
            raise DataError(f"prompt {row} must be a text, got {type(prompt).__name__}")
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        # The template has its special tokens already.
        ids = list(self.tokenizer(prompt, add_special_tokens=not self.chat)["input_ids"])
        if not ids:
            raise DataError(f"prompt {row} has no tokens")
        return ids

    def _check(self, options: dict[str, Any]) -> None:
        for name in _UNSUPPORTED:
            if options.get(name) is not None:
                raise DataError(
                    f"{name} is not offered: log-probabilities come from plain decoding"
                )
        configured = self.model.generation_config
        for name in _ONE:
            count = options.get(name, getattr(configured, name, 1)) or 1
            if count != 1:
                raise DataError(f"{name} must be 1, got {count!r}")
        if options.get("do_sample") and self.random_state is None:
            raise DataError("do_sample=True needs TextGenerator(..., random_state=a number)")

    @contextmanager
    def _seeded(self, options: dict[str, Any]) -> Iterator[None]:
        import torch

        if not options.get("do_sample"):
            yield
            return
        device = self.model.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(int(self.random_state or 0))
            yield


class _Listener:
    """Hears each step's raw logits, and which token was then chosen."""

    def __init__(self, model: Any, ends: list[int], embeddings: bool) -> None:
        self.model = model
        self.ends = ends
        self.log_probs: list[Tensor] = []
        self.state_sum: Tensor | None = None
        self._logits: Tensor | None = None
        self._state: Tensor | None = None
        self._running: Tensor | None = None
        self._embeddings = embeddings
        self._hooks: list[Any] = []

    def __enter__(self) -> _Listener:
        self._hooks.append(self.model.register_forward_hook(self._hear_logits))
        if self._embeddings:
            head = self.model.get_output_embeddings()
            if head is None:
                self.__exit__()
                raise DataError(
                    f"{type(self.model).__name__} has no output layer to take embeddings from"
                )
            self._hooks.append(head.register_forward_pre_hook(self._hear_states))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hear_logits(self, module: Any, arguments: Any, output: Any) -> None:
        self._logits = output.logits[:, -1]

    def _hear_states(self, module: Any, arguments: Any) -> None:
        self._state = arguments[0][:, -1]

    def step(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Take note of the token just appended; as a stopping criterion, never stop."""
        import torch

        tokens = input_ids[:, -1]
        assert self._logits is not None
        self.log_probs.append(_chosen(self._logits, tokens))
        if self._running is None:
            self._running = torch.ones_like(tokens, dtype=torch.bool)
        if self._state is not None:
            # Rows that have ended are filled up with padding, whose states count no more.
            state = self._state.float() * self._running[:, None]
            self.state_sum = state if self.state_sum is None else self.state_sum + state
        ended = torch.isin(tokens, torch.tensor(self.ends, device=tokens.device))
        self._running = self._running & ~ended
        return torch.zeros_like(tokens, dtype=torch.bool)


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the float32 log-probabilities ``(B,)`` of tokens under logits ``(B, V)``."""
    wide = logits.float()
    # The maximum goes first: next to a logit of 60 a probability near 1 would be rounded to 1.
    shifted = wide - wide.amax(dim=1, keepdim=True)
    picked = shifted.gather(1, tokens.to(wide.device)[:, None])[:, 0]
    return picked - shifted.exp().sum(dim=1).log()


def _eos_ids(value: Any) -> list[int]:
    if value is None:
        return [-1]  # no token: answers end at the length limit
    return [int(token) for token in (value if isinstance(value, Sequence) else [value])]


def _length(tokens: list[int], ends: list[int]) -> int:
    """Return how many tokens there are up to and with the first end token."""
    for place, token in enumerate(tokens):
        if token in ends:
            return place + 1
    return len(tokens)
