"""Engine (bytes and Settings in, bytes and metrics out), its worker thread, and the checks before it loads."""
