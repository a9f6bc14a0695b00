"""Quantizes a checkpoint folder with calibration data, in less memory than its weights take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tersor.checkpoints.assembling import assemble
from tersor.checkpoints.blockwise import Blockwise, Done
from tersor.checkpoints.calls import token_embedding
from tersor.checkpoints.ends import decoded_rows, write_rounded
from tersor.checkpoints.job import Job, about, begin, known
from tersor.checkpoints.layout import held_names
from tersor.checkpoints.needs import Needs, check_room, needs_of
from tersor.checkpoints.packing import Progress, Silent
from tersor.checkpoints.parts import read_part
from tersor.checkpoints.skeleton import blocks_of, skeleton_of, without_weights
from tersor.checkpoints.source import Checkpoint, open_checkpoint
from tersor.checkpoints.tokens import check_tokens
from tersor.checkpoints.weights import Weights
from tersor.codec import check_apart, check_profile
from tersor.errors import CompressError, ModelError, OptionError, OutputError
from tersor.files import drafts
from tersor.forms import Affine
from tersor.methods.run import check
from tersor.methods.table import TABLE
from tersor.recipe import Step, defaults_of
from tersor.surgery.walk import Site, walk


@dataclass(frozen=True)
class Quantized:
    """What `quantize_folder` did.

    weights: that are quantized now; elements: in all tensors
    needs: what was said before it started
    blocks: with the seconds that each took, and the relative error of what it gives
    """

    path: Path
    bytes_before: int
    bytes_after: int
    elements: int
    weights: int
    needs: dict[str, Any]
    blocks: list[Done]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self) | {"path": str(self.path)}


def quantize_folder(
    folder: str | Path,
    out: str | Path,
    *,
    method: str = "quantize.gptq",
    options: Mapping[str, Any] | None = None,
    calibration: Tensor | None = None,
    ends: int | None = 8,
    work: str | Path | None = None,
    memory: float | None = None,
    model: nn.Module | None = None,
    profile: str = "small",
    progress: Progress | None = None,
) -> Quantized:
    """Quantizes the weights of a checkpoint block by block, and writes one .tersor file.

    In memory are one block, what the method needs for its largest weight, and a few millions of
    elements. Stopped at any moment and called again with the same arguments, it goes on at the
    block that was not finished, and writes the same bytes. `unpack` writes a checkpoint again,
    `tersor.load(out, into=network)` puts it into a network.

    folder: a Hugging Face folder of a language model; or with `model` any safetensors checkpoint
    method, options: a method that quantizes, and its options; `include` and `exclude` choose among
        all weights of the network
    calibration: (sequences, length) token ids, see `read_tokens`; None for methods without data
    ends: bits of the chosen weights outside of the blocks, which are rounded to nearest; None keeps
        them as they are
    work: where a run keeps what is finished, `out` with ".work" by default; removed at the end
    memory: bytes that it may use; refused where they, or those there are, do not suffice
    model: the network, without weights on the meta device, where the folder does not describe it

    Raises ModelError for a folder that is damaged or whose network has no such blocks, OptionError
    for options that do not fit, TaskError for other tokens, OutputError where there is no room.
    """
    started = time.monotonic()
    out = Path(out)
    _check_out(out, ends)
    check_profile(profile)
    told = progress or Silent()
    used = _options(method, options)
    checkpoint = open_checkpoint(folder)
    sources = [checkpoint.path, *(shard.path for shard in checkpoint.shards)]
    check_apart(out, sources, f"out={out} is what the file is made from")
    held = held_names(checkpoint)
    network = skeleton_of(Path(folder)) if model is None else without_weights(model)
    place = out.with_name(f"{out.name}.work") if work is None else Path(work)
    job, outer = _job(place, network, Weights(network, held), method, used, calibration)
    rounded = [] if ends is None else [site for site in outer if _sliced(site)]
    needs = _begun(job, checkpoint, ends, out, memory, told)
    told.plan(len(job.blocks))
    try:
        _round_ends(job, rounded, ends)
        finished = Blockwise(job, _table(job, rounded)).run(_teller(told))
    except CompressError:
        if not job.part(0).exists():
            job.clear()
        raise
    told.doing("writing the file")
    recipe = [{"method": method, "options": used}]
    if rounded:
        names = [site.name for site in rounded]
        recipe.append({"method": "quantize.rtn", "options": {"bits": ends, "include": names}})
    count = assemble(job, checkpoint, held, len(rounded), out, recipe, profile)
    job.clear()
    return Quantized(
        path=out,
        bytes_before=checkpoint.file_bytes,
        bytes_after=out.stat().st_size,
        elements=sum(p.numel() for p in network.parameters()),
        weights=count,
        needs=needs.as_json(),
        blocks=finished,
        seconds=time.monotonic() - started,
        notes=[f'"{site.name}" is kept as it is' for site in outer if site not in rounded],
    )


def _job(
    place: Path,
    network: nn.Module,
    weights: Weights,
    method: str,
    options: dict[str, Any],
    calibration: Tensor | None,
) -> tuple[Job, list[Site]]:
    """What is to be done in the blocks, and the chosen weights outside of them."""
    path, blocks = blocks_of(network)
    chosen, outer = _sites(network, path, len(blocks), options)
    tokens = None
    if calibration is not None:
        table = token_embedding(network)
        tokens = check_tokens(calibration, len(table.weight) if table is not None else 2**31)
    found = Job(place, network, path, list(blocks), weights, method, options, chosen, tokens)
    return found, outer


def _begun(
    job: Job,
    checkpoint: Checkpoint,
    ends: int | None,
    out: Path,
    memory: float | None,
    told: Progress,
) -> Needs:
    """States what is needed, refuses where that is not there, and makes or takes up the folder."""
    what = about(job, checkpoint, ends)
    going_on = known(job.folder, what)
    needs = needs_of(
        job.model,
        job.blocks,
        0 if job.tokens is None else job.tokens.numel(),
        solved=job.tokens is not None and "samples" in job.options,
        symmetric=job.options.get("symmetric") is not False,
        bits=float(job.options.get("bits", 8)),
        file_bytes=checkpoint.file_bytes,
    )
    check_room(needs, job.folder, out, memory, job.bytes_done)
    told.doing(str(needs))
    if going_on:
        job.clear_drafts()
        for draft in drafts(out.parent, escape(out.name)):
            draft.unlink()
    else:
        told.doing("looking at the weights")
        for _ in job.weights.check_finite():
            pass
        begin(job.folder, what)
    return needs


def _check_out(out: Path, ends: int | None) -> None:
    """Refuses at once what would fail after hours, when the file is written."""
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise OutputError(
            f"out={out} cannot be written; give the path of a file, in a folder that exists and "
            "is writable"
        )
    if ends is not None and ends not in range(1, 9):
        raise OptionError(f"ends={ends!r}; choose 1 to 8 bits, or None to keep them as they are")


def _options(method: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options, defaults included."""
    given = dict(options or {})
    check([Step(method, given)])
    if not method.startswith("quantize."):
        raise OptionError(f"method={method!r} does not quantize; name one of the family quantize")
    return defaults_of(TABLE[method]) | given


def _sites(
    model: nn.Module, path: str, count: int, options: Mapping[str, Any]
) -> tuple[list[list[str]], list[Site]]:
    """Names of the chosen weights of each block, and those outside of all."""
    chosen: list[list[str]] = [[] for _ in range(count)]
    outer = []
    for site in walk(model, options.get("include"), options.get("exclude")):
        if site.name.startswith(f"{path}."):
            chosen[int(site.name.removeprefix(f"{path}.").partition(".")[0])].append(site.name)
        else:
            outer.append(site)
    _check_apart(model.get_submodule(path))
    if not any(chosen):
        raise OptionError(
            f"include={options.get('include')!r} and exclude={options.get('exclude')!r} leave no "
            f"weight of the blocks {path}; exclude less"
        )
    return chosen, outer


def _check_apart(blocks: nn.Module) -> None:
    """Raises ModelError where two blocks share a weight."""
    owner: dict[int, int] = {}
    for at, block in enumerate(blocks.children()):
        for name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), at) != at:
                raise ModelError(
                    f'blocks {owner[id(parameter)]} and {at} share their "{name}", so they cannot '
                    "be quantized one by one; load the network whole and use tersor.run"
                )


def _sliced(site: Site) -> bool:
    return site.axis == 0 and site.weight.dim() == 2


def _round_ends(job: Job, rounded: list[Site], bits: int | None) -> None:
    """Writes the parts of weights outside of the blocks."""
    for at, site in enumerate(rounded):
        if bits is not None and not job.end(at).exists():
            group = job.options.get("group_size")
            weight = job.weights.tensor(site.name)
            write_rounded(job.end(at), site.name, weight, bits=bits, group_size=group)
            job.weights.forget()


def _table(job: Job, rounded: list[Site]) -> Callable[[Tensor], Tensor] | None:
    """Rows of the token embedding where it was rounded."""
    embedding = token_embedding(job.model)
    for at, site in enumerate(rounded):
        if embedding is not None and any(layer is embedding for layer, _ in site.uses):
            form = cast("Affine", read_part(job.end(at)).items[site.name])
            return lambda rows: decoded_rows(form, rows)
    return None


def _teller(told: Progress) -> Callable[[Done, int], None]:
    def after(done: Done, left: int) -> None:
        told.advance()
        minutes = done.seconds * left / 60
        error = "" if done.error is None else f", relative error {done.error:.3g}"
        told.doing(f"{done.path}: {done.seconds:.1f} s{error}; about {minutes:.0f} min left")

    return after
