"""The losses of the method and of its baselines, as pure functions of tensors."""
