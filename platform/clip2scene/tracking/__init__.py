"""Runs, their parameters, scores and figures, kept by MLflow; the only importer of mlflow."""
