"""AdamW first, then momenta in the place of gradients."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import jobs
from tests.jobs import MODEL, joined, small_plan, train_job
from wantrain.data import Samples
from wantrain.training.quantized_adam import QuantizedAdam

WARMUP_STEPS = 10


def gradient(step: int, num_values: int = 200) -> Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(step))


def one_parameter(
    make: Callable[..., torch.optim.Optimizer] = QuantizedAdam, **kwargs: Any
) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(gradient(1000))
    return parameter, make([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **kwargs)


def train(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        parameter.grad = gradient(step)
        optimizer.step()


def test_the_first_half_of_the_warm_up_is_adamw_bit_for_bit() -> None:
    parameter, optimizer = one_parameter(warmup_steps=WARMUP_STEPS)
    other, adamw = one_parameter(torch.optim.AdamW, foreach=False)
    train(parameter, optimizer, range(WARMUP_STEPS // 2))
    train(other, adamw, range(WARMUP_STEPS // 2))
    assert torch.equal(parameter, other)
    train(parameter, optimizer, range(WARMUP_STEPS // 2, WARMUP_STEPS))
    train(other, adamw, range(WARMUP_STEPS // 2, WARMUP_STEPS))
    assert torch.linalg.vector_norm(parameter - other) < 0.02 * torch.linalg.vector_norm(other - gradient(1000))


def test_v_is_fixed_after_the_warm_up_and_its_step_is_unbiased() -> None:
    parameter, optimizer = one_parameter(warmup_steps=200)
    train(parameter, optimizer, range(200))
    assert not optimizer.is_warming_up
    fixed = optimizer.state[parameter]["exp_avg_sq"].clone()
    train(parameter, optimizer, range(200, 210))
    assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], fixed)
    assert fixed.mean() == pytest.approx(1.0, abs=0.05)
    assert fixed.std() < 0.2, "the mean of 120 squares; with a memory of 20 steps its spread would be above 0.3"


def test_after_the_warm_up_a_step_is_adams_with_that_v() -> None:
    parameter, optimizer = one_parameter(warmup_steps=WARMUP_STEPS)
    train(parameter, optimizer, range(WARMUP_STEPS))
    before, state = parameter.detach().clone(), optimizer.state[parameter]
    momentum = 0.9 * state["exp_avg"] + 0.1 * gradient(WARMUP_STEPS)
    forgotten = 0.95**5 * 20 / 25  # five steps of Adam's memory, then a memory of 21, 22 … 25 steps
    step = 1e-2 * (momentum / (1 - 0.9**11)) / ((state["exp_avg_sq"] / (1 - forgotten)).sqrt() + 1e-8)
    train(parameter, optimizer, range(WARMUP_STEPS, WARMUP_STEPS + 1))
    torch.testing.assert_close(parameter.detach(), before * (1 - 1e-3) - step)


def test_a_value_that_had_no_gradient_yet_moves_no_further_than_ten_others() -> None:
    parameter, optimizer = one_parameter(warmup_steps=WARMUP_STEPS)
    for step in range(WARMUP_STEPS):
        parameter.grad = gradient(step)
        parameter.grad[7] = 0
        optimizer.step()
    before = parameter.detach().clone()
    train(parameter, optimizer, range(WARMUP_STEPS, WARMUP_STEPS + 1))
    assert (parameter - before)[7].abs() < 10 * 1e-2


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_shares_of_the_momentum_add_up_to_it(num_workers: int) -> None:
    alone, optimizer = one_parameter(warmup_steps=WARMUP_STEPS)
    workers = [one_parameter(warmup_steps=WARMUP_STEPS) for _ in range(num_workers)]
    for step in range(2 * WARMUP_STEPS):
        shares = [gradient(10 * step + worker) for worker in range(num_workers)]
        alone.grad = torch.stack(shares).sum(dim=0)
        optimizer.step()
        momentum = optimizer.state[alone]["exp_avg"]
        for (parameter, own), share in zip(workers, shares, strict=True):
            parameter.grad = share
            if not own.is_warming_up:
                own.make_share([parameter], num_workers)
        total = torch.stack([parameter.grad for parameter, _ in workers if parameter.grad is not None]).sum(dim=0)
        for parameter, own in workers:
            parameter.grad = total.clone()
            if not own.is_warming_up:
                own.take_sum([parameter])
                torch.testing.assert_close(parameter.grad, momentum)
            own.step()
    for parameter, _ in workers:
        torch.testing.assert_close(parameter, alone)


def test_state_loaded_into_a_new_optimizer_goes_on_with_the_same_bits() -> None:
    parameter, optimizer = one_parameter(warmup_steps=WARMUP_STEPS)
    train(parameter, optimizer, range(WARMUP_STEPS + 2))
    other, fresh = one_parameter(warmup_steps=WARMUP_STEPS)
    other.data.copy_(parameter)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's are shared
    for one, own in ((parameter, optimizer), (other, fresh)):
        train(one, own, range(WARMUP_STEPS + 2, WARMUP_STEPS + 5))
    assert torch.equal(parameter, other)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps = 0, expected 1 up"):
        one_parameter(warmup_steps=0)
    with pytest.raises(ValueError, match="can't work with lr -1"):
        QuantizedAdam([nn.Parameter(torch.zeros(1))], lr=-1.0, warmup_steps=1)


ADAM = partial(QuantizedAdam, lr=1e-2, warmup_steps=3)


@pytest.mark.parametrize("tied", [False, True])
def test_replicas_and_stages_agree_with_one_process(tied: bool) -> None:
    model = MODEL.model_copy(update={"tied": tied})
    alone = train_job(small_plan(1, 1, model=model), 6, model=model, optimizer=ADAM)
    four = train_job(small_plan(2, 2, model=model), 6, model=model, optimizer=ADAM)
    assert four[0].losses == pytest.approx(alone[0].losses, rel=1e-5)
    assert four[0].norms == pytest.approx(alone[0].norms, rel=1e-3)


def test_compressed_momenta_leave_the_same_weights_on_all_replicas_and_train_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = np.frombuffer(b"".join(b"%d and %d is %d. " % (i, i, 2 * i) for i in range(400)), np.uint8) % 64
    monkeypatch.setattr(jobs, "SAMPLES", Samples(tokens, 0, len(tokens), MODEL.seq_len))
    num_steps, adam = 36, partial(QuantizedAdam, lr=4e-3, warmup_steps=18)
    codecs = ("raw:fp32", "error_feedback:quantized:4")
    plans = [small_plan(1, 2, microbatch_size=4, gradient_codec=codec) for codec in codecs]
    adamw = train_job(plans[0], num_steps, optimizer=partial(torch.optim.AdamW, lr=4e-3))
    plain, narrow = (train_job(plan, num_steps, optimizer=adam) for plan in plans)
    fed = train_job(plans[1], num_steps, optimizer=partial(torch.optim.AdamW, lr=4e-3))
    one, other = (joined([outcome], lambda outcome: outcome.weights) for outcome in narrow)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert narrow[0].losses[:19] == plain[0].losses[:19], "the warm-up is not compressed"
    assert narrow[0].losses[19:] != plain[0].losses[19:]
    ends = [sum(one[0].losses[-8:]) / 8 for one in (adamw, fed, plain, narrow)]
    print("AdamW fp32, 4 bits; QuantizedAdam fp32, 4 bits:", *(f"{end:.4f}" for end in ends))
    assert ends[0] < 0.75 * adamw[0].losses[0], "something was learned"
    assert ends[1] <= 1.03 * ends[0]  # seeds differ by two hundredths
    assert ends[3] <= 1.03 * ends[2]
