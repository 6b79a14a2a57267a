"""Checks of gradients compare float32 at its own precision, and leave what was chosen for training as it was."""

import pytest
import torch
from helpers import Classifier, classes, mlp, quiet_trainer
from torch.utils.data import DataLoader

from lightning_source import SourceCallback
from lightning_source.capture.precision import full_precision


@pytest.fixture(params=["highest", "medium"])
def chosen(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_products_are_exact_inside_and_as_chosen_outside(chosen):
    convolutions = torch.backends.cudnn.allow_tf32

    def fails_inside():
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()
    assert torch.get_float32_matmul_precision() == chosen
    assert torch.backends.cudnn.allow_tf32 == convolutions


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one interface")
def test_what_was_chosen_by_the_newer_interface_comes_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # the older interface then raises an error
    try:
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_run_is_checked_at_full_precision(tmp_path, chosen):
    seen = []

    class Looks(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.training, torch.get_float32_matmul_precision()))
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), max_epochs=1)
    trainer.fit(Looks(mlp()), DataLoader(classes(), 8))
    assert {precision for _, precision in seen[:3]} == {chosen}  # while it trained
    assert "highest" in {precision for _, precision in seen[3:]}
    assert torch.get_float32_matmul_precision() == chosen
