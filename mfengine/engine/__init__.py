"""The engine around model and method: data, ranks, optimizer, checkpoints, telemetry, and the loop."""
