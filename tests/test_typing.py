"""Type checkers know ``attribute`` of a Trainer that is told to have it, and it is the callback's at run time."""

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import QUERY, Classifier, classes, mlp
from torch.utils.data import DataLoader

import lightning_source
from lightning_source import AttributingTrainer, AttributionTrainerMixin, SourceCallback, attribute

TYPED = """
from typing import cast

import lightning as L
from lightning_source import AttributingTrainer, AttributionTrainerMixin, InfluenceScores, SourceCallback, attribute


class MyTrainer(AttributionTrainerMixin, L.Trainer): ...


def ask(trainer: AttributingTrainer) -> InfluenceScores:
    return trainer.attribute(0)


mine, plain = MyTrainer(max_epochs=1, callbacks=[SourceCallback()]), L.Trainer()
reveal_type(mine.attribute(0, method="influence", stage=0, weights="module", damping=0.1))
reveal_type(cast(AttributingTrainer, plain).attribute(0))
reveal_type(attribute(plain, 0))
reveal_type(mine.max_epochs)
ask(mine)
plain.attribute(0)  # wrong: attr-defined
mine.attribute(0, stage=0.5)  # wrong: arg-type
cast(AttributingTrainer, plain).attribute(0, weights="best")  # wrong: arg-type
ask(plain)  # wrong: arg-type
"""

# What neither call nor Trainer needs is not looked into, which takes a fifth of the time.
CONFIG = """
[mypy]
ignore_missing_imports = true
follow_imports = silent

[mypy-torch.*,torchmetrics.*,safetensors.*,tqdm.*,numpy.*,yaml.*,fsspec.*,lightning.fabric.*]
follow_imports = skip

[mypy-lightning.*]
implicit_reexport = true
"""


class MyTrainer(AttributionTrainerMixin, L.Trainer):
    pass


def test_a_type_checker_knows_the_call(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "typed.py").write_text(TYPED)
    root = Path(lightning_source.__file__).parents[1]
    (tmp_path / "mypy.ini").write_text(CONFIG)
    flags = ["--no-error-summary", f"--config-file={tmp_path / 'mypy.ini'}", "--cache-dir=.mypy_cache/test_typing"]
    command = [sys.executable, "-m", "mypy", *flags, str(tmp_path / "typed.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    said = [re.fullmatch(r".*typed\.py:(\d+): (\w+): (.*)", line) for line in done.stdout.splitlines()]
    assert all(said), done.stdout + done.stderr
    lines = TYPED.splitlines()
    revealed = [match[3] for match in said if match[2] == "note" and "Revealed" in match[3]]
    assert [re.search(r'"(.*)"', text)[1].rpartition(".")[2] for text in revealed] == [
        "InfluenceScores",
        "InfluenceScores",
        "InfluenceScores",
        "int | None",
    ]
    wrong = {int(match[1]): re.search(r"\[([\w-]+)\]$", match[3])[1] for match in said if match[2] == "error"}
    assert wrong == {n: text.partition("# wrong: ")[2] for n, text in enumerate(lines, 1) if "# wrong" in text}


def test_the_signatures_are_one():
    def parameters(function):
        return list(inspect.signature(function).parameters.values())[1:]

    for owner in (AttributingTrainer, AttributionTrainerMixin, SourceCallback):
        skipped = 1 if owner is SourceCallback else 0  # which takes the Trainer, too
        assert parameters(owner.attribute)[skipped:] == parameters(attribute)


def test_the_method_of_the_class_serves(tmp_path):
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    trainer = MyTrainer(
        callbacks=[SourceCallback(str(tmp_path / "run"))],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(Classifier(mlp()), DataLoader(classes(), 8))
    assert "attribute" not in vars(trainer)  # the callback bound nothing of its own
    scores = trainer.attribute(QUERY, measurement="margin", method="influence", damping=0.1)
    expected = attribute(trainer, QUERY, measurement="margin", method="influence", damping=0.1)
    assert torch.equal(scores.values, expected.values)
    assert scores.metadata["measurement"] == "margin"
    assert scores.metadata["options"] == {"damping": 0.1}
    assert pickle.loads(pickle.dumps(MyTrainer.attribute)) is MyTrainer.attribute


def test_without_the_callback_it_says_so():
    with pytest.raises(Exception, match="the Trainer has no SourceCallback"):
        MyTrainer(accelerator="cpu", logger=False).attribute(QUERY)
