"""Sweeps: a search space over a job, run by Ray Tune on one extraction, and recorded in MLflow."""
