import time

import pytest
import torch
from torch import Tensor, nn

from wantrain.pipeline.stage import DilatedStage, EmulatedStage, TorchStage


def mean_loss(output: Tensor, targets: Tensor) -> Tensor:
    return ((output - targets) ** 2).mean()


def test_two_stages_give_the_gradients_of_the_whole() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    inputs, targets = torch.randn(5, 3), torch.randn(5, 2)
    front, back = TorchStage([first]), TorchStage([second], loss=mean_loss, loss_scale=0.5)
    hidden = front.forward(0, inputs, None)
    loss = back.forward(0, hidden, targets)
    front.backward(0, back.backward(0, None))
    got = [p.grad for p in (*front.parameters(), *back.parameters())]
    expected = torch.autograd.grad(
        0.5 * mean_loss(second(first(inputs)), targets), [*first.parameters(), *second.parameters()]
    )
    assert not loss.requires_grad
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_microbatches_in_flight_do_not_mix() -> None:
    stage = TorchStage([nn.Linear(2, 2, bias=False)])
    one, two = torch.ones(1, 2), torch.full((1, 2), 5.0)
    stage.forward(0, one, None)
    stage.forward(1, two, None)
    stage.backward(1, torch.ones(1, 2))
    grad = next(stage.parameters()).grad
    assert grad is not None
    assert torch.equal(grad, torch.full((2, 2), 5.0))
    stage.backward(0, torch.ones(1, 2))
    assert torch.equal(grad, torch.full((2, 2), 6.0))


def test_a_recomputed_layer_keeps_nothing_but_its_input() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    kept: dict[bool, int] = {False: 0, True: 0}
    grads = {}
    for is_recomputed in kept:
        stage = TorchStage([layer], recomputed={0} if is_recomputed else ())

        def pack(tensor: Tensor, is_recomputed: bool = is_recomputed) -> Tensor:
            kept[is_recomputed] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage.forward(0, torch.ones(1, 4), None)
        grads[is_recomputed] = stage.backward(0, torch.ones(1, 2))
    assert kept[True] <= 4 < kept[False]
    assert grads[True] is not None
    assert torch.equal(grads[True], grads[False])


def test_evaluation_keeps_nothing_and_is_not_scaled() -> None:
    stage = TorchStage([nn.Identity()], loss=mean_loss, loss_scale=0.1)
    loss = stage.evaluate(torch.zeros(4), torch.full((4,), 2.0))
    assert loss.item() == 4.0
    assert not stage._held


@pytest.mark.alone
def test_an_emulated_stage_takes_its_time_and_changes_its_contents() -> None:
    stage = EmulatedStage(0.03, 0.05, (1, 4, 8), (1, 4, 8))
    began = time.monotonic()
    outputs = [stage.forward(m, torch.zeros(1), None) for m in range(2)]
    grad = stage.backward(0, outputs[0])
    assert 0.11 <= time.monotonic() - began < 0.3
    assert grad is not None
    assert outputs[0].shape == grad.shape == (1, 4, 8)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.alone
def test_an_emulated_stage_splits_the_seconds_of_its_backward() -> None:
    stage = DilatedStage(EmulatedStage(0.0, 0.3, (1, 2), (1, 2), weights_s=0.2), 1.0)
    began = time.monotonic()
    stage.backward(0, torch.ones(1, 2))
    after_inputs = time.monotonic()
    stage.weights(0)
    assert 0.1 <= after_inputs - began < 0.19
    assert 0.2 <= time.monotonic() - after_inputs < 0.29


def test_the_first_emulated_stage_gives_no_gradient_and_the_last_a_loss() -> None:
    stage = EmulatedStage(0.0, 0.0, (1, 2), ())
    assert stage.backward(0, None) is None
    assert stage.forward(0, torch.zeros(1), torch.zeros(1)).shape == ()


class BusyStage(EmulatedStage):
    """Computes for so many processor seconds, then waits as long."""

    def forward(self, microbatch: int, inputs: Tensor, targets: Tensor | None) -> Tensor:
        end_s = time.thread_time() + 0.02
        while time.thread_time() < end_s:
            pass
        time.sleep(0.02)
        return inputs


@pytest.mark.alone
def test_dilation_slows_what_a_stage_computes_by_its_factor_and_not_what_it_waits_for() -> None:
    stage = DilatedStage(BusyStage(0.0, 0.0, (1,), (1,)), 11)
    began_s, began_at_work_s = time.monotonic(), time.thread_time()
    stage.forward(0, torch.zeros(1), None)
    at_work_s = time.thread_time() - began_at_work_s
    passed_s = time.monotonic() - began_s
    assert passed_s >= 11 * at_work_s - 0.01
    assert passed_s < 12 * at_work_s + 0.02  # neither slept again nor added
