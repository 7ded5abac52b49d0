#!/usr/bin/env bash
# LiteLLM counts answers from its cache as successes of a deployment that is dead.
#
# litellm[proxy] 1.106.12 from PyPI, Python 3.11, one worker, callbacks: [prometheus],
# cache: true with type local.
# Guess: an answer from the cache is a request of the proxy and a hit of the cache; the
# counters of the deployment and those of tokens stand still, as no model was asked.
# Seen: only litellm_llm_api_latency_metric_count stands still.  Each hit adds one to
# litellm_deployment_success_responses_total ("successful LLM API calls") and
# litellm_deployment_total_requests_total, with the deployment's api_base, and its
# tokens once more to litellm_total_tokens_metric_total, with the model gone, too.
#
#   asked once:               calls 1, successes 1, tokens 12, latencies 1
#   twice more:               calls 1, successes 3, tokens 36, latencies 1
#   model ended, five more:   calls 1, successes 8, tokens 96, latencies 1
#
# So a success ratio per deployment, and "tokens flow, so it lives", stay green while a
# model is away, for as long as people ask what was asked before.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q 'litellm[proxy]==1.106.12' prometheus_client

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
model=$(free_port) proxy=$(free_port)

# A model that answers with twelve tokens, and notes each call.
cat >model.py <<'END'
import http.server
import json
import sys

ANSWER = json.dumps({
    "id": "x", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": "yes"}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
}).encode()

class Model(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with open("calls", "a") as file:
            print(self.path, file=file)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Model).serve_forever()
END
cat >config.yaml <<END
model_list:
  - model_name: m
    litellm_params: {model: openai/m, api_base: "http://127.0.0.1:$model/v1", api_key: none}
litellm_settings: {callbacks: [prometheus], cache: true, cache_params: {type: local}}
END
python3 model.py "$model" 2>/dev/null &
server=$!
LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true \
    venv/bin/litellm --config config.yaml --host 127.0.0.1 --port "$proxy" &>proxy.log &

for _ in $(seq 120); do
    curl -sf -m 1 -o /dev/null "localhost:$proxy/health/liveliness" && break
    sleep 1
done

value() {
    curl -sL "localhost:$proxy/metrics" | sed -n "s/^litellm_$1{.*} \([0-9]*\).*/\1/p"
}

state() {
    sleep 3
    echo "calls $(wc -l <calls), successes $(value deployment_success_responses_total)," \
        "tokens $(value total_tokens_metric_total), latencies $(value llm_api_latency_metric_count)"
}

ask() {
    for _ in $(seq "$1"); do
        curl -sf -m 100 -o /dev/null "localhost:$proxy/v1/chat/completions" \
            -H 'Content-Type: application/json' \
            -d '{"model": "m", "messages": [{"role": "user", "content": "well?"}]}'
    done
}

ask 1
once=$(state)
ask 2
hits=$(state)
kill "$server"
wait "$server" || true
ask 5
dead=$(state)

printf 'asked once:               %s\n' "$once"
printf 'twice more:               %s\n' "$hits"
printf 'model ended, five more:   %s\n' "$dead"
[[ $once == 'calls 1, successes 1, tokens 12, latencies 1' ]]
[[ $hits == 'calls 1, successes 3, tokens 36, latencies 1' ]]
[[ $dead == 'calls 1, successes 8, tokens 96, latencies 1' ]]
