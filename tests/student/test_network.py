"""The sparse network: one feature a point, whatever else is in the batch, at any voxel size."""

from __future__ import annotations

import pytest
import torch

from clip2scene.config import StudentSettings
from clip2scene.data.index import DataError
from clip2scene.student.checkpoint import load_checkpoint, save_checkpoint
from clip2scene.student.network import Student
from clip2scene.student.voxels import rows_of_points, voxelise

SMALL = StudentSettings(voxel_size_m=0.3, channels=(8, 12, 16))


def cloud(seed: int, n: int = 2000) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 4, generator=g)
    points[:, :3] = (points[:, :3] - 0.5) * torch.tensor([20.0, 20.0, 3.0])
    return points


@pytest.mark.parametrize("voxel_size_m", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("point_branch", [True, False])
def test_every_point_gets_both_heads_and_gradients_reach_everything(voxel_size_m, point_branch):
    settings = SMALL.model_copy(update={"voxel_size_m": voxel_size_m, "point_branch": point_branch})
    student = Student(settings, embedding_dim=5)
    points = cloud(0)
    heads = student(points, torch.arange(2000) // 1000)
    assert {name: tuple(values.shape) for name, values in heads.items()} == {"scr": (2000, 5), "stcr": (2000, 5)}
    sum(values.square().mean() for values in heads.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())


def test_a_cloud_is_read_the_same_alone_and_in_a_batch():
    student = Student(SMALL, num_classes=3).eval()
    first, far = cloud(1), cloud(2) + 100
    with torch.no_grad():
        alone = student(first, torch.zeros(2000, dtype=torch.long))["classifier"]
        both = student(torch.cat((first, far)), torch.arange(4000) // 2000)["classifier"][:2000]
    torch.testing.assert_close(alone, both, rtol=1e-4, atol=1e-5)


def test_the_order_of_points_does_not_matter():
    student = Student(SMALL, num_classes=3).eval()
    points, order = cloud(3), torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(2000, dtype=torch.long)
    with torch.no_grad():
        plain, shuffled = student(points, zeros)["classifier"], student(points[order], zeros)["classifier"]
    torch.testing.assert_close(plain[order], shuffled, rtol=1e-4, atol=1e-5)


def test_the_point_branch_tells_points_of_one_voxel_apart():
    points = torch.tensor([[0.05, 0.05, 0.05, 0.1], [0.2, 0.2, 0.2, 0.9], [5.0, 5.0, 1.0, 0.5]])
    zeros = torch.zeros(3, dtype=torch.long)
    for branch in (True, False):
        torch.manual_seed(0)
        student = Student(SMALL.model_copy(update={"point_branch": branch}), num_classes=3).eval()
        with torch.no_grad():
            features = student(points, zeros)["classifier"]
        assert torch.equal(features[0], features[1]) is not branch


def test_voxels_equal_a_plain_loop():
    points, clouds = cloud(4, 300)[:, :3], torch.arange(300) // 150
    voxels = voxelise(points, clouds, 0.7, alignment=4)
    keys = [(int(c), *(int(torch.floor(x / 0.7)) for x in p)) for p, c in zip(points, clouds, strict=True)]
    assert len(voxels.coordinates_V4) == len(set(keys))
    for i in range(0, 300, 7):
        for j in range(300):
            assert (voxels.voxel_of_point_N[i] == voxels.voxel_of_point_N[j]) == (keys[i] == keys[j])
    coarse = torch.unique(torch.cat((voxels.coordinates_V4[:, :1], voxels.coordinates_V4[:, 1:] // 2), 1), dim=0)
    rows = rows_of_points(voxels, coarse[torch.randperm(len(coarse))], 2)
    assert rows.max() < len(coarse)


def test_checkpoint_round_trip_and_another_architecture(tmp_path):
    student, path = Student(SMALL, embedding_dim=4), tmp_path / "student.safetensors"
    save_checkpoint(path, student.state_dict(), SMALL, {"digest": "abc", "history": []})
    back = load_checkpoint(path, SMALL)
    assert back.about["digest"] == "abc"
    assert all(torch.equal(back.weights[k], v) for k, v in student.state_dict().items())
    with pytest.raises(DataError, match=r"another architecture: trained with student.channels=\[8, 12, 16\], this job"):
        load_checkpoint(path, SMALL.model_copy(update={"channels": (8, 16)}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable safetensors checkpoint"):
        load_checkpoint(path, SMALL)
    with pytest.raises(DataError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none", SMALL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu():
    torch.manual_seed(0)
    student = Student(SMALL, num_classes=3).eval()
    points, zeros = cloud(5), torch.zeros(2000, dtype=torch.long)
    with torch.no_grad():
        here = student(points, zeros)["classifier"]
        there = student.cuda()(points.cuda(), zeros.cuda())["classifier"].cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
