"""MATES: measure what one training step on a text does to a reference loss, and select by it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bakeoff.data.samples import Sample, as_samples
from bakeoff.errors import DataError
from bakeoff.selection.selector import Selector, checked_count, checked_labeled

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

METHOD = {
    "slug": "mates",
    "title": "Data selection by one-step influence on a reference loss, refreshed while training",
    "paper": "Yu et al., MATES: Model-Aware Data Selection for Efficient Pretraining with Data "
    "Influence Models, NeurIPS 2024, arXiv 2406.06046",
    "designs": ["mates", "mates-refreshed"],
    "names": [
        "probe_influence",
        "InfluenceRegressor",
        "TransformerInfluenceModel",
        "GumbelTopK",
        "MATESSelector",
        "MATESCallback",
    ],
}

Loss = Callable[[Any, Any], Any]
Progress = Callable[[int, int], None]

_IGNORED = -100
# Below this share of the temperature the scores' spread drowns in the Gumbel noise.
_FLAT = 0.05
_FOLDS = 5


# One-step influence -------------------------------------------------------------------------------


def probe_influence(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    reference_batches: Sequence[Any],
    loss_fn: Loss | None = None,
    *,
    learning_rate: float | None = None,
    clip_norm: float | None = 1.0,
    reuse_frozen: bool = True,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return how one optimizer step on each batch changes the reference loss.

    Every probe starts from the same weights, moments and step counters, which are put back exactly
    after it. Dropout is off throughout.

    Parameters
    ----------
    model
        In float32 or float64: the differences, 1e-4 to 1e-2, are below lower precisions.
    optimizer
        The one that trains `model`, **with its state**: the first step of a fresh Adam moves every
        weight by the learning rate and ranks texts otherwise. Its learning rates are used.
    batches
        One probe each, usually a single sequence. For the default loss a mapping with
        ``input_ids`` and optionally ``labels`` (-100: not predicted) and ``attention_mask``, as
        tensors ``(B, T)`` or lists.
    reference_batches
        What the reference loss is computed on.
    loss_fn
        ``loss_fn(model, batch)``, either the pair (sum of the losses, number of predicted tokens),
        so that means are over tokens whatever the batches, or a single mean, in which case all
        batches weigh the same. By default next-token cross-entropy.
    learning_rate
        Instead of the optimizer's own rates.
    clip_norm
        Largest norm of a probe's gradient; None for no limit.
    reuse_frozen
        Whether the states that enter the first layer that the optimizer trains are computed once
        per reference batch, where all that precedes it is frozen. The result is the same.
    progress
        Called with (probes done, probes in total or -1 where `batches` has no length).

    Returns
    -------
    float64 array of shape (n,)
        Reference loss after the step minus before, in nats per token: negative is helpful.

    Warns
    -----
    UserWarning
        If the optimizer had no state and its first step made some, if weights are not in float32 or
        float64, or if all probes came out equal.

    Raises
    ------
    DataError
        If a batch has no token to predict, a loss is not finite, all learning rates are 0, or the
        optimizer belongs to another model.

    References
    ----------
    Zichun Yu, Spandan Das and Chenyan Xiong. "MATES: Model-aware data selection for efficient
    pretraining with data influence models". NeurIPS 2024. arXiv:2406.06046.

    Examples
    --------
    >>> import torch
    >>> line = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(line.weight)
    >>> squares = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> x, y = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    >>> probe_influence(
    ...     line, torch.optim.SGD(line.parameters(), lr=0.25), [(x, y), (x, -y)], [(x, y)], squares
    ... ).round(4).tolist()
    [-0.4375, 0.5625]
    """
    import torch

    loss_fn = language_model_loss if loss_fn is None else loss_fn
    reference_batches = list(reference_batches)
    if not reference_batches:
        raise DataError("reference_batches must have at least one batch, got none")
    total = len(batches) if isinstance(batches, Sized) else -1
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not {id(p) for p in trained} & {id(p) for p in model.parameters()}:
        raise DataError("optimizer trains none of the model's parameters: give the one it has")
    low = {p.dtype for p in trained} - {torch.float32, torch.float64}
    if low:
        warnings.warn(
            f"weights are in {', '.join(map(str, low))}: influences of 1e-4 are lost in rounding; "
            "use float32",
            stacklevel=2,
        )
    deltas: list[float] = []
    with probing(model, optimizer) as snapshot:
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            snapshot.keep_groups()
        if all(float(group.get("lr", 1.0)) == 0.0 for group in optimizer.param_groups):
            raise DataError(
                "learning_rate: all of the optimizer's rates are 0, so that no probe moves; do not "
                "probe during warm-up, or give learning_rate"
            )
        had_state = len(optimizer.state) > 0
        # Another loss may call the model more than once for a batch, each time with other inputs.
        reuse = reuse_frozen and loss_fn is language_model_loss
        with _frozen_layers_reused(model, trained, reuse) as cached:
            before = _reference_loss(model, reference_batches, loss_fn, cached)
            for row, batch in enumerate(batches):
                try:
                    _one_step(model, optimizer, trained, batch, loss_fn, clip_norm, row)
                    if row == 0 and not had_state and len(optimizer.state) > 0:
                        warnings.warn(
                            f"{type(optimizer).__name__} has no state yet: its first step is not "
                            "like those of training; take some steps first, or load its state",
                            stacklevel=2,
                        )
                    after = _reference_loss(model, reference_batches, loss_fn, cached)
                finally:
                    snapshot.restore()
                if not math.isfinite(after):
                    raise DataError(f"batches[{row}]: the reference loss after its step is {after}")
                deltas.append(after - before)
                if progress is not None:
                    progress(row + 1, total)
    if len(deltas) > 1 and len(set(deltas)) == 1:
        warnings.warn(
            f"all {len(deltas)} probes changed the reference loss by the same {deltas[0]:.1e}: the "
            "learning rate may be too small, or the batches all the same",
            stacklevel=2,
        )
    return np.array(deltas, dtype=np.float64)


def reference_loss(
    model: nn.Module, reference_batches: Sequence[Any], loss_fn: Loss | None = None
) -> float:
    """Return the mean loss per predicted token over all batches, dropout off.

    Parameters
    ----------
    model, reference_batches, loss_fn
        As in `probe_influence`.

    Raises
    ------
    DataError
        If a batch has no token to predict or the loss is not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _reference_loss(model, reference_batches, loss_fn or language_model_loss, None)
    finally:
        for module, training in modes:
            module.training = training


def language_model_loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    """Return the sum of next-token cross-entropies and how many tokens were predicted.

    Parameters
    ----------
    model
        Called with ``input_ids`` and, if there, ``attention_mask``; gives ``logits``
        ``(B, T, V)`` or is them.
    batch
        A mapping, see `probe_influence`. Where it has no ``labels``, all unmasked tokens count.
    """
    import torch

    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        name: torch.as_tensor(batch[name]).to(device)
        for name in ("input_ids", "attention_mask", "position_ids")
        if batch.get(name) is not None
    }
    ids = inputs["input_ids"]
    if batch.get("labels") is not None:
        labels = torch.as_tensor(batch["labels"]).to(device)
    elif "attention_mask" in inputs:
        labels = ids.masked_fill(inputs["attention_mask"] == 0, _IGNORED)
    else:
        labels = ids
    targets = labels[:, 1:]
    counted = targets != _IGNORED
    n = int(counted.sum())
    if n == 0:  # nothing to compute, and the caller names the batch
        return torch.zeros((), device=device), 0
    if hasattr(model, "config"):
        inputs["use_cache"] = False
    output = model(**inputs)
    # Only rows that predict something become probabilities: a vocabulary is wide.
    logits = getattr(output, "logits", output)[:, :-1][counted]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, targets[counted], reduction="sum"), n


@contextmanager
def probing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Snapshot]:
    """Save the state of training, switch dropout off, and put all back at the end, exactly.

    Within the block ``restore()`` of what it yields goes back to the start. Gradients that were
    there are kept aside.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = list(_all_parameters(model, optimizer))
    gradients = [p.grad for p in parameters]
    snapshot = Snapshot(model, optimizer)
    model.eval()
    for parameter in parameters:
        parameter.grad = None
    try:
        yield snapshot
    finally:
        snapshot.restore_all()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


class Snapshot:
    """A copy of what an optimizer step changes: weights, buffers, moments, counters, settings.

    Parameters
    ----------
    model, optimizer
        Whose state. Copying back is in place: no memory is allocated and nobody's reference to a
        tensor breaks.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import torch

        self._optimizer = optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._tensors: list[Tensor] = [*trained, *model.buffers()]
        self._state: dict[Any, dict[str, Any]] = {}
        for parameter, entries in optimizer.state.items():
            self._state[parameter] = dict(entries)
            self._tensors += [v for v in entries.values() if isinstance(v, torch.Tensor)]
        self._other = {
            (parameter, name): copy.deepcopy(value)
            for parameter, entries in self._state.items()
            for name, value in entries.items()
            if not isinstance(value, torch.Tensor)
        }
        # In float32 a second copy of the weights and of both moments of Adam.
        self._saved = [tensor.detach().clone() for tensor in self._tensors]
        self._original_groups = self._groups = self._settings()

    def keep_groups(self) -> None:
        """Let `restore` go back to the settings (learning rates and the like) of now."""
        self._groups = self._settings()

    def restore(self) -> None:
        """Put the values back into the same tensors."""
        import torch

        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._saved)
        state = self._optimizer.state
        for parameter in [p for p in state if p not in self._state]:
            del state[parameter]
        for parameter, entries in self._state.items():
            if state.get(parameter) is None:
                state[parameter] = {}
            now = state[parameter]
            for name in [name for name in now if name not in entries]:
                del now[name]
            for name, value in entries.items():
                kept = self._other.get((parameter, name), value)
                now[name] = value if kept is value else copy.deepcopy(kept)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in [name for name in group if name not in settings and name != "params"]:
                del group[name]
            group.update(copy.deepcopy(settings))

    def restore_all(self) -> None:
        """Put back the values and the settings that there were at the beginning."""
        self._groups = self._original_groups
        self.restore()

    def _settings(self) -> list[dict[str, Any]]:
        return [
            copy.deepcopy({name: value for name, value in group.items() if name != "params"})
            for group in self._optimizer.param_groups
        ]


def _all_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    optimized = (p for group in optimizer.param_groups for p in group["params"])
    for parameter in (*model.parameters(), *optimized):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter


def _one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    batch: Any,
    loss_fn: Loss,
    clip_norm: float | None,
    row: int,
) -> None:
    import torch

    with torch.enable_grad():
        total, count = _total_and_count(loss_fn(model, batch))
        if count == 0:
            raise DataError(f"batches[{row}] has no token to predict: all labels are ignored")
        loss = total / count
        if not bool(torch.isfinite(loss)):
            raise DataError(f"batches[{row}] has the loss {loss.item()}")
        loss.backward()
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


def _total_and_count(result: Any) -> tuple[Any, float]:
    return result if isinstance(result, tuple) else (result, 1)


def _reference_loss(
    model: nn.Module, batches: Sequence[Any], loss_fn: Loss, cached: Callable[[int], Any] | None
) -> float:
    import torch

    total, n = 0.0, 0.0
    with torch.no_grad():
        for row, batch in enumerate(batches):
            if cached is not None:
                cached(row)
            part, count = _total_and_count(loss_fn(model, batch))
            if count == 0:
                raise DataError(
                    f"reference_batches[{row}] has no token to predict: all labels are ignored"
                )
            total += float(part)
            n += float(count)
    if cached is not None:
        cached(-1)
    return total / n


@contextmanager
def _frozen_layers_reused(
    model: nn.Module, trained: list[nn.Parameter], wanted: bool
) -> Iterator[Callable[[int], None] | None]:
    """Let frozen lower layers hand out, per reference batch, the states they gave the first time.

    Yields a function that says which reference batch comes next (-1: none of them), or None where
    there is nothing to gain.
    """
    layers = _decoder_layers(model)
    ids = {id(p) for p in trained}
    n_frozen = next(
        (i for i, layer in enumerate(layers) if any(id(p) in ids for p in layer.parameters())), 0
    )
    inside = {id(p) for layer in layers[n_frozen:] for p in layer.parameters()}
    # A trained weight outside the upper layers may be an embedding, which changes what enters them.
    if not wanted or n_frozen == 0 or not ids <= inside:
        yield None
        return
    frozen = layers[:n_frozen]
    forwards = [layer.forward for layer in frozen]
    had_own = ["forward" in layer.__dict__ for layer in frozen]
    states: dict[int, Any] = {}
    current = -1

    def use(row: int) -> None:
        nonlocal current
        current = row

    def passed_on(index: int) -> Callable[..., Any]:
        last = index == n_frozen - 1

        def forward(hidden: Any, *rest: Any, **options: Any) -> Any:
            if current not in states:
                output = forwards[index](hidden, *rest, **options)
                if last and current >= 0:
                    states[current] = output
                return output
            # The last one's output replaces all of theirs; the others only hand something on.
            stored = states[current]
            if last:
                return stored
            return (hidden, *stored[1:]) if isinstance(stored, tuple) else hidden

        return forward

    for index, layer in enumerate(frozen):
        layer.forward = passed_on(index)
    try:
        yield use
    finally:
        for layer, forward, own in zip(frozen, forwards, had_own, strict=True):
            if own:
                layer.forward = forward
            else:
                del layer.forward


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the longest list of modules: a transformer's layers."""
    import torch

    lists: list[list[nn.Module]] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in outer)  # experts of a layer, say
        if isinstance(module, torch.nn.ModuleList) and not inside:
            outer.append(name)
            lists.append(list(module))
    return max(lists, key=len, default=[])


# Selection ----------------------------------------------------------------------------------------


class GumbelTopK:
    """Sampling without replacement that favours good scores: Gumbel noise, then the best k.

    Parameters
    ----------
    ratio
        Share of the items that is kept, above 0 and at most 1.
    temperature
        The higher, the more random. None: no noise, the k best.
    noise
        ``"textbook"``: the law of drawing one item after another with probabilities proportional
        to ``exp(-score / temperature)`` (for lower is better). ``"official"``: what the paper's
        code does, the smallest of ``score / temperature + noise``, which is greedier, as Gumbel
        noise is skewed.
    random_state
        Seed or generator.

    Notes
    -----
    Scores should be standardised (mean 0, standard deviation 1), as MATES does: the temperature is
    in their units. With standard normal scores, a fifth kept and temperature 1, the kept mean is
    -0.78 (textbook) or -1.01 (official); the bare top fifth has -1.40.

    References
    ----------
    Wouter Kool, Herke van Hoof and Max Welling. "Stochastic beams and where to find them: the
    Gumbel-top-k trick for sampling sequences without replacement". ICML 2019. arXiv:1903.06059.

    Examples
    --------
    >>> GumbelTopK(0.5, temperature=None).select([0.3, -1.0, 2.0, -0.5]).tolist()
    [1, 3]
    """

    def __init__(
        self,
        ratio: float = 0.2,
        temperature: float | None = 1.0,
        noise: Literal["textbook", "official"] = "textbook",
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        if not 0 < ratio <= 1:
            raise DataError(f"ratio must be above 0 and at most 1, got {ratio}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise DataError(f"temperature must be above 0 or None for no noise, got {temperature}")
        if noise not in ("textbook", "official"):
            raise DataError(f'noise must be "textbook" or "official", got {noise!r}')
        self.ratio = ratio
        self.temperature = temperature
        self.noise = noise
        self.random_state = random_state

    def select(
        self, scores: ArrayLike, *, lower_is_better: bool = True, n: int | None = None
    ) -> NDArray[np.int64]:
        """Return the rows kept, int64 ``(k,)``, the first drawn first.

        Parameters
        ----------
        scores
            Shape ``(N,)``.
        lower_is_better
            Whether scores are losses.
        n
            How many, instead of ``ratio * N`` rounded down (but at least one).

        Raises
        ------
        DataError
            If a score is not finite or `n` is out of range.
        """
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1 or len(values) == 0:
            raise DataError(f"scores must have shape (N,) with N > 0, got {values.shape}")
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise DataError(f"scores has NaN or inf in row {int(bad[0])} ({bad.size} such rows)")
        if n is None:
            # 0.29 * 100 is 28.999...: what is meant is 29.
            n = max(1, math.floor(self.ratio * len(values) + 1e-9))
        elif not 1 <= n <= len(values):
            raise DataError(f"n must be between 1 and {len(values)}, got {n}")
        losses = values if lower_is_better else -values
        if self.temperature is None:
            return np.argsort(losses, kind="stable")[:n].astype(np.int64)
        spread = float(losses.std())
        if 0 < spread < _FLAT * self.temperature:
            warnings.warn(
                f"scores have a standard deviation of {spread:.1e}, far below the temperature "
                f"{self.temperature}: the selection is next to random; standardise them first",
                stacklevel=2,
            )
        gumbel = np.random.default_rng(self.random_state).gumbel(size=len(losses))
        sign = -1.0 if self.noise == "textbook" else 1.0
        keys = losses / self.temperature + sign * gumbel
        return np.argsort(keys, kind="stable")[:n].astype(np.int64)


class MATESSelector(Selector):
    """Selects the samples whose training step should lower a reference loss the most, once.

    Some samples of the pool are probed: a step on each from the same state, then the loss on the
    references. A small model learns to predict the result from the text and scores the rest, and
    the picks are drawn by `GumbelTopK`. `MATESCallback` does this again and again during training.

    Parameters
    ----------
    n_select
        Number of picks.
    model
        The model that is to be trained: a name for `bakeoff.models.load_language_model`, or a
        loaded ``LanguageModel``, which is left as it was.
    n_probes
        Samples that are probed, drawn at random. A pool that is no larger is probed whole.
    learning_rate
        Of the steps.
    regressor
        What predicts: by default `InfluenceRegressor`. Anything with ``fit(texts, scores)`` and
        ``predict(texts)``.
    temperature
        Of `GumbelTopK`, on standardised scores; None for the bare best.
    warmup_steps, warmup_batch_size
        Steps on random samples of the pool before probing, the first stage of MATES in small:
        they fill Adam's moments.
    trainable_layers
        How many of the last layers the steps change; None for all weights. With few, probes are
        several times cheaper, since the layers below read the references once.
    n_reference
        Most references used, a random part of the queries.
    max_length
        Tokens of a sample that are used; never more than the model's window.
    random_state
        Seed of all of it.

    Attributes
    ----------
    selected_indices_ : int64 array of shape (n_select,)
        In the order drawn.
    scores_ : float64 array of shape (N,)
        Change of the reference loss, nats per token: measured where probed, predicted elsewhere.
    probed_indices_ : int64 array
        Rows that were probed.
    spearman_ : float
        Rank correlation of measured changes and those predicted by models that did not see them
        (five folds); NaN where all was probed or there is too little. Near 0, picks are random.
    base_loss_ : float
        Reference loss after the warm-up, before any probe.

    Notes
    -----
    Departures from the paper, which trains from scratch and refreshes: one refresh, a warm-up that
    is short and thrown away, and probes from the pool itself, so that they can be picked too.
    The steps are AdamW's with betas (0.9, 0.95), weight decay 0.1 and gradients clipped to norm 1.

    References
    ----------
    Zichun Yu, Spandan Das and Chenyan Xiong. "MATES: Model-aware data selection for efficient
    pretraining with data influence models". NeurIPS 2024. arXiv:2406.06046.

    Examples
    --------
    >>> selector = MATESSelector(100, n_probes=200)  # doctest: +SKIP
    >>> selector.fit(texts, queries=reference_texts).reasons()[0]  # doctest: +SKIP
    'predicted change of the reference loss -0.0031'
    """

    def __init__(
        self,
        n_select: int = 100,
        *,
        model: Any = "smollm2-135m",
        n_probes: int = 200,
        learning_rate: float = 1e-4,
        regressor: Any = None,
        temperature: float | None = 1.0,
        warmup_steps: int = 10,
        warmup_batch_size: int = 8,
        trainable_layers: int | None = None,
        n_reference: int = 64,
        max_length: int = 512,
        random_state: int | np.random.Generator | None = 0,
    ) -> None:
        self.n_select = n_select
        self.model = model
        self.n_probes = n_probes
        self.learning_rate = learning_rate
        self.regressor = regressor
        self.temperature = temperature
        self.warmup_steps = warmup_steps
        self.warmup_batch_size = warmup_batch_size
        self.trainable_layers = trainable_layers
        self.n_reference = n_reference
        self.max_length = max_length
        self.random_state = random_state

    def fit(  # type: ignore[override]  # names what others take as **data
        self,
        X: Sequence[str | Sample],
        y: None = None,
        *,
        queries: Sequence[str | Sample] | None = None,
        vectors: ArrayLike | None = None,
        already_labeled: Sequence[int] | ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Choose among texts or samples those that serve the references.

        Parameters
        ----------
        X
            The pool. Loss is taken on responses only; a plain text is all response.
        y
            Not used.
        queries
            The references, texts or samples of the kind that the model is to become good at. Do not
            evaluate on them afterwards.
        vectors
            One row per sample for the regressor, instead of embedding the texts.
        already_labeled
            Rows that must not be picked; they are not probed either.
        progress
            Called with (probes done, probes in total).

        Raises
        ------
        DataError
            If there are no queries, a sample has no token to predict, or an argument is out of
            range.
        """
        samples = as_samples(X)
        taken = checked_labeled(already_labeled, len(samples))
        free = np.setdiff1d(np.arange(len(samples)), taken)
        n_select = checked_count(self.n_select, len(free))
        if not queries:
            raise DataError("queries must be given: the references whose loss is to fall")
        references = as_samples(queries)
        self._check()
        sampler = GumbelTopK(1.0, self.temperature, random_state=_generator(self.random_state, 3))
        order = _generator(self.random_state, 0).permutation(free)
        probed = np.sort(order[: self.n_probes])
        self.scores_ = np.full(len(samples), np.nan)
        # The warm-up trains on other samples where it can: what was learnt helps no more.
        spare = order[self.n_probes :] if len(order) > self.n_probes else order
        self.scores_[probed], self.base_loss_ = self._probe(
            samples, probed, spare, references, progress
        )
        self.probed_indices_ = probed.astype(np.int64)
        self.spearman_ = math.nan
        rest = np.setdiff1d(np.arange(len(samples)), probed)
        if len(rest):
            features = self._features(samples, vectors)
            fitted = self._new_regressor().fit(_rows(features, probed), self.scores_[probed])
            # One that splits the data itself has its own; fitting it five times more is too much.
            self.spearman_ = (
                float(fitted.validation_spearman_)
                if hasattr(fitted, "validation_spearman_")
                else self._cross_validated(features, probed)
            )
            self.scores_[rest] = fitted.predict(_rows(features, rest))
        # Standardised by the measured values, so that the temperature means what it does there.
        measured = self.scores_[probed]
        scale = float(measured.std()) or 1.0
        standardised = (self.scores_[free] - measured.mean()) / scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spread of predictions is what it is
            self.selected_indices_ = free[sampler.select(standardised, n=n_select)].astype(np.int64)
        return self

    def reasons(self) -> list[str]:
        """Return the change of the reference loss behind every pick."""
        probed = set(self.probed_indices_.tolist())
        return [
            f"{'measured' if row in probed else 'predicted'} change of the reference loss "
            f"{self.scores_[row]:+.2g}"
            for row in self.selected_indices_.tolist()
        ]

    def _check(self) -> None:
        for name in ("n_probes", "n_reference", "warmup_batch_size"):
            if not isinstance(getattr(self, name), int | np.integer) or getattr(self, name) < 1:
                raise DataError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.n_probes < 3:
            raise DataError(f"n_probes must be at least 3, got {self.n_probes}")
        if self.warmup_steps < 0:
            raise DataError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.max_length < 2:
            raise DataError(f"max_length must be at least 2, got {self.max_length}")

    def _probe(
        self,
        samples: Sequence[Sample],
        probed: NDArray[np.int64],
        spare: NDArray[np.int64],
        references: Sequence[Sample],
        progress: Progress | None,
    ) -> tuple[NDArray[np.float64], float]:
        import torch

        language_model = self.model
        if isinstance(language_model, str):
            from bakeoff.models import load_language_model

            language_model = load_language_model(language_model)
        model, tokenizer = language_model.model, language_model.tokenizer
        limit = min(self.max_length, getattr(language_model, "max_length", self.max_length))

        def items(rows: Sequence[Sample]) -> list[TrainingText]:
            return training_texts(rows, tokenizer, max_length=limit)

        chosen = _generator(self.random_state, 1).permutation(len(references))[: self.n_reference]
        reference = padded_batches(items([references[i] for i in np.sort(chosen).tolist()]))
        draws = _generator(self.random_state, 2)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        trained = self._trained(model)
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        try:
            with probing(model, optimizer):  # puts the weights back after the warm-up as well
                size = self.warmup_batch_size
                for step in range(self.warmup_steps):
                    rows = draws.choice(spare, size=min(size, len(spare)), replace=False)
                    batch = collated(items([samples[i] for i in rows.tolist()]))
                    _one_step(model, optimizer, trained, batch, language_model_loss, 1.0, step)
                deltas = probe_influence(
                    model,
                    optimizer,
                    [collated([item]) for item in items([samples[i] for i in probed.tolist()])],
                    reference,
                    progress=progress,
                )
                return deltas, reference_loss(model, reference)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _trained(self, model: nn.Module) -> list[nn.Parameter]:
        if self.trainable_layers is None:
            return list(model.parameters())
        layers = _decoder_layers(model)
        if not 1 <= self.trainable_layers <= len(layers):
            raise DataError(
                f"trainable_layers must be between 1 and {len(layers)}, the model's layers, or "
                f"None, got {self.trainable_layers}"
            )
        return [p for layer in layers[-self.trainable_layers :] for p in layer.parameters()]

    def _new_regressor(self) -> Any:
        from sklearn.base import clone

        from bakeoff.selection.influence_regressor import InfluenceRegressor

        return InfluenceRegressor() if self.regressor is None else clone(self.regressor)

    def _features(self, samples: Sequence[Sample], vectors: ArrayLike | None) -> Any:
        """Return what the regressor reads, one row per sample; texts are embedded only once."""
        if vectors is not None:
            rows = np.asarray(vectors)
            if rows.ndim != 2 or len(rows) != len(samples):
                raise DataError(
                    f"vectors must have shape ({len(samples)}, d), one row per sample, got "
                    f"{rows.shape}"
                )
            return rows
        texts = [sample.text for sample in samples]
        regressor = self._new_regressor()
        return regressor.encode(texts) if hasattr(regressor, "encode") else texts

    def _cross_validated(self, features: Any, probed: NDArray[np.int64]) -> float:
        from bakeoff.selection.influence_regressor import spearman

        if len(probed) < 2 * _FOLDS:
            return math.nan
        predicted = np.empty(len(probed))
        folds = _generator(self.random_state, 4).permutation(len(probed)) % _FOLDS
        for fold in range(_FOLDS):
            out = folds == fold
            model = self._new_regressor().fit(
                _rows(features, probed[~out]), self.scores_[probed[~out]]
            )
            predicted[out] = model.predict(_rows(features, probed[out]))
        return spearman(predicted, self.scores_[probed])


# Texts as tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingText:
    """One tokenised thing to train on, with the text that a regressor reads.

    Parameters
    ----------
    text
        The text.
    input_ids
        Its token ids, not padded.
    labels
        As many: the id where the token is to be predicted, -100 elsewhere. By default all are.
    source
        Where it comes from, for the history.
    """

    text: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        ids = tuple(map(int, self.input_ids))
        labels = ids if self.labels is None else tuple(map(int, self.labels))
        if len(labels) != len(ids) or len(ids) < 2:
            raise DataError(
                "input_ids and labels must be as many and at least 2, got "
                f"{len(ids)} and {len(labels)} for the text {self.text[:40]!r}"
            )
        if all(label == _IGNORED for label in labels[1:]):
            raise DataError(f"labels of the text {self.text[:40]!r} leave no token to predict")
        object.__setattr__(self, "input_ids", ids)
        object.__setattr__(self, "labels", labels)

    def features(self) -> dict[str, list[int]]:
        """Return what a data collator takes."""
        assert self.labels is not None
        return {"input_ids": list(self.input_ids), "labels": list(self.labels)}


def training_texts(
    samples: Sequence[str | Sample], tokenizer: Any, *, max_length: int = 1024
) -> list[TrainingText]:
    """Tokenise samples; only tokens of responses are to be predicted.

    Parameters
    ----------
    samples
        Samples, or texts, which are all response.
    tokenizer
        A transformers tokenizer.
    max_length
        Most tokens of one. Where it does not fit, at most half of it is left for what precedes the
        response, whose beginning is cut off, and then the response's end.

    Raises
    ------
    DataError
        If nothing is left to predict; names the sample.
    """
    made = []
    for row, sample in enumerate(as_samples(samples)):
        response = tokenizer(sample.response, add_special_tokens=not sample.prefix, verbose=False)[
            "input_ids"
        ]
        prefix = tokenizer(sample.prefix, verbose=False)["input_ids"] if sample.prefix else []
        room = max(max_length // 2, max_length - len(response))
        prefix = prefix[-room:]
        response = response[: max_length - len(prefix)]
        if len(response) < 1 + (not prefix):
            raise DataError(f"sample {row} has too few tokens to predict one: {sample.text[:40]!r}")
        ids = (*prefix, *response)
        labels = (*[_IGNORED] * len(prefix), *response)
        made.append(TrainingText(sample.text, ids, labels, sample.source))
    return made


def collated(items: Sequence[TrainingText]) -> dict[str, Tensor]:
    """Return a batch, padded on the right: ``input_ids``, ``labels`` and ``attention_mask``."""
    import torch

    width = max(len(item.input_ids) for item in items)
    shape = (len(items), width)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, _IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, item in enumerate(items):
        length = len(item.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(item.input_ids)
        batch["labels"][row, :length] = torch.tensor(item.labels)
        batch["attention_mask"][row, :length] = 1
    return batch


def padded_batches(
    items: Sequence[TrainingText], batch_tokens: int = 4096
) -> list[dict[str, Tensor]]:
    """Return batches of items of nearly one length, at most `batch_tokens` tokens each."""
    from bakeoff.models.encoding import token_budget_batches

    lengths = [len(item.input_ids) for item in items]
    return [
        collated([items[i] for i in rows]) for rows in token_budget_batches(lengths, batch_tokens)
    ]


def _rows(features: Any, rows: NDArray[np.int64]) -> Any:
    if isinstance(features, np.ndarray):
        return features[rows]
    return [features[row] for row in rows.tolist()]


def _generator(random_state: int | np.random.Generator | None, part: int) -> np.random.Generator:
    """Return one of several generators that a seed stands for."""
    if random_state is None or isinstance(random_state, np.random.Generator):
        return np.random.default_rng(random_state)
    return np.random.default_rng([random_state, part])
