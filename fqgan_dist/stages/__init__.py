"""What each stage of the pipeline does, as pure functions on chunks, and the two training tasks."""
