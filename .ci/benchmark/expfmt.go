// Prints the seconds that each of N readings of a file by prometheus/common/expfmt
// took.
package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/prometheus/common/expfmt"
)

func main() {
	body, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	count, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	for ; count > 0; count-- {
		var parser expfmt.TextParser
		start := time.Now()
		families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
		took := time.Since(start)
		if err != nil || len(families) == 0 {
			panic(err)
		}
		fmt.Println(took.Seconds())
	}
}
