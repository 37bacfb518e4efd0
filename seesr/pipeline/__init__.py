"""One image from pixels to pixels. `pipeline.py` reads top to bottom as the algorithm; every stage has its module."""
