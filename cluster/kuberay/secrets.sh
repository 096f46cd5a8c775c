#!/usr/bin/env bash
# Print the namespace and its Secrets, with random values, for `cluster/kuberay/secrets.sh | kubectl create -f -`.
# `create` refuses what exists, so it never replaces passwords in use. Nothing is written to a file, and no value is an
# argument of a command.
set -euo pipefail

random() {
    head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

secret() { # NAME KEY=VALUE ...
    printf -- '---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: clip2scene}\nstringData:\n' "$1"
    shift
    printf '  %s\n' "${@/=/: }"
}

cat "$(dirname "$0")/namespace.yaml"
secret ray-token "auth_token=\"$(random)\""
secret postgres "password=\"$(random)\""
secret mlflow-server "admin_password=\"$(random)\"" "flask_key=\"$(random)\""
secret mlflow-client "username=team" "password=\"$(random)\""
secret object-store "access_key=\"$(random)\"" "secret_key=\"$(random)\""
