"""Factors and covariances of blocks as the tensors of a file, and the checks that they are those of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_source._files import DirectoryError
from lightning_source.curvature.ekfac import BlockFactors, CovarianceSums, Factors
from lightning_source.layers import Block


def factor_tensors(factors: Factors) -> dict[str, Tensor]:
    """Factors for a file; see :func:`factors_of`."""
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        tensors |= factor.to_tensors(name)
    return tensors


def factors_of(path: Path, tensors: Mapping[str, Tensor], blocks: Sequence[Block]) -> Factors:
    """Factors from a file.

    Args:
        path: the file, for messages.
        tensors: what it holds.
        blocks: those that it must hold.

    Raises:
        DirectoryError: a tensor is missing, of another form, or not finite.
    """
    factors = {}
    for block in blocks:
        parts, outputs, inputs = block.shape
        forms = {"activations": [[parts, inputs, inputs]], "gradients": [[parts, outputs, outputs]]}
        for side, shapes in forms.items():
            if f"{side}/{block.name}" in tensors:
                _require(path, tensors, f"{side}/{block.name}", shapes)
        _require(path, tensors, f"values/{block.name}", [[*block.shape]])
        factors[block.name] = BlockFactors.from_tensors(block.name, tensors)
    return factors


def covariance_tensors(sums: Mapping[str, CovarianceSums]) -> dict[str, Tensor]:
    """Covariance sums for a file; see :func:`covariances_of_file`."""
    tensors = {}
    for name, covariances in sums.items():
        tensors[f"activations/{name}"] = covariances.activations
        tensors[f"gradients/{name}"] = covariances.gradients
        tensors[f"examples/{name}"] = torch.tensor(covariances.examples)
    return tensors


def covariances_of_file(
    path: Path, tensors: Mapping[str, Tensor], blocks: Sequence[Block]
) -> dict[str, CovarianceSums]:
    """Covariance sums from a file.

    Args:
        path: the file, for messages.
        tensors: what it holds.
        blocks: those that it must hold.

    Raises:
        DirectoryError: a tensor is missing, of another form, or not finite.
    """
    sums = {}
    for block in blocks:
        parts, outputs, inputs = block.shape
        _require(path, tensors, f"activations/{block.name}", [[parts, inputs, inputs], [parts, inputs]])
        _require(path, tensors, f"gradients/{block.name}", [[parts, outputs, outputs], [parts, outputs]])
        count = tensors.get(f"examples/{block.name}")
        if count is None or count.dtype != torch.int64 or count.dim() or int(count) < 1:
            raise DirectoryError(f"`{path}` does not say over how many examples the sums of `{block.name}` go.")
        activations, gradients = tensors[f"activations/{block.name}"], tensors[f"gradients/{block.name}"]
        sums[block.name] = CovarianceSums(activations, gradients, int(count))
    return sums


def _require(path: Path, tensors: Mapping[str, Tensor], name: str, shapes: Sequence[Sequence[int]]) -> None:
    for problem in _problems(tensors.get(name), shapes):
        raise DirectoryError(f"`{path}`: `{name}` {problem}. HINT: delete the file's folder to have it made again.")


def _problems(tensor: Tensor | None, shapes: Sequence[Sequence[int]]) -> Iterator[str]:
    if tensor is None:
        yield "is missing"
    elif list(tensor.shape) not in [list(shape) for shape in shapes]:
        yield f"has the shape {list(tensor.shape)}, not {' or '.join(str(list(shape)) for shape in shapes)}"
    elif tensor.dtype not in (torch.float32, torch.float64):
        yield f"is of {tensor.dtype}"
    elif not tensor.isfinite().all():
        yield "is not finite"
