"""How a limit learns: memory, windows, averages."""
