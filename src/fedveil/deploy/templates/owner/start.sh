#!/bin/sh
# Registers the clients' keys, and starts the federation or goes on with it.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export PATH="{{bin}}:$PATH"

register() {
    tries=0
    # The SuperLink may be starting still.
    until said=$(flwr supernode register "$1" owner 2>&1); do
        case "$said" in *"already in use"*) return 0 ;; esac
        tries=$((tries + 1))
        if [ "$tries" -ge "${FEDVEIL_TRIES:-15}" ]; then
            echo "The key $1 could not be registered; does ./superlink.sh run?" >&2
            echo "$said" >&2
            exit 1
        fi
        sleep 2
    done
}

for key in keys/*.pub; do
    register "$key"
done
exec flwr run app owner --stream
