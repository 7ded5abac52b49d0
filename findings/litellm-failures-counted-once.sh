#!/usr/bin/env bash
# LiteLLM counts one failure a request, whatever its retries and fallbacks ran into.
#
# litellm[proxy] 1.106.12 from PyPI, Python 3.11, one worker, callbacks: [prometheus].
# Guess: litellm_deployment_failure_responses_total, by its HELP the number of failed
# calls to a deployment, rises by one for each call that a deployment answers with 503.
# With the fallback a -> b and both of them failing, both have failures.
# Seen: of a request only the first failed call counts.  Two retries more for a (that is
# the default), then three calls to b, and the only series is a's, at 1: b, which failed
# whenever it was needed, has no failure, no litellm_deployment_state and no total.  A
# request that succeeds with its third call counts one failure.  The callback is gated
# by a flag that the retries and fallbacks of a request share (should_run_logging in
# litellm_core_utils/litellm_logging.py).
#
#   three requests, a and b fail:   calls a 9 b 9, failures a 3 b none, state a 1 b none
#   one request straight to b:      calls a 9 b 12, failures a 3 b 1, state a 1 b 1
#
# So an alert on a deployment's failures is blind for those that stand in for others,
# and sees a third of what the first ones get: look at the model servers themselves.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q 'litellm[proxy]==1.106.12' prometheus_client

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
a=$(free_port) b=$(free_port) proxy=$(free_port)

# A model that is overloaded; it serves how many calls it got.
cat >model.py <<'END'
import http.server
import sys

calls = []

class Model(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        calls.append(self.path)
        self.answer(503, b'{"error": {"message": "overloaded"}}')

    def do_GET(self):
        self.answer(200, str(len(calls)).encode())

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Model).serve_forever()
END
cat >config.yaml <<END
model_list:
  - model_name: a
    litellm_params: {model: openai/m, api_base: "http://127.0.0.1:$a/v1", api_key: none}
  - model_name: b
    litellm_params: {model: openai/m, api_base: "http://127.0.0.1:$b/v1", api_key: none}
litellm_settings: {callbacks: [prometheus], fallbacks: [{a: [b]}]}
END
python3 model.py "$a" 2>/dev/null &
python3 model.py "$b" 2>/dev/null &
LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true \
    venv/bin/litellm --config config.yaml --host 127.0.0.1 --port "$proxy" &>proxy.log &

for _ in $(seq 120); do
    curl -sf -m 1 -o /dev/null "localhost:$proxy/health/liveliness" && break
    sleep 1
done

value() {
    local number
    number=$(curl -sL "localhost:$proxy/metrics" \
        | sed -n "s/^litellm_deployment_$1{.*127.0.0.1:$2\/.*} \([0-9]*\).*/\1/p")
    echo "${number:-none}"
}

state() {
    sleep 3
    echo "calls a $(curl -s "localhost:$a/") b $(curl -s "localhost:$b/")," \
        "failures a $(value failure_responses_total "$a") b $(value failure_responses_total "$b")," \
        "state a $(value state "$a") b $(value state "$b")"
}

ask() {
    curl -s -m 100 -o /dev/null "localhost:$proxy/v1/chat/completions" \
        -H 'Content-Type: application/json' \
        -d "{\"model\": \"$1\", \"messages\": [{\"role\": \"user\", \"content\": \"$2\"}]}"
}

for text in one two three; do
    ask a "$text"
done
fallback=$(state)
ask b four
direct=$(state)

echo "three requests, a and b fail:   $fallback"
echo "one request straight to b:      $direct"
[[ $fallback == 'calls a 9 b 9, failures a 3 b none, state a 1 b none' ]]
[[ $direct == 'calls a 9 b 12, failures a 3 b 1, state a 1 b 1' ]]
