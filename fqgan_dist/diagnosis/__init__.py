"""What could be wrong with a machine or a cluster, found out before a run (`fqgan doctor`)."""
