"""The command `experiment`."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_model.commands.app import command


@command
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="fusion, data-size, domain, encoder, view, schedule, policy, reading-times, "
            "examples, or all"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder; the same command goes on where it stopped")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="folder of .txt files or of such folders, each a corpus; hf:NAME; repeatable"
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(help="small: minutes on two cores; medium: hours; paper: for one GPU")
    ] = "small",
    seeds: Annotated[int, typer.Option(help="runs of each arm")] = 3,
    corpus: Annotated[
        str | None, typer.Option(help="which corpus to train on (default: the largest)")
    ] = None,
    encoder: Annotated[str, typer.Option(help="as in train; bert-base-cased is the paper's")] = (
        "minilm"
    ),
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="reading-times, examples: trained models, the reference first (default: trained "
            "here, one a seed); fusion-lm-small-unfused and fusion-lm-small ship"
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="folder of finished runs, which can be committed (default: OUT/results)"),
    ] = None,
    finished: Annotated[
        bool, typer.Option("--finished", help="report the runs that are finished, train nothing")
    ] = False,
    reading_times: Annotated[
        Path | None,
        typer.Option(help="instead of Natural Stories: a TSV with story, word, time (ms)"),
    ] = None,
) -> None:
    """Repeat an experiment of the paper: training, statistics, figures and a report."""
    from fusion_model.experiments.runner import Experiments
    from fusion_model.experiments.sizes import size_by_name

    settings = Experiments(
        size_by_name(size),
        data or (),
        out,
        seeds,
        encoder,
        corpus,
        model or (),
        reading_times,
        results,
        finished,
    )
    for one in settings.available() if name == "all" else [name]:
        print(settings.run(one))
