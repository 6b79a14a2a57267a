"""float32 at its own precision while gradients are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 are as exact as float32 inside, whatever was chosen for training (TF32, bfloat16).

    Products rounded to 10 bits differ with the size of a batch by more than what checks of gradients allow.
    """
    try:
        matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # chosen by the newer interface, which forbids the older one
        with _full_precision_by_backend():
            yield
        return
    if matmul != "highest":
        torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _full_precision_by_backend() -> Iterator[None]:
    backends: Any = torch.backends  # of which type stubs know a part
    chosen = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in chosen]
    for backend in chosen:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(chosen, before, strict=True):
            backend.fp32_precision = precision
