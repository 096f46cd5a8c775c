"""What can go wrong between this program and MLflow."""

from __future__ import annotations

from clip2scene.config import Clip2sceneError


class TrackingError(Clip2sceneError, RuntimeError):
    """A tracking server that does not start or does not answer."""
