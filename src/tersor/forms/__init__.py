"""Forms: the ways a weight may be stored. `KINDS` is every form a file may hold, by name."""

from tersor.forms.affine import Affine
from tersor.forms.bit_planes import BitPlanes
from tersor.forms.bitmask import Bitmask
from tersor.forms.bitshift import Bitshift
from tersor.forms.block_float import BlockFloat
from tersor.forms.codebook import Codebook
from tersor.forms.dense import Dense
from tersor.forms.fake_affine import FakeAffine
from tersor.forms.form import Form
from tersor.forms.hard_concrete import HardConcrete
from tersor.forms.nofm import NofM
from tersor.forms.product_codebook import ProductCodebook
from tersor.forms.residual import Residual
from tersor.forms.rotated import Rotated
from tersor.forms.rounded import Rounded
from tersor.forms.soft_mask import SoftMask
from tersor.forms.trellis import Trellis

KINDS: dict[str, type[Form]] = {
    form.kind: form
    for form in (
        Dense,
        Affine,
        BitPlanes,
        BlockFloat,
        Codebook,
        ProductCodebook,
        Bitmask,
        NofM,
        Trellis,
        Bitshift,
        Rotated,
        Residual,
    )
}

__all__ = [
    "KINDS",
    "Affine",
    "BitPlanes",
    "Bitmask",
    "Bitshift",
    "BlockFloat",
    "Codebook",
    "Dense",
    "FakeAffine",
    "Form",
    "HardConcrete",
    "NofM",
    "ProductCodebook",
    "Residual",
    "Rotated",
    "Rounded",
    "SoftMask",
    "Trellis",
]
