"""How one example is shown: as a picture, as text or as numbers, guessed from what the dataset gives."""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_source._lightning import MisconfigurationException

_LONGEST_TEXT, _MOST_NUMBERS = 2000, 24
_MOST_CELLS, _SHORTEST_WAVE, _WAVE_POINTS = 40, 256, 160
_BATCHES = (Tensor, Mapping, tuple, list)
_LABELS = ("labels", "label", "target", "targets", "y")

Render = Callable[[object], object]
Shown = dict[str, Any]  # what JSON can hold


def shown(example: object, render: Render | None, pixels: int) -> Shown:
    """How the page shows an example, and ``"label"`` where it has one.

    ``{"text": ...}``; ``{"image": data URI}``; ``{"cells": [[name, text], ...]}``, a row of a table; or
    ``{"wave": [[low, high], ...]}``, the outline of a waveform between -1 and 1.

    Args:
        example: what the dataset gives at an index.
        render: as :func:`picture_or_text` takes it.
        pixels: the longer side of a picture at most.
    """
    content, label = picture_or_text(example, render)
    what: Shown = {"text": content} if isinstance(content, str) else {"image": _png(content, pixels)}
    if render is None and "text" in what:
        inputs = _parts(example)[0]
        if isinstance(inputs, Mapping) and 1 < len(inputs) <= _MOST_CELLS:
            what = {"cells": [[str(name), _text(value)] for name, value in inputs.items()]}
        elif (wave := _outline(inputs)) is not None:
            what = {"wave": wave}
    return what if label is None else what | {"label": label}


def picture_or_text(example: object, render: Render | None) -> tuple[Tensor | str, str | None]:
    """An example as ``[H, W]`` or ``[H, W, 3]`` between 0 and 1, or as a text; and its label, where it has one.

    Args:
        example: what the dataset gives at an index.
        render: takes the example and gives back a text or a picture (a tensor ``[H, W]`` or ``[C, H, W]``); ``None``
            guesses.
    """
    inputs, label = _parts(example)
    content = inputs if render is None else render(example)
    picture = _picture(content)
    return _text(content) if picture is None else picture, None if label is None else _text(label)


def training_example(train: object, train_id: int) -> object:
    """What the training dataset gives at an index.

    Raises:
        MisconfigurationException: it cannot be indexed.
    """
    if not hasattr(train, "__getitem__"):
        raise MisconfigurationException(
            f"`train` is a {type(train).__name__}, which cannot be indexed. HINT: pass the training dataset."
        )
    return train[train_id]


def query_example(query: object, query_ids: Tensor, row: int) -> object:
    """The example behind one row of the scores: of a dataset by its id, of a batch by its row.

    Raises:
        MisconfigurationException: nothing in the batch has as many rows as the scores.
    """
    if isinstance(query, DataLoader):
        query = query.dataset
    if isinstance(query, Dataset) or (hasattr(query, "__getitem__") and not isinstance(query, _BATCHES)):
        return query[int(query_ids[row])]
    count = len(query_ids)
    parts = query if isinstance(query, tuple | list) else ()
    if not _has_rows(query, count) and not any(_has_rows(part, count) for part in parts):
        raise MisconfigurationException(
            f"`query` is of {type(query)} and nothing in it has {count} rows, one for each query of the scores. HINT:"
            " pass the batch that was scored, or a dataset."
        )
    return _row(query, row, count)


def labels_of(dataset: object) -> Tensor | None:
    """The integer labels of a dataset that has them at hand, ``[N]``; no example is read for them."""
    tensors = getattr(dataset, "tensors", None)
    found = tensors[-1] if tensors else getattr(dataset, "targets", None)
    if not isinstance(found, Tensor):
        found = torch.tensor(found) if isinstance(found, list) and all(isinstance(y, int) for y in found) else None
    return found if found is not None and found.ndim == 1 and not found.is_floating_point() else None


def _row(batch: object, row: int, count: int) -> object:
    """The example at a row of a batch of ``count``: what has as many entries is taken apart, the rest is of all."""
    if isinstance(batch, Mapping):
        return {key: _row(value, row, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and any(_has_rows(value, count) for value in batch):
        return [_row(value, row, count) for value in batch]
    return batch[row] if isinstance(batch, Tensor | tuple | list) and _has_rows(batch, count) else batch


def _has_rows(value: object, count: int) -> bool:
    if isinstance(value, Mapping):
        return any(_has_rows(part, count) for part in value.values())
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == count
    return isinstance(value, tuple | list) and len(value) == count


def _parts(example: object) -> tuple[object, object]:
    """An example as what goes in and what should come out."""
    if isinstance(example, Mapping):
        name = next((name for name in _LABELS if name in example), None)
        rest = {key: value for key, value in example.items() if key != name}
        inputs = next(iter(rest.values())) if len(rest) == 1 else rest
        return inputs, None if name is None else example[name]
    if isinstance(example, tuple | list) and len(example) == 2:
        return example[0], example[1]
    return example, None


def _picture(content: object) -> Tensor | None:
    """``[H, W]`` or ``[H, W, 3]`` between 0 and 1, or ``None`` where the content is no picture."""
    if not isinstance(content, Tensor):
        return None
    picture = content.detach().float().cpu()
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        picture = picture[0] if picture.shape[0] == 1 else picture.permute(1, 2, 0)
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3) or min(picture.shape[:2]) < 4:
        return None
    picture = picture.nan_to_num(0.0, 0.0, 0.0)
    low, high = picture.min(), picture.max()
    return (picture - low) / (high - low).clamp_min(1e-12)


def _outline(content: object) -> list[list[float]] | None:
    """Lowest and highest value in each stretch of a long series ``[T]`` or ``[1, T]``, over its largest size."""
    if not isinstance(content, Tensor) or not content.is_floating_point() or content.numel() < _SHORTEST_WAVE:
        return None
    if content.numel() != content.shape[-1]:
        return None
    wave = content.detach().flatten().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    pieces = (wave / wave.abs().max().clamp_min(1e-30)).tensor_split(_WAVE_POINTS)
    return [[round(float(piece.min()), 3), round(float(piece.max()), 3)] for piece in pieces]


def _png(picture: Tensor, pixels: int) -> str:
    pillow = importlib.import_module("PIL.Image")
    image = pillow.fromarray((picture * 255).round().to(torch.uint8).numpy())
    image.thumbnail((pixels, pixels))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _text(content: object) -> str:
    if isinstance(content, Tensor):
        numbers = content.detach().flatten()
        if numbers.numel() == 1:
            return f"{numbers.item():.4g}" if content.is_floating_point() else str(numbers.item())
        listed = [f"{x:.3g}" for x in numbers[:_MOST_NUMBERS].tolist()]
        return ", ".join(listed) + (f" … ({numbers.numel()} numbers)" if numbers.numel() > _MOST_NUMBERS else "")
    if isinstance(content, Mapping):
        text = "\n".join(f"{key}: {_text(value)}" for key, value in content.items())
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        text = ", ".join(_text(value) for value in content[:_MOST_NUMBERS])
    else:
        text = str(content)
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"
