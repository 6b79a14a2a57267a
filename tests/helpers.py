"""Small modules, data and trainers that the tests share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback


class Classifier(L.LightningModule):
    """Any network under cross entropy and SGD."""

    def __init__(
        self,
        net: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.loss = loss
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def mlp(inputs: int = 6, hidden: int = 5, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class AuxiliaryHead(nn.Module):
    """Gives a second output in train mode only, as Inception and segmentation networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.second = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.tanh(self.body(x))
        return [self.head(hidden), self.second(hidden)] if self.training else [self.head(hidden)]


def gradient_rows(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Gradients ``[N, scalars]`` of single examples' losses by autograd; 0 where a loss does not reach a parameter."""
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in whole]))
    return torch.stack(rows)


def classes(examples: int = 24, inputs: int = 6, count: int = 3, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(examples, inputs, generator=generator), torch.randint(count, (examples,), generator=generator)
    )


QUERY = [x[:4] for x in classes(8, seed=2).tensors]


def close(one: Tensor, other: Tensor, rtol: float = 1e-5) -> None:
    """Equal to ``rtol`` of the largest score: sums of float32 products in another order differ by about 1e-7 of it."""
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=rtol * float(other.abs().max()))


def quiet_trainer(tmp_path: Any, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | options))


def fitted(
    tmp_path: Any, module: L.LightningModule | None = None, data: Any = None, batch_size: int = 8, **options: Any
) -> L.Trainer:
    """A finished run in ``tmp_path / "run"``; SourceCallback's own options go there, others to the Trainer."""
    names = SourceCallback.__init__.__annotations__
    settings = {key: options.pop(key) for key in list(options) if key in names}
    callback = SourceCallback(**({"dirpath": str(tmp_path / "run")} | settings))
    trainer = quiet_trainer(tmp_path, callback, **options)
    loader = data if isinstance(data, DataLoader) else DataLoader(data or classes(), batch_size, shuffle=True)
    trainer.fit(module or Classifier(mlp()), loader)
    return trainer


def run_python(*arguments: object) -> None:
    """Another interpreter that finds the package and these helpers; as here, torch runs on one thread."""
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
