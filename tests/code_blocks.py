"""The blocks of Python in a page of Markdown, for the tests that run them."""

import re
from typing import NamedTuple


class Block(NamedTuple):
    """One fenced block."""

    line: int  # of the page, from 1, on which the code begins
    mark: str  # what stands behind the language; empty where the block runs
    code: str

    def run(self, page: str, names: dict[str, object]) -> None:
        """Execute the block among ``names``; an error names the page and its line."""
        exec(compile("\n" * (self.line - 1) + self.code, page, "exec"), names)


def blocks_of(text: str) -> list[Block]:
    """A text's blocks of Python, in order."""
    found = re.finditer(r"^ *```(?:python|py)\w*\b *(.*)\n((?:.*\n)*?) *```$", text, re.MULTILINE)
    return [Block(text[: match.start(2)].count("\n") + 1, match[1], match[2]) for match in found]
