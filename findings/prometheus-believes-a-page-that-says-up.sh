#!/usr/bin/env bash
# A page that has a metric named up takes the place of Prometheus' own up.
#
# prometheus 2.42.0 and victoria-metrics 1.79.5 of Debian 12.
# Guess: `up` of a target is the scraper's word alone.  A metric of that name on the page
# is dropped with a warning, or renamed, as a label `job` of the page becomes
# exported_job; both scrapers have up 1 for a page that they read, whatever it says.
# Seen: Prometheus stores the page's value and drops its own without a word, since the
# page's sample comes first and has the same labels and time; its page of targets says
# "up" all along.  The same goes for scrape_samples_scraped and its like.
# VictoriaMetrics stores both: two values at the same time, for each scrape.
#
#                                in Prometheus   in VictoriaMetrics
#   the page says up 0           0               0 and 1, each second
#   the page says up 5           5               5 and 1, each second
#   scrape_samples_scraped 77    77              77 and 3
#
# So an exporter that calls its gauge of some backend `up` fires everybody's alert on
# up == 0, for a target that is scraped well; on VictoriaMetrics min_over_time and
# changes of it are of no use.
set -euo pipefail

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait || true; rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq 'prometheus=2.42.0+ds-5+deb12u1' 'victoria-metrics=1.79.5+ds1-2+b5' &>/dev/null
for package in *.deb; do
    dpkg -x "$package" .
done

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }
page=$(free_port) prometheus=$(free_port) victoria=$(free_port)

mkdir site
printf 'up 0\nscrape_samples_scraped 77\nx 1\n' >site/metrics
python3 -m http.server -b 127.0.0.1 -d site "$page" &>/dev/null &
cat >config.yml <<END
scrape_configs:
  - {job_name: page, scrape_interval: 1s, static_configs: [{targets: ["127.0.0.1:$page"]}]}
END
usr/bin/prometheus --config.file=config.yml --storage.tsdb.path=prometheus-data \
    --web.listen-address="127.0.0.1:$prometheus" &>prometheus.log &
usr/bin/victoria-metrics -promscrape.config=config.yml -storageDataPath=victoria-data \
    -httpListenAddr="127.0.0.1:$victoria" &>victoria.log &
sleep 15
printf 'up 5\nscrape_samples_scraped 77\nx 1\n' >site/new
mv site/new site/metrics
sleep 10

cat >ask.py <<'END'
import json
import sys
import urllib.parse
import urllib.request

PROMETHEUS, VICTORIA = (f"http://127.0.0.1:{port}/api/v1/" for port in sys.argv[1:])

def fetch(url):
    return urllib.request.urlopen(url).read().decode()

def of_prometheus(name):
    query = urllib.parse.quote(f"{name}[1m]")
    (series,) = json.loads(fetch(f"{PROMETHEUS}query?query={query}"))["data"]["result"]
    return [float(value) for _, value in series["values"]]

def of_victoria(name):
    (line,) = fetch(f"{VICTORIA}export?match[]={name}").splitlines()
    series = json.loads(line)
    pairs = sorted(zip(series["timestamps"], series["values"]))
    return [value for _, value in pairs], len({time for time, _ in pairs})

(target,) = json.loads(fetch(f"{PROMETHEUS}targets"))["data"]["activeTargets"]
own = of_prometheus("up")
both, times = of_victoria("up")
print("health in Prometheus' page of targets:", target["health"])
print("up in Prometheus:", *(f"{value:g}" for value in own))
print(f"up in VictoriaMetrics, {times} times:", *(f"{value:g}" for value in both))
scraped = set(of_prometheus("scrape_samples_scraped"))
scraped_both = set(of_victoria("scrape_samples_scraped")[0])
print("scrape_samples_scraped:", scraped, scraped_both)
# The behaviour that was seen.
assert target["health"] == "up"
assert set(own) == {0, 5} and own == sorted(own)
assert len(both) == 2 * times and both.count(1) == times and set(both) == {0, 1, 5}
assert scraped == {77} and scraped_both == {77, 3}
END
python3 ask.py "$prometheus" "$victoria"
# Neither says anything of it.
if grep -iE 'warn|error|duplicate' prometheus.log; then
    exit 1
fi
