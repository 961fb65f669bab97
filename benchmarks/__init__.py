"""`imprint bench`: the server beside its peers, on the same weights, prompts and sampling, in one run."""
