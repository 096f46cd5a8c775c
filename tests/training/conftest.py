"""Pre-training by every method on two keyframes of the tiny dataset."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clip2scene.config import DistillSettings
from clip2scene.storage import Storage
from clip2scene.teacher.superpixels import SuperpixelStore, segment_images
from clip2scene.training.distill import Distillation
from clip2scene.training.samples import SampleSource
from tiny_training import CONTRAST, Tiny


@pytest.fixture(scope="session")
def distillation(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Distillation]:
    """``distillation(method)`` on two keyframes, with superpixels if the method needs them."""
    folder, frames = tmp_path_factory.mktemp("superpixels"), tiny.index.frames[:2]
    segment_images(tiny.index, frames, CONTRAST, 56, 104, folder, 0, storage=Storage(folder))
    superpixels = SuperpixelStore.open(folder, Storage(folder))

    def make(method="clip2scene", settings=None, root=tiny.index.root, **changes):
        settings = settings or DistillSettings(method=method, contrast=CONTRAST)
        source = SampleSource(
            root,
            tiny.store,
            num_sweeps=2,
            sweep_choice=settings.sweep_choice,
            superpixels=superpixels if settings.method == "slidr" else None,
        )
        return tiny.distillation(frames=frames, source=source, settings=settings, **({"epochs": 4} | changes))

    return make
