import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from wantrain.errors import PlanError
from wantrain.model_config import ModelConfig
from wantrain.models import gpt

SMALL = ModelConfig(num_layers=3, hidden=16, num_heads=2, seq_len=8, vocab_size=32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: for models this small, handing work out costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens_of(config: ModelConfig, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (samples, config.seq_len), generator=generator)


def whole(config: ModelConfig, seed: int = 0) -> list[nn.Module]:
    return gpt.build_layers(config, 0, config.num_layers_total, seed)


def losses_and_grads(config: ModelConfig, layers: list[nn.Module]) -> tuple[float, list[Tensor]]:
    inputs = tokens_of(config, 4)
    loss = gpt.loss(nn.Sequential(*layers)(inputs), inputs.roll(-1, 1))
    loss.backward()
    return loss.item(), [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]


@pytest.mark.parametrize("cuts", [(0, 5), (0, 1, 5), (0, 2, 4, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_do_not_depend_on_the_cut(cuts: tuple[int, ...], tied: bool) -> None:
    config = SMALL.model_copy(update={"tied": tied})
    in_parts = [layer for first, end in pairwise(cuts) for layer in gpt.build_layers(config, first, end, 7)]
    for a, b in zip(whole(config, 7), in_parts, strict=True):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict())


def test_initial_weights_differ_by_layer_and_by_seed() -> None:
    first, second = (next(iter(whole(SMALL)[layer].mlp.parameters())) for layer in (1, 2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, next(iter(whole(SMALL, 1)[1].mlp.parameters())))


def test_building_layers_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    whole(SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_a_fresh_model_knows_nothing() -> None:
    inputs = tokens_of(SMALL, 16)
    loss = gpt.loss(nn.Sequential(*whole(SMALL))(inputs), inputs.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(SMALL.vocab_size), abs=0.02)


def test_a_token_is_predicted_from_those_before_it_only() -> None:
    model = nn.Sequential(*whole(SMALL))
    inputs = tokens_of(SMALL, 1)
    changed = inputs.clone()
    changed[0, 5] = (changed[0, 5] + 1) % SMALL.vocab_size
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_order_of_the_tokens_before_matters() -> None:
    model = nn.Sequential(*whole(SMALL))
    assert not torch.allclose(model(torch.tensor([[1, 2, 3]]))[0, -1], model(torch.tensor([[2, 1, 3]]))[0, -1])


def test_two_runs_give_the_same_bits() -> None:
    config = ModelConfig(num_layers=2, hidden=64, num_heads=4, seq_len=128)
    loss, grads = losses_and_grads(config, whole(config))
    again, grads_again = losses_and_grads(config, whole(config))
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_layer_compiles_without_a_break(dropout: float) -> None:
    config = SMALL.model_copy(update={"dropout": dropout})
    layers, x = whole(config), tokens_of(config, 2)
    gpt.set_dropout_keys(layers, 0, 0, [4, 9])
    for layer in layers:
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
        x = layer(x).detach()


def test_learning_lowers_the_loss_of_a_sample() -> None:
    layers = whole(SMALL)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = tokens_of(SMALL, 2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = gpt.loss(model(inputs), inputs.roll(-1, 1))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_tied_ends_in_one_process_are_one_parameter() -> None:
    layers = whole(SMALL.model_copy(update={"tied": True}))
    assert layers[0].weight is layers[-1].weight
    assert gpt.tied_parameters(layers) == []


def test_gradients_of_tied_copies_add_up_to_the_shared_gradient() -> None:
    config = SMALL.model_copy(update={"tied": True})
    together = whole(config)
    apart = [*gpt.build_layers(config, 0, 2, 0), *gpt.build_layers(config, 2, 5, 0)]
    losses_and_grads(config, together)
    losses_and_grads(config, apart)
    (first,), (last,) = gpt.tied_parameters(apart[:2]), gpt.tied_parameters(apart[2:])
    assert first is not last
    assert first.grad is not None
    assert last.grad is not None
    torch.testing.assert_close(first.grad + last.grad, together[0].weight.grad)


def test_an_untied_model_has_no_tied_parameters() -> None:
    assert gpt.tied_parameters(gpt.build_layers(SMALL, 0, 2, 0)) == []


@pytest.mark.parametrize(("first", "end"), [(0, 6), (2, 2), (3, 1), (-1, 2)])
def test_a_stage_outside_the_model_is_refused(first: int, end: int) -> None:
    with pytest.raises(PlanError, match="of a model with 5"):
        gpt.build_layers(SMALL, first, end, 0)


def test_loss_is_computed_in_fp32() -> None:
    logits = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(2, 3, dtype=torch.int64)
    half = gpt.loss(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert half.item() == gpt.loss(logits.bfloat16().float(), targets).item()


def test_bf16_parameters_and_autocast_run_forward_and_backward() -> None:
    loss, _ = losses_and_grads(SMALL, whole(SMALL))
    lower = [layer.to(torch.bfloat16) for layer in whole(SMALL)]
    assert losses_and_grads(SMALL, lower)[0] == pytest.approx(loss, abs=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses_and_grads(SMALL, whole(SMALL))[0] == pytest.approx(loss, abs=0.02)


def test_dropout_follows_the_sample_and_not_the_microbatch() -> None:
    config = SMALL.model_copy(update={"dropout": 0.3})
    layers = whole(config)
    model, inputs, samples = nn.Sequential(*layers), tokens_of(config, 4), [11, 5, 8, 2]
    gpt.set_dropout_keys(layers, 0, 3, samples)
    together = model(inputs)
    parts = []
    for first in (2, 0):
        gpt.set_dropout_keys(layers, 0, 3, samples[first : first + 2])
        parts.insert(0, model(inputs[first : first + 2]))
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-6)
    gpt.set_dropout_keys(layers, 0, 4, samples)
    assert not torch.allclose(together, model(inputs))


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    dropout = gpt.KeyedDropout(0.25, "somewhere")
    gpt.set_dropout_keys([dropout], 0, 0, list(range(64)))
    out = dropout(torch.ones(64, 32, 32))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(out[0], out[1])


def test_dropout_refuses_samples_it_was_not_told_of() -> None:
    layers = whole(SMALL.model_copy(update={"dropout": 0.1}))
    with pytest.raises(ValueError, match="set_dropout_keys"):
        layers[0](tokens_of(SMALL, 2))


def test_dropout_is_off_in_evaluation() -> None:
    layers = whole(SMALL.model_copy(update={"dropout": 0.5}))
    plain = whole(SMALL)
    inputs = tokens_of(SMALL, 2)
    assert torch.equal(nn.Sequential(*layers).eval()(inputs), nn.Sequential(*plain)(inputs))
