"""What is made before any training: the world, its index, the teacher's texts and features, superpixels.

The path of each contains a digest of exactly what determines its bytes: the feature store depends on the index and the
teacher, and on nothing that a sweep varies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clip2scene.config import TEXT_FREE, Job, digest_of
from clip2scene.data.contents import are_current
from clip2scene.data.datasets import build_index, fingerprint, version_of_test
from clip2scene.data.index import Frame, Index, read_index, write_index
from clip2scene.data.splits import missing_of_split, split_frames
from clip2scene.data.vocabulary import Vocabulary, vocabulary, vocabulary_of
from clip2scene.paths import from_home
from clip2scene.progress import progress, silent
from clip2scene.storage import Storage, folder_of
from clip2scene.teacher.clip import DenseClip, load_teacher
from clip2scene.teacher.extract import ExtractReport, extract
from clip2scene.teacher.prompts import Templates, text_embeddings
from clip2scene.teacher.store import FORMAT, MANIFEST, FeatureStore, read_manifest
from clip2scene.teacher.superpixels import SuperpixelStore, segment_images, superpixel_digest


def world_path(job: Job) -> Path:
    """The dataset's folder, which may not be there yet; a streetworld lies in the storage unless it has a root."""
    dataset = job.dataset
    if dataset.root or dataset.kind != "streetworld":
        return from_home(dataset.root or "").resolve()
    from clip2scene.streetworld.generate import world_digest

    return folder_of(job.storage) / "streetworld" / world_digest(dataset.streetworld, job.world_seed)


def linked_folders(job: Job) -> tuple[Path, ...]:
    """Folders outside of the dataset's to which links in it may lead."""
    return tuple(from_home(folder) for folder in job.dataset.linked_folders)


def eval_version(job: Job) -> str:
    """The version of the dataset that holds the evaluation split; official test splits are for predictions only."""
    dataset = job.dataset
    if job.stage == "predict" and dataset.eval_split == "test":
        return version_of_test(dataset.kind, world_path(job), dataset.version)
    return dataset.version


def versions(job: Job) -> tuple[str, ...]:
    """The versions of the dataset that a job reads, without repetition; the last has the evaluation split."""
    return tuple(dict.fromkeys((*([job.dataset.version] if job.reads_train_split else []), eval_version(job))))


def make_index(job: Job, version: str) -> Index:
    """Index the dataset's folder."""
    settings = job.dataset
    return build_index(
        settings.kind,
        world_path(job),
        version=version,
        max_sweeps=settings.max_sweeps,
        images_per_scene=settings.images_per_scene,
        linked_folders=linked_folders(job),
    )


def missing_of_splits(job: Job, indexes: Mapping[str, Index]) -> dict[str, str]:
    """Splits of a job that are on disk only in part, and how much of each is; a streetworld is always whole.

    Args:
        job: with the splits.
        indexes: that the job reads, by version.
    """
    settings = job.dataset
    if settings.kind == "streetworld":
        return {}
    read = {settings.train_split: indexes[settings.version]} if job.reads_train_split else {}
    read |= {settings.eval_split: indexes[eval_version(job)]}
    parts = {name: missing_of_split(index, name) for name, index in read.items()}
    return {name: part for name, part in parts.items() if part is not None}


class Artifacts:
    """What a job's trainings read, made on first use: world, index, frames, texts, features, superpixels."""

    def __init__(self, job: Job):
        self.job = job
        self.storage = Storage(job.storage)
        words, names = job.prompts.vocabulary, job.prompts.names
        self.vocabulary: Vocabulary = vocabulary_of(job.dataset.kind, names)
        self.prompt_vocabulary = self.vocabulary if words is None else vocabulary(words, names)

    # --- index ---

    @functools.cached_property
    def root(self) -> Path:
        """The dataset's folder; a streetworld that is not there yet is generated, on this machine only."""
        dataset, root = self.job.dataset, world_path(self.job)
        if dataset.kind != "streetworld":
            return root
        from clip2scene.streetworld.generate import generate

        world, seed = dataset.streetworld, self.job.world_seed
        scenes = world.train_scenes + world.val_scenes
        show = silent if root.is_dir() else progress
        with show("streetworld", scenes, unit="scenes") as advance:
            generate(root, world, seed=seed, workers=self.job.extract.num_actors, advance=advance)
        return root

    def index_path(self, version: str) -> Path:
        """Where the index of a version lies or will lie; the dataset's folder must be there."""
        settings = self.job.dataset
        source = fingerprint(settings.kind, world_path(self.job), version)
        key = digest_of(source, settings.max_sweeps, settings.images_per_scene)
        return self.storage.path("indexes", f"{key}.parquet")

    @functools.cached_property
    def index(self) -> Index:
        """All keyframes of the dataset; made if it is not in the storage yet, or if files have changed since."""
        return self._index_of(self.job.dataset.version)

    @functools.cached_property
    def eval_index(self) -> Index:
        """The index with the evaluation split; another than :attr:`index` only for an official test split."""
        version = eval_version(self.job)
        return self.index if version == self.job.dataset.version else self._index_of(version)

    @property
    def indexes(self) -> dict[str, Index]:
        """The indexes that the job reads, by version."""
        return {
            version: self.index if version == self.job.dataset.version else self.eval_index
            for version in versions(self.job)
        }

    def _index_of(self, version: str) -> Index:
        root = self.root
        path = self.index_path(version)
        if self.storage.fetch(path):
            index = read_index(path, root, linked_folders(self.job))
            if are_current(index):
                return index
        built = make_index(self.job, version)
        with self.storage.writing(path) as aside:
            write_index(built, aside)
        return read_index(path, root, linked_folders(self.job))

    @functools.cached_property
    def train_frames(self) -> tuple[Frame, ...]:
        """Keyframes to train on; none if nothing is trained."""
        return split_frames(self.index, self.job.dataset.train_split) if self.job.reads_train_split else ()

    @functools.cached_property
    def distilled_frames(self) -> tuple[Frame, ...]:
        """Training keyframes that pre-training reads: those with an image, unless its method reads none."""
        if self.job.distill.method in TEXT_FREE:
            return self.train_frames
        return tuple(frame for frame in self.train_frames if frame.cameras)

    @functools.cached_property
    def eval_frames(self) -> tuple[Frame, ...]:
        """Keyframes to score on, or to predict."""
        return split_frames(self.eval_index, self.job.dataset.eval_split)

    @functools.cached_property
    def missing(self) -> dict[str, str]:
        """Splits that are on disk only in part, and how much of each is."""
        return missing_of_splits(self.job, self.indexes)

    @functools.cached_property
    def trained_on(self) -> str | None:
        """How many of the keyframes to score on are trained on too; None if none is, or nothing is scored."""
        if self.job.stage not in ("evaluate", "finetune"):
            return None
        shared = {frame.frame_id for frame in self.eval_frames} & {frame.frame_id for frame in self.train_frames}
        return f"{len(shared)} of {len(self.eval_frames)} keyframes" if shared else None

    @property
    def omissions(self) -> tuple[str, ...]:
        """One sentence per thing that the index has left out, that a split lacks on disk, or that teaches nothing, and
        one each if what is scored is not held out, and if self-training never begins.
        """
        distill = self.job.distill
        never_switches = (
            distill.method == "clip2scene" and distill.s3.probability > 0 and distill.s3.start_epoch >= distill.epochs
        )
        total = len(self.train_frames)
        blind = total - len(self.distilled_frames)
        never = f"S3 never begins: distill.s3.start_epoch={distill.s3.start_epoch}, distill.epochs={distill.epochs}"
        held_out = f"split {self.job.dataset.eval_split} is not held out: {self.trained_on} are also trained on"
        return (
            *(sentence for index in self.indexes.values() for sentence in index.left_out),
            *(f"split {name}: {part} are there" for name, part in self.missing.items()),
            *([f"{blind} of {total} training keyframes have no image to distil from"] if blind else []),
            *([held_out] if self.trained_on else []),
            *([never] if never_switches and self.job.reaches("distill") and self.job.needs_teacher else []),
        )

    # --- teacher ---

    @functools.cached_property
    def teacher(self) -> DenseClip:
        """The frozen CLIP."""
        return load_teacher(self.job.teacher)

    def text(self, words: Vocabulary, templates: Templates) -> torch.Tensor:
        """Class embeddings t_c of a vocabulary, (C, D) float32, L2-normalised."""
        key = digest_of(self.teacher.text_digest, self.job.teacher.model_dump(mode="json"), words.digest, templates)
        path = self.storage.path("texts", f"{key}.safetensors")
        if not self.storage.fetch(path):
            text_CD = text_embeddings(self.teacher, words, templates)
            with self.storage.writing(path) as aside:
                save_file({"text": text_CD.contiguous()}, aside)
        return load_file(path)["text"]

    @property
    def prompts_digest(self) -> str:
        """Hash of the scored class names and the templates; scores with different ones are not comparable."""
        return digest_of(self.vocabulary.digest, self.job.prompts.templates)

    @property
    def store_digest(self) -> str:
        """Digest of the feature store."""
        return digest_of(FORMAT, self.index.digests.images, self.teacher.digest)

    @property
    def store_path(self) -> Path:
        """Where the feature store lies or will lie."""
        return self.storage.path("features", self.store_digest)

    @functools.cached_property
    def store(self) -> FeatureStore:
        """The finished feature store; this job can go on reading it while another job adds to it.

        Raises:
            DataError: it is not finished, or has another teacher's features.
        """
        return FeatureStore.open(self.store_path, self.storage, teacher_digest=self.teacher.digest)

    def quarantined(self, frames: Iterable[Frame]) -> list[tuple[str, str]]:
        """Keyframe and camera of the images that the store has no features of, as they cannot be read.

        Part of the digest of what is made from the others: once they are repaired, it is made again.
        """
        path = self.store_path / MANIFEST
        if not self.storage.fetch(path):
            return []
        ids = {frame.frame_id for frame in frames}
        broken = read_manifest(self.store_path)["broken"]
        return [(image["frame_id"], image["camera"]) for image in broken if image["frame_id"] in ids]

    @property
    def frames(self) -> dict[str, Frame]:
        """Keyframes by id whose images are encoded: of both splits, or of the training split where none is scored."""
        held_out = () if self.job.stage == "predict" else self.eval_frames
        return {frame.frame_id: frame for frame in (*self.train_frames, *held_out)}

    def extract(self) -> ExtractReport:
        """Encode the images of :attr:`frames` that are not in the store yet."""
        return extract(
            self.index,
            tuple(self.frames.values()),
            self.teacher,
            self.job.extract,
            self.store_path,
            storage=self.storage,
        )

    @property
    def inputs_digest(self) -> str:
        """Equal for jobs that read the same world, features and superpixels."""
        job = self.job
        world = job.world_seed if job.dataset.kind == "streetworld" else None
        superpixels = job.distill.contrast.digest() if job.distill.method == "slidr" else None
        return digest_of(job.dataset.digest(), job.teacher.digest(), world, superpixels)

    def make_inputs(self) -> ExtractReport:
        """Make what is missing of everything that :attr:`inputs_digest` covers."""
        done = self.extract()
        if self.job.distill.method == "slidr":
            self.make_superpixels()
        return done

    @property
    def superpixel_path(self) -> Path:
        """Where the superpixels lie or will lie."""
        teacher = self.job.teacher
        size = (teacher.image_height_px, teacher.image_width_px)
        key = superpixel_digest(self.index.digests.images, self.job.distill.contrast, *size)
        return self.storage.path("superpixels", key)

    def make_superpixels(self) -> SuperpixelStore:
        """Segment the training images that are not segmented yet; SLidR needs them."""
        teacher = self.job.teacher
        segment_images(
            self.index,
            self.train_frames,
            self.job.distill.contrast,
            teacher.image_height_px,
            teacher.image_width_px,
            self.superpixel_path,
            self.job.extract.num_actors,
            storage=self.storage,
        )
        return SuperpixelStore.open(self.superpixel_path, self.storage)
