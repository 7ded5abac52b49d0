"""Plays the kubelet, for the README's pod: who is restarted, and when.

The probes are those of the manifests, and the program runs as real processes; the
server is one that a test makes stall. All times are shortened alike, those of the
manifests, of the rules and of the kubelet's back-off. What the kubelet does was seen
on a real one, 1.36: its request, that failures are counted over restarts, that the
back-off ends late, and that exit status 88 restarts every container of the pod.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import py_compile
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, NamedTuple
from unittest import mock

from readme_test import Manifest, deployments, environ_of, named, table
from server_test import PROGRAM, free_port

import health_check as hc

# A minute takes two seconds.
SCALE = 1 / 30
LENGTH = 22 * 60.0
# No answer is due sooner, and no start: this machine may be busy.
LEAST, LEAST_START = 0.4, 5.0
BACK_OFF = (0, 10, 20, 40, 80, 160, 300)
LATE = 28.0
SPACE = tempfile.TemporaryDirectory()
CODE = f"{SPACE.name}/health_check.pyc"


def tearDownModule() -> None:
    """Leave nothing behind."""
    SPACE.cleanup()


def shorten(text: str) -> str:
    """Return a text with every duration shortened."""

    def shorter(match: re.Match[str]) -> str:
        seconds = hc.parse_duration(match[0]) * SCALE
        return f"{max(1, round(seconds * 1000))}ms"

    return re.sub(r"(?<![\w.:\"])(?:\d+(?:ms|[smhd]))+(?!\w)", shorter, text)


def pause(seconds: float) -> None:
    """Wait for as long as the pod thinks."""
    time.sleep(seconds * SCALE)


class Engine:
    """A server like vLLM: it loads, works, and may stall or fall silent."""

    PAGE = """\
vllm:num_requests_running 3
vllm:num_requests_waiting 0
vllm:generation_tokens_total {:.0f}
vllm:prompt_tokens_total {:.0f}
vllm:kv_cache_usage_perc 0.5
"""

    def __init__(self, load: float) -> None:
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                life = engine.life
                while engine.state == "silent" and engine.life == life:
                    time.sleep(0.05)
                if time.monotonic() < engine.ready or engine.life != life:
                    return
                body = engine.page() if self.path == "/metrics" else b""
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.send_header("Content-Type", "text/plain")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.load, self.life, self.state, self.stood = load, 0, "", 0.0
        self.ready = float("inf")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def page(self) -> bytes:
        """Return the metrics: three requests run, and tokens come unless it stalls."""
        now = self.stood if self.state == "stalled" else time.monotonic()
        return self.PAGE.format(now * 100, now * 10).encode()

    def start(self) -> None:
        """Begin to load, as a process that is new."""
        self.life, self.state = self.life + 1, ""
        self.ready = time.monotonic() + self.load * SCALE

    def become(self, state: str) -> None:
        """Stall, or fall silent."""
        self.stood, self.state = time.monotonic(), state

    def poll(self) -> int | None:
        """Return that it runs."""
        return None

    def kill(self, grace: float) -> None:
        """End; the end itself takes no time, since what hangs has nothing to drain."""
        self.ready = float("inf")
        self.life += 1


class Checker:
    """The program, which may crash some seconds after each start, or start slowly."""

    def __init__(self, environ: dict[str, str], crash: float, slow: float) -> None:
        self.environ, self.crash, self.slow = environ, crash, slow
        self.process: subprocess.Popen[bytes] | None = None
        self.answered = 0.0

    def start(self) -> None:
        """Start it."""
        code = f"import time, runpy; time.sleep({self.slow * SCALE}); "
        code += f"runpy.run_path({CODE!r}, run_name='__main__')"
        command = [sys.executable, "-I", CODE]
        self.process = subprocess.Popen(
            [*command[:2], "-c", code] if self.slow else command,
            env=self.environ, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.answered = 0.0

    def poll(self) -> int | None:
        """Return its exit status, or None; make it crash if that is due."""
        assert self.process
        now = time.monotonic()
        if self.crash and not self.answered and self.listens():
            self.answered = now
        if self.answered and now > self.answered + self.crash * SCALE:
            self.process.kill()
        return self.process.poll()

    def listens(self) -> bool:
        """Tell whether it takes a connection."""
        with socket.socket() as sock:
            return not sock.connect_ex(("127.0.0.1", int(self.environ["APP_PORT"])))

    def freeze(self) -> None:
        """Stop it."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def kill(self, grace: float) -> None:
        """End it, gently for as long as its grace lasts."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(grace * SCALE, 0.1))
            self.process.kill()
            self.process.wait()


class Container:
    """What the kubelet knows of one container; its worker asks its probes."""

    def __init__(self, spec: Manifest, body: Engine | Checker, ports: dict[int, int]):
        self.spec, self.body, self.ports = spec, body, ports
        self.restarts: list[float] = []
        self.running = self.started = False
        self.failed, self.due, self.life, self.since = 0, 0.0, 0, 0.0

    def start(self) -> None:
        """Start it."""
        self.body.start()
        self.life, self.due = self.life + 1, float("inf")
        self.since = time.monotonic()
        self.running, self.started = True, "startupProbe" not in self.spec

    def ask(self, probe: Manifest) -> bool:
        """Ask as a kubelet does; return whether that was a success."""
        if "exec" in probe:
            environ = {"APP_PORT": str(self.ports[8081])}
            return hc.ask_running(environ, probe["exec"]["command"][-1]) == 0
        path, port = probe["httpGet"]["path"], self.ports[probe["httpGet"]["port"]]
        deadline = max(probe.get("timeoutSeconds", 1) * SCALE, LEAST)
        request = (f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                   "User-Agent: kube-probe/1.36\r\nAccept: */*\r\n"
                   "Connection: close\r\n\r\n")  # fmt: skip
        with contextlib.suppress(OSError), socket.create_connection(
            ("127.0.0.1", port), deadline
        ) as sock:
            sock.sendall(request.encode())
            return sock.recv(12)[9:10] in (b"2", b"3")
        return False


class Pod:
    """A kubelet's view of one pod: starts, probes, kills and restarts."""

    def __init__(self, engine: Container, checker: Container) -> None:
        self.engine, self.checker = engine, checker
        self.began, self.happened = time.monotonic(), 0.0
        self.over = threading.Event()

    def now(self) -> float:
        """Return the seconds of the pod."""
        return (time.monotonic() - self.began) / SCALE

    def run(self, act: Callable[[Pod], None]) -> None:
        """Run it, with what happens to it, and end."""
        self.checker.start()
        workers = [threading.Thread(target=self.work, args=(self.checker,))]
        workers[0].start()
        # A native sidecar: the server comes after its startup probe.
        while not self.checker.started and self.now() < LENGTH:
            self.supervise()
        self.engine.start()
        workers.append(threading.Thread(target=self.work, args=(self.engine,)))
        workers[1].start()
        end = self.now() + LENGTH
        act(self)
        self.wait(end - self.now())
        self.over.set()
        for worker in workers:
            worker.join()
        self.checker.body.kill(0)

    def wait(self, seconds: float) -> None:
        """Supervise for a while."""
        end = self.now() + seconds
        while self.now() < end:
            self.supervise()

    def supervise(self) -> None:
        """Look after both containers once."""
        for container in (self.checker, self.engine):
            status = container.body.poll() if container.running else None
            if status is not None:
                self.ended(container, status)
            elif container.life and self.now() > container.due:
                container.restarts.append(self.now())
                container.start()
        pause(0.5)

    def ended(self, container: Container, status: int) -> None:
        """Restart a container after its back-off, or the whole pod."""
        container.due, container.running = float("inf"), False
        rules = container.spec.get("restartPolicyRules", [])
        if any(status in rule["exitCodes"]["values"] for rule in rules):
            self.kill(self.engine, 2)
            self.engine.due = container.due = self.now() + 3
            return
        # It runs ten minutes to be forgiven, and none does here.
        rest = BACK_OFF[min(len(container.restarts), len(BACK_OFF) - 1)]
        container.due = self.now() + rest + LATE * rest / 300

    def kill(self, container: Container, grace: float) -> None:
        """Kill a container; its restart follows."""
        container.due, container.running = float("inf"), False
        container.body.kill(grace)
        container.due = self.now() + 1

    def work(self, container: Container) -> None:
        """Ask what a container's probes ask, until the pod is over."""
        while not self.over.is_set():
            kind = "livenessProbe" if container.started else "startupProbe"
            probe, life = container.spec[kind], container.life
            asked = self.now()
            good = container.running and container.ask(probe)
            if container.life == life and container.running:
                self.judge(container, kind, probe, good)
            rest = probe.get("periodSeconds", 10) - (self.now() - asked)
            self.over.wait(max(rest, 0.5) * SCALE)

    def judge(
        self, container: Container, kind: str, probe: Manifest, good: bool
    ) -> None:
        """Count a success or a failure; kill at the threshold."""
        container.failed = 0 if good else container.failed + 1
        if kind == "startupProbe":
            container.started = good
            if time.monotonic() < container.since + LEAST_START:
                return
        if container.failed >= probe.get("failureThreshold", 3):
            container.failed = 0
            self.kill(container, probe.get("terminationGracePeriodSeconds", 30))


class Case(NamedTuple):
    """What happens, to whom, and how long a server loads."""

    name: str
    act: Callable[[Pod], None] = lambda pod: None
    crash: float = 0.0
    slow: float = 0.0
    load: float = 30.0


def later(seconds: float, *acts: Callable[[Pod], None]) -> Callable[[Pod], None]:
    """Return what does something to a pod after a while."""

    def act(pod: Pod) -> None:
        pod.wait(seconds)
        pod.happened = pod.now()
        for each in acts:
            each(pod)

    return act


def freezes(pod: Pod) -> None:
    """Stop the checker."""
    pod.checker.body.freeze()  # type: ignore[union-attr]


def becomes(state: str) -> Callable[[Pod], None]:
    """Return what changes the server."""
    return lambda pod: pod.engine.body.become(state)  # type: ignore[union-attr]


EARLY = 4 * 60.0
CASES = (
    Case("the checker freezes", later(EARLY, freezes)),
    Case("the checker crashes 3 s after each start", crash=3),
    Case("the checker crashes 40 s after each start", crash=40),
    Case("the checker takes 15 s to start, the server 10 minutes", slow=15, load=600),
    Case("the server stalls", later(EARLY, becomes("stalled"))),
    Case("the server falls silent, its metrics too", later(EARLY, becomes("silent"))),
    Case("a stall, and a frozen checker",
         later(EARLY, becomes("stalled"), freezes)),
)  # fmt: skip


class Seen(NamedTuple):
    """When each was restarted, in seconds from what happened to them."""

    checker: tuple[float, ...]
    server: tuple[float, ...]


def shortened(environ: dict[str, str]) -> dict[str, str]:
    """Return settings with each duration shortened, those of built-in rules too.

    Of these the part that concerns this server is left: it costs less to check.
    """
    names = {*re.findall(r"(?m)^[\w:]+", Engine.PAGE), "http_requests_total",
             "up", "scrape_error"}  # fmt: skip
    rules, left_out = [], []
    for rule in hc.load_config(environ).rules:
        expr = hc.prune(rule.expr, names)
        if expr:
            rules.append(shorten(hc.format_rule(rule._replace(expr=expr))))
        else:
            left_out.append(rule.name)
    return {
        **{name: shorten(text) for name, text in environ.items()},
        "UNHEALTHY_WHEN": "\n".join(rules), "WITHOUT_RULES": ",".join(left_out),
    }  # fmt: skip


def live(case: Case, deployment: Manifest) -> Seen:
    """Run a pod of a Deployment through a case."""
    engine, port = Engine(case.load), free_port()
    ports = {8081: port, 8000: engine.port}
    spec, other = (named(deployment, name) for name in ("health-check", "vllm"))
    environ = {
        **shortened(environ_of(spec)), "PATH": os.environ["PATH"],
        "METRICS_ENDPOINT": f"http://127.0.0.1:{engine.port}/metrics",
        "LAST_WORDS": f"{SPACE.name}/{port}", "APP_PORT": str(port),
        "APP_HOST": "127.0.0.1",
    }  # fmt: skip
    if "EXIT_WHEN" in environ:
        # Ten minutes, but nobody waits for them here.
        environ["EXIT_AFTER"] = shorten("2m")
    checker = Checker(environ, case.crash, case.slow)
    pod = Pod(Container(other, engine, ports), Container(spec, checker, ports))
    try:
        pod.run(case.act)
    finally:
        checker.kill(0)
        engine.server.shutdown()
        engine.server.server_close()
    return Seen(*(
        tuple(at - pod.happened for at in one.restarts)
        for one in (pod.checker, pod.engine)
    ))  # fmt: skip


# The columns of the README's table, and the Deployment that each is about.
VARIANTS = {
    "exec, 10 s x 3": "production",
    "httpGet, 30 s x 14": "over HTTP",
    "1.36, exit 88": "1.36",
}


RUNS = [(case, variant) for case in CASES for variant in VARIANTS]


def live_all(runs: list[tuple[Case, str]]) -> dict[tuple[str, str], Seen]:
    """Run Deployments through cases, all side by side."""
    pods = deployments()
    # Compiled, as the image has it.
    py_compile.compile(str(PROGRAM), CODE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(hc, "CALLER_TIMEOUT", LEAST))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        pool = stack.enter_context(ThreadPoolExecutor(len(runs)))
        found = {}
        for case, variant in runs:
            found[case.name, variant] = pool.submit(live, case, pods[VARIANTS[variant]])
            # Not all at once: the start of a process is what takes longest.
            time.sleep(0.2)
        return {key: future.result() for key, future in found.items()}


def differs(cell: str, seen: Seen) -> str:
    """Return how a cell, as in "checker 40 s, pod 6 min", differs from a run."""
    for who, times in zip(("checker", "server"), seen):
        said = re.findall(rf"(?:{who}|pod) ([\d.]+) (s|min)", cell)
        due = [float(number) * (60 if unit == "min" else 1) for number, unit in said]
        if re.search(rf"{who}(?: and server)? again", cell):
            if not times:
                return f"{who}: {times}"
        elif len(due) != len(times) or any(
            abs(a - b) > max(30, a / 4) for a, b in zip(due, times)
        ):
            return f"{who}: {times}"
    return ""


class Kubelet(unittest.TestCase):
    """The README's table of who is restarted, and when."""

    def test_who_is_restarted_and_when(self) -> None:
        rows = table("what happens", *VARIANTS)
        self.assertEqual([row[0] for row in rows], [case.name for case in CASES])
        said = {
            (name, variant): cell
            for name, *cells in rows for variant, cell in zip(VARIANTS, cells)
        }  # fmt: skip
        runs = RUNS
        # A machine that is busy with something else is given two more chances.
        for _ in range(3):
            seen = live_all(runs)
            wrong = {key: differs(said[key], times) for key, times in seen.items()}
            runs = [run for run in runs if wrong[run[0].name, run[1]]]
            if not runs:
                break
        self.assertEqual({key: text for key, text in wrong.items() if text}, {})


if __name__ == "__main__":
    for key, found in live_all(RUNS).items():
        print(*key, *([round(at) for at in times] for times in found), sep=" | ")
