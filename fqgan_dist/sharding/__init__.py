"""Making and changing datasets: sources, plan, shards, index."""
