"""What the commands share: the application, common options, and errors as one line."""

import errno
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from fusion_model.devices import resolve_device

app = typer.Typer(
    name="fusion-lm",
    help="LSTM language models that fuse embeddings of the prefix from a pretrained encoder.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "folder, hub name, or fusion-lm-small, which ships"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
TextFiles = Annotated[
    list[str],
    typer.Option("--text", help="text file, folder of .txt files, or hf:NAME; repeatable"),
]
Split = Annotated[str, typer.Option(help="how text becomes sentences: sentences, lines")]
EncoderPath = Annotated[str | None, typer.Option(help="where the encoder lies now, if it moved")]
EncoderDtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, auto")]
Dtype = Annotated[str, typer.Option(help="of the LSTM: float32, bfloat16, float16, auto")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto: a GPU if there is one")]
Store = Annotated[Path | None, typer.Option(help="folder that keeps the prefix embeddings")]
ModelOrNone = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
Onnx = Annotated[
    Path | None,
    typer.Option(help="instead of a model: folder that fusion-lm export wrote; needs no PyTorch"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="with --onnx (default: all cores)")]
Backend = Annotated[
    str, typer.Option(help="of the recurrence: auto, torch, cudnn, triton, reference")
]


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; a user's mistake becomes one line and a non-zero exit."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from fusion_model.errors import FusionLMError

        try:
            _quiet_transformers()
            function(*args, **kwargs)
        except FusionLMError as error:
            _fail(str(error))
        except ModuleNotFoundError as error:
            extras = {"torch": "", "transformers": "", "onnx": "[onnx]", "onnxscript": "[onnx]"}
            extras["statsmodels"] = "[experiments]"
            if error.name not in extras:
                raise
            package = f'-e ".{extras[error.name]}" -c constraints.txt, in the repository'
            _fail(f"this needs {error.name}, which is not installed: pip install {package}")
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept", 130)
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.errno is None:
                raise
            full = error.errno == errno.ENOSPC
            where = f": {error.filename}" if error.filename else ""
            _fail(f"{'the disk is full: make room' if full else error.strerror}{where}")

    return app.command()(wrapped)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _quiet_transformers() -> None:
    if not installed("transformers"):
        return  # an exported model runs without
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(
    model: str,
    device: str,
    dtype: str,
    encoder: str | None,
    encoder_dtype: str,
    backend: str,
    policy: str | None = None,
) -> Any:
    import fusion_model

    return fusion_model.load(
        model,
        device=resolve_device(device),
        dtype=dtype,
        encoder=encoder,
        encoder_dtype=encoder_dtype,
        backend=backend,
        policy=policy,
    )


def open_model(
    model: str | None,
    onnx: Path | None,
    threads: int | None,
    device: str,
    dtype: str,
    encoder: str | None,
    encoder_dtype: str,
    backend: str,
    policy: str | None = None,
) -> Any:
    """A model, or an exported one; of the latter, what was settled at export cannot be chosen."""
    from fusion_model.errors import FusionLMError

    if onnx is None and model is not None:
        if threads is not None:
            raise FusionLMError("--threads goes with --onnx; PyTorch takes OMP_NUM_THREADS")
        return load_model(model, device, dtype, encoder, encoder_dtype, backend, policy)
    if onnx is None or model is not None:
        raise FusionLMError("name a model, or an exported one with --onnx: one of the two")
    for option, value, default in (
        ("--dtype", dtype, "float32"),
        ("--encoder", encoder, None),
        ("--encoder-dtype", encoder_dtype, "float32"),
        ("--backend", backend, "auto"),
        ("--policy", policy, None),
    ):
        if value != default:
            raise FusionLMError(f"{option} does not go with --onnx: it was settled at export")
    from fusion_model.export import OnnxFusionLM

    return OnnxFusionLM(onnx, device=device, threads=threads)


@contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears only once it is whole."""
    if path is None:
        yield sys.stdout
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
