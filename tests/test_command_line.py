"""The command line: what it prints, as text and as JSON, and its exit codes."""

import csv
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import QUERY, Classifier, classes, fitted, mlp
from scipy import stats

from lightning_source import InfluenceScores
from lightning_source.command_line.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    trainer = fitted(path, exclude=["net.0"], segments=2)
    trainer.attribute(QUERY, method="source").save(path / "one.safetensors")
    trainer.attribute(QUERY, method="influence").save(path / "other.safetensors")
    (path / "second").mkdir()
    fitted(path / "second", Classifier(mlp()), classes(16), max_epochs=1)
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_inspect(place, capsys):
    code, text, _ = run(capsys, "inspect", place / "run")
    assert code == 0
    assert "finished, 6 steps" in text
    assert "attributed: 33.96% of the trained parameters in 1 blocks" in text
    assert "not attributed: net.0.weight" in text
    assert "Λ = 0.3" in text
    code, text, _ = run(capsys, "inspect", place / "run", "--json")
    found = json.loads(text)
    assert found["steps"] == 6
    assert [segment["rates"] for segment in found["segments"]] == [[pytest.approx(0.3)]] * 2
    assert all(segment["factors"] for segment in found["segments"])
    assert found["bytes"]["all"] == sum(size for kind, size in found["bytes"].items() if kind != "all")
    assert found["missing_files"] == []


def test_export_has_the_order_and_the_values_of_the_scores(place, capsys):
    scores = InfluenceScores.load(place / "one.safetensors")
    code, text, _ = run(capsys, "export", place / "one.safetensors", "-k", 3)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert code == 0
    assert len(rows) == 4 * 2 * 3
    first = [row for row in rows if row["query"] == "0" and row["side"] == "proponent"]
    assert [int(row["train"]) for row in first] == scores.proponents(3)[1][0].tolist()
    for row in rows:
        assert float(row["score"]) == float(scores.values[int(row["query"]), int(row["train"])])
    run(capsys, "export", place / "one.safetensors", "--json", "--out", place / "rows.json", "-k", 1)
    assert len(json.loads((place / "rows.json").read_text())) == 8


def test_diff_of_scores_is_scipys(place, capsys):
    one, other = (InfluenceScores.load(place / f"{name}.safetensors") for name in ("one", "other"))
    code, text, _ = run(capsys, "diff", place / "one.safetensors", place / "other.safetensors", "--json", "-k", 5)
    found = json.loads(text)
    pairs = list(zip(one.values.double().numpy(), other.values.double().numpy(), strict=True))
    assert code == 1
    assert found["pearson"] == pytest.approx(sum(stats.pearsonr(a, b)[0] for a, b in pairs) / 4)
    assert found["spearman"] == pytest.approx(sum(stats.spearmanr(a, b)[0] for a, b in pairs) / 4)
    tops = [[set(row.tolist()) for row in scores.values.topk(5, 1).indices] for scores in (one, other)]
    assert found["top_5_overlap"] == pytest.approx(sum(len(a & b) / 5 for a, b in zip(*tops, strict=True)) / 4)
    assert found["metadata"]["method"] == ["source", "influence"]
    assert run(capsys, "diff", place / "one.safetensors", place / "one.safetensors")[0] == 0


def test_ranks_share_ties(tmp_path, capsys):
    for name, values in (("a", [[1.0, 1.0, 2.0, 3.0]]), ("b", [[2.0, 1.0, 2.0, 5.0]])):
        InfluenceScores(torch.tensor(values), torch.arange(4), torch.arange(1)).save(tmp_path / name)
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert found["spearman"] == pytest.approx(stats.spearmanr([1, 1, 2, 3], [2, 1, 2, 5])[0])


def test_diff_of_runs(place, capsys):
    code, text, _ = run(capsys, "diff", place / "run", place / "second" / "run", "--json")
    found = json.loads(text)
    assert code == 1
    assert found["steps"] == [6, 2]
    assert found["settings.segments"] == [2, 1]
    assert found["stages.0.examples"] == [24, 16]
    assert run(capsys, "diff", place / "run", place / "run")[:2] == (0, "no difference\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere"), "holds no run"),
        (("export", "nowhere.safetensors"), "nowhere.safetensors"),
        (("diff", "nowhere.safetensors", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_wrong_input_is_one_line_and_an_exit_code(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1


def test_other_examples_are_not_compared(tmp_path, capsys):
    for count in (3, 4):
        InfluenceScores(torch.rand(1, count), torch.arange(count), torch.arange(1)).save(tmp_path / str(count))
    code, _, error = run(capsys, "diff", tmp_path / "3", tmp_path / "4")
    assert code == 2
    assert "other `train_ids`" in error


def test_a_table_of_pandas(place):
    pandas = pytest.importorskip("pandas")
    scores = InfluenceScores.load(place / "one.safetensors")
    whole = scores.to_pandas()
    assert whole.shape == tuple(scores.values.shape)
    assert torch.equal(torch.from_numpy(whole.to_numpy(copy=True)), scores.values)
    rows = scores.to_pandas(2)
    assert isinstance(rows, pandas.DataFrame)
    assert len(rows) == 4 * 2 * 2
    best = rows[(rows["rank"] == 1) & (rows["side"] == "proponent")]
    assert best["score"].tolist() == scores.values.max(1).values.tolist()


# ---------------------------------------------------------------- completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["in"], {"inspect"}),
        (["diff", "--j"], {"--json"}),
        (["export", "sc"], {"scores.safetensors"}),
        (["diff", "scores.safetensors", "ru"], {"run"}),
        (["export", "scores.safetensors", "--out", "r"], {"run"}),
    ],
)
def test_bash_completes_what_the_script_says(tmp_path, capsys, words, expected):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    (tmp_path / "scores.safetensors").touch()
    (tmp_path / "run").mkdir()
    line = " ".join(["lightning-source", *words])
    script = f"""
    source ./completion.sh
    function=$(complete -p lightning-source | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE="{line}"; COMP_POINT={len(line)}
    $function lightning-source {words[-1]}
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected, done.stderr


def test_completion_without_shtab_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert "HINT: pip install 'lightning_source[cli]'" in capsys.readouterr().err
