"""The final-model-only study as a section of the page of results."""

from __future__ import annotations

import json

from page import RESULTS, Report, table

TASKS = ("energy", "energy_annealed", "concrete", "cancer")
SHOWN = (1, 5, 30, 200, 500)  # epochs of further training


def final_model_section() -> str:
    """A table for each task: cosine with further training by estimator and amount of it; empty without figures."""
    files = [file for task in TASKS if (file := RESULTS / f"final_model_only_{task}.json").exists()]
    if not files:
        return ""
    head = (
        "## 3. The final model alone\n\n"
        "Cosine between each estimate and what further training does without an example (mean over queries, ± its"
        " standard error; difference to the run on all data, Eq. 17), by epochs of further training. *horizon*: the"
        " estimator knows Λ of the further training, as SOURCE's segment or as damping 1/Λ. *exact*: the dense"
        " Gauss-Newton matrix in place of EK-FAC. *recorded*: one further run was recorded, so that row is not"
        " final-model-only.\n"
    )
    return "\n".join([head, *(tables_of(json.loads(file.read_text())) for file in files)])


def tables_of(record: Report) -> str:
    """Each task's table, its set-up and the command that made it."""
    parts = []
    for name, task in record["tasks"].items():
        recipe, measured = task["recipe"], task["removal"]["downweight"]
        figures = measured["adjustment 17"]
        columns = [i for i, epoch in enumerate(measured["epochs"]) if epoch in SHOWN]
        rows = [
            [row, *(f"{curve['cosine'][i]:.2f} ± {curve['sem'][i]:.2f}" for i in columns)]
            for row, curve in figures["curves"].items()
        ]
        halves = "one half of the seeds to the other"
        rows.append([f"*{halves}*", *(f"{figures[halves][i]:.2f}" for i in columns)])
        parts.append(
            f"**{name}**: {task['train']} training examples, {task['left_out']} left out, {record['seeds']} seeds; MLP"
            f" 2 × {recipe['hidden']}, trained {recipe['epochs']} epochs at {recipe['rate']}, further at"
            f" {recipe['further_rate']}. `{record['command']}`\n\n"
            + table(["epochs", *(str(measured["epochs"][i]) for i in columns)], rows)
            + "\n"
        )
    return "\n".join(parts)
