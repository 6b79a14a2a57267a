"""Looks at gradients as backward leaves them and as the optimizer is given them: what came between enters the rates.

Clipping, hooks that zero a layer, surgery on ``.grad``: whatever the means, each parameter's factor is the norm after
over the norm before. Norms are kept as tensors on their device, so that no step waits for them. Where nothing has ever
been seen between backward and step, the gradients' version counters, which every write but one through ``.data``
raises, stand in for norms; at a few steps norms are taken all the same. A change of direction has no factor; it takes a
copy of the gradient to see, so it is looked for at these steps and named when training ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from lightning_source._lightning import rank_zero_warn
from lightning_source.recording.raw_gradients import RawGradients

SAMPLE = 65_536  # entries of a parameter whose direction is compared; evenly spread where it has more
SAME_DIRECTION = 0.999  # cosine from which two gradients count as parallel


def is_sampled(step: int) -> bool:
    """Whether a step, counted from 0, is one of the few that are looked at closely: the first 8, then powers of two."""
    return step < 8 or step & (step - 1) == 0


def sample_of(values: Tensor) -> Tensor:
    """A copy of at most ``SAMPLE`` evenly spread entries, flat."""
    stride = -(-values.numel() // SAMPLE) or 1
    return values.detach().reshape(-1)[::stride].clone()


class GradientWatch:
    """Watches the gradients of some parameters.

    Args:
        parameters: by name, in the order of the norms; ``None`` for one that is not trained at present.
        guarded: a context that the watch's own work runs in.
        loss_scale: reads what the loss is multiplied by before backward, 0-dim; ``None`` where it is not.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter | None],
        guarded: Callable[[], AbstractContextManager[None]],
        loss_scale: Callable[[], Tensor | None],
    ) -> None:
        self._parameters = dict(parameters)
        self._guarded = guarded
        self._loss_scale = loss_scale
        self.directions: list[Tensor] = []  # cosines of the sampled steps by parameter; NaN where there is none
        self._steps = 0
        self._queued = False
        self._before: list[Tensor] = []
        self._given: Tensor | None = None
        self._scale: Tensor | None = None
        self._sample: list[Tensor | None] = []
        self._versions: list[tuple[int, int] | None] | None = None  # of the gradients, where no norms were taken
        self._raw = RawGradients(self._parameters)  # while no hook but the user's is there
        self._always = self._raw.any  # whether something comes between backward and step
        # Torch's hook has no types.
        trained: list[Any] = [
            p for p in parameters.values() if p is not None and p.requires_grad
        ]  # torch types no hook
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._on_accumulated) for p in trained
        ]

    def detach(self) -> None:
        """Leave the parameters as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._raw.detach()

    def on_batch_start(self) -> None:
        """A backward that broke off left no call in the queue."""
        self._queued = False

    # ---------------------------------------------------------------- after backward

    def _on_accumulated(self, parameter: nn.Parameter) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._on_gradients)

    def _on_gradients(self) -> None:
        # Once more to the end of the queue: what averages gradients between processes stands there by now.
        Variable._execution_engine.queue_callback(self._on_backward_end)

    def _on_backward_end(self) -> None:
        """Before any code of the user's runs again, an overridden ``backward`` included."""
        self._queued = False
        with self._guarded():
            self._scale = self._loss_scale()
            self._always |= self._scale is not None
            if not self._always and not is_sampled(self._steps):
                self._versions = _versions(self._gradients())
                return
            self._versions = None
            gradients = self._raw.in_place_of(list(self._parameters), self._gradients())
            self._before = self._norms(gradients)
            self._sample = _samples(gradients) if is_sampled(self._steps) else []

    # ---------------------------------------------------------------- at the step

    def on_step(self, unscaled: bool, overflow: Tensor | None) -> None:
        """The gradients are those that the optimizer is given.

        Args:
            unscaled: whether a loss scale has been taken out of them.
            overflow: of an optimizer that skips by itself, whether it will, nonzero.
        """
        gradients = self._gradients()
        if self._versions is not None and self._versions == _versions(gradients):
            return
        after = self._norms(gradients)
        if not after:
            return
        if self._versions is not None:  # the first write: how long gradients were is not known, but whether any is left
            self._always = True
            self._before = [torch.where(norm > 0, norm, 1.0) for norm in after]
        if not self._before:
            return
        given = torch.stack([*self._before, *after]).view(2, -1)  # one call, since calls are what costs here
        if unscaled and self._scale is not None:
            given = torch.stack([given[0] / self._scale, given[1]])
        if overflow is not None:
            given = torch.stack([given[0], torch.where(overflow.reshape(()) > 0, 0.0, given[1])])
        self._given = given
        if self._sample:
            pairs = zip(self._sample, _samples(gradients), strict=True)
            nothing = given.new_full((), float("nan"))
            cosines = [nothing if a is None or b is None or a.shape != b.shape else _cosine(a, b) for a, b in pairs]
            self.directions.append(torch.stack([c.to(nothing) for c in cosines]))
            self._sample = []
            self._always = self._always or not torch.equal(given[0], given[1])

    def take(self) -> Tensor | None:
        """Norms before and after of the step just made, ``[2, parameters]``; ``None`` where no backward was seen."""
        self._steps += 1
        given, self._given, self._versions = self._given, None, None
        return given

    def _gradients(self) -> list[Tensor | None]:
        gradients = [None if p is None else p.grad for p in self._parameters.values()]
        return [g._values() if g is not None and g.is_sparse else g for g in gradients]

    @torch.no_grad()
    def _norms(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """0-dim on one device, 0 for a parameter without a gradient; empty where no gradient has been seen yet."""
        held = [g for g in gradients if g is not None]
        if not held:
            return [torch.zeros_like(norm) for norm in self._before]
        narrow = any(g.dtype in (torch.float16, torch.bfloat16) for g in held)  # whose squares overflow
        norms = list(torch._foreach_norm(held, 2, dtype=torch.float32 if narrow else None))
        if any(g.device != held[0].device for g in held):
            norms = [norm.to(held[0].device) for norm in norms]
        if len(held) == len(gradients):
            return norms
        nothing, known = torch.zeros_like(norms[0]), iter(norms)
        return [nothing if g is None else next(known) for g in gradients]

    # ---------------------------------------------------------------- at the end

    def changes(self) -> dict[str, Tensor]:
        """Cosines of each parameter's gradient before and after at the steps looked at, ``[sampled steps]``."""
        if not self.directions:
            return {}
        table = torch.stack([cosines.cpu() for cosines in self.directions])
        return dict(zip(self._parameters, table.unbind(1), strict=True))


def warn_of_directions(cosines: Sequence[Mapping[str, Tensor]]) -> None:
    """One warning if gradients were turned between backward and step.

    Args:
        cosines: :meth:`GradientWatch.changes` of each phase.
    """
    worst = {n: float(c.nan_to_num(1.0).min()) for phase in cosines for n, c in phase.items()}
    steps = [torch.stack([*phase.values()]).nan_to_num(1.0).amin(0) for phase in cosines if phase]
    turned = sum(int((phase < SAME_DIRECTION).sum()) for phase in steps)
    if not turned:
        return
    name = min(worst, key=lambda key: worst[key])
    rank_zero_warn(
        f"Gradients were turned between backward and the optimizer's step: at {turned} of the"
        f" {sum(map(len, steps))} steps looked at, most that of `{name}` (cosine {worst[name]:.3f}). Scores take"
        " gradients as backward gives them, at the length that the optimizer was given, and know nothing of the turn."
    )


def _versions(gradients: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
    """What tells a gradient that was written, or that another was put in the place of."""
    return [None if g is None else (id(g), g._version) for g in gradients]


def _samples(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else sample_of(g) for g in gradients]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two flat tensors; NaN where one is 0."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    a, b = a / a.norm(), b / b.norm()  # first, since squares of small gradients would vanish
    product = torch.vdot(a, b)
    return product.real if product.is_complex() else product
