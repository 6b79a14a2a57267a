"""The command ``lightning-source``: looks into runs and score files without the model or the data."""
