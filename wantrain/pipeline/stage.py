"""What a rank computes: real layers, or the time and bytes of layers that are not there.

`TorchStage` holds layers and runs autograd microbatch by microbatch. `EmulatedStage` sleeps for profiled seconds and
hands on tensors of the real shape with changing contents, so that eight V100s' worth of GPT-2 XL can be timed, with its
true bytes on a really shaped network, on a laptop. `DilatedStage` slows a stage down by a factor, for networks whose
rates are divided by the same factor.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wantrain.models.split_backward import PostponedGradients

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Stage(ABC):
    """Consecutive layers on one worker. The last stage of a pipeline ends in the loss."""

    @abstractmethod
    def forward(self, microbatch: int, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Run a microbatch forward and keep what its backward needs; return the output, without a graph.

        `inputs`: tokens int64 [microbatch, seq] on the first stage, else activations [microbatch, seq, hidden].
        With `targets` (the last stage) the output is the loss, a scalar.
        """

    @abstractmethod
    def backward(self, microbatch: int, output_grad: Tensor | None) -> Tensor | None:
        """Run a microbatch backward; return the gradient of its inputs (None on the first stage)."""

    @abstractmethod
    def weights(self, microbatch: int) -> None:
        """Make the gradients of weights that a microbatch's backward has left for later."""

    @abstractmethod
    def evaluate(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Run forward without a graph and keep nothing; with `targets` return the plain mean loss."""


class TorchStage(Stage):
    """Real layers. Gradients add up in `.grad` over the microbatches of a step, in the order of the backwards.

    `recomputed` layers (by their place here) keep only their input, and run their forward once more for the backward.
    Nothing is gained so at a pipeline's ends: an embedding keeps its input alone, and what a head made is what the loss
    keeps. With `is_split` backwards leave gradients of weights for later (`models/split_backward.py`).
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        loss: LossFunction | None = None,
        loss_scale: float = 1.0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        recomputed: Container[int] = (),
        is_split: bool = False,
    ) -> None:
        """Hold `layers`; `loss` (last stage only) gives a mean, which `loss_scale` turns into the batch's share."""
        self.layers = nn.ModuleList(layers)
        self._loss = loss
        self._loss_scale = loss_scale
        self._autocast = autocast
        self._recomputed = recomputed
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._postponed = PostponedGradients(layers) if is_split else None

    def forward(self, microbatch: int, inputs: Tensor, targets: Tensor | None) -> Tensor:
        if inputs.is_floating_point():
            inputs.requires_grad_()
        output = self._run(inputs, targets)
        if targets is not None:
            output = output * self._loss_scale
        self._held[microbatch] = (inputs, output)
        return output.detach()

    def backward(self, microbatch: int, output_grad: Tensor | None) -> Tensor | None:
        inputs, output = self._held.pop(microbatch)
        if self._postponed is not None:
            self._postponed.begin(microbatch)
        if output.requires_grad:  # else nothing up to here is trained, and nobody is before it
            torch.autograd.backward(output, output_grad)
        return inputs.grad

    def weights(self, microbatch: int) -> None:
        assert self._postponed is not None, "the backward is split"
        self._postponed.make(microbatch)

    def owed(self) -> Collection[nn.Parameter] | None:
        """Return the weights whose gradients were left for later; None where backwards are whole."""
        return None if self._postponed is None else self._postponed.weights()

    def evaluate(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self._run(inputs, targets)

    def _run(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        with self._autocast():
            for place, layer in enumerate(self.layers):
                is_dropped = place in self._recomputed and torch.is_grad_enabled()
                run = partial(self._layer, layer)
                hidden = checkpoint(run, hidden, use_reentrant=False) if is_dropped else run(hidden)
            if targets is None:
                return hidden
            assert self._loss is not None, "a stage with targets has a loss"
            return self._loss(hidden, targets)

    def _layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        with nullcontext() if self._postponed is None else self._postponed.collecting():
            output: Tensor = layer(hidden)
        return output

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters in layer order."""
        return self.layers.parameters()


class EmulatedStage(Stage):
    """Profiled seconds and real shapes, no arithmetic. Every payload differs from the one before."""

    def __init__(
        self,
        forward_s: float,
        backward_s: float,
        output_shape: Sequence[int],
        input_shape: Sequence[int],
        weights_s: float = 0.0,
    ) -> None:
        """Sleep `forward_s` and `backward_s` per microbatch; an empty `input_shape` means the first stage.

        Of the latter `weights_s` are slept when gradients of weights are made, in a schedule that splits backwards.
        """
        self._seconds = {"forward": forward_s, "backward": backward_s - weights_s, "weights": weights_s}
        self._output = torch.randn(*output_shape)
        self._input_grad = torch.randn(*input_shape) if input_shape else None
        self._num_runs = 0

    def forward(self, microbatch: int, inputs: Tensor, targets: Tensor | None) -> Tensor:
        end_s = time.monotonic() + self._seconds["forward"]
        output = self._changed(self._output)
        _sleep_until(end_s)
        return output.new_zeros(()) if targets is not None else output

    def backward(self, microbatch: int, output_grad: Tensor | None) -> Tensor | None:
        end_s = time.monotonic() + self._seconds["backward"]
        grad = None if self._input_grad is None else self._changed(self._input_grad)
        _sleep_until(end_s)
        return grad

    def weights(self, microbatch: int) -> None:
        _sleep_until(time.monotonic() + self._seconds["weights"])

    def evaluate(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        _sleep_until(time.monotonic() + self._seconds["forward"])
        return self._output.new_zeros(()) if targets is not None else self._output

    def _changed(self, tensor: Tensor) -> Tensor:
        """Return other contents each time: the values, shifted by the number of tensors made so far."""
        self._num_runs += 1
        return tensor.roll(self._num_runs, dims=-1)


def _sleep_until(end_s: float) -> None:
    time.sleep(max(0.0, end_s - time.monotonic()))


class DilatedStage(Stage):
    """Another stage, slowed down by a factor: see `slowed`."""

    def __init__(self, inner: Stage, dilation: float) -> None:
        self.inner = inner
        self._dilation = dilation
        self._is_cuda = False

    def forward(self, microbatch: int, inputs: Tensor, targets: Tensor | None) -> Tensor:
        self._is_cuda = inputs.is_cuda
        with slowed(self._dilation, self._is_cuda):
            return self.inner.forward(microbatch, inputs, targets)

    def backward(self, microbatch: int, output_grad: Tensor | None) -> Tensor | None:
        with slowed(self._dilation, self._is_cuda):
            return self.inner.backward(microbatch, output_grad)

    def weights(self, microbatch: int) -> None:
        with slowed(self._dilation, self._is_cuda):
            self.inner.weights(microbatch)

    def evaluate(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        return self.inner.evaluate(inputs, targets)


@contextmanager
def slowed(dilation: float, is_cuda: bool = False) -> Iterator[None]:
    """Make the block last `dilation` times the time it works.

    On the CPU that is the thread's own processor time: a dilated worker stands for a machine with a processor to
    itself, so waiting for one that others hold takes from the pause and is not dilated too.
    """
    clock = time.monotonic if is_cuda else time.thread_time
    began_s, worked_s = time.monotonic(), clock()
    yield
    _sleep_until(began_s + dilation * (clock() - worked_s))
