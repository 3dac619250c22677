"""Run the experts that survive: routing, the expert feed-forward, and the one place that picks an implementation."""
