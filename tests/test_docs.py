"""The pages of the documentation: their code runs as it stands, and their links lead somewhere."""

import logging
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from code_blocks import Block, blocks_of
from helpers import Classifier, classes, quiet_trainer
from torch.utils.data import DataLoader

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


# The blocks that no test runs, by page and mark, as a reader sees them, with what keeps them from running.
NOT_RUN = {
    ("recipes.md", 'title="not run: two processes"'): "a script that starts itself again for each rank",
}


def blocks(page: Path) -> list[Block]:
    return blocks_of(page.read_text(encoding="utf-8"))


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(classes(), 8)


def of_the_reader(tmp_path: Path) -> dict[str, object]:
    """What the README takes for granted: the reader's own module and data, and how a training of theirs is made."""
    torch.manual_seed(0)
    query = list(classes(4, seed=2).tensors)

    def build(kept, seed):
        loader = DataLoader(torch.utils.data.Subset(classes(), kept), 8)
        return Classifier(), loader, quiet_trainer(tmp_path, max_epochs=1)

    def margins(module):
        return -F.cross_entropy(module.net(query[0]), query[1], reduction="none")

    names = {"L": L, "model": Classifier(), "dm": Data(), "build": build, "margins": margins}
    return names | {"dataset": classes(), "train_dataset": classes(), "query": query, "query_batch": query}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(tmp_path, monkeypatch, page):
    pytest.importorskip("peft")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem, **(of_the_reader(tmp_path) if page.stem == "README" else {})}
    for block in blocks(page):
        if block.mark:
            continue
        if page.stem == "README":  # a hundred retrainings in two processes would find nothing that four do not
            code = block.code.replace("random_subsets(100", "random_subsets(4").replace("range(5)", "range(1)")
            block = block._replace(code=code.replace("n_jobs=4", "n_jobs=1"))
        block.run(str(page), names)


def test_what_does_not_run_is_marked_and_listed_with_its_reason():
    marked = {(page.name, block.mark) for page in PAGES for block in blocks(page) if block.mark}
    assert marked == set(NOT_RUN)
    assert all(mark.startswith('title="not run: ') for _, mark in marked)


def test_a_block_that_fails_names_the_line_of_its_page():
    """The oracle is the traceback: the second block's error is on the page's line 6, and the marked block is seen."""
    text = '# Page\n```python\nx = 1\n```\n```python\nx / 0\n```\n- item\n  ```py title="not run: a"\n  y\n  ```\n'
    first, second, third = blocks_of(text)
    names: dict[str, object] = {}
    first.run("page.md", names)
    with pytest.raises(ZeroDivisionError) as error:
        second.run("page.md", names)
    assert (error.traceback[-1].lineno + 1, names["x"]) == (6, 1)
    assert (third.line, third.mark) == (10, 'title="not run: a"')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
