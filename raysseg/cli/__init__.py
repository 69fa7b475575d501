"""The raysseg command: argument parsing, progress and tables; all work is done elsewhere."""
