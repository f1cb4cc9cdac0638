"""The training engine: data, ranks, optimizer, checkpoints, telemetry, and the loop."""
