"""The one wrapper around Ray Train's TorchTrainer: run a piece of work on every worker and hear from rank 0.

Inside of :func:`crew`, one start of the workers serves many pieces of work, one after another. With
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

from clip2scene.config import Clip2sceneError, ResourceSettings
from clip2scene.machine import use_threads
from clip2scene.progress import console
from clip2scene.storage import CACHE, is_seen, locked
from clip2scene.training.checkpoints import CHECKPOINTS_KEPT, newest_whole, numbered, seal
from clip2scene.training.orders import Orders


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
        return newest_whole(numbered(self._folder), functools.partial(self.emit, "note"))

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep what ``write`` puts into a folder as the newest checkpoint. Every rank calls this equally often."""
        for left in self._folder.glob(".checkpoint.*"):  # of a killed attempt
            shutil.rmtree(left, ignore_errors=True)
        aside = self._folder / f".checkpoint.{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        write(aside)
        seal(aside)
        before = numbered(self._folder)
        number = int(before[-1].name.rpartition("_")[2]) + 1 if before else 0
        aside.rename(self._folder / f"checkpoint_{number:06d}")
        for old in before[: 1 - CHECKPOINTS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


class _RayWorker(Worker):
    def __init__(self, folder: Path, orders: Any):
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self._folder, self._orders = folder, orders
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def emit(self, kind: str, value: Any) -> None:
        import ray

        if self.rank == 0:
            ray.get(self._orders.say.remote(kind, value))

    def last_checkpoint(self) -> Path | None:
        from ray.train.collective import broadcast_from_rank_zero

        # Rank 0 chooses for all: another node may see a shared folder as it was some seconds ago.
        chosen = super().last_checkpoint() if self.rank == 0 else None
        name = broadcast_from_rank_zero(chosen.name if chosen else None)
        return self._folder / name if name else None

    def save(self, write: Callable[[Path], None]) -> None:
        if self.rank == 0:
            super().save(write)


class Work(Protocol):
    """Something picklable that every worker calls."""

    def __call__(self, worker: Worker) -> None:
        """Do the work; an exception ends the run."""


_MARK = "mark"
"""The driver's file that every worker must see."""
_crews: list[Crew] = []
"""The crew of the block that runs in this process."""


@contextlib.contextmanager
def crew(resources: ResourceSettings) -> Iterator[None]:
    """Inside of the block, :func:`launch` with these resources finds its workers started.

    They start with the first launch, and hold their CPUs and GPUs until the block ends: nothing else that waits for
    Ray's resources has its place in it.
    """
    ours = Crew(resources)
    _crews.append(ours)
    try:
        yield
    except BaseException:
        ours.abandon()
        raise
    else:
        ours.dismiss()
    finally:
        _crews.remove(ours)


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
        on_message: called with what rank 0 emits, in order.

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

    here = Worker(folder / name, hear)
    # Of two commands that train the same, each would take the other's checkpoints for those of a killed attempt.
    with locked(folder / name, "trains this"):
        if resources.num_workers == 0:
            use_threads(resources.threads_per_worker)
            work(here)
        else:
            with contextlib.ExitStack() as stack:
                if not (_crews and _crews[-1].resources == resources):
                    stack.enter_context(crew(resources))
                _crews[-1].run(work, folder / name, hear)
        return here.last_checkpoint()


class Crew:
    """Ray Train's workers, which do one piece of work after another.

    A worker that dies makes Ray Train start all of them again, and they begin the work in hand anew, from its last
    checkpoint; ``resources.max_failures`` times, then the crew has failed and the next work gets a new one.
    """

    def __init__(self, resources: ResourceSettings):
        self.resources = resources
        self._running: threading.Thread | None = None
        self._failure: BaseException | None = None

    def run(self, work: Work, folder: Path, on_message: Callable[[str, Any], None]) -> None:
        """Have the work done; see :func:`launch`."""
        import ray

        if self._running is None:
            self._start(folder.parent)
        assert self._running is not None
        order = ray.put(work)
        number = ray.get(self._orders.give.remote((order, folder)))
        error: TrainingError | None = None
        while True:
            ended = not self._running.is_alive()
            said = ray.get(self._orders.hear.remote(0.0 if ended else 0.5))
            for kind, value in said:
                if kind == "error":
                    name, sentence = value
                    error = error or (DivergedError if name == DivergedError.__name__ else TrainingError)(sentence)
                    self._orders.close.remote()  # not again: it would be the same
                elif kind == "done" and value == number:
                    return
                elif kind != "done":
                    on_message(kind, value)
            if ended and not said:
                break
        failure = self._failure
        self._forget()
        if error is not None:
            raise error from failure
        raise TrainingError(f"run {folder.name} failed: {_last_line(failure)}") from failure

    def dismiss(self) -> None:
        """End the workers, who have nothing to do, and wait until their places are free."""
        if self._running is not None:
            self._orders.close.remote()
            self._running.join()
            self._forget()

    def abandon(self) -> None:
        """Let the workers end when they next have something to say."""
        if self._running is not None:
            self._orders.close.remote()
            self._forget()

    def _start(self, folder: Path) -> None:
        import ray
        import ray.train
        import ray.train.torch

        # Ray Train wants a folder; of ours it holds what shows that the workers see the same one.
        self._folder = folder / f".crew-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir(parents=True)
        (self._folder / _MARK).touch()
        here = {"num_cpus": 0, "scheduling_strategy": on_this_node()}
        self._orders = ray.remote(Orders).options(**here).remote()
        gpus = self.resources.gpus_per_worker
        trainer = ray.train.torch.TorchTrainer(
            functools.partial(_serve, self._orders, self.resources.threads_per_worker, self._folder / _MARK),
            # Two workers on one GPU: NCCL refuses that.
            torch_config=ray.train.torch.TorchConfig(backend="gloo" if 0 < gpus < 1 else None),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.resources.num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
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
        self._running = threading.Thread(target=self._fit, args=(trainer,), name="clip2scene-crew", daemon=True)
        self._running.start()

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except Exception as error:
            self._failure = error

    def _forget(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._running = None


def _serve(orders: Any, threads: int, mark: Path) -> None:
    """What every worker does: order after order until there are no more.

    Args:
        orders: the actor.
        threads: of this worker.
        mark: file that the driver has made; here too it must be there, or checkpoints would not be found again.
    """
    import ray
    import ray.train
    from ray.train.collective import barrier, broadcast_from_rank_zero

    use_threads(threads)
    if not is_seen(mark):
        sentence = (
            f"{mark.parents[1]}: the training worker on {platform.node()} does not see this folder of the driver's; "
            f"give a storage that all nodes share (with s3:// a {CACHE} that they share)"
        )
        ray.get(orders.say.remote("error", (TrainingError.__name__, sentence)))
        raise TrainingError(sentence)
    leads = ray.train.get_context().get_world_rank() == 0
    number = broadcast_from_rank_zero(ray.get(orders.first.remote()) if leads else None)
    while (order := ray.get(orders.get.remote(number))) is not None:
        work, folder = ray.get(order[0]), order[1]
        try:
            work(_RayWorker(folder, orders))
        except Clip2sceneError as error:
            ray.get(orders.say.remote("error", (type(error).__name__, str(error))))
            raise
        del work
        barrier()
        if leads:
            ray.get(orders.done.remote(number))
        number += 1


def on_this_node() -> Any:
    """Place of an actor that driver and workers share: the driver's node, so that no other node's end takes it away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _last_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
