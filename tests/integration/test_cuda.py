"""On a CUDA device: the same training with and without the callback, and the scores that a CPU gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, mlp, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Tokens(nn.Module):
    """An embedding, attention and a head over a small vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens))).mT


def sequences() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randint(11, (24, 5), generator=generator) for _ in range(2)))


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, 2, 6, 6, generator=generator), torch.arange(24) % 3)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


CASES = {"mlp": (mlp, classes), "convolutions": (convolutions, images), "tokens": (Tokens, sequences)}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
}


@pytest.fixture(autouse=True)
def _exact():
    """TF32 rounds products to 10 bits, and some kernels sum in an order of their own."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fitted(tmp_path, case, optimizer, accelerator, *callbacks, **options):
    network, data = CASES[case]
    torch.manual_seed(0)
    module = Classifier(network(), F.cross_entropy, OPTIMIZERS[optimizer])
    trainer = quiet_trainer(tmp_path, *callbacks, accelerator=accelerator, devices=1, **options)
    trainer.fit(module, DataLoader(data(), 8))
    return trainer, module


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_is_the_same_with_the_callback(tmp_path, case, optimizer, precision):
    states = []
    for callbacks in ([], [SourceCallback(str(tmp_path / "run"))]):
        _, module = fitted(tmp_path, case, optimizer, "cuda", *callbacks, precision=precision)
        states.append(copy.deepcopy(module.state_dict()))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["source", "influence", "tracin"])
def test_scores_are_those_of_the_same_run_on_a_cpu(tmp_path, case, optimizer, method):
    """The run that the device recorded is scored on both: float32 sums in another order move scores by about 1e-4."""
    trainer, module = fitted(tmp_path, case, optimizer, "cuda", SourceCallback(str(tmp_path / "run"), mode="deferred"))
    query = [tensor[:3] for tensor in CASES[case][1]().tensors]
    there = trainer.attribute(query, method=method).values
    assert module.device.type == "cpu"  # as Lightning leaves it
    trainer, _ = fitted(tmp_path, case, optimizer, "cuda", SourceCallback(str(tmp_path / "again"), mode="deferred"))
    fresh = Classifier(CASES[case][0](), F.cross_entropy, OPTIMIZERS["sgd"])
    # Labels are drawn by the device's own generator, so curvature is that of other draws of the same distribution.
    here = SourceScorer.from_run(tmp_path / "again", fresh).score(query, CASES[case][1](), method=method).values
    if method == "tracin":
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3 * float(here.abs().max()))
    else:
        assert torch.corrcoef(torch.stack([there.flatten(), here.flatten()]))[0, 1] > 0.8


@pytest.mark.parametrize("case", CASES)
def test_asking_twice_gives_the_same_scores(tmp_path, case):
    trainer, _ = fitted(tmp_path, case, "sgd", "cuda", SourceCallback(str(tmp_path / "run")))
    query = [tensor[:3] for tensor in CASES[case][1]().tensors]
    first, again = (trainer.attribute(query).values for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_checks_do_not_depend_on_the_precision_of_products(tmp_path, recwarn, kind):
    """TF32 rounds products to 10 bits, which is what Lightning advises to train with on such devices."""
    wide = nn.Sequential(nn.Linear(6, 4096), nn.ReLU(), nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, 3))
    layers = [nn.Conv2d(2, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
    deep = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 3))
    net, data = (wide, classes()) if kind == "linear" else (deep, images())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.manual_seed(0)
        trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), accelerator="gpu", max_epochs=20)
        trainer.fit(Classifier(net), DataLoader(data, 8))
    finally:
        torch.set_float32_matmul_precision(before)
    stage = trainer.callbacks[0]._session.store.manifest.stages[0]
    assert stage.coverage.left_out == ()
    assert stage.objective.one_at_a_time is None, stage.objective
