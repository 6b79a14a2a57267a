"""Under ``pytorch_lightning`` all works as under ``lightning.pytorch``, and neither is imported for the other."""

import importlib.util
import json
import pickle
import subprocess
import sys

import lightning as L
import pytest

from lightning_source import SourceCallback

# A module of a user who knows `pytorch_lightning` alone.
MODULE = """
import sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

generator = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(32, 4, generator=generator), torch.randint(0, 3, (32,), generator=generator))

class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(data, 8)
"""
SCRIPT = """
from lightning_source import SourceCallback, SourceScorer
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[SourceCallback(dirpath=sys.argv[1])],
)
trainer.fit(Classifier())
here = trainer.attribute(data[:2]).values
there = SourceScorer.from_run(sys.argv[1], Classifier()).score(data[:2], data).values
assert torch.equal(here, there)
assert "lightning" not in sys.modules
"""


def test_the_other_name(tmp_path):
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    done = subprocess.run(
        [sys.executable, "-c", MODULE + SCRIPT, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_this_name_does_not_import_the_other():
    script = "import lightning_source, sys; assert 'pytorch_lightning' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_callbacks_are_of_lightnings_class_and_travel(tmp_path):
    source = SourceCallback(dirpath=str(tmp_path))
    assert isinstance(source, L.Callback)
    copy = pickle.loads(pickle.dumps(source))
    assert type(copy) is type(source)
    assert copy.state_key == source.state_key


CLI_SCRIPT = """
from lightning_source.cli import SourceCLI
place = sys.argv.pop()
settings = {"accelerator": "cpu", "max_epochs": 1, "logger": "false", "enable_checkpointing": "false"}
settings |= {"enable_progress_bar": "false", "default_root_dir": place}
settings |= {"callbacks": "lightning_source.SourceCallback", "callbacks.dirpath": place + "/run"}
arguments = [f"--trainer.{name}={value}" for name, value in settings.items()]
SourceCLI(Classifier, args=["fit", *arguments])
print("{}")  # what follows is the command's output alone
SourceCLI(Classifier, args=["attribute", "--query=train", "--json", *arguments, "--out=" + place + "/scores"])
assert "lightning" not in sys.modules
"""


def test_the_command_line_under_the_other_name(tmp_path):
    pytest.importorskip("jsonargparse")
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    done = subprocess.run([sys.executable, "-c", MODULE + CLI_SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("{}\n")[2])  # nothing else goes to the standard output
    assert (found["queries"], found["examples"]) == (32, 32)
