"""Writes ``docs/results.md`` and its figures from the committed JSON of the studies, and from nothing else.

pip install ".[test]" matplotlib
python benchmarks/make_results.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import final_model_page
import matplotlib.pyplot as plt
from lds_study import RESULTS, ROWS

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = DOCS / "figures"
ORDER = (
    "digits-3",
    "digits-20",
    "digits-adam",
    "digits-adamw",
    "concrete",
    "parkinsons",
    "fashion-noisy",
    "fashion",
    "fashion-small",
    "sst2",
    "wikitext",
    "cifar",
)
PUBLISHED = (
    "Published, at full size (method of the SOURCE paper): Fashion-MNIST SOURCE .46 for one model and .53 for ten,"
    " EK-FAC influence .30 and .45; WikiText-2 with GPT-2 .476 and .468."
)
Report = dict[str, Any]


def reports(kind: str) -> dict[str, Report]:
    """A study's reports by task, in the order of the tables."""
    found = {
        file.stem.removeprefix(f"{kind}_"): json.loads(file.read_text()) for file in RESULTS.glob(f"{kind}_*.json")
    }
    return {name: found[name] for name in ORDER if name in found}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1)


def with_interval(value: float, interval: list[float]) -> str:
    return f"{number(value)} ({number(interval[0])}–{number(interval[1])})"


def by_task(found: dict[str, Report], cell: Callable[[Report], str], rows: Iterable[str]) -> list[list[str]]:
    return [[row, *(cell(r["lds"][row]) if row in r["lds"] else "" for r in found.values())] for row in rows]


def rows_of(found: dict[str, Report], first: Iterable[str] = ()) -> list[str]:
    known = dict.fromkeys(row for report in found.values() for row in report["lds"])
    return [row for row in dict.fromkeys([*first, *known]) if row in known]


# -------------------------------------------------------------------- study 1


def ahead_of(entry: dict[str, Any]) -> str:
    """How far SOURCE is ahead of a row; without the interval where SOURCE was computed anew since the row was."""
    if "source_ahead_interval" in entry:
        return with_interval(entry["source_ahead"], entry["source_ahead_interval"])
    return number(entry["source_ahead"]) if "source_ahead" in entry else ""


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
the subset and what the scores predict. In brackets: 95 % intervals, queries drawn anew. Each figure is the mean over
trainings of the full model ({" or ".join(map(str, models))} of them; slow rows have the fewer).

{single}

The square root of the reliability is about the highest score that any estimator can reach on that ground truth.
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
language. Where a recipe differs from the paper's, it says so.

{recipes}

Empty cells were not run. Nor was bergson, the other implementation of SOURCE for language models, on the model of
WikiText-2.
"""


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


CROSS_LAYER = "source, cross-layer"
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
        [name, row, *(cell_of_ensemble(report, r) for r in ("source", CROSS_LAYER, row))]
        for name, report in found.items()
        for row, entry in report["lds"].items()
        if not row.startswith(OWN) and entry.get("ensemble", -1) > report["lds"]["source"].get("ensemble", 1)
    ]
    if behind:
        head = ["ensemble", "row", "SOURCE", "SOURCE, cross-layer", "the row"]
        text += "\nAveraged over the models:\n\n" + table(head, behind) + "\n"
    text += """
Three reasons were found.

*Steps.* The ground truth is retrained on a part of the examples for as many epochs, hence for that part of the steps:
it stops at an earlier point of training than the full model that the scores come from. On digits-3, whose model still
changes fast when it stops, this counts more than anything else: in the last columns the run on the full data stops
after as many steps as a retraining takes, and SOURCE is ahead. One averaged snapshot (Fast-SOURCE), whose parameters
lie nearer to where the retrainings end, is ahead of six there for the same reason, and normalised gradients (the
cosine), blind to how far training got, are too. With subsets of 70 %, whose retrainings end nearer to the full model,
SOURCE on the whole run is ahead of the cosine and of the shorter run, and Fast-SOURCE's lead shrinks. On fashion-noisy,
as short in epochs but with noisy labels and a lower rate, the shorter run is no better.

*Small eigenvalues.* A larger Λ raises the score (rows "Λ times 3" and "10" of the ablations): directions of small
curvature count for more than SOURCE's defaults let them; on digits-20 K-FAC's eigenvalues, smaller there than EK-FAC's,
do the same. One reason is that EK-FAC keeps the layers apart and so understates the curvature of directions that run
through several. With one segment of SGD, and but for weight decay, curvature times a factor orders examples just as
that Λ times the factor does, and divides the scores by it. `cross_layer=True` measures the factor where the rows "Λ
times" only try some; the next section has what it gains. Influence with its default damping, in inner layers far below
1/Λ, resolves flat directions as well, which is how it comes close on Concrete, and is ahead in the ensemble, where
their noise averages out; cross-layer curvature closes a part of that gap, not all. A run as short as a retraining is no
better there.

*Adam where the curvature is small.* On WikiText-2 TracIn is far ahead of every other row, and SOURCE is not ahead of
influence or of gradient products. The number of steps is not why: the run as long as a retraining scores about as the
whole one. Nor is it too much curvature: with a tenth of Λ, where SOURCE should come near to TracIn's products, it
falls. The hybrid for Adam (App. D of the paper: a diagonal curvature inside the exponential, the damped inverse of
EK-FAC's outside) does not tend to the product ΛP where ΛPσ is small, since the two curvatures do not cancel there and a
factor of their ratio is left. SOURCE without the preconditioner, which has the right limit, is ahead of SOURCE with it;
on digits-adam, where the curvature is large, it is the other way round. One symmetric operator in place of the hybrid
(`adaptive="symmetric"`, the rows "source, symmetric") has the right limit on both sides.

*Noise.* On SST-2 and CIFAR-10, whose ground truths are the least reliable, SOURCE and influence cannot be told apart.
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
    return text


def cell_of_ensemble(report: Report, row: str) -> str:
    entry = report["lds"].get(row, {})
    return with_interval(entry["ensemble"], entry["ensemble_interval"]) if "ensemble" in entry else ""


def cross_layer_section(found: dict[str, Report]) -> str:
    """What the curvature that layers have together changes; empty before it was measured."""
    both = {name: r["lds"] for name, r in found.items() if CROSS_LAYER in r["lds"]}
    if not both:
        return ""
    lines, gains, together = [], {}, {}
    for name, rows in both.items():
        plain, scaled = rows["source"], rows[CROSS_LAYER]
        gains[name] = -scaled["source_ahead"]
        together[name] = scaled["ensemble"] - plain["ensemble"]
        low, high = scaled["source_ahead_interval"]
        lines.append(
            [
                name,
                number(plain["mean"], 3),
                number(scaled["mean"], 3),
                f"{number(gains[name], 3)} ({number(-high, 3)}–{number(-low, 3)})",
                number(plain["ensemble"], 3),
                number(scaled["ensemble"], 3),
                number(plain["slope"]),
                number(scaled["slope"]),
            ]
        )
    head = ["", "LDS", "cross-layer", "gain", "ensemble", "cross-layer", "slope", "cross-layer"]

    def summed(of: dict[str, float]) -> str:
        worst = min(of, key=lambda name: of[name])
        return f"{number(statistics.mean(of.values()), 3)} in the mean, {number(of[worst], 3)} at worst ({worst})"

    return f"""### Cross-layer curvature

`cross_layer=True` scales a segment's curvature by `tr H² / Σ λ²`, what the layers have together beyond their own. It
changes single models' LDS by {summed(gains)} and ensembles' by {summed(together)}.

{table(head, lines)}
"""


def two_stage_section() -> str:
    """The study of :mod:`lds_two_stage`, whose file has a form of its own; empty without it."""
    file = RESULTS / "lds_two_stage.json"
    if not file.exists():
        return ""
    report = json.loads(file.read_text())
    kinds = list(next(iter(report["lds"].values())))
    rows = [[row, *(number(statistics.mean(f[kind])) for kind in kinds)] for row, f in report["lds"].items()]
    return (
        "### Two stages\n\nDigits, then rotated digits: examples of the first stage, asked from the end of the second."
        f" Mean of {report['seeds']} trainings. `python benchmarks/lds_two_stage.py`\n\n"
        + table(["single model", *kinds], rows)
        + "\n"
    )


def cell(report: Report, row: str) -> str:
    return number(report["lds"][row]["mean"], 3) if row in report["lds"] else ""


# -------------------------------------------------------------------- study 2


def ablation_section(found: dict[str, Report]) -> str:
    rows = rows_of(found)
    body = table(["single model", *found], by_task(found, lambda f: with_interval(f["mean"], f["interval"]), rows))
    return f"""## 2. Ablations

The first row is the default (L = 1, 6 averaged snapshots, EK-FAC on the true Fisher); each other row changes what it
names. Three trainings each. Rows of tasks trained by SGD were not all computed anew after section 1's, which drew
other labels for the curvature.

{body}

![LDS by number of segments](figures/segments.png)

{automatic(found)}"""


def automatic(found: dict[str, Report]) -> str:
    """What a fixed number of segments loses on each task, which is what an automatic rule would have to beat."""
    counts = {1: "source", 2: "L=2, means", 3: "L=3, means", 6: "L=6, means"}
    lines, worst = [], dict.fromkeys(counts, 0.0)
    for name, report in found.items():
        lds = {count: report["lds"][row]["mean"] for count, row in counts.items() if row in report["lds"]}
        best = max(lds.values())
        lines.append([name, *(number(best - lds[count]) if count in lds else "" for count in counts)])
        worst = {count: max(worst[count], best - lds.get(count, best)) for count in counts}
    lines.append(["**worst**", *(f"**{number(worst[count])}**" for count in counts)])
    most = max(worst.values())
    return (
        "### Automatic segmentation\n\n"
        "What each number of segments loses against the best of these four on the task:\n\n"
        + table(["", *(f"L={count}" for count in counts)], lines)
        + f"\n\nOne segment is {'' if worst[1] <= 0.02 else 'not '}within .02 of the best on every task (at most"
        f" {number(worst[1], 3)} behind, where another fixed number loses up to {number(most, 3)}), so a rule that"
        ' reads the curvature could gain no more than that. `segments="auto"` takes one segment per stage.\n'
    )


def draw_segments(found: dict[str, Report]) -> None:
    figure, axis = plt.subplots(figsize=(5, 3))
    counts = {1: "source", 2: "L=2, means", 3: "L=3, means", 6: "L=6, means"}
    for index, (name, report) in enumerate(found.items()):
        for style, pick in (("-", counts), ("--", {c: f"L={c}, points" for c in counts})):
            known = [(c, report["lds"][row]["mean"]) for c, row in pick.items() if row in report["lds"]]
            if not known:
                continue
            label = name if style == "-" else None
            axis.plot(*zip(*known, strict=True), style, marker="o", markersize=3, color=f"C{index}", label=label)
    axis.set_xlabel("segments (solid: averaged snapshots, dashed: points)")
    axis.set_ylabel("LDS")
    axis.set_xticks(list(counts))
    axis.legend(fontsize=7)
    axis.grid(color="0.9")
    save(figure, "segments")


# -------------------------------------------------------------------- study 4


def removal_section(found: dict[str, Report]) -> str:
    parts = [
        """## 4. Subset removal and mislabel detection

### Subset removal

Share of correctly classified queries that are misclassified after the top proponents of each were removed and the
network was retrained, mean of three retrainings; 95 % intervals over queries.
"""
    ]
    for name, report in found.items():
        rows = [
            [row, *(with_interval(s, i) for s, i in zip(entry["share"], entry["interval"], strict=True))]
            for row, entry in report["flipped"].items()
        ]
        parts.append(
            f"**{name}**: {report['note']}. {report['queries']} queries, {report['examples']} examples."
            f" `{report['command']}`\n\n"
            + table(["removed", *map(str, report["sizes"])], rows)
            + f"\n\n![Flips by number of removed examples](figures/removal_{name}.png)\n"
        )
    return "\n".join(parts)


def draw_removal(name: str, report: Report) -> None:
    figure, axis = plt.subplots(figsize=(5, 3))
    for row, entry in report["flipped"].items():
        style = {"color": "0.5", "linestyle": ":"} if row.startswith("random") else {}
        axis.plot(report["sizes"], entry["share"], marker="o", markersize=3, label=row, **style)
    axis.set_xlabel("removed proponents")
    axis.set_ylabel("share of queries flipped")
    axis.legend(fontsize=7)
    axis.grid(color="0.9")
    save(figure, f"removal_{name}")


def mislabel_section(found: dict[str, Report]) -> str:
    parts = [
        """### Mislabel detection

AUC of each example's score on its own loss against which labels were replaced, and the share of the wrong labels found
when that share of the examples is inspected, most suspect first. Mean of the trainings.
"""
    ]
    for name, report in found.items():
        for share, rows in report["noise"].items():
            lines = [
                [row, with_interval(f["mean"], f["interval"]), *(number(v) for v in f["found"])]
                for row, f in rows.items()
            ]
            head = [f"{name}, {float(share):.0%} wrong", "AUC", *(f"{i:.0%} inspected" for i in report["inspected"])]
            parts.append(table(head, lines) + "\n")
        parts.append(f"{report['note']}. `{report['command']}`\n")
    return "\n".join(parts)


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


DATA = """The digits come with scikit-learn. The others are read from a folder `DATA`:
`uci/{concrete,parkinsons}/data.csv.gz` (UCI, the last column is the target), the four `*-ubyte.gz` files of
Fashion-MNIST (Debian package
`dataset-fashion-mnist`), `sst2/{train,dev}.tsv` (sentence, tab, label), `wikitext2/{valid,test}.txt`, and
`cifar10_subset.safetensors` (`train_images`, `train_labels`, `test_images`, `test_labels`; uint8, channels last)."""


def main() -> None:
    first, second = reports("lds"), reports("ablations")
    shares = {share: reports(f"share_{share}") for share in ("0.3", "0.7")}
    removal, mislabel = reports("removal"), reports("mislabel")
    draw_lds(first)
    draw_segments(second)
    for name, report in removal.items():
        draw_removal(name, report)
    text = "\n".join(
        [
            "# Results\n",
            "Made by `python benchmarks/make_results.py` from the JSON in `benchmarks/results`, which the commands",
            f"below write. {DATA}\n",
            lds_section(first),
            behind_section(first, second, {share: found for share, found in shares.items() if found}),
            cross_layer_section(first),
            two_stage_section(),
            ablation_section(second),
            final_model_page.section(RESULTS),
            removal_section(removal),
            mislabel_section(mislabel),
        ]
    )
    (DOCS / "results.md").write_text(text)


if __name__ == "__main__":
    main()
