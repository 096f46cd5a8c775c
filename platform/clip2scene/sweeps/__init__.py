"""Sweeps: a search space on a job, run by Ray Tune after one extraction, and recorded in MLflow."""
