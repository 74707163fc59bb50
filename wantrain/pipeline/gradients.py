"""A stage's gradients, held in flat buckets that are reduced as soon as they are final.

Every parameter's `.grad` is a view into a bucket, so nothing is copied to reduce it. Buckets are filled from the last
parameter to the first, the order in which a backward finishes them; a bucket is handed to the reducer the moment its
last gradient is in, while the backward of earlier layers still runs:

    backward   [layer 3][layer 2][layer 1][layer 0]
    wire                [bucket 0  ][bucket 1  ][bucket 2 ]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wantrain.comm.allreduce import Handle, Reducer


class GradientBuckets:
    """Flat fp32 storage for the gradients of `parameters`, reduced over a data group bucket by bucket.

    On a device that is not the CPU a bucket is reduced in a copy in host memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int, reducer: Reducer | None = None) -> None:
        """Lay out buckets of at most `bucket_bytes` (at least one parameter each); no reducer: nothing to share."""
        self._reducer = reducer
        self._buckets: list[Tensor] = []
        self._missing: list[int] = []
        self._counts: list[int] = []
        self._handles: list[Handle] = []
        self._staged: list[Tensor] = []
        self._num_submitted = 0
        self._is_armed = False
        for members in _grouped(list(reversed(parameters)), bucket_bytes):
            self._add_bucket(members)

    def _add_bucket(self, members: Sequence[nn.Parameter]) -> None:
        index = len(self._buckets)
        flat = torch.zeros(sum(_padded(p) for p in members), dtype=torch.float32, device=members[0].device)
        offset = 0
        for parameter in members:
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += _padded(parameter)
            self._watch(parameter, index)
        self._buckets.append(flat)
        self._staged.append(flat if flat.device.type == "cpu" else torch.empty_like(flat, device="cpu"))
        self._counts.append(len(members))

    @property
    def bucket_sizes_bytes(self) -> list[int]:
        return [bucket.numel() * bucket.element_size() for bucket in self._buckets]

    def _watch(self, parameter: nn.Parameter, index: int) -> None:
        """Be told when a parameter's gradient has been added to."""
        parameter.register_post_accumulate_grad_hook(lambda _: self._one_ready(index))  # type: ignore[no-untyped-call]

    def flat(self, index: int) -> Tensor:
        """Return a bucket's storage."""
        return self._buckets[index]

    def zero(self) -> None:
        """Begin a step: all gradients are zero, nothing is handed in."""
        for bucket in self._buckets:
            bucket.zero_()
        self._missing = list(self._counts)
        self._num_submitted = 0
        self._is_armed = False

    def arm(self) -> None:
        """Say that the next backward is the step's last: its gradients are final."""
        self._is_armed = True

    def _one_ready(self, index: int) -> None:
        if not self._is_armed or self._reducer is None:
            return
        self._missing[index] -= 1
        while self._num_submitted < len(self._buckets) and not self._missing[self._num_submitted]:
            self._submit_next()

    def _submit_next(self) -> None:
        """Hand in the next bucket; always in the same order, since all members must agree on it."""
        assert self._reducer is not None
        bucket, staged = self._buckets[self._num_submitted], self._staged[self._num_submitted]
        if staged is not bucket:
            staged.copy_(bucket)
        self._handles.append(self._reducer.submit(staged))
        self._num_submitted += 1

    def finish(self, timeout_s: float) -> None:
        """Wait until every bucket holds the group's sum."""
        if self._reducer is None:
            return
        while self._num_submitted < len(self._buckets):
            self._submit_next()
        for handle, bucket, staged in zip(self._handles, self._buckets, self._staged, strict=True):
            handle.wait(timeout_s)
            if staged is not bucket:
                bucket.copy_(staged)
        self._handles = []


def _padded(parameter: nn.Parameter) -> int:
    """Return the parameter's place in a bucket, in values: 64-byte steps, so that kernels see the same alignment
    whatever else the bucket holds, and give the same bits under every plan."""
    return -(-parameter.numel() // 16) * 16


def _grouped(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Split into runs of at most `bucket_bytes`, never empty."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = _padded(parameter) * 4
        if not groups or size > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(parameter)
        room -= size
    return groups
