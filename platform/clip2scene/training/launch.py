"""The one wrapper around Ray Train's TorchTrainer: run a piece of work on every worker and hear from rank 0.

With ``resources.num_workers=0`` the same work runs in this process, without Ray.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from clip2scene.config import Clip2sceneError, ResourceSettings
from clip2scene.progress import console

CHECKPOINTS_KEPT = 2
"""The newest, and the one before in case the newest is damaged."""
SEAL = "seal.json"


class TrainingError(Clip2sceneError, RuntimeError):
    """A run that ended without its result."""


class DivergedError(TrainingError):
    """A loss that is no number any more: settings that cannot be trained with, no fault of the machine's."""


class Worker:
    """What a piece of work knows of where it runs. This one is the only worker, in the caller's process."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")

    def __init__(self, folder: Path, on_message: Callable[[str, Any], None]):
        self._folder, self._on_message = folder, on_message

    def emit(self, kind: str, value: Any) -> None:
        """Send something to the driver; only rank 0 is heard."""
        self._on_message(kind, value)

    def last_checkpoint(self) -> Path | None:
        """Folder of the newest whole checkpoint of this run, of an earlier attempt too."""
        return newest_whole(_numbered(self._folder), functools.partial(self.emit, "note"))

    def save(self, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        """Keep what ``write`` puts into a folder as the newest checkpoint. Every rank calls this equally often."""
        for left in self._folder.glob(".checkpoint.*"):  # of a killed attempt
            shutil.rmtree(left, ignore_errors=True)
        aside = self._folder / f".checkpoint.{os.getpid()}"
        aside.mkdir(parents=True)
        write(aside)
        seal(aside)
        before = _numbered(self._folder)
        number = int(before[-1].name.rpartition("_")[2]) + 1 if before else 0
        aside.rename(self._folder / f"checkpoint_{number:06d}")
        for old in before[: 1 - CHECKPOINTS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


class _RayWorker(Worker):
    def __init__(self, queue: Any, unlisted: Path | None):
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self._queue, self._unlisted = queue, unlisted
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def emit(self, kind: str, value: Any) -> None:
        if self.rank == 0 or kind == "error":
            self._queue.put((kind, value))

    def last_checkpoint(self) -> Path | None:
        import ray.train

        committed = ray.train.CheckpointConsistencyMode.COMMITTED
        reported = ray.train.get_all_reported_checkpoints(consistency_mode=committed)
        folders = [self._unlisted] if self._unlisted else []
        folders += [Path(one.checkpoint.path) for one in reported]
        return newest_whole(folders, functools.partial(self.emit, "note"))

    def save(self, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                write(Path(folder))
                seal(Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)


def seal(folder: Path) -> None:
    """Write down what a checkpoint's files are, so that :func:`newest_whole` can tell whether it still has them all."""
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(digests), encoding="utf-8")


def newest_whole(folders: Sequence[Path], note: Callable[[str], None]) -> Path | None:
    """The last of the checkpoints whose files are all as they were written; ``note`` is told of those passed over."""
    for folder in reversed(folders):
        if _is_whole(folder):
            return folder
        note(f"{folder}: this checkpoint is damaged; going on from the one before")
    return None


def _is_whole(folder: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*"))


class Work(Protocol):
    """Something picklable that every worker calls."""

    def __call__(self, worker: Worker) -> None:
        """Do the work; an exception ends the run."""


def launch(
    work: Work,
    *,
    name: str,
    folder: Path,
    resources: ResourceSettings,
    on_message: Callable[[str, Any], None] = lambda kind, value: None,
) -> Path | None:
    """Run ``work`` on all workers.

    Args:
        work: called on every worker.
        name: of the run below ``folder``; the same name continues from its last checkpoint, so it must hold a digest
            of everything that decides the result.
        folder: absolute, shared by all nodes.
        resources: how many workers and what each gets.
        on_message: called with what rank 0 emits, in order, from another thread.

    Returns:
        Folder of the newest checkpoint, if the work saved any.

    Raises:
        DivergedError: the work's own, from whichever worker.
        TrainingError: a worker met a damaged file (its sentence), or the run failed for another reason.
    """

    def hear(kind: str, value: Any) -> None:
        if kind == "note":
            console().print(value, markup=False, soft_wrap=True)
        else:
            on_message(kind, value)

    if resources.num_workers == 0:
        torch.set_num_threads(resources.threads_per_worker)
        worker = Worker(folder / name, hear)
        work(worker)
        return worker.last_checkpoint()
    return _launch_on_ray(work, name, folder, resources, hear)


def _launch_on_ray(
    work: Work, name: str, folder: Path, resources: ResourceSettings, on_message: Callable[[str, Any], None]
) -> Path | None:
    import ray.train
    import ray.train.torch

    unlisted = _unlisted(folder / name, functools.partial(on_message, "note"))
    queue = message_queue()
    errors: list[TrainingError] = []

    def hear(kind: str, value: Any) -> None:
        if kind == "error":
            name, sentence = value
            errors.append(DivergedError(sentence) if name == DivergedError.__name__ else TrainingError(sentence))
        else:
            on_message(kind, value)

    trainer = ray.train.torch.TorchTrainer(
        functools.partial(_entry, work, queue, unlisted, resources.threads_per_worker),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": 1,
                **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )
    listener = _Listener(queue, hear)
    try:
        result = trainer.fit()
    except Exception as error:
        listener.stop()
        if errors:
            raise errors[0] from error
        raise TrainingError(f"run {name} failed: {_last_line(error)}") from error
    finally:
        listener.stop()
        queue.shutdown()
    return None if result.checkpoint is None else Path(result.checkpoint.path)


def message_queue() -> Any:
    """A queue (``ray.util.queue``) on the driver's own node, so that no other node's end takes it away."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _unlisted(run: Path, note: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run whose list of them is missing or cut short; Ray writes that in place."""
    listed = run / "checkpoint_manager_snapshot.json"
    try:
        json.loads(listed.read_text(encoding="utf-8"))
        return None
    except FileNotFoundError:
        pass
    except ValueError:
        note(f"{listed}: this list of checkpoints is damaged; going on from the newest that is there")
        listed.unlink()
    return newest_whole(_numbered(run), note)


def _entry(work: Work, queue: Any, unlisted: Path | None, threads: int) -> None:
    torch.set_num_threads(threads)
    worker = _RayWorker(queue, unlisted)
    try:
        work(worker)
    except Clip2sceneError as error:
        worker.emit("error", (type(error).__name__, str(error)))
        raise


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _Listener:
    """Hands the queue's messages on in a thread until stopped; then what is left of them."""

    def __init__(self, queue: Any, hear: Callable[[str, Any], None]):
        self._queue, self._hear = queue, hear
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="clip2scene-listener", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from ray.util.queue import Empty

        while True:
            last_round = self._stopping.is_set()
            try:
                while True:
                    self._hear(*self._queue.get(timeout=0.2))
            except Empty:
                if last_round:
                    return
            except Exception as error:
                self._error = error
                return

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise TrainingError(f"a message of the training run could not be handled: {error}") from error
