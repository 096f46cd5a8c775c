"""Datasets, read into one index: its types, readers, splits and label spaces."""
