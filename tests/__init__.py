import os

import torch

# Where there is no GPU, Triton's kernels run in its interpreter. It asks for this when it is imported, as others do first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
