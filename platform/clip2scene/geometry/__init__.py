"""Sensor frames, sweep registration, projection and point-pixel pairs: numpy arrays or torch tensors, no files."""
