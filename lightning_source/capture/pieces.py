"""Losses that a step computes on pieces of its batch and adds up: each of them is one loss on all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_source.capture.loss_calls import LossCall
from lightning_source.capture.masked_rows import owners_of


def of_whole_batches(used: Sequence[tuple[LossCall, Tensor]], size: int) -> tuple[list[LossCall], list[Tensor]]:
    """Calls with their scales, those of one loss that are on pieces of a batch of ``size`` taken as one."""
    pieces: dict[str, list[tuple[LossCall, Tensor]]] = {}
    for call, scale in used:
        piece = scale.dim() and len(scale) < size and owners_of(call.elements, size) is None
        pieces.setdefault(f"{call.name} {tuple(scale.shape[1:])}" if piece else f"{id(call)}", []).append((call, scale))
    calls, scales = [call for call, _ in used], [scale for _, scale in used]
    for of_one in pieces.values():
        if len(of_one) > 1 and sum(len(scale) for _, scale in of_one) == size:
            whole, *rest = (next(i for i, known in enumerate(calls) if known is call) for call, _ in of_one)
            calls[whole] = _joined([call for call, _ in of_one])
            scales[whole] = torch.cat([scale for _, scale in of_one])
            for index in reversed(rest):
                del calls[index], scales[index]
    return calls, scales


def _joined(pieces: Sequence[LossCall]) -> LossCall:
    """Calls of one loss on pieces of a batch, in their order, as one call on all of it."""

    def read(name: str) -> Callable[[], Tensor] | None:
        readers = [getattr(piece, name) for piece in pieces]
        return None if None in readers else lambda: torch.cat([reader() for reader in readers])

    return replace(
        pieces[0],
        elements=torch.cat([piece.elements for piece in pieces]),
        weights=torch.cat([piece.weights for piece in pieces]),
        curvature=torch.cat([piece.curvature for piece in pieces]),
        sample=lambda generator: torch.cat([piece.sample(generator) for piece in pieces]),
        margin=read("margin"),
        log_prob=read("log_prob"),
        outputs=(),
        information=None,
    )
