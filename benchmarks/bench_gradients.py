"""What compressing gradients costs a processor: a reducer's work on a bucket, for one core, beside copying it.

    python benchmarks/bench_gradients.py

Between two members, of every bucket half is scattered (residual added, encoded, decoded again for the residual), half
decoded, added and sent back (again with its residual), and the other half decoded: every value is encoded once and
decoded twice. Rates are fp32 bytes of the bucket per second of one core. The sum is checked in the same run against
fp32, by the law of error feedback.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness import append_result, spread
from wantrain.codecs.codec import make_codec
from wantrain.codecs.error_feedback import ErrorFeedback

CODECS = (
    "raw:fp32",
    "quantized:4",
    "error_feedback:quantized:8",
    "error_feedback:quantized:4",
    "error_feedback:quantized:2",
    "error_feedback:hadamard:4",
    "error_feedback:cocktail:4",
    "error_feedback:cocktail:4,mask=0.2",
    "error_feedback:cocktail:2,mask=0.167,top=1",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=1 << 20, help="values of a bucket (default: 4 MiB of them)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    return parser.parse_args()


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the processor seconds of each run after three to warm up."""
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        start_s = time.process_time()
        run()
        found.append(time.process_time() - start_s)
    return found


class _Bucket:
    """A member's work on one bucket: encode every value once, decode every value once more."""

    def __init__(self, codec: str, num_values: int) -> None:
        self.values = torch.randn(num_values, generator=torch.Generator().manual_seed(0))
        self.residual = torch.zeros(num_values) if codec.startswith("error_feedback") else None
        self.arrived = torch.zeros(num_values)
        self._sender, self._receiver = ErrorFeedback(codec), make_codec(codec)
        self.num_payload_bytes = self.num_steps = 0

    def step(self) -> None:
        moment = self.num_steps << 20
        payload = self._sender.encode(self.values, self.residual, moment)
        self._receiver.moment = moment
        self.arrived += self._receiver.decode(payload)
        self.num_payload_bytes, self.num_steps = payload.numel(), self.num_steps + 1

    def error(self) -> float:
        """Return how far what arrived and what is owed are from what was given, by its norm."""
        owed: Tensor | float = 0.0 if self.residual is None else self.residual
        missing = self.arrived + owed - self.num_steps * self.values
        return float(torch.linalg.vector_norm(missing) / torch.linalg.vector_norm(self.num_steps * self.values))


def measure(codec: str, num_values: int, repeats: int, copy_s: float) -> dict[str, Any]:
    bucket = _Bucket(codec, num_values)
    rates = [4e-6 * num_values / one_s for one_s in seconds(bucket.step, repeats)]
    error = bucket.error()
    assert bucket.residual is None or error < 1e-5, f"{codec} lost {error:.1e} of what was given"
    return {
        "codec": codec,
        "mb_per_s": spread(rates),
        "times_a_copy": 4e-6 * num_values / statistics.median(rates) / copy_s,
        "times_fewer_bytes": 4 * num_values / bucket.num_payload_bytes,
        "error": error,
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    source, target = torch.randn(arguments.values), torch.empty(arguments.values)
    copy_s = statistics.median(seconds(lambda: target.copy_(source), arguments.repeats))
    results = [measure(codec, arguments.values, arguments.repeats, copy_s) for codec in CODECS]
    for one in results:
        print(
            f"{one['codec']:44s} {one['mb_per_s']['median']:7.0f} MB/s ({one['times_a_copy']:5.1f} copies)"
            f"   {one['times_fewer_bytes']:6.1f} times fewer bytes"
        )
    record = {"values": arguments.values, "copy_mb_per_s": 4e-6 * arguments.values / copy_s, "codecs": results}
    print(json.dumps({"copy_mb_per_s": record["copy_mb_per_s"]}))
    if arguments.save:
        append_result("gradients", record)


if __name__ == "__main__":
    main()
