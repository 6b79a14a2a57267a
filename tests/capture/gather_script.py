"""Training with ``self.all_gather`` on two processes: ``python gather_script.py <folder>``."""

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from helpers import Classifier, classes, mlp, quiet_trainer
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_source import SourceCallback
from lightning_source.passes import factors

QUERY = [x[:3] for x in classes(8, seed=2).tensors]


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


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    source = SourceCallback(str(folder / "run"), factor_examples=20)
    # A rank that waits in vain gives up after this, so that a failed test leaves no process behind.
    strategy = DDPStrategy(timeout=timedelta(seconds=60))
    trainer = quiet_trainer(folder, source, strategy=strategy, devices=2, max_epochs=1)
    trainer.fit(Centred(), DataLoader(classes(20), 4))
    # Batches of 8 of 20 examples: rank 0 has two, rank 1 has one.
    found = trainer.attribute(QUERY, method="influence", batch_size=8).values
    error = "none"
    if trainer.global_rank == 1:
        factors.eigenbasis = fails
    try:
        trainer.attribute(QUERY, snapshots="point")
    except torch.linalg.LinAlgError as raised:
        error = str(raised)
    save_file({"scores": found}, folder / f"{trainer.global_rank}.safetensors", {"error": error})


def fails(*args: Any, **options: Any) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
