"""EK-FAC influence by kronfluence 1.0.1 for a trained MLP; runs in an environment of its own, called by the study.

    pip install torch==2.13.0 accelerate einops pandas psutil safetensors
    pip install --no-deps kronfluence==1.0.1 einconv opt_einsum
    python benchmarks/lds_study.py --task concrete --kronfluence path/to/that/python ...

Reads ``network.*``, ``train.*`` and ``query.*``, writes ``scores`` and ``seconds``: integer targets are classes under
cross entropy, measured by their margin; others are regressed under a squared error, measured by the absolute one.
"""

import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def rebuild(weights: dict[str, Tensor]) -> nn.Sequential:
    """The MLP that the weights belong to."""
    layers: list[nn.Module] = []
    for index in sorted(int(name.split(".")[0]) for name in weights if name.endswith("weight")):
        fan_out, fan_in = weights[f"{index}.weight"].shape
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    network.load_state_dict(weights)
    return network


class Classification(Task):
    """Cross entropy, measured by the margin of the true class."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(batch[0])
        labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sample else batch[1]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        logits, target = model(batch[0]), batch[1].unsqueeze(-1)
        rest = logits.scatter(-1, target, -torch.inf).logsumexp(-1)
        return (logits.gather(-1, target).squeeze(-1) - rest).sum()


class Regression(Task):
    """Squared error, measured by the absolute error."""

    def compute_train_loss(self, batch, model, sample=False):
        output = model(batch[0]).squeeze(-1)
        # A squared error is a Normal's likelihood with variance 1/2.
        target = output.detach() + 0.5**0.5 * torch.randn_like(output) if sample else batch[1]
        return F.mse_loss(output, target, reduction="sum")

    def compute_measurement(self, batch, model):
        return (model(batch[0]).squeeze(-1) - batch[1]).abs().sum()


def ekfac_scores(
    network: nn.Module, task: Task, train: TensorDataset, query: TensorDataset, name: str, folder: str
) -> tuple[Tensor, float, float]:
    """Scores ``[Q, N]`` of EK-FAC influence with its usual damping, seconds of the factors and seconds of all.

    Args:
        network: the trained network.
        task: its loss and measurement.
        train: training examples.
        query: queries, taken all at once.
        name: of the analysis; another one fits its factors anew.
        folder: for files.
    """
    analyzer = Analyzer(
        name,
        prepare_model(network, task),
        task,
        cpu=True,
        output_dir=folder,
        disable_tqdm=True,
        disable_model_save=True,
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    start = time.perf_counter()
    analyzer.fit_all_factors("factors", train, per_device_batch_size=256, factor_args=FactorArguments(strategy="ekfac"))
    fitted = time.perf_counter()
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query,
        train,
        per_device_query_batch_size=len(query),
        per_device_train_batch_size=256,
        score_args=ScoreArguments(damping_factor=None),  # 0.1 times the mean eigenvalue
    )
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores, fitted - start, time.perf_counter() - start


def main(given: str, scored: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = load_file(given)
    network = rebuild({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
    train, query = (TensorDataset(tensors[f"{part}.0"], tensors[f"{part}.1"]) for part in ("train", "query"))
    task = Regression() if tensors["train.1"].is_floating_point() else Classification()
    with tempfile.TemporaryDirectory() as folder:
        scores, _, seconds = ekfac_scores(network, task, train, query, "study", folder)
    save_file({"scores": (scores / len(train)).float().contiguous(), "seconds": torch.tensor(seconds)}, scored)


if __name__ == "__main__":
    main(*sys.argv[1:3])
