"""The Python API: Engine, `upscale`, the worker thread, and the preflight check of the machine."""
