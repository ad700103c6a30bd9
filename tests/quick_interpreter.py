"""Triton's interpreter without its largest repetition, which takes a third of a kernel's time.

The interpreter replaces the functions of triton.language by its own, one by one: at every launch, and again at every
call of a device function inside it. Here each language module is patched once a launch; nothing else changes.
"""

from functools import cache

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Takes effect for the whole process. The interpreter runs one launch at a time."""
    patch, patched = interpreter._patch_lang, set()

    @cache
    def languages(function) -> frozenset:
        seen = function.__globals__.values()
        return frozenset(module for module in (tl, tl.core) if any(value is module for value in seen))

    def patch_lang(function):
        found = languages(function)
        if found and found <= patched:
            return interpreter._LangPatchScope()  # nothing was changed, nothing is restored
        launched, scope = not patched, patch(function)
        patched.update(found)
        if launched:
            restore = scope.restore

            def finish() -> None:
                patched.clear()
                restore()

            scope.restore = finish
        return scope

    interpreter._patch_lang = patch_lang
