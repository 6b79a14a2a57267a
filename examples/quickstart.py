"""Which training digits made the model say that? Trains on scikit-learn's digits, then asks.

    python examples/quickstart.py

One in ten training labels is wrong on purpose: the last lines say how well self-influence finds them.
"""

import argparse
import logging
import os
import sys
import time
import warnings
import webbrowser
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from lightning_source import SourceCallback, SourceScorer, label_issues

TRAIN, NOISE = 1400, 0.1


class DigitClassifier(L.LightningModule):
    """The user's module: nothing in it knows about attribution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardised images, their labels, and the labels with errors planted among the training examples."""
    raw = load_digits()
    images, labels = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    images = (images - images[:TRAIN].mean()) / images[:TRAIN].std()
    generator = torch.Generator().manual_seed(1)
    planted = torch.rand(len(labels), generator=generator) < NOISE
    planted[TRAIN:] = False
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    return images, labels, torch.where(planted, (labels + shift) % 10, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dirpath", default="source-run", help="where the run is recorded")
    parser.add_argument("--report", default="report.html", help="where the page with the answers is written")
    shown = sys.stdout.isatty() and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    parser.add_argument("--open", action=argparse.BooleanOptionalAction, default=bool(shown), help="show the page")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    torch.set_num_threads(1)  # a network this small runs faster on one thread than on several
    L.seed_everything(0, verbose=False)
    images, labels, given = digits()
    train = TensorDataset(images[:TRAIN], given[:TRAIN])
    model = DigitClassifier()

    source = SourceCallback(dirpath=arguments.dirpath, overwrite=True)
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        callbacks=[source],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    start = time.perf_counter()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True, drop_last=True))
    seconds = time.perf_counter() - start
    training = seconds - sum(source.seconds.values())

    query = [images[TRAIN : TRAIN + 5], labels[TRAIN : TRAIN + 5]]
    scores = trainer.attribute(query, measurement="margin", segments=3, per_segment=True)

    with torch.no_grad():
        predictions = model.net(query[0]).argmax(1).tolist()

    print(scores.metadata["sign"])
    print("\nQueries are digits that the model never saw; f = log p/(1-p) of the true class.")
    shares = scores.segment_shares()
    proponents, opponents = scores.proponents(5), scores.opponents(5)
    for q in range(len(query[1])):
        print(f"\nquery {q}, a {query[1][q]}:")
        for title, (values, ids) in (("helped", proponents), ("harmed", opponents)):
            listed = ", ".join(
                f"#{n} labelled {given[n]}{' (planted)' if given[n] != labels[n] else ''} {v:+.3f}"
                for v, n in zip(values[q].tolist(), ids[q].tolist(), strict=True)
            )
            print(f"  {title}: {listed}")
        print("  share of the score by third of training:", ", ".join(f"{s:.0%}" for s in shares[:, q].tolist()))

    scorer = SourceScorer.from_run(arguments.dirpath, model)
    suspicion = scorer.self_influence(train)
    planted = (given != labels)[:TRAIN]
    found = planted[suspicion.topk(int(planted.sum())).indices].float().mean()
    auc = binary_auroc(suspicion, planted.long())
    print(f"\n{int(planted.sum())} of {TRAIN} training labels are wrong on purpose.")
    print(
        f"Self-influence finds them with AUC {auc:.3f}; {found:.0%} of as many top-ranked examples are planted errors."
    )
    issues = [issue for issue in label_issues(scorer, train, k=int(planted.sum())) if planted[issue.train]]
    right = sum(issue.suggested == labels[issue.train] for issue in issues) / len(issues)
    print(f"For {right:.0%} of these, the label that their opponents suggest is the true one.")
    print(
        f"\nTraining took {training:.1f} s, recording {source.seconds['recording']:.2f} s"
        f" ({source.seconds['recording'] / training:.0%}), factors {source.seconds['factors']:.2f} s"
        f" ({source.seconds['factors'] / training:.0%})."
    )
    scores.report(
        arguments.report,
        train=train,
        query=query,
        render=lambda example: example[0].reshape(8, 8),
        self_influence=suspicion,
        predictions=predictions,
        title="Which digits made the model say that?",
    )
    print(f"\nThe same with pictures: {arguments.report}")
    if arguments.open:
        webbrowser.open(Path(arguments.report).resolve().as_uri())


if __name__ == "__main__":
    main()
