"""The sparse network: one feature per point, whatever else is in the batch, at any voxel size."""

from __future__ import annotations

import pytest
import torch

from clip2scene.config import StudentSettings
from clip2scene.errors import ConfigError, DataError
from clip2scene.student.checkpoint import load_checkpoint, save_checkpoint
from clip2scene.student.network import Student
from clip2scene.student.voxels import rows_of_points, voxelise

SMALL = StudentSettings(voxel_size_m=0.3, channels=(8, 12, 16))
PUBLISHED = [
    StudentSettings(architecture=a, voxel_size_m=0.5) for a in ("spvcnn", "minkunet14", "minkunet18", "minkunet34")
]


def cloud(seed: int, n: int = 2000) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 7, generator=g)
    points[:, :3] = (points[:, :3] - 0.5) * torch.tensor([20.0, 20.0, 3.0])
    return points


@pytest.mark.parametrize("voxel_size_m", [0.05, 0.3, 2.0])
def test_every_point_gets_both_heads_and_gradients_reach_everything(voxel_size_m):
    check_heads_and_gradients(SMALL.model_copy(update={"voxel_size_m": voxel_size_m}), cloud(0))


@pytest.mark.parametrize(
    ("position", "intensity", "colour"), [(True, False, False), (False, True, False), (True, False, True)]
)
def test_a_network_reads_only_the_inputs_of_its_settings(position, intensity, colour):
    inputs = {"use_position": position, "use_intensity": intensity, "use_colour": colour}
    settings = SMALL.model_copy(update=inputs)
    points, alone = cloud(0, 500), torch.zeros(500, dtype=torch.long)
    points.requires_grad_()
    Student(settings, embedding_dim=5)(points, alone)["scr"].sum().backward()
    assert points.grad is not None
    assert bool(points.grad[:, :3].any()) == position
    assert bool(points.grad[:, 3].any()) == intensity
    assert points.grad[:, 4:].any(dim=0).tolist() == [colour] * 3
    check_heads_and_gradients(settings, cloud(0))


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda s: s.architecture)
@pytest.mark.parametrize("voxel_size_m", [0.1, 1.0])
def test_published_networks_learn_too(settings, voxel_size_m):
    check_heads_and_gradients(settings.model_copy(update={"voxel_size_m": voxel_size_m}), cloud(0, 120))


def check_heads_and_gradients(settings: StudentSettings, points: torch.Tensor) -> None:
    student, n = Student(settings, embedding_dim=5), len(points)
    heads = student(points, torch.arange(n) // (n // 2))
    assert {name: tuple(values.shape) for name, values in heads.items()} == {"scr": (n, 5), "stcr": (n, 5)}
    sum(values.square().mean() for values in heads.values()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("settings", [SMALL, *PUBLISHED[:2]], ids=["small", "spvcnn", "minkunet14"])
def test_a_cloud_is_read_the_same_alone_in_a_batch_and_in_any_place_of_it(settings):
    student = Student(settings, num_classes=3).eval()
    first, far = cloud(1, 500), cloud(2, 500) + 100
    with torch.no_grad():
        alone = student(first, torch.zeros(500, dtype=torch.long))["classifier"]
        leading = student(torch.cat((first, far)), torch.arange(1000) // 500)["classifier"][:500]
        trailing = student(torch.cat((far, first)), torch.arange(1000) // 500)["classifier"][500:]
    torch.testing.assert_close(alone, leading, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, trailing, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [SMALL, *PUBLISHED[:2]], ids=["small", "spvcnn", "minkunet14"])
def test_moving_a_cloud_by_whole_coarse_voxels_changes_nothing(settings):
    settings = settings.model_copy(update={"voxel_size_m": 0.25})
    student, zeros = Student(settings, num_classes=3).eval(), torch.zeros(500, dtype=torch.long)
    points = (cloud(6, 500) * 1024).round() / 1024  # so that the sums below are exact
    moved, nudged = points.clone(), points.clone()
    moved[:, :2] += torch.tensor([0.25 * 16 * 3, -0.25 * 16])
    nudged[:, 0] += 0.25 * 3
    with torch.no_grad():
        here, there, near = (student(p, zeros)["classifier"] for p in (points, moved, nudged))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(here, near, rtol=1e-4, atol=1e-5)


def test_the_order_of_points_does_not_matter():
    student = Student(SMALL, num_classes=3).eval()
    points, order = cloud(3), torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(2000, dtype=torch.long)
    with torch.no_grad():
        plain, shuffled = student(points, zeros)["classifier"], student(points[order], zeros)["classifier"]
    torch.testing.assert_close(plain[order], shuffled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [SMALL, *PUBLISHED[:2]], ids=["small", "spvcnn", "minkunet14"])
def test_the_point_branch_tells_points_of_one_voxel_apart(settings):
    points = torch.tensor([[0.05, 0.05, 0.05, 0.1], [0.2, 0.2, 0.2, 0.9], [5.0, 5.0, 1.0, 0.5]])
    student = Student(settings, num_classes=3).eval()
    with torch.no_grad():
        features = student(points, torch.zeros(3, dtype=torch.long))["classifier"]
    assert torch.equal(features[0], features[1]) is (settings.architecture == "minkunet14")


def test_a_frozen_backbone_stays_in_eval_mode_and_only_heads_get_gradients():
    student = Student(SMALL, num_classes=3)
    student.freeze_backbone()
    student.train()
    assert student.heads.training
    assert not any(module.training for module in student.backbone.modules())
    before = {key: value.clone() for key, value in student.backbone.state_dict().items()}
    student(cloud(0), torch.zeros(2000, dtype=torch.long))["classifier"].sum().backward()
    assert all(torch.equal(before[key], value) for key, value in student.backbone.state_dict().items())
    assert all((p.grad is not None) is name.startswith("heads.") for name, p in student.named_parameters())


def test_voxels_equal_a_plain_loop():
    points, clouds = cloud(4, 300)[:, :3], torch.arange(300) // 150
    voxels = voxelise(points, clouds, 0.7, alignment=4)
    keys = [(int(c), *(int(torch.floor(x / 0.7)) for x in p)) for p, c in zip(points, clouds, strict=True)]
    assert len(voxels.coordinates_V4) == len(set(keys))
    for i in range(0, 300, 7):
        for j in range(300):
            assert (voxels.voxel_of_point_N[i] == voxels.voxel_of_point_N[j]) == (keys[i] == keys[j])
    coarse = torch.unique(torch.cat((voxels.coordinates_V4[:, :1], voxels.coordinates_V4[:, 1:] // 2), 1), dim=0)
    coarse = coarse[torch.randperm(len(coarse), generator=torch.Generator().manual_seed(0))]
    rows = rows_of_points(voxels, coarse, 2)
    held = torch.cat((voxels.coordinates_V4[:, :1], voxels.coordinates_V4[:, 1:] // 2), 1)[voxels.voxel_of_point_N]
    assert torch.equal(coarse[rows], held)


def test_checkpoint_round_trip_and_another_architecture(tmp_path):
    student, path = Student(SMALL, embedding_dim=4), tmp_path / "student.safetensors"
    save_checkpoint(path, student.state_dict(), SMALL, {"digest": "abc", "history": []})
    back = load_checkpoint(path, SMALL)
    assert back.about["digest"] == "abc"
    assert all(torch.equal(back.weights[k], v) for k, v in student.state_dict().items())
    with pytest.raises(DataError, match=r"another architecture: trained with student.channels=\[8, 12, 16\], this job"):
        load_checkpoint(path, SMALL.model_copy(update={"channels": (8, 16)}))
    with pytest.raises(DataError, match=r"student\.architecture=spvcnn, this job has student\.architecture=minkunet14"):
        load_checkpoint(path, PUBLISHED[1])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable safetensors checkpoint"):
        load_checkpoint(path, SMALL)
    with pytest.raises(DataError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none", SMALL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks_per_level": 1}, r"trained with student\.blocks_per_level=1, this version has no such setting"),
        ({"architecture": None}, r"trained before there was a student\.architecture, this job has .*=spvcnn"),
    ],
)
def test_a_student_of_an_older_version_is_refused_in_one_sentence(tmp_path, change, sentence):
    student = {k: v for k, v in (SMALL.model_dump(mode="json") | change).items() if v is not None}
    path = tmp_path / "student.safetensors"
    save_checkpoint(path, Student(SMALL).state_dict(), SMALL, {"student": student})
    with pytest.raises(DataError, match=sentence) as caught:
        load_checkpoint(path, SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("settings", [SMALL, *PUBLISHED[:2]], ids=["small", "spvcnn", "minkunet14"])
def test_gpu_equals_cpu(settings):
    torch.manual_seed(0)
    student = Student(settings, num_classes=3).eval()
    points, zeros = cloud(5), torch.zeros(2000, dtype=torch.long)
    with torch.no_grad():
        here = student(points, zeros)["classifier"]
        there = student.cuda()(points.cuda(), zeros.cuda())["classifier"].cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


def test_more_cells_than_spconvs_hash_tells_apart_are_refused():
    student = Student(SMALL, num_classes=3).eval()
    points = torch.tensor([[0.0, 0, 0, 0], [400, 400, 200, 0]])
    with torch.no_grad():
        student(points, torch.zeros(2, dtype=torch.long))
        with pytest.raises(ConfigError, match=r"student\.voxel_size_m=\S+: on a CPU spconv confuses .* 2\^32 in all"):
            student(points, torch.tensor([0, 9]))
