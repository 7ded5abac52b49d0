"""The README: its commands are run, and its tables, rules and manifests are true."""

from __future__ import annotations

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
from typing import Any

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


SERVERS = (
    "where its metrics are (`/metrics`, if not said), and the version that was run",
    "what to know", "takes 8081",
)
CLAUSES = re.compile(r"(?:\s+(?:for|keep_firing_for)\s+\w+)+\s*\Z")


def documented_rules() -> list[tuple[str, hc.Rule]]:
    """Return the expression of each rule in the README, as written, and the rule."""
    texts = re.findall(r"`([A-Z]\w+: [^`]+)`", README)
    environ = environ_of(named(deployments()["production"], "health-check"))
    for block in (environ["UNHEALTHY_WHEN"], *blocks("promql")):
        texts += map(hc.format_rule, hc.parse_rules(block))
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
        lines = README.splitlines()
        self.assertLessEqual(len(lines), 400)
        self.assertEqual([line for line in lines if len(line) > 120], [])
        for block in blocks("yaml"):
            self.assertNotRegex(block, r"[{]", "block style")

    def test_rules_parse(self) -> None:
        rules = documented_rules()
        self.assertGreater(len(rules), 5)
        for text, rule in rules:
            with self.subTest(text):
                self.assertEqual(hc.parse_expression(text), rule.expr)
                self.assertEqual(hc.parse_rules(hc.format_rule(rule)), (rule,))

    def test_the_table_of_servers_is_that_of_the_program(self) -> None:
        rows = table(*SERVERS)
        said = [at for servers, *_ in rows for at in code(servers)]
        self.assertEqual(len(said), len(hc.SERVERS))
        for server in hc.SERVERS:
            at = re.sub(r"\A(:\d+)/metrics\Z", r"\1", server.at)
            version, _, how = server.seen.rpartition(", ")
            shown = f"{server.name} `{at}`" + f" {version}" * (how == "run")
            pattern = re.compile(rf"(?:\A|, ){re.escape(shown)}(?:\Z|, | \()")
            (taken,) = {row[2] for row in rows if pattern.search(row[0])}
            takes = "8081" in server.ports.split()
            self.assertEqual(server.name in taken, takes, server.name)

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
        settings = {setting.name: setting for setting in hc.SETTINGS}
        for name, default, help in table("variable", "default", ""):
            setting = settings[code(name)[0]]
            self.assertEqual("".join(code(default)), setting.default)
            self.assertEqual(help, setting.help)
        self.assertLessEqual(set(settings), set(re.findall(r"\b[A-Z_]{8,}\b", README)))

    def test_help_mentions_every_setting_and_every_option(self) -> None:
        status, out, _ = run_main("--help", COLUMNS="80")
        self.assertEqual(status, 0)
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
        self.assertEqual(code(sentence), [*hc.SCRAPE_REASONS])

    def test_exit_statuses(self) -> None:
        healthy = self.metrics(b"tgi_queue_size 1\n")
        busy = self.metrics(b"tgi_queue_size 11\n")
        port = self.serve(METRICS_ENDPOINT=healthy.url)
        good, bad = {"METRICS_ENDPOINT": healthy.url}, {"METRICS_TIMEOUT": "soon"}
        refused = {"METRICS_ENDPOINT": f"http://127.0.0.1:{free_port()}/metrics"}
        taken = {**good, "APP_PORT": str(port), "APP_HOST": "127.0.0.1"}
        rule = {"UNHEALTHY_WHEN": "QueueFull: tgi_queue_size > 10"}
        sick = {"APP_PORT": str(self.serve(METRICS_ENDPOINT=busy.url, **rule))}
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
            "--wait EXPR": [
                (0, ["tgi_queue_size > 10"], good),
                (1, ["tgi_queue_size", "--timeout", "100ms"], good),
                (2, ["tgi_queue_size >"], good),
            ],
            "--check-config": [
                (0, [], good), (0, ["--format=prometheus"], good), (2, [], bad)
            ],
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

STUB: Manifest = yaml.safe_load("""
apiVersion: apps/v1
kind: Deployment
metadata: {name: vllm}
spec:
  selector: {matchLabels: {app: vllm}}
  template:
    metadata: {labels: {app: vllm}}
    spec: {containers: [{name: vllm, image: vllm}]}
""")


def merged(target: Any, patch: Any) -> Any:
    """Return what a patch makes of an object; what has a name is found by that."""
    if isinstance(patch, dict):
        target = target or {}
        both = {key: merged(target.get(key), value) for key, value in patch.items()}
        return {k: v for k, v in {**target, **both}.items() if v is not None}
    if isinstance(patch, list) and all("name" in item for item in patch):
        known = {item["name"]: item for item in target or []}
        for item in patch:
            known[item["name"]] = merged(known.get(item["name"]), item)
        return list(known.values())
    return patch


def pod(deployment: Manifest) -> Manifest:
    """Return the specification of a Deployment's pod."""
    spec: Manifest = deployment["spec"]["template"]["spec"]
    return spec


def containers(deployment: Manifest) -> list[Manifest]:
    """Return the containers of a Deployment, in the order of their start."""
    spec = pod(deployment)
    return [*spec.get("initContainers", []), *spec["containers"]]


def named(deployment: Manifest, name: str) -> Manifest:
    """Return a container of a Deployment by its name."""
    (found,) = (one for one in containers(deployment) if one["name"] == name)
    return found


def environ_of(container: Manifest) -> dict[str, str]:
    """Return the environment of a container."""
    return {one["name"]: one["value"] for one in container.get("env", [])}


def patched(deployment: Manifest, spec: Manifest) -> Manifest:
    """Return a Deployment with a patch of its pod."""
    found: Manifest = merged(deployment, {"spec": {"template": {"spec": spec}}})
    return found


def holding(text: str) -> Any:
    """Return the only block of YAML that has a text."""
    (found,) = (block for block in blocks("yaml") if text in block)
    return yaml.safe_load(found)


def over_http(path: str) -> Manifest:
    """Return the liveness probe for an image without Python."""
    ((text,),) = [re.findall(r"by `httpGet` at\n(.*?)\.", README, re.DOTALL)]
    fields = yaml.safe_load("\n".join(code(text)))
    get = {"path": path, "port": fields.pop("port")}
    return {"exec": None, "httpGet": get, **fields}


def deployments() -> dict[str, Manifest]:
    """Return each Deployment that the README makes, by what it is for."""
    (smallest,) = holding("spec.containers")
    tgi, whole, exits = map(holding, ("tgi_queue", "initContainers", "EXIT_WHEN"))
    production = patched(STUB, whole)
    server = named(production, "vllm")
    over = over_http(server["livenessProbe"]["exec"]["command"][-1])
    newest = {
        "name": "vllm",
        "livenessProbe": {"exec": None, **server["readinessProbe"]},
        "lifecycle": {"preStop": {"httpGet": {"path": "/drain", "port": 8081}}},
    }
    return {
        "smallest": patched(STUB, {"containers": [smallest]}),
        "TGI": patched(STUB, {"containers": [{**smallest, **tgi}]}),
        "production": production,
        "over HTTP": patched(
            production, {"containers": [{"name": "vllm", "livenessProbe": over}]}
        ),
        "1.36": patched(production, {
            "initContainers": [{"name": "health-check", **exits}],
            "containers": [newest],
        }),
    }  # fmt: skip


class Kubernetes(unittest.TestCase):
    """The manifests are valid, and mean what the README says of them."""

    def test_the_schemas_accept_them(self) -> None:
        for manifest in deployments().values():
            for version in ("1.36", "1.37"):
                kubernetes_validate.validate(manifest, version, strict=True)

    def test_a_full_queue_is_seen_though_each_third_scrape_is_late(self) -> None:
        environ = environ_of(named(deployments()["production"], "health-check"))
        replay = test_health_check.Replay(hc.load_config(environ))
        for count in range(9):
            page = test_health_check.vllm(64, 448, count)
            verdict = replay.look([page if count % 3 else "timeout"], 10)
        self.assertEqual(verdict.reason, "QueueFull")

    def test_variables_are_settings_and_their_values_are_right(self) -> None:
        for name, deployment in deployments().items():
            with self.subTest(name):
                environ = environ_of(named(deployment, "health-check"))
                self.assertLessEqual(set(environ), SETTINGS)
                config = hc.load_config(environ)
                self.assertEqual((config.warnings, config.app_port), ((), 8081))
                (target,) = config.metrics_endpoint
                self.assertIn(target.instance, ("localhost:8000", "localhost:8080"))
                status, _, err = run_main("--check-config", **environ)
                self.assertEqual((status, err), (0, ""))

    def test_names_that_a_pod_refers_to_are_there(self) -> None:
        for name, deployment in deployments().items():
            volumes = {v["name"] for v in pod(deployment).get("volumes", [])}
            mounted = {
                m["name"] for c in containers(deployment)
                for m in c.get("volumeMounts", [])
            }  # fmt: skip
            self.assertEqual(mounted, volumes, name)

    def test_probes_ask_for_what_there_is(self) -> None:
        for name, deployment in deployments().items():
            checker = named(deployment, "health-check")
            rules = {rule.name for rule in hc.load_config(environ_of(checker)).rules}
            for asked in containers(deployment):
                for kind in (key for key in asked if key.endswith("Probe")):
                    with self.subTest(name, container=asked["name"], kind=kind):
                        own = asked is checker
                        self.check_probe(kind, asked[kind], rules, own=own)

    def check_probe(
        self, kind: str, probe: Manifest, rules: set[str], *, own: bool
    ) -> None:
        """Check what the checker is asked itself, or what a server is."""
        (action,) = [probe[key] for key in ("exec", "httpGet") if key in probe]
        path = action["path"] if "path" in action else action["command"][-1]
        if own:
            due = "/livez" if kind != "readinessProbe" else "/health?exclude=QueueFull"
            self.assertEqual((path, action["port"]), (due, 8081))
        elif path == "/health":
            self.assertEqual(action["port"], 8000)
        else:
            self.assertEqual(kind, "livenessProbe")
            self.assertLessEqual(set(path.split("/")[-1].split(",")), rules)
            if "command" in action:
                self.assertEqual(action["command"][-2], "--probe")
            else:
                # The kubelet's longest rest, which ends late.
                rest = probe["periodSeconds"] * (probe["failureThreshold"] - 1)
                self.assertGreater(rest, 300 + 30)

    def test_a_checker_that_hangs_is_replaced_at_once_in_every_manifest(self) -> None:
        due = {
            "httpGet": {"path": "/livez", "port": 8081},
            "timeoutSeconds": 5, "terminationGracePeriodSeconds": 5,
        }  # fmt: skip
        for name, deployment in deployments().items():
            with self.subTest(name):
                checker = named(deployment, "health-check")
                self.assertEqual(checker["livenessProbe"], due)

    def test_a_wrong_rule_stops_a_rollout_before_it_starts_a_server(self) -> None:
        checker, _ = containers(deployments()["production"])
        self.assertEqual(checker["restartPolicy"], "Always")
        self.assertIn("startupProbe", checker)
        self.assertEqual(checker["terminationMessagePolicy"], "FallbackToLogsOnError")
        environ = environ_of(checker)
        environ["UNHEALTHY_WHEN"] = environ["UNHEALTHY_WHEN"].replace(">", "=>")
        status, _, err = run_main(**environ)
        self.assertEqual(status, 2)
        self.assertIn("^", err)

    def test_what_an_exit_restarts(self) -> None:
        checker = named(deployments()["1.36"], "health-check")
        (rule,) = checker["restartPolicyRules"]
        self.assertEqual(rule["exitCodes"], {"operator": "In", "values": [88]})
        self.assertIn("`preStop` waits for `/drain` at port 8081", words(README))

    def test_the_checker_is_restricted(self) -> None:
        own = named(deployments()["production"], "health-check")["securityContext"]
        self.assertTrue(own["runAsNonRoot"])
        self.assertEqual(own["seccompProfile"], {"type": "RuntimeDefault"})
        self.assertIs(own["allowPrivilegeEscalation"], False)
        self.assertEqual(own["capabilities"], {"drop": ["ALL"]})

    def test_images_are_of_this_version(self) -> None:
        tags = set(re.findall(r"/health-check:([\d.]+)", README))
        self.assertEqual(tags, {hc.__version__})
        self.assertIn(f'image.version="{hc.__version__}"', DOCKERFILE)


class Image(unittest.TestCase):
    """The Dockerfile."""

    def test_its_health_check_is_that_of_the_readme_on_another_path(self) -> None:
        (asked,) = re.findall(r'CMD (\[.*"--probe", "/livez"\])', DOCKERFILE)
        rows = table("client", "what to write", "without a path")
        (text,) = [code(what)[0] for client, what, _ in rows if client == "Docker"]
        said = yaml.safe_load(text)
        self.assertEqual(said, ["CMD", *json.loads(asked)[:-1], "/health"])

    def test_its_build_runs_every_test_that_no_slow_builder_can_fail(self) -> None:
        timeless = {
            name for name, found in vars(test_health_check).items()
            if isinstance(found, type) and issubclass(found, unittest.TestCase)
            and not issubclass(found, test_health_check.NetworkTest)
        }  # fmt: skip
        run = re.findall(r'"test_health_check\.(\w+)"', DOCKERFILE)
        self.assertEqual(sorted(run), sorted(timeless))


class Prometheus(server_test.ServerTest):
    """The alerts about the program itself."""

    def alerts(self) -> list[Manifest]:
        """Return those of the table."""
        return [
            {"alert": name, "expr": code(expr)[0], "for": hold}
            for name, expr, hold in table("alert", "expression", "for")
        ]

    @PROMTOOL
    def test_promtool_accepts_them(self) -> None:
        groups = {"groups": [{"name": "health_check", "rules": self.alerts()}]}
        self.assertEqual(promtool("rules", groups), "")

    def test_they_are_about_metrics_that_are_there(self) -> None:
        port = self.serve(METRICS_ENDPOINT=self.metrics(b"tgi_queue_size 1\n").url)
        _, _, page = server_test.get(port, "/metrics")
        for rule in self.alerts():
            for name in re.findall(r"\bhealth_check_\w+", rule["expr"]):
                self.assertIn(f"# TYPE {name} ", page)


# -- What it runs ---------------------------------------------------------------------

SHOWN = re.compile(r"(?m)^\$ (.*)\n((?:(?!\$ ).*\n)*)")
# exec runs the command here; there is nobody to ask for anything else.
KUBECTL = r"""#!/bin/bash
[[ $1 == exec ]] || exit 0
while [[ $1 != -- ]]; do shift; done
shift
target=$(curl -s localhost:8081/metrics | grep -o -m 1 '127.0.0.1:[0-9]*')
export METRICS_ENDPOINT=http://$target/metrics
exec "${@//\/app\/health_check.pyc/health_check.py}"
"""
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
        home = self.space.name
        self.environ = {"PATH": f"{python}:{home}:/usr/bin:/bin", "HOME": home}
        Path(home, "kubectl").write_text(KUBECTL)
        Path(home, "kubectl").chmod(0o755)
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
        quiet = quiet and process.returncode == 0
        return process.returncode, out if quiet else out + err

    def follow(self) -> list[str]:
        """Run what the README prints; return what does not come out as printed."""
        problems, served = [], []
        for block in blocks("console"):
            for command, shown in SHOWN.findall(block):
                if "--demo" in command:
                    served.append(self.start(command))
                    continue
                if command.startswith("kubectl"):
                    problems += self.ask(command)
                    continue
                patience = 50 if command.startswith("curl") else 0
                problems += self.until(command, undated(shown), patience)
        for process in served:
            os.killpg(process.pid, signal.SIGTERM)
            _, err = process.communicate(timeout=10)
            if process.returncode or "Traceback" in err:
                problems.append(f"the demo ended with {process.returncode}: {err}")
        return problems

    def ask(self, command: str) -> list[str]:
        """Run what would ask a pod; return what is wrong with its end."""
        status, out = self.run(command)
        wrong = status not in (0, 1) or "Traceback" in out or "failed" in out
        silent = " exec " in command and not out.strip()
        return [f"{command}\n{status}: {out}"] if wrong or silent else []

    def until(self, command: str, shown: str, seconds: float) -> list[str]:
        """Run it until it ends well, as shown; return how it ended instead."""
        deadline, seen = time.monotonic() + seconds, set()
        while True:
            status, out = self.run(command)
            if (status, undated(out)) == (0, shown):
                return []
            seen.add(f"exit status {status}: {out}")
            if time.monotonic() >= deadline:
                return [command, *sorted(seen)]
            time.sleep(0.3)

    def close(self) -> None:
        """Leave."""
        self.network.communicate("")
        self.space.cleanup()


class Commands(unittest.TestCase):
    """Every command of the README, as printed, in a directory of five files."""

    def test_as_printed_on_the_oldest_and_the_newest_python(self) -> None:
        commands = [c for block in blocks("console") for c, _ in SHOWN.findall(block)]
        self.assertEqual(len(commands), 9, "see that follow() knows the new one")
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
