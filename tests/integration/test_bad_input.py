"""What goes wrong gives one clear error, or works, and takes nothing away that was computed."""

import json
import os

import lightning as L
import pytest
import torch
from helpers import QUERY, Classifier, classes, fitted, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Rprop
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_source import SourceCallback, SourceScorer, attribute


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run for tests that only ask it."""
    return fitted(tmp_path_factory.mktemp("finished"), max_epochs=1)


def loader(data=None, batch_size=8):
    return DataLoader(data or classes(), batch_size, shuffle=True)


# ---------------------------------------------------------------- the constructor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments=0"),
        ({"segments": -2}, "segments=-2"),
        ({"segments": "many"}, "segments"),
        ({"segments": [5, -1]}, "segments"),
        ({"snapshots_per_segment": 0}, "snapshots_per_segment=0"),
        ({"label_samples": 0}, "label_samples=0"),
        ({"factor_examples": 0}, "factor_examples=0"),
        ({"snapshots": "median"}, 'snapshots="median"` must be one of mean, point'),
        ({"curvature": "exact"}, "ekfac, kfac, diagonal"),
        ({"mode": "online"}, "fit, deferred"),
        ({"measurement": "accuracy"}, "measurement.*loss, margin, log-prob"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        SourceCallback(**options)


# ---------------------------------------------------------------- refused before the first step


class Frozen(Classifier):
    """Nothing but a parameter in no layer, with too many entries for a gradient of each example."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.scale = nn.Parameter(torch.ones(3, 400_000))

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0][:, :3] * self.scale.mean(1), batch[1])


class TwoOptimizers(Classifier):
    def __init__(self):
        super().__init__(mlp())
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, *others = self.parameters()
        return SGD([first], 0.1), SGD(others, 0.1)


def optimized(make):
    return lambda: Classifier(mlp(), optimizer=make)


# name: (module, message); what is refused of the data is in capture/test_data.py
REFUSED = {
    "no layer": (Frozen, r"no layer.*\n.*\n.*scale \(.*\)"),
    "unknown optimizer": (optimized(lambda p: Rprop(p, 0.1)), "`Rprop`.*Known optimizers: .*SGD"),
    "two optimizers": (TwoOptimizers, r"`TwoOptimizers` has 2 optimizers.*optimizer=0"),
    "nothing included": (lambda: Classifier(mlp()), "net.2.bias.*not included"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_recorded_is_refused_before_the_first_step(tmp_path, case):
    make, message = REFUSED[case]
    include = ["other"] if case == "nothing included" else None
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run"), include=include))
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((MisconfigurationException, ValueError), match=f"(?s){message}"):
        trainer.fit(module, loader())
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not (tmp_path / "run" / "manifest.json").exists()


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_existing_run_is_refused_and_stays(tmp_path):
    fitted(tmp_path)
    before = contents(tmp_path / "run")
    with pytest.raises(MisconfigurationException, match=r"already holds a run.*overwrite=True"):
        fitted(tmp_path)
    assert contents(tmp_path / "run") == before


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    fitted(tmp_path, max_epochs=3, segments=3)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "segments" / "mine.safetensors").write_text("mine too")
    trainer = fitted(tmp_path, overwrite=True)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"] == 6
    names = {str(name) for name in contents(tmp_path / "run")}
    assert {"notes.txt", "segments/mine.safetensors", "segments/0.safetensors"} <= names
    assert not {"segments/1.safetensors", "snapshots/step=000009.safetensors"} & names
    assert trainer.attribute(QUERY).values.abs().max() > 0


def test_overwrite_keeps_the_old_run_until_there_is_a_new_one(tmp_path):
    fitted(tmp_path)
    before = contents(tmp_path / "run")
    with pytest.raises(MisconfigurationException, match="Rprop"):
        fitted(tmp_path, optimized(lambda p: Rprop(p, 0.1))(), overwrite=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("spelling", ["run", "./run", "other/../run"])
def test_two_callbacks_on_one_directory_are_refused(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    callbacks = SourceCallback(str(tmp_path / "run")), SourceCallback(spelling)
    with pytest.raises(MisconfigurationException, match=r"two SourceCallbacks write to `.*run`"):
        quiet_trainer(tmp_path, *callbacks).fit(Classifier(mlp()), loader())


def test_two_callbacks_on_two_directories_record_the_same(tmp_path):
    callbacks = [SourceCallback(str(tmp_path / name), segments=2) for name in "ab"]
    trainer = quiet_trainer(tmp_path, *callbacks)
    trainer.fit(Classifier(mlp()), loader())
    one, other = (callback.attribute(trainer, QUERY).values for callback in callbacks)
    assert torch.equal(one, other)


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(MisconfigurationException, match="run` cannot be a run directory"):
        fitted(tmp_path)


def test_a_refused_fit_can_be_repeated_with_the_same_callback(tmp_path):
    source = SourceCallback(str(tmp_path / "run"))
    with pytest.raises(MisconfigurationException, match="Rprop"):
        quiet_trainer(tmp_path, source).fit(optimized(lambda p: Rprop(p, 0.1))(), loader())
    trainer = quiet_trainer(tmp_path, source)
    trainer.fit(Classifier(mlp()), loader())
    assert trainer.attribute(QUERY).values.abs().max() > 0


# ---------------------------------------------------------------- nothing was recorded


def test_attribute_before_fit(tmp_path):
    trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")))
    with pytest.raises(MisconfigurationException, match="before `fit`"):
        attribute(trainer, QUERY)
    with pytest.raises(MisconfigurationException, match="no SourceCallback"):
        attribute(quiet_trainer(tmp_path), QUERY)


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"limit_train_batches": 0}, {"max_epochs": 0}], ids=str)
def test_no_step(tmp_path, options):
    trainer = fitted(tmp_path, **options)
    with pytest.raises(MisconfigurationException, match="no optimizer step was recorded"):
        trainer.attribute(QUERY)
    with pytest.raises(MisconfigurationException, match="holds no run"):
        SourceScorer.from_run(tmp_path / "run", Classifier(mlp()))


class NoLoss(Classifier):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def test_no_loss(tmp_path):
    trainer = fitted(tmp_path, NoLoss(mlp()))
    with pytest.raises(MisconfigurationException, match=r"no loss|no optimizer step"):
        trainer.attribute(QUERY)


# ---------------------------------------------------------------- odd ways to train that work


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.net(batch[0]), batch[1]))


def test_fast_dev_run_and_sanity_check(tmp_path):
    for options in ({"fast_dev_run": 2}, {"num_sanity_val_steps": 2}):
        trainer = quiet_trainer(tmp_path, SourceCallback(str(tmp_path / "run")), **options)
        trainer.fit(Validated(mlp()), loader(), DataLoader(classes(), 8))
        assert trainer.attribute(QUERY).values.shape == (4, 24)
        trainer.validate(trainer.lightning_module, loader(), verbose=False)
        assert trainer.attribute(QUERY).values.abs().max() > 0
        assert (tmp_path / "run").exists() == ("fast_dev_run" not in options)


def test_fast_dev_run_does_not_touch_an_existing_run(tmp_path):
    fitted(tmp_path)
    before = contents(tmp_path / "run")
    fitted(tmp_path, fast_dev_run=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(("examples", "batch_size"), [(5, 1), (1, 1), (1, 8), (2, 8), (7, 6)])
def test_small_batches_and_data_sets(tmp_path, examples, batch_size):
    trainer = fitted(tmp_path, data=classes(examples), batch_size=batch_size)
    scores = trainer.attribute(QUERY)
    assert scores.values.shape == (4, examples)
    assert scores.values.isfinite().all()
    own = trainer.attribute(classes(examples)).values
    assert (own.diagonal() > 0).all()  # an example helps itself


class Stream(IterableDataset):
    def __iter__(self):
        return iter([classes()[i] for i in range(24)])


def test_iterable_data_wait_for_a_map_style_data_set(tmp_path):
    data = DataLoader(Stream(), 8)
    with pytest.warns(UserWarning, match="iterable"):
        trainer = fitted(tmp_path, data=data)
    with pytest.raises(MisconfigurationException, match=r"`Stream` is an iterable dataset.*train="):
        trainer.attribute(QUERY, train=data)
    with pytest.raises(MisconfigurationException, match="train="):
        trainer.attribute(QUERY)
    scores = trainer.attribute(QUERY, train=classes())
    same = SourceScorer.from_run(tmp_path / "run", Classifier(mlp())).score(QUERY, classes())
    assert scores.values.abs().max() > 0
    assert torch.equal(scores.values, same.values)


# ---------------------------------------------------------------- numbers that are not finite


class TurnsNaN(Classifier):
    """The loss is NaN from some step on, so the weights are too."""

    def __init__(self, step):
        super().__init__(mlp())
        self.step = step

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.training and self.global_step >= self.step else loss


@pytest.mark.parametrize("step", [0, 4])
def test_a_training_that_diverged_keeps_its_snapshots_and_says_where(tmp_path, step):
    with pytest.warns(UserWarning, match="could not fit its factors.*are safe"):
        trainer = fitted(tmp_path, TurnsNaN(step), segments=2, snapshots_per_segment=1)
    assert trainer.state.finished
    assert len(list((tmp_path / "run" / "snapshots").glob("*.safetensors"))) == 2
    for ask in (trainer.attribute, lambda query: scorer_of(tmp_path).score(query, classes())):
        with pytest.raises(FloatingPointError, match=r"`net\.\d|examples \d"):
            ask(QUERY)


def scorer_of(tmp_path):
    return SourceScorer.from_run(tmp_path / "run", Classifier(mlp()))


def with_value(data, index, value):
    inputs, targets = (x.clone() for x in data.tensors)
    inputs[index, 0] = value
    return TensorDataset(inputs, targets)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", ["source", "influence", "grad-cos"])
def test_a_query_that_is_not_finite_is_named(finished, value, method):
    with pytest.raises(FloatingPointError, match=r"quer.*\b5"):
        finished.attribute(with_value(classes(8), 5, value), batch_size=2, method=method)
    assert finished.attribute(QUERY).values.isfinite().all()  # the next question is answered


def test_a_training_example_that_is_not_finite_is_named(finished):
    with pytest.raises(FloatingPointError, match=r"examples .*\b17"):
        finished.attribute(QUERY, train=with_value(classes(), 17, float("inf")), batch_size=2)


# ---------------------------------------------------------------- questions


# name: (query, options, message)
QUESTIONS = {
    "empty tensors": ([x[:0] for x in QUERY], {}, "query is empty"),
    "empty dataset": (Subset(classes(), []), {}, "query is empty"),
    "empty loader": (DataLoader(Subset(classes(), []), 2), {}, "query is empty"),
    "no tensor": ("a question", {}, "`str` holds no tensor"),
    "unknown method": (QUERY, {"method": "shapley"}, '`method="shapley"`.*"source".*"grad-cos"'),
    "unknown option": (QUERY, {"damping": 0.1}, "takes no option `damping`.*`segments`, `snapshots`"),
    "unknown option of none": (QUERY, {"method": "grad-dot", "power": 2}, "`power`.*none"),
    "unknown measurement": (QUERY, {"measurement": "accuracy"}, "`measurement='accuracy'`.*loss, margin, log-prob"),
    "wrong snapshots": (QUERY, {"snapshots": "median"}, "median.*mean.*point"),
    "no segment": (QUERY, {"segments": 0}, "`segments=0`.*1 to"),
    "too many segments": (QUERY, {"segments": 99}, "`segments=99`.*1 to"),
    "negative id": (QUERY, {"train_ids": [3, -1]}, "`train_ids`.*0 to 23"),
    "too large id": (QUERY, {"train_ids": torch.tensor([24])}, "`train_ids`.*0 to 23"),
    "no id": (QUERY, {"train_ids": []}, "`train_ids`"),
    "no batch": (QUERY, {"batch_size": 0}, "batch_size"),
    "longer dataset": (QUERY, {"train": classes(25)}, "holds 25 examples.*trained on 24.*train_ids="),
    "shorter loader": (QUERY, {"train": loader(classes(23))}, "holds 23 examples.*trained on 24"),
    "empty training set": (QUERY, {"train": Subset(classes(), [])}, "holds no examples"),
    "no dataset": (QUERY, {"train": [1.0]}, "holds 1 examples.*trained on 24"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_wrong_questions_get_one_clear_answer(finished, case):
    query, options, message = QUESTIONS[case]
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        finished.attribute(query, **options)
    assert finished.attribute(QUERY).values.isfinite().all()


def test_more_queries_than_training_examples(finished):
    assert finished.attribute(classes(100)).values.shape == (100, 24)


def test_a_dataset_that_grew_since_fit(tmp_path):
    data = [classes()[i] for i in range(24)]
    trainer = fitted(tmp_path, data=DataLoader(data, 8))
    data.append(data[0])
    with pytest.raises(MisconfigurationException, match=r"holds 25 examples.*trained on 24"):
        trainer.attribute(QUERY)
    data.pop()
    assert trainer.attribute(QUERY).values.shape == (4, 24)


# ---------------------------------------------------------------- runs that cannot be opened


class Headed(Classifier):
    def __init__(self):
        super().__init__(mlp())
        self.head = nn.Linear(3, 3)


# name: (model, message)
MODELS = {
    "missing": (lambda: Classifier(nn.Sequential(nn.Linear(6, 5))), r"missing net\.2\.bias, net\.2\.weight"),
    "added": (Headed, r"not in the run: head\.bias, head\.weight"),
    "other shape": (
        lambda: Classifier(mlp(hidden=7)),
        r"of another shape: net\.0\.bias \[7\] for \[5\], net\.0\.weight \[7, 6\] for \[5, 6\]",
    ),
    "other names": (
        lambda: Classifier(nn.ModuleDict({"a": nn.Linear(6, 3)})),
        r"missing net\.0.*not in the run: net\.a",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_does_not_match_is_refused(finished, case):
    make, message = MODELS[case]
    with pytest.raises(MisconfigurationException, match=f"does not match the run of `Classifier`: .*{message}"):
        SourceScorer.from_run(finished.callbacks[0].dirpath, make())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5])


def other_schema(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))


# name: (what happens, to which file, message)
DAMAGES = {
    "flipped bytes": (flip, "segments/0.safetensors", r"segments/0\.safetensors` does not match the sha256"),
    "cut short": (cut_short, "final.safetensors", r"final\.safetensors` does not match the sha256"),
    "missing factors": (os.remove, "segments/0.safetensors", r"segments/0\.safetensors` is missing"),
    "missing snapshot": (os.remove, "snapshots/step=000006.safetensors", r"step=000006\.safetensors` is missing"),
    "other schema": (other_schema, "manifest.json", r"manifest\.json` has schema 99; this version reads schema 1"),
    "not JSON": (cut_short, "manifest.json", r"manifest\.json` is not valid JSON"),
    "no manifest": (os.remove, "manifest.json", r"`manifest\.json` is missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_names_the_file(tmp_path, case):
    damage, name, message = DAMAGES[case]
    fitted(tmp_path, snapshots_per_segment=1)
    assert scorer_of(tmp_path).score(QUERY, classes()).values.isfinite().all()
    damage(tmp_path / "run" / name)
    with pytest.raises(MisconfigurationException, match=message):
        scorer_of(tmp_path).score(QUERY, classes(), removal="few")  # which reads the final parameters, too


def test_a_directory_that_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MisconfigurationException, match=r"holds no run.*dirpath"):
            SourceScorer.from_run(path, Classifier(mlp()))
    assert not (tmp_path / "nowhere").exists()


class Fails(L.Callback):
    def on_train_end(self, trainer, module):
        raise ValueError("another callback")


@pytest.mark.parametrize("order", [1, -1])
def test_another_callback_that_fails_at_the_end_takes_nothing_away(tmp_path, order):
    callbacks = [SourceCallback(str(tmp_path / "run")), Fails()][::order]
    trainer = quiet_trainer(tmp_path, *callbacks)
    with pytest.raises(ValueError, match="another"):
        trainer.fit(Classifier(mlp()), loader())
    assert scorer_of(tmp_path).score(QUERY, classes()).values.abs().max() > 0
    assert trainer.attribute(QUERY).values.abs().max() > 0
