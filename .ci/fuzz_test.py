"""health_check.py reads what nobody would write: three targets, for minutes.

The targets run beside each other, each in a process of its own:

    reader    an exposition gives the samples it was made from, however it is cut into
              pieces; other bytes give samples or a ScrapeError
    parser    a text is rules or a PromQLError; rules are written as text that gives
              them again
    handler   bytes on a connection get an answer in plain text, or a close

A failure prints the command that repeats it.  FUZZ_SECONDS is the time of all cores
together, FUZZ_SEED where to begin.
"""

from __future__ import annotations

import errno
import faulthandler
import itertools
import logging
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import unittest
from typing import Any, Callable, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import health_check as hc

SECONDS = float(os.environ.get("FUZZ_SECONDS", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(31)
LONGEST = 1.0


class Target(NamedTuple):
    """What to feed, and what has to hold for it."""

    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]


def quick(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function gives, after a second of CPU at most."""
    started = time.thread_time()
    try:
        return function(*arguments)
    finally:
        spent = time.thread_time() - started
        if spent > LONGEST:
            raise AssertionError(f"{spent:.1f} s: {arguments!r:.1000}")


# -- The reader of expositions ---------------------------------------------------------

WANTED = "x", "x_total", "xy", "vllm:x", "a.b", 'q"\n'
OTHERS = "z", "x_", "x:", "xyz", "ax", "vllm:", "upx"
PLAIN = re.compile(r"[a-zA-Z_:][\w:]*\Z", re.ASCII)
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
FORMAT = hc.format_for(WANTED, ())

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('\\"\n{},=# \u2028\0\r'),
    max_size=12,
)
blanks = st.sampled_from(["", " ", "\t", "  \t "])
label_names = st.from_regex(r"[a-zA-Z_]\w{0,5}", fullmatch=True).filter(str.isascii)
values = st.floats() | st.integers(-(10**20), 10**20).map(float)


class Line(NamedTuple):
    """A line of an exposition, and the sample that it is."""

    text: str
    labels: Any = ()
    value: float = 0.0


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


@st.composite
def sample_lines(draw: Callable[..., Any]) -> Line:
    """A sample in one of the many ways to write it."""
    name = draw(st.sampled_from(WANTED + OTHERS))
    labels = draw(st.dictionaries(label_names | texts.filter(bool), texts, max_size=4))
    labels.pop("__name__", None)
    pairs = [
        f"{draw(blanks)}{key if PLAIN.match(key) and ':' not in key else quoted(key)}"
        f"{draw(blanks)}={draw(blanks)}{quoted(value)}{draw(blanks)}"
        for key, value in labels.items()
    ]
    inside = not PLAIN.match(name) or draw(st.booleans())
    if inside:
        pairs.insert(0, quoted(name))
    comma = "," if pairs and draw(st.booleans()) else ""
    braces = f"{{{','.join(pairs)}{comma}{draw(blanks)}}}" if pairs or comma else ""
    value = draw(values)
    number = {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, repr(value))
    timestamp = draw(st.sampled_from(["", "", " 1700000000000", "\t0 "]))
    text = f"{'' if inside else name}{braces} {draw(blanks)}{number}{timestamp}\n"
    kept = {key: text for key, text in {**labels, "__name__": name}.items() if text}
    return Line(text, tuple(sorted(kept.items())) if name in WANTED else (), value)


comments = st.sampled_from(
    ["\n", " \t\n", "# x 1\n", "# TYPE x gauge\n", '# HELP x a "quoted {text\n', "#\n"]
).map(Line)
pages = st.lists(sample_lines() | comments, max_size=12)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)
fragments = st.sampled_from(
    [
        b"x", b"xy", b"{", b"}", b'"', b"\\", b",", b"=", b" ", b"\t", b"\n", b"#",
        b"\xff", b"\r", b"\0", b"5", b"1e5", b"NaN", b"+Inf", b"# EOF\n", b"null",
        b'{"x"', b'a="b"', b"x 1\n", b'x{a="b"} 1\n', b"vllm:x", b"up 1\n", b"_", b"-",
        "\u2028".encode(), b"\xef\xbb\xbf", b"<html>", b"# TYPE x gauge\n", b"# {} 1",
    ]
)  # fmt: skip
junk = st.lists(
    st.tuples(fragments | st.binary(max_size=4), st.integers(0, 5) | st.just(3000)).map(
        lambda pair: pair[0] * pair[1]
    ),
    max_size=25,
).map(b"".join)
junk_pages = st.tuples(
    junk,
    pages.map(lambda page: "".join(line.text for line in page).encode()),
    st.integers(0, 400),
).map(lambda t: t[1][: t[2]] + t[0] + t[1][t[2] :])


def read(body: bytes, kind: str, pieces: list[int]) -> Any:
    """Return the samples of a body that arrives in pieces, or why there are none."""
    sizes_, at = itertools.cycle(pieces), 0

    def readinto(view: memoryview) -> int:
        nonlocal at
        piece = body[at : at + min(next(sizes_), len(view))]
        view[: len(piece)] = piece
        at += len(piece)
        return len(piece)

    try:
        reading = quick(hc.read_samples, hc.Stream(kind, readinto), FORMAT, {}, True)
    except hc.ScrapeError as error:
        return error.reason
    return {labels: repr(value) for labels, value in reading.samples.items()}


def check_page(drawn: Any) -> None:
    """A page gives the samples it was made from; the first of a series counts."""
    page, pieces = drawn
    body = "".join(line.text for line in page).encode()
    expected: dict[Any, str] = {}
    for line in page:
        if line.labels:
            expected.setdefault(line.labels, repr(line.value))
    for kind, end in (("text/plain", b""), (OPENMETRICS, b"# EOF\n")):
        for whole in (body + end, (body + end).rstrip(b"\n")):
            found = read(whole, kind, pieces)
            if found != expected and whole.strip():
                raise AssertionError(f"{whole!r}\n{kind}\n{found}\n{expected}")


def check_junk(drawn: Any) -> None:
    """Any pieces give the same; a cut changes no value.  So it is for its mutants."""
    body, pieces, cut, openmetrics = drawn
    kind = OPENMETRICS if openmetrics else "text/plain"
    check_cuts(body, kind, pieces, cut)
    chance = random.Random(cut)
    for _ in range(20 if 0 < len(body) < 2000 else 0):
        at, width = chance.randrange(len(body)), chance.randrange(4)
        new = bytes([chance.choice(body), chance.choice(b'x{}",= \t\n#\\15.e+-_:')])
        mutant = body[:at] + new[: chance.randrange(3)] + body[at + width :]
        check_cuts(mutant, kind, pieces, chance.randrange(len(body)))


def check_cuts(body: bytes, kind: str, pieces: list[int], cut: int) -> None:
    found = read(body, kind, [1 << 20])
    if len(body) < 4000 and read(body, kind, pieces) != found:
        raise AssertionError(f"{body!r} {kind}: {found}, but in pieces not")
    # Of a number in the last line a part may be left.
    part = read(body[: body.rfind(b"\n", 0, cut) + 1], kind, [1 << 20])
    if isinstance(found, dict) and isinstance(part, dict):
        for labels, value in part.items():
            if found.get(labels) != value:
                raise AssertionError(f"{body!r} cut at {cut}: {part}, not {found}")


def check_reader(drawn: tuple[Any, ...]) -> None:
    (check_page if len(drawn) == 2 else check_junk)(drawn)


# -- The parser of rules ---------------------------------------------------------------

FUNCTIONS = (
    "rate increase irate delta idelta changes resets avg_over_time min_over_time "
    "max_over_time sum_over_time count_over_time last_over_time present_over_time"
).split()
OPERATORS = "+ - * / % ^ == != > < >= <= and or unless".split()
TOKENS = [
    *FUNCTIONS, *OPERATORS, "\n",
    *"( ) { } [ ] , : ; = =~ !~ # by without on ignoring".split(),
    *"for keep_firing_for bool sum min max avg count group absent abs scalar".split(),
    *"vector time timestamp histogram_quantile clamp_min clamp_max round le".split(),
    *"offset @ group_left group_right label_replace topk quantile stddev".split(),
    *"[5m:1m] [5m:] [1h:90s] predict_linear label_join count_values atan2".split(),
    *"[5m+1m] (?i) alert: - step() histogram_fraction clamp hour </ 2.5d".split(),
    *"x vllm:x up Inf NaN 1 0 0.5 1e3 0x1f 5m 1h30m 30s [5m] Name: 1_000 .5 5.".split(),
    '"a"', "'b'", "`c`", '"\\n"', '"\\x41"', '"\\u00e9"', '"', "'", "\\", '{a="b"}',
    '{a=~"(?i)b(?-i:c)(?P<d>e)"}',
    '{a=~"b|c"}', '{a=~"(a+)+"}', '{a!~"[^a-z]{2,3}?"}', '{a=~"("}', "\u2028", "\0",
]  # fmt: skip
soup = st.lists(
    st.tuples(st.sampled_from(TOKENS) | texts, st.sampled_from(["", " ", "\n"])),
    max_size=30,
).map(lambda pairs: "".join(map("".join, pairs)))
deep = st.tuples(
    st.sampled_from(["(", "-", "sum(", "x + ", "x and (", "{", '"', 'x{a=~"', "1 ^ "]),
    st.integers(0, 3000),
    soup,
).map(lambda t: t[0] * t[1] + t[2])

matchers = st.builds(
    "{}{}{}".format,
    label_names,
    st.sampled_from(["=", "!=", "=~", "!~"]),
    st.sampled_from(['"a"', "'b|c'", '""', '".*"', '"[a-z]+x?"', '"(a|b)*c{2,3}"']),
)
metric_names = st.sampled_from(["x", "vllm:x", "up", "sum", "by", "x_total", "a:b:c"])
selectors = st.builds(
    lambda name, pairs: f"{name}{{{', '.join(pairs)}}}" if pairs else name,
    metric_names,
    st.lists(matchers, max_size=3),
)
durations = st.sampled_from(["5m", "1h30m", "30s", "500ms", "1d", "2w", "90"])
numbers = st.sampled_from(["1", "0.5", "-3", "1e3", "0x1f", "Inf", "NaN", ".5", "-Inf"])
groupings = st.builds(
    "{} ({})".format,
    st.sampled_from(["by", "without"]),
    st.lists(label_names, max_size=2).map(", ".join),
)


PARAMETER, SIDES = ("topk", "bottomk", "quantile"), ("group_left", "group_right")
replacements = st.sampled_from(["", "$$", "é", "\\n", "${1}"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions of expressions; not all of them are of the right types."""
    sums = st.sampled_from("sum min max avg count group".split())
    matching = st.sampled_from(["", "bool ", "on (a) ", "ignoring (a, b) ", "on () "])
    calls = st.sampled_from(
        "abs ceil floor round timestamp absent scalar vector".split()
    )
    return st.one_of(
        st.builds(
            "{} {} {}{}".format, inner, st.sampled_from(OPERATORS), matching, inner
        ),
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("-{}".format, inner),
        st.builds("{} {} ({})".format, sums, groupings, inner),
        st.builds("{}({}) {}".format, sums, inner, groupings),
        st.builds("{}({})".format, calls, inner),
        st.builds("clamp_max({}, {})".format, inner, numbers),
        st.builds("max_over_time(({})[{}:{}])".format, inner, durations, durations),
        st.builds("{}({}, {})".format, st.sampled_from(PARAMETER), numbers, inner),
        st.builds("{} * on (a) {} (b) {}".format, inner, st.sampled_from(SIDES), inner),
        st.builds(
            'label_replace({}, "a", "$1{}", "b", "(.*)")'.format, inner, replacements
        ),
        st.builds("histogram_quantile({}, {})".format, numbers, inner),
    )


ranges = st.builds(
    "{}({}[{}])".format, st.sampled_from(FUNCTIONS), selectors, durations
)
moments = st.sampled_from(["", "", " offset 5m", " offset -1h30m", " @ 1.5", " @ -3"])
looking_back = st.builds("{}{}".format, selectors | ranges, moments)
expressions = st.recursive(looking_back | numbers, larger, max_leaves=6)
rules = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "Name: ", "_a9: "]),
    expressions,
    st.sampled_from(["", " for 5m", " for 90", " for 0s"]),
    st.sampled_from(["", " keep_firing_for 1h30m", " keep_firing_for 500ms"]),
)
rule_texts = rules | st.one_of(
    soup, deep, texts, rules, st.lists(rules, max_size=3).map("; ".join)
)


def check_parser(text: str) -> None:
    try:
        found = quick(hc.parse_rules, text)
    except hc.PromQLError as error:
        if len(str(error)) > 2000:
            raise AssertionError(f"{text!r}: an error of {len(str(error))}") from error
        return
    written = "\n".join(map(hc.format_rule, found))
    again = quick(hc.parse_rules, written)
    # NaN is not itself.
    if repr(again) != repr(found):
        raise AssertionError(f"{text!r}\n{written!r}\n{again}\n{found}")


# -- The handler of requests -----------------------------------------------------------

pieces_of_requests = st.sampled_from(
    [
        b"GET ", b"HEAD ", b"POST ", b"/", b"/health", b"/health/Q", b"/livez",
        b"/metrics", b"?verbose", b"?format=json", b"&exclude=Q", b"?", b"%", b"%00",
        b"#", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/0.9", b" HTTP/2.0", b" HTTP/", b" ",
        b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n",
        b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b":", b"\t",
        b"Expect: 100-continue\r\n", b"Connection: keep-alive\r\n", b"A: b\r\n b\r\n",
        b"http://", b"[", b"@", b"\0", b"\xff", b"\x1b[2J", b"\x16\x03\x01", b";",
        "\u2028".encode(), b"=?utf-8?q?=41?=", b"From ", b"exclude=", b"..", b"//",
    ]
)  # fmt: skip
request_junk = st.lists(
    st.tuples(
        pieces_of_requests | st.binary(max_size=6),
        st.sampled_from([1, 1, 1, 1, 2, 150, 5000]),
    ).map(lambda pair: pair[0] * pair[1]),
    max_size=20,
).map(b"".join)
requests = st.tuples(
    st.sampled_from([b"", b"GET /health", b"GET /health HTTP/1.1\r\n", b"GET / "]),
    request_junk,
    st.sampled_from([b"", b"\r\n\r\n", b" HTTP/1.1\r\n\r\n", b"\n\n"]),
).map(b"".join)


class Faults(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class Served:
    """A server of the program, in threads of this process."""

    def __init__(self) -> None:
        self.faults = Faults()
        logging.getLogger("health_check").handlers[:] = [self.faults]
        logging.getLogger("health_check").propagate = False
        logging.getLogger("health_check").setLevel("DEBUG")
        config = hc.load_config(
            {
                "METRICS_ENDPOINT": "http://127.0.0.1:9/metrics",
                "UNHEALTHY_WHEN": "Q: x",
                "SCRAPE_INTERVAL": "60",
            }
        )  # fmt: skip
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        monitor = hc.Monitor(config)
        monitor.start()
        serve = hc.Server(listener, monitor).run
        threading.Thread(target=serve, daemon=True).start()
        self.check(b"GET /health HTTP/1.1\r\n\r\n")

    def check(self, request: bytes) -> None:
        started, answer = time.monotonic(), b""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 20) as sock:
                sock.sendall(request)
                sock.shutdown(socket.SHUT_WR)
                while True:
                    data = sock.recv(65536)
                    if not data:
                        break
                    answer += data
        except OSError as error:
            # It was closed with more on its way.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
        spent = time.monotonic() - started
        good = re.match(rb"HTTP/1\.1 [2345]\d\d [\w -]+\r\n", answer) or not answer
        if self.faults.lines or not good or spent > 10 * LONGEST:
            raise AssertionError(
                f"{request!r}\n{answer!r}\n{spent} s {self.faults.lines}"
            )
        if answer.count(b"\r\nContent-Length: ") > 1 or b"Traceback" in answer:
            raise AssertionError(f"{request!r}\n{answer!r}")


# -- The runs --------------------------------------------------------------------------

TARGETS: dict[str, Callable[[], Target]] = {
    "reader": lambda: Target(
        st.tuples(pages, sizes)
        | st.tuples(junk_pages, sizes, st.integers(0, 2000), st.booleans()),
        check_reader,
    ),
    "parser": lambda: Target(rule_texts, check_parser),
    "handler": lambda: Target(requests, Served().check),
}


def fuzz(name: str, first: int, seconds: float) -> None:
    """Feed a target for some seconds, with another seed for each round."""
    target, count, end = TARGETS[name](), 0, time.monotonic() + seconds

    def example(drawn: Any) -> None:
        nonlocal count
        count += 1
        # Tells where it hangs, even inside a regular expression.
        faulthandler.dump_traceback_later(60, exit=True)
        target.check(drawn)

    rounds = settings(
        max_examples=300, database=None, deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    for number in itertools.count(first):
        try:
            rounds(seed(number)(given(target.strategy)(example)))()
        except BaseException:
            print(f"to repeat it: python .ci/fuzz_test.py {name} {number} 1")
            raise
        if time.monotonic() > end:
            break
    faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {count} examples, FUZZ_SEED={first} to {number}")


class Fuzz(unittest.TestCase):
    """Each target runs beside the others; a test waits for one of them."""

    @classmethod
    def setUpClass(cls) -> None:
        seconds = SECONDS / min(os.cpu_count() or 1, len(TARGETS))
        cls.runs = {
            name: subprocess.Popen(
                [sys.executable, __file__, name, str(SEED), str(seconds)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for name in TARGETS
        }  # fmt: skip
        for run in cls.runs.values():
            assert run.stdout
            cls.addClassCleanup(run.stdout.close)
            cls.addClassCleanup(run.wait)
            cls.addClassCleanup(run.kill)

    def wait_for(self, name: str) -> None:
        said = self.runs[name].communicate()[0]
        self.assertEqual(self.runs[name].returncode, 0, said[-20000:])
        print(said.strip())

    def test_reader(self) -> None:
        self.wait_for("reader")

    def test_parser(self) -> None:
        self.wait_for("parser")

    def test_handler(self) -> None:
        self.wait_for("handler")


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
