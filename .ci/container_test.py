"""The image: built by its Dockerfile, and run as a restricted pod would run it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import health_check as hc

ROOT = Path(hc.__file__).resolve().parent
SPACE = tempfile.TemporaryDirectory()
STORAGE = [f"--root={SPACE.name}/root", f"--runroot={SPACE.name}/runroot"]
BASE, IMAGE, NAME = "localhost/base", "localhost/health-check", f"checker-{os.getpid()}"
MIB = 1 << 20
MISSING: list[str] = []
CONTROLLERS = Path("/sys/fs/cgroup/cgroup.controllers")
HAS_MEMORY_LIMITS = Path("/sys/fs/cgroup/memory").exists() or (
    CONTROLLERS.exists() and "memory" in CONTROLLERS.read_text()
)


def setUpModule() -> None:
    """Build the image, or say why that cannot be done here."""
    made = run("bash", str(ROOT / ".ci/container.sh"), timeout=280)
    if made.returncode:
        MISSING.append(" ".join(made.stderr.split()[-40:]))
        print(f"\nSKIPPED: no image was built or run: {MISSING[0]}", file=sys.stderr)
        return
    # Some bases have a user already, who could write nothing.
    podman("import", "--change=USER 65532", made.stdout.split()[-1], BASE)
    built = build(ROOT)
    if built.returncode:
        raise AssertionError(built.stdout + built.stderr)
    if not HAS_MEMORY_LIMITS:
        print("\nSKIPPED: the memory limit, for want of cgroups", file=sys.stderr)


def tearDownModule() -> None:
    """Leave nothing behind, not even mounts."""
    if not MISSING:
        podman("rm", "--all", "--force")
        podman("image", "unmount", "--all", "--force")
        podman("rmi", "--all", "--force")
    SPACE.cleanup()


def run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is."""
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout
    )


def build(context: Path) -> subprocess.CompletedProcess[str]:
    """Build the image of a tree; the format of OCI has no HEALTHCHECK."""
    return run(
        "buildah", *STORAGE, "build", "--isolation=chroot", "--format=docker",
        "--pull=never", f"--build-arg=BASE={BASE}", f"--tag={IMAGE}", str(context),
    )  # fmt: skip


def podman(*arguments: str, fails: bool = False) -> str:
    """Return what podman prints; its complaints about systemd do no harm."""
    done = run("podman", *STORAGE, "--cgroup-manager=cgroupfs", "--runtime=runc",
               *arguments)  # fmt: skip
    if done.returncode and not fails:
        raise AssertionError(f"podman {arguments}: {done.stdout}{done.stderr}")
    return done.stdout


def get(url: str) -> tuple[int, str]:
    """Return a status and a body."""
    try:
        with urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


class Metrics(BaseHTTPRequestHandler):
    """A server whose queue the test moves."""

    waiting = 3

    def do_GET(self) -> None:
        body = b"vllm:num_requests_waiting %d\n" % self.waiting
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class ContainerTest(unittest.TestCase):
    """Needs what builds and runs containers."""

    def setUp(self) -> None:
        if MISSING:
            self.skipTest(MISSING[0])


class Image(ContainerTest):
    """What is built."""

    def test_its_configuration(self) -> None:
        (image,) = json.loads(podman("image", "inspect", IMAGE))
        config = image["Config"]
        self.assertEqual(config["User"], "65532:65532")
        self.assertEqual(list(config["ExposedPorts"]), ["8081/tcp"])
        self.assertEqual(config["StopSignal"], "SIGTERM")
        self.assertEqual(config["Entrypoint"][0], "python3")
        self.assertEqual(image["Healthcheck"]["Test"][0], "CMD")
        prefix = "org.opencontainers.image."
        self.assertEqual(config["Labels"][f"{prefix}version"], hc.__version__)
        self.assertEqual(config["Labels"][f"{prefix}licenses"], "MIT")

    def test_it_holds_the_program_its_byte_code_and_the_license(self) -> None:
        code = "import os; print(*sorted(os.listdir('/app')))"
        run = ("run", "--rm", *limits(), "--network=none", "--entrypoint=python3")
        listed = podman(*run, IMAGE, "-c", code)
        self.assertEqual(listed, "LICENSE health_check.py health_check.pyc\n")
        cached = "import sys; print([m.__name__ for m in sys.modules.values()"
        cached += " if (c := getattr(m, '__cached__', 0)) and not __import__('os')"
        cached += ".path.exists(c)])"
        missing = podman(*run, IMAGE, "-c", f"import http.server, ssl; {cached}")
        self.assertEqual(missing, "[]\n", "without byte code")

    def test_no_image_of_a_tree_whose_tests_fail(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for name in ("Dockerfile", "LICENSE", "README.md", "health_check.py"):
                shutil.copy(ROOT / name, directory)
            Path(directory, "test_health_check.py").write_text("raise SystemExit(1)\n")
            built = build(Path(directory))
        self.assertNotEqual(built.returncode, 0)
        self.assertIn("unittest", built.stdout + built.stderr)


def limits() -> list[str]:
    """Return what keeps a container small: podman would raise the limits of files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    memory = ["--memory=64m"] if HAS_MEMORY_LIMITS else ["--cgroups=disabled"]
    return [f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=512:512", *memory,
            "--read-only", "--read-only-tmpfs=false", "--cap-drop=all",
            "--security-opt=no-new-privileges"]  # fmt: skip


class Container(ContainerTest):
    """What runs: read-only, without a capability, in 64 MiB, as nobody."""

    def setUp(self) -> None:
        super().setUp()
        server = HTTPServer(("127.0.0.1", 0), Metrics)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        with hc.listen("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.addCleanup(podman, "rm", "--force", NAME, fails=True)
        podman("run", "--detach", f"--name={NAME}", *limits(), "--network=host",
               "--env=APP_HOST=127.0.0.1", f"--env=APP_PORT={port}",
               "--env=UNHEALTHY_WHEN=QueueFull: vllm:num_requests_waiting > 10",
               f"--env=METRICS_ENDPOINT=http://127.0.0.1:{server.server_port}/metrics",
               IMAGE)  # fmt: skip
        self.wait()
        self.pid = podman("inspect", "--format={{.State.Pid}}", NAME).strip()

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(URLError):
                self.assertEqual(get(f"{self.url}/livez")[0], 200)
                return
            time.sleep(0.05)
        self.fail(podman("logs", NAME))

    def test_it_answers_under_every_restriction_and_ends_with_0(self) -> None:
        Metrics.waiting = 3
        self.assertEqual(get(f"{self.url}/health"), (200, "Healthy\n"))
        Metrics.waiting = 11
        status, body = get(f"{self.url}/health?verbose")
        self.assertEqual(status, 503)
        self.assertIn("[-]QueueFull firing", body)
        # Docker's verdict is about the checker, so the queue does not matter to it.
        podman("healthcheck", "run", NAME)
        self.check_restrictions()
        start = time.monotonic()
        podman("stop", "--time=8", NAME)
        self.assertLess(time.monotonic() - start, 7, "it was killed")
        state = podman("inspect", "--format={{.State.ExitCode}} {{.State.OOMKilled}}",
                       NAME)  # fmt: skip
        self.assertEqual(state, "0 false\n")

    def check_restrictions(self) -> None:
        """Read in /proc that nothing was granted after all."""
        text = Path("/proc", self.pid, "status").read_text()
        status = dict(line.split(":\t", 1) for line in text.splitlines())
        self.assertEqual(status["Uid"].split(), ["65532"] * 4)
        for kind in ("CapEff", "CapPrm", "CapBnd"):
            self.assertEqual(int(status[kind], 16), 0, kind)
        self.assertEqual(status["NoNewPrivs"], "1")
        if HAS_MEMORY_LIMITS:
            self.assertEqual(self.memory_limit(), 64 * MIB)

    def memory_limit(self) -> int:
        """Return the limit of the container's cgroup, of either version."""
        text = Path("/proc", self.pid, "cgroup").read_text()
        paths = {c: p for _, c, p in (line.split(":", 2) for line in text.splitlines())}
        if "memory" in paths:
            file = f"/sys/fs/cgroup/memory{paths['memory']}/memory.limit_in_bytes"
        else:
            file = f"/sys/fs/cgroup{paths['']}/memory.max"
        return int(Path(file).read_text())


if __name__ == "__main__":
    unittest.main()
