#!/usr/bin/env python3
"""Create the user as which MLflow's clients log in, or set its password again.

Reads MLFLOW_TRACKING_URI, MLFLOW_AUTH_ADMIN_PASSWORD (of the user ``admin``), and, like a client,
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Only the standard library, so that any Python runs it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request

ADMIN = "admin"
NAMES = ("MLFLOW_TRACKING_URI", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
TIMEOUT_S = 60.0


def call(method: str, action: str, password: str, body: dict[str, str]) -> str | None:
    """Call MLflow's REST API 2.0, ``users/ACTION``: None on success, else MLflow's error code."""
    login = base64.b64encode(f"{ADMIN}:{password}".encode()).decode()
    request = urllib.request.Request(
        f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/api/2.0/mlflow/users/{action}",
        method=method,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {login}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return "the admin's password is wrong"
        try:
            return str(json.load(error)["error_code"])
        except (ValueError, KeyError):
            return f"HTTP {error.code}"


def main() -> int:
    """Create the user, or set its password if it exists."""
    missing = [name for name in NAMES if not os.environ.get(name)]
    if missing:
        print(f"add_user.py: {', '.join(missing)} must be set in the environment", file=sys.stderr)
        return 1
    admin_password = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    user = {"username": os.environ["MLFLOW_TRACKING_USERNAME"], "password": os.environ["MLFLOW_TRACKING_PASSWORD"]}
    try:
        error = call("POST", "create", admin_password, user)
        if error == "RESOURCE_ALREADY_EXISTS":
            error = call("PATCH", "update-password", admin_password, user)
    except (OSError, ValueError) as reason:
        error = f"no answer ({reason})"
    if error is not None:
        where = f"{os.environ['MLFLOW_TRACKING_URI']}: user {user['username']}"
        print(f"add_user.py: {where} could not be created: {error}", file=sys.stderr)
        return 1
    print(f"{os.environ['MLFLOW_TRACKING_URI']}: user {user['username']} can log in")
    return 0


if __name__ == "__main__":
    sys.exit(main())
