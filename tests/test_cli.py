"""SourceCallback in the config of a LightningCLI, and the subcommands of SourceCLI, against the Python API."""

import inspect
import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, classes, mlp
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lightning_source import InfluenceScores, SourceCallback, SourceScorer

pytest.importorskip("jsonargparse")
from lightning_source.cli import SourceCLI

# Another value than the default for each argument of SourceCallback.
ARGUMENTS = {
    "dirpath": "elsewhere",
    "segments": [2, 4],
    "snapshots_per_segment": 2,
    "curvature": "kfac",
    "snapshots": "point",
    "factor_examples": None,
    "label_samples": 2,
    "measurement": "margin",
    "include": ["net.*"],
    "exclude": ["net.0"],
    "mode": "deferred",
    "optimizer": 0,
    "overwrite": True,
    "seed": 3,
    "passes": "eval",
    "keep": "covariances",
}
TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(Classifier):
    def __init__(self, hidden: int = 5) -> None:
        super().__init__(mlp(hidden=hidden))
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))


class Data(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.test = classes(3, seed=4) if stage == "test" else None

    def train_dataloader(self):
        return DataLoader(classes(), 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(classes(4, seed=2), 3)

    def test_dataloader(self):
        return [DataLoader(self.test, 3)]

    def predict_dataloader(self):
        return [DataLoader(classes(4), 2), DataLoader(classes(4), 2)]


def cli(*arguments, model=Model, data=Data):
    return SourceCLI(model, data, args=[str(argument) for argument in arguments], seed_everything_default=0)


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, its config and its checkpoint, made by ``fit``."""
    path = tmp_path_factory.mktemp("cli")
    callbacks = [{"class_path": "lightning_source.SourceCallback", "init_args": {"dirpath": str(path / "run")}}]
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(path), "filename": "last"},
    }
    trainer = TRAINER | {"callbacks": [*callbacks, checkpoint], "default_root_dir": str(path)}
    config = path / "given.json"  # JSON is YAML
    config.write_text(json.dumps({"trainer": trainer, "model": {"hidden": 4}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py"])
        cli("fit", "-c", config)
    return path


def asked(place, command, *arguments):
    """The subcommand with the config that ``fit`` saved."""
    return cli(command, "-c", place / "config.yaml", *arguments)


def refused(capsys, place, command, *arguments):
    with pytest.raises(SystemExit) as ended:
        asked(place, command, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def of_run(place, query, **options):
    measurement = options.pop("measurement", "loss")
    scorer = SourceScorer.from_run(place / "run", Model(4), measurement=measurement)
    return scorer.score(query, classes(), **options)


# ---------------------------------------------------------------- the callback in a config


def test_these_are_all_arguments_of_the_callback():
    defaults = {name: p.default for name, p in inspect.signature(SourceCallback).parameters.items()}
    assert defaults.keys() == ARGUMENTS.keys()
    assert all(defaults[name] != value for name, value in ARGUMENTS.items())


@pytest.mark.parametrize("way", ["config", "shell"])
def test_every_argument_reaches_the_callback(tmp_path, capsys, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    if way == "config":
        entry = {"class_path": "lightning_source.SourceCallback", "init_args": ARGUMENTS}
        Path("given.json").write_text(json.dumps({"trainer": {"callbacks": [entry]}}))
        arguments = ["-c", "given.json"]
    else:
        arguments = ["--trainer.callbacks", "lightning_source.SourceCallback"]
        for name, value in ARGUMENTS.items():
            arguments += [f"--trainer.callbacks.{name}", value if isinstance(value, str) else json.dumps(value)]
    assert _arguments_of(SourceCLI(Model, Data, args=arguments, run=False)) == ARGUMENTS
    with pytest.raises(SystemExit):
        SourceCLI(Model, Data, args=[*arguments, "--print_config"], run=False)
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert _arguments_of(SourceCLI(Model, Data, args=["-c", "printed.yaml"], run=False)) == ARGUMENTS


def _arguments_of(parsed):
    (callback,) = (callback for callback in parsed.trainer.callbacks if isinstance(callback, SourceCallback))
    session = callback._session
    kept = vars(callback) | vars(callback.settings) | {"include": session.include, "exclude": session.exclude}
    return {name: kept[name] for name in ARGUMENTS}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segments", "many"),
        ("snapshots_per_segment", "1.5"),
        ("snapshots", "median"),
        ("curvature", "full"),
        ("measurement", "accuracy"),
        ("mode", "later"),
        ("passes", "both"),
        ("keep", "everything"),
        ("include", "7"),
        ("nonsense", "1"),
    ],
)
def test_a_wrong_argument_is_refused_by_the_parser(capsys, name, value):
    arguments = ["--trainer.callbacks", "lightning_source.SourceCallback", f"--trainer.callbacks.{name}", value]
    with pytest.raises(SystemExit) as ended:
        SourceCLI(Model, Data, args=arguments, run=False)
    assert ended.value.code == 2
    assert name in capsys.readouterr().err


def test_help_describes_every_argument(capsys):
    with pytest.raises(SystemExit) as ended:
        cli("fit", "--trainer.callbacks.help", "lightning_source.SourceCallback")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"--trainer.callbacks.{name} " in text for name in ARGUMENTS)
    assert "optimizer steps at which inner segments begin" in " ".join(text.split())


# ---------------------------------------------------------------- attribute


def test_attribute_writes_the_scores_of_the_run(place, tmp_path, capsys):
    out = tmp_path / "scores.safetensors"
    asked(place, "attribute", "--out", out, "-k", 2)
    written, expected = InfluenceScores.load(out), of_run(place, classes(4, seed=2))
    assert torch.equal(written.values, expected.values)
    assert written.metadata == expected.metadata
    text = capsys.readouterr().out
    assert text.startswith(f"{out}: 4 queries x 24 training examples, method source, measurement loss\nPositive:")
    values, ids = expected.proponents(2)
    listed = ", ".join(f"#{n} {value:+.3g}" for n, value in zip(ids[3].tolist(), values[3].tolist(), strict=True))
    assert f"query 3, proponents: {listed}\n" in text


def test_run_and_measurement_are_the_callbacks(place, tmp_path):
    callback = {"callbacks": "lightning_source.SourceCallback"}
    callback |= {"callbacks.dirpath": place / "run", "callbacks.measurement": "margin", "accelerator": "cpu"}
    given = [part for name, value in callback.items() for part in (f"--trainer.{name}", value)]
    cli("attribute", "--model.hidden", 4, *given, "--out", tmp_path / "scores")
    expected = of_run(place, classes(4, seed=2), measurement="margin")
    assert torch.equal(InfluenceScores.load(tmp_path / "scores").values, expected.values)


def test_attribute_prints_json_alone(place, tmp_path, capsys):
    out = tmp_path / "scores.safetensors"
    asked(place, "attribute", "--out", out, "-k", 1, "--json", "--query", "train")
    found = json.loads(capsys.readouterr().out)
    scores = InfluenceScores.load(out)
    assert (found["queries"], found["examples"], found["out"]) == (24, 24, str(out))
    assert found["metadata"] == scores.metadata
    assert found["rows"] == [row._asdict() for row in scores.rows(1)]


def test_questions_reach_the_scorer(place, tmp_path):
    out = tmp_path / "scores.safetensors"
    arguments = [
        "--measurement",
        "margin",
        "--options.segments",
        2,
        "--options.removal",
        "few",
        "--per_segment",
        "true",
        "--per_layer",
        "true",
    ]
    asked(place, "attribute", "--out", out, "--query", "test", "--stage", 0, "--stderr", "true", *arguments)
    expected = of_run(
        place,
        classes(3, seed=4),
        measurement="margin",
        segments=2,
        removal="few",
        per_segment=True,
        per_layer=True,
        stderr=True,
    )
    written = InfluenceScores.load(out)
    for name in ("values", "by_segment", "by_layer", "stderr"):
        assert torch.equal(getattr(written, name), getattr(expected, name))


def test_an_earlier_moment_may_be_asked_about(place, tmp_path):
    out = tmp_path / "scores.safetensors"
    asked(place, "attribute", "--out", out, "--query", "test", "--at", 1)
    scores = InfluenceScores.load(out)
    assert scores.metadata["step"] == 1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scores.values, of_run(place, classes(3, seed=4)).values)


@pytest.mark.parametrize("names", [("0", "1"), ("inputs", "targets")])
def test_a_query_may_be_a_file_of_one_batch(place, tmp_path, names):
    class Named(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                [batch[name] for name in names] if isinstance(batch, dict) else batch, batch_idx
            )

    batch = [tensor.contiguous() for tensor in classes(4, seed=2).tensors]
    save_file(dict(zip(names, batch, strict=True)), tmp_path / "query.safetensors")
    out = tmp_path / "scores.safetensors"
    arguments = ["--method", "grad-dot", "--query", tmp_path / "query.safetensors", "--out", out]
    cli("attribute", "-c", place / "config.yaml", *arguments, model=Named)
    torch.testing.assert_close(
        InfluenceScores.load(out).values, of_run(place, batch, method="grad-dot").values, rtol=0, atol=0
    )


def test_another_run_is_named(place, tmp_path):
    (place / "run").rename(tmp_path / "moved")
    try:
        asked(place, "attribute", "--run", tmp_path / "moved", "--out", tmp_path / "scores")
    finally:
        (tmp_path / "moved").rename(place / "run")
    assert torch.equal(InfluenceScores.load(tmp_path / "scores").values, of_run(place, classes(4, seed=2)).values)


def test_a_checkpoint_is_attributed_by_its_weights_and_hyperparameters(place, tmp_path):
    config = tmp_path / "no_callback.json"  # nor the number of hidden units, which the checkpoint knows
    config.write_text(json.dumps({"trainer": TRAINER}))
    out = tmp_path / "scores.safetensors"
    cli("attribute", "-c", config, "--ckpt_path", place / "last.ckpt", "--rate", 0.5, "--out", out)
    model = Model.load_from_checkpoint(place / "last.ckpt")
    scorer = SourceScorer.from_model(model, DataLoader(classes(), 8), rate=0.5)
    assert torch.equal(InfluenceScores.load(out).values, scorer.score(classes(4, seed=2)).values)


def test_it_never_trains(place, tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("training began")

    monkeypatch.setattr(L.Trainer, "fit", forbidden)
    monkeypatch.setattr(Model, "configure_optimizers", forbidden)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    asked(place, "attribute", "--out", tmp_path / "scores")
    changed = {path for path in place.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert changed == set()


def test_hooks_see_the_trainer_before_the_loaders(place, tmp_path):
    class Reading(Data):
        def setup(self, stage):
            super().setup(stage)
            assert self.trainer.datamodule is self

    class Configured(Model):
        def setup(self, stage):
            self.seen = self.trainer.datamodule is not None

        def configure_model(self):
            self.configured = self.seen

    done = cli("attribute", "-c", place / "config.yaml", "--out", tmp_path / "scores", model=Configured, data=Reading)
    assert done.model.configured
    assert done.model._trainer is None


def test_loaders_of_the_module_serve(place, tmp_path):
    class WithLoaders(Model):
        train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"trainer": TRAINER, "model": {"hidden": 4}}))
    SourceCLI(
        WithLoaders,
        args=["attribute", "-c", str(config), "--run", str(place / "run"), "--out", str(tmp_path / "scores")],
        seed_everything_default=0,
    )
    assert torch.equal(InfluenceScores.load(tmp_path / "scores").values, of_run(place, classes(4, seed=2)).values)


def test_a_function_may_make_the_trainer(place, tmp_path):
    def trainer(max_epochs: int = 1, callbacks: list[L.Callback] | None = None) -> L.Trainer:
        return L.Trainer(max_epochs=max_epochs, callbacks=callbacks, accelerator="cpu", devices=2, strategy="ddp")

    out = tmp_path / "scores"
    arguments = ["attribute", "--model.hidden", "4", "--run", str(place / "run"), "--out", str(out)]
    SourceCLI(Model, Data, trainer_class=trainer, args=arguments, seed_everything_default=0)  # one process, no ranks
    assert torch.equal(InfluenceScores.load(out).values, of_run(place, classes(4, seed=2)).values)


# ---------------------------------------------------------------- report


def test_report_scores_or_reads(place, tmp_path, capsys):
    pytest.importorskip("jinja2")
    asked(place, "report", "--out", tmp_path / "one.html", "-k", 2)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'one.html'}: 4 queries x 24 training examples")
    asked(place, "attribute", "--out", tmp_path / "scores")
    (tmp_path / "run").mkdir()  # no run is asked
    asked(place, "report", "--scores", tmp_path / "scores", "--run", "none", "--out", tmp_path / "two.html", "-k", 2)
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()


def test_report_says_before_scoring_what_is_missing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_source.report.page._installed", lambda module: module != "jinja2")
    monkeypatch.setattr(SourceCLI, "_data", None)
    assert "needs Jinja2. HINT" in refused(capsys, place, "report", "--out", tmp_path / "one.html")


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], 'Parser key "method"'),
        (["--measurement", "accuracy"], 'Parser key "measurement"'),
        (["--options.depht", "3"], "Unexpected keys: {'depht'}"),
        (["--options.damping", "0.1"], 'error: `method="source"` takes no option `damping`'),
        (["-k", "0"], 'Parser key "k"'),
        (["--query", "validation"], "is none of train, val, test, predict, and there is no such file"),
        (["--query", __file__], "is no safetensors file"),
        (["--query", "predict"], "gives no single DataLoader but `list`"),
        (["--out", "nowhere/scores"], "there is no such folder"),
        (["--run", "nowhere"], "error: `nowhere` holds no run"),
        (["--stage", "7"], "error: "),
        (["--at", "epoch 99"], "`at='epoch 99'` is no point of this run"),
        (["--rate", "1.0"], "HINT: give `--ckpt_path`, too"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--ckpt_path", __file__], "no checkpoint"),
        (["--ckpt_path", "CHECKPOINT"], "rate"),
        (["--ckpt_path", "CHECKPOINT", "--at", "3"], "`--at` is a moment of a run"),
        (["--ckpt_path", "CHECKPOINT", "--run", "RUN"], "HINT: give one of them"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_two(place, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    known = {"CHECKPOINT": place / "last.ckpt", "RUN": place / "run"}
    error = refused(capsys, place, "attribute", *(known.get(argument, argument) for argument in arguments))
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "scores.safetensors").exists()


def test_a_checkpoint_of_another_model_is_refused(place, tmp_path, capsys):
    torch.save({"state_dict": {"other": torch.zeros(2)}}, tmp_path / "other.ckpt")
    error = refused(capsys, place, "attribute", "--ckpt_path", tmp_path / "other.ckpt", "--out", tmp_path / "scores")
    assert "is no checkpoint of `Model`" in error


def test_without_a_run_it_says_how_to_name_one(place, tmp_path, capsys):
    config = tmp_path / "no_callback.json"
    config.write_text(json.dumps({"trainer": TRAINER}))
    with pytest.raises(SystemExit) as ended:
        cli("attribute", "-c", config)
    assert ended.value.code == 2
    assert "HINT: `--run DIR`" in capsys.readouterr().err


def test_without_jsonargparse_it_names_the_extra(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", False)
    with pytest.raises(Exception, match=r"HINT: `pip install 'lightning_source\[cli\]'`"):
        cli("attribute")


def test_what_the_users_code_raises_is_not_hidden(place, tmp_path):
    class Broken(Data):
        def prepare_data(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli("attribute", "-c", place / "config.yaml", "--out", tmp_path / "scores", data=Broken)


def test_lightnings_own_subcommands_are_there(place, tmp_path):
    done = asked(place, "validate", "--trainer.default_root_dir", tmp_path)
    assert "val" in done.trainer.callback_metrics
