"""The README: its commands are run, and its tables, rules and manifests are true."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import compose_spec
import kubernetes_validate
import server_test
import yaml
from server_test import PROGRAM, free_port, run_main

import health_check as hc
import test_health_check

ROOT = PROGRAM.parent
README = (ROOT / "README.md").read_text("utf-8")
FILES = "Dockerfile LICENSE README.md health_check.py test_health_check.py".split()
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
SETTINGS = {setting.name for setting in hc.SETTINGS}
Manifest = dict[str, Any]
PROMTOOL = unittest.skipUnless(shutil.which("promtool"), "promtool is not on the PATH")


# -- Reading it -----------------------------------------------------------------------


def table(*header: str) -> list[list[str]]:
    """Return the rows of the README's table with a header."""
    start = re.escape(f"| {' | '.join(header)} |".replace("|  |", "| |"))
    found = re.findall(rf"(?m)^{start}\n\|[-:|]+\|\n((?:\|.*\n)+)", README)
    if len(found) != 1:
        raise AssertionError(f"{len(found)} tables have the header {header}")
    return [
        [cell.strip().replace("\\|", "|") for cell in cells[1:-1]]
        for cells in map(re.compile(r"(?<!\\)\|").split, found[0].splitlines())
    ]


def code(text: str) -> list[str]:
    """Return what is in backticks."""
    return re.findall(r"`([^`]+)`", text)


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


def words(text: str) -> str:
    """Return a text with each blank one space."""
    return " ".join(text.split())


def expressions(text: str) -> Iterator[str]:
    """Yield what can be the reason of a failed scrape, in the program's own source."""
    for node in ast.walk(ast.parse(text)):
        candidates: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "ScrapeError":
                candidates += node.args[:1]
            elif name == "TargetStatus":
                candidates += node.args[1:2]
            candidates += [
                k.value for k in node.keywords
                if k.arg == "reason" and name in ("_replace", "TargetStatus")
            ]  # fmt: skip
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REASONS":
            pairs = (n for n in ast.walk(node.value) if isinstance(n, ast.Tuple))
            candidates += [pair.elts[1] for pair in pairs]
        for found in candidates:
            if isinstance(found, ast.Constant) and found.value:
                yield str(found.value)


CLAUSES = re.compile(r"(?:\s+(?:for|keep_firing_for)\s+\w+)+\s*\Z")
SERVERS = ("server, metrics at", "queue too long",
           "nothing moves: default `Stalled` reads", "more")  # fmt: skip


def manifests() -> list[Manifest]:
    """Return every document of every block of YAML."""
    return [
        found for block in blocks("yaml") for found in yaml.safe_load_all(block)
    ]


def of_kind(kind: str) -> list[Manifest]:
    """Return the documents of a kind of Kubernetes, or those with such a key."""
    return [m for m in manifests() if m.get("kind") == kind or kind in m]


def documented_rules() -> list[tuple[str, hc.Rule]]:
    """Return the expression of each rule in the README, as written, and the rule."""
    texts = [text for row in table(*SERVERS) for text in code(row[1] + row[3])]
    texts += re.findall(r"`([A-Z]\w+: [^`]+)`", README)
    for manifest in of_kind("ConfigMap"):
        rules = hc.parse_rules(manifest["data"]["UNHEALTHY_WHEN"])
        texts += map(hc.format_rule, rules)
    found = []
    for text in texts:
        (rule,) = hc.parse_rules(text)
        bare = CLAUSES.sub("", re.sub(r"\A\w+:\s+", "", text))
        found.append((bare, rule))
    return found


def promtool(what: str, document: object) -> str:
    """Return what promtool finds wrong with a document, or nothing."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "document")
        file.write_text(json.dumps(document))
        ran = subprocess.run(
            ["promtool", "check", what, str(file)],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    return ran.stdout + ran.stderr if ran.returncode else ""


# -- What it says ---------------------------------------------------------------------


class Readme(server_test.ServerTest):
    """Its tables, and its length."""

    def test_it_can_be_read_in_one_go(self) -> None:
        self.assertLessEqual(len(README.splitlines()), 250)

    def test_rules_parse(self) -> None:
        rules = documented_rules()
        self.assertGreater(len(rules), 20)
        for text, rule in rules:
            with self.subTest(text):
                self.assertEqual(hc.parse_expression(text), rule.expr)
                self.assertEqual(hc.parse_rules(hc.format_rule(rule)), (rule,))

    def test_what_the_default_rules_read(self) -> None:
        read = {
            rule.name: {selector.name for selector in hc.find_selectors(rule.expr)}
            for rule in hc.load_config({}).rules
        }
        self.assertEqual(list(read), ["QueueFull", "Stalled", "Down"])
        queues, progress = set(), set()
        for _, queue, moves, _ in table(*SERVERS):
            if moves:
                (rule,) = hc.parse_rules(*code(queue))
                queues |= {selector.name for selector in hc.find_selectors(rule.expr)}
                progress |= set(code(moves))
        self.assertEqual(queues, read["QueueFull"])
        self.assertLessEqual(progress, read["Stalled"])
        self.assertEqual(len(progress), len(queues))

    @PROMTOOL
    def test_promtool_accepts_the_rules(self) -> None:
        defaults = hc.load_config({}).rules
        rules = [
            *documented_rules(),
            *((hc.format_expression(rule.expr), rule) for rule in defaults),
        ]
        alerts = [
            {
                "alert": f"Rule{number}",
                "expr": text,
                "for": hc.format_duration(rule.hold),
                "keep_firing_for": hc.format_duration(rule.keep_firing_for),
            }
            for number, (text, rule) in enumerate(rules)
        ]
        groups = {"groups": [{"name": "readme", "rules": alerts}]}
        self.assertEqual(promtool("rules", groups), "")

    def test_settings(self) -> None:
        documented = [
            (*code(name), "".join(code(default)), help)
            for name, default, help in table("variable", "default", "")
        ]
        self.assertEqual(documented, [(s.name, s.default, s.help) for s in hc.SETTINGS])

    def test_help_mentions_every_setting_and_every_option(self) -> None:
        status, out, _ = run_main("--help", COLUMNS="80")
        self.assertEqual(status, 0)
        self.assertLess(max(map(len, out.splitlines())), 80)
        self.assertLess(max(map(len, out.splitlines())), 80)
        for setting in hc.SETTINGS:
            default = f" (default {setting.default})" if setting.default else ""
            line = f"{setting.name} {setting.help}{default}"
            self.assertIn(line, words(out))
        for command, _ in table("command", "exit status"):
            for option in re.findall(r"--[a-z-]+", command):
                self.assertIn(option, out)

    def test_reasons_of_failed_scrapes(self) -> None:
        pattern = r'`scrape_error\{reason="\.\.\."\}`: ([^.]*)\.'
        (sentence,) = re.findall(pattern, README)
        source = set(expressions(PROGRAM.read_text("utf-8")))
        self.assertGreater(len(source), 10)
        self.assertEqual(sorted(code(sentence)), sorted(source))

    def test_exit_statuses(self) -> None:
        healthy = self.metrics(b"tgi_queue_size 1\n")
        busy = self.metrics(b"tgi_queue_size 11\n")
        port = self.serve(METRICS_ENDPOINT=healthy.url)
        good, bad = {"METRICS_ENDPOINT": healthy.url}, {"METRICS_TIMEOUT": "soon"}
        refused = {"METRICS_ENDPOINT": f"http://127.0.0.1:{free_port()}/metrics"}
        taken = {**good, "APP_PORT": str(port), "APP_HOST": "127.0.0.1"}
        sick = {"APP_PORT": str(self.serve(METRICS_ENDPOINT=busy.url))}
        runs = {
            "health_check.py": [(1, [], taken), (2, [], bad)],
            "--once": [
                (0, [], good),
                (1, [], {"METRICS_ENDPOINT": busy.url}),
                (1, [], refused),
                (2, [], bad),
            ],
            "--probe [PATH]": [
                (0, [], taken),
                (0, ["/health/QueueFull"], taken),
                (1, [], sick),
                (1, ["/health/QueueFull"], sick),
                (1, [], {"APP_PORT": str(free_port())}),
                (0, ["/health/QueueFull"], {"APP_PORT": str(free_port())}),
                (1, [], {"APP_PORT": "none"}),
            ],
            "--query EXPR": [
                (0, ["tgi_queue_size"], good),
                (0, ["nothing"], good),
                (1, ["up"], refused),
                (2, ["tgi_queue_size >"], good),
            ],
            "--check-config": [(0, [], good), (2, [], bad)],
        }
        rows = {code(row[0])[0]: row[1] for row in table("command", "exit status")}
        self.assertEqual(set(rows), set(runs))
        for command, cases in runs.items():
            option = [] if command == "health_check.py" else command.split()[:1]
            for expected, arguments, environ in cases:
                with self.subTest(command, arguments=arguments, environ=environ):
                    status, _, err = run_main(*option, *arguments, **environ)
                    self.assertEqual(status, expected, err)
                    self.assertNotIn("Traceback", err)
            said = {int(n) for n in re.findall(r"(?<!\w)[0-2](?!\w)", rows[command])}
            seen = {expected for expected, *_ in cases} | (set() if option else {0})
            if command == "--probe [PATH]":
                self.assertRegex(rows[command], "0 .* else 1")
            self.assertEqual(said, seen, command)


# -- What it deploys ------------------------------------------------------------------


def containers(deployment: Manifest) -> list[Manifest]:
    """Return the containers of a Deployment, those that come first among them."""
    spec = deployment["spec"]["template"]["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def environ_of(container: Manifest) -> dict[str, str]:
    """Return the environment of a container, its ConfigMaps' values too."""
    maps = {m["metadata"]["name"]: m["data"] for m in of_kind("ConfigMap")}
    environ: dict[str, str] = {}
    for source in container.get("envFrom", []):
        environ.update(maps[source["configMapRef"]["name"]])
    for variable in container.get("env", []):
        environ[variable["name"]] = variable.get("value", "from elsewhere")
    return environ


def checkers() -> list[tuple[Manifest, list[Manifest]]]:
    """Return each Deployment, and its containers that run this program."""
    return [
        (deployment, [c for c in containers(deployment) if is_checker(c)])
        for deployment in of_kind("Deployment")
    ]


def is_checker(container: Manifest) -> bool:
    """Tell whether a container runs this program."""
    return "METRICS_ENDPOINT" in environ_of(container)


class Kubernetes(unittest.TestCase):
    """The manifests are valid, and mean what the README says of them."""

    def test_the_schemas_accept_them(self) -> None:
        found = [manifest for manifest in manifests() if "kind" in manifest]
        self.assertEqual(len(found), 3)
        for manifest in found:
            kubernetes_validate.validate(manifest, "1.37", strict=True)

    def test_variables_are_settings_and_their_values_are_right(self) -> None:
        for deployment, found in checkers():
            self.assertTrue(found)
            for container in found:
                with self.subTest(deployment["metadata"]["name"]):
                    environ = environ_of(container)
                    self.assertLessEqual(set(environ), SETTINGS)
                    self.assertEqual(hc.load_config(environ).warnings, ())
                    ports = [p["containerPort"] for p in container.get("ports", [])]
                    self.assertIn(ports, ([], [hc.load_config(environ).app_port]))

    def test_the_checker_scrapes_its_neighbour(self) -> None:
        for deployment, found in checkers():
            others = [c for c in containers(deployment) if not is_checker(c)]
            ports = {p["containerPort"] for c in others for p in c["ports"]}
            for container in found:
                (target,) = hc.load_config(environ_of(container)).metrics_endpoint
                self.assertIn(target.instance, {f"localhost:{port}" for port in ports})

    def test_names_that_a_pod_refers_to_are_there(self) -> None:
        for deployment, _ in checkers():
            template = deployment["spec"]["template"]
            wanted = deployment["spec"]["selector"]["matchLabels"]
            self.assertLessEqual(wanted.items(), template["metadata"]["labels"].items())
            volumes = {v["name"] for v in template["spec"]["volumes"]}
            mounted = {
                m["name"] for c in containers(deployment)
                for m in c.get("volumeMounts", [])
            }  # fmt: skip
            self.assertEqual(mounted, volumes)

    def test_probes_ask_for_what_there_is(self) -> None:
        for deployment, found in checkers():
            rules = {r.name for r in hc.load_config(environ_of(found[0])).rules}
            for container in containers(deployment):
                probes = {k: v for k, v in container.items() if k.endswith("Probe")}
                for kind, probe in probes.items():
                    if probe["httpGet"]["port"] == 8081:
                        self.check_probe(kind, probe, container, rules)

    def check_probe(
        self, kind: str, probe: Manifest, container: Manifest, rules: set[str]
    ) -> None:
        """Check one that asks the checker."""
        path = probe["httpGet"]["path"]
        if kind == "startupProbe":
            self.assertEqual((path, container["restartPolicy"]), ("/livez", "Always"))
        elif kind == "readinessProbe":
            self.assertEqual(path, "/health")
        else:
            self.assertIn(path.rpartition("/")[2], rules)
            longest_back_off = 300 + 30
            patience = probe["periodSeconds"] * probe["failureThreshold"]
            self.assertGreater(patience, longest_back_off)

    def test_a_wrong_rule_stops_a_rollout_before_it_starts_an_engine(self) -> None:
        deployment = of_kind("Deployment")[-1]
        first, second, *_ = containers(deployment)
        self.assertEqual(first["args"], ["--check-config"])
        self.assertEqual(second["restartPolicy"], "Always")
        self.assertEqual(environ_of(first), environ_of(second))
        self.assertTrue(of_kind("ConfigMap")[0]["immutable"])

    def test_pods_that_are_restricted_are(self) -> None:
        deployment = of_kind("Deployment")[-1]
        pod = deployment["spec"]["template"]["spec"]["securityContext"]
        self.assertTrue(pod["runAsNonRoot"])
        self.assertEqual(pod["seccompProfile"], {"type": "RuntimeDefault"})
        for container in containers(deployment):
            own = container["securityContext"]
            self.assertIs(own["allowPrivilegeEscalation"], False)
            self.assertEqual(own["capabilities"], {"drop": ["ALL"]})

    def test_images_are_of_this_version(self) -> None:
        tags = set(re.findall(r"/health-check:([\d.]+)", README))
        self.assertEqual(tags, {hc.__version__})
        self.assertIn(f'image.version="{hc.__version__}"', DOCKERFILE)


class Image(unittest.TestCase):
    """The Dockerfile."""

    def test_its_build_runs_every_test_that_no_slow_builder_can_fail(self) -> None:
        timeless = {
            name for name, found in vars(test_health_check).items()
            if isinstance(found, type) and issubclass(found, unittest.TestCase)
            and not issubclass(found, test_health_check.NetworkTest)
        }  # fmt: skip
        run = re.findall(r'"test_health_check\.(\w+)"', DOCKERFILE)
        self.assertEqual(sorted(run), sorted(timeless))


class Compose(unittest.TestCase):
    """The block for Docker Compose."""

    def test_it_is_a_composition(self) -> None:
        (found,) = of_kind("services")
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(found)).validate()
        service = found["services"]["health-check"]
        self.assertLessEqual(set(service["environment"]), SETTINGS)
        hc.load_config(service["environment"])
        (asked,) = re.findall(r'CMD (\[.*"--probe", "/livez"\])', DOCKERFILE)
        test = service["healthcheck"]["test"]
        self.assertEqual(test, ["CMD", *json.loads(asked)[:-1], "/health"])


class Prometheus(server_test.ServerTest):
    """The blocks for Prometheus."""

    @PROMTOOL
    def test_promtool_accepts_them(self) -> None:
        (scrape,), (groups,) = of_kind("scrape_configs"), of_kind("groups")
        # Debian's promtool is built without the discovery of pods.
        (job,) = scrape["scrape_configs"]
        self.assertEqual(job.pop("kubernetes_sd_configs"), [{"role": "pod"}])
        self.assertEqual(promtool("config", scrape), "")
        self.assertEqual(promtool("rules", groups), "")

    def test_alerts_are_about_metrics_that_are_there(self) -> None:
        port = self.serve(METRICS_ENDPOINT=self.metrics(b"tgi_queue_size 1\n").url)
        _, _, page = server_test.get(port, "/metrics")
        (groups,) = of_kind("groups")
        for rule in groups["groups"][0]["rules"]:
            for name in re.findall(r"health_check_\w+", rule["expr"]):
                self.assertIn(f"# TYPE {name} ", page)


# -- What it runs ---------------------------------------------------------------------

SHOWN = re.compile(r"(?m)^\$ (.*)\n((?:(?!\$ ).*\n)*)")
# Bring the loopback up and stay, until standard input ends.
LOOPBACK = """
import fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
print("up", flush=True)
sys.stdin.read()
"""


def pythons() -> list[Path]:
    """Return where the oldest and the newest CPython are, or that which runs this."""
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = {
        tuple(map(int, path.name.split("."))): path / "bin"
        for path in root.glob("versions/3.*[0-9]")
    }
    able = [found[version] for version in sorted(found) if version >= (3, 8)]
    return [able[0], able[-1]] if able else [Path(sys.executable).parent]


class Stranger:
    """Somebody with the repository's five files, a CPython, and nothing else.

    Ports are those of the README, so there is a network for each.
    """

    def __init__(self, python: Path) -> None:
        self.space = tempfile.TemporaryDirectory()
        for name in FILES:
            shutil.copy(ROOT / name, self.space.name)
        self.environ = {"PATH": f"{python}:/usr/bin:/bin", "HOME": self.space.name}
        self.network = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", LOOPBACK],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.network.stdout
        if self.network.stdout.readline() != "up\n":
            raise AssertionError("no network namespace could be made")

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command in a shell."""
        return subprocess.Popen(
            ["nsenter", f"--net=/proc/{self.network.pid}/ns/net", "bash", "-c",
             command],
            cwd=self.space.name, env=self.environ, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        """Run a command; return its exit status and what it prints."""
        with self.start(command) as process:
            out, err = process.communicate(timeout=120)
        # curl's meter is for a terminal, and unittest's dots are not shown.
        quiet = command.startswith("curl") or "unittest" in command
        return process.returncode, out if quiet else out + err

    def follow(self) -> list[str]:
        """Run what the README prints; return what does not come out as printed."""
        problems, served = [], []
        for block in blocks("console"):
            for command, shown in SHOWN.findall(block):
                if "--demo" in command:
                    served.append(self.start(command))
                    continue
                expected = (1 if "--once" in command else 0, undated(shown))
                patience = 50 if command.startswith("curl") else 0
                seen = self.until(command, expected, patience)
                if seen:
                    problems.append(f"{command}\n{seen}")
        for process in served:
            os.killpg(process.pid, signal.SIGTERM)
            _, err = process.communicate(timeout=10)
            if process.returncode or "Traceback" in err:
                problems.append(f"the demo ended with {process.returncode}: {err}")
        return problems

    def until(self, command: str, expected: tuple[int, str], seconds: float) -> str:
        """Run it until it ends as expected; return how it ended instead."""
        deadline, seen = time.monotonic() + seconds, set()
        while True:
            status, out = self.run(command)
            if (status, undated(out)) == expected:
                return ""
            seen.add(f"exit status {status}: {out}")
            if time.monotonic() >= deadline:
                return "\n".join(sorted(seen))
            time.sleep(0.3)

    def close(self) -> None:
        """Leave."""
        self.network.communicate("")
        self.space.cleanup()


class Commands(unittest.TestCase):
    """Every command of the README, as printed, in a directory of five files."""

    def test_as_printed_on_the_oldest_and_the_newest_python(self) -> None:
        commands = [c for block in blocks("console") for c, _ in SHOWN.findall(block)]
        self.assertEqual(len(commands), 5, "see that follow() knows the new one")
        self.assertEqual(blocks("sh") + blocks("bash"), [])
        strangers = [Stranger(python) for python in pythons()]
        for stranger in strangers:
            self.addCleanup(stranger.close)
        with ThreadPoolExecutor() as pool:
            for problems in pool.map(Stranger.follow, strangers):
                if problems:
                    self.fail("\n".join(problems))


def undated(text: str) -> str:
    """Return a text with each number 0."""
    return re.sub(r"\d+(?:\.\d+)*", "0", text)


if __name__ == "__main__":
    unittest.main()
