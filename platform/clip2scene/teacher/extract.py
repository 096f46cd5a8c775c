"""Fills the feature store: a Ray Data job with a pool of actors that hold the teacher, read images and encode them.

Blocks carry only ids and paths; an actor decodes, encodes and writes a frame itself, and only a status row comes back.
A frame that is in the store is never computed again, so a killed run continues where it stopped. With an object store
the lock holds on one machine only: two machines that fill it at once may both encode a frame, to the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from clip2scene.config import ExtractSettings
from clip2scene.data.index import Frame, Index
from clip2scene.errors import DataError, last_line
from clip2scene.machine import check_actors, ray_nodes, workers_on
from clip2scene.progress import progress
from clip2scene.storage import Storage, locked
from clip2scene.teacher import store
from clip2scene.teacher.clip import DenseClip
from clip2scene.teacher.encoder import Encoder, frame_row

_MAX_BLOCKS = 4000
_MAX_RESTARTS = 8
_HEADERS_AT_A_TIME = 16
"""Headers of stored frames read at once: each is a request where the storage is an object store."""
_log = logging.getLogger(__name__)


class ExtractionError(DataError):
    """More images are broken than the settings allow (the store holds all others), or every actor died."""


@dataclass(frozen=True)
class ExtractReport:
    """What one run of :func:`extract` did."""

    images_encoded: int
    images_cached: int
    """Images with features that were in the store already."""
    broken: tuple[store.BrokenImage, ...]
    """Quarantined images of the requested frames, found now or earlier."""


def extract(
    index: Index,
    frames: Sequence[Frame],
    teacher: DenseClip,
    settings: ExtractSettings,
    store_path: str | Path,
    *,
    storage: Storage,
) -> ExtractReport:
    """Encode every image of the frames that the store does not hold yet. Ray must be initialised.

    Args:
        index: the dataset of the frames.
        frames: what to encode; other frames in the store stay there.
        teacher: every actor loads the same.
        settings: actors, batches and how many images may be broken.
        store_path: folder of the feature store.
        storage: the storage that the store is part of.

    Raises:
        ConfigError: an actor cannot load the teacher, or the settings ask for more GPUs than there are.
        DataError: the store is of another teacher, a frame id is not a file name, or a frame cannot be encoded or
            written.
        ExtractionError: more than ``max_broken_fraction`` of the images are broken (the store is finished
            nevertheless), or the actors died again and again.
        StorageError: the folder cannot be written, or the object store cannot be reached or refuses.
    """
    path = Path(store_path).resolve()
    wanted = {frame.frame_id: frame for frame in frames}
    for frame_id in wanted:
        store.frame_file(path, frame_id)  # refuses an id that is not a file name, before any work
    with locked(path, "fills this store"):
        store.remove_leftovers(path)
        entries = _valid_entries(path, storage, index, wanted, teacher.digest)
        pending = [frame for frame_id, frame in wanted.items() if frame_id not in entries]
        if pending:
            entries |= _encode_all(index, pending, teacher, settings, path, storage)
        manifest = {
            "teacher": teacher.digest,
            "grid": list(teacher.grid),
            "dim": teacher.dim,
            "frames": len(entries),
            "images": sum(len(entry.cameras) for entry in entries.values()),
            "broken": [asdict(image) for image in _broken(entries)],
        }
        store.write_manifest(path, manifest, storage)
    ours = {frame_id: entries[frame_id] for frame_id in wanted}
    encoded = sum(len(ours[frame.frame_id].cameras) for frame in pending)
    cached = sum(len(entry.cameras) for entry in ours.values()) - encoded
    broken = _broken(ours)
    _refuse_too_many(broken, sum(len(frame.cameras) for frame in wanted.values()), settings, path)
    return ExtractReport(encoded, cached, broken)


def _broken(entries: dict[str, store.FrameEntry]) -> tuple[store.BrokenImage, ...]:
    return tuple(
        store.BrokenImage(frame_id, camera, why)
        for frame_id, entry in sorted(entries.items())
        for camera, why in sorted(entry.broken.items())
    )


def _refuse_too_many(broken: tuple[store.BrokenImage, ...], total: int, settings: ExtractSettings, path: Path) -> None:
    if len(broken) > settings.max_broken_fraction * total:
        reasons = "; ".join(image.reason for image in broken[:3])
        raise ExtractionError(
            f"{len(broken)} of {total} images are broken, extract.max_broken_fraction={settings.max_broken_fraction} "
            f"allows {int(settings.max_broken_fraction * total)} (the others are in {path}): {reasons}"
            f"{'; ...' if len(broken) > 3 else ''}"
        )


def _encode_all(
    index: Index,
    pending: list[Frame],
    teacher: DenseClip,
    settings: ExtractSettings,
    path: Path,
    storage: Storage,
) -> Iterator[tuple[str, store.FrameEntry]]:
    """Run the Ray Data job over the frames; yields each one after its file is written."""
    rows = [frame_row(frame) for frame in pending]
    batches = -(-len(rows) // settings.frames_per_batch)
    actors = min(settings.num_actors, batches)
    check_actors(ray_nodes(), settings, actors)
    images = {frame.frame_id: len(frame.cameras) for frame in pending}
    with _quiet_ray_data(), progress("extract", sum(images.values()), unit="images") as advance:
        dataset = ray.data.from_items(rows, override_num_blocks=min(batches, _MAX_BLOCKS))
        with warnings.catch_warnings():
            # The only way to bound the restarts; Ray 2.60 deprecates it without a replacement.
            warnings.filterwarnings("ignore", message=".*ray_remote_args_fn")
            statuses = dataset.map_batches(
                Encoder,
                fn_constructor_args=(
                    teacher.settings,
                    settings,
                    index.root,
                    path,
                    teacher.digest,
                    storage,
                ),
                batch_size=settings.frames_per_batch,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=_cpus_per_actor(actors, settings),
                num_gpus=settings.gpus_per_actor,
                ray_remote_args_fn=_restarts,
            )
        try:
            for row in statuses.iter_rows():
                status = json.loads(row["status"])
                if "error" in status:
                    raise DataError(status["error"])
                yield row["frame_id"], store.FrameEntry(teacher.digest, tuple(status["cameras"]), status["broken"])
                advance(images[row["frame_id"]])
        except ray.exceptions.RayActorError as error:
            raise ExtractionError(
                f"{path}: the actors that encode could not be kept alive ({last_line(error)[:200]}); run again to go "
                "on from here"
            ) from error


def _valid_entries(
    path: Path, storage: Storage, index: Index, wanted: dict[str, Frame], digest: str
) -> dict[str, store.FrameEntry]:
    """Frames in the store that need no work: intact, with all their cameras, and without images repaired since."""
    entries: dict[str, store.FrameEntry] = {}
    stored = store.stored_frames(path, storage)
    if not stored:
        return entries

    def read(frame_id: str) -> store.FrameEntry | DataError:
        try:
            return store.read_entry(path, frame_id, storage)
        except DataError as error:
            return error

    with (
        progress("check store", len(stored), unit="frames") as advance,
        ThreadPoolExecutor(_HEADERS_AT_A_TIME) as readers,
    ):
        for frame_id, entry in zip(stored, readers.map(read, stored), strict=True):
            advance(1)
            if isinstance(entry, DataError):
                _log.warning("%s; it is computed again", entry)
                storage.remove(store.frame_file(path, frame_id))
                continue
            store.check_teacher(store.frame_file(path, frame_id), entry.teacher, digest)
            frame = wanted.get(frame_id)
            if frame is None or store.is_current(index.root, frame, entry.cameras, entry.broken):
                entries[frame_id] = entry
    return entries


def _restarts() -> dict[str, int]:
    """A killed actor restarts and gets its batch again; not for ever, as one batch may kill every actor."""
    return {"max_restarts": _MAX_RESTARTS, "max_task_retries": _MAX_RESTARTS}


def _cpus_per_actor(actors: int, settings: ExtractSettings) -> float:
    """CPUs that Ray reserves per actor: one per thread, but fewer where no CPU would be left for everything else.

    An actor pool that reserves every CPU waits for ever on the first task outside the pool (Ray Data's reads, Train's
    controller). This is only Ray's accounting: an actor always runs the threads of the settings.
    """
    return _share(ray_nodes(), actors, settings.threads_per_actor, settings.gpus_per_actor)


def _share(nodes: list[dict[str, float]], actors: int, most: float, gpus: float = 0.0) -> float:
    """The largest share, at most ``most``, that every actor finds beside its GPUs while one CPU is left over."""
    cpus_of_nodes = [node.get("CPU", 0) for node in nodes if workers_on(node, gpus=gpus)]
    most = min(most, max(sum(cpus_of_nodes) - 1, 0) / actors)
    for share in sorted({most, *(cpus / k for cpus in cpus_of_nodes for k in range(1, actors + 1))}, reverse=True):
        reserved = math.floor(100 * share) / 100
        if 0 < reserved <= most and sum(workers_on(node, cpus=reserved, gpus=gpus) for node in nodes) >= actors:
            return reserved
    return 0.0


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data off the terminal, where our own progress bar is; it still logs to its files."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    console = [h for h in logging.getLogger("ray.data").handlers if type(h).__name__ == "PlainRayHandler"]
    levels = [handler.level for handler in console]
    with ray.data.DataContext.current(context):
        for handler in console:
            handler.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for handler, level in zip(console, levels, strict=True):
                handler.setLevel(level)
