"""What health_check.py promises, claim by claim, in the order of its sections."""

from __future__ import annotations

import ast
import base64
import calendar
import collections
import contextlib
import difflib
import doctest
import gc
import gzip
import html
import http.server
import io
import itertools
import json
import logging
import math
import operator
import os
import py_compile
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import ssl
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
from array import array
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import health_check
from health_check import (
    HUNG,
    MAX_ALERTS,
    RETRY,
    SCRAPE_REASONS,
    SERVERS,
    SETTINGS,
    Alert,
    Check,
    ConfigError,
    Credentials,
    Evaluation,
    EvaluationError,
    ExitPolicy,
    History,
    Judge,
    Lookback,
    Lookout,
    Monitor,
    Notifier,
    Part,
    ProbeStatus,
    PromQLError,
    RuleStatus,
    Scrape,
    ScrapeError,
    Series,
    Server,
    Simulation,
    Site,
    Stream,
    Target,
    TargetStatus,
    Verdict,
    answer_health,
    answer_metrics,
    answer_page,
    as_of,
    ask,
    ask_canary,
    canary_rules,
    compile_regex,
    drain_expression,
    escape_controls,
    evaluate,
    format_duration,
    format_expression,
    format_float,
    format_for,
    format_rule,
    format_series,
    is_due,
    judge,
    judge_completion,
    last_words,
    listen,
    load_config,
    log_transitions,
    lookbacks,
    nearest_name,
    nearest_server,
    open_stream,
    own_names,
    parse_duration,
    parse_expression,
    parse_float,
    parse_rules,
    parse_series,
    prune,
    quote,
    read_samples,
    regex_expand,
    regex_matches,
    restart_clocks,
    scrape_metrics,
    servers_there,
    tokenize,
    type_of,
    unholdable,
    verdict_metrics,
)

NOW, WALL, WHOLE = 1000.0, 1700000000.0, 1 << 20
TIMES = ("startsAt", "endsAt")

RULES = """
  QueueFull:  vllm:num_requests_waiting > 10 for 30s
  CacheFull:  vllm:kv_cache_usage_perc > 0.95 and changes(vllm:tokens_total[1m]) > 0
  Stalled:    (vllm:num_requests_running > 0 or vllm:num_requests_waiting > 0)
              unless changes(vllm:iteration_tokens_total_count[2m]) > 0 for 2m
  SlowTokens: histogram_quantile(0.99, sum by (le) (rate(ttft_bucket[2m]))) > 5 # "
  Down:       scrape_error{reason!="timeout"} keep_firing_for 1m; -x{a=~'b;'} ^ 0x1f
  Slow:       scrape_error{reason="timeout"} for 30s
"""


def claims(block):
    """Yield both sides of each ``left => right``; 3 blanks or a newline part claims."""
    for claim in filter(None, map(str.strip, re.split(r"\n|   +", block))):
        left, right = claim.split("=>")
        yield left.strip(), right.strip()


def history(text, step=1.0, now=NOW):
    """Return an evaluation that remembers ``series value value ...; series ...``.

    The last value is of now, each other ``step`` seconds older; ``_`` is no sample.
    """
    remembered = {}
    for line in filter(None, re.split(r"\s*;\s*", text.strip())):
        series, *column = line.split()
        labels = tuple(sorted(parse_series(series.encode()).items()))
        times = [now - age * step for age in range(len(column) - 1, -1, -1)]
        values = [None if value == "_" else parse_float(value) for value in column]
        found = series_of(times, values)
        remembered.setdefault(dict(labels)["__name__"], {})[labels] = found
    return Evaluation(now, WALL, remembered, {}, {})


def series_of(times, values):
    """Return a series that checks at these times have found, where it is not None."""
    checks, series = array("d"), None
    for at, value in zip(times, values):
        checks.append(at)
        series = series or (None if value is None else Series(checks))
        if value is not None:
            series.add(value)
    return series or Series(checks)


def shown(value):
    """Return a number, or a vector in the form of a history."""
    if isinstance(value, float):
        return format_float(value)
    lines = [f"{format_series(k)} {format_float(round(value[k], 9))}" for k in value]
    return "; ".join(sorted(lines)).replace(", ", ",")


def answer(expression, text="", step=1.0):
    return shown(evaluate(parse_expression(expression), history(text, step)))


def steps(function, *arguments):
    """Return how many calls a function makes: a clock would measure the machine."""
    counter, before = itertools.count(), sys.getprofile()
    sys.setprofile(lambda *_: next(counter))
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return next(counter)

PROGRAM = str(Path(health_check.__file__).resolve())


@lru_cache(maxsize=None)
def compiled_program():
    """Return the path of the program's byte code, which starts in half the time."""
    directory = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(directory.cleanup)
    return py_compile.compile(PROGRAM, f"{directory.name}/compiled/health_check.pyc")


FOREVER = 60.0


def page(body="", kind="text/plain; version=0.0.4", status="200 OK", extra=""):
    """Return a whole HTTP response; ``extra`` is header lines."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def redirect(url, status="307 Temporary Redirect"):
    return page("", status=status, extra=f"Location: {url}\r\n")


def dripping(data, seconds=0.04):
    """Return the pieces that send a byte at a time."""
    return [piece for byte in data for piece in (bytes([byte]), seconds)]


def free_port():
    """Return a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Metrics(socketserver.ThreadingTCPServer):
    """Answers a request with its pieces: bytes to send, seconds to wait.

    One function instead of the pieces makes them from the request.
    """

    request_queue_size = 256

    def __init__(self, *pieces, host="127.0.0.1", tls=None):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), None)
        self.pieces, self.requests, self._tls = pieces, [], tls
        host = f"[{host}]" if ":" in host else host
        self.instance = f"{host}:{self.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.instance}/metrics"
        self._closing, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._closed:
            self.handle_request()

    def process_request_thread(self, request, client_address):
        threading.current_thread().name = "metrics"
        super().process_request_thread(request, client_address)

    def finish_request(self, request, client_address):
        if self._tls:
            with self._tls.wrap_socket(request, server_side=True) as sock:
                self._answer(sock)
        else:
            self._answer(request)

    def _answer(self, sock):
        received = b""
        while b"\r\n\r\n" not in received:
            data = sock.recv(65536)
            if not data:
                return
            received += data
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += sock.recv(65536)
        received = head + b"\r\n\r\n" + body
        self.requests.append(received.decode())
        pieces = self.pieces
        for piece in pieces[0](received) if callable(pieces[0]) else pieces:
            if isinstance(piece, bytes):
                sock.sendall(piece)
            elif self._closing.wait(piece):
                return

    def handle_error(self, request, client_address):
        """Say nothing: a caller may give up."""

    def release(self):
        """Hang up on all who wait for an answer."""
        self._closing.set()
        self._closing = threading.Event()

    def close(self):
        self._closing.set()
        self._closed = True
        # It waits for a caller, and looks whether it is closed after each.
        with contextlib.suppress(OSError):
            socket.create_connection(self.server_address[:2], 5).close()
        self._thread.join()
        self.server_close()


def send(port, data):
    """Return a socket that has sent some bytes."""
    sock = socket.create_connection(("127.0.0.1", port), 5)
    sock.sendall(data.encode("latin-1"))
    return sock


def receive(sock):
    """Return all that comes until the other end closes."""
    with sock:
        return b"".join(iter(lambda: sock.recv(65536), b"")).decode()


def request_for(path, method="GET"):
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"


def get(port, path="/health"):
    """Return the status and the body of an answer."""
    head, _, body = receive(send(port, request_for(path))).partition("\r\n\r\n")
    return int(head.split()[1]), body


def storm(port, count, path="/health"):
    """Send requests all at once; return the set of what follows the protocol's name."""
    socks = [send(port, request_for(path)) for _ in range(count)]
    return {receive(sock)[9:12] for sock in socks}


def livez(port):
    """Return whether a program answers on a port, once it is up."""
    try:
        return get(port, "/livez")[0] == 200
    except OSError:
        return False


def wait_until(condition, seconds=20.0):
    """Return whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def highest_memory(reset=False):
    """Return the most bytes that this process has held; reset begins anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def fill(path):
    """Fill a pipe or a terminal until it takes no more."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    for size in 4096, 1:
        with contextlib.suppress(BlockingIOError):
            while os.write(descriptor, b"\n" * size):
                pass
    os.close(descriptor)


class Clock:
    """A clock that stands until a test moves it."""

    now = 1000.0

    def __call__(self):
        return self.now


class Log(logging.Handler):
    """Keeps the messages."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class NetworkTest(unittest.TestCase):
    """What the tests share: things that end with the test, and the log."""

    def setUp(self):
        handler, logger = Log(), logging.getLogger("health_check")
        self.log = handler.lines
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel("DEBUG")
        self.addCleanup(lambda: self.assertNotIn("this is a bug", "".join(self.log)))

    def metrics(self, *pieces, **options):
        server = Metrics(*pieces, **options)
        self.addCleanup(server.close)
        return server

    def config(self, *targets, **environ):
        urls = ",".join(getattr(target, "url", target) for target in targets)
        return load_config(
            {"METRICS_ENDPOINT": urls, "METRICS_TIMEOUT": "5", **environ}
        )

    def monitor(self, *targets, clock=time.monotonic, **environ):
        """Return a monitor that checks only when the test does."""
        monitor = Monitor(self.config(*targets, **environ), clock=clock)
        monitor.scraper.start()
        self.addCleanup(monitor.stop)
        return monitor

    def running(self, *targets, **environ):
        """Return a monitor that checks in its own thread, and has done so once."""
        monitor = Monitor(self.config(*targets, **environ))
        monitor.listeners.append(log_transitions)
        monitor.start()
        monitor.request(0)
        self.addCleanup(monitor.stop)
        self.assertTrue(wait_until(lambda: monitor.verdict.sequence))
        return monitor

    def serve(self, monitor, listener=None):
        """Answer for a monitor; return the port."""
        listener = listener or listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = Server(listener, monitor)
        thread = threading.Thread(target=server.run)
        thread.start()
        self.addCleanup(server.close)
        self.addCleanup(thread.join)
        self.addCleanup(server.stop)
        return port

    def launch(self, *argv, command=(), **environ):
        """Start the program, or a command; it ends with the test."""
        command = command or (sys.executable, compiled_program())
        process = subprocess.Popen(
            [*command, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "APP_PORT": "0", **environ},
            cwd=Path(PROGRAM).parent,
            text=True,
        )
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def port_of(self, process):
        """Return the port of a program once it answers."""
        lines = []
        for line in process.stderr:
            lines.append(line)
            match = re.search(r"is up: port (\d+)", line)
            if match:
                return int(match[1])
        raise self.failureException("".join(lines))

    def assert_any(self, pattern, lines):
        self.assertTrue(any(re.search(pattern, line) for line in lines), lines)

class Documentation(unittest.TestCase):
    def test_its_examples_are_true(self):
        failed, attempted = doctest.testmod(health_check)
        self.assertEqual(failed, 0)
        self.assertGreater(attempted, 10)

    def test_no_two_sections_give_one_name_to_two_things(self):
        names = []
        for node in ast.parse(Path(health_check.__file__).read_text()).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            stored = (n for t in targets if t for n in ast.walk(t))
            names += [n.id for n in stored if isinstance(n, ast.Name)]
            names += [node.name] if hasattr(node, "name") else []
        self.assertGreater(len(names), 500)
        self.assertEqual({n for n in names if names.count(n) > 1}, set())


class Vocabulary(unittest.TestCase):
    def test_a_number_is_what_Prometheus_reads(self):
        for text, value in (
            ("5", 5), ("5.", 5), (".5", 0.5), ("+5", 5), ("-1.0", -1), ("017", 17),
            ("1e3", 1000), ("1.15891634176e+011", 115891634176), ("1e-400", 0),
            ("Inf", math.inf), ("+inf", math.inf), ("-INFinity", -math.inf),
        ):
            with self.subTest(text):
                self.assertEqual(parse_float(text), value)
        self.assertTrue(math.isnan(parse_float("nAn")))

    def test_what_only_Python_or_C_reads_is_no_number(self):
        for text in (
            "", " ", ".", "e5", "1e", "1_000", "1,000", "0x1F", "0b11", "1 ", "1\n",
            "+NaN", "-NaN", "nan(1)", "1e400", "-1e400", "\u0663", "--1", "1.2.3",
        ):
            with self.subTest(text), self.assertRaises(ValueError):
                parse_float(text)

    def test_a_hostile_number_takes_time_linear_in_its_length(self):
        for text in "1" * 100000 + "x", "1" * 100000 + ".x", "." + "1" * 100000 + "_":
            for parse in parse_float, parse_duration, parse_expression:
                with self.subTest(parse.__name__), self.assertRaises(ValueError):
                    parse(text)

    def test_a_number_is_written_without_an_exponent_and_reads_back(self):
        for value, text in (
            (10.0, "10"), (0.95, "0.95"), (-0.0, "-0"), (1e21, "1" + "0" * 21),
            (1.5e-07, "0.00000015"), (math.inf, "+Inf"), (-math.inf, "-Inf"),
        ):
            self.assertEqual(format_float(value), text)
        for value in 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 2.5e-9, 123456.789:
            self.assertEqual(parse_float(format_float(value)), value)
        self.assertEqual(format_float(math.nan), "NaN")

    def test_a_duration_is_seconds_or_in_the_form_of_Prometheus(self):
        for text, seconds in (
            ("0", 0), ("90", 90), ("0.8", 0.8), ("1e3", 1000), ("90s", 90),
            ("1h", 3600), ("1m30s", 90), ("500ms", 0.5), ("1d", 86400), ("1w", 604800),
            ("1y", 31536000), ("1h0m1ms", 3600.001),
        ):
            with self.subTest(text):
                self.assertEqual(parse_duration(text), seconds)
        for text in (
            "", "s", "-1", "-5m", "1.5m", "30s1m", "1m1m", "5M", "5 m", "5m ", "5min",
            "inf", "nan", "0x10", "\u0663s", "9" * 400 + "y", "9" * 5000 + "s",
            "293y", "1e10",
        ):
            with self.subTest(text[:9]), self.assertRaises(ValueError):
                parse_duration(text)

    def test_a_duration_is_written_in_the_form_of_Prometheus_and_reads_back(self):
        for seconds, text in (
            (0, "0s"), (0.25, "250ms"), (90, "1m30s"), (3600, "1h"), (1.001, "1s1ms"),
            (604800, "7d"), (90061, "1d1h1m1s"),
        ):
            self.assertEqual(format_duration(seconds), text)
            self.assertEqual(parse_duration(text), seconds)

    def test_a_series_is_written_as_Prometheus_writes_it(self):
        for labels, text in (
            ({"__name__": "up"}, "up"), ({"a": "b"}, '{a="b"}'), ({}, "{}"),
            ({"__name__": "x:y", "a": "b", "c": 'd"\\\n'}, r'x:y{a="b", c="d\"\\\n"}'),
            ({"__name__": "x", "a.b": "c"}, 'x{"a.b"="c"}'),
            ({"__name__": "x", 'a\n"b': "c"}, r'x{"a\n\"b"="c"}'),
        ):
            with self.subTest(text):
                self.assertEqual(format_series(tuple(labels.items())), text)

    def test_what_could_move_a_cursor_or_end_a_line_is_escaped(self):
        for text in "\x00", "\x1b[2J", "\r", "\x7f", "\x85", "\u2028", "\udc80":
            with self.subTest(ascii(text)):
                escaped = f"\\u{ord(text[0]):04x}{text[1:]}"
                self.assertEqual(escape_controls(text), escaped)
                self.assertEqual(quote(text), f'"{escaped}"')
        self.assertEqual(escape_controls("naïve ☃"), "naïve ☃")

    def test_a_window_of_a_series_is_what_a_list_of_its_samples_gives(self):
        for seed in range(100):
            rng = random.Random(seed)
            times = [float(at) for at in range(rng.randint(1, 12))]
            values = [rng.choice((None, 1.0, 2.0, 3.0)) for _ in times]
            series, start, step = series_of(times, values), 0, 1
            if seed % 2 and any(values):
                start, step = rng.randrange(len(times)), rng.choice((1, 2))
                series.keep(start, step)
                series.checks[:] = series.checks[start::step]
            column = list(zip(times, values))[start::step]
            kept = [(at, value) for at, value in column if value is not None]
            first, last = sorted(rng.choices(range(-1, 13), k=2))
            with self.subTest(seed, values=values, window=(first, last)):
                points = series.window(first, last)
                samples = list(zip(points.times, points.values))
                self.assertEqual(samples, [x for x in kept if first < x[0] <= last])
                pairs = zip(points.values, points.values[1:])
                self.assertEqual(list(points.falls), [a for a, b in pairs if b < a])
                for count in 1, 2:
                    newest = series.newest(count, first, last) if kept else None
                    enough = samples[-count:] if samples[count - 1 :] else None
                    self.assertEqual(newest and [*zip(*newest)], enough)
                at = first + 0.5
                value = dict(column).get(math.floor(at)) if kept else None
                if first <= column[-1][0] and start <= first and step == 1:
                    self.assertEqual((series.sample_at(at) or (0, None))[1], value)
                if kept:
                    self.assertEqual((series.time, series.values[-1]), kept[-1])

    def test_a_sample_counts_for_five_minutes_and_until_a_check_misses_its_series(self):
        series = series_of([0.0, 100.0, 200.0, 600.0], [7.0, None, 8.0, None])
        old, new = (0, 7), (200, 8)
        moments = {-1: None, 0: old, 99: old, 100: None, 200: new, 499: new, 500: None}
        for moment, sample in {**moments, 600: None}.items():
            self.assertEqual(series.sample_at(moment), sample, moment)

    def test_the_state_of_a_rule_is_the_worst_of_its_series(self):
        status = RuleStatus(parse_rules("x > 0 for 2s")[0])
        for now, text, state in (
            (0, "", "inactive"),
            (1, 'x{a="1"} 1', "pending"),
            (3, 'x{a="1"} 1; x{a="2"} 1', "firing"),
        ):
            status = judge(status, history(text, now=now))
            self.assertEqual(status.state, state)
        self.assertEqual(status._replace(error="why").state, "error")


class PromQL(unittest.TestCase):
    def refused(self, parse, rows):
        """Assert that texts are refused at their ``«``, with words of each message."""
        for marked, words in rows:
            place, text = marked.index("«"), marked.replace("«", "", 1)
            line = text.count("\n", 0, place) + 1
            column = place - text.rfind("\n", 0, place)
            with self.subTest(marked[:60]):
                with self.assertRaises(PromQLError) as caught:
                    parse(text)
                message, excerpt, caret = str(caught.exception).split("\n")
                self.assertIn(words, message)
                self.assertIn(f"(at line {line}, column {column})", message)
                self.assertEqual(caret.strip(), "^")
                pointed = excerpt[len(caret) - 1 :][:1].strip()
                self.assertEqual(pointed, text[place : place + 1].strip())

    def test_operators_bind_as_in_Prometheus(self):
        for text, meaning in claims("""
            a + b * c => a + (b * c)                   a * b + c => (a * b) + c
            a - b - c => (a - b) - c
            a / b * c % d => ((a / b) * c) % d
            a ^ b ^ c => a ^ (b ^ c)                   -a ^ b => -(a ^ b)
            -a * b => (-a) * b                         a ^ -b => a ^ (-b)
            a > b == c => (a > b) == c                 a + b > c => (a + b) > c
            a > b and c => (a > b) and c               a and b or c => (a and b) or c
            a or b and c unless d => a or ((b and c) unless d)
            +a => a                                    - -2 => 2
            sum(a) by (b,) => sum by (b) (a)
            SUM BY (b) (a) AND c => sum by (b) (a) and c
            a ATAN2 b * c => (a atan2 b) * c           {"a", b="c",} => a{b="c"}
            {__name__="a"}[5m] => a[300]               a[1h30m] => a[90m]
        """):
            with self.subTest(text):
                self.assertEqual(parse_expression(text), parse_expression(meaning))
        for one, other in claims("""
            a - (b - c) => a - b - c                   (a ^ b) ^ c => a ^ b ^ c
            sum without (b) (a) => sum by (b) (a)      sum without () (a) => sum(a)
            a + on () b => a + b
            a + on (c) b => a + ignoring (c) b
            a == bool b => a == b                      a{b="c"} => a{b=~"c"}
        """):
            with self.subTest(one):
                self.assertNotEqual(parse_expression(one), parse_expression(other))

    def test_numbers_are_those_of_Go(self):
        for text, value in claims("""
            0x1F => 31     0X4 => 4     017 => 15     08 => 8     4e0 => 4     .5 => 0.5
            5. => 5     Inf => +Inf     -inf => -Inf     NAN => NaN     5m => 300
            1_000 => 1000     0x_1_F => 31     1_0.2_5e0_1 => 102.5     0_17 => 15
        """):
            self.assertEqual(answer(text), value)

    def test_strings_have_the_escapes_of_Go(self):
        for text, value in (
            (r'"\a\b\f\n\r\t\v\\\""', '\a\b\f\n\r\t\v\\"'),
            (r"'\'\x41\102\u00e9\U0001F600'", "'AB\u00e9\U0001f600"),
            (r"'\xc3\xA9\303\251'", "\u00e9\u00e9"),
            (r"`\n'" + '"`', r"\n'" + '"'), ("`\n`", "\n"),
            ('"# ; for \u2028"', "# ; for \u2028"),
        ):
            with self.subTest(text):
                expected = parse_expression("x{a=" + quote(value) + "}")
                self.assertEqual(parse_expression("x{a=" + text + "}"), expected)

    def test_types_are_those_of_Prometheus(self):
        for text, kind in claims("""
            1 => scalar                    -1 + time() => scalar
            1 > bool 2 => scalar
            scalar(x) => scalar            x[5m] => range vector
            x => instant vector
            -x => instant vector           1 + x => instant vector
            sum(x) => instant vector
            vector(1) => instant vector    rate(x[5m]) => instant vector
        """):
            with self.subTest(text):
                self.assertEqual(type_of(parse_expression(text)), kind)

    def test_a_keyword_may_name_a_metric_and_a_colon_stand_anywhere(self):
        for name in "sum by and for rate time :lead trail: a:b".split():
            with self.subTest(name):
                expected = parse_expression('{__name__="' + name + '"} > 1')
                self.assertEqual(parse_expression(name + " > 1"), expected)

    def test_what_is_left_out_is_refused_with_the_reason(self):
        self.refused(parse_expression, claims("""
            «holt_winters(x[5m], 1, 1) => deriv        «info(x) => behind a flag
            «mad_over_time(x[5m]) => behind a flag     «limitk(1, x) => behind a flag
            «histogram_sum(x) => native histograms     x «</ y => native histograms
            x @ «start() => the moment of the check    x[«step()] => behind a flag
            rate(x[5m] «anchored) => behind a flag     x + «fill(0) y => behind a flag
            «RATE(x[5m]) => is rate meant              «nothing_like_it(x) => a function
            x{a=~«"(?m)b"} => the flag m               x{a=~«"(?i-U)b"} => the flag U
        """))

    def test_what_looks_back_stands_where_Prometheus_has_it(self):
        for text, meaning in claims("""
            x OFFSET 5m => x offset 300                x offset - 5m => x offset -300s
            x[5m] offset +1h => x[5m] offset 60m       x offset (1h / 2) => x offset 30m
            x[5m + 1m] => x[6m]                        x[2 * 3m:(1m)] => x[6m:1m]
            x[5m:] => x[5m:1m]                         x[1h:30] => x[60m:30s]
            x @ 100 offset 5m => x offset 5m @ 100     x @ -1.5 => x @ -1.5e0
            -x offset 5m => -(x offset 5m)
            rate(x[5m])[1h:] => rate(x[5m])[1h:1m]
            (x > 0)[1h:5m] offset 1d => (x > 0)[60m:300s] offset 24h
        """):
            with self.subTest(text):
                self.assertEqual(parse_expression(text), parse_expression(meaning))
        self.refused(parse_expression, claims("""
            (x) «offset 5m => stands behind a selector    sum(x) «offset 5m => selector
            x offset 5m«[5m] => only a selector            x @ 0 «@ 6 => given twice
            x @ 0«[5m] => only a selector            1 «offset 5m => selector
            x offset 5m «offset 1m => given twice          x @ 5 «@ 6 => given twice
            x offset «y => a duration                      x @ «y => a Unix time
            x @ «Inf => a Unix time                        x offset «293y => duration
            x[5m]«[5m:1m] => of an instant vector
            1«[5m:] => of an instant vector
            x[5m:«0s] => longer than 0                     x[«5m - 5m] => longer than 0
            x[«y] => a duration                            x[«time()] => a duration
            x«[5h:1s] => more than 11000 points
            max_over_time(x[3h:1m])«[3h:1m] => more than 11000 points
        """))

    def test_one_side_of_a_match_may_have_many(self):
        for text, meaning in claims("""
            a * on (b) group_left c => a * on (b) GROUP_LEFT () c
            a * on () group_left (d) c => a*on()group_left(d,)c
        """):
            self.assertEqual(parse_expression(text), parse_expression(meaning))
        self.refused(parse_expression, claims("""
            a * «group_left c => found 'group_left'
            a «and on (b) group_left c => has no group
            a * on (b) «group_left (b) c => in on and in group
            a * on (b) group_left («inf) c => label name
            a * on (b) group_left (by, «without) c => label name
        """))

    def test_what_Prometheus_refuses_is_refused(self):
        self.refused(parse_expression, claims(r"""
            « => expected an expression, found the end          up ==« => found the end
            a «= 5 => found '='                        x «y => found 'y'
            x«) => found ')'                           (x« => expected ')'
            x > bool «> 1 => found '>'              1 «> 2 => bool
            a + b «and 1 => 'and' takes no scalar      a «+ bool b => bool
            a «> on (b) 1 => on and ignoring           a > on «b => expected '('
            x[5m] «> 1 => takes no range vector        «-x[5m] => takes no range vector
            «rate(x) => instant vector                 «abs(x[5m]) => range vector
            «sum(1) => scalar                          «sum(x, y) => sum
            «sum() => sum                              «vector(x) => instant vector
            «time(1) => time                           «round(x, 1, 2) => round
            abs(x,«) => expected an expression         sum by («a:b) (x) => a label name
            sum by (a) «x => expected '('
            sum(x) by (a) «by (b) => found 'by'
            «{a='b'} => must name its metric
            «{__name__=~'x'} => must name its metric
            «{__name__=''} => must name its metric
            «x{__name__='y'} => must name its metric
            x{«1='a'} => a label name                  x{«,} => a label name
            x{a='b'«c='d'} => expected '}'             x{a«>'b'} => !~
            x{a=«b} => a string                        x{a=~«'('} => regular expression
            x{a=«'b => unterminated string             x{a=«'\q'} => unknown escape \q
            x{a=«`b => unterminated string             x{a=«'\xc3'} => not UTF-8
            x{a=«'\udcff'} => not UTF-8              x{a=«'\251'} => not UTF-8
            x{a=«'\ud800'} => not UTF-8
            x{a=«'\U00110000'} => unknown escape
            x{a« => found the end                      x[5m« => expected ']'
            x[«] => a duration                         x[«y] => a duration
            x[«0s] => longer than 0                    x[«30s1m] => duration
            x[«1e300] => shorter than 292y             x[«293y] => duration
            x[«5M] => duration                         x[«1.5m] => duration
            x[5m]«[5m] => only a selector              (x)«[5m] => only a selector
            rate(x[5m])«[5m] => only a selector        «1_000_ => bad number
            «1__0 => bad number                        «1_.5 => bad number
            «1.2.3 => bad number                       x «$ =>
        """))
        self.refused(parse_expression, (
            ("(\n  up == 0\n«", "expected ')', found the end"),
            ("x{a=«'b\n'}", "unterminated string"),
            ("«0x" + "f" * 300, "bad number"), ("«0" + "7" * 400, "bad number"),
            ("x[«" + "9" * 400 + "y]", "bad number"),
            ("x«\u00a0> 1", ""),
        ))

    def test_an_error_shows_the_line_and_points_at_the_place(self):
        with self.assertRaises(PromQLError) as caught:
            parse_rules("Down: up == 0\nFull:\tx{} + limitk(1, x); y")
        self.assertEqual(
            str(caught.exception),
            "'limitk' is not supported: Prometheus has it behind a flag "
            "(at line 2, column 13)\n"
            "    Full: x{} + limitk(1, x); y\n"
            "                ^",
        )

    def test_an_error_in_a_long_line_stays_short_and_harmless(self):
        with self.assertRaises(PromQLError) as caught:
            parse_expression("x + " * 140 + "\x1b[2J" + " + x" * 100000)
        self.assertLess(len(str(caught.exception)), 300)
        self.assertNotIn("\x1b", str(caught.exception))

    def test_tokens_know_their_place_and_the_last_is_the_end(self):
        *tokens, end = tokenize("up  == 0")
        places = [(token.text, token.position) for token in tokens if token.text]
        self.assertEqual(places, [("up", 0), ("==", 4), ("0", 7)])
        self.assertEqual((end.kind, end.position), ("end", 8))

    def test_the_canonical_text_gives_the_same_tree(self):
        for text in (
            "(a + b) * c", "a - (b - c)", "(a ^ b) ^ c", "(-a) ^ 2", "-a ^ 2", "- -a",
            "(-2) ^ a", "a * -2", "2 ^ -3 ^ 2", "-(a + b)", "(a or b) and c",
            "a > bool 1", "a == bool on (b) c", "a / ignoring () c", "a > 1e300",
            "(-0) ^ a", "a{b=~'c|d', b!=''}", "a > -Inf", "+Inf", "1 - -1",
            "sum by (b) (a)", "max without (b) (a)", "group without () (a)", "count(a)",
            "a[1h]", 'a{b!="c", d=~"e.*", f!~"g"}[90s]', '{"a.b", "c d"="e"}',
            r'a{b="\\\"\n\t\u2028"}', 'sum by ("a.b", c) (x)', "x[1m1ms]", "a % 2 == 1",
            "histogram_quantile(0.9, a)", "time() - 1e-7", "vector(scalar(a))",
            "a and on () b unless ignoring (c) d or e", "-(2 ^ a)", '{"for"} - for',
            '{"on"} + {"Offset"}', 'rate({"NaN", a="b"}[5m]) / {"bool"}',
        ):
            with self.subTest(text):
                expr = parse_expression(text)
                self.assertEqual(parse_expression(format_expression(expr)), expr)
        for text in (
            "a > 1 or b", 'x{a=~"b"} / on (c) y', "a - (b - c)", "-a * 2",
            "a * on (b) group_left (c) d", "a + ignoring () group_right () b",
            "(a + b)[1h:1m] offset 5m", "a[5m:1s] @ -1.5 offset -2m", "round(a)",
            "rate(a[5m])[1h:1m]", "(-a)[1h:1m]", "(a ^ b)[1h:1m]", "a atan2 b",
            'label_join(a, "b", "", "c\\n")', "hour()", "topk by (a) (1, b)",
            'count_values("v", a)', "a[5m] offset 1d", "a @ 0",
        ):
            self.assertEqual(format_expression(parse_expression(text)), text)

    def test_149_levels_are_enough_and_10000_are_refused(self):
        for left in "(", "abs(", "sum(", "-", "1^":
            right = ")" * left.count("(")
            with self.subTest(left):
                deep = parse_expression(left * 149 + "x" + right * 149)
                self.assertEqual(evaluate(deep, history("")), {})
                deep = parse_expression(left * 140 + "x" + right * 140)
                self.assertEqual(parse_expression(format_expression(deep)), deep)
                with self.assertRaises(PromQLError):
                    parse_expression(left * 10000 + "x" + right * 10000)
        for piece in "x or ", "x + ", "1 ^\n", "x +\n", "x\n+", "x + on (a)\n":
            with self.subTest(piece), self.assertRaises(PromQLError):
                parse_rules(piece * 1000 + "x")

    def test_a_metric_may_have_the_name_of_a_kind_of_token(self):
        for name in "end newline number string word op blank wrong".split():
            (rule,) = parse_rules(f"{name} > 1\n")
            self.assertEqual(format_expression(rule.expr), f"{name} > 1")
            for text in (f"x[{name}]", f"x{{a={name}}}"):
                with self.assertRaises(PromQLError):
                    parse_expression(text)

    def test_many_rules_take_time_linear_in_their_number(self):
        self.assertEqual(len(parse_rules("x;" * 10000)), 10000)

    def test_a_text_of_any_length_is_refused_in_peace(self):
        for piece in "a", '"', "'", "1", "0x", "\\", " ", "#":
            with self.subTest(piece), self.assertRaises(PromQLError):
                parse_expression(piece * 500000 + "$")
        for piece in "(", "-", "a ", "{", "[", "\n(", "x{a=''} ":
            with self.subTest(piece), self.assertRaises(PromQLError):
                parse_expression(piece * 20000)

    def test_each_cut_and_each_omission_gives_rules_or_a_PromQLError(self):
        understood = 0
        for at in range(0, len(RULES), 3):
            for text in RULES[:at], RULES[:at] + RULES[at + 1 :]:
                try:
                    rules = parse_rules(text)
                except PromQLError:
                    continue
                understood += 1
                again = parse_rules("\n".join(map(format_rule, rules)))
                self.assertEqual(again, rules, text)
        self.assertGreater(understood, len(RULES) / 6)

    def test_a_regex_matches_all_of_a_text_as_in_RE2(self):
        for pattern, matching, other in (
            ("a", ["a"], ["", "aa", "ba", "A", "a\n"]),
            ("", [""], ["a"]),
            ("5..|4.*", ["503", "4"], ["50", "5031", "x4"]),
            (".", ["\n", "\u00e9", "\U0001f600"], ["", "ab"]),
            ("a*b+c?", ["b", "aabbc"], ["a", "bcc"]),
            ("a{2}b{1,2}c{2,}", ["aabcc", "aabbccccc"], ["abcc", "aabbbcc", "aabc"]),
            ("a+?b??", ["a", "aab"], ["b"]),
            ("(?:ab|(c|))+d", ["abcd", "d"], ["ab"]),
            ("(a*)*|()*", ["", "aaa"], ["b"]),
            ("^a$|b^c|$|^", ["a", ""], ["bc", "b^c"]),
            (r"\d\w\s\D\W\S", ["1_ x-y"], ["\u0663_ x-y", "1_\vx-y", "1_ x-\n"]),
            (r"[^\d]", ["a", "\u0663"], ["1"]),
            (r"[]a\]-]+", ["]a-"], ["b"]),
            ("[^]]", ["a"], ["]"]),
            (r"\.\*\\\/\-\{", [".*\\/-{"], ["x"]),
            (r"\t\n\r\f\v", ["\t\n\r\f\v"], [""]),
            ("a{,2}", ["a{,2}"], ["", "aa"]),
            ("a{02}", ["a{02}"], ["aa"]), ("a{\u0662}", ["a{\u0662}"], ["aa"]),
            (r"[\s-][\\b]", [" b", "-\\"], ["a-"]),
            (r"[\\s][\\S]", ["sS", "\\\\"], ["tS", " S", "ss"]),
            ("(" * 99 + "a|b" + ")" * 99, ["a", "b"], ["", "c"]),
        ):
            for text in matching + other:
                with self.subTest(pattern, text=text):
                    self.assertIs(regex_matches(pattern, text), text in matching)

    def test_a_regex_that_RE2_and_Python_read_apart_is_refused(self):
        for pattern in (
            *r"( ) a) (a [ [] [z-a] * a** a{2}{3} +a \ (?=a) (?!a) (?<=a)".split(),
            *"(?m)a (?U)a (?P<a!>b)".split(),
            *r"(?#a) (a)\1 (? \b \A \z \pL \Qa\E \x41 \a \u0041".split(),
            *r"\é [[:alpha:]] [a&&b] [a||b] [a--b] [\S] a{3,2} a{1001}".split(),
            "(" * 500 + ")" * 500, "((a{99}){99}){99}", "a" * 9999, "a|" * 9999,
            r"[\s-a]", r"[\w\s-_]", r"[a\z]", "[" + r"\[" * 99999 + "]", "a{99999}",
            "a{500}b{600}",
        ):
            with self.subTest(pattern[:20]), self.assertRaises(ValueError):
                compile_regex(pattern)

    def test_a_hostile_label_value_costs_steps_linear_in_its_length(self):
        for pattern in r"(\w+\s?)+!", "(a*)*b", "(a|a?)+b", "(.*a){9}b", "(a?){9}a{9}b":
            with self.subTest(pattern):
                compile_regex(pattern)
                short = steps(regex_matches, pattern, "a" * 500)
                self.assertGreater(short, 50)
                self.assertLess(steps(regex_matches, pattern, "a" * 1000), 2.1 * short)
        for function, *more in ((regex_matches,), (regex_expand, "")):
            compile_regex.cache_clear()
            short, long = (
                steps(function, f"(?:a?){{{count}}}b", "a" * 50, *more)
                for count in (100, 200)
            )
            self.assertLess(long, 2.8 * short)


class Evaluate(unittest.TestCase):
    def check(self, block, remembered="", step=1.0):
        """Assert claims ``EXPR => ANSWER`` or ``EXPR <- HISTORY => ANSWER``."""
        for left, expected in claims(block):
            expression, _, text = left.partition(" <- ")
            with self.subTest(left):
                self.assertEqual(answer(expression, text or remembered, step), expected)

    def test_arithmetic_is_that_of_Prometheus(self):
        self.check("""
            -2 ^ 2 => -4            2 ^ 3 ^ 2 => 512         0 == bool -0 => 1
            1 / 0 => +Inf           -1 / 0 => -Inf           0 / 0 => NaN
            1 / -0 => -Inf          NaN / 0 => NaN           1e308 / 1e-10 => +Inf
            -5 % 3 => -2            5 % 0 => NaN             Inf % 2 => NaN
            5 % Inf => 5            0 ^ -1 => +Inf           (-0) ^ -1 => -Inf
            (-8) ^ 0.5 => NaN       (-10) ^ 999 => -Inf      (-10) ^ 998 => +Inf
            10 ^ 999 => +Inf        1 ^ NaN => 1             Inf - Inf => NaN
            1e308 * 10 => +Inf      7 - 2 * 3 => 1           time() => 1700000000
            -scalar(x) <- x 5 => -5    scalar(x) => NaN      scalar(y + 1) <- y 2 => 3
            scalar(x) <- x{a="1"} 1; x{a="2"} 2 => NaN       -time() + 1 => -1699999999
        """)

    def test_a_comparison_keeps_the_series_and_its_value(self):
        self.check("""
            x > 1 => x{a="2"} 2               1 < x => x{a="2"} 2
            x > bool 1 => {a="1"} 0; {a="2"} 1
            1 < bool x => {a="1"} 0; {a="2"} 1
            x > 0 > 1 => x{a="2"} 2           x >= 1 <= 1 => x{a="1"} 1
            x != 2 => x{a="1"} 1              x == 3 =>
        """, 'x{a="1"} 1; x{a="2"} 2')

    def test_NaN_compares_as_nothing(self):
        self.check("""
            x == x =>     x < 1 =>     x <= x =>     x > 1 =>     x >= x =>     1 > x =>
            x != x => x NaN     x != 1 => x NaN     x == bool 1 => {} 0
            x != bool 1 => {} 1
        """, "x NaN")

    def test_whatever_computes_a_value_drops_the_name(self):
        self.check("""
            -x => {a="b"} -3          x + 1 => {a="b"} 4        1 + x => {a="b"} 4
            x * x => {a="b"} 9        x ^ 2 => {a="b"} 9        abs(-x) => {a="b"} 3
            x > 1 => x{a="b"} 3       last_over_time(x[5s]) => x{a="b"} 3
        """, 'x{a="b"} 3')
        self.check("""
            -x => {a="b"} -3          x * x => {a="b"} 9        abs(x) => {a="b"} 3
            sum_over_time(x[5s]) => {a="b"} 3
            x > 1 => x{__type__="gauge",__unit__="s",a="b"} 3
            max without () (x) => {__type__="gauge",__unit__="s",a="b"} 3
        """, 'x{__type__="gauge",__unit__="s",a="b"} 3')

    def test_a_missing_label_is_an_empty_one_and_le_is_a_number(self):
        for matchers, found in claims(r"""
            nope="" => 1     nope!="z" => 1     nope=~".*" => 1     nope!~".+" => 1
            nope!="" => 0    nope=~".+" => 0    nope="z" => 0       nope!~".*" => 0
            a="b", => 1      a="b", a!="b" => 0      a=~"b|c" => 1      a=~"B" => 0
            "a"="b" => 1     le="1" => 1        le="1e0" => 1       le!="1.00" => 0
            le="2" => 0      le!="2" => 1       le="x" => 0
        """):
            with self.subTest(matchers):
                text = 'x{a="b",le="1.0"} 5'
                self.assertEqual(answer("x{" + matchers + "}", text), text * int(found))
        self.check('x{le="Inf"} <- x{le="+Inf"} 5 => x{le="+Inf"} 5')

    def test_two_vectors_match_one_to_one_on_their_labels(self):
        self.check("""
            x + y => {a="2"} 22              x < y => x{a="2"} 2         x > y =>
            x < bool y => {a="2"} 1          sum(y) > sum(x) => {} 50
            none + on () y =>
            x == x => x{a="1"} 1; x{a="2"} 2
            x * on () y <- x 1; y{a="1"} 5 => {} 5
        """, 'x{a="1"} 1; x{a="2"} 2; y{a="2"} 20; y{a="3"} 30')
        self.check("""
            x / y =>                         x / on (a) y => {a="1"} 3
            x > on (a) y => {a="1"} 6        x / ignoring (b, c) y => {a="1"} 3
            x > on () y => {} 6              x > ignoring (b, c) y => x{a="1"} 6
        """, 'x{a="1",b="l"} 6; y{a="1",c="r"} 2')

    def test_set_operators_match_many_to_many(self):
        self.check("""
            x and y => x{a="2"} 2                   x and on (a) y => x{a="2"} 2
            x unless y => x{a="1"} 1                x unless on () y =>
            x unless on () z => x{a="1"} 1; x{a="2"} 2
            x or y => x{a="1"} 1; x{a="2"} 2; y{a="2",b="z"} 9
            y and ignoring (b) x => y{a="2",b="z"} 9; y{a="2"} 8
            z or vector(0) => {} 0                  x > 1 and x < 3 => x{a="2"} 2
        """, 'x{a="1"} 1; x{a="2"} 2; y{a="2",b="z"} 9; y{a="2"} 8')

    def test_an_ambiguous_match_is_an_error(self):
        many = 'x{a="1",b="1"} 1; x{a="1",b="2"} 2; y{a="1"} 3; z{a="1",b="1"} 4'
        for expression, words in claims("""
            y + on (a) x => many-to-many     x + on (a) y => many-to-one
            x < on (a) y => many-to-one       x > on (a) y => many-to-one
            abs(x{b="1"} or on (__name__) z) => same labelset: {a="1", b="1"}
            -(x{b="1"} or on (__name__) z) => same labelset
            (x{b="1"} or on (__name__) z) + 1 => same labelset
        """):
            fails = self.assertRaisesRegex(EvaluationError, words)
            with self.subTest(expression), fails:
                answer(expression, many)

    def test_an_aggregation_reduces_each_group(self):
        self.check("""
            sum(x) => {} 12                          sum by (nope) (x) => {} 12
            sum by (a) (x) => {a="1"} 4; {a="2"} 8   sum by (__name__) (x) => x 12
            min without (b) (x) => {a="1"} 1; {a="2"} 8
            count by (b) (x) => {b="1"} 2; {b="2"} 1
            max(x) => {} 8      avg(x) => {} 4       group(x) => {} 1
            sum(z) =>           min(z) =>            max(z) =>           avg(z) =>
            count(z) =>         group(z) =>          sum(x or n) => {} NaN
            max(x or n) => {} 8       min(n or x) => {} 1       max(n) => {} NaN
            avg(x or i) => {} +Inf    sum(i or on (c) -i) => {} +Inf
        """, 'x{a="1",b="1"} 1; x{a="1",b="2"} 3; x{a="2",b="1"} 8; n NaN; i +Inf')
        self.check("""
            sum(x) <- x{a="1"} +Inf; x{a="2"} -Inf => {} NaN
            avg(x) <- x{a="1"} +Inf; x{a="2"} -Inf => {} NaN
            avg(x) / 1e308 <- x{a="1"} 1e308; x{a="2"} 1e308 => {} 1
            sum(x) <- x{a="1"} 1; x{a="2"} 1e100; x{a="3"} 1; x{a="4"} -1e100 => {} 2
        """)

    def test_a_selector_sees_only_the_series_of_the_latest_scrape(self):
        self.check("""
            x <- x 1 2 3 => x 3              x <- x 1 2 _ =>
            absent(x) <- x 1 2 _ => {} 1     count_over_time(x[5s]) <- x 1 2 _ => {} 2
            increase(x[4s]) <- x 10 20 _ 40 => {} 40
        """)

    def test_a_range_is_open_on_its_left(self):
        self.check("""
            count_over_time(x[3s]) => {} 3     count_over_time(x[3001ms]) => {} 4
            count_over_time(x[1s]) => {} 1     count_over_time(x[3s]) <- x 1 _ _ _ =>
        """, "x 1 2 3 4")

    def test_times_are_as_exact_as_the_milliseconds_of_Prometheus(self):
        found = series_of([1.234, 2.999, 3.0], [1, 2, 3])
        series = {"x": {(("__name__", "x"),): found}}
        for expression, now in (("x[1001ms]", 4.0), ("x[1s]", 4.0 - 1e-8),
                                ("x[1ms] @ 1.234", 100.0)):  # fmt: skip
            with self.subTest(expression):
                evaluation = Evaluation(now, now, series, {}, {})
                expr = parse_expression(f"count_over_time({expression})")
                self.assertEqual(evaluate(expr, evaluation), {(): 1.0})

    def test_functions_over_time_reduce_the_samples_of_a_range(self):
        self.check("""
            sum_over_time(x[4s]) => {a="b"} NaN      avg_over_time(x[4s]) => {a="b"} NaN
            min_over_time(x[4s]) => {a="b"} 1        max_over_time(x[4s]) => {a="b"} 4
            count_over_time(x[4s]) => {a="b"} 4
            present_over_time(x[4s]) => {a="b"} 1
            last_over_time(x[2s]) => x{a="b"} NaN    sum_over_time(z[4s]) =>
        """, 'x{a="b"} 4 1 3 NaN')
        self.check("""
            last_over_time(x[4s]) <- x 1 2 _ => x 2
            avg_over_time(x[4s]) <- x 1 2 6 => {} 3
            sum_over_time(x[4s]) <- x 1 1e100 1 -1e100 => {} 2
            sum_over_time(x[4s]) <- x +Inf -Inf => {} NaN
            changes(x[9s]) <- x 1 1 2 NaN NaN 2 => {} 3
            changes(x[9s]) <- x 5 => {} 0
            resets(x[9s]) <- x 1 2 1 5 NaN 0 0 => {} 1
            resets(x[9s]) <- x 5 => {} 0
            idelta(x[9s]) <- x 9 5 3 => {} -2                 idelta(x[9s]) <- x 3 =>
            irate(x[9s]) <- x 9 5 3 => {} 3                   irate(x[9s]) <- x 3 =>
            delta(x[3s]) <- x 9 7 5 => {} -6                  delta(x[9s]) <- x 3 =>
        """)
        self.check("irate(x[9s]) <- x 9 5 8 => {} 1.5", step=2.0)

    def test_rate_and_increase_extrapolate_as_Prometheus_3(self):
        self.check("""
            increase(x[3s]) <- x 100 110 => {} 15
            increase(x[10s]) <- x 10 20 => {} 15
            increase(x[3s]) <- x 100 110 120 => {} 30
            increase(x[10s]) <- x 0 20 => {} 20
            increase(x[3s]) <- x 100 110 120 130 => {} 30
            increase(x[10s]) <- x 2 22 => {} 22
            increase(x[10s]) <- x 100 110 120 => {} 25
            rate(x[10s]) <- x 100 110 120 => {} 2.5
            increase(x[3s]) <- x 100 110 120 5 15 25 => {} 25
            rate(x[3s]) <- x 100 =>
            increase(x[3s]) <- x 100 110 120 5 => {} 22.5
            increase(x[10s]) <- x 100 110 120 5 15 25 => {} 49.5
            resets(x[10s]) <- x 100 110 120 5 15 25 => {} 1
            increase(x[10s]) <- x 1 2 NaN => {} NaN
            increase(x[9s]) <- x 5 5 5 => {} 0
            increase(x[4s]) <- x 0 10 NaN 30 => {} 30
            delta(x[10s]) <- x 10 20 => {} 15
            increase(x[10s]) <- x 10 20 _ _ _ => {} 20
            increase(x[2050ms]) <- x 100 110 => {} 20.5
            increase(x[2150ms]) <- x 100 110 => {} 15
        """)

    def test_absent_tells_what_is_missing(self):
        self.check("""
            absent(x) <- x 1 =>                           absent(x > 2) <- x 1 => {} 1
            absent(x{a="b",c!="d",e=~"f",g=""}) => {a="b"} 1
            absent(x{a="b",a="c",d="e"}) => {d="e"} 1
            absent(x{a="b",a=~"c"}) => {} 1
            absent(sum(x{a="b"})) => {} 1
            absent_over_time(x{a="b"}[5s]) => {a="b"} 1
            absent_over_time(x[5s]) <- x 1 _ _ =>
            absent_over_time(x[2s]) <- x 1 _ _ => {} 1
        """)

    def test_functions_of_values_are_those_of_Prometheus(self):
        self.check("""
            abs(x) <- x -1.5 => {} 1.5        ceil(x) <- x 1.2 => {} 2
            1 / ceil(x) <- x -0.5 => {} -Inf
            1 / floor(x) <- x 0.5 => {} +Inf
            floor(x) <- x -1.2 => {} -2       floor(x) <- x NaN => {} NaN
            ceil(x) <- x -Inf => {} -Inf      round(x) <- x 2.5 => {} 3
            round(x) <- x -2.5 => {} -2       round(x, 0.5) <- x 1.3 => {} 1.5
            round(x, 10) <- x 14 => {} 10     round(x, 0) <- x 1 => {} NaN
            clamp_min(x, 3) <- x 1 => {} 3    clamp_max(x, 3) <- x 5 => {} 3
            clamp_max(x, 3) <- x 1 => {} 1    clamp_min(x, 3) <- x NaN => {} NaN
            clamp_min(x, NaN) <- x 1 => {} NaN    scalar(x) + x <- x 2 => {} 4
            timestamp(x) <- x 5 => {} 1700000000    vector(time()) => {} 1700000000
            time() - x > 60 <- x 1699999000 => {} 1000    vector(1) + vector(2) => {} 3
        """)

    def test_histogram_quantile_is_that_of_Prometheus(self):
        plain = 'b{le="+Inf"} 10; b{le="1"} 4; b{le="2.0"} 8'
        self.check(
            re.sub(r"(\S+) of", r"histogram_quantile(\1, b) <-", """
            -1 of b{le="1"} 0; b{le="Inf"} 0 => {} -Inf
            0.5 of b{le="1"} 0; b{le="Inf"} 0 => {} NaN
            0.5 of b{le="1"} 4; b{le="2"} 8 => {} NaN
            0.5 of b{le="Inf"} 8 => {} NaN
            0 of b{le="1"} 0; b{le="Inf"} 8 => {} NaN
            0.1 of b{le="0"} 4; b{le="1"} 8; b{le="Inf"} 8 => {} 0
            0.5 of b{le="-1"} 6; b{le="1"} 8; b{le="Inf"} 8 => {} -1
            0.75 of b{le="1"} 8; b{le="2"} 4; b{le="Inf"} 8 => {} 0.75
            1 of b{le="1"} 8; b{le="Inf"} 4 => {} 1
            0.5 of b{le="1"} NaN; b{le="2"} 5; b{le="Inf"} 10 => {} NaN
            0.5 of b{le="1"} 2; b{le="1.0"} 2; b{le="2"} 8; b{le="inf"} 10 => {} 1.25
            0.5 of b{le="1"} 4; b{le="2"} 8; b{le="Inf"} 9; b{le="x"} 9; b 9 => {} 1.125
            0.5 of b 99 =>
            """)
        )
        for quantile, value in claims("""
            0 => 0     0.2 => 0.5     0.5 => 1.25     0.8 => 2     0.9 => 2     1 => 2
            -1 => -Inf     1.5 => +Inf     NaN => NaN
        """):
            with self.subTest(quantile):
                result = answer(f"histogram_quantile({quantile}, b)", plain)
                self.assertEqual(result, "{} " + value)
        self.check("""
            histogram_quantile(0.9, x) =>
            histogram_quantile(0.5, rate(b[5s])) <- b{le="1"} 5; b{le="Inf"} 5 =>
            histogram_quantile(0.5, rate(b[5s])) => {a="x"} 0.5; {a="y"} NaN
            histogram_quantile(0.5, sum by (le) (rate(b[5s]))) => {} 0.5
        """, 'b{a="x",le="1"} 0 5; b{a="x",le="Inf"} 0 5; b{a="y",le="1"} 7 7; '
             'b{a="y",le="Inf"} 7 7')

    def test_a_group_gives_labels_of_its_one_series_to_many(self):
        self.check("""
            x * on (a) group_left y => {a="1",b="1"} 30; {a="1",b="2"} 60
            x * on(a) group_left(c) y => {a="1",b="1",c="C"} 30; {a="1",b="2",c="C"} 60
            y - on (a) group_right () x => {a="1",b="1"} 29; {a="1",b="2"} 28
            y > on (a) group_right () x => x{a="1",b="1"} 30; x{a="1",b="2"} 30
            x < bool on (a) group_left y => {a="1",b="1"} 1; {a="1",b="2"} 1
            x * on (a) group_left (none, d) y => {a="1",b="1"} 30; {a="1",b="2"} 60
            x + on (a) group_left (__name__) y => y{a="1",b="1"} 31; y{a="1",b="2"} 32
            x * on (nope) group_left nothing =>
        """, 'x{a="1",b="1"} 1; x{a="1",b="2"} 2; y{a="1",c="C"} 30')
        many = 'x{a="1",b="1"} 1; x{a="1",b="2"} 2; y{a="1",b="3"} 3; y{a="1",b="4"} 3'
        for expression in (
            "x * on (a) group_left y", "y > on (a) group_right x",
            "x * on () group_left (a) min without (b) (y) + on () group_left (b) x",
            'x / on (a) group_left (b) y{b="3"}', 'x > on (a) group_left (b) y{b="3"}',
        ):
            with self.subTest(expression), self.assertRaises(EvaluationError):
                answer(expression, many)

    def test_how_far_back_an_expression_looks_is_known_before_it_is_asked(self):
        for text, *expected in (
            ("x > 1 and y", 0, 0, 0), ("rate(x[5m]) > rate(x[1h])", 3600, 300, 0),
            ("x offset 1d", 86700, 300, 0), ("x offset -1d", 0, 0, 0),
            ("x offset -1d or x offset 1h", 3900, 300, 0),
            ("increase(x[1h]) / increase(x[1h] offset 1d)", 90000, 3600, 0),
            ("max_over_time((x > 0)[2h:1m])", 7500, 7500, 60),
            ("max_over_time(rate(x[5m])[2h:] offset 1h)", 11100, 300, 60),
            ("max_over_time(x[1h:1m]) > max_over_time(x[1h:90s])", 3900, 3900, 30),
            ("max_over_time(min_over_time(x[5m:10s])[2h:1m])", 7800, 7800, 10),
        ):
            with self.subTest(text):
                found = lookbacks([parse_expression(text)])
                self.assertEqual(found.get("y", Lookback()), Lookback())
                self.assertEqual(found["x"], tuple(expected))
        for text, least, most in (
            ("rate(x[5m])", 300 / 2048, 2048), ("x offset 7d", 75, 8068), ("x", 0, 1),
            ("max_over_time(x[1h:1m])", 3900 / 2048, 2113),
        ):
            back = lookbacks([parse_expression(text)])["x"]
            self.assertEqual((back.least, back.most), (least, most))
        for texts, words in (
            (["x offset 14d"], ""), (["x offset 20d"], "x is looked at 20d5m back"),
            (["rate(x[5m])", "rate(x[14d])"], ""), (["rate(x[30d])"], ""),
            (["rate(x[5m])", "rate(x[30d])"], "x is looked at 30d back: .*for 5m"),
            (["x @ 1"], "x @ 1 is about a moment"), (["max_over_time(x[30d:1h])"], ""),
            (["max_over_time(x[5m:] @ 1)"], r"x\[5m:1m\] @ 1 is about a moment"),
        ):
            problems = list(unholdable(list(map(parse_expression, texts))))
            self.assertRegex(" and ".join(problems), f"\\A{words}")
            self.assertEqual(len(problems), bool(words), problems)

    def test_an_aggregation_may_have_a_parameter(self):
        self.check("""
            topk(1, x) => x{a="2",b="1"} 9             bottomk(1, x) => x{a="1",b="1"} 1
            topk by (a) (1, x) => x{a="1",b="2"} 3; x{a="2",b="1"} 9
            topk without (b) (1.9, x) => x{a="1",b="2"} 3; x{a="2",b="1"} 9
            topk(0, x) =>                              bottomk(-3, x) =>
            count(topk(99, x)) => {} 3                 topk(1, nothing) =>
            topk(1, x) <- x{a="1"} NaN; x{a="2"} -Inf => x{a="2"} -Inf
            bottomk(1, x) <- x{a="1"} NaN; x{a="2"} Inf => x{a="2"} +Inf
            count(topk(2, x)) <- x{a="1"} 5; x{a="2"} 5; x{a="3"} 5 => {} 2
            quantile(0.5, x) => {} 3                   quantile(0.75, x) => {} 6
            quantile by (a) (0, x) => {a="1"} 1; {a="2"} 9
            quantile(2, x) => {} +Inf                  quantile(-1, x) => {} -Inf
            quantile(NaN, x) => {} NaN
            quantile(0, x) <- x{a="1"} NaN; x{a="2"} 1 => {} NaN
            quantile(1, x) <- x{a="1"} NaN; x{a="2"} 1 => {} 1
            count_values("v", x) => {v="1"} 1; {v="3"} 1; {v="9"} 1
            count_values by (a) ("v", x > 1) => {a="1",v="3"} 1; {a="2",v="9"} 1
            count_values without (b) ("a", x) => {a="1"} 1; {a="3"} 1; {a="9"} 1
            count_values without (v, a, b) ("v", x) => {} 3
            count_values("v", x) <- x{a="1"} NaN; x{a="2"} NaN => {v="NaN"} 2
            count_values("v", x) <- x -Inf => {v="-Inf"} 1
            count_values("v", x) <- x 1e-7 => {v="0.0000001"} 1
            stddev(x) <- x{a="1"} 2; x{a="2"} 4 => {} 1
            stdvar(x) <- x{a="1"} 2; x{a="2"} 6 => {} 4
            stddev(x) <- x 7 => {} 0                   stdvar(x) <- x Inf => {} NaN
            stddev(x) <- x{a="1"} NaN; x{a="2"} 6 => {} NaN
        """, 'x{a="1",b="1"} 1; x{a="1",b="2"} 3; x{a="2",b="1"} 9')
        for expression in (
            "topk(NaN, x)", "bottomk(Inf, x)", 'count_values("", x)',
            'label_replace(x, "", "", "", "")', 'label_join(x, "", "")',
            'label_replace(x, "a", "", "a", ".*")',
        ):
            with self.subTest(expression), self.assertRaises(EvaluationError):
                answer(expression, 'x{a="1"} 1; x{a="2"} 2')

    def test_only_what_ranges_give_is_kept_for_other_rules(self):
        evaluation = history("; ".join(f'x{{a="{i}"}} 1 2' for i in range(9)))
        for number in range(5):
            evaluate(parse_expression(f'x{{a!=""}} * {number} + 1'), evaluation)
        self.assertEqual(evaluation.computed, {})
        for _ in "12":
            evaluate(parse_expression("max_over_time(x[5s])"), evaluation)
        kept = evaluation.computed.values()
        self.assertEqual([len(found) for found in kept].count(9), 2)

    def calls_in_two_checks(self, function, expr, series):
        patch = mock.patch.object(health_check, function.__name__, side_effect=function)
        with patch as counted:
            for _ in "12":
                evaluate(expr, history(series))
        return counted.call_count

    def test_a_label_value_is_matched_once_for_all_checks(self):
        series = "; ".join(f'x{{a="{i}{"a" * 2000}"}} 1' for i in range(9))
        expr = parse_expression('x{a=~"[0-9](a|aa)*b?"}')
        self.assertEqual(self.calls_in_two_checks(regex_matches, expr, series), 9)
        for check in range(50):
            evaluate(expr, history(f'x{{a="{check}"}} 1'))
        seen = health_check._known_values("x", expr.matchers[0])
        self.assertLess(len(seen), 5)

    def test_a_label_value_is_replaced_once_and_so_much_text_at_a_time(self):
        expr = parse_expression('label_replace(x, "b", "$1", "a", "(.)(a|aa)*(.*)")')
        series = "; ".join(f'x{{a="{i}{"a" * 99}"}} 1' for i in range(5))
        self.assertEqual(self.calls_in_two_checks(regex_expand, expr, series), 5)
        for check in range(20):
            evaluate(expr, history(f'x{{a="{check}"}} 1'))
        with mock.patch.object(health_check, "MAX_REPLACED", 499):
            with self.assertRaisesRegex(EvaluationError, "more than 499 letters"):
                evaluate(expr, history(series))
            one = history(series.partition(";")[0])
            self.assertIn('b="0"', shown(evaluate(expr, one)))

    def test_a_subquery_of_too_many_points_is_an_error(self):
        series = "; ".join(f'x{{a="{i}"}} 1 1' for i in range(9))
        with mock.patch.object(health_check, "MAX_POINTS_OF_SUBQUERY", 50):
            self.check("count(count_over_time(x[5s:1s])) => {} 9", series)
            with self.assertRaisesRegex(EvaluationError, "more than 50 points"):
                answer("count(count_over_time(x[9s:1s]))", series, 5.0)

    def test_labels_are_replaced_and_joined(self):
        self.check(r"""
            label_replace(x, "p", "$1", "i", "(.*):(.*)") => x{i="h:80",p="h"} 1
            label_replace(x, "p", "$2${1}x", "i", "(.*):(.*)") => x{i="h:80",p="80hx"} 1
            label_replace(x, "p", "$1x", "i", "(.*)") => x{i="h:80"} 1
            label_replace(x, "p", "$$1$", "i", ".*") => x{i="h:80",p="$1$"} 1
            label_replace(x, "p", "$h", "i", "(?P<h>.).*") => x{i="h:80",p="h"} 1
            label_replace(x, "p", "$9$nope.", "i", "(.).*") => x{i="h:80",p="."} 1
            label_replace(x, "i", "", "i", ".*") => x 1
            label_replace(x, "i", "new", "nope", "") => x{i="new"} 1
            label_replace(x, "p", "new", "i", "h") => x{i="h:80"} 1
            label_replace(x, "__name__", "y", "", "") => y{i="h:80"} 1
            label_replace(x, "p", "$1", "i", "(?i)(H):.*") => x{i="h:80",p="h"} 1
            label_replace(x, "p", "$1$2", "i", "(a)|(h).*|(.*)") => x{i="h:80",p="h"} 1
            label_join(x, "p", "-", "i", "i") => x{i="h:80",p="h:80-h:80"} 1
            label_join(x, "p", "-", "i", "nope") => x{i="h:80",p="h:80-"} 1
            label_join(x, "i", "-") => x 1
            label_join(x, "i", ",", "__name__") => x{i="x"} 1
        """, 'x{i="h:80"} 1')
        self.check("""
            x * on (p) label_replace(y, "p", "$1", "i", "(.*):.*") => {p="h"} 6
        """, 'x{p="h"} 2; y{i="h:1"} 3')

    def test_what_looks_back_sees_what_Prometheus_would_have_seen(self):
        self.check("""
            x offset 1s => x 4                         x offset 3s =>
            x offset 2s => x 3                         x offset -1s => x 5
            x offset 4s => x 1                         x offset 5s =>
            x @ 1699999999 => x 4                      x @ 1699999999 offset 1s => x 3
            x @ 1700000000 offset -299s => x 5         x offset -300s =>
            sum_over_time(x[2s] offset 1s) => {} 7     increase(x[2s] offset 3s) =>
            timestamp(x offset 1500ms) => {} 1699999998
            timestamp(x offset 1s + 0) => {} 1700000000
            sum_over_time(x[5s:1s]) => {} 13           count_over_time(x[5s:1s]) => {} 4
            sum_over_time(x[5s:2s]) => {} 9
            max_over_time((x < 4)[9s:1s]) => {} 3
            sum_over_time(x[3s:1s] offset 1s) => {} 7
            last_over_time(x[9s:1s]) => x 5            first_over_time(x[9s:1s]) => x 1
            min_over_time(sum_over_time(x[2s])[3s:1s]) => {} 3
            max_over_time(sum_over_time(x[2s:1s])[2s:1s] @ 1699999999) => {} 7
            count_over_time(vector(1)[1h:7m]) => {} 9
            sum_over_time(timestamp(x)[2s:1s]) - 2 * 1.7e9 => {} -1
            absent_over_time(x[1s:1s] offset 3s) => {} 1
            absent_over_time(x[2s:1s]) =>
            predict_linear(x[2500ms] offset 0s, 0) => {} 5
            predict_linear(x[2500ms] offset 1s, 1) => {} 6
        """, "x 1 _ 3 4 5")
        self.check("""
            x offset 5m =>                             x offset 299s => x 1
            count_over_time(x[20m:1m]) => {} 5         last_over_time(x[20m:1m]) => x 1
        """, "x 1 2", step=299.5)

    def test_functions_of_ranges_are_those_of_Prometheus(self):
        self.check("""
            first_over_time(x[9s]) <- x 3 1 2 => x 3
            first_over_time(x[2s]) <- x 3 1 2 => x 1
            quantile_over_time(0.5, x[9s]) <- x 3 1 2 => {} 2
            quantile_over_time(0.25, x[9s]) <- x 1 2 => {} 1.25
            quantile_over_time(NaN, x[9s]) <- x 1 2 => {} NaN
            quantile_over_time(9, x[9s]) <- x 1 => {} +Inf
            stddev_over_time(x[9s]) <- x 1 3 => {} 1
            stdvar_over_time(x[9s]) <- x 1 5 => {} 4
            stddev_over_time(x[9s]) <- x 5 => {} 0
            stdvar_over_time(x[9s]) <- x Inf 1 => {} NaN
            deriv(x[9s]) <- x 1 3 5 => {} 2            deriv(x[9s]) <- x 1 =>
            deriv(x[9s]) <- x 7 7 7 => {} 0
            deriv(x[9s]) <- x Inf Inf => {} NaN
            deriv(x[9s]) <- x 1 NaN 3 => {} NaN
            predict_linear(x[9s], 10) <- x 1 3 5 => {} 25
            predict_linear(x[9s], -1) <- x 1 3 5 => {} 3
            predict_linear(x[9s], 60) <- x 7 7 => {} 7
            predict_linear(x[9s], 60) <- x 7 =>
        """)

    def test_functions_of_numbers_and_dates_are_those_of_Go(self):
        self.check("""
            clamp(x, 1, 2) <- x 5 => {} 2              clamp(x, 1, 2) <- x 0 => {} 1
            clamp(x, 2, 1) <- x 5 =>                   clamp(x, NaN, 1) <- x 5 => {} NaN
            sgn(x) <- x -3 => {} -1                    sgn(x) <- x NaN => {} NaN
            1 / sgn(x) <- x -0 => {} -Inf              sgn(x) <- x Inf => {} 1
            sqrt(x) <- x 9 => {} 3                     sqrt(x) <- x -1 => {} NaN
            exp(x) <- x 0 => {} 1                      exp(x) <- x 999 => {} +Inf
            exp(x) <- x -Inf => {} 0                   ln(x) <- x 0 => {} -Inf
            ln(x) <- x -1 => {} NaN                    log2(x) <- x 8 => {} 3
            log10(x) <- x 1000 => {} 3                 ln(x) <- x Inf => {} +Inf
            sin(x) <- x Inf => {} NaN                  cos(x) <- x 0 => {} 1
            asin(x) <- x 2 => {} NaN                   acosh(x) <- x 0 => {} NaN
            sinh(x) <- x -999 => {} -Inf               cosh(x) <- x -999 => {} +Inf
            atanh(x) <- x 1 => {} +Inf                 atanh(x) <- x -1 => {} -Inf
            atanh(x) <- x 2 => {} NaN                  tanh(x) <- x 0 => {} 0
            deg(x) <- x 0 => {} 0                      rad(x) <- x 180 => {} 3.141592654
            pi() => 3.141592653589793                  x atan2 1 <- x 0 => {} 0
            deg(vector(1) atan2 -1) => {} 135          x atan2 y <- x 0; y 1 => {} 0
            sort(x) <- x 1 => x 1                      sort_desc(x) <- x 1 => x 1
            hour() => {} 22                            minute() => {} 13
            month() => {} 11                           year() => {} 2023
            day_of_week() => {} 2                      day_of_month() => {} 14
            day_of_year() => {} 318                    days_in_month() => {} 30
            days_in_month(x) <- x 1709164800 => {} 29
            hour(x) <- x -1 => {} 23
            day_of_week(x) <- x 1700352000 => {} 0     year(x) <- x NaN => {} NaN
            hour(x) <- x 1e300 => {} NaN               month(x) <- x -0.5 => {} 1
        """)

    def test_a_fraction_of_a_histogram_is_that_between_two_bounds(self):
        buckets = 'b{le="1"} 4; b{le="3"} 8; b{le="+Inf"} 10'
        for bounds, fraction in claims("""
            0, 1 => 0.4        1, 3 => 0.4        0.5, 2 => 0.4       -5, 0 => 0
            3, +Inf => 0.2     5, 9 => 0          -Inf, +Inf => 1     2, 2 => 0
            2, 1 => 0          NaN, 1 => NaN      0, NaN => NaN       -Inf, 1 => 0.4
        """):
            with self.subTest(bounds):
                found = answer(f"histogram_fraction({bounds}, b)", buckets)
                self.assertEqual(found, "{} " + fraction)
        self.check("""
            histogram_fraction(0, 1, b) <- b{le="1"} 4 => {} NaN
            histogram_fraction(0, 1, b) <- b{le="1"} 0; b{le="+Inf"} 0 => {} NaN
            histogram_fraction(-9, -2, b) <- b{le="-1"} 4; b{le="+Inf"} 8 => {} 0
            histogram_fraction(-9, -1, b) <- b{le="-1"} 4; b{le="+Inf"} 8 => {} 0
            histogram_fraction(0, 1, b) <- b 4 =>
        """)

    def test_a_clamp_takes_an_infinity_before_NaN_as_Go_does(self):
        for expression, expected in (
            ("clamp_min(vector(NaN), Inf)", math.inf),
            ("clamp_max(vector(NaN), -Inf)", -math.inf),
        ):
            value = evaluate(parse_expression(expression), history(""))
            self.assertEqual(value, {(): expected})


class Rules(unittest.TestCase):
    def timeline(self, text, column, step=1.0):
        """Return the initials of the states that a rule about x goes through."""
        status, states = RuleStatus(parse_rules(text)[0]), ""
        for index, value in enumerate(column.split()):
            evaluation = history("" if value == "_" else f"x {value}", now=index * step)
            status = judge(status, evaluation)
            states += status.state[0]
        return states

    def test_a_newline_or_a_semicolon_ends_a_rule_unless_it_must_go_on(self):
        for text, *rules in (
            ("",),
            ("\n;; \t\r\n# x > 1\n;",),
            ("a; b", "Rule1: a", "Rule2: b"),
            ("a\r\nb;", "Rule1: a", "Rule2: b"),
            ("a # b; (\nc", "Rule1: a", "Rule2: c"),
            ("a{b='#;'};c", "Rule1: a{b='#;'}", "Rule2: c"),
            ("a{b=`\n;`}\nc", 'Rule1: a{b="\\n;"}', "Rule2: c"),
            ("a\n# b\n\n > 1", "Rule1: a > 1"),
            ("a >\n\n1\n-b", "Rule1: a > 1 - b"),
            ("a\nor b\nUNLESS\nc", "Rule1: a or b unless c"),
            ("a == bool\n1\nb", "Rule1: a == bool 1", "Rule2: b"),
            ("a + on\n(c)\nb", "Rule1: a + on (c) b"),
            ("sum(\na\n)\nb", "Rule1: sum(a)", "Rule2: b"),
            ("rate(a{\nb='c', #;\n}[\n5m\n])", "Rule1: rate(a{b='c'}[5m])"),
            ("a\nfor 5m\n\nkeep_firing_for 1h", "Rule1: a for 5m keep_firing_for 1h"),
            ("sum(a)\nby (b)\nby > 1", "Rule1: sum(a) by (b)", "Rule2: by > 1"),
            ("sum(a) > 1 or min\nwithout\n(b) (a)",
             "Rule1: sum(a) > 1 or min without (b) (a)"),
            ("rate(a\n[5m]\noffset 1h)\nb", "Rule1: rate(a[5m] offset 1h)", "Rule2: b"),
            ("a\n@ 5\noffset 5m\nb", "Rule1: a @ 5 offset 5m", "Rule2: b"),
            ("a * on (b)\ngroup_left\n(c)\nd", "Rule1: a * on (b) group_left (c) d"),
            ("A:\n a", "A: a"), ("Count\n(a)\nsum by (b)\n(c)\n(d)", "count(a)",
                                "Rule2: sum by (b) (c)", "Rule3: (d)"),
        ):
            with self.subTest(text):
                expected = tuple(parse_rules(rule)[0] for rule in rules)
                self.assertEqual(parse_rules(text), expected)

    def test_a_name_ends_in_a_colon_and_a_blank(self):
        for text, *names in (
            ("A: x; _b9:\ty; x", "A", "_b9", "Rule3"),
            ("vllm:x > 1", "Rule1"),
            ("Name:x", "Rule1"),
            ("for: x; sum: x; Rule9: x", "for", "sum", "Rule9"),
        ):
            with self.subTest(text):
                self.assertEqual([rule.name for rule in parse_rules(text)], names)

    def test_clauses_are_durations_and_no_text_is_builtin(self):
        for text, hold, keep in (
            ("x", 0, 0), ("x for 30", 30, 0), ("x FOR 1m30s", 90, 0),
            ("x keep_firing_for 5m", 0, 300), ("x for .5 keep_firing_for 9", 0.5, 9),
        ):
            (rule,) = parse_rules(text)
            self.assertEqual((rule.hold, rule.keep_firing_for), (hold, keep))
            self.assertFalse(rule.builtin)

    def test_what_is_no_rule_is_refused_with_its_place(self):
        PromQL.refused(self, parse_rules, claims("""
            x; «Rule1: y => a rule named Rule1 already
            x > 1 for« => a duration such as 30s          x for «-5 => a duration
            x for «5M => duration                       x for «y => a duration
            x for «1m_ => bad number                      x for 5m «> 1 => found '>'
            x keep_firing_for 5m «for 3m => found 'for'   A: «B: x => a rule's name
            A: «> 1 => expected an expression
            A: «; x => expected an expression
            A:« => found the end                          x«); y => found ')'
            «1 + 1 => this is a scalar
            A: «x[5m] => this is a range vector
            a«.b: x =>
        """))
        PromQL.refused(self, parse_rules, (
            ("A: x\n«A: y", "a rule named A already"),
            ("x\ny «z", "expected an operator, 'for', ';' or the end of the line"),
        ))

    def test_what_was_meant_for_a_name_or_for_an_alert_file_is_told_apart(self):
        PromQL.refused(self, parse_rules, claims("""
            «High-Queue: x => a rule's name               x > 10 «&& y => write 'and'
            Q «: x > 1 => a rule's name stands right before its colon
            x > 10 «|| y => write 'or'                    x «= 10 => '==' compares
            «alert: A => on a line here                   «expr: x > 1 => on a line here
        """))
        PromQL.refused(self, parse_rules, (
            ("«- alert: A\n  expr: x > 1\n  for: 5m", "Name: EXPRESSION for 5m"),
            ("«alert: A\nexpr: x > 1", "Name: EXPRESSION for 5m"),
            ("«groups:\n- name: a\n  rules:\n", "Name: EXPRESSION for 5m"),
        ))
        with self.assertRaisesRegex(PromQLError, "letters A to Z.*column 3"):
            parse_rules("Größe: x > 1")

    def test_alerts_that_end_make_room_although_their_rule_is_an_error(self):
        status = RuleStatus(parse_rules("x > 0 keep_firing_for 1m")[0])
        old, new = 'x{a="1"} 1; x{a="2"} 1', 'x{b="1"} 1; x{b="2"} 1'
        with mock.patch.object(health_check, "MAX_FOUND", 3):
            for now, text, state in (0, old, "firing"), (30, new, "error"):
                status = judge(status, history(text, now=now))
                self.assertEqual(status.state, state)
            status = judge(status, history(new, now=90))
        self.assertEqual(status.error, "")
        self.assertEqual([dict(a.labels)["b"] for a in status.alerts], ["1", "2"])

    def test_rules_are_written_as_text_that_gives_them_again(self):
        rules = parse_rules(RULES)
        names = "QueueFull CacheFull Stalled SlowTokens Down Rule6 Slow".split()
        self.assertEqual([rule.name for rule in rules], names)
        self.assertEqual(parse_rules(";".join(map(format_rule, rules))), rules)
        expected = "QueueFull: vllm:num_requests_waiting > 10 for 30s"
        self.assertEqual(format_rule(rules[0]), expected)

    def test_states_follow_the_clock_as_in_Prometheus(self):
        for text, column, states in (
            ("x > 1", "0 2 2 0 _ 2", "iffiif"),
            ("x > 1 for 2s", "2 2 2 2 0 2 2", "ppffipp"),
            ("x > 1 for 2s", "2 2 _ 2 2 2 NaN", "ppippfi"),
            ("x > 1 keep_firing_for 2s", "2 0 0 0 2 0 2 0 0 0", "fffifffffi"),
            ("x > 1 for 1s keep_firing_for 2s", "2 0 2 2 _ _ _ 2", "pipfffip"),
            ("absent(x)", "_ 0 _", "fif"),
        ):
            with self.subTest(text, column=column):
                self.assertEqual(self.timeline(text, column), states)
        self.assertEqual(self.timeline("x for 30s", "1 1 1", step=29.5), "ppf")

    def test_each_series_has_a_clock_of_its_own(self):
        status = RuleStatus(parse_rules("x > 1 for 2s")[0])
        for now, text, states in (
            (0, 'x{a="1"} 2; x{a="2"} 0', {"1": "pending"}),
            (2, 'x{a="1"} 2; x{a="2"} 3', {"1": "firing", "2": "pending"}),
            (3, 'x{a="1"} 0; x{a="2"} 4', {"2": "pending"}),
            (4, 'x{a="1"} 2; x{a="2"} 5', {"1": "pending", "2": "firing"}),
        ):
            status = judge(status, history(text, now=now))
            found = {dict(alert.labels)["a"]: alert.state for alert in status.alerts}
            self.assertEqual(found, states)
        one, two = sorted(status.alerts)
        self.assertEqual((one.since, one.value, one.fired), (4, 2, None))
        self.assertEqual((two.since, two.value, two.fired), (2, 5, 4))

    def test_a_rule_that_cannot_be_evaluated_keeps_its_alerts(self):
        rule = parse_rules("x > on (a) y keep_firing_for 9s")[0]
        good = 'x{a="1"} 2; y{a="1"} 1'
        before = judge(RuleStatus(rule), history(good, now=0))
        broken = judge(before, history(good + '; y{a="1",b="2"} 1', now=1))
        self.assertEqual((broken.state, broken.alerts), ("error", before.alerts))
        self.assertIn("many-to-many", broken.error)
        again = judge(broken, history(good, now=2))
        self.assertEqual((again.state, again.error), ("firing", ""))
        self.assertEqual(again.alerts[0].since, 0)
        # Nor at a moment at which its subquery has no step and asks for nothing.
        thinned = history("x 1 2")._replace(thinned={"x": 200.0})
        rule = parse_rules("max_over_time(rate(x[5m])[1ms:7s]) > 0")[0]
        self.assertIn("too few for x[5m]", judge(RuleStatus(rule), thinned).error)

    def test_a_restart_of_the_clocks_forgets_what_is_pending_and_nothing_else(self):
        status = RuleStatus(parse_rules("x > 1 for 2s")[0])
        for now, text in (0, 'x{a="1"} 2'), (2, 'x{a="1"} 2; x{a="2"} 2'):
            status = judge(status, history(text, now=now))
        (alert,) = restart_clocks(status).alerts
        self.assertEqual((dict(alert.labels)["a"], alert.state), ("1", "firing"))

    def test_two_series_that_differ_in_their_name_only_are_an_error(self):
        rule = parse_rules("x or on (__name__) y")[0]
        status = judge(RuleStatus(rule), history("x 1; y 1"))
        self.assertEqual(status.state, "error")

    def test_a_rule_that_compares_with_a_number_shows_how_near_it_is(self):
        for text, value, limit in (
            ("x > 10", 7, 10), ("x < 1", 3, 1), ("sum(x) >= -2", 10, -2),
            ("x > bool 1", None, None), ("x", None, None), ("z > 5", None, 5),
            ("x == 3", 3, 3), ("x != 7", 3, 7),
            ("10 < x", 7, 10), ("1 > x", 3, 1), ("5 < on () x", 7, 5),
            ("x > y", None, None),
        ):
            with self.subTest(text):
                rule = parse_rules(text)[0]
                evaluation = history('x{a="1"} 3; x{a="2"} 7')
                status = judge(RuleStatus(rule), evaluation)
                self.assertEqual((status.value, status.limit), (value, limit))

    def test_the_series_that_its_selectors_match_are_counted(self):
        rule = parse_rules("x > 99 or sum(y{a!='1'}) > 99 or rate(z[5s]) > 99")[0]
        evaluation = history('x 1; y{a="1"} 1; y{a="2"} 1; y{a="3"} 1; z 1 _')
        self.assertEqual(judge(RuleStatus(rule), evaluation).matched, 4)


class Replay:
    """The rules of a configuration over pages that targets show, one a check."""

    CONFIG = load_config({})._replace(history_limit=WHOLE << 6)

    def __init__(self, config=CONFIG):
        self.judge = Judge(config, (), warn=lambda messages: [*messages])
        self.format, self.own = format_for(self.judge.wanted, ()), config.target_labels
        self.verdict = Verdict(0, "", 0.0, WALL)

    def look(self, texts, every, probes=()):
        """Return the verdict of the next check."""
        now = self.verdict.time + every
        scrapes = [self.scrape(str(n), text) for n, text in enumerate(texts)]
        check = Check(now, WALL + now)
        self.verdict = self.judge.verdict_of(check, (scrapes, probes), self.verdict)
        return self.verdict

    def check(self, texts, every):
        """Return the alerts at the next check: (rule, instance) of each that fires."""
        statuses = self.look(texts, every).rules
        assert not any(status.error for status in statuses), statuses
        return {
            (status.rule.name, dict(alert.labels)["instance"])
            for status in statuses for alert in status.alerts
            if alert.state == "firing"
        }  # fmt: skip

    def scrape(self, instance, text):
        own = (("instance", instance), *self.own)
        scrape = Scrape(TargetStatus(instance), own)
        if text in SCRAPE_REASONS:
            return scrape.failed(text, "")
        format = self.format._replace(labels=own)
        stream = Stream("text/plain", io.BytesIO(text.encode()).readinto)
        return scrape._replace(reading=read_samples(stream, format, {}))

    def run(self, rows, every=10):
        """Return of each target when each rule began to fire, and which do at the end.

        A row has the texts of a target, one a check.
        """
        since, firing, start = [{} for _ in rows], set(), self.verdict.time
        for texts in zip(*rows):
            firing = self.check(texts, every)
            for rule, instance in firing:
                since[int(instance)].setdefault(rule, self.verdict.time - start)
        return [
            (found, {rule for rule, instance in firing if int(instance) == n})
            for n, found in enumerate(since)
        ]


def vllm(
    running=0, waiting=0, tokens=0, cache=0.5, *, ok=0, failed=0, awake=1, engine=0
):  # fmt: skip
    """Return a page of vLLM."""
    requests = 'http_requests_total{handler="/v1/completions",status='
    return (
        f'vllm:num_requests_running{{engine="{engine}"}} {running}\n'
        f'vllm:num_requests_waiting{{engine="{engine}"}} {waiting}\n'
        f'vllm:generation_tokens_total{{engine="{engine}"}} {tokens}\n'
        f'vllm:prompt_tokens_total{{engine="{engine}"}} 7\n'
        f'vllm:kv_cache_usage_perc{{engine="{engine}",pid="1"}} {cache}\n'
        f'vllm:engine_sleep_state{{engine="{engine}",sleep_state="awake"}} {awake}\n'
        f'{requests}"2xx"}} {ok}\n{requests}"5xx"}} {failed}\n'
    )


# What runs or waits, and what moves with it, of each server whose stalls are seen.
STALLS = """
vllm:num_requests_running{engine="0"} => vllm:generation_tokens_total{engine="0"}
vllm:num_requests_waiting{engine="0"} => vllm:prompt_tokens_total{engine="0"}
vllm:num_requests_running => vllm:kv_cache_usage_perc{pid="7"}
vllm:num_requests_running{pid="1"} => vllm:gpu_cache_usage_perc
ray_vllm:num_requests_running{Id="1"} => ray_vllm:prompt_tokens_total{Id="1"}
ray_vllm_num_requests_waiting => ray_vllm_generation_tokens_total
sglang:num_running_reqs{priority=""} => sglang:realtime_tokens_total{mode="decode"}
sglang:num_queue_reqs => sglang:realtime_tokens_total{mode="prefill_compute"}
sglang:num_running_reqs => sglang:token_usage
sglang:http_requests_active{endpoint="/generate"} => sglang:realtime_tokens_total
tgi_queue_size => tgi_batch_inference_success{method="decode"}
tgi_batch_current_size => tgi_batch_inference_count{method="prefill"}
llamacpp:requests_processing => llamacpp:n_decode_total
llamacpp:requests_deferred => llamacpp:n_decode_total
num_requests_running => generation_tokens_total
nv_inference_pending_request_count => nv_inference_exec_count{gpu_uuid="g"}
nv_trt_llm_request_metrics{request_type="active"} => {iteration}
nv_trt_llm_request_metrics{request_type="waiting"} => {iteration}
trtllm_num_requests_running => trtllm_kv_cache_gen_alloc_blocks_total
lmdeploy:num_requests_running => lmdeploy:generation_tokens_total
lmdeploy:num_api_requests_waiting => lmdeploy:gpu_cache_usage_perc
{queued}dynamo_frontend_inflight_requests => dynamo_frontend_output_tokens_total
maxserve_num_requests_running => {batch}{batch_type="CE"}
ray_serve_deployment_queued_queries{handle="h"} => ray_serve_num_http_requests_total
mosec_service_remaining_task => {mosec}{stage="total"}
rest_server_requests_in_progress{method="POST"} => model_infer_request_duration_count
litellm_in_flight_requests => litellm_proxy_total_requests_metric_total{user="u"}
gpustack:num_requests_running => gpustack:generation_tokens_total
ovms_current_requests{version="1"} => ovms_requests_success{api="v1"}
te_queue_size => te_request_success{method="single"}
"""
SHORT = {
    "{iteration}": 'nv_trt_llm_general_metrics{general_type="iteration_counter"}',
    "{batch}": "maxserve_batch_execution_time_milliseconds_count",
    "{mosec}": "mosec_service_process_duration_second_count",
    "{queued}": "dynamo_frontend_queued_requests 1\n",
}


class Servers(unittest.TestCase):
    def test_each_state_of_a_vllm_has_its_verdict_after_its_time(self):
        idle, nothing = [vllm()] * 48, ["python_info 1\n"] * 48
        busy = [vllm(4, 3, n) for n in range(48)]
        other = [vllm(4, 3, n, engine=1) for n in range(48)]
        stall = {"Stalling": 100, "Stalled": 320}
        states = (
            ("idle", idle, idle, {}),
            ("busy", busy, busy[14:], {}),
            ("full", busy, [vllm(64, 448, n) for n in range(14, 48)],
             {"QueueFull": 40}),
            ("long prefill", busy, [vllm(1, 39, 30, n / 99) for n in range(34)],
             {"QueueFull": 40}),
            ("hung kernel", busy, [vllm(50, 0, 99)] * 34, stall),
            ("its clients gone", busy, [vllm(50, 0, 99, ok=n) for n in range(34)],
             {**stall, "Unanswered": 130}),
            ("hung while idle", idle, [vllm()] * 34, {}),
            ("one client gave up", idle, [vllm(ok=1)] * 34, {}),
            ("two clients gave up", idle, [vllm(ok=2)] * 34, {"Unanswered": 10}),
            ("one of two engines", [a + b for a, b in zip(busy, other)],
             [vllm(4, 3, 13) + page for page in other[14:48]],
             {"Stalling": 90, "Stalled": 310}),
            ("none runs, six wait", busy, [vllm(0, 6, 99)] * 34, stall),
            ("metrics hang", busy, ["timeout"] * 34, {"Down": 40}),
            ("refused", busy, ["refused"] * 34, {"Down": 10}),
            ("no vllm: family", nothing, nothing, {}),
            ("all fail", [vllm(1, 0, n, ok=n) for n in range(14)],
             [vllm(1, 0, n, ok=13, failed=n) for n in range(34)], {"Failing": 290}),
            ("asleep", idle, [vllm(0, 3, ok=n, awake=0) for n in range(34)], {}),
        )  # fmt: skip
        replay = Replay()
        for found in replay.run([before[:14] for _, before, _, _ in states]):
            self.assertEqual(found, ({}, set()))
        found = replay.run([pages for _, _, pages, _ in states])
        for (state, _, _, expected), (since, firing) in zip(states, found):
            with self.subTest(state):
                self.assertEqual(since, expected)
                self.assertEqual(firing, {*expected})

    def stalls(self):
        """Return what runs or waits and what moves, as lines of a page."""
        lines = STALLS.strip().split("\n")
        for short, text in SHORT.items():
            lines = [line.replace(short, text) for line in lines]
        return [line.split(" => ") for line in lines]

    def test_each_known_server_stalls_when_what_moves_stands(self):
        rows = self.stalls()
        stand = [f"{busy} 3\n{moving} 7\n" for busy, moving in rows]
        for every, first in (10, 90), (30, 120), (60, 180):
            replay, since = Replay(), {}
            for _ in range(360 // every + 1):
                for rule, instance in replay.check(stand, every):
                    since.setdefault((rule, int(instance)), replay.verdict.time - every)
            for name, after in ("Stalling", first), ("Stalled", 300 + every):
                found = {i: since.get((name, i)) for i in range(len(rows))}
                self.assertEqual(found, dict.fromkeys(range(len(rows)), after))
            self.assertEqual({rule for rule, _ in since}, {"Stalling", "Stalled"})

    def test_no_known_server_stalls_that_moves_or_has_nothing_to_do(self):
        rows = self.stalls()
        rest = [f"{busy} {int('litellm' in busy)}\n" for busy, _ in rows]
        replay = Replay()
        for n in range(13):
            move = [f"{busy} 3\n{moving} {n}\n" for busy, moving in rows]
            self.assertEqual(replay.check([*move, *rest], 30), set())

    def test_what_a_server_showed_before_it_was_restarted_is_forgotten(self):
        rows = [f"{busy} 3\n{moving} 7\n" for busy, moving in self.stalls()]
        replay, fresh = Replay(), ["python_info 1\n"] * len(rows)
        stalled = {(name, str(n)) for n in range(len(rows)) for name in HUNG}
        for _ in range(7):
            firing = replay.check(rows, 60)
        self.assertEqual(firing, stalled)
        down = replay.check(["refused"] * len(rows), 60)
        self.assertEqual({rule for rule, _ in down}, {"Down"})
        self.assertEqual(replay.check(fresh, 60), set())

    def test_no_canary_is_due_for_what_a_server_showed_before_it_was_restarted(self):
        for page, every, rule in (vllm(), 30, "Idle"), (vllm(1), 10, "Stuck"):
            replay = Replay(Replay.CONFIG._replace(rules=canary_rules(300.0)))
            self.assertEqual(replay.run([[page] * 13], every)[0][1], {rule})
            self.assertEqual(replay.run([["refused"]])[0][1], set())

    def test_Unanswered_outlasts_the_clients_and_neither_a_restart_nor_a_recovery(self):
        replay, gone, refused = Replay(), vllm(ok=2), "refused"
        moved, new = vllm(tokens=1, ok=2), "python_info 1\n"
        rows = [[gone] * 2, [moved, moved], [refused, new], [gone, refused]]
        replay.run([[vllm()] * 14] * 4)
        for every, count in (10, 1), (50, 12):
            for _, firing in replay.run([[gone] * count] * 4, every):
                self.assertEqual(firing, {"Unanswered"})
        found = [[firing for _, firing in replay.run([row[n : n + 1] for row in rows])]
                 for n in range(2)]
        self.assertEqual(found[0], [{"Unanswered"}, set(), {"Down"}, {"Unanswered"}])
        self.assertEqual(found[1], [{"Unanswered"}, set(), set(), {"Down"}])

    def test_requests_that_ended_are_counted_however_far_apart_checks_are(self):
        quiet = vllm(ok=900, failed=900)
        rows = [vllm(ok=901, failed=902), vllm(ok=902, failed=900),
                vllm(ok=900, failed=903)]  # fmt: skip
        for every in (10, 34, 35, 45, 60, 90):
            replay = Replay()
            replay.run([[quiet] * 4] * 3, every)
            found = replay.run([[row] * 4 for row in rows], every)
            firing = [{*since} for since, _ in found]
            two = {"Unanswered"} if every < 70 else set()
            self.assertEqual(firing, [set(), two, {"Failing"}])

    def test_a_gauge_of_MAX_that_vanishes_is_no_stall(self):
        name = "maxserve_batch_execution_time_milliseconds_count"
        full = "maxserve_num_requests_running 6\nmaxserve_num_requests_queued 9\n"
        busy = [f"{full}{name} {n}\n" for n in range(6)]
        idle = [f"maxserve_num_requests_running 0\n{name} 9\n"] * 30
        self.assertEqual(Replay().run([busy + idle]), [({}, set())])

    def test_rules_of_ones_own_take_no_server_out_of_what_drains(self):
        found = []
        for name, text in ("POD_NAME", "a"), ("UNHEALTHY_WHEN", "A: x > 1"):
            rules = load_config({name: text}).rules
            found.append(drain_expression([rule.expr for rule in rules]))
        self.assertEqual(*map(format_expression, found))

    def test_labels_of_targets_are_none_that_built_in_rules_mean(self):
        texts = " ".join(map(format_rule, Replay.CONFIG.rules))
        labels = {*re.findall(r"(\w+)[!=]~?\"", texts), "engine"}
        for found in re.findall(r"(?:on|by|ignoring) \(([^)]*)\)", texts):
            labels.update(found.split(", "))
        labels -= {"instance", "reason", ""}
        text = ",".join(f"{label}=x" for label in labels)
        config = load_config({"TARGET_LABELS": text})
        replay, rows = Replay(config), self.stalls()
        for n in range(7):
            pages = [f"{busy} 3\n{moving} {min(n, 2)}\n" for busy, moving in rows]
            pages.append(vllm(1, 0, min(n, 2), failed=n))
            firing = replay.check(pages, 60)
            self.assertTrue(not firing or n > 3, firing)
        stalling = {("Stalling", str(n)) for n in range(len(rows) + 1)}
        self.assertEqual(firing, {*stalling, ("Failing", str(len(rows)))})

    def test_one_failed_scrape_is_no_news(self):
        for every, losses in (10, (60, 30, 18, 6)), (30, (18, 6)), (60, (18, 6)):
            rows = []
            for lost, phase in itertools.product(losses, (0, 3)):
                hung = [vllm(50, 0, 99)] * (600 // every)
                hung[phase::lost] = ["http_status"] * len(hung[phase::lost])
                rows.append([vllm(50, 0, n) for n in range(14)] + hung)
            replay = Replay()
            replay.run([row[:14] for row in rows], every)
            for since, firing in replay.run([row[14:] for row in rows], every):
                for name, hold in ("Stalling", 80), ("Stalled", 300):
                    most = 3 * every + hold
                    self.assertLessEqual(since[name], most + -most % every)
                    self.assertIn(name, firing)

    def test_late_scrapes_hide_no_lack_of_a_model_and_make_none(self):
        known = "dynamo_tokio_queue_overload_warnings_total 0\n"
        gone = ["smg_worker_health 0\n", "vllm_router_worker_health 0\n",
                f"dynamo_frontend_disconnected_clients 0\n{known}"]  # fmt: skip
        there = [page.replace("health 0", "health 1") for page in gone]
        there[2] += "dynamo_frontend_model_ready 1\n"
        replay = Replay()
        for pages, fires in (there, set()), (gone, {"NoModel"}), (there, set()):
            rows = [[page, page, "timeout"] * 3 for page in pages]
            for _, firing in replay.run(rows):
                self.assertEqual(firing, fires)

    def test_late_scrapes_keep_no_queue_that_a_dead_worker_has_left(self):
        pages = [f"xinference:model_serve_count {n}\n" for n in range(20, 26)]
        row = [*pages, *[pages[-1], pages[-1], "timeout"] * 23]
        ((since, firing),) = Replay().run([row])
        self.assertEqual((since["QueueFull"], firing), (40, set()))

    def test_a_slow_answer_is_no_dead_server(self):
        page, late = vllm(), "timeout"
        longer = zip(*[(30, 60, 120, 200, 290, 300)] * 2)
        for every, after in ((1, 30), (10, 30), (15, 30), *longer):
            replay = Replay()
            self.assertEqual(replay.run([[page, late, page] * 4], every)[0][0], {})
            ((since, _),) = replay.run([[late] * (after // every + 1)], every)
            self.assertEqual(since["Down"], every + after, every)
            self.assertEqual(replay.run([[page]], every)[0][1], set())
        for every in 1, 5, 10, 30:
            replay = Replay()
            replay.look([page, page], every)
            for n, text in enumerate(["refused", *[late] * (30 // every + 2)]):
                other = page if n > 1 else "refused"
                self.assertEqual(replay.look([text, other], every).reason, "Down")
        rows = [[page, reason] for reason in SCRAPE_REASONS if reason != late]
        for _, firing in Replay().run(rows):
            self.assertEqual(firing, {"Down"})

    def test_a_rule_of_the_table_is_what_the_servers_there_make_of_it(self):
        for text, expected in (
            ("(a or b) > 1 => b > 1", "b"), ("a or c => c", "c"), ("a and b => ", "b"),
            ("b unless a => b", "b"), ("a unless b => ", "b"), ("a + 1 => ", "b"),
            ("sum(a) or rate(b[1m]) => rate(b[1m])", "b"), ("a or a => ", "b"),
            ("absent(a) and b => absent(a) and b", "b"), ("vector(1) => vector(1)", ""),
            ("b > scalar(a) => b > scalar(a)", "b"), ("-a => ", "b"), ("a => a", "a"),
        ):
            whole, left = text.split(" => ")
            pruned = prune(parse_expression(whole), {expected})
            self.assertEqual(pruned and format_expression(pruned), left or None)

    def test_what_people_see_is_what_concerns_the_servers_there(self):
        replay = Replay()
        about = "when too many requests wait, for 30s keep_firing_for 30s"
        unread = RuleStatus(Replay.CONFIG.rules[0])
        self.assertEqual(health_check.explain(unread), about)
        replay.run([[vllm()]])
        shown = {s.rule.name: health_check.explain(s) for s in replay.verdict.rules}
        queue = "last_over_time(vllm:num_requests_waiting[1m]) > 10"
        self.assertEqual(shown["QueueFull"], f"{queue} for 30s keep_firing_for 30s")
        stalled = "when requests run or wait and nothing moves, for 5m: vllm:num_req"
        self.assertTrue(shown["Stalled"].startswith(stalled), shown["Stalled"])
        self.assertTrue(shown["NoModel"].startswith("when no model, or no worker"))
        for status in replay.verdict.rules:
            whole = health_check.expression_of(status)
            self.assertNotRegex(whole, "sglang|gpu_cache")
            self.assertEqual(not whole, status.rule.name == "NoModel")

    def test_what_people_see_of_a_rule_is_a_line_or_two(self):
        for server in SERVERS:
            replay = Replay()
            names = {*own_names(server)}.intersection(replay.format.names)
            replay.run([["".join(f"{name} 1\n" for name in names)]])
            for status in replay.verdict.rules:
                with self.subTest(server.name, rule=status.rule.name):
                    self.assertLess(len(health_check.explain(status)), 250)

    def test_each_server_is_known_by_names_of_its_own(self):
        names = [name for server in SERVERS for name in own_names(server)]
        self.assertEqual(sorted(names), sorted(set(names)))
        for server in SERVERS:
            for name in own_names(server):
                self.assertEqual([*servers_there([name, "up"])], [server])
        for name, expected in (
            ("sglang_num_queue_reqs", "SGLang"), ("vllm:num_preemptions_total", "vLLM"),
            ("tgi_request_count", "TGI"), ("python_info", None), ("", None),
            ("request_processing_time_sum", None),
        ):
            server = nearest_server([name, "process_cpu_seconds_total"])
            self.assertEqual(server and server.name, expected)


MANIFEST = {"METRICS_THRESHOLD": "10", "METRIC_TO_CHECK": "tgi_queue_size"}

# Of each kind of mistake in settings one or two; a bar parts two settings.
MISTAKES = """
METRICS_ENDPOINT=htps://h:8000/metrics
METRICS_ENDPOINT=ftp://h:8000/metrics
METRICS_ENDPOINT=javascript://h:8000/metrics
METRICS_ENDPOINT=localhost:8000/metrics
METRICS_ENDPOINT=http:/localhost:8000/metrics
METRICS_ENDPOINT=http//localhost:8000/metrics
METRICS_ENDPOINT=http://localhost:80000/metrics
METRICS_ENDPOINT=http://localhost: 8000/metrics
METRICS_ENDPOINT=http://:8000/metrics
METRICS_ENDPOINT=http://$(HOST):8000/metrics
METRICS_ENDPOINT=http://${HOST}:8000/metrics
METRICS_ENDPOINT=http://<host>:8000/metrics
METRICS_ENDPOINT="http://localhost:8000/metrics"
METRICS_ENDPOINT=http://h/metrics,http://h/metrics
METRICS_ENDPOINT=http://h/metrics#all
METRICS_ENDPOINT=http://h/metrics;http://i/metrics
METRICS_ENDPOINT=http://h/metrics http://i/metrics
METRICS_ENDPOINT=http://localhost:8081/metrics
METRICS_ENDPOINT=http://127.0.0.1:9000/metrics|APP_PORT=9000
ALERTMANAGER_URL=htps://am:9093
ALERTMANAGER_URL=am:9093
ALERTMANAGER_URL=http://u:p@am:9093
ALERTMANAGER_URL=http://am:9093,http://am:9093/
HEALTH_ENDPOINT=htps://h:8000/health
CANARY_URL=htps://h:8000/v1/completions
TARGET_LABELS=job:vllm
TARGET_LABELS=job
TARGET_LABELS=job=
TARGET_LABELS==vllm
TARGET_LABELS=job="vllm
TARGET_LABELS={job="vllm"}
TARGET_LABELS=job=vllm namespace=prod
TARGET_LABELS=job=vllm;namespace=prod
TARGET_LABELS=job==vllm
TARGET_LABELS=job=~vllm
TARGET_LABELS=job=vllm,job=sglang
TARGET_LABELS=instance=a
TARGET_LABELS=__name__=a
TARGET_LABELS=__meta=a
TARGET_LABELS=le=1
TARGET_LABELS=reason=a
TARGET_LABELS=probe=a
TARGET_LABELS=pod=$(POD_NAME)
TARGET_LABELS=pod={{ .Values.pod }}
EXIT_AFTER=5m
LAST_WORDS=/tmp/last
ALERT_LABELS=severity=critical
ALERTMANAGER_BEARER_TOKEN_FILE=/dev/null
ALERTMANAGER_CA_FILE=/dev/null
ALERT_LABELS=value={{ $value }}
ALERT_LABELS=alertname=X
ALERT_LABELS=severity
ALERT_LABELS=a.b=c
POD_NAME=$(POD)
UNHEALTHY_WHEN=up{job="vllm"} == 0
UNHEALTHY_WHEN=up{instance="vllm:8000"} == 0
UNHEALTHY_WHEN=scrape_error{reason="time-out"}
UNHEALTHY_WHEN=ALERTS{alertname="X"}
UNHEALTHY_WHEN=scrape_timeout_seconds > 1
UNHEALTHY_WHEN=rate(x[10s]) > 1|SCRAPE_INTERVAL=10
UNHEALTHY_WHEN=rate(x[15s]) > 1|SCRAPE_INTERVAL=10
METRICS_TIMEOUT=800
METRICS_TIMEOUT=0
METRICS_TIMEOUT=-1
METRICS_TIMEOUT=0,8
METRICS_TIMEOUT=0.8 s
METRICS_TIMEOUT=1 second
METRICS_TIMEOUT=1m1
SCRAPE_INTERVAL=0.5
SCRAPE_INTERVAL=5000
SCRAPE_INTERVAL=5m
SCRAPE_INTERVAL=1000
SCRAPE_INTERVAL=10 s
SCRAPE_INTERVAL=10sec
SCRAPE_INTERVAL=15S
SCRAPE_INTERVAL=infinity
SCRAPE_INTERVAL=15_000
APP_PORT=tcp://10.0.0.1:80
APP_PORT=udp://10.0.0.1:80
APP_PORT=http://10.0.0.1:80
APP_PORT=http
APP_PORT=:8081
METRIC_ENDPOINT=http://h/
metrics_endpoint=http://h/
METRICS_URL=http://h/
METRICS-ENDPOINT=http://h/
METRICS_ENDPOINTS=http://h/
UNHEALTHY_IF=x > 1
SCRAPE_TIMEOUT=1
ALERTMANAGER_ENDPOINT=http://am
METRIC_THRESHHOLD=1
METRIC_TO_CHECK=x|METRIC_THRESHOLD=inf
METRIC_TO_CHECK=x
METRIC_THRESHOLD=1|UNHEALTHY_WHEN=x > 1
UNHEALTHY_WHEN=A: x > 1; A: y > 1
UNHEALTHY_WHEN=High-Queue: x > 1
EXIT_WHEN=Staled
METRICS_CERT_FILE=/nowhere|METRICS_KEY_FILE=/nowhere
METRICS_KEY_FILE=/nowhere
LOG_LEVEL=warn
LOG_FORMAT=jsn
METRICS_TLS_SKIP_VERIFY=yes
"""


class Config(unittest.TestCase):
    def problems(self, **environ):
        """Return the first line of each problem of a configuration."""
        with self.assertRaises(ConfigError) as caught:
            load_config(environ)
        return [line for line in str(caught.exception).split("\n") if line[0] > " "]

    def test_what_would_be_ignored_is_refused(self):
        (problem,) = self.problems(UNHEALTHY_WHEN="# none")
        self.assertIn("UNHEALTHY_WHEN has no rule", problem)
        (problem,) = self.problems(ALERTMANAGER_URL="http://u:hush@host/")
        self.assertIn("ALERTMANAGER_BEARER_TOKEN_FILE", problem)
        self.assertNotIn("hush", problem)

    def test_an_Alertmanager_is_named_once_and_may_leave_out_the_path_of_its_API(self):
        for url, sent_to in (
            ("http://am:9093", "http://am:9093/api/v2/alerts"),
            ("http://am:9093/", "http://am:9093/api/v2/alerts"),
            ("http://am/a/?b=c", "http://am/a/api/v2/alerts?b=c"),
            ("http://am/api/v2/alerts", "http://am/api/v2/alerts"),
            ("http://am/api/v2/alerts/", "http://am/api/v2/alerts"),
        ):
            (target,) = load_config({"ALERTMANAGER_URL": url}).alertmanager_url
            self.assertEqual(target.address, sent_to)
        two = load_config({"ALERTMANAGER_URL": "http://am/a,http://am/b"})
        self.assertEqual(len({target.url for target in two.alertmanager_url}), 2)
        twice = "http://am:9093/?a=hush,http://am:9093/api/v2/alerts"
        (problem,) = self.problems(ALERTMANAGER_URL=twice)
        self.assertIn("http://am:9093/api/v2/alerts is there twice", problem)
        self.assertNotIn("hush", problem)

    def test_nothing_set_is_a_whole_configuration(self):
        for environ in {}, {setting.name: " " for setting in SETTINGS}:
            config = load_config(environ)
            (target,) = config.metrics_endpoint
            self.assertEqual(target.url, "http://localhost:8080/metrics")
            self.assertEqual((config.app_port, config.app_host), (8081, ""))
            self.assertEqual((config.metrics_timeout, config.scrape_interval), (0.8, 0))
            self.assertEqual((config.log_level, config.log_format), ("info", "text"))
            self.assertIs(config.metrics_tls_skip_verify, False)
            self.assertEqual((config.target_labels, config.warnings), ((), ()))

    def test_each_setting_has_a_name_a_default_that_parses_and_a_line_of_help(self):
        self.assertEqual(len({setting.name for setting in SETTINGS}), len(SETTINGS))
        for setting in SETTINGS:
            with self.subTest(setting.name):
                value = getattr(load_config({}), setting.name.lower())
                self.assertEqual(setting.parse(setting.default), value)
                self.assertRegex(setting.help, r"\A\w.+[^.\n]\Z")

    def test_each_setting_takes_what_it_promises(self):
        for name, text, value in (
            ("TARGET_LABELS", 'job="a b", x=1,,y=', (("job", "a b"), ("x", "1"))),
            ("METRIC_THRESHOLD", " -1.5e1 ", -15), ("METRICS_THRESHOLD", "0", 0),
            ("APP_PORT", "0", 0), ("APP_PORT", "65535", 65535),
            ("APP_HOST", "127.0.0.1", "127.0.0.1"), ("METRICS_CA_FILE", "/ca", "/ca"),
            ("METRICS_TIMEOUT", "500ms", 0.5), ("METRICS_TIMEOUT", "60", 60),
            ("SCRAPE_INTERVAL", "1m30s", 90), ("METRICS_TLS_SKIP_VERIFY", "True", True),
            ("METRICS_TIMEOUT", "0.8s", 0.8), ("SCRAPE_INTERVAL", "1.5m", 90),
            ("SCRAPE_INTERVAL", "1m1.5s250ms", 61.75), ("SCRAPE_INTERVAL", ".5h", 1800),
            ("LOG_LEVEL", "Debug", "debug"), ("LOG_FORMAT", "JSON", "json"),
        ):
            with self.subTest(name, text=text):
                config = load_config({name: text})
                self.assertEqual(getattr(config, name.lower()), value)

    def test_each_setting_refuses_the_rest_and_says_what_it_expects(self):
        urls = "h:80 http:// http://h:x/ http://h:0/ http://h/#x http:/h:80 //h:80/"
        schemes = "htps ftp file javascript unix httpss https+unix ws x".split()
        strange = [f"{s}://h{port}/metrics" for s in schemes for port in ("", ":8000")]
        for name, texts, words in (
            ("METRICS_ENDPOINT", urls.split(), "http://localhost:8000/metrics"),
            ("METRICS_ENDPOINT", strange, "http://localhost:8000/metrics"),
            ("ALERTMANAGER_URL", [*strange, *urls.split()], "expected a URL"),
            ("HEALTH_ENDPOINT", [*strange, *urls.split()], "expected a URL"),
            ("CANARY_URL", [*strange, *urls.split()], "expected a URL"),
            ("METRICS_ENDPOINT", ["http://[::1", "http://h/\u00e9", "http://:"], "URL"),
            ("METRICS_ENDPOINT", [",", " , ,"], "commas"),
            ("ALERTMANAGER_URL", [","], "commas"), ("ALERT_LABELS", [","], "commas"),
            ("METRICS_ENDPOINT", ["http://h:1/a, http://H:1/b"], "h:1"),
            ("METRICS_TLS_SKIP_VERIFY", ["1", "yes"], "true, false"),
            ("TARGET_LABELS", ["job", "9=a", "a-b=c", "a.b=c"], "job=vllm"),
            ("TARGET_LABELS", ["instance=x,a=b", "instance=x"], "instance"),
            ("TARGET_LABELS", ["a=b,a=c", "__name__=x"], "the label"),
            ("ALERT_LABELS", ["alertname=x"], "the label alertname is set already"),
            ("TARGET_LABELS", ["reason=x"], "the label reason is set already"),
            ("ALERT_LABELS", ["v={{ $value }}", "v=a,{{$labels.x}}"], "templates"),
            ("METRIC_TO_CHECK", ["x[5m]", "1 + 1"], "expected an instant vector"),
            ("METRIC_TO_CHECK", ["x >", "x for 5m"], "(at line 1, column "),
            ("METRIC_THRESHOLD", ["ten", "inf", "nan", "1e400", "1_0"], "finite"),
            ("METRICS_THRESHOLD", ["0x10", "\u0663"], "finite"),
            ("UNHEALTHY_WHEN", ["info(x)", "A: x; A: y", "1"], "(at line 1"),
            ("APP_PORT", ["65536", "-1", "80a", "8081.0", "\u0663", "http"], "65535"),
            ("METRICS_TIMEOUT", ["0", "61", "1x", "-1", "nan"], "expected 10ms to 1m"),
            ("METRICS_TIMEOUT", ["0.001s", "1.5.5s", "0.8 s", "1e1s", "s"], "0.8s or"),
            ("SCRAPE_INTERVAL", ["2h", "soon"], "expected 0s to 1h"),
            ("LOG_LEVEL", ["loud"], "debug, info, warning, error"),
            ("LOG_FORMAT", ["xml"], "text, json"),
        ):
            beside = {"ALERTMANAGER_URL": "http://a:9093"}
            if name == "METRIC_TO_CHECK":
                beside["METRIC_THRESHOLD"] = "1"
            for text in texts:
                with self.subTest(name, text=text):
                    (problem,) = self.problems(**{**beside, name: text})
                    self.assertTrue(problem.startswith(f"{name}="), problem)
                    self.assertIn(words, problem)

    def test_what_no_history_can_hold_is_refused(self):
        for rules, start in (
            ("A: x offset 60d > 1", "the rule A: x is looked at 60d5m back: so far"),
            ("A: x @ 5 > 1", "the rule A: x @ 5 is about a moment"),
            ("rate(x[5m]) > 1; rate(x[60d]) > 1", "x is looked at 60d back: so far"),
        ):
            (problem,) = self.problems(UNHEALTHY_WHEN=rules)
            self.assertTrue(problem.startswith(start), problem)

    def test_all_that_is_wrong_is_said_at_once(self):
        wrong = [setting.name for setting in SETTINGS if setting.parse is not str]
        problems = self.problems(**dict.fromkeys(wrong, "\u2603["))
        named = [line.partition("=")[0] for line in problems if "=" in line]
        self.assertEqual(named, wrong)

    def test_settings_that_contradict_each_other_are_refused(self):
        above = "METRIC_TO_CHECK=x METRIC_THRESHOLD=1 UNHEALTHY_WHEN=AboveThreshold:\ty"
        for environ, words in (
            ("METRIC_THRESHOLD=1 METRICS_THRESHOLD=2", "differ"),
            ("METRIC_TO_CHECK=x", "METRIC_TO_CHECK needs METRIC_THRESHOLD"),
            ("UNHEALTHY_WHEN=x METRICS_THRESHOLD=1", "METRICS_THRESHOLD needs"),
            (above, "AboveThreshold is the name"),
            (
                "SCRAPE_INTERVAL=1 METRICS_TIMEOUT=1.5",
                "METRICS_TIMEOUT (1s500ms) may not exceed SCRAPE_INTERVAL (1s)",
            ),
            ("METRICS_KEY_FILE=/k", "METRICS_KEY_FILE needs METRICS_CERT_FILE"),
            (
                "METRICS_BEARER_TOKEN_FILE=/t METRICS_ENDPOINT=http://u:p@h/",
                "METRICS_BEARER_TOKEN_FILE excludes user:password",
            ),
        ):
            with self.subTest(environ):
                pairs = dict(pair.split("=", 1) for pair in environ.split(" "))
                (problem,) = self.problems(**pairs)
                self.assertIn(words, problem)

    def test_a_selector_that_no_target_can_meet_is_refused_with_what_mends_it(self):
        prometheus = "ALERTS ALERTS_FOR_STATE scrape_samples_post_metric_relabeling"
        prometheus += " scrape_series_added scrape_sample_limit scrape_timeout_seconds"
        for expr, words in (
            ('up{job="vllm"} == 0', 'up{job="vllm"}: it has no label job: set TARGET_'),
            ('absent(up{job="vllm"})', "TARGET_LABELS=pod=a,job=vllm"),
            ('scrape_duration_seconds{job=~"a|b"}', "TARGET_LABELS=pod=a,job=..."),
            ('max_over_time(scrape_error{job!="",ns="b"}[5m])', "LABELS=pod=a,job=..."),
            ('scrape_body_size_bytes{pod="b"}', 'pod="a", by TARGET_LABELS'),
            ('scrape_samples_scraped{job="x"}', "TARGET_LABELS=pod=a,job=x"),
            ('up{instance="vllm:8000"}', '"h:1", instance="i:80", by METRICS_ENDPOINT'),
            ('up{instance="h:1", instance="i:80"}', "not all labels at once"),
            ('scrape_error{reason="time out"}', 'has reason="bad_http", reason="bad_'),
            ('x or up{reason="timeout"} unless y', "it has no label reason"),
            *((name, f"{name} is never there: ") for name in prometheus.split()),
        ):
            beside = {"TARGET_LABELS": "pod=a", "METRICS_ENDPOINT": "http://h:1,http://i"}
            metric = {"METRIC_TO_CHECK": expr, "METRIC_THRESHOLD": "1"}
            for given in metric, {"UNHEALTHY_WHEN": f"A: {expr} or ({expr})"}:
                with self.subTest(expr, given=given):
                    (problem,) = self.problems(**given, **beside)
                    self.assertRegex(problem, "METRIC_TO_CHECK: |the rule A: ")
                    self.assertIn(words, problem)
        for expr in (
            'up{job="vllm", pod=~"a|b"} == 0', 'scrape_error{reason!~"timeout|dns"}',
            'up{instance="i:80", nope="", job!="x"}', 'x{job="y"}', 'y{reason="z"}',
        ):
            given = {"UNHEALTHY_WHEN": expr, "TARGET_LABELS": "job=vllm,pod=a"}
            load_config({**beside, **given})

    def test_every_reason_of_a_failed_scrape_is_known(self):
        source = Path(PROGRAM).read_text(encoding="utf-8")
        raised = set(re.findall(r'ScrapeError\(\s*"(\w+)"', source))
        self.assertLess({"http_status", "truncated"}, raised)
        raised.update(reason for _, reason in health_check.REASONS)
        self.assertEqual(raised | {"bug"}, set(health_check.SCRAPE_REASONS))

    def test_both_spellings_of_the_threshold_mean_the_same(self):
        for names in ("METRIC",), ("METRICS",), ("METRIC", "METRICS"):
            environ = {f"{name}_THRESHOLD": "10.0" for name in names}
            rules = load_config({"METRIC_TO_CHECK": "x or y", **environ}).rules
            self.assertEqual(rules[:-1], parse_rules("AboveThreshold: (x or y) > 10"))

    def test_what_is_odd_but_no_error_is_warned_about(self):
        for name, text, words in (
            ("APP_PORT", "tcp://10.0.0.1:80", "Service named app"),
            ("APP_PORT", "udp://10.0.0.1:80", "Service named app"),
            ("TARGET_LABELS", "job=vllm,pod=$(POD)", "$(POD), which nothing has"),
            ("POD_NAME", "${HOSTNAME}", "${HOSTNAME}, which nothing has"),
            ("METRICS_TLS_SKIP_VERIFY", "true", "METRICS_TLS_SKIP_VERIFY"),
            ("METRIC_TRESHOLD", "1", "did you mean METRIC_THRESHOLD?"),
            ("UNHEALTY_WHEN", "1", "did you mean UNHEALTHY_WHEN?"),
            ("METRIC_ENDPOINT", "1", "did you mean METRICS_ENDPOINT?"),
            ("metrics_endpoint", "1", "did you mean METRICS_ENDPOINT?"),
            ("METRICS_URL", "1", "--help lists them"),
            ("UNHEALTHY_RULES", "1", "--help lists them"),
        ):
            config = load_config({name: text})
            (warning,) = config.warnings
            self.assertIn(name, warning)
            self.assertIn(words, warning)
            self.assertEqual(config.app_port, 8081)
        for name in "PATH", "APP_PORT_8081_TCP", "APP_SERVICE_PORT", "METRICS_PORT":
            self.assertEqual(load_config({name: "1"}).warnings, ())
        self.assertEqual(len(self.problems(APP_PORT="x", LOG_LEVELS="info")), 2)

    def test_no_mistake_in_a_setting_is_silent(self):
        for row in MISTAKES.strip().split("\n"):
            environ = dict(pair.split("=", 1) for pair in row.split("|"))
            with self.subTest(row):
                try:
                    config = load_config(environ)
                except ConfigError as error:
                    told = str(error)
                else:
                    files = health_check.missing_files(config)
                    told = "\n".join([*config.warnings, *files])
                names = [re.escape(name) for name in environ]
                self.assertRegex(told, "|".join([*names, "the rule ", "Rule1"]))
        for row in (
            "METRICS_ENDPOINT=http://host_name:8000/m", "METRICS_ENDPOINT=http://[::1]/",
            "METRICS_ENDPOINT=http://u:p%40@h-1.x.:8000/m?a=b:c://d",
            "TARGET_LABELS=a=b c,d=e=f, g=\"h i\"", "METRIC_THRESHOLD=1e3",
            "METRICS_ENDPOINT=http://localhost:8081/|APP_HOST=127.0.0.2",
            "UNHEALTHY_WHEN=rate(x[20s]) > 1|SCRAPE_INTERVAL=10", "SCRAPE_INTERVAL=1m",
        ):
            environ = dict(pair.split("=", 1) for pair in row.split("|"))
            self.assertEqual(load_config(environ).warnings, ())

    def test_built_in_rules_that_an_interval_is_too_long_for_are_told_of(self):
        names = ["Stalling", "Stalled", "Unanswered", "Failing"]
        for interval, expected in (
            ("69s", []), ("70s", names[2:3]), ("4m30s", names[2:]), ("5m", names),
        ):  # fmt: skip
            told = load_config({"SCRAPE_INTERVAL": interval}).warnings
            self.assertEqual([line.split(":")[0] for line in told], expected)

    def test_a_file_that_cannot_be_read_is_named_with_its_setting(self):
        gone = str(Path(PROGRAM).parent / "gone")
        names = [s.name for s in SETTINGS if s.name.endswith("_FILE")]
        for path, told in (gone, len(names)), (PROGRAM, 0), (os.curdir, len(names)):
            url = {"CANARY_URL": "http://localhost/v1/completions"}
            config = load_config({**dict.fromkeys(names, str(path)), **url})
            lines = list(health_check.missing_files(config))
            self.assertEqual(len(lines), told, lines)
            for name, line in zip(names, lines):
                self.assertTrue(line.startswith(f"{name}={path}: "), line)

    def test_rules_of_a_users_own_add_to_the_built_in_ones(self):
        metric = {"METRIC_TO_CHECK": "x", "METRIC_THRESHOLD": "1"}
        stall, rest = ["Stalling", "Stalled"], ["Unanswered", "Failing", "NoModel"]
        for environ, expected in (
            ({}, ["QueueFull", *stall, *rest, "Down"]),
            ({"UNHEALTHY_WHEN": "A: x; B: y"}, ["A", "B", *stall, *rest, "Down"]),
            ({"UNHEALTHY_WHEN": "Down: x; QueueFull: y"},
             ["Down", "QueueFull", *stall, *rest]),
            (metric, ["AboveThreshold", "Down"]),
            ({**metric, "UNHEALTHY_WHEN": "A: x"},
             ["AboveThreshold", "A", *stall, *rest, "Down"]),
            ({"WITHOUT_RULES": "Stalled, Failing,Down"},
             ["QueueFull", "Stalling", "Unanswered", "NoModel"]),
            ({**metric, "WITHOUT_RULES": "Down"}, ["AboveThreshold"]),
        ):  # fmt: skip
            with self.subTest(environ):
                config = load_config(environ)
                self.assertEqual([rule.name for rule in config.rules], expected)
                own = environ.get("UNHEALTHY_WHEN", "") + "AboveThreshold:"
                for rule in config.rules:
                    self.assertEqual(rule.builtin, f"{rule.name}:" not in own)
        (problem,) = self.problems(WITHOUT_RULES="Down,Stall")
        self.assertIn("Stall is no built-in rule: QueueFull, Stalling, ", problem)

    def test_the_limit_is_that_of_QueueFull(self):
        for environ, limit in (({}, 10), ({"METRICS_THRESHOLD": "0.5"}, 0.5)):
            rule = load_config(environ).rules[0]
            for series in "vllm:num_requests_waiting", "tgi_queue_size":
                names = frozenset([series])
                for value, state in (limit, "inactive"), (limit + 1, "pending"):
                    there = history(f"{series} {value}")._replace(names=names)
                    self.assertEqual(judge(RuleStatus(rule), there).state, state)

    def test_an_endpoint_gives_an_instance_a_url_and_credentials_apart(self):
        for url, *expected in (
            ("http://Local:8000/m", "local:8000", "http://Local:8000/m", "", ""),
            ("https://h/m", "h:443", "https://h/m", "", ""),
            ("http://h", "h:80", "http://h/", "", ""),
            ("http://[::1]:9/m", "[::1]:9", "http://[::1]:9/m", "", ""),
            ("http://h:1/m?a=b&c", "h:1", "http://h:1/m", "a=b&c", ""),
            ("http://u:p%40%3A@h:1/m", "h:1", "http://h:1/m", "", "Basic dTpwQDo="),
            ("http://u@h:1/m", "h:1", "http://h:1/m", "", "Basic dTo="),
        ):
            with self.subTest(url):
                (target,) = load_config({"METRICS_ENDPOINT": url}).metrics_endpoint
                self.assertEqual(target, Target(*expected))
        several = load_config({"METRICS_ENDPOINT": "http://a:1/m, http://a:2/m,"})
        found = [target.instance for target in several.metrics_endpoint]
        self.assertEqual(found, ["a:1", "a:2"])

    def test_a_token_is_for_those_alone_for_whom_it_was_set(self):
        kinds = "METRICS", "CANARY", "ALERTMANAGER"
        environ = {f"{kind}_BEARER_TOKEN_FILE": kind for kind in kinds}
        names = "METRICS_ENDPOINT", "HEALTH_ENDPOINT", "CANARY_URL", "ALERTMANAGER_URL"
        environ.update(dict.fromkeys(names, "https://h/"), METRICS_CA_FILE="ca")
        config = load_config({**environ, "METRICS_TLS_SKIP_VERIFY": "true"})
        tls = Credentials("", "ca", skip_verify=True)
        for targets, shown in (
            (config.metrics_endpoint, tls._replace(token_file="METRICS")),
            (config.health_endpoint, tls),
            ([config.canary_url], tls._replace(token_file="CANARY")),
            (config.alertmanager_url, Credentials("ALERTMANAGER")),
        ):
            self.assertEqual([target.credentials for target in targets], [shown])

    def test_an_error_shows_no_credentials(self):
        for url in (
            "http://u:s3cret@h:x/", "http://h:x/?token=s3cret", "http://u:s3cret@/",
            "http://u:p/s3cret@h:1/", "http://u:a?s3cret@h:1/", "http://u:a,s3cret@h/",
            "http://u:a s3cret@h/", "u:s3cret@h:8000/metrics", "ftp://u:s3cret@h/",
            "http://h:x/?a=b,token=s3cret", "http://h:x/?a=b c=s3cret", "u:s3cret@h",
        ):
            with self.subTest(url):
                self.assertNotIn("s3cret", "".join(self.problems(METRICS_ENDPOINT=url)))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

ZIPPED = b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\0\0\0\0\0\0\3"

UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n"

# A key that is good for nothing else, and its certificate for 127.0.0.1, until 2120.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg4zfIaSXN0/KylEbk
2q2Gfr+gGZWSnU9Ce/asBGpguJGhRANCAASHqFl8UE4zKLx84p55U7mA6XQ0OiPU
qP36pKQ/Sc9ueNfw40IoPVFoE18pO4sSrhqTxAYcSH60tFIhtNmcFOJE
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBbzCCARWgAwIBAgIUbifFTrrlMO7RFZOktYRXzs0LAHQwCgYIKoZIzj0EAwIw
DDEKMAgGA1UEAwwBdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFow
DDEKMAgGA1UEAwwBdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABIeoWXxQTjMo
vHzinnlTuYDpdDQ6I9So/fqkpD9Jz2541/DjQig9UWgTXyk7ixKuGpPEBhxIfrS0
UiG02ZwU4kSjUzBRMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0G
A1UdDgQWBBS2fxpXD5/RlMCPk7/v9/rZtud9rzAPBgNVHREECDAGhwR/AAABMAoG
CCqGSM49BAMCA0gAMEUCIFfN12VWUse6Nqa1vZ/zN4EWdiXfu8PQwfaj6o6WL67N
AiEAmq+v66jUSsnNQ6DrcTCxzksy2HCokVLVNePKJs6DDNQ=
-----END CERTIFICATE-----
"""


class ScrapeTest(NetworkTest):
    """open_stream, against servers that say what they like."""

    def scrape(self, target, seconds=5.0, by=None):
        target = self.config(target, UNHEALTHY_WHEN="up").metrics_endpoint[0]
        target = target._replace(credentials=by or Credentials())
        buffer, body = bytearray(4096), b""
        with open_stream(target, time.monotonic() + seconds) as stream:
            while True:
                count = stream.readinto(memoryview(buffer))
                body += buffer[:count]
                if not count:
                    return body

    def failure(self, target, seconds=5.0, by=None):
        with self.assertRaises(ScrapeError) as caught:
            self.scrape(target, seconds, by)
        return f"{caught.exception.reason}: {caught.exception}"

    def test_a_body_arrives_however_it_is_framed(self):
        chunks = CHUNKED + b"2;a=b\r\nx \r\n02 \r\n1\n\r\n0\r\n\r\n"
        packed, tail = gzip.compress(b"x "), gzip.compress(b"1\n")
        length, start = f"Content-Length: {len(packed + tail)}\r\n", UNTIL_CLOSE[:-2]
        zipped = start + f"{length}Content-Encoding: gzip\r\n\r\n".encode()
        for name, *pieces in (
            ("length", page("x 1\n")),
            ("byte by byte", *dripping(page("x 1\n"), 0.001)),
            ("chunked", chunks),
            ("newlines", page("x 1\n").replace(b"\r", b"")),
            ("until the end", UNTIL_CLOSE + b"x 1\n"),
            ("after a 100", b"HTTP/1.1 100 Continue\r\n\r\n", page("x 1\n")),
            ("after a 103", b"HTTP/1.1 103 E\r\nA: b\r\n\r\n", page("x 1\n")),
            ("odd blanks", page("x 1\n", extra="A: b" + " " * 60000 + "c\r\n")),
            ("identity", page("x 1\n", extra="Content-Encoding: Identity\r\n")),
            ("equal lengths", page("x 1\n", extra="Content-Length: 4 , 4\r\n")),
            ("folded", page("x 1\n", extra="A: b\r\n c\r\n\t\r\n d\r\n")),
            ("folded length", start + b"Content-Length:\r\n  4\r\n\r\nx 1\nmore"),
            ("head in pieces", UNTIL_CLOSE[:9], 0.01, UNTIL_CLOSE[9:] + b"\n" * 70000,
             b"x 1\n"),
            ("250 fields", page("x 1\n", extra="A: b\r\n" * 248)),
            ("gzip", zipped + packed + tail),
            ("gzip in drips", zipped, *dripping(packed + tail, 0.0001)),
            ("gzip until the end", start + b"Content-Encoding: x-gzip\r\n\r\n", packed,
             tail),
            ("gzip in chunks", CHUNKED[:-2] + b"Content-Encoding: GZIP\r\n\r\n",
             f"{len(packed):x}\r\n".encode(), packed, b"\r\n",
             f"{len(tail):X}\r\n".encode(), tail, b"\r\n0\r\n\r\n"),
        ):  # fmt: skip
            with self.subTest(name):
                body = self.scrape(self.metrics(*pieces))
                self.assertEqual(body.lstrip(b"\n"), b"x 1\n")

    def test_what_a_small_body_unpacks_to_has_a_bound_and_a_deadline(self):
        bomb = gzip.compress(bytes(1 << 20))
        head = f"Content-Length: {len(bomb)}\r\nContent-Encoding: gzip\r\n\r\n"
        server = self.metrics(UNTIL_CLOSE[:-2] + head.encode() + bomb)
        with mock.patch.object(health_check, "MAX_UNPACKED", 1 << 20):
            self.assertEqual(len(self.scrape(server)), 1 << 20)
        with mock.patch.object(health_check, "MAX_UNPACKED", (1 << 20) - 1):
            self.assertRegex(self.failure(server), "^too_large: .*1048575 bytes")
        target = self.config(server).metrics_endpoint[0]
        clock, view = Clock(), memoryview(bytearray(1024))
        with mock.patch.object(time, "monotonic", clock), open_stream(
            target, clock.now + 1
        ) as stream:
            self.assertEqual(stream.readinto(view), 1024)
            clock.now += 2
            with self.assertRaisesRegex(ScrapeError, "timed out"):
                stream.readinto(view)

    def test_a_failure_has_its_reason(self):
        length = "Content-Length: "
        for pieces, expected in (
            ([page(status="401 Unauthorized")], "http_status: HTTP 401 Una.*_FILE"),
            ([page(status="403 Forbidden")], "http_status: HTTP 403 Forbidden"),
            ([page("x 1\n", status="404 Gone Fishing")], "http_status: HTTP 404 Not F"),
            ([page("x 1\n", status="500 Oops")], "http_status: HTTP 500 Internal"),
            ([page("x 1\n", status="206 Partial")], "http_status: HTTP 206 "),
            ([page(status="204 No Content")], "http_status: HTTP 204 "),
            ([page(status="302 Found")], "http_status: HTTP 302 "),
            ([page(status="799 What")], "http_status: HTTP 799"),
            ([page("x", extra="Content-Encoding: br\r\n")], "bad_http: .*'br'"),
            ([page("x 1\n", extra="Content-Encoding: gzip\r\n")], "bad_http: Not a gz"),
            ([ZIPPED + b"\0" * 9], "bad_http: "),
            ([ZIPPED + b"\xff" * 9], "bad_http: Error -3"),
            ([ZIPPED], "truncated: "),
            ([page("x 1\n", extra=f"{length}99\r\n")], "bad_http: .*Content-Length"),
            ([UNTIL_CLOSE[:-2] + b"Content-Length: -1\r\n\r\n"], "bad_http: .*'-1'"),
            ([UNTIL_CLOSE[:-2], length.encode(), b"9" * 5000, b"\r\n\r\nx"], "bad_h"),
            ([UNTIL_CLOSE[:-2] + b"Transfer-Encoding: x\r\n\r\n"], "bad_http: .*'x'"),
            ([UNTIL_CLOSE[:17] + b" c\r\nA: b\r\n\r\nx 1\n"], "bad_http: .*' c'"),
            ([page("x 1\n", extra=f"{length}4, 5\r\n")], "bad_http: .*Content-Length"),
            ([page("x 1\n", extra=f"{length}4,\r\n")], "bad_http: .*Content-Length"),
            ([UNTIL_CLOSE[:-2] + b"A:" + b" " * 60000 + b"\0\n\n"], "bad_http: .*'A:"),
            ([page("x 1\n")[:-2]], "truncated: 2 bytes less"),
            ([CHUNKED + b"4\r\nx 1\n"], "truncated: "),
            *(([CHUNKED + size + b"\r\nx 1\n\r\n0\r\n\r\n"], "bad_http: bad size")
              for size in (b"0x4", b"+4", b"-4", b" 4", b"0_4", b"", b"q", b"4" * 17)),
            ([b"SSH-2.0-OpenSSH_9.9\r\n"], "bad_http: "),
            ([b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 251, b"\r\n"], "bad_http: .*250"),
            ([b"HTTP/1.1 200 OK\r\nA: " + b"b" * 65530], "bad_http: .*too|too_large: "),
            ([b"HTTP/1.1 200 OK\r\nA: b\r\n" + b"A: bbbb" * 9999], "too_large|bad_htt"),
            ([b"HTTP/1.1 100 Go\r\n\r\n" * 9999, page("x 1\n")], "too_large: "),
            ([b""], "reset: "),
            ([b"HTTP/1.1 200"], "reset: "),
            ([b"HTTP/1.1 200 OK\r\n"], "reset: "),
            ([b"HTTP/1.1 200 OK\r\nContent-Le"], "reset: "),
        ):
            with self.subTest(expected):
                self.assertRegex(self.failure(self.metrics(*pieces)), f"^{expected}")
        for url, expected in (
            (f"http://127.0.0.1:{free_port()}/metrics", "refused: "),
            ("http://1.2.3.4.5/metrics", "dns: "),
            ("http://x..y/metrics", "bad_http: "),
            ("http://255.255.255.255/metrics", "network: "),
        ):
            with self.subTest(url):
                self.assertRegex(self.failure(url), f"^{expected}")

    def test_a_cut_at_any_byte_fails_the_scrape(self):
        whole = page("x 1\n")
        chunks = CHUNKED + b"4\r\nx 1\n\r\n0\r\n"
        server = self.metrics()
        for answer in whole, chunks:
            for length in range(len(answer)):
                with self.subTest(answer[:length]):
                    server.pieces = (answer[:length],)
                    self.assertRegex(self.failure(server), "^(reset|truncated): ")

    def test_failures_leave_no_descriptor_and_no_thread(self):
        def held():
            return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

        server = self.metrics()
        self.failure(server.url.replace("/metrics", "/"))
        before = held()
        for pieces in [b""], [b"A" * 99], [redirect("/")], [page("x")[:-1]], [FOREVER]:
            server.pieces = pieces
            for _ in range(1 if FOREVER in pieces else 20):
                self.failure(server, 0.05 if FOREVER in pieces else 0.5)
        server.close()
        self.assertTrue(wait_until(lambda: held()[1] < before[1]))
        self.assertLess(held()[0], before[0])

    def test_a_failure_leaves_no_buffer_for_the_garbage_collector(self):
        def views():
            return sum(isinstance(thing, memoryview) for thing in gc.get_objects())

        server = self.metrics()
        for last in b"2\r\nx", b"q\r\n", FOREVER:
            server.pieces = CHUNKED, last
            gc.collect()
            gc.disable()
            self.addCleanup(gc.enable)
            before = views()
            with contextlib.suppress(ScrapeError):
                self.scrape(server, 0.1)
            self.assertEqual(views(), before)

    def test_one_deadline_covers_every_part(self):
        for name, pieces in (
            ("silence", [FOREVER]),
            ("status line", dripping(b"HTTP/1.1 200 OK\r\n")),
            ("headers", [b"HTTP/1.1 200 OK\r\n", *dripping(b"A: b\r\n" * 20)]),
            ("interim answers", [b"HTTP/1.1 100 Go\r\n\r\n", 0.02] * 20),
            ("body", [page("x 1\n" * 50)[:-200], *dripping(b"x 1\n" * 50)]),
            ("chunks", [CHUNKED, *([b"4\r\nx 1\n\r\n", 0.02] * 20)]),
            ("until the end", [UNTIL_CLOSE, *([b"x 1\n", 0.02] * 20)]),
        ):
            with self.subTest(name):
                started = time.monotonic()
                message = self.failure(self.metrics(*pieces), 0.03)
                self.assertLess(time.monotonic() - started, 0.03 + 2.0)
                self.assertEqual(message, "timeout: timed out")

    def test_of_several_addresses_the_first_that_answers_is_taken(self):
        server, silent = self.metrics(page("x 1\n")), self.silent()
        there, nobody = server.server_address, ("127.0.0.1", free_port())
        stream, strange = (socket.AF_INET, 1, 6, ""), (9999, 1, 6, "")
        refused = "^refused: "
        for found, expected in (
            ([(*strange, there), (*stream, there)], b"x 1\n"),
            ([(*stream, nobody), (*strange, there), (*stream, there)], b"x 1\n"),
            ([(*stream, silent), (*stream, there)], b"x 1\n"),
            ([(*stream, silent), (*stream, silent), (*stream, there)], b"x 1\n"),
            ([(*stream, silent), (*stream, nobody), (*stream, there)], b"x 1\n"),
            ([(*stream, there), (*stream, silent)], b"x 1\n"),
            ([(*stream, nobody), (*stream, nobody)], refused),
            ([(*strange, there), (*stream, nobody)], refused),
            ([(*stream, nobody), (*strange, there)], "^network: "),
            ([(*stream, silent), (*stream, nobody)], "^timeout: "),
            ([(*stream, nobody), (*stream, silent)], "^timeout: "),
        ):
            places = [address[1] for *_, address in found]
            with self.subTest(places, expected=expected), mock.patch.object(
                socket, "getaddrinfo", return_value=found
            ), mock.patch.object(health_check, "NEXT_ADDRESS", 0.01):
                if expected == b"x 1\n":
                    self.assertEqual(self.scrape(server, 5.0), expected)
                else:
                    limit = 0.05 if "timeout" in expected else 5.0
                    self.assertRegex(self.failure(server, limit), expected)

    def silent(self):
        """Return the address of a listener whose queue is full: it says nothing."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.addCleanup(listener.close)
        for _ in range(2):
            sock = socket.socket()
            self.addCleanup(sock.close)
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        return listener.getsockname()

    def test_addresses_of_two_families_take_turns(self):
        found = [(family, 1, 6, "", at) for at, family in enumerate((6, 6, 6, 4, 4))]
        order = [info[-1] for info in health_check._interleaved(found)]
        self.assertEqual(order, [0, 3, 1, 4, 2])

    def test_redirects_stay_within_the_origin(self):
        def answer(request):
            return [page("x 1\n") if b"GET /there?" in request else moved]

        elsewhere, server = self.metrics(page("x 1\n")), self.metrics(answer)
        there = server.url.replace("/metrics", "/there?a=b")
        not_followed = "redirect: redirected to another origin: not followed"
        for location, expected in (
            ("/there?a=b", None),
            ("there?a=b", None),
            (there, None),
            (elsewhere.url, not_followed),
            (f"//{elsewhere.instance}/", not_followed),
            (server.url.replace("127.0.0.1", "localhost"), not_followed),
            (server.url.replace("http", "https"), not_followed),
            ("file:///etc/passwd", not_followed),
            ("/metrics", "redirect: more than 3 redirects"),
            ("http://[", not_followed),
        ):
            for status in ("301 M", "302 F", "303 S", "307 T", "308 P"):
                with self.subTest(location, status=status):
                    moved = redirect(location, status)
                    if expected:
                        self.assertIn(expected, self.failure(server))
                    else:
                        self.assertEqual(self.scrape(server), b"x 1\n")
        self.assertEqual(elsewhere.requests, [])

    def test_credentials_go_to_the_server_and_nowhere_else(self):
        moved = redirect("/metrics/?token=hush")
        server = self.metrics(
            lambda head: [page("x 1\n") if b"/metrics/" in head else moved]
        )
        url = f"http://us%40er:p%3Aw@{server.instance}/metrics?token=hush"
        self.assertEqual(self.scrape(url), b"x 1\n")
        expected = "Basic " + base64.b64encode(b"us@er:p:w").decode()
        for request in server.requests:
            self.assertIn(f"Authorization: {expected}\r\n", request)
            self.assertIn("token=hush HTTP/1.1\r\n", request)
        for location in ("/a b?token=hush", "http://[?token=hush", "/\x7f?token=hush"):
            with self.subTest(location):
                moved = redirect(location)
                server.pieces = (moved,)
                self.assertNotIn("hush", self.failure(url))

    def test_what_a_server_sends_back_of_a_secret_is_hidden(self):
        def echo(form):
            return lambda request: [form % request.replace(b"GET ", b"", 1)]

        server = self.metrics(b"")
        with tempfile.TemporaryDirectory() as directory:
            token = Path(directory, "token")
            token.write_text("hush")
            basic = base64.b64encode(b"hush:hush").decode()
            head = UNTIL_CLOSE.replace(b"\r\n\r\n", b"\r\nLocation: http://[%s\r\n\r\n")
            for form in (
                b"%s", b"HTTP/1.1 %s", b"HTTP/1.1 200 OK\r\nContent-Length: %s",
                b"HTTP/1.1 200 OK\r\nContent-Encoding: %s", UNTIL_CLOSE + b"%s",
                UNTIL_CLOSE + b"# a\nx{%s} 1\n", head.replace(b"200", b"302"),
                UNTIL_CLOSE + b"Authorization: Bearer hush\n%.0s",
            ):
                for user, environ in (
                    ("hush:hush@", {}), ("", {"METRICS_BEARER_TOKEN_FILE": str(token)})
                ):
                    server.pieces = (echo(form),)
                    url = f"http://{user}{server.instance}/m?token=hush"
                    monitor = self.monitor(url, UNHEALTHY_WHEN="x > 1", **environ)
                    verdict = monitor.check()
                    self.assertNotEqual(verdict.targets[0].reason, "")
                    for text in (verdict.targets[0].message, "".join(self.log)):
                        self.assertNotIn("hush", text)
                        self.assertNotIn(basic, text)

    def test_a_bearer_token_is_read_at_each_scrape(self):
        server = self.metrics(page("x 1\n"))
        with tempfile.TemporaryDirectory() as directory:
            token = Path(directory, "token")
            credentials = Credentials(token_file=str(token))
            for text in ("first", "second\n"):
                token.write_text(text)
                self.scrape(server, by=credentials)
            token.write_text("t\u00f6ken")
            self.assertRegex(self.failure(server, by=credentials), "^credentials: ")
            expected = f"credentials: {token}: expected one token"
            for text in ("", "hush\nhush", "hush hush", "hush\0"):
                token.write_text(text)
                self.assertEqual(self.failure(server, by=credentials), expected)
        sent = re.findall("Authorization: (.*)\r\n", "".join(server.requests))
        self.assertEqual(sent, ["Bearer first", "Bearer second"])
        expected = f"credentials: {token}: No such file or directory"
        self.assertEqual(self.failure(server, by=credentials), expected)

    def test_a_request_says_what_it_wants_and_asks_no_proxy(self):
        server, proxy = self.metrics(page()), self.metrics(page())
        with mock.patch.dict(os.environ, http_proxy=proxy.url, no_proxy=""):
            self.scrape(server)
        self.assertEqual(proxy.requests, [])
        (request,) = server.requests
        self.assertTrue(request.startswith("GET /metrics HTTP/1.1\r\n"), request)
        for header in (
            f"Host: {server.instance}",
            "Accept: text/plain;version=1.0.0;escaping=allow-utf-8,text/plain;",
            "User-Agent: health_check.py/",
            "Accept-Encoding: identity",
            "Connection: close",
        ):
            self.assertIn(f"\r\n{header}", request)
        self.assertNotIn("Authorization", request)
        for kind in re.findall(r"[^ ,]*version=1[^,]*", request):
            self.assertIn(";escaping=allow-utf-8", kind)

    def test_an_IPv6_address_is_one_too(self):
        server = self.metrics(page("x 1\n"), host="::1")
        self.assertEqual(self.scrape(server), b"x 1\n")

    def test_TLS_needs_a_trusted_certificate_and_keeps_the_deadline(self):
        with tempfile.TemporaryDirectory() as directory:
            certificate = Path(directory, "both.pem")
            certificate.write_text(CERTIFICATE)
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            server = self.metrics(page("x 1\n"), tls=tls)
            self.assertRegex(self.failure(server), "^tls: .*verify failed")
            with mock.patch.dict(os.environ, SSL_CERT_FILE=str(certificate)):
                self.assertEqual(self.scrape(server), b"x 1\n")
                server.pieces = dripping(page("x 1\n"))
                self.assertEqual(self.failure(server, 0.1), "timeout: timed out")
                server.pieces = (page("x 1\n"),)
            skips = Credentials(skip_verify=True)
            self.assertEqual(self.scrape(server, by=skips), b"x 1\n")
            trusts = Credentials(ca_file=str(certificate))
            self.assertEqual(self.scrape(server, by=trusts), b"x 1\n")
            tls.verify_mode = ssl.CERT_REQUIRED
            tls.load_verify_locations(certificate)
            shows = trusts._replace(cert_file=str(certificate))
            self.assertEqual(self.scrape(server, by=shows), b"x 1\n")
            self.assertRegex(self.failure(server, by=trusts), "^(tls|reset): ")
            with mock.patch.object(ssl, "create_default_context") as read:
                self.assertEqual(self.scrape(server, by=shows), b"x 1\n")
            read.assert_not_called()
            certificate.write_text("rotated")
            self.assertRegex(self.failure(server, by=shows), "^credentials: ")
            certificate.write_text(CERTIFICATE)
            self.assertEqual(self.scrape(server, by=shows), b"x 1\n")
        self.assertIn("both.pem: No such file", self.failure(server, by=shows))
        silent = self.metrics(FOREVER).url.replace("http", "https")
        self.assertRegex(self.failure(silent, 0.05), "^(timeout|tls): ")


class Exposition(unittest.TestCase):
    def read(self, text, *wanted, size=WHOLE, kind="text/plain", own=()):
        source = io.BytesIO(text if isinstance(text, bytes) else text.encode())
        stream = Stream(kind, lambda view: source.readinto(view[:size]))
        return read_samples(stream, format_for(wanted or ("x", "y"), own), {}, True)

    def result(self, text, **options):
        """Return the samples of a text, or the reason why it has none."""
        try:
            return shown(self.read(text, **options).samples)
        except ScrapeError as error:
            return error.reason

    def check(self, *rows, **options):
        """Assert what texts give, in pieces of any size."""
        for (text, expected), size in itertools.product(rows, (1, 2, 3, 7, WHOLE)):
            with self.subTest(text[:60], size=size, **options):
                self.assertEqual(self.result(text, size=size, **options), expected)

    def test_values_and_labels_are_read_as_Prometheus_reads_them(self):
        odd = "\u2028\x85\v\f\r\0\x1c\u0663"
        self.check(
            ("x 5\n", "x 5"), ("x\t5 \n", "x 5"), ("x+5\n", "x 5"), ("x 017\n", "x 17"),
            ("x 1.15891634176e+011\n", "x 115891634176"), ("x -1.0\n", "x -1"),
            ("x NaN\n", "x NaN"), ("x +Inf\n", "x +Inf"), ("x .5\n", "x 0.5"),
            ("x 5 1700000000000\n", "x 5"), ("x 5 17 \n", "x 5"), ("x{} 5\n", "x 5"),
            ('x{a=""} 5\n', "x 5"), ('x{a="1"}5\n', 'x{a="1"} 5'),
            ('x{a="1",b="2",} 5\n', 'x{a="1",b="2"} 5'),
            ('x { b = "2" , a="1" }\t5\n', 'x{a="1",b="2"} 5'),
            ('x{a="1"b="2"} 5\n', 'x{a="1",b="2"} 5'),
            ("x{a=\"{'m': 'p,}'} # 5\"} 7\n", "x{a=\"{'m': 'p,}'} # 5\"} 7"),
            (r'x{a="\\\"\n\t\d"} 5' + "\n", r'x{a="\\\"\n\\t\\d"} 5'),
            ('# a\nx{a="b\ny 1\n"} 5\ny 6\n', r'x{a="b\ny 1\n"} 5; y 6'),
            ('x{a="b\nc"} 5\n', r'x{a="b\nc"} 5'),
            ('x{a="' + odd + '"} 5\n', f"x{{a={quote(odd)}}} 5"),
            ('x{a="b"} 1\nx{a="b"} 2\nx{a="b",} 3\n', 'x{a="b"} 1'),
            ('# HELP x a; b="c" \n# TYPE x gauge\n\n \nx 5\n# HELP y\n# TYPE y', "x 5"),
            ("# x 1\n#\n# EOF\nx 5\n", "x 5"),
        )

    def test_a_line_break_in_a_label_may_stand_where_a_buffer_ends(self):
        for count in range(65528, 65537):
            text = "# a\n" * count + 'x{a="b\nc"} 5\n'
            self.assertEqual(self.result(text), r'x{a="b\nc"} 5')

    def test_of_all_the_names_some_are_kept(self):
        names = [f"{letter}{'b' * 150}" for letter in string.ascii_letters]
        text = "".join(f"{name} 1\n" for name in names)
        self.assertEqual(len(self.read("# a\n" + text).names), len(names))
        text = "".join(f"{name}{'b' * 150} 1\na{number} 1\n" for number in range(3000)
                       for name in names[:1])  # fmt: skip
        found = self.read("# a\n" + text).names
        self.assertEqual((len(found), len(max(found, key=len))), (2000, 5))

    def test_series_share_what_they_have_in_common_and_it_goes_with_them(self):
        text = "".join(f'x{{unheard="1",of_before="{n}"}} 1\n' for n in "ab")
        one, other = self.read(text, own=(("job", "j"),)).samples
        same = [a is b for a, b in zip(one, other)]
        self.assertEqual(same, [True, True, False, True])
        for label, _ in one[2:]:
            # Python 3.12 keeps what is interned for ever.
            self.assertIsNot(sys.intern(f"{label[:3]}{label[3:]}"), label)

    def test_all_samples_are_counted_if_that_is_asked_for(self):
        text = 'x 1\n\n# y 1\n \n  # z\ny{a="\\n#"} 2\n\tz 3 4\n# EOF'
        for size in WHOLE, 7:
            for names, count in (("x", "scrape_samples_scraped"), 3), (("x",), 0):
                self.assertEqual(self.read(text, *names, size=size).lines, count)
        self.assertEqual(self.read("", "scrape_samples_scraped").lines, 0)

    def test_names_match_whole(self):
        others = 'x_by_reason 1\nx_ five\nax 2\nx:y 3\n x 6\n# x 7\nz{n="x 8"}\n'
        self.check((others + "x 4\n" + others + "y 10\n", "x 4; y 10"))
        for wanted in ["a", "ab", "abc", "b"], ["vllm:num", "vllm:num_total", "v"]:
            text = "".join(f"{name} 1\n{name}_ 2\n{name}: 3\n" for name in wanted)
            self.assertEqual(len(self.read(text, *wanted).samples), len(wanted))

    def test_a_name_in_quotes_is_the_name(self):
        self.check(
            ('{"x"} 5\n', "x 5"), ('{"x",a="b"} 5\n', 'x{a="b"} 5'),
            ('{ "x" , "a"="b" } 5\n', 'x{a="b"} 5'), ('x{"a"="b"} 5\n', 'x{a="b"} 5'),
            ('{"other.name"} 5\ny 6\n', "y 6"),
        )
        reading = self.read('{"a.b\\"c", "d e"="f"} 5\na_b 6\n', 'a.b"c')
        expected = {(("__name__", 'a.b"c'), ("d e", "f")): 5.0}
        self.assertEqual(reading.samples, expected)

    def test_a_malformed_line_of_a_wanted_metric_fails_the_scrape(self):
        for line in (
            "x", "x ", "x five", "x 1_000", "x 0x1F", "x 1,000", "x 1e400", "x \u0663",
            "x +NaN", "x 5 6 7", "x 5 -6", "x 5 1.5", "x 5 # {} 1", "x 5\r", "x\u00a05",
            'x{a="b" 5', "x{a=b} 5", "x{a} 5", 'x{a="b",,c="d"} 5', 'x{,a="b"} 5',
            'x{a="b",a="c"} 5', 'x{a:b="c"} 5', 'x{9="c"} 5', 'x{"y"} 5', "x{a='b'} 5",
            '{"x","y"} 5', "{} 5", '{a="b"} 5', '{"x"', 'x{a="b} 5', 'x{a="b\\"} 5',
            "x 5\v", b'x{a="\xff"} 5', b"x \xff",
        ):
            text = line if isinstance(line, bytes) else line.encode()
            self.check((b"# a\n" + text + b"\ny 1\n", "bad_line"))
            self.check((b"y 1\n" + text, "bad_line"))
        self.check(("y 1\nz{a= five\n\u00a0x 5\n<html>\n", "y 1"))

    def test_an_empty_body_or_null_has_no_samples_whatever_its_type(self):
        bodies = "", "\n", " \t\r\n\n", "null", "null\n", "\n null \n"
        for kind in "", "text/html", "application/json", "application/openmetrics-text":
            self.check(*((text, "") for text in bodies), kind=kind)
        self.check(("null\nx 5\n", "not_metrics"), ("nullx 5\n", ""))

    def test_what_is_no_exposition_fails_the_scrape(self):
        for text in "<p>", '{"x": 5}', "[]", "OK\n", "{\n", "\ufeffx 5", "\0", "1 2":
            self.check((text, "not_metrics"))

    def test_the_content_and_not_its_type_tells_what_a_body_is(self):
        for kind in (
            "", "text/plain; version=1.0.0; charset=utf-8", "application/x-odd", ";",
            "text/html", "Application/JSON; a=b", "application/problem+json", "*/*",
        ):
            self.check(
                ("x 5\n", "x 5"), ("# a\nx 5", "x 5"), ("\n<p>x 5</p>", "not_metrics"),
                ('{"x": 5}', "not_metrics"), ('{"status":"UP"}', "not_metrics"),
                ('["x 5"]\n', "not_metrics"), ("true", "not_metrics"), kind=kind,
            )

    def test_media_types_compare_as_RFC_9110_says(self):
        for kind, result in (
            ("Application/OpenMetrics-Text", "truncated"),
            ("application/openmetrics-text ;Version=1.0.0", "truncated"),
            ("application/openmetrics-text\t; charset=utf-8", "truncated"),
            ("application/openmetrics-text;v=1, text/plain", "truncated"),
            ("text/plain; charset=openmetrics", "x 5"),
            ("text/openmetrics-text", "x 5"), ("application/openmetrics", "x 5"),
            ("application/openmetrics-text2", "x 5"),
            ("text/plain, application/openmetrics-text", "x 5"),
        ):
            self.check(("x 5\n", result), kind=kind)

    def test_OpenMetrics_has_exemplars_and_must_end_in_EOF(self):
        self.check(
            ("# TYPE x counter\nx 5\n# EOF\n", "x 5"), ("x 5\n# EOF", "x 5"),
            ('x 5 1.5e9 # {a="b"} 0.5 1\n# EOF\n', "x 5"), ("# EOF\n", ""),
            ("x 5 # {} 1\ny 6 -1.5\n# EOF\n", "x 5; y 6"),
            ("y 6\nx 5 # a\n# EOF\n", "bad_line"), ("x 5\n", "truncated"),
            ("x 5\n# EO", "truncated"), ("# x\n", "truncated"),
            ("# EOF\nx 5\n", "truncated"), ("x 5\n# EOF\n\n", "truncated"),
            kind="application/openmetrics-text; version=1.0.0; charset=utf-8",
        )

    def test_a_last_line_needs_no_newline(self):
        self.check(
            ("x 5\ny 12", "x 5; y 12"), ("x 5", "x 5"), ("x 5\n# a", "x 5"),
            ("x 5\nz", "truncated"), ('x 5\nz{a="', "truncated"), ("x 5\n \t", "x 5"),
            ("y 1\nx", "bad_line"), ("null", ""), ("x 5\nnull", "truncated"),
        )

    def test_the_labels_of_the_target_win_and_those_of_the_server_are_exported(self):
        for scraped, others in (
            ("", ""), ('job=""', ""), ('job="o"', 'exported_job="o",'),
            ('exported_job="e"', 'exported_job="e",'),
            ('exported_job="e",job="o"', 'exported_exported_job="o",exported_job="e",'),
            ('job="o",exported_job="e"', 'exported_exported_job="o",exported_job="e",'),
        ):
            expected = f'x{{{others}instance="h:1",job="j"}} 5'
            labels = (("instance", "h:1"), ("job", "j"))
            self.check((f"x{{{scraped}}} 5\n", expected), own=labels)

    def test_a_bound_is_written_as_Prometheus_stores_it(self):
        for text, stored in claims("""
            1 => 1.0          0 => 0.0          -1 => -1.0        0.5 => 0.5
            +Inf => +Inf      -inf => -Inf      NaN => NaN        00.10 => 0.1
            100000 => 100000.0                  1000000 => 1e+06
            1234567.5 => 1.2345675e+06
            1e22 => 1e+22     0.0001 => 0.0001    1e-5 => 1e-05     -2500000 => -2.5e+06
            many => many      -0 => 0.0
        """):
            with self.subTest(text):
                line = f'x{{a="{text}",le="{text}",quantile="{text}"}} 1\n'
                expected = f'x{{a="{text}",le="{stored}",quantile="{stored}"}} 1'
                self.assertEqual(self.result(line), expected)

    def test_a_server_cannot_fake_what_a_scrape_adds(self):
        text = 'up 1\nscrape_error{reason="x"} 1\nx 5\n{"up"} 1\nup_ 1\n'
        reading = self.read(text, "x", "up", "scrape_error", "scrape_duration_seconds")
        self.assertEqual(shown(reading.samples), "x 5")
        self.assertEqual(reading.reserved, {"up", "scrape_error"})

    def test_labels_of_the_scrape_before_are_used_again(self):
        known = {b'x{a="b"}': (("__name__", "x"), ("a", "known"))}
        source = io.BytesIO(b'x{a="b"} 5\nx{a="c"} 6\n')
        stream = Stream("text/plain", source.readinto)
        reading = read_samples(stream, format_for(["x"], ()), known)
        self.assertEqual(shown(reading.samples), 'x{a="c"} 6; x{a="known"} 5')
        self.assertEqual(list(reading.series), [b'x{a="b"}', b'x{a="c"}'])
        self.assertEqual((reading.size, reading.names), (22, set()))

    def test_label_values_that_change_grow_no_cache(self):
        format, known = format_for(["x"], ()), {}
        for turn in range(5):
            lines = (f'x{{a="{turn}.{i}"}} 1\n{{"z{i}"}} 1\n' for i in range(1000))
            source = io.BytesIO("".join(lines).encode())
            stream = Stream("text/plain", source.readinto)
            known = read_samples(stream, format, known).series
            self.assertEqual((len(known), len(format.buffer)), (1000, 256 * 1024 + 2))

    def test_a_buffer_that_is_used_again_shows_nothing_of_the_body_before(self):
        format = format_for(["x"], ())
        for body, expected in (
            (b'x{a="b"} 5\n# ' + b"a" * 99, 'x{a="b"} 5'), (b"", ""), (b"x 1", "x 1")
        ):
            stream = Stream("text/plain", io.BytesIO(body).readinto)
            self.assertEqual(shown(read_samples(stream, format, {}).samples), expected)

    def test_names_that_nobody_asked_for_are_no_reason_to_fail(self):
        text = "".join(f'{{"other.name","a"="{i:0100}"}} 1\n' for i in range(20000))
        self.assertEqual(self.result(text + "x 5\n"), "x 5")

    def test_the_names_that_are_there_are_listed_on_request(self):
        reading = self.read('# a 1\nz:b{c="d"} broken\nx 5\n\nq 7', size=3)
        self.assertEqual(reading.names, {b"z:b", b"x", b"q"})
        reading = self.read('x 5\n{"a.b"} 1\n{ "c-d/e",f="g"} 1\n{h="i","j"} 1\n')
        self.assertEqual(reading.names, {b"x", b"a.b", b"c-d/e"})

    def test_too_much_fails_the_scrape(self):
        def lines(name, count, width=0):
            return "".join(f'{name}{{a="{i:0{width}}"}} 1\n' for i in range(count))

        self.assertEqual(len(self.read(lines("x", 5000)).samples), 5000)
        self.assertEqual(len(self.read(lines("z", 9000) + "x 5\n").samples), 1)
        for text in (
            lines("x", 5001), lines("x", 2500, 1000), "# " + "a" * 300000 + "\nx 5\n",
            'x{a="' + "b" * 300000 + '"} 5\n', "a" * 300000,
            '# a\nx{a="' + "b\n" * 150000 + '"} 5\n',
        ):
            for size in 65536, WHOLE:
                with self.subTest(text[:9], size=size):
                    self.assertEqual(self.result(text, size=size), "too_large")

    def test_a_metric_that_is_given_up_has_no_sample_however_it_is_written(self):
        for form in 'x{{a="{}"}} 1\n', 'x {{a="{}"}} 1\n', '{{"x",a="{}"}} 1\n':
            text = "y 1\n" + "".join(form.format(number) for number in range(6000))
            stream = Stream("text/plain", io.BytesIO(text.encode()).readinto)
            format = format_for(["x", "y"], (), spare=frozenset("x"))
            reading = read_samples(stream, format, {})
            self.assertEqual((shown(reading.samples), reading.dropped), ("y 1", {"x"}))

    def test_hostile_lines_are_read_in_linear_time(self):
        many = 200000
        blanks, digits = " " * many, "1" * many
        for line, expected in (
            (f"x{blanks}5\t\t", "x 5"), (f"x 5{blanks}", "x 5"), (f"{blanks}z", ""),
            (f"x{blanks[:30000]}{{}}  5", "x 5"), (f"x{{{blanks[:30000]}}} 5", "x 5"),
            (f"x{blanks}{{}} 5", "bad_line"), (f"x{{{blanks}}} 5", "bad_line"),
            (f"x 5 {blanks}z", "bad_line"), (f"x{{a{blanks}b}} 5", "bad_line"),
            (f'x{{a{blanks[:30000]}="b"}} 5', 'x{a="b"} 5'),
            (f"x 5 {digits}z", "bad_line"), (f"x {digits}z", "bad_line"),
            ("x{" + '"a"' * (many // 3), "bad_line"), ("x" + "{" * many, "bad_line"),
            ('x{a="' + "\\" * many, "bad_line"), ('x{"' + '\\"' * 99999, "bad_line"),
        ):
            with self.subTest(line[:9] + line[-9:]):
                self.assertEqual(self.result(f"# a\n{line}\n"), expected)

    def test_hostile_labels_are_read_in_constant_memory(self):
        if not Path("/proc/self/clear_refs").exists():
            self.skipTest("no way to see the highest use of memory")
        for hostile in '"', '\\"', "\\\\", 'a="b",', 'a="\\n",':
            text = "# a\nx{" + hostile * (250000 // len(hostile)) + "} 5\n"
            with self.subTest(hostile):
                before = highest_memory(reset=True)
                self.assertIn(self.result(text), ("bad_line", "too_large"))
                self.assertLess(highest_memory() - before, 8 << 20)

    def test_the_text_of_a_series_gives_its_labels(self):
        for text, labels in (
            (b"x", {"__name__": "x"}),
            (b'x{b="c",a=""}', {"__name__": "x", "b": "c"}),
            (b'{"a b","c.d"="e"}', {"__name__": "a b", "c.d": "e"}),
        ):
            self.assertEqual(parse_series(text), labels)
        for text in b'{a="b"}', b'{"x","y"}', b"x{a}", b'x{a="\xff"}', b'x{""="b"}':
            with self.assertRaises(ScrapeError) as caught:
                parse_series(text)
            self.assertEqual(caught.exception.reason, "bad_line")


class CommandLine(NetworkTest):
    """Runs the program in this process."""

    def run_main(self, *argv, out=None, **environ):
        out, err = out or io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", threading.excepthook)
            stack.enter_context(mock.patch.dict(os.environ, environ))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            try:
                code = health_check.main(argv)
            except SystemExit as end:
                code = end.code
        said = out.getvalue() if isinstance(out, io.StringIO) else ""
        return code, said, err.getvalue()

    def serving(self, act=lambda _: None, **environ):
        """Serve while ``act`` is given the port; return the exit status and the log."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        run = Server.run

        def run_and_act(server):
            thread = threading.Thread(target=run, args=(server,))
            thread.start()
            try:
                act(server._listener.getsockname()[1])
            finally:
                server.stop()
                thread.join()

        with mock.patch.object(Server, "run", run_and_act):
            code, out, log = self.run_main(APP_PORT="0", **environ)
        self.assertEqual(out, "")
        return code, log


class LogTest(CommandLine):
    """What the program writes to stderr."""

    def test_a_terminal_that_nobody_reads_stops_nothing(self):
        read, write = os.openpty()
        for descriptor in read, write:
            self.addCleanup(os.close, descriptor)
        server = self.metrics(page("x 1\n"))
        environ = {"METRICS_ENDPOINT": server.url, "LOG_LEVEL": "debug"}
        process = subprocess.Popen(
            [sys.executable, compiled_program()], stderr=write,
            env={**os.environ, "APP_PORT": "0", **environ},
        )  # fmt: skip
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        started = ""
        while "rules: " not in started:
            started += os.read(read, 4096).decode()
        port = int(re.search(r"is up: port (\d+)", started)[1])
        fill(f"/proc/{process.pid}/fd/2")
        server.pieces = (page("", status="500 No"),)
        for path in "/nowhere", "/health", "/nowhere":
            get(port, path)
        self.assertEqual(get(port), (503, "Unhealthy\n"))
        self.assertEqual(get(port, "/livez"), (200, "Healthy\n"))
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 0)

    def test_what_the_log_has_lost_is_counted_and_said_once(self):
        writer, read, write = self.log_writer()
        fill(f"/proc/self/fd/{write}")
        with mock.patch.multiple(health_check, MAX_BACKLOG=900, FLUSH_TIME=0.01):
            for message in "a" * 800, "b" * 800, "c":
                writer.emit(logging.makeLogRecord({"msg": message}))
            writer.flush()
        lines = os.fdopen(os.dup(read))
        self.addCleanup(lines.close)
        while lines.readline() != "a" * 800 + "\n":
            pass
        lost = "lines lost, for want of a reader or of memory: "
        self.assertEqual(lines.readline(), f"{lost}2\n")
        writer.emit(logging.makeLogRecord({"msg": "d"}))
        self.assertEqual(lines.readline(), "d\n")
        huge = mock.MagicMock(__str__=mock.Mock(side_effect=MemoryError))
        writer.emit(logging.makeLogRecord({"msg": huge}))
        self.assertEqual(lines.readline(), f"{lost}1\n")

    def test_a_line_is_whole_and_a_reader_who_has_gone_is_no_trouble(self):
        writer, read, write = self.log_writer()
        os.set_blocking(write, False)
        for letter in "ab":
            writer.emit(logging.makeLogRecord({"msg": letter * 100000}))
        with open(os.dup(read)) as lines:
            for letter in "ab":
                self.assertEqual(lines.readline(), letter * 100000 + "\n")
        os.dup2(os.open(os.devnull, os.O_RDONLY), read)
        writer.emit(logging.makeLogRecord({"msg": "c"}))
        with mock.patch.object(health_check, "FLUSH_TIME", 5):
            started = time.monotonic()
            writer.flush()
            self.assertLess(time.monotonic() - started, 2)

    def log_writer(self):
        """Return a writer, and both ends of the pipe that it writes to."""
        read, write = os.pipe()
        for descriptor in read, write:
            self.addCleanup(os.close, descriptor)
        return health_check.LogWriter(write), read, write

    def test_what_a_setting_risks_is_said_at_every_level_of_the_log(self):
        port = free_port()
        process = self.launch(
            METRICS_TLS_SKIP_VERIFY="true", LOG_LEVEL="error", APP_PORT=str(port)
        )
        self.assertIn("METRICS_TLS_SKIP_VERIFY", process.stderr.readline())
        # Coverage hangs in a signal's handler that ends a process before it serves.
        self.assertTrue(wait_until(lambda: livez(port)))
        process.send_signal(signal.SIGTERM)
        process.wait()
        self.assertEqual(process.stderr.read(), "")

    def test_a_log_line_is_one_line_and_holds_no_secret(self):
        server = self.metrics(page("\x1b[31m\x85oops\r\n"))
        environ = {
            "METRICS_ENDPOINT": f"http://us:hush@{server.instance}/metrics?t=hush",
            "LOG_LEVEL": "debug", "METRIC_TRESHOLD": "1",
        }  # fmt: skip

        def act(port):
            self.assertEqual({get(port)[0] for _ in range(2)}, {503})
            self.assertEqual(get(port, "/\x1b[2J\x9b?\x85")[0], 404)

        for log_format in "text", "json":
            with self.subTest(log_format):
                _, log = self.serving(act, LOG_FORMAT=log_format, **environ)
                warning, *lines = log.splitlines()
                self.assertIn("did you mean METRIC_THRESHOLD", warning)
                self.assertIn("u001b[2J", log)
                self.assertIn("GET /health HTTP/1.1 503", log)
                self.assertIn("oops", log)
                self.assertNotIn("hush", log)
                self.assertRegex(log, r"\A[ -~\n]+\Z")
                for line in [warning, *lines]:
                    if log_format == "json":
                        fields = json.loads(line)
                        self.assertLessEqual({"time", "level", "message"}, {*fields})
                        stamp = fields["time"]
                    else:
                        stamp = line.split()[0]
                        self.assertRegex(line, " (DEBUG|INFO|WARNING) ")
                    self.assertRegex(stamp, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

    def test_a_line_of_JSON_has_its_facts_in_fields(self):
        target, gone = self.metrics(page("q 11\n")), f"127.0.0.1:{free_port()}"

        def act(port):
            self.assertEqual(get(port)[0], 503)
            self.assertTrue(wait_until(lambda: sys.stderr.getvalue().count("\n") > 5))

        _, log = self.serving(
            act,
            METRICS_ENDPOINT=f"{target.url},http://{gone}/",
            ALERTMANAGER_URL=f"http://{gone}/api/v2/alerts?token=hush",
            UNHEALTHY_WHEN="Q: q > 10; N: none > 1; Down: up > 1",
            LOG_FORMAT="json",
            METRICS_TIMEOUT="2",
            ALERT_LABELS="severity=critical",
        )
        start, missing, *lines = map(json.loads, log.splitlines()[:6])
        self.assertEqual(start["rules"][0], "Q: q > 10")
        self.assertEqual(start["version"], health_check.__version__)
        self.assertEqual((start["timeout"], start["interval"]), ("2s", "0s"))
        self.assertIn("ALERT_LABELS severity=critical", start["message"])
        self.assertEqual(start["ALERT_LABELS"], "severity=critical")
        self.assertEqual(start["alertmanager"], f"http://{gone}/api/v2/alerts")
        self.assertEqual((missing["rule"], missing["selector"]), ("N", "none"))
        alert = next(line for line in lines if "alertmanager" in line)
        self.assertEqual(alert["level"], "warning")
        self.assertEqual(alert["alertmanager"], f"http://{gone}/api/v2/alerts")
        self.assertIn("refused", alert["reason"])
        for line, fields in zip(
            (line for line in lines if line is not alert),
            (
                {"target": gone, "reason": "refused"},
                {"rule": "Q", "state": "firing"},
                {"verdict": "Unhealthy", "reason": "Q"},
            ),
        ):
            self.assertEqual({**line, **fields}, line)

    def test_a_formatter_keeps_a_traceback_and_makes_it_harmless(self):
        message = "\x1b[2J\nBearer hush, from http://x/?t=hush"
        try:
            raise ValueError(message)
        except ValueError:
            error = sys.exc_info()
        record = logging.LogRecord("x", logging.ERROR, "", 1, "%s", "a\nb", error)
        text = health_check.TextFormatter("%(levelname)s %(message)s").format(record)
        self.assertTrue(text.startswith("ERROR a"))
        self.assertIn("ValueError: \\u001b[2J", text)
        fields = json.loads(health_check.JSONFormatter().format(record))
        self.assertEqual((fields["level"], fields["message"]), ("error", "a\nb"))
        self.assertIn("ValueError: ", fields["traceback"])
        self.assertNotIn("hush", text + fields["traceback"])


def answer_verdict(verdict):
    return "".join(answer_metrics(verdict_metrics(verdict)).body)


def site_of(trends=None, last_words="", **environ):
    """Return what a page of a:1 and b:1 shows, with trends of these rules alone."""
    urls = "http://a:1/metrics,http://b:1/metrics"
    config = load_config({"METRICS_ENDPOINT": urls, **environ})
    statistics = health_check.Statistics(())
    statistics.trends = collections.defaultdict(tuple, trends or {})
    return Site(config, statistics, last_words)


ANSWER = '{"choices": [{"text": " the"}]}'


class ProbeTest(NetworkTest):
    """What the server's own health route and a canary show, and when it is sent."""

    def ask(self, *pieces, model="m", path="/v1/completions", timeout="5", **environ):
        """Return what a canary finds, and the server that it asked."""
        server = self.metrics(*pieces)
        url = f"http://{server.instance}{path}"
        environ = {"CANARY_URL": url, "CANARY_TIMEOUT": timeout, **environ}
        config = load_config(environ)
        return ask_canary(config, config.canary_url, model), server

    def answers(self, models):
        """Answer a GET with the models that are served, a POST with a completion."""
        return lambda head: [page(models if head.startswith(b"GET") else ANSWER)]

    def test_only_a_completion_shows_a_sound_engine(self):
        for code, body, success in (
            (200, ANSWER, True),
            (200, '{"generated_text": ""}', True),
            (200, '[{"generated_text": "the"}]', True),
            (200, '{"choices": []}', False),
            (200, '{"choices": [{}], "error": {"message": "engine died"}}', False),
            (200, '{"error": "no worker"}', False),
            (200, '"the"', False),
            (200, "", False),
            (200, "<html>", False),
            (200, "[" * 60000, False),
            (200, "\udcff", False),
            (204, "", None),
            (400, "max_tokens", None),
            (404, "no such model", None),
            (429, "", None),
            (500, "", False),
            (503, "", False),
        ):
            with self.subTest(code=code, body=body[:60]):
                found, reason, _ = judge_completion(code, body.encode(errors="replace"))
                self.assertIs(found, success)
                self.assertEqual(bool(reason), not success)
        for code, setting in (401, "TOKEN_FILE"), (404, "URL"), (422, "BODY"):
            self.assertIn("mend CANARY_", judge_completion(code, b"")[2])
            self.assertIn(setting, judge_completion(code, b"")[2])

    def test_a_canary_asks_for_one_token_of_the_model_that_is_there(self):
        for path, model, asked in (
            ("/v1/completions", "m", {"prompt": "Hi", "model": "m"}),
            ("/generate", "", {"prompt": "Hi"}),
            ("/v1/completions", "", {"prompt": "Hi", "model": "served"}),
            ("/v1/chat/completions", "m",
             {"messages": [{"role": "user", "content": "Hi"}], "model": "m"}),
        ):  # fmt: skip
            with self.subTest(path=path, model=model):
                answers = self.answers('{"data": [{"id": "served"}]}')
                status, server = self.ask(answers, model=model, path=path)
                body = server.requests[-1].partition("\r\n\r\n")[2]
                self.assertEqual(json.loads(body), {"max_tokens": 1, **asked})
                self.assertEqual(status[:5], ("canary", server.instance, True, 200, ""))
        for models in "[]", "{}", "x", '{"data": []}':
            _, server = self.ask(self.answers(models), model="")
            self.assertNotIn("model", server.requests[-1].partition("\r\n\r\n")[2])

    def test_a_body_and_a_token_of_the_users_own_are_sent(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("secret")
            file.flush()
            body = '{"inputs": "Hi", "parameters": {"max_new_tokens": 1}}'
            _, server = self.ask(
                page(ANSWER), CANARY_BODY=body, CANARY_BEARER_TOKEN_FILE=file.name
            )
            head, _, sent = server.requests[0].partition("\r\n\r\n")
            self.assertEqual(sent, body)
            self.assertIn("Authorization: Bearer secret", head)
            self.assertIn("Content-Type: application/json", head)
        for body in "x", "[]", '{"stream": true}', "[" * 60000:
            with self.assertRaises(ConfigError):
                load_config({"CANARY_URL": "http://localhost/", "CANARY_BODY": body})
        for environ in (
            {"CANARY_AFTER": "5m"},
            {"CANARY_URL": "http://a:b@c/", "CANARY_BEARER_TOKEN_FILE": "d"},
        ):
            with self.assertRaises(ConfigError):
                load_config(environ)

    def test_no_answer_can_hold_up_or_bloat_a_canary(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
        endless = [head, *[b"x" * 65536] * 2000]
        away = redirect("http://127.0.0.1:1/")
        for pieces, timeout, success, code, reason in (
            ([FOREVER], "0.03", False, 0, "timeout"),
            ([head, FOREVER], "0.03", False, 200, "timeout"),
            (dripping(page(ANSWER)), "0.03", False, 0, "timeout"),
            (endless, "5", False, 200, "too_large"),
            ([page(ANSWER)[:-1]], "5", False, 200, "truncated"),
            ([b""], "5", False, 0, "reset"),
            ([b"x\r\n\r\n"], "5", False, 0, "bad_http"),
            ([away], "5", None, 0, "redirect"),
            ([redirect("/elsewhere", "303 See Other")], "5", None, 303,
             "refused_request"),
        ):  # fmt: skip
            with self.subTest(reason=reason):
                status, _ = self.ask(*pieces, timeout=timeout)
                self.assertEqual(status[2:5], (success, code, reason))
        status, server = self.ask(
            lambda head: [
                page(ANSWER) if b"POST /b" in head and b"prompt" in head
                else redirect("/b")
            ]
        )  # fmt: skip
        self.assertTrue(status.success)
        self.assertEqual(len(server.requests), 2)

    def test_a_health_route_is_up_with_any_2xx(self):
        for piece, success, code, reason in (
            (page(), True, 200, ""),
            (page(status="204 No Content"), True, 204, ""),
            (page(status="503 Service Unavailable"), False, 503, "http_status"),
            (redirect("http://127.0.0.1:1/"), False, 0, "redirect"),
            (FOREVER, False, 0, "timeout"),
        ):
            with self.subTest(code=code, reason=reason):
                target = load_config({"CANARY_URL": self.metrics(piece).url}).canary_url
                seconds = 0.05 if piece is FOREVER else 5.0
                status = ask("health", target, time.monotonic() + seconds)
                self.assertEqual(status[2:5], (success, code, reason))

    def succeeds(self, now):
        return True

    def fails(self, now):
        return False

    def asked(self, moments, answers, after=300.0):
        """Return when canaries are sent, and what rules see, by time and ``since``."""
        status, sent, seen = ProbeStatus("canary", "a"), [], []
        for now, since in moments:
            shown = as_of(status, since, now, after, same=False)
            seen.append({k[0][1]: v for k, v in shown.samples(()).items()})
            if is_due(status, since, now, after):
                sent.append(now)
                success = answers(now)
                reason = "" if success else "timeout"
                status = ProbeStatus("canary", "a", success, 0, reason, sent=now)
        return sent, [samples.get("probe_success") for samples in seen]

    def test_a_canary_is_sent_only_while_nothing_moves(self):
        day = [(now, None if now % 310 < 310 - 10 else now - 300)
               for now in range(0, 86400, 10)]  # fmt: skip
        still = [(now, 0 if now >= 60 else None) for now in range(0, 3600, 10)]
        busy = [(now, None) for now in range(0, 600, 10)]
        self.assertLessEqual(len(self.asked(day, self.succeeds)[0]), 288)
        self.assertEqual(self.asked(still, self.succeeds)[0], [*range(60, 3600, 300)])
        self.assertEqual(self.asked(busy, self.succeeds)[0], [])
        sent, seen = self.asked(still, lambda now: now > 600)
        self.assertEqual(sent[:11], list(range(60, 661, 60)))
        self.assertEqual(sent[11:13], [960, 1260])
        self.assertEqual(seen[:30], [None] * 30)
        self.assertEqual(seen[30:67], [0.0] * 37)
        self.assertEqual(seen[67:], [1.0] * len(seen[67:]))

    def test_a_result_is_about_the_standstill_that_it_was_sent_in(self):
        for name, answers, moments, last in (
            ("busy meanwhile", self.fails, [(300, 0), (330, None)], None),
            ("stands still again", self.fails, [(300, 0), (700, 340)], None),
            ("one long request", self.fails, [(60, 0), (90, 0)], None),
            ("hangs on", self.fails, [(60, 0), (300, 0)], 0.0),
            ("moves", self.succeeds, [(60, 0), (70, None)], None),
            ("only gauges stand", self.succeeds, [(60, 0), (90, 0)], 1.0),
            ("hangs after", self.succeeds, [(60, 0), (70, None), (200, 80)], None),
        ):
            with self.subTest(name):
                self.assertEqual(self.asked(moments, answers)[1][-1], last)

    def watched(self, clock, answer, **environ):
        """Return a monitor with a canary, and a server that answers it."""
        server = self.metrics(
            lambda head: answer() if b"POST" in head else [page('x{model_name="m"} 0')]
        )
        monitor = self.monitor(
            server, clock=clock, CANARY_URL=f"http://{server.instance}/v1/completions",
            CANARY_TIMEOUT="0.1", UNHEALTHY_WHEN="Ok: x > 1", **environ,
        )  # fmt: skip
        monitor.canary.start()
        return monitor, server

    def asking(self, server):
        return [request for request in server.requests if request.startswith("POST")]

    def test_an_engine_that_hangs_while_it_is_idle_is_found_and_seen_to_recover(self):
        clock, pieces = Clock(), [FOREVER]
        idle = "x == 0 for 5m"
        monitor, server = self.watched(clock, lambda: pieces, CANARY_WHEN=idle)
        monitor.listeners.append(log_transitions)
        states = []
        for _ in range(50):
            asked = len(self.asking(server))
            verdict = monitor.check()
            if not monitor.canary.answered():
                wait_until(monitor.canary.answered)
                self.assertEqual(len(self.asking(server)), asked + 1)
            states.append(verdict.reason)
            clock.now += 10.0
        # Sent after 300 s, failed at 310 s, for two minutes at 430 s.
        self.assertEqual(states, [""] * 43 + ["Unresponsive"] * 7)
        self.assertEqual(len(self.asking(server)), 4)
        pieces[:] = [page(ANSWER)]
        clock.now += 60.0
        monitor.check()
        self.assertTrue(wait_until(monitor.canary.answered))
        self.assertTrue(monitor.check().healthy)
        self.assertIn('"model": "m"', self.asking(server)[-1])
        lines = [line for line in self.log if line.startswith("canary of")]
        self.assertEqual([line.split(": ")[1] for line in lines], ["timeout", "ok"])

    def test_a_canary_that_hangs_delays_no_check_and_is_the_only_one(self):
        clock = Clock()
        monitor, _ = self.watched(
            clock, lambda: [FOREVER], CANARY_WHEN="x == 0", METRICS_TIMEOUT="5"
        )
        for _ in range(5):
            before = time.monotonic()
            monitor.check()
            clock.now += 3600.0
        self.assertLess(time.monotonic() - before, 2.0)
        threads = [t.name for t in threading.enumerate() if t.name == "canary"]
        self.assertEqual(len(threads), 1)

    def test_an_answer_that_comes_during_a_scrape_is_asked_for_once(self):
        clock, scraped = Clock(), threading.Event()

        def answer(request):
            if request.startswith(b"POST"):
                scraped.wait(2)
                return [page(ANSWER)]
            if monitor.verdict.sequence:
                scraped.set()
                wait_until(monitor.canary.answered)
            return [page('x{model_name="m"} 0')]

        server = self.metrics(answer)
        environ = {"CANARY_URL": f"http://{server.instance}/", "CANARY_WHEN": "x == 0"}
        monitor = self.monitor(server, clock=clock, **environ)
        monitor.canary.start()
        for _ in range(3):
            monitor.check()
            clock.now += 10.0
        self.assertEqual(len(self.asking(server)), 1)

    def test_no_canary_is_sent_while_the_server_drains(self):
        clock = Clock()
        monitor, server = self.watched(
            clock, lambda: [page(ANSWER)], CANARY_WHEN="x == 0", DRAIN_WHILE="x > 0"
        )
        monitor.drains_until = clock.now + health_check.MAX_DRAIN_PAUSE
        for _ in range(3):
            monitor.check()
            wait_until(monitor.canary.answered)
            sent, clock.now = len(self.asking(server)), clock.now + 3.0
            self.assertEqual(sent, int(clock.now > 1008.0))

    def test_no_canary_is_sent_before_a_first_good_scrape(self):
        clock, server = Clock(), self.metrics(page())
        url, when = f"http://{server.instance}/", "absent(x > 0)"
        monitor = self.monitor(server, clock=clock, CANARY_URL=url, CANARY_WHEN=when)
        monitor.canary.start()
        for status, sent in ("503 Loading", 0), ("503 Loading", 0), ("200 OK", 1):
            server.pieces = (page("x 0\n", status=status),)
            monitor.check()
            wait_until(monitor.canary.answered)
            self.assertEqual(len(self.asking(server)), sent)
            clock.now += 600.0

    def test_a_canary_that_is_refused_decides_nothing_and_names_what_to_mend(self):
        clock, refused = Clock(), page("no such model", status="404 Not Found")
        monitor, _ = self.watched(clock, lambda: [refused], CANARY_WHEN="x == 0")
        monitor.check()
        wait_until(monitor.canary.answered)
        verdict = monitor.check()
        probe = verdict.probes[0]
        self.assertEqual((probe.success, probe.code), (None, 404))
        self.assertTrue(verdict.healthy)
        self.assertNotIn("probe_success{", answer_verdict(verdict))
        told = "".join(answer_health(verdict, "verbose").body)
        self.assertIn("mend CANARY_URL or CANARY_BODY: HTTP 404: no such model", told)

    def engine(self, running, tokens, head):
        text = f"vllm:num_requests_running {running}\nvllm:generation_tokens_total "
        return [page(ANSWER if b"POST" in head else f"{text}{next(tokens)}\n")]

    def test_by_default_it_is_asked_for_only_where_no_metric_tells(self):
        for running, step, first in ((4, 0, 60), (0, 0, 320), (4, 9, None)):
            with self.subTest(running=running, step=step):
                clock, tokens = Clock(), itertools.count(0, step)
                server = self.metrics(partial(self.engine, running, tokens))
                url = f"http://{server.instance}/v1/completions"
                monitor = self.monitor(server, clock=clock, CANARY_URL=url)
                monitor.canary.start()
                sent = []
                for seconds in range(0, 360, 20):
                    monitor.check()
                    if not monitor.canary.answered():
                        sent.append(seconds)
                        wait_until(monitor.canary.answered)
                    clock.now += 20.0
                self.assertEqual(sent[:1], [first] if first else [])
                self.assertLess(len(sent), 3)

    def test_a_canary_answers_for_its_own_instance_where_there_are_several(self):
        for urls, words in (
            ("http://a/", "unless on () probe_success"),
            ("http://a/,http://b/", "unless on (instance) probe_success"),
        ):
            environ = {"METRICS_ENDPOINT": urls, "CANARY_URL": "http://a/v1/completions"}
            rules = {rule.name: rule for rule in load_config(environ).rules}
            for name in "Stalling", "Stalled":
                self.assertIn(words, format_rule(rules[name]))
            self.assertNotIn("probe_success", format_rule(rules["QueueFull"]))

    def test_a_bug_in_a_probe_is_told_and_decides_nothing(self):
        def broken(*_):
            raise KeyError("a bug")

        with mock.patch.object(health_check, "ask", broken):
            monitor, _ = self.watched(
                Clock(), lambda: [page(ANSWER)], CANARY_WHEN="x == 0",
                HEALTH_ENDPOINT="http://localhost/health",
            )  # fmt: skip
            monitor.check()
            self.assertTrue(wait_until(monitor.canary.answered))
            verdict = monitor.check()
        found = [(probe.success, probe.reason) for probe in verdict.probes]
        self.assertEqual(found, [(None, "bug"), (None, "bug")])
        self.assertTrue(verdict.healthy)
        self.assertIn("this is a bug", self.log[0])
        self.log.clear()

    def test_the_servers_own_health_route_is_asked_beside_each_scrape(self):
        clock, pieces = Clock(), [page()]
        route = self.metrics(lambda _: pieces)
        other = self.metrics(page(status="204 No Content"))
        fake = 'probe_success{probe="health"} 0\n'
        monitor = self.monitor(
            self.metrics(page(f"x 1\n{fake}")), clock=clock,
            HEALTH_ENDPOINT=f"{route.url},{other.url}", UNHEALTHY_WHEN="Ok: x > 1",
        )  # fmt: skip
        bad = page(status="503 Service Unavailable")
        for seconds, answers, reason in (
            (0, [page()], ""), (10, [bad], "NotServing"), (20, [page()], ""),
            (30, [FOREVER], ""), (60, [FOREVER], "NotServing"), (70, [page()], ""),
            (190, [FOREVER], ""), (200, [page()], ""), (205, [bad], "NotServing"),
            (210, [FOREVER], "NotServing"), (220, [page()], ""),
        ):  # fmt: skip
            with self.subTest(seconds=seconds):
                pieces[:] = answers
                route.release()
                clock.now = 1000.0 + seconds
                limit = 0.1 if answers == [FOREVER] else 5.0
                config = monitor.config._replace(metrics_timeout=limit)
                with mock.patch.object(monitor.scraper, "_config", config):
                    verdict = monitor.check()
                self.assertEqual(verdict.reason, reason)
                self.assertEqual(len(verdict.probes), 2)
                document = json.loads(
                    "".join(answer_health(verdict, "format=json").body)
                )
                probes = document["checks"]["probe:health"]
                word = "pass" if answers == [page()] else "fail"
                self.assertEqual(probes[0]["status"], word)
        labels = f'{{probe="health", target="{route.instance}"}}'
        self.assertIn(f"probe_success{labels} 1\n", answer_verdict(verdict))
        page_ = "".join(answer_page(verdict, site_of()).body)
        self.assertIn(f"health of {route.instance}", page_)


class Absence(unittest.TestCase):
    def test_what_is_missing_is_told_at_once_and_once_more_after_five_minutes(self):
        a, b, both = frozenset("a"), frozenset("b"), frozenset("ab")
        for name, *checks in (
            ("never there", (0, "", a, True), (10, "", a, False),
             (300, "", a, True), (900, "", a, False), (9000, "", a, False)),
            ("there from the start", (0, a, a, False), (10, a, a, False)),
            ("there later", (0, "", a, True), (10, a, a, False), (20, a, a, False)),
            ("gone", (0, a, a, False), (10, "", a, True), (20, "", a, False),
             (310, "", a, True), (900, "", a, False), (910, a, a, False)),
            ("coming and going", (0, a, a, False), (10, "", a, True),
             (20, a, a, False), (30, "", a, False), (40, a, a, False),
             (310, "", a, True)),
            ("where it was cannot be scraped", (0, a, both, False), (10, "", b, False),
             (20, "", both, True)),
            ("gone from one of two", (0, both, both, False), (10, a, a, False),
             (20, a, both, True), (30, both, both, False)),
        ):  # fmt: skip
            search = health_check.Search()
            for now, homes, scraped, told in checks:
                with self.subTest(name, now=now):
                    found = search.misses(frozenset(homes), scraped, float(now))
                    self.assertEqual(found, told)

    def test_the_label_at_fault_is_named_and_the_setting_that_sets_it(self):
        own = (("instance", "h:1"), ("job", "llm"))
        there = ';'.join(
            f'vllm:waiting{{instance="h:1",job="llm",engine="{n}"}} 1' for n in range(5)
        )
        for selector, words in (
            ('{namespace="a"}', "no label namespace: set TARGET_LABELS=job=llm,name"),
            ('{job="vllm"}', ': it has job="llm", by TARGET_LABELS'),
            ('{engine="9"}', ': it has engine="0", engine="1", engine="2"'),
            ('{engine!~".*"}', 'engine="0", engine="1"'),
            ('{engine="1",engine!="1"}', ": it has not all labels at once"),
            ('{pod!=""}', "it has no label pod: set TARGET_LABELS=job=llm,pod=..."),
        ):
            with self.subTest(selector):
                wanted = parse_expression("vllm:waiting" + selector)
                told = health_check.describe_missing(
                    wanted, health_check.Search(), [], history(there), own[1:]
                )
                self.assertIn(f"no series of {format_expression(wanted)} is", told)
                self.assertIn(words, told)
        told = health_check.describe_missing(
            parse_expression("http_active"), health_check.Search(), ["http.active"],
            history(there),
        )  # fmt: skip
        self.assertEqual(told, 'no series of http_active is there; {"http.active"} is')

    def test_a_hint_names_what_may_be_meant_and_nothing_else(self):
        waiting = "vllm:num_requests_waiting"
        for name, near in (
            ("vllm:num_request_waiting", waiting), ("num_requests_waiting", waiting),
            ("vllm_num_requests_waiting", waiting),
            ("Vllm:Num_Requests_Waitng", waiting),
            ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
            ("ttft_seconds", "ttft_seconds_bucket"), ("ttft_second", "ttft_seconds"),
            ("http_requests", "http_requests_total"), ("q_p50", "q_p50_seconds"),
            ("http_requests_totl", "http_requests_total"),
            (waiting, "ray_vllm:num_requests_waiting"),
        ):
            others = ["up_total", "python_info", "process_cpu_seconds_total"]
            self.assertEqual(nearest_name(name, [*others, near]), near)
        for name, other in (
            (waiting, "vllm:num_requests_running"), ("q_p50", "q_p99"),
            ("gpu0_memory", "gpu1_memory"),
            ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
            ("vllm:request_success_total", "vllm:request_failure_total"),
            ("tgi_queue_size", "tgi_batch_current_size"), ("tx_bytes", "rx_bytes"),
            ("sglang:num_queue_reqs", waiting), ("queue", "queue_time_seconds_wait"),
            ("http_requests_total", "process_open_fds"), ("x", "xs"),
            ("vllm:cache_usage", "vllm:cache_config_info"),
            ("vllm:external_prefix_cache_hits", "vllm:prefix_cache_hits"),
            ("vllm:requests_waiting", waiting),
        ):
            self.assertEqual(nearest_name(name, [other]), "", name)

    def test_names_made_to_be_alike_are_compared_with_in_time(self):
        names = [f"{'abcdefgh' * 9}{number:05}"[::-1] for number in range(2000)]
        with mock.patch.object(difflib, "get_close_matches", return_value=[]) as asked:
            self.assertEqual(nearest_name("hgfedcba" * 9, names), "")
        self.assertEqual(len(asked.call_args[0][1]), 50)

    def test_a_name_with_underscores_for_what_they_stand_for_is_near(self):
        # As Prometheus 2 stored what prometheus_client had escaped for it.
        names = "sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:num_used"
        for name in (*names, "http.server.duration", "http.server.duration.sum"):
            others = [*names, "http.server.duration", "http.server.duration.sum"]
            old = re.sub("[:.]", "_", name)
            self.assertEqual(nearest_name(old, others), name)

    def test_of_a_page_the_number_of_its_metrics_is_told(self):
        many = frozenset(map(str, range(health_check.MAX_NAMES)))
        told = health_check.describe_page(many)
        self.assertIn(f"any of its {health_check.MAX_NAMES} or more metrics", told)

    def test_of_a_page_that_nothing_watches_the_nearest_server_is_told(self):
        for names, *words in (
            ("python_info", "knows its only metric: set METRIC_TO_CHECK and"),
            ("x my_vllm:num_requests_waiting", "like those of vLLM, maybe until",
             "set METRIC_TO_CHECK=my_vllm:num_requests_waiting and"),
            ("sglang_num_queue_reqs", "SGLang", "=sglang_num_queue_reqs and"),
            ("maxserve_info", "most like those of MAX, maybe until", "_CHECK and"),
            ("request_predict_seconds_count", "; KServe has no gauge of requests, and"),
        ):  # fmt: skip
            told = health_check.describe_page(frozenset(names.split()))
            for word in words:
                self.assertIn(word, told)

    def test_a_port_that_the_server_itself_needs_is_told_of(self):
        told = "APP_PORT=8081 is a port of MLServer or TorchServe: set another"
        for url in "http://h:8082/metrics", "http://h:8082/metrics,http://i:8082/metrics":
            self.assertEqual(load_config({"METRICS_ENDPOINT": url}).warnings, (told,))
        for url in "http://h:8080/metrics", "http://h:8082/m", "http://h:8000/metrics":
            self.assertEqual(load_config({"METRICS_ENDPOINT": url}).warnings, ())
        (name,) = [s.known_by for s in health_check.SERVERS if s.name == "KServe"]
        pages = ["vllm:num_requests_waiting 1\n", f"{name} 1\n"]
        stream = Stream("text/plain", io.BytesIO("".join(pages).encode()).readinto)
        read = {"h:1": health_check.read_samples(stream, format_for([], ()), {}, True)}
        # Of many servers, and where no built-in rule asks which there are.
        own = {"METRIC_TO_CHECK": "x", "METRIC_THRESHOLD": "1"}
        for port, more, count in ("8081", {}, 1), ("8081", own, 1), ("8085", {}, 0):
            config = load_config({"APP_PORT": port, **more})
            lookout = Lookout(config)
            self.assertTrue(lookout.wants_names(NOW))
            looks = [lookout.look(read, history("")) for _ in range(2)]
            told = [text for look in looks for _, text, _ in look]
            found = [text for text in told if "is a port of KServe: set" in text]
            self.assertEqual(len(found), count, told)
class HistoryTest(unittest.TestCase):
    """What is remembered, against lists of all samples."""

    def timeline(self, rng, every, count):
        """Yield the time and the samples of checks; series rise, fall, come and go."""
        now, values = 1000.0, dict.fromkeys("abcd", 5.0)
        for _ in range(count):
            now += rng.choice(every)
            for series, value in values.items():
                change = rng.choice((0.0, 1.0, 1.0, 2.0, -1.0, math.inf))
                values[series] = 0.0 if change == math.inf else value + change
            there = [name for name in values if rng.random() > 0.1]
            yield now, {(("__name__", "x"), ("s", n)): values[n] for n in there}

    def test_what_selectors_match_is_kept_to_a_bound(self):
        selector = parse_expression('x{a="b"}')
        history = History(lookbacks([selector]), WHOLE)
        history.record({(("__name__", "x"), ("a", "b")): 1.0}, NOW, ["x"])
        for most, kept in (9, True), (0, False):
            with mock.patch.object(health_check, "MAX_SELECTED", most):
                health_check.select(selector, history.evaluation(NOW, WALL))
                again = history.evaluation(NOW, WALL).selected
            self.assertEqual(bool(again), kept)

    def test_what_looks_back_is_what_a_history_of_everything_gives(self):
        for every, text in itertools.product((4.0, 60.0), (
            "max_over_time((x > 0)[2h:1m])", "min_over_time(x[1h:5m] offset 30m)",
            "sum_over_time(x[2h:1m]) - count_over_time(x[2h:1m])",
            "max_over_time(sum_over_time(x[1h:10m])[1h:10m])",
        )):  # fmt: skip
            expr, rng, now, value = parse_expression(text), random.Random(7), 0.0, 5.0
            history = History(lookbacks([expr]), 1 << 24)
            everything, checks = {}, array("d")
            for _ in range(int(9000 / every)):
                now += rng.uniform(0.7, 1.3) * every
                value += rng.gauss(0, 1)
                samples = {(("__name__", "x"),): value} if rng.random() > 0.05 else {}
                history.record(samples, now, history.names)
                kept = history.evaluation(now, WALL + now)
                checks.append(now)
                for labels, sample in samples.items():
                    everything.setdefault(labels, Series(checks)).add(sample)
            whole = kept._replace(history={"x": everything}, selected={}, computed={})
            with self.subTest(text, every=every):
                self.assertEqual(*(shown(evaluate(expr, e)) for e in (kept, whole)))

    def compare(self, seed, back, every, count, same):
        """Compare windows with those of lists at each check, by what is the same."""
        history, samples = History({"x": back, "y": Lookback()}, 1 << 24), {}
        for now, found in self.timeline(random.Random(seed), every, count):
            history.record({**found, (("__name__", "other"),): 1.0}, now, "xy")
            for labels, value in found.items():
                samples.setdefault(labels, []).append((now, value))
            remembered = history.evaluation(now, 0.0).history["x"]
            for labels, known in samples.items():
                for seconds in back.seconds, back.shortest:
                    points = [x for x in known if now - seconds < x[0] <= now]
                    if points:
                        window = remembered[labels].window(now - seconds, now)
                        times, values = zip(*points)
                        self.assertEqual(*map(same, ((times, values), window[:2])))
                if labels in found:
                    newest = remembered[labels]
                    self.assertEqual((newest.time, newest.values[-1]), known[-1])
            self.assertLessEqual(len(remembered), 4)
        return history

    def test_selectors_find_what_comes_and_nothing_that_has_gone(self):
        history, at = History({"x": Lookback(5.0, 5.0)}, 1 << 20), 'x{a=~"[pqr]",b="c"}'
        for now, there, seen in (
            (0, "p", "p"), (1, "ps", "p"), (2, "qs", "pq"), (9, "qs", "q"),
            (10, "", "q"), (20, "", ""), (21, "rpq", "pqr"), (22, "q", "pqr"),
            (30, "q", "q"),
        ):  # fmt: skip
            labels = [(("__name__", "x"), ("a", a), ("b", "c")) for a in there]
            history.record(dict.fromkeys(labels, 1.0), now, "x")
            past, present = f"last_over_time({at}[5s])", there.replace("s", "")
            for text, names in (at, present), (past, seen):
                found = evaluate(parse_expression(text), history.evaluation(now, 0.0))
                with self.subTest(text, now=now):
                    self.assertEqual({dict(k)["a"] for k in found}, {*names})

    def test_checks_that_are_no_storm_are_all_remembered(self):
        for seed in range(6):
            longest = (60.0, 300.0, 3600.0)[seed % 3]
            every = [longest / 500, longest / 60, longest / 5][seed % 2 :]
            back = Lookback(longest, longest / 4)
            with self.subTest(seed):
                self.compare(seed, back, every, 120, lambda x: list(map(list, x)))

    def test_a_storm_of_checks_leaves_each_peak_and_each_reset(self):
        def peaks_and_resets(points):
            falls = sum(map(operator.gt, points[1], points[1][1:]))
            return max(points[1]), falls, points[1][-1]

        for seed in range(2):
            back = Lookback(60.0, 15.0)
            with self.subTest(seed):
                self.compare(seed, back, [0.03, 0.05], 300, peaks_and_resets)

    def test_consecutive_falls_are_resets_each(self):
        history = History({"x": Lookback(3600.0, 3600.0)}, 1 << 24)
        labels = (("__name__", "x"),)
        for value in range(9, 0, -1):
            history.record({labels: float(value)}, 1000.0 - 2 * value, "x")
        series = history.evaluation(998.0, 0.0).history["x"][labels]
        self.assertEqual(list(series.window(0, 998).falls), list(range(9, 1, -1)))

    def test_a_storm_keeps_the_last_sample_of_a_series_that_goes(self):
        history = History({"x": Lookback(3600.0, 3600.0)}, 1 << 24)
        stays, goes = ((("__name__", "x"), ("s", name)) for name in "ab")
        for count in range(100):
            found = {stays: 1.0, goes: 2.0} if count == 50 else {stays: 1.0}
            history.record(found, 1000.0 + count * 0.1, "x")
        found = history.evaluation(1009.9, 0.0).history["x"]
        self.assertEqual(list(found[goes].window(0, 2000).values), [2.0])
        self.assertLess(len(found[stays].window(0, 2000).values), 9)

    def test_what_is_remembered_keeps_to_its_limit_and_says_what_it_cost(self):
        history = History({"x": Lookback(2e4, 2e4), "y": Lookback(50.0, 50.0)}, 1 << 20)
        names = [(("__name__", "x"), ("s", str(number))) for number in range(500)]
        y, once = (("__name__", "y"),), names[:4]
        for count in range(300):
            now = 1000.0 + 100 * count
            seen = [*names[4:], *once[count : count + 1]]
            history.record({y: 1.0, **dict.fromkeys(seen, count % 7)}, now, "xy")
            tables = history._tables.values()
            size = sum(table.size() for table in tables) + history._labels_size
            self.assertLessEqual(size, 1 << 20)
        self.assertEqual(list(history.thinned()), ["x"])
        apart = history.thinned()["x"]
        found = history.evaluation(now, 0.0).history["x"]
        self.assertNotIn(once[0], found)
        times = found[names[4]].window(now - 2e4, now).times
        self.assertAlmostEqual(times[-1], now)
        self.assertTrue(2e4 / apart / 2 <= len(times) <= 2 * 2e4 / apart)
        history.record({y: 1.0}, now + 1e6, "xy")
        history.record({y: 1.0}, now + 1e6 + 1, "xy")
        self.assertEqual(history.thinned(), {})

    def test_labels_that_take_more_than_the_limit_leave_the_newest_samples(self):
        history = History({"x": Lookback(), "y": Lookback(50.0, 50.0)}, 1 << 10)
        x, y = (("__name__", "x"),), (("__name__", "y"),)
        for count in range(9):
            history.record({x: count, y: count}, 10.0 * count, "xy")
        found = history.evaluation(80.0, 0.0).history
        self.assertEqual([*found["x"][x].values, *found["y"][y].values], [8, 8])

    def test_a_metric_that_nothing_looks_back_at_is_its_newest_sample(self):
        history, labels = History({"x": Lookback()}, 1 << 20), (("__name__", "x"),)
        for now in range(3):
            history.record({labels: now * 2.0}, now, "x")
            series = history.evaluation(now, 0.0).history["x"][labels]
            self.assertEqual((series.time, series.values[-1]), (now, now * 2.0))
            self.assertEqual(len(series.values), 1)
        history.record({}, 3, "x")
        self.assertEqual(history.evaluation(3, 0.0).history, {})


class MonitorTest(NetworkTest):
    """Checks, without a server in front of them."""

    def test_a_rule_that_begins_to_fire_says_once_what_its_series_did(self):
        clock, values = Clock(), iter([5, 5, 7, 7, 7, 7])
        target = self.metrics(lambda _: [page(f"tokens {next(values)}\nrun 4\n")])
        rules = "Stalled: run > 0 unless changes(tokens[1m]) > 0 for 20s"
        monitor = self.monitor(target, clock=clock, UNHEALTHY_WHEN=rules)
        monitor.listeners.append(log_transitions)
        for _ in range(6):
            clock.now += 30.0
            verdict = monitor.check()
        of = f'{{instance="{target.instance}"}}'
        before = f"Stalled: firing for 0s: run{of} 4; tokens{of} "
        after = " for 30s or longer"
        lines = [line for line in self.log if "tokens" in line]
        self.assertEqual(lines, [f"{before}{n}{after}" for n in (5, 7)])
        self.assertIn("Stalled: ok", self.log)
        told = "".join(answer_health(verdict, "verbose&window").body)
        self.assertIn(f"   tokens{of} 7{after}\n", told)
        self.assertNotIn("longer", "".join(answer_health(verdict, "verbose").body))

    def test_last_words_are_looked_for_once_whatever_is_found(self):
        clock, target = Clock(), self.metrics(page("q 2\n"))
        rules = "Now: q > 1; Range: max_over_time(q[5m]) > 1"
        monitor, words = self.monitor(target, clock=clock, UNHEALTHY_WHEN=rules), set()
        for _ in range(3):
            clock.now += 10.0
            words.update(status.last_words for status in monitor.check().rules)
        self.assertEqual((monitor.verdict.reason, words), ("Now, Range", {""}))

    def test_last_words_are_short(self):
        rule = parse_rules("a > 0 unless changes(b[1m]) > 0")[0]
        for text, said in (
            ("a 4", ""),
            ("b 1 3 2 2", "b from 1 to 2, least 1, most 3, still for 1s"),
            ("b 2 2; a 1 1", "b 2 for 1s or longer; a 1 for 1s or longer"),
            ("b NaN 1", "b from NaN to 1, least NaN, most NaN, still for 0s"),
            ("", ""),
        ):
            self.assertEqual(last_words(rule, history(text)), said)
        many = ";".join(f'b{{x="{n}",y="{"z" * 500}"}} 1 1' for n in range(100))
        self.assertEqual(len(last_words(rule, history(many))), 2000)

    def state(self, verdict, name):
        return next(s.state for s in verdict.rules if s.rule.name == name)

    def test_a_hanging_target_hides_nothing_of_a_good_one_and_is_seen_to_recover(self):
        good, bad = self.metrics(page("q 11\n")), self.metrics(page())
        rules = "Queue: q > 10; Down: up == 0; Half: sum(up) < 2; Sum: sum(q) > 12"
        monitor = self.running(good, bad, METRICS_TIMEOUT="0.3", UNHEALTHY_WHEN=rules)
        port = self.serve(monitor)
        bad.pieces = (FOREVER,)
        self.assertEqual(get(port), (503, "Unhealthy\n"))
        self.assertEqual(monitor.verdict.reason, "Queue, Down, Half")
        up = [target.reason for target in monitor.verdict.targets]
        self.assertEqual(up, ["", "timeout"])
        (alert,) = monitor.verdict.rules[1].alerts
        self.assertEqual(dict(alert.labels)["instance"], bad.instance)
        bad.pieces = (page("q 2\n"),)
        bad.release()
        get(port)
        self.assertEqual(monitor.verdict.reason, "Queue, Sum")
        self.assert_any(f"{bad.instance}: scraped again", self.log)

    def test_a_timeout_is_told_of_likewise_whatever_was_waited_for(self):
        for pieces in [FOREVER], dripping(page("x 1\n")), [page("x 1\n")[:-1], FOREVER]:
            monitor = self.monitor(self.metrics(*pieces), METRICS_TIMEOUT="0.06")
            (target,) = monitor.check().targets
            told = target.reason, target.message, target.series
            self.assertEqual(told, ("timeout", "no answer within 60ms", 0))

    def test_a_request_that_has_no_answer_is_not_sent_again_at_once(self):
        server = self.metrics(FOREVER)
        monitor = self.monitor(server, METRICS_TIMEOUT="0.04")
        monitor.check()
        # On a busy machine it may come late, but it comes.
        self.assertTrue(wait_until(lambda: server.requests))
        (target,) = monitor.check().targets
        self.assertEqual((target.reason, len(server.requests)), ("timeout", 1))
        server.pieces = (page(),)
        server.release()
        self.assertTrue(wait_until(lambda: monitor.check().healthy))

    def test_a_request_is_given_up_in_the_end_and_later_each_time(self):
        server = self.metrics(FOREVER)
        fetched = mock.Mock(wraps=health_check.open_stream)
        waits = lambda: [args[2] for args, _ in fetched.call_args_list]  # noqa: E731
        changed = mock.patch.multiple(
            health_check, LEAST_OVERTIME=0.02, MOST_OVERTIME=0.07, open_stream=fetched
        )
        with changed:
            monitor = self.monitor(server, METRICS_TIMEOUT="0.02")
            self.assertTrue(wait_until(lambda: monitor.check() and len(waits()) > 3))
            server.pieces = (page(),)
            server.release()
            self.assertTrue(wait_until(lambda: monitor.check().healthy))
            monitor.check()
        self.assertEqual(waits()[:4], [0.02, 0.04, 0.07, 0.07])
        self.assertEqual(waits()[-1], 0.02)

    def test_an_answer_that_has_begun_ends_at_the_deadline(self):
        server, reasons = self.metrics(b"HTTP/1.1 200 OK\r\n", FOREVER), set()
        monitor = self.monitor(server, METRICS_TIMEOUT="0.04")

        def asked_again():
            reasons.add(monitor.check().targets[0].reason)
            return len(server.requests) > 2

        self.assertTrue(wait_until(asked_again))
        self.assertEqual(reasons, {"timeout"})

    def test_a_target_cannot_fake_what_a_scrape_adds(self):
        spoof = page('up 1\n{"up"} 1\nscrape_error 0\nq{instance="fake"} 3\n')
        spoofing = self.metrics(spoof)
        down = f"127.0.0.1:{free_port()}"
        monitor = self.monitor(
            spoofing,
            f"http://{down}/metrics",
            TARGET_LABELS="job=vllm",
            UNHEALTHY_WHEN="Q: q > 1; E: scrape_error",
        )
        for _ in range(2):
            verdict = monitor.check()
            self.assertEqual(verdict.reason, "Q, E, Down")
            alerts = [rule.alerts[0] for rule in verdict.rules if rule.alerts]
            q, *errors = (dict(alert.labels) for alert in alerts)
            for error in errors:
                self.assertEqual(error["instance"], down)
                self.assertEqual(error["reason"], "refused")
            self.assertEqual(q["instance"], spoofing.instance)
            self.assertEqual((q["exported_instance"], q["job"]), ("fake", "vllm"))
        dropped = [line for line in self.log if "dropped" in line]
        self.assertEqual(len(dropped), 2, dropped)

    def test_a_scrape_without_an_answer_has_lasted_until_the_deadline(self):
        rules = "T: scrape_duration_seconds >= 0.1; Down: up > 1"
        monitor = Monitor(
            self.config(
                self.metrics(page()), METRICS_TIMEOUT="0.1", UNHEALTHY_WHEN=rules
            )
        )
        # No worker is there, as if name lookup hung.
        self.assertEqual(monitor.check().reason, "never scraped")
        self.assertEqual(monitor.verdict.failing_rules(), ("T",))

    def test_a_new_outcome_of_a_scrape_never_spoils_the_metrics(self):
        class Changing(dict):
            def items(self):
                for item in super().items():
                    self["b:1", "timeout"] = 1
                    yield item

        monitor = self.monitor(self.metrics(page()))
        monitor.check()
        lines = [*scrape_metrics(monitor.statistics)]
        monitor.statistics.scrapes = Changing(monitor.statistics.scrapes)
        self.assertEqual([*scrape_metrics(monitor.statistics)], lines)

    def test_a_scrape_adds_its_duration_and_size(self):
        rules = "T: scrape_duration_seconds > 0; S: scrape_body_size_bytes == 4"
        rules += "; N: scrape_samples_scraped == 1"
        monitor = self.monitor(self.metrics(page("x 1\n")), UNHEALTHY_WHEN=rules)
        self.assertEqual(monitor.check().reason, "T, S, N")

    def test_pending_becomes_firing_and_a_gap_of_five_minutes_starts_again(self):
        clock, server = Clock(), self.metrics(page("q 11\n"))
        monitor = self.monitor(server, clock=clock, UNHEALTHY_WHEN="Q: q > 10 for 10m")
        states = []
        for later in (0, 290, 301, 250, 250, 99, 1, 400):
            clock.now += later
            states.append(self.state(monitor.check(), "Q"))
        self.assertEqual(states, ["pending"] * 6 + ["firing"] * 2)
        server.pieces = (page("q 10\n"),)
        self.assertTrue(monitor.check().healthy)

    def test_a_late_answer_makes_no_rule_healthy_that_has_fired(self):
        # A rule of one's own may have a name that is built-in, too.
        late, rules = "timeout", "NotServing: q > 9; S: sum(q) > 9; T: sum(up) == 2"
        config = load_config({"UNHEALTHY_WHEN": f"{rules}; Down: sum(up) == 0"})
        replay = Replay(config)
        for every, texts, states in (
            (10, ("q 10\n", "q 1\n"), "firing firing firing"),
            (1, (late, "q 1\n"), "error error inactive"),
            (29, (late, "q 1\n"), "error error inactive"),
            (2, (late, "q 1\n"), "inactive inactive inactive"),
            (60, ("q 10\n", "q 1\n"), "firing firing firing"),
            (60, ("q 10\n", late), "firing firing inactive"),
            (60, (late, "q 10\n"), "firing firing inactive"),
            (60, (late, "q 1\n"), "inactive inactive inactive"),
            (60, ("q 10\n", "q 10\n"), "firing firing firing"),
            (60, ("q 1\n", late), "error error inactive"),
            (60, ("q 10\n", "q 10\n"), "firing firing firing"),
            (60, ("refused", "q 1\n"), "inactive inactive inactive"),
        ):  # fmt: skip
            with self.subTest(texts, every=every):
                rules = replay.look(texts, every).rules[:3]
                self.assertEqual([s.state for s in rules], states.split())

    def test_no_moment_is_healthy_between_what_fired_and_Down(self):
        for first in "timeout", "refused":
            replay = Replay(load_config({"UNHEALTHY_WHEN": "Q: q > 9"}))
            texts = "q 10\n", first, *["timeout"] * 64
            reasons = {replay.look((text,), 0.5).reason for text in texts}
            with self.subTest(first):
                self.assertNotIn("", reasons)
                self.assertIn("Down", reasons)

    def test_what_a_canary_says_is_no_older_for_a_late_scrape(self):
        replay = Replay(load_config({"CANARY_URL": "http://0/v1/completions"}))
        for success, text, reason in (
            (False, "q 1\n", ""), (False, "q 1\n", "Unresponsive"),
            (True, "timeout", ""),
        ):  # fmt: skip
            probe = ProbeStatus("canary", "0", success)
            self.assertEqual(replay.look((text,), 120, (probe,)).reason, reason)

    def test_checks_far_apart_by_the_interval_set_are_no_gap(self):
        clock, server = Clock(), self.metrics(page("q 11\n"))
        rules = {"UNHEALTHY_WHEN": "Q: q > 10 for 15m", "SCRAPE_INTERVAL": "10m"}
        monitor = self.monitor(server, clock=clock, **rules)
        states = []
        for later in (0, 600, 600, 1801):
            clock.now += later
            states.append(self.state(monitor.check(), "Q"))
        self.assertEqual(states, ["pending", "pending", "firing", "firing"])
        server.pieces = (page("q 1\n"),)
        monitor.check()
        server.pieces = (page("q 11\n"),)
        for later, state in (600, "pending"), (1801, "pending"), (1800, "firing"):
            clock.now += later
            self.assertEqual(self.state(monitor.check(), "Q"), state)

    def test_a_check_that_does_not_end_is_told_to_livez(self):
        clock, holds, free = Clock(), threading.Event(), threading.Event()
        monitor = Monitor(self.config(self.metrics(page())), clock=clock)
        monitor.start()
        monitor.request(0)
        self.addCleanup(monitor.stop)
        self.assertTrue(wait_until(lambda: monitor.verdict.sequence))
        # Nobody asks for an hour.
        clock.now += 3600
        self.assertTrue(wait_until(monitor.alive))
        monitor.listeners.append(lambda *_: (holds.set(), free.wait(5)))
        monitor.request(1)
        self.assertTrue(holds.wait(5))
        port = self.serve(monitor)
        self.assertEqual(get(port, "/livez")[0], 200)
        clock.now += 3600
        self.assertEqual(get(port, "/livez")[0], 503)
        free.set()
        self.assertTrue(wait_until(lambda: get(port, "/livez")[0] == 200))

    def test_nothing_is_healthy_before_a_first_scrape_has_succeeded(self):
        server = self.metrics(page(status="503 Starting"))
        monitor = self.monitor(server, UNHEALTHY_WHEN="Down: up > 1")
        self.assertEqual(monitor.verdict.reason, "not checked yet")
        self.assertEqual(monitor.check().reason, "never scraped")
        server.pieces = (page(),)
        self.assertTrue(monitor.check().healthy)
        server.pieces = (page(status="503 Starting"),)
        self.assertTrue(monitor.check().healthy, "the user's own Down says so")

    def test_a_storm_of_checks_cannot_grow_the_history(self):
        clock, server = Clock(), self.metrics(page("q 1\nr 2\n"))
        rules = "Q: count_over_time(q[10s]) > 1000; R: r > 9"
        monitor = self.monitor(server, clock=clock, UNHEALTHY_WHEN=rules)
        for _ in range(200):
            clock.now += 0.002
            monitor.check()
        history = monitor.judge.history.evaluation(0.0, 0.0).history
        (q,), (r,) = history["q"].values(), history["r"].values()
        self.assertLess(len(q.values), 0.4 / (10 / 512) + 3)
        self.assertEqual(q.time, clock.now)
        self.assertEqual(len(r.values), 1)
        server.pieces = (page(),)
        clock.now += 11
        monitor.check()
        self.assertEqual([history["q"], history["r"]], [{}, {}])

    def test_label_values_that_change_with_each_scrape_fail_it(self):
        count = itertools.count()

        def answer(_):
            return [page("".join(f'q{{n="{next(count)}"}} 1\n' for _ in range(4000)))]

        server = self.metrics(answer)
        rules = {"UNHEALTHY_WHEN": "Q: changes(q[1h]) > 1", "HISTORY_LIMIT": "24Mi"}
        monitor = self.monitor(server, **rules)
        reasons = [monitor.check().targets[0].reason for _ in range(3)]
        self.assertEqual(reasons, ["", "", "too_large"])
        self.assertEqual(monitor.verdict.reason, "Down")

    def test_a_metric_of_too_many_series_takes_nothing_but_itself_away(self):
        total = "litellm_proxy_total_requests_metric_total"
        running = "litellm_in_flight_requests"
        keys = [f'{total}{{key="{number}"}} 9\n' for number in range(5999)]
        server = self.metrics(page(f"{running} 3\n" + "".join(keys[:4000])))
        clock, other = Clock(), self.metrics(page(f"{total} 9\n"))
        monitor = self.monitor(server, other, clock=clock)
        self.assertEqual(monitor.check().targets[0].series, 4001)
        for clock.now in range(30, 420, 30):
            server.pieces = (page(f"{running} 3\n" + "".join(reversed(keys))),)
            self.assertEqual(monitor.check().reason, "")
            self.assertEqual(monitor.verdict.targets[0].series, 1)
        told = f"too many series of {total}: no built-in rule reads it"
        self.assertEqual(self.log.count(told), 1)
        self.assertEqual(monitor.verdict.targets[0].remark, told)
        self.assertNotIn(total, monitor.judge.history.names)
        asked = self.monitor(server, UNHEALTHY_WHEN=f"sum({total}) < 1")
        self.assertEqual(asked.check().targets[0].reason, "too_large")

    def test_a_range_that_is_thinned_for_its_size_is_warned_of(self):
        rules = "Q: changes(q[6h]) > 1; R: q > 1"
        monitor = self.monitor(self.metrics(page("q 1\n")), UNHEALTHY_WHEN=rules)
        for apart in 200.0, 200.0, 400.0:
            monitor.judge.history.thinned = lambda at=apart: {"q": at}
            monitor.check()
        kept = "Q: only samples that are {} apart are kept of q[6h]"
        told = [kept.format(apart) for apart in ("3m20s", "6m40s")]
        expected = [f"{text}: HISTORY_LIMIT is too small" for text in told]
        self.assertEqual([x for x in self.log if "HISTORY" in x], expected)
        self.assertTrue(monitor.verdict.healthy)
        # A range that has no two samples would say that nothing changes, for ever.
        monitor.judge.history.thinned = lambda: {"q": 12000.0}
        error = monitor.check().rules[0].error
        self.assertEqual(error, "samples 3h20m apart are too few for q[6h]")
        self.assertFalse(monitor.verdict.healthy)

    def test_series_that_stay_are_no_reason_to_fail(self):
        many = "".join(f'q{{n="{number}"}} 1\n' for number in range(5000))
        server = self.metrics(page(many))
        monitor = self.monitor(server, UNHEALTHY_WHEN="Q: changes(q[1h]) > 1")
        self.assertEqual([monitor.check().reason for _ in range(3)], [""] * 3)

    def test_long_label_values_that_change_cannot_grow_the_history(self):
        count, letters = itertools.count(), "b" * 30000

        def answer(_):
            labels = (f'q{{n="{next(count)}{letters}"}} 1\n' for _ in range(60))
            return [page("".join(labels))]

        rules = {"UNHEALTHY_WHEN": "changes(q[1h]) > 1", "HISTORY_LIMIT": "6Mi"}
        monitor = self.monitor(self.metrics(answer), **rules)
        reasons = [monitor.check().targets[0].reason for _ in range(4)]
        self.assertEqual(reasons, ["", "", "too_large", "too_large"])

    def test_alerts_that_outlive_their_series_count_as_history_too(self):
        clock, count, letters = Clock(), itertools.count(), "b" * 30000

        def answer(_):
            labels = (f'q{{n="{next(count)}{letters}"}} 1\n' for _ in range(30))
            return [page("".join(labels))]

        servers = self.metrics(answer), self.metrics(page("q 1\n"))
        rules = "Q: q > 0 keep_firing_for 10m; R: q > 0 keep_firing_for 10m"
        environ = {"UNHEALTHY_WHEN": rules, "HISTORY_LIMIT": "6Mi"}
        monitor, reasons = self.monitor(*servers, clock=clock, **environ), []
        for _ in range(6):
            clock.now += 1
            targets = monitor.check().targets
            reasons.append(targets[0].reason)
            self.assertEqual(targets[1].reason, "", "its series are known")
        self.assertEqual(reasons[0], "")
        self.assertEqual(reasons[-1], "too_large")
        for later in 601, 1:
            clock.now += later
            monitor.check()
        self.assertEqual(monitor.verdict.reason, "Q, R")
        self.assertEqual(monitor.verdict.targets[0].reason, "")

    def test_firing_series_that_change_make_the_rule_an_error_for_a_while(self):
        clock, count = Clock(), itertools.count()
        server = self.metrics(lambda _: [page(f'q{{n="{next(count)}"}} 1\n')])
        rules = "Q: q > 0 keep_firing_for 10m"
        monitor = self.monitor(server, UNHEALTHY_WHEN=rules, clock=clock)
        states = []
        with mock.patch.object(health_check, "MAX_FOUND", 2):
            for _ in range(4):
                clock.now += 1
                states.append(self.state(monitor.check(), "Q"))
            self.assertEqual(states, ["firing", "firing", "error", "error"])
            self.assertIn("more than 2 alerts", monitor.verdict.rules[0].error)
            server.pieces = (page(""),)
            clock.now += 1
            monitor.check()
            clock.now += 601
            self.assertEqual(self.state(monitor.check(), "Q"), "inactive")

    def firing(self, rules, texts, every, name="R"):
        """Return at which checks of a target with these texts a rule fires."""
        clock, server = Clock(), self.metrics()
        monitor = self.monitor(server, UNHEALTHY_WHEN=rules, clock=clock)
        found = []
        for text in texts:
            clock.now += every
            server.pieces = (page(text),)
            found.append(self.state(monitor.check(), name) == "firing")
        return found

    def test_a_peak_and_a_reset_outlast_the_thinning_of_their_range(self):
        for rule, usual, odd, later in (
            ("R: max_over_time(x[1h]) > 10", 1, 50, 1),
            ("R: resets(x[1h]) > 0", 3, 0, 4),
        ):
            for phase in 8, 9:
                values = [usual] * phase + [odd] + [later] * 8
                found = self.firing(rule, [f"x {value}\n" for value in values], 5)
                self.assertEqual(found, [False] * phase + [True] * 9)

    def test_a_long_range_takes_no_points_from_a_short_one(self):
        rules = "R: rate(x[1m]) > 0.5; L: increase(x[6h]) > 1e9"
        found = self.firing(rules, [f"x {n * 10}\n" for n in range(60)], 10)
        self.assertEqual(found[7:], [True] * 53)

    def test_a_selector_that_finds_nothing_is_told_of_though_a_target_is_down(self):
        server, gone = self.metrics(page()), f"http://127.0.0.1:{free_port()}/"
        rules = "Q: vllm:num_request_waiting > 1; A: absent(x{job='a'}) and up > 1"
        clock = Clock()
        monitor = self.monitor(server, gone, UNHEALTHY_WHEN=rules, clock=clock)
        told = "Q: no series of vllm:num_request_waiting is there"
        for seconds, text, lines in (
            (0, "# nothing yet\n", [told + " yet", 'A: no series of x{job="a"} is']),
            (10, "vllm:num_requests_waiting 1\n", []),
            (
                300, "vllm:num_requests_waiting 1\nx 1\n",
                [told + "; vllm:num_requests_waiting is", ": it has no label job"],
            ),
            (900, "x 1\n", []),
            (10, 'vllm:num_request_waiting 1\nx{job="a"} 2\n', []),
            (3600, 'vllm:num_request_waiting 1\nx{job="b"} 2\n', ['it has job="b"']),
            (10, "x 1\n", [told + " any more"]),
            (10, None, []),
        ):  # fmt: skip
            with self.subTest(seconds=seconds, text=text):
                clock.now += seconds
                server.pieces = (page(text) if text else page(status="500 No"),)
                self.log.clear()
                monitor.check()
                self.assertEqual(len(self.log), len(lines), self.log)
                for line, words in zip(self.log, lines):
                    self.assertIn(words, line)
        text = health_check.describe(monitor.verdict.rules[0], monitor.verdict)
        self.assertEqual(text, "unknown: a scrape fails")

    def test_what_settings_ask_beside_the_rules_is_told_of_if_it_finds_nothing(self):
        server, url = self.metrics(page("y 1\n")), "http://127.0.0.1:1/v1/completions"
        environ = {"DRAIN_WHILE": "y + x > 0", "CANARY_WHEN": "z", "CANARY_URL": url}
        monitor = self.monitor(server, **environ)
        monitor.check()
        told = "no series of {} is there yet"
        self.assertIn("DRAIN_WHILE: " + told.format("x"), self.log)
        self.assertIn("CANARY_WHEN: " + told.format("z"), self.log)
        self.assert_any("nothing is watched", self.log)
        self.assertFalse(any("series of y" in line for line in self.log))

    def test_a_metric_is_not_there_yet_or_not_any_more(self):
        for homes, ending in ("", "yet"), ("a", "any more"):
            search = health_check.Search()
            search.misses(frozenset(homes), frozenset(homes), 0.0)
            told = health_check.describe_missing(
                health_check.Selector("q"), search, (), history("x 1")
            )
            self.assertEqual(told, f"no series of q is there {ending}")

    def test_many_selectors_that_find_nothing_are_told_of_over_some_checks(self):
        rules = "; ".join(f"R{number}: x{number} > 1" for number in range(12))
        monitor = self.monitor(self.metrics(page("y 1\n")), UNHEALTHY_WHEN=rules)
        for count in 5, 10, 12, 12:
            monitor.check()
            self.assertEqual(len(self.log), count)

    def test_a_page_of_which_no_rule_knows_a_metric_is_told_of_everywhere(self):
        server, clock = self.metrics(page()), Clock()
        monitor = self.monitor(server, clock=clock)
        first = f"{server.instance}: nothing is watched: "
        for seconds, text, line, watched in (
            (0, "", "", False), (299, "# x\n", "", False),
            (1, "", first + "its page is empty", False), (1800, "", "", False),
            (10, "a 1\nb 2\n", first + "no rule knows any of its 2 metrics", False),
            (3599, "a 1\nb 2\n", "", False), (1, "a 1\nb 2\n", first, False),
            (10, "vllm:num_requests_waiting 1\n", "", True),
            (10, "vllm:num_requests_waiting 2\n", "", True),
            (10, "c 1\n", "", True), (0, "c 1\n", first, False),
            (3600, 'http_requests_total{status="2xx"} 1\n', "its only metric", False),
        ):  # fmt: skip
            with self.subTest(seconds=seconds, text=text):
                clock.now += seconds
                server.pieces = (page(text),)
                self.log.clear()
                verdict = monitor.check()
                self.assertTrue(verdict.healthy)
                (target,) = verdict.targets
                self.assertEqual(target.watched, watched)
                self.assertEqual(len(self.log), bool(line), self.log)
                self.assertIn(line, "".join(self.log))
                told = "".join(answer_health(verdict, "verbose").body)
                self.assertEqual(f"warn: {first}" in told, not watched)
        self.assertRegex(answer_verdict(verdict), r"_watched\{.*\} 0\n")
        told = "".join(answer_page(verdict, site_of()).body)
        self.assertIn("nothing is watched: no rule", told)

    def test_a_rule_that_has_no_answer_is_unhealthy_with_its_reason(self):
        server = self.metrics(page('q{a="1"} 1\nq{a="2"} 2\n'))
        monitor = self.monitor(server, UNHEALTHY_WHEN="Q: q + on() q > 1; R: q > 9")
        verdict = monitor.check()
        self.assertEqual((verdict.healthy, verdict.reason), (False, "Q"))
        self.assertIn("many-to-", verdict.rules[0].error)
        server.pieces = (page("q 0\n"),)
        self.assertTrue(monitor.check().healthy)

    def test_a_bug_is_unhealthy_with_its_reason_and_the_next_check_goes_on(self):
        server = self.metrics(page("q 1\n"))
        config = self.config(server, UNHEALTHY_WHEN='Q: q{a="b"} > 1; R: q > 9')
        q = health_check.parse_expression('q{a="b"}')._replace(matchers=(None,))
        broken = (config.rules[0]._replace(expr=q), *config.rules[1:])
        lost = config.metrics_endpoint[0]._replace(authorization=object())
        for name, config_ in (
            ("rule", config._replace(rules=broken)),
            ("worker", config._replace(metrics_endpoint=(lost,))),
        ):
            with self.subTest(name):
                monitor = Monitor(config_)
                monitor.start()
                self.addCleanup(monitor.stop)
                port = self.serve(monitor)
                for _ in range(2):
                    self.assertEqual(get(port), (503, "Unhealthy\n"))
                self.assertIn("bug", get(port, "/health?verbose")[1])
                self.assertEqual(get(port, "/livez")[0], 200)
                self.assert_any("this is a bug", self.log)
        monitor = self.monitor(server)
        self.assertTrue(monitor.check().healthy)
        history, monitor.judge.history = monitor.judge.history, None
        self.assertRegex(monitor.check().reason, "^bug: [A-Z]")
        monitor.judge.history = history
        self.assertTrue(monitor.check().healthy)
        self.log.clear()

    def test_a_check_that_a_bug_ends_has_found_nothing(self):
        server, url = self.metrics(page("run 0\n")), "http://127.0.0.1:1/health"
        environ = {"DRAIN_WHILE": "run > 0", "HEALTH_ENDPOINT": url}
        monitor = self.monitor(server, **environ)
        monitor.drains_until = math.inf
        before = monitor.check()
        self.assertEqual((before.left, len(before.probes)), ("", 1))
        with mock.patch.object(monitor.judge, "verdict_of", lambda *_: 1 / 0):
            verdict = monitor.check()
        self.assertEqual(verdict.sequence, before.sequence + 1)
        # Nothing left in two checks would be Drained.
        self.assertIsNone(verdict.left)
        found = verdict.rules, verdict.targets, verdict.probes
        self.assertEqual(found, ((), (), ()))
        self.log.clear()

    def test_a_bug_before_its_scrape_is_unhealthy_with_its_reason_and_it_goes_on(self):
        breaks = iter(range(5))

        def clock():
            if next(breaks, 0) > 0:
                raise KeyError("injected")
            return time.monotonic()

        monitor = Monitor(self.config(self.metrics(page())), clock=clock)
        monitor.start()
        self.addCleanup(monitor.stop)
        port = self.serve(monitor)
        for _ in range(2):
            expected = (503, "Unhealthy: bug: KeyError: 'injected'\n")
            self.assertEqual(get(port, "/health?verbose"), expected)
            unknown = (200, "Healthy (unknown: bug: KeyError: 'injected')\n")
            self.assertEqual(get(port, "/health/Stalled"), unknown)
            self.assertEqual(get(port, "/livez")[0], 200)
        self.assertEqual(get(port), (200, "Healthy\n"))
        self.assertEqual(sum("this is a bug" in line for line in self.log), 4)
        self.log.clear()

    def test_a_bug_in_who_is_told_does_not_end_its_thread(self):
        monitor = self.running(self.metrics(page()))
        monitor.listeners.append(lambda *_: 1 / 0)
        for sequence in range(3):
            monitor.request(sequence)
            self.assertTrue(wait_until(lambda n=sequence: monitor.verdict.sequence > n))
        self.assertTrue(monitor.alive() and monitor.verdict.healthy)
        self.assert_any("this is a bug", self.log)
        self.log.clear()

    def test_before_a_first_scrape_it_is_not_known_whether_a_rule_fires(self):
        gone = f"http://127.0.0.1:{free_port()}/"
        for interval in "0", "9":
            port = self.serve(self.running(gone, SCRAPE_INTERVAL=interval))
            self.assertEqual(get(port), (503, "Unhealthy\n"))
            unknown = (200, "Healthy (unknown: never scraped)\n")
            self.assertEqual(get(port, "/health/Stalled"), unknown)

    def test_a_monitor_that_is_dead_is_told_to_livez_and_health(self):
        monitor = self.running(self.metrics(page()))
        port = self.serve(monitor)
        self.assertEqual(get(port), (200, "Healthy\n"))
        monitor.listeners.append(lambda *_: sys.exit())
        monitor.verdict_timeout = 0.1
        monitor.request(monitor.verdict.sequence)
        self.assertTrue(wait_until(lambda: not monitor.alive()))
        status, body = get(port, "/health?verbose")
        self.assertEqual((status, "no verdict within" in body), (503, True))
        self.assertEqual(get(port, "/livez")[0], 503)

    def test_a_jump_of_the_system_clock_moves_what_is_shown_and_nothing_else(self):
        clock, wall = Clock(), Clock()
        rules = "Q: q > 10 for 10s; C: changes(q[10s]) > 0; T: vector(time()) > 1e5"
        server = self.metrics(page("q 11\n"))
        config = self.config(server, UNHEALTHY_WHEN=rules)
        monitor = Monitor(config, clock=clock, wall=wall)
        monitor.scraper.start()
        self.addCleanup(monitor.stop)
        states = []
        for jump in 0, 86400, -2 * 86400, 3 * 86400:
            clock.now, wall.now = clock.now + 4, wall.now + 4 + jump
            verdict = monitor.check()
            self.assertEqual((verdict.time, verdict.wall), (clock.now, wall.now))
            states.append([status.state for status in verdict.rules[:3]])
        expected = [["pending", "inactive", "inactive"]] * 3
        self.assertEqual(states, [*expected, ["firing", "inactive", "firing"]])
        (q,) = monitor.judge.history.evaluation(0.0, 0.0).history["q"].values()
        self.assertEqual(len(q.window(clock.now - 10, clock.now).times), 3)

    def test_the_log_has_the_changes_and_only_those(self):
        server = self.metrics(page("q 1\n"))
        monitor = self.running(server, UNHEALTHY_WHEN="Q: q > 10")
        port, q = self.serve(monitor), f'q{{instance="{server.instance}"}} 11'
        down = f'scrape_error{{instance="{server.instance}", reason="http_status"}} 1'
        failed = f"{server.instance}: scrape failed: http_status: HTTP 500 Internal"
        for answer, expected in (
            (page("q 11\n"), [f"Q: firing for 0s: {q}", "Unhealthy: Q"]),
            (page("q 12\n"), []),
            (page("q 9\n"), ["Q: ok: 9 (limit 10)", "Healthy"]),
            (
                page(status="500 No"),
                [f"{failed} Server Error", f"Down: firing for 0s: {down}", "Unhealth"],
            ),
            (page(status="500 No"), []),
            (
                page(),
                [
                    "Q: no series of q is there any more",
                    f"{server.instance}: scraped again", "Down: ok",
                    "Healthy",
                ],
            ),
        ):
            with self.subTest(answer):
                self.log.clear()
                server.pieces = (answer,)
                get(port)
                get(port, "/livez")
                lines = [x for x in self.log if not re.search(r"HTTP/1.1|^check", x)]
                self.assertEqual(len(lines), len(expected), lines)
                for line, start in zip(lines, expected):
                    self.assertTrue(line.startswith(start), line)

    def test_a_thread_that_ends_by_an_error_is_one_line_of_the_log(self):
        self.addCleanup(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = health_check.report_thread
        thread = threading.Thread(target=divmod, args=(1, 0), name="monitor")
        with self.assertLogs("health_check", "ERROR") as logged:
            thread.start()
            thread.join(20)
        (line,) = logged.output
        self.assertIn("the thread monitor has ended: this is a bug", line)
        self.assertRegex(line, r"Traceback [^$]*ZeroDivisionError")

    def test_what_was_seen_before_a_suspension_is_seen_anew(self):
        clock, values = Clock(), iter([1, 2])

        def answer(_):
            clock.now += 60.0
            return [page(f"x {next(values)}\n")]

        monitor = self.monitor(
            self.metrics(answer), clock=clock, UNHEALTHY_WHEN="X: x > 1"
        )
        # Any scrape takes too long.
        with mock.patch.object(health_check, "MAX_LATE", -math.inf):
            monitor.drains_until = math.inf
            monitor.request(0)
            self.assertTrue(wait_until(lambda: monitor.verdict.sequence))
        verdict = monitor.verdict
        self.assertEqual((verdict.reason, verdict.time), ("X", 1060.0))
        self.assertEqual((verdict.sequence, verdict.left), (1, health_check.NO_SERVER))

    def test_one_thread_at_a_time_judges_whoever_is_the_last_and_whenever(self):
        dice, judging, seen = random.Random(1), threading.Lock(), []
        late = lambda _: [dice.choice([0, 0, 0.01, 0.04]), page("q 1\n")]  # noqa: E731
        targets = [self.metrics(late) for _ in range(3)]
        monitor = Monitor(self.config(*targets, METRICS_TIMEOUT="0.02"))

        def judged(before, verdict):
            self.assertTrue(judging.acquire(blocking=False))
            seen.append((before.sequence, verdict.sequence))
            time.sleep(dice.choice([0, 0.001, 0.005]))
            judging.release()

        monitor.listeners.append(judged)
        monitor.start()
        self.addCleanup(monitor.stop)

        def ask():
            for _ in range(12):
                n = monitor.verdict.sequence
                monitor.request(n)
                answered.append(wait_until(lambda n=n: monitor.verdict.sequence > n))

        answered, askers = [], [threading.Thread(target=ask) for _ in range(4)]
        with mock.patch.object(health_check, "GRACE", 0.0):
            for asker in askers:
                asker.start()
            for asker in askers:
                asker.join()
        self.assertEqual(answered, [True] * 48)
        self.assertEqual(seen, [(n, n + 1) for n in range(len(seen))])
        reasons = {reason for (_, reason), _ in monitor.statistics.scrapes.items()}
        self.assertEqual(reasons, {"success", "timeout"})

    def test_a_schedule_needs_no_request(self):
        server = self.metrics(page())
        monitor = self.running(server, SCRAPE_INTERVAL="0.1", METRICS_TIMEOUT="0.1")
        self.assertTrue(wait_until(lambda: monitor.verdict.sequence > 2))
        self.assertTrue(wait_until(lambda: monitor.verdict.healthy))
        monitor.stop()
        self.assertTrue(wait_until(lambda: not monitor.alive()))


class AlertmanagerTest(NetworkTest):
    """A notifier, its clock moved by hand, and an Alertmanager that records."""

    def setUp(self):
        super().setUp()
        self.clock, self.answer = Clock(), page()
        self.received = []
        self.server = self.metrics(self.take)
        config = self.config(
            "http://localhost:1",
            UNHEALTHY_WHEN="Busy: q > 10 for 5s",
            ALERTMANAGER_URL=self.server.url,
            ALERT_LABELS="severity=critical",
            TARGET_LABELS="job=vllm",
            POD_NAME="pod-1",
        )
        self.rule = config.rules[0]
        (target,) = config.alertmanager_url
        self.notifier = Notifier(config, target, "http://pod-1/", self.clock)

    def take(self, request):
        head, _, body = request.partition(b"\r\n\r\n")
        self.received.append((head, body))
        return [self.answer]

    def publish(self, *alerts, rules=True):
        now = self.clock()
        status = RuleStatus(self.rule, tuple(alerts))
        statuses = (status,) if rules else ()
        targets = (TargetStatus("a:1"), TargetStatus("b:1", "refused", "no\n"))
        self.notifier.publish(None, Verdict(1, "", now, WALL + now, statuses, targets))

    def alert(self, engine="0", state="firing"):
        labels = (("0", "z"), ("__name__", "q"), ("a.b", "x"), ("engine", engine))
        return Alert(labels, 23.0, 900.0, 905.0 if state == "firing" else None)

    def sent(self):
        """Return what has been sent since the last call: engine, start, end."""
        posts, self.received = self.received, []
        return [
            (alert["labels"]["engine"], *(self.seconds(alert[key]) for key in TIMES))
            for _, body in posts
            for alert in json.loads(body)
        ]

    def seconds(self, text):
        return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S.000Z")) - WALL

    def test_a_firing_series_is_an_alert_with_its_labels_and_its_reason(self):
        self.publish(self.alert(), self.alert("1", "pending"))
        self.notifier.work()
        ((head, body),) = self.received
        post = b"POST /metrics/api/v2/alerts HTTP/1.1\r\n"
        self.assertTrue(head.startswith(post), head)
        self.assertIn(b"Content-Type: application/json\r\n", head)
        (alert,) = json.loads(body)
        labels = {"U__a_2e_b": "x", "alertname": "Busy", "engine": "0", "job": "vllm"}
        labels.update(U___30_="z", pod="pod-1", severity="critical")
        self.assertEqual(alert["labels"], labels)
        self.assertEqual(alert["annotations"]["value"], "23")
        description = alert["annotations"]["description"]
        self.assertIn("q > 10 for 5s fires for q{", description)
        failed = "23; the scrape of b:1 failed: refused: no\\u000a"
        self.assertTrue(description.endswith(failed), description)
        series = 'q{"0"="z", "a.b"="x", engine="0"} 23'
        self.assertIn(series, alert["annotations"]["summary"])
        self.assertEqual(alert["generatorURL"], "http://pod-1/")
        self.assertEqual(self.sent(), [("0", 905, 1240)])

    def test_an_alert_of_a_rule_that_cannot_be_evaluated_any_more_is_sent(self):
        broken = RuleStatus(self.rule, (self.alert(),), "a bug")
        self.notifier.publish(None, Verdict(1, "", self.clock(), WALL, (broken,)))
        self.notifier.work()
        self.assertEqual([engine for engine, _, _ in self.sent()], ["0"])

    def test_little_is_kept_of_an_alert_beside_what_others_keep_too(self):
        self.publish(*(self.alert(f"{n}{'x' * 900}") for n in range(200)))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.notifier.work()
        self.assertEqual(len(self.sent()), 200)
        self.server.requests.clear()
        self.assertLess(tracemalloc.get_traced_memory()[0] / 200, 2500)

    def test_it_is_sent_again_while_fresh_then_resolved_for_15_minutes(self):
        self.publish(self.alert(), self.alert("1"))
        self.notifier.work()
        self.assertEqual(len(self.sent()), 2)
        self.clock.now += 30
        self.publish(self.alert(), self.alert("1"))
        self.assertEqual(self.notifier.work(), 30)
        self.assertEqual(self.sent(), [])
        self.clock.now += 30
        self.publish(self.alert())
        self.notifier.work()
        self.assertEqual(sorted(self.sent()), [("0", 905, 1300), ("1", 905, 1060)])
        for _ in range(16):
            self.clock.now += 60
            self.publish()
            self.notifier.work()
        self.assertEqual(len(self.sent()), 16 + 15)
        self.clock.now += 60
        self.assertIsNone(self.notifier.work())
        self.assertEqual(self.log, [])

    def test_without_fresh_verdicts_an_alert_ends_by_itself(self):
        self.publish(self.alert())
        self.notifier.work()
        self.sent()
        for _ in range(6):
            self.clock.now += 60
            self.publish(rules=False)
            self.notifier.work()
        self.assertEqual(self.sent(), [])
        # The next one is told at once, however lately there was nothing to tell.
        self.publish(self.alert())
        self.notifier.work()
        self.assertEqual(self.sent(), [("0", 905, 1600)])

    def test_label_values_that_change_with_each_check_cannot_grow_its_memory(self):
        for check in range(3):
            names = (f"{check}-{number}" for number in range(MAX_ALERTS + 1))
            self.publish(*map(self.alert, names))
            self.notifier.work()
        self.sent()
        (warning,) = self.log
        self.assertEqual(warning, "1025 alerts fire: only 1024 of them are sent")
        self.clock.now += 60
        self.publish()
        self.notifier.work()
        ended = [engine for engine, _, _ in self.sent()]
        self.assertLessEqual({f"2-{n}" for n in range(MAX_ALERTS)}, {*ended})
        self.assertLessEqual(len(ended), 2 * MAX_ALERTS)

    def test_one_that_fires_beyond_the_bound_is_not_told_to_have_ended(self):
        with mock.patch.object(health_check, "MAX_ALERTS", 1):
            for engines in "a", "b", "ba", "ba":
                self.publish(*map(self.alert, engines))
                self.notifier.work()
                ended = {engine for engine, _, end in self.sent() if end <= 1000 + 180}
                self.assertEqual(ended & {*engines}, set())
                self.clock.now += 60

    def test_labels_of_kilobytes_are_left_out(self):
        for letter in "ab":
            self.publish(self.alert(letter * 5000), self.alert(letter))
            self.notifier.work()
        self.assertLess(max(len(body) for _, body in self.received), 8000)
        engines = [a["labels"].get("engine") for a in json.loads(self.received[0][1])]
        self.assertEqual(engines, [None, "a"])

    def test_one_that_was_away_gets_the_truth_when_it_comes_back(self):
        for answer, problem in (
            (page("no", status="503 Unavailable"), "HTTP 503: b'no'"),
            (b"HTTP/1.1 ", "reset"),
        ):
            self.answer = answer
            self.publish(self.alert())
            self.assertEqual(self.notifier.work(), RETRY)
            self.assertIn(problem, self.log[-1])
            self.assertEqual(self.notifier.work(), RETRY)
            self.publish()
            self.answer, self.received = page(), []
            self.clock.now += RETRY
            self.notifier.work()
            ended = self.clock.now - RETRY
            self.assertEqual([end for _, _, end in self.sent()], [ended])
            self.assertIn("takes alerts again", self.log[-1])
        self.assertEqual((self.notifier.sent, self.notifier.failed), (2, 2))

    def test_a_refused_alert_holds_up_no_other_and_comes_again_in_a_minute(self):
        many = tuple(map(self.alert, map(str, range(300))))
        self.server.pieces = (self.refuse_first,)
        self.publish(*many)
        self.assertEqual(self.notifier.work(), 60)
        self.assertEqual(len(self.sent()), 300)
        self.assertEqual((self.notifier.sent, self.notifier.failed), (44, 256))
        self.assert_any("HTTP 400: b'no'", self.log)
        self.clock.now += 10
        self.publish()
        self.notifier.work()
        self.assertEqual({end for _, _, end in self.sent()}, {self.clock.now})

    def test_a_verdict_that_comes_meanwhile_is_no_news_of_what_is_being_sent(self):
        def publish_another(request):
            self.clock.now += 50
            self.publish()
            return self.take(request)

        self.server.pieces = (publish_another,)
        self.publish(*map(self.alert, map(str, range(300))))
        self.notifier.work()
        self.assertEqual({end for _, _, end in self.sent()}, {1240})
        self.notifier.work()
        self.assertEqual({end for _, _, end in self.sent()}, {1100})

    def test_what_it_answers_reaches_the_log_without_secrets(self):
        echo = "Authorization: Bearer hush\r\nPOST /?token=hush HTTP/1.1"
        self.answer = page(echo, status="401 Unauthorized")
        self.publish(self.alert())
        self.notifier.work()
        self.assertIn("HTTP 401: b'Authorization: Bearer ***", self.log[-1])
        self.assertNotIn("hush", self.log[-1])

    def refuse_first(self, request):
        no = page("no", status="400 Bad Request")
        return [self.take(request)[0] if self.received else self.take(request) and no]

    def test_without_fresh_verdicts_it_does_not_spin(self):
        self.publish(self.alert())
        self.notifier.work()
        self.clock.now += 1000
        self.assertEqual(self.notifier.work(), RETRY)
        self.publish(self.alert())
        self.assertEqual(self.notifier.work(), 60)
        self.assertEqual([end for _, _, end in self.sent()], [1240, 2240])

    def test_a_series_keeps_its_pod_beside_that_of_the_checker(self):
        alerts = [
            self.alert()._replace(labels=(*exported, ("pod", name)))
            for exported, name in (
                ((), "a"), ((), "b"), ([("exported_pod", "x")], "c"),
                ([("exported_pod", "y")], "c"),
            )
        ]  # fmt: skip
        self.publish(*alerts)
        self.notifier.work()
        labels = [alert["labels"] for alert in json.loads(self.received[0][1])]
        pods = [(each["pod"], each["exported_pod"]) for each in labels]
        self.assertEqual(pods, [("pod-1", name) for name in "abxy"])

    def test_names_that_it_would_refuse_stay_apart(self):
        names = "a.b", "a:b", "a_b", "a-b", "\u00e9", "9", "a__b.c"
        alerts = [self.alert()._replace(labels=((name, "x"),)) for name in names]
        self.publish(*alerts)
        self.notifier.work()
        labels = [alert["labels"] for alert in json.loads(self.received[0][1])]
        self.assertEqual(
            [name for each in labels for name in each if each[name] == "x"],
            ["U__a_2e_b", "U__a_3a_b", "a_b", "U__a_2d_b", "U___e9_", "U___39_",
             "U__a____b_2e_c"],
        )  # fmt: skip

    def test_a_bug_does_not_end_its_thread(self):
        class Broken(Notifier):
            calls = 0

            def work(self):
                self.calls += 1
                raise RuntimeError("broken")

        notifier = Broken(self.notifier._config, self.notifier.target, "")
        notifier.start()
        self.assertTrue(wait_until(lambda: notifier.calls == 1))
        status = RuleStatus(self.rule, (self.alert(),))
        notifier.publish(None, Verdict(1, "", 0.0, 0.0, (status,)))
        self.assertTrue(wait_until(lambda: notifier.calls == 2))
        notifier.stop()
        self.log[:] = [line for line in self.log if "this is a bug" not in line]

    def test_its_thread_sends_what_is_published_and_ends(self):
        self.notifier.start()
        self.publish(self.alert())
        self.assertTrue(wait_until(lambda: self.received))
        self.notifier.stop()
        self.assertTrue(
            wait_until(lambda: "notify" not in [t.name for t in threading.enumerate()])
        )


class ServeTest(NetworkTest):
    """Everything behind one port, from the request to the scrape."""

    def test_the_published_manifest_means_what_it_meant(self):
        server = self.metrics(page())
        port = self.serve(self.running(server, APP_PORT="8081", **MANIFEST))
        html = "<!DOCTYPE html>\n<p>tgi_queue_size 3"
        comments = "# HELP tgi_queue_size Waiting.\n# TYPE tgi_queue_size gauge\n"
        short = page("tgi_queue_size 3\n")[:-2]
        for healthy, answer in (
            (False, page("tgi_queue_size 11\n")),
            (True, page("tgi_queue_size 10\n")),
            (False, page("tgi_queue_size 10.5\n")),
            (False, page("tgi_queue_size 1.1e1\n")),
            (False, page("tgi_queue_size +Inf\n")),
            (True, page("tgi_queue_size NaN\n")),
            (False, page('tgi_queue_size{model="a"} 11\n')),
            (True, page("")),
            (False, page("tgi_queue_size 11 1700000000000\n")),
            (True, page("null")),
            (True, page("null", "application/json")),
            (False, page("tgi_queue_size\t11\n")),
            (True, page("tgi_queue_size_by_reason 11\nother 11\n")),
            (True, page(comments)),
            (True, page(comments + "tgi_queue_size -0\n")),
        ):
            with self.subTest(answer):
                server.pieces = (answer,)
                expected = (200, "Healthy\n") if healthy else (503, "Unhealthy\n")
                self.assertEqual(get(port), expected)
        for answer, reason in (
            (page("tgi_queue_size 3\n", status="404 N"), "http_status: HTTP 404 Not F"),
            (page("tgi_queue_size 3\n", status="500 N"), "http_status: HTTP 500 Inter"),
            (page(html, "text/html"), "not_metrics: .*DOCTYPE"),
            (page(html), "not_metrics: .*<!DOCTYPE html>"),
            (page("tgi_queue_size abc\n"), "tgi_queue_size abc"),
            (page("x 1\ntgi_queue_size abc\n"), "bad_line: .*tgi_queue_size abc"),
            (short, "truncated: 2 bytes less"),
            (None, "refused: "),
        ):
            with self.subTest(reason):
                server.pieces = (page(),)
                self.assertEqual(get(port), (200, "Healthy\n"))
                self.log.clear()
                server.pieces = (answer,)
                if answer is None:
                    server.close()
                self.assertEqual(get(port), (503, "Unhealthy\n"))
                self.assertTrue(wait_until(lambda: "Unhealthy: Down" in self.log))
                self.assert_any(f"scrape failed: .*{reason}", self.log)

    def test_concurrent_requests_share_a_scrape(self):
        server = self.metrics(page("q 1\n"))
        port = self.serve(self.running(server))
        server.pieces = 0.2, page("q 1\n")
        self.assertEqual(storm(port, 200), {"200"})
        # What comes after the first is on its way shares the second.
        self.assertLessEqual(len(server.requests), 1 + 2)

    def assert_soon_unhealthy(self, port, count):
        """Ask so many times at once; none may wait for long, whatever hangs."""
        started = time.monotonic()
        self.assertEqual(storm(port, count), {"503"})
        self.assertLess(time.monotonic() - started, 5.0)

    def test_a_slow_target_is_answered_for_in_time_by_the_same_threads(self):
        def threads():
            return sum(t.name != "metrics" for t in threading.enumerate())

        for name, pieces in (
            ("silence", [FOREVER]),
            ("headers", dripping(b"HTTP/1.1 200 OK\r\nA: bcdefghijk\r\n", 0.02)),
            ("body", [page("x 1\n" * 20)[:-80], *dripping(b"x 1\n" * 20, 0.02)]),
        ):
            with self.subTest(name):
                server = self.metrics(*pieces)
                port = self.serve(self.running(server, METRICS_TIMEOUT="0.05"))
                before = threads()
                self.assert_soon_unhealthy(port, 100)
                self.assertTrue(wait_until(lambda most=before: threads() <= most))

    def test_a_resolver_that_hangs_is_answered_for_too_and_seen_to_recover(self):
        server, lookup = self.metrics(page()), socket.getaddrinfo
        free = threading.Event()

        def stuck(host, *arguments):
            if host == "stuck.invalid":
                free.wait(FOREVER)
                host = "127.0.0.1"
            return lookup(host, *arguments)

        url = server.url.replace("127.0.0.1", "stuck.invalid")
        with mock.patch.object(socket, "getaddrinfo", stuck):
            port = self.serve(self.running(url, METRICS_TIMEOUT="0.05"))
            self.addCleanup(free.set)
            before = threading.active_count()
            self.assert_soon_unhealthy(port, 20)
            self.assertLessEqual(threading.active_count(), before)
            self.assertEqual(server.requests, [])
            free.set()
            self.assertTrue(wait_until(lambda: get(port)[0] == 200))

    def test_an_answer_is_plain_text_that_nobody_keeps(self):
        port = self.serve(self.running(self.metrics(page())))
        for method, body in (("GET", "Healthy\n"), ("HEAD", "")):
            answer = receive(send(port, request_for("/health", method)))
            head, _, received = answer.partition("\r\n\r\n")
            self.assertEqual(received, body)
            lines = head.split("\r\n")
            self.assertEqual(lines[0], "HTTP/1.1 200 OK")
            for line in (
                "Content-Type: text/plain; charset=utf-8",
                "Content-Length: 8",
                "Cache-Control: no-store",
                "X-Content-Type-Options: nosniff",
                "Connection: close",
            ):
                self.assertIn(line, lines)
            self.assertNotIn("Python", head)

    def test_a_request_is_answered_or_refused_with_its_status(self):
        port = self.serve(self.running(self.metrics(page())))
        body = "Content-Length: 5\r\n\r\nhello"
        chunked = "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        for request, status in (
            ("GET /health HTTP/1.0\r\n\r\n", 200),
            ("GET /health HTTP/1.0\n\n", 200),
            ("GET /health?a=b;c#d HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 200),
            ("GET HTTP://a.example:80/health HTTP/1.1\r\nHost: b\r\n\r\n", 200),
            ("\r\nGET /health HTTP/1.1\r\n\r\n", 200),
            ("GET /health HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", 200),
            (request_for("/health") * 3, 200),
            (request_for("/livez"), 200),
            ("GET http://a.example/?/health HTTP/1.1\r\n\r\n", 200),
            (request_for("///health"), 200),
            (request_for("//health//Down"), 200),
            (request_for("/./health"), 200),
            (request_for("/../a/../health"), 200),
            (request_for("/%68e%61lth"), 200),
            (request_for("/livez/%2E%2e//health?%2e"), 200),
            (request_for("/healthy"), 404),
            (request_for("/health/"), 404),
            (request_for("/health//"), 404),
            (request_for("/health/."), 404),
            (request_for("/health/,"), 404),
            (request_for("/health/Down/"), 404),
            (request_for("/health%2FDown"), 404),
            (request_for("/%2568ealth"), 404),
            (request_for("/health/Nothing"), 200),
            (request_for("/health/down,Down"), 200),
            (request_for("health"), 404),
            (request_for("*"), 404),
            (request_for("/health", "POST"), 405),
            (request_for("/health", "DELETE"), 405),
            (request_for("/health", "BREW"), 405),
            ("GET /health HTTP/1.1\r\n" + body, 200),
            ("GET /health HTTP/1.1\r\nContent-Length: 5\r\n" + body, 200),
            ("GET /health HTTP/1.1\r\n" + chunked, 200),
            ("POST /health HTTP/1.1\r\n" + body, 405),
            ("GET /health HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
            ("GET /health HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
            ("GET /health HTTP/1.1\r\nContent-Length: +5\r\n\r\n", 400),
            ("GET /health HTTP/1.1\r\nContent-Length: 0\r\n" + body, 400),
            ("GET /health HTTP/1.1\r\nContent-Length: 0, 5\r\n\r\n", 400),
            ("GET /health HTTP/1.1\r\nContent-Length : 5\r\n\r\nhello", 400),
            ("GET /health HTTP/1.1\r\nnothing\r\n" + body, 400),
            ("GET /health\r\n\r\n", 400),
            ("GET /health HTTP/1.1 x\r\n\r\n", 400),
            ("GET /health HTTP/x\r\n\r\n", 400),
            ("GET /health HTTP/0.9\r\n\r\n", 400),
            ("PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\nGET / HTTP/1.1\r\n\r\n", 400),
            ("\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET / HTTP/1.1\r\n\r\n", 400),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
            ("\x16\x03\x01\x02\x00\x01", 400),
            ("\r\n\r\n", 400),
            ("  \r\n\r\n", 400),
            ("GET /health HTTP/2.0\r\n\r\n", 505),
            ("GET /health HTTP/1.1\r\n" + "A: b\r\n" * 200 + "\r\n", 431),
            ("GET /health HTTP/1.1\r\nA: " + "b" * 20000 + "\r\n\r\n", 431),
            ("GET /" + "b" * 20000 + " HTTP/1.1\r\n\r\n", 431),
        ):
            with self.subTest(request[:60]):
                answer = receive(send(port, request))
                self.assertTrue(answer.startswith(f"HTTP/1.1 {status} "), answer)
                self.assertEqual(answer.count("HTTP/1.1"), 1)
                self.assertEqual("\r\nAllow: GET, HEAD\r\n" in answer, status == 405)
                if "text/html" not in answer:
                    self.assertNotIn("<", answer)

    def conversation(self, request, **routes):
        """Return what a server does for a caller, step by step, and the caller."""
        server = Server(listen("127.0.0.1", 0), self.monitor(self.metrics(page())))
        server._routes.update(routes)
        there, here = socket.socketpair()
        here.setblocking(False)
        there.sendall(request.encode())
        for clean_up in (there.close, here.close, server.close, server.run):
            self.addCleanup(clean_up)
        self.addCleanup(server.stop)
        return server._converse(here, "a caller"), there, here

    def test_who_is_refused_and_sends_on_does_not_keep_the_loop(self):
        steps, there, here = self.conversation("POST /health HTTP/1.1\r\n\r\n")
        for _ in range(3):
            self.assertIs(next(steps), health_check.LINGER)
            there.sendall(b"b" * 65536)
        self.assertTrue(here.recv(1), "all was read in one go")

    def test_nothing_is_kept_of_an_answer_while_its_caller_lingers(self):
        def long(*_):
            return health_check.Answer(200, iter(["x" * 1000000]))

        steps, there, _ = self.conversation(request_for("/"), **{"/": long})
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for phase in steps:
            if phase is health_check.LINGER:
                break
            if phase is health_check.WRITE:
                there.recv(1 << 20)
        self.assertLess(tracemalloc.get_traced_memory()[0], 100000)

    def test_what_comes_after_a_request_loses_no_answer(self):
        port = self.serve(self.running(self.metrics(page())))
        length = "Content-Length: 200000\r\n"
        request = request_for("/livez")
        for head, late in (
            (request, "\r\n"), (request, request * 3), (request, "a" * 100000),
            (request.replace("\r\n\r\n", f"\r\n{length}\r\n"), "a" * 200000),
            (request_for("/livez", "POST"), "a" * 100000), ("GET x\r\n\r\n", request),
        ):  # fmt: skip
            for _ in range(5):
                with self.subTest(head), send(port, head) as sock:
                    select.select([sock], [], [], 5)
                    # The answer is there, and nobody has read it.
                    sock.sendall(late.encode())
                    time.sleep(0.001)
                    answer = receive(sock)
                    self.assertRegex(answer, r"(?s)\AHTTP/1.1 .*\r\n\r\n.*\n\Z")

    def test_who_speaks_something_else_is_told_of_once_in_an_hour(self):
        port = self.serve(self.running(self.metrics(page())))
        v2 = "\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c12345678\0\1\0\2GET / HTTP/1.1\r\n\r\n"
        for request, told in (
            ("\x16\x03\x01\x02\0\1", "TLS.*scheme: HTTP.*check-ssl"),
            ("PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\nGET / HTTP/1.1\r\n\r\n", "PROXY.*send"),
            (v2, ""), ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2 .*proto h2"),
            ("OPTIONS / HTTP/1.0\r\n\r\n", "method.*option httpchk GET /health"),
            ("GET /a HTTP/1.1 x\r\n\r\n", ""), ("GET /nothing HTTP/1.1\r\n\r\n", ""),
            ("\r\nGET / HTTP/1.1\r\n\r\n", ""), ("PROXYING / HTTP/1.1\r\n\r\n", ""),
        ):  # fmt: skip
            with self.subTest(request):
                self.log.clear()
                for _ in range(3):
                    receive(send(port, request))
                lines = [line for line in self.log if "the caller 127.0.0.1" in line]
                self.assertEqual(len(lines), bool(told))
                self.assertTrue(re.search(told, "".join(lines)))
        self.log.clear()
        with mock.patch.object(health_check, "HOUR", 0.0):
            receive(send(port, "PROXY \r\n\r\n"))
            receive(send(port, v2))
        self.assertEqual(sum("a PROXY header" in line for line in self.log), 2)

    def test_long_labels_make_no_long_answer(self):
        many = "".join(f'q{{n="{n:03}{chr(1) * 25000}"}} 1\n' for n in range(60))
        rules = "A: q > 0; B: q > 0"
        port = self.serve(self.running(self.metrics(page(many)), UNHEALTHY_WHEN=rules))
        for path in "/health?verbose", "/health?format=json", "/":
            body = get(port, path)[1]
            self.assertRegex(body, r"firing|, limit 0, for \d+s")
            self.assertLess(len(body), 30000)
        self.assertLess(max(map(len, self.log)), 3000)

    def answers(self, verdict):
        """Return all that is said of a verdict, by the name of the answer."""
        return {
            "verbose": health_check.answer_health(verdict, "verbose"),
            "rules": health_check.answer_rules(
                [status.rule.name for status in verdict.rules], verdict, "verbose"
            ),
            "json": health_check.answer_health(verdict, "format=json"),
            "page": answer_page(verdict, site_of()),
            "metrics": answer_metrics(verdict_metrics(verdict)),
        }

    def judged(self, rule, **known):
        """Return the status of a rule that has found a series, and does not fire."""
        selectors = tuple(health_check.find_selectors(rule.expr))
        part = Part(frozenset(), None, selectors, rule.expr)
        return RuleStatus(rule, **{"matched": 1, "part": part, **known})

    def test_while_no_scrape_succeeds_what_scrapes_tell_is_unknown(self):
        rules = parse_rules(
            "Q: q > 1; Kept: rate(q[1m]) > 1; Half: q > 1 and on () up; Slow: q > 1;"
            " Up: up == 0; Error: scrape_error; Two: sum(up) < 2;"
            ' Probe: probe_success{probe="health"} == 0'
        )
        q, kept, half, slow, up, error, two, probe = (
            self.judged(rule, value=1.0, limit=0.0) for rule in rules
        )
        alert = Alert((("__name__", "q"),), 2.0, NOW)
        slow, error = slow._replace(alerts=(alert,)), error._replace(matched=0)
        two = two._replace(value=2.0, limit=3.0)
        fine = TargetStatus("a:1"), TargetStatus("b:1")
        bad = [target._replace(reason="timeout") for target in fine]
        missed = ProbeStatus("health", "a:1", None, reason="timeout")
        for status, targets, state, words in (
            *((s, bad, "unknown", "unknown: a scrape fails") for s in (q, kept, half)),
            (q, fine, "inactive", "ok: 1 (limit 0)"),
            (q, (fine[0], bad[1]), "inactive", "ok: 1 (limit 0)"),
            (q._replace(matched=0), (fine[0], bad[1]), "unknown", "unknown: a scrape"),
            (q._replace(part=None), bad, "unknown", "unknown: a scrape fails"),
            (q._replace(error="odd"), bad, "error", "error: odd"),
            (slow, bad, "pending", "pending for 0s: q 2"),
            (up, bad, "inactive", "ok so far"), (up, fine, "inactive", "ok"),
            (error, bad, "inactive", "ok so far"), (error, fine, "inactive", "ok"),
            (two, bad, "inactive", "ok: 2 (limit 3)"),
            (probe, bad, "inactive", "ok so far"),
            (probe, (fine[0], bad[1]), "inactive", "ok\n"),
            (probe._replace(matched=0), bad, "inactive", "ok (no series)"),
        ):  # fmt: skip
            with self.subTest(status.rule.name, targets=targets, state=state):
                probes = (missed,) if targets is bad else ()
                found = Verdict(1, "", NOW, WALL, (status,), tuple(targets), probes)
                name = status.rule.name
                answers = self.answers(found).items()
                said = {kind: "".join(answer.body) for kind, answer in answers}
                sign = {"unknown": r"\?", "error": "-"}.get(state, r"\+")
                line = rf"(?m)^\[{sign}\]{name} {re.escape(words)}"
                self.assertRegex(said["verbose"], line)
                sign = r"\?" if state == "error" else sign
                self.assertRegex(said["rules"], rf"(?m)^\[{sign}\]{name} ")
                self.assertIn(f'"state": "{state}"', said["json"])
                lit = f'rule_state{{rule="{name}", state="{state}"}} 1'
                self.assertIn(lit, said["metrics"])
                self.assertEqual("not known while" in said["page"], state == "unknown")

    def firing(self, rules, alerts):
        """Return a verdict in which rules fire, each for some series."""
        found = tuple(
            Alert((("__name__", "q"), ("n", str(number))), 1.0, NOW, NOW)
            for number in range(alerts)
        )
        text = ";".join(f"Q{number}: q > 0" for number in range(rules))
        statuses = (RuleStatus(rule, found, "", alerts) for rule in parse_rules(text))
        return Verdict(1, "", NOW, WALL, tuple(statuses))

    def test_what_is_said_of_a_rule_costs_time_linear_in_its_alerts(self):
        before = Verdict(0, "never scraped", NOW, WALL)
        for name in (*self.answers(before), "log"):
            with self.subTest(name):
                verdict = self.firing(3, 500)
                if name == "log":
                    said = steps(list, health_check.transitions(before, verdict))
                else:
                    said = steps("".join, self.answers(verdict)[name].body)
                self.assertLess(said, 8000)

    def test_a_long_answer_is_cut_and_says_so(self):
        verdict = self.firing(30, 3)
        for name, said, last in (
            ("verbose", "warn: the rest is left out\nUnhealthy: Q0, ", "10 more\n"),
            ("rules", "warn: the rest is left out\nUnhealthy: Q0, ", "10 more\n"),
            ("json", '"notes": ["checks left out: ', "}\n"),
            ("page", "<p>The rest is left out.</p></main>", "</html>\n"),
            ("metrics", "\n# the other samples are left out", "out\n"),
        ):
            with self.subTest(name):
                whole = "".join(self.answers(verdict)[name].body)
                self.assertNotIn("left out", whole)
                with mock.patch.object(health_check, "MAX_ANSWER", 1000):
                    cut = "".join(self.answers(verdict)[name].body)
                self.assertIn(said, cut)
                self.assertTrue(cut.endswith(last), cut)
                self.assertLess(len(cut), len(whole))
                if name == "json":
                    document, whole = json.loads(cut), json.loads(whole)
                    left_out = len(whole["checks"]) - len(document["checks"])
                    notes = [f"checks left out: {left_out}"]
                    self.assertEqual(document["notes"], notes)

    def test_a_long_answer_is_built_in_slices_one_in_a_turn(self):
        with mock.patch.object(health_check, "SLICE", -1.0):
            build = health_check._build(iter("abc"))
            self.assertEqual([next(build) for _ in "abc"], [health_check.BUILD] * 3)
            self.assertEqual(list(build), [health_check.BUILD])
            port = self.serve(self.running(self.metrics(page())))
            socks = [send(port, request_for("/metrics")) for _ in range(5)]
            self.assertEqual(get(port, "/livez")[0], 200)
            for sock in socks:
                self.assertTrue(receive(sock).endswith("\n"))

    def test_a_target_of_number_signs_is_looked_at_once(self):
        head = b"GET " + b"#" * 16000 + b" HTTP/1.1\r\n\r\n"
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        request = health_check.parse_request(head)
        self.assertEqual((request.path, request.refusal), ("/", None))
        self.assertLess(tracemalloc.get_traced_memory()[1], 200000)

    def test_a_head_is_read_by_http_server_and_an_equal_one_is_read_once(self):
        parse = health_check.parse_request
        request = parse(request_for("/health?verbose").encode())
        self.assertIsInstance(request, http.server.BaseHTTPRequestHandler)
        self.assertEqual((request.path, request.query), ("/health", "verbose"))
        self.assertIs(parse(request_for("/health?verbose").encode()), request)
        self.assertIsNot(parse(request_for("/health").encode()), request)
        for status, body in (200, "Healthy\n"), (503, "Unhealthy\n"):
            answer = health_check.Answer(status, body)
            head, _, sent = request.respond(answer).decode().partition("\r\n\r\n")
            self.assertTrue(head.startswith(f"HTTP/1.1 {status} "))
            self.assertEqual(sent, body)
        heads = [b"GET /%d HTTP/1.1\r\n\r\n" % number for number in range(1000)]
        self.assertEqual([parse(head).path for head in heads][999], "/999")
        self.assertLess(parse.cache_info().currsize, 100)

    def test_verbose_names_each_rule_and_each_failed_scrape(self):
        good, down = self.metrics(page("q 11\nr 3\n")), f"127.0.0.1:{free_port()}"
        rules = "Q: q > 10; R: r < 2; S: s > 1; P: q > 10 for 1h"
        targets = good, f"http://{down}/"
        port = self.serve(self.running(*targets, UNHEALTHY_WHEN=rules))
        for path in ("/health?verbose", "/health?a=b&verbose=1"):
            status, body = get(port, path)
            self.assertEqual(status, 503)
            for line, start in itertools.zip_longest(
                body.splitlines(),
                (
                    f"[-]scrape of {down} failed for 0s: refused: ",
                    f'[-]Q firing for 0s: q{{instance="{good.instance}"}} 11',
                    "[+]R ok: 3 (limit 2)",
                    "[?]S unknown: a scrape fails",
                    f'[+]P pending for 0s: q{{instance="{good.instance}"}} 11',
                    "[?]Stalling unknown", "[?]Stalled un", "[?]Unanswered un",
                    "[?]Failing unknown: a sc", "[?]NoModel unknown: a",
                    f'[-]Down firing for 0s: scrape_error{{instance="{down}", reason="',
                    "Unhealthy: Q, Down",
                ),
            ):
                self.assertTrue(line.startswith(start), line)

    def test_every_reason_is_told_in_json(self):
        good, down = self.metrics(page("q NaN\nr 3\n")), f"127.0.0.1:{free_port()}"
        rules = "Q: q != 10; R: r < 2; P: r > 2 for 1h; Down: up > 1"
        port = self.serve(self.running(good, f"http://{down}/", UNHEALTHY_WHEN=rules))
        status, body = get(port, "/health?format=json")
        document = json.loads(body)
        self.assertEqual((status, document["status"]), (503, "fail"))
        self.assertEqual(document["output"], "Q")
        checks = document["checks"]
        statuses = {name: checks[name][0]["status"] for name in "QRP"}
        self.assertEqual(statuses, {"Q": "fail", "R": "pass", "P": "warn"})
        self.assertEqual(checks["Q"][0]["series"][0]["value"], "NaN")
        self.assertEqual(checks["R"][0]["observedValue"], 3)
        self.assertEqual(checks["P"][0]["expression"], "r > 2 for 1h")
        targets = [target["status"] for target in checks["scrape:targets"]]
        self.assertEqual(targets, ["pass", "fail"])
        status, body = get(port, "/health?format=json&exclude=Q")
        self.assertEqual((status, json.loads(body)["status"]), (200, "warn"))

    def test_rules_that_are_asked_for_are_told_in_json_too(self):
        rules = parse_rules("Q: q > 10; P: q > 1 for 1h; E: e; U: u")
        q, p, e, u = map(self.judged, rules)
        alert = Alert((("__name__", "q"),), 24.0, NOW - 50, NOW - 42)
        pending = alert._replace(fired=None)
        found = (
            q._replace(alerts=(alert,)), p._replace(alerts=(pending,)),
            e._replace(error="odd"), u,
        )  # fmt: skip
        verdict = Verdict(1, "", NOW, WALL, found)
        for names, code, status, output, states in (
            ("Q", 503, "fail", "Q", ["firing"]), ("U", 200, "pass", None, ["inactive"]),
            ("P,U", 200, "warn", None, ["pending", "inactive"]),
            ("Gone,U", 200, "warn", "no rule Gone", ["unknown", "inactive"]),
            ("E", 200, "warn", "odd", ["error"]),
            ("E,Q,Gone", 503, "fail", "Q", ["error", "firing", "unknown"]),
        ):  # fmt: skip
            with self.subTest(names):
                answer = health_check.answer_rules(
                    names.split(","), verdict, "format=json"
                )
                self.assertEqual(answer.status, code)
                self.assertEqual(answer.content_type, "application/health+json")
                told = json.loads("".join(answer.body))
                self.assertEqual((told["status"], told.get("output")), (status, output))
                self.assertEqual([*told["checks"]], names.split(","))
                seen = [check["state"] for (check,) in told["checks"].values()]
                self.assertEqual(seen, states)

    def test_of_many_series_the_json_lists_some_and_the_count(self):
        text = "".join(f'q{{n="{number}"}} 1\n' for number in range(300))
        port = self.serve(
            self.running(self.metrics(page(text)), UNHEALTHY_WHEN="Q: q > 0")
        )
        body = get(port, "/health?format=json")[1]
        (rule,) = json.loads(body)["checks"]["Q"]
        self.assertEqual((len(rule["series"]), rule["alerts"]), (20, 300))
        self.assertLess(len(body), 10000)

    def test_a_rule_can_be_excluded(self):
        server = self.metrics(page("q 11\n"))
        port = self.serve(self.running(server, UNHEALTHY_WHEN="Q: q > 1"))
        self.assertEqual(get(port, "/health?exclude=Q"), (200, "Healthy\n"))
        self.assertEqual(get(port, "/health?exclude=R")[0], 503)
        status, body = get(port, "/health?verbose&exclude=Q&exclude=%1b")
        self.assertEqual(status, 200)
        self.assertRegex(body, r"\A\[\+\]Q excluded: firing for \d+s: q\{")
        self.assertIn('\nwarn: no rule "\\u001b" to exclude\nHealthy\n', body)

    def test_its_own_metrics_are_an_exposition(self):
        server = self.metrics(page('q{a="\\"><script>"} 11\n'))
        port = self.serve(self.running(server, UNHEALTHY_WHEN="Q: q > 10"))
        for path in ("/health", "/health/Q", "/nope", "/nope2", "/livez", "/"):
            get(port, path)
        status, body = get(port, "/metrics")
        self.assertEqual(status, 200)
        self.assertEqual(body.count("# TYPE "), body.count("# HELP "))
        of = f'target="{server.instance}"'
        for line in (
            "health_check_healthy 0",
            'health_check_rule_state{rule="Q", state="firing"} 1',
            'health_check_rule_series{rule="Q"} 1',
            'health_check_rule_value{rule="Q"} 11',
            'health_check_rule_limit{rule="Q"} 10',
            f"health_check_target_up{{{of}}} 1",
            f'health_check_scrapes_total{{{of}, outcome="success"}} 3',
            'health_check_scrape_duration_seconds_bucket{le="+Inf"} 3',
            "health_check_scrape_duration_seconds_count 3",
            'health_check_requests_total{path="/health", code="503"} 1',
            'health_check_requests_total{path="other", code="404"} 2',
        ):
            self.assertIn(f"\n{line}\n", body)
        if shutil.which("promtool"):
            checked = subprocess.run(
                ["promtool", "check", "metrics"],
                input=body.encode(),
                capture_output=True,
                check=False,
            )
            self.assertEqual((checked.returncode, checked.stderr), (0, b""))

    def test_the_page_shows_all_and_lets_nothing_through(self):
        text = 'q{a="\\"><script>alert(1)</script>",b="</svg>"} %d\nr 1\n'
        server = self.metrics(lambda _: [page(text % len(server.requests))])
        rules = "Q: q > 1; R: r > 0; P: r > 0 for 1h; N: r / 0 > 1"
        port = self.serve(self.running(server, UNHEALTHY_WHEN=rules))
        for _ in range(2):
            get(port)
        answer = receive(send(port, request_for("/")))
        policy = "-Security-Policy: default-src 'none'; style-src 'sha256-"
        self.assertIn(policy, answer)
        self.assertIn("&lt;script&gt;", answer)
        self.assertIn("&lt;/svg&gt;", answer)
        self.assertNotIn("<script", answer)
        self.assertEqual(answer.count("</svg>"), answer.count("<svg"))
        for part in (
            f": Q, R, N</h1>\n<p>{server.url}<br>checked 0s ago, <time>20",
            '<path class="limit" d="M0 26.0h240"/>',
            '<path d="M234 26.0h2L236 14.0h2L238 2.0h2"/>',
            "<code>r &gt; 0 for 1h</code>",
            f"<h2>scrape of {server.instance}</h2><p>2 series, 53 bytes in ",
        ):
            self.assertIn(part, answer)
        self.assertEqual(len(server.requests), 3)
        server.close()
        get(port)
        shown = get(port, "/")[1]
        self.assertIn(f"<p>nobody listens at {server.url}, for 0s</p>", shown)
        # A check without a value is a gap, not a nought.
        self.assertIn('<path d="M232 26.0h2L234 14.0h2L236 2.0h2"/>', shown)

    def test_the_page_has_the_status_of_a_verdict_that_is_not_old(self):
        for age, interval, fault, status, state, words in (
            (0, 0, "", 200, "pass", "Healthy"), (59, 0, "", 200, "pass", "Healthy"),
            (62, 0, "", 503, "old", "Last verdict, 1m2s ago: Healthy"),
            (62, 30, "", 200, "pass", "Healthy"),
            (92, 30, "", 503, "old", "Last verdict, 1m32s ago: Healthy"),
            (0, 0, "never scraped", 503, "fail", "Unhealthy: never scraped"),
            (62, 0, "a bug", 503, "old", "Last verdict, 1m2s ago: Unhealthy: a bug"),
        ):  # fmt: skip
            with self.subTest(age, interval=interval, fault=fault):
                site = site_of(SCRAPE_INTERVAL=str(interval))
                seen = Verdict(1, fault, time.monotonic() - age, WALL)
                answer = answer_page(seen, site)
                self.assertEqual(answer.status, status)
                body = "".join(answer.body)
                self.assertIn(f'<header class="{state}"><h1>{words}</h1>', body)

    def page_of(self, verdict, **known):
        return "".join(answer_page(verdict, site_of(**known)).body)

    def test_before_the_first_check_nothing_is_said_of_the_server(self):
        monitor = self.monitor(self.metrics(page()))
        body = self.page_of(monitor.verdict)
        self.assertIn('<header class="old"><h1>Not checked yet<', body)
        self.assertNotIn("Unhealthy", body)
        self.assertNotRegex(answer_verdict(monitor.verdict), "(?m)^[^#]")
        answer = health_check.answer_health(monitor.verdict, "verbose")
        self.assertEqual(answer.status, 503)
        self.assertIn("Unhealthy: not checked yet", "".join(answer.body))

    def test_a_line_is_drawn_of_what_can_be_drawn(self):
        rule = RuleStatus(parse_rules("Q: q > 1")[0])
        top, none = "M236 38.0h2L238 2.0h2", "<h2>Q</h2>"
        for values, limit, line in (
            ([0, 9], 4.5, "M0 20.0h240"), ([0, 9], 4.5, f'"{top}"'),
            ([-9, 0], 0.0, f'"{top}"'), ([0, 9], math.inf, f'"{top}"'),
            ([0, 9], math.nan, f'"{top}"'), ([0, 0], 0.0, "M236 38.0h2L238 38.0h2"),
            ([0, math.nan, 9], 1.0, '"M234 38.0h2M238 2.0h2"'),
            ([1e308, -1e308], 1e308, '<path d="'), ([math.nan] * 2, 5.0, none),
            ([math.inf] * 2, 1.0, none), ([1], 5.0, none), ([], 5.0, none),
            ([1, 12345.678], 0.5, "highest 12346, limit 0.5, last 1m30s</"),
            ([1, 3.14159], math.inf, "highest 3.142, limit +Inf, last"),
        ):  # fmt: skip
            with self.subTest((values, limit)):
                verdict = Verdict(1, "", NOW, WALL, (rule._replace(limit=limit),))
                times = NOW - 90, NOW, NOW
                trends = {"Q": [(*each, "inactive") for each in zip(times, values)]}
                body = self.page_of(verdict, trends=trends)
                self.assertIn(line, body)
                self.assertEqual("<svg" in body, line != none)
                self.assertNotRegex(body, r"\b(nan|inf)\b")

    def test_a_rule_without_a_value_has_a_strip_of_its_states(self):
        verdict = Verdict(1, "", NOW, WALL, (RuleStatus(parse_rules("Q: q")[0]),))
        for states, parts in (
            (["inactive"] * 3, ['class="pass" d="M234 0h6v', "did not fire, last 5s"]),
            (
                ["unknown", "pending", "firing", "error"],
                ['"unknown" d="M232 0h2v40h-2z"', '"warn" d="M234 0h2v40h-2z"',
                 '"fail" d="M236 0h2v', '"fail" d="M238 0h2v',
                 "fired in 2 of 4 checks, unknown in 1, last 5s"],
            ),
        ):  # fmt: skip
            times = NOW - 5, NOW, NOW, NOW
            trends = {"Q": [(at, 0.0, state) for at, state in zip(times, states)]}
            body = self.page_of(verdict, trends=trends)
            for part in parts:
                self.assertIn(part, body)

    def test_the_page_says_what_fails_first_and_in_words(self):
        rules = parse_rules(
            "Q: q > 10 for 1m; Down: scrape_error; S: s; E: e; P: p > 1 for 1m; F: f"
        )
        q, down, s, e, p, f = map(self.judged, rules)
        slow = TargetStatus("a:1", "timeout", "no answer within 800ms", since=NOW - 42)
        good = TargetStatus("a:1", seconds=0.0042, size=7, series=2)
        alert = Alert((("__name__", "q"),), 24.0, NOW - 50, NOW - 42)
        pending = alert._replace(fired=None)
        q = q._replace(value=24.0, limit=10.0)
        for status, target, state, words in (
            (q._replace(alerts=(alert,)), good, "fail", "24, limit 10, for 42s"),
            (q._replace(alerts=(alert,) * 3), good, "fail", "<code>q 24 and 2 more<"),
            (f._replace(alerts=(alert,)), good, "fail", "fires, for 42s"),
            (p._replace(alerts=(pending,)), good, "warn",
             "would fire, for 50s: fires after 1m"),
            (q, good, "pass", "24, limit 10"), (s, good, "pass", "ok"),
            (s._replace(matched=0), good, "unknown", "no series of it is there"),
            (s._replace(matched=0), slow, "unknown", "not known while a scrape fails"),
            (down._replace(matched=0), good, "pass", "answers in 4.2 ms"),
            (down._replace(value=1.0, limit=0.0), good, "pass", "answers in 4.2 ms"),
            (e._replace(error="<many>"), good, "fail", "cannot be evaluated: &lt;many"),
        ):  # fmt: skip
            with self.subTest(words):
                verdict = Verdict(1, "", NOW, WALL, (status,), (target,))
                body = self.page_of(verdict)
                self.assertIn(f'<section class="{state}"><h2>{status.rule.name}<', body)
                self.assertIn(words, body)
        for target, words in (
            (slow, "no answer from http://a:1/metrics within 800ms, for 42s"),
            (good, "2 series, 7 bytes in 4.2 ms"),
            (slow._replace(reason="refused"), "nobody listens at http://a:1/metrics, "),
            (slow._replace(reason="http_status", message="HTTP 404 Not Found"),
             "http://a:1/metrics answers: HTTP 404 Not Found, for 42s"),
            (slow._replace(reason="tls", message="odd"), "http://a:1/metrics: odd, f"),
            (good._replace(seconds=1.25), "2 series, 7 bytes in 1.2 s"),
        ):  # fmt: skip
            with self.subTest(words):
                firing = f._replace(alerts=(alert,))
                verdict = Verdict(1, "", NOW, WALL, (s, q, firing), (target,))
                body = self.page_of(verdict)
                self.assertIn(f"<p>{words}", body)
                order = re.findall("<h2>(.*?)</h2>", body)
                scrape = ["scrape of a:1"]
                first = scrape if target.reason else []
                last = [] if target.reason else scrape
                self.assertEqual(order, [*first, "F", "S", "Q", *last])

    def test_the_page_names_its_pod_and_its_server_and_can_stand_still(self):
        verdict = Verdict(1, "", time.monotonic(), WALL)
        urls = "http://a:1/metrics,http://b:2/metrics"
        site = site_of(POD_NAME="<pod>", METRICS_ENDPOINT=urls)
        body = "".join(answer_page(verdict, site).body)
        for part in (
            "<title>Healthy: &lt;pod&gt; a:1 b:2</title>",
            "<p>&lt;pod&gt;, http://a:1/metrics, http://b:2/metrics<br>checked ",
            'href="health?verbose"', 'href="metrics"', 'http-equiv="refresh"',
        ):  # fmt: skip
            self.assertIn(part, body)
        still = "".join(answer_page(verdict, site, "still").body)
        self.assertNotIn('http-equiv="refresh"', still)

    def test_a_word_breaks_only_where_it_may_fill_a_line(self):
        long = "vllm:request_prefill_time_seconds_bucket"
        for word, shown in (
            ("vllm:num_requests_waiting", "vllm:num_requests_waiting"),
            ("http://127.0.0.1:39423/metrics", "http://127.0.0.1:39423/metrics"),
            (long, re.sub("[:_]", r"\g<0><wbr>", long)),
            (f"f({long}{{a='10.0'}}[2m10s])", None), ("q" * 50, "q" * 50),
        ):  # fmt: skip
            target = TargetStatus("a:1", "tls", f"{word} > 1")
            body = self.page_of(Verdict(1, "", NOW, WALL, (), (target,)))
            if shown:
                self.assertIn(f"http://a:1/metrics: {shown} &gt; 1", body)
            self.assertIn(word, html.unescape(body.replace("<wbr>", "")))
            self.assertNotRegex(body, "<wbr>[0-9<]")

    def test_a_long_rule_is_folded_between_its_words(self):
        for text, folded in (
            ("q > 1", False), (" + ".join(["queue_of_requests"] * 5) + " > 1", True),
            ("q" * 200 + " > 1", True),
        ):  # fmt: skip
            with self.subTest(text):
                (rule,) = parse_rules(f"Q: {text}")
                body = self.page_of(Verdict(1, "", NOW, WALL, (RuleStatus(rule),)))
                self.assertIn(f"<code>{text.replace('>', '&gt;')}</code>", body)
                first = re.search("<details><summary><code>(.*) \\.\\.\\.<", body)
                self.assertEqual(bool(first), folded)
                if first:
                    self.assertLess(len(first[1]), 71)
                    self.assertTrue(text.startswith(first[1]))

    def test_a_rule_of_its_own_fails_open(self):
        server = self.metrics(page("q 11\nr 1\n"))
        rules = "Q: q > 10; R: r + on() q > 1"
        port = self.serve(self.running(server, UNHEALTHY_WHEN=rules))
        fine, bad = (200, "Healthy\n"), (503, "Unhealthy\n")
        fails = (200, "Healthy (unknown: a scrape fails)\n")
        for answer, q, r, down, whole in (
            (page("q 11\nr 1\n"), bad, bad, fine, bad),
            (page("q 0\nr 1\n"), fine, fine, fine, fine),
            (page('q{a="1"} 1\nq{a="2"} 1\nr 1\n'), fine, None, fine, bad),
            (page("q x\n"), fails, fails, bad, bad),
        ):
            with self.subTest(answer):
                server.pieces = (answer,)
                self.assertEqual(get(port), whole)
                self.assertEqual(get(port, "/health/Q"), q)
                self.assertEqual(get(port, "/health/Down"), down)
                status, body = get(port, "/health/R")
                if r:
                    self.assertEqual((status, body), r)
                else:
                    self.assertEqual(status, 200)
                    self.assertRegex(body, r"^Healthy \(unknown: many-to-.*\)\n")

    def test_several_rules_are_asked_for_at_once_and_verbose_says_why(self):
        server = self.metrics(page('q 11\nr 1\ns{a="1"} 1\ns{a="2"} 1\n'))
        rules = "Q: q > 10; R: r > 1; E: q / on() s > 1; P: q > 1 for 1h"
        port = self.serve(self.running(server, UNHEALTHY_WHEN=rules))
        for path, status, lines in (
            ("Q", 503, "Unhealthy"), ("Q,R", 503, "Unhealthy"),
            ("R,Q", 503, "Unhealthy"),
            ("R,P", 200, "Healthy"), ("R,R,,P,", 200, "Healthy"),
            ("R%2CQ", 503, "Unhealthy"),
            ("Gone", 200, r"Healthy \(unknown: no rule Gone\)"),
            ("Gone,A,Gone", 200, r"Healthy \(unknown: no rule Gone, no rule A\)"),
            ("Gone,Q", 503, "Unhealthy"),
            ("E", 200, r"Healthy \(unknown: many-to-.*\)"),
            ("E,Q", 503, "Unhealthy"), ("E,R", 200, r"Healthy \(unknown: many-to-.*\)"),
            ("R?verbose", 200, r"\[\+\]R ok: 1 \(limit 1\)\nHealthy"),
            ("Q?verbose", 503,
             r"\[-\]Q firing for \ds: q\{.*\} 11\nUnhealthy: Q"),
            ("P,Q,Gone,E?a=b&verbose=1", 503,
             (r"\[\+\]P pending for \ds: q.*\n\[-\]Q firing for \ds: .*\n"
              r"\[\?\]Gone unknown: no rule Gone\n\[\?\]E unknown: many-.*\n"
              "Unhealthy: Q")),
        ):  # fmt: skip
            with self.subTest(path):
                seen, body = get(port, f"/health/{path}")
                self.assertEqual(seen, status)
                self.assertRegex(body, rf"\A{lines}\n\Z")

    def test_a_rule_that_is_gone_is_healthy_and_told_once(self):
        port = self.serve(self.running(self.metrics(page())))
        gone = "Healthy (unknown: no rule Gone)\n"
        for _ in range(3):
            self.assertEqual(get(port, "/health/Gone"), (200, gone))
        told = [line for line in self.log if "no rule of that name" in line]
        why = "/health/Gone is answered 200: there is no rule of that name"
        self.assertEqual(told, [why])
        for number in range(30):
            self.assertEqual(get(port, f"/health/{number}{'x' * 2000}")[0], 200)
        told = [line for line in self.log if "no rule of that name" in line]
        self.assertEqual(len(told), 17)
        self.assertLess(max(map(len, told)), 1200)
        body = get(port, "/metrics")[1]
        self.assertIn("\nhealth_check_unknown_rule_requests_total 33\n", body)
        self.assertIn('_requests_total{path="other", code="200"} 33\n', body)
        self.assertEqual(get(port, "/health/Down,Stalled")[0], 200)
        several = '_requests_total{path="/health/...", code="200"} 1\n'
        self.assertIn(several, get(port, "/metrics")[1])

    def drained(self, *pieces, pause=0.02, **environ):
        """Return the port of a checker that looks often, and its server."""
        server = self.metrics(*pieces)
        patch = mock.patch.object(health_check, "DRAIN_PAUSE", pause)
        patch.start()
        self.addCleanup(patch.stop)
        environ = {"DRAIN_TIMEOUT": "0.1", **environ}
        return self.serve(self.running(server, **environ)), server

    def test_a_drain_ends_when_nothing_runs_in_two_good_checks(self):
        def busy(running, waiting=0):
            names = "vllm:num_requests_running", "vllm:num_requests_waiting"
            lines = (f"{n} {v}\n" for n, v in zip(names, (running, waiting)))
            return page("".join(lines))

        turns = [busy(3), busy(0, 2), busy(0), busy(1), page("", status="500 E")]
        answers = iter([*turns, busy(0), busy(0), busy(9), busy(9)])
        port, server = self.drained(lambda _: [next(answers)], DRAIN_TIMEOUT="5")
        self.assertEqual(get(port, "/drain"), (200, "Drained\n"))
        self.assertEqual(len(server.requests), 7)
        body = get(port, "/metrics")[1]
        self.assertIn('_requests_total{path="/drain", code="200"} 1\n', body)
        self.assertEqual(get(port), (200, "Healthy\n"))

    def test_what_runs_or_waits_is_known_of_servers_that_tell_all_of_it(self):
        rules = [rule.expr for rule in self.config().rules]
        known = format_expression(health_check.drain_expression(rules))
        gauges = known.split(" or ")
        for gauge in (
            "vllm:num_requests_running > 0", "vllm:num_requests_waiting > 0",
            "tgi_batch_current_size > 0", "lmdeploy:num_requests_running > 0",
            "last_over_time(litellm_in_flight_requests[1m]) - 1 > 0",
        ):  # fmt: skip
            self.assertIn(gauge, gauges)
        for name in "te_queue_size", "nv_inference_pending_request_count":
            self.assertNotIn(name, known)
        only = [parse_expression("tgi_queue_size > 10")]
        self.assertIsNone(health_check.drain_expression(only))

    def test_a_drain_that_is_in_vain_says_why(self):
        run, gone = page("vllm:num_requests_running 3\n"), page("x 1\n")
        hangs = "Stalling: vllm:num_requests_running > 0; S: vllm:num_requests_waiting"
        for pieces, environ, why in (
            ([run], {"DRAIN_TIMEOUT": "0.2"}, r"it is too late; vllm:.*\{.*\} 3"),
            ([run], {"DRAIN_WHILE": "x > 0", "DRAIN_TIMEOUT": "5"}, "Drained"),
            ([gone], {"DRAIN_TIMEOUT": "5"}, ".*set DRAIN_WHILE"),
            ([gone], {"METRIC_TO_CHECK": "x", "METRIC_THRESHOLD": "5"},
             ".*set DRAIN_WHILE"),
            ([run], {"UNHEALTHY_WHEN": f"{hangs} > 0", "DRAIN_TIMEOUT": "5"},
             "Stalling fires, so .* 3"),
            ([page("", status="500 E")], {"DRAIN_TIMEOUT": "0.2"},
             "it is too late; scrape of .*: HTTP 500"),
            ([], {}, "it is too late; nothing is known"),
        ):  # fmt: skip
            with self.subTest(why):
                port, server = self.drained(*(pieces or [run]), **environ)
                server.pieces = pieces or (FOREVER,)
                status, body = get(port, "/drain")
                expected = "Drained" if why == "Drained" else f"Not drained: {why}.*"
                self.assertRegex(body, rf"\A{expected}\n\Z")
                self.assertEqual(status, 200 if why == "Drained" else 503)

    def test_some_drain_at_once_without_a_thread_and_probes_are_answered(self):
        busy = page("vllm:num_requests_running 3\n")
        port, server = self.drained(busy, DRAIN_TIMEOUT="2")
        threads = threading.active_count()
        socks = [send(port, request_for("/drain")) for _ in range(17)]
        (refused,), _, _ = select.select(socks, [], [], 5)
        socks.remove(refused)
        gone, sends_on, *others = socks
        self.assertIn("Not drained: 16 callers wait already\n", receive(refused))
        self.assertLessEqual(threading.active_count(), threads + 2)
        gone.close()
        sends_on.sendall(b"more")
        late = send(port, request_for("/livez"))
        self.assertIn("200 OK", receive(late))
        self.assertEqual(get(port), (200, "Healthy\n"))
        self.assertTrue(wait_until(lambda: any("did not wait" in x for x in self.log)))
        server.pieces = (page("vllm:num_requests_running 0\n"),)
        for sock in (sends_on, *others):
            answer = receive(sock)
            self.assertIn("HTTP/1.1 200 OK", answer)
            self.assertTrue(answer.endswith("\r\n\r\nDrained\n"))

    def test_who_sends_without_end_is_no_caller_that_drains(self):
        with mock.patch.object(health_check, "MAX_UNREAD", 10000):
            busy = page("vllm:num_requests_running 3\n")
            port, _ = self.drained(busy, DRAIN_TIMEOUT="2")
            sock = send(port, request_for("/drain"))
            time.sleep(0.05)
            with contextlib.suppress(OSError):
                sock.sendall(b"a" * 100000)
                self.assertEqual(receive(sock), "")
            sock.close()
        self.assertTrue(wait_until(lambda: any("did not wait" in x for x in self.log)))

    def test_without_a_verdict_health_fails_closed_and_a_rule_open(self):
        # Nothing of it is started.
        monitor = Monitor(self.config(self.metrics(page())))
        monitor.verdict_timeout = 0.05
        port = self.serve(monitor)
        started = time.monotonic()
        socks = [
            send(port, request_for(path))
            for path in ("/health", "/health?verbose", "/health/Down")
        ]
        closed, verbose, opened = map(receive, socks)
        self.assertLess(time.monotonic() - started, 0.1 + 5)
        self.assertRegex(closed, r"^HTTP/1.1 503 (?s:.*)\r\n\r\nUnhealthy\n\Z")
        self.assertIn("Unhealthy: no verdict", verbose)
        self.assertRegex(opened, r"^HTTP/1.1 200 (?s:.*)\r\n\r\nHealthy \(unknown: no ")
        status, body = get(port, "/livez")
        self.assertEqual(status, 503)
        self.assertIn("no check has come round for a minute", body)

    def test_on_a_schedule_health_is_answered_from_memory(self):
        server = self.metrics(page())
        environ = {"SCRAPE_INTERVAL": "0.2", "METRICS_TIMEOUT": "0.2"}
        port = self.serve(self.running(server, **environ))
        for _ in range(100):
            self.assertEqual(get(port), (200, "Healthy\n"))
        self.assertLess(len(server.requests), 10)

    def test_memory_is_three_intervals_long(self):
        server = self.metrics(page())
        monitor = self.monitor(server, SCRAPE_INTERVAL="9")
        port, verdict = self.serve(monitor), monitor.check()
        for age, scrapes in (0, 1), (20, 1), (27, 2):
            monitor.verdict = verdict._replace(time=verdict.time - age)
            self.assertEqual(get(port), (200, "Healthy\n"))
            self.assertEqual(len(server.requests), scrapes)

    def test_a_slow_caller_is_hung_up_on(self):
        port = self.serve(self.running(self.metrics(page())))
        with mock.patch.object(health_check, "CALLER_TIMEOUT", 0.15):
            silent = send(port, "")
            dripping_ = send(port, "GET /health")
            started = time.monotonic()
            while time.monotonic() - started < 0.12:
                dripping_.send(b" ")
                time.sleep(0.02)
            self.assertEqual([receive(silent), receive(dripping_)], ["", ""])
            self.assertLess(time.monotonic() - started, 0.3)
        self.assert_any("sent no request in time", self.log)

    def test_a_caller_that_goes_away_is_no_trouble(self):
        server = self.metrics(0.1, page())
        port = self.serve(self.running(server))
        for request in ("", "GET", request_for("/health"), "GET /" + "b" * 30000):
            sock = send(port, request)
            time.sleep(0.02)
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.close()
        send(port, request_for("/health")).close()
        send(port, "GET").close()
        self.assertEqual(get(port), (200, "Healthy\n"))
        self.assert_any("given up: .*reset", self.log)
        self.assert_any("given up: no whole request", self.log)

    def lazy(self):
        """Return what asks for a long answer, of which the kernel is to keep little."""
        label = "x" * 15000
        rules = ";".join(f"Q{number}: q > 0" for number in range(8))
        server = self.metrics(page(f'q{{a="{label}"}} 1\n'))
        port = self.serve(self.running(server, UNHEALTHY_WHEN=rules))

        def ask():
            sock = socket.socket()
            sock.settimeout(2)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            sock.sendall(request_for("/health?format=json").encode())
            time.sleep(0.05)
            return sock

        self.assertEqual(receive(ask()).count(label), 8)
        return ask, label

    def test_a_caller_that_does_not_read_is_given_up(self):
        ask, _ = self.lazy()
        with mock.patch.object(health_check, "CALLER_TIMEOUT", 0.15):
            sock = ask()
            given_up = "did not read its answer in time"
            self.assertTrue(
                wait_until(lambda: any(given_up in line for line in self.log))
            )
            sock.close()

    def test_who_does_not_read_makes_room_for_who_asks_for_a_long_answer(self):
        ask, label = self.lazy()
        with mock.patch.object(health_check, "MAX_UNSENT", 100000):
            slow = ask()
            self.assertEqual(receive(ask()).count(label), 8)
            self.assertLess(receive(slow).count(label), 8)

    def test_at_the_cap_the_oldest_idle_caller_makes_room(self):
        with mock.patch.object(health_check, "MAX_CONNECTIONS", 3):
            port = self.serve(self.running(self.metrics(page())))
            # What is not read yet as it is closed would be answered with a reset.
            first, second, third = (send(port, "") for _ in range(3))
            self.assertEqual(get(port), (200, "Healthy\n"))
            self.assertEqual(receive(first), "")
            for sock in (second, third):
                sock.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                self.assertIn("200 OK", receive(sock))

    def test_at_the_cap_whoever_has_asked_is_answered(self):
        server = self.metrics(page())
        with mock.patch.object(health_check, "MAX_CONNECTIONS", 2):
            port = self.serve(self.running(server))
            server.pieces = 0.2, page()
            asked = [send(port, request_for("/health")) for _ in range(2)]
            time.sleep(0.05)
            late = [send(port, "") for _ in range(2)]
            self.assertEqual([receive(sock) for sock in late], ["", ""])
            for sock in asked:
                self.assertIn("200 OK", receive(sock))
        server.pieces = (page(),)
        self.assertEqual(get(port)[0], 200)

    def test_callers_that_wait_leave_room_for_those_who_need_no_verdict(self):
        server = self.metrics(page())
        with mock.patch.multiple(health_check, MAX_CONNECTIONS=24, MAX_DRAINING=8):
            drain = {"DRAIN_WHILE": "q", "DRAIN_TIMEOUT": "1"}
            port = self.serve(self.running(server, METRICS_TIMEOUT="0.2", **drain))
            server.pieces = (FOREVER,)
            draining = [send(port, request_for("/drain")) for _ in range(8)]
            for sock in draining:
                self.addCleanup(sock.close)
            waiting = [send(port, request_for("/health")) for _ in range(30)]
            time.sleep(0.05)
            for path in "/livez", "/health/Down":
                sock = send(port, "")
                time.sleep(0.05)
                sock.sendall(request_for(path).encode())
                self.assertIn("200 OK", receive(sock))
            answers = {receive(sock)[9:12] for sock in waiting}
        # Who found no room, and who waited: one time out is no reason yet.
        self.assertEqual(answers, {"503", "200"})

    def test_long_answers_leave_room_for_short_ones(self):
        with mock.patch.object(health_check, "MAX_CONNECTIONS", 16), mock.patch.object(
            Server, "_to_build", lambda _: []
        ):
            port = self.serve(self.running(self.metrics(page())))
            waiting = [send(port, request_for("/metrics")) for _ in range(16)]
            time.sleep(0.05)
            for path, body in (
                ("/livez", "Healthy"), ("/health", "Healthy"), ("/metrics", "left out"),
                ("/health?verbose", "left out"), ("/health/Down?verbose", "left out"),
            ):  # fmt: skip
                sock = send(port, "")
                time.sleep(0.02)
                sock.sendall(request_for(path).encode())
                self.assertRegex(receive(sock), rf"200 OK(?s:.*)\r\n\r\n{body}.*\n")
            late = time.monotonic() + health_check.CALLER_TIMEOUT
            with mock.patch.object(time, "monotonic", lambda: late):
                # It looks at the clock when a caller comes.
                get(port, "/livez")
                answers = [receive(sock) for sock in waiting]
        self.assertEqual(answers.count(""), 8)
        self.assert_any("its answer was not made in time", self.log)

    def test_a_burst_of_callers_finds_room_before_it_is_accepted(self):
        most = Path("/proc/sys/net/core/somaxconn")
        if not most.exists() or int(most.read_text()) < 1000:
            self.skipTest("the kernel grants less")
        with listen("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
            for _ in range(700):
                caller = socket.create_connection(listener.getsockname(), 0.9)
                stack.enter_context(caller)

    def test_callers_cannot_use_up_the_descriptors_that_a_scrape_needs(self):
        process = self.launch(METRICS_ENDPOINT=self.metrics(page()).url)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, 40))
        port = self.port_of(process)
        idle = [send(port, "GET") for _ in range(60)]
        self.assertEqual(get(port), (200, "Healthy\n"))
        for sock in idle:
            sock.close()

    def test_where_descriptors_have_no_limit_a_caller_is_answered(self):
        port = self.serve(self.running(self.metrics(page())))
        with mock.patch.object(os, "sysconf", return_value=-1):
            self.assertEqual(get(port), (200, "Healthy\n"))

    def test_without_a_file_descriptor_the_oldest_idle_caller_makes_room(self):
        def descriptors():
            return len(list(Path("/proc/self/fd").iterdir()))

        port = self.serve(self.running(self.metrics(page())))
        names = lambda: [thread.name for thread in threading.enumerate()]  # noqa: E731
        self.assertTrue(wait_until(lambda: "metrics" not in names()))
        before = descriptors()
        idle, caller = send(port, "GET"), socket.socket()
        self.assertEqual(get(port, "/livez")[0], 200)
        self.assertTrue(wait_until(lambda: descriptors() == before + 3))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with contextlib.suppress(OSError):
            while True:
                self.addCleanup(os.close, os.dup(0))
        caller.settimeout(2)
        caller.connect(("127.0.0.1", port))
        caller.sendall(request_for("/livez").encode())
        self.assertIn("200 OK", receive(caller))
        self.assertEqual(receive(idle), "")
        self.assert_any("no file descriptor", self.log)

    def test_without_a_file_descriptor_it_does_not_spin_and_answers_again(self):
        class Counting(socket.socket):
            tries = 0

            def accept(self):
                self.tries += 1
                return super().accept()

        listener = Counting(fileno=listen("127.0.0.1", 0).detach())
        caller = socket.socket()
        port = self.serve(self.running(self.metrics(page())), listener)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        caller.settimeout(2)
        caller.connect(("127.0.0.1", port))
        caller.sendall(request_for("/livez").encode())
        time.sleep(0.1)
        self.assertLess(listener.tries, 50)
        for descriptor in taken:
            os.close(descriptor)
        self.assertIn("200 OK", receive(caller))
        self.assertEqual(sum("no file descriptor" in line for line in self.log), 1)

    def test_a_bug_behind_a_request_fails_health_closed_and_a_rule_open(self):
        class Broken(Monitor):
            def request(self, sequence):
                raise RuntimeError("broken")

        port = self.serve(Broken(self.config(self.metrics(page()))))
        why = "bug: RuntimeError: broken"
        self.assertEqual(get(port), (503, "Unhealthy\n"))
        self.assertEqual(get(port, "/health?verbose"), (503, f"Unhealthy: {why}\n"))
        opened = f"Healthy (unknown: {why})\n"
        self.assertEqual(get(port, "/health/Down"), (200, opened))
        self.assertEqual(get(port, "/livez")[0], 503)
        bugs = [line for line in self.log if "this is a bug" in line]
        self.assertEqual(len(bugs), 3)
        self.log.clear()

    def test_a_bug_in_an_answer_costs_one_caller_and_is_said(self):
        monitor = Monitor(self.config(self.metrics(page())))
        monitor.statistics.scrapes = None
        port = self.serve(monitor)
        self.assertEqual(receive(send(port, request_for("/metrics"))), "")
        self.assertEqual(get(port, "/livez")[0], 503)
        self.assertIn("this is a bug in health_check.py", self.log.pop(0))

    def test_a_caller_that_was_not_there_after_all_is_no_trouble(self):
        class Hasty(socket.socket):
            tries = 0

            def accept(self):
                self.tries += 1
                if self.tries == 1:
                    raise BlockingIOError
                return super().accept()

        listener = Hasty(fileno=listen("127.0.0.1", 0).detach())
        port = self.serve(self.running(self.metrics(page())), listener)
        self.assertEqual(get(port, "/livez")[0], 200)
        self.assertGreater(listener.tries, 1)

    def test_a_caller_that_another_process_took_is_no_trouble(self):
        monitors = [self.running(self.metrics(page())) for _ in range(2)]
        listener = listen("127.0.0.1", 0)
        ports = [
            self.serve(m, sock) for m, sock in zip(monitors, (listener.dup(), listener))
        ]
        self.assertEqual([get(ports[0], "/livez")[0] for _ in range(50)], [200] * 50)

    def test_both_families_are_answered_or_IPv4_where_there_is_no_other(self):
        for family, hosts in (
            (socket.AF_INET6, ("127.0.0.1", "::1")),
            (12345, ("127.0.0.1",)),
        ):
            with mock.patch.object(socket, "AF_INET6", family):
                port = self.serve(self.monitor(self.metrics(page())), listen("", 0))
            for host in hosts:
                with self.subTest(host, family=family):
                    socket.create_connection((host, port), 2).close()


class CommandsTest(CommandLine):
    """What looks at the targets once, prints what it finds, and ends."""

    def test_whatever_reads_stdout_no_mode_ends_in_a_traceback(self):
        environ = {"UNHEALTHY_WHEN": 'Q: x{a="\u00e9"} > 1'}
        out = io.TextIOWrapper(io.BytesIO(), "ascii")
        self.assertEqual(self.run_main("--check-config", out=out, **environ)[0], 0)
        self.assertIn(b'Q: x{a="\\xe9"} > 1\n', out.buffer.getvalue())
        for argv in (["--check-config"], ["--once"], ["--query", "up"], ["--help"]):
            read, write = os.pipe()
            os.close(read)
            with self.subTest(argv), open(write, "w") as out:
                code, _, err = self.run_main(*argv, out=out, **environ)
                self.assertEqual(code, argv[0] in ("--once", "--query"))
                self.assertNotIn("Traceback", err)
        with mock.patch.object(sys, "stderr", None):
            health_check.say("", error=True)

    def test_what_finds_nothing_is_told(self):
        environ = {"METRICS_ENDPOINT": self.metrics(page("other 1\n")).url}
        own = {"UNHEALTHY_WHEN": "C: changes(nope[2m]) > 0"}
        for mode, more, words in (
            ("--once", {}, "nothing is watched: no rule knows its only metric"),
            ("--once", own, "no series of nope is th"),
            ("--check-config", own, "no series of nope is th"),
        ):
            code, out, err = self.run_main(mode, **environ, **more)
            self.assertEqual((code, f"{out}{err}".count("warn")), (0, 1))
            self.assertIn(words, err if more else out)

    def test_once_that_could_decide_no_rule_says_so_and_is_no_success(self):
        rules = parse_rules("C: changes(c[2m]) > 0")
        config = self.config(self.metrics(page("c 1\n")))._replace(rules=rules)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(health_check.check_once(config), 1)
        last = "no rule can be decided by one check\n"
        self.assertRegex(out.getvalue(), rf"(?s)\[\?\]C undecided.*\n{last}\Z")

    def test_once_checks_once_and_names_what_it_cannot_decide(self):
        server = self.metrics(page("q 11\nc 3\n"))
        rules = "Q: q > 10 for 1h; C: changes(c[2m]) > 0"
        environ = {"METRICS_ENDPOINT": server.url, "UNHEALTHY_WHEN": rules}
        code, out, err = self.run_main("--once", **environ)
        self.assertEqual((code, err), (1, ""))
        self.assertIn("[?]C undecided", out)
        self.assertIn("[-]Q firing", out)
        self.assertTrue(out.endswith("Unhealthy: Q\n"), out)
        server.pieces = (page("q 10\nc 3\n"),)
        code, out, _ = self.run_main("--once", **environ)
        self.assertEqual(code, 0)
        self.assertTrue(out.endswith("[+]Down ok\nHealthy\n"), out)
        server.pieces = (page(status="404 No"),)
        code, out, _ = self.run_main("--once", **environ)
        self.assertEqual(code, 1)
        self.assertIn("failed for 0s: http_status: HTTP 404 Not Found\n", out)

    def test_once_asks_for_no_range_that_another_server_would_need(self):
        server = self.metrics(page("tgi_queue_size 11\n"))
        code, out, _ = self.run_main("--once", METRICS_ENDPOINT=server.url)
        self.assertEqual(code, 1)
        self.assertTrue(out.endswith("Unhealthy: QueueFull\n"), out)

    def test_probe_prints_the_reason_and_exits_0_or_1(self):
        server = self.metrics(page("q 11\n"))
        monitor = self.running(server, UNHEALTHY_WHEN="Q: q > 10; R: q > 20")
        port = str(self.serve(monitor, listen("", 0)))
        firing = r"\[-\]Q firing for 0s: q\{.*\} 11\n(?s:.*)\nUnhealthy: Q\n\Z"
        for argv, environ, code, answer in (
            ([], {}, 1, firing),
            (["health"], {}, 1, firing),
            (["/health?exclude=Q"], {}, 0, r"\[\+\]Q excluded: (?s:.*)\nHealthy\n"),
            (["/health?format=json"], {}, 1, "{"),
            (["/health/R"], {}, 0, "(?s:.*)Healthy"),
            (["/livez"], {}, 0, "Healthy\n"),
            (["/livez"], {"APP_HOST": "0.0.0.0"}, 0, "Healthy\n"),
            (["/livez"], {"APP_HOST": "::"}, 0, "Healthy\n"),
            (["/livez"], {"APP_HOST": "::1"}, 0, "Healthy\n"),
            (["/livez"], {"METRIC_THRESHOLD": "nonsense"}, 0, "Healthy\n"),
            (["/a b"], {}, 1, r"\Z"),
            ([], {"APP_PORT": str(free_port())}, 1, r"\Z"),
            (["/livez"], {"APP_PORT": str(int(port) + 65536)}, 1, r"\Z"),
            (["/livez"], {"APP_PORT": "http://host:80"}, 1, r"\Z"),
            ([], {"APP_HOST": "1.2.3.4.5"}, 1, r"\Z"),
        ):
            with self.subTest(argv, environ=environ):
                found = self.run_main("--probe", *argv, **{"APP_PORT": port, **environ})
                self.assertEqual(found[0], code)
                self.assertRegex(found[1], r"\A" + answer)
                self.assertEqual(found[2].count("\n"), 0 if found[1] else 1)
        self.assertEqual(self.run_main("--probe", "/healthz", APP_PORT=port)[0], 1)

    def test_probe_of_a_rule_exits_1_for_503_only(self):
        for pieces, code, said in (
            ([b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nU\n"], 1, ""),
            ([page("Healthy\n")], 0, ""),
            ([b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nU\n"], 0, "HTTP 404"),
            ([b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"], 0, "HTTP 500"),
            ([b"garbage\r\n\r\n"], 0, "no answer"),
            ([b""], 0, "no answer"),
            ([FOREVER], 0, "timed out"),
            ([page("x")[:-1], FOREVER], 0, "timed out"),
            (dripping(page("x" * 99), 0.05), 0, "timed out"),
            ([b"HTTP/1.1 503 No\r\nContent-Length: 9\r\n\r\nU", FOREVER], 0, "timed"),
        ):
            port = self.metrics(*pieces).instance.partition(":")[2]
            seconds = 0.02 if "timed" in said else 5.0
            with self.subTest(pieces), mock.patch.object(
                health_check, "CALLER_TIMEOUT", seconds
            ):
                found = self.run_main("--probe", "/health/R", APP_PORT=port)
                self.assertEqual(found[0], code)
                self.assertIn(said, found[2])
                self.assertEqual("; unknown, so exit status 0\n" in found[2], said > "")
                if code == 0 and said:
                    closed = self.run_main("--probe", "/health", APP_PORT=port)
                    self.assertEqual(closed[0], 1)
        for argv in (["/health/R"], ["health/R?verbose"], ["/health/a b"]):
            found = self.run_main("--probe", *argv, APP_PORT=str(free_port()))
            self.assertEqual((found[0], found[2].count("\n")), (0, 1))

    def test_query_prints_what_an_expression_gives(self):
        count = itertools.count(3)
        server = self.metrics(lambda _: [page(f'q{{a="b"}} {next(count)}\nr 1\n')])
        q = f'q{{a="b", instance="{server.instance}"}}'
        labels, stamp = q[1:], r" @\[\d+\.\d{3}\]\n"
        with mock.patch.object(health_check, "QUERY_PAUSE", 0.005):
            for expression, code, pattern in (
                ("q", 0, re.escape(q) + " => 3" + stamp),
                ("q * 2", 0, re.escape(labels) + " => 8" + stamp),
                ("sum(q) > 99", 0, ""),
                ("1 + 2 * 3", 0, "scalar: 7" + stamp),
                ("scalar(r)", 0, "scalar: 1" + stamp),
                ("q[1m]", 0, re.escape(q) + " =>\n8" + stamp + "9" + stamp),
                ("delta(q[1m]) > bool 0", 0, re.escape(labels) + " => 1" + stamp),
                ("q +", 2, ""), ("q @ 5", 2, ""),
                ("topk(1, q)", 0, re.escape(q) + r" => \d+" + stamp),
                ("vector(1)[1m:30s]", 0, "{} =>\n1" + stamp + "1" + stamp),
                ("'q'", 0, 'string: "q"' + stamp),
                ('q{a="', 2, ""),
                ("{__name__=~'q|r'} + on() r", 2, ""),
                ('up{job="vllm"}', 2, ""),
            ):
                with self.subTest(expression):
                    environ = {"METRICS_ENDPOINT": server.url}
                    found = self.run_main("--query", expression, **environ)
                    self.assertEqual(found[0], code, found)
                    self.assertRegex(found[1], f"\\A{pattern}\\Z")
                    self.assertEqual(bool(found[2]), bool(code), found[2])
            code, out, err = self.run_main("--query", "nothing", **environ)
            self.assertEqual((code, out), (0, ""))
            self.assertRegex(err, "no series of nothing is there")
            server.pieces = (page('q{a="1"} 1\nq{a="2"} 2\nr 1\n'),)
            code, out, err = self.run_main("--query", "r + on() q", **environ)
            self.assertEqual((code, out), (1, ""))
            self.assertIn("many-to-", err)
            server.pieces = (page(status="500 No"),)
            code, out, err = self.run_main("--query", "up", **environ)
            self.assertEqual(code, 1)
            self.assertRegex(out, r"\Aup\{instance=.*\} => 0 @")
            self.assertRegex(err, "\\A.*failed: http_status: HTTP 500 .*\n\\Z")

    def test_check_config_shows_what_concerns_the_servers_there(self):
        server = self.metrics(page(vllm()))
        code, out, _ = self.run_main("--check-config", METRICS_ENDPOINT=server.url)
        self.assertEqual(code, 0)
        queue = r"(?m)^QueueFull: last_over_time\(vllm:num_requests_waiting\[1m\]\) > "
        self.assertRegex(out, rf"{queue}.*\n    built in; range of 1m, up to ")
        self.assertRegex(out, r"\nNoModel: when no model, .*\n.*; no metric that it ")
        self.assertLess(max(map(len, out.split("\n"))), 300)
        self.assertNotIn("sglang", out)
        server.close()
        _, out, _ = self.run_main("--check-config", METRICS_ENDPOINT=server.url)
        self.assertIn("QueueFull: when too many requests wait, for 30s keep_f", out)
        self.assertTrue(out.startswith(f"scrape of {server.instance}: refused: "), out)
        self.assertIn("SGLang :30000/metrics\n    waiting: sglang:num_queue_r", out)

    def test_check_config_prints_the_rules_it_understood(self):
        code, out, err = self.run_main("--check-config", **MANIFEST)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("AboveThreshold: tgi_queue_size > 10\n", out)
        gone = {"METRICS_CA_FILE": "/nowhere/ca.pem"}
        code, _, err = self.run_main("--check-config", **gone)
        self.assertEqual((code, err.count("\n")), (0, 1))
        self.assertIn("METRICS_CA_FILE=/nowhere/ca.pem: there is no such file", err)
        self.assertIn("Down: when a scrape fails; a timeout counts once", out)
        rules = "changes(q[2m]) > 0 for 1m30s"
        _, out, _ = self.run_main("--check-config", UNHEALTHY_WHEN=rules)
        self.assertIn(f"Rule1: {rules}\n", out)
        self.assertIn("range of 2m", out)
        self.assertNotIn("a blank ends", out)
        _, out, _ = self.run_main("--check-config", UNHEALTHY_WHEN="Q:x > 1")
        self.assertIn("Q:x is a metric: a blank ends the name of a rule\n", out)

    def test_rules_are_printed_as_a_group_of_Prometheus(self):
        rules = {
            'Down: scrape_error{reason!="timeout",job="a"} keep_firing_for 1m':
                'up{job="a"} == 0',
            "x > 1 unless on (instance) scrape_error":
                "x > 1 unless on (instance) up == 0",
            "count(scrape_error) > 1": "count((up == 0) + 1) > 1",
            "scrape_error == 1": "(up == 0) + 1 == 1",
            "changes(scrape_error[1m] offset 2m) > 0":
                "changes(((up == 0) + 1)[1m:10s] offset 2m) > 0",
            "max_over_time((scrape_error offset 1m)[1m:5s]) > 0":
                "max_over_time(((up offset 1m == 0) + 1)[1m:5s]) > 0",
            r'x{a="\n# : \\"} > 1 for 90s': r'x{a="\n# : \\"} > 1',
        }
        code, out, err = self.run_main(
            "--check-config", "--format=prometheus", UNHEALTHY_WHEN="\n".join(rules),
            TARGET_LABELS="job=a", METRICS_ENDPOINT="http://localhost/",
        )  # fmt: skip
        self.assertEqual((code, err), (0, ""))
        group, *alerts = out.split("      - alert: ")
        self.assertTrue(group.startswith("groups:\n  - name: health_check\n"), group)
        self.assertIn("      # scrape_error is up == 0 there", group)
        for alert, expected in zip(alerts, rules.values()):
            self.assertIn(f"        expr: |-\n          {expected}\n", alert)
        self.assertIn("        keep_firing_for: 1m\n", alerts[0])
        self.assertIn("        for: 1m30s\n", alerts[6])

    def test_wait_returns_when_nothing_matches_in_two_checks_in_a_row(self):
        bad = page(status="500 Internal Server Error")
        pages = iter([page("x 2\n"), page("x 0\n"), bad, *[page("x 0\n")] * 2])
        environ = {"METRICS_ENDPOINT": self.metrics(lambda _: [next(pages)]).url}
        with mock.patch.multiple(health_check, QUERY_PAUSE=0, REPORT_PAUSE=0):
            code, out, err = self.run_main("--wait", "x > 0", **environ)
        self.assertEqual(err, "")
        lines = out.splitlines()
        self.assertEqual((code, len(lines), next(pages, "no more")), (0, 2, "no more"))
        self.assertRegex(lines[0], r"waiting for x\{.*\} 2")
        self.assertRegex(lines[1], r"waiting for scrape of .*: http_status: HTTP 500")

    def test_wait_ends_in_time_and_says_what_is_left(self):
        target = self.metrics(page('x{a="1"} 1\nx{a="2"} 1\n'))
        environ = {"METRICS_ENDPOINT": target.url}
        for expr, left in ("x", "x{"), ("x - on () x", "many-to-many"):
            argv = "--wait", expr, "--timeout", "10ms"
            code, out, err = self.run_main(*argv, **environ)
            self.assertEqual((code, out.count("waiting for")), (1, 1))
            self.assertIn(left, out)
            self.assertEqual(err, "not over within 10ms\n")
        with mock.patch.object(health_check, "QUERY_PAUSE", 0):
            code, out, err = self.run_main("--wait", "z > 0", **environ)
        told = "warning: Wait: no series of z is there yet\n"
        self.assertEqual((code, out, err), (0, "", told))
        for argv in (
            ["--wait", "x >"], ["--wait", ""], ["--wait", "1"], ["--wait", "x[1m]"],
            ["--wait", "x", "--timeout", "soon"], ["--timeout", "1"],
            ["--format", "prometheus"],
        ):  # fmt: skip
            self.assertEqual(self.run_main(*argv, **environ)[0], 2, argv)


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "base64":
            os.kill(os.getpid(), signal.SIGTERM)

sys.modules.pop("base64", None)
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv.pop(), run_name="__main__")
"""


class MainTest(CommandLine):
    """How it starts and ends."""

    def test_SIGTERM_and_SIGINT_end_it_at_once_even_while_a_scrape_hangs(self):
        self.assert_all_end([(signal.SIGTERM, True), (signal.SIGINT, False)])

    def test_as_PID_1_it_ends_at_once_too(self):
        command = ["unshare", "-fp", "--kill-child"]
        if (
            not shutil.which("unshare")
            or subprocess.run(
                [*command, "true"], stderr=subprocess.DEVNULL, check=False
            ).returncode
        ):
            self.skipTest("no right to make a PID namespace")
        self.assert_all_end([(signal.SIGTERM, True), (signal.SIGINT, True)], command)

    def test_a_wrong_configuration_is_told_at_once_and_exit_2(self):
        environ = {
            "METRIC_THRESHOLD": "ten",
            "APP_PORT": "http",
            "METRICS_ENDPOINT": "http://us:hush@host:x/?t=hush",
            "UNHEALTHY_WHEN": "Q: q >",
            "LOG_LEVEL": "loud",
        }
        for argv in ([], ["--once"], ["--check-config"], ["--query", "up"], ["--demo"]):
            with self.subTest(argv):
                code, _, err = self.run_main(*argv, **environ)
                self.assertEqual(code, 2)
                for name in {*environ} - {"METRICS_ENDPOINT"}:
                    self.assertIn(f"{name}=", err)
                self.assertIn("METRICS_ENDPOINT=", err)
                self.assertNotIn("hush", err)
                self.assertNotIn("Traceback", err)

    def test_a_firing_rule_reaches_the_Alertmanager(self):
        target, alertmanager = self.metrics(page("q 1\n")), self.metrics(page())

        def act(port):
            self.assertEqual(get(port)[0], 503)
            self.assertTrue(wait_until(lambda: alertmanager.requests))
            self.assertIn('"alertname": "Q"', alertmanager.requests[0])
            self.assertIn("notifications_sent_total{", get(port, "/metrics")[1])

        environ = {"UNHEALTHY_WHEN": "Q: q > 0", "METRICS_ENDPOINT": target.url}
        code, _ = self.serving(act, ALERTMANAGER_URL=alertmanager.url, **environ)
        self.assertEqual(code, 0)

    def test_the_first_check_needs_no_caller(self):
        def act(port):
            # It asks for no check.
            healthy = "health_check_healthy 1\n"
            self.assertTrue(wait_until(lambda: healthy in get(port, "/metrics")[1]))

        self.serving(act, METRICS_ENDPOINT=self.metrics(page()).url)

    def test_a_drain_is_answered_as_the_program_ends(self):
        answers = []

        def act(port):
            sock = send(port, request_for("/drain"))
            # The second check is for the drain.
            self.assertTrue(wait_until(lambda: len(running.requests) > 1))
            os.kill(os.getpid(), signal.SIGTERM)
            answers.append(receive(sock))

        running = self.metrics(page("vllm:num_requests_running 3\n"))
        started = time.monotonic()
        with mock.patch.object(health_check, "DRAIN_PAUSE", 0.05):
            self.assertEqual(self.serving(act, METRICS_ENDPOINT=running.url)[0], 0)
        self.assertLess(time.monotonic() - started, 5)
        ends = r"HTTP/1.1 503 (?s:.*)\nNot drained: this program en"
        self.assertRegex(answers[0], ends)

    def test_a_second_SIGTERM_changes_nothing(self):
        process = self.launch(METRICS_ENDPOINT=self.metrics(page()).url)
        self.port_of(process)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        told = [line for line in process.stderr if not line.endswith("INFO Healthy\n")]
        self.assertEqual((process.wait(), told), (0, []))

    def test_a_signal_is_never_written_to_a_socket_that_is_closed(self):
        told_to, close = [], Server.close

        def closing(server):
            told_to.append(signal.set_wakeup_fd(-1))
            close(server)

        with mock.patch.object(Server, "close", closing):
            self.assertEqual(self.serving()[0], 0)
        self.assertEqual(told_to, [-1])

    def test_no_thread_to_be_had_is_a_sentence(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        for argv in ([], ["--once"], ["--query", "up"]):
            problem = RuntimeError("can't start new thread")
            with mock.patch.object(threading.Thread, "start", side_effect=problem):
                code, _, err = self.run_main(*argv, APP_PORT="0")
            self.assertEqual((code, err.count("\n")), (1, 1), argv)
            self.assertIn("can't start new thread", err)
        another = RuntimeError("x")
        with mock.patch.object(threading.Thread, "start", side_effect=another):
            self.assertRaises(RuntimeError, self.run_main, "--once")

    def test_no_descriptor_to_be_had_is_a_sentence(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with open(os.devnull) as lowest:
            first = lowest.fileno()
        for spare in range(4):
            limit = first + spare, limits[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            code, said = self.serving()
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            self.assertEqual((code, said.count("\n")), (1, 1), said)
            self.assertIn("Too many open files", said)

    def test_SIGTERM_among_the_imports_ends_it_without_a_word(self):
        started = []
        for *argv, code in ((0,), ("--demo", 0), ("--once", 1), ("--query", "up", 1)):
            command = (sys.executable, "-c", INTERRUPTED, *argv, compiled_program())
            started.append((argv, code, self.launch(command=command)))
        for argv, code, process in started:
            with self.subTest(argv):
                self.assertEqual((process.wait(20), process.stderr.read()), (code, ""))

    def assert_all_end(self, cases, prefix=()):
        """Start a program for each of these signals, and send it while it works."""
        started = []
        for number, hanging in cases:
            server = self.metrics(FOREVER)
            process = self.launch(
                command=(*prefix, sys.executable, compiled_program()),
                METRICS_ENDPOINT=server.url, METRICS_TIMEOUT="30",
            )  # fmt: skip
            started.append((number, hanging, server, process))
        for number, hanging, server, process in started:
            with self.subTest(number, hanging=hanging):
                port, pid = self.port_of(process), process.pid
                if prefix:
                    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                    pid = int(children.split()[0])
                if hanging:
                    caller = send(port, request_for("/health"))
                    self.assertTrue(wait_until(lambda at=server: at.requests))
                    # Who is accepted in order: the request before has been read too.
                    self.assertEqual(get(port, "/livez")[0], 200)
                before = time.monotonic()
                os.kill(pid, number)
                self.assertEqual(process.wait(20), 0)
                # Half a second, where nothing else runs.
                self.assertLess(time.monotonic() - before, 5)
                self.assertEqual(process.stderr.read(), "")
                # Where much else runs, the kernel may not have handed its request on.
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(receive(caller) if hanging else "", "")

    def test_a_port_that_cannot_be_had_is_one_line_and_exit_1(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            for environ in (
                {"APP_PORT": port},
                {"APP_PORT": port, "APP_HOST": "127.0.0.1"},
                {"APP_PORT": "0", "APP_HOST": "192.0.2.1"},
                {"APP_PORT": "0", "APP_HOST": "1.2.3.4.5"},
                {"APP_PORT": "0", "APP_HOST": "a..b"},
                {"APP_PORT": "8081", "APP_HOST": "192.0.2.1"},
            ):
                with self.subTest(environ):
                    code, out, err = self.run_main(**environ)
                    self.assertEqual((code, out, err.count("\n")), (1, "", 1))
                    self.assertRegex(err, f"cannot listen on .*{environ['APP_PORT']}")
                    known = "8081 is a port of MLServer or TorchServe or KServe" in err
                    self.assertEqual(known, environ["APP_PORT"] == "8081")

    def test_the_start_line_says_which_rules_are_in_force_and_why(self):
        rules = "A: x > 1; Stalled: y"
        config = load_config({"UNHEALTHY_WHEN": rules, "WITHOUT_RULES": "Failing"})
        health_check._log_start(config, 8081)
        (line,) = self.log
        self.assertIn("rules: A: x > 1; Stalled: y; Stalling; Unanswered; NoM", line)
        for text in "QueueFull (UNHEALTHY_WHEN)", "Failing (WITHOUT_RULES)":
            self.assertIn(f"; not {text}", line)
        self.assertNotIn("not Stalled", line, "one of that name is in force")

    def exiting(self, path, **environ):
        """Return a policy of ten minutes, and how often it has stopped the program."""
        rules = "Stalled: x > 1\nFull: x > 2"
        config = load_config({
            "UNHEALTHY_WHEN": rules, "EXIT_WHEN": "Stalled", "LAST_WORDS": path,
            **environ,
        })  # fmt: skip
        stops = []
        return ExitPolicy(config, lambda: stops.append(1), 1000.0), stops

    def test_it_exits_with_88_only_after_it_was_healthy_and_EXIT_AFTER(self):
        rule, other = parse_rules("Stalled: x > 1; Full: x > 2")
        firing = (Alert((), 2.0, 0.0, 0.0),)
        calm = RuleStatus(rule)
        bad = RuleStatus(rule, firing, last_words="x 2 for 5m")
        full = RuleStatus(other, firing)
        for name, verdicts, status in (
            ("healthy, then stalled", [(0, calm), (600, bad), (601, bad)], 88),
            ("never healthy", [(0, bad), (700, bad)], 0),
            ("too early", [(0, calm), (599, bad)], 0),
            ("goes on", [(0, calm), (300, bad), (610, bad)], 88),
            ("another rule", [(0, calm), (700, full)], 0),
        ):
            with self.subTest(name), tempfile.TemporaryDirectory() as directory:
                path = f"{directory}/last"
                policy, stops = self.exiting(path)
                for seconds, found in verdicts:
                    at = 1000.0 + seconds
                    policy.on_verdict(None, Verdict(1, "", at, WALL, (found,)))
                self.assertEqual((policy.status, len(stops)), (status, status and 1))
                words = "exit status 88: Stalled; x 2 for 5m"
                told = f"2023-11-14T22:13:20.000Z {words}" if status else ""
                self.assertEqual(health_check.read_last_words(path), told)
                self.assertEqual(words in self.log, bool(status))
                self.log.clear()
        site = site_of(last_words="<x 2 for 5m>")
        page_ = "".join(answer_page(Verdict(1, "", NOW, WALL), site).body)
        self.assertIn("the run before ended so", page_)
        self.assertIn("&lt;x 2 for 5m&gt;", page_)

    def test_a_program_that_ends_with_88_tells_why_when_it_starts_again(self):
        target = self.metrics(page("x 1\n"))

        def act(port):
            self.assertTrue(wait_until(lambda: get(port)[0] == 200))
            target.pieces = (page("x 2\n"),)
            send(port, request_for("/health")).close()
            self.assertTrue(wait_until(Path(environ["LAST_WORDS"]).exists))

        with tempfile.TemporaryDirectory() as directory:
            environ = {
                "METRICS_ENDPOINT": target.url, "UNHEALTHY_WHEN": "Stalled: x > 1",
                "EXIT_WHEN": "Stalled", "EXIT_AFTER": "0s",
                "CANARY_URL": target.url, "CANARY_WHEN": "x > 5",
                "LAST_WORDS": f"{directory}/last",
            }  # fmt: skip
            code, log = self.serving(act, **environ)
            self.assertIn("EXIT_WHEN Stalled (for restartPolicyRules of", log)
            self.assertEqual(code, 88)
            log = self.serving(**environ)[1]
        words = r"ended so: \d.*Z exit status 88: Stalled; firing for 0s: x\{.*\} 2"
        self.assertRegex(log, words)

    def test_a_file_of_last_words_that_cannot_be_had_stops_no_exit(self):
        rule = parse_rules("Stalled: x > 1")[0]
        bad = RuleStatus(rule, (Alert((), 2.0, 0.0, 0.0),))
        with tempfile.NamedTemporaryFile() as file:
            os.mkfifo(f"{file.name}.fifo")
            self.addCleanup(os.unlink, f"{file.name}.fifo")
            for path in "/nowhere/last", f"{file.name}.fifo", "":
                with mock.patch.object(health_check, "TERMINATION_LOG", file.name):
                    policy, stops = self.exiting(path, EXIT_AFTER="0s")
                    policy.on_verdict(None, Verdict(1, "", NOW, WALL))
                    policy.on_verdict(None, Verdict(2, "", NOW, WALL, (bad,)))
                self.assertEqual((policy.status, stops), (88, [1]))
            self.assertIn(b"exit status 88: Stalled", Path(file.name).read_bytes())
        self.assert_any("LAST_WORDS=/nowhere/last: No such file", self.log)
        self.assert_any(f"LAST_WORDS={file.name}.fifo: No such device", self.log)
        with self.assertRaisesRegex(ConfigError, "no rule Stale: there are Queue"):
            load_config({"EXIT_WHEN": "Stale,Down"})

    def test_version_help_and_a_wrong_option(self):
        code, out, _ = self.run_main("--version")
        self.assertEqual((code, out), (0, f"{health_check.__version__}\n"))
        with mock.patch.object(health_check, "__doc__", None):
            # As under -OO.
            code, out, _ = self.run_main("--help")
        self.assertEqual((code, "None" in out), (0, False))
        for setting in health_check.SETTINGS:
            self.assertIn(f"  {setting.name} ", out)
        for argv in (["--nonsense"], ["--onc"], ["--once", "--demo"], ["--query"]):
            code, out, err = self.run_main(*argv)
            self.assertEqual((code, out), (2, ""))
            self.assertIn("usage: ", err)

    def test_the_server_of_the_demo_hangs_while_it_is_idle(self):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Simulation)
        self.addCleanup(server.server_close)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        self.addCleanup(server.shutdown)
        url = f"http://127.0.0.1:{server.server_port}"
        environ = {"METRICS_ENDPOINT": url, "CANARY_URL": url, "CANARY_TIMEOUT": "1"}
        config = load_config({**environ, "CANARY_BODY": '{"max_tokens": 1}'})
        for seconds, running in (70, "3"), (100, "0"), (139.95, "0"):
            with mock.patch.object(health_check, "STARTED", time.time() - seconds):
                self.assertIn(f'"demo"}} {running}\n', get(server.server_port)[1])
                quick = config._replace(canary_timeout=0.02 if seconds == 100 else 2.0)
                found = ask_canary(quick, config.canary_url, "")
                self.assertEqual(found.success, seconds != 100)

    def test_the_demo_needs_nothing_and_answers(self):
        port = str(free_port())
        process = self.launch("--demo", APP_PORT=port)
        self.assertEqual(self.port_of(process), int(port))
        status, body = get(int(port))
        self.assertIn((status, body), [(200, "Healthy\n"), (503, "Unhealthy\n")])
        self.assertIn("QueueFull", get(int(port), "/health?verbose")[1])
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(20), 0)
        self.assertIn(f"curl -i localhost:{port}/health\n", process.stdout.read())


if __name__ == "__main__":
    unittest.main()
