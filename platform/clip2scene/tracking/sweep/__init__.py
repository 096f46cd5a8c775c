"""A sweep in MLflow: the runs that it writes, the record that is read back, and what is made of that."""
