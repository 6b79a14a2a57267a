"""The processes that train one model: what one of them computes for all, what is summed, what is sharded.

Whatever engine started them (a Trainer's strategy, Fabric, torchrun), this needs only its ``torch.distributed`` group.
Every call is a collective: all ranks make it in the same order. With one process each is the plain computation.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    global_rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the running process group; a single one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that writes."""
        return self.global_rank == 0

    def on_rank_zero(self, compute: Callable[[], T]) -> T:
        """Compute on rank 0 and give the value, or the exception, to all ranks."""
        if self.world_size == 1:
            return compute()
        outcome: list[object] = [None, None]  # the value and the exception
        if self.is_global_zero:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = _portable(error)
        dist.broadcast_object_list(outcome, src=0)
        value, failure = outcome
        if isinstance(failure, Exception):
            raise failure
        return cast(T, value)

    def on_all_ranks(self, compute: Callable[[], T]) -> T:
        """Compute on every rank; if one fails all do, so that none waits for it in the next collective."""
        if self.world_size == 1:
            return compute()
        error: Exception | None = None
        try:
            value = compute()
        except Exception as raised:
            error = raised
        for failure in self._gather_objects(error and _portable(error)):
            if failure is not None:
                raise error or failure
        return value

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of the items: every ``world_size``-th.

        Example:
            >>> Ranks(global_rank=1, world_size=2).shard(["a", "b", "c", "d"])
            ['b', 'd']
        """
        return items[self.global_rank :: self.world_size]

    def gather(self, shard: Sequence[T]) -> list[T]:
        """What the ranks made of their shards, in the order of the items, on every rank."""
        if self.world_size == 1:
            return list(shard)
        shards = self._gather_objects(list(shard))
        return [shards[i % self.world_size][i // self.world_size] for i in range(sum(map(len, shards)))]

    def _gather_objects(self, value: T) -> list[T]:
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values


SINGLE_PROCESS = Ranks()


def _portable(error: Exception) -> Exception:
    """An exception as another process can raise it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
