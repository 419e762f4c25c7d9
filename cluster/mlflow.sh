# MLflow on a `ray up` cluster: read with `.` before Ray starts, so that all that Ray starts knows where it is.
#
#   . mlflow.sh serve     on the head: keeps a server running, on port 5000, and names it
#   . mlflow.sh           on a worker: names the server of the head (RAY_HEAD_IP)
#
# Who may talk to it has the cluster's token: user `raymuse`, password derived from the token, as all nodes can derive
# it. Records lie in ~/mlflow on the head (sqlite and files), or where ~/mlflow/server.env says; a line each:
#
#   MLFLOW_BACKEND_STORE_URI=postgresql://raymuse:PASSWORD@HOST/mlflow
#   MLFLOW_ARTIFACTS_DESTINATION=s3://BUCKET/mlflow

# derived PURPOSE: a secret of its own for a purpose, from the token, which stays where it is.
derived() {
  { printf '%s ' "$1"; tr -d '[:space:]' < "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"; } | sha256sum | cut -c 1-40
}

# serve: starts the server, again whenever it ends (ten seconds after the last start), and ends it five minutes after Ray. Where one runs with the same token
# and settings, it stays; one with others ends, and this one takes its place.
serve() {
  mkdir -p "$HOME/mlflow"
  chmod 700 "$HOME/mlflow"
  if [ -f "$HOME/mlflow/server.env" ]; then chmod 600 "$HOME/mlflow/server.env"; fi
  as="$({ echo "$MLFLOW_TRACKING_PASSWORD"; address; cat "$HOME/mlflow/server.env" 2> /dev/null; } | sha256sum)"
  echo "$as" > "$HOME/mlflow/wanted.new"
  mv "$HOME/mlflow/wanted.new" "$HOME/mlflow/wanted"   # whole at any time: who serves looks at it every second
  (
    cd "$HOME/mlflow" || exit 1
    trap '' HUP   # the terminal of `ray up` goes
    exec 9> lock
    until flock -n 9; do
      if [ "$as" = "$(cat serving)" ] || [ "$as" != "$(cat wanted)" ]; then exit 0; fi
      sleep 1 9>&-
    done
    echo "$as" > serving
    export MLFLOW_BACKEND_STORE_URI="sqlite:///$HOME/mlflow/mlflow.db" MLFLOW_ARTIFACTS_DESTINATION="$HOME/mlflow/artifacts"
    if [ -f server.env ]; then set -a; . ./server.env; set +a; fi
    export MLFLOW_AUTH_ADMIN_USERNAME=raymuse MLFLOW_AUTH_ADMIN_PASSWORD="$MLFLOW_TRACKING_PASSWORD"
    MLFLOW_FLASK_SERVER_SECRET_KEY="$(derived mlflow-sessions)"; export MLFLOW_FLASK_SERVER_SECRET_KEY
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    export MLFLOW_SERVER_ALLOWED_HOSTS="localhost:*,127.0.0.1:*,$(address):5000"   # against DNS rebinding
    server= alone=0 rest=0
    while [ "$alone" -lt 300 ] && [ "$as" = "$(cat wanted)" ]; do
      rest=$((rest - 1))
      if [ "$rest" -lt 0 ] && { [ -z "$server" ] || ! kill -0 "$server" 2> /dev/null; }; then
        rest=10   # one that cannot start, for want of a package say, must not keep a core busy
        rm -f basic_auth.db   # holds nothing but the one user, whose password follows the token
        mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers 1 >> server.log 2>&1 9>&- &
        server=$!
      fi
      sleep 1 9>&-
      if grep -qsx gcs_server /proc/[0-9]*/comm; then alone=0; else alone=$((alone + 1)); fi
    done
    rm serving
    kill "$server"
    wait "$server"   # its port is free then
  ) < /dev/null > /dev/null 2>&1 &
  unset as
}

# address: of the head as its workers see it.
address() {
  echo "${RAY_HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}"
}

MLFLOW_TRACKING_URI="http://$(address):5000"; export MLFLOW_TRACKING_URI
MLFLOW_TRACKING_PASSWORD="$(derived mlflow)"; export MLFLOW_TRACKING_PASSWORD
export MLFLOW_TRACKING_USERNAME=raymuse MLFLOW_DISABLE_TELEMETRY=true
if [ "${1:-}" = serve ]; then serve; fi
unset -f derived serve address
