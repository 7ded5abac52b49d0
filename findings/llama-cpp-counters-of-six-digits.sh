#!/usr/bin/env bash
# llama.cpp's server writes its counters with six digits.
#
# xllamacpp 2026.10.11549 from PyPI (llama.cpp's server as a library), Python 3.12.
# Guess: llamacpp:prompt_tokens_total rises by the tokens of each prompt, for ever.
# Seen: up to 999,999 it does.  Above a million it is written as 1.00096e+06, so it moves
# in steps of ten, and above ten million in steps of a hundred: after a request of one
# token it stands still.  n_decode_total, the only counter that moves with each step of
# the engine, is written by the same line (server_task_result_metrics::to_metrics streams
# doubles with the default precision).
#
#   after 251 prompts of 4,000 tokens:        llamacpp:prompt_tokens_total 1.004e+06
#   after four more of one token, each once:  the same text four times
#
# So "requests run and no counter moves" is no sign of a hang on a server that is old
# and slow, and rate() of a small flow is 0 for a while and then too high.
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
import re
import urllib.request
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = "tiny.gguf", 0, 8192, 1
params.cpuparams.n_threads, params.endpoint_metrics = 1, True
server = xllamacpp.Server(params)

def ask(count):
    server.handle_completions({
        "prompt": [5 + n % 200 for n in range(count)], "max_tokens": 1,
        "cache_prompt": False})

def counter():
    url = f"{server.listening_address}/metrics"
    page = urllib.request.urlopen(url).read().decode()
    return re.search(r"^llamacpp:prompt_tokens_total (\S+)$", page, re.M)[1]

for _ in range(251):
    ask(4000)
texts = [counter()]
print("after 251 prompts of 4,000 tokens:", texts[0])
for _ in range(4):
    ask(1)
    texts.append(counter())
print("after four more of one token:", *texts[1:])
raise SystemExit(set(texts) != {"1.004e+06"})
END
venv/bin/python3 model.py
timeout 400 venv/bin/python3 serve.py 2>server.log || { code=$?; tail -n 5 server.log; exit $code; }
