"""A backward in two parts gives, to the last bit, what a whole one gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wantrain.errors import PlanError
from wantrain.models.split_backward import PostponedGradients, collector
from wantrain.pipeline.stage import TorchStage


class Added(nn.Module):
    """A product whose weight lies the other way round, as transformers' Conv1D has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Twice(nn.Module):
    """Multiplies with one weight at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


def mlp(product: Callable[[int, int], nn.Module]) -> nn.Module:
    return nn.Sequential(product(16, 48), nn.GELU(), nn.LayerNorm(48), product(48, 16))


class Changed(nn.Module):
    """Changes what a product gave in place, and multiplies what lies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.transpose(0, 1))
        hidden += 1.0
        return self.second(nn.functional.relu(hidden, inplace=True)).transpose(0, 1)


class Checkpointed(nn.Module):
    """Runs its layers once more in the backward, by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "biased": lambda: mlp(nn.Linear),
    "plain": lambda: mlp(partial(nn.Linear, bias=False)),
    "other way round": lambda: mlp(Added),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
    "twice": Twice,
    "changed": Changed,
    "checkpointed": Checkpointed,
}
OWED = {name: {"0.weight", "3.weight"} for name in LAYERS} | {
    "attention": {"linear1.weight", "linear2.weight"},
    "twice": {"inner.weight"},
    "changed": {"first.weight", "second.weight"},
    "checkpointed": {"outer.weight"},
}
AUTOCASTS = {"fp32": nullcontext, "bf16": partial(torch.autocast, "cpu", torch.bfloat16)}


@pytest.mark.parametrize("dtype", AUTOCASTS)
@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_inputs_and_weights_are_those_of_a_whole_backward(
    name: str, is_recomputed: bool, dtype: str
) -> None:
    torch.manual_seed(0)
    whole = LAYERS[name]()
    split = copy.deepcopy(whole)
    autocast: Callable[[], AbstractContextManager[object]] = AUTOCASTS[dtype]
    recomputed = {0} if is_recomputed else set()
    stages = [
        TorchStage([layer], autocast=autocast, recomputed=recomputed, is_split=is_split)
        for layer, is_split in ((whole, False), (split, True))
    ]
    for m in range(3):
        x = torch.randn(2, 5, 16)
        outputs = [stage.forward(m, x.clone(), None) for stage in stages]
        assert torch.equal(*outputs)
        grad = torch.randn_like(outputs[0])
        inputs_grads = [stage.backward(m, grad.clone()) for stage in stages]
        assert inputs_grads[0] is not None
        assert torch.equal(*inputs_grads)
    owed = stages[1].owed()
    assert {owner for owner, parameter in split.named_parameters() if parameter in owed} == OWED[name]
    assert all(parameter.grad is None for parameter in owed)
    for m in range(3):
        stages[1].weights(m)
    assert not stages[1].owed()
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_a_frozen_weight_is_owed_nothing_and_a_shared_one_has_its_gradient_at_once() -> None:
    frozen, first, second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    frozen.requires_grad_(False)
    second.weight = first.weight
    own = nn.Linear(4, 4)
    stage = TorchStage([frozen, first, second, own], is_split=True)
    stage.forward(0, torch.randn(3, 4), None)
    stage.backward(0, torch.randn(3, 4))
    assert stage.owed() == {own.weight}
    assert first.weight.grad is not None


def test_hooks_on_a_weight_are_called_when_its_gradient_is_there() -> None:
    layer, seen = nn.Linear(4, 4, bias=False), []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    stage = TorchStage([layer], is_split=True)
    stage.forward(0, torch.ones(3, 4), None)
    stage.backward(0, torch.ones(3, 4))
    assert seen == []
    stage.weights(0)
    assert [grad.tolist() for grad in seen] == [[[3.0] * 4] * 4]


def test_products_that_are_no_matrix_with_a_plain_bias_have_their_gradients_at_once() -> None:
    residual = torch.randn(3, 4, requires_grad=True)
    layer = Added(4, 4)
    stage = TorchStage([layer], is_split=True)
    layer.forward = lambda x: torch.addmm(residual, x, layer.weight)  # type: ignore[method-assign]
    stage.forward(0, torch.randn(3, 4), None)
    stage.backward(0, torch.randn(3, 4))
    assert not stage.owed()
    assert layer.weight.grad is not None
    assert residual.grad is not None


def test_products_outside_or_without_gradients_are_left_alone() -> None:
    layer = nn.Linear(4, 4)
    postponed = PostponedGradients([layer])
    with postponed.collecting():
        assert collector() is postponed
        with torch.no_grad():
            assert not layer(torch.ones(1, 4)).requires_grad
        added = torch.addmm(layer.bias, torch.ones(1, 4), layer.weight, alpha=2.0)  # not what is put off
    assert collector() is None
    added.sum().backward()
    assert layer.weight.grad is not None
    assert not postponed.weights()


def test_compiled_layers_are_refused_since_what_they_compute_can_not_be_seen() -> None:
    layer = nn.Sequential(nn.Linear(4, 4))
    layer[0].compile(backend="eager")
    with pytest.raises(PlanError, match=r"layer 0\.0 is compiled.*use schedule 1f1b"):
        PostponedGradients([layer])
    with pytest.raises(PlanError, match="layer 0 is compiled"):
        PostponedGradients([torch.compile(nn.Linear(4, 4), backend="eager")])  # type: ignore[list-item]
