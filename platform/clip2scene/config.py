"""What an experiment is: frozen models with units in their names.

Defaults are the paper's nuScenes settings (CLIP2Scene, CVPR 2023) where it states them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

_ROUNDED_WITHIN = 0.06
"""How far, relatively, a given fraction may be from the 1/n that is used."""
Stage = Literal["index", "extract", "distill", "evaluate", "finetune", "predict"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which they run."""
TEXT_FREE = ("pointcontrast",)
"""Methods with features outside CLIP's space: nothing can be scored before they are fine-tuned."""
DatasetKind = Literal["streetworld", "nuscenes", "semantickitti", "scannet"]
Initialisation = Literal["pretrained", "scratch"]
Split = Literal["train", "val", "test", "parametrizing", "verifying", "mini_train", "mini_val"]
ClassNames = Literal["common", "official"]
PromptTemplates = Literal["clip85", "plain"]
Score = Literal["miou", "agreement", "consistency", "label_free"]
"""On the verifying scenes; a sweep selects trials by one of them."""


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def digest(self) -> str:
        """Hash of all values (16 hex characters); key order and session do not matter."""
        return digest_of(self.model_dump(mode="json"))


Gpus = Annotated[float, Field(ge=0, le=1)]
"""GPUs per process, which computes on one at most."""


class StreetworldSettings(Settings):
    """The synthetic street world (``dataset.kind=streetworld``)."""

    seed: int | None = Field(None, ge=0, lt=2**31)
    """Seed of the world; defaults to the job's. Set it to train several seeds in one world."""
    train_scenes: int = Field(16, ge=1, le=600)
    """Scenes of the split ``train``, which is divided into ``parametrizing`` and ``verifying``."""
    val_scenes: int = Field(8, ge=1, le=150)
    """Scenes of the split ``val``."""
    keyframes_per_scene: int = Field(4, ge=1, le=40)
    """Labelled scans per scene, 0.5 s apart, with six images each."""
    sweeps_between_keyframes: int = Field(9, ge=0, le=19)
    """LiDAR sweeps evenly spaced between two keyframes; nuScenes records 20 Hz and annotates 2 Hz, so 9."""
    sweeps_before_first: int = Field(0, ge=0, le=19)
    """LiDAR sweeps before a scene's first keyframe, at the same rate. nuScenes has none, so the first keyframe of a
    scene is trained on a single sweep (one keyframe in forty there; every second one here with two per scene)."""
    image_width_px: int = Field(400, ge=32)
    """Width of the images of all six cameras."""
    image_height_px: int = Field(224, ge=32)
    """Height of the images of all six cameras."""
    lidar_beams: int = Field(24, ge=4, le=128)
    """Beams, from -30 to 10 degrees of elevation; nuScenes has 32."""
    lidar_azimuth_steps: int = Field(450, ge=36)
    """Rays per beam in a full turn; a sweep has at most beams x steps points."""


class DatasetSettings(Settings):
    """The data set, and which of its scenes are trained on and reported on."""

    kind: DatasetKind = "nuscenes"
    """The data set's format; ``streetworld`` is the synthetic street world, in nuScenes' format."""
    root: str | None = None
    """Folder of the data set. Streetworld is generated in the storage when this is not given."""
    linked_folders: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Folders outside of ``root`` to which links in it may lead, such as one on a faster disk. Other links out of it
    are refused, so that a data set from elsewhere does not lead to other files of this machine."""
    version: str = "v1.0-trainval"
    """Name of the folder of tables in ``root`` (nuScenes' format only; ``scans_test`` for ScanNet's test scans)."""
    max_sweeps: int = Field(10, ge=0)
    """Earlier sweeps to index per keyframe; 0 if only keyframes were downloaded."""
    images_per_scene: int | None = Field(None, ge=1)
    """ScanNet: posed frames per scene at most, spread evenly; all when not given."""
    train_split: Split = "parametrizing"
    """Split for distillation and fine-tuning; ``parametrizing`` and ``verifying`` are parts of ``train``, and only
    nuScenes has ``mini_train`` and ``mini_val``."""
    eval_split: Split = "verifying"
    """Split that scores and predictions are computed on; the same names are allowed as for ``train_split``. The stage
    ``predict`` reads ``test`` from ``v1.0-test`` or ``scans_test`` where that lies beside the training scenes."""
    streetworld: StreetworldSettings = StreetworldSettings()

    @model_validator(mode="after")
    def _root_is_given(self) -> DatasetSettings:
        if self.kind != "streetworld" and self.root is None:
            raise ValueError(f"dataset.root must name the {self.kind} folder when dataset.kind={self.kind}")
        for key in ("train_split", "eval_split"):
            if getattr(self, key).startswith("mini") and self.kind not in ("nuscenes", "streetworld"):
                raise ValueError(f"dataset.{key}={getattr(self, key)}: {self.kind} has no such split, nuScenes has")
        return self


class TeacherSettings(Settings):
    """A frozen open_clip model and how it is read densely (MaskCLIP)."""

    model: str = "ViT-B-16"
    """open_clip model name, ``local-dir:FOLDER`` (with open_clip_config.json), or ``streetworld`` (shipped)."""
    pretrained: str = "openai"
    """open_clip tag, path of a local checkpoint, or ``random`` (seeded). Unused by local-dir and streetworld; a model
    of ``hf-hub:`` has its own weights unless this is ``random``."""
    image_height_px: int = Field(224, ge=16)
    """Every image is resized to this height, a multiple of the model's patch size (16 for ViT-B-16, 32 for ResNets)."""
    image_width_px: int = Field(416, ge=16)
    """And to this width, likewise; nothing is cropped."""
    clip_normalisation: bool = True
    """Normalise with CLIP's mean and std; the released code does not."""
    keep_last_residual: bool = False
    """Keep the last block's residual connection beside its value path, as MaskCLIP's code for ViTs and the released
    code do. ResNets have none there."""
    keep_last_mlp: bool = False
    """Keep the last block's MLP after its value path, likewise; ViTs only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the vision tower; features are stored as float16 either way."""
    seed: int = Field(0, ge=0)
    """Only for ``pretrained=random``."""


class PromptSettings(Settings):
    """Class names and sentences whose averaged text embeddings are the label space (t_c)."""

    vocabulary: Literal["nuscenes", "semantickitti", "scannet", "cityscapes", "all"] | None = None
    """Whose class names the teacher labels pixels with while distilling; the data set's own when not given. ``all`` are
    those of the three street sets. Scores are always over the data set's own classes."""
    names: ClassNames = "common"
    """``official``: the benchmark's one name of each class ("driveable surface"), as in the paper; ``common``: everyday
    names of our own, several per class and averaged ("road", "street")."""
    templates: PromptTemplates = "clip85"
    """``clip85``: the 85 templates averaged per class (paper); ``plain``: the class name alone."""


class ExtractSettings(Settings):
    """The Ray Data job that fills the feature store."""

    num_actors: int = Field(2, ge=1)
    """Processes that encode images, each with its own teacher; as many render a street world."""
    gpus_per_actor: Gpus = 0
    """GPUs per actor: 1, a fraction such as 0.5 for two actors on one GPU, or 0 for CPUs."""
    threads_per_actor: int = Field(1, ge=1)
    """CPU threads per actor, at most the CPUs there are; with a GPU also the threads that read images."""
    frames_per_batch: int = Field(4, ge=1)
    """Keyframes handed to an actor at a time; each is encoded by itself, so features do not depend on this."""
    max_broken_fraction: float = Field(0.01, ge=0, le=1)
    """Share of images that may be unreadable before the run ends with an error."""


class StudentSettings(Settings):
    """The sparse 3D network."""

    architecture: Literal["spvcnn", "minkunet14", "minkunet18", "minkunet34"] = "spvcnn"
    """SPVCNN has a point-wise branch beside its voxels; the MinkUNets have none."""
    channels: tuple[int, ...] | None = Field(None, min_length=2, max_length=8)
    """A smaller SPVCNN: width of the stem and of each further encoder level. Each level halves the resolution and has
    one residual block. The published layout of ``architecture`` when not given."""
    voxel_size_m: float = Field(0.1, gt=0)
    """Edge length of the network's finest voxels."""
    use_intensity: bool = True
    """LiDAR intensity as an input (ScanNet: luminance of the mesh's colour)."""
    use_colour: bool = False
    """Red, green and blue of the points as inputs, which only ScanNet's meshes have."""
    use_position: bool = True
    """Position as an input: x and y in the voxel, height above the sensor. The released code has intensity alone."""

    @model_validator(mode="after")
    def _has_inputs(self) -> StudentSettings:
        if not (self.use_intensity or self.use_colour or self.use_position):
            raise ValueError("student.use_intensity, use_colour and use_position are all false; one of them is needed")
        return self

    @model_validator(mode="after")
    def _published_layouts_stay(self) -> StudentSettings:
        if self.channels is not None and self.architecture != "spvcnn":
            raise ValueError(
                f"student.channels={list(self.channels)} is only for student.architecture=spvcnn; "
                f"{self.architecture} has its published layout"
            )
        return self


class ScrSettings(Settings):
    """Semantic consistency, equation 1."""

    weight: float = Field(1.0, ge=0)
    """Factor in the sum of both losses; 0 leaves this one out."""
    tau: float = Field(0.5, gt=0)
    """Temperature of equation 1, and of ``distill.method=kl``."""
    form: Literal["equation", "cross_entropy"] = "equation"
    """``equation``: equation 1; ``cross_entropy``: over text logits without tau, as in the released code."""


class StcrSettings(Settings):
    """Semantic-guided spatial-temporal consistency, equations 2 to 4."""

    weight: float = Field(1.0, ge=0)
    """Factor in the sum of both losses; 0 leaves this one out."""
    lambda_: float = Field(1.0, gt=0, alias="lambda")
    """Temperature of the softmax that fuses a cell's pixels and points."""
    grid_size_m: float = Field(0.5, gt=0)
    """Edge length of the cells; points in one cell are pulled together."""
    grid: Literal["metres", "voxel"] = "metres"
    """``metres``: cells of ``grid_size_m``; ``voxel``: the network's voxels (released code)."""
    pixel_term: bool = True
    """Fuse pixel features too; the released code does not."""
    cell_text: Literal["point", "first"] = "point"
    """Text embedding that weighs the points of a cell: each point's own, or the first point's (released code)."""
    max_points_per_cell: int | None = Field(None, ge=1)
    """Further points of a cell are dropped; all are kept when not given, 8 in the released code."""
    count_empty_slots: bool = False
    """With ``max_points_per_cell``: count unused slots in the mean as sigmoid(0) (released code)."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _slots_are_bounded(self) -> StcrSettings:
        if self.count_empty_slots and self.max_points_per_cell is None:
            raise ValueError(
                "distill.stcr.count_empty_slots=true needs distill.stcr.max_points_per_cell, which bounds the slots"
            )
        return self


class S3Settings(Settings):
    """Switchable self-training."""

    start_epoch: int = Field(10, ge=0)
    """The switch begins after this many epochs."""
    probability: float = Field(0.5, ge=0, le=1)
    """Chance that a point's own prediction replaces the pixel's label."""
    granularity: Literal["point", "batch"] = "point"
    """``point``: one draw per point-pixel pair; ``batch``: one draw per step for all pairs of a worker."""
    synchronised: bool = True
    """Draw the same on all ranks; the released code does not."""


class ContrastSettings(Settings):
    """InfoNCE of the baselines PPKT, SLidR and PointContrast."""

    temperature: float = Field(0.07, gt=0)
    """Divides the scalar products of features. PointContrast's authors train with 0.4."""
    max_pairs: int = Field(4096, ge=2)
    """Pairs (PPKT) or voxels (PointContrast) drawn at random from a worker's batch, which bounds memory."""
    superpixels_per_image: int = Field(150, ge=2, le=4096)
    """SLidR: number of superpixels requested from SLIC."""
    compactness: float = Field(6.0, gt=0)
    """SLidR: SLIC's weight of position against colour."""


class AugmentSettings(Settings):
    """Transforms of the cloud (after pairing) while training."""

    rotate: bool = True
    """Uniform rotation about z."""
    flip: bool = True
    """Mirror x and y, each with probability 0.5."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Uniform scaling by a factor within 1 ± this; not in the paper."""


class OptimiserSettings(Settings):
    """SGD with the paper's constants (or AdamW, for runs of few steps) and a cosine schedule over all steps."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """The optimiser."""
    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate, after the warm-up; from there it falls to 0 along half a cosine."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum (SGD only)."""
    dampening: float = Field(0.1, ge=0, lt=1)
    """Dampening of the momentum (SGD only)."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty of SGD, decoupled decay of AdamW; on all weights."""
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate first rises linearly from 0."""


class TrainingSettings(Settings):
    """What distillation and fine-tuning have in common."""

    epochs: int = Field(20, ge=1)
    """Passes over the training keyframes."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, whatever ``epochs`` is."""
    batch_size: int = Field(4, ge=1)
    """Keyframes per step, over all workers; a multiple of their number."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of activations and their gradients, with loss scaling; weights and losses stay in fp32. ``fp16`` needs
    GPUs."""
    augment: AugmentSettings = AugmentSettings()
    optimiser: OptimiserSettings = OptimiserSettings()


class DistillSettings(TrainingSettings):
    """Pre-training without labels."""

    method: Literal["clip2scene", "kl", "openscene", "ppkt", "slidr", "pointcontrast"] = "clip2scene"
    """``clip2scene``, or a baseline in the same loop and network. ``kl``: KL divergence from the teacher's class
    probabilities; ``openscene``: cosine distillation; ``ppkt``: point-pixel InfoNCE; ``slidr``: superpixel InfoNCE;
    ``pointcontrast``: InfoNCE of two views of the cloud."""
    num_sweeps: int = Field(3, ge=1, le=10)
    """K: the keyframe and K - 1 earlier sweeps, each its own input cloud."""
    sweep_window_s: float = Field(0.5, gt=0)
    """The K - 1 sweeps are spread evenly over this time before the keyframe."""
    sweep_choice: Literal["spread", "random"] = "spread"
    """``spread``: evenly over the window; ``random``: drawn from the last ten sweeps every time (released code)."""
    merge_sweeps: bool = False
    """Merge the K sweeps into one input cloud ("merged" in the paper's Table 3)."""
    normalise_features: bool = True
    """L2-normalise point and pixel features before scalar products (our choice; the paper states none)."""
    scr: ScrSettings = ScrSettings()
    stcr: StcrSettings = StcrSettings()
    s3: S3Settings = S3Settings()
    contrast: ContrastSettings = ContrastSettings()

    @model_validator(mode="after")
    def _something_is_learned(self) -> DistillSettings:
        if self.method == "clip2scene" and not (self.scr.weight or self.stcr.weight):
            raise ValueError("distill.scr.weight=0 and distill.stcr.weight=0: one of them must be above 0")
        return self

    @model_validator(mode="after")
    def _views_differ(self) -> DistillSettings:
        if self.method == "pointcontrast" and not (self.augment.rotate or self.augment.flip or self.augment.scale):
            raise ValueError(
                "distill.method=pointcontrast compares two views of a cloud, but distill.augment has rotate, flip and "
                "scale off; at least one of them is needed"
            )
        return self


class EvaluateSettings(Settings):
    """Which annotation-free methods are scored."""

    methods: tuple[Literal["teacher_2d", "student_3d", "ensemble", "pointclip"], ...] = Field(
        ("teacher_2d", "student_3d"), min_length=1
    )
    """Teacher on images, student on clouds, both together, and PointCLIP on scenes (depth views of the cloud)."""


class FinetuneSettings(TrainingSettings):
    """Supervised training on a fraction of the labels."""

    mode: Literal["full", "linear_probe"] = "full"
    """``full``: all weights learn; ``linear_probe``: only the classifier, on a frozen backbone."""
    initialisations: tuple[Initialisation, ...] = Field(("pretrained", "scratch"), min_length=1)
    """Initial weights, each fine-tuned and scored: the distilled student (or ``checkpoint``), or random ones."""
    checkpoint: str | None = None
    """Student file to start from instead of distilling one; it must have the same ``student`` settings."""
    protocol: Literal["clip2scene_frame", "slidr_scene"] = "clip2scene_frame"
    """Which keyframes are labelled. ``clip2scene_frame``: the first and every n-th after it; ``slidr_scene``: those of
    the n-th scene and of every n-th after it. Their scores are not comparable."""
    label_fraction: float = Field(0.01, gt=0, le=1)
    """About 1/n, which labels every n-th keyframe (or scene): 0.333 labels every third; 0.7 is refused."""
    epochs: int = Field(100, ge=1)
    """Passes over the labelled keyframes."""
    loss: Literal["cross_entropy", "lovasz"] = "cross_entropy"
    """``lovasz`` adds Lovász-Softmax to the cross-entropy, as in the released code."""
    head_learning_rate_scale: float = Field(1.0, gt=0)
    """Learning rate of the new classifier relative to that of the backbone."""

    @property
    def every(self) -> int:
        """n: every n-th keyframe (or scene) is labelled."""
        return max(round(1 / self.label_fraction), 1)

    @model_validator(mode="after")
    def _every_nth(self) -> FinetuneSettings:
        every = self.every
        if abs(every * self.label_fraction - 1) > _ROUNDED_WITHIN:
            raise ValueError(
                f"finetune.label_fraction={self.label_fraction:g}: every n-th is used, so only 1/n is allowed, such as "
                f"{1 / (every + 1):.3g} or {1 / every:.3g}"
            )
        return self


class PredictSettings(Settings):
    """A label for every point of the evaluation split, in files of its benchmark's format."""

    network: Literal["finetuned", "distilled"] = "finetuned"
    """``finetuned``: the network fine-tuned from the student (from random weights if ``finetune.initialisations`` has
    only these); ``distilled``: the student itself, which has seen no label. One that is missing is trained first."""
    checkpoint: str | None = None
    """File of a student or a fine-tuned network of the same ``student`` settings to predict with instead: nothing is
    trained, and ``network`` does not matter."""


class WorkerSettings(Settings):
    """Training workers: how many there are, and what each gets."""

    num_workers: int = Field(ge=0)
    gpus_per_worker: Gpus = 0
    """GPUs per worker: 1, a fraction to share one GPU with others, or 0 for CPUs."""
    threads_per_worker: int = Field(1, ge=1)
    """CPU threads per worker, at most the CPUs there are; with a GPU also the threads that read keyframes. Ray
    reserves one CPU per worker all the same."""
    max_failures: int = Field(1, ge=0)
    """Restarts after a failure, each from the last checkpoint, before the command (or the trial) is given up."""

    @model_validator(mode="after")
    def _gpus_need_workers(self) -> WorkerSettings:
        if self.gpus_per_worker and not self.num_workers:
            raise ValueError(f"resources.gpus_per_worker={self.gpus_per_worker:g} needs resources.num_workers above 0")
        return self


class ResourceSettings(WorkerSettings):
    """What the training workers get."""

    num_workers: int = Field(2, ge=0)
    """Ray Train workers; 0 trains in this process without Ray, on its CPUs."""
    cached_frames: int = Field(256, ge=0)
    """Decoded keyframes that each worker keeps in memory."""
    checkpoint_every_epochs: int = Field(5, ge=1)
    """A fault costs at most this many epochs. The last epoch is always saved."""


class Job(Settings):
    """One runnable experiment: its last stage, data, method and resources."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Its runs in MLflow are called NAME-seedSEED."""
    variant: Literal["paper", "released"] = "paper"
    """``released`` sets all switches in which the authors' code differs from the paper; a switch set here wins."""
    stage: Stage = "finetune"
    """Last stage to run; earlier ones that are missing run first."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights, keyframe order and all other draws; also of a street world without its own."""
    storage: str = "clip2scene-storage"
    """Folder, or ``s3://BUCKET/PREFIX``, for indexes, feature stores, checkpoints and scores."""
    experiment: str = "clip2scene"
    """MLflow experiment that the runs are filed under."""
    dataset: DatasetSettings
    teacher: TeacherSettings = TeacherSettings()
    prompts: PromptSettings = PromptSettings()
    extract: ExtractSettings = ExtractSettings()
    student: StudentSettings = StudentSettings()
    distill: DistillSettings = DistillSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    predict: PredictSettings = PredictSettings()
    resources: ResourceSettings = ResourceSettings()

    @property
    def world_seed(self) -> int:
        """Seed of the street world."""
        given = self.dataset.streetworld.seed
        return self.seed if given is None else given

    def reaches(self, stage: Stage) -> bool:
        """Whether a stage is the job's last or an earlier one."""
        return self.stage in STAGES[STAGES.index(stage) :]

    @property
    def scores(self) -> bool:
        """Whether it scores on the evaluation split; predictions need no scores, and often have no labels."""
        return self.reaches("evaluate") and self.stage != "predict"

    @property
    def finetunes(self) -> bool:
        """Whether it fine-tunes: for scores, or for the network that predicts."""
        if self.stage == "predict":
            return self.predict.checkpoint is None and self.predict.network == "finetuned"
        return self.stage == "finetune"

    @property
    def initialisations(self) -> tuple[Initialisation, ...]:
        """Initial weights of the networks that it fine-tunes; predictions are of one network."""
        given = self.finetune.initialisations
        if self.stage == "predict":
            return ("pretrained",) if "pretrained" in given else ("scratch",)
        return given

    @property
    def reads_train_split(self) -> bool:
        """Whether it reads the training split; predicting with a given network does not."""
        return self.stage != "predict" or self.predict.checkpoint is None

    @property
    def needs_teacher(self) -> bool:
        """Whether it encodes images: fine-tuning from a given student, or from random weights alone, does not."""
        if self.finetunes:
            return self.finetune.checkpoint is None and "pretrained" in self.initialisations
        return self.reaches("extract") and self.reads_train_split

    @model_validator(mode="before")
    @classmethod
    def _switches_of_the_variant(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("variant") == "released":
            dataset = values.get("dataset")
            is_scannet = isinstance(dataset, dict) and dataset.get("kind") == "scannet"
            return merged(merged(_RELEASED, _RELEASED_ON_SCANNET) if is_scannet else _RELEASED, values)
        return values

    @model_validator(mode="after")
    def _what_is_evaluated_has_scores(self) -> Job:
        if self.stage == "evaluate" and self.distill.method in TEXT_FREE:
            raise ValueError(
                f"stage=evaluate: distill.method={self.distill.method} cannot be scored without fine-tuning; allowed: "
                "stage=distill or finetune"
            )
        return self

    @model_validator(mode="after")
    def _what_predicts_has_classes(self) -> Job:
        own = self.stage == "predict" and self.predict.network == "distilled" and self.predict.checkpoint is None
        if own and self.distill.method in TEXT_FREE:
            raise ValueError(
                f"predict.network=distilled: distill.method={self.distill.method} has no classes before it is "
                "fine-tuned; allowed: predict.network=finetuned"
            )
        return self

    @model_validator(mode="after")
    def _colour_needs_meshes(self) -> Job:
        if self.student.use_colour and self.dataset.kind != "scannet":
            raise ValueError(
                f"student.use_colour=true: points of {self.dataset.kind} have no colour; allowed: dataset.kind=scannet"
            )
        return self

    @model_validator(mode="after")
    def _half_precision_needs_gpus(self) -> Job:
        for key, training in (("distill", self.distill), ("finetune", self.finetune)):
            if training.precision == "fp16" and not self.resources.gpus_per_worker:
                raise ValueError(
                    f"{key}.precision=fp16 needs resources.gpus_per_worker above 0 (spconv has no fp16 on CPUs); "
                    "allowed without: fp32"
                )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Job:
        workers = max(self.resources.num_workers, 1)
        for key, size in (("distill", self.distill.batch_size), ("finetune", self.finetune.batch_size)):
            if size % workers:
                raise ValueError(
                    f"{key}.batch_size={size} must be a multiple of resources.num_workers={self.resources.num_workers}"
                )
        return self


_RELEASED: dict[str, Any] = {
    "teacher": {"clip_normalisation": False, "keep_last_residual": True, "keep_last_mlp": True},
    "student": {"use_position": False},
    "distill": {
        "normalise_features": False,
        "sweep_choice": "random",
        "scr": {"form": "cross_entropy"},
        "stcr": {
            "lambda": 1.0,
            "grid": "voxel",
            "pixel_term": False,
            "cell_text": "first",
            "max_points_per_cell": 8,
            "count_empty_slots": True,
        },
        "s3": {"start_epoch": 11, "granularity": "batch", "synchronised": False},
    },
}
"""Where the code that the authors released departs from the paper."""
_RELEASED_ON_SCANNET: dict[str, Any] = {"distill": {"s3": {"start_epoch": 10}}}
"""Where its loss for ScanNet departs from that for nuScenes: it compares the epoch by >= instead of >."""


def merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values``, completed by ``defaults`` in nested groups too."""
    result = dict(values)
    for key, default in defaults.items():
        given = values.get(key, default)
        result[key] = merged(default, given) if isinstance(default, dict) and isinstance(given, dict) else given
    return result


def digest_of(*parts: Any) -> str:
    """Hash of parts that can be written as JSON (16 hex characters)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
