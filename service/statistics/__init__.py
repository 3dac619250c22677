"""Statistics of experiments: pure functions of counts and samples, on numpy and scipy alone."""
