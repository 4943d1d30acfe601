"""What datasets are made from: one module for each kind of source, and `open_source`."""
