#!/bin/sh
# The role a container takes: its first argument.
#
#   mlflow       tracking server with a login; its admin's password comes from a secret, there is no default
#   mlflow-user  create the user that training logs as, where it is missing; ends at once
#   ray-head     head of a Ray cluster: schedules and takes jobs, trains nothing itself
#   ray-worker   node of that cluster: trains
#   new, train, compare, submit, jobs, status, logs, stop, doctor, ui, version: the `syncbn` verbs
#
# Secrets are files in $SYNCBN_SECRETS. A role that would accept anyone refuses to start, with exit code 7.
set -eu

: "${SYNCBN_SECRETS:=/run/secrets}"

refuse() {
    echo "$role: $1" >&2
    exit 7
}

# secret NAME WHAT: the content of a secret; refuses where it is missing or empty.
secret() {
    [ -s "$SYNCBN_SECRETS/$1" ] && cat "$SYNCBN_SECRETS/$1" && return
    refuse "no $2: put it in the secret $SYNCBN_SECRETS/$1"
}

# require_token: Ray asks every caller for it, and runs anybody's code where it has none.
require_token() {
    export RAY_AUTH_MODE=token
    [ -n "${RAY_AUTH_TOKEN:-}" ] || RAY_AUTH_TOKEN=$(secret ray_token "token for the Ray cluster")
    [ ${#RAY_AUTH_TOKEN} -ge 32 ] || refuse "the Ray token has ${#RAY_AUTH_TOKEN} characters: at least 32"
    export RAY_AUTH_TOKEN
}

# log_in: what training logs to MLflow as, where there is such a secret.
log_in() {
    [ -s "$SYNCBN_SECRETS/mlflow_trainer_password" ] || return 0
    MLFLOW_TRACKING_USERNAME=trainer
    MLFLOW_TRACKING_PASSWORD=$(cat "$SYNCBN_SECRETS/mlflow_trainer_password")
    export MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD
}

# own_address: on a network without a way out, Ray cannot find it by itself.
own_address() {
    echo "${RAY_NODE_ADDRESS:-$(hostname -i | cut -d ' ' -f 1)}"
}

mlflow_server() {
    [ -n "${MLFLOW_AUTH_ADMIN_PASSWORD:-}" ] ||
        MLFLOW_AUTH_ADMIN_PASSWORD=$(secret mlflow_admin_password "password for MLflow's admin")
    # Signs login cookies; a new one at each start only asks browsers to log in again.
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
    export MLFLOW_AUTH_CONFIG_PATH=/app/docker/mlflow-auth.ini
    mkdir -p /data/artifacts
    exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers 1 \
        --backend-store-uri sqlite:////data/mlflow.db \
        --serve-artifacts --artifacts-destination /data/artifacts \
        --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-localhost:5000,127.0.0.1:5000,mlflow:5000}"
}

ray_node() {
    require_token
    log_in
    exec ray start --block --disable-usage-stats --node-ip-address "$(own_address)" \
        --object-store-memory "${RAY_OBJECT_STORE_BYTES:-200000000}" "$@"
}

role=${1:-version}
[ $# -eq 0 ] || shift
role_file=${TMPDIR:-/tmp}/role
[ -e "$role_file" ] || echo "$role" > "$role_file"  # not by what is run in the container later
case $role in
    mlflow) mlflow_server ;;
    mlflow-user) exec python /app/docker/add_user.py trainer ;;
    ray-head) ray_node --head --port 6379 --num-cpus 0 --dashboard-host 0.0.0.0 "$@" ;;
    ray-worker) ray_node --address "${RAY_HEAD:-ray-head:6379}" "$@" ;;
    *) log_in && exec syncbn "$role" "$@" ;;
esac
