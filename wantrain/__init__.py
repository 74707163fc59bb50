"""wantrain trains transformer models on machines that are joined by slow and uneven links.

    import wantrain as wt

    topology = wt.Topology.load("two_sites.toml")
    plan = wt.make_plan(topology, wt.gpt_profile(model, microbatch_size=2), batch_size=16, num_stages=2)
    trainer = wt.Trainer(layers, plan, loss=loss, worker="a-0")

These names are found when they are first used, so that `import wantrain`, and with it the command line, loads nothing
else: torch alone takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wantrain.config import RunConfig
    from wantrain.errors import WantrainError
    from wantrain.model_config import ModelConfig
    from wantrain.plan import Plan
    from wantrain.profile import ModelProfile, gpt_profile
    from wantrain.scheduler.solve import make_plan
    from wantrain.topology import Topology
    from wantrain.training.quantized_adam import QuantizedAdam
    from wantrain.training.trainer import Batch, StepResult, Trainer

__all__ = [
    "Batch",
    "ModelConfig",
    "ModelProfile",
    "Plan",
    "QuantizedAdam",
    "RunConfig",
    "StepResult",
    "Topology",
    "Trainer",
    "WantrainError",
    "gpt_profile",
    "make_plan",
]

_HOMES = {
    "Batch": "training.trainer",
    "ModelConfig": "model_config",
    "ModelProfile": "profile",
    "Plan": "plan",
    "QuantizedAdam": "training.quantized_adam",
    "RunConfig": "config",
    "StepResult": "training.trainer",
    "Topology": "topology",
    "Trainer": "training.trainer",
    "WantrainError": "errors",
    "gpt_profile": "profile",
    "make_plan": "scheduler.solve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wantrain' has no attribute '{name}'")
    return getattr(import_module(f"wantrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
