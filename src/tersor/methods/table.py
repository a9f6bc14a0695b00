"""Every technique by name: the one list that recipes, the planner and the command line read."""

from collections.abc import Callable

from torch import nn

from tersor.methods.cut.channels import channels
from tersor.methods.cut.depth import depth
from tersor.methods.cut.group_lasso import group_lasso
from tersor.methods.distill.attention import attention
from tersor.methods.distill.data_free import data_free
from tersor.methods.distill.decoupled import decoupled
from tersor.methods.distill.features import features
from tersor.methods.distill.layers import layers as taught_layers
from tersor.methods.distill.logits import logits
from tersor.methods.distill.on_policy import on_policy
from tersor.methods.distill.relations import relations
from tersor.methods.factorize.cp import cp
from tersor.methods.factorize.nmf import nmf
from tersor.methods.factorize.svd import svd
from tersor.methods.factorize.tensor_train import tensor_train
from tersor.methods.factorize.tucker import tucker
from tersor.methods.prune.gradient import gradient
from tersor.methods.prune.gradual import gradual
from tersor.methods.prune.l0 import l0
from tersor.methods.prune.lottery import lottery
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.prune.movement import movement
from tersor.methods.prune.obs import obs
from tersor.methods.prune.sparsegpt import sparsegpt
from tersor.methods.prune.wanda import wanda
from tersor.methods.quantize.adaround import adaround
from tersor.methods.quantize.awq import awq
from tersor.methods.quantize.binary import binary
from tersor.methods.quantize.cast import cast
from tersor.methods.quantize.dynamic import dynamic
from tersor.methods.quantize.entropy import entropy
from tersor.methods.quantize.fp4 import fp4
from tersor.methods.quantize.gptq import gptq
from tersor.methods.quantize.hqq import hqq
from tersor.methods.quantize.lsq import lsq
from tersor.methods.quantize.mixed import mixed
from tersor.methods.quantize.qronos import qronos
from tersor.methods.quantize.rate import rate
from tersor.methods.quantize.rtn import rtn
from tersor.methods.quantize.static import static
from tersor.methods.quantize.ternary import ternary
from tersor.methods.quantize.trellis import trellis
from tersor.methods.recover.batchnorm import batchnorm
from tersor.methods.recover.bias import bias
from tersor.methods.recover.lqer import lqer
from tersor.methods.recover.polish import polish
from tersor.methods.recover.scales import scales
from tersor.methods.share.kmeans import kmeans
from tersor.methods.share.layers import layers
from tersor.methods.share.product import product
from tersor.methods.transform.equalize import equalize
from tersor.methods.transform.permute import permute
from tersor.methods.transform.rotate import rotate
from tersor.methods.transform.smooth import smooth

TABLE: dict[str, Callable[..., nn.Module]] = {
    "cut.channels": channels,
    "cut.group_lasso": group_lasso,
    "cut.depth": depth,
    "share.layers": layers,
    "factorize.svd": svd,
    "factorize.tucker": tucker,
    "factorize.cp": cp,
    "factorize.nmf": nmf,
    "factorize.tensor_train": tensor_train,
    "transform.equalize": equalize,
    "transform.rotate": rotate,
    "transform.smooth": smooth,
    "transform.permute": permute,
    "prune.magnitude": magnitude,
    "prune.gradient": gradient,
    "prune.wanda": wanda,
    "prune.sparsegpt": sparsegpt,
    "prune.obs": obs,
    "prune.gradual": gradual,
    "prune.movement": movement,
    "prune.l0": l0,
    "prune.lottery": lottery,
    "quantize.cast": cast,
    "quantize.rtn": rtn,
    "quantize.gptq": gptq,
    "quantize.qronos": qronos,
    "quantize.awq": awq,
    "quantize.adaround": adaround,
    "quantize.mixed": mixed,
    "quantize.fp4": fp4,
    "quantize.hqq": hqq,
    "quantize.ternary": ternary,
    "quantize.binary": binary,
    "quantize.entropy": entropy,
    "quantize.trellis": trellis,
    "quantize.lsq": lsq,
    "quantize.rate": rate,
    "quantize.static": static,
    "quantize.dynamic": dynamic,
    "share.kmeans": kmeans,
    "share.product": product,
    "distill.logits": logits,
    "distill.decoupled": decoupled,
    "distill.features": features,
    "distill.attention": attention,
    "distill.relations": relations,
    "distill.layers": taught_layers,
    "distill.on_policy": on_policy,
    "distill.data_free": data_free,
    "recover.polish": polish,
    "recover.batchnorm": batchnorm,
    "recover.bias": bias,
    "recover.lqer": lqer,
    "recover.scales": scales,
}
