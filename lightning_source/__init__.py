"""Training data attribution for PyTorch Lightning: one callback records a run, and scores follow."""

from lightning_source.attribution import AttributingTrainer as AttributingTrainer
from lightning_source.attribution import AttributionTrainerMixin as AttributionTrainerMixin
from lightning_source.attribution import attribute as attribute
from lightning_source.callback import SourceCallback as SourceCallback
from lightning_source.ensembling import ensemble as ensemble
from lightning_source.issues import label_issues as label_issues
from lightning_source.scorer import SourceScorer as SourceScorer
from lightning_source.scores import InfluenceScores as InfluenceScores

__version__ = "0.1.0"
