"""How a cluster is made, and how runs are brought to their end on it."""
