"""The subcommands ``attribute`` and ``report`` for a LightningCLI; needs the extra ``cli``.

They take the config that ``fit`` takes, model, data and Trainer, and ask the run that its ``SourceCallback`` recorded::

    python main.py fit -c config.yaml
    python main.py attribute -c config.yaml --query val --out scores.safetensors

where ``main.py`` calls :class:`SourceCLI` in place of ``LightningCLI``. ``python -m lightning_source.cli`` is the same
for configs that name model and data by ``class_path``.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_source._lightning import (
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
)
from lightning_source._trainer import scoring_device
from lightning_source.attribution import AttributingCallback
from lightning_source.estimators.registry import methods, option_types
from lightning_source.report import require_report_packages
from lightning_source.scorer import MEASUREMENTS, SourceScorer
from lightning_source.scores import SIGN, InfluenceScores
from lightning_source.wording import error_in_words

COMMANDS = {
    "attribute": "Score training examples by their effect on queries, into a file.",
    "report": "Show queries beside the training examples that helped and harmed them, as one HTML file.",
}
QUERIES = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}  # the stage that `setup` gets for each
SHOWN = 5  # queries that the summary on the terminal lists


class SourceCLI(LightningCLI):
    """A LightningCLI with the subcommands ``attribute`` and ``report`` beside Lightning's own; they never train.

    Both take the config of ``fit`` and, beside it:

    - ``--run``: the directory of the recorded run; by default the ``dirpath`` of the config's ``SourceCallback``. Or
      ``--ckpt_path``: a checkpoint that is attributed as the start of further training
      (:meth:`SourceScorer.from_model`), for which ``"source"`` needs ``--rate``. It is read by torch's
      ``weights_only`` loader.
    - ``--query``: ``val`` (the default), ``test``, ``predict`` or ``train``, whose DataLoader has the queries,
      or the path of a safetensors file that holds one batch: tensors named ``0``, ``1``, … are the list of them,
      other names make a dictionary.
    - ``--at``: the moment of training that is asked about, ``"epoch 3"``; see :func:`lightning_source.attribute`.
    - ``--method``, ``--measurement``, ``--stage``, ``--per_segment``, ``--per_layer``, ``--stderr``: see
      :meth:`SourceScorer.score`; ``--options.NAME``: the method's own options, ``--options.segments 3``.
    - ``--out``: the file to write, ``scores.safetensors`` or ``report.html``.
    - ``-k``: examples listed on each side of a query.
    - ``--json`` (``attribute``): print what was found as JSON, with the strongest examples of each query.
    - ``--scores`` (``report``): a file that ``attribute`` wrote, in place of scoring anew.

    The training examples are those of the config's training DataLoader. Wrong input ends with one line and the exit
    code 2.

    Example::

        from lightning_source.cli import SourceCLI

        SourceCLI(MyModule, MyDataModule)  # python main.py attribute -c config.yaml
    """

    # ---------------------------------------------------------------- arguments

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, ``attribute`` and ``report``."""
        return {**LightningCLI.subcommands(), **{name: set() for name in COMMANDS}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser.

        Raises:
            MisconfigurationException: jsonargparse is not installed.
        """
        try:
            return super().init_parser(**kwargs)
        except ModuleNotFoundError as error:
            raise MisconfigurationException(
                "`SourceCLI` needs jsonargparse with its signatures. HINT: `pip install 'lightning_source[cli]'`."
            ) from error

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """As Lightning's own does, which looks for every subcommand among the Trainer's methods."""
        from jsonargparse import class_from_function

        kind: Any = self.trainer_class
        kind = kind if isinstance(kind, type) else class_from_function(kind)
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        commands = parser.add_subcommands()
        for name in self.subcommands():
            summary = COMMANDS.get(name) or (inspect.getdoc(getattr(kind, name)) or name).splitlines()[0]
            one = self._prepare_subcommand_parser(kind, name, **({"description": summary} | kwargs.get(name, {})))
            self._subcommand_parsers[name] = one
            commands.add_subcommand(name, one, help=summary)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in COMMANDS:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        _add_question(parser, subcommand)
        return parser

    def _parse_ckpt_path(self) -> None:
        try:
            super()._parse_ckpt_path()
        except Exception as error:  # torch raises what it likes on a file that is no checkpoint
            if self.config.get("subcommand") not in COMMANDS:
                raise
            _refuse(f"`--ckpt_path` is no checkpoint whose hyperparameters can be read: {error_in_words(error)}", error)

    # ---------------------------------------------------------------- running

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in COMMANDS:
            super()._run_subcommand(subcommand)
            return
        try:
            for name in (f"before_{subcommand}", subcommand, f"after_{subcommand}"):
                getattr(self, name, lambda: None)()
        except (MisconfigurationException, FloatingPointError, OSError) as error:
            _refuse(str(error), error)

    def attribute(self) -> None:
        """The subcommand: score, write the file, print what was found."""
        asked = self.config_init["attribute"]
        data = self._data(asked)
        scores = self._score(asked, data)
        scores.save(asked.out)
        print(json.dumps(_as_json(scores, asked), indent=1) if asked.json else _as_text(scores, asked))

    def report(self) -> None:
        """The subcommand: score, or read scores, and write the page."""
        require_report_packages()  # before hours of scoring, not after
        asked = self.config_init["report"]
        scores = None if asked.scores is None else InfluenceScores.load(asked.scores)
        data = self._data(asked)
        scores = self._score(asked, data) if scores is None else scores
        scores.report(asked.out, train=data.train.dataset, query=data.query, k=asked.k)
        print(_headline(scores, asked))

    def _data(self, asked: Any) -> _Data:
        """The training loader and the queries, after the hooks that ``fit`` calls before it."""
        if not Path(asked.out).resolve().parent.is_dir():  # before hours of scoring, not after
            raise MisconfigurationException(f"`--out {asked.out}`: there is no such folder. HINT: make it.")
        owner = self.model if self.datamodule is None else self.datamodule
        self.model.trainer = self.trainer  # what hooks and loaders may read
        if self.datamodule is not None:
            self.datamodule.trainer = self.trainer
            self.trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        for each in dict.fromkeys((owner, self.model)):
            each.prepare_data()
            each.setup("fit")
        self.model.configure_model()
        stage = QUERIES.get(asked.query, "fit")
        if stage != "fit":
            owner.setup(stage)
        query: object = _loader(owner, asked.query) if asked.query in QUERIES else _batch(Path(asked.query))
        train = _loader(owner, "train")
        self.model.trainer = None  # passes give the module a Trainer of their own
        return _Data(train, query)

    def _score(self, asked: Any, data: _Data) -> InfluenceScores:
        recorded = [c for c in self.trainer.callbacks if isinstance(c, AttributingCallback)]  # type: ignore[attr-defined]
        measurement = asked.measurement or (recorded[0].measurement if recorded else "loss")
        common: dict[str, Any] = {"measurement": measurement, "datamodule": self.datamodule}
        self.model.to(scoring_device(self.trainer))
        if asked.ckpt_path is not None:
            if asked.run is not None:
                raise MisconfigurationException(
                    "`--run` is a recorded run, `--ckpt_path` a model without one. HINT: give one of them;"
                    " `--ckpt_path null` where the config names one."
                )
            _load_weights(self.model, asked.ckpt_path)
            if asked.at is not None:
                raise MisconfigurationException("`--at` is a moment of a run; `--ckpt_path` is a model without one.")
            scorer = SourceScorer.from_model(self.model, data.train, rate=asked.rate, **common)
        else:
            if asked.rate is not None:
                raise MisconfigurationException(
                    "`--rate` is that of a model without a record; a run has its own. HINT: give `--ckpt_path`, too."
                )
            run = asked.run or next((c.dirpath for c in recorded if c.dirpath is not None), None)
            if run is None:
                raise MisconfigurationException(
                    "the config has no `SourceCallback` with a `dirpath`, so there is no run to ask. HINT: `--run DIR`,"
                    " or `--ckpt_path FILE` for a model without a record."
                )
            scorer = SourceScorer.from_run(run, self.model, stage=asked.stage, at=asked.at, **common)
        return scorer.score(
            data.query,
            data.train,
            method=asked.method,
            per_segment=asked.per_segment,
            per_layer=asked.per_layer,
            stderr=asked.stderr,
            **asked.options,
        )


def _refuse(message: str, error: Exception) -> NoReturn:
    """End as wrong input to a command does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from error


class _Data(NamedTuple):
    train: DataLoader[object]
    query: object  # a loader, or one batch


def _add_question(parser: LightningArgumentParser, command: str) -> None:
    """The arguments of a subcommand of ours beside those of ``fit``."""
    from jsonargparse.typing import PositiveInt

    add: Callable[..., object] = parser.add_argument
    methods_known: Any = Literal[methods()]
    measurements: Any = Literal[MEASUREMENTS]
    options: Any = TypedDict("MethodOptions", option_types(), total=False)  # type: ignore[misc]
    add("--run", type=str | None, help="directory of the recorded run; by default that of the SourceCallback")
    add("--ckpt_path", type=str | None, help="checkpoint of a model without a record, in place of a run")
    add("--rate", type=float | list[float] | None, help="with `--ckpt_path`: sum of learning rates of the steps")
    add("--weights_only", type=bool | None, help="as in a config of `fit`; checkpoints are always read so")
    add("--query", type=str, default="val", help="val, test, predict, train or a safetensors file of one batch")
    add("--stage", type=int | str | None, help="stage whose examples are asked about; by default the last")
    add("--at", type=int | float | str | None, help="moment that is asked about; by default the end of training")
    add("--method", type=methods_known, default="source", help="how scores are computed")
    add("--measurement", type=measurements | None, help="what scores predict; by default the SourceCallback's")
    add("--options", type=options, default={}, help="the method's own, `--options.segments 3`")
    add("--per_segment", type=bool, default=False, help="keep each segment's share of the scores")
    add("--per_layer", type=bool, default=False, help="keep each layer's share of the scores")
    add("--stderr", type=bool, default=False, help="give scores an error bar")
    add("-k", "--k", type=PositiveInt, default=5 if command == "attribute" else 10, help="examples on each side")
    if command == "attribute":
        add("--out", type=str, default="scores.safetensors", help="file that the scores go to")
        add("--json", action="store_true", help="print as JSON")
    else:
        add("--out", type=str, default="report.html", help="file that the page goes to")
        add("--scores", type=str | None, help="file of scores to show, in place of scoring anew")


def _loader(owner: LightningDataModule | LightningModule, name: str) -> DataLoader[object]:
    found: object = getattr(owner, f"{name}_dataloader")()
    if isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, DataLoader):
        raise MisconfigurationException(
            f"`{type(owner).__name__}.{name}_dataloader` gives no single DataLoader but `{type(found).__name__}`. HINT:"
            " concatenate the datasets (`torch.utils.data.ConcatDataset`)."
        )
    return found


def _batch(path: Path) -> list[Tensor] | dict[str, Tensor]:
    """The batch that a safetensors file holds; see :class:`SourceCLI`."""
    known = ", ".join(QUERIES)
    if not path.is_file():
        raise MisconfigurationException(f"`--query {path}` is none of {known}, and there is no such file. HINT: one.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise MisconfigurationException(
            f"`--query {path}` is no safetensors file ({error}). HINT: `safetensors.torch.save_file` writes one."
        ) from error
    places = [str(place) for place in range(len(tensors))]
    return [tensors[place] for place in places] if tensors.keys() == set(places) else tensors


def _load_weights(model: LightningModule, path: str) -> None:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except (KeyError, TypeError, RuntimeError) as error:
        raise MisconfigurationException(
            f"`--ckpt_path {path}` is no checkpoint of `{type(model).__name__}`: {error} HINT: the config must be that"
            " of the fit that wrote it."
        ) from error


def _as_json(scores: InfluenceScores, asked: Any) -> dict[str, object]:
    queries, examples = scores.values.shape
    rows = [row._asdict() for row in scores.rows(asked.k)]
    return {"out": asked.out, "queries": queries, "examples": examples, "metadata": scores.metadata, "rows": rows}


def _headline(scores: InfluenceScores, asked: Any) -> str:
    queries, examples = scores.values.shape
    how = f"method {scores.metadata.get('method')}, measurement {scores.metadata.get('measurement')}"
    return f"{asked.out}: {queries} queries x {examples} training examples, {how}"


def _as_text(scores: InfluenceScores, asked: Any) -> str:
    lines = [_headline(scores, asked), SIGN]
    groups = groupby(scores.rows(asked.k), key=lambda row: (row.query, row.side))
    for (query, side), rows in islice(groups, 2 * SHOWN):
        listed = ", ".join(f"#{row.train} {row.score:+.3g}" for row in rows)
        lines.append(f"query {query}, {side}s: {listed}")
    if len(scores.values) > SHOWN:
        lines.append(
            f"and {len(scores.values) - SHOWN} more queries: `lightning-source export {asked.out}` lists them all"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    SourceCLI()
