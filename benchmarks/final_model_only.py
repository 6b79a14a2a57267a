"""Final-model-only study: cosine of estimators to further training, over the amount of further training.

    python benchmarks/final_model_only.py --data DIR --out benchmarks/results/final_model_only.json
    python benchmarks/final_model_only.py --quick

The setting is that of Wei et al. (arXiv 2412.03906) and its released code: an MLP of two layers of 128 is trained for
1,000 epochs of SGD at 0.3 (Energy, Concrete), then further for 500 epochs at 0.03 with and without single examples, in
batches of 128. Shrunk from it: 30 left-out examples and 2 seeds for 100 and 100 (removal by downweighting, the default
here, is far less noisy than by shift, theirs), and 200 epochs on all tasks but Energy. The regression tasks read
``DIR/{energy,concrete}/data.csv.gz`` (UCI; the last column is the target); the classification task is
scikit-learn's breast cancer data. ``--quick`` runs that one on a small network within half a minute.

Estimators see the final model alone. "horizon" marks those that are told how far training goes on: SOURCE with one
segment and the Λ of the further training, and influence with damping 1/Λ. Two kinds of rows tell errors apart: "exact"
replaces EK-FAC by the dense Gauss-Newton matrix, and "recorded" is SOURCE on the snapshots of one further training (on
all examples, with a seed of its own), so no final-model-only method: it lacks only the assumption that gradients stay
what they are at the final model. "energy-annealed" is Energy with a final model that was trained on for 500 epochs at
the rate of the further training, so that further training is no annealing.
"""

import argparse
import gzip
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer, attribute
from lightning_source.estimators import estimator_for
from lightning_source.evaluation.cosine import FinalModelCosine
from lightning_source.evaluation.curves import CosineCurve, curve_rows, plot_curves
from lightning_source.evaluation.further_training import FurtherTraining, further_training
from lightning_source.unroll import damped_inverse, segment_response

EPOCHS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 125, 200, 300, 500)
# Label -> (method, what it is told of the horizon). Methods that this version does not know are skipped with a note.
METHODS: dict[str, tuple[str, str | None]] = {
    "grad-dot": ("grad-dot", None),
    "grad-cos": ("grad-cos", None),
    "influence (EK-FAC)": ("influence", None),
    "influence (EK-FAC), horizon": ("influence", "damping"),
    "source L=1, horizon": ("source", "rate"),
    "influence-cg": ("influence-cg", None),
    "influence-lissa": ("influence-lissa", None),
    "datainf": ("datainf", None),
    "astra": ("astra", None),
    "trak": ("trak", None),
}
# Printed by the released notebooks (SGD, Eq. 13, 100 seeds, 100 left-out examples, removal by shift): epoch -> cosine.
RELEASED: dict[str, dict[str, dict[int, float]]] = {
    "energy": {
        "grad-dot": {1: 0.705, 5: 0.551, 500: 0.163},
        "grad-cos": {1: 0.503, 500: 0.106},
        "datainf": {1: 0.702, 5: 0.606, 500: 0.204},
        "influence-cg": {1: 0.141, 5: 0.162, 500: 0.356},
        "influence-lissa": {1: 0.155, 500: 0.378},
        "influence (EK-FAC)": {1: 0.253, 5: 0.264, 500: 0.288},
        "trak": {1: 0.0, 500: 0.007},
    }
}


@dataclass(frozen=True)
class Task:
    """A final model and how its training goes on."""

    name: str
    rate: float  # of the final model's training
    epochs: int
    further_rate: float
    further_epochs: int
    hidden: int = 128
    annealed: int = 0  # epochs at the further rate that the final model's training ends with
    batch_size: int = 128
    dtype: torch.dtype = torch.float32


TASKS = {
    "energy": Task("energy", 0.3, 1000, 0.03, 500),
    "energy-annealed": Task("energy-annealed", 0.3, 1000, 0.03, 200, annealed=500),
    "concrete": Task("concrete", 0.3, 1000, 0.03, 200),
    # In float32 the change of a well classified query's loss on leaving one example out drowns in rounding.
    "cancer": Task("cancer", 0.1, 100, 0.01, 200, dtype=torch.float64),
}


class Mlp(L.LightningModule):
    """Two hidden layers under squared error, or cross entropy where there are classes."""

    def __init__(self, inputs: int, outputs: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        if targets.is_floating_point():
            return F.mse_loss(self(inputs).squeeze(1), targets)
        return F.cross_entropy(self(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def load(task: Task, data: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test examples, one tenth of all, standardised by the training examples."""
    if task.name == "cancer":
        from sklearn.datasets import load_breast_cancer

        inputs, targets = load_breast_cancer(return_X_y=True)
    else:
        if data is None:
            raise SystemExit(f"--data is needed for {task.name}")
        with gzip.open(data / task.name.split("-")[0] / "data.csv.gz", "rt") as file:
            table = np.loadtxt(file, delimiter=",")
        inputs, targets = table[:, :-1], table[:, -1]
    order = np.random.default_rng(0).permutation(len(inputs))
    held = -(-len(inputs) // 10)
    test, train = order[:held], order[held:]
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    if targets.dtype.kind == "f":
        targets = ((targets - targets[train].mean()) / targets[train].std()).astype(np.float32)
    return tuple(
        TensorDataset(torch.tensor(inputs[ids], dtype=torch.float32), torch.tensor(targets[ids]))
        for ids in (train, test)
    )  # type: ignore[return-value]


def final_model(task: Task, train: TensorDataset, directory: Path) -> Mlp:
    """The final model, trained without any callback of ours; kept as a checkpoint in ``directory``."""
    torch.manual_seed(0)
    classes = train.tensors[1]
    outputs = 1 if classes.is_floating_point() else int(classes.max()) + 1
    model = Mlp(train.tensors[0].shape[1], outputs, task.hidden, task.rate)
    path = directory / f"{task.name}-final.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    fit(model, train, task, task.epochs)
    if task.annealed:
        model.rate = task.further_rate
        fit(model, train, task, task.annealed)
    save_file(model.state_dict(), path)
    return model


def fit(model: Mlp, train: TensorDataset, task: Task, epochs: int, *callbacks: L.Callback) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="64-true" if task.dtype == torch.float64 else "32-true",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, task.batch_size, shuffle=True))
    return trainer


def estimate(
    model: Mlp, train: TensorDataset, test: TensorDataset, task: Task, result: FurtherTraining, epochs: list[int]
) -> dict[str, Tensor]:
    """Scores ``[Q, M]``, or ``[E, Q, M]`` where the horizon is told."""
    scorer = SourceScorer.from_model(
        model, train, rate=1.0, batch_size=task.batch_size, factor_examples=None, label_samples=16
    )
    rates = [float(result.rates[epoch - 1, 0]) for epoch in epochs]
    ids = result.leave_out
    found = {}
    for label, (method, horizon) in METHODS.items():
        try:
            estimator_for(method, {})
        except MisconfigurationException:
            print(f"  {label}: skipped, this version has no method {method!r}")
            continue
        if horizon == "rate":
            values = [scorer.set_rate(rate).score(test, method=method, train_ids=ids).values for rate in rates]
        elif horizon == "damping":
            values = [scorer.score(test, method=method, train_ids=ids, damping=1 / rate).values for rate in rates]
        else:
            values = [scorer.score(test, method=method, train_ids=ids).values]
        found[label] = torch.stack(values) if horizon else values[0]
    found |= exact(model, train, test, ids, rates)
    return found | {"source L=1, recorded": recorded(model, train, test, task, ids, epochs)}


def recorded(
    model: Mlp, train: TensorDataset, test: TensorDataset, task: Task, ids: list[int], epochs: list[int]
) -> Tensor:
    """SOURCE with six averaged snapshots of one further training on all examples, one run for each horizon."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for count in epochs:
            torch.manual_seed(1000)
            copy = deepcopy(model)
            copy.rate = task.further_rate
            callback = SourceCallback(f"{directory}/{count}", factor_examples=None, label_samples=4)
            trainer = fit(copy, train, task, count, callback)
            found.append(attribute(trainer, test, train_ids=ids).values)
    return torch.stack(found)


def exact(
    model: Mlp, train: TensorDataset, test: TensorDataset, ids: list[int], rates: list[float]
) -> dict[str, Tensor]:
    """SOURCE L=1 and influence with damping 1/Λ on the dense Gauss-Newton matrix, for one output or two classes.

    The matrix is ``A Aᵀ`` with a column for each example, so its eigenvectors come from the ``[N, N]`` Gram matrix.
    """
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    squared = train.tensors[1].is_floating_point()

    def margin(values: dict[str, Tensor], row: Tensor) -> Tensor:
        output = functional_call(model, values, (row[None],))[0]
        return output[0] if squared else output[1] - output[0]

    def loss(values: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, values, (row[None],))
        return F.mse_loss(output[0, 0], target) if squared else F.cross_entropy(output[0], target)

    def flat(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        found = vmap(grad(function), in_dims=(None, *[0] * len(rows)))(parameters, *rows)
        return torch.cat([g.flatten(1) for g in found.values()], 1)

    inputs, targets = train.tensors[0].double(), train.tensors[1].double() if squared else train.tensors[1]
    asked = test.tensors[0].double(), test.tensors[1].double() if squared else test.tensors[1]
    outputs = vmap(margin, in_dims=(None, 0))(parameters, inputs)
    second = torch.full_like(outputs, 2.0) if squared else outputs.sigmoid() * (1 - outputs.sigmoid())
    columns = flat(margin, inputs) * (second / len(inputs)).sqrt()[:, None]
    values, vectors = torch.linalg.eigh(columns @ columns.T)
    kept = values > 1e-10 * values[-1]
    values, basis = values[kept], columns.T @ (vectors[:, kept] / values[kept].sqrt())
    queries, examples = flat(loss, *asked), flat(loss, inputs[ids], targets[ids])
    outside, inner = queries @ examples.T, ((queries @ basis), (examples @ basis))

    def scores(spectral: Callable[[Tensor], Tensor], at_zero: float) -> Tensor:
        return (at_zero * outside + inner[0] * (spectral(values) - at_zero) @ inner[1].T) / len(inputs)

    return {
        "source L=1, horizon, exact": torch.stack([scores(lambda s, r=r: segment_response(s, r), r) for r in rates]),
        "influence, horizon, exact": torch.stack([scores(lambda s, r=r: damped_inverse(s, 1 / r), r) for r in rates]),
    }


def progress(what: str, done: int, total: int) -> None:
    print(f"  {what}: {done} of {total} runs", end="\r", flush=True)


def run(task: Task, arguments: argparse.Namespace, work: Path) -> dict:
    train, test = load(task, arguments.data)
    model = final_model(task, train, work).to(task.dtype)
    points = torch.linspace(0, len(train) - 1, arguments.points).round().long().tolist()
    epochs = [epoch for epoch in EPOCHS if epoch <= task.further_epochs]
    scores = None
    found: dict = {
        "train": len(train),
        "test": len(test),
        "left_out": len(points),
        "recipe": vars(task) | {"dtype": str(task.dtype)},
        "removal": {},
    }
    for removal in arguments.removal:
        result = further_training(
            model,
            train,
            test,
            leave_out=points,
            epochs=task.further_epochs,
            seeds=arguments.seeds,
            batch_size=task.batch_size,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=task.further_rate),
            removal=removal,
            dirpath=work / f"{task.name}-{removal}",
            progress=partial(progress, f"{task.name}, {removal}"),
        )
        print(
            f"\n{task.name}, {removal}: loss {float(result.start.mean()):.4f} at the final model,"
            f" {float(result.full[-1].mean()):.4f} after further training"
        )
        if scores is None:
            scores = estimate(model, train, test, task, result, epochs)
        found["removal"][removal] = summary(task, result, scores, epochs, arguments.plots)
    return found


def summary(
    task: Task, result: FurtherTraining, scores: dict[str, Tensor], epochs: list[int], plots: Path | None
) -> dict:
    """Curves by adjustment, the random control, what one seed gives, and the released numbers beside ours."""
    found: dict = {
        "loss": {"final": round(float(result.start.mean()), 6), "further": round(float(result.full[-1].mean()), 6)},
        "distance": [round(float(result.full_distances[e - 1].mean()), 4) for e in epochs],
        "rate": [round(float(result.rates[e - 1, 0]), 4) for e in epochs],
    }
    for adjustment in (17, 13):
        curves: dict[str, CosineCurve] = {
            label: result.cosine(values, adjustment, epochs=epochs) for label, values in scores.items()
        }
        metric = FinalModelCosine()
        metric.update(result.gold(adjustment)[-1], torch.ones(len(result.start), len(result.leave_out)))
        control = metric.compute()
        half = len(result.seeds) // 2
        split = None
        if half:
            other = replace(result, left_out=result.left_out[..., half:], full=result.full[..., half:])
            split = result.cosine(other.gold(adjustment), adjustment, half).mean[[e - 1 for e in epochs]]
        found[f"adjustment {adjustment}"] = {
            "curves": curve_rows(curves),
            "random": [round(float(control["control"]), 4), round(float(control["control_sem"]), 4)],
            "one half of the seeds to the other": None if split is None else [round(float(x), 4) for x in split],
        }
        report(task, curves, epochs, f"adjustment ({adjustment})", split)
        if plots:
            means, errors = ({label: getattr(c, part) for label, c in curves.items()} for part in ("mean", "sem"))
            figure = plot_curves(epochs, means, errors).get_figure()
            figure.savefig(plots / f"final_model_only_{task.name}_{adjustment}.png", dpi=150)
    released = RELEASED.get(task.name, {})
    if released:
        print("\nreleased (100 seeds, 100 examples, shift, adjustment (13)):")
        for label, values in released.items():
            print(f"  {label}: " + ", ".join(f"{value:.3f} at epoch {epoch}" for epoch, value in values.items()))
        found["released"] = released
    return found


def report(task: Task, curves: dict[str, CosineCurve], epochs: list[int], title: str, split: Tensor | None) -> None:
    print(f"\n{task.name}, cosine to further training, {title}\n| epochs | " + " | ".join(map(str, epochs)) + " |")
    print("|" + "---|" * (len(epochs) + 1))
    for label, curve in curves.items():
        print(f"| {label} | " + " | ".join(f"{float(x):.3f}" for x in curve.mean) + " |")
    if split is not None:
        print("| (one half of the seeds to the other) | " + " | ".join(f"{float(x):.3f}" for x in split) + " |")


def _command(arguments: argparse.Namespace) -> str:
    """The arguments that figures depend on, in words that hold on any machine."""
    chosen = {name: value for name, value in vars(arguments).items() if value and name not in ("work", "out", "plots")}
    if "data" in chosen:
        chosen["data"] = "DIR"
    return " ".join(
        f"--{name}" + ("" if value is True else f" {' '.join(value) if isinstance(value, list) else value}")
        for name, value in chosen.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with energy/ and concrete/")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--removal", nargs="*", default=["downweight"], choices=["downweight", "mask", "shift"])
    parser.add_argument("--points", type=int, default=30, help="left-out examples, evenly spread (paper: 100)")
    parser.add_argument("--seeds", type=int, default=2, help="paper: 100, for a noisier removal")
    parser.add_argument("--epochs", type=int, help="at most so many of further training")
    parser.add_argument("--work", type=Path, help="keeps models and finished runs, from which a killed study goes on")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--plots", type=Path, help="write figures into this folder (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="a small version of the classification task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks = {name: TASKS[name] for name in arguments.tasks}
    if arguments.epochs:
        tasks = {name: replace(t, further_epochs=min(t.further_epochs, arguments.epochs)) for name, t in tasks.items()}
    if arguments.quick:
        tasks = {"cancer": replace(TASKS["cancer"], epochs=20, further_epochs=20, hidden=16)}
        arguments.points, arguments.seeds = 12, 2
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = {name: run(task, arguments, work) for name, task in tasks.items()}
    if arguments.out:
        record = {
            "command": f"python benchmarks/final_model_only.py {_command(arguments)}",
            "seeds": arguments.seeds,
            "versions": {"torch": torch.__version__, "lightning": L.__version__},
            "tasks": results,
        }
        arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
