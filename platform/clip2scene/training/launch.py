"""The one wrapper around Ray Train's TorchTrainer: run a piece of work on every worker and hear from rank 0.

With ``resources.num_workers=0`` the same work runs in this process, without Ray.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from clip2scene.config import Clip2sceneError, ResourceSettings


class TrainingError(Clip2sceneError, RuntimeError):
    """A run that ended without its result."""


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
        """Folder of the newest checkpoint of this run, of an earlier attempt too."""
        folder = self._folder / "checkpoint"
        return folder if folder.is_dir() else None

    def save(self, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        """Keep what ``write`` puts into a folder as the newest checkpoint. Every rank calls this equally often."""
        aside = self._folder / f".checkpoint.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        shutil.rmtree(self._folder / "checkpoint", ignore_errors=True)
        aside.rename(self._folder / "checkpoint")


class _RayWorker(Worker):
    def __init__(self, queue: Any):
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self._queue = queue
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def emit(self, kind: str, value: Any) -> None:
        if self.rank == 0 or kind == "error":
            self._queue.put((kind, value))

    def last_checkpoint(self) -> Path | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.to_directory())

    def save(self, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                write(Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)


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
        TrainingError: a worker met a damaged file (its sentence), or the run failed for another reason.
    """
    if resources.num_workers == 0:
        torch.set_num_threads(resources.threads_per_worker)
        worker = Worker(folder / name, on_message)
        work(worker)
        return worker.last_checkpoint()
    return _launch_on_ray(work, name, folder, resources, on_message)


def _launch_on_ray(
    work: Work, name: str, folder: Path, resources: ResourceSettings, on_message: Callable[[str, Any], None]
) -> Path | None:
    import ray.train
    import ray.train.torch
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    sentences: list[str] = []

    def hear(kind: str, value: Any) -> None:
        if kind == "error":
            sentences.append(value)
        else:
            on_message(kind, value)

    trainer = ray.train.torch.TorchTrainer(
        functools.partial(_entry, work, queue, resources.threads_per_worker),
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
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    listener = _Listener(queue, hear)
    try:
        result = trainer.fit()
    except Exception as error:
        listener.stop()
        if sentences:
            raise TrainingError(sentences[0]) from error
        raise TrainingError(f"run {name} failed: {_last_line(error)}") from error
    finally:
        listener.stop()
        queue.shutdown()
    return None if result.checkpoint is None else Path(result.checkpoint.path)


def _entry(work: Work, queue: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    worker = _RayWorker(queue)
    try:
        work(worker)
    except Clip2sceneError as error:
        worker.emit("error", str(error))
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
