import os

import torch

# Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
