#!/bin/sh
# The SuperNode of {{name}}: connects to the owner and waits for rounds. Nothing connects to it.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Where `pip install 'fedveil[flower,hf]'` put its programs, if that is not on the path:
# export PATH="/opt/fedveil/bin:$PATH"
mkdir -p "$FLWR_HOME"
running=
trap 'kill $running 2>/dev/null; exit 0' INT TERM
# It ends when the owner has not registered this client's key yet, and when his SuperLink was
# started anew: then it is started again.
while :; do
    flower-supernode \
        --root-certificates ca.crt --superlink "${FEDVEIL_SUPERLINK:-{{superlink}}}" \
        --auth-supernode-private-key node.key \
        --host 127.0.0.1 --port "${FEDVEIL_PORT:-9094}" \
        --node-config "fedveil=\"$PWD/partner.toml\"" &
    running=$!
    wait "$running" || true
    echo "The SuperNode stopped: trying again in ${FEDVEIL_RETRY:-30} s (Ctrl-C ends this)." >&2
    sleep "${FEDVEIL_RETRY:-30}" &
    running=$!
    wait "$running" || true
done
