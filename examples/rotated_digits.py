"""Which digits of the first stage are still in the model after the second? Two stages of training, one question.

    python examples/rotated_digits.py

Stage 1 learns upright digits, stage 2 goes on with digits turned by 45 degrees. The final model's answers to upright
digits are attributed to stage 1, by SOURCE, which carries the question back through stage 2, and by the influence
function, which looks at the final model alone. The last lines take away what each of them named, and train again.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import InfluenceScores, SourceCallback

FIRST, SECOND, QUERIES, REMOVED, RETRAININGS, BATCH = 640, 640, 100, 100, 3, 32
EPOCHS = (20, 10)


class DigitClassifier(L.LightningModule):
    """The user's module: nothing in it knows about attribution or stages."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Digits ``[N, 64]`` turned about their centre."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def train(stages: Sequence[TensorDataset], source: SourceCallback | None = None) -> L.Trainer:
    """One ``fit`` for each stage; with a callback, the last Trainer answers questions about all of them."""
    model = DigitClassifier()
    for name, data, epochs in zip(("upright", "turned"), stages, EPOCHS, strict=True):
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[source.stage(name)] if source else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(model, DataLoader(data, BATCH, shuffle=True, drop_last=True))
    return trainer


@torch.no_grad()
def margin(model: L.LightningModule, query: list[Tensor]) -> float:
    """Mean of ``log p/(1-p)`` of the true classes."""
    logits, labels = model.net(query[0]), query[1].unsqueeze(1)
    rest = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return float((logits.gather(1, labels).squeeze(1) - rest).mean())


def show(title: str, scores: InfluenceScores, given: Tensor, asked: Tensor) -> None:
    """What helped a few queries."""
    values, ids = scores.proponents(5)
    print(f"\n{title}")
    for q in range(4):
        listed = ", ".join(f"#{n} (a {given[n]}) {v:+.3f}" for v, n in zip(values[q].tolist(), ids[q], strict=True))
        print(f"  query {q}, a {asked[q]}, was helped by {listed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retrainings", type=int, default=RETRAININGS, help="trainings averaged for each removal")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    raw = load_digits()
    images, labels = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    upright, turned, held = order[: FIRST + SECOND + QUERIES].split([FIRST, SECOND, QUERIES])
    first = TensorDataset(images[upright], labels[upright])
    second = TensorDataset(rotated(images[turned], 45.0), labels[turned])
    query = [images[held], labels[held]]

    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        trainer = train([first, second], SourceCallback(directory + "/run"))
        found = {
            "SOURCE": trainer.attribute(query, stage="upright", measurement="margin"),
            "influence function": trainer.attribute(query, stage="upright", measurement="margin", method="influence"),
        }
    print(found["SOURCE"].metadata["sign"])
    print(f"\n{QUERIES} upright digits are asked about; f = log p/(1-p) of the true class after both stages.")
    for name, scores in found.items():
        show(f"{name}, upright digits of stage 1:", scores, labels[upright], query[1])

    print(f"\nTraining again without {REMOVED} of the {FIRST} upright digits, means of {arguments.retrainings}:")
    total = {name: scores.values.mean(0) for name, scores in found.items()}
    chosen = {name: values.topk(REMOVED, largest=False).indices for name, values in total.items()}
    chosen["chance"] = torch.randperm(FIRST, generator=torch.Generator().manual_seed(1))[:REMOVED]
    chosen["nothing"] = chosen["chance"][:0]
    after = {}
    for name, ids in chosen.items():
        kept = torch.ones(FIRST, dtype=torch.bool)
        kept[ids] = False
        results = []
        for seed in range(arguments.retrainings):
            L.seed_everything(seed, verbose=False)
            part = TensorDataset(*(x[kept] for x in first.tensors))
            results.append(margin(train([part, second]).lightning_module, query))
        after[name] = sum(results) / len(results)
    for name in ("SOURCE", "influence function", "chance"):
        predicted = f", {name} predicted {float(total[name][chosen[name]].sum()):+.2f}" if name in total else ""
        print(f"  chosen by {name}: the mean margin changes by {after[name] - after['nothing']:+.2f}{predicted}")


if __name__ == "__main__":
    main()
