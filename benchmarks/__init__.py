"""What clipping costs and how exact it is: `python -m benchmarks --help`."""
