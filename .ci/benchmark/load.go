// A load of probes as a kubelet sends them: a new connection for each, and the time
// from before the connect to the end of the answer. Prints one line of JSON.
//
// It is here because wrk and hey keep connections or leave the connect out, and
// neither sends at a rate without waiting for answers.
//
//	load -clients 16 -seconds 5 HOST:PORT PATH    as fast as 16 clients can
//	load -clients 16 -requests 9999 HOST:PORT PATH
//	load -rate 1000 -seconds 5 HOST:PORT PATH     whatever the answers take
//	load -serve FILE HOST:PORT                    the metrics server: counts scrapes
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var (
	clients  = flag.Int("clients", 1, "")
	requests = flag.Int64("requests", 1<<40, "")
	seconds  = flag.Float64("seconds", 3600, "")
	rate     = flag.Int("rate", 0, "")
	pause    = flag.Duration("pause", 0, "")
	either   = flag.Bool("either", false, "take Unhealthy for right, too")
	serve    = flag.String("serve", "", "")
)

type tally struct {
	sync.Mutex
	took  []float64
	wrong int
	first string
}

func (t *tally) probe(address, request string, start time.Time) {
	answer, err := ask(address, request)
	took := time.Since(start).Seconds()
	text := string(answer)
	right := strings.HasPrefix(text, "HTTP/1.1 200 ") && strings.HasSuffix(text, "\nHealthy\n")
	unhealthy := strings.HasPrefix(text, "HTTP/1.1 503 ")
	t.Lock()
	defer t.Unlock()
	t.took = append(t.took, took)
	if err != nil || !(right || unhealthy && *either) {
		if t.wrong++; t.first == "" {
			t.first = fmt.Sprintf("%v %q", err, text)
		}
	}
}

func ask(address, request string) ([]byte, error) {
	connection, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err = connection.Write([]byte(request)); err != nil {
		return nil, err
	}
	return io.ReadAll(connection)
}

func closedLoop(t *tally, address, request string) {
	var wait sync.WaitGroup
	var sent int64
	end := time.Now().Add(time.Duration(*seconds * float64(time.Second)))
	for i := 0; i < *clients; i++ {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for atomic.AddInt64(&sent, 1) <= *requests && time.Now().Before(end) {
				t.probe(address, request, time.Now())
				time.Sleep(*pause)
			}
		}()
	}
	wait.Wait()
}

func openLoop(t *tally, address, request string) {
	var wait sync.WaitGroup
	start := time.Now()
	for i := 0; i < int(*seconds*float64(*rate)); i++ {
		due := start.Add(time.Duration(i) * time.Second / time.Duration(*rate))
		time.Sleep(time.Until(due))
		wait.Add(1)
		go func() {
			defer wait.Done()
			t.probe(address, request, due)
		}()
	}
	wait.Wait()
}

// Serves a file, two milliseconds later as an engine does, until its input ends.
func count(address string) {
	body, err := os.ReadFile(*serve)
	if err != nil {
		panic(err)
	}
	var total, now, most int64
	var guard sync.Mutex
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		guard.Lock()
		total, now = total+1, now+1
		if now > most {
			most = now
		}
		guard.Unlock()
		time.Sleep(2 * time.Millisecond)
		guard.Lock()
		now--
		guard.Unlock()
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		w.Write(body)
	})
	go func() { panic(http.ListenAndServe(address, nil)) }()
	io.Copy(io.Discard, os.Stdin)
	guard.Lock()
	print(map[string]any{"total": total, "most": most})
}

func print(result map[string]any) {
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		panic(err)
	}
}

func main() {
	flag.Parse()
	address := flag.Arg(0)
	if *serve != "" {
		count(address)
		return
	}
	request := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: kube-probe/1.33\r\n"+
		"Accept: */*\r\nConnection: close\r\n\r\n", flag.Arg(1), address)
	t, start := &tally{}, time.Now()
	if *rate > 0 {
		openLoop(t, address, request)
	} else {
		closedLoop(t, address, request)
	}
	took := time.Since(start).Seconds()
	sort.Float64s(t.took)
	at := func(share float64) float64 { return t.took[int(share*float64(len(t.took)-1))] * 1000 }
	print(map[string]any{
		"requests": len(t.took), "wrong": t.wrong, "first": t.first, "seconds": took,
		"p50": at(0.5), "p99": at(0.99), "max": at(1),
	})
}
