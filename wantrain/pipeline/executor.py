"""Play a rank's actions for real: the list that the simulator plays, on real tensors and packets.

A rank waits only for the tensor that its next action needs. Everything else (encoding, the wire, decoding, the
reduction of gradients) goes on in other threads meanwhile. torch's own 1F1B waits for each send, together with the next
receive, before it computes again; on a slow link wire and processor then take turns, which alone costs several times
the step.

           stage 0   F0 F1 F2 F3 . B0 F4 . B1 ...      '.' is the only waiting: for the gradient of 0B0
    wire 0 → 1          F0 F1 F2 F3
           stage 1      .. F0 F1 B0 F2 B1 ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from wantrain.pipeline.boundary import Inbox, Item, Outbox
from wantrain.pipeline.recorder import Recorder
from wantrain.pipeline.stage import Stage
from wantrain.schedule import Action, splits_backward


@dataclass(frozen=True)
class Neighbour:
    """What joins a stage to the one before or after it: payloads go out through one box and come in through another."""

    inbox: Inbox
    outbox: Outbox


@dataclass(frozen=True)
class Microbatch:
    """The samples of a microbatch: `inputs` int64 [microbatch, seq] on the first stage, `targets` on the last."""

    sample_ids: Sequence[int]
    inputs: Tensor | None = None
    targets: Tensor | None = None


class Executor:
    """Plays one rank's actions, step after step."""

    def __init__(
        self,
        actions: Sequence[Action],
        stage: Stage,
        recorder: Recorder,
        *,
        upstream: Neighbour | None = None,
        downstream: Neighbour | None = None,
        before_forward: Callable[[Sequence[int]], None] = lambda _: None,
        before_backward: Callable[[Sequence[int]], None] = lambda _: None,
        before_final: Callable[[], None] = lambda: None,
        reduce: Callable[[], None] = lambda: None,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """Play `actions` on `stage`; `upstream` holds the layers before it, `downstream` the ones after.

        `before_forward` is told which samples the next forward sees, for what depends on them (dropout);
        `before_backward` likewise, where a backward runs forwards once more.
        `reduce` and `step` are what the actions R and S do; `before_final` announces that gradients are final from the
        next action on (the last backward, or the last gradients of weights where these come later), so that their
        reduction can begin while earlier layers still compute.
        """
        self._actions = tuple(actions)
        self._stage = stage
        self._recorder = recorder
        self._upstream, self._downstream = upstream, downstream
        self._before_forward, self._before_backward = before_forward, before_backward
        self._before_final = before_final
        self._final_kind = "W" if splits_backward(self._actions) else "B"
        self._ends = {"R": reduce, "S": step}
        self._step_number = 0
        self.loss = 0.0

    def play(
        self, microbatches: Sequence[Microbatch], step_number: int = 0, upcoming: Sequence[int] | None = None
    ) -> None:
        """Play one step; `loss` is its sum over the microbatches on the last stage, zero elsewhere.

        `upcoming` are the sample ids of the next step, in order, where they are known: codecs that remember samples
        then agree on them while this step still runs, else at the beginning of the next.
        """
        self._step_number = step_number
        self._offer([sample_id for microbatch in microbatches for sample_id in microbatch.sample_ids])
        self._post_receives(microbatches, step_number)
        if upcoming is not None:
            self._offer_in(upcoming)
        self.loss = 0.0
        for action in self._actions:
            is_last = action.microbatch == len(microbatches) - 1
            if is_last and action.kind == self._final_kind:
                self._before_final()
            if action.kind == "F":
                self._forward(action, microbatches[action.microbatch])
                if is_last and upcoming is not None and self._downstream is not None:
                    self._downstream.outbox.offer(upcoming)
            elif action.kind == "B":
                self._backward(action, microbatches[action.microbatch])
                if is_last and upcoming is not None and self._upstream is not None:
                    self._upstream.outbox.offer(upcoming)
            elif action.kind == "W":
                with self._recorder.span("weights", action.microbatch):
                    self._stage.weights(action.microbatch)
            else:
                self._ends[action.kind]()

    def _offer(self, sample_ids: Sequence[int]) -> None:
        """Offer to agree on a step's samples, in every direction; no news where that was done a step ahead."""
        self._offer_in(sample_ids)
        for neighbour in (self._upstream, self._downstream):
            if neighbour is not None:
                neighbour.outbox.offer(sample_ids)

    def _offer_in(self, sample_ids: Sequence[int]) -> None:
        for neighbour in (self._upstream, self._downstream):
            if neighbour is not None:
                neighbour.inbox.offer(sample_ids)

    def evaluate(self, microbatches: Sequence[Microbatch], step_number: int = 0) -> list[float]:
        """Run forwards only, without keeping anything; return each microbatch's loss on the last stage."""
        if self._upstream is not None:
            self._upstream.inbox.expect(
                _items(microbatches, step_number, is_training=False),
                f"F{{}} of the validation after step {step_number}",
            )
        losses = []
        for m, microbatch in enumerate(microbatches):
            output = self._stage.evaluate(self._input(m, microbatch), microbatch.targets)
            if self._downstream is None:
                losses.append(output.item())
            else:
                self._downstream.outbox.put(output, Item(m, step=step_number))
        return losses

    def _post_receives(self, microbatches: Sequence[Microbatch], step_number: int) -> None:
        stage = self._actions[0].stage
        if self._upstream is not None:
            self._upstream.inbox.expect(_items(microbatches, step_number), f"{stage - 1}F{{}} of step {step_number}")
        if self._downstream is not None:
            self._downstream.inbox.expect(_items(microbatches, step_number), f"{stage + 1}B{{}} of step {step_number}")

    def _input(self, m: int, microbatch: Microbatch) -> Tensor:
        if self._upstream is not None:
            return self._upstream.inbox.take(m)
        assert microbatch.inputs is not None, "the first stage is given its tokens"
        return microbatch.inputs

    def _forward(self, action: Action, microbatch: Microbatch) -> None:
        inputs = self._input(action.microbatch, microbatch)
        self._before_forward(microbatch.sample_ids)
        with self._recorder.span("forward", action.microbatch):
            output = self._stage.forward(action.microbatch, inputs, microbatch.targets)
        if self._downstream is None:
            self.loss += output.item()
        else:
            self._downstream.outbox.put(output, Item(action.microbatch, microbatch.sample_ids, self._step_number))

    def _backward(self, action: Action, microbatch: Microbatch) -> None:
        output_grad = None if self._downstream is None else self._downstream.inbox.take(action.microbatch)
        self._before_backward(microbatch.sample_ids)
        with self._recorder.span("backward", action.microbatch):
            input_grad = self._stage.backward(action.microbatch, output_grad)
        if self._upstream is not None:
            assert input_grad is not None, "a stage with a stage before it has a gradient for it"
            self._upstream.outbox.put(input_grad, Item(action.microbatch, microbatch.sample_ids, self._step_number))


def _items(microbatches: Sequence[Microbatch], step: int, *, is_training: bool = True) -> list[Item]:
    """Name the payloads of a step, or of a validation, whose samples nobody remembers."""
    return [Item(m, one.sample_ids if is_training else (), step) for m, one in enumerate(microbatches)]
