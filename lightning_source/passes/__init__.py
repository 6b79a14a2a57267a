"""One pass over data with a model: calibration, factors, products."""
