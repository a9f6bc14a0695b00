"""tersor compress: meets a budget, and writes the file and the report."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli.arguments import Data
from tersor.cli.running import Answer

if TYPE_CHECKING:
    from tersor.cli.job import Job


def compress(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model as for profile, or a job file (.yaml)."),
    ],
    data: Data = None,
    budget: Annotated[
        str | None,
        typer.Option(help='For example "size=0.15x, drop=0.5". [default: size=0.25x]'),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the run. The same job in it again resumes."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A .json, .yaml or .tersor file whose steps are taken as they are."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="How the file is coded: fast, small or max. [default: small]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the bootstrap intervals.")] = None,
) -> Answer:
    """Makes a model meet a budget, checks the written file, and reports.

    Without --data the choices are blind to what the model answers, and nothing is proven.
    """
    from tersor.cli.job import Job, read_job
    from tersor.cli.opening import example_for, opened
    from tersor.methods import read_recipe
    from tersor.plan import Budget
    from tersor.plan import compress as run
    from tersor.report import finish
    from tersor.report.terminal import report_view

    given: dict[str, str | int | None] = {"data": data, "budget": budget, "out": out}
    given |= {"recipe": recipe, "profile": profile, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    is_job = model.endswith((".yaml", ".yml"))
    named = read_job(Path(model)).model_dump() if is_job else {"model": model}
    job = Job(**{**named, **given})
    limits = Budget.of(job.budget)
    steps = read_recipe(job.recipe) if isinstance(job.recipe, str) else job.recipe
    source, task = opened(job.model, job.data)
    example, notes = example_for(source, None) if task is None else (None, [])
    try:
        result = run(
            source.model,
            task,
            limits,
            run=job.out,
            example=example,
            recipe=steps,
            profile=job.profile,
            seed=job.seed,
        )
    except KeyboardInterrupt:
        place = job.out or "its folder under runs/"
        raise KeyboardInterrupt(
            f"stopped; everything measured so far is kept in {place}: run the same command again "
            "to go on from there"
        ) from None
    report = {**result.report, "command": command(job, budget=str(limits))}
    report["notes"] = [*report["notes"], *notes]
    report["model"] = {**report["model"], "name": source.name}
    finish(report, result.folder, task)
    report["files"] = {
        "model": str(result.path),
        "report": str(result.folder / "report.html"),
    }
    return Answer(report, lambda: report_view(report))


def command(job: "Job", *, budget: str) -> str:
    """The command line that does this job again."""
    words = ["tersor", "compress", job.model]
    options = {"data": job.data, "budget": budget, "out": job.out, "recipe": job.recipe}
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    if job.profile != "small":
        words += ["--profile", job.profile]
    return shlex.join([*words, "--seed", str(job.seed)])
