"""Passes in training mode without its noise: dropout is off and batch normalisation uses its running statistics.

Networks that compute something else in eval mode (detection models, auxiliary heads, ``if self.training`` branches)
must be seen as they train. What training mode adds besides is switched off where torch computes it: in the modules that
drop units or keep statistics, and in the functions that do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

# Leaf modules whose training mode is noise or statistics of the batch, and nothing else.
_NOISY = (_DropoutNd, _NormBase, nn.RNNBase, nn.MultiheadAttention, nn.RReLU)

# Functions by the argument that switches their noise: its place, its name and the value that is quiet.
_SWITCHES: Mapping[Callable[..., Any], tuple[int, str, object]] = {
    F.dropout: (2, "training", False),
    F.dropout1d: (2, "training", False),
    F.dropout2d: (2, "training", False),
    F.dropout3d: (2, "training", False),
    F.alpha_dropout: (2, "training", False),
    F.feature_alpha_dropout: (2, "training", False),
    F.rrelu: (3, "training", False),
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    torch.dropout: (2, "train", False),
    torch.alpha_dropout: (2, "train", False),
    torch.feature_dropout: (2, "train", False),
    torch.feature_alpha_dropout: (2, "train", False),
    torch.native_dropout: (2, "train", False),
}


@contextmanager
def quiet_training(module: nn.Module) -> Iterator[None]:
    """Inside, the module's calls draw no dropout and use running statistics, whatever the modes of its parts.

    The modes of modules that drop units or keep statistics are set one by one, so that others see ``training`` as it
    is; all come back. A batch normalisation that keeps no running statistics goes on with those of the batch.

    Args:
        module: the module that will be called.
    """
    noisy = [child for child in module.modules() if isinstance(child, _NOISY) and child.training]
    try:
        for child in noisy:
            child.training = False
        with quiet_functions():
            yield
    finally:
        for child in noisy:
            child.training = True


def quiet_functions() -> TorchFunctionMode:
    """Inside, functions draw no dropout and use running statistics where they are given some."""
    return _QuietFunctions()


class _QuietFunctions(TorchFunctionMode):
    """Calls of dropout and of batch normalisation by function, with their noise switched off."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.batch_norm:
            args, kwargs = _by_running_statistics(args, kwargs)
        elif function in _SWITCHES:
            place, name, quiet = _SWITCHES[function]
            if len(args) > place:
                args = (*args[:place], quiet, *args[place + 1 :])
            else:
                kwargs[name] = quiet
        return function(*args, **kwargs)


def _by_running_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    means = args[1] if len(args) > 1 else kwargs.get("running_mean")
    if means is None:
        return args, kwargs
    if len(args) > 5:
        return (*args[:5], False, *args[6:]), kwargs
    return args, kwargs | {"training": False}
