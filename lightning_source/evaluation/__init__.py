"""Counterfactual evaluation: retraining ground truth, and how well scores from anywhere predict it."""

from lightning_source.evaluation.lds import LinearDatamodelingScore as LinearDatamodelingScore
from lightning_source.evaluation.lds import linear_datamodeling_score as linear_datamodeling_score
from lightning_source.evaluation.leave_out import RemovalCorrelation as RemovalCorrelation
from lightning_source.evaluation.leave_out import leave_one_out_subsets as leave_one_out_subsets
from lightning_source.evaluation.mislabel import MislabelDetection as MislabelDetection
from lightning_source.evaluation.removal import SubsetRemoval as SubsetRemoval
from lightning_source.evaluation.removal import own_query as own_query
from lightning_source.evaluation.removal import without_proponents as without_proponents
from lightning_source.evaluation.removal import without_random_same_label as without_random_same_label
from lightning_source.evaluation.retraining import random_subsets as random_subsets
from lightning_source.evaluation.retraining import retrain as retrain
