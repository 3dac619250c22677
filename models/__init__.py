"""What a checkpoint is, how it runs, how it is trained, cut and judged."""
