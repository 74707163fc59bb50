"""How much of a long link a channel fills: payloads in a row, and a single one, from the first worker to the second.

    wantrain emulate benchmarks/long_link.toml -- python benchmarks/bench_links.py

Every worker runs it; the first prints JSON. A measurement goes from `send` to the receiver's word that all has arrived,
less one latency, which is half the round trip of an empty payload. Beside it stands the same over a single connection.

An emulated worker has socket buffers for its whole link; an ordinary Linux machine lets a connection send 4 MB ahead.
For that, put `echo 4096 16384 4194304 >/proc/sys/net/ipv4/tcp_wmem` before the command (with `bash -c`): then one
connection reaches a quarter of the link, and only the spread one fills it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harness import append_result, spread
from wantrain.comm.channel import Channel
from wantrain.comm.groups import Membership, join
from wantrain.comm.sender import Sender
from wantrain.comm.torch_channel import Opening
from wantrain.topology import Topology
from wantrain.wire import Transport, transport_for

LONG_LINK = Path(__file__).resolve().parent / "long_link.toml"
TIMEOUT_S = 120.0
IDLE_S = 0.5
"""Between single payloads: longer than a retransmission time-out, so that TCP's restart after idling shows."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default=LONG_LINK, help="the one that is emulated (default: long_link.toml)")
    parser.add_argument("--bytes", type=int, default=64_000_000, help="size of a payload")
    parser.add_argument("--count", type=int, default=10, help="payloads in a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--connections", type=int, help="instead of what the link asks for")
    parser.add_argument("--chunk-bytes", type=int)
    parser.add_argument("--posted", type=int)
    parser.add_argument("--dilation", type=float, default=1.0, help="that of the emulation")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    return parser.parse_args()


def chosen_transport(arguments: argparse.Namespace) -> Transport:
    """Return the transport of the link from the first worker to the second, with what the flags change."""
    topology = Topology.load(arguments.topology).dilated(arguments.dilation)
    link = topology.link(topology.workers[0].name, topology.workers[1].name)
    usual = transport_for(link.bandwidth_bytes_per_s, link.latency_s)
    return Transport(
        arguments.connections or usual.num_connections,
        arguments.chunk_bytes or usual.chunk_bytes,
        arguments.posted or usual.num_posted,
    )


@contextmanager
def channel_to_other(membership: Membership, name: str, transport: Transport) -> Iterator[Channel]:
    peer = 1 - membership.rank
    (channel,) = membership.open_channels([Opening(name, peer, f"rank {peer}", Sender(), transport)], TIMEOUT_S)
    yield channel
    channel.close(TIMEOUT_S)


def time_row(channel: Channel, payload: torch.Tensor, count: int) -> float:
    """Return the seconds from the first send to the word that `count` payloads have arrived."""
    start_s = time.monotonic()
    for _ in range(count):
        channel.send(payload)
    channel.recv(TIMEOUT_S, "the word that all has arrived")
    return time.monotonic() - start_s


def send_rows(channel: Channel, num_bytes: int, rows: list[int]) -> Iterator[float]:
    """Yield payload bytes per second of each row of so many payloads, one latency taken off."""
    empty = torch.empty(0, dtype=torch.uint8)
    latency_s = min(time_row(channel, empty, 1) for _ in range(3)) / 2
    payload = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    for count in rows:
        time.sleep(IDLE_S)
        yield num_bytes * count / (time_row(channel, payload, count) - latency_s)


def answer_rows(channel: Channel, rows: list[int]) -> None:
    for count in [1, 1, 1, *rows]:
        for _ in range(count):
            channel.recv(TIMEOUT_S, "a payload of the benchmark")
        channel.send(torch.empty(0, dtype=torch.uint8)).wait(TIMEOUT_S)


def measure(membership: Membership, name: str, transport: Transport, arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up with one row, then measure rows and single payloads in turn."""
    rows = [arguments.count] + [arguments.count, 1] * arguments.repeats
    with channel_to_other(membership, name, transport) as channel:
        if membership.rank == 1:
            answer_rows(channel, rows)
            return {}
        processor_s = time.process_time()
        rates = [rate * 8e-6 * arguments.dilation for rate in send_rows(channel, arguments.bytes, rows)]
        processor_s = time.process_time() - processor_s
    return {
        "transport": vars(transport),
        "row_mbit_per_s": spread(rates[1::2]),
        "single_mbit_per_s": spread(rates[2::2]),
        "sender_processor_s_per_gb": round(processor_s / (sum(rows) * arguments.bytes / 1e9), 3),
    }


def main() -> None:
    """Join the job, measure between the first two workers, and print."""
    arguments = parse_arguments()
    membership = join(int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), TIMEOUT_S)
    transport = chosen_transport(arguments)
    single = Transport(1, transport.chunk_bytes, transport.num_posted * transport.num_connections)
    if membership.rank < 2:
        spread_over = measure(membership, "spread", transport, arguments)
        alone = measure(membership, "alone", single, arguments)
        if membership.rank == 0:
            settings = {name: getattr(arguments, name) for name in ("bytes", "count", "dilation")}
            record = (
                {"topology": Path(arguments.topology).stem}
                | settings
                | {"channel": spread_over, "one_connection": alone}
            )
            print(json.dumps(record), flush=True)
            if arguments.save:
                append_result("links", record)
    membership.leave(TIMEOUT_S * 10)


if __name__ == "__main__":
    main()
