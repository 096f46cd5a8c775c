"""The stages that a job needs and the work of each, without doing any of it.

What the storage has (world, index, encoded images, distilled student) counts as done; scores, fine-tuned students and
predictions are not looked up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from clip2scene.cluster.plan_data import Data, count_data
from clip2scene.cluster.plan_machine import Machine
from clip2scene.cluster.plan_memory import STATES, actor_bytes, parameters, training_bytes
from clip2scene.cluster.plan_work import UNITS, Work, asks, seconds_of, source_of
from clip2scene.cluster.rates import RatedStage, Rates
from clip2scene.config import TEXT_FREE, Job, TeacherSettings, TrainingSettings, digest_of
from clip2scene.errors import ConfigError
from clip2scene.stages import Stages
from clip2scene.streetworld.sensors import CAMERA_NAMES
from clip2scene.teacher import store
from clip2scene.teacher.clip import DenseClip, load_teacher
from clip2scene.training.fit import steps_of

POINT_BYTES = 20
"""Per point in a cloud's file: x, y, z, intensity and ring, float32."""
LABEL_BYTES = {"streetworld": 1, "nuscenes": 1, "semantickitti": 4, "scannet": 3}
"""Per point in a file of predictions."""


@functools.lru_cache
def teacher_of(settings: TeacherSettings) -> DenseClip:
    """The teacher, loaded once for all jobs of a plan."""
    return load_teacher(settings)


class Planner:
    """Plans one job after another; what they share counts once, for the first job that needs it.

    Args:
        machine: where it would run.
        rates: measured speeds and sizes.
        num_frames: training keyframes of a data set that is not there.
    """

    def __init__(self, machine: Machine, rates: Rates, num_frames: int | None = None):
        self.machine, self.rates, self.notes = machine, rates, list[str]()
        self._num_frames = num_frames
        self._data: dict[str, Data] = {}
        self._seen: set[str] = set()

    def works(self, job: Job) -> Iterator[Work]:
        """The stages of a job that no earlier job of this plan had."""
        data, key = self.data(job), self._key(job)
        if job.dataset.kind == "streetworld" and self._is_new("streetworld", key):
            yield self._world(job, data)
        if self._is_new("index", key):
            size = data.frames * self.rates.bytes_of("keyframe in an index")
            done = data.frames if data.index_is_there else 0
            yield self._work("index", job, data.frames, done, stored_bytes=0 if done else size)
        if job.needs_teacher:
            yield from self._pretraining(job, data, key)
        yield from self._finetune(job, data, digest_of(key, self._student_key(job)))
        yield from self._predict(job, data)

    def _pretraining(self, job: Job, data: Data, key: str) -> Iterator[Work]:
        if self._is_new("extract", key, job.teacher.digest()):
            yield self._extract(job, data)
        if not job.reaches("distill"):
            return
        contrast = job.distill.contrast.digest()
        if job.distill.method == "slidr" and self._is_new("superpixels", key, contrast):
            pixels = job.teacher.image_height_px * job.teacher.image_width_px
            yield self._work("superpixels", job, data.train_images, stored_bytes=2 * data.train_images * pixels)
        student = digest_of(key, self._student_key(job))
        if self._is_new("distill", student):
            yield self.training("distill", job, job.distill, data.train_frames, job.distill.num_sweeps)
        scored = job.scores and job.distill.method not in TEXT_FREE
        if scored and self._is_new("evaluate", student, list(job.evaluate.methods)):
            yield self._work("evaluate", job, data.eval_frames)

    def data(self, job: Job) -> Data:
        """What a job reads; counted once for all jobs that read the same."""
        predicts = job.stage == "predict", job.reads_train_split
        key = digest_of(self._key(job), job.finetune.protocol, job.finetune.label_fraction, predicts)
        if key not in self._data:
            self._data[key] = count_data(job, self._num_frames)
        return self._data[key]

    def training(
        self, stage: RatedStage, job: Job, settings: TrainingSettings, frames: int, sweeps: int, runs: int = 1
    ) -> Work:
        """Work of ``runs`` trainings on ``frames`` keyframes."""
        steps = steps_of(settings, frames)
        clouds = steps * settings.batch_size * sweeps * runs
        size = parameters(job.student, self.shape(job).dim) * 4
        there = stage == "distill" and self._student_is_there(job)
        work = self._work(
            stage,
            job,
            clouds,
            clouds if there else 0,
            runs=runs,
            stored_bytes=0 if there else runs * size * (1 + 2 * (1 + STATES[settings.optimiser.kind])),
        )
        return replace(work, steps=steps * runs)

    def shape(self, job: Job) -> DenseClip:
        """The teacher, with random weights where possible, to read the shape of its features."""
        hub = job.teacher.model.startswith("hf-hub:")
        return teacher_of(job.teacher if hub else job.teacher.model_copy(update={"pretrained": "random"}))

    def memory(self, job: Job) -> list[Mapping[str, int] | None]:
        """Memory of a worker in each of the job's trainings."""
        shape, data = self.shape(job), self.data(job)
        trainings: list[TrainingSettings] = []
        if job.reaches("distill") and job.needs_teacher:
            trainings.append(job.distill)
        if job.finetunes:
            trainings.append(job.finetune)
        return [training_bytes(job, s, data, self.rates, grid=shape.grid, dim=shape.dim) for s in trainings]

    def actor_memory(self, job: Job) -> int | None:
        """Memory of an extraction actor; None if nothing is encoded."""
        if not job.needs_teacher:
            return None
        count = sum(parameter.numel() for parameter in self.shape(job).parameters())
        data = self.data(job)
        cameras = math.ceil(data.train_images / data.train_frames)
        return actor_bytes(job.teacher, count, job.extract.frames_per_batch, cameras, self.rates)

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _world(self, job: Job, data: Data) -> Work:
        world, left = job.dataset.streetworld, not data.world_is_there
        pixels = world.image_width_px * world.image_height_px
        images = self.rates.bytes_of("million pixels of a street world's images") * len(CAMERA_NAMES) * pixels // 10**6
        scenes = world.train_scenes + world.val_scenes
        sweeps = max(data.frames - scenes, 0) * world.sweeps_between_keyframes + scenes * world.sweeps_before_first
        clouds = (data.frames + sweeps) * POINT_BYTES * (data.points or 0)
        size = data.frames * images + clouds
        return self._work("streetworld", job, data.frames, 0 if left else data.frames, stored_bytes=left * size)

    def _extract(self, job: Job, data: Data) -> Work:
        done, shape = self._encoded(job, data), self.shape(job)
        image_bytes = 2 * shape.grid[0] * shape.grid[1] * shape.dim
        return self._work("extract", job, data.images, done, stored_bytes=(data.images - done) * image_bytes)

    def _encoded(self, job: Job, data: Data) -> int:
        """Number of images in the store, by the names of its files; a run also checks their contents."""
        stages = self._found(job, data)
        if stages is None:
            return 0
        frames = stages.frames
        stored = store.stored_frames(stages.store_path, stages.storage)
        return sum(len(frames[name].cameras) for name in stored if name in frames)

    def _student_is_there(self, job: Job) -> bool:
        stages = self._found(job, self.data(job))
        return stages is not None and stages.student_path(stages.distill_digest).is_file()

    def _found(self, job: Job, data: Data) -> Stages | None:
        """The job's stages with index and teacher loaded, if the storage has any features."""
        if data.stages is None or not (data.stages.storage.root / "features").is_dir():
            return None
        try:
            teacher = teacher_of(job.teacher)
        except ConfigError as error:
            self.note(f"all images count as not yet encoded: the teacher could not be loaded to check ({error})")
            return None
        stages = Stages(job)
        stages.index, stages.teacher = data.stages.index, teacher
        return stages

    def _finetune(self, job: Job, data: Data, start: str) -> Iterator[Work]:
        if not job.finetunes:
            return
        settings, new = job.finetune, []
        for initialisation in job.initialisations:
            own = settings.model_copy(update={"initialisations": (), "checkpoint": None}).digest()
            origin = (settings.checkpoint or start) if initialisation == "pretrained" else job.seed
            if self._is_new("finetune", self._key(job), own, job.student.digest(), job.seed, origin):
                new.append(initialisation)
        if new:
            yield self.training("finetune", job, settings, data.labelled_frames, 1, runs=len(new))
            if job.scores:
                yield self._work("evaluate", job, data.eval_frames)

    def _predict(self, job: Job, data: Data) -> Iterator[Work]:
        if job.stage == "predict":
            size = LABEL_BYTES[job.dataset.kind] * (data.points or 0)
            yield self._work("predict", job, data.eval_frames, stored_bytes=data.eval_frames * size)

    def _work(
        self, stage: RatedStage, job: Job, amount: int, done: int = 0, *, runs: int = 1, stored_bytes: int = 0
    ) -> Work:
        """The work of a stage, with its time."""
        workers, threads, gpus = asks(stage, job)
        rate = self.rates.find(stage, "gpu" if gpus else "cpu", job)
        at_work = self.machine.at_work(workers, threads, gpus)
        unit = rate.unit if rate is not None else UNITS[stage]
        work = Work(stage, amount, unit, done, gpus=gpus * workers, stored_bytes=stored_bytes)
        if done >= amount:
            return work
        return replace(
            work, seconds=seconds_of(rate, amount - done, at_work, runs), sources=source_of(rate, gpus, at_work)
        )

    def _key(self, job: Job) -> str:
        world = job.world_seed if job.dataset.kind == "streetworld" else None
        return digest_of(job.dataset.digest(), world, job.storage)

    def _student_key(self, job: Job) -> str:
        parts = (job.teacher, job.prompts, job.student, job.distill)
        return digest_of([part.digest() for part in parts], job.seed, job.resources.num_workers)

    def _is_new(self, *parts: object) -> bool:
        """Whether no earlier job of this plan had the same."""
        key = digest_of(*parts)
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new
