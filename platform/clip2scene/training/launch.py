"""The one wrapper around Ray Train's TorchTrainer: run work on every worker and receive the messages of rank 0.

Within a :func:`worker_group` block the workers start once and do many pieces of work, one after another. With
``resources.num_workers=0`` the same work runs in this process, without Ray.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from clip2scene.config import ResourceSettings
from clip2scene.errors import Clip2sceneError, DivergedError, TrainingError, last_line
from clip2scene.machine import CPUS_PER_WORKER, use_threads
from clip2scene.progress import say
from clip2scene.storage import CACHE, appears
from clip2scene.training.checkpoints import CHECKPOINTS_KEPT, newest_intact, numbered, seal
from clip2scene.training.work_queue import WorkQueue

_MARK = "mark"
"""A file of the driver that every worker must see."""


class Worker:
    """Where a piece of work runs: its rank and device. This one is the only worker, in the caller's process."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")
    _intact: tuple[Path, ...] = ()
    """Checkpoints that this worker has found intact or written, oldest first."""

    def __init__(self, folder: Path, on_message: Callable[[str, Any], None]):
        self._folder, self._on_message = folder, on_message

    def emit(self, kind: str, value: Any) -> None:
        """Send a message to the driver; only rank 0's are delivered."""
        self._on_message(kind, value)

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of all workers' tensors, on the CPU; every rank must call this."""
        if self.world_size == 1:
            return counts
        summed = counts.to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    def last_checkpoint(self) -> Path | None:
        """Folder of the newest intact checkpoint of this run, also of an earlier attempt."""
        newest = newest_intact(numbered(self._folder), functools.partial(self.emit, "note"))
        self._intact = () if newest is None else (newest,)
        return newest

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep what ``write`` puts into a folder as the newest checkpoint; every rank must call this equally often."""
        for left in self._folder.glob(".checkpoint.*"):  # of a killed attempt
            shutil.rmtree(left, ignore_errors=True)
        aside = self._folder / f".checkpoint.{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        write(aside)
        seal(aside)
        before = numbered(self._folder)
        number = int(before[-1].name.rpartition("_")[2]) + 1 if before else 0
        written = aside.rename(self._folder / f"checkpoint_{number:06d}")
        # Damaged ones do not count: the one to go back to must be intact.
        self._intact = (*self._intact, written)[-CHECKPOINTS_KEPT:]
        for old in before:
            if old not in self._intact:
                shutil.rmtree(old, ignore_errors=True)


class _RayWorker(Worker):
    def __init__(self, folder: Path, queue: Any):
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self._folder, self._queue = folder, queue
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def emit(self, kind: str, value: Any) -> None:
        import ray

        if self.rank == 0:
            ray.get(self._queue.send.remote(kind, value))

    def last_checkpoint(self) -> Path | None:
        from ray.train.collective import broadcast_from_rank_zero

        # Rank 0 chooses for all: on another node a shared folder may lag by some seconds.
        chosen = super().last_checkpoint() if self.rank == 0 else None
        name = broadcast_from_rank_zero(chosen.name if chosen else None)
        return self._folder / name if name else None

    def save(self, write: Callable[[Path], None]) -> None:
        if self.rank == 0:
            super().save(write)


class Work(Protocol):
    """A picklable function that every worker calls."""

    def __call__(self, worker: Worker) -> None:
        """Do the work; an exception ends the run."""


_groups: list[WorkerGroup] = []
"""Those of the blocks that this process is in, the innermost last."""


@contextlib.contextmanager
def worker_group(resources: ResourceSettings) -> Iterator[None]:
    """Share one start of the workers among all calls of :func:`launch` with these resources in the block.

    Workers start at the first launch and hold their CPUs and GPUs until the block ends; run nothing in it that waits
    for Ray's resources.
    """
    group = WorkerGroup(resources)
    _groups.append(group)
    try:
        yield
    except BaseException:
        group.abandon()
        raise
    else:
        group.stop()
    finally:
        _groups.remove(group)


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
        name: of the run below ``folder``; the same name continues from its last checkpoint, so it must contain a
            digest of everything that decides the result. Nothing else may run under it at the same time.
        folder: absolute, shared by all nodes.
        resources: how many workers, and the threads and GPUs of each.
        on_message: called with each message of rank 0, in order.

    Returns:
        Folder of the newest checkpoint, if the work saved any.

    Raises:
        DivergedError: the work raised it on any worker.
        TrainingError: a worker found a damaged file (with its message), or the run failed for another reason.
    """

    def receive(kind: str, value: Any) -> None:
        if kind == "note":
            say(value)
        else:
            on_message(kind, value)

    here = Worker(folder / name, receive)
    if resources.num_workers == 0:
        use_threads(resources.threads_per_worker)
        work(here)
    else:
        with contextlib.ExitStack() as stack:
            if not (_groups and _groups[-1].resources == resources):
                stack.enter_context(worker_group(resources))
            _groups[-1].run(work, folder / name, receive)
    return here.last_checkpoint()


class WorkerGroup:
    """Ray Train's workers, which do one piece of work after another.

    When a worker dies, Ray Train restarts all of them, and they continue the current work from its last checkpoint, at
    most ``resources.max_failures`` times; after that the work fails, and the next work starts new workers.
    """

    def __init__(self, resources: ResourceSettings):
        self.resources = resources
        self._running: threading.Thread | None = None
        self._failure: BaseException | None = None

    def run(self, work: Work, folder: Path, on_message: Callable[[str, Any], None]) -> None:
        """Run one piece of work; see :func:`launch`."""
        import ray

        if self._running is None:
            self._start(folder.parent)
        number = ray.get(self._queue.put.remote((ray.put(work), folder)))
        error: TrainingError | None = None
        for kind, value in self._messages():
            if kind == "error":
                name, sentence = value
                error = error or (DivergedError if name == DivergedError.__name__ else TrainingError)(sentence)
                self._queue.close.remote()  # another attempt would fail in the same way
            elif kind == "done" and value == number:
                return
            elif kind != "done":
                on_message(kind, value)
        failure = self._failure
        self._forget()
        raise error or TrainingError(f"run {folder.name} failed: {last_line(failure)}") from failure

    def _messages(self) -> Iterator[tuple[str, Any]]:
        """What the workers send, until they have ended and nothing is left."""
        import ray

        assert self._running is not None
        while True:
            ended = not self._running.is_alive()
            messages = ray.get(self._queue.messages.remote(0.0 if ended else 0.5))
            yield from messages
            if ended and not messages:
                return

    def stop(self) -> None:
        """Stop the idle workers, and wait until their CPUs and GPUs are free."""
        if self._running is not None:
            self._queue.close.remote()
            self._running.join()
            self._forget()

    def abandon(self) -> None:
        """Let the workers end when they next send a message, without waiting."""
        if self._running is not None:
            self._queue.close.remote()
            self._forget()

    def _start(self, folder: Path) -> None:
        import ray
        import ray.train
        import ray.train.torch

        # Ray Train needs a folder; our mark in it shows whether the workers see the same one.
        self._folder = folder / f".workers-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir(parents=True)
        (self._folder / _MARK).touch()
        here = {"num_cpus": 0, "scheduling_strategy": on_this_node()}
        self._queue = ray.remote(WorkQueue).options(**here).remote()
        gpus = self.resources.gpus_per_worker
        # With a GPU, the threads read keyframes, and each would bring as many threads of torch's.
        threads = 1 if gpus else self.resources.threads_per_worker
        trainer = ray.train.torch.TorchTrainer(
            functools.partial(_serve, self._queue, threads, self._folder / _MARK),
            # NCCL refuses two workers on one GPU.
            torch_config=ray.train.torch.TorchConfig(backend="gloo" if 0 < gpus < 1 else None),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.resources.num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": CPUS_PER_WORKER, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=ray.train.RunConfig(
                name=self._folder.name,
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(
                    max_failures=self.resources.max_failures, controller_failure_limit=3
                ),
            ),
        )
        self._failure = None
        self._running = threading.Thread(target=self._fit, args=(trainer,), name="clip2scene-workers", daemon=True)
        self._running.start()

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except Exception as error:
            self._failure = error

    def _forget(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._running = None


def _serve(queue: Any, threads: int, mark: Path) -> None:
    """Run on every worker: do the work of the queue until it is closed.

    Args:
        queue: the actor.
        threads: of this worker.
        mark: file of the driver; if it is not visible here, checkpoints would not be found again.
    """
    import ray
    import ray.train
    from ray.train.collective import barrier, broadcast_from_rank_zero

    use_threads(threads)
    if not appears(mark):
        sentence = (
            f"{mark.parents[1]}: the training worker on {platform.node()} does not see this folder of the driver's; "
            f"give a storage that all nodes share (with s3:// a {CACHE} that they share)"
        )
        ray.get(queue.send.remote("error", (TrainingError.__name__, sentence)))
        raise TrainingError(sentence)
    leads = ray.train.get_context().get_world_rank() == 0
    number = broadcast_from_rank_zero(ray.get(queue.first.remote()) if leads else None)
    while (item := ray.get(queue.get.remote(number))) is not None:
        work, folder = ray.get(item[0]), item[1]
        try:
            work(_RayWorker(folder, queue))
        except Clip2sceneError as error:
            ray.get(queue.send.remote("error", (type(error).__name__, str(error))))
            raise
        del work
        barrier()
        if leads:
            ray.get(queue.done.remote(number))
        number += 1


def on_this_node() -> Any:
    """Scheduling strategy of an actor that driver and workers share: on the driver's node, which no other node ends."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
