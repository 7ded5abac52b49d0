"""health_check.py under attack: from the server it reads, its callers and itself.

Each attack runs against the program in a process of its own, by HTTP and signals alone,
so often that what is left behind adds up.  What was seen is printed at the end.
Limits of time are generous, for a machine with other work; the figures are real.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

PROGRAM = Path(os.environ.get("PYTHONPATH", ".").split(":")[0], "health_check.py")
PROGRAM = PROGRAM.resolve()
TIMES = int(os.environ.get("ATTACK_TIMES", "400"))
MINUTE = float(os.environ.get("ATTACK_SECONDS", "60"))
TIMEOUT = 0.05
# Beyond the timeout of a scrape, an answer takes 0.15 s at most; this machine is busy.
SLACK = 2.0
MIB = 1024
SEED = int(os.environ.get("ATTACK_SEED", "0")) or random.SystemRandom().getrandbits(32)

# What could move a cursor or end a line of a log.
CONTROL = re.compile(".{,20}[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e].{,20}")
Answer = Callable[[socket.socket], None]


class Usage(NamedTuple):
    """What a process holds: KiB of memory, its highest, threads, descriptors."""

    rss: int
    peak: int
    threads: int
    fds: int


class Row(NamedTuple):
    """What an attack did."""

    attack: str
    times: int
    seen: str
    worst: float
    before: Usage
    after: Usage

    def __str__(self) -> str:
        kib = [self.before.rss, self.after.rss, self.after.peak]
        memory = " ".join(f"{k / MIB:6.1f}" for k in kib)
        threads = f"{self.before.threads}/{self.after.threads}"
        fds = f"{self.before.fds}/{self.after.fds}"
        time_ = f"{self.worst * 1000:8.1f}" if self.worst else f"{'-':>8}"
        return (
            f"{self.attack[:44]:44} {self.times:6} {time_} {memory} "
            f"{threads:>6} {fds:>8}  {self.seen}"
        )


HEADING = (
    f"{'attack':44} {'times':>6} {'worst ms':>8} {'RSS':>6} {'after':>6} {'peak':>6} "
    f"{'thr.':>6} {'fds':>8}  what was seen"
)
TABLE: list[Row | str] = []


def tearDownModule() -> None:
    print(f"\n{HEADING}", *TABLE, f"ATTACK_SEED={SEED}", sep="\n")


# -- The program, and what asks it -----------------------------------------------------


def receive(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def ask(port: int, request: str | bytes, seconds: float = 20.0) -> bytes:
    """Return all that a port answers until it closes, and how long that took."""
    data = request.encode("latin-1") if isinstance(request, str) else request
    with socket.create_connection(("127.0.0.1", port), seconds) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            return receive(sock)
    return b""


def get(port: int, path: str = "/health") -> tuple[int, str]:
    answer = ask(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head[9:12] or 0), body


def timed(port: int, path: str = "/health") -> tuple[int, float]:
    """Return the status of an answer and the seconds until it came."""
    started = time.monotonic()
    status, _ = get(port, path)
    return status, time.monotonic() - started


def until(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


class Checker:
    """The program, started; its log is in a file."""

    def __init__(
        self,
        *urls: str,
        command: Sequence[str] = (sys.executable, str(PROGRAM)),
        nofile: int = 0,
        environ: dict[str, str] | None = None,
        **settings: str,
    ) -> None:
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - closed below
        base = dict(os.environ) if environ is None else environ
        limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (nofile, nofile))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={
                **base,
                "APP_PORT": "0",
                "APP_HOST": "127.0.0.1",
                "METRICS_ENDPOINT": ",".join(urls) or "http://127.0.0.1:9/metrics",
                "METRICS_TIMEOUT": str(TIMEOUT),
                # Each scrape that fails counts, a timeout at once too.
                "UNHEALTHY_WHEN": "Q: x > 10; Down: up == 0",
                **settings,
            },
            preexec_fn=limit if nofile else None,  # noqa: PLW1509 - takes no lock
        )
        self.pid = self.process.pid
        until(lambda: self._port() or self.process.poll() is not None, 30)
        self.port = self._port()
        if not self.port:
            self.close()
            raise AssertionError(f"it did not start: {self.log}")

    def _port(self) -> int:
        match = re.search(r"is up: port (\d+)", self.log)
        return int(match[1]) if match else 0

    @property
    def log(self) -> str:
        if self._log.closed:
            return self._kept
        return Path(self._log.name).read_text("utf-8", "replace")

    def usage(self) -> Usage:
        status = Path(f"/proc/{self.pid}/status").read_text()
        field = dict(re.findall(r"(\w+):\s+(\d+)", status))
        fds = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
        rss, peak, threads = (int(field[k]) for k in ("VmRSS", "VmHWM", "Threads"))
        return Usage(rss, peak, threads, fds)

    def begin(self) -> Usage:
        """Return the usage, and let the peak begin anew."""
        # A connection closes a moment after its caller has the answer.
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        usages = []
        for _ in range(4):
            time.sleep(0.05)
            usages.append(self.usage())
        return min(usages, key=lambda usage: usage.fds)

    def end(self, before: Usage) -> Usage:
        """Return the usage once threads and descriptors are as before, or never."""
        until(lambda: self.usage()[2:] == before[2:])
        return self.usage()

    def cpu(self) -> float:
        """Return the seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def outcomes(self) -> Counter[str]:
        """Return how many scrapes had which outcome."""
        lines = re.findall(
            r'health_check_scrapes_total\{.*?outcome="(\w+)".*?\} (\d+)',
            get(self.port, "/metrics")[1],
        )
        counts: Counter[str] = Counter()
        for outcome, count in lines:
            counts[outcome] += int(count)
        return counts

    def stop(self) -> int:
        """Return the exit status after SIGTERM."""
        self.process.terminate()
        return self.process.wait(10)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._kept = self.log
        self._log.close()

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- The server that attacks -----------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
# An answer that is taken for good would be Healthy.
FINE, FULL = b"# TYPE x gauge\nx 1\n", b"# TYPE x gauge\nx 11\n"


class Upstream:
    """A server that does to each caller what ``answer`` says, in a thread of its own.

    ``early`` is before the request has been read.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        early: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer, self.early, self.tls = answer, early, tls
        self.callers = 0
        self.requests: deque[bytes] = deque(maxlen=20)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self.instance = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.instance}/metrics"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.callers += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
            stack.callback(plain.close)
            plain.settimeout(60)
            sock = self.tls.wrap_socket(plain, server_side=True) if self.tls else plain
            stack.callback(sock.close)
            if not self.early:
                self.requests.append(read_head(sock))
            self.answer(sock)

    def close(self) -> None:
        # Wakes the thread that accepts, too.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_head(sock: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError
        received += data
    return received


def page(body: bytes, extra: bytes = b"", head: bytes = HEAD) -> bytes:
    return head + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


def sends(*pieces: bytes) -> Answer:
    data = b"".join(pieces)
    return lambda sock: sock.sendall(data)


def resets(*pieces: bytes) -> Answer:
    def answer(sock: socket.socket) -> None:
        sock.sendall(b"".join(pieces))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def waits(*pieces: bytes) -> Answer:
    """Send, then wait until the other end is gone."""

    def answer(sock: socket.socket) -> None:
        sock.sendall(b"".join(pieces))
        while sock.recv(65536):
            pass

    return answer


def drips(before: bytes, data: bytes, pause: float = 0.01) -> Answer:
    """Send a byte at a time, for ever."""

    def answer(sock: socket.socket) -> None:
        sock.sendall(before)
        for byte in itertools.cycle(data):
            sock.sendall(bytes([byte]))
            time.sleep(pause)

    return answer


def pours(before: bytes, block: bytes, count: float = 1e9) -> Answer:
    """Send a block as often as it is taken."""
    block *= max(1, 65536 // len(block)) if count == 1e9 else 1

    def answer(sock: socket.socket) -> None:
        sock.sendall(before)
        for _ in range(int(count)):
            sock.sendall(block)
        while sock.recv(65536):
            pass

    return answer


def speaks_tls(sock: socket.socket) -> None:
    with CERTIFICATES.tls.wrap_socket(sock, server_side=True):
        pass


def redirects(location: str, status: str = "302 Found") -> Answer:
    head = f"HTTP/1.1 {status}\r\nLocation: {location}\r\n".encode()
    return sends(page(FINE, head=head))


OPENSSL = """
[req]
distinguished_name = name
x509_extensions = ca
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[leaf]
subjectAltName = IP:127.0.0.1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


class Certificates:
    """A CA, and what it has signed for a server at 127.0.0.1 and for a client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca, self.key = self._path("ca.pem"), self._path("ca.key")
        (directory / "config").write_text(OPENSSL)
        self._make("ca", "-subj", "/CN=ca")
        for name in ("server", "client"):
            signed = "-CA", self.ca, "-CAkey", self.key, "-subj", f"/CN={name}"
            self._make(name, "-extensions", "leaf", *signed)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self._path("server.pem"), self._path("server.key"))
        self.mutual = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.mutual.load_cert_chain(self._path("server.pem"), self._path("server.key"))
        self.mutual.load_verify_locations(self.ca)
        self.mutual.verify_mode = ssl.CERT_REQUIRED
        self.client, self.client_key = (
            self._path("client.pem"),
            self._path("client.key"),
        )

    def _path(self, name: str) -> str:
        return str(self.directory / name)

    def _make(self, name: str, *options: str) -> None:
        command = "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt".split()
        files = "-keyout", self._path(f"{name}.key"), "-out", self._path(f"{name}.pem")
        command += ["ec_paramgen_curve:prime256v1", *files, *options]
        command += ["-config", self._path("config")]
        subprocess.run(command, check=True, capture_output=True)


CERTIFICATES: Certificates


def setUpModule() -> None:
    global CERTIFICATES  # noqa: PLW0603 - the fixture of this module
    directory = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(directory.cleanup)
    CERTIFICATES = Certificates(Path(directory.name))


class Attack(NamedTuple):
    """What a server does, and what a scrape of it has to say.

    ``seen`` is the expected outcome of each scrape; all of them are Unhealthy.
    """

    name: str
    answer: Answer
    seen: str
    times: int = TIMES
    early: bool = False
    scheme: str = "http"


STATUS = b"HTTP/1.1 200 OK\r\n"
LONG = b"Content-Length: 1000\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
LABEL = b'x{a="%s"} 11\n'
BOMB = gzip.compress(b"# a\n" * 10**6)

# Each waits until the deadline, so they run all at once.
SLOW = (
    Attack("silence after accept", waits(), "timeout", early=True),
    Attack("silence after the status line", waits(STATUS), "timeout"),
    Attack("silence after headers", waits(HEAD, LONG), "timeout"),
    Attack("silence mid-body", waits(HEAD, LONG, FINE), "timeout"),
    Attack("silence mid-chunk", waits(CHUNKED, b"ff\r\n", FINE), "timeout"),
    Attack("silence after the body, no length", waits(HEAD, b"\r\n", FINE), "timeout"),
    Attack("drip in the status line", drips(b"", STATUS[:-2]), "timeout"),
    Attack("drip in the headers", drips(HEAD, b"A: b\r\n"), "timeout"),
    Attack("drip in the body", drips(HEAD + LONG, FINE), "timeout"),
    Attack("drip in the chunk sizes", drips(CHUNKED, b"0"), "timeout"),
    Attack("drip in the chunks", drips(CHUNKED, b"1\r\n\n\r\n"), "timeout"),
    Attack("drip of 100 Continue", drips(b"", INTERIM, 0.0005), "timeout"),
    Attack("TLS: silence after accept", waits(), "timeout|tls", early=True,
           scheme="https"),
    Attack("TLS: drip of a handshake", drips(b"", b"\x16\x03\x03\x40\x00"),
           "timeout|tls", early=True, scheme="https"),
)  # fmt: skip

BROKEN = (
    Attack("reset while connecting", resets(), "reset", early=True),
    Attack("close while connecting", sends(), "reset", early=True),
    Attack("reset in the status line", resets(STATUS[:9]), "reset|bad_http"),
    Attack("reset in the headers", resets(HEAD[:40]), "reset|bad_http"),
    Attack("reset in the body", resets(HEAD, LONG, FINE), "reset"),
    Attack("reset in a chunk", resets(CHUNKED, b"ff\r\n", FINE), "reset|truncated"),
    Attack("close in the status line", sends(STATUS[:9]), "bad_http|reset"),
    Attack("close in the headers", sends(HEAD[:40]), "bad_http|reset|truncated"),
    Attack("endless status line", pours(b"HTTP/1.1 200 ", b"O"), "too_large|bad_http"),
    Attack("endless headers", pours(HEAD, b"A: b\r\n"), "too_large|bad_http"),
    Attack("10,000 headers", pours(HEAD, b"A: b\r\n", 10000), "too_large|bad_http"),
    Attack("a header of 10 MB", pours(HEAD + b"A: ", b"b" * 10**6, 10),
           "too_large|bad_http"),
    Attack("100 Continue for ever", pours(b"", INTERIM), "too_large"),
    Attack("HTTP/0.9", sends(FINE), "bad_http"),
    Attack("garbage", sends(bytes(range(256)) * 9), "bad_http"),
    Attack("SSH", sends(b"SSH-2.0-OpenSSH_9.9\r\n"), "bad_http"),
    Attack("TLS on a plain port", speaks_tls, "reset|bad_http", early=True),
    Attack("plain on a TLS port", sends(page(FINE)), "tls|timeout", early=True,
           scheme="https"),
    Attack("Content-Length too long", sends(HEAD, LONG, FINE), "truncated"),
    Attack("Content-Length of 10^30", sends(HEAD, b"Content-Length: 1" + b"0" * 30,
           b"\r\n\r\n", FULL[:-2]), "truncated|bad_http"),
    Attack("Content-Length of 5,000 digits", sends(HEAD, b"Content-Length: " +
           b"9" * 5000, b"\r\n\r\n", FULL[:-2]), "truncated|bad_http"),
    Attack("Content-Length negative", sends(HEAD, b"Content-Length: -1\r\n\r\n", FINE),
           "bad_http"),
    Attack("Content-Length doubled", sends(page(FINE, LONG[:-2])), "bad_http"),
    Attack("Content-Length equal twice", sends(HEAD, b"Content-Length: 20, 20\r\n\r\n",
           FULL), "success"),
    Attack("Content-Length as a list", sends(HEAD, b"Content-Length: 19, 18\r\n\r\n",
           FINE), "bad_http"),
    Attack("Content-Length of words", sends(HEAD, b"Content-Length: 0x13\r\n\r\n",
           FINE), "bad_http"),
    Attack("a chunk without size", sends(CHUNKED, b"\r\n", FINE), "truncated|bad_http"),
    Attack("a chunk of garbage", sends(CHUNKED, b"xyz\r\n", FINE),
           "truncated|bad_http"),
    Attack("a chunk of negative size", sends(CHUNKED, b"-9\r\n", FINE),
           "truncated|bad_http"),
    Attack("a chunk of huge size", sends(CHUNKED, b"f" * 40, b"\r\n", FINE),
           "truncated|bad_http"),
    Attack("a chunk of a size of Python's", sends(CHUNKED, b"0x13\r\n", FINE,
           b"\r\n0\r\n\r\n"), "bad_http"),
    Attack("a chunk without end", sends(CHUNKED, b"13\r\n", FINE, b"13\r\n"),
           "bad_http"),
    Attack("an endless chunk size", pours(CHUNKED, b"0"), "bad_http|truncated"),
    Attack("gzip unasked for", sends(page(gzip.compress(FULL),
           b"Content-Encoding: gzip\r\n")), "success"),
    Attack("gzip cut", sends(page(gzip.compress(FINE)[:-4],
           b"Content-Encoding: gzip\r\n")), "truncated"),
    Attack("gzip of garbage", sends(page(b"\x1f\x8b\x08" + b"\0" * 10**5,
           b"Content-Encoding: gzip\r\n")), "bad_http"),
    Attack("deflate unasked for", sends(page(b"x\x9c" + b"\0" * 10**5,
           b"Content-Encoding: deflate\r\n")), "bad_http"),
    Attack("gzip that is not said", sends(page(b"\x1f\x8b\x08" + b"\0" * 10**5)),
           "not_metrics"),
    Attack("redirect to another host", redirects("http://127.0.0.2/"), "redirect"),
    Attack("redirect to another port", redirects("http://127.0.0.1:9/"), "redirect"),
    Attack("redirect to another scheme", redirects("https://127.0.0.1/"), "redirect"),
    Attack("redirect to file:", redirects("file:///etc/passwd"), "redirect"),
    Attack("redirect to nowhere", redirects("http://["), "redirect|bad_http"),
    Attack("redirect in a loop", redirects("/metrics"), "redirect"),
    Attack("204", sends(b"HTTP/1.1 204 No Content\r\n\r\n"), "http_status"),
    Attack("206", sends(page(FINE, head=b"HTTP/1.1 206 Part\r\n")), "http_status"),
    Attack("304", sends(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "http_status"),
    Attack("500", sends(page(FINE, head=b"HTTP/1.1 500 Oops\r\n")), "http_status"),
    Attack("a page of HTML", sends(page(b"<!DOCTYPE html><p>x 1\n")), "not_metrics"),
    Attack("type HTML of metrics", sends(page(FULL, head=STATUS +
           b"Content-Type: text/html\r\n")), "success"),
    Attack("a line of HTML that does not end", sends(page(b"<p>x 1")), "not_metrics"),
    Attack("a page of JSON", sends(page(b'{"x": 1}\n')), "not_metrics"),
    Attack("a byte-order mark", sends(page(b"\xef\xbb\xbf" + FULL)), "not_metrics"),
    Attack("CRLF", sends(page(FULL.replace(b"\n", b"\r\n"))), "bad_line"),
    Attack("invalid UTF-8 in a label", sends(page(LABEL % b"\xff\xc0")), "bad_line"),
    Attack("NUL in a value", sends(page(b"x 1\0\n")), "bad_line|not_metrics"),
    Attack("NUL in a label", sends(page(LABEL % b"\0")), "success"),
    Attack("U+2028 in a label", sends(page(LABEL % "\u2028".encode())), "success"),
    Attack("invalid UTF-8 elsewhere", sends(page(FULL + b'y{a="\xff"} 1\n')),
           "success"),
)  # fmt: skip

MASSES = (
    Attack("10 GB without a newline", pours(CHUNKED[:-2] + b"\r\n", b"ffff\r\n" +
           b"#" * 65535 + b"\r\n"), "too_large"),
    Attack("10 GB of newlines", pours(HEAD + b"\r\n", b"\n"), "timeout", TIMES // 4),
    Attack("10 GB of another series", pours(HEAD + b"\r\n# a\n", b"y 1\n"),
           "timeout", TIMES // 4),
    Attack("a million series that are wanted", pours(HEAD + b"\r\n# a\n", b"".join(
           LABEL % b"%d" % n for n in range(10**5)), 10), "too_large", TIMES // 4),
    Attack("one series a million times", pours(HEAD + b"\r\n# a\n", b"x 1\n"),
           "timeout|too_large", TIMES // 4),
    Attack("a line of 100 MB", pours(HEAD + b"\r\n# a\nx", b" " * 10**6, 100),
           "too_large"),
    Attack("a comment of 100 MB", pours(HEAD + b"\r\n# a\n# ", b" " * 10**6, 100),
           "too_large"),
    Attack("a label of 100 MB", pours(HEAD + b'\r\n# a\nx{a="', b"\n" * 10**6, 100),
           "too_large|timeout"),
    Attack("endless chunks of a byte", pours(CHUNKED, b"1\r\n#\r\n"),
           "timeout|too_large", TIMES // 4),
    Attack("a bomb of gzip", pours(HEAD + b"Content-Encoding: gzip\r\n\r\n", BOMB),
           "too_large|timeout", TIMES // 4),
    Attack("endless trailers", pours(CHUNKED + b"13\r\n" + FINE + b"\r\n0\r\n",
           b"A: b\r\n"), "timeout|too_large|bad_http|truncated", TIMES // 4),
)  # fmt: skip


def strike(attack: Attack) -> tuple[Row, str]:
    """Attack a checker; return what it did, and what was wrong with that."""
    with Upstream(sends(page(FINE))) as upstream:
        url = upstream.url.replace("http:", attack.scheme + ":")
        # What needs no deadline has time, on a machine with other work.
        limit = TIMEOUT if "timeout" in attack.seen else 5.0
        with Checker(url, METRICS_TIMEOUT=str(limit)) as checker:
            if attack.scheme == "http":
                until(lambda: get(checker.port)[0] == 200)
            else:
                upstream.answer, upstream.early = attack.answer, attack.early
            # A first TLS scrape loads the certificates of the system.
            for _ in range(20):
                get(checker.port)
            before, counted = checker.begin(), checker.outcomes()
            upstream.answer, upstream.early = attack.answer, attack.early
            answers = [timed(checker.port) for _ in range(attack.times)]
            outcomes = checker.outcomes() - counted
            upstream.answer, upstream.early = sends(page(FINE)), False
            # A request that has no answer is not sent again for a minute, in which the
            # one connection is open.
            recovers = attack.scheme != "http" or until(
                lambda: get(checker.port)[0] == 200, 90.0
            )
            after = checker.end(before)
            log = checker.log
    statuses, worst = {s for s, _ in answers}, max(seconds for _, seconds in answers)
    seen = " ".join(f"{k}:{n}" for k, n in sorted(outcomes.items()))
    words = "/".join(str(status) for status in sorted(statuses))
    row = Row(attack.name, attack.times, f"{words} {seen}", worst, before, after)
    wrong = [
        statuses != {503} and "a status other than 503",
        not all(re.fullmatch(attack.seen, reason) for reason in outcomes)
        and f"expected {attack.seen}",
        # One may be answered at its deadline, before a check that is late.
        sum(outcomes.values()) < 0.97 * attack.times and "requests without a check",
        worst > TIMEOUT + SLACK and "a slow answer",
        after.peak - before.rss > 8 * MIB and "memory",
        after[2:] != before[2:] and "left behind",
        not recovers and "does not recover",
        ("Traceback" in log or "bug" in log) and log[-2000:],
        CONTROL.findall(log),
    ]
    return row, "; ".join(str(problem) for problem in wrong if problem)


class AttackTest(unittest.TestCase):
    """What the tests share."""

    def strike_all(self, attacks: Iterable[Attack], at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for row, wrong in pool.map(strike, attacks):
                TABLE.append(row)
                with self.subTest(row.attack):
                    self.assertFalse(wrong, f"{wrong}\n{HEADING}\n{row}")

    def note(
        self, name: str, times: int, seen: str, worst: float, *usage: Usage
    ) -> None:
        TABLE.append(Row(name, times, seen, worst, *usage))


class FromUpstream(AttackTest):
    """The metrics server is broken or hostile."""

    def test_what_never_ends_is_cut_at_the_deadline(self) -> None:
        self.strike_all(SLOW, len(SLOW))

    def test_what_is_broken_is_told_by_its_reason(self) -> None:
        self.strike_all(BROKEN, 2)

    def test_what_is_too_much_is_read_in_constant_memory(self) -> None:
        self.strike_all(MASSES, 1)

    def test_a_port_where_nobody_listens_or_nobody_accepts(self) -> None:
        with contextlib.ExitStack() as stack:
            full = stack.enter_context(socket.socket())
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(3):
                caller = stack.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex(full.getsockname())
            port = full.getsockname()[1]
            for name, url, reason in (
                ("nobody listens", "http://127.0.0.1:9/metrics", "refused"),
                ("nobody accepts", f"http://127.0.0.1:{port}/metrics", "timeout"),
            ):
                limit = str(TIMEOUT if reason == "timeout" else 5)
                with self.subTest(name), Checker(url, METRICS_TIMEOUT=limit) as checker:
                    get(checker.port)
                    before = checker.begin()
                    times = TIMES if reason != "timeout" else TIMES // 10
                    answers = [timed(checker.port) for _ in range(times)]
                    after, worst = checker.end(before), max(s for _, s in answers)
                    self.note(name, times, f"503 {reason}", worst, before, after)
                    self.assertEqual({status for status, _ in answers}, {503})
                    self.assertEqual(set(checker.outcomes()), {reason})
                    self.assertLess(worst, TIMEOUT + SLACK)
                    self.assertEqual(after[2:], before[2:])
                    self.assertLess(after.peak - before.rss, 8 * MIB)

    def test_a_cut_is_never_Healthy_where_the_protocol_shows_it(self) -> None:
        """At each byte: by a length, in one chunk, in chunks of a byte, until the end.

        Without a length a cut behind a whole line, or in a number, looks like the end.
        """
        body = b"# TYPE x gauge\ny 1\nx 11\n"
        one = CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
        many = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        until_close = HEAD.replace(b"1.1", b"1.0") + b"\r\n" + body
        for name, whole, tells in (
            ("by a length", page(body), lambda _: True),
            ("in a chunk", one, lambda _: True),
            ("in chunks", CHUNKED + many, lambda _: True),
            ("until the end", until_close, lambda at: -5 < at - len(until_close) < -2),
        ):
            with self.subTest(name), Upstream(sends(page(FINE))) as upstream:
                self.cut(name, upstream, whole, tells)

    def cut(
        self, name: str, upstream: Upstream, whole: bytes, tells: Callable[[int], bool]
    ) -> None:
        start = whole.index(b"\r\n\r\n") + 4 if "until" in name else 0
        end = len(whole)
        with Checker(upstream.url) as checker:
            until(lambda: get(checker.port)[0] == 200)
            before, counted = checker.begin(), checker.outcomes()
            cuts = [at for at in range(start, end) if tells(at)] or [end]
            healthy, worst = [], 0.0
            for at, how in itertools.product(cuts, (sends, resets)):
                upstream.answer = how(whole[:at])
                status, seconds = timed(checker.port)
                worst = max(worst, seconds)
                if status == 200:
                    healthy.append(whole[:at])
            outcomes = checker.outcomes() - counted
            after = checker.end(before)
            seen = " ".join(f"{k}:{n}" for k, n in sorted(outcomes.items()))
            self.note(f"cut {name}", 2 * len(cuts), f"503 {seen}", worst, before, after)
            self.assertEqual(healthy, [])
            self.assertNotIn("success", outcomes)
            self.assertEqual(after[2:], before[2:])

    def test_hostile_blanks_and_labels_take_time_linear_in_their_length(self) -> None:
        lines: dict[str, Callable[[int], bytes]] = {
            "blanks before a value": lambda n: b"x" + b" " * n + b"5",
            "blanks and no value": lambda n: b"x" + b" " * n,
            "blanks behind a value": lambda n: b"x 5" + b" " * n + b"z",
            "blanks in braces": lambda n: b"x{" + b" " * n + b"} 5",
            "blanks in a pair": lambda n: b"x{a" + b" " * n + b'="b"} 5',
            "blanks and tabs": lambda n: b"x" + b" \t" * (n // 2) + b"{} 5",
            "open braces": lambda n: b"x" + b"{" * n,
            "quotes": lambda n: b"x{" + b'"' * n,
            "pairs of quotes": lambda n: b'x{a="' + b'""' * (n // 2),
            "backslashes": lambda n: b'x{a="' + b"\\" * n,
            "backslashes and quotes": lambda n: b'x{a="' + b'\\"' * (n // 2),
            "labels": lambda n: b"x{" + b'a="b",' * (n // 6) + b"} 5",
            "labels without end": lambda n: b"x{" + b'a="b",' * (n // 6),
            "commas": lambda n: b"x{" + b"," * n + b"} 5",
            "digits": lambda n: b"x " + b"1" * n,
            "digits of a timestamp": lambda n: b"x 1 " + b"1" * n + b"z",
            "digits and points": lambda n: b"x " + b"1." * (n // 2),
            "a long name": lambda n: b"x" * n + b" 5",
            "a name in quotes": lambda n: b'{"' + b"x" * n + b'"} 5',
            "newlines in a label": lambda n: b'x{a="' + b"\n" * n + b'"} 5',
            "wanted names in a label": lambda n: b'x{a="' + b"\nx 1" * (n // 4),
            "strings of escapes": lambda n: b"x{" + b'a="\\n\\n\\n",' * (n // 10),
            "exemplars": lambda n: b"x 5 # {" + b'a="b",' * (n // 6) + b"} 1",
        }
        size = 60000
        with Upstream(sends(page(FINE))) as upstream, Checker(
            upstream.url, METRICS_TIMEOUT="10"
        ) as checker:
            get(checker.port)
            before, worst, worst_ratio = checker.begin(), 0.0, 0.0
            for name, line in lines.items():
                times = []
                for n in (size, 2 * size):
                    # Blank lines before it, or it would be the first and be refused.
                    upstream.answer = sends(page(b"# a\n" + line(n) + b"\ny 1\n"))
                    times.append(min(timed(checker.port)[1] for _ in range(5)))
                worst = max(worst, *times)
                worst_ratio = max(worst_ratio, (times[1] + 0.01) / (times[0] + 0.01))
                with self.subTest(name):
                    self.assertLess(times[1], 3 * times[0] + 0.1)
            after = checker.end(before)
            seen = f"twice the length, at most {worst_ratio:.1f} x the time"
            times_ = 10 * len(lines)
            self.note("hostile blanks and labels", times_, seen, worst, before, after)
            self.assertLess(after.peak - before.rss, 8 * MIB)

    def test_100_MB_of_ordinary_lines_are_read_in_4_MiB(self) -> None:
        names = [f"vllm:some_metric_{n}" for n in range(50)]
        block = "".join(
            f'{name}_bucket{{engine="0",le="{le}",model_name="a/model"}} {le * 7}.0\n'
            for name, le in itertools.product(names, range(200))
        ).encode()
        count = 100 * 10**6 // len(block) + 1
        total = count * len(block)

        def answer(sock: socket.socket) -> None:
            length = b"Content-Length: %d\r\n\r\n" % (total + len(FULL))
            sock.sendall(HEAD + length)
            for _ in range(count):
                sock.sendall(block)
            sock.sendall(FULL)

        with Upstream(sends(page(FINE))) as upstream, Checker(
            upstream.url, METRICS_TIMEOUT="60"
        ) as checker:
            for _ in range(3):
                get(checker.port)
            before, upstream.answer = checker.begin(), answer
            answers = [timed(checker.port) for _ in range(5)]
            after = checker.end(before)
            fastest = total / min(seconds for _, seconds in answers) / 10**6
            slowest = max(seconds for _, seconds in answers)
            seen = f"503 by its last line, {fastest:.0f} MB/s at best"
            self.note("100 MB of ordinary lines", 5, seen, slowest, before, after)
            self.assertEqual({status for status, _ in answers}, {503})
            self.assertEqual(set(checker.outcomes()), {"success"})
            self.assertLess(after.peak - before.rss, 4 * MIB)
            self.assertGreater(fastest, 20)

    def test_a_history_at_its_limit_lives_in_64_MiB(self) -> None:
        bodies = [
            page("".join(f'x{{s="{n}"}} {n + more}\n' for n in range(5000)).encode())
            for more in (0, 1)
        ]
        answers = itertools.cycle(bodies)
        with memory_group(64 * MIB * 1024) as group, Upstream(
            lambda sock: sock.sendall(next(answers))
        ) as upstream, Checker(
            upstream.url, METRICS_TIMEOUT="9", UNHEALTHY_WHEN="Q: rate(x[1m]) > 1e9",
            command=("sh", "-c", ENTER, str(group), sys.executable, str(PROGRAM)),
        ) as checker:  # fmt: skip
            before, worst = checker.begin(), 0.0
            for _ in range(200):
                status, seconds = timed(checker.port)
                self.assertEqual(status, 200, checker.log)
                worst = max(worst, seconds)
            self.assertIn("HISTORY_LIMIT is too small", checker.log)
            after = checker.end(before)
            name = "5,000 series in a cgroup of 64 MiB"
            self.note(name, 200, "alive, thinned", worst, before, after)


ENTER = 'echo $$ >"$0/cgroup.procs" && exec "$@"'


@contextlib.contextmanager
def memory_group(most: int) -> Iterator[Path]:
    """Give the directory of a cgroup whose processes are killed beyond some bytes."""
    old = Path("/sys/fs/cgroup/memory")
    parent, file = (old, "limit_in_bytes") if old.is_dir() else (old.parent, "max")
    group = parent / f"attack-{os.getpid()}"
    try:
        group.mkdir()
        Path(group, f"memory.{file}").write_text(str(most))
    except OSError as error:
        raise unittest.SkipTest(f"no right to make a cgroup: {error}") from None
    try:
        yield group
    finally:
        until(lambda: not Path(group, "cgroup.procs").read_text())
        group.rmdir()


class FromACanary(AttackTest):
    """What the canary asks is broken or hostile: no check is later for it."""

    def test_no_answer_to_a_canary_delays_a_check(self) -> None:
        html = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
        found = b'{"choices": [{"text": "a"}]}'
        answers: dict[str, tuple[Answer, str]] = {
            "sound": (sends(page(found)), ""),
            "hangs": (waits(), "timeout"),
            "hangs after the head": (waits(HEAD, b"\r\n"), "timeout"),
            "drips": (drips(HEAD + b"\r\n", b"x"), "timeout"),
            "500": (sends(page(b"", head=b"HTTP/1.1 500 No\r\n")), "http_status"),
            "404": (sends(page(b"", head=b"HTTP/1.1 404 No\r\n")), "refused_request"),
            "401": (sends(page(b"", head=b"HTTP/1.1 401 No\r\n")), "refused_request"),
            "HTML": (sends(page(b"<html>", head=html)), "no_completion"),
            "an error in a 200": (sends(page(b'{"error": 1}')), "no_completion"),
            "brackets": (sends(page(b"[" * 60000)), "no_completion"),
            "an endless stream": (pours(HEAD + b"\r\n", b"x" * 65536), "too_large"),
            "100 MB": (pours(HEAD + b"Content-Length: 104857600\r\n\r\n",
                             b"x" * (1 << 20), 100), "too_large"),
            "an endless head": (pours(HEAD, b"a: b\r\n"), "bad_http"),
            "elsewhere": (redirects("http://127.0.0.1:9/", "307 No"), "redirect"),
        }  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            found_out = pool.map(self.ask, answers, [a for a, _ in answers.values()])
            for (name, (_, reason)), (seen, row) in zip(answers.items(), found_out):
                TABLE.append(row)
                with self.subTest(name):
                    self.assertEqual(seen, reason)
                    self.assertLess(row.worst, 0.5)
                    self.assertLess(row.after.peak - row.before.rss, 8 * MIB)
                    self.assertEqual(row.after.threads, row.before.threads)
                    self.assertLessEqual(row.after.fds, row.before.fds)

    def ask(self, name: str, answer: Answer) -> tuple[str, Row]:
        """Return why the canary failed, and what checks were like meanwhile."""
        with Upstream(sends(page(FINE))) as metrics, Upstream(answer) as engine:
            settings = {
                "CANARY_URL": f"http://{engine.instance}/v1/completions",
                "CANARY_BODY": "{}", "CANARY_WHEN": "x >= 0 for 500ms",
                "CANARY_TIMEOUT": "1", "METRICS_TIMEOUT": "5",
            }  # fmt: skip
            with Checker(metrics.url, **settings) as checker:
                get(checker.port)
                before, worst, times = checker.begin(), 0.0, 0
                end = time.monotonic() + 5
                while time.monotonic() < end and not self.told(checker):
                    worst, times = max(worst, timed(checker.port)[1]), times + 1
                    time.sleep(0.05)
                seen, after = self.told(checker), checker.end(before)
                self.assertEqual(engine.callers, 1)
                self.assertNotIn("Traceback", checker.log)
        what = f"canary: {seen or 'ok'}"
        row = Row(f"canary: {name}", times, what, worst, before, after)
        return seen.replace("ok", ""), row

    def told(self, checker: Checker) -> str:
        """Return the reason of the canary's failure, ok, or nothing yet."""
        document = json.loads(get(checker.port, "/health?format=json")[1])
        for probe in document["checks"].get("probe:canary", ()):
            failed = probe["status"] == "fail"
            return str(probe["output"].partition(":")[0]) if failed else "ok"
        return ""


class Credentials(AttackTest):
    """What opens the metrics stays between the program and their server."""

    def everything_said(self, checker: Checker) -> str:
        paths = (
            "/ /metrics /health /health?verbose /health?format=json /livez /health/Q"
        )
        said = "".join(get(checker.port, path)[1] for path in paths.split())
        checker.stop()
        return said + checker.log

    def test_a_token_is_read_anew_and_stays_with_its_server(self) -> None:
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            token = Path(directory, "token")
            token.write_text("hush1\n")
            other = stack.enter_context(Upstream(sends(page(FINE))))
            server = stack.enter_context(
                Upstream(sends(page(FINE)), tls=CERTIFICATES.tls)
            )
            checker = stack.enter_context(
                Checker(
                    server.url + "?token=hush3", METRICS_TIMEOUT="2", LOG_LEVEL="debug",
                    METRICS_BEARER_TOKEN_FILE=str(token),
                    METRICS_CA_FILE=CERTIFICATES.ca,
                )
            )  # fmt: skip
            self.assertEqual(get(checker.port)[0], 200, checker.log)
            self.assertIn(b"Authorization: Bearer hush1\r\n", server.requests[-1])
            token.write_text("hush2")
            self.assertEqual(get(checker.port)[0], 200)
            self.assertIn(b"Authorization: Bearer hush2\r\n", server.requests[-1])
            self.assertIn(b"?token=hush3 HTTP/1.1\r\n", server.requests[-1])
            for location in (
                other.url, f"//{other.instance}/?hush3", "/?hush3#hush", "http://[hush",
                "http://u:hush@127.0.0.1/", "/\x7fhush", "gopher:hush",
            ):  # fmt: skip
                server.answer = redirects(location)
                self.assertEqual(get(checker.port)[0], 503)
            self.assertEqual(other.callers, 0)
            for text in ("t\u00f6ken hush", "hush\r\nHost: hush", "hush\0"):
                token.write_text(text)
                server.answer = sends(page(FINE))
                self.assertEqual(get(checker.port)[0], 503, repr(text))
            token.unlink()
            self.assertEqual(get(checker.port)[0], 503)
            self.assertIn("credentials", checker.outcomes())
            self.assertEqual(re.findall(".*hush.*", self.everything_said(checker)), [])

    def test_certificates_are_shown_and_checked(self) -> None:
        made = CERTIFICATES
        trusts = {"METRICS_CA_FILE": made.ca}
        shows = {"METRICS_CERT_FILE": made.client, "METRICS_KEY_FILE": made.client_key}
        skips = {"METRICS_TLS_SKIP_VERIFY": "true"}
        for tls, settings, status, reason in (
            (made.tls, {}, 503, "tls"),
            (made.tls, trusts, 200, "success"),
            (made.tls, skips, 200, "success"),
            (made.tls, {"METRICS_CA_FILE": made.client}, 503, "tls"),
            (made.tls, {"METRICS_CA_FILE": "/nowhere"}, 503, "credentials"),
            (made.tls, {"METRICS_CA_FILE": made.key}, 503, "credentials"),
            (made.mutual, trusts, 503, "tls|reset"),
            (made.mutual, {**trusts, **shows}, 200, "success"),
            (made.mutual, {**trusts, **shows, "METRICS_KEY_FILE": made.key}, 503,
             "credentials"),
        ):  # fmt: skip
            with self.subTest(settings=settings), Upstream(
                sends(page(FINE)), tls=tls
            ) as server, Checker(
                server.url, METRICS_TIMEOUT="2", **settings
            ) as checker:
                self.assertEqual(get(checker.port)[0], status, checker.log)
                for outcome in checker.outcomes():
                    self.assertRegex(outcome, f"^({reason})$")
                loud = re.findall(r" WARNING .*SKIP_VERIFY.*ANYBODY", checker.log)
                self.assertEqual(len(loud), "METRICS_TLS_SKIP_VERIFY" in settings)

    def test_a_certificate_is_for_its_host_alone(self) -> None:
        with Upstream(sends(page(FINE)), tls=CERTIFICATES.tls) as server:
            url = server.url.replace("127.0.0.1", "localhost")
            with Checker(
                url, METRICS_TIMEOUT="2", METRICS_CA_FILE=CERTIFICATES.ca
            ) as checker:
                self.assertEqual(get(checker.port)[0], 503)
                self.assertEqual(set(checker.outcomes()), {"tls"})

    def test_a_password_is_basic_authentication_and_nobody_elses(self) -> None:
        for log_format in ("text", "json"):
            with Upstream(sends(page(FINE)), tls=CERTIFICATES.tls) as server:
                url = f"https://us%40er:hu%3Ash@{server.instance}/metrics?t=hush"
                with Checker(
                    url, METRICS_CA_FILE=CERTIFICATES.ca, LOG_FORMAT=log_format,
                    METRICS_TIMEOUT="2", LOG_LEVEL="debug",
                ) as checker:  # fmt: skip
                    self.assertEqual(get(checker.port)[0], 200)
                    head = server.requests[-1]
                    self.assertIn(b"Authorization: Basic dXNAZXI6aHU6c2g=\r\n", head)
                    server.answer = sends(b"HTTP/1.1 401 No\r\n\r\n")
                    self.assertEqual(get(checker.port)[0], 503)
                    server.close()
                    self.assertEqual(get(checker.port)[0], 503)
                    said = self.everything_said(checker)
                    for secret in ("hush", "hu%3Ash", "hu:sh", "dXNAZXI", "us@er"):
                        self.assertNotIn(secret, said)

    def test_a_wrong_configuration_is_told_without_its_secrets(self) -> None:
        for url in (
            "http://u:hush@[/", "ftp://u:hush@h/?t=hush", "http://u:hu sh@h/?hush",
            "http://h:99999/?t=hush", "http://h/#hush", "http://u:p@hush@h:x/?a=hush",
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, PROGRAM], capture_output=True, text=True, timeout=20,
                env={**os.environ, "METRICS_ENDPOINT": url}, check=False,
            )  # fmt: skip
            with self.subTest(url):
                self.assertEqual(done.returncode, 2)
                self.assertNotIn("hush", done.stdout + done.stderr.replace("#hush", ""))


# -- The callers -----------------------------------------------------------------------

CROWD = {"idle": 2000, "dripping": 500, "not reading": 100}
OPENING = {
    "idle": b"",
    "dripping": b"GET",
    "not reading": b"GET /health?format=json HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "reading": b"GET /health?format=json HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


class Crowd:
    """Callers that hold on to a port, and come back when they are hung up on.

    They run in a process of their own, or they would slow down the probe.
    """

    def __init__(self, port: int, kinds: dict[str, int]) -> None:
        self._selector, self._port = selectors.DefaultSelector(), port
        self._due = deque((0.0, kind) for kind in kinds for _ in range(kinds[kind]))
        self._held: deque[tuple[float, socket.socket]] = deque()
        self.calls = 0

    def run(self, seconds: float) -> None:
        drips = ends = time.monotonic()
        ends += seconds
        while time.monotonic() < ends:
            while self._due and self._due[0][0] <= time.monotonic():
                self._call(self._due.popleft()[1])
            while self._held and self._held[0][0] <= time.monotonic():
                self._held.popleft()[1].close()
                self._due.append((time.monotonic(), "not reading"))
            for key, _ in self._selector.select(0.05):
                self._hang_up(key)
            if time.monotonic() > drips:
                drips += 1
                self._drip()

    def _call(self, kind: str) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        # As on a network, where the kernel takes less than over loopback.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.connect(("127.0.0.1", self._port))
        self.calls += 1
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(OPENING[kind])
        if kind == "not reading":
            self._held.append((time.monotonic() + 6, sock))
        else:
            self._selector.register(sock, selectors.EVENT_READ, (kind, sock))

    def _hang_up(self, key: selectors.SelectorKey) -> None:
        kind, sock = key.data
        self._selector.unregister(sock)
        sock.close()
        self._due.append((time.monotonic() + 1, kind))

    def _drip(self) -> None:
        for key in list(self._selector.get_map().values()):
            kind, sock = key.data
            if kind == "dripping":
                with contextlib.suppress(OSError):
                    sock.send(b" ")


def call_as_crowd(port: str, seconds: str, reading: str = "") -> None:
    """Run a crowd, in the process that this module is started as."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    crowd = Crowd(int(port), {"reading": int(reading)} if reading else CROWD)
    crowd.run(float(seconds))
    print(crowd.calls)


class FromDownstream(AttackTest):
    """Callers are slow, many, broken or hostile."""

    def test_a_crowd_keeps_no_probe_waiting(self) -> None:
        big = FINE + b"".join(b'x{a="%0500d"} 1\n' % n for n in range(40))
        rules = ";".join(f"Q{n}: x > 10" for n in range(8)) + "; Big: x > 0"
        for name, body, settings, expected in (
            ("small answers", FINE, {}, 200),
            ("on a schedule", FINE, {"SCRAPE_INTERVAL": "1"}, 200),
            ("large answers", big, {"UNHEALTHY_WHEN": rules}, 503),
        ):
            with self.subTest(name), Upstream(sends(page(body))) as upstream, Checker(
                upstream.url, METRICS_TIMEOUT="0.8", **settings
            ) as checker:
                self.crowd(name, checker, expected)

    def crowd(self, name: str, checker: Checker, expected: int) -> None:
        for _ in range(100):
            get(checker.port, "/health?verbose")
        before, cpu = checker.begin(), checker.cpu()
        command = sys.executable, __file__, str(checker.port), str(MINUTE / 3)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as crowd:
            until(lambda: checker.usage().fds > before.fds + 400)
            answers, during = [], []
            while crowd.poll() is None:
                answers.append(timed(checker.port))
                self.assertEqual(get(checker.port, "/metrics")[0], 200)
                during.append(checker.usage())
                time.sleep(0.05)
            calls = crowd.communicate()[0].strip()
        after, cpu = checker.end(before), checker.cpu() - cpu
        slow = sorted(seconds for _, seconds in answers)
        seen = (
            f"{expected}; median {slow[len(slow) // 2] * 1000:.1f} ms, {calls} calls, "
            f"{max(u.fds for u in during)} fds, {cpu / MINUTE * 300:.0f}% of a core"
        )
        self.note(f"2,600 callers, {name}", len(slow), seen, slow[-1], before, after)
        self.assertEqual({status for status, _ in answers}, {expected}, checker.log)
        self.assertLess(slow[-1], 0.1 + SLACK)
        self.assertEqual({usage.threads for usage in during}, {before.threads})
        self.assertLess(after.peak - before.rss, 8 * MIB)
        self.assertEqual(after[2:], before[2:])
        self.assertGreater(max(usage.fds for usage in during), before.fds + 400)

    def test_who_asks_for_long_answers_keeps_no_probe_out(self) -> None:
        big = FINE + b"".join(b'x{a="%0600d"} 11\n' % n for n in range(40))
        rules = ";".join(f"Q{n}: x > 10" for n in range(40))
        with Upstream(sends(page(big))) as upstream, Checker(
            upstream.url, METRICS_TIMEOUT="0.8", SCRAPE_INTERVAL="1",
            UNHEALTHY_WHEN=rules,
        ) as checker:  # fmt: skip
            until(lambda: get(checker.port)[0] == 503)
            before = checker.begin()
            command = sys.executable, __file__, str(checker.port), "6", "700"
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as crowd:
                until(lambda: checker.usage().fds > before.fds + 200)
                answers: list[bytes] = []
                while crowd.poll() is None:
                    paths = b"/livez", b"/health/Q0"
                    answers += [self.ask_from_afar(checker.port, p) for p in paths]
            after, lost = checker.end(before), answers.count(b"")
        seen = f"{lost} of {len(answers)} not answered"
        self.note("700 long answers", len(answers), seen, 0.0, before, after)
        self.assertLess(lost, len(answers) / 20)

    def ask_from_afar(self, port: int, path: bytes) -> bytes:
        """Return the status for a request that comes a while after its connection."""
        with socket.create_connection(("127.0.0.1", port), 20) as sock:
            time.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
                return receive(sock)[9:12]
        return b""

    def test_who_asks_for_all_of_57000_alerts_keeps_no_probe_waiting(self) -> None:
        many = b"".join(b'x{n="%05d",model="abc"} 11\n' % n for n in range(4750))
        paths = ("/health?verbose", "/", "/health?format=json", "/metrics")
        rules = "A: x > 1; B: x > 2; C: x > 3"
        with contextlib.ExitStack() as stack:
            urls = [
                stack.enter_context(Upstream(sends(page(many)))).url for _ in range(4)
            ]
            checker = stack.enter_context(
                Checker(
                    *urls, METRICS_TIMEOUT="8", SCRAPE_INTERVAL="10",
                    UNHEALTHY_WHEN=rules, HISTORY_LIMIT="64Mi",
                )
            )  # fmt: skip
            self.assertTrue(until(lambda: get(checker.port)[0] == 503, 30))
            self.assertTrue(
                until(lambda: "18999 more" in get(checker.port, paths[0])[1], 30)
            )
            before = checker.begin()
            ends = time.monotonic() + MINUTE / 10
            with ThreadPoolExecutor(len(paths)) as pool:

                def ask_on(path: str) -> int:
                    asked = 0
                    while time.monotonic() < ends:
                        asked += bool(get(checker.port, path)[1])
                        time.sleep(0.01)
                    return asked

                asking = [pool.submit(ask_on, path) for path in paths]
                slow = []
                while time.monotonic() < ends:
                    slow.append(timed(checker.port, "/livez")[1])
                    time.sleep(0.02)
                asked = sum(one.result() for one in asking)
            after = checker.end(before)
            seen = f"{asked} long answers; median {sorted(slow)[len(slow) // 2]:.4f} s"
            self.note("57,000 alerts", len(slow), seen, max(slow), before, after)
            self.assertGreater(asked, 100)
            self.assertLess(max(slow), 0.1 + SLACK)
            self.assertLess(after.peak - before.rss, 64 * MIB)

    def test_those_who_drain_hold_up_nobody_and_are_answered(self) -> None:
        busy = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 0\n"
        for name, expected in (
            ("drained", "200 Drained"),
            ("the server dies", "503 Not drained: it is too late; scrape of .*refused"),
            ("SIGTERM", "503 Not drained: this program ends"),
        ):
            with self.subTest(name), Upstream(sends(page(busy))) as upstream, Checker(
                upstream.url, METRICS_TIMEOUT="0.8", DRAIN_TIMEOUT="4"
            ) as checker:
                get(checker.port)
                before = checker.begin()
                callers = [self.drains(checker.port) for _ in range(17)]
                # One more than 16 is refused at once, and one goes away.
                (refused,), _, _ = select.select(callers, [], [], 5)
                with refused:
                    self.assertIn(b"16 callers wait", receive(refused))
                callers.remove(refused)
                callers.pop().close()
                slow = [timed(checker.port, path)[1] for path in ("/livez", "/") * 50]
                self.assertEqual(checker.usage().threads, before.threads)
                started = time.monotonic()
                if name == "drained":
                    upstream.answer = sends(page(busy.replace(b"3", b"0")))
                elif name == "SIGTERM":
                    checker.process.terminate()
                else:
                    upstream.close()
                for sock in callers:
                    answer = receive(sock).decode()
                    sock.close()
                    head, _, body = answer.partition("\r\n\r\n")
                    self.assertRegex(f"{head[9:12]} {body}", rf"\A{expected}.*\n\Z")
                seconds = time.monotonic() - started
                seen = f"{expected[:3]}; after {seconds:.1f} s"
                if name == "SIGTERM":
                    self.assertEqual(checker.process.wait(10), 0)
                    self.assertLess(time.monotonic() - started, 0.5 + SLACK)
                    after = before
                else:
                    after = checker.end(before)
                    self.assertLess(seconds, 4.1 + SLACK)
                    self.assertEqual(after[2:], before[2:])
                self.note(f"16 drain: {name}", 1, seen, max(slow), before, after)
                self.assertLess(max(slow), 0.1 + SLACK)

    def drains(self, port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), 20)
        sock.sendall(b"GET /drain HTTP/1.1\r\nHost: a\r\n\r\n")
        return sock

    def test_a_hostile_request_is_refused_in_plain_text(self) -> None:
        start, host = "GET /health HTTP/1.1\r\n", "Host: a\r\n"
        length = "Content-Length: "
        long, blank = "b" * 65536, "\r\n\r\n"
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
        rows: list[tuple[str, str | bytes, str]] = [
            ("a body", f"{start}{host}{length}5\r\n\r\nhello", "200"),
            ("a body of 1 MB", f"{start}{length}999999{blank}{long * 16}", "200"),
            ("no body", f"{start}{host}{length}0{blank}", "200"),
            ("a length doubled", f"{start}{length}0\r\n{length}0{blank}", "200"),
            ("lengths in conflict", f"{start}{length}0\r\n{length}5{blank}", "400"),
            ("a length and chunks",
             f"{start}{length}0\r\nTransfer-Encoding: chunked{blank}0{blank}", "200"),
            ("a negative length", f"{start}{length}-1{blank}", "400"),
            ("a huge length", f"{start}{length}{'9' * 5000}{blank}", "200"),
            ("chunks", f"{start}Transfer-Encoding: chunked{blank}0{blank}", "200"),
            ("chunks that stop", f"{start}Transfer-Encoding: chunked{blank}5\r\nhe",
             "200"),
            ("a pipeline", f"{start}{host}\r\n" * 100, "200"),
            ("absolute form", f"GET http://a/health HTTP/1.1\r\n{host}\r\n", "200"),
            ("three slashes", f"GET ///health HTTP/1.1\r\n{host}\r\n", "200"),
            ("%68ealth", f"GET /%68ealth HTTP/1.1\r\n{host}\r\n", "200"),
            ("dots and health", f"GET /../a/../health HTTP/1.1\r\n{host}\r\n", "200"),
            ("deep dots", f"GET {'/a' * 2000}{'/..' * 2000}/health HTTP/1.1{blank}",
             "200"),
            ("%2Fhealth", f"GET /%2Fhealth HTTP/1.1\r\n{host}\r\n", "404"),
            ("rules not there", f"GET /health/{'x,' * 6000} HTTP/1.1{blank}", "200"),
            ("a PROXY header", f"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n{start}\r\n", "400"),
            ("a PROXY header 2", b"\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c" + bytes(12), "400"),
            ("dots", f"GET /../../etc/passwd HTTP/1.1\r\n{host}\r\n", "404"),
            ("a target of 64 KiB", f"GET /{long} HTTP/1.1\r\n\r\n", "414|431"),
            ("a query of 64 KiB", f"GET /health?{long} HTTP/1.1{blank}", "414|431"),
            ("a header of 64 KiB", f"{start}A: {long}{blank}", "431"),
            ("10,000 headers", f"{start}{'A: b' * 10000}{blank}", "431"),
            ("headers of a byte", start + "a:\r\n" * 5000 + "\r\n", "431"),
            ("controls", "GET /\x1b[2J\x07\x9b\x85 HTTP/1.1\r\n\r\n", "400|404"),
            ("a log line", "GET /\rERROR\x0bforged HTTP/1.1\r\n\r\n", "400|404"),
            ("U+2028", "GET /\u2028forged HTTP/1.1\r\n\r\n".encode(), "400|404"),
            ("a method of controls", "\x1b[2J / HTTP/1.1\r\n\r\n", "400|405|501"),
            ("controls in a header", f"{start}A: \x00\x1b\r\n\r\n", "200|400"),
            ("a NUL", "GET /health\x00 HTTP/1.1\r\n\r\n", "400|404"),
            ("a folded header", f"{start}A: b\r\n c{blank}", "200|400"),
            ("no colon", f"{start}nothing{blank}", "400"),
            ("a blank in a name", f"{start}{length[:-2]} : 5{blank}", "400"),
            ("a blank first", f"{start} {length}5{blank}", "400"),
            ("HTTP/0.9", "GET /health\r\n\r\n", "400"),
            ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505|400|405"),
            ("HTTP/9", "GET /health HTTP/9.9\r\n\r\n", "400|505"),
            ("HTTP/1.1.1", "GET /health HTTP/1.1.1\r\n\r\n", "400"),
            ("HTTP/1e9", f"GET /health HTTP/{'9' * 9999}.1{blank}", "400|505"),
            ("HTTP/\u00b9", "GET /health HTTP/\xb9.\xb9\r\n\r\n", "400|505"),
            ("TLS", hello, "|400"),
            ("TLS and a line end", hello + b"\r\n\r\n", "400"),
            ("garbage", bytes(range(256)) * 200, "400|431|414"),
            ("newlines", "\n" * 20000, "|400|431"),
            ("NULs", "\0" * 20000, "400|431|414"),
            ("a CONNECT", "CONNECT a:443 HTTP/1.1\r\n\r\n", "400|405"),
            ("a TRACE", f"TRACE / HTTP/1.1\r\n{host}Cookie: hush\r\n\r\n", "405"),
            ("an Expect", f"{start}Expect: 100-continue\r\n\r\n", "200|417"),
            ("an Upgrade", f"{start}Upgrade: websocket\r\n\r\n", "200"),
            ("a format string", "GET /%s%n%(a)s{0} HTTP/1.1\r\n\r\n", "404"),
            ("many options", f"GET /health?{'exclude=a&' * 1500} HTTP/1.1{blank}",
             "200"),
        ]  # fmt: skip
        for log_format in ("text", "json"):
            with Upstream(sends(page(FINE))) as upstream, Checker(
                upstream.url, METRICS_TIMEOUT="2", LOG_FORMAT=log_format,
                LOG_LEVEL="debug",
            ) as checker:  # fmt: skip
                self.refuse(checker, rows, 20)
                self.assert_log_is_clean(checker.log, log_format)

    def refuse(
        self, checker: Checker, rows: list[tuple[str, str | bytes, str]], times: int
    ) -> None:
        get(checker.port)
        before, worst = checker.begin(), 0.0
        for name, request, expected in rows:
            with self.subTest(name):
                for _ in range(times):
                    started = time.monotonic()
                    # A TLS client would wait for an answer that never comes.
                    answer = ask(checker.port, request).decode("latin-1")
                    if len(expected) > 1 and expected[0] != "|":
                        worst = max(worst, time.monotonic() - started)
                    self.assertRegex(answer[9:12], rf"^({expected})\Z")
                    self.assertLessEqual(answer.count("HTTP/1.1 "), 1)
                    head, _, body = answer.partition("\r\n\r\n")
                    if answer:
                        self.assertIn("Content-Type: text/plain; charset=utf-8", head)
                    self.assertRegex(body, r"\A[ -~\n]*\Z")
                    self.assertNotRegex(body, "hush|Traceback|<|bbb")
                    self.assertEqual(get(checker.port)[0], 200)
                    if expected[0] == "|":
                        break
        after = checker.end(before)
        count = len(rows) * times
        self.note("hostile requests", count, "as they should", worst, before, after)
        self.assertLess(after.peak - before.rss, 8 * MIB)
        self.assertEqual(after[2:], before[2:])

    def assert_log_is_clean(self, log: str, log_format: str) -> None:
        self.assertFalse("Traceback" in log)
        self.assertEqual(CONTROL.findall(log)[:3], [])
        for line in log.splitlines():
            if log_format == "json":
                self.assertLessEqual({"time", "level", "message"}, {*json.loads(line)})
            else:
                self.assertRegex(
                    line[:60], r"\A\d{4}-[\d-]+T[\d:.]+Z (DEBUG|INFO|WARNING) "
                )

    def test_a_caller_that_goes_away_leaves_one_debug_line(self) -> None:
        def slow(sock: socket.socket) -> None:
            time.sleep(0.1)
            sock.sendall(page(FINE))

        linger = struct.pack("ii", 1, 0)
        with Upstream(slow) as upstream, Checker(
            upstream.url, METRICS_TIMEOUT="2", LOG_LEVEL="debug"
        ) as checker:
            get(checker.port)
            before = checker.begin()
            for name, data, resets_ in (
                ("before a word", b"", True), ("before a word, politely", b"", False),
                ("in a request", b"GET /he", True), ("in one, politely", b"GET", False),
                ("before the answer", OPENING["not reading"], True),
                ("before the answer, politely", OPENING["not reading"], False),
            ):  # fmt: skip
                with self.subTest(name):
                    lines = len(checker.log.splitlines())
                    sock = socket.create_connection(("127.0.0.1", checker.port))
                    sock.sendall(data)
                    time.sleep(0.02)
                    if resets_:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    sock.close()
                    until(lambda: checker.usage()[2:] == before[2:])
                    time.sleep(0.15)
                    new = checker.log.splitlines()[lines:]
                    new = [line for line in new if " DEBUG check " not in line]
                    self.assertLessEqual(len(new), 2 if b"\r\n" in data else 1, new)
                    self.assertTrue(all(" DEBUG " in line for line in new), new)
            for _ in range(TIMES // 4):
                sock = socket.create_connection(("127.0.0.1", checker.port))
                sock.sendall(OPENING["not reading"])
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.close()
            status, seconds = timed(checker.port)
            after = checker.end(before)
            name = "callers that go away"
            self.note(name, TIMES // 4, str(status), seconds, before, after)
            self.assertEqual((status, after[2:]), (200, before[2:]))
            self.assertNotIn("Traceback", checker.log)

    def test_without_descriptors_it_rests_and_answers_again(self) -> None:
        for limit in (16, 64, 256):
            with self.subTest(limit), Upstream(sends(page(FINE))) as upstream, Checker(
                upstream.url, METRICS_TIMEOUT="2", nofile=limit
            ) as checker:
                get(checker.port)
                before, cpu, seconds = checker.begin(), checker.cpu(), 4.0
                with contextlib.ExitStack() as stack:
                    started = time.monotonic()
                    statuses: Counter[int] = Counter()
                    while time.monotonic() - started < seconds:
                        for _ in range(limit // 2):
                            address = "127.0.0.1", checker.port
                            sock = stack.enter_context(socket.socket())
                            sock.settimeout(2)
                            with contextlib.suppress(OSError):
                                sock.connect(address)
                        with contextlib.suppress(OSError):
                            statuses[get(checker.port)[0]] += 1
                        time.sleep(0.3)
                    cpu, held = checker.cpu() - cpu, checker.usage().fds
                    seconds = time.monotonic() - started
                answers_again = until(lambda: get(checker.port)[0] == 200)
                after = checker.end(before)
                seen = f"{held} fds, {cpu / seconds:.0%} of a core; {dict(statuses)}"
                name = f"descriptors run out, ulimit -n {limit}"
                self.note(name, 1, seen, 0.0, before, after)
                self.assertTrue(answers_again)
                if limit > 16:
                    self.assertEqual(set(statuses), {200})
                self.assertLess(cpu / seconds, 0.5)
                self.assertEqual(after[2:], before[2:])
                self.assertNotIn("Traceback", checker.log)
                # It says so, but not for each caller.
                self.assertLess(len(checker.log.splitlines()), 40 * seconds)


# -- The program itself ----------------------------------------------------------------

PREAMBLE = """
import os, sys, time
{before}
import health_check as hc
{after}
sys.exit(hc.main())
"""
BUG = """
def broken(*_, **__):
    if os.path.exists(os.environ["BROKEN"]):
        raise {error}
    return works(*_, **__)
works, hc.{name} = hc.{name}, broken
"""
WALL = """
wall = time.time
def jumped():
    try:
        return wall() + float(open(os.environ["JUMP"]).read() or 0)
    except OSError:
        return wall()
time.time = jumped
"""


def patched(before: str = "", after: str = "") -> tuple[str, ...]:
    """Return a command that runs the program with some of it replaced."""
    return sys.executable, "-c", PREAMBLE.format(before=before, after=after)


def read_all(descriptor: int) -> None:
    """Read until the other end is closed, which a terminal says by an error."""
    with contextlib.suppress(OSError):
        while os.read(descriptor, 65536):
            pass


class FromItself(AttackTest):
    """A bug, the clock, the scheduler, a signal, a bare environment."""

    def test_a_bug_is_Unhealthy_with_its_reason_and_passes(self) -> None:
        for name, error, interval in itertools.product(
            ("judge", "evaluate", "read_samples", "open_stream"),
            ("RuntimeError('broken')", "MemoryError()", "RecursionError('broken')"),
            ("0", "0.1"),
        ):
            if interval != "0" and "Runtime" not in error:
                continue
            with self.subTest(name, error=error, interval=interval):
                self.break_and_mend(name, error, interval)
        TABLE.append("bugs in evaluation and worker: 16 kinds, /health 503 and back")

    def break_and_mend(self, name: str, error: str, interval: str) -> None:
        with Upstream(sends(page(FINE))) as upstream, broken() as file, Checker(
            upstream.url, METRICS_TIMEOUT="0.1", SCRAPE_INTERVAL=interval,
            command=patched(after=BUG.format(name=name, error=error)),
            PYTHONPATH=str(PROGRAM.parent), BROKEN=str(file),
        ) as checker:  # fmt: skip
            self.assertTrue(until(lambda: get(checker.port)[0] == 200), checker.log)
            before = checker.begin()
            file.touch()
            self.assertTrue(until(lambda: get(checker.port)[0] == 503))
            for _ in range(5):
                self.assertEqual(get(checker.port)[0], 503)
                self.assertEqual(get(checker.port, "/health/Q")[0], 200)
                self.assertEqual(get(checker.port, "/livez")[0], 200)
            said = get(checker.port, "/health?verbose")[1]
            self.assertRegex(said, f"bug.*{error.partition('(')[0]}|{name}")
            file.unlink()
            self.assertTrue(until(lambda: get(checker.port)[0] == 200))
            self.assertEqual(checker.end(before)[2:], before[2:])

    def test_a_Monitor_that_is_dead_is_not_alive(self) -> None:
        """Killed by what no handler of errors takes for one."""
        for method, interval in (("_end", "0"), ("_end", "0.1"), ("_run", "0")):
            after = BUG.format(name=f"Monitor.{method}", error="SystemExit")
            with self.subTest(method), Upstream(
                sends(page(FINE))
            ) as upstream, broken() as file, Checker(
                upstream.url, METRICS_TIMEOUT="0.1", SCRAPE_INTERVAL=interval,
                command=patched(after=after), PYTHONPATH=str(PROGRAM.parent),
                BROKEN=str(file),
            ) as checker:  # fmt: skip
                if method == "_end":
                    self.assertTrue(until(lambda: get(checker.port)[0] == 200))
                    self.assertEqual(get(checker.port, "/livez")[0], 200)
                    file.touch()
                    self.assertTrue(until(lambda: get(checker.port)[0] == 503))
                    status, seconds = timed(checker.port)
                    self.assertEqual(status, 503)
                    self.assertLess(seconds, 0.25 + SLACK)
                    self.assertEqual(get(checker.port, "/health/Q")[0], 200)
                    self.assertEqual(get(checker.port, "/livez")[0], 503)
                self.assertEqual(checker.stop(), 0)
        TABLE.append("a dead Monitor: /health 503, /health/Q 200, /livez 503")

    def test_a_jump_of_the_clock_moves_nothing_but_the_times_shown(self) -> None:
        rules = "P: x > 0 for 4s; C: changes(x[1h]) > 100; T: up * time() < 0"
        with tempfile.TemporaryDirectory() as directory, Upstream(
            sends(page(FINE))
        ) as upstream, Checker(
            upstream.url, METRICS_TIMEOUT="0.5", SCRAPE_INTERVAL="0.5",
            UNHEALTHY_WHEN=rules, command=patched(before=WALL),
            PYTHONPATH=str(PROGRAM.parent), JUMP=f"{directory}/jump",
        ) as checker:  # fmt: skip
            started = time.monotonic()
            self.assertTrue(until(lambda: get(checker.port)[0] == 200))
            for jump in (86400, -86400, 0, 86400):
                Path(directory, "jump").write_text(str(jump))
                # Until a check has been made since.
                self.assertTrue(until(partial(self.shows, checker, jump)))
                if time.monotonic() - started < 3.5:
                    self.assertEqual(get(checker.port)[0], 200, checker.log)
            self.assertTrue(until(lambda: get(checker.port)[0] == 503))
            self.assertGreater(time.monotonic() - started, 3.9)
            self.assertLess(time.monotonic() - started, 8)
            said = get(checker.port, "/health?verbose")[1]
            self.assertRegex(said, r"\[-\]P firing for [0-9]s")
        TABLE.append("the clock jumps by a day, 4 times: a rule for 4s fires after 4 s")

    def shows(self, checker: Checker, jump: int) -> bool:
        document = json.loads(get(checker.port, "/health?format=json")[1])
        shown = document["checks"]["P"][0]["time"]
        moment = time.gmtime(time.time() + jump)
        return bool(shown[:10] == time.strftime("%Y-%m-%d", moment))

    def test_the_first_probe_after_a_suspension_is_right(self) -> None:
        chance = random.Random(SEED)

        def slow(sock: socket.socket) -> None:
            time.sleep(0.15)
            sock.sendall(page(state[0]))

        state, times = [FINE], max(3, TIMES // 100)
        for interval in ("0", "0.3"):
            with self.subTest(interval), Upstream(slow) as upstream, Checker(
                upstream.url, METRICS_TIMEOUT="0.3", SCRAPE_INTERVAL=interval
            ) as checker:
                state[0] = FINE
                self.assertTrue(until(lambda: get(checker.port)[0] == 200))
                before, wrong, worst = checker.begin(), [], 0.0
                for _ in range(times):
                    time.sleep(chance.uniform(0, 0.3))
                    state[0] = FULL if chance.random() < 0.5 else FINE
                    expected = 503 if state[0] == FULL else 200
                    early = chance.random() < 0.5
                    os.kill(checker.pid, signal.SIGSTOP)
                    # Longer than the three intervals for which an answer is fresh.
                    time.sleep(chance.uniform(1.1, 1.4))
                    status, seconds = self.ask_again(checker, early)
                    worst = max(worst, seconds)
                    if status != expected:
                        wrong.append((expected, status, early))
                after = checker.end(before)
                seen = f"{len(wrong)} wrong"
                name = f"suspended, SCRAPE_INTERVAL={interval}"
                self.note(name, times, seen, worst, before, after)
                self.assertEqual(wrong, [], checker.log[-3000:])

    def ask_again(self, checker: Checker, early: bool) -> tuple[int, float]:
        """Let it go on; ask just before that, or just after."""
        with ThreadPoolExecutor(1) as pool:
            if early:
                asked = pool.submit(timed, checker.port)
                time.sleep(0.05)
            os.kill(checker.pid, signal.SIGCONT)
            if not early:
                asked = pool.submit(timed, checker.port)
            return asked.result()

    def test_SIGTERM_ends_it_cleanly_at_any_moment(self) -> None:
        """Python ends by the signal until the program has set its handlers.

        That is while it imports what it needs, and nothing is there to be cleaned up.
        """
        chance, times = random.Random(SEED), max(10, TIMES // 5)
        with Upstream(drips(HEAD, b"A: b\r\n")) as upstream:
            begun = time.monotonic()
            with Checker(upstream.url):
                start = time.monotonic() - begun
            span = 8 * start
            moments = [chance.uniform(0, span) for _ in range(times)]
            with ThreadPoolExecutor(4) as pool:
                ends = list(pool.map(partial(self.terminate, upstream.url), moments))
        slowest = max(seconds for _, _, seconds in ends)
        clean = sum(code == 0 for code, _, _ in ends)
        TABLE.append(
            f"SIGTERM at {times} moments of {span:.2f} s: {clean} exit 0, others by "
            f"the signal before it is up; slowest {slowest * 1000:.0f} ms"
        )
        for (code, log, _), moment in zip(ends, moments):
            with self.subTest(moment=moment):
                self.assertIn(code, (0, -signal.SIGTERM))
                if "is up" in log:
                    self.assertEqual(code, 0)
                for line in log.splitlines():
                    self.assertRegex(line, " (INFO|WARNING) ")
        self.assertLess(slowest, 0.5 + SLACK)

    def terminate(self, url: str, moment: float) -> tuple[int, str, float]:
        settings = {"APP_PORT": "0", "METRICS_ENDPOINT": url, "SCRAPE_INTERVAL": "0.1"}
        process = subprocess.Popen(
            [sys.executable, PROGRAM], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **settings, "METRICS_TIMEOUT": "0.1"},
        )  # fmt: skip
        time.sleep(moment)
        started = time.monotonic()
        process.terminate()
        log = process.communicate(timeout=20)[1]
        return process.returncode, log, time.monotonic() - started

    def test_a_log_in_a_terminal_that_nobody_reads_delays_nothing(self) -> None:
        """select() calls a terminal ready that takes a byte more, and write() waits."""
        with Upstream(sends(page(FINE))) as upstream:
            for level in ("info", "debug"):
                slowest = {}
                for read in (True, False):
                    found = self.in_terminal(upstream.url, level, read=read)
                    slowest[read], end = found
                    self.assertLess(end, 0.5 + SLACK)
                with_reader, without = (slowest[read] * 1000 for read in (True, False))
                TABLE.append(
                    f"1 KB of log left in a terminal, {level}: p99 of /health "
                    f"{without:.1f} ms, with a reader {with_reader:.1f} ms; SIGTERM "
                    f"{end * 1000:.0f} ms"
                )
                self.assertLess(slowest[False], 3 * slowest[True] + 0.05)

    def in_terminal(self, url: str, level: str, *, read: bool) -> tuple[float, float]:
        """Return the p99 of 300 answers, and how long the program took to end."""
        main, terminal = os.openpty()
        process = subprocess.Popen(
            [sys.executable, PROGRAM], stderr=terminal,
            env={**os.environ, "APP_PORT": "0", "APP_HOST": "127.0.0.1",
                 "METRICS_ENDPOINT": url, "LOG_LEVEL": level, "UNHEALTHY_WHEN": "Q: x"},
        )  # fmt: skip
        try:
            text = ""
            while "rules: " not in text:
                text += os.read(main, 4096).decode()
            port = int(re.findall(r"is up: port (\d+)", text)[0])
            if read:
                threading.Thread(target=read_all, args=(main,), daemon=True).start()
            else:
                filler = os.open(
                    f"/proc/{process.pid}/fd/2",
                    os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY,
                )
                with contextlib.suppress(BlockingIOError):
                    while os.write(filler, b"\n"):
                        pass
                os.close(filler)
                os.read(main, 1024)
            times = sorted(timed(port)[1] for _ in range(300))
            started = time.monotonic()
            process.terminate()
            self.assertEqual(process.wait(10), 0)
            return times[296], time.monotonic() - started
        finally:
            process.kill()
            process.wait()
            os.close(terminal)
            os.close(main)

    def test_no_option_of_Python_makes_it_warn(self) -> None:
        for options, environ in (
            (["-I"], {}), (["-S"], {}), (["-O"], {}), (["-OO"], {}), (["-E", "-s"], {}),
            (["-W", "error"], {}), (["-X", "dev"], {}), (["-X", "utf8=0"], {}),
            (["-bb"], {}), (["-I", "-S", "-B", "-W", "error"], {}),
            ([], {"PYTHONDEVMODE": "1"}), ([], {"PYTHONWARNDEFAULTENCODING": "1"}),
            ([], {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
            ([], {"PYTHONIOENCODING": "ascii"}), ([], {"PYTHONMALLOC": "debug"}),
            ([], {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}),
        ):  # fmt: skip
            with self.subTest(options, **environ), Upstream(
                sends(page(FULL)), tls=CERTIFICATES.tls
            ) as upstream, Checker(
                upstream.url, METRICS_CA_FILE=CERTIFICATES.ca, METRICS_TIMEOUT="3",
                command=(sys.executable, *options, str(PROGRAM)), **environ,
            ) as checker:  # fmt: skip
                self.use(checker)
        TABLE.append("16 sets of options of Python: no warning")

    def use(self, checker: Checker) -> None:
        """Make it run what it has, and look for anything it should not say."""
        for path in "/health / /metrics /health?verbose /health?format=json".split():
            get(checker.port, path)
        self.assertEqual(get(checker.port)[0], 503, checker.log)
        self.assertEqual(get(checker.port, "/livez")[0], 200)
        self.assertEqual(checker.outcomes().keys(), {"success"}, checker.log)
        self.assertEqual(checker.stop(), 0)
        for line in checker.log.splitlines():
            self.assertRegex(line, r"^\d{4}-\S+Z (INFO|WARNING) [QUh]")

    def test_it_needs_no_user_no_home_no_tmp_and_no_environment(self) -> None:
        bare = """
            set -e
            mkdir -p /mnt && mount -t tmpfs tmpfs /mnt
            cd /mnt && mkdir python program
            mount --bind "$1" python && cp "$2" program/
            for there in /root /home /tmp /var /etc/ssl; do
                [ ! -d $there ] || mount -t tmpfs -o mode=0,ro tmpfs $there
            done
            mount -o remount,ro /mnt && mount -o remount,ro,bind /
            exec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs \
                --bounding-set=-all \
                env -i LD_LIBRARY_PATH=/mnt/python/lib APP_PORT=0 \
                METRICS_ENDPOINT="$3" METRICS_TIMEOUT=3 UNHEALTHY_WHEN='Q: x > 10' \
                /mnt/python/bin/python3 /mnt/program/health_check.py
        """
        if (
            not shutil.which("setpriv")
            or subprocess.run(
                ["unshare", "-m", "true"], check=False, capture_output=True
            ).returncode
        ):
            self.skipTest("no right to make a mount namespace")
        with Upstream(sends(page(FULL))) as upstream:
            command = ("unshare", "-m", "sh", "-c", bare, "sh", sys.base_prefix)
            with Checker(command=(*command, str(PROGRAM), upstream.url)) as checker:
                status = Path(f"/proc/{checker.pid}/status").read_text()
                self.assertRegex(status, r"Uid:\s+65534\s+65534")
                self.assertRegex(status, r"CapEff:\s+0+\n")
                mounts = Path(f"/proc/{checker.pid}/mounts").read_text()
                self.assertRegex(mounts, r"(?m)^\S+ / \S+ ro,")
                environ = Path(f"/proc/{checker.pid}/environ").read_bytes()
                self.assertNotIn(b"HOME", environ)
                self.use(checker)
        TABLE.append("uid 65534, no capability, read-only root, no home, /tmp, environ")


@contextlib.contextmanager
def broken() -> Iterator[Path]:
    """Give the path of a file that is not there, and breaks the program when it is."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory, "broken")


if __name__ == "__main__":
    call_as_crowd(*sys.argv[1:])
