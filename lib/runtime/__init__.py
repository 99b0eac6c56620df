"""The machine under a run: devices, processes, precision, signals, memory, files written whole or not at all."""
