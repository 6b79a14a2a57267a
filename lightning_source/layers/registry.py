"""Which form serves which kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from lightning_source.layers.contract import AnyForm, Block, GroupOf, forms_by_name
from lightning_source.names import clean_name

_FORMS: dict[type[nn.Module] | str, AnyForm] = {}
FormT = TypeVar("FormT", bound=type[AnyForm])


def register_layer(*kinds: type[nn.Module] | str) -> Callable[[FormT], FormT]:
    """Class decorator: the decorated :class:`LayerForm` serves these module classes and their subclasses.

    A class of another library is given by its full name, ``"package.module.Class"``, so that nothing is imported.
    Without ``kinds``, the form serves blocks that name it, such as another form's :meth:`LayerForm.attempts`.

    Raises:
        ValueError: another form has this class name, by which recorded runs know it.
    """

    def enter(form: FormT) -> FormT:
        known = forms_by_name.get(form.__name__)
        if known is not None and _full_name(type(known)) != _full_name(form):
            raise ValueError(f"a layer form named `{form.__name__}` is registered already: {_full_name(type(known))}")
        instance = form()
        _FORMS.update(dict.fromkeys(kinds, instance))
        forms_by_name[form.__name__] = instance
        return form

    return enter


def form_of(module: nn.Module) -> AnyForm | None:
    """The form for a module, looked up along its class's bases; ``None`` where there is none."""
    for kind in type(module).__mro__:
        if form := _FORMS.get(kind) or _FORMS.get(_full_name(kind)):
            return form
    return None


def blocks_of(name: str, module: nn.Module, group_of: GroupOf) -> list[Block]:
    """The blocks of a module; none if it has no form. Parameters without a group are left out."""
    form = form_of(module)
    return [] if form is None else form.blocks(clean_name(name), module, group_of)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
