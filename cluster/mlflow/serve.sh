#!/usr/bin/env bash
# MLflow for a team: runs and users in PostgreSQL, basic auth, allowed hosts, on 127.0.0.1 by default.
#
# Settings, from the environment, under libpq's and MLflow's own names:
#   PGHOST PGPORT PGUSER PGDATABASE    the database (127.0.0.1, 5432, mlflow, mlflow)
#   MLFLOW_ARTIFACTS_DESTINATION       where artifacts are kept: a folder or s3://BUCKET (required)
#   MLFLOW_S3_ENDPOINT_URL             an S3 server other than Amazon's
#   MLFLOW_HOST MLFLOW_PORT            where to listen (127.0.0.1, 5000)
#   MLFLOW_SERVER_ALLOWED_HOSTS        names that browsers and clients use, with port; required unless on 127.0.0.1
#   MLFLOW_WORKERS                     server processes (2)
# Secrets, from the environment or from the file that MLFLOW_SECRETS_FILE names (NAME=value lines, mode 600):
#   PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
# None of them is an argument of a command, which `ps` would show.
set -euo pipefail

MIN_PASSWORD_LENGTH=12

refuse() {
    echo "serve.sh: $1" >&2
    exit 1
}

read_secrets() {
    local file=$1 mode name value
    [[ -f $file && -r $file ]] || refuse "MLFLOW_SECRETS_FILE=$file is not a readable file"
    mode=$(stat --dereference --format=%a "$file")
    [[ $mode == 600 || $mode == 400 ]] || refuse "$file has mode $mode, so others may read it; allowed: 600 or 400"
    while IFS='=' read -r name value || [[ -n $name ]]; do
        case $name in
            '' | '#'*) ;;
            PGPASSWORD | MLFLOW_AUTH_ADMIN_PASSWORD | MLFLOW_FLASK_SERVER_SECRET_KEY) export "$name=$value" ;;
            AWS_ACCESS_KEY_ID | AWS_SECRET_ACCESS_KEY) export "$name=$value" ;;
            MLFLOW_TRACKING_USERNAME | MLFLOW_TRACKING_PASSWORD) ;; # the clients', not the server's
            *) refuse "$file names '$name'; allowed are the secrets that serve.sh lists in its first lines" ;;
        esac
    done <"$file"
}

check_secret() {
    local name=$1 value=${!1:-}
    [[ -n $value ]] || refuse "$name is empty; give it in the environment or in the file that MLFLOW_SECRETS_FILE names"
    [[ ${#value} -ge $MIN_PASSWORD_LENGTH ]] || refuse "$name is shorter than $MIN_PASSWORD_LENGTH characters"
    case ${value,,} in
        password* | changeme* | change-me* | admin* | mlflow* | postgres* | secret* | 123456*)
            refuse "$name begins like a default password; cluster/mlflow/secrets.sh makes random ones"
            ;;
    esac
}

[[ -z ${MLFLOW_SECRETS_FILE:-} ]] || read_secrets "$MLFLOW_SECRETS_FILE"
check_secret PGPASSWORD
check_secret MLFLOW_AUTH_ADMIN_PASSWORD
check_secret MLFLOW_FLASK_SERVER_SECRET_KEY

host=${MLFLOW_HOST:-127.0.0.1}
port=${MLFLOW_PORT:-5000}
allowed_hosts=${MLFLOW_SERVER_ALLOWED_HOSTS:-}
allowed_hosts=${allowed_hosts// /}
if [[ $host == 127.0.0.1 || $host == localhost ]]; then
    allowed_hosts=${allowed_hosts:-localhost:$port,127.0.0.1:$port}
fi
[[ -n $allowed_hosts ]] || refuse "MLFLOW_HOST=$host is open to others, so MLFLOW_SERVER_ALLOWED_HOSTS must name its hosts"
[[ $allowed_hosts != *'*'* ]] || refuse "MLFLOW_SERVER_ALLOWED_HOSTS=$allowed_hosts has a wildcard; name the hosts"
[[ -n ${MLFLOW_ARTIFACTS_DESTINATION:-} ]] || refuse "MLFLOW_ARTIFACTS_DESTINATION is empty; give a folder or s3://BUCKET"
command -v mlflow >/dev/null || refuse "no mlflow on PATH; install clip2scene[server] and activate its environment"

export PGHOST=${PGHOST:-127.0.0.1} PGPORT=${PGPORT:-5432} PGUSER=${PGUSER:-mlflow} PGDATABASE=${PGDATABASE:-mlflow}
export MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2:// # libpq reads the rest from the environment
MLFLOW_AUTH_CONFIG_PATH=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)/basic_auth.ini
export MLFLOW_AUTH_CONFIG_PATH
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
unset MLFLOW_SECRETS_FILE MLFLOW_TRACKING_URI

# Browsers send an Origin with requests of MLflow's own pages, and MLflow refuses all but localhost's by default.
origins=http://${allowed_hosts//,/,http://},https://${allowed_hosts//,/,https://}
exec mlflow server --app-name basic-auth --host "$host" --port "$port" --workers "${MLFLOW_WORKERS:-2}" \
    --allowed-hosts "$allowed_hosts" --cors-allowed-origins "$origins" \
    --artifacts-destination "$MLFLOW_ARTIFACTS_DESTINATION"
