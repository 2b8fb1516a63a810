"""Load-balancing loss whose expert frequencies are measured over the global batch."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bakeoff.errors import BakeoffError, DataError, ModelError
from bakeoff.experts.protocol import Routing
from bakeoff.experts.routers import check_gradient, in_backward, top_k
from bakeoff.experts.token_sums import count_choices, token_mean

if TYPE_CHECKING:
    from transformers import TrainerCallback

METHOD = {
    "slug": "global-balance",
    "title": "Load-balancing loss over the global batch",
    "paper": 'Qiu et al., "Demons in the Detail: On Implementing Load Balancing Loss for Training '
    'Specialized Mixture-of-Expert Models", ACL 2025, arXiv 2501.11873',
    "designs": ["top-k"],
    "names": ["LoadBalancingLoss", "GlobalBalance", "BalanceSyncError"],
}

Scope = Literal["global", "micro", "sequence", "shuffle"]
_GATE = re.compile(r"\.(gate|router)\.weight$")
SCOPES = ("global", "micro", "sequence", "shuffle")


class BalanceSyncError(BakeoffError, RuntimeError):
    """Expert counts could not be exchanged: a process died, hung, or reported bad input."""


@dataclass(frozen=True)
class _Batch:
    """A micro-batch of this process, checked.

    ``probs`` L times ``(T, N)``; ``chosen`` L times ``(T, K)`` int64, -1 for none; ``mask``
    ``(T,)`` bool or None; ``sequences`` ``(B, S)`` or None.
    """

    probs: list[Tensor]
    chosen: list[Tensor]
    mask: Tensor | None
    sequences: tuple[int, int] | None

    @property
    def tokens(self) -> Tensor:
        """Number of tokens that are no padding, an int64 scalar."""
        if self.mask is None:
            return torch.tensor(len(self.probs[0]), device=self.probs[0].device)
        return self.mask.sum()


class LoadBalancingLoss(nn.Module):
    """``N sum_i f_i P_i`` with the frequencies f taken over the global batch; 1 when balanced.

    f is each expert's share of the assignments and carries no gradient; P is the mean probability
    over the tokens of this micro-batch in this process. Measured over a micro-batch, f asks each
    few sequences to use all experts equally, which forbids experts that serve a domain. Measured
    over the global batch it asks only that the batch as a whole does.

    Parameters
    ----------
    num_experts
        N, experts per layer.
    top_k
        K, experts per token.
    coef
        Multiplies the loss.
    scope
        Where f is measured. ``"global"``: over all processes of `group` and all micro-steps since
        the last `reset`. ``"micro"``: over this micro-batch in this process. ``"sequence"``: over
        each `sequences_per_group` sequences, f and P alike, and the mean over them. ``"shuffle"``:
        as ``"sequence"``, but f comes from as many tokens drawn without replacement from all of
        this micro-batch (the paper's control: same sample size, global distribution).
    group
        A ``torch.distributed`` process group; None for the default one, if there is one.
    accumulation_steps
        Micro-steps per optimizer step. More of them without a `reset` give a warning. See
        `accumulate`.
    layer_reduction
        ``"sum"`` over layers, or ``"mean"``.
    token_weighted
        With more than one process: multiply by this process's number of tokens over the mean
        number per process, so that the mean over processes is the loss of the pooled tokens,
        exactly. Without effect where the numbers agree, as in the paper.
    micro_share
        Adds this share of the micro-batch loss (the paper: 0.01, to even out the load inside each
        micro-batch for throughput). For the global scope.
    sequences_per_group
        Number of sequences behind one f ("Balance BSZ" in the paper) with the last two scopes.
    timeout
        Seconds to wait for the other processes. On a GPU the process group's own timeout applies.
    seed
        For ``"shuffle"``.

    Attributes
    ----------
    counts : Tensor
        ``(layers, N)`` int64, assignments since the last `reset`. A buffer that follows the module
        to a device, keeps its dtype and is not saved.

    Raises
    ------
    bakeoff.errors.DataError
        If a setting is impossible, or a `group` is given and ``torch.distributed`` is not
        initialised or this process is not in it.

    Notes
    -----
    Within accumulation, micro-step m sees the counts of micro-steps 1 to m, as in the paper's
    Algorithm 1: an approximation that the last micro-step leaves. Counts are integers here, so
    that they stay exact in any number; the paper's are float32.

    Normalisation: transformers' own loss is K when balanced, and pools all layers into one f and
    one P; Megatron's agrees with this one per layer, but is a sum over processes where this is a
    mean. In evaluation mode and without gradients nothing is counted or exchanged, and f is that
    of the micro-batch. Recomputation under gradient checkpointing does not count twice.

    References
    ----------
    Zihan Qiu, Zeyu Huang, Bo Zheng, Kaiyue Wen, Zekun Wang, Rui Men, Ivan Titov, Dayiheng Liu,
    Jingren Zhou and Junyang Lin. "Demons in the Detail: On Implementing Load Balancing Loss for
    Training Specialized Mixture-of-Expert Models". ACL 2025. arXiv:2501.11873.

    Examples
    --------
    Two micro-batches, each of one domain with an expert of its own: balanced as a whole.

    >>> sure = 9.0 * torch.eye(2)
    >>> first, second = sure[[0, 0, 0]], sure[[1, 1, 1]]
    >>> for scope in ("micro", "global"):
    ...     lbl = LoadBalancingLoss(num_experts=2, top_k=1, coef=1.0, scope=scope)
    ...     with lbl.accumulate(2):
    ...         print(scope, *(f"{float(lbl(logits)):.3f}" for logits in (first, second)))
    micro 2.000 2.000
    global 2.000 1.000
    """

    counts: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        coef: float = 0.01,
        scope: Scope = "global",
        group: Any = None,
        *,
        accumulation_steps: int = 1,
        layer_reduction: Literal["sum", "mean"] = "sum",
        token_weighted: bool = True,
        micro_share: float = 0.0,
        sequences_per_group: int = 1,
        timeout: float = 600.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise DataError(f"top_k must be from 1 to num_experts={num_experts}, got {top_k}")
        if scope not in SCOPES:
            raise DataError(f"unknown scope {scope!r}; there are: {', '.join(SCOPES)}")
        if layer_reduction not in ("sum", "mean"):
            raise DataError(f"layer_reduction must be 'sum' or 'mean', got {layer_reduction!r}")
        for name, value in (("coef", coef), ("micro_share", micro_share)):
            if not math.isfinite(value) or value < 0:
                raise DataError(f"{name} must be a finite number of at least 0, got {value}")
        if micro_share and scope != "global":
            raise DataError(f"micro_share is for scope='global', got scope={scope!r}")
        if sequences_per_group < 1:
            raise DataError(f"sequences_per_group must be at least 1, got {sequences_per_group}")
        if timeout <= 0:
            raise DataError(f"timeout must be above 0 seconds, got {timeout}")
        _check_steps(accumulation_steps)
        self.num_experts, self.top_k, self.coef, self.scope = num_experts, top_k, coef, scope
        self.group = group
        self.accumulation_steps = accumulation_steps
        self.layer_reduction = layer_reduction
        self.token_weighted = token_weighted
        self.micro_share = micro_share
        self.sequences_per_group = sequences_per_group
        self.timeout = timeout
        self.seed = seed
        self.register_buffer(
            "counts", torch.zeros(0, num_experts, dtype=torch.int64), persistent=False
        )
        self._steps: list[int] = []  # micro-steps counted, per layer
        self._shares: list[Tensor | None] = []  # what the last forward used, per layer
        self._warned = False
        self._generators: dict[torch.device, torch.Generator] = {}
        self._world()  # a group that cannot work is refused now

    # -- the buffer ----------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the counts. Call it after each optimizer step, also after a skipped one."""
        self.counts.zero_()
        self._steps = [0] * len(self._steps)
        self._shares = [None] * len(self._shares)
        self._warned = False

    @contextmanager
    def accumulate(self, steps: int) -> Iterator[Self]:
        """Hold the micro-steps of one optimizer step: counts start at zero and end at zero.

        Parameters
        ----------
        steps
            Micro-steps to come; more give a warning. Dividing each micro-batch's loss by `steps`
            is the training loop's part.
        """
        _check_steps(steps)
        before = self.accumulation_steps
        self.reset()
        self.accumulation_steps = steps
        try:
            yield self
        finally:
            self.accumulation_steps = before
            self.reset()

    @property
    def fractions(self) -> Tensor:
        """``(layers, N)`` float32: each expert's share of the assignments since the last reset."""
        return _shares(self.counts, torch.empty(0, device=self.counts.device))

    # -- the loss ------------------------------------------------------------------------------

    def forward(
        self,
        router_logits: Tensor | Sequence[Tensor] | Routing,
        selected_experts: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        layer: int = 0,
        probabilities: bool = False,
    ) -> Tensor:
        """Return the loss, and count the assignments if training.

        Parameters
        ----------
        router_logits
            ``(T, N)`` or ``(B, S, N)``, of any floating dtype; or one such tensor per layer, as
            transformers returns them. Before softmax, top-k and anything else. Or a `Routing`,
            whose ``probs`` and ``indices`` are taken; the second argument may then be the mask.
        selected_experts
            ``(T, K)`` or ``(B, S, K)`` integers, -1 for none; one per layer if there are several.
            None takes the K largest logits.
        attention_mask
            ``(T,)`` or ``(B, S)``, zero or False at padding, which counts nowhere.
        layer
            Number of the (first) layer given, where a model's layers call one after the other.
        probabilities
            `router_logits` are probabilities already.

        Returns
        -------
        Tensor
            Scalar, float32 (float64 for float64 logits), with `coef` applied.

        Raises
        ------
        bakeoff.errors.DataError
            If shapes disagree, a logit is not finite, or all tokens are padding. With several
            processes, the others raise `BalanceSyncError` then: none waits.
        BalanceSyncError
            If the other processes do not answer.
        """
        if isinstance(router_logits, Routing) and attention_mask is None:
            # The losses of a mixture layer are called as loss(routing, mask).
            attention_mask = cast("Tensor | None", selected_experts)
        counted = self.scope == "global" and self.training and torch.is_grad_enabled()
        recomputed = counted and in_backward() and self._share(layer) is not None
        exchange = counted and not recomputed and self._world() > 1
        try:
            batch = self._read(router_logits, selected_experts, attention_mask, probabilities)
        except DataError:
            if exchange:  # the others wait for this process
                several = isinstance(router_logits, Sequence)
                self._announce_failure(len(cast(Any, router_logits)) if several else 1)
            raise
        if self.scope in ("sequence", "shuffle"):
            terms = [self._by_group(batch, i) for i in range(len(batch.probs))]
        else:
            terms = self._by_batch(batch, layer, counted, recomputed, exchange)
        loss = torch.stack(terms).sum()
        return self.coef * (loss / len(terms) if self.layer_reduction == "mean" else loss)

    def from_output(self, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Return the loss for what a transformers model returned with ``output_router_logits``.

        Parameters
        ----------
        output
            The model's output. Experts are taken to be the `top_k` largest logits, as in Mixtral,
            OLMoE and the Qwen mixtures.
        attention_mask
            ``(B, S)``, as given to the model.

        Raises
        ------
        bakeoff.errors.ModelError
            If there are no router logits.

        Notes
        -----
        transformers 5.0 to 5.2 return probabilities under the name of router logits: rows that are
        not negative and sum to 1 are taken for such.
        """
        layers = _router_logits(output)
        probabilities = _are_probabilities(layers[0])
        return cast(Tensor, self(layers, None, attention_mask, probabilities=probabilities))

    def attach(self, model: nn.Module) -> Attachment:
        """Put this loss in the place of a transformers model's own balance loss.

        From then on the ``loss`` that the model returns in training holds this loss instead of
        ``router_aux_loss_coef`` times its own; ``aux_loss`` is this loss.

        Parameters
        ----------
        model
            A causal language model with router logits, wrapped (PEFT, DDP) or not.

        Returns
        -------
        Attachment
            Undone by its ``remove()``, or by leaving a ``with`` block.

        Raises
        ------
        bakeoff.errors.ModelError
            If the model has no balance loss of its own to replace.
        bakeoff.errors.DataError
            If its number of experts or of choices is another.

        Notes
        -----
        Where the model is called with ``num_items_in_batch``, as `transformers.Trainer` does, its
        loss is a part of the optimizer step's loss, not a mean; the balance loss is then divided
        by `accumulation_steps`. (The model's own is not, and so weighs that many times as much.)
        """
        return Attachment(self, model)

    def callback(self) -> TrainerCallback:
        """Return a callback for `transformers.Trainer`.

        It attaches the loss when training begins, knows the accumulation steps, resets the counts
        after each optimizer step, and detaches at the end.

        Returns
        -------
        transformers.TrainerCallback
            For ``Trainer(callbacks=[lbl.callback()])``.
        """
        return _make_callback(self)

    # -- parts ---------------------------------------------------------------------------------

    def _by_batch(
        self, batch: _Batch, layer: int, counted: bool, recomputed: bool, exchange: bool
    ) -> list[Tensor]:
        n_layers = len(batch.probs)
        means = [token_mean(probs, batch.mask) for probs in batch.probs]
        own = torch.stack([self._count(each, batch.mask) for each in batch.chosen])
        weight: Tensor | float = 1.0
        micro = _shares(own, means[0])
        if recomputed:
            shares = torch.stack([cast(Tensor, self._share(layer + i)) for i in range(n_layers)])
        elif counted:
            pooled = own
            if exchange:
                pooled, weight = self._exchange(own, batch)
            self._add(pooled, layer)
            shares = _shares(self.counts[layer : layer + n_layers], means[0])
            for i in range(n_layers):
                self._shares[layer + i] = shares[i]
            self._warn_if_not_reset()
        else:
            shares = micro
            if self.scope == "global" and self.training and layer < len(self._shares):
                # The first pass of reentrant checkpointing: its second pass counts.
                self._shares[layer : layer + n_layers] = [None] * n_layers
        shares = shares + self.micro_share * micro
        return [
            weight * self.num_experts * (share * mean).sum()
            for share, mean in zip(shares, means, strict=True)
        ]

    def _by_group(self, batch: _Batch, layer: int) -> Tensor:
        if batch.sequences is None:
            raise DataError(
                f"scope={self.scope!r} needs to know the sequences: give logits of shape (B, S, "
                f"{self.num_experts}), or an attention_mask of shape (B, S)"
            )
        probs, chosen = batch.probs[layer], batch.chosen[layer]
        n_sequences, length = batch.sequences
        n_groups = -(-n_sequences // self.sequences_per_group)
        sequence = torch.arange(n_sequences, device=probs.device).repeat_interleave(length)
        group = sequence // self.sequences_per_group
        real = torch.ones_like(group) if batch.mask is None else batch.mask.long()
        sizes = group.new_zeros(n_groups).scatter_add_(0, group, real)
        summed = probs.new_zeros(n_groups, self.num_experts)
        summed = summed.index_add(0, group, probs * real[:, None])
        mean = summed / sizes.clamp_min(1)[:, None]
        if self.scope == "shuffle":
            rows = self._drawn(real, sizes)
            group = torch.arange(n_groups, device=probs.device).repeat_interleave(sizes)
            chosen, real = chosen[rows], real[rows]
        chosen = chosen.masked_fill(real[:, None] == 0, -1)
        cell = group[:, None] * (self.num_experts + 1) + chosen + 1
        counts = count_choices(cell, n_groups * (self.num_experts + 1))
        shares = _shares(counts.view(n_groups, -1)[:, 1:], mean)
        each = self.num_experts * (shares * mean).sum(dim=1)
        return each.sum() / (sizes > 0).sum()

    def _drawn(self, real: Tensor, sizes: Tensor) -> Tensor:
        """Return, group by group, as many rows as the group has, drawn from all rows."""
        device = real.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        pool = real.nonzero()[:, 0]
        drawn = [
            pool[torch.randperm(len(pool), generator=self._generators[device], device=device)[:n]]
            for n in sizes.tolist()
        ]
        return torch.cat(drawn)

    def _count(self, chosen: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            chosen = chosen.masked_fill(~mask[:, None], -1)
        return count_choices(chosen, self.num_experts)

    @torch.no_grad()
    def _add(self, counts: Tensor, layer: int) -> None:
        needed = layer + len(counts)
        if needed > len(self.counts) or self.counts.device != counts.device:
            grown = torch.zeros(
                max(needed, len(self.counts)),
                self.num_experts,
                dtype=torch.int64,
                device=counts.device,
            )
            grown[: len(self.counts)] = self.counts.to(counts.device)
            self.counts = grown
        missing = needed - len(self._steps)
        self._steps += [0] * missing
        self._shares += [None] * missing
        self.counts[layer:needed] += counts
        for i in range(layer, needed):
            self._steps[i] += 1

    def _share(self, layer: int) -> Tensor | None:
        return self._shares[layer] if layer < len(self._shares) else None

    def _warn_if_not_reset(self) -> None:
        if self._warned or max(self._steps) <= self.accumulation_steps:
            return
        self._warned = True
        warnings.warn(
            f"{max(self._steps)} micro-steps were counted since the last reset, "
            f"accumulation_steps is {self.accumulation_steps}: call reset() after each optimizer "
            "step (after_optimizer_step(model), for the layers of to_moe), or declare the "
            "micro-steps with accumulation_steps or accumulate(steps)",
            stacklevel=6,  # past forward and the call of a module
        )

    # -- input ---------------------------------------------------------------------------------

    def _read(
        self,
        router_logits: Tensor | Sequence[Tensor] | Routing,
        selected_experts: Tensor | Sequence[Tensor] | None,
        attention_mask: Tensor | None,
        probabilities: bool,
    ) -> _Batch:
        if isinstance(router_logits, Routing):
            values, choices = [router_logits.probs], [router_logits.indices]
            probabilities = True
        else:
            values = _listed("router_logits", router_logits)
            choices = (
                _listed("selected_experts", selected_experts)
                if selected_experts is not None
                else []
            )
            if choices and len(choices) != len(values):
                raise DataError(
                    f"selected_experts has {len(choices)} layers, router_logits {len(values)}"
                )
        leading = tuple(values[0].shape[:-1])
        for each in values:
            if each.ndim not in (2, 3) or each.shape[-1] != self.num_experts:
                raise DataError(
                    f"router_logits must be (T, {self.num_experts}) or (B, S, {self.num_experts}), "
                    f"got {tuple(each.shape)}"
                )
            if not each.is_floating_point():
                raise DataError(f"router_logits must be of a floating dtype, got {each.dtype}")
            if each.shape[:-1] != leading:
                raise DataError(
                    f"router_logits of all layers must have one shape, got {leading} and "
                    f"{tuple(each.shape[:-1])} tokens"
                )
        device = values[0].device  # a model may be spread over several
        flat = [each.reshape(-1, self.num_experts).to(device) for each in values]
        n_tokens = len(flat[0])
        mask, sequences = None, leading if len(leading) == 2 else None
        if attention_mask is not None:
            given = tuple(attention_mask.shape)
            if len(given) > 2 or attention_mask.numel() != n_tokens:
                raise DataError(
                    f"attention_mask must be ({n_tokens},) or (B, S) with B * S = {n_tokens}, "
                    f"got {given}"
                )
            mask = attention_mask.reshape(-1).to(device) != 0
            sequences = given if len(given) == 2 else sequences
            _check("all tokens are padding: attention_mask is zero throughout", mask.any())
        if not n_tokens:
            raise DataError("router_logits hold no tokens")
        for i, each in enumerate(flat):
            if mask is not None:  # padding may hold anything
                flat[i] = each.masked_fill(~mask[:, None], 0.0)
        probs = [self._probabilities(each, probabilities) for each in flat]
        for each in probs:  # NaN and infinite logits give NaN; minus infinity is an expert left out
            _check("router_logits hold NaN or infinity", torch.isfinite(each.sum()))
        if choices:
            given_k = None if isinstance(router_logits, Routing) else self.top_k
            chosen = [self._choices(each.to(device), n_tokens, given_k) for each in choices]
        else:
            # Not of the probabilities, which round different logits to the same number.
            chosen = [top_k(each, self.top_k) for each in flat]
        return _Batch(probs, chosen, mask, sequences)

    def _probabilities(self, values: Tensor, already: bool) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            exact = values.dtype if values.dtype == torch.float64 else torch.float32
            return values.to(exact) if already else values.softmax(dim=1, dtype=exact)

    def _choices(self, chosen: Tensor, n_tokens: int, k: int | None) -> Tensor:
        wanted = chosen.shape[-1] if k is None else k
        if chosen.ndim < 2 or chosen.shape[-1] != wanted or chosen.numel() != n_tokens * wanted:
            raise DataError(
                f"selected_experts must be ({n_tokens}, {wanted}) or (B, S, {wanted}), got "
                f"{tuple(chosen.shape)}"
            )
        if chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise DataError(f"selected_experts must be integers, got {chosen.dtype}")
        inside = (chosen >= -1) & (chosen < self.num_experts)
        _check(
            f"selected_experts must be from 0 to {self.num_experts - 1}, or -1 for none",
            inside.all(),
        )
        return chosen.detach().reshape(n_tokens, -1).long()

    # -- other processes -----------------------------------------------------------------------

    def _world(self) -> int:
        """Return the number of processes that share counts."""
        if not (dist.is_available() and dist.is_initialized()):
            if self.group is not None:
                raise DataError("group is given, but torch.distributed is not initialised")
            return 1
        if self.scope != "global":
            return 1
        if self.group is not None and dist.get_rank(self.group) < 0:
            raise DataError(
                f"process {dist.get_rank()} is not in the group whose counts are to be shared: "
                "make the loss with the group that this process belongs to"
            )
        return dist.get_world_size(self.group)

    def _exchange(self, own: Tensor, batch: _Batch) -> tuple[Tensor, Tensor | float]:
        """Return the counts of all processes, and this process's weight."""
        tokens = batch.tokens.expand(len(own), 1)
        sent = torch.cat([own, tokens, torch.zeros_like(tokens)], dim=1)
        received = self._all_reduce(sent)
        failed = received[0, -1]
        if own.is_cuda:
            torch._assert_async(failed == 0, "another process got bad router logits")
        elif failed:
            raise BalanceSyncError(
                f"{int(failed)} of {self._world()} processes refused their router logits: see "
                "their errors"
            )
        weight: Tensor | float = 1.0
        if self.token_weighted:
            weight = tokens[0, 0].to(batch.probs[0]) * self._world() / received[0, -2]
        return received[:, :-2], weight

    def _announce_failure(self, n_layers: int) -> None:
        row = torch.zeros(n_layers, self.num_experts + 2, dtype=torch.int64)
        row[:, -1] = 1
        # The device is that of the group, which NCCL does not leave open.
        backend = str(dist.get_backend(self.group))
        self._all_reduce(row.to("cuda" if backend == "nccl" else "cpu"))

    def _all_reduce(self, value: Tensor) -> Tensor:
        try:
            work = dist.all_reduce(value, group=self.group, async_op=True)
            if value.is_cuda:
                work.wait()  # with a timeout it would hold up the processor
            else:
                work.wait(timedelta(seconds=self.timeout))
        except (RuntimeError, ValueError) as error:
            raise BalanceSyncError(
                f"process {dist.get_rank()} of {dist.get_world_size()} could not add up expert "
                f"counts on {value.device.type} through {dist.get_backend(self.group)} within "
                f"{self.timeout:g} s; another process died, hung or skipped a step, or the group "
                f"has no backend for this device ({error})"
            ) from error
        return value

    # -- housekeeping --------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadBalancingLoss:
        # Neither process groups nor generators can be copied: one is shared, the other made anew.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            kept = value if name == "group" else {} if name == "_generators" else None
            twin.__dict__[name] = copy.deepcopy(value, memo) if kept is None else kept
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError("a LoadBalancingLoss with a process group cannot be pickled")
        return {**self.__dict__, "_generators": {}}

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, coef={self.coef:g}, "
            f"scope={self.scope!r}"
        )


class Attachment:
    """A `LoadBalancingLoss` in the place of a model's own; see `LoadBalancingLoss.attach`."""

    def __init__(self, loss: LoadBalancingLoss, model: nn.Module) -> None:
        owner = next(
            (each for each in model.modules() if hasattr(each, "router_aux_loss_coef")), None
        )
        config: Any = getattr(owner, "config", None)
        if owner is None or not hasattr(config, "output_router_logits"):
            raise ModelError(
                f"{type(model).__name__} has no balance loss to replace (no router_aux_loss_coef "
                "and output_router_logits): call the loss yourself with the router's logits"
            )
        experts = next(
            (
                getattr(config, name)
                for name in ("num_local_experts", "num_experts", "n_routed_experts")
                if hasattr(config, name)
            ),
            None,
        )
        for name, ours, theirs in (
            ("num_experts", loss.num_experts, experts),
            ("top_k", loss.top_k, getattr(config, "num_experts_per_tok", None)),
        ):
            if theirs is not None and ours != theirs:
                raise DataError(f"{name} is {ours}, but {type(owner).__name__} has {theirs}")
        self.loss, self.owner = loss, owner
        self.divisor = 1.0
        """What the loss is divided by, besides the accumulation steps, where the model's own loss
        is a part of the step's loss: the number of processes, if that loss is multiplied by it."""
        self._signature = inspect.signature(type(owner).forward)
        self._probabilities: bool | None = None
        self._coefficient = owner.router_aux_loss_coef
        cast(Any, owner).router_aux_loss_coef = 0.0
        self._hooks = [
            owner.register_forward_pre_hook(self._ask, with_kwargs=True),
            owner.register_forward_hook(self._add, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Give the model its own balance loss back."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            cast(Any, self.owner).router_aux_loss_coef = self._coefficient
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _ask(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not model.training:
            return None
        return args, {**kwargs, "output_router_logits": True}

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or getattr(output, "loss", None) is None:
            return None
        logits = _router_logits(output)
        gates = (p for name, p in model.named_parameters() if _GATE.search(name))
        check_gradient(any(each.requires_grad for each in logits), gates)
        if self._probabilities is None:
            self._probabilities = _are_probabilities(logits[0])
        mask = self._mask(self._signature.bind(model, *args, **kwargs).arguments)
        balance = self.loss(logits, None, mask, probabilities=self._probabilities)
        scale = 1.0
        if kwargs.get("num_items_in_batch") is not None:
            scale = 1.0 / (self.loss.accumulation_steps * self.divisor)
        output.loss = output.loss + scale * balance.to(output.loss.device)
        output.aux_loss = balance
        return output

    def _mask(self, given: dict[str, Any]) -> Tensor | None:
        mask = given.get("attention_mask")
        if mask is None and self.loss.scope in ("sequence", "shuffle"):
            ids, states = given.get("input_ids"), given.get("inputs_embeds")
            read = ids if ids is not None else cast(Tensor, states)
            mask = torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise DataError(
                "the balance loss needs a two-dimensional attention_mask, or none, to know the "
                f"padding; got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask)}"
            )
        return mask


def _make_callback(loss: LoadBalancingLoss) -> TrainerCallback:
    from transformers import TrainerCallback

    class GlobalBalanceCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Attaches a `LoadBalancingLoss` for the time of a training and resets it in time."""

        def __init__(self) -> None:
            self.attachment: Attachment | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Attach the loss."""
            self._detach()
            self.attachment = loss.attach(kwargs["model"])
            self.before = loss.accumulation_steps
            loss.reset()
            if args.average_tokens_across_devices and args.world_size > 1:
                # The trainer multiplies the loss by the number of processes.
                self.attachment.divisor = float(args.world_size)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Note the micro-steps to come: an epoch's last step may have fewer."""
            steps = int(args.gradient_accumulation_steps)
            try:
                batches = len(kwargs["train_dataloader"])
            except (KeyError, TypeError):  # a stream without a length
                batches = 0
            if batches:
                done = state.global_step % -(-batches // steps)
                steps = min(steps, batches - done * steps)
            loss.accumulation_steps = steps

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Forget the counts."""
            loss.reset()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Detach the loss."""
            self._detach()

        def _detach(self) -> None:
            if self.attachment is not None:
                self.attachment.remove()
                self.attachment = None
                loss.accumulation_steps = self.before
                loss.reset()

    return GlobalBalanceCallback()


def _check_steps(steps: int) -> None:
    if steps < 1 or steps != int(steps):
        raise DataError(f"accumulation steps must be a whole number of at least 1, got {steps!r}")


def _listed(name: str, given: Any) -> list[Tensor]:
    each = [given] if isinstance(given, Tensor) else given
    if (
        not isinstance(each, Sequence)
        or not each
        or not all(isinstance(one, Tensor) for one in each)
    ):
        raise DataError(
            f"{name} must be a tensor or a sequence of tensors, one per layer, got "
            f"{type(given).__name__}"
        )
    return list(each)


def _check(message: str, condition: Tensor) -> None:
    """Raise unless the scalar is true; on a GPU later, without waiting for it."""
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif not condition:
        raise DataError(message)


def _shares(counts: Tensor, like: Tensor) -> Tensor:
    """Return ``(..., N)`` counts as shares that sum to 1, in the dtype of `like`."""
    return counts.to(like) / counts.sum(dim=-1, keepdim=True).clamp_min(1)


def _router_logits(output: Any) -> list[Tensor]:
    found = getattr(output, "router_logits", None)
    if not found:
        raise ModelError(
            "the model's output has no router_logits: call it with output_router_logits=True, and "
            "use a mixture of experts such as Mixtral, OLMoE or Qwen-MoE"
        )
    return [each for each in found if each is not None]


def _are_probabilities(values: Tensor) -> bool:
    with torch.no_grad():
        total = values.detach().float().sum(dim=-1)
        return bool((values >= 0).all() and ((total - 1).abs() < 1e-2).all())
