#!/usr/bin/env bash
# llama.cpp's server answers several choices with the usage of one.
#
# xllamacpp 2026.10.11549 from PyPI (llama.cpp's server as a library), Python 3.11.
# Guess: usage says what the request took, as with OpenAI and vLLM: n 4 with 20 tokens
# each has completion_tokens 80, two prompts have the sum of both; a stream with
# include_usage ends with one chunk that says so.
# Seen: usage is that of the first choice.  A stream has a chunk with a usage for each
# choice, each with the tokens of that one, so who keeps the last has a quarter, too.
# The server's own counter, llamacpp:tokens_predicted_total, moves by all of them.
#
#                       completion_tokens       tokens_predicted_total
#   n 4                 20                      +80
#   n 4, stream         20 and 20 and 20 and 20 +80
#   two prompts         20                      +40
#
# So what a gateway adds up from the answers, for budgets and tokens per second, is less
# than what the model does, by a factor of n: to compare the two shows a leak that is none.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q 'xllamacpp==2026.10.11549' 'gguf==0.19.0'

# One layer of random weights; a token for each byte.
cat >model.py <<'END'
import gguf
import numpy as np

visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
hidden = [byte for byte in range(256) if byte not in visible]
words = [chr(c) for c in visible] + [chr(256 + n) for n in range(len(hidden))]
words += ["ab", "<end>"]
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_context_length(8192)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(32)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(32)
writer.add_vocab_size(len(words))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(words)
writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
writer.add_token_merges(["a b"])
writer.add_eos_token_id(257)
shapes = {"token_embd": (258, 32), "output": (258, 32), "output_norm": (32,),
          "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
for name in "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down":
    shapes[f"blk.0.{name}"] = (32, 32)
normal = np.random.default_rng(1).normal
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", normal(size=shape).astype("f4"))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
END
cat >serve.py <<'END'
import json
import re
import urllib.request
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = "tiny.gguf", 0, 8192, 4
params.cpuparams.n_threads, params.endpoint_metrics = 1, True
server = xllamacpp.Server(params)

def fetch(path, body=None):
    request = urllib.request.Request(
        server.listening_address + path, body and json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    return urllib.request.urlopen(request).read().decode(errors="replace")

def counter():
    return int(re.search(r"^llamacpp:tokens_predicted_total (\d+)$", fetch("/metrics"), re.M)[1])

def ask(**more):
    before = counter()
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": True, **more}
    usages = re.findall(r'"completion_tokens":(\d+)', fetch("/v1/completions", body))
    return usages, counter() - before

seen = {
    "n 4": ask(n=4),
    "n 4, stream": ask(n=4, stream=True, stream_options={"include_usage": True}),
    "two prompts": ask(prompt=[[5, 6, 7], [8, 9]]),
}
for name, (usages, more) in seen.items():
    print(f"{name:20}{' and '.join(usages):24}+{more}")
raise SystemExit(seen != {
    "n 4": (["20"], 80),
    "n 4, stream": (["20"] * 4, 80),
    "two prompts": (["20"], 40),
})
END
venv/bin/python3 model.py
timeout 400 venv/bin/python3 serve.py 2>server.log || { code=$?; tail -n 5 server.log; exit $code; }
