"""Trains a model further from where it is, on all examples or on all but one, under the same randomness.

:mod:`plain` runs the user's ``training_step`` one run after the other. :mod:`stacked` runs many at once, as copies
stacked along a first dimension. Both give the same numbers.
"""
