"""The limits of tables, for whoever needs them without torch: the server's edge and the Python client."""

MAX_COLUMNS = 256  # of a session, context and features of arms together; each value of a text column is a column
MAX_VALUES = 32  # of a categorical column that have a column of their own
MAX_LABELS = 100
MAX_ARMS = 256
MAX_NAME_BYTES = 64  # of a column, a label or an arm, in UTF-8
MAX_BATCH = 128  # examples or decisions of a request: fewer than the actions that can wait for their rewards
MAX_ABS = 1e15  # of a number: its square, and sums of squares, are far from overflowing in fp32
