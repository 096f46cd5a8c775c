"""The methods that are scored: each is prepared once per worker, then predicts a class for every point of a keyframe.

Legend: N points, P pairs (point-pixel or point-view), V virtual views, C classes, D width of the teacher's space,
h x w patches, H x W pixels of the teacher's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from clip2scene.config import StudentSettings, TeacherSettings
from clip2scene.geometry.depth_views import project_into_views, render
from clip2scene.geometry.interpolation import bilinear
from clip2scene.student.network import Student
from clip2scene.training.samples import Sample

UNSEEN = -1
"""Class of a point without an answer: no image, or no virtual view, shows it."""
_PAIRS_AT_ONCE = 65536
"""Pairs with features in memory at the same time: the mesh of a room has millions."""

Predictor = Callable[[Sample], torch.Tensor]
"""Maps a keyframe to classes (N,) int64, :data:`UNSEEN` where there is no answer."""


@dataclass(frozen=True)
class TeacherMethod:
    """2D-only: the class of a point is that of the mean feature of its pixels."""

    text_CD: torch.Tensor

    def prepare(self, device: torch.device) -> Predictor:
        """A function from a keyframe to classes (N,) int64, :data:`UNSEEN` where no image shows the point."""
        text_CD = self.text_CD.to(device)

        def predict(sample: Sample) -> torch.Tensor:
            logits_NC = _sum_of_pixels(sample) @ text_CD.T
            return torch.where(seen(sample), logits_NC.argmax(1), UNSEEN)

        return predict


@dataclass(frozen=True)
class StudentMethod:
    """3D-only: the class with the text nearest to the SCR head's feature, or the classifier's class."""

    student: StudentSettings
    weights: dict[str, torch.Tensor]
    text_CD: torch.Tensor | None
    """Class embeddings for a distilled student; None for a fine-tuned one."""
    num_classes: int

    def prepare(self, device: torch.device) -> Predictor:
        """A function from a keyframe to classes (N,) int64."""
        if self.text_CD is None:
            model = Student(self.student, num_classes=self.num_classes)
            model.load_state_dict(self.weights)
        else:
            model = _distilled(self.student, self.weights, self.text_CD.shape[1])
        model.to(device).eval()
        text_CD = None if self.text_CD is None else self.text_CD.to(device)

        def predict(sample: Sample) -> torch.Tensor:
            heads = model(sample.points_NI, sample.cloud_N)
            logits_NC = heads["classifier"] if text_CD is None else heads["scr"] @ text_CD.T
            return logits_NC.argmax(1)

        return predict


@dataclass(frozen=True)
class EnsembleMethod:
    """2D and 3D together, by the rule of OpenScene (Peng et al., CVPR 2023, section 3.3).

    A point has two features, the mean of its pixels' and the SCR head's. The one with the higher maximal cosine over
    the class texts decides; where no image shows the point, the 3D feature does.
    """

    student: StudentSettings
    weights: dict[str, torch.Tensor]
    text_CD: torch.Tensor

    def prepare(self, device: torch.device) -> Predictor:
        """A function from a keyframe to classes (N,) int64."""
        model = _distilled(self.student, self.weights, self.text_CD.shape[1]).to(device).eval()
        text_CD = normalize(self.text_CD.to(device), dim=1)

        def predict(sample: Sample) -> torch.Tensor:
            points_ND = model(sample.points_NI, sample.cloud_N)["scr"]
            score_3d_N, class_3d_N = (normalize(points_ND, dim=1) @ text_CD.T).max(1)
            score_2d_N, class_2d_N = (normalize(_sum_of_pixels(sample), dim=1) @ text_CD.T).max(1)
            return torch.where(seen(sample) & (score_2d_N > score_3d_N), class_2d_N, class_3d_N)

        return predict


@dataclass(frozen=True)
class PointClipMethod:
    """PointCLIP (Zhang et al., CVPR 2022) adapted to scenes: CLIP encodes depth images of the cloud.

    The cloud is rendered as depth images from the sensor's position (:mod:`clip2scene.geometry.depth_views`) with three
    equal channels, and encoded densely like any image. Every point, occluded or not, reads the features at its pixels
    and takes the class of its mean logits. PointCLIP's class prompt is "point cloud depth map of a {}.".
    """

    teacher: TeacherSettings
    """With absolute paths, as every worker loads it."""
    text_CD: torch.Tensor
    """Class embeddings of PointCLIP's own prompt, unit length."""
    sensor_at_centre: bool = False
    """Render from the centre of the cloud's bounding box (ScanNet: a mesh has no sensor) instead of the origin."""

    def prepare(self, device: torch.device) -> Predictor:
        """A function from a keyframe to classes (N,) int64, :data:`UNSEEN` where no view shows the point.

        That is the case only within some centimetres of the sensor.
        """
        from clip2scene.teacher.clip import load_teacher  # with open_clip, which no other method needs

        teacher = load_teacher(self.teacher).to(device)
        text_CD = self.text_CD.to(device)
        size = (self.teacher.image_height_px, self.teacher.image_width_px)
        width_height_2 = torch.tensor(size[::-1]).to(device)

        def predict(sample: Sample) -> torch.Tensor:
            points_N3 = sample.points_NI[:, :3]
            if self.sensor_at_centre:
                points_N3 = points_N3 - (points_N3.amin(0) + points_N3.amax(0)) / 2
            projected = project_into_views(points_N3, *size)
            images_VHW = (render(projected, *size) * 255).round().byte()
            read_P = projected.read_back_P
            view_P, point_P = projected.view_P[read_P], projected.point_P[read_P]
            position_P2 = projected.pixel_P2[read_P] / width_height_2
            logits_NC = torch.zeros(len(points_N3), len(text_CD), device=device)
            # One view at a time, so that an image's features never depend on its batch.
            for view in view_P.unique().tolist():
                image_HW3 = images_VHW[view].cpu().numpy()[..., None].repeat(3, axis=2)
                features_1hwD = teacher(teacher.preprocess(image_HW3)[None].to(device))
                rows = view_P == view
                zeros_P = torch.zeros_like(point_P[rows])
                features_PD = normalize(bilinear(features_1hwD, zeros_P, position_P2[rows]), dim=1)
                logits_NC.index_add_(0, point_P[rows], features_PD @ text_CD.T)
            answered_N = torch.zeros(len(points_N3), dtype=torch.bool, device=device)
            answered_N[point_P] = True
            # The sum has the same argmax as the mean.
            return torch.where(answered_N, logits_NC.argmax(1), UNSEEN)

        return predict


@dataclass(frozen=True)
class ConstantMethod:
    """The same class everywhere: the baseline that a network must beat."""

    constant: int

    def prepare(self, device: torch.device) -> Predictor:
        """A function from a keyframe to classes (N,) int64."""
        return lambda sample: torch.full((len(sample.points_NI),), self.constant, device=device)


Method = TeacherMethod | StudentMethod | EnsembleMethod | PointClipMethod | ConstantMethod


def seen(sample: Sample) -> torch.Tensor:
    """(N,) bool: points that at least one encoded image shows."""
    seen_N = torch.zeros(len(sample.points_NI), dtype=torch.bool, device=sample.points_NI.device)
    seen_N[sample.pair_point_P] = True
    return seen_N


def _distilled(settings: StudentSettings, weights: dict[str, torch.Tensor], dim: int) -> Student:
    """A student with only the head that predicts; the losses decide which other heads it was trained with."""
    model = Student(settings, embedding_dim=dim, heads=("scr",))
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("heads.stcr.")})
    return model


def _sum_of_pixels(sample: Sample) -> torch.Tensor:
    """(N, D): sum of the unit-length features of each point's pixels; zero where no image shows the point."""
    dim = sample.features_MhwD.shape[-1]
    sums_ND = torch.zeros(len(sample.points_NI), dim, device=sample.points_NI.device)
    pairs = (sample.pair_point_P, sample.pair_image_P, sample.pair_position_P2)
    for point_P, image_P, position_P2 in zip(*(part.split(_PAIRS_AT_ONCE) for part in pairs), strict=True):
        sums_ND.index_add_(0, point_P, normalize(bilinear(sample.features_MhwD, image_P, position_P2), dim=1))
    return sums_ND
