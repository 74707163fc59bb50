"""The little of gloo that wantrain uses, with types: pairs that connect on an address of choice, and their errors.

`torch.distributed` builds groups for whole worlds only, on the address of the host's name, and its type hints
leave out what is used here.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, cast

from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroupGloo, Work

FOR_EVER = timedelta(days=3650)
"""A wait that times out closes the pair of processes, so most waits must not."""


class Device:
    """Where gloo listens, and the thread that serves its sockets."""

    def __init__(self, address: str | None) -> None:
        """Listen on a local address; without one on GLOO_SOCKET_IFNAME's, else on that of the host's name."""
        gloo = cast(Any, ProcessGroupGloo)
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        if address is not None:
            self.handle = gloo.create_device(hostname=address)
        elif interface:
            self.handle = gloo.create_device(interface=interface)
        else:
            self.handle = gloo.create_default_device()


class Pair:
    """A connection between two processes; tensors sent are uint8 or float64, contiguous, on the CPU."""

    def __init__(self, store: Store, number: int, device: Device, timeout_s: float) -> None:
        """Connect as 0 or 1 of the two, by way of a store that no other thread uses; pairs.py makes many at once.

        Raise RuntimeError where the other doesn't come within `timeout_s`.
        """
        gloo = cast(Any, ProcessGroupGloo)
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1  # they serve collectives, of which there are none
        options._devices = [device.handle]
        self._group = gloo(store, number, 2, options)
        self._other = 1 - number

    def send(self, message: Tensor, tag: int) -> Work:
        """Start to send; the handle and the tensor must be kept until it was waited for."""
        return cast(Work, self._group.send([message], self._other, tag))

    def recv(self, buffer: Tensor, tag: int) -> Work:
        """Start to receive a message that is no longer than the buffer."""
        return cast(Work, self._group.recv([buffer], self._other, tag))


def private_store(store: Store) -> Store:
    """Return a connection of its own to the store: one answers one thread at a time, even a thread that waits."""
    return cast(Store, cast(Any, store).clone())


def reason(caught: Exception) -> str:
    """Return what an error of gloo says, without the place in its source and the advice."""
    return str(caught).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
