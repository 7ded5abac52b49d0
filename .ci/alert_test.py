"""What health_check.py tells others arrives: at the real Alertmanager and Prometheus.

The program runs as a process, with a server whose metrics a test changes and with a
receiver that records what the Alertmanager sends.  The clock of alerts runs thirty
times as fast: where a comment says a minute, two seconds pass.
"""

from __future__ import annotations

import contextlib
import html
import http.client
import http.server
import json
import logging
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
import unittest
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, NamedTuple

import html5lib
from prometheus_client.parser import text_string_to_metric_families

import health_check as hc

PROGRAM = Path(hc.__file__).resolve()
SCALE = 1 / 30
RESEND, LIFETIME = hc.RESEND * SCALE, hc.LIFETIME * SCALE
FAST = f"""
import sys, health_check
for name in ("RESEND", "LIFETIME", "RETENTION", "RETRY"):
    setattr(health_check, name, getattr(health_check, name) * {SCALE})
sys.exit(health_check.main())
"""
# Seconds of what tells more the longer it lasts: LONG=60 for a minute of it.
LONG = float(os.environ.get("LONG", "10"))
PATIENCE = 30.0
HOSTILE = (
    '"><script>alert(1)</script>',
    "</svg></code></title><img src=x>",
    "a\nb",
    "a\u2028b\u2029c\x85d",
    "\x1b[2J\x07",
    "back\\slash",
    "it's \"quoted\" &amp; {braces}",
    "\N{LATIN SMALL LETTER E WITH ACUTE}\N{PILE OF POO}",
)

# -- What the tests share -------------------------------------------------------------


class HTTPServer(http.server.ThreadingHTTPServer):
    """Answers in threads that end with it."""

    request_queue_size = 256

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a caller may give up."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class Metrics(HTTPServer):
    """A server whose page a test changes."""

    def __init__(self, body: str = "", status: int = 200) -> None:
        metrics = self
        self.body, self.status = body, status

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = metrics.body.encode()
                self.send_response(metrics.status)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        super().__init__(Handler)
        self.instance = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.instance}/metrics"


class Notification(NamedTuple):
    """What the receiver was told of one alert, and when."""

    time: float
    status: str
    alert: dict[str, Any]

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.alert["labels"]
        return labels

    def at(self, key: str) -> float:
        """Return ``startsAt`` or ``endsAt`` as Unix time."""
        text = self.alert[key].replace("Z", "+00:00")
        return datetime.fromisoformat(text).timestamp()


class Receiver(HTTPServer):
    """The webhook behind an Alertmanager, or in its place: keeps what it is told."""

    def __init__(self) -> None:
        record = self.record = []  # type: list[Notification]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                told, now = json.loads(self.rfile.read(length)), time.time()
                alerts = told["alerts"] if isinstance(told, dict) else told
                for alert in alerts:
                    status = alert.get("status", "posted")
                    record.append(Notification(now, status, alert))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        super().__init__(Handler)

    def told(self, label: str) -> list[str]:
        """Return what has been told, each as ``firing 0`` with the value of a label."""
        return [f"{n.status} {n.labels.get(label)}" for n in self.record]


# Each alert is a group of its own, and told at once.
ALERTMANAGER = """
route:
  receiver: recorder
  group_by: ['...']
  group_wait: 50ms
  group_interval: 100ms
  repeat_interval: 1h
receivers:
- name: recorder
  webhook_configs:
  - url: http://127.0.0.1:{port}/
    send_resolved: true
"""


class Alertmanager:
    """The real one; it keeps its port and, as in a cluster, its notification log."""

    def __init__(self, receiver: Receiver) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._config = self._folder / "alertmanager.yml"
        self._config.write_text(ALERTMANAGER.format(port=receiver.server_port))
        self.instance = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.instance}/api/v2/alerts"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                "prometheus-alertmanager",
                f"--config.file={self._config}",
                f"--storage.path={self._folder / 'data'}",
                f"--web.listen-address={self.instance}",
                "--cluster.listen-address=",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: fetch(f"http://{self.instance}/-/ready") is not None)

    def send_signal(self, number: int) -> None:
        if self._process:
            self._process.send_signal(number)

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)
            self._process.wait()
            self._process = None

    def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that it holds to be active."""
        alerts: list[dict[str, Any]] = json.loads(fetch(self.url) or "[]")
        return alerts

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


class Program:
    """health_check.py as a process, its log, and a kubelet that probes it."""

    def __init__(self, source: str = FAST, **environ: str) -> None:
        known = {setting.name for setting in hc.SETTINGS}
        clean = {k: v for k, v in os.environ.items() if k not in known}
        path = {"PYTHONPATH": str(PROGRAM.parent), "APP_PORT": "0"}
        self._folder = Path(tempfile.mkdtemp())
        with open(self._folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", source],
                stdout=log,
                stderr=log,
                env={**clean, **path, "METRICS_TIMEOUT": "5", **environ},
            )
        self._probing, self._thread = threading.Event(), threading.Thread()
        self.probes: list[tuple[float, int]] = []
        up = re.compile(r"is up: port (\d+)")
        wait_for(lambda: up.search(self.log) or self.process.poll() is not None)
        found = up.search(self.log)
        if not found:
            raise AssertionError(self.log)
        self.port = int(found[1])

    @property
    def log(self) -> str:
        """All that it has written."""
        return (self._folder / "log").read_text("utf-8")

    def wait_for_log(self, pattern: str) -> None:
        """Wait until the log, which a thread of its own writes, has a pattern."""
        if not wait_for(lambda: re.search(pattern, self.log)):
            raise AssertionError(f"not logged: {pattern}")

    def get(self, path: str = "/health") -> tuple[int, str]:
        """Return the status and the body of an answer."""
        status, body, _ = self.ask(path)
        return status, body

    def ask(self, path: str) -> tuple[int, str, http.client.HTTPMessage]:
        """Return the status, the body and the headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers

    def probe(self, period: float = 0.2) -> None:
        """Ask for /health again and again, until stop_probing()."""

        def run() -> None:
            while not self._probing.wait(period):
                status, _ = self.get()
                self.probes.append((time.time(), status))

        self._probing.clear()
        self._thread = threading.Thread(target=run)
        self._thread.start()

    def stop_probing(self) -> None:
        if self._thread.is_alive():
            self._probing.set()
            self._thread.join()

    def close(self) -> None:
        self.stop_probing()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self._folder)


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def fetch(url: str) -> str | None:
    """Return a body, None if there is no good answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return None


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Return whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class ProcessTest(unittest.TestCase):
    """Processes and servers that end with the test."""

    def metrics(self, body: str = "", status: int = 200) -> Metrics:
        server = Metrics(body, status)
        self.addCleanup(server.close)
        return server

    def receive(self) -> Receiver:
        receiver = Receiver()
        self.addCleanup(receiver.close)
        return receiver

    def program(self, *targets: Metrics, **environ: str) -> Program:
        urls = ",".join(target.url for target in targets)
        environ = {"METRICS_ENDPOINT": urls, **environ} if urls else environ
        program = Program(**environ)
        self.addCleanup(program.close)
        return program


def hostile_page(name: str = "q") -> str:
    """Return an exposition with each hostile label value; {} in a name is its number.

    The name of a label is as odd as an exposition in UTF-8 allows.
    """
    lines = []
    for number, value in enumerate(HOSTILE):
        text = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        labels = f'name="{text}","0.<b>"="1"'
        lines.append(f"{name.format(number)}{{{labels}}} 23\n")
    return "".join(lines)


# -- 1. The real Alertmanager ---------------------------------------------------------


@unittest.skipUnless(shutil.which("prometheus-alertmanager"), "no Alertmanager here")
class AlertmanagerTest(ProcessTest):
    """What the receiver was told is compared with what happened."""

    def setUp(self) -> None:
        self.receiver = self.receive()
        self.alertmanager = Alertmanager(self.receiver)
        self.addCleanup(self.alertmanager.close)
        self.alertmanager.start()
        self.server = self.metrics()

    def watch(self, *targets: Metrics, **environ: str) -> Program:
        """Return a program that tells the Alertmanager, probed all the time."""
        program = self.program(
            *(targets or [self.server]),
            **{
                "UNHEALTHY_WHEN": "Busy: q > 10",
                "ALERTMANAGER_URL": self.alertmanager.url,
                "ALERT_LABELS": "severity=critical",
                "TARGET_LABELS": "job=vllm",
                "POD_NAME": "pod-1",
                **environ,
            },
        )
        program.probe()
        return program

    def queue(self, *values: int) -> float:
        """Give each engine a queue; return the time of that."""
        lines = (f'q{{engine="{n}"}} {value}\n' for n, value in enumerate(values))
        self.server.body = "".join(lines)
        return time.time()

    def expect(self, *told: str, label: str = "engine") -> None:
        """Assert that this is all that the receiver is told, sooner or later."""
        wait_for(lambda: len(self.receiver.record) >= len(told))
        self.assertEqual(self.receiver.told(label), list(told))

    def expect_no_more(self, *told: str, label: str = "engine") -> None:
        """Assert that for two minutes nothing is added."""
        time.sleep(2 * RESEND)
        self.assertEqual(self.receiver.told(label), list(told))

    def active(self) -> list[str]:
        return sorted(a["labels"]["engine"] for a in self.alertmanager.alerts())

    def test_fires_stays_and_resolves(self) -> None:
        self.watch()
        fired = self.queue(23)
        self.expect("firing 0")
        (alert,) = self.alertmanager.alerts()
        self.expect_no_more("firing 0")
        (later,) = self.alertmanager.alerts()
        # It was sent again, and its end moved on.
        self.assertGreater(later["endsAt"], alert["endsAt"])
        resolved = self.queue(3)
        self.expect("firing 0", "resolved 0")
        self.expect_no_more("firing 0", "resolved 0")
        first, last = self.receiver.record
        instance = self.server.instance
        self.assertEqual(
            first.labels,
            {
                "alertname": "Busy",
                "engine": "0",
                "instance": instance,
                "job": "vllm",
                "pod": "pod-1",
                "severity": "critical",
            },
        )
        self.assertEqual(last.labels, first.labels)
        series = f'q{{engine="0", instance="{instance}", job="vllm"}} 23'
        self.assertEqual(
            first.alert["annotations"],
            {
                "summary": f"Busy: {series}",
                "description": f"The rule Busy: q > 10 fires for {series}",
                "value": "23",
            },
        )
        self.assertRegex(first.alert["generatorURL"], r"^http://pod-1:\d+/$")
        self.assertEqual(last.at("startsAt"), first.at("startsAt"))
        for name, moment, at, told in (
            ("fired", fired, first.at("startsAt"), first.time),
            ("resolved", resolved, last.at("endsAt"), last.time),
        ):
            print(f"{name}: checked {at - moment:.2f} s, told {told - moment:.2f} s on")
            self.assertLess(-0.01, at - moment)
            self.assertLess(told - moment, PATIENCE)

    def test_one_of_two_series_resolves(self) -> None:
        self.watch()
        self.queue(23, 24)
        wait_for(lambda: len(self.receiver.record) >= 2)
        self.assertEqual(sorted(self.receiver.told("engine")), ["firing 0", "firing 1"])
        told = self.receiver.told("engine")
        self.queue(23, 3)
        self.expect(*told, "resolved 1")
        self.expect_no_more(*told, "resolved 1")
        self.assertEqual(self.active(), ["0"])
        self.queue(3, 3)
        self.expect(*told, "resolved 1", "resolved 0")

    def test_one_of_two_pods_with_the_same_endpoint_resolves(self) -> None:
        # Their labels differ in the pod alone, as those of localhost:8000 in two pods.
        self.queue(23)
        pods = [self.watch(POD_NAME=name) for name in ("pod-1", "pod-2")]
        wait_for(lambda: len(self.receiver.record) >= 2)
        told = self.receiver.told("pod")
        self.assertEqual(sorted(told), ["firing pod-1", "firing pod-2"])
        # Only the second is asked after the queue is gone, then the first.
        pods[0].stop_probing()
        self.queue(3)
        self.expect(*told, "resolved pod-2", label="pod")
        self.assertEqual(self.active(), ["0"])
        pods[0].probe()
        self.expect(*told, "resolved pod-2", "resolved pod-1", label="pod")

    def test_an_alert_ends_by_itself_when_probes_stop(self) -> None:
        program = self.watch()
        self.queue(23)
        self.expect("firing 0")
        time.sleep(RESEND)
        program.stop_probing()
        last = program.probes[-1][0]
        self.expect("firing 0", "resolved 0")
        end = self.receiver.record[-1].at("endsAt") - last
        print(f"ended {end:.2f} s after the last verdict; a lifetime is {LIFETIME} s")
        self.assertLess(LIFETIME - 1, end)
        self.assertLess(end, LIFETIME + 0.1)
        program.probe()
        again = time.time()
        self.expect("firing 0", "resolved 0", "firing 0")
        print(f"told again {self.receiver.record[-1].time - again:.2f} s later")

    def test_an_alert_ends_by_itself_when_the_program_is_gone(self) -> None:
        program = self.watch()
        self.queue(23)
        self.expect("firing 0")
        program.stop_probing()
        program.process.terminate()
        self.assertEqual(program.process.wait(), 0)
        time.sleep(RESEND)
        self.expect_no_more("firing 0")
        self.expect("firing 0", "resolved 0")

    def test_a_restart_while_firing(self) -> None:
        program = self.watch()
        self.queue(23)
        self.expect("firing 0")
        self.alertmanager.stop()
        wait_for(lambda: "WARNING Alertmanager" in program.log)
        self.alertmanager.start()
        # It remembers whom it has told, but not the alerts.
        self.assertTrue(wait_for(lambda: self.active() == ["0"]))
        wait_for(lambda: "takes alerts again" in program.log)
        self.expect_no_more("firing 0")
        self.queue(3)
        self.expect("firing 0", "resolved 0")
        self.assert_logged_once(program)

    def test_it_is_down_while_one_resolves_and_another_fires(self) -> None:
        program = self.watch()
        self.queue(23, 3, 3)
        self.expect("firing 0")
        self.alertmanager.stop()
        self.queue(3, 24, 3)
        time.sleep(RESEND)
        # The third begins and ends unseen.
        fired = self.queue(3, 24, 25)
        time.sleep(RESEND)
        self.queue(3, 24, 3)
        time.sleep(RESEND)
        self.alertmanager.start()
        wait_for(lambda: len(self.receiver.record) >= 3)
        told = self.receiver.told("engine")
        self.assertEqual(sorted(told), ["firing 0", "firing 1", "resolved 0"])
        self.expect_no_more(*told)
        self.assertEqual(self.active(), ["1"])
        (second,) = (n for n in self.receiver.record if n.labels["engine"] == "1")
        self.assertLess(second.at("startsAt"), fired)
        self.assert_logged_once(program)

    def test_of_two_the_one_that_is_up_is_told_and_the_other_logged_once(self) -> None:
        other = Alertmanager(self.receiver)
        self.addCleanup(other.close)
        urls = f"{self.alertmanager.url},{other.url}"
        program = self.watch(ALERTMANAGER_URL=urls)
        self.queue(23)
        self.expect("firing 0")
        self.expect_no_more("firing 0")
        self.assertEqual(program.log.count("WARNING Alertmanager"), 1)
        self.assertIn(f"WARNING Alertmanager {other.url}: refused", program.log)
        _, metrics = program.get("/metrics")
        for what, who in (("sent", self.alertmanager), ("failed", other)):
            of = f'alertmanager="{who.url}"'
            name = f"health_check_notifications_{what}_total"
            self.assertRegex(metrics, rf"{name}\{{{re.escape(of)}\}} [1-9]")
        other.start()
        self.expect("firing 0", "firing 0")
        self.queue(3)
        wait_for(lambda: len(self.receiver.record) >= 4)
        self.assertEqual(self.receiver.told("engine")[2:], ["resolved 0"] * 2)
        self.assert_logged_once(program, other)

    def assert_logged_once(
        self, program: Program, which: Alertmanager | None = None
    ) -> None:
        """Assert one line when delivery failed, one when it recovered, no other."""
        url = (which or self.alertmanager).url
        again = f"Alertmanager {url}: takes alerts again"
        self.assertTrue(wait_for(lambda: again in program.log), program.log)
        lines = [line for line in program.log.splitlines() if "Alertmanager" in line]
        self.assertEqual(len(lines), 2, lines)
        self.assertIn(f" WARNING Alertmanager {url}: ", lines[0])
        self.assertIn(f" INFO {again}", lines[1])

    def test_a_frozen_one_delays_no_probe_and_gets_the_truth(self) -> None:
        # The kernel takes its connections, and nobody ever answers.
        self.queue(23)
        frozen = self.watch()
        self.expect("firing 0")
        self.alertmanager.send_signal(signal.SIGSTOP)
        alone = self.program(self.server, UNHEALTHY_WHEN="Busy: q > 10")
        frozen.stop_probing()
        times: dict[Program, list[float]] = {frozen: [], alone: []}
        started = time.monotonic()
        for tick in range(int(LONG * 50)):
            time.sleep(max(0.0, started + tick / 50 - time.monotonic()))
            # Alternately, so that the noise of the machine meets both.
            for program in sorted(times, key=id, reverse=tick % 2 > 0):
                before = time.perf_counter()
                self.assertEqual(program.get()[0], 503)
                times[program].append(time.perf_counter() - before)
        lines = {}
        for name, program in (("frozen", frozen), ("none", alone)):
            p50, p99 = median(times[program]), quantiles(times[program], n=100)[98]
            lines[name] = p50, p99, max(times[program])
            text = ", ".join(f"{1000 * seconds:.2f} ms" for seconds in lines[name])
            print(f"Alertmanager {name}: p50, p99, max of /health: {text}")
        # Who waited for it would wait for ten seconds.
        self.assertLess(lines["frozen"][2], hc.SEND_TIMEOUT / 2)
        self.queue(3)
        frozen.probe()
        time.sleep(1)
        self.alertmanager.send_signal(signal.SIGCONT)
        self.expect("firing 0", "resolved 0")

    def test_hostile_label_values_arrive_as_they_are(self) -> None:
        self.server.body = hostile_page()
        self.watch()
        wait_for(lambda: len(self.receiver.record) >= len(HOSTILE))
        told = [notification.labels["name"] for notification in self.receiver.record]
        self.assertEqual(sorted(told), sorted(HOSTILE))
        # As Prometheus escapes a name for those who do not know UTF-8 in one.
        name = "U___30__2e__3c_b_3e_"
        self.assertEqual(self.receiver.told(name), ["firing 1"] * len(HOSTILE))


# -- 2. The real Prometheus -----------------------------------------------------------

PROMETHEUS = """
global:
  scrape_interval: 1s
scrape_configs:
- job_name: checker
  static_configs:
  - targets: ['127.0.0.1:{port}']
"""
# All there are, and the labels of each.
FAMILIES = {
    "health_check_healthy": set(),
    "health_check_verdict_timestamp_seconds": set(),
    "health_check_rule_state": {"rule", "state"},
    "health_check_rule_series": {"rule"},
    "health_check_rule_value": {"rule"},
    "health_check_rule_limit": {"rule"},
    "health_check_target_up": {"target"},
    "health_check_target_watched": {"target"},
    "health_check_scrapes": {"target", "outcome"},
    "health_check_scrape_duration_seconds": {"le"},
    "health_check_requests": {"path", "code"},
    "health_check_unknown_rule_requests": set(),
    "health_check_notifications_sent": {"alertmanager"},
    "health_check_notifications_failed": {"alertmanager"},
    "probe_success": {"probe", "target"},
    "probe_http_status_code": {"probe", "target"},
    "probe_duration_seconds": {"probe", "target"},
    "health_check_build_info": {"version", "python"},
    "process_start_time_seconds": set(),
    "process_cpu_seconds": set(),
    "process_resident_memory_bytes": set(),
}  # type: dict[str, set[str]]
CHANGES = (3, 23, 24, 3)


@unittest.skipUnless(shutil.which("prometheus"), "no Prometheus here")
class PrometheusTest(ProcessTest):
    """It scrapes /metrics each second while everything that can change does."""

    def setUp(self) -> None:
        self.server = self.metrics("q 3\n")
        self.checker = self.program(
            self.server,
            UNHEALTHY_WHEN="Busy: q > 10; Soon: q > 10 for 1h; Odd: rate(q[1m]) > q",
            ALERTMANAGER_URL=f"http://127.0.0.1:{free_port()}/api/v2/alerts",
            HEALTH_ENDPOINT=self.server.url,
        )
        self.checker.get()

    def start_prometheus(self) -> str:
        """Start it; return its address."""
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        config, self.log = folder / "prometheus.yml", folder / "log"
        config.write_text(PROMETHEUS.format(port=self.checker.port))
        address = f"127.0.0.1:{free_port()}"
        with open(self.log, "wb") as log:
            process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                    "--log.level=debug",
                ],
                stdout=log,
                stderr=log,
            )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        ready = f"http://{address}/-/ready"
        self.assertTrue(wait_for(lambda: fetch(ready) is not None))
        return f"http://{address}/api/v1/"

    def change_everything(self) -> None:
        """Fire, resolve, fail, come back; be asked for much that is not there."""
        started, turn = time.monotonic(), 0
        while time.monotonic() - started < LONG:
            self.server.status = 500 if turn % 5 == 4 else 200
            self.server.body = f"q {CHANGES[turn % len(CHANGES)]}\n"
            for path in ("", "?verbose", "?format=json", "/Busy", f"/{turn}"):
                self.checker.get(f"/health{path}")
            for path in ("/", "/livez", f"/{turn}"):
                self.checker.get(path)
            time.sleep(0.3)
            turn += 1
        self.server.status, self.server.body = 200, "q 23\n"
        self.checker.get()

    def exposed(self) -> set[hc.Labels]:
        """Return the series that the text has now."""
        _, text = self.checker.get("/metrics")
        return {
            tuple(sorted({"__name__": sample.name, **sample.labels}.items()))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def test_all_is_ingested_and_nothing_stale_or_twice(self) -> None:
        api = self.start_prometheus()

        def ask(query: str) -> list[dict[str, Any]]:
            query = urllib.parse.quote(query)
            answer = json.loads(fetch(f"{api}query?query={query}") or "{}")
            result: list[dict[str, Any]] = answer["data"]["result"]
            return result

        self.assertTrue(wait_for(lambda: ask("up")))
        self.change_everything()
        # Of what is asked from here on nothing is new.
        self.checker.get("/metrics")
        time.sleep(2.5)
        wanted = self.exposed()
        found: set[hc.Labels] = set()
        names = "(health_check|probe|process).*"
        for result in ask(f'{{job="checker", __name__=~"{names}"}}'):
            labels = result["metric"]
            self.assertEqual(labels.pop("job"), "checker")
            self.assertEqual(labels.pop("instance"), f"127.0.0.1:{self.checker.port}")
            found.add(tuple(sorted(labels.items())))
        self.assertEqual(found, wanted)
        for query, value in (
            ("min_over_time(up[2m])", 1),
            ("scrape_samples_scraped", len(wanted)),
            ("scrape_samples_post_metric_relabeling", len(wanted)),
            ("health_check_rule_value{rule='Busy'}", 23),
            ("resets(health_check_requests_total{code='200', path='/livez'}[2m])", 0),
        ):
            with self.subTest(query):
                self.assertEqual([float(r["value"][1]) for r in ask(query)], [value])
        scrapes = int(ask("count_over_time(up[2m])")[0]["value"][1])
        for name in {dict(labels)["__name__"] for labels in found}:
            (counted,) = ask(f"max(count_over_time({name}[2m]))")
            # A scrape may have come between the two questions.
            self.assertLess(abs(int(counted["value"][1]) - scrapes), 3, name)
        log = self.log.read_text("utf-8")
        for line in log.splitlines():
            if 'component="scrape manager"' in line:
                self.assertRegex(line, "level=(debug|info)")
            self.assertNotRegex(line, "(?i)duplicate|out of order|append failed")
        print(f"Prometheus: {scrapes} scrapes of {len(wanted)} series")

    def test_every_family_is_there_with_help_type_and_bounded_labels(self) -> None:
        self.server.body = "q 23\n"
        for path in ("/health", "/health/Busy", "/nope", "/health/nope"):
            self.checker.get(path)
        name = "health_check_notifications_failed_total{"
        wait_for(lambda: name in self.checker.get("/metrics")[1])
        self.checker.get("/metrics")
        before = self.exposed()
        for number in range(500):
            self.checker.get(f"/{number}")
            self.checker.get(f"/health/{number}?{number}")
        self.assertEqual(self.exposed(), before)
        _, text = self.checker.get("/metrics")
        families = {f.name: f for f in text_string_to_metric_families(text)}
        self.assertEqual(set(families), set(FAMILIES))
        for name, labels in FAMILIES.items():
            with self.subTest(name):
                family = families[name]
                self.assertTrue(family.documentation)
                self.assertNotEqual(family.type, "unknown")
                found = {label for s in family.samples for label in s.labels}
                self.assertEqual(found, labels)
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False
        )
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))


# -- 3. The page, in the eyes of a validator ------------------------------------------

TREE = html5lib.getTreeBuilder("etree")
XHTML = "{http://www.w3.org/1999/xhtml}"


class PageTest(ProcessTest):
    """The page of each state is valid HTML without a script, and shows the state."""

    def page(self, program: Program) -> Any:
        """Return the tree of the page; AssertionError if it is not valid or safe."""
        status, text, headers = program.ask("/")
        self.assertEqual(status, 200 if "<h1>Healthy" in text else 503)
        self.assertEqual(headers["Content-Type"], "text/html; charset=utf-8")
        policy = headers["Content-Security-Policy"]
        self.assertRegex(policy, "default-src 'none'; style-src 'sha256-[^' ]+=';")
        self.assertNotIn("unsafe", policy)
        # A parse error is an exception.
        tree = html5lib.HTMLParser(TREE, strict=True).parse(text)
        known = set(
            "html head meta title style body header h1 h2 p time main section code svg"
            " path footer br a figure figcaption details summary wbr".split()
        )
        for element in tree.iter():
            self.assertIn(element.tag.rpartition("}")[2], known)
            for attribute in element.attrib:
                self.assertFalse(attribute.startswith("on"), attribute)
                self.assertNotIn(attribute, ("src", "style"))
        links = {e.attrib["href"] for e in tree.iter() if "href" in e.attrib}
        self.assertEqual(links, {"health?verbose", "metrics", "?still"})
        (refresh,) = (m for m in tree.iter(f"{XHTML}meta") if "http-equiv" in m.attrib)
        self.assertEqual(refresh.attrib, {"http-equiv": "refresh", "content": "5"})
        return tree

    def text(self, tree: Any) -> str:
        return "\n".join(tree.find(f"{XHTML}body").itertext())

    def test_each_state(self) -> None:
        server = self.metrics("q 3\n")
        rules = "Busy: q > 10 for 2s; Even: q > 10 and q < 30"
        program = self.program(server, UNHEALTHY_WHEN=rules)
        for body, seconds, expected in (
            ("q 3\n", 0.0, ("Healthy", "3, limit 10", "1 series, 4 bytes in")),
            ("q 40\n", 0.0, ("40, limit 10, for 0s: fires after 2s", "q > 10 for 2s")),
            ("q 40\n", 2.0, ("Unhealthy: Busy", "40, limit 10, for 0s", "q{instance=")),
            ("q 23\n", 0.0, ("Unhealthy: Busy, Even", "q > 10 and q < 30")),
            ("q 3\nq\n", 0.0, ("Down", "not a sample", f"scrape of {server.instance}")),
            ("", 0.0, ("Healthy", "no series of it is there", "0 series, 0 bytes in")),
        ):
            with self.subTest(expected):
                server.body = body
                time.sleep(seconds)
                program.get()
                before = program.get("/metrics")[1]
                tree = self.page(program)
                for part in (*expected, "checked 0s ago", "20"):
                    self.assertIn(part, self.text(tree))
                # Looking at it starts no check.
                pattern = r"health_check_scrape_duration_seconds_count (\d+)"
                counts = re.findall(pattern, before + program.get("/metrics")[1])
                self.assertEqual(counts[0], counts[1])
        # Busy alone is compared with a number.
        (_,) = (p for p in tree.iter() if p.attrib.get("class") == "limit")

    def test_at_most_120_checks_are_drawn(self) -> None:
        server = self.metrics("q 3\n")
        program = self.program(server, UNHEALTHY_WHEN="Busy: q > 10")
        for number in range(130):
            server.body = f"q {number}\n"
            program.get()
        busy = next(self.page(program).iter(f"{XHTML}figure"))
        caption = "".join(busy.itertext())
        self.assertRegex(caption, r"\Ahighest 129, limit 10, last \d+s\Z")
        paths = [e for e in busy.iter() if e.tag.endswith("}path")]
        (line,) = (e for e in paths if "class" not in e.attrib)
        self.assertEqual(len(re.findall("[ML]", line.attrib["d"])), 120)
        self.assertTrue(line.attrib["d"].startswith("M0 "), line.attrib)

    def test_hostile_label_values_are_text_wherever_they_are_shown(self) -> None:
        receiver = self.receive()
        rules = "; ".join(f"R{n}: q{n} > 10" for n in range(len(HOSTILE)))
        program = self.program(
            self.metrics(hostile_page("q{}")),
            UNHEALTHY_WHEN=rules,
            ALERTMANAGER_URL=f"http://127.0.0.1:{receiver.server_port}/",
        )
        self.assertEqual(program.get()[0], 503)
        wait_for(lambda: len(receiver.record) == len(HOSTILE))
        written = [f"name={hc.quote(value)}}} 23" for value in HOSTILE]
        lines = {
            "page": self.text(self.page(program)).split("\n"),
            "verbose": program.get("/health?verbose")[1].split("\n"),
        }
        program.wait_for_log("Unhealthy: R0")
        lines["log"] = program.log.split("\n")
        for place, found in lines.items():
            for value in written:
                with self.subTest(place, value=value):
                    (line,) = (x for x in found if value in x)
                    self.assertIn('{"0.<b>"="1", instance="127.0.0.1:', line)
        known = [*hc.load_config({"UNHEALTHY_WHEN": rules}).rules, "Unhealthy", ""]
        self.assertEqual(len(lines["verbose"]), len(known))
        for line in lines["log"][:-1]:
            self.assertRegex(line, r"\A\d{4}-\d\d-\d\dT\S+ (INFO|WARNING) ")
            self.assertEqual(line, hc.escape_controls(line))
        checks = json.loads(program.get("/health?format=json")[1])["checks"]
        for number, value in enumerate(HOSTILE):
            (series,) = checks[f"R{number}"][0]["series"]
            self.assertEqual(series["labels"]["name"], value)
        posted = {n.labels["alertname"]: n.labels["name"] for n in receiver.record}
        self.assertEqual(posted, {f"R{n}": value for n, value in enumerate(HOSTILE)})
        # The metrics have no label from outside, and are whole.
        _, text = program.get("/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.assertTrue(set(sample.labels) <= set().union(*FAMILIES.values()))


# -- 4. Each failure, and where its reason can be read --------------------------------

README = (PROGRAM.parent / "README.md").read_text("utf-8")
PATCHED = """
import sys, health_check
def broken(*_):
    raise {error}("broken on purpose")
health_check.{name} = broken
sys.exit(health_check.main())
"""


class FailuresTest(ProcessTest):
    """Each line of the README's table is tried; a line more needs a test more."""

    def test_the_table_has_these_lines(self) -> None:
        table = README.partition("| what went wrong |")[2].partition("\n\n")[0]
        lines = [line.split(" | ") for line in table.splitlines()[2:]]
        tried = (
            ("a rule fires", "verbose", "json", "`/`", "log", "rule_state", "alert"),
            ("a scrape fails", "the same", "scrape_error", "scrapes_total"),
            ("a rule cannot be evaluated", "as if it fired", "no alert"),
            ("the configuration is wrong", "stderr", "exit status 2"),
            ("an Alertmanager takes nothing", "log", "notifications_failed_total"),
            ("the checker itself fails", "traceback", "verbose", "bug", "/livez"),
        )
        self.assertEqual(len(lines), len(tried))
        for (what, where), (name, *parts) in zip(lines, tried):
            self.assertEqual(what.strip("| "), name)
            for part in parts:
                self.assertIn(part, where)

    def assert_read(
        self, program: Program, reason: str, in_page: str, in_json: str, *,
        log: str, metric: str,
    ) -> None:  # fmt: skip
        """Assert that a reason is in all the places of the first line but the alert."""
        program.wait_for_log(f"WARNING {log}")
        _, metrics = program.get("/metrics")
        page = html.unescape(program.get("/")[1])
        status, body = program.get("/health?format=json")
        document = json.loads(body)
        self.assertEqual((status, document["status"]), (503, "fail"))
        self.assertRegex(json.dumps(document["checks"]), in_json)
        self.assertRegex(program.get("/health?verbose")[1], rf"(?m)^\[-\].*{reason}")
        self.assertRegex(page, in_page)
        self.assertIn(f"\n{metric} 1\n", metrics)

    def alerting(self, *targets: Metrics, **environ: str) -> tuple[Program, Receiver]:
        receiver = self.receive()
        url = f"http://127.0.0.1:{receiver.server_port}/"
        return self.program(*targets, ALERTMANAGER_URL=url, **environ), receiver

    def test_a_rule_fires(self) -> None:
        server = self.metrics('q{name="x"} 23\n')
        program, receiver = self.alerting(server, UNHEALTHY_WHEN="Busy: q > 10")
        self.assertEqual(program.get(), (503, "Unhealthy\n"))
        state = 'health_check_rule_state{rule="Busy", state="firing"}'
        series = r'q\{instance="[^"]+", name="x"\} 23'
        reason = f"firing for 0s: {series}"
        log = f"Busy: {reason}"
        self.assert_read(program, reason, series, '"value": 23', log=log, metric=state)
        self.assertTrue(wait_for(lambda: receiver.record))
        annotations = receiver.record[0].alert["annotations"]
        self.assertRegex(annotations["description"], f"q > 10 fires for {series}")

    def test_a_rule_cannot_be_evaluated(self) -> None:
        server = self.metrics('q{name="x"} 23\nq{name="y"} 1\nr 1\n')
        rules = "Odd: r + on() q > 1"
        program, receiver = self.alerting(server, UNHEALTHY_WHEN=rules)
        self.assertEqual(program.get(), (503, "Unhealthy\n"))
        state = 'health_check_rule_state{rule="Odd", state="error"}'
        reason = "many-to-many"
        log = f"Odd: error: {reason}"
        self.assert_read(program, reason, reason, reason, log=log, metric=state)
        self.assertEqual(receiver.record, [])

    def test_a_scrape_fails(self) -> None:
        server = self.metrics("q 3\n")
        rules = 'Why: scrape_error{reason="http_status"}'
        program, receiver = self.alerting(server, UNHEALTHY_WHEN=rules)
        self.assertEqual(program.get(), (200, "Healthy\n"))
        server.status = 500
        self.assertEqual(program.get(), (503, "Unhealthy\n"))
        reason = "http_status: HTTP 500"
        log = f"{server.instance}: scrape failed: {reason}"
        state = 'health_check_rule_state{rule="Why", state="firing"}'
        shown = f"{server.url} answers: HTTP 500"
        self.assert_read(program, reason, shown, reason, log=log, metric=state)
        outcome = f'{{target="{server.instance}", outcome="http_status"}}'
        self.assertIn(f"scrapes_total{outcome} ", program.get("/metrics")[1])
        self.assertTrue(wait_for(lambda: len(receiver.record) == 2))
        for told in receiver.record:
            self.assertIn(reason, told.alert["annotations"]["description"])
        server.status = 200
        self.assertEqual(program.get(), (200, "Healthy\n"))
        again = f"INFO {server.instance}: scraped again"
        program.wait_for_log(again)

    def test_the_configuration_is_wrong(self) -> None:
        wrong = {"APP_PORT": "x", "UNHEALTHY_WHEN": "q >", "ALERTMANAGER_URL": "x"}
        done = subprocess.run(
            [sys.executable, str(PROGRAM)],
            env={**os.environ, **wrong},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        for name in wrong:
            self.assertIn(name, done.stderr)

    def test_a_selector_matches_nothing(self) -> None:
        server = self.metrics("queue 3\n")
        program = self.program(server, UNHEALTHY_WHEN="Busy: queu > 10")
        self.assertEqual([program.get()[0] for _ in range(3)], [200] * 3)
        self.assertIn("[+]Busy ok (no series)\n", program.get("/health?verbose")[1])
        self.assertIn('rule_series{rule="Busy"} 0', program.get("/metrics")[1])
        told = "no series of queu is there; queue is"
        program.wait_for_log(told)
        self.assertEqual(program.log.count(told), 1)

    def test_an_Alertmanager_takes_nothing(self) -> None:
        receivers = [self.metrics(status=status) for status in (200, 400)]
        server = self.metrics("q 23\n")
        # The first does not know POST.
        urls = [*(r.url for r in receivers), f"http://127.0.0.1:{free_port()}/"]
        program = self.program(
            server, UNHEALTHY_WHEN="Busy: q > 10", ALERTMANAGER_URL=",".join(urls)
        )
        program.get()
        self.assertTrue(wait_for(lambda: program.log.count("WARNING Alertm") == 3))
        time.sleep(2 * RESEND)
        self.assertEqual(program.log.count("WARNING Alertm"), 3)
        for url, reason in zip(urls, ("HTTP 501", "HTTP 501", "refused")):
            shown = f"{url.rstrip('/')}/api/v2/alerts"
            self.assertIn(f"WARNING Alertmanager {shown}: {reason}", program.log)
            name = f'notifications_failed_total{{alertmanager="{shown}"}}'
            self.assertRegex(program.get("/metrics")[1], rf"{re.escape(name)} [1-9]")

    def test_the_checker_itself_fails(self) -> None:
        server, bug = self.metrics("q 3\n"), f"ERROR {hc.BUG}"
        broken, stuck = "bug: RuntimeError: broken on purpose", "no verdict within the"
        for name, error, reason, log in (
            # In one rule, in all of a check; and no thread is left.
            ("judge", "RuntimeError", f"error: {broken}", bug),
            ("Evaluation", "RuntimeError", broken, bug),
            ("transitions", "KeyboardInterrupt", stuck, "ERROR the thread scrape "),
        ):
            with self.subTest(name, error=error):
                program = Program(
                    PATCHED.format(name=name, error=error),
                    METRICS_ENDPOINT=server.url,
                    METRICS_TIMEOUT="0.5",
                )
                self.addCleanup(program.close)
                self.assertEqual(program.get(), (503, "Unhealthy\n"))
                self.assertIn(reason, program.get("/health?verbose")[1])
                program.wait_for_log(re.escape(log))
                program.wait_for_log("Traceback ")
                alive = 503 if reason == stuck else 200
                self.assertEqual(program.get("/livez")[0], alive)


# -- 5. A quiet log -------------------------------------------------------------------


class QuietTest(ProcessTest):
    def test_10000_probes_of_a_healthy_server_log_nothing_after_the_start(self) -> None:
        server, lines = self.metrics("q 3\n"), []  # type: tuple[Metrics, list[str]]
        clock = [1000.0]
        config = hc.load_config({
            "METRICS_ENDPOINT": server.url, "UNHEALTHY_WHEN": "Busy: q > 10 for 1m",
            "METRICS_TIMEOUT": "30",
        })  # fmt: skip
        monitor = hc.Monitor(config, clock=lambda: clock[0])
        published = threading.Event()
        monitor.listeners[:] = [hc.log_transitions, lambda *_: published.set()]

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(record.getMessage())

        hc.LOG.handlers[:], hc.LOG.propagate = [Handler()], False
        hc.LOG.setLevel("INFO")
        monitor.start()
        self.addCleanup(monitor.stop)
        for _ in range(10000):
            published.clear()
            monitor.request(monitor.verdict.sequence)
            self.assertTrue(published.wait(PATIENCE))
            clock[0] += 1
        self.assertEqual(lines, ["Healthy"])


if __name__ == "__main__":
    unittest.main()
