"""Triton's interpreter, quicker: imported before kernels run.

A kernel patches triton.language while it runs, and so does every function that it calls, again and to no effect, which
takes half of the time. Patching all of it for the kernel is enough.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of Triton, which is made for one or the other

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

_patch, _nothing = interpreter._patch_lang, interpreter._LangPatchScope
_all_of_it = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
interpreter._patch_lang = lambda fn: _patch(_all_of_it) if tl.core.is_builtin(tl.load) else _nothing()
