#!/bin/sh
# The SuperNode of {{name}}: connects to the owner and waits for rounds. Nothing connects to it.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Where `pip install 'fedveil[flower,hf]'` put its programs, if that is not on the path:
# export PATH="/opt/fedveil/bin:$PATH"
mkdir -p "$FLWR_HOME"
# Until the owner has registered this client's key the SuperLink turns it away.
until flower-supernode \
    --root-certificates ca.crt --superlink "${FEDVEIL_SUPERLINK:-{{superlink}}}" \
    --auth-supernode-private-key node.key \
    --host 127.0.0.1 --port "${FEDVEIL_PORT:-9094}" \
    --node-config "fedveil=\"$PWD/partner.toml\""
do
    echo "The SuperNode stopped: trying again in ${FEDVEIL_RETRY:-30} s (Ctrl-C ends this)." >&2
    sleep "${FEDVEIL_RETRY:-30}"
done
