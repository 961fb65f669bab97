"""Making slow weights: today the initial memory, fitted to text without gradients through the base."""
