"""How likely a causal language model finds given texts: losses of responses and of options."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bakeoff.errors import DataError
from bakeoff.models.encoding import token_budget_batches
from bakeoff.models.inference import evaluating

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Progress = Callable[[int, int], None]

# Tokens that keep one thread busy while a layer's activations stay in its cache.
_BATCH_TOKENS_PER_THREAD = 768
# Rows of logits that are turned into float32 probabilities at once: a vocabulary is wide.
_LOGIT_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of n token sequences.

    Parameters
    ----------
    sums
        float64 array ``(n,)``: negative log-likelihood in nats, summed over the predicted tokens.
    n_tokens
        int64 array ``(n,)``: tokens that were predicted.
    """

    sums: NDArray[np.float64]
    n_tokens: NDArray[np.int64]

    @property
    def means(self) -> NDArray[np.float64]:
        """Loss per predicted token; NaN where nothing was predicted."""
        means = np.full(len(self.sums), np.nan)
        np.divide(self.sums, self.n_tokens, out=means, where=self.n_tokens > 0)
        return means


def response_losses(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Return each response's negative log-likelihood given its prefix.

    Only the logits that predict response tokens are computed, and log-softmax runs in float32.
    Sequences of one length share a batch.

    Parameters
    ----------
    model
        A transformers causal language model; it is run in eval mode and left in its own.
    prefixes
        n sequences of token ids. After an empty prefix the response's first token is not predicted.
    responses
        n sequences of token ids, none empty.
    batch_tokens
        Most tokens in a batch; by default 768 per thread on a CPU, 16,384 elsewhere.
    progress
        Called with (sequences done, sequences in total).

    Returns
    -------
    Losses
        In the order given; independent of the batching up to rounding.

    Raises
    ------
    DataError
        If the lengths differ or a response is empty; names the first.

    Examples
    --------
    >>> losses = response_losses(model, [prompt_ids], [answer_ids])  # doctest: +SKIP
    >>> float(np.exp(losses.means[0]))  # the perplexity  # doctest: +SKIP
    """
    import torch

    if len(prefixes) != len(responses):
        raise DataError(
            f"prefixes and responses must be as many, got {len(prefixes)} and {len(responses)}"
        )
    for row, response in enumerate(responses):
        if len(response) == 0:
            raise DataError(f"response {row} has no tokens")
    sequences = [[*p, *r] for p, r in zip(prefixes, responses, strict=True)]
    sums = np.zeros(len(sequences))
    n_tokens = np.array(
        [len(r) - (len(p) == 0) for p, r in zip(prefixes, responses, strict=True)], dtype=np.int64
    )
    done = 0
    budget = batch_tokens or _batch_tokens(model)
    with evaluating(model), torch.inference_mode():
        for rows in token_budget_batches([len(s) for s in sequences], budget):
            ids, mask = _left_padded([sequences[row] for row in rows], model.device)
            # The last of these logits predicts what follows the text.
            keep = min(max(len(responses[row]) for row in rows) + 1, ids.shape[1])
            logits = _logits(model, ids, mask, keep)
            nll = _token_losses(logits[:, :-1], ids[:, ids.shape[1] - keep + 1 :])
            for place, row in enumerate(rows):
                if n_tokens[row]:
                    sums[row] = nll[place, -int(n_tokens[row]) :].double().sum().item()
            done += len(rows)
            if progress is not None:
                progress(done, len(sequences))
    return Losses(sums, n_tokens)


def option_losses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[int]],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return the mean loss of every option's tokens after every prompt.

    A prompt is read once; its keys and values serve all options.

    Parameters
    ----------
    model
        A transformers causal language model.
    prompts
        n sequences of token ids, none empty.
    options
        m sequences of token ids, none empty: what may follow a prompt.
    batch_tokens, progress
        As for `response_losses`; progress counts prompts.

    Returns
    -------
    float64 array of shape (n, m)
        Nats per token of the option; the least likely option has the largest.

    Raises
    ------
    DataError
        If a prompt or an option is empty, or there is no option.

    Examples
    --------
    >>> losses = option_losses(model, [prompt_ids], [yes_ids, no_ids])  # doctest: +SKIP
    >>> int(losses[0].argmin())  # the answer  # doctest: +SKIP
    """
    import torch

    if not options:
        raise DataError("options must hold at least one option")
    for what, sequences in (("prompt", prompts), ("option", options)):
        for row, sequence in enumerate(sequences):
            if len(sequence) == 0:
                raise DataError(f"{what} {row} has no tokens")
    losses = np.zeros((len(prompts), len(options)))
    done = 0
    budget = batch_tokens or _batch_tokens(model)
    with evaluating(model), torch.inference_mode():
        for rows in token_budget_batches([len(p) for p in prompts], budget):
            ids, mask = _left_padded([prompts[row] for row in rows], model.device)
            output = _run(model, ids, mask, keep=1, use_cache=True)
            first = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
            later = _continuation_losses(model, output.past_key_values, mask, options)
            for number, option in enumerate(options):
                total = later[number] - first[:, option[0]].double()
                losses[rows, number] = (total / len(option)).cpu().numpy()
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    return losses


def _continuation_losses(
    model: Any, cache: Any, mask: Tensor, options: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return, per option and row, the summed loss of the option's tokens after its first."""
    found = [mask.new_zeros(len(mask)).double() for _ in options]
    longer = [number for number, option in enumerate(options) if len(option) > 1]
    # A sliding window forgets as it grows: there, each option goes on from a copy of the cache.
    sliding = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    groups = [[number] for number in longer] if sliding else [longer] if longer else []
    for group in groups:
        chosen = [options[number] for number in group]
        grown = copy.deepcopy(cache) if sliding else cache
        totals = _side_by_side(model, grown, mask, chosen)
        for number, total in zip(group, totals, strict=True):
            found[number] = total
    return found


def _side_by_side(
    model: Any, cache: Any, mask: Tensor, options: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Run all options in one pass, each seeing the prompt and itself.

    A pass over a few tokens takes as long as reading the weights does, so one pass per option would
    take as long as the prompts.
    """
    import torch

    n_rows = len(mask)
    lengths = [len(option) - 1 for option in options]
    owner = torch.repeat_interleave(torch.arange(len(options)), torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    inputs = torch.tensor([token for option in options for token in option[:-1]])
    targets = torch.tensor([token for option in options for token in option[1:]])
    sees = (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])
    prompt = mask.bool()[:, None, :].expand(-1, len(inputs), -1)
    visible = torch.cat([prompt, sees.to(mask.device).expand(n_rows, -1, -1)], dim=-1)
    options_of: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        options_of["position_ids"] = mask.sum(dim=1, keepdim=True) + place.to(mask.device)
    if len(options) == 1:
        seen: Tensor = torch.cat([mask, mask.new_ones(n_rows, len(inputs))], dim=1)
    else:
        dtype = next(model.parameters()).dtype
        seen = torch.zeros(visible.shape, dtype=dtype, device=mask.device)
        seen = seen.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
    ids = inputs.to(mask.device).expand(n_rows, -1)
    logits = model(input_ids=ids, attention_mask=seen, **options_of).logits
    losses = _token_losses(logits, targets.to(mask.device).expand(n_rows, -1)).double()
    return [
        losses[:, (owner == number).to(mask.device)].sum(dim=1) for number in range(len(options))
    ]


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return float32 negative log-likelihoods ``(B, T)`` of targets ``(B, T)``."""
    import torch

    flat, wanted = logits.flatten(0, 1), targets.flatten()
    parts = [
        torch.nn.functional.cross_entropy(
            flat[start : start + _LOGIT_ROWS].float(),
            wanted[start : start + _LOGIT_ROWS],
            reduction="none",
        )
        for start in range(0, len(flat), _LOGIT_ROWS)
    ]
    return torch.cat(parts).view(targets.shape) if parts else flat.new_zeros(targets.shape)


def _logits(model: Any, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    logits: Tensor = _run(model, ids, mask, keep=keep, use_cache=False).logits
    return logits


def _run(model: Any, ids: Tensor, mask: Tensor, *, keep: int, **options: Any) -> Any:
    """Run the model; logits are those of the last `keep` positions."""
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        # Padding is on the left, so positions are counted where text is.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep
    output = model(input_ids=ids, attention_mask=mask, **options)
    output.logits = output.logits[:, -keep:]
    return output


def _left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask with text at the right end, where the logits are wanted."""
    import torch

    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(list(sequence))
        mask[row, longest - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def _batch_tokens(model: Any) -> int:
    import torch

    on_cpu = model.device.type == "cpu"
    return _BATCH_TOKENS_PER_THREAD * torch.get_num_threads() if on_cpu else 16_384
