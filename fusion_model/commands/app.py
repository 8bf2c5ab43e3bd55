"""What the commands share: the application, common options, and errors as one line."""

import dataclasses
import errno
import functools
import importlib.util
import inspect
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

app = typer.Typer(
    name="fusion-lm",
    help="LSTM language models that fuse embeddings of the prefix from a pretrained encoder.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        from fusion_model import __version__

        print(f"fusion-lm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    pass


INTERRUPTED = 130  # exit status
KEEPING = ("train", "embed", "experiment")  # commands that go on from what is there
CORES = os.cpu_count() or 1
MODEL_HELP = "folder, hub name, or fusion-lm-small, which ships"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
TextFiles = Annotated[
    list[str],
    typer.Option(
        "--text", help="text file (-: standard input), folder of .txt files, or hf:NAME; repeatable"
    ),
]
Split = Annotated[str, typer.Option(help="how text becomes sentences: sentences, lines")]
EncoderPath = Annotated[str | None, typer.Option(help="where the encoder lies now, if it moved")]
EncoderDtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, auto")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto: a GPU if there is one")]
Store = Annotated[Path | None, typer.Option(help="folder that keeps the prefix embeddings")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How a model runs."""

    encoder: EncoderPath = None
    encoder_dtype: EncoderDtype = "float32"
    dtype: Annotated[str, typer.Option(help="of the LSTM: float32, bfloat16, float16, auto")] = (
        "float32"
    )
    device: Device = "auto"
    backend: Annotated[
        str, typer.Option(help="of the recurrence: auto, torch, cudnn, triton, reference")
    ] = "auto"

    def load(self, model: str, policy: str | None = None) -> Any:
        """The model by this name, with its encoder; `policy` in place of its own."""
        import fusion_model
        from fusion_model.devices import resolve_device

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(Running)}
        options["device"] = resolve_device(self.device)
        return fusion_model.load(model, policy=policy, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyModel(Running):
    """A model, or an exported one."""

    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None
    onnx: Annotated[
        Path | None,
        typer.Option(
            help="instead of a model: folder that fusion-lm export wrote; needs no PyTorch"
        ),
    ] = None
    threads: Annotated[
        int | None, typer.Option(min=1, max=CORES, help="with --onnx (default: all cores)")
    ] = None

    def open(self, policy: str | None = None) -> Any:
        """The model; of an exported one, what was settled at export cannot be chosen.

        Raises:
            FusionLMError: both are named, or none; an option that does not go with it.
        """
        from fusion_model.errors import FusionLMError

        if self.onnx is None and self.model is not None:
            if self.threads is not None:
                raise FusionLMError("--threads goes with --onnx; PyTorch takes OMP_NUM_THREADS")
            return self.load(self.model, policy)
        if self.onnx is None or self.model is not None:
            raise FusionLMError("name a model, or an exported one with --onnx: one of the two")
        settled = [f for f in dataclasses.fields(Running) if f.name != "device"]
        changed = [f.name for f in settled if getattr(self, f.name) != f.default]
        for name in [*changed, *(["policy"] if policy is not None else [])]:
            option = name.replace("_", "-")
            raise FusionLMError(f"--{option} does not go with --onnx: it was settled at export")
        from fusion_model.export import OnnxFusionLM

        return OnnxFusionLM(self.onnx, device=self.device, threads=self.threads)


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _fields(kind: Any) -> Iterator[inspect.Parameter]:
    """A parameter for each field; what a field's metadata has as help is an option's."""
    for field in dataclasses.fields(kind):
        annotation: Any = field.type
        if "help" in field.metadata:
            several = annotation == tuple[str, ...]
            help_text = typer.Option(help=field.metadata["help"])
            annotation = Annotated[list[str] if several else annotation, help_text]
        missing = field.default is dataclasses.MISSING
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if missing else field.default,
        )


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; a user's mistake becomes one line and a non-zero exit.

    A parameter that is a dataclass is given on the command line field by field.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for p in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(p.annotation):
            groups[p.name] = p.annotation
            parameters += _fields(p.annotation)
        else:
            parameters.append(p.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def wrapped(**given: Any) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from fusion_model.errors import FusionLMError

        _write_utf8()
        handlers = _take_signals(signal.default_int_handler)
        try:
            _quiet_transformers()
            for name, kind in groups.items():
                values = {f.name: given.pop(f.name) for f in dataclasses.fields(kind)}
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
                given[name] = kind(**values)
            function(**given)
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
            _take_signals(signal.SIG_IGN)  # what is left to do takes no time
            kept = "; what was finished is kept, run the same command to go on"
            _fail("interrupted" + (kept if function.__name__ in KEEPING else ""), INTERRUPTED)
        except BrokenPipeError:
            raise
        except Exception as error:
            in_rust = re.search(r"\(os error (\d+)\)", str(error))  # tokenizers, safetensors
            code = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
            if code is None:
                raise
            file = getattr(error, "filename", None)
            full = code == errno.ENOSPC
            reason = "the disk is full: make room" if full else os.strerror(code)
            _fail(f"{reason}: {file}" if file else reason)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return app.command()(wrapped)


def _write_utf8() -> None:
    """To files and pipes, whatever the locale; a file's name that is no text as its bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            errors = "backslashreplace" if stream is sys.stderr else "surrogateescape"
            stream.reconfigure(encoding="utf-8", errors=errors)


def _take_signals(handler: Any) -> dict[int, Any]:
    """Ctrl-C and SIGTERM do the same; what each did before, but for one that is ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def check_outputs(*paths: Path | None, texts: Iterable[str] = ()) -> None:
    """Whether files can be written, before the work.

    Raises:
        FusionLMError: one is also an input, or named twice.
        OSError: no file can be there.
    """
    from fusion_model.errors import FusionLMError
    from fusion_model.files import check_writable

    given = [path for path in paths if path is not None]
    for i, path in enumerate(given):
        if path.resolve() in [other.resolve() for other in given[:i]]:
            raise FusionLMError(f"{path} is named twice: give each output its own file")
        for source in map(Path, texts):
            inside = source.is_dir() and source.resolve() in path.resolve().parents
            if path.is_file() and (inside or (source.exists() and path.samefile(source))):
                raise FusionLMError(f"{path} is an input, too: name another file to write to")
        check_writable(path)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _quiet_transformers() -> None:
    if not installed("transformers"):
        return  # an exported model runs without
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, which `-` is, too, or a file that appears only once it is whole."""
    if path is None or str(path) == "-":
        yield sys.stdout
        return
    from fusion_model.files import replacing

    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        yield file
        file.close()  # before it takes the other's place
