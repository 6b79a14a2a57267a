"""Evaluation of attributions against counterfactual training."""
