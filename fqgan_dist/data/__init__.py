"""Reading datasets: storage, index, sample order, views, decoding, loaders."""
