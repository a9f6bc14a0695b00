"""The operators a stored program may use: an explicit list, and what each is resolved to.

Every name here is deterministic and works on values alone: nothing reads files, resizes storage,
returns uninitialised memory or draws random numbers. A name that is missing from the list is
refused both when a model is traced and when a file is read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch._ops import OpOverload

from tersor.program.guards import GUARDS, scalar

# "add.Tensor" is an overload of aten.add; a bare "relu" is relu.default. A trailing "+_" says that
# the in-place operator of the same overload is allowed too.
_LISTED = """
conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution
conv_transpose1d conv_transpose2d.input conv_transpose3d.input
linear bilinear matmul mm bmm mv dot inner outer addmm+_ addmv+_ addbmm+_ baddbmm+_ addr+_
einsum tensordot kron chain_matmul linalg_vector_norm linalg_norm linalg_matrix_norm linalg_cross
cross norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype norm_except_dim _weight_norm
_weight_norm_interface cdist pairwise_distance cosine_similarity

batch_norm layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm
scaled_dot_product_attention lstm.input gru.input rnn_tanh.input rnn_relu.input
lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell embedding

relu+_ relu6+_ leaky_relu+_ prelu elu+_ selu+_ celu+_ gelu+_ silu+_ mish+_ sigmoid+_ log_sigmoid
tanh+_ hardtanh+_ hardswish+_ hardsigmoid+_ hardshrink softshrink softplus threshold+_ glu
softmax.int log_softmax.int logsumexp _softmax _log_softmax

max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool2d

add.Tensor+_ add.Scalar+_ sub.Tensor+_ sub.Scalar+_ mul.Tensor+_ mul.Scalar+_ div.Tensor+_
div.Scalar+_ div.Tensor_mode+_ div.Scalar_mode+_ rsub.Tensor rsub.Scalar neg+_ reciprocal+_
floor_divide floor_divide.Scalar floor_divide_.Tensor floor_divide_.Scalar
remainder.Tensor+_ remainder.Scalar+_ remainder.Scalar_Tensor fmod.Tensor+_ fmod.Scalar+_
pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar pow_.Scalar pow_.Tensor square+_ sqrt+_ rsqrt+_
exp+_ exp2+_ expm1+_ log+_ log2+_ log10+_ log1p+_ logaddexp sin+_ cos+_ tan+_ asin+_ acos+_ atan+_
atan2+_ sinh+_ cosh+_ asinh+_ acosh+_ atanh+_ sinc+_ erf+_ erfc+_ erfinv+_ lgamma+_ digamma+_ i0+_
abs+_ sign+_ sgn ceil+_ floor+_ round+_ round.decimals+_ trunc+_ frac+_ clamp+_ clamp.Tensor+_
clamp_min+_ clamp_min.Tensor+_ clamp_max+_ clamp_max.Tensor+_ clip clip.Tensor maximum minimum fmax
fmin lerp.Tensor+_ lerp.Scalar+_ addcmul+_ addcdiv+_ nan_to_num+_ hypot copysign.Tensor
copysign.Scalar xlogy.Tensor float_power.Tensor_Scalar float_power.Tensor_Tensor logit+_
true_divide.Tensor subtract.Tensor multiply.Tensor divide.Tensor negative absolute positive
deg2rad rad2deg

eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar
ge.Tensor ge.Scalar not_equal.Scalar not_equal.Tensor isnan isinf isfinite isclose
isin.Tensor_Tensor logical_and+_ logical_or+_ logical_xor+_ logical_not+_
bitwise_and.Tensor+_ bitwise_and.Scalar+_ bitwise_or.Tensor+_ bitwise_or.Scalar+_
bitwise_xor.Tensor+_ bitwise_xor.Scalar+_ bitwise_not+_
bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor
bitwise_right_shift.Tensor_Scalar __and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar
__xor__.Tensor __xor__.Scalar __lshift__.Scalar __rshift__.Scalar

sum sum.dim_IntList mean mean.dim nansum nanmean prod prod.dim_int max max.dim max.other min min.dim
min.other amax amin aminmax argmax argmin any any.dim any.dims all all.dim all.dims std.correction
std std.dim std_mean.correction var var.dim var.correction var_mean.correction median median.dim
mode cumsum cumprod cummax cummin logcumsumexp count_nonzero.dim_IntList count_nonzero quantile
quantile.scalar kthvalue topk sort sort.stable argsort argsort.stable msort trace bincount
searchsorted.Tensor searchsorted.Scalar bucketize.Tensor bucketize.Scalar unique_consecutive
diff

where.self where.ScalarSelf where.ScalarOther where.Scalar where masked_fill.Scalar+_
masked_fill.Tensor+_ masked_scatter+_ masked_select nonzero argwhere index.Tensor index_select
index_put+_ index_add+_ index_copy+_ index_fill.int_Scalar+_ index_fill.int_Tensor+_ gather take
take_along_dim scatter.src+_ scatter.value+_ scatter.reduce+_ scatter.value_reduce+_ scatter_add+_
scatter_reduce.two+_ select_scatter slice_scatter diagonal_scatter copy_ copy

view reshape reshape_as view_as flatten.using_ints unflatten.int ravel squeeze+_ squeeze.dim+_
squeeze.dims+_ unsqueeze+_ transpose.int permute t numpy_T mT adjoint swapaxes swapdims
movedim.int movedim.intlist moveaxis.int moveaxis.intlist expand expand_as broadcast_to
broadcast_tensors repeat repeat_interleave.self_int repeat_interleave.self_Tensor tile
cat concat stack hstack vstack dstack column_stack chunk split.Tensor split_with_sizes split.sizes
tensor_split.sections tensor_split.indices unsafe_chunk unsafe_split.Tensor unbind.int select.int
slice.Tensor narrow diagonal diag diag_embed tril+_ triu+_ flip fliplr flipud roll rot90 unfold
im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle meshgrid meshgrid.indexing
atleast_1d atleast_2d atleast_3d block_diag cartesian_prod _unsafe_view _reshape_alias
contiguous clone detach alias to.dtype to.device to.dtype_layout to.other _to_copy type_as
lift_fresh_copy resolve_conj resolve_neg

zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full arange arange.start
arange.start_step linspace logspace eye eye.m scalar_tensor tril_indices triu_indices fill.Scalar
fill.Tensor fill_.Scalar fill_.Tensor zero_ fill_diagonal_ one_hot hann_window hann_window.periodic
hamming_window hamming_window.periodic

pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
replication_pad2d replication_pad3d upsample_nearest1d.vec upsample_nearest2d.vec
upsample_nearest3d.vec upsample_linear1d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec
upsample_trilinear3d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec
_upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec affine_grid_generator grid_sampler
grid_sampler_2d

fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
fft_rfftn fft_irfftn fft_fftshift fft_ifftshift stft stft.center istft view_as_complex view_as_real
real imag conj complex polar angle

cross_entropy_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy
binary_cross_entropy_with_logits kl_div item
"""


def _names(listed: str) -> frozenset[str]:
    found = []
    for word in listed.split():
        name, _, overload = word.removesuffix("+_").partition(".")
        found.append(f"{name}.{overload or 'default'}")
        if word.endswith("+_"):
            found.append(f"{name}_.{overload or 'default'}")
    return frozenset(found)


ATEN = _names(_LISTED)

SCALAR: dict[str, Callable[..., Any]] = {
    **{
        f"sym.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "pow", "eq")
    },
    **{f"sym.{name}": getattr(operator, name) for name in ("ne", "lt", "le", "gt", "ge")},
    "sym.and": operator.and_,
    "sym.or": operator.or_,
    "sym.not": torch.sym_not,
    "sym.min": torch.sym_min,
    "sym.max": torch.sym_max,
    "sym.int": torch.sym_int,
    "sym.float": torch.sym_float,
    "sym.ite": torch.sym_ite,
    "sym.floor": math.floor,
    "sym.ceil": math.ceil,
    "sym.trunc": math.trunc,
    "sym.round": round,
    "sym.abs": abs,
    "sym.sqrt": torch.sym_sqrt,
}

WEIGHT, CONSTANT, ITEM, SIZE, NUMEL = "weight", "constant", "item", "size", "numel"
"""Operators of our own: the next weight, the next constant, one of several results, dimensions."""

OWN = (WEIGHT, CONSTANT, ITEM, SIZE, NUMEL)


def known(name: str) -> bool:
    """Whether a program may use the operator `name`."""
    return name in ATEN or name in SCALAR or name in OWN


@cache
def overload(name: str) -> OpOverload:
    """The torch operator behind "conv2d.default"; only for names on the list."""
    if name not in ATEN:
        raise KeyError(name)
    packet, _, variant = name.partition(".")
    found = getattr(getattr(torch.ops.aten, packet), variant)
    return cast("OpOverload", found)


# `torch.lstm` and its kin, unlike their overloads, can be seen and kept whole while tracing.
_WHOLE: dict[str, Callable[..., Any]] = {"lstm.input": torch.lstm, "gru.input": torch.gru}
_WHOLE |= {"rnn_tanh.input": torch.rnn_tanh, "rnn_relu.input": torch.rnn_relu}


def _item(values: Any, index: int) -> Any:
    return values[index]


def _size(tensor: torch.Tensor, dim: int) -> Any:
    return tensor.size(dim)


@cache
def resolve(name: str) -> Callable[..., Any]:
    """What runs for the operator `name`: torch's own function, guarded where sizes are free."""
    if name in SCALAR:
        return scalar(SCALAR[name])
    if name in OWN:
        own: dict[str, Callable[..., Any]] = {ITEM: _item, SIZE: _size, NUMEL: torch.Tensor.numel}
        return own[name]
    run: Callable[..., Any] = _WHOLE.get(name) or overload(name)
    guard = GUARDS.get(name.partition(".")[0])
    return guard(run) if guard else run
