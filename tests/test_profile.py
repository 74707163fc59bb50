from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.models import gpt
from wantrain.profile import CodecSpeed, ModelProfile, gpt_profile

CONFIGS = [
    ModelConfig(num_layers=1, hidden=64, num_heads=4, seq_len=64),
    ModelConfig(num_layers=1, hidden=96, num_heads=2, seq_len=32, vocab_size=1000, mlp_ratio=3),
    ModelConfig(num_layers=1, hidden=64, num_heads=4, seq_len=64, dropout=0.1),
]


def run_layers(config: ModelConfig, microbatch_size: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return (layer, its input, targets) for each layer, every input a leaf of its own."""
    layers = gpt.build_layers(config, 0, config.num_layers_total, 0)
    gpt.set_dropout_keys(layers, 0, 0, list(range(microbatch_size)))
    targets = torch.randint(config.vocab_size, (microbatch_size, config.seq_len))
    x, out = targets.clone(), []
    for layer in layers:
        out.append((layer, x, targets))
        x = layer(x).detach().requires_grad_()
    return out


def forward(layer: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return gpt.loss(out, targets) if isinstance(layer, gpt.Head) else out


def stored_bytes(layer: nn.Module, x: Tensor, targets: Tensor) -> int:
    """Return the bytes of the distinct storages that autograd keeps, the layer's own weights and tables left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(layer, x, targets)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


@pytest.mark.parametrize("config", CONFIGS)
def test_stored_bytes_are_within_a_tenth_of_what_autograd_keeps(config: ModelConfig) -> None:
    profile = gpt_profile(config, 3)
    for layer, counted in zip(run_layers(config, 3), profile.layers, strict=True):
        assert counted.stored_bytes == pytest.approx(stored_bytes(*layer), rel=0.1), counted.name


@pytest.mark.parametrize("config", CONFIGS)
def test_flops_are_those_that_torch_counts(config: ModelConfig) -> None:
    for (layer, x, targets), counted in zip(run_layers(config, 3), gpt_profile(config, 3).layers, strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # torch does not count inside the fused attention of a CPU
            with FlopCounterMode(display=False) as forwards:
                out = forward(layer, x, targets)
            with FlopCounterMode(display=False) as backwards:
                out.sum().backward()
        assert forwards.get_total_flops() == counted.forward_flops
        assert backwards.get_total_flops() == counted.backward_flops


@pytest.mark.parametrize("config", CONFIGS)
def test_parameter_bytes_and_outputs_are_the_layers_own(config: ModelConfig) -> None:
    for (layer, x, _), counted in zip(run_layers(config, 3), gpt_profile(config, 3).layers, strict=True):
        assert counted.parameter_bytes == sum(p.nbytes for p in layer.parameters())
        assert counted.activation_elements == layer(x).numel()


def test_seconds_follow_from_the_worker_speed() -> None:
    profile = gpt_profile(CONFIGS[0], 1)
    block = profile.layers[1]
    assert block.forward_s(1e9) == block.forward_flops / 1e9
    assert profile.compute_s(0, 3, 1e9) == pytest.approx(
        sum(layer.forward_s(1e9) + layer.backward_s(1e9) for layer in profile.layers)
    )


def test_costs_grow_in_proportion_to_the_microbatch() -> None:
    one, four = (gpt_profile(CONFIGS[0], size) for size in (1, 4))
    for a, b in zip(one.layers, four.layers, strict=True):
        assert (4 * a.forward_flops, 4 * a.stored_bytes) == (b.forward_flops, b.stored_bytes)
        assert a.parameter_bytes == b.parameter_bytes


def test_a_saved_profile_loads_as_it_was(tmp_path: Path) -> None:
    speed = CodecSpeed(direct_encode=4e8, direct_decode=8e8, delta_encode=2e8, delta_decode=4e8)
    profile = gpt_profile(CONFIGS[0], 2).model_copy(update={"codec_speed": speed, "reference_flops_per_s": 5e9})
    profile.save(tmp_path / "profile.json")
    assert ModelProfile.load(tmp_path / "profile.json") == profile


def test_a_profile_says_where_it_comes_from() -> None:
    profile = gpt_profile(CONFIGS[0], 2)
    assert (profile.source, profile.model) == ("counted", CONFIGS[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": 128}, r"hidden: got 64, expected 128"),
        ({"num_layers": 2}, r"num_layers: got 1, expected 2"),
        ({"seq_len": 32}, r"seq_len: got 64, expected 32"),
        ({"vocab_size": 300}, r"vocab_size: got 256, expected 300"),
    ],
)
def test_a_profile_of_another_model_is_refused(change: dict[str, int], said: str) -> None:
    profile = gpt_profile(CONFIGS[0], 2)
    profile.require(CONFIGS[0].model_copy(update={"dropout": 0.2, "tied": True}))
    with pytest.raises(ConfigError, match=rf"the profile is of another model \({said}\); make one with"):
        profile.require(CONFIGS[0].model_copy(update=change))


def test_a_profile_without_a_model_is_known_by_its_number_of_layers() -> None:
    profile = gpt_profile(CONFIGS[0], 2).model_copy(update={"model": None})
    profile.require(CONFIGS[0])
    with pytest.raises(ConfigError, match="layers: got 3, expected 4"):
        profile.require(CONFIGS[0].model_copy(update={"num_layers": 2}))


def test_one_figure_stands_for_all_codecs() -> None:
    """As long as an average of the four takes: 1/4 · (1/4 + 1/8 + 1/2 + 1/4) ns = 1/3.56 ns a value."""
    speed = CodecSpeed(direct_encode=4e9, direct_decode=8e9, delta_encode=2e9, delta_decode=4e9)
    assert speed.values_per_s == pytest.approx(4 / (1 / 4 + 1 / 8 + 1 / 2 + 1 / 4) * 1e9)


def test_recomputing_keeps_inputs_alone_and_runs_forwards_once_more() -> None:
    plain = gpt_profile(CONFIGS[1].model_copy(update={"num_layers": 3}), 2)
    again = plain.with_recomputing()
    ends = (0, plain.num_layers - 1)
    for i, (before, after) in enumerate(zip(plain.layers, again.layers, strict=True)):
        if i in ends:
            assert after == before
            continue
        assert after.stored_bytes == 4 * plain.layers[i - 1].activation_elements < before.stored_bytes / 10
        assert after.backward_bytes == before.stored_bytes
        assert after.backward_flops == before.backward_flops + before.forward_flops
