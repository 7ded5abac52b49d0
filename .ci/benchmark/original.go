// What health_check.py is measured against: a health checker as one writes it in an
// afternoon. A scrape for each request without a timeout, the whole body in memory,
// and a search line by line for one series that has no labels.
package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
)

var errNoMetric = errors.New("no such metric")

func find(body, name string) (int, error) {
	for _, line := range strings.Split(body, "\n") {
		if strings.HasPrefix(line, name+" ") {
			return strconv.Atoi(strings.TrimPrefix(line, name+" "))
		}
	}
	return 0, errNoMetric
}

func main() {
	endpoint, name := os.Getenv("METRICS_ENDPOINT"), os.Getenv("METRIC_TO_CHECK")
	threshold, err := strconv.Atoi(os.Getenv("METRIC_THRESHOLD"))
	if err != nil || threshold == 0 {
		threshold = 15
	}
	port := os.Getenv("APP_PORT")
	if port == "" {
		port = "8081"
	}
	http.HandleFunc("/health", func(w http.ResponseWriter, r *http.Request) {
		response, err := http.Get(endpoint)
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		value := 0
		if text := string(body); err == nil && text != "" && text != "null" {
			value, err = find(text, name)
		}
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
		} else if value > threshold {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, "Unhealthy")
		} else {
			fmt.Fprintln(w, "Healthy")
		}
	})
	fmt.Fprintln(os.Stderr, http.ListenAndServe(":"+port, nil))
	os.Exit(1)
}
