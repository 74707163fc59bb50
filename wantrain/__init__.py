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
    from wantrain.codec_spec import register_codec
    from wantrain.codecs.codec import Codec, make_codec
    from wantrain.config import RunConfig
    from wantrain.errors import WantrainError
    from wantrain.model_config import ModelConfig
    from wantrain.plan import Plan
    from wantrain.profile import ModelProfile, gpt_profile
    from wantrain.schedule import register_schedule
    from wantrain.scheduler.solve import make_plan
    from wantrain.topology import Topology
    from wantrain.training.quantized_adam import QuantizedAdam
    from wantrain.training.trainer import Batch, StepResult, Trainer

__all__ = [
    "Batch",
    "Codec",
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
    "make_codec",
    "make_plan",
    "register_codec",
    "register_schedule",
]

_HOMES = {
    "Batch": "training.trainer",
    "Codec": "codecs.codec",
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
    "make_codec": "codecs.codec",
    "make_plan": "scheduler.solve",
    "register_codec": "codec_spec",
    "register_schedule": "schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wantrain' has no attribute '{name}'")
    return getattr(import_module(f"wantrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
