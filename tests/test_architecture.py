"""The package's imports, read without running them: no circles, none upward; and no file that is too long to read.

``docs/architecture.md`` explains the order. Imports count wherever they stand: at the top of a file, inside a function,
under ``TYPE_CHECKING``.
"""

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "lightning_source"

# Ground first: a wing (a folder, or a file beside the folders) may import those before it, the package itself them all.
ORDER = (
    "names",
    "distributed",
    "_progress",
    "_lightning",
    "wording",
    "_trainer",
    "_files",
    "_sealed",
    "_provenance",
    "random_streams",
    "_student",
    "optimizers",
    "curvature",
    "report",
    "plots",
    "tables",
    "scores",
    "layers",
    "capture",
    "recording",
    "passes",
    "runs",
    "estimators",
    "ensembling",
    "diagnosis",
    "scorer",
    "issues",
    "attribution",
    "callback",
    "evaluation",
    "command_line",
    "cli",
)
# The wings that work for a Trainer; the others serve a plain loop or Fabric as well.
TRAINER_WINGS = ("capture", "attribution", "callback", "cli")

MAX_LINES, MAX_CALLBACK_LINES = 450, 350

Imports = Mapping[str, Collection[str]]  # by module, those that it imports; names without the package's in front


def imports_of(root: Path) -> dict[str, set[str]]:
    """Who imports whom inside a package; the package's own ``__init__`` is the module ``"__init__"``."""
    files = {_module_of(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}
    imports = {}
    for module, path in files.items():
        folder = path.relative_to(root).parent.parts
        inside = {name for name in _imported(path, (root.name, *folder)) if name.split(".")[0] == root.name}
        imports[module] = {_longest_known(name.partition(".")[2], files) for name in inside} - {module}
    return imports


def _module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imported(path: Path, folder: Sequence[str] = ()) -> Iterator[str]:
    """Full names of what a file imports, ``from a import b`` as ``"a.b"``; ``folder`` is what a leading dot means."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            yield from (".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names)


def _longest_known(name: str, modules: Collection[str]) -> str:
    """The module that a name lies in: ``recording.store.RunStore`` in ``recording.store``."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or "__init__"


def circle_in(imports: Imports) -> list[str]:
    """Modules that import each other in a ring, the first again at the end; empty where there is no ring."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for target in sorted(imports[module]):
                if circle := visit(target, [*path, module]):
                    return circle
        finished.add(module)
        return []

    return next((circle for module in sorted(imports) if (circle := visit(module, []))), [])


def upward_in(imports: Imports, order: Sequence[str]) -> list[str]:
    """Imports of a wing that does not come before the importer's own, as ``"importer -> imported"``.

    Raises:
        ValueError: a wing has no place in the order.
    """
    heights = {wing: height for height, wing in enumerate([*order, "__init__"])}
    if lost := sorted({_wing(module) for module in imports} - heights.keys()):
        raise ValueError(f"no place in the order of imports: {', '.join(lost)}")
    return [
        f"{module} -> {target}"
        for module, targets in imports.items()
        for target in sorted(targets)
        if heights[_wing(target)] > heights[_wing(module)]
    ]


def _wing(module: str) -> str:
    return module.split(".")[0]


def too_long_in(root: Path, limit: int) -> list[str]:
    """Files of more lines than the limit whose docstring does not say why they are long."""
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*.py"))}
    return [name for name, text in texts.items() if len(text.splitlines()) > limit and not _says_why(text)]


def _says_why(text: str) -> bool:
    return re.search(r"\blong\b", ast.get_docstring(ast.parse(text)) or "") is not None


# ---------------------------------------------------------------- the package


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return imports_of(PACKAGE)


def test_no_module_imports_itself_through_others(imports):
    circle = circle_in(imports)
    assert not circle, " -> ".join(circle)


def test_no_wing_imports_one_above_it(imports):
    upward = upward_in(imports, ORDER)
    assert not upward, "\n".join(upward)


def test_what_serves_any_loop_knows_no_trainer(imports):
    knowing = [module for module in imports if "_trainer" in imports[module] and _wing(module) not in TRAINER_WINGS]
    assert not knowing, f"{', '.join(knowing)} -> _trainer"


def test_mathematics_needs_torch_alone():
    allowed = {"torch", "lightning_source", *sys.stdlib_module_names}
    imported = {
        (path.name, name.split(".")[0]) for path in (PACKAGE / "curvature").glob("*.py") for name in _imported(path)
    }
    assert {(file, name) for file, name in imported if name not in allowed} == set()


def test_no_file_is_too_long():
    assert list(too_long_in(PACKAGE, MAX_LINES)) == []


def test_the_callback_only_translates_events():
    assert len((PACKAGE / "callback.py").read_text().splitlines()) <= MAX_CALLBACK_LINES


def test_the_page_shows_the_order_that_is_tested():
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert " → ".join(ORDER) in " ".join(page.replace("`", "").split())


def test_the_picture_shows_every_wing():
    texts = re.findall(r">([^<]+)</text>", (REPOSITORY / "docs" / "figures" / "architecture.svg").read_text())
    assert set(ORDER) <= {name for text in texts for name in re.findall(r"\w+", text)}


# ---------------------------------------------------------------- the checker, on small packages that are wrong


def house(folder: Path, files: Mapping[str, str]) -> Path:
    """A package of that name, made of these files."""
    root = folder / "house"
    for name, text in ({"__init__.py": ""} | dict(files)).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("statement", "imported"),
    [
        ("import house.wing.low", {"wing.low"}),
        ("import house.wing.low as low, torch", {"wing.low"}),
        ("from house.wing import low", {"wing.low"}),
        ("from house.wing.low import Thing", {"wing.low"}),
        ("from house.wing import Thing, low", {"wing", "wing.low"}),
        ("from house import wing", {"wing"}),
        ("from house import Thing", {"__init__"}),
        ("import house", {"__init__"}),
        ("from . import low", {"wing.low"}),
        ("from .low import Thing", {"wing.low"}),
        ("from ..ground import Thing", {"ground"}),
        ("def late():\n    from house import ground", {"ground"}),
        ("if TYPE_CHECKING:\n    from house.ground import Thing", {"ground"}),
        ("import housekeeping\nfrom torch import house", set()),
    ],
)
def test_every_way_to_import_is_seen(tmp_path, statement, imported):
    root = house(tmp_path, {"ground.py": "", "wing/__init__.py": "", "wing/low.py": "", "wing/high.py": statement})
    assert imports_of(root)["wing.high"] == imported


def test_a_dot_in_an_init_is_its_own_folder(tmp_path):
    files = {"__init__.py": "from .wing import low", "wing/__init__.py": "from .low import Thing", "wing/low.py": ""}
    assert imports_of(house(tmp_path, files)) == {"__init__": {"wing.low"}, "wing": {"wing.low"}, "wing.low": set()}


def test_a_circle_is_found_and_named(tmp_path):
    files = {
        "a.py": "from house import b",
        "b.py": "import house.c",
        "c.py": "def late():\n    from house.b import Thing",
    }
    assert circle_in(imports_of(house(tmp_path, files))) == ["b", "c", "b"]


def test_two_ways_to_one_module_are_no_circle(tmp_path):
    files = {"a.py": "from house import b, c", "b.py": "from house import d", "c.py": "from house import d", "d.py": ""}
    assert circle_in(imports_of(house(tmp_path, files))) == []


def test_an_import_of_a_wing_above_is_found_and_named(tmp_path):
    files = {
        "ground.py": "",
        "wing/__init__.py": "",
        "wing/low.py": "from house import ground\nif TYPE_CHECKING:\n    from house.roof import Thing",
        "wing/high.py": "from house.wing import low",
        "roof.py": "from house.wing import high",
    }
    imports = imports_of(house(tmp_path, files))
    assert upward_in(imports, ["ground", "wing", "roof"]) == ["wing.low -> roof"]
    assert upward_in(imports, ["wing", "ground", "roof"]) == ["wing.low -> ground", "wing.low -> roof"]


def test_what_a_wing_takes_from_the_package_itself_is_upward(tmp_path):
    imports = imports_of(house(tmp_path, {"roof.py": "from house import Thing"}))
    assert upward_in(imports, ["roof"]) == ["roof -> __init__"]


def test_a_wing_without_a_place_is_named(tmp_path):
    imports = imports_of(house(tmp_path, {"ground.py": "", "annexe.py": ""}))
    with pytest.raises(ValueError, match="annexe"):
        upward_in(imports, ["ground"])


def test_a_long_file_is_named_unless_it_says_why(tmp_path):
    lines = "\nx = 1" * 10
    files = {
        "short.py": "x = 1",
        "why.py": f'"""It is long because its cases belong together."""{lines}',
        "along.py": f'"""Goes along."""{lines}',
        "silent.py": lines,
    }
    assert too_long_in(house(tmp_path, files), 8) == ["along.py", "silent.py"]
    assert too_long_in(house(tmp_path, files), 11) == []
