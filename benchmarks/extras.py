"""Packages that may be missing, and the extra that installs them."""

from __future__ import annotations

EXTRAS = dict.fromkeys(("torch", "numpy", "numba", "matplotlib", "rich"), "bench")
EXTRAS |= dict.fromkeys(("sklearn", "statsmodels", "pandas"), "tasks")
EXTRAS |= dict.fromkeys(("sb3_contrib", "darts", "pytorch_lightning", "lightning"), "integrations")
EXTRAS |= dict.fromkeys(("pytorch_forecasting", "neuralforecast"), "integrations")
EXTRAS |= dict.fromkeys(("speechbrain", "torchaudio"), "speechbrain")


def hint(error: ImportError) -> str | None:
    """What to install, in one line; None where it is not for want of a package above."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    return f"{package} is not installed: pip install .[{EXTRAS[package]}]"
