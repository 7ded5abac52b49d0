"""The built-in rules over pages that real servers have served, at a fake clock.

A page that stands still is a server that hangs; one whose counters go on is not.
"""

from __future__ import annotations

import fnmatch
import io
import re
import unittest
from pathlib import Path
from typing import Iterable, Iterator

import health_check as hc

PAGES = Path(hc.__file__).resolve().parent.parent / "shared" / "expositions"
FILES = sorted(PAGES.glob("*.prom"))
CONFIG = hc.load_config({})
WANTED = hc.lookbacks(rule.expr for rule in CONFIG.rules)
OWN = (("instance", "server:1"),)
FORMAT = hc.format_for(WANTED, OWN)
START = hc.Verdict(0, "", 0.0, 0.0)
MOVING = {
    name
    for server in hc.SERVERS
    for name in re.sub(r"\{.*?\}", "", f"{server.moving} {server.prefill}").split()
}
MINUTES = 9
STALL = ("Stalling", "Stalled")
# What each page makes fire that stands still from the first check on; else nothing.
STANDING: dict[tuple[str, ...], str] = {
    ("QueueFull", *STALL): """
        dynamo-*-mocker-worker-busy litellm-proxy-stopped-*-busy llama-server-*-busy-*
        lmdeploy-*-20-waiting max-*-busy-* mlserver-?.?.?-busy mosec-?.?.?-busy
        ray-serve-* sglang-*-busy-40-* triton-*-busy-15-* vllm-0.26-h200-busy-512
        vllm-0.26-h200-long-prefill vllm-0.32-dp2-engine0-stopped vllm-*-busy-50-*
    """,
    STALL: """
        dynamo-*-streams dynamo-*-one-stream-* litellm-1*-stopped-busy
        litellm-1*-stopped-idle-asked llamacpp-*-busy max-*-stopped-midflight
        mlserver-*-stopped-busy mlserver-*-stopped-idle-asked mosec-*-stopped-busy
        mosec-*-stopped-idle-asked nim-* sglang-*-long-prefill sglang-*-rendered-busy
        sglang-*-stopped-* tgi-3.3-constructed triton-*-pytriton-process-stopped-*
        triton-trtllm-readme vllm-*-hung-kernel-* vllm-0.32-busy vllm-*-draining
        vllm-*-engine-stopped-midflight vllm-0.32.0-long-prefill
        vllm-*-three-streams-running
    """,
    ("NoModel", *STALL): "dynamo-*-frontend-stopped-300s",
    ("NoModel",): "smg-*-worker-killed-* vllm-router-*-worker-killed-*",
    ("QueueFull",): "bentoml-*-busy smg-*-busy xinference-?.?.?-busy",
}
# What comes when these numbers rise, by how much, and nothing else does.
RISES: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("vllm-0.26-h200-hung-from-idle", "http_requests_total", 8, ("Unanswered",)),
    ("vllm-0.26-h200-hung-from-idle", "http_requests_total", 1, ()),
    (
        "vllm-0.32.0-engine-stopped-while-idle-then-asked",
        'http_requests_total{.*status="2xx"}', 3, ("Unanswered",),
    ),
    (
        "vllm-0.32.0-api-server-count-2-engine-stopped-idle", "http_requests_total", 3,
        ("Unanswered",),
    ),
    ("vllm-0.32.0-disable-log-stats", "http_requests_total", 9, ()),
    ("vllm-0.32.0-draining", 'http_requests_total{.*status="5xx"}', 3,
     ("Failing", *STALL)),
    ("vllm-0.32-idle", "vllm:request_success_total", 3, ()),
    (
        "max-26.7.0-model-worker-stopped-while-idle-then-asked",
        'maxserve_request_count_total{code="499"', 3, ("Unanswered",),
    ),
    (
        "sglang-0.5.23-scheduler-stopped-while-idle-then-asked",
        "sglang:num_aborted_requests_total", 3, ("Unanswered", *STALL),
    ),
    (
        "sglang-0.5.23-idle-before-first-request",
        'sglang:http_responses_total{endpoint="/health"', 9, (),
    ),
    (
        "triton-pytriton-0.7.0-stub-stopped-while-idle-then-asked",
        'nv_inference_request_failure{.*"BACKEND"', 3, ("Failing",),
    ),
    (
        "triton-pytriton-0.7.0-stub-stopped-while-idle-then-asked",
        'nv_inference_request_failure{.*"CANCELED"', 9, (),
    ),
    (
        "mosec-0.9.8-stopped-default-timeout-8-asked",
        'mosec_service_throughput_total{code="408"', 8, ("Failing",),
    ),
    ("smg-1.13.0-worker-killed-80s", 'smg_http_responses_total{.*"503"', 9,
     ("NoModel", "Failing")),
    (
        "vllm-router-0.1.17-worker-killed-80s",
        'vllm_router_cb_outcomes_total{.*"failure"', 9, ("NoModel", "Failing"),
    ),
    ("infinity-hang-0.0.78-thread-hangs", "http_requests_total", 9, ()),
    ("kserve-hang-0.21.0-predict-hangs", "request_preprocess_seconds_count", 9, ()),
    ("litserve-0.2.19-stopped-idle-asked", "litserve_active_requests", 9, ()),
    ("litellm-1.106.12-idle-before", "litellm_total_users", 9, ()),
)  # fmt: skip

# States of which no page was captured: what is other on one that was, and what comes.
SLEEPS = 'vllm:engine_sleep_state{.*"awake"'
MADE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm-0.32-idle", "vllm:num_requests_waiting{ = 6", STALL),
    ("vllm-0.32-idle", f"{SLEEPS} = 0; vllm:num_requests_waiting{{ = 6", ()),
    ("vllm-0.32-dp2", "vllm:num_requests_(?:running|waiting){ = 0", ()),
    ("sglang-0.5.23-scheduler-stopped-midflight",
     "sglang:num_(?:queue|running)_reqs{ = 0; sglang:http_requests_active{ = 0", ()),
    ("dynamo-1.6.1-frontend-8-streams",
     "dynamo_frontend_(?:inflight|queued)_requests{ = 8", ()),
    ("dynamo-1.6.1-frontend-8-streams",
     "dynamo_frontend_inflight_requests{ = 0; dynamo_frontend_model_ready{ = 0",
     ("NoModel",)),
    ("max-26.7.0-busy-20-requests-4-slots", "maxserve_num_requests_.* = 0", ()),
    ("llama-server-0.6.0-dev-bin11434-sleeping", "llamacpp:requests_deferred = 3",
     STALL),
    ("bentoml-1.4.40-busy", "bentoml_service_request_in_progress{ = 7", ()),
    ("xinference-4.1.0-busy", "xinference:model_serve_count{ = 4", ()),
    ("litellm-1.106.12-busy", "litellm_in_flight_requests = 1", ()),
    ("tgi-3.3-constructed", "tgi_queue_size = 30", ("QueueFull", *STALL)),
    ("tei-opea-docs", "te_queue_size = 30", ("QueueFull", *STALL)),
    ("nim-datadog-fixture", "num_requests_waiting{ = 30", ("QueueFull", *STALL)),
    ("vllm-router-0.1.17-busy", "vllm_router_worker_health{ = 0", ("NoModel",)),
)


class Rules:
    """The built-in rules over a page at each check."""

    def __init__(self) -> None:
        self.judge = hc.Judge(CONFIG, (), warn=lambda messages: [*messages])
        self.verdict = START

    def check(self, text: str, every: float = 10.0) -> set[str]:
        """Return which rules fire when the target shows this text."""
        now = self.verdict.time + every
        stream = hc.Stream("text/plain", io.BytesIO(text.encode()).readinto)
        reading = hc.read_samples(stream, FORMAT, {})
        scrape = hc.Scrape(hc.TargetStatus("server:1"), OWN, reading)
        check = hc.Check(now, 1e9 + now)
        self.verdict = self.judge.verdict_of(check, ([scrape], ()), self.verdict)
        errors = [status.error for status in self.verdict.rules if status.error]
        if errors:
            raise AssertionError(errors)
        return {s.rule.name for s in self.verdict.rules if s.state == "firing"}

    def since(self, texts: Iterable[str], every: float = 10.0) -> dict[str, float]:
        """Return after how long each rule began to fire, of those that still do."""
        found: dict[str, float] = {}
        start = self.verdict.time + every
        for text in texts:
            firing = self.check(text, every)
            found = {k: v for k, v in found.items() if k in firing}
            for name in firing:
                found.setdefault(name, self.verdict.time - start)
        return found


def page(name: str) -> str:
    """Return a page as it was served, whole lines of it."""
    text = (PAGES / f"{name}.prom").read_text("utf-8")
    return text if text.endswith("\n") or not text else f"{text}\n"


def risen(text: str, pattern: str, count: float) -> str:
    """Return a page on which the series that match have risen."""
    return re.sub(
        rf"(?m)^(?={pattern})([^#\n]*[ }}])(\S+)$",
        lambda line: f"{line[1]}{float(line[2]) + count}",
        text,
    )


def made(text: str, changes: str) -> str:
    """Return a page on which the series that match have other values."""
    for change in changes.split("; "):
        pattern, _, value = change.rpartition(" = ")
        text, count = re.subn(
            rf"(?m)^(?={pattern})([^#\n]*[ }}])\S+$", rf"\g<1>{value}", text
        )
        if not count:
            raise AssertionError(change)
    return text


def going_on(text: str, checks: int) -> Iterator[str]:
    """Yield a page at each check, on which all that may move does."""
    names = "|".join(sorted(MOVING))
    for count in range(checks):
        yield risen(text, rf"(?:{names})[{{ ]", count / 1024)


def expected(name: str) -> tuple[str, ...]:
    """Return what fires for a page that stands still."""
    for rules, patterns in STANDING.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split()):
            return rules
    return ()


@unittest.skipUnless(FILES, "../shared/expositions is not there")
class Pages(unittest.TestCase):
    """The right rule fires, or none."""

    def test_each_page_as_that_of_a_server_that_stands_still(self) -> None:
        after = {"QueueFull": 30.0, "NoModel": 30.0, "Stalling": 90.0, "Stalled": 310.0}
        for file in FILES:
            with self.subTest(file.stem):
                since = Rules().since([page(file.stem)] * 6 * MINUTES)
                wanted = {name: after[name] for name in expected(file.stem)}
                self.assertEqual(since, wanted)

    def test_each_page_as_that_of_a_server_that_works(self) -> None:
        for file in FILES:
            with self.subTest(file.stem):
                firing = set(Rules().since(going_on(page(file.stem), 6 * MINUTES)))
                self.assertEqual(firing, {*expected(file.stem)} - {*STALL})

    def test_what_killed_workers_left_in_a_gauge_is_no_queue_for_ever(self) -> None:
        for name, gauge in (
            ("bentoml-1.4.40-busy", "bentoml_service_request_in_progress"),
            ("xinference-4.1.0-busy", "xinference:model_serve_count"),
        ):
            with self.subTest(name):
                judged, left = Rules(), risen(page(name), gauge, 15)
                self.assertEqual(judged.since([left] * 6), {"QueueFull": 30})
                self.assertEqual(judged.since([left] * 66), {})

    def test_each_page_of_a_state_that_was_not_captured(self) -> None:
        for name, changes, rules in MADE:
            with self.subTest(name, changes=changes):
                text = made(page(name), changes)
                self.assertEqual(set(Rules().since([text] * 6 * MINUTES)), {*rules})

    def test_what_rises_alone(self) -> None:
        for name, pattern, count, rules in RISES:
            with self.subTest(name, pattern=pattern, count=count):
                judged, text = Rules(), page(name)
                more = risen(text, pattern, count)
                self.assertNotEqual(more, text)
                before = judged.since([text] * 34)
                since = judged.since([more] * 9)
                self.assertEqual(set(since), {*rules})
                for rule in {*rules} - {*before}:
                    self.assertLessEqual(since[rule], 30)

    def test_each_page_is_that_of_a_known_server_or_says_nothing(self) -> None:
        strangers = ("infinity", "litserve", "jetstream", "tei-520", "vllm-help",
                     "triton-docs", "vllm-0.32.0-disable-log-stats", "sglang-dp8",
                     "kserve-*-idle-before")  # fmt: skip
        for file in FILES:
            names = set(re.findall(r"(?m)^[\w:]+", page(file.stem)))
            known = [server.name for server in hc.servers_there(names)]
            strange = any(fnmatch.fnmatch(file.stem, f"{s}*") for s in strangers)
            accepted = file.stem.endswith("accept-of-the-checker")
            with self.subTest(file.stem, known=known):
                self.assertEqual(bool(known), not strange and not accepted)
                if accepted:
                    near = hc.nearest_server(names)
                    self.assertIn(near and near.name, ("SGLang", "LMDeploy"))


if __name__ == "__main__":
    unittest.main()
