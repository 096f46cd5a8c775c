"""A table in MLflow: the record that is read back from its runs, and what is made of that."""
