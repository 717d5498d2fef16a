"""The checkpoint names of attention's intermediate results; remat policies keep them by name."""

SAVED_QKV = "attention_qkv"  # queries, keys and values
SAVED_ATTENTION = "attention"  # the flash kernels' result and its log-sum-exp
