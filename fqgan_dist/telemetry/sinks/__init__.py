"""Where metrics go besides `metrics.jsonl`: a module per service, named as in `telemetry.sinks`."""
