#!/usr/bin/env python3
"""The names of metrics arrive as they were registered, from real client libraries.

    python3 .ci/clients.py [WORD...]     only the clients whose title has a WORD

Takes some minutes and needs pip, npm, apt-get, Go and g++, so it is no part of the
gate.  Each client is installed into a temporary directory, serves three gauges there,
and is scraped with what health_check.py asks for.  Exits 1 if a name is not there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import health_check as hc

NAMES = {"plain_total": 1.0, "sglang:num_queue_reqs": 2.0, "http.server.active": 3.0}
LEGACY = {name: value for name, value in NAMES.items() if "." not in name}
UVICORN = "uvicorn==0.54.0", "h11==0.16.0", "click==8.3.1", "typing_extensions==4.16.0"
PYTHON = "0.19.0 0.20.0 0.21.1 0.22.1 0.23.1 0.24.1 0.25.0 0.26.0".split()
UTF8_SINCE = (0, 22)
NODE = "13.2.0 14.2.0 15.0.0 15.1.3".split()
GO_PACKAGE = "golang-github-prometheus-client-golang-dev"
CPP_PACKAGES = (
    "prometheus-cpp-dev", "libprometheus-cpp-core1.0", "libprometheus-cpp-pull1.0",
    "libcivetweb1",
)  # fmt: skip

PYTHON_SERVER = """
import sys, prometheus_client as client
kind, port, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for value, name in enumerate(names, 1):
    client.Gauge(name, name).set(value)
if kind == "own":
    client.start_http_server(port, "127.0.0.1")
    __import__("signal").pause()
elif kind == "WSGI":
    from wsgiref.simple_server import make_server
    make_server("127.0.0.1", port, client.make_wsgi_app()).serve_forever()
else:
    import uvicorn
    uvicorn.run(client.make_asgi_app(), host="127.0.0.1", port=port, lifespan="off")
"""
NODE_SERVER = """
const client = require('prom-client');
process.argv.slice(2).forEach((name, i) =>
  i && new client.Gauge({name, help: name}).set(i));
require('http').createServer(async (request, response) => {
  response.setHeader('Content-Type', client.register.contentType);
  response.end(await client.register.metrics());
}).listen(Number(process.argv[2]), '127.0.0.1');
"""
GO_SERVER = """
package main
import (
  "net/http"
  "os"
  "github.com/prometheus/client_golang/prometheus"
  "github.com/prometheus/client_golang/prometheus/promhttp"
)
func main() {
  for i, name := range os.Args[2:] {
    gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: name})
    gauge.Set(float64(i + 1))
    prometheus.MustRegister(gauge)
  }
  options := promhttp.HandlerOpts{EnableOpenMetrics: true}
  http.Handle("/metrics", promhttp.HandlerFor(prometheus.DefaultGatherer, options))
  http.ListenAndServe("127.0.0.1:" + os.Args[1], nil)
}
"""
CPP_SERVER = """
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>
#include <unistd.h>
int main(int argc, char** argv) {
  prometheus::Exposer exposer{std::string("127.0.0.1:") + argv[1]};
  auto registry = std::make_shared<prometheus::Registry>();
  for (int i = 2; i < argc; i++)
    prometheus::BuildGauge().Name(argv[i]).Help("h").Register(*registry).Add({})
      .Set(i - 1);
  exposer.RegisterCollectable(registry);
  pause();
}
"""


class Client(NamedTuple):
    """A client library: how it is installed into a folder, which gives a command."""

    title: str
    install: Callable[[Path], list[str]]
    names: dict[str, float]
    environ: dict[str, str]


def main(words: list[str]) -> int:
    """Scrape each client that is asked for, and print what came of it."""
    failures = 0
    # Whoever polls a port of the ephemeral range may be connected to himself.
    ports = itertools.count(18800)
    with tempfile.TemporaryDirectory() as directory:
        for client in clients(Path(directory)):
            if not words or any(word in client.title for word in words):
                problem = check(client, Path(directory), next(ports))
                print(f"{client.title:36} {problem or 'as registered'}", flush=True)
                failures += bool(problem)
    return 1 if failures else 0


def clients(root: Path) -> Iterator[Client]:
    """Give all clients, each in a folder of its own below one."""
    for version in PYTHON:
        new = tuple(map(int, version.split(".")[:2])) >= UTF8_SINCE
        for kind in "own", "WSGI", "ASGI":
            path = {"PYTHONPATH": f"{root / version}:{root / 'uvicorn'}"}
            title = f"prometheus_client {version}, {kind}"
            install = python_command(version, kind)
            yield Client(title, install, NAMES if new else LEGACY, path)
    for version in NODE:
        yield Client(f"prom-client {version}", node_command(version), LEGACY, {})
    yield Client("client_golang of Debian", go_command, LEGACY, {})
    path = {"LD_LIBRARY_PATH": str(root / "cpp/usr/lib/x86_64-linux-gnu")}
    yield Client("prometheus-cpp of Debian", cpp_command, LEGACY, path)


def python_command(version: str, kind: str) -> Callable[[Path], list[str]]:
    """Return what installs a release of prometheus_client."""

    def install(root: Path) -> list[str]:
        for folder, packages in (
            (version, [f"prometheus_client=={version}"]), ("uvicorn", UVICORN)
        ):
            if not (root / folder).exists():
                pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
                call([*pip, "--target", str(root / folder), *packages], root)
        return [sys.executable, "-c", PYTHON_SERVER, kind]

    return install


def node_command(version: str) -> Callable[[Path], list[str]]:
    """Return what installs a release of prom-client."""

    def install(root: Path) -> list[str]:
        folder = root / f"node-{version}"
        folder.mkdir()
        call(["npm", "install", "--silent", f"prom-client@{version}"], folder)
        (folder / "server.js").write_text(NODE_SERVER)
        return ["node", str(folder / "server.js")]

    return install


def go_command(root: Path) -> list[str]:
    """Build a server with the client_golang that Debian has the source of."""
    call(["bash", str(Path(__file__).with_name("run")), "packages", GO_PACKAGE], root)
    (root / "server.go").write_text(GO_SERVER)
    command = ["go", "build", "-o", "go-server", "server.go"]
    call(command, root, GO111MODULE="off", GOPATH="/usr/share/gocode")
    return [str(root / "go-server")]


def cpp_command(root: Path) -> list[str]:
    """Build a server with Debian's prometheus-cpp, without installing that."""
    folder = root / "cpp"
    folder.mkdir()
    call(["apt-get", "-qq", "download", *CPP_PACKAGES], folder)
    for package in folder.glob("*.deb"):
        call(["dpkg", "-x", str(package), "."], folder)
    (folder / "server.cc").write_text(CPP_SERVER)
    libraries = folder / "usr/lib/x86_64-linux-gnu"
    flags = [f"-I{folder}/usr/include", f"-L{libraries}", "-Wl,--allow-shlib-undefined"]
    names = "-lprometheus-cpp-pull", "-lprometheus-cpp-core"
    command = ["g++", "-std=c++14", "server.cc", "-o", "server", *flags, *names]
    call(command, folder)
    return [str(folder / "server")]


def call(command: list[str], folder: Path, **environ: str) -> None:
    """Run a command, which prints what it says only if it fails."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}")


def check(client: Client, root: Path, port: int) -> str:
    """Return what a scrape of a client lacks, empty if it lacks nothing."""
    command = [*client.install(root), str(port), *client.names]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **client.environ},
    )  # fmt: skip
    try:
        found = scrape(port)
    finally:
        server.kill()
        server.wait()
    wrong = {name for name in client.names if found.get(name) != client.names[name]}
    return f"lacks {sorted(wrong)}" if wrong else ""


def scrape(port: int) -> dict[str, float]:
    """Return the samples of our names, once the server answers."""
    environ = {"METRICS_ENDPOINT": f"http://127.0.0.1:{port}/metrics"}
    (target,) = hc.load_config(environ).metrics_endpoint
    for _ in range(100):
        with contextlib.suppress(hc.ScrapeError), hc.open_stream(
            target, time.monotonic() + 5
        ) as stream:
            samples = hc.read_samples(stream, hc.format_for(NAMES, ()), {}).samples
            return {dict(labels)["__name__"]: samples[labels] for labels in samples}
        time.sleep(0.1)
    raise RuntimeError("no answer within ten seconds")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
