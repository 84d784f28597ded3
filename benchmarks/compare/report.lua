-- What wrk found, in one line: requests, microseconds, p50, p99 (microseconds), failures.
done = function(summary, latency, requests)
   local errors = summary.errors
   local failed = errors.connect + errors.read + errors.write + errors.timeout + errors.status
   io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration,
                          latency:percentile(50), latency:percentile(99), failed))
end
