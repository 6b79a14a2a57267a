"""Modules, parameters and buffers by clean name, free of what wrappers put into it."""

from __future__ import annotations

from torch import Tensor, nn

# What torch.compile, activation checkpointing and FSDP put between a module and what it wraps.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def clean_name(name: str) -> str:
    """A module's or parameter's name without what wrappers (compile, checkpointing, FSDP) put into it.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters by clean name; one that several modules share has its first name only."""
    return {clean_name(name): parameter for name, parameter in module.named_parameters()}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by clean name, parameters first."""
    buffers = {clean_name(name): buffer for name, buffer in module.named_buffers()}
    return {**named_parameters(module), **buffers}


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The module and all inside it by clean name; of a wrapper and what it wraps, which share a name, the inner one."""
    return {clean_name(name): child for name, child in module.named_modules()}


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Clean names by the ``id`` of the parameter."""
    return {id(parameter): name for name, parameter in named_parameters(module).items()}


def has_uninitialized(module: nn.Module) -> bool:
    """Whether some parameters are still lazy: they get their shapes when the module is first called."""
    return any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module.parameters())
