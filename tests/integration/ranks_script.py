"""Trainings on one process and on two, run by ``test_ranks.py``: ``python ranks_script.py <folder>`` for two."""

import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_source import SourceCallback
from lightning_source.passes import factors


class Net(Classifier):
    """Its loss in one of several forms; trained in float64, so that runs differ only by what they compute."""

    def __init__(self, form: str = "mean") -> None:
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if form == "norm" else nn.Tanh(), nn.Linear(5, 3))
        super().__init__(net.double())
        self.form = form

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs.double()), targets, reduction="sum" if self.form == "sum" else "mean")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.form == "adam":
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.02 if self.form == "sum" else 0.2, momentum=0.5)


class Copies(L.Callback):
    """What a kill in the middle of training would leave: the run's directory as it was after step 7."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == 7 and not self.target.exists():
            shutil.copytree(self.source, self.target)


class Centred(Classifier):
    """Its outputs are taken from their running mean over all ranks (DINO's centre)."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.register_buffer("centre", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.net(batch[0])
        loss = self.loss(outputs * self.centre.exp(), batch[1])
        self.centre = 0.5 * self.centre + 0.5 * self.all_gather(outputs).flatten(0, 1).mean(0)
        self.log("loss", self.all_gather(loss).mean())
        return loss


def two_ranks() -> dict[str, Any]:
    """A rank that waits in vain gives up after the time, so that a failed test leaves no process behind."""
    return {"strategy": DDPStrategy(timeout=timedelta(seconds=60)), "devices": 2}


def train_all(folder: Path, devices: int) -> None:
    """Recorded trainings of each form in the working directory, which is ``folder``, and their scores."""
    for form in ("mean", "sum", "adam", "norm", "without"):
        torch.manual_seed(3)
        module = Net("mean" if form == "without" else form)
        source = SourceCallback(form, segments=2, snapshots_per_segment=2, factor_examples=20, keep="covariances")
        callbacks = [] if form == "without" else [source]
        if form == "mean":
            saves = ModelCheckpoint(folder / "ckpt", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
            callbacks += [saves, Copies(folder / form, folder / "killed")]
        trainer = quiet_trainer(
            folder,
            *callbacks,
            gradient_clip_val=0.3,
            max_epochs=3,
            use_distributed_sampler=False,
            enable_checkpointing=form == "mean",
            **(two_ranks() if devices == 2 else {"accumulate_grad_batches": 2}),
        )
        # Together the batches of two ranks hold what two accumulated batches of the single process hold.
        sampler = DistributedSampler(classes(), devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        trainer.fit(module, DataLoader(classes(), 4, sampler=sampler))
        found = {f"weight/{name}": p.detach().clone() for name, p in module.named_parameters()}
        if form != "without":
            for method in ("source", "influence", "tracin", "grad-cos"):
                found[method] = trainer.attribute(QUERY, method=method).values
            found["layers"] = trainer.attribute(QUERY, per_layer=True).by_layer
            found["earlier"] = trainer.attribute(QUERY, at=0.5).values
            with source.scorer(trainer) as scorer:
                found["self"] = scorer.self_influence()
        save_file(found, folder / f"{form}-{trainer.global_rank}.safetensors")


def gather(folder: Path) -> None:
    """Scores of unequal numbers of batches under a step that gathers, and then a pass that fails on one rank."""
    torch.manual_seed(3)
    source = SourceCallback(str(folder / "gathers"), factor_examples=20)
    trainer = quiet_trainer(folder, source, max_epochs=1, **two_ranks())
    trainer.fit(Centred(), DataLoader(classes(20), 4))
    # Batches of 8 of 20 examples: rank 0 has two, rank 1 has one.
    scores = trainer.attribute([x[:3] for x in QUERY], method="influence", batch_size=8).values
    error = "none"
    if trainer.global_rank == 1:
        factors.eigenbasis = fails
    try:
        trainer.attribute(QUERY, method="fast-source")
    except torch.linalg.LinAlgError as raised:
        error = str(raised)
    save_file({"scores": scores}, folder / f"gathers-{trainer.global_rank}.safetensors", {"error": error})


def fails(*args: Any, **options: Any) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.chdir(sys.argv[1])
    train_all(Path(sys.argv[1]), 2)
    gather(Path(sys.argv[1]))
    # Gloo's threads may outlive the interpreter, which then aborts: everything is on disk, so nothing is lost.
    dist.barrier()
    os._exit(0)
