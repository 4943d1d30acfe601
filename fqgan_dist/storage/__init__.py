"""Where bytes are kept: local directories and S3 buckets behind one interface."""
