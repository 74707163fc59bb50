"""What `bench_network.py` compares: who pipelines, over which network, and the least that a step can take there.

A setting is one emulated network and one shape of work; the systems of a setting take turns on it. Compute is emulated:
a stage's layers sleep for the seconds that a V100 takes in fp32, six layers of GPT-2 XL 31 ms forward and 62 ms
backward for a microbatch of one sample, and as many operations per second with other models' layers.
"""

from __future__ import annotations

import heapq
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from wantrain.errors import ConfigError, TopologyError, did_you_mean
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import LayerProfile, ModelProfile, gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.bits import fewest_bits, give_back_bits
from wantrain.scheduler.solve import make_plan
from wantrain.topology import DEFAULT_FLOPS_PER_S, Topology
from wantrain.units import format_bandwidth, format_time
from wantrain.wire import payload_bytes

PEERS = ("torch 1F1B", "torch GPipe", "torch zero bubble", "DeepSpeed")

OWN = {
    "raw": ("raw:fp32", "raw:fp32"),
    "raw fp16": ("raw:fp16", "raw:fp16"),
    "quantized": ("quantized:4", "quantized:8"),
    "aqsgd": ("aqsgd:4", "quantized:8"),
}
"""Short names of wantrain with a codec for activations and one for their gradients."""

_WITH = " + "
"""Between another's schedule and the codecs in it."""

_SPLIT = "zero bubble "
"""Before the codecs of wantrain's own schedule that splits the backward."""

_XL_SIX_LAYERS_S = 0.031


@dataclass(frozen=True)
class System:
    """Who pipelines: another's program by its name, wantrain with a codec each way, or both at once."""

    name: str
    forward: str = "raw:fp32"
    backward: str = "raw:fp32"
    is_own: bool = False
    is_split: bool = False
    """Whether gradients of weights are left for later; wantrain's own only."""

    @property
    def is_peer(self) -> bool:
        """Whether all of it is another's."""
        return self.name in PEERS

    @property
    def is_coded(self) -> bool:
        """Whether it is another's schedule with wantrain's codecs in it."""
        return _WITH in self.name

    @property
    def schedule(self) -> str:
        """The other's name, without codecs."""
        return self.name.partition(_WITH)[0]

    @classmethod
    def parse(cls, text: str) -> System:
        """Read a system's name; raise ConfigError for what is none.

        It is a peer's, a short name of `OWN`, auto, FORWARD/BACKWARD, any of these three after "zero bubble", or
        "PEER + FORWARD/BACKWARD".
        """
        if text in PEERS:
            return cls(text)
        schedule, is_coded, codecs = text.partition(_WITH)
        if is_coded and schedule in PEERS:
            own = cls.parse(codecs)
            if own == AUTO or own.is_split or not own.is_own:
                raise ConfigError(f"no system '{text}'; after '+' expected {', '.join(OWN)}, or FORWARD/BACKWARD")
            return cls(f"{schedule}{_WITH}{own.forward}/{own.backward}", own.forward, own.backward)
        codecs = text.removeprefix("wantrain ")
        if codecs.startswith(_SPLIT):
            own = cls.parse(codecs.removeprefix(_SPLIT))
            if not own.is_own or own.is_split:
                raise ConfigError(
                    f"no system '{text}'; after '{_SPLIT}' expected {', '.join(OWN)}, or FORWARD/BACKWARD"
                )
            return replace(own, name=own.name.replace("wantrain ", f"wantrain {_SPLIT}"), is_split=True)
        forward, _, backward = codecs.partition("/")
        if not backward:
            known = [*PEERS, *OWN, AUTO.forward]
            if forward == AUTO.forward:
                return AUTO
            if forward not in OWN:
                hint = did_you_mean(text, known)
                raise ConfigError(f"no system '{text}'{hint}; expected {', '.join(known)}, or FORWARD/BACKWARD")
            forward, backward = OWN[forward]
        for codec in (forward, backward):
            payload_bytes(codec, (1, 1))  # refuses what is none
        return cls(f"wantrain {forward}/{backward}", forward, backward, is_own=True)


AUTO = System("wantrain auto", "auto", "auto", is_own=True)
"""As its plan chooses the codecs of every boundary, for samples that are seen again."""

Codecs = Sequence[tuple[str, str]]
"""Of activations and of their gradients, for each boundary."""


def parse_systems(text: str) -> list[System]:
    """Read a list of systems, parted by commas, or by semicolons where a codec's own name has commas."""
    return [System.parse(one.strip()) for one in text.split(";" if ";" in text else ",")]


@dataclass(frozen=True)
class Setting:
    """A network of like workers, each with an uplink of its own, and a step's work."""

    uplink_bytes_per_s: float
    latency_s: float = 0.0
    """One way, between any two."""
    model: str = "gpt2_xl"
    stages: int = 8
    microbatches: int = 16
    dilation: float = 4.0

    def __post_init__(self) -> None:
        if self.config.num_layers % self.stages:
            raise ConfigError(
                f"{self.model} has {self.config.num_layers} layers, which {self.stages} stages can't share evenly"
            )

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig.load(find_config("models", self.model, ConfigError))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a microbatch's activation: one sample."""
        return 1, self.config.seq_len, self.config.hidden

    @property
    def forward_s(self) -> float:
        """Seconds of a microbatch forward in one stage; backward takes twice as long."""
        layer = gpt_profile(self.config, 1).layers[1]
        return self.config.num_layers / self.stages * layer.forward_flops / flops_per_s()

    @property
    def backward_s(self) -> float:
        """Seconds of a microbatch backward in one stage."""
        return 2 * self.forward_s

    @property
    def weights_s(self) -> float:
        """Seconds of a backward that go to gradients of weights, which a schedule may leave for later."""
        layer = gpt_profile(self.config, 1).layers[1]
        return self.config.num_layers / self.stages * layer.weight_flops / flops_per_s()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.microbatches * self.config.seq_len

    @property
    def title(self) -> str:
        """What a table says of it."""
        latency = f", {format_time(self.latency_s)}" if self.latency_s else ""
        return f"{format_bandwidth(self.uplink_bytes_per_s)}{latency}"

    def as_dict(self) -> dict[str, Any]:
        """Return what a record keeps."""
        return asdict(self)

    def topology_text(self) -> str:
        """Return the network's topology, as a file has it."""
        return uplinks_text(self.stages, self.uplink_bytes_per_s, self.latency_s)

    def topology(self) -> Topology:
        """Return the network."""
        return uplinks_topology(self.stages, self.uplink_bytes_per_s, self.latency_s)

    def profile(self) -> ModelProfile:
        """Return a profile with one layer for each stage, for a topology's workers of the default speed."""
        elements = self.shape[1] * self.shape[2]
        layer = LayerProfile(
            name="stage",
            forward_flops=self.forward_s * DEFAULT_FLOPS_PER_S,
            backward_flops=self.backward_s * DEFAULT_FLOPS_PER_S,
            weight_flops=self.weights_s * DEFAULT_FLOPS_PER_S,
            parameter_bytes=0,
            activation_elements=elements,
            stored_bytes=4 * elements,
        )
        return ModelProfile(microbatch_size=1, layers=(layer,) * self.stages)

    def codecs(self, system: System) -> Codecs:
        """Return what a system sends activations and their gradients with."""
        if system.forward != AUTO.forward:
            return [(system.forward, system.backward)] * (self.stages - 1)
        return [(boundary.forward_codec, boundary.backward_codec) for boundary in self.plan(system).boundaries]

    def payloads(self, codecs: Codecs) -> list[tuple[int, int]]:
        """Return the bytes of one microbatch's activation and of its gradient on the wire, for each boundary."""
        return [(payload_bytes(codec, self.shape), payload_bytes(back, self.shape)) for codec, back in codecs]

    def bound_s(self, system: System, codecs: Codecs | None = None) -> float:
        """Return a work-conserving schedule's step with a system's payloads; `codecs` that its plan once chose."""
        weights_s = self.weights_s if system.is_split else 0.0
        return bound_s(
            self.microbatches, self.payloads(codecs or self.codecs(system)), self.uplink_bytes_per_s,
            (self.forward_s, self.backward_s - weights_s, weights_s), self.latency_s,
        )  # fmt: skip

    def plan(self, system: System) -> Plan:
        """Return the plan that wantrain follows here."""
        chosen: dict[str, Any] = {"forward_codec": system.forward, "backward_codec": system.backward}
        topology, profile = self.topology(), self.profile()
        is_auto = system.forward == AUTO.forward
        plan = make_plan(
            topology, profile, batch_size=self.microbatches, num_stages=self.stages,
            schedule="zero_bubble" if system.is_split else "1f1b",
            **(chosen | fewest_bits("again") if is_auto else chosen),
        )  # fmt: skip
        return give_back_bits(plan, topology, profile, "again") if is_auto else plan


def uplinks_text(count: int, bytes_per_s: float, latency_s: float) -> str:
    """Return a topology of workers that share nothing but each its own uplink among its links."""
    rate, latency = f"{bytes_per_s * 8!r} bit/s", f"{latency_s * 1e3!r} ms"
    return (
        f'source = "chosen"\n[[worker]]\nname = "w"\ncount = {count}\nsite = "wan"\nuplink = "{rate}"\n'
        f'[[link]]\nwithin = "wan"\nbandwidth = "{rate}"\nlatency = "{latency}"\n'
    )


def uplinks_topology(count: int, bytes_per_s: float, latency_s: float, **of_worker: float) -> Topology:
    """Return that topology; `of_worker` gives all workers a speed, say."""
    text = tomllib.loads(uplinks_text(count, bytes_per_s, latency_s))
    topology = Topology.parse({"name": "uplinks"} | text, TopologyError, "uplinks")
    return topology.model_copy(
        update={"workers": tuple(worker.model_copy(update=of_worker) for worker in topology.workers)}
    )


def flops_per_s() -> float:
    """Return the speed at which six layers of GPT-2 XL take as long as they do on a V100 in fp32."""
    xl = ModelConfig.load(find_config("models", "gpt2_xl", ConfigError))
    return 6 * gpt_profile(xl, 1).layers[1].forward_flops / _XL_SIX_LAYERS_S


def bound_s(
    microbatches: int,
    payloads: Sequence[tuple[float, float]],
    bytes_per_s: float,
    compute_s: tuple[float, float] | tuple[float, float, float],
    latency_s: float = 0.0,
) -> float:
    """Return the step of a work-conserving schedule: stages do one thing at a time, backward first, gradients of
    weights last, sends leave a worker one after another as they are ready, memory is unlimited.

    `payloads`: for each boundary, bytes of an activation and of its gradient; `compute_s`: a stage's seconds forward
    and backward, and for the gradients of weights where they are no part of that.
    """
    stages = len(payloads) + 1
    here_f: list[set[int]] = [set(range(microbatches)), *(set() for _ in range(stages - 1))]
    here_b: list[set[int]] = [set() for _ in range(stages)]
    done_f, done_b, busy, up = [0] * stages, [0] * stages, [0.0] * stages, [0.0] * stages
    owed, weights_s = [0] * stages, compute_s[2] if len(compute_s) > 2 else 0.0
    queue: list[tuple[float, int, int, tuple[set[int], int] | None]] = [(0.0, s, s, None) for s in range(stages)]
    order, end = stages, 0.0
    while queue:
        now, _, s, arrival = heapq.heappop(queue)
        if arrival is not None:
            arrival[0].add(arrival[1])
        if busy[s] > now:
            continue
        is_backward = done_b[s] in here_b[s]
        if not is_backward and (done_f[s] not in here_f[s] or done_f[s] == microbatches):
            if owed[s] and weights_s:
                owed[s], busy[s] = owed[s] - 1, now + weights_s
                end = max(end, busy[s])
                heapq.heappush(queue, (busy[s], order, s, None))
                order += 1
            continue
        m = done_b[s] if is_backward else done_f[s]
        busy[s] = now + compute_s[is_backward]
        end = max(end, busy[s])
        owed[s] += is_backward
        done_b[s], done_f[s] = done_b[s] + is_backward, done_f[s] + (not is_backward)
        target = s - 1 if is_backward else s + 1
        if 0 <= target < stages:
            up[s] = max(busy[s], up[s]) + payloads[min(s, target)][is_backward] / bytes_per_s
            queue_item = (up[s] + latency_s, order, target, ((here_b if is_backward else here_f)[target], m))
            heapq.heappush(queue, queue_item)
        elif not is_backward:
            here_b[s].add(m)
        heapq.heappush(queue, (busy[s], order + 1, s, None))
        order += 2
    return end
