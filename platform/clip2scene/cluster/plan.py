"""``clip2scene plan``: the work, time, resources and cost of a job, a table or a sweep; nothing is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clip2scene.cluster.plan_machine import Machine, free_bytes
from clip2scene.cluster.plan_memory import ON_GPU
from clip2scene.cluster.plan_stages import Planner
from clip2scene.cluster.plan_work import Plan, Work, seconds_of, source_of
from clip2scene.cluster.rates import RatedStage, Rates
from clip2scene.cluster.submit import check_fits
from clip2scene.config import Job
from clip2scene.errors import ConfigError
from clip2scene.jobfile import kind_with_job, load_job, read_values
from clip2scene.machine import counted, jobs_on, workers_on
from clip2scene.remote import is_remote
from clip2scene.storage import folder_of
from clip2scene.sweeps.slots import trial_slots
from clip2scene.sweeps.space import Scheduler
from clip2scene.sweeps.sweep import Sweep, load_sweep, split_overrides
from clip2scene.tables.spec import expand, jobs_of, load_table
from clip2scene.training.validation import COMPARED_SWEEPS

NO_ROOT = "not-given"
"""Stands for the data set's folder if a job names none."""
_ORDER: tuple[RatedStage, ...] = (
    "start", "streetworld", "index", "extract", "superpixels", "distill", "verify", "evaluate", "finetune",
    "predict",
)  # fmt: skip
_OF_A_JOB = ("distill", "evaluate", "finetune", "predict")
_MEMORY_SHARE = 0.9
"""Share of the memory of a machine or of a GPU above which a plan warns."""


def plan(
    path: str,
    overrides: Sequence[str],
    job_path: str | None,
    machine: Machine,
    rates: Rates,
    num_frames: int | None = None,
) -> Plan:
    """Plan a job, a table or a sweep.

    Args:
        path: of a job, a table or (with ``job_path``) a search space.
        overrides: ``key=value`` words, as for the verb that would run it.
        job_path: of the job that a search space varies.
        machine: where it would run.
        rates: measured speeds and sizes.
        num_frames: training keyframes of a data set that is not there.

    Raises:
        ConfigError: a file cannot be read, or a key or value is wrong.
        DataError: the data set is damaged.
    """
    kind = kind_with_job(path, job_path)
    planner = Planner(machine, rates, num_frames)
    if job_path is not None:
        values = read_values(job_path, split_overrides(overrides)[1], "job")
        return plan_sweep(load_sweep(path, job_path, [*overrides, *_no_root(values, "job.")]), planner)
    if kind == "table":
        values = read_values(path, overrides, "table")
        jobs, dataset = values.get("jobs"), values.get("dataset")
        base = jobs.get(dataset) if isinstance(jobs, dict) and isinstance(dataset, str) else None
        table = load_table(path, [*overrides, *_no_root(base, f"jobs.{dataset}.")])
        return plan_jobs(list(jobs_of(expand(table, path)).values()), table.table, planner)
    job = load_job(path, [*overrides, *_no_root(read_values(path, overrides, "job"))])
    return plan_jobs([job], job.name, planner)


def plan_jobs(jobs: Sequence[Job], name: str, planner: Planner) -> Plan:
    """Plan one job, or the jobs of a table, which share artifacts."""
    machine = planner.machine
    works: dict[RatedStage, Work] = {}
    trainings = 0
    for job in jobs:
        folder_of(job.storage)  # refuses a URI that is no storage
        for work in planner.works(job):
            _add(works, work)
            trainings += work.stage == "distill"
    facts = {}
    if len(jobs) > 1:
        # Jobs with the same pre-training run one after another; of the others, as many as fit run at once.
        fit = min(jobs_on(machine.nodes_for(job.resources.num_workers), job.resources) for job in jobs)
        at_once = max(min(fit, trainings), 1)
        for stage in [stage for stage in works if stage in _OF_A_JOB]:
            seconds, gpus = works[stage].seconds, works[stage].gpus * at_once
            works[stage] = replace(works[stage], seconds=None if seconds is None else seconds / at_once, gpus=gpus)
        facts = {"jobs": len(jobs), "pretrainings": trainings, "jobs at a time": at_once}
    return _complete(jobs, name, planner, works, _unfit(jobs, machine), facts)


def plan_sweep(sweep: Sweep, planner: Planner) -> Plan:
    """Plan a sweep: each distinct set of inputs once, then as many trials at a time as fit."""
    space, machine = sweep.space, planner.machine
    # What TPE will choose is not known; its trials count with the job's own settings.
    jobs = [sweep.job_of(trial) for trial in sweep.trials]
    first = jobs[0]
    problems, slots = [], 1
    try:
        slots = trial_slots(machine.nodes_for(space.resources.num_workers), space.resources)
    except ConfigError as error:
        problems.append(str(error))
    least, expected = asha_shares(space.scheduler, sweep.epochs)
    works: dict[RatedStage, Work] = {}
    extractions, checks = 0, 0
    for job in jobs:
        for work in planner.works(job.model_copy(update={"stage": "extract"})):
            _add(works, work)
            extractions += work.stage == "extract"
        data = planner.data(job)
        train = planner.training("distill", job, job.distill, data.train_frames, job.distill.num_sweeps)
        clouds = data.eval_frames * COMPARED_SWEEPS * math.ceil(sweep.epochs / space.verify_every_epochs)
        checks += clouds
        rated: tuple[tuple[RatedStage, Work], ...] = (("distill", train), ("verify", Work("verify", clouds, "clouds")))
        for stage, work in rated:
            rate = planner.rates.find(stage, "gpu" if space.resources.gpus_per_worker else "cpu", job)
            at_work = slots * max(space.resources.num_workers, 1)
            timed = replace(
                work,
                done=0,
                seconds=seconds_of(rate, round(expected * work.amount), at_work, runs=0),
                sources=source_of(rate, space.resources.gpus_per_worker, at_work),
                gpus=at_work * space.resources.gpus_per_worker,
            )
            _add(works, timed)
    epochs = len(jobs) * sweep.epochs
    facts = {
        "trials": len(jobs),
        "trials at a time": slots,
        "extractions": extractions,
        "epochs, no trial stopped": epochs,
        "epochs, at least": round(least * epochs),
        "epochs, expected": round(expected * epochs),
    }
    if space.searcher == "tpe":
        planner.note("TPE picks its trials while running; they are planned with the job's own settings")
    if space.budget.hours is not None:
        planner.note(f"budget.hours={space.budget.hours:g} stops what still runs then")
    problems += _unfit([first.model_copy(update={"stage": "extract"})], machine)
    return _complete(jobs, space.sweep, planner, works, problems, facts)


def asha_shares(scheduler: Scheduler, epochs: int) -> tuple[float, float]:
    """Share of all epochs that are trained at least, and the share that is expected.

    At least: every trial runs until it can first be stopped. Expected: one in ``reduction_factor`` of the trials at a
    rung goes on; early ones go on more often than that, as ASHA decides before all have arrived.
    """
    if scheduler.kind == "none":
        return 1.0, 1.0
    reached, part = min(scheduler.grace_epochs, epochs), 1.0
    total = float(reached)
    while reached < epochs:
        following, part = min(reached * scheduler.reduction_factor, epochs), part / scheduler.reduction_factor
        total, reached = total + part * (following - reached), following
    return min(scheduler.grace_epochs, epochs) / epochs, total / epochs


def _add(works: dict[RatedStage, Work], work: Work) -> None:
    """Add the work of one more job to that of its stage."""
    works[work.stage] = works[work.stage].plus(work) if work.stage in works else work


def _complete(
    jobs: Sequence[Job],
    name: str,
    planner: Planner,
    works: Mapping[RatedStage, Work],
    problems: list[str],
    facts: Mapping[str, float],
) -> Plan:
    machine, first = planner.machine, jobs[0]
    start = planner.rates.find("start", "cpu", first)
    everything: dict[RatedStage, Work] = {
        "start": Work("start", 1, "commands", seconds=seconds_of(start, 1, 1), sources=source_of(start, 0, 1))
    }
    everything |= works
    memories = [memory for job in jobs for memory in planner.memory(job)]
    known = [memory for memory in memories if memory is not None]
    largest = max(known, key=lambda parts: sum(parts.values()), default=None)
    result = Plan(
        name=name,
        works=tuple(everything[stage] for stage in _ORDER if stage in everything),
        data=planner.data(first),
        machine=machine,
        wanted=tuple(_wanted(first)),
        memory=largest if len(known) == len(memories) else None,
        on_gpu=ON_GPU if first.resources.gpus_per_worker else (),
        actor_memory=planner.actor_memory(first),
        facts=facts,
    )
    no_room = []
    on_disk = machine.is_here and not is_remote(first.storage)
    if on_disk and result.stored_bytes > (free := free_bytes(first.storage)):
        no_room.append(
            f"storage={first.storage}: needs {result.stored_bytes / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are "
            "free; give another storage, or free some space"
        )
    _warn(planner, first, result, int(facts.get("trials at a time", facts.get("jobs at a time", 1))))
    return replace(
        result,
        unschedulable=tuple(dict.fromkeys(problems)),
        no_room=tuple(no_room),
        notes=tuple(planner.notes),
    )


def _warn(planner: Planner, job: Job, result: Plan, at_a_time: int) -> None:
    machine, resources = planner.machine, job.resources
    workers = max(resources.num_workers, 1)
    if is_remote(job.storage):
        planner.note(f"storage={job.storage}: the object store is not checked; everything in it counts as still to do")
    threads = 0 if resources.gpus_per_worker else workers * resources.threads_per_worker
    if job.reaches("distill") and threads > machine.cpus:
        planner.note(f"{workers} training workers share {machine.cpus:g} CPUs")
    if machine.gpus > result.gpus and result.gpus:
        planner.note(
            f"{machine.gpus - result.gpus:g} of {machine.gpus:g} GPUs stay idle; more resources.num_workers (at most "
            f"distill.batch_size={job.distill.batch_size} of them find work) and extract.num_actors would use them"
        )
    if result.memory is None:
        return
    together = at_a_time * workers * (sum(result.memory.values()) - result.gpu_memory)
    if machine.memory_bytes is not None and together > _MEMORY_SHARE * machine.memory_bytes:
        planner.note(
            f"memory: the training workers may want {together / 1e9:.1f} GB together and {machine.name} has "
            f"{machine.memory_bytes / 1e9:.1f}; fewer of them, or less than resources.cached_frames="
            f"{resources.cached_frames}, take less"
        )
    on_one_gpu = int(workers_on({"GPU": 1}, gpus=resources.gpus_per_worker)) if resources.gpus_per_worker else 0
    wanted = result.gpu_memory * min(on_one_gpu, at_a_time * workers)
    if machine.gpu_memory_bytes is not None and wanted > _MEMORY_SHARE * machine.gpu_memory_bytes:
        planner.note(
            f"memory: a GPU's training workers may want {wanted / 1e9:.1f} GB and a GPU of {machine.name} has "
            f"{machine.gpu_memory_bytes / 1e9:.1f}; a smaller batch_size or precision=fp16 takes less"
        )


def _wanted(job: Job) -> Iterable[str]:
    extract, resources = job.extract, job.resources
    if job.needs_teacher:
        gpus = f", {counted(extract.gpus_per_actor, 'GPU')}" if extract.gpus_per_actor else ""
        yield f"extract: {counted(extract.num_actors, 'actor')}, each {counted(extract.threads_per_actor, 'CPU')}{gpus}"
    if job.reaches("distill"):
        gpus = f", {counted(resources.gpus_per_worker, 'GPU')}" if resources.gpus_per_worker else ""
        who = f"{counted(resources.num_workers, 'worker')}, each 1 CPU" if resources.num_workers else "1 process"
        yield f"trainings: {who}{gpus}"


def _unfit(jobs: Sequence[Job], machine: Machine) -> list[str]:
    problems = []
    for job in jobs:
        try:
            check_fits(job, list(machine.nodes_for(job.resources.num_workers)), machine.name)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _no_root(values: Any, prefix: str = "") -> list[str]:
    """An override for a job without the folder of its data set, for which official counts are used."""
    dataset = values.get("dataset") if isinstance(values, dict) else None
    if not isinstance(dataset, dict) or dataset.get("kind") == "streetworld" or dataset.get("root") is not None:
        return []
    return [f"{prefix}dataset.root={NO_ROOT}"]
