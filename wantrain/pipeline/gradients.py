"""A stage's gradients, held in flat buckets that are reduced as soon as they are final.

Every parameter's `.grad` is a view into a bucket, so nothing is copied to reduce it. Buckets are filled from the last
parameter to the first, the order in which a backward finishes them; a bucket is handed to the reducer the moment its
last gradient is in, while the backward of earlier layers still runs:

    backward   [layer 3][layer 2][layer 1][layer 0]
    wire                [bucket 0  ][bucket 1  ][bucket 2 ]

Where the reducer's codec feeds errors back, each bucket has a residual of the same layout, in host memory. It outlives
the step, and goes into checkpoints parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from wantrain.codec_spec import parse_codec
from wantrain.comm.allreduce import Handle, Reducer

ALIGNMENT = 16
"""Values: 64-byte steps, so that kernels see the same alignment whatever else a bucket holds, and give the same bits
under every plan."""


def alignment_of(codec_name: str) -> int:
    """Return where parameters should begin in buckets for this codec: at a group's first value, if it has groups."""
    spec = parse_codec(codec_name)
    return spec.group_size if spec.kind in ("quantized", "hadamard") else ALIGNMENT


Share = Callable[[Sequence[nn.Parameter], int], None]
"""Turns the final gradients of some parameters into this member's share, one of a number, of what is to be summed."""


class GradientBuckets:
    """Flat fp32 storage for the gradients of `parameters`, reduced over a data group bucket by bucket.

    On a device that is not the CPU a bucket is reduced in a copy in host memory.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], bucket_bytes: int, *reducers: Reducer, alignment: int = ALIGNMENT
    ) -> None:
        """Lay out buckets of at most `bucket_bytes` (at least one parameter each).

        Several reducers sum one after another, the first while the backward runs; none: nothing to share. Parameters
        begin at multiples of `alignment` values, itself one of ALIGNMENT: a codec's groups then hold values of one.
        """
        self._reducers = reducers
        self._alignment = alignment
        self._buckets: list[Tensor] = []
        self._residuals: list[list[Tensor | None]] = []
        self._members: list[list[nn.Parameter]] = []
        self._missing: list[int] = []
        self._handles: list[Handle] = []
        self._staged: list[Tensor] = []
        self._num_submitted = 0
        self._is_armed = False
        self._is_plain = False
        self._share: Share | None = None
        for members in self._grouped(list(reversed(parameters)), bucket_bytes):
            self._add_bucket(members)

    def _add_bucket(self, members: list[nn.Parameter]) -> None:
        index = len(self._buckets)
        flat = torch.zeros(sum(map(self._padded, members)), dtype=torch.float32, device=members[0].device)
        for parameter, place in self._places(members, flat):
            parameter.grad = place[: parameter.numel()].view_as(parameter)
            self._watch(parameter, index)
        self._buckets.append(flat)
        self._members.append(members)
        self._staged.append(flat if flat.device.type == "cpu" else torch.empty_like(flat, device="cpu"))
        self._residuals.append(
            [torch.zeros_like(flat, device="cpu") if one.needs_residuals else None for one in self._reducers]
        )

    def _padded(self, parameter: nn.Parameter) -> int:
        """Return the parameter's place in a bucket, in values."""
        return -(-parameter.numel() // self._alignment) * self._alignment

    def _places(self, members: Sequence[nn.Parameter], flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter's whole place, padding included, in a tensor of its bucket's layout."""
        return list(zip(members, torch.split(flat, [self._padded(parameter) for parameter in members]), strict=True))

    def _grouped(self, parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
        """Split into runs of at most `bucket_bytes`, never empty."""
        groups: list[list[nn.Parameter]] = []
        room = 0
        for parameter in parameters:
            size = self._padded(parameter) * 4
            if not groups or size > room:
                groups.append([])
                room = bucket_bytes
            groups[-1].append(parameter)
            room -= size
        return groups

    @property
    def bucket_sizes_bytes(self) -> list[int]:
        return [bucket.numel() * bucket.element_size() for bucket in self._buckets]

    def _watch(self, parameter: nn.Parameter, index: int) -> None:
        """Be told when a parameter's gradient has been added to."""
        parameter.register_post_accumulate_grad_hook(lambda _: self._one_ready(index))  # type: ignore[no-untyped-call]

    def flat(self, index: int) -> Tensor:
        """Return a bucket's storage."""
        return self._buckets[index]

    def zero(self, share: Share | None = None, is_plain: bool = False) -> None:
        """Begin a step: all gradients are zero, nothing is handed in.

        `share` is given each bucket's parameters before it is summed; `is_plain`: sum in full precision, whatever the
        codec.
        """
        for bucket in self._buckets:
            bucket.zero_()
        self._missing = [len(members) for members in self._members]
        self._num_submitted = 0
        self._is_armed = False
        self._share, self._is_plain = share, is_plain

    def arm(self, owed: Collection[nn.Parameter] | None = None) -> None:
        """Say that the gradients that come next are final: those of `owed`, where all others are (None: of all)."""
        self._is_armed = True
        if owed is not None:
            self._missing = [sum(member in owed for member in members) for members in self._members]
            self._submit_ready()

    def _one_ready(self, index: int) -> None:
        if self._is_armed:
            self._missing[index] -= 1
            self._submit_ready()

    def _submit_ready(self) -> None:
        while self._num_submitted < len(self._buckets) and not self._missing[self._num_submitted]:
            self._submit_next()

    def _submit_next(self) -> None:
        """Hand in the next bucket; always in the same order, since all members must agree on it."""
        index = self._num_submitted
        self._num_submitted += 1
        if self._share is not None:
            self._share(self._members[index], self.num_shares)
        if not self._reducers:
            return
        bucket, staged = self._buckets[index], self._staged[index]
        if staged is not bucket:
            staged.copy_(bucket)
        self._handles.append(self._reducers[0].submit(staged, self._residuals[index][0], self._is_plain))

    @property
    def num_shares(self) -> int:
        """Return how many shares each sum is made of."""
        product = 1
        for reducer in self._reducers:
            product *= reducer.num_members
        return product

    def finish(self, timeout_s: float) -> None:
        """Wait until every bucket holds the sum over the group, and then over those of the further reducers."""
        while self._num_submitted < len(self._buckets):
            self._submit_next()
        for number in range(len(self._reducers)):
            if number:
                self._submit_again(number)
            for handle in self._handles:
                handle.wait(timeout_s)
        for bucket, staged in zip(self._buckets, self._staged, strict=True):
            if self._reducers and staged is not bucket:
                bucket.copy_(staged)
        self._handles = []

    def _submit_again(self, number: int) -> None:
        """Hand in what a reducer has summed to the next one."""
        self._handles = [
            self._reducers[number].submit(staged, residuals[number], self._is_plain)
            for staged, residuals in zip(self._staged, self._residuals, strict=True)
        ]

    def residuals(self) -> Mapping[nn.Parameter, list[tuple[Tensor, tuple[int, ...]]]]:
        """Return, by parameter, what is owed of its gradients to each reducer that keeps it, and where it lies.

        Values are a view, flat and with the padding, where codecs leave traces. The place is the same in another job
        if and only if a residual saved there means the same here: offset in the bucket, values, those of the whole
        bucket, this member and the number of members.
        """
        found: dict[nn.Parameter, list[tuple[Tensor, tuple[int, ...]]]] = {}
        for members, kept in zip(self._members, self._residuals, strict=True):
            for reducer, flat in zip(self._reducers, kept, strict=True):
                if flat is None:
                    continue
                for parameter, view in self._places(members, flat):
                    offset, size = int(view.storage_offset()), view.numel()
                    place = (offset, size, flat.numel(), reducer.member, reducer.num_members)
                    found.setdefault(parameter, []).append((view, place))
        return found

    def drop_residuals(self) -> None:
        """Owe nothing."""
        for kept in self._residuals:
            for residual in kept:
                if residual is not None:
                    residual.zero_()
