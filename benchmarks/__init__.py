"""Measurements of Secateur against what people use today, each behind an oracle: no timing for a wrong answer."""
