"""The linear datamodeling scores as sections of the page of results."""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib.pyplot as plt
from lds_study import ROWS
from page import ORDER, Report, by_task, number, rows_of, save, table, with_interval

PUBLISHED = (
    "Published, at full size (method of the SOURCE paper): Fashion-MNIST SOURCE .46 for one model and .53 for ten,"
    " EK-FAC influence .30 and .45; WikiText-2 with GPT-2 .476 and .468."
)


def ahead_of(entry: dict[str, Any]) -> str:
    """How far SOURCE is ahead of a row; without the interval where SOURCE was computed anew since the row was."""
    if "source_ahead_interval" in entry:
        return with_interval(entry["source_ahead"], entry["source_ahead_interval"])
    return number(entry["source_ahead"]) if "source_ahead" in entry else ""


SUMMARY = {"SOURCE": "source", "EK-FAC influence": "influence", "TracIn": "tracin"} | {
    "gradient dot": "grad-dot",
    "gradient cosine": "grad-cos",
}


def summary(found: dict[str, Report]) -> str:
    """Single models' LDS by task, the defaults of SOURCE beside the usual rivals; the README quotes it."""
    rows = [
        [name, *(number(report["lds"][row]["mean"]) for row in SUMMARY.values()), number(report["reliability"] ** 0.5)]
        for name, report in found.items()
    ]
    return table(["", *SUMMARY, "ceiling"], rows)


def lds_section(found: dict[str, Report]) -> str:
    rows = rows_of(found, ROWS)
    names = list(found)
    limits = [
        ["ground truth's reliability", *(number(r["reliability"]) for r in found.values())],
        ["dealt scores (control)", *(number(r["control"]["lds"]) for r in found.values())],
    ]
    single = table(
        ["single model", *names],
        [*by_task(found, lambda f: with_interval(f["mean"], f["interval"]), rows), *limits],
    )
    ensemble = table(
        ["ensemble", *names],
        by_task(found, lambda f: with_interval(f["ensemble"], f["ensemble_interval"]), rows),
    )
    ahead = table(
        ["SOURCE ahead by", *names],
        by_task(
            found,
            ahead_of,
            [row for row in rows if row != "source"],
        ),
    )
    sized = [row for row in rows if any("slope" in r["lds"].get(row, {}) for r in found.values())]
    slopes = table(
        ["slope", *names],
        by_task(found, lambda f: with_interval(f["slope"], f["slope_interval"]) if "slope" in f else "", sized),
    )
    seconds = table(["seconds", *names], by_task(found, lambda f: f"{f['seconds']:.1f}", rows))
    recipes = "\n".join(
        f"- **{name}**: {r['note']}. {r['queries']} queries; {r['subsets']} subsets of {r['share']:.0%},"
        f" {r['retrainings']} retrainings of each; {len(r['training_seeds'])} full models. `{r['command']}`"
        for name, r in found.items()
    )
    models = sorted({len(entry["single"]) for report in found.values() for entry in report["lds"].values()})
    return f"""## 1. Linear datamodeling score

The mean over queries of the Spearman correlation, over random half subsets, between the measurement after retraining on
the subset and what the scores predict. Each figure is the mean over trainings of the full model
({" or ".join(map(str, models))} of them; slow rows have the fewer).

In short, with each method's defaults. The ceiling is the square root of the ground truth's reliability, about the
highest score that any estimator can reach:

{summary(found)}

Every row, with 95 % intervals in brackets, queries drawn anew:

{single}

{PUBLISHED}

![LDS by task](figures/lds.png)

### Ensembles

Scores averaged over the models.

{ensemble}

### SOURCE against each row, query by query

The difference of the two LDS, averaged over queries; negative where the row is ahead of SOURCE's defaults. No interval
where the row was computed before SOURCE was computed anew.

{ahead}

### Size

The slope of actual on predicted change over subsets, queries pooled about their means: 1 where scores have the size of
the changes, below 1 where they are too large. LDS, a rank correlation, does not see it.

{slopes}

### Seconds

For scoring all queries on one thread of a shared machine, factors included where the row is the first to need them
(rows further down find what earlier ones left on disk): a rough guide.

{seconds}

### Recipes

Measurements are the margin log p/(1-p) for classes, the absolute error for regressions, the mean token loss for
language. Where a recipe differs from the paper's, it says so. The rows of kronfluence and bergson need the options
`--kronfluence` and `--bergson` as well, the interpreter of an environment that has them; other than 5 full models are
`--seeds`.

{recipes}

Empty cells were not run{refused_of(found)}.
"""


def refused_of(found: dict[str, Report]) -> str:
    """Which rows an estimator does not do, by task."""
    words = [f"{', '.join(report['refused'])} on {name}" for name, report in found.items() if report["refused"]]
    return f", or the estimator refuses them ({'; '.join(words)})" if words else ""


def draw_lds(found: dict[str, Report]) -> None:
    rows = [row for row in rows_of(found, ROWS) if row != "random"]
    figure, axes = plt.subplots(1, len(found), figsize=(1.6 * len(found) + 1.8, 0.26 * len(rows) + 1), sharey=True)
    for axis, (name, report) in zip([axes] if len(found) == 1 else axes, found.items(), strict=True):
        for place, row in enumerate(rows):
            if row not in report["lds"]:
                continue
            entry = report["lds"][row]
            colour = "C1" if row.startswith(("source", "fast-source", "astra-source")) else "C0"
            low, high = entry["interval"]
            axis.plot([low, high], [place, place], color=colour, linewidth=2)
            axis.plot(entry["mean"], place, "o", color=colour, markersize=4)
        if report["reliability"]:
            axis.axvline(report["reliability"] ** 0.5, color="0.6", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", color="0.9")
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
    figure.axes[0].invert_yaxis()
    save(figure, "lds")


OWN = ("source", "fast-source", "astra-source")  # rows that are forms of SOURCE themselves


def behind_section(found: dict[str, Report], ablations: dict[str, Report], shares: dict[str, dict[str, Report]]) -> str:
    """Where another estimator is ahead of SOURCE's defaults, beside a run as long as a retraining."""
    lines = []
    for name, report in found.items():
        ablated = ablations.get(name, {"lds": {}})["lds"]
        for row, entry in report["lds"].items():
            if row.startswith(OWN) or entry.get("source_ahead", 0) >= 0:
                continue
            lines.append(
                [
                    name,
                    row,
                    number(report["lds"]["source"]["mean"], 3),
                    number(entry["mean"], 3),
                    ahead_of(entry),
                    *(
                        number(ablated[own]["mean"], 3) if own in ablated else ""
                        for own in ("run as long as a retraining", f"{row}, run as long")
                    ),
                ]
            )
    text = """### Where SOURCE is not ahead
"""
    if lines:
        head = [
            "task",
            "row",
            "SOURCE",
            "the row",
            "SOURCE ahead by",
            "SOURCE, run as long as a retraining",
            "the row, too",
        ]
        text += "\n" + table(head, lines) + "\n"
    else:
        text += "\nNowhere among these tasks.\n"
    behind = [
        [name, row, *(cell_of_ensemble(report, r) for r in ("source", row))]
        for name, report in found.items()
        for row, entry in report["lds"].items()
        if not row.startswith(OWN) and entry.get("ensemble", -1) > report["lds"]["source"].get("ensemble", 1)
    ]
    if behind:
        head = ["ensemble", "row", "SOURCE", "the row"]
        text += "\nAveraged over the models:\n\n" + table(head, behind) + "\n"
    text += """
What was found of the reasons, with the defaults of the time before queries were taken along the trajectory (the rows
"source, few" and the ablations):

*Steps.* The ground truth is retrained on a part of the examples for as many epochs, hence for that part of the steps:
it stops at an earlier point of training than the full model that the scores come from. On digits-3, whose model still
changes fast when it stops, this counts more than anything else: in the last columns the run on the full data stops
after as many steps as a retraining takes. One averaged snapshot (Fast-SOURCE), whose parameters lie nearer to where the
retrainings end, is ahead of six there for the same reason.

*Small eigenvalues.* A larger Λ raises the score (rows "Λ times 3" and "10" of the ablations): directions of small
curvature count for more than EK-FAC lets them, since it keeps the layers apart and so understates the curvature of
directions that run through several. `cross_layer`, on by default, measures the factor where these rows only try some.

*Adam where the curvature is small.* The hybrid for Adam (App. D of the paper: a diagonal curvature inside the
exponential, the damped inverse of EK-FAC's outside) does not tend to the product ΛP where ΛPσ is small, since the two
curvatures do not cancel there and a factor of their ratio is left. On WikiText-2 that put SOURCE behind TracIn; the
symmetric operator, the default now, has the right limit on both sides and is ahead.

*Noise.* On SST-2, whose ground truth is the least reliable, SOURCE and influence can hardly be told apart.
"""
    if shares:
        text += "\nWith the subsets' share the gap changes as that says:\n\n"
        names = sorted({name for of_share in shares.values() for name in of_share}, key=ORDER.index)
        for name in names:
            columns = {s: of[name] for s, of in shares.items() if name in of}
            if name in ablations:
                columns["0.5"] = found.get(name, ablations[name])
            rows = [row for row in next(iter(columns.values()))["lds"]]
            entries = [[row, *(cell(columns[s], row) for s in sorted(columns))] for row in rows]
            text += table([name, *(f"subsets of {float(s):.0%}" for s in sorted(columns))], entries) + "\n\n"
            text += "\n".join(f"`{of[name]['command']}`\n" for of in shares.values() if name in of)
    return text


def cell_of_ensemble(report: Report, row: str) -> str:
    entry = report["lds"].get(row, {})
    return with_interval(entry["ensemble"], entry["ensemble_interval"]) if "ensemble" in entry else ""


PARTS = {
    "few": "source, few",
    "few, cross-layer": "source, few, cross-layer",
    "trajectory alone": "source, trajectory alone",
    "many (default)": "source",
}


def removal_options_section(found: dict[str, Report]) -> str:
    """What the two parts of the default are worth: the query along the trajectory, and cross-layer curvature."""
    both = {name: r["lds"] for name, r in found.items() if all(row in r["lds"] for row in PARTS.values())}
    if not both:
        return ""
    gains = {name: rows["source"]["mean"] - rows["source, few"]["mean"] for name, rows in both.items()}
    worst = min(gains, key=lambda name: gains[name])
    lines = [
        [name, *(f"{number(rows[row]['mean'], 3)} ({number(rows[row]['slope'])})" for row in PARTS.values())]
        for name, rows in both.items()
    ]
    return f"""### `removal="many"` and `removal="few"`

LDS of single models and, in brackets, the slope of actual on predicted change. `"few"` is SOURCE as in the paper;
`"many"`, the default, takes the query's gradient along the trajectory of the last stage and scales the curvature by
`tr H² / Σ λ²`, what the layers have together beyond their own. Together they change LDS by
{number(statistics.mean(gains.values()), 3)} in the mean and {number(gains[worst], 3)} at worst ({worst}).

{table(["", *PARTS], lines)}
"""


def cell(report: Report, row: str) -> str:
    return number(report["lds"][row]["mean"], 3) if row in report["lds"] else ""
