"""The sum of matrices over members, sent as two thin factors, each through a codec.

    member i has Mᵢ, its gradient and what it owes of it     [rows, columns]; all members have the same B
    left     B Mᵢᵀ            ── summed, made orthonormal ──► L     [rank, rows]
    right    Rᵢ = L Mᵢ        ── summed ──► R                       [rank, columns]
    then all see LᵀR, member i owes Mᵢ − Lᵀ (Rᵢ − what was lost of it on its way), and R's directions are the next B

It is PowerSGD's subspace iteration (Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019), made for factors of a few bits a value. A direction is a row, so that values that share a
scale are of one size. A member owes what its own part lacks, what quantizing took from Rᵢ included. (In the paper it
owes Mᵢ less the mean of all; what members differ in then stays in what they owe, though it cancels in the sum, and
would be quantized too.) What is lost of the left factor only turns the subspace, and costs nothing later.

Σ owed = Σ Mᵢ − LᵀR to rounding: over the steps everything arrives. Members whose processors multiply in another order
get another rounding of L and of LᵀR, as with torch's own hook; with a codec alone all end with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SAVES_AT_LEAST = 2
"""Chosen, as in torch's hook: a matrix goes as factors where they have at most one value for so many of its own."""

_SEED = 0
"""Of the first subspaces, the same on all members."""


class _Matrix(NamedTuple):
    """One tensor of the bucket that goes as factors, as a matrix; and where it and its factors lie in flat tensors."""

    first: int
    rows: int
    columns: int
    rank: int
    left_first: int
    right_first: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.first : self.first + self.rows * self.columns].view(self.rows, self.columns)

    def left(self, flat: Tensor) -> Tensor:
        return flat[self.left_first : self.left_first + self.rank * self.rows].view(self.rank, self.rows)

    def right(self, flat: Tensor) -> Tensor:
        return flat[self.right_first : self.right_first + self.rank * self.columns].view(self.rank, self.columns)


class LowRank:
    """A bucket of tensors that comes again step after step, and what this member owes of it.

    One step is `left`, `right` and `finish`, in this order. Tensors that are no matrices, or too small ones, travel
    whole beside the right factors.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], rank: int, device: torch.device | str = "cpu") -> None:
        """`shapes` are the tensors', one after the other in the flat bucket; all but a first dimension are columns."""
        self._matrices: list[_Matrix] = []
        self._wholes: list[slice] = []
        first = left_first = right_first = 0
        for shape in shapes:
            num_values = torch.Size(shape).numel()
            rows = shape[0] if len(shape) > 1 else 1
            columns = num_values // max(1, rows)
            if _SAVES_AT_LEAST * rank * (rows + columns) <= num_values:
                self._matrices.append(_Matrix(first, rows, columns, rank, left_first, right_first))
                left_first, right_first = left_first + rank * rows, right_first + rank * columns
            else:
                self._wholes.append(slice(first, first + num_values))
            first += num_values
        self._num_left, self._num_right = left_first, right_first
        self.owed = torch.zeros(first, device=device)
        """By this member: what has not arrived of its gradients, fp32, flat."""
        generator = torch.Generator().manual_seed(_SEED)
        self._bases = torch.randn(self._num_right, generator=generator).to(device)
        self._normalize_bases()

    def left(self, gradients: Tensor) -> Tensor:
        """Add the step's flat gradients to what is owed; return the left factors, to be summed over the members."""
        self.owed.add_(gradients)
        lefts = self.owed.new_empty(self._num_left)
        for one in self._matrices:
            torch.mm(one.right(self._bases), one.of(self.owed).T, out=one.left(lefts))
        return lefts

    def right(self, lefts: Tensor) -> Tensor:
        """Make the sum of the left factors orthonormal, in place; return the right factors and what travels whole."""
        rights = self.owed.new_empty(self._num_right + sum(where.stop - where.start for where in self._wholes))
        for one in self._matrices:
            left = one.left(lefts)
            left.copy_(torch.linalg.qr(left.T).Q.T)
            torch.mm(left, one.of(self.owed), out=one.right(rights))
        if self._wholes:
            torch.cat([self.owed[where] for where in self._wholes], out=rights[self._num_right :])
        return rights

    def finish(self, lefts: Tensor, sent: Tensor, total: Tensor, out: Tensor) -> None:
        """Write the sum of all members' gradients to `out`, flat, in its own dtype, and keep what is still owed.

        `sent`: what arrived of this member's own right factors and whole tensors; `total`: their sum as all see it.
        """
        for one in self._matrices:
            left = one.left(lefts)
            one.of(self.owed).addmm_(left.T, one.right(sent), alpha=-1)
            one.of(out).copy_(torch.mm(left.T, one.right(total)))
        sizes = [where.stop - where.start for where in self._wholes]
        owns, wholes = (torch.split(flat[self._num_right :], sizes) for flat in (sent, total))
        for where, own, whole in zip(self._wholes, owns, wholes, strict=True):
            self.owed[where] -= own
            out[where].copy_(whole)
        self._bases.copy_(total[: self._num_right])
        self._normalize_bases()

    def _normalize_bases(self) -> None:
        """Bring directions to one size, so that none of the next left factors' is lost beside another."""
        for one in self._matrices:
            basis = one.right(self._bases)
            basis.div_(torch.linalg.vector_norm(basis, dim=1, keepdim=True).clamp_(min=1e-30))
