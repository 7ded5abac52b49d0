"""When a canary is sent, and what the default rules make of its answers.

A simulated vLLM serves its page and answers over HTTP; the clock is moved by hand.
"""

from __future__ import annotations

import http.server
import logging
import threading
import time
import unittest
from typing import Any, Callable

import health_check as hc

ANSWER = b'{"choices": [{"text": " the"}]}'
EACH = 10


class Engine:
    """A server whose metrics a test sets; it answers unless it hangs."""

    def __init__(self, **values: float) -> None:
        engine = self
        self.values = {
            "vllm:num_requests_running": 0.0,
            "vllm:num_requests_waiting": 0.0,
            "vllm:generation_tokens_total": 1000.0,
            "vllm:prompt_tokens_total": 500.0,
            "vllm:kv_cache_usage_perc": 0.0,
            'http_requests_total{handler="/v1/completions",status="2xx"}': 100.0,
            **values,
        }
        self.hangs = self.counts_nothing = False
        self.asked = 0
        self.resumed = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pairs = engine.values.items()
                self.reply("".join(f"{k} {v}\n" for k, v in pairs).encode())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                engine.asked += 1
                if engine.hangs:
                    # A client that gives up is counted as if it had been answered.
                    engine.resumed.wait(0.1)
                    engine.add("http_requests_total", 1)
                    return
                if not engine.counts_nothing:
                    engine.add("generation_tokens_total", 1)
                    engine.add("http_requests_total", 1)
                self.reply(ANSWER)

            def reply(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def add(self, name: str, more: float) -> None:
        for known in self.values:
            if name in known:
                self.values[known] += more

    def close(self) -> None:
        self.resumed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class CanaryTest(unittest.TestCase):
    """Checks each ten seconds of a clock that stands still between them."""

    def setUp(self) -> None:
        logging.getLogger("health_check").handlers[:] = [logging.NullHandler()]
        logging.getLogger("health_check").propagate = False

    def engine(self, **values: float) -> Engine:
        engine = Engine(**values)
        self.addCleanup(engine.close)
        return engine

    def monitor(self, engine: Engine, **environ: str) -> hc.Monitor:
        self.now = 1000.0
        config = hc.load_config({
            "METRICS_ENDPOINT": f"{engine.url}/metrics", "METRICS_TIMEOUT": "5",
            "CANARY_URL": f"{engine.url}/v1/completions", "CANARY_TIMEOUT": "0.05",
            "METRIC_THRESHOLD": "20", **environ,
        })  # fmt: skip
        monitor = hc.Monitor(config, clock=lambda: self.now)
        monitor.scraper.start()
        assert monitor.canary
        monitor.canary.start()
        self.addCleanup(monitor.stop)
        return monitor

    def watch(
        self, monitor: hc.Monitor, seconds: int,
        step: Callable[[int], object] = lambda at: None, each: int = EACH,
    ) -> dict[str, int]:
        """Check for so long; return when each rule began to fire."""
        began: dict[str, int] = {}
        assert monitor.canary
        for at in range(0, seconds, each):
            step(at)
            verdict = monitor.check()
            for name in verdict.failing_rules():
                began.setdefault(name, at)
            if verdict.healthy and began:
                began.setdefault("Healthy", at)
            end = time.monotonic() + 5
            while not monitor.canary.answered() and time.monotonic() < end:
                time.sleep(0.001)
            self.now += each
        return began

    def test_an_engine_that_hangs_while_idle_is_found_and_seen_to_recover(self) -> None:
        engine = self.engine()
        engine.hangs = True
        monitor = self.monitor(engine)
        began = self.watch(monitor, 15 * 60)
        self.assertEqual(list(began), ["Unresponsive"])
        self.assertLessEqual(began["Unresponsive"], 300 + 180)
        self.assertEqual(engine.asked, 10)
        engine.hangs = False
        self.assertLessEqual(self.watch(monitor, 120)["Healthy"], 70)

    def test_gauges_that_stand_still_are_no_alarm_where_it_answers(self) -> None:
        standing = {"vllm:num_requests_running": 50, "vllm:num_requests_waiting": 15}
        engine = self.engine(**standing)
        engine.counts_nothing = True
        self.assertEqual(self.watch(self.monitor(engine), 3600), {})
        self.assertLessEqual(engine.asked, 13)
        engine = self.engine(**standing)
        self.assertEqual(self.watch(self.monitor(engine), 3600), {})

    def test_they_are_one_while_requests_are_not_answered(self) -> None:
        engine = self.engine(
            **{"vllm:num_requests_running": 50, "vllm:num_requests_waiting": 15}
        )
        engine.hangs = True
        began = self.watch(self.monitor(engine), 600)
        self.assertLessEqual(began["Stalling"], 100)
        self.assertLessEqual(began["Stalled"], 360)
        self.assertNotIn("Unanswered", began)
        self.assertGreater(began["Unresponsive"], began["Stalled"])

    def test_a_stall_just_after_a_canary_is_seen_in_time(self) -> None:
        engine = self.engine()
        monitor = self.monitor(engine)
        self.assertEqual(self.watch(monitor, 320), {})
        self.assertEqual(engine.asked, 1)
        engine.hangs = True
        engine.values["vllm:num_requests_running"] = 4
        began = self.watch(monitor, 600)
        self.assertLessEqual(began["Stalling"], 110)
        self.assertLessEqual(began["Stalled"], 330)

    def test_a_server_at_full_load_is_never_asked(self) -> None:
        engine = self.engine(
            **{"vllm:num_requests_running": 64, "vllm:num_requests_waiting": 15}
        )

        def works(_: int) -> None:
            engine.add("generation_tokens_total", 900)

        self.assertEqual(self.watch(self.monitor(engine), 600, works), {})
        self.assertEqual(engine.asked, 0)

    def test_a_long_prefill_is_no_reason_to_ask(self) -> None:
        engine = self.engine(**{"vllm:num_requests_running": 1})

        def prefills(at: int) -> None:
            engine.values["vllm:kv_cache_usage_perc"] = at / 1000

        self.assertEqual(self.watch(self.monitor(engine), 900, prefills), {})
        self.assertEqual(engine.asked, 0)

    def test_an_idle_day_costs_288_tokens_at_most(self) -> None:
        engine = self.engine()
        self.assertEqual(self.watch(self.monitor(engine), 86400, each=30), {})
        self.assertLessEqual(engine.asked, 288)
        self.assertGreater(engine.asked, 200)

    def test_one_of_two_engines_that_hangs_is_not_hidden_by_the_other(self) -> None:
        engine = self.engine()
        names = list(engine.values.items())
        engine.values = {
            f'{name}{{engine="{n}"}}': value
            for name, value in names for n in (0, 1) if "{" not in name
        }  # fmt: skip
        engine.values['vllm:num_requests_running{engine="0"}'] = 4
        tokens = 'vllm:generation_tokens_total{engine="1"}'

        def other_works(_: int) -> None:
            engine.values[tokens] += 5

        began = self.watch(self.monitor(engine), 400, other_works)
        self.assertEqual(list(began), ["Stalling", "Stalled"])
        self.assertEqual(engine.asked, 0)
        # Idle, it answers the canary for both: only its tokens move.
        del self.now
        engine.add = lambda *_: other_works(0)  # type: ignore[method-assign]
        began = self.watch(self.monitor(engine), 900)
        self.assertLessEqual(began["Stalling"], 100)
        self.assertLessEqual(began["Stalled"], 320)
        self.assertGreater(engine.asked, 0)

    def test_a_server_that_sleeps_on_purpose_is_not_woken(self) -> None:
        awake = 'vllm:engine_sleep_state{sleep_state="awake"}'
        engine = self.engine(**{awake: 0, "vllm:num_requests_waiting": 3})
        self.assertEqual(self.watch(self.monitor(engine), 900), {})
        engine.values["vllm:num_requests_waiting"] = 0
        self.assertEqual(self.watch(self.monitor(engine), 900), {})
        self.assertEqual(engine.asked, 0)

    def test_a_prefill_of_ten_minutes_that_shows_nowhere_is_left_alone(self) -> None:
        engine = self.engine()
        engine.values = {
            "dynamo_frontend_inflight_requests": 1,
            "dynamo_frontend_queued_requests": 1,
            "dynamo_frontend_output_tokens_total": 100,
            "dynamo_frontend_model_ready": 1,
            "dynamo_frontend_disconnected_clients": 0,
        }
        self.assertEqual(self.watch(self.monitor(engine), 700), {})
        self.assertEqual(engine.asked, 0)

    def test_clients_that_give_up_are_told_from_a_canary_that_did(self) -> None:
        engine = self.engine()
        engine.hangs = True
        began = self.watch(self.monitor(engine), 480)
        self.assertEqual(list(began), ["Unresponsive"])

        def gives_up(at: int) -> None:
            if at in (100, 120):
                engine.add("http_requests_total", 1)

        began = self.watch(self.monitor(engine), 480, gives_up)
        self.assertEqual(began["Unanswered"], 120)

    def test_rare_checks_are_no_reason_to_ask(self) -> None:
        engine = self.engine(**{"vllm:num_requests_running": 64})

        def works(_: int) -> None:
            engine.add("generation_tokens_total", 900)

        for each in 1, 60, 299, 300, 301, 900:
            self.watch(self.monitor(engine), 30 * each, works, each)
            self.assertEqual(engine.asked, 0, each)


if __name__ == "__main__":
    unittest.main()
