"""Codecs between the stages of torch.distributed.pipelining: the research code keeps its stages and its schedule.

    stage = PipelineStage(module, rank, 4, device)
    codecs = pipelining.Codecs([stage], "aqsgd:4", "quantized:8", settings=CodecSettings(sample_shape=(seq, hidden)))
    schedule = Schedule1F1B(stage, 8, loss_fn)
    ...
    codecs.begin_step(sample_ids)          # one list for each microbatch; only codecs that remember samples need it
    schedule.step(batch)

A schedule asks a stage for the sends and receives of each microbatch, and starts them. A stage with codecs answers
that there are none. What it would have sent goes into an outbox, what it would have received comes out of an inbox, as
in wantrain's own pipeline (`pipeline/boundary.py`): encoding, the wire and decoding go on in threads of their own, over
connections of their own, while the schedule computes.

    schedule   F0  sends of F0?     F1  sends of F1?      receives of B0?   B0
                        │ none           │ none                │ none      ▲ fills torch's own buffer
    boxes               └► encode, send  └► encode, send       └► receive, decode

So torch's 1F1B, which waits for each send before it computes on, has nothing to wait for. Stages on the same rank hand
on what they made, as torch has it; nothing is encoded there. Tensors that hold no floats travel by torch's own sends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from wantrain.codec_spec import check_activation_codec, parse_codec
from wantrain.codecs.aqsgd import AqsgdCodec
from wantrain.codecs.codec import Codec, prepare_codecs
from wantrain.comm.groups import join_process_group
from wantrain.comm.sender import PIPELINE_PRIORITY, Sender
from wantrain.comm.torch_channel import Opening
from wantrain.errors import ConfigError, WantrainError
from wantrain.integrations.pipelining_stage import METHODS, CodedStage, Side, Step
from wantrain.pipeline.agreement import Agreement
from wantrain.pipeline.boundary import Inbox, Outbox, SendLog
from wantrain.pipeline.boundary_codecs import DEFAULT_SETTINGS, CodecSettings, make_end
from wantrain.pipeline.connect import AGREE_TRANSPORT
from wantrain.pipeline.executor import Neighbour
from wantrain.pipeline.recorder import Recorder
from wantrain.wire import transport_for

_ATTRIBUTES = (
    "stage_index",
    "num_stages",
    "group",
    "group_rank",
    "device",
    "has_backward",
    "stage_index_to_group_rank",
)
"""What is read of a stage, beside the methods."""

_AGREE = "agree-"

_AT_EXIT_S = 20.0
"""Chosen: ranks end within seconds of each other, or not at all."""


@dataclass(frozen=True)
class _Line:
    """A channel to the stage across a boundary; both ends call it the same."""

    kind: str
    boundary: int
    peer_rank: int


class Codecs:
    """Codecs over all boundaries between this rank's stages and those on other ranks."""

    def __init__(
        self,
        stages: Sequence[Any],
        forward: str | Sequence[str] = "aqsgd:4",
        backward: str | Sequence[str] = "quantized:8",
        *,
        settings: CodecSettings = DEFAULT_SETTINGS,
        bytes_per_s: float = 125e6,
        latency_s: float = 0.02,
        timeout_s: float = 600.0,
    ) -> None:
        """Connect to the neighbours of `stages`, which are all that this rank has of one pipeline.

        Every rank of the pipeline makes one, after `init_process_group`, and after its schedule where that places
        stages itself (V-shaped ones do). `forward` and `backward` name the codecs of activations and of their gradients
        (`wantrain.codec_spec`): one for all boundaries, or one for each. `settings` say what codecs need to know
        beyond that, above all `sample_shape`. `bytes_per_s` and one-way `latency_s` say how a link is used, not how
        fast it is. `timeout_s`: how late a neighbour may be.

        Raises ConfigError for a codec that can't do it, without a process group, or with a torch that lacks what this
        needs; ChannelError where a neighbour doesn't come.
        """
        _check(stages)
        num_boundaries = stages[0].num_stages - 1
        self._names = {
            "forward": _each(forward, num_boundaries, is_forward=True),
            "backward": _each(backward, num_boundaries, is_forward=False),
        }
        self._settings, self._timeout_s = settings, timeout_s
        self._transport = transport_for(bytes_per_s, latency_s)
        if torch.device(stages[0].device).type == "cpu":
            prepare_codecs({name for names in self._names.values() for name in names})
        self._membership = join_process_group(stages[0].group, timeout_s)
        self.recorder = Recorder(self._membership.rank)
        """What the boxes of this rank do in the running step: encode, decode, send, wait."""
        self._codecs: list[Codec] = []
        self._boxes: list[Neighbour] = []
        self._open(stages)
        self._is_open = True
        threading._register_atexit(self._close_at_exit)  # type: ignore[attr-defined]  # atexit's are too late for threads

    def begin_step(
        self, samples: Iterable[Sequence[int] | Tensor], upcoming: Sequence[int] | Tensor | None = None
    ) -> None:
        """Say which samples the next step holds: their ids, one list (or tensor) for each microbatch, in order.

        `upcoming` are the ids of the step after it, in order. Both ends then agree on them while this step runs;
        without it they do at the beginning of the next, which costs a latency.
        """
        step = Step([_ids(one) for one in samples], None if upcoming is None else _ids(upcoming))
        for stage in self._stages:
            stage.given = step

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to other stages so far, as they are on the wire."""
        return sum(channel.stats.wire_bytes_sent for channel in self._channels.values())

    def close(self, timeout_s: float | None = None) -> None:
        """Part from the other ranks, who do so too; the end of the program does it by itself.

        Raises ChannelError where one is late by `timeout_s` (default: that of making this), or gone.
        """
        if not self._is_open:
            return
        self._is_open = False
        patience_s = self._timeout_s if timeout_s is None else timeout_s
        for box in self._boxes:
            box.outbox.close()
        with ThreadPoolExecutor(max(1, len(self._channels))) as pool:
            list(pool.map(lambda channel: channel.close(patience_s), self._channels.values()))
        for box in self._boxes:
            box.inbox.close()
        for codec in self._codecs:
            if isinstance(codec, AqsgdCodec):
                codec.buffer.close()
        self._membership.leave(patience_s)

    def _close_at_exit(self) -> None:
        """Let threads end while the interpreter still can; a rank that is gone is no news by then."""

        def close() -> None:
            with suppress(WantrainError):
                self.close(_AT_EXIT_S)

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(2 * _AT_EXIT_S)

    def _open(self, stages: Sequence[Any]) -> None:
        """Open all lines at once, then set up what works over them."""
        lines = [line for stage in stages for line in self._lines(stage)]
        logs = {line: SendLog(self.recorder, f"rank {line.peer_rank}") for line in lines}
        sender = Sender(None)

        asked = [
            Opening(
                f"{line.kind}/{line.boundary}", line.peer_rank, f"rank {line.peer_rank}", sender,
                AGREE_TRANSPORT if line.kind.startswith(_AGREE) else self._transport, PIPELINE_PRIORITY, logs[line],
            )
            for line in lines
        ]  # fmt: skip
        self._channels = dict(zip(lines, self._membership.open_channels(asked, self._timeout_s), strict=True))
        self._stages: list[CodedStage] = []
        for stage in stages:
            self._stages.append(self._put_into(stage, logs))

    def _lines(self, stage: Any) -> list[_Line]:
        return [
            _Line(prefix + way, boundary, peer)
            for boundary, peer in self._boundaries(stage).values()
            for way, names in self._names.items()
            for prefix in ("", *((_AGREE,) if parse_codec(names[boundary]).remembers else ()))
        ]

    def _boundaries(self, stage: Any) -> dict[str, tuple[int, int]]:
        """Return, for each side of a stage with a stage on another rank, the boundary and that rank in the group."""
        places, index = stage.stage_index_to_group_rank, stage.stage_index
        sides = {"upstream": (index - 1, index - 1), "downstream": (index, index + 1)}
        return {
            side: (boundary, places[other])
            for side, (boundary, other) in sides.items()
            if 0 <= other < stage.num_stages and places[other] != stage.group_rank
        }

    def _put_into(self, stage: Any, logs: dict[_Line, SendLog]) -> CodedStage:
        sides = {name: self._side(name, *place, logs, stage.device) for name, place in self._boundaries(stage).items()}
        remembering = [self._names["forward"][boundary] for boundary, _ in self._boundaries(stage).values()]
        told = next((name for name in remembering if parse_codec(name).remembers), None)
        begin = self.recorder.begin_step if not self._stages else lambda: None  # with the first of the rank's stages
        return CodedStage(stage, sides.get("upstream"), sides.get("downstream"), told, begin)

    def _side(self, name: str, boundary: int, peer: int, logs: dict[_Line, SendLog], device: torch.device) -> Side:
        """Set up the boxes towards one neighbour."""
        sends, receives = ("backward", "forward") if name == "upstream" else ("forward", "backward")
        out, back = (_Line(way, boundary, peer) for way in (sends, receives))
        sending, receiving = (
            self._end(boundary, sends, "sender", device),
            self._end(boundary, receives, "receiver", device),
        )
        outbox = Outbox(
            self._channels[out], sending, self.recorder, logs[out], self._fail, self._agreement(out, sending)
        )  # fmt: skip
        inbox = Inbox(
            self._channels[back], receiving, self.recorder, self._timeout_s, device, self._agreement(back, receiving)
        )
        self._boxes.append(Neighbour(inbox, outbox))
        other = boundary if name == "upstream" else boundary + 1
        return Side(self._boxes[-1], f"{receives} {{}} of stage {other}")

    def _end(self, boundary: int, way: str, side: str, device: torch.device) -> Codec:
        """Return one end of a boundary's codec."""
        name, num_buffers = self._names[way][boundary], sum(line.kind == _AGREE + "forward" for line in self._channels)
        self._codecs.append(make_end(name, boundary + 1, way, f"{side}-0", self._settings, num_buffers, device))
        return self._codecs[-1]

    def _agreement(self, line: _Line, codec: Codec) -> Agreement | None:
        channel = self._channels.get(_Line(_AGREE + line.kind, line.boundary, line.peer_rank))
        return Agreement(channel, codec, self._timeout_s) if channel is not None else None

    def _fail(self, error: WantrainError) -> None:
        """Let what waits for any neighbour hear of an error on the way to another."""
        for box in self._boxes:
            box.inbox.fail(error)


def _check(stages: Sequence[Any]) -> None:
    """Raise ConfigError where stages lack what is needed, or are not all of one pipeline."""
    if not stages:
        raise ConfigError("no stages were given; give all that this rank has")
    for stage in stages:
        missing = [name for name in (*METHODS, *_ATTRIBUTES) if not hasattr(stage, name)]
        if missing:
            raise ConfigError(
                f"a {type(stage).__name__} of torch {torch.__version__} has no {missing[0]}, which codecs need; use"
                " stages of torch.distributed.pipelining, torch 2.11 to 2.13"
            )
        if isinstance(vars(stage).get("clear_runtime_states"), MethodType):
            raise ConfigError(f"stage {stage.stage_index} has codecs already; give each stage to one Codecs")
    if len({stage.num_stages for stage in stages}) > 1:
        raise ConfigError("the stages are of several pipelines; make a Codecs for each")


def _each(names: str | Sequence[str], num_boundaries: int, *, is_forward: bool) -> list[str]:
    """Return a codec for each boundary."""
    each = [names] * num_boundaries if isinstance(names, str) else list(names)
    if len(each) != num_boundaries:
        raise ConfigError(f"{len(each)} codecs were given for {num_boundaries} boundaries; give one, or one for each")
    return [check_activation_codec(name, is_forward=is_forward) for name in each]


def _ids(samples: Sequence[int] | Tensor) -> list[int]:
    return [int(one) for one in samples]
