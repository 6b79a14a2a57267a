"""Parameters under examination, and the moment of training that they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from lightning_source.capture.trainer_view import Moment

State = Mapping[str, Tensor]  # parameters and buffers by clean name


class StateAt(dict[str, Tensor]):
    """A :data:`State` of which it is known when training was there.

    Args:
        values: parameters and buffers by clean name.
        moment: what a step that reads the Trainer is shown; ``None`` for the end of the stage.
        label: what these parameters are, for messages.
    """

    def __init__(self, values: State, moment: Moment | None, label: str = "") -> None:
        super().__init__(values)
        self.moment = moment
        self.label = label


def moment_of(state: State) -> Moment | None:
    """When training was at these parameters; ``None`` where that is not known."""
    return state.moment if isinstance(state, StateAt) else None


@contextmanager
def naming(state: State) -> Iterator[None]:
    """Numerical errors inside say at which parameters they came up."""
    try:
        yield
    except FloatingPointError as error:
        if not isinstance(state, StateAt) or not state.label:
            raise
        raise FloatingPointError(f"{error}, at {state.label}") from error
