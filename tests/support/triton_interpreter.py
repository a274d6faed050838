"""Triton's interpreter, without the third to half of its time that it spends on repeating itself.

A launch replaces the names of Triton's language by those of the interpreter, and every call of a function inside a
kernel replaces them again, though they have not changed.
"""

import importlib.util
from typing import Any


def patch_language_once() -> None:
    """Let calls inside a kernel keep the language as its launch has left it; nothing where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, Scope = interpreter._patch_lang, interpreter._LangPatchScope  # pyright: ignore

    def patch_unless_patched(fn: Any) -> Any:
        languages = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return Scope()

    interpreter._patch_lang = patch_unless_patched  # pyright: ignore
