"""Public checkpoints: where they are published, how they are fetched, and how they become one bundle.

Only `convert` and `single_file` import torch; planning and fetching do not.
"""
