"""Jobs of a Ray cluster from outside: the one user of Ray's Jobs API, with errors of one sentence."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from clip2scene.cluster.auth import token_wanted, use_token
from clip2scene.errors import ClusterError, ConfigError, one_line
from clip2scene.machine import HOST

DASHBOARD_PORT = 8265
DEFAULT_ADDRESS = f"http://{HOST}:{DASHBOARD_PORT}"
API_ADDRESS, RAY_ADDRESS = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
DETACHED = 130
"""Exit status of a command that stops following a job while the job goes on."""
_POLL_S = 0.5
_MAX_NODES = 10_000
"""The most that Ray answers with; its default is 100."""
_CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)


class Jobs:
    """The jobs of the cluster with its dashboard at an address.

    Args:
        address: ``http://HOST:8265``; ``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS`` or 127.0.0.1 when not given.

    Raises:
        ConfigError: the address is not a dashboard's, or others can read the file of the token.
        ClusterError: nothing answers there, or it requires another token.
    """

    def __init__(self, address: str | None = None):
        self.address = _dashboard(address)
        use_token()
        os.environ[API_ADDRESS] = self.address  # Ray prefers it to the argument
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._one_sentence():
            self.client = JobSubmissionClient(self.address)

    def all(self) -> list[Any]:
        """All jobs that were submitted to the cluster, oldest first, as Ray's ``JobDetails``."""
        with self._one_sentence():
            jobs = [job for job in self.client.list_jobs() if job.submission_id is not None]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def one(self, job_id: str) -> Any:
        """The job with that id.

        Raises:
            ConfigError: there is none.
        """
        found = {job.submission_id: job for job in self.all()}
        if job_id not in found:
            known = ", ".join(list(found)[-5:]) or "none"
            raise ConfigError(f"job {job_id!r}: not known at {self.address}; the latest there: {known}")
        return found[job_id]

    def submit(self, **words: Any) -> None:
        """Submit a job, with the arguments of Ray's ``submit_job``."""
        with self._one_sentence():
            self.client.submit_job(**words)

    def stop(self, job_id: str) -> bool:
        """End a job with SIGTERM and wait until it has ended; returns whether it was running."""
        if self.one(job_id).status.is_terminal():
            return False
        with self._one_sentence():
            self.client.stop_job(job_id)
        self._ended(job_id)
        return True

    def log(self, job_id: str) -> str:
        """The output of a job so far."""
        self.one(job_id)
        with self._one_sentence():
            return str(self.client.get_job_logs(job_id))

    def follow(self, job_id: str) -> int:
        """Print a job's output until it ends, and return its exit status; Ctrl-C leaves the job running.

        Raises:
            ClusterError: the connection broke; the job goes on.
        """
        try:
            asyncio.run(self._print(job_id))
            return exit_status(self._ended(job_id))
        except KeyboardInterrupt:
            print(f"\n{job_id} goes on; {self.come_back(job_id)}")
            return DETACHED
        except BrokenPipeError:
            raise  # of stdout; the connection's own errors are ClusterErrors already
        except (ClusterError, OSError) as error:
            raise ClusterError(
                f"lost the connection to {self.address} while following {job_id}; the job is probably still running; "
                f"{self.come_back(job_id)}"
            ) from error

    def come_back(self, job_id: str) -> str:
        """How to follow and end a job, as a sentence."""
        words = f"{job_id} --dashboard {self.address}"
        return f"follow it with `clip2scene logs --follow {words}`, end it with `clip2scene stop {words}`"

    def nodes(self) -> list[Any]:
        """The living nodes, as Ray's ``NodeState``."""
        from ray.util.state import list_nodes

        with self._one_sentence():
            return list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], limit=_MAX_NODES)

    async def _print(self, job_id: str) -> None:
        chunks = self.client.tail_job_logs(job_id)
        while True:
            with self._one_sentence():
                lines = await anext(chunks, None)
            if lines is None:
                return
            print(lines, end="", flush=True)

    def _ended(self, job_id: str) -> Any:
        while not (job := self.one(job_id)).status.is_terminal():
            time.sleep(_POLL_S)
        return job

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        import aiohttp
        from ray.exceptions import AuthenticationError
        from ray.util.state.exception import RayStateApiException
        from requests import RequestException

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(token_wanted(self.address)) from error
        except (ConnectionError, RequestException, aiohttp.ClientError) as error:
            raise ClusterError(f"no Ray dashboard answers at {self.address}; give its URL with --dashboard") from error
        except (RuntimeError, RayStateApiException) as error:
            reason = one_line(error, 300)
            raise ClusterError(f"{self.address} refuses: {reason}") from error


def exit_status(job: Any) -> int:
    """Exit status of a command that waited for a job: 0 if it succeeded, else the job's own or 1."""
    if job.status == "SUCCEEDED":
        return 0
    return int(job.driver_exit_code or 1)


def _dashboard(given: str | None) -> str:
    address = given or os.environ.get(API_ADDRESS) or os.environ.get(RAY_ADDRESS) or DEFAULT_ADDRESS
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--dashboard {address}: must be the URL of Ray's dashboard, http://HOST:8265")
    if parts.username or parts.password:
        raise ConfigError("--dashboard: holds a password, which others could see; use a token (RAY_AUTH_TOKEN_PATH)")
    return address.rstrip("/")
