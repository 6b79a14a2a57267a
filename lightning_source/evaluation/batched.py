"""Trains hundreds of copies of a small network at once, each on its own examples: ground truth in minutes.

The copies' parameters are stacked along a new first dimension, the forward pass is vectorised over it with
:func:`torch.func.vmap`, and one optimizer steps the stacked tensors. What an optimizer does element by element it then
does to each copy as if that were trained alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from lightning_source._lightning import MisconfigurationException

# What these do to an element depends on others, which in a stacked tensor belong to other copies.
NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")

State = dict[str, Tensor]  # by name, stacked [C, ...]


@dataclass(frozen=True)
class PerCopy:
    """Data of which every copy has its own, such as labels drawn anew.

    Attributes:
        values: ``[C, N, ...]``.
    """

    values: Tensor


def retrain_batched(
    build: Callable[[], nn.Module],
    loss: Callable[..., Tensor],
    measurement: Callable[..., Tensor],
    train: Sequence[Tensor | PerCopy],
    query: Sequence[Tensor],
    kept: Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    optimizer: Callable[[list[Tensor]], Optimizer],
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    memory: float = 1e9,
    progress: bool = False,
) -> Tensor:
    """Train ``C`` copies of a network, each on its own subset of the data, and measure every query on each.

    A copy's initialisation and its order of examples follow from its seed alone, so neither the other copies nor
    ``memory`` change its result (but for round-off and the masks of dropout).

    Args:
        build: a new network, freshly initialised.
        loss: ``(network, *batch) -> scalar``, what training minimises; ``network`` is called like the module.
        measurement: ``(network, *query) -> [Q]``, taken in eval mode after training.
        train: tensors ``[N, ...]`` with the examples along the first dimension, one for each item of a batch.
        query: tensors ``[Q, ...]``, the queries.
        kept: ``[C, N]``, non-zero where a copy is trained on an example.
        seeds: ``[C]``, one for each copy.
        optimizer: makes an optimizer that works element by element (SGD with or without momentum, Adam, AdamW,
            Adagrad, RMSprop ...) over the stacked parameters, which come in the order of ``module.parameters()``.
        epochs: passes over a copy's examples.
        batch_size: examples of a step.
        drop_last: leave out an epoch's last batch where it is smaller than the others.
        schedule: makes a learning-rate scheduler, which steps after every optimizer step.
        memory: bytes that the copies trained at once may take; more copies are trained one chunk after another.
        progress: show a progress bar.

    Returns:
        ``[C, Q]`` on the CPU.

    Raises:
        MisconfigurationException: shapes that do not match, an empty subset, or an optimizer that would mix copies.
        FloatingPointError: copies that ended with non-finite measurements.
    """
    recipe = _Recipe(_built(build, int(seeds[0])), build, loss, optimizer, schedule, epochs, batch_size, drop_last)
    measured: Tensor | None = None
    for chunk, trained in recipe.chunks(train, kept, seeds, None, memory, progress):
        values = measure_copies(recipe.template, trained, measurement, query)
        measured = values.new_empty(len(kept), values.shape[1]) if measured is None else measured
        measured[chunk] = values
    assert measured is not None
    lost = (~torch.isfinite(measured)).any(1)
    if lost.any():
        raise FloatingPointError(f"{int(lost.sum())} of {len(kept)} copies ended with non-finite measurements")
    return measured


def train_batched(
    build: Callable[[], nn.Module],
    loss: Callable[..., Tensor],
    train: Sequence[Tensor | PerCopy],
    kept: Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    optimizer: Callable[[list[Tensor]], Optimizer],
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    start: State | None = None,
    memory: float = 1e9,
    progress: bool = False,
) -> State:
    """The training of :func:`retrain_batched` alone, for what it does not do: stages, or several measurements.

    Args:
        build: as there, and so are the arguments that are not named here.
        loss: as there.
        train: as there.
        kept: as there.
        seeds: as there.
        optimizer: as there.
        epochs: as there.
        batch_size: as there.
        drop_last: as there.
        schedule: as there.
        start: the state that an earlier stage ended with, in place of new networks.
        memory: as there.
        progress: as there.

    Returns:
        Parameters and buffers of every copy by name, ``[C, ...]``, for :func:`measure_copies`.

    Raises:
        MisconfigurationException: as there.
    """
    recipe = _Recipe(_built(build, int(seeds[0])), build, loss, optimizer, schedule, epochs, batch_size, drop_last)
    state: State = {}
    for chunk, trained in recipe.chunks(train, kept, seeds, start, memory, progress):
        for name, value in trained.items():
            state.setdefault(name, value.new_empty(len(kept), *value.shape[1:]))[chunk] = value
    return state


@torch.no_grad()
def measure_copies(
    template: nn.Module, state: State, measurement: Callable[..., Tensor], query: Sequence[Tensor], at_once: int = 32
) -> Tensor:
    """The measurement of every query on every copy, in eval mode.

    Args:
        template: a module of the copies' shape.
        state: the copies' parameters and buffers, stacked.
        measurement: ``(network, *query) -> [Q]``.
        query: tensors ``[Q, ...]``.
        at_once: copies that run together.

    Returns:
        ``[C, Q]`` on the CPU.
    """

    def measure(state: State) -> Tensor:
        return measurement(_network(template, state), *query)

    training = template.training
    template.eval()
    with _vectorisable():
        measured: Tensor = vmap(measure, chunk_size=at_once)(state).cpu()
    template.train(training)
    return measured


@dataclass(frozen=True)
class _Recipe:
    template: nn.Module
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    optimizer: Callable[[list[Tensor]], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None
    epochs: int
    batch_size: int
    drop_last: bool

    def chunks(
        self,
        data: Sequence[Tensor | PerCopy],
        kept: Tensor,
        seeds: Sequence[int] | Tensor,
        start: State | None,
        memory: float,
        progress: bool,
    ) -> Iterator[tuple[Tensor, State]]:
        """Numbers of copies that were trained together, and their trained state."""
        examples = {len(t.values[0]) if isinstance(t, PerCopy) else len(t) for t in data}
        if kept.dim() != 2 or examples != {kept.shape[1]} or len(seeds) != len(kept):
            raise MisconfigurationException(
                f"`kept` {list(kept.shape)} must be [copies, examples] for {len(seeds)} seeds and training data of"
                f" {sorted(examples)} examples."
            )
        sizes = (kept != 0).sum(1)
        if int(sizes.min()) < (self.batch_size if self.drop_last else 1):
            raise MisconfigurationException(
                f"a copy keeps {int(sizes.min())} examples, which leaves it no batch. HINT: lower"
                f" `batch_size`={self.batch_size} or set `drop_last=False`."
            )
        at_once = max(1, int(memory / self.bytes_per_copy(data)))
        with tqdm(total=len(kept), desc="Retraining", unit="copy", disable=not progress) as bar:
            for size in sizes.unique().tolist():  # copies with as many examples take the same steps
                for chunk in (sizes == size).nonzero().flatten().split(at_once):
                    own = [int(seeds[c]) for c in chunk.tolist()]
                    before = self.initial(own) if start is None else self.continued(start, chunk)
                    yield chunk, self.train(data, kept[chunk], chunk, own, *before)
                    bar.update(len(chunk))

    def train(
        self,
        data: Sequence[Tensor | PerCopy],
        kept: Tensor,
        copies: Tensor,
        seeds: Sequence[int],
        parameters: State,
        buffers: State,
    ) -> State:
        """The trained state of the copies numbered ``copies``, all of which keep as many examples."""
        stepper = self.optimizer(list(parameters.values()))
        if type(stepper).__name__ in NOT_ELEMENTWISE:
            raise MisconfigurationException(
                f"`{type(stepper).__name__}` does not work element by element and would mix the copies. HINT: retrain"
                " them one at a time."
            )
        scheduler = self.schedule(stepper) if self.schedule else None
        self.template.train()

        def copy_loss(parameters: State, buffers: State, *batch: Tensor) -> Tensor:
            return self.loss(_network(self.template, parameters | buffers), *batch)

        copy_losses = vmap(copy_loss, randomness="different")
        with torch.random.fork_rng(devices=[]), _vectorisable():
            torch.manual_seed(seeds[0])  # of dropout, which is the only draw made for all copies together
            for chosen in self.batches(kept, seeds):
                batch = [
                    t.values[copies.unsqueeze(1), chosen] if isinstance(t, PerCopy) else t[chosen.to(t.device)]
                    for t in data
                ]
                stepper.zero_grad()
                # No copy's loss knows of another's parameters, so the sum's gradient is each copy's own.
                copy_losses(parameters, buffers, *batch).sum().backward()
                stepper.step()
                if scheduler is not None:
                    scheduler.step()
        return {name: value.detach() for name, value in (parameters | buffers).items()}

    def initial(self, seeds: Sequence[int]) -> tuple[State, State]:
        """Stacked parameters and buffers of networks built under each seed."""
        return torch.func.stack_module_state([_built(self.build, seed) for seed in seeds])

    def continued(self, start: State, copies: Tensor) -> tuple[State, State]:
        """Some copies of a state, parameters apart from buffers, with memory of their own."""
        learnt = {name for name, _ in self.template.named_parameters()}
        own = {name: value[copies].clone() for name, value in start.items()}
        return (
            {name: value.requires_grad_() for name, value in own.items() if name in learnt},
            {name: value for name, value in own.items() if name not in learnt},
        )

    def batches(self, kept: Tensor, seeds: Sequence[int]) -> Iterator[Tensor]:
        """``[C, B]``: which examples each copy takes at each step, every epoch in a new order of the copy's own."""
        own = [row.nonzero().flatten() for row in kept]
        size = len(own[0])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        last = size - size % self.batch_size if self.drop_last else size
        for _ in range(self.epochs):
            order = torch.stack(
                [ids[torch.randperm(size, generator=g)] for ids, g in zip(own, generators, strict=True)]
            )
            yield from order[:, :last].split(self.batch_size, dim=1)

    def bytes_per_copy(self, data: Sequence[Tensor | PerCopy]) -> int:
        """What one copy takes: parameters, gradient, moments and a temporary, its batch, and what backward needs."""
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        first = [(t.values[0] if isinstance(t, PerCopy) else t)[: self.batch_size] for t in data]
        kept = {name: value.clone() for name, value in self.template.named_buffers()}
        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            self.loss(_network(self.template, kept), *first)
        own = sum(p.numel() * p.element_size() for p in self.template.parameters())
        whole = {t.untyped_storage().data_ptr() for t in [*first, *self.template.parameters()]}
        return (
            5 * own
            + sum(t.numel() * t.element_size() for t in first)
            + sum(size for pointer, size in held.items() if pointer not in whole)
        )


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def _vectorisable() -> Iterator[None]:
    """Attention by its formula: the fused kernels would run copy by copy."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _network(template: nn.Module, state: State) -> Callable[..., Tensor]:
    """The module with these parameters and buffers in place of its own."""
    return lambda *inputs, **options: functional_call(template, state, inputs, options)
