"""The estimators: one file each, entered under the name that ``method=`` takes."""

from lightning_source.estimators import astra as astra
from lightning_source.estimators import astra_source as astra_source
from lightning_source.estimators import cg as cg
from lightning_source.estimators import datainf as datainf
from lightning_source.estimators import influence as influence
from lightning_source.estimators import lissa as lissa
from lightning_source.estimators import repsim as repsim
from lightning_source.estimators import source as source
from lightning_source.estimators import tracin as tracin
from lightning_source.estimators import trak as trak
from lightning_source.estimators.query import Query as Query
from lightning_source.estimators.registry import estimator_for as estimator_for
from lightning_source.estimators.registry import floats_per_parameter_of as floats_per_parameter_of
from lightning_source.estimators.registry import register_estimator as register_estimator
from lightning_source.estimators.registry import unit_of as unit_of
from lightning_source.estimators.sinks import LayerSink as LayerSink
from lightning_source.estimators.sinks import MatrixSink as MatrixSink
from lightning_source.estimators.sinks import ScoreSink as ScoreSink
from lightning_source.estimators.terms import Contraction as Contraction
from lightning_source.estimators.terms import DirectScores as DirectScores
from lightning_source.estimators.terms import Metadata as Metadata
from lightning_source.passes.query_gradients import QueryGradients as QueryGradients

Table, estimates = DirectScores, register_estimator  # their earlier names
