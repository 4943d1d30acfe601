"""What `benchmarks/checkpoint.py` measures."""
