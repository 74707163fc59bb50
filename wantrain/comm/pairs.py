"""Gloo connections to many peers, all made at once: addresses travel in one exchange, not one for each connection.

Gloo asks a store for the other end's address, connection by connection, and torch's store asks its name service who
each newcomer is before it serves another. Across an ocean a job's start would be dozens of round trips. So gloo is
given a store of this process's own, a mailbox, and what is in all mailboxes goes over the real store together:

    thread per connection    gloo ──set──► mailbox ─┐                         ┌─► mailbox ──get──► gloo connects
    calling thread                                  └─► store: set · wait · get ┘        one letter for each peer
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from torch._C._distributed_c10d import Store

from wantrain.comm.gloo import Device, Pair, reason
from wantrain.errors import ChannelError, ConfigError


class Wanted(NamedTuple):
    """A connection to be made. Both ends make it in the same call, under the same name."""

    peer_rank: int
    name: str


class _Mailbox(Store):
    """What gloo takes for a store while it connects a pair: it puts its own address there, then waits for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[str, bytes] = {}
        self._theirs: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_awaited = self._is_closed = False

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # gloo gives bytes
        with self._changed:
            self.own[key] = value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            self._is_awaited = self._is_awaited or any(key not in self.own for key in keys)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or all(key in self.own | self._theirs for key in keys))
            if self._is_closed:
                raise RuntimeError("the other end's address has not come")

    def get(self, key: str) -> bytes:
        return (self.own | self._theirs)[key]

    def await_own(self) -> None:
        """Wait until gloo has put there all that the other end must know, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_awaited or self._is_closed)

    def deliver(self, theirs: Mapping[str, bytes]) -> None:
        with self._changed:
            self._theirs.update(theirs)
            self._changed.notify_all()

    def close(self) -> None:
        """Let gloo wait no longer."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def connect_pairs(
    store: Store,
    rank: int,
    pairs: Sequence[Wanted],
    device: Device,
    timeout_s: float,
    *,
    names: Mapping[int, str],
    terms: Mapping[int, Mapping[str, str]] | None = None,
) -> list[Pair]:
    """Connect to all peers, who do so too; the lower rank is 0 in its pair.

    No other thread uses the store meanwhile. `names` are the peers' by rank, for errors. `terms` are by rank the
    channels' transports, which both ends must have alike. Raise ChannelError where a peer doesn't come within
    `timeout_s` or can't be reached, ConfigError where its terms are others.
    """
    if not pairs:
        return []
    mailboxes = [_Mailbox() for _ in pairs]
    with ThreadPoolExecutor(len(pairs), thread_name_prefix="wantrain-connect") as pool:
        making = [
            pool.submit(_make, mailbox, int(rank > pair.peer_rank), device, timeout_s)
            for pair, mailbox in zip(pairs, mailboxes, strict=True)
        ]
        try:
            for pair, mailbox, one in zip(pairs, mailboxes, making, strict=True):
                mailbox.await_own()
                if one.done():
                    _made(one, names[pair.peer_rank])  # raises why gloo did not even listen
            _exchange(store, rank, dict(zip(pairs, mailboxes, strict=True)), timeout_s, names, terms or {})
        except BaseException:
            for mailbox in mailboxes:
                mailbox.close()
            raise
        return [_made(one, names[pair.peer_rank]) for pair, one in zip(pairs, making, strict=True)]


def _exchange(
    store: Store,
    rank: int,
    mailboxes: Mapping[Wanted, _Mailbox],
    timeout_s: float,
    names: Mapping[int, str],
    terms: Mapping[int, Mapping[str, str]],
) -> None:
    """Write each peer a letter with the addresses in the mailboxes, and deliver what is in theirs."""
    by_peer: dict[int, list[Wanted]] = {}
    for pair in sorted(mailboxes):
        by_peer.setdefault(pair.peer_rank, []).append(pair)
    for peer, pairs in by_peer.items():
        addresses = {}
        for pair in pairs:
            addresses[pair.name] = {key: base64.b64encode(value).decode() for key, value in mailboxes[pair].own.items()}
        letter = {"terms": dict(terms.get(peer, {})), "addresses": addresses}
        store.set(_key(pairs, rank, peer), json.dumps(letter))
    keys = {peer: _key(pairs, peer, rank) for peer, pairs in by_peer.items()}
    _await(store, keys, timeout_s, names)
    letters = dict(zip(keys, map(json.loads, store.multi_get(list(keys.values()))), strict=True))
    for peer, letter in letters.items():
        _check_terms(names[peer], letter["terms"], terms.get(peer, {}))
    for peer, letter in letters.items():  # not before: what has its letter connects, and is waited for
        for pair in by_peer[peer]:
            theirs = letter["addresses"].get(pair.name, {})
            mailboxes[pair].deliver({key: base64.b64decode(value) for key, value in theirs.items()})


def _key(pairs: Sequence[Wanted], sender: int, receiver: int) -> str:
    """Return what a letter is called: a call's pairs are its own."""
    return f"letter/{sender}-{receiver}/{pairs[0].name}"


def _await(store: Store, keys: Mapping[int, str], timeout_s: float, names: Mapping[int, str]) -> None:
    """Wait for all letters together: across an ocean every question counts."""
    try:
        store.wait(list(keys.values()), timedelta(seconds=timeout_s))
    except RuntimeError as caught:
        missing = next(iter(keys))
        with suppress(RuntimeError):
            missing = next((peer for peer, key in keys.items() if not store.check([key])), missing)
        raise ChannelError(
            f"{names[missing]} did not come within {timeout_s:g} s ({reason(caught)}); is it running?"
        ) from None


def _check_terms(peer: str, theirs: Mapping[str, str], own: Mapping[str, str]) -> None:
    for name in sorted({*own, *theirs}):
        if name not in theirs:
            raise ConfigError(f"{peer} doesn't open channel '{name}'; use one plan")
        if name not in own:
            raise ConfigError(f"{peer} opens channel '{name}', which this worker does not; use one plan")
        if theirs[name] != own[name]:
            raise ConfigError(
                f"{peer} asks for another transport (got {theirs[name]}, expected {own[name]}); use one plan"
            )


def _make(mailbox: _Mailbox, number: int, device: Device, timeout_s: float) -> Pair:
    """Let gloo connect; nobody waits for its mailbox any more once it has failed."""
    try:
        return Pair(mailbox, number, device, timeout_s)
    except BaseException:
        mailbox.close()
        raise


def _made(making: Future[Pair], peer: str) -> Pair:
    try:
        return making.result()
    except RuntimeError as caught:
        raise ChannelError(f"can't connect to {peer} ({reason(caught)}); do the workers reach each other?") from None
