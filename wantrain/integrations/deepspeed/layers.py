"""A DeepSpeed `PipelineModule` as a wantrain job: its layers, its loss, and what is tied.

    trainer = wt.Trainer(plan=plan, worker=worker, **job(module, plan)._asdict())

Layers are built from the module's specs, on each rank only those that the plan gives it, and with the module's own
seeds, so that a job begins with the weights that DeepSpeed would begin with. With `seed_layers` a layer's weights
follow from its number. Without, they follow from whatever was built before them in the same process, and so from the
cut: then the layers that the module has built are used, and the plan must cut where DeepSpeed did.

A `TiedLayerSpec`'s weight may be shared by the first and the last stage, or lie within one:

    0 embedding ─► 1 block ─► 2 block ─► 3 head       plan [0, 1] [2, 3]: shared by both ends
    └────────────── "embed" ──────────────┘           plan [0, 1, 2, 3]:  one weight, used twice
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wantrain.errors import ConfigError, PlanError
from wantrain.pipeline.stage import LossFunction
from wantrain.plan import Plan


class Job(NamedTuple):
    """What `wt.Trainer` takes under the same names."""

    layers: Callable[[int, int], list[nn.Module]]
    loss: LossFunction
    tied: Callable[[Sequence[nn.Module]], list[nn.Parameter]]


def job(
    module: Any,
    plan: Plan,
    *,
    loss_fn: LossFunction | None = None,
    base_seed: int = 1234,
    seed_fn: Callable[[int], object] | None = None,
) -> Job:
    """Return what a `PipelineModule` is made of, for training it under `plan`.

    `module` may be the list that is given to PipelineModule as its `layers`, too: nothing is built then but what the
    plan gives a rank, with seed_layers, and `loss_fn`, `base_seed` and `seed_fn` are PipelineModule's.

    Raises PlanError where the plan's cut doesn't fit, ConfigError for what a job can't hold.
    """
    source = Source.of(module, base_seed, seed_fn)
    if source.built is not None:
        loss_fn = loss_fn or source.built.loss_fn
    if loss_fn is None:
        raise ConfigError("the module has no loss_fn, which a job trains by; give job one")
    if len(source.specs) != plan.num_layers:
        raise PlanError(
            f"the plan is for {plan.num_layers} layers (the module has {len(source.specs)}); make one for it"
        )
    if source.built is not None and source.built.activation_checkpoint_interval:
        raise ConfigError("a job doesn't checkpoint activations by itself; set activation_checkpoint_interval to 0")
    shared = _shared_by_both_ends(source.specs, plan)
    return Job(partial(_layers, source), loss_fn, partial(_tied, shared))


class _Seeds(NamedTuple):
    """How PipelineModule seeds what it builds; its arguments of the same names."""

    seed_layers: bool
    base_seed: int
    seed_fn: Callable[[int], object] | None

    def sow(self, layer: int) -> None:
        """Seed what is random in building a layer."""
        from deepspeed.runtime.utils import set_random_seed

        if self.seed_layers:
            (self.seed_fn or set_random_seed)(self.base_seed + layer)


class Source(NamedTuple):
    """Where layers come from: specs and seeds, and the module that has built some of them, if there is one."""

    specs: list[Any]
    seeds: _Seeds
    built: Any = None

    @classmethod
    def of(cls, module: Any, base_seed: int = 1234, seed_fn: Callable[[int], object] | None = None) -> Source:
        """Take a PipelineModule apart, or the list that one is given."""
        if not isinstance(module, nn.Module):
            return cls(list(module), _Seeds(True, base_seed, seed_fn))
        built: Any = module
        return cls(list(built._layer_specs), _Seeds(built.seed_layers, built.base_seed, built.seed_fn), built)

    def layer(self, number: int) -> nn.Module:
        """Build one layer by its spec, as it is before anything is tied."""
        return _as_layer(self.specs[number], _new(self, number))

    def first_use(self, layer: int) -> int:
        """Return the first layer that has a tied layer's key."""
        return next(i for i, spec in enumerate(self.specs) if _key_of(spec) == self.specs[layer].key)


class TiedUse(nn.Module):
    """One of the places where a tied module is used, by its own forward or by a function of it and a tensor."""

    def __init__(self, spec: Any, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.key: str = spec.key
        self._names: list[str] = spec.tied_weight_attr
        self._forward_fn: Callable[[nn.Module, Tensor], Tensor] | None = spec.forward_fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x) if self._forward_fn is None else self._forward_fn(self.module, x)
        return out

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters that all uses have in common."""
        return [self.module.get_parameter(name) for name in self._names]


class _Function(nn.Module):
    """A layer without parameters, given as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


def _key_of(spec: Any) -> str | None:
    """Return what a spec is tied by; None: it is not."""
    from deepspeed.pipe import TiedLayerSpec

    return spec.key if isinstance(spec, TiedLayerSpec) else None


def _shared_by_both_ends(specs: Sequence[Any], plan: Plan) -> str | None:
    """Return the key of what the first and the last stage share, if anything; raise PlanError for other sharing."""
    uses: dict[str, list[int]] = {}
    for layer, spec in enumerate(specs):
        if (key := _key_of(spec)) is not None:
            uses.setdefault(key, []).append(layer)
    shared = []
    for key, layers in uses.items():
        stages = {i for i, span in enumerate(plan.stages) for layer in layers
                  if span.first_layer <= layer < span.end_layer}  # fmt: skip
        if len(stages) == 1:
            continue
        if stages != {0, plan.num_stages - 1}:
            raise PlanError(
                f"'{key}' ties layers {', '.join(map(str, layers))}, on stages {', '.join(map(str, sorted(stages)))}"
                f" (expected one stage, or 0 and {plan.num_stages - 1}); cut elsewhere, or untie"
            )
        names = specs[layers[0]].tied_weight_attr
        if len(names) != 1:
            raise PlanError(
                f"'{key}' ties {len(names)} weights of both ends (expected one); use fewer stages, or untie"
            )
        shared.append(key)
    if len(shared) > 1:
        raise PlanError(
            f"both ends share {' and '.join(shared)} (expected one tied weight); use fewer stages, or untie"
        )
    return shared[0] if shared else None


def _tied(shared: str | None, layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the weight among a rank's layers that the other end of the pipeline has too."""
    uses = [one for one in layers if isinstance(one, TiedUse) and one.key == shared]
    return uses[0].weights() if uses else []


def _layers(source: Source, first: int, end: int) -> list[nn.Module]:
    """Return layers [first, end): those that the module has built, or else new ones."""
    from deepspeed.pipe import LayerSpec

    built = source.built
    if built is not None and (first, end) == (built._local_start, built._local_stop):
        layers = [_as_layer(source.specs[i], one) for i, one in zip(range(first, end), _built(built), strict=True)]
    elif not source.seeds.seed_layers and any(isinstance(spec, LayerSpec) for spec in source.specs[first:end]):
        raise PlanError(
            f"without seed_layers the weights of layers {first} to {end - 1} follow from DeepSpeed's cut (here"
            f" {built._local_start} to {built._local_stop - 1}); cut the plan there, or set seed_layers"
        )
    else:
        layers = _new_layers(source, first, end)
    if end < len(source.specs):
        layers[-1].register_forward_hook(partial(_check_output, end - 1))
    return layers


def _built(module: Any) -> list[Any]:
    """Return the modules and functions that a PipelineModule holds, in order; of a tied one its module."""
    specs = module._layer_specs[module._local_start : module._local_stop]
    keys = [_key_of(spec) for spec in specs]
    return [
        function if key is None else module.tied_modules[key]
        for key, function in zip(keys, module.forward_funcs, strict=True)
    ]


def _new_layers(source: Source, first: int, end: int) -> list[nn.Module]:
    """Build layers as DeepSpeed does on a stage that holds them, seeds and all."""
    tied: dict[str, nn.Module] = {}
    layers = []
    for i in range(first, end):
        spec, key = source.specs[i], _key_of(source.specs[i])
        if key is None:
            layers.append(_as_layer(spec, _new(source, i)))
            continue
        if key not in tied:
            tied[key] = _new(source, i)
            if (origin := source.first_use(i)) < first:
                _copy_weights(TiedUse(spec, _new(source, origin)), TiedUse(spec, tied[key]))
        layers.append(TiedUse(spec, tied[key]))
    return layers


def _new(source: Source, layer: int) -> Any:
    """Build a layer by its spec; what is no spec is there already."""
    from deepspeed.pipe import LayerSpec

    spec = source.specs[layer]
    source.seeds.sow(layer)
    return spec.build() if isinstance(spec, LayerSpec) else spec


def _as_layer(spec: Any, made: Any) -> nn.Module:
    """Return a layer as a module that can stand in a list."""
    if _key_of(spec) is not None:
        return TiedUse(spec, made)
    return made if isinstance(made, nn.Module) else _Function(made)


def _copy_weights(source: TiedUse, target: TiedUse) -> None:
    """Give a use of another stage the weights of the first one, which DeepSpeed sends at this point."""
    with torch.no_grad():
        for theirs, own in zip(source.weights(), target.weights(), strict=True):
            own.copy_(theirs)


def _check_output(layer: int, _: nn.Module, __: object, output: object) -> None:
    """Raise PlanError where a stage would hand on anything but a tensor."""
    if not isinstance(output, Tensor):
        raise PlanError(f"layer {layer} gives no single tensor, and a stage ends there; cut the plan elsewhere")
