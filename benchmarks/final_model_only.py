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
segment and the Λ of the further training, and influence with damping 1/Λ. Further rows tell errors apart. "exact"
replaces EK-FAC by the dense Gauss-Newton matrix, "exact by layer" by its diagonal blocks; "eigenvalues scaled"
multiplies EK-FAC's eigenvalues, which have the right sum but are spread over more directions, by one number that
corrects tr H² / tr H.
"recorded" is SOURCE on the snapshots of one further training (on all examples, with a seed of its own), so no
final-model-only method: it does without the assumption that gradients stay what they are at the final model.
"energy-annealed" is Energy with a final model that was trained on for 500 epochs at the rate of the further training,
so that further training is no annealing.
"""

import argparse
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from harness import quiet, rounded, versions, write
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from task_data import read_table
from task_networks import mlp
from tasks import quiet_trainer
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer, attribute
from lightning_source.curvature.unroll import damped_inverse, segment_response
from lightning_source.estimators import estimator_for
from lightning_source.evaluation.cosine import FinalModelCosine
from lightning_source.evaluation.curves import CosineCurve
from lightning_source.evaluation.further_training import FurtherTraining, further_training
from lightning_source.plots import plot_further_training

EPOCHS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 125, 200, 300, 500)
# Label -> (method, what it is told of the horizon). Methods that this version does not know are skipped with a note.
METHODS: dict[str, tuple[str, str | None]] = {
    "grad-dot": ("grad-dot", None),
    "grad-cos": ("grad-cos", None),
    "influence (EK-FAC)": ("influence", None),
    "influence (EK-FAC), horizon": ("influence", "damping"),
    "source L=1, horizon": ("source", "rate"),
    "influence-cg": ("influence-cg", None),
    "influence-cg, horizon": ("influence-cg", "damping"),
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
        self.net = mlp(inputs, hidden, hidden, outputs)

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
        table = read_table(data / task.name.split("-")[0])
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
    trainer = quiet_trainer(epochs, *callbacks, precision="64-true" if task.dtype == torch.float64 else "32-true")
    trainer.fit(model, DataLoader(train, task.batch_size, shuffle=True))
    return trainer


def estimate(
    model: Mlp, train: TensorDataset, test: TensorDataset, task: Task, result: FurtherTraining, epochs: list[int]
) -> tuple[dict[str, Tensor], float]:
    """Scores ``[Q, M]``, or ``[E, Q, M]`` where the horizon is told, and how much smaller EK-FAC's eigenvalues are."""
    scorer = SourceScorer.from_model(
        model, train, rate=1.0, batch_size=task.batch_size, factor_examples=None, label_samples=16
    )
    rates = [float(result.rates[epoch - 1, 0]) for epoch in epochs]
    ids = result.leave_out

    def source(factor: float) -> Tensor:
        return torch.stack([scorer.set_rate(factor * r).score(test, train_ids=ids).values / factor for r in rates])

    found = {}
    for label, (method, horizon) in METHODS.items():
        try:
            estimator_for(method, {})
        except MisconfigurationException:
            print(f"  {label}: skipped, this version has no method {method!r}")
            continue
        if horizon == "rate":
            found[label] = source(1.0)
        elif horizon == "damping":
            values = [scorer.score(test, method=method, train_ids=ids, damping=1 / rate).values for rate in rates]
            found[label] = torch.stack(values)
        else:
            found[label] = scorer.score(test, method=method, train_ids=ids).values
    dense = Dense(model, train, test, ids)
    factors = torch.cat([one.eigenvalues.flatten() for one in scorer.run.final_factors().values()])
    ratio = mean_eigenvalue(dense.whole[0][0]) / mean_eigenvalue(factors)
    # F_r of c·σ at Λ is that of σ at c·Λ, over c.
    found["source L=1, horizon, eigenvalues scaled"] = source(ratio)
    found |= dense.rows(rates)
    return found | {"source L=1, recorded": recorded(model, train, test, task, ids, epochs)}, ratio


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


class Dense:
    """The Gauss-Newton matrix of a network with one output or two classes, whole or in diagonal blocks.

    It is ``A Aᵀ`` with a column for each example, so its eigenvectors come from the ``[N, N]`` Gram matrix.
    """

    def __init__(self, model: Mlp, train: TensorDataset, test: TensorDataset, ids: list[int]) -> None:
        parameters = {name: p.detach().double() for name, p in model.named_parameters()}
        squared = train.tensors[1].is_floating_point()

        def margin(values: dict[str, Tensor], row: Tensor) -> Tensor:
            output = functional_call(model, values, (row[None],))[0]
            return output[0] if squared else output[1] - output[0]

        def loss(values: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
            output = functional_call(model, values, (row[None],))
            return F.mse_loss(output[0, 0], target) if squared else F.cross_entropy(output[0], target)

        def gradients(function: Callable[..., Tensor], *rows: Tensor) -> dict[str, Tensor]:
            found = vmap(grad(function), in_dims=(None, *[0] * len(rows)))(parameters, *rows)
            return {name: g.flatten(1) for name, g in found.items()}

        (inputs, targets), asked = (
            [x.double() if x.is_floating_point() else x for x in data.tensors] for data in (train, test)
        )
        outputs = vmap(margin, in_dims=(None, 0))(parameters, inputs)
        second = torch.full_like(outputs, 2.0) if squared else outputs.sigmoid() * (1 - outputs.sigmoid())
        self.count = len(inputs)
        self.scale = (second / self.count).sqrt()[:, None]
        self.columns = gradients(margin, inputs)
        self.queries, self.examples = gradients(loss, *asked), gradients(loss, inputs[ids], targets[ids])
        self.layers = sorted({name.rpartition(".")[0] for name in parameters})
        self.whole = [self._solve("")]
        self.blocks = [self._solve(layer + ".") for layer in self.layers]

    def _solve(self, prefix: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues, and queries and examples in the eigenbasis and as inner products."""
        columns, queries, examples = (
            torch.cat([g for name, g in found.items() if name.startswith(prefix)], 1)
            for found in (self.columns, self.queries, self.examples)
        )
        columns = columns * self.scale
        values, vectors = torch.linalg.eigh(columns @ columns.T)
        kept = values > 1e-10 * values[-1]
        basis = columns.T @ (vectors[:, kept] / values[kept].sqrt())
        return values[kept], queries @ basis, examples @ basis, queries @ examples.T

    def scores(self, parts: list[tuple[Tensor, ...]], spectral: Callable[[Tensor], Tensor], at_zero: float) -> Tensor:
        """``(1/N) ∇fᵀ φ(H) g`` for a spectral function ``φ``."""
        found = [
            at_zero * products + (queries * (spectral(values) - at_zero)) @ examples.T
            for values, queries, examples, products in parts
        ]
        return torch.stack(found).sum(0) / self.count

    def rows(self, rates: list[float]) -> dict[str, Tensor]:
        """SOURCE L=1 and influence with damping 1/Λ."""

        def source(parts: list[tuple[Tensor, ...]]) -> Tensor:
            return torch.stack([self.scores(parts, partial(segment_response, rate=r), r) for r in rates])

        influence = [self.scores(self.whole, partial(damped_inverse, damping=1 / r), r) for r in rates]
        return {
            "source L=1, horizon, exact": source(self.whole),
            "source L=1, horizon, exact by layer": source(self.blocks),
            "influence, horizon, exact": torch.stack(influence),
        }


def mean_eigenvalue(values: Tensor) -> float:
    """The mean that weights each eigenvalue by itself, ``tr H² / tr H``."""
    return float(values.double().square().sum() / values.double().sum())


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
            scores, ratio = estimate(model, train, test, task, result, epochs)
            found["mean eigenvalue over EK-FAC's"] = round(ratio, 3)
            print(f"  the mean eigenvalue (tr H² / tr H) is {ratio:.2f} times that of EK-FAC")
        found["removal"][removal] = summary(task, result, scores, epochs, arguments.plots)
    return found


def summary(
    task: Task, result: FurtherTraining, scores: dict[str, Tensor], epochs: list[int], plots: Path | None
) -> dict:
    """Curves by adjustment, the random control, what one seed gives, and the released numbers beside ours."""
    found: dict = {
        "loss": {"final": round(float(result.start.mean()), 6), "further": round(float(result.full[-1].mean()), 6)},
        "epochs": epochs,
        "distance": rounded(result.full_distances.mean(1)[[e - 1 for e in epochs]]),
        "rate": rounded(result.rates[[e - 1 for e in epochs], 0]),
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
            "curves": {
                label: {"cosine": rounded(curve.mean), "sem": rounded(curve.sem)} for label, curve in curves.items()
            },
            "random": rounded([control["control"], control["control_sem"]]),
            "one half of the seeds to the other": None if split is None else rounded(split),
        }
        report(task, curves, epochs, f"adjustment ({adjustment})", split)
        if plots:
            figure = plot_further_training(curves).figure
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
    quiet()
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
            "versions": versions(),
            "tasks": results,
        }
        write(record, arguments.out)


if __name__ == "__main__":
    main()
