"""When things happen in training: trainer, engines, checkpoints, schedules."""
