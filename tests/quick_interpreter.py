"""Triton's interpreter without its repetitions, which take more than half of a kernel's time.

The interpreter replaces the functions of triton.language by its own, one by one: at every launch, and again at every
call of a device function inside it. Here each language module is patched once a launch. Every value that a kernel
computes works out anew what follows from its shape and type alone; here that is worked out once. And sums of integers
are computed a second time, in 64 bits, for a check that is left out unless options.debug is set.
"""

import dataclasses
import math
from functools import cache

import triton
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


def make_quick() -> None:
    """Takes effect for the whole process. The interpreter runs one launch at a time."""
    patch_once_a_launch()
    if triton.__version__.startswith("3.6."):  # what is replaced is known of these versions alone
        share_types()
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def patch_once_a_launch() -> None:
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


def share_types() -> None:
    """Values of one shape share it, types find their names and tuples their types when they are asked for them."""
    numpy_type, tuple_type = interpreter._get_np_dtype, core._type_for_tuple_values
    scalars: dict = {}

    def numpy_type_once(kind):
        scalar = kind.element_ty if isinstance(kind, core.block_type) else kind
        if isinstance(scalar, core.pointer_type):
            return numpy_type(scalar)
        if scalar.name not in scalars:
            scalars[scalar.name] = numpy_type(scalar)
        return scalars[scalar.name]

    @cache
    def block(sizes: tuple) -> tuple:
        """(shape of a type, its elements)."""
        return core.tuple(sizes), core.validate_block_shape(sizes)

    @cache
    def constants(sizes: tuple) -> tuple:
        """(shape of a value, its elements)."""
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def make_type(self, element_ty, shape):
        sizes = tuple(core._unwrap_shape(shape) if any(type(size) is not int for size in shape) else shape)
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        self.element_ty = element_ty
        self.shape, self.numel = block(sizes)

    def make_value(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape) if type.is_block() else ())

    def make_tuple(self, args, type=None):
        self.values = [*args]
        if type is not None:
            self._type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    def type_of_tuple(self):
        if "_type" not in self.__dict__:
            self._type = tuple_type(self.values)
        return self._type

    interpreter._get_np_dtype = numpy_type_once
    core.block_type.__init__ = make_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = make_value
    core.tuple.__init__ = make_tuple
    core.tuple.type = property(type_of_tuple, lambda self, type: setattr(self, "_type", type))
