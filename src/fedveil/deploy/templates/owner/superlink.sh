#!/bin/sh
# The SuperLink of this federation: stays up, and starts the owner's program when asked to.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
# Read by the owner's program alone; no client is ever sent it.
export FEDVEIL_FEDERATION="{{federation}}"
export PATH="{{bin}}:$PATH"
mkdir -p "$FLWR_HOME"
exec flower-superlink \
    --ssl-ca-certfile tls/ca.crt --ssl-certfile tls/server.pem --ssl-keyfile tls/server.key \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --host "${FEDVEIL_LISTEN:-{{listen}}}" --port {{port}}
