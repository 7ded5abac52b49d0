#!/usr/bin/env bash
# genai-bench's error rate is 0 whatever fails, and a warm-up lowers its throughput.
#
# genai-bench 0.0.5 from PyPI (of the SGLang project), Python 3.11, and a server that
# answers with 10 tokens in 1 s, however many come at once.
# Guess: with two of three requests answered by a 503, error_rate is about 0.67, and the
# warning about 0.5 and more is logged.  A warm-up and a cool-down of a quarter each
# leave the mean throughput what it was, or raise it a little: they are cut off the run.
# Seen: error_rate is 0, beside the right num_error_requests and num_requests, in the
# same JSON, and nothing warns (aggregate_metrics_data divides before it has counted
# num_requests).  The throughputs in tokens are halved: the tokens of the warm-up and of
# the cool-down are left out, their time is not; requests_per_second leaves out neither.
#
#                             errors     error_rate   tokens/s   requests/s
#   two of three are 503      14 of 22   0            37.8       3.8
#   all are answered          0 of 16    0            31.3       3.1
#   the same, a warm-up and
#   a cool-down of 0.25       0 of 16    0            15.7       3.1
#
# So a check that a benchmark had no errors takes num_error_requests, and throughputs of
# runs with other ratios, or of other tools, do not compare.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q 'genai-bench==0.0.5'

# A token for each byte.
cat >tokenizer.py <<'END'
import json
import os
import tokenizers

letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
words = {letter: n for n, letter in enumerate([*letters, "<end>"])}
tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = tokenizers.decoders.ByteLevel()
os.mkdir("tokenizer")
tokenizer.save("tokenizer/tokenizer.json")
with open("tokenizer/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}, file)
END
cat >server.py <<'END'
import asyncio
import itertools
import json

USAGE = {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
turns = itertools.cycle([False, True, True])

def event(data):
    text = f"data: {data}\n\n"
    return f"{len(text):x}\r\n{text}\r\n".encode()

def chunk(choices, **more):
    return event(json.dumps({"id": "x", "object": "chat.completion.chunk", "created": 1,
                             "model": "m", "choices": choices, **more}))

async def answer(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                 b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(10):
        await asyncio.sleep(0.1)
        delta = {"role": "assistant", "content": "word "}
        writer.write(chunk([{"index": 0, "delta": delta, "finish_reason": None}]))
    writer.write(chunk([{"index": 0, "delta": {}, "finish_reason": "length"}]))
    writer.write(chunk([], usage=USAGE) + event("[DONE]") + b"0\r\n\r\n")

async def serve(reader, writer):
    size = 0
    while (header := await reader.readline()).strip():
        if header.lower().startswith(b"content-length:"):
            size = int(header.split(b":")[1])
    body = await reader.readexactly(size)
    if b'"some"' in body and next(turns):
        writer.write(REFUSAL)
    else:
        await answer(writer)
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with open("port", "w") as file:
        print(server.sockets[0].getsockname()[1], file=file)
    await server.serve_forever()

asyncio.run(main())
END
HF_HUB_OFFLINE=1 venv/bin/python3 tokenizer.py
python3 server.py 2>server.log &
for _ in $(seq 100); do
    [[ -s port ]] && break
    sleep 0.1
done

measure() { # the folder of the results, the model, more options
    HF_HUB_OFFLINE=1 venv/bin/genai-bench benchmark --api-backend openai --api-key none \
        --api-base "http://127.0.0.1:$(<port)" --api-model-name "$2" --model m \
        --model-tokenizer "$PWD/tokenizer" --task text-to-text \
        --traffic-scenario 'D(20,10)' --num-concurrency 4 --max-time-per-run 1 \
        --max-requests-per-run 16 --experiment-base-dir "$PWD" --log-dir "$PWD" \
        --experiment-folder-name "$1" "${@:3}" &>"$1.log" || { tail "$1.log"; exit 1; }
}
measure refused some
measure all whole
measure warmed whole --warmup-ratio 0.25 --cooldown-ratio 0.25

cat >results.py <<'END'
import glob
import json

def read(folder):
    (name,) = glob.glob(f"{folder}/D20_10_*.json")
    with open(name) as file:
        got = json.load(file)["aggregated_metrics"]
    tokens = got["mean_output_throughput_tokens_per_s"]
    print(f"{folder:8} errors {got['num_error_requests']} of {got['num_requests']},"
          f" error_rate {got['error_rate']}, {tokens:.1f} tokens/s,"
          f" {got['requests_per_second']:.1f} requests/s")
    return got, tokens / got["requests_per_second"]

refused, _ = read("refused")
_, each = read("all")
_, each_warmed = read("warmed")
# The behaviour that was seen.
assert 0.6 < refused["num_error_requests"] / refused["num_requests"] < 0.75
assert refused["error_rate"] == 0
assert 9.9 < each < 10.1 and 4.5 < each_warmed < 5.5
END
python3 results.py
grep -q 'Error code: 503' genai_bench.log
if grep -q 'Error rate [0-9]' genai_bench.log; then
    exit 1
fi
