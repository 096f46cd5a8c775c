#!/usr/bin/env bash
# Make the secrets of an MLflow server: secrets.sh FILE writes NAME=value lines, mode 600, and never overwrites one.
set -euo pipefail
umask 077

[[ $# == 1 ]] || { echo "secrets.sh: give the one file to write, such as ~/.clip2scene-mlflow.env" >&2; exit 1; }
[[ ! -e $1 ]] || { echo "secrets.sh: $1 exists; its passwords are in use, so it is not overwritten" >&2; exit 1; }

random() {
    head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

cat >"$1" <<END
PGPASSWORD=$(random)
MLFLOW_AUTH_ADMIN_PASSWORD=$(random)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(random)
MLFLOW_TRACKING_USERNAME=team
MLFLOW_TRACKING_PASSWORD=$(random)
END
