"""The subjects of `benchmarks/data.py`: decoding, loaders, bandwidth, codes, scale."""
