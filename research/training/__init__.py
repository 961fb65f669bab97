"""Making slow weights: a memory to begin with, what the base makes of texts, objectives, and the outer loop."""
