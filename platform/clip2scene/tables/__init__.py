"""The paper's tables as jobs: rows that differ by a few settings, run over seeds and kept in MLflow as one table."""
