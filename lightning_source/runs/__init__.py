"""A recorded run, opened."""
