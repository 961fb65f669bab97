"""The training of slow weights: features of texts, objectives, the outer loop, and the calibration of the gate."""
