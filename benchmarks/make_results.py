"""Writes ``docs/results.md``, ``docs/speed.md`` and figures from the committed JSON of the studies, from nothing else.

pip install ".[test]" matplotlib
python benchmarks/make_results.py
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from page import DOCS, Report, by_task, number, reports, rows_of, save, table, with_interval
from page_final_model import final_model_section
from page_lds import behind_section, draw_lds, lds_section, removal_options_section
from page_speed import speed_page


def ablation_section(found: dict[str, Report]) -> str:
    rows = rows_of(found)
    body = table(["single model", *found], by_task(found, lambda f: with_interval(f["mean"], f["interval"]), rows))
    return f"""## 2. Ablations

The first row is the default (L = 1, 6 averaged snapshots, EK-FAC on the true Fisher); each other row changes what it
names. Three trainings each. `python benchmarks/ablations.py --task TASK --data DATA --cache CACHE`

Rows of tasks trained by SGD were not all computed anew after section 1's, which drew other labels for the curvature.

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


DATA = """The digits come with scikit-learn. The others are read from a folder `DATA`:
`uci/{concrete,parkinsons}/data.csv.gz` (UCI, the last column is the target), the four `*-ubyte.gz` files of
Fashion-MNIST (Debian package
`dataset-fashion-mnist`), `sst2/{train,dev}.tsv` (sentence, tab, label), `wikitext2/{valid,test}.txt`, and
`cifar10_subset.safetensors` (`train_images`, `train_labels`, `test_images`, `test_labels`; uint8, channels last)."""


def page() -> str:
    """The text of ``docs/results.md``."""
    first, second = reports("lds"), reports("ablations")
    shares = {share: of_share for share in ("0.3", "0.7") if (of_share := reports(f"share_{share}"))}
    return "\n".join(
        [
            "# Results\n",
            "Made by `python benchmarks/make_results.py` from the JSON in `benchmarks/results`, which the commands",
            f"below write. {DATA}\n",
            lds_section(first),
            behind_section(first, second, shares),
            removal_options_section(first),
            ablation_section(second),
            final_model_section(),
            removal_section(reports("removal")),
            mislabel_section(reports("mislabel")),
        ]
    )


def main() -> None:
    draw_lds(reports("lds"))
    draw_segments(reports("ablations"))
    for name, report in reports("removal").items():
        draw_removal(name, report)
    (DOCS / "results.md").write_text(page())
    speed_page()


if __name__ == "__main__":
    main()
