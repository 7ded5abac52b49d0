#!/usr/bin/env python3
"""Measures health_check.py against others, on this machine, in one run.

    .ci/benchmark.py                   the whole table; a quarter of an hour
    .ci/benchmark.py --short           one quick round of each row: does it all run?
    .ci/benchmark.py --only 'peak|idle' --python ~/.pyenv/versions/3.8.18/bin/python3
    .ci/benchmark.py --markdown        the short table of the README

Both sides of a row are measured in turn, in several rounds; the row has the medians,
the median of the rounds' ratios, and how far apart these were.  The other sides are
built from Debian's packages golang-go, golang-github-prometheus-common-dev and
nginx-light, and prometheus_client from PyPI; rows of one that is missing are left out
and named.  No figure makes this fail: only what cannot run, or answers wrongly, does.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.server
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from importlib.machinery import SourcelessFileLoader
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence, TypeVar

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "health_check.py"
ORIGINAL = "Go program"
# Of this repository; a clone that is shallow may lack it.
BEFORE, BUILD_BEFORE = "build before", "ebc540e"
GO = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "CGO_ENABLED": "0"}
KB, MB = 1000, 1000000
MIB = 1048576
FOUR_NAMES = (
    "vllm:num_requests_waiting", "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total",
)
# The deadline is far away: a machine that stalls makes no answer wrong.
CHECKED = {
    "METRIC_TO_CHECK": "tgi_queue_size", "METRIC_THRESHOLD": "10",
    "METRICS_TIMEOUT": "9",
}  # fmt: skip
NGINX = """
daemon off; master_process off; worker_processes 1;
pid {dir}/nginx.pid; error_log {dir}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on;
  types {{ }} default_type "text/plain; version=0.0.4";
  client_body_temp_path {dir}/t; proxy_temp_path {dir}/t; fastcgi_temp_path {dir}/t;
  uwsgi_temp_path {dir}/t; scgi_temp_path {dir}/t;
  server {{ listen 127.0.0.1:{port} backlog=1024; root {dir}; }}
}}
"""


class MissingError(Exception):
    """A tool that a row needs is not there; the text names it."""


class WrongError(Exception):
    """Something did not run or answered wrongly."""


class Limit(NamedTuple):
    """A row's target: ``ours`` or the ``ratio``, and what it may or must be."""

    of: str
    op: str
    number: float

    def __str__(self) -> str:
        return f"{self.of} {self.op} {self.number:g}"


class Row(NamedTuple):
    """A line of the table; ``spread`` is of the rounds, as a share of their median."""

    what: str
    unit: str
    ours: float
    against: str
    other: float | None
    ratio: float | None
    spread: float
    limit: Limit | None

    @property
    def verdict(self) -> str:
        """Whether the target is met, empty if there is none."""
        if not self.limit:
            return ""
        number = self.ours if self.limit.of == "ours" else self.ratio
        assert number is not None
        low = self.limit.op == "<="
        met = number <= self.limit.number if low else number >= self.limit.number
        return "met" if met else "MISSED"


def row(
    what: str, unit: str, ours: Sequence[float], limit: Limit | None, *against: Any
) -> Row:
    """Return the row of some rounds; ``against`` is a name and its rounds."""
    name, other = against or ("", ())
    ratios = [one / two for one, two in zip(ours, other) if two]
    rounds, middle = ratios or ours, statistics.median
    spread = (max(rounds) - min(rounds)) / abs(middle(rounds) or 1)
    return Row(
        what, unit, middle(ours), name, middle(other) if other else None,
        middle(ratios) if ratios else None, spread, limit,
    )


# --- What is measured, and with what -------------------------------------------------


class Bench:
    """The directory of one run: what was built, what is served, how often, how long."""

    def __init__(self, directory: str, python: str, short: bool) -> None:
        self.dir, self.python, self.short = Path(directory), python, short
        self.rounds = 1 if short else 5
        self.seconds = 0.4 if short else 3.0
        version = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
        self.version = output([python, "-I", "-c", version]).strip()
        self.old = self.version.startswith("3.8.")
        self.bytecode = str(self.dir / "health_check.pyc")
        compiled = "import py_compile, sys; py_compile.compile(*sys.argv[1:3])"
        output([python, "-I", "-c", compiled, str(PROGRAM), self.bytecode])
        self._tools: dict[str, str] = {}

    def tool(self, name: str) -> str:
        """Return the path of a Go program beside this file, built if need be."""
        if name not in self._tools:
            if not shutil.which("go"):
                raise MissingError("go, which Debian's golang-go has")
            source, binary = HERE / "benchmark" / f"{name}.go", self.dir / name
            cache = {"GOCACHE": str(self.dir / "go-cache")}
            command = ["go", "build", "-o", str(binary), str(source)]
            output(command, {**os.environ, **GO, **cache})
            self._tools[name] = str(binary)
        return self._tools[name]

    def body(self, size: int) -> Path:
        """Return a file of about ``size`` bytes of metrics."""
        path = self.dir / f"{size}.txt"
        if not path.exists():
            path.write_text(exposition(size))
        return path

    def child(self, name: str, *arguments: object, python: str = "") -> Any:
        """Return what a function of this file gives in a process of its own."""
        command = [python or self.python, "-I", "-B", __file__, "--child", name]
        return json.loads(output([*command, *map(str, arguments)]))

    @contextlib.contextmanager
    def nginx(self, *sizes: int) -> Iterator[list[str]]:
        """Serve bodies of these sizes; give their URLs."""
        path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if not path:
            raise MissingError("nginx, which Debian's nginx-light has")
        port, config = free_port(), self.dir / "nginx.conf"
        config.write_text(NGINX.format(dir=self.dir, port=port))
        urls = [f"http://127.0.0.1:{port}/{self.body(size).name}" for size in sizes]
        with Process([path, "-c", str(config)], port) as process:
            process.wait_for(urls[0][len(f"http://127.0.0.1:{port}") :])
            yield urls

    @contextlib.contextmanager
    def ours(
        self, url: str, source: bool = False, **settings: str
    ) -> Iterator[Process]:
        """Run health_check.py, from byte-code unless ``source``, until it answers."""
        file = str(PROGRAM) if source else self.bytecode
        command = [self.python, "-I", "-B", "-u", file]
        with checker(command, {"METRICS_ENDPOINT": url, **CHECKED, **settings}) as it:
            yield it

    @contextlib.contextmanager
    def build(self, file: str, url: str, **settings: str) -> Iterator[Process]:
        """Run some build with no settings but these until it answers."""
        command = [self.python, "-I", "-B", "-u", file]
        with checker(command, {"METRICS_ENDPOINT": url, **settings}) as it:
            yield it

    def before(self, bytecode: bool = True) -> str:
        """Return the file of the build before, whose source is in the history."""
        source = self.dir / "before.py"
        if not source.exists():
            command = ["git", "-C", str(HERE), "show"]
            try:
                source.write_text(output([*command, f"{BUILD_BEFORE}:health_check.py"]))
            except WrongError:
                raise MissingError(f"{BUILD_BEFORE} in this clone") from None
            compiled = "import py_compile, sys; py_compile.compile(*sys.argv[1:3])"
            names = str(source), f"{source}c"
            output([self.python, "-I", "-c", compiled, *names])
        return f"{source}c" if bytecode else str(source)

    @contextlib.contextmanager
    def original(self, url: str) -> Iterator[Process]:
        """Run the Go program until it answers."""
        settings = {"METRICS_ENDPOINT": url, **CHECKED}
        with checker([self.tool("original")], settings) as it:
            yield it

    def load(self, process: Process, *options: object, **load: object) -> Any:
        """Send probes; return what ``load.go`` says of them."""
        flags = [f"-{name}={value}" for name, value in load.items()]
        address = f"127.0.0.1:{process.port}"
        command = [self.tool("load"), *flags, *map(str, options), address, "/health"]
        result = json.loads(output(command))
        if result["wrong"]:
            share = f"{result['wrong']} of {result['requests']}"
            raise WrongError(f"{share} answers are wrong, the first: {result['first']}")
        return result


class Process:
    """A server that runs while its block does."""

    def __init__(
        self, command: Sequence[str], port: int, environ: dict[str, str] | None = None
    ) -> None:
        self.command, self.port, self.started = command, port, time.monotonic()
        with tempfile.TemporaryFile() as nothing:
            self._popen = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=nothing,
            )
        self.pid = self._popen.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.terminate()
        self._popen.communicate()

    def wait_for(self, path: str) -> float:
        """Return how many seconds after its start it answered 200."""
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        while time.monotonic() < self.started + 30 and self._popen.poll() is None:
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.settimeout(5)
                sock.connect(("127.0.0.1", self.port))
                sock.sendall(request.encode())
                if sock.recv(100).startswith(b"HTTP/1.1 200 "):
                    return time.monotonic() - self.started
            time.sleep(0.0005)
        raise WrongError(f"no answer from {' '.join(self.command)}")

    def finish(self) -> bytes:
        """Close its input and return its output."""
        return self._popen.communicate(timeout=30)[0]

    def memory(self, field: str = "VmRSS") -> float:
        """Return the MiB it occupies, or with ``VmHWM`` the most it has occupied."""
        return memory(str(self.pid), field)

    def cpu(self) -> float:
        """Return the CPU seconds of all its threads, to the nanosecond."""
        # What clock_getcpuclockid(3) returns for another process on Linux.
        return time.clock_gettime((~self.pid << 3) | 2)


@contextlib.contextmanager
def checker(command: Sequence[str], settings: dict[str, str]) -> Iterator[Process]:
    """Run a health checker on a port of its own until it answers 200."""
    port = free_port()
    environ = {"PATH": os.environ["PATH"], "APP_PORT": str(port), **settings}
    with Process(command, port, environ) as process:
        process.wait_for("/health")
        yield process


def memory(pid: str, field: str) -> float:
    """Return a figure of a process' memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"{field}:\s*(\d+) kB", status)
    assert match
    return int(match[1]) / 1024


def output(command: Sequence[str], environ: dict[str, str] | None = None) -> str:
    """Return what a command prints."""
    try:
        return subprocess.run(
            command, env=environ, check=True, timeout=600, capture_output=True,
            text=True,
        ).stdout
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", "") or ""
        raise WrongError(f"{' '.join(command)}: {error}\n{said[-2000:]}") from None


def free_port() -> int:
    """Return a port outside the ephemeral range, where a poll can meet itself."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def exposition(size: int) -> str:
    """Return about ``size`` bytes of metrics as vLLM has them, the wanted ones amid."""
    model = 'model_name="meta-llama/Llama-3.1-8B-Instruct"'
    wanted = ["# TYPE tgi_queue_size gauge", "tgi_queue_size 3"]
    for name in FOUR_NAMES:
        wanted += [f"# HELP {name} What it is.", f"# TYPE {name} gauge"]
        wanted += [f'{name}{{engine="{n}",{model}}} {n}.0' for n in range(3)]
    histograms = (
        "time_to_first_token_seconds", "e2e_request_latency_seconds",
        "request_prompt_tokens", "inter_token_latency_seconds",
    )
    part = (size - sum(map(len, wanted))) // len(histograms)
    parts = [histogram(f"vllm:{name}", part, model) for name in histograms]
    return "\n".join([*parts[0], *parts[1], *wanted, *parts[2], *parts[3], ""])


def histogram(name: str, size: int, model: str) -> list[str]:
    """Return the lines of about ``size`` bytes of buckets."""
    lines = [f"# HELP {name} Histogram of it.", f"# TYPE {name} histogram"]
    written = at = 0
    while written < size:
        labels = f'engine="{at // 600}",le="{at % 600 / 8}",{model}'
        lines.append(f"{name}_bucket{{{labels}}} {at * 7919 % 100003}.0")
        written, at = written + len(lines[-1]) + 1, at + 1
    return lines


def in_turn(rounds: int, *sides: Callable[[], T]) -> list[list[T]]:
    """Return what each side gives in each round; every other round goes backwards."""
    results: list[list[T]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides))
        for side in order if number % 2 == 0 else reversed(order):
            results[side].append(sides[side]())
    return results


# --- In a process of its own ---------------------------------------------------------


def program() -> Any:
    """Return health_check.py as a module."""
    sys.path.insert(0, str(PROGRAM.parent))
    import health_check  # noqa: PLC0415

    return health_check


def monitor_of(path: str, url: str, rules: str) -> Any:
    """Return the Monitor of a build, from byte-code, its workers started."""
    module = SourcelessFileLoader("health_check", path).load_module()
    environ = {"METRICS_ENDPOINT": url, "METRICS_TIMEOUT": "9", "UNHEALTHY_WHEN": rules}
    monitor = module.Monitor(module.load_config(environ))
    # The build before had the workers' methods in its Monitor.
    before = hasattr(monitor, "start_workers")
    (monitor.start_workers if before else monitor.scraper.start)()
    return monitor


def wanted_names(module: Any, which: str) -> set[str]:
    """Return four names, or those of the default rules."""
    if which == "4 names":
        return set(FOUR_NAMES)
    rules = module.load_config({}).rules
    return {s.name for rule in rules for s in module.find_selectors(rule.expr)}


def reader(module: Any, which: str) -> Callable[[Callable[[memoryview], int]], int]:
    """Return a function that reads a body and returns how many samples it has."""
    form = module.format_for(wanted_names(module, which), (("instance", "h:1"),))
    known: dict[bytes, Any] = {}

    def read(readinto: Callable[[memoryview], int]) -> int:
        # The build before had a field more.
        values = {"content_type": "text/plain", "framed": True, "readinto": readinto}
        stream = module.Stream(*(values[field] for field in module.Stream._fields))
        reading = module.read_samples(stream, form, known)
        known.update(reading.series)
        return len(reading.samples)

    return read


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of a piece of work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def child_scan(file: str, which: str, count: str) -> dict[str, list[float]]:
    """Read a body from memory, and count its lines in turn."""
    read, body = reader(program(), which), Path(file).read_bytes()
    if read(io.BytesIO(body).readinto) < len(FOUR_NAMES) * 3:
        raise WrongError("there are more samples")
    ours, newlines = in_turn(
        int(count), lambda: timed(lambda: read(io.BytesIO(body).readinto)),
        lambda: timed(lambda: body.count(b"\n")),
    )
    return {"ours": ours, "count": newlines}


def child_client(file: str, count: str) -> list[float]:
    """Read a body with prometheus_client."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

    body = Path(file).read_bytes()
    return [
        timed(lambda: list(text_string_to_metric_families(body.decode())))
        for _ in range(int(count))
    ]


def child_sizes(count: str, *files: str) -> list[list[float]]:
    """Return for each file, read in chunks, the seconds and the peak memory so far."""
    read, results = reader(program(), "4 names"), []
    for file in files:
        seconds = []
        for _ in range(max(2, int(count) * MB // Path(file).stat().st_size)):
            with open(file, "rb", buffering=0) as raw:
                seconds.append(timed(lambda: read(raw.readinto)))
        results.append([statistics.median(seconds), memory("self", "VmHWM")])
    return results


def child_rules(url: str, rules: str, points: str) -> list[float]:
    """Return the seconds of checks whose ranges are full."""
    module = program()
    environ = {"METRICS_ENDPOINT": url, "METRICS_TIMEOUT": "9", "UNHEALTHY_WHEN": rules}
    # These stand beside rules of one's own, which they did not in the build before.
    environ["WITHOUT_RULES"] = "Stalling,Stalled,Unanswered,Failing,NoModel"
    now = 1000.0
    monitor = module.Monitor(
        module.load_config(environ), clock=lambda: now, wall=lambda: now
    )
    monitor.scraper.start()
    seconds = []
    for _ in range(int(points) + 30):
        now += 1.0
        seconds.append(timed(monitor.check))
    own = [s for s in monitor.verdict.rules if not s.rule.builtin]
    if monitor.verdict.reason or not all(s.matched for s in own):
        raise WrongError(f"the rules find no series: {monitor.verdict.reason}")
    return seconds[int(points) :]


def child_alerts(count: str) -> list[float]:
    """Return the seconds that ?verbose of a rule takes of which so many series fire."""
    module, seconds = program(), []

    def said(verdict: Any) -> str:
        # A body is a text, or the parts of one.
        return "".join(module.answer_health(verdict, "verbose").body)

    (rule,) = module.parse_rules("Q: q > 0")
    alerts = tuple(
        module.Alert((("__name__", "q"), ("n", str(n))), 1.0, 0.0, 0.0)
        for n in range(int(count))
    )
    for number in range(5):
        status = module.RuleStatus(rule, alerts, "", number, 1.0, 0.0)
        verdict = module.Verdict(1, "", 1.0, 1.0, (status,))
        seconds.append(timed(partial(said, verdict)))
    return seconds


def child_firing(path: str, url: str) -> list[float]:
    """Return the seconds of the first check in which ten rules fire, and the next."""
    monitor = monitor_of(path, url, "\n".join(f"R{n}: q > {n}" for n in range(10)))
    seconds = [timed(monitor.check) for _ in range(3)]
    if sum(len(status.alerts) for status in monitor.verdict.rules) < 10 * 4900:
        raise WrongError(f"they do not fire: {monitor.verdict.reason}")
    return seconds[1:]


# A process of its own without what this file imports: prints the most MiB that a build
# occupies in checks, a second apart, of a range.
RANGES = """
import re, sys
from importlib import machinery
path, url, seconds, checks = sys.argv[1:]
module = machinery.SourcelessFileLoader("health_check", path).load_module()
rules = f"R: rate(m_total[{seconds}s]) > 1e9"
environ = {"METRICS_ENDPOINT": url, "METRICS_TIMEOUT": "9", "UNHEALTHY_WHEN": rules}
now = 1000.0
config = module.load_config(environ)
monitor = module.Monitor(config, clock=lambda: now, wall=lambda: now)
# The build before had the workers' methods in its Monitor.
before = hasattr(monitor, "start_workers")
(monitor.start_workers if before else monitor.scraper.start)()
for _ in range(int(checks)):
    now += 1.0
    monitor.check()
assert not monitor.verdict.reason and monitor.verdict.rules[0].matched
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


# --- The rows ------------------------------------------------------------------------


def rows_scan(bench: Bench) -> Iterator[Row]:
    """Reading the wanted metrics, for each size and set of names."""
    for size, count in ((MB, 40), (10 * MB, 6)):
        for which in ("4 names", "default names"):
            yield from scan(bench, size, which, 2 if bench.short else count)


def scan(bench: Bench, size: int, which: str, count: int) -> Iterator[Row]:
    """Reading the wanted metrics out of one body, against three others."""
    file, middle, lacking = bench.body(size), statistics.median, ""
    megabytes = file.stat().st_size / MB
    sides: dict[str, list[float]] = {"ours": [], "count": [], "client": [], "go": []}
    for _ in range(bench.rounds):
        both = bench.child("scan", file, which, count)
        sides["ours"].append(middle(both["ours"]))
        sides["count"].append(middle(both["count"]))
        with contextlib.suppress(MissingError):
            lines = output([bench.tool("expfmt"), str(file), str(min(count, 9))])
            sides["go"].append(middle(map(float, lines.split())))
        try:
            client = bench.child("client", file, 1, python=sys.executable)
            sides["client"].append(middle(client))
        except WrongError as error:
            lacking = str(error)
    speed = {side: [megabytes / s for s in sides[side]] for side in sides}
    what, ours = f"read {size // MB} MB, {which}", speed["ours"]
    least = Limit("ours", ">=", 900 if bench.old else 1000)
    yield row(what, "MB/s", ours, least)
    if speed["go"]:
        times = Limit("ratio", ">=", 20)
        yield row(what, "MB/s", ours, times, "expfmt", speed["go"])
    if speed["client"]:
        times = Limit("ratio", ">=", 150)
        yield row(what, "MB/s", ours, times, "prometheus_client", speed["client"])
    milliseconds = [[s * 1000 for s in sides[side]] for side in ("ours", "count")]
    most = Limit("ratio", "<=", 2.5)
    yield row(what, "ms", milliseconds[0], most, 'count(b"\\n")', milliseconds[1])
    if not speed["go"]:
        raise MissingError("go and Debian's golang-github-prometheus-common-dev")
    if lacking:
        raise MissingError(f"prometheus_client in {sys.executable}")


def rows_size(bench: Bench) -> Iterator[Row]:
    """What a byte costs, and how much memory, as a body grows."""
    sizes = [100 * KB, MB, 10 * MB, 10 * MB if bench.short else 100 * MB]
    files = [bench.body(size) for size in sizes]
    speeds: list[list[float]] = [[] for _ in sizes]
    growth = []
    for _ in range(bench.rounds):
        results = bench.child("sizes", 2 if bench.short else 30, *files)
        for file, speed, (seconds, _) in zip(files, speeds, results):
            speed.append(file.stat().st_size / MB / seconds)
        growth.append((results[-1][1] - results[0][1]) * 1024)
    for size, speed in zip(sizes, speeds):
        limit = Limit("ratio", ">=", 0.8) if size > MB else None
        what = f"read {size / MB:g} MB from a file"
        yield row(what, "MB/s", speed, limit, "1 MB", speeds[1])
    name = f"peak memory, {sizes[-1] // MB} MB over 0.1 MB"
    yield row(name, "KiB", growth, Limit("ours", "<=", 256))


def rows_latency(bench: Bench) -> Iterator[Row]:
    """One client, one probe after the other."""
    for size, most, old in ((MB, 0.5, 0.75), (10 * KB, 1.4, 1.7)):
        limit = Limit("ratio", "<=", old if bench.old else most)
        yield from against(bench, size, 1, "p50", limit)


def rows_throughput(bench: Bench) -> Iterator[Row]:
    """Sixteen clients, as fast as they can."""
    for size, least in ((MB, 5), (10 * KB, 1)):
        limit = Limit("ratio", ">=", least)
        yield from against(bench, size, 16, "rate", limit)


def against(
    bench: Bench, size: int, clients: int, figure: str, limit: Limit
) -> Iterator[Row]:
    """Put the same load on both, in turn."""
    unit = "1/s" if figure == "rate" else "ms"
    with bench.nginx(size) as (url,), bench.ours(url) as one, bench.original(
        url
    ) as two:

        def measure(process: Process) -> float:
            result = bench.load(process, clients=clients, seconds=bench.seconds)
            result["rate"] = result["requests"] / result["seconds"]
            return float(result[figure])

        measure(one), measure(two)
        sides = in_turn(bench.rounds, lambda: measure(one), lambda: measure(two))
    who = "1 client" if clients == 1 else f"{clients} clients"
    what = f"/health, {who}, {size / MB:g} MB, {figure}"
    yield row(what, unit, sides[0], limit, ORIGINAL, sides[1])


def rows_storm(bench: Bench) -> Iterator[Row]:
    """How many of a thousand probes a second reach the metrics server."""
    figures: dict[str, list[list[float]]] = {"total": [[], []], "most": [[], []]}
    for _ in range(min(bench.rounds, 3)):
        for side, run in enumerate((bench.ours, bench.original)):
            counts = storm(bench, run)
            counts["total"] /= bench.seconds
            for name, sides in figures.items():
                sides[side].append(counts[name])
    what, (ours, other) = "scrapes at 1,000 probes/s", figures["total"]
    yield row(what, "1/s", ours, None, ORIGINAL, other)
    what, (ours, other) = "scrapes at a time, meanwhile", figures["most"]
    yield row(what, "", ours, Limit("ours", "<=", 1), ORIGINAL, other)


def storm(bench: Bench, run: Callable[[str], Any]) -> Any:
    """Count the scrapes that a storm of probes causes."""
    port, file = free_port(), str(bench.body(10 * KB))
    command = [bench.tool("load"), "-serve", file, f"127.0.0.1:{port}"]
    with Process(command, port) as metrics:
        metrics.wait_for("/")
        with run(f"http://127.0.0.1:{port}/") as process:
            bench.load(process, rate=1000, seconds=bench.seconds)
        return json.loads(metrics.finish())


def rows_hang(bench: Bench) -> Iterator[Row]:
    """Answers from memory while the metrics server does not answer."""
    body, p99 = bench.body(10 * KB).read_bytes(), []
    for _ in range(min(bench.rounds, 3)):
        hang = threading.Event()
        answers = metrics_server(lambda: body, hang)
        with answers as url, bench.ours(
            url, SCRAPE_INTERVAL="1", METRICS_TIMEOUT="0.8"
        ) as process:
            hang.set()
            load = {"seconds": 1.2 if bench.short else 5.0, "pause": "2ms"}
            p99.append(bench.load(process, "-either", **load)["p99"])
    what = "/health, 1 client, metrics server hangs, p99"
    yield row(what, "ms", p99, Limit("ours", "<=", 2))


@contextlib.contextmanager
def metrics_server(
    body: Callable[[], bytes], hang: threading.Event | None = None,
    asked: Iterator[int] = itertools.count(),  # noqa: B008
) -> Iterator[str]:
    """Serve what a function gives, until ``hang`` is set; give the URL.

    Each request takes a number of those ``asked``.
    """
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            next(asked)
            if hang and hang.is_set():
                done.wait(60)
                return
            text = body()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        done.set()
        server.shutdown()
        server.server_close()


def rows_peak(bench: Bench) -> Iterator[Row]:
    """The most memory under many clients of a large exposition."""
    for clients in (64, 200):
        for source, most in ((False, 26), (True, 28)):
            sides: list[list[float]] = [[], []]
            with bench.nginx(MB) as (url,):
                for _ in range(min(bench.rounds, 3)):
                    for side, run in enumerate((
                        bench.ours(url, source), bench.original(url)
                    )):
                        with run as process:
                            load = {"clients": clients, "seconds": bench.seconds}
                            bench.load(process, **load)
                            sides[side].append(process.memory("VmHWM"))
            made = "source" if source else "byte-code"
            what = f"peak RSS, {clients} clients, {made}"
            limit = Limit("ours", "<=", most)
            yield row(what, "MiB", sides[0], limit, ORIGINAL, sides[1])


def rows_idle(bench: Bench) -> Iterator[Row]:
    """Memory at rest, against an interpreter that imported the same modules."""
    nodes = ast.parse(PROGRAM.read_text()).body
    imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    lines = PROGRAM.read_text().split("\n")
    statements = "\n".join(
        "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in imports
    )
    script = bench.dir / "imports.py"
    script.write_text(f"{statements}\nimport sys\nsys.stdin.read()\n")

    def bare() -> float:
        command = [bench.python, "-I", "-B", str(script)]
        with Process(command, 0) as process:
            time.sleep(0.7)
            return process.memory()

    def idle(source: bool) -> float:
        with bench.ours(url, source) as process:
            time.sleep(0.5)
            return process.memory()

    with bench.nginx(10 * KB) as (url,):
        compiled, source, other = in_turn(
            bench.rounds, lambda: idle(False), lambda: idle(True), bare
        )
    against = "its imports alone"
    limit = Limit("ratio", "<=", 1.1)
    yield row("idle RSS, byte-code", "MiB", compiled, limit, against, other)
    limit = Limit("ratio", "<=", 1.25)
    yield row("idle RSS, source", "MiB", source, limit, against, other)


def rows_growth(bench: Bench) -> Iterator[Row]:
    """Memory after many requests."""
    many = 5000 if bench.short else 100000
    with bench.nginx(10 * KB) as (url,), bench.ours(url) as process:
        bench.load(process, clients=16, requests=1000)
        before = process.memory()
        bench.load(process, clients=16, requests=many - 1000)
        growth = [process.memory() - before]
    what = f"RSS after {many:,} requests, over 1,000"
    yield row(what, "MiB", growth, Limit("ours", "<=", 0.5))


def rows_start(bench: Bench) -> Iterator[Row]:
    """From the start of the process to its first 200."""
    imports = [bench.python, "-I", "-c", "import http.server, urllib.request"]

    def first_answer(source: bool) -> float:
        start = time.monotonic()
        with bench.ours(url, source):
            return (time.monotonic() - start) * 1000

    with bench.nginx(10 * KB) as (url,):
        compiled, source, other = in_turn(
            bench.rounds * 3, lambda: first_answer(False), lambda: first_answer(True),
            lambda: timed(lambda: output(imports)) * 1000,
        )
    against = "its two largest imports"
    limit = Limit("ratio", "<=", 1.3)
    yield row("start to 200, byte-code", "ms", compiled, limit, against, other)
    limit = Limit("ratio", "<=", 1.6)
    yield row("start to 200, source", "ms", source, limit, against, other)


def rows_cpu(bench: Bench) -> Iterator[Row]:
    """CPU of a probe and its check, one after the other."""
    count = 100 if bench.short else 1000
    with bench.nginx(10 * KB) as (url,), bench.ours(url) as one, bench.original(
        url
    ) as two:

        def cost(process: Process) -> float:
            before = process.cpu()
            bench.load(process, requests=count)
            return (process.cpu() - before) / count * 1000

        cost(one), cost(two)
        sides = in_turn(bench.rounds, lambda: cost(one), lambda: cost(two))
    limit = Limit("ours", "<=", 0.7)
    yield row("CPU of a check, 10 KB", "ms", sides[0], limit, ORIGINAL, sides[1])


def rows_before(bench: Bench) -> Iterator[Row]:
    """A check, a start and a process at rest against the build before."""
    metric = {"METRIC_TO_CHECK": FOUR_NAMES[0], "METRIC_THRESHOLD": "10"}
    with bench.nginx(10 * KB) as (url,):
        yield from checks_before(bench, url, "default rules", {}, (0.55, 0.5))
        yield from checks_before(bench, url, "one metric", metric, (0.75, 0.75))
        for made, bytecode in (("byte-code", True), ("source", False)):
            ours = bench.bytecode if bytecode else str(PROGRAM)
            sides = [
                partial(start_and_rest, bench, file, url)
                for file in (ours, bench.before(bytecode))
            ]
            one, other = in_turn(bench.rounds, *sides)
            for what, unit, place in (("start", "ms", 0), ("idle RSS", "MiB", 1)):
                figures = [[both[place] for both in side] for side in (one, other)]
                limit = Limit("ratio", "<=", 1)
                text = f"{what}, {made}"
                yield row(text, unit, figures[0], limit, BEFORE, figures[1])


def start_and_rest(bench: Bench, file: str, url: str) -> tuple[float, float]:
    """Return the milliseconds to the first 200, and the MiB half a second later."""
    start = time.monotonic()
    with bench.build(file, url) as process:
        answered = (time.monotonic() - start) * 1000
        time.sleep(0.5)
        return answered, process.memory()


def checks_before(
    bench: Bench, url: str, what: str, settings: dict[str, str],
    most: tuple[float, float],
) -> Iterator[Row]:
    """Ask for the same checks in turn: the median answer, and the CPU of one."""
    count, far = 100 if bench.short else 500, {"METRICS_TIMEOUT": "9", **settings}
    with bench.build(bench.bytecode, url, **far) as one, bench.build(
        bench.before(), url, **far
    ) as two:

        def cost(process: Process) -> tuple[float, float]:
            before = process.cpu()
            result = bench.load(process, requests=count)
            return float(result["p50"]), (process.cpu() - before) / count * 1000

        cost(one), cost(two)
        sides = in_turn(bench.rounds, lambda: cost(one), lambda: cost(two))
    texts = f"/health, {what}, 10 KB, p50", f"CPU of a check, {what}, 10 KB"
    for place, text in enumerate(texts):
        figures = [[both[place] for both in side] for side in sides]
        limit = Limit("ratio", "<=", most[place])
        yield row(text, "ms", figures[0], limit, BEFORE, figures[1])


def rows_day(bench: Bench) -> Iterator[Row]:
    """CPU of a day: 8,640 probes that find everything cold, and the time between."""
    count, rest = (20, 1.0) if bench.short else (300, 10.0)
    idle: list[list[float]] = [[], []]
    day: list[list[float]] = [[], []]
    with bench.nginx(10 * KB) as (url,), bench.ours(url) as one, bench.original(
        url
    ) as two:
        for side, process in enumerate((one, two)):
            for _ in range(min(bench.rounds, 2)):
                before = process.cpu()
                time.sleep(rest)
                resting = (process.cpu() - before) / rest
                before = process.cpu()
                bench.load(process, requests=count, pause="50ms")
                probes = (process.cpu() - before) / count * 8640
                idle[side].append(resting * 86400)
                day[side].append(resting * 86400 + probes)
    what = "CPU of a day, a probe each 10 s"
    yield row(what, "s", day[0], Limit("ours", "<=", 18), ORIGINAL, day[1])
    limit = Limit("ours", "<=", 1)
    yield row("CPU of a day, no probe", "s", idle[0], limit, ORIGINAL, idle[1])


def rows_rules(bench: Bench) -> Iterator[Row]:
    """Fifty rules with rates over five minutes, their ranges full."""
    own = [f"m{n}_total" for n in range(50)]
    cases = (
        ("of 4 series each", 5, own, "rate(m{n}_total[5m]) > 1e9"),
        ("of the same 200", 20, ["m_total"], "rate(m_total[5m]) > {n}e9"),
        ("of 200, matchers differ", 20, ["m_total"],
         'rate(m_total{{s!="x{n}"}}[5m]) > 1e9'),
    )  # fmt: skip
    points = 20 if bench.short else 300
    for what, most, names, rule in cases:
        series = [f'{names[n % len(names)]}{{s="{n}"}}' for n in range(200)]
        now = [0]

        def body(series: Sequence[str] = series, now: list[int] = now) -> bytes:
            now[0] += 1
            lines = (f"{text} {now[0] * at}\n" for at, text in enumerate(series))
            return "".join(lines).encode()

        ours, other = [], []
        rules = "\n".join(f"R{n}: {rule.format(n=n)}" for n in range(1, 51))
        rules = rules.replace("m50_total", "m0_total")
        with metrics_server(body) as url:
            for _ in range(min(bench.rounds, 3)):
                seconds = bench.child("rules", url, rules, points)
                ours.append(statistics.median(seconds) * 1000)
                seconds = bench.child("rules", url, "up == 0", 5)
                other.append(statistics.median(seconds) * 1000)
        text = f"a check of 50 rates {what}"
        yield row(text, "ms", ours, Limit("ours", "<=", most), "a scrape alone", other)


def rows_ranges(bench: Bench) -> Iterator[Row]:
    """What thousands of counters take in a full range, and gauges beyond the limit."""
    for series, seconds, checks, most in (4000, 360, 740, 45), (5000, 2048, 400, 40):
        numbers = itertools.count()

        def body(
            series: int = series, numbers: Iterator[int] = numbers,
            counters: bool = series == 4000,
        ) -> bytes:
            at = next(numbers)
            more = at if counters else at % 2
            lines = (f'm_total{{s="series-{n}"}} {n + more}\n' for n in range(series))
            return "".join(lines).encode()

        count = 40 if bench.short else checks
        builds = [bench.bytecode, bench.before()][: 2 if series == 4000 else 1]
        with metrics_server(body) as url:
            arguments = url, str(seconds), str(count)
            found = [
                [float(output([bench.python, "-I", "-c", RANGES, build, *arguments]))]
                for build in builds
            ]
        text = f"peak RSS, {series} series in a range of {seconds} checks"
        against = (BEFORE, found[1]) if found[1:] else ()
        yield row(text, "MiB", found[0], Limit("ours", "<=", most), *against)


def rows_alerts(bench: Bench) -> Iterator[Row]:
    """What is said of a rule of which thousands of series fire."""
    for count, most in ((5000, 10), (19000, 40)):
        ours = [
            statistics.median(bench.child("alerts", count)) * 1000
            for _ in range(min(bench.rounds, 3))
        ]
        text = f"?verbose, a rule of {count:,} alerts"
        yield row(text, "ms", ours, Limit("ours", "<=", most))


def rows_firing(bench: Bench) -> Iterator[Row]:
    """The first check in which ten rules fire for thousands of series."""
    found: list[list[list[float]]] = [[], []]
    for _ in range(min(bench.rounds, 3)):
        for side, build in enumerate((bench.bytecode, bench.before())):
            values = itertools.chain([0], itertools.repeat(10))

            def body(values: Iterator[int] = values) -> bytes:
                value = next(values)
                return "".join(f'q{{n="{n}"}} {value}\n' for n in range(4900)).encode()

            with metrics_server(body) as url:
                found[side].append(bench.child("firing", build, url))
    first, following = ([pair[at] * 1000 for pair in found[0]] for at in (0, 1))
    text = "the first check in which 10 x 4,900 fire"
    yield row(text, "ms", first, Limit("ratio", "<=", 3), "the next", following)
    before = [pair[0] * 1000 for pair in found[1]]
    yield row(text, "ms", first, None, BEFORE, before)


def rows_blocked(bench: Bench) -> Iterator[Row]:
    """How many requests a server has to answer that has answered none of many."""
    found = []
    for build in bench.bytecode, bench.before():
        hang, asked = threading.Event(), itertools.count()
        with metrics_server(lambda: b"q 1\n", hang, asked) as url, bench.build(
            build, url, METRICS_TIMEOUT="0.05"
        ) as process:
            hang.set()
            before = next(asked)
            bench.load(process, "-either", requests=20 if bench.short else 100)
            found.append([float(next(asked) - before - 1)])
    text = "requests that a blocked server owes"
    yield row(text, "", found[0], Limit("ours", "<=", 1), BEFORE, found[1])


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    name[len("rows_") :]: function
    for name, function in list(globals().items())
    if name.startswith("rows_")
}

# --- The table -----------------------------------------------------------------------

README = (
    ("`/health`, median; 1 MB of metrics, 10 KB", "/health, 1 client, .*, p50"),
    ("answers to 16 clients; 1 MB, 10 KB", "/health, 16 clients, .*, rate"),
    ("memory with 64 clients, 200 clients", "peak RSS, .*, byte-code"),
    ("CPU of a day, a probe each 10 s", "CPU of a day, a probe each 10 s"),
    ("start to the first answer; from byte-code, from source", "start to 200, .*"),
)


def number(value: float | None) -> str:
    """Return a number to three digits, and nothing for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def columns(one: Row) -> tuple[str, ...]:
    """Return the cells of a row."""
    return (
        one.what, one.unit, number(one.ours), one.against, number(one.other),
        number(one.ratio), f"{one.spread:.0%}", str(one.limit or ""), one.verdict,
    )


TITLES = ("row", "unit", "ours", "against", "other", "ratio", "spread", "target", "")
LAYOUT = "{:44} {:5} {:>7} {:17} {:>7} {:>7} {:>6}  {:14} {}"


def circumstances(bench: Bench) -> str:
    """Return the date, the versions and the machine."""
    versions = [f"CPython {bench.version}"]
    if shutil.which("go"):
        versions.append(output(["go", "version"]).split()[2].replace("go", "Go "))
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{date}, {', '.join(versions)}, {machine}"


def noise() -> float:
    """Return how much slower than the fastest a fixed piece of work usually was."""
    seconds = [timed(lambda: sum(range(200000))) for _ in range(40)]
    return statistics.median(seconds) / min(seconds) - 1


def measure(bench: Bench, pattern: str, show: Callable[[Row], object]) -> list[str]:
    """Measure all groups whose name fits; return what went wrong."""
    problems = []
    for name, group in GROUPS.items():
        if re.search(pattern, name):
            try:
                for one in group(bench):
                    show(one)
            except MissingError as error:
                print(f"skipped: {name}: there is no {error}", flush=True)
            except WrongError as error:
                problems.append(f"{name}: {error}")
                print(f"FAILED: {problems[-1]}", flush=True)
    return problems


def markdown(rows: Sequence[Row], where: str) -> str:
    """Return the README's table."""
    lines = [f"{where}, in one run of `.ci/benchmark.py --markdown`; the Go program is"]
    lines[0] += " the original written anew, which scrapes for each request."
    lines += ["", "| | here | compared with |", "|--|--:|--:|"]
    for what, pattern in README:
        others: dict[str, list[str]] = {}
        found = [r for r in rows if r.other and re.fullmatch(pattern, r.what)]
        for r in found:
            others.setdefault(r.against, []).append(number(r.other))
        ours = ", ".join(dict.fromkeys(number(r.ours) for r in found))
        unit = found[0].unit.replace("1/s", "a second") if found else ""
        cells = (f"{', '.join(dict.fromkeys(others[name]))} {name}" for name in others)
        lines.append(f"| {what} | {ours} {unit} | {', '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table; return 1 if a row could not be measured though it should."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="one quick round each")
    names = ", ".join(GROUPS)
    parser.add_argument("--only", default="", metavar="PATTERN", help=names)
    parser.add_argument("--python", default=sys.executable, help="to run it with")
    parser.add_argument("--markdown", action="store_true", help="for the README, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(globals()[f"child_{options.child[0]}"](*options.child[1:])))
        return 0
    rows: list[Row] = []

    def show(one: Row) -> None:
        rows.append(one)
        print(LAYOUT.format(*columns(one)).rstrip(), flush=True)

    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(directory, options.python, options.short)
        where = circumstances(bench)
        print(f"{where}; the machine's noise before {noise():.0%}")
        print(LAYOUT.format(*TITLES).rstrip(), flush=True)
        problems = measure(bench, options.only, show)
        missed = sum(one.verdict == "MISSED" for one in rows)
        print(f"{len(rows)} rows, {missed} miss their target; noise {noise():.0%}")
        if options.markdown:
            print("\n" + markdown(rows, where))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
