"""Send a job, a table or a sweep to a cluster: its files and the code that runs here, without secrets.

The cluster's machines have the dependencies and, in their own environment, the credentials for MLflow
(``MLFLOW_TRACKING_USERNAME``, ``MLFLOW_TRACKING_PASSWORD``). Ray's dashboard shows a job's environment, entry point and
metadata, so none of them contains a secret.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import clip2scene
from clip2scene.cluster.jobs import Jobs
from clip2scene.cluster.session import check_workers
from clip2scene.config import Job, digest_of
from clip2scene.errors import ConfigError
from clip2scene.jobfile import kind_of, kind_with_job, load_job, read_values
from clip2scene.machine import check_actors
from clip2scene.paths import as_text, relative_paths
from clip2scene.storage import folder_of
from clip2scene.tracking.provenance import REVISION, git_revision, user_name
from clip2scene.tracking.server import check_uri

FILES = "files"
"""Folder for the job's files in the package."""
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN(?!IZER)|KEY(_|$)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/]*@")
"""A URL with a user or a password in it."""


@dataclass(frozen=True)
class Submission:
    """What to run on a cluster."""

    verb: str
    """``run`` or ``sweep``."""
    files: tuple[Path, ...]
    """Of the job or the table; for a sweep, of the search space and the job."""
    overrides: tuple[str, ...]
    name: str
    settings: Any
    """All settings, as values for JSON."""
    jobs: tuple[Job, ...]
    """All that it runs, for their resources and paths."""
    prefixes: tuple[str, str]
    """In overrides, before ``storage`` and before all other keys of a job."""

    @property
    def digest(self) -> str:
        """Equal for equal submissions."""
        return digest_of(self.verb, self.settings)

    @property
    def job_id(self) -> str:
        """Name on the cluster."""
        return f"clip2scene-{self.name}-{self.digest}"

    @property
    def names(self) -> list[str]:
        """Names of the files in the package; numbered, as a space and a job may both be called demo.yaml."""
        return [f"{FILES}/{number}/{path.name}" for number, path in enumerate(self.files)]


def read_submission(path: str, overrides: Sequence[str] = (), job_path: str | None = None) -> Submission:
    """Read a job file, a table or (with ``job_path``) a search space.

    Raises:
        ConfigError: a file cannot be read, or a key or value is wrong.
    """
    from clip2scene.sweeps.sweep import load_sweep
    from clip2scene.tables.spec import expand, jobs_of, load_table

    overrides = tuple(overrides)
    settings: Any
    kind = kind_with_job(path, job_path)
    if job_path is not None:
        sweep = load_sweep(path, job_path, overrides)
        space = sweep.space.model_dump(mode="json", by_alias=True)
        jobs = tuple(sweep.job_of(trial) for trial in sweep.trials)
        settings = [space, sweep.job.model_dump(mode="json", by_alias=True)]
        files = (Path(path), Path(job_path))
        return Submission("sweep", files, overrides, sweep.space.sweep, settings, jobs, ("job.", "job."))
    if kind == "table":
        table = load_table(path, overrides)
        jobs = tuple(jobs_of(expand(table, path)).values())
        prefixes = ("", f"jobs.{table.dataset}.")
        settings = table.model_dump(mode="json", by_alias=True)
        return Submission("run", (Path(path),), overrides, table.table, settings, jobs, prefixes)
    job = load_job(path, overrides)
    settings = job.model_dump(mode="json", by_alias=True)
    return Submission("run", (Path(path),), overrides, job.name, settings, (job,), ("", ""))


def variables(words: Sequence[str]) -> dict[str, str]:
    """Environment variables for a job: each word is ``NAME=VALUE``, or ``NAME`` with the value that it has here.

    Raises:
        ConfigError: a name is invalid or not set here; or a name or a value is that of a secret.
    """
    found = {}
    for word in words:
        name, is_given, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {name!r}: not a variable's name; allowed: NAME or NAME=VALUE, without spaces")
        if not is_given and name not in os.environ:
            raise ConfigError(f"--env {name}: not set in this environment; set it, or give NAME=VALUE")
        found[name] = value if is_given else os.environ[name]
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(found[name]):
            raise ConfigError(
                f"--env {name}: holds a secret, it seems, and Ray's dashboard shows a job's environment; set it in the "
                "environment of the cluster's own machines instead"
            )
    return found


def submit(
    submission: Submission,
    jobs: Jobs,
    tracking_uri: str,
    *,
    environment: Mapping[str, str] | None = None,
    again: bool = False,
) -> tuple[str, bool]:
    """Send a submission unless the same one is running; returns its id, and whether it was sent.

    Args:
        submission: what to run.
        jobs: the cluster's.
        tracking_uri: MLflow server, as the cluster reaches it.
        environment: variables of the job and its workers; not a part of what makes two submissions the same.
        again: send it even if it is running.

    Raises:
        ConfigError: the cluster can never run it, a path is not absolute (see :func:`with_absolute_paths`), or the
            tracking URI or the storage is invalid or contains a password.
        ClusterError: the cluster refuses it.
    """
    check_uri(tracking_uri, where=" on the cluster's machines")
    for job in submission.jobs:
        folder_of(job.storage)  # refuses a URI with a password, which Ray's dashboard would show
    nodes = jobs.nodes()
    for job in submission.jobs:
        check_fits(job, [node.resources_total for node in nodes], jobs.address)
    submission = with_absolute_paths(submission, here=_is_here([node.node_ip for node in nodes]))
    earlier = {job.submission_id: job for job in jobs.all()}
    ids = [submission.job_id, *(f"{submission.job_id}-{number}" for number in range(2, len(earlier) + 2))]
    running = [job_id for job_id in ids if job_id in earlier and not earlier[job_id].status.is_terminal()]
    if running and not again:
        return running[-1], False
    job_id = next(job_id for job_id in ids if job_id not in earlier)
    command = [submission.verb, *_words(submission), "--address", "auto", "--tracking-uri", tracking_uri]
    with package(submission) as folder:
        jobs.submit(
            entrypoint=shlex.join(["python", "-m", "clip2scene.cli", *command]),
            submission_id=job_id,
            runtime_env={"working_dir": str(folder), "env_vars": dict(environment or {})},
            metadata={
                "name": submission.name,
                "digest": submission.digest,
                "user": user_name() or "unknown",
                "tracking_uri": tracking_uri,
            },
        )
    return job_id, True


@contextmanager
def package(submission: Submission) -> Iterator[Path]:
    """A temporary folder with only this program's code, its revision and the submission's files.

    Ray puts it on the Python path of the job and its workers, before the packages installed there.
    """
    with tempfile.TemporaryDirectory(prefix="clip2scene-package-") as temporary:
        folder = Path(temporary)
        code = Path(clip2scene.__file__).parent
        shutil.copytree(code, folder / code.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / code.name / REVISION).write_text(f"{git_revision()}\n", encoding="utf-8")
        for name, path in zip(submission.names, submission.files, strict=True):
            (folder / name).parent.mkdir(parents=True)
            values = read_values(path, (), kind_of(path))  # including its bases, which may lie anywhere
            (folder / name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        yield folder


def check_fits(job: Job, nodes: Sequence[dict[str, float]], address: str) -> None:
    """Refuse a job that could never be scheduled: Ray would wait for ever.

    Args:
        job: what would run.
        nodes: what each node has (``{"CPU": 8.0, "GPU": 1.0}``).
        address: of the cluster, for the message.

    Raises:
        ConfigError: the workers of a training, or the extraction actors, do not fit.
    """
    if job.needs_teacher:
        check_actors(nodes, job.extract, job.extract.num_actors, place=address)
    check_workers(job, nodes, address)


def _is_here(addresses: Sequence[str]) -> bool:
    """Whether all nodes are on this machine, which a forwarded dashboard port on 127.0.0.1 does not tell."""
    import psutil

    ours = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return all(address in ours for address in addresses)


def with_absolute_paths(submission: Submission, *, here: bool) -> Submission:
    """The submission with its jobs' paths made absolute, for a process that starts in another folder.

    Raises:
        ConfigError: a path is relative or begins with ``~``, and the cluster is not ``here``, or a row, a column or a
            search space sets it, which wins over an override of the job.
    """
    relative = _relative_paths(submission)
    if not relative:
        return submission
    if not here:
        key, (given, _) = next(iter(relative.items()))
        raise ConfigError(f"{key}={given}: not absolute, and the cluster is not on this machine; give an absolute path")
    words = {key: f"{key}={resolved}" for key, (_, resolved) in relative.items()}
    job_path = str(submission.files[1]) if submission.verb == "sweep" else None

    def with_words(*added: str) -> Submission:
        return read_submission(str(submission.files[0]), (*submission.overrides, *added), job_path)

    for key, (given, _) in relative.items():
        try:
            is_absolute = key not in _relative_paths(with_words(words[key]))
        except ConfigError:  # the word does not go with the row or the space that sets the path
            is_absolute = False
        if not is_absolute:
            where = "search space" if submission.verb == "sweep" else "row or a column"
            raise ConfigError(
                f"{key.removeprefix(submission.prefixes[1])}={given}: not absolute, in a {where}, and the cluster's "
                "processes start in another folder; give an absolute path"
            )
    return with_words(*words.values())


def _relative_paths(submission: Submission) -> dict[str, tuple[str, str]]:
    """Override key of each path of the jobs that is not absolute, with its first value and that value made absolute."""
    of_storage, of_others = submission.prefixes
    relative: dict[str, tuple[str, str]] = {}
    for job in submission.jobs:
        for key, (given, resolved) in relative_paths(job).items():
            prefix = of_storage if key == "storage" else of_others
            relative.setdefault(f"{prefix}{key}", (as_text(given), as_text(resolved)))
    return relative


def _words(submission: Submission) -> list[str]:
    job = ["--job", submission.names[1]] if submission.verb == "sweep" else []
    return [submission.names[0], *submission.overrides, *job]
