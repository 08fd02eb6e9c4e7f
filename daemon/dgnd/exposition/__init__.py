"""What is counted, as Prometheus reads it. Only imported where it is configured."""
