#!/usr/bin/env bash
# LiteLLM's proxy keeps asking for a client that has left.
#
# litellm[proxy] 1.106.12 from PyPI, Python 3.11, one worker, callbacks: [prometheus].
# Guess: a client closes its connection while the model has not said a word; the proxy
# drops the request to the model within seconds, and its gauge of requests in flight
# falls back, at least for a stream.
# Seen: neither.  20 s later each of the two clients, one with and one without
# "stream": true, still counts in litellm_in_flight_requests (which counts the scrape,
# too), and the connections to the model are open: it works on for nobody, until it
# answers or request_timeout, here 600 s, has passed.  No counter of the proxy has moved.
#
#   before:            in flight 1, connections to the model 0
#   two clients left:  in flight 3, connections to the model 2
#
# So the gauge says how much the model owes, not how many wait for it: a limit on it
# creeps up with each client that gives up on a model that hangs.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q 'litellm[proxy]==1.106.12' prometheus_client

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
model=$(free_port) proxy=$(free_port)

# A model that takes requests and says nothing; it serves how many wait for it.
cat >model.py <<'END'
import http.server, sys

OPEN = set()

class Model(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        OPEN.add(self)
        self.connection.settimeout(300)
        self.connection.recv(1)
        OPEN.discard(self)

    def do_GET(self):
        text = str(len(OPEN)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Model).serve_forever()
END
cat >config.yaml <<END
model_list:
  - model_name: m
    litellm_params: {model: openai/m, api_base: "http://127.0.0.1:$model/v1", api_key: none}
litellm_settings: {callbacks: [prometheus], request_timeout: 600}
END
python3 model.py "$model" 2>/dev/null &
LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true \
    venv/bin/litellm --config config.yaml --host 127.0.0.1 --port "$proxy" &>proxy.log &

for _ in $(seq 60); do
    curl -sf -m 1 -o /dev/null "localhost:$proxy/health/liveliness" && break
    sleep 1
done

state() {
    local gauge
    gauge=$(curl -sL "localhost:$proxy/metrics" | sed -n 's/^litellm_in_flight_requests \([0-9]*\).*/\1/p')
    echo "in flight $gauge, connections to the model $(curl -s "localhost:$model/")"
}

before=$(state)
for stream in false true; do
    curl -s -m 3 -o /dev/null "localhost:$proxy/v1/chat/completions" \
        -H 'Content-Type: application/json' \
        -d "{\"model\": \"m\", \"stream\": $stream, \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}" || true
done
sleep 20
after=$(state)

printf 'before:            %s\ntwo clients left:  %s\n' "$before" "$after"
[[ $before == 'in flight 1, connections to the model 0' ]]
[[ $after == 'in flight 3, connections to the model 2' ]]
