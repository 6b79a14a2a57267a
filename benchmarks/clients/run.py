"""Tries every set-up in an environment of its own, and writes ``results.json`` and ``docs/clients.md``.

    python benchmarks/clients/run.py --cache ENVIRONMENTS          # all set-ups
    python benchmarks/clients/run.py --cache ENVIRONMENTS darts    # those whose file name begins so; the others stay
    python benchmarks/clients/run.py --page                        # only the page, from the results that are there

An environment is made for each list of requirements and kept under ``--cache``. A set-up whose requirements the package
registry does not give is written down as such and skipped.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS = FOLDER / "results.json"
EXACT = 1e-4  # relative difference of float32 gradients and scores that counts as none
LIMIT = 240  # seconds that a set-up may take
TORCH = "torch==2.13.0"  # one release for all, so that its kernels are the same, but where torchvision pins another


def constants(path: Path) -> dict[str, Any]:
    """The literal constants of a set-up's file, read without importing the library that it needs."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def environment(requirements: list[str], cache: Path) -> Path:
    """The Python of an environment with these requirements and what the package itself needs."""
    name = "-".join(r.split("=")[0].split("[")[0] for r in requirements) or "lightning"
    folder = cache / f"{name}-{hashlib.sha256(repr(requirements).encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    torch = [] if any(r.startswith("torchvision") for r in requirements) else [TORCH]
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        # torch first: what builds against it finds it there, and the package's own runtime last, from its metadata.
        subprocess.run([*pip, *torch, "setuptools<81"], check=True, capture_output=True, text=True)
        subprocess.run([*pip, *torch, *requirements, str(ROOT)], check=True, capture_output=True, text=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-y", "lightning_source"], check=True, capture_output=True)
        (folder / "complete").touch()
    return python


def tried(path: Path, cache: Path) -> dict[str, Any]:
    """What ``check.py`` finds for one set-up, or why nothing was found."""
    own = constants(path)
    described = {"setup": path.stem, "name": own["NAME"], "requirements": own["REQUIREMENTS"]}
    try:
        python = environment(own["REQUIREMENTS"], cache)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or str(error)).strip().splitlines()[-1]
        return {**described, "not_installed": last[:300]}
    # Sets that these libraries fetch when they are imported are not asked for, and threads are pinned.
    surroundings = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    surroundings |= {"HOME": str(cache), "MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), "check.py", str(path)]
    try:
        done = subprocess.run(command, cwd=FOLDER, env=surroundings, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {**described, "failed": f"no answer in {LIMIT} s"}
    if done.returncode:
        return {**described, "failed": done.stderr.strip().splitlines()[-1][:300]}
    row = {**described, **json.loads(done.stdout.strip().splitlines()[-1])}
    if own.get("REFUSED") and own["REFUSED"] in row.get("stopped", ""):
        row["refused"] = own["REFUSED"]
    return row


def right(row: Mapping[str, Any]) -> bool:
    """Whether the set-up works without a line of attribution code, or is refused where a refusal is right."""
    if row.get("refused"):
        return bool(row["bit_identical"])
    exact = row.get("products", 1.0) <= EXACT or row.get("noisy", False)
    return bool(
        row.get("bit_identical") and row.get("coverage", 0) >= 0.99 and row.get("from_run", 1) <= EXACT and exact
    )


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the page's table."""
    name = f"{row['name']} ({', '.join(row['requirements'])})"
    for reason in ("not_installed", "failed"):
        if reason in row:
            return [name, "", "", "", "", "no", f"{reason.replace('_', ' ')}: {row[reason]}"]
    remarks = []
    if row.get("one_at_a_time"):
        remarks.append("one example at a time")
    if row.get("noisy"):
        remarks.append("its step draws noise, so that single gradients are known up to it only")
    if row.get("streamed"):
        remarks.append("its loader is a stream, and the examples are given as `train=`")
    if row.get("refused"):
        remarks.append(f"refused, rightly: an example's loss {row['refused']}")
    elif "stopped" in row:
        remarks.append(row["stopped"].splitlines()[0])
    return [
        name,
        "yes" if row["bit_identical"] else "**no**",
        f"{100 * row['coverage']:.0f} %" if "coverage" in row else "",
        f"{row['products']:.0e}" if "products" in row else "",
        f"{row['from_run']:.0e}" if row.get("from_run") else ("equal" if "from_run" in row else ""),
        "yes" if right(row) else "no",
        "; ".join(remarks).replace("|", "\\|"),
    ]


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all results."""
    head = ["set-up", "weights", "attributed", "products", "another scorer", "works", "remarks"]
    lines = ["| " + " | ".join(each) + " |" for each in (head, *map(cells, rows))]
    lines.insert(1, "|---" * len(head) + "|")
    works = sum(right(row) for row in rows)
    text = (FOLDER / "page.md").read_text()
    return text.replace("{works}", str(works)).replace("{tried}", str(len(rows))).replace("{table}", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the names of set-ups; all without one")
    parser.add_argument("--cache", type=Path, help="folder of the environments")
    parser.add_argument("--page", action="store_true", help="write the page from the results that are there")
    arguments = parser.parse_args()
    found = {row["setup"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    if not arguments.page:
        if arguments.cache is None:
            parser.error("--cache: a folder for the environments is needed")
        for path in sorted((FOLDER / "setups").glob("*.py")):
            if not arguments.names or path.stem.startswith(tuple(arguments.names)):
                found[path.stem] = tried(path, arguments.cache.resolve())
                print(json.dumps(found[path.stem]), flush=True)
                RESULTS.write_text(json.dumps([found[name] for name in sorted(found)], indent=1) + "\n")
    (ROOT / "docs" / "clients.md").write_text(page([found[name] for name in sorted(found)]))


if __name__ == "__main__":
    main()
