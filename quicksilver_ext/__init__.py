"""QuickSilver: less work per token for frozen GPT-2 and Llama models.

    from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM

Names are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import QuickSilverConfig
    from .model import QuickSilverForCausalLM
    from .stats import GenerationStats

__version__ = "0.1.0"
__all__ = ["GenerationStats", "QuickSilverConfig", "QuickSilverForCausalLM", "__version__"]

_HOME = {"QuickSilverConfig": "config", "QuickSilverForCausalLM": "model", "GenerationStats": "stats"}
_MODULES = {"checkpoint": "weights.checkpoint"}  # by the names that users know


def _load_compiled() -> Any:
    """Imports _C, or says which file is the matter, why, and what to do."""
    import torch  # its libraries must be loaded first: _C finds them by name

    try:
        return import_module("quicksilver_ext._C")
    except ImportError as error:
        folder = Path(__file__).parent
        files = sorted(path for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))
        if not files:
            raise ImportError(
                f"{folder}/_C.*.so is missing: quicksilver_ext was not built. In its source tree: pip install ."
            ) from error
        raise ImportError(
            f"{files[0]} doesn't load under torch {torch.__version__}: {error}. If it was built for another Python, or "
            "torch is older than 2.10, mend that and build again. In its source tree: pip install ."
        ) from error


def __getattr__(name: str) -> Any:
    if name == "_C":
        return _load_compiled()
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if not name.startswith("_") and any(
        (Path(__file__).parent / f).is_file() for f in (f"{name}.py", f"{name}/__init__.py")
    ):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
