"""Reads predict.py as Cog does: statically, never running it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_function() -> ast.FunctionDef:
    tree = ast.parse((ROOT / "predict.py").read_text())
    predictor = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Predictor")
    return next(n for n in predictor.body if isinstance(n, ast.FunctionDef) and n.name == "run")


def inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """name -> (annotation, keyword literals of Input). Raises ValueError where a value is no literal."""
    arguments = run_function().args
    results = {}
    for argument, default in zip(arguments.args[1:], arguments.defaults, strict=True):
        assert isinstance(default, ast.Call) and not default.args
        keywords = {k.arg or "": ast.literal_eval(k.value) for k in default.keywords}
        assert argument.annotation is not None
        results[argument.arg] = (ast.unparse(argument.annotation), keywords)
    return results
