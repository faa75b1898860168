#!/bin/sh
# {{name}} in a federation: a SuperNode, which connects to the owner and waits for rounds, and
# fedveil's own program, which answers them. Nothing connects to this machine, and nothing of an app
# that the owner sends is installed or run: the SuperNode only keeps it (--isolation process).
set -eu
case ":$PATH:" in
    *::* | *:.:*) echo "PATH has the current folder in it: take that out first." >&2; exit 1 ;;
esac
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Nor does Python look for modules in this folder, whose files the owner made.
unset PYTHONPATH PYTHONSTARTUP PYTHONHOME
export PYTHONSAFEPATH=1
# Where `pip install 'fedveil[flower,hf]'` put its programs, if that is not on the path:
# export PATH="/opt/fedveil/bin:$PATH"
port="${FEDVEIL_PORT:-{{port}}}" retry="${FEDVEIL_RETRY:-30}" link="$FLWR_HOME/link"
mkdir -p "$FLWR_HOME"

program= node= nap= grace=10
lives() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }
rest() { sleep "$1" & nap=$!; wait "$nap" || true; }
stop() {
    trap "" INT TERM
    kill $program $node $nap 2>/dev/null || true
    # They answer what they are at, and end; what does not is ended.
    while { lives "$program" || lives "$node"; } && [ "$grace" -gt 0 ]; do
        sleep 1
        grace=$((grace - 1))
    done
    kill -9 $program $node 2>/dev/null || true
    wait
    exit 0
}
trap stop INT TERM

while :; do
    rm -f "$link/token"
    fedveil partner run partner.toml --port "$port" --link "$link" &
    program=$!
    # With its token it says that it is ready: before that, nobody connects to the owner.
    until [ -e "$link/token" ] || ! lives "$program"; do rest 1; done
    while lives "$program"; do
        flower-supernode \
            --root-certificates ca.crt --superlink "${FEDVEIL_SUPERLINK:-{{superlink}}}" \
            --auth-supernode-private-key node.key \
            --isolation process --superexec-auth-secret-file "$link/token" \
            --ssl-certfile "$link/server.pem" --ssl-keyfile "$link/server.key" \
            --ssl-ca-certfile "$link/ca.crt" --host 127.0.0.1 --port "$port" &
        node=$!
        while lives "$program" && lives "$node"; do rest 1; done
        # A SuperNode ends when the owner has not registered this client's key yet, and when the
        # SuperLink was started anew: then it alone is started again.
        if lives "$program"; then
            echo "The SuperNode stopped: trying again in $retry s (Ctrl-C ends this)." >&2
            rest "$retry"
        fi
    done
    # A program that ended leaves a message without an answer, so the SuperNode begins anew, too.
    if lives "$node"; then
        kill "$node" 2>/dev/null || true
        wait "$node" || true
    fi
    echo "fedveil stopped: trying again in $retry s (Ctrl-C ends this)." >&2
    rest "$retry"
done
