"""health_check.py beside the servers it watches.

The captured expositions are read by prometheus_client's parser too, and stalls happen
to a Monitor whose clock the tests move.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple, Tuple
from unittest import mock

from prometheus_client.parser import text_string_to_metric_families

import health_check as hc

PROGRAM = Path(hc.__file__).resolve()
CAPTURES = PROGRAM.parent.parent / "shared" / "expositions"
FILES = sorted(CAPTURES.glob("*.prom"))
needs_captures = unittest.skipUnless(FILES, "../shared/expositions is not there")

Labels = Tuple[Tuple[str, str], ...]
Series = Dict[Labels, float]
Values = Dict[str, "float | str | None"]
STORM: subprocess.Popen[str]


def setUpModule() -> None:
    """Start what takes longest beside the other tests."""
    global STORM  # noqa: PLW0603 - the fixture of this module
    STORM = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "storm"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parent)},
    )


def tearDownModule() -> None:
    """End it, whatever became of the tests."""
    STORM.kill()
    STORM.communicate()


# -- What the tests share -------------------------------------------------------------


class Metrics:
    """A server whose page a test changes."""

    def __init__(self, body: bytes = b"", kind: str = "text/plain") -> None:
        metrics = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = metrics.body
                self.send_response(200)
                self.send_header("Content-Type", metrics.kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.body, self.kind = body, kind
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.instance = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.instance}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Clock:
    """A clock that stands until a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Page:
    """An exposition in which a test replaces values.

    A series is meant by its name and some of its labels; the value None removes it.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.rstrip("\n").split("\n")
        self._series = [set(*parse(line)) for line in self.lines]
        self._found: dict[str, list[int]] = {}

    def find(self, series: str) -> list[int]:
        """Return the numbers of the lines of a series."""
        if series not in self._found:
            (wanted,) = parse(f"{series} 0")
            self._found[series] = [
                number
                for number, labels in enumerate(self._series)
                if set(wanted) <= labels
            ]
            if not self._found[series]:
                raise AssertionError(f"{series} is not on the page")
        return self._found[series]

    def render(self, values: Values) -> bytes:
        """Return the page with other values."""
        lines = list(self.lines)
        for series, value in values.items():
            for number in self.find(series):
                text = self.lines[number].rpartition(" ")[0]
                # A line that says nothing takes the place of one that is removed.
                lines[number] = "#" if value is None else f"{text} {value}"
        return "\n".join([*lines, ""]).encode()


def shortened(text: str) -> str:
    """Return a page without comments and buckets, which no default rule reads."""
    return re.sub(r"(?m)^(?:#|[^{\n]*_bucket\{).*\n", "", text)


def parse(text: str, **added: str) -> Series:
    """Return the series that prometheus_client reads in a text.

    The comments are left out: they make it rename counters.  As in Prometheus an empty
    label is none, bounds are numbers, the first of two samples counts, and an added
    label moves the own.
    """
    plain = "".join(f"{x}\n" for x in text.split("\n") if not x.startswith("#"))
    series: Series = {}
    for family in text_string_to_metric_families(plain):
        for sample in family.samples:
            labels = {
                k: hc.normalize_bound(v) if k in ("le", "quantile") else v
                for k, v in sample.labels.items() if v
            }  # fmt: skip
            own = {f"exported_{k}" if k in added else k: v for k, v in labels.items()}
            pairs = {"__name__": sample.name, **own, **added}
            series.setdefault(tuple(sorted(pairs.items())), float(sample.value))
    return series


def comparable(series: Series) -> dict[Labels, str]:
    """Return series whose values are equal also where they are NaN."""
    return {labels: repr(value) for labels, value in series.items()}


def run_main(*argv: str, **environ: str) -> tuple[int, str, str]:
    """Run the program in this process; return its status, stdout and stderr."""
    logger = logging.getLogger("health_check")
    kept = logger.handlers[:], logger.propagate, logger.level
    out, err = io.StringIO(), io.StringIO()
    known = {setting.name for setting in hc.SETTINGS}
    clean = {k: v for k, v in os.environ.items() if k not in known}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, clean, clear=True))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        os.environ.update(environ)
        try:
            status = hc.main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
    logger.handlers[:], logger.propagate = kept[:2]
    logger.setLevel(kept[2])
    return status, out.getvalue(), err.getvalue()


def get(port: int, path: str) -> tuple[int, str, str]:
    """Return the status, the head and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        head = f"HTTP/1.1 {response.status} {response.reason}\n{response.headers}"
        return response.status, head, response.read().decode()


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def captured(name: str) -> str:
    """Return the text of a capture; nothing if there are none."""
    return (CAPTURES / name).read_text("utf-8") if FILES else ""


class ServerTest(unittest.TestCase):
    """Things that end with the test."""

    def setUp(self) -> None:
        self.log = logging.getLogger("health_check")
        self.log.handlers[:], self.log.propagate = [logging.NullHandler()], False

    def metrics(self, body: bytes = b"", kind: str = "text/plain") -> Metrics:
        server = Metrics(body, kind)
        self.addCleanup(server.close)
        return server

    def serve(self, **environ: str) -> int:
        """Answer as the program does; return the port."""
        monitor = hc.Monitor(hc.load_config({"METRICS_TIMEOUT": "10", **environ}))
        listener = hc.listen("127.0.0.1", 0)
        port = int(listener.getsockname()[1])
        server = hc.Server(listener, monitor)
        thread = threading.Thread(target=server.run)
        monitor.start()
        thread.start()
        self.addCleanup(monitor.stop)
        self.addCleanup(server.close)
        self.addCleanup(thread.join)
        self.addCleanup(server.stop)
        return port


# -- 1. The captured expositions ------------------------------------------------------

PYTHON = "text/plain; version=1.0.0; charset=utf-8"
CLASSIC = "text/plain; version=0.0.4"
CLASSIC_UTF8 = "text/plain; version=0.0.4; charset=utf-8"
BARE = "text/plain; charset=utf-8"


class Kind(NamedTuple):
    """A kind of server: how it serves its page, and what rules ask of it."""

    content_type: str
    series: tuple[str, ...]


VLLM = Kind(
    PYTHON,
    tuple(
        f"vllm:{name}"
        for name in (
            "num_requests_waiting",
            "num_requests_running",
            "kv_cache_usage_perc",
            "gpu_cache_usage_perc",
            "iteration_tokens_total_count",
            "generation_tokens_total",
            "prompt_tokens_total",
        )
    ),
)
TRTLLM = (
    *(
        f'nv_trt_llm_request_metrics{{request_type="{kind}"}}'
        for kind in ("waiting", "scheduled", "active")
    ),
    'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}',
    'nv_trt_llm_general_metrics{general_type="iteration_counter"}',
)
TRITON = (
    "nv_inference_pending_request_count",
    "nv_inference_exec_count",
    "nv_inference_count",
)
# The first prefix that a file's name begins with.
KINDS = {
    "vllm": VLLM,
    "ray-vllm": Kind(CLASSIC_UTF8, tuple(f"ray_{name}" for name in VLLM.series)),
    "dynamo": Kind(
        CLASSIC,
        (
            "dynamo_frontend_queued_requests",
            "dynamo_frontend_inflight_requests",
            "dynamo_frontend_output_tokens_total",
            "dynamo_component_requests_total",
            *VLLM.series,
        ),
    ),
    "sglang": Kind(
        PYTHON,
        (
            "sglang:num_queue_reqs",
            "sglang:num_running_reqs",
            "sglang:token_usage",
            "sglang:realtime_tokens_total",
            "sglang:inter_token_latency_seconds_count",
        ),
    ),
    "tgi": Kind(
        BARE,
        ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_inference_success",
         "tgi_batch_inference_count"),
    ),
    "llamacpp": Kind(
        CLASSIC,
        ("llamacpp:requests_deferred", "llamacpp:requests_processing",
         "llamacpp:kv_cache_usage_ratio", "llamacpp:n_decode_total"),
    ),
    "nim": Kind(
        CLASSIC_UTF8,
        ("num_requests_waiting", "num_requests_running", "gpu_cache_usage_perc",
         "generation_tokens_total", "prompt_tokens_total"),
    ),
    "triton-trtllm": Kind(BARE, TRTLLM + TRITON),
    "triton": Kind(BARE, TRITON),
    "lmdeploy": Kind(
        CLASSIC_UTF8,
        ("lmdeploy:num_requests_waiting", "lmdeploy:num_requests_running",
         "lmdeploy:gpu_cache_usage_perc", "lmdeploy:generation_tokens_total",
         "lmdeploy:iteration_tokens_total_count"),
    ),
    "tei": Kind(BARE, ("te_queue_size", "te_embed_count", "te_predict_count")),
    "torchserve": Kind(
        CLASSIC_UTF8,
        ("QueueTime", "ts_inference_requests_total", "GPUMemoryUtilization"),
    ),
    "jetstream": Kind(
        CLASSIC_UTF8,
        ("jetstream_prefill_backlog_size", "jetstream_slots_used_percentage",
         "jetstream_request_success_count_total", "num_requests_waiting"),
    ),
}  # fmt: skip
def kind_of(file: Path) -> Kind:
    """Return the kind of server that a file comes from."""
    kinds = (k for prefix, k in KINDS.items() if file.name.startswith(prefix))
    return next(kinds, Kind(CLASSIC_UTF8, ()))


@needs_captures
class CapturedExpositions(ServerTest):
    """The values are those that prometheus_client reads from the same files."""

    def test_every_series_of_every_file(self) -> None:
        server = self.metrics()
        for file in FILES:
            text = file.read_text("utf-8")
            server.body, server.kind = text.encode(), kind_of(file).content_type
            theirs = parse(text, instance=server.instance)
            names = {dict(labels)["__name__"] for labels in theirs}
            config = hc.load_config({"METRICS_ENDPOINT": server.url})
            added = (("instance", server.instance),)
            deadline = time.monotonic() + 10
            with self.subTest(file=file.name), hc.open_stream(
                config.metrics_endpoint[0], deadline
            ) as stream:
                ours = hc.read_samples(stream, hc.format_for(names, added), {}).samples
                self.assertEqual(comparable(ours), comparable(theirs))

    def test_query_gives_the_metrics_that_rules_are_about(self) -> None:
        server, found = self.metrics(), set()
        for file in FILES:
            text, kind = file.read_text("utf-8"), kind_of(file)
            server.body, server.kind = text.encode(), kind.content_type
            everything = parse(text, instance=server.instance)
            for selector in kind.series:
                (wanted,) = parse(f"{selector} 0")
                theirs = {k: v for k, v in everything.items() if set(wanted) <= set(k)}
                found.update({selector} if theirs else ())
                with self.subTest(file=file.name, selector=selector):
                    status, out, err = run_main(
                        "--query", selector, METRICS_ENDPOINT=server.url
                    )
                    # No output is an answer, also where a whole page is empty.
                    self.assertEqual(status, 0)
                    self.assertEqual(err, "") if theirs else self.assertRegex(
                        err, r"\A(warning: \w+: no series of .*\n)?\Z"
                    )
                    lines = re.sub(r"(?m) => (\S+) @\[\d+\.\d+\]$", r" \1", out)
                    self.assertEqual(out.count("\n"), len(theirs))
                    self.assertEqual(comparable(parse(lines)), comparable(theirs))
        for file in FILES:
            kind = kind_of(file)
            some = found.intersection(kind.series) or "docs" in file.name
            nothing = not kind.series or not parse(file.read_text())
            self.assertTrue(some or nothing, file.name)


# -- 2. Stalled -----------------------------------------------------------------------

# The rule's five minutes without progress.
STALLED_AFTER = 300
Firing = Dict[int, "set[Labels]"]
Sequence = Callable[[int], bytes]


def sequence_of(page: Page, values: Callable[[int], Values]) -> Sequence:
    """Return a page that has other values in each second."""
    return lambda at: page.render(values(at))


@contextlib.contextmanager
def in_process(pages: dict[str, Callable[[], bytes]]) -> Iterator[None]:
    """Make targets of functions: what is scraped is what they return, without HTTP."""

    @contextlib.contextmanager
    def stream(target: hc.Target, *_: object) -> Iterator[hc.Stream]:
        body = io.BytesIO(pages[target.instance]())
        yield hc.Stream(CLASSIC, body.readinto)

    with mock.patch.object(hc, "open_stream", stream):
        yield


def watch(sequences: dict[str, Sequence], step: int, seconds: int) -> dict[str, Firing]:
    """Check each so many seconds; return for which series Stalled fired, and when.

    Each sequence is a target of one Monitor with the default rules.
    """
    clock, start = Clock(), Clock.now
    hosts = [f"host{number}:1" for number in range(len(sequences))]
    environ = {
        "METRICS_ENDPOINT": ",".join(f"http://{host}/metrics" for host in hosts),
        "METRICS_TIMEOUT": "60",
    }
    pages = {
        host: functools.partial(lambda sequence: sequence(int(clock() - start)), page)
        for host, page in zip(hosts, sequences.values())
    }
    firing: dict[str, Firing] = {name: {} for name in sequences}
    monitor = hc.Monitor(hc.load_config(environ), clock=clock)
    with in_process(pages):
        monitor.scraper.start()
        for at in range(0, seconds + 1, step):
            clock.now = start + at
            alerts = stalled(monitor.check())
            for host, name in zip(hosts, sequences):
                firing[name][at] = {a for a in alerts if ("instance", host) in a}
        monitor.stop()
    return firing


def stalled(verdict: hc.Verdict) -> set[Labels]:
    """Return the series that Stalled fires for; all targets must have answered."""
    reasons = {(t.instance, t.reason) for t in verdict.targets if t.reason}
    if reasons or not verdict.targets:
        raise AssertionError(f"{verdict.reason}: {reasons}")
    (status,) = (s for s in verdict.rules if s.rule.name == "Stalled")
    if status.error:
        raise AssertionError(status.error)
    return {a.labels for a in status.alerts if a.state == "firing"}


def engine(number: int, busy: bool, tokens: int, prompts: int, cache: float) -> Values:
    """Return what one engine of vLLM says of itself."""
    running, waiting = (4, 23) if busy else (0, 0)
    values = {
        "num_requests_running": running,
        "num_requests_waiting": waiting,
        "generation_tokens_total": tokens,
        "iteration_tokens_total_count": tokens // 2,
        "prompt_tokens_total": prompts,
        "kv_cache_usage_perc": cache,
    }
    return {f'vllm:{name}{{engine="{number}"}}': v for name, v in values.items()}


def moving(number: int, at: int) -> Values:
    """Return an engine that generates."""
    cache = 0.1 + at % 50 / 100
    return engine(number, True, 100 + 40 * at, 20 + at // 3, cache)


def frozen(number: int, since: int, at: int) -> Values:
    """Return an engine that generates, until it hangs."""
    return moving(number, min(at, since))


def still(number: int, busy: bool = False) -> Values:
    """Return an engine that does nothing."""
    return engine(number, busy, 6682, 20, 0.0 if not busy else 0.0083)


def absent(number: int, *names: str) -> Values:
    """Return values that take series away."""
    return {f'vllm:{name}{{engine="{number}"}}': None for name in names}


FROZEN_AT = 30
NEVER_STALLED: dict[str, Callable[[int], Values]] = {
    "idle": lambda at: {**still(0), **still(1)},
    "busy": lambda at: {**moving(0, at), **moving(1, at)},
    "one idle, one busy": lambda at: {**still(0), **moving(1, at)},
    "a token each 100 s": lambda at: {
        **engine(0, True, 7 + at // 100, 20, 0.5),
        **moving(1, at),
    },
    "long prefill, prompt tokens move": lambda at: {
        **engine(0, True, 7, 20 + 2048 * (at // 60), 0.5),
        **moving(1, at),
    },
    "long prefill, cache use moves": lambda at: {
        **engine(0, True, 7, 20, at // 100 / 100),
        **moving(1, at),
    },
    "prompt tokens and cache use in turn": lambda at: {
        **engine(0, True, 7, (at + 100) // 200, at // 200 / 100),
        **moving(1, at),
    },
    "just started, compiling for 70 s": lambda at: {
        **(still(0, busy=True) if at < 70 else moving(0, at)),
        **moving(1, at),
    },
    "just started, no counters for 70 s": lambda at: {
        **moving(0, at),
        **(absent(0, "generation_tokens_total", "prompt_tokens_total") if at < 70
           else {}),
        **still(1),
    },
    "idle, then 170 s of silent prefill": lambda at: {
        **(still(0, busy=at > 100) if at < 270 else moving(0, at)),
        **still(1),
    },
    "restarted, then compiling": lambda at: {
        **(moving(0, at) if at < 100 else engine(0, True, 0, 0, 0.0) if at < 170
           else moving(0, at - 170)),
        **moving(1, at),
    },
    "silent for 280 s": lambda at: {
        **(frozen(0, 30, at) if at < 310 else moving(0, at)),
        **moving(1, at),
    },
}  # fmt: skip
STALLED: dict[str, Callable[[int], Values]] = {
    "frozen": lambda at: {**frozen(0, FROZEN_AT, at), **moving(1, at)},
    "frozen, the other idle": lambda at: {**frozen(0, FROZEN_AT, at), **still(1)},
    "frozen, nothing running": lambda at: {
        **frozen(0, FROZEN_AT, at),
        'vllm:num_requests_running{engine="0"}': 0,
        **moving(1, at),
    },
    "frozen, nothing waiting": lambda at: {
        **frozen(0, FROZEN_AT, at),
        'vllm:num_requests_waiting{engine="0"}': 0,
        **moving(1, at),
    },
    "frozen, the queue grows": lambda at: {
        **frozen(0, FROZEN_AT, at),
        'vllm:num_requests_waiting{engine="0"}': at,
        **moving(1, at),
    },
    "frozen, the other drains": lambda at: {
        **frozen(0, FROZEN_AT, at),
        **(moving(1, at) if at < 200 else still(1)),
    },
}


class StalledTest(ServerTest):
    """How Stalled is judged."""

    def assert_fires(self, firing: Firing, step: int, **labels: str) -> None:
        """Assert that it fires from its time on, for the series with these labels."""
        due = FROZEN_AT + STALLED_AFTER
        for at, alerts in firing.items():
            if at < due - step:
                self.assertEqual(alerts, set(), f"after {at} s")
            elif at > due + step:
                self.assertEqual(len(alerts), 1, f"after {at} s: {alerts}")
                (alert,) = alerts
                self.assertLessEqual(set(labels.items()), set(alert))

    def assert_never(self, firing: Firing) -> None:
        """Assert that it does not fire."""
        first = {at: alerts for at, alerts in firing.items() if alerts}
        self.assertEqual(dict(list(first.items())[:1]), {})


@needs_captures
class StallsOfVLLM(StalledTest):
    """Stalled fires for what hangs, after its time, and for nothing else."""

    @functools.cached_property
    def dp2(self) -> Page:
        """The page of vLLM with two engines."""
        return Page(shortened(captured("vllm-0.32-dp2.prom")))

    def test_vllm_does_not_fire_for_what_goes_on(self) -> None:
        sequences = {k: sequence_of(self.dp2, v) for k, v in NEVER_STALLED.items()}
        for step, seconds in ((1, 400), (10, 900)):
            for name, firing in watch(sequences, step, seconds).items():
                with self.subTest(name, step=step):
                    self.assert_never(firing)

    def test_vllm_fires_for_the_frozen_engine_alone(self) -> None:
        sequences = {k: sequence_of(self.dp2, v) for k, v in STALLED.items()}
        for step, seconds in ((1, 345), (10, 700), (60, 700)):
            for name, firing in watch(sequences, step, seconds).items():
                with self.subTest(name, step=step):
                    self.assert_fires(firing, step, engine="0")

    def test_it_stops_when_the_engine_goes_on(self) -> None:
        resumes = sequence_of(
            self.dp2,
            lambda at: {
                **(moving(0, at) if at >= 350 else frozen(0, FROZEN_AT, at)),
                **moving(1, at),
            },
        )
        for step in (1, 10):
            firing = watch({"": resumes}, step, 700)[""]
            self.assertTrue(firing[340])
            self.assert_never({at: found for at, found in firing.items() if at >= 350})

    def test_both_engines(self) -> None:
        both = sequence_of(
            self.dp2, lambda at: {**frozen(0, 100, at), **frozen(1, 200, at)}
        )
        firing = watch({"": both}, 10, 600)[""]
        engines = [[dict(a)["engine"] for a in firing[at]] for at in (380, 450, 550)]
        self.assertEqual([sorted(e) for e in engines], [[], ["0"], ["0", "1"]])

    def test_as_captured_over_http(self) -> None:
        going = Page(captured("vllm-0.32-dp2.prom"))
        stopped = Page(captured("vllm-0.32-dp2-engine0-stopped.prom"))
        tokens = 'vllm:generation_tokens_total{engine="%d"}'

        def page(at: int) -> bytes:
            if at < FROZEN_AT:
                return going.render({tokens % 0: at, tokens % 1: at})
            # Engine 1 goes on to the captured 36506, and is idle then.
            return stopped.render({tokens % 1: min(36506, 8361 + 90 * at)})

        for step in (1, 10):
            server, clock, firing = self.metrics(kind=PYTHON), Clock(), {}
            config = hc.load_config(
                {"METRICS_ENDPOINT": server.url, "METRICS_TIMEOUT": "10"}
            )
            monitor = hc.Monitor(config, clock=clock)
            monitor.scraper.start()
            self.addCleanup(monitor.stop)
            for at in range(0, 345, step):
                server.body, clock.now = page(at), Clock.now + at
                firing[at] = stalled(monitor.check())
            self.assert_fires(firing, step, engine="0", instance=server.instance)


class Family(NamedTuple):
    """A kind of server: its page, and its series by what they say."""

    page: str
    busy: tuple[str, ...]
    progress: tuple[str, ...]
    prefill: tuple[str, ...]
    labels: dict[str, str]

    def values(self, at: int, busy: bool, moves: int, prefills: int) -> Values:
        """Return a page whose progress stands at a count."""
        return {
            **dict.fromkeys(self.busy, 3 if busy else 0),
            **dict.fromkeys(self.progress, moves),
            **{name: scaled(name, prefills) for name in self.prefill},
        }


def scaled(name: str, count: int) -> float:
    """Return a count as the metric of that name has it: cache use is a fraction."""
    return count / 10000 if "usage" in name or "utilization" in name else count


def scenario(family: Family, name: str) -> Callable[[int], Values]:
    """Return a sequence of one family by its name."""
    of = family.values
    return {
        "idle": lambda at: of(at, False, 900, 90),
        "busy": lambda at: of(at, True, 900 + 7 * at, 90 + at),
        "long prefill": lambda at: of(at, True, 900, 90 + at // 30),
        "compiling for 70 s": lambda at: of(at, True, max(0, at - 70), 0),
        "no counters for 70 s": lambda at: {
            **of(at, True, 900 + at, 90),
            **(dict.fromkeys(family.progress + family.prefill) if at < 70 else {}),
        },
        "frozen": lambda at: of(at, True, 900 + min(at, FROZEN_AT), 90),
        "frozen while waiting": lambda at: {
            **of(at, True, 900 + min(at, FROZEN_AT), 90),
            family.busy[0]: 0,
        },
    }[name]


STORIES = (
    "idle",
    "busy",
    "long prefill",
    "compiling for 70 s",
    "no counters for 70 s",
    "frozen",
    "frozen while waiting",
)


VLLM_OLD = 'vllm:num_requests_running{model_name="m"} 0\n' + "".join(
    f'vllm:{name}{{model_name="m"}} 0\n'
    for name in ("num_requests_waiting", "generation_tokens_total",
                 "prompt_tokens_total", "gpu_cache_usage_perc")
)  # fmt: skip
PIDS = "".join(
    f'vllm:{name}{{engine="0",model_name="m"{pid}}} 0\n'
    for name, pids in {
        "num_requests_running": [""],
        "num_requests_waiting": [""],
        "generation_tokens_total": [""],
        "kv_cache_usage_perc": [',pid="273"', ',pid="274"'],
    }.items()
    for pid in pids
)
SGLANG = captured("sglang-0.5.23-rendered-busy.prom")
# Two ranks on one page, as of --dp-size 2.
RANKS = "".join(
    line.replace("{", f'{{dp_rank="{rank}",') + "\n"
    for rank in (0, 1)
    for line in SGLANG.split("\n")
    if re.match("sglang:(num_running_reqs|num_queue_reqs|realtime_tokens_total){", line)
)
PRIORITIES = "".join(
    line.replace("{", f'{{priority="{priority}",') + "\n"
    for priority in ("", "1", "2")
    for line in SGLANG.split("\n")
    if re.match("sglang:(num_running_reqs|num_queue_reqs){", line)
) + "".join(
    line + "\n"
    for line in SGLANG.split("\n")
    if line.startswith("sglang:realtime_tokens_total{")
)
TGI = captured("tgi-3.3-constructed.prom") + (
    "# TYPE tgi_batch_inference_success counter\n"
    'tgi_batch_inference_success{method="prefill"} 1\n'
    'tgi_batch_inference_success{method="decode"} 292\n'
)
TRTLLM_SERVE = "".join(
    f'trtllm_{name}{{engine_type="undefined",model_name="m"}} 0\n'
    for name in ("num_requests_running", "num_requests_waiting",
                 "kv_cache_gen_alloc_blocks_total", "num_requests_completed_total",
                 "kv_cache_utilization")
)  # fmt: skip
DYNAMO = "".join(
    f'dynamo_frontend_{name}{{model="m"}} 0\n'
    for name in ("inflight_requests", "queued_requests", "output_tokens_total")
)
FAMILIES = {
    "vLLM V0": Family(
        VLLM_OLD,
        ("vllm:num_requests_running", "vllm:num_requests_waiting"),
        ("vllm:generation_tokens_total",),
        ("vllm:gpu_cache_usage_perc",),
        {"model_name": "m"},
    ),
    "vLLM, cache use by pid": Family(
        PIDS,
        ("vllm:num_requests_running", "vllm:num_requests_waiting"),
        ("vllm:generation_tokens_total",),
        ('vllm:kv_cache_usage_perc{pid="273"}',),
        {"model_name": "m"},
    ),
    "SGLang": Family(
        SGLANG,
        ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
        ('sglang:realtime_tokens_total{mode="decode"}',),
        ('sglang:realtime_tokens_total{mode="prefill_compute"}',),
        {"model_name": "Qwen/Qwen3-8B"},
    ),
    "TGI": Family(
        TGI,
        ("tgi_batch_current_size", "tgi_queue_size"),
        ('tgi_batch_inference_success{method="decode"}',),
        ('tgi_batch_inference_success{method="prefill"}',),
        {},
    ),
    "llama.cpp": Family(
        captured("llamacpp-0c1e570-busy.prom"),
        ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        ("llamacpp:n_decode_total",),
        (),
        {},
    ),
    "NIM": Family(
        captured("nim-datadog-fixture.prom"),
        ("num_requests_running", "num_requests_waiting"),
        ("generation_tokens_total",),
        ("prompt_tokens_total", "gpu_cache_usage_perc"),
        {},
    ),
    "Triton with TensorRT-LLM": Family(
        captured("triton-trtllm-readme.prom"),
        TRTLLM[1:2] + TRTLLM[:1] + TRTLLM[2:3],
        (TRTLLM[-1],),
        (),
        {"model": "tensorrt_llm"},
    ),
    "trtllm-serve": Family(
        TRTLLM_SERVE,
        ("trtllm_num_requests_running", "trtllm_num_requests_waiting"),
        ("trtllm_kv_cache_gen_alloc_blocks_total",),
        ("trtllm_num_requests_completed_total", "trtllm_kv_cache_utilization"),
        {"model_name": "m"},
    ),
    "LMDeploy": Family(
        captured("lmdeploy-1263d5c-rendered-idle.prom"),
        ("lmdeploy:num_requests_running", "lmdeploy:num_requests_waiting"),
        ("lmdeploy:generation_tokens_total",),
        ("lmdeploy:prompt_tokens_total", "lmdeploy:gpu_cache_usage_perc"),
        {},
    ),
    "Dynamo": Family(
        DYNAMO,
        ("dynamo_frontend_inflight_requests",),
        ("dynamo_frontend_output_tokens_total",),
        (),
        {"model": "m"},
    ),
}


@needs_captures
class StallsOfOtherServers(StalledTest):
    """The same for each server with a series that moves during generation."""

    def test_each_fires_for_what_is_frozen_alone(self) -> None:
        for name, family in FAMILIES.items():
            page, labels = Page(shortened(family.page)), family.labels
            needs = {
                "long prefill": family.prefill,
                "frozen while waiting": family.busy[1:],
            }
            stories = [story for story in STORIES if needs.get(story, True)]
            sequences = {s: sequence_of(page, scenario(family, s)) for s in stories}
            for step, seconds in ((1, 340), (10, 700)):
                for story, firing in watch(sequences, step, seconds).items():
                    with self.subTest(name, story=story, step=step):
                        if story.startswith("frozen"):
                            # Triton says twice that it is busy, in two series.
                            one = {at: set(list(a)[:1]) for at, a in firing.items()}
                            self.assert_fires(one, step, **labels)
                        else:
                            self.assert_never(firing)

    def test_one_rank_of_sglang(self) -> None:
        def ranks(at: int) -> Values:
            names = ("num_running_reqs", "num_queue_reqs", "realtime_tokens_total")
            counts = {"0": (4, 2, min(at, FROZEN_AT)), "1": (4, 2, at)}
            return {
                f'sglang:{name}{{dp_rank="{rank}"}}': value
                for rank, values in counts.items()
                for name, value in zip(names, values)
            }

        sequences = {"": sequence_of(Page(RANKS), ranks)}
        for step in (1, 10):
            firing = watch(sequences, step, 340)[""]
            self.assert_fires(firing, step, dp_rank="0")

    def test_sglang_with_priorities(self) -> None:
        def busy(at: int) -> Values:
            return {"sglang:num_running_reqs": 2, "sglang:realtime_tokens_total": at}

        def hangs(at: int) -> Values:
            return busy(min(at, FROZEN_AT))

        page = Page(PRIORITIES)
        sequences = {"b": sequence_of(page, busy), "h": sequence_of(page, hangs)}
        firing = watch(sequences, 10, 900)
        self.assert_never(firing["b"])
        self.assertEqual(
            [bool(firing["h"][at]) for at in (310, 350, 900)], [False, True, True]
        )


# -- 3. A storm -----------------------------------------------------------------------

STORM_CHECKS, STORM_RULES = 100_000, (
    "last_over_time(queue[5m]) > 1e9; count_over_time(tokens_total[5m]) > 1e9"
)  # fmt: skip
MIB = 1 << 20


def resident() -> int:
    """Return how much memory this process has."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def storm() -> dict[str, int]:
    """Check 100,000 times, 20 times a second; return what memory that took.

    The values change each time, and one label every thousand checks.
    """
    clock, count = Clock(), 0

    def page() -> bytes:
        series = f'tokens_total{{pod="{count // 1000}"}}'
        return f"queue {count * 0.37}\n{series} {count}\n".encode()

    environ = {"METRICS_ENDPOINT": "http://host:1/", "METRICS_TIMEOUT": "60"}
    config = hc.load_config({**environ, "UNHEALTHY_WHEN": STORM_RULES})
    monitor = hc.Monitor(config, clock=clock, wall=clock)
    unhealthy = most_series = most_points = before = 0
    # A smaller buffer, to spend the time on checks.
    with in_process({"host:1": page}), mock.patch.object(hc, "CHUNK", 4096):
        monitor.scraper.start()
        for count in range(STORM_CHECKS):
            if count == 1000:
                before = resident()
            clock.now += 0.05
            unhealthy += not monitor.check().healthy
            if count % 1000 == 999:
                history = monitor.judge.history.evaluation(0.0, 0.0).history
                points = [p for s in history.values() for p in s.values()]
                most_series = max(most_series, len(points))
                most_points = max(most_points, *(len(p.values) for p in points))
        monitor.stop()
    return {
        "checks": count + 1,
        "unhealthy": unhealthy,
        "grown": resident() - before,
        "series": most_series,
        "points": most_points,
    }


class StormsOfRequests(ServerTest):
    """History and memory have a bound."""

    def test_100000_checks_with_a_range_of_5_minutes(self) -> None:
        out, _ = STORM.communicate(timeout=240)
        found = json.loads(out)
        self.assertEqual((found["checks"], found["unhealthy"]), (STORM_CHECKS, 0))
        # Of a range 512 samples are kept, and 32 of the shortest: of up, which Down
        # reads, that are most.  What is out of a range goes a sixteenth at once.
        most = 32 * 600 // 31 + 1
        self.assertLessEqual(found["points"], most + most // 16 + 16 + 2)
        self.assertGreater(found["points"], 400)
        # A pod lasts 50 s, and is remembered for 5 minutes: eight are there at most,
        # beside the queue and what a scrape adds.
        self.assertLessEqual(found["series"], 8 + 1 + 4)
        self.assertLess(found["grown"], 2 * MIB)

    def test_1000_requests_over_http(self) -> None:
        server = self.metrics()
        port = self.serve(METRICS_ENDPOINT=server.url, UNHEALTHY_WHEN=STORM_RULES)
        before = 0
        for count in range(1000):
            if count == 400:
                before = resident()
            server.body = f"queue {count}\ntokens_total {count}\n".encode()
            self.assertEqual(get(port, "/health")[0], 200)
        self.assertLess(resident() - before, 2 * MIB)


if __name__ == "__main__":
    logging.getLogger("health_check").addHandler(logging.NullHandler())
    print(json.dumps(storm()))
