"""Checks of this machine: versions, cores, memory, GPUs, disk, and one step of each part that often breaks."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip2scene.machine import num_cpus

PACKAGES = ("torch", "ray", "mlflow", "open_clip_torch", "nuscenes-devkit", "spconv-cu120", "spconv-cu126")


def check() -> int:
    """Print one line per check; returns 0 if all pass, else 1."""
    import psutil
    import torch

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            if not package.startswith("spconv"):
                print(f"{package} missing")
    print(f"{num_cpus()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB memory")
    print(f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here")
    # A driver that is too old for torch still counts its GPUs, but using one fails; that is a check below.
    gpus = torch.cuda.device_count()
    print(f"GPUs: {gpus or 'none; everything runs on CPU'}")
    checks: dict[str, Callable[[], None]] = {} if gpus == 0 else {"GPUs": _add_on_each_gpu}
    checks |= {"sparse convolution": _convolve, "shipped CLIP": _encode}
    failed = 0
    for name, run in checks.items():
        try:
            run()
            print(f"ok      {name}")
        except Exception as error:  # any failure is what the user wants to read
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}")
    return 1 if failed else 0


def _add_on_each_gpu() -> None:
    import torch

    for number in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
        oldest = min(int(arch.removeprefix("sm_")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_"))
        if 10 * major + minor < oldest:
            wanted = f"{oldest // 10}.{oldest % 10}"
            raise RuntimeError(f"{name} has compute capability {major}.{minor}; this torch needs {wanted} or newer")
        assert torch.ones(2, device=f"cuda:{number}").sum().item() == 2, f"{name} cannot add"
        print(f"        {number}: {name}, {torch.cuda.get_device_properties(number).total_memory / 2**30:.0f} GiB")


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.device_count() else "cpu")


def _convolve() -> None:
    import torch

    from clip2scene.config import StudentSettings
    from clip2scene.student.network import Student

    device = _device()
    student = Student(StudentSettings(channels=(8, 8)), embedding_dim=4).to(device)
    points = torch.rand(500, 4, device=device)
    heads = student(points, torch.zeros(500, dtype=torch.long, device=device))
    heads["scr"].sum().backward()


def _encode() -> None:
    import torch

    from clip2scene.config import TeacherSettings
    from clip2scene.teacher.clip import load_teacher

    teacher = load_teacher(TeacherSettings(model="streetworld", image_height_px=64, image_width_px=64)).to(_device())
    teacher(torch.zeros(1, 3, 64, 64))
