"""S3's draw: when it starts, what it mixes, and which ranks share it."""

from __future__ import annotations

import pytest
import torch

from clip2scene.config import S3Settings
from clip2scene.losses.switching import switch_generator, switch_labels

PIXEL, OWN = torch.zeros(4000, dtype=torch.long), torch.ones(4000, dtype=torch.long)


def switched(settings, epoch=10, seed=0, step=0, rank=0):
    return switch_labels(PIXEL, OWN, settings, epoch, switch_generator(settings, seed, step, rank))


@pytest.mark.parametrize("granularity", ["point", "batch"])
def test_switch_is_seeded_and_starts_late(granularity):
    settings = S3Settings(start_epoch=10, probability=0.5, granularity=granularity)
    assert not switched(settings, epoch=9).any()
    assert torch.equal(switched(settings, seed=1), switched(settings, seed=1))
    share = switched(settings, seed=1).double().mean()
    if granularity == "point":
        assert 0.45 < share < 0.55
        assert not torch.equal(switched(settings, step=0), switched(settings, step=1))
    else:
        assert share in (0, 1)
        assert {float(switched(settings, step=s).double().mean()) for s in range(20)} == {0.0, 1.0}


@pytest.mark.parametrize("granularity", ["point", "batch"])
def test_probability_one_is_own_predictions_only(granularity):
    settings = S3Settings(start_epoch=3, probability=1.0, granularity=granularity)
    assert not switched(settings, epoch=2).any()
    assert all(switched(settings, epoch=3, step=step).all() for step in range(50))


@pytest.mark.parametrize("granularity", ["point", "batch"])
def test_ranks_share_the_draw_only_when_synchronised(granularity):
    def ranks_agree(synchronised):
        settings = S3Settings(granularity=granularity, synchronised=synchronised)
        return [torch.equal(switched(settings, step=s, rank=0), switched(settings, step=s, rank=1)) for s in range(20)]

    assert all(ranks_agree(True))
    assert not all(ranks_agree(False))
