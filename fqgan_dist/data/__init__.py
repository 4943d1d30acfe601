"""Datasets: storage, index, sample order, views, decoding, loaders."""
