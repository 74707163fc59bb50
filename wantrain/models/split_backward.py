"""A backward in two parts: gradients of inputs first, since the stage before waits for them, those of weights later.

A product y = x·Wᵀ has two gradients that need nothing of each other. While layers run forward in `collecting`, their
products with weights are made by a function whose backward returns the first and puts the second off:

    whole    │ dy₂ → dx₂, dW₂ │ dy₁ → dx₁, dW₁ │
    split    │ dy₂ → dx₂ │ dy₁ → dx₁ │ ... send dx₁ ... │ dW₂ │ dW₁ │

Those are the products that `F.linear` and `torch.addmm` make of a weight; what is put off keeps x and dy. All else
(norms, biases, embeddings, `x @ weight`, torch's own attention module) has its gradients with the inputs'. Each
gradient is made by the very product that autograd would use, and added to `.grad` by autograd itself, so no bit differs
from a whole backward's where all of a weight's products are such, and hooks on parameters are called as ever.

Within a layer's own activation checkpointing nothing is put off: its backward runs the layer once more on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wantrain.errors import PlanError

_collecting: ContextVar[PostponedGradients | None] = ContextVar("_collecting", default=None)

Make = Callable[[], Tensor]
"""Makes a gradient that was put off; under autocast as its products are, since autograd adds up such."""


def collector() -> PostponedGradients | None:
    """Return whom a layer that runs forward now may hand gradients of its weights to, in its backward; None: nobody."""
    return _collecting.get()


class PostponedGradients:
    """Gradients of weights that were put off, by microbatch."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        """Put off those of the layers' products with weights; raise PlanError for layers that were compiled.

        A weight that several modules share isn't put off: autograd adds its gradients up before they reach `.grad`.
        """
        modules = nn.ModuleList(layers)
        for name, module in modules.named_modules():
            if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
                raise PlanError(f"layer {name} is compiled, so its backward can't be split; use schedule 1f1b")
        owners: dict[nn.Parameter, int] = {}
        for _, weight in modules.named_parameters(remove_duplicate=False):
            owners[weight] = owners.get(weight, 0) + 1
        self._weights = {weight for weight, count in owners.items() if count == 1 and weight.requires_grad}
        self._left: dict[int, list[tuple[nn.Parameter, Make]]] = {}
        self._microbatch = -1
        self.anchor = torch.empty(0, requires_grad=True)
        """In a weight's place in the graph, so that its output has a backward and its own hooks wait."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Run layers so that their backward puts gradients off."""
        token = _collecting.set(self)
        try:
            with _Products(self):
                yield
        finally:
            _collecting.reset(token)

    def begin(self, microbatch: int) -> None:
        """Say whose backward comes next."""
        self._microbatch = microbatch
        self._left[microbatch] = []

    def put_off(self, weight: nn.Parameter, make: Make) -> None:
        """Leave a gradient of the running backward for later."""
        self._left[self._microbatch].append((weight, make))

    def may_put_off(self, weight: object) -> bool:
        """Say whether a weight is one of those."""
        return isinstance(weight, nn.Parameter) and weight in self._weights and weight.requires_grad

    def weights(self) -> Collection[nn.Parameter]:
        """Return the weights that any gradient is still owed to."""
        return {weight for left in self._left.values() for weight, _ in left}

    def make(self, microbatch: int) -> None:
        """Make a microbatch's gradients, and add each to its weight's before the next is made."""
        owed: dict[nn.Parameter, list[Make]] = {}
        for weight, make in self._left.pop(microbatch):
            owed.setdefault(weight, []).append(make)
        for weight, (make, *more) in owed.items():
            grad = make()
            for another in more:
                grad = grad + another()
            torch.autograd.backward(weight, grad.to(weight.dtype))


_ARGUMENTS: dict[Any, tuple[str, ...]] = {F.linear: ("x", "weight", "bias"), torch.addmm: ("bias", "x", "weight")}
"""Functions that multiply with a weight, and what their arguments are, in order."""

_NAMES: dict[str, dict[Any, str]] = {
    "input": {F.linear: "x", torch.addmm: "bias"},
    "mat1": {torch.addmm: "x"},
    "mat2": {torch.addmm: "weight"},
}
"""Arguments that are called otherwise where they are given by name."""


def _saved_tensors_hooks() -> object:
    """Return what packs saved tensors now: a checkpointed layer's own hooks, or those around the stage."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class _Products(TorchFunctionMode):
    """Makes products with weights so that their gradients can be put off; leaves all else alone."""

    def __init__(self, postponed: PostponedGradients) -> None:
        super().__init__()
        self._postponed = postponed
        self._saving = _saved_tensors_hooks()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _ARGUMENTS:
            given = dict(zip(_ARGUMENTS[func], args, strict=False))
            given |= {_NAMES.get(name, {}).get(func, name): value for name, value in named.items()}
            if self._postponed.may_put_off(given.get("weight")) and self._is_plain(given):
                return self._product(given["x"], given["weight"], given.get("bias"), func is torch.addmm)
        return func(*args, **named)

    def _is_plain(self, given: Mapping[str, Any]) -> bool:
        """Say whether `_Product` makes a product's gradients, and its tensors are saved as the stage's are."""
        if not torch.is_grad_enabled() or _saved_tensors_hooks() != self._saving:
            return False
        x, weight, bias = given["x"], given["weight"], given.get("bias")
        is_matrix = x.dim() > 1 and weight.dim() == 2 and given.keys() <= {"x", "weight", "bias"}
        return is_matrix and (bias is None or bias.dim() == 1)

    def _product(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None, is_addmm: bool) -> Any:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        postponed = self._postponed
        hidden = (weight,)  # from autograd, which would call its hooks
        return _Product.apply(x, bias, postponed.anchor, hidden, is_addmm, postponed)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """x·Wᵀ + b as `F.linear` makes it, or x·W + b as `torch.addmm` does, whose weight lies the other way round."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, _anchor: Tensor, hidden: tuple[nn.Parameter], is_addmm: bool,
        postponed: PostponedGradients,
    ) -> Tensor:  # fmt: skip
        (weight,) = hidden
        used = weight.detach().to(x.dtype).requires_grad_()  # torch multiplies otherwise where nothing is trained
        ctx.save_for_backward(x, used)
        ctx.weight, ctx.bias, ctx.is_addmm, ctx.postponed = weight, bias, is_addmm, postponed
        added = None if bias is None else bias.to(x.dtype)
        made = torch.addmm(added, x, used) if is_addmm and added is not None else F.linear(x, used, added)
        output: Tensor = torch.ops.aten._unsafe_view(made, made.shape)  # no view: it may be changed in place
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, used = ctx.saved_tensors
        is_addmm = ctx.is_addmm
        rows, grad = x.flatten(0, -2), grads[0].flatten(0, -2)

        def make() -> Tensor:
            return rows.t().mm(grad) if is_addmm else grad.t().mm(rows)

        ctx.postponed.put_off(ctx.weight, make)
        needs_input, needs_bias, *_ = ctx.needs_input_grad
        input_grad = grad.mm(used.t() if is_addmm else used).view(x.shape) if needs_input else None
        return input_grad, grad.sum(0).to(ctx.bias.dtype) if needs_bias else None, None, None, None, None
