"""clip2scene: teach a 3D network what CLIP knows, with no 3D labels, and fine-tune it with very few."""

__version__ = "0.1.0"
