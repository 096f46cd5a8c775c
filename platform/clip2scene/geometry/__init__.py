"""Sensor frames, sweep registration, projection and point-pixel pairs: numpy in, numpy out."""
