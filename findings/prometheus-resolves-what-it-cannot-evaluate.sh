#!/usr/bin/env bash
# An alert whose rule begins to fail is resolved for people, and fires in Prometheus.
#
# prometheus 2.42.0 and prometheus-alertmanager 0.25.0 of Debian 12.
# Guess: an alert that fires goes on firing, in both, until its expression can be
# evaluated again and says otherwise; or it ends in both.  A gap starts `for` anew.
# Seen: a second series on the "one" side of a join (a pod seen on two nodes during a
# rollout) makes the expression an error.  A rule that fails sends nothing, so
# Alertmanager resolves the alert 4 x --rules.alert.resend-delay after the last good
# evaluation, four minutes by default, and says so to people, whereas the API and the
# pages of Prometheus say "firing" for as long as the error lasts.  A pending alert ages
# meanwhile: the one with `for: 10s` fires with the first good evaluation, although its
# condition had held for 3 s, then not for 12 s, then again for 1 s.
#
#                                 Short       Long, for 10 s   Alertmanager
#   the condition holds, 3 s      firing      pending          Short
#   it does not, and the join
#   is an error, 12 s             firing      pending          none, Short was resolved
#   it holds again, no error      firing      firing           Long and Short
#
# So a rule with a join says "resolved" just when labels go wrong, which is when pods are
# moved: alert on prometheus_rule_evaluation_failures_total, and join with max by.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait || true; rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq 'prometheus=2.42.0+ds-5+deb12u1' 'prometheus-alertmanager=0.25.0-1+b4' &>/dev/null
for package in *.deb; do
    dpkg -x "$package" .
done

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
page=$(free_port) prometheus=$(free_port) alertmanager=$(free_port) people=$(free_port)

cat >rules.yml <<'END'
groups:
  - name: joins
    rules:
      - {alert: Short, expr: 'busy * on (pod) group_left (node) pod_node > 0'}
      - {alert: Long, expr: 'busy * on (pod) group_left (node) pod_node > 0', for: 10s}
END
cat >prometheus.yml <<END
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [rules.yml]
alerting: {alertmanagers: [{static_configs: [{targets: ["127.0.0.1:$alertmanager"]}]}]}
scrape_configs:
  - {job_name: page, static_configs: [{targets: ["127.0.0.1:$page"]}]}
END
cat >alertmanager.yml <<END
route: {receiver: people, group_wait: 0s, group_interval: 1s}
receivers: [{name: people, webhook_configs: [{url: "http://127.0.0.1:$people/"}]}]
END
cat >people.py <<'END'
import http.server
import json
import sys

class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for alert in body["alerts"]:
            print(alert["labels"]["alertname"], alert["status"], flush=True)
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Hook).serve_forever()
END
cat >see.py <<'END'
import json
import sys
import urllib.request

def fetch(port, path):
    return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}"))

prometheus, alertmanager = sys.argv[1:]
(group,) = fetch(prometheus, "v1/rules")["data"]["groups"]
for rule in group["rules"]:
    print(rule["name"], rule["health"], rule["state"], end=", ")
names = sorted(alert["labels"]["alertname"] for alert in fetch(alertmanager, "v2/alerts"))
print("Alertmanager has", " and ".join(names) or "none")
END
show() { # the value of busy, the nodes of the pod
    echo "busy{pod=\"a\"} $1" >site/new
    for node in $2; do
        echo "pod_node{pod=\"a\",node=\"$node\"} 1" >>site/new
    done
    mv site/new site/metrics
}
see() {
    python3 see.py "$prometheus" "$alertmanager" | tee seen
    [[ $(<seen) == "$1" ]]
}

mkdir site
show 0 one
python3 people.py "$people" 2>people.log >told &
python3 -m http.server -b 127.0.0.1 -d site "$page" &>page.log &
usr/bin/prometheus-alertmanager --config.file=alertmanager.yml --storage.path=alerts \
    --web.listen-address="127.0.0.1:$alertmanager" --cluster.listen-address= &>alertmanager.log &
usr/bin/prometheus --config.file=prometheus.yml --storage.tsdb.path=data \
    --web.listen-address="127.0.0.1:$prometheus" --rules.alert.resend-delay=1s &>prometheus.log &
sleep 10

# The behaviour that was seen.
show 1 one
sleep 3
see 'Short ok firing, Long ok pending, Alertmanager has Short'
show 0 'one two'
sleep 12
see 'Short err firing, Long err pending, Alertmanager has none'
cat told
[[ $(<told) == $'Short firing\nShort resolved' ]]
show 1 one
sleep 3
see 'Short ok firing, Long ok firing, Alertmanager has Long and Short'
