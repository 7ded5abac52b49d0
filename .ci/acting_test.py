"""What a firing rule can do: end a real process, and fire in a Prometheus as well."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

import health_check as hc

PROGRAM = str(Path(hc.__file__).resolve())
Labels = Tuple[Tuple[str, str], ...]
Course = Callable[[int], Optional[float]]

# -- 1. The exit status that restarts a pod -------------------------------------------


class Engine:
    """Serves the page of an engine that works until it is told to hang."""

    def __init__(self) -> None:
        engine = self
        self.hangs, self.count = False, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                engine.count += not engine.hangs
                body = f"run 4\ntokens {engine.count}\n".encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class ExitStatus(unittest.TestCase):
    """A real process, its exit status, and the file that it leaves."""

    def setUp(self) -> None:
        self.engine = Engine()
        self.addCleanup(self.engine.close)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.file = Path(directory.name, "last words")

    @contextlib.contextmanager
    def running(self, *before: str, **settings: str) -> Iterator[Any]:
        """Start the program, and yield it with a way to read its log."""
        environ = {
            **os.environ,
            "METRICS_ENDPOINT": self.engine.url,
            "SCRAPE_INTERVAL": "0.1",
            "METRICS_TIMEOUT": "0.1",
            "APP_HOST": "127.0.0.1",
            "APP_PORT": "0",
            "UNHEALTHY_WHEN": "Stalled: run > 0 unless changes(tokens[300ms]) > 0"
            " for 200ms; Other: run > 5",
            "EXIT_WHEN": "Stalled",
            "EXIT_AFTER": "0s",
            "LAST_WORDS": str(self.file),
            **settings,
        }
        command = [*before, sys.executable, PROGRAM]
        if before[-1:] == ("-c",):
            command = [*before, f"{sys.executable} {PROGRAM}; exit $?"]
        with tempfile.NamedTemporaryFile("r") as log, subprocess.Popen(
            command, env=environ, stdout=log.fileno(), stderr=log.fileno()
        ) as process:
            try:
                yield process, lambda: Path(log.name).read_text("utf-8")
            finally:
                process.kill()

    def wait_for(self, text: str, log: Callable[[], str]) -> None:
        end = time.monotonic() + 10
        while text not in log() and time.monotonic() < end:
            time.sleep(0.02)
        self.assertIn(text, log())

    def test_a_rule_that_fires_ends_it_with_88(self) -> None:
        pid_1 = ("unshare", "--fork", "--pid", "--mount-proc")
        for before in (), ("sh", "-c"), pid_1, (*pid_1, "sh", "-c"):
            if before[:1] == ("unshare",) and os.getuid():
                continue
            with self.subTest(before), self.running(*before) as (process, log):
                self.engine.hangs = False
                self.wait_for("INFO Healthy", log)
                self.assertIn("(for restartPolicyRules of Kubernetes 1.36)", log())
                self.engine.hangs = True
                self.assertEqual(process.wait(10), 88)
                self.assertEqual(log().count("exit status 88: Stalled; "), 1)
                told = self.file.read_text("utf-8")
                self.assertIn("tokens{", told)
                self.file.unlink()
                self.assertRegex(told, r"\A\d{4}-.*Z exit status 88: Stalled; .*\n\Z")

    def test_the_next_start_tells_why(self) -> None:
        self.file.write_text("2026 exit status 88: Stalled; tokens <stood>\n", "utf-8")
        with self.running() as (_, log):
            self.wait_for("WARNING the run before ended so: 2026 exit status 88", log)
            port = re.findall(r"is up: port (\d+)", log())[0]
            self.wait_for("Healthy", log)
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
            self.assertIn("exit status 88: Stalled; tokens &lt;stood&gt;", page)

    def test_not_before_it_was_healthy_once(self) -> None:
        self.engine.hangs = True
        rules = "Stalled: run > 0 unless changes(tokens[300ms]) > 0; Other: run > 5"
        with self.running(UNHEALTHY_WHEN=rules) as (process, log):
            self.wait_for("Stalled: firing", log)
            with self.assertRaises(subprocess.TimeoutExpired):
                process.wait(1.0)
            self.engine.hangs = False
            self.wait_for("INFO Healthy", log)
            self.engine.hangs = True
            self.assertEqual(process.wait(10), 88)

    def test_not_within_EXIT_AFTER_of_its_start(self) -> None:
        with self.running(EXIT_AFTER="3s") as (process, log):
            self.wait_for("Healthy", log)
            started, self.engine.hangs = time.monotonic(), True
            self.wait_for("Stalled: firing", log)
            self.assertEqual(process.wait(10), 88)
            self.assertGreater(time.monotonic() - started, 2.0)

    def test_a_rule_that_is_not_there_is_an_error_at_start(self) -> None:
        with self.running(EXIT_WHEN="Stalled,Unresponsive") as (process, log):
            self.assertEqual(process.wait(10), 2)
            self.assertIn("EXIT_WHEN: no rule Unresponsive", log())


# -- 2. The same rules in a Prometheus ------------------------------------------------

# No range is a multiple of it: for Prometheus 2 a range has its left end, too.
STEP, STEPS = 11, 90
RULES = """
  Above: x > 2
  Held: x > 2 for 30s
  Kept: x > 4 keep_firing_for 1m
  Both: x > 2 and on (instance) y > 1 for 20s
  Either: x > 5 or y > 2
  Unless: x > 0 unless on (instance) y > 0
  Still: x > 0 unless changes(x[1m]) > 0
  StillLong: delta(x[2m]) == 0 for 1m
  Rate: rate(y[1m]) > 0.05
  Increase: increase(y[2m]) > 5 for 40s
  Most: max_over_time(x[90s]) > 5
  Mean: avg_over_time(x[1m]) > 2.5
  Sum: sum(x) > 5
  By: sum by (instance) (x) > 3
  Gone: absent(z)
  Ratio: x / on (instance, engine) y > 2
  Bool: (x > bool 2) + (x < bool 1) == 1
  Down: scrape_error{reason!="timeout"}
  DownLong: scrape_error for 40s
  DownAll: count(scrape_error) > 0
  DownOften: sum_over_time(scrape_error[125s]) > 0
"""


def bursts(step: int) -> float:
    """Return a gauge that rises, stands still and falls."""
    return float((0, 1, 3, 3, 3, 3, 3, 6, 6, 2, 2, 0)[step // 5 % 12])


def counts(step: int) -> float:
    """Return a counter that stands still for a third of the time."""
    return float(3 * min(step % 30, 20) + 60 * (step // 30))


def user_series() -> dict[str, Course]:
    """Return series for the rules above."""
    return {
        'x{engine="0", instance="a:1"}': bursts,
        'x{engine="1", instance="a:1"}': lambda n: bursts(n + 17),
        'y{engine="0", instance="a:1"}': lambda n: counts(n) if n % 40 < 30 else None,
        'z{instance="a:1"}': lambda n: 1.0 if n < 20 else None,
        'up{instance="a:1"}': lambda n: float(not 50 <= n < 60),
        'scrape_error{instance="a:1", reason="refused"}':
            lambda n: 1.0 if 50 <= n < 60 else None,
    }  # fmt: skip


def vllm_series() -> dict[str, Course]:
    """Return a vLLM that is full, then hangs with requests in flight, then goes on."""
    labels = '{engine="0", instance="a:1", model_name="m"}'
    hung = range(30, 75)
    tokens = [100.0 * (n if n not in hung else 30) for n in range(STEPS)]
    return {
        f"vllm:num_requests_running{labels}": lambda _: 4.0,
        f"vllm:num_requests_waiting{labels}": lambda n: 30.0 if n < 12 else 3.0,
        f"vllm:generation_tokens_total{labels}": lambda n: tokens[n],
        f"vllm:prompt_tokens_total{labels}": lambda n: tokens[n] // 10,
        f"vllm:kv_cache_usage_perc{labels}": lambda n: 0.5,
        'up{instance="a:1"}': lambda n: float(not 80 <= n < 85),
        'scrape_error{instance="a:1", reason="refused"}':
            lambda n: 1.0 if 80 <= n < 85 else None,
    }  # fmt: skip


def firing(
    rules: Sequence[hc.Rule], series: dict[str, Course]
) -> dict[str, list[list[Labels]]]:
    """Return by rule the alerts that fire after each check, as the program has them."""
    parsed = {
        tuple(sorted(hc.parse_series(name.encode()).items())): course
        for name, course in series.items()
    }
    read, limit = hc.lookbacks(r.expr for r in rules), hc.load_config({}).history_limit
    history = hc.History(read, limit)
    statuses = [hc.RuleStatus(rule) for rule in rules]
    found: dict[str, list[list[Labels]]] = {rule.name: [] for rule in rules}
    for step in range(STEPS):
        now = float(step * STEP)
        values = {labels: course(step) for labels, course in parsed.items()}
        there = {labels: v for labels, v in values.items() if v is not None}
        history.record(there, now, history.names)
        evaluation = history.evaluation(now, now)
        statuses = [hc.judge(status, evaluation) for status in statuses]
        for status in statuses:
            assert not status.error, status.error
            # Prometheus has no reason of a failure.
            alerts = [
                tuple(p for p in a.labels if p[0] not in ("__name__", "reason"))
                for a in status.alerts if a.state == "firing"
            ]  # fmt: skip
            found[status.rule.name].append(alerts)
    return found


def expectation(
    rules: Sequence[hc.Rule], series: dict[str, Course]
) -> Iterator[str]:
    """Yield the lines of promtool's test that expects what the program finds."""
    yield "rule_files: [rules]"
    yield f"evaluation_interval: {STEP}s"
    yield f"tests: [{{interval: {STEP}s, input_series: ["
    for name, course in series.items():
        if name.startswith("scrape_error"):
            continue
        column = [course(step) for step in range(STEPS)]
        known = ["stale" if v is None else hc.format_float(v) for v in column]
        yield f"  {{series: '{name}', values: '{' '.join(known)}'}},"
    yield "], alert_rule_test: ["
    for rule, steps in firing(rules, series).items():
        for step, alerts in enumerate(steps):
            shown = ", ".join(f"{{exp_labels: {dict(alert)}}}" for alert in alerts)
            yield f"  {{eval_time: {step * STEP}s, alertname: {rule},"
            yield f"   exp_alerts: [{shown}]}},"
    yield "]}]"


@unittest.skipUnless(shutil.which("promtool"), "promtool is not on the PATH")
class InPrometheus(unittest.TestCase):
    """What --check-config --format=prometheus prints, asked of promtool."""

    def promtool(self, *arguments: str, directory: str) -> str:
        done = subprocess.run(
            ["promtool", *arguments], cwd=directory, check=False, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )  # fmt: skip
        return done.stdout if done.returncode else ""

    def printed(self, **settings: str) -> str:
        command = [sys.executable, PROGRAM, "--check-config", "--format=prometheus"]
        environ = {**os.environ, **settings}
        done = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE)
        return done.stdout.decode()

    def compare(self, series: dict[str, Course], **settings: str) -> int:
        """Ask promtool whether the printed rules fire as ours; return how often."""
        rules = hc.load_config(settings).rules
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "rules").write_text(self.printed(**settings), "utf-8")
            said = self.promtool("check", "rules", "rules", directory=directory)
            self.assertEqual(said, "")
            lines = list(expectation(rules, series))
            Path(directory, "tests").write_text("\n".join(lines), "utf-8")
            said = self.promtool("test", "rules", "tests", directory=directory)
            self.assertEqual(said[:3000], "")
        return "\n".join(lines).count("exp_labels")

    def test_twenty_one_rules_of_users_fire_as_they_do_here(self) -> None:
        self.assertGreater(self.compare(user_series(), UNHEALTHY_WHEN=RULES), 500)

    def test_the_default_rules_fire_as_they_do_here(self) -> None:
        self.assertGreater(self.compare(vllm_series()), 20)

    def test_the_comparison_can_fail(self) -> None:
        broken = vllm_series()
        with self.assertRaises(AssertionError), tempfile.TemporaryDirectory() as name:
            rules = hc.load_config({}).rules
            text = self.printed().replace("for: 30s", "for: 2m").replace("== 0", "== 5")
            Path(name, "rules").write_text(text, "utf-8")
            lines = expectation(rules, broken)
            Path(name, "tests").write_text("\n".join(lines), "utf-8")
            said = self.promtool("test", "rules", "tests", directory=name)
            self.assertEqual(said, "")

    def test_every_kind_of_rule_is_one_that_promtool_takes(self) -> None:
        probes = {
            "CANARY_URL": "http://localhost:8000/v1/completions",
            "HEALTH_ENDPOINT": "http://localhost:8000/health",
        }
        above = {"METRIC_TO_CHECK": "tgi_queue_size", "METRIC_THRESHOLD": "10"}
        for settings in {}, probes, above:
            with tempfile.TemporaryDirectory() as directory:
                Path(directory, "rules").write_text(self.printed(**settings), "utf-8")
                said = self.promtool("check", "rules", "rules", directory=directory)
                self.assertEqual(said, "")


if __name__ == "__main__":
    unittest.main()
