"""What an experiment is: frozen models with units in their names, loaded from YAML with ``key=value`` overrides.

Defaults are the paper's nuScenes settings (CLIP2Scene, CVPR 2023) where it states them. A mistake in a job file ends in
one :class:`ConfigError` sentence that names the key's path, the value and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

STAGES = ("index", "extract", "distill", "evaluate", "finetune")
Stage = Literal["index", "extract", "distill", "evaluate", "finetune", "streetworld_clip"]


Model = TypeVar("Model", bound=BaseModel)


class Clip2sceneError(Exception):
    """Base of errors whose message is one sentence for the user: what was wrong, where, and what is allowed."""


class ConfigError(Clip2sceneError, ValueError):
    """A job file, an override or an argument that cannot be run."""


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def digest(self) -> str:
        """Hash of every value, stable over key order and over sessions (16 hex characters)."""
        return digest_of(self.model_dump(mode="json"))


class StreetworldSettings(Settings):
    """The synthetic street world (``dataset.kind=streetworld``); its seed is the job's."""

    train_scenes: int = Field(16, ge=1, le=600)
    val_scenes: int = Field(8, ge=1, le=150)
    keyframes_per_scene: int = Field(4, ge=1, le=40)
    sweeps_between_keyframes: int = Field(9, ge=0, le=19)
    """LiDAR sweeps between two keyframes; nuScenes records 20 Hz and annotates 2 Hz, so 9."""
    image_width_px: int = Field(400, ge=32)
    image_height_px: int = Field(224, ge=32)
    lidar_beams: int = Field(24, ge=4, le=128)
    lidar_azimuth_steps: int = Field(450, ge=36)


class DatasetSettings(Settings):
    """Which frames, and which scenes of them are trained and reported on."""

    kind: Literal["streetworld", "nuscenes"] = "nuscenes"
    root: str | None = None
    """Folder that holds the tables and sensor files. Streetworld writes its own when this is not given."""
    version: str = "v1.0-trainval"
    """Name of the folder of tables below ``root``."""
    max_sweeps: int = Field(10, ge=0)
    """Earlier sweeps to index per keyframe; 0 for a download of keyframes only."""
    train_split: str = "parametrizing"
    """Split that is distilled and fine-tuned on."""
    eval_split: str = "verifying"
    """Split that scores are computed on."""
    streetworld: StreetworldSettings = StreetworldSettings()

    @model_validator(mode="after")
    def _root_is_given(self) -> DatasetSettings:
        if self.kind != "streetworld" and self.root is None:
            raise ValueError(f"dataset.root must name the {self.kind} folder when dataset.kind={self.kind}")
        return self


class TeacherSettings(Settings):
    """A frozen open_clip model and how it is read densely (MaskCLIP)."""

    model: str = "ViT-B-16"
    """open_clip model name, ``local-dir:FOLDER`` (with open_clip_config.json), or ``streetworld`` (shipped)."""
    pretrained: str = "openai"
    """open_clip tag, path of a local checkpoint, or ``random`` (seeded). Unused by local-dir and streetworld."""
    image_height_px: int = Field(224, ge=16)
    image_width_px: int = Field(416, ge=16)
    clip_normalisation: bool = True
    """Normalise with CLIP's mean and std; the released code does not."""
    keep_last_residual: bool = False
    """Keep the last block's residual connection beside its value path."""
    keep_last_mlp: bool = False
    """Keep the last block's MLP after its value path."""
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)
    """Only for ``pretrained=random``."""


class PromptSettings(Settings):
    """Class names and sentences whose averaged text embeddings are the label space (t_c)."""

    vocabulary: str = "nuscenes"
    templates: Literal["clip85", "plain"] = "clip85"
    """``clip85``: the 85 templates averaged per class (paper); ``plain``: the class name alone."""


class ExtractSettings(Settings):
    """The Ray Data job that fills the feature store."""

    num_actors: int = Field(2, ge=1)
    gpus_per_actor: float = Field(0, ge=0)
    threads_per_actor: int = Field(1, ge=1)
    frames_per_batch: int = Field(4, ge=1)
    max_broken_fraction: float = Field(0.01, ge=0, le=1)
    """Share of images that may be unreadable before the run ends with an error."""


class StudentSettings(Settings):
    """The sparse 3D network."""

    voxel_size_m: float = Field(0.1, gt=0)
    channels: tuple[int, ...] = Field((32, 64, 128, 256, 256), min_length=2, max_length=8)
    """Width of the stem and of every further encoder level, each halving the resolution."""
    blocks_per_level: int = Field(1, ge=1, le=4)
    point_branch: bool = True
    """The point-wise branch of SPVCNN beside the voxels."""
    use_intensity: bool = True


class ScrSettings(Settings):
    """Semantic consistency, equation 1."""

    weight: float = Field(1.0, ge=0)
    tau: float = Field(0.5, gt=0)


class StcrSettings(Settings):
    """Semantic-guided spatial-temporal consistency, equations 2 to 4."""

    weight: float = Field(1.0, ge=0)
    lambda_: float = Field(1.0, gt=0, alias="lambda")
    grid_size_m: float = Field(0.5, gt=0)

    model_config = ConfigDict(populate_by_name=True)


class S3Settings(Settings):
    """Switchable self-training."""

    start_epoch: int = Field(10, ge=0)
    """The switch begins after this many epochs."""
    probability: float = Field(0.5, ge=0, le=1)
    """Chance that a point's own prediction replaces the pixel's label."""
    granularity: Literal["point", "batch"] = "point"


class AugmentSettings(Settings):
    """Transforms of the cloud (after pairing) while training."""

    rotate: bool = True
    """Uniform rotation about z."""
    flip: bool = True
    """Mirror x and y, each with probability one half."""
    scale: float = Field(0.05, ge=0, lt=1)
    """Uniform scaling within 1 ± this."""


class OptimiserSettings(Settings):
    """SGD with the paper's constants (or AdamW, for runs of few steps) and a cosine schedule over all steps."""

    kind: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD only, as is ``dampening``."""
    dampening: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_fraction: float = Field(0.0, ge=0, lt=1)


class DistillSettings(Settings):
    """Pre-training without labels."""

    epochs: int = Field(20, ge=1)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps whatever ``epochs`` says."""
    batch_size: int = Field(4, ge=1)
    """Keyframes a step, over all workers."""
    num_sweeps: int = Field(3, ge=1, le=10)
    """K: the keyframe and K - 1 earlier sweeps, each its own input cloud."""
    sweep_window_s: float = Field(0.5, gt=0)
    """The K - 1 sweeps are spread evenly over this time before the keyframe."""
    normalise_features: bool = True
    """L2-normalise point and pixel features before the scalar products (ours; the paper states none)."""
    scr: ScrSettings = ScrSettings()
    stcr: StcrSettings = StcrSettings()
    s3: S3Settings = S3Settings()
    augment: AugmentSettings = AugmentSettings()
    optimiser: OptimiserSettings = OptimiserSettings()


class FinetuneSettings(Settings):
    """Supervised training on a fraction of the labels."""

    initialisations: tuple[Literal["pretrained", "scratch"], ...] = Field(("pretrained", "scratch"), min_length=1)
    checkpoint: str | None = None
    """A student file to start from instead of distilling one (made with the same ``student`` settings)."""
    protocol: Literal["clip2scene_frame", "slidr_scene"] = "clip2scene_frame"
    """``clip2scene_frame``: every n-th keyframe; ``slidr_scene``: every n-th scene. Not comparable."""
    label_fraction: float = Field(0.01, gt=0, le=1)
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(4, ge=1)
    backbone_learning_rate_scale: float = Field(1.0, gt=0)
    """Learning rate of pre-trained weights relative to the new head's."""
    augment: AugmentSettings = AugmentSettings()
    optimiser: OptimiserSettings = OptimiserSettings()


class ResourceSettings(Settings):
    """What the training workers get."""

    num_workers: int = Field(2, ge=0)
    """Ray Train workers; 0 runs in this process without Ray."""
    gpus_per_worker: float = Field(0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    cached_frames: int = Field(256, ge=0)
    """Decoded keyframes that each worker keeps in memory."""
    checkpoint_every_epochs: int = Field(5, ge=1)
    max_failures: int = Field(1, ge=0)
    """Restarts from the last checkpoint before a training run is given up."""


class StreetworldClipSettings(Settings):
    """Rebuilds the small CLIP that ships with streetworld, from crops and captions only."""

    output: str = "streetworld-clip"
    """Folder for open_clip_config.json and open_clip_model.safetensors."""
    world_seeds: tuple[int, ...] = Field((1001, 1002, 1003, 1004), min_length=1)
    scenes_per_world: int = Field(28, ge=1)
    tiles_per_image: int = Field(3, ge=1)
    """Pieces of an image, with eight crops each."""
    steps: int = Field(3000, ge=1)
    batch_size: int = Field(128, ge=8)
    """Crops a step."""
    learning_rate: float = Field(1.2e-3, gt=0)


class Job(Settings):
    """One runnable experiment: where to stop, on what, how, and with which resources."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    stage: Stage = "finetune"
    """Last stage to run; the missing earlier ones run first."""
    seed: int = Field(0, ge=0, lt=2**31)
    storage: str = "clip2scene-storage"
    """Folder for indexes, feature stores, checkpoints and scores."""
    experiment: str = "clip2scene"
    """MLflow experiment that the runs are filed under."""
    dataset: DatasetSettings
    teacher: TeacherSettings = TeacherSettings()
    prompts: PromptSettings = PromptSettings()
    extract: ExtractSettings = ExtractSettings()
    student: StudentSettings = StudentSettings()
    distill: DistillSettings = DistillSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    resources: ResourceSettings = ResourceSettings()
    streetworld_clip: StreetworldClipSettings = StreetworldClipSettings()

    @model_validator(mode="after")
    def _batches_divide(self) -> Job:
        workers = max(self.resources.num_workers, 1)
        for key, size in (("distill", self.distill.batch_size), ("finetune", self.finetune.batch_size)):
            if size % workers:
                raise ValueError(
                    f"{key}.batch_size={size} must be a multiple of resources.num_workers={self.resources.num_workers}"
                )
        return self


def digest_of(*parts: Any) -> str:
    """Hash of JSON-able parts (16 hex characters)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Read a job file and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the job file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a job file is a mapping of keys to values, not {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse(Job, values, str(path))


def parse(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Validate ``values``; the first problem becomes one sentence that starts with ``source`` and the key's path.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_keys(_model_at(model, location[:-1])))
        raise ConfigError(f"{source}: {key}: unknown key; allowed here: {', '.join(allowed)}")
    if problem["type"] == "missing":
        raise ConfigError(f"{source}: {key}: required, and not given")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        raise ConfigError(f"{source}: {message}")
    raise ConfigError(f"{source}: {key}={problem['input']!r}: {message[0].lower()}{message[1:]}")


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a group of keys"
            )
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    for name in location:
        annotation = _fields(model)[name].annotation
        candidates = (annotation, *typing.get_args(annotation))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _keys(model: type[BaseModel]) -> set[str]:
    return set(_fields(model))
