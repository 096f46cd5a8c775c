"""The loss of each pre-training method on a batch: CLIP2Scene's and its baselines', over the same network.

Every method predicts with the head ``scr``. ``agreement`` is the share of pairs with the same nearest text for the
point and for its pixel.

Legend: N points of all clouds, P point-pixel pairs, C classes, D width of the teacher's space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from clip2scene.config import DistillSettings
from clip2scene.geometry.interpolation import bilinear
from clip2scene.losses.contrast import info_nce, superpixel_means
from clip2scene.losses.distances import class_divergence, cosine_distance
from clip2scene.losses.scr import semantic_consistency, text_cross_entropy
from clip2scene.losses.stcr import grid_cells, spatial_temporal_consistency
from clip2scene.losses.switching import step_generator, switch_generator, switch_labels
from clip2scene.student.network import Forward
from clip2scene.student.voxels import voxelise
from clip2scene.training.samples import Sample, random_transform

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What a loss needs to know of a training step besides the network and the batch."""

    settings: DistillSettings
    voxel_size_m: float
    """Of the student."""
    text_CD: torch.Tensor
    """On the batch's device."""
    seed: int
    epoch: int
    """Epochs finished so far."""
    number: int
    """Steps finished so far."""
    rank: int

    def features(self, features_PD: torch.Tensor) -> torch.Tensor:
        """Features in float32, and L2-normalised if the settings say so."""
        features_PD = features_PD.float()
        return normalize(features_PD, dim=1) if self.settings.normalise_features else features_PD

    def pixels(self, batch: Sample) -> torch.Tensor:
        """The teacher's stored features at the pairs' pixels, (P, D) float32."""
        return bilinear(batch.features_MhwD, batch.pair_image_P, batch.pair_position_P2)

    def rows(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """A random subset of at most ``contrast.max_pairs`` rows."""
        shuffled = torch.randperm(num_rows, generator=step_generator(self.seed, self.number, self.rank))
        return shuffled[: self.settings.contrast.max_pairs].to(device, non_blocking=True)

    def classes(self, features_PD: torch.Tensor) -> torch.Tensor:
        """Class with the nearest text for each row, (P,) int64."""
        return (features_PD.detach() @ self.text_CD.T).argmax(1)

    def agreement(self, points_PD: torch.Tensor, pixels_PD: torch.Tensor) -> torch.Tensor:
        """Share of pairs where student and teacher predict the same class."""
        return share(self.classes(points_PD) == self.classes(pixels_PD))


def share(true_P: torch.Tensor) -> torch.Tensor:
    """Share of rows that are true; 0 without rows."""
    return true_P.sum() / max(len(true_P), 1)


def clip2scene(model: Forward, batch: Sample, step: Step) -> Terms:
    """``scr`` (equation 1) and ``stcr`` (equations 2 to 4), each on its own head, with S3's labels for SCR.

    A loss of weight 0 is left out, and so is its head: the other loss then trains the head ``scr``, which predicts.
    """
    settings, terms, total = step.settings, {}, []
    heads = model(batch.points_NI, batch.cloud_N, batch.pair_point_P)
    scr_PD = step.features(heads["scr"])
    with torch.no_grad():
        pixels_PD = step.features(step.pixels(batch))
        pixel_labels_P, predictions_P = step.classes(pixels_PD), step.classes(scr_PD)
    if settings.scr.weight:
        generator = switch_generator(settings.s3, step.seed, step.number, step.rank)
        labels_P = switch_labels(pixel_labels_P, predictions_P, settings.s3, step.epoch, generator)
        if settings.scr.form == "equation":
            terms["scr"] = semantic_consistency(scr_PD, labels_P, step.text_CD, settings.scr.tau)
        else:
            terms["scr"] = text_cross_entropy(scr_PD, labels_P, step.text_CD)
        total.append(settings.scr.weight * terms["scr"])
    if settings.stcr.weight:
        stcr, both = settings.stcr, "stcr" in heads
        edge_m = step.voxel_size_m if stcr.grid == "voxel" else stcr.grid_size_m
        terms["stcr"] = spatial_temporal_consistency(
            step.features(heads["stcr"]) if both else scr_PD,
            pixels_PD,
            pixel_labels_P,
            grid_cells(batch.pair_xyz_P3, batch.pair_frame_P, edge_m),
            step.text_CD,
            stcr.lambda_,
            pixel_term=stcr.pixel_term,
            cell_text=stcr.cell_text,
            max_points_per_cell=stcr.max_points_per_cell,
            count_empty_slots=stcr.count_empty_slots,
        )
        total.append(stcr.weight * terms["stcr"])
    return {"loss": torch.stack(total).sum(), **terms, "agreement": share(predictions_P == pixel_labels_P)}


def kl(model: Forward, batch: Sample, step: Step) -> Terms:
    """KL divergence between the class probabilities of student and teacher, both with SCR's ``tau``."""
    points_PD, pixels_PD = (step.features(rows_PD) for rows_PD in _pairs(model, batch, step))
    loss = class_divergence(points_PD, pixels_PD, step.text_CD, step.settings.scr.tau)
    return {"loss": loss, "agreement": step.agreement(points_PD, pixels_PD)}


def openscene(model: Forward, batch: Sample, step: Step) -> Terms:
    """OpenScene's distillation: one minus the cosine between the features of a point and its pixel."""
    points_PD, pixels_PD = _pairs(model, batch, step)
    return {"loss": cosine_distance(points_PD, pixels_PD), "agreement": step.agreement(points_PD, pixels_PD)}


def ppkt(model: Forward, batch: Sample, step: Step) -> Terms:
    """PPKT (Liu et al., 2021): InfoNCE from points to pixels, over a random subset of the pairs."""
    points_PD, pixels_PD = (normalize(rows_PD, dim=1) for rows_PD in _pairs(model, batch, step))
    chosen = step.rows(len(points_PD), points_PD.device)
    loss = info_nce(points_PD[chosen], pixels_PD[chosen], step.settings.contrast.temperature)
    return {"loss": loss, "agreement": step.agreement(points_PD, pixels_PD)}


def slidr(model: Forward, batch: Sample, step: Step) -> Terms:
    """SLidR (Sautier et al., CVPR 2022): InfoNCE from superpoints to superpixels over the whole batch."""
    points_PD, pixels_PD = (normalize(rows_PD, dim=1) for rows_PD in _pairs(model, batch, step))
    queries_SD, keys_SD = superpixel_means(points_PD, pixels_PD, batch.pair_segment_P)
    loss = info_nce(queries_SD, keys_SD, step.settings.contrast.temperature)
    return {"loss": loss, "agreement": step.agreement(points_PD, pixels_PD)}


def pointcontrast(model: Forward, batch: Sample, step: Step) -> Terms:
    """PointContrast (Xie et al., ECCV 2020): InfoNCE between two views of a random subset of the voxels, each as the
    first of its points.

    The second view rotates, flips and scales each cloud once more, as ``augment`` allows. No image is used.
    """
    num_points = len(batch.points_NI)
    voxels = voxelise(batch.points_NI[:, :3], batch.cloud_N, step.voxel_size_m, alignment=1)
    num_clouds, num_voxels = voxels.num_clouds, len(voxels.coordinates_V4)
    rows_N = torch.arange(num_points, device=batch.points_NI.device)
    # Points of one voxel have the same features, which must not be each other's negatives.
    first_V = rows_N.new_zeros(num_voxels).scatter_reduce_(
        0, voxels.voxel_of_point_N, rows_N, "amin", include_self=False
    )
    rng = np.random.default_rng([step.seed, step.number, step.rank])
    transform_K33 = torch.stack([random_transform(step.settings.augment, rng) for _ in range(num_clouds)])
    transform_K33 = transform_K33.to(batch.points_NI, non_blocking=True)
    moved_N3 = torch.einsum("nij,nj->ni", transform_K33[batch.cloud_N], batch.points_NI[:, :3])
    second_NI = torch.cat((moved_N3, batch.points_NI[:, 3:]), dim=1)
    points_2NI = torch.cat((batch.points_NI, second_NI))
    features_2ND = model(points_2NI, torch.cat((batch.cloud_N, batch.cloud_N + num_clouds)))["scr"]
    chosen = first_V[step.rows(num_voxels, features_2ND.device)]
    views = [normalize(features_2ND[chosen + start].float(), dim=1) for start in (0, num_points)]
    return {"loss": info_nce(views[0], views[1], step.settings.contrast.temperature)}


def _pairs(model: Forward, batch: Sample, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Point features of the head ``scr`` and pixel features of all pairs, both (P, D) float32."""
    points_PD = model(batch.points_NI, batch.cloud_N, batch.pair_point_P)["scr"].float()
    with torch.no_grad():
        return points_PD, step.pixels(batch)


LOSSES: dict[str, Callable[[Forward, Sample, Step], Terms]] = {
    "clip2scene": clip2scene,
    "kl": kl,
    "openscene": openscene,
    "ppkt": ppkt,
    "slidr": slidr,
    "pointcontrast": pointcontrast,
}
"""By ``distill.method``."""
