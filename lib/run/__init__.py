"""What outlives the process: settings, checkpoints, logs, results."""
