"""Vectors of numbers inside numba kernels: sums in an order, and with roundings, that the source decides.

Left to itself a compiler picks the order of a sum from the shape of the loop around it, so the same member would get other
bits in another layout. Here a kernel says what is added to what, and where a product and a sum share one rounding (`fma`).
LLVM maps the vectors to whatever registers the processor has; sums and products are the same on each.

A vector's width is a power of two and part of its type. Functions that make one take `like`, a vector of the width wanted.
"""

import operator
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model


class Vector(types.Type):
    """The numba type of `width` numbers of one type."""

    def __init__(self, dtype: types.Float, width: int) -> None:
        super().__init__(name=f"Vector({dtype}, {width})")
        self.dtype = dtype
        self.width = width


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        element = dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.width))


def _places(indices: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))


def _intrinsic(builder: Any, name: str, args: Sequence[Any]) -> Any:
    """One of LLVM's own functions, on numbers or vectors of them."""
    kind = args[0].type
    element, prefix = (kind.element, f"v{kind.count}") if isinstance(kind, ir.VectorType) else (kind, "")
    suffix = prefix + ("f64" if isinstance(element, ir.DoubleType) else "f32")
    signature = ir.FunctionType(kind, [kind] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.{suffix}"), args)


def _address(context: Any, builder: Any, signature: Any, args: Any, vector: Vector) -> Any:
    """The address of a vector at an offset of a pointer."""
    first = builder.gep(args[0], [context.cast(builder, args[1], signature.args[1], types.intp)])
    return builder.bitcast(first, context.get_value_type(vector).as_pointer())


def _everywhere(context: Any, builder: Any, number: Any, vector: Vector) -> Any:
    kind = context.get_value_type(vector)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _places([0] * vector.width))


# Pointers -------------------------------------------------------------------------------------------------------------


def _point(kind: Any) -> Any:
    """The type of an argument with every array in it replaced by a pointer."""
    if isinstance(kind, types.Array):
        assert kind.layout == "C", "kernels read contiguous arrays"
        return types.CPointer(kind.dtype)
    if isinstance(kind, types.BaseNamedTuple):
        return types.NamedTuple([_point(part) for part in kind.types], kind.instance_class)
    return kind


def _extract(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        return context.make_array(kind)(context, builder, value).data
    if isinstance(kind, types.BaseNamedTuple):
        parts = [_extract(context, builder, part, builder.extract_value(value, i)) for i, part in enumerate(kind.types)]
        return context.make_tuple(builder, _point(kind), parts)
    return value


@intrinsic
def pointers(typing: Any, arrays: Any) -> Any:
    """An array, or all arrays in a named tuple, as pointers to their first entries.

    Passing an array to a function counts a reference, in an atomic operation that costs more than sixteen additions; a
    pointer is only a number. Whoever called the kernel keeps the arrays alive.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _extract(context, builder, arrays, args[0])

    return _point(arrays)(arrays), generate


@intrinsic
def shift(typing: Any, pointer: Any, offset: Any) -> Any:
    """The pointer some entries further on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [context.cast(builder, args[1], signature.args[1], types.intp)])

    return pointer(pointer, offset), generate


@intrinsic
def pointer_at(typing: Any, address: Any, like: Any) -> Any:
    """The pointer to an address in memory, of the type of another pointer: for as many arrays as there happen to be."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(like))

    return like(address, like), generate


@intrinsic
def as_integers(typing: Any, pointer: Any) -> Any:
    """The same memory as int64."""
    integers = types.CPointer(types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(integers))

    return integers(pointer), generate


def _get(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.load(builder.gep(args[0], [context.cast(builder, args[1], signature.args[1], types.intp)]))


def _set(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    place = builder.gep(args[0], [context.cast(builder, args[1], signature.args[1], types.intp)])
    builder.store(context.cast(builder, args[2], signature.args[2], signature.args[0].dtype), place)
    return context.get_dummy_value()


def _of_pointers(pointer: Any, offset: Any, *value: Any) -> Any:
    if not isinstance(pointer, types.CPointer):
        return None
    return types.void(pointer, offset, *value) if value else pointer.dtype(pointer, offset)


# Vectors --------------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def zeros(typing: Any, pointer: Any, width: Any) -> Any:
    """A vector of zeros of a pointer's type; `width` is a literal."""
    vector = Vector(pointer.dtype, width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(vector), None)

    return vector(pointer, width), generate


@intrinsic
def load(typing: Any, pointer: Any, offset: Any, like: Any) -> Any:
    """The vector at an offset."""
    vector = Vector(pointer.dtype, like.width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, signature, args, vector)
        return builder.load(place, align=pointer.dtype.bitwidth // 8)

    return vector(pointer, offset, like), generate


@intrinsic
def store(typing: Any, pointer: Any, offset: Any, value: Any) -> Any:
    """Write a vector at an offset."""
    assert pointer.dtype == value.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(context, builder, signature, args, value)
        builder.store(args[2], place, align=pointer.dtype.bitwidth // 8)

    return types.void(pointer, offset, value), generate


@intrinsic
def splat(typing: Any, number: Any, like: Any) -> Any:
    """One number in every place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _everywhere(context, builder, context.cast(builder, args[0], signature.args[0], like.dtype), like)

    return like(number, like), generate


@intrinsic
def spread(typing: Any, pointer: Any, offset: Any, like: Any) -> Any:
    """The number at an offset, in every place."""
    vector = Vector(pointer.dtype, like.width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = builder.load(builder.gep(args[0], [context.cast(builder, args[1], signature.args[1], types.intp)]))
        return _everywhere(context, builder, number, vector)

    return vector(pointer, offset, like), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """A b + c with one rounding, of numbers or vectors."""
    assert a == b == c

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _intrinsic(builder, "fma", args)

    return a(a, b, c), generate


@intrinsic
def largest(typing: Any, a: Any, b: Any) -> Any:
    """The larger of |a| and b, place by place; b where |a| is NaN."""
    assert a == b

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = _intrinsic(builder, "fabs", args[:1])
        return builder.select(builder.fcmp_ordered(">", size, args[1]), size, args[1])

    return a(a, b), generate


@intrinsic
def double(typing: Any, a: Any) -> Any:
    """The same numbers in double precision."""
    vector = Vector(types.float64, a.width)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if a == vector else builder.fpext(args[0], context.get_value_type(vector))

    return vector(a), generate


def _fold(builder: Any, value: Any, join: Any) -> Any:
    """Upper half onto lower half, until one is left."""
    while value.type.count > 1:
        count, undefined = value.type.count, ir.Constant(value.type, ir.Undefined)
        lower = builder.shuffle_vector(value, undefined, _places(range(count // 2)))
        upper = builder.shuffle_vector(value, undefined, _places(range(count // 2, count)))
        value = join(lower, upper)
    return builder.extract_element(value, ir.IntType(32)(0))


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """The sum over places, upper half onto lower half until one is left."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], builder.fadd)

    return a.dtype(a), generate


@intrinsic
def peak(typing: Any, a: Any) -> Any:
    """The largest over places."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))

    return a.dtype(a), generate


@intrinsic
def width(typing: Any, a: Any) -> Any:
    """How many numbers a vector has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), a.width)

    return types.int64(a), generate


# Operators ------------------------------------------------------------------------------------------------------------


def _arithmetic(instruction: str) -> Any:
    return lambda context, builder, signature, args: getattr(builder, instruction)(*args)


def _of_vectors(*vectors: Any) -> Any:
    return vectors[0](*vectors) if isinstance(vectors[0], Vector) and len(set(vectors)) == 1 else None


def _teach(symbol: Any, signature_of: Any, generate: Any, *kinds: Any) -> None:
    """Teach numba an operator of our types (its `overload` would do, but compiles a function for each)."""

    class Template(AbstractTemplate):
        key = symbol

        def generic(self, args: Any, kws: Any) -> Any:
            return signature_of(*args)

    infer_global(symbol)(Template)
    lower_builtin(symbol, *kinds)(generate)


_teach(operator.getitem, _of_pointers, _get, types.CPointer, types.Any)
_teach(operator.setitem, _of_pointers, _set, types.CPointer, types.Any, types.Any)
_teach(operator.add, _of_vectors, _arithmetic("fadd"), Vector, Vector)
_teach(operator.sub, _of_vectors, _arithmetic("fsub"), Vector, Vector)
_teach(operator.mul, _of_vectors, _arithmetic("fmul"), Vector, Vector)
_teach(operator.neg, _of_vectors, _arithmetic("fneg"), Vector)
