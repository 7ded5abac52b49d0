#!/usr/bin/env bash
# GuideLLM's mean of output tokens per second can be 60 times what the server did.
#
# guidellm 0.8.1 from PyPI, Python 3.11, and a server that answers with 10 tokens in 2.00
# to 2.03 s, however many come at once.
# Guess: the mean of "Output Tokens, Per Second" in the table of text metrics is tokens
# over the time of the run, give or take a ramp: about 20 for four at a time.
# Seen: only the last table of the same report, "Server Throughput", says so.  For the
# table of text metrics, and metrics.text of the JSON, time runs from the end of the
# first request to the end of the last, while the tokens of all of them are counted.  So
# w waves of requests give w / (w - 1) of the truth, and one wave is divided by the
# 30 ms between its ends (_compile_metric_distributions gives no start_time to
# rate_distribution_from_timings).
#
#                               text metrics, mean   server throughput
#   4 requests, 4 at a time     1198                 19.5
#   8 requests, 4 at a time     38.3                 19.5
#   12 requests, 4 at a time    29.0                 19.5
#
# The same goes for input tokens, words and characters.  As many requests as streams, or
# a minute of long answers at a high concurrency, is an ordinary run.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q 'guidellm==0.8.1'

cat >server.py <<'END'
import asyncio
import itertools
import json

MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
USAGE = {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
turns = itertools.cycle(range(4))

def event(data):
    text = f"data: {data}\n\n"
    return f"{len(text):x}\r\n{text}\r\n".encode()

def chunk(choices, **more):
    return event(json.dumps({"id": "x", "object": "chat.completion.chunk", "created": 1,
                             "model": "m", "choices": choices, **more}))

async def answer(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                 b"Transfer-Encoding: chunked\r\n\r\n")
    await asyncio.sleep(1 + next(turns) / 100)
    for _ in range(10):
        delta = {"role": "assistant", "content": "word "}
        writer.write(chunk([{"index": 0, "delta": delta, "finish_reason": None}]))
        await asyncio.sleep(0.1)
    writer.write(chunk([{"index": 0, "delta": {}, "finish_reason": "length"}]))
    writer.write(chunk([], usage=USAGE) + event("[DONE]") + b"0\r\n\r\n")

async def serve(reader, writer):
    while line := await reader.readline():
        size = 0
        while (header := await reader.readline()).strip():
            if header.lower().startswith(b"content-length:"):
                size = int(header.split(b":")[1])
        await reader.readexactly(size)
        if line.startswith(b"POST"):
            await answer(writer)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(MODELS) + MODELS)
        await writer.drain()
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with open("port", "w") as file:
        print(server.sockets[0].getsockname()[1], file=file)
    await server.serve_forever()

asyncio.run(main())
END
python3 server.py 2>server.log &
for _ in $(seq 100); do
    [[ -s port ]] && break
    sleep 0.1
done
for _ in $(seq 12); do
    echo '{"prompt": "one two three"}'
done >prompts.jsonl

measure() { # requests, at a time
    venv/bin/guidellm run --disable-progress \
        --backend "kind=openai_http,target=http://127.0.0.1:$(<port),model=m" \
        --data kind=json_file,path=prompts.jsonl \
        --profile "kind=concurrent,streams=$2" --constraint "kind=max_requests,count=$1" \
        --output "kind=json,path=$1-$2.json" &>guidellm.log || { tail guidellm.log; exit 1; }
}
measure 4 4
measure 8 4
measure 12 4

python3 - <<'END'
import json
import math

def factor(requests):
    with open(f"{requests}-4.json") as file:
        metrics = json.load(file)["benchmarks"][0]["metrics"]
    tokens = metrics["output_token_count"]["successful"]["total_sum"]
    text = metrics["text"]["tokens"]["output_per_second"]["successful"]["mean"]
    server = metrics["output_tokens_per_second"]["successful"]["mean"]
    print(f"{requests:2} requests, {tokens:g} tokens: {text:.1f} a second, {server:.1f} a second")
    assert 14 < server < 22
    return text / server, math.ceil(round(tokens) / 40)

# The behaviour that was seen.
one, _ = factor(4)
assert one > 10
for requests in 8, 12:
    several, waves = factor(requests)
    assert 0.9 < several / (waves / (waves - 1)) < 1.1
END
