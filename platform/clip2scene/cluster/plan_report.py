"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from clip2scene.cluster.plan_work import Plan, Work
from clip2scene.machine import counted
from clip2scene.progress import duration


def plan_text(plan: Plan, price_per_gpu_hour: float | None = None) -> str:
    """The plan in several lines; problems and notes come last."""
    data = plan.data
    lines = [
        f"plan of {plan.name}: nothing was run",
        f"data: {data.frames:,} keyframes, {data.train_frames:,} to train on, {data.eval_frames:,} to score or "
        f"predict, {data.images:,} images, from {data.source}",
    ]
    lines += [f"{name}: {count:,g}" for name, count in plan.facts.items()]
    lines += ["", f"{'stage':17}{'work':>26}{'done':>13}{'steps':>9}{'to store':>11}{'time':>14}"]
    lines += [_row(work) for work in plan.works]
    lines += [f"{'all':17}{'':26}{'':13}{'':9}{_bytes(plan.stored_bytes):>11}{_time(plan):>14}", ""]
    for work in plan.works:
        lines += [f"{work.stage}: {source}" for source in work.sources]
    lines.append("")
    lines += [f"requests: {sentence}" for sentence in plan.wanted]
    machine = plan.machine
    there = " and ".join((counted(machine.cpus, "CPU"), counted(machine.gpus, "GPU")))
    lines.append(f"available: {there}, {counted(len(machine.nodes), 'node')} ({machine.name})")
    if plan.memory is not None:
        on_gpu = {name: count for name, count in plan.memory.items() if name in plan.on_gpu}
        parts = _sum({name: count for name, count in plan.memory.items() if name not in plan.on_gpu})
        parts += f", and on its GPU {_sum(on_gpu)}" if on_gpu else ""
        lines.append(f"memory of a training worker at its peak, estimated: {parts}")
    if plan.actor_memory is not None:
        lines.append(f"memory of an extraction actor: {_bytes(plan.actor_memory)}, estimated")
    if price_per_gpu_hour is not None:
        lines.append(_money(plan, price_per_gpu_hour))
    lines += [f"note: {sentence}" for sentence in plan.notes]
    return "\n".join(lines)


def plan_json(plan: Plan, price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """The plan as values for JSON; unknown times are null."""
    data, machine = plan.data, plan.machine
    hours = plan.gpu_hours
    return {
        "name": plan.name,
        "data": {key: value for key, value in vars(data).items() if key != "stages"},
        "facts": dict(plan.facts),
        "stages": [asdict(work) for work in plan.works],
        "seconds": plan.seconds,
        "stored_bytes": plan.stored_bytes,
        "memory": None if plan.memory is None else dict(plan.memory),
        "memory_on_gpu": list(plan.on_gpu),
        "actor_memory": plan.actor_memory,
        "wanted": list(plan.wanted),
        "machine": {"name": machine.name, "nodes": list(machine.nodes)},
        "gpu_hours": hours,
        "price": None if hours is None or price_per_gpu_hour is None else hours * price_per_gpu_hour,
        "never_schedulable": list(plan.unschedulable),
        "disk_too_small": list(plan.no_room),
        "notes": list(plan.notes),
    }


def _row(work: Work) -> str:
    amount = f"{work.amount:,} {work.unit}"
    done = f"{work.done:,}" if work.done else ""
    steps = f"{work.steps:,}" if work.steps else ""
    seconds = "no estimate" if work.seconds is None else duration(work.seconds)
    stored = _bytes(work.stored_bytes) if work.stored_bytes else ""
    return f"{work.stage:17}{amount:>26}{done:>13}{steps:>9}{stored:>11}{seconds:>14}"


def _time(plan: Plan) -> str:
    if plan.seconds is not None:
        return duration(plan.seconds)
    known = sum(work.seconds for work in plan.works if work.seconds is not None)
    return f"> {duration(known)}"


def _money(plan: Plan, price: float) -> str:
    if not plan.gpus:
        return "price: uses no GPU"
    if plan.gpu_hours is None:
        return "price: no estimate, as the time of a stage is not known"
    return (
        f"price: {plan.gpu_hours:,.1f} GPU-hours ({plan.gpus:g} GPUs held from beginning to end), "
        f"{plan.gpu_hours * price:,.2f} at {price:g} an hour"
    )


def _sum(memory: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {_bytes(count)}" for name, count in memory.items())
    return f"{_bytes(sum(memory.values()))} ({parts})"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"
