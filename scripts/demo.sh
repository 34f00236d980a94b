#!/usr/bin/env bash
# Shows hubfs from beginning to end, with a hub of its own: needs no network once it is set up.
#
#     scripts/demo.sh
#
# Every line that begins with "$" is a command that you could type.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

work=$(mktemp -d "${TMPDIR:-/tmp}/hubfs-demo.XXXXXX")
server=

clean_up() {
    local code=$?
    trap - EXIT
    cd "$work" || cd /
    if mountpoint -q tfhub; then
        hubfs unmount tfhub || hubfs unmount --lazy tfhub || true
    fi
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    cd /
    rm -rf --one-file-system "$work"
    [ "$code" -eq 0 ] || printf '\nThe demo FAILED (exit code %d).\n' "$code" >&2
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# No setting of yours changes the demo, and the demo changes none of yours.
for name in $(compgen -e | grep -E '^(HUBFS|TFHUB)_' || true); do unset "$name"; done
export XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state
export no_proxy=127.0.0.1 NO_PROXY=127.0.0.1
# TensorFlow tells a lot about processors and about graphics cards that are not there.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore

say() { printf '\n# %s\n' "$*"; }

show() { printf '$ %s\n' "$*"; }

# Prints a command as one types it, and runs it.
run() {
    local words=() word
    for word in "$@"; do
        case $word in
            *[\ \'\"\;\(]*) words+=("'$word'") ;;
            *) words+=("$word") ;;
        esac
    done
    show "${words[*]}"
    "$@"
}

# The same for what uses TensorFlow: what that writes to stderr is shown only if it fails.
run_tensorflow() {
    run "$@" 2>"$work/stderr" || { cat "$work/stderr" >&2; return 1; }
}

# What the hub was asked for so far.
requests() { grep -c '^GET' "$work/requests.log" || true; }

say "A model with variables and an asset, laid out as a hub has it: PUBLISHER/MODEL/VERSION."
run cd "$work"
run_tensorflow python "$checkout/scripts/demo_model.py" models/google/demo/1

say "A hub of our own, speaking the protocol of tfhub.dev. With a network, leave it and --hub away."
show "hubfs serve models --port 0 &"
hubfs serve models --port 0 >serve.log 2>requests.log &
server=$!
for _ in $(seq 200); do
    url=$(sed -n 's/.*hubfs mount --hub \([^ ]*\).*/\1/p' serve.log)
    [ -z "$url" ] || break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
cat serve.log
[ -n "$url" ] || { cat requests.log >&2; echo "the hub did not start" >&2; exit 1; }

say "Mount it. Nothing is downloaded yet: listing shows what is cached."
run export TFHUB_CACHE_DIR="$work/cache"
run hubfs mount --hub "$url" tfhub
run ls -A tfhub
[ "$(requests)" -eq 0 ] || { echo "listing the mount asked the hub for something" >&2; exit 1; }

say "Load the model by its path. This is its first use, so it is downloaded, while TensorFlow reads."
load='import tensorflow as tf
model = tf.saved_model.load("tfhub/google/demo/1")
print(model(["a handle is a path", "mount and read"]).numpy())'
run_tensorflow python -c "$load" | tee first
say "The hub was asked for:"
cat requests.log

say "It is an ordinary directory."
run ls -l tfhub/google/demo/1 tfhub/google/demo/1/variables
run head -n 3 tfhub/google/demo/1/assets/words.txt

say "Load it again; and by its URL with tensorflow_hub, which has the same cache."
before=$(requests)
run_tensorflow python -c "$load" | tee second
run_tensorflow python -c "import tensorflow_hub as hub
model = hub.load(\"$url/google/demo/1\")
print(model([\"a handle is a path\", \"mount and read\"]).numpy())" | tee third
after=$(requests)
say "Requests for the first load: $before, for these two: $((after - before))."

say "What is mounted, and what is cached."
run hubfs status tfhub
run hubfs ls

say "The end. The cache would stay, for hubfs and for tensorflow_hub; this demo removes it."
run hubfs unmount tfhub

# The line of numbers, which the commands that were printed come before.
results() { grep '^ *\[' "$1"; }
[ "$before" -gt 0 ] && [ "$after" -eq "$before" ] || { echo "a cached model was asked for again" >&2; exit 1; }
[ -n "$(results first)" ] && [ "$(results first)" = "$(results second)" ] && [ "$(results first)" = "$(results third)" ] ||
    { echo "the results differ" >&2; exit 1; }
printf '\nThe demo passed.\n'
