"""One-off studies and the training of the bundled model. They write to `results` and `build`; see README.md."""
