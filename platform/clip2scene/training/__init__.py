"""Distillation, fine-tuning and evaluation on the one TorchTrainer wrapper."""
