"""Reading datasets: index, sample order, views, decoding, loaders."""
