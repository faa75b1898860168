#!/bin/sh
# Registers the clients' keys, and starts the federation or goes on with it.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export PATH="{{bin}}:$PATH"
for key in keys/*.pub; do
    # A key that is registered already stays so.
    flwr supernode register "$key" owner >/dev/null 2>&1 || true
done
exec flwr run app owner --stream
