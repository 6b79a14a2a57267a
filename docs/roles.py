"""For the site: the roles of docstrings, ``:class:`Name```, as the code that they name, and doctests as code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")
# The parser of docstrings knows sections of doctests in the plural alone; others would be read as Markdown.
_DOCTEST = re.compile(r"^( *)Example:\n(?= *>>>)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites each docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _DOCTEST.sub(r"\1Examples:\n", text)
