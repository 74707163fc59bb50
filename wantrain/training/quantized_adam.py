"""Adam whose momentum is averaged between workers instead of the gradient, so that it can be compressed hard.

Adam divides by √v, which is not linear: what compression loses of a gradient can't be made up for later, since it has
gone through the square. After H. Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
Convergence Speed" (ICML 2021), and the QuantizedAdam of DS3Lab/AC-SGD, training therefore has two phases:

    warm-up    AdamW as ever; gradients are averaged in full precision
    after it   v stays as it is; worker r adds its own gradient to the momentum, and that is averaged, compressed:

        m_r = β₁ m + (1 − β₁) R g_r          g_r: its share of the gradient, Σ g_r = g
        m   = average of the m_r = Σ [ β₁ m / R + (1 − β₁) g_r ]
        p   ← p − lr · m̂ / (√v̂ + ε)

With v fixed, p depends on m linearly: what error feedback delivers late is as good as on time. Without a codec the sum
is Adam's own β₁ m + (1 − β₁) g. v̂ keeps the bias correction of the last warm-up step; m̂ has Adam's. Both phases meet
without a jump.

What is summed is the term in brackets by √v̂ + ε, in the place of the gradient: `make_share` writes it into `.grad`, a
reducer sums it there, `take_sum` makes the new momentum of it, `step` uses that. So buckets leave during the backward
as ever. Dividing *before* the codec is not in the papers. It changes nothing but what is lost: a codec's error is as
large for all values of a group, and there the step is 1/√v̂ times the error, ten times as much for a value with small
gradients as for its neighbour. After the division every value's error counts alike, and a codec that sends the greatest
sends what moves the weights most. Measured on a two-layer GPT (wikitext, 2500 steps, 250 of warm-up, one seed), held
out: `cocktail:4,mask=0.2`, 86 times fewer bytes, 1.877 dividing before and 1.888 after; fp32 1.885; AdamW 1.868.

**v must be good when it is fixed**, as nothing corrects it any more. Two changes to the paper:

- Adam's v remembers 1/(1 − β₂) steps: 20 with β₂ = 0.95, a noisy estimate to keep for good. In the second half of the
  warm-up its memory grows with the steps, so that it ends as the mean over half the warm-up.
- A value without a gradient so far (a rare token's) has v = 0, and Adam's own bound on a step, |m̂|/√v̂ ≲ 1, is gone with
  a fixed v: its first gradient would move it by lr · g/ε. So no v is left below a hundredth of its tensor's mean.

**Clipping.** The norm of a whole gradient is not known before it is summed; waiting for it would cost a latency and all
overlap. So it is the momentum, once summed, that is scaled to the norm allowed, c. Had every gradient been clipped to
c, their running average would be no longer than c either: the greatest update is the same as with clipped gradients.
The difference: an outlier far above c takes over the direction of the momentum for 1/(1 − β₁) steps instead of making
up (1 − β₁) of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

_LEAST_OF_MEAN = 0.01
"""Chosen: a value's step is then at most ten times that of a value with its tensor's typical gradient."""


class QuantizedAdam(torch.optim.Optimizer):
    """AdamW for `warmup_steps` steps; then Adam with fixed v, for momenta that are averaged compressed.

    Alone, an optimizer like any other. Over R workers, each step after the warm-up (`is_warming_up` says when):

        loss.backward()                           # .grad: this worker's share of the gradient
        optimizer.make_share(parameters, R)       # .grad: its share of the momentum, scaled
        …                                         # sum every .grad over the workers
        optimizer.take_sum(parameters)            # .grad: the momentum, which may be clipped
        optimizer.step()

    `wantrain.Trainer` does so by itself.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        warmup_steps: int,
    ) -> None:
        """Set up; `weight_decay` is decoupled, as AdamW's. Raise ValueError for what can't work."""
        if warmup_steps < 1:
            raise ValueError(f"v must be learned before it is fixed (got warmup_steps = {warmup_steps}, expected 1 up)")
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"can't work with lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}")
        self.warmup_steps = warmup_steps
        self._taken: set[Tensor] = set()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def is_warming_up(self) -> bool:
        """Whether the next step takes gradients and still learns v."""
        return self._num_steps() < self.warmup_steps

    def _num_steps(self) -> int:
        states = (self.state[p] for group in self.param_groups for p in group["params"] if p in self.state)
        return max((int(state["step"]) for state in states if state), default=0)

    @torch.no_grad()
    def make_share(self, parameters: Sequence[Tensor], num_shares: int) -> None:
        """Turn each `.grad`, a share of the gradient, into as large a share of the new momentum, scaled for summing."""
        for parameter, beta, scale in self._scales(parameters):
            assert parameter.grad is not None
            momentum = self.state[parameter]["exp_avg"]
            parameter.grad.mul_(1 - beta).add_(momentum, alpha=beta / num_shares).div_(scale)

    @torch.no_grad()
    def take_sum(self, parameters: Sequence[Tensor]) -> None:
        """Turn each `.grad`, the sum of all shares, into the new momentum, which the next `step` uses."""
        for parameter, _, scale in self._scales(parameters):
            assert parameter.grad is not None
            parameter.grad.mul_(scale)
            self._taken.add(parameter)

    def _scales(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, float, Tensor]]:
        """Yield the parameters that have a gradient, each with β₁ and √v̂ + ε."""
        wanted = {parameter for parameter in parameters if parameter.grad is not None}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in wanted:
                    yield parameter, group["betas"][0], self._scale(self.state[parameter], group)

    def _scale(self, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        correction = 1 - self._forgotten(int(state["step"]), group["betas"][1])
        v: Tensor = state["exp_avg_sq"]
        return (v.sqrt() / math.sqrt(correction)).add_(group["eps"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_warming_up = self.is_warming_up
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            if not is_warming_up:
                alone = [p for p in updated if p not in self._taken]
                self.make_share(alone, 1)
                self.take_sum(alone)
            for parameter in updated:
                self._update(parameter, group, is_warming_up)
        self._taken.clear()
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], is_warming_up: bool) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, beta1 = int(state["step"]), group["betas"][0]
        if is_warming_up:
            state["exp_avg"].lerp_(grad, 1 - beta1)
            self._learn(state["exp_avg_sq"], grad, step, group["betas"][1])
        else:
            state["exp_avg"].copy_(grad)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], self._scale(state, group), value=-group["lr"] / (1 - beta1**step))

    def _learn(self, v: Tensor, grad: Tensor, step: int, beta: float) -> None:
        """Take a gradient into v; the last one of the warm-up makes it final."""
        surplus = step - self.warmup_steps // 2
        if surplus > 0:
            beta = 1 - 1 / (1 / (1 - beta) + surplus)
        v.mul_(beta).addcmul_(grad, grad, value=1 - beta)
        if step == self.warmup_steps:
            v.clamp_(min=_LEAST_OF_MEAN * v.mean())

    def _forgotten(self, step: int, beta: float) -> float:
        """Return the weight that v's zero at the beginning still has: the product of all betas, telescoped."""
        half = self.warmup_steps // 2
        memory, surplus = 1 / (1 - beta), min(step, self.warmup_steps) - half
        return beta ** min(step, half) * (memory / (memory + surplus) if surplus > 0 else 1.0)
