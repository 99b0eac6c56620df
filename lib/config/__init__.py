"""Every option: its name, type, default, help line and check; nothing heavy is imported."""
