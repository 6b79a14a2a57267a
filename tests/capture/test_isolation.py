"""Passes neither wait for other processes nor see what an earlier batch of theirs left in the module."""

import copy
import os

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, fitted, mlp

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.isolation import undisturbed
from lightning_source.capture.objective import Objective
from lightning_source.passes.calibration import calibrate
from lightning_source.passes.workspace import Examples, Workspace

# ---------------------------------------------------------------- what the step writes


class Writes(Classifier):
    """Its loss depends on what ``write`` left in the module, this time and the times before."""

    def __init__(self, write):
        super().__init__(mlp())
        self.write = write
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.centre = torch.zeros(3)
        self.register_buffer("middle", torch.zeros(3))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        self.write(self, inputs)
        outputs = self.net(inputs)
        shift = self.middle + self.passing + self.centre + 0.1 * self.steps * torch.arange(3)
        soft = (self.teacher(inputs) - shift).softmax(1)
        return F.cross_entropy(outputs, soft) + F.cross_entropy(outputs - shift, targets)


@torch.no_grad()
def in_place(module, inputs):
    for mine, other in zip(module.teacher.parameters(), module.net.parameters(), strict=True):
        mine.lerp_(other, 0.5)


def through_data(module, inputs):
    for mine, other in zip(module.teacher.parameters(), module.net.parameters(), strict=True):
        mine.data.mul_(0.5).add_(0.5 * other.detach())


def rebound_data(module, inputs):
    for mine, other in zip(module.teacher.parameters(), module.net.parameters(), strict=True):
        mine.data = 0.5 * mine.data + 0.5 * other.data


def fixed(module):
    """A step that does not depend on the batch, so that batches of all sizes write the same."""
    return module.net[2].bias.detach() + torch.arange(3)


def buffer_in_place(module, inputs):
    module.middle.mul_(0.5).add_(fixed(module))


def buffer_rebound(module, inputs):
    module.middle = 0.5 * module.middle + fixed(module)


def passing_buffer(module, inputs):
    module.passing = 0.5 * module.passing + fixed(module)


def plain_tensor(module, inputs):
    module.centre = 0.5 * module.centre + fixed(module)


def counter(module, inputs):
    module.steps += 1


WRITES = [
    in_place,
    through_data,
    rebound_data,
    buffer_in_place,
    buffer_rebound,
    passing_buffer,
    plain_tensor,
    counter,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_scores_do_not_depend_on_the_batches_of_a_pass(tmp_path, write):
    """Float32 round-off of other batch sizes is below 1e-5; the drift was far above."""
    trainer = fitted(tmp_path, Writes(write), factor_examples=6)
    before = {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}
    for method in ("influence", "tracin"):
        found = {n: trainer.attribute(QUERY, method=method, batch_size=n).values for n in (1, 5, 24)}
        for size in (1, 5):
            assert float((found[size] - found[24]).norm() / found[24].norm()) < 1e-5
    after = trainer.lightning_module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("write", [in_place, through_data, rebound_data], ids=lambda write: write.__name__)
def test_a_state_that_leaves_parameters_out_has_them_back_all_the_same(write):
    module = Writes(write)
    module.net[0].reset_parameters()  # else there is nothing to follow
    before = [p.detach().clone() for p in module.parameters()]
    space = Workspace(module, find_blocks(module, [list(module.net.parameters())]).blocks, Objective(module))
    with space.at({}):
        calibrate(space, Examples(classes(), 8), 8)
        assert not torch.equal(module.teacher[0].weight, before[4])
    assert all(map(torch.equal, module.parameters(), before))


def test_every_batch_draws_its_own_noise(tmp_path):
    """A generator of the module's own is not turned back between batches, only after the pass."""
    module = Classifier(mlp())
    module.generator = torch.Generator().manual_seed(1)
    drawn = []
    module.loss = lambda outputs, targets: F.cross_entropy(outputs, targets) * (1 + draw())

    def draw():
        drawn.append(float(torch.rand((), generator=module.generator)))
        return 0.1 * drawn[-1]

    trainer = fitted(tmp_path, module)
    trainer.attribute(QUERY, method="grad-dot")
    drawn.clear()
    before = module.generator.get_state()
    trainer.attribute(QUERY, method="grad-dot", batch_size=4)
    assert len(set(drawn[1:])) > 4  # the query's pass, and then 6 batches
    assert torch.equal(module.generator.get_state(), before)


# ---------------------------------------------------------------- other processes


@pytest.fixture
def _group():
    before = dict(os.environ)  # where Lightning names the rank and the port
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()


def described(gathered):
    return [(x.shape, x.dtype, x.requires_grad, x.tolist()) for x in gathered]


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
@pytest.mark.parametrize("sync_grads", [False, True])
def test_a_rank_gathers_what_lightning_gives_where_it_is_alone(tmp_path, strategy, sync_grads):
    trainer = fitted(tmp_path, strategy=strategy, devices=1)
    module = trainer.lightning_module
    values = {"a": module.net(classes().tensors[0]), "b": [2.5, torch.arange(3)]}
    theirs = module.all_gather(values, sync_grads=sync_grads)
    assert theirs["a"].dim() == (3 if strategy == "ddp" else 2)
    with undisturbed(module):
        ours = module.all_gather(values, sync_grads=sync_grads)
    assert described([ours["a"], *ours["b"]]) == described([theirs["a"], *theirs["b"]])
    assert "all_gather" not in vars(module)


class Gathers(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", self.all_gather(loss).mean())
        return loss


def test_no_pass_waits_for_another_rank(tmp_path, monkeypatch):
    trainer = fitted(tmp_path, Gathers(mlp()))

    def waits(self, *args, **options):
        raise AssertionError("another rank would be waited for")

    monkeypatch.setattr(L.LightningModule, "all_gather", waits)
    assert trainer.attribute(QUERY, method="influence").values.isfinite().all()
