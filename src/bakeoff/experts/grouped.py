"""Matrix products in which each run of rows has a weight matrix of its own, fast on the CPU.

Rows are sorted by expert. Each expert's products are ordinary matrix multiplications on its run.
Two things make the difference to a plain implementation on the CPU, where the arithmetic is only
half of the time: elementwise work is done expert by expert, on rows that are still in the
processor's cache; and large results (activations, weight gradients) are written into memory that
an earlier step has given back, because memory fresh from the system costs more time than writing
to it does.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Smaller tensors come from the allocator's own free lists anyway.
_WORTH_KEEPING = 2**20


class Workspace:
    """Memory for large tensors that is used again once no tensor refers to it.

    Results are ordinary tensors. Whether anything still refers to a piece of memory is known from
    the reference count of its storage, so that a gradient that the user keeps is never written to.
    Belongs to one module and goes with it; copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of the dtype and device of `like`."""
        n_bytes = math.prod(shape) * like.element_size()
        count = getattr(torch._C, "_storage_Use_Count", None)
        if like.device.type != "cpu" or n_bytes < _WORTH_KEEPING or count is None:
            return like.new_empty(shape)
        with self._lock:
            # 1 is the reference of the list itself. As `from_blob`, `set_` makes a new tensor.
            free = [storage for storage in self._storages if count(storage._cdata) == 1]
            fitting = [s for s in free if n_bytes <= s.nbytes() <= 2 * n_bytes]
            if fitting:
                best = min(fitting, key=torch.UntypedStorage.nbytes)
                return like.new_empty(0).set_(best, 0, shape)  # type: ignore[call-overload,no-any-return]
            # Nothing fits: what is free belongs to batches of another size. Let it go.
            unused = {id(storage) for storage in free}
            self._storages = [s for s in self._storages if id(s) not in unused]
            fresh = like.new_empty(shape)
            self._storages.append(fresh.untyped_storage())
            return fresh

    def clear(self) -> None:
        """Give back what is not in use."""
        with self._lock:
            self._storages = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, both into given memory."""

    apply: Callable[..., Tensor]  # apply(x, out=)
    backward: Callable[..., Tensor]  # backward(gradient, x, grad_input=)


_aten = torch.ops.aten


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(_aten.gelu.out, approximate=approximate),
        partial(_aten.gelu_backward.grad_input, approximate=approximate),
    )


def _relu_backward(gradient: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return _aten.threshold_backward.grad_input(gradient, x, 0, grad_input=grad_input)  # type: ignore[no-any-return]


ACTIVATIONS = {
    "silu": Activation(_aten.silu.out, _aten.silu_backward.grad_input),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(lambda x, out: torch.clamp_min(x, 0, out=out), _relu_backward),
}
"""Activations with a fast path, by name."""

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The same as ordinary functions."""


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors in the dtype of autocast if it is on for the first one's device."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def runs(sizes: Tensor) -> list[tuple[int, slice]]:
    """Return (expert, its rows) for every expert that has rows."""
    found, start = [], 0
    for expert, size in enumerate(sizes.tolist()):
        if size:
            found.append((expert, slice(start, start + size)))
        start += size
    return found


def _has_grouped_kernel(rows: Tensor) -> bool:
    # The kernel is for bfloat16 and rows whose length in bytes is a multiple of 16.
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )


def grouped_linear(
    rows: Tensor,
    sizes: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply each run of rows by its own matrix.

    Parameters
    ----------
    rows
        ``(R, n_in)``, sorted by expert.
    sizes
        ``(N,)`` int64, rows of each expert; they sum to R.
    weight
        ``(N, n_out, n_in)``.
    bias
        ``(N, n_out)``.
    workspace
        Where large results live.

    Returns
    -------
    Tensor
        ``(R, n_out)``.

    Examples
    --------
    >>> weight = torch.tensor([[[1.0]], [[10.0]]])
    >>> grouped_linear(torch.ones(3, 1), torch.tensor([1, 2]), weight).flatten().tolist()
    [1.0, 10.0, 10.0]
    """
    rows, weight, bias = autocast(rows, weight, bias)
    workspace = Workspace() if workspace is None else workspace
    if _has_grouped_kernel(rows) and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0:
        offsets = sizes.to(rows.device).cumsum(0).to(torch.int32)
        product = F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    else:
        product = _GroupedLinear.apply(rows, sizes, weight, workspace)  # type: ignore[no-untyped-call]
    if bias is None:
        return product
    expert = torch.repeat_interleave(sizes.to(rows.device), output_size=len(rows))
    return product + bias[expert]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: Tensor, weight: Tensor, workspace: Workspace
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes, ctx.workspace = sizes, workspace
        product = workspace.empty((len(rows), weight.shape[1]), rows)
        for expert, run in runs(sizes):
            torch.mm(rows[run], weight[expert].T, out=product[run])
        return product

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        to_rows = to_weight = None
        if ctx.needs_input_grad[0]:
            to_rows = ctx.workspace.empty(tuple(rows.shape), rows)
            for expert, run in runs(ctx.sizes):
                torch.mm(gradient[run], weight[expert], out=to_rows[run])
        if ctx.needs_input_grad[2]:
            to_weight = _empty_gradient(weight, ctx.sizes, ctx.workspace)
            for expert, run in runs(ctx.sizes):
                torch.mm(gradient[run].T, rows[run], out=to_weight[expert])
        return to_rows, None, to_weight, None


def _empty_gradient(parameter: Tensor, sizes: Tensor, workspace: Workspace) -> Tensor:
    """Return memory for a gradient, zero where an expert has no rows."""
    gradient = workspace.empty(tuple(parameter.shape), parameter)
    for expert, size in enumerate(sizes.tolist()):
        if not size:
            gradient[expert].zero_()
    return gradient


def grouped_feed_forward(
    rows: Tensor,
    sizes: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    gated: bool,
    workspace: Workspace | None = None,
) -> Tensor:
    """Apply to each run of rows its own two-layer perceptron without biases.

    Parameters
    ----------
    rows
        ``(R, hidden)``, sorted by expert.
    sizes
        ``(N,)`` int64, rows of each expert.
    w_in
        ``(N, 2 * width, hidden)`` if gated, gate before value, else ``(N, width, hidden)``.
    w_out
        ``(N, n_out, width)``.
    activation
        A key of `ACTIVATIONS`.
    gated
        Whether the activation of the gate multiplies the value.
    workspace
        Where large results live.

    Returns
    -------
    Tensor
        ``(R, n_out)``. The backward pass recomputes the activation from what the first product
        gave, instead of keeping it.
    """
    rows, w_in, w_out = autocast(rows, w_in, w_out)
    workspace = Workspace() if workspace is None else workspace
    if rows.is_cuda:
        inner = grouped_linear(rows, sizes, w_in, None, workspace)
        if gated:
            gate, value = inner.chunk(2, dim=1)
            inner = PLAIN[activation](gate) * value
        else:
            inner = PLAIN[activation](inner)
        return grouped_linear(inner, sizes, w_out, None, workspace)
    return _GroupedFeedForward.apply(  # type: ignore[no-any-return, no-untyped-call]
        rows, sizes, w_in, w_out, ACTIVATIONS[activation], gated, workspace
    )


class _GroupedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sizes: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        activation: Activation,
        gated: bool,
        workspace: Workspace,
    ) -> Tensor:
        width = w_out.shape[2]
        longest = int(sizes.max()) if len(rows) else 0
        keep = any(ctx.needs_input_grad)
        # Without a backward pass, one expert's rows at a time are enough.
        first = workspace.empty((len(rows) if keep else longest, w_in.shape[1]), rows)
        inner_rows = workspace.empty((longest, width), rows)
        result = workspace.empty((len(rows), w_out.shape[1]), rows)
        for expert, run in runs(sizes):
            before = first[run] if keep else first[: run.stop - run.start]
            inner = inner_rows[: len(before)]
            torch.mm(rows[run], w_in[expert].T, out=before)
            activation.apply(before[:, :width], out=inner)
            if gated:
                inner.mul_(before[:, width:])
            torch.mm(inner, w_out[expert].T, out=result[run])
        if keep:
            ctx.save_for_backward(rows, first, w_in, w_out)
            ctx.sizes, ctx.activation, ctx.gated = sizes, activation, gated
            ctx.workspace = workspace
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, first, w_in, w_out = ctx.saved_tensors
        workspace, width = ctx.workspace, w_out.shape[2]
        longest = int(ctx.sizes.max()) if len(rows) else 0
        to_rows = to_w_in = to_w_out = None
        if ctx.needs_input_grad[0]:
            to_rows = workspace.empty(tuple(rows.shape), rows)
        if ctx.needs_input_grad[2]:
            to_w_in = _empty_gradient(w_in, ctx.sizes, workspace)
        if ctx.needs_input_grad[3]:
            to_w_out = _empty_gradient(w_out, ctx.sizes, workspace)
        activated_rows = workspace.empty((longest, width), rows)
        inner_rows = workspace.empty((longest, width), rows)
        to_inner_rows = workspace.empty((longest, width), rows)
        to_before_rows = workspace.empty((longest, w_in.shape[1]), rows)
        for expert, run in runs(ctx.sizes):
            before, above = first[run], gradient[run]
            n_rows = len(before)
            gate, activated = before[:, :width], activated_rows[:n_rows]
            to_inner, to_before = to_inner_rows[:n_rows], to_before_rows[:n_rows]
            torch.mm(above, w_out[expert], out=to_inner)
            if ctx.gated or to_w_out is not None:
                ctx.activation.apply(gate, out=activated)
            if to_w_out is not None:
                inner = activated
                if ctx.gated:
                    inner = torch.mul(activated, before[:, width:], out=inner_rows[:n_rows])
                torch.mm(above.T, inner, out=to_w_out[expert])
            if ctx.gated:
                torch.mul(to_inner, activated, out=to_before[:, width:])
                to_inner.mul_(before[:, width:])
            ctx.activation.backward(to_inner, gate, grad_input=to_before[:, :width])
            if to_rows is not None:
                torch.mm(to_before, w_in[expert], out=to_rows[run])
            if to_w_in is not None:
                torch.mm(to_before.T, rows[run], out=to_w_in[expert])
        return to_rows, None, to_w_in, to_w_out, None, None, None
