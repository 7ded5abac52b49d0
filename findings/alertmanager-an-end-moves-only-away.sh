#!/usr/bin/env bash
# An alert's endsAt can be put off in Alertmanager, and never brought nearer.
#
# prometheus-alertmanager 0.25.0 of Debian 12.
# Guess: endsAt of a firing alert is a lease that each POST renews, as Prometheus does,
# so the last word holds: an alert that was to end in an hour, sent again to end in 4 s,
# is resolved after 4 s.  One sent again without an endsAt ends after resolve_timeout.
# Seen: both POSTs are answered with 200, and both alerts keep firing for the hour.
# Alert.Merge takes the later of two ends that lie ahead, unless the earlier POST had
# none: an end that Alertmanager made up from resolve_timeout may come nearer.  An end
# in the past takes effect at once.
#
#                                           6 s later
#   an hour, then 4 s                       firing for about an hour
#   an hour, then no endsAt                 firing for about an hour
#   no endsAt (10 minutes), then 4 s        resolved
#   an hour, then now                       resolved
#
# So who sends a long lease once is bound by it: a sender that now renews for four
# minutes, and dies, leaves an alert that fires until the first, long one is over.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq 'prometheus-alertmanager=0.25.0-1+b4' &>/dev/null
dpkg -x prometheus-alertmanager_*.deb .

cat >config.yml <<'END'
global: {resolve_timeout: 10m}
route: {receiver: nobody}
receivers: [{name: nobody}]
END
cat >send.py <<'END'
import datetime
import json
import sys
import time
import urllib.request

URL = f"http://127.0.0.1:{sys.argv[1]}/api/v2/alerts"
HOUR = datetime.timedelta(hours=1)
FOUR = datetime.timedelta(seconds=4)
NOW = datetime.timedelta(0)
CASES = {
    "an hour, then 4 s": (HOUR, FOUR),
    "an hour, then no endsAt": (HOUR, None),
    "no endsAt (10 minutes), then 4 s": (None, FOUR),
    "an hour, then now": (HOUR, NOW),
}
start = datetime.datetime.now(datetime.timezone.utc)

def post(name, left):
    alert = {"labels": {"alertname": name}, "startsAt": start.isoformat()}
    if left is not None:
        end = datetime.datetime.now(datetime.timezone.utc) + left
        alert["endsAt"] = end.isoformat()
    body = json.dumps([alert]).encode()
    request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
    assert urllib.request.urlopen(request).status == 200

for turn in 0, 1:
    for name, ends in CASES.items():
        post(name, ends[turn])
    time.sleep(1)
time.sleep(5)
now = datetime.datetime.now(datetime.timezone.utc)
firing = {}
for alert in json.load(urllib.request.urlopen(URL)):
    end = datetime.datetime.fromisoformat(alert["endsAt"].replace("Z", "+00:00"))
    firing[alert["labels"]["alertname"]] = (end - now).total_seconds()
for name in CASES:
    left = firing.get(name)
    print(f"{name:35}", f"firing for {left:.0f} s" if left else "resolved")
# The behaviour that was seen.
assert list(sorted(firing)) == ["an hour, then 4 s", "an hour, then no endsAt"], firing
assert min(firing.values()) > 3500
END
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
usr/bin/prometheus-alertmanager --config.file=config.yml --storage.path=data \
    --web.listen-address="127.0.0.1:$port" --cluster.listen-address= &>log &
for _ in $(seq 30); do
    curl -sf -m 1 -o /dev/null "127.0.0.1:$port/-/ready" && break
    sleep 1
done
python3 send.py "$port"
