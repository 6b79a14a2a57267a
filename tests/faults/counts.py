"""Counts verdicts of a scenario at many of its disk events; ``python tests/faults/counts.py PAGE`` writes the table."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from faults.events import KINDS
from faults.scenarios import BAD, SCENARIOS, Stops, events_in


def verdicts_at(name: str, kind: str, folder: Path, stops: Stops, events: range) -> tuple[Counter[str], list[str]]:
    """What became of a scenario with a fault at each of some events: how often which verdict, and the bad ones."""
    counts, bad = Counter[str](), []
    for at in events:
        place = folder / f"{kind}-{at}"
        place.mkdir()
        verdicts = SCENARIOS[name](place, kind, at, stops)
        counts.update(verdicts)
        if set(verdicts) & set(BAD):
            bad.append(f"{name}, {kind} at {at}: {verdicts}")
        else:
            shutil.rmtree(place)
    return counts, bad


def _table(every: int) -> str:
    columns = ("tried", "equal", "clear", *BAD)
    rows = ["| | fault | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    start, total, folder = time.perf_counter(), Counter[str](), Path(tempfile.mkdtemp())
    stops = Stops(folder / "stops")
    stops.folder.mkdir()
    for name in SCENARIOS:
        (folder / name).mkdir()
        (folder / name / "unharmed").mkdir()
        count = events_in(name, folder / name / "unharmed", stops)
        for kind in KINDS:
            counts, bad = verdicts_at(name, kind, folder / name, stops, range(1, count + 1, every))
            total += counts
            print(*bad, name, kind, dict(counts), sep="\n", flush=True)
            figures = [counts.total(), *(counts[column] for column in columns[1:])]
            rows.append(f"| {name}, {count} events | {kind} | " + " | ".join(map(str, figures)) + " |")
    rows.append("| all | | " + " | ".join(map(str, [total.total(), *(total[c] for c in columns[1:])])) + " |")
    shutil.rmtree(folder)
    rows.append(f"\nEvery {every}. event; {time.perf_counter() - start:.0f} s on one core.")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    page, every = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    text = page.read_text()
    head, _, _ = text.partition("<!-- counts -->")
    page.write_text(f"{head}<!-- counts -->\n\n{_table(every)}\n")
