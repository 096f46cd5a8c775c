"""The method's losses as pure functions of tensors."""
