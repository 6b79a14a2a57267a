"""When epochs began, in optimizer steps, so that the Trainer's counters are known at any recorded step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_source.capture.trainer_view import Moment


class EpochMark(NamedTuple):
    """The begin of an epoch."""

    step: int  # of the recording, which counts the attributed optimizer's steps on from one stage to the next
    epoch: int
    global_step: int  # of the Trainer, which counts the steps of all optimizers of one fit


def with_mark(marks: Sequence[EpochMark], mark: EpochMark) -> tuple[EpochMark, ...]:
    """Marks and one more; of epochs alike, only the first and the last are kept.

    Example:
        >>> marks = (EpochMark(0, 0, 0), EpochMark(3, 1, 3))
        >>> with_mark(marks, EpochMark(6, 2, 6))
        (EpochMark(step=0, epoch=0, global_step=0), EpochMark(step=6, epoch=2, global_step=6))
    """
    kept = tuple(marks)
    if len(kept) > 1 and _in_line(kept[-2], kept[-1], mark):
        kept = kept[:-1]
    return (*kept, mark)


def _in_line(first: EpochMark, second: EpochMark, third: EpochMark) -> bool:
    """Whether epochs and global steps go on from the second mark as they went from the first."""
    before, after = second.step - first.step, third.step - second.step
    return before > 0 and all(
        (b - a) * after == (c - b) * before for a, b, c in zip(first[1:], second[1:], third[1:], strict=True)
    )


def moment_at(marks: Sequence[EpochMark], step: int) -> Moment | None:
    """What the Trainer shows to a training step that follows ``step`` recorded ones; ``None`` without marks.

    Example:
        >>> moment_at([EpochMark(0, 0, 0), EpochMark(6, 2, 6)], 4)
        Moment(global_step=4, current_epoch=1)
    """
    if not marks:
        return None
    index = max((i for i, mark in enumerate(marks) if mark.step <= step), default=0)
    mark, following = marks[index], marks[index + 1 : index + 2]
    done = max(0, step - mark.step)
    length = following[0].step - mark.step if following else 0
    if length <= 0:
        return Moment(mark.global_step + done, mark.epoch)
    return Moment(
        mark.global_step + done * (following[0].global_step - mark.global_step) // length,
        mark.epoch + done * (following[0].epoch - mark.epoch) // length,
    )


def with_end(marks: Sequence[EpochMark], step: int, global_step: int) -> tuple[EpochMark, ...]:
    """Marks and one at the end of training, where the Trainer's steps cannot be told from those that were recorded."""
    moment = moment_at(marks, step)
    if moment is None or moment.global_step == global_step:
        return tuple(marks)
    return (*marks, EpochMark(step, moment.current_epoch, global_step))
